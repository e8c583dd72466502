"""How long a step takes inside another codebase, by its own code and by fastdiff's, in the same process.

    python -m pytest benchmarks/bench_integrations.py

One thread. Both get the same tensors and generators; before they are timed, their results are compared in every bit,
but for noise of the contract, which has other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastdiff

SHAPES = {"action": (1, 16, 2), "latent": (1, 4, 64, 64), "image": (8, 3, 256, 256)}
PROVIDERS = ("host", "fastdiff", "philox")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    benchmark.extra_info = {"codebase": "diffusers", "sampler": sampler, "shape": shape, "provider": provider}
    benchmark(diffusers_step(sampler, SHAPES[shape], provider))


@pytest.mark.parametrize("provider", ["host", "fastdiff"])
def test_diffusers_set_timesteps(benchmark: Any, provider: str) -> None:
    stepped = scheduler("DDIMScheduler", provider)
    benchmark.group = "diffusers set_timesteps"
    benchmark.extra_info = {"codebase": "diffusers", "provider": provider}
    benchmark(stepped.set_timesteps, 50)
