"""On the GPU, what torch puts around a step: the compiler, vmap, checkpoints and forward mode, held to the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_compose import CASES, Case, compiled, direction, function_of, inputs, leaves, loss_of, run, stacked
from test_ops import SCHEDULE, assert_equal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastdiff.noise as contract
from fastdiff.samplers import DDPMSampler

pytestmark = pytest.mark.cuda

# one of each kind: clipped with both outputs, guided and re-derived, a learned variance, a target, a density
NAMES = ["ddpm clipped", "ddim rederived", "learned_range", "add_noise v", "log_prob"]


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def held(mine: Any, theirs: Any, exact: bool = True) -> None:
    for a, b in zip(mine, theirs, strict=True):
        if exact:
            assert_equal(a.detach().cpu(), b.detach())
        else:
            torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-4, atol=1e-4)


def exact_outputs(case: Case) -> bool:
    return case.density is None  # of a density, the logarithm is each device's own


@pytest.mark.parametrize("name", ["ddim rederived", "log_prob"])  # compiling each takes some seconds
def test_compiled_by_inductor(device, backend, name):
    """Forward in every bit, backward within rounding, and again for another batch."""
    case = CASES[name]
    torch._dynamo.reset()
    names = list(inputs(case))

    def function(t: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return run(case, dict(zip(names, tensors, strict=True)), t, backend=backend)

    fast = compiled(function, "inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            tensors = inputs(case, torch.float32, (batch, 2, 7))
            t = torch.tensor([400, 300, 200, 100, 300][:batch])
            given, theirs = leaves(on(device, tensors)), leaves(tensors)
            outputs = fast(t.to(device), *given)
            expected = run(case, dict(zip(names, theirs, strict=True)), t)
            held(outputs, expected, exact_outputs(case))
            found = torch.autograd.grad(loss_of(outputs), given)
            held(found, torch.autograd.grad(loss_of(expected), theirs), exact=False)
    torch._dynamo.reset()


def test_a_compiled_chain(device, backend):
    """Ten steps and a network, of which CUDA graphs are made by reduce-overhead, forward and backward."""
    torch._dynamo.reset()
    sampler = DDPMSampler(SCHEDULE, steps=10, clip=1.0, backend=backend)
    seeds = contract.seeds(1, 4).to(device)
    timesteps = torch.tensor(sampler.timesteps, device=device)
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 6).to(device)

    def chain(x: Tensor) -> Tensor:
        for k in range(10):
            x = sampler.step(network(x), timesteps[k].expand(x.shape[0]), x, seeds=seeds)
        return x

    fast = torch.compile(chain, fullgraph=True, mode="reduce-overhead" if device.type == "cuda" else None)
    x = torch.randn(4, 6, device=device).requires_grad_()
    expected = chain(x)
    wanted = torch.autograd.grad(expected.square().sum(), (x, network.weight))
    for _ in range(3):  # warmed up, captured, replayed
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        found = fast(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(torch.autograd.grad(found.square().sum(), (x, network.weight)), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_vmap_and_torch_func(device, backend, name):
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    every = tuple(range(len(tensors)))

    def results(values: list[Tensor], backend: str) -> tuple[Any, Any]:
        function = function_of(case, tensors, backend=backend)
        gradient = torch.func.grad(lambda *u: loss_of(function(*u)), argnums=every)
        return torch.vmap(function)(*values), torch.vmap(gradient)(*values)

    values = stacked(tensors, (0,) * len(tensors))
    mine, theirs = results([u.to(device) for u in values], backend), results(values, "auto")
    held(mine[0], theirs[0], exact_outputs(case))
    held(mine[1], theirs[1], exact=False)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(device, name):
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    found = []
    for where in (device, torch.device("cpu")):
        values, moves = (tuple(u.to(where) for u in us) for us in (tensors.values(), direction(tensors)))
        found.append(torch.func.jvp(function_of(case, tensors), values, moves)[1])
    assert all(u.abs().sum() > 0 for u in found[0])
    held(*found, exact=False)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_chain_of_checkpoints(device, backend, reentrant):
    """Each step is run twice, with the same noise, and gives the gradients of the chain that is kept."""
    sampler = DDPMSampler(SCHEDULE, steps=10, clip=1.0, backend=backend)
    torch.manual_seed(0)
    network, found = torch.nn.Linear(64, 64).to(device), []
    start = torch.randn(4, 64, device=device)
    for wrapped in (False, True):
        x = leaf = start.clone().requires_grad_()
        torch.manual_seed(3)
        for t in sampler.timesteps:

            def step(x: Tensor, t: int = t) -> Tensor:
                return sampler.step(network(x), t, x)  # seeds of torch's generator, which is wound back

            x = checkpoint(step, x, use_reentrant=reentrant) if wrapped else step(x)
        network.zero_grad()
        x.square().sum().backward()
        found.append((x.detach(), leaf.grad, network.weight.grad.clone()))
    for mine, theirs in zip(*found, strict=True):
        assert_equal(mine, theirs)


def test_saved_tensors_on_the_cpu_and_autocast(device, backend):
    case = CASES["learned_range"]
    tensors = inputs(case, torch.float32)
    results = []
    for moved in (False, True):
        given = leaves(on(device, tensors))
        hooks = torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if moved else torch.enable_grad()
        with hooks, torch.autocast(device.type, dtype=torch.bfloat16, enabled=moved):
            outputs = function_of(case, tensors, backend=backend)(*given)
        results.append((*outputs, *torch.autograd.grad(loss_of(outputs), given)))
    for mine, theirs in zip(*results, strict=True):
        assert_equal(mine, theirs)
