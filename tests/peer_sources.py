"""Reference code of packages that must not be installed beside the others: they lie in `.peers`, off the path, and are loaded file by file.

    export MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE
    pip install --no-deps --no-build-isolation --target .peers -r tests/peers.txt

flash-attn and mamba-ssm come as source, whose GPU kernels are left out.  transformers, for one, hands its reference functions over to
flash-linear-attention's GPU kernels as soon as that can be imported.
"""

import ast
import functools
import importlib
import importlib.util
import sys
import warnings
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
    """Functions and methods of a file of `.peers` that cannot be imported here, alone, without decorators, with `given` for all they refer to.

    A method whose name is that of others too is asked for by its class: ``"AttentionBlock.forward"``, and is ``forward`` of what is returned.
    """
    path = ROOT / file
    assert path.exists(), f"{path} is missing: {INSTALL}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in strings of others
        nodes = list(ast.walk(ast.parse(path.read_text())))
    methods = {f"{c.name}.{node.name}": node for c in nodes if isinstance(c, ast.ClassDef) for node in c.body if isinstance(node, ast.FunctionDef)}
    found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name in names]
    found += [methods[name] for name in names if name in methods]
    for node in found:
        node.decorator_list = []
    scope, names = dict(given), tuple(name.rpartition(".")[2] for name in names)
    exec(compile(ast.Module(list(found), []), path, "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})
