"""The steps of a GaussianDiffusion, fused: what takes their place on an object, and on the classes of this package.

An object is judged by what it computes (`Steps._probe`), never by where its class comes from. Its enums are compared
by name, its tables are those of its own betas, and it is asked for everything else when a step is made.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import mersenne, ops, torch_stream
from ...tables import Table, x0_table
from .._hooks import Found
from .._host import State, Switched, step_seeds
from ._forks import Probed, probe
from ._kept import HOOKS, READ, STEPS, Function, Kept, Result, log_variance

_HALF = (torch.float16, torch.bfloat16)

_F = TypeVar("_F", bound=Function)
_S = TypeVar("_S", bound="Steps")


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
        if probed is None or not probed.hooks.are_same():
            probed = state.tables["probed"] = self._fastdiff_probe()
        if method in probed.reasons:
            reason: str = probed.reasons[method]
            return reason
        if not _HOOK_SET.isdisjoint(self.__dict__):
            return f"{min(_HOOK_SET & self.__dict__.keys())} of the object was replaced"
        return kept.why_not(READ[method])

    def _fastdiff_probe(self) -> Probed:
        """What is to be known of the object before its steps are fused."""
        cls, original = type(self), type(self)._original()
        overridden = _overridden(cls, original)
        if overridden or issubclass(original, Steps):
            return Probed(overridden, Found((cls,), HOOKS))
        return probe(self, original, [method for method, faces in _FACES.items() if isinstance(self, faces)])

    def __copy__(self: _S) -> _S:
        return _as_probed(super().__copy__(), self)

    def __deepcopy__(self: _S, memo: dict[int, Any]) -> _S:
        return _as_probed(super().__deepcopy__(memo), self)

    def _probe(self) -> str | None:
        self._fastdiff.tables["probed"] = self._fastdiff_probe()
        for method in STEPS:
            if not isinstance(self, _FACES[method]):
                # nothing of fastdiff is called there, to say so later
                reason = f"{method} of a signature that is not OpenAI's"
                self._fastdiff.fall_back(reason)
                self._fastdiff.kept[reason] = 0
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
        kept = self._fastdiff_kept(READ[method])
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


def _as_probed(copied: _S, source: Steps) -> _S:
    """A copy, which is what its source was found to be."""
    probed = source._fastdiff.tables.get("probed")
    if probed is not None and type(copied) is type(source):
        copied._fastdiff.tables["probed"] = probed
    return copied


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
        if _is_dense(self.state, self.x):
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
        noise = mersenne.randn_like(x)
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


def _is_dense(state: State, x: Tensor) -> bool:
    """Whether the product of a coefficient and a state is contiguous where the original computes it.

    On a CPU torch makes a full tensor of a float32 coefficient beside a float64 state.
    """
    dense: bool = state.tables["probed"].dense
    return dense or (x.dtype == torch.float64 and x.device.type == "cpu")


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
        kept = self._fastdiff_kept(READ["q_sample"])
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
        return x_t.contiguous() if _is_dense(self._fastdiff, x_t) else x_t


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
_HOOK_SET = frozenset(HOOKS)


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


def _overridden(cls: type, original: type) -> dict[str, str]:
    """Why the steps of a class are made by functions of its own, where the fused ones are those of another class.

    That is the original one, or the class of this package from which the original one is derived.
    """
    package = __name__.rpartition(".")[0]
    known = next((base for base in original.__mro__ if base.__module__.startswith(package)), original)
    for hook in HOOKS:
        function = inspect.getattr_static(cls, hook, None)
        # a wrapper may have the module of what it wraps
        patched = known is not original and not getattr(function, "__module__", package).startswith(package)
        if patched or function is not inspect.getattr_static(known, hook, None):
            return dict.fromkeys(_FACES, f"{hook} of {cls.__name__} is not that of {known.__name__}")
    return {}
