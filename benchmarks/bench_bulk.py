"""fastdiff.bulk beside the chains that it runs, and two of its processes beside one: digits by 20 DDIM steps.

    make bench
    python -m pytest benchmarks/bench_bulk.py

`test_overhead`: in every round the bare chains (the same micro-batches, seeds and labels, results kept in a list,
nothing written) and `bulk.sample` into a fresh folder in build/, with the probe and all files; the bare chains are
first in every other round. The overhead is the median of the rounds' ratios, because a machine's speed drifts by more
than what is looked for. It is one of wall time, as waits for a disk are not the processor's; the processor's own stands
beside it. The job is the worst case: in a run of seconds the probe (two calls of the network at the first step) weighs
more than in one of hours, and each micro-batch is a file. In every round both must give the same bits.

`test_processes`: the command as one runs it, by torchrun, each process with one thread: in every round with one process
and with two, in the same turns. The time is the whole command's; `sampling_seconds` go from the manifest, written when
the first process is ready to sample, to the last record. All must write the same bytes, and the bits of a bare chain.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pytest
import torch
from machine import PROCESSORS, all_processors, threads
from torch import Tensor

from fastdiff import DDIMSampler, NoiseSchedule, bulk, seeds
from fastdiff.bulk.folder import Folder, Writer
from fastdiff.bulk.worker import Maker

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "bulk"
sys.path += [str(EXAMPLE), str(EXAMPLE.parent / "digits")]

import model  # noqa: E402

BUILD = ROOT / "build"
STEPS, BATCH = 20, 64
SAMPLER = DDIMSampler(NoiseSchedule.cosine(1000), steps=STEPS)
SAMPLES, ROUNDS = 12 * BATCH, 6
SAMPLES_OF_PROCESSES, ROUNDS_OF_PROCESSES = 20 * BATCH, 3
FILES = [(Writer, "write"), (Writer, "commit"), *((Folder, name) for name in ("begin", "claims", "write_sums"))]
CONDITIONS = {
    "threads": 1,
    "device": "cpu",
    "shape": list(model.IMAGE_SHAPE),
    "batch": BATCH,
    "chunk": BATCH,
    "steps": STEPS,
}

Ours, Theirs = TypeVar("Ours"), TypeVar("Theirs")


def settings(samples: int) -> list[str]:
    """Those of the example; each micro-batch is a file."""
    return [str(EXAMPLE / "digits.toml"), f"samples={samples}", f"batch={BATCH}", f"chunk={BATCH}"]


def bare(net: Callable[..., Tensor], samples: int) -> list[Tensor]:
    """The chains alone, as one writes them; samples is a multiple of the micro-batch."""
    found = []
    index, seed = torch.arange(samples), seeds(0, samples)
    for start in range(0, samples, BATCH):
        part = slice(start, start + BATCH)
        labels = {"y": index[part] % model.CLASSES}
        found.append(SAMPLER.sample(net, (BATCH, *model.IMAGE_SHAPE), seeds=seed[part], model_kwargs=labels))
    return found


def samples_in(out: Path) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted((out / "chunks").glob("*.npy"))])


@contextmanager
def fresh_folders() -> Iterator[Iterator[Path]]:
    """Folders that are not there yet, on the disk of the repository: a temporary folder may be memory, which has
    nothing to wait for."""
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bulk-", dir=BUILD) as folder:
        yield (Path(folder) / f"{number}" for number in itertools.count())


def in_turn(
    benchmark: Any, rounds: int, ours: Callable[[], Ours], theirs: Callable[[], Theirs]
) -> list[tuple[Ours, Theirs]]:
    """What both returned in each round. The benchmark times ours; theirs is first in rounds 0, 2, ..., ours in others,
    so that neither gains by what drifts or stays behind."""
    found: list[Ours] = []
    beside: list[Theirs] = []

    def before() -> None:
        if len(found) % 2 == 0:
            catch_up(len(found) + 1)

    def catch_up(rounds: int) -> None:
        while len(beside) < rounds:
            beside.append(theirs())

    benchmark.pedantic(lambda: found.append(ours()), setup=before, rounds=rounds)
    catch_up(len(found))
    return list(zip(found, beside, strict=True))


@dataclass
class Stopwatch:
    """Seconds spent in functions, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, name: str, *functions: tuple[Any, str]) -> Iterator[None]:
        """functions: each the object or module that it is looked up in, and what it is called there."""
        self.seconds[name] = 0.0

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                begin = time.perf_counter()
                try:
                    return function(*args, **options)
                finally:
                    self.seconds[name] += time.perf_counter() - begin

            return call

        with ExitStack() as patches:
            for owner, attribute in functions:
                patches.enter_context(mock.patch.object(owner, attribute, watched(getattr(owner, attribute))))
            yield


@dataclass(frozen=True)
class Times:
    """Seconds of the wall and of the processor."""

    wall: float
    processor: float


def timed(work: Callable[[], object]) -> Times:
    begin = time.perf_counter(), time.process_time()
    work()
    return Times(time.perf_counter() - begin[0], time.process_time() - begin[1])


def above(ours: Times, theirs: Times) -> tuple[float, float]:
    """What ours takes more, as a part of theirs, of the wall's time and of the processor's."""
    return ours.wall / theirs.wall - 1, ours.processor / theirs.processor - 1


def test_overhead(benchmark: Any) -> None:
    run = bulk.load(*settings(SAMPLES))
    net, _ = run.make("cpu")
    with threads(1), fresh_folders() as folders:
        made: list[Path] = []
        found: list[np.ndarray] = []

        def in_bulk() -> tuple[Times, dict[str, float]]:
            made.append(next(folders))
            watch = Stopwatch()
            with (
                watch.on("probe_seconds", (Maker, "probe")),
                watch.on("files_seconds", *FILES),
                watch.on("disk_seconds", (os, "fsync")),
            ):
                return timed(lambda: bulk.sample(run.job, net, made[-1], progress=False)), watch.seconds

        def alone() -> Times:
            return timed(lambda: found.append(torch.cat(bare(net, SAMPLES)).numpy()))

        for warm_up in (in_bulk, alone):
            warm_up()
        benchmark.group = "bulk overhead"
        rounds = in_turn(benchmark, ROUNDS, in_bulk, alone)
        found += map(samples_in, made)
    assert all(np.array_equal(each, found[0]) for each in found)
    wall, processor = zip(*(above(ours, theirs) for (ours, _), theirs in rounds), strict=True)
    pieces = [pieces for (_, pieces), _ in rounds]
    benchmark.extra_info |= CONDITIONS | {
        "part": "bulk",
        "case": f"bulk-{BATCH}",
        "provider": "fastdiff",
        "samples": SAMPLES,
        "bare_seconds": statistics.median(theirs.wall for _, theirs in rounds),
        "overheads": wall,
        "processor_overheads": processor,
        **{name: statistics.median(each[name] for each in pieces) for name in pieces[0]},
    }


def command(processes: int, out: Path) -> None:
    """torchrun with the command, on all processors; OpenMP's places would put all processes on one of them."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ours = ["-m", "fastdiff.bulk", "sample", *settings(SAMPLES_OF_PROCESSES), "--out", str(out), "--quiet"]
    with all_processors():
        done = subprocess.run(
            torchrun + ours,
            cwd=EXAMPLE,  # where they find the network
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout


def sampling_seconds(out: Path) -> float:
    """From the manifest to the last record."""
    return max(file.stat().st_mtime for file in records(out)) - (out / "manifest.json").stat().st_mtime


def chunk_seconds(out: Path, processes: int) -> float:
    """The median of the times between two records of one process, which makes each chunk of that number and so on."""
    at = [file.stat().st_mtime for file in records(out)]
    return statistics.median(end - begin for begin, end in zip(at, at[processes:], strict=False))


def records(out: Path) -> list[Path]:
    return sorted((out / "chunks").glob("*.json"))


@dataclass(frozen=True)
class Command:
    """What was seen of one command."""

    out: Path
    seconds: float
    sampling_seconds: float
    chunk_seconds: float


def test_processes(benchmark: Any) -> None:
    if PROCESSORS < 2:
        pytest.skip("needs 2 processors")
    expected = bare(bulk.load(*settings(BATCH)).make("cpu")[0], BATCH)[0].numpy()
    with threads(1), fresh_folders() as folders:

        def seen(processes: int) -> Command:
            out = next(folders)
            whole = timed(lambda: command(processes, out)).wall
            return Command(out, whole, sampling_seconds(out), chunk_seconds(out, processes))

        benchmark.group = "bulk processes"
        rounds = in_turn(benchmark, ROUNDS_OF_PROCESSES, lambda: seen(2), lambda: seen(1))
        two, one = zip(*rounds, strict=True)
        sums = {(each.out / "SHA256SUMS").read_text() for each in two + one}
        assert len(sums) == 1, "the number of processes changes the samples"
        for found in (samples_in(each.out) for each in two + one):
            assert len(found) == SAMPLES_OF_PROCESSES and np.array_equal(found[:BATCH], expected)

    def median(commands: Sequence[Command], name: str) -> float:
        return statistics.median(getattr(each, name) for each in commands)

    benchmark.extra_info |= CONDITIONS | {
        "part": "processes",
        "case": "bulk-processes",
        "provider": "2_processes",
        "samples": SAMPLES_OF_PROCESSES,
        "processes": 2,
        "sampling_seconds": median(two, "sampling_seconds"),
        "chunk_seconds": median(two, "chunk_seconds"),
        "one_seconds": median(one, "seconds"),
        "one_sampling_seconds": median(one, "sampling_seconds"),
        "one_chunk_seconds": median(one, "chunk_seconds"),
        "speedups": [alone.sampling_seconds / both.sampling_seconds for both, alone in rounds],
    }
