"""From a recorded step of another codebase to a call of this package.

`step(req)` is an adapter of the replay checker: req holds the codebase, its options and the tensors of one
step; the result is its sample and predicted x0. Only names are translated here: no arithmetic of a sampler.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdiff import ops, reference, tables
from fastdiff.integrations import diffusers
from fastdiff.schedules import NoiseSchedule

OPENAI_PREDICTION = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "x_prev"}
LUCIDRAINS_PREDICTION = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
DIFFUSERS_PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
HOST = {"improved": "openai", "guided": "openai", "ermon": "ermongroup"}


def step(req: dict[str, Any]) -> dict[str, Tensor]:
    """One recorded step, or forward process, by the public operations; NotImplementedError names a gap.

    A learned variance goes through the reference with torch's exp and sqrt, which are the codebases' and not
    the kernels'; `fused_step` takes the kernels there too.
    """
    return INTEGRATIONS[req["peer"]](req) if req["peer"] in INTEGRATIONS else _replay(req, torch_math=True)


def fused_step(req: dict[str, Any]) -> dict[str, Tensor]:
    """As `step`, with the fused operation alone."""
    return _replay(req, torch_math=False)


def _replay(req: dict[str, Any], torch_math: bool) -> dict[str, Tensor]:
    host = HOST.get(req["peer"], req["peer"])
    if "op" in req:
        return {"out": _forward(host, req)}
    table, t = TABLES[host](req)
    x, model_output = req["x_t"], req["model_out"]
    if table.structure.learned and torch_math:
        row = table.row_map(x.device)[t] if isinstance(t, Tensor) else table.row_of(t)
        rows = table.to(x.device, x.dtype)[row]
        sample, x0 = reference.step(
            rows, table.structure, x, model_output, z=req["noise"], rounding="host", torch_math=True
        )
        return {"sample": sample, "pred_xstart": x0}
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


def _with_diffusers(req: dict[str, Any]) -> dict[str, Tensor]:
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
INTEGRATIONS = {"diffusers": _with_diffusers}
