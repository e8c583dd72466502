"""What happens in a run: wrappers around steps and networks, for the time of that run."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from .results import digest, leaves
from .subjects import Subject


class Watch:
    """Wraps the steps and the networks of a subject for one run. Of calls in calls of the same kind, the outer counts.

    count: of the steps of the chain.  open: the kinds, "step" and "network", that are going on.
    """

    def __init__(self, subject: Subject, obj: Any) -> None:
        self.subject = subject
        self.obj = obj
        self.open: list[str] = []
        self.count = 0
        self.stack = contextlib.ExitStack()
        self.wrapped: dict[int, tuple[Any, Any]] = {}
        self.patched: set[tuple[type, str]] = set()

    def is_next(self, kind: str) -> bool:
        """Whether the next step of the chain begins: that of a loop with a call of the network."""
        return kind == "network" and "step" in self.open if self.subject.loops else kind == "step"

    def began(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A step or a call of a network begins."""

    def ended(self, kind: str) -> None:
        """It ended, or raised."""

    def returned(self, kind: str, result: Any) -> None:
        """It ended with this result."""

    def run(self) -> Any:
        """subject.run with the wrappers in place."""
        run = functools.partial(self.subject.run, self.obj)
        with self.stack:
            for module in self.subject.networks:
                self._patch_network(module)
            for owner, name in self.subject.steps:
                self._patch_step(owner, name)
            return finished(self._call("step", run, (), {}) if self.subject.whole else run())

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        """An attribute of the instance, in front of those of its class, until the end of the run."""
        attributes = vars(owner)
        if name in attributes:
            self.stack.callback(attributes.__setitem__, name, attributes[name])
        else:
            self.stack.callback(attributes.pop, name, None)
        attributes[name] = value

    def _patch_step(self, owner: Any, name: str) -> None:
        """A method of the class, so that copies have it, and pickles do not; or what the object has in its place."""
        cls = type(owner)
        function = inspect.getattr_static(cls, name, None)
        if name in vars(owner) or not inspect.isfunction(function):
            self._patch(owner, name, self._step(getattr(owner, name)))
            return
        if (cls, name) in self.patched:
            return
        self.patched.add((cls, name))
        if name in vars(cls):
            self.stack.callback(setattr, cls, name, function)
        else:
            self.stack.callback(delattr, cls, name)
        setattr(cls, name, self._step(function))

    def _patch_network(self, module: nn.Module) -> None:
        # what is compiled in place must not see a wrapper inside
        name = "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"
        for method in (name, "encode", "decode"):
            if callable(getattr(module, method, None)):
                self._patch(module, method, _Network(self, getattr(module, method)))

    def _step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function) if self.subject.arguments else None

        @functools.wraps(function)
        def step(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or "step" in self.open:
                return function(*args, **kwargs)
            if signature is not None:
                bound = signature.bind(*args, **kwargs)
                for name in self.subject.arguments:
                    if bound.arguments.get(name) is not None:
                        bound.arguments[name] = self._network_given(bound.arguments[name])
                args, kwargs = bound.args, bound.kwargs
            result = self._call("step", function, args, kwargs)
            return self._through(result) if isinstance(result, GeneratorType) else result

        return step

    def _through(self, steps: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (item := self._call("step", next, (steps, end), {})) is not end:
            yield item

    def call_network(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or "network" in self.open:
            return function(*args, **kwargs)
        return self._call("network", function, args, kwargs)

    def _network_given(self, network: Any) -> Any:
        if id(network) not in self.wrapped:
            if isinstance(network, nn.Module):
                self._patch_network(network)
                self.wrapped[id(network)] = network, network
            else:
                self.wrapped[id(network)] = network, _Network(self, network)
        return self.wrapped[id(network)][1]

    def _call(self, kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.count += self.is_next(kind)
        self.began(kind, args, kwargs)
        self.open.append(kind)
        try:
            result = function(*args, **kwargs)
        finally:
            self.open.pop()
            self.ended(kind)
        self.returned(kind, result)
        return result


class _Network:
    """A network, or a method of one, among its attributes. That of a copy is the copy's; that in a pickle is plain."""

    def __init__(self, watch: Watch, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.watch, self.function = watch, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.watch.call_network(self.function, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Network:
        return _Network(self.watch, copy.deepcopy(self.function, memo))

    def __reduce__(self) -> Any:
        return functools.partial, (self.function,)


class Record(Watch):
    """Keeps a digest of each state: what a step returned, or, of a loop, what its network was given."""

    def __init__(self, subject: Subject, obj: Any) -> None:
        super().__init__(subject, obj)
        self.digests: list[bytes] = []
        self.state: tuple[list[int], str, str] | None = None

    def began(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.subject.loops and self.is_next(kind):
            self._keep([args, kwargs])

    def returned(self, kind: str, result: Any) -> None:
        if kind == "step" and not self.subject.loops:
            self._keep(result)

    def _keep(self, value: Any) -> None:
        for _, x in leaves(value):
            if isinstance(x, Tensor):
                self.digests.append(digest(x))
                self.state = list(x.shape), str(x.dtype).removeprefix("torch."), str(x.device)
                return


class Timer(Watch):
    """The time in steps, less that in networks; that in networks; and that of each step. In seconds."""

    def __init__(self, subject: Subject, obj: Any) -> None:
        super().__init__(subject, obj)
        self.spent = {"step": 0.0, "network": 0.0, "": 0.0}
        self.since = 0.0
        self.steps: list[float] = []

    def run(self) -> Any:
        self.since = now()
        try:
            return super().run()
        finally:
            self._turn("")

    def began(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._turn(self.open[-1] if self.open else "")
        if self.is_next(kind):
            self.steps.append(0.0)

    def ended(self, kind: str) -> None:
        self._turn(kind)

    def _turn(self, kind: str) -> None:
        at = now()
        self.spent[kind] += at - self.since
        # what a loop does before it calls its network is no step
        if kind == "step" and self.steps:
            self.steps[-1] += at - self.since
        self.since = at


def now() -> float:
    """The time, after what CUDA was given is done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def finished(result: Any) -> Any:
    """A run that is a generator, run to its end."""
    return list(result) if isinstance(result, GeneratorType) else result
