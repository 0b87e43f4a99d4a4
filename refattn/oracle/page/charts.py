"""Charts as inline SVG: every call by its error, and the error over the number of keys.  Colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from .. import words
from ..findings import Fact, Growth
from ..judge import Case

_LOW, _HIGH = -4, 12  # decades of error / tolerance; at the ends whatever is beyond


def calls(cases: Sequence[Case]) -> str:
    """One dot a call at its worst error over its tolerance, stacked where they meet; a dot leads to its row of the table."""
    placed = [(n, c, c.worst.ratio if c.worst else None) for n, c in enumerate(cases) if c.worst is not None or c.failed]
    finite = [math.log10(ratio) for _, _, ratio in placed if ratio and math.isfinite(ratio)]
    high = min(max(2, 2 * math.ceil(max(finite, default=0.0) / 2)), _HIGH)
    width, left, step, radius = 1000, 14, 11, 4.2
    ratios = {ratio for _, _, ratio in placed}
    beyond = [says for value, says in ((math.inf, "infinite"), (None, "no answer")) if value in ratios]
    right = width - 40 - 80 * len(beyond)
    extra = {says: right + 80.0 * (n + 1) - 10 for n, says in enumerate(beyond)}

    def across(ratio: float | None) -> float:
        if ratio is None or math.isinf(ratio):
            return extra["no answer" if ratio is None else "infinite"]
        decade = math.log10(ratio) if ratio > 0 else _LOW
        return left + (min(max(decade, _LOW), high) - _LOW) / (high - _LOW) * (right - left)

    heights: Counter[int] = Counter()
    dots = []
    for n, case, ratio in placed:
        column = round(across(ratio) / step)
        heights[column] += 1
        says = case.reason if ratio is None else f"{words.times(ratio)} its tolerance"
        dots.append((n, column * step, heights[column], words.outcome(case), f"{case.probe.title}: {words.outcome(case)}, {says}"))
    rise = min(step, 150 / max(heights.values(), default=1))
    base = 14 + rise * max(heights.values(), default=1) + radius
    limit = across(1.0)
    label = "Every call by its worst error over its tolerance"
    parts = [f'<svg class="chart calls" viewBox="0 0 {width} {base + 34:.0f}" role="img" aria-label="{label}">']
    parts.append(f'<rect class="beyond" x="{limit:.1f}" y="0" width="{width - limit:.1f}" height="{base + 6:.1f}"/>')
    named = [(across(10.0**d), f'10<tspan dy="-5" class="small">{d}</tspan>' if d else "tolerance") for d in range(_LOW, high + 1, 2)]
    for x, _ in named:
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{base + 6:.1f}"/>')
    for x, text in (*named, *((x, says) for says, x in extra.items())):
        parts.append(f'<text x="{x:.1f}" y="{base + 24:.1f}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{base + 10:.1f}"/>')
    for n, x, level, state, says in dots:
        y = base - (level - 0.5) * rise
        mark = f'<circle cx="{x}" cy="{y:.1f}" r="{radius}"/>' if state == "agrees" else _diamond(x, y, radius + 1)
        parts.append(f'<a href="#call-{n}" class="{state}" tabindex="-1"><title>{escape(says)}</title>{mark}</a>')
    return "".join([*parts, "</svg>"])


def _diamond(x: float, y: float, r: float) -> str:
    return f'<path d="M{x:.1f} {y - r:.1f}L{x + r:.1f} {y:.1f}L{x:.1f} {y + r:.1f}L{x - r:.1f} {y:.1f}Z"/>'


@dataclass(frozen=True)
class _Plot:
    """A rectangle of the plane, and where its points lie in a drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 580
    height: int = 300
    margins: tuple[int, int, int, int] = (14, 90, 40, 64)  # above, right, below, left

    def at(self, x: float, y: float) -> tuple[float, float]:
        above, right, below, left = self.margins
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (self.width - left - right), self.height - below - up * (self.height - above - below)

    def path(self, kind: str, points: Iterable[tuple[float, float]]) -> str:
        spelled = " ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in points)
        return f'<polyline class="{kind}" points="{spelled}"/>'

    def text(self, x: float, y: float, says: str, anchor: str, dx: float = 0, dy: float = 4, kind: str = "") -> str:
        cx, cy = self.at(x, y)
        return f'<text class="{kind}" x="{cx + dx:.1f}" y="{cy + dy:.1f}" text-anchor="{anchor}">{escape(says)}</text>'

    def grid(self, xs: Iterable[tuple[float, str]], ys: Iterable[tuple[float, str]]) -> Iterator[str]:
        """Lines across at `ys`, numbers along both axes."""
        for y, says in ys:
            yield self.path("grid", ((self.x[0], y), (self.x[1], y)))
            yield self.text(self.x[0], y, says, "end", dx=-8)
        for x, says in xs:
            yield self.text(x, self.y[0], says, "middle", dy=18)

    def svg(self, kind: str, label: str, parts: Iterable[str]) -> str:
        drawing = "".join(parts)
        return f'<svg class="chart {kind}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">{drawing}</svg>'


def growth(found: Growth) -> str:
    """The error over the number of keys, both logarithmic, with the slopes 1/2 and 1 through its first point, and the tolerance."""
    points, limits = [], []
    for n, error, ratio in zip(found.keys, found.absolute, found.errors, strict=False):
        if n > 0 and 0 < error < math.inf:
            points.append((math.log2(n), math.log2(error)))
            if 0 < ratio < math.inf:
                limits.append((math.log2(n), math.log2(error / ratio)))
    if len(points) < 2:
        return ""
    (x0, y0), x1 = points[0], points[-1][0]
    slopes = [(x1, y0 + slope * (x1 - x0)) for slope in (0.5, 1.0)]
    reach = [y for _, y in (*points, *slopes, *limits)]
    plot = _Plot((x0, x1), (math.floor(min(reach)) - 0.5, math.ceil(max(reach)) + 0.5))
    octaves = range(math.floor(min(reach)), math.ceil(max(reach)) + 1)
    every, thinned = math.ceil(len(octaves) / 8), math.ceil(len(points) / 8)
    parts = [*plot.grid([(x, f"{2.0**x:.0f}") for x, _ in points[::thinned]], [(y, _number(2.0**y)) for y in octaves if y % every == 0])]
    for end, name in zip(slopes, ("1/2", "1"), strict=True):
        parts += [plot.path("slope", ((x0, y0), end)), plot.text(*end, f"slope {name}", "start", dx=8, kind="faint")]
    parts.append(plot.path("curve limit", limits))
    parts.append(plot.path("curve found", points))
    for n, (x, y) in enumerate(points):
        cx, cy = plot.at(x, y)
        says = f"{2.0**x:.0f} keys: error {_number(2.0**y)}, {words.times(found.errors[n])} the tolerance"
        parts.append(f'<circle class="found" cx="{cx:.1f}" cy="{cy:.1f}" r="4"><title>{says}</title></circle>')
    parts.append(plot.text((x0 + x1) / 2, plot.y[0], "keys", "middle", dy=34, kind="faint"))
    return plot.svg("growth", words.law(found), parts)


def curves(fact: Fact) -> str:
    """Two functions of x, found and specified, as two lines; empty where the fact holds none."""
    if not {"x", "found", "specified"} <= fact.values.keys():
        return ""
    table = np.array([np.asarray(fact.values[n], dtype=float) for n in ("x", "found", "specified")])
    table = table[:, np.isfinite(table).all(axis=0)]
    if table.shape[1] < 2 or np.ptp(table[0]) == 0 or np.ptp(table[1:]) == 0:
        return ""
    low, high = float(table[1:].min()), float(table[1:].max())
    plot = _Plot((float(table[0].min()), float(table[0].max())), (low, high), height=260, margins=(14, 20, 34, 64))
    xs, ys = (((float(n), _number(float(n))) for n in _ticks(*ends)) for ends in (plot.x, plot.y))
    lines = [plot.path(f"curve {name}", zip(table[0], y, strict=True)) for name, y in zip(("found", "specified"), table[1:], strict=True)]
    return plot.svg("curves", f"{fact.subject}: found and specified", [*plot.grid(xs, ys), *lines])


def _ticks(low: float, high: float) -> np.ndarray:
    """Round numbers between two."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def _number(x: float) -> str:
    text = f"{x:.3g}" if x == 0 or 1e-2 <= abs(x) < 1e3 else f"{x:.0f}" if 1e3 <= abs(x) < 1e5 else f"{x:.1e}"
    return text.replace("e-0", "e-").replace("e+0", "e")
