"""What is run, with and without fastdiff, and where its steps and networks are."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import integrations
from ..integrations import _host
from ..samplers import Sampler


class CheckError(Exception):
    """The check cannot be made; the message says what was expected."""


@dataclass
class Subject:
    """What is run, and where its steps are.

    host, name: the codebase, and the class.  side(enabled): what to give to `run` for a run with or without fastdiff.
    steps: methods by owner and name, each a step, or a loop of steps (`loops`).  arguments: those of their arguments
    that are networks.  networks: modules that are known beforehand.  whole: the run itself is the loop, and all that
    is not the network counts as steps.
    """

    host: str
    name: str
    side: Callable[[bool], Any]
    run: Callable[[Any], Any]
    steps: list[tuple[Any, str]] = field(default_factory=list)
    arguments: tuple[str, ...] = ()
    networks: list[nn.Module] = field(default_factory=list)
    loops: bool = False
    whole: bool = False
    enabling: Enabling | None = None
    notes: list[str] = field(default_factory=list)

    def restore(self) -> None:
        if self.enabling is not None:
            self.enabling.restore()


class Enabling:
    """An object that is enabled and disabled in turn. What an enabled one has cached outlives the turns.

    options: those to be checked.  on: its parts as `use` left them.
    """

    def __init__(self, obj: Any, noise: _host.Noise | None) -> None:
        self.obj = obj
        found = integrations.summary(obj)
        self.host = found.host
        self.options = next((part.options for part in found.parts.values() if part is not None), _host.Options())
        if noise is not None and noise != self.options.noise:
            self.options = dataclasses.replace(self.options, noise=noise, seeds=None)
        self.before = self._parts()
        try:
            integrations.disable(obj)
            self.off = self._parts()
            self.use(self.options)
        finally:
            self.restore()

    def targets(self) -> dict[str, Any]:
        return integrations._host_of(self.obj).targets(self.obj)

    def _parts(self) -> list[tuple[Any, type, _host.State | None]]:
        return [(part, type(part), vars(part).get(_host._STATE)) for part in self.targets().values()]

    def use(self, options: _host.Options) -> None:
        """Enable it like this from now on, with no steps counted."""
        _put(self.off)
        integrations.enable(
            self.obj, **{each.name: getattr(options, each.name) for each in dataclasses.fields(options)}
        )
        self.on = self._parts()

    def use_torch_noise(self) -> None:
        self.use(dataclasses.replace(self.options, noise="torch", seeds=None))

    def states(self) -> list[_host.State]:
        return [state for _, _, state in self.on if state is not None]

    def side(self, enabled: bool) -> Any:
        """The object, with or without fastdiff."""
        _put(self.on if enabled else self.off)
        return self.obj

    def restore(self) -> None:
        """The object as it came."""
        _put(self.before)


def _put(parts: list[tuple[Any, type, _host.State | None]]) -> None:
    for part, cls, state in parts:
        part.__class__ = cls
        if state is None:
            vars(part).pop(_host._STATE, None)
        else:
            vars(part)[_host._STATE] = state


def subject_of(made: Any, *, noise: _host.Noise | None = None, seed: int = 0) -> Subject:
    """What a factory returned, as something to run.  CheckError for anything else than this file's first lines say."""
    obj, run, networks = made, None, []
    if isinstance(made, tuple):
        obj, run, *networks = made if len(made) in (2, 3) else (None, None)
        if not callable(run) or not all(isinstance(each, nn.Module) for each in networks):
            raise CheckError(
                "the factory: expected an object, (object, run) or (theirs, ours), and behind the two a "
                f"torch.nn.Module or nothing, got a tuple of ({', '.join(type(part).__name__ for part in made)})"
            )
    if inspect.isroutine(obj) and run is not None:
        return _functions(obj, run, networks, noise)
    if isinstance(obj, Sampler):
        subject = _sampler(obj, run, noise)
    else:
        try:
            enabling = Enabling(obj, noise)
        except (TypeError, ValueError, ImportError) as error:
            raise CheckError(
                f"fastdiff.enable does not take what the factory returned: {error}\n(A factory may also return two "
                "functions without arguments, (theirs, ours), for code that is changed by an import.)"
            ) from error
        subject = _SUBJECTS[enabling.host](enabling, run, seed)
    subject.networks += networks
    return subject


def _functions(theirs: Any, ours: Any, networks: list[nn.Module], noise: str | None) -> Subject:
    _check_own_noise(noise, "two functions")
    return Subject(
        "functions",
        f"{_name_of(theirs)} and {_name_of(ours)}",
        lambda enabled: ours if enabled else theirs,
        lambda function: function(),
        networks=networks,
        loops=True,
        whole=bool(networks),
        notes=[] if networks else ["no network was given, so the steps cannot be told from it"],
    )


def _sampler(sampler: Any, run: Any, noise: str | None) -> Subject:
    name = type(sampler).__name__
    if run is None:
        raise CheckError(
            f"the factory: expected ({name}, run), as a sampler of fastdiff is run with a model and a shape. Write\n"
            "    def factory():\n"
            "        sampler, model = ...\n"
            "        return sampler, lambda sampler: sampler.sample(model, (4, 3, 32, 32), generator="
            "torch.Generator().manual_seed(0))"
        )
    _check_own_noise(noise, "a sampler of fastdiff")
    plain = dataclasses.replace(sampler, backend="reference")
    notes = ["without fastdiff: the same sampler with backend='reference', which is plain PyTorch"]
    if any(sampler.table.noisy):
        notes.append(
            "with seeds that backend makes its noise slower than torch.randn would; with generator= it does not"
        )
    return Subject(
        "fastdiff",
        name,
        lambda enabled: sampler if enabled else plain,
        run,
        steps=[(each, method) for each in (sampler, plain) for method in ("sample", "iterate")],
        arguments=("model", "cond_fn"),
        loops=True,
        notes=notes,
    )


def _check_own_noise(noise: str | None, what: str) -> None:
    if noise == "philox":
        raise CheckError(f"--noise: expected no philox with {what}, which choose their noise themselves")


def _diffusers(enabling: Enabling, run: Any, seed: int) -> Subject:
    obj, name = enabling.obj, type(enabling.obj).__name__
    schedulers = enabling.targets()
    parts = getattr(obj, "components", {})
    if run is None:
        run = _pipeline_run(obj, name, seed)
    methods = ("step", "batch_step_no_noise")
    classes = ", ".join(type(each).__name__ for each in schedulers.values() if each is not obj)
    return Subject(
        "diffusers",
        f"{name} ({classes})" if classes else name,
        enabling.side,
        run,
        steps=[(each, method) for each in schedulers.values() for method in methods if hasattr(each, method)],
        networks=[part for part in parts.values() if isinstance(part, nn.Module)],
        enabling=enabling,
    )


def _pipeline_run(obj: Any, name: str, seed: int) -> Callable[[Any], Any]:
    """The call of a pipeline that takes nothing but numbers of images and steps."""
    known = inspect.signature(obj).parameters if callable(obj) else {}
    asked = [
        each
        for each, parameter in known.items()
        if (parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD)
        or each in ("prompt", "image", "negative_prompt", "prompt_embeds")
    ]
    if asked or "generator" not in known:
        takes = f"takes {asked[0]}" if asked else "is not called itself"
        raise CheckError(
            f"the factory: expected ({name}, run), as a {name} {takes}. Write\n"
            "    def factory():\n"
            "        obj = ...\n"
            "        return obj, lambda obj: ...  # one whole run, which returns its images or tensors"
        )

    def run(pipeline: Any) -> Any:
        generator = torch.Generator(getattr(pipeline, "device", "cpu")).manual_seed(seed)
        return pipeline(generator=generator, **({"output_type": "pt"} if "output_type" in known else {}))

    return run


def _openai(enabling: Enabling, run: Any, seed: int) -> Subject:
    name = type(enabling.obj).__name__
    if run is None:
        raise CheckError(
            f"the factory: expected ({name}, run), as a {name} is run with a model and a shape. Write\n"
            "    def factory():\n"
            "        diffusion, model = ...\n"
            "        return diffusion, lambda diffusion: diffusion.p_sample_loop(model, (4, 3, 64, 64))"
        )
    methods = ("p_sample", "ddim_sample", "ddim_reverse_sample")
    return Subject(
        "openai",
        name,
        enabling.side,
        run,
        steps=[(enabling.obj, method) for method in methods if hasattr(enabling.obj, method)],
        arguments=("model", "cond_fn"),
        enabling=enabling,
    )


def _lucidrains(enabling: Enabling, run: Any, seed: int) -> Subject:
    obj, name = enabling.obj, type(enabling.obj).__name__
    if run is None:
        parameters = inspect.signature(obj.sample).parameters.values()
        asked = [each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
        if asked:
            raise CheckError(
                f"the factory: expected ({name}, run), as its sample takes {asked[0]}. Write\n"
                "    def factory():\n"
                "        diffusion = ...\n"
                f"        return diffusion, lambda diffusion: diffusion.sample({asked[0]}=...)"
            )
        run = _sample
    return Subject(
        "lucidrains",
        name,
        enabling.side,
        run,
        networks=[obj.model],
        loops=True,
        # a loop that is an attribute of the instance would count as its own, and be kept
        whole=True,
        enabling=enabling,
    )


def _sample(obj: Any) -> Any:
    return obj.sample()


_SUBJECTS: dict[str, Callable[[Enabling, Any, int], Subject]] = {
    "diffusers": _diffusers,
    "openai": _openai,
    "lucidrains": _lucidrains,
}


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
