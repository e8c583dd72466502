"""What it takes to differentiate a chain of 50 steps through a small network: time, and memory at the peak.

    make bench
    python -m pytest benchmarks/bench_chain_memory.py

Peaks are what torch's allocator has handed out and not taken back (as in tests/test_memory.py), parameters and their
gradients apart. `bound` of "checkpoint" is what it is held to: its states and one step differentiated alone.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.backprop import Inversion
from fastdiff.samplers import DDIMSampler
from fastdiff.schedules import NoiseSchedule

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_memory import peak  # noqa: E402

SCHEDULE = NoiseSchedule.linear(1000)
STEPS, SHAPE, WIDTH = 50, (4, 3, 64, 64), 16
STATE = 4 * math.prod(SHAPE)
MODES = {
    "full": {"grad": "full"},
    "full_last_5": {"grad": "full", "grad_steps": 5},
    "checkpoint": {"grad": "checkpoint"},
    "inversion": {"grad": Inversion(iterations=5, tolerance=1e-3)},
}


class Network(nn.Module):
    """Three convolutions and the time, weak enough for an inversion to converge."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        widths = (SHAPE[1], WIDTH, WIDTH, SHAPE[1])
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        enter, between, leave = self.layers
        h = torch.nn.functional.silu(enter(x) + t.reshape(-1, 1, 1, 1) / SCHEDULE.num_timesteps)
        result: Tensor = leave(torch.nn.functional.silu(between(h)))
        return result


def train(network: nn.Module, sampler: DDIMSampler, options: dict[str, Any]) -> None:
    x = sampler.sample(network, SHAPE, seeds=7, **options)
    x.backward(torch.ones_like(x))


@pytest.mark.benchmark(min_rounds=3, max_time=1.0, warmup=False, disable_gc=True)
@pytest.mark.parametrize("mode", MODES)
def test_chain_memory(benchmark, mode: str) -> None:
    benchmark.group = "chain memory"
    sampler, one = DDIMSampler(SCHEDULE, STEPS, clip=None), DDIMSampler(SCHEDULE, [500], clip=None)
    network, options = Network(), MODES[mode]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    alone = peak(lambda: train(network, one, {"grad": "full"}))
    found = peak(lambda: train(network, sampler, options))
    bound = STEPS * STATE + alone
    assert mode != "checkpoint" or found <= 1.1 * bound
    benchmark(train, network, sampler, options)
    benchmark.extra_info |= {"part": "memory", "case": f"chain-{STEPS}", "provider": mode}
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "device": "cpu", "sampler": "ddim", "steps": STEPS}
    benchmark.extra_info |= {"shape": list(SHAPE), "elements": math.prod(SHAPE), "dtype": "float32"}
    benchmark.extra_info |= {"state_bytes": STATE, "step_bytes": alone, "peak_bytes": found, "bound_bytes": bound}
    grad = options["grad"]
    if isinstance(grad, Inversion):
        benchmark.extra_info["error"] = grad.error
