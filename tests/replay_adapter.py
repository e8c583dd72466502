"""From a recorded step of another codebase to a call of this package.

`step(req)` is an adapter of the replay checker: req holds the codebase, its options and the tensors of one
step; the result is its sample and predicted x0. Only names are translated here: no arithmetic of a sampler.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdiff
from fastdiff import ops, tables
from fastdiff.integrations import ermongroup
from fastdiff.integrations.openai import guided, improved
from fastdiff.schedules import NoiseSchedule

OPENAI_PREDICTION = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "x_prev"}
LUCIDRAINS_PREDICTION = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
DIFFUSERS_PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
HOST = {"improved": "openai", "guided": "openai", "ermon": "ermongroup"}


def step(req: dict[str, Any]) -> dict[str, Tensor]:
    """One recorded step, or forward process, by the integration of its codebase; NotImplementedError names a gap."""
    return STEPS[req["peer"]](req)


def fused_step(req: dict[str, Any]) -> dict[str, Tensor]:
    """As `step`, by the public operations alone, which have an exponential of their own for a learned variance."""
    host = HOST.get(req["peer"], req["peer"])
    if "op" in req:
        return {"out": _forward(host, req)}
    table, t = TABLES[host](req)
    x, model_output = req["x_t"], req["model_out"]
    if not table.structure.learned and model_output.shape != x.shape:
        model_output = model_output[:, : x.shape[1]]  # the variance half of a step that has no use for it
    noise = req["noise"] if table.structure.variance != "none" else None
    sample, x0 = ops.step_with_x0(table, model_output, t, x, noise=noise, rounding="host")
    return {"sample": sample, "pred_xstart": x0}


def _openai(req: dict[str, Any]) -> tuple[tables.Table, int | Tensor]:
    case = req["case"]
    if case["kind"] == "cond_loop":
        raise NotImplementedError("cond_fn")
    schedule = NoiseSchedule.from_betas(req["sched"]["betas"])
    options: dict[str, Any] = {
        "prediction": OPENAI_PREDICTION[case["mean_type"]],
        "clip": 1.0 if case["clip"] else None,
        "host": "openai",
    }
    t = req["t"] if "t" in req else req["i"]
    if case["sampler"] == "ddpm":
        return tables.ddpm_table(schedule, variance=case["var_type"].lower(), **options), t
    if case["sampler"] == "ddim":
        return tables.ddim_table(schedule, eta=case["eta"], **options), t
    return tables.ddim_inversion_table(schedule, **options), t


def _lucidrains(req: dict[str, Any]) -> tuple[tables.Table, int]:
    case = req["case"]
    schedule = NoiseSchedule.from_betas(req["sched"]["betas"])
    options: dict[str, Any] = {
        "prediction": LUCIDRAINS_PREDICTION[case["objective"]],
        "clip": 1.0 if case["clip"] else None,
        "host": "lucidrains",
    }
    if case["sampler"] == "ddpm":
        variance = "learned_range" if case.get("learned_range") else "fixed_small"
        return tables.ddpm_table(schedule, variance=variance, **options), req["i"]
    move = (req["time"], req["time_next"])
    return tables.ddim_table(schedule, [move], eta=case["eta"], **options), req["time"]


def _ermongroup(req: dict[str, Any]) -> tuple[tables.Table, int]:
    case = req["case"]
    schedule = NoiseSchedule.from_betas(req["sched"]["betas"])
    move = [(req["t"], req["t_next"])]
    clip = 1.0 if case["clip"] else None
    if case["sampler"] == "ddpm":
        table = tables.ddpm_table(schedule, move, variance="fixed_large", clip=clip, host="ermongroup")
    else:
        table = tables.ddim_table(schedule, move, eta=case["eta"], clip=clip, host="ermongroup")
    return table, req["t"]


def _diffusers(req: dict[str, Any]) -> tuple[tables.Table, int]:
    case, config, chain, t = req["case"], req["case"]["config"], req["t_all"], req["t"]
    if config.get("thresholding"):
        raise NotImplementedError("thresholding")
    schedule = NoiseSchedule.from_alphas_cumprod(req["sched"]["alphas_cumprod"])
    options: dict[str, Any] = {
        "prediction": DIFFUSERS_PREDICTION[config.get("prediction_type", "epsilon")],
        "clip": config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None,
        "host": "diffusers",
    }
    if case["cls"] == "DDPMScheduler":
        variance = config.get("variance_type", "fixed_small")
        # the codebase takes any other word for fixed_small, and draws no noise at t = 0
        variance = {"learned": "learned_plain", "other": "fixed_small"}.get(variance, variance)
        return tables.ddpm_table(schedule, chain, variance=variance, noise=t > 0, **options), t
    options["final_alpha"] = 1.0 if config.get("set_alpha_to_one", True) else "first"
    if case["cls"] == "DDIMInverseScheduler":
        return tables.ddim_inversion_table(schedule, chain[::-1], **options), t
    eps = "rederived" if case["step_kwargs"].get("use_clipped_model_output") else "raw"
    return tables.ddim_table(schedule, chain, eta=case["step_kwargs"].get("eta", 0.0), eps=eps, **options), t


def _forward(host: str, req: dict[str, Any]) -> Tensor:
    x_start, noise, t = req["x_start"], req["noise"], req["t"]
    if host == "diffusers":
        schedule = NoiseSchedule.from_alphas_cumprod(req["sched"]["alphas_cumprod"])
    else:
        schedule = NoiseSchedule.from_betas(req["sched"]["betas"])
    if req["op"] == "q_posterior":  # the mean of a step whose model gives x0
        table = tables.ddpm_table(schedule, prediction="x0", noise=False, host=host)
        return ops.step(table, x_start, t, req["x_t"], rounding="host")
    table = tables.add_noise_table(schedule, host=host)
    x_t, velocity = ops.add_noise(x_start, t, table, noise=noise, target="v", rounding="host")
    return velocity if req["op"] == "velocity" else x_t


TABLES = {"openai": _openai, "lucidrains": _lucidrains, "ermongroup": _ermongroup, "diffusers": _diffusers}


def _openai_step(req: dict[str, Any]) -> dict[str, Tensor]:
    """Through the class of the codebase's name, as its own loops call it."""
    case = req["case"]
    module: Any = {"improved": improved, "guided": guided}[req["peer"]]
    diffusion = module.GaussianDiffusion(
        betas=req["sched"]["betas"],
        model_mean_type=module.ModelMeanType[case.get("mean_type", "EPSILON")],
        model_var_type=module.ModelVarType[case.get("var_type", "FIXED_SMALL")],
        loss_type=module.LossType.MSE,
    )
    if req.get("op") == "q_sample":
        return {"out": diffusion.q_sample(req["x_start"], req["t"], noise=req["noise"])}
    if req.get("op") == "q_posterior":
        return {"out": diffusion.q_posterior_mean_variance(req["x_start"], req["x_t"], req["t"])[0]}
    x = req["x_t"]
    t = req["t"] if "t" in req else torch.full(x.shape[:1], req["i"], device=x.device)
    options: dict[str, Any] = {"clip_denoised": case["clip"]}
    if "cond_grad" in req:
        options["cond_fn"] = lambda x, t: req["cond_grad"]
    if case["sampler"] == "ddim":
        options["eta"] = case["eta"]
    method = {"ddpm": "p_sample", "ddim": "ddim_sample", "ddim_reverse": "ddim_reverse_sample"}[case["sampler"]]
    with mock.patch("torch.randn_like", lambda x: req["noise"]):
        found: dict[str, Tensor] = getattr(diffusion, method)(lambda x, t: req["model_out"], x, t, **options)
    return found


def _lucidrains_step(req: dict[str, Any]) -> dict[str, Tensor]:
    try:
        import lucidrains_host
    except ImportError as error:
        raise NotImplementedError(f"denoising-diffusion-pytorch: {error}") from error
    case, device = req["case"], req["x_t"].device
    schedule, timesteps = re.findall("[a-z]+|[0-9]+", case["schedule"])
    channels, *size = case["shape"][1:]
    learned = case.get("learned_range", False)
    host = lucidrains_host.LearnedGaussianDiffusion if learned else lucidrains_host.GaussianDiffusion
    diffusion = host(
        _Recorded(req["model_out"], channels, channels * (2 if learned else 1)),
        image_size=size,
        timesteps=int(timesteps),
        objective=case["objective"],
        beta_schedule=schedule,
        ddim_sampling_eta=case.get("eta", 0.0),
    ).to(device)
    assert torch.equal(diffusion.betas.cpu(), torch.from_numpy(req["sched"]["betas"]).float())
    fastdiff.enable(diffusion)
    with mock.patch.object(torch, "randn_like", lambda _: req["noise"]):
        if case["sampler"] == "ddpm":
            sample, x0 = diffusion.p_sample(req["x_t"], req["i"])
        else:
            sample, x0 = diffusion.ddim_step(req["x_t"], req["time"], req["time_next"])
    assert not fastdiff.summary(diffusion).parts[""].kept
    return {"sample": sample, "pred_xstart": x0}


class _Recorded(torch.nn.Module):
    """A model of lucidrains' face that gives what was recorded."""

    self_condition = False

    def __init__(self, output: Tensor, channels: int, out_dim: int) -> None:
        super().__init__()
        self.output, self.channels, self.out_dim = output, channels, out_dim

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.output


def _ermongroup_step(req: dict[str, Any]) -> dict[str, Tensor]:
    """The first step of a chain from x_t, whose noise is the recorded one."""
    if "op" in req:
        return {"out": _forward("ermongroup", req)}
    case, t, t_next = req["case"], req["t"], req["t_next"]
    seq = [t] if t_next < 0 else [t_next, t]
    betas = torch.from_numpy(req["sched"]["betas"]).float()
    arguments = req["x_t"], seq, lambda x, t: req["model_out"], betas
    with mock.patch.object(torch, "randn_like", lambda x: req["noise"]):
        if case["sampler"] == "ddpm":
            xs, x0_preds = ermongroup.ddpm_steps(*arguments)
        else:
            xs, x0_preds = ermongroup.generalized_steps(*arguments, eta=case["eta"])
    return {"sample": xs[1], "pred_xstart": x0_preds[0]}


def _diffusers_step(req: dict[str, Any]) -> dict[str, Tensor]:
    from fastdiff.integrations import diffusers

    case = req["case"]
    scheduler = getattr(diffusers, case.get("cls", "DDPMScheduler"))(**case["config"])
    # as recorded: another machine may make other bits of the betas
    scheduler.alphas_cumprod = torch.from_numpy(req["sched"]["alphas_cumprod"])
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(scheduler, name) and not case["config"].get("set_alpha_to_one", True):
            setattr(scheduler, name, scheduler.alphas_cumprod[0])
    if "op" in req:
        tensors = req["x_start"], req["noise"], req["t"]
        return {"out": (scheduler.add_noise if req["op"] == "add_noise" else scheduler.get_velocity)(*tensors)}
    if case["custom_timesteps"]:
        scheduler.set_timesteps(timesteps=case["custom_timesteps"])
    elif case["num_inference_steps"]:
        scheduler.set_timesteps(case["num_inference_steps"])
    options = dict(case["step_kwargs"])
    if case["passes_variance_noise"]:
        options["variance_noise"] = req["noise"]
    with mock.patch.object(diffusers, "_randn", lambda *args: req["noise"]):
        found = scheduler.step(req["model_out"], req["t"], req["x_t"], **options)
    return {"sample": found.prev_sample, "pred_xstart": found.pred_original_sample}


STEPS = {
    "improved": _openai_step,
    "guided": _openai_step,
    "lucidrains": _lucidrains_step,
    "ermon": _ermongroup_step,
    "diffusers": _diffusers_step,
}
