"""Reference code of packages that must not be installed beside the others: they lie in `.peers`, off the path, and are loaded file by file.

    MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation --target .peers -r tests/peers.txt

mamba-ssm comes as source, whose GPU kernels are left out.  transformers, for one, hands its reference functions over to flash-linear-attention's
GPU kernels as soon as that can be imported.
"""

import ast
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class later(ModuleType):
    """A package that is imported when something of it is first asked for, so that tests can be collected, and left out, where it is missing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


ROOT = Path(__file__).parents[1] / ".peers"
INSTALL = "see the command in tests/peer_sources.py"


@functools.cache
def load(file: str) -> ModuleType:
    """The module in a file of `.peers`, such as ``"fla/ops/kda/naive.py"``, without importing the package it belongs to."""
    path = ROOT / file
    assert path.exists(), f"{path} is missing: {INSTALL}"
    name = "peer_" + file.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and decorators look their module up
    spec.loader.exec_module(module)
    return module


def fla(operation: str, file: str = "naive") -> ModuleType:
    """flash-linear-attention's plain PyTorch references of one operation: ``fla("kda").naive_recurrent_kda``."""
    return load(f"fla/ops/{operation}/{file}.py")


def functions(file: str, *names: str, **given: Any) -> SimpleNamespace:
    """Functions and methods of a file of `.peers` that cannot be imported here, alone, without decorators, with `given` for all they refer to."""
    path = ROOT / file
    assert path.exists(), f"{path} is missing: {INSTALL}"
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in found:
        node.decorator_list = []
    scope = dict(given)
    exec(compile(ast.Module(list(found), []), path, "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})
