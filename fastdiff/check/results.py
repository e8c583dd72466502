"""The tensors in what a run returned, and how those of two runs differ."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .subjects import CheckError


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors, arrays and images in a result, and where they are in it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, np.ndarray | np.number) or hasattr(value, "__array_interface__"):
        array = np.array(value)
        if array.dtype.kind in "biufc":
            yield path, torch.from_numpy(array)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from leaves(part, f"{path}[{number}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            yield from leaves(getattr(value, each.name), f"{path}.{each.name}")


def kept(result: Any) -> dict[str, Tensor]:
    if isinstance(result, float | complex):  # alone; among other things it may be a time
        return {"": torch.from_numpy(np.array(result))}
    kept = {path: _dense(leaf).detach().cpu().clone() for path, leaf in leaves(result)}
    if not kept:
        raise CheckError(
            "the run: expected tensors, arrays or images as its result, alone or in lists, dicts and dataclasses, "
            f"got {type(result).__name__}"
        )
    return kept


def _dense(x: Tensor) -> Tensor:
    return x if x.layout is torch.strided else x.to_dense()


def digest(x: Tensor) -> bytes:
    # + 0 makes one of the two zeros
    values = (_dense(x).detach().cpu() + 0).contiguous()
    return hashlib.blake2b(values.view(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Comparison:
    """Two results. bits: the same in every bit.  difference: the largest, 0 where all values are equal (NaN equals NaN
    here), NaN where only one of them is NaN.  where: in the result.  note: why they cannot be subtracted.
    lost, mended: how many finite values of the first are NaN or Inf in the second, and the reverse."""

    bits: bool
    difference: float
    where: str = ""
    note: str = ""
    lost: int = 0
    mended: int = 0

    @property
    def equal(self) -> bool:
        return self.difference == 0 and not self.note


def compare(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Comparison:
    """Compare two results leaf by leaf."""
    if first.keys() != second.keys():
        sides = (("without", first, second), ("with", second, first))
        alone = ((f"only {side} fastdiff", a.keys() - b.keys()) for side, a, b in sides)
        note = "; ".join(f"{which}: {_names(paths)}" for which, paths in alone if paths)
        return Comparison(False, float("nan"), note=note)
    bits, difference, where, lost, mended = True, 0.0, "", 0, 0
    for path, a in first.items():
        b = second[path]
        if a.shape != b.shape or a.dtype != b.dtype:
            note = f"{list(a.shape)} of {a.dtype} against {list(b.shape)} of {b.dtype}"
            return Comparison(False, float("nan"), path, note)
        a, b = a.contiguous().view(-1), b.contiguous().view(-1)
        if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            continue
        bits = False
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        lost += int((a.isfinite() & ~b.isfinite()).sum())
        mended += int((~a.isfinite() & b.isfinite()).sum())
        apart = (a - b).abs()
        apart[(a == b) | (a.isnan() & b.isnan())] = 0
        largest = apart.max().item()
        if difference == difference and (largest != largest or largest > difference):
            difference, where = largest, path
    return Comparison(bits, difference, where, lost=lost, mended=mended)


def _names(paths: Set[str]) -> str:
    names = [path or "the whole result" for path in sorted(paths)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_difference(first: list[bytes], second: list[bytes]) -> int | None:
    """The number of the first digest that differs, from 0."""
    for number, (a, b) in enumerate(itertools.zip_longest(first, second)):
        if a != b:
            return number
    return None
