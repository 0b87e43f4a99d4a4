"""Golden vectors: operands, exact outputs and per-element tolerances on disk, for kernels written in other languages.

A folder holds ``manifest.json`` and one safetensors file per case.  A case's file has the operands under their names, ``expected.<output>``
(the definition's float64 result rounded once to float64) and ``tolerance.<output>`` (float64, the largest error of a correct answer).  Whoever
is judged writes files of the same names with the outputs under their own names, in any floating-point format.  Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import catalog, definition, precision
from ..candidate import Candidate
from ..errors import BackendUnavailableError, CandidateError, DtypeError
from ..problem import bind
from ..spec import Variant
from . import probes, profiles
from .judge import ratio
from .tolerance import tolerances

#: safetensors' names of element types.
_DTYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
}  # fmt: skip

FORMAT = 1
_LARGEST = 4000  # numbers per operand: small enough to commit


@dataclass(frozen=True)
class Row:
    """One judged output of one case."""

    case: str
    output: str
    ratio: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return not self.reason and self.ratio <= 1


def write(folder: Path, names: Iterable[str], dtype: Any, profile: str | None = None) -> dict[str, Any]:
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

    Raises
    ------
    UnknownVariantError, DtypeError, BackendUnavailableError
    """
    storage = precision.as_dtype(dtype)
    kept = [np.dtype(d) for d in _DTYPES.values()]
    if storage not in kept:
        real = ", ".join(d.name for d in kept if precision.is_real(d))
        raise DtypeError(f"safetensors files are not written in {storage.name} here; known are {real}")
    how = profiles.resolve(profile, storage)
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for name in names:
        variant = catalog.variant(name)
        for n, probe in enumerate(_probes(variant, storage)):
            outputs = tuple(o.name for o in variant.outputs)
            problem = bind(variant, (), {**probe.operands, **probe.params}, returns=outputs)
            truth = definition.run(problem)
            allowed = tolerances(problem, truth, how)
            tensors = {**probe.operands}
            tensors |= {f"expected.{o}": truth[o] for o in outputs} | {f"tolerance.{o}": allowed[o] for o in outputs}
            path = folder / f"{name}-{n:02}.safetensors"
            _save(path, tensors)
            cases.append(
                {
                    "file": path.name,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "variant": name,
                    "about": probe.title,
                    "operands": {o.name: o.axes for o in variant.operands if o.name in probe.operands},
                    "outputs": {o.name: o.axes for o in variant.outputs},
                    "params": dict(problem.params),
                    "dims": dict(problem.dims),
                }
            )
    manifest = {"format": FORMAT, "refattn": importlib.metadata.version("refattn"), "dtype": storage.name, "profile": how.name, "cases": cases}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def verify(folder: Path, outputs: Path) -> list[Row]:
    """Judge the outputs in one folder against the golden vectors in another.

    Raises
    ------
    CandidateError
        When the vectors are not what their manifest says, or an output folder is not there.
    """
    manifest = _manifest(folder)
    if not outputs.is_dir():
        raise CandidateError(f"there is no folder {outputs}")
    rows: list[Row] = []
    for case in manifest["cases"]:
        golden, path = folder / case["file"], outputs / case["file"]
        if not golden.is_file() or hashlib.sha256(golden.read_bytes()).hexdigest() != case["sha256"]:
            raise CandidateError(f"{golden} is not the file its manifest describes")
        if not path.is_file():
            rows.append(Row(case["file"], "", np.inf, "no such file"))
            continue
        held, given = read_tensors(golden), read_tensors(path)
        judged = [name for name in case["outputs"] if name in given]
        if not judged:
            rows.append(Row(case["file"], "", np.inf, f"holds none of {', '.join(case['outputs'])}"))
        rows += [_judged(case["file"], name, given[name], held[f"expected.{name}"], held[f"tolerance.{name}"]) for name in judged]
    return rows


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
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)


def _probes(variant: Variant, dtype: np.dtype) -> list[probes.Probe]:
    """The quick suite for an implementation that takes everything, small calls only, without what is not a fixed answer."""
    everything = Candidate(
        "golden vectors", lambda operands, params: None, frozenset(o.name for o in variant.operands), frozenset(p.name for p in variant.params)
    )
    asked = probes.suite("quick", variant, everything, dtype, {}).probes
    small = [p for p in asked if all(x.size <= _LARGEST for x in p.operands.values())]
    return [p for p in small if p.decides and "strided operands" not in p.examines and "state kept between calls" not in p.examines]


def _judged(case: str, output: str, got: np.ndarray, expected: np.ndarray, tolerance: np.ndarray) -> Row:
    if got.shape != expected.shape:
        return Row(case, output, np.inf, f"shape {got.shape}, must be {expected.shape}")
    if not precision.is_real(got.dtype):
        return Row(case, output, np.inf, f"{got.dtype}, must be floating point")
    ratios = ratio(got.astype(np.float64), expected, tolerance)
    return Row(case, output, float(ratios.max(initial=0.0)))


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
