"""Statistics of the noise over many values: moments, distribution, tails, neighbours.

    python benchmarks/noise_statistics.py --elements 1e9 --json benchmarks/results/noise_statistics.json

The values are those of `fastdiff.noise.normal` for the int seeds 0, 1, ..., so the same options give the same counts
anywhere. The tests do the like with ten million values (tests/test_noise.py); this is for what needs more. A score is
in standard deviations: what chance makes of it is normal with variance 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy import special, stats

import fastdiff
from fastdiff import native, noise, ops  # ops declares the native operators

assert ops

SAMPLE = 10**6  # elements of a sample, which is drawn and counted at once
SIGMAS = (3, 4, 5, 6)
BINS = 2**20  # of equal probability, for Kolmogorov-Smirnov
GROUP = 8  # neighbours that are correlated with each other: two Philox counters


@dataclass
class Counts:
    """Sums over values."""

    elements: int
    powers: np.ndarray  # float64 [4]: sums of z, z^2, z^3, z^4
    beyond: np.ndarray  # int64 [2, len(SIGMAS)]: values below -sigma, above sigma
    histogram: np.ndarray  # int64 [BINS]
    products: np.ndarray  # float64 [2*GROUP, 2*GROUP]: z and (z^2 - 1)/sqrt(2) of each place in a group
    largest: float  # |z|

    def add(self, other: Counts) -> None:
        self.elements += other.elements
        self.powers += other.powers
        self.beyond += other.beyond
        self.histogram += other.histogram
        self.products += other.products
        self.largest = max(self.largest, other.largest)


def count(seed: torch.Tensor, elements: int) -> Counts:
    """The counts of one sample; seed: int64 [1]."""
    z = noise.normal((1, elements), seed)[0].double().numpy()
    square = z * z
    bins = np.minimum((special.ndtr(z) * BINS).astype(np.int64), BINS - 1)
    whole = elements // GROUP * GROUP
    features = np.stack([z[:whole], (square[:whole] - 1) / 2**0.5]).reshape(2, -1, GROUP).transpose(0, 2, 1)
    features = np.ascontiguousarray(features).reshape(2 * GROUP, -1)
    return Counts(
        elements=elements,
        powers=np.array([z.sum(), square.sum(), (square * z).sum(), (square * square).sum()]),
        beyond=np.array([[(z < -sigma).sum() for sigma in SIGMAS], [(z > sigma).sum() for sigma in SIGMAS]]),
        histogram=np.bincount(bins, minlength=BINS),
        products=features @ features.T,
        largest=float(np.abs(z).max()),
    )


def samples(elements: int, seeds: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The seed and the size of each sample: `elements` values shared out among the int seeds 0 to seeds - 1."""
    per_seed = elements // seeds
    for seed in range(seeds):
        batch = -(-per_seed // SAMPLE)
        for b, one in enumerate(noise.seeds(seed, batch).split(1)):
            yield one, min(SAMPLE, per_seed - b * SAMPLE)


def draw(elements: int, seeds: int, threads: int) -> Counts:
    total = Counts(
        0, np.zeros(4), np.zeros((2, len(SIGMAS)), int), np.zeros(BINS, int), np.zeros((2 * GROUP,) * 2), 0.0
    )
    pending: list = []
    with ThreadPoolExecutor(threads) as pool:
        for job in samples(elements, seeds):
            pending.append(pool.submit(count, *job))
            if len(pending) > 2 * threads:  # added in order, so that sums are the same in every run
                total.add(pending.pop(0).result())
        for future in pending:
            total.add(future.result())
    return total


def summary(c: Counts) -> dict:
    """What the counts say, as plain numbers."""
    n = c.elements
    s1, s2, s3, s4 = c.powers
    # Hermite polynomials of normal values are uncorrelated and have the variances 1, 2, 6, 24
    hermite = np.array([s1, s2 - n, s3 - 3 * s1, s4 - 6 * s2 + 3 * n])
    moments = {
        str(k + 1): {"mean": c.powers[k] / n, "expected": expected, "score": score}
        for k, (expected, score) in enumerate(
            zip((0, 1, 0, 3), hermite / np.sqrt(np.array([1, 2, 6, 24]) * n), strict=True)
        )
    }

    tails = {}
    for k, sigma in enumerate(SIGMAS):
        below, above = (int(side) for side in c.beyond[:, k])
        expected = 2 * n * float(special.ndtr(-sigma))
        tails[str(sigma)] = {
            "below": below,
            "above": above,
            "count": below + above,
            "expected": expected,
            "score": (below + above - expected) / expected**0.5,
        }

    distance = float(np.abs(np.cumsum(c.histogram) / n - np.arange(1, BINS + 1) / BINS).max())
    coarse = c.histogram.reshape(1024, -1).sum(1)

    places = np.arange(2 * GROUP) % GROUP
    scores = (c.products / (n // GROUP) ** 0.5)[places[:, None] < places[None, :]]
    largest = float(np.abs(scores).max())
    return {
        "moments": moments,
        "beyond_sigma": tails,
        "largest": {"value": c.largest, "possible": (66 * np.log(2)) ** 0.5},
        "kolmogorov_smirnov": {"distance": distance, "p": float(stats.kstwobign.sf(distance * n**0.5))},
        "chi_square_of_1024_bins": {"p": float(stats.chisquare(coarse).pvalue)},
        "correlation_of_neighbours": {
            "what": f"z and z^2 of the places in groups of {GROUP}, all pairs of two places",
            "scores": scores.size,
            "largest_score": largest,
            "p_of_largest": float(-np.expm1(scores.size * np.log1p(-2 * special.ndtr(-largest)))),
            "p_of_sum_of_squares": float(stats.chi2.sf(np.square(scores).sum(), scores.size)),
        },
    }


def conditions() -> dict:
    isa = "reference"
    if native.available():
        isa = ("base", "x86-64-v3", "x86-64-v4")[torch.ops.fastdiff.cpu_isa(-1)]
    return {
        "stream_version": noise.STREAM_VERSION,
        "instruction_set": isa,
        "machine": platform.machine(),
        "fastdiff": fastdiff.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


def report(result: dict) -> str:
    lines = [f"{result['elements']:,} values of {result['seeds']} seeds in {result['seconds']:.0f} s"]
    for k, m in result["moments"].items():
        lines.append(f"mean of z^{k}        {m['mean']:+.6f}   expected {m['expected']}   score {m['score']:+.2f}")
    for sigma, t in result["beyond_sigma"].items():
        lines.append(
            f"beyond {sigma} sigma     {t['count']:>9,}   expected {t['expected']:,.1f}   score {t['score']:+.2f}"
        )
    ks, neighbours = result["kolmogorov_smirnov"], result["correlation_of_neighbours"]
    lines += [
        f"largest |z|        {result['largest']['value']:.4f}      possible {result['largest']['possible']:.4f}",
        f"Kolmogorov-Smirnov {ks['distance']:.2e}   p = {ks['p']:.3f}",
        f"chi-square         p = {result['chi_square_of_1024_bins']['p']:.3f}",
        f"neighbours         {neighbours['scores']} correlations, largest score {neighbours['largest_score']:.2f},"
        f" p = {neighbours['p_of_largest']:.3f}; sum of squares, p = {neighbours['p_of_sum_of_squares']:.3f}",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--elements", type=float, default=1e8, help="how many values, in all")
    parser.add_argument("--seeds", type=int, default=100, help="how many int seeds they are shared out among")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="how many samples at a time")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.threads < 1 or options.elements // options.seeds < GROUP:
        parser.error(f"expected at least one seed and thread, and {GROUP} elements per seed")

    torch.set_num_threads(1)
    began = time.perf_counter()
    counts = draw(int(options.elements), options.seeds, options.threads)
    result = {"elements": counts.elements, "seeds": options.seeds}
    result |= {"seconds": round(time.perf_counter() - began, 1), "threads": options.threads}
    result |= summary(counts) | {"conditions": conditions()}
    print(report(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
