"""Other codebases with fastdiff's steps: `enable` for an object of theirs, and modules that take the place of theirs.

A codebase is imported only when an object of it is enabled, or its module here is.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..ops import Backend, Rounding
from ._host import Noise, Options, Switched, check_restorable, restore, switch

__all__ = ["Summary", "disable", "enable", "summary"]

_T = TypeVar("_T")


class _Host(Protocol):
    """What a module of a codebase has."""

    def targets(self, obj: Any) -> dict[str, Any]:
        """What of an object is switched, by its name there; {"": obj} for the object itself."""

    def mixin(self, target: Any) -> type[Switched]:
        """Its mixin; TypeError or ValueError that says what is supported."""


def enable(
    obj: _T,
    *,
    noise: Noise = "torch",
    seeds: int | Tensor | None = None,
    rounding: Rounding = "host",
    backend: Backend = "auto",
) -> _T:
    """Give an object of another codebase fastdiff's steps: the same images, and nothing else changes.

    The object itself is changed (its class becomes a subclass of what it was), no class, module or other object is.
    Whatever is not supported keeps the original step, with one warning that names it. A deep copy stays enabled; what
    is saved or pickled is the original, and can be read without fastdiff. Enabling an object again changes the options.

    Args:
        obj: a diffusers pipeline, or a DDPM, DDIM or inverse DDIM scheduler; a GaussianDiffusion of OpenAI's
            improved-diffusion or guided-diffusion, or of a fork with the same methods; one of lucidrains'
            denoising-diffusion-pytorch.
        noise: "torch": the draws of the replaced code, same numbers in the same order; the same seed gives the same
            image. "philox": noise made inside the step, independent of batch and device (`fastdiff.noise`).
        seeds: with "philox": of every chain, an int or an int64 tensor [B]. None draws a new one at every step, from
            the generator that the step is given, or torch's default CPU generator.
        rounding: for half types. "host": after every operation, as the replaced code; "once": at the end of a step,
            which is more accurate.
        backend: as for `fastdiff.step`.

    Returns:
        obj.

    Raises:
        TypeError: an object of no known codebase.
        ValueError: a scheduler of another family, an unknown option. Nothing has been changed then. (Of a pipeline
            that has several, one that cannot be enabled is left as it is, with a warning.)
    """
    options = Options(noise, seeds, rounding, backend)
    host = _host_of(obj)
    found = host.targets(obj)
    mixins: list[tuple[Any, type[Switched]]] = []
    refused: dict[str, Exception] = {}
    for name, target in found.items():
        try:
            mixins.append((target, host.mixin(target)))
        except (TypeError, ValueError) as error:
            refused[name] = error
    if not mixins:
        raise next(iter(refused.values()))
    for target, mixin in mixins:
        switch(target, mixin, options)
    for name, refusal in refused.items():
        warnings.warn(f"fastdiff: {name} is not enabled: {refusal}", RuntimeWarning, stacklevel=2)
    return obj


def disable(obj: _T) -> _T:
    """Undo `enable`: the object has its own class again. Of an object that is not enabled, nothing is changed.

    Raises:
        TypeError: an object of no known codebase, or of a class that is derived from one of fastdiff's.
    """
    found = list(_host_of(obj).targets(obj).values())
    for target in found:
        check_restorable(target)
    for target in found:
        restore(target)
    return obj


@dataclass(frozen=True)
class Summary:
    """What `summary` found; printed, a few lines of text.

    host: the codebase.  name: the class of the object.  parts: of each part that can be enabled, by its name ("" for
    the object itself), None where it is not enabled, else its options, the number of fused steps, and the number of
    steps that were left to the original code, by reason.
    """

    host: str
    name: str
    parts: dict[str, Part | None]

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.host})"]
        for name, part in self.parts.items():
            lines.append(f"  {name or 'steps'}: " + ("not enabled" if part is None else str(part)))
        return "\n".join(lines)


@dataclass(frozen=True)
class Part:
    """An enabled object: its class, its options, and what became of its steps."""

    name: str
    options: Options
    fused: int
    kept: dict[str, int]

    def __str__(self) -> str:
        o = self.options
        kept = "".join(f"; {count} kept: {reason}" for reason, count in self.kept.items())
        return (
            f"{self.name} enabled (noise={o.noise!r}, rounding={o.rounding!r}, backend={o.backend!r}), "
            f"{self.fused} steps fused{kept}"
        )


def summary(obj: Any) -> Summary:
    """What is enabled of an object, how, and which steps so far were fused or left to the original code, and why.

    Raises:
        TypeError: an object of no known codebase.
    """
    host = _host_of(obj)
    parts: dict[str, Part | None] = {}
    for name, target in host.targets(obj).items():
        parts[name] = None
        if isinstance(target, Switched):
            state = target._fastdiff
            parts[name] = Part(type(target).__name__, state.options, state.fused, dict(state.kept))
    return Summary(_name_of(obj), type(obj).__name__, parts)


def _modules(obj: Any) -> set[str]:
    """The packages that the classes of an object come from."""
    return {base.__module__.partition(".")[0] for base in type(obj).__mro__}


def _looks_like_openai(obj: Any) -> bool:
    names = ("betas", "model_mean_type", "model_var_type", "p_mean_variance", "p_sample", "ddim_sample", "q_sample")
    return all(hasattr(obj, name) for name in names)


def _looks_like_lucidrains(obj: Any) -> bool:
    names = ("betas", "objective", "model_predictions", "p_mean_variance", "p_sample", "sample", "num_timesteps")
    return "denoising_diffusion_pytorch" in _modules(obj) or all(hasattr(obj, name) for name in names)


# in this order: what names its codebase, then what has the methods of one
_HOSTS: dict[str, Callable[[Any], bool]] = {
    "diffusers": lambda obj: "diffusers" in _modules(obj),
    "lucidrains": _looks_like_lucidrains,
    "openai": _looks_like_openai,
}


def _name_of(obj: Any) -> str:
    for name, is_one in _HOSTS.items():
        if is_one(obj):
            return name
    raise TypeError(
        "obj: expected a diffusers pipeline or scheduler, a GaussianDiffusion of improved-diffusion, guided-diffusion "
        f"or a fork, or one of denoising-diffusion-pytorch, got {type(obj).__name__}. (The loops of ermongroup/ddim, "
        "CompVis and the sprite course are replaced by import: fastdiff.integrations.ermongroup, .compvis, .sprites.)"
    )


def __getattr__(name: str) -> Any:
    """A module of this package, imported when it is first asked for."""
    if name in (*_HOSTS, "compvis", "ddpo", "ermongroup", "sprites"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _host_of(obj: Any) -> _Host:
    host: Any = importlib.import_module(f"{__name__}.{_name_of(obj)}")
    found: _Host = host
    return found
