"""Samplers: chains against the papers' loops written out, one loop behind every face, hooks, sources of noise."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import noise, ops, tables
from fastdiff.samplers import DDIMSampler, DDPMSampler, Sampler, TableSampler, slerp, to_uint8
from fastdiff.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(100)
SHAPE = (3, 2, 4, 5)
MEAN, SPREAD = 0.3, 0.5


class Gaussian:
    """The exact model of data drawn from N(MEAN, SPREAD^2), in whatever is to be predicted."""

    def __init__(self, schedule=SCHEDULE, prediction="eps"):
        self.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
        self.prediction = prediction

    def __call__(self, x, t, **kwargs):
        ab = self.alphas_cumprod[t].reshape(-1, *(1,) * (x.dim() - 1))
        wide = x.double()
        eps = (1 - ab).sqrt() * (wide - ab.sqrt() * MEAN) / (ab * SPREAD**2 + 1 - ab)
        x0 = (wide - (1 - ab).sqrt() * eps) / ab.sqrt()
        m = {"eps": eps, "x0": x0, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0}[self.prediction]
        return m.to(x.dtype)


def learned(x, t, **kwargs):
    m = Gaussian()(x, t)
    return torch.cat([m, torch.sin(3 * m)], dim=1)


def step_noise(seeds, t, repeat=0, shape=SHAPE, dtype=torch.float64):
    return noise.normal(shape, seeds, t=t, repeat=repeat, domain="step", dtype=dtype)


SAMPLERS = {
    "ddpm": (DDPMSampler(SCHEDULE), Gaussian()),
    "ddpm respaced, fixed_large": (DDPMSampler(SCHEDULE, 10, variance="fixed_large", clip=None), Gaussian()),
    "ddpm x0": (DDPMSampler(SCHEDULE, "10,5", prediction="x0"), Gaussian(prediction="x0")),
    "ddpm learned_range": (DDPMSampler(SCHEDULE, 8, variance="learned_range"), learned),
    "ddpm learned": (DDPMSampler(SCHEDULE, 8, variance="learned"), learned),
    "ddpm without noise": (DDPMSampler(SCHEDULE, 10, noise=False), Gaussian()),
    "ddim": (DDIMSampler(SCHEDULE, 10), Gaussian()),
    "ddim eta 0.4": (DDIMSampler(SCHEDULE, 10, eta=0.4), Gaussian()),
    "ddim rederived": (DDIMSampler(SCHEDULE, 10, eta=0.4, eps="rederived", clip=0.6), Gaussian()),
    "ddim v": (DDIMSampler(SCHEDULE, 10, prediction="v", clip=0.6, eta=0.2), Gaussian(prediction="v")),
    "ddim x0": (DDIMSampler(SCHEDULE, 10, prediction="x0", clip=(-0.4, 0.9)), Gaussian(prediction="x0")),
    "diffusers": (DDIMSampler(SCHEDULE, 7, host="diffusers", eta=1.0), Gaussian()),
    "openai": (DDPMSampler(SCHEDULE, 10, host="openai"), Gaussian()),
}


@pytest.fixture(params=SAMPLERS, ids=lambda name: name.replace(" ", "-"))
def case(request):
    return SAMPLERS[request.param]


# The papers


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [None, [80, 50, 21, 20, 3]])
def test_ddpm_is_the_loop_of_the_paper(steps, variance, clip):
    """Ho et al. 2020, algorithm 2 through eq. 7, over the betas of the chain."""
    sampler = DDPMSampler(SCHEDULE, steps, variance=variance, clip=clip)
    model, seeds = Gaussian(), noise.seeds(5, 3)
    chain = list(range(99, -1, -1)) if steps is None else steps
    x = noise.normal(SHAPE, seeds, dtype=torch.float64)
    for t, t_prev in zip(chain, [*chain[1:], -1], strict=True):
        ab = float(SCHEDULE.alphas_cumprod[t])
        abp = float(SCHEDULE.alphas_cumprod[t_prev]) if t_prev >= 0 else 1.0
        beta = 1 - ab / abp
        x0 = (x - (1 - ab) ** 0.5 * model(x, torch.full((3,), t))) / ab**0.5
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        mean = abp**0.5 * beta / (1 - ab) * x0 + (1 - beta) ** 0.5 * (1 - abp) / (1 - ab) * x
        if t_prev >= 0:
            sigma = (beta * (1 - abp) / (1 - ab) if variance == "fixed_small" else beta) ** 0.5
            x = mean + sigma * step_noise(seeds, t)
        else:
            x = mean
    found = sampler.sample(model, SHAPE, seeds=5, dtype=torch.float64)
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("eps_form", ["raw", "rederived"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_loop_of_the_paper(eta, clip, eps_form):
    """Song et al. 2021, eq. 12 and 16."""
    sampler = DDIMSampler(SCHEDULE, [99, 60, 59, 17, 4], eta=eta, clip=clip, eps=eps_form)
    model, seeds = Gaussian(), noise.seeds(5, 3)
    x = noise.normal(SHAPE, seeds, dtype=torch.float64)
    for t, t_prev in ((99, 60), (60, 59), (59, 17), (17, 4), (4, -1)):
        ab = float(SCHEDULE.alphas_cumprod[t])
        abp = float(SCHEDULE.alphas_cumprod[t_prev]) if t_prev >= 0 else 1.0
        eps = model(x, torch.full((3,), t))
        x0 = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        if eps_form == "rederived":
            eps = (x - ab**0.5 * x0) / (1 - ab) ** 0.5
        sigma = eta * ((1 - abp) / (1 - ab) * (1 - ab / abp)) ** 0.5
        x = abp**0.5 * x0 + (1 - abp - sigma**2) ** 0.5 * eps + sigma * step_noise(seeds, t)
    found = sampler.sample(model, SHAPE, seeds=5, dtype=torch.float64)
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-12)


def test_ddim_of_eta_1_is_ddpm_with_rederived_eps():
    ddpm = DDPMSampler(SCHEDULE, 20, clip=0.4)
    for eps, equal in (("rederived", True), ("raw", False)):
        ddim = DDIMSampler(SCHEDULE, 20, eta=1.0, clip=0.4, eps=eps)
        a = ddpm.sample(Gaussian(), SHAPE, seeds=1, dtype=torch.float64)
        b = ddim.sample(Gaussian(), SHAPE, seeds=1, dtype=torch.float64)
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10) is equal


def test_samples_have_the_data_distribution():
    sampler = DDPMSampler(SCHEDULE, variance="fixed_large", clip=None)
    x = sampler.sample(Gaussian(), (4000, 16), seeds=0)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(SPREAD, abs=0.01)


# One loop behind every face


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sample_iterate_and_a_loop_of_steps_are_equal(case, dtype):
    sampler, model = case
    seeds = noise.seeds(3, SHAPE[0])
    sampled = sampler.sample(model, SHAPE, seeds=3, dtype=dtype)
    *_, (iterated, x0, last) = sampler.iterate(model, SHAPE, seeds=3, dtype=dtype)
    x = noise.normal(SHAPE, seeds, dtype=dtype)
    y, z = x.clone(), x.clone()
    for row, t in enumerate(sampler.timesteps):
        told = torch.full((SHAPE[0],), t)
        x = sampler.step(model(x, told), t, x, seeds=seeds)
        sampler.step(model(y, told), None, y, row=row, seeds=3, out=y)
        z, z0 = sampler.step_with_x0(model(z, told), told, z, seeds=seeds)
    assert torch.equal(sampled, iterated) and torch.equal(sampled, x)
    assert torch.equal(sampled, y) and torch.equal(sampled, z) and torch.equal(x0, z0)
    assert last == sampler.timesteps[-1] and sampled.dtype == dtype and sampled.shape == SHAPE


def test_backends_agree_in_every_bit(case):
    sampler, model = case
    other = dataclasses.replace(sampler, backend="reference")
    assert torch.equal(sampler.sample(model, SHAPE, seeds=3), other.sample(model, SHAPE, seeds=3))


def test_a_sample_depends_on_its_own_seed_alone(case):
    sampler, model = case
    seeds = torch.tensor([7, -1, 2**40])
    whole = sampler.sample(model, SHAPE, seeds=seeds)
    for b in range(3):
        assert torch.equal(whole[b : b + 1], sampler.sample(model, (1, *SHAPE[1:]), seeds=seeds[b : b + 1]))
    assert torch.equal(whole[1:], sampler.sample(model, (2, *SHAPE[1:]), seeds=seeds[1:]))


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    cut=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    name=st.sampled_from(["ddpm respaced, fixed_large", "ddpm x0", "ddim", "ddim rederived", "ddim v"]),
)
def test_any_split_of_the_batch_gives_the_same_samples(sizes, seeds, cut, dtype, name):
    sampler, model = SAMPLERS[name]
    seed, cut = torch.tensor(seeds), min(cut, len(seeds))
    parts = [sampler.sample(model, (len(part), *sizes), seeds=part, dtype=dtype) for part in (seed[:cut], seed[cut:])]
    assert torch.equal(torch.cat(parts), sampler.sample(model, (len(seeds), *sizes), seeds=seed, dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 3), (2,), (1, 1, 1, 1, 2)])
def test_other_shapes(shape):
    sampler = DDPMSampler(SCHEDULE, 5)
    assert sampler.sample(Gaussian(), shape, seeds=0).shape == shape
    assert sampler.sample(Gaussian(), list(shape), seeds=0).shape == shape
    assert sampler.sample(Gaussian(), torch.Size(shape), seeds=0).shape == shape


def test_the_layout_of_the_state_stays():
    x_T = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    x = DDPMSampler(SCHEDULE, 5).sample(Gaussian(), x_T=x_T, seeds=0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, DDPMSampler(SCHEDULE, 5).sample(Gaussian(), x_T=x_T.contiguous(), seeds=0))


# Chains


def test_a_repeated_timestep_has_noise_of_its_own():
    sampler = DDPMSampler(SCHEDULE, [(60, 30), (60, 30), (30, -1)], clip=None)
    seeds, model = noise.seeds(1, 3), Gaussian()
    assert sampler.timesteps == (60, 60, 30)
    x = noise.normal(SHAPE, seeds)
    for row, (t, repeat) in enumerate(((60, 0), (60, 1), (30, 0))):
        z = step_noise(seeds, t, repeat, dtype=torch.float32)
        x = sampler.step(model(x, torch.full((3,), t)), None, x, row=row, noise=z)
    assert torch.equal(sampler.sample(model, SHAPE, seeds=1), x)
    with pytest.raises(ValueError, match=r"row="):
        sampler.step(x, 60, x, seeds=1)


def test_pairs_and_lists_are_the_same_chain():
    model = Gaussian()
    as_list = DDIMSampler(SCHEDULE, [90, 40, 5]).sample(model, SHAPE, seeds=1)
    as_pairs = DDIMSampler(SCHEDULE, iter([(90, 40), (40, 5), (5, -1)]))
    assert torch.equal(as_list, as_pairs.sample(model, SHAPE, seeds=1))
    assert torch.equal(as_list, dataclasses.replace(as_pairs, eta=0.0).sample(model, SHAPE, seeds=1))
    assert torch.equal(as_list, DDIMSampler(SCHEDULE, torch.tensor([90, 40, 5])).sample(model, SHAPE, seeds=1))
    assert torch.equal(as_list, DDIMSampler(SCHEDULE, {5, 40, 90}).sample(model, SHAPE, seeds=1))


@pytest.mark.parametrize(
    ("options", "timesteps"),
    [
        ({"steps": 4}, (99, 74, 49, 24)),
        ({"steps": 4, "spacing": "leading"}, (75, 50, 25, 0)),
        ({"steps": 4, "spacing": "leading", "steps_offset": 1}, (76, 51, 26, 1)),
        ({"steps": 4, "host": "openai", "eps": "rederived"}, (99, 66, 33, 0)),
        ({"steps": 4, "host": "diffusers"}, (75, 50, 25, 0)),
        ({"steps": 4, "start": 0.5}, (49, 24)),
        ({"steps": 4, "start": 60}, (49, 24)),
        ({"steps": "ddim4"}, (75, 50, 25, 0)),
        ({"steps": "2,3"}, (99, 74, 50, 49, 0)),
        ({"steps": None, "start": 2}, (2, 1, 0)),
    ],
)
def test_chains(options, timesteps):
    sampler = DDIMSampler(SCHEDULE, **options)
    assert sampler.timesteps == timesteps and len(sampler) == len(timesteps)


def test_diffusers_ddim_keeps_its_stride():
    """There a step goes to t - T//S whatever the list, also when the chain is entered in the middle."""
    whole = DDIMSampler(SCHEDULE, 7, spacing="trailing", host="diffusers")
    table = tables.ddim_table(SCHEDULE, list(whole.timesteps), host="diffusers", clip=1.0)
    assert torch.equal(whole.table.rows, table.rows)
    part = dataclasses.replace(whole, start=0.5)
    assert torch.equal(part.table.rows, whole.table.rows[4:])
    assert torch.equal(DDIMSampler(SCHEDULE, whole.timesteps, host="diffusers").table.rows, table.rows)


@pytest.mark.parametrize(("start", "skipped"), [(0.0, 0), (0.5, 5), (0.99, 9), (99, 0), (69, 3), (70, 3), (9, 9)])
def test_start_in_the_middle(start, skipped):
    sampler, model = DDPMSampler(SCHEDULE, 10), Gaussian()
    states = [x for x, _, _ in sampler.iterate(model, SHAPE, seeds=2)]
    entered = states[skipped - 1] if skipped else noise.normal(SHAPE, 2)
    before = entered.clone()
    assert torch.equal(sampler.sample(model, x_T=entered, start=start, seeds=2), states[-1])
    assert torch.equal(entered, before)
    rest = list(sampler.iterate(model, x_T=entered, start=start, seeds=2))
    assert [t for _, _, t in rest] == list(sampler.timesteps[skipped:])
    if skipped:
        assert torch.equal(rest[0][0], states[skipped])
    fewer = dataclasses.replace(sampler, start=start)
    assert torch.equal(fewer.sample(model, x_T=entered, seeds=2), states[-1])


def test_image_to_image():
    sampler, model = DDIMSampler(SCHEDULE, 10), Gaussian()
    image = torch.full(SHAPE, 0.25)
    noised = ops.add_noise(image, 49, SCHEDULE, seeds=4)
    assert torch.equal(
        sampler.sample(model, x0=image, start=0.5, seeds=4), sampler.sample(model, x_T=noised, start=0.5)
    )
    generator = torch.Generator().manual_seed(3)
    noised = ops.add_noise(image, 49, SCHEDULE, noise=torch.randn(SHAPE, generator=generator))
    found = sampler.sample(model, x0=image, start=0.5, generator=generator.manual_seed(3))
    assert torch.equal(found, sampler.sample(model, x_T=noised, start=0.5))
    assert torch.equal(image, torch.full(SHAPE, 0.25))


# Inversion


@pytest.mark.parametrize(("prediction", "pairing"), [("eps", None), ("v", None), ("eps", "next"), ("v", "next")])
def test_inversion_error_falls_with_the_steps(prediction, pairing):
    x0 = MEAN + SPREAD * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = NoiseSchedule.linear(1000)
    model, before, errors = Gaussian(schedule, prediction), x0.clone(), []
    for steps in (10, 50, 250, 1000):
        sampler = DDIMSampler(schedule, steps, prediction=prediction, clip=None)
        x_T = sampler.invert(model, x0, pairing=pairing)
        errors.append((sampler.sample(model, x_T=x_T) - x0).abs().max().item())
    # of first order: five times the steps, a fifth of the error
    assert errors[0] > 3.5 * errors[1] > 3.5 * 4.5 * errors[2] > 3.5 * 4.5 * 3.5 * errors[3] and errors[3] < 0.01
    assert torch.equal(x0, before) and x_T.shape == x0.shape
    # the exact flow keeps a Gaussian's quantiles
    ab = schedule.alphas_cumprod[-1]
    exact = ab**0.5 * MEAN + (ab * SPREAD**2 + 1 - ab) ** 0.5 * (x0 - MEAN) / SPREAD
    assert (x_T - exact).abs().max().item() < 0.015


def test_inversion_of_x0_prediction_needs_a_noised_end():
    """At alpha_bar 1 no eps follows from x and x0; from alphas_cumprod[0] it does."""
    x0 = torch.full(SHAPE, 0.7, dtype=torch.float64)
    sampler, model = DDIMSampler(SCHEDULE, prediction="x0", clip=None), Gaussian(prediction="x0")
    for pairing in (None, "target", "source"):
        with pytest.raises(
            ValueError, match="prediction: .*got 'x0', .*pairing='next' or final_alpha='first' would work"
        ):
            sampler.invert(model, x0, pairing=pairing)
    assert sampler.invert(model, x0, pairing="next").isfinite().all()
    with pytest.raises(ValueError, match="prediction: .*got 'x0', .*alpha_bar is 1; pairing='next' would work"):
        DDPMSampler(SCHEDULE, 10, prediction="x0").invert(model, x0)
    sampler = dataclasses.replace(sampler, steps=None, final_alpha="first")
    assert (sampler.sample(model, x_T=sampler.invert(model, x0)) - x0).abs().max().item() < 0.2


@pytest.mark.parametrize(
    ("pairing", "told"), [(None, [24, 49, 74, 99]), ("next", [24, 49, 74, 99]), ("source", [-1, 24, 49, 74])]
)
def test_inversion_tells_the_model_the_time_of_its_pairing(pairing, told):
    seen, states = [], []

    def model(x, t):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    sampler = DDIMSampler(SCHEDULE, 4)
    x_T = sampler.invert(
        model, torch.ones(SHAPE), pairing=pairing, callback=lambda row, t, x: states.append((row, t, x))
    )
    assert seen == told
    assert [(row, t) for row, t, _ in states] == list(enumerate(told)) and states[-1][2] is x_T


def test_inversion_with_guidance_and_start():
    model = Gaussian()
    sampler = DDIMSampler(SCHEDULE, 20, start=0.5)
    plain = sampler.invert(model, torch.ones(SHAPE))
    guided = sampler.invert(model, torch.ones(SHAPE), guidance_scale=1.0, uncond_kwargs={"y": None})
    torch.testing.assert_close(plain, guided)
    assert sampler.timesteps[0] == 49
    of_ddpm = DDPMSampler(SCHEDULE, 20, start=0.5).invert(model, torch.ones(SHAPE))
    assert torch.equal(plain, of_ddpm)


# Sources of noise


def test_seeds_and_the_default_generator(case):
    sampler, model = case
    torch.manual_seed(11)
    first = sampler.sample(model, SHAPE)
    second = sampler.sample(model, SHAPE)
    torch.manual_seed(11)
    assert torch.equal(first, sampler.sample(model, SHAPE))
    assert not torch.equal(first, second)
    assert torch.equal(
        sampler.sample(model, SHAPE, seeds=9), sampler.sample(model, SHAPE, seeds=noise.seeds(9, SHAPE[0]))
    )
    assert not torch.equal(sampler.sample(model, SHAPE, seeds=9), sampler.sample(model, SHAPE, seeds=10))


def test_a_step_without_a_source_draws_a_seed():
    sampler, x = DDPMSampler(SCHEDULE), torch.randn(SHAPE)
    torch.manual_seed(5)
    found = sampler.step(x, 50, x)
    torch.manual_seed(5)
    assert torch.equal(found, sampler.step(x, 50, x, seeds=noise.seeds(None, 3)))
    torch.manual_seed(5)
    assert torch.equal(found, sampler.step_with_x0(x, 50, x)[0])


def test_what_needs_no_noise_draws_none():
    sampler, x = DDIMSampler(SCHEDULE, 5), torch.randn(SHAPE)
    generator = torch.Generator()
    before, own = torch.get_rng_state(), generator.get_state()
    sampler.step(x, 99, x)
    sampler.step(x, 99, x, generator=generator)
    sampler.sample(Gaussian(), x_T=x)
    sampler.sample(Gaussian(), x_T=x, generator=generator)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(own, generator.get_state())
    # seeds may be handed to any sampler, so that one loop serves all
    assert torch.equal(sampler.step(x, 99, x, seeds=3), sampler.step(x, 99, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_generator_is_torchs_own_stream(case, dtype):
    sampler, model = case
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator, dtype=dtype)
    for t, s in zip(sampler.timesteps, sampler.table.rows[:, tables.COLUMN["s"]], strict=True):
        m = model(x, torch.full((SHAPE[0],), t))
        z = None
        if sampler.table.structure.variance != "none":
            draws = s != 0
            z = torch.randn(SHAPE, generator=generator, dtype=dtype) if draws else torch.zeros(SHAPE, dtype=dtype)
        x = sampler.step(m, t, x, noise=z)
    state = generator.get_state()
    generator.manual_seed(1)
    assert torch.equal(sampler.sample(model, SHAPE, generator=generator, dtype=dtype), x)
    assert torch.equal(generator.get_state(), state)
    generator.manual_seed(1)
    y = torch.randn(SHAPE, generator=generator, dtype=dtype)
    for t in sampler.timesteps:
        y = sampler.step(model(y, torch.full((SHAPE[0],), t)), np.int64(t), y, generator=generator)
    assert torch.equal(x, y) and torch.equal(generator.get_state(), state)


def test_a_generator_per_sample():
    sampler, model = DDPMSampler(SCHEDULE, 6), Gaussian()

    def generators(*numbers):
        return [torch.Generator().manual_seed(n) for n in numbers]

    whole = sampler.sample(model, SHAPE, generator=generators(1, 2, 3))
    for b, number in enumerate((1, 2, 3)):
        alone = sampler.sample(model, (1, *SHAPE[1:]), generator=generators(number))
        assert torch.equal(whole[b : b + 1], alone)
        assert torch.equal(alone, sampler.sample(model, (1, *SHAPE[1:]), generator=generators(number)[0]))
    x = torch.zeros(SHAPE)
    z = torch.cat([torch.randn(1, *SHAPE[1:], generator=g) for g in generators(1, 2, 3)])
    assert torch.equal(sampler.step(x, 99, x, generator=generators(1, 2, 3)), sampler.step(x, 99, x, noise=z))


# The model


@pytest.mark.parametrize(
    "wrap",
    [lambda m: (m, "more"), lambda m: [m], lambda m: SimpleNamespace(sample=m)],
    ids=["tuple", "list", "sample"],
)
def test_what_a_model_may_return(wrap):
    sampler, model = DDIMSampler(SCHEDULE, 5), Gaussian()
    wrapped = sampler.sample(lambda x, t: wrap(model(x, t)), SHAPE, seeds=1)
    assert torch.equal(wrapped, sampler.sample(model, SHAPE, seeds=1))


@pytest.mark.parametrize("bad", [None, (), {"sample": 1}, torch.distributions.Normal(0.0, 1.0), 3.0])
def test_what_a_model_may_not_return(bad):
    with pytest.raises(TypeError, match="model: expected a tensor, a tuple"):
        DDIMSampler(SCHEDULE, 5).sample(lambda x, t: bad, SHAPE, seeds=1)


@pytest.mark.parametrize(
    ("time", "dtype", "expected"),
    [
        ("index", torch.int64, [149.0, 99.0, 49.0]),
        ("float", torch.float32, [149.0, 99.0, 49.0]),
        ("scaled_1000", torch.float32, [149 * 1000 / 150, 660.0, 49 * 1000 / 150]),
        ("fraction", torch.float32, [149 / 150, 0.66, 49 / 150]),
    ],
)
def test_the_time_that_the_model_is_told(time, dtype, expected):
    seen = []

    def model(x, t):
        seen.append((t, t.clone()))
        return x

    sampler = DDIMSampler(NoiseSchedule.linear(150), 3, time=time)
    sampler.sample(model, SHAPE, seeds=0)
    assert all(t is seen[0][0] for t, _ in seen), "one tensor for all steps"
    assert all(t.shape == (3,) and t.dtype == dtype and (t == t[0]).all() for _, t in seen)
    np.testing.assert_allclose([t[0].item() for _, t in seen], expected, rtol=1e-7)
    if time == "scaled_1000":
        # as a float32 timestep times 1000/T gives it
        assert [t[0] for _, t in seen] == [torch.tensor(float(t)) * (1000 / 150) for t in (149, 99, 49)]
    if time != "index":
        seen.clear()
        sampler.sample(model, SHAPE, seeds=0, dtype=torch.float64)
        assert seen[0][0].dtype == torch.float64
        np.testing.assert_allclose([t[0].item() for _, t in seen], expected, rtol=1e-15)


def test_the_sprite_course_divides_by_its_noised_timesteps():
    schedule, seen = NoiseSchedule.sprite(500), []

    def model(x, t):
        seen.append(t[0].item())
        return x

    sampler = TableSampler(tables.sprite_table(schedule), schedule=schedule, time="fraction")
    sampler.sample(model, (1, 2), seeds=0)
    assert len(seen) == 500 and seen[0] == 1.0 and seen[-1] == torch.tensor(1 / 500).item()


class Net(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.index = torch.nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.weight = torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, x, t, scale=1.0):
        return x * self.weight * scale


def test_device_and_dtype():
    sampler = DDIMSampler(SCHEDULE, 3)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert sampler.sample(Gaussian(), SHAPE).dtype == torch.float32
    assert sampler.sample(Net(torch.float64), SHAPE).dtype == torch.float64
    assert sampler.sample(Net(torch.bfloat16), SHAPE).dtype == torch.bfloat16
    # a float32 state beside a half model output, the recommended mode
    mixed = sampler.sample(lambda x, t: Net(torch.bfloat16)(x.bfloat16(), t), SHAPE, seeds=1)
    assert mixed.dtype == torch.float32
    assert sampler.sample(Net(torch.float32), SHAPE, dtype=torch.float64).dtype == torch.float64
    assert sampler.sample(Net(torch.float64), x_T=x).dtype == torch.float64
    assert sampler.sample(Gaussian(), x_T=x, device="cpu").dtype == torch.float64
    assert sampler.sample(Net(torch.float32), SHAPE, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_default_device_moves_nothing(name):
    sampler, model = SAMPLERS[name]
    options = {"seeds": 3, "device": "cpu", "guidance_scale": 2.0, "uncond_kwargs": {}}
    expected = sampler.sample(model, SHAPE, **options)
    x0 = torch.full(SHAPE, 0.7)
    noised = sampler.sample(model, x0=x0, start=0.5, generator=torch.Generator().manual_seed(2))
    with torch.device("meta"):
        again = dataclasses.replace(sampler)
        found = again.sample(model, SHAPE, **options)
        given = again.sample(model, x0=x0, start=0.5, generator=torch.Generator("cpu").manual_seed(2))
        mixed = slerp(expected, noised, 0.3)
    assert torch.equal(again.table.rows, sampler.table.rows)
    assert torch.equal(found, expected) and torch.equal(given, noised)
    assert torch.equal(mixed, slerp(expected, noised, 0.3))


@pytest.mark.parametrize("host", ["fastdiff", "openai", "lucidrains", "diffusers", "ermongroup"])
def test_tables_are_made_on_the_cpu(host):
    makers = [tables.ddim_table, tables.add_noise_table]
    makers += [] if host == "ermongroup" else [tables.ddpm_table]
    makers += [tables.ddim_inversion_table] if host in ("fastdiff", "openai", "diffusers") else []
    makers += [lambda schedule, host: tables.sprite_table(schedule)]
    for make in makers:
        expected = make(SCHEDULE, host=host)
        with torch.device("meta"):
            found = make(SCHEDULE, host=host)
            assert torch.equal(found.rows, expected.rows) and found.row_map("cpu").device.type == "cpu"


def test_model_kwargs_and_guidance():
    calls = []

    def model(x, t, y, depth=1):
        calls.append((y, depth))
        return x * 0.1 * y

    sampler = DDPMSampler(SCHEDULE, 4)
    scale = torch.tensor([1.0, 2.0, -0.5])
    found = sampler.sample(
        model,
        SHAPE,
        seeds=1,
        model_kwargs={"y": 2.0, "depth": 3},
        uncond_kwargs={"y": 1.0},
        guidance_scale=scale,
    )
    assert calls == [(2.0, 3), (1.0, 3)] * 4
    x = noise.normal(SHAPE, 1)
    for t in sampler.timesteps:
        x = sampler.step(x * 0.1 * 2.0, t, x, seeds=1, uncond_output=x * 0.1 * 1.0, guidance_scale=scale)
    assert torch.equal(found, x)
    strong = sampler.sample(
        model, SHAPE, seeds=1, model_kwargs={"y": 2.0}, uncond_kwargs={"y": 1.0}, guidance_scale=2.0
    )
    assert torch.equal(strong[1], x[1])


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: (m.view_as(m),)], ids=["tensor", "view"])
def test_guidance_refuses_a_model_that_reuses_its_output(wrap):
    """The second call has overwritten the first output: the step would be that of the unconditional model."""
    buffer = torch.empty(SHAPE)

    def model(x, t, y):
        return wrap(torch.mul(x, y, out=buffer))

    options = {"model_kwargs": {"y": 2.0}, "uncond_kwargs": {"y": 1.0}, "guidance_scale": 2.0}
    with pytest.raises(ValueError, match="model: expected a new tensor from each of the two calls"):
        DDIMSampler(SCHEDULE, 4).sample(model, SHAPE, **options)
    assert DDIMSampler(SCHEDULE, 4).sample(model, SHAPE, model_kwargs={"y": 2.0}).isfinite().all()


def test_guidance_takes_two_parts_of_one_tensor():
    def model(x, t, part):
        return torch.cat([0.2 * x, 0.1 * x]).chunk(2)[part]

    def both(x, t, part):
        if part == 0:
            both.outputs = torch.cat([0.2 * x, 0.1 * x]).chunk(2)
        return both.outputs[part]

    options = {"seeds": 1, "model_kwargs": {"part": 0}, "uncond_kwargs": {"part": 1}, "guidance_scale": 2.0}
    sampler = DDPMSampler(SCHEDULE, 4)
    assert torch.equal(sampler.sample(both, SHAPE, **options), sampler.sample(model, SHAPE, **options))
    assert sampler.sample(lambda x, t, part: torch.zeros_like(x), (0, 3), **options).shape == (0, 3)


def test_a_model_output_that_is_the_state_or_a_view_of_it():
    """The step in place must not read what it has written."""
    sampler = DDIMSampler(SCHEDULE, 5)
    shape = (2, 3, 3)
    for view in (lambda x: x, lambda x: x.transpose(1, 2), lambda x: x[:1].expand(shape)):
        found = sampler.sample(lambda x, t, view=view: view(x), shape, seeds=1)
        assert torch.equal(found, sampler.sample(lambda x, t, view=view: view(x).clone(), shape, seeds=1))


# Hooks


def test_a_denoised_fn_that_changes_nothing_changes_nothing(case):
    sampler, model = case
    plain = list(sampler.iterate(model, SHAPE, seeds=1))
    hooked = list(sampler.iterate(model, SHAPE, seeds=1, denoised_fn=lambda x0: x0))
    for (a, a0, _), (b, b0, _) in zip(plain, hooked, strict=True):
        assert torch.equal(a, b) and torch.equal(a0, b0)
    assert torch.equal(plain[-1][0], sampler.sample(model, SHAPE, seeds=1, denoised_fn=lambda x0: x0.clone()))


@pytest.mark.parametrize("name", ["ddpm learned_range", "ddim v", "ddim", "ddim rederived"])
def test_denoised_fn_with_guidance(name):
    sampler, model = SAMPLERS[name]
    options = {"seeds": 1, "guidance_scale": 1.5, "uncond_kwargs": {}}
    scaled = [0.0]

    def guided(x, t):
        scaled[0] += 1
        return model(x, t) * (1.0 if scaled[0] % 2 else 0.9)

    plain = sampler.sample(guided, SHAPE, **options)
    scaled[0] = 0
    assert torch.equal(plain, sampler.sample(guided, SHAPE, denoised_fn=lambda x0: x0, **options))


def test_denoised_fn_takes_the_place_of_x0(case):
    sampler, model = case
    seen = []

    def denoised_fn(x0):
        seen.append(x0)
        return x0 * 0 + 0.2

    outputs = list(sampler.iterate(model, SHAPE, seeds=1, denoised_fn=denoised_fn))
    assert len(seen) == len(sampler) and all((x0 == 0.2).all() for _, x0, _ in outputs)
    if sampler.timesteps[-1] == 0 or sampler.table.name == "ddim":
        torch.testing.assert_close(outputs[-1][0], torch.full(SHAPE, 0.2))
    # it sees x0 before it is clipped
    x = noise.normal(SHAPE, 1)
    m = model(x, torch.full((3,), sampler.timesteps[0]))
    free = torch.cat([m, m])[: x.shape[0], : x.shape[1]]
    bare = TableSampler(sampler._predicting)
    assert torch.equal(seen[0], bare.step(free, sampler.timesteps[0], x))


def gradient(x, t, **kwargs):
    """Of log p(y|x) = -(x - 0.8)^2 / 2 by autograd, as a classifier's is taken."""
    with torch.enable_grad():
        x_in = x.detach().requires_grad_(True)
        (found,) = torch.autograd.grad((-0.5 * (x_in - 0.8) ** 2).sum(), x_in)
    return found


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range", "learned_plain"])
def test_cond_fn_of_ddpm_adds_variance_times_gradient(variance):
    """Dhariwal & Nichol 2021, algorithm 1."""
    sampler = DDPMSampler(SCHEDULE, 8, variance=variance)
    model = (lambda x, t: learned(x, t).abs()) if variance.startswith("learned") else Gaussian()
    x = noise.normal(SHAPE, 1, dtype=torch.float64)
    for row, t in enumerate(sampler.timesteps):
        told = torch.full((3,), t)
        m = model(x, told)
        low, high = (sampler.table.rows[row, tables.COLUMN[c]] for c in ("min_log", "max_log"))
        s = sampler.table.rows[row, tables.COLUMN["s"]]
        fraction = (m[:, 2:] + 1) / 2
        var = {
            "learned": lambda m=m: m[:, 2:].exp(),
            "learned_plain": lambda m=m: m[:, 2:],
            "learned_range": lambda f=fraction, low=low, high=high: (f * high + (1 - f) * low).exp(),
        }.get(variance, lambda: 1.0)()
        x = sampler.step(m, t, x, seeds=1) + s**2 * var * gradient(x, told)
    found = sampler.sample(model, SHAPE, seeds=1, cond_fn=gradient, dtype=torch.float64)
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("eps_form", ["raw", "rederived"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_cond_fn_of_ddim_moves_eps(eta, eps_form):
    """Dhariwal & Nichol 2021, algorithm 2: eps - sqrt(1-ab)*gradient, and the x0 of that eps, not clipped again."""
    sampler = DDIMSampler(SCHEDULE, 10, eta=eta, eps=eps_form, clip=None if eps_form == "raw" else 0.4)
    model, seeds = Gaussian(), noise.seeds(1, 3)
    x = noise.normal(SHAPE, seeds, dtype=torch.float64)
    chain = sampler.timesteps
    outputs = sampler.iterate(model, SHAPE, seeds=1, cond_fn=gradient, dtype=torch.float64)
    for (found, found_x0, _), t, t_prev in zip(outputs, chain, [*chain[1:], -1], strict=True):
        ab = float(SCHEDULE.alphas_cumprod[t])
        abp = float(SCHEDULE.alphas_cumprod[t_prev]) if t_prev >= 0 else 1.0
        told = torch.full((3,), t)
        eps = model(x, told)
        if eps_form == "rederived":
            x0 = ((x - (1 - ab) ** 0.5 * eps) / ab**0.5).clamp(-0.4, 0.4)
            eps = (x - ab**0.5 * x0) / (1 - ab) ** 0.5
        eps = eps - (1 - ab) ** 0.5 * gradient(x, told)
        x0 = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
        sigma = eta * ((1 - abp) / (1 - ab) * (1 - ab / abp)) ** 0.5
        x = abp**0.5 * x0 + (1 - abp - sigma**2) ** 0.5 * eps + sigma * step_noise(seeds, t)
        torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(found_x0, x0, rtol=1e-10, atol=1e-11)


def test_cond_fn_is_told_what_the_model_is_told():
    seen = []

    def cond_fn(x, t, y):
        seen.append((t.clone(), y))
        return x

    sampler = DDPMSampler(SCHEDULE, 3, time="fraction")
    found = sampler.sample(lambda x, t, y: x, SHAPE, seeds=1, cond_fn=cond_fn, model_kwargs={"y": 5})
    assert [(t[0].item(), y) for t, y in seen] == [(pytest.approx(t / 100), 5) for t in (99, 66, 32)]
    again = sampler.sample(lambda x, t, y: x, SHAPE, seeds=1, cond_fn=lambda x, t, y: x.clone(), model_kwargs={"y": 5})
    assert torch.equal(found, again)


def test_both_hooks_together():
    sampler = DDIMSampler(SCHEDULE, 5, clip=None, eps="rederived")
    options = {"seeds": 1, "dtype": torch.float64, "cond_fn": gradient}
    plain = sampler.sample(Gaussian(), SHAPE, **options)
    assert torch.equal(plain, sampler.sample(Gaussian(), SHAPE, denoised_fn=lambda x0: x0, **options))


def test_callback_sees_every_state_and_may_change_it():
    sampler, model = DDPMSampler(SCHEDULE, 5), Gaussian()
    seen = []
    found = sampler.sample(model, SHAPE, seeds=1, callback=lambda *arguments: seen.append(arguments))
    states = list(sampler.iterate(model, SHAPE, seeds=1))
    assert [(row, t) for row, t, _ in seen] == list(enumerate(sampler.timesteps))
    assert all(torch.equal(x, y) for (_, _, x), (y, _, _) in zip(seen, states, strict=True))
    assert torch.equal(found, states[-1][0])

    def clear(row, t, x):
        if row == 2:
            x.zero_()

    changed = sampler.sample(model, SHAPE, seeds=1, callback=clear)
    rest = sampler.sample(model, x_T=torch.zeros(SHAPE), start=sampler.timesteps[3], seeds=1)
    assert torch.equal(changed, rest)


def test_iterate_hands_out_new_tensors_and_goes_on_with_what_is_written():
    sampler, model = DDPMSampler(SCHEDULE, 5), Gaussian()
    outputs = list(sampler.iterate(model, SHAPE, seeds=1))
    pointers = {tensor.data_ptr() for x, x0, _ in outputs for tensor in (x, x0)}
    assert len(pointers) == 10
    for x, x0, t in (walk := sampler.iterate(model, SHAPE, seeds=1)):
        x0.fill_(float("nan"))
        if t == sampler.timesteps[2]:
            x.zero_()
    rest = sampler.sample(model, x_T=torch.zeros(SHAPE), start=sampler.timesteps[3], seeds=1)
    assert torch.equal(x, rest)
    assert list(walk) == []


@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        (2, [1, 3]),
        (5, [4]),
        (1, [0, 1, 2, 3, 4]),
        (9, []),
        ([79, 19], [1, 4]),
        ((), []),
        (torch.tensor([99]), [0]),
        (lambda row, t: row == 2 or t > 90, [0, 2]),
    ],
)
@pytest.mark.parametrize("callback", [None, lambda row, t, x: None])
def test_keep(keep, rows, callback):
    sampler, model = DDPMSampler(SCHEDULE, 5), Gaussian()
    states = [x for x, _, _ in sampler.iterate(model, SHAPE, seeds=1)]
    x, kept = sampler.sample(model, SHAPE, seeds=1, keep=keep, callback=callback)
    assert torch.equal(x, states[-1])
    assert [t for t, _ in kept] == [sampler.timesteps[row] for row in rows]
    assert all(torch.equal(state, states[row]) for (_, state), row in zip(kept, rows, strict=True))
    assert len({state.data_ptr() for _, state in kept} | {x.data_ptr()}) == len(kept) + 1


def test_keep_counts_from_where_the_chain_is_entered():
    sampler = DDPMSampler(SCHEDULE, 10)
    _, kept = sampler.sample(Gaussian(), SHAPE, seeds=1, keep=3, start=0.5)
    assert [t for t, _ in kept] == [sampler.timesteps[7]]


def test_progress(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    sampler = DDIMSampler(SCHEDULE, 7)
    shown = sampler.sample(Gaussian(), SHAPE, seeds=1, progress=True)
    assert "7/7" in capsys.readouterr().err
    assert torch.equal(shown, sampler.sample(Gaussian(), SHAPE, seeds=1))
    assert capsys.readouterr().err == ""
    list(sampler.iterate(Gaussian(), SHAPE, seeds=1, progress=True, start=0.5))
    assert "3/3" in capsys.readouterr().err or "4/4" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"progress: expected tqdm .*pip install tqdm"):
        sampler.sample(pytest.fail, SHAPE, progress=True)


# Modes and memory


def modes():
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_modes_are_the_callers_own(mode):
    sampler, net = DDPMSampler(SCHEDULE, 4), Net(torch.float32)
    inside = []

    def model(x, t):
        inside.append(torch.is_grad_enabled())
        return net(x, t)

    with mode():
        before = modes()
        walk = sampler.iterate(model, SHAPE, seeds=1)
        for x, x0, _ in walk:
            assert modes() == before
            assert not (x.requires_grad or x0.requires_grad or x.is_inference() or x0.is_inference())
        partial = sampler.iterate(model, SHAPE, seeds=1)
        next(partial)
        assert modes() == before
        del partial
        sampled, kept = sampler.sample(model, SHAPE, seeds=1, keep=1)
        inverted = DDIMSampler(SCHEDULE, 4).invert(model, sampled)
        assert modes() == before
    assert not any(inside)
    for result in (sampled, inverted, *(x for _, x in kept)):
        assert not result.is_inference() and not result.requires_grad
        result.requires_grad_(True).mul(2).sum().backward()  # an ordinary tensor


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
def test_what_the_caller_gave_finds_its_mode_and_a_model_leaks_none(mode):
    sampler, found = DDIMSampler(SCHEDULE, 4), []

    def model(x, t):
        torch.set_grad_enabled(not torch.is_grad_enabled())
        return 0.1 * x

    def keep(row, t):
        found.append(modes())
        return True

    with mode():
        before = modes()
        for options in ({}, {"keep": keep}, {"callback": lambda *_: found.append(modes())}):
            sampler.sample(model, SHAPE, seeds=1, **options)
            assert modes() == before
        for _ in sampler.iterate(model, SHAPE, seeds=1):
            assert modes() == before
    assert len(found) >= 8 and set(found) == {before}


def test_a_model_that_fails_leaks_no_mode():
    def model(x, t):
        raise RuntimeError("out of cheese")

    walk = DDIMSampler(SCHEDULE, 4).iterate(model, SHAPE, seeds=1)
    with pytest.raises(RuntimeError, match="cheese"):
        next(walk)
    assert modes() == (True, False)


def test_a_network_that_takes_its_own_gradient():
    def model(x, t):
        with torch.enable_grad():
            x.requires_grad_(True)
            (found,) = torch.autograd.grad((x**2).sum() / 4, x, create_graph=True)
        assert found.requires_grad
        return found

    sampler = DDPMSampler(SCHEDULE, 5)
    for x_T in (None, noise.normal(SHAPE, 1)):
        found = sampler.sample(model, SHAPE, x_T=x_T, seeds=1)
        assert not found.requires_grad and not (x_T is not None and x_T.requires_grad)
        torch.testing.assert_close(found, sampler.sample(lambda x, t: 0.5 * x, SHAPE, seeds=1))


def test_step_is_differentiable():
    sampler = DDPMSampler(SCHEDULE, clip=None)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    m = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    sampler.step(m, 50, x, seeds=1).sum().backward()
    assert x.grad is not None and m.grad is not None


@pytest.mark.parametrize("given", [False, True])
def test_a_chain_holds_the_state_and_a_model_output(given):
    size = 54_321
    peaks = []

    def model(x, t):
        m = torch.zeros_like(x)
        storages = {
            tensor.untyped_storage().data_ptr()
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and tensor.numel() >= size
        }
        peaks.append(len(storages))
        return m

    sampler = DDPMSampler(SCHEDULE, 4)
    x_T = torch.randn(1, size) if given else None
    result = sampler.sample(model, (1, size), x_T=x_T, seeds=1)
    # beside a caller's x_T: nothing at the first step, the result later
    assert peaks == ([2, 3, 3, 3] if given else [2, 2, 2, 2])
    if given:
        assert result.data_ptr() != x_T.data_ptr()


def test_the_state_has_one_address_for_the_whole_chain():
    addresses = []

    def model(x, t):
        addresses.append((x.data_ptr(), t.data_ptr()))
        return torch.zeros_like(x)

    DDPMSampler(SCHEDULE, 5).sample(model, SHAPE, seeds=1)
    assert len(set(addresses)) == 1


# The object


def test_samplers_are_frozen_small_and_copyable():
    sampler = DDIMSampler(SCHEDULE, 5, eta=0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.eta = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.table = None
    assert "steps=5" in repr(sampler) and "eta=0.3" in repr(sampler) and "rows" not in repr(sampler)
    expected = sampler.sample(Gaussian(), SHAPE, seeds=1)
    for other in (copy.copy(sampler), copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(other.sample(Gaussian(), SHAPE, seeds=1), expected)
    assert isinstance(sampler, Sampler)


def test_a_sampler_of_a_table_of_ones_own():
    """x' = x0 + s*z, a sampler in three lines."""
    table = tables.Table(
        torch.tensor([[1.0, -0.5, 1.0, 0, 0, 1.0, 0, 0, 1.0, 0, 0, 0.1, -9, 9, 0, 0, 7, 0]], dtype=torch.float64),
        tables.Structure(variance="fixed"),
        [7],
    )
    x = TableSampler(table).sample(lambda x, t: x, (2, 3), seeds=4)
    z = noise.normal((2, 3), 4, t=7, domain="step")
    torch.testing.assert_close(x, 0.5 * noise.normal((2, 3), 4) + 0.1 * z)
    with pytest.raises(ValueError, match="x0: expected None, this sampler has no schedule"):
        TableSampler(table).sample(lambda x, t: x, x0=x)
    with pytest.raises(ValueError, match="schedule: expected a NoiseSchedule with time='fraction'"):
        TableSampler(table, time="fraction")


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": 1000}, TypeError, "schedule: expected a NoiseSchedule, got int"),
        ({"steps": 0}, ValueError, r"steps: expected an int in \[1, 100\], got 0"),
        ({"steps": [3, 5]}, ValueError, "steps: expected timesteps in descending order, got 5 after 3"),
        ({"steps": 2.5}, TypeError, "steps: expected an int"),
        ({"steps": 5, "spacing": "even"}, ValueError, "spacing: expected one of"),
        ({"eta": 1.5}, ValueError, r"eta: expected a value in \[0, 1\], got 1.5"),
        ({"eps": "other"}, ValueError, "eps: expected one of"),
        ({"prediction": "score"}, ValueError, "prediction: expected one of"),
        ({"clip": (1, -1)}, ValueError, "clip: expected a range"),
        ({"final_alpha": 2.0}, ValueError, "final_alpha: expected a value in"),
        ({"time": "seconds"}, ValueError, r"time: expected one of .*got 'seconds'"),
        ({"rounding": "up"}, ValueError, "rounding: expected one of"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        ({"host": "nobody"}, ValueError, "host: expected one of"),
        ({"start": 1.0}, ValueError, r"start: expected a fraction in \[0, 1\)"),
        (
            {"schedule": NoiseSchedule.sprite(), "host": "openai"},
            ValueError,
            "schedule: .*host 'openai', .*got a beta of 0 at timestep 0 of 'sprite'",
        ),
    ],
)
def test_bad_samplers(options, error, message):
    with pytest.raises(error, match=message):
        DDIMSampler(**{"schedule": SCHEDULE, "steps": 5, **options})


def test_bad_ddpm_samplers():
    with pytest.raises(ValueError, match="variance: expected one of"):
        DDPMSampler(SCHEDULE, variance="big")
    with pytest.raises(TypeError, match="noise: expected a bool, got int"):
        DDPMSampler(SCHEDULE, noise=1)
    with pytest.raises(TypeError, match="table: expected a Table, got NoiseSchedule"):
        TableSampler(SCHEDULE)


GENERATOR = torch.Generator()
BAD_RUNS = [
    ({"model": 3}, TypeError, "model: expected something to call, got int"),
    ({"shape": None}, TypeError, "shape: expected a sequence of ints, got None"),
    ({"shape": 3}, TypeError, "shape: expected a sequence of ints"),
    ({"shape": "32"}, TypeError, "shape: expected a sequence of ints"),
    ({"shape": ()}, ValueError, "shape: expected a batch dimension"),
    ({"shape": (2, 3.0)}, TypeError, "shape: expected an int, got float"),
    ({"shape": (2, -1)}, ValueError, "shape: expected an int >= 0, got -1"),
    ({"x_T": [1.0]}, TypeError, "x_T: expected a tensor, got list"),
    ({"x_T": torch.zeros(2, 2)}, ValueError, r"x_T: expected shape \[3, 2, 4, 5\], got \[2, 2\]"),
    ({"x_T": torch.zeros(()), "shape": None}, ValueError, "x_T: expected a batch dimension"),
    ({"x_T": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "dtype: expected float32, .*got torch.int64"),
    ({"x_T": torch.zeros(SHAPE), "x0": torch.zeros(SHAPE)}, ValueError, "x_T and x0: expected one"),
    ({"x_T": torch.zeros(SHAPE), "dtype": torch.float64}, ValueError, "dtype: expected torch.float32"),
    ({"x_T": torch.zeros(SHAPE), "device": "meta"}, ValueError, "device: expected cpu"),
    ({"device": "nowhere"}, ValueError, "device: expected a torch.device or the name of one, got 'nowhere'"),
    ({"dtype": torch.int32}, TypeError, "dtype: expected float32, .*got torch.int32"),
    ({"dtype": "float32"}, TypeError, "dtype: expected a torch.dtype, got str"),
    ({"seeds": 1, "generator": GENERATOR}, ValueError, "seeds and generator: expected one of them, got 2"),
    ({"seeds": torch.arange(2)}, ValueError, r"seeds: expected shape \[3\]"),
    ({"seeds": "7"}, TypeError, "seeds: expected an int"),
    ({"generator": 5}, TypeError, "generator: expected a torch.Generator or a list of them, got int"),
    ({"generator": [GENERATOR]}, ValueError, "generator: expected 3, one per sample, got 1"),
    ({"model_kwargs": [1]}, TypeError, "model_kwargs: expected a dict, got list"),
    ({"guidance_scale": 2.0}, ValueError, "guidance_scale and uncond_kwargs: expected both or neither"),
    ({"uncond_kwargs": {}}, ValueError, "guidance_scale and uncond_kwargs: expected both or neither"),
    ({"guidance_scale": "2", "uncond_kwargs": {}}, TypeError, "guidance_scale: expected a number"),
    ({"guidance_scale": torch.ones(2), "uncond_kwargs": {}}, ValueError, "guidance_scale: expected a number or"),
    ({"denoised_fn": 1}, TypeError, "denoised_fn: expected a function, got int"),
    ({"cond_fn": 1}, TypeError, "cond_fn: expected a function, got int"),
    ({"callback": 1}, TypeError, "callback: expected a function, got int"),
    ({"progress": "yes"}, TypeError, "progress: expected a bool, got str"),
    ({"start": 1.0}, ValueError, r"start: expected a fraction in \[0, 1\)"),
    ({"start": 3}, ValueError, "start: expected a timestep of at least 9"),
    ({"keep": 0}, ValueError, "keep .*: expected an int >= 1, got 0"),
    ({"keep": "all"}, TypeError, "keep .*: expected an int, got str"),
    ({"keep": [98]}, ValueError, "keep: expected timesteps of the chain, got 98"),
    ({"keep": True}, TypeError, "keep .*: expected an int, got True"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_RUNS)
def test_bad_runs_raise_before_the_model_is_called(options, error, message):
    sampler = DDPMSampler(SCHEDULE, 10)
    arguments = {"model": lambda x, t: pytest.fail("called"), "shape": SHAPE, **options}
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        sampler.sample(**arguments)
    if not options.keys() & {"keep", "callback"}:
        with pytest.raises(error, match=message):
            sampler.iterate(**arguments)
    assert torch.equal(before, torch.get_rng_state())


def test_hooks_that_a_sampler_cannot_serve():
    def called(x, t):
        pytest.fail("called")

    with pytest.raises(ValueError, match="cond_fn: expected None, a step without noise has no variance"):
        DDPMSampler(SCHEDULE, 5, noise=False).sample(called, SHAPE, cond_fn=gradient)
    with pytest.raises(ValueError, match="denoised_fn: expected None, a step of 'ddpm' does not go through x0"):
        DDPMSampler(SCHEDULE, 5, prediction="x_prev").sample(called, SHAPE, denoised_fn=abs)
    rows = torch.zeros(1, 18, dtype=torch.float64)
    three_terms = tables.Table(rows, tables.Structure(ax=True, eps="output", ae=True), [0], name="own")
    with pytest.raises(ValueError, match="denoised_fn: expected None, a step of 'own' does not go through x0"):
        TableSampler(three_terms).sample(called, SHAPE, denoised_fn=abs)
    zero_snr = NoiseSchedule.linear(100).rescale_zero_snr()
    with pytest.raises(ValueError, match="cond_fn: expected None, alpha_bar is 0"):
        DDIMSampler(zero_snr, 5, prediction="v").sample(called, SHAPE, cond_fn=gradient)
    with pytest.raises(ValueError, match="table: expected one that predicts x0, got 'forward'"):
        TableSampler(tables.forward_table(SCHEDULE)).iterate(called, SHAPE)
    with pytest.raises(ValueError, match="shape: expected .* \\(learned variance\\)"):
        DDPMSampler(SCHEDULE, 5, variance="learned").sample(called, (3,))
    with pytest.raises(TypeError, match="x0: expected a tensor, got list"):
        DDIMSampler(SCHEDULE, 5).invert(called, [1.0])
    with pytest.raises(ValueError, match="pairing: expected one of"):
        DDIMSampler(SCHEDULE, 5).invert(called, torch.zeros(SHAPE), pairing="other")


@pytest.mark.parametrize("hook", ["denoised_fn", "cond_fn"])
def test_what_a_hook_may_not_return(hook):
    sampler = DDPMSampler(SCHEDULE, 5)
    with pytest.raises(TypeError, match=f"{hook}: expected it to return a tensor, got NoneType"):
        sampler.sample(Gaussian(), SHAPE, seeds=1, **{hook: lambda *arguments: None})
    with pytest.raises(ValueError, match=rf"{hook}: expected it to return shape \[3, 2, 4, 5\], got \[3\]"):
        sampler.sample(Gaussian(), SHAPE, seeds=1, **{hook: lambda *arguments: torch.zeros(3)})


def test_a_model_output_of_the_wrong_kind():
    sampler = DDPMSampler(SCHEDULE, 5)
    with pytest.raises(ValueError, match="model_output: expected x's shape"):
        sampler.sample(learned, SHAPE, seeds=1)
    with pytest.raises(TypeError, match="model_output: expected torch.float32"):
        sampler.sample(lambda x, t: x.double(), SHAPE, seeds=1)
    with pytest.raises(ValueError, match="model_output: expected shape .*learned variance"):
        DDPMSampler(SCHEDULE, 5, variance="learned").sample(Gaussian(), SHAPE, seeds=1)


def test_bad_steps():
    x = torch.zeros(SHAPE)
    sampler = DDPMSampler(SCHEDULE, 5)
    for options in ({"seeds": 1}, {"noise": x}):
        with pytest.raises(ValueError, match="and generator: expected one of them, got 2"):
            sampler.step(x, 99, x, generator=GENERATOR, **options)
    with pytest.raises(ValueError, match="noise and seeds: expected one of them, got both"):
        sampler.step(x, 99, x, noise=x, seeds=1)
    with pytest.raises(ValueError, match="t: expected a timestep of the chain"):
        sampler.step(x, 98, x, generator=GENERATOR)
    with pytest.raises(TypeError, match="x: expected a tensor, got float"):
        sampler.step(x, 99, 1.0)
    with pytest.raises(ValueError, match="x: expected a batch dimension"):
        sampler.step(torch.tensor(1.0), 99, torch.tensor(1.0))
    with pytest.raises(ValueError, match="noise: expected none, the table 'ddim' adds no noise"):
        DDIMSampler(SCHEDULE, 5).step(x, 99, x, noise=x)
    out_of_chain = sampler.step(x, torch.tensor([99, 98, 4000]), x, seeds=1)
    assert [part.isnan().all().item() for part in out_of_chain] == [False, True, True]


# Beside the chain


def test_slerp():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    w = torch.tensor([0.0, 0.25, 0.7, 1.0])
    found = slerp(a, b, w)
    for i in range(4):
        theta = torch.arccos((a[i] * b[i]).sum() / (a[i].norm() * b[i].norm()))
        weight = w[i].item()
        expected = torch.sin((1 - weight) * theta) / theta.sin() * a[i] + torch.sin(weight * theta) / theta.sin() * b[i]
        torch.testing.assert_close(found[i], expected)
        torch.testing.assert_close(slerp(a[i : i + 1], b[i : i + 1], weight)[0], found[i])
    assert torch.equal(found[0], a[0]) and torch.allclose(found[3], b[3])
    unit = slerp(a / a.flatten(1).norm(dim=1)[:, None, None], b / b.flatten(1).norm(dim=1)[:, None, None], 0.3)
    torch.testing.assert_close(unit.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slerp_where_the_sine_vanishes(dtype):
    a = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    near = a * (1 + 1e-3)
    for b, expected in ((a, a), (near, 0.5 * (a + near)), (-a, 0 * a), (0 * a, None)):
        found = slerp(a, b, 0.5)
        assert found.isfinite().all() and found.dtype == dtype
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(slerp(a, a, 0.0), a)


def test_to_uint8():
    x = torch.tensor([-2.0, -1.0, -0.9999, 0.0, 0.5, 0.99999, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
    images = torch.rand(2, 3, 4, 5) * 2.4 - 1.2
    expected = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert torch.equal(to_uint8(images), expected)
    last = to_uint8(images, layout="NHWC")
    assert torch.equal(last, expected.permute(0, 2, 3, 1)) and last.is_contiguous()
    assert torch.equal(to_uint8(images.bfloat16()), to_uint8(images.bfloat16().float()))
    assert not to_uint8(images.requires_grad_(True)).requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: to_uint8(torch.zeros(2, dtype=torch.uint8)), TypeError, "x: expected a floating tensor, got torch.ui"),
        (lambda: to_uint8(torch.zeros(2, 3), layout="NHWC"), ValueError, r"x: expected \[batch, channels, height"),
        (lambda: to_uint8(torch.zeros(2), layout="CHWN"), ValueError, "layout: expected one of"),
        (lambda: slerp([1.0], torch.zeros(1), 0.5), TypeError, "a: expected a floating tensor, got list"),
        (lambda: slerp(torch.zeros(2), torch.zeros(3), 0.5), ValueError, r"b: expected shape \[2\]"),
        (lambda: slerp(torch.zeros(2), torch.zeros(2).double(), 0.5), ValueError, "b: expected shape"),
        (lambda: slerp(torch.zeros(()), torch.zeros(()), 0.5), ValueError, "a: expected a batch dimension"),
        (lambda: slerp(torch.zeros(2), torch.zeros(2), "0.5"), TypeError, "w: expected a number"),
        (lambda: slerp(torch.zeros(2), torch.zeros(2), torch.zeros(3)), ValueError, r"w: expected a number or shape"),
    ],
)
def test_bad_images(call, error, message):
    with pytest.raises(error, match=message):
        call()
