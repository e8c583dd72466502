"""What work costs as it grows: straight lines through the points of bench_growth.py, and what lies where they bend.

    python benchmarks/growth.py build/benchmarks.json

A call costs an overhead, and a constant for every unit of work, until something about the work changes: its tensors
leave a cache, or more threads take it. `fit` finds the bends in the points alone, as few as describe them all and none
that the spread of the points explains, and names them after what lies between their two sides; a bend that no name fits
has none.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 0.1  # the relative deviation from a line that is no bend
SURE, UNSURE = 0.02, 0.2  # the least spread that is believed, and the most: a median is better than quartiles far apart
NORMAL = 1.35  # quartiles of a normal are that many standard deviations apart
SIGNIFICANT = 12.0  # what one more line has to take off the sum of squares, in standard deviations
GAIN = 0.7  # what one more line has to leave of the deviation, or be without
FULL = 0.5  # of a cache: what it holds is not alone there, and is spread unevenly
PIECES = 4  # at the most: three levels of cache, and memory
THREADED = 32768  # elements up to which one thread takes a step
REASONS = {
    "L1": "the tensors of a call no longer fit into the first-level cache",
    "L2": "the tensors of a call no longer fit into the second-level cache",
    "L3": "the tensors of a call no longer fit into the third-level cache: they come from memory",
    "threads": f"above {THREADED:,} elements the work is shared by the threads",
    "page faults": "the system hands out the memory of the result page by page, anew at every call",
}
UNITS = {"elements": ("element", "ns", 1e9), "batch": ("sample", "ns", 1e9), "steps": ("step", "us", 1e6)}


class Point(NamedTuple):
    """value: the work. seconds: what a call took. bytes: of its tensors. faults: of pages, during it. spread: of the
    seconds, from quartile to quartile, relative to them."""

    value: int
    seconds: float
    bytes: int = 0
    faults: float = 0
    spread: float = 0


@dataclass(frozen=True)
class Piece:
    """A straight line: seconds = overhead (with extra) + slope * value, for the values from first to last."""

    first: int
    last: int
    slope: float


@dataclass(frozen=True)
class Bend:
    """between: the values of the two points it lies between. ratio: of the slopes behind and before it.

    causes: what lies there too, keys of REASONS.
    """

    between: tuple[int, int]
    ratio: float
    causes: tuple[str, ...]


class Extra(NamedTuple):
    """seconds: what a call of a value above `above` costs more."""

    name: str
    above: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """overhead: seconds of a call without work. deviation: the largest of a point from its line, relative to it.

    extra: what is added to the overhead above each threshold.
    """

    overhead: float
    extra: tuple[Extra, ...]
    pieces: tuple[Piece, ...]
    bends: tuple[Bend, ...]
    deviation: float

    def seconds(self, piece: Piece, value: float) -> float:
        """What a piece says of a value."""
        beyond = sum(extra.seconds for extra in self.extra if value > extra.above)
        return self.overhead + beyond + piece.slope * value


def fit(
    points: Iterable[Point],
    caches: Mapping[str, int] | None = None,
    thresholds: Mapping[str, int] | None = None,
    tolerance: float = TOLERANCE,
) -> Fit:
    """The fewest straight lines with one overhead that come within `tolerance`, or its spread, of every point.

    Least squares of the relative deviations, each in its point's standard deviations; every line has two points at
    least, or one with page faults, and takes off more than chance does. Where no lines come so close (a point was
    disturbed), `deviation` tells, and there are no more of them than make it smaller by a good part.

    Args:
        points: three at least, of different values.
        caches: the bytes that each holds, by name.
        thresholds: values above which something else begins, by name, at a price for each call.

    Raises:
        ValueError: fewer points, two of one value, or a value or time that is not positive.
    """
    points, thresholds = sorted(points), thresholds or {}
    values, seconds = (np.array([point[i] for point in points], dtype=np.float64) for i in (0, 1))
    if len(points) < 3 or len(set(values)) < len(points):
        raise ValueError(f"points: expected three or more of different values, got {[point.value for point in points]}")
    if not ((values > 0).all() and (seconds > 0).all()):
        raise ValueError(f"points: expected positive values and seconds, got {points}")
    calls = np.array([np.ones(len(points)), *(values > value for value in thresholds.values())])
    spread = np.clip([point.spread for point in points], SURE, UNSURE)
    deviations, allowed = spread / NORMAL, np.maximum(spread, tolerance)

    def lines(edges: list[int]) -> _Lines:
        return _lines(values, seconds, calls, edges, deviations, allowed)

    best = lines([0, len(points)])
    for count in range(2, PIECES + 1):
        if best.worst <= 1:
            break
        cuts = itertools.combinations(range(2, len(points)), count - 1)
        edges = [each for inner in cuts if _long_enough(points, each := [0, *inner, len(points)])]
        closer = min(map(lines, edges), key=lambda each: each.worst, default=best)
        chance = SIGNIFICANT * (len(closer.edges) - len(best.edges))
        if closer.worst <= max(1, GAIN * best.worst) and best.squares - closer.squares > chance:
            best = closer
    edges, (overhead, *found) = best.edges, best.costs
    extra = tuple(Extra(*one, more) for one, more in zip(thresholds.items(), found, strict=False))
    slopes = found[len(thresholds) :]
    pieces = [
        Piece(points[a].value, points[b - 1].value, slope)
        for (a, b), slope in zip(itertools.pairwise(edges), slopes, strict=True)
    ]
    bends = []
    for cut, (slope, after) in zip(edges[1:-1], itertools.pairwise(slopes), strict=True):
        low, high = points[cut - 1], points[cut]
        ratio = after / slope if slope else np.inf
        if ratio < 1:
            causes = [name for name, value in thresholds.items() if low.value <= value < high.value]
        else:
            causes = [name for name, size in (caches or {}).items() if low.bytes <= size and FULL * size < high.bytes]
            causes += ["page faults"] if low.faults < 1 <= high.faults else []
        bends.append(Bend((low.value, high.value), ratio, tuple(causes)))
    return Fit(overhead, extra, tuple(pieces), tuple(bends), best.deviation)


def _long_enough(points: Sequence[Point], edges: list[int]) -> bool:
    """Whether every line has two points, or one that faults at every call: that is no disturbance."""
    return all(b - a > 1 or points[a].faults >= 1 for a, b in itertools.pairwise(edges))


class _Lines(NamedTuple):
    """costs: of a call, then slopes, none negative. squares: the sum of those of the relative deviations, in standard
    deviations. worst: the largest deviation by what it may be. deviation: the largest."""

    edges: list[int]
    costs: list[float]
    squares: float
    worst: float
    deviation: float


def _lines(
    values: np.ndarray,
    seconds: np.ndarray,
    calls: np.ndarray,
    edges: list[int],
    deviations: np.ndarray,
    allowed: np.ndarray,
) -> _Lines:
    """These lines. calls: [costs, points], which of the costs of a call each point pays. deviations: the points'
    standard ones. allowed: how far a point may be from its line."""
    work = np.zeros((len(edges) - 1, len(values)))
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        work[k, a:b] = values[a:b]
    columns = np.concatenate([calls, work]).T
    relative = columns / seconds[:, None]
    kept = list(range(columns.shape[1]))
    while True:
        found = np.zeros(columns.shape[1])
        found[kept] = np.linalg.lstsq(relative[:, kept] / deviations[:, None], 1 / deviations, rcond=None)[0]
        if (found >= 0).all():
            off = np.abs(relative @ found - 1)
            squares = float(((off / deviations) ** 2).sum())
            return _Lines(edges, found.tolist(), squares, float((off / allowed).max()), float(off.max()))
        kept.remove(int(found.argmin()))


# What a run measured


class Series(NamedTuple):
    """The points of one line. threads: 0 where they are the axis."""

    axis: str
    sampler: str
    provider: str
    threads: int


def series(benchmarks: Iterable[Mapping[str, Any]]) -> dict[Series, list[Point]]:
    """The points of a report's benchmarks of part "growth", by the line that they are on."""
    found: dict[Series, list[Point]] = defaultdict(list)
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("part") == "growth":
            axis = info["axis"]
            key = Series(axis, info["sampler"], info["provider"], 0 if axis == "threads" else info["threads"])
            stats = benchmark["stats"]
            spread = stats["iqr"] / stats["median"]
            found[key].append(Point(info["value"], stats["median"], info["bytes_touched"], info["faults"], spread))
    return {key: sorted(points) for key, points in found.items()}


def cache_sizes(machine: Mapping[str, Any]) -> dict[str, int]:
    """{"L1": bytes, ...} of the caches for data in a report's machine_info."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found = {}
    for name, size in machine["cpu"]["caches"].items():
        if "Instruction" not in name:
            found[name.split()[0]] = int(size[:-1]) * units[size[-1]]
    return found


def fits(report: Mapping[str, Any]) -> dict[Series, Fit]:
    """The lines of a report, but for those over threads (see `speed_ups`) and of fewer than three points."""
    caches = cache_sizes(report["machine_info"])
    found = {}
    for key, points in series(report["benchmarks"]).items():
        if key.axis in UNITS and len(points) >= 3:
            shared = key.axis == "elements" and key.threads > 1
            found[key] = fit(points, caches, {"threads": THREADED} if shared else None)
    return found


def speed_ups(points: Sequence[Point]) -> dict[int, float]:
    """How many times faster than with one thread, by threads; empty where that was not measured."""
    alone = next((point.seconds for point in points if point.value == 1), None)
    if alone is None:
        return {}
    return {point.value: alone / point.seconds for point in points}


def describe(found: Fit, axis: str) -> str:
    """A fit in words."""
    unit, name, factor = UNITS[axis]
    extra = "".join(f" (+ {more.seconds * 1e6:.1f} us: {more.name})" for more in found.extra)
    told = [f"{found.overhead * 1e6:.1f} us{extra}"]
    for piece, bend in itertools.zip_longest(found.pieces, (None, *found.bends)):
        text = f"{piece.slope * factor:.3g} {name} per {unit}"
        if bend is not None:
            where = f"between {bend.between[0]:,} and {bend.between[1]:,}"
            text += f" beyond a bend {where} ({' and '.join(bend.causes) or 'of no known cause'}, x{bend.ratio:.2f})"
        told.append(text)
    return f"{' + '.join(told[:2])}{''.join(f', {text}' for text in told[2:])}; within {found.deviation:.0%}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, help="what pytest wrote with --benchmark-json")
    report = json.loads(parser.parse_args(arguments).json.read_text())
    for key, found in fits(report).items():
        print(f"{key.axis}, {key.sampler}, {key.provider}, {key.threads} thread(s): {describe(found, key.axis)}")
    for key, points in series(report["benchmarks"]).items():
        ratios = speed_ups(points) if key.axis == "threads" else {}
        if ratios:
            told = ", ".join(f"{value}: {ratio:.2f}" for value, ratio in ratios.items())
            print(f"threads, {key.sampler}, {key.provider}: times faster by threads {told}")


if __name__ == "__main__":
    main()
