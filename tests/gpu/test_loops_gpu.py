"""The loops of ermongroup, CompVis and the sprite course on the GPU: the bits of their operations run there."""

from __future__ import annotations

import pytest
import test_compvis
import test_ermongroup
import test_sprites
import torch

from fastdiff.integrations import sprites
from fastdiff.integrations.compvis import DDIMSampler

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_loops_of_ermongroup(device, record, dtype, eta):
    x = test_ermongroup.state((2, 3, 16, 16), dtype).to(device)
    found = []
    for function in (test_ermongroup.host, test_ermongroup.run):
        torch.manual_seed(1)
        found.append(function(x, test_ermongroup.UNIFORM, test_ermongroup.network, test_ermongroup.BETAS, eta))
    equal = True
    for theirs, ours in zip(*found, strict=True):
        assert all(state.device.type == "cpu" for state in ours[1:])
        equal &= all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(theirs, ours, strict=True))
    record(f"ermongroup {dtype} eta={eta}", equal=equal)
    assert equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_steps_of_the_sprite_course(device, record, dtype):
    schedule = {name: u.to(device) for name, u in test_sprites.SCHEDULE.items()}
    tables = schedule["b_t"], schedule["a_t"], schedule["ab_t"]
    x, e, z = (test_sprites.state(dtype=dtype, seed=seed).to(device) for seed in range(3))
    cases = {}
    for t in (1, 50, test_sprites.T):
        ours = sprites.denoise_add_noise(x, t, e, z, **schedule)
        cases[f"ddpm {t}"] = torch.equal(ours, test_sprites.host_ddpm_step(x, t, e, z, *tables))
        ours = sprites.denoise_ddim(x, t, t // 2, e, ab_t=schedule["ab_t"])
        cases[f"ddim {t}"] = torch.equal(ours, test_sprites.host_ddim_step(x, t, t // 2, e, schedule["ab_t"]))
    for case, equal in cases.items():
        record(f"sprites {case} {dtype}", equal=equal)
    assert all(cases.values()), cases


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("options", [{}, {"c": test_compvis.COND, **test_compvis.GUIDED}], ids=["plain", "guidance"])
def test_compvis_near_the_cpu(device, record, options, eta):
    """Roots on CUDA are others than torch's on the CPU, where the host is spelled."""
    x_T = torch.randn(test_compvis.SHAPE, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([4, 5])
    found = []
    for where in (torch.device("cpu"), device):
        model = test_compvis.Model()
        model.device = where
        for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev"):
            setattr(model, name, getattr(model, name).to(where))
        guidance = {name: u.to(where) if isinstance(u, torch.Tensor) else u for name, u in options.items()}
        sampler = DDIMSampler(model, noise="philox", seeds=seeds.to(where))
        c = guidance.pop("c", None)
        samples, _ = sampler.sample(3, 2, test_compvis.SHAPE[1:], c, eta=eta, x_T=x_T.to(where), **guidance)
        found.append(samples.cpu())
    record(f"compvis eta={eta}", difference=float((found[0] - found[1]).abs().max()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_a_step_does_not_wait_for_the_device(gpu, strict_sync):
    schedule = {name: u.to(gpu) for name, u in test_sprites.SCHEDULE.items()}
    x, e, z = (test_sprites.state(seed=seed).to(gpu) for seed in range(3))
    sprites.denoise_add_noise(x, 5, e, z, **schedule)  # makes the table, which copies
    with strict_sync:
        for t in (1, 50, test_sprites.T):
            sprites.denoise_add_noise(x, t, e, z, **schedule)
            sprites.denoise_add_noise(x, t, e, **schedule)
