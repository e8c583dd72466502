"""lucidrains' denoising-diffusion-pytorch: the same samples by `fastdiff.enable(diffusion)`.

    diffusion = fastdiff.enable(GaussianDiffusion(model, image_size=32, sampling_timesteps=50))
    images = diffusion.sample(batch_size=16)

What is replaced are p_sample, p_sample_loop and ddim_sample of GaussianDiffusion, GaussianDiffusion1D and
LearnedGaussianDiffusion, and of copies of them in other codebases: they are known by their methods and buffers, and
tried against their own code when they are enabled. The package itself is not imported. Training, q_sample, the
losses and the state_dict stay as they are.

Samples are ordinary tensors and not those of torch.inference_mode, so that they can enter autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import mersenne, native, ops, tables
from .. import noise as contract
from ..hosts import Columns, LucidrainsBuffers
from ..tables import COLUMN, Table
from ._hooks import Hooks
from ._host import Options, State, Switched, learned_step, step_seeds

_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
_PREDICTIONS = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
_SAMPLERS = ("p_sample", "p_sample_loop", "ddim_sample")
_METHODS = (
    *_SAMPLERS,
    "p_mean_variance",
    "model_predictions",
    "q_posterior",
    "predict_start_from_noise",
    "predict_start_from_v",
    "predict_noise_from_start",
)
_METHODS_SET = frozenset(_METHODS)
# the attributes and strings that their code looks at
_ATTRIBUTES = {"model", "objective", "num_timesteps", "sampling_timesteps", "ddim_sampling_eta", "self_condition"}
_ATTRIBUTES |= {"unnormalize", "device", "posterior_variance", *_BUFFERS}
_KEYS = {*_PREDICTIONS, "x_self_cond"}
_OWN_OF_LEARNED = ("p_mean_variance", "model_predictions")
_LEARNED = "LearnedGaussianDiffusion"
_ETAS = (0.0, 0.9, 1.0)  # that are tried; at 1 some of the replaced code's numbers may be NaN
_MAX_STEPS = 4096  # of DDIM, whose rows are kept: an eta that is annealed must not fill the memory
_SUPPORTED = (
    "GaussianDiffusion, GaussianDiffusion1D or LearnedGaussianDiffusion of denoising-diffusion-pytorch, "
    "or a copy with their buffers and methods"
)
# what holds such an object, and where
_HOLDERS = {
    "Trainer": "fastdiff.enable(trainer.ema.ema_model)",
    "Trainer1D": "fastdiff.enable(trainer.ema.ema_model)",
    "XMWrapper": "fastdiff.enable(wrapper.flow_model)",
}

_F = TypeVar("_F", bound=Callable[..., Any])


def targets(obj: Any) -> dict[str, Any]:
    """What of an object is switched: itself."""
    return {"": obj}


def mixin(target: Any) -> type[Switched]:
    """The samplers that take the place of those of an object.

    TypeError for an object that is not a GaussianDiffusion in discrete time, with what is supported.
    """
    cls = target._original() if isinstance(target, Switched) else type(target)
    if cls.__name__ in _HOLDERS:
        raise TypeError(f"obj: expected {_SUPPORTED}, got {cls.__name__}; write {_HOLDERS[cls.__name__]}")
    held = _held_by(target)
    without = [name for name in _METHODS if not callable(getattr(cls, name, None))]
    without += [name for name in _BUFFERS if not isinstance(held.get(name), Tensor)]
    if without:
        raise TypeError(
            f"obj: expected {_SUPPORTED}, got {cls.__name__}, which has no {', '.join(without[:3])}. It keeps its own "
            "sampler; for one of fastdiff's write fastdiff.DDPMSampler(schedule).sample(model, shape)"
        )
    for known in (_Learned if _is_learned(cls) else _Images, _Sequences):
        if all(_names(getattr(cls, name)) == _names(getattr(known, name)) for name in _SAMPLERS):
            return known
    return _Kept


class _Steps(NamedTuple):
    """Where the rows of a step are: `row` of a table that adds noise, and of one that leads to the predicted x0."""

    table: Table
    clean: Table
    row: int


@dataclass
class _Source:
    """Buffers as they were when tables were made of them, and the tables."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...] | None  # None: not all of them count what is done to them
    values: Tensor  # [buffers, T], a copy
    ddpm: dict[Any, tuple[Table, Table]] = field(default_factory=dict)  # with noise, without
    ddim: dict[Any, _Steps] = field(default_factory=dict)

    def at(self, t: list[int]) -> LucidrainsBuffers:
        return LucidrainsBuffers(dict(zip(_BUFFERS, self.values, strict=True)), t)

    def holds(self, held: dict[str, Any]) -> bool:
        """Whether the buffers of an object are these, and unchanged as far as their versions tell."""
        if self.versions is None:
            return False
        return all(
            held[name] is tensor and tensor._version == version
            for name, tensor, version in zip(_BUFFERS, self.tensors, self.versions, strict=True)
        )


@dataclass
class _Chain:
    """What the steps of a chain share: its seeds, and the noise that was drawn last."""

    seeds: Tensor | None
    noise: Tensor


def _host_signature(**annotations: Any) -> Callable[[_F], _F]:
    """Annotations as the replaced method has them, whose signature a caller may inspect."""

    def apply(function: _F) -> _F:
        function.__annotations__ = annotations
        return function

    return apply


class _Sampler(Switched):
    """What the samplers of GaussianDiffusion and its variants share."""

    _eps = "rederived"  # of DDIM, where the model predicts noise
    _learned = False
    _trial_shape: tuple[int, ...]
    _trial_options: dict[str, bool]

    model: Any
    objective: str
    num_timesteps: int
    sampling_timesteps: int
    ddim_sampling_eta: float
    self_condition: bool
    unnormalize: Callable[[Tensor], Tensor]

    def ddim_step(
        self,
        x: Tensor,
        time: int,
        time_next: int,
        x_self_cond: Tensor | None = None,
        *,
        clip_denoised: bool = True,
        model_forward_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of ddim_sample, which has none of its own: from training timestep time to time_next.

        Song et al. 2021 (arXiv:2010.02502), eq. 12, with eta = self.ddim_sampling_eta.

        Args:
            x: the state at time, [B, ...], floating.
            time, time_next: ints in [0, T); time_next below 0 leads to the predicted x0, without noise.
            x_self_cond: x_start of the step before, for a model with self-conditioning.
            clip_denoised: whether x_start is clipped to [-1, 1].
            model_forward_kwargs: for the model of a GaussianDiffusion1D.

        Returns:
            (img, x_start), as p_sample does.

        Raises:
            ValueError: a timestep out of range; an object whose steps are kept.
        """
        reason = self._why_ddim_kept()
        if reason is not None:
            raise ValueError(f"self: expected an object whose steps are replaced, got one without: {reason}")
        with torch.inference_mode(False), torch.no_grad():
            kwargs = model_forward_kwargs or {}
            img, x_start = self._ddim_step(
                _ordinary(x), [(time, time_next)], x_self_cond, kwargs, clip_denoised, None, True
            )
        assert x_start is not None
        return img, x_start

    def _model_output(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        output: Tensor = self.model(x, t, x_self_cond)
        return output

    def _prediction(self) -> str:
        return _PREDICTIONS[self.objective]

    def _why_kept(self) -> str | None:
        """Why the steps of now are the original's."""
        state, objective = self._fastdiff, self.objective
        if objective not in _PREDICTIONS:
            return f"objective {objective!r}"
        if state.tried is None or state.tried[0] != objective or not state.tried[1].are_same():
            state.disabled = self._probe()  # other steps than those that were tried
        if state.disabled is not None:
            return state.disabled
        if not _METHODS_SET.isdisjoint(self.__dict__):
            return f"a {next(name for name in _METHODS if name in self.__dict__)} of the object's own"
        return None

    def _why_ddim_kept(self) -> str | None:
        eta = self.ddim_sampling_eta
        return self._why_kept() or (None if 0 <= eta <= 1 else f"ddim_sampling_eta {eta}, which is not in [0, 1]")

    def _source(self, by_value: bool = False) -> _Source:
        """The tables that are good for the buffers as they are.

        by_value: look at their values as well: what is done through .data, as ema-pytorch does, leaves no other trace.
        """
        state, held = self._fastdiff, _held_by(self)
        found: _Source | None = state.tables.get("source")
        if found is not None and found.holds(held):
            # while a CUDA graph is captured nobody can look at values
            if not by_value or native.capturing(found.values.device):
                return found
        tensors = tuple(held[name] for name in _BUFFERS)
        versions = None if any(u.is_inference() for u in tensors) else tuple(u._version for u in tensors)
        with self._exactly():
            values = torch.stack([u.detach() for u in tensors])
        if found is None or not _identical(values, found.values):
            found = state.tables["source"] = _Source(tensors, versions, values)
        else:
            found.tensors, found.versions = tensors, versions
        return found

    def _exactly(self) -> torch.autocast:
        """Tables are made in the dtype of the buffers, whatever the caller's autocast."""
        return torch.autocast(_held_by(self)["betas"].device.type, enabled=False)

    def _table(self, name: str, columns: Columns, t: Sequence[int], clip: bool) -> Table:
        return tables.table_of(name, columns, list(t), clip=1.0 if clip else None, host="lucidrains")

    def _ddpm_tables(self, clip: bool) -> tuple[Table, Table]:
        source, prediction = self._source(), self._prediction()
        found = source.ddpm.get((prediction, clip))
        if found is None:
            t = list(reversed(range(source.values.shape[1])))
            buffers, variance = source.at(t), "learned_range" if self._learned else "fixed_small"
            with self._exactly():
                noisy, last = (
                    self._table("ddpm", buffers.ddpm(prediction, form), t, clip) for form in (variance, "none")
                )
            found = source.ddpm[prediction, clip] = noisy, last
        return found

    def _ddim_steps(self, pairs: Sequence[tuple[int, int]], clip: bool) -> _Steps:
        """Where the step of the first of the pairs is; those of the others are made with it."""
        source, prediction, eta = self._source(), self._prediction(), self.ddim_sampling_eta
        found = source.ddim.get((*pairs[0], prediction, eta, clip))
        if found is None:
            total = source.values.shape[1]
            for time, time_next in pairs:
                if not (0 <= time < total and time_next < total):
                    raise ValueError(f"time: expected ints below {total}, time not below 0, got {time} and {time_next}")
            if len(source.ddim) + len(pairs) > _MAX_STEPS:
                source.ddim.clear()
            t, prev = [time for time, _ in pairs], [max(time_next, -1) for _, time_next in pairs]
            buffers = source.at(t)
            with self._exactly():
                table = self._table("ddim", buffers.ddim(prev, prediction, eta, self._eps), t, clip)
                clean = self._table("ddim_x0", buffers.clean(prediction), t, clip)
            for row, pair in enumerate(pairs):
                source.ddim[(*pair, prediction, eta, clip)] = _Steps(table, clean, row)
            found = source.ddim[(*pairs[0], prediction, eta, clip)]
        return found

    def _seeds(self, x: Tensor, chain: _Chain | None) -> int | Tensor:
        if chain is not None and chain.seeds is not None:
            return chain.seeds
        return step_seeds(self._fastdiff.options, None, x.shape[0], x.device)

    def _ddpm_step(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None,
        kwargs: dict[str, Any],
        clip: bool,
        chain: _Chain | None,
        with_x0: bool,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode():  # as there: a network is faster in it
            model_output = self._model_output(x, _times(x, t), x_self_cond, kwargs)
        noisy, last = self._ddpm_tables(clip)
        if not 0 <= t < len(noisy):
            raise ValueError(f"t: expected a timestep in [0, {len(noisy)}), got {t}")
        row = len(noisy) - 1 - t
        if t == 0:
            return self._take(last, row, model_output, x, with_x0=with_x0)
        if self._fastdiff.options.noise == "philox":
            return self._take(noisy, row, model_output, x, seeds=self._seeds(x, chain), with_x0=with_x0)
        return self._take(noisy, row, model_output, x, noise=mersenne.randn_like(x), with_x0=with_x0)

    def _ddim_step(
        self,
        x: Tensor,
        pairs: Sequence[tuple[int, int]],
        x_self_cond: Tensor | None,
        kwargs: dict[str, Any],
        clip: bool,
        chain: _Chain | None,
        with_x0: bool,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode():
            model_output = self._model_output(x, _times(x, pairs[0][0]), x_self_cond, kwargs)
        table, clean, row = self._ddim_steps(pairs, clip)
        if pairs[0][1] < 0:
            x0, _ = self._take(clean, row, model_output, x)
            x0 = self._as_x0(x0, model_output)
            return x0, x0
        noisy = table.structure.variance != "none"
        if self._fastdiff.options.noise == "philox":
            keys = self._seeds(x, chain) if noisy else None
            return self._take(table, row, model_output, x, seeds=keys, with_x0=with_x0)
        noise = mersenne.randn_like(x)  # drawn for eta = 0 too
        if chain is not None:
            chain.noise = noise
        if self._rounds_terms(table, model_output, x):
            x0, _ = self._take(clean, row, model_output, x)
            return self._ddim_step_by_terms(table, row, model_output, x, self._as_x0(x0, model_output), noise)
        return self._take(table, row, model_output, x, noise=noise if noisy else None, with_x0=with_x0)

    def _take(
        self,
        table: Table,
        row: int,
        model_output: Tensor,
        x: Tensor,
        *,
        noise: Tensor | None = None,
        seeds: int | Tensor | None = None,
        with_x0: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """A step of a table, in the dtype and with the layout of the replaced code."""
        state = self._fastdiff
        state.fused += 1
        dtype = self._dtype(x, model_output)
        like, state_x = model_output, x if x.dtype is dtype else x.to(dtype)
        if model_output.dtype is not dtype and not (dtype is torch.float32 and model_output.dtype.itemsize == 2):
            model_output = model_output.to(dtype)
        if self._learned and not table.structure.learned:
            model_output = model_output[:, : x.shape[1]]
        if noise is not None and noise.dtype is not dtype:
            noise = noise.to(dtype)
        # nothing is rounded where nothing is half, and "once" is the shorter way
        options: dict[str, Any] = {
            "row": row,
            "rounding": state.options.rounding if dtype.itemsize == 2 else "once",
            "backend": state.options.backend,
        }
        x0: Tensor | None = None
        if table.structure.learned and noise is not None:
            if model_output.dtype is not dtype and state.options.rounding == "host":
                noise = _std_of_half(table, row, model_output, state_x) * noise
                table, model_output = tables.fixed_table(table), model_output[:, : x.shape[1]]
                x_prev, x0 = ops.step_with_x0(table, model_output, None, state_x, noise=noise, **options)
            else:
                x_prev, x0 = learned_step(table, model_output, None, state_x, noise=noise, **options)
        elif with_x0:
            x_prev, x0 = ops.step_with_x0(table, model_output, None, state_x, noise=noise, seeds=seeds, **options)
        else:
            x_prev = ops.step(table, model_output, None, state_x, noise=noise, seeds=seeds, **options)
        if table.structure.x0 == "output" and like.stride() != x.stride():
            x_prev = _laid_out_as(like, x_prev)
        return x_prev, x0 if x0 is None else self._as_x0(x0, like)

    def _dtype(self, x: Tensor, model_output: Tensor) -> torch.dtype:
        """That of the result: the buffers have a dimension, so that they promote."""
        dtype: torch.dtype = _held_by(self)["alphas_cumprod"].dtype
        if x.dtype is dtype and model_output.dtype is dtype:
            return dtype
        return torch.promote_types(torch.promote_types(x.dtype, dtype), model_output.dtype)

    def _as_x0(self, x0: Tensor, model_output: Tensor) -> Tensor:
        """A predicted x0 as the replaced code has it: the model output itself, where that is what is predicted."""
        if self._prediction() != "x0":
            return x0
        x0 = x0.to(model_output.dtype)
        return x0 if x0.stride() == model_output.stride() else _laid_out_as(model_output, x0)

    def _rounds_terms(self, table: Table, model_output: Tensor, x: Tensor) -> bool:
        """Whether a term of a DDIM step has a narrower dtype than the result in the replaced code.

        The coefficients are 0-dimensional there: a half model output (of autocast) or noise (of a half default dtype)
        times one of them stays half.
        """
        dtype, structure = self._dtype(x, model_output), table.structure
        if self._fastdiff.options.rounding != "host" or (x.dtype is dtype and model_output.dtype is dtype):
            return False
        if structure.variance != "none" and x.dtype is not dtype:
            return True
        return model_output.dtype is not dtype and "output" in (structure.x0, structure.eps)

    def _ddim_step_by_terms(
        self, table: Table, row: int, model_output: Tensor, x: Tensor, x0: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A DDIM step term by term, each with the dtype that torch gives it."""
        dtype = self._dtype(x, model_output)
        coefficients = table.to(x.device, dtype)[row]
        a0, ae, s, gx, gd = (coefficients[COLUMN[name]] for name in ("a0", "ae", "s", "gx", "gd"))
        e = model_output[:, : x.shape[1]] if table.structure.eps == "output" else (gx * x.to(dtype) - x0) / gd
        x_prev = x0 * a0 + ae * e
        return (x_prev if table.structure.variance == "none" else x_prev + s * noise), x0

    def _start(self, shape: Sequence[int]) -> tuple[Tensor, _Chain]:
        """x_T, and what its chain begins with."""
        options, device = self._fastdiff.options, _held_by(self)["betas"].device
        self._source(by_value=True)
        if options.noise == "torch":
            noise = torch.randn(shape, device=device)
            return noise, _Chain(None, noise)
        seeds = contract.seeds(step_seeds(options, None, shape[0], device), shape[0], device)
        noise = contract.normal(tuple(shape), seeds, dtype=torch.get_default_dtype(), device=device)
        return noise, _Chain(seeds, noise)

    def _ddpm_chain(self, shape: Sequence[int], kwargs: dict[str, Any], every: bool = False) -> list[Tensor]:
        """x_T and what p_sample_loop makes of it: every state, or the last alone."""
        img, chain = self._start(shape)
        states = [img]
        x_start: Tensor | None = None
        steps, progress = self.num_timesteps, self._tqdm("p_sample_loop")
        for t in progress(reversed(range(steps)), desc="sampling loop time step", total=steps):
            self_cond = x_start if self.self_condition else None
            img, x_start = self._ddpm_step(img, t, self_cond, kwargs, True, chain, self.self_condition)
            if every:
                states.append(img)
        return states if every else [states[0], img]

    def _ddim_chain(
        self, shape: Sequence[int], clip: bool, kwargs: dict[str, Any], every: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """What ddim_sample makes of x_T, as `_ddpm_chain`, and the noise that was drawn last."""
        # float32, cut and not rounded: for some counts not the timesteps of exact arithmetic
        times = torch.linspace(-1, self.num_timesteps - 1, steps=self.sampling_timesteps + 1).int().tolist()[::-1]
        pairs = list(zip(times[:-1], times[1:], strict=True))
        img, chain = self._start(shape)
        states = [img]
        x_start: Tensor | None = None
        for k, _ in enumerate(self._tqdm("ddim_sample")(pairs, desc="sampling loop time step")):
            self_cond = x_start if self.self_condition else None
            img, x_start = self._ddim_step(img, pairs[k:], self_cond, kwargs, clip, chain, self.self_condition)
            if every:
                states.append(img)
        return states if every else [states[0], img], chain.noise

    def _tqdm(self, name: str) -> Callable[..., Any]:
        """The progress bar of a replaced method, which a caller may have silenced."""
        replaced: Any = inspect.unwrap(getattr(self._original(), name))
        progress: Callable[..., Any] = replaced.__globals__.get("tqdm", _no_progress)
        return progress

    def _count_kept(self, reason: str, steps: int) -> None:
        for _ in range(steps):
            self._fastdiff.fall_back(reason)

    def _probe(self) -> str | None:
        original = self._original()
        hooks = Hooks(self, original, _METHODS, names=_ATTRIBUTES, keys=_KEYS)
        self._fastdiff.tried = self.objective, hooks
        for name in _METHODS:
            owners = [base for base in original.__mro__ if name in vars(base)]
            if name in _OWN_OF_LEARNED and owners[0].__name__ == _LEARNED:
                owners = owners[1:]
            if len(owners) > 1:
                return f"{owners[0].__name__} has a {name} of its own"
        if hooks.reason is not None:
            return hooks.reason
        try:
            theirs, ours = _Trial(self, original).outcome(), _Trial(self, type(self)).outcome()
        except Exception as error:
            return f"a trial of {original.__name__} raised {type(error).__name__}: {error}"
        if len(theirs) != len(ours) or not all(map(_agree, theirs, ours)):
            return f"the steps of {original.__name__} are not those of denoising-diffusion-pytorch"
        return None


class _Images(_Sampler):
    """GaussianDiffusion: Ho et al. 2020 (arXiv:2006.11239), Song et al. 2021 (arXiv:2010.02502)."""

    _trial_shape = (4, 4)
    _trial_options = {"return_all_timesteps": True}

    @_host_signature(t=int)
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_{t-1} and x_start, both [B, ...], from x at training timestep t; without noise at 0.

        In the dtype that x, the buffers and the model output promote to. ValueError for t out of range.
        """
        reason = self._why_kept()
        if reason is not None:
            self._fastdiff.fall_back(reason)
            original: Any = super()
            kept: tuple[Tensor, Tensor] = original.p_sample(x, t, x_self_cond)
            return kept
        with torch.inference_mode(False), torch.no_grad():
            img, x_start = self._ddpm_step(_ordinary(x), int(t), x_self_cond, {}, True, None, True)
        assert x_start is not None
        return img, x_start

    @_host_signature()
    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Samples of this shape by all timesteps; with every state, x_T first, [B, T + 1, ...]."""
        if self._why_kept() is not None:  # as p_sample says
            original: Any = super()
            kept: Tensor = original.p_sample_loop(shape, return_all_timesteps)
            return kept
        with torch.inference_mode(False), torch.no_grad():
            return self._finished(self._ddpm_chain(shape, {}, return_all_timesteps), return_all_timesteps)

    @_host_signature()
    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Samples of this shape by sampling_timesteps steps; with every state, x_T first, [B, steps + 1, ...]."""
        reason = self._why_ddim_kept()
        if reason is not None:
            self._count_kept(reason, self.sampling_timesteps)
            original: Any = super()
            kept: Tensor = original.ddim_sample(shape, return_all_timesteps)
            return kept
        with torch.inference_mode(False), torch.no_grad():
            states, _ = self._ddim_chain(shape, True, {}, return_all_timesteps)
            return self._finished(states, return_all_timesteps)

    def _finished(self, states: list[Tensor], every: bool) -> Tensor:
        return self.unnormalize(torch.stack(states, dim=1) if every else states[-1])


class _Learned(_Images):
    """LearnedGaussianDiffusion: Nichol & Dhariwal 2021 (arXiv:2102.09672).

    Its loss trains the first half of the model output as noise whatever the objective, and p_sample takes it for that;
    so does ddim_sample here, which raises NameError there. As that is written, eps is the model's, not re-derived.
    """

    _eps = "raw"
    _learned = True

    def _model_output(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        output: Tensor = self.model(x, t)
        return output

    def _prediction(self) -> str:
        return "eps"


class _Sequences(_Sampler):
    """GaussianDiffusion1D, whose DDIM does not re-derive eps."""

    _eps = "raw"
    _trial_shape = (4,)
    _trial_options = {"return_noise": True}

    def _model_output(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        if x_self_cond is not None:
            kwargs = {**kwargs, "x_self_cond": x_self_cond}
        output: Tensor = self.model(x, t, **kwargs)
        return output

    @_host_signature(t=int, model_forward_kwargs=dict)
    def p_sample(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool = True,
        model_forward_kwargs: dict[str, Any] = dict(),  # noqa: B006, B008
    ) -> tuple[Tensor, Tensor]:
        """As for images."""
        reason = self._why_kept()
        if reason is not None:
            self._fastdiff.fall_back(reason)
            original: Any = super()
            kept: tuple[Tensor, Tensor] = original.p_sample(x, t, x_self_cond, clip_denoised, model_forward_kwargs)
            return kept
        with torch.inference_mode(False), torch.no_grad():
            img, x_start = self._ddpm_step(
                _ordinary(x), int(t), x_self_cond, model_forward_kwargs, clip_denoised, None, True
            )
        assert x_start is not None
        return img, x_start

    @_host_signature(model_forward_kwargs=dict)
    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_noise: bool = False,
        model_forward_kwargs: dict[str, Any] = dict(),  # noqa: B006, B008
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Samples of this shape by all timesteps; with return_noise, x_T as well."""
        if self._why_kept() is not None:  # as p_sample says
            original: Any = super()
            kept: Tensor | tuple[Tensor, Tensor] = original.p_sample_loop(shape, return_noise, model_forward_kwargs)
            return kept
        with torch.inference_mode(False), torch.no_grad():
            noise, img = self._ddpm_chain(shape, model_forward_kwargs)
            img = self.unnormalize(img)
        return (img, noise) if return_noise else img

    @_host_signature(model_forward_kwargs=dict)
    def ddim_sample(
        self,
        shape: Sequence[int],
        clip_denoised: bool = True,
        model_forward_kwargs: dict[str, Any] = dict(),  # noqa: B006, B008
        return_noise: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Samples of this shape by sampling_timesteps steps; with return_noise, the noise that was drawn last."""
        reason = self._why_ddim_kept()
        if reason is not None:
            self._count_kept(reason, self.sampling_timesteps)
            original: Any = super()
            kept: Tensor | tuple[Tensor, Tensor] = original.ddim_sample(
                shape, clip_denoised, model_forward_kwargs, return_noise
            )
            return kept
        with torch.inference_mode(False), torch.no_grad():
            (_, img), noise = self._ddim_chain(shape, clip_denoised, model_forward_kwargs)
            img = self.unnormalize(img)
        return (img, noise) if return_noise else img


class _Kept(Switched):
    """An object whose samplers take other arguments than the known ones: its steps are counted, not replaced."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        original = cls._original()
        for name in ("p_sample", "ddim_sample"):
            replaced: Any = getattr(original, name)
            arguments = ", ".join(_names(replaced)[1:])
            setattr(cls, name, _counted(replaced, f"{original.__name__}.{name} takes {arguments}"))


def _counted(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
    @wraps(original)
    def method(self: Switched, *args: Any, **kwargs: Any) -> Any:
        self._fastdiff.fall_back(reason)
        return original(self, *args, **kwargs)

    return method


class _Model(torch.nn.Module):
    """Stands for the model while an object is tried, and records how it is called."""

    def __init__(self, model: Any, learned: bool, device: torch.device) -> None:
        super().__init__()
        self.learned = learned
        self.weight = torch.nn.Parameter(torch.zeros((), device=device))
        self.calls: list[Any] = []
        self.stood_for = [model]  # the last: it may have attributes of these names

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__.get("stood_for", [None])[0], name)
            if callable(value):
                raise
            return value

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += [x, *args, *(value for item in sorted(kwargs.items()) for value in item)]
        output = x.mul(2.0).sin().mul(1.5).add(0.1)
        return torch.cat([output, output.cos()], dim=1) if self.learned else output


class _Trial:
    """A few steps of an object with a class, and of what the methods of that class do to a copy of the object."""

    def __init__(self, obj: _Sampler, cls: type) -> None:
        self.obj, self.cls = obj, cls
        self.device = _held_by(obj)["betas"].device
        self.model = _Model(obj.model, obj._learned, self.device)
        self.state = State(Options())
        self.state.tried = obj._fastdiff.tried

    def outcome(self) -> list[Any]:
        """What the model was called with, and what came of it."""
        obj, device = self.obj, self.device
        shape = (2, getattr(obj, "channels", 3), *obj._trial_shape)
        steps, total = min(3, obj.num_timesteps), obj.num_timesteps
        found: list[Any] = []
        # the caller's generators are left where they are, and give both classes the same numbers
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            x = torch.randn(shape, device=device)
            one = self._copy()
            for t in (total - 1, total // 2):
                found += [*one.p_sample(x.clone(), t), self._draw()]
            found += self._loop("p_sample_loop", self._copy(num_timesteps=steps), shape)
            if not obj._learned:  # whose own raises NameError
                own = obj.ddim_sampling_eta
                for eta in (*_ETAS, own) if 0 < own < 1 else _ETAS:
                    chain = self._copy(sampling_timesteps=steps, ddim_sampling_eta=eta)
                    found += self._loop("ddim_sample", chain, shape)
        return found + self.model.calls

    def _draw(self) -> Tensor:
        """A number that tells how many were drawn before."""
        return torch.cat([torch.randn(1, device="cpu"), torch.randn(1, device=self.device).cpu()])

    def _copy(self, **attributes: Any) -> Any:
        found: Any = object.__new__(self.cls)
        # what replaces a method is bound to the object, and heeded at every step
        found.__dict__.update((name, value) for name, value in vars(self.obj).items() if name not in _METHODS)
        if "model" in vars(self.obj):
            attributes["model"] = self.model
        else:
            attributes["_modules"] = {**vars(self.obj)["_modules"], "model": self.model}
        if issubclass(self.cls, Switched):
            attributes |= {"_fastdiff_state": self.state, "_tqdm": lambda name: _no_progress}
        found.__dict__.update(attributes)
        return found

    def _loop(self, name: str, copy: Any, shape: tuple[int, ...]) -> list[Any]:
        function: Any = getattr(self.cls, name)
        while getattr(function, "__globals__", {}).get("__name__", "").startswith("torch."):
            function = function.__wrapped__  # what inference_mode made of it
        if isinstance(function, FunctionType) and not issubclass(self.cls, Switched):
            # the same code without its progress bar
            names = {**function.__globals__, "tqdm": _no_progress}
            quiet = FunctionType(
                function.__code__, names, function.__name__, function.__defaults__, function.__closure__
            )
            quiet.__kwdefaults__ = function.__kwdefaults__
            function = quiet
        result = function(copy, shape, **self.obj._trial_options)
        return [*(result if isinstance(result, tuple) else (result,)), self._draw()]


def _agree(theirs: Any, ours: Any) -> bool:
    """Whether two results are the same but for rounding."""
    if not (isinstance(theirs, Tensor) and isinstance(ours, Tensor)):
        return bool(theirs == ours)
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    there = theirs.isfinite()  # at eta 1 float32 takes the radicand below 0, which is made right
    return torch.allclose(theirs[there], ours[there], rtol=1e-3, atol=1e-3)


def _no_progress(items: Any, **_: Any) -> Any:
    return items


def _held_by(obj: Any) -> dict[str, Any]:
    """Where an object keeps its buffers."""
    attributes: dict[str, Any] = getattr(obj, "__dict__", {})
    held: dict[str, Any] = attributes.get("_buffers", attributes)
    return held


def _is_learned(cls: type) -> bool:
    return any(base.__name__ == _LEARNED for base in cls.__mro__)


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _identical(left: Tensor, right: Tensor) -> bool:
    same = left.shape == right.shape and left.dtype is right.dtype and left.device == right.device
    return same and torch.equal(left, right)


def _ordinary(x: Tensor) -> Tensor:
    """A state that a model can write to outside inference mode."""
    return x.clone() if x.is_inference() else x


def _laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _std_of_half(table: Table, row: int, model_output: Tensor, x: Tensor) -> Tensor:
    """The learned standard deviation of a half model output beside a wider x: the fraction itself is half."""
    # with a dimension, so that they promote
    min_log, max_log = table.to(x.device, x.dtype)[row, [COLUMN["min_log"], COLUMN["max_log"]]].split(1)
    fraction = (model_output[:, x.shape[1] :] + 1) * 0.5
    return (0.5 * (fraction * max_log + (1 - fraction) * min_log)).exp()


def _times(x: Tensor, t: int) -> Tensor:
    return torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
