"""The settings of a run, from TOML files and key=value arguments.

    samples = 50_000
    shape = [3, 32, 32]
    out = "samples"                # relative to the working directory, not to this file
    # seed, batch, chunk, dtype = "float32", store = "uint8", threads: as for `Job`; device = "cuda", inexact

    [network]                      # or network = "my_module:network"
    factory = "my_module:network"
    arguments = { checkpoint = "ema.pt" }

    [schedule]
    type = "cosine"                # a constructor of NoiseSchedule; the other keys are its arguments
    num_timesteps = 1000
    rescale_zero_snr = true        # then NoiseSchedule.rescale_zero_snr; left out, it is not

    [sampler]                      # or sampler = "my_module:sampler", a function that returns one, and no [schedule]
    type = "ddim"                  # or "ddpm"; the other keys are arguments of DDIMSampler or DDPMSampler
    steps = 50
    prediction = "v"

    [conditions]                   # keyword arguments of the network
    y = { cycle = 10 }             # by index: i % 10
    z = { random = 1000, seed = 0 }          # a class drawn for each index
    w = 3                          # for all the same; also { value = 3 }, { value = [0.5, 1.0] }
    text = { file = "embeddings.npy" }       # row i of an array; { file = "all.npz", key = "text" }

    [guidance]
    scale = 2.0
    uncond = { y = 10 }            # the conditions of the second call, where they differ

`"none"` stands for None in the tables sampler and schedule, as TOML has no word for it: clip = "none".
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch

from .. import factories
from ..noise import DTYPES
from ..samplers import DDIMSampler, DDPMSampler, Sampler
from ..schedules import NoiseSchedule, count, integer
from . import conditions, engine
from .job import Condition, Job

Network: TypeAlias = Callable[..., Any]
Decode: TypeAlias = "Callable[[torch.Tensor], torch.Tensor] | None"
_Key: TypeAlias = tuple[str, ...]

_SAMPLERS: dict[str, Any] = {"ddim": DDIMSampler, "ddpm": DDPMSampler}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_FOR_JOB = ("seed", "batch", "chunk", "store", "threads")  # as they are
_RUN = ("samples", "shape", "dtype", "out", "device", "inexact")
_TABLES = ("network", "schedule", "sampler", "conditions", "guidance")
# a condition names one of these, which may have the keys beside it
_KINDS: dict[str, tuple[str, ...]] = {"cycle": (), "random": ("seed",), "value": (), "file": ("key",)}
_CONDITIONS = (("conditions",), ("guidance", "uncond"))
_ASSIGNMENT = re.compile(r"\s*([\w-]+(?:\.[\w-]+)*)\s*=(.*)", re.DOTALL)
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)  # what NumPy raises for damaged files
_MAX_TIMESTEPS = 2**24  # of which a row of a table can hold the number
_NAMED = re.compile(r"(\w+)\b")


@dataclass(frozen=True)
class Factory:
    """The function that makes the network, called with the device: `factory(device)` -> (network, decode or None).

    Attributes:
        name: `module:function`.
        arguments: its keyword arguments.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.arguments:
            return self.name
        return f"{self.name}({', '.join(f'{key}={self.arguments[key]!r}' for key in sorted(self.arguments))})"

    def __call__(self, device: torch.device | str) -> tuple[Network, Decode]:
        """Call the function, with `device=` where it has a parameter of that name that the arguments leave out.

        What it returns is a network, called as network(x, t, **conditions), or a pair of it and decode, called with
        samples [B, ...] before they are stored. Each of them that is a torch.nn.Module is moved to the device.

        Raises:
            ValueError: there is no such function, it has no such argument, or it raises (`FactoryError`).
            TypeError: it returned something else.
        """
        where = torch.device(device)
        try:
            function = factories.find(self.name)
            made = factories.call(self.name, function, **self._completed(function, where))
        except factories.FactoryError as error:
            raise _of_key("network.factory", error) from error.__cause__
        network, decode = made if isinstance(made, (tuple, list)) and len(made) == 2 else (made, None)
        if not callable(network) or not (decode is None or callable(decode)):
            told = type(made).__name__
            if isinstance(made, (tuple, list)):
                told += f" of ({', '.join(type(part).__name__ for part in made)})"
            raise TypeError(
                f"network.factory: expected {self.name} to return a network, called as network(x, t, **conditions), "
                f"or (network, decode), got {told}"
            )
        return _moved(network, where), _moved(decode, where)

    def _completed(self, function: Callable[..., Any], device: torch.device) -> dict[str, Any]:
        """The arguments, checked against the function's, and the device."""
        arguments = dict(self.arguments)
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some of C have none
            return arguments
        named = {each.name: each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
        if "device" in named:
            arguments.setdefault("device", device)
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            _check_known("network.arguments", arguments, named, self.name)
        for name, each in named.items():
            if each.default is each.empty and name not in arguments:
                _missing(f"network.arguments.{name}", f"a value, as {self.name} takes one")
        return arguments


@dataclass(frozen=True)
class Loaded:
    """What `load` made of the settings.

    Attributes:
        job: the Job.
        out: the folder, or None where the settings name none.
        factory: makes the network; nothing of it is imported before.
        device: its name, or None for the one that is found (`engine.device_of`).
        inexact: whether to go on with a run whose network computed other bits.
    """

    job: Job
    out: Path | None
    factory: Factory
    device: str | None
    inexact: bool

    def make(self, device: torch.device | str | None = None) -> tuple[Network, Decode]:
        """(network, decode or None), made on a device: that of the settings unless given.  Raises as `Factory` does."""
        return self.factory(engine.device_of(0, self.device) if device is None else device)


def load(*sources: str | Path) -> Loaded:
    """The settings of files and arguments; see this file's first lines for the keys.

        loaded = load("run.toml", "sampler.steps=100", "conditions.y={cycle=10}")
        network, decode = loaded.make("cuda")

    Args:
        sources: TOML files, and key=value with a dotted key and a value in TOML or, where it is none, a string. Later
            ones win: tables are merged key by key, anything else is replaced. A condition of another kind replaces the
            table of the one before, `network = "module:function"` that of the network, and `sampler =
            "module:function"` those of sampler and schedule. A file of a condition is looked for beside the TOML file
            that names it, then in the working directory; `out` and what the factories open are relative to the latter.

    Raises:
        TypeError, ValueError: a source, or a key by its dotted name: unknown, missing or of another type, or a value
            that it cannot have. A file that cannot be read.
    """
    settings: dict[str, Any] = {}
    folders: dict[_Key, Path | None] = {}
    for source in sources:
        given, folder = _read(source)
        _merge(settings, given, folder, folders)
    _check_known("", settings, (*_FOR_JOB, *_RUN, *_TABLES))
    for name, expected in (("samples", "how many"), ("shape", "that of one sample, [3, 32, 32] say")):
        if name not in settings:
            _missing(name, expected)

    samples = integer("samples", settings["samples"], 1)
    arguments = {name: settings[name] for name in _FOR_JOB if name in settings}
    if "dtype" in settings:
        arguments["dtype"] = _DTYPES[_one_of("dtype", settings["dtype"], _DTYPES)]
    factory = _factory(settings.get("network"))
    made = _Conditions(samples, folders)
    if "conditions" in settings:
        arguments["conditions"] = made.all(("conditions",), settings["conditions"])
    if "guidance" in settings:
        guidance = _table("guidance", settings["guidance"])
        _check_known("guidance", guidance, ("scale", "uncond"))
        for name, expected in (("scale", "a number"), ("uncond", "a table of conditions")):
            if name not in guidance:
                _missing(f"guidance.{name}", expected)
        arguments["guidance_scale"] = guidance["scale"]
        arguments["uncond"] = made.all(("guidance", "uncond"), guidance["uncond"])
    out, device = (settings.get(name) for name in ("out", "device"))
    for name, value in (("out", out), ("device", device)):
        if value is not None and not (isinstance(value, str) and value):
            raise TypeError(f"{name}: expected a string, got {value!r}")
    if not isinstance(inexact := settings.get("inexact", False), bool):
        raise TypeError(f"inexact: expected true or false, got {inexact!r}")
    sampler = _sampler(settings)
    try:
        job = Job(sampler, settings["shape"], samples, name=str(factory), **arguments)
    except (TypeError, ValueError) as error:
        raise _renamed(error, {"guidance_scale": "guidance.scale", "uncond": "guidance.uncond"}) from None
    return Loaded(job, None if out is None else Path(out), factory, device, inexact)


def _moved(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, torch.nn.Module) else part


# Sources


def _read(source: str | Path) -> tuple[dict[str, Any], Path | None]:
    """What a source says, as nested tables, and the folder that it stands in, if it is a file."""
    if source == "":
        raise ValueError("sources: expected TOML files and key=value, got ''")
    if not isinstance(source, str | Path):
        raise TypeError(f"sources: expected TOML files and key=value, got {type(source).__name__}")
    if isinstance(source, str) and (match := _ASSIGNMENT.fullmatch(source)):
        key, text = match[1].split("."), match[2].strip()
        value = _value(text)
        if key == ["out"] and not isinstance(value, str | bool | dict | list):
            value = text  # a folder may be called 2024-01-01
        for part in reversed(key):
            value = {part: value}
        return dict(value), None
    path = Path(source)
    try:
        text = path.read_bytes().decode()
        return dict(_toml().loads(text)), path.parent.resolve()
    except FileNotFoundError:
        raise ValueError(f"sources: expected a TOML file or key=value, got {str(source)!r}, which is no file") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected TOML in UTF-8, got other bytes") from None
    except _toml().TOMLDecodeError as error:
        raise ValueError(f"{path}: expected TOML, got: {error}") from None


def _value(text: str) -> Any:
    """A value in TOML's syntax; where it is none, the text."""
    try:
        found = _toml().loads(f"value = {text}")
    except _toml().TOMLDecodeError:
        return text
    return found["value"] if len(found) == 1 else text


def _toml() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        return importlib.import_module("tomli")


def _merge(
    settings: dict[str, Any],
    given: Mapping[str, Any],
    folder: Path | None,
    folders: dict[_Key, Path | None],
    above: _Key = (),
) -> None:
    """Lay the tables of a source over those before it; `folders` is told where each value came from."""
    if not above and isinstance(given.get("sampler"), str):
        settings.pop("schedule", None)
    for name, value in given.items():
        key = (*above, name)
        before = settings.get(name)
        if key == ("network",) and isinstance(before, str) and isinstance(value, Mapping):
            before = settings[name] = {"factory": before}
        if above in _CONDITIONS and isinstance(value, Mapping) and not value.keys().isdisjoint(_KINDS):
            before = None
        if isinstance(value, Mapping):
            if not isinstance(before, dict):
                settings[name] = {}
            _merge(settings[name], value, folder, folders, key)
        else:
            settings[name] = value
            folders[key] = folder


# Parts


def _factory(network: Any) -> Factory:
    if network is None:
        _missing("network", "module:function")
    if isinstance(network, str):
        return Factory(network)
    if not isinstance(network, dict):
        raise TypeError(f"network: expected module:function or a table, got {network!r}")
    _check_known("network", network, ("arguments", "factory"))
    if "factory" not in network:
        _missing("network.factory", "module:function")
    if not isinstance(name := network["factory"], str):
        raise TypeError(f"network.factory: expected module:function, got {name!r}")
    return Factory(name, _table("network.arguments", network.get("arguments", {})))


def _sampler(settings: Mapping[str, Any]) -> Sampler:
    given = settings.get("sampler")
    if given is None:
        _missing("sampler", "a table with a type, or module:function")
    if isinstance(given, str):
        if "schedule" in settings:
            raise ValueError(f"schedule: expected none beside sampler = {given!r}, which makes its own, got a table")
        return _made_sampler(given)
    if not isinstance(given, dict):
        raise TypeError(f"sampler: expected a table or module:function, got {given!r}")
    options = dict(given)
    if "type" not in options:
        _missing("sampler.type", f"one of {', '.join(_SAMPLERS)}")
    made = _SAMPLERS[_one_of("sampler.type", options.pop("type"), _SAMPLERS)]
    known = [each.name for each in fields(made) if each.init and each.name != "schedule"]
    _check_known("sampler", options, known, made.__name__)
    if "schedule" not in settings:
        _missing("schedule", "a table with the type of the noise schedule, and its arguments")
    schedule = _schedule(settings["schedule"])
    sampler: Sampler = _called("sampler", known, made, schedule, **_with_none(options))
    return sampler


def _made_sampler(name: str) -> Sampler:
    try:
        sampler = factories.call(name, factories.find(name, "a function without arguments"))
    except factories.FactoryError as error:
        raise _of_key("sampler", error) from error.__cause__
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler: expected {name} to return a sampler of fastdiff, got {type(sampler).__name__}")
    return sampler


def _schedule(given: Any) -> NoiseSchedule:
    options = dict(_table("schedule", given))
    types = _schedule_types()
    if "type" not in options:
        _missing("schedule.type", f"one of {', '.join(types)}")
    kind = _one_of("schedule.type", options.pop("type"), types)
    made, parameters = types[kind], inspect.signature(types[kind]).parameters
    # from_host has an argument of this name
    rescale = False if "rescale_zero_snr" in parameters else options.pop("rescale_zero_snr", False)
    if not isinstance(rescale, bool):
        raise TypeError(f"schedule.rescale_zero_snr: expected true or false, got {rescale!r}")
    _check_known("schedule", options, (*parameters, "rescale_zero_snr"), kind)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            _missing(f"schedule.{name}", f"a value, as {kind} takes one")
    if "num_timesteps" in options:
        count("schedule.num_timesteps", options["num_timesteps"], _MAX_TIMESTEPS)
    schedule: NoiseSchedule = _called("schedule", parameters, made, **_with_none(options))
    return schedule.rescale_zero_snr() if rescale else schedule


def _schedule_types() -> dict[str, Callable[..., NoiseSchedule]]:
    """The constructors of NoiseSchedule that take num_timesteps, by name."""
    return {
        name: getattr(NoiseSchedule, name)
        for name, made in vars(NoiseSchedule).items()
        if isinstance(made, classmethod) and "num_timesteps" in inspect.signature(made.__func__).parameters
    }


class _Conditions:
    """Makes the conditions of a table."""

    def __init__(self, samples: int, folders: Mapping[_Key, Path | None]) -> None:
        self.samples, self.folders = samples, folders

    def all(self, key: _Key, given: Any) -> dict[str, Condition]:
        return {name: self.one((*key, name), value) for name, value in _table(".".join(key), given).items()}

    def one(self, key: _Key, given: Any) -> Condition:
        dotted = ".".join(key)
        if not isinstance(given, bool) and isinstance(given, int | float):
            given = {"value": given}
        if not isinstance(given, dict):
            raise TypeError(f"{dotted}: expected a number, or a table with one of {', '.join(_KINDS)}, got {given!r}")
        kinds = [name for name in _KINDS if name in given]
        if not kinds:
            _check_known(dotted, given, _KINDS)
        if len(kinds) != 1:
            raise ValueError(f"{dotted}: expected one of {', '.join(_KINDS)}, got {' and '.join(kinds) or 'nothing'}")
        kind = kinds[0]
        _check_known(dotted, given, (kind, *_KINDS[kind]))
        if kind == "file":
            return self.file(key, given["file"], given.get("key"))
        made: Any = {"cycle": conditions.cycle, "random": conditions.random_classes, "value": conditions.value}[kind]
        beside = {name: value for name, value in given.items() if name != kind}
        try:
            condition: Condition = made(given[kind], **beside)
        except (TypeError, ValueError) as error:
            keys = {"n": kind, "v": kind, "seed": "seed"}
            raise _renamed(error, {name: f"{dotted}.{at}" for name, at in keys.items()}) from None
        return condition

    def file(self, key: _Key, name: Any, array: Any) -> np.ndarray:
        """The first N rows of an array of numbers; read as they are needed where it is a .npy."""
        dotted = ".".join(key)
        if not (isinstance(name, str) and name):
            raise TypeError(f"{dotted}.file: expected the name of a file, got {name!r}")
        path = self.found(f"{dotted}.file", name, self.folders.get((*key, "file")))
        try:
            opened = np.load(path, mmap_mode="r", allow_pickle=False)
        except _UNREADABLE as error:
            raise _unreadable(dotted, path, error) from None
        if isinstance(opened, np.ndarray):
            if array is not None:
                raise ValueError(f"{dotted}.key: expected none, as {path} holds one array, got {array!r}")
            rows = opened
        else:
            with opened:
                name = _one_of(f"{dotted}.key", array, opened.files)
                try:
                    rows = opened[name]
                except _UNREADABLE as error:
                    raise _unreadable(dotted, path, error) from None
        if rows.dtype.kind not in "biuf":
            raise TypeError(f"{dotted}.file: expected numbers, got {rows.dtype} in {path}")
        if rows.ndim == 0 or len(rows) < self.samples:
            got = f"{len(rows)} rows" if rows.ndim else "a number"
            raise ValueError(f"{dotted}.file: expected {self.samples} rows, one per sample, got {got} in {path}")
        rows = rows[: self.samples]
        return rows if rows.dtype.isnative else rows.astype(rows.dtype.newbyteorder("="))

    def found(self, dotted: str, name: str, folder: Path | None) -> Path:
        places = [Path.cwd()] if folder in (None, Path.cwd()) else [folder, Path.cwd()]
        for place in places:
            if place is not None and (path := place / name).is_file():
                return path
        looked = " or ".join(str(place / name) for place in places if place is not None)
        raise ValueError(f"{dotted}: expected a file, got {name!r}, and there is no file {looked}")


def _unreadable(dotted: str, path: Path, error: Exception) -> ValueError:
    told = "" if "pickle" in str(error) else f": {error}"  # NumPy advises to unpickle whatever it does not know
    return ValueError(f"{dotted}.file: expected arrays of numbers, .npy or .npz, got {path}{told}")


# Checks


def _missing(key: str, expected: str) -> NoReturn:
    raise ValueError(f"{key}: expected {expected}, got nothing")


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{key}: expected a table, got {value!r}")
    return value


def _one_of(key: str, value: Any, known: Iterable[str]) -> str:
    names = list(known)
    if not isinstance(value, str) or value not in names:
        kind = ValueError if value is None or isinstance(value, str) else TypeError
        got = "nothing" if value is None else f"{value!r}{_close(value, names)}"
        raise kind(f"{key}: expected one of {', '.join(names)}, got {got}")
    return value


def _check_known(above: str, given: Iterable[str], known: Iterable[str], owner: str | None = None) -> None:
    """ValueError for a key of a table that is not known there, or no argument of its owner."""
    names = sorted(known)
    for name in given:
        if name not in names:
            key = f"{above}.{name}" if above else name
            listed = ", ".join(names)
            expected = f"one of {listed}" if owner is None else f"an argument of {owner} ({listed or 'none'})"
            raise ValueError(f"{key}: expected {expected}, got {name!r}{_close(name, names)}")


def _close(value: Any, names: list[str]) -> str:
    close = difflib.get_close_matches(str(value), names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _with_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value == "none" else value for name, value in options.items()}


def _called(table: str, known: Iterable[str], made: Callable[..., Any], *values: Any, **options: Any) -> Any:
    """What it returns; an error that begins with the name of an argument begins with that of its key."""
    try:
        return made(*values, **options)
    except (TypeError, ValueError) as error:
        raise _renamed(error, {name: f"{table}.{name}" for name in known}, table) from None


def _renamed(error: Exception, keys: Mapping[str, str], table: str = "") -> Exception:
    """The same error, whose message begins with the key of what it names."""
    message = str(error)
    match = _NAMED.match(message)
    if match and match[1] in keys:
        message = keys[match[1]] + message[match.end() :]
    elif table:
        message = f"{table}: {message}"
    return TypeError(message) if isinstance(error, TypeError) else ValueError(message)


def _of_key(key: str, error: factories.FactoryError) -> factories.FactoryError:
    return factories.FactoryError(f"{key}: {error}")
