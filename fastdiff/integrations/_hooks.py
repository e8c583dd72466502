"""What the code of another codebase's methods looks at, and whether those methods are still the same."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

# what is called there knows nothing of the object
_TRUSTED = {*sys.stdlib_module_names, "torch", "numpy", "einops", "tqdm"}
_OF_MODULES = ("_buffers", "_parameters", "_modules")
_NOTHING = object()


class Found:
    """What classes have under some names now, where they have it."""

    def __init__(self, bases: Iterable[type], names: Iterable[str]) -> None:
        names = list(names)
        self._found = []
        for base in bases:
            present = [name for name in names if hasattr(base, name)]
            if present:
                get = operator.attrgetter(*present)
                self._found.append((get, base, get(base)))

    def are_same(self) -> bool:
        """Whether they have the same still."""
        try:
            for get, base, found in self._found:
                if get(base) != found:
                    return False
        except AttributeError:
            return False
        return True


class Hooks(Found):
    """The methods of a class that a replaced step depends on, as they are now, its own helpers included.

    methods: their names; those that the class lacks are left out.  names: the attributes of an object that its
    replacement reads whenever a step is made, or replaces.  keys: the strings that the methods may contain, besides
    those that are no identifiers.  numbers: the integers that they may contain, all with None.

    reason: the first thing they look at besides these, None without one: an attribute, a string that may be the name
    of one, a number, a variable of a module or of an enclosing function, or code that cannot be seen. Functions of the
    same codebase that they call, decorated or nested, are looked into as well; code of the standard library and of
    torch is not.
    """

    def __init__(
        self,
        obj: Any,
        cls: type,
        methods: Iterable[str],
        *,
        names: Collection[str],
        keys: Collection[str],
        numbers: Collection[int] | None = None,
    ) -> None:
        self._obj, self._known, self._keys, self._numbers = obj, set(names), set(keys), numbers
        self._methods = list(methods)
        self._known.update(self._methods)
        self._seen: set[types.FunctionType] = set()
        self._bases = [base for base in cls.__mro__ if not _is_trusted(base.__module__)]
        self.reason = self._unknown()
        del self._obj  # which may be copied and dropped
        super().__init__(self._bases, self._methods)

    def _unknown(self) -> str | None:
        for method in self._methods:  # which grows
            for base in self._bases:
                value = vars(base).get(method, _NOTHING)
                if value is not _NOTHING:
                    for word in self._words(value):
                        return f"{method} of {base.__name__} depends on {word}"
        return None

    def _words(self, value: Any) -> Iterator[str]:
        """What a function, and all that it calls, looks at that is not known."""
        if isinstance(value, staticmethod | classmethod | types.MethodType):
            value = value.__func__
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None:
            yield from self._words(wrapped)
        if not isinstance(value, types.FunctionType):
            if wrapped is None:
                yield f"a {type(value).__name__}, whose code cannot be seen"
            return
        if value in self._seen:
            return
        self._seen.add(value)
        trusted = _is_trusted(value.__globals__.get("__name__"))
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield from self._words_of_variable(name, _contents(cell), trusted)
        if trusted:
            return
        for code in _codes(value.__code__):
            yield from self._words_of_code(code, value.__globals__)

    def _words_of_code(self, code: types.CodeType, variables: dict[str, Any]) -> Iterator[str]:
        strings = {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()}
        yield from (repr(text) for text in sorted(strings - self._keys))
        if self._numbers is not None:
            yield from (f"the number {value}" for value in _integers(code.co_consts) if value not in self._numbers)
        holders = []
        for name in sorted(set(code.co_names)):
            if name in variables:
                found = variables[name]
                yield from self._words_of_variable(name, found, False)
                if isinstance(found, type | types.ModuleType):
                    holders.append(found)
            if name not in self._known and self._is_own(name):
                yield repr(name)
        for holder in holders:  # a function by the name of its module or class
            if _is_trusted(getattr(holder, "__module__", holder.__name__)):
                continue
            for name in sorted(set(code.co_names) & vars(holder).keys()):
                found = vars(holder)[name]
                if isinstance(found, types.FunctionType | staticmethod | classmethod):
                    yield from self._words(found)
                elif isinstance(found, type | types.ModuleType) and found not in holders:
                    holders.append(found)

    def _words_of_variable(self, name: str, value: Any, trusted: bool) -> Iterator[str]:
        if isinstance(value, types.FunctionType) or (callable(value) and hasattr(value, "__wrapped__")):
            yield from self._words(value)
        elif trusted or value is None or isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
            return
        elif isinstance(value, types.MethodType):
            yield from self._words(value)
        elif not _is_trusted(type(value).__module__) or not callable(value):
            yield f"the variable {name!r}"

    def _is_own(self, name: str) -> bool:
        """Whether a name is that of an attribute of the object; one of a method is looked into later."""
        attributes: dict[str, Any] = vars(self._obj)
        if name in attributes or any(name in (attributes.get(held) or ()) for held in _OF_MODULES):
            return True
        for base in self._bases:
            found = vars(base).get(name, _NOTHING)
            if isinstance(found, types.FunctionType | staticmethod | classmethod):
                self._known.add(name)
                self._methods.append(name)
                return False
            if found is not _NOTHING:
                return True
        return False


def _is_trusted(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _TRUSTED


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _integers(constants: Iterable[Any]) -> Iterator[int]:
    for constant in constants:
        if isinstance(constant, tuple | frozenset):
            yield from _integers(constant)
        elif isinstance(constant, slice):
            yield from _integers((constant.start, constant.stop, constant.step))
        elif isinstance(constant, int):
            yield constant


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a function that is not there yet
        return None
