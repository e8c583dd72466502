"""The tensors in what a run returned, and how those of two runs differ."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping
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
    kept = {path: leaf.detach().cpu().clone() for path, leaf in leaves(result)}
    if not kept:
        raise CheckError(
            "the run: expected tensors, arrays or images as its result, alone or in lists, dicts and dataclasses, "
            f"got {type(result).__name__}"
        )
    return kept


def digest(x: Tensor) -> bytes:
    # + 0 makes one of the two zeros
    values = (x.detach().cpu() + 0).contiguous()
    return hashlib.blake2b(values.view(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Comparison:
    """Two results. bits: the same in every bit.  difference: the largest, 0 where all values are equal (NaN equals NaN
    here), NaN where only one of them is NaN.  where: in the result.  note: why they cannot be subtracted."""

    bits: bool
    difference: float
    where: str = ""
    note: str = ""

    @property
    def equal(self) -> bool:
        return self.difference == 0 and not self.note


def compare(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Comparison:
    """Compare two results leaf by leaf."""
    if first.keys() != second.keys():
        return Comparison(False, float("nan"), note=f"{len(first)} tensors against {len(second)}")
    bits, difference, where = True, 0.0, ""
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
        apart = (a - b).abs()
        apart[(a == b) | (a.isnan() & b.isnan())] = 0
        largest = apart.max().item()
        if largest != largest or largest > difference:
            difference, where = largest, path
        if difference != difference:
            break
    return Comparison(bits, difference, where)


def first_difference(first: list[bytes], second: list[bytes]) -> int | None:
    """The number of the first digest that differs, from 0."""
    for number, (a, b) in enumerate(itertools.zip_longest(first, second)):
        if a != b:
            return number
    return None
