"""Samplers: a table of rows, and how the network is called.

A sampler is a small frozen object. `step` is one row of its table as one fused operation; `sample`, `iterate` and
`invert` call the network and that operation in turn, all through the one loop of this file.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from . import backprop, ops
from .noise import DTYPES, Generators, check_generators, compute_dtype, normal, randn
from .noise import seeds as noise_seeds
from .ops import Backend, ClipGrad, Reduction, Rounding
from .schedules import NoiseSchedule, Steps, enter, integer, is_many, pairs, timesteps
from .tables import COLUMN, Clip, Structure, Table, ddim_inversion_table, ddim_table, ddpm_table

if TYPE_CHECKING:
    from .graphs import CapturedSampler

__all__ = ["DDIMSampler", "DDPMSampler", "Sampler", "TableSampler", "slerp", "to_uint8"]

Time = Literal["index", "float", "scaled_1000", "fraction"]
Keep: TypeAlias = "int | Iterable[int] | Callable[[int, int], bool]"
Kept: TypeAlias = "list[tuple[int, Tensor]]"

_TIMES = ("index", "float", "scaled_1000", "fraction")
# What a number of steps means in each codebase, unless a spacing is given.
_HOST_SPACING = {"openai": "openai", "lucidrains": "lucidrains", "diffusers": "leading", "ermongroup": "uniform"}


class Sampler:
    """What every sampler does with its table; `DDPMSampler`, `DDIMSampler` and `TableSampler` fill it.

    Attributes:
        table: the rows, one per step (`fastdiff.tables`).
        schedule: the NoiseSchedule behind the table, or None.
        time: what the model is told of the timestep: "index" (int64), "float", "scaled_1000" (t*1000/T, OpenAI's
            rescale_timesteps) or "fraction" (t/T). The three last are float32, float64 for a float64 state. T is
            the number of noised timesteps of the schedule.
        rounding, backend, clip_grad: as in `fastdiff.ops.step`.
    """

    table: Table
    schedule: NoiseSchedule | None
    time: Time
    rounding: Rounding
    backend: Backend
    clip_grad: ClipGrad
    _random: bool

    def _settle(self, table: Table) -> None:
        """Finish the construction: the table, and the checks that every sampler shares."""
        _one_of("time", self.time, _TIMES)
        _one_of("rounding", self.rounding, ("once", "host"))
        _one_of("backend", self.backend, ops.BACKENDS)
        _one_of("clip_grad", self.clip_grad, ops.CLIP_GRADS)
        if self.schedule is None and self.time in ("scaled_1000", "fraction"):
            raise ValueError(f"schedule: expected a NoiseSchedule with time={self.time!r}, got None")
        # the dataclass is frozen; read at every step, hence no properties
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "_random", table.structure.variance != "none")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The training timesteps of the chain, in the order they are visited."""
        return self.table.timesteps

    # One step

    @overload
    def step(
        self,
        model_output: Tensor,
        t: int | Tensor | None,
        x: Tensor,
        *,
        log_prob: Literal[False] = False,
        **options: Any,
    ) -> Tensor: ...

    @overload
    def step(
        self, model_output: Tensor, t: int | Tensor | None, x: Tensor, *, log_prob: Literal[True], **options: Any
    ) -> tuple[Tensor, Tensor]: ...

    def step(  # type: ignore[misc]  # as in sample
        self,
        model_output: Tensor,
        t: int | Tensor | None,
        x: Tensor,
        *,
        row: int | None = None,
        seeds: int | Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generators | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        backend: Backend | None = None,
        log_prob: bool = False,
        reduction: Reduction = "sum",
        min_logprob_std: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One step x_t -> x_{t-1}, as one fused operation.

        Args:
            model_output: what the network gave for x: [B, ...] like x, [B, 2C, ...] for a learned variance.
            t: the training timestep: an int of the chain, or an integer tensor [B] or [] on x's device, which the
                host never reads (out of the chain: NaN for that sample). Under torch.compile pass a tensor: an int is
                a constant of the compiled code, which is compiled again for every value.
            x: the state [B, ...]: float32, float64, float16 or bfloat16, any strides.
            row: the step's number in the chain, in place of t (then None); needed where a timestep is visited twice.
            seeds: an int or an int64 tensor [B]; see `fastdiff.noise`. With no source of noise given, one is drawn
                from torch's default CPU generator. Not looked at by a sampler that adds no noise.
            noise: the noise itself, like x.
            generator: torch's own stream: one torch.randn of x's shape, dtype and device, or a draw [1, ...] from
                each of B generators. Nothing is drawn for a step (of an int t, or a row) that adds no noise.
            uncond_output, guidance_scale: guidance: the step of uncond + scale*(model_output - uncond).
            out: where the result goes; x itself for a step in place. Default: a new tensor.
            backend: in place of the sampler's.
            log_prob: also return the log-density of the transition, from the same pass.
            reduction, min_logprob_std: of the log-density, as for `log_prob`.

        Returns:
            x_{t-1}: x's shape, dtype and layout; with log_prob a pair of it and the log-density.

        Raises:
            TypeError, ValueError: as `fastdiff.ops.step`; ValueError for more than one source of noise.
        """
        if generator is not None or (self._random and noise is None and seeds is None):
            seeds, generator = self._source(x, seeds, noise, generator)
        return ops.step(  # type: ignore[call-overload,misc]  # log_prob is no literal here
            self.table,
            model_output,
            t,
            x,
            row=row,
            uncond_output=uncond_output,
            guidance_scale=guidance_scale,
            seeds=seeds if self._random else None,
            noise=noise,
            generator=generator,
            out=out,
            rounding=self.rounding,
            backend=backend or self.backend,
            clip_grad=self.clip_grad,
            log_prob=log_prob,
            reduction=reduction,
            min_logprob_std=min_logprob_std,
        )

    def log_prob(
        self,
        x_prev: Tensor,
        model_output: Tensor,
        t: int | Tensor | None,
        x: Tensor,
        *,
        row: int | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        reduction: Reduction = "sum",
        min_logprob_std: float | None = None,
        backend: Backend | None = None,
    ) -> Tensor:
        """The log-density of a recorded transition x_t -> x_{t-1}, under what the model says of it now.

            x_prev, before = sampler.step(model(x, t), t, x, seeds=seeds, log_prob=True)
            ratio = (sampler.log_prob(x_prev, model(x, t), t, x) - before).exp()  # exactly 1 until the model changes

        See `fastdiff.ops.log_prob`: x_prev is a constant, the gradient that of the mean and of a learned variance.

        Args:
            x_prev: x_{t-1} as a step returned it, like x.
            model_output, t, x, row, uncond_output, guidance_scale, backend: as in `step`.
            reduction: over the elements of a sample: "sum", "mean" (as ddpo-pytorch) or "none" (as dppo).
            min_logprob_std: what the standard deviation of the density is at least (dppo).

        Returns:
            [B], or x's shape for reduction "none"; float32, or float64 for a float64 state.

        Raises:
            TypeError, ValueError: as `fastdiff.ops.log_prob`; ValueError for a sampler or a step without noise.
        """
        return ops.log_prob(
            self.table,
            x_prev,
            model_output,
            t,
            x,
            row=row,
            uncond_output=uncond_output,
            guidance_scale=guidance_scale,
            reduction=reduction,
            min_logprob_std=min_logprob_std,
            rounding=self.rounding,
            backend=backend or self.backend,
            clip_grad=self.clip_grad,
        )

    def step_with_x0(
        self,
        model_output: Tensor,
        t: int | Tensor | None,
        x: Tensor,
        *,
        row: int | None = None,
        seeds: int | Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generators | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        backend: Backend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`step` that also returns the predicted x0, from the same pass: (x_{t-1}, x0), both like x."""
        if generator is not None or (self._random and noise is None and seeds is None):
            seeds, generator = self._source(x, seeds, noise, generator)
        return ops.step_with_x0(
            self.table,
            model_output,
            t,
            x,
            row=row,
            uncond_output=uncond_output,
            guidance_scale=guidance_scale,
            seeds=seeds if self._random else None,
            noise=noise,
            generator=generator,
            out=out,
            rounding=self.rounding,
            backend=backend or self.backend,
            clip_grad=self.clip_grad,
        )

    def _source(
        self, x: Tensor, seeds: int | Tensor | None, noise: Tensor | None, generator: Generators | None
    ) -> tuple[Tensor | None, Generators | None]:
        """(seeds, generator) of a step that was given neither seeds nor noise: drawn seeds where there is neither."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.dim() == 0:
            raise ValueError("x: expected a batch dimension, got a 0-dimensional tensor")
        if generator is None:
            return noise_seeds(None, x.shape[0], x.device), None
        _one_source(seeds, noise, generator)
        check_generators(generator, x.shape[0], x.device)
        return None, generator if self._random else None

    # A chain of steps

    @overload
    def sample(
        self, model: Callable[..., Any], shape: Sequence[int] | None = None, *, keep: None = None, **options: Any
    ) -> Tensor: ...

    @overload
    def sample(
        self, model: Callable[..., Any], shape: Sequence[int] | None = None, *, keep: Keep, **options: Any
    ) -> tuple[Tensor, Kept]: ...

    def sample(  # type: ignore[misc]  # the overloads, which tell keep's two results apart, abbreviate the rest
        self,
        model: Callable[..., Any],
        shape: Sequence[int] | None = None,
        *,
        x_T: Tensor | None = None,
        x0: Tensor | None = None,
        start: int | float | None = None,
        seeds: int | Tensor | None = None,
        generator: Generators | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        callback: Callable[[int, int, Tensor], object] | None = None,
        progress: bool = False,
        keep: Keep | None = None,
        grad: backprop.Grad = None,
        grad_steps: int | None = None,
    ) -> Tensor | tuple[Tensor, Kept]:
        """Samples from the model: the whole chain, without gradients unless `grad` asks for them.

        Equivalent to:

            x = x_T                                     # or noise of the seeds
            for row, t in enumerate(sampler.timesteps):
                x = sampler.step(model(x, told(t), **model_kwargs), None, x, row=row, seeds=seeds)

        Without gradients the state is updated in place: the chain holds the state, a model output and, when the caller
        gave the state, the result. A model that wants to remember x clones it. x_T and x0 are never written to.

        With `grad` the chain is part of autograd's graph. Gradients reach x_T or x0, guidance_scale, tensors in
        model_kwargs, a table in training, the model's parameters and all that it, denoised_fn and cond_fn close over.
        What cond_fn detaches (as a classifier's gradient made without create_graph is) counts as a constant. States on
        the way are new tensors and part of the graph, and so is the time tensor of every step.

        Args:
            model: called as model(x, t, **model_kwargs), t one tensor [B] on x's device (the same for every step,
                filled anew; with `grad` a new one for each). With "checkpoint" it is called twice for every step, and
                so are denoised_fn, cond_fn and hooks of the module: BatchNorm's statistics move twice. With an
                `Inversion` it is called many times. It returns a tensor, a tuple of which the first counts, or an
                object with .sample.
            shape: (B, ...); may be left out when x_T or x0 is given.
            x_T: the state to start from: noise, or with `start` the state at that timestep. Default: noise.
            x0: images to start from (image-to-image): noised to the first timestep of the chain, which `start`
                chooses. Needs a sampler that knows its schedule.
            start: skip the first part of the chain. A float f in [0, 1): the first round(f*S) of S steps, of which
                one remains at least (a "strength" of s is start=1-s); an int t: the steps above timestep t.
            seeds: an int, or an int64 tensor [B], one per sample: x_T and all noise of sample b come from seed b
                alone. Default: drawn from torch's default CPU generator (torch.manual_seed governs), where any
                noise is needed.
            generator: torch's own stream in place of seeds: torch.randn(shape) for x_T (or for noising x0), then
                one for each step that adds noise; a generator per sample: draws [1, ...] from each. Drawn on the
                generator's device, in the state's dtype.
            device, dtype: of the state. Default: those of x_T or x0, else of the model's first floating parameter
                (a torch.nn.Module), else the CPU and float32.
            model_kwargs: passed to the model (and to cond_fn).
            guidance_scale, uncond_kwargs: guidance without a classifier (Ho & Salimans 2022, scale = 1 + w): a
                second call of the model with uncond_kwargs over model_kwargs; the step takes
                uncond + scale*(cond - uncond). A number or a tensor [B]. The two calls must not return one buffer.
            denoised_fn: called with the predicted x0 before it is clipped; what it returns takes its place. The raw
                eps of a DDIM step stays the model's.
            cond_fn: called as cond_fn(x, t, **model_kwargs), the gradient of log p(y | x_t) at x_t (Dhariwal & Nichol
                2021, algorithms 1 and 2): DDPM adds variance*gradient to the mean, the variance being that of the
                noise of the step; DDIM takes sqrt(1-alpha_bar)*gradient from eps. It enables gradients itself.
            callback: called as callback(row, t, x) after each step. Its x is not overwritten later; what is written
                into it, the chain goes on with.
            progress: show a bar (needs tqdm).
            keep: which states to keep: an int n (after every n-th step), timesteps (after the steps from these), or
                a function of (row, t). With grad_steps, those before the last steps have no graph.
            grad: how the chain is differentiated, if at all. "full" keeps what autograd keeps of every pass through the
                model. "checkpoint" keeps the states, and torch's RNG state for dropout (Chen et al. 2016,
                arXiv:1604.06174): the backward does each step again, model and all, one at a time; noise is made again
                from its seeds, or from the state that the generator had. The gradients have the same bits. None of what
                a step depends on may be modified in place before the backward; the backward raises for seeds,
                guidance_scale, tensors in model_kwargs and uncond_kwargs, and leaves (parameters) in the step's graph,
                but does not see other tensors that the model closes over (buffers). An
                `Inversion` keeps two states, for chains without noise and clip, and makes an error that it reports.
            grad_steps: differentiate only the last steps of the chain, so many of them (DRaFT-K, Clark et al. 2023,
                arXiv:2309.17400); those before run without a graph, and x_T gets no gradient unless the chain has no
                more steps than that. Default: all steps.

        Returns:
            The sample, like x_T, in model space: neither clamped nor rescaled (see `to_uint8`). With `keep`, a pair
            of it and the list of (t, state after the step from t).

        Raises:
            TypeError, ValueError: a bad argument, by name, before the model is called; what the model or a hook
                returned, before it is used. `grad` where no gradient can be recorded (torch.no_grad, inference mode);
                under torch.func and in forward mode any `grad` but "full", with all steps.
            ImportError: progress without tqdm.
            RuntimeError: in the backward, for "checkpoint" and an Inversion: what the chain depends on was modified in
                place. For an Inversion: the error is too large, or the model depends on other tensors than before; one
                of them has a hook (which is told at the first step where it can be).
        """
        backprop.check(grad, grad_steps)
        if grad != "full" and ops.is_transformed():
            raise ValueError(f"grad: expected 'full' under torch.func and in forward mode, got {grad!r}")
        _callable("callback", callback)
        first = self._first(start)
        before = 0 if grad_steps is None else max(len(self.table) - first - grad_steps, 0)
        if before and ops.is_transformed():
            raise ValueError(
                f"grad_steps: expected all {len(self.table) - first} steps under torch.func and in forward mode, "
                f"where gradients cannot be stopped on the way, got {grad_steps}"
            )
        keeps = self._keeps(keep, first)
        if isinstance(grad, backprop.Inversion):
            self._check_inversion(model, denoised_fn, callback, keep)
        run = self._begin(
            model, shape, x_T, x0, start, seeds, generator, device, dtype, model_kwargs, guidance_scale,
            uncond_kwargs, denoised_fn, cond_fn, progress, grad is not None,
        )  # fmt: skip

        def holds(row: int) -> bool:
            return callback is not None or keeps(row)

        last, kept = len(self.table) - 1, []
        steps = self._run(run, holds, with_x0=False)
        if grad is not None:
            steps = self._differentiate(run, holds, grad, before)
        # what the caller gave to be called here finds the caller's own mode; else it need not change at every step
        with _NO_CHANGE if callback is not None or callable(keep) else _GradMode(run.graph):
            for row, _ in steps:
                t = self.timesteps[row]
                if callback is not None:
                    callback(row, t, run.x)
                if keeps(row):
                    # where the callback may keep x too, and at the end, the tensor is in other hands already
                    shared = callback is not None or row == last
                    kept.append((t, _copy(run.x, graph=run.graph) if shared else run.x))
        return run.x if keep is None else (run.x, kept)

    def iterate(
        self,
        model: Callable[..., Any],
        shape: Sequence[int] | None = None,
        *,
        x_T: Tensor | None = None,
        x0: Tensor | None = None,
        start: int | float | None = None,
        seeds: int | Tensor | None = None,
        generator: Generators | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        progress: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The chain of `sample` as an iterator over (x, x0, t), one for each step.

        t is the timestep the step left from, x the state after it, x0 what was predicted on the way (clipped where
        the sampler clips). Both are new tensors at every step. x is also what the next step starts from: what is
        written into it in place, the chain goes on with. Gradient mode is the caller's own between the steps.

        Arguments and errors as in `sample`, raised here and not at the first step; ValueError under torch.func and in
        forward mode.
        """
        _check_untransformed("iterate")
        if self.table.structure.x0 == "none":
            raise ValueError(f"table: expected one that predicts x0, got {self.table.name!r}")
        run = self._begin(
            model, shape, x_T, x0, start, seeds, generator, device, dtype, model_kwargs, guidance_scale,
            uncond_kwargs, denoised_fn, cond_fn, progress,
        )  # fmt: skip
        return (
            (run.x, predicted, self.timesteps[row])
            for row, predicted in self._run(run, lambda row: True, with_x0=True)
            if predicted is not None
        )

    def capture(
        self,
        model: Callable[..., Any],
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seeds: int | Tensor | None = None,
        generator: Generators | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        unroll: bool | None = None,
        warmup: int = 3,
    ) -> CapturedSampler:
        """The chain of `sample` as CUDA graphs: the network and the steps recorded once, and replayed with other noise.

            chain = sampler.capture(model, (16, 3, 64, 64), device="cuda")
            a, b = chain.replay(seeds=1), chain.replay(seeds=2)

        A replay returns what `sample` returns, bit for bit where the network computes the same, without its work on
        the host: see `fastdiff.graphs.CapturedSampler` for what may change from one to the next. The model is called as
        in `sample`, with gradients off; what it does on the host is done once. While a chain is being captured, no
        other thread should use CUDA: where it waits for the GPU, it meets an error.

        Args:
            model: as in `sample`, compiled or not (mode="reduce-overhead": its kernels are captured, its own graphs
                are not used). It must not wait for the GPU, nor make tensors from data of the host.
            shape, dtype, device: of the state, which is contiguous. The device, CUDA, is that of the model's first
                floating parameter unless given.
            seeds: for the replays that are given none. Default: each draws its own from torch's default CPU generator.
            generator: torch's own stream in place of seeds: a generator on the device, or one per sample. The replays
                advance it, the capture does not.
            model_kwargs, uncond_kwargs, guidance_scale: as in `sample`. Tensors are copied, and replays can change
                them; all else becomes a part of the graph.
            unroll: True for one graph of the whole chain; False for the graph of one step, replayed for each: it has
                as many nodes as one step, at the price of a launch and two small kernels more per step. Default: one
                graph up to `fastdiff.graphs.UNROLL` steps.
            warmup: how often a step is run before it is recorded.

        Raises:
            TypeError, ValueError: a bad argument, by name, before the model is called; a device other than CUDA; a
                generator on the CPU.
            RuntimeError: the chain cannot be captured; it says why and what to do, and CUDA can be used as before.
        """
        from . import graphs  # only here, as it builds on this module

        return graphs.capture(
            self,
            model,
            shape,
            device=device,
            dtype=dtype,
            seeds=seeds,
            generator=generator,
            model_kwargs=model_kwargs,
            guidance_scale=guidance_scale,
            uncond_kwargs=uncond_kwargs,
            unroll=unroll,
            warmup=warmup,
        )

    def _begin(
        self,
        model: Callable[..., Any],
        shape: Sequence[int] | None,
        x_T: Tensor | None,
        x0: Tensor | None,
        start: int | float | None,
        seeds: int | Tensor | None,
        generator: Generators | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        model_kwargs: Mapping[str, Any] | None,
        guidance_scale: float | Tensor | None,
        uncond_kwargs: Mapping[str, Any] | None,
        denoised_fn: Callable[[Tensor], Tensor] | None,
        cond_fn: Callable[..., Tensor] | None,
        progress: bool,
        graph: bool = False,
    ) -> _Run:
        """Check everything, and make the first state, as part of autograd's graph where there will be one."""
        if x_T is not None and x0 is not None:
            raise ValueError("x_T and x0: expected one of them, got both")
        name, given = ("x_T", x_T) if x0 is None else ("x0", x0)
        sizes, where, kind = self._check_chain(
            model, shape, name, given, seeds, generator, device, dtype, model_kwargs, guidance_scale, uncond_kwargs
        )
        if x0 is not None and self.schedule is None:
            raise ValueError("x0: expected None, this sampler has no schedule to noise it with")
        first = self._first(start)
        _callable("denoised_fn", denoised_fn)
        if denoised_fn is not None and self._hooked is None:
            raise ValueError(f"denoised_fn: expected None, a step of {self.table.name!r} does not go through x0")
        _callable("cond_fn", cond_fn)
        if cond_fn is not None and not np.isfinite(self._guides).all():
            raise ValueError("cond_fn: expected None, alpha_bar is 0 at a timestep of the chain")
        if graph and self.table.trained is not None and (denoised_fn is not None or cond_fn is not None):
            name = "denoised_fn" if cond_fn is None else "cond_fn"
            raise ValueError(f"{name}: expected None, a table in training gets no gradient through it")
        if not isinstance(progress, bool):
            raise TypeError(f"progress: expected a bool, got {type(progress).__name__}")

        rows: Iterable[int] = range(first, len(self.table))
        if progress:
            rows = _progress_bar(rows)
        kwargs = dict(model_kwargs or {})
        # tensors that outlive the chain: an inference tensor could not enter autograd later
        with _ordinary_mode(graph):
            scale = None if guidance_scale is None else ops.check_scale(guidance_scale, sizes[0], where, kind)
            fixed: Tensor | None = None
            if generator is None and (self._random or x_T is None or seeds is not None):
                fixed = noise_seeds(seeds, sizes[0], where)
            if x_T is not None:
                x = x_T
            elif generator is not None:
                x = randn(sizes, generator, kind, where)
            elif x0 is None:
                x = normal(sizes, fixed, domain="initial", dtype=kind, device=where)
            if x0 is not None and self.schedule is not None:
                t = self.timesteps[first]
                noise = None if generator is None else x
                noised = ops.add_noise(
                    x0, t, self.schedule, seeds=fixed, noise=noise, rounding=self.rounding, backend=self.backend
                )
                assert isinstance(noised, Tensor)  # no target was asked for
                x = noised
            time, told = self._clock(sizes[0], kind, where)
        return _Run(
            model=model,
            rows=rows,
            x=x,
            owned=x_T is None,
            graph=graph,
            time=time,
            told=told,
            seeds=fixed if self._random else None,
            generator=generator if self._random else None,
            kwargs=kwargs,
            uncond_kwargs=None if uncond_kwargs is None else {**kwargs, **uncond_kwargs},
            guidance_scale=scale,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
        )

    def _check_chain(
        self,
        model: Callable[..., Any],
        shape: Sequence[int] | None,
        name: str,
        given: Tensor | None,
        seeds: int | Tensor | None,
        generator: Generators | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        model_kwargs: Mapping[str, Any] | None,
        guidance_scale: float | Tensor | None,
        uncond_kwargs: Mapping[str, Any] | None,
    ) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
        """Check what every chain is given; its shape, device and dtype. It starts from `given`, called `name`."""
        if not callable(model):
            raise TypeError(f"model: expected something to call, got {type(model).__name__}")
        sizes = _shape(shape, given, name)
        if self.table.structure.learned and len(sizes) < 2:
            raise ValueError(f"shape: expected (batch, channels, ...) (learned variance), got {sizes}")
        where, kind = _place(model, given, device, dtype)
        _one_source(seeds, None, generator)
        if generator is not None:
            check_generators(generator, sizes[0], where)
        for argument, value in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{argument}: expected a dict, got {type(value).__name__}")
        if (guidance_scale is None) != (uncond_kwargs is None):
            raise ValueError("guidance_scale and uncond_kwargs: expected both or neither")
        return sizes, where, kind

    def _run(self, run: _Run, holds: Callable[[int], bool], *, with_x0: bool) -> Iterator[tuple[int, Tensor | None]]:
        """The loop. Steps run.x, and yields (row, predicted x0 or None) after each step.

        holds(row): the state after that row is in other hands too, so the next step goes to a new tensor.
        No context manager spans a yield: it would reach into the caller.
        """
        graph, mode = run.graph, _GradMode(run.graph)
        for row in run.rows:
            with mode:
                # an alias: a network that takes its own gradient by x would leave requires_grad set on the state
                if graph:
                    x, run.time = run.x.view_as(run.x), torch.empty_like(run.time)  # autograd may keep the time
                else:
                    x = run.x.detach()
                run.time.fill_(run.told[row])
                m, uncond = _outputs(run.model, x, run.time, run.kwargs, run.uncond_kwargs)
                changed = gradient = None
                if run.denoised_fn is not None:
                    changed = run.denoised_fn(self._apply(self._predicting, run, row, m, uncond))
                    changed = _like("denoised_fn", changed, x)
                if run.cond_fn is not None:
                    gradient = _like("cond_fn", run.cond_fn(x, run.time, **run.kwargs), x)
                with _ordinary_mode(graph):
                    out = run.x if run.owned and not _shares(x, (m, uncond, changed, gradient)) else None
                    run.x, x0 = self._advance(run, row, m, uncond, changed, gradient, out, with_x0)
            run.owned = not holds(row)
            # the next call of the model needs the room
            del x, m, uncond, changed, gradient, out
            yield row, x0

    def _advance(
        self,
        run: _Run,
        row: int,
        m: Tensor,
        uncond: Tensor | None,
        changed: Tensor | None,
        gradient: Tensor | None,
        out: Tensor | None,
        with_x0: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """One step with all that a chain may add to it: another x0 (`changed`), a classifier's gradient."""
        table, x, scale = self.table, run.x, run.guidance_scale
        shift, lift = (0.0, 0.0) if gradient is None else self._guidance(row, m, x)
        if changed is not None:
            if not run.graph:
                out = torch.empty_like(x) if out is None else out
            table, x, m = self._taking(changed, run, row, m, uncond)
            uncond = scale = None
        function: Callable[..., Any] = ops.step_with_x0 if with_x0 else ops.step
        stepped = function(
            table, m, None, x, row=row, uncond_output=uncond, guidance_scale=scale, seeds=run.seeds,
            generator=run.generator, out=out, rounding=self.rounding, backend=self.backend, clip_grad=self.clip_grad,
        )  # fmt: skip
        result, x0 = stepped if with_x0 else (stepped, None)
        if gradient is not None:
            result.add_(gradient * shift)
            if x0 is not None:
                x0.add_(gradient * lift)
        return result, x0

    # Gradients

    def _differentiate(
        self, run: _Run, holds: Callable[[int], bool], grad: str | backprop.Inversion, before: int
    ) -> Iterator[tuple[int, Tensor | None]]:
        """`_run`, of which autograd records all rows but the first few, `before`."""
        rows = iter(run.rows)
        if before:
            run.x, run.graph = run.x.detach(), False
            run.rows = itertools.islice(rows, before)
            yield from self._run(run, holds, with_x0=False)
            # torch before 2.11 would take the weights that were cast without a graph for those with one
            torch.clear_autocast_cache()
        run.rows, run.graph, run.owned = rows, True, False
        if run.x.is_inference():
            run.x = run.x.clone()
        # the graph keeps this, and must not keep its own end with it
        fixed = replace(run, rows=(), x=run.time)
        if grad == "full":
            yield from self._run(run, lambda row: True, with_x0=False)
        elif grad == "checkpoint":
            for row in rows:
                run.x = backprop.checkpointed(
                    partial(self._step_of, fixed, row),
                    run.x,
                    run.generator,
                    [run.kwargs, run.uncond_kwargs, run.guidance_scale, run.seeds],
                )
                yield row, None
        elif isinstance(grad, backprop.Inversion):
            given = {"kwargs": run.kwargs, "uncond_kwargs": run.uncond_kwargs, "guidance_scale": run.guidance_scale}

            def step(row: int, x: Tensor, given: dict[str, Any]) -> Tensor:
                return self._step_of(fixed, row, x, graph=torch.is_grad_enabled(), **given)

            reversal = backprop.Reversal(grad, step, given, self.table, run.x)
            for row in rows:
                run.x = reversal.advance(row, run.x)
                yield row, None
            run.x = reversal.result(run.x)

    def _step_of(self, run: _Run, row: int, x: Tensor, **changes: Any) -> Tensor:
        """The state after one row of the chain from x, which is left as it is."""
        one = replace(run, rows=(row,), x=x, owned=False, **changes)
        for _ in self._run(one, lambda row: True, with_x0=False):
            pass
        return one.x

    def _check_inversion(self, model: object, denoised_fn: object, callback: object, keep: object) -> None:
        structure = self.table.structure
        if structure.variance != "none":
            raise ValueError(f"grad: expected an Inversion of a chain without noise, {self.table.name!r} adds noise")
        if structure.clip:
            raise ValueError("grad: expected an Inversion of a chain without clip, which cannot be undone (clip=None)")
        for row, factor in enumerate(backprop.factors(self.table)):
            if factor == 0 or not math.isfinite(factor):
                raise ValueError(
                    f"grad: expected an Inversion of steps that depend on x beside the model output; at t = "
                    f"{self.timesteps[row]} it is multiplied by {factor}"
                )
        if isinstance(model, torch.nn.parallel.DistributedDataParallel) and model.static_graph:
            # the calls of the model whose graphs are dropped would count as those that the backward is to reach
            raise ValueError(
                "model: expected DistributedDataParallel without static_graph beside an Inversion, whose "
                "gradients would not be reduced"
            )
        for name, value in (("denoised_fn", denoised_fn), ("callback", callback), ("keep", keep)):
            if value is not None:
                raise ValueError(f"{name}: expected None beside an Inversion, which keeps no state on the way")

    def _first(self, start: int | float | None) -> int:
        """The row at which a chain with this `start` begins."""
        chain = [(t, -1) for t in self.timesteps]
        total = max(self.timesteps) + 1 if self.schedule is None else self.schedule.num_timesteps
        return len(chain) - len(enter(chain, start, total))

    def _keeps(self, keep: Keep | None, first: int) -> Callable[[int], bool]:
        """The rule as a function of the row."""
        if keep is None:
            return lambda row: False
        if callable(keep):
            rule = keep
            # asked once for each row: a rule may count its calls
            answers: dict[int, bool] = {}

            def asked(row: int) -> bool:
                if row not in answers:
                    answers[row] = bool(rule(row, self.timesteps[row]))
                return answers[row]

            return asked
        if is_many(keep) and not isinstance(keep, str):
            wanted = {integer("keep", t, 0) for t in keep}
            missing = wanted.difference(self.timesteps[first:])
            if missing:
                raise ValueError(f"keep: expected timesteps of the chain, got {min(missing)}")
            return lambda row: self.timesteps[row] in wanted
        stride = integer("keep (an int, timesteps or a function)", keep, 1)
        return lambda row: (row - first + 1) % stride == 0

    # What the model is told

    def _clock(self, batch: int, state: torch.dtype, device: torch.device) -> tuple[Tensor, list[int] | list[float]]:
        """The [B] tensor that the model is handed, and what it is filled with at each row."""
        if self.time == "index":
            return torch.empty(batch, dtype=torch.int64, device=device), list(self.timesteps)
        dtype = compute_dtype(state)
        told = torch.tensor(self.timesteps, dtype=dtype, device="cpu")
        if self.schedule is not None:
            # an entry 0 that is the clean image itself (the sprite course's table) is not a noised timestep
            total = self.schedule.num_timesteps - int(self.schedule.alphas_cumprod[0] == 1)
            if self.time == "fraction":
                told = told / total
            elif self.time == "scaled_1000":
                told = told * (1000.0 / total)
        return torch.empty(batch, dtype=dtype, device=device), told.tolist()

    # Hooks

    def _guidance(self, row: int, m: Tensor, x: Tensor) -> tuple[float | Tensor, float]:
        """What a gradient of log p(y | x_t) is multiplied by where it enters x' and x0 at this row."""
        shift, lift = self._guides[row].tolist()
        if not self.table.structure.learned:
            return shift, lift
        columns = self.table.rows.detach()[row]
        v = m[:, x.shape[1] :].to(compute_dtype(x.dtype))
        if self.table.structure.variance == "learned_plain":
            return shift * v, lift
        if self.table.structure.variance == "learned_range":
            low, high = columns[COLUMN["min_log"]].item(), columns[COLUMN["max_log"]].item()
            fraction = (v + 1) * 0.5
            v = fraction * high + (1 - fraction) * low
        return shift * torch.exp(v), lift

    @cached_property
    def _guides(self) -> np.ndarray:
        """float64 [S, 2]: shift and lift of `_guidance`; the shift of a learned variance times that variance."""
        if not self._random:
            raise ValueError("cond_fn: expected None, a step without noise has no variance to guide by")
        s = self.table.rows.detach()[:, COLUMN["s"]].numpy()
        return np.stack([s * s, np.zeros_like(s)], axis=1)

    @cached_property
    def _predicting(self) -> Table:
        """x' = the predicted x0, not clipped."""
        structure = self.table.structure
        form = Structure(x0=structure.x0, x0_divide=structure.x0_divide)
        return self._derived(form, a0=1.0)

    @cached_property
    def _giving_eps(self) -> Table:
        """x' = the eps that the step would take from the model output, in whichever form that is."""
        if self.table.structure.eps == "output":
            return self._derived(Structure(x0="output"), a0=1.0)
        rows = self.table.rows.detach()
        form = Structure(x0="output", a0=False, ax=True, eps="output", ae=True)
        return self._derived(form, ax=rows[:, COLUMN["ex"]], ae=rows[:, COLUMN["em"]])

    @cached_property
    def _hooked(self) -> Table | None:
        """The same step from an x0 given as the model output; None where the step has no such form.

        Where eps is the model's own there are three inputs (x0, eps, noise) and no x: eps takes the place of x.
        """
        structure = self.table.structure
        if not structure.a0:
            return None
        form = replace(structure, x0="output", x0_divide=False)
        if structure.eps not in ("output", "linear"):
            return self._derived(form)
        if structure.ax:
            return None
        form = replace(form, eps="none", ae=False, ax=True)
        return self._derived(form, ax=self.table.rows.detach()[:, COLUMN["ae"]])

    def _derived(self, form: Structure, **columns: float | Tensor) -> Table:
        with torch.inference_mode(False):
            rows = self.table.rows.detach().clone()
            for name, value in columns.items():
                rows[:, COLUMN[name]] = value
        table = self.table
        noise_clip = None if form.variance == "none" else table.noise_clip
        return Table(
            rows, form, self.timesteps, name=table.name, host=table.host, scalars=table.scalars, noise_clip=noise_clip
        )

    def _apply(self, table: Table, run: _Run, row: int, m: Tensor, uncond: Tensor | None) -> Tensor:
        """A derived table's step from run.x, without noise and variance half."""
        if self.table.structure.learned:
            channels = run.x.shape[1]
            m = m[:, :channels]
            uncond = None if uncond is None else uncond[:, :channels]
        return ops.step(
            table,
            m,
            None,
            run.x,
            row=row,
            uncond_output=uncond,
            guidance_scale=run.guidance_scale,
            rounding=self.rounding,
            backend=self.backend,
        )

    def _taking(
        self, changed: Tensor, run: _Run, row: int, m: Tensor, uncond: Tensor | None
    ) -> tuple[Table, Tensor, Tensor]:
        """(table, state, model output) of the step that takes `changed` for the predicted x0."""
        table, structure = self._hooked, self.table.structure
        assert table is not None  # _begin refuses the hook otherwise
        state = run.x
        if structure.eps in ("output", "linear"):
            state = self._apply(self._giving_eps, run, row, m, uncond)
        if structure.learned:
            changed = torch.cat([changed, m[:, run.x.shape[1] :].to(changed.dtype)], dim=1)
        return table, state, changed


@dataclass(eq=False)
class _Run:
    """A chain under way: the state, and what stays the same from step to step.

    owned: the next step may overwrite x.  graph: autograd records the steps.  time: what the model is handed, filled
    from told[row].
    """

    model: Callable[..., Any]
    rows: Iterable[int]
    x: Tensor
    owned: bool
    graph: bool
    time: Tensor
    told: list[int] | list[float]
    seeds: Tensor | None
    generator: Generators | None
    kwargs: dict[str, Any]
    uncond_kwargs: dict[str, Any] | None
    guidance_scale: Tensor | None
    denoised_fn: Callable[[Tensor], Tensor] | None
    cond_fn: Callable[..., Tensor] | None


@dataclass(frozen=True, eq=False)
class TableSampler(Sampler):
    """A sampler of any table: fill the rows, and this calls the network.

    Args:
        table: the rows (`fastdiff.tables`).
        schedule: what the timesteps belong to; needed for x0 in `sample`, and for time "scaled_1000" and "fraction".
        time, rounding, backend, clip_grad: see `Sampler`.
    """

    table: Table
    _: KW_ONLY
    schedule: NoiseSchedule | None = None
    time: Time = "index"
    rounding: Rounding = "once"
    backend: Backend = "auto"
    clip_grad: ClipGrad = "exact"

    def __post_init__(self) -> None:
        if not isinstance(self.table, Table):
            raise TypeError(f"table: expected a Table, got {type(self.table).__name__}")
        if self.schedule is not None:
            _check_schedule(self.schedule)
        self._settle(self.table)


class _ChainSampler(Sampler):
    """What DDPM and DDIM share: a chain over a schedule, which can be walked backwards."""

    schedule: NoiseSchedule
    steps: Steps
    spacing: str | None
    steps_offset: int
    start: int | float | None
    prediction: str
    host: str

    def invert(
        self,
        model: Callable[..., Any],
        x0: Tensor,
        *,
        pairing: str | None = None,
        clip: Clip = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        callback: Callable[[int, int, Tensor], object] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """DDIM inversion: the x_T from which this chain leads back to x0 (Song et al. 2021, section 4.3).

        Walks the sampler's own chain upwards, without noise. `sample(model, x_T=invert(model, x0))` of a DDIMSampler
        with eta 0 gives x0 up to an error that falls with the number of steps. With `start` in the sampler both
        stop and begin in the middle.

        Args:
            model: as in `sample`, of this sampler's prediction; it must not learn the variance.
            x0: clean images [B, ...]; not written to.
            pairing: which timestep the model is told: "target" (default), "source" or "next"; see
                `fastdiff.tables.ddim_inversion_table`.
            clip: range of the predicted x0. None is right: what is clipped on the way is lost.
            model_kwargs, guidance_scale, uncond_kwargs, callback, progress: as in `sample`.

        Returns:
            x_T, like x0.

        Raises:
            TypeError, ValueError: a bad argument, by name, before the model is called; a call under torch.func or in
                forward mode.
        """
        _check_untransformed("invert")
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0: expected a tensor, got {type(x0).__name__}")
        chain = _chain(self)
        if self.prediction == "x0" and self.host == "fastdiff" and pairing in (None, "target", "source"):
            first, final = float(self.schedule.alphas_cumprod[0]), self._final_alpha
            clean = pairs(self.schedule, chain)[-1][1]
            if self.schedule.alpha_bar(clean, final=first if isinstance(final, str) else final) == 1:
                ways = "pairing='next'"
                if first < 1 and isinstance(self, DDIMSampler):
                    ways += " or final_alpha='first'"
                raise ValueError(
                    "prediction: expected 'eps' or 'v', got 'x0', from which no eps follows where alpha_bar is 1; "
                    f"{ways} would work, which takes the image to be noised a little"
                )
        table = ddim_inversion_table(
            self.schedule,
            chain,
            prediction=self.prediction,
            clip=clip,
            pairing=pairing,
            final_alpha=self._final_alpha,
            host=self.host,
        )
        upwards = TableSampler(
            table, schedule=self.schedule, time=self.time, rounding=self.rounding, backend=self.backend
        )
        result: Tensor = upwards.sample(
            model,
            x_T=x0,
            model_kwargs=model_kwargs,
            guidance_scale=guidance_scale,
            uncond_kwargs=uncond_kwargs,
            callback=callback,
            progress=progress,
        )
        return result

    @property
    def _final_alpha(self) -> float | str:
        return 1.0


@dataclass(frozen=True, eq=False)
class DDPMSampler(_ChainSampler):
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239), on all timesteps or a respaced chain.

    Args:
        schedule: a NoiseSchedule.
        steps: which timesteps to visit: None for all, a number, "ddim50", "10,20,30", a descending list (a timestep
            may repeat), or pairs (t, t_prev). See `fastdiff.schedules.timesteps`.
        spacing, steps_offset: how a number of steps is spread: "trailing" unless given (with a host: as the host).
        start: leave out the first part of the chain: a fraction of the steps, or the timestep to begin at.
        prediction: what the model gives: "eps", "x0", "v" or "x_prev".
        variance: "fixed_small", "fixed_large", "learned", "learned_range", "learned_plain"; see
            `fastdiff.tables.ddpm_table`.
        clip: range of the predicted x0: r for [-r, r], (lo, hi), or None. 1.0 is for images in [-1, 1], where every
            codebase of this family clips; latents and other data want None.
        noise: False leaves the noise out (the samples collapse to a mean).
        min_std, noise_clip: for policy gradients: a standard deviation that every step has at least, and a limit of its
            noise; see `fastdiff.tables.ddpm_table`.
        time, rounding, backend, clip_grad: see `Sampler`.
        host: whose precision rule fills the rows; see `fastdiff.hosts`. The rows of a host are literal, its own NaN or
            Inf included (alpha_bar 0 with eps prediction, say); only "fastdiff" rows are checked to be finite.

    `dataclasses.replace(sampler, steps=100)` makes another.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    schedule: NoiseSchedule
    steps: Steps = None
    _: KW_ONLY
    spacing: str | None = None
    steps_offset: int = 0
    start: int | float | None = None
    prediction: str = "eps"
    variance: str = "fixed_small"
    clip: Clip = 1.0
    noise: bool = True
    min_std: float | None = None
    noise_clip: float | None = None
    time: Time = "index"
    rounding: Rounding = "once"
    backend: Backend = "auto"
    clip_grad: ClipGrad = "exact"
    host: str = "fastdiff"
    table: Table = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        if not isinstance(self.noise, bool):
            raise TypeError(f"noise: expected a bool, got {type(self.noise).__name__}")
        _fix_steps(self)
        table = ddpm_table(
            self.schedule,
            _chain(self),
            prediction=self.prediction,
            variance=self.variance,
            clip=self.clip,
            noise=self.noise,
            min_std=self.min_std,
            noise_clip=self.noise_clip,
            host=self.host,
        )
        self._settle(table)


@dataclass(frozen=True, eq=False)
class DDIMSampler(_ChainSampler):
    """DDIM (Song et al. 2021, arXiv:2010.02502).

    Args:
        steps: 50, spread by `spacing`, unless given.
        eta: noise, from 0 (none: the sample is a function of x_T) to 1 (that of DDPM's "fixed_small").
        eps: "raw", as the model gave it, or "rederived" from the clipped x0 (with which eta=1 is DDPM). Default: "raw",
            or the default of the host.
        final_alpha: alpha_bar at the end of the chain, or "first" for alphas_cumprod[0].

    The other arguments are those of `DDPMSampler`. With host "diffusers" every step of a number or list of steps goes
    to t - T//S, as it does there.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    schedule: NoiseSchedule
    steps: Steps = 50
    _: KW_ONLY
    spacing: str | None = None
    steps_offset: int = 0
    start: int | float | None = None
    prediction: str = "eps"
    eta: float = 0.0
    eps: str | None = None
    final_alpha: float | str = 1.0
    clip: Clip = 1.0
    min_std: float | None = None
    noise_clip: float | None = None
    time: Time = "index"
    rounding: Rounding = "once"
    backend: Backend = "auto"
    clip_grad: ClipGrad = "exact"
    host: str = "fastdiff"
    table: Table = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        _fix_steps(self)
        table = ddim_table(
            self.schedule,
            _chain(self),
            eta=self.eta,
            prediction=self.prediction,
            clip=self.clip,
            eps=self.eps,
            final_alpha=self.final_alpha,
            min_std=self.min_std,
            noise_clip=self.noise_clip,
            host=self.host,
        )
        self._settle(table)

    @property
    def _final_alpha(self) -> float | str:
        return self.final_alpha

    @cached_property
    def _guides(self) -> np.ndarray:
        # eps' = eps - sqrt(1-ab)*g, and x0 follows: x0' = x0 + (1-ab)/sqrt(ab)*g
        rows = self.table.rows.detach().numpy()
        ab = self.schedule.alphas_cumprod[list(self.timesteps)]
        with np.errstate(divide="ignore"):
            lift = (1 - ab) / np.sqrt(ab)
        shift = rows[:, COLUMN["a0"]] * lift - rows[:, COLUMN["ae"]] * np.sqrt(1 - ab)
        return np.stack([shift, lift], axis=1)


# Arguments


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {tuple(known)}, got {value!r}")


def _callable(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")


def _check_untransformed(name: str) -> None:
    if ops.is_transformed():
        raise ValueError(f"{name}: expected to be called outside torch.func and forward mode, as it has no gradients")


def _check_schedule(schedule: object) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: expected a NoiseSchedule, got {type(schedule).__name__}")


def _fix_steps(sampler: _ChainSampler) -> None:
    """Keep steps that are an iterator as a list, so that they can be read again."""
    steps = sampler.steps
    if is_many(steps) and not isinstance(steps, (str, set, frozenset)):
        object.__setattr__(sampler, "steps", list(steps))


def _chain(sampler: _ChainSampler) -> Steps:
    """The steps of a sampler as its table takes them: None, a list of timesteps, or pairs."""
    # diffusers' DDIM steps to t - T//S, S being the length of the whole chain
    stride = sampler.host == "diffusers" and isinstance(sampler, DDIMSampler)
    schedule, steps, spacing, start = sampler.schedule, sampler.steps, sampler.spacing, sampler.start
    if steps is None and spacing is None and start is None and not stride and not sampler.steps_offset:
        return None
    counted = steps is not None and not isinstance(steps, str) and not is_many(steps)
    if counted and spacing is None:
        spacing = _HOST_SPACING.get(sampler.host)
    literal = "diffusers" if counted and sampler.host == "diffusers" else None
    options: dict[str, Any] = {"spacing": spacing, "steps_offset": sampler.steps_offset, "host": literal}
    given_pairs = is_many(steps) and not isinstance(steps, (str, set, frozenset)) and is_many(next(iter(steps), 0))
    if given_pairs:
        return pairs(schedule, steps, start=start, **options)
    if stride:
        whole = timesteps(schedule, steps, **options)
        jump = schedule.num_timesteps // len(whole)
        return enter([(t, max(t - jump, -1)) for t in whole], start, schedule.num_timesteps)
    return timesteps(schedule, steps, start=start, **options)


def _shape(shape: Sequence[int] | None, given: Tensor | None, name: str) -> tuple[int, ...]:
    if given is not None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
        if given.dim() == 0:
            raise ValueError(f"{name}: expected a batch dimension, got a 0-dimensional tensor")
    if shape is None:
        if given is None:
            raise TypeError("shape: expected a sequence of ints, got None (and neither x_T nor x0)")
        return tuple(given.shape)
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of ints (batch, ...), got {shape!r}")
    sizes = tuple(integer("shape", size, 0) for size in shape)
    if not sizes:
        raise ValueError("shape: expected a batch dimension, got ()")
    if given is not None and tuple(given.shape) != sizes:
        raise ValueError(f"{name}: expected shape {list(sizes)}, got {list(given.shape)}")
    return sizes


def _place(
    model: object, given: Tensor | None, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the state."""
    try:
        where = None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a torch.device or the name of one, got {device!r}") from None
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if given is not None:
        if where is not None and (where.type != given.device.type or where.index not in (None, given.device.index)):
            raise ValueError(f"device: expected {given.device}, that of the tensor to start from, got {where}")
        if dtype not in (None, given.dtype):
            raise ValueError(f"dtype: expected {given.dtype}, that of the tensor to start from, got {dtype}")
        where, dtype = given.device, given.dtype
    elif isinstance(model, torch.nn.Module) and (where is None or dtype is None):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                where = parameter.device if where is None else where
                dtype = parameter.dtype if dtype is None else dtype
                break
    if where is not None and where.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("device: there is no CUDA device here, or this torch is built without CUDA")
        if where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, float64, float16 or bfloat16, got {dtype}")
    return (torch.device("cpu") if where is None else where), dtype


def _one_source(seeds: object, noise: object, generator: object) -> None:
    given = [
        name for name, value in (("seeds", seeds), ("noise", noise), ("generator", generator)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: expected one of them, got {len(given)}")


def _progress_bar(rows: Iterable[int]) -> Iterable[int]:
    try:
        tqdm = importlib.import_module("tqdm.auto").tqdm
    except ImportError as error:
        raise ImportError("progress: expected tqdm to be installed (pip install tqdm)") from error
    bar: Iterable[int] = tqdm(rows)
    return bar


def _output(result: Any) -> Tensor:
    """The tensor in what a model returned."""
    if isinstance(result, Tensor):
        return result
    found = result[0] if isinstance(result, (tuple, list)) and result else getattr(result, "sample", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "model: expected a tensor, a tuple that begins with one, or an object with .sample, "
            f"got {type(result).__name__}"
        )
    return found


def _outputs(
    model: Callable[..., Any],
    x: Tensor,
    time: Tensor,
    kwargs: Mapping[str, Any],
    uncond_kwargs: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor | None]:
    """What the model gives for x and, with guidance, what it gives without the condition."""
    m = _output(model(x, time, **kwargs))
    if uncond_kwargs is None:
        return m, None
    uncond = _output(model(x, time, **uncond_kwargs))
    if uncond.numel() and uncond.data_ptr() == m.data_ptr():
        # the first output has been overwritten (a CUDA graph's static buffer, say)
        raise ValueError(
            "model: expected a new tensor from each of the two calls (uncond_kwargs), got the same memory twice"
        )
    return m, uncond


def _like(name: str, result: object, x: Tensor) -> Tensor:
    """What a hook returned, in x's dtype."""
    if not isinstance(result, Tensor):
        raise TypeError(f"{name}: expected it to return a tensor, got {type(result).__name__}")
    if result.shape != x.shape:
        raise ValueError(f"{name}: expected it to return shape {list(x.shape)}, got {list(result.shape)}")
    return result.to(x.dtype)


def _copy(x: Tensor, *, graph: bool = False) -> Tensor:
    with _ordinary_mode(graph):
        return x.clone()


_NO_CHANGE = contextlib.nullcontext()


class _GradMode:
    """torch.set_grad_enabled for many uses, one after another: where nothing changes it only looks.

    A model may change the mode as well; it is put back to what it was all the same.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.before = enabled, enabled

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        if self.before != self.enabled:
            torch.set_grad_enabled(self.enabled)

    def __exit__(self, *_: object) -> None:
        if torch.is_grad_enabled() != self.before:
            torch.set_grad_enabled(self.before)


def _ordinary_mode(grad: bool) -> contextlib.AbstractContextManager[object]:
    """Out of inference mode, whose tensors nobody could step or train on afterwards; gradients as asked for."""
    if torch.is_grad_enabled() == grad and not torch.is_inference_mode_enabled():
        return _NO_CHANGE
    modes = contextlib.ExitStack()
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.set_grad_enabled(grad))
    return modes


def _shares(x: Tensor, others: Iterable[Tensor | None]) -> bool:
    place = x.untyped_storage().data_ptr()
    for other in others:
        if other is not None and other.untyped_storage().data_ptr() == place:
            return True
    return False


# Beside the chain


def slerp(a: Tensor, b: Tensor, w: float | Tensor) -> Tensor:
    """Spherical interpolation between the samples of two batches (Shoemake 1985), a at w = 0 and b at w = 1.

    Equivalent to, for each pair of samples a, b with the angle theta between them:

        sin((1 - w) * theta) / sin(theta) * a + sin(w * theta) / sin(theta) * b

    which leaves normal noise about normal (Song et al. 2021, section 5.3). The codebase of that paper takes one angle
    for the whole batch; here each sample has its own. Where theta is 0 or pi, within rounding, it is the straight line
    (1 - w)*a + w*b.

    Args:
        a, b: [B, ...], one shape, dtype and device, floating.
        w: a number, or a tensor [B] or [].

    Returns:
        Like a. Half types are computed in float32.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if a.dim() == 0:
        raise ValueError("a: expected a batch dimension, got a 0-dimensional tensor")
    if b.shape != a.shape or b.dtype != a.dtype or b.device != a.device:
        raise ValueError(
            f"b: expected shape {list(a.shape)}, {a.dtype} on {a.device} (like a), "
            f"got {list(b.shape)}, {b.dtype} on {b.device}"
        )
    dtype = compute_dtype(a.dtype)
    if isinstance(w, bool) or not isinstance(w, (int, float, Tensor)):
        raise TypeError(f"w: expected a number or a tensor, got {type(w).__name__}")
    weight = torch.as_tensor(w, dtype=dtype, device=a.device)
    if weight.shape not in ((), (a.shape[0],)):
        raise ValueError(f"w: expected a number or shape [{a.shape[0]}], got {list(weight.shape)}")
    each = (-1,) + (1,) * (a.dim() - 1)
    first, second = a.to(dtype), b.to(dtype)

    def norm(value: Tensor) -> Tensor:
        return torch.linalg.vector_norm(value.reshape(value.shape[0], -1), dim=1)

    # the angle from a sum and a difference is accurate everywhere; the arc cosine of a dot product is not near 0
    tiny = torch.finfo(dtype).tiny
    unit_a = first / norm(first).clamp(min=tiny).reshape(each)
    unit_b = second / norm(second).clamp(min=tiny).reshape(each)
    theta = 2 * torch.atan2(norm(unit_a - unit_b), norm(unit_a + unit_b))
    sine = torch.sin(theta)
    # below this the arc and the line agree to rounding (at 0), or no arc is singled out (at pi)
    straight = sine < math.sqrt(torch.finfo(dtype).eps)
    safe = torch.where(straight, 1.0, sine)
    of_a = torch.where(straight, 1 - weight, torch.sin((1 - weight) * theta) / safe)
    of_b = torch.where(straight, weight, torch.sin(weight * theta) / safe)
    return (of_a.reshape(each) * first + of_b.reshape(each) * second).to(a.dtype)


def to_uint8(x: Tensor, *, layout: str = "NCHW") -> Tensor:
    """Images in [-1, 1] as bytes: ((x + 1)*127.5).clamp(0, 255), truncated, as OpenAI's scripts do.

    Args:
        x: a floating tensor, [B, C, H, W] for layout "NHWC"; any shape otherwise. Half types are computed in float32.
        layout: "NCHW" leaves the dimensions alone; "NHWC" returns [B, H, W, C], contiguous.

    Returns:
        A new uint8 tensor on x's device.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    _one_of("layout", layout, ("NCHW", "NHWC"))
    if layout == "NHWC" and x.dim() != 4:
        raise ValueError(f"x: expected [batch, channels, height, width] for layout 'NHWC', got {list(x.shape)}")
    with torch.no_grad():
        result = ((x.to(compute_dtype(x.dtype)) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return result.permute(0, 2, 3, 1).contiguous() if layout == "NHWC" else result
