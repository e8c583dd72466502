"""Charts as SVG text, for a page that styles them: colours are classes, so that they follow the page's light or dark.

Every chart is as wide as its place and keeps its proportions; `WIDTH` units are about the pixels of a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 320


@dataclass(frozen=True)
class Bar:
    """label and text stand above the bar, left and right; parts are its pieces, from 0 on: (value, class).

    spread: quartiles of the whole, drawn as a line at the end of the bar.
    """

    label: str
    text: str
    parts: Sequence[tuple[float, str]]
    spread: tuple[float, float] | None = None
    strong: bool = False

    @property
    def end(self) -> float:
        return max([sum(value for value, _ in self.parts), *(self.spread or ())])


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one provider. curves: what is drawn through them, else the line from point to point.

    shade: 0 for the first series of a colour, 1 and 2 for others, told by their strokes and hollow dots; dashed for a
    yardstick.
    """

    name: str
    kind: str  # the class of its colour
    points: Sequence[tuple[float, float]]
    curves: Sequence[Sequence[tuple[float, float]]] = ()
    shade: int = 0
    dashed: bool = False


def document(height: float, title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"


def text(x: float, y: float, what: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(what)}</text>'


def line(points: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" class="{kind}"/>'


def stroke(kind: str, shade: int, dashed: bool) -> str:
    return f"{kind} line shade{shade}{' dashed' if dashed else ''}"


def dot(x: float, y: float, kind: str, shade: int) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2.6 if shade < 2 else 3.6}" class="{kind} shade{shade}"/>'


def key(kind: str, shade: int, dashed: bool) -> str:
    """A series in a legend."""
    parts = [line([(0, 5), (24, 5)], stroke(kind, shade, dashed)), dot(12, 5, kind, shade)]
    return f'<svg viewBox="0 0 24 10" aria-hidden="true">{"".join(parts)}</svg>'


def apart(places: Sequence[tuple[float, str]], least: float) -> list[tuple[float, str]]:
    """The labels that have room on an axis: the first, the last, and between them what keeps its distance."""
    *others, last = sorted(places)
    kept: list[tuple[float, str]] = []
    for place in others:
        if all(abs(place[0] - other[0]) >= least for other in [*kept[-1:], last]):
            kept.append(place)
    return [*kept, last]


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars on one scale that begins at 0."""
    if not rows:
        raise ValueError("rows: expected at least one bar")
    longest = max(row.end for row in rows)
    parts, y = [], 0.0
    for row in rows:
        kind = "strong" if row.strong else ""
        parts += [text(0, y + 12, row.label, kind), text(WIDTH, y + 12, row.text, kind, "end")]
        x = 0.0
        for value, colour in row.parts:
            width = value / longest * WIDTH
            # what is there is seen
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 17:.1f}" width="{max(width, 1):.1f}" height="11" class="{colour}"/>'
            )
            x += width
        if row.spread:
            low, high = (value / longest * WIDTH for value in row.spread)
            parts.append(line([(low, y + 22.5), (high, y + 22.5)], "spread"))
        y += 38
    return document(y - 6, title, parts)


def ticks(high: float) -> list[float]:
    """About four round values from 0 to high, or a little more."""
    step = 10 ** math.floor(math.log10(high / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if high / (step * factor) <= 5)
    return [step * i for i in range(math.ceil(high / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    x_ticks: Sequence[tuple[float, str]],
    y_text: Callable[[float], str],
    log_y: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Curves over a logarithmic x axis; marks are places on it, (x, label), with a line from top to bottom.

    The y axis begins at 0, or is logarithmic too.
    """
    height, left, right, top, bottom = 230, 40, 12, 40, 40
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    if not xs:
        raise ValueError("series: expected at least one point")
    y_ticks = decades(min(ys), max(ys)) if log_y else ticks(max(ys))
    first, last = math.log(min(xs)), math.log(max(xs))

    def across(x: float) -> float:
        return left + (math.log(x) - first) / ((last - first) or 1) * (WIDTH - left - right)

    def up(y: float) -> float:
        if log_y:
            share = math.log(y / y_ticks[0]) / math.log(y_ticks[-1] / y_ticks[0])
        else:
            share = y / y_ticks[-1]
        return height - bottom - share * (height - top - bottom)

    parts = [text(0, 12, y_title, "soft")]
    for y in y_ticks:
        parts += [
            line([(left, up(y)), (WIDTH - right, up(y))], "rule"),
            text(left - 6, up(y) + 4, y_text(y), "", "end"),
        ]
    places = [(across(x), label) for x, label in x_ticks]
    parts += [line([(x, height - bottom), (x, height - bottom + 4)], "axis") for x, _ in places]
    parts += [text(x, height - bottom + 17, label, "", "middle") for x, label in apart(places, 38)]
    parts.append(text(WIDTH - right, height - 4, x_title, "soft", "end"))
    for x, label in marks:
        if min(xs) < x < max(xs):
            parts += [line([(across(x), top - 4), (across(x), height - bottom)], "mark")]
            parts += [text(across(x), top - 9, label, "soft", "middle")]
    for one in series:
        for curve in one.curves or [one.points]:
            # what lies below the axis is not drawn
            drawn = [(across(x), up(y)) for x, y in curve if y >= y_ticks[0]]
            parts.append(line(drawn, stroke(one.kind, one.shade, one.dashed)))
        parts += [dot(across(x), up(y), one.kind, one.shade) for x, y in one.points]
    return document(height, title, parts)
