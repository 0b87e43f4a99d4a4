"""Golden vectors: what is written is what is read, a right answer in any format and language agrees, and nothing else does."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import planted
import planted_variants
import pytest
from safetensors.numpy import save_file

import refattn as ra
from refattn import catalog, definition, precision
from refattn.catalog import variant
from refattn.oracle import vectors
from refattn.problem import bind

pytestmark = pytest.mark.compiled

NAMES = ("softmax", "retention", "luong_dot")
READERS = Path(__file__).parents[1] / "examples" / "vectors"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return folder, vectors.write(folder, NAMES, "float32")


def operands_of(folder, case):
    held = vectors.read_tensors(folder / case["file"])
    return {n: x for n, x in held.items() if n in case["operands"]}


def answer(case, operands, d_out=None):
    """Answers as another program would compute them: none of refattn's code."""
    if case["variant"] == "softmax":
        params = {n: p for n, p in case["params"].items() if n != "empty_rows"}
        out, lse = planted.attend(planted.RIGHT, **operands, **params)
        return {"out": out, "lse": lse} | backward(operands, params, lse, d_out)
    if case["variant"] == "retention":
        out, state = planted_variants.retention(**operands, scale=case["params"]["scale"])
        return {"out": out, "state": state}
    return {"out": planted_variants.luong_dot(**operands)}


def backward(operands, params, lse, d_out):
    """Gradients of softmax attention by the textbook, a whole row at a time, in float32."""
    q, k, v = (operands[n].astype(np.float32) for n in "qkv")
    heads, n_q, d, n_k = q.shape[1], q.shape[2], q.shape[3], k.shape[2]
    k, v = (np.repeat(x, heads // x.shape[1], 1) for x in (k, v))
    scale, cap = np.float32(params["scale"] or d**-0.5), params["softcap"]
    seen = planted.visible(n_q, n_k, params["causal"], params["window"]) & operands.get("mask", np.array(True))
    raw = scale * q @ k.swapaxes(2, 3)
    scores = raw if cap is None else np.float32(cap) * np.tanh(raw / np.float32(cap))
    with np.errstate(invalid="ignore"):
        weights = np.where(seen, np.exp(scores + operands.get("bias", np.float32(0)) - lse[..., None]), np.float32(0))
    delta = weights * (d_out @ v.swapaxes(2, 3))
    d_scores = delta - weights * delta.sum(-1, keepdims=True)
    d_raw = scale * (d_scores if cap is None else d_scores * (1 - (scores / np.float32(cap)) ** 2))
    parts = {"d_k": d_raw.swapaxes(2, 3) @ q, "d_v": weights.swapaxes(2, 3) @ d_out}
    shared = {n: x.reshape(*operands[n[2:]].shape[:2], heads // operands[n[2:]].shape[1], *x.shape[2:]).sum(2) for n, x in parts.items()}
    found = {"d_q": d_raw @ k, **shared}
    if "bias" in operands:
        small = tuple(n for n, size in enumerate(operands["bias"].shape) if size == 1)
        found["d_bias"] = d_scores.sum(small, keepdims=True) if small else d_scores
    if "sinks" in operands:
        found["d_sinks"] = -(np.exp(operands["sinks"][:, None] - lse) * delta.sum(-1)).sum((0, 2))
    return found


def answered(golden, folder, change=lambda name, outputs: outputs):
    """A folder of answers to every case, after `change`."""
    source, manifest = golden
    folder.mkdir()
    for case in manifest["cases"]:
        d_out = vectors.read_tensors(source / case["file"]).get("d_out")
        outputs = change(case["file"], answer(case, operands_of(source, case), None if d_out is None else d_out.astype(np.float32)))
        if outputs is not None:
            save_file({n: np.ascontiguousarray(x) for n, x in outputs.items()}, folder / case["file"])
    return folder


def test_a_right_program_agrees_everywhere(golden, tmp_path):
    verdict = vectors.verify(golden[0], answered(golden, tmp_path / "out"))
    assert verdict.passed, "\n".join(map(str, verdict.reports))
    assert [report.variant.name for report in verdict.reports] == list(NAMES)
    cases = [case for report in verdict.reports for case in report.cases]
    assert len(cases) == len(golden[1]["cases"])
    assert {name for case in cases for name in case.ratios} == {"out", "lse", "state", "d_q", "d_k", "d_v", "d_bias", "d_sinks"}
    assert 0 < max(case.worst.ratio for case in cases) < 1


def test_a_manifest_says_all_a_stranger_needs(golden):
    folder, manifest = golden
    assert json.loads((folder / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert manifest["format"] == vectors.FORMAT and manifest["suite"] == "small" and manifest["seed"] == 0
    assert manifest["profile"]["name"] == "flash" and manifest["profile"]["accumulate"] == 2.0**-24
    assert {case["variant"] for case in manifest["cases"]} == set(NAMES) == manifest["variants"].keys()
    letters = {axis for v in NAMES for axis in variant(v).axes}
    assert manifest["axes"].keys() == letters and all(manifest["axes"].values())
    for case in manifest["cases"]:
        held, said = vectors.read_tensors(folder / case["file"]), manifest["variants"][case["variant"]]
        assert case["operands"].keys() <= said["operands"].keys() and case["params"].keys() == said["params"].keys()
        assert all(case["params"][name] is not None or name in (*case["resolved"], "softcap", "window") for name in case["params"])
        answers = {**case["outputs"], **case["gradients"]}
        assert held.keys() - {"d_out"} == {*case["operands"], *(f"{what}.{n}" for n in answers for what in ("expected", "tolerance"))}
        assert ("d_out" in held) == bool(case["gradients"])
        for name, about in case["operands"].items():
            assert [*held[name].shape] == about["shape"] and len(about["axes"].split()) == len(about["shape"])
            assert np.dtype(vectors._DTYPES[about["dtype"]]) == held[name].dtype
        for name, about in answers.items():
            assert [*held[f"expected.{name}"].shape] == about["shape"] == [*held[f"tolerance.{name}"].shape]
            assert held[f"expected.{name}"].dtype == held[f"tolerance.{name}"].dtype == np.float64 and about["certified"]
        assert hashlib.sha256((folder / case["file"]).read_bytes()).hexdigest() == case["sha256"]


def test_cases_use_every_parameter_and_every_optional_operand(golden):
    for name in NAMES:
        cases = [case for case in golden[1]["cases"] if case["variant"] == name]
        for p in variant(name).params:
            assert all(any(case["params"][p.name] == value for case in cases) for value in (p.default, *p.tries))
        for o in variant(name).operands:
            assert any(o.name in case["operands"] for case in cases)
            assert not o.broadcast or any(1 in case["operands"].get(o.name, {"shape": []})["shape"] for case in cases)
        assert len({json.dumps([case["dims"], case["params"], case["operands"], case["about"]]) for case in cases}) == len(cases)


def test_what_is_expected_is_the_definition_in_float64(golden):
    folder, manifest = golden
    for case in manifest["cases"]:
        held = vectors.read_tensors(folder / case["file"])
        params = {n: tuple(p) if isinstance(p, list) else p for n, p in case["params"].items()}
        problem = bind(variant(case["variant"]), (), {**operands_of(folder, case), **params})
        for name, x in definition.run(problem).items():
            if name in case["outputs"] and case["outputs"][name]["certified"].startswith("definition"):
                np.testing.assert_array_equal(held[f"expected.{name}"], x)
            if name in case["outputs"]:
                assert np.all(held[f"tolerance.{name}"] > 0)


class Certified:
    """Stands for `refattn.certify`, with a value of its own that can be told from the definition's."""

    def __init__(self):
        self.asked = []

    def __call__(self, name, *, returns, dtype, d_out=None, **keywords):
        self.asked.append((name, returns, d_out is not None))
        if name == "retention":
            raise ra.ParameterError(f"{name} has no enclosure")
        sizes = bind(variant(name), (), keywords).dims
        axes = {"d_" + o.name: np.shape(keywords.get(o.name)) for o in variant(name).operands}
        axes |= {o.name: tuple(sizes.get(a, 0) for a in o.axes.split()) for o in variant(name).outputs}
        found = tuple(Enclosed(np.full(axes[n], 0.25), np.full(axes[n], n != "lse")) for n in returns)
        return found if len(found) > 1 else found[0]


class Enclosed:
    def __init__(self, value, rounded):
        self.value, self.rounded = value, rounded


def test_certified_values_take_the_place_of_the_definition_s_and_the_manifest_says_so(tmp_path):
    certify = Certified()
    manifest = vectors.write(tmp_path, ["softmax", "retention"], "float32", certify=certify)
    assert {("softmax", ("out", "lse"), False), ("softmax", ("d_q", "d_k", "d_v"), True)} <= {*certify.asked} and (
        "retention",
        ("out", "state"),
        False,
    ) in certify.asked
    for case in manifest["cases"]:
        held, certified = vectors.read_tensors(tmp_path / case["file"]), case["variant"] == "softmax"
        answers = {**case["outputs"], **case["gradients"]}
        for name, about in answers.items():
            assert about["certified"].startswith("certified" if certified else "definition")
            assert (
                not certified
                or about["certified"].endswith("enclosed" if name == "lse" else "correctly rounded to float64")
                or not np.size(held[name[2:]])
            )
            assert not certified or (held[f"expected.{name}"] == 0.25).all()


@pytest.mark.parametrize("suite", vectors.SUITES)
def test_the_same_seed_writes_the_same_bytes_and_another_one_others(tmp_path, suite):
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        vectors.write(folder, ["softmax", "linear"], "bfloat16", suite=suite, seed=seed)
    one, two, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two
    assert one.keys() == other.keys() and one["softmax-05.safetensors"] != other["softmax-05.safetensors"]


def test_the_small_suite_can_be_committed_and_the_standard_one_is_larger(tmp_path):
    sizes = {}
    for suite in vectors.SUITES:
        vectors.write(tmp_path / suite, ["softmax"], "float32", suite=suite)
        sizes[suite] = sum(path.stat().st_size for path in (tmp_path / suite).iterdir())
    assert sizes["small"] < 200_000 < sizes["standard"] < 10_000_000


@pytest.mark.parametrize("name", catalog.names())
def test_every_variant_has_vectors_and_its_definition_passes_them(name, tmp_path):
    manifest = vectors.write(tmp_path / "golden", [name], "bfloat16")
    (tmp_path / "out").mkdir()
    for case in manifest["cases"]:
        held = vectors.read_tensors(tmp_path / "golden" / case["file"])
        rounded = {n: precision.round_to(held[f"expected.{n}"], np.dtype(ml_dtypes.bfloat16)) for n in case["outputs"]}
        save_file({n: np.array(x, order="C") for n, x in rounded.items()}, tmp_path / "out" / case["file"])
    wide = [o.name for o in variant(name).outputs if o.wide]
    verdict = vectors.verify(tmp_path / "golden", tmp_path / "out")
    wrong = {n for report in verdict.reports for case in report.failures for n, x in case.ratios.items() if (x > 1).any()}
    assert wrong <= {*wide}, "bfloat16 is too coarse for a wide output only"


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_operands_come_back_in_their_format_and_answers_in_any(dtype, tmp_path):
    manifest = vectors.write(tmp_path / "golden", ["softmax"], dtype)
    golden = tmp_path / "golden", manifest
    assert all(x.dtype.name in (dtype, "bool") for case in manifest["cases"] for x in operands_of(golden[0], case).values())
    if dtype != "float64":  # the kernel here computes in float32
        assert vectors.verify(golden[0], answered(golden, tmp_path / "out")).passed
        wide = answered(golden, tmp_path / "wide", lambda name, held: {n: x.astype(np.float64) for n, x in held.items()})
        assert vectors.verify(golden[0], wide).passed


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ra.DtypeError, match="not written in float8_e3m4 here; known are float64, float32"):
        vectors.write(tmp_path / "golden", ["softmax"], "float8_e3m4")
    with pytest.raises(ra.UnknownVariantError, match="no suite named 'smal'; did you mean 'small'"):
        vectors.write(tmp_path / "golden", ["softmax"], "float32", suite="smal")
    with pytest.raises(ra.UnknownVariantError, match="did you mean 'softmax'"):
        vectors.write(tmp_path / "golden", ["softmx"], "float32")
    assert not (tmp_path / "golden").exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda held: {n: x + np.float32(1e-3) for n, x in held.items()}, ""),
        (lambda held: {n: np.full_like(x, np.nan) for n, x in held.items()}, ""),
        (lambda held: {n: x.astype(ml_dtypes.bfloat16) for n, x in held.items()}, ""),
        (lambda held: {**held, "d_k": 2 * held["d_k"]}, ""),
        (lambda held: {n: x[None] for n, x in held.items()}, "has shape .*, must be .*, \\["),
        (lambda held: {n: x.astype(np.int32) for n, x in held.items()}, "int32, must be floating point"),
        (lambda held: {"lse": held["lse"]}, "holds no out; its tensors are lse"),
        (lambda held: {**held, "lse_": held["lse"]}, "holds lse_, which is no answer to this case; they are out, lse, d_q"),
        (lambda held: None, "no such file"),
    ],
)
def test_a_wrong_answer_to_one_case_is_found(golden, tmp_path, change, reason):
    spoiled = next(case["file"] for case in golden[1]["cases"] if case["about"] == "scores spread out")
    verdict = vectors.verify(golden[0], answered(golden, tmp_path / "out", lambda name, held: change(held) if name == spoiled else held))
    assert not verdict.passed and [report.passed for report in verdict.reports] == [False, True, True]
    [case] = verdict.reports[0].failures
    assert case.probe.title.startswith(Path(spoiled).stem) and "scores spread out" in case.probe.title
    if reason:
        assert case.outcome == "malformed" and re.search(reason, case.reason)
    else:
        assert case.worst.ratio > 1 and case.failing


def test_fewer_answers_are_judged_as_far_as_they_go_and_strange_files_are_reported(golden, tmp_path):
    folder = answered(golden, tmp_path / "out", lambda name, held: {"out": held["out"]})
    assert vectors.verify(golden[0], folder).passed
    save_file({"out": np.zeros(3)}, folder / "softmax-99.safetensors")
    (folder / "notes.txt").write_text("beside the answers")
    verdict = vectors.verify(golden[0], folder)
    assert verdict.strangers == ("softmax-99.safetensors",) and not verdict.passed and all(report.passed for report in verdict.reports)
    (folder / "softmax-00.safetensors").write_text("not tensors")
    assert "could not be read as safetensors" in vectors.verify(golden[0], folder).reports[0].failures[0].reason


def test_vectors_that_were_changed_are_not_judged_by(golden, tmp_path):
    folder, manifest = golden
    for name in [case["file"] for case in manifest["cases"]] + ["manifest.json"]:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert vectors.verify(tmp_path, answered(golden, tmp_path / "out")).passed
    target = tmp_path / manifest["cases"][3]["file"]
    spoiled = bytearray(target.read_bytes())
    spoiled[-1] ^= 1
    target.write_bytes(spoiled)
    with pytest.raises(ra.CandidateError, match=f"{target.name} is not the file its manifest describes"):
        vectors.verify(tmp_path, tmp_path / "out")
    target.unlink()
    with pytest.raises(ra.CandidateError, match="is not the file its manifest describes"):
        vectors.verify(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "text, says", [(None, "could not be read"), ("{", "could not be read"), ("[]", "has format None"), ('{"format": 99}', "has format 99")]
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text, says):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ra.CandidateError, match=says):
        vectors.verify(tmp_path, tmp_path)


def test_a_missing_folder_and_a_file_of_another_kind_are_errors(golden, tmp_path):
    with pytest.raises(ra.CandidateError, match="there is no folder"):
        vectors.verify(golden[0], tmp_path / "nowhere")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(ra.CandidateError, match="could not be read as safetensors"):
        vectors.read_tensors(tmp_path / "text.safetensors")


@pytest.mark.parametrize("dtype", [*vectors._DTYPES.values()])
@pytest.mark.parametrize("shape", [(2, 3), (0, 4), (), (5,)])
def test_every_element_type_and_shape_is_read_bit_by_bit(tmp_path, dtype, shape):
    x = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    save_file({"x": x}, tmp_path / "x.safetensors")
    read = vectors.read_tensors(tmp_path / "x.safetensors")["x"]
    assert read.dtype == x.dtype and read.shape == x.shape and read.tobytes() == x.tobytes()


# ---- programs in other languages ----------------------------------------------------------------------------------------------------


def built(language, folder):
    """The commands that run the example reader of a language as it is, and with a planted mistake."""
    if language == "javascript":
        node = ["node", str(READERS / "attention.mjs")]
        return lambda wrong, *folders: [*node, *folders, *(["top-left"] if wrong else [])]
    if language == "rust":
        made = folder / "attention"
        subprocess.run(["rustc", "--edition", "2021", "-O", "-D", "warnings", "-o", str(made), str(READERS / "attention.rs")], check=True)
        return lambda wrong, *folders: [str(made), *folders, *(["top-left"] if wrong else [])]
    for name, flags in (("right", []), ("wrong", ["-DTOP_LEFT"])):
        made, source = str(folder / name), str(READERS / "attention.c")
        subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-O2", *flags, "-o", made, source, "-lm"], check=True)
    return lambda wrong, *folders: [str(folder / ("wrong" if wrong else "right")), *folders]


TOOLS = {"c": "gcc", "javascript": "node", "rust": "rustc"}


@pytest.mark.peer
@pytest.mark.parametrize("language", TOOLS)
def test_a_program_in_another_language_is_judged_by_what_it_writes(language, tmp_path):
    assert shutil.which(TOOLS[language]) is not None, f"{TOOLS[language]} is not installed, and what is not run is not passed"
    command = built(language, tmp_path)
    vectors.write(tmp_path / "golden", ["softmax"], "float32", suite="standard")
    for wrong in (False, True):
        answers = tmp_path / f"answers-{wrong}"
        answers.mkdir()
        subprocess.run(command(wrong, str(tmp_path / "golden"), str(answers)), check=True)
        verdict = vectors.verify(tmp_path / "golden", answers)
        assert verdict.passed != wrong, str(verdict.reports[0])
    failing = {case.probe.title.partition(": ")[2] for case in verdict.reports[0].failures}
    assert failing >= {"causal=True", "window=(5, 0)", "window=(2, 3)"}
    assert not any("bias" in title or "sinks" in title or "queries" in title for title in failing)
