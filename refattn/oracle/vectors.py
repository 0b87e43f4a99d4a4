"""Golden vectors: operands, exact answers and per-element tolerances on disk, for kernels written in other languages.

A folder holds ``manifest.json`` and one safetensors file per case.  A case's file has the operands and the cotangent ``d_out`` under their
names, ``expected.<name>`` and ``tolerance.<name>`` (float64) for every output and gradient.  The manifest says the rest: what the axes,
parameters and conventions mean, how each expected value was arrived at, and a checksum.  Whoever is judged writes files of the same names with
the answers under their own names, in any floating-point format.  Nothing is ever pickled.  The layout is described in docs/testing.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import catalog, definition, precision
from ..errors import BackendUnavailableError, CandidateError, DtypeError, ParameterError, UnknownVariantError
from ..problem import Problem, bind
from ..spec import AXES, Dims, Number, Variant, every_size, shape
from . import profiles
from .bounds.backward import applies
from .gradients import backpropagated
from .judge import Case, axes_of, held_against
from .localise import localise
from .probes import Probe
from .report import Report
from .tolerance import tolerances

#: safetensors' names of element types.
_DTYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
}  # fmt: skip

FORMAT = 2

#: Sizes of a suite's usual case, and other sizes that it asks.
SUITES: Mapping[str, tuple[Dims, tuple[tuple[str, Dims], ...]]] = {
    "small": (
        every_size({"B": 1, "Hq": 4, "Hkv": 2, "T": 5, "S": 7, "D": 4, "E": 3, "Dq": 4, "Dk": 5, "A": 3, "M": 6}),
        (
            ("fewer queries than keys", {}),
            ("more queries than keys", {"T": 6, "S": 3}),
            ("one query, one key-value head", {"T": 1, "Hq": 3, "Hkv": 1}),
            ("one key", {"S": 1}),
            ("no keys", {"S": 0}),
        ),
    ),
    "standard": (
        every_size({"B": 2, "Hq": 6, "Hkv": 2, "T": 19, "S": 37, "D": 16, "E": 12, "Dq": 12, "Dk": 10, "A": 9, "M": 22}),
        (
            ("fewer queries than keys", {}),
            ("more queries than keys", {"T": 41, "S": 23}),
            ("square, odd lengths, a head of its own for each", {"B": 1, "Hq": 3, "Hkv": 3, "T": 67, "S": 67}),
            ("one query, one key-value head", {"B": 1, "Hq": 7, "Hkv": 1, "T": 1, "S": 65}),
            ("whole tiles", {"B": 1, "Hq": 2, "Hkv": 2, "T": 32, "S": 64, "D": 32, "E": 32}),
            ("one more than whole tiles", {"B": 1, "Hq": 2, "Hkv": 1, "T": 33, "S": 129, "D": 64, "E": 64}),
            ("narrow keys, wide values", {"D": 1, "E": 40}),
            ("one key", {"T": 3, "S": 1}),
            ("no keys", {"T": 3, "S": 0}),
            ("no queries", {"T": 0, "S": 5}),
            ("no batch", {"B": 0}),
        ),
    ),
}

#: What has to be said before an array means something; the parts that concern a variant's own operands and parameters are in its entry.
_CONVENTIONS: Mapping[str, str] = {
    "files": "safetensors: eight bytes (little-endian) with the length of a JSON header, the header, the data; each tensor in C order, little-endian",
    "answers": "for each case a safetensors file of the same name, with a tensor for each answer under its name; F64, F32, F16, BF16 or float8",
    "agreement": "|answer - expected| <= tolerance for every element; an infinity or NaN where expected has the same, and nowhere else",
    "axes": "a tensor's axes in order, separated by spaces; a sum (Dq+Dk) is one axis; operands that broadcast may have size 1 along any axis",
    "heads": "query head h reads key-value head h // (Hq // Hkv)",
    "null": "a parameter that is null takes the value in `resolved`, or is not applied where there is none",
    "scores": "q . k is multiplied by scale, then soft-capped (softcap * tanh(score / softcap)), then the bias is added, then masks hide",
    "mask": "true where a query may attend a key; hidden keys have weight 0, and their values do not matter, whatever they hold",
    "causal": 'true: query i sees key j where j <= i + S - T (the last query sees all); "top_left": where j <= i',
    "window": '[left, right]: query i sees keys from p - left to p + right, with p = i + S - T (p = i if causal is "top_left"); null: no limit',
    "empty rows": "a query that sees no key: out is 0 and lse is -infinity unless empty_rows says otherwise",
    "lse": "natural logarithm of the sum of exponentials of a row's scores, sink included",
    "sinks": "a logit per query head that enters the denominator of the softmax and has no value",
    "gradients": "of sum(d_out * out) with respect to the operand that the name says; through a hidden key none",
}

#: Exact answers where they can be had: called as `refattn.certify` is.
Certify = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found about a folder of answers.

    Attributes
    ----------
    reports : tuple of Report
        One for each variant.
    strangers : tuple of str
        Files that answer no case.
    """

    reports: tuple[Report, ...]
    strangers: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.reports) and all(report.passed for report in self.reports) and not self.strangers


# ---- writing ---------------------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    names: Iterable[str],
    dtype: Any,
    profile: str | None = None,
    *,
    suite: str = "small",
    seed: int = 0,
    certify: Certify | None = None,
) -> dict[str, Any]:
    """Write golden vectors of the named variants and return the manifest.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    names : iterable of str
    dtype : str or dtype
        Of the operands.
    profile : str, optional
        Arithmetic the tolerances allow.
    suite : {"small", "standard"}
        small: made to be committed; standard: sizes about the edges of tiles.
    seed : int
        Of the random operands; the same seed gives the same bytes.
    certify : callable, optional
        `refattn.certify`, for outputs and gradients correctly rounded where the variant has an enclosure; the definition's otherwise.

    Raises
    ------
    UnknownVariantError, DtypeError, BackendUnavailableError
    """
    if suite not in SUITES:
        raise UnknownVariantError(catalog.unknown("suite", suite, SUITES))
    storage = precision.as_dtype(dtype)
    kept = [np.dtype(d) for d in _DTYPES.values()]
    if storage not in kept:
        real = ", ".join(d.name for d in kept if precision.is_real(d))
        raise DtypeError(f"safetensors files are not written in {storage.name} here; known are {real}")
    how = profiles.resolve(profile, storage)
    variants = [catalog.variant(name) for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for variant in variants:
        for n, probe in enumerate(_probes(variant, storage, suite, seed)):
            cases.append(_written(folder / f"{variant.name}-{n:02}.safetensors", variant, probe, how, certify))
    manifest = {
        "format": FORMAT,
        "suite": suite,
        "seed": seed,
        "dtype": storage.name,
        "profile": {name: value for name, value in dataclasses.asdict(how).items() if value},
        "conventions": dict(_CONVENTIONS),
        "axes": {axis: AXES.get(axis, "") for axis in dict.fromkeys(a for v in variants for a in v.axes)},
        "variants": {v.name: _described(v) for v in variants},
        "cases": cases,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _written(path: Path, variant: Variant, probe: Probe, how: profiles.Profile, certify: Certify | None) -> dict[str, Any]:
    """Write one case; its entry in the manifest."""
    outputs = tuple(dict.fromkeys([*variant.returns, *(o.name for o in variant.outputs if o.wide)]))
    problem = bind(variant, (), {**probe.operands, **probe.params}, returns=outputs)
    truth = definition.run(problem)
    backward = backpropagated(problem, truth, probe.cotangents) if applies(problem, probe.cotangents) else None
    allowed = tolerances(problem, truth, how, backward=backward)
    expected = {name: truth[name] for name in outputs} | dict(backward.values if backward else {})
    said = {name: "definition: float64" if name in outputs else "closed form: float64" for name in expected}
    exact = {} if certify is None else _certified(certify, problem, probe, [*backward.values] if backward else [])
    for name, x in exact.items():
        expected[name] = np.asarray(x.value, np.float64)
        said[name] = "certified: correctly rounded to float64" if np.all(x.rounded) else "certified: enclosed"
    tensors = {**probe.operands, **({"d_out": probe.cotangents["out"]} if backward else {})}
    tensors |= {f"expected.{name}": x for name, x in expected.items()} | {f"tolerance.{name}": allowed[name] for name in expected}
    _save(path, tensors)

    def answer(name: str) -> dict[str, Any]:
        return {"axes": axes_of(variant, name), "shape": [*expected[name].shape], "certified": said[name]}

    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "variant": variant.name,
        "about": probe.title,
        "dims": dict(problem.dims),
        "params": dict(problem.params),
        "resolved": _resolved(problem),
        "operands": {name: {"axes": variant.operand(name).axes, "shape": [*x.shape], "dtype": _name(x.dtype)} for name, x in probe.operands.items()},
        "outputs": {name: answer(name) for name in outputs},
        "gradients": {name: answer(name) for name in expected if name not in outputs},
    }


def _certified(certify: Certify, problem: Problem, probe: Probe, gradients: list[str]) -> dict[str, Any]:
    """What `certify` says of outputs and gradients, by name; nothing of a variant or parameter that has no enclosure."""
    call = {**probe.operands, **probe.params, "dtype": "float64"}
    found: dict[str, Any] = {}
    try:
        for names, cotangents in ((problem.returns, {}), (tuple(gradients), {"d_out": probe.cotangents["out"]})):
            if names:
                results = certify(problem.variant.name, **call, **cotangents, returns=names)
                found |= dict(zip(names, results if len(names) > 1 else (results,), strict=True))
    except (ParameterError, BackendUnavailableError):
        pass
    return found


def _resolved(problem: Problem) -> dict[str, float]:
    """Parameters that are None and stand for a number that follows from the sizes."""
    null = [p for p in problem.variant.params if problem.params[p.name] is None and isinstance(p.kind, Number) and callable(p.absent)]
    values = {p.name: p.encode(None, problem.dims) for p in null}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _described(variant: Variant) -> dict[str, Any]:
    return {
        "equation": variant.equation,
        "summary": variant.summary,
        "operands": {o.name: {"axes": o.axes, "meaning": o.meaning, "optional": o.optional, "broadcasts": o.broadcast} for o in variant.operands},
        "outputs": {o.name: {"axes": o.axes, "meaning": o.meaning} for o in variant.outputs},
        "params": {p.name: {"meaning": p.meaning, "allowed": p.kind.rule, "default": p.default} for p in variant.params},
    }


# ---- which cases -----------------------------------------------------------------------------------------------------------------


def _probes(variant: Variant, dtype: np.dtype, suite: str, seed: int) -> Iterator[Probe]:
    """The variant's worked examples, its shapes, every parameter and optional operand alone, and all of them together."""
    usual, others = SUITES[suite]
    rng = np.random.default_rng(seed)
    optional = [o.name for o in variant.operands if o.optional]

    def probe(title: str, sizes: Dims, params: Mapping[str, Any] | None = None, given: Iterable[str] = (), spread: float = 1.0) -> Probe:
        operands = {o.name: _drawn(variant, o.name, rng, {**usual, **sizes}, dtype) for o in variant.operands if not o.optional or o.name in given}
        first = next(iter(operands))
        operands[first] = precision.round_to(spread * operands[first].astype(np.float64), dtype)
        return _with_cotangent(variant, Probe(title, operands, params or {}), rng, dtype)

    for n, example in enumerate(variant.examples):
        operands = {name: np.asarray(x) for name, x in example.operands.items()}
        operands = {name: x if x.dtype == np.bool_ else precision.round_to(x.astype(np.float64), dtype) for name, x in operands.items()}
        yield _with_cotangent(variant, Probe(f"worked example {n + 1}", operands, example.params), rng, dtype)
    asked = []
    for title, sizes in others:
        own = {axis: n for axis, n in {**usual, **sizes}.items() if axis in variant.axes}
        if own not in asked:  # a variant of one sequence has no keys to vary
            asked.append(own)
            yield probe(title, sizes)
    yield probe("scores spread out", {}, spread=6.0)
    tried = {p.name: p.tries for p in variant.params if p.tries}
    for name, values in tried.items():
        for value in values:
            yield probe(f"{name}={value!r}", {}, {name: value}, spread=2.0)
    for name in optional:
        yield probe(f"with {name}", {}, given=[name])
        if variant.operand(name).broadcast:
            whole = probe(f"with {name}, which broadcasts", {}, given=[name])
            small = {**whole.operands, name: np.ascontiguousarray(whole.operands[name][:1, ..., :1, :])}
            yield dataclasses.replace(whole, operands=small)
    if optional or tried:
        for at in (0, -1):
            yield probe(f"everything at once, {'first' if at == 0 else 'last'} values", {}, {n: v[at] for n, v in tried.items()}, optional, 2.0)
    if "mask" in optional:
        empty = probe("a row that sees no key", {}, given=["mask"])
        empty.operands["mask"][..., 1, :] = False
        yield empty


def _drawn(variant: Variant, name: str, rng: np.random.Generator, dims: Dims, dtype: np.dtype) -> np.ndarray:
    operand = variant.operand(name)
    full = shape(operand.axes, dims)
    if operand.kind == "real":
        return precision.round_to(operand.draw(rng, full), dtype)
    mask = rng.random(full) < 0.6
    if mask.size:
        mask[..., 0] = True
    return mask if operand.kind == "boolean" else mask.astype(dtype)


def _with_cotangent(variant: Variant, probe: Probe, rng: np.random.Generator, dtype: np.dtype) -> Probe:
    problem = bind(variant, (), {**probe.operands, **probe.params})
    out = variant.outputs[0]
    return dataclasses.replace(probe, cotangents={out.name: precision.round_to(rng.standard_normal(shape(out.axes, problem.dims)), dtype)})


# ---- judging ---------------------------------------------------------------------------------------------------------------------


def verify(folder: Path, outputs: Path) -> Verdict:
    """Judge the answers in one folder by the golden vectors in another.

    Raises
    ------
    CandidateError
        When the vectors are not what their manifest says, or the folder of answers is not there.
    """
    manifest = _manifest(folder)
    if not outputs.is_dir():
        raise CandidateError(f"there is no folder {outputs}")
    how = profiles.Profile(**manifest["profile"])
    cases: dict[str, list[Case]] = {}
    for entry in manifest["cases"]:
        cases.setdefault(entry["variant"], []).append(_judged(entry, folder, outputs))
    reports = [
        Report(str(outputs), catalog.variant(name), manifest["dtype"], how, tuple(own), finding=localise(own), suite=manifest["suite"], given=True)
        for name, own in cases.items()
    ]
    known = {entry["file"] for entry in manifest["cases"]}
    strangers = sorted(path.name for path in outputs.iterdir() if path.name not in known and path.suffix == ".safetensors")
    return Verdict(tuple(reports), tuple(strangers))


def _judged(entry: Mapping[str, Any], folder: Path, outputs: Path) -> Case:
    golden, path = folder / entry["file"], outputs / entry["file"]
    if not golden.is_file() or hashlib.sha256(golden.read_bytes()).hexdigest() != entry["sha256"]:
        raise CandidateError(f"{golden} is not the file its manifest describes")
    held, wanted = read_tensors(golden), {**entry["outputs"], **entry["gradients"]}
    params = {name: tuple(value) if isinstance(value, list) else value for name, value in entry["params"].items()}
    operands = {name: held[name] for name in entry["operands"]}
    problem = bind(catalog.variant(entry["variant"]), (), {**operands, **params}, returns=tuple(entry["outputs"]))
    usual = {p.name: p.default for p in problem.variant.params}
    changed = tuple(name for name, value in problem.params.items() if value != usual[name])
    examines = (*changed, *(name for name in operands if problem.variant.operand(name).optional))
    title = f"{path.stem}: {entry['about']}"
    probe = Probe(title, operands, params, examines or ("shapes",), cotangents={"out": held["d_out"]} if "d_out" in held else {})
    if not path.is_file():
        return Case(probe, "malformed", "no such file", problem=problem)
    try:
        given = read_tensors(path)
    except CandidateError as trouble:
        return Case(probe, "malformed", str(trouble), problem=problem)
    complaint = _complaint(given, entry, wanted)
    if complaint:
        return Case(probe, "malformed", complaint, problem=problem)
    expected = {name: held[f"expected.{name}"] for name in wanted}
    allowed = {name: held[f"tolerance.{name}"] for name in wanted}
    return held_against({**definition.run(problem), **expected}, allowed, problem, given, probe)


def _complaint(given: Mapping[str, np.ndarray], entry: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What is wrong with a file of answers before its numbers are looked at."""
    needed = catalog.variant(entry["variant"]).returns
    missing = [name for name in needed if name not in given]
    if missing:
        return f"holds no {missing[0]}; its tensors are {', '.join(given) or 'none'}"
    for name, x in given.items():
        if name not in wanted:
            return f"holds {name}, which is no answer to this case; they are {', '.join(wanted)}"
        if [*x.shape] != wanted[name]["shape"]:
            return f"{name} has shape {x.shape}, must be {tuple(wanted[name]['shape'])}, [{wanted[name]['axes']}]"
        if not precision.is_real(x.dtype):
            return f"{name} is {x.dtype}, must be floating point"
    return ""


# ---- files -----------------------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, bfloat16 and float8 included.

    Raises
    ------
    BackendUnavailableError, CandidateError
    """
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError as missing:
        raise BackendUnavailableError("safetensors is not installed; pip install 'refattn[files]'") from missing
    try:
        held = deserialize(path.read_bytes())
    except (SafetensorError, OSError) as problem:
        raise CandidateError(f"{path} could not be read as safetensors: {problem}") from problem
    found = {}
    for name, tensor in held:
        if tensor["dtype"] not in _DTYPES:
            raise CandidateError(f"{path}: {name} has elements of type {tensor['dtype']}; known are {', '.join(_DTYPES)}")
        found[name] = np.frombuffer(bytes(tensor["data"]), _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return found


def _save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    try:
        from safetensors.numpy import save_file
    except ImportError as missing:
        raise BackendUnavailableError("safetensors is not installed; pip install 'refattn[files]'") from missing
    save_file({name: np.array(x, order="C") for name, x in tensors.items()}, path)


def _name(dtype: np.dtype) -> str:
    return next(name for name, known in _DTYPES.items() if np.dtype(known) == dtype)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest: Any = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise CandidateError(f"{path} could not be read: {problem}") from problem
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CandidateError(f"{path} has format {found!r}; this version reads {FORMAT}")
    return manifest
