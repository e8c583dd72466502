"""Functions of the user's that commands and settings name as `module:function`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


class FactoryError(ValueError):
    """There is no such function, or it or its module raised; that exception is the cause."""


class _Program(list[str]):
    """sys.argv as the user's code sees it in a command; `find` puts the module's file in."""


@contextlib.contextmanager
def without_arguments(module: str = "") -> Iterator[None]:
    """For commands, whose arguments are not for the user's code: sys.argv is that of the module, run without any."""
    own = sys.argv
    sys.argv = _Program([module])
    try:
        yield
    finally:
        sys.argv = own


def find(name: str, expected: str = "a function") -> Callable[..., Any]:
    """The function that `module:function` names; its module is imported, from the working directory too.

    Args:
        name: `module:function`, either of which may have dots.
        expected: what the error says that it should be.

    Raises:
        FactoryError: it is not there, cannot be called, or its module could not be imported.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise FactoryError(f"expected module:factory, got {name!r}")
    if module.endswith(".py") or "/" in module or os.sep in module:
        stem = os.path.basename(module).removesuffix(".py")
        raise FactoryError(f"expected a module's name, such as {stem}:{attribute}, got {name!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = _imported(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise FactoryError(f"module {module!r} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise FactoryError(f"{name}: expected {expected}, got {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def call(name: str, function: Callable[..., Any], /, **arguments: Any) -> Any:
    """What the function of that name returns.  FactoryError where it raises."""
    try:
        return function(**arguments)
    except Exception as error:
        raise FactoryError(f"the factory {name} raised") from error
    except SystemExit as end:
        raise FactoryError(f"the factory {name} called {exit_of(end)}") from None


def exit_of(end: SystemExit) -> str:
    """The call that raised it."""
    return f"sys.exit({'' if end.code is None else repr(end.code)})"


def _imported(module: str) -> Any:
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None and isinstance(sys.argv, _Program):
            sys.argv[0] = spec.origin
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise FactoryError(f"module {module!r} could not be imported") from error
        raise FactoryError(f"no module {error.name!r} in {os.getcwd()} or among what is installed") from None
    except Exception as error:
        raise FactoryError(f"module {module!r} could not be imported") from error
    except SystemExit as end:
        raise FactoryError(f"module {module!r} called {exit_of(end)}") from None
