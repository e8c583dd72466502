"""The gradients on the GPU: those of the CPU kernels in every bit, and of autograd in float64 to rounding."""

from __future__ import annotations

import pytest
import torch
from test_ops import DTYPES, SCHEDULE, arguments, assert_equal, layouts, random_table, with_variance
from test_step_gpu import COMMON, HALF, STRUCTURES, put

from fastdiff import ops
from fastdiff.tables import Structure, add_noise_table, ddim_table, ddpm_table

pytestmark = pytest.mark.cuda

LEARNED = {f"learned_{kind}": Structure(clip=True, ax=True, variance=f"learned_{kind}") for kind in
           ("log", "range", "plain")}  # fmt: skip


def gradients(table, m, t, x, *, device, backend, second=False, uncond=None, scale=None, z=None, seeds=None,
              rounding="once"):  # fmt: skip
    """Of a step (and x0) with respect to every tensor that goes in, on the CPU."""
    inputs = {"x": x, "model_output": m, "uncond_output": uncond, "noise": z}
    leaves = {
        name: value.detach().clone().to(device).requires_grad_()  # clone: the memory format is kept
        for name, value in inputs.items()
        if value is not None
    }
    options = {name: leaf for name, leaf in leaves.items() if name in ("uncond_output", "noise")}
    if scale is not None:
        options["guidance_scale"] = put(scale, device)
    if seeds is not None:
        options["seeds"] = seeds
    function = ops.step_with_x0 if second else ops.step
    found = function(
        table, leaves["model_output"], put(t, device), leaves["x"], rounding=rounding, backend=backend, **options
    )
    outputs = list(found) if second else [found]
    generator = torch.Generator().manual_seed(11)
    cotangents = [
        torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u.dtype).to(device) for u in outputs
    ]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return [None if u is None else u.cpu() for u in grads]


def same(device, backend, *args, **options):
    ours = gradients(*args, device=device, backend=backend, **options)
    theirs = gradients(*args, device="cpu", backend="native", **options)
    assert any(u is not None for u in ours)
    for mine, cpu in zip(ours, theirs, strict=True):
        assert (mine is None) == (cpu is None)
        if mine is not None:
            assert_equal(mine, cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*STRUCTURES, *LEARNED], ids=lambda name: name.replace(" ", "-"))
def test_every_structure(device, backend, name, dtype):
    few = backend == "triton" and name not in COMMON
    if few and dtype is not torch.float32:
        pytest.skip("compiling each takes a second or more")
    form = LEARNED.get(name) or with_variance(STRUCTURES[name], "fixed")
    table, given = random_table(form), arguments(form, dtype=dtype)
    m, x = given["model_output"], given["x"]
    if name == "forward":
        pytest.skip("nothing of it depends on a model output")
    for rounding in ("once", "host") if dtype in HALF else ("once",):
        same(device, backend, table, m, 20, x, seeds=3, second=form.x0 != "none", rounding=rounding)
        if not few:
            same(device, backend, table, m, 20, x, seeds=3, rounding=rounding)


@pytest.mark.parametrize("name", ["DDPM clipped", "learned_range"])
def test_guidance_noise_and_layouts(device, backend, name):
    form = LEARNED.get(name) or with_variance(STRUCTURES[name], "fixed")
    table = random_table(form)
    for dtype in (torch.float32, torch.bfloat16):
        given, other = arguments(form, dtype=dtype), arguments(form, dtype=dtype, seed=5)
        z = torch.randn(given["x"].shape).to(dtype)
        for scale in (1.5, torch.tensor([0.5, 1.0, 7.5])):
            same(device, backend, table, given["model_output"], 20, given["x"], uncond=other["model_output"],
                 scale=scale, z=z, second=True)  # fmt: skip
        for layout, x in layouts(given["x"]).items():
            same(device, backend, table, layouts(given["model_output"])[layout], 20, x, seeds=3)


def test_timesteps_outside_the_chain_have_no_gradient(device, backend):
    table = random_table(with_variance(STRUCTURES["DDPM clipped"], "fixed"))
    given = arguments(table.structure, shape=(6, 4, 5, 7))
    t = torch.tensor([10, 0, 30, 7, -5, 2**40])
    same(device, backend, table, given["model_output"], t, given["x"], seeds=3)
    for gradient in gradients(table, given["model_output"], t, given["x"], device=device, backend=backend, seeds=3):
        assert bool((gradient[3:] == 0).all())


@pytest.mark.parametrize("m_dtype", HALF, ids=str)
def test_float32_state_with_half_model_output(device, backend, m_dtype):
    form = with_variance(STRUCTURES["DDPM clipped"], "fixed")
    given = arguments(form, m_dtype=m_dtype)
    same(device, backend, random_table(form), given["model_output"], 20, given["x"], seeds=4, second=True)


@pytest.mark.parametrize("target", [None, "noise", "v"])
def test_add_noise(device, backend, target):
    table = add_noise_table(SCHEDULE)
    results = []
    for where, kind in ((device, backend), ("cpu", "native")):
        generator = torch.Generator().manual_seed(2)
        x0, z = (torch.randn(3, 4, 33, generator=generator).to(where).requires_grad_() for _ in range(2))
        t = torch.tensor([5, 500, 999], device=where)
        found = ops.add_noise(x0, t, table, noise=z, target=target, backend=kind)
        outputs = list(found) if target else [found]
        cotangents = [torch.randn(u.shape, generator=generator).to(where) for u in outputs]
        results.append(torch.autograd.grad(outputs, [x0, z], cotangents))
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours.cpu(), theirs)


def test_against_autograd_in_float64(device, backend):
    for table in (ddpm_table(SCHEDULE, 10), ddim_table(SCHEDULE, 10, eta=0.5, clip=1.0),
                  ddpm_table(SCHEDULE, 10, variance="learned_range")):  # fmt: skip
        given = arguments(table.structure, shape=(4, 6, 8, 8))
        t = table.timesteps[4]
        ours = gradients(table, given["model_output"], t, given["x"], device=device, backend=backend, seeds=3)
        exact = gradients(table, given["model_output"].double(), t, given["x"].double(), device="cpu",
                          backend="reference", seeds=3)  # fmt: skip
        for mine, gold in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.double(), gold, rtol=2e-5, atol=2e-6)


def test_a_network_trains_through_the_chain(device, backend):
    """The gradients of a parameter, through five steps and the network between them."""
    found = []
    for where, kind in ((device, backend), ("cpu", "reference")):
        weight = torch.tensor(0.3, device=where, requires_grad=True)
        x = torch.ones(2, 3, 8, 8, device=where)
        table = ddpm_table(SCHEDULE, 10, clip=1.0)
        for row in range(5, 10):
            x = ops.step(table, torch.tanh(weight * x), None, x, row=row, seeds=2, backend=kind)
        x.square().mean().backward()
        found.append(weight.grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_gradient_of_a_gradient(device, backend):
    table = ddpm_table(SCHEDULE, 10, variance="learned_range")
    x = torch.randn(2, 3, 8, device=device, dtype=torch.float64)
    m = torch.randn(2, 6, 8, device=device, dtype=torch.float64, requires_grad=True)
    result = ops.step(table, m, None, x, row=3, seeds=1, backend=backend)
    (first,) = torch.autograd.grad(result.square().sum(), m, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), m)
    assert bool(second.isfinite().all()) and bool((second != 0).any())
