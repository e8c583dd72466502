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
from collections.abc import Callable, Iterator
from pathlib import Path

from fastdiff import bulk

HERE = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def command(engine: list[str], out: Path, samples: int) -> list[str]:
    settings = ["digits.toml", f"samples={samples}", "--out", str(out)]
    return [*TORCHRUN, *engine, "-m", "fastdiff.bulk", "sample", *settings]


def processes(count: int) -> list[str]:
    return ["--standalone", "--nproc-per-node", str(count)]


def machine(port: int) -> list[str]:
    """The arguments on each of two machines; here both are this one."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "digits"]
    return ["--nnodes", "2", "--nproc-per-node", "1", *meeting]


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


FAILED = "a run failed; what it says stands above"


def run(*commands: list[str]) -> None:
    with started(*commands) as running:
        if any(process.wait() for process in running):
            sys.exit(FAILED)


def run_and_kill(out: Path, samples: int) -> None:
    """Two processes, killed when a third of the samples is there; then three."""
    with started(command(processes(2), out, samples)) as (process,):
        while process.poll() is None:
            if (out / "manifest.json").exists() and bulk.status(out).samples_done >= samples // 3:
                kill(process)
            else:
                time.sleep(0.1)
    if process.returncode > 0:
        sys.exit(FAILED)
    found = bulk.status(out)
    if process.returncode == 0 or found.complete:
        sys.exit("the run ended before it was killed; give more --samples")
    print(f"killed at {found}", flush=True)
    run(command(processes(3), out, samples))


def fingerprint(out: Path) -> str:
    return hashlib.sha256((out / "SHA256SUMS").read_bytes()).hexdigest()


def two_machines(out: Path, samples: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run(*(command(machine(port), out, samples) for _ in range(2)))


RUNS: dict[str, Callable[[Path, int], None]] = {
    "one process": lambda out, samples: run(command(processes(1), out, samples)),
    "two processes": lambda out, samples: run(command(processes(2), out, samples)),
    "three processes": lambda out, samples: run(command(processes(3), out, samples)),
    "two machines": two_machines,
    "two processes killed, then three": run_and_kill,
}
FOLDERS = {name: name.replace(",", "").replace(" ", "_") for name in RUNS}
NPZ, PNG = "digits.npz", "png"


def remove_old(out: Path) -> None:
    """What an earlier call made in the folder.

    Raises:
        ValueError: there is anything else. All that is there stays.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {out}")
    made, first = [*FOLDERS.values(), NPZ, PNG], FOLDERS["one process"]
    found = {path.name for path in out.iterdir()}
    # the first run's folder is made first and removed last: without it nothing here is of this example
    others = sorted(found.difference(made) if first in found else found)
    if others:
        raise ValueError(f"--out: expected a folder with nothing but what this makes, got {out} with {others[0]}")
    for path in (out / name for name in reversed(made) if name in found):
        path.unlink() if path.name == NPZ else shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument(
        "--out", type=Path, default=HERE.parents[1] / "build" / "bulk", help="its own; what it made is replaced"
    )
    options = parser.parse_args()
    out, samples = options.out.resolve(), options.samples
    try:
        remove_old(out)
    except ValueError as error:
        parser.error(str(error))
    lines, found = [], set()
    for name, start in RUNS.items():
        folder = out / FOLDERS[name]
        before = time.perf_counter()
        print(f"\n{name}", flush=True)
        start(folder, samples)
        found.add(fingerprint(folder))
        lines.append(f"{name:<34} {time.perf_counter() - before:6.1f} s  {fingerprint(folder)[:16]}")
    print("\nSHA-256 of SHA256SUMS, and the time with the start of Python and torch", *lines, sep="\n")
    if len(found) > 1:
        sys.exit("the runs differ")

    one = out / FOLDERS["one process"]
    again = [sys.executable, "-m", "fastdiff.bulk", "verify", "digits.toml", f"samples={samples}", "--out", str(one)]
    subprocess.run([*again, "--random", "16"], cwd=HERE, check=True)
    print(bulk.merge(one, npz=out / NPZ, labels="y"))
    print(bulk.merge(one, png=out / PNG, names="{y}/{index:06}.png"))


if __name__ == "__main__":
    main()
