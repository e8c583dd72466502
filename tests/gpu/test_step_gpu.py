"""Every kernel on the GPU against the definition computed on the CPU: the same bits, whatever is asked."""

from __future__ import annotations

import math

import pytest
import torch
from test_ops import (
    DTYPES,
    SCHEDULE,
    SHAPE,
    arguments,
    assert_equal,
    layouts,
    random_table,
    with_variance,
)
from torch import Tensor

from fastdiff import native, noise, ops
from fastdiff.noise import DTYPES as STATES
from fastdiff.tables import Structure, add_noise_table, ddim_table, ddpm_table, forward_table

pytestmark = pytest.mark.cuda

# The structures that csrc/step_cpu.cpp compiles loops for (kStaticRuns), which are those that samplers have.
FORMS = {
    "DDPM": {"ax": True},
    "DDIM": {"eps": "output", "ae": True},
    "diffusers DDPM": {"x0_divide": True, "ax": True},
    "diffusers DDIM": {"x0_divide": True, "eps": "output", "ae": True},
    "DDIM re-derived": {"eps": "rederived", "ae": True},
    "OpenAI DDIM": {"eps": "rederived", "eps_divide": True, "ae": True},
    "clipped model output": {"x0_divide": True, "eps": "rederived", "eps_divide": True, "ae": True},
    "DDIM v": {"eps": "linear", "ae": True},
    "diffusers DDIM x0": {"x0": "output", "eps": "linear", "eps_divide": True, "ae": True},
    "DDPM x0": {"x0": "output", "ax": True},
    "DDIM x0": {"x0": "output", "eps": "rederived", "ae": True},
    "DDIM x0 divided": {"x0": "output", "eps": "rederived", "eps_divide": True, "ae": True},
    "sprite": {"eps": "output", "a0": False, "ax": True, "ae": True},
    "x_prev": {"eps": "output", "a0": False, "ae": True},
    "forward": {"x0": "none", "a0": False, "ax": True},
}
STRUCTURES = {
    f"{name}{' clipped' if clip else ''}": Structure(clip=clip, **form)
    for name, form in FORMS.items()
    for clip in ([False, True] if form.get("x0") != "none" else [False])
}
HALF = (torch.float16, torch.bfloat16)
COMMON = ("DDPM clipped", "DDIM clipped", "OpenAI DDIM clipped")  # for what would take many compilations in Triton


def put(value, device):
    return value.to(device) if isinstance(value, Tensor) else value


def check(function, device, backend, table, m, t, x, **options):
    """The kernel's result, asserted to be the reference's on the CPU in every bit, layout included."""
    plain = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    expected = function(table, m.cpu(), t.cpu() if isinstance(t, Tensor) else t, x.cpu(), backend="reference", **plain)
    moved = {name: put(value, device) for name, value in options.items()}
    before = m.clone(), x.clone()
    found = function(table, m, t, x, backend=backend, **moved)
    several = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for ours, theirs in several:
        assert ours.device == x.device
        assert ours.stride() == torch.empty_like(x).stride()
        assert_equal(ours.cpu(), theirs)
    for tensor, copy in zip((m, x), before, strict=True):
        assert_equal(tensor, copy)
    return found


def on(device, form, **options):
    given = arguments(form, **options)
    return given["model_output"].to(device), given["x"].to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STRUCTURES, ids=lambda name: name.replace(" ", "-"))
def test_every_structure(device, backend, name, dtype):
    few = backend == "triton" and name not in COMMON
    if few and dtype is not torch.float32:
        pytest.skip("compiling each takes a second or more")
    for variance in ("fixed",) if few or name == "forward" else ("none", "fixed"):
        form = with_variance(STRUCTURES[name], variance)
        table, (m, x) = random_table(form), on(device, form, dtype=dtype)
        source = {"seeds": 3} if variance == "fixed" else {}
        for rounding in ("once", "host") if dtype in HALF else ("once",):
            if form.x0 != "none":
                check(ops.step_with_x0, device, backend, table, m, 10, x, rounding=rounding, **source)
            if form.x0 == "none" or not few:
                check(ops.step, device, backend, table, m, 20, x, rounding=rounding, **source)


@pytest.mark.parametrize("name", STRUCTURES, ids=lambda name: name.replace(" ", "-"))
def test_the_reference_on_the_device_is_the_one_on_the_cpu(device, name):
    for dtype in DTYPES:
        form = with_variance(STRUCTURES[name], "fixed")
        m, x = on(device, form, dtype=dtype)
        check(ops.step, device, "reference", random_table(form), m, 20, x, seeds=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variance", ["learned_log", "learned_range", "learned_plain"])
def test_learned_variance(device, backend, variance, dtype):
    form = Structure(clip=True, ax=True, variance=variance)
    m, x = on(device, form, dtype=dtype)
    for source in ({"seeds": 5}, {"noise": torch.randn(SHAPE).to(dtype)}):
        check(ops.step_with_x0, device, backend, random_table(form), m, 20, x, **source)
    for outputs in layouts(m).values():
        check(ops.step, device, backend, random_table(form), outputs, 20, x, seeds=5)


@pytest.mark.parametrize("source", ["seeds", "noise", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, backend, dtype, source):
    form = Structure(clip=True, ax=True, variance="none" if source == "none" else "fixed")
    table, (m, x) = random_table(form), on(device, form, dtype=dtype)
    options = {"seeds": {"seeds": 3}, "noise": {"noise": torch.randn(SHAPE).to(dtype)}, "none": {}}[source]
    for name, state in layouts(x).items():
        for other, output in layouts(m).items():
            if name == other or "contiguous" in (name, other):
                check(ops.step, device, backend, table, output, 20, state, **options)


def test_channels_last_images(device, backend):
    for channels in (2, 3, 4, 31, 96):
        shape = (2, channels, 9, 7)
        m, x = (torch.randn(shape).to(device, memory_format=torch.channels_last) for _ in range(2))
        check(ops.step, device, backend, ddpm_table(SCHEDULE, 10, clip=1.0), m, None, x, row=3, seeds=8)


@pytest.mark.parametrize("m_dtype", HALF, ids=str)
def test_float32_state_with_half_model_output(device, backend, m_dtype):
    for name in COMMON:
        form = with_variance(STRUCTURES[name], "fixed")
        m, x = on(device, form, m_dtype=m_dtype)
        check(ops.step_with_x0, device, backend, random_table(form), m, 20, x, seeds=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes_and_tails(device, backend, dtype):
    for batch, size in [
        (1, 1),
        (3, 1),
        (1, 7),
        (2, 31),
        (5, 127),
        (3, 128),
        (2, 1023),
        (1, 4097),
        (300, 33),
        (70000, 3),
    ]:
        m, x = (torch.randn(batch, size, dtype=torch.float64).to(device, dtype) for _ in range(2))
        for table in (ddpm_table(SCHEDULE, 10, clip=1.0), ddim_table(SCHEDULE, 10, clip=1.0)):
            source = {"seeds": 9} if table.structure.variance != "none" else {}
            check(ops.step, device, backend, table, m, None, x, row=4, **source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment_and_nothing_beside_it(device, backend, dtype):
    table, size = ddpm_table(SCHEDULE, 10, clip=1.0), 2 * 48
    for offset in (0, 1, 2, 3, 5, 8):
        for other in (0, 1, 4):
            storage = torch.full((size + 24,), math.nan, dtype=dtype, device=device)
            m, x = (torch.randn(size + 24, dtype=torch.float64).to(device, dtype) for _ in range(2))
            part = [u[at:][:size].view(2, 48) for u, at in ((m, other), (x, offset), (storage, offset))]
            ops.step(table, part[0], None, part[1], row=3, seeds=1, out=part[2], backend=backend)
            expected = ops.step(table, part[0].cpu(), None, part[1].cpu(), row=3, seeds=1, backend="reference")
            assert_equal(part[2].cpu(), expected)
            assert bool(storage[:offset].isnan().all()) and bool(storage[offset + size :].isnan().all())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0,)])
def test_empty(device, backend, shape):
    table = ddpm_table(SCHEDULE, 10)
    x = torch.empty(shape, device=device)
    assert ops.step(table, x, None, x, row=2, seeds=1, backend=backend).shape == x.shape
    learned = ddpm_table(SCHEDULE, 10, variance="learned_range")
    if len(shape) > 1:
        wide = torch.empty((shape[0], 2 * shape[1], *shape[2:]), device=device)
        assert ops.step(learned, wide, None, x, row=2, seeds=1, backend=backend).shape == x.shape
    # and no error was left for the next operation
    assert torch.ones(3, device=device).sum().item() == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_guidance(device, backend, dtype, learned):
    form = Structure(clip=True, ax=True, variance="learned_range" if learned else "fixed")
    table, (m, x) = random_table(form), on(device, form, dtype=dtype)
    uncond = on(device, form, dtype=dtype, seed=9)[0]
    for scale in (1.5, torch.tensor(2.0, device=device), torch.tensor([0.5, 1.0, 7.5], device=device)):
        check(ops.step_with_x0, device, backend, table, m, 20, x, uncond_output=uncond, guidance_scale=scale, seeds=2)
    if learned:
        narrow = uncond[:, : x.shape[1]]
        check(ops.step, device, backend, table, m, 20, x, uncond_output=narrow, guidance_scale=2.0, seeds=2)


def test_one_timestep_per_sample_and_none_outside_the_chain(device, backend):
    for form in (with_variance(STRUCTURES["DDPM clipped"], "fixed"), STRUCTURES["DDIM clipped"]):
        table, shape = random_table(form), (6, 4, 5, 7)
        source = {"seeds": 3} if form.variance == "fixed" else {}
        for dtype in (torch.float32, torch.bfloat16):
            m, x = on(device, form, shape=shape, dtype=dtype)
            t = torch.tensor([10, 0, 30, 7, -5, 2**40], device=device)
            found = check(ops.step, device, backend, table, m, t, x, **source)
            assert bool(found[3:].isnan().all()) and bool(found[:3].isfinite().all())
            one = torch.tensor([20], device=device, dtype=torch.int32)
            check(ops.step_with_x0, device, backend, table, m, one, x, **source)


def test_repeated_timesteps_have_noise_of_their_own(device, backend):
    table = ddpm_table(SCHEDULE, [800, 500, 500, 7])
    m, x = (torch.randn(2, 64, device=device) for _ in range(2))
    found = [check(ops.step, device, backend, table, m, None, x, row=row, seeds=1) for row in (1, 2)]
    assert not torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_out(device, backend, dtype):
    form = with_variance(STRUCTURES["DDPM clipped"], "fixed")
    table, (m, x) = random_table(form), on(device, form, dtype=dtype)
    expected = ops.step(table, m.cpu(), 20, x.cpu(), seeds=6, backend="reference")
    out = torch.full_like(x, math.nan)
    assert ops.step(table, m, 20, x, seeds=6, out=out, backend=backend) is out
    assert_equal(out.cpu(), expected)
    own, version = x.clone(), x._version
    assert ops.step(table, m, 20, own, seeds=6, out=own, backend=backend) is own
    assert_equal(own.cpu(), expected)
    assert own._version > version


@pytest.mark.parametrize("target", [None, "noise", "v"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_noise(device, backend, dtype, target):
    x0, z = (torch.randn(3, 4, 5, 7).to(dtype) for _ in range(2))
    for schedule in (SCHEDULE, add_noise_table(SCHEDULE, host="openai")):
        for t in (300, torch.tensor([1, 500, 999])):
            for source in ({"seeds": 5}, {"noise": z}):
                moved = {name: put(value, device) for name, value in source.items()}
                ours = ops.add_noise(x0.to(device), put(t, device), schedule, target=target, backend=backend, **moved)
                theirs = ops.add_noise(x0, t, schedule, target=target, backend="reference", **source)
                pairs = zip(ours, theirs, strict=True) if target else [(ours, theirs)]
                for mine, plain in pairs:
                    assert_equal(mine.cpu(), plain)


def test_the_markov_chain(device, backend):
    table, x = forward_table(SCHEDULE), torch.randn(2, 33)
    found = ops.step(table, None, 10, x.to(device), seeds=3, backend=backend)
    assert_equal(found.cpu(), ops.step(table, None, 10, x, seeds=3, backend="reference"))


def test_nan_and_inf_travel(device, backend):
    form = with_variance(STRUCTURES["OpenAI DDIM clipped"], "fixed")
    m, x = on(device, form)
    x.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, 1e38], device=device)
    m.view(-1)[3:7] = torch.tensor([1e38, math.nan, math.inf, -math.inf], device=device)
    check(ops.step_with_x0, device, backend, random_table(form), m, 20, x, seeds=1)


def test_division_and_roots_are_correctly_rounded(device, backend):
    """Over many magnitudes: an approximate division or root would show."""
    form = Structure(x0_divide=True, ax=True, variance="learned_plain")
    scale = torch.logspace(-30, 30, 4096, dtype=torch.float64)
    x, m = (torch.randn(2, 1, 4096, dtype=torch.float64) * scale for _ in range(2))
    m = torch.cat([m, (m * m).clamp(max=1e30)], 1).float().to(device)
    check(ops.step_with_x0, device, backend, random_table(form), m, 20, x.float().to(device), seeds=1)


@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_noise(device, dtype):
    """The noise of the contract, which samplers start from: the same on every device."""
    for shape in [(1, 7), (3, 5, 5), (2, 4096), (1000, 3), (2, 0), (0, 5)]:
        seeds = torch.arange(shape[0]) * 3 - 2
        found = noise.normal(shape, seeds.to(device), t=17, repeat=2, domain="step", dtype=dtype)
        assert found.device == device
        assert_equal(found.cpu(), noise.normal(shape, seeds, t=17, repeat=2, domain="step", dtype=dtype))


def test_many_shapes_and_sources(device, backend):
    """A walk over combinations that the tests above do not make."""
    generator = torch.Generator().manual_seed(5)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    for round_ in range(60):
        form = with_variance(STRUCTURES[pick(COMMON)], pick(["none", "fixed"]))
        dtype, shape = pick(DTYPES), (pick([1, 2, 5]), pick([1, 3, 4]), pick([1, 8, 13]), pick([4, 7, 64]))
        m, x = on(device, form, shape=shape, dtype=dtype, seed=round_)
        m, x = layouts(m)[pick(["contiguous", "channels_last", "offset"])], layouts(x)[pick(["contiguous", "offset"])]
        source = {}
        if form.variance == "fixed":
            seeds = torch.randint(-(2**62), 2**62, (shape[0],), generator=generator)
            source = pick([{"seeds": seeds}, {"noise": torch.randn(shape, generator=generator).to(dtype)}])
        t = pick([20, torch.tensor([10 * pick([0, 1, 2, 3]) for _ in range(shape[0])])])
        check(ops.step, device, backend, random_table(form), m, put(t, device), x, **source)


def test_the_whole_chain(device, backend):
    """Steps of a chain feed each other: one bit would grow."""
    for table in (ddpm_table(SCHEDULE, 50, clip=1.0), ddim_table(SCHEDULE, 50, eta=0.5, clip=1.0)):
        states = [noise.normal((2, 3, 16, 16), 1), noise.normal((2, 3, 16, 16), 1, device=device)]
        for row in range(len(table)):
            outputs = [torch.roll(x, 1, -1) * 0.5 for x in states]
            states[0] = ops.step(table, outputs[0], None, states[0], row=row, seeds=2, backend="reference")
            states[1] = ops.step(table, outputs[1], None, states[1], row=row, seeds=2, backend=backend)
        assert_equal(states[1].cpu(), states[0])


def test_auto_takes_the_library(gpu):
    assert native.built_with_cuda(), "the library was built without CUDA: there was no nvcc"
    assert native.cuda_why_not(gpu) is None
    assert native.best(gpu) == "native"
