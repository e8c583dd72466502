"""The noise contract, version 1: noise is a pure function of (seed, domain, t, repeat, element).

    z[b, i] = normal(seed[b], domain, t, repeat, i),    i = row-major index of the element within its sample

It depends on neither batch size, position in the batch, memory format, dtype, launch geometry, backend nor device. The
bits are Philox4x32-10 (Salmon et al. 2011) with the seed as key and (i // 4, t, domain, repeat) as counter; the words
are made normal by Box-Muller in float32, every operation exactly rounded. Philox is not a cryptographic generator.

The functions below spell the contract in array operations that NumPy and PyTorch share; csrc/philox.h is the other
spelling. Tests hold them equal in every bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from . import mersenne, native

STREAM_VERSION = 1

Domain = Literal["initial", "step", "forward"]
Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator]"
DOMAINS: dict[str, int] = {"initial": 0, "step": 1, "forward": 2}

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes that a state may have, and that the compiled library has kernels for."""

_MASK32 = 0xFFFFFFFF
_MAX_ELEMENTS = 2**34  # of a sample: a counter word numbers groups of four
_CHUNK = 2**16  # Philox counters held at a time by the array spelling


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a step over a state of `dtype` is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mix64(value: int) -> int:
    """Mix an int into 64 bits, so that nearby ints give far apart seeds.

    The output function of SplitMix64 (Steele, Lea & Flood 2014) after one increment: a bijection of [0, 2^64).

    Args:
        value: an int in [-2^63, 2^64); negative ones count as value + 2^64.

    Returns:
        An int in [0, 2^64).

    Raises:
        TypeError: value is not an int.
        ValueError: value is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"value: expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"value: expected an int in [-2**63, 2**64), got {value}")
    mask = 2**64 - 1
    z = (int(value) + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def mix64_of(values: np.ndarray) -> np.ndarray:
    """`mix64` of each entry of a uint64 array, whose arithmetic wraps by itself."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def seeds(seed: int | Tensor | None, batch: int, device: torch.device | str | None = None) -> Tensor:
    """One 64-bit seed per sample.

    Args:
        seed: an int s gives `mix64(s) + b` to sample b, so that different ints share no sample. An int64 tensor [B] is
            used as it is; equal entries give equal noise. None draws s from torch's default CPU generator, so that
            `torch.manual_seed` governs.
        batch: B.
        device: where the tensor should be; default: the CPU, or where a given tensor is.

    Returns:
        int64 tensor [B] (the bits of the unsigned seeds).

    Raises:
        TypeError: seed is neither an int, None nor an int64 tensor.
        ValueError: a tensor of another shape than [B], or an int outside [-2^63, 2^64).
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seeds: expected an int64 tensor, got {seed.dtype}")
        if seed.dim() != 1 or seed.shape[0] != batch:
            raise ValueError(f"seeds: expected shape [{batch}], one per sample, got {list(seed.shape)}")
        return seed if device is None else seed.to(device)
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu"))
    elif isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seeds: expected an int, None or an int64 tensor [{batch}], got {type(seed).__name__}")
    elif not -(2**63) <= seed < 2**64:
        raise ValueError(f"seeds: expected an int in [-2**63, 2**64), got {seed}")
    first = mix64(seed)
    first -= 2**64 if first >= 2**63 else 0
    # int64 addition wraps like the unsigned one
    return torch.arange(batch, dtype=torch.int64, device=device or "cpu") + first


def normal(
    shape: tuple[int, ...],
    seed: int | Tensor | None = None,
    *,
    t: int = 0,
    repeat: int = 0,
    domain: Domain = "initial",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise of the contract; with the defaults, the x_T that a sampler starts from.

    Args:
        shape: (B, ...), at most 2^34 elements per sample.
        seed: see `seeds`.
        t: noise word, in [0, 2^32): the training timestep of a step.
        repeat: numbers the visits of a timestep that a chain passes more than once.
        domain: "initial" (x_T), "step" (the noise that a step adds) or "forward" (`add_noise`).
        dtype: a floating dtype; the float32 value is rounded to a half type, or widened to float64.
        device: default: where a seed tensor is, else the CPU.

    Returns:
        Contiguous tensor of `shape`. Entry b depends on seed b alone.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    try:
        shape = tuple(shape)
    except TypeError:
        raise TypeError(f"shape: expected a sequence of ints (batch, ...), got {type(shape).__name__}") from None
    if not shape or any(not isinstance(n, int | np.integer) or n < 0 for n in shape):
        raise ValueError(f"shape: expected (batch, ...) of non-negative ints, got {shape}")
    if domain not in DOMAINS:
        raise ValueError(f"domain: expected one of {tuple(DOMAINS)}, got {domain!r}")
    for name, word in (("t", t), ("repeat", repeat)):
        if isinstance(word, bool) or not isinstance(word, int | np.integer):
            raise TypeError(f"{name}: expected an int, got {type(word).__name__}")
        if not 0 <= word < 2**32:
            raise ValueError(f"{name}: expected an int in [0, 2**32), got {word}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    elements = math.prod(shape[1:])
    if elements > _MAX_ELEMENTS:
        raise ValueError(f"shape: expected at most 2**34 elements per sample, got {elements}")
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    seed = seeds(seed, shape[0], device)
    kernels = native.best(seed.device) if dtype in DTYPES else None
    if kernels is not None:
        operators = torch.ops.fastdiff
        fill = operators.normals.default if kernels == "native" else operators.triton_normals.default
        out = torch.empty(shape, dtype=dtype, device=seed.device)
        fill(out, seed, t, repeat, DOMAINS[domain])
        return out
    words = torch.tensor([[t, repeat]], device=seed.device).expand(shape[0], 2)
    return normal_reference(shape, seed, words, DOMAINS[domain]).to(dtype)


def check_generators(generator: Generators, batch: int, device: torch.device) -> None:
    """TypeError or ValueError unless these are generators that can make noise for `batch` samples on a device."""
    many = isinstance(generator, (list, tuple))
    members = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    for member in members:
        if not isinstance(member, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or a list of them, got {type(member).__name__}")
        if member.device.type != "cpu" and not on(member, device):
            places = "cpu" if device.type == "cpu" else f"cpu or {device}"
            raise ValueError(f"generator: expected one on {places}, got {member.device}")
    if many and len(members) != batch:
        raise ValueError(f"generator: expected {batch}, one per sample, got {len(members)}")


def on(generator: torch.Generator, device: torch.device) -> bool:
    """Whether a generator is one of a device: torch.Generator("cuda") names no index, and serves each of them."""
    own = generator.device
    return own.type == device.type and own.index in (None, device.index)


def randn(shape: tuple[int, ...], generator: Generators, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.randn of the generator; of a list of generators, one sample from each."""
    if isinstance(generator, torch.Generator):
        where = device if on(generator, device) else generator.device
        if where.type == "cpu":
            return mersenne.randn(shape, generator, dtype).to(device)
        return torch.randn(shape, generator=generator, dtype=dtype, device=where).to(device)
    parts = [randn((1, *shape[1:]), one, dtype, device) for one in generator]
    return torch.cat(parts) if parts else torch.empty(shape, dtype=dtype, device=device)


def normal_reference(shape: tuple[int, ...], seed: Tensor, words: Tensor, domain: int) -> Tensor:
    """The contract in PyTorch operations, on any device and with noise words of its own for each sample.

    Args:
        shape: (B, ...).
        seed: int64 [B].
        words: int64 [B, 2], t and repeat.
        domain: 0 initial, 1 step, 2 forward.

    Returns:
        Contiguous float32 tensor of `shape` on the seeds' device.
    """
    batch, elements = shape[0], math.prod(shape[1:])
    blocks = [torch.empty(batch, 0, dtype=torch.float32, device=seed.device)]
    counters = -(-elements // 4)
    step = max(1, _CHUNK // max(batch, 1))
    column = [part[:, None] for part in (seed, words[:, 0], words[:, 1])]
    for first in range(0, counters, step):
        index = torch.arange(first, min(first + step, counters), dtype=torch.int64, device=seed.device)[None]
        block = normals_of(TORCH, column[0], index, column[1], domain, column[2])
        blocks.append(block.flatten(1)[:, : elements - 4 * first])
    return torch.cat(blocks, 1).reshape(shape)  # and not written in place: the seeds may be torch.vmap's


class Namespace(Protocol):
    """What the contract needs of an array library beyond Python's operators on int64 and float arrays."""

    def where(self, condition: Any, a: Any, b: Any) -> Any: ...
    def stack(self, parts: list[Any]) -> Any: ...
    def sqrt(self, a: Any) -> Any: ...
    def float32(self, a: Any) -> Any: ...
    def float64(self, a: Any) -> Any: ...
    def bits32(self, a: Any) -> Any: ...
    def from_bits32(self, a: Any) -> Any: ...
    def bits64(self, a: Any) -> Any: ...
    def from_bits64(self, a: Any) -> Any: ...


class _Torch:
    sqrt = staticmethod(torch.sqrt)

    @staticmethod
    def where(condition: Tensor, a: Any, b: Any) -> Tensor:
        return torch.where(condition, a, b)

    @staticmethod
    def stack(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts, -1)

    @staticmethod
    def float32(a: Tensor) -> Tensor:
        return a.to(torch.float32)

    @staticmethod
    def float64(a: Tensor) -> Tensor:
        return a.to(torch.float64)

    @staticmethod
    def bits32(a: Tensor) -> Tensor:
        return a.view(torch.int32).to(torch.int64) & _MASK32

    @staticmethod
    def from_bits32(a: Tensor) -> Tensor:
        return a.to(torch.int32).view(torch.float32)

    @staticmethod
    def bits64(a: Tensor) -> Tensor:
        return a.view(torch.int64)

    @staticmethod
    def from_bits64(a: Tensor) -> Tensor:
        return a.view(torch.float64)


class _NumPy:
    where = staticmethod(np.where)
    sqrt = staticmethod(np.sqrt)

    @staticmethod
    def stack(parts: list[np.ndarray]) -> np.ndarray:
        return np.stack(parts, -1)

    @staticmethod
    def float32(a: np.ndarray) -> np.ndarray:
        return np.asarray(a).astype(np.float32)

    @staticmethod
    def float64(a: np.ndarray) -> np.ndarray:
        return np.asarray(a).astype(np.float64)

    @staticmethod
    def bits32(a: np.ndarray) -> np.ndarray:
        return np.asarray(a).view(np.int32).astype(np.int64) & _MASK32

    @staticmethod
    def from_bits32(a: np.ndarray) -> np.ndarray:
        return np.asarray(a).astype(np.int32).view(np.float32)

    @staticmethod
    def bits64(a: np.ndarray) -> np.ndarray:
        return np.asarray(a).view(np.int64)

    @staticmethod
    def from_bits64(a: np.ndarray) -> np.ndarray:
        return np.asarray(a).view(np.float64)


TORCH: Namespace = _Torch()
NUMPY: Namespace = _NumPy()


def fma(xp: Namespace, a: Any, b: Any, c: Any) -> Any:
    """float32 a*b + c rounded once, without the instruction: exact product in float64, sum rounded to odd there.

    The last bit of the float64 sum is set when the sum was inexact (its error is found by two-sum, Knuth 4.2.2), so
    that the rounding to float32 sees on which side of a tie it lies (Boldo & Melquiond 2008).
    """
    product = xp.float64(a) * (b if isinstance(b, float) else xp.float64(b))
    addend = c if isinstance(c, float) else xp.float64(c)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = xp.bits64(total)
    inexact_even = (error != 0) & (error == error) & ((bits & 1) == 0)
    away = (error > 0) == (total > 0)
    bits = bits + xp.where(inexact_even, xp.where(away, 1, -1), 0)
    return xp.float32(xp.from_bits64(bits))


def _horner(xp: Namespace, coefficients: tuple[float, ...], v: Any) -> Any:
    # the first product has a constant factor, which array libraries would not take as float32
    value = fma(xp, v, coefficients[0], coefficients[1])
    for c in coefficients[2:]:
        value = fma(xp, value, v, c)
    return value


_hex = float.fromhex
_LOG = tuple(
    map(
        _hex,
        "0x1.36CF62p-2 -0x1.5B71D2p-2 0x1.512784p-2 -0x1.95F6D8p-2 0x1.000C36p-1 -0x1.555DCEp-1 1.0 -2.0".split(),
    )
)
_COS = tuple(map(_hex, "0x1.C02E20p-3 -0x1.54DCB4p+0 0x1.03BC26p+2 -0x1.3BD39Cp+2 0x1.FFFFFEp-1".split()))
_SIN = tuple(map(_hex, "0x1.3912A8p-4 -0x1.31FBF4p-1 0x1.466504p+1 -0x1.4ABBA2p+2 0x1.921FB4p+1".split()))
_EXP = tuple(map(_hex, "0x1.6A4F88p-10 0x1.123988p-7 0x1.5558AEp-5 0x1.555492p-3 0x1.FFFFFCp-2 1.0 1.0".split()))
_LN2_SCALED = _hex("-0x1.62E430p-23")  # -2 ln(2) * 2^-23


def philox4x32_10(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any], rounds: int = 10) -> tuple[Any, ...]:
    """Philox4x32 on int64 arrays (or ints) that hold 32-bit words: the four random words of each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # the int64 product wraps, which leaves its bits those of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32
        c2, c3 = ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def box_muller(xp: Namespace, w0: Any, w1: Any) -> tuple[Any, Any]:
    """Two float32 normals from two arrays of 32-bit words (int64), bit for bit as csrc/philox.h."""
    u = fma(xp, xp.float32(w0), 2.0**-32, 2.0**-33)
    bits = xp.bits32(u)
    exponent = ((bits - 0x3F2AAAAB) & 0xFF800000) - ((bits < 0x3F2AAAAB) * 2**32)  # as a signed 32-bit word
    f = xp.from_bits32(bits - exponent) - 1.0
    e = xp.float32(xp.float32(exponent) * _LN2_SCALED)
    # the square root of a float32, rounded from float64, is the correctly rounded one
    radius = xp.float32(xp.sqrt(xp.float64(fma(xp, f, _horner(xp, _LOG, f), e))))
    signed = xp.where(w1 >= 2**31, -radius, radius)
    low = (w1 << 1) & _MASK32
    y = xp.float32(low - ((low >= 2**31) * 2**32)) * 2.0**-32
    y2 = y * y
    return signed * _horner(xp, _COS, y2), signed * (_horner(xp, _SIN, y2) * y)


def normals_of(xp: Namespace, seed: Any, index: Any, t: Any, domain: Any, repeat: Any) -> Any:
    """The normals of counters (index, t, domain, repeat) under 64-bit seeds; arguments broadcast, all int64.

    Returns float32 [..., 4]: elements 4*index to 4*index + 3.
    """
    zero = index * 0 + seed * 0
    counter = (zero + index, zero + t, zero + domain, zero + repeat)
    words = philox4x32_10(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    pairs = [*box_muller(xp, words[0], words[1]), *box_muller(xp, words[2], words[3])]
    return xp.stack(pairs)


def exp_fixed(v: Tensor) -> Tensor:
    """exp of a float32 or float64 tensor by the fixed polynomial of csrc/step.h: the same bits on every machine.

    Within 1 ulp of exact; NaN stays NaN, overflow gives Inf. Not differentiable (see `fastdiff.reference`).
    """
    wide = v.dtype == torch.float64
    low, high, shift = (-746.0, 710.0, 1.5 * 2.0**52) if wide else (-104.0, 89.0, 1.5 * 2.0**23)
    clamped = torch.clamp(v, low, high)
    k = (clamped * _hex("0x1.71547652B82FEp+0" if wide else "0x1.715476p+0") + shift) - shift
    if wide:
        major, minor = clamped - k * _hex("0x1.62E42FEE00000p-1"), k * _hex("0x1.A39EF35793C76p-33")
        f = major - minor
        p = torch.full_like(f, 1 / math.factorial(13))
        for power in range(12, 1, -1):
            p = p * f + 1 / math.factorial(power)
        p = (major + (f * f * p - minor)) + 1.0
    else:
        f = fma(TORCH, k, _hex("-0x1.62E400p-1"), clamped)
        f = fma(TORCH, k, _hex("-0x1.7F7D1Cp-20"), f)
        p = _horner(TORCH, _EXP, f)
    n = torch.nan_to_num(k).to(torch.int64)
    half = n >> 1
    return (p * _power_of_two(half, wide)) * _power_of_two(n - half, wide)


def _power_of_two(n: Tensor, wide: bool) -> Tensor:
    return ((n + 1023) << 52).view(torch.float64) if wide else ((n + 127) << 23).to(torch.int32).view(torch.float32)
