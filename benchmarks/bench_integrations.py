"""How long a step takes inside another codebase, by its own code and by fastdiff's, in the same process.

    python -m pytest benchmarks/bench_integrations.py

One thread. Both get the same tensors and generators; before they are timed, their results are compared in every bit,
but for noise of the contract, which has other numbers. Whole runs are those of the scripts in examples/hosts, in
seconds of the processor, which other work on the machine changes less.
"""

from __future__ import annotations

import importlib.util
import math
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from machine import threads

import fastdiff

SHAPES = {"action": (1, 16, 2), "latent": (1, 4, 64, 64), "image": (8, 3, 256, 256)}
EXAMPLES = Path(__file__).parents[1] / "examples" / "hosts"
RUNS = sorted(path.stem for path in EXAMPLES.glob("with_*.py"))
TESTS = Path(__file__).parents[1] / "tests"
PART = {"part": "integration", "threads": 1, "device": "cpu", "dtype": "float32"}
PROVIDERS = ("host", "fastdiff", "philox")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def scheduler(name: str, provider: str) -> Any:
    diffusers = pytest.importorskip("diffusers")
    found = getattr(diffusers, name)()
    if provider != "host":
        fastdiff.enable(found, noise="philox" if provider == "philox" else "torch")
    found.set_timesteps(50)
    return found


DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_eta": ("DDIMScheduler", {"eta": 1.0}),
    "ddpm": ("DDPMScheduler", {}),
}


def diffusers_step(sampler: str, shape: tuple[int, ...], provider: str) -> Callable[[], Any]:
    name, options = DIFFUSERS[sampler]
    stepped = scheduler(name, provider)
    torch.manual_seed(0)
    x, model_output = torch.randn(shape), torch.randn(shape)
    t = stepped.timesteps[25]
    return lambda: stepped.step(model_output, t, x, **options).prev_sample


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampler", DIFFUSERS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_diffusers_step(benchmark: Any, sampler: str, shape: str, provider: str) -> None:
    if provider == "philox" and sampler == "ddim":
        pytest.skip("a step without noise")
    if provider == "fastdiff":
        results = []
        for one in ("host", "fastdiff"):
            step = diffusers_step(sampler, SHAPES[shape], one)
            torch.manual_seed(1)
            results.append(step())
        assert torch.equal(*results)
    benchmark.group = f"diffusers {sampler} {shape}"
    benchmark.extra_info |= PART | {"case": f"diffusers-{sampler}-{shape}", "provider": provider}
    benchmark.extra_info |= {"sampler": sampler, "shape": list(SHAPES[shape]), "elements": math.prod(SHAPES[shape])}
    benchmark(diffusers_step(sampler, SHAPES[shape], provider))


@pytest.mark.parametrize("provider", ["host", "fastdiff"])
def test_diffusers_set_timesteps(benchmark: Any, provider: str) -> None:
    stepped = scheduler("DDIMScheduler", provider)
    benchmark.group = "diffusers set_timesteps"
    benchmark.extra_info |= PART | {"case": "diffusers-set_timesteps", "provider": provider}
    benchmark(stepped.set_timesteps, 50)


def example(name: str) -> tuple[torch.nn.Module, Callable[[], Any], Callable[[], Any]]:
    """The network, the usual run and the run with fastdiff of a script in examples/hosts."""
    found: list[Any] = []
    with mock.patch.object(sys, "path", [str(EXAMPLES), str(TESTS), *sys.path]):
        if name == "with_lucidrains":
            if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
                pytest.skip("denoising-diffusion-pytorch is not installed")
            importlib.import_module("lucidrains_host")  # its import may need stand-ins
        common = importlib.import_module("common")
        with mock.patch.object(common, "compare", lambda *compared: found.extend(compared)):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    network, usual, ours = found
    return network, usual, ours


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("provider", ["host", "fastdiff"])
def test_whole_run(benchmark: Any, name: str, provider: str) -> None:
    """All of a run, and, in extra_info, the seconds of it that are not the network's, at the median."""
    if name == "with_diffusers":
        pytest.importorskip("diffusers")
    network, *runs = example(name)
    inside: list[float] = []
    outside: list[float] = []
    network.register_forward_pre_hook(lambda *_: inside.append(-time.process_time()))
    network.register_forward_hook(lambda *_: inside.append(time.process_time()))
    images = []
    for run in runs:
        torch.manual_seed(1)
        images.append(run())
    assert torch.equal(*images)
    run, calls = runs[provider == "fastdiff"], 0

    def timed() -> None:
        nonlocal calls
        inside.clear()
        start = time.process_time()
        run()
        outside.append(time.process_time() - start - sum(inside))
        calls = len(inside) // 2

    benchmark.group = f"whole run {name}"
    benchmark.pedantic(timed, rounds=15, warmup_rounds=2)
    benchmark.extra_info |= PART | {
        "case": f"run-{name.removeprefix('with_')}",
        "provider": provider,
        "shape": list(images[0].shape),
        "steps": calls,
    }
    if benchmark.stats is not None:
        benchmark.extra_info["outside_network"] = statistics.median(outside[2:])
