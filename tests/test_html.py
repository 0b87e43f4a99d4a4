"""The page: well formed, complete, harmless, and drawn from the right numbers."""

import base64
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import planted
import pytest

import refattn as ra
from refattn import catalog, cli
from refattn.oracle import check, investigate
from refattn.oracle.findings import Diagnosis, Explanation, Fact, Fault, Growth, Investigation
from refattn.oracle.page import charts, html, pictures
from refattn.spec import every_size, shape

pytestmark = pytest.mark.compiled

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;\'"'
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements, their attributes, and text by the innermost element; complains where tags do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("script", "style")).split())

    @property
    def data(self):
        return json.loads(next(data for tag, data in self.texts if tag == "script"), parse_constant=pytest.fail)


def cells(layer, shape):
    return np.frombuffer(base64.b64decode(layer["data"]), np.uint8).reshape(shape)


def mask(shift):
    return np.arange(20) <= np.arange(12)[:, None] + shift


FAULT = Fault("M1", "causal mask aligned with the first key <b>", "Query i & keys.", "j <= i + S - T", "j <= i", "a changelog")
INVESTIGATED = Investigation(
    diagnosis=Diagnosis((Explanation((FAULT,), 0.1, {"shift": 8.0}, (FAULT,)),), "medium", 20.0, 9, 17, (Fault("R1", "a race", ""),)),
    facts=(
        Fact("scale", "0.29", "0.29", True, "a ramp"),
        Fact("visible keys", "0..i", "0..i+8", False, "causal=True", {"found": mask(0), "specified": mask(8)}),
        Fact("score curve", "bent", "straight", False, "", {"x": np.arange(9.0), "found": np.tanh(np.arange(9.0)), "specified": np.arange(9.0)}),
    ),
    growth=Growth((16, 64, 256), (0.2, 0.4, 0.9), 0.54, (1e-7, 2e-7, 4.5e-7)),
)


@pytest.fixture(scope="module", autouse=True)
def uninvestigated():
    """Reports hold the investigations that are given to them here; the real ones take longer and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "investigate", lambda *_, **__: Investigation())
        yield


@pytest.fixture(scope="module")
def failing():
    report = ra.check(planted.planted("M1 top-left for bottom-right"), suite="quick")
    return replace(report, candidate=HOSTILE, investigation=INVESTIGATED)


@pytest.fixture(scope="module")
def page(failing):
    return Page(html(failing))


# ---- the document -------------------------------------------------------------------------------------------------------------------


def test_pages_are_well_formed_with_unique_names_and_links_that_lead_somewhere(page):
    passing = Page(html(ra.check(planted.candidate(planted.RIGHT, "mine"), suite="quick")))
    q, k, v = (np.random.default_rng(0).standard_normal((1, 2, 5, 4)).astype(np.float32) for _ in range(3))
    compared = Page(html(ra.compare(q, "softmax", q, k, v)))
    for each in (page, passing, compared):
        names = [a["id"] for _, a in each.elements if "id" in a]
        assert len(names) == len(set(names))
        inside = {a["href"][1:] for a in each.named("a") if a["href"].startswith("#")}
        assert inside <= set(names) and len(inside) > 3
        assert each.named("html") == [{"lang": "en"}] and len(each.named("h1")) == 1
        assert [a["charset"] for a in each.named("meta") if "charset" in a] == ["utf-8"]
    assert "PASS mine agrees with softmax in all" in passing.text and "Nothing failed." in passing.text
    assert "the given output does not agree" in compared.text and "nobody to ask again" in compared.text


def test_the_page_loads_nothing_from_anywhere(page, failing):
    text = re.sub(r'data:application[^"]*|<pre.*?</pre>|<script type.*?</script>', "", html(failing), flags=re.DOTALL)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket", text)
    assert not {"img", "link", "iframe", "object", "embed", "audio", "video", "base", "form"} & {tag for tag, _ in page.elements}
    assert all(set(a) <= {"type", "id"} for a in page.named("script"))
    assert all(a["href"].startswith(("#", "data:application/octet-stream;base64,")) for a in page.named("a"))
    assert any("default-src 'none'" in a.get("content", "") for a in page.named("meta"))


def test_untrusted_text_stays_text(page):
    assert HOSTILE in page.text and page.data["report"]["candidate"] == HOSTILE
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert page.text.count("causal mask aligned with the first key <b>") == 3, "in the verdict, as the fault, and as what is like it"
    assert len(page.named("script")) == 2


def test_the_same_report_makes_the_same_page(failing, tmp_path):
    failing.to_html(tmp_path / "one.html")
    failing.to_html(str(tmp_path / "two.html"))
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes() == html(failing).encode()


def test_every_call_appears_with_its_outcome_and_number(page, failing):
    rows = [a for a in page.named("tbody") if "data-n" in a]
    assert [int(a["data-n"]) for a in rows] == list(range(len(failing.cases)))
    for a, case in zip(rows, failing.cases, strict=True):
        assert case.outcome == a["class"] and (a["data-group"] == "fails") == case.failed
        expected = case.worst.ratio if case.worst else -1.0
        assert float(a["data-ratio"]) == pytest.approx(expected, rel=1e-5)
        assert case.probe.title in page.text
    assert page.data["report"] == json.loads(json.dumps(failing.to_dict()))
    assert {a["href"] for a in page.named("a") if a["href"].startswith("#call-")} <= {f"#call-{n}" for n in range(len(failing.cases))}


def test_the_fault_stands_with_both_lines_and_what_differs_is_marked(page, failing):
    marked = [data for tag, data in page.texts if tag == "mark"]
    assert "".join("".join(marked).split()) == "+S-T"
    for part in (
        "M1",
        "Query i & keys.",
        "j <= i + S - T",
        "as it was computed j <= i",
        "fitted shift = 8",
        "a changelog",
        "1 known fault that these calls could not have shown R1 a race",
        "medium:",
    ):
        assert part in page.text
    assert str(failing.finding) in page.text


def wide_of_the_mark(heads, n, width):
    """The report on an answer that has nothing to do with its operands."""
    q, k = (np.random.default_rng(0).standard_normal((1, heads, n, 2)).astype(np.float32) for _ in range(2))
    v = np.random.default_rng(0).standard_normal((1, heads, n, width)).astype(np.float32)
    return ra.compare(v, "softmax", q, k, v)


def test_a_page_keeps_its_size_with_many_failing_calls_and_a_large_one():
    large, small = wide_of_the_mark(6, 300, 260), wide_of_the_mark(1, 70, 66)
    text = html(replace(large, cases=large.cases + 60 * small.cases))
    carried = Page(text).data
    assert len(text) < 2_000_000
    assert 5 < len(carried["maps"]) < 60, "some are left out"
    assert max(max(p["size"]) for p in carried["pictures"]) == pictures.SIDE


# ---- pictures -------------------------------------------------------------------------------------------------------------------------


def test_bytes_of_errors_keep_order_side_and_size():
    ratios = np.array([0.0, 1e-9, 0.25, np.nextafter(1, 0), 1.0, np.nextafter(1, 2), 8.0, 1e30, np.inf])
    found = pictures.errors(ratios).astype(int)
    assert list(found) == sorted(found) and found[0] == 0 and found[-1] == pictures.INFINITE > found[-2]
    assert list(found <= pictures.TOLERANCE) == list(ratios <= 1)
    assert found[2] == pictures.TOLERANCE - 2 * pictures.STEPS and found[6] == pictures.TOLERANCE + 3 * pictures.STEPS
    spread = np.geomspace(1e-3, 1e4, 500)
    back = 2.0 ** ((pictures.errors(spread).astype(float) - pictures.TOLERANCE) / pictures.STEPS)
    assert np.all(np.abs(np.log2(back / spread)) <= 1 / pictures.STEPS)


@pytest.mark.parametrize("shape", [(3, 5), (256, 256), (257, 3), (1000, 517)])
def test_pooling_keeps_the_worst_of_every_element_and_nothing_else(shape):
    x = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    small = pictures.pooled(x)
    assert small.shape == tuple(min(n, pictures.SIDE) for n in shape) and small.max() == x.max()
    i, j = (np.searchsorted(np.arange(m) * n // m, np.arange(n), "right") - 1 for n, m in zip(shape, small.shape, strict=True))
    again = np.zeros_like(small)
    np.maximum.at(again, np.ix_(i, j), x)
    assert (again == small).all()


def test_error_maps_show_the_ratios_of_the_worst_call(page, failing):
    case = failing.worst_case
    drawn = {p["title"]: p for p in reversed(page.data["pictures"]) if p["kind"] == "error"}
    heads, one, laid, lse = (
        drawn[t] for t in ("out: every head", "out: one head", "out: rows' errors laid on the keys they weigh", "lse: every head")
    )
    ratios = case.ratios["out"]
    batch, n_heads, n_q, _ = ratios.shape
    assert (cells(heads["layers"][0], heads["size"]) == pictures.errors(ratios.max(-1).reshape(batch * n_heads, n_q))).all()
    assert heads["names"] == [f"batch {b}, query head {h}" for b in range(batch) for h in range(n_heads)] == [x["name"] for x in one["layers"]]
    for n, layer in enumerate(one["layers"]):
        assert (cells(layer, one["size"]) == pictures.errors(ratios[n // n_heads, n % n_heads])).all()
    worst = np.unravel_index(np.argmax(ratios), ratios.shape)
    assert one["first"] == worst[0] * n_heads + worst[1]
    assert (cells(lse["layers"][0], lse["size"]) == pictures.errors(case.ratios["lse"].reshape(batch * n_heads, n_q))).all()
    weights = case.truth["weights"]
    shown = np.stack([cells(x, laid["size"]) for x in laid["layers"]]).reshape(weights.shape)
    assert ((shown > 0) <= (weights > 0)).all(), "nothing is laid on a key that has no weight"
    heaviest = np.take_along_axis(shown, weights.argmax(-1)[..., None], -1)[..., 0]
    seen = weights.max(-1) > 0
    assert (heaviest[seen] == pictures.errors(ratios.max(-1))[seen]).all()


def test_gradients_and_states_have_maps_by_their_axes():
    q, k, v = (np.random.default_rng(0).standard_normal((1, 2, n, 4)).astype(np.float32) for n in (3, 5, 5))
    case = ra.compare(v[:, :, :3], "softmax", q, k, v).cases[0]
    case = replace(case, ratios={"d_k": np.full((1, 2, 5, 4), 3.0), "d_sinks": np.array([0.5, np.inf])}, truth={})
    titles = {p["title"]: (p["axes"], p["shape"]) for shown in pictures.case(case) for p in shown}
    assert titles["d_k: every head"] == (["batch and key-value head", "key"], [2, 5]) and titles["d_k: one head"] == (["key", "channel"], [5, 4])
    assert titles["d_sinks"] == (["", "query head"], [1, 2])


def test_masks_are_drawn_beside_each_other_and_heads_apart_where_they_differ(page):
    drawn = next(p for p in page.data["pictures"] if p["kind"] == "mask")
    codes = cells(drawn["layers"][0], drawn["size"])
    assert drawn["axes"] == ["query", "key"] and len(drawn["layers"]) == 1
    assert (np.isin(codes, (pictures.BOTH, pictures.EXTRA)) == mask(0)).all() and (np.isin(codes, (pictures.BOTH, pictures.MISSING)) == mask(8)).all()
    two = np.stack([mask(8), mask(9), mask(8)])
    apart = pictures.fact(Fact("visible keys", "", "", False, "", {"found": two, "specified": np.stack([mask(8)] * 3)}))
    assert [x["name"] for x in apart["layers"]] == ["query head 0", "query head 1", "query head 2"] and apart["first"] == 1
    assert pictures.fact(Fact("scale", "1", "2", False, "", {"found": np.ones(3), "specified": np.ones(3)})) is None


def test_charts_place_points_by_their_numbers(page, failing):
    text = charts.growth(Growth((16, 64, 256), (0.25, 0.5, 0.5), 0.5, (2.0**-20, 2.0**-19, 2.0**-18)))
    curve = re.search(r'class="curve found" points="([^"]+)"', text).group(1)
    limit = re.search(r'class="curve limit" points="([^"]+)"', text).group(1)
    half = re.search(r'class="slope" points="([^"]+)"', text).group(1)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in curve.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1
    assert half.split()[1] == curve.split()[2], "errors that grow as the root of the keys end where the slope 1/2 does"
    assert limit.split()[0].split(",")[1] == limit.split()[1].split(",")[1], "error / ratio is the tolerance, here the same for 16 and 64 keys"
    assert charts.growth(Growth((16, 64), (0.0, np.inf), np.nan, (0.0, np.inf))) == ""
    assert sum("curve" in a.get("class", "") for a in page.named("polyline")) == 4
    dots = [a["href"] for a in page.named("a") if a["href"].startswith("#call-")]
    assert len(dots) == sum(c.worst is not None or c.failed for c in failing.cases)


SCALELESS = """
import numpy as np


def attend(q, k, v):
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = q @ k.swapaxes(2, 3)
    p = np.exp(s - s.max(-1, keepdims=True, initial=-np.inf))
    total = p.sum(-1, keepdims=True)
    return p @ v / np.where(total > 0, total, 1)
"""


@pytest.mark.parametrize("name", ra.variants())
def test_every_variant_has_a_page_with_every_output_on_it(name):
    variant, rng = catalog.variant(name), np.random.default_rng(0)
    dims = every_size({"B": 1, "Hq": 2, "Hkv": 1, "T": 5, "S": 6, "D": 4, "E": 3, "Dq": 4, "Dk": 3, "A": 5, "M": 8})
    operands = [o.draw(rng, shape(o.axes, dims)).astype(np.float32) for o in variant.operands if not o.optional]
    outputs = tuple(o.name for o in variant.outputs)
    answers = ra.attend(name, *operands, returns=outputs, backend="definition")
    wrong = tuple(np.asarray(x) + np.float32(1) for x in (answers if len(outputs) > 1 else (answers,)))
    page = Page(html(ra.compare(wrong, name, *operands, returns=outputs)))
    pictured = {p["title"].partition(":")[0] for p in page.data["pictures"]}  # "out: one head"; "position" of what has one axis
    assert {output for output, x in zip(outputs, wrong, strict=True) if x.size} <= pictured and "FAIL" in page.text


def test_the_command_line_writes_the_page_with_all_that_was_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "investigate", investigate.investigate)
    (tmp_path / "mine.py").write_text(SCALELESS)
    target = f"{tmp_path / 'mine.py'}:attend"
    monkeypatch.setattr(sys, "argv", ["refattn", "check", target, "--suite", "quick", "--html", str(tmp_path / "report.html")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    page = Page((tmp_path / "report.html").read_text())
    assert left.value.code == 1 and "does not agree with softmax" in page.text
    assert page.data["report"]["diagnosis"]["hypotheses"] > 50 and "Confidence" in page.text
    script = "".join(data for tag, data in page.texts if tag == "pre")
    assert f"ra.check('{target}'" in script and "np.array([[[[" in script and f"refattn check {target}" in script
