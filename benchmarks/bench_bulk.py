"""fastdiff.bulk beside the chains that it runs, and two of its processes beside one: digits by 20 DDIM steps.

    make bench
    python -m pytest benchmarks/bench_bulk.py

`test_overhead`: in every round first the bare chains (the same micro-batches, seeds and labels, results kept in a list,
nothing written), then `bulk.sample` into a fresh folder in build/, with the probe and all files. The overhead is
the median of the rounds' ratios, because a machine's speed drifts by more than what is looked for. It is one of wall
time, as waits for a disk are not the processor's; the processor's own stands beside it. The job is the worst case: in a
run of seconds the probe (two calls of the network at the first step) weighs more than in one of hours, and each
micro-batch is a file. Before, both must give the same bits.

`test_processes`: the command as one runs it, by torchrun, each process with one thread. The time is the whole
command's; `sampling_seconds` go from the manifest, written when the first process is ready to sample, to the last
record. All must write the same bytes, and the bits of a bare chain.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
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
SCHEDULE, STEPS, BATCH = NoiseSchedule.cosine(1000), 20, 64
SAMPLES, ROUNDS = 14 * BATCH, 6
SAMPLES_OF_PROCESSES = 64 * BATCH
FILES = [(Writer, "write"), (Writer, "commit"), *((Folder, name) for name in ("begin", "claims", "write_sums"))]


def settings(samples: int) -> list[str]:
    """Those of the example; each micro-batch is a file."""
    return [str(EXAMPLE / "digits.toml"), f"samples={samples}", f"batch={BATCH}", f"chunk={BATCH}"]


def bare(net: Callable[..., Tensor], samples: int) -> list[Tensor]:
    """The chains alone, as one writes them; samples is a multiple of the micro-batch."""
    sampler, found = DDIMSampler(SCHEDULE, steps=STEPS), []
    index, seed = torch.arange(samples), seeds(0, samples)
    for start in range(0, samples, BATCH):
        part = slice(start, start + BATCH)
        labels = {"y": index[part] % model.CLASSES}
        found.append(sampler.sample(net, (BATCH, *model.IMAGE_SHAPE), seeds=seed[part], model_kwargs=labels))
    return found


def samples_in(out: Path) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted((out / "chunks").glob("*.npy"))])


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """One on the disk of the repository: a temporary folder may be memory, which has nothing to wait for."""
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bulk-", dir=BUILD) as folder:
        yield Path(folder) / "out"


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
class Round:
    """Seconds of the wall and of the processor of both, and of pieces of `bulk.sample`."""

    bare: tuple[float, float]
    bulk: tuple[float, float]
    pieces: dict[str, float]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def overhead(rounds: list[Round], clock: int) -> float:
    """The median of the ratios, less 1. clock: 0, the wall's, or 1, the processor's."""
    return statistics.median(each.bulk[clock] / each.bare[clock] for each in rounds) - 1


def test_overhead(benchmark: Any) -> None:
    run = bulk.load(*settings(SAMPLES))
    net, _ = run.make("cpu")
    rounds: list[Round] = []
    alone = (0.0, 0.0)
    with threads(1), fresh_folder() as out:

        def sample() -> None:
            bulk.sample(run.job, net, out, progress=False)

        sample()
        assert np.array_equal(samples_in(out), torch.cat(bare(net, SAMPLES)).numpy())

        def before() -> None:
            nonlocal alone
            shutil.rmtree(out)
            alone = timed(lambda: bare(net, SAMPLES))

        def measured() -> None:
            watch = Stopwatch()
            with (
                watch.on("probe_seconds", (Maker, "probe")),
                watch.on("files_seconds", *FILES),
                watch.on("disk_seconds", (os, "fsync")),
            ):
                rounds.append(Round(alone, timed(sample), watch.seconds))

        benchmark.group = "bulk overhead"
        benchmark.pedantic(measured, setup=before, rounds=ROUNDS)
    benchmark.extra_info |= {
        "part": "bulk",
        "case": f"bulk-{BATCH}",
        "provider": "fastdiff",
        "threads": 1,
        "device": "cpu",
        "shape": list(model.IMAGE_SHAPE),
        "batch": BATCH,
        "chunk": BATCH,
        "steps": STEPS,
        "samples": SAMPLES,
        "bare_seconds": statistics.median(each.bare[0] for each in rounds),
        "overhead": overhead(rounds, 0),
        "processor_overhead": overhead(rounds, 1),
        "overheads": [each.bulk[0] / each.bare[0] - 1 for each in rounds],
        **{name: statistics.median(each.pieces[name] for each in rounds) for name in rounds[0].pieces},
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


@pytest.fixture(scope="module")
def sums() -> dict[int, str]:
    """SHA256SUMS by the number of processes."""
    return {}


@pytest.mark.parametrize("processes", [1, 2])
def test_processes(benchmark: Any, sums: dict[int, str], processes: int) -> None:
    if processes > PROCESSORS:
        pytest.skip(f"needs {processes} processors")
    benchmark.group = "bulk processes"
    with threads(1), fresh_folder() as out:
        benchmark.pedantic(command, (processes, out), rounds=1)
        sums[processes] = (out / "SHA256SUMS").read_text()
        assert len(set(sums.values())) == 1, "the number of processes changes the samples"
        found = samples_in(out)
        assert len(found) == SAMPLES_OF_PROCESSES
        assert np.array_equal(found[:BATCH], bare(bulk.load(*settings(BATCH)).make("cpu")[0], BATCH)[0].numpy())
        benchmark.extra_info |= {
            "part": "processes",
            "case": "bulk-processes",
            "provider": f"{processes}_process{'es' if processes > 1 else ''}",
            "threads": 1,
            "device": "cpu",
            "shape": list(model.IMAGE_SHAPE),
            "batch": BATCH,
            "chunk": BATCH,
            "steps": STEPS,
            "samples": SAMPLES_OF_PROCESSES,
            "processes": processes,
            "sampling_seconds": sampling_seconds(out),
            "chunk_seconds": chunk_seconds(out, processes),
        }
