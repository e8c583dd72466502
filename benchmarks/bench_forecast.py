"""The chain of examples/forecast, by fastdiff and around diffusers' scheduler: 100 DDPM steps of a small network.

    make bench
    python -m pytest benchmarks/bench_forecast.py

One thread, in inference mode, the same weights and the same start for both; seconds of the processor, which other work
on the machine changes less. Before either is timed, both must end with the same bits from the same noise, and the
forecasts of all test years must beat climatology and persistence. Timed, each makes its own noise: fastdiff in the
step, diffusers by torch. `network_seconds` is the median of the network's calls of a chain alone, taken before each
round.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import threads

import fastdiff

pytest.importorskip("statsmodels")
pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "forecast"))

import denoiser  # noqa: E402
import forecast  # noqa: E402

ROUNDS = {1: 40, 64: 30}


@pytest.fixture(autouse=True)
def inference_on_one_thread() -> Iterator[None]:
    with threads(1), torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return denoiser.load()


@pytest.fixture(scope="module")
def found(network: torch.nn.Module) -> forecast.Evaluation:
    with torch.inference_mode():
        return forecast.evaluate(network)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("batch", ROUNDS)
@pytest.mark.parametrize("provider", ["fastdiff", "diffusers"])
def test_forecast(
    benchmark: Any, network: torch.nn.Module, found: forecast.Evaluation, provider: str, batch: int
) -> None:
    scores = {name: score.mean().item() for name, score in found.scores.items()}
    assert scores[forecast.NETWORK] < min(scores[forecast.CLIMATOLOGY], scores[forecast.PERSISTENCE])
    x, condition = forecast.chain(batch, found.windows)
    steps = forecast.scheduler()
    if steps is None and provider == "diffusers":
        pytest.skip("diffusers is not installed")
    if steps is not None:
        assert forecast.same_bits(network, x, condition)
    run, given = {
        "fastdiff": (forecast.with_fastdiff, (network, x, condition, fastdiff.seeds(forecast.SEED, batch))),
        "diffusers": (forecast.with_diffusers, (steps, network, x, condition)),
    }[provider]
    alone: list[float] = []

    def before() -> None:
        begin = time.process_time()
        forecast.network_alone(network, x, condition)
        alone.append(time.process_time() - begin)

    benchmark.group = f"forecast batch {batch}"
    benchmark.pedantic(run, given, setup=before, rounds=ROUNDS[batch], warmup_rounds=3)
    benchmark.extra_info |= {
        "part": "forecast",
        "case": f"forecast-{batch}",
        "provider": provider,
        "threads": 1,
        "device": "cpu",
        "shape": list(x.shape),
        "batch": batch,
        "steps": denoiser.STEPS,
        "crps": scores[forecast.NETWORK],
        "crps_climatology": scores[forecast.CLIMATOLOGY],
        "crps_persistence": scores[forecast.PERSISTENCE],
        "crps_damped_persistence": scores[forecast.DAMPED],
    }
    if benchmark.stats is not None:
        benchmark.extra_info["network_seconds"] = statistics.median(alone[3:])
