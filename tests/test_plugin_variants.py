"""A variant in somebody else's package: one file and one entry point, and every door of the house finds it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiled

ROOT = Path(__file__).parent.parent

VARIANT = '''
"""Attention by squared inner products.

    p_ij  = (scale q_i . k_j)**2,    out_i = sum_j p_ij v_j
"""

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, scale):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    weights = np.zeros((batch, heads, n_q, n_k))
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                for j in range(n_k):
                    s = 0.0
                    for x in range(d):
                        s += q[b, h, i, x] * k[b, g, j, x]
                    s *= scale
                    weights[b, h, i, j] = s * s
                    for y in range(d_v):
                        out[b, h, i, y] += weights[b, h, i, j] * v[b, g, j, y]
    return out, weights


VARIANT = Variant(
    name="squared_products",
    family="scored",
    summary="Attention by squared inner products, a plug-in.",
    equation="out_i = sum_j (scale q_i . k_j)**2 v_j",
    paper=Paper(title="No such paper", authors=("Author, An",), year=2024, where="nowhere"),
    operands=(Operand("q", "B Hq T D", "queries"), Operand("k", "B Hkv S D", "keys"), Operand("v", "B Hkv S E", "values")),
    outputs=(Output("out", "B Hq T E", "attention output"), Output("weights", "B Hq T S", "p_ij")),
    params=(Param("scale", Number(), 1.0, "multiplies q . k", tries=(0.5,)),),
    define=define,
    cost=Cost(flops="B*Hq*pairs*(2*D + 2*E + 2)", memory="B*Hq*T*(E + S)"),
    linear_in="v",
    examples=(Example({"q": [[[[2.0]]]], "k": [[[[1.0], [3.0]]]], "v": [[[[1.0], [2.0]]]]}, {"out": [[[[76.0]]]], "weights": [[[[4.0, 36.0]]]]}),),
    identities=(Identity("twice the queries, four times the output", lambda run, x: (run({**x, "q": 2.0 * x["q"]}), 4.0 * run(x))),),
)
'''

CANDIDATES = """
import numpy as np


def right(q, k, v, scale=1.0):
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    return (scale * (q @ np.swapaxes(k, -1, -2))) ** 2 @ v


def wrong(q, k, v, scale=1.0):
    return np.abs(right(q, k, v, scale)) + 0.01
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python with a plug-in package on its path, as if installed."""
    site = tmp_path_factory.mktemp("site")
    files = {
        "somebodys_variants/__init__.py": "",
        "somebodys_variants/squared_products.py": VARIANT,
        "somebodys_candidates.py": CANDIDATES,
        "somebodys-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n",
        "somebodys-1.0.dist-info/entry_points.txt": "[refattn.variants]\nsomebodys = somebodys_variants\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "PYTHONWARNINGS": "", "COLUMNS": "200"}

    def run(*arguments, status=0):
        ran = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == status, ran.stdout + ran.stderr
        return ran.stdout

    return run


def test_the_catalogue_finds_it(python):
    code = "import refattn as ra; print(ra.variants('scored')); print(ra.describe('squared_products')); print(ra.cite('squared_products'))"
    said = python("-c", code)
    assert "'squared_products'" in said and "(scale q_i . k_j)**2" in said and "No such paper" in said


def test_it_is_not_found_without_its_package():
    code = "import refattn as ra; print('squared_products' in ra.variants())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("file, least", [("test_catalogue", 25), ("test_costs", 3), ("test_gradients", 2), ("test_laws", 1)])
def test_the_derived_tests_collect_it_and_pass(python, file, least):
    said = python("-m", "pytest", f"tests/{file}.py", "-k", "squared_products", "-q", "-p", "no:cacheprovider")
    assert int(re.search(r"(\d+) passed", said)[1]) >= least and "failed" not in said


def test_the_derived_tests_fail_when_the_definition_is_not_what_it_says(python, tmp_path):
    """The same file with a mistake in each declaration that can be wrong, one at a time."""
    mistakes = {
        "4.0 * run(x)": "2.0 * run(x)",
        "[[[[76.0]]]]": "[[[[75.0]]]]",
        "2*D + 2*E + 2": "2*D + 2*E + 3",
        "Hq*T*(E + S)": "Hq*T*E",
        'linear_in="v"': 'linear_in="q"',
        "return out, weights": "return out, weights + np.arange(n_k)",
        "g = h // (heads // kv_heads)": "g = h % kv_heads",
    }
    for right, wrong in mistakes.items():
        text = VARIANT.replace(right, wrong)
        assert text != VARIANT
        package = tmp_path / "broken" / re.sub(r"\W", "_", right)
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "squared_products.py").write_text(text, encoding="utf-8")
        redirect = f"import sys, pytest, somebodys_variants; somebodys_variants.__path__[:] = [{str(package)!r}]; "
        files = ["tests/test_catalogue.py", "tests/test_costs.py"]
        said = python("-c", redirect + f"sys.exit(pytest.main([*{files}, '-k', 'squared_products', '-q', '-x', '-p', 'no:cacheprovider']))", status=1)
        assert "1 failed" in said, right


def test_the_command_line_lists_shows_costs_and_checks_it(python):
    assert "squared_products" in python("-m", "refattn", "list")
    assert "(scale q_i . k_j)**2" in python("-m", "refattn", "show", "squared_products")
    assert "384" in python("-m", "refattn", "cost", "squared_products", "B=1", "Hq=1", "Hkv=1", "T=4", "S=6", "D=3", "E=4")
    target = ("--variant", "squared_products", "--suite", "quick")
    python("-m", "refattn", "check", "somebodys_candidates:right", *target)
    python("-m", "refattn", "check", "somebodys_candidates:wrong", *target, status=1)


def test_golden_vectors_are_written_for_it(python, tmp_path):
    python("-m", "refattn", "vectors", "squared_products", "-o", tmp_path)
    written = [p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.json")]
    assert any("squared_products" in json.dumps(json.loads(text)) for text in written)


def test_it_has_a_documentation_page(python):
    code = "import sys; sys.path.insert(0, 'docs'); import pages; from refattn import catalog; print(pages.page(catalog.variant('squared_products')))"
    page = python("-c", code)
    assert "def define(q, k, v, scale):" in page and "squared inner products" in page and "multiplies q . k" in page


def test_it_is_benchmarked(python):
    said = python("-c", "from benchmarks import bench_variants; print(bench_variants.Forward.params[0])")
    assert "squared_products" in said
