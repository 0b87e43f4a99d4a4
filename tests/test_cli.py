"""The command line: what each command prints, and with which status it leaves."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted
import pytest
from safetensors.numpy import save_file

import refattn as ra
from refattn import adapters, cli
from refattn.adapters import numpy as numpy_adapter
from refattn.oracle import vectors

pytestmark = pytest.mark.compiled

EXAMPLE = f"{Path(__file__).parents[1] / 'examples' / 'planted_bug.py'}:attention"

MINE = '''
import numpy as np


def attend(query, key, value, is_causal=False, scale=None, window=None):
    """Softmax attention with lse; wrong by half a key where there is a window."""
    key, value = (np.repeat(x, query.shape[1] // x.shape[1], 1) for x in (key, value))
    s = query @ key.swapaxes(2, 3) * np.float32(query.shape[3] ** -0.5 if scale is None else scale)
    ahead = np.arange(s.shape[3]) - np.arange(s.shape[2])[:, None] - (s.shape[3] - s.shape[2])
    left, right = window or (None, None)
    seen = (ahead <= 0 if is_causal else ahead < 10**9) & (ahead >= -(10**9 if left is None else left + FAULT))
    s = np.where(seen & (ahead <= (10**9 if right is None else right)), s, np.float32(-np.inf))
    top = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isneginf(top), 0, top))
    total = p.sum(-1, keepdims=True)
    out = p.astype(value.dtype) @ value / np.where(total > 0, total, 1)
    return out.astype(value.dtype), (top + np.log(total))[..., 0].astype(np.float32)
'''


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line and returns status, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["refattn", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
            sys.exit(0)
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with one right and one wrong implementation in it."""
    (tmp_path / "right.py").write_text(MINE.replace("FAULT", "0"))
    (tmp_path / "wrong.py").write_text(MINE.replace("FAULT", "1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES = ("--returns", "out,lse", "--rename", "causal=is_causal")


# ---- looking up -------------------------------------------------------------------------------------------------------------------------


def test_list_shows_every_variant_or_one_family(run):
    status, out, err = run("list")
    assert status == 0 and err == "" and all(name in out for name in ra.variants())
    status, out, _ = run("list", "--family", "state")
    assert status == 0 and {"retention", "gated_delta"} <= {line.partition(" ")[0] for line in out.splitlines()}
    assert "softmax" not in {line.partition(" ")[0] for line in out.splitlines()}


@pytest.mark.parametrize("name", ra.variants())
def test_show_and_cite_say_what_the_library_says(run, name):
    described = ra.describe(name)
    status, out, _ = run("show", name)
    assert status == 0 and " ".join(str(described).split()) in " ".join(out.split())
    status, out, _ = run("cite", name)
    assert status == 0 and out.strip() == ra.cite(name).strip()


def test_cost_reads_sizes_and_parameters(run):
    status, out, _ = run("cost", "softmax", "B=1", "Hq=32", "Hkv=8", "T=4096", "D=128", "causal=true", "--dtype", "bf16")
    expected = ra.cost("softmax", B=1, Hq=32, Hkv=8, T=4096, D=128, causal=True, dtype="bfloat16")
    assert status == 0 and f"{expected.flops:,}" in out and f"{expected.bytes:,}" in out


def test_doctor_says_what_works_and_why_the_rest_does_not(run, monkeypatch):
    monkeypatch.setattr(numpy_adapter, "REQUIRES", ("nothing_of_that_name",))
    status, out, _ = run("doctor")
    text = " ".join(out.split())
    assert status == 0 and ra.__version__ in text and "backend definition works" in text
    assert "nothing_of_that_name cannot be imported" in text and f"variants {len(ra.variants())}" in text
    assert all(f"adapter {name}" in text for name in adapters.names())


# ---- check -------------------------------------------------------------------------------------------------------------------------------


def test_check_leaves_with_0_where_it_agrees_and_1_where_it_does_not(run, here):
    status, out, err = run("check", "right.py:attend", *NAMES, "--suite", "quick")
    assert status == 0 and "PASS" in out and err == "", err
    status, out, err = run("check", "wrong.py:attend", *NAMES, "--suite", "quick")
    assert status == 1 and "FAIL" in out and "is in a call with window" in " ".join(out.split()) and err == ""


def test_the_readmes_first_command_points_at_the_planted_bug(run):
    status, out, err = run("check", EXAMPLE)
    assert status == 1 and err == ""
    assert "every failing row has its largest weight at key 16 or later; no passing row does" in " ".join(out.split())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_check_reads_dtype_profile_seed_and_settings(run, dtype):
    options = ["--dtype", dtype, "--profile", "math", "--seed", 3, "--set", "causal=top_left", "--set", "window=[4,0]", "--set", "scale=0.25"]
    status, out, _ = run("check", "numpy", "--suite", "quick", *options, "--json", "-")
    read = json.loads(out)
    assert status == 0 and read["dtype"] == dtype and read["profile"] == "math"
    assert read["params"] == {"causal": "top_left", "window": [4, 0], "scale": 0.25}
    assert "window" not in read["examined"], "a parameter that keeps its value is not varied"


def test_json_goes_to_standard_output_alone_or_to_a_file_beside_the_table(run, here):
    status, out, err = run("check", "numpy", "--suite", "quick", "--json", "-")
    assert status == 0 and json.loads(out)["passed"] is True and err == ""
    status, out, _ = run("check", "numpy", "--suite", "quick", "--json", "report.json")
    assert status == 0 and "PASS" in out and json.loads(Path("report.json").read_text())["variant"] == "softmax"


@pytest.mark.parametrize("extra", [(), ("--dtype", "bfloat16", "--profile", "eager"), ("--set", "window=[3, null]")])
def test_saved_operands_and_the_printed_command_fail_again(run, here, extra):
    status, out, _ = run("check", "wrong.py:attend", *NAMES, "--suite", "quick", "--save", "FILE.npz", "--json", "-", *extra)
    read = json.loads(out)
    assert status == 1
    _, table, _ = run("check", "wrong.py:attend", *NAMES, "--suite", "quick", *extra)
    command = table.strip().split("\n\n")[-1].replace(" \\\n", " ")
    assert shlex.split(command) == shlex.split(read["reproduce"])
    status, out, err = run(*shlex.split(command)[1:], "--json", "-")
    again = json.loads(out)
    assert status == 1 and err == ""
    assert again["cases"][0]["title"] == "the given operands" and again["cases"][0]["outcome"] == "differs"
    assert all(again[name] == read[name] for name in ("dtype", "profile", "variant"))


def test_inputs_are_read_from_npz_and_safetensors(run, here):
    rng = np.random.default_rng(0)
    operands = {n: rng.standard_normal((1, h, m, 8)).astype(np.float32) for n, h, m in (("q", 4, 6), ("k", 2, 9), ("v", 2, 9))}
    np.savez("operands.npz", **operands)
    save_file(operands, "operands.safetensors")
    for file in ("operands.npz", "operands.safetensors"):
        status, out, _ = run("check", "numpy", "--inputs", file, "--json", "-")
        assert status == 0 and json.loads(out)["cases"][0]["dims"] == {"B": 1, "Hq": 4, "T": 6, "D": 8, "Hkv": 2, "S": 9, "E": 8}


# ---- compare and vectors ---------------------------------------------------------------------------------------------------------------


def test_compare_judges_a_file_of_operands_and_outputs(run, here):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, m, 8)).astype(np.float32) for m in (6, 9, 9))
    out, lse = planted.attend(planted.RIGHT, q, k, v, causal=True)
    np.savez("good.npz", q=q, k=k, v=v, out=out, lse=lse)
    save_file({"q": q, "k": k, "v": v, "out": out}, "good.safetensors")
    np.savez("bad.npz", q=q, k=k, v=v, out=out, lse=lse + 1)
    assert run("compare", "good.npz", "--set", "causal=true")[0] == 0
    assert run("compare", "good.safetensors", "--set", "causal=true")[0] == 0
    assert run("compare", "good.npz")[0] == 1, "not causal"
    assert run("compare", "bad.npz", "--set", "causal=true")[0] == 1
    assert run("compare", "bad.npz", "--set", "causal=true", "--returns", "out")[0] == 0
    status, printed, _ = run("compare", "bad.npz", "--set", "causal=true", "--json", "-")
    read = json.loads(printed)
    assert status == 1 and read["worst"]["output"] == "lse" and read["params"] == {"causal": True}
    np.savez("other.npz", q=q.swapaxes(1, 2), k=k.swapaxes(1, 2), v=v.swapaxes(1, 2), out=out.swapaxes(1, 2))
    assert run("compare", "other.npz", "--set", "causal=true", "--layout", "BTHD")[0] == 0


def test_vectors_are_written_and_answers_judged(run, here):
    status, out, _ = run("vectors", "luong_dot", "linear", "-o", "golden", "--suite", "standard", "--seed", "1")
    manifest = json.loads(Path("golden/manifest.json").read_text())
    cases = manifest["cases"]
    assert status == 0 and out.split()[0] == str(len(cases)) and {c["variant"] for c in cases} == {"luong_dot", "linear"}
    assert manifest["suite"] == "standard" and manifest["seed"] == 1
    Path("answers").mkdir()
    for case in cases:
        held = vectors.read_tensors(Path("golden") / case["file"])
        save_file({"out": held["expected.out"].astype(np.float32)}, f"answers/{case['file']}")
    status, out, _ = run("vectors", "--verify", "golden", "answers")
    assert status == 0 and len(re.findall("agrees(?! with)", out)) == len(cases) and "PASS  answers agrees with linear" in out
    wrong = next(c for c in cases if c["about"] == "one key" and c["variant"] == "luong_dot")["file"]
    held = vectors.read_tensors(Path("golden") / wrong)
    save_file({"out": held["expected.out"].astype(np.float32) + 1}, f"answers/{wrong}")
    save_file({"out": held["expected.out"]}, "answers/more.safetensors")
    status, out, _ = run("vectors", "--verify", "golden", "answers", "--html", "pages", "--json", "found.json")
    assert status == 1 and out.count("differs") == 1 and re.search("more.safetensors +answers no case", out)
    assert re.search(r"differs +\S+ +out\[\d, \d, \d+\]", out) and "FAIL  answers does not agree with luong_dot: 1 of" in out
    found = json.loads(Path("found.json").read_text())
    assert not found["passed"] and found["strangers"] == ["more.safetensors"]
    assert [(r["variant"], r["passed"]) for r in found["reports"]] == [("luong_dot", False), ("linear", True)]
    assert sorted(path.name for path in Path("pages").iterdir()) == ["linear.html", "luong_dot.html"]
    status, out, _ = run("vectors", "--verify", "golden", "answers", "--json", "-")
    assert status == 1 and json.loads(out) == found


# ---- errors ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (("show", "softmx"), "no variant named 'softmx'; did you mean 'softmax'?"),
        (("cite", "softmx"), "no variant named 'softmx'"),
        (("list", "--family", "scord"), "no family named 'scord'; did you mean 'scored'?"),
        (("cost", "softmax", "B=1"), "softmax: Hq, "),
        (("cost", "softmax", "B"), "'B' is not NAME=VALUE"),
        (("check", "torhc"), "no adapter named 'torhc'; did you mean 'torch'?"),
        (("check", "nowhere.py:f"), "there is no file nowhere.py"),
        (("check", "numpy", "--variant", "retention"), "computes softmax, not retention"),
        (("check", "numpy", "--dtype", "float31"), "did you mean 'float32'"),
        (("check", "numpy", "--suite", "fast"), "no suite named 'fast'"),
        (("check", "numpy", "--profile", "flush"), "did you mean 'flash'"),
        (("check", "numpy", "--set", "causal=maybe"), "causal='maybe'; must be one of False, True, 'top_left'"),
        (("check", "numpy", "--set", "casual=true"), "did you mean 'causal'?"),
        (("check", "numpy", "--inputs", "nowhere.npz"), "there is no file nowhere.npz"),
        (("check", "numpy", "--inputs", "text.npz"), "text.npz could not be read as .npz"),
        (("check", "numpy", "--inputs", "pickled.npz"), "pickled.npz could not be read as .npz"),
        (("check", "numpy", "--suite", "quick", "--json", "no/such/folder.json"), "no/such/folder.json"),
        (("compare", "nowhere.npz"), "there is no file nowhere.npz"),
        (("compare", "operands.npz"), "holds q, but no output of softmax"),
        (("compare", "operands.npz", "--returns", "lse"), "but no output lse"),
        (("vectors",), "give either -o DIR, to write, or --verify DIR OUTPUTS, to judge"),
        (("vectors", "softmx", "-o", "out"), "no variant named 'softmx'"),
        (("vectors", "softmax", "-o", "out", "--suite", "large"), "no suite named 'large'"),
        (("vectors", "--verify", "golden", "answers"), "golden/manifest.json could not be read"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_a_wrong_call_is_one_line_and_status_2(run, here, words, says):
    Path("text.npz").write_text("not an archive")
    np.savez("pickled.npz", q=np.array([{}], dtype=object))
    np.savez("operands.npz", q=np.ones(3))
    status, _, err = run(*words)
    assert status == 2
    assert err.startswith("refattn: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("words", [("chekc",), ("check",), ("check", "numpy", "--unknown"), ("check", "numpy", "--seed", "three")])
def test_a_call_the_parser_refuses_is_status_2(run, words):
    status, out, err = run(*words)
    assert status == 2 and out == "" and "Usage" in err


def test_a_missing_framework_is_status_2_and_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(numpy_adapter, "REQUIRES", ("nothing_of_that_name",))
    for words in (("check", "numpy"), ("check", EXAMPLE, "--framework", "numpy")):
        status, out, err = run(*words)
        assert status == 2 and out == "" and err.count("\n") == 1
        assert "nothing_of_that_name cannot be imported" in err and numpy_adapter.INSTALL in err


def test_a_mistake_of_ours_is_no_disagreement(run, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("refattn.api.check", broken)
    status, _, err = run("check", "numpy")
    assert status == 2 and "ZeroDivisionError: ours" in err


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0 and all(word in out for word in ("list", "show", "cite", "cost", "check", "compare", "vectors", "doctor"))


def test_in_a_pipe_there_is_no_progress_bar_and_no_colour():
    command = [sys.executable, "-m", "refattn", "check", EXAMPLE, "--suite", "quick"]
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 1 and done.stderr == ""
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.peer
def test_torch_functions_are_checked_from_the_command_line(run, here):
    Path("theirs.py").write_text(
        "from torch.nn.functional import scaled_dot_product_attention as sdpa\n\n\n"
        "def attention(q, k, v, scale=None):\n    return sdpa(q, k, v, scale=scale, enable_gqa=True)\n\n\n"
        "def unscaled(q, k, v, scale=None):\n    return sdpa(q, k, v, scale=1.0, enable_gqa=True)\n"
    )
    for dtype in ("float32", "bfloat16"):
        assert run("check", "theirs.py:attention", "--framework", "torch", "--dtype", dtype)[0] == 0
    status, out, _ = run("check", "theirs.py:unscaled", "--framework", "torch", "--save", "FILE.npz", "--json", "-")
    assert status == 1 and "--framework torch" in json.loads(out)["reproduce"]
    assert run(*shlex.split(json.loads(out)["reproduce"])[1:])[0] == 1
