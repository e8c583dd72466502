"""20,000 digits by one, two and three processes, by two "machines", and by a run that is killed: always the same.

    python examples/bulk/same_samples.py

Every run is a real torchrun, with one thread per process. The two machines are two torchrun agents that meet on
loopback. The killed run loses all its processes to `kill -9` in the middle and is started again with another number
of them. In the end the folders' SHA256SUMS are compared, some samples are made again and compared with what was
stored, and one folder is merged to what FID tools read.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fastdiff import bulk

HERE = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def command(engine: list[str], out: Path, samples: int) -> list[str]:
    settings = ["digits.toml", f"samples={samples}", "--out", str(out)]
    return [*TORCHRUN, *engine, "-m", "fastdiff.bulk", "sample", *settings]


def processes(count: int) -> list[str]:
    return ["--standalone", "--nproc-per-node", str(count)]


def machine(rank: int, port: int) -> list[str]:
    """The arguments on one of two machines; here both are this one."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "digits"]
    return ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", *meeting]


@contextlib.contextmanager
def started(*commands: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes, none of which outlives the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(each, cwd=HERE, env=environment) for each in commands]
    try:
        yield running
    finally:
        for process in running:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9, for a torchrun agent and its workers."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family if process.poll() is None else family - {process.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def run(*commands: list[str]) -> None:
    with started(*commands) as running:
        if any(process.wait() for process in running):
            sys.exit("a run failed; what it says stands above")


def run_and_kill(out: Path, samples: int) -> None:
    """Two processes, killed when a third of the samples is there; then three."""
    with started(command(processes(2), out, samples)) as (process,):
        while process.poll() is None:
            time.sleep(0.1)
            if (out / "manifest.json").exists() and bulk.status(out).samples_done >= samples // 3:
                kill(process)
    print(f"killed at {bulk.status(out)}", flush=True)
    run(command(processes(3), out, samples))


def fingerprint(out: Path) -> str:
    return hashlib.sha256((out / "SHA256SUMS").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "build" / "bulk", help="made anew")
    options = parser.parse_args()
    out, samples = options.out.resolve(), options.samples
    shutil.rmtree(out, ignore_errors=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs = {
        "one process": lambda path: run(command(processes(1), path, samples)),
        "two processes": lambda path: run(command(processes(2), path, samples)),
        "three processes": lambda path: run(command(processes(3), path, samples)),
        "two machines": lambda path: run(*(command(machine(rank, port), path, samples) for rank in range(2))),
        "two processes killed, then three": lambda path: run_and_kill(path, samples),
    }
    lines, found = [], set()
    for name, start in runs.items():
        folder = out / name.replace(",", "").replace(" ", "_")
        before = time.perf_counter()
        print(f"\n{name}", flush=True)
        start(folder)
        found.add(fingerprint(folder))
        lines.append(f"{name:<34} {time.perf_counter() - before:6.1f} s  {fingerprint(folder)[:16]}")
    print("\nSHA-256 of SHA256SUMS, and the time with the start of Python and torch", *lines, sep="\n")
    if len(found) > 1:
        sys.exit("the runs differ")

    one = out / "one_process"
    again = [sys.executable, "-m", "fastdiff.bulk", "verify", "digits.toml", f"samples={samples}", "--out", str(one)]
    subprocess.run([*again, "--random", "16"], cwd=HERE, check=True)
    print(bulk.merge(one, npz=out / "digits.npz", labels="y"))
    print(bulk.merge(one, png=out / "png", names="{y}/{index:06}.png"))


if __name__ == "__main__":
    main()
