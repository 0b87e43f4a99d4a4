"""Adapters without their frameworks: found by walking, imported only when named, absent with one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest

import refattn as ra
from refattn import adapters, catalog

#: What each adapter cannot do without, and the word its advice must contain.
FRAMEWORKS = {
    "flash-attn": ("flash_attn", "flash-attn"),
    "jax": ("jax", "jax"),
    "mlx": ("mlx.core", "mlx"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "torch": ("torch", "torch"),
    "torch-flex": ("torch", "torch"),
    "xformers": ("xformers.ops", "xformers"),
}


def test_names_are_the_files():
    files = {path.stem.replace("_", "-") for path in Path(adapters.__path__[0]).glob("*.py")} - {"--init--"}
    assert set(adapters.names()) == files == {*FRAMEWORKS, "numpy"}


@pytest.mark.parametrize("ask", [adapters.load, adapters.converter])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_missing_framework_is_one_line_that_says_what_to_install(name, ask, monkeypatch):
    for package in {package for package, _ in FRAMEWORKS.values()}:
        monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(ra.BackendUnavailableError) as caught:
        ask(name)
    message, (_, word) = str(caught.value), FRAMEWORKS[name]
    assert "\n" not in message
    assert message.startswith(f"{name}: ")
    assert "pip install" in message.partition("install it with: ")[2]
    assert word in message.partition("install it with: ")[2]
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("ask", [adapters.load, adapters.converter])
@pytest.mark.parametrize(("wrong", "near"), [("torhc", "torch"), ("flash_attn", "flash-attn"), ("onnx-runtime", "onnxruntime")])
def test_an_unknown_name_is_answered_with_the_nearest(wrong, near, ask):
    with pytest.raises(ra.UnknownVariantError, match=f"no adapter named '{wrong}'; did you mean '{near}'"):
        ask(wrong)


def test_loading_one_adapter_imports_no_other_framework():
    script = """
import sys
from refattn import adapters, catalog
adapters.names(); adapters.load("numpy"); adapters.converter("numpy")
frameworks = {"torch", "jax", "onnx", "onnxruntime", "mlx", "xformers", "flash_attn"} & sys.modules.keys()
others = {m for m in sys.modules if m.startswith("refattn.adapters.")} - {"refattn.adapters.numpy"}
print(sorted(frameworks | others))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_numpy_needs_nothing_and_expresses_everything():
    candidate = adapters.load("numpy")
    softmax = catalog.variant("softmax")
    assert candidate.operands == {o.name for o in softmax.operands}
    assert candidate.params == {p.name for p in softmax.params} - {"empty_rows"}
    assert (candidate.operands, candidate.params, candidate.returns) == (adapters.OPERANDS, adapters.PARAMS, ("out", "lse"))
