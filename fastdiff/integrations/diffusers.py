"""diffusers' DDPM and DDIM schedulers with fused steps: the same configs, signatures, results and random draws.

    from fastdiff.integrations.diffusers import DDIMScheduler       # in place of diffusers'
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    fastdiff.enable(pipe)                                           # or the schedulers that a pipeline has

Each class here is a subclass of diffusers' class and goes by its name, so that pipelines and pickles that hold one are
saved under diffusers' class, and read where fastdiff is not.

What a step reads of the scheduler and its config it reads at every step, as diffusers does, and keeps the rows that it
made of them. A change that leaves no trace is not seen: one that goes around PyTorch's version counter (tensor.data, a
NumPy array of the same memory), and, in compiled code, one in place, or a method that is replaced.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral
from pathlib import PurePath
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import diffusers
    from diffusers.utils.torch_utils import randn_tensor
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ModuleNotFoundError(
        "fastdiff.integrations.diffusers: expected diffusers to be installed (pip install diffusers)", name="diffusers"
    ) from None

from .. import mersenne, ops
from ..noise import DTYPES
from ..schedules import NoiseSchedule
from ..tables import (
    COLUMN,
    COLUMNS,
    Structure,
    Table,
    ddim_inversion_table,
    ddim_table,
    ddpm_table,
    eps_table,
    fixed_table,
    given_x0_table,
    x0_table,
)
from ._host import Switched, _class_of, learned_step, step_of_x0, step_seeds

__all__ = [
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "mixin",
    "targets",
]

_OLDEST = (0, 38)
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small_log",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large_log",
    "learned": "learned_plain",
    "learned_range": "learned_range",
}
_MAX_PLANS = 64  # of a scheduler: an eta that is annealed must not fill the memory
_MAX_CHAINS = 16
_NO_CONTEXT = nullcontext()
_numbers = itertools.count()
_INDICES = (torch.int64, torch.int32)
_INTEGERS = (*_INDICES, torch.int16, torch.int8, torch.uint8)
_HALF = (torch.float16, torch.bfloat16)
_METHODS = ("step", "set_timesteps", "add_noise", "get_velocity", "batch_step_no_noise")
_ENTRIES = {"batch": "batch_step_no_noise"} | {name: name for name in ("set_timesteps", "add_noise", "get_velocity")}
_NAMES = {"ratio": "dynamic_thresholding_ratio", "max_value": "sample_max_value"}

_found = re.match(r"(\d+)\.(\d+)", diffusers.__version__)
if _found is None or (int(_found[1]), int(_found[2])) < _OLDEST:
    raise ImportError(
        f"fastdiff.integrations.diffusers: expected diffusers {_OLDEST[0]}.{_OLDEST[1]} or newer, got "
        f"{diffusers.__version__} (pip install --upgrade diffusers)"
    )


class _Seen:
    """A tensor as it was when a plan read it."""

    __slots__ = ("snapshot", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = self.snapshot = None
        if not tensor.is_inference():
            self.version = tensor._version
        elif tensor.device.type == "cpu":  # it counts no versions; elsewhere to compare would mean to wait
            self.snapshot = tensor.clone()

    def same(self, tensor: Tensor) -> bool:
        """Whether this is that tensor, and has not been modified since."""
        if tensor is not self.tensor:
            return False
        if self.version is not None:
            return bool(tensor._version == self.version)
        return self.snapshot is None or torch.equal(tensor, self.snapshot)


class _Plan:
    """The table of a scheduler's steps, and what it was made of.

    table: None where the steps are the original's: for `reason`, or, without one, because they raise its error.
    quiet: the table of the same steps without noise.  rows: of each timestep.  process: what is done to x0 in place of
    a clip.  layout: see `_layout`.  chain: the scheduler's timesteps.  alphas, final, timesteps: its tensors, of a plan
    that is kept.
    """

    __slots__ = ("alphas", "chain", "final", "layout", "process", "quiet", "reason", "rows", "table", "timesteps")

    alphas: _Seen
    final: _Seen
    timesteps: _Seen

    def __init__(self, chain: tuple[int, ...] = (), reason: str | None = None) -> None:
        self.chain = chain
        self.reason = reason
        self.table: Table | None = None
        self.quiet: Table | None = None
        self.rows: dict[int, int] = {}
        self.process: Callable[[Tensor], Tensor] | None = None
        self.layout: str | None = None


class _Memory:
    """What an enabled scheduler keeps to make its steps of.

    plans: by kind and options.  chains: of set_timesteps, by its arguments, tensors that are not handed out.  last:
    the chain that it set last, as it was handed out.
    """

    __slots__ = ("chains", "last", "plans")

    def __init__(self) -> None:
        self.plans: dict[tuple[Any, ...], _Plan] = {}
        self.chains: dict[tuple[Any, ...], tuple[Tensor, tuple[int, ...]]] = {}
        self.last: tuple[_Seen, tuple[int, ...]] | None = None


class _Scheduler(Switched):
    """What the mixins share."""

    config: Any
    alphas_cumprod: Tensor
    timesteps: Tensor
    num_inference_steps: Any

    _host: Any  # the class of diffusers
    _output: Any  # what its step returns
    _final: str  # the attribute with alpha_bar at the clean end
    _noise_at_0 = True  # whether a step from timestep 0 draws noise
    _parts: tuple[str, ...] = ("_get_variance", "_threshold_sample")  # the methods that its steps are made of
    _known: dict[str, Any]  # these and `_METHODS`, as diffusers has them

    def _probe(self) -> str | None:
        if "step" not in self.__dict__:
            return None
        # what was put there before is called in place of the step here, which then cannot tell
        reason = f"this {type(self).__name__} has a step of its own"
        self._fastdiff.fall_back(reason)
        self._fastdiff.kept[reason] = 0
        return reason

    def _overridden(self, kind: str) -> str | None:
        """Which of the methods of a kind of step are not those of diffusers: a subclass's, patched, the instance's."""
        cls: Any = type(self)
        known, entry = self._known, _ENTRIES.get(kind, "step")
        own = [entry] if getattr(_original_of(cls), entry, None) is not known[entry] else []
        if entry != kind:
            for name in self._parts:
                if getattr(cls, name) is not known[name] or name in self.__dict__:
                    own.append(name)
        return f"{cls.__name__} has a {' and a '.join(own)} of its own" if own else None

    @property
    def _memory(self) -> _Memory:
        tables = self._fastdiff.tables
        found: _Memory | None = tables.get("memory")
        if found is None:
            found = tables["memory"] = _Memory()
        return found

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, *args: Any, **options: Any) -> None:
        steps = num_inference_steps
        if (args == (None,) or options == {"timesteps": None}) and hasattr(self, "custom_timesteps"):
            args, options = (), {}
        if type(steps) is not int and isinstance(steps, Integral):
            steps = int(steps)
        if (
            type(steps) is not int
            or args
            or options
            or torch.compiler.is_compiling()
            or self._overridden("set_timesteps")
        ):
            super().set_timesteps(num_inference_steps, device, *args, **options)  # type: ignore[misc]
            return
        config, memory = self.config, self._memory
        options_of = config.timestep_spacing, config.steps_offset, config.num_train_timesteps
        key = steps, None if device is None else _resolved(device), *options_of
        kept = memory.chains.get(key)
        # a tensor of inference mode would not tell of its changes
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NO_CONTEXT:
            if kept is None:
                super().set_timesteps(steps, device)  # type: ignore[misc]
                timesteps = self.timesteps
                if len(timesteps) > steps:
                    timesteps = self._without_end(timesteps, steps).clone()
                kept = timesteps, tuple(timesteps.tolist())
                if len(memory.chains) >= _MAX_CHAINS:
                    del memory.chains[next(iter(memory.chains))]
                memory.chains[key] = kept
            elif hasattr(self, "custom_timesteps"):
                self.custom_timesteps = False
            self.num_inference_steps = num_inference_steps
            self.timesteps = kept[0].clone()
        memory.last = _Seen(self.timesteps), kept[1]
        self._fastdiff.tables["set"] = self.timesteps, kept[0]

    @staticmethod
    def _without_end(timesteps: Tensor, steps: int) -> Tensor:
        """Without the timestep -1 that rounding adds to some chains of "trailing"."""
        return timesteps[:steps]

    def _chain(self, memory: _Memory) -> tuple[int, ...]:
        """self.timesteps as ints, which are read from the device only where someone else has made it."""
        timesteps = self.timesteps
        if memory.last is not None:
            seen, chain = memory.last
            if seen.same(timesteps):
                return chain
            if timesteps._base is seen.tensor and seen.same(seen.tensor) and timesteps.dim() == 1:
                first, stride = timesteps.storage_offset() - seen.tensor.storage_offset(), timesteps.stride(0)
                return chain[first::stride][: len(timesteps)]
        return tuple(timesteps.tolist())

    def _plan(self, key: tuple[Any, ...]) -> _Plan:
        """The plan of a kind of step with all that it depends on but the tensors; `_fill` knows what the key says."""
        reason = self._overridden(key[0])
        if reason is not None:
            return _Plan(reason=reason)
        memory = self._fastdiff.tables.get("memory") or self._memory
        final = getattr(self, self._final)
        try:
            plan = memory.plans.get(key)
        except TypeError:
            return _Plan(reason="an option of the config that is not a number or a word")
        if plan is not None and plan.alphas.same(self.alphas_cumprod) and plan.final.same(final):
            if plan.timesteps.same(self.timesteps):
                return plan
            if type(self.timesteps) is Tensor and plan.chain == self._chain(memory):
                plan.timesteps = _Seen(self.timesteps)
                return plan
        for name in ("alphas_cumprod", self._final, "timesteps"):
            if type(getattr(self, name)) not in (Tensor, torch.nn.Parameter):
                return _Plan(reason=f"{name} is not a tensor")
        # a tensor that is made in sight of torch.func is not to be kept beyond
        with torch._C._DisableFuncTorch():
            plan = _Plan(self._chain(memory), self._fastdiff.disabled or _unknown(self.alphas_cumprod))
            plan.alphas, plan.final, plan.timesteps = _Seen(self.alphas_cumprod), _Seen(final), _Seen(self.timesteps)
            if plan.reason is None:
                try:
                    self._fill(plan, key)
                except (TypeError, ValueError, OverflowError) as error:
                    plan.reason = _reason_of(error)
        if len(memory.plans) >= _MAX_PLANS and key not in memory.plans:
            del memory.plans[next(iter(memory.plans))]
        memory.plans[key] = plan
        return plan

    def _fill(self, plan: _Plan, key: tuple[Any, ...]) -> None:
        config = self.config
        if key[0] in ("add_noise", "get_velocity"):
            plan.table = plan.quiet = _forward_table(key[0], self.alphas_cumprod, key[1])
            return
        prediction = _PREDICTIONS.get(config.prediction_type)
        if prediction is None:
            return
        clip = config.clip_sample_range if config.clip_sample else None
        # a thresholding is in place of the clip; like a clip, it comes after eps has been taken from x0
        plan.process = self._process()
        processed = plan.process is not None
        if processed:
            # to see that it takes the config, before noise is drawn
            ops.dynamic_threshold(
                torch.ones(1, 1, device="cpu"),
                config.dynamic_thresholding_ratio,
                config.sample_max_value,
                backend="reference",
            )
        plan.layout = self._layout(plan.process)
        schedule = NoiseSchedule.from_alphas_cumprod(self.alphas_cumprod.cpu().numpy())
        table = self._table(plan, key, schedule, prediction, 1.0 if processed else clip)
        plan.table = _form_of(table, clip=False) if processed else table
        plan.quiet = _form_of(plan.table, variance="none")
        plan.rows = plan.table.rows_of_t

    def _table(
        self, plan: _Plan, key: tuple[Any, ...], schedule: NoiseSchedule, prediction: str, clip: float | None
    ) -> Table:
        raise NotImplementedError

    def _key(self, kind: str, steps: Any, *options: Any) -> tuple[Any, ...]:
        config = self.config
        thresholding = getattr(config, "thresholding", False)  # the inversion has none
        return (
            kind,
            steps,
            config.num_train_timesteps,
            config.prediction_type,
            config.clip_sample,
            config.clip_sample_range,
            thresholding,
            thresholding and getattr(config, "dynamic_thresholding_ratio", None),
            thresholding and getattr(config, "sample_max_value", None),
            *options,
        )

    def _timestep(self, plan: _Plan, timestep: Any) -> Any:
        """A timestep as an int; a tensor elsewhere that the host cannot tell as it is; None for anything else."""
        if type(timestep) is int:
            return timestep
        if not isinstance(timestep, Tensor):
            return int(timestep) if isinstance(timestep, Integral) and not isinstance(timestep, bool) else None
        if timestep.dim() > 0:
            if timestep.shape != (1,) or timestep.dtype not in _INDICES:
                return None
        elif timestep.dtype not in _INTEGERS:
            return None
        if timestep.is_cpu:
            return int(timestep.item())
        index = _index_in(self.timesteps, timestep)
        return timestep if index is None else plan.chain[index]

    def _process(self) -> Any:
        """What is done to the predicted x0 in place of the clip: None, or the dynamic thresholding of the config."""
        return self._threshold if self.config.thresholding else None

    def _layout(self, process: Any) -> str | None:
        """How the results of a step lie in memory: None: like the sample; "output": the model output; "contiguous"."""
        if process is not None:
            return "contiguous"
        return "output" if self.config.prediction_type == "sample" else None

    def _threshold(self, x0: Tensor) -> Tensor:
        config, backend = self.config, self._fastdiff.options.backend
        # there is no kernel of it for Triton
        backend = "auto" if backend == "triton" else backend
        return ops.dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value, backend=backend)

    def _follow(
        self,
        key: tuple[Any, ...],
        model_output: Any,
        timestep: Any,
        sample: Any,
        draws: bool,
        generator: Any = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """A step by the plan of a key; None where it is the original's."""
        if type(model_output) is not Tensor or type(sample) is not Tensor:
            # before a plan is made in sight of whatever mode they come from
            reason = _foreign(model_output, sample, timestep)
            if reason is not None:
                return self._left(reason)
        plan = self._plan(key)
        if plan.table is None:
            return self._left(plan.reason)
        t = self._timestep(plan, timestep)
        row = plan.rows.get(t)
        if row is None and key[0] == "ddim":
            plan = self._plan(("ddim_all", *key[1:]))
            row = plan.rows.get(t)
        if plan.table is None or (row is None and not isinstance(t, Tensor)):
            return self._left(plan.reason or _outside(t, timestep))
        reason = self._misfit(model_output, sample, plan.table.structure.learned)
        if reason is not None:
            return self._left(reason or None)
        if isinstance(timestep, Tensor) and timestep.dim() and sample.dtype in _HALF:
            # coefficients of float32 that are no scalars make float32 of half
            return self._left("a timestep of shape (1,) beside half tensors")
        if row is None:
            return self._advance(plan, None, t, model_output, sample, draws, generator, noise)
        if t == 0 and not self._noise_at_0:
            draws = False
        return self._advance(plan, row, None, model_output, sample, draws, generator, noise)

    def _advance(
        self,
        plan: _Plan,
        row: int | None,
        t: Tensor | None,
        model_output: Tensor,
        sample: Tensor,
        draws: bool,
        generator: Any = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x0) of a step over a plan's table; draws: whether noise is added, which is drawn unless given."""
        state = self._fastdiff
        options = state.options
        table, seeds, drawn = plan.table, None, None
        assert table is not None and plan.quiet is not None
        learned = table.structure.learned
        if not draws:
            table = plan.quiet
            if learned:
                model_output = model_output[:, : sample.shape[1]]
        elif noise is None:
            if type(generator) is list and len(generator) == 1:
                generator = generator[0]
            if options.noise == "philox":
                seeds = step_seeds(options, generator, sample.shape[0], sample.device)
            elif _draws_itself(sample, generator) and not learned:
                drawn = generator if generator is not None else torch.cuda.default_generators[sample.device.index]
            else:
                noise = _randn(sample.shape, generator, sample.device, model_output.dtype)
        state.fused += 1
        process = plan.process
        if learned and noise is not None:
            if row is None:
                found = learned_step(
                    table, model_output, t, sample, noise=noise, process=process, rounding=options.rounding,
                    backend=options.backend,
                )  # fmt: skip
                return _laid_out(found, plan.layout, model_output)
            model_output, predicted = torch.split(model_output, sample.shape[1], dim=1)
            noise, table = _learned_noise(table, row, predicted, noise), fixed_table(table)
        if process is None:
            found = ops.step_with_x0(
                table, model_output, t, sample, row=row, noise=noise, seeds=seeds, generator=drawn,
                rounding=options.rounding, backend=options.backend,
            )  # fmt: skip
        else:
            found = step_of_x0(
                table, model_output, t, sample, process, row=row, noise=noise, seeds=seeds, generator=drawn,
                rounding=options.rounding, backend=options.backend,
            )  # fmt: skip
        return found if plan.layout is None else _laid_out(found, plan.layout, model_output)

    def _result(self, found: tuple[Tensor, Tensor], return_dict: bool) -> Any:
        if not return_dict:
            return found
        output = self._output
        if torch.compiler.is_compiling():
            return output(prev_sample=found[0], pred_original_sample=found[1])
        # an OrderedDict whose items are attributes too; its constructor takes a fifth of the time of a small step
        result = OrderedDict.__new__(output)
        attributes = result.__dict__
        for name, value in zip(("prev_sample", "pred_original_sample"), found, strict=True):
            attributes[name] = value
            OrderedDict.__setitem__(result, name, value)
        return result

    def _left(self, reason: str | None) -> Any:
        """Note that a step is the original's for a reason; without one it is there to raise an error."""
        if reason is not None:
            self._fastdiff.fall_back(reason)
        return None

    def _misfit(self, model_output: Any, sample: Any, wide: bool = False) -> str | None:
        """Why tensors are left to the original step; "" where that is for it to say, None where they are not."""
        if (
            type(model_output) is type(sample) is Tensor
            and model_output.shape == sample.shape
            and model_output.dtype is sample.dtype is torch.float32
            and model_output.is_cpu
            and sample.is_cpu
            and self.alphas_cumprod.is_cpu
            and sample.dim()
            and not wide
        ):
            return None
        if not (isinstance(model_output, Tensor) and isinstance(sample, Tensor)) or not sample.dim():
            return ""
        shape = sample.shape
        if wide and len(shape) > 1:
            shape = torch.Size((shape[0], 2 * shape[1], *shape[2:]))
        if model_output.shape != shape:
            return "a model output of another shape than its sample" + (" and variance" if wide else "")
        alphas = self.alphas_cumprod.device
        if model_output.device != sample.device or (alphas.type != "cpu" and alphas != sample.device):
            return ""
        if sample.dtype not in DTYPES or model_output.dtype not in DTYPES:
            return ""
        if model_output.dtype is not sample.dtype:
            if sample.dtype is not torch.float32 or model_output.dtype is torch.float64:
                return "a model output of another dtype than its sample"
            if self._fastdiff.options.rounding == "host":
                return "a half model output beside a float32 sample (taken with rounding='once')"
        return None

    def _batch_step(self, options: tuple[Any, ...], model_output: Any, timesteps: Any, sample: Any) -> Tensor | None:
        """A step without noise, the timestep of each sample its own; coefficients are tensors, not scalars, there."""
        if not isinstance(model_output, Tensor) or not isinstance(timesteps, Tensor):
            return None
        if torch.compiler.is_compiling():
            return _traced_left(self, "batch_step_no_noise in compiled code")
        self.alphas_cumprod = self.alphas_cumprod.to(model_output.device)
        foreign = _foreign(model_output, sample, timesteps)
        if foreign is not None:
            return self._left(foreign)
        plan = self._plan(self._key("batch", self.num_inference_steps, *options))
        if plan.table is None:
            return self._left(plan.reason)
        learned = getattr(self, "variance_type", None) in ("learned", "learned_range")
        if learned and isinstance(sample, Tensor) and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        if isinstance(sample, Tensor) and sample.dtype in _HALF:
            if plan.process is not None and self.config.prediction_type == "sample":
                return self._left("a thresholding of half model outputs that are x0 themselves")
            # a tensor of float32 coefficients makes float32 of half
            model_output, sample = model_output.float(), sample.float()
        reason = self._misfit(model_output, sample)
        if reason is not None:
            return self._left(reason or None)
        t = timesteps.reshape(-1)
        reason = _misplaced(t, len(sample), len(plan.rows))
        if reason is not None:
            return self._left(reason or None)
        return self._advance(plan, None, t.to(sample.device), model_output, sample, False)[0]

    def _traced_step(
        self,
        key: tuple[Any, ...],
        model_output: Any,
        timestep: Any,
        sample: Any,
        draws: bool,
        generator: Any = None,
        noise: Any = None,
    ) -> tuple[Tensor, Tensor] | None:
        """A step in code that is being compiled, which knows neither t nor, of tensors, what is in them."""
        timesteps = self.timesteps
        _prepare_to_trace(self)
        handed_out, kept = self._fastdiff.tables["set"]
        if timesteps is handed_out:
            timesteps = kept  # which is the same one whenever these are set again
        identities = id(self.alphas_cumprod), id(getattr(self, self._final)), id(timesteps)
        # numbers that have changed are symbols to the tracer, but not as the keys of a dict, or floats as text
        constants = tuple([(value.hex(),) if type(value) is float else list({value: None})[0] for value in key])
        name = _traced_table(self, constants, draws, *identities)
        if name is None:
            return None
        table = getattr(self._fastdiff.tables["traced"], name)
        reason = self._misfit(model_output, sample, table.structure.learned)
        if generator is not None:
            reason = "a generator in compiled code"
        if reason is not None:
            return _traced_left(self, reason)
        options = self._fastdiff.options
        if isinstance(timestep, Tensor):
            t = timestep.reshape(-1).to(sample.device)
        else:
            t = torch.full((1,), timestep, dtype=torch.int64, device=sample.device)
        seeds = None
        if draws and noise is None:
            if options.noise == "philox":
                seeds = step_seeds(options, None, sample.shape[0], sample.device)
            else:
                noise = torch.randn(sample.shape, dtype=model_output.dtype, device=sample.device)
        where: dict[str, Any] = {"rounding": options.rounding, "backend": options.backend}
        process = self._process()
        if table.structure.learned and noise is not None:
            found = learned_step(table, model_output, t, sample, noise=noise, process=process, **where)
        elif process is not None:
            found = step_of_x0(table, model_output, t, sample, process, noise=noise, seeds=seeds, **where)
        else:
            found = ops.step_with_x0(table, model_output, t, sample, noise=noise, seeds=seeds, **where)
        return _laid_out(found, self._layout(process), model_output)


class _WithForward(_Scheduler):
    """A scheduler that also adds noise to clean samples."""

    def _forward(self, kind: str, clean: Any, noise: Any, timesteps: Any) -> Tensor | None:
        """alphas_cumprod[t].sqrt() * clean + (1 - alphas_cumprod[t]).sqrt() * noise, or minus, as diffusers has it."""
        if not (isinstance(clean, Tensor) and isinstance(noise, Tensor) and isinstance(timesteps, Tensor)):
            return None
        if torch.compiler.is_compiling():
            return _traced_left(self, f"{kind} in compiled code")
        # where diffusers moves it to, for good
        self.alphas_cumprod = self.alphas_cumprod.to(device=clean.device)
        reason = _foreign(clean, noise, timesteps) or self._misfit(noise, clean)
        if reason is not None:
            return self._left(reason or None)
        plan = self._plan((kind, clean.dtype))
        if plan.table is None:
            return self._left(plan.reason)
        t = timesteps.reshape(-1)
        reason = _misplaced(t, len(clean), len(self.alphas_cumprod))
        if reason is not None:
            return self._left(reason or None)
        options = self._fastdiff.options
        where: dict[str, Any] = {"rounding": options.rounding, "backend": options.backend}
        found = ops.add_noise(clean, t.to(clean.device), plan.table, noise=noise, **where)
        assert isinstance(found, Tensor)
        return found

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        found = self._forward("add_noise", original_samples, noise, timesteps)
        return super().add_noise(original_samples, noise, timesteps) if found is None else found  # type: ignore[misc]

    def get_velocity(self, sample: Any, noise: Any, timesteps: Any) -> Any:
        found = self._forward("get_velocity", noise, sample, timesteps)
        return super().get_velocity(sample, noise, timesteps) if found is None else found  # type: ignore[misc]


class _DDPM(_WithForward):
    """Ho et al. 2020 (arXiv:2006.11239), eq. 7; a step leads to the next of `timesteps`, and the last to the data."""

    custom_timesteps: bool
    variance_type: Any
    one: Tensor
    _final = "one"
    _noise_at_0 = False
    _parts = (*_Scheduler._parts, "previous_timestep")

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        found = self._step(model_output, timestep, sample, generator)
        if found is None:
            return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)  # type: ignore[misc]
        return self._result(found, return_dict)

    def _step(self, model_output: Any, timestep: Any, sample: Any, generator: Any) -> tuple[Tensor, Tensor] | None:
        chain = bool(self.custom_timesteps or self.num_inference_steps)
        key = self._key("ddpm", chain, self.variance_type, self.config.variance_type)
        if torch.compiler.is_compiling():
            draws = True
            if not isinstance(timestep, Tensor) and timestep <= 0:
                draws = False  # and not the comparison, which is a symbol to the tracer
            return self._traced_step(key, model_output, timestep, sample, draws, generator)
        return self._follow(key, model_output, timestep, sample, True, generator)

    def _table(
        self, plan: _Plan, key: tuple[Any, ...], schedule: NoiseSchedule, prediction: str, clip: float | None
    ) -> Table:
        total = schedule.num_timesteps
        options: dict[str, Any] = {
            "prediction": prediction,
            "clip": clip,
            "host": "diffusers",
            "device": self.alphas_cumprod.device,
        }
        if key[0] == "batch":
            moves = _strides(range(total), self.config.num_train_timesteps, self.num_inference_steps or None)
            return ddpm_table(schedule, moves, noise=False, **options)
        if self.one != 1:
            raise ValueError("one: expected 1")
        chain = plan.chain if key[1] else tuple(range(total))[::-1]
        after = dict(reversed(list(zip(chain, (*chain[1:], -1), strict=True))))  # the first visit counts
        moves = [(t, max(after[t], -1)) for t in dict.fromkeys(chain) if 0 <= t < total]
        return ddpm_table(schedule, moves, variance=self._variance(), **options)

    def _variance(self) -> str:
        own, config = self.variance_type, self.config.variance_type
        special = ("fixed_small_log", "learned", "learned_range")
        # the attribute says what is done with the variance that the config names
        if own != config and (own in special or config in special):
            raise ValueError("a variance_type of the scheduler unlike that of its config")
        return _VARIANCES.get(config, "fixed_small")


class _DDPMParallel(_DDPM):
    def batch_step_no_noise(self, model_output: Any, timesteps: Any, sample: Any) -> Any:
        found = self._batch_step((), model_output, timesteps, sample)
        return super().batch_step_no_noise(model_output, timesteps, sample) if found is None else found  # type: ignore[misc]


class _DDIM(_WithForward):
    final_alpha_cumprod: Tensor
    _final = "final_alpha_cumprod"

    def step(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Any = None,
        variance_noise: Any = None,
        return_dict: bool = True,
    ) -> Any:
        found = None
        if self.num_inference_steps is not None:
            found = self._step(model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise)
        if found is None:
            return super().step(  # type: ignore[misc]
                model_output,
                timestep,
                sample,
                eta=eta,
                use_clipped_model_output=use_clipped_model_output,
                generator=generator,
                variance_noise=variance_noise,
                return_dict=return_dict,
            )
        return self._result(found, return_dict)

    def _step(
        self, model_output: Any, timestep: Any, sample: Any, eta: Any, clipped: Any, generator: Any, noise: Any
    ) -> tuple[Tensor, Tensor] | None:
        if not isinstance(eta, (float, int)) or not 0 <= eta <= 1:
            reason = "an eta that is not a number from 0 to 1"
            return _traced_left(self, reason) if torch.compiler.is_compiling() else self._left(reason)
        draws = False
        if eta > 0:  # the comparison of an eta that has changed is a symbol to the tracer
            draws = True
        if noise is not None and draws:
            if generator is not None:
                return None
            if type(noise) is not Tensor or noise.shape != sample.shape or noise.dtype is not sample.dtype:
                reason = "a variance_noise unlike the sample"
                return _traced_left(self, reason) if torch.compiler.is_compiling() else self._left(reason)
        options = self.num_inference_steps, eta, bool(clipped)
        if torch.compiler.is_compiling():
            return self._traced_step(
                self._key("ddim_all", *options), model_output, timestep, sample, draws, generator, noise
            )
        key = self._key("ddim", *options)
        return self._follow(key, model_output, timestep, sample, draws, generator, noise if draws else None)

    def _table(
        self, plan: _Plan, key: tuple[Any, ...], schedule: NoiseSchedule, prediction: str, clip: float | None
    ) -> Table:
        kind, eta, clipped = key[0], key[-2], key[-1]
        total = schedule.num_timesteps
        some = [t for t in dict.fromkeys(plan.chain) if 0 <= t < total] if kind == "ddim" else []
        return ddim_table(
            schedule,
            _strides(some or range(total), self.config.num_train_timesteps, self.num_inference_steps),
            eta=eta,
            prediction=prediction,
            clip=clip,
            eps="rederived" if clipped else "raw",
            # which batch_step_no_noise does not look at
            final_alpha=1.0 if kind == "batch" else float(self.final_alpha_cumprod),
            host="diffusers",
            device=self.alphas_cumprod.device,
        )


class _DDIMParallel(_DDIM):
    _parts = (*_DDIM._parts, "_batch_get_variance")

    def batch_step_no_noise(
        self,
        model_output: Any,
        timesteps: Any,
        sample: Any,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
    ) -> Any:
        found = None
        if self.num_inference_steps is not None and isinstance(eta, (float, int)) and eta == 0:
            self.final_alpha_cumprod = self.final_alpha_cumprod.to(model_output.device)
            found = self._batch_step((0.0, bool(use_clipped_model_output)), model_output, timesteps, sample)
        if found is None:
            return super().batch_step_no_noise(model_output, timesteps, sample, eta, use_clipped_model_output)  # type: ignore[misc]
        return found


class _DDIMInverse(_Scheduler):
    initial_alpha_cumprod: Tensor
    _final = "initial_alpha_cumprod"
    _parts = ()

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        found = None if self.num_inference_steps is None else self._step(model_output, timestep, sample)
        if found is None:
            return super().step(model_output, timestep, sample, return_dict=return_dict)  # type: ignore[misc]
        return self._result(found, return_dict)

    def _step(self, model_output: Any, timestep: Any, sample: Any) -> tuple[Tensor, Tensor] | None:
        key = self._key("inverse", self.num_inference_steps)
        if torch.compiler.is_compiling():
            return self._traced_step(key, model_output, timestep, sample, False)
        return self._follow(key, model_output, timestep, sample, False)

    def _table(
        self, plan: _Plan, key: tuple[Any, ...], schedule: NoiseSchedule, prediction: str, clip: float | None
    ) -> Table:
        total = schedule.num_timesteps
        return ddim_inversion_table(
            schedule,
            _strides(range(total), self.config.num_train_timesteps, self.num_inference_steps),
            prediction=prediction,
            clip=clip,
            final_alpha=float(self.initial_alpha_cumprod),
            host="diffusers",
            device=self.alphas_cumprod.device,
        )

    def _process(self) -> Any:
        return None  # whatever its config says: it comes from another scheduler's

    @staticmethod
    def _without_end(timesteps: Tensor, steps: int) -> Tensor:
        return timesteps[-steps:]  # which ascend


def _strides(timesteps: Any, total: int, steps: int | None) -> list[tuple[int, int]]:
    """(t, t - total // steps), the last step of DDIM and of batches leading below 0."""
    stride = total // (steps or total)
    return [(t, max(t - stride, -1)) for t in timesteps]


def _resolved(device: Any) -> torch.device:
    """A device with its index, which without one is that of the current device."""
    device = torch.device(device)
    return device if device.index is not None or device.type == "cpu" else torch.empty(0, device=device).device


def _reason_of(error: Exception) -> str:
    """Why a scheduler has no table, without the value, of which there may be many."""
    argument = re.match(r"(\w+): ", str(error))
    return f"an unsupported value of {_NAMES.get(argument[1], argument[1])}" if argument else str(error)


def _foreign(*values: Any) -> str | None:
    """Which of some values is a tensor of a class of its own, None if none is."""
    for value in values:
        if isinstance(value, Tensor) and type(value) not in (Tensor, torch.nn.Parameter):
            return f"a {type(value).__name__} in place of a tensor"
    return None


def _outside(t: int | None, timestep: Any) -> str | None:
    """Why a timestep without a row is diffusers' own; None where that is an error."""
    if t is not None:
        return "a negative timestep" if t < 0 else None
    single = not isinstance(timestep, Tensor) or (timestep.numel() == 1 and not timestep.is_floating_point())
    return "a timestep that is neither an integer nor a tensor of one" if single else None


def _misplaced(timesteps: Tensor, batch: int, total: int) -> str | None:
    """Why the timesteps of a batch are left to diffusers; "" where they are an error, None where they are not."""
    if timesteps.dtype not in _INDICES or len(timesteps) not in (1, batch) or not batch:
        return "timesteps that are not an integer for each sample"
    if timesteps.device.type != "cpu":
        return None
    values = timesteps.tolist()
    if max(values) >= total or min(values) < -total:
        return ""
    return "a negative timestep" if min(values) < 0 else None


def _laid_out(found: tuple[Tensor, Tensor], layout: str | None, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """The results of a step, from the layout of its sample to another; see `_Scheduler._layout`."""
    x_prev, x0 = found
    if layout == "contiguous":
        return x_prev.contiguous(), x0.contiguous()
    if layout == "output":
        like = model_output[:, : x0.shape[1]] if model_output.dim() > 1 else model_output
        if like.stride() != x0.stride():
            x_prev, x0 = (torch.empty_like(like, dtype=one.dtype).copy_(one) for one in found)
    return x_prev, x0


def _unknown(alphas_cumprod: Any) -> str | None:
    if not isinstance(alphas_cumprod, Tensor) or alphas_cumprod.dtype is not torch.float32 or alphas_cumprod.dim() != 1:
        return "an alphas_cumprod that is not a float32 vector"
    return "an alphas_cumprod that requires grad" if alphas_cumprod.requires_grad else None


def _form_of(table: Table, **form: Any) -> Table:
    """The rows of a table with some of its terms in another form."""
    structure = replace(table.structure, **form)
    if structure == table.structure:
        return table
    return Table(table.rows, structure, table.timesteps, name=table.name, host=table.host, scalars=table.scalars)


def _forward_table(kind: str, alphas_cumprod: Tensor, dtype: torch.dtype) -> Table:
    """add_noise or get_velocity: roots in the dtype of the samples, from alphas_cumprod rounded to it."""
    alphas = alphas_cumprod.to(dtype)
    signal, noise = alphas**0.5, (1 - alphas) ** 0.5
    rows = torch.zeros(len(alphas), len(COLUMNS), dtype=torch.float64, device="cpu")
    rows[:, [COLUMN["pd"], COLUMN["gd"]]] = 1.0
    rows[:, COLUMN["ax"]] = signal.double().cpu()
    rows[:, COLUMN["s"]] = (noise if kind == "add_noise" else -noise).double().cpu()
    rows[:, COLUMN["t"]] = torch.arange(len(alphas), dtype=torch.float64, device="cpu")
    structure = Structure(x0="none", a0=False, ax=True, variance="fixed")
    return Table(rows, structure, range(len(alphas)), name="add_noise", host="diffusers")


def _learned_noise(table: Table, row: int, predicted: Tensor, noise: Tensor) -> Tensor:
    """Noise times the standard deviation that is predicted, by torch's exponential and root, as diffusers has it."""
    if table.structure.variance == "learned_plain":
        return predicted**0.5 * noise
    # scalars that come second are not rounded to half, unlike those of the step
    lowest, highest = table.to("cpu", torch.float32)[row, [COLUMN["min_log"], COLUMN["max_log"]]].unbind()
    fraction = (predicted + 1) / 2
    return torch.exp(0.5 * (fraction * highest + (1 - fraction) * lowest)) * noise


def _index_in(timesteps: Tensor, timestep: Tensor) -> int | None:
    """Where in `timesteps` a 0-dimensional tensor is an element of it, told by its address; None if it is not one."""
    if timesteps.dim() != 1 or timesteps.dtype is not timestep.dtype or timesteps.device != timestep.device:
        return None
    step = timesteps.stride(0) * timesteps.element_size()
    index, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), step) if step else (-1, 0)
    return index if rest == 0 and 0 <= index < len(timesteps) else None


def _randn(shape: torch.Size, generator: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """diffusers' randn_tensor."""
    if device.type == "cpu" and (
        generator is None or type(generator) is torch.Generator and generator.device == device
    ):
        return mersenne.randn(shape, generator, dtype)
    found: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return found


def _draws_itself(sample: Tensor, generator: Any) -> bool:
    """Whether the step can make torch's numbers itself, on the way."""
    if not sample.is_cuda or torch.cuda.is_current_stream_capturing():
        return False
    return generator is None or (isinstance(generator, torch.Generator) and generator.device == sample.device)


def _traced_table(scheduler: _Scheduler, key: tuple[Any, ...], noise: bool, *identities: int) -> str | None:
    """Where compiled code finds the table of a plan: a name in State.tables["traced"]; None for an original step."""
    plan = scheduler._plan(tuple([float.fromhex(value[0]) if type(value) is tuple else value for value in key]))
    table = plan.table if noise else plan.quiet
    if table is None or plan.reason is not None:
        scheduler._left(plan.reason)
        return None
    if plan.process is not None:
        # the parts of its steps, whose values a tracer could not look at
        fixed = fixed_table(table) if table.structure.learned else table
        x0_table(fixed)
        given_x0_table(fixed)
        if fixed.structure.eps == "linear":
            eps_table(fixed)
    places = scheduler._fastdiff.tables["traced"]
    for name, known in vars(places).items():
        if known is table:
            return str(name)
    if len(vars(places)) >= _MAX_PLANS:
        delattr(places, next(iter(vars(places))))
    # never a name that was another table's, which compiled code may still look for
    name = f"table_{next(_numbers)}"
    setattr(places, name, table)
    return name


def _prepare_to_trace(scheduler: _Scheduler) -> None:
    """Make what compiled code reads of a state, before the tracer looks."""
    tables = scheduler._fastdiff.tables
    tables.setdefault("set", (None, None))
    tables.setdefault("traced", SimpleNamespace())


def _traced_left(scheduler: _Scheduler, reason: str) -> Any:
    """`_Scheduler._left` of compiled code: once when it is traced."""
    return scheduler._left(reason or None)


# As torch.compiler.assume_constant_result marks it, which would import the compiler here. A constant by itself could
# be no table: what compiled code finds at an attribute, it can check again.
_traced_table._dynamo_marked_constant = True  # type: ignore[attr-defined]
_prepare_to_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]
_traced_left._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _original_of(cls: Any) -> Any:
    """The class of diffusers, or its subclass, that one here was made of."""
    return cls._original()


def _mixin(base: type[_Scheduler], name: str, output: str) -> type[_Scheduler]:
    """The mixin of a class of diffusers, with its signatures and documentation."""
    host: Any = getattr(diffusers, name)
    attributes: dict[str, Any] = {"_host": host, "_output": getattr(importlib.import_module(host.__module__), output)}
    # patches that were there first are told by the file that they come from
    module = host.__module__.rpartition(".")[2]
    attributes["_known"] = known = dict.fromkeys((*_METHODS, *base._parts))
    for method in known:
        code = getattr(getattr(host, method, None), "__code__", None)
        if code is not None and PurePath(code.co_filename).stem == module:
            known[method] = getattr(host, method)
    for method in _METHODS:
        own = getattr(base, method, None)
        theirs = getattr(host, method, None)
        if own is not None and theirs is not None:
            copied = FunctionType(own.__code__, own.__globals__, method, own.__defaults__, own.__closure__)
            attributes[method] = functools.update_wrapper(copied, theirs)
    return type(f"_{name}", (base,), attributes)


_MIXINS = {
    name: _mixin(base, name, output)
    for name, base, output in (
        ("DDPMScheduler", _DDPM, "DDPMSchedulerOutput"),
        ("DDIMScheduler", _DDIM, "DDIMSchedulerOutput"),
        ("DDIMInverseScheduler", _DDIMInverse, "DDIMSchedulerOutput"),
        ("DDPMParallelScheduler", _DDPMParallel, "DDPMParallelSchedulerOutput"),
        ("DDIMParallelScheduler", _DDIMParallel, "DDIMParallelSchedulerOutput"),
    )
}


def mixin(target: Any) -> type[Switched]:
    """The mixin for a scheduler.  ValueError for one of another family, with the line to write instead."""
    for name, found in _MIXINS.items():
        if isinstance(target, getattr(diffusers, name)):
            return found
    raise ValueError(
        f"obj: expected one of {', '.join(_MIXINS)}, got {type(target).__name__}, a scheduler of another family, whose "
        "steps fastdiff does not have. To sample by DDIM instead:\n"
        "    pipe.scheduler = fastdiff.integrations.diffusers.DDIMScheduler.from_config(pipe.scheduler.config)"
    )


def targets(obj: Any) -> dict[str, Any]:
    """A scheduler, or those of a pipeline by their names there: all of them.

    TypeError for anything else.
    """
    if isinstance(obj, diffusers.SchedulerMixin):
        return {"": obj}
    found = {name: part for name, part in vars(obj).items() if isinstance(part, diffusers.SchedulerMixin)}
    if not found:
        raise TypeError(f"obj: expected a scheduler or a pipeline that has one, got {type(obj).__name__}")
    return found


DDPMScheduler: Any = _class_of(_MIXINS["DDPMScheduler"], diffusers.DDPMScheduler)
DDIMScheduler: Any = _class_of(_MIXINS["DDIMScheduler"], diffusers.DDIMScheduler)
DDIMInverseScheduler: Any = _class_of(_MIXINS["DDIMInverseScheduler"], diffusers.DDIMInverseScheduler)
DDPMParallelScheduler: Any = _class_of(_MIXINS["DDPMParallelScheduler"], diffusers.DDPMParallelScheduler)
DDIMParallelScheduler: Any = _class_of(_MIXINS["DDIMParallelScheduler"], diffusers.DDIMParallelScheduler)
