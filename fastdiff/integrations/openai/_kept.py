"""What the fused steps of a GaussianDiffusion are made of: its tables, and those of fastdiff that follow from them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
)

Arrays = dict[str, NDArray[np.float64]]
Result = dict[str, Tensor]
Function = Callable[..., Any]

PREDICTIONS = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "x_prev"}
VARIANCES = {name: name.lower() for name in ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE")}
# what the object is asked to do, and the functions of its own that this depends on
STEPS = ("p_sample", "ddim_sample", "ddim_reverse_sample")
HOOKS = (
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
READ = {
    "p_sample": ("betas", *_X0, *_MEAN, *_VARIANCE),
    "ddim_sample": ("betas", *_X0, *_MEAN, "alphas_cumprod", "alphas_cumprod_prev"),
    "ddim_reverse_sample": ("betas", *_X0, *_MEAN, "alphas_cumprod", "alphas_cumprod_next"),
    "q_sample": ("betas", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
}
_MAX_TABLES = 64


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


_ARRAYS = tuple(dict.fromkeys((*(name for names in READ.values() for name in names), "log_one_minus_alphas_cumprod")))


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
