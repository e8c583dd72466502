"""Steps of other codebases, run eagerly on the GPU, against ours with their noise: equal, or it is told where not.

A host's coefficients are made by torch on the device where the host makes them (host="...", device=...). On CUDA torch
takes a number of the host, or a 0-dimensional tensor on the CPU, differently from a tensor on the device: it divides
by multiplying with the reciprocal, and does not round it to a half type. Every case is recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import ddim_table, ddpm_table

pytestmark = pytest.mark.cuda

SHAPE = (2, 3, 16, 16)
TESTS = Path(__file__).parents[1]
REPLAY = os.environ.get("FASTDIFF_REPLAY_DIR")
PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def inputs(device, dtype, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (SHAPE[0], channels, *SHAPE[2:])
    x, m = torch.randn(SHAPE, generator=generator), torch.randn(shape, generator=generator)
    return x.to(device, dtype), m.to(device, dtype)


def verdict(record, cases: dict[str, bool]) -> None:
    """Record every case, and fail with the list of those that are not equal."""
    for case, equal in cases.items():
        record(case, equal=equal)
    unequal = [case for case, equal in cases.items() if not equal]
    assert not unequal, f"{len(unequal)} of {len(cases)} cases are not equal: {unequal}"


def placed(scheduler, where: str, device):
    """alphas_cumprod where the codebase keeps it: on the CPU, and on the device once its add_noise has been called."""
    if where == "alphas on the device":
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return scheduler


@pytest.mark.parametrize("where", ["alphas on the CPU", "alphas on the device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction", PREDICTION)
def test_diffusers_ddpm(device, record, prediction, dtype, where):
    diffusers = pytest.importorskip("diffusers")
    cases = {}
    for clip in (True, False):
        for variance in ("fixed_small", "fixed_large"):
            scheduler = placed(
                diffusers.DDPMScheduler(
                    1000, prediction_type=prediction, clip_sample=clip, variance_type=variance, thresholding=False
                ),
                where,
                device,
            )
            schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.cpu().double().numpy())
            scheduler.set_timesteps(20)
            chain = scheduler.timesteps.tolist()
            for t in (chain[0], chain[7], chain[-2], chain[-1]):
                x, m = inputs(device, dtype, seed=t)
                ours, theirs = (torch.Generator(device).manual_seed(t) for _ in range(2))
                expected = scheduler.step(m, t, x, generator=theirs)
                table = ddpm_table(
                    schedule, chain, prediction=PREDICTION[prediction], variance=variance, noise=t > 0,
                    clip=1.0 if clip else None, host="diffusers",
                    device=device if where == "alphas on the device" else "cpu",
                )  # fmt: skip
                source = {"noise": torch.randn(SHAPE, generator=ours, device=device, dtype=dtype)} if t else {}
                found, x0 = ops.step_with_x0(table, m, t, x, rounding="host", **source)
                name = f"DDPM {prediction} {dtype} {where} clip={clip} {variance} t={t}"
                cases[name] = torch.equal(found, expected.prev_sample)
                cases[f"{name} x0"] = torch.equal(x0, expected.pred_original_sample)
    verdict(record, cases)


@pytest.mark.parametrize("where", ["alphas on the CPU", "alphas on the device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusers_ddim(device, record, prediction, dtype, where):
    diffusers = pytest.importorskip("diffusers")
    cases = {}
    for clip in (True, False):
        for eta in (0.0, 0.5, 1.0):
            scheduler = placed(
                diffusers.DDIMScheduler(1000, prediction_type=prediction, clip_sample=clip), where, device
            )
            if where == "alphas on the device":
                scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(device)
            schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.cpu().double().numpy())
            scheduler.set_timesteps(20)
            chain = scheduler.timesteps.tolist()
            for again in (False, True):
                table = ddim_table(
                    schedule, chain, eta=eta, prediction=PREDICTION[prediction], clip=1.0 if clip else None,
                    eps="rederived" if again else "raw", host="diffusers",
                    device=device if where == "alphas on the device" else "cpu",
                )  # fmt: skip
                for t in (chain[0], chain[7], chain[-1]):
                    x, m = inputs(device, dtype, seed=t)
                    noise = torch.randn(SHAPE, device=device, generator=torch.Generator(device).manual_seed(t))
                    noise = noise.to(dtype)
                    expected = scheduler.step(
                        m, t, x, eta=eta, use_clipped_model_output=again, variance_noise=noise if eta else None
                    )
                    source = {"noise": noise} if eta else {}
                    found, x0 = ops.step_with_x0(table, m, t, x, rounding="host", **source)
                    name = f"DDIM {prediction} {dtype} {where} clip={clip} eta={eta} rederived={again} t={t}"
                    cases[name] = torch.equal(found, expected.prev_sample)
                    cases[f"{name} x0"] = torch.equal(x0, expected.pred_original_sample)
    verdict(record, cases)


# OpenAI's gaussian_diffusion.py: float64 tables, taken as float32 tensors on the device; lucidrains keeps float32
# buffers there, made from float64. Written out here as they compute, for the eager arithmetic of this GPU.


def openai_step(betas, t, x, m, noise, *, ddim, eta=0.0):
    alphas_cumprod = (1.0 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])

    def at(array):
        """_extract_into_tensor: the table as float64 on the device, indexed, as float32, expanded."""
        index = torch.full((x.shape[0],), t, device=x.device)
        return array.to(x.device)[index].float().view(-1, 1, 1, 1).expand(x.shape)

    x0 = at((1.0 / alphas_cumprod).sqrt()) * x - at((1.0 / alphas_cumprod - 1).sqrt()) * m
    x0 = x0.clamp(-1, 1)
    nonzero = float(t != 0)
    if not ddim:
        first = at(betas * previous.sqrt() / (1.0 - alphas_cumprod))
        second = at((1.0 - previous) * (1.0 - betas).sqrt() / (1.0 - alphas_cumprod))
        variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
        log_variance = at(torch.log(torch.cat([variance[1:2], variance[1:]])))
        mean = first * x0 + second * x
        mask = torch.full((x.shape[0], 1, 1, 1), nonzero, device=x.device)
        return mean + mask * torch.exp(0.5 * log_variance) * noise, x0
    eps = (at((1.0 / alphas_cumprod).sqrt()) * x - x0) / at((1.0 / alphas_cumprod - 1).sqrt())
    alpha, alpha_previous = at(alphas_cumprod), at(previous)
    sigma = eta * torch.sqrt((1 - alpha_previous) / (1 - alpha)) * torch.sqrt(1 - alpha / alpha_previous)
    mean = x0 * torch.sqrt(alpha_previous) + torch.sqrt(1 - alpha_previous - sigma**2) * eps
    mask = torch.full((x.shape[0], 1, 1, 1), nonzero, device=x.device)
    return mean + mask * sigma * noise, x0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim eta 0.5"])
def test_openai_written_out(device, record, sampler):
    schedule, cases = NoiseSchedule.linear(1000), {}
    betas = torch.from_numpy(schedule.betas.copy())
    eta = 0.5 if "eta" in sampler else 0.0
    if sampler == "ddpm":
        table = ddpm_table(schedule, clip=1.0, host="openai", device=device)
    else:
        table = ddim_table(schedule, eta=eta, clip=1.0, host="openai", device=device)
    for t in (999, 500, 17, 1, 0):
        x, m = inputs(device, torch.float32, seed=t)
        noise = torch.randn(SHAPE, generator=torch.Generator(device).manual_seed(t), device=device)
        expected, x0 = openai_step(betas, t, x, m, noise, ddim=sampler != "ddpm", eta=eta)
        source = {"noise": noise} if table.structure.variance != "none" else {}
        found, predicted = ops.step_with_x0(table, m, t, x, rounding="host", **source)
        cases[f"OpenAI {sampler} t={t}"] = torch.equal(found, expected)
        cases[f"OpenAI {sampler} t={t} x0"] = torch.equal(predicted, x0)
    verdict(record, cases)


def lucidrains_step(betas, t, x, m, noise):
    """denoising_diffusion_pytorch's p_sample: buffers in float32, gathered per sample."""
    alphas = 1.0 - betas
    alphas_cumprod = alphas.cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])

    def at(array):
        index = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        return array.float().to(x.device).gather(-1, index).view(-1, 1, 1, 1)

    x0 = at((1.0 / alphas_cumprod).sqrt()) * x - at((1.0 / alphas_cumprod - 1).sqrt()) * m
    x0 = x0.clamp(-1.0, 1.0)
    variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    mean = (
        at(betas * previous.sqrt() / (1.0 - alphas_cumprod)) * x0
        + at((1.0 - previous) * alphas.sqrt() / (1.0 - alphas_cumprod)) * x
    )
    return mean + (0.5 * at(torch.log(variance.clamp(min=1e-20)))).exp() * noise, x0


def test_lucidrains_written_out(device, record):
    schedule, cases = NoiseSchedule.linear(1000), {}
    betas = torch.from_numpy(schedule.betas.copy())
    table = ddpm_table(schedule, clip=1.0, host="lucidrains", device=device)
    for t in (999, 500, 17, 1, 0):
        x, m = inputs(device, torch.float32, seed=t)
        noise = torch.randn(SHAPE, generator=torch.Generator(device).manual_seed(t), device=device)
        expected, x0 = lucidrains_step(betas, t, x, m, noise if t > 0 else torch.zeros_like(x))
        found, predicted = ops.step_with_x0(table, m, t, x, noise=noise, rounding="host")
        cases[f"lucidrains t={t}"] = torch.equal(found, expected)
        cases[f"lucidrains t={t} x0"] = torch.equal(predicted, x0)
    verdict(record, cases)


@pytest.mark.skipif(
    not REPLAY or not Path(REPLAY, "check_replay.py").is_file(),
    reason="FASTDIFF_REPLAY_DIR names no folder with the recordings and check_replay.py",
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset1"])
def test_recorded_steps(device, record, layout, tmp_path):
    """The steps of five codebases that were recorded on a CPU, to the recordings' tolerance, computed on the GPU."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(Path(REPLAY or "", "check_replay.py")), "--adapter", "replay_adapter:fused_step"]
    command += ["--device", device.type, "--layout", layout, "--allow-skip", "--exact", "--json", str(report)]
    path = os.pathsep.join([str(Path(fastdiff.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command, cwd=TESTS, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    totals = json.loads(report.read_text())["total"] if report.exists() else {}
    exact = next((line for line in run.stdout.splitlines() if line.startswith("bit for bit")), None)
    record(f"recorded steps, {layout}", exact=exact, **totals)
    assert run.returncode == 0, run.stdout + run.stderr
