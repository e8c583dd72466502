"""Samples made again and compared with those in the folder: `verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schedules import integer
from .folder import Folder
from .job import Job
from .worker import Maker, check_same


@dataclass(frozen=True)
class Checked:
    """What became of one index: whether the sample made again has the same bits, and the largest difference."""

    index: int
    equal: bool
    difference: float


def verify(
    job: Job,
    network: Callable[..., Any],
    out: str | Path,
    indices: Iterable[int],
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
) -> list[Checked]:
    """Make chosen samples again, in their own micro-batches, and compare them with those in the folder.

    Args:
        job, network, out, decode, device: as of `sample`.
        indices: which samples, in any order.

    Returns:
        One `Checked` for each index, in the order given. The difference is that of what is stored, in levels for
        uint8; NaN where one of the two is.

    Raises:
        TypeError, ValueError: a bad argument, by name; another job than the folder's; an index that is not done yet,
            or whose chunk is damaged.
        FloatingPointError: the network gave NaN or Inf.
    """
    if not isinstance(job, Job):
        raise TypeError(f"job: expected a Job, got {type(job).__name__}")
    if not isinstance(indices, Iterable):
        raise TypeError(f"indices: expected ints, got {type(indices).__name__}")
    wanted = [integer("indices", index, 0, job.samples - 1) for index in indices]
    maker, folder = Maker(job, network, decode, device), Folder(out)
    with maker.settled():
        check_same(job, folder)
    for chunk in sorted({index // job.chunk_size for index in wanted}):
        if not folder.intact(chunk):
            state = "is damaged" if folder.record(chunk) else "is not done"
            first, end = folder.span(chunk)
            raise ValueError(
                f"indices: expected samples that are done; chunk {chunk} (samples {first} to {end - 1}) {state}. "
                "The command that makes the samples, run again, makes it"
            )
    places: dict[int, list[int]] = {}
    for index in wanted:
        places.setdefault(index - index % job.batch, []).append(index)
    made: dict[int, np.ndarray] = {}
    with maker.settled():
        for start, inside in sorted(places.items()):
            indices, count = job.micro_batch(start), min(job.batch, job.samples - start)
            batch = maker.stored(indices, count, job.conditions_of(indices))
            made |= {index: batch[index - start] for index in inside}
    return [_compare(index, _read(folder, job, index), made[index]) for index in wanted]


def _read(folder: Folder, job: Job, index: int) -> np.ndarray:
    chunk, place = divmod(index, job.chunk_size)
    samples: np.ndarray = np.load(folder.file(chunk), mmap_mode="r", allow_pickle=False)
    return np.array(samples[place])


def _compare(index: int, kept: np.ndarray, again: np.ndarray) -> Checked:
    if kept.shape != again.shape or kept.dtype != again.dtype:
        raise ValueError(
            f"decode: expected samples of {kept.dtype} {list(kept.shape)}, as in the folder, got "
            f"{again.dtype} {list(again.shape)}"
        )
    difference = np.abs(kept.astype(np.float64) - again.astype(np.float64))
    return Checked(index, kept.tobytes() == again.tobytes(), float(difference.max(initial=0)))
