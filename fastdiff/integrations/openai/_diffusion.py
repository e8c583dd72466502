"""GaussianDiffusion and what belongs to it, but for the order of its arguments."""

from __future__ import annotations

import copyreg
import enum
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ... import schedules
from ...samplers import _progress_bar
from ...schedules import NoiseSchedule
from ._kept import (
    PREDICTIONS,
    VARIANCES,
    Function,
    Result,
    log_variance,
    name_of,
    sources_of,
    tables_of,
    values_of,
)
from ._steps import Steps, check_operands, check_output

_X0 = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")


class ModelMeanType(enum.Enum):
    """What a model predicts: x_{t-1}, x_0 or the noise."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of a step: a log-variance that the model gives, beta tilde, beta, or one between the two."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What a model is trained on: squared errors (and a bound for a learned variance), or the variational bound."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether it is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> NDArray[np.float64]:
    """The betas "linear" (Ho et al. 2020, scaled to any number of steps) or "cosine" (Nichol and Dhariwal 2021).

    Returns float64 [num_diffusion_timesteps]. ValueError for another name, or fewer steps than the schedule has.
    """
    if schedule_name == "linear":
        return schedules.linear_betas(num_diffusion_timesteps)
    if schedule_name == "cosine":
        return schedules.cosine_betas(num_diffusion_timesteps)
    raise ValueError(f"schedule_name: expected 'linear' or 'cosine', got {schedule_name!r}")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> NDArray[np.float64]:
    """The betas of a function that gives alpha_bar at a time in [0, 1], each at most max_beta.

    Returns float64 [num_diffusion_timesteps].
    """
    total = schedules.integer("num_diffusion_timesteps", num_diffusion_timesteps, 1)
    kept = [alpha_bar((i + 1) / total) / alpha_bar(i / total) for i in range(total)]
    return np.array([min(1 - part, max_beta) for part in kept])


def space_timesteps(num_timesteps: int, section_counts: str | Iterable[SupportsIndex]) -> set[int]:
    """The timesteps to keep of a longer chain: "ddimN", "a,b,c" or ints, steps per equal section.

    As `fastdiff.schedules.space_timesteps`, whose errors it has, but a set.
    """
    return set(schedules.space_timesteps(num_timesteps, section_counts))


class Diffusion(Steps):
    """The part of a GaussianDiffusion that the two codebases share.

    Args:
        betas: 1-D, in (0, 1].
        model_mean_type, model_var_type, loss_type: members of the enums above, or of any enum with their names.
        rescale_timesteps: whether the model is told times from 0 to 1000, as floats, whatever the number of steps.

    Attributes: those arguments, num_timesteps, and the tables of the betas as float64 arrays [T].

    TypeError or ValueError, naming the argument, for betas that are not such numbers and for unknown types.
    """

    alphas_cumprod: NDArray[np.float64]

    def __init__(
        self,
        *,
        betas: ArrayLike,
        model_mean_type: Any,
        model_var_type: Any,
        loss_type: Any,
        rescale_timesteps: bool = False,
    ) -> None:
        for name, value, known in (
            ("model_mean_type", model_mean_type, PREDICTIONS),
            ("model_var_type", model_var_type, VARIANCES),
            ("loss_type", loss_type, LossType.__members__),
        ):
            if name_of(value) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {name_of(value)!r}")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = NoiseSchedule.from_betas(betas).betas.copy()
        self.num_timesteps = len(self.betas)
        for name, table in tables_of(self.betas).items():
            setattr(self, name, table)

    @classmethod
    def _original(cls) -> type:
        return cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if not name.startswith("_fastdiff")}
        return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]

    def _column(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """One of the tables, or what is made of some, at the timesteps: float32, expanded to the shape of `like`.

        ValueError where the tables of the object have become others than those of its betas.
        """
        if torch.compiler.is_compiling():  # which keeps nothing
            values = torch.from_numpy(values_of(self, name)).to(t.device)
            return values[t].float().reshape(-1, *(1,) * (like.dim() - 1)).expand(like.shape)
        names = sources_of(name)
        kept = self._fastdiff_kept(names)
        reason = kept.why_not(names)
        if reason is not None:
            raise ValueError(f"{names[0]}: expected the tables of the betas, but {reason}")
        return kept.column(name, t, like).expand(like.shape)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of x_t given x_0, each of x_start's shape."""
        mean = self._column("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self._column("one_minus_alphas_cumprod", t, x_start)
        log = self._column("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand(x_start.shape), log.expand(x_start.shape)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            noise = torch.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise: expected x_start's shape {list(x_start.shape)}, got {list(noise.shape)}")
        signal, spread = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return self._column(signal, t, x_start) * x_start + self._column(spread, t, x_start) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and (clipped) log-variance of x_{t-1} given x_t and x_0 (Ho et al. 2020, eq. 7)."""
        if x_start.shape != x_t.shape:
            raise ValueError(f"x_start: expected x_t's shape {list(x_t.shape)}, got {list(x_start.shape)}")
        coef1, coef2 = (self._column(name, t, x_t) for name in ("posterior_mean_coef1", "posterior_mean_coef2"))
        variance = self._column("posterior_variance", t, x_t)
        log = self._column("posterior_log_variance_clipped", t, x_t)
        return coef1 * x_start + coef2 * x_t, variance.expand(x_t.shape), log.expand(x_t.shape)

    def p_mean_variance(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Result:
        """What a model says of x_{t-1}: "mean", "variance", "log_variance", and "pred_xstart".

        Args:
            model: called as model(x, times, **model_kwargs); 2C channels for a learned variance.
            x: [B, C, ...].
            t: integer tensor [B], in [0, num_timesteps).
            clip_denoised: clip the predicted x_0 to [-1, 1].
            denoised_fn: what is done to the predicted x_0 before.
        """
        check_operands(x, t)
        prediction, variance_type = PREDICTIONS[name_of(self.model_mean_type)], VARIANCES[name_of(self.model_var_type)]
        learned = variance_type.startswith("learned")
        output = model(x, self._scale_timesteps(t), **({} if model_kwargs is None else model_kwargs))
        output = output[0] if isinstance(output, tuple) else output
        check_output(output, x, learned)
        variance_output: Tensor | None = None
        if learned:
            output, variance_output = torch.split(output, x.shape[1], dim=1)
        log, variance = log_variance(variance_type, variance_output, self._column, t, x)
        if prediction == "x0":
            x0 = output
        elif prediction == "x_prev":
            x0 = self._predict_xstart_from_xprev(x, t, output)
        else:
            x0 = self._predict_xstart_from_eps(x, t, output)
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        mean = output if prediction == "x_prev" else self.q_posterior_mean_variance(x0, x, t)[0]
        return {
            "mean": mean,
            "variance": variance.expand(x.shape),
            "log_variance": log.expand(x.shape),
            "pred_xstart": x0,
        }

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        recip, recipm1 = (self._column(name, t, x_t) for name in _X0)
        return recip * x_t - recipm1 * eps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        recip, ratio = (self._column(name, t, x_t) for name in ("recip_mean_coef1", "mean_coef2_by_coef1"))
        return recip * xprev - ratio * x_t

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        recip, recipm1 = (self._column(name, t, x_t) for name in _X0)
        return (recip * x_t - pred_xstart) / recipm1

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def condition_mean(
        self,
        cond_fn: Function,
        p_mean_var: Result,
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """The mean moved along the gradient that cond_fn(x, times, **model_kwargs) gives at x, in float32."""
        gradient = cond_fn(x, self._scale_timesteps(t), **({} if model_kwargs is None else model_kwargs))
        moved: Tensor = p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()
        return moved

    def condition_score(
        self,
        cond_fn: Function,
        p_mean_var: Result,
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Result:
        """What p_mean_variance gives, with cond_fn's gradient added to the score; x_0 is not clipped again."""
        alpha_bar = self._column("alphas_cumprod", t, x)
        gradient = cond_fn(x, self._scale_timesteps(t), **({} if model_kwargs is None else model_kwargs))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"]) - (1 - alpha_bar).sqrt() * gradient
        x0 = self._predict_xstart_from_eps(x, t, eps)
        return p_mean_var | {"pred_xstart": x0, "mean": self.q_posterior_mean_variance(x0, x, t)[0]}

    # The steps by the functions above: those of a subclass that replaces one of them, and under torch.compile.

    def p_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        cond_fn: Function | None = None,
    ) -> Result:
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        std = _not_first(t, x) * torch.exp(0.5 * out["log_variance"])
        return {"sample": mean + std * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        cond_fn: Function | None = None,
    ) -> Result:
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        x0 = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, x0)
        alpha_bar, previous = (self._column(name, t, x) for name in ("alphas_cumprod", "alphas_cumprod_prev"))
        sigma = eta * torch.sqrt((1 - previous) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / previous)
        noise = torch.randn_like(x)
        mean = x0 * torch.sqrt(previous) + torch.sqrt((1 - previous - sigma**2).clamp(min=0)) * eps
        return {"sample": mean + _not_first(t, x) * sigma * noise, "pred_xstart": x0}

    def ddim_reverse_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Result:
        if eta != 0:
            raise ValueError(f"eta: expected 0, there is a way back on a path without noise only, got {eta}")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        x0 = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, x0)
        following = self._column("alphas_cumprod_next", t, x)
        return {"sample": x0 * torch.sqrt(following) + torch.sqrt(1 - following) * eps, "pred_xstart": x0}

    def _chain(
        self,
        step: Function,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        **options: Any,
    ) -> Iterator[Result]:
        """The steps of a chain from x_T, without gradients."""
        if not isinstance(shape, (tuple, list)):
            raise TypeError(f"shape: expected a tuple or a list, got {type(shape).__name__}")
        if device is None:
            device = _device_of(model, noise)
        image = torch.randn(*shape, device=device) if noise is None else noise
        indices: Iterable[int] = range(self.num_timesteps - 1, -1, -1)
        if progress:
            indices = _progress_bar(indices)
        tables = self._fastdiff.tables
        for index in indices:
            t = torch.full((shape[0],), index, device=device)
            with torch.no_grad():
                tables["loop"] = t, index  # so that nobody has to look at t
                out = step(model, image, t, **options)
                yield out
                image = out["sample"]

    def _vb_terms_bpd(
        self,
        model: Function,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Result:
        """A term of the variational bound in bits, [B] ("output"), and the predicted x_0 ("pred_xstart")."""
        mean, _, log = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        divergence = _mean_flat(_normal_kl(mean, log, out["mean"], out["log_variance"])) / np.log(2.0)
        likelihood = _discretized_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])
        decoder = _mean_flat(-likelihood) / np.log(2.0)
        return {"output": torch.where(t == 0, decoder, divergence), "pred_xstart": out["pred_xstart"]}

    def training_losses(
        self,
        model: Function,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> Result:
        """The losses of a timestep of each sample: "loss" [B], and "mse" and "vb" where there are such terms.

        The variance of a learned variance is trained by the variational bound, which does not reach the mean
        (Nichol and Dhariwal 2021, section 3.1).
        """
        kwargs = {} if model_kwargs is None else model_kwargs
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        loss_type, prediction = name_of(self.loss_type), PREDICTIONS[name_of(self.model_mean_type)]
        learned = name_of(self.model_var_type).startswith("LEARNED")
        if loss_type in ("KL", "RESCALED_KL"):
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=kwargs)["output"]
            return {"loss": loss * self.num_timesteps if loss_type == "RESCALED_KL" else loss}
        if loss_type not in ("MSE", "RESCALED_MSE"):
            raise ValueError(f"loss_type: expected one of {', '.join(LossType.__members__)}, got {loss_type!r}")

        output = model(x_t, self._scale_timesteps(t), **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        check_output(output, x_t, learned)
        terms: Result = {}
        if learned:
            output, variance_output = torch.split(output, x_t.shape[1], dim=1)
            frozen = torch.cat([output.detach(), variance_output], dim=1)
            bound = self._vb_terms_bpd(lambda *args: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            # beside a squared error the bound is a thousandth of its sum over the steps
            terms["vb"] = bound * (self.num_timesteps / 1000.0) if loss_type == "RESCALED_MSE" else bound
        if prediction == "x_prev":
            target = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        else:
            target = x_start if prediction == "x0" else noise
        terms["mse"] = _mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """The divergence of x_T from the normal distribution, in bits, [B]."""
        t = torch.full(x_start.shape[:1], self.num_timesteps - 1, device=x_start.device)
        mean, _, log = self.q_mean_variance(x_start, t)
        nothing = torch.zeros((), device=mean.device, dtype=mean.dtype)
        return _mean_flat(_normal_kl(mean, log, 0.0, nothing)) / np.log(2.0)

    def calc_bpd_loop(
        self,
        model: Function,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Result:
        """The variational bound in bits per dimension: "total_bpd" and "prior_bpd" [B]; "vb", and the errors of the
        predicted x_0 ("xstart_mse") and noise ("mse"), [B, T], the last timestep first."""
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for index in range(self.num_timesteps - 1, -1, -1):
            t = torch.full(x_start.shape[:1], index, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(_mean_flat((out["pred_xstart"] - x_start) ** 2))
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["mse"].append(_mean_flat((eps - noise) ** 2))
        found = {name: torch.stack(terms, dim=1) for name, terms in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": found["vb"].sum(dim=1) + prior, "prior_bpd": prior, **found}


class Spaced(Diffusion):
    """The part of a SpacedDiffusion that the two codebases share: a diffusion over some timesteps of a longer one.

    Args:
        use_timesteps: those that are kept.
        kwargs: those of the longer diffusion.

    Attributes: also use_timesteps, timestep_map (of the steps here to those there), original_num_steps.

    Errors as of GaussianDiffusion; ValueError where no timestep is kept.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs: Any) -> None:
        if "betas" not in kwargs:
            raise TypeError("betas: expected a 1-D sequence of those of the longer diffusion, got none")
        schedule = NoiseSchedule.from_betas(kwargs["betas"])
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = [i for i in range(len(schedule)) if i in self.use_timesteps]
        self.original_num_steps = len(schedule)
        if not self.timestep_map:
            raise ValueError(f"use_timesteps: expected some in [0, {len(schedule)}), got {sorted(self.use_timesteps)}")
        super().__init__(**kwargs | {"betas": schedule.respace(self.timestep_map)[0].betas})

    def p_mean_variance(self, model: Function, *args: Any, **kwargs: Any) -> Result:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Function, *args: Any, **kwargs: Any) -> Result:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Function, *args: Any, **kwargs: Any) -> Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Function, *args: Any, **kwargs: Any) -> Result:
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model: Function) -> WrappedModel:
        if isinstance(model, WrappedModel):
            return model
        return WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # which the wrapped model does


class WrappedModel:
    """A model of a longer diffusion, called with the timesteps of a respaced one."""

    def __init__(
        self, model: Function, timestep_map: list[int], rescale_timesteps: bool, original_num_steps: int
    ) -> None:
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        times = torch.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)[ts]
        if self.rescale_timesteps:
            times = times.float() * (1000.0 / self.original_num_steps)
        return self.model(x, times, **kwargs)


def _not_first(t: Tensor, x: Tensor) -> Tensor:
    return (t != 0).float().reshape(-1, *(1,) * (x.dim() - 1))


def _device_of(model: Any, noise: Tensor | None) -> torch.device:
    parameters = getattr(model, "parameters", None)
    found = next(parameters(), None) if callable(parameters) else None
    if found is not None:
        return found.device
    return torch.get_default_device() if noise is None else noise.device


def _mean_flat(tensor: Tensor) -> Tensor:
    return tensor.mean(dim=list(range(1, tensor.dim())))


def _normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor) -> Tensor:
    """The divergence of a Gaussian from another, in nats."""
    spread = -1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2)
    return 0.5 * (spread + ((mean1 - mean2) ** 2) * torch.exp(-logvar2))


def _discretized_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """The log-probability of 8-bit pixels, scaled to [-1, 1], under a Gaussian (Ho et al. 2020, eq. 13), in nats."""
    centered, inverse = x - means, torch.exp(-log_scales)
    upper = _normal_cdf(inverse * (centered + 1.0 / 255.0))
    lower = _normal_cdf(inverse * (centered - 1.0 / 255.0))

    def log(probability: Tensor) -> Tensor:
        return torch.log(probability.clamp(min=1e-12))

    # the outermost pixels have all that lies beyond them
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1.0 - lower), log(upper - lower)))


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation by tanh that the codebases have (Page 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))
