"""What the benchmarks stand on: their counting, their checks, their names and what is written beside the times."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_noise  # noqa: E402
import bench_step  # noqa: E402
import counting  # noqa: E402
import machine  # noqa: E402
import peers  # noqa: E402

SHAPE = (2, 3, 8, 8)


def providers_of(sampler: str) -> set[str]:
    return {provider for case, names in bench_step.BENCHMARKS if case.sampler == sampler for provider in names}


def step_of(case: bench_step.Case, provider: str) -> tuple[peers.Step, peers.Data]:
    data = bench_step.make_data(case)[0]
    made = bench_step.PROVIDERS[provider](case, data)
    assert not isinstance(made, peers.Made)
    return made, data


def off(step: peers.Step, least: bool) -> tuple[torch.Tensor, ...]:
    """The results with one element changed: in its last bit, or by what no rounding explains."""
    results = peers.results_of(step)
    last = results[-1].view(-1)
    last[-1] = torch.nextafter(last[-1], torch.tensor(9.0)) if least else last[-1] + 1e-3
    return results


def test_counting_of_a_step_done_by_hand():
    x, m, table = torch.ones(4, 8), torch.ones(4, 8), torch.ones(100)
    out = torch.empty_like(x)

    def step() -> None:
        c = table[3].item()  # a view, and a read
        torch.mul(x, c, out=out)  # x and out
        out.add_(m)  # out, m and out again
        out.add_(table[:1].expand(4, 8))  # out and out; the operand is one number
        out.copy_(torch.empty_like(x).normal_())  # the normals written, then read; out
        table[:1] + 1

    size = x.nbytes
    found = counting.operations(step, x.numel())
    assert found == {"launches": 5, "small_operations": 1, "reads": 1, "moved_bytes": (2 + 3 + 2 + 3) * size + 4}
    # two new tensors; the one that is given back counts once
    added = counting.allocations(lambda: x.add(m)[:2].add(m[:2]), "cpu")
    assert added == {"allocations": 2, "allocated_bytes": size + size // 2}


@pytest.mark.parametrize(
    ("sampler", "provider", "counts"),
    [
        ("ddpm", "fastdiff", (1, 12, 0)),
        ("ddpm", "fastdiff_inplace", (1, 12, 0)),
        ("ddpm", "fastdiff_new", (1, 12, 1)),
        ("guidance", "fastdiff", (1, 16, 0)),
        ("learned_range", "fastdiff", (1, 16, 0)),
        ("x0", "fastdiff", (1, 16, 1)),
        ("ddpm", "plain", (7, 64, 0)),
        ("ddim", "plain", (5, 48, 0)),
        ("learned_range", "plain", (9, 84, 0)),
        ("ddpm", "improved_diffusion", (13, 112, 13)),
    ],
)
def test_operations_and_bytes_of_a_step(sampler, provider, counts):
    """Full-size operations, bytes for an element and full-size allocations of a call."""
    case = bench_step.Case(sampler, (2, 3, 32, 32))
    step, _ = step_of(case, provider)
    step()
    found = counting.operations(step, case.elements)
    allocated = counting.allocations(step, "cpu")["allocated_bytes"] // (4 * case.elements)
    # what little is left are the numbers behind expanded tensors
    assert (found["launches"], round(found["moved_bytes"] / case.elements), allocated) == counts
    assert found["reads"] == 0


def test_a_model_output_of_another_dtype_is_cast_once():
    case = bench_step.Case("ddim", (2, 3, 32, 32), output_dtype=torch.bfloat16)
    for provider, bytes_of_float32 in (("plain", 48), ("plain_folded", 40)):
        step, data = step_of(case, provider)
        bench_step.check(case, provider, step, data)
        assert counting.operations(step, case.elements)["moved_bytes"] == (2 + 4 + bytes_of_float32) * case.elements


@pytest.mark.parametrize("sampler", bench_step.TABLES)
def test_providers_pass_their_checks_and_one_wrong_element_does_not(sampler):
    case = bench_step.Case(sampler, SHAPE)
    for provider in ("fastdiff", "plain", "host", "improved_diffusion"):
        if provider not in providers_of(sampler) or (provider == "host" and not importlib.util.find_spec("diffusers")):
            continue
        step, data = step_of(case, provider)
        found = bench_step.check(case, provider, step, data)
        assert found["error"] < 1e-5
        assert found.get("equal") is (True if provider == "fastdiff" else None)

        one_off = functools.partial(off, step_of(case, provider)[0], provider == "fastdiff")
        with pytest.raises(AssertionError):
            bench_step.check(case, provider, one_off, data)


@pytest.mark.parametrize("provider", ["fastdiff", "plain"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_of_a_large_batch_every_sample_is_compared(monkeypatch, sampler, provider):
    case = bench_step.Case(sampler, (3, 3, 8, 8))
    monkeypatch.setattr(bench_step, "CHECKED", 100)
    assert case.samples == [2]
    step, data = step_of(case, provider)
    bench_step.check(case, provider, step, data)

    def first_is_nan() -> tuple[torch.Tensor, ...]:
        results = peers.results_of(step)
        results[0][0, 0, 0, 0] = torch.nan
        return results

    with pytest.raises(AssertionError, match="sample 0" if provider == "fastdiff" else "not close"):
        bench_step.check(case, provider, first_is_nan, data)


@pytest.mark.parametrize("shape", [bench_step.ACTIONS, (2, 3, 32, 32)])
def test_hidden_noise_is_checked_by_its_moments(shape):
    case = bench_step.Case("ddpm", shape)
    step, data = step_of(case, "plain")
    coefficients = bench_step.TABLES["ddpm"].rows[case.row]
    mean = peers.results_of(bench_step.fused(case, data, z=torch.zeros_like(data.x)))[0]
    s = float(coefficients[bench_step.COLUMN["s"]])

    def with_noise(spread: float) -> peers.Made:
        return peers.Made(lambda: mean + s * spread * torch.randn_like(mean), lambda: mean)

    assert bench_step.check_hidden(case, with_noise(1.0), data)["error_without_noise"] < 1e-5
    for spread in (0.0, 0.95, 1.05):
        with pytest.raises(AssertionError, match="variance"):
            bench_step.check_hidden(case, with_noise(spread), data)
    with pytest.raises(AssertionError, match="not close"):
        bench_step.check_hidden(case, peers.Made(step, lambda: mean + 1e-3), data)


def test_names_are_unique():
    steps = [(case.name, provider) for case, names in bench_step.BENCHMARKS for provider in names]
    assert len(steps) == len(set(steps))
    # one case is one thing to compute
    cases = {replace(case, device="cpu") for case, _ in bench_step.BENCHMARKS}
    assert len(cases) == len({case.name for case in cases})
    normals = [(case.name, provider) for case, provider in bench_noise.BENCHMARKS]
    assert len(normals) == len(set(normals))


def test_calls_take_turns_over_tensors_that_no_cache_holds(monkeypatch):
    case = bench_step.Case("ddim", SHAPE)
    monkeypatch.setattr(bench_step, "last_level_cache", lambda device: case.bytes)
    assert bench_step.turns(case) == 1
    monkeypatch.setattr(bench_step, "last_level_cache", lambda device: case.bytes - 1)
    assert bench_step.turns(case) == 4
    bench_step._make_data.cache_clear()
    sets = bench_step.make_data(case)
    bench_step._make_data.cache_clear()
    assert len({data.x.data_ptr() for data in sets}) == 4
    assert all(torch.equal(data.x, sets[0].x) for data in sets)
    called = []
    step = bench_step.in_turn([lambda number=number: called.append(number) for number in range(4)])
    for _ in range(5):
        step()
    assert called == [0, 1, 2, 3, 0]


@pytest.fixture
def conftest():
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", BENCHMARKS / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Item:
    """As much of a test as the choice of a timer looks at."""

    def __init__(self, **options):
        self.markers = [pytest.mark.benchmark(**options)]

    def get_closest_marker(self, name):
        return self.markers[0].mark

    def add_marker(self, marker, append):
        self.markers.insert(len(self.markers) if append else 0, marker)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_the_timer_waits(conftest, device):
    items = [Item(min_rounds=9), Item(timer=len)]
    config = types.SimpleNamespace(getoption={"--device": device}.get)
    conftest.pytest_collection_modifyitems(config, items)
    waits = {"timer": conftest.synchronized} if device == "cuda" else {}
    chosen = [item.get_closest_marker("benchmark").kwargs for item in items]
    assert chosen == [{"min_rounds": 9} | waits, {"timer": len}]


def test_caches_that_the_system_names_without_a_size_are_left_out(tmp_path):
    for number, told in enumerate(({"level": "1", "type": "Data", "size": "32K"}, {"level": "2", "type": "Unified"})):
        (tmp_path / f"index{number}").mkdir()
        for name, text in told.items():
            (tmp_path / f"index{number}" / name).write_text(f"{text}\n")
    assert machine.caches(tmp_path) == {"L1 Data": "32K"}
    assert machine.caches(tmp_path / "nowhere") == {}


def test_what_is_written_beside_the_times(conftest):
    benchmarks = [
        {"extra_info": {"case": case, "provider": provider}, "stats": {"median": median}}
        for case, provider, median in (("a", "fastdiff", 4.0), ("a", "copy", 3.0), ("b", "fastdiff", 1.0))
    ]
    conftest.add_share_of_copy(benchmarks)
    assert [one["extra_info"].get("share_of_copy") for one in benchmarks] == [0.75, 1.0, None]
    assert conftest.version("torch") == torch.__version__
    assert conftest.version("a_package_that_nobody_made") is None
    for name, outcome, when in (
        ("x::t[1]", "passed", "setup"),
        ("x::t[1]", "passed", "call"),
        ("x::t[1]", "passed", "teardown"),
        ("x::t[2]", "failed", "call"),
        ("x::t[3]", "failed", "setup"),
        ("x::t[4]", "skipped", "call"),
    ):
        longrepr = ("x.py", 1, "Skipped: jax is not installed") if outcome == "skipped" else None
        conftest.pytest_runtest_logreport(pytest.TestReport(name, ("x.py", 1, name), {}, outcome, longrepr, when))
    whole = ("benchmarks/bench_x.py", 1, "Skipped: could not import 'statsmodels'")
    conftest.pytest_collectreport(pytest.CollectReport("benchmarks/bench_x.py", "skipped", whole, None))
    conftest.pytest_deselected([None, None])
    next(conftest.pytest_sessionfinish(pytest.ExitCode.INTERRUPTED))
    benchmarks[0]["options"] = {"timer": "process_time"}
    written = {"benchmarks": benchmarks}
    conftest.pytest_benchmark_update_json(None, None, written)
    skipped = {"t[4]": "jax is not installed", "benchmarks/bench_x.py": "could not import 'statsmodels'"}
    ended = {"exitstatus": 2, "deselected": 2}
    assert written["outcome"] == {"passed": 1, "failed": ["t[2]", "t[3]"], "skipped": skipped} | ended
    assert [one["extra_info"]["timer"] for one in benchmarks] == ["processor", "wall", "wall"]
