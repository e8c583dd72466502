"""What the code of methods is found to look at."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff.integrations._hooks import Hooks

SCALE = [1.0]
MODULE = types.ModuleType("of_a_fork")
MODULE.itself = MODULE  # type: ignore[attr-defined]
exec("def outside(diffusion):\n    return diffusion.flag", vars(MODULE))


def outside(diffusion: Any) -> Any:
    return diffusion.flag


def through(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def unmarked(function: Any) -> Any:
    return lambda *args: function(*args)


def made(scale: list[float]) -> Any:
    def step(self: Any, x: Any) -> Any:
        return x * scale[0]

    return step


def step_of(source: str) -> Any:
    names: dict[str, Any] = dict(globals())
    exec(f"def step(self, x):\n    {source}", names)
    return names["step"]


def hooks(step: Any, obj: Any = None, **members: Any) -> Hooks:
    cls = type("Diffusion", (Base,), {"step": step, **members})
    obj = cls() if obj is None else obj
    return Hooks(obj, cls, ["step", "missing"], names={"betas"}, keys={"mean"}, numbers={0, 1})


class Base:
    flag = False
    betas = (0.1,)

    @property
    def rate(self) -> float:
        return 0.5

    def helper(self, x: Any) -> Any:
        return outside(self) + x

    @staticmethod
    def pure(x: Any) -> Any:
        return 1 * x


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("return x + self.betas[0]", None),
        ("return {'mean': x.float().exp(), 'two words': torch.randn(1)}", None),
        ("return self.pure(x).shape[-1]", "the number -1"),
        ("return x[:, :3]", "the number 3"),
        ("return x in (0, 7)", "the number 7"),
        ("return super().step(x) if self.flag else x", "'flag'"),
        ("return getattr(self, 'other', 0)", "'other'"),
        ("return [lambda: self.flag for _ in x]", "'flag'"),
        ("return self.rate", "'rate'"),
        ("return self.helper(x)", "'flag'"),
        ("return outside(self)", "'flag'"),
        ("return MODULE.itself.outside(self)", "'flag'"),
        ("return Base.helper(self, x)", "'flag'"),
        ("return vars(self)['flag']", "'flag'"),
        ("return self.__dict__", "'__dict__'"),
        ("return x * SCALE[0]", "the variable 'SCALE'"),
    ],
)
def test_what_a_method_looks_at(step: str, reason: str | None) -> None:
    for wrapped in (lambda f: f, torch.no_grad(), torch.inference_mode(), through, unmarked, staticmethod):
        found = hooks(wrapped(step_of(step))).reason
        expected = reason and {"return self.helper(x)": "helper of Base"}.get(step, "step of Diffusion")
        assert found == (reason and f"{expected} depends on {reason}")


def test_code_that_cannot_be_seen() -> None:
    for step, reason in (
        (functools.partialmethod(Base.pure), "a partialmethod, whose code cannot be seen"),
        (functools.partial(Base.pure), "a partial, whose code cannot be seen"),
        (len, "a builtin_function_or_method, whose code cannot be seen"),
        (made([1.0]), "the variable 'scale'"),
    ):
        assert hooks(step).reason == f"step of Diffusion depends on {reason}"


def test_modules_of_torch() -> None:
    class Diffusion(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("betas", torch.ones(1))
            self.register_buffer("rates", torch.ones(1))

    for source, reason in (
        ("return self.betas.to(x.device).float().type(x.dtype).half()", None),
        ("return self.rates", "'rates'"),
        ("return x if self.training else -x", "'training'"),
    ):
        Diffusion.step = step_of(source)  # type: ignore[attr-defined]
        found = Hooks(Diffusion(), Diffusion, ["step"], names={"betas"}, keys=())
        assert found.reason == (reason and f"step of Diffusion depends on {reason}")
        assert found.are_same()


def test_a_function_that_calls_itself_is_seen_once() -> None:
    def again(self: Any, x: Any) -> Any:
        return again(self, x) if x else self.flag

    assert hooks(again).reason == "step of Diffusion depends on 'flag'"


@pytest.mark.parametrize(
    "change",
    [
        lambda cls: setattr(cls, "step", through(cls.step)),
        lambda cls: delattr(cls, "step"),
        lambda cls: setattr(cls, "helper", Base.pure),
        lambda cls: setattr(cls.__mro__[1], "helper", lambda self, x: x),
        lambda cls: setattr(cls.__mro__[1], "step", lambda self, x: x),
    ],
)
def test_methods_that_become_others_are_noticed(change: Callable[[Any], None]) -> None:
    class Lower:
        def helper(self, x: Any) -> Any:
            return x

        def step(self, x: Any) -> Any:
            return x

    class Upper(Lower):
        def step(self, x: Any) -> Any:
            return self.helper(super().step(x))

    found = Hooks(Upper(), Upper, ["step"], names=(), keys=())
    Upper.unrelated = 3  # type: ignore[attr-defined]
    assert found.reason is None and found.are_same()
    change(Upper)
    assert not found.are_same()


def test_an_object_is_not_held() -> None:
    obj = Base()
    before = sys.getrefcount(obj)
    found = hooks(step_of("return x"), obj)
    assert found.reason is None and sys.getrefcount(obj) == before
