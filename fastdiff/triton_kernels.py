# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"
"""The step, its backward and the noise in Triton: the kernels of a GPU machine that has no nvcc.

The arithmetic is that of csrc/step.h and csrc/philox.h operation by operation, so it has the same bits: nothing is
contracted (enable_fp_fusion=False), every fused multiply-add is written as one, and divisions and square roots are the
correctly rounded ones (`/` and tl.sqrt are approximate in float32). No libdevice, no inline assembly, no tl.rand.

Importing this file imports Triton and touches no device. `step`, `step_distance`, `step_backward` and `normals` take
the arguments of the operators of ops.py, which checks them; here only what guards memory is checked.

How a call is laid out. A program computes a tile of one sample. Where nothing differs from sample to sample (no seeds,
no t or guidance scale per sample, no variance half) the batch is one long sample. Operands that are contiguous, or all
dense with the same strides where no noise is made from seeds, are walked in memory order; of others contiguous copies
are made, and the result is copied back.

A sum over a sample is a balanced tree over its row-major elements, so a program adds up its tile, an aligned block of
the tree, and a few operations of torch finish what the programs have left.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import noise as contract
from . import tables
from .reference import tree_sum

_TILE = 1024  # elements of a program: eight of a thread, which in a half type are one 16-byte access
_GRID_LIMIT = 65535  # programs along the second and the third dimension of a grid
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
# Sums keep much in registers, of which the assembler, left to itself, spills one now and then to run more programs.
_SUM_OPTIONS = _OPTIONS if torch.version.hip else _OPTIONS | {"maxnreg": 255}

# Numbers that differ from call to call, and operands of which a program reads a few elements. A number that happens to
# be 1, or a slice of a tensor of timesteps that happens to be aligned to 16 bytes, gets no kernel of its own.
_INTEGERS = ["row", "quotient", "batch", "chain", "rows", "repeat", "min_std"]
_SMALL = ["guidance_scale", "seeds", "table", "t", "t_to_row", "grad_distance", "partials"]

# A kernel may read a global only where it is a constexpr, which an interpreted kernel takes on the left of an operator
# only. The columns stand in the order of tables.COLUMNS.
_PX, _PM, _PD, _GX, _G0, _GD, _EX, _EM, _A0, _AX, _AE, _S, _LO, _HI, _MIN_LOG, _MAX_LOG, _T, _REPEAT = map(
    tl.constexpr, range(len(tables.COLUMNS))
)
_COLUMNS = tl.constexpr(len(tables.COLUMNS))
_X0_FROM_X = tl.constexpr(tables.X0_FROM_X)
_X0_DIVIDE = tl.constexpr(tables.X0_DIVIDE)
_CLIP = tl.constexpr(tables.CLIP)
_EPS_REDERIVED = tl.constexpr(tables.EPS_REDERIVED)
_EPS_LINEAR = tl.constexpr(tables.EPS_LINEAR)
_EPS_DIVIDE = tl.constexpr(tables.EPS_DIVIDE)
_HAS_A0 = tl.constexpr(tables.HAS_A0)
_HAS_AX = tl.constexpr(tables.HAS_AX)
_HAS_AE = tl.constexpr(tables.HAS_AE)
_HOST_ROUNDING = tl.constexpr(tables.HOST_ROUNDING)
_SCALARS = tl.constexpr(tables.SCALARS)
_VARIANCE_SHIFT, _SECOND_SHIFT, _DOMAIN_SHIFT = map(
    tl.constexpr, (tables.VARIANCE_SHIFT, tables.SECOND_SHIFT, tables.DOMAIN_SHIFT)
)
_VARIANCE_BITS, _SECOND_BITS, _DOMAIN_BITS = map(
    tl.constexpr, (7 << tables.VARIANCE_SHIFT, 3 << tables.SECOND_SHIFT, 3 << tables.DOMAIN_SHIFT)
)
_FIXED, _LEARNED_LOG, _LEARNED_RANGE, _LEARNED_PLAIN = map(tl.constexpr, range(1, 5))  # variances
_X0, _NOISE, _VELOCITY = map(tl.constexpr, range(3))  # what a second output holds
_ROWS_OF_GRID = tl.constexpr(_GRID_LIMIT)
_LEVELS = tl.constexpr(_TILE.bit_length() - 1)  # of the tree over a tile

_LOG = tl.constexpr(contract._LOG)
_COS = tl.constexpr(contract._COS)
_SIN = tl.constexpr(contract._SIN)
_EXP = tl.constexpr(contract._EXP)
_EXP_64 = tl.constexpr(tuple(1 / math.factorial(n) for n in range(13, 1, -1)))
_LN2_SCALED = tl.constexpr(contract._LN2_SCALED)
_LOG2E, _LN2_HIGH, _LN2_LOW, _LOG2E_64, _LN2_HIGH_64, _LN2_LOW_64 = map(
    tl.constexpr,
    map(
        float.fromhex,
        "0x1.715476p+0 -0x1.62E400p-1 -0x1.7F7D1Cp-20 "
        "0x1.71547652B82FEp+0 0x1.62E42FEE00000p-1 0x1.A39EF35793C76p-33".split(),
    ),
)


@triton.jit
def _polynomial(v, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    """Horner's rule by fused multiply-adds."""
    p = tl.fma(v, COEFFICIENTS[0], COEFFICIENTS[1])
    for i in tl.static_range(2, COUNT):
        p = tl.fma(p, v, COEFFICIENTS[i])
    return p


@triton.jit
def _philox4x32_10(c0, c1, c2, c3, key0, key1):
    """The four random words of each counter, uint32 as the counter and the key."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = p0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _radius_squared(word):
    """-2 ln(u) for u = word * 2^-32 + 2^-33."""
    u = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)
    bits = u.to(tl.uint32, bitcast=True)
    exponent = tl.sub(bits, 0x3F2AAAAB, sanitize_overflow=False) & 0xFF800000
    f = tl.sub(bits, exponent, sanitize_overflow=False).to(tl.float32, bitcast=True) - 1.0
    p = _polynomial(f, _LOG, 8)
    return tl.fma(f, p, exponent.to(tl.int32, bitcast=True).to(tl.float32) * _LN2_SCALED)


@triton.jit
def _box_muller(word0, word1):
    """Two normals of two words."""
    radius = tl.sqrt_rn(_radius_squared(word0)).to(tl.uint32, bitcast=True)
    signed_radius = (radius ^ (word1 & 0x80000000)).to(tl.float32, bitcast=True)
    y = (word1 << 1).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    y2 = y * y
    c = _polynomial(y2, _COS, 5)
    s = _polynomial(y2, _SIN, 5)
    return signed_radius * c, signed_radius * (s * y)


@triton.jit
def _four_normals(counter, seed, t, repeat, DOMAIN: tl.constexpr):
    zero = counter * 0
    w0, w1, w2, w3 = _philox4x32_10(
        counter, zero + t, zero + DOMAIN, zero + repeat, seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    )
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def _normals(seed, tile, t, repeat, DOMAIN: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr):
    """The normals of a tile of a sample, float32 [TILE].

    A thread makes those of the elements that it reads and writes at once: four, or with a HALF type eight, so that none
    has to change threads.
    """
    first = tile.to(tl.uint32) * (TILE // 4)
    if HALF:
        counter = first + 2 * tl.arange(0, TILE // 8).to(tl.uint32)
        z0, z1, z2, z3 = _four_normals(counter, seed, t, repeat, DOMAIN)
        z4, z5, z6, z7 = _four_normals(counter + 1, seed, t, repeat, DOMAIN)
        even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
        odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    else:
        z0, z1, z2, z3 = _four_normals(first + tl.arange(0, TILE // 4).to(tl.uint32), seed, t, repeat, DOMAIN)
        even = tl.join(z0, z2)
        odd = tl.join(z1, z3)
    return tl.reshape(tl.join(even, odd), [TILE])


@triton.jit
def _exp_fixed(v):
    """exp(v) by the polynomials of csrc/step.h, float32 or float64."""
    if v.dtype == tl.float64:
        clamped = _clamp(v, -746.0, 710.0)
        k = (clamped * _LOG2E_64 + 1.5 * 2.0**52) - 1.5 * 2.0**52
        major = clamped - k * _LN2_HIGH_64
        minor = k * _LN2_LOW_64
        f = major - minor
        p = f * _EXP_64[0] + _EXP_64[1]
        for i in tl.static_range(2, 12):
            p = p * f + _EXP_64[i]
        p = (major + (f * f * p - minor)) + 1.0
        n = tl.where(k == k, k, 0.0).to(tl.int64)
        half = n >> 1
        return (p * _power_of_two_64(half)) * _power_of_two_64(n - half)
    else:
        clamped = _clamp(v, -104.0, 89.0)
        k = (clamped * _LOG2E + 1.5 * 2.0**23) - 1.5 * 2.0**23
        f = tl.fma(k, _LN2_LOW, tl.fma(k, _LN2_HIGH, clamped))
        p = _polynomial(f, _EXP, 7)
        n = tl.where(k == k, k, 0.0).to(tl.int32)
        half = n >> 1
        return (p * _power_of_two(half)) * _power_of_two(n - half)


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two_64(n):
    return ((n + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _divide(a, b, FLAGS: tl.constexpr):
    """a / b, correctly rounded: in float64 `/` is. A product where b is a reciprocal."""
    if _SCALARS & FLAGS:
        return a * b
    elif a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _square_root(v):
    if v.dtype == tl.float64:
        return tl.sqrt(v)
    else:
        return tl.sqrt_rn(v)


@triton.jit
def _clamp(v, low, high):
    """torch.clamp: NaN passes."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _round(v, NARROW: tl.constexpr):
    """An intermediate as the next operation sees it: rounded to a half type where the host would have stored one."""
    return v.to(NARROW).to(v.dtype)


@triton.jit
def _factor(coefficients, COLUMN: tl.constexpr, NARROW: tl.constexpr, FLAGS: tl.constexpr):
    """A multiplier: rounded as the state is, unless the host has it as a scalar."""
    value = tl.load(coefficients + COLUMN)
    if _SCALARS & FLAGS:
        return value
    else:
        return _round(value, NARROW)


@triton.jit
def _sample(batch, MANY: tl.constexpr):
    """The sample of this program, int32; at least `batch` for those that a grid of several layers has too many."""
    b = tl.program_id(1)
    if MANY:
        b += tl.program_id(2) * _ROWS_OF_GRID
    return b


@triton.jit
def _place(b, tile, lanes, quotient, DIVISOR: tl.constexpr, TILE: tl.constexpr):
    """The elements of a sample, the first one of this tile, and which lanes are inside the sample."""
    sample = quotient.to(tl.int64) * DIVISOR  # a multiple of DIVISOR, which the compiler sees this way
    first = tile.to(tl.int64) * TILE
    return sample, b.to(tl.int64) * sample + first, lanes < tl.minimum(sample - first, TILE).to(tl.int32)


@triton.jit
def _store(pointers, value, mask, valid, OTHERWISE: tl.constexpr):
    """Stores, OTHERWISE for a sample whose t is not in the chain; valid is None where there is no such thing."""
    if valid is not None:
        value = tl.where(valid, value, OTHERWISE)
    tl.store(pointers, value, mask=mask)


@triton.jit
def _row(t, t_to_row, row, b, chain, rows, SHARED_T: tl.constexpr):
    """The row of this sample, or -1 where its t is not in the chain."""
    if t is not None:
        at = tl.load(t) if SHARED_T else tl.load(t + b)
        inside = (at >= 0) & (at < chain)
        row = tl.load(t_to_row + tl.where(inside, at, 0))
        row = tl.where(inside & (row >= 0) & (row < rows), row, -1).to(tl.int32)
    return row


@triton.jit
def _guided(
    model_output, uncond_output, scale, m_elements, uncond_elements, mask, NARROW: tl.constexpr, WIDE: tl.constexpr
):
    """m; and, with guidance, how far apart the two outputs are."""
    m = tl.load(model_output + m_elements, mask=mask).to(WIDE)
    difference = m
    if scale is not None:
        uncond = tl.load(uncond_output + uncond_elements, mask=mask).to(WIDE)
        difference = _round(m - uncond, NARROW)
        m = _round(uncond + _round(scale * difference, NARROW), NARROW)
    return m, difference


@triton.jit
def _mean(coefficients, x, m, FLAGS: tl.constexpr, NARROW: tl.constexpr):
    """x' without its noise, and what it is made of: x0, x0 before the clip and before its division; e, and before its.

    Terms that the structure does not have are not in the sum; what nobody takes is not computed.
    """
    numerator = m
    if _X0_FROM_X & FLAGS:
        px = _factor(coefficients, _PX, NARROW, FLAGS)
        pm = _factor(coefficients, _PM, NARROW, FLAGS)
        numerator = _round(_round(px * x, NARROW) + _round(pm * m, NARROW), NARROW)
    raw = numerator
    if _X0_DIVIDE & FLAGS:
        raw = _round(_divide(numerator, tl.load(coefficients + _PD), FLAGS), NARROW)
    x0 = raw
    if _CLIP & FLAGS:
        x0 = _clamp(raw, _round(tl.load(coefficients + _LO), NARROW), _round(tl.load(coefficients + _HI), NARROW))
    if _HAS_A0 & FLAGS:
        total = _round(_factor(coefficients, _A0, NARROW, FLAGS) * x0, NARROW)
    if _HAS_AX & FLAGS:
        term = _round(_factor(coefficients, _AX, NARROW, FLAGS) * x, NARROW)
        if _HAS_A0 & FLAGS:
            total = _round(total + term, NARROW)
        else:
            total = term
    undivided = m
    e = m
    if _HAS_AE & FLAGS:
        if _EPS_REDERIVED & FLAGS:
            from_x = _round(_factor(coefficients, _GX, NARROW, FLAGS) * x, NARROW)
            undivided = _round(from_x - _round(_factor(coefficients, _G0, NARROW, FLAGS) * x0, NARROW), NARROW)
        elif _EPS_LINEAR & FLAGS:
            from_x = _round(_factor(coefficients, _EX, NARROW, FLAGS) * x, NARROW)
            undivided = _round(from_x + _round(_factor(coefficients, _EM, NARROW, FLAGS) * m, NARROW), NARROW)
        e = undivided
        if _EPS_DIVIDE & FLAGS:
            e = _round(_divide(undivided, tl.load(coefficients + _GD), FLAGS), NARROW)
        term = _round(_factor(coefficients, _AE, NARROW, FLAGS) * e, NARROW)
        if (_HAS_A0 | _HAS_AX) & FLAGS:
            total = _round(total + term, NARROW)
        else:
            total = term
    return total, x0, raw, numerator, e, undivided


@triton.jit
def _fraction(v, NARROW: tl.constexpr):
    """Where between the two bounds a learned log-variance lies."""
    return _round(_round(v + 1.0, NARROW) * 0.5, NARROW)


@triton.jit
def _learned_std(coefficients, v, VARIANCE: tl.constexpr, NARROW: tl.constexpr, FLAGS: tl.constexpr):
    """The standard deviation of an element, from the variance half of the model output."""
    if VARIANCE == _LEARNED_PLAIN:
        return _round(_square_root(v), NARROW)
    else:
        log_variance = v
        if VARIANCE == _LEARNED_RANGE:
            fraction = _fraction(v, NARROW)
            low = _round(_round(1.0 - fraction, NARROW) * _factor(coefficients, _MIN_LOG, NARROW, FLAGS), NARROW)
            high = _round(fraction * _factor(coefficients, _MAX_LOG, NARROW, FLAGS), NARROW)
            log_variance = _round(high + low, NARROW)
        return _round(_exp_fixed(_round(0.5 * log_variance, NARROW)), NARROW)


@triton.jit
def _real(bits, WIDE: tl.constexpr):
    """The number of these bits (`_bits`): Triton would hand a number over in float32."""
    if WIDE == tl.float64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _deviation(x_prev, mean, s, min_std):
    """How many standard deviations x' lies from its mean, NaN where there is no deviation; and that deviation."""
    std = tl.where(s < min_std, min_std, s)
    return tl.where(std == 0.0, float("nan"), _divide(x_prev - mean, std, 0)), std


@triton.jit
def _tile_sum(terms, inside, valid, OTHERWISE: tl.constexpr):
    """The tree sum of a tile, OTHERWISE for a sample whose t is not in the chain.

    Neighbours are added, then neighbours of the sums. A sum of two has only one order, so the bits do not depend on how
    the compiler lays elements out over threads. inside is None where the whole tile is in the sample.
    """
    if inside is not None:
        terms = tl.where(inside, terms, 0.0)
    for _ in tl.static_range(_LEVELS):
        if terms.shape[0] > 2:
            terms = tl.sum(tl.reshape(terms, [terms.shape[0] // 2, 2]), 1)
    total = tl.sum(terms, 0)
    if valid is not None:
        total = tl.where(valid, total, OTHERWISE)
    return total


@triton.jit
def _keep(pointer, terms, inside, valid):
    """Stores the sum of a tile of the gradients of a coefficient."""
    tl.store(pointer, _tile_sum(terms, inside, valid, 0.0))


@triton.jit
def _of_divisor(whole, divided, numerator, quotient, FLAGS: tl.constexpr):
    """The gradient of a divisor, or of the reciprocal that stands for it, element by element.

    whole: the gradient of numerator / divisor = quotient.  divided: that of the numerator.
    """
    if _SCALARS & FLAGS:
        return whole * numerator
    else:
        return -(divided * quotient)


@triton.jit
def _draw(
    noise, seeds, coefficients, b, tile, elements, mask, FLAGS: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr
):
    """The noise of a tile in the type that is computed in: the given one, or that of the sample's seed."""
    if seeds is None:
        z = tl.load(noise + elements, mask=mask)
    else:
        t = tl.load(coefficients + _T).to(tl.uint32)
        repeat = tl.load(coefficients + _REPEAT).to(tl.uint32)
        z = _normals(tl.load(seeds + b), tile, t, repeat, (_DOMAIN_BITS & FLAGS) >> _DOMAIN_SHIFT, HALF, TILE)
    return z.to(coefficients.dtype.element_ty)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _step_kernel(
    out,
    second,
    x,
    model_output,
    uncond_output,
    noise,
    guidance_scale,
    seeds,
    table,
    t,
    t_to_row,
    row: tl.int32,
    quotient: tl.int64,
    batch: tl.int32,
    chain: tl.int32,
    rows: tl.int32,
    FLAGS: tl.constexpr,
    SHARED_T: tl.constexpr,
    SHARED_SCALE: tl.constexpr,
    WIDE_UNCOND: tl.constexpr,
    HALF: tl.constexpr,
    DIVISOR: tl.constexpr,
    MASKED: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
):
    WIDE: tl.constexpr = table.dtype.element_ty
    NARROW: tl.constexpr = x.dtype.element_ty if _HOST_ROUNDING & FLAGS else WIDE
    VARIANCE: tl.constexpr = (_VARIANCE_BITS & FLAGS) >> _VARIANCE_SHIFT
    SECOND: tl.constexpr = (_SECOND_BITS & FLAGS) >> _SECOND_SHIFT
    LEARNED: tl.constexpr = VARIANCE >= _LEARNED_LOG
    b = _sample(batch, MANY)
    if MANY:
        if b >= batch:
            return
    tile = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    sample, start, inside = _place(b, tile, lanes, quotient, DIVISOR, TILE)
    mask = inside if MASKED else None
    wide_start = start + b.to(tl.int64) * sample  # of a model output that has a variance half

    row = _row(t, t_to_row, row, b, chain, rows, SHARED_T)
    valid = None if t is None else row >= 0
    coefficients = table + (row if t is None else tl.maximum(row, 0)) * _COLUMNS
    state = tl.load(x + start + lanes, mask=mask).to(WIDE)
    m = state  # a structure without x0 and eps never looks at it
    if model_output is not None:
        scale = None if guidance_scale is None else tl.load(guidance_scale if SHARED_SCALE else guidance_scale + b)
        m_start = wide_start if LEARNED else start
        uncond_start = wide_start if WIDE_UNCOND else start
        m, _ = _guided(model_output, uncond_output, scale, m_start + lanes, uncond_start + lanes, mask, NARROW, WIDE)

    total, x0, _, _, _, _ = _mean(coefficients, state, m, FLAGS, NARROW)
    if VARIANCE:
        z = _draw(noise, seeds, coefficients, b, tile, start + lanes, mask, FLAGS, HALF, TILE)
        s = _factor(coefficients, _S, NARROW, FLAGS)
        if LEARNED:
            v = tl.load(model_output + wide_start + sample + lanes, mask=mask).to(WIDE)
            scaled = _round(s * _learned_std(coefficients, v, VARIANCE, NARROW, FLAGS), NARROW)
        else:
            scaled = s
        total = _round(total + _round(scaled * _round(z, NARROW), NARROW), NARROW)
    _store(out + start + lanes, total, mask, valid, float("nan"))

    if second is not None:
        if SECOND == _X0:
            other = x0
        elif SECOND == _NOISE:
            other = z
        else:
            from_z = _round(_factor(coefficients, _AX, NARROW, FLAGS) * _round(z, NARROW), NARROW)
            other = _round(from_z - _round(s * state, NARROW), NARROW)
        _store(second + start + lanes, other, mask, valid, float("nan"))


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _distance_kernel(
    out,
    squares,
    x_prev,
    x,
    model_output,
    uncond_output,
    noise,
    guidance_scale,
    seeds,
    table,
    t,
    t_to_row,
    partials,
    row: tl.int32,
    quotient: tl.int64,
    batch: tl.int32,
    chain: tl.int32,
    rows: tl.int32,
    min_std: tl.int64,
    FLAGS: tl.constexpr,
    SHARED_T: tl.constexpr,
    SHARED_SCALE: tl.constexpr,
    WIDE_UNCOND: tl.constexpr,  # never here: no variance is learned
    HALF: tl.constexpr,
    DIVISOR: tl.constexpr,
    MASKED: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
):
    WIDE: tl.constexpr = table.dtype.element_ty
    STATE: tl.constexpr = x.dtype.element_ty
    NARROW: tl.constexpr = STATE if _HOST_ROUNDING & FLAGS else WIDE
    b = _sample(batch, MANY)
    if MANY:
        if b >= batch:
            return
    tile = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    _, start, inside = _place(b, tile, lanes, quotient, DIVISOR, TILE)
    mask = inside if MASKED else None
    elements = start + lanes

    row = _row(t, t_to_row, row, b, chain, rows, SHARED_T)
    valid = None if t is None else row >= 0
    coefficients = table + (row if t is None else tl.maximum(row, 0)) * _COLUMNS
    state = tl.load(x + elements, mask=mask).to(WIDE)
    m = state  # a structure without x0 and eps never looks at it
    if model_output is not None:
        scale = None if guidance_scale is None else tl.load(guidance_scale if SHARED_SCALE else guidance_scale + b)
        m, _ = _guided(model_output, uncond_output, scale, elements, elements, mask, NARROW, WIDE)

    mean, _, _, _, _, _ = _mean(coefficients, state, m, FLAGS, NARROW)
    s = _factor(coefficients, _S, NARROW, FLAGS)
    if x_prev is None:
        z = _draw(noise, seeds, coefficients, b, tile, elements, mask, FLAGS, HALF, TILE)
        reached = _round(mean + _round(s * _round(z, NARROW), NARROW), NARROW).to(STATE)
        _store(out + elements, reached, mask, valid, float("nan"))
    else:
        reached = tl.load(x_prev + elements, mask=mask)
    away, _ = _deviation(reached.to(WIDE), mean, s, _real(min_std, WIDE))
    square = away * away
    if squares is not None:
        _store(squares + elements, square, mask, valid, float("nan"))
    if partials is not None:
        at = b.to(tl.int64) * tl.num_programs(0) + tile
        tl.store(partials + at, _tile_sum(square, mask, valid, float("nan")))


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _backward_kernel(
    grad_x,
    grad_model_output,
    grad_uncond_output,
    grad_noise,
    grad,
    grad_second,
    x,
    model_output,
    uncond_output,
    noise,
    x_prev,
    grad_squares,
    guidance_scale,
    seeds,
    table,
    t,
    t_to_row,
    grad_distance,
    partials,
    row: tl.int32,
    quotient: tl.int64,
    batch: tl.int32,
    chain: tl.int32,
    rows: tl.int32,
    min_std: tl.int64,
    FLAGS: tl.constexpr,
    X0_REACHED: tl.constexpr,
    X0_MASKED: tl.constexpr,
    VARIED: tl.constexpr,
    SHARED_T: tl.constexpr,
    SHARED_SCALE: tl.constexpr,
    WIDE_UNCOND: tl.constexpr,
    HALF: tl.constexpr,
    DIVISOR: tl.constexpr,
    MASKED: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
):
    WIDE: tl.constexpr = table.dtype.element_ty
    LIKE: tl.constexpr = 0 if grad is not None else 1 if grad_second is not None else 2
    STATE: tl.constexpr = (
        grad.dtype.element_ty if LIKE == 0 else (grad_second.dtype.element_ty if LIKE == 1 else x_prev.dtype.element_ty)
    )
    NARROW: tl.constexpr = STATE if _HOST_ROUNDING & FLAGS else WIDE
    VARIANCE: tl.constexpr = (_VARIANCE_BITS & FLAGS) >> _VARIANCE_SHIFT
    SECOND: tl.constexpr = (_SECOND_BITS & FLAGS) >> _SECOND_SHIFT
    LEARNED: tl.constexpr = VARIANCE >= _LEARNED_LOG
    b = _sample(batch, MANY)
    if MANY:
        if b >= batch:
            return
    tile = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    sample, start, inside = _place(b, tile, lanes, quotient, DIVISOR, TILE)
    mask = inside if MASKED else None
    wide_start = start + b.to(tl.int64) * sample
    m_start = wide_start if LEARNED else start
    uncond_start = wide_start if WIDE_UNCOND else start
    row = _row(t, t_to_row, row, b, chain, rows, SHARED_T)
    valid = None if t is None else row >= 0
    coefficients = table + (row if t is None else tl.maximum(row, 0)) * _COLUMNS
    scale = None if guidance_scale is None else tl.load(guidance_scale if SHARED_SCALE else guidance_scale + b)
    SUMS: tl.constexpr = partials is not None
    DISTANCE: tl.constexpr = x_prev is not None
    HAS_MEAN: tl.constexpr = (grad is not None) | DISTANCE
    DRAWN: tl.constexpr = (noise is not None) | (seeds is not None)
    if SUMS:
        sums = partials + (b.to(tl.int64) * tl.num_programs(0) + tile) * (_COLUMNS + 1)

    if grad is not None:
        g = tl.load(grad + start + lanes, mask=mask).to(WIDE)
        gm = g  # of the mean
    if X0_MASKED | SUMS | DISTANCE:
        # the step again; of x and m, what the structure does not look at may be missing, and the other stands in for it
        if x is not None:
            state = tl.load(x + start + lanes, mask=mask).to(WIDE)
        if model_output is None:
            m = state
        else:
            m, apart = _guided(
                model_output, uncond_output, scale, m_start + lanes, uncond_start + lanes, mask, NARROW, WIDE
            )
        if x is None:
            state = m
        mean, x0, raw, numerator, e, undivided = _mean(coefficients, state, m, FLAGS, NARROW)
    if DRAWN:
        z = _round(_draw(noise, seeds, coefficients, b, tile, start + lanes, mask, FLAGS, HALF, TILE), NARROW)

    ax_terms = tl.zeros([TILE], WIDE)
    s_terms = tl.zeros([TILE], WIDE)
    d0 = tl.zeros([TILE], WIDE)
    dx = tl.zeros([TILE], WIDE)
    dm = tl.zeros([TILE], WIDE)
    dz = tl.zeros([TILE], WIDE)
    dv = tl.zeros([TILE], WIDE)
    if DISTANCE:
        s = _factor(coefficients, _S, NARROW, FLAGS)
        least = _real(min_std, WIDE)
        away, deviation = _deviation(tl.load(x_prev + start + lanes, mask=mask).to(WIDE), mean, s, least)
        if grad_squares is None:
            weight = tl.load(grad_distance + b) * -2.0
        else:
            weight = tl.load(grad_squares + start + lanes, mask=mask) * -2.0
        gm = _divide(weight * away, deviation, 0)
        if grad is not None:
            gm = g + gm
    if HAS_MEAN:
        if _HAS_A0 & FLAGS:
            d0 = _factor(coefficients, _A0, NARROW, FLAGS) * gm
            if SUMS:
                _keep(sums + _A0, gm * x0, mask, valid)
        if _HAS_AX & FLAGS:
            dx = _factor(coefficients, _AX, NARROW, FLAGS) * gm
            if SUMS:
                ax_terms = gm * state
    if grad is not None:
        if not LEARNED:
            if VARIANCE:
                dz = _factor(coefficients, _S, NARROW, FLAGS) * g
                if SUMS:
                    s_terms = g * z
        elif VARIED:
            s = _factor(coefficients, _S, NARROW, FLAGS)
            v = tl.load(model_output + wide_start + sample + lanes, mask=mask).to(WIDE)
            std = _learned_std(coefficients, v, VARIANCE, NARROW, FLAGS)
            dz = _round(s * std, NARROW) * g
            if DRAWN:
                dstd = s * (g * z)
                if VARIANCE == _LEARNED_PLAIN:
                    dv = _divide(dstd * 0.5, std, 0)
                else:
                    dv = (dstd * std) * 0.5
                if SUMS:
                    s_terms = g * (std * z)
                if VARIANCE == _LEARNED_RANGE:
                    if SUMS:
                        fraction = _fraction(v, NARROW)
                        _keep(sums + _MAX_LOG, dv * fraction, mask, valid)
                        _keep(sums + _MIN_LOG, dv * (1.0 - fraction), mask, valid)
                    low = _factor(coefficients, _MIN_LOG, NARROW, FLAGS)
                    high = _factor(coefficients, _MAX_LOG, NARROW, FLAGS)
                    dv = dv * (0.5 * (high - low))
    if grad_second is not None:
        h = tl.load(grad_second + start + lanes, mask=mask).to(WIDE)
        if SECOND == _X0:
            d0 = d0 + h
        elif SECOND == _NOISE:
            dz = dz + h
        else:
            dz = dz + _factor(coefficients, _AX, NARROW, FLAGS) * h
            dx = dx - _factor(coefficients, _S, NARROW, FLAGS) * h
            if SUMS:
                ax_terms = ax_terms + h * z
                s_terms = s_terms - h * state
    if SUMS:
        if DISTANCE:
            s_terms = s_terms + tl.where(s < least, 0.0, _divide(weight * (away * away), deviation, 0))
        if _HAS_AX & FLAGS:
            _keep(sums + _AX, ax_terms, mask, valid)
        if VARIANCE:
            _keep(sums + _S, s_terms, mask, valid)
    if _HAS_AE & FLAGS:
        if HAS_MEAN:
            whole = _factor(coefficients, _AE, NARROW, FLAGS) * gm
            de = whole
            if _EPS_DIVIDE & FLAGS:
                de = _divide(whole, tl.load(coefficients + _GD), FLAGS)
            if SUMS:
                _keep(sums + _AE, gm * e, mask, valid)
                if _EPS_DIVIDE & FLAGS:
                    _keep(sums + _GD, _of_divisor(whole, de, undivided, e, FLAGS), mask, valid)
            if _EPS_REDERIVED & FLAGS:
                dx = dx + _factor(coefficients, _GX, NARROW, FLAGS) * de
                d0 = d0 - _factor(coefficients, _G0, NARROW, FLAGS) * de
                if SUMS:
                    _keep(sums + _GX, de * state, mask, valid)
                    _keep(sums + _G0, -(de * x0), mask, valid)
            elif _EPS_LINEAR & FLAGS:
                dx = dx + _factor(coefficients, _EX, NARROW, FLAGS) * de
                dm = dm + _factor(coefficients, _EM, NARROW, FLAGS) * de
                if SUMS:
                    _keep(sums + _EX, de * state, mask, valid)
                    _keep(sums + _EM, de * m, mask, valid)
            else:
                dm = dm + de

    if X0_MASKED:
        below = raw < _round(tl.load(coefficients + _LO), NARROW)
        above = raw > _round(tl.load(coefficients + _HI), NARROW)
        if SUMS:
            _keep(sums + _LO, tl.where(below, d0, 0.0), mask, valid)
            _keep(sums + _HI, tl.where(above, d0, 0.0), mask, valid)
        d0 = tl.where(below | above, 0.0, d0)
    if X0_REACHED:
        if _X0_DIVIDE & FLAGS:
            whole = d0
            d0 = _divide(whole, tl.load(coefficients + _PD), FLAGS)
            if SUMS:
                _keep(sums + _PD, _of_divisor(whole, d0, numerator, raw, FLAGS), mask, valid)
        if _X0_FROM_X & FLAGS:
            dx = dx + _factor(coefficients, _PX, NARROW, FLAGS) * d0
            dm = dm + _factor(coefficients, _PM, NARROW, FLAGS) * d0
            if SUMS:
                _keep(sums + _PX, d0 * state, mask, valid)
                _keep(sums + _PM, d0 * m, mask, valid)
        else:
            dm = dm + d0

    if grad_x is not None:
        _store(grad_x + start + lanes, dx, mask, valid, 0.0)
    if grad_noise is not None:
        _store(grad_noise + start + lanes, dz, mask, valid, 0.0)
    dcond = dm
    if guidance_scale is not None:
        dcond = scale * dm
        if SUMS:
            if uncond_output is not None:
                _keep(sums + _COLUMNS, dm * apart, mask, valid)
    if grad_model_output is not None:
        _store(grad_model_output + m_start + lanes, dcond, mask, valid, 0.0)
        if LEARNED:
            _store(grad_model_output + m_start + sample + lanes, dv, mask, valid, 0.0)
    if grad_uncond_output is not None:
        _store(grad_uncond_output + uncond_start + lanes, dm - dcond, mask, valid, 0.0)
        if WIDE_UNCOND:
            tl.store(grad_uncond_output + uncond_start + sample + lanes, tl.zeros([TILE], WIDE), mask=mask)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _normals_kernel(
    out,
    seeds,
    t: tl.int64,
    repeat: tl.int64,
    quotient: tl.int64,
    batch: tl.int32,
    DOMAIN: tl.constexpr,
    HALF: tl.constexpr,
    DIVISOR: tl.constexpr,
    MASKED: tl.constexpr,
    MANY: tl.constexpr,
    TILE: tl.constexpr,
):
    b = _sample(batch, MANY)
    if MANY:
        if b >= batch:
            return
    tile = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    _, start, inside = _place(b, tile, lanes, quotient, DIVISOR, TILE)
    z = _normals(tl.load(seeds + b), tile, t.to(tl.uint32), repeat.to(tl.uint32), DOMAIN, HALF, TILE)
    tl.store(out + start + lanes, z, mask=inside if MASKED else None)


class _Launcher:
    """A kernel, and what of it has been compiled, to be launched without looking at every argument again."""

    def __init__(self, kernel: Any, options: dict[str, Any] = _OPTIONS) -> None:
        self.kernel = kernel
        self.options = options
        self.compiled: dict[tuple[object, ...], Any] = {}
        # A handle is Triton's own business: the first one used shows whether it is launched as this version does it. On
        # ROCm a kernel depends on the size of its operands too.
        self.reuse = torch.version.hip is None
        self.proven = False

    def __call__(
        self,
        grid: tuple[int, int, int],
        large: Sequence[Tensor | None],
        small: Sequence[Tensor | None],
        integers: Sequence[int],
        constants: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """Launches on the current stream of `device`.

        large, small, integers, constants: the arguments of the kernel in its order: operands that are read or written
        tile by tile, others (`_SMALL`), numbers (`_INTEGERS`), constexprs.
        """
        if device.index is not None and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(grid, large, small, integers, constants, device)
        arguments = (*large, *small, *integers, *constants)
        key = launch_key(device, large, small, constants)
        compiled = self.compiled.get(key)
        if compiled is not None:
            try:
                compiled[grid](*arguments)
                self.proven = True
                return
            except (AttributeError, TypeError):  # of a handle that takes other arguments, which launches nothing
                if self.proven:
                    raise
                self.reuse = False
                self.compiled.clear()
        compiled = self.kernel[grid](*arguments, **self.options)
        if self.reuse and compiled is not None:
            self.compiled[key] = compiled


def launch_key(
    device: torch.device, large: Sequence[Tensor | None], small: Sequence[Tensor | None], constants: tuple[int, ...]
) -> tuple[object, ...]:
    """All that a compiled kernel depends on: calls of equal keys may share one.

    large: operands whose alignment to 16 bytes decides how they are read.  small: those where it does not.  The values
    of numbers do not matter, those of constants do.
    """
    return (
        device.index,
        constants,
        *[None if p is None else (p.dtype, p.data_ptr() % 16 == 0) for p in large],
        *[None if p is None else p.dtype for p in small],
    )


_launch_step = _Launcher(_step_kernel)
_launch_distance = _Launcher(_distance_kernel)
_launch_backward = _Launcher(_backward_kernel)
_launch_sums = _Launcher(_backward_kernel, _SUM_OPTIONS)
_launch_normals = _Launcher(_normals_kernel)


def step(
    out: Tensor,
    second: Tensor | None,
    x: Tensor,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    t_to_row: Tensor | None,
    row: int,
    flags: int,
) -> None:
    """One step of a sampler, x_t -> x_{t-1}: the operator fastdiff::step.

    Args:
        out: x' in x's dtype; x itself (in place), exactly the memory of another input of that dtype, or its own.
        second: like x, own memory: x0, the noise or v = ax*noise - s*x, as flags say.
        x: the state [B, ...], float32, float64, float16 or bfloat16.
        model_output: like x, [B, 2C, ...] with a learned variance; x's dtype, or a half type beside a float32 x.
        uncond_output, guidance_scale: the output without the condition, like model_output or x, and the scale, [B] or
            [1], in the table's dtype.
        noise: like x, in its dtype, float32 or a half type.  seeds: int64 [B].  One of them where there is a variance.
        table: [S, 18], float32, or float64 for a float64 x.
        t, t_to_row: int64 [B] or [1], and the row of each timestep, int64 [T], negative for none. A sample whose t is
            not in the chain becomes NaN.
        row: of all samples, where t is None.
        flags: the bits of a structure and of a call (csrc/step.h).

    Raises:
        ValueError: an operand of another shape or on another device, by name; row outside the table; not exactly one of
            noise and seeds.
    """
    variance = flags >> tables.VARIANCE_SHIFT & 7
    learned = variance >= _LEARNED_LOG.value
    if not variance:
        noise = seeds = None
    else:
        _check_noise(noise, seeds)
    second_is_x0 = second is not None and flags >> tables.SECOND_SHIFT & 3 == _X0.value
    if not (learned or second_is_x0 or flags & (tables.HAS_A0 | tables.HAS_AE)):
        model_output = uncond_output = guidance_scale = None
    elif model_output is None:
        raise ValueError("model_output: expected a tensor, which this structure looks at")
    if (uncond_output is None) != (guidance_scale is None):
        raise ValueError("uncond_output and guidance_scale: expected both or neither")
    _run(
        _launch_step,
        x,
        {"out": out, "second": second},
        {"x": x, "model_output": model_output, "uncond_output": uncond_output, "noise": noise},
        (guidance_scale, seeds, table, t, t_to_row),
        row,
        learned,
        (flags,),
    )


def step_distance(
    out: Tensor | None,
    squares: Tensor | None,
    distance: Tensor | None,
    x_prev: Tensor | None,
    x: Tensor,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    t_to_row: Tensor | None,
    row: int,
    flags: int,
    min_std: float,
) -> None:
    """How far x' lies from the mean of its step, in standard deviations, squared: the operator fastdiff::step_distance.

    Args:
        out: x' as `step` gives and takes it, with noise or seeds: the step is done.
        x_prev: or a given x', in x's dtype, without noise and seeds.
        squares: like x, in the table's dtype, own memory: ((x' - mean) / std)^2 of each element, x' as it was rounded.
            NaN where std is 0.
        distance: [B], in the table's dtype: their sum over a sample, by a balanced tree over its row-major elements.
        x, model_output, uncond_output, guidance_scale, noise, seeds, table, t, t_to_row, row, flags: as for `step`. A
            sample whose t is not in the chain becomes NaN.
        min_std: what std is at least taken to be.

    Raises:
        ValueError: as `step`; a structure without a variance or with a learned one; not exactly one of out and x_prev;
            neither squares nor distance.
    """
    variance = flags >> tables.VARIANCE_SHIFT & 7
    if variance != _FIXED.value:
        raise ValueError(f"flags: expected a structure with a fixed variance, got variance {variance}")
    if (out is None) == (x_prev is None):
        raise ValueError(f"out and x_prev: expected one of them, got {'neither' if out is None else 'both'}")
    if squares is None and distance is None:
        raise ValueError("squares and distance: expected at least one tensor, got neither")
    if x_prev is None:
        _check_noise(noise, seeds)
    elif noise is not None or seeds is not None:
        raise ValueError("noise and seeds: expected neither beside x_prev, got a tensor")
    if not flags & (tables.HAS_A0 | tables.HAS_AE):
        model_output = uncond_output = guidance_scale = None
    elif model_output is None:
        raise ValueError("model_output: expected a tensor, which this structure looks at")
    if (uncond_output is None) != (guidance_scale is None):
        raise ValueError("uncond_output and guidance_scale: expected both or neither")
    partials = _partials("distance", distance, x, ())
    _run(
        _launch_distance,
        x,
        {"out": out, "squares": squares},
        {"x_prev": x_prev, "x": x, "model_output": model_output, "uncond_output": uncond_output, "noise": noise},
        (guidance_scale, seeds, table, t, t_to_row),
        row,
        False,
        (flags,),
        (partials,),
        (_bits(min_std, table.dtype),),
        partials is not None,
    )
    _add_up(partials, distance)


def step_backward(
    grad_x: Tensor | None,
    grad_model_output: Tensor | None,
    grad_uncond_output: Tensor | None,
    grad_noise: Tensor | None,
    grad: Tensor | None,
    grad_second: Tensor | None,
    x: Tensor | None,
    model_output: Tensor | None,
    uncond_output: Tensor | None,
    guidance_scale: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    table: Tensor,
    t: Tensor | None,
    t_to_row: Tensor | None,
    row: int,
    flags: int,
    sums: Tensor | None = None,
    x_prev: Tensor | None = None,
    grad_distance: Tensor | None = None,
    min_std: float = 0.0,
) -> None:
    """The closed-form gradient of a step: the operator fastdiff::step_backward.

    Nothing of the forward is kept but its operands: x0 is computed again where it may have been clipped, noise is made
    again from its seeds. No intermediate gradient is rounded to a half type.

    Args:
        grad_x, grad_model_output, grad_uncond_output, grad_noise: what is written, each like the operand whose gradient
            it is, or None where it is not asked for. The variance half of grad_uncond_output becomes 0.
        grad, grad_second: gradients of x' and of the second output, in x's dtype. Of these and grad_distance, some may
            be None.
        x, model_output, uncond_output: as in the forward. Without sums and grad_distance None where they are not
            needed: all three without a clip that masks (x too where x0 is the model output), save a model_output with a
            learned variance beside grad.
        guidance_scale, table, t, t_to_row, row: as for `step`. A sample whose t is not in the chain has gradient 0.
        noise, seeds: as for `step`; needed for the gradients of a learned variance and, for sums, of any variance.
        flags: as for `step`, and STRAIGHT_THROUGH: the clip passes every gradient, else that of x0 inside and at the
            bounds of its range (and of NaN).
        sums: [B, columns of the table + 1], in the table's dtype: written are the gradients of the row of each sample
            and, last, of its guidance scale, summed over its row-major elements by a balanced tree.
        x_prev, grad_distance: x' as the step returned it, like x, and the gradient of its distance from the mean (see
            `step_distance`), [B], or of the squares, like x, in the table's dtype. x' counts as a constant there.
        min_std: as for `step_distance`.

    Raises:
        ValueError: as `step`; an operand that is needed is None; grad_distance without a fixed variance.
    """
    variance = flags >> tables.VARIANCE_SHIFT & 7
    state = next((s for s in (grad, grad_second, x_prev) if s is not None), None)
    if state is None:
        raise ValueError("grad and grad_second: expected at least one tensor, or grad_distance")
    if (x_prev is None) != (grad_distance is None):
        raise ValueError("x_prev and grad_distance: expected both or neither")
    if grad_distance is not None and variance != _FIXED.value:
        raise ValueError(
            f"grad_distance: expected None without a fixed variance, got a tensor with variance {variance}"
        )
    learned = variance >= _LEARNED_LOG.value
    second = None if grad_second is None else flags >> tables.SECOND_SHIFT & 3
    again = sums is not None or grad_distance is not None  # the whole step is computed again
    through_mean = grad is not None or grad_distance is not None
    x0_wanted = any(u is not None for u in (grad_x, grad_model_output, grad_uncond_output, sums))
    x0_reached = x0_wanted and (
        second == _X0.value or (through_mean and flags & (tables.HAS_A0 | tables.EPS_REDERIVED) != 0)
    )
    x0_masked = x0_reached and flags & tables.CLIP != 0 and not flags & tables.STRAIGHT_THROUGH
    variance_wanted = any(u is not None for u in (grad_model_output, grad_noise, sums))
    varied = learned and grad is not None and variance_wanted
    looked_at = learned or second == _X0.value or flags & (tables.HAS_A0 | tables.HAS_AE) != 0
    if not (again or (x0_masked and flags & tables.X0_FROM_X)):
        x = None
    elif x is None:
        raise ValueError("x: expected a tensor, to see where x0 was clipped or what else the step was")
    if not (x0_masked or varied or (again and looked_at)):
        model_output = None
    elif model_output is None:
        raise ValueError("model_output: expected a tensor, to see where x0 was clipped and what the variance was")
    if guidance_scale is None or not (x0_masked or (again and looked_at)):
        uncond_output = None
    elif uncond_output is None:
        raise ValueError("uncond_output: expected a tensor, to see where x0 was clipped or what else the step was")
    drawn = varied and (grad_model_output is not None or sums is not None)
    if sums is not None and variance == _FIXED.value:
        drawn = grad is not None or second == _VELOCITY.value
    if drawn:
        _check_noise(noise, seeds)
    else:
        noise = seeds = None
    of_elements = of_samples = None
    if grad_distance is None or grad_distance.dim() > 1:
        of_elements = grad_distance
    else:
        of_samples = grad_distance
        _check_vector("grad_distance", of_samples, state.shape[0], state.device, False)
    partials = _partials("sums", sums, state, (len(tables.COLUMNS) + 1,))
    _run(
        _launch_backward if sums is None else _launch_sums,
        state,
        {
            "grad_x": grad_x,
            "grad_model_output": grad_model_output,
            "grad_uncond_output": grad_uncond_output,
            "grad_noise": grad_noise,
        },
        {
            "grad": grad,
            "grad_second": grad_second,
            "x": x,
            "model_output": model_output,
            "uncond_output": uncond_output,
            "noise": noise,
            "x_prev": x_prev,
            "grad_distance": of_elements,
        },
        (guidance_scale, seeds, table, t, t_to_row),
        row,
        learned,
        (flags & ~tables.STRAIGHT_THROUGH, x0_reached, x0_masked, varied),
        (of_samples, partials),
        (_bits(min_std, table.dtype),),
        of_samples is not None or partials is not None,
    )
    _add_up(partials, sums)


def normals(out: Tensor, seeds: Tensor, t: int, repeat: int, domain: int) -> None:
    """Fills out with the normals of the noise contract: the operator fastdiff::normals.

    Args:
        out: [B, ...], contiguous, a floating dtype; at most 2^34 elements per sample.
        seeds: int64 [B].
        t, repeat: noise words, in [0, 2^32).
        domain: 0 initial, 1 step, 2 forward.

    Raises:
        ValueError: out is not contiguous; seeds are not one for each sample, or on another device.
    """
    if out.dim() < 1 or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor [batch, ...], got strides {out.stride()}")
    _check_vector("seeds", seeds, out.shape[0], out.device, False)
    if out.numel() == 0:
        return
    grid, quotient, geometry = _geometry(out.shape[0], out.numel() // out.shape[0])
    half = out.element_size() == 2
    integers = (t, repeat, quotient, out.shape[0])
    _launch_normals(grid, (out,), (seeds.contiguous(),), integers, (domain, half, *geometry), out.device)


def _run(
    launch: _Launcher,
    state: Tensor,
    outputs: dict[str, Tensor | None],
    inputs: dict[str, Tensor | None],
    small: tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None],
    row: int,
    learned: bool,
    constants: tuple[int, ...],
    more_small: tuple[Tensor | None, ...] = (),
    more_integers: tuple[int, ...] = (),
    one_by_one: bool = False,
) -> None:
    """Checks, lays out and launches a step or a backward over tensors like `state`.

    more_small, more_integers: arguments of the kernel behind those that all have.  one_by_one: a program must stay
    inside a sample for these, and what it adds up lie in row-major order.
    """
    scale, seeds, table, t, t_to_row = small
    shape, device = state.shape, state.device
    batch, elements = shape[0], state.numel()
    wide_unconds = set()
    operands = []
    contiguous, half = True, False
    for name, operand in (*outputs.items(), *inputs.items()):
        if operand is None:
            continue
        expected: Sequence[int] = shape
        if learned and "output" in name:
            wide = (batch, 2 * shape[1], *shape[2:])
            if "uncond" in name:
                wide_unconds.add(operand.shape == wide)
            if "uncond" not in name or operand.shape == wide:
                expected = wide
        if operand.shape != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(operand.shape)}")
        if operand.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {operand.device}")
        operands.append(operand)
        contiguous = contiguous and operand.is_contiguous()
        half = half or operand.element_size() == 2
    if len(wide_unconds) > 1:
        raise ValueError("grad_uncond_output: expected the shape of uncond_output, got another")
    chain, rows = 0, table.shape[0]
    if t is None:
        t_to_row = None
        if not 0 <= row < rows:
            raise ValueError(f"row: expected 0 to {rows - 1}, got {row}")
    else:
        _check_vector("t", t, batch, device, True)
        if t_to_row is None:
            raise ValueError("t_to_row: expected a tensor beside t, got None")
        chain = t_to_row.shape[0]
    if seeds is not None:
        _check_vector("seeds", seeds, batch, device, False)
    if scale is not None:
        _check_vector("guidance_scale", scale, batch, device, True)
    if elements == 0:
        return

    shared_t, shared_scale = t is None or t.numel() == 1, scale is None or scale.numel() == 1
    apart = batch > 1 and (learned or seeds is not None or not shared_t or not shared_scale or one_by_one)
    results = list(outputs.values())
    arguments = list(inputs.values())
    # noise is numbered, and a variance half placed, in row-major order
    direct = contiguous or not (learned or seeds is not None or one_by_one) and _walkable(operands, shape, apart)
    if not direct:
        arguments = [None if a is None else a.contiguous() for a in arguments]
        results = [None if r is None else torch.empty(r.shape, dtype=r.dtype, device=device) for r in results]
    samples = batch if apart else 1
    grid, quotient, geometry = _geometry(samples, elements // samples)
    launch(
        grid,
        (*results, *arguments),
        [s if s is None else s.contiguous() for s in (scale, seeds, table, t, t_to_row, *more_small)],
        (row, quotient, samples, chain, rows, *more_integers),
        (*constants, shared_t, shared_scale, wide_unconds == {True}, half and seeds is not None, *geometry),
        device,
    )
    if not direct:
        for output, result in zip(outputs.values(), results, strict=True):
            if output is not None and result is not None:
                output.copy_(result)


def _partials(name: str, sums: Tensor | None, state: Tensor, columns: tuple[int, ...]) -> Tensor | None:
    """What programs leave of sums over the samples of `state`, [B, tiles, *columns]: 0 where they leave nothing."""
    if sums is None:
        return None
    batch, *sample = state.shape
    if sums.shape != (batch, *columns):
        raise ValueError(f"{name}: expected shape {[batch, *columns]}, got {list(sums.shape)}")
    if sums.device != state.device:
        raise ValueError(f"{name}: expected a tensor on {state.device}, got {sums.device}")
    tiles = max(1, -(-math.prod(sample) // _TILE))
    return sums.new_zeros((batch, tiles, *columns))


def _add_up(partials: Tensor | None, sums: Tensor | None) -> None:
    """Ends the trees that the programs began."""
    if partials is not None and sums is not None:
        sums.copy_(tree_sum(partials.movedim(1, -1)))


def _bits(value: float, dtype: torch.dtype) -> int:
    """The bits of a number, rounded to float32 or float64."""
    number, word = ("<d", "<q") if dtype == torch.float64 else ("<f", "<i")
    (bits,) = struct.unpack(word, struct.pack(number, value))
    return int(bits)


def _check_noise(noise: Tensor | None, seeds: Tensor | None) -> None:
    if (noise is None) == (seeds is None):
        raise ValueError(f"noise and seeds: expected one of them, got {'neither' if noise is None else 'both'}")


def _check_vector(name: str, vector: Tensor, batch: int, device: torch.device, shared: bool) -> None:
    if vector.dim() != 1 or not (vector.shape[0] == batch or (shared and vector.shape[0] == 1)):
        raise ValueError(f"{name}: expected shape [{batch}]{' or [1]' if shared else ''}, got {list(vector.shape)}")
    if vector.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {vector.device}")


def _walkable(operands: Sequence[Tensor], shape: Sequence[int], apart: bool) -> bool:
    """Whether one walk along memory meets the same element in all operands; apart: sample by sample."""
    layouts = [[(s, n) for s, n in zip(operand.stride(), shape, strict=True) if n > 1] for operand in operands]
    if any(layout != layouts[0] for layout in layouts):
        return False
    inside = 1
    for stride, n in sorted(layouts[0]):
        if stride != inside:
            return False
        inside *= n
    return not apart or operands[0].stride(0) * shape[0] == inside


def _geometry(batch: int, sample: int) -> tuple[tuple[int, int, int], int, tuple[int, ...]]:
    """The grid of `batch` samples of `sample` elements, sample // DIVISOR, and (DIVISOR, MASKED, MANY, TILE)."""
    # what the compiler may rely on when it joins accesses: eight elements are 16 bytes of a half type
    divisor = min(sample & -sample, 8)
    grid = (-(-sample // _TILE), min(batch, _GRID_LIMIT), -(-batch // _GRID_LIMIT))
    return grid, sample // divisor, (divisor, sample % _TILE != 0, batch > _GRID_LIMIT, _TILE)
