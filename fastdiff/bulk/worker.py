"""A worker of a run: `sample`, which any number of processes call with the same job and folder."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..samplers import _output, _place
from ..schedules import integer
from .folder import LEASE, Folder
from .job import Job, bytes_of

_POLL = 0.2  # seconds between two looks at chunks that others are making
_COMPUTED = re.compile(r"(?<=^function )(torch\.b?float.*) sha256 \w+$")  # in a line of `Job.identity`
_PATIENCE = 5  # a sign of life is waited for that many times as long as the longest micro-batch took here


def sample(
    job: Job,
    network: Callable[..., Any],
    out: str | Path,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    world_size: int = 1,
    chunks: Iterable[int] | None = None,
    device: torch.device | str | None = None,
    inexact: bool = False,
    progress: bool = True,
) -> Path:
    """Make the samples of a job in a folder, together with all other processes that are called with the two.

    Worker `rank` makes chunks rank, rank + world_size, ... that are not there yet, then helps with what others have
    not begun or died over, and returns when all chunks are done, whoever made them. What stands in the folder is kept:
    a run that was stopped goes on where it was, with any number of processes. While it works, torch has job.threads
    threads, and cuDNN neither benchmarks nor takes algorithms that are not deterministic.

    Before, the network is called twice for the first step of the first micro-batch; what it gave is compared with
    what it gave when the run was begun, so that other weights, or a machine that computes other bits, are found.

    Args:
        job: the same for all workers, and for all calls with one folder.
        network: as the model of `Sampler.sample`: called as network(x, t, **conditions), x [batch, ...] and t [batch]
            on the device.
        out: the folder, on a file system that all workers share. Made where it is not there.
        decode: takes x [batch, ...] at the end of the chain to what is stored, a tensor [batch, ...] (the decoder of a
            latent model). Called without gradients.
        rank, world_size: this worker, in [0, world_size), and how many there are.
        chunks: the numbers of the chunks to make, in place of rank and world_size, for an engine that hands out work
            itself: the call returns when these are done.
        device: of the state. Default: that of the network's first floating parameter, else the CPU.
        inexact: go on where the network gives other bits than when the run was begun, or from call to call.
        progress: tell on stderr how far the whole run is. Of the workers of a machine one at a time does.

    Returns:
        The folder.

    Raises:
        TypeError, ValueError: a bad argument, by name; a job other than the folder's; a network that is in training
            mode, not deterministic, or other than when the run was begun.
        FloatingPointError: the network gave NaN or Inf. The chunk is not written.
        OSError: the folder cannot be written to, or there is no room on the disk.

        In each case what was finished stays.
    """
    if not isinstance(job, Job):
        raise TypeError(f"job: expected a Job, got {type(job).__name__}")
    maker = Maker(job, network, decode, device)
    rank, world_size = _share(rank, world_size)
    numbers = None if chunks is None else _numbers(chunks, job)
    folder = Folder(out)
    with maker.settled():
        if folder.has_manifest():
            check_same(job, folder, inexact)
        seconds = _begin(job, folder, maker, inexact)
        worker = _Worker(job, folder, maker, rank, seconds, progress)
        with contextlib.closing(worker.line):
            if numbers is None:
                worker.work(range(rank, job.chunks, world_size), range(job.chunks))
            else:
                worker.work(numbers, numbers)
            if folder.write_sums():
                worker.line.end()
                folder.tidy()
    return folder.path


class Maker:
    """Makes micro-batches: a job with its network, on a device.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        job: Job,
        network: Callable[..., Any],
        decode: Callable[[Tensor], Tensor] | None,
        device: torch.device | str | None,
    ) -> None:
        for name, function in (("network", network), ("decode", decode)):
            if not callable(function) and (name == "network" or function is not None):
                raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
            if isinstance(function, torch.nn.Module) and function.training:
                raise ValueError(f"{name}: expected it in evaluation mode, got training mode; call its eval()")
        self.job, self.network, self.decode = job, network, decode
        self.device, _ = _place(network, None, device, job.dtype)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """What else decides bits: the number of threads, and how cuDNN chooses its algorithms."""
        threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
        before = cudnn.benchmark, cudnn.deterministic
        torch.set_num_threads(self.job.threads)
        cudnn.benchmark, cudnn.deterministic = False, True
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            cudnn.benchmark, cudnn.deterministic = before

    def make(
        self,
        indices: Tensor,
        conditions: dict[str, Tensor],
        network: Callable[..., Any] | None = None,
        callback: Callable[[int, int, Tensor], object] | None = None,
    ) -> Tensor:
        """The states at the end of the chain of these indices, int64 [batch], on the device."""
        job = self.job
        uncond = None if job.uncond is None else self._on_device(job.conditions_of(indices, uncond=True))
        x: Tensor = job.sampler.sample(
            network or self.network,
            (job.batch, *job.shape),
            seeds=job.seeds_of(indices).to(self.device),
            device=self.device,
            dtype=job.dtype,
            model_kwargs=self._on_device(conditions),
            guidance_scale=job.guidance_scale,
            uncond_kwargs=uncond,
            callback=callback,
        )
        return x

    def finish(self, x: Tensor) -> Tensor:
        """What is stored of the states at the end of the chain: themselves, or what decode makes of them."""
        if self.decode is None:
            return x
        with torch.no_grad():
            result = self.decode(x)
        if not isinstance(result, Tensor):
            raise TypeError(f"decode: expected it to return a tensor, got {type(result).__name__}")
        if result.dim() == 0 or len(result) != len(x):
            raise ValueError(f"decode: expected it to return shape [{len(x)}, ...], got {list(result.shape)}")
        if not result.numel():
            raise ValueError(f"decode: expected samples with elements, got shape {list(result.shape)}")
        if not result.is_floating_point() and result.dtype != torch.uint8:
            raise TypeError(f"decode: expected it to return a floating tensor or uint8, got {result.dtype}")
        return result

    def stored(self, indices: Tensor, count: int, conditions: dict[str, Tensor]) -> np.ndarray:
        """The samples of the first `count` indices as they are stored.  FloatingPointError for NaN and Inf."""
        x = self.make(indices, conditions)
        result = self.finish(x)
        for tensor in (x, result):
            finite = torch.isfinite(tensor[:count]).reshape(count, -1).all(1)
            if not bool(finite.all()):
                self._check_conditions(indices)
                bad = indices[:count][~finite.cpu()]
                raise FloatingPointError(
                    f"network: expected finite samples, got NaN or Inf in {len(bad)} of samples {int(indices[0])} to "
                    f"{int(indices[count - 1])}, the first of them {int(bad[0])} (seed "
                    f"{int(self.job.seeds_of(bad)[0]) % 2**64}); what was finished stays"
                )
        return self.job.stored(result)[:count]

    def probe(self) -> tuple[str, np.ndarray, float]:
        """(SHA-256 of what network and decode give at the first step, a micro-batch as stored, seconds of the step)."""
        digest, state = hashlib.sha256(), None

        def spy(x: Tensor, t: Tensor, /, **conditions: Tensor) -> Tensor:
            output = _output(self.network(x, t, **conditions))
            if not bool(torch.isfinite(output).all()):
                self._check_conditions(first)
                raise FloatingPointError(
                    f"network: expected finite outputs, got NaN or Inf at the first step (timestep {int(t[0])})"
                )
            digest.update(bytes_of(output))
            return output

        def stop(row: int, t: int, x: Tensor) -> None:
            nonlocal state
            state = x
            raise _Stopped

        first = self.job.micro_batch(0)
        begin = time.monotonic()
        with contextlib.suppress(_Stopped):
            self.make(first, self.job.conditions_of(first), spy, stop)
        seconds = time.monotonic() - begin
        assert state is not None
        result = self.finish(state)
        digest.update(bytes_of(result))
        return digest.hexdigest(), self.job.stored(result), seconds

    def _check_conditions(self, indices: Tensor) -> None:
        """FloatingPointError for conditions of these indices that are not finite."""
        for table in ("conditions", "uncond"):
            for name, values in self.job.conditions_of(indices, uncond=table == "uncond").items():
                if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                    raise FloatingPointError(f"{table}[{name!r}]: expected finite values, got NaN or Inf")

    def _on_device(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in values.items()}


class _Stopped(Exception):
    """Ends a chain after its first step."""


def check_same(job: Job, folder: Folder, inexact: bool = False) -> None:
    """ValueError unless the folder's samples are those of the job, whatever the network.

    inexact: what functions that are conditions compute may have other bits.
    """
    found, file = folder.manifest(), folder.manifest_file
    for name, value in job.identity.items():
        if _compared(found.get(name), inexact) != _compared(value, inexact):
            raise ValueError(
                f"{name}: expected {_words(found.get(name))}, as in {file}, got {_words(value)}; "
                "other samples need another folder"
            )


def _compared(value: Any, inexact: bool) -> Any:
    if inexact and isinstance(value, dict):
        return {name: _COMPUTED.sub(r"\1", line) for name, line in value.items() if isinstance(line, str)}
    return value


def _words(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"name", "table"}:
        return f"{value['name']} (table {value['table'][:8]})"
    return repr(value)


def _begin(job: Job, folder: Folder, maker: Maker, inexact: bool) -> float:
    """Probe the network, write or compare the manifest, and see that there is room.

    Returns about how many seconds a micro-batch takes.
    """
    digest, batch, seconds = maker.probe()
    if not inexact:
        again, batch, seconds = maker.probe()  # no longer the first call, which may compile
    if not inexact and again != digest:
        raise ValueError(
            "network: expected the same outputs for the same input, got others at a second call: it is not "
            "deterministic (dropout, random numbers, atomics). With inexact=True (--inexact) the run goes on, and its "
            "samples are not the same bit for bit in another one"
        )
    result = {"shape": list(batch.shape[1:]), "dtype": str(batch.dtype)}
    environment = _environment(maker.device)
    manifest = {
        **job.identity,
        "network": {"name": job.name, "probe": digest},
        "result": result,
        "environment": environment,
    }
    found = folder.begin(manifest)
    check_same(job, folder, inexact)
    if found["result"] != result:
        raise ValueError(
            f"decode: expected samples of {found['result']}, as in {folder.manifest_file}, got {result}; "
            "other samples need another folder"
        )
    if found["network"]["probe"] != digest and not inexact:
        then = found["environment"]
        other = [f"{key} {then.get(key)} then, {now} now" for key, now in environment.items() if then.get(key) != now]
        raise ValueError(
            f"network: expected the outputs that it gave when the run in {folder.path} was begun, got others: other "
            f"weights or code{', or: ' + '; '.join(other) if other else ''}. Other samples need another folder; with "
            "inexact=True (--inexact) the run goes on, with samples that are not the same bit for bit"
        )
    folder.check_room(batch.nbytes // job.batch)
    return seconds * len(job.sampler)


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        name = f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return {"fastdiff": __version__, "torch": torch.__version__, "device": name}


def _share(rank: int, world_size: int) -> tuple[int, int]:
    world_size = integer("world_size", world_size, 1)
    return integer("rank", rank, 0, world_size - 1), world_size


def _numbers(chunks: Iterable[int], job: Job) -> list[int]:
    if not isinstance(chunks, Iterable):
        raise TypeError(f"chunks: expected the numbers of chunks, got {type(chunks).__name__}")
    return [integer("chunks", chunk, 0, job.chunks - 1) for chunk in chunks]


class _Worker:
    """The loop over chunks."""

    def __init__(self, job: Job, folder: Folder, maker: Maker, rank: int, seconds: float, progress: bool) -> None:
        self.job, self.folder, self.maker, self.rank = job, folder, maker, rank
        self.line = ProgressLine(folder, job.samples, progress)
        self.record = {"environment": _environment(maker.device)}
        self.longest, self.measured = seconds, False  # of a micro-batch; until one is measured, a guess
        self.begun = folder.now()

    def work(self, own: Iterable[int], chunks: Sequence[int]) -> None:
        """Make what is not done of the chunks that are this worker's own, then help until all of `chunks` are done.

        Every chunk has been made or compared with its hash since the run was begun when this returns: by the worker
        whose own it is, or here.
        """
        for chunk in own:
            if not self.folder.check(chunk) and chunk not in self._claims():
                self.make(chunk)
        while True:
            self._help(chunks)
            now = self.folder.now()
            if all(self.folder.checked(chunk, self.begun, now) or self.folder.check(chunk) for chunk in chunks):
                return

    def _help(self, chunks: Iterable[int]) -> None:
        """Make what others have not, and wait for what they are making."""
        missing = list(chunks)
        while missing := [chunk for chunk in missing if self.folder.record(chunk) is None]:
            claims = self._claims()
            free = [chunk for chunk in missing if chunk not in claims]
            if free:
                # from the end, which its own worker will reach last, and not all helpers at one
                self.make(free[-1 - self.rank % len(free)])
            else:
                time.sleep(_POLL)
                self.line.tell()

    def make(self, chunk: int) -> None:
        job = self.job
        first, end = self.folder.span(chunk)
        labels: dict[str, list[int]] = {}
        with self.folder.writing(chunk, end - first) as writer:
            for indices, count in job.micro_batches(chunk):
                before = time.monotonic()
                conditions = job.conditions_of(indices)
                writer.write(self.maker.stored(indices, count, conditions))
                took = time.monotonic() - before
                self.longest, self.measured = max(self.longest, took) if self.measured else took, True
                for name, values in conditions.items():
                    if values.dim() == 1 and not (values.is_floating_point() or values.is_complex()):
                        labels.setdefault(name, []).extend(values[:count].to(torch.int64).tolist())
                self.line.tell()
            writer.commit({"labels": labels, **self.record})

    def _claims(self) -> set[int]:
        return self.folder.claims(max(LEASE, _PATIENCE * self.longest))


class ProgressLine:
    """One line on stderr about the whole run, from whichever worker of a machine is at hand when it is time."""

    def __init__(self, folder: Folder, samples: int, enabled: bool) -> None:
        self.folder, self.samples, self.enabled = folder, samples, enabled
        self.live = sys.stderr.isatty()
        self.every = 1.0 if self.live else 10.0
        self.begin = self.last = time.monotonic()
        self.before = folder.written() if enabled else 0
        self.open = False
        folder.tell()

    def tell(self) -> None:
        if not self.enabled or time.monotonic() - self.last < self.every:
            return
        self.last = time.monotonic()
        try:
            age = self.folder.now() - self.folder.told.stat().st_mtime
        except FileNotFoundError:
            age = self.every
        if 0 <= age < self.every:
            return  # another worker of this machine has told
        self.folder.tell()
        self._print(self.folder.written())

    def _print(self, done: int) -> None:
        seconds = max(time.monotonic() - self.begin, 1e-9)
        text = f"fastdiff.bulk: {done:,} of {self.samples:,} samples ({100 * done // self.samples} %)"
        if (rate := (done - self.before) / seconds) > 0 and done < self.samples:
            text += f", {rate:,.3g} samples/s, about {_duration((self.samples - done) / rate)} left"
        sys.stderr.write(f"\r{text:<79}" if self.live else f"{text}\n")
        sys.stderr.flush()
        self.open = self.live

    def end(self) -> None:
        """The last line, by the first worker of a machine that is done."""
        with contextlib.suppress(FileNotFoundError):
            self.folder.told.unlink()
            if self.enabled:
                self._print(self.samples)

    def close(self) -> None:
        if self.open:
            sys.stderr.write("\n")
            self.open = False


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
