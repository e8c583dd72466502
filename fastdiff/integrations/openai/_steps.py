"""The steps of a GaussianDiffusion, fused: what takes their place on an object, and on the classes of this package.

An object is judged by what it computes (`Steps._probe`), never by where its class comes from. Its enums are compared
by name, its tables are those of its own betas, and it is asked for everything else when a step is made.
"""

from __future__ import annotations

import copy
import functools
import inspect
import numbers
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import ops, torch_stream
from ...schedules import NoiseSchedule
from ...tables import (
    COLUMN,
    Structure,
    Table,
    add_noise_table,
    ddim_inversion_table,
    ddim_table,
    ddpm_table,
    fixed_table,
    x0_table,
)
from .._host import State, Switched, step_seeds

Arrays = dict[str, NDArray[np.float64]]
Result = dict[str, Tensor]
Function = Callable[..., Any]

PREDICTIONS = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "x_prev"}
VARIANCES = {name: name.lower() for name in ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE")}

# what the object is asked to do, and the functions of its own that this depends on
STEPS = ("p_sample", "ddim_sample", "ddim_reverse_sample")
_HOOKS = (
    "p_mean_variance",
    "q_posterior_mean_variance",
    "condition_mean",
    "condition_score",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
    "_scale_timesteps",
    "_wrap_model",
)
# the tables of the object that each depends on
_MEAN = ("posterior_mean_coef1", "posterior_mean_coef2")
_X0 = ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
_VARIANCE = ("posterior_variance", "posterior_log_variance_clipped")
_READ = {
    "p_sample": ("betas", *_X0, *_MEAN, *_VARIANCE),
    "ddim_sample": ("betas", *_X0, *_MEAN, "alphas_cumprod", "alphas_cumprod_prev"),
    "ddim_reverse_sample": ("betas", *_X0, *_MEAN, "alphas_cumprod", "alphas_cumprod_next"),
    "q_sample": ("betas", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
}
_ATTRIBUTES = {"num_timesteps", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps", "timestep_map"}
_ATTRIBUTES |= {"use_timesteps", "original_num_steps", "log_one_minus_alphas_cumprod", *_HOOKS, *_READ}
_ATTRIBUTES |= {name for names in _READ.values() for name in names}
_KEYS = {"mean", "variance", "log_variance", "pred_xstart", "sample", "extra", *PREDICTIONS, *VARIANCES}
_KEYS |= {"clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "eta"}
_MAX_TABLES = 64
_MAX_TRIED = 1000  # timesteps of an object that is compared
_HALF = (torch.float16, torch.bfloat16)

_F = TypeVar("_F", bound=Function)


def tables_of(betas: NDArray[np.float64]) -> Arrays:
    """What a GaussianDiffusion keeps beside its betas, float64 [T] each.

    A chain of one step has no second variance to take the logarithm of for the first: it takes beta's.
    """
    with np.errstate(divide="ignore"):
        alphas_cumprod = np.cumprod(1.0 - betas)
        previous = np.append(1.0, alphas_cumprod[:-1])
        remains = 1.0 - alphas_cumprod
        variance = betas * (1.0 - previous) / remains
        second = variance[1] if len(betas) > 1 else betas[0]
        return {
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": previous,
            "alphas_cumprod_next": np.append(alphas_cumprod[1:], 0.0),
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(remains),
            "log_one_minus_alphas_cumprod": np.log(remains),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / alphas_cumprod - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.append(second, variance[1:])),
            "posterior_mean_coef1": betas * np.sqrt(previous) / remains,
            "posterior_mean_coef2": (1.0 - previous) * np.sqrt(1.0 - betas) / remains,
        }


def _large(diffusion: Any) -> NDArray[np.float64]:
    first = diffusion.posterior_variance[1:2] if len(diffusion.betas) > 1 else diffusion.betas[:1]
    return np.append(first, diffusion.betas[1:])


# what is made of the tables, and of which
_DERIVED: dict[str, tuple[tuple[str, ...], Callable[[Any], NDArray[np.float64]]]] = {
    "log_betas": (("betas",), lambda d: np.log(d.betas)),
    "large_variance": (("betas", "posterior_variance"), _large),
    "large_log_variance": (("betas", "posterior_variance"), lambda d: np.log(_large(d))),
    "one_minus_alphas_cumprod": (("alphas_cumprod",), lambda d: 1.0 - d.alphas_cumprod),
    "recip_mean_coef1": (_MEAN, lambda d: 1.0 / d.posterior_mean_coef1),
    "mean_coef2_by_coef1": (_MEAN, lambda d: d.posterior_mean_coef2 / d.posterior_mean_coef1),
}


def sources_of(column: str) -> tuple[str, ...]:
    """The tables of an object that a column is made of."""
    return _DERIVED[column][0] if column in _DERIVED else (column,)


def values_of(diffusion: Any, column: str) -> NDArray[np.float64]:
    """A table of an object, or what is made of some, float64 [T]."""
    found: NDArray[np.float64] = _DERIVED[column][1](diffusion) if column in _DERIVED else getattr(diffusion, column)
    return found


class Kept:
    """The tables of steps, good for an object as it was: its arrays, types and timesteps."""

    def __init__(self, diffusion: Any) -> None:
        self.mean_type, self.var_type = diffusion.model_mean_type, diffusion.model_var_type
        self.prediction = PREDICTIONS.get(name_of(self.mean_type))
        self.variance = VARIANCES.get(name_of(self.var_type))
        self.timestep_map = list(getattr(diffusion, "timestep_map", ()))
        self._arrays = {name: (value := getattr(diffusion, name, None), _bytes(value)) for name in _ARRAYS}
        self._strange: dict[str, str] = {}
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._columns: dict[tuple[str, torch.device], Tensor] = {}
        self._maps: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        betas = diffusion.betas
        try:
            if not isinstance(betas, np.ndarray) or betas.dtype != np.float64:
                raise ValueError("betas: expected a float64 array")
            self.schedule = NoiseSchedule.from_betas(betas)
        except ValueError as error:
            self._strange = dict.fromkeys(_ARRAYS, str(error))
            return
        self._tables_of_betas = types.SimpleNamespace(betas=betas.copy(), **tables_of(betas))
        for name in _ARRAYS:
            value, expected = self._arrays[name][0], getattr(self._tables_of_betas, name)
            if len(betas) == 1 and name == "posterior_log_variance_clipped":
                continue  # which has no value there
            if not isinstance(value, np.ndarray) or value.tobytes() != expected.tobytes():
                self._strange[name] = f"{name} is not that of its betas"

    def is_good(self, diffusion: Any, names: tuple[str, ...]) -> bool:
        """Whether these tables of the object are still what this was made of, arrays changed in place included."""
        if diffusion.model_mean_type is not self.mean_type or diffusion.model_var_type is not self.var_type:
            return False
        kept = self._arrays
        for name in names:
            value, data = kept[name]
            if getattr(diffusion, name, None) is not value or _bytes(value) != data:
                return False
        return True

    def why_not(self, names: tuple[str, ...]) -> str | None:
        """Why nothing can be fused with these: types that are not OpenAI's, tables that are not those of the betas."""
        if self.prediction is None:
            return f"model_mean_type {name_of(self.mean_type)!r}"
        if self.variance is None:
            return f"model_var_type {name_of(self.var_type)!r}"
        if self._strange:
            return next((self._strange[name] for name in names if name in self._strange), None)
        return None

    @property
    def learned(self) -> bool:
        return self.variance in ("learned", "learned_range")

    def column(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """A table at the timesteps, float32 [B, 1, ...]."""
        key = name, t.device
        found = self._columns.get(key)
        if found is None:
            with torch.inference_mode(False):
                values = torch.from_numpy(values_of(self._tables_of_betas, name))
                found = self._columns[key] = values.to(t.device).float()
        return found.index_select(0, t).reshape(-1, *(1,) * (like.dim() - 1))

    def model_time(self, timestep_map: list[int], t: Tensor) -> Tensor:
        """The timesteps before the respacing."""
        if timestep_map != self.timestep_map:
            self.timestep_map = list(timestep_map)
            self._maps.clear()
            self._tables.clear()
        key = t.device, t.dtype
        found = self._maps.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = self._maps[key] = torch.tensor(timestep_map, device=t.device, dtype=t.dtype)
        return found.index_select(0, t)

    def table(
        self, method: str, x: Tensor, prediction: str, clip: bool, noise: str = "none", eta: float = 0.0
    ) -> Table:
        """noise: "none"; "own", as the object has it; "given", of a learned variance, already multiplied by its std."""
        key = method, prediction, clip, noise, eta, x.device
        found = self._tables.get(key)
        if found is None:
            if len(self._tables) >= _MAX_TABLES:
                del self._tables[next(iter(self._tables))]
            found = self._tables[key] = self._make(method, x.device, prediction, clip, noise, eta)
        return found

    def _make(self, method: str, device: torch.device, prediction: str, clip: bool, noise: str, eta: float) -> Table:
        options: dict[str, Any] = {
            "prediction": prediction,
            "clip": 1.0 if clip else None,
            "host": "openai",
            "device": device,
        }
        if method == "q_sample":
            return add_noise_table(self.schedule, host="openai", device=device)
        if method == "p_sample":
            assert self.variance is not None
            variance = "fixed_small" if noise == "none" else self.variance
            table = ddpm_table(self.schedule, variance=variance, noise=noise != "none", **options)
        elif method == "ddim_sample":
            table = ddim_table(self.schedule, eta=eta, **options)
        elif method == "ddim_reverse_sample":
            table = ddim_inversion_table(self.schedule, **options)
        else:  # the eps of a step
            return _eps_of(ddim_table(self.schedule, **options))
        if len(self.timestep_map) == len(table):
            # the noise is that of the timestep before the respacing
            rows = table.rows
            rows[:, COLUMN["t"]] = torch.tensor(self.timestep_map, dtype=torch.float64)[list(table.timesteps)]
            table = Table(rows, table.structure, table.timesteps, name=table.name, host=table.host)
        return fixed_table(table) if noise == "given" else table


_ARRAYS = tuple(dict.fromkeys((*(name for names in _READ.values() for name in names), "log_one_minus_alphas_cumprod")))


def _bytes(value: Any) -> Any:
    return value.tobytes() if type(value) is np.ndarray else None


def _eps_of(table: Table) -> Table:
    """A table whose x' is the eps that another derives from its clipped x0."""
    rows = table.rows
    rows[:, COLUMN["ae"]] = 1.0
    structure = table.structure
    form = Structure(
        x0=structure.x0, clip=structure.clip, eps=structure.eps, eps_divide=structure.eps_divide, a0=False, ae=True
    )
    return Table(rows, form, table.timesteps, name="eps", host=table.host)


def name_of(member: Any) -> str:
    """What a member of an enum is called, of whichever codebase's enum."""
    return str(getattr(member, "name", member))


class Original(NamedTuple):
    """Says that a step is left to the original code, with this model and denoised_fn, which may know their result."""

    model: Function
    denoised_fn: Function | None


class Steps(Switched):
    """The fused steps, whose signatures are those of the classes below."""

    def _fastdiff_kept(self, names: tuple[str, ...]) -> Kept:
        """The tables of the object as it is now, where these of its own are looked at."""
        tables = self._fastdiff.tables
        kept: Kept | None = tables.get("kept")
        if kept is None or not kept.is_good(self, names):
            kept = tables["kept"] = Kept(self)
        return kept

    def _fastdiff_why_not(self, method: str, kept: Kept) -> str | None:
        """Why a call of this method is left to the original code."""
        state = self._fastdiff
        if state.disabled is not None:
            return state.disabled
        probed = state.tables.get("probed")
        if probed is None:
            probed = state.tables["probed"] = _probe(self)
        if method in probed.reasons:
            reason: str = probed.reasons[method]
            return reason
        if not _HOOK_SET.isdisjoint(self.__dict__):
            return f"{min(_HOOK_SET & self.__dict__.keys())} of the object was replaced"
        return kept.why_not(_READ[method])

    def _probe(self) -> str | None:
        # kept beside the tables, so that a copy, which may be changed, is tried again
        state = self._fastdiff
        probed = state.tables["probed"] = _probe(self)
        for method in STEPS:
            if method in probed.reasons and not any(isinstance(self, face) for face in _FACES[method]):
                # nothing of fastdiff is called there, to say so later
                state.fall_back(probed.reasons[method])
                state.kept[probed.reasons[method]] = 0
        return None

    def _fastdiff_call(self, function: Function, x: Tensor, t: Tensor, model_kwargs: Any, kept: Kept) -> Any:
        """A model, or the gradient of a classifier, as the object calls it: its time respaced and rescaled."""
        scale = getattr(self, "_scale_timesteps", None)
        if scale is not None:
            t = scale(t)
        wrap = getattr(self, "_wrap_model", None)
        if wrap is not None:
            wrapped = wrap(function)
            if getattr(wrapped, "model", None) is function and hasattr(wrapped, "timestep_map"):
                # what wrapped(x, t) does, without a copy of the map to the device
                t = kept.model_time(wrapped.timestep_map, t)
                if getattr(wrapped, "rescale_timesteps", False):
                    t = t.float() * (1000.0 / wrapped.original_num_steps)
            else:
                function = wrapped
        return function(x, t, **({} if model_kwargs is None else model_kwargs))

    def _fastdiff_step(
        self,
        method: str,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Function | None,
        cond_fn: Function | None,
        model_kwargs: dict[str, Any] | None,
        eta: float = 0.0,
    ) -> Result | Original:
        """A step of one of STEPS; `Original` where it is not to be fused."""
        if torch.compiler.is_compiling():
            return Original(model, denoised_fn)  # what is traced is fused by the compiler
        state = self._fastdiff
        kept = self._fastdiff_kept(_READ[method])
        reason = self._fastdiff_why_not(method, kept)
        if reason is None and not (isinstance(eta, numbers.Real) and 0 <= eta <= 1):
            reason = f"eta={eta!r}, which is not a number in [0, 1]"
        if reason is not None:
            state.fall_back(reason)
            return Original(model, denoised_fn)
        check_operands(x, t)
        given = self._fastdiff_call(model, x, t, model_kwargs, kept)
        output = given[0] if isinstance(given, tuple) else given
        check_output(output, x, kept.learned)
        if not _promotes(x, output):
            state.fall_back(f"a model output of {output.dtype} beside x of {x.dtype}")
            return Original(lambda *args, **kwargs: given, denoised_fn)
        call = _Call(self, state, kept, method, x, t, model_kwargs, bool(clip_denoised), cond_fn, float(eta))
        changed: Tensor | None = None
        if denoised_fn is not None:
            changed = call.denoised(output, denoised_fn)
            if not _promotes(call.state_x, changed):
                state.fall_back(f"a denoised_fn that gives {changed.dtype} beside x of {x.dtype}")
                return Original(lambda *args, **kwargs: given, lambda x0: changed)
        found = call.step(output, changed)
        state.fused += 1
        return found


class _Call:
    """One fused step, but for the model output."""

    def __init__(
        self,
        diffusion: Steps,
        state: State,
        kept: Kept,
        method: str,
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None,
        clip: bool,
        cond_fn: Function | None,
        eta: float,
    ) -> None:
        self.diffusion, self.state, self.kept, self.method, self.eta = diffusion, state, kept, method, eta
        self.x, self.t, self.model_kwargs = x, t, model_kwargs
        self.clip, self.cond_fn = clip, cond_fn
        # dimensioned float32 coefficients make float32 of a half state
        self.state_x = x.float() if x.dtype in _HALF else x
        loop = state.tables.get("loop")
        self.where: dict[str, Any] = {"backend": state.options.backend}
        if loop is not None and loop[0] is t:
            self.t_or_none: Tensor | None = None
            self.of_row = loop[1]
        else:
            self.t_or_none, self.of_row = t, None

    def denoised(self, output: Tensor, denoised_fn: Function) -> Tensor:
        """The predicted x0 as the function makes it. TypeError where that is no tensor of its shape."""
        prediction, x0 = self.kept.prediction, output[:, : self.x.shape[1]]
        assert prediction is not None
        if prediction != "x0":
            x0 = self.apply(x0_table(self.table(prediction, False)), x0)
        changed = denoised_fn(x0)
        if not isinstance(changed, Tensor) or changed.shape != self.x.shape:
            got = f"{changed.dtype} {list(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
            raise TypeError(f"denoised_fn: expected {x0.dtype} {list(x0.shape)} from it, as it was given, got {got}")
        return changed

    def step(self, output: Tensor, x0_given: Tensor | None) -> Result:
        """The step from a model output, or from the predicted x0 that a denoised_fn has made of it."""
        kept, channels = self.kept, self.x.shape[1]
        prediction = kept.prediction
        assert prediction is not None
        mean_output, variance_output = output, None
        if kept.learned:
            mean_output, variance_output = output[:, :channels], output[:, channels:]
        # operations lay their result out as their first operand
        like = self.x if prediction == "eps" else mean_output
        pred_xstart: Tensor | None = None
        clip = self.clip
        if x0_given is not None:
            pred_xstart = x0_given.clamp(-1, 1) if clip else x0_given
            if prediction != "x_prev" or self.method != "p_sample":
                prediction, mean_output, clip = "x0", pred_xstart, False
        if self.method == "p_sample":
            sample, x0 = self.ancestral(prediction, mean_output, variance_output, clip)
        else:
            if self.cond_fn is not None:
                prediction, mean_output, clip = "eps", self.conditioned_eps(prediction, mean_output, clip), False
                like, pred_xstart = self.x, None
            sample, x0 = self.deterministic(prediction, mean_output, clip)
        if pred_xstart is None:
            pred_xstart = x0.to(mean_output.dtype) if prediction == "x0" else x0
        if self.state.tables["probed"].dense:
            # there a model output is the first operand only where it is the mean, or the x0 of DDIM
            first = "x_prev" if self.method == "p_sample" else "x0"
            if kept.prediction != first or (first == "x0" and self.cond_fn is not None):
                return {"sample": sample.contiguous(), "pred_xstart": pred_xstart.contiguous()}
        return {"sample": _laid_out_as(like, sample), "pred_xstart": _laid_out_as(like, pred_xstart)}

    def ancestral(
        self, prediction: str, mean_output: Tensor, variance_output: Tensor | None, clip: bool
    ) -> tuple[Tensor, Tensor]:
        kept, one_step = self.kept, len(self.kept.schedule) == 1
        x0: Tensor | None = None
        if self.cond_fn is not None:
            mean, x0 = self.apply_with_x0(self.table(prediction, clip), mean_output)
        drawn: dict[str, Any] = {}
        if self.state.options.noise == "torch":
            drawn = self.drawn(in_kernel=self.cond_fn is None and not kept.learned and not one_step)
        if self.cond_fn is not None:
            gradient = self.gradient()
            variance = self.log_variance(variance_output)[1]
            shifted = mean.float() + variance * gradient.float()
            prediction, clip, mean_output = "x_prev", False, shifted.to(self.state_x.dtype)
        if one_step:
            sample, own = self.apply_with_x0(self.table(prediction, clip), mean_output)
        elif not drawn:
            if variance_output is not None:
                mean_output = torch.cat([mean_output, variance_output.to(mean_output.dtype)], dim=1)
            table = self.table(prediction, clip, "own")
            sample, own = self.apply_with_x0(table, mean_output, seeds=self.seeds())
        elif kept.learned:
            # the exponential is torch's, as the kernel's has other bits
            std = torch.exp(0.5 * self.log_variance(variance_output)[0])
            given = std.to(self.state_x.dtype) * drawn["noise"]
            sample, own = self.apply_with_x0(self.table(prediction, clip, "given"), mean_output, noise=given)
        else:
            sample, own = self.apply_with_x0(self.table(prediction, clip, "own"), mean_output, **drawn)
        return sample, own if x0 is None else x0

    def deterministic(self, prediction: str, mean_output: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
        """DDIM, forward or in reverse, with the noise of its eta."""
        given: dict[str, Any] = {}
        if self.method == "ddim_sample":
            if self.state.options.noise == "torch":
                drawn = self.drawn(in_kernel=True, used=self.eta != 0)
                given = drawn if self.eta else {}
            elif self.eta:
                given = {"seeds": self.seeds()}
        return self.apply_with_x0(self.table(prediction, clip), mean_output, **given)

    def drawn(self, *, in_kernel: bool, used: bool = True) -> dict[str, Any]:
        """The noise that torch's generator gives next, or that generator, where a kernel can draw it itself."""
        x = self.x
        if in_kernel and x.is_cuda and x.dtype == torch.float32 and x.is_contiguous():
            generator = torch.cuda.default_generators[x.get_device()]
            if used:
                return {"generator": generator}
            if torch_stream.available(generator, x):
                torch_stream.take(generator, x)  # which moves it
                return {}
        noise = torch.randn_like(x)
        return {"noise": noise if x is self.state_x else noise.to(self.state_x.dtype)}

    def conditioned_eps(self, prediction: str, mean_output: Tensor, clip: bool) -> Tensor:
        """eps of the score that the gradient of a classifier is added to (Song et al. 2021; guided-diffusion)."""
        eps = self.apply(self.kept.table("eps", self.x, prediction, clip), mean_output)
        noise_of_alpha_bar = (1 - self.kept.column("alphas_cumprod", self.t, self.x)).sqrt()
        return (eps - noise_of_alpha_bar * self.gradient()).to(self.state_x.dtype)

    def gradient(self) -> Tensor:
        assert self.cond_fn is not None
        found = self.diffusion._fastdiff_call(self.cond_fn, self.x, self.t, self.model_kwargs, self.kept)
        if not isinstance(found, Tensor):
            raise TypeError(f"cond_fn: expected a tensor from it, got {type(found).__name__}")
        return found

    def log_variance(self, variance_output: Tensor | None) -> tuple[Tensor, Tensor]:
        """The log-variance and the variance of a step."""
        return log_variance(self.kept.variance, variance_output, self.kept.column, self.t, self.x)

    def table(self, prediction: str, clip: bool, noise: str = "none") -> Table:
        return self.kept.table(self.method, self.x, prediction, clip, noise, self.eta)

    def seeds(self) -> int | Tensor:
        return step_seeds(self.state.options, None, self.x.shape[0], self.x.device)

    def _row(self, table: Table) -> int | None:
        return None if self.of_row is None else table.rows_of_t[self.of_row]

    def apply(self, table: Table, model_output: Tensor) -> Tensor:
        return ops.step(table, model_output, self.t_or_none, self.state_x, row=self._row(table), **self.where)

    def apply_with_x0(self, table: Table, model_output: Tensor, **noise: Any) -> tuple[Tensor, Tensor]:
        t, row = self.t_or_none, self._row(table)
        if "generator" in noise:
            t, row = self.t, None  # with a row that adds no noise nothing would be drawn
        return ops.step_with_x0(table, model_output, t, self.state_x, row=row, **self.where, **noise)


Column = Callable[[str, Tensor, Tensor], Tensor]


def log_variance(
    variance: str | None, variance_output: Tensor | None, column: Column, t: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The log-variance and the variance of a step, [B, 1, ...] where they are not learned."""
    if variance_output is None:
        if variance == "fixed_large":
            return column("large_log_variance", t, x), column("large_variance", t, x)
        return column("posterior_log_variance_clipped", t, x), column("posterior_variance", t, x)
    log = variance_output
    if variance == "learned_range":
        fraction = (variance_output + 1) / 2
        largest = column("log_betas", t, x)
        log = fraction * largest + (1 - fraction) * column("posterior_log_variance_clipped", t, x)
    return log, torch.exp(log)


def check_operands(x: Any, t: Any) -> None:
    """TypeError or ValueError for a state or timesteps that no step can be made of."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x: expected [batch, channels, ...], got shape {list(x.shape)}")
    if not isinstance(t, Tensor):
        raise TypeError(f"t: expected an integer tensor [{x.shape[0]}], got {type(t).__name__}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t: expected shape [{x.shape[0]}], a timestep for each sample, got {list(t.shape)}")


def check_output(output: Any, x: Tensor, learned: bool) -> None:
    """TypeError or ValueError for what a model may not return."""
    if not isinstance(output, Tensor):
        raise TypeError(f"model: expected a tensor from it, got {type(output).__name__}")
    expected = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if learned else x.shape
    if output.shape != expected:
        half = ", half of the channels for the variance" if learned else ""
        raise ValueError(f"model: expected shape {list(expected)} from it{half}, got {list(output.shape)}")


def _promotes(x: Tensor, output: Tensor) -> bool:
    """Whether a step in float32, or in float64 where x is, is what torch makes of them."""
    if x.dtype == torch.float64 or not output.is_floating_point():
        return output.dtype == x.dtype
    return output.dtype != torch.float64


def _laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    if tensor.stride() == like.stride() or like.shape != tensor.shape:
        return tensor
    target = torch.empty_like(like, dtype=tensor.dtype)
    return tensor if target.stride() == tensor.stride() else target.copy_(tensor)


def _without_annotations(function: _F) -> _F:
    """Give a method the signature that the codebase shows, which has no annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    changed: Any = function
    changed.__signature__ = inspect.Signature(parameters)
    return function


class ImprovedAncestral(Steps):
    @_without_annotations
    def p_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Result:
        """x_{t-1} from x_t by ancestral sampling (Ho et al. 2020), as one fused operation: "sample", "pred_xstart"."""
        found = self._fastdiff_step("p_sample", model, x, t, clip_denoised, denoised_fn, None, model_kwargs)
        if isinstance(found, dict):
            return found
        original: Any = super()
        kept: Result = original.p_sample(
            found.model, x, t, clip_denoised=clip_denoised, denoised_fn=found.denoised_fn, model_kwargs=model_kwargs
        )
        return kept


class GuidedAncestral(Steps):
    @_without_annotations
    def p_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Result:
        """x_{t-1} from x_t by ancestral sampling (Ho et al. 2020), as one fused operation: "sample", "pred_xstart".

        With cond_fn the mean is moved along its gradient, taken at x_t (Dhariwal and Nichol 2021, algorithm 1).
        """
        found = self._fastdiff_step("p_sample", model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        if isinstance(found, dict):
            return found
        original: Any = super()
        kept: Result = original.p_sample(
            found.model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=found.denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
        )
        return kept


class ImprovedDDIM(Steps):
    @_without_annotations
    def ddim_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Result:
        """x_{t-1} from x_t by DDIM (Song et al. 2021, eq. 12), as one fused operation: "sample", "pred_xstart"."""
        found = self._fastdiff_step("ddim_sample", model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta)
        if isinstance(found, dict):
            return found
        original: Any = super()
        kept: Result = original.ddim_sample(
            found.model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=found.denoised_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )
        return kept


class GuidedDDIM(Steps):
    @_without_annotations
    def ddim_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Result:
        """x_{t-1} from x_t by DDIM (Song et al. 2021, eq. 12), as one fused operation: "sample", "pred_xstart".

        With cond_fn its gradient is added to the score (Dhariwal and Nichol 2021, algorithm 2).
        """
        found = self._fastdiff_step("ddim_sample", model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        if isinstance(found, dict):
            return found
        original: Any = super()
        kept: Result = original.ddim_sample(
            found.model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=found.denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )
        return kept


class Reverse(Steps):
    @_without_annotations
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
        """x_{t+1} from x_t by DDIM in reverse, as one fused operation: "sample", "pred_xstart". eta: 0 alone."""
        if eta == 0:
            found = self._fastdiff_step(
                "ddim_reverse_sample", model, x, t, clip_denoised, denoised_fn, None, model_kwargs
            )
            if isinstance(found, dict):
                return found
            model, denoised_fn = found
        original: Any = super()
        kept: Result = original.ddim_reverse_sample(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs, eta=eta
        )
        return kept


class GuidedReverse(Steps):
    """Of forks (DiT) that can guide the way back too."""

    @_without_annotations
    def ddim_reverse_sample(
        self,
        model: Function,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Result:
        """x_{t+1} from x_t by DDIM in reverse, as one fused operation: "sample", "pred_xstart". eta: 0 alone."""
        if eta == 0:
            found = self._fastdiff_step(
                "ddim_reverse_sample", model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs
            )
            if isinstance(found, dict):
                return found
            model, denoised_fn = found
        original: Any = super()
        kept: Result = original.ddim_reverse_sample(
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )
        return kept


class Forward(Steps):
    @_without_annotations
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t from x_0 (Ho et al. 2020, eq. 4), as one fused operation. Its noise is torch's with any `enable`."""
        fused = self._fastdiff_q_sample(x_start, t, noise)
        if isinstance(fused, Tensor):
            return fused
        original: Any = super()
        kept: Tensor = original.q_sample(x_start, t, noise=noise)
        return kept

    def _fastdiff_q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None) -> Tensor | None:
        if torch.compiler.is_compiling() or not _plain(x_start, t, noise):
            return None
        kept = self._fastdiff_kept(_READ["q_sample"])
        if self._fastdiff_why_not("q_sample", kept) is not None:
            return None
        if noise is None:
            noise = torch.randn_like(x_start)
        wide = torch.float64 if torch.float64 in (x_start.dtype, noise.dtype) else torch.float32
        if wide == torch.float64 and x_start.dtype != noise.dtype:
            return None
        x_t = ops.add_noise(
            x_start.to(wide),
            t,
            kept.table("q_sample", x_start, "x0", False),
            noise=noise.to(wide),
            backend=self._fastdiff.options.backend,
        )
        assert isinstance(x_t, Tensor)
        return x_t.contiguous() if self._fastdiff.tables["probed"].dense else x_t


def _plain(x: Any, t: Any, other: Any) -> bool:
    """Whether these are a batch, its timesteps and a tensor like it, or None."""
    return (
        isinstance(x, Tensor)
        and isinstance(t, Tensor)
        and x.is_floating_point()
        and x.dim() > 0
        and t.shape == x.shape[:1]
        and not t.is_floating_point()
        and (other is None or (isinstance(other, Tensor) and other.is_floating_point() and other.shape == x.shape))
    )


_FACES: dict[str, tuple[type[Steps], ...]] = {
    "q_sample": (Forward,),
    "p_sample": (ImprovedAncestral, GuidedAncestral),
    "ddim_sample": (ImprovedDDIM, GuidedDDIM),
    "ddim_reverse_sample": (Reverse, GuidedReverse),
}
_HOOK_SET = frozenset(_HOOKS)


def mixin_for(original: type) -> type[Steps]:
    """The mixin of a class: of each of its methods the one that has its signature, none where that is another."""
    faces: list[type[Steps]] = []
    for method, known in _FACES.items():
        form = _form(getattr(original, method, None))
        faces += [face for face in known if form is not None and form == _form(getattr(face, method))]
    return _mixin(tuple(faces))


@functools.cache
def _mixin(faces: tuple[type[Steps], ...]) -> type[Steps]:
    return type("Fused", faces or (Steps,), {})


def _form(function: Any) -> list[tuple[str, Any, Any]] | None:
    """The parameters of a method: name, kind and default."""
    if not callable(function):
        return None
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


class Probed(NamedTuple):
    """What was seen of an object: why methods are not to be fused, and whether its coefficients are full tensors.

    Such coefficients, the first operands, make its results contiguous (DiT); others leave them the layout of a sample.
    """

    reasons: dict[str, str]
    dense: bool = False


def _probe(diffusion: Any) -> Probed:
    """Run the methods of an object as they are and fused, on a few numbers, and compare.

    Nothing of the object or of torch's generator is changed. Besides, the code of its methods must not look at
    attributes or keys that a fused step would not know of, whatever they did in this run.
    """
    original_class = type(diffusion)._original()
    if issubclass(original_class, Steps):
        return Probed(_overridden(original_class))
    reasons = {method: f"{method} of a signature that is not OpenAI's" for method in STEPS}
    methods = [method for method in _FACES if any(issubclass(type(diffusion), face) for face in _FACES[method])]
    for method in methods:
        reasons.pop(method, None)
    seen = _unknown_names(diffusion, original_class)
    if seen is not None:
        return Probed(dict.fromkeys(_FACES, seen))
    dense = False
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        for method in methods:
            try:
                for case in _cases(diffusion, method):
                    expected = _run(_twin(diffusion, original_class, None), method, case)
                    if method == "q_sample" and not case.x.is_contiguous():
                        dense = expected[0]["sample"].is_contiguous()
                    found = _run(_twin(diffusion, type(diffusion), Probed({}, dense)), method, case)
                    difference = _difference(expected, found, exact="cond_fn" not in case.options)
                    if difference is not None:
                        reasons[method] = f"{method} of {original_class.__name__} computes something else: {difference}"
                        break
            except Exception as error:  # of whatever a fork does
                if isinstance(error, IndexError) and len(diffusion.betas) == 1:
                    continue  # which breaks the tables of the codebases, and needs none of them
                reasons[method] = (
                    f"{method} of {original_class.__name__} could not be tried ({type(error).__name__}: {error})"
                )
    return Probed(reasons, dense)


@functools.cache
def _overridden(cls: type) -> dict[str, str]:
    """Of a subclass of a class of this package: why its steps are made by its own functions."""
    package = __name__.rpartition(".")[0]
    for hook in _HOOKS:
        function = getattr(cls, hook, None)
        if function is not None and not getattr(function, "__module__", "").startswith(package):
            return dict.fromkeys(_FACES, f"{hook} of {cls.__name__} is not that of GaussianDiffusion")
    return {}


_NOTHING = object()


def _unknown_names(diffusion: Any, original_class: type) -> str | None:
    """What the code of its steps looks at besides the attributes and keys that a GaussianDiffusion has."""
    looked_at, methods = set(_ATTRIBUTES), [*_HOOKS, *STEPS]
    for method in methods:
        for function in (vars(base).get(method) for base in original_class.__mro__):
            if not isinstance(function, types.FunctionType):
                continue
            for code in _codes(function.__code__):
                words = {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()} - _KEYS
                for name in sorted(set(code.co_names) - looked_at):
                    found = inspect.getattr_static(diffusion, name, _NOTHING)
                    if isinstance(found, types.FunctionType):
                        methods.append(name)  # of its own, to be looked into as well
                        looked_at.add(name)
                    elif found is not _NOTHING:
                        words.add(name)
                if words:
                    return f"{method} of {function.__qualname__.partition('.')[0]} depends on {min(words)!r}"
    return None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


class _Case(NamedTuple):
    """Arguments of one trial."""

    x: Tensor
    t: Tensor
    options: dict[str, Any]


def _cases(diffusion: Any, method: str) -> Iterator[_Case]:
    total = len(diffusion.betas)
    t = torch.arange(0, total, -(-total // _MAX_TRIED), device="cpu")
    x = torch.linspace(-40, 40, 12 * len(t), device="cpu", dtype=torch.float32).sin().reshape(-1, 2, 3, 2)
    wide = x.to(memory_format=torch.channels_last)
    if method == "q_sample":
        yield _Case(wide, t, {})
        yield _Case(x, t, {"noise": x.flip(0)})
        yield _Case(x.bfloat16(), t, {})
        return
    yield _Case(wide, t, {"clip_denoised": False})
    yield _Case(x, t, {})
    yield _Case(x, t, {"denoised_fn": lambda x0: 0.9 * x0, "model_kwargs": {"y": t}})
    yield _Case(x.bfloat16(), t, {"clip_denoised": False})
    parameters = inspect.signature(getattr(type(diffusion), method)).parameters
    if method == "ddim_sample":
        yield _Case(x, t, {"eta": 0.5})
    if "cond_fn" in parameters:
        yield _Case(x, t, {"cond_fn": _Recorder(False), "model_kwargs": {"y": t}})


class _Recorder:
    """A model, or the gradient of a classifier, that knows what it was called with."""

    def __init__(self, learned: bool) -> None:
        self.learned = learned
        self.calls: list[Any] = []

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append((t.dtype, t.tolist(), sorted(kwargs)))
        time = torch.sin(0.01 * t.float() + 0.3).to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
        output = 0.8 * torch.tanh(1.3 * x) + 0.1 * time
        return torch.cat([output, 1.2 * torch.tanh(0.7 * x + time)], dim=1) if self.learned else output


def _twin(diffusion: Any, cls: type, probed: Probed | None) -> Any:
    """The object with a class, its attributes its own."""
    twin: Any = object.__new__(cls)
    attributes = {name: value for name, value in vars(diffusion).items() if not isinstance(value, State)}
    twin.__dict__.update(copy.copy(attributes))
    if probed is not None:
        twin._fastdiff.tables["probed"] = probed
    return twin


def _run(twin: Any, method: str, case: _Case) -> tuple[Result, list[Any]]:
    torch.default_generator.manual_seed(0)  # that of the CPU alone
    if method == "q_sample":
        return {"sample": twin.q_sample(case.x, case.t, **case.options)}, []
    model = _Recorder(name_of(twin.model_var_type).startswith("LEARNED"))
    options = dict(case.options)
    if "cond_fn" in options:
        options["cond_fn"] = _Recorder(False)
    found = getattr(twin, method)(model, case.x, case.t, **options)
    calls = model.calls + (options["cond_fn"].calls if "cond_fn" in options else [])
    return found, [*calls, torch.randn(1, device="cpu").item()]


def _difference(expected: tuple[Result, list[Any]], found: tuple[Result, list[Any]], exact: bool) -> str | None:
    if expected[1] != found[1]:
        return "another call of the model, or other draws"
    if expected[0].keys() != found[0].keys():
        return f"it gives {sorted(expected[0])}"
    for name, theirs in expected[0].items():
        ours = found[0][name]
        if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
            return f"{name} of another dtype or shape"
        # the layout of the next step's noise; a predicted x0 may be a part of the model output there
        if name == "sample" and theirs.stride() != ours.stride():
            return "sample of another layout"
        there = torch.isfinite(theirs)  # a step that breaks down in float32 is made right
        apart = (theirs.double() - ours.double())[there].abs()
        # torch's roots and exponentials may differ by an ulp between one number and many
        allowed = 0.0 if exact and name == "pred_xstart" else 1e-6 * float(theirs[there].double().abs().max())
        if apart.numel() and not float(apart.max()) <= allowed:
            return f"{name} differs by {float(apart.max()):.2g}"
    return None
