"""Sample handwritten digits with and without the fused step, check what the papers say, write a page about it.

    make demo                                 # or: python examples/digits/demo.py

Nothing is downloaded. The page is build/digits.html, one file with its pictures inside.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arguments
import data
import model
import page
import plain
import torch
from torch import Tensor
from tqdm import tqdm

import fastdiff
from fastdiff import DDIMSampler, DDPMSampler, NoiseSchedule

SEED = 7
LINEAR, COSINE = NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)


class Digits:
    """The trained network, the real digits, and a classifier trained on real digits that reads what is sampled."""

    def __init__(self) -> None:
        net = model.load()
        self.denoiser = {schedule: model.Denoiser(net, schedule) for schedule in (LINEAR, COSINE)}
        self.x_train, self.y_train, self.x_real, self.y_real = data.load()
        self.reader = data.Reader(self.x_train, self.y_train)

    def sample(self, sampler: DDPMSampler | DDIMSampler, y: Tensor, **options: Any) -> Tensor:
        """Digits of the classes y [B]: float32 [B, 1, 8, 8]."""
        options = {"seeds": SEED, **options}
        return sampler.sample(
            self.denoiser[sampler.schedule], (len(y), *model.IMAGE_SHAPE), model_kwargs={"y": y}, **options
        )


def bar(items: Iterable[Any], label: str) -> Iterable[Any]:
    """A progress bar; where the output is a file there is none."""
    return tqdm(items, f"{label:<34}", leave=False, disable=None)


def classes(per_class: int) -> Tensor:
    """0, 1, ..., 9, 0, 1, ...: int64 [10 * per_class]."""
    return torch.arange(10).repeat(per_class)


# The fused step against the plain one


@dataclass
class Comparison:
    """A chain sampled twice on the same noise. Times in seconds: "all" of the chain, "step" the median of its steps."""

    name: str
    steps: int
    images: Tensor
    equal: bool
    share: float
    plain_all: float
    fused_all: float
    plain_noise: float
    plain_step: float
    fused_step: float

    @property
    def ratio(self) -> float:
        """Plain step with its own torch.randn, over fused step, which makes its noise too."""
        return (self.plain_step + self.plain_noise) / self.fused_step


def compare(digits: Digits, per_class: int) -> list[Comparison]:
    """DDPM, respaced DDPM and DDIM, each with the plain and with the fused step on the same noise."""
    y = classes(per_class)
    _compare(digits, "warm-up", DDPMSampler(LINEAR, 5), y)
    _compare(digits, "warm-up", DDIMSampler(LINEAR, 5), y)
    return [
        _compare(digits, "DDPM", DDPMSampler(LINEAR), y),
        _compare(digits, "DDPM, respaced", DDPMSampler(LINEAR, "100"), y),
        _compare(digits, "DDIM", DDIMSampler(LINEAR, 50), y),
        _compare(digits, "DDIM", DDIMSampler(LINEAR, 20), y),
    ]


def _compare(digits: Digits, name: str, sampler: DDPMSampler | DDIMSampler, y: Tensor) -> Comparison:
    denoiser, timesteps = digits.denoiser[sampler.schedule], sampler.timesteps
    shape, seeds = (len(y), *model.IMAGE_SHAPE), fastdiff.seeds(SEED, len(y))
    x_T = fastdiff.normal(shape, seeds)
    noisy = isinstance(sampler, DDPMSampler)
    by_hand = (plain.DDPM if noisy else plain.DDIM)(sampler.schedule, timesteps)
    # The plain step is handed the noise of the fused one, made before any clock runs.
    noise = [fastdiff.normal(shape, seeds, t=t, domain="step") if noisy else None for t in timesteps]
    told = [torch.full((len(y),), t) for t in timesteps]
    clock = time.perf_counter

    def chain(label: str, step: Callable[[Tensor, int, Tensor], Tensor], draws: bool) -> tuple[Tensor, Any, float]:
        x, seconds, begin = x_T, [], clock()
        for k in bar(range(len(timesteps)), f"{name}, {len(timesteps)} steps, {label}"):
            eps = denoiser(x, told[k], y)
            start = clock()
            if draws:
                torch.randn(shape)  # what a plain step draws; not used, for the sake of equal images
            drawn = clock()
            x = step(eps, k, x)
            seconds.append((drawn - start, clock() - drawn))
        return x, [statistics.median(column) for column in zip(*seconds, strict=True)], clock() - begin

    def plain_step(eps: Tensor, k: int, x: Tensor) -> Tensor:
        return by_hand.step(eps, k, x, noise[k])

    def fused_step(eps: Tensor, k: int, x: Tensor) -> Tensor:
        return sampler.step(eps, timesteps[k], x, seeds=seeds)

    plain_x, plain_times, plain_all = chain("plain", plain_step, draws=noisy)
    x, fused_times, fused_all = chain("fused", fused_step, draws=False)
    plain_noise = plain_times[0] if noisy else 0.0
    equal, share = torch.equal(x, plain_x), digits.reader.share_read_as(x, y)
    return Comparison(
        name, len(told), x, equal, share, plain_all, fused_all, plain_noise, plain_times[1], fused_times[1]
    )


def step_alone() -> list[dict[str, Any]]:
    """The step by itself, repeated, at the size of these digits and of larger images."""
    sizes = ((50, 1, 8, 8), 200), ((16, 3, 32, 32), 100), ((16, 3, 64, 64), 50)
    return [_step_alone(name, shape, repeats) for shape, repeats in sizes for name in ("DDPM", "DDIM")]


def _step_alone(name: str, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Medians in seconds; the plain step draws its noise by torch.randn."""
    sampler = DDPMSampler(LINEAR) if name == "DDPM" else DDIMSampler(LINEAR, 50)
    by_hand = (plain.DDPM if name == "DDPM" else plain.DDIM)(LINEAR, sampler.timesteps)
    x, eps, seeds, k = torch.randn(shape), torch.randn(shape), fastdiff.seeds(SEED, shape[0]), 10

    def plain_step() -> Tensor:
        return by_hand.step(eps, k, x, torch.randn(shape) if name == "DDPM" else None)

    def fused_step() -> Tensor:
        return sampler.step(eps, sampler.timesteps[k], x, seeds=seeds)

    return {"name": name, "shape": shape, "plain": _median(plain_step, repeats), "fused": _median(fused_step, repeats)}


def _median(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# What the papers and their codebases say, in numbers


def trajectory(digits: Digits, frames: int = 10) -> dict[str, Any]:
    """x_t and predicted x0 of one digit of each of three classes, along a DDPM chain of 1000 steps."""
    sampler, y = DDPMSampler(LINEAR), torch.tensor([3, 5, 8])
    chain = sampler.iterate(digits.denoiser[LINEAR], (3, *model.IMAGE_SHAPE), seeds=SEED, model_kwargs={"y": y})
    wanted = [round(999 * (1 - i / (frames - 1))) for i in range(frames)]
    kept = [(x, x0) for x, x0, t in bar(chain, "A chain, step by step") if t in wanted]
    return {"t": wanted, "x": torch.stack([x for x, _ in kept], 1), "x0": torch.stack([x0 for _, x0 in kept], 1)}


def eta_and_steps(digits: Digits) -> dict[tuple[float, int], dict[str, Any]]:
    """(eta, steps) -> one digit of each class by DDIM, all from the same x_T, and two numbers about them."""
    y = classes(1)
    cells = [(eta, steps) for eta in (0.0, 0.4, 0.8) for steps in (1000, 100, 50, 10)]
    images = {
        (eta, steps): digits.sample(DDIMSampler(LINEAR, steps, eta=eta), y)
        for eta, steps in bar(cells, "DDIM, eta x steps")
    }
    return {
        (eta, steps): {
            "images": x,
            "share": digits.reader.share_read_as(x, y),
            "apart": data.rms(x - images[eta, 1000]),
        }
        for (eta, steps), x in images.items()
    }


def eta_one(digits: Digits) -> list[tuple[str, float, float]]:
    """How far DDIM at eta = 1 ends from DDPM on the same noise, 20 digits in 100 steps: (case, RMS, largest)."""
    y = classes(2)
    rows = []
    for case, dtype, clip, eps in (
        ("eps re-derived from the clipped x0", torch.float32, 1.0, "rederived"),
        ("the same in float64", torch.float64, 1.0, "rederived"),
        ("eps as the network gave it", torch.float32, 1.0, "raw"),
        ("the same, nothing clipped", torch.float32, None, "raw"),
    ):
        digits.denoiser[LINEAR].to(dtype)
        ddpm = digits.sample(DDPMSampler(LINEAR, 100, clip=clip), y)
        ddim = digits.sample(DDIMSampler(LINEAR, 100, clip=clip, eta=1.0, eps=eps), y)
        rows.append((case, data.rms(ddim - ddpm), (ddim - ddpm).abs().max().item()))
    digits.denoiser[LINEAR].float()
    return rows


def determinism(digits: Digits) -> dict[str, Any]:
    """From one x_T, two different seeds for the noise of the steps: equal images at eta = 0, others above."""
    y = classes(2)
    x_T = fastdiff.normal((len(y), *model.IMAGE_SHAPE), SEED)
    ends = {
        eta: [digits.sample(DDIMSampler(LINEAR, 50, eta=eta), y, x_T=x_T, seeds=seed) for seed in (1, 2)]
        for eta in (0.0, 0.8)
    }
    return {"equal": torch.equal(*ends[0.0]), "apart": data.rms(ends[0.8][0] - ends[0.8][1])}


def inversion(digits: Digits) -> dict[str, Any]:
    """Real digits to x_T and back, by steps; and digits decoded between two inverted ones."""
    first = torch.stack([(digits.y_real == c).nonzero()[0, 0] for c in range(10)])
    x, y = digits.x_real[first], torch.full((10,), model.NULL_LABEL)
    told = {"y": y}
    rows = []
    for steps in bar((10, 20, 50, 100, 200, 500), "Inversion and reconstruction"):
        sampler = DDIMSampler(LINEAR, steps, clip=None)
        x_T = sampler.invert(digits.denoiser[LINEAR], x, model_kwargs=told)
        back = digits.sample(sampler, y, x_T=x_T)
        rows.append((steps, x_T, back, data.rms(back - x)))
    sampler, x_T = DDIMSampler(LINEAR, 100), rows[3][1]
    between = []
    for a, b in ((0, 6), (1, 7), (3, 8)):
        states = [fastdiff.slerp(x_T[a : a + 1], x_T[b : b + 1], i / 10) for i in range(11)]
        between.append(digits.sample(sampler, y[:1].expand(11), x_T=torch.cat(states)))
    return {"real": x, "rows": rows, "between": torch.cat(between)}


def collapse(digits: Digits) -> dict[str, Any]:
    """DDPM with and without its noise: 20 digits of each class."""
    y = classes(20)
    ends = {noise: digits.sample(DDPMSampler(LINEAR, 50, noise=noise), y) for noise in (True, False)}
    return {
        "images": {noise: x[:30] for noise, x in ends.items()},
        "spread": {noise: data.spread(x, y) for noise, x in ends.items()},
        "real": data.spread(digits.x_real, digits.y_real),
    }


def skipping(digits: Digits) -> list[dict[str, Any]]:
    """DDPM in 50 steps without the first part of the chain, begun from pure noise all the same."""
    y = classes(20)
    cases = [(schedule, skip) for schedule in (LINEAR, COSINE) for skip in (0.0, 0.2, 0.4, 0.6)]
    rows = []
    for schedule, skip in bar(cases, "Skipping the first part"):
        sampler = DDPMSampler(schedule, 50, start=skip or None)
        x = digits.sample(sampler, y)
        rows.append(
            {
                "schedule": schedule.name,
                "skip": skip,
                "signal": float(schedule.alphas_cumprod[sampler.timesteps[0]]) ** 0.5,
                "share": digits.reader.share_read_as(x, y),
                "distance": data.frechet_distance(x, digits.x_train),
                "spread": data.spread(x, y),
                "images": x[:20],
            }
        )
    return rows


# Putting it together


@dataclass
class Results:
    """Everything that the page shows."""

    environment: str
    held_out: float
    comparisons: list[Comparison]
    alone: list[dict[str, Any]]
    trajectory: dict[str, Any]
    grid: dict[tuple[float, int], dict[str, Any]]
    eta_one: list[tuple[str, float, float]]
    determinism: dict[str, Any]
    inversion: dict[str, Any]
    collapse: dict[str, Any]
    skipping: list[dict[str, Any]]
    seconds: float


def environment() -> str:
    reason = fastdiff.native.why_not()
    backend = "native kernels" if reason is None else "no native kernels"
    return (
        f"fastdiff {fastdiff.__version__} ({backend}), torch {torch.__version__}, Python "
        f"{platform.python_version()}, {processor()}, {torch.get_num_threads()} thread(s)"
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(per_class: int) -> Results:
    """Do everything, printing each part as it is done."""
    begin, where = time.perf_counter(), environment()
    print(f"{where}\n")
    digits = Digits()
    held_out = digits.reader.share_read_as(digits.x_real, digits.y_real)
    print(
        f"A classifier trained on {len(digits.x_train):,} real digits reads {held_out:.1%} of "
        f"{len(digits.x_real)} others right. It now reads {10 * per_class} samples of each chain:\n"
    )
    comparisons = compare(digits, per_class)
    print_comparisons(comparisons)
    alone = step_alone()
    print("\nThe step alone, repeated, microseconds (plain with torch.randn where it adds noise):")
    for row in alone:
        shape = "x".join(map(str, row["shape"]))
        plain_time, fused_time = row["plain"] * 1e6, row["fused"] * 1e6
        print(
            f"  {row['name']}  {shape:<12} plain {plain_time:9.1f}   fused {fused_time:9.1f}"
            f"   {plain_time / fused_time:5.2f} times"
        )
    results = Results(
        where,
        held_out,
        comparisons,
        alone,
        trajectory(digits),
        eta_and_steps(digits),
        eta_one(digits),
        determinism(digits),
        inversion(digits),
        collapse(digits),
        skipping(digits),
        0.0,
    )
    print_claims(results)
    results.seconds = time.perf_counter() - begin
    return results


def print_comparisons(comparisons: list[Comparison]) -> None:
    print(
        "                        time in all, s    one step in the chain, us            plain+randn  same   read as\n"
        "sampler         steps   plain   fused    plain  its torch.randn   fused         / fused     bits   asked"
    )
    for c in comparisons:
        draw = f"{c.plain_noise * 1e6:.0f}" if c.plain_noise else "-"
        print(
            f"{c.name:<15} {c.steps:5d}  {c.plain_all:6.2f}  {c.fused_all:6.2f}   {c.plain_step * 1e6:6.0f}  "
            f"{draw:>15}  {c.fused_step * 1e6:6.0f}  {c.ratio:16.2f}     {'yes' if c.equal else 'NO':<4} {c.share:7.1%}"
        )
    print(
        "(The fused step makes its noise itself. The plain step was given that noise ready-made; what its own\n"
        "torch.randn takes was measured beside it. Right after a run of the network the caches are cold.)"
    )


def print_claims(results: Results) -> None:
    print("\nDDIM at eta = 1 is DDPM (100 steps, same noise): difference of the images, RMS and largest")
    for case, typical, largest in results.eta_one:
        print(f"  {case:<36} {typical:.1e}   {largest:.1e}")
    print("\nDDIM at eta = 0 depends on x_T alone: two runs with different seeds")
    print(f"  eta = 0:    torch.equal {results.determinism['equal']}")
    print(f"  eta = 0.8:  RMS difference {results.determinism['apart']:.2f}")
    print("\nDDIM from one x_T in fewer steps, eta = 0: RMS difference from the images of 1000 steps")
    apart = [f"{steps} steps {results.grid[0.0, steps]['apart']:.3f}" for steps in (10, 50, 100)]
    print(f"  {', '.join(apart)}")
    print("\nReal digits to x_T and back: RMS error")
    errors = [f"{steps} steps {error:.4f}" for steps, _, _, error in results.inversion["rows"]]
    print(f"  {', '.join(errors)}")
    spread = results.collapse["spread"]
    print("\nDDPM without its noise collapses: mean distance between two digits of a class")
    print(f"  real {results.collapse['real']:.2f}, with noise {spread[True]:.2f}, without {spread[False]:.2f}")
    print("\nSkipping the first part of the chain (DDPM, 50 steps when whole), 200 digits")
    print("  schedule  skipped  signal left at the start  read as asked  Frechet distance of pixels  spread")
    for row in results.skipping:
        print(
            f"  {row['schedule']:<8}  {row['skip']:7.0%}  {row['signal']:24.3f}  {row['share']:13.1%}"
            f"  {row['distance']:26.2f}  {row['spread']:6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--per-class", type=arguments.positive, default=5, help="samples of each class in the first table (5)"
    )
    parser.add_argument(
        "--threads", type=arguments.positive, default=1, help="threads of torch (1: the network is small)"
    )
    parser.add_argument("--page", type=Path, default=Path(__file__).resolve().parents[2] / "build" / "digits.html")
    options = parser.parse_args()
    arguments.require_writable(parser, "--page", options.page)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(SEED)
    results = run(options.per_class)
    options.page.write_text(page.build(results), encoding="utf-8")
    print(f"\n{results.seconds:.0f} s. Pictures and numbers: {options.page}")


if __name__ == "__main__":
    main()
