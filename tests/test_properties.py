"""Whatever a call combines, the backends agree in every bit: layouts, ranks, dtypes, guidance, noise, t, out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import native, ops
from fastdiff.noise import DTYPES
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import Table, add_noise_table, ddim_inversion_table, ddim_table, ddpm_table, sprite_table

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}"),
    pytest.mark.usefixtures("kernels"),
]

SCHEDULE = NoiseSchedule.cosine(60)
CHAIN = [50, 31, 10, 3, 0]
HOSTS = ("openai", "lucidrains", "diffusers", "ermongroup")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# the largest size of a dimension, by rank: a sample goes past the blocks of the kernels and stays small
LARGEST = {1: 5000, 2: 900, 3: 70, 4: 24, 5: 8, 6: 5, 7: 4, 8: 3, 9: 3}


def every_table() -> list[Table]:
    found = []
    for prediction in ("eps", "x0", "v"):
        for clip in (None, 1.0, (-0.5, 2.0)):
            options: dict[str, Any] = {"prediction": prediction, "clip": clip}
            for variance in ("fixed_small", "fixed_large", "learned", "learned_range", "learned_plain"):
                found.append(ddpm_table(SCHEDULE, CHAIN, variance=variance, **options))
            for eta in (0.0, 0.5, 1.0):
                found += [ddim_table(SCHEDULE, CHAIN, eta=eta, eps=eps, **options) for eps in ("raw", "rederived")]
            final = "first" if prediction == "x0" else 1.0
            found.append(ddim_inversion_table(SCHEDULE, CHAIN, final_alpha=final, **options))
    found += [ddim_table(SCHEDULE, CHAIN, eta=0.5, clip=1.0, host=host) for host in HOSTS]
    found.append(ddpm_table(SCHEDULE, CHAIN, variance="learned_range", clip=1.0, host="diffusers"))
    found.append(ddpm_table(SCHEDULE, CHAIN, prediction="x_prev"))
    found.append(ddpm_table(SCHEDULE, [50, 31, 31, 10, 0]))
    found.append(sprite_table(SCHEDULE))
    return found


TABLES = every_table()
FORWARD = [SCHEDULE, *(add_noise_table(SCHEDULE, host=host) for host in HOSTS)]


class Case(NamedTuple):
    """One call: its positional arguments, its options, and the tensor its result goes to."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    out: Tensor | None

    def inputs(self) -> list[Tensor]:
        return [value for value in (*self.arguments, *self.options.values()) if isinstance(value, Tensor)]


@st.composite
def shapes(draw: st.DrawFn, smallest_rank: int = 1) -> tuple[int, ...]:
    rank = draw(st.integers(smallest_rank, 9))
    size = st.integers(1, 4) | st.integers(1, LARGEST[rank])
    shape = [draw(st.sampled_from([1, 2, 3, 7])), *(draw(size) for _ in range(rank - 1))]
    # the few large samples are enough; one dimension is the long one
    while math.prod(shape) > 20000:
        shape[shape.index(max(shape))] //= 2
    if draw(st.integers(0, 19)) == 0:
        shape[draw(st.integers(0, rank - 1))] = 0
    return tuple(shape)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, expanded: bool = True) -> Tensor:
    """Normal values in some memory layout, perhaps with one that is special."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def fresh(size: list[int]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    rank, sizes = len(shape), list(shape)
    dimension = draw(st.integers(0, rank - 1))
    kinds = ["contiguous", "permuted", "sliced", "strided", "channels last", "offset", "odd strides"]
    kind = draw(st.sampled_from(kinds + ["expanded"] if expanded else kinds))
    if kind == "permuted":
        order = draw(st.permutations(range(rank)))
        result = fresh([sizes[i] for i in order]).permute([order.index(i) for i in range(rank)])
    elif kind == "sliced":
        more = [draw(st.integers(0, 2)) for _ in sizes]
        result = fresh([n + extra for n, extra in zip(sizes, more, strict=True)])
        result = result[tuple(slice(extra, None) for extra in more)]
    elif kind == "strided":
        sizes[dimension] *= 2
        result = fresh(sizes)[(slice(None),) * dimension + (slice(draw(st.integers(0, 1)), None, 2),)]
    elif kind == "channels last":
        result = fresh([sizes[0], *sizes[2:], *sizes[1:2]])
        result = result.movedim(-1, 1) if rank > 1 else result
    elif kind == "offset":
        result = fresh([math.prod(shape) + 3])[3:].reshape(shape)
    elif kind == "odd strides":  # of dimensions that are never stepped along
        result = fresh(sizes)
        strides = [
            draw(st.sampled_from([0, 1, 7, 123456])) if n == 1 else result.stride(i) for i, n in enumerate(sizes)
        ]
        result = result.as_strided(shape, strides)
    elif kind == "expanded":
        sizes[dimension] = min(sizes[dimension], 1)
        result = fresh(sizes).expand(shape)
    else:
        result = fresh(sizes)
    assert result.shape == shape
    special = draw(st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]))
    if special is not None and result.numel() and kind != "expanded":
        result[tuple(draw(st.integers(0, n - 1)) for n in shape)] = special
    return result


def batched(draw: st.DrawFn, values: list[Any], batch: int, dtype: torch.dtype) -> Tensor:
    """A value for every sample, or one for all: contiguous, strided, expanded or 0-dimensional."""
    form = draw(st.sampled_from(["contiguous", "strided", "expanded", "scalar"]))
    if form in ("expanded", "scalar"):
        one = torch.tensor(draw(st.sampled_from(values)), dtype=dtype)
        return one if form == "scalar" else one.expand(batch)
    each = [draw(st.sampled_from(values)) for _ in range(2 * batch)]
    spread = torch.tensor(each, dtype=dtype)[::2]
    return spread.clone() if form == "contiguous" else spread


def timestep(draw: st.DrawFn, inside: list[int], batch: int) -> int | Tensor:
    if draw(st.booleans()):
        return draw(st.sampled_from(inside))
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]))
    outside = [2, 200] if dtype == torch.uint8 else [2, 200, -1]
    return batched(draw, inside + outside, batch, dtype)


def source(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    form = draw(st.sampled_from(["noise", "int", "seeds"]))
    if form == "noise":
        kinds = [dtype, torch.float32, torch.float16, torch.bfloat16]
        return {"noise": draw(tensors(shape, draw(st.sampled_from(kinds))))}
    if form == "int":
        return {"seeds": draw(st.integers(-(2**63), 2**63 - 1))}
    seeds = batched(draw, [0, 1, -1, 2**62, -(2**63), 123456789], shape[0], torch.int64)
    return {"seeds": seeds if seeds.dim() else seeds.expand(shape[0])}


def target(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, inputs: dict[str, Tensor | None]
) -> Tensor | None:
    """Where the result goes: a new tensor, one of the inputs that can hold it, or nothing of the caller's."""
    form = draw(st.sampled_from(["none", "none", "new", *inputs]))
    if form == "new":
        return draw(tensors(shape, dtype, expanded=False))
    found = inputs.get(form)
    fits = found is not None and found.shape == shape and found.dtype == dtype
    return found if fits and all(n < 2 or stride for n, stride in zip(shape, found.stride(), strict=True)) else None


@st.composite
def steps(draw: st.DrawFn) -> Case:
    table = draw(st.sampled_from(TABLES))
    structure = table.structure
    shape = draw(shapes(2 if structure.learned else 1))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from([dtype, *DTYPES[2:]])) if dtype == torch.float32 else dtype
    wide = (shape[0], 2 * shape[1], *shape[2:]) if structure.learned else shape
    x, m = draw(tensors(shape, dtype)), draw(tensors(wide, kind))
    options: dict[str, Any] = {"rounding": draw(st.sampled_from(["once", "host"]))}
    if structure.variance != "none":
        options |= source(draw, shape, dtype)
    if draw(st.integers(0, 2)) == 0:
        options["uncond_output"] = draw(tensors(draw(st.sampled_from([shape, wide])), kind))
        scales = [1.0, 2.5, -0.3, 7.1, 0.0]
        scale_dtype = draw(st.sampled_from(DTYPES))
        as_tensor = draw(st.booleans())
        options["guidance_scale"] = (
            batched(draw, scales, shape[0], scale_dtype) if as_tensor else draw(st.sampled_from(scales))
        )
    t: int | Tensor | None = None
    if draw(st.integers(0, 3)) == 0:
        options["row"] = draw(st.integers(0, len(table) - 1))
    else:
        t = timestep(draw, [t for t in table.timesteps if table.timesteps.count(t) == 1], shape[0])
    inputs = {"x": x, "m": m, "noise": options.get("noise"), "uncond": options.get("uncond_output")}
    return Case((table, m, t, x), options, target(draw, shape, dtype, inputs))


@st.composite
def forwards(draw: st.DrawFn) -> Case:
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    x0 = draw(tensors(shape, dtype))
    options = source(draw, shape, dtype)
    options["rounding"] = draw(st.sampled_from(["once", "host"]))
    options["target"] = draw(st.sampled_from([None, "noise", "v"]))
    t = timestep(draw, [0, 1, 7, 31, 59], shape[0])
    out = target(draw, shape, dtype, {"x0": x0, "noise": options.get("noise")})
    return Case((x0, t, draw(st.sampled_from(FORWARD))), options, out)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    bits = BITS[found.element_size()]
    # which NaN it is depends on the order of the operands, which no one promises
    found, expected = (torch.where(value.isnan(), 0, value).contiguous().view(bits) for value in (found, expected))
    assert torch.equal(found, expected)


def check(function: Any, case: Case, x: Tensor, backend: str) -> None:
    """A backend, with `out`, against the reference without; nothing else is written to, and the layout is x's."""
    inputs = case.inputs()
    before = [value.clone() for value in inputs]
    expected = function(*case.arguments, backend="reference", **case.options)
    assert all(map(same, inputs, before)), "the reference changed an input"
    strides = torch.empty_like(x).stride()
    version = 0 if case.out is None else case.out._version
    found = function(*case.arguments, backend=backend, out=case.out, **case.options)
    for value, copy in zip(inputs, before, strict=True):
        assert value is case.out or same(value, copy), "an input was changed"
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    for index, (one, other) in enumerate(pairs):
        assert_same_bits(one, other)
        assert other.stride() == strides
        if index or case.out is None:
            assert one.stride() == strides
    if case.out is not None:
        assert pairs[0][0] is case.out and case.out._version > version


def same(value: Tensor, copy: Tensor) -> bool:
    return torch.equal(value.isnan(), copy.isnan()) and torch.equal(value.nan_to_num(), copy.nan_to_num())


BACKENDS = st.sampled_from(["native", "native", "auto", "auto", "reference"])


@given(steps(), BACKENDS)
@settings(max_examples=300)
def test_step(case: Case, backend: str) -> None:
    check(ops.step, case, case.arguments[3], backend)


@given(steps(), BACKENDS)
@settings(max_examples=200)
def test_step_with_x0(case: Case, backend: str) -> None:
    check(ops.step_with_x0, case, case.arguments[3], backend)


@given(forwards(), BACKENDS)
@settings(max_examples=200)
def test_add_noise(case: Case, backend: str) -> None:
    check(ops.add_noise, case, case.arguments[0], backend)
