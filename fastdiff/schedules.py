"""Noise schedules and chains of timesteps, in float64 NumPy on the host.

A noise schedule says how much signal is left at each training timestep: ``betas`` (the variance added by one
forward step) and ``alphas_cumprod`` (alpha_bar, the running product of 1 - beta; Ho et al. 2020,
arXiv:2006.11239, eq. 4). A chain says which of those timesteps a sampler visits, and in which order.

The codebases of this field give different things the same name and the same thing different names. Every
function here says whose name it uses:

===================  ==================================  ====================================================
here                 formula                             elsewhere
===================  ==================================  ====================================================
linear               betas linear                        "linear" of Ho, OpenAI, lucidrains, ermongroup and
                                                         diffusers (the second and third scale it by 1000/T),
                                                         "sqrt_linear" of CompVis (which, despite its name, is
                                                         linear)
scaled_linear, quad  sqrt(betas) linear                  "scaled_linear" of diffusers, "quad" of Ho and
                                                         ermongroup, "linear" of CompVis
cosine               alpha_bar = cos^2                   "cosine" of OpenAI, lucidrains and CompVis,
                                                         "squaredcos_cap_v2" of diffusers and DiT
sigmoid              betas follow a sigmoid              "sigmoid" of ermongroup and diffusers
sigmoid_alpha_bar    alpha_bar follows a sigmoid         "sigmoid" of lucidrains
===================  ==================================  ====================================================
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

Float64Array: TypeAlias = NDArray[np.float64]
Steps: TypeAlias = "int | str | Iterable[Any] | None"

__all__ = [
    "NoiseSchedule",
    "const_betas",
    "cosine_betas",
    "host_tables",
    "jsd_betas",
    "laplace_betas",
    "linear_betas",
    "pairs",
    "quad_betas",
    "rescale_zero_terminal_snr",
    "scaled_linear_betas",
    "sigmoid_alpha_bar_betas",
    "sigmoid_betas",
    "space_timesteps",
    "sprite_tables",
    "timesteps",
    "visits",
    "warmup_betas",
]


# Checks


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return value as an int in [low, high], or raise TypeError / ValueError naming it."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}") from None
    if number < low or (high is not None and number > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an int {bounds}, got {number}")
    return number


def count(name: str, value: Any, most: int) -> int:
    """`integer` of a number of things from 1 to `most`, a bound so far off that only what is beyond is told of it."""
    return integer(name, integer(name, value, 1), 1, most)


def real(name: str, value: Any) -> float:
    """Return value as a finite float, or raise TypeError / ValueError naming it."""
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def _vector(name: str, values: Any) -> Float64Array:
    """Return values as a new 1-D float64 array; float32 values keep their value exactly."""
    if hasattr(values, "detach"):
        # A torch tensor. NumPy has no bfloat16 and refuses a tensor that requires grad.
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name}: expected a 1-D sequence of numbers, got a ragged one") from None
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: expected a non-empty 1-D sequence, got shape {array.shape}")
    return array.astype(np.float64) + 0.0  # + 0.0 turns -0.0 into 0.0, so that equal arrays have equal bytes


def _raise_at(name: str, expected: str, array: Float64Array, bad: NDArray[np.bool_]) -> None:
    if bad.any():
        index = int(np.argmax(bad))
        raise ValueError(f"{name}: expected {expected}, got {array[index]} at index {index}")


def _check_betas(array: Float64Array, name: str = "betas") -> Float64Array:
    _raise_at(name, "values in (0, 1]", array, ~((array > 0) & (array <= 1)))
    return array


def _check_alphas_cumprod(array: Float64Array, name: str = "alphas_cumprod") -> Float64Array:
    _raise_at(name, "values in [0, 1]", array, ~((array >= 0) & (array <= 1)))
    _raise_at(name, "values that never rise with the timestep", array, np.diff(array, prepend=1.0) > 0)
    dead = array == 0
    dead[-1] = False
    _raise_at(name, "values > 0 before the last one (nothing of the signal is left after a 0)", array, dead)
    return array


def _beta_range(beta_start: float, beta_end: float) -> tuple[float, float]:
    beta_start, beta_end = real("beta_start", beta_start), real("beta_end", beta_end)
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: expected a value in (0, 1], got {value}")
    return beta_start, beta_end


def _max_beta(value: float) -> float:
    value = real("max_beta", value)
    if not 0 < value <= 1:
        raise ValueError(f"max_beta: expected a value in (0, 1], got {value}")
    return value


# Betas


def linear_betas(
    num_timesteps: int,
    beta_start: float | None = None,
    beta_end: float | None = None,
    *,
    scale: float | None = None,
) -> Float64Array:
    """Betas on a straight line from scale*beta_start to scale*beta_end, float64 [num_timesteps].

    The default is the form of OpenAI and lucidrains: 1e-4 to 0.02 times 1000/T, so that the whole chain adds
    about the same noise for any T (Ho et al. 2020, section 4, for T = 1000; Nichol and Dhariwal 2021,
    arXiv:2102.09672). diffusers and ermongroup do not scale: pass ``scale=1``, or the two ends, which are
    taken as they are unless a scale is given too.

    Raises ValueError where a beta would leave (0, 1]: the scaled form needs T >= 20. T = 20 is accepted and
    its last beta is exactly 1.
    """
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    if scale is None:
        scale = 1000 / num_timesteps if beta_start is None and beta_end is None else 1.0
    scale = real("scale", scale)
    first = scale * real("beta_start", 1e-4 if beta_start is None else beta_start)
    last = scale * real("beta_end", 0.02 if beta_end is None else beta_end)
    for name, value in (("beta_start", first), ("beta_end", last)):
        if not 0 < value <= 1:
            raise ValueError(
                f"{name}: expected a value in (0, 1] after scaling, got {value} "
                f"(scale {scale}, {num_timesteps} timesteps)"
            )
    return np.linspace(first, last, num_timesteps, dtype=np.float64)


def scaled_linear_betas(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64Array:
    """Betas whose square roots lie on a straight line, float64 [num_timesteps].

    "scaled_linear" of diffusers (Stable Diffusion: 0.00085 to 0.012); the same numbers are "linear" in
    CompVis and "quad" in Ho's and ermongroup's code. Nothing is scaled by 1000/T.
    """
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    beta_start, beta_end = _beta_range(beta_start, beta_end)
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2


def quad_betas(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64Array:
    """The "quad" of Ho and of ermongroup, the same as `scaled_linear_betas`; float64 [num_timesteps]."""
    return scaled_linear_betas(num_timesteps, beta_start, beta_end)


def _betas_of_alpha_bar(num_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float) -> Float64Array:
    """Betas 1 - alpha_bar((t+1)/T)/alpha_bar(t/T), at most max_beta."""
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    max_beta = _max_beta(max_beta)
    # Called with Python floats: NumPy's vector cosine and the C library's, which OpenAI's and diffusers' code
    # calls, differ in the last bit.
    return np.array(
        [
            min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), max_beta)
            for i in range(num_timesteps)
        ],
        dtype=np.float64,
    )


def cosine_betas(
    num_timesteps: int, s: float = 0.008, max_beta: float = 0.999, *, normalised: bool = False
) -> Float64Array:
    """Betas of alpha_bar(t/T) = cos^2((t/T + s)/(1 + s) * pi/2), capped at max_beta, float64 [num_timesteps].

    Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 17. "cosine" of OpenAI, lucidrains and CompVis,
    "squaredcos_cap_v2" of diffusers and DiT. ``normalised=True`` divides the table of alpha_bar by its first
    entry before the quotients are taken, as lucidrains and CompVis do; the betas differ from the default by
    rounding only (a few 1e-16).
    """
    s = real("s", s)
    if s < 0:
        raise ValueError(f"s: expected a value >= 0, got {s}")

    def alpha_bar(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    if not normalised:
        return _betas_of_alpha_bar(num_timesteps, alpha_bar, max_beta)
    first = alpha_bar(0.0)
    return _betas_of_alpha_bar(num_timesteps, lambda u: alpha_bar(u) / first, max_beta)


def laplace_betas(num_timesteps: int, max_beta: float = 0.999) -> Float64Array:
    """The "laplace" of diffusers: log SNR follows a Laplace distribution, float64 [num_timesteps].

    Hang et al. 2024 (arXiv:2407.03297). log SNR = -0.5 sign(0.5-u) log(1 - 2|0.5-u| + 1e-6) with u = t/T, and
    the betas come from quotients of sqrt(SNR/(1+SNR)), which diffusers takes for alpha_bar though it is its
    square root.
    """

    def alpha_bar(u: float) -> float:
        log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6)
        snr = math.exp(log_snr)
        return math.sqrt(snr / (1 + snr))

    return _betas_of_alpha_bar(num_timesteps, alpha_bar, max_beta)


def _sigmoid(x: ArrayLike) -> Float64Array:
    x = np.asarray(x, dtype=np.float64)
    e = np.exp(-np.abs(x))  # of a negative number only, so that nothing overflows
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def sigmoid_betas(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float64Array:
    """Betas that rise from beta_start to beta_end along sigmoid(-6 .. 6), float64 [num_timesteps].

    "sigmoid" of ermongroup and diffusers (there from GeoDiff). lucidrains' "sigmoid" is
    `sigmoid_alpha_bar_betas`.
    """
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    beta_start, beta_end = _beta_range(beta_start, beta_end)
    curve = _sigmoid(np.linspace(-6, 6, num_timesteps, dtype=np.float64))
    return curve * (beta_end - beta_start) + beta_start


def sigmoid_alpha_bar_betas(
    num_timesteps: int,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
    *,
    float32_ends: bool = True,
) -> Float64Array:
    """Betas of an alpha_bar that falls along a sigmoid, capped at max_beta, float64 [num_timesteps].

    "sigmoid" of lucidrains, its default schedule; Jabri et al. 2022 (arXiv:2212.11972), the sigmoid schedule.
    With v(a) = sigmoid(a/tau): alpha_bar(t/T) = (v(end) - v(start + t/T*(end-start))) / (v(end) - v(start)),
    divided by its first entry. lucidrains' code has the two ends v(start), v(end) in float32 and the rest in
    float64, which moves the betas by up to 1.3e-5 of their value. This is the default, for models trained
    with it; ``float32_ends=False`` is float64 throughout.
    """
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    start, end, tau = real("start", start), real("end", end), real("tau", tau)
    max_beta = _max_beta(max_beta)
    if tau <= 0:
        raise ValueError(f"tau: expected a value > 0, got {tau}")
    if end <= start:
        raise ValueError(f"end: expected a value > start = {start}, got {end}")
    ends = _sigmoid([start / tau, end / tau]).astype(np.float32 if float32_ends else np.float64)
    u = np.linspace(0, num_timesteps, num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = (np.float64(ends[1]) - _sigmoid((u * (end - start) + start) / tau)) / np.float64(ends[1] - ends[0])
    alpha_bar = alpha_bar / alpha_bar[0]
    betas: Float64Array = np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, max_beta)
    return betas


def const_betas(num_timesteps: int, beta: float = 0.02) -> Float64Array:
    """The "const" of Ho's and ermongroup's code: every beta is their beta_end, float64 [num_timesteps]."""
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    beta, _ = _beta_range(beta, beta)
    return np.full(num_timesteps, beta, dtype=np.float64)


def jsd_betas(num_timesteps: int) -> Float64Array:
    """The "jsd" of Ho's and ermongroup's code: 1/T, 1/(T-1), ..., 1/2, 1, float64 [num_timesteps].

    Sohl-Dickstein et al. 2015 (arXiv:1503.03585), section 2.4.1: each step erases the same part of the
    signal. The last beta is 1, so alpha_bar ends at 0 exactly (zero terminal SNR).
    """
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    return 1.0 / np.linspace(num_timesteps, 1, num_timesteps, dtype=np.float64)


def warmup_betas(
    num_timesteps: int, fraction: float = 0.1, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64Array:
    """Betas linear over the first int(T*fraction) timesteps, then beta_end, float64 [num_timesteps].

    "warmup10" (fraction 0.1) and "warmup50" (0.5) of Ho's code.
    """
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    beta_start, beta_end = _beta_range(beta_start, beta_end)
    fraction = real("fraction", fraction)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected a value in [0, 1], got {fraction}")
    betas = np.full(num_timesteps, beta_end, dtype=np.float64)
    warm = int(num_timesteps * fraction)
    betas[:warm] = np.linspace(beta_start, beta_end, warm, dtype=np.float64)
    return betas


def sprite_tables(
    num_timesteps: int = 500, beta_start: float = 1e-4, beta_end: float = 0.02
) -> tuple[Float64Array, Float64Array]:
    """The table of the course "How Diffusion Models Work" (sprites): betas and alphas_cumprod, float64 [T+1].

    Timesteps run from 1 to T = num_timesteps; entry 0 is the clean image, with alpha_bar 1. beta_i is linear
    in i/T and alpha_bar = exp(cumsum(log(1 - beta))), of which entry 0 alone is then set to 1. So alpha_bar_1
    is (1-beta_0)(1-beta_1), and beta_1 (used for the noise) is not 1 - alpha_bar_1/alpha_bar_0.
    """
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    beta_start, beta_end = _beta_range(beta_start, beta_end)
    betas = (beta_end - beta_start) * np.linspace(0, 1, num_timesteps + 1, dtype=np.float64) + beta_start
    with np.errstate(divide="ignore"):  # a last beta of 1 is allowed: log 0, alpha_bar 0
        alphas_cumprod = np.exp(np.cumsum(np.log(1 - betas)))
    alphas_cumprod[0] = 1.0
    return betas, alphas_cumprod


def rescale_zero_terminal_snr(alphas_cumprod: ArrayLike) -> Float64Array:
    """Rescale alpha_bar so that nothing of the signal is left at the last timestep, float64 [T].

    Lin et al. 2024 (arXiv:2305.08891), algorithm 1: sqrt(alpha_bar) is shifted so that its last value is 0
    and scaled so that its first one stays; both ends are exact here. diffusers' function of this name takes
    and returns betas, in float32.

    Raises ValueError where the first and last values are equal (one timestep, for example).
    """
    old = _check_alphas_cumprod(_vector("alphas_cumprod", alphas_cumprod))
    root = np.sqrt(old)
    if root[0] == root[-1]:
        raise ValueError(f"alphas_cumprod: expected a last value below the first, got {old[-1]} and {old[0]}")
    new: Float64Array = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    new[0], new[-1] = old[0], 0.0
    return new


def _betas_from_alphas_cumprod(alphas_cumprod: Float64Array) -> Float64Array:
    return 1.0 - alphas_cumprod / np.concatenate(([1.0], alphas_cumprod[:-1]))


def host_tables(
    host: str,
    betas: str | ArrayLike = "linear",
    num_timesteps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    rescale_zero_snr: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 (betas, alphas_cumprod) of a codebase that works in float32 throughout, as CPU tensors [T].

    There the float32 table is the definition: rounding a float64 table gives other numbers (by up to 4e-7 of
    alpha_bar, 2e-4 of 1 - alpha_bar near t = 0). The same torch operations are used, in the same order, so
    the values are those the codebase would have on this machine.

    - ``host="diffusers"``: "linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid", or trained
      betas; ``rescale_zero_snr`` is its rescale_betas_zero_snr.
    - ``host="ermongroup"``: "linear", "quad", "const", "jsd", "sigmoid", or betas (float64, then cast).
    - ``host="sprite"``: the course's log-cumsum table, T + 1 entries; only "linear".

    OpenAI and lucidrains make their tables in float64: use `NoiseSchedule` for them.

    Raises ValueError for a host or a name that is not in this list.
    """
    import torch

    if host not in ("diffusers", "ermongroup", "sprite"):
        raise ValueError(f"host: expected 'diffusers', 'ermongroup' or 'sprite', got {host!r}")
    if rescale_zero_snr and host != "diffusers":
        raise ValueError(f"rescale_zero_snr: expected False with host {host!r}, got True")
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    beta_start, beta_end = _beta_range(beta_start, beta_end)

    if host == "sprite":
        if not (isinstance(betas, str) and betas == "linear"):
            raise ValueError(f"betas: expected 'linear' with host 'sprite', got {betas!r}")
        unit = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float32, device="cpu")
        table = (beta_end - beta_start) * unit + beta_start
        alphas_cumprod = torch.cumsum((1 - table).log(), dim=0).exp()
        alphas_cumprod[0] = 1
        return table, alphas_cumprod

    def line(first: float, last: float) -> torch.Tensor:
        return torch.linspace(first, last, num_timesteps, dtype=torch.float32, device="cpu")

    named: dict[str, Callable[[], torch.Tensor]]
    if host == "diffusers":
        named = {
            "linear": lambda: line(beta_start, beta_end),
            "scaled_linear": lambda: line(beta_start**0.5, beta_end**0.5) ** 2,
            "squaredcos_cap_v2": lambda: torch.from_numpy(cosine_betas(num_timesteps)).float(),
            "laplace": lambda: torch.from_numpy(laplace_betas(num_timesteps)).float(),
            "sigmoid": lambda: torch.sigmoid(line(-6, 6)) * (beta_end - beta_start) + beta_start,
        }
    else:
        named = {
            "linear": lambda: torch.from_numpy(linear_betas(num_timesteps, beta_start, beta_end)).float(),
            "quad": lambda: torch.from_numpy(quad_betas(num_timesteps, beta_start, beta_end)).float(),
            "const": lambda: torch.from_numpy(const_betas(num_timesteps, beta_end)).float(),
            "jsd": lambda: torch.from_numpy(jsd_betas(num_timesteps)).float(),
            "sigmoid": lambda: torch.from_numpy(sigmoid_betas(num_timesteps, beta_start, beta_end)).float(),
        }
    if isinstance(betas, str):
        if betas not in named:
            raise ValueError(f"betas: expected one of {sorted(named)} with host {host!r}, got {betas!r}")
        table = named[betas]()
    else:
        table = torch.from_numpy(_check_betas(_vector("betas", betas))).float()

    if rescale_zero_snr:
        root = torch.cumprod(1.0 - table, dim=0).sqrt()
        first, last = root[0].clone(), root[-1].clone()
        alpha_bar = ((root - last) * (first / (first - last))) ** 2
        table = 1 - torch.cat([alpha_bar[0:1], alpha_bar[1:] / alpha_bar[:-1]])
    return table, torch.cumprod(1.0 - table, dim=0)


# The schedule


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """How much noise each training timestep holds. Immutable; compared and hashed by its numbers.

    Attributes:
        betas: float64 [T], read-only. Variance added by the forward step into t, in [0, 1].
        alphas_cumprod: float64 [T], read-only. alpha_bar_t, never rising; 0 at most at the last timestep
            (zero terminal SNR), 1 at most where beta is 0 (entry 0 of the sprite course's table).
        name: what to call it. It has no effect on any number, and two schedules that differ in it are equal.

    Usually made by one of the constructors. Given directly, the two arrays are taken as they are and only
    their ranges are checked: a codebase may hold betas and alpha_bars that do not follow from each other
    (`sprite`).

    Raises TypeError for anything but real numbers; ValueError for NaN, values out of range, an alpha_bar that
    rises or that is 0 before the end, shapes other than 1-D, empty arrays and different lengths.
    """

    betas: Float64Array
    alphas_cumprod: Float64Array
    name: str = "custom"
    _hash: int = field(init=False)

    def __post_init__(self) -> None:
        betas = _vector("betas", self.betas)
        _raise_at("betas", "values in [0, 1]", betas, ~((betas >= 0) & (betas <= 1)))
        alphas_cumprod = _check_alphas_cumprod(_vector("alphas_cumprod", self.alphas_cumprod))
        if len(betas) != len(alphas_cumprod):
            raise ValueError(
                f"alphas_cumprod: expected {len(betas)} values, as many as betas, got {len(alphas_cumprod)}"
            )
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a str, got {type(self.name).__name__}")
        betas.flags.writeable = alphas_cumprod.flags.writeable = False
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
        object.__setattr__(self, "_hash", hash((betas.tobytes(), alphas_cumprod.tobytes())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return np.array_equal(self.betas, other.betas) and np.array_equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt when copied or unpickled: copied arrays are writable, hashes of bytes differ per process.
        return NoiseSchedule, (self.betas, self.alphas_cumprod, self.name)

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.name!r}, num_timesteps={self.num_timesteps})"

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def num_timesteps(self) -> int:
        """T, the number of entries; timesteps run from 0 to T - 1."""
        return len(self.betas)

    # Constructors

    @classmethod
    def from_betas(cls, betas: ArrayLike, *, name: str = "betas") -> NoiseSchedule:
        """From 1-D betas in (0, 1] of any real dtype; alpha_bar is the float64 running product of 1 - beta.

        Raises TypeError / ValueError as the class does, and ValueError for a beta of 0.
        """
        array = _check_betas(_vector("betas", betas))
        return cls(array, np.cumprod(1.0 - array, dtype=np.float64), name)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: ArrayLike, *, name: str = "alphas_cumprod") -> NoiseSchedule:
        """From 1-D alpha_bars in [0, 1] that never rise, of any real dtype.

        The betas are 1 - alpha_bar_t/alpha_bar_{t-1}, with 1 before the first. The values given are kept
        exactly: a float32 table (that of diffusers, say) is the same table in float64.
        """
        array = _check_alphas_cumprod(_vector("alphas_cumprod", alphas_cumprod))
        return cls(_betas_from_alphas_cumprod(array), array, name)

    @classmethod
    def from_host(
        cls,
        host: str,
        betas: str | ArrayLike = "linear",
        num_timesteps: int = 1000,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale_zero_snr: bool = False,
    ) -> NoiseSchedule:
        """From float32 tables of "diffusers", "ermongroup" or "sprite", kept exactly: see `host_tables`."""
        table, alphas_cumprod = host_tables(
            host,
            betas,
            num_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            rescale_zero_snr=rescale_zero_snr,
        )
        name = f"{host} {betas if isinstance(betas, str) else 'betas'}"
        return cls(table.numpy(), alphas_cumprod.numpy(), name)

    @classmethod
    def linear(
        cls,
        num_timesteps: int,
        beta_start: float | None = None,
        beta_end: float | None = None,
        *,
        scale: float | None = None,
    ) -> NoiseSchedule:
        """Betas on a line, scaled by 1000/T unless the ends or a scale are given: see `linear_betas`."""
        return cls.from_betas(linear_betas(num_timesteps, beta_start, beta_end, scale=scale), name="linear")

    @classmethod
    def scaled_linear(cls, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Square roots of the betas on a line (diffusers; "linear" in CompVis): see `scaled_linear_betas`."""
        return cls.from_betas(scaled_linear_betas(num_timesteps, beta_start, beta_end), name="scaled_linear")

    @classmethod
    def quad(cls, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """The name that Ho and ermongroup have for `scaled_linear`."""
        return cls.from_betas(quad_betas(num_timesteps, beta_start, beta_end), name="quad")

    @classmethod
    def cosine(
        cls, num_timesteps: int, s: float = 0.008, max_beta: float = 0.999, *, normalised: bool = False
    ) -> NoiseSchedule:
        """Squared cosine (OpenAI "cosine", diffusers "squaredcos_cap_v2"): see `cosine_betas`."""
        return cls.from_betas(cosine_betas(num_timesteps, s, max_beta, normalised=normalised), name="cosine")

    @classmethod
    def sigmoid(cls, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas along a sigmoid (ermongroup, diffusers): see `sigmoid_betas`."""
        return cls.from_betas(sigmoid_betas(num_timesteps, beta_start, beta_end), name="sigmoid")

    @classmethod
    def sigmoid_alpha_bar(
        cls,
        num_timesteps: int,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        max_beta: float = 0.999,
        *,
        float32_ends: bool = True,
    ) -> NoiseSchedule:
        """alpha_bar along a sigmoid (lucidrains' "sigmoid"): see `sigmoid_alpha_bar_betas`."""
        betas = sigmoid_alpha_bar_betas(num_timesteps, start, end, tau, max_beta, float32_ends=float32_ends)
        return cls.from_betas(betas, name="sigmoid_alpha_bar")

    @classmethod
    def laplace(cls, num_timesteps: int, max_beta: float = 0.999) -> NoiseSchedule:
        """The "laplace" of diffusers: see `laplace_betas`."""
        return cls.from_betas(laplace_betas(num_timesteps, max_beta), name="laplace")

    @classmethod
    def const(cls, num_timesteps: int, beta: float = 0.02) -> NoiseSchedule:
        """Every beta the same (Ho, ermongroup): see `const_betas`."""
        return cls.from_betas(const_betas(num_timesteps, beta), name="const")

    @classmethod
    def jsd(cls, num_timesteps: int) -> NoiseSchedule:
        """1/T, 1/(T-1), ..., 1 (Ho, ermongroup): see `jsd_betas`."""
        return cls.from_betas(jsd_betas(num_timesteps), name="jsd")

    @classmethod
    def warmup(
        cls, num_timesteps: int, fraction: float, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Linear over the first part of the timesteps, then constant: see `warmup_betas`."""
        betas = warmup_betas(num_timesteps, fraction, beta_start, beta_end)
        return cls.from_betas(betas, name=f"warmup{100 * fraction:g}")

    @classmethod
    def warmup10(cls, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """The "warmup10" of Ho's code: `warmup` over the first tenth."""
        return cls.warmup(num_timesteps, 0.1, beta_start, beta_end)

    @classmethod
    def warmup50(cls, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """The "warmup50" of Ho's code: `warmup` over the first half."""
        return cls.warmup(num_timesteps, 0.5, beta_start, beta_end)

    @classmethod
    def sprite(cls, num_timesteps: int = 500, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """The sprite course's table: T + 1 entries, of which entry 0 is the clean image: see `sprite_tables`.

        The noised timesteps are 1 to T, so `num_timesteps` of the result is T + 1.
        """
        return cls(*sprite_tables(num_timesteps, beta_start, beta_end), "sprite")

    # Derived

    def rescale_zero_snr(self) -> NoiseSchedule:
        """The same schedule with zero terminal SNR: see `rescale_zero_terminal_snr`."""
        alphas_cumprod = rescale_zero_terminal_snr(self.alphas_cumprod)
        return NoiseSchedule.from_alphas_cumprod(alphas_cumprod, name=f"{self.name}, zero terminal SNR")

    def respace(self, timesteps: Iterable[SupportsIndex]) -> tuple[NoiseSchedule, tuple[int, ...]]:
        """The schedule of the kept timesteps alone, and the training timestep of each of its entries.

        Args:
            timesteps: the timesteps to keep, in any order; a repeated one counts once.

        Returns:
            (schedule, timestep_map): entry i of the schedule is training timestep timestep_map[i], ascending.
            Its alpha_bars are the kept ones, exactly, and its betas are 1 - alpha_bar_i/alpha_bar_{i-1} over
            the kept timesteps (SpacedDiffusion of improved-diffusion; Nichol and Dhariwal 2021, section 4).
            OpenAI's code multiplies those betas up again: `from_betas(schedule.betas)` has its alpha_bars, to
            the last bit.

        Raises TypeError / ValueError for timesteps that are not ints in [0, T), or none at all.
        """
        kept = {integer("timesteps", t, 0, self.num_timesteps - 1) for t in timesteps}
        if not kept:
            raise ValueError("timesteps: expected at least one timestep, got none")
        timestep_map = tuple(sorted(kept))
        alphas_cumprod = self.alphas_cumprod[list(timestep_map)]
        return (
            NoiseSchedule(_betas_from_alphas_cumprod(alphas_cumprod), alphas_cumprod, f"{self.name}[{len(kept)}]"),
            timestep_map,
        )

    def alpha_bar(self, t: ArrayLike, *, final: float = 1.0) -> Float64Array:
        """alpha_bar at timesteps t (int or ints, in [-1, T)), float64 of t's shape; at t = -1 it is `final`.

        final = 1 is the clean image, the end of the chain for OpenAI, lucidrains, ermongroup and diffusers by
        default; final = alphas_cumprod[0] is what Stable Diffusion's configurations (set_alpha_to_one=False)
        and CompVis use.

        Raises TypeError for timesteps that are not ints, ValueError for timesteps out of range or a `final`
        outside [0, 1].
        """
        index = np.asarray(t)
        if index.dtype.kind not in "iu":
            raise TypeError(f"t: expected ints, got dtype {index.dtype}")
        bad = (index < -1) | (index >= self.num_timesteps)
        if bad.any():
            raise ValueError(f"t: expected timesteps in [-1, {self.num_timesteps}), got {index[bad].ravel()[0]}")
        final = real("final", final)
        if not 0 <= final <= 1:
            raise ValueError(f"final: expected a value in [0, 1], got {final}")
        return np.append(self.alphas_cumprod, final)[index]  # index -1 is the last entry: final

    @property
    def alphas_cumprod_prev(self) -> Float64Array:
        """alpha_bar of the timestep before, float64 [T], with 1 before the first."""
        return np.concatenate(([1.0], self.alphas_cumprod[:-1]))

    @property
    def alphas_cumprod_next(self) -> Float64Array:
        """alpha_bar of the timestep after, float64 [T], with 0 after the last (OpenAI's reverse DDIM)."""
        return np.concatenate((self.alphas_cumprod[1:], [0.0]))

    @property
    def snr(self) -> Float64Array:
        """Signal-to-noise ratio alpha_bar/(1 - alpha_bar), float64 [T]; inf where alpha_bar is 1."""
        with np.errstate(divide="ignore"):
            return self.alphas_cumprod / (1.0 - self.alphas_cumprod)


# Chains


def space_timesteps(num_timesteps: int, section_counts: str | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """The timesteps that improved-diffusion's `space_timesteps` keeps, descending (there a set).

    Args:
        num_timesteps: T.
        section_counts: how many timesteps to keep of each equal section of [0, T), first section first, as
            ints or as "a,b,c"; or "ddimN": the smallest integer stride from 0 that gives exactly N timesteps.

    Within a section of `size` the kept timesteps are a stride of (size-1)/(count-1) apart. The stride is
    added up in floating point and rounded half to even, as there: for T = 1000 the result differs from a
    rounded linspace for 278 of the 999 counts from 2 to 1000. A count of 1 keeps the first timestep of its
    section, a count of 0 none. "ddimN" exists for few N only (62 for T = 1000), starts at 0 and does not hold
    T - 1.

    Raises ValueError for a count larger than its section, negative counts, no timestep at all, an N that no
    stride gives, or a string that is none of the above.
    """
    num_timesteps = integer("num_timesteps", num_timesteps, 1)
    if isinstance(section_counts, str):
        text = section_counts
        if text.startswith("ddim"):
            count = _parse_int(text, text[len("ddim") :])
            for stride in range(1, num_timesteps):
                if len(range(0, num_timesteps, stride)) == count:
                    return tuple(range(0, num_timesteps, stride))[::-1]
            raise ValueError(
                f"section_counts: expected 'ddimN' with an N that an integer stride gives, got {text!r}: "
                f"no stride over {num_timesteps} timesteps visits exactly {count}"
            )
        counts = [_parse_int(text, part) for part in text.split(",")]
    else:
        counts = [integer("section_counts", count, 0) for count in section_counts]
    if any(count < 0 for count in counts) or sum(counts) == 0:
        raise ValueError(f"section_counts: expected counts >= 0 and at least one timestep, got {counts}")

    size_per, extra = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    begin = 0
    for index, count in enumerate(counts):
        size = size_per + (1 if index < extra else 0)
        if count > size:
            raise ValueError(
                f"section_counts: expected at most {size} timesteps in section {index} of {len(counts)} "
                f"(of {num_timesteps} timesteps), got {count}"
            )
        distance = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.add(begin + round(position))
            position += distance
        begin += size
    return tuple(sorted(kept, reverse=True))


def _parse_int(text: str, part: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise ValueError(f"section_counts: expected 'a,b,c' with ints, or 'ddimN', got {text!r}") from None


def _leading(total: int, steps: int, offset: int, literal: bool) -> list[int]:
    stride = total // steps
    if not literal:
        offset = min(offset, total - 1 - (steps - 1) * stride)
    return [i * stride + offset for i in range(steps)][::-1]


def _trailing(total: int, steps: int, offset: int, literal: bool) -> list[int]:
    chain = np.round(np.arange(total, 0, -total / steps)).astype(np.int64) - 1
    # Rounding in arange can add an element near 0, that is a timestep of -1.
    return [int(t) for t in (chain if literal else chain[:steps])]


def _linspace(total: int, steps: int, offset: int, literal: bool) -> list[int]:
    return [int(t) for t in np.linspace(0, total - 1, steps).round()[::-1]]


def _openai(total: int, steps: int, offset: int, literal: bool) -> list[int]:
    return list(space_timesteps(total, [steps]))


def _lucidrains(total: int, steps: int, offset: int, literal: bool) -> list[int]:
    # torch.linspace(-1, T-1, S+1) in float32: from both ends, each element one fused multiply-add, as torch's
    # vector code has it. Written in NumPy (a product of two float32 is exact in float64), so that every
    # machine gets one chain.
    first, last = np.float64(-1), np.float64(np.float32(total - 1))
    stride = np.float64(np.float32(np.float32(last - first) / np.float32(steps)))
    index = np.arange(steps + 1)
    times = np.where(index < (steps + 1) // 2, first + stride * index, last - stride * (steps - index))
    return [int(t) for t in times.astype(np.float32)[:0:-1]]


def _uniform(total: int, steps: int, offset: int, literal: bool) -> list[int]:
    return [t + offset for t in range(0, total, total // steps)][::-1]


def _quad(total: int, steps: int, offset: int, literal: bool) -> list[int]:
    return [int(t) + offset for t in np.linspace(0, np.sqrt(total * 0.8), steps) ** 2][::-1]


def _sprite(total: int, steps: int, offset: int, literal: bool) -> list[int]:
    return list(range(total - 1, 0, -((total - 1) // steps)))


_SPACINGS: dict[str, Callable[[int, int, int, bool], list[int]]] = {
    "leading": _leading,
    "linspace": _linspace,
    "lucidrains": _lucidrains,
    "openai": _openai,
    "quad": _quad,
    "sprite": _sprite,
    "trailing": _trailing,
    "uniform": _uniform,
}
_OFFSET_SPACINGS = ("leading", "quad", "uniform")


def timesteps(
    schedule: NoiseSchedule | int,
    steps: Steps = None,
    spacing: str | None = None,
    *,
    steps_offset: int = 0,
    host: str | None = None,
    start: int | float | None = None,
) -> tuple[int, ...]:
    """The training timesteps that a sampler visits, in the order it visits them (descending).

    Args:
        schedule: a NoiseSchedule, or its number of timesteps T.
        steps: what to visit.
            None: all of T - 1, ..., 0.
            int: that many, spread over [0, T) by `spacing`.
            str: improved-diffusion's counts, "50", "10,20,30" or "ddim50": see `space_timesteps`.
            a list, range, array or tensor of ints: these, in descending order; a timestep may be repeated
                (see `visits`).
            a set of ints: these, in descending order.
            pairs (t, t_prev): the first of each; see `pairs`.
        spacing: for an int `steps` only; "trailing" if not given. With S steps:
            "trailing": round(T - i*T/S) - 1, i = 0..S-1 (diffusers). Holds T - 1 always, so it is right for
                few steps and for one (Lin et al., arXiv:2305.08891, section 3.3).
            "leading": i*(T//S) + steps_offset (diffusers' default). Does not hold T - 1; one step is t = 0.
            "linspace": round(linspace(0, T-1, S)) (diffusers). One step is t = 0.
            "openai": improved-diffusion's "S", a stride of (T-1)/(S-1) added up and rounded. One step is t=0.
            "lucidrains": linspace(-1, T-1, S+1) in float32, cut to ints, without the -1.
            "uniform": 0, T//S, 2*(T//S), ... below T (ermongroup): the number of steps is not honoured, 300
                of 1000 gives 334. With steps_offset=1, CompVis' "uniform".
            "quad": int(linspace(0, sqrt(0.8 T), S)^2) (ermongroup): starts at 0.8 T and repeats small
                timesteps (100 of 1000: 96 different ones). With steps_offset=1, CompVis' "quad".
            "sprite": T, T - T//S, ... above 0 with T = num_timesteps - 1, for `NoiseSchedule.sprite`; the
                number of steps is not honoured where S does not divide T.
        steps_offset: added to each timestep, for "leading", "uniform" and "quad".
        host: None for the corrected form. "diffusers" for "leading", "trailing" and "linspace" to the letter,
            where some counts give a broken chain: for 62 of the counts 1 to 1000 of T = 1000, "trailing" has
            one step too many, at t = -1; "leading" with an offset reaches t = T where T//S is too small to
            leave room (there the corrected form makes the offset smaller); steps_offset is ignored by the
            other two.
        start: where to enter the chain. None: at its beginning. A float f in [0, 1): without the first
            round(f*S) steps, of which at least one remains. An int t: without the timesteps above t.

    Returns:
        The timesteps as Python ints.

    Raises TypeError / ValueError naming the argument: timesteps that are not ints, that ascend or that lie
    outside [0, T); an int `steps` outside [1, T]; an unknown spacing or host; an option that the given
    `steps` has no use for.
    """
    return tuple(t for t, _ in pairs(schedule, steps, spacing, steps_offset=steps_offset, host=host, start=start))


def pairs(
    schedule: NoiseSchedule | int,
    steps: Steps = None,
    spacing: str | None = None,
    *,
    steps_offset: int = 0,
    host: str | None = None,
    start: int | float | None = None,
    previous: str = "list",
) -> tuple[tuple[int, int], ...]:
    """The (t, t_prev) pairs of a chain: each timestep visited and the one its step leads to.

    Takes what `timesteps` takes, and in place of timesteps also pairs (t, t_prev) themselves, in any order of
    visits, with -1 <= t_prev <= t. t_prev = -1 stands for the end of the chain: alpha_bar is 1 there, or
    whatever final value the sampler has (diffusers' set_alpha_to_one=False, CompVis: alphas_cumprod[0]); see
    `NoiseSchedule.alpha_bar`.

    Args:
        previous: "list": the next timestep of the chain, -1 after the last (OpenAI, lucidrains, ermongroup,
            diffusers' DDPM). "stride": t - T//S, or -1 where that is negative: diffusers' DDIM, whatever the
            spacing. It is the list for "leading" with an offset below T//S; for "linspace", and for
            "trailing" where S does not divide T, it leads to timesteps that the chain does not visit, and may
            end above the clean image. Needs an int `steps`.

    Returns:
        Tuples of Python ints, in sampling order.

    Raises as `timesteps` does, and ValueError for a pair that leads up or an unknown `previous`.
    """
    if isinstance(schedule, NoiseSchedule):
        total = schedule.num_timesteps
    else:
        total = integer("schedule (a NoiseSchedule or its number of timesteps)", schedule, 1)
    if previous not in ("list", "stride"):
        raise ValueError(f"previous: expected 'list' or 'stride', got {previous!r}")
    if host not in (None, "diffusers"):
        raise ValueError(f"host: expected None or 'diffusers', got {host!r}")
    offset = integer("steps_offset", steps_offset, 0)

    counted = steps is not None and not isinstance(steps, str) and not is_many(steps)
    if not counted:
        if isinstance(steps, str):
            if spacing not in (None, "openai"):
                raise ValueError(f"spacing: expected None or 'openai' with steps {steps!r}, got {spacing!r}")
        elif spacing is not None:
            raise ValueError(f"spacing: expected None unless steps is a number of steps, got {spacing!r}")
        if offset:
            raise ValueError(f"steps_offset: expected 0 unless steps is a number of steps, got {offset}")
        if previous == "stride":
            raise ValueError("previous: expected 'list' unless steps is a number of steps, got 'stride'")

    if steps is None:
        result = _follow(range(total - 1, -1, -1))
    elif isinstance(steps, str):
        result = _follow(space_timesteps(total, steps))
    elif is_many(steps):
        result = _given(total, steps)
    else:
        chain = _spaced(total, steps, spacing or "trailing", offset, host)
        if previous == "stride":
            stride = total // integer("steps", steps, 1)
            result = [(t, max(t - stride, -1)) for t in chain]
        else:
            result = _follow(chain)
    return tuple(enter(result, start, total))


def is_many(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether value holds several things; a 0-dim array or tensor has __iter__ but is a number."""
    return isinstance(value, Iterable) and getattr(value, "ndim", None) != 0


def _spaced(total: int, steps: Any, spacing: str, offset: int, host: str | None) -> list[int]:
    if spacing not in _SPACINGS:
        raise ValueError(f"spacing: expected one of {sorted(_SPACINGS)}, got {spacing!r}")
    if host == "diffusers" and spacing not in ("leading", "linspace", "trailing"):
        raise ValueError(
            f"spacing: expected 'leading', 'linspace' or 'trailing' with host 'diffusers', got {spacing!r}"
        )
    if spacing == "sprite" and total < 2:
        raise ValueError(f"schedule: expected at least 2 timesteps with spacing 'sprite', got {total}")
    steps = integer("steps", steps, 1, total - 1 if spacing == "sprite" else total)
    if offset and host is None and spacing not in _OFFSET_SPACINGS:
        raise ValueError(f"steps_offset: expected 0 with spacing {spacing!r}, got {offset}")
    chain = _SPACINGS[spacing](total, steps, offset, host is not None)
    if host is None and chain[0] >= total:
        raise ValueError(
            f"steps_offset: expected one that keeps timesteps below {total}, got {offset}: the first of "
            f"{steps} steps with spacing {spacing!r} is {chain[0]}"
        )
    return chain


def _follow(chain: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(chain, (*chain[1:], -1), strict=True))


def _given(total: int, steps: Iterable[Any]) -> list[tuple[int, int]]:
    """Check a list of timesteps or of pairs that the caller made."""
    items = sorted(steps, reverse=True) if isinstance(steps, (set, frozenset)) else list(steps)
    if not items:
        raise ValueError("steps: expected at least one timestep, got none")
    if is_many(items[0]):
        result = []
        for item in items:
            pair = tuple(item) if is_many(item) else (item,)
            if len(pair) != 2:
                raise ValueError(f"steps: expected pairs (t, t_prev), got {item!r}")
            t = integer("steps (t of a pair)", pair[0], 0, total - 1)
            t_prev = integer("steps (t_prev of a pair)", pair[1], -1, total - 1)
            if t_prev > t:
                raise ValueError(f"steps: expected pairs (t, t_prev) with t_prev <= t, got ({t}, {t_prev})")
            result.append((t, t_prev))
        return result
    chain = [integer("steps", item, 0, total - 1) for item in items]
    for before, after in zip(chain, chain[1:], strict=False):
        if after > before:
            raise ValueError(f"steps: expected timesteps in descending order, got {after} after {before}")
    return _follow(chain)


def enter(chain: list[tuple[int, int]], start: Any, total: int) -> list[tuple[int, int]]:
    """The pairs of a chain from `start` on: a fraction of its steps, a timestep of [0, total), or None for all."""
    if start is None:
        return chain
    if isinstance(start, (float, np.floating)):
        fraction = real("start", start)
        if not 0 <= fraction < 1:
            raise ValueError(f"start: expected a fraction in [0, 1) or a timestep, got {start}")
        return chain[min(round(fraction * len(chain)), len(chain) - 1) :]
    first = integer("start", start, 0, total - 1)
    for index, (t, _) in enumerate(chain):
        if t <= first:
            return chain[index:]
    raise ValueError(f"start: expected a timestep of at least {chain[-1][0]}, the last of the chain, got {first}")


def visits(chain: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """How many times each timestep of a chain was visited before: 0 for a first visit, 1 for a second, ...

    (9, 5, 5, 0) gives (0, 0, 1, 0). The number keeps the noise of repeated visits apart.
    """
    seen: dict[int, int] = {}
    result = []
    for item in chain:
        t = operator.index(item)
        result.append(seen.get(t, 0))
        seen[t] = result[-1] + 1
    return tuple(result)
