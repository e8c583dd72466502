"""CUDA graphs of a whole chain: the network and the steps recorded once, and replayed with other noise.

`_StaticChain` is a chain whose every input stands at a fixed address; the host can run it as well as a graph can.
`_CudaRecorder` is the thin layer that makes CUDA graphs of its functions. `CapturedSampler` writes the inputs and
replays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import ops, torch_stream
from .noise import Generators, check_generators, compute_dtype, normal, on, randn
from .noise import seeds as noise_seeds
from .samplers import Sampler, _copy, _one_source, _outputs, _shares
from .schedules import integer
from .tables import Table

__all__ = ["UNROLL", "CapturedSampler", "capture"]

UNROLL = 128
"""The longest chain, in steps, that is recorded as one graph unless the caller says otherwise: not yet measured."""

_ALIGNMENT = 16  # bytes, of what a compiled network reads
_PLAIN = (int, float, str)  # what can be told to be the same


def capture(
    sampler: Sampler,
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
    """`Sampler.capture`, which says what the arguments are."""
    sizes, where, kind = sampler._check_chain(
        model, shape, "x_T", None, seeds, generator, device, dtype, model_kwargs, guidance_scale, uncond_kwargs
    )
    if unroll is not None and not isinstance(unroll, bool):
        raise TypeError(f"unroll: expected a bool or None, got {type(unroll).__name__}")
    integer("warmup", warmup, 1)
    steps = len(sampler.table)
    if not steps:
        raise ValueError("table: expected at least one step to capture, got none")
    recorder = _recorder(where)
    with torch.inference_mode(False), torch.no_grad():
        chain = _StaticChain(
            sampler, model, sizes, kind, where, generator, model_kwargs or {}, guidance_scale, uncond_kwargs
        )
        if isinstance(seeds, Tensor):
            seeds = noise_seeds(seeds, sizes[0], chain.device).clone()
        elif seeds is not None:
            seeds = noise_seeds(seeds, sizes[0])
        return CapturedSampler(chain, recorder, seeds, steps <= UNROLL if unroll is None else unroll, warmup)


class CapturedSampler:
    """A chain in CUDA graphs, from `Sampler.capture`: call it for a sample.

    The state, the seeds, the tensors among the arguments of the model and the guidance scale stand in memory of its
    own, which a replay writes before it runs: two replays must not run at once, so give them one stream, or order the
    streams. What the model reads elsewhere (its weights) is read anew in every replay, at the place where it was.

    Attributes:
        unrolled: whether the chain is one graph. Else it is the graph of one step, replayed for each step.
    """

    def __init__(
        self, chain: _StaticChain, recorder: _CudaRecorder, seeds: Tensor | None, unrolled: bool, warmup: int
    ) -> None:
        self.unrolled = unrolled
        self._chain = chain
        self._seeds = seeds

        def warm() -> None:
            chain.start()
            for draws in set(chain.draws):  # steps of each kind
                row = chain.draws.index(draws)
                if unrolled:
                    chain.step(row)
                else:
                    chain.counter.fill_(row)
                    chain.counted_step(row)

        recorder.warm_up(warm, warmup)
        self._start = recorder.record(chain.start, chain.generators)
        # what a replay calls, in order
        self._plan: list[Callable[[], object]] = []
        if unrolled:
            if any(chain.draws):
                self._plan.append(chain.load_stream)
            self._plan.append(recorder.record(chain.steps, chain.generators if any(chain.draws) else []))
        else:
            # a step that draws from a generator and one that does not are two graphs
            graphs = {
                draws: recorder.record(
                    partial(chain.counted_step, chain.draws.index(draws)), chain.generators if draws else []
                )
                for draws in sorted(set(chain.draws))
            }
            self._plan.append(chain.counter.zero_)
            for draws in chain.draws:
                self._plan.extend([chain.load_stream, graphs[draws]] if draws else [graphs[draws]])

    def replay(
        self,
        *,
        seeds: int | Tensor | None = None,
        x_T: Tensor | None = None,
        generator: Generators | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Samples: what `Sampler.sample` returns for these arguments, bit for bit where the network computes the same.

        On the current stream, and without waiting for the GPU.

        Args:
            seeds: as in `sample`; a tensor may stand on any device. Default: those of `capture`, else drawn from
                torch's default CPU generator, where any noise is needed.
            x_T: the state to start from, of the captured shape, dtype and device; not written to. Default: noise.
            generator: torch's own stream, on the chain's device, as many as were captured; advanced as `sample`
                advances it. Default: that of `capture`. Only for a chain that was captured with one.
            model_kwargs, uncond_kwargs: what is to change, for this replay and those that follow: tensors of the shape
                and dtype of the captured ones, copied into their place. All else is part of the graph.
            guidance_scale: a number or a tensor [B], for this replay and those that follow.
            out: a tensor like the sample to write it to.

        Returns:
            The sample [B, ...]: a new tensor, or `out`.

        Raises:
            TypeError, ValueError: a bad argument, by name, before anything is written.
        """
        chain = self._chain
        _one_source(seeds, None, generator)
        if x_T is not None:
            _check_like("x_T", x_T, chain.state)
        if out is not None:
            _check_like("out", out, chain.state)
        changes = _changes("model_kwargs", chain.kwargs, model_kwargs)
        changes += _changes("uncond_kwargs", chain.uncond_kwargs, uncond_kwargs)
        generators = self._given(generator, seeds)
        with torch.inference_mode(False), torch.no_grad():
            if guidance_scale is not None:
                if chain.scale is None:
                    raise ValueError("guidance_scale: expected None, the chain was captured without guidance")
                batch, dtype = chain.state.shape[0], chain.state.dtype
                changes.append((chain.scale, ops.check_scale(guidance_scale, batch, chain.device, dtype)))
            if not generators and (seeds is not None or chain.random or x_T is None):
                # from the host: the device is not waited for
                given = self._seeds if seeds is None else seeds
                changes.append((chain.seeds, noise_seeds(given, chain.state.shape[0])))
            if x_T is not None:
                changes.append((chain.state, x_T))
            for static, value in changes:
                # pinned memory would still be read when the caller has it back
                static.copy_(value.clone() if value.is_cpu and value.is_pinned() else value, non_blocking=True)
            for own, other in zip(chain.generators, generators, strict=True):
                own.set_state(other.get_state())
            if x_T is None:
                self._start()
            for run in self._plan:
                run()
            for own, other in zip(chain.generators, generators, strict=True):
                other.set_state(own.get_state())
            return _copy(chain.state) if out is None else out.copy_(chain.state)

    __call__ = replay

    def update(self, sampler: Sampler) -> None:
        """Replay another sampler's chain from now on: another eta, or other timesteps, of the same length.

        The rows and the times that the model is told are written over the captured ones; nothing is captured again.

        Raises:
            TypeError: not a sampler.
            ValueError: one whose steps are not those that were captured: another length, structure (eta 0 and eta > 0
                differ in it: one adds noise), kind of time, rounding or backend.
        """
        self._chain.update(sampler)

    def _given(self, generator: Generators | None, seeds: int | Tensor | None) -> list[torch.Generator]:
        """The generators of a replay, one for each that was captured."""
        chain = self._chain
        if chain.source is None:
            if generator is not None:
                raise ValueError("generator: expected None, the chain was captured without one")
            return []
        if seeds is not None:
            raise ValueError("seeds: expected None, the chain was captured with a generator")
        if generator is None:
            return _members(chain.source)
        check_generators(generator, chain.state.shape[0], chain.device)
        members = _check_members(generator, chain.device)
        if isinstance(generator, torch.Generator) != isinstance(chain.source, torch.Generator):
            kinds = "one generator", "a generator per sample"
            wanted = isinstance(generator, torch.Generator)
            raise ValueError(f"generator: expected {kinds[wanted]}, as captured, got {kinds[not wanted]}")
        return members


class _StaticChain:
    """A chain whose inputs and state stand at fixed addresses: the functions that a graph records.

    Attributes:
        state: the state [B, ...], contiguous, in which the steps are made in place.
        seeds: int64 [B].  counter: int64 [1], the row that `counted_step` is at.
        times: [S, B], what the model is told at each row; a row begins at a multiple of 16 bytes, as a compiled
            network may expect.
        table: the sampler's rows, but named 0 to S-1, so that the counter finds them; the noise words of a row are
            columns of it, and stay.
        source: the caller's generator or generators; generator: its like of our own, which graphs can be replayed with
            whatever generator comes; generators: its members.
        draws: for each row, whether it draws from them.
        kwargs, uncond_kwargs: for the model, with tensors of our own.  scale: [B], in what is computed in, or None.
    """

    def __init__(
        self,
        sampler: Sampler,
        model: Callable[..., Any],
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators | None,
        model_kwargs: Mapping[str, Any],
        guidance_scale: float | Tensor | None,
        uncond_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.sampler, self.model = sampler, model
        self.state = torch.zeros(sizes, dtype=dtype, device=device)
        self.device = self.state.device  # with an index, where `device` has none
        batch, steps = sizes[0], len(sampler.table)
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.random = sampler._random
        rows = sampler.table.rows.detach()
        self.table = Table(
            rows,
            sampler.table.structure,
            range(steps),
            name=sampler.table.name,
            host=sampler.table.host,
            scalars=sampler.table.scalars,
        )
        self._rows = self.table.to(self.device, dtype, host_rounding=sampler.rounding == "host")

        self.source = generator
        self.generator: Generators | None = None
        self.generators: list[torch.Generator] = []
        if generator is not None:
            self.generators = [torch.Generator(self.device) for _ in _check_members(generator, self.device)]
            self.generator = self.generators[0] if isinstance(generator, torch.Generator) else self.generators
        self.draws = self._drawing(sampler)
        single = isinstance(self.generator, torch.Generator) and self.device.type == "cuda"
        self._stream = torch_stream.Recorder(self.generators[0], self.device) if single else None

        self.kwargs = _owned("model_kwargs", model_kwargs, self.device)
        self.uncond_kwargs = None if uncond_kwargs is None else _owned("uncond_kwargs", uncond_kwargs, self.device)
        self.scale: Tensor | None = None
        if guidance_scale is not None:
            checked = ops.check_scale(guidance_scale, batch, self.device, dtype)
            self.scale = checked.to(compute_dtype(dtype)).expand(batch).clone()

        told, values = sampler._clock(batch, dtype, self.device)
        width = -(-batch * told.element_size() // _ALIGNMENT) * _ALIGNMENT // told.element_size()
        self._told = torch.empty(steps, width, dtype=told.dtype, device=self.device)
        self.times = self._told[:, :batch]
        # not views: a network that is compiled for one tells it from a tensor
        self._rows_of_times = [_alias(self._told, row * width, batch) for row in range(steps)]
        self._row_of_times = torch.empty(1, batch, dtype=told.dtype, device=self.device)
        self._time = _alias(self._row_of_times, 0, batch)
        self._write_times(values)

    def start(self) -> None:
        """x_T: noise of the seeds, or of the generator."""
        sizes, dtype = tuple(self.state.shape), self.state.dtype
        if self.generator is None:
            self.state.copy_(normal(sizes, self.seeds, domain="initial", dtype=dtype, device=self.device))
        else:
            self.state.copy_(randn(sizes, self.generator, dtype, self.device))

    def load_stream(self) -> None:
        """Before a graph whose steps make torch's normals themselves: tell them where the generator stands."""
        if self._stream is not None:
            self._stream.load()

    def steps(self) -> None:
        """All steps, in order."""
        with self._recording(any(self.draws)):
            for row in range(len(self.table)):
                self.step(row)

    def step(self, row: int) -> None:
        """The step of a row."""
        time = self._rows_of_times[row]
        version = time._version
        self._advance(row, None, time)
        if time._version != version:
            # every replay reads it again
            raise ValueError("model: expected it to leave t as it is in a chain of one graph, got it changed in place")

    def counted_step(self, row: int) -> None:
        """The step of the row that the counter is at, and the counter moved on.

        row: one whose step is of the same kind: it draws from the generator, or does not.
        """
        torch.index_select(self.times, 0, self.counter, out=self._row_of_times)
        with self._recording(self.draws[row]):
            self._advance(row, self.counter, self._time)
        self.counter.add_(1)

    def update(self, sampler: Sampler) -> None:
        """Write the rows of another sampler over those of this one."""
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler: expected a Sampler, got {type(sampler).__name__}")
        told, values = sampler._clock(0, self.state.dtype, self.device)
        for name, found, expected in (
            ("steps", len(sampler.table), len(self.table)),
            ("a structure", sampler.table.structure, self.table.structure),
            ("a time of dtype", told.dtype, self.times.dtype),
            ("scalar coefficients", sampler.table.scalars, self.table.scalars),
            ("rounding", sampler.rounding, self.sampler.rounding),
            ("backend", sampler.backend, self.sampler.backend),
            ("noise at the rows", self._drawing(sampler), self.draws),
        ):
            if found != expected:
                raise ValueError(f"sampler: expected {name} {expected}, as captured, got {found}")
        with torch.inference_mode(False), torch.no_grad():
            host_rounding = sampler.rounding == "host"
            self._rows.copy_(sampler.table.to(self.device, self.state.dtype, host_rounding=host_rounding))
            self._write_times(values)
        self.sampler = sampler

    def _advance(self, row: int, t: Tensor | None, time: Tensor) -> None:
        """One step in place: of row `row`, or with t of the row that it names on the device."""
        # an alias, and the steps in place: as in the loop of `Sampler.sample`
        x = self.state.detach()
        unconditional = None if self.uncond_kwargs is None else {**self.kwargs, **self.uncond_kwargs}
        m, uncond = _outputs(self.model, x, time, self.kwargs, unconditional)
        shared = _shares(x, (m, uncond))
        random, drawn = self.random and self.generator is None, self.random and self.generator is not None
        result = ops.step(
            self.table,
            m,
            t,
            self.state,
            row=row if t is None else None,
            uncond_output=uncond,
            guidance_scale=self.scale,
            seeds=self.seeds if random else None,
            noise=torch.zeros_like(self.state) if drawn and not self.draws[row] else None,
            generator=self.generator if drawn and self.draws[row] else None,
            out=None if shared else self.state,
            rounding=self.sampler.rounding,
            backend=self.sampler.backend,
        )
        if shared:
            self.state.copy_(result)

    def _recording(self, draws: bool) -> AbstractContextManager[None]:
        """Within it, steps with the generator read where it stands from device memory. draws: whether there are any."""
        return self._stream.recording() if draws and self._stream is not None else nullcontext()

    def _drawing(self, sampler: Sampler) -> list[bool]:
        drawn = self.generator is not None and sampler._random
        return [drawn and noisy for noisy in sampler.table.noisy]

    def _write_times(self, values: Sequence[float]) -> None:
        told = torch.tensor(values, dtype=self._told.dtype, device="cpu")
        self._told.copy_(told[:, None].repeat(1, self._told.shape[1]), non_blocking=True)


class _CudaRecorder:
    """Makes CUDA graphs of functions, in one private memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            # Not one stream: a BLAS library keeps a workspace for each stream, and the one that a graph uses has to lie
            # in the graph's own pool, from which nobody else is given memory.
            self.warm, self.stream = torch.cuda.Stream(), torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], None], times: int) -> None:
        """Run it outside a graph, for all that is made at a first call."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.warm.wait_stream(current)
            with torch.cuda.stream(self.warm):
                for _ in range(times):
                    with _recordable():
                        function()
            current.wait_stream(self.warm)
            _check_inner_graphs(torch.cuda.current_device())

    def record(self, function: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """The replay of a new graph of it, which advances the generators.

        RuntimeError, with the reason and what to do, where it cannot be recorded.
        """
        # where the capture cannot be ended either, `failure` says less than `cause`
        cause: BaseException | None = None
        failure: BaseException | None = None
        # the stream is set here too: torch.cuda.graph leaves its own current where it cannot end the capture
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), _recordable():
            graph = _graph(generators)
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    try:
                        with torch_stream.sync_debug_mode(2):  # before CUDA sees it and declares the capture invalid
                            function()
                    except BaseException as error:
                        cause = error
                        raise
            except BaseException as error:
                failure = error
        if failure is None:
            replay: Callable[[], None] = graph.replay
            return replay
        if failure is not cause:
            with suppress(RuntimeError):
                self._mend(graph, generators)
        first = failure if cause is None else cause
        if isinstance(first, RuntimeError) and not isinstance(first, torch.OutOfMemoryError):
            raise RuntimeError(_explanation(first, self.device)) from first
        raise first

    def _mend(self, graph: torch.cuda.CUDAGraph, generators: Sequence[torch.Generator]) -> None:
        """Bring torch back from a capture that CUDA has declared invalid: torch stops half way through ending it."""
        _BROKEN.append(graph)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            with suppress(RuntimeError):  # of a capture that did not begin
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), self.pool)
            # the generators, torch's default one among them, leave their capture where a good one ends
            with torch.cuda.graph(_graph(generators), stream=self.stream, capture_error_mode="thread_local"):
                torch.zeros(1, device=self.device)


_BROKEN: list[torch.cuda.CUDAGraph] = []  # kept, as torch's allocators still ask them which stream they record


def _recorder(device: torch.device) -> _CudaRecorder:
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {device}; use sample")
    return _CudaRecorder(device)


def _graph(generators: Sequence[torch.Generator]) -> torch.cuda.CUDAGraph:
    """A new graph, on the current device, that may draw from the generators."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    return graph


@contextmanager
def _recordable() -> Iterator[None]:
    """The settings in which a chain is warmed up and recorded."""
    try:
        with _no_inner_graphs():
            yield
    finally:
        # The casts of weights that autocast keeps: a graph would go on to read those of the warm-up, which are freed at
        # the end of autocast; those of a graph are no one else's. (To keep none is a reason to compile a network anew.)
        torch.clear_autocast_cache()


@contextmanager
def _no_inner_graphs() -> Iterator[None]:
    """Run what was compiled with mode="reduce-overhead" without the CUDA graphs of its own.

    Within a capture they would become part of ours, over memory that they give to others between two calls; to record
    or warm them up there is not possible at all. With an empty list of sizes to record they step aside: the same
    kernels run, one by one.
    """
    config = sys.modules.get("torch._inductor.config")
    if config is None or not hasattr(config.triton, "cudagraph_capture_sizes"):
        yield
        return
    with config.patch({"triton.cudagraph_capture_sizes": ()}):
        yield


def _check_inner_graphs(device: int) -> None:
    """Refuse, in a torch without the list of sizes, where CUDA graphs of compiled functions may be in play."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or hasattr(trees, "is_cudagraph_capture_sizes"):
        return
    if trees.get_manager(device, create_if_none_exists=False) is not None:
        raise RuntimeError(
            "model: it, or another function of this process, was compiled with mode='reduce-overhead', whose "
            f"CUDA graphs torch {torch.__version__} cannot leave out of a capture; compile without, or update torch"
        )


def _explanation(error: RuntimeError, device: torch.device) -> str:
    """Why a capture failed, and what to do about it."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    frame = extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return (
        f"model: the chain cannot be captured in a CUDA graph: {reason} ({where}). What runs in it must not wait for "
        "the GPU (.item(), .cpu(), an `if` on a tensor) nor make tensors from data of the host: give it tensors on "
        f"{device} (model_kwargs), or use sample"
    )


def _members(generator: Generators) -> list[torch.Generator]:
    return [generator] if isinstance(generator, torch.Generator) else list(generator)


def _check_members(generator: Generators, device: torch.device) -> list[torch.Generator]:
    """The generators, each on the device: what is drawn on the host would be drawn once, at the capture."""
    members = _members(generator)
    for member in members:
        if not on(member, device):
            raise ValueError(
                f"generator: expected one on {device} for a captured chain, got {member.device}; "
                f"make it with torch.Generator({str(device)!r}), or give seeds"
            )
    if len({id(member) for member in members}) != len(members):
        raise ValueError("generator: expected a generator of its own for each sample, got one twice")
    return members


def _alias(tensor: Tensor, offset: int, elements: int) -> Tensor:
    """A flat tensor over a part of a contiguous one, which is not a view of it."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), offset, (elements,), (1,))


def _owned(name: str, kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a model, their tensors (in lists, tuples and dicts too) copied."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.device != device:
            raise ValueError(f"{name}: expected tensors on {device}, got one on {leaf.device}")
        return leaf.detach().clone()

    owned: dict[str, Any] = pytree.tree_map(own, dict(kwargs))
    return owned


def _changes(name: str, owned: dict[str, Any] | None, given: Mapping[str, Any] | None) -> list[tuple[Tensor, Tensor]]:
    """The (own, given) tensors of the arguments of a model that are to change."""
    if given is None:
        return []
    if owned is None:
        raise ValueError(f"{name}: expected None, the chain was captured without guidance")
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected a dict, got {type(given).__name__}")
    changes = []
    for key, value in given.items():
        if key not in owned:
            raise ValueError(f"{name}: expected some of {tuple(owned)}, as captured, got {key!r}")
        own, form = pytree.tree_flatten(owned[key])
        new, new_form = pytree.tree_flatten(value)
        label = f"{name}[{key!r}]"
        if new_form != form:
            raise ValueError(f"{label}: expected the form that was captured, {form}, got {new_form}")
        for old, leaf in zip(own, new, strict=True):
            if isinstance(old, Tensor):
                _check_like(label, leaf, old)
                changes.append((old, leaf))
            elif not (leaf is old or (type(leaf) is type(old) and isinstance(old, _PLAIN) and leaf == old)):
                got = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
                raise ValueError(f"{label}: expected {old!r}, which is part of the graph, got {got}; capture again")
    return changes


def _check_like(name: str, value: object, static: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != static.dtype:
        raise TypeError(f"{name}: expected {static.dtype}, as captured, got {value.dtype}")
    if value.shape != static.shape:
        raise ValueError(f"{name}: expected shape {list(static.shape)}, as captured, got {list(value.shape)}")
    if value.device != static.device:
        raise ValueError(f"{name}: expected a tensor on {static.device}, as captured, got {value.device}")
