"""What decides the samples of a run: `Job`, and how it cuts indices into chunks and micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..noise import DTYPES, STREAM_VERSION, compute_dtype, seeds
from ..samplers import Sampler, to_uint8
from ..schedules import count, integer, real
from .conditions import cycle, random_classes, value

Condition: TypeAlias = "Tensor | np.ndarray | Callable[[Tensor], Tensor]"
Conditions: TypeAlias = Mapping[str, Condition]
Store = Literal["state", "uint8"]

FORMAT = 1  # of the folder: its files, names and what the manifest says

_STORES = ("state", "uint8")
_CHUNKS = 128  # a run is cut into so many chunks where it can be, so that it spreads over many processes
_MICRO_BATCHES = 16  # of a chunk, at most: what is lost when a process dies in the middle of one
_MOST = 2**62  # so that indices stay int64
_MOST_THREADS = 2**12
_PIECE = 2**24  # bytes hashed at a time


@dataclass(frozen=True, eq=False)
class Job:
    """N samples by index, and all that decides their bits but the network.

        job = Job(sampler, (3, 32, 32), 50_000, seed=0, conditions={"y": cycle(10)})

    Sample i is made from seed mix64(seed) + i and from entry i of the conditions. It always stands at the same place
    of the same micro-batch, whatever the number of processes: networks are not invariant to the size of a batch, so
    every batch has the same one, the last filled up by repeating index N - 1.

    Args:
        sampler: a sampler of fastdiff.
        shape: of the state of one sample, without the batch dimension.
        samples: N.
        seed: the base seed, an int in [-2^63, 2^64).
        batch: the size of every micro-batch.
        chunk: samples in one file, a multiple of batch. Default: 1 to 16 micro-batches, so many that there are still
            128 chunks or more where N allows.
        dtype: of the state: float32, float64, float16 or bfloat16.
        store: "state", what the sampler returns (half types as float32), or "uint8", `fastdiff.to_uint8` of it.
        threads: torch's threads in every process; more change the bits of a network on a CPU.
        conditions: keyword arguments of the network by name: arrays or tensors [N, ...], of which sample i gets entry
            i, or functions that take indices, int64 [B] on the CPU, to a tensor [B, ...] (`cycle`, `random_classes`,
            `value`, or your own).
        guidance_scale, uncond: guidance without a classifier: the conditions of a second call, over those of the
            first; both or neither.
        name: what the network is called in the manifest.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    sampler: Sampler
    shape: Sequence[int]
    samples: int
    _: KW_ONLY
    seed: int = 0
    batch: int = 64
    chunk: int | None = None
    dtype: torch.dtype = torch.float32
    store: Store = "state"
    threads: int = 1
    conditions: Conditions | None = None
    guidance_scale: float | None = None
    uncond: Conditions | None = None
    name: str = ""
    _first_seed: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Sampler):
            raise TypeError(f"sampler: expected a sampler of fastdiff, got {type(self.sampler).__name__}")
        if isinstance(self.shape, (str, bytes)) or not isinstance(self.shape, Sequence):
            raise TypeError(f"shape: expected a sequence of ints, got {self.shape!r}")
        settled: dict[str, Any] = {"shape": tuple(integer("shape", size, 1) for size in self.shape)}
        for name, most in (("samples", _MOST), ("batch", _MOST), ("threads", _MOST_THREADS)):
            settled[name] = count(name, getattr(self, name), most)
        samples, batch = settled["samples"], settled["batch"]
        if self.chunk is None:
            settled["chunk"] = batch * max(1, min(_MICRO_BATCHES, samples // (batch * _CHUNKS)))
        else:
            settled["chunk"] = count("chunk", self.chunk, _MOST)
            if settled["chunk"] % batch:
                raise ValueError(f"chunk: expected a multiple of batch={batch}, got {self.chunk}")
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in DTYPES:
            raise TypeError(f"dtype: expected float32, float64, float16 or bfloat16, got {self.dtype}")
        if self.store not in _STORES:
            raise ValueError(f"store: expected one of {_STORES}, got {self.store!r}")
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a str, got {type(self.name).__name__}")
        for name in ("conditions", "uncond"):
            given = getattr(self, name)
            if given is not None:
                settled[name] = _checked_conditions(name, given, samples)
        if (self.guidance_scale is None) != (self.uncond is None):
            missing = "uncond" if self.uncond is None else "guidance_scale"
            raise ValueError(f"{missing}: expected guidance_scale and uncond, both or neither, got None")
        if self.guidance_scale is not None:
            settled["guidance_scale"] = real("guidance_scale", self.guidance_scale)
        settled["seed"] = integer("seed", self.seed, -(2**63), 2**64 - 1)
        settled["_first_seed"] = seeds(settled["seed"], 1)
        for name, found in settled.items():
            object.__setattr__(self, name, found)

    @property
    def chunk_size(self) -> int:
        """Samples in a file, but for the last."""
        assert self.chunk is not None
        return self.chunk

    @property
    def chunks(self) -> int:
        """The number of files."""
        return -(-self.samples // self.chunk_size)

    def span(self, chunk: int) -> tuple[int, int]:
        """(first index, index after the last) of a chunk."""
        first = chunk * self.chunk_size
        return first, min(first + self.chunk_size, self.samples)

    def micro_batches(self, chunk: int) -> Iterator[tuple[Tensor, int]]:
        """(indices int64 [batch], how many of them are samples of the run) of each micro-batch of a chunk."""
        first, end = self.span(chunk)
        for start in range(first, end, self.batch):
            yield self.micro_batch(start), min(self.batch, end - start)

    def micro_batch(self, start: int) -> Tensor:
        """The indices, int64 [batch], of the micro-batch that begins at `start`; beyond the end the last, again."""
        return torch.arange(start, start + self.batch, dtype=torch.int64).clamp(max=self.samples - 1)

    def seeds_of(self, indices: Tensor) -> Tensor:
        """The seeds mix64(seed) + index, int64 like `indices`, which wrap as unsigned ones do."""
        return indices + self._first_seed

    def conditions_of(self, indices: Tensor, *, uncond: bool = False) -> dict[str, Tensor]:
        """Keyword arguments of the network for these indices, on the CPU or where a condition has them.

        Raises:
            TypeError, ValueError: a function returned something else than a tensor [B, ...].
        """
        values = {}
        for name, condition in ((self.uncond if uncond else self.conditions) or {}).items():
            where = f"{'uncond' if uncond else 'conditions'}[{name!r}]"
            if isinstance(condition, Tensor):
                values[name] = condition[indices.to(condition.device)]
            elif isinstance(condition, np.ndarray):
                values[name] = torch.from_numpy(np.ascontiguousarray(condition[indices.numpy()]))
            else:
                values[name] = _of_function(where, condition, indices)
        return values

    def stored(self, x: Tensor) -> np.ndarray:
        """A batch as it is stored: [B, ...], contiguous; float32 for half types, float64 or uint8."""
        if self.store == "uint8" and x.dtype != torch.uint8:
            x = to_uint8(x)
        elif x.is_floating_point():
            x = x.to(compute_dtype(x.dtype))
        array: np.ndarray = np.ascontiguousarray(x.detach().cpu().numpy())
        return array

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the manifest of a run says of its job, for JSON: jobs of which it is equal give the same samples."""
        return {
            "format": FORMAT,
            "samples": self.samples,
            "seed": self.seed,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "store": self.store,
            "batch": self.batch,
            "chunk": self.chunk_size,
            "threads": self.threads,
            "stream": STREAM_VERSION,
            "sampler": {"name": f"{self.sampler.table.name}, {len(self.sampler)} steps", "table": self._table_digest()},
            "conditions": self._described("conditions", self.conditions or {}),
            "guidance_scale": self.guidance_scale,
            "uncond": None if self.uncond is None else self._described("uncond", self.uncond),
        }

    def _described(self, where: str, conditions: Conditions) -> dict[str, str]:
        """A line for each condition, which is the same for the same one: a hash of an array or of a function's values.

        Of a function that gives numbers, of all of them; of another, of those of the first and the last micro-batch.
        """
        lines = {}
        for name, condition in conditions.items():
            if isinstance(condition, (Tensor, np.ndarray)):
                lines[name] = _hash_of_array(condition)
            elif type(condition) in (cycle, random_classes, value):
                lines[name] = repr(condition)
            else:
                last = (self.samples - 1) // self.batch * self.batch
                first = _of_function(f"{where}[{name!r}]", condition, self.micro_batch(0))
                digest = hashlib.sha256(bytes_of(first))
                for start in range(self.batch, last + 1, self.batch) if first.dim() == 1 else [last]:
                    given = _of_function(f"{where}[{name!r}]", condition, self.micro_batch(start))
                    digest.update(bytes_of(given))
                lines[name] = f"function {first.dtype} {list(first.shape[1:])} sha256 {digest.hexdigest()}"
        return lines

    def _table_digest(self) -> str:
        """SHA-256 of the sampler's numbers as its steps read them, and of how they are read."""
        sampler, table = self.sampler, self.sampler.table
        rows = table.to("cpu", compute_dtype(self.dtype), host_rounding=sampler.rounding == "host").detach()
        total = None if sampler.schedule is None else sampler.schedule.num_timesteps  # which some times are told by
        how = (sampler.time, total, sampler.rounding)
        form = (table.structure, table.timesteps, table.scalars, table.noise_clip, *how)
        return hashlib.sha256(rows.numpy().tobytes() + repr(form).encode()).hexdigest()


def _hash_of_array(array: Tensor | np.ndarray) -> str:
    digest = hashlib.sha256()
    rows = max(1, _PIECE // (array.nbytes // len(array)))
    for start in range(0, len(array), rows):
        digest.update(bytes_of(array[start : start + rows]))
    dtype = str(array.dtype).removeprefix("torch.")
    return f"{dtype} {list(array.shape)} sha256 {digest.hexdigest()}"


def bytes_of(part: Tensor | np.ndarray) -> memoryview:
    """The bytes of a tensor or an array, in row-major order."""
    if isinstance(part, Tensor):  # by its bytes, as NumPy has no bfloat16
        part = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(part).data.cast("B")


def _checked_conditions(name: str, given: object, samples: int) -> dict[str, Condition]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected a mapping of names to arrays or functions, got {type(given).__name__}")
    for key, condition in given.items():
        where = f"{name}[{key!r}]"
        if not isinstance(key, str):
            raise TypeError(f"{name}: expected names, got {key!r}")
        if isinstance(condition, (Tensor, np.ndarray)):
            if isinstance(condition, np.ndarray) and not _is_of_torch(condition):
                raise TypeError(f"{where}: expected an array of a dtype that torch has, got {condition.dtype}")
            if condition.ndim == 0 or condition.shape[0] != samples or 0 in condition.shape:
                raise ValueError(
                    f"{where}: expected shape [{samples}, ...], an entry per sample, got {[*condition.shape]}"
                )
        elif not callable(condition):
            raise TypeError(
                f"{where}: expected an array, a tensor or a function of indices, got {type(condition).__name__}"
            )
    return dict(given)


def _is_of_torch(array: np.ndarray) -> bool:
    try:
        torch.from_numpy(np.empty(0, array.dtype))
    except (TypeError, ValueError):  # the latter for the other byte order
        return False
    return True


def _of_function(where: str, function: Callable[[Tensor], Tensor], indices: Tensor) -> Tensor:
    given = function(indices.clone())
    if not isinstance(given, Tensor):
        raise TypeError(f"{where}: expected it to return a tensor, got {type(given).__name__}")
    if given.dim() == 0 or given.shape[0] != len(indices):
        raise ValueError(f"{where}: expected it to return shape [{len(indices)}, ...], got {list(given.shape)}")
    return given
