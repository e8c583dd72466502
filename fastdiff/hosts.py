"""The precision rules of other codebases: the coefficients of a step, made the way they make them.

A step is bit for bit that of a codebase only when its coefficients are. OpenAI and lucidrains fill float64
tables, cast them to float32 and do the rest in float32; diffusers and ermongroup work in float32 throughout.
The operations below are torch's, in the order of the codebase, because torch's square root and exponential
are not those of NumPy.

The rows are literal: where a codebase divides by 0, as with eps prediction on a schedule of zero terminal SNR, they
hold its NaN or Inf, and the step goes where that codebase's step goes. Only the rows of host "fastdiff" are checked to
be finite (`fastdiff.tables`).

Every function here returns `Columns`: float32 values as tensors or numbers, by column name, beside the form
of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .schedules import NoiseSchedule


@dataclass
class Columns:
    """Columns of a table by name, [S] or one number for all rows, and the fields of its Structure."""

    values: dict[str, Any] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)

    def __or__(self, other: Columns) -> Columns:
        return Columns(self.values | other.values, self.form | other.form)


class Chain(NamedTuple):
    """What a host is asked for: S steps t -> prev of a schedule, prev = -1 at the clean end.

    given: "all" (every timestep), "list" (timesteps) or "pairs".  final: alpha_bar at the clean end.
    """

    schedule: NoiseSchedule
    t: list[int]
    prev: list[int]
    given: str
    final: float | str
    device: torch.device


class Host(NamedTuple):
    """What a codebase has, and the functions that fill a table as it would.

    ddpm(chain, prediction, variance), ddim(chain, prediction, eta, eps, clipped), add_noise(chain), and
    inversion(chain, prediction, clipped), None where the codebase has no such sampler.
    """

    predictions: tuple[str, ...]
    variances: tuple[str, ...]
    eps: tuple[str, ...]  # forms of eps that its DDIM has; the first is its own default
    ddpm: Callable[[Chain, str, str], Columns]
    ddim: Callable[[Chain, str, float, str, bool], Columns]
    add_noise: Callable[[Chain], Columns]
    inversion: Callable[[Chain, str, bool], Columns] | None = None


def _x0_output() -> Columns:
    return Columns({}, {"x0": "output"})


def _x0_multiply(px: Any, pm: Any) -> Columns:
    return Columns({"px": px, "pm": pm}, {"x0": "linear"})


def _x0_divide(pm: Tensor, pd: Tensor) -> Columns:
    return Columns({"px": 1.0, "pm": pm, "pd": pd}, {"x0": "linear", "x0_divide": True})


def _eps_output() -> Columns:
    return Columns({}, {"eps": "output"})


def _eps_rederived(gx: Any, g0: Any, gd: Tensor) -> Columns:
    return Columns({"gx": gx, "g0": g0, "gd": gd}, {"eps": "rederived", "eps_divide": True})


def _mean_through_x0(a0: Tensor, ax: Tensor) -> Columns:
    return Columns({"a0": a0, "ax": ax}, {"a0": True, "ax": True})


def _mean_is_output() -> Columns:
    return Columns({"ae": 1.0}, {"a0": False, "eps": "output", "ae": True})


def _direction(a0: Any, ae: Any) -> Columns:
    return Columns({"a0": a0, "ae": ae}, {"a0": True, "ae": True})


def _noise(s: Any, variance: str = "fixed", **limits: Any) -> Columns:
    return Columns({"s": s} | limits, {"variance": variance})


def _no_noise() -> Columns:
    return Columns({}, {"variance": "none"})


def _forward(ax: Tensor, s: Tensor) -> Columns:
    return Columns({"ax": ax, "s": s}, {"x0": "none", "a0": False, "ax": True, "variance": "fixed"})


def _nonzero(condition: list[bool], device: torch.device) -> Tensor:
    return torch.tensor(condition, dtype=torch.float32, device=device)


class _OpenAI:
    """Tables of GaussianDiffusion / SpacedDiffusion, float64, gathered at the rows and cast to float32."""

    def __init__(self, chain: Chain) -> None:
        schedule, kept = chain.schedule, sorted(set(chain.t))
        if chain.given == "pairs" or len(kept) != len(chain.t):
            raise ValueError("timesteps: expected a list without repeats with host 'openai', which respaces by it")
        if chain.given != "all":
            betas = schedule.respace(kept)[0].betas
            if (betas == 0).any():
                t = kept[int(np.argmin(betas))]
                raise ValueError(
                    "schedule: expected less signal at every timestep of the chain with host 'openai', which respaces "
                    f"by betas, got a beta of 0 at timestep {t} of {schedule.name!r}"
                )
            schedule = NoiseSchedule.from_betas(betas)
        self.index = np.searchsorted(kept, chain.t)
        self.device = chain.device
        self.not_first = _nonzero([i != 0 for i in self.index], chain.device)
        betas = schedule.betas
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        remains = 1.0 - self.alphas_cumprod
        variance = betas * (1.0 - self.alphas_cumprod_prev) / remains
        self.c1 = betas * np.sqrt(self.alphas_cumprod_prev) / remains
        self.c2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - betas) / remains
        second = variance[min(1, len(betas) - 1)]
        self.log_betas = np.log(betas)
        self.log_small = np.log(np.append(second, variance[1:]))
        self.log_large = np.log(np.append(second, betas[1:]))

    def __call__(self, table: np.ndarray) -> Tensor:
        return torch.from_numpy(table[self.index]).to(self.device).float()

    def x0(self, prediction: str) -> Columns:
        if prediction == "x0":
            return _x0_output()
        if prediction == "x_prev":
            return _x0_multiply(-self(self.c2 / self.c1), self(1.0 / self.c1))
        return _x0_multiply(self.sqrt_recip, -self.sqrt_recipm1)

    @property
    def sqrt_recip(self) -> Tensor:
        return self(np.sqrt(1.0 / self.alphas_cumprod))

    @property
    def sqrt_recipm1(self) -> Tensor:
        return self(np.sqrt(1.0 / self.alphas_cumprod - 1))

    def eps(self) -> Columns:
        return _eps_rederived(self.sqrt_recip, 1.0, self.sqrt_recipm1)


def _openai_ddpm(chain: Chain, prediction: str, variance: str) -> Columns:
    f = _OpenAI(chain)
    mean = _mean_is_output() if prediction == "x_prev" else _mean_through_x0(f(f.c1), f(f.c2))
    if variance == "learned":
        noise = _noise(f.not_first, "learned_log")
    elif variance == "learned_range":
        noise = _noise(f.not_first, "learned_range", min_log=f(f.log_small), max_log=f(f.log_betas))
    else:
        log_variance = f(f.log_small if variance == "fixed_small" else f.log_large)
        noise = _noise(f.not_first * torch.exp(0.5 * log_variance))
    return f.x0(prediction) | mean | noise


def _openai_ddim(chain: Chain, prediction: str, eta: float, eps: str, clipped: bool) -> Columns:
    f = _OpenAI(chain)
    alpha_bar, alpha_bar_prev = f(f.alphas_cumprod), f(f.alphas_cumprod_prev)
    sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
    sigma = sigma * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
    direction = _direction(torch.sqrt(alpha_bar_prev), torch.sqrt(_at_least_0(1 - alpha_bar_prev - sigma**2)))
    noise = _noise(f.not_first * sigma) if eta else _no_noise()
    return f.x0(prediction) | f.eps() | direction | noise


def _openai_inversion(chain: Chain, prediction: str, clipped: bool) -> Columns:
    f = _OpenAI(chain)
    alpha_bar_next = f(f.alphas_cumprod_next)
    direction = _direction(torch.sqrt(alpha_bar_next), torch.sqrt(1 - alpha_bar_next))
    return f.x0(prediction) | f.eps() | direction | _no_noise()


def _openai_add_noise(chain: Chain) -> Columns:
    f = _OpenAI(chain)
    return _forward(f(np.sqrt(f.alphas_cumprod)), f(np.sqrt(1.0 - f.alphas_cumprod)))


def _at_least_0(radicand: Tensor) -> Tensor:
    # at eta = 1 the exact value may be 0 and float32 takes it below, which gives the codebases NaN
    return radicand.clamp(min=0)


class LucidrainsBuffers:
    """The float32 buffers of a GaussianDiffusion, by their names there, gathered at timesteps.

    buffers: 1-dimensional tensors of one length.  The functions below say which they read.
    """

    def __init__(self, buffers: Mapping[str, Tensor], t: list[int]) -> None:
        self.buffers = buffers
        self.t = t
        self.index = torch.tensor(t, device=buffers["alphas_cumprod"].device)

    def __call__(self, name: str) -> Tensor:
        return self.buffers[name][self.index]

    def x0(self, prediction: str) -> Columns:
        if prediction == "x0":
            return _x0_output()
        if prediction == "v":
            return _x0_multiply(self("sqrt_alphas_cumprod"), -self("sqrt_one_minus_alphas_cumprod"))
        return _x0_multiply(self("sqrt_recip_alphas_cumprod"), -self("sqrt_recipm1_alphas_cumprod"))

    def clean(self, prediction: str) -> Columns:
        """A step that leads to the predicted x0."""
        return self.x0(prediction) | Columns({"a0": 1.0}, {"a0": True}) | _no_noise()

    def ddpm(self, prediction: str, variance: str) -> Columns:
        """A step of p_sample; without noise for variance "none"."""
        mean = _mean_through_x0(self("posterior_mean_coef1"), self("posterior_mean_coef2"))
        if variance == "none":
            return self.x0(prediction) | mean | _no_noise()
        not_last = _nonzero([t > 0 for t in self.t], self.index.device)
        log_variance = self("posterior_log_variance_clipped")
        if variance == "learned_range":
            noise = _noise(not_last, variance, min_log=log_variance, max_log=torch.log(self("betas")))
        else:
            noise = _noise(not_last * (0.5 * log_variance).exp())
        return self.x0(prediction) | mean | noise

    def ddim(self, prev: list[int], prediction: str, eta: float, eps: str) -> Columns:
        """A step of ddim_sample from each timestep to another; prev = -1 is the clean end."""
        alpha = self("alphas_cumprod")
        alpha_next = _alphas_or_final(self.buffers["alphas_cumprod"], prev, 1.0)
        sigma = eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
        direction = _direction(alpha_next.sqrt(), _at_least_0(1 - alpha_next - sigma**2).sqrt())
        if eps == "raw" and prediction == "eps":
            e = _eps_output()
        else:
            e = _eps_rederived(self("sqrt_recip_alphas_cumprod"), 1.0, self("sqrt_recipm1_alphas_cumprod"))
        return self.x0(prediction) | e | direction | (_noise(sigma) if eta else _no_noise())


def _lucidrains(chain: Chain) -> LucidrainsBuffers:
    """The buffers that the codebase makes for a schedule: float64 torch arithmetic, each cast to float32."""
    betas = torch.from_numpy(chain.schedule.betas.copy())
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    prev = torch.nn.functional.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    remains = 1.0 - alphas_cumprod
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": torch.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": torch.sqrt(remains),
        "sqrt_recip_alphas_cumprod": torch.sqrt(1.0 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": torch.sqrt(1.0 / alphas_cumprod - 1),
        "posterior_log_variance_clipped": torch.log((betas * (1.0 - prev) / remains).clamp(min=1e-20)),
        "posterior_mean_coef1": betas * torch.sqrt(prev) / remains,
        "posterior_mean_coef2": (1.0 - prev) * torch.sqrt(1.0 - betas) / remains,
    }
    cast = {name: buffer.to(chain.device, torch.float32) for name, buffer in buffers.items()}
    return LucidrainsBuffers(cast, chain.t)


def _lucidrains_ddpm(chain: Chain, prediction: str, variance: str) -> Columns:
    if any(prev != t - 1 for t, prev in zip(chain.t, chain.prev, strict=True)):
        raise ValueError("timesteps: expected t -> t - 1 with host 'lucidrains', whose DDPM is not respaced")
    return _lucidrains(chain).ddpm(prediction, variance)


def _lucidrains_ddim(chain: Chain, prediction: str, eta: float, eps: str, clipped: bool) -> Columns:
    return _lucidrains(chain).ddim(chain.prev, prediction, eta, eps)


def _lucidrains_add_noise(chain: Chain) -> Columns:
    f = _lucidrains(chain)
    return _forward(f("sqrt_alphas_cumprod"), f("sqrt_one_minus_alphas_cumprod"))


def _alphas_or_final(alphas_cumprod: Tensor, steps: list[int], final: float | str) -> Tensor:
    """alpha_bar at `steps`, `final` (or alphas_cumprod[0] for "first") where a step is below 0."""
    end = alphas_cumprod[:1] if final == "first" else torch.full_like(alphas_cumprod[:1], float(final))
    index = [t if t >= 0 else len(alphas_cumprod) for t in steps]
    return torch.cat([alphas_cumprod, end])[torch.tensor(index, device=alphas_cumprod.device)]


class _Diffusers:
    """alpha_bar and 1 - alpha_bar of the two ends of each step, float32 from the float32 alphas_cumprod."""

    def __init__(self, chain: Chain, source: list[int], target: list[int]) -> None:
        alphas_cumprod = torch.from_numpy(chain.schedule.alphas_cumprod.copy()).float().to(chain.device)
        self.alpha = _alphas_or_final(alphas_cumprod, source, chain.final)
        self.alpha_prev = _alphas_or_final(alphas_cumprod, target, chain.final)
        self.beta = 1 - self.alpha
        self.beta_prev = 1 - self.alpha_prev

    def x0(self, prediction: str) -> Columns:
        if prediction == "x0":
            return _x0_output()
        if prediction == "v":
            return _x0_multiply(self.alpha**0.5, -(self.beta**0.5))
        return _x0_divide(-(self.beta**0.5), self.alpha**0.5)

    def eps(self, prediction: str, eps: str, clipped: bool) -> Columns:
        if eps == "raw" and prediction == "eps":
            return _eps_output()
        if eps == "raw" and prediction == "v":
            return Columns({"ex": self.beta**0.5, "em": self.alpha**0.5}, {"eps": "linear"})
        if eps == "raw" and clipped:
            # from the x0 before the clip, which is the model output
            values = {"ex": 1.0, "em": -(self.alpha**0.5), "gd": self.beta**0.5}
            return Columns(values, {"eps": "linear", "eps_divide": True})
        return _eps_rederived(1.0, self.alpha**0.5, self.beta**0.5)


def _diffusers_ddpm(chain: Chain, prediction: str, variance: str) -> Columns:
    f = _Diffusers(chain, chain.t, chain.prev)
    alpha = f.alpha / f.alpha_prev
    beta = 1 - alpha
    mean = _mean_through_x0((f.alpha_prev**0.5 * beta) / f.beta, alpha**0.5 * f.beta_prev / f.beta)
    small = torch.clamp(f.beta_prev / f.beta * beta, min=1e-20)
    not_last = _nonzero([t > 0 for t in chain.t], chain.device)
    if variance == "learned_plain":
        noise = _noise(not_last, "learned_plain")
    elif variance == "learned_range":
        noise = _noise(not_last, "learned_range", min_log=torch.log(small), max_log=torch.log(beta))
    elif variance == "fixed_small_log":
        noise = _noise(not_last * torch.exp(0.5 * torch.log(small)))
    elif variance == "fixed_large_log":
        # the codebase takes the square root of the logarithm and gets NaN
        noise = _noise(not_last * torch.exp(0.5 * torch.log(beta)))
    else:
        noise = _noise(not_last * (small if variance == "fixed_small" else beta) ** 0.5)
    return f.x0(prediction) | mean | noise


def _diffusers_ddim(chain: Chain, prediction: str, eta: float, eps: str, clipped: bool) -> Columns:
    f = _Diffusers(chain, chain.t, _stride_back(chain))
    std = eta * ((f.beta_prev / f.beta) * (1 - f.alpha / f.alpha_prev)) ** 0.5
    direction = _direction(f.alpha_prev**0.5, _at_least_0(1 - f.alpha_prev - std**2) ** 0.5)
    noise = _noise(std) if eta else _no_noise()
    return f.x0(prediction) | f.eps(prediction, eps, clipped) | direction | noise


def _diffusers_inversion(chain: Chain, prediction: str, clipped: bool) -> Columns:
    f = _Diffusers(chain, _stride_back(chain), chain.t)
    direction = _direction(f.alpha_prev**0.5, f.beta_prev**0.5)
    return f.x0(prediction) | f.eps(prediction, "raw", clipped) | direction | _no_noise()


def _diffusers_add_noise(chain: Chain) -> Columns:
    f = _Diffusers(chain, chain.t, chain.t)
    return _forward(f.alpha**0.5, f.beta**0.5)


def _stride_back(chain: Chain) -> list[int]:
    """The timestep stepped to: as given in pairs, else t - T//S, as the codebase has it for any list."""
    if chain.given == "pairs":
        return chain.prev
    stride = chain.schedule.num_timesteps // len(chain.t)
    return [t - stride for t in chain.t]


def _ermongroup_alphas(chain: Chain) -> tuple[Tensor, Tensor]:
    betas = torch.from_numpy(chain.schedule.betas.copy()).float().to(chain.device)
    cumulative = (1 - torch.nn.functional.pad(betas, (1, 0))).cumprod(dim=0)
    index = torch.tensor([chain.t, chain.prev], device=chain.device) + 1
    return cumulative[index[0]], cumulative[index[1]]


def _ermongroup_ddpm(chain: Chain, prediction: str, variance: str) -> Columns:
    at, atm1 = _ermongroup_alphas(chain)
    beta_t = 1 - at / atm1
    x0 = _x0_multiply((1.0 / at).sqrt(), -(1.0 / at - 1).sqrt())
    # the codebase divides the mean's sum by 1 - at; of the terms, a re-derived eps divides a sum with x0
    mean = _eps_rederived((1 - beta_t).sqrt() * (1 - atm1), -(atm1.sqrt() * beta_t), 1.0 - at)
    mean |= Columns({"ae": 1.0}, {"a0": False, "ae": True})
    not_zero = _nonzero([t != 0 for t in chain.t], chain.device)
    return x0 | mean | _noise(not_zero * torch.exp(0.5 * beta_t.log()))


def _ermongroup_ddim(chain: Chain, prediction: str, eta: float, eps: str, clipped: bool) -> Columns:
    at, at_next = _ermongroup_alphas(chain)
    c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
    c2 = _at_least_0((1 - at_next) - c1**2).sqrt()
    x0 = _x0_divide(-(1 - at).sqrt(), at.sqrt())
    return x0 | _eps_output() | _direction(at_next.sqrt(), c2) | (_noise(c1) if eta else _no_noise())


def _ermongroup_add_noise(chain: Chain) -> Columns:
    at, _ = _ermongroup_alphas(chain)
    return _forward(at.sqrt(), (1.0 - at).sqrt())


def compvis_ddim(alphas: Tensor, alphas_prev: Tensor, sigmas: Tensor, sqrt_one_minus_alphas: Tensor) -> Columns:
    """A DDIM step of CompVis' latent-diffusion from the float32 numbers [S] that it has of each step."""
    x0 = _x0_divide(-sqrt_one_minus_alphas, alphas.sqrt())
    direction = _direction(alphas_prev.sqrt(), _at_least_0(1.0 - alphas_prev - sigmas**2).sqrt())
    return x0 | _eps_output() | direction | (_noise(sigmas) if bool((sigmas != 0).any()) else _no_noise())


def compvis_encode(sqrt_alphas: Tensor, sqrt_one_minus_alphas: Tensor) -> Columns:
    """The forward process of CompVis' stochastic_encode from its float32 numbers [S]."""
    return _forward(sqrt_alphas, sqrt_one_minus_alphas)


def sprite_ddpm(b_t: Tensor, a_t: Tensor, ab_t: Tensor) -> Columns:
    """A step of the course "How Diffusion Models Work" from rows of its float32 tables [S]: the mean without an x0."""
    mean = {"ex": 1.0, "em": -((1 - a_t) / (1 - ab_t).sqrt()), "gd": a_t.sqrt(), "ae": 1.0}
    form = {"x0": "none", "a0": False, "eps": "linear", "eps_divide": True, "ae": True}
    return Columns(mean, form) | _noise(b_t.sqrt())


def sprite_ddim(ab: Tensor, ab_prev: Tensor) -> Columns:
    """A step of the course's fast sampler, float32 [S]. What it calls x0 lacks the factor 1 / sqrt(ab)."""
    x0 = _x0_multiply(1.0, -(1 - ab).sqrt())
    return x0 | _eps_output() | _direction(ab_prev.sqrt() / ab.sqrt(), (1 - ab_prev).sqrt()) | _no_noise()


HOSTS = {
    "openai": Host(
        ("eps", "x0", "x_prev"),
        ("fixed_small", "fixed_large", "learned", "learned_range"),
        ("rederived",),
        _openai_ddpm,
        _openai_ddim,
        _openai_add_noise,
        _openai_inversion,
    ),
    "lucidrains": Host(
        ("eps", "x0", "v"),
        ("fixed_small", "learned_range"),
        ("rederived", "raw"),
        _lucidrains_ddpm,
        _lucidrains_ddim,
        _lucidrains_add_noise,
    ),
    "diffusers": Host(
        ("eps", "x0", "v"),
        (
            "fixed_small",
            "fixed_small_log",
            "fixed_large",
            "fixed_large_log",
            "learned_plain",
            "learned_range",
        ),
        ("raw", "rederived"),
        _diffusers_ddpm,
        _diffusers_ddim,
        _diffusers_add_noise,
        _diffusers_inversion,
    ),
    "ermongroup": Host(("eps",), ("fixed_large",), ("raw",), _ermongroup_ddpm, _ermongroup_ddim, _ermongroup_add_noise),
}
