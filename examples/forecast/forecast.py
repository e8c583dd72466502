"""Forecast the sea surface temperature off Peru for the years after the training, and tell what that is worth.

    python examples/forecast/forecast.py

Prints scores and times, and writes a page with the forecasts, build/forecast.html. Downloads nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "digits"))

import arguments  # noqa: E402
import denoiser  # noqa: E402
from scores import coverage, crps, interval  # noqa: E402
from series import HORIZON, TEST, Series, Windows  # noqa: E402

import fastdiff  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MEMBERS, SEED = 64, 7
NETWORK, CLIMATOLOGY, PERSISTENCE, DAMPED = "network", "climatology", "persistence", "damped persistence"


@dataclass(frozen=True)
class Evaluation:
    """Every forecast of the test years: members float64 [M, N, HORIZON] in degrees Celsius, by the forecast's name,
    and their scores, float64 [N, HORIZON]."""

    series: Series
    windows: Windows
    truth: Tensor
    members: dict[str, Tensor]
    scores: dict[str, Tensor]

    def gain(self, over: str) -> tuple[float, float, float]:
        """1 - CRPS / CRPS of another forecast, and a 90 % interval, by a bootstrap over the years of departure."""
        other = self.scores[over].mean(1)
        difference = other - self.scores[NETWORK].mean(1)
        low, high = interval(difference, self.windows.start // 12)
        whole = other.mean().item()
        return difference.mean().item() / whole, low / whole, high / whole

    def worse(self, than: str) -> float:
        """The share of the forecasts that another forecast beats."""
        return (self.scores[NETWORK].mean(1) > self.scores[than].mean(1)).double().mean().item()


def evaluate(network: nn.Module, members: int = MEMBERS, seed: int = SEED) -> Evaluation:
    """Forecasts from every month of the test years that are followed by enough of them: one chain for all."""
    series = Series()
    windows = series.windows(TEST)
    ensemble = denoiser.forecast(network, windows.condition, members, seed)
    found = {
        NETWORK: series.to_celsius(ensemble, windows.start),
        DAMPED: series.damped_persistence(windows.start),
        CLIMATOLOGY: series.climatology(windows.start),
        PERSISTENCE: series.persistence(windows.start),
    }
    truth = series.truth(windows.start)
    return Evaluation(series, windows, truth, found, {name: crps(of, truth) for name, of in found.items()})


# The same chain by diffusers


def scheduler() -> Any:
    """diffusers' scheduler for the same chain, ready; None where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    found = importlib.import_module("diffusers").DDPMScheduler(
        denoiser.STEPS, beta_schedule="squaredcos_cap_v2", clip_sample_range=denoiser.CLIP
    )
    found.set_timesteps(denoiser.STEPS)
    return found


def with_diffusers(
    steps: Any, network: nn.Module, x: Tensor, condition: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """The usual loop around a scheduler of diffusers, from x [B, HORIZON]."""
    for t in steps.timesteps:
        x = steps.step(network(x, t.expand(len(x)), condition), t, x, generator=generator).prev_sample
    return x


def with_fastdiff(network: nn.Module, x: Tensor, condition: Tensor, seeds: int | Tensor) -> Tensor:
    """The same chain, its noise made in the step."""
    return denoiser.SAMPLER.sample(network, x_T=x, seeds=seeds, model_kwargs={"condition": condition})


def same_bits(network: nn.Module, x: Tensor, condition: Tensor) -> bool:
    """Whether both end with the same bits, given torch's noise and the rounding of diffusers' coefficients."""
    schedule = fastdiff.NoiseSchedule.from_host("diffusers", "squaredcos_cap_v2", denoiser.STEPS)
    sampler = fastdiff.DDPMSampler(schedule, clip=denoiser.CLIP, host="diffusers")
    first, second = (torch.Generator().manual_seed(SEED) for _ in range(2))
    ours = sampler.sample(network, x_T=x, generator=first, model_kwargs={"condition": condition})
    return torch.equal(ours, with_diffusers(scheduler(), network, x, condition, second))


@dataclass(frozen=True)
class Times:
    """Seconds of a chain for a batch, at the median: with each, and of the network alone."""

    batch: int
    fastdiff: float
    network: float
    diffusers: float | None
    equal: bool | None


def chain(batch: int, windows: Windows) -> tuple[Tensor, Tensor]:
    """What `batch` forecasts from the first test month start from: x_T [B, HORIZON], condition [B, CONDITION]."""
    x = fastdiff.normal((batch, HORIZON), SEED)
    return x, windows.condition[:1].repeat(batch, 1)


def network_alone(network: nn.Module, x: Tensor, condition: Tensor) -> None:
    """The network's calls of a chain."""
    t = torch.empty(len(x), dtype=torch.int64)
    for k in denoiser.SAMPLER.timesteps:
        network(x, t.fill_(k), condition)


def measure(network: nn.Module, batch: int, windows: Windows, rounds: int) -> Times:
    """Times in turn, so that a disturbance of the machine meets all of them."""
    x, condition = chain(batch, windows)
    seeds, steps = fastdiff.seeds(SEED, batch), scheduler()
    runs: dict[str, Callable[[], object]] = {
        "fastdiff": lambda: with_fastdiff(network, x, condition, seeds),
        "network": lambda: network_alone(network, x, condition),
    }
    if steps is not None:
        runs["diffusers"] = lambda: with_diffusers(steps, network, x, condition)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if number:  # the first is not counted
                took[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(of) for name, of in took.items()}
    equal = None if steps is None else same_bits(network, x, condition)
    return Times(batch, median["fastdiff"], median["network"], median.get("diffusers"), equal)


def report(found: Evaluation, times: list[Times]) -> None:
    """Print what was found."""
    count, months = found.truth.shape
    print(f"{count} forecasts of {months} months, {TEST[0]} to {TEST[-1]}, {len(found.members[NETWORK])} members each")
    print(f"\n{'CRPS (degrees C)':<20}{'all':>7}" + "".join(f"{f'month {k}':>10}" for k in (1, 3, 6, 9, 12)))
    for name, score in found.scores.items():
        lead = score.mean(0)
        print(f"{name:<20}{score.mean():>7.3f}" + "".join(f"{lead[k - 1]:>10.3f}" for k in (1, 3, 6, 9, 12)))
    print()
    for name in (CLIMATOLOGY, PERSISTENCE, DAMPED):
        gain, low, high = found.gain(name)
        print(f"{gain:>6.0%} better than {name} ({low:.0%} to {high:.0%}), worse in {found.worse(name):.0%} of them")
    inside = ", ".join(
        f"{coverage(found.members[NETWORK], found.truth, p):.0%} in the interval of {p:.0%}" for p in (0.5, 0.9)
    )
    print(f"of the months, {inside}\n")
    for of in times:
        print(f"batch {of.batch}, {denoiser.STEPS} steps: fastdiff {of.fastdiff * 1000:.1f} ms", end="")
        print(f" (network alone {of.network * 1000:.1f})", end="")
        if of.diffusers is None:
            print(", diffusers not installed")
        else:
            print(f", diffusers {of.diffusers * 1000:.1f} ms: {of.diffusers / of.fastdiff:.1f} times faster", end="")
            print(f"; {'the same bits' if of.equal else 'NOT the same bits'} given the same noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=arguments.positive, default=MEMBERS, help=f"of each ensemble ({MEMBERS})")
    parser.add_argument("--rounds", type=arguments.positive, default=30, help="of every time, for the median (30)")
    parser.add_argument("--threads", type=arguments.positive, default=1, help="threads of torch; the network is small")
    parser.add_argument("--page", type=Path, default=ROOT / "build" / "forecast.html", help="where the page goes")
    options = parser.parse_args()
    arguments.require_writable(parser, "--page", options.page)
    torch.set_num_threads(options.threads)

    import chart  # after the options, as it needs Pillow for examples/digits/page.py

    network = denoiser.load()
    with torch.inference_mode():
        found = evaluate(network, options.members)
        times = [measure(network, batch, found.windows, options.rounds) for batch in (1, 64)]
    report(found, times)
    options.page.write_text(chart.page(found, times), encoding="utf-8")
    print(f"\nforecasts and truth: {options.page}")
    if any(of.equal is False for of in times):
        sys.exit("fastdiff and diffusers did not end with the same bits, given the same noise")


if __name__ == "__main__":
    main()
