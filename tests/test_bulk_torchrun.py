"""Bulk sampling by real processes: torchrun, several machines, processes killed in the middle, and full disks."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from bulk_network import Mixing

from fastdiff.bulk import load, sample, status, verify

ROOT = Path(__file__).parents[1]
PROC = Path("/proc")
MARK = "FASTDIFF_TEST_PROCESS"
CALLS = 2 + 2 * 2  # of the network, before the first micro-batch and for two of them
CHUNKS = 10

pytestmark = pytest.mark.skipif(not (PROC / "self/environ").exists(), reason="finds processes by /proc")

SETTINGS = """
samples = 38
shape = [2, 3]
batch = 4
chunk = 4
seed = 7
network = "bulk_network:quick"
[schedule]
type = "linear"
num_timesteps = 100
[sampler]
type = "ddpm"
steps = 2
[conditions]
y = { cycle = 4 }
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "run.toml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="module")
def reference(settings, tmp_path_factory):
    """What every run should give: the same job in this process."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return files(sample(load(settings).job, Mixing(), out, progress=False))


def files(out):
    """All that is in a folder, by name; the manifest without the name of the network's factory."""
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    found["manifest.json"] = re.sub(rb'"name": ".*"', b'"name": ""', found["manifest.json"])
    return found


def times(out):
    return {path.name: path.stat().st_mtime_ns for path in Path(out).glob("chunks/*.npy")}


class Processes:
    """Starts commands, each in a session of its own, and knows them and all that they start by their environment."""

    def __init__(self, folder):
        self.folder = folder
        self.marks = []
        self.started = []

    def __call__(self, *words, cwd=None, **options):
        mark = uuid.uuid4().hex
        given = {
            name: value for name, value in os.environ.items() if not re.match("RANK|WORLD|LOCAL|SLURM|TORCHE", name)
        }
        environment = given | {
            MARK: mark,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [str(word) for word in words],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        process.mark = mark
        self.marks.append(mark)
        self.started.append(process)
        return process

    def end(self):
        for mark in self.marks:
            kill(mark)
        for process in self.started:
            process.communicate(timeout=20)


@pytest.fixture
def start(tmp_path):
    processes = Processes(tmp_path)
    yield processes
    processes.end()


def living(mark, **variables):
    """The processes with this mark, and these variables, in their environment, without those that have ended."""
    wanted = {f"{name}={value}" for name, value in (variables | {MARK: mark}).items()}
    found = set()
    for path in PROC.iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):
                if wanted <= set((path / "environ").read_text(errors="replace").split("\0")):
                    found.add(int(path.name))
    return found


def kill(mark, **variables):
    """Kill -9 of all of them, also those that they start meanwhile."""
    until(lambda: [os.kill(process, signal.SIGKILL) for process in living(mark, **variables)] == [])


def until(true, seconds=60):
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < seconds, "it did not happen"
        time.sleep(0.01)


def finish(process, code=0):
    """Wait for a process; what it wrote to stderr."""
    _, errors = process.communicate(timeout=90)
    assert process.returncode == code, errors
    until(lambda: not living(process.mark))
    return errors


def bulk(settings, out, *more):
    return [sys.executable, "-m", "fastdiff.bulk", "sample", settings, *more, "--out", out]


def torchrun(processes, settings, out, *more, options=()):
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *options]
    return [*launcher, *bulk(settings, out, *more)[1:]]


def gate(path, calls=CALLS):
    return f'network={{ factory = "bulk_network:gated", arguments = {{ gate = "{path}", calls = {calls} }} }}'


def made(out):
    return len(list(Path(out).glob("chunks/*.json")))


def under_way(out):
    return len(list(Path(out).glob("chunks/*.tmp")))


LINE = "fastdiff.bulk: 38 of 38 samples (100 %)"


# The number of processes


def test_one_process(start, settings, reference, tmp_path):
    errors = finish(start(*bulk(settings, tmp_path / "out")))
    assert errors == f"{LINE}\n"
    assert files(tmp_path / "out") == reference
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", check=True, timeout=20)
    checked = verify(load(settings).job, Mixing(), tmp_path / "out", range(38))
    assert [one.index for one in checked] == list(range(38)) and all(one.equal for one in checked)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_of_torchrun(processes, start, settings, reference, tmp_path):
    errors = finish(start(*torchrun(processes, settings, tmp_path / "out", options=["--standalone"])))
    assert files(tmp_path / "out") == reference
    assert 1 <= errors.count(LINE) <= processes  # again by one that began when all was done


def test_each_of_two_processes_makes_its_share(start, settings, reference, tmp_path):
    """Both wait in their third file, so that four are there, two of each."""
    out, opening = tmp_path / "out", tmp_path / "gate"
    process = start(*torchrun(2, settings, out, gate(opening)))
    until(lambda: made(out) == 4 and under_way(out) == 2)
    assert sorted(times(out)) == [f"{chunk:08}.npy" for chunk in range(4)]
    assert status(out).samples_done == 16
    opening.touch()
    finish(process)
    assert files(out) == reference


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_machines(start, settings, reference, tmp_path):
    out, port = tmp_path / "out", free_port()
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=bulk"]
    agents = [
        start(*torchrun(processes, settings, out, options=[*meeting, f"--node-rank={rank}", "--local-addr=localhost"]))
        for rank, processes in enumerate((1, 1))
    ]
    for agent in agents:
        finish(agent)
    assert files(out) == reference


# Killed


def test_torchrun_goes_on_after_a_worker_was_killed(start, settings, reference, tmp_path):
    out, opening = tmp_path / "out", tmp_path / "gate"
    process = start(*torchrun(2, settings, out, gate(opening), options=["--standalone", "--max-restarts=1"]))
    until(lambda: made(out) == 4 and under_way(out) == 2)
    before, workers = times(out), living(process.mark, RANK=0) | living(process.mark, RANK=1)
    assert len(workers) == 2
    kill(process.mark, RANK=1)
    until(lambda: len(living(process.mark, TORCHELASTIC_RESTART_COUNT=1)) == 2)
    opening.touch()
    finish(process)
    assert files(out) == reference
    assert before.items() <= times(out).items() and len(before) == 4


def test_another_number_of_processes_goes_on_after_all_were_killed(start, settings, reference, tmp_path):
    out, opening = tmp_path / "out", tmp_path / "gate"
    process = start(*torchrun(2, settings, out, gate(opening)))
    until(lambda: made(out) == 4 and under_way(out) == 2)
    kill(process.mark)
    assert under_way(out) == 2 and made(out) == 4
    before = times(out)
    begin = time.monotonic()
    finish(start(*bulk(settings, out)))
    assert time.monotonic() - begin < 60  # it did not wait for the dead
    assert files(out) == reference
    assert before.items() <= times(out).items() and len(before) == 4


def test_a_new_run_beside_what_is_left_of_the_old_one(start, settings, reference, tmp_path):
    """The agent was killed, and its workers work on."""
    out, opening = tmp_path / "out", tmp_path / "gate"
    process = start(*torchrun(2, settings, out, gate(opening)))
    until(lambda: made(out) == 4 and under_way(out) == 2)
    process.kill()
    new = start(*bulk(settings, out))
    until(lambda: made(out) == CHUNKS - 2)
    assert new.poll() is None and under_way(out) == 2  # it waits for the two that others are making
    opening.touch()
    finish(new)
    until(lambda: not living(process.mark))
    assert files(out) == reference


# No room on the disk

NO_ROOM = r"no room on the disk: samples \d+ to \d+ \(chunk \d+\) could not be written to .*; what was finished stays\n"


def one_line(errors, pattern):
    return re.fullmatch(rf"fastdiff\.bulk: (\[Errno \d+\] )?{pattern}", errors)


def test_a_limit_of_the_size_of_files(start, settings, tmp_path):
    """Of 196 kB each, but for the last one, of 98 kB, which is its worker's first."""
    out, larger, limit = tmp_path / "out", "shape=[3,64,64]", 150_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(*bulk(settings, out, larger), "--rank=9", "--world-size=10", preexec_fn=limited)
    assert one_line(finish(process, 1), NO_ROOM)
    assert {name for name in files(out) if not name.startswith(".")} == {
        "manifest.json", "chunks/00000009.npy", "chunks/00000009.json"
    }  # fmt: skip
    before = times(out)
    job = load(settings, larger).job
    sample(job, Mixing(), out, progress=False)
    assert files(out) == files(sample(job, Mixing(), tmp_path / "whole", progress=False))
    assert before.items() <= times(out).items()


ON_SMALL_DISKS = """
mkdir small read-only
mount -t tmpfs -o size=56k none small && mount -t tmpfs -o ro none read-only || exit 77
"$@" --out read-only/out; echo $?
"$@" --out small; echo $?
ls small/chunks
mount -o remount,size=8m none small
"$@" --out small --quiet; echo $?
cp -r small copy
"""


def test_a_full_disk_and_one_that_cannot_be_written_to(start, settings, reference, tmp_path):
    """Small files take a page each, so that the disk is full in the middle, though there is room for the samples."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    command = [*bulk(settings, "")[:-2]]
    inside = start("unshare", "--map-root-user", "--mount", "sh", "-c", ON_SMALL_DISKS, "sh", *command)
    output, errors = inside.communicate(timeout=60)
    if inside.returncode in (1, 77) and "fastdiff" not in errors:
        pytest.skip(f"no file systems can be mounted here: {errors.strip()}")
    read_only, full, *names, again = output.split()
    first, second, *rest = errors.splitlines(keepends=True)
    assert (read_only, full, again, rest) == ("1", "1", "0", [])
    assert one_line(first, r".*Read-only file system.*read-only/out.*\n")
    assert one_line(second, NO_ROOM)
    done = [name for name in names if name.endswith(".json")]
    assert 1 <= len(done) < CHUNKS and not [name for name in names if name.endswith(".tmp")]
    assert files(tmp_path / "copy") == reference


# Errors


def test_nan_after_some_files(start, settings, tmp_path):
    labels = np.zeros(38, dtype=np.int64)
    labels[14] = 3
    np.save(tmp_path / "labels.npy", labels)
    condition = f'conditions.y={{ file = "{tmp_path / "labels.npy"}" }}'
    process = start(*bulk(settings, tmp_path / "out", condition, "network=bulk_network:broken"))
    assert one_line(
        finish(process, 1), r"network: .* got NaN or Inf in 1 of samples 12 to 15, the first of them 14 .*\n"
    )
    assert sorted(times(tmp_path / "out")) == [f"{chunk:08}.npy" for chunk in range(3)]
    assert under_way(tmp_path / "out") == 0


def test_a_factory_that_is_not_there(start, settings, tmp_path):
    process = start(*bulk(settings, tmp_path / "out", "network=bulk_network:quack"))
    assert one_line(finish(process, 2), r".*bulk_network.*quack.*\n")
    assert not (tmp_path / "out").exists()
