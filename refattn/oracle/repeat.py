"""The smallest failing call again: as a command, as a Python call, and as a script that holds the operands itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .judge import Case

if TYPE_CHECKING:
    from .report import Report

#: Numbers in all, up to which a script writes operands as they are; and characters of base64, beyond which it reads a file.
_LITERAL, _CARRIED = 48, 400_000


def command(report: Report, saved: str) -> str:
    """For a shell, with operands from the file `saved`; empty where the candidate has no name that a command line knows."""
    case = report.smallest_failure
    if case is None or report.given or not report.target:
        return ""
    said = ["refattn", "check", report.target, "--variant", report.variant.name, "--dtype", report.dtype]
    for name, value in report.options.items():
        for text in _typed(name, value):
            said += [f"--{name}", text]
    for name, value in _settings(report, case).items():
        said += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"]
    return shlex.join([*said, *(("--inputs", saved) if case.probe.repeatable else ("--suite", report.suite))])


def call(report: Report, candidate: str, inputs: str) -> str:
    """For Python; `candidate` and `inputs` are expressions."""
    case = report.smallest_failure
    if case is None or report.given:
        return ""
    said = [f"dtype={report.dtype!r}", *(f"{n}={_written(v)}" for n, v in report.options.items())]
    said += [f"inputs={inputs}" if case.probe.repeatable else f"suite={report.suite!r}"]
    said += [f"{n}={v!r}" for n, v in _settings(report, case).items()]
    return f"ra.check({candidate}, {report.variant.name!r}, {', '.join(said)})"


def _typed(name: str, value: Any) -> list[str]:
    """The values of an option, as they are typed."""
    if name == "rename":
        return [f"{ours}={theirs}" for ours, theirs in value.items()]
    if name == "returns":
        return [",".join(value)]
    return ["auto" if value is True else _named(value)]


def _written(value: Any) -> str:
    """An option's value in Python; a function by its name."""
    return _named(value) if callable(value) else repr(value)


def _named(value: Any) -> str:
    return str(getattr(value, "__name__", getattr(value, "name", value)))


def _settings(report: Report, case: Case) -> Mapping[str, Any]:
    """The parameters a repetition has to say."""
    if not case.probe.repeatable:
        return report.params
    params = case.problem.params if case.problem else case.probe.params
    return {p.name: params[p.name] for p in report.variant.params if params.get(p.name, p.default) != p.default}


def operands(report: Report) -> dict[str, np.ndarray]:
    """The operands of the call, in a format that .npz knows and that holds them exactly.

    Raises
    ------
    ValueError
        Where nothing failed.
    """
    case = report.smallest_failure
    if case is None:
        raise ValueError("nothing failed; there is no call to save")
    return {n: x if x.dtype.kind == "b" or x.dtype.itemsize == 8 else x.astype(np.float32) for n, x in case.probe.operands.items()}


def packed(held: Mapping[str, np.ndarray]) -> str:
    """An .npz in base64."""
    file = io.BytesIO()
    np.savez_compressed(file, **dict(held))  # type: ignore[arg-type]
    return base64.b64encode(file.getvalue()).decode()


def script(report: Report) -> str:
    """Python to paste, operands and all; a candidate without a name that can be imported is left to the reader to put in."""
    case = report.smallest_failure
    if case is None or report.given:
        return ""
    it = repr(report.target) if report.target else "it"
    mine = "" if report.target else "it = ...  # your function\n\n"
    if not case.probe.repeatable:
        return f"import refattn as ra\n\n{mine}print({call(report, it, '')})\n"
    held = operands(report)
    imports = "import numpy as np\n\nimport refattn as ra\n\n"
    literal = _literal(held)
    if literal:
        return f"{imports}{mine}operands = {literal}\nprint({call(report, it, 'operands')})\n"
    text = packed(held)
    if len(text) > _CARRIED:
        asked = call(report, it, "np.load('operands.npz')")
        return f"{imports}{mine}# the operands are too many to be written here: report.save('operands.npz') writes them\nprint({asked})\n"
    lines = "\n".join(text[i : i + 100] for i in range(0, len(text), 100))
    asked = call(report, it, "np.load(io.BytesIO(base64.b64decode(OPERANDS)))")
    return f'import base64\nimport io\n\n{imports}{mine}\ndef repeat():\n    return {asked}\n\n\nOPERANDS = """\n{lines}\n"""\n\nprint(repeat())\n'


def _literal(held: Mapping[str, np.ndarray]) -> str:
    """Operands as Python writes them, where they are few, finite, and come back the same to the last bit."""
    if sum(x.size for x in held.values()) > _LITERAL:
        return ""
    written = []
    for name, x in held.items():
        if not x.size or not np.isfinite(x).all():
            return ""
        numbers = np.array([float(str(n)) if x.dtype.kind == "f" else n.item() for n in x.reshape(-1)], object).reshape(x.shape).tolist()
        if np.array(numbers, x.dtype).tobytes() != x.tobytes():
            return ""
        written.append(f"    {name!r}: np.array({numbers!r}, {x.dtype.name!r}),\n")
    return "{\n" + "".join(written) + "}"


def folded(text: str, width: int = 76) -> str:
    """A command or a call over several lines that can be pasted as they are: a shell reads on after a backslash, Python within brackets."""
    shell = not text.startswith("ra.")
    lines = [""]
    for word in re.split(r" (?=--)" if shell else r"(?<=,) ", text):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines[-1] += " \\" if shell else ""
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)
