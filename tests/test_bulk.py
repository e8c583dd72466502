"""Bulk sampling in one process: which samples a job gives, its folder after every kind of stop, and what it refuses."""

from __future__ import annotations

import builtins
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bulk_network import Mixing

from fastdiff import bulk
from fastdiff.bulk import Job, folder, sample, status, verify, worker
from fastdiff.noise import mix64
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(100)
DDPM = DDPMSampler(SCHEDULE, 4)
STEPS, PROBES = 4, 2  # calls of the network for a micro-batch, and before the first
LABELS = np.array([2, 0, 1, 3, 3, 1, 0, 2, 2, 1])


def by_class(indices):
    return indices % 4


def no_class(indices):
    return torch.zeros_like(indices)


def itself(indices):
    return indices


def make_job(samples=10, **changes):
    """Ten samples in micro-batches of four, a file for each: the last is filled up with two more of sample 9."""
    given = {"sampler": DDPM, "shape": (2, 3), "seed": 5, "batch": 4, "chunk": 4} | changes
    return Job(samples=samples, **given)


run = functools.partial(sample, progress=False)


def files(out):
    """All that is in a folder, by name."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def times(out):
    return {path: path.stat().st_mtime_ns for path in sorted(Path(out).rglob("*"))}


def samples_in(out):
    parts = [np.load(path) for path in sorted(Path(out).glob("chunks/*.npy"))]
    return np.concatenate(parts)


def names_of(chunks):
    return {f"chunks/{chunk:08}.{kind}" for chunk in chunks for kind in ("npy", "json")}


def by_hand(job, network=None, decode=None):
    """The samples of a job as they should be stored, made with the sampler alone."""
    network = network or Mixing()

    def entry(condition, index):
        if callable(condition):
            return condition(torch.tensor([index]))[0]
        return torch.as_tensor(condition[index])

    def conditions(given, indices):
        return {name: torch.stack([entry(value, i) for i in indices]) for name, value in (given or {}).items()}

    parts = []
    for start in range(0, job.samples, job.batch):
        indices = [min(start + place, job.samples - 1) for place in range(job.batch)]
        seeds = [(mix64(job.seed) + i) % 2**64 for i in indices]
        x = job.sampler.sample(
            network,
            (job.batch, *job.shape),
            seeds=torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds]),
            dtype=job.dtype,
            model_kwargs=conditions(job.conditions, indices),
            guidance_scale=job.guidance_scale,
            uncond_kwargs=None if job.uncond is None else conditions(job.uncond, indices),
        )
        x = x if decode is None else decode(x)
        if job.store == "uint8" and x.dtype != torch.uint8:
            x = ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        parts.append(x if x.dtype in (torch.uint8, torch.float64) else x.float())
    return torch.cat(parts)[: job.samples].numpy()


def assert_same(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of `make_job()`; not to be written to."""
    return run(make_job(), Mixing(), tmp_path_factory.mktemp("bulk") / "finished")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# Samples

GUIDED = {"guidance_scale": 2.5, "conditions": {"y": LABELS}, "uncond": {"y": no_class}}
JOBS = {
    "ddpm": {},
    "ddim": {"sampler": DDIMSampler(SCHEDULE, 3)},
    "ddim eta": {"sampler": DDIMSampler(SCHEDULE, 3, eta=0.5), "seed": 6},
    "array": {"conditions": {"y": LABELS}},
    "tensor": {"conditions": {"y": torch.from_numpy(LABELS)}},
    "function": {"conditions": {"y": by_class}},
    "two": {"conditions": {"y": by_class, "scale": np.linspace(0.5, 1, 20).reshape(10, 2)}},
    "bfloat16 tensor": {"conditions": {"scale": torch.linspace(0.5, 1, 10, dtype=torch.bfloat16)}},
    "array in Fortran order": {"conditions": {"scale": np.asfortranarray(np.linspace(0.5, 1, 20).reshape(10, 2))}},
    "guidance": GUIDED,
    "guidance beside a condition": {
        "guidance_scale": -1,
        "conditions": {"y": by_class, "scale": np.linspace(0.5, 1, 10)},
        "uncond": {"y": np.zeros(10, dtype=np.int64)},
    },
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "bytes": {"store": "uint8"},
    "bytes of halves": {"store": "uint8", "dtype": torch.bfloat16},
    "one": {"samples": 1},
    "fewer than a batch": {"samples": 3},
    "a multiple": {"samples": 8},
    "batch 1": {"batch": 1},
    "chunks of two micro-batches": {"chunk": 8},
    "one chunk": {"chunk": 400},
    "default chunk": {"chunk": None},
    "images": {"shape": (3, 4, 5)},
    "one number": {"shape": ()},
    "largest seed": {"seed": 2**64 - 1},
    "smallest seed": {"seed": -(2**63)},
    "seeds beyond 2^64": {"seed": 17595026016420499197},  # mix64 of it is 2^64 - 3
    "seeds beyond 2^63": {"seed": 7616793082216978646},  # mix64 of it is 2^63 - 3
}


@pytest.mark.parametrize("changes", JOBS.values(), ids=[name.replace(" ", "-") for name in JOBS])
def test_samples_are_those_of_the_sampler(changes, out):
    job = make_job(**changes)
    assert run(job, Mixing(), out) == out
    assert_same(samples_in(out), by_hand(job))
    for chunk in range(job.chunks):
        first, end = job.span(chunk)
        assert len(np.load(folder.Folder(out).file(chunk))) == end - first <= job.chunk


def test_seeds_that_wrap_are_what_they_say():
    wrapping = make_job(**JOBS["seeds beyond 2^64"]).seeds_of(torch.arange(5))
    assert wrapping.tolist() == [-3, -2, -1, 0, 1]
    wrapping = make_job(**JOBS["seeds beyond 2^63"]).seeds_of(torch.arange(5))
    assert wrapping.tolist() == [2**63 - 3, 2**63 - 2, 2**63 - 1, -(2**63), -(2**63) + 1]


def test_samples_depend_on_seed_and_condition_of_their_index():
    """The network mixes the samples of a batch, so this also says that they are filled up alike."""
    a = by_hand(make_job())
    assert not np.array_equal(a, by_hand(make_job(seed=6)))
    assert not np.array_equal(a, by_hand(make_job(batch=5, chunk=5)))
    assert len(np.unique(a.reshape(10, -1), axis=0)) == 10


def to_images(x):
    return x.reshape(len(x), 2, 3).repeat(1, 2, 1)[..., None] * 0.5


def to_bytes(x):
    return (x * 20 + 100).clamp(0, 255).to(torch.uint8)


def to_one_number(x):
    return x.double().mean((1, 2))


@pytest.mark.parametrize("store", ["state", "uint8"])
@pytest.mark.parametrize("decode", [to_images, to_bytes, to_one_number], ids=lambda f: f.__name__)
def test_decode(decode, store, out):
    job = make_job(store=store)
    run(job, Mixing(), out, decode=decode)
    assert_same(samples_in(out), by_hand(job, decode=decode))
    manifest = json.loads((out / "manifest.json").read_text())
    stored = samples_in(out)
    assert manifest["result"] == {"shape": list(stored.shape[1:]), "dtype": str(stored.dtype)}


def test_network_as_a_module_may_return_what_a_model_may(out):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x, t):
            return (Mixing(self.weight)(x, t), "and more")

    run(make_job(), Module().eval(), out)
    assert_same(samples_in(out), by_hand(make_job()))


def test_layout_of_the_state_is_not_kept(out):
    def channels_last(x):
        return x.to(memory_format=torch.channels_last)

    job = make_job(shape=(3, 4, 5))
    run(job, Mixing(), out, decode=channels_last)
    assert all(np.load(path).flags.c_contiguous for path in out.glob("chunks/*.npy"))
    assert_same(samples_in(out), by_hand(job))


def test_records_and_sums(out):
    job = make_job(conditions={"y": LABELS, "odd": LABELS % 2 == 1, "scale": np.ones(10, dtype=np.float32)}, name="net")

    def network(x, t, y, odd, scale):
        return Mixing()(x, t, y, scale)

    run(job, network, out)
    digests = [hashlib.sha256((out / f"chunks/0000000{chunk}.npy").read_bytes()).hexdigest() for chunk in range(3)]
    sums = "".join(f"{digest}  chunks/0000000{chunk}.npy\n" for chunk, digest in enumerate(digests))
    assert (out / "SHA256SUMS").read_text() == sums
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["network"]["name"] == "net" and manifest["seed"] == 5 and manifest["samples"] == 10
    for chunk in range(3):
        record = json.loads((out / f"chunks/0000000{chunk}.json").read_text())
        first, end = 4 * chunk, min(4 * chunk + 4, 10)
        labels = {"y": LABELS[first:end].tolist(), "odd": (LABELS[first:end] % 2).tolist()}
        assert record == {
            "sha256": digests[chunk],
            "bytes": (out / f"chunks/0000000{chunk}.npy").stat().st_size,
            "samples": [first, end],
            "labels": labels,
            "environment": manifest["environment"],
            "run": manifest["run"],
            "check": record["check"],
        }


# Shares


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shares_make_the_same_files_in_any_order(world_size, out, finished):
    job = make_job()
    calls = []
    for rank in reversed(range(world_size)):
        network = Mixing()
        run(job, network, out, chunks=range(rank, job.chunks, world_size))
        calls.append((network.calls - PROBES) // STEPS)
    assert sum(calls) == job.chunks
    assert files(out) == files(finished)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_a_worker_does_what_others_have_not(world_size, out, finished):
    for rank in range(world_size):
        network = Mixing()
        run(make_job(), network, out, rank=rank, world_size=world_size)
        assert network.calls == PROBES + (3 * STEPS if rank == 0 else 0)
        assert files(out) == files(finished)


def test_a_worker_begins_with_its_own_share(out):
    order = []

    def network(x, t, y):
        order.append(int(y[0]) // 4)
        return Mixing()(x, t)

    run(make_job(20, conditions={"y": itself}), network, out, rank=1, world_size=3)
    assert order[PROBES::STEPS][:2] == [1, 4]
    assert sorted(order[PROBES::STEPS]) == [0, 1, 2, 3, 4]


def test_the_size_of_files_does_not_change_samples(out, finished):
    for chunk in (8, 12):
        run(make_job(chunk=chunk), Mixing(), out / str(chunk))
        assert_same(samples_in(out / str(chunk)), samples_in(finished))


def test_chunks_by_number(out, finished):
    network = Mixing()
    run(make_job(), network, out, chunks=[2, 0, 2])
    assert network.calls == PROBES + 2 * STEPS
    assert set(files(out)) - names_of([0, 2]) <= {"manifest.json"} | {n for n in files(out) if n.startswith(".")}
    assert status(out) == folder.Status(samples=10, samples_done=6, chunks=3, chunks_done=2)
    assert not status(out).complete
    assert str(status(out)) == "6 of 10 samples (60 %), 2 of 3 chunks"
    run(make_job(), network, out, chunks=[])
    run(make_job(), network, out, chunks=iter([1]))
    assert files(out) == files(finished) and status(out).complete


# Going on


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_goes_on(done, step, out, finished):
    with pytest.raises(ConnectionError):
        run(make_job(), Mixing(fails_at=PROBES + done * STEPS + step), out)
    left = {name for name in files(out) if not name.startswith(".")}
    assert left == {"manifest.json"} | names_of(range(done))
    before = {path: time for path, time in times(out).items() if path.suffix == ".npy"}
    network = Mixing()
    run(make_job(), network, out, rank=1, world_size=2)
    assert network.calls == PROBES + (3 - done) * STEPS
    assert files(out) == files(finished)
    assert before.items() <= times(out).items()


def test_a_finished_run_is_checked_and_left_alone(out, finished):
    shutil.copytree(finished, out)
    before, held = times(out), files(out)
    network = Mixing()
    run(make_job(), network, out)
    assert network.calls == PROBES and files(out) == held
    records = set(out.glob("chunks/*.json"))  # which tell by their time that they were checked
    assert {path for path, time in times(out).items() if path.is_file() and time != before[path]} == records


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def edit_record(path, **changes):
    edit(path.with_suffix(".json"), lambda data: json.dumps(json.loads(data) | changes).encode())


def forge_record(path, **changes):
    """A record that is whole, and says something else."""
    edit_record(path, **changes)
    record = json.loads(path.with_suffix(".json").read_bytes())
    edit_record(path, check=folder._check_of(record))


DAMAGE = {
    "a bit": lambda path: edit(path, lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]),
    "a bit of the header": lambda path: edit(path, lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "cut off": lambda path: edit(path, lambda data: data[:-1]),
    "longer": lambda path: edit(path, lambda data: data + b"\0"),
    "empty": lambda path: edit(path, lambda data: b""),
    "gone": lambda path: path.unlink(),
    "record gone": lambda path: path.with_suffix(".json").unlink(),
    "record cut off": lambda path: edit(path.with_suffix(".json"), lambda data: data[:20]),
    "record empty": lambda path: edit(path.with_suffix(".json"), lambda data: b""),
    "record a list": lambda path: edit(path.with_suffix(".json"), lambda data: b"[1, 2]"),
    "record null": lambda path: edit(path.with_suffix(".json"), lambda data: b"null"),
    "record no text": lambda path: edit(path.with_suffix(".json"), lambda data: b"\xff\xfe{"),
    "record without hash": lambda path: edit(path.with_suffix(".json"), lambda data: b'{"bytes": 224}'),
    "hash a number": lambda path: edit_record(path, sha256=7),
    "hash a list": lambda path: edit_record(path, sha256=["0"] * 64),
    "hash of something else": lambda path: edit_record(path, sha256="0" * 64),
    "bytes a text": lambda path: edit_record(path, bytes="224"),
    "labels a list": lambda path: edit_record(path, labels=[]),
    "other labels": lambda path: edit_record(path, labels={"y": [1, 2]}),
    "record of another chunk": lambda path: forge_record(path, samples=[0, 4]),
    "record of another run": lambda path: forge_record(path, run="0" * 64),
    "hash of something else, in a whole record": lambda path: forge_record(path, sha256="0" * 64),
    "record nested beyond measure": lambda path: edit(path.with_suffix(".json"), lambda data: b"[" * 200_000),
}


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=[name.replace(" ", "-") for name in DAMAGE])
def test_damage_is_found_and_made_again(damage, chunk, out, finished):
    shutil.copytree(finished, out)
    damage(out / f"chunks/{chunk:08}.npy")
    assert files(out) != files(finished)
    network = Mixing()
    run(make_job(), network, out)
    assert network.calls == PROBES + STEPS
    assert files(out) == files(finished)


@pytest.mark.parametrize("sums", [b"", b"nothing\n", b"\xff\xfe"])
def test_sums_that_are_damaged_are_written_again(sums, out, finished):
    shutil.copytree(finished, out)
    (out / "SHA256SUMS").write_bytes(sums)
    run(make_job(), Mixing(), out)
    assert files(out) == files(finished)


def test_what_does_not_belong_there_is_left_alone(out, finished):
    (out / "chunks").mkdir(parents=True)
    others = {"notes.txt": b"a", "chunks/notes.json": b"b", "chunks/x.tmp": b"c", "chunks/1.npy": b"d"}
    for name, data in others.items():
        (out / name).write_bytes(data)
    sample(make_job(), Mixing(), out)
    assert files(out) == files(finished) | others


def test_a_folder_of_chunks_that_is_gone_is_made_again(out, finished):
    shutil.copytree(finished, out)
    shutil.rmtree(out / "chunks")
    assert status(out).chunks_done == 0
    run(make_job(), Mixing(), out)
    assert files(out) == files(finished)


def test_chunks_of_another_run_are_not_taken_for_this_ones(out):
    run(make_job(seed=6), Mixing(), out)
    (out / "manifest.json").unlink()
    network = Mixing()
    run(make_job(), network, out)
    assert network.calls == PROBES + 3 * STEPS
    assert_same(samples_in(out), by_hand(make_job()))


def test_a_run_without_its_manifest_keeps_what_is_its_own(out, finished):
    shutil.copytree(finished, out)
    (out / "manifest.json").unlink()
    network = Mixing()
    run(make_job(), network, out)
    assert network.calls == PROBES and files(out) == files(finished)


def test_damage_is_found_where_the_worker_whose_chunk_it_is_never_comes(out, finished):
    shutil.copytree(finished, out)
    DAMAGE["a bit"](out / "chunks/00000001.npy")
    run(make_job(), Mixing(), out, rank=0, world_size=2)
    assert files(out) == files(finished)


def test_a_chunk_that_another_worker_mended_meanwhile_is_kept(out, finished, monkeypatch):
    shutil.copytree(finished, out)
    DAMAGE["a bit"](out / "chunks/00000001.npy")
    there, real = folder.Folder(out), folder.Folder.intact

    def slow(self, chunk):
        found = real(self, chunk)
        monkeypatch.setattr(folder.Folder, "intact", real)
        run(make_job(), Mixing(), out)
        return found

    monkeypatch.setattr(folder.Folder, "intact", slow)
    assert there.check(1)
    assert files(out) == files(finished)


def test_a_record_from_the_future_was_not_checked(out, finished):
    shutil.copytree(finished, out)
    DAMAGE["a bit"](out / "chunks/00000001.npy")
    os.utime(out / "chunks/00000001.json", (time.time() + 3600,) * 2)
    run(make_job(), Mixing(), out, rank=0, world_size=2)
    assert files(out) == files(finished)


def test_what_cannot_be_read_is_not_taken_for_damaged(out, finished, monkeypatch):
    shutil.copytree(finished, out)
    before, real = files(out), open

    def refused(path, *rest, **options):
        if str(path).endswith("1.npy"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *rest, **options)

    monkeypatch.setattr(folder, "open", refused, raising=False)
    with pytest.raises(OSError, match="Input/output error: .*00000001.npy could not be read; what was finished stays"):
        run(make_job(), Mixing(), out)
    assert {name: data for name, data in files(out).items() if not name.startswith(".")} == before


# Other workers


def claim(out, chunk, *, process=None, host=None, kind="npy", data=b""):
    """The file of a chunk that a process is making, or was."""
    path = folder._beside(out / f"chunks/{chunk:08}.{kind}")
    name = path.name
    if process is not None:
        name = name.replace(f".{os.getpid()}.", f".{process}.")
    if host is not None:
        name = name.replace(f".{folder._HOST}.", f".{host}.")
    path = path.with_name(name)
    path.write_bytes(data)
    return path


def begin(out, finished, chunks=(0, 2)):
    """A run that has made some chunks."""
    shutil.copytree(finished, out)
    for name in (names_of(range(3)) - names_of(chunks)) | {"SHA256SUMS"}:
        (out / name).unlink()


def dead():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def unburied():
    """A process that has ended, but is kept as one until its parent asks for its status."""
    process = subprocess.Popen(["true"])
    state = Path(f"/proc/{process.pid}/stat")
    if not state.exists():
        pytest.skip("no /proc here")
    while state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    yield process.pid
    process.wait()


def old(path):
    then = time.time() - folder.LEASE - 5
    os.utime(path, (then, then))
    return path


def assert_taken_over(out, finished):
    network = Mixing()
    begun = time.monotonic()
    run(make_job(), network, out)
    assert time.monotonic() - begun < 10
    assert network.calls == PROBES + STEPS
    assert files(out) == files(finished)


@pytest.mark.parametrize("kind", ["npy", "json"])
def test_what_a_dead_process_left_is_removed(kind, out, finished):
    begin(out, finished)
    claim(out, 1, process=dead(), kind=kind, data=b"half of it")
    claim(out, 0, process=dead(), kind=kind, data=b"of a chunk that is done")
    assert_taken_over(out, finished)


def test_a_process_that_waits_for_its_burial_is_dead(unburied, out, finished):
    begin(out, finished)
    claim(out, 1, process=unburied)
    assert_taken_over(out, finished)


@pytest.mark.parametrize("host", ["elsewhere-0a1b2c3d", None])
def test_a_claim_without_a_sign_of_life_is_taken_over(host, out, finished):
    begin(out, finished)
    old(claim(out, 1, host=host, process=None if host is None else dead()))
    assert_taken_over(out, finished)


@pytest.mark.parametrize("kind", ["npy", "json"])
def test_what_another_machine_left_is_gone_at_the_end(kind, out, finished):
    begin(out, finished)
    claim(out, 0, host="elsewhere-0a1b2c3d", kind=kind, data=b"of a chunk that is done")
    (out / ".elsewhere-0a1b2c3d.told").touch()
    assert_taken_over(out, finished)


def test_a_claim_from_the_future_is_taken_over(out, finished):
    begin(out, finished)
    path = claim(out, 1, host="elsewhere-0a1b2c3d")
    os.utime(path, (time.time() + 1e5,) * 2)
    assert_taken_over(out, finished)


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS"])
def test_what_a_dead_process_left_beside_the_manifest_is_removed(name, out, finished):
    begin(out, finished)
    path = folder._beside(out / name)
    path.with_name(path.name.replace(f".{os.getpid()}.", f".{dead()}.")).write_bytes(b"half of it")
    assert_taken_over(out, finished)


def test_slow_micro_batches_are_waited_for_longer(out, monkeypatch):
    """From the first on, of which only the first step is known."""
    job, asked = make_job(), []
    real = folder.Folder.claims
    monkeypatch.setattr(folder.Folder, "claims", lambda self, *lease: asked.append(lease) or real(self, *lease))
    monkeypatch.setattr(worker, "LEASE", 0.0)
    run(job, Mixing(seconds=0.02), out)
    leases = [lease[0] for lease in asked if lease]
    assert min(leases) >= worker._PATIENCE * 0.02 * STEPS


def test_the_first_call_of_a_network_does_not_tell_how_long_others_take(out, monkeypatch):
    asked = []
    real = folder.Folder.claims
    monkeypatch.setattr(folder.Folder, "claims", lambda self, *lease: asked.append(lease) or real(self, *lease))
    monkeypatch.setattr(worker, "LEASE", 0.0)

    def slow_at_first(network, *_):
        if network.calls == 1:
            time.sleep(0.3)

    run(make_job(), Mixing(spoils=slow_at_first), out)
    assert max(lease[0] for lease in asked if lease) < worker._PATIENCE * 0.3


def test_a_process_of_another_user_lives(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert folder._is_running(1)


@pytest.mark.parametrize("host", ["elsewhere-0a1b2c3d", None], ids=["another machine", "this one"])
@pytest.mark.parametrize("finishes", [True, False], ids=["finishes", "gives up"])
@pytest.mark.parametrize("chunks", [None, [1]], ids=["all", "by number"])
def test_a_living_claim_is_waited_for(host, finishes, chunks, out, finished, monkeypatch):
    monkeypatch.setattr(worker, "_POLL", 0.02)
    begin(out, finished)
    path = claim(out, 1, host=host, process=host and dead())  # of another machine a number says nothing
    network = Mixing()

    def end():
        while network.calls < PROBES:
            time.sleep(0.01)
        time.sleep(0.1)
        for name in sorted(names_of([1]), reverse=True) if finishes else ():
            shutil.copy(finished / name, out / name)
        path.unlink()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    run(make_job(), network, out, chunks=chunks)
    thread.join(20)
    assert network.calls == PROBES + (0 if finishes else STEPS)
    assert files(out) == files(finished)


def test_a_slow_worker_keeps_its_file(out, finished):
    """Others may make its chunk too when they see no sign of life, but what it has made is not lost."""
    begin(out, finished)
    network = Mixing()
    stale = []

    def look(*_):
        if network.calls == PROBES + 2:
            (path,) = out.glob("chunks/*.tmp")
            old(path)
            assert folder.Folder(out).claims() == set()
            stale.append(path.exists())

    network.spoils = look
    run(make_job(), network, out)
    assert stale == [True] and network.calls == PROBES + STEPS
    assert files(out) == files(finished)


@pytest.mark.parametrize("chunks", [None, [1]], ids=["all", "by number"])
def test_a_worker_whose_file_was_taken_away_does_no_harm(chunks, out, finished):
    begin(out, finished)
    network = Mixing()

    def take_away(*_):
        if network.calls == PROBES + 2:
            for path in out.glob("chunks/*.tmp"):
                path.unlink()

    network.spoils = take_away
    run(make_job(), network, out, chunks=chunks)
    assert network.calls == PROBES + 2 * STEPS
    assert files(out) == files(finished)


def both(*functions):
    """Calls functions at the same time; what they raised."""
    errors = [None] * len(functions)
    cudnn = torch.backends.cudnn.deterministic

    def call(place, function):
        try:
            function()
        except BaseException as error:
            errors[place] = error

    threads = [threading.Thread(target=call, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    torch.backends.cudnn.deterministic = cudnn  # of the process, which threads are not the way to use
    return errors


def together(function, times=1):
    """A function of which two threads wait for each other before they go into it, so many times."""
    barrier = threading.Barrier(2, timeout=20)
    counts = threading.local()

    def wait(*arguments, **options):
        counts.now = getattr(counts, "now", 0) + 1
        if counts.now <= times:
            barrier.wait()
        return function(*arguments, **options)

    return wait


def test_two_workers_on_one_chunk(out, finished, monkeypatch):
    begin(out, finished)
    monkeypatch.setattr(folder.Folder, "writing", together(folder.Folder.writing))
    networks = Mixing(), Mixing()
    errors = both(*(functools.partial(run, make_job(), network, out) for network in networks))
    assert errors == [None, None]
    assert [network.calls for network in networks] == [PROBES + STEPS] * 2
    assert files(out) == files(finished)


@pytest.mark.parametrize("world_size", [1, 2])
def test_two_workers_at_once(world_size, out):
    job = make_job(37, chunk=4)
    run(job, Mixing(), out / "one")
    network = functools.partial(Mixing, seconds=0.001)
    ranks = [rank % world_size for rank in range(2)]
    errors = both(
        *(functools.partial(run, job, network(), out / "two", rank=rank, world_size=world_size) for rank in ranks)
    )
    assert errors == [None, None]
    assert files(out / "two") == files(out / "one")


@pytest.mark.parametrize("links", [True, False])
def test_two_first_workers(links, out, finished, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    monkeypatch.setattr(folder, "_write", together(folder._write))
    errors = both(*(functools.partial(run, make_job(), Mixing(), out, rank=rank, world_size=2) for rank in range(2)))
    assert errors == [None, None]
    assert files(out) == files(finished)


def test_two_first_workers_with_different_jobs(out, monkeypatch):
    monkeypatch.setattr(folder, "_write", together(folder._write))
    errors = both(*(functools.partial(run, make_job(seed=seed), Mixing(), out) for seed in (5, 6)))
    (error,) = (error for error in errors if error is not None)
    assert isinstance(error, ValueError) and str(error).startswith("seed: expected ")
    seed = json.loads((out / "manifest.json").read_text())["seed"]
    assert_same(samples_in(out), by_hand(make_job(seed=seed)))


# The manifest

CHANGES = [
    ("seed", {"seed": 6}, "5", "6"),
    ("shape", {"shape": (3, 2)}, "[2, 3]", "[3, 2]"),
    ("samples", {"samples": 9, "conditions": {"y": by_class}}, "10", "9"),
    ("batch", {"batch": 2}, "4", "2"),
    ("chunk", {"chunk": 8}, "4", "8"),
    ("dtype", {"dtype": torch.float64}, "'float32'", "'float64'"),
    ("store", {"store": "uint8"}, "'state'", "'uint8'"),
    ("threads", {"threads": 2}, "1", "2"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, 5)}, "4 steps", "5 steps"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, [90, 60, 30, 1])}, "4 steps", "4 steps"),
    ("sampler", {"sampler": DDIMSampler(SCHEDULE, 4)}, "ddpm", "ddim"),
    ("sampler", {"sampler": DDPMSampler(NoiseSchedule.cosine(100), 4)}, "table", "table"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, 4, prediction="x0")}, "table", "table"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, 4, variance="fixed_large")}, "table", "table"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, 4, clip=None)}, "table", "table"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, 4, clip=0.9)}, "table", "table"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, 4, noise=False)}, "table", "table"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, 4, time="fraction")}, "table", "table"),
    ("sampler", {"sampler": DDPMSampler(SCHEDULE, 4, rounding="host")}, "table", "table"),
    ("conditions", {"conditions": None}, "'y': 'int64 [10] sha256 ", "{}"),
    ("conditions", {"conditions": {"y": LABELS[::-1].copy()}}, "sha256", "sha256"),
    ("conditions", {"conditions": {"y": LABELS.astype(np.int32)}}, "int64", "int32"),
    ("conditions", {"conditions": {"y": by_class}}, "int64 [10] sha256", "function torch.int64"),
    ("conditions", {"conditions": {"y": LABELS, "scale": np.ones(10)}}, "'y'", "'scale'"),
    ("guidance_scale", {"guidance_scale": 2.0}, "2.5", "2.0"),
    ("guidance_scale", {"guidance_scale": None, "uncond": None}, "2.5", "None"),
    ("uncond", {"uncond": {"y": by_class}}, "sha256", "sha256"),
    ("uncond", {"uncond": {}}, "function", "{}"),
]


@pytest.mark.parametrize("name, changes, before, now", CHANGES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CHANGES)])
def test_another_job_is_refused(name, changes, before, now, out):
    run(make_job(**GUIDED), Mixing(), out, chunks=[1])
    there = times(out)
    network = Mixing()
    with pytest.raises(ValueError) as error:
        run(make_job(**GUIDED | changes), network, out)
    expected, _, got = str(error.value).partition(", got ")
    assert expected.startswith(f"{name}: expected ") and str(out / "manifest.json") in expected
    assert before in expected and now in got
    assert network.calls == 0 and times(out) == there


def test_jobs_that_give_the_same_samples_are_one(out):
    run(make_job(conditions={"y": LABELS}, shape=[2, 3]), Mixing(), out, chunks=[1])
    same = make_job(
        np.int64(10),
        conditions={"y": torch.from_numpy(LABELS.copy())},
        sampler=DDPMSampler(SCHEDULE, [99, 74, 49, 24]),
        name="another name",
    )
    assert same.sampler.timesteps == DDPM.timesteps
    run(same, Mixing(), out)
    assert_same(samples_in(out), by_hand(same))


def with_change(**changes):
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def without(key):
    def change(data):
        manifest = json.loads(data)
        del manifest[key]
        return json.dumps(manifest).encode()

    return change


MANIFESTS = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[:-20],
    "no text": lambda data: b"\xff\xfe" + data,
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "an empty object": lambda data: b"{}",
    "no format": without("format"),
    "no network": without("network"),
    "no environment": without("environment"),
    "a network that is a text": with_change(network="net"),
    "a network without probe": with_change(network={"name": "net"}),
    "a result that is null": with_change(result=None),
    "a result without shape": with_change(result={"dtype": "float32"}),
    "samples in words": with_change(samples="ten"),
    "no samples": with_change(samples=0),
    "chunks of none": with_change(chunk=0),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=[name.replace(" ", "-") for name in MANIFESTS])
def test_a_damaged_manifest_is_named(change, out, finished):
    shutil.copytree(finished, out)
    edit(out / "manifest.json", change)
    there = times(out)
    for call in (
        lambda: run(make_job(), Mixing(), out),
        lambda: verify(make_job(), Mixing(), out, [0]),
        lambda: status(out),
    ):
        with pytest.raises(ValueError, match=f"^out: {re.escape(str(out / 'manifest.json'))} is damaged"):
            call()
    assert times(out) == there


def test_a_manifest_of_another_format(out, finished):
    shutil.copytree(finished, out)
    edit(out / "manifest.json", with_change(format=2))
    for call in (lambda: run(make_job(), Mixing(), out), lambda: status(out)):
        with pytest.raises(ValueError, match="^out: expected a folder of format 1, got 2 in .*another version"):
            call()


def test_a_file_in_place_of_the_folder(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    for out in (file, file / "below"):
        with pytest.raises(ValueError, match=f"^out: expected a folder, got {re.escape(str(out))}"):
            run(make_job(), Mixing(), out)
    assert files(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_that_cannot_be_written_to(made, out, monkeypatch):
    """As root all folders can be, so the system's answer is made up."""
    if made:
        out.mkdir()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PermissionError, match=f"Permission denied: the manifest could not be written to {out}"):
        run(make_job(), Mixing(), out)
    assert not made or files(out) == {}


@pytest.mark.parametrize("out", [None, 3, b"out"])
def test_out_is_a_path(out):
    with pytest.raises(TypeError, match=f"^out: expected a path, got {type(out).__name__}$"):
        run(make_job(), Mixing(), out)


# The network


def test_other_weights_are_found(out, finished):
    begin(out, finished)
    there = times(out)
    for weight in (0.31, 0.3 * (1 + 2**-22)):
        with pytest.raises(ValueError, match="^network: expected the outputs that it gave when .* other weights"):
            run(make_job(), Mixing(weight), out)
    assert times(out) == there
    run(make_job(), Mixing(0.31), out, inexact=True)
    assert status(out).complete
    assert_same(samples_in(out)[4:8], by_hand(make_job(), Mixing(0.31))[4:8])
    assert_same(samples_in(out)[:4], by_hand(make_job())[:4])


def test_another_environment_is_told(out, finished):
    shutil.copytree(finished, out)
    edit(out / "manifest.json", with_change(environment={"fastdiff": "0.0.0", "torch": "1.0", "device": "cpu, AVX9"}))
    run(make_job(), Mixing(), out)  # where the network gives the same bits, all is well
    with pytest.raises(ValueError, match="or: .*torch 1.0 then, .* now; device cpu, AVX9 then, "):
        run(make_job(), Mixing(0.31), out)


def test_another_decode_is_found(out):
    run(make_job(), Mixing(), out, decode=to_images, chunks=[0])
    there = times(out)
    with pytest.raises(ValueError, match="^decode: expected samples of .*4, 3, 1.*, as in .*, got .*2, 3"):
        run(make_job(), Mixing(), out)
    with pytest.raises(ValueError, match="^network: expected the outputs that it gave"):
        run(make_job(), Mixing(), out, decode=lambda x: to_images(x) + 1e-3)
    assert times(out) == there


def dropout(network, x, t, m):
    m.copy_(torch.nn.functional.dropout(m, 0.5))


def noise(network, x, t, m):
    m.add_(1e-6 * torch.rand_like(m))


@pytest.mark.parametrize("spoils", [dropout, noise])
def test_a_network_that_is_not_deterministic(spoils, out):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="^network: expected the same outputs for the same input, .* inexact=True"):
        run(make_job(), Mixing(spoils=spoils), out)
    assert not out.exists()
    run(make_job(), Mixing(spoils=spoils), out, inexact=True)
    assert status(out).complete


def test_a_decode_that_is_not_deterministic(out):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="^network: expected the same outputs for the same input"):
        run(make_job(), Mixing(), out, decode=lambda x: x + torch.rand_like(x))
    assert not out.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_at_the_first_step(value, out):
    def spoil(network, x, t, m):
        m[1, 0, 0] = value

    with pytest.raises(FloatingPointError, match=r"NaN or Inf at the first step \(timestep 99\)"):
        run(make_job(), Mixing(spoils=spoil), out)
    assert not out.exists()


@pytest.mark.parametrize("by_decode", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_one_sample(value, by_decode, out):
    job = make_job(sampler=DDPMSampler(SCHEDULE, 4, clip=None), conditions={"y": itself})
    last = []

    def network(x, t, y):
        last[:] = y.tolist()
        m = Mixing()(x, t)
        if not by_decode and t[0] == DDPM.timesteps[-1]:
            m[y == 6] = value
        return m

    def decode(x):
        x = x.clone()
        x[[i == 6 for i in last], 0, 1] = value
        return x

    with pytest.raises(FloatingPointError) as error:
        run(job, network, out, decode=decode if by_decode else None)
    seed = (mix64(5) + 6) % 2**64
    assert str(error.value) == (
        f"network: expected finite samples, got NaN or Inf in 1 of samples 4 to 7, the first of them 6 (seed {seed}); "
        "what was finished stays"
    )
    assert {name for name in files(out) if not name.startswith(".")} == {"manifest.json"} | names_of([0])
    assert_same(samples_in(out), by_hand(job, lambda x, t, y: Mixing()(x, t))[:4])


def test_training_mode_is_refused(out):
    module = torch.nn.Dropout(0.5)
    with pytest.raises(ValueError, match="^network: expected it in evaluation mode, got training mode"):
        run(make_job(), module, out)
    with pytest.raises(ValueError, match="^decode: expected it in evaluation mode, got training mode"):
        run(make_job(), Mixing(), out, decode=module)
    assert not out.exists()


@pytest.mark.parametrize(
    "network, decode, kind, message",
    [
        (lambda x, t: x[:, :1], None, ValueError, "model_output: expected "),
        (lambda x, t: "x", None, TypeError, "model: expected a tensor, .* got str"),
        (lambda x, t, y: x, None, TypeError, "missing 1 required positional argument: 'y'"),
        (Mixing(), lambda x: x[:2], ValueError, r"decode: expected it to return shape \[4, \.\.\.\], got \[2, 2, 3\]"),
        (Mixing(), lambda x: x.sum(), ValueError, r"decode: expected it to return shape \[4, \.\.\.\], got \[\]"),
        (Mixing(), lambda x: x[:, :0], ValueError, r"decode: expected samples with elements, got shape \[4, 0, 3\]"),
        (Mixing(), lambda x: x.tolist(), TypeError, "decode: expected it to return a tensor, got list"),
        (Mixing(), lambda x: x.long(), TypeError, "decode: .* a floating tensor or uint8, got torch.int64"),
        (Mixing(fails_at=1), None, ConnectionError, "the network went away"),
        (None, None, TypeError, "network: expected a function, got NoneType"),
        (Mixing(), "decode", TypeError, "decode: expected a function, got str"),
    ],
)
def test_a_network_or_decode_that_is_none_leaves_nothing(network, decode, kind, message, out):
    with pytest.raises(kind, match=message):
        run(make_job(), network, out, decode=decode)
    assert not out.exists()


def test_no_gradients_are_recorded(out):
    """The network's parameters want gradients, as they do by default."""
    weight = torch.tensor(0.3, requires_grad=True)
    recorded = []

    def network(x, t):
        m = Mixing(weight)(x, t)
        recorded.append(m.requires_grad)
        return m

    def decode(x):
        recorded.append((x * weight).requires_grad)
        return x * weight

    run(make_job(), network, out, decode=decode)
    assert len(recorded) > 10 and not any(recorded)


@pytest.mark.parametrize("fails", [False, True])
def test_settings_of_the_process_are_as_before(fails, out, monkeypatch):
    seen = []

    def spoil(network, x, t, m):
        cudnn = torch.backends.cudnn
        seen.append((torch.get_num_threads(), cudnn.benchmark, cudnn.deterministic))

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        if fails:
            with pytest.raises(ConnectionError):
                run(make_job(threads=2), Mixing(spoils=spoil, fails_at=5), out)
        else:
            run(make_job(threads=2), Mixing(spoils=spoil), out)
            verify(make_job(threads=2), Mixing(spoils=spoil), out, [0])
        assert torch.get_num_threads() == 3
        assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {(2, False, True)}


# The disk


class Full(io.FileIO):
    """A file on a disk with room for so many bytes more."""

    room = 0

    def write(self, data):
        taken = min(len(data), max(Full.room, 0))
        Full.room -= taken
        if not taken and len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(bytes(data[:taken]))


def on_a_full_disk(monkeypatch, room):
    Full.room = room

    def opened(path, mode="r", buffering=-1, encoding=None):
        if not set(mode) & set("xwa"):
            return builtins.open(path, mode, buffering, encoding)
        file = Full(path, mode.replace("b", ""))
        return file if "b" in mode else io.TextIOWrapper(io.BufferedWriter(file), encoding=encoding)

    monkeypatch.setattr(folder, "open", opened, raising=False)


@pytest.mark.parametrize("where", ["samples", "header", "record", "manifest", "sums"])
def test_no_room_on_the_disk(where, out, finished, monkeypatch):
    sizes = {name: len(data) for name, data in files(finished).items()}
    manifest, data, record = (sizes[name] for name in ("manifest.json", "chunks/00000000.npy", "chunks/00000000.json"))
    room = {
        "manifest": manifest - 10,
        "header": manifest + data + record + 50,
        "samples": manifest + data + record + data - 10,
        "record": manifest + data + record + data + 10,
        "sums": sum(sizes.values()) - 10,
    }
    done = {"manifest": 0, "header": 1, "samples": 1, "record": 1, "sums": 3}
    with monkeypatch.context() as patch:
        on_a_full_disk(patch, room[where])
        with pytest.raises(OSError) as error:
            run(make_job(), Mixing(), out)
        problem = rf"no room on the disk: .* could not be written to {re.escape(str(out))}; what was finished stays"
        assert error.value.errno == errno.ENOSPC and re.search(problem, str(error.value))
    left = {name for name in files(out) if not name.startswith(".")}
    without_record = {"chunks/00000001.npy"} if where == "record" else set()
    assert left - without_record == ({"manifest.json"} if where != "manifest" else set()) | names_of(range(done[where]))
    network = Mixing()
    run(make_job(), network, out)
    assert network.calls == PROBES + (3 - done[where]) * STEPS
    assert files(out) == files(finished)


@pytest.mark.parametrize("name", ["fsync", "replace", "link"])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_disk_fails_in_between(name, at, number, out, finished, monkeypatch):
    calls = 0
    real = getattr(os, name)

    def fail(*arguments):
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        failed = False
        try:
            run(make_job(), Mixing(), out)
        except OSError as error:
            failed = True
            assert error.errno == number
            assert ("no room on the disk" in str(error)) == (number != errno.EIO)
    # without links the manifest is renamed, and a folder that cannot be synced is as good as the system gives it
    assert failed == (name == "replace" or (name == "fsync" and at != 2))
    left = set(files(out))
    assert not [name for name in left if name.endswith(".tmp")]
    assert {name.replace(".json", ".npy") for name in left if name.startswith("chunks/")} <= left
    run(make_job(), Mixing(), out)
    assert files(out) == files(finished)


def test_files_are_on_the_disk_before_they_take_their_place(out, monkeypatch):
    synced, placed = set(), []
    fsync, replace, link = os.fsync, os.replace, os.link

    def place(function, source, target):
        placed.append(Path(target).name)
        assert os.stat(source).st_ino in synced
        function(source, target)

    def sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", functools.partial(place, replace))
    monkeypatch.setattr(os, "link", functools.partial(place, link))
    run(make_job(), Mixing(), out)
    chunks = [f"{chunk:08}.{kind}" for chunk in range(3) for kind in ("npy", "json")]
    assert placed == ["manifest.json", *chunks, "SHA256SUMS"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT])
def test_what_the_network_has_with_the_disk_is_its_own(number, out, finished):
    network = Mixing()

    def fail(*_):
        if network.calls == PROBES + STEPS + 1:
            raise OSError(number, "of the network's")

    network.spoils = fail
    with pytest.raises(OSError, match="] of the network's$"):
        run(make_job(), network, out)
    assert {name for name in files(out) if not name.startswith(".")} == {"manifest.json"} | names_of([0])


def test_writes_in_pieces(out, finished, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(bytes(data[:7]))

    def opened(path, mode="r", buffering=-1, encoding=None):
        return Short(path, "x") if mode == "xb" else builtins.open(path, mode, buffering, encoding)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "open", opened, raising=False)
        run(make_job(), Mixing(), out)
    assert files(out) == files(finished)


def test_room_is_looked_for_before(out, finished, monkeypatch):
    begin(out, finished)
    each = 2 * 3 * 4

    def usage(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e9, 1e9 - free, free))

    usage(4 * each - 1)
    network = Mixing()
    problem = "no room on the disk: 0.0 MB are still to be written to .*, 0.0 MB are free"
    with pytest.raises(OSError, match=problem) as error:
        run(make_job(), network, out)
    assert error.value.errno == errno.ENOSPC and network.calls == PROBES
    usage(4 * each)
    run(make_job(), network, out)
    assert files(out) == files(finished)


# verify


@pytest.mark.parametrize("changes", [{}, GUIDED, {"store": "uint8"}, {"dtype": torch.bfloat16}, {"chunk": 8}])
def test_verify_finds_nothing(changes, out):
    job = make_job(**changes)
    run(job, Mixing(), out)
    there = times(out)
    indices = [9, 0, 3, 4, 9]
    network = Mixing()
    checked = verify(job, network, out, indices)
    assert checked == [bulk.Checked(index, True, 0.0) for index in indices]
    assert network.calls == 3 * STEPS * (2 if job.uncond else 1)  # a micro-batch each, however many of it are asked
    assert verify(job, network, out, torch.tensor([1])) == [bulk.Checked(1, True, 0.0)]
    assert verify(job, network, out, []) == []
    assert times(out) == there


def change_sample(out, chunk, place, change):
    """A sample that is not the one it should be, in a chunk whose record knows nothing of it."""
    path = out / f"chunks/{chunk:08}.npy"
    samples = np.load(path)
    change(samples[place])
    np.save(path, samples)
    forge_record(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_verify_finds_a_change(out, finished):
    shutil.copytree(finished, out)

    def double(sample):
        sample[1, 2] *= 2

    before = float(np.load(out / "chunks/00000001.npy")[2, 1, 2])
    change_sample(out, 1, 2, double)
    assert verify(make_job(), Mixing(), out, range(10)) == [
        bulk.Checked(index, index != 6, abs(before) if index == 6 else 0.0) for index in range(10)
    ]
    change_sample(out, 2, 1, lambda sample: sample.fill(np.nan))
    (checked,) = verify(make_job(), Mixing(), out, [9])
    assert not checked.equal and np.isnan(checked.difference)


def test_verify_finds_a_change_of_a_level(out):
    job = make_job(store="uint8")
    run(job, Mixing(), out)

    def change(sample):
        sample[0, 0] ^= 1

    change_sample(out, 0, 3, change)
    assert verify(job, Mixing(), out, [2, 3]) == [bulk.Checked(2, True, 0.0), bulk.Checked(3, False, 1.0)]


def test_verify_finds_a_zero_of_the_other_sign(out):
    job = make_job()

    def zero(x):
        return x * 0.0

    run(job, Mixing(), out, decode=lambda x: zero(x).abs())
    assert verify(job, Mixing(), out, [1], decode=lambda x: -zero(x).abs()) == [bulk.Checked(1, False, 0.0)]


def test_verify_finds_other_weights(out, finished):
    a, b = by_hand(make_job()), by_hand(make_job(), Mixing(0.31))
    (checked,) = verify(make_job(), Mixing(0.31), finished, [5])
    assert checked == bulk.Checked(5, False, float(np.abs(a[5].astype(np.float64) - b[5]).max()))


def test_verify_names_chunks_that_it_cannot_compare(out, finished):
    begin(out, finished)
    edit(out / "chunks/00000002.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    there = times(out)
    network = Mixing()
    with pytest.raises(ValueError, match=r"^indices: .*; chunk 1 \(samples 4 to 7\) is not done"):
        verify(make_job(), network, out, [0, 5])
    with pytest.raises(ValueError, match=r"^indices: .*; chunk 2 \(samples 8 to 9\) is damaged"):
        verify(make_job(), network, out, [0, 8])
    assert verify(make_job(), network, out, [0, 3])[1].equal
    assert times(out) == there


@pytest.mark.parametrize(
    "indices, kind, message",
    [
        ([10], ValueError, r"indices: expected an int in \[0, 9\], got 10"),
        ([-1], ValueError, r"indices: expected an int in \[0, 9\], got -1"),
        ([1.0], TypeError, "indices: expected an int, got float 1.0"),
        ([True], TypeError, "indices: expected an int, got True"),
        ("1", TypeError, "indices: expected an int, got str '1'"),
        (3, TypeError, "indices: expected ints, got int"),
    ],
)
def test_verify_checks_indices(indices, kind, message, finished):
    with pytest.raises(kind, match=f"^{message}$"):
        verify(make_job(), Mixing(), finished, indices)


def test_verify_refuses_what_sample_does(out, finished):
    with pytest.raises(TypeError, match="^job: expected a Job, got dict$"):
        verify({}, Mixing(), finished, [0])
    with pytest.raises(TypeError, match="^network: expected a function, got NoneType$"):
        verify(make_job(), None, finished, [0])
    with pytest.raises(TypeError, match="^out: expected a path, got NoneType$"):
        verify(make_job(), Mixing(), None, [0])
    with pytest.raises(ValueError, match="^seed: expected 5, as in .*, got 6; other samples need another folder$"):
        verify(make_job(seed=6), Mixing(), finished, [0])
    with pytest.raises(ValueError, match="^decode: expected samples of float32"):
        verify(make_job(), Mixing(), finished, [0], decode=to_images)
    for missing in (out, finished / "chunks"):
        with pytest.raises(ValueError, match="^out: expected the folder of a run, with a manifest.json, got "):
            verify(make_job(), Mixing(), missing, [0])
        with pytest.raises(ValueError, match="^out: expected the folder of a run, with a manifest.json, got "):
            status(missing)
    with pytest.raises(TypeError, match="^out: expected a path, got NoneType$"):
        status(None)
    assert not out.exists()


# Arguments


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"sampler": "ddpm"}, TypeError, "sampler: expected a sampler of fastdiff, got str"),
        ({"shape": 3}, TypeError, "shape: expected a sequence of ints, got 3"),
        ({"shape": "23"}, TypeError, "shape: expected a sequence of ints, got '23'"),
        ({"shape": (2, 0)}, ValueError, "shape: expected an int >= 1, got 0"),
        ({"shape": (2, 1.5)}, TypeError, "shape: expected an int, got float 1.5"),
        ({"samples": 0}, ValueError, "samples: expected an int >= 1, got 0"),
        ({"samples": "10"}, TypeError, "samples: expected an int, got str '10'"),
        ({"samples": True}, TypeError, "samples: expected an int, got True"),
        ({"batch": 0}, ValueError, "batch: expected an int >= 1, got 0"),
        ({"threads": 0}, ValueError, "threads: expected an int >= 1, got 0"),
        ({"chunk": 6}, ValueError, "chunk: expected a multiple of batch=4, got 6"),
        ({"chunk": 0}, ValueError, "chunk: expected an int >= 1, got 0"),
        ({"chunk": 4.0}, TypeError, "chunk: expected an int, got float 4.0"),
        ({"dtype": "float32"}, TypeError, "dtype: expected float32, float64, float16 or bfloat16, got float32"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected float32, .*, got torch.int64"),
        ({"store": "png"}, ValueError, r"store: expected one of \('state', 'uint8'\), got 'png'"),
        ({"store": ["state"]}, ValueError, r"store: expected one of \('state', 'uint8'\), got \['state'\]"),
        ({"name": None}, TypeError, "name: expected a str, got NoneType"),
        ({"seed": 2**64}, ValueError, r"seed: expected an int in \[-9.*, 1.*\], got 18446744073709551616"),
        ({"seed": -(2**63) - 1}, ValueError, r"seed: expected an int in \[-9.*, 1.*\], got -9223372036854775809"),
        ({"seed": None}, TypeError, "seed: expected an int, got NoneType None"),
        ({"seed": torch.arange(2)}, TypeError, r"seed: expected an int, got Tensor tensor\(\[0, 1\]\)"),
        ({"seed": 1.0}, TypeError, "seed: expected an int, got float 1.0"),
        ({"seed": True}, TypeError, "seed: expected an int, got True"),
        ({"conditions": [LABELS]}, TypeError, "conditions: expected a mapping of names .*, got list"),
        ({"conditions": {1: LABELS}}, TypeError, "conditions: expected names, got 1"),
        ({"conditions": {"y": 3}}, TypeError, r"conditions\['y'\]: expected an array, .*, got int"),
        (
            {"conditions": {"y": LABELS[:9]}},
            ValueError,
            r"conditions\['y'\]: expected shape \[10, \.\.\.\], .*, got \[9\]",
        ),
        ({"conditions": {"y": LABELS.sum()}}, TypeError, r"conditions\['y'\]: expected an array, .*, got int64"),
        ({"conditions": {"y": torch.tensor(3)}}, ValueError, r"conditions\['y'\]: expected shape \[10, .*, got \[\]"),
        (
            {"conditions": {"y": np.array(["a"] * 10)}},
            TypeError,
            r"conditions\['y'\]: .* dtype that torch has, got <U1",
        ),
        ({"conditions": {"y": np.ones(10, np.longdouble)}}, TypeError, r"conditions\['y'\]: .* that torch has, got .*"),
        ({"conditions": {"y": np.ones(10, ">f4")}}, TypeError, r"conditions\['y'\]: .* that torch has, got >f4"),
        ({"conditions": {"y": np.ones((10, 0))}}, ValueError, r"conditions\['y'\]: .*, an entry .*, got \[10, 0\]"),
        ({"guidance_scale": 2.0}, ValueError, "uncond: expected guidance_scale and uncond, both or neither, got None"),
        ({"uncond": {}}, ValueError, "guidance_scale: expected guidance_scale and uncond, both or neither, got None"),
        ({"guidance_scale": "2", "uncond": {}}, TypeError, "guidance_scale: expected a number, got '2'"),
        ({"guidance_scale": torch.inf, "uncond": {}}, ValueError, "guidance_scale: expected a finite number, got inf"),
        ({"guidance_scale": 2.0, "uncond": {"y": 3}}, TypeError, r"uncond\['y'\]: expected an array, .*, got int"),
    ],
)
def test_jobs_are_checked(changes, kind, message):
    with pytest.raises(kind, match=f"^{message}$"):
        make_job(**changes)


@pytest.mark.parametrize(
    "samples, batch, chunk, chunks",
    [(50_000, 64, 384, 131), (20_000, 64, 128, 157), (10**6, 64, 1024, 977), (100, 64, 64, 2), (1, 1, 1, 1)],
)
def test_default_chunk(samples, batch, chunk, chunks):
    job = Job(DDPM, (2, 3), samples, batch=batch)
    assert (job.chunk, job.chunks) == (chunk, chunks)
    spans = [job.span(number) for number in range(job.chunks)]
    assert spans[0][0] == 0 and spans[-1][1] == samples
    assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"rank": 2, "world_size": 2}, ValueError, r"rank: expected an int in \[0, 1\], got 2"),
        ({"rank": -1}, ValueError, r"rank: expected an int in \[0, 0\], got -1"),
        ({"rank": "0"}, TypeError, "rank: expected an int, got str '0'"),
        ({"world_size": 0}, ValueError, "world_size: expected an int >= 1, got 0"),
        ({"chunks": 1}, TypeError, "chunks: expected the numbers of chunks, got int"),
        ({"chunks": [3]}, ValueError, r"chunks: expected an int in \[0, 2\], got 3"),
        ({"chunks": [0.0]}, TypeError, "chunks: expected an int, got float 0.0"),
        ({"device": "moon"}, ValueError, "device: expected a torch.device or the name of one, got 'moon'"),
    ],
)
def test_sample_checks_its_arguments(options, kind, message, out):
    with pytest.raises(kind, match=f"^{message}$"):
        run(make_job(), Mixing(), out, **options)
    with pytest.raises(TypeError, match="^job: expected a Job, got str$"):
        run("job", Mixing(), out)
    assert not out.exists()


@pytest.mark.parametrize(
    "result, kind, message",
    [
        (lambda i: i.tolist(), TypeError, r"conditions\['y'\]: expected it to return a tensor, got list"),
        (lambda i: i[:1], ValueError, r"conditions\['y'\]: expected it to return shape \[4, \.\.\.\], got \[1\]"),
        (lambda i: i.sum(), ValueError, r"conditions\['y'\]: expected it to return shape \[4, \.\.\.\], got \[\]"),
    ],
)
def test_conditions_are_checked(result, kind, message, out):
    with pytest.raises(kind, match=f"^{message}$"):
        run(make_job(conditions={"y": result}), Mixing(), out)
    assert not out.exists()


@pytest.mark.parametrize("first", [0, 9])
@pytest.mark.parametrize("table", ["conditions", "uncond"])
def test_conditions_that_are_not_finite_are_named(table, first, out):
    scale = np.ones(10)
    scale[first:] = np.nan
    given = {"conditions": {"scale": np.ones(10)}, "uncond": {}, "guidance_scale": 2.0} | {table: {"scale": scale}}
    with pytest.raises(FloatingPointError, match=rf"^{table}\['scale'\]: expected finite values, got NaN or Inf"):
        run(make_job(**given), Mixing(), out)


def test_a_condition_may_write_to_its_indices(out):
    def spoil(indices):
        result = indices % 4
        indices.zero_()
        return result

    job = make_job(conditions={"y": spoil})
    run(job, Mixing(), out)
    assert_same(samples_in(out), by_hand(make_job(conditions={"y": by_class})))


def factor(number):
    def times_number(indices):
        return torch.where(indices < 8, 0, indices * number % 4)

    return times_number


class Factor:
    def __init__(self, number):
        self.number = number

    def __call__(self, indices):
        return factor(self.number)(indices)


def rows(number):
    def row(indices):
        return factor(number)(indices)[:, None].repeat(1, 2).float()

    return row


@pytest.mark.parametrize("make", [factor, Factor, lambda n: functools.partial(factor(n)), rows])
def test_functions_are_told_apart_by_what_they_give(make, out):
    """Also beyond the first micro-batch, and where they have one name."""
    run(make_job(conditions={"y": make(1)}), lambda x, t, y: 0.3 * x, out, chunks=[0])
    run(make_job(conditions={"y": make(1)}), lambda x, t, y: 0.3 * x, out, chunks=[1])
    with pytest.raises(ValueError, match="^conditions: expected "):
        run(make_job(conditions={"y": make(3)}), lambda x, t, y: 0.3 * x, out)


def test_functions_are_described_with_the_threads_of_the_job(out):
    def told(indices):
        return indices.float()[:, None] + torch.get_num_threads()

    def job():
        return make_job(conditions={"scale": told}, threads=2)

    threads = torch.get_num_threads()
    try:
        for before in (1, 3):
            torch.set_num_threads(before)
            run(job(), lambda x, t, scale: 0.3 * x, out)
        assert [one.equal for one in verify(job(), lambda x, t, scale: 0.3 * x, out, [0, 9])] == [True, True]
    finally:
        torch.set_num_threads(threads)


def test_inexact_goes_on_where_functions_give_other_bits(out):
    def job(nudge, dtype=torch.float32):
        return make_job(conditions={"scale": lambda indices: (indices[:, None] + nudge).to(dtype)})

    def network(x, t, scale):
        return 0.3 * x

    run(job(0.0), network, out, chunks=[0])
    with pytest.raises(ValueError, match="^conditions: expected "):
        run(job(1e-3), network, out)
    for given in (job(0.0, torch.float64), make_job(), make_job(conditions={"scale": np.ones(10)})):
        with pytest.raises(ValueError, match="^conditions: expected "):
            run(given, network, out, inexact=True)
    run(job(1e-3), network, out, inexact=True)
    assert status(out).complete


def test_functions_are_described_alike_in_every_process(monkeypatch):
    def described():
        return make_job(conditions={"a": by_class, "b": Factor(2), "c": functools.partial(itself)}).identity

    first = described()
    monkeypatch.setattr(by_class, "__module__", "__mp_main__")
    assert described() == first and " at 0x" not in str(first)


def test_two_workers_with_other_bits_leave_no_chunk_that_is_not_whole(out):
    """As inexact runs may have them: A.npy, B.npy, B.json, A.json."""
    job = make_job()
    run(job, Mixing(), out, chunks=[0])
    there = folder.Folder(out)
    with there.writing(1, 4) as first, there.writing(1, 4) as second:
        first.write(np.zeros((4, 2, 3), np.float32))
        second.write(np.ones((4, 2, 3), np.float32))
        real = folder._write

        def write(path, text, **options):
            folder._write = real
            second.commit({"labels": {}, "environment": {}})
            real(path, text, **options)

        folder._write = write
        try:
            first.commit({"labels": {}, "environment": {}})
        finally:
            folder._write = real
    assert there.record(1) is None or there.intact(1)
    run(job, Mixing(), out, inexact=True)
    assert status(out).complete and all(there.intact(chunk) for chunk in range(3))


def test_what_the_dead_left_is_no_room_that_is_needed(out, finished, monkeypatch):
    begin(out, finished, chunks=[0])
    claim(out, 1, process=dead(), data=b"x" * 1000)
    living = claim(out, 2, host="elsewhere-0a1b2c3d", data=b"x" * 40)
    there, each = folder.Folder(out), 24

    def free(path):
        assert not list(out.glob(f"chunks/*.{folder._HOST}.*"))
        return shutil._ntuple_diskusage(1e9, 1e9, 6 * each - 40 - short)

    monkeypatch.setattr(shutil, "disk_usage", free)
    short = 0
    there.check_room(each)
    short = 1
    with pytest.raises(OSError, match="^.*no room on the disk"):
        there.check_room(each)
    assert living.exists()


@pytest.mark.parametrize("name", ["manifest.json", "chunks", "SHA256SUMS"])
def test_what_is_in_the_way_is_named(name, out, finished):
    shutil.copytree(finished, out)
    path = out / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"a file")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises((ValueError, OSError), match=f"{re.escape(str(path))}|SHA256SUMS could not be written"):
        run(make_job(), Mixing(), out)


# The line


@pytest.fixture
def often(monkeypatch):
    """Progress told every 0.05 s."""

    class Line(worker.ProgressLine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.every = 0.05

    monkeypatch.setattr(worker, "ProgressLine", Line)


class Terminal(io.StringIO):
    def isatty(self):
        return True


LAST = "fastdiff.bulk: 10 of 10 samples (100 %)"
TIME = r"((\d+ h )?\d+ min|(\d+ min )?\d+ s)"
LINE = rf"fastdiff\.bulk: [\d,]+ of [\d,]+ samples \(\d+ %\)(, [\d.,e+]+ samples/s, about {TIME} left)?"


def test_a_quick_run_tells_its_end(out, capsys):
    sample(make_job(), Mixing(), out)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == f"{LAST}\n"


def test_progress_is_told(out, often, capsys):
    job = make_job(120)
    begin = time.monotonic()
    sample(job, Mixing(seconds=0.005), out)  # 30 files of one micro-batch, 0.02 s each
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(LINE, line) for line in lines)
    assert 4 <= len(lines) <= (time.monotonic() - begin) / 0.05 + 1
    done = [int(line.split()[1]) for line in lines]
    assert done == sorted(done) and done[0] < 60 and done[-1] == 120
    assert "left" in lines[1] and "left" not in lines[-1]


def test_one_of_the_workers_of_a_machine_tells(out, finished, capsys):
    begin(out, finished)
    there = folder.Folder(out)
    lines = [worker.ProgressLine(there, 10, True) for _ in range(2)]
    for times_told in (1, 2):
        old(there.told)
        for line in lines:
            line.last -= 60
            line.tell()
        told = capsys.readouterr().err.splitlines()
        assert told == ["fastdiff.bulk: 6 of 10 samples (60 %)"], times_told
    for line in lines:
        line.end()
    assert capsys.readouterr().err == f"{LAST}\n"


def test_chunks_of_a_longer_run_are_not_counted(out):
    run(make_job(40), Mixing(), out)
    (out / "manifest.json").unlink()
    run(make_job(), Mixing(), out, chunks=[0])
    assert folder.Folder(out).written() <= 10


def test_one_tells_where_the_clocks_differ(out, finished, capsys, monkeypatch):
    begin(out, finished)
    real = folder.Folder.tell

    def ahead(self):
        real(self)
        os.utime(self.told, (time.time() + 3600,) * 2)

    monkeypatch.setattr(folder.Folder, "tell", ahead)
    monkeypatch.setattr(folder.Folder, "now", lambda self: time.time() + 3600)
    there = folder.Folder(out)
    lines = [worker.ProgressLine(there, 10, True) for _ in range(2)]
    os.utime(there.told, (time.time() + 1800,) * 2)
    for line in lines:
        line.last -= 60
        line.tell()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_progress_of_a_run_that_goes_on(out, finished, capsys):
    begin(out, finished)
    sample(make_job(), Mixing(), out, chunks=[0])
    assert capsys.readouterr().err == ""
    sample(make_job(), Mixing(), out)
    assert capsys.readouterr().err == f"{LAST}\n"


def test_no_progress(out, often, capsys):
    run(make_job(), Mixing(seconds=0.03), out)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal(out, often, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    sample(make_job(), Mixing(seconds=0.03), out)
    assert "\n" not in screen.getvalue().rstrip("\n") and screen.getvalue().endswith("\n")
    lines = screen.getvalue().strip().split("\r")
    assert len(lines) >= 2 and all(re.fullmatch(LINE, line.strip()) for line in lines) and lines[-1].strip() == LAST


def test_the_line_on_a_terminal_ends_before_an_error(out, often, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(ConnectionError):
        sample(make_job(), Mixing(seconds=0.03, fails_at=PROBES + 2 * STEPS + 1), out)
    assert screen.getvalue().startswith("\r") and screen.getvalue().endswith("\n")
