"""Train the network of the forecast on one CPU core, in a few seconds.

    python examples/forecast/train.py
    python examples/forecast/train.py --validate

Everything is seeded and runs on one thread: on the same processor and the same torch the weights come out bit for bit
the same. --validate writes nothing: it leaves eight training years out in turn, trains on the others, and scores the
forecasts of those eight. The sizes and the number of updates were chosen by that; the test years were not looked at.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "digits"))

import arguments  # noqa: E402
import denoiser  # noqa: E402
from scores import coverage, crps  # noqa: E402
from series import Series  # noqa: E402

import fastdiff  # noqa: E402

FOLDS = [range(1958, 1966), range(1970, 1978), range(1979, 1987), range(1988, 1996)]


def train(series: Series, updates: int, batch: int = 256, seed: int = 0, rate: float = 2e-3) -> denoiser.Denoiser:
    """The moving average of the weights over so many updates of AdamW by the squared error of eps."""
    torch.manual_seed(seed)
    known = series.training_windows()
    target, condition = known.target, known.condition
    network = denoiser.Denoiser()
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.05)
    for update in range(updates):
        chosen, t = torch.randint(len(target), (batch,)), torch.randint(denoiser.STEPS, (batch,))
        x_t, eps = fastdiff.add_noise(target[chosen], t, denoiser.SCHEDULE, seeds=update, target="noise")
        loss = (network(x_t, t, condition[chosen]) - eps).square().mean()
        rise, fall = min(1.0, (update + 1) / 200), (1 + math.cos(math.pi * update / updates)) / 2
        optimizer.param_groups[0]["lr"] = rate * rise * fall
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (update + 1) / (update + 10))
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    return average.eval()


def validate(updates: int) -> None:
    """Print what the forecasts of years left out are worth, beside those without a network."""
    print(f"{'CRPS (degrees C)':<20}{'network':>10}{'damped':>10}{'climatology':>13}{'persistence':>13}{'in 90 %':>10}")
    totals = torch.zeros(4)
    for fold in FOLDS:
        series = Series(fold)
        windows = series.windows(fold)
        truth, start = series.truth(windows.start), windows.start
        ensemble = denoiser.forecast(train(series, updates), windows.condition, 64, seed=1)
        members = [series.to_celsius(ensemble, start)]
        members += [of(start) for of in (series.damped_persistence, series.climatology, series.persistence)]
        found = torch.tensor([crps(m, truth).mean().item() for m in members])
        totals += found / len(FOLDS)
        inside = coverage(members[0], truth, 0.9)
        print(f"{fold[0]} to {fold[-1]}" + "{:>16.3f}{:>10.3f}{:>13.3f}{:>13.3f}".format(*found.tolist()), end="")
        print(f"{inside:>9.0%}")
    print("all" + "{:>27.3f}{:>10.3f}{:>13.3f}{:>13.3f}".format(*totals.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=arguments.positive, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=denoiser.WEIGHTS)
    parser.add_argument("--validate", action="store_true", help="score years left out, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.validate:
        validate(options.updates)
        return
    arguments.require_writable(parser, "--out", options.out)
    begin = time.perf_counter()
    network = train(Series(), options.updates, seed=options.seed)
    denoiser.save(network, options.out)
    size = options.out.stat().st_size / 1000
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"{count:,} parameters, {time.perf_counter() - begin:.1f} s: wrote {options.out} ({size:.0f} kB)")


if __name__ == "__main__":
    main()
