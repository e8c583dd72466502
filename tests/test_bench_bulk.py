"""What benchmarks/bench_bulk.py times is right, and its figures are what they are called."""

from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
pytest.importorskip("safetensors")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_bulk  # noqa: E402
import machine  # noqa: E402

from fastdiff import bulk  # noqa: E402


def test_bare_chains_make_the_same_samples(tmp_path):
    run = bulk.load(*bench_bulk.settings(2 * bench_bulk.BATCH))
    assert run.job.samples == 2 * run.job.batch == 2 * run.job.chunk_size and len(run.job.sampler) == bench_bulk.STEPS
    net, _ = run.make("cpu")
    with machine.threads(1):
        found = torch.cat(bench_bulk.bare(net, run.job.samples)).numpy()
        bulk.sample(run.job, net, tmp_path, progress=False)
    assert np.array_equal(bench_bulk.samples_in(tmp_path), found)


def test_seconds_of_a_run_by_its_files(tmp_path):
    def made(name, second):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 + second,) * 2)

    (tmp_path / "chunks").mkdir()
    made("manifest.json", 0.5)
    # two processes: one makes chunks 0, 2 and 4, in 2 s each, the other 1, 3 and 5, in 3
    for chunk, second in enumerate((2, 3, 4, 6, 6, 9)):
        made(f"chunks/{chunk:08}.json", second)
        made(f"chunks/{chunk:08}.npy", 20)
    assert bench_bulk.sampling_seconds(tmp_path) == pytest.approx(8.5)
    assert bench_bulk.chunk_seconds(tmp_path, 2) == pytest.approx(2.5)


def test_an_overhead_is_a_part_of_the_bare_time():
    ours, theirs = bench_bulk.Times(wall=6.3, processor=5.5), bench_bulk.Times(wall=6.0, processor=5.0)
    assert bench_bulk.above(ours, theirs) == pytest.approx((0.05, 0.1))


@pytest.mark.parametrize("rounds", [3, 4])
def test_sides_are_first_in_turn(rounds):
    called = []

    def side(name):
        called.append(name)
        return f"{name}{called.count(name)}"

    def pedantic(target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()

    found = bench_bulk.in_turn(
        types.SimpleNamespace(pedantic=pedantic), rounds, lambda: side("ours"), lambda: side("theirs")
    )
    assert found == [(f"ours{number + 1}", f"theirs{number + 1}") for number in range(rounds)]
    order = ["theirs", "ours", "ours", "theirs"]
    assert called == (2 * order)[: 2 * rounds]


def test_a_stopwatch_adds_up_and_goes_away():
    place = types.SimpleNamespace(one=lambda seconds: time.sleep(seconds) or "done", two=lambda: 1 / 0, three=None)
    before, watch = vars(place).copy(), bench_bulk.Stopwatch()
    with watch.on("both", (place, "one"), (place, "two")), watch.on("neither", (place, "three")):
        assert [place.one(0.01), place.one(seconds=0.02)] == ["done", "done"]
        with pytest.raises(ZeroDivisionError):
            place.two()
    assert vars(place) == before
    assert 0.03 <= watch.seconds["both"] < 1 and watch.seconds["neither"] == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads to processors")
def test_processes_may_use_what_the_thread_is_kept_from():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(machine.ALLOWED)})
    try:
        with machine.all_processors():
            assert os.sched_getaffinity(0) == machine.ALLOWED
        assert os.sched_getaffinity(0) == {min(machine.ALLOWED)}
    finally:
        os.sched_setaffinity(0, before)
