"""Enabled objects on the GPU: the bits of the codebase run eagerly there, and steps that do not wait for the device."""

from __future__ import annotations

import pytest
import torch

import fastdiff

pytestmark = pytest.mark.cuda

SHAPE = (2, 3, 16, 16)
SCHEDULERS = ["DDPMScheduler", "DDIMScheduler"]


def network(x, t):
    """Deterministic, and of a few operations that are the same in every run."""
    return (x * 0.3 + torch.roll(x, 1, -1) * 0.2 + t.to(x.dtype) * 1e-3).to(x.dtype)


def scheduler_of(name, *, enabled, **config):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(**config)
    return fastdiff.enable(scheduler) if enabled else scheduler


def chain(scheduler, device, dtype, eta, *, moved, seed=0):
    """A chain over timesteps on the device, noise from the device's generator; alphas_cumprod moved there before."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator, device=device, dtype=dtype)
    if moved:
        scheduler.add_noise(x, x, torch.zeros(SHAPE[0], dtype=torch.long, device=device))
    scheduler.set_timesteps(10, device=device)
    options = {"eta": eta} if "DDIM" in type(scheduler).__name__ else {}
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator, **options).prev_sample
    return x


@pytest.mark.parametrize("moved", [False, True], ids=["alphas on the CPU", "alphas on the device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_enabled_scheduler_gives_the_samples_of_the_scheduler(device, record, name, dtype, moved):
    cases = {}
    for eta in (0.0, 1.0) if name == "DDIMScheduler" else (0.0,):
        for prediction in ("epsilon", "v_prediction"):
            theirs, ours = (
                chain(scheduler_of(name, enabled=enabled, prediction_type=prediction), device, dtype, eta, moved=moved)
                for enabled in (False, True)
            )
            case = f"{name} {prediction} {dtype} eta={eta} moved={moved}"
            cases[case] = torch.equal(theirs, ours)
            record(case, equal=cases[case], difference=float((theirs.float() - ours.float()).abs().max()))
    unequal = [case for case, equal in cases.items() if not equal]
    assert not unequal, f"not equal: {unequal}"


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_does_not_wait_for_the_device(gpu, strict_sync, name, noise):
    scheduler = scheduler_of(name, enabled=True)
    fastdiff.enable(scheduler, noise=noise)
    scheduler.set_timesteps(10, device=gpu)
    generator = torch.Generator(gpu).manual_seed(0)
    x = torch.randn(SHAPE, device=gpu)
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    timesteps = list(scheduler.timesteps)
    first = scheduler.step(x, timesteps[0], x, generator=generator, **options).prev_sample  # the table is copied once
    with strict_sync:
        for t in timesteps:
            first = scheduler.step(first, t, first, generator=generator, **options).prev_sample
        # a timestep that is no part of scheduler.timesteps is read by the kernel
        first = scheduler.step(first, timesteps[-1].clone(), first, generator=generator, **options).prev_sample
    assert first.isfinite().all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_philox_noise_is_that_of_a_cpu(gpu, name):
    found = []
    for device in ("cpu", gpu):
        scheduler = scheduler_of(name, enabled=True)
        fastdiff.enable(scheduler, noise="philox", seeds=7)
        scheduler.set_timesteps(10, device=device)
        x = fastdiff.normal(SHAPE, 3, domain="initial").to(device)
        options = {"eta": 1.0} if name == "DDIMScheduler" else {}
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, **options).prev_sample
        found.append(x.cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["p_sample_loop", "ddim_sample_loop"])
def test_openai_loops_do_not_wait_for_the_device(gpu, strict_sync, method):
    from fastdiff.integrations import openai

    diffusion = openai.SpacedDiffusion(
        openai.space_timesteps(100, "10"),
        betas=openai.get_named_beta_schedule("linear", 100),
        model_mean_type=openai.ModelMeanType.EPSILON,
        model_var_type=openai.ModelVarType.FIXED_SMALL,
        loss_type=openai.LossType.MSE,
    )
    x = torch.randn(SHAPE, device=gpu)
    t = torch.full(SHAPE[:1], 5, device=gpu)
    step = getattr(diffusion, method.removesuffix("_loop"))
    step(network, x, t)
    with strict_sync:
        step(network, x, t)
    samples = getattr(diffusion, method)(network, SHAPE, device=gpu)
    assert samples.is_cuda and samples.isfinite().all()
