"""benchmarks/growth.py: the lines through made-up points, and the names of their bends."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from growth import THREADED, Point, Series, cache_sizes, describe, fit, fits, series, speed_ups  # noqa: E402

CACHES = {"L1": 2**15, "L2": 2**20, "L3": 2**25}
SIZES = [2**power for power in range(8, 25, 2)]
US, NS = 1e-6, 1e-9


def points(*slopes, sizes=SIZES, overhead=4 * US):
    """12 bytes per element; a slope for each cache that holds them, the last for memory."""
    bounds = [*[CACHES[name] for name in ("L2", "L3")][: len(slopes) - 1], float("inf")]
    found = []
    for size in sizes:
        slope = next(slope for slope, bound in zip(slopes, bounds, strict=True) if 12 * size <= bound)
        found.append(Point(size, overhead + slope * size, 12 * size))
    return found


def test_a_straight_line_has_no_bend() -> None:
    found = fit([point._replace(seconds=point.seconds * 1.03) for point in points(0.8 * NS)], CACHES)
    assert found.overhead == pytest.approx(1.03 * 4 * US) and not found.bends and found.deviation < 1e-9
    assert found.pieces[0].slope == pytest.approx(1.03 * 0.8 * NS)
    assert describe(found, "elements") == "4.1 us + 0.824 ns per element; within 0%"


def test_bends_are_where_the_caches_end() -> None:
    found = fit(reversed(points(0.12 * NS, 0.2 * NS, 0.5 * NS)), CACHES)
    assert [bend.between for bend in found.bends] == [(2**16, 2**18), (2**20, 2**22)]
    assert [bend.causes for bend in found.bends] == [("L2",), ("L3",)]
    assert [bend.ratio for bend in found.bends] == pytest.approx([0.2 / 0.12, 2.5])
    assert found.overhead == pytest.approx(4 * US) and found.deviation < 1e-9
    assert [(piece.first, piece.last) for piece in found.pieces] == [(2**8, 2**16), (2**18, 2**20), (2**22, 2**24)]


def test_a_bend_that_nothing_explains_has_no_cause() -> None:
    moved = [point._replace(bytes=1) for point in points(0.12 * NS, 0.5 * NS)]
    (bend,) = fit(moved, CACHES).bends
    assert bend.causes == () and "of no known cause" in describe(fit(moved, CACHES), "elements")


def test_threads_and_page_faults_are_causes() -> None:
    shared = [
        Point(size, 4 * US + (2 * US + size * NS / 2 if size > 2**15 else size * NS), 12 * size) for size in SIZES
    ]
    found = fit(shared, CACHES, {"threads": 2**15})
    (bend,) = found.bends
    assert bend.causes == ("threads",) and bend.ratio == pytest.approx(0.5)
    (extra,) = found.extra
    assert extra[:2] == ("threads", 2**15) and extra.seconds == pytest.approx(2 * US)
    for point in shared:
        (piece,) = (piece for piece in found.pieces if piece.first <= point.value <= piece.last)
        assert found.seconds(piece, point.value) == pytest.approx(point.seconds)
    assert describe(found, "elements").startswith("4.0 us (+ 2.0 us: threads) + 1 ns per element, 0.5 ns")
    faulting = [Point(size, 4 * US + size * NS * (3 if size > 2**21 else 1), 12, size >> 10) for size in SIZES[2:]]
    faulting = [point._replace(faults=point.faults if point.value > 2**21 else 0.25) for point in faulting]
    (bend,) = fit(faulting, CACHES).bends
    assert bend.causes == ("page faults",) and bend.ratio == pytest.approx(3)
    (last,) = fit(faulting[:-1], CACHES).bends  # one point is enough
    assert (last.between, last.causes) == (bend.between, bend.causes) and last.ratio == pytest.approx(3)


@pytest.mark.parametrize("noise", [0.06, 0.1])
def test_bends_that_the_spread_of_the_points_explains_are_rare_and_real_ones_are_found(noise) -> None:
    rng = np.random.default_rng(0)
    found = Counter()
    for _ in range(60):
        for name, slopes in (("straight", (0.8 * NS,)), ("L3", (0.14 * NS, 0.14 * NS, 0.35 * NS))):
            off = 1 + noise * rng.standard_normal(len(SIZES))
            disturbed = [
                point._replace(seconds=point.seconds * factor, spread=1.35 * noise)
                for point, factor in zip(points(*slopes), off, strict=True)
            ]
            found.update({(name, cause) for bend in fit(disturbed, CACHES).bends for cause in bend.causes or ("none",)})
    assert sum(number for (name, _), number in found.items() if name == "straight") < 5
    assert found["L3", "L3"] >= 57
    assert sum(number for key, number in found.items() if key[0] == "L3") - found["L3", "L3"] < 5


def test_one_disturbed_point_shows_in_the_deviation_and_bends_nothing() -> None:
    disturbed = points(0.8 * NS)
    disturbed[4] = disturbed[4]._replace(seconds=2 * disturbed[4].seconds)
    found = fit(disturbed, CACHES)
    assert not found.bends and 0.2 < found.deviation < 1


def test_an_overhead_is_not_negative() -> None:
    found = fit([Point(n, 1e-6 * n**1.1) for n in (1, 4, 16, 64)])
    assert found.overhead >= 0 and all(piece.slope > 0 for piece in found.pieces)


@pytest.mark.parametrize(
    "bad", [[Point(1, 1.0), Point(2, 2.0)], [Point(1, 1.0)] * 3, [Point(n, 0.0) for n in (1, 2, 3)]]
)
def test_points_that_make_no_line_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="points: expected"):
        fit(bad)


def test_the_lines_of_a_report() -> None:
    caches = {"L1 Data": "32K", "L1 Instruction": "32K", "L2": "1024K", "L3": "32M"}
    machine = {"cpu": {"caches": caches}}
    assert cache_sizes(machine) == CACHES

    def record(axis, point, threads):
        info = {"part": "growth", "axis": axis, "sampler": "ddim", "provider": "fastdiff", "threads": threads}
        info |= {"value": point.value, "bytes_touched": point.bytes, "faults": 0}
        return {"extra_info": info, "stats": {"median": point.seconds, "iqr": 0.04 * point.seconds}}

    benchmarks = [record("elements", point, 1) for point in points(0.12 * NS, 0.2 * NS, 0.5 * NS)]
    benchmarks += [record("threads", Point(n, 1.0 / n), n) for n in (1, 2, 4)]
    benchmarks.append({"extra_info": {"part": "step"}, "stats": {"median": 1.0}})
    found = fits({"machine_info": machine, "benchmarks": benchmarks})
    assert list(found) == [Series("elements", "ddim", "fastdiff", 1)]
    assert [bend.causes for bend in next(iter(found.values())).bends] == [("L2",), ("L3",)]
    assert all(point.spread == pytest.approx(0.04) for line in series(benchmarks).values() for point in line)


def test_speed_ups_are_against_one_thread() -> None:
    assert speed_ups([Point(4, 0.25), Point(1, 1.0), Point(2, 0.5)]) == {1: 1, 2: 2, 4: 4}
    assert speed_ups([Point(4, 0.25), Point(2, 0.5)]) == {}


def test_the_threshold_is_the_kernels() -> None:
    source = (Path(__file__).parents[1] / "csrc" / "ops_cpu.cpp").read_text()
    assert f"kParallelElements = {THREADED};" in source
