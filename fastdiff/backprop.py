"""Gradients of a whole chain: what only a chain that is differentiated needs (`Sampler.sample(..., grad=...)`).

A chain is known here by a function that does one of its steps, model and all; the samplers build on this module.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .noise import Generators, compute_dtype
from .schedules import integer, real
from .tables import COLUMN, Table

__all__ = ["Inversion"]


@dataclass(eq=False)
class Inversion:
    """`grad=` of `Sampler.sample`: backpropagation that keeps two states, however long the chain.

    The backward walks the chain the other way, as is done with exactly invertible samplers (Wallace et al. 2023, DOODL,
    arXiv:2303.13703). It recovers x_t from x_{t-1} by inverting the step; as the model was given x_t too, it is found
    as a fixed point (Pan et al. 2023, AIDI, arXiv:2309.04907):

        x = x_{t-1}
        for _ in range(iterations):
            x = x + (x_{t-1} - step(model(x, t), t, x)) / A          # A: the factor of x in a step

    Then it does the step from there once more, and takes its vector-Jacobian product. So the gradient is that of states
    which are a little off; how much is measured where it can be, at x_T, and it is for the caller to say how much will
    do. The iteration converges where a step depends on x more by itself than through the model: many steps, mild
    guidance. It fails where the model is not a function of its arguments (dropout).

    Gradients reach x_T or x0, guidance_scale, tensors in model_kwargs, and the leaves (tensors that require grad and
    were not computed from others) behind all else that the model depends on. They have no second derivative. Hooks on
    those leaves would be called at every step and are refused; Parameter.register_post_accumulate_grad_hook is fine.
    DistributedDataParallel with static_graph would not reduce such gradients and is refused, where it is the model
    itself and not within another function.

    Args:
        iterations: the most passes through the model to recover a state; fewer where it does not move any more.
        tolerance: the largest error to accept: that of the recovered x_T (of the state at which the last `grad_steps`
            steps begin), relative to its norm, of the worst sample. A state of n elements counts as one of norm
            sqrt(eps*n) at least, eps being that of its dtype, so that rounding is small beside a state of zeros. Above
            it the backward raises RuntimeError before any gradient is handed out.

    Attributes:
        error: that error, in the last backward; None before.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    iterations: int = 20
    tolerance: float = field(kw_only=True)
    error: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.iterations = integer("iterations", self.iterations, 1)
        self.tolerance = real("tolerance", self.tolerance)
        if self.tolerance <= 0:
            raise ValueError(f"tolerance: expected a number > 0, got {self.tolerance}")


Grad: TypeAlias = "Literal['full', 'checkpoint'] | Inversion | None"
Step: TypeAlias = "Callable[[int, Tensor, Any], Tensor]"


def check(grad: object, grad_steps: object) -> None:
    """TypeError or ValueError unless these ask for gradients in a way that there is, where there can be any."""
    if grad is None:
        if grad_steps is not None:
            raise ValueError(f"grad_steps: expected None without grad, got {grad_steps!r}")
        return
    if not isinstance(grad, str | Inversion):
        raise TypeError(f"grad: expected None, 'full', 'checkpoint' or an Inversion, got {type(grad).__name__}")
    if isinstance(grad, str) and grad not in ("full", "checkpoint"):
        raise ValueError(f"grad: expected None, 'full', 'checkpoint' or an Inversion, got {grad!r}")
    if grad_steps is not None:
        integer("grad_steps", grad_steps, 1)
    if torch.is_inference_mode_enabled():
        raise ValueError("grad: expected None inside torch.inference_mode, where no gradient can be recorded")
    if not torch.is_grad_enabled():
        raise ValueError("grad: expected None with gradients off (torch.no_grad), where none would be recorded")


# Checkpoints


def checkpointed(step: Callable[[Tensor], Tensor], x: Tensor, generator: Generators | None, given: Any) -> Tensor:
    """step(x), of which only x is kept; done again in the backward (Chen et al. 2016, arXiv:1604.06174).

    With a generator, its state is kept too: it is set back while the step is done again. The generator itself, as the
    model may draw from it too.

    Where a tensor in `given` (any nest of dicts, lists and tuples), or a leaf that the step depends on, was modified in
    place since, the step would be another: the backward raises RuntimeError, as it does for x.
    """
    # an inference tensor does not count its changes
    tensors = [part for part in tree_flatten(given)[0] if isinstance(part, Tensor) and not part.is_inference()]
    versions = [tensor._version for tensor in tensors]
    members = [] if generator is None else [generator] if isinstance(generator, torch.Generator) else list(generator)
    states = {member: member.get_state() for member in members}
    first = True

    def again(x: Tensor) -> Tensor:
        nonlocal first
        if first:
            first = False
            return step(x)
        _check_versions(tensors, versions)
        with _set_to(states):
            return step(x)

    result: Tensor = checkpoint(again, x, use_reentrant=False)
    if not torch.compiler.is_compiling():
        # what lies behind the arguments is not done again
        found = _leaves(result, behind=[x, *tensors])
        versions.extend(leaf._version for leaf in found)
        tensors.extend(found)
    return result


def _check_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """RuntimeError unless these tensors still have these versions."""
    for tensor, version in zip(tensors, versions, strict=True):
        if tensor._version != version:
            raise RuntimeError(
                f"grad: expected what the chain depends on as it was, a tensor of shape {list(tensor.shape)} was "
                "modified in place before the backward"
            )


@contextmanager
def _set_to(states: dict[torch.Generator, Tensor]) -> Iterator[None]:
    """These generators in these states, and then as they were."""
    now = {member: member.get_state() for member in states}
    try:
        for member, state in states.items():
            member.set_state(state)
        yield
    finally:
        for member, state in now.items():
            member.set_state(state)


# Inversion


def factors(table: Table) -> list[float]:
    """What each row multiplies x by, the model output being given and nothing clipped."""
    rows, structure = table.rows.detach(), table.structure

    def column(name: str) -> Tensor:
        return rows[:, COLUMN[name]]

    x0 = column("px") if structure.x0 == "linear" else torch.zeros(len(table), dtype=rows.dtype)
    if structure.x0_divide:
        x0 = x0 / column("pd")
    total = torch.zeros_like(x0)
    if structure.a0:
        total = total + column("a0") * x0
    if structure.ax:
        total = total + column("ax")
    if structure.eps in ("rederived", "linear"):
        eps = column("gx") - column("g0") * x0 if structure.eps == "rederived" else column("ex")
        total = total + column("ae") * (eps / column("gd") if structure.eps_divide else eps)
    found: list[float] = total.tolist()
    return found


class Reversal:
    """A chain that is walked once forwards, and backwards for its gradient.

    Args:
        inversion: how states are recovered, and where the error is reported.
        step: step(row, x, given), one step of the chain, which autograd records where gradients are enabled.
        given: what the model is given beside x and the time: any nest of dicts, lists and tuples. The tensors in it
            that require grad get theirs, computed from others or not.
        table: the rows of the chain.
        x: the state to start from.
    """

    def __init__(self, inversion: Inversion, step: Step, given: Any, table: Table, x: Tensor) -> None:
        self.inversion = inversion
        self.step = step
        self.factors = factors(table)
        self.rows: list[int] = []
        self._start = x
        parts, form = tree_flatten(given)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        self._inputs = [part for part in tensors if part.requires_grad]
        self._constants = [part for part in tensors if not (part.requires_grad or part.is_inference())]
        # leaves in their place, so that the graph behind them is left for the end
        self._targets = [part.detach().requires_grad_() for part in self._inputs]
        stand_ins = iter(self._targets)
        given = [next(stand_ins) if isinstance(part, Tensor) and part.requires_grad else part for part in parts]
        self._given = tree_unflatten(given, form)
        self._known = {id(target) for target in self._targets}
        kind = x.device.type
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if torch.amp.is_autocast_available(kind):
            self._autocast = functools.partial(
                torch.autocast,
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                # with a cache, torch before 2.11 takes weights that were cast without a graph for those with one
                cache_enabled=False,
            )

    def advance(self, row: int, x: Tensor) -> Tensor:
        """One step forwards, recorded to see which tensors it depends on, without its graph."""
        x = self.step(row, x.detach(), self._given)
        for leaf in self._unknown(x):
            _check_hooks(leaf)
            self._known.add(id(leaf))
            self._inputs.append(leaf)
            self._targets.append(leaf)
        self.rows.append(row)
        return x.detach()

    def result(self, x: Tensor) -> Tensor:
        """x, the state after these steps, as a function of the state at the start and what the steps depend on."""
        if not (self._start.requires_grad or self._inputs):
            return x
        self._versions = [tensor._version for tensor in (*self._inputs, *self._constants)]
        end: Tensor = _Reversed.apply(self, [x], self._start, *self._inputs)
        return end

    def backward(self, x: Tensor, start: Tensor, grad: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of the start and of the inputs, those that are needed, from that of the end, x."""
        for tensor, target in zip(self._inputs, self._targets, strict=True):
            if tensor is target:
                _check_hooks(tensor)
        _check_versions([*self._inputs, *self._constants], self._versions)
        targets = [target for target, need in zip(self._targets, needed[1:], strict=True) if need]
        totals: list[Tensor | None] = [None] * len(targets)
        for row in reversed(self.rows):
            with self._autocast():
                x = self._before(row, x)
                with torch.enable_grad():
                    state = x.detach().requires_grad_()
                    end = self.step(row, state, self._given)
                if self._unknown(end, but=state):
                    raise RuntimeError(
                        "grad: expected a model that depends on the same tensors whenever it is called, got others in "
                        "the backward, whose gradients would be lost; use grad='checkpoint'"
                    )
            # the graph of what the model's tensors were computed from, if there is one, is needed at every step
            grad, *parts = torch.autograd.grad(end, (state, *targets), grad, retain_graph=True, allow_unused=True)
            for k, part in enumerate(parts):
                total = totals[k]
                totals[k] = part if total is None else total if part is None else total + part
            del end, state, parts
        self._report(x, start)
        found = iter(totals)
        return [grad if needed[0] else None, *(next(found) if need else None for need in needed[1:])]

    def _before(self, row: int, x: Tensor) -> Tensor:
        """The state from which this row leads to x."""
        dtype = compute_dtype(x.dtype)
        wide = x.to(dtype)
        found = x
        for _ in range(self.inversion.iterations):
            with torch.no_grad():
                missing = wide - self.step(row, found, self._given).to(dtype)
            move = missing / self.factors[row]
            found = (found.to(dtype) + move).to(x.dtype)
            # not "<": where the state has become NaN the rest would be in vain too
            if not bool(_norms(move).gt(torch.finfo(x.dtype).eps * _norms(found)).any()):
                break
        return found

    def _report(self, x: Tensor, start: Tensor) -> None:
        dtype = compute_dtype(start.dtype)
        scale, error = _norms(start), _norms(x.to(dtype) - start.to(dtype))
        floor = math.sqrt(torch.finfo(start.dtype).eps * math.prod(start.shape[1:]))
        # an error of nothing is none, also where a sample has no elements
        relative = torch.where(error == 0, 0.0, error / scale.clamp(min=floor))
        inversion = self.inversion
        inversion.error = relative.max().item() if relative.numel() else 0.0
        if not inversion.error <= inversion.tolerance:
            raise RuntimeError(
                f"grad: expected x_T recovered with a relative error of {inversion.tolerance:g} at most, got "
                f"{inversion.error:.3g}: more steps or iterations may do, or grad='checkpoint'"
            )

    def _unknown(self, end: Tensor, but: Tensor | None = None) -> list[Tensor]:
        """The leaves of a recorded step that are not known yet."""
        known = self._known if but is None else self._known | {id(but)}
        return [leaf for leaf in _leaves(end) if id(leaf) not in known]


def _check_hooks(leaf: Tensor) -> None:
    if leaf._backward_hooks:
        raise RuntimeError(
            "grad: expected parameters without hooks where a chain is inverted, as they would be called at "
            f"every step, got one on a tensor of shape {list(leaf.shape)}; use grad='checkpoint'"
        )


class _Reversed(torch.autograd.Function):
    """The end of a chain, whose backward walks it the other way."""

    @staticmethod
    def forward(ctx: Any, reversal: Reversal, end: list[Tensor], start: Tensor, *inputs: Tensor) -> Tensor:
        # in a list, as it is no input
        (x,) = end
        ctx.reversal = reversal
        ctx.save_for_backward(x, start)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        end, start = ctx.saved_tensors
        return None, None, *ctx.reversal.backward(end, start, grad, ctx.needs_input_grad[2:])


def _leaves(end: Tensor, behind: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors at which autograd's graph of `end` begins, but for those that are `behind` these others."""
    found: list[Tensor] = []
    seen: set[Any] = {tensor.grad_fn for tensor in behind}
    nodes = [end.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.append(node.variable)  # type: ignore[attr-defined]
        nodes.extend(following for following, _ in node.next_functions)
    return found


def _norms(x: Tensor) -> Tensor:
    """The norm of each sample."""
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    return torch.linalg.vector_norm(flat, dim=1, dtype=compute_dtype(x.dtype))
