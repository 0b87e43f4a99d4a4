"""What the documentation shows is true: its programs run, its pages are complete, its docstrings are whole."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpydoc.validate import validate

import refattn as ra
from refattn import catalog

ROOT = Path(__file__).parents[1]
PAGES = [path for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]) if "```py" in path.read_text(encoding="utf-8")]
PEERS = re.compile(r"^\s*(?:>>> )?(?:import|from) (?:torch|jax|onnx|onnxruntime|mlx|transformers|xformers)\b", re.MULTILINE)
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```", re.MULTILINE | re.DOTALL)

#: numpydoc's findings that count: no docstring, parameters or results missing, unknown, out of order or misspelled, sections out of order.
FINDINGS = {"GL06", "GL07", "GL08", "PR01", "PR02", "PR03", "PR10", "RT01", "YD01"}


def run_block(language, text, names, where):
    if language == "python":
        exec(compile(text, where, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(text, names, where, where, 0)
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def with_mark(path):
    text = path.read_text(encoding="utf-8")
    marks = [pytest.mark.peer] if PEERS.search(text) else []
    marks += [pytest.mark.compiled] if "form=" in text and "ra.attend" in text else []  # forms of a recurrence are the engine's
    return pytest.param(path, id=path.name, marks=marks)


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module("pages")
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.fixture
def example_of_contributing(tmp_path, monkeypatch):
    """The catalogue with the file that CONTRIBUTING.md walks through, installed as somebody's package."""
    source = BLOCK.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")).group(2)
    name = re.search(r'name="(\w+)"', source).group(1)
    (tmp_path / "their_variants").mkdir()
    (tmp_path / "their_variants" / "__init__.py").touch()
    (tmp_path / "their_variants" / f"{name}.py").write_text(source, encoding="utf-8")
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (tmp_path / "theirs-1.0.dist-info" / "entry_points.txt").write_text("[refattn.variants]\ntheirs = their_variants\n")
    monkeypatch.syspath_prepend(tmp_path)
    catalog.catalogue.cache_clear()
    yield catalog.variant(name)
    catalog.catalogue.cache_clear()
    for module in [m for m in sys.modules if m.startswith("their_variants")]:
        del sys.modules[module]


@pytest.mark.parametrize("path", [with_mark(path) for path in PAGES])
def test_the_programs_on_a_page_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    assert blocks, f"{path.name} has code that this test does not find"
    for n, (language, text) in enumerate(blocks):
        run_block(language, text, names, f"{path.name}, program {n + 1}")


def test_the_example_of_contributing_is_right(example_of_contributing):
    variant = example_of_contributing
    rng = np.random.default_rng(0)
    sizes = {"B": 2, "Hq": 3, "T": 4, "S": 5, "D": 6, "E": 7}
    operands = {o.name: rng.standard_normal([sizes[axis] for axis in o.axes.split()]) for o in variant.operands}

    def run(x, name=variant.name, **keywords):
        return ra.attend(name, **x, **keywords)

    for worked in variant.examples:
        given = {name: np.array(x) for name, x in worked.operands.items()}
        for name, expected in worked.returns.items():
            np.testing.assert_array_equal(run(given, returns=name, **worked.params), expected)
    # A value of magnitude m goes through no more roundings than its sums have terms, plus four.
    unit = np.finfo(np.float64).eps / 2
    largest = max(np.abs(x).max() for x in operands.values())
    tolerance = 2 * (6 + 2 * 5 + 4) * unit * 2 * 6 * largest**3
    for identity in variant.identities:
        left, right = identity.sides(run, operands)
        assert np.abs(left).max() > 100 * tolerance
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance, err_msg=identity.statement)


def test_the_example_of_contributing_gets_a_page(example_of_contributing, pages):
    assert example_of_contributing.name in pages.index(catalog.catalogue().values())
    assert example_of_contributing.equation in pages.page(example_of_contributing)


@pytest.mark.parametrize("name", catalog.names())
def test_a_page_tells_all_that_its_variant_declares(name, pages):
    variant = catalog.variant(name)
    text = pages.page(variant)
    for item in (*variant.operands, *variant.params, *variant.outputs):
        assert f"\n| `{item.name}` |" in text
    source = Path(catalog.module(variant).__file__).read_text(encoding="utf-8")
    body = source[source.index("def define(") :].split("\n\n\n")[0]
    assert body in text
    for told in (variant.equation, variant.cost.flops, variant.cost.memory, variant.paper.date):
        assert told in text
    assert text.count("ra.attend(") >= len(variant.examples)


@pytest.mark.parametrize("name", [name for name in catalog.names() if catalog.variant(name).examples])
def test_the_worked_examples_of_a_page_run(name, pages):
    section = pages.page(catalog.variant(name)).partition("## Worked examples")[2].partition("\n## ")[0]
    blocks = BLOCK.findall(section)
    assert len(blocks) == len(catalog.variant(name).examples)
    for n, (language, text) in enumerate(blocks):
        assert "assert_allclose" in text
        run_block(language, text, {}, f"{name}, example {n + 1}")


def test_pictures_show_the_masks_that_the_conventions_page_states(pages):
    drawn = dict(pages.patterns(catalog.variant("softmax")))
    n_q, n_k = pages.PICTURE["T"], pages.PICTURE["S"]
    query, key = np.arange(n_q)[:, None], np.arange(n_k)
    position = query + n_k - n_q
    stated = {
        "defaults": key >= 0,
        "causal=True": key <= position,
        'causal="top_left"': key <= query,
        "window=(5, 0)": (position - 5 <= key) & (key <= position),
        "window=(2, 3)": (position - 2 <= key) & (key <= position + 3),
    }
    assert drawn.keys() == stated.keys()
    for label, seen in drawn.items():
        np.testing.assert_array_equal(seen, np.broadcast_to(stated[label], (n_q, n_k)), err_msg=label)


def test_every_public_name_is_in_the_reference_and_its_docstring_is_whole(pages):
    text = pages.reference()
    for name in ra.__all__:
        public = getattr(ra, name)
        assert re.search(rf"^\.\. auto\w+:: {name}$", text, re.MULTILINE), name
        found = validate(f"{public.__module__}.{public.__qualname__}")
        assert not [error for error in found["errors"] if error[0] in FINDINGS], name


def test_docstring_text_is_taken_at_its_letter(pages):
    assert pages.prose("a_b * c, *not* d ``c_d`` [1]") == r"a\_b \* c, *not* d ``c_d`` \[1\]"
    assert pages.prose("as in `softmax` and `define`") == "as in [`softmax`](softmax.md) and `define`"
    assert pages.prose("so\n\n    x_i = 1\n\n    y_i = 2\n\nthus") == "so\n\n```text\nx_i = 1\n\ny_i = 2\n```\n\nthus"


def test_generated_files_of_variants_that_are_gone_are_removed(pages, tmp_path):
    (tmp_path / "variants").mkdir()
    (tmp_path / "variants" / "gone.md").write_text("# gone\n")
    pages.write(tmp_path)
    written = {path.name for path in (tmp_path / "variants").iterdir()}
    assert "gone.md" not in written
    assert {f"{name}.md" for name in catalog.names()} < written
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    pages.write(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}  # nothing is written, so nothing is built, twice
