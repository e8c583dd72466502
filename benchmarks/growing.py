"""The chapters about speed over size and cost over work: the points of bench_growth.py, and the lines through them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import charts
import growth
from pages import Block, Figure, Grid, Heading, Items, Table, Text
from providers import PASSED, colour, count, info, label, spread, times
from summary import Record, Run, as_time, digits, duration, seconds


def grown(run: Run, axis: str) -> dict[growth.Series, list[Record]]:
    """The growth records of an axis by the line that they are on, in order."""
    found: dict[growth.Series, list[Record]] = {}
    for record in sorted(run.part("growth"), key=lambda record: info(record)["value"]):
        one = info(record)
        if one["axis"] == axis:
            threads = 0 if axis == "threads" else one["threads"]
            found.setdefault(growth.Series(axis, one["sampler"], one["provider"], threads), []).append(record)
    return found


def line_name(line: growth.Series, *, sampler: bool = True) -> str:
    parts = [label(line.provider)]
    if sampler and line.provider != "copy":
        parts.append(line.sampler.replace("ddpm", "DDPM").replace("ddim", "DDIM").replace("_", " "))
    if line.threads > 1:
        parts.append(f"{line.threads} threads")
    return ", ".join(parts)


def rate(record: Record) -> float:
    return info(record)["bytes"] / seconds(record) / 1e9


def side_by_side(found: dict[Any, list[Record]]) -> dict[int, list[Record | None]]:
    """The records of several lists by their value, None where a list has none."""
    by_value = [{info(record)["value"]: record for record in records} for records in found.values()]
    return {value: [one.get(value) for one in by_value] for value in sorted({v for one in by_value for v in one})}


def cache_marks(run: Run, per_element: float) -> list[tuple[float, str]]:
    """Elements whose tensors fill each cache, and its name."""
    return [(size / per_element, name) for name, size in growth.cache_sizes(run.machine).items()]


def size_ticks(values: Iterable[int]) -> list[tuple[float, str]]:
    return [(value, count(value)) for value in sorted(set(values))]


def bandwidth(run: Run) -> list[Block]:
    """GB/s over sizes, with the copy as the ceiling."""
    found = {
        line: [r for r in records if info(r).get("bytes")]
        for line, records in grown(run, "elements").items()
        if line.threads == 1
    }
    found = {line: records for line, records in found.items() if records}
    figures = []
    for sampler in dict.fromkeys(line.sampler for line in found if line.provider != "copy"):
        # all samplers of this axis move as many bytes, so one copy is the yardstick of each
        here = {line: records for line, records in found.items() if line.sampler == sampler or line.provider == "copy"}
        series = drawn(
            {
                line: ([(info(r)["value"], rate(r)) for r in records], [], line_name(line, sampler=False))
                for line, records in here.items()
            }
        )
        one = info(next(iter(here.values()))[0])
        figures.append(
            chart(
                sampler.upper(),
                series,
                x_title="elements",
                y_title="GB/s",
                marks=cache_marks(run, one["bytes"] / one["value"]),
            )
        )
    if not figures:
        return []
    rows = [
        [f"{value:,}", *("" if one is None else f"{rate(one):.1f}" for one in row)]
        for value, row in side_by_side(found).items()
    ]
    return [
        Heading("Speed against a copy"),
        Text(
            "Bytes that a step must read and write at the least, per second, one thread. The dashed line is a copy of "
            f"as many bytes.{'' if run.part('step') else f' {PASSED}'} Dotted lines: where the tensors of a step fill "
            "a cache. To the left the call takes most of the time, to the right the memory."
        ),
        Grid(figures),
        Table(["elements", *map(line_name, found)], rows, "rr", "All rates, in GB/s"),
    ]


Points = list[tuple[float, float]]


def drawn(lines: dict[growth.Series, tuple[Points, list[Points], str]]) -> list[charts.Series]:
    """Points, curves and a name as series; those of one colour with different strokes."""
    found: list[charts.Series] = []
    for line, (points, curves, name) in lines.items():
        kind = colour(line.provider)
        shade = min(sum(one.kind == kind for one in found), 2)
        found.append(charts.Series(name, kind, points, curves, shade, line.provider == "copy"))
    return found


def chart(title: str, series: Sequence[charts.Series], *, log_y: bool = False, **options: Any) -> Figure:
    svg = charts.lines(
        title,
        series,
        x_ticks=size_ticks({int(x) for one in series for x, _ in one.points}),
        y_text=power if log_y else "{:g}".format,
        log_y=log_y,
        **options,
    )
    return Figure(svg, title, legend=[(one.kind, one.shade, one.dashed, one.name) for one in series])


AXES = {
    "elements": "Elements",
    "batch": "Samples of (4, 16, 16), each with its seed",
    "steps": "Steps of a chain without a network",
}


def as_work_grows(run: Run) -> list[Block]:
    """The step's cost along each axis: points, the straight lines through them, and what lies where they bend."""
    fits = growth.fits({"machine_info": run.machine, "benchmarks": run.part("growth")})
    figures, tables, told = [], [], []
    for axis, title in AXES.items():
        found = grown(run, axis)
        for sampler in dict.fromkeys(line.sampler for line in found) if axis == "elements" else (None,):
            here = {line: records for line, records in found.items() if sampler in (None, line.sampler)}
            if not here:
                continue
            lines = {
                line: (
                    [(info(r)["value"], seconds(r) * 1e6) for r in records],
                    curves(fits[line]) if line in fits else [],
                    line_name(line, sampler=sampler is None),
                )
                for line, records in here.items()
            }
            marks = []
            if axis == "elements":
                one = info(next(iter(here.values()))[0])
                marks = cache_marks(run, one["bytes_touched"] / one["value"])
            name = f"{title}, {sampler.upper()}" if sampler else title
            figures.append(chart(name, drawn(lines), log_y=True, x_title=axis, y_title="µs", marks=marks))
        rows = [
            [f"{value:,}", *("" if one is None else as_time(one) for one in row)]
            for value, row in side_by_side(found).items()
        ]
        if rows:
            tables.append(Table([axis, *map(line_name, found)], rows, "rr", f"All times over {axis}"))
        told += [[axis, line_name(line), *in_words(fits[line], axis)] for line in found if line in fits]
    if not figures:
        return []
    causes = list(dict.fromkeys(cause for fit in fits.values() for bend in fit.bends for cause in bend.causes))
    return [
        Heading("The cost as work grows"),
        Text(
            "Dots are medians. Lines are straight and fitted to them: a call's overhead and a constant cost for every "
            "unit of work, a curve on logarithmic axes. A line ends where it would have to bend; the table tells what "
            "lies there. Dotted lines: where the tensors of a call fill a cache."
        ),
        Grid(figures),
        Table(["axis", "line", "a call", "per unit", "off by at most", "where it bends, and why"], told, "llrwrw"),
        *([Items([f"{cause}: {growth.REASONS[cause]}." for cause in causes])] if causes else []),
        *speed_ups(run),
        *tables,
    ]


def curves(fit: growth.Fit) -> list[Points]:
    """The pieces of a fit, as seconds in µs at values close enough to each other for logarithmic axes."""
    found = []
    for piece in fit.pieces:
        values = [piece.first * (piece.last / piece.first) ** (i / 24) for i in range(25)]
        found.append([(value, fit.seconds(piece, value) * 1e6) for value in values])
    return found


def in_words(fit: growth.Fit, axis: str) -> list[str]:
    """A fit as cells of a table: the overhead, the slopes, the deviation, the bends with their causes."""
    unit, name, factor = growth.UNITS[axis]
    slopes = ", then ".join(digits(piece.slope * factor) for piece in fit.pieces)
    bends = []
    for bend in fit.bends:
        low, high = (f"{value:,}" for value in bend.between)
        bends.append(f"between {low} and {high}: {' and '.join(bend.causes) or 'no cause is known'}")
    where = "; ".join(bends) or "nowhere"
    if fit.deviation > growth.TOLERANCE:
        where += "; but not all points lie near lines"
    cost = f"{slopes} {name.replace('us', 'µs')} per {unit}"
    extra = "".join(f", and {duration(more.seconds)} ({more.name})" for more in fit.extra)
    return [duration(fit.overhead) + extra, cost, f"{fit.deviation:.0%}", where]


def speed_ups(run: Run) -> list[Block]:
    """Times by threads, and how many times less than with one."""
    rows = []
    for line, records in grown(run, "threads").items():
        faster = growth.speed_ups([growth.Point(info(r)["value"], seconds(r)) for r in records])
        for record in records if faster else ():
            threads = info(record)["value"]
            rows.append([line_name(line), f"{threads}", as_time(record), spread(record), times(faster[threads])])
    if not rows:
        return []
    head = ["line", "threads", "median", "quartiles", "times faster than one"]
    return [Text("Threads, at 1.5 million elements:"), Table(head, rows, "lr")]


def power(value: float) -> str:
    """A power of ten, short."""
    return f"{value:g}" if value < 1000 else f"{value / 1000:,g}k" if value < 1e6 else f"{value / 1e6:,g}M"
