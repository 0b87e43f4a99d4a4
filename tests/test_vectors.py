"""Golden vectors: what is written is what is read, a right answer in any format agrees, and nothing else does."""

import hashlib
import json

import ml_dtypes
import numpy as np
import planted
import planted_variants
import pytest
from safetensors.numpy import save_file

import refattn as ra
from refattn import definition
from refattn.catalog import variant
from refattn.oracle import vectors
from refattn.problem import bind

pytestmark = pytest.mark.compiled

NAMES = ("softmax", "retention", "luong_dot")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return folder, vectors.write(folder, NAMES, "float32")


def operands_of(folder, case):
    held = vectors.read_tensors(folder / case["file"])
    return {n: x for n, x in held.items() if not n.startswith(("expected.", "tolerance."))}


def answer(case, operands):
    """Outputs as another program would compute them: none of refattn's code."""
    if case["variant"] == "softmax":
        params = {n: p for n, p in case["params"].items() if n != "empty_rows"}
        out, lse = planted.attend(planted.RIGHT, **operands, **params)
        return {"out": out, "lse": lse}
    if case["variant"] == "retention":
        out, state = planted_variants.retention(**operands, scale=case["params"]["scale"])
        return {"out": out, "state": state}
    return {"out": planted_variants.luong_dot(**operands)}


def answered(golden, folder, change=lambda name, outputs: outputs):
    """A folder of answers to every case, after `change`."""
    source, manifest = golden
    folder.mkdir()
    for case in manifest["cases"]:
        outputs = change(case["file"], answer(case, operands_of(source, case)))
        if outputs is not None:
            save_file({n: np.ascontiguousarray(x) for n, x in outputs.items()}, folder / case["file"])
    return folder


def test_a_right_program_agrees_everywhere(golden, tmp_path):
    rows = vectors.verify(golden[0], answered(golden, tmp_path / "out"))
    assert rows and all(row.agrees for row in rows), [row for row in rows if not row.agrees]
    assert {row.output for row in rows} == {"out", "lse", "state"}
    assert {row.case for row in rows} == {case["file"] for case in golden[1]["cases"]}
    assert 0 < max(row.ratio for row in rows) < 1


def test_a_manifest_says_all_a_stranger_needs(golden):
    folder, manifest = golden
    assert json.loads((folder / "manifest.json").read_text())["cases"] == json.loads(json.dumps(manifest["cases"]))
    assert {case["variant"] for case in manifest["cases"]} == set(NAMES)
    for case in manifest["cases"]:
        operands = operands_of(folder, case)
        assert operands.keys() == case["operands"].keys()
        for name, axes in case["operands"].items():
            assert operands[name].dtype in (np.float32, np.bool_) and len(axes.split()) == operands[name].ndim
        assert set(case["params"]) == {p.name for p in variant(case["variant"]).params}
        assert hashlib.sha256((folder / case["file"]).read_bytes()).hexdigest() == case["sha256"]
    features = {p for case in manifest["cases"] if case["variant"] == "softmax" for p, value in case["params"].items() if value not in (None, False)}
    assert {"scale", "softcap", "causal", "window"} <= features
    assert any("mask" in case["operands"] for case in manifest["cases"]) and any("sinks" in case["operands"] for case in manifest["cases"])


def test_what_is_expected_is_the_definition_in_float64(golden):
    folder, manifest = golden
    for case in manifest["cases"]:
        held = vectors.read_tensors(folder / case["file"])
        params = {n: tuple(p) if isinstance(p, list) else p for n, p in case["params"].items()}
        problem = bind(variant(case["variant"]), (), {**operands_of(folder, case), **params})
        for name, x in definition.run(problem).items():
            np.testing.assert_array_equal(held[f"expected.{name}"], x)
            assert np.all(held[f"tolerance.{name}"] > 0)


def test_the_same_vectors_are_written_every_time(golden, tmp_path):
    again = vectors.write(tmp_path, NAMES, "float32")
    assert [case["sha256"] for case in again["cases"]] == [case["sha256"] for case in golden[1]["cases"]]


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_operands_come_back_in_their_format_and_answers_in_any(dtype, tmp_path):
    manifest = vectors.write(tmp_path / "golden", ["softmax"], dtype)
    golden = tmp_path / "golden", manifest
    assert all(x.dtype.name in (dtype, "bool") for case in manifest["cases"] for x in operands_of(golden[0], case).values())
    if dtype != "float64":  # the kernel here computes in float32
        rows = vectors.verify(golden[0], answered(golden, tmp_path / "out"))
        assert all(row.agrees for row in rows)
        wide = answered(golden, tmp_path / "wide", lambda name, held: {n: x.astype(np.float64) for n, x in held.items()})
        assert all(row.agrees for row in vectors.verify(golden[0], wide))


def test_a_format_the_files_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ra.DtypeError, match="not written in float8_e3m4 here; known are float64, float32"):
        vectors.write(tmp_path / "golden", ["softmax"], "float8_e3m4")
    assert not (tmp_path / "golden").exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda held: {n: x + np.float32(1e-3) for n, x in held.items()}, ""),
        (lambda held: {n: np.full_like(x, np.nan) for n, x in held.items()}, ""),
        (lambda held: {n: x.astype(ml_dtypes.bfloat16) for n, x in held.items()}, ""),
        (lambda held: {n: x[None] for n, x in held.items()}, "must be"),
        (lambda held: {n: x.astype(np.int32) for n, x in held.items()}, "int32, must be floating point"),
        (lambda held: {"answer": held["out"]}, "holds none of out"),
        (lambda held: None, "no such file"),
    ],
)
def test_a_wrong_answer_to_one_case_is_found(golden, tmp_path, change, reason):
    spoiled = golden[1]["cases"][0]["file"]
    rows = vectors.verify(golden[0], answered(golden, tmp_path / "out", lambda name, held: change(held) if name == spoiled else held))
    wrong = [row for row in rows if not row.agrees]
    assert wrong and {row.case for row in wrong} == {spoiled}
    assert all(row.ratio > 1 and reason in row.reason for row in wrong)


def test_vectors_that_were_changed_are_not_judged_by(golden, tmp_path):
    folder, manifest = golden
    for name in [case["file"] for case in manifest["cases"]] + ["manifest.json"]:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert vectors.verify(tmp_path, answered(golden, tmp_path / "out"))
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
