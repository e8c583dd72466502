"""What the pages call the providers of a benchmark, and how they write figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import charts
from summary import Record, as_time, duration, seconds

# provider: its name, and its colour
LABELS = {
    "fastdiff": ("fastdiff", "fastdiff"),
    "fastdiff_new": ("fastdiff, new result", "fastdiff"),
    "fastdiff_inplace": ("fastdiff, in place", "fastdiff"),
    "fastdiff_int_seed": ("fastdiff, an int as seeds", "fastdiff"),
    "fastdiff_step": ("fastdiff, a loop of steps", "fastdiff"),
    "triton": ("fastdiff, Triton", "fastdiff"),
    "philox": ("fastdiff, noise from seeds", "fastdiff"),
    "host": ("diffusers' scheduler", "host"),
    "diffusers": ("diffusers' scheduler", "host"),
    "improved_diffusion": ("improved-diffusion", "host"),
    "plain": ("plain PyTorch", "plain"),
    "plain_folded": ("plain PyTorch, folded", "plain"),
    "plain_autograd": ("plain autograd", "plain"),
    "compiled": ("torch.compile", "compiled"),
    "compiled_noise_outside": ("torch.compile, noise outside", "compiled"),
    "jax": ("JAX, jit", "other"),
    "torch": ("torch's normal_", "plain"),
    "copy": ("a copy of as many bytes", "copy"),
}
MEANINGS = {
    "fastdiff": "`sampler.step` with `out=`; also with a new result, in place, or with an int in place of the seeds",
    "host": "the step of diffusers' own scheduler, as pipelines call it",
    "improved_diffusion": "the step as that codebase writes it, its tables copied to the device at every call",
    "plain": "the step in PyTorch operations at its best: coefficients at hand, every operation in place",
    "plain_folded": "the same with factors moved about until no operation can be saved",
    "compiled": "`torch.compile` of the plain step, noise drawn inside",
    "compiled_noise_outside": "the same, with noise drawn by torch before it",
    "jax": "the step under JAX's `jit`",
    "copy": "torch's copy of as many bytes as the step must read and write: the yardstick, once they are many",
}
# why a step may be faster than that copy
PASSED = (
    "A step may be faster than the copy: memory that is written is first read into the cache, unless it is there. A "
    "copy of 12 bytes an element writes 6 of them and so may move 18; a DDIM step writes 4 and moves 16, and in place, "
    "where it has read what it writes, or past the cache, where its result is larger than that, 12 (computed, not "
    "measured)."
)


def label(provider: str) -> str:
    if provider in LABELS:
        return LABELS[provider][0]
    if provider.startswith("numpy_"):
        generator = provider.removeprefix("numpy_")
        return f"NumPy, {generator.capitalize() if generator == 'philox' else generator.upper()}"
    return provider.replace("_", " ")


def colour(provider: str) -> str:
    return LABELS[provider][1] if provider in LABELS else "other"


def info(record: Record) -> dict[str, Any]:
    return record["extra_info"]


def is_ours(provider: str) -> bool:
    return provider.startswith("fastdiff") or provider in ("triton", "philox")


def is_rival(provider: str) -> bool:
    """Whether fastdiff is compared with it: a copy is a yardstick, and part of a call no provider."""
    return provider.startswith("numpy_") or (provider in LABELS and not is_ours(provider) and provider != "copy")


def quartiles(record: Record) -> tuple[float, float]:
    return record["stats"]["q1"], record["stats"]["q3"]


def times(ratio: float) -> str:
    """A ratio as text: 2.41, 19.6."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:,.0f}"


def joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count(number: int) -> str:
    """Elements: 256, 4k, 16M, in powers of 1024."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if number >= size:
            return f"{number / size:g}{unit}" if number % size == 0 else f"{number / size:.1f}{unit}"
    return str(number)


def bar(record: Record, unit: float = 1.0, text: str | None = None) -> charts.Bar:
    provider = info(record)["provider"]
    return charts.Bar(
        label(provider),
        text or as_time(record),
        [(seconds(record) / unit, colour(provider))],
        (record["stats"]["q1"] / unit, record["stats"]["q3"] / unit),
        is_ours(provider),
    )


def clock(record: Record) -> str:
    """What follows a time that is the processor's, which other work on the machine changes less."""
    return " (processor time)" if info(record).get("timer") == "processor" else ""


def spread(record: Record) -> str:
    return " to ".join(map(duration, quartiles(record)))
