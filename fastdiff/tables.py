"""Tables: one row of coefficients per step of a chain.

A sampler is a table and a step is a row.  With x = x_t, m = the model output and z ~ N(0, 1), every step is

    x0 = clip((px*x + pm*m) / pd)
    e  = m  |  (gx*x - g0*x0) / gd  |  ex*x + em*m
    x' = ((a0*x0 + ax*x) + ae*e) + s*z

`Structure` says which terms exist and in which form, the same for every row.  The rows hold the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

COLUMNS = (
    "px", "pm", "pd",  # x0 = (px*x + pm*m) / pd
    "gx", "g0", "gd",  # e re-derived from x0 = (gx*x - g0*x0) / gd
    "ex", "em",  # e linear in x and m
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

X0Form = Literal["linear", "output", "none"]
EpsForm = Literal["none", "output", "rederived", "linear"]
VarianceForm = Literal["none", "fixed", "learned_log", "learned_range", "learned_plain"]

_X0_FORMS = ("linear", "output", "none")
_EPS_FORMS = ("none", "output", "rederived", "linear")
_VARIANCE_FORMS = ("none", "fixed", "learned_log", "learned_range", "learned_plain")
_DEFAULTS = {"pd": 1.0, "gd": 1.0, "lo": -float("inf"), "hi": float("inf")}
_MAX_WORD = 2**24  # t and repeat travel as float32


@dataclass(frozen=True)
class Structure:
    """Which terms of the step exist, and in which form.  Hashable; equal structures share a kernel path.

    x0: "linear" (px*x + pm*m), "output" (the model output itself, no multiply) or "none" (no x0 exists).
    x0_divide: divide by pd.  clip: clamp x0 to [lo, hi]; NaN stays NaN.
    eps: "none" (no e term), "output" (the model output), "rederived" ((gx*x - g0*x0) / gd) or
    "linear" (ex*x + em*m).  eps_divide: divide the re-derived eps by gd.
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
        if self.eps_divide and self.eps != "rederived":
            raise ValueError(f"eps_divide: expected eps='rederived', got eps={self.eps!r}")
        if self.ae != (self.eps != "none"):
            raise ValueError(f"ae: expected ae={self.eps != 'none'} with eps={self.eps!r}, got {self.ae}")
        if not (self.a0 or self.ax or self.ae):
            raise ValueError("structure: expected at least one of the terms a0, ax, ae")

    @cached_property
    def flags(self) -> int:
        """The structure as the bits a kernel reads."""
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
        return value | _VARIANCE_FORMS.index(self.variance) << VARIANCE_SHIFT

    @property
    def learned(self) -> bool:
        """Whether the model output carries a variance half (2C channels)."""
        return self.variance.startswith("learned")


class Table:
    """The rows of a chain, in sampling order.

    rows: float64 tensor [S, 18] on the CPU, columns as `COLUMNS`.  It may require grad (a trained schedule).
    structure: the `Structure` shared by the rows.
    timesteps: S ints, the training timestep of each row as the model sees it.
    host: the codebase whose precision rule filled the rows; "fastdiff" for our own.

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
            raise ValueError(f"rows: expected integers in [0, {_MAX_WORD}) as t and repeat, got {words.tolist()}")
        self.rows = rows
        self.structure = structure
        self.timesteps = tuple(int(t) for t in timesteps)
        self.name = name
        self.host = host
        self._cast: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._maps: dict[torch.device, Tensor] = {}
        self._row: dict[int, int] = {}
        for row, t in enumerate(self.timesteps):
            self._row[t] = -1 if t in self._row else row

    def __len__(self) -> int:
        return len(self.timesteps)

    def __repr__(self) -> str:
        return f"Table({self.name!r}, steps={len(self)}, host={self.host!r}, {self.structure})"

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The rows as a kernel reads them: contiguous [S, 18], float64 for a float64 state, else float32.

        Cast once per device and dtype and kept, unless the rows require grad.
        """
        device = torch.device(device)
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if self.rows.requires_grad:
            return self.rows.to(device, dtype).contiguous()
        key = (device, dtype)
        rows = self._cast.get(key)
        if rows is None:
            # kept beyond the current mode: an inference tensor could not enter autograd later
            with torch.inference_mode(False):
                rows = self.rows.to(device, dtype).contiguous()
            self._cast[key] = rows
        return rows

    def row_of(self, t: int) -> int:
        """The row of training timestep t.  ValueError when the chain has no such t, or visits it again."""
        row = self._row.get(t)
        if row is None:
            chain = ", ".join(map(str, self.timesteps[:12])) + (", ..." if len(self) > 12 else "")
            raise ValueError(f"t: expected a timestep of the chain ({chain}), got {t}")
        if row < 0:
            visits = self.timesteps.count(t)
            raise ValueError(f"t: expected a timestep visited once, got {t}, visited {visits} times; give row=")
        return row

    def row_map(self, device: torch.device | str) -> Tensor:
        """int64 [max(t) + 1] on `device`: the row of each training timestep, -1 where there is not exactly one."""
        device = torch.device(device)
        found = self._maps.get(device)
        if found is None:
            with torch.inference_mode(False):
                cpu = torch.full((max(max(self.timesteps, default=0), 0) + 1,), -1, dtype=torch.int64)
                for t, row in self._row.items():
                    if t >= 0:
                        cpu[t] = row
                found = cpu.to(device)
            self._maps[device] = found
        return found
