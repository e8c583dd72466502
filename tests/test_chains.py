"""The checks of benchmarks/bench_chain.py: what is timed there is right, and what is not is refused."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_chain  # noqa: E402
from bench_chain import Case  # noqa: E402
from bench_growth import BENCHMARKS  # noqa: E402

DDPM, DDIM = (Case("policy", (1, 16, 2), sampler, 10) for sampler in ("ddpm", "ddim"))


@pytest.fixture
def network():
    with torch.no_grad():
        yield bench_chain.make_network("policy", (1, 16, 2), "cpu")
    for cached in (bench_chain.on_torchs_noise, bench_chain.by_reference):
        cached.cache_clear()


@pytest.mark.parametrize("case", [DDPM, DDIM], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("provider", ["fastdiff", "fastdiff_step", "plain"])
def test_the_chains_agree(network, case, provider) -> None:
    bench_chain.check(case, network, provider)


@pytest.mark.parametrize("provider", ["fastdiff", "plain"])
def test_another_chain_is_refused(network, monkeypatch, provider) -> None:
    make = bench_chain.PROVIDERS[provider]
    monkeypatch.setitem(
        bench_chain.PROVIDERS, provider, lambda *given, **noise: lambda: make(*given, **noise)() + 0.001
    )
    with pytest.raises(AssertionError, match="not close"):
        bench_chain.check(DDPM, network, provider)


def test_other_bits_of_the_seeds_noise_are_refused(network, monkeypatch) -> None:
    def chain(case, network, generator=None):
        found = bench_chain.fastdiff(case, network, generator)
        return found if generator is not None else lambda: torch.nextafter(found(), torch.tensor(2.0))

    monkeypatch.setitem(bench_chain.PROVIDERS, "fastdiff", chain)
    with pytest.raises(AssertionError):
        bench_chain.check(DDPM, network, "fastdiff")


@pytest.mark.parametrize("spread", [1.0, 0.95])
def test_noise_that_is_drawn_inside_is_held_to_its_variance(network, spread) -> None:
    case = Case("policy", (1, 16, 2), "ddpm", 100)
    sampler = case.make_sampler()
    table = torch.tensor([[float(row + 1 < len(sampler))] for row in range(len(sampler))])

    def step(x, t, s):
        row = sampler.timesteps.index(int(t[0]))
        mean = sampler.step(network(x, t), None, x, row=row, noise=torch.zeros_like(x))
        return mean + spread * s * torch.randn_like(x)

    if spread == 1:
        bench_chain.check_noise_inside(case, network, step, table, 0 * table)
    else:
        with pytest.raises(AssertionError, match="variance"):
            bench_chain.check_noise_inside(case, network, step, table, 0 * table)


def test_the_names_are_unique() -> None:
    names = [(case.name, provider) for case, providers in bench_chain.BENCHMARKS for provider in providers]
    assert len(set(names)) == len(names)


def test_the_points_of_a_line_are_apart() -> None:
    names = [(point.name, provider) for line, providers in BENCHMARKS for point in line for provider in providers]
    assert len(set(names)) == len(names)
    assert all(len({point.value for point in line}) == len(line) for line, _ in BENCHMARKS)
