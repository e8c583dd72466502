"""Tables: one row of coefficients per step of a chain.

A sampler is a table and a step is a row.  With x = x_t, m = the model output and z ~ N(0, 1), every step is

    x0 = clip((px*x + pm*m) / pd)
    e  = m  |  (gx*x - g0*x0) / gd  |  (ex*x + em*m) / gd
    x' = ((a0*x0 + ax*x) + ae*e) + s*z

`Structure` says which terms exist and in which form, the same for every row.  The rows hold the numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, Literal, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from . import native
from .hosts import HOSTS, Chain, Columns
from .noise import DOMAINS, Domain, compute_dtype
from .schedules import NoiseSchedule, Steps, is_many, pairs, real, visits

COLUMNS = (
    "px", "pm", "pd",  # x0 = (px*x + pm*m) / pd
    "gx", "g0", "gd",  # e re-derived from x0 = (gx*x - g0*x0) / gd
    "ex", "em",  # e linear in x and m = (ex*x + em*m) / gd
    "a0", "ax", "ae", "s",  # x' = a0*x0 + ax*x + ae*e + s*z
    "lo", "hi",  # clip range of x0
    "min_log", "max_log",  # log-variance range of a learned variance
    "t", "repeat",  # noise counter words
)  # fmt: skip
"""Names of the columns of a row, in the order of the `Row` struct of csrc/step.h."""

COLUMN = {name: index for index, name in enumerate(COLUMNS)}

X0_FROM_X = 1
X0_DIVIDE = 2
CLIP = 4
EPS_REDERIVED = 8
EPS_LINEAR = 16
EPS_DIVIDE = 32
HAS_A0 = 64
HAS_AX = 128
HAS_AE = 256
VARIANCE_SHIFT = 9
DOMAIN_SHIFT = 15
# what a call adds
HOST_ROUNDING = 1 << 12
SECOND_SHIFT = 13
STRAIGHT_THROUGH = 1 << 17
SCALARS = 1 << 18

X0Form = Literal["linear", "output", "none"]
EpsForm = Literal["none", "output", "rederived", "linear"]
VarianceForm = Literal["none", "fixed", "learned_log", "learned_range", "learned_plain"]

_X0_FORMS = ("linear", "output", "none")
_EPS_FORMS = ("none", "output", "rederived", "linear")
_VARIANCE_FORMS = ("none", "fixed", "learned_log", "learned_range", "learned_plain")
_DEFAULTS = {"pd": 1.0, "gd": 1.0, "lo": -float("inf"), "hi": float("inf")}
_MAX_WORD = 2**24  # t and repeat travel as float32

Clip: TypeAlias = "float | tuple[float, float] | None"
_PREDICTIONS = ("eps", "x0", "v", "x_prev")
_VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range", "learned_plain")


@dataclass(frozen=True)
class Structure:
    """Which terms of the step exist, and in which form.  Hashable; equal structures share a kernel path.

    x0: "linear" (px*x + pm*m), "output" (the model output itself, no multiply) or "none" (no x0 exists).
    x0_divide: divide by pd.  clip: clamp x0 to [lo, hi]; NaN stays NaN.
    eps: "none" (no e term), "output" (the model output), "rederived" ((gx*x - g0*x0) / gd) or
    "linear" ((ex*x + em*m) / gd).  eps_divide: divide the re-derived or linear eps by gd.
    a0, ax, ae: the terms of x' that are present.  An absent term is skipped, a zero coefficient multiplied.
    variance: "none" (no noise), "fixed" (s*z), "learned_log" (the second half of the model output is a
    log-variance), "learned_range" (it interpolates between min_log and max_log; Nichol & Dhariwal 2021,
    eq. 15), "learned_plain" (it is the variance itself, as diffusers' "learned").

    ValueError for an unknown form or terms that contradict each other.
    """

    x0: X0Form = "linear"
    x0_divide: bool = False
    clip: bool = False
    eps: EpsForm = "none"
    eps_divide: bool = False
    a0: bool = True
    ax: bool = False
    ae: bool = False
    variance: VarianceForm = "none"
    # kept as values, read at every step: the structure as the bits a kernel reads, and whether the model output carries
    # a variance half (2C channels)
    flags: int = field(init=False, repr=False, compare=False)
    learned: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("x0", self.x0, _X0_FORMS),
            ("eps", self.eps, _EPS_FORMS),
            ("variance", self.variance, _VARIANCE_FORMS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        if self.x0 == "none" and (self.a0 or self.clip or self.eps == "rederived"):
            raise ValueError("x0: 'none' leaves nothing for a0, clip or a re-derived eps")
        if self.x0_divide and self.x0 != "linear":
            raise ValueError(f"x0_divide: expected x0='linear', got x0={self.x0!r}")
        if self.eps_divide and self.eps not in ("rederived", "linear"):
            raise ValueError(f"eps_divide: expected eps='rederived' or 'linear', got eps={self.eps!r}")
        if self.ae != (self.eps != "none"):
            raise ValueError(f"ae: expected ae={self.eps != 'none'} with eps={self.eps!r}, got {self.ae}")
        if not (self.a0 or self.ax or self.ae):
            raise ValueError("structure: expected at least one of the terms a0, ax, ae")
        object.__setattr__(self, "flags", self._bits())
        object.__setattr__(self, "learned", self.variance.startswith("learned"))

    def _bits(self) -> int:
        bits = (
            (X0_FROM_X, self.x0 == "linear"),
            (X0_DIVIDE, self.x0_divide),
            (CLIP, self.clip),
            (EPS_REDERIVED, self.eps == "rederived"),
            (EPS_LINEAR, self.eps == "linear"),
            (EPS_DIVIDE, self.eps_divide),
            (HAS_A0, self.a0),
            (HAS_AX, self.ax),
            (HAS_AE, self.ae),
        )
        value = sum(bit for bit, present in bits if present)
        value |= _VARIANCE_FORMS.index(self.variance) << VARIANCE_SHIFT
        return value | DOMAINS[self.domain] << DOMAIN_SHIFT

    @property
    def domain(self) -> Domain:
        """The domain of its noise: "forward" where nothing but noise is added to x, else "step"."""
        return "step" if self.a0 or self.ae else "forward"


# A row, and what the operator step_row calls its place: int64 [2] on the CPU, the row and the flags.
Places: TypeAlias = dict[int, tuple[int, Tensor]]
# Of a table, on one device and in one dtype: its rows, whether a step adds noise, and the places, by the timesteps that
# are visited once and by row.
Shortcut: TypeAlias = tuple[Tensor, bool, Places, Places]


class Table:
    """The rows of a chain, in sampling order.

    rows: float64 tensor [S, 18] on the CPU, columns as `COLUMNS`.  It may require grad (a trained schedule).
    structure: the `Structure` shared by the rows.
    timesteps: S ints, the training timestep of each row as the model sees it.
    host: the codebase whose precision rule filled the rows; "fastdiff" for our own.
    scalars: where the host has its coefficients as 0-dimensional tensors (diffusers): "cpu", "cuda" (once its add_noise
        has been called), or None. A CUDA tensor is divided by a scalar on the CPU by multiplying with its reciprocal,
        and, where it is half, multiplied by it as it is; scalars beside it on CUDA are rounded to half before, divisors
        too. On CUDA, a step over this table does the same.
    noise_clip: the noise of a step is clamped to [-noise_clip, noise_clip] before it is scaled; None: as it is.

    TypeError or ValueError when rows have another dtype, device or shape, or a noise word is not an integer
    in [0, 2^24).
    """

    def __init__(
        self,
        rows: Tensor,
        structure: Structure,
        timesteps: Sequence[int],
        *,
        name: str = "table",
        host: str = "fastdiff",
        scalars: str | None = None,
        noise_clip: float | None = None,
    ) -> None:
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows: expected a float64 tensor, got {type(rows).__name__}")
        if rows.dtype != torch.float64 or rows.device.type != "cpu":
            raise TypeError(f"rows: expected float64 on the CPU, got {rows.dtype} on {rows.device}")
        if rows.dim() != 2 or rows.shape[1] != len(COLUMNS):
            raise ValueError(f"rows: expected shape [steps, {len(COLUMNS)}], got {list(rows.shape)}")
        if not isinstance(structure, Structure):
            raise TypeError(f"structure: expected a Structure, got {type(structure).__name__}")
        if len(timesteps) != rows.shape[0]:
            raise ValueError(f"timesteps: expected one per row ({rows.shape[0]}), got {len(timesteps)}")
        words = rows.detach()[:, COLUMN["t"] :]
        if not bool(((words >= 0) & (words < _MAX_WORD) & (words == words.floor())).all()):
            raise ValueError(f"rows: expected ints in [0, {_MAX_WORD}) as t and repeat, got {words.tolist()}")
        # what a caller does to rows later must not reach the casts below, nor the mode a table is made in
        with torch.inference_mode(False):
            self._rows = rows if rows.requires_grad else rows.clone()
        self.structure = structure
        self.timesteps = tuple(int(t) for t in timesteps)
        self.name = name
        self.host = host
        self.scalars = scalars
        self.noise_clip = noise_clip if noise_clip is None else real("noise_clip", noise_clip)
        if self.noise_clip is not None and not (self.noise_clip > 0 and structure.variance != "none"):
            raise ValueError(f"noise_clip: expected None, or a number above 0 where noise is added, got {noise_clip}")
        if rows.requires_grad and scalars is not None:
            raise ValueError(f"scalars: expected None with rows that require grad, got {scalars!r}")
        self._forget()
        self.rows_of_t: dict[int, int] = {}
        for row, t in enumerate(self.timesteps):
            self.rows_of_t[t] = -1 if t in self.rows_of_t else row

    @property
    def rows(self) -> Tensor:
        """float64 [S, 18]: a copy, as a table does not change; the tensor itself where it requires grad."""
        return self._rows if self._rows.requires_grad else self._rows.clone()

    @property
    def trained(self) -> Tensor | None:
        """The rows where they require grad: a schedule in training."""
        return self._rows if self._rows.requires_grad else None

    def __len__(self) -> int:
        return len(self.timesteps)

    def __repr__(self) -> str:
        return f"Table({self.name!r}, steps={len(self)}, host={self.host!r}, {self.structure})"

    def _forget(self) -> None:
        # by device, dtype and stream: what one stream copies need not be there yet for another
        self._cast: dict[tuple[torch.device, torch.dtype, torch.dtype, int], Tensor] = {}
        self._maps: dict[tuple[torch.device, int], Tensor] = {}
        self._log_normalizers: dict[tuple[torch.device, torch.dtype, bool, float, int], Tensor] = {}
        # by dtype on the CPU, with the device and the stream elsewhere
        self.shortcuts: dict[Any, Shortcut] = {}
        number = next(_numbers)
        _TABLES[number] = self
        self._constants = tuple(_constant_of(function, number) for function in (_cast_of, _map_of, _log_normalizer_of))
        self._noisy = None if self._rows.requires_grad else (self._rows[:, COLUMN["s"]] != 0).tolist()
        self._places: tuple[Places, Places] | None = None
        self._parts: dict[str, Table] = {}
        # the noise by itself, to be clipped
        self.of_noise: Table | None = None if self.noise_clip is None else self._noise_table()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def to(self, device: torch.device | str, dtype: torch.dtype, *, host_rounding: bool = False) -> Tensor:
        """The rows as a kernel reads them: contiguous [S, 18], float64 for a float64 state, else float32.

        With host_rounding divisors are rounded to a half dtype where the host does so (`scalars`).

        Cast once per device and dtype (and CUDA stream) and kept, unless the rows require grad: not to be written into.
        RuntimeError while a CUDA graph is captured, if they are not on the device yet.
        """
        device, kept = torch.device(device), compute_dtype(dtype)
        narrow = dtype if host_rounding and self.scalars == "cuda" and device.type == "cuda" else kept
        if self._rows.requires_grad:
            # in training there are only rows of our own, without divisors
            return self._rows.to(device, kept).contiguous()
        if torch.compiler.is_compiling():
            found: Tensor = self._constants[0](device, kept, narrow)
            return found
        return self._cast_to(device, kept, narrow)

    def _cast_to(self, device: torch.device, dtype: torch.dtype, narrow: torch.dtype) -> Tensor:
        def make() -> Tensor:
            rows = self._rows.to(dtype).contiguous()
            if self.scalars == "cpu" and device.type == "cuda":
                rows = _with_reciprocals(rows)
            elif narrow != dtype:
                rows = rows.clone()
                rows[:, _DIVISORS] = rows[:, _DIVISORS].to(narrow).to(dtype)
            # from pageable memory: nobody waits, and nobody can change it before it is read
            return rows.to(device, non_blocking=True)

        return _kept(self._cast, (device, dtype, narrow), make)

    def add_shortcut(self, key: Any, rows: Tensor) -> None:
        """Keep what the shortest way to a kernel takes, rows being those that `to` gave, unless they change."""
        if key in self.shortcuts or self._rows.requires_grad or self.noise_clip is not None or type(rows) is not Tensor:
            return
        if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():
            return  # the making of the places would be recorded
        if self._places is None:
            with torch.inference_mode(False), torch._C._DisableFuncTorch():
                flags = [self.structure.flags] * len(self)
                places = torch.tensor([range(len(self)), flags], dtype=torch.int64, device="cpu").t().contiguous()
            if type(places) is not Tensor:  # a tracer makes no values
                return
            by_row = dict(enumerate(enumerate(places)))
            by_t = {t: by_row[row] for t, row in self.rows_of_t.items() if row >= 0}
            self._places = by_t, by_row
        self.shortcuts[key] = rows, self.structure.variance != "none", *self._places

    def log_normalizer(self, device: torch.device, dtype: torch.dtype, host_rounding: bool, min_std: float) -> Tensor:
        """log(std) + log(2 pi) / 2 of each row's standard deviation, at least min_std: float64 [S] on `device`.

        The logarithm of what a Gaussian density is divided by, of s as a step of this dtype and rounding reads it; -Inf
        for 0. Kept as the rows are. float32 on a device without float64.
        """
        if self._rows.requires_grad:
            return self._log_normalizer_of(self.to(device, dtype), min_std)
        if torch.compiler.is_compiling():
            found: Tensor = self._constants[2](device, dtype, host_rounding, min_std)
            return found
        return self._log_normalizer_to(device, dtype, host_rounding, min_std)

    def _log_normalizer_to(
        self, device: torch.device, dtype: torch.dtype, host_rounding: bool, min_std: float
    ) -> Tensor:
        def make() -> Tensor:
            rows = self._rows.to(compute_dtype(dtype))
            if host_rounding and not (self.scalars == "cpu" and device.type == "cuda"):
                rows = rows.to(dtype).to(rows.dtype)
            found = self._log_normalizer_of(rows, min_std)
            return found.to(device, torch.float32 if device.type == "mps" else torch.float64, non_blocking=True)

        return _kept(self._log_normalizers, (device, dtype, host_rounding, min_std), make)

    @staticmethod
    def _log_normalizer_of(rows: Tensor, min_std: float) -> Tensor:
        std = rows[:, COLUMN["s"]]
        std = torch.where(std < min_std, min_std, std).double()
        # the slope at 0, where it is infinite, must not make NaN of the gradient of a row that no sample has
        none = std == 0
        return torch.where(none, -float("inf"), torch.log(torch.where(none, 1.0, std)) + _HALF_LOG_TWO_PI)

    def _noise_table(self) -> Table:
        """A table whose step is the noise of this one's, unscaled: z added to 0*x or 0*model_output."""
        forward = self.structure.domain == "forward"
        eps: EpsForm = "none" if forward else "output"
        form = Structure(x0="none", a0=False, ax=forward, eps=eps, ae=not forward, variance="fixed")
        rows = torch.zeros_like(self._rows.detach())
        rows[:, COLUMN["t"] :] = self._rows.detach()[:, COLUMN["t"] :]
        rows[:, COLUMN["s"]] = 1.0
        return Table(rows, form, self.timesteps, name=self.name)

    @property
    def noisy(self) -> list[bool]:
        """Whether each row adds noise: its s is not 0."""
        if self._noisy is None:  # in training, where rows change
            found: list[bool] = (self._rows.detach()[:, COLUMN["s"]] != 0).tolist()
            return found
        return self._noisy

    def row_of(self, t: int) -> int:
        """The row of training timestep t.  ValueError when the chain has no such t, or visits it again."""
        row = self.rows_of_t.get(t)
        if row is None:
            chain = ", ".join(map(str, self.timesteps[:12])) + (", ..." if len(self) > 12 else "")
            raise ValueError(f"t: expected a timestep of the chain ({chain}), got {t}")
        if row < 0:
            times = self.timesteps.count(t)
            raise ValueError(f"t: expected a timestep visited once, got {t}, visited {times} times (use row=)")
        return row

    def row_map(self, device: torch.device | str) -> Tensor:
        """int64 [max(t) + 1] on `device`: the row of each training timestep, -1 without exactly one."""
        device = torch.device(device)
        found: Tensor = self._constants[1](device) if torch.compiler.is_compiling() else self._map_to(device)
        return found

    def _map_to(self, device: torch.device) -> Tensor:
        def make() -> Tensor:
            rows = [self.rows_of_t.get(t, -1) for t in range(max(max(self.timesteps, default=0), 0) + 1)]
            return torch.tensor(rows, dtype=torch.int64, device="cpu").to(device, non_blocking=True)

        return _kept(self._maps, (device,), make)


_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_DIVISORS = [COLUMN["pd"], COLUMN["gd"]]
_CACHES = ("_cast", "_maps", "_log_normalizers", "shortcuts", "_places", "_constants", "_noisy", "_parts", "of_noise")
_numbers = itertools.count()
_TABLES: WeakValueDictionary[int, Table] = WeakValueDictionary()


def _with_reciprocals(rows: Tensor) -> Tensor:
    """A copy of rows whose divisors have become factors."""
    rows = rows.clone()
    rows[:, _DIVISORS] = 1.0 / rows[:, _DIVISORS]
    return rows


def _cast_of(device: torch.device, dtype: torch.dtype, narrow: torch.dtype, *, number: int = -1) -> Tensor:
    return _TABLES[number]._cast_to(device, dtype, narrow)


def _map_of(device: torch.device, *, number: int = -1) -> Tensor:
    return _TABLES[number]._map_to(device)


def _log_normalizer_of(
    device: torch.device, dtype: torch.dtype, host_rounding: bool, min_std: float, *, number: int = -1
) -> Tensor:
    return _TABLES[number]._log_normalizer_to(device, dtype, host_rounding, min_std)


def _constant_of(function: Any, number: int) -> Callable[..., Tensor]:
    """One of these for one table, whose result is a constant of compiled code.

    Made while that is traced, and not by it, where a network's CUDA graphs could hand out its memory again. The tracer
    knows a constant by the name of the function, which is therefore the table's own. (As
    torch.compiler.assume_constant_result marks it, which would import the compiler here.)
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    made: Any = FunctionType(code, globals(), code.co_name)
    made.__kwdefaults__ = {"number": number}
    made._dynamo_marked_constant = True
    found: Callable[..., Tensor] = made
    return found


def _kept(cache: dict[Any, Tensor], key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    """The tensor of a key that begins with a device, made once on each of its streams."""
    device = key[0]
    if native.capturing(device):
        # a copy from the host would be made at every replay; a capture has waited for all streams when it began
        for (*known, _), tensor in cache.items():
            if tuple(known) == key:
                return tensor
        raise RuntimeError(f"table: expected it to be on {device} before the capture; run one step outside it first")
    full = (*key, native.stream_of(device))
    found = cache.get(full)
    if found is None:
        # kept beyond the current mode: an inference tensor could not enter autograd later, nor a transform's leave it
        with torch.inference_mode(False), torch._C._DisableFuncTorch():
            found = make()
        if type(found) is Tensor:  # and not what a tracer makes in its place
            cache[full] = found
    return found


def ddpm_table(
    schedule: NoiseSchedule | Tensor,
    timesteps: Steps = None,
    *,
    prediction: str = "eps",
    variance: str = "fixed_small",
    clip: Clip = None,
    noise: bool = True,
    min_std: float | None = None,
    noise_clip: float | None = None,
    host: str = "fastdiff",
    device: torch.device | str = "cpu",
) -> Table:
    """Ancestral sampling: x' = c1*x0 + c2*x + sigma*z (Ho et al. 2020, arXiv:2006.11239, eq. 6, 7 and 11).

    beta is that of the chain, 1 - alpha_bar_t / alpha_bar_prev, so a respaced chain has the variances of its
    own longer steps (Nichol and Dhariwal 2021, arXiv:2102.09672, section 4). The step to the clean end adds
    no noise.

    schedule: a NoiseSchedule, or a float64 tensor [T], the alphas_cumprod of one in training (no other host).
    timesteps: None for all T, or what `schedules.pairs` takes: a descending list, (t, t_prev) pairs, "50".
    prediction: what the model gives: "eps", "x0", "v" (Salimans and Ho 2022) or "x_prev" (the mean itself: x0
        is then for show, and clipping it does not change x').
    variance: "fixed_small" (beta tilde), "fixed_large" (beta), "learned" (the second half of the model output
        is a log-variance), "learned_range" (it goes from log beta tilde at -1 to log beta at 1) or
        "learned_plain" (it is a variance: diffusers' "learned"); of host "diffusers" alone, "fixed_small_log"
        and "fixed_large_log".
    clip: None, r for [-r, r], or (lo, hi): the range that x0 is clamped to.
    noise: False leaves the noise out, and with it a learned variance: the model output then has x's channels.
    min_std: the standard deviation of a step is at least this, in the last step too, so that every step explores and
        has a density (DPPO's min_sampling_denoising_std; Ren et al. 2024, arXiv:2409.00588). None for a learned
        variance.
    noise_clip: the noise is clamped to [-noise_clip, noise_clip] (DPPO's randn_clip_value).
    host: whose precision rule fills the rows; "fastdiff" for float64, cast once. See `fastdiff.hosts`.
    device: where the host makes its float32 coefficients.

    TypeError or ValueError, naming the argument, for anything else; ValueError too where "fastdiff" rows
    would not be finite, as with "eps" at alpha_bar = 0 (zero terminal SNR), where no x0 follows from eps.
    """
    xp, alphas, chain = _chain(schedule, timesteps, 1.0, host, device)
    _choice("prediction", prediction, HOSTS[host].predictions if host in HOSTS else _PREDICTIONS, host)
    _choice("variance", variance, HOSTS[host].variances if host in HOSTS else _VARIANCES, host)
    if host in HOSTS:
        columns = fill_columns(HOSTS[host].ddpm, chain, prediction, variance)
    else:
        columns = fill_columns(_own_ddpm, xp, alphas, chain, prediction, variance)
    if not noise:
        columns |= Columns({"s": 0.0, "min_log": 0.0, "max_log": 0.0}, {"variance": "none"})
        if min_std is not None:
            raise ValueError(f"min_std: expected None with noise=False, got {min_std}")
    columns = _at_least(columns, min_std)
    scalars = _scalars(chain, host)
    return table_of(
        "ddpm", columns, chain.t, clip=clip, host=host, prediction=prediction, scalars=scalars, noise_clip=noise_clip
    )


def ddim_table(
    schedule: NoiseSchedule | Tensor,
    timesteps: Steps = None,
    *,
    eta: float = 0.0,
    prediction: str = "eps",
    clip: Clip = None,
    eps: str | None = None,
    final_alpha: float | str = 1.0,
    min_std: float | None = None,
    noise_clip: float | None = None,
    host: str = "fastdiff",
    device: torch.device | str = "cpu",
) -> Table:
    """DDIM: x' = sqrt(alpha_bar_prev)*x0 + sqrt(1 - alpha_bar_prev - sigma^2)*e + sigma*z.

    Song et al. 2021 (arXiv:2010.02502), eq. 12, with sigma from eta by eq. 16. The model output has x's
    channels: the second half of a learned variance is not for this sampler.

    schedule, timesteps, prediction, clip, host, device: as in `ddpm_table`. With host "diffusers" a list of S
        timesteps is stepped t -> t - T//S, as its DDIM does whatever the list is; give pairs for any other
        target.
    eta: in [0, 1]. 0 is deterministic and takes no noise; 1 has the variance of DDPM's "fixed_small" and,
        with eps "rederived", its mean.
    eps: "raw", as the model gave it, or "rederived" from the clipped x0. Default: "raw" for "fastdiff" and
        diffusers; OpenAI always re-derives, lucidrains too unless told.
    final_alpha: alpha_bar at t = -1, in [alphas_cumprod[0], 1], or "first" for alphas_cumprod[0] (diffusers'
        set_alpha_to_one=False).
    min_std, noise_clip: as in `ddpm_table`. min_std makes a sampler of eta 0 one that adds noise.

    Errors as in `ddpm_table`.
    """
    eta = real("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a value in [0, 1], got {eta}")
    xp, alphas, chain = _chain(schedule, timesteps, final_alpha, host, device)
    _choice("prediction", prediction, HOSTS[host].predictions if host in HOSTS else _PREDICTIONS, host)
    forms = HOSTS[host].eps if host in HOSTS else ("raw", "rederived")
    eps = forms[0] if eps is None else eps
    _choice("eps", eps, forms, host)
    if host in HOSTS:
        columns = fill_columns(HOSTS[host].ddim, chain, prediction, eta, eps, clip is not None)
    else:
        columns = fill_columns(_own_ddim, xp, alphas, chain, prediction, eta, eps)
    columns = _at_least(columns, min_std)
    scalars = _scalars(chain, host)
    return table_of(
        "ddim", columns, chain.t, clip=clip, host=host, prediction=prediction, scalars=scalars, noise_clip=noise_clip
    )


def ddim_inversion_table(
    schedule: NoiseSchedule | Tensor,
    timesteps: Steps = None,
    *,
    prediction: str = "eps",
    clip: Clip = None,
    pairing: str | None = None,
    final_alpha: float | str = 1.0,
    host: str = "fastdiff",
    device: torch.device | str = "cpu",
) -> Table:
    """DDIM backwards, from an image to its x_T: x' = sqrt(alpha_bar')*x0 + sqrt(1 - alpha_bar')*e.

    timesteps is the chain that `ddim_table` would sample, in its descending order; the rows are in ascending
    order.

    pairing: which timestep the model is told, and which alpha_bar x is taken to have.
        "target": x stands at t_prev and moves to t, the model is told t: each step is the inverse of the
            sampling step t -> t_prev with the same model time (diffusers; default).
        "source": the same move, but the model is told t_prev, where x stands; at the clean end it is told
            t - T//S, a negative number (the DDIM notebook of ppdiffusers).
        "next": x is taken to stand at t and moves to the next timestep of the chain, the model is told t; the
            last step goes to alpha_bar = 0, where x' = e (OpenAI; the default of that host).
    The other arguments are those of `ddim_table`. clip is the codebases' default and harmful: it changes x0
    on the way.

    Errors as in `ddpm_table`; "x_prev" is for host "openai" only.
    """
    xp, alphas, chain = _chain(schedule, timesteps, final_alpha, host, device)
    rules = HOSTS.get(host)
    if rules is not None and rules.inversion is None:
        raise ValueError(f"host: expected one that has DDIM inversion, got {host!r}")
    _choice("prediction", prediction, rules.predictions if rules else _PREDICTIONS[:3], host)
    pairings = {"openai": ("next",), "diffusers": ("target",)}.get(host, ("target", "source", "next"))
    pairing = pairings[0] if pairing is None else pairing
    _choice("pairing", pairing, pairings, host)
    if pairing == "next" and chain.given == "pairs":
        raise ValueError("timesteps: expected a list with pairing 'next', got pairs")

    chain = chain._replace(t=chain.t[::-1], prev=chain.prev[::-1])
    told = chain.t
    if pairing == "source":
        clean = [t - chain.schedule.num_timesteps // len(chain.t) for t in chain.t]
        told = [prev if prev >= 0 else min(t, -1) for prev, t in zip(chain.prev, clean, strict=True)]
    if rules is not None and rules.inversion is not None:
        columns = fill_columns(rules.inversion, chain, prediction, clip is not None)
    else:
        columns = fill_columns(_own_inversion, xp, alphas, chain, prediction, pairing)
    return table_of(
        "ddim_inversion", columns, told, clip=clip, host=host, prediction=prediction, scalars=_scalars(chain, host)
    )


def forward_table(schedule: NoiseSchedule | Tensor, timesteps: Steps = None) -> Table:
    """The Markov chain forward: x_t = sqrt(1 - beta_t)*x_{t-1} + sqrt(beta_t)*z (Ho et al. 2020, eq. 2).

    Row k steps to the k-th timestep in ascending order, the first from the clean end. timesteps as in
    `ddpm_table`, with the beta of each longer step; None takes the betas of the schedule. There is no x0, and
    the model output is not used.
    """
    xp, alphas, chain = _chain(schedule, timesteps, 1.0, "fastdiff", "cpu")
    if chain.given == "all" and isinstance(schedule, NoiseSchedule):
        kept, beta = 1 - schedule.betas, schedule.betas
    else:
        ab, abp = _alpha_bars(xp, alphas, chain)
        kept = (ab / abp)[::-1] if xp is np else (ab / abp).flip(0)
        beta = 1 - kept
    columns = fill_columns(lambda: _without_x0(_root(xp, kept), _root(xp, beta)))
    return table_of("forward", columns, chain.t[::-1], clip=None, host="fastdiff")


def add_noise_table(
    schedule: NoiseSchedule | Tensor, *, host: str = "fastdiff", device: torch.device | str = "cpu"
) -> Table:
    """The forward process: x_t = sqrt(alpha_bar_t)*x_0 + sqrt(1 - alpha_bar_t)*z (Ho et al. 2020, eq. 4).

    Row t is training timestep t. host and device as in `ddpm_table`.
    """
    xp, alphas, chain = _chain(schedule, None, 1.0, host, device)
    chain = chain._replace(t=chain.t[::-1], prev=chain.prev[::-1])
    if host in HOSTS:
        columns = fill_columns(HOSTS[host].add_noise, chain)
    else:
        columns = fill_columns(lambda: _without_x0(_root(xp, alphas), _root(xp, 1 - alphas)))
    return table_of("add_noise", columns, chain.t, clip=None, host=host)


def sprite_table(schedule: NoiseSchedule | Tensor, *, noise: bool = True) -> Table:
    """The sampler of the course "How Diffusion Models Work": the mean straight from eps, nothing clipped.

    x' = (x - m*beta/sqrt(1 - alpha_bar))/sqrt(1 - beta) + sqrt(beta)*z (Ho et al. 2020, eq. 11, sigma^2 =
    beta), t -> t - 1 over all noised timesteps, without noise in the last. The course's fast sampler is
    `ddim_table` on `schedules.timesteps(schedule, steps, "sprite")` with eta 0.

    schedule: that of `NoiseSchedule.sprite`, or any other.
    noise: False is the course's variant without extra noise, whose samples collapse.
    """
    xp, alphas, chain = _chain(schedule, None, 1.0, "fastdiff", "cpu")
    if chain.schedule.alphas_cumprod[0] == 1:  # entry 0 is the clean image
        chain = chain._replace(t=chain.t[:-1], prev=chain.prev[:-1])
    ab, abp = _alpha_bars(xp, alphas, chain)
    beta = schedule.betas[chain.t] if isinstance(schedule, NoiseSchedule) else 1 - ab / abp
    inner = np.array(chain.t) > chain.t[-1]

    def fill() -> Columns:
        kept = _root(xp, 1 - beta)
        mean = {"ax": 1 / kept, "ae": -(beta / _root(xp, 1 - ab)) / kept}
        form = {"a0": False, "ax": True, "eps": "output", "ae": True}
        result = _own_x0(xp, "eps", ab, abp) | Columns(mean, form)
        return result | (_own_noise(_root(xp, beta) * _like(xp, inner)) if noise else _own_noise(None))

    return table_of("sprite", fill_columns(fill), chain.t, clip=None, host="fastdiff", prediction="eps")


def x0_table(table: Table) -> Table:
    """The first part of a step: a table whose x' is the predicted x0 of another, before the clip.

    With `given_x0_table` it makes room for what only Python can do to x0 in between. Both are made once and kept with
    the table; rows, timesteps and bits are its own. The model output has x's channels, a variance half apart.

    ValueError for a table that predicts no x0, or whose rows require grad.
    """
    structure = table.structure
    if structure.x0 == "none":
        raise ValueError(f"table: expected one that predicts x0, got {table.name!r}")
    form = Structure(x0=structure.x0, x0_divide=structure.x0_divide)
    return _part(table, "x0", form, {"a0": 1.0})


def eps_table(table: Table) -> Table:
    """A table whose x' is the eps that another takes from x and the model output.

    ValueError for a table whose eps is not linear in them, or whose rows require grad.
    """
    structure = table.structure
    if structure.eps != "linear":
        raise ValueError(f"table: expected one whose eps is linear in x and the model output, got {structure.eps!r}")
    form = Structure(x0="none", eps="linear", eps_divide=structure.eps_divide, a0=False, ae=True)
    return _part(table, "eps", form, {"ae": 1.0})


def given_x0_table(table: Table) -> Table:
    """The last part of a step: a table whose model output is x0, which it clips where the table does.

    Its x is the table's own, but for a step towards an eps that is not re-derived from x0 (Structure.eps "output" or
    "linear"): there it is that eps, the model output itself or the result of `eps_table`.

    ValueError for a table whose x' has no term in x0, or one in both x and such an eps, or whose rows require grad.
    """
    structure = table.structure
    if not structure.a0:
        raise ValueError(f"table: expected one whose step has a term in x0, got {table.name!r}")
    direct = structure.eps in ("output", "linear")
    if direct and structure.ax:
        raise ValueError("table: expected a term in x or in an eps that is not re-derived, got both")
    form = replace(structure, x0="output", x0_divide=False)
    if direct:
        form = replace(form, eps="none", eps_divide=False, ax=True, ae=False)
    return _part(table, "given_x0", form, {"ax": COLUMN["ae"]} if direct else {})


def fixed_table(table: Table) -> Table:
    """A table with a learned variance as one to which noise is given that has been multiplied by the deviation.

    Its s is 1, or 0 where a step adds no noise. ValueError for another variance, noise that the table would clip, or
    rows that require grad.
    """
    if table.noise_clip is not None:
        raise ValueError(f"table: expected noise_clip=None, got {table.noise_clip}")
    if not table.structure.learned:
        raise ValueError(f"table: expected one that learns the variance, got {table.structure.variance!r}")
    return _part(table, "fixed", replace(table.structure, variance="fixed"), {})


def _part(table: Table, name: str, structure: Structure, columns: dict[str, float | int]) -> Table:
    """A table of the same steps, some columns replaced by a number (float) or by another column (its index)."""
    found = table._parts.get(name)
    if found is None:
        if table.trained is not None:
            raise ValueError("table: expected rows that do not require grad")
        rows = table.rows
        for column, source in columns.items():
            rows[:, COLUMN[column]] = source if isinstance(source, float) else table._rows[:, source]
        found = table._parts[name] = Table(
            rows,
            structure,
            table.timesteps,
            name=f"{table.name}_{name}",
            host=table.host,
            scalars=table.scalars,
            noise_clip=None if structure.variance == "none" else table.noise_clip,
        )
    return found


# Our own rows are closed forms in float64; xp is NumPy, or torch for a schedule in training.


def _own_ddpm(xp: Any, alphas: Any, chain: Chain, prediction: str, variance: str) -> Columns:
    ab, abp = _alpha_bars(xp, alphas, chain)
    beta = 1 - ab / abp
    small = beta * (1 - abp) / (1 - ab)
    moves = _like(xp, (np.array(chain.prev) >= 0) & (np.array(chain.prev) != np.array(chain.t)))
    if prediction == "x_prev":
        mean = Columns({"ae": 1.0}, {"a0": False, "eps": "output", "ae": True})
    else:
        c1, c2 = _posterior_mean(xp, ab, abp)
        mean = Columns({"a0": c1, "ax": c2}, {"a0": True, "ax": True})
    if variance == "learned":
        noise = _own_noise(moves, "learned_log")
    elif variance == "learned_range":
        limits = {"min_log": _log(xp, small), "max_log": _log(xp, beta)}
        noise = _own_noise(moves, "learned_range") | Columns(limits)
    elif variance == "learned_plain":
        noise = _own_noise(moves, "learned_plain")
    else:
        noise = _own_noise(moves * _root(xp, small if variance == "fixed_small" else beta))
    return _own_x0(xp, prediction, ab, abp) | mean | noise


def _own_ddim(xp: Any, alphas: Any, chain: Chain, prediction: str, eta: float, eps: str) -> Columns:
    ab, abp = _alpha_bars(xp, alphas, chain)
    sigma = eta * _root(xp, (1 - abp) / (1 - ab)) * _root(xp, 1 - ab / abp)
    # 1 - abp - sigma^2 in the form that is exact where it vanishes, at eta = 1 and ab = 0
    squared = (1 - abp) * ((1 - eta * eta) + eta * eta * (ab / abp) * (1 - abp) / (1 - ab))
    columns = _own_x0(xp, prediction, ab, abp) | _own_eps(xp, prediction, eps, ab, abp)
    columns |= Columns({"a0": _root(xp, abp), "ae": _root(xp, squared)})
    return columns | _own_noise(sigma if eta else None)


def _own_inversion(xp: Any, alphas: Any, chain: Chain, prediction: str, pairing: str) -> Columns:
    if pairing == "next":
        source = _alphas_at(xp, alphas, chain.t, chain.final)
        target = _alphas_at(xp, alphas, [*chain.t[1:], -1], 0.0)
    else:
        target, source = _alpha_bars(xp, alphas, chain)
    columns = _own_x0(xp, prediction, source, source) | _own_eps(xp, prediction, "raw", source, source)
    columns |= Columns({"a0": _root(xp, target), "ae": _root(xp, 1 - target)})
    return columns | _own_noise(None)


def _own_x0(xp: Any, prediction: str, ab: Any, abp: Any) -> Columns:
    if prediction == "x0":
        return Columns({}, {"x0": "output"})
    if prediction == "v":
        px, pm = _root(xp, ab), -_root(xp, 1 - ab)
    elif prediction == "eps":
        px, pm = 1 / _root(xp, ab), -_root(xp, 1 - ab) / _root(xp, ab)
    else:
        c1, c2 = _posterior_mean(xp, ab, abp)
        px, pm = -c2 / c1, 1 / c1
    return Columns({"px": px, "pm": pm}, {"x0": "linear"})


def _own_eps(xp: Any, prediction: str, eps: str, ab: Any, abp: Any) -> Columns:
    signal, noise = _root(xp, ab), _root(xp, 1 - ab)
    if eps == "rederived":
        return Columns({"gx": 1 / noise, "g0": signal / noise}, {"eps": "rederived", "ae": True})
    if prediction == "eps":
        return Columns({}, {"eps": "output", "ae": True})
    if prediction == "v":
        ex, em = noise, signal
    elif prediction == "x0":
        ex, em = 1 / noise, -signal / noise
    else:
        c1, c2 = _posterior_mean(xp, ab, abp)
        ex, em = (1 + signal * c2 / c1) / noise, -signal / (c1 * noise)
    return Columns({"ex": ex, "em": em}, {"eps": "linear", "ae": True})


def _own_noise(s: Any, variance: str = "fixed") -> Columns:
    return Columns({}, {"variance": "none"}) if s is None else Columns({"s": s}, {"variance": variance})


def _without_x0(ax: Any, s: Any) -> Columns:
    return Columns({"ax": ax, "s": s}, {"x0": "none", "a0": False, "ax": True, "variance": "fixed"})


def _posterior_mean(xp: Any, ab: Any, abp: Any) -> tuple[Any, Any]:
    ratio = ab / abp
    return (1 - ratio) * _root(xp, abp) / (1 - ab), (1 - abp) * _root(xp, ratio) / (1 - ab)


def _root(xp: Any, value: Any) -> Any:
    """Square root, 0 for what rounding took below 0; its gradient at 0 is 0, not infinite."""
    positive = value > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, value, 1.0)), 0.0)


def _log(xp: Any, variance: Any) -> Any:
    # the variance is 0 where a step adds no noise: s is 0 there, and the exponential must stay finite
    return xp.log(xp.where(variance > 1e-20, variance, 1e-20))


def _like(xp: Any, mask: np.ndarray) -> Any:
    values = mask.astype(np.float64)
    return values if xp is np else torch.from_numpy(values)


def _chain(
    schedule: NoiseSchedule | Tensor,
    timesteps: Steps,
    final: float | str,
    host: str,
    device: torch.device | str,
) -> tuple[Any, Any, Chain]:
    """(array namespace, alphas_cumprod in it, chain) of the arguments that the makers share."""
    if host != "fastdiff" and host not in HOSTS:
        raise ValueError(f"host: expected one of {('fastdiff', *HOSTS)}, got {host!r}")
    xp: Any = np
    alphas: Any
    if isinstance(schedule, NoiseSchedule):
        alphas = schedule.alphas_cumprod
    elif isinstance(schedule, Tensor):
        if schedule.dtype != torch.float64:
            raise TypeError(f"schedule: expected alphas_cumprod in float64, got {schedule.dtype}")
        if host != "fastdiff":
            raise ValueError(f"schedule: expected a NoiseSchedule with host {host!r}, got a tensor")
        xp, alphas = torch, schedule.cpu()
        schedule = NoiseSchedule.from_alphas_cumprod(schedule)
    else:
        raise TypeError(f"schedule: expected a NoiseSchedule or a tensor, got {type(schedule).__name__}")
    if isinstance(final, str):
        if final != "first":
            raise ValueError(f"final_alpha: expected a number or 'first', got {final!r}")
    else:
        final = real("final_alpha", final)
        if not schedule.alphas_cumprod[0] <= final <= 1:
            raise ValueError(f"final_alpha: expected a value in [alphas_cumprod[0], 1], got {final}")
    if final != 1.0 and host not in ("fastdiff", "diffusers"):
        raise ValueError(f"final_alpha: expected 1.0 with host {host!r}, got {final!r}")

    given = "all" if timesteps is None else "list"
    if is_many(timesteps) and not isinstance(timesteps, (str, set, frozenset)):
        timesteps = list(timesteps)
        given = "pairs" if timesteps and is_many(timesteps[0]) else "list"
    moves = pairs(schedule, timesteps)
    t, prev = [t for t, _ in moves], [prev for _, prev in moves]
    return xp, alphas, Chain(schedule, t, prev, given, final, torch.device(device))


def _scalars(chain: Chain, host: str) -> str | None:
    return chain.device.type if host == "diffusers" else None


def _alpha_bars(xp: Any, alphas: Any, chain: Chain) -> tuple[Any, Any]:
    return _alphas_at(xp, alphas, chain.t, chain.final), _alphas_at(xp, alphas, chain.prev, chain.final)


def _alphas_at(xp: Any, alphas: Any, steps: list[int], final: float | str) -> Any:
    end = alphas[:1] if final == "first" else xp.ones_like(alphas[:1]) * final
    return xp.concatenate([alphas, end])[[t if t >= 0 else len(alphas) for t in steps]]


def _choice(name: str, value: str, known: Sequence[str], host: str) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {tuple(known)} with host {host!r}, got {value!r}")


def _clip_range(clip: Clip) -> tuple[float, float]:
    if isinstance(clip, (tuple, list)):
        if len(clip) != 2:
            raise ValueError(f"clip: expected None, a number or (lo, hi), got {clip!r}")
        lo, hi = real("clip", clip[0]), real("clip", clip[1])
    else:
        hi = real("clip", clip)
        lo = -hi
    if lo > hi:
        raise ValueError(f"clip: expected a range that is not empty, got [{lo}, {hi}]")
    return lo, hi


def _at_least(columns: Columns, min_std: float | None) -> Columns:
    """The columns with a standard deviation of at least min_std."""
    if min_std is None:
        return columns
    least = real("min_std", min_std)
    if not 0 <= least < float("inf"):
        raise ValueError(f"min_std: expected None or a finite number of at least 0, got {min_std}")
    if columns.form.get("variance", "none") not in ("none", "fixed"):
        raise ValueError(f"min_std: expected None with a learned variance, got {min_std}")
    s = torch.as_tensor(columns.values.get("s", 0.0), dtype=torch.float64).clamp(min=least)
    return columns | Columns({"s": s}, {"variance": "fixed"})


def fill_columns(maker: Callable[..., Columns], *arguments: Any) -> Columns:
    """maker(*arguments), a function of `fastdiff.hosts` or one like them."""
    # rows outlive the caller's mode, and a division by an alpha_bar of 0 is judged by its result
    with torch.inference_mode(False), np.errstate(all="ignore"):
        return maker(*arguments)


def table_of(
    sampler: str,
    columns: Columns,
    timesteps: list[int],
    *,
    clip: Clip,
    host: str,
    prediction: str | None = None,
    scalars: str | None = None,
    noise_clip: float | None = None,
) -> Table:
    """A table of the columns that a precision rule has filled, its noise words the timesteps.

    sampler: its name.  timesteps: one per row; negative ones have noise word 0.  The others are those of `Table` and
    of its makers. Rows of host "fastdiff" are checked to be finite (ValueError).
    """
    values = dict(columns.values)
    if clip is not None:
        values["lo"], values["hi"] = _clip_range(clip)
    words = [max(t, 0) for t in timesteps]
    values["t"], values["repeat"] = np.array(words, np.float64), np.array(visits(words), np.float64)
    with torch.inference_mode(False):
        columns_of = [
            torch.as_tensor(values.get(name, _DEFAULTS.get(name, 0.0)), dtype=torch.float64, device="cpu")
            for name in COLUMNS
        ]
        rows = torch.stack([column.expand(len(timesteps)) for column in columns_of], dim=1)
    if host == "fastdiff":
        infinite = ~torch.isfinite(rows.detach())
        infinite[:, [COLUMN["lo"], COLUMN["hi"]]] = False
        if bool(infinite.any()):
            t = timesteps[int(infinite.any(dim=1).nonzero()[0])]
            raise ValueError(
                f"prediction: expected one that has a finite step at timestep {t}, got {prediction!r} "
                "(its alpha_bar is 0 or 1, or the step does not move)"
            )
    structure = Structure(clip=clip is not None, **columns.form)
    return Table(rows, structure, timesteps, name=sampler, host=host, scalars=scalars, noise_clip=noise_clip)
