"""What the integrations share: how an object is switched over and back, what it remembers, and steps in parts."""

from __future__ import annotations

import copy
import copyreg
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .. import noise as contract
from .. import ops, reference
from ..noise import Generators
from ..ops import Backend, Rounding
from ..tables import COLUMN, Table, eps_table, fixed_table, given_x0_table, x0_table

Noise = Literal["torch", "philox"]
NOISES = ("torch", "philox")
ROUNDINGS = ("host", "once")

_T = TypeVar("_T", bound="Switched")


@dataclass(frozen=True)
class Options:
    """How the steps of an enabled object are made; see `fastdiff.enable`.  ValueError for an unknown one."""

    noise: Noise = "torch"
    seeds: int | Tensor | None = None
    rounding: Rounding = "host"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for name, known in (("noise", NOISES), ("rounding", ROUNDINGS), ("backend", ops.BACKENDS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        if self.seeds is None:
            return
        if self.noise != "philox":
            raise ValueError("seeds: expected None with noise='torch', which is drawn as the replaced code draws it")
        if isinstance(self.seeds, Tensor):
            contract.seeds(self.seeds, self.seeds.shape[0] if self.seeds.dim() else 0)
        else:
            contract.seeds(self.seeds, 0)


class State:
    """What an enabled object remembers: its options, the tables of its steps, and what became of the steps.

    options: may be replaced at any time.  tables: kept by the integration, which also bounds their number.
    fused: how many steps were fused.  kept: how many were left to the original code, by reason.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tables: dict[Any, Any] = {}
        self.fused = 0
        self.kept: dict[str, int] = {}
        self.disabled: str | None = None  # why every step is the original's
        self.tried: Any = None  # what that was found out for, if it can change

    def fresh(self) -> State:
        """That of a copy: with the same options and what was found out, and nothing else."""
        found = State(self.options)
        found.disabled, found.tried = self.disabled, self.tried
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self.fresh()

    def fall_back(self, reason: str) -> None:
        """Count a step that is left to the original code; the first for a reason warns."""
        if reason not in self.kept:
            self.kept[reason] = 0
            warnings.warn(f"fastdiff: the original step is kept: {reason}", RuntimeWarning, stacklevel=_callers_level())
        self.kept[reason] += 1


def _callers_level() -> int:
    """How far up from its caller the code is that is not fastdiff's: what a warning should name."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] != "fastdiff" and module != "torch.utils._contextlib":  # that of torch.no_grad
            break
        level, frame = level + 1, frame.f_back
    return level


class Switched:
    """A class of another codebase whose steps are fused: the base of the integrations' mixins.

    Its instances keep a `State` among their attributes. A copy stays switched, with caches of its own. A pickle holds
    an instance of the original class, and can be read where fastdiff is not; of a class that somebody has derived from
    one of fastdiff's, an instance of that class.
    """

    @property
    def _fastdiff(self) -> State:
        found: State | None = self.__dict__.get(_STATE)
        if found is None:
            found = self.__dict__[_STATE] = State(Options())
        return found

    @classmethod
    def _original(cls) -> type:
        """The class that an instance has without fastdiff: the first of its bases that is not of fastdiff."""
        return next(base for base in cls.__mro__ if not issubclass(base, Switched))

    def _probe(self) -> str | None:
        """Why all steps of this instance are to stay the original's, None if they need not."""
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not _is_ours(type(self)):
            return tuple(map(_without_state, super().__reduce_ex__(protocol)))
        make, arguments, *rest = parts = self._plain().__reduce_ex__(protocol)
        if make not in _NEW:
            return parts
        # which are for objects of the very class that is named; this is what protocol 1 has
        return (copyreg._reconstructor, (arguments[0], object, None), *rest)  # type: ignore[attr-defined]

    def __copy__(self: _T) -> _T:
        theirs = getattr(super(), "__copy__", None)
        return _switched_as(self, copy.copy(_Made(self._plain())) if theirs is None else theirs())

    def __deepcopy__(self: _T, memo: dict[int, Any]) -> _T:
        theirs = getattr(super(), "__deepcopy__", None)
        if theirs is not None:
            return _switched_as(self, theirs(memo))

        def note(found: Any) -> None:
            memo[id(self)] = found  # for what refers back to it

        return _switched_as(self, copy.deepcopy(_Made(self._plain(), note), memo))

    def _plain(self) -> Any:
        """An instance of the original class with the same attributes; the instance itself, of somebody's own class."""
        if not _is_ours(type(self)):
            return self
        original = type(self)._original()
        plain: Any = object.__new__(original)
        plain.__dict__.update((name, value) for name, value in self.__dict__.items() if name != _STATE)
        for name in copyreg._slotnames(original):  # type: ignore[attr-defined]
            if hasattr(self, name):
                setattr(plain, name, getattr(self, name))
        return plain


_STATE, _MIXIN = "_fastdiff_state", "_fastdiff_mixin"
_NEW = (copyreg.__newobj__, copyreg.__newobj_ex__)  # type: ignore[attr-defined]


def _is_ours(cls: type) -> bool:
    """Whether a class is one that `_class_of` made, and not derived from such a one."""
    return _MIXIN in vars(cls)


def _without_state(part: Any) -> Any:
    """A part of what __reduce_ex__ gives, without the State where it has an instance's attributes."""
    if isinstance(part, tuple):
        return tuple(map(_without_state, part))
    return {name: value for name, value in part.items() if name != _STATE} if isinstance(part, dict) else part


class _Made:
    """Stands for an object that is copied by the protocol of its class, and tells when its copy is there."""

    def __init__(self, obj: Any, note: Callable[[Any], None] | None = None) -> None:
        self.obj, self.note = obj, note

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, *rest = self.obj.__reduce_ex__(protocol)

        def noted(*arguments: Any) -> Any:
            found = make(*arguments)
            if self.note is not None:
                self.note(found)
            return found

        return (noted, *rest)


def _switched_as(instance: _T, found: Any) -> _T:
    """A copy of an instance, switched as it is; the caches are its own."""
    if type(found) is type(instance)._original():
        found.__class__ = type(instance)
    if isinstance(found, Switched):
        found.__dict__[_STATE] = instance._fastdiff.fresh()
    copied: _T = found
    return copied


def switch(instance: Any, mixin: type[Switched], options: Options) -> None:
    """Make the steps of an instance those of a mixin; of one that is switched already, change the options.

    The class of the instance becomes a subclass of its own with the same name, so that what is saved names the class
    that it was. TypeError for a class that cannot be changed.
    """
    if not isinstance(instance, Switched):
        original = type(instance)
        try:
            instance.__class__ = _class_of(mixin, original)
        except TypeError as error:
            raise TypeError(
                f"obj: expected an instance of an ordinary class, got {original.__name__}: {error}"
            ) from None
    state = instance._fastdiff  # whose counts go on
    state.options = options
    state.tables.clear()
    state.disabled = instance._probe()


def check_restorable(instance: Any) -> None:
    """TypeError for an instance that `restore` has no class for: of a class derived from one of fastdiff's."""
    cls = type(instance)
    if isinstance(instance, Switched) and not _is_ours(cls) and cls._original() is not cls:
        raise TypeError(
            f"obj: expected an object that was enabled, got a {cls.__name__}, whose own class is derived "
            "from one of fastdiff's"
        )


def restore(instance: Any) -> None:
    """Undo `switch`; of any other object, nothing."""
    check_restorable(instance)
    if isinstance(instance, Switched):
        instance.__dict__.pop(_STATE, None)
        instance.__class__ = type(instance)._original()


def _class_of(mixin: type[Switched], original: type) -> type:
    known: type
    for known in original.__subclasses__():
        if _is_ours(known) and known.__bases__ == (mixin, original):
            return known
    names: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    names[_MIXIN] = mixin
    return type(original.__name__, (mixin, original), names)


def step_seeds(options: Options, generator: Generators | None, batch: int, device: torch.device) -> int | Tensor:
    """The seeds of a step with noise "philox": those of the options, or new ones, drawn from the generator.

    One 64-bit number is drawn at every step: from each of a list of generators, for its own sample; from a single one,
    or torch's default CPU generator, for sample 0, and the others count on from it. The host does not read it.
    """
    if options.seeds is not None:
        return options.seeds
    if generator is None:
        return contract.seeds(None, batch, device)
    contract.check_generators(generator, batch, device)
    if isinstance(generator, torch.Generator):
        return (_draw(generator) + torch.arange(batch, device=generator.device)).to(device)
    return torch.cat([_draw(one).to(device) for one in generator]) if batch else contract.seeds(0, 0, device)


def _draw(generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=generator.device)


def step_of_x0(
    table: Table,
    model_output: Tensor,
    t: int | Tensor | None,
    x: Tensor,
    process: Callable[[Tensor], Tensor],
    *,
    row: int | None = None,
    noise: Tensor | None = None,
    seeds: int | Tensor | None = None,
    generator: Generators | None = None,
    rounding: Rounding = "host",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`ops.step_with_x0` whose predicted x0 a Python function changes before it is clipped and used.

    process: x0, like x, to an x0 like it: a thresholding, a hook.  The other arguments are those of `ops.step`; a step
    towards an eps that is not re-derived keeps the model's.

    Two passes and what the function does, three where such an eps is not the model output itself.
    """
    structure, channels = table.structure, x.shape[1] if x.dim() > 1 else 0
    mean_output = model_output[:, :channels] if structure.learned else model_output
    where: dict[str, Any] = {"row": row, "rounding": rounding, "backend": backend}
    with_noise: dict[str, Any] = {"noise": noise, "seeds": seeds, "generator": generator}
    x0 = process(ops.step(x0_table(table), mean_output, t, x, **where))
    if not structure.a0:  # the model gives the mean, and x0 is for show
        x_prev = ops.step(table, model_output, t, x, **where, **with_noise)
        if structure.clip:
            x0 = x0.clamp(*_clip_of(table))
        return x_prev, x0
    state = x
    if structure.eps == "output":
        state = mean_output.to(x.dtype)
        if state.stride() != x.stride():  # it takes the place of the state, whose layout the results have
            state = torch.empty_like(x).copy_(state)
    elif structure.eps == "linear":
        state = ops.step(eps_table(table), mean_output, t, x, **where)
    if structure.learned:
        x0 = torch.cat([x0, model_output[:, channels:].to(x0.dtype)], dim=1)
    return ops.step_with_x0(given_x0_table(table), x0, t, state, **where, **with_noise)


def _clip_of(table: Table) -> tuple[float, float]:
    lo, hi = table.rows[0, [COLUMN["lo"], COLUMN["hi"]]].tolist()
    return lo, hi


def learned_step(
    table: Table,
    model_output: Tensor,
    t: int | Tensor | None,
    x: Tensor,
    *,
    row: int | None = None,
    noise: Tensor,
    process: Callable[[Tensor], Tensor] | None = None,
    rounding: Rounding = "host",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`ops.step_with_x0` over a table with a learned variance, its exponential torch's: the bits of the replaced code.

    The fused step has an exponential of its own, the same on every machine. Here the standard deviation is made by
    torch, in passes of its own, and only the rest is fused. process: as for `step_of_x0`.
    """
    rows = table.to(x.device, x.dtype, host_rounding=rounding == "host")
    if row is not None:
        chosen = rows[row]
    elif isinstance(t, Tensor):
        to_row = table.row_map(x.device)
        # a timestep that is not in the chain makes NaN of the step itself
        index = to_row[t.reshape(-1).long().clamp(0, to_row.numel() - 1)]
        chosen = rows[index.clamp(min=0).expand(x.shape[0])]
    else:
        assert t is not None
        chosen = rows[table.row_of(t)]
    std = reference.learned_std(chosen, table.structure, x, model_output, rounding=rounding, torch_math=True)
    options: dict[str, Any] = {"row": row, "noise": (std * noise).to(x.dtype), "rounding": rounding, "backend": backend}
    fixed, mean_output = fixed_table(table), model_output[:, : x.shape[1]]
    if process is None:
        return ops.step_with_x0(fixed, mean_output, t, x, **options)
    return step_of_x0(fixed, mean_output, t, x, process, **options)
