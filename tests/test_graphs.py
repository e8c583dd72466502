"""Captured chains, without a GPU.

`Tape` stands in for CUDA graphs on the CPU: it records the operations of a function with the tensors that they touched,
and replays those alone, into the same memory, without running any Python of the chain or of the model. What the host
decided or made at the capture is thus as frozen as in a graph. Like a capture it refuses an operation that reads a
tensor on the host, or that makes one from data of the host.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import graphs, noise
from fastdiff.samplers import DDIMSampler, DDPMSampler, TableSampler
from fastdiff.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(100)
SHAPE = (3, 2, 4, 5)
VIEWS = ("aten.detach", "aten.view")
FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "equal")


class _Recording(TorchDispatchMode):
    def __init__(self, entries):
        super().__init__()
        self.entries = entries

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.entries.append((func, args, kwargs or {}, out))
        return out


class Tape:
    """The interface of `graphs._CudaRecorder`."""

    def __init__(self):
        self.warmups = 0
        self.recorded = []  # the entries of each graph

    def warm_up(self, function, times):
        for _ in range(times):
            with graphs._recordable():
                function()
            self.warmups += 1

    def record(self, function, generators):
        entries = []
        with graphs._recordable(), _Recording(entries):
            function()
        self.recorded.append(entries)
        return lambda: [self._again(*entry) for entry in entries] and None

    @staticmethod
    def _again(func, args, kwargs, recorded):
        out = func(*args, **kwargs)
        for old, new in zip(pytree.tree_leaves(recorded), pytree.tree_leaves(out), strict=True):
            if isinstance(old, torch.Tensor) and old.device.type != "meta" and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def kernels(self, graph):
        """The operations of a graph that are not views of what is there."""
        return [str(func) for func, _, _, _ in self.recorded[graph] if not str(func).startswith(VIEWS)]


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    tape = Tape()
    monkeypatch.setattr(graphs, "_recorder", lambda device: tape)
    return tape


class Network(torch.nn.Module):
    """A network whose output depends on all that it is given, and calls it made."""

    def __init__(self, channels=2, dtype=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(2, channels, 3, padding=1)
        self.dtype = dtype
        self.calls = 0
        self.eval()

    def forward(self, x, t, y=None, more=None):
        self.calls += 1
        h = torch.tanh(self.conv(x.float()) + torch.sin(t.float() / 10).reshape(-1, 1, 1, 1))
        if y is not None:
            h = h * y
        if more is not None:
            h = h + more["shift"]
        return h.to(self.dtype or x.dtype)


def repeated(steps=(80, 50, 50, 50, 7)):
    return DDPMSampler(SCHEDULE, list(steps))


SAMPLERS = {
    "ddpm": (DDPMSampler(SCHEDULE, 9), Network()),
    "ddpm all steps": (DDPMSampler(NoiseSchedule.cosine(12)), Network()),
    "ddpm learned_range": (DDPMSampler(SCHEDULE, 6, variance="learned_range"), Network(4)),
    "ddpm without noise": (DDPMSampler(SCHEDULE, 6, noise=False), Network()),
    "ddim": (DDIMSampler(SCHEDULE, 7), Network()),
    "ddim eta 0.5": (DDIMSampler(SCHEDULE, 7, eta=0.5), Network()),
    "repeated timesteps": (repeated(), Network()),
    "float": (DDIMSampler(SCHEDULE, 5, time="float", eta=1.0), Network()),
    "scaled_1000": (DDPMSampler(SCHEDULE, 5, time="scaled_1000"), Network()),
    "openai": (DDPMSampler(SCHEDULE, 5, host="openai"), Network()),
    "table": (TableSampler(repeated().table), Network()),
}


@pytest.fixture(params=SAMPLERS, ids=lambda name: name.replace(" ", "-"))
def case(request):
    return SAMPLERS[request.param]


@pytest.fixture(params=[True, False], ids=["one graph", "a graph per step"])
def unroll(request):
    return request.param


def captured(sampler, model, shape=SHAPE, **options):
    return sampler.capture(model, shape, **{"device": "cpu", **options})


# Replays are samples


def test_a_replay_is_a_sample(case, unroll):
    sampler, model = case
    chain = captured(sampler, model, unroll=unroll)
    calls = model.calls
    for seeds in (1, 2, torch.tensor([5, -6, 7])):
        found = chain.replay(seeds=seeds)
        assert model.calls == calls, "a replay runs nothing of the model's Python"
        assert torch.equal(found, sampler.sample(model, SHAPE, seeds=seeds, device="cpu"))
        calls = model.calls
    assert torch.equal(chain(seeds=1), sampler.sample(model, SHAPE, seeds=1, device="cpu"))


def test_a_replay_starts_from_x_T(case, unroll):
    sampler, model = case
    chain = captured(sampler, model, unroll=unroll)
    x_T = noise.normal(SHAPE, 9)
    before = x_T.clone()
    for _ in range(2):
        assert torch.equal(chain.replay(x_T=x_T, seeds=4), sampler.sample(model, x_T=x_T, seeds=4))
    assert torch.equal(x_T, before)
    assert torch.equal(chain.replay(seeds=4), sampler.sample(model, SHAPE, seeds=4, device="cpu"))


@pytest.mark.parametrize(
    ("dtype", "output"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float64, None), (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("rounding", ["once", "host"])
def test_dtypes(dtype, output, rounding, unroll):
    sampler = DDPMSampler(SCHEDULE, 6, rounding=rounding, time="float")
    model = Network(dtype=output)
    chain = captured(sampler, model, dtype=dtype, unroll=unroll)
    found = chain.replay(seeds=3)
    assert found.dtype == dtype
    assert torch.equal(found, sampler.sample(model, SHAPE, seeds=3, device="cpu", dtype=dtype))


@pytest.mark.parametrize("count", ["one", "per sample"])
def test_a_generator_is_consumed_as_by_sample(case, unroll, count):
    sampler, model = case

    def generators(seed):
        if count == "one":
            return torch.Generator().manual_seed(seed)
        return [torch.Generator().manual_seed(seed + b) for b in range(SHAPE[0])]

    def states(source):
        return [member.get_state() for member in (source if isinstance(source, list) else [source])]

    ours, theirs = generators(3), generators(3)
    chain = captured(sampler, model, unroll=unroll, generator=ours)
    assert all(map(torch.equal, states(ours), states(theirs))), "the capture draws nothing"
    for options in ({}, {}, {"x_T": noise.normal(SHAPE, 1)}):
        expected = sampler.sample(model, SHAPE, generator=theirs, device=None if options else "cpu", **options)
        assert torch.equal(chain.replay(**options), expected)
        assert all(map(torch.equal, states(ours), states(theirs)))
    # another one, in place of that of the capture
    other, same = generators(8), generators(8)
    assert torch.equal(chain.replay(generator=other), sampler.sample(model, SHAPE, generator=same, device="cpu"))
    assert all(map(torch.equal, states(other), states(same)))
    assert all(map(torch.equal, states(ours), states(theirs)))


def test_seeds_left_out_come_from_torchs_default_generator(unroll):
    sampler, model = DDPMSampler(SCHEDULE, 5), Network()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    chain = captured(sampler, model, unroll=unroll)
    assert torch.equal(torch.get_rng_state(), state), "a capture draws no seed"
    found = [chain.replay() for _ in range(2)]
    torch.manual_seed(11)
    for one in found:
        assert torch.equal(one, sampler.sample(model, SHAPE, device="cpu"))
    assert not torch.equal(*found)


def test_nothing_is_drawn_where_no_noise_is_needed():
    sampler, model = DDIMSampler(SCHEDULE, 5), Network()
    chain, x_T = captured(sampler, model), noise.normal(SHAPE, 2)
    state = torch.get_rng_state()
    assert torch.equal(chain.replay(x_T=x_T), sampler.sample(model, x_T=x_T))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seeds", [7, torch.tensor([3, 4, 5])])
def test_seeds_of_the_capture_are_the_default(seeds, unroll):
    sampler, model = DDPMSampler(SCHEDULE, 5), Network()
    given = seeds.clone() if isinstance(seeds, torch.Tensor) else seeds
    chain = captured(sampler, model, seeds=given, unroll=unroll)
    if isinstance(given, torch.Tensor):
        given.zero_()
    expected = sampler.sample(model, SHAPE, seeds=seeds, device="cpu")
    assert torch.equal(chain.replay(), expected)
    assert not torch.equal(chain.replay(seeds=1), expected)
    assert torch.equal(chain.replay(), expected)


def test_results_are_new_tensors_or_out(unroll):
    sampler, model = DDPMSampler(SCHEDULE, 4), Network()
    chain = captured(sampler, model, unroll=unroll)
    first = chain.replay(seeds=1)
    kept = first.clone()
    second = chain.replay(seeds=2)
    assert torch.equal(first, kept) and first.data_ptr() != second.data_ptr()
    first.fill_(float("nan"))
    assert torch.equal(chain.replay(seeds=1), kept)
    out = torch.empty(SHAPE).to(memory_format=torch.channels_last)
    assert chain.replay(seeds=1, out=out) is out
    assert torch.equal(out, kept)


def test_in_inference_mode(unroll):
    sampler, model = DDPMSampler(SCHEDULE, 4), Network()
    with torch.inference_mode():
        chain = captured(sampler, model, unroll=unroll, model_kwargs={"y": torch.tensor(2.0)})
        inside = chain.replay(seeds=1, model_kwargs={"y": torch.tensor(3.0)})
    assert not inside.is_inference()
    assert torch.equal(inside, chain.replay(seeds=1))
    assert not chain.replay(seeds=1).requires_grad


def test_a_model_that_returns_the_state_itself(unroll):
    sampler = DDPMSampler(SCHEDULE, 4)

    def model(x, t):
        return x

    chain = captured(sampler, model, unroll=unroll)
    for seeds in (1, 2):
        assert torch.equal(chain.replay(seeds=seeds), sampler.sample(model, SHAPE, seeds=seeds))


def test_a_model_that_writes_into_its_time():
    sampler = DDPMSampler(SCHEDULE, 4)

    def model(x, t):
        return x * t.add_(1).reshape(-1, 1, 1, 1) / 100

    chain = captured(sampler, model, unroll=False)
    for seeds in (1, 2):
        assert torch.equal(chain.replay(seeds=seeds), sampler.sample(model, SHAPE, seeds=seeds))
    with pytest.raises(ValueError, match="model: expected it to leave t as it is"):
        captured(sampler, model, unroll=True)


def test_under_autocast(unroll):
    """The cast of a weight, which autocast keeps, is part of the graph: it sees the weight of the replay."""
    linear, sampler = torch.nn.Linear(6, 6), DDIMSampler(SCHEDULE, 4)

    def sample(run):
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    def model(x, t):
        return linear(x).float()

    def expected():
        return sampler.sample(model, (3, 6), seeds=1)

    chain = sample(lambda: (expected(), captured(sampler, model, (3, 6), unroll=unroll)))[1]
    for _ in range(2):
        assert torch.equal(chain.replay(seeds=1), sample(expected))
        with torch.no_grad():
            linear.weight.mul_(-0.7)


def test_a_trained_table():
    rows = repeated().table.rows.requires_grad_()
    base = repeated().table
    sampler = TableSampler(type(base)(rows, base.structure, base.timesteps))
    model = Network()
    chain = captured(sampler, model)
    assert torch.equal(chain.replay(seeds=1), sampler.sample(model, SHAPE, seeds=1, device="cpu").detach())


def test_an_empty_batch(unroll):
    sampler, model = DDPMSampler(SCHEDULE, 3), Network()
    assert captured(sampler, model, (0, 2, 4, 4), unroll=unroll).replay(seeds=1).shape == (0, 2, 4, 4)


# What the graphs hold


def constant(x, t):
    return OUTPUT


OUTPUT = noise.normal(SHAPE, 77)


@pytest.mark.parametrize("sampler", [DDPMSampler(SCHEDULE, 6), DDIMSampler(SCHEDULE, 6)], ids=["ddpm", "ddim"])
def test_the_sampler_is_one_kernel_per_step(sampler, tape):
    captured(sampler, constant, unroll=True)
    assert tape.kernels(1) == ["fastdiff.step_row.default"] * 6


def test_a_counted_step_adds_the_time_and_the_counter(tape):
    captured(DDPMSampler(SCHEDULE, 6), constant, unroll=False)
    assert [name.split(".")[1] for name in tape.kernels(1)] == ["index_select", "step", "add_"]


@pytest.mark.parametrize("noisy_last", [False, True])
def test_a_generator_needs_a_graph_for_each_kind_of_step(noisy_last, tape):
    sampler = DDPMSampler(SCHEDULE, [60, 30, 9] if not noisy_last else [(60, 30), (30, 9), (9, 5)])
    captured(sampler, constant, unroll=False, generator=torch.Generator())
    drawing = [any("randn" in name for name in tape.kernels(graph)) for graph in range(len(tape.recorded))]
    assert drawing == ([True, True] if noisy_last else [True, False, True])


def test_the_default_of_unroll(monkeypatch):
    monkeypatch.setattr(graphs, "UNROLL", 5)
    assert captured(DDPMSampler(SCHEDULE, 5), Network()).unrolled
    assert not captured(DDPMSampler(SCHEDULE, 6), Network()).unrolled


def test_warm_up(tape):
    model = Network()
    captured(DDPMSampler(SCHEDULE, 5), model, warmup=2)
    assert tape.warmups == 2
    assert model.calls == 2 + 5


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", ["index", "float"])
def test_times_are_aligned_and_no_views(batch, dtype, time):
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    sampler = DDPMSampler(SCHEDULE, 5, time=time)
    captured(sampler, model, (batch, 3), dtype=dtype, unroll=True, warmup=1)
    expected = [sampler.timesteps[0], *sampler.timesteps]
    assert [t.tolist() for t in seen] == [[float(t) if time == "float" else t] * batch for t in expected]
    assert all(t.data_ptr() % 16 == 0 and t.is_contiguous() and t._base is None for t in seen)


def test_a_compiled_network_is_compiled_once(unroll):
    compiled = []

    def backend(module, examples):
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    network = Network()
    model = torch.compile(lambda x, t: torch.tanh(network.conv(x) + t.reshape(-1, 1, 1, 1)), backend=backend)
    sampler = DDPMSampler(SCHEDULE, 6)
    expected = sampler.sample(model, SHAPE, seeds=1, device="cpu")
    # a tape does not record compiled functions: the graphs run as they are
    graphs._recorder(None).record = lambda function, generators: graphs._recordable()(function)
    chain = captured(sampler, model, unroll=unroll)
    assert torch.equal(chain.replay(seeds=1), expected)
    assert len(compiled) == 1


# Changes


def test_guidance(unroll):
    sampler, model = DDIMSampler(SCHEDULE, 6, eta=0.3), Network()
    kwargs, uncond = {"y": torch.tensor(2.0)}, {"y": torch.tensor(0.5)}
    chain = captured(sampler, model, unroll=unroll, model_kwargs=kwargs, guidance_scale=3.0, uncond_kwargs=uncond)

    def expected(kwargs, uncond, scale):
        return sampler.sample(
            model, SHAPE, seeds=1, device="cpu", model_kwargs=kwargs, guidance_scale=scale, uncond_kwargs=uncond
        )

    assert torch.equal(chain.replay(seeds=1), expected(kwargs, uncond, 3.0))
    other = {"y": torch.tensor(-1.5)}
    assert torch.equal(chain.replay(seeds=1, model_kwargs=other), expected(other, uncond, 3.0))
    # it stays
    assert torch.equal(chain.replay(seeds=1), expected(other, uncond, 3.0))
    assert torch.equal(chain.replay(seeds=1, uncond_kwargs=kwargs), expected(other, kwargs, 3.0))
    scale = torch.tensor([1.0, 2.5, 0.1])
    assert torch.equal(chain.replay(seeds=1, guidance_scale=scale), expected(other, kwargs, scale))
    assert torch.equal(chain.replay(seeds=1, guidance_scale=7), expected(other, kwargs, 7))


def test_arguments_of_the_model(unroll):
    sampler, model = DDPMSampler(SCHEDULE, 5), Network()
    y, shift = torch.full((3, 1, 1, 1), 0.7), torch.tensor(0.1)
    kwargs = {"y": y, "more": {"shift": shift, "unused": [1, "a", None]}}
    expected = sampler.sample(model, SHAPE, seeds=1, device="cpu", model_kwargs=kwargs)
    chain = captured(sampler, model, unroll=unroll, model_kwargs=kwargs)
    y.zero_()
    assert torch.equal(chain.replay(seeds=1), expected), "the tensors are the chain's own"
    changed = {"y": torch.full((3, 1, 1, 1), 0.2), "more": {"shift": torch.tensor(-0.3), "unused": [1, "a", None]}}
    expected = sampler.sample(model, SHAPE, seeds=1, device="cpu", model_kwargs=changed)
    assert torch.equal(chain.replay(seeds=1, model_kwargs=changed), expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (DDIMSampler(SCHEDULE, 6, eta=0.2), DDIMSampler(SCHEDULE, 6, eta=0.9)),
        (DDPMSampler(SCHEDULE, [90, 50, 50, 3]), DDPMSampler(SCHEDULE, [70, 30, 20, 0])),
        (
            DDIMSampler(SCHEDULE, 6, time="scaled_1000"),
            DDIMSampler(SCHEDULE, [90, 60, 50, 40, 20, 10], time="scaled_1000"),
        ),
        (DDPMSampler(SCHEDULE, 6, clip=1.0), DDPMSampler(SCHEDULE, 6, clip=(-0.2, 0.3))),
    ],
    ids=["eta", "timesteps", "times", "clip"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_update(first, second, dtype, unroll, tape):
    model = Network()
    chain = captured(first, model, dtype=dtype, unroll=unroll)
    graphs_made = len(tape.recorded)

    def expected(sampler):
        return sampler.sample(model, SHAPE, seeds=1, dtype=dtype, device="cpu")

    assert torch.equal(chain.replay(seeds=1), expected(first))
    chain.update(second)
    assert torch.equal(chain.replay(seeds=1), expected(second))
    assert not torch.equal(expected(first), expected(second))
    chain.update(first)
    assert torch.equal(chain.replay(seeds=1), expected(first))
    assert len(tape.recorded) == graphs_made
    # neither sampler's own table was written to
    assert torch.equal(expected(dataclasses.replace(first)), expected(first))
    assert torch.equal(expected(dataclasses.replace(second)), expected(second))


def test_update_refuses_what_was_not_captured():
    sampler = DDIMSampler(SCHEDULE, 6, eta=0.5)
    chain, model = captured(sampler, Network()), Network()
    before = chain.replay(seeds=1)
    with pytest.raises(TypeError, match="sampler: expected a Sampler, got int"):
        chain.update(3)
    for other, words in (
        (DDIMSampler(SCHEDULE, 7, eta=0.5), "steps 6, as captured, got 7"),
        (DDIMSampler(SCHEDULE, 6), "a structure .*variance='fixed'.*variance='none'"),
        (
            DDIMSampler(SCHEDULE, 6, eta=0.5, time="float"),
            "a time of dtype torch.int64, as captured, got torch.float32",
        ),
        (DDIMSampler(SCHEDULE, 6, eta=0.5, rounding="host"), "rounding once, as captured, got host"),
        (DDIMSampler(SCHEDULE, 6, eta=0.5, backend="reference"), "backend auto, as captured, got reference"),
    ):
        with pytest.raises(ValueError, match=f"sampler: expected {words}"):
            chain.update(other)
    assert torch.equal(chain.replay(seeds=1), before)
    assert torch.equal(before, sampler.sample(model, SHAPE, seeds=1, device="cpu"))
    chain = captured(DDPMSampler(SCHEDULE, [60, 30, 9]), model, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"noise at the rows \[True, True, False\]"):
        chain.update(DDPMSampler(SCHEDULE, [(60, 30), (30, 9), (9, 5)]))


# Bad input


def test_capture_refuses_bad_arguments(monkeypatch):
    sampler, model = DDPMSampler(SCHEDULE, 4), Network()
    meta = torch.zeros(3, device="meta")
    for options, error, words in (
        ({"model": 3}, TypeError, "model: expected something to call, got int"),
        ({"shape": 3}, TypeError, "shape: expected a sequence of ints"),
        ({"shape": None}, TypeError, "shape: expected a sequence of ints"),
        ({"unroll": 1}, TypeError, "unroll: expected a bool or None, got int"),
        ({"warmup": 0}, ValueError, "warmup"),
        ({"warmup": 1.5}, TypeError, "warmup"),
        ({"seeds": 1.5}, TypeError, "seeds: expected an int"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seeds: expected shape \[3\]"),
        ({"seeds": 1, "generator": torch.Generator()}, ValueError, "seeds and generator: expected one of them"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "generator: expected a generator of its own"),
        ({"generator": 5}, TypeError, "generator: expected a torch.Generator"),
        ({"model_kwargs": 5}, TypeError, "model_kwargs: expected a dict, got int"),
        ({"model_kwargs": {"y": [meta]}}, ValueError, "model_kwargs: expected tensors on cpu, got one on meta"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale and uncond_kwargs: expected both or neither"),
        ({"guidance_scale": "2", "uncond_kwargs": {}}, TypeError, "guidance_scale: expected a number"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected float32"),
    ):
        arguments = {"model": model, "shape": SHAPE, "device": "cpu", **options}
        with pytest.raises(error, match=words):
            sampler.capture(**arguments)
    assert model.calls == 0
    empty = TableSampler(type(sampler.table)(torch.zeros(0, 18, dtype=torch.float64), sampler.table.structure, []))
    with pytest.raises(ValueError, match="table: expected at least one step"):
        captured(empty, model)


def test_replay_refuses_bad_arguments():
    sampler, model = DDPMSampler(SCHEDULE, 4), Network()
    chain = captured(sampler, model, model_kwargs={"y": torch.ones(3, 1, 1, 1), "more": None})
    before = chain.replay(seeds=1)
    y = torch.ones(3, 1, 1, 1)
    state = torch.get_rng_state()
    for options, error, words in (
        ({"seeds": "1"}, TypeError, "seeds: expected an int"),
        ({"seeds": torch.zeros(3)}, TypeError, "seeds: expected an int64 tensor"),
        ({"seeds": torch.zeros(4, dtype=torch.int64)}, ValueError, r"seeds: expected shape \[3\]"),
        ({"seeds": 1, "generator": torch.Generator()}, ValueError, "seeds and generator: expected one of them"),
        ({"generator": torch.Generator()}, ValueError, "generator: expected None, the chain was captured without"),
        ({"x_T": 3}, TypeError, "x_T: expected a tensor, got int"),
        ({"x_T": torch.zeros(3, 2, 4, 4)}, ValueError, r"x_T: expected shape \[3, 2, 4, 5\]"),
        ({"x_T": torch.zeros(SHAPE, dtype=torch.float64)}, TypeError, "x_T: expected torch.float32"),
        ({"x_T": torch.zeros(SHAPE, device="meta")}, ValueError, "x_T: expected a tensor on cpu"),
        ({"out": torch.zeros(3)}, ValueError, r"out: expected shape \[3, 2, 4, 5\]"),
        ({"model_kwargs": [y]}, TypeError, "model_kwargs: expected a dict, got list"),
        (
            {"model_kwargs": {"z": y}},
            ValueError,
            r"model_kwargs: expected some of \('y', 'more'\), as captured, got 'z'",
        ),
        ({"model_kwargs": {"y": 1.0}}, TypeError, r"model_kwargs\['y'\]: expected a tensor, got float"),
        ({"model_kwargs": {"y": y[:2]}}, ValueError, r"model_kwargs\['y'\]: expected shape \[3, 1, 1, 1\]"),
        ({"model_kwargs": {"y": y.double()}}, TypeError, r"model_kwargs\['y'\]: expected torch.float32"),
        ({"model_kwargs": {"y": [y]}}, ValueError, r"model_kwargs\['y'\]: expected the form that was captured"),
        ({"model_kwargs": {"y": y * 2, "more": 3}}, ValueError, r"model_kwargs\['more'\]: expected None, .* got 3"),
        ({"model_kwargs": {"more": y}}, ValueError, r"model_kwargs\['more'\]: expected None, .* got a tensor"),
        (
            {"uncond_kwargs": {"y": y}},
            ValueError,
            "uncond_kwargs: expected None, the chain was captured without guidance",
        ),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale: expected None, the chain was captured without guidance"),
    ):
        with pytest.raises(error, match=words):
            chain.replay(**options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(chain.replay(seeds=1), before)

    generators = [torch.Generator() for _ in range(3)]
    chain = captured(sampler, model, generator=generators)
    for options, words in (
        ({"seeds": 1}, "seeds: expected None, the chain was captured with a generator"),
        (
            {"generator": torch.Generator()},
            "generator: expected a generator per sample, as captured, got one generator",
        ),
        ({"generator": generators[:2]}, "generator: expected 3, one per sample, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            chain.replay(**options)


def test_what_reads_a_tensor_cannot_be_captured():
    """The tape refuses what a capture refuses, so the tests above would have found it in the chain itself."""
    for model in (lambda x, t: x * x.mean().item(), lambda x, t: x + torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            captured(DDPMSampler(SCHEDULE, 3), model)


def test_devices_without_graphs(monkeypatch):
    monkeypatch.undo()
    sampler, model = DDPMSampler(SCHEDULE, 4), Network()
    for options in ({}, {"device": "cpu"}):
        with pytest.raises(ValueError, match="device: expected a CUDA device, got cpu; use sample"):
            sampler.capture(model, SHAPE, **options)
    assert model.calls == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device: there is no CUDA device here"):
        sampler.capture(model, SHAPE, device="cuda")


# The layer over torch.cuda


class FakeCuda:
    """What `_CudaRecorder` uses of torch.cuda, with a log; `broken` captures cannot be ended."""

    def __init__(self, monkeypatch):
        self.log, self.streams, self.sync_mode, self.broken = [], ["default"], 0, False
        fake = self

        class CUDAGraph:
            def __init__(self):
                self.generators = []

            def register_generator_state(self, generator):
                self.generators.append(generator)

            def replay(self):
                fake.log.append("replay")

        class Stream:
            def wait_stream(self, other):
                pass

        @contextmanager
        def stream(which):
            fake.streams.append(which)
            try:
                yield
            finally:
                fake.streams.pop()

        @contextmanager
        def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
            broken, fake.broken = fake.broken, False
            fake.log.append(("begin", pool, list(cuda_graph.generators)))
            try:
                yield
            finally:
                fake.log.append("end")
                if broken:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        for name, value in {
            "CUDAGraph": CUDAGraph,
            "Stream": Stream,
            "stream": stream,
            "graph": graph,
            "device": lambda device: nullcontext(),
            "current_device": lambda: 0,
            "current_stream": Stream,
            "graph_pool_handle": lambda: "pool",
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda device, pool, name=name: self.log.append((name, pool)))


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(graphs, "_BROKEN", [])
    return FakeCuda(monkeypatch)


CPU = torch.device("cpu")


def test_a_function_is_recorded_where_the_host_may_not_wait(cuda):
    recorder, seen = graphs._CudaRecorder(CPU), []
    cuda.sync_mode = 1

    def function():
        seen.append((cuda.sync_mode, cuda.streams[-1]))

    replay = recorder.record(function, ["generator"])
    assert seen == [(2, recorder.stream)]
    assert (cuda.sync_mode, cuda.streams) == (1, ["default"])
    replay()
    assert cuda.log == [("begin", "pool", ["generator"]), "end", "replay"]
    recorder.warm_up(function, 2)
    assert seen[1:] == [(1, recorder.warm)] * 2
    assert recorder.warm is not recorder.stream


def test_a_failed_capture_names_the_reason(cuda):
    recorder = graphs._CudaRecorder(CPU)

    def function():
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    with pytest.raises(RuntimeError) as caught:
        recorder.record(function, [])
    assert "called a synchronizing CUDA operation (test_graphs.py, line" in str(caught.value)
    assert "use sample" in str(caught.value) and "and more" not in str(caught.value)
    assert str(caught.value.__cause__).startswith("called a synchronizing")
    assert cuda.log == [("begin", "pool", []), "end"]
    assert (cuda.sync_mode, cuda.streams) == (0, ["default"])


@pytest.mark.parametrize("raises", [True, False])
def test_a_broken_capture_is_mended(cuda, raises):
    recorder = graphs._CudaRecorder(CPU)

    def function():
        cuda.broken = cuda.broken and raises
        if raises:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    cuda.broken = True
    words = "not permitted when stream is capturing" if raises else "due to a previous error during capture"
    with pytest.raises(RuntimeError, match=words):
        recorder.record(function, ["generator"])
    begun = ("begin", "pool", ["generator"])
    assert cuda.log == [
        begun,
        "end",
        ("_cuda_endAllocateToPool", "pool"),
        ("_cuda_releasePool", "pool"),
        ("begin", None, ["generator"]),
        "end",
    ]
    assert len(graphs._BROKEN) == 1
    assert (cuda.sync_mode, cuda.streams) == (0, ["default"])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt(), ValueError("t")])
def test_other_errors_pass(cuda, error):
    def function():
        raise error

    with pytest.raises(type(error)) as caught:
        graphs._CudaRecorder(CPU).record(function, [])
    assert caught.value is error


def test_graphs_of_compiled_functions_step_aside():
    from torch._inductor import cudagraph_trees

    assert cudagraph_trees.is_cudagraph_capture_sizes(None)
    with graphs._recordable():
        assert not cudagraph_trees.is_cudagraph_capture_sizes(None)
        assert not cudagraph_trees.is_cudagraph_capture_sizes((2, 3))
    assert cudagraph_trees.is_cudagraph_capture_sizes(None)


def test_graphs_of_compiled_functions_are_refused_where_they_cannot(monkeypatch):
    from torch._inductor import cudagraph_trees

    graphs._check_inner_graphs(0)
    monkeypatch.delattr(cudagraph_trees, "is_cudagraph_capture_sizes")
    monkeypatch.setattr(cudagraph_trees, "get_manager", lambda device, create_if_none_exists: None)
    graphs._check_inner_graphs(0)
    monkeypatch.setattr(cudagraph_trees, "get_manager", lambda device, create_if_none_exists: object())
    with pytest.raises(RuntimeError, match="compiled with mode='reduce-overhead'"):
        graphs._check_inner_graphs(0)


def test_generators_of_a_captured_chain_are_on_its_device():
    with pytest.raises(ValueError, match=r"generator: expected one on cuda:1 .* got cpu; make it with torch.Generator"):
        graphs._check_members(torch.Generator(), torch.device("cuda", 1))
