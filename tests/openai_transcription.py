"""GaussianDiffusion of improved-diffusion and guided-diffusion, transcribed for the tests, apart from the package.

`Improved`, `Guided` and their spaced classes have the interface of the codebases, and compute in the order of their
operations, so that a step of theirs has their bits. `Dense` is a fork as DiT is one, whose coefficients are full
tensors. `exact` is a step in float64 from the formulas of the papers, in another order.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Mean(enum.Enum):
    PREVIOUS_X = 1
    START_X = 2
    EPSILON = 3


class Var(enum.Enum):
    LEARNED = 1
    FIXED_SMALL = 2
    FIXED_LARGE = 3
    LEARNED_RANGE = 4


class Loss(enum.Enum):
    MSE = 1
    RESCALED_MSE = 2
    KL = 3
    RESCALED_KL = 4


def linear_betas(steps: int) -> np.ndarray:
    return np.linspace(0.1 / steps, 20 / steps, steps)


def mean_flat(tensor: Tensor) -> Tensor:
    return tensor.mean(dim=tuple(range(1, tensor.dim())))


def kl(mean1: Any, log1: Any, mean2: Any, log2: Any) -> Tensor:
    return 0.5 * (-1.0 + log2 - log1 + torch.exp(log1 - log2) + (mean1 - mean2) ** 2 * torch.exp(-log2))


def cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def pixel_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    apart, inverse = x - mean, torch.exp(-log_scale)
    above, below = cdf(inverse * (apart + 1 / 255)), cdf(inverse * (apart - 1 / 255))
    inner = torch.log((above - below).clamp(min=1e-12))
    high = torch.log((1.0 - below).clamp(min=1e-12))
    return torch.where(x < -0.999, torch.log(above.clamp(min=1e-12)), torch.where(x > 0.999, high, inner))


class Improved:
    def __init__(self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False):
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.loss_type, self.rescale_timesteps = loss_type, rescale_timesteps
        self.betas = betas = np.array(betas, dtype=np.float64)
        self.num_timesteps = len(betas)
        self.alphas_cumprod = ab = np.cumprod(1.0 - betas, axis=0)
        self.alphas_cumprod_prev = prev = np.append(1.0, ab[:-1])
        self.alphas_cumprod_next = np.append(ab[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(ab)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - ab)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - ab)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / ab)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / ab - 1)
        self.posterior_variance = var = betas * (1.0 - prev) / (1.0 - ab)
        self.posterior_log_variance_clipped = np.log(np.append(var[1], var[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(prev) / (1.0 - ab)
        self.posterior_mean_coef2 = (1.0 - prev) * np.sqrt(1.0 - betas) / (1.0 - ab)

    def at(self, table: np.ndarray, t: Tensor, shape: torch.Size) -> Tensor:
        values = torch.from_numpy(table).to(t.device)[t].float()
        return values.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)

    def q_mean_variance(self, x_start, t):
        s = x_start.shape
        mean = self.at(self.sqrt_alphas_cumprod, t, s) * x_start
        return mean, self.at(1.0 - self.alphas_cumprod, t, s), self.at(self.log_one_minus_alphas_cumprod, t, s)

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        s = x_start.shape
        return (
            self.at(self.sqrt_alphas_cumprod, t, s) * x_start
            + self.at(self.sqrt_one_minus_alphas_cumprod, t, s) * noise
        )

    def q_posterior_mean_variance(self, x_start, x_t, t):
        s = x_t.shape
        mean = self.at(self.posterior_mean_coef1, t, s) * x_start + self.at(self.posterior_mean_coef2, t, s) * x_t
        return mean, self.at(self.posterior_variance, t, s), self.at(self.posterior_log_variance_clipped, t, s)

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        if isinstance(output, tuple):
            output, _ = output
        var_type, s = self.model_var_type.name, x.shape
        if var_type.startswith("LEARNED"):
            output, values = torch.split(output, s[1], dim=1)
            log = values
            if var_type == "LEARNED_RANGE":
                fraction = (values + 1) / 2
                log = fraction * self.at(np.log(self.betas), t, s)
                log = log + (1 - fraction) * self.at(self.posterior_log_variance_clipped, t, s)
            variance = torch.exp(log)
        elif var_type == "FIXED_LARGE":
            large = np.append(self.posterior_variance[1], self.betas[1:])
            variance, log = self.at(large, t, s), self.at(np.log(large), t, s)
        else:
            variance = self.at(self.posterior_variance, t, s)
            log = self.at(self.posterior_log_variance_clipped, t, s)
        mean_type = self.model_mean_type.name
        if mean_type == "START_X":
            x0 = output
        elif mean_type == "EPSILON":
            x0 = self._predict_xstart_from_eps(x, t, output)
        else:
            x0 = self._predict_xstart_from_xprev(x, t, output)
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        mean = output if mean_type == "PREVIOUS_X" else self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log, "pred_xstart": x0}

    def _predict_xstart_from_eps(self, x_t, t, eps):
        s = x_t.shape
        return (
            self.at(self.sqrt_recip_alphas_cumprod, t, s) * x_t - self.at(self.sqrt_recipm1_alphas_cumprod, t, s) * eps
        )

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        c1, c2, s = self.posterior_mean_coef1, self.posterior_mean_coef2, x_t.shape
        return self.at(1.0 / c1, t, s) * xprev - self.at(c2 / c1, t, s) * x_t

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        s = x_t.shape
        scaled = self.at(self.sqrt_recip_alphas_cumprod, t, s) * x_t
        return (scaled - pred_xstart) / self.at(self.sqrt_recipm1_alphas_cumprod, t, s)

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        return self.ancestral(model, x, t, clip_denoised, denoised_fn, None, model_kwargs)

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        return self.ddim(model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta)

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        assert eta == 0.0
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        x0 = out["pred_xstart"]
        scaled = self.at(self.sqrt_recip_alphas_cumprod, t, x.shape) * x
        eps = (scaled - x0) / self.at(self.sqrt_recipm1_alphas_cumprod, t, x.shape)
        later = self.at(self.alphas_cumprod_next, t, x.shape)
        return {"sample": x0 * torch.sqrt(later) + torch.sqrt(1 - later) * eps, "pred_xstart": x0}

    def ancestral(self, model, x, t, clip, denoised_fn, cond_fn, model_kwargs):
        out = self.p_mean_variance(model, x, t, clip, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        mask = (t != 0).float().reshape(-1, *(1,) * (x.dim() - 1))
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = mean + mask * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim(self, model, x, t, clip, denoised_fn, cond_fn, model_kwargs, eta):
        out = self.p_mean_variance(model, x, t, clip, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        x0 = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, x0)
        ab, prev = self.at(self.alphas_cumprod, t, x.shape), self.at(self.alphas_cumprod_prev, t, x.shape)
        sigma = eta * torch.sqrt((1 - prev) / (1 - ab)) * torch.sqrt(1 - ab / prev)
        noise = torch.randn_like(x)
        mean = x0 * torch.sqrt(prev) + torch.sqrt(1 - prev - sigma**2) * eps
        mask = (t != 0).float().reshape(-1, *(1,) * (x.dim() - 1))
        return {"sample": mean + mask * sigma * noise, "pred_xstart": x0}

    def chain(self, step, model, shape, noise, device, **options):
        device = next(model.parameters()).device if device is None else device
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = step(model, x, t, **options)
                yield out
                x = out["sample"]

    def p_sample_loop(self, model, shape, noise=None, device=None, **options):
        return list(self.chain(self.p_sample, model, shape, noise, device, **options))[-1]["sample"]

    def ddim_sample_loop(self, model, shape, noise=None, device=None, **options):
        return list(self.chain(self.ddim_sample, model, shape, noise, device, **options))[-1]["sample"]

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        mean, _, log = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised, None, model_kwargs)
        divergence = mean_flat(kl(mean, log, out["mean"], out["log_variance"])) / np.log(2.0)
        nll = mean_flat(-pixel_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])) / np.log(2.0)
        return {"output": torch.where(t == 0, nll, divergence), "pred_xstart": out["pred_xstart"]}

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        loss_type = self.loss_type.name
        if loss_type.endswith("KL"):
            loss = self._vb_terms_bpd(model, x_start, x_t, t, False, model_kwargs)["output"]
            return {"loss": loss * (self.num_timesteps if loss_type == "RESCALED_KL" else 1)}
        terms = {}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if self.model_var_type.name.startswith("LEARNED"):
            output, values = torch.split(output, x_t.shape[1], dim=1)
            frozen = torch.cat([output.detach(), values], dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *args: frozen, x_start, x_t, t, False)["output"]
            if loss_type == "RESCALED_MSE":
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        mean_type = self.model_mean_type.name
        if mean_type == "PREVIOUS_X":
            target = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        else:
            target = x_start if mean_type == "START_X" else noise
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        found = {"vb": [], "xstart_mse": [], "mse": []}
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * len(x_start))
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            found["vb"].append(out["output"])
            found["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            found["mse"].append(mean_flat((eps - noise) ** 2))
        result = {name: torch.stack(terms, dim=1) for name, terms in found.items()}
        last = torch.tensor([self.num_timesteps - 1] * len(x_start))
        mean, _, log = self.q_mean_variance(x_start, last)
        prior = mean_flat(kl(mean, log, 0.0, torch.tensor(0.0))) / np.log(2.0)
        return {"total_bpd": result["vb"].sum(dim=1) + prior, "prior_bpd": prior, **result}


class Guided(Improved):
    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        gradient = cond_fn(x, self._scale_timesteps(t), **model_kwargs)
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        ab = self.at(self.alphas_cumprod, t, x.shape)
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - (1 - ab).sqrt() * cond_fn(x, self._scale_timesteps(t), **model_kwargs)
        x0 = self._predict_xstart_from_eps(x, t, eps)
        return {**p_mean_var, "pred_xstart": x0, "mean": self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)[0]}

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        return self.ancestral(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        return self.ddim(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)


class Wrapped:
    def __init__(self, model: Any, timestep_map: list[int], rescale_timesteps: bool, original_num_steps: int) -> None:
        self.model, self.timestep_map = model, timestep_map
        self.rescale_timesteps, self.original_num_steps = rescale_timesteps, original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        times = torch.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)[ts]
        if self.rescale_timesteps:
            times = times.float() * (1000.0 / self.original_num_steps)
        return self.model(x, times, **kwargs)


class Spaced:
    """What the spaced classes add; the kept betas are those of the longer chain's alpha_bar."""

    def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
        ab = np.cumprod(1.0 - np.array(kwargs["betas"], dtype=np.float64))
        self.timestep_map = [i for i in range(len(ab)) if i in set(use_timesteps)]
        self.original_num_steps = len(ab)
        last, betas = 1.0, []
        for i in self.timestep_map:
            betas.append(1 - ab[i] / last)
            last = ab[i]
        super().__init__(**{**kwargs, "betas": np.array(betas)})

    def _wrap_model(self, model: Any) -> Wrapped:
        if isinstance(model, Wrapped):
            return model
        return Wrapped(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)


class SpacedImproved(Spaced, Improved):
    pass


class SpacedGuided(Spaced, Guided):
    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)


class Dense(SpacedGuided):
    def at(self, table: np.ndarray, t: Tensor, shape: torch.Size) -> Tensor:
        return super().at(table, t, shape) + torch.zeros(shape)


def exact(
    betas: np.ndarray,
    mean_type: str,
    var_type: str,
    x: Tensor,
    t: list[int],
    output: Tensor,
    noise: Tensor,
    *,
    sampler: str,
    clip: bool,
    eta: float = 0.0,
    gradient: Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """x_{t-1} (x_{t+1} for "reverse") and the predicted x_0, sample by sample, in float64."""
    ab = np.cumprod(1 - betas)
    samples, x0s = [], []
    for b, step in enumerate(t):
        a, p = ab[step], ab[step - 1] if step else 1.0
        beta, channels = 1 - a / p, x.shape[1]
        state, z, out = x[b].double().numpy(), noise[b].double().numpy(), output[b].double().numpy()
        m, v = out[:channels], out[channels:]
        c0, cx = math.sqrt(p) * beta / (1 - a), math.sqrt(1 - beta) * (1 - p) / (1 - a)
        x0 = m
        if mean_type == "EPSILON":
            x0 = (state - math.sqrt(1 - a) * m) / math.sqrt(a)
        elif mean_type == "PREVIOUS_X":
            x0 = (m - cx * state) / c0
        x0 = np.clip(x0, -1, 1) if clip else x0
        if sampler == "ddpm":
            small = beta * (1 - p) / (1 - a)
            # the first step has the variance of the second where a logarithm or a large variance is asked for
            second = betas[1] * (1 - ab[0]) / (1 - ab[1])
            large = beta if step else second
            low = math.log(small if step else second)
            log = {"FIXED_SMALL": low, "FIXED_LARGE": math.log(large), "LEARNED": v}.get(var_type)
            if log is None:
                log = low + (v + 1) / 2 * (math.log(beta) - low)
            mean = m if mean_type == "PREVIOUS_X" else c0 * x0 + cx * state
            if gradient is not None:
                variance = {"FIXED_SMALL": small, "FIXED_LARGE": large}.get(var_type, np.exp(log))
                mean = mean + variance * gradient[b].double().numpy()
            sample = mean + np.sqrt(np.exp(log)) * z * (step > 0)
        else:
            eps = (state - math.sqrt(a) * x0) / math.sqrt(1 - a)
            if gradient is not None:
                eps = eps - math.sqrt(1 - a) * gradient[b].double().numpy()
                x0 = (state - math.sqrt(1 - a) * eps) / math.sqrt(a)
            if sampler == "reverse":
                later = ab[step + 1] if step + 1 < len(ab) else 0.0
                sample = math.sqrt(later) * x0 + math.sqrt(1 - later) * eps
            else:
                sigma = eta * math.sqrt((1 - p) / (1 - a) * beta)
                sample = math.sqrt(p) * x0 + math.sqrt(max(1 - p - sigma**2, 0)) * eps + sigma * z * (step > 0)
        samples.append(sample)
        x0s.append(x0)
    return np.stack(samples), np.stack(x0s)
