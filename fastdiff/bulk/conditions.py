"""Conditions by index: functions of the indices of samples, whose repr tells them apart in a manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..noise import mix64, mix64_of
from ..schedules import count, integer

_SHOWN = 16  # elements of a value in its repr, beyond which a hash stands for them


@dataclass(frozen=True)
class cycle:
    """The classes 0, 1, ..., n - 1 in turn: class i % n for sample i.

    Args:
        n: how many classes, at least 1.

    Called with indices, int64 [B], it returns int64 [B].

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", count("n", self.n, 2**63 - 1))

    def __call__(self, indices: Tensor) -> Tensor:
        return _checked(indices) % self.n


@dataclass(frozen=True)
class random_classes:
    """A class of 0, ..., n - 1 drawn for each sample, independent of its noise and of every other sample.

    Sample i has class ((mix64(mix64(seed) + i) >> 32) * n) >> 32; a class is at most 2^-32 less likely than another.

    Args:
        n: how many classes, in [1, 2^32].
        seed: an int in [-2^63, 2^64), in no relation to the seed of the noise.

    Called with indices, int64 [B], it returns int64 [B].

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", integer("n", self.n, 1, 2**32))
        object.__setattr__(self, "seed", integer("seed", self.seed, -(2**63), 2**64 - 1))

    def __call__(self, indices: Tensor) -> Tensor:
        index = _checked(indices).cpu().numpy().astype(np.uint64)
        high = mix64_of(index + np.uint64(mix64(self.seed))) >> np.uint64(32)
        # n = 2^32 times a word of 32 bits still fits
        drawn = (high * np.uint64(self.n)) >> np.uint64(32)
        return torch.from_numpy(drawn.astype(np.int64)).to(indices.device)


@dataclass(frozen=True, eq=False, repr=False)
class value:
    """The same for every sample.

    Args:
        v: an int or a list of them (int64), a float or a list of them (float32), or an array or a tensor, which keeps
            its dtype.

    Called with indices, int64 [B], it returns [B, ...] of v's shape.

    Raises:
        TypeError, ValueError: v is not made of finite numbers.
    """

    v: Any

    def __post_init__(self) -> None:
        given = self.v
        if isinstance(given, int) and not -(2**63) <= given < 2**63:
            raise ValueError(f"v: expected an int in [-2**63, 2**63), got {given}")
        try:
            array = np.array(given.detach().cpu().numpy() if isinstance(given, Tensor) else given)
            if not isinstance(given, np.ndarray | np.generic | Tensor) and array.dtype.kind in "if":
                with np.errstate(over="ignore"):
                    array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
            array = array.astype(array.dtype.newbyteorder("="))
            torch.from_numpy(array)
        except (TypeError, ValueError):  # a ragged list; a dtype that one of the two libraries does not have
            raise TypeError(f"v: expected a number or an array of them, got {_told(given)}") from None
        if array.dtype.kind not in "iuf":
            raise TypeError(f"v: expected a number or an array of them, got {_told(given)}")
        if not np.isfinite(array).all():
            raise ValueError(f"v: expected finite numbers, got {_told(given)}")
        array.flags.writeable = False
        object.__setattr__(self, "v", array)

    def __call__(self, indices: Tensor) -> Tensor:
        repeated = np.repeat(self.v[None], len(_checked(indices)), axis=0)
        return torch.from_numpy(repeated).to(indices.device)

    def __repr__(self) -> str:
        array: np.ndarray = self.v
        if array.size > _SHOWN:
            shown = f"shape {list(array.shape)}, sha256 {sha256(np.ascontiguousarray(array).data).hexdigest()}"
        else:
            shown = str(array.tolist())
        return f"value({shown}, {array.dtype})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, value):
            return NotImplemented
        return bool(self.v.dtype == other.v.dtype and np.array_equal(self.v, other.v))

    def __hash__(self) -> int:
        return hash((self.v.dtype, self.v.shape, math.fsum(self.v.ravel()[:_SHOWN])))


def _checked(indices: Tensor) -> Tensor:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices: expected an int64 tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise ValueError(f"indices: expected int64 [B], got {indices.dtype} {list(indices.shape)}")
    return indices


def _told(given: object) -> str:
    text = repr(given).replace("\n", "")
    return text if len(text) < 80 else type(given).__name__
