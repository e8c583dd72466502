"""The check of a run with and without fastdiff: what it finds, what it says, and what it leaves behind."""

import copy
import dataclasses
import functools
import inspect
import itertools
import json
import os
import pickle
import random
import re
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.check import CheckError, RunError, check, results, watch
from fastdiff.check.report import Report, Side, advice
from fastdiff.check.results import Comparison, compare, kept
from fastdiff.check.subjects import subject_of
from fastdiff.integrations import _host

SHAPE = (2, 3, 4, 4)


class Diffusion:
    """A stand-in with the names by which OpenAI's GaussianDiffusion is known: T steps of x - model/T + noise."""

    model_mean_type = model_var_type = p_mean_variance = q_sample = None

    def __init__(self, steps=6):
        self.betas = np.linspace(0.1, 0.2, steps)
        self.clock = None

    def p_sample(self, model, x, t, clip_denoised=True, cond_fn=None):
        if self.clock is not None:
            self.clock.spend(5)
        x = x - model(x, t) / len(self.betas) + torch.randn_like(x)
        if cond_fn is not None:
            x = x + cond_fn(x, t)
        return {"sample": x, "pred_xstart": x * 2}

    def ddim_sample(self, model, x, t, eta=0.0):
        return self.p_sample(model, x, t)

    def p_sample_loop(self, model, shape, **options):
        x = torch.randn(*shape)
        for t in reversed(range(len(self.betas))):
            with torch.no_grad():
                x = self.p_sample(model, x, t, **options)["sample"]
        return x


def fused(change=lambda self, x, t: x, ticks=1):
    """A mixin whose steps are those of the stand-in, then changed."""

    class Fused(_host.Switched):
        def p_sample(self, model, x, t, clip_denoised=True, cond_fn=None):
            if t in self.__dict__.get("refused", ()):
                self._fastdiff.fall_back("a timestep that is refused")
                return super().p_sample(model, x, t, clip_denoised, cond_fn)
            self._fastdiff.fused += 1
            self._fastdiff.tables[len(self._fastdiff.tables)] = t
            clock, self.clock = self.clock, None
            if clock is not None:
                clock.spend(ticks)
            out = super().p_sample(model, x, t, clip_denoised, cond_fn)
            self.clock = clock
            if self._fastdiff.options.noise == "philox":
                return {"sample": out["sample"] + 1}
            return out | {"sample": change(self, out["sample"], t)}

    return Fused


@pytest.fixture(autouse=True)
def without_repeats(monkeypatch):
    monkeypatch.setattr("fastdiff.check._ROUND", 0.0)


@pytest.fixture
def integrate(monkeypatch):
    """Makes a mixin the integration of the stand-in."""

    def use(mixin):
        module = types.ModuleType("fastdiff.integrations.openai")
        module.targets, module.mixin = (lambda obj: {"": obj}), (lambda target: mixin)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    use(fused())
    return use


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.scale * x


def loop(net, **options):
    return lambda diffusion: diffusion.p_sample_loop(net, SHAPE, **options)


def test_equal_runs(integrate):
    diffusion, net = Diffusion(), Net()
    before = dict(vars(diffusion)), dict(vars(net))
    report = check((diffusion, loop(net)), runs=2)
    assert report.status == 0 and report.comparison == Comparison(True, 0.0)
    assert (report.host, report.name, report.steps, report.starts) == ("openai", "Diffusion", 6, None)
    assert report.state == (list(SHAPE), "float32", "cpu")
    assert (report.fused, report.kept) == (6, {})
    assert len(report.without.runs) == len(report.enabled.runs) == 2
    text = str(report)
    assert "equal bit for bit" in text and "6 of 6 steps" in text and text.splitlines()[-1] == advice(report)
    assert type(diffusion) is Diffusion and (dict(vars(diffusion)), dict(vars(net))) == before


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_step_that_differs_is_found(integrate, step):
    integrate(fused(lambda self, x, t: x + 0.25 * (t == 6 - step)))
    report = check((Diffusion(), loop(Net())), runs=1)
    assert report.status == 1 and report.starts == step
    assert report.comparison.difference == pytest.approx(0.25, rel=0.7) and not report.comparison.bits
    assert f"from step {step} on" in str(report) and "Do not adopt" in advice(report)


def test_only_what_is_returned_differs(integrate):
    diffusion, net = Diffusion(), Net()

    def run(obj):
        return obj.p_sample_loop(net, SHAPE) + isinstance(obj, _host.Switched)

    report = check((diffusion, run), runs=1)
    assert report.starts is None and report.comparison.difference == pytest.approx(1)
    assert "after the last state that was seen" in str(report) and report.status == 1


def test_states_that_differ_behind_equal_results_are_told(integrate):
    integrate(fused(lambda self, x, t: x + (t == 3)))
    net = Net()

    def run(diffusion):
        return (diffusion.p_sample_loop(net, SHAPE) > 1e9).int()

    report = check((Diffusion(), run), runs=1)
    assert report.status == 0 and report.starts == 3
    assert "though the states differ from step 3 on" in str(report)


def test_what_falls_back_is_told_without_a_warning(integrate, recwarn):
    diffusion = Diffusion()
    diffusion.refused = (0, 1)
    report = check((diffusion, loop(Net())), runs=1)
    assert (report.fused, report.kept) == (4, {"a timestep that is refused": 2})
    assert "4 of 6 steps" in str(report) and "2: a timestep that is refused" in str(report)
    assert not recwarn.list
    diffusion.refused = range(6)
    report = check((diffusion, loop(Net())), runs=1)
    assert report.fused == 0 and advice(report) == "Nothing to gain here: every step was left to the original code."


def test_a_run_that_makes_an_object_of_its_own(integrate):
    report = check((Diffusion(), lambda diffusion: Diffusion().p_sample_loop(Net(), SHAPE)), runs=1)
    assert (report.steps, report.fused, report.without.steps, report.starts) == (6, 0, None, None)
    assert advice(report).startswith("What fastdiff gains cannot be said: it saw none of the object's steps")
    assert "fastdiff saw no step" in str(report) and "with fastdiff no step was seen" in str(report)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda obj: pickle.loads(pickle.dumps(obj))])
def test_runs_that_copy_the_object(integrate, copied):
    """The copy is measured like the object, and has the methods and the network that are its own."""
    diffusion, net = Diffusion(), Net()

    def run(obj):
        again = copied(obj)
        again.betas = again.betas[:4]
        network = copy.deepcopy(net)
        network.scale.data *= 2
        pickled = pickle.dumps(net)
        assert b"fastdiff" not in pickled and pickle.loads(pickled)(torch.ones(()), 0) == 0.5
        return again.p_sample_loop(network, SHAPE), obj.p_sample_loop(net, SHAPE)

    report = check((diffusion, run, net), runs=1)
    pickled = type(copied(fastdiff.enable(Diffusion()))) is Diffusion
    assert report.varies is None and report.status == 0 and report.steps == 10 and report.fused == 10 - 4 * pickled
    assert report.kept == {} and report.without.network > 0
    assert "p_sample" not in vars(diffusion) and Diffusion.p_sample.__closure__ is None


def test_a_copy_that_outlives_its_run_is_counted(integrate):
    copies, net = {}, Net()

    def run(obj):
        return copies.setdefault(isinstance(obj, _host.Switched), copy.deepcopy(obj)).p_sample_loop(net, SHAPE)

    report = check((Diffusion(), run), runs=1)
    assert report.status == 0 and (report.steps, report.fused) == (6, 6)


def test_a_network_that_varies_is_not_blamed_on_fastdiff(integrate):
    calls = itertools.count()
    report = check((Diffusion(), loop(lambda x, t: x * next(calls))), runs=2)
    assert report.status == 1 and report.varies.startswith("two runs without fastdiff differ by")
    assert "not deterministic" in str(report) and "cannot be said" in advice(report)


def test_steps_that_vary_are_told(integrate):
    calls = itertools.count()
    integrate(fused(lambda self, x, t: x + (next(calls) > 8)))
    report = check((Diffusion(), loop(Net())), runs=2)
    assert report.status == 1 and report.varies.startswith("two runs with fastdiff differ by")


class Clock:
    """Time that passes only where it is spent."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time

    def spend(self, ticks):
        self.time += ticks


@pytest.mark.parametrize("form", ["module", "function", "keyword"])
def test_the_time_of_steps_is_without_that_of_networks(integrate, monkeypatch, form):
    clock = Clock()
    monkeypatch.setattr(watch, "now", clock)
    monkeypatch.setattr("fastdiff.check.now", clock)
    diffusion = Diffusion()
    diffusion.clock = clock

    class Slow(torch.nn.Module):
        def forward(self, x, t):
            clock.spend(100)
            return self.inner(x)

        def inner(self, x):
            return 0.5 * x

    net = Slow() if form == "module" else Slow().forward

    def gradient(x, t):
        clock.spend(10)
        return 0 * x

    def run(obj):
        clock.spend(30)
        x = torch.randn(SHAPE)
        for t in reversed(range(6)):
            if form == "keyword":
                x = obj.p_sample(x=x, t=t, model=net, cond_fn=gradient)["sample"]
            else:
                x = obj.p_sample(net, x, t, True, gradient)["sample"]
        return x

    report = check((diffusion, run), runs=1)
    assert report.without == Side([30 + 6 * 115.0], 6 * 5.0, 6 * 110.0, 30 + 6 * 115.0, 5.0)
    assert report.enabled == Side([30 + 6 * 111.0], 6 * 1.0, 6 * 110.0, 30 + 6 * 111.0, 1.0)
    assert report.gain == pytest.approx(24 / 720) and report.saved == pytest.approx(24 / 720)
    assert report.share == pytest.approx(30 / 720) and report.network_share == pytest.approx(660 / 720)
    assert re.search(r"one step +5 s +1 s", str(report)) and "5 times faster" in str(report)


def test_a_step_in_a_step_is_one(integrate):
    """As a ddim_sample that calls p_sample."""
    net = Net()

    def run(obj):
        x = torch.randn(SHAPE)
        for t in reversed(range(6)):
            x = obj.ddim_sample(net, x, t)["sample"]
        return x

    report = check((Diffusion(), run), runs=1)
    assert report.steps == 6 and report.status == 0 and report.fused == 6


def test_wrappers_keep_signatures_and_go_again(integrate):
    diffusion, net = Diffusion(), Net()
    plain = inspect.signature(diffusion.p_sample), inspect.signature(net.forward)
    seen = []

    def run(obj):
        wrapped = hasattr(obj.p_sample, "__wrapped__")
        x = obj.p_sample(net, torch.randn(SHAPE), 1)["sample"]
        seen.append((wrapped, (inspect.signature(obj.p_sample), inspect.signature(net.forward)) == plain))
        return x

    check((diffusion, run), runs=1)
    assert (True, True) in seen and (False, True) in seen and (True, False) not in seen
    assert "p_sample" not in vars(diffusion) and "forward" not in vars(net)


def test_attributes_of_the_instance_come_back(integrate):
    diffusion, net = Diffusion(), Net()
    own = functools.partial(Diffusion.p_sample, diffusion)
    forward = net.forward
    diffusion.p_sample, net.forward = own, forward
    check((diffusion, loop(net)), runs=1)
    assert vars(diffusion)["p_sample"] is own and vars(net)["forward"] is forward


@pytest.mark.parametrize("error", [RuntimeError("odd"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 8])
def test_everything_is_put_back_after_an_exception(integrate, error, call):
    """In the first run, the recorded ones, a timed one, and one with the time in steps."""
    diffusion, net, calls = Diffusion(), Net(), itertools.count(1)

    def run(obj):
        number = next(calls)

        def model(x, t):
            if number == call and t == 2:
                raise error
            return net(x, t)

        return obj.p_sample_loop(model, SHAPE) + 0 * net(torch.zeros(()), 0)

    before = dict(vars(diffusion)), dict(vars(net))
    expected = RunError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        check((diffusion, run), runs=1)
    if expected is RunError:
        assert caught.value.__cause__ is error and caught.value.enabled == (call in (3, 8))
    assert type(diffusion) is Diffusion and (dict(vars(diffusion)), dict(vars(net))) == before


def test_an_enabled_object_stays_as_it_is(integrate):
    diffusion = fastdiff.enable(Diffusion(), noise="philox", seeds=3)
    state, cls = diffusion._fastdiff, type(diffusion)
    report = check((diffusion, loop(Net())), runs=1)
    assert report.noise == "philox" and report.fused == 6
    assert type(diffusion) is cls and diffusion._fastdiff is state
    assert state.options == _host.Options("philox", 3) and state.fused == 0 and not state.tables
    assert check((diffusion, loop(Net())), runs=1, noise="torch").noise == "torch"
    assert diffusion._fastdiff is state
    with pytest.raises(CheckError, match="run with a model"):
        check(diffusion)
    assert diffusion._fastdiff is state


def test_caches_outlive_the_turns(integrate):
    diffusion, tables = Diffusion(), []

    def run(obj):
        if isinstance(obj, _host.Switched):
            tables.append(len(obj._fastdiff.tables))
        return obj.p_sample_loop(net, SHAPE)

    net = Net()
    check((diffusion, run), runs=2)
    assert tables == [0, *(6 * number for number in range(len(tables) - 1))] and len(tables) >= 5


def test_philox_is_compared_with_the_noise_of_torch(integrate):
    report = check((Diffusion(), loop(Net())), noise="philox", runs=2)
    assert report.status == 0 and report.comparison.bits and report.varies is None
    assert "equal bit for bit with torch's noise; noise='philox' gives others, by design" in str(report)
    integrate(fused(lambda self, x, t: x + 1))
    report = check((Diffusion(), loop(Net())), noise="philox", runs=1)
    assert report.status == 1 and report.starts == 1


def test_runs_start_from_the_seed(integrate):
    drawn = []

    def run(obj):
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return obj.p_sample_loop(lambda x, t: x, SHAPE)

    check((Diffusion(), run), runs=1, seed=5)
    assert len(set(drawn)) == 1
    check((Diffusion(), run), runs=1, seed=6)
    assert len(set(drawn)) == 2


def test_short_runs_are_repeated(integrate, monkeypatch):
    clock, calls = Clock(), itertools.count()
    monkeypatch.setattr("fastdiff.check.now", clock)
    monkeypatch.setattr("fastdiff.check._ROUND", 1.0)
    diffusion, net = Diffusion(), Net()

    def run(obj):
        clock.spend([0.25, 0.75, 0.25, 0.25][next(calls) % 4])
        return obj.p_sample_loop(net, SHAPE)

    report = check((diffusion, run), runs=2)
    # two to warm up, two recorded, and rounds of four
    assert next(calls) == 4 + 2 * 2 * 4 + 2 * 2 * 4
    assert report.without.runs == report.enabled.runs == [0.25, 0.25]


# fastdiff's own samplers, and functions


def test_a_sampler_of_fastdiff():
    sampler = fastdiff.DDIMSampler(fastdiff.NoiseSchedule.cosine(100), 5, eta=1.0)
    net = Net()
    options = {"generator": None, "seeds": 3}
    report = check((sampler, lambda s: s.sample(net, SHAPE, **options)), runs=1)
    assert report.status == 0 and report.comparison.bits and report.starts is None and report.fused is None
    assert (report.host, report.name, report.steps) == ("fastdiff", "DDIMSampler", 5)
    assert "backend='reference'" in str(report) and report.without.network > 0
    assert not {"sample", "iterate"} & vars(sampler).keys()
    report = check((sampler, lambda s: net(s.sample(net, SHAPE, **options), 0)), runs=1)
    assert report.steps == 5, "a network is also called outside of the steps"
    report = check((sampler, lambda s: [x for x, _, _ in s.iterate(net, SHAPE, **options)]), runs=1)
    assert report.status == 0 and report.steps == 5 and 0 < report.without.steps < report.without.timed


def loops_of(net, at, size, steps=5):
    """Code in two functions, theirs and ours, where ours differs by `size` in step `at`."""

    def sample(change):
        x = torch.randn(SHAPE)
        with torch.no_grad():
            for t in range(1, steps + 1):
                x = x - 0.1 * net(x, t) + change * (t == at)
        return [x]

    return lambda: sample(0.0), lambda: sample(size)


def test_the_steps_of_a_loop_lie_between_the_calls_of_its_network(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch, "now", clock)
    monkeypatch.setattr("fastdiff.check.now", clock)

    class Slow(Net):
        def forward(self, x, t):
            clock.spend(100)
            return super().forward(x, t)

    network = Slow()

    def sample(first, each):
        clock.spend(first)
        x = torch.ones(SHAPE)
        for t in range(5):
            x = network(x, t)
            clock.spend(each if t != 3 else 40 * each)
        return x

    report = check((lambda: sample(30, 4), lambda: sample(20, 2), network), runs=1)
    assert (report.without.step, report.enabled.step) == (4, 2)
    assert (report.without.steps, report.enabled.steps) == (30 + 44 * 4, 20 + 44 * 2)
    assert report.without.network == 500 and report.saved == pytest.approx(0.5 * 206 / 706)


def test_two_functions():
    net = Net()
    report = check((*loops_of(net, 3, 0.0), net), runs=1)
    assert report.status == 0 and report.steps == 5 and report.without.network > 0 and report.without.steps > 0
    for at, text in ((2, "from step 2 on"), (5, "after the last state that was seen")):
        report = check((*loops_of(net, at, 1.0), net), runs=1)
        assert report.status == 1 and text in str(report)
    report = check(loops_of(net, 3, 0.0), runs=1)
    assert report.status == 0 and report.without.steps is None and report.saved is None
    assert "no network was given" in str(report)


def test_networks_that_are_compiled_in_place():
    net = Net()
    net.compile(backend="eager")
    report = check((*loops_of(net, 1, 0.0), net), runs=1)
    assert report.status == 0 and report.steps == 5 and "forward" not in vars(net)
    wrapped = torch.compile(Net(), backend="eager", fullgraph=True)
    report = check((*loops_of(wrapped, 1, 0.0), wrapped), runs=1)
    assert report.status == 0 and report.steps == 5


# Results


def test_results_in_any_form():
    image = pytest.importorskip("PIL.Image").fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))

    @dataclasses.dataclass
    class Output:
        images: list
        flagged: object = None

    value = Output([image, image], {"a": (torch.ones(2), np.float32(3)), "b": "text", "c": np.array(["x"]), "d": 3})
    leaves = kept(value)
    assert list(leaves) == [".images[0]", ".images[1]", ".flagged['a'][0]", ".flagged['a'][1]"]
    assert leaves[".images[0]"].dtype is torch.uint8 and leaves[".flagged['a'][1]"].item() == 3
    assert kept(0.1)[""].item() == 0.1 and kept(np.float64(2.5))[""].item() == 2.5
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(kept([sparse])["[0]"], torch.eye(3)) and results.digest(sparse) == results.digest(torch.eye(3))
    with pytest.raises(CheckError, match="expected tensors, arrays or images .*, got NoneType"):
        kept(None)


def test_compare():
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([0.0, 1.0, nan, inf])

    def against(other, first=base):
        return compare({"x": first}, {"x": other})

    assert against(base.clone()) == Comparison(True, 0.0) and against(base).equal
    zero = base.clone()
    zero[0] = -0.0
    assert against(zero) == Comparison(False, 0.0) and against(zero).equal
    assert against(base + torch.tensor([0.5, -2.0, 0, 0])) == Comparison(False, 2.0, "x")
    for position, value in ((1, nan), (2, 0.0), (3, nan)):
        other = base.clone()
        other[position] = value
        found = against(other)
        assert found.difference != found.difference and not found.equal
    other = base.clone()
    other[3] = -inf
    assert against(other).difference == inf
    assert against(base[:2]).note == "[4] of torch.float32 against [2] of torch.float32"
    assert against(base.double()).note and not against(base.double()).equal
    assert compare({"x": base}, {}).note == "only without fastdiff: x"
    many = dict.fromkeys("abcde", base)
    note = "only without fastdiff: x; only with fastdiff: the whole result, a, b and 3 more"
    assert compare({"x": base}, {"": base} | many).note == note
    broken = compare({"x": base, "y": base}, {"x": base + nan, "y": base.nan_to_num(0)})
    assert (broken.lost, broken.mended, broken.where) == (2, 2, "x")
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert against(half + 1, half).difference == 1 and against(half, half).bits
    assert against(torch.tensor([3], dtype=torch.uint8), torch.tensor([5], dtype=torch.uint8)).difference == 2
    assert against(torch.tensor([True]), torch.tensor([False])).difference == 1
    assert against(torch.tensor([1j]), torch.tensor([0j])).difference == 1
    assert against(torch.empty(0), torch.empty(0)).bits


def test_digests_tell_states_apart():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert results.digest(x) == results.digest(x.clone()) == results.digest(x.t().contiguous().t())
    for other in (torch.nextafter(x, torch.full_like(x, 9)), x.t(), x.double()):
        assert results.digest(x) != results.digest(other)
    assert results.digest(torch.zeros(2)) == results.digest(-torch.zeros(2))
    for dtype in (torch.bfloat16, torch.float16, torch.uint8, torch.bool):
        assert results.digest(torch.ones(2).to(dtype)) != results.digest(torch.zeros(2).to(dtype))


# What it says


def report_of(without, enabled, **fields):
    return Report("openai", "Diffusion", "torch", 0, steps=10, without=without, enabled=enabled, **fields)


@pytest.mark.parametrize(
    "without, enabled, expected",
    [
        # whole runs, steps, network, all of a timed run
        (([10.0, 10.1, 9.9], 0.03, 9.96, 10.0), ([9.98, 10, 9.99], 0.01, 9.96, 9.98),
         "The network takes 99.6 % of the run: fastdiff gains 0.2 %, which you will not notice."),
        (([10.0, 10.1, 9.9], 0.03, None, 10.0), ([9.98, 10, 9.99], 0.01, None, 9.98),
         "The steps take 0.3 % of the run: fastdiff gains 0.2 %, which you will not notice."),
        (([10.0, 10.1, 9.9], 0.03, 9.0, 10.0), ([10.0, 10, 10.05], 0.03, 9.0, 10.0),
         "The network takes 90.0 % of the run: fastdiff gains nothing."),
        (([10.0, 10.1, 9.9], 0.03, 9.0, 10.0), ([10.0, 10, 10.05], 0.05, 9.0, 10.0),
         "The network takes 90.0 % of the run: fastdiff gains nothing."),
        (([10.0, 12.0, 9.0], 1.0, 9.0, 10.0), ([9.5, 11.0, 9], 0.5, 9.0, 9.5),
         "The network takes 90.0 % of the run: by its steps fastdiff should gain 5 %, but runs of one side vary by "
         "20.0 %."),
        (([10.0], 1.0, 9.0, 10.0), ([9.95], 0.5, 9.0, 9.5),
         "The network takes 90.0 % of the run: by its steps fastdiff should gain 5 %, but whole runs show no more than "
         "1 %."),
        (([10.0, 10.1, 9.9], 4.0, 6.0, 10.0), ([7.0, 7.0, 7.1], 1.0, 6.0, 7.0),
         "Worth it here: the run takes 30.0 % less time (1.43 times as fast)."),
        (([10.0, 10.1, 9.9], 1.0, 9.0, 10.0), ([23.0, 23.0, 23.1], 0.5, 9.0, 9.5),
         "Whole runs took 130.0 % longer with fastdiff, which the time in the steps (5 % less) does not explain: "
         "check again on a quiet machine."),
        (([10.0, 10.1, 9.9], 1.0, 9.0, 10.0), ([11.0, 11.0, 11.1], 0.5, 10.8, 11.3),
         "Whole runs took 10.0 % longer with fastdiff, as the network took 20.0 % longer: its time is not fastdiff's."),
        (([10.0, 10.1, 9.9], 1.0, 9.0, 10.0), ([5.0, 5.0, 5.1], 0.5, 9.0, 9.5),
         "Whole runs took 50.0 % less with fastdiff, which the time in the steps (5 % less) does not explain: "
         "check again on a quiet machine."),
        (([10.0, 10.1, 9.9], 1.0, 9.0, 10.0), ([9.6, 9.6, 9.7], 0.6, 9.0, 9.6),
         "A small gain: the run takes 4 % less time (1.04 times as fast)."),
        (([10.0, 10.1, 9.9], 1.0, 9.0, 10.0), ([11.0, 11.0, 11.1], 2.0, 9.0, 11.0),
         "Not worth it here: the run takes 10.0 % longer with fastdiff."),
        (([10.0, 10.1, 9.9], None, None, None), ([9.95, 10.0, 10], None, None, None),
         "No gain can be told: whole runs differ by no more than runs of one side among themselves."),
    ],
)  # fmt: skip
def test_advice(without, enabled, expected):
    sides = (Side(*side, None if side[1] is None else side[1] / 10) for side in (without, enabled))
    report = report_of(*sides)
    assert advice(report) == expected and str(report).endswith(f"\n\n{expected}")


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"varies": "two runs differ"}, "Whether fastdiff gives the same results cannot be said"),
        ({"comparison": Comparison(False, 0.5)}, "Do not adopt fastdiff here"),
        ({"fused": 0, "kept": {"why": 10}}, "Nothing to gain here: every step was left to the original code."),
        ({"fused": 0}, "What fastdiff gains cannot be said: it saw none of the object's steps. They are compiled, or"),
        ({"fused": 0, "replaced": ["scheduler"]},
         "What fastdiff gains cannot be said: the run replaces scheduler of the object, so that"),
        ({"comparison": Comparison(False, float("nan"), "[0]", mended=3)},
         "Without fastdiff the result has NaN or Inf at [0], in 3 values that are finite with it: see 'Where we"),
        ({"comparison": Comparison(False, float("nan"), lost=2, mended=3)},
         "Do not adopt fastdiff here: with it the result has NaN or Inf, in 2 values that are finite without it."),
    ],
)  # fmt: skip
def test_advice_against(fields, expected):
    report = report_of(Side([10.0], 4.0, 6.0, 10.0), Side([7.0], 1.0, 6.0, 7.0), **fields)
    assert advice(report).startswith(expected)


def test_advice_where_a_few_steps_take_long():
    report = report_of(Side([10.0], 1.0, 9.0, 10.0, 0.1), Side([15.0], 6.0, 9.0, 15.0, 0.05))
    assert advice(report).startswith("Whole runs took 50.0 % longer with fastdiff, as all steps together took 500.0 %")


def test_the_backend_is_named(integrate, monkeypatch):
    report = check((Diffusion(), loop(Net())), runs=1)
    assert f"with its {fastdiff.native.best(torch.device('cpu')) or 'reference'} backend" in report.environment
    monkeypatch.setattr("fastdiff.native.best", lambda device: None)
    monkeypatch.setattr("fastdiff.native.why_not", lambda: "it was not built.")
    report = check((Diffusion(), loop(Net())), runs=1)
    assert "with its reference backend" in report.environment
    assert "note      fastdiff runs through plain PyTorch here, without the native library: it was not built." in str(
        report
    )
    report = check((fastdiff.enable(Diffusion(), backend="reference"), loop(Net())), runs=1)
    assert "with its reference backend" in report.environment and not report.notes


# The command


FACTORIES = """
import argparse
import sys

import torch
import fastdiff

argv = sys.argv
net = torch.nn.Linear(4, 4)
sampler = fastdiff.DDPMSampler(fastdiff.NoiseSchedule.linear(100), "4")

def model(x, t):
    return net(x).tanh()

def run(sampler):
    return sampler.sample(model, (2, 3, 4, 4), seeds=1)

def good():
    return sampler, run

def other():
    return lambda: torch.zeros(2), lambda: torch.ones(2)

def ours_raises():
    def ours():
        raise ArithmeticError("ours")
    return lambda: torch.zeros(2), ours

def theirs_raises():
    return lambda: 1 / 0, lambda: torch.ones(2)

def stopped():
    def theirs():
        raise KeyboardInterrupt
    return theirs, theirs

def raises():
    raise ArithmeticError("in the factory")

def sampler_alone():
    return sampler

def unknown():
    return object(), run

def three():
    return 1, 2, 3

def many():
    return run, run, net, net

def nothing():
    return lambda: None, lambda: None

def no_network():
    return lambda: None, lambda: None, 3

def leaves():
    sys.exit("enough")

def run_leaves():
    return lambda: torch.zeros(2), lambda: sys.exit()

def arguments():
    argparse.ArgumentParser().parse_args()
    assert sys.argv == [__file__] == argv, sys.argv
    return (lambda: torch.zeros(len(sys.argv))), (lambda: torch.zeros(1))

number = 3
"""


@pytest.fixture
def check_of(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with `factories.py`; returns its status, and what it printed."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastdiff", "check", *arguments])
        status = 0
        try:
            runpy.run_module("fastdiff", run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr()

    return call


def test_command_writes_figures(check_of, tmp_path):
    status, printed = check_of("factories:good", "--runs=1", "--seed=3", "--json=figures.json")
    assert status == 0 and printed.out.startswith("fastdiff: DDPMSampler\n")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["status"] == 0 and figures["equal"] and figures["seed"] == 3 and figures["steps"] == 4
    assert figures["state"] == {"shape": [2, 3, 4, 4], "dtype": "float32", "device": "cpu"}
    assert printed.out.endswith(figures["advice"] + "\n")
    assert len(figures["without"]["runs"]) == len(figures["enabled"]["runs"]) == 1
    assert "first run took" in printed.err and "7 more follow" in printed.err
    status, printed = check_of("factories:good", "--runs=1", f"--json={tmp_path}")
    assert status == 2 and f"argument --json: cannot write {tmp_path}" in printed.err


def test_command_tells_other_results_by_its_status(check_of):
    status, printed = check_of("factories:other", "--runs=1")
    assert status == 1 and "DIFFERENT: largest difference 1" in printed.out
    status, printed = check_of("factories:ours_raises")
    assert status == 1 and "ArithmeticError: ours" in printed.err
    assert printed.err.endswith("fastdiff check: the run with fastdiff raised\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["factories"], "expected module:factory, got 'factories'"),
        (["factories:"], "expected module:factory, got 'factories:'"),
        (["factories.py:good"], "expected a module's name, such as factories:good, got 'factories.py:good'"),
        (["./sub/factories:good"], "expected a module's name, such as factories:good, got './sub/factories:good'"),
        (["leaving:make"], "module 'leaving' called sys.exit(3)"),
        (["factories:leaves"], "the factory factories:leaves called sys.exit('enough')"),
        (["factories:run_leaves"], "the run with fastdiff called sys.exit()"),
        (["nowhere:make"], "no module 'nowhere' in "),
        (["factories.deeper:make"], "no module 'factories.deeper' in "),
        (["broken:make"], "module 'broken' could not be imported"),
        (["wrong:make"], "module 'wrong' could not be imported"),
        (["factories:make"], "module 'factories' has no 'make'"),
        (["factories:number"], "factories:number: expected a function without arguments, got int"),
        (["factories:raises"], "the factory factories:raises raised"),
        (["factories:run"], "the factory factories:run raised"),
        (["factories:theirs_raises"], "the run without fastdiff raised"),
        (["factories:sampler_alone"], "expected (DDPMSampler, run), as a sampler of fastdiff is run with"),
        (["factories:good", "--noise=philox"], "--noise: expected no philox with a sampler of fastdiff"),
        (["factories:other", "--noise=philox"], "--noise: expected no philox with two functions"),
        (["factories:unknown"], "does not take what the factory returned: obj: expected a diffusers pipeline"),
        (["factories:three"], "got a tuple of (int, int, int)"),
        (["factories:many"], "got a tuple of (function, function, Linear, Linear)"),
        (["factories:nothing"], "the run: expected tensors, arrays or images as its result"),
        (
            ["factories:no_network"],
            "a torch.nn.Module or nothing, got a tuple of (function, function, int)",
        ),
    ],
)
def test_usage_errors(check_of, arguments, message):
    status, printed = check_of(*arguments)
    assert status == 2 and message in printed.err and not printed.out
    if "raised" in message or "imported" in message:
        assert "Traceback" in printed.err
    else:
        assert "Traceback" not in printed.err


def test_the_arguments_of_the_command_are_not_those_of_the_factory(check_of):
    status, printed = check_of("factories:arguments", "--runs=1")
    assert status == 0, printed.err
    assert sys.argv == ["fastdiff", "check", "factories:arguments", "--runs=1"]


def test_interruption(check_of):
    assert check_of("factories:stopped")[0] == 130


def test_bad_options(check_of):
    for arguments, message in (
        (["factories:good", "--runs=0"], "argument --runs: expected an integer of at least 1, got '0'"),
        (["factories:good", f"--seed={2**64}"], "argument --seed: expected an integer from -2**63 to 2**64 - 1, got"),
        (["factories:good", "--seed=x"], "argument --seed: expected an integer from -2**63 to 2**64 - 1, got 'x'"),
        (["factories:good", "--noise=mine"], "argument --noise: invalid choice: 'mine'"),
        ([], "the following arguments are required: module:factory"),
    ):
        status, printed = check_of(*arguments)
        assert status == 2 and message in printed.err


def test_command_as_a_process(tmp_path):
    """The module comes from the current folder, and the status from the results."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(fastdiff.__file__))}
    arguments = [sys.executable, "-m", "fastdiff", "check", "factories:other", "--runs=1"]
    run = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "DIFFERENT" in run.stdout, run.stderr


def test_a_run_of_no_known_host_names_what_is_supported():
    with pytest.raises(CheckError, match="changed by an import") as caught:
        subject_of((torch.nn.Linear(2, 2), lambda obj: obj))
    assert "which can be checked" not in str(caught.value)


def test_an_object_that_holds_what_is_supported_is_told_of_it(integrate):
    class Policy:
        pass

    policy = Policy()
    policy.planner = Diffusion()
    with pytest.raises(CheckError, match=r"It has a Diffusion, which can be checked: return \(its planner, run\)"):
        subject_of((policy, lambda obj: obj))
