"""The fused operations against their definition in plain PyTorch: every structure, dtype and layout, in every bit."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff.noise as contract
from fastdiff import native, ops, reference
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import (
    COLUMN,
    COLUMNS,
    HOST_ROUNDING,
    SCALARS,
    Structure,
    Table,
    _with_reciprocals,
    add_noise_table,
    ddim_table,
    ddpm_table,
    forward_table,
)

pytestmark = pytest.mark.usefixtures("kernels")
needs_native = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")
SCHEDULE = NoiseSchedule.linear(1000)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPE = (3, 4, 5, 7)


def structures() -> list[Structure]:
    """Every structure that `Structure` accepts, one variance form at a time."""
    found = []
    for x0, divide, clip, eps, eps_divide, a0, ax, ae in itertools.product(
        ("linear", "output", "none"),
        (False, True),
        (False, True),
        ("none", "output", "rederived", "linear"),
        *((False, True),) * 4,
    ):
        try:
            found.append(Structure(x0, divide, clip, eps, eps_divide, a0, ax, ae, "none"))
        except ValueError:
            continue
    return found


def with_variance(structure: Structure, variance: str) -> Structure:
    return dataclasses.replace(structure, variance=variance)


def random_table(structure: Structure, rows: int = 4, seed: int = 0) -> Table:
    """Coefficients that keep the state near 1 and make the clip bite; t and repeat differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, len(COLUMNS), generator=generator, dtype=torch.float64) + 0.25
    values[:, COLUMN["lo"]], values[:, COLUMN["hi"]] = -0.75, 0.5
    values[:, COLUMN["min_log"]], values[:, COLUMN["max_log"]] = -4.0, -1.0
    values[:, COLUMN["t"]] = torch.arange(rows) * 10.0
    values[:, COLUMN["repeat"]] = torch.arange(rows) % 2
    return Table(values.float().double(), structure, [10 * k for k in range(rows)])


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in the memory layouts that people hand in."""
    order = list(range(tensor.dim()))[::-1]
    padded = tensor.new_full((tensor.numel() + 1,), math.nan)
    padded[1:] = tensor.reshape(-1)
    spread = tensor.new_full((*tensor.shape, 2), math.nan)
    spread[..., 0] = tensor
    return {
        "contiguous": tensor.clone(memory_format=torch.contiguous_format),
        "channels_last": tensor.contiguous(memory_format=torch.channels_last),
        "transposed": tensor.permute(order).contiguous().permute(order),
        "offset": padded[1:].view(tensor.shape),
        "spread": spread[..., 0],
        "sliced": torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]],
    }


def arguments(structure: Structure, shape=SHAPE, dtype=torch.float32, m_dtype=None, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    m_dtype = m_dtype or dtype
    wide = (shape[0], 2 * shape[1], *shape[2:]) if structure.learned else shape

    def draw(size, kind):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(kind)

    m = draw(wide, m_dtype)
    if structure.variance == "learned_plain":
        m[:, shape[1] :] = m[:, shape[1] :].abs()
    return {"x": draw(shape, dtype), "model_output": m}


def assert_equal(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(torch.isnan(a), torch.isnan(b))
    assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def both(function, table, m, t, x, **options):
    """The native and the reference result, asserted equal in every bit; returns the native one."""
    before = [tensor.clone() for tensor in (m, x) if tensor is not None]
    ours = function(table, m, t, x, backend="native", **options)
    plain = function(table, m, t, x, backend="reference", **options)
    short = function(table, m, t, x, **options)  # after a call that found the way
    triples = zip(ours, plain, short, strict=True) if isinstance(ours, tuple) else [(ours, plain, short)]
    for a, b, c in triples:
        assert_equal(a, b)
        assert_equal(c, b)
        assert a.stride() == torch.empty_like(x).stride() == b.stride() == c.stride()
    for tensor, copy in zip((u for u in (m, x) if u is not None), before, strict=True):
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(copy)), "an input was changed"
    return ours


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_structure_equals_the_reference(dtype):
    for index, structure in enumerate(structures()):
        for variance in ("none", "fixed"):
            form = with_variance(structure, variance)
            table = random_table(form, seed=index)
            given_ = arguments(form, dtype=dtype, seed=index)
            noise = {"seeds": index} if variance == "fixed" else {}
            roundings = ("once", "host") if dtype in (torch.float16, torch.bfloat16) else ("once",)
            for rounding in roundings:
                if form.x0 != "none":
                    both(ops.step_with_x0, table, given_["model_output"], 20, given_["x"], rounding=rounding, **noise)
                both(ops.step, table, given_["model_output"], 10, given_["x"], rounding=rounding, **noise)


@needs_native
@pytest.mark.parametrize("rounding", ["once", "host"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", ["learned_log", "learned_range", "learned_plain"])
def test_learned_variance_equals_the_reference(variance, dtype, rounding):
    form = Structure(clip=True, ax=True, variance=variance)
    given_ = arguments(form, dtype=dtype)
    for name, m in layouts(given_["model_output"]).items():
        for noise in ({"seeds": 5}, {"noise": torch.randn(SHAPE).to(dtype)}):
            both(ops.step_with_x0, random_table(form), m, 20, given_["x"], rounding=rounding, **noise)
        if name == "channels_last":
            x = layouts(given_["x"])[name]
            both(ops.step_with_x0, random_table(form), m, 20, x, rounding=rounding, seeds=5)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["seeds", "noise", "none"])
def test_layouts(dtype, source):
    form = Structure(clip=True, ax=True, variance="none" if source == "none" else "fixed")
    table, given_ = random_table(form), arguments(form, dtype=dtype)
    noise = torch.randn(SHAPE).to(dtype)
    options = {"seeds": {"seeds": 3}, "noise": {"noise": noise}, "none": {}}[source]
    expected = ops.step(table, given_["model_output"], 20, given_["x"], backend="reference", **options)
    for x in layouts(given_["x"]).values():
        for m in layouts(given_["model_output"]).values():
            assert_equal(both(ops.step_with_x0, table, m, 20, x, **options)[0], expected)
        if source == "noise":
            for z in layouts(noise).values():
                assert_equal(both(ops.step, table, given_["model_output"], 20, x, noise=z), expected)


@needs_native
@pytest.mark.parametrize("m_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_state_with_half_model_output(m_dtype):
    form = Structure(clip=True, ax=True, variance="fixed")
    given_ = arguments(form, m_dtype=m_dtype)
    for rounding in ("once", "host"):
        result = both(
            ops.step_with_x0, random_table(form), given_["model_output"], 20, given_["x"], seeds=1, rounding=rounding
        )
        assert result[0].dtype == torch.float32
    # nothing is rounded to half on the way
    wide = ops.step(random_table(form), given_["model_output"].float(), 20, given_["x"], seeds=1)
    assert_equal(result[0], wide)


@needs_native
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guidance(dtype, learned):
    form = Structure(clip=True, ax=True, variance="learned_range" if learned else "fixed")
    table, given_ = random_table(form), arguments(form, dtype=dtype)
    other = arguments(form, dtype=dtype, seed=9)["model_output"]
    scales = (1.5, torch.tensor(1.5), torch.tensor([0.0, 1.0, 7.5]))
    for scale, rounding in itertools.product(scales, ("once", "host")):
        options = {"guidance_scale": scale, "seeds": 2, "rounding": rounding}
        full = both(ops.step, table, given_["model_output"], 20, given_["x"], uncond_output=other, **options)
        if learned:  # its variance half is not looked at
            halved = both(
                ops.step, table, given_["model_output"], 20, given_["x"], uncond_output=other[:, : SHAPE[1]], **options
            )
            assert_equal(full, halved)
    plain = ops.step(table, given_["model_output"].double(), 20, given_["x"].double(), seeds=2)
    guided = ops.step(
        table,
        given_["model_output"].double(),
        20,
        given_["x"].double(),
        seeds=2,
        uncond_output=other.double(),
        guidance_scale=1.0,
    )
    torch.testing.assert_close(guided, plain)


@needs_native
def test_one_timestep_per_sample():
    form = Structure(clip=True, ax=True, variance="fixed")
    table, given_ = random_table(form), arguments(form)
    t = torch.tensor([30, 0, 20])
    seeds = contract.seeds(4, 3)
    for dtype in (torch.int64, torch.int32):
        result = both(ops.step_with_x0, table, given_["model_output"], t.to(dtype), given_["x"], seeds=seeds)
    for b in range(3):
        one = slice(b, b + 1)
        alone = ops.step(table, given_["model_output"][one], int(t[b]), given_["x"][one], seeds=seeds[one])
        assert_equal(result[0][one], alone)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_device_timestep_outside_the_chain_gives_nan(dtype):
    form = Structure(clip=True, ax=True, variance="fixed")
    given_ = arguments(form, dtype=dtype)
    for bad in (-1, 5, 31, 10**9, -(2**40), 2**62):
        t = torch.tensor([10, bad, 20])
        result, x0 = both(ops.step_with_x0, random_table(form), given_["model_output"], t, given_["x"], seeds=1)
        for tensor in (result, x0):
            assert torch.isnan(tensor[1]).all() and torch.isfinite(tensor[[0, 2]]).all()


def test_repeated_timesteps_are_ambiguous_and_numbered():
    table = ddim_table(SCHEDULE, [500, 500, 100], eta=1.0)
    x, m = torch.randn(2, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match="row="):
        ops.step(table, m, 500, x, seeds=1)
    assert torch.isnan(ops.step(table, m, torch.tensor([500, 500]), x, seeds=1)).all()
    assert table.rows[:, COLUMN["repeat"]].tolist() == [0.0, 1.0, 0.0]
    z = [contract.normal((2, 3), contract.seeds(1, 2), t=500, repeat=k, domain="step") for k in (0, 1)]
    assert not torch.equal(*z)
    for row in (0, 1):
        assert_equal(ops.step(table, m, None, x, row=row, seeds=1), ops.step(table, m, None, x, row=row, noise=z[row]))


@needs_native
@pytest.mark.parametrize(
    "shape", [(1, 1), (2,), (1, 3, 32, 32), (5, 2, 1, 3), (2, 1, 4, 4), (2, 3, 2, 3, 2, 2), (3, 513), (2, 4099)]
)
def test_shapes(shape):
    form = Structure(clip=True, ax=True, variance="fixed")
    given_ = arguments(form, shape=shape)
    both(ops.step_with_x0, random_table(form), given_["model_output"], 20, given_["x"], seeds=1)


@needs_native
@pytest.mark.parametrize("channels", [2, 3, 4, 31, 33, 96])
@pytest.mark.parametrize("side", [1, 4, 7, 9, 33])
def test_channels_last_noise_is_in_logical_order(channels, side):
    form = Structure(clip=True, ax=True, variance="fixed")
    given_ = arguments(form, shape=(2, channels, side, side + 1))
    plain = ops.step(random_table(form), given_["model_output"], 20, given_["x"], seeds=1)
    x, m = (given_[k].contiguous(memory_format=torch.channels_last) for k in ("x", "model_output"))
    result = both(ops.step_with_x0, random_table(form), m, 20, x, seeds=1)
    assert_equal(result[0], plain)
    noise = torch.randn(x.shape)
    assert_equal(
        both(ops.step, random_table(form), m, 20, x, noise=noise),
        ops.step(random_table(form), m.contiguous(), 20, x.contiguous(), noise=noise),
    )


@needs_native
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0,)])
def test_empty(shape):
    form = Structure(clip=True, ax=True, variance="fixed")
    x = torch.empty(shape)
    result, x0 = ops.step_with_x0(random_table(form), x, 20, x, seeds=1)
    assert result.shape == x0.shape == shape
    assert ops.add_noise(x, 5, SCHEDULE, seeds=1).shape == shape


@needs_native
def test_nan_and_inf_travel_as_in_the_reference():
    for index, structure in enumerate(structures()):
        given_ = arguments(structure, shape=(1, 4, 4, 8), seed=index)
        special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-40]).repeat(16)
        x = given_["x"].reshape(-1).clone()
        m = given_["model_output"].reshape(-1).clone()
        x[:64], m[64:] = special[:64], special[64:]
        x, m = x.reshape(1, 4, 4, 8), m.reshape(1, 4, 4, 8)
        function = ops.step if structure.x0 == "none" else ops.step_with_x0
        both(function, random_table(structure), m, 20, x)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_out(dtype):
    form = Structure(clip=True, ax=True, variance="fixed")
    table, given_ = random_table(form), arguments(form, dtype=dtype)
    for name, x in layouts(given_["x"]).items():
        expected = ops.step(table, given_["model_output"], 20, x, seeds=3)
        for backend in ("native", "reference"):
            state = layouts(given_["x"])[name]
            version = state._version
            assert ops.step(table, given_["model_output"], 20, state, seeds=3, out=state, backend=backend) is state
            assert state._version > version
            assert_equal(state, expected)
            out = torch.full_like(x, math.nan)
            version = out._version
            assert ops.step(table, given_["model_output"], 20, x, seeds=3, out=out, backend=backend) is out
            assert out._version > version
            assert_equal(out, expected)
    m = given_["model_output"].clone()
    expected = ops.step(table, m, 20, given_["x"], seeds=3)
    assert_equal(ops.step(table, m, 20, given_["x"], seeds=3, out=m), expected)


def test_a_changed_saved_tensor_is_noticed():
    x = torch.randn(2, 3, requires_grad=True)
    y = x * 1.0
    loss = (y * y).sum()
    with torch.no_grad():
        ops.step(random_table(Structure(ax=True)), torch.randn(2, 3), 20, y, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_instruction_sets_give_the_same_bits(isa):
    active = torch.ops.fastdiff.cpu_isa(-1)
    cases = []
    for index, structure in enumerate(structures()):
        form = with_variance(structure, ("fixed", "learned_range")[structure.x0 == "linear" and index % 2])
        for dtype in DTYPES:
            given_ = arguments(form, shape=(2, 3, 5, 11), dtype=dtype, seed=index)
            cases.append((random_table(form, seed=index), given_["model_output"], given_["x"]))
    expected = [ops.step(table, m, 20, x, seeds=7) for table, m, x in cases]
    half = contract.normal((2, 9999), 3, dtype=torch.float16)
    try:
        try:
            torch.ops.fastdiff.cpu_isa(isa)
        except RuntimeError:
            pytest.skip("not built, or not supported by this machine")
        for (table, m, x), value in zip(cases, expected, strict=True):
            assert_equal(ops.step(table, m, 20, x, seeds=7), value)
        assert_equal(contract.normal((2, 9999), 3, dtype=torch.float16), half)
    finally:
        torch.ops.fastdiff.cpu_isa(active)


@needs_native
def test_half_conversion_of_every_value():
    active = torch.ops.fastdiff.cpu_isa(-1)
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    table = random_table(Structure(x0="none", a0=False, ax=True))
    rows = table.rows.clone()
    rows[:, COLUMN["ax"]] = 1.0
    table = Table(rows, table.structure, table.timesteps)
    try:
        for isa in (0, active):
            torch.ops.fastdiff.cpu_isa(isa)
            for dtype in (torch.float16, torch.bfloat16):
                x = bits.view(dtype).reshape(1, -1)
                assert_equal(ops.step(table, None, 20, x), x.clone())
            # rounding to half: ties, both sides of them, overflow, subnormals
            wide = torch.cat(
                [bits.view(torch.float16).float() * k for k in (1.0, 1 + 2**-11, 1 + 2**-12, 1 + 3 * 2**-12)]
            )
            for dtype in (torch.float16, torch.bfloat16):
                out = contract.normal((1, 4 * 2**14), 5, dtype=dtype)
                assert_equal(out, contract.normal((1, 4 * 2**14), 5).to(dtype))
                m = wide.reshape(1, -1)
                z = m.to(dtype)
                result = ops.step(add_noise_like(dtype), None, 20, torch.zeros_like(z), noise=m, backend="native")
                assert_equal(result, (m + 0.0).to(dtype))
    finally:
        torch.ops.fastdiff.cpu_isa(active)


def add_noise_like(dtype: torch.dtype) -> Table:
    """x' = 1*x + 1*z, so that a float32 noise tensor is rounded once to the dtype of x."""
    table = random_table(Structure(x0="none", a0=False, ax=True, variance="fixed"))
    rows = table.rows.clone()
    rows[:, [COLUMN["ax"], COLUMN["s"]]] = 1.0
    return Table(rows, table.structure, table.timesteps, name=f"sum in {dtype}")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [None, "noise", "v"])
def test_add_noise(dtype, target):
    x0 = torch.randn(SHAPE).to(dtype)
    t = torch.tensor([0, 999, 400])
    noise = torch.randn(SHAPE).to(dtype)
    for options, x in itertools.product(({"seeds": 3}, {"noise": noise}), layouts(x0).values()):
        for rounding in ("once", "host"):
            ours = ops.add_noise(x, t, SCHEDULE, target=target, rounding=rounding, backend="native", **options)
            plain = ops.add_noise(x, t, SCHEDULE, target=target, rounding=rounding, backend="reference", **options)
            for a, b in zip(*((r if target else (r,)) for r in (ours, plain)), strict=True):
                assert_equal(a, b)
    z = contract.normal_reference(SHAPE, contract.seeds(3, 3), torch.stack([t, 0 * t], 1), 2).double()
    ab = torch.from_numpy(SCHEDULE.alphas_cumprod.copy())[t].reshape(3, 1, 1, 1)
    expected = {
        "x": ab.sqrt() * x0.double() + (1 - ab).sqrt() * z,
        "noise": z,
        "v": ab.sqrt() * z - (1 - ab).sqrt() * x0.double(),
    }
    ours = ops.add_noise(x0, t, SCHEDULE, target=target, seeds=3)
    for a, b in zip(ours if target else (ours,), (expected["x"], expected.get(target)), strict=False):
        torch.testing.assert_close(a, b.to(dtype))


def test_add_noise_draws_its_own_seeds():
    x0 = torch.zeros(2, 3, 4)
    torch.manual_seed(1)
    first = ops.add_noise(x0, 999, SCHEDULE)
    second = ops.add_noise(x0, 999, SCHEDULE)
    torch.manual_seed(1)
    assert torch.equal(first, ops.add_noise(x0, 999, SCHEDULE)) and not torch.equal(first, second)


def test_add_noise_by_a_host_table_and_the_markov_chain():
    x0 = torch.randn(2, 3)
    host = add_noise_table(SCHEDULE, host="diffusers")
    torch.testing.assert_close(ops.add_noise(x0, 10, host, seeds=1), ops.add_noise(x0, 10, SCHEDULE, seeds=1))
    chain = forward_table(SCHEDULE)
    noise = torch.randn(2, 3)
    expected = math.sqrt(1 - SCHEDULE.betas[10]) * x0.double() + math.sqrt(SCHEDULE.betas[10]) * noise.double()
    torch.testing.assert_close(ops.step(chain, None, 10, x0, noise=noise), expected.float())


def test_gradients():
    table = ddpm_table(SCHEDULE, clip=1.0)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    m = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for backend in ("auto", "reference", *(("native",) if native.available() else ())):
        assert torch.autograd.gradcheck(
            lambda x, m, backend=backend: ops.step_with_x0(table, m, 400, x, seeds=1, backend=backend), (x, m)
        )
    if not native.available():
        with pytest.raises(RuntimeError, match="not there"):
            ops.step(table, m, 400, x, seeds=1, backend="native")
    with pytest.raises(ValueError, match="out"):
        ops.step(table, m, 400, x, seeds=1, out=torch.empty_like(x))
    _, tangent = torch.func.jvp(
        lambda x: ops.step(table, m.detach(), 400, x, seeds=1), (x.detach(),), (torch.ones(2, 3).double(),)
    )
    assert tangent.abs().sum() > 0


def test_an_output_that_requires_grad_is_refused():
    table, x, m = random_table(Structure(ax=True)), torch.randn(2, 3), torch.randn(2, 3)
    weight = torch.ones(2, 3, requires_grad=True)
    for out in (weight, weight * 2):
        with pytest.raises(ValueError, match="out: expected a tensor that does not require grad"):
            ops.step(table, m, 20, x, out=out)
    with torch.no_grad():
        assert_equal(ops.step(table, m, 20, x, out=weight), ops.step(table, m, 20, x))


def test_a_schedule_in_training():
    """Its table gives gradients, samples without them, and does not go stale."""
    alphas = torch.tensor(SCHEDULE.alphas_cumprod.copy(), requires_grad=True)
    table, x, m = ddim_table(alphas, [900, 500, 100]), torch.randn(2, 3), torch.randn(2, 3)
    ops.step(table, m, 500, x).sum().backward()
    assert alphas.grad is not None and (alphas.grad != 0).sum() == 2
    plain = ddim_table(SCHEDULE, [900, 500, 100])
    with torch.no_grad():
        for backend in ("auto", "reference", *(["native"] if native.available() else [])):
            out = torch.empty_like(x)
            assert_equal(ops.step(table, m, 500, x, out=out, backend=backend), ops.step(plain, m, 500, x))


def test_a_table_does_not_change():
    table = random_table(Structure(ax=True))
    x, m = torch.randn(2, 3), torch.randn(2, 3)
    before = ops.step(table, m, 20, x)
    table.rows.mul_(0)
    table.rows.requires_grad_()
    assert_equal(ops.step(table, m, 20, x), before)


@needs_native
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 62, 63, 64, 65, 200, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_short_samples(size, dtype):
    """Samples that share a block of counters have the noise that each has alone."""
    form = Structure(clip=True, ax=True, variance="fixed")
    table = random_table(form)
    batch = 40000 // size
    x, m = (torch.randn(batch, size).to(dtype) for _ in range(2))
    seeds = torch.randint(-(2**63), 2**63 - 1, (2 * batch,))[::2]
    result = both(ops.step, table, m, 20, x, seeds=seeds)
    for b in (0, 1, batch // 2, batch - 1):
        assert_equal(ops.step(table, m[b : b + 1], 20, x[b : b + 1], seeds=seeds[b : b + 1]), result[b : b + 1])
    ours = contract.normal((batch, size), seeds, dtype=dtype)
    assert_equal(ours, contract.normal_reference((batch, size), seeds, torch.zeros(batch, 2).long(), 0).to(dtype))


@needs_native
@pytest.mark.parametrize("rank", [8, 10, 24])
def test_many_dimensions(rank):
    form = Structure(clip=True, ax=True, variance="fixed")
    size = (3,) + (2,) * 9 + (1,) * (rank - 10) if rank > 9 else (3,) + (2,) * (rank - 1)
    x, m = torch.randn(size), torch.randn(size)
    order = [0, *range(rank - 1, 0, -1)]
    both(ops.step_with_x0, random_table(form), m, 20, x.permute(order).contiguous().permute(order), seeds=1)
    both(ops.step, random_table(form), m.permute(order).contiguous().permute(order), 20, x, noise=torch.randn(size))


@needs_native
@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_by_every_way(shape, variance):
    form = Structure(clip=True, ax=True, variance=variance)
    m_shape = (shape[0], 2 * shape[1], *shape[2:]) if form.learned else shape
    for backend in ("native", "reference", "auto"):
        x = torch.empty(shape, requires_grad=backend == "auto")
        result = ops.step(random_table(form), torch.empty(m_shape), 20, x, seeds=1, backend=backend)
        assert result.shape == shape
        if backend == "auto":
            result.sum().backward()


def test_guidance_of_half_states_as_eager_code_rounds_it():
    table = random_table(Structure(x0="output", a0=True))
    rows = table.rows
    rows[:, COLUMN["a0"]] = 1.0
    table = Table(rows, table.structure, table.timesteps)
    for dtype in (torch.float16, torch.bfloat16):
        cond, uncond = torch.randn(2, 64).to(dtype), torch.randn(2, 64).to(dtype)
        expected = uncond + 7.3 * (cond - uncond)
        for backend in ("auto", "reference"):
            options = {"uncond_output": uncond, "guidance_scale": 7.3, "rounding": "host", "backend": backend}
            assert_equal(ops.step(table, cond, 20, torch.zeros_like(cond), **options), expected)


def test_compiles_whole():
    sampler_table = ddpm_table(NoiseSchedule.linear(50), clip=1.0)
    seeds, m = contract.seeds(1, 2), torch.randn(2, 3, 4)

    def chain(x: Tensor, t: Tensor) -> Tensor:
        for _ in range(3):
            x = ops.step(sampler_table, m, t, x * 1.0, seeds=seeds)
            t = t - 1
        return x

    x, t = torch.randn(2, 3, 4), torch.tensor([40, 30])
    with torch.no_grad():
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        assert_equal(compiled(x, t), chain(x, t))


@needs_native
def test_two_hundred_and_fifty_repeats_are_equal():
    form = Structure(clip=True, ax=True, variance="fixed")
    given_ = arguments(form, shape=(60, 3, 32, 32))
    first = ops.step(random_table(form), given_["model_output"], 20, given_["x"], seeds=1)
    for _ in range(250):
        assert torch.equal(ops.step(random_table(form), given_["model_output"], 20, given_["x"], seeds=1), first)


@needs_native
def test_threads_do_not_change_the_result():
    form = Structure(clip=True, ax=True, variance="fixed")
    given_ = arguments(form, shape=(7, 3, 65, 129))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(ops.step(random_table(form), given_["model_output"], 20, given_["x"], seeds=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_properties(data):
    """Native equals reference, and splitting the batch or permuting the layout changes nothing."""
    rank = data.draw(st.integers(1, 4))
    shape = (data.draw(st.integers(1, 5)), *(data.draw(st.integers(1, 9)) for _ in range(rank)))
    form = with_variance(data.draw(st.sampled_from(structures())), data.draw(st.sampled_from(["none", "fixed"])))
    dtype = data.draw(st.sampled_from(DTYPES))
    table = random_table(form, seed=data.draw(st.integers(0, 5)))
    given_ = arguments(form, shape=shape, dtype=dtype, seed=data.draw(st.integers(0, 100)))
    order = [0, *data.draw(st.permutations(range(1, rank + 1)))]
    inverse = sorted(range(rank + 1), key=order.__getitem__)
    x, m = (given_[k].permute(order).contiguous().permute(inverse) for k in ("x", "model_output"))
    seeds = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=shape[0], max_size=shape[0])))
    options = {"seeds": seeds} if form.variance == "fixed" else {}
    whole = both(ops.step, table, m, 20, x, **options)
    cut = data.draw(st.integers(0, shape[0]))
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        sub = {"seeds": seeds[part]} if options else {}
        parts.append(ops.step(table, m[part], 20, x[part], **sub))
    assert_equal(torch.cat(parts), whole)


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 2**33, reason="needs 8 GiB of memory")
def test_more_than_two_to_the_31_elements(kernels):
    """One sample of 2^31 + 64 bfloat16 elements, in place; its last elements equal the definition at their index."""
    if kernels == "cuda":
        pytest.skip("test_cuda_kernels.py runs only the threads of the last elements, which are slow one by one")
    count = 2**31 + 64
    table = add_noise_like(torch.bfloat16)
    x = torch.zeros(1, count, dtype=torch.bfloat16)
    ops.step(table, None, 20, x, seeds=torch.tensor([11]), out=x)
    for first in (0, 2**31 - 64, count - 64):
        index = torch.arange(first // 4, first // 4 + 16)
        z = contract.normals_of(contract.TORCH, torch.tensor(11), index, torch.tensor(20), 2, torch.tensor(0))
        assert_equal(x[0, first : first + 64], z.reshape(-1).to(torch.bfloat16))


@needs_native
def test_direct_calls_of_the_operators_are_guarded():
    table = random_table(Structure(ax=True)).to("cpu", torch.float32)
    x, flags = torch.zeros(2, 3), Structure(ax=True).flags
    place = torch.tensor([0, flags])
    calls = {
        "row": lambda: torch.ops.fastdiff.step_row(x, x, x, x, table, torch.tensor([99, flags])),
        "table": lambda: torch.ops.fastdiff.step_row(x, x, x, x, table.double(), place),
        "model_output": lambda: torch.ops.fastdiff.step_row(x, x, torch.zeros(2, 4), x, table, place),
        "out": lambda: torch.ops.fastdiff.step_row(x.half(), x, x, x, table, place),
        "seeds": lambda: torch.ops.fastdiff.normals(x, torch.zeros(3, dtype=torch.int64), 0, 0, 0),
        "x": lambda: torch.ops.fastdiff.step_row(x.long(), x.long(), x, x, table, place),
        "flags": lambda: torch.ops.fastdiff.step_row(x, x, x, x, table, torch.tensor([0, flags | 7 << 9])),
        "place": lambda: torch.ops.fastdiff.step_row(x, x, x, x, table, torch.tensor([0])),
        "place: expected int64": lambda: torch.ops.fastdiff.step_row(x, x, x, x, table, place.int()),
        "uncond_output": lambda: torch.ops.fastdiff.step(
            x + 1, None, x, x, x.half(), torch.ones(1), None, None, table, None, None, 0, flags
        ),
        "guidance_scale": lambda: torch.ops.fastdiff.step(
            x, None, x, x, x, x.view(-1)[:1], None, None, table, None, None, 0, flags
        ),
        "second": lambda: torch.ops.fastdiff.step(
            x, x + 1, x, x, None, None, None, None, table, None, None, 0, flags | 1 << 13
        ),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=name):
            call()


@needs_native
def test_the_operators_refuse_overlapping_outputs():
    table, flags = random_table(Structure(ax=True)).to("cpu", torch.float32), Structure(ax=True).flags
    memory, m = torch.zeros(20), torch.zeros(2, 5)
    x = memory[:10].view(2, 5)
    for out in (memory[3:13].view(2, 5), torch.zeros(1, 5).expand(2, 5), torch.zeros(8).as_strided((2, 5), (3, 1))):
        with pytest.raises(RuntimeError, match="out: expected"):
            torch.ops.fastdiff.step_row(out, x, m, x, table, torch.tensor([0, flags]))
    rows = (None, None, None, None, table, None, None, 0, flags)
    for out, second in ((x, x), (m, x), (x, memory[4:14].view(2, 5))):
        with pytest.raises(RuntimeError, match="second: expected|out: expected"):
            torch.ops.fastdiff.step(out, second, x, torch.zeros(2, 5) if out is m else m, *rows)


@needs_native
def test_opcheck():
    form = Structure(clip=True, ax=True, variance="fixed")
    table = random_table(form)
    rows, flags = table.to("cpu", torch.float32), form.flags
    for shape in ((2, 3, 4), (0, 3)):
        x = torch.randn(shape)
        seeds = contract.seeds(1, shape[0])
        out, second = torch.empty_like(x), torch.empty_like(x)
        torch.library.opcheck(torch.ops.fastdiff.step_row.default, (out, x, x, seeds, rows, torch.tensor([1, flags])))
        torch.library.opcheck(
            torch.ops.fastdiff.step.default,
            (
                out,
                second,
                x,
                x,
                x,
                torch.ones(1),
                None,
                seeds,
                rows,
                torch.tensor([10]),
                table.row_map("cpu"),
                0,
                flags,
            ),
        )
        torch.library.opcheck(torch.ops.fastdiff.normals.default, (out, seeds, 3, 0, 0))


BAD = {
    "x type": (TypeError, "x: expected a tensor", {"x": [1.0]}),
    "x dtype": (TypeError, "x: expected float32", {"x": torch.zeros(2, 3, dtype=torch.int64)}),
    "x dim": (ValueError, "x: expected a batch", {"x": torch.tensor(1.0), "model_output": torch.tensor(1.0)}),
    "output none": (TypeError, "model_output: expected a tensor", {"model_output": None}),
    "output type": (TypeError, "model_output: expected a tensor", {"model_output": 3}),
    "output shape": (
        ValueError,
        r"model_output: expected x's shape \[2, 3\], got \[2, 4\]",
        {"model_output": torch.zeros(2, 4)},
    ),
    "output 2C": (ValueError, "learned variance", {"model_output": torch.zeros(2, 6)}),
    "output dtype": (TypeError, "model_output: expected torch.float32", {"model_output": torch.zeros(2, 3).double()}),
    "output device": (
        ValueError,
        "model_output: expected a tensor on cpu",
        {"model_output": torch.zeros(2, 3, device="meta")},
    ),
    "t type": (TypeError, "t: expected an int", {"t": 1.5}),
    "t bool": (TypeError, "t: expected an int", {"t": True}),
    "t outside": (ValueError, "t: expected a timestep of the chain", {"t": 1000}),
    "t negative": (ValueError, "t: expected a timestep of the chain", {"t": -1}),
    "t dtype": (TypeError, "t: expected an int", {"t": torch.zeros(2)}),
    "t shape": (ValueError, r"t: expected shape \[2\]", {"t": torch.zeros(3, dtype=torch.int64)}),
    "row type": (TypeError, "row: expected an int", {"row": 1.0}),
    "row outside": (ValueError, "row: expected 0 to 999", {"row": 1000}),
    "row of another t": (ValueError, "t: expected None or the timestep of row 3, 996, got 500", {"row": 3}),
    "row and tensor": (
        TypeError,
        "t: expected None or an int beside row",
        {"row": 3, "t": torch.zeros(2, dtype=torch.int64)},
    ),
    "no noise": (ValueError, "seeds: expected seeds, noise", {"seeds": None}),
    "both": (ValueError, "noise and seeds", {"noise": torch.zeros(2, 3)}),
    "seeds type": (TypeError, "seeds: expected an int", {"seeds": "7"}),
    "seeds dtype": (TypeError, "seeds: expected an int64 tensor", {"seeds": torch.zeros(2)}),
    "seeds few": (ValueError, r"seeds: expected shape \[2\]", {"seeds": torch.zeros(1, dtype=torch.int64)}),
    "seeds big": (ValueError, "seeds: expected an int in", {"seeds": 2**64}),
    "noise shape": (ValueError, "noise: expected x's shape", {"seeds": None, "noise": torch.zeros(2, 1)}),
    "noise dtype": (TypeError, "noise: expected torch.float32", {"seeds": None, "noise": torch.zeros(2, 3).double()}),
    "noise type": (TypeError, "noise: expected a tensor", {"seeds": None, "noise": 0.5}),
    "uncond alone": (ValueError, "uncond_output and guidance_scale", {"uncond_output": torch.zeros(2, 3)}),
    "scale alone": (ValueError, "uncond_output and guidance_scale", {"guidance_scale": 2.0}),
    "uncond shape": (ValueError, "uncond_output", {"uncond_output": torch.zeros(2, 4), "guidance_scale": 2.0}),
    "scale shape": (
        ValueError,
        "guidance_scale",
        {"uncond_output": torch.zeros(2, 3), "guidance_scale": torch.ones(3)},
    ),
    "scale type": (TypeError, "guidance_scale", {"uncond_output": torch.zeros(2, 3), "guidance_scale": "2"}),
    "rounding": (ValueError, "rounding: expected 'once' or 'host'", {"rounding": "twice"}),
    "backend": (ValueError, "backend: expected one of", {"backend": "cuda"}),
    "out type": (TypeError, "out: expected a tensor", {"out": 1}),
    "out dtype": (TypeError, "out: expected torch.float32", {"out": torch.zeros(2, 3).half()}),
    "out shape": (ValueError, "out: expected x's shape", {"out": torch.zeros(3, 2)}),
    "out device": (ValueError, "out: expected a tensor on cpu", {"out": torch.zeros(2, 3, device="meta")}),
    "noise of ints": (
        TypeError,
        "noise: expected torch.float32",
        {"seeds": None, "noise": torch.zeros(2, dtype=torch.int64)},
    ),
    "seeds one for all": (ValueError, r"seeds: expected shape \[2\]", {"seeds": torch.zeros((), dtype=torch.int64)}),
    "seeds device": (
        ValueError,
        "seeds: expected a tensor on cpu",
        {"seeds": torch.zeros(2, dtype=torch.int64, device="meta")},
    ),
    "output sparse": (TypeError, "model_output: expected a strided", {"model_output": torch.zeros(2, 3).to_sparse()}),
    "noise sparse": (TypeError, "noise: expected a strided", {"seeds": None, "noise": torch.zeros(2, 3).to_sparse()}),
    "scale huge": (ValueError, "guidance_scale", {"uncond_output": torch.zeros(2, 3), "guidance_scale": 10**400}),
    "table": (TypeError, "table: expected a Table, got list", {"table": [1]}),
    "out expanded": (ValueError, "out: expected distinct elements", {"out": torch.zeros(1, 3).expand(2, 3)}),
    "out windows": (ValueError, "out: expected distinct elements", {"out": torch.zeros(8).as_strided((2, 3), (2, 1))}),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", [ops.step, ops.step_with_x0])
def test_bad_input(function, case):
    error, message, changed = BAD[case]
    options = {"model_output": torch.ones(2, 3), "t": 500, "x": torch.ones(2, 3), "seeds": 1} | changed
    table = options.pop("table", ddpm_table(SCHEDULE, clip=1.0))
    tensors = [
        value
        for value in options.values()
        if isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_sparse
    ]
    before = [tensor.clone() for tensor in tensors]
    positional = [options.pop(name) for name in ("model_output", "t", "x")]
    with pytest.raises(error, match=message):
        function(table, *positional, **options)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_out_must_not_overlap_a_part_of_an_input():
    table = random_table(Structure(ax=True))
    memory = torch.zeros(20)
    x, shifted, m = memory[:10].view(2, 5), memory[3:13].view(2, 5), torch.zeros(2, 5)
    with pytest.raises(ValueError, match="a part of x's"):
        ops.step(table, m, 20, x, out=shifted)
    with pytest.raises(ValueError, match="a part of model_output's"):
        ops.step(table, shifted, 20, m, out=x)
    turned = torch.zeros(5, 5)
    with pytest.raises(ValueError, match="a part of x's"):
        ops.step(table, torch.zeros(5, 5), 20, turned, out=turned.t())


def test_out_may_share_a_buffer_with_an_input():
    """Slices of one buffer that do not meet, and exactly the memory of an input, whatever the strides are."""
    table = random_table(Structure(clip=True, ax=True))
    for backend in ("auto", "reference"):
        buffer = torch.randn(2, 6, 4, 5)
        x, m = buffer[:, :3].clone(), torch.randn(2, 3, 4, 5)
        expected = ops.step(table, m, 20, x)
        assert_equal(ops.step(table, m, 20, buffer[:, :3], out=buffer[:, 3:], backend=backend), expected)
        assert_equal(buffer[:, :3], x)
        interleaved = torch.randn(2, 3, 4, 10)
        interleaved[..., ::2] = x
        assert_equal(
            ops.step(table, m, 20, interleaved[..., ::2], out=interleaved[..., 1::2], backend=backend), expected
        )
        assert_equal(ops.step(table, m, 20, buffer[:, :3], out=buffer[:, :3], backend=backend), expected)
        for start in (1, 2):
            with pytest.raises(ValueError, match="a part of x's"):
                ops.step(table, m, 20, buffer[:, :3], out=buffer[:, start : start + 3], backend=backend)
        with pytest.raises(ValueError, match="a part of model_output's"):
            ops.step(table, buffer[:, 1:4], 20, m, out=buffer[:, :3], backend=backend)
    learned = random_table(Structure(clip=True, ax=True, variance="learned_range"))
    wide = torch.randn(2, 6, 4, 5)
    expected = ops.step(learned, wide.clone(), 20, x, seeds=1)
    assert_equal(ops.step(learned, wide, 20, x, seeds=1, out=wide[:, :3]), expected)
    with pytest.raises(ValueError, match="a part of model_output's"):
        ops.step(learned, wide, 20, x, seeds=1, out=wide[:, 2:5])
    # the stride of a dimension of size 1 means nothing
    x, m = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    expected = ops.step(table, m, 20, x)
    assert_equal(ops.step(table, m, 20, x, out=x.as_strided((1, 3, 4), (99, 4, 1))), expected)


def test_out_is_apart_from_seeds_and_timesteps():
    table = ddpm_table(SCHEDULE)
    memory = torch.arange(64)
    x, m, out = torch.randn(8, 2).double(), torch.randn(8, 2).double(), memory.view(torch.float64)[:16].view(8, 2)
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match="apart from that of seeds"):
            ops.step(table, m, 5, x, seeds=memory[4:12], out=out, backend=backend)
        with pytest.raises(ValueError, match="apart from that of t"):
            ops.step(table, m, memory[15:23], x, seeds=1, out=out, backend=backend)
        assert torch.equal(memory, torch.arange(64))
        ops.step(table, m, memory[32:40], x, seeds=memory[16:24], out=out, backend=backend)
        memory = torch.arange(64)
        out = memory.view(torch.float64)[:16].view(8, 2)


@needs_native
def test_a_tensor_whose_memory_was_freed_is_refused():
    table, x, freed = random_table(Structure(ax=True)), torch.randn(2, 3), torch.randn(2, 3)
    freed.untyped_storage().resize_(0)
    for arguments_ in ((freed, 20, x), (x, 20, freed)):
        with pytest.raises(RuntimeError, match="with memory"):
            ops.step(table, *arguments_)


def test_a_table_made_in_inference_mode_trains():
    for dtype in (torch.float32, torch.float64):
        x0, m = torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
        with torch.inference_mode():
            schedule = NoiseSchedule.linear(100)
            table = ddpm_table(schedule, clip=1.0)
            made = Table(table.rows, table.structure, table.timesteps)
            ops.add_noise(x0, 3, schedule, seeds=1)
            ops.step(table, m, 50, x0, seeds=1)
        for case in (table, made):
            x = x0.clone().requires_grad_()
            ops.step(case, m, 50, x, seeds=1).sum().backward()
            assert x.grad is not None
        x = x0.clone().requires_grad_()
        ops.add_noise(x, 3, schedule, seeds=1).sum().backward()
        assert x.grad is not None


def test_a_refused_call_leaves_the_generator_alone():
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="t: expected"):
        ops.add_noise(torch.zeros(2, 3), 5000, SCHEDULE)
    with pytest.raises(TypeError, match="out: expected"):
        ops.add_noise(torch.zeros(2, 3), 5, SCHEDULE, out=torch.zeros(2, 3).double())
    assert torch.equal(torch.get_rng_state(), before)


def test_more_dimensions_than_the_kernels_take():
    table = random_table(Structure(clip=True, ax=True, variance="fixed"))
    x, m = (torch.randn((2,) * 3 + (1,) * 37) for _ in range(2))
    assert_equal(
        ops.step(table, m, 20, x, seeds=1).flatten(), ops.step(table, m.flatten(1), 20, x.flatten(1), seeds=1).flatten()
    )


def test_vmap_goes_through_the_reference():
    table, x, m = random_table(Structure(clip=True, ax=True)), torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    mapped = torch.func.vmap(lambda x, m: ops.step(table, m, 20, x))(x, m)
    assert_equal(mapped, torch.stack([ops.step(table, b, 20, a) for a, b in zip(x, m, strict=True)]))


def test_an_int_seed_is_the_tensor_it_stands_for():
    table, x, m = ddpm_table(SCHEDULE), torch.randn(3, 5), torch.randn(3, 5)
    for _ in range(2):
        assert_equal(ops.step(table, m, 500, x, seeds=7), ops.step(table, m, 500, x, seeds=contract.seeds(7, 3)))
    x.requires_grad_()
    with torch.inference_mode():
        ops.step(table, m, 500, x, seeds=8)
    ops.step(table, m, 500, x, seeds=8).sum().backward()


def test_a_table_without_noise_takes_none():
    table = ddim_table(SCHEDULE, [500, 250])
    x = torch.zeros(2, 3)
    for options in ({"seeds": 1}, {"noise": x}):
        with pytest.raises(ValueError, match="adds no noise"):
            ops.step(table, x, 500, x, **options)
    with pytest.raises(ValueError, match="predicts x0"):
        ops.step_with_x0(forward_table(SCHEDULE), x, 3, x, seeds=1)


def test_guidance_copies_no_scale_of_its_own():
    """A captured step with guidance is one launch: nothing is converted that already is what the kernel reads."""
    x, m, uncond = (torch.randn(3, 4) for _ in range(3))
    table = ddim_table(SCHEDULE, 10)
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    scale = torch.tensor([2.0])
    given = {"row": 3, "uncond_output": uncond, "guidance_scale": scale, "out": x.clone()}
    ops.step(table, m, None, x, **given)  # the rows are cast at a first call
    with Log():
        ops.step(table, m, None, x, **given)
    assert [name.split(".", 1)[1] for name in seen] == ["step.default"]
    # a scale in the memory that is written is copied before
    out = torch.full((3, 4), 2.0)
    expected = ops.step(table, m, None, x, row=3, uncond_output=uncond, guidance_scale=torch.full((3,), 2.0))
    ops.step(table, m, None, x, row=3, uncond_output=uncond, guidance_scale=out[:, 0].contiguous(), out=out.clone())
    ops.step(table, m, None, x, row=3, uncond_output=uncond, guidance_scale=out.view(-1)[:3], out=out)
    assert_equal(out, expected)


WRONG = {
    "t of no row": {"t": 3},
    "a bool": {"t": True},
    "dtype of t": {"t": torch.zeros(2)},
    "shape of t": {"t": torch.zeros(3, dtype=torch.int64)},
    "a tensor beside a row": {"t": torch.full((2,), 20), "row": 2},
    "t beside a row": {"t": 20, "row": 1},
    "no row": {"t": None, "row": 4},
    "row from the end": {"t": None, "row": -1},
    "dtype of model_output": {"model_output": torch.zeros(2, 3, dtype=torch.float64)},
    "shape of model_output": {"model_output": torch.zeros(2, 4)},
    "no noise": {"seeds": None},
    "two sources": {"noise": torch.zeros(2, 3)},
    "seeds of one sample": {"seeds": torch.zeros(1, dtype=torch.int64)},
    "dtype of seeds": {"seeds": torch.zeros(2, 3)},
    "dtype of noise": {"seeds": None, "noise": torch.zeros(2, dtype=torch.int64)},
    "shape of uncond_output": {"uncond_output": torch.zeros(2, 2)},
    "dtype of uncond_output": {"uncond_output": torch.zeros(2, 3, dtype=torch.bfloat16)},
    "no uncond_output": {"uncond_output": None},
    "no scale": {"guidance_scale": None},
    "shape of the scale": {"guidance_scale": torch.ones(1, 1)},
    "scale of three samples": {"guidance_scale": torch.ones(3)},
    "scale beyond float32": {"guidance_scale": 1e39},
    "kind of the scale": {"guidance_scale": "2"},
    "rounding": {"rounding": "never"},
    "clip_grad": {"clip_grad": "some"},
    "table": {"table": None},
    "seeds beyond 64 bits, and another": {"seeds": 2**64, "model_output": torch.zeros(2, 3, dtype=torch.int64)},
    "scale beyond float32, and another": {"guidance_scale": 1e39, "seeds": torch.zeros(1, dtype=torch.int64)},
    "scale beyond float32, no uncond_output": {"guidance_scale": 1e39, "uncond_output": None},
}


@needs_native
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("function", [ops.step, ops.step_with_x0], ids=["step", "x0"])
def test_a_later_call_is_refused_as_the_first_is(function, guided):
    """A call that finds the short way raises what a thorough one does, before anything is written."""
    form = Structure(clip=True, ax=True, variance="fixed")
    fresh, known = random_table(form), random_table(form)
    right = {"model_output": torch.randn(2, 3), "t": 20, "x": torch.randn(2, 3), "seeds": torch.arange(2)}
    if guided:
        right |= {"uncond_output": torch.randn(2, 3), "guidance_scale": 2.0}
    assert function(known, **right) is not None and known.shortcuts
    for name, wrong in WRONG.items():
        if not guided and ("uncond" in name or "scale" in name):
            continue
        messages = []
        for table in (fresh, known):
            out = torch.full((2, 3), 7.0)
            with pytest.raises((TypeError, ValueError)) as caught:
                function(**{"table": table} | right | wrong, out=out)
            messages.append((caught.type, str(caught.value)))
            assert bool((out == 7).all()), f"{name}: something was written"
        assert messages[0] == messages[1], name
        assert not fresh.shortcuts


@needs_native
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_a_result_larger_than_the_cache(offset):
    """It goes past the cache, in whole lines: what stands before the first and behind the last goes there as usual."""
    told = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    size = int(told.read_text().strip().removesuffix("K")) * 1024 if told.exists() else 2**25
    if size > 2**28:
        pytest.skip("more memory than a test may take")
    shape = (3, size // 12 + 1001)
    memory = torch.full((math.prod(shape) + 16,), 7.0)
    out = memory[offset : offset + math.prod(shape)].view(shape)
    x, m = torch.randn(shape), torch.randn(shape)
    table = random_table(Structure(clip=True, ax=True))
    ops.step(table, m, 20, x, out=out)
    assert torch.equal(out, ops.step(table, m, 20, x, backend="reference"))
    assert bool((memory[:offset] == 7).all() and (memory[offset + math.prod(shape) :] == 7).all())
    with_x0 = ops.step_with_x0(table, m, 20, x)
    assert torch.equal(with_x0[0], out)
    ops.step(table, m, 20, x, out=x)
    assert torch.equal(x, out)


def knows_the_way(table, *args, **options):
    ops.step(table, *args, **options)
    assert table.shortcuts
    return table


@needs_native
@pytest.mark.parametrize("needing", ["x", "model_output", "uncond_output", "guidance_scale", "noise"])
@pytest.mark.parametrize("function", [ops.step, ops.step_with_x0], ids=["step", "x0"])
def test_the_short_way_leaves_gradients_to_autograd(function, needing):
    form = Structure(clip=True, ax=True, variance="fixed")
    torch.manual_seed(0)  # by chance the clip may cut everything, which leaves no gradient
    m, x = torch.randn(2, 3), torch.randn(2, 3)
    table = knows_the_way(random_table(form), m, 20, x, seeds=1)
    given = {"model_output": m, "x": x, "uncond_output": torch.randn(2, 3), "noise": torch.randn(2, 3)}
    given["guidance_scale"] = torch.tensor(1.5)
    given[needing].requires_grad_()
    grads = []
    for backend in ("auto", "reference"):
        result = function(table, t=20, **given, backend=backend)
        result = result if isinstance(result, Tensor) else result[0]
        grads.append(torch.autograd.grad(result.sum(), given[needing]))
    assert torch.equal(grads[0][0], grads[1][0]) and bool(grads[0][0].any())
    with pytest.raises(ValueError, match="out"):
        ops.step(table, m.detach(), 20, x.detach(), seeds=1, out=torch.empty(2, 3).requires_grad_())


@needs_native
def test_the_short_way_leaves_transforms_to_the_thorough_one():
    form = Structure(clip=True, ax=True, variance="fixed")
    m, x, tangent = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    table = knows_the_way(random_table(form), m, 20, x, seeds=1)

    def step(x, m, backend="auto"):
        return ops.step(table, m, 20, x, seeds=1, backend=backend)

    for transformed in (
        lambda backend: torch.func.grad(lambda x: step(x, m, backend).sum())(x),
        lambda backend: torch.func.vmap(lambda m: step(x, m, backend))(m.expand(4, 2, 3)),
        lambda backend: torch.func.jvp(lambda x: step(x, m, backend), (x,), (tangent,))[1],
    ):
        assert torch.equal(transformed("auto"), transformed("reference"))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert torch.autograd.forward_ad.unpack_dual(step(dual, m)).tangent is not None


@needs_native
def test_the_short_way_counts_versions_and_is_not_kept_for_what_it_cannot_do():
    m, x, out = torch.randn(2, 3), torch.randn(2, 3), torch.empty(2, 3)
    form = Structure(clip=True, ax=True, variance="fixed")
    table = knows_the_way(random_table(form), m, 20, x, seeds=1)
    for expected in (1, 2):
        ops.step(table, m, 20, x, seeds=1, out=out)
        assert out._version == expected
    clipped = ddpm_table(SCHEDULE, [20, 10], noise_clip=0.5)
    for _ in range(2):
        both(ops.step, clipped, m, 20, x, seeds=1)
    forward = add_noise_table(SCHEDULE)
    ops.add_noise(x, 5, forward, seeds=1)
    assert not clipped.shortcuts and not forward.shortcuts


@needs_native
def test_a_scale_first_seen_in_inference_mode_can_be_differentiated_past():
    table, m, x = random_table(Structure(clip=True, ax=True)), torch.randn(2, 3), torch.randn(2, 3)
    given = {"uncond_output": torch.randn(2, 3), "guidance_scale": 0.37251}
    with torch.inference_mode():
        ops.step(knows_the_way(table, m, 20, x), m, 20, x, **given)
    ops.step(table, m, 20, x.clone().requires_grad_(), **given).sum().backward()


def test_a_full_cache_makes_room_for_many_threads():
    cache = {number: torch.empty(0) for number in range(64)}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: ops._keep(cache, key, torch.empty(0)), range(100, 4000)))
    finally:
        sys.setswitchinterval(before)
    assert 60 <= len(cache) <= 80


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [2.0, 0.0, -0.0, 3, torch.tensor(1.5), torch.tensor([1.5, 0.5])], ids=str)
def test_a_guided_step_that_knows_the_way_equals_the_reference(dtype, scale):
    for variance, options in (("none", {}), ("fixed", {"seeds": 5}), ("learned_range", {"seeds": torch.arange(2)})):
        form = Structure(clip=True, ax=True, variance=variance)
        table, x = random_table(form), torch.randn(2, 4, 3).to(dtype)
        m, uncond = (torch.randn(2, 8 if form.learned else 4, 3).to(dtype) for _ in range(2))
        if isinstance(scale, Tensor):
            scale = scale.to(contract.compute_dtype(dtype))
        for rounding in ("once", "host"):
            both(
                ops.step_with_x0,
                table,
                m,
                20,
                x,
                uncond_output=uncond,
                guidance_scale=scale,
                rounding=rounding,
                **options,
            )
            both(ops.step, table, m, 20, x, uncond_output=uncond, guidance_scale=scale, rounding=rounding, **options)


def test_a_table_without_rows_is_refused():
    empty = Table(torch.empty(0, len(COLUMNS), dtype=torch.float64), Structure(), [])
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="table: expected at least one row, got none"):
        ops.step(empty, x, torch.tensor([1, 2]), x)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_coefficients_are_taken_as_cuda_takes_them(dtype):
    """What is divided by a scalar is multiplied by its reciprocal, and no scalar is rounded to half."""
    roundings = ("once", "host") if dtype in (torch.float16, torch.bfloat16) else ("once",)
    for index, structure in enumerate(structures()):
        form = with_variance(structure, "fixed")
        table = random_table(form, seed=index)
        rows = _with_reciprocals(table.to("cpu", dtype))
        given_ = arguments(form, dtype=dtype, seed=index)
        x, m = given_["x"], given_["model_output"]
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)).to(dtype)
        for rounding in roundings:
            flags = form.flags | SCALARS | (HOST_ROUNDING if rounding == "host" else 0)
            result = torch.empty_like(x)
            ops._step_row_op(result, x, m, z, rows, torch.tensor([2, flags]))
            expected, _ = reference.step(rows[2], form, x, m, z=z, rounding=rounding, scalars=True)
            assert_equal(result, expected)


def test_scalar_coefficients_are_those_of_eager_code_on_cuda():
    """diffusers' DDIM step, in the operations and roundings of torch's CUDA kernels for a tensor and a CPU scalar."""
    table = ddim_table(SCHEDULE, 10, host="diffusers", clip=1.0)
    assert table.scalars == "cpu"
    assert ddim_table(SCHEDULE, 10, host="openai").scalars is ddim_table(SCHEDULE, 10).scalars is None
    ab = SCHEDULE.alphas_cumprod[[table.timesteps[3], table.timesteps[4]]]
    x, m = torch.randn(500), torch.randn(500)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = table.to("cpu", dtype)
        row = _with_reciprocals(rows)[3]
        c = dict(zip(COLUMNS, rows[3], strict=True))

        def times(tensor, scalar, dtype=dtype):
            return (tensor.float() * scalar).to(dtype)

        state, output = x.to(dtype), m.to(dtype)
        x0 = times((state - times(output, -c["pm"])), 1 / c["pd"]).clamp(-1, 1)
        expected = times(x0, c["a0"]) + times(output, c["ae"])
        result, predicted = reference.step(
            row, table.structure, state[None], output[None], rounding="host", scalars=True
        )
        assert_equal(predicted[0], x0)
        assert_equal(result[0], expected)
        assert abs(float(c["a0"]) - math.sqrt(ab[1])) < 1e-6
