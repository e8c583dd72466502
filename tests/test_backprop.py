"""Gradients of whole chains: against plain autograd through the chain written out, and how much memory they take."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from test_memory import allocations, peak
from torch import nn

from fastdiff import noise
from fastdiff.backprop import Inversion
from fastdiff.samplers import DDIMSampler, DDPMSampler, TableSampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import Structure, Table, ddim_table, ddpm_table

SCHEDULE = NoiseSchedule.linear(100)
SHAPE = (3, 2, 4, 5)
SEED = 4


class Net(nn.Module):
    """A small network that is told the time, and a condition if there is one."""

    def __init__(self, outputs=2, width=6, dropout=0.0, scale=0.4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.enter = nn.Conv2d(2, width, 3, padding=1)
        self.leave = nn.Conv2d(width, outputs, 3, padding=1)
        self.times = nn.Embedding(100, width)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def forward(self, x, t, condition=None):
        h = self.enter(x) + self.times(t)[:, :, None, None]
        if condition is not None:
            h = h + condition.reshape(-1, 1, 1, 1)
        return self.leave(self.dropout(torch.tanh(h)))


@pytest.fixture(autouse=True)
def one_thread():
    """For tensors so small, threads are no help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SAMPLERS = {
    "ddpm": DDPMSampler(SCHEDULE, 8, clip=0.7),
    "ddpm without clip": DDPMSampler(SCHEDULE, 8, clip=None, variance="fixed_large"),
    "ddpm learned_range": DDPMSampler(SCHEDULE, 8, variance="learned_range"),
    "ddim": DDIMSampler(SCHEDULE, 8),
    "ddim eta": DDIMSampler(SCHEDULE, 8, eta=0.6, clip=0.7, eps="rederived"),
    "ddim v": DDIMSampler(SCHEDULE, 8, prediction="v", clip=(-0.4, 0.9), eta=0.2),
    "diffusers": DDIMSampler(SCHEDULE, 8, host="diffusers", eta=1.0),
}
INVERTIBLE = {
    "ddim": DDIMSampler(SCHEDULE, 20, clip=None),
    "ddim rederived": DDIMSampler(SCHEDULE, 20, clip=None, eps="rederived"),
    "ddim v": DDIMSampler(SCHEDULE, 20, clip=None, prediction="v"),
    "ddpm without noise": DDPMSampler(SCHEDULE, 20, clip=None, noise=False),
    "diffusers": DDIMSampler(SCHEDULE, 20, clip=None, host="diffusers"),
}


@pytest.fixture(params=SAMPLERS, ids=lambda name: name.replace(" ", "-"))
def sampler(request):
    return SAMPLERS[request.param]


def net_of(sampler, dtype=torch.float64, **options):
    if sampler in INVERTIBLE.values():
        options["scale"] = 0.1  # it is a contraction
    return Net(4 if sampler.table.structure.learned else 2, **options).to(dtype)


def start(dtype=torch.float64):
    return noise.normal(SHAPE, SEED, dtype=dtype).requires_grad_()


def loss_of(x):
    return (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() + x.square().mean()


def gradients(x, leaves, **options):
    return torch.autograd.grad(loss_of(x), leaves, **options)


def written_out(sampler, model, x, rows=None, backend="reference", seeds=SEED, **given):
    """The chain as plain autograd sees it: one step after another."""
    for row in range(len(sampler)) if rows is None else rows:
        t = torch.full((x.shape[0],), sampler.timesteps[row])
        step_noise = {} if "generator" in given or sampler.table.structure.variance == "none" else {"seeds": seeds}
        x = sampler.step(model(x, t), None, x, row=row, backend=backend, **step_noise, **given)
    return x


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def assert_close(found, expected, rtol=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= rtol * b.norm() and b.norm() > 0


# Against plain autograd


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
def test_gradients_are_those_of_plain_autograd(sampler, grad):
    net, x_T = net_of(sampler), start()
    leaves = [x_T, *net.parameters()]
    expected = written_out(sampler, net, x_T)
    found = sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad)
    assert torch.equal(found, expected)
    assert_close(gradients(found, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_bits_of_a_loop_of_steps(sampler, dtype):
    net, x_T = net_of(sampler, dtype), start(dtype)
    leaves = [x_T, *net.parameters()]
    expected = gradients(written_out(sampler, net, x_T, backend="auto"), leaves)
    for grad in ("full", "checkpoint"):
        assert_equal(gradients(sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad), leaves), expected)
    if dtype == torch.float32:
        plain = gradients(written_out(sampler, net, x_T), leaves)
        assert_close(expected, plain, 1e-4)


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
@pytest.mark.parametrize("steps", [1, 3, 8, 100])
def test_the_last_steps_only(steps, grad):
    """DRaFT-K: what comes before is a constant, and x_T has no gradient unless nothing does."""
    sampler = SAMPLERS["ddpm"]
    net, x_T = net_of(sampler), start()
    first = max(8 - steps, 0)
    with torch.no_grad():
        middle = written_out(sampler, net, x_T, range(first))
    expected = written_out(sampler, net, middle if first else x_T, range(first, 8))
    found = sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad, grad_steps=steps)
    assert torch.equal(found, expected)
    leaves = list(net.parameters())
    assert_close(gradients(found, leaves, retain_graph=True), gradients(expected, leaves, retain_graph=True))
    (by_start,) = gradients(found, [x_T], allow_unused=True)
    if first:
        assert by_start is None
    else:
        assert torch.equal(by_start, gradients(expected, [x_T])[0])


def test_the_last_steps_of_a_chain_that_starts_later():
    sampler = SAMPLERS["ddpm"]
    net, x0 = net_of(sampler), start()
    found = sampler.sample(net, x0=x0, start=0.5, seeds=SEED, grad="full", grad_steps=2)
    assert gradients(found, [x0], allow_unused=True, retain_graph=True) == (None,)
    x = noise_to(sampler, x0, 4)
    with torch.no_grad():
        x = written_out(sampler, net, x, range(4, 6))
    leaves = list(net.parameters())
    assert_close(gradients(found, leaves), gradients(written_out(sampler, net, x, range(6, 8)), leaves))


def noise_to(sampler, x0, row):
    alpha_bar = SCHEDULE.alphas_cumprod[sampler.timesteps[row]]
    z = noise.normal(SHAPE, SEED, t=sampler.timesteps[row], domain="forward", dtype=x0.dtype)
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * z


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
def test_images_to_start_from_get_gradients(grad):
    sampler = SAMPLERS["ddpm"]
    net, x0 = net_of(sampler), start()
    found = sampler.sample(net, x0=x0, start=0.5, seeds=SEED, grad=grad)
    expected = written_out(sampler, net, noise_to(sampler, x0, 4), range(4, 8))
    assert_close(gradients(found, [x0, *net.parameters()]), gradients(expected, [x0, *net.parameters()]))


def test_without_a_start_the_noise_is_made_as_ever(sampler):
    net = net_of(sampler)
    plain = sampler.sample(net, SHAPE, seeds=SEED, dtype=torch.float64)
    assert not plain.requires_grad
    for grad in ("full", "checkpoint"):
        found = sampler.sample(net, SHAPE, seeds=SEED, dtype=torch.float64, grad=grad)
        assert torch.equal(found, plain) and found.requires_grad


def test_nothing_that_requires_grad_is_no_error():
    for sampler in (SAMPLERS["ddpm"], INVERTIBLE["ddim"]):
        net = net_of(sampler).requires_grad_(False)
        for grad in ("full", "checkpoint", Inversion(tolerance=1e-3)):
            if isinstance(grad, str) or sampler is INVERTIBLE["ddim"]:
                found = sampler.sample(net, SHAPE, seeds=SEED, dtype=torch.float64, grad=grad)
                assert torch.equal(found, sampler.sample(net, SHAPE, seeds=SEED, dtype=torch.float64))
                assert not found.requires_grad


# What a chain may depend on


@pytest.mark.parametrize(("dtype", "per_sample"), [(torch.float32, False), (torch.float64, True)])
def test_guidance_its_scale_and_what_the_model_is_given(dtype, per_sample):
    for name in ("ddpm", "ddpm learned_range", "ddim"):
        sampler = SAMPLERS[name]
        net, x_T = net_of(sampler, dtype), start(dtype)
        weight = torch.tensor([1.5, 2.0, 0.5] if per_sample else 1.5, dtype=dtype, requires_grad=True)
        condition = torch.tensor([0.3, -0.2, 0.9], dtype=dtype, requires_grad=True)
        scale, given = weight * 1.25, condition.sin()  # computed from leaves, which backward is not to reach twice
        leaves = [x_T, weight, condition, *net.parameters()]
        x = x_T
        for row, t in enumerate(sampler.timesteps):
            told = torch.full((3,), t)
            source = {"seeds": SEED} if sampler.table.structure.variance != "none" else {}
            guidance = {"uncond_output": net(x, told, 0 * given), "guidance_scale": scale}
            x = sampler.step(net(x, told, given), None, x, row=row, backend="reference", **source, **guidance)
        expected = gradients(x, leaves, retain_graph=True)
        options = {"model_kwargs": {"condition": given}, "uncond_kwargs": {"condition": 0 * given}}
        found = {}
        for grad in ("full", "checkpoint"):
            x = sampler.sample(net, x_T=x_T, seeds=SEED, guidance_scale=scale, grad=grad, **options)
            found[grad] = gradients(x, leaves, retain_graph=True)
            assert_close(found[grad], expected, 1e-12 if dtype == torch.float64 else 1e-4)
        assert_equal(found["full"], found["checkpoint"])


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", ["ddpm", "ddpm learned_range", "diffusers"])
def test_a_generator_is_played_again(name, many):
    sampler = SAMPLERS[name]
    net, x_T = net_of(sampler), start()
    leaves = [x_T, *net.parameters()]

    def generator():
        made = [torch.Generator().manual_seed(k) for k in range(3)]
        return [made[0], made[1], made[0]] if many else made[0]  # one may serve several samples

    expected = written_out(sampler, net, x_T, generator=generator())
    for grad in ("full", "checkpoint"):
        used = generator()
        found = sampler.sample(net, x_T=x_T, generator=used, grad=grad)
        assert torch.equal(found, expected)
        after = [one.get_state() for one in used] if many else used.get_state()
        assert_close(gradients(found, leaves), gradients(expected, leaves, retain_graph=True))
        # and is not moved by the backward
        assert all(map(torch.equal, after, [one.get_state() for one in used] if many else used.get_state()))


def test_dropout_is_the_same_in_the_backward():
    sampler = SAMPLERS["ddpm"]
    net, x_T = net_of(sampler, dropout=0.5), start()
    leaves = [x_T, *net.parameters()]
    found, calls = [], []
    net.register_forward_pre_hook(lambda *call: calls.append(1))
    for grad, expected in (("full", 8), ("checkpoint", 16)):
        torch.manual_seed(3)
        calls.clear()
        found.append(gradients(sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad), leaves))
        assert len(calls) == expected
    assert_equal(*found)


@pytest.mark.parametrize("many", [False, True])
def test_a_generator_that_the_model_draws_from_too(many):
    """Where the noise is part of the gradient: its own draws and dropout's come in turn from torch's default one."""
    sampler = SAMPLERS["ddpm learned_range"]
    net, x_T = net_of(sampler, dropout=0.5), start()
    other = torch.Generator()
    leaves = [x_T, *net.parameters()]

    def model(x, t):
        return net(x + 0.1 * torch.randn(x.shape, generator=other, dtype=x.dtype), t)

    found = []
    for grad in ("full", "checkpoint"):
        torch.manual_seed(3)
        other.manual_seed(5)
        generator = [other, torch.default_generator, other] if many else torch.default_generator
        # one that is not given is not played again
        x = sampler.sample(model if many else net, x_T=x_T, generator=generator, grad=grad)
        states = torch.get_rng_state(), other.get_state()
        found.append((x, *gradients(x, leaves, retain_graph=True)))
        assert_equal(gradients(x, leaves), found[-1][1:])
        assert_equal((torch.get_rng_state(), other.get_state()), states)
    assert_equal(*found)


def test_generators_are_as_they_were_after_a_backward_that_fails():
    sampler = SAMPLERS["ddpm learned_range"]
    net, calls = net_of(sampler), []

    def model(x, t):
        calls.append(1)
        if len(calls) > 8:
            torch.randn(3, generator=generator)
            raise KeyError("the model")
        return net(x, t)

    generator = torch.Generator().manual_seed(2)
    x = sampler.sample(model, SHAPE, generator=generator, dtype=torch.float64, grad="checkpoint")
    state = generator.get_state()
    with pytest.raises(KeyError, match="the model"):
        loss_of(x).backward()
    assert len(calls) == 9 and torch.equal(generator.get_state(), state)


def test_statistics_move_at_every_call():
    sampler = INVERTIBLE["ddim"]
    calls = {}
    for grad in ("full", "checkpoint", Inversion(2, tolerance=10)):
        norm = nn.BatchNorm2d(2, dtype=torch.float64)
        net = nn.Sequential(norm, nn.Conv2d(2, 2, 1, dtype=torch.float64))
        loss_of(sampler.sample(lambda x, t, net=net: 0.1 * net(x), SHAPE, dtype=torch.float64, grad=grad)).backward()
        calls[grad if isinstance(grad, str) else "inverted"] = int(norm.num_batches_tracked)
    assert calls["full"] == 20 and calls["checkpoint"] == 40 and calls["inverted"] > 40


def test_a_table_in_training():
    alphas = torch.tensor(SCHEDULE.alphas_cumprod.copy(), requires_grad=True)
    for make in (ddpm_table, lambda alphas, steps, clip: ddim_table(alphas, steps, eta=0.5, clip=clip)):
        sampler = TableSampler(make(alphas, [80, 40, 10], clip=0.7))
        net, x_T = Net().double(), start()
        leaves = [alphas, x_T, *net.parameters()]
        expected = gradients(written_out(sampler, net, x_T), leaves, retain_graph=True)
        for grad in ("full", "checkpoint"):
            found = sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad)
            assert_close(gradients(found, leaves, retain_graph=True), expected)


def test_hooks_are_differentiated(sampler):
    """What denoised_fn and cond_fn return is part of the graph, if it has one: against finite differences."""
    net, x_T = net_of(sampler), start()
    push = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    leaves = [x_T, push, *net.parameters()]

    def towards(x, t):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = -(push * x.square() + x.cos()).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    def chain(grad=None):
        hooks = {"denoised_fn": lambda x0: push * x0.tanh(), "cond_fn": towards}
        return sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad, **hooks)

    found = gradients(chain("full"), leaves)
    assert_equal(gradients(chain("checkpoint"), leaves), found)
    for leaf, gradient in zip(leaves, found, strict=True):
        direction = noise.normal((1, leaf.numel()), SEED, dtype=torch.float64).reshape(leaf.shape)
        values = []
        for move in (1e-6, -2e-6, 1e-6):  # there, back over it, and home
            leaf.detach().add_(direction, alpha=move)
            values.append(loss_of(chain()))
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


def test_functional_models_and_closures():
    sampler = SAMPLERS["ddpm"]
    net, x_T = net_of(sampler), start()
    parameters = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    gain = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)

    def model(x, t):
        return gain.exp() * torch.func.functional_call(net, parameters, (x, t))

    leaves = [x_T, gain, *parameters.values()]
    expected = gradients(written_out(sampler, model, x_T), leaves)
    for grad in ("full", "checkpoint"):
        assert_close(gradients(sampler.sample(model, x_T=x_T, seeds=SEED, grad=grad), leaves), expected)


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
def test_a_network_that_takes_its_own_gradient(grad):
    """A score that is the gradient of an energy (Salimans & Ho 2021), differentiated again."""
    sampler = SAMPLERS["ddpm"]
    net, x_T = net_of(sampler), start()

    def score(x, t):
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad(net(x, t).square().sum(), x, create_graph=True)[0]

    expected = gradients(written_out(sampler, score, x_T), list(net.parameters()))
    assert_close(gradients(sampler.sample(score, x_T=x_T, seeds=SEED, grad=grad), list(net.parameters())), expected)
    seen = []
    x = sampler.sample(score, SHAPE, seeds=SEED, dtype=torch.float64, grad=grad, keep=lambda row, t: seen.append(t))
    assert x[0].requires_grad


def test_transforms_of_torch_func():
    sampler = SAMPLERS["ddpm without clip"]
    net, x_T = net_of(sampler), start()
    direction = noise.normal(SHAPE, SEED + 1, dtype=torch.float64)

    def loss(x_T):
        return loss_of(sampler.sample(net, x_T=x_T, seeds=SEED, grad="full"))

    expected = gradients(written_out(sampler, net, x_T), [x_T])
    assert_close([torch.func.grad(loss)(x_T.detach())], expected)
    _, tangent = torch.func.jvp(loss, (x_T.detach(),), (direction,))
    torch.testing.assert_close(tangent, (expected[0] * direction).sum(), rtol=1e-11, atol=0)


def test_compiled_networks():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    leaves = [x_T, *net.parameters()]
    compiled = torch.compile(lambda x, t: Net.forward(net, x, t), backend="aot_eager")
    expected = gradients(sampler.sample(net, x_T=x_T, grad="full"), leaves)
    for grad in ("full", "checkpoint", Inversion(tolerance=1e-6)):
        assert_close(gradients(sampler.sample(compiled, x_T=x_T, grad=grad), leaves), expected, 1e-6)


def test_saved_tensor_hooks():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    leaves = [x_T, *net.parameters()]
    expected = gradients(sampler.sample(net, x_T=x_T, grad="full"), leaves)
    for grad in ("full", "checkpoint", Inversion(tolerance=1e-6)):
        with torch.autograd.graph.save_on_cpu():
            found = sampler.sample(net, x_T=x_T, grad=grad)
        assert_close(gradients(found, leaves), expected, 1e-6)


def test_module_hooks_see_every_call():
    sampler = SAMPLERS["ddim"]
    net, seen = net_of(sampler), []
    net.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    x = sampler.sample(net, SHAPE, seeds=SEED, dtype=torch.float64, grad="checkpoint")
    # a time tensor of its own at each step: the backward reads them
    assert [int(t[0]) for t in seen] == list(sampler.timesteps)
    loss_of(x).backward()
    assert [int(t[0]) for t in seen[8:]] == list(reversed(sampler.timesteps))


@pytest.mark.parametrize("time", ["float", "scaled_1000", "fraction"])
def test_a_float_time_that_the_backward_reads(time):
    sampler = dataclasses.replace(SAMPLERS["ddim"], time=time)
    weight = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)

    def model(x, t):
        return 0.1 * x * torch.sin(weight * t.reshape(-1, 1, 1, 1))

    told = [float(t) * {"float": 1, "scaled_1000": 10, "fraction": 0.01}[time] for t in sampler.timesteps]
    x = x_T = start()
    for row, t in enumerate(told):
        x = sampler.step(model(x, torch.full((3,), t, dtype=torch.float64)), None, x, row=row, backend="reference")
    expected = gradients(x, [weight])
    for grad in ("full", "checkpoint", Inversion(tolerance=1)):
        if isinstance(grad, Inversion):
            sampler = dataclasses.replace(sampler, clip=None)
            expected = gradients(sampler.sample(model, x_T=x_T, grad="full"), [weight])
        rtol = 1e-6 if isinstance(grad, Inversion) else 1e-12
        assert_close(gradients(sampler.sample(model, x_T=x_T, grad=grad), [weight]), expected, rtol)


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
def test_autocast(grad):
    """Also after steps without a graph, whose casts of the weights have none."""
    sampler = SAMPLERS["ddpm"]
    net, x_T = net_of(sampler, torch.float32), start(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            middle = written_out(sampler, net, x_T, range(4))
        torch.clear_autocast_cache()
        expected = written_out(sampler, net, middle, range(4, 8), backend="auto")
        found = sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad, grad_steps=4)
    assert torch.equal(found, expected)
    assert_equal(gradients(found, list(net.parameters())), gradients(expected, list(net.parameters())))


def test_double_backward():
    sampler = SAMPLERS["ddpm"]
    net, x_T = net_of(sampler), start()
    found = []
    for grad in ("full", "checkpoint"):
        (first,) = gradients(sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad), [x_T], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x_T, *net.parameters()], allow_unused=True))
    plain = gradients(written_out(sampler, net, x_T), [x_T], create_graph=True)[0]
    expected = torch.autograd.grad(plain.square().sum(), [x_T, *net.parameters()], allow_unused=True)
    for gradient in found:
        assert [u is None for u in gradient] == [u is None for u in expected]
        pairs = [(a, b) for a, b in zip(gradient, expected, strict=True) if b is not None]
        assert_close(*zip(*pairs, strict=True), rtol=1e-11)


# States on the way


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
def test_states_on_the_way_are_part_of_the_graph(grad):
    sampler = SAMPLERS["ddpm without clip"]
    net, x_T = net_of(sampler), start()
    seen = []
    x, kept = sampler.sample(
        net, x_T=x_T, seeds=SEED, grad=grad, keep=2, callback=lambda row, t, x: seen.append((t, x)), progress=False
    )
    assert [t for t, _ in seen] == list(sampler.timesteps) and [t for t, _ in kept] == list(sampler.timesteps[1::2])
    leaves = [x_T, *net.parameters()]
    for row in (1, 5, 7):
        expected = gradients(written_out(sampler, net, x_T, range(row + 1)), leaves, allow_unused=True)
        for state in (seen[row][1], kept[row // 2][1]):
            found = gradients(state, leaves, retain_graph=True)
            assert_close(found, expected)
    assert kept[-1][1].data_ptr() != x.data_ptr()


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
def test_what_a_callback_writes_into_a_state_is_differentiated(grad):
    sampler = SAMPLERS["ddpm"]
    net, x_T = net_of(sampler), start()
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def halve(row, t, x):
        if row == 3:
            x.mul_(gain)

    x = sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad, callback=halve)
    expected = written_out(sampler, net, written_out(sampler, net, x_T, range(4)) * gain, range(4, 8))
    leaves = [x_T, gain, *net.parameters()]
    assert_close(gradients(x, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
def test_a_state_that_is_written_into_later_is_an_error(grad):
    sampler = SAMPLERS["ddpm"]
    x, kept = sampler.sample(net_of(sampler), SHAPE, seeds=SEED, dtype=torch.float64, grad=grad, keep=1)
    with torch.no_grad():
        kept[3][1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(x).backward()


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
@pytest.mark.parametrize(
    "change", [None, "seeds", "scale", "condition", "nested", "uncond", "weight", "gain", "behind"]
)
def test_what_a_chain_depends_on_and_is_written_into_later_is_an_error(change, grad):
    """A step that is done again would be another one."""
    sampler = SAMPLERS["ddpm learned_range"]
    net = net_of(sampler)
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    behind = torch.zeros((), dtype=torch.float64, requires_grad=True)
    changed = {
        "seeds": torch.tensor([5, 6, 7]),
        "scale": torch.full((3,), 1.5, dtype=torch.float64),
        "condition": torch.ones(3, dtype=torch.float64),
        "nested": torch.ones((), dtype=torch.float64),
        "uncond": torch.zeros(3, dtype=torch.float64),
        "weight": net.leave.weight,
        "gain": gain,
        "behind": behind,
    }

    def model(x, t, condition, nest):
        return net(x, t) * gain * condition.reshape(-1, 1, 1, 1) * nest["a"][0] * nest["b"]

    def chain():
        return sampler.sample(
            model,
            SHAPE,
            dtype=torch.float64,
            seeds=changed["seeds"],
            guidance_scale=changed["scale"],
            model_kwargs={"condition": changed["condition"], "nest": {"a": [changed["nested"]], "b": behind.exp()}},
            uncond_kwargs={"condition": changed["uncond"]},
            grad=grad,
        )

    leaves = [gain, behind, *net.parameters()]
    expected = gradients(chain(), leaves)
    x = chain()
    if change is not None:
        with torch.no_grad():
            changed[change].add_(1)
    if change in (None, "behind"):  # it is not computed again
        assert_equal(gradients(x, leaves), expected)
    else:
        with pytest.raises(RuntimeError, match="modified (by an inplace|in place)"):
            gradients(x, leaves)


def test_a_checkpointed_model_is_given_tensors_of_inference_mode():
    sampler = SAMPLERS["ddpm"]
    net = net_of(sampler)
    with torch.inference_mode():
        condition = torch.ones(3, dtype=torch.float64)
    options = {"seeds": SEED, "dtype": torch.float64, "model_kwargs": {"condition": condition}}
    found = [
        gradients(sampler.sample(net, SHAPE, grad=grad, **options), list(net.parameters()))
        for grad in ("full", "checkpoint")
    ]
    assert_equal(*found)


def test_states_before_the_last_steps_have_no_graph():
    sampler = SAMPLERS["ddpm"]
    net, x_T = net_of(sampler), start()
    before = x_T.detach().clone()
    _, kept = sampler.sample(net, x_T=x_T, seeds=SEED, grad="full", grad_steps=3, keep=1)
    assert [state.requires_grad for _, state in kept] == [False] * 5 + [True] * 3
    assert torch.equal(x_T, before)


def test_progress_counts_all_steps(monkeypatch):
    seen = []

    def bar(rows):
        for row in rows:
            seen.append(row)
            yield row

    monkeypatch.setattr("fastdiff.samplers._progress_bar", bar)
    sampler = SAMPLERS["ddpm"]
    for grad, steps in (("full", 3), ("checkpoint", 3), ("full", None)):
        seen.clear()
        sampler.sample(
            net_of(sampler), SHAPE, seeds=SEED, dtype=torch.float64, grad=grad, grad_steps=steps, progress=True
        )
        assert seen == list(range(8))


def test_a_start_made_in_inference_mode_enters_the_graph():
    sampler = SAMPLERS["ddpm"]
    with torch.inference_mode():
        x_T = start().detach()
    net = net_of(sampler)
    expected = gradients(sampler.sample(net, x_T=x_T.clone(), seeds=SEED, grad="full"), list(net.parameters()))
    for grad in ("full", "checkpoint"):
        found = gradients(sampler.sample(net, x_T=x_T, seeds=SEED, grad=grad), list(net.parameters()))
        assert_equal(found, expected)


# Inversion


@pytest.mark.parametrize("name", INVERTIBLE)
def test_inversion_in_float64_is_nearly_exact(name):
    sampler = INVERTIBLE[name]
    net, x_T = net_of(sampler), start()
    leaves = [x_T, *net.parameters()]
    inversion = Inversion(iterations=30, tolerance=1e-10)
    x = sampler.sample(net, x_T=x_T, grad=inversion)
    expected = sampler.sample(net, x_T=x_T, grad="full")
    assert torch.equal(x, expected) and inversion.error is None
    assert_close(gradients(x, leaves), gradients(expected, leaves), 1e-9)
    assert inversion.error is not None and inversion.error <= 1e-10


def test_the_error_of_an_inversion_falls_with_its_iterations():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    leaves = [x_T, *net.parameters()]
    expected = gradients(sampler.sample(net, x_T=x_T, grad="full"), leaves)
    errors, distances = [], []
    for iterations in (1, 3, 6):
        inversion = Inversion(iterations, tolerance=100.0)
        found = gradients(sampler.sample(net, x_T=x_T, grad=inversion), leaves)
        errors.append(inversion.error)
        distances.append(max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)))
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    assert distances[0] > 10 * distances[1] > 100 * distances[2]


def test_the_error_of_an_inversion_is_that_of_its_worst_sample():
    sampler = INVERTIBLE["ddim"]
    net = net_of(sampler)
    errors = []
    for x_T in (start(), *start().split(1)):
        inversion = Inversion(2, tolerance=100.0)
        x_T = x_T.detach().requires_grad_()
        gradients(sampler.sample(net, x_T=x_T, grad=inversion), [x_T])
        errors.append(inversion.error)
    assert errors[0] == pytest.approx(max(errors[1:]), rel=1e-6)


def test_an_error_above_the_tolerance_hands_out_no_gradient():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    inversion = Inversion(1, tolerance=1e-3)
    x = sampler.sample(net, x_T=x_T, grad=inversion)
    with pytest.raises(RuntimeError, match="relative error of 0.001 at most, got"):
        loss_of(x).backward()
    assert inversion.error > 1e-3
    assert x_T.grad is None and all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.float64, 1e-6)])
def test_an_inversion_back_to_zeros(dtype, tolerance):
    """Rounding is not measured against nothing, a real error still is."""
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler, dtype), start(dtype).detach()
    x_T[1] = 0
    x_T.requires_grad_()
    leaves = [x_T, *net.parameters()]
    inversion = Inversion(30, tolerance=tolerance)
    found = gradients(sampler.sample(net, x_T=x_T, grad=inversion), leaves)
    assert 0 < inversion.error <= tolerance
    assert_close(found, gradients(sampler.sample(net, x_T=x_T, grad="full"), leaves), tolerance)
    with pytest.raises(RuntimeError, match="relative error"):
        gradients(sampler.sample(net, x_T=x_T, grad=Inversion(1, tolerance=tolerance)), leaves)


def test_a_chain_that_becomes_nan_has_no_inversion():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    x = sampler.sample(lambda x, t: net(x, t) / (t.min() > 50), x_T=x_T, grad=Inversion(tolerance=1e9))
    with pytest.raises(RuntimeError, match="got nan"):
        loss_of(x).backward()


def test_inversion_with_guidance_and_given_tensors():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    weight = torch.tensor([1.5, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    condition = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    gain = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    calls = []

    class Sine(torch.autograd.Function):
        """Counts how often the graph behind what the model is given is walked."""

        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return u.sin()

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            (u,) = ctx.saved_tensors
            return grad * u.cos()

    outside = gain.exp()  # a tensor that the model closes over, computed from a leaf

    def model(x, t, nest):
        return outside * net(x, t, *nest["condition"])

    leaves = [x_T, weight, condition, gain, *net.parameters()]
    found = {}
    for grad in ("full", Inversion(30, tolerance=1e-9)):
        given = Sine.apply(condition)
        x = sampler.sample(
            model,
            x_T=x_T,
            guidance_scale=weight * 1.25,
            model_kwargs={"nest": {"condition": (given,)}},
            uncond_kwargs={"nest": {"condition": (0.1 * given,)}},
            grad=grad,
        )
        calls.clear()
        found[grad] = gradients(x, leaves, retain_graph=True)
        # once for the whole chain
        assert len(calls) == 1
        assert_equal(gradients(x, [given], retain_graph=True), gradients(x, [given]))
    full, inverted = found.values()
    assert_close(inverted, full, 1e-8)


def test_inversion_of_a_table_in_training():
    alphas = torch.tensor(SCHEDULE.alphas_cumprod.copy(), requires_grad=True)
    sampler = TableSampler(ddim_table(alphas, list(range(95, 0, -5)), clip=None))
    net, x_T = Net(scale=0.1).double(), start()
    leaves = [alphas, x_T, *net.parameters()]
    expected = gradients(sampler.sample(net, x_T=x_T, grad="full"), leaves, retain_graph=True)
    found = gradients(sampler.sample(net, x_T=x_T, grad=Inversion(30, tolerance=1e-9)), leaves)
    assert_close(found, expected, 1e-8)


def test_inversion_of_the_last_steps_and_of_a_part_of_the_leaves():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    net.enter.weight.requires_grad_(False)
    options = {"x_T": x_T, "grad_steps": 4}
    leaves = [net.enter.bias, net.leave.weight]
    inversion = Inversion(30, tolerance=1e-10)
    x = sampler.sample(net, grad=inversion, **options)
    assert_close(gradients(x, leaves), gradients(sampler.sample(net, grad="full", **options), leaves), 1e-9)
    assert gradients(sampler.sample(net, grad=inversion, **options), [x_T], allow_unused=True) == (None,)


def test_inversion_with_a_classifier():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    pull = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    options = {"x_T": x_T, "cond_fn": lambda x, t: -pull * x}
    leaves = [x_T, pull, *net.parameters()]
    expected = gradients(sampler.sample(net, grad="full", **options), leaves)
    found = gradients(sampler.sample(net, grad=Inversion(30, tolerance=1e-10), **options), leaves)
    assert_close(found, expected, 1e-9)


def test_inversion_with_experts_for_times():
    """Leaves that only some of the steps depend on."""
    sampler = INVERTIBLE["ddim"]
    early, late = net_of(sampler), net_of(sampler)
    x_T, leaves = start(), [*early.parameters(), *late.parameters()]

    def model(x, t):
        return (early if int(t[0]) > 50 else late)(x, t)

    expected = gradients(sampler.sample(model, x_T=x_T, grad="full"), leaves)
    assert_close(gradients(sampler.sample(model, x_T=x_T, grad=Inversion(30, tolerance=1e-10)), leaves), expected, 1e-9)


@pytest.mark.parametrize("change", ["other tensors", "modified", "given", "hooks", "result", "noise"])
def test_what_an_inversion_cannot_see_is_an_error(change):
    sampler = INVERTIBLE["ddim"]
    nets = [net_of(sampler)]
    inversion = Inversion(tolerance=0.1)

    condition = torch.zeros(3, dtype=torch.float64)

    def model(x, t, condition):
        return nets[-1](x, t, condition)

    if change == "noise":
        nets[0] = net_of(sampler, dropout=0.5)
    x = sampler.sample(model, SHAPE, dtype=torch.float64, model_kwargs={"condition": condition}, grad=inversion)
    message = {
        "other tensors": "depends on the same tensors",
        "modified": r"a tensor of shape \[2\] was modified in place",
        "given": r"a tensor of shape \[3\] was modified in place",
        "result": "modified by an inplace operation",
        "noise": "relative error",
        "hooks": "without hooks",
    }[change]
    if change == "hooks":
        nets[0].leave.bias.register_hook(lambda grad: grad.clamp(-1, 1))
    if change == "other tensors":
        nets.append(net_of(sampler))
    elif change == "modified":
        with torch.no_grad():
            nets[0].leave.bias.add_(1)
    elif change == "given":
        condition.add_(1e-9)
    with pytest.raises(RuntimeError, match=message):
        loss_of(x.mul_(2) if change == "result" else x).backward()


def test_an_inversion_refuses_hooks_at_the_first_step():
    sampler = INVERTIBLE["ddim"]
    net, calls = net_of(sampler), []
    net.leave.bias.register_hook(lambda grad: grad.clamp(-1, 1))
    net.register_forward_pre_hook(lambda *call: calls.append(1))
    with pytest.raises(RuntimeError, match="without hooks"):
        sampler.sample(net, SHAPE, dtype=torch.float64, grad=Inversion(tolerance=0.1))
    assert len(calls) == 1


def test_a_model_whose_gradients_an_inversion_would_not_reduce():
    """DistributedDataParallel with a static graph; what is looked at needs no process group."""
    parallel = nn.parallel.DistributedDataParallel

    class Called(Exception):
        pass

    class Model(parallel):
        def __call__(self, x, t):
            raise Called

    for static, error, match in ((True, ValueError, "model: expected .* without static_graph"), (False, Called, None)):
        model = Model.__new__(Model)
        nn.Module.__init__(model)
        model.static_graph = static
        with pytest.raises(error, match=match):
            INVERTIBLE["ddim"].sample(model, SHAPE, grad=Inversion(tolerance=0.1))
        with pytest.raises(Called):
            INVERTIBLE["ddim"].sample(model, SHAPE, grad="full")


def test_hooks_that_an_inversion_calls_once():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    condition = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for tensor in (x_T, condition):
        tensor.register_hook(lambda grad: 2 * grad)
    seen = []
    net.leave.bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    leaves = [x_T, condition, net.leave.bias]
    found = {}
    for grad in ("full", Inversion(30, tolerance=1e-10)):
        loss_of(sampler.sample(net, x_T=x_T, model_kwargs={"condition": condition}, grad=grad)).backward()
        found[grad] = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
    full, inverted = found.values()
    assert_close(inverted, full, 1e-9)
    assert len(seen) == 2


def test_an_inversion_has_no_second_derivative():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler), start()
    (first,) = gradients(sampler.sample(net, x_T=x_T, grad=Inversion(tolerance=0.1)), [x_T], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_inversion_under_autocast_and_in_half():
    sampler = INVERTIBLE["ddim"]
    net, x_T = net_of(sampler, torch.float32), start(torch.float32)
    leaves = [x_T, *net.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        expected = sampler.sample(net, x_T=x_T, grad="full")
        found = sampler.sample(net, x_T=x_T, grad=Inversion(tolerance=0.1))
    assert_close(gradients(found, leaves), gradients(expected, leaves), 0.05)  # the backward is outside
    half = [x_T.detach().bfloat16().requires_grad_(), *net.bfloat16().parameters()]
    inversion = Inversion(tolerance=0.2)
    found = gradients(sampler.sample(net, x_T=half[0], grad=inversion), half)
    assert all(u.dtype == torch.bfloat16 and u.isfinite().all() for u in found) and 0 < inversion.error <= 0.2


def test_an_inversion_of_no_samples():
    sampler = INVERTIBLE["ddim"]
    inversion = Inversion(tolerance=0.1)
    x = sampler.sample(net_of(sampler), (0, *SHAPE[1:]), dtype=torch.float64, grad=inversion)
    x.sum().backward()
    assert inversion.error == 0.0


@pytest.mark.parametrize(
    "grad", ["full", "checkpoint", Inversion(tolerance=0.1)], ids=["full", "checkpoint", "inverted"]
)
def test_a_chain_that_is_forgotten_leaves_no_memory(grad):
    sampler = INVERTIBLE["ddim"]
    net = net_of(sampler)
    gc.disable()
    try:
        for backward in (False, True):
            x = sampler.sample(net, SHAPE, dtype=torch.float64, grad=grad)
            if backward:
                loss_of(x).backward()
            gone = weakref.ref(x.untyped_storage())
            assert gone() is not None
            del x
            assert gone() is None
    finally:
        gc.enable()


# Bad input


def test_bad_input_is_told_before_the_model_is_called():
    def model(x, t):
        raise AssertionError("the model was called")

    ddpm, ddim = SAMPLERS["ddpm"], INVERTIBLE["ddim"]
    inversion = Inversion(tolerance=0.1)
    alphas = torch.tensor(SCHEDULE.alphas_cumprod.copy(), requires_grad=True)
    trained = TableSampler(ddim_table(alphas, 5, clip=None, eta=0.5))
    x0 = DDIMSampler(SCHEDULE, [90, 0], prediction="x0", eps="rederived", clip=None)
    rows = ddim.table.rows
    x_prev = TableSampler(Table(rows, Structure(x0="none", a0=False, eps="output", ae=True), ddim.timesteps))

    def refused(error, match, sampler=ddpm, **options):
        with pytest.raises(error, match=match):
            sampler.sample(model, SHAPE, **options)

    refused(ValueError, "grad: expected None, 'full', 'checkpoint' or an Inversion, got 'half'", grad="half")
    refused(TypeError, "grad: expected None, 'full', 'checkpoint' or an Inversion, got bool", grad=True)
    refused(TypeError, "grad: .* got type", grad=Inversion)
    refused(ValueError, "grad_steps: expected None without grad, got 3", grad_steps=3)
    refused(ValueError, "grad_steps: expected an int >= 1, got 0", grad="full", grad_steps=0)
    refused(TypeError, "grad_steps: expected an int, got float", grad="full", grad_steps=1.5)
    for grad in ("full", "checkpoint", inversion):
        with torch.no_grad():
            refused(ValueError, "grad: expected None with gradients off", grad=grad)
        with torch.inference_mode():
            refused(ValueError, "grad: expected None inside torch.inference_mode", grad=grad)
    refused(ValueError, "grad: expected an Inversion of a chain without noise, 'ddpm' adds noise", grad=inversion)
    refused(ValueError, "grad: .* without clip", SAMPLERS["ddim"], grad=inversion)
    refused(ValueError, "grad: .* at t = 0 it is multiplied by 0.0", x0, grad=inversion)
    refused(ValueError, "grad: .* it is multiplied by 0.0", x_prev, grad=inversion)
    for name, value in (("keep", 2), ("callback", print), ("denoised_fn", torch.sin)):
        refused(ValueError, f"{name}: expected None beside an Inversion", ddim, grad=inversion, **{name: value})
    for name in ("denoised_fn", "cond_fn"):
        refused(ValueError, f"{name}: .* table in training", trained, grad="full", **{name: torch.sin})
    for options, error, match in (
        ({"iterations": 0, "tolerance": 1}, ValueError, "iterations: expected an int >= 1, got 0"),
        ({"iterations": 2.0, "tolerance": 1}, TypeError, "iterations: expected an int"),
        ({"tolerance": 0}, ValueError, "tolerance: expected a number > 0, got 0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance: expected a finite number"),
        ({"tolerance": "1"}, TypeError, "tolerance: expected a number"),
        ({}, TypeError, "tolerance"),
    ):
        with pytest.raises(error, match=match):
            Inversion(**options)


# Memory


def test_memory_of_a_chain():
    """A chain of 50 steps keeps its states and one pass through the network, or two states."""
    sampler = DDIMSampler(NoiseSchedule.linear(1000), 50, clip=None)
    one = DDIMSampler(NoiseSchedule.linear(1000), [999], clip=None)
    shape = (4, 2, 48, 48)
    net = Net(width=24, scale=0.1)
    net.times = nn.Embedding(1000, 24)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def train(sampler, grad):
        x = sampler.sample(net, shape, seeds=SEED, grad=grad)
        # a loss that keeps no state of its own
        x.backward(torch.ones_like(x))

    state = 4 * int(np.prod(shape))
    single = peak(lambda: train(one, "full"))
    full = peak(lambda: train(sampler, "full"))
    checkpoint = peak(lambda: train(sampler, "checkpoint"))
    inversion = Inversion(3, tolerance=0.5)
    inverted = peak(lambda: train(sampler, inversion))
    assert inversion.error is not None
    assert 50 * state <= checkpoint <= 1.1 * (50 * state + single)
    assert inverted <= single + 6 * state
    assert full >= 50 * 12 * state  # the measurement sees what autograd keeps: the hidden layer of every pass


def test_a_chain_without_gradients_allocates_nothing_for_them():
    sampler = SAMPLERS["ddim"]
    buffer, x_T = torch.ones(16, 2, 40, 40), torch.ones(16, 2, 40, 40)
    large = [size for size in allocations(lambda: sampler.sample(lambda x, t: buffer, x_T=x_T)) if size > 4096]
    assert large == [x_T.nbytes]


def test_a_chain_without_gradients_does_not_lose_those_of_transforms():
    sampler = DDIMSampler(NoiseSchedule.linear(1000), 5, clip=None)
    x = torch.randn(2, 3, dtype=torch.float64)

    def chain(x, grad):
        return sampler.sample(lambda x, t: x * 0.3, x_T=x, grad=grad)

    by_autograd = torch.autograd.functional.jacobian(lambda x: chain(x, "full"), x)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: chain(x, "full"))(x), by_autograd)
    inversion = Inversion(tolerance=1e-6)
    refused = [
        (
            f"grad: expected 'full' under torch.func and in forward mode, got {given}",
            lambda x, grad=grad: chain(x, grad),
        )
        for grad, given in ((None, "None"), ("checkpoint", "'checkpoint'"), (inversion, "Inversion"))
    ]
    refused += [
        ("iterate: expected to be called outside torch.func", lambda x: sampler.iterate(torch.sin, x_T=x)),
        ("invert: expected to be called outside torch.func", lambda x: sampler.invert(torch.sin, x)),
        (
            "grad_steps: expected all 5 steps .* got 3",
            lambda x: sampler.sample(torch.sin, x_T=x, grad="full", grad_steps=3),
        ),
    ]
    for match, function in refused:
        for transform in (torch.func.jacfwd, torch.func.jacrev, torch.vmap):
            with pytest.raises(ValueError, match=match):
                transform(lambda x, function=function: function(x[None] if x.dim() == 1 else x))(x)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match=match):
            function(torch.autograd.forward_ad.make_dual(x, x))
    # all of the steps are no part of them
    tangent = torch.func.jvp(
        lambda x: sampler.sample(lambda x, t: x * 0.3, x_T=x, grad="full", grad_steps=5), (x,), (x,)
    )
    torch.testing.assert_close(tangent[1], torch.einsum("ijkl,kl", by_autograd, x))
