"""Training on the GPU: the sums over samples, held to the definition on the CPU in every bit, and what is made of them.

The cases and the definition are those of test_sums.py; here the operators run on the device, from copies that lie in
memory as the tensors do.
"""

from __future__ import annotations

import math

import pytest
import test_log_prob as densities
import torch
from test_ops import DTYPES, SCHEDULE, assert_equal, layouts, random_table, with_variance
from test_step_gpu import COMMON, HALF, STRUCTURES
from test_sums import (
    FORM,
    LEARNED,
    SHAPE,
    SUMS,
    Case,
    case_of,
    check,
    check_distance,
    randn,
    step_case,
    sums_of,
    without_distance,
)
from torch import Tensor

import fastdiff.noise as contract
from fastdiff import ops, reference
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.tables import COLUMN, Structure, Table, add_noise_table, ddpm_table

pytestmark = pytest.mark.cuda

WRITTEN = {"step_distance": (0, 1, 2), "step_backward": (0, 1, 2, 3, 17)}  # the outputs among the arguments
FEW = ("fixed_large", "ddim rederived")  # of the densities, in Triton
SIZES = (1, 511, 513, 1025, 4097, 262145)  # 262145: three kernels, one after another


class OnDevice:
    """The operators of a backend for CPU tensors: on copies on the device, `offset` elements off an aligned address."""

    def __init__(self, device: torch.device, backend: str, offset: int = 0) -> None:
        self.device, self.offset = device, offset
        self.prefix = "triton_" if backend == "triton" else ""

    def moved(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor.to(self.device)
        reach = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = torch.empty(self.offset + reach, dtype=tensor.dtype, device=self.device)
        memory[self.offset :] = tensor.as_strided((reach,), (1,)).to(self.device)
        return memory.as_strided(tensor.shape, tensor.stride(), self.offset)

    def run(self, name: str, arguments: tuple) -> None:
        given = [self.moved(u) if isinstance(u, Tensor) else u for u in arguments]
        getattr(torch.ops.fastdiff, self.prefix + name)(*given)
        for k, tensor in enumerate(arguments):
            if isinstance(tensor, Tensor) and k in WRITTEN[name]:
                tensor.copy_(given[k])
            elif isinstance(tensor, Tensor):
                assert torch.equal(given[k].cpu(), tensor), "an input was changed"

    def step_distance(self, *arguments) -> None:
        self.run("step_distance", arguments)

    def step_backward(self, *arguments) -> None:
        self.run("step_backward", arguments)


@pytest.fixture
def operators(device, backend):
    return OnDevice(device, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STRUCTURES, ids=lambda name: name.replace(" ", "-"))
def test_every_structure(operators, backend, name, dtype):
    few = torch.float32, *((torch.float64, torch.bfloat16) if name == COMMON[0] else ())
    if backend == "triton" and not (name in COMMON and dtype in few):
        pytest.skip("compiling each takes a second or more")
    form = with_variance(STRUCTURES[name], "fixed")
    for rounding in ("once", "host") if dtype in HALF else ("once",):
        case = case_of(form, dtype, rounding=rounding)
        assert sums_of(check(case, operators))["s"].ne(0).all()
        check(without_distance(case), operators)
        check(case._replace(grad=None, grad_second=None, seeds=None), operators, with_sums=False)
        check_distance(step_case(form, dtype, rounding=rounding), operators)
        check_distance(step_case(form, dtype, rounding=rounding, x_prev=randn(SHAPE, dtype, 3)), operators)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("variance", LEARNED)
def test_learned_variances(operators, backend, variance, dtype):
    if backend == "triton" and dtype is not torch.float32 and variance != "learned_range":
        pytest.skip("compiling each takes a second or more")
    case = case_of(Structure(clip=True, ax=True, variance=variance), dtype, shape=(3, 4, 17, 13))
    for name in layouts(case.x):
        check(case._replace(x=layouts(case.x)[name], model_output=layouts(case.model_output)[name]), operators)


@pytest.mark.parametrize("m_dtype", HALF, ids=str)
def test_float32_state_with_half_model_output(operators, m_dtype):
    check(case_of(FORM, m_dtype=m_dtype), operators)
    check_distance(step_case(FORM, m_dtype=m_dtype), operators)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(operators, size):
    batch = 2 if size > 1e5 else 3
    check(case_of(FORM, shape=(batch, size)), operators)
    check_distance(step_case(FORM, shape=(batch, size)), operators)
    check_distance(step_case(FORM, torch.float64, shape=(batch, size)), operators)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 1), (700, 3)])
def test_shapes(operators, shape):
    check_distance(step_case(FORM, shape=shape), operators)
    if math.prod(shape):
        check(case_of(FORM, shape=shape), operators)


@pytest.mark.parametrize("batch, size", [(70000, 130), (3600, 513)])
def test_more_rows_than_a_grid_has_blocks(operators, batch, size):
    """A block takes several: 70000 samples, and the 19 sums of 3600 of two leaves each, are more than 65535."""
    check_distance(step_case(FORM, shape=(batch, size)), operators)
    case = case_of(FORM, shape=(batch, size))
    if size > 512:
        check(case, operators)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_and_addresses(device, backend, dtype, offset):
    operators = OnDevice(device, backend, offset)
    shape = (3, 4, 17, 13)
    case, step = case_of(FORM, dtype, shape=shape), step_case(FORM, dtype, shape=shape)
    for name in layouts(case.x):
        moved = {key: layouts(getattr(case, key))[name] for key in ("x", "model_output", "x_prev")}
        check(case._replace(**moved), operators)
        each = layouts(randn(shape, case.compute, 9))[name]
        check(case._replace(**moved, grad_distance=each), operators)
        check_distance(step._replace(x=layouts(step.x)[name]), operators)
    ones = torch.ones((), dtype=dtype).expand(shape)
    check(case._replace(grad=ones, grad_distance=torch.ones(1).expand(3)), operators)


@pytest.mark.parametrize("scale", [torch.tensor(1.5), torch.tensor([0.0, 1.0, 7.5])], ids=["shared", "each"])
def test_guidance_rows_and_targets(operators, scale):
    form = Structure(clip=True, eps="output", ae=True, variance="fixed")
    case = case_of(form, uncond_output=randn(SHAPE, seed=9), guidance_scale=scale)
    for t in (None, torch.tensor([30, 5, 20]), torch.tensor([10, -1, 2**40])):
        assert sums_of(check(case._replace(t=t), operators))["scale"][0].ne(0)
        check_distance(case._replace(t=t, grad=None, x_prev=None, grad_distance=None), operators)
    for second in ("noise", "v"):
        grads = {"grad": randn(SHAPE, seed=1), "grad_second": randn(SHAPE, seed=2)}
        seeds = contract.seeds(1, 3)
        check(
            Case(add_noise_table(SCHEDULE), randn(SHAPE), None, **grads, seeds=seeds, second=second, row=400), operators
        )


def test_a_least_deviation(operators):
    rows = random_table(FORM).rows
    for s, min_std in ((0.0, 0.0), (0.1, 0.3), (0.1, 0.1), (0.0, 0.2)):
        rows[:, COLUMN["s"]] = s
        case = case_of(FORM)._replace(table=Table(rows, FORM, random_table(FORM).timesteps), min_std=min_std)
        check(case, operators)
        check_distance(case._replace(grad=None, grad_second=None, grad_distance=None, seeds=None), operators)


# Log-densities and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", densities.CASES)
def test_the_ratio_of_an_unchanged_model_is_1(device, backend, name, dtype):
    """Of what the step says to what is asked of its record, in a batch and alone."""
    if backend == "triton" and not (name in FEW and dtype is torch.float32):
        pytest.skip("compiling each takes a second or more")
    case = densities.CASES[name]
    tensors = densities.inputs(case, dtype)
    cpu = densities.step(case, tensors, seeds=densities.SEEDS)
    tensors, seeds = {key: u.to(device) for key, u in tensors.items()}, densities.SEEDS.to(device)
    t = torch.tensor(densities.T, device=device)
    x_prev, before = densities.step(case, tensors, t, seeds=seeds, backend=backend)
    assert_equal(x_prev.cpu(), cpu[0])
    torch.testing.assert_close(before.cpu(), cpu[1], rtol=1e-5, atol=1e-3)  # the logarithm is each device's own
    after = densities.log_prob(case, x_prev, tensors, t, backend=backend)
    assert bool(((after - before).exp() == 1).all())
    for k, at in enumerate(densities.T):
        alone = {key: u[k : k + 1] for key, u in tensors.items()}
        given = {"t": None, "row": case.table.rows_of_t[at], "backend": backend}
        assert_equal(densities.step(case, alone, seeds=seeds[k : k + 1], **given)[1], before[k : k + 1])
        assert_equal(densities.log_prob(case, x_prev[k : k + 1], alone, **given), before[k : k + 1])


@pytest.mark.parametrize("name", densities.CASES)
def test_gradients_of_a_trained_table_and_of_the_scale(device, backend, name):
    if backend == "triton" and name not in FEW:
        pytest.skip("compiling each takes a second or more")
    case, found = densities.CASES[name], []
    for where, kind in ((device, backend), (torch.device("cpu"), "native")):
        tensors = {key: u.to(where) for key, u in densities.inputs(case, torch.float32).items()}
        tensors = densities.leaves(tensors)
        table, rows = densities.trained(case)
        t, seeds = torch.tensor(densities.T, device=where), densities.SEEDS.to(where)
        x_prev, density = densities.step(case, tensors, t, table=table, seeds=seeds, backend=kind)
        loss = (density * torch.linspace(-1, 1, len(t), device=where)).sum() + x_prev.square().sum()
        found.append(densities.gradients(loss, tensors, rows))
    ours, theirs = found
    for key in theirs:
        assert theirs[key].ne(0).any() or (name, key) == ("x_prev", "x"), key
        least = 1e-5 * theirs[key].abs().max().item()
        torch.testing.assert_close(ours[key].cpu(), theirs[key], rtol=1e-4, atol=least)


@pytest.mark.parametrize("source", ["seeds", "generator"])
@pytest.mark.parametrize("kind", ["ddpm", "ddim", "learned_range"])
def test_checkpoints_give_the_gradients_of_the_whole_chain(device, backend, kind, source):
    """The same bits, and with seeds those of the CPU to rounding."""
    options = {"steps": 8, "clip": 1.0}
    start = randn((2, 3, 8, 8))

    def chain(where: torch.device, kernels: str, grad: str) -> list[Tensor]:
        if kind == "ddim":
            sampler = DDIMSampler(SCHEDULE, eta=0.5, backend=kernels, **options)
        else:
            variance = "learned_range" if kind == "learned_range" else "fixed_small"
            sampler = DDPMSampler(SCHEDULE, variance=variance, backend=kernels, **options)
        weight, leaf = torch.tensor(0.3, device=where).requires_grad_(), start.to(where).requires_grad_()

        def model(x: Tensor, t: Tensor) -> Tensor:
            m = torch.tanh(weight * x + t.reshape(-1, 1, 1, 1) / 1000)
            return torch.cat([m, weight * m], 1) if kind == "learned_range" else m

        noise = {"seeds": 4} if source == "seeds" else {"generator": torch.Generator(where).manual_seed(4)}
        x = sampler.sample(model, x_T=leaf, grad=grad, **noise)
        return [x.detach(), *torch.autograd.grad(x.square().sum(), (leaf, weight))]

    whole, again = (chain(device, backend, grad) for grad in ("full", "checkpoint"))
    for mine, theirs in zip(again, whole, strict=True):
        assert theirs.ne(0).any()
        assert_equal(mine, theirs)
    if source == "seeds":
        for mine, theirs in zip(whole, chain(torch.device("cpu"), "native", "full"), strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-4)


# What surrounds the kernels


def guided_density(device, backend):
    """A log-density and its gradients, summed over samples for that of the scale, as a function of the state."""
    table, size = ddpm_table(SCHEDULE, 10, clip=1.0), (2, 3, 300, 300)
    x, m, uncond, x_prev = (randn(size, seed=k).to(device) for k in range(4))
    scale = torch.tensor([1.5, 7.5], device=device, requires_grad=True)

    def function(x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        given = {"uncond_output": uncond, "guidance_scale": scale, "backend": backend}
        density = ops.log_prob(table, x_prev, m, None, leaf, row=3, **given)
        return [density.detach(), *torch.autograd.grad(density.sum(), (leaf, scale))]

    return function, x


def test_two_hundred_and_fifty_repeats(device, backend):
    function, x = guided_density(device, backend)
    first = function(x)
    assert first[2].ne(0).any()
    for _ in range(250 if device.type == "cuda" else 3):
        assert all(torch.equal(a, b) for a, b in zip(function(x), first, strict=True))


def test_streams_do_not_share_what_they_have_not_summed(gpu, backend):
    """The partial sums of one stream, freed while its kernels wait, are not given to another."""
    function, x = guided_density(gpu, backend)
    inputs = [x * k for k in (1.0, 0.5, 0.25)]
    expected = [function(u) for u in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in inputs], []
    for _ in range(8):
        for stream, u in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
                found.append(function(u))
    torch.cuda.synchronize()
    for k, results in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(results, expected[k % 3], strict=True))


def test_captured(gpu, backend):
    """The kernels that follow one another, and their memory, in a graph: replays of other inputs."""
    table = ddpm_table(SCHEDULE, 10, clip=1.0)
    rows, flags = table.to(gpu, torch.float32), table.structure.flags
    shape = (3, 262145)
    x, m, x_prev, grad = (torch.zeros(shape, device=gpu) for _ in range(4))
    distance, sums, ones = torch.zeros(3, device=gpu), torch.zeros(3, SUMS, device=gpu), torch.ones(3, device=gpu)
    prefix = "triton_" if backend == "triton" else ""

    def run() -> None:
        step = (x, m, None, None, None, None, rows, None, None, 3, flags)
        getattr(torch.ops.fastdiff, f"{prefix}step_distance")(None, None, distance, x_prev, *step, 0.0)
        names = (None, None, None, None, grad, None, x, m, None, None, x_prev, None, rows, None, None, 3, flags)
        getattr(torch.ops.fastdiff, f"{prefix}step_backward")(*names, sums, x_prev, ones, 0.0)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in (1, 2):
        for k, tensor in enumerate((x, m, x_prev, grad)):
            tensor.copy_(randn(shape, seed=10 * seed + k))
        kept = torch.full((1 << 22,), math.nan, device=gpu)  # what is given out now is no memory of the graph
        graph.replay()
        found = distance.clone(), sums.clone()
        run()
        assert torch.equal(distance, found[0]) and torch.equal(sums, found[1])
        del kept


@pytest.mark.parametrize("at", ["t", "row"])
def test_the_host_does_not_wait(gpu, backend, strict_sync, at):
    x = randn((2, 3, 40, 40)).to(gpu)
    table = ddpm_table(SCHEDULE, 10, clip=1.0)
    t, row = (torch.tensor(table.timesteps[3:5], device=gpu), None) if at == "t" else (None, 3)
    leaves = [u.requires_grad_() for u in (x.clone(), x.sin(), x.cos(), torch.tensor([1.5, 7.5], device=gpu))]
    leaf, m, uncond, scale = leaves
    given = {"row": row, "uncond_output": uncond, "guidance_scale": scale, "backend": backend}
    seeds = torch.arange(2, device=gpu)

    def steps() -> list[Tensor]:
        found, density = ops.step(table, m, t, leaf, seeds=seeds, log_prob=True, **given)
        again = ops.log_prob(table, found.detach(), m, t, leaf, **given)
        return [found, density, *torch.autograd.grad(density.sum() + again.sum() + found.sum(), leaves)]

    steps()
    with strict_sync:
        found = steps()
    assert all(bool(u.isfinite().all()) for u in found)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(device, backend):
    """Zeros but for the first and the last elements: the sum is that of two trees, far from one another."""
    power, few = (31 if device.type == "cuda" else 13), 64
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory")
    table = ddpm_table(SCHEDULE, 10, clip=1.0)
    ends = [torch.randn(2 * few, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(4)]

    def whole(values: Tensor) -> Tensor:
        tensor = torch.zeros(1, 2**power + few, dtype=torch.bfloat16, device=device)
        tensor[0, :few], tensor[0, -few:] = values[:few].to(device), values[few:].to(device)
        return tensor

    x, m, x_prev, grad = map(whole, ends)
    prefix = "triton_" if backend == "triton" else ""
    distance, sums = torch.full((1,), 7.0, device=device), torch.full((1, SUMS), 7.0, device=device)
    rows = table.to(device, torch.bfloat16)
    step = (x, m, None, None, None, None, rows, None, None, 3, table.structure.flags)
    getattr(torch.ops.fastdiff, f"{prefix}step_distance")(None, None, distance, x_prev, *step, 0.0)
    names = (None, None, None, None, grad, None, x, m, None, None, x_prev, None, *step[6:])
    getattr(torch.ops.fastdiff, f"{prefix}step_backward")(*names, sums, x_prev, torch.ones_like(distance), 0.0)
    chosen = table.to("cpu", torch.bfloat16)[3]
    halves = [[end[k * few : (k + 1) * few][None] for end in ends] for k in range(2)]
    expected = [reference.tree_sum(reference.distance(chosen, table.structure, p, u, v)) for u, v, p, _ in halves]
    assert torch.equal(distance.cpu(), expected[0] + expected[1])
    expected = [
        reference.step_backward(
            chosen, table.structure, g, None, u, v, z=p, x_prev=p, grad_distance=torch.ones(1), with_sums=True
        ).sums
        for u, v, p, g in halves
    ]
    assert torch.equal(sums.cpu(), expected[0] + expected[1])
