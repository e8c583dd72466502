"""The step under what torch puts around an operation: autograd's checks, torch.func, torch.compile, torch.export,
autocast, checkpoints and hooks. Values are those of the definition (backend="reference") under plain autograd;
`TestFused` asks in addition that a kernel gave them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import host_kernels
import pytest
import torch
from functorch.compile import make_boxed_func
from test_backward import randn
from test_ops import SCHEDULE, assert_equal, needs_native, random_table
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastdiff.noise as contract
from fastdiff import ops
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.tables import COLUMN, Structure, Table, add_noise_table, ddim_table, ddpm_table

CHAIN = [400, 300, 200, 100]
SHAPE = (3, 2, 3)
T = (300, 100, 400)  # of the samples; the step from 100 adds no noise
SEEDS = contract.seeds(5, SHAPE[0])


class Case(NamedTuple):
    """A step with all of its outputs, and whether it has guidance; `target` makes it add_noise, `density` (a reduction)
    the log-density of a recorded transition."""

    table: Table
    guided: bool = False
    with_x0: bool = False
    target: str | None = None
    density: str | None = None

    @property
    def noisy(self) -> bool:
        return self.table.structure.variance != "none" and self.density is None


def ddpm(**options: Any) -> Table:
    return ddpm_table(SCHEDULE, CHAIN, **options)


def ddim(**options: Any) -> Table:
    return ddim_table(SCHEDULE, CHAIN, **options)


def divided(structure: Structure) -> Table:
    """Rows as those of hosts that divide; our own multiply."""
    return Table(random_table(structure, seed=2).rows, structure, CHAIN)


CASES = {
    "ddpm": Case(ddpm()),
    "ddpm clipped": Case(ddpm(clip=1.0), with_x0=True),
    "ddpm x0": Case(ddpm(prediction="x0", variance="fixed_large", clip=0.8)),
    "ddpm x_prev": Case(ddpm(prediction="x_prev"), with_x0=True),
    "v": Case(ddim(prediction="v", eta=0.5), with_x0=True),
    "ddim": Case(ddim(), guided=True),
    "ddim rederived": Case(ddim(eps="rederived", clip=1.0, eta=0.5), guided=True, with_x0=True),
    "divided": Case(
        divided(Structure(clip=True, x0_divide=True, eps="rederived", eps_divide=True, ae=True, variance="fixed"))
    ),
    "learned": Case(ddpm(variance="learned", clip=1.0)),
    "learned_range": Case(ddpm(variance="learned_range", clip=1.0), guided=True, with_x0=True),
    "learned_plain": Case(ddpm(variance="learned_plain")),
    "add_noise": Case(add_noise_table(SCHEDULE), target="noise"),
    "add_noise v": Case(add_noise_table(SCHEDULE), target="v"),
    "log_prob": Case(ddpm(clip=1.0, variance="fixed_large"), guided=True, density="sum"),
    "log_prob of elements": Case(ddim(eta=0.7, eps="rederived"), density="none"),
    "log_prob learned": Case(ddpm(variance="learned_range", clip=1.0), density="mean"),
}
every_case = pytest.mark.parametrize("name", CASES)


def inputs(case: Case, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    """Every floating tensor that the step depends on."""
    structure = case.table.structure
    found = {"x": randn(shape, dtype)}
    if case.target is None:
        wide = (shape[0], 2 * shape[1], *shape[2:]) if structure.learned else shape
        found["model_output"] = randn(wide, dtype, 1)
        if structure.variance == "learned_plain":
            found["model_output"][:, shape[1] :].abs_().add_(0.1)
    if case.guided:
        found["uncond_output"] = randn(shape, dtype, 2)
        found["guidance_scale"] = torch.linspace(0.5, 3.0, shape[0], dtype=dtype)
    if case.noisy:
        found["noise"] = randn(shape, dtype, 3)
    return found


def run(case: Case, tensors: dict[str, Tensor], t: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    """The outputs of a step; without noise among the tensors, that of SEEDS."""
    given = dict(tensors) | options
    x, m, table = given.pop("x"), given.pop("model_output", None), given.pop("table", case.table)
    if t is None:
        t = torch.tensor(T, device=x.device)
    if case.noisy and "noise" not in given:
        given.setdefault("seeds", SEEDS)
    if case.target is not None:
        return ops.add_noise(x, t, table, target=case.target, **given)
    if case.density is not None:
        recorded = torch.arange(x.shape[-1], device=x.device) % 5 * 0.25 - 0.5  # numbers that every dtype holds
        recorded = recorded.to(x.dtype).expand(x.shape)
        return (ops.log_prob(table, recorded, m, t, x, reduction=case.density, min_logprob_std=0.1, **given),)
    function = ops.step_with_x0 if case.with_x0 else ops.step
    found = function(table, m, t, x, **given)
    return found if case.with_x0 else (found,)


def function_of(case: Case, names: Any, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The step as a function of tensors alone."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return run(case, dict(zip(names, tensors, strict=True)), **options)

    return function


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar whose gradient is different at each element of each output."""
    return sum(
        ((k + 1.5) * u.square() + u * torch.arange(u.numel(), device=u.device, dtype=u.dtype).view(u.shape)).sum()
        for k, u in enumerate(outputs)
    )


def leaves(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [u.detach().clone().requires_grad_() for u in tensors.values()]


def gradients(case: Case, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Of `loss_of` with respect to every tensor."""
    given = leaves(tensors)
    return torch.autograd.grad(loss_of(function_of(case, tensors, **options)(*given)), given)


def close(mine: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Derivatives against finite differences


def table_of(case: Case, coefficients: Tensor) -> Table:
    """The case's table with other coefficients, before the noise words."""
    words = case.table.rows[:, COLUMN["t"] :]
    return Table(torch.cat([coefficients, words], 1), case.table.structure, case.table.timesteps, name=case.table.name)


@every_case
def test_derivatives_of_every_tensor(name):
    case = CASES[name]
    tensors = inputs(case)
    function = function_of(case, tensors)
    assert torch.autograd.gradcheck(
        function, leaves(tensors), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, leaves(tensors), check_fwd_over_rev=True)


@every_case
def test_derivatives_of_the_rows(name):
    """Plain rows in training: all of their columns but the noise words."""
    case = CASES[name]
    if case.target is not None:  # 1000 rows otherwise
        rows = case.table.rows[[100, 300, 400]]
        rows[:, COLUMN["t"]] = torch.arange(3.0, dtype=torch.float64)
        case = case._replace(table=Table(rows, case.table.structure, [0, 1, 2], name="add_noise"))
    tensors = inputs(case)
    t = torch.tensor([1, 0, 2]) if case.target else None
    names = ["x", *(n for n in ("model_output", "guidance_scale") if n in tensors)]

    def function(coefficients: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        given = tensors | dict(zip(names, others, strict=True))
        return run(case, given, t, table=table_of(case, coefficients))

    coefficients = case.table.rows[:, : COLUMN["t"]]
    # the output does not depend on infinite bounds, which cannot be moved
    coefficients[:, COLUMN["lo"] : COLUMN["hi"] + 1].clamp_(-1e3, 1e3)
    given = leaves({"rows": coefficients} | {name: tensors[name] for name in names})
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


MAKERS: dict[str, Callable[[Tensor], Table]] = {
    "ddpm": lambda schedule: ddpm_table(schedule, clip=1.0),
    "ddpm v": lambda schedule: ddpm_table(schedule, prediction="v", variance="fixed_large"),
    "learned_range": lambda schedule: ddpm_table(schedule, variance="learned_range", clip=1.0),
    "ddim": lambda schedule: ddim_table(schedule, eta=0.3),
    "ddim x0": lambda schedule: ddim_table(schedule, prediction="x0"),
    "ddim rederived": lambda schedule: ddim_table(schedule, clip=1.0, eps="rederived"),
    "add_noise": lambda schedule: add_noise_table(schedule),
}


@pytest.mark.parametrize("name", MAKERS)
def test_derivatives_of_a_schedule(name):
    schedule = torch.tensor([0.97, 0.8, 0.55, 0.3, 0.1], dtype=torch.float64)
    t = torch.tensor([3, 1, 0])  # the last row adds no noise
    target = "v" if name == "add_noise" else None

    def function(schedule: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        table = MAKERS[name](schedule)
        case = Case(table, with_x0=target is None, target=target)
        return run(case, inputs(case) | {"x": x}, t)

    given = leaves({"schedule": schedule, "x": randn(SHAPE, torch.float64)})
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)
    (found,) = torch.autograd.grad(loss_of(function(*given)), given[:1])
    # an alpha_bar that no sample's step uses has no gradient, and those that it does use have one
    used = {0, 1, 3} if name == "add_noise" else {0, 1, 2, 3}
    assert set(found.nonzero().flatten().tolist()) == used


def test_derivatives_of_eta():
    """Rows filled from eta by the caller: the gradient is that of tables made for etas on both sides."""
    x, m, z = (randn(SHAPE, torch.float64, k) for k in range(3))
    t = torch.tensor([300, 200, 400])

    def result(table: Table) -> Tensor:
        return loss_of((ops.step(table, m, t, x, noise=z),))

    eta = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    one = ddim(eta=1.0)
    columns = list(one.rows[:-1].unbind(1))  # the last row adds no noise
    sigma = eta * columns[COLUMN["s"]]
    columns[COLUMN["ae"]] = (ddim().rows[:-1, COLUMN["ae"]] ** 2 - sigma**2).sqrt()
    columns[COLUMN["s"]] = sigma
    trained = result(Table(torch.stack(columns, 1), one.structure, CHAIN[:-1]))
    above, below = (result(ddim(eta=0.6 + h)) for h in (1e-5, -1e-5))
    torch.testing.assert_close(trained, result(ddim(eta=0.6)))
    torch.testing.assert_close(torch.autograd.grad(trained, eta)[0], (above - below) / 2e-5, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("used", [(0,), (1,)], ids=["x_prev alone", "x0 alone"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.with_x0 or case.target])
def test_an_output_that_is_not_used_has_no_part(name, used):
    """By an undefined gradient, as when it is dropped, and by torch.func, which makes it zeros."""
    case = CASES[name]
    tensors = inputs(case)
    given = leaves(tensors)
    (index,) = used

    def one(*values: Tensor, **options: Any) -> Tensor:
        return loss_of((function_of(case, tensors, **options)(*values)[index],))

    theirs = torch.autograd.grad(one(*given, backend="reference"), given, allow_unused=True)
    theirs = [torch.zeros_like(leaf) if u is None else u for u, leaf in zip(theirs, given, strict=True)]
    mine = torch.autograd.grad(one(*given), given, allow_unused=True)
    close([torch.zeros_like(leaf) if u is None else u for u, leaf in zip(mine, given, strict=True)], theirs)
    close(torch.func.grad(one, argnums=tuple(range(len(given))))(*tensors.values()), theirs)


# opcheck, of every operator that there is


def _operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fastdiff::") for name in names if name.startswith("fastdiff::"))


FORM = Structure(clip=True, eps="rederived", ae=True, ax=True, variance="learned_range")


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every second element of something transposed."""
    *rest, last = shape
    return randn((2 * last, *rest[::-1]), dtype).permute(*range(len(rest), -1, -1))[..., ::2]


def operand_sets() -> Iterator[tuple[tuple[int, ...], torch.dtype, Callable[[tuple[int, ...], torch.dtype], Tensor]]]:
    for shape, dtype in (((2, 3, 4), torch.float32), ((0, 3, 4), torch.float32), ((2, 3, 0), torch.float64)):
        yield shape, dtype, randn
    for dtype in (torch.float64, torch.bfloat16):
        yield (2, 3, 4), dtype, strided


def _rows(dtype: torch.dtype, structure: Structure = FORM) -> dict[str, Any]:
    table = random_table(structure)
    return {"table": table.to("cpu", dtype), "row": 1, "flags": structure.flags}


def _operands(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> dict[str, Any]:
    wide = (shape[0], 2 * shape[1], *shape[2:])
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    return _rows(dtype) | {
        "x": make(shape, dtype),
        "model_output": make(wide, dtype),
        "uncond_output": make(shape, dtype),
        "guidance_scale": torch.linspace(1, 2, shape[0], dtype=compute),
        "seeds": contract.seeds(1, shape[0]),
    }


def step_samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
    given = _operands(shape, dtype, make) | {"out": make(shape, dtype), "second": make(shape, dtype)}
    yield given
    yield given | {"t": torch.full((shape[0],), 20), "t_to_row": random_table(FORM).row_map("cpu"), "row": 0}
    yield given | {"second": None, "seeds": None, "noise": make(shape, dtype)}
    yield given | {"second": None, "uncond_output": None, "guidance_scale": None}


def step_row_samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
    given = _operands(shape, dtype, make) | {"out": make(shape, dtype), "place": torch.tensor([1, FORM.flags])}
    for noise in (given["seeds"], make(shape, dtype)):
        yield given | {"noise": noise}


def step_torch_samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
    if make is strided:
        return  # torch's stream is played in logical order, in contiguous tensors
    given = _operands(shape, dtype, make) | {"out": make(shape, dtype), "second": make(shape, dtype)}
    yield given | {"state": None, "seed": 5, "offset": 0, "threads": 1024}


def step_backward_samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
    given = _operands(shape, dtype, make)
    given |= {name: make(shape, dtype) for name in ("grad_x", "grad_uncond_output", "grad_noise", "grad")}
    given |= {"grad_model_output": make(given["model_output"].shape, dtype), "grad_second": make(shape, dtype)}
    yield given
    yield given | {"grad_second": None, "grad_noise": None, "grad_uncond_output": None}
    width = given["table"].shape[1] + 1
    yield given | {"sums": torch.empty(shape[0], width, dtype=given["table"].dtype)}
    fixed = dataclasses.replace(FORM, variance="fixed")
    density = _rows(dtype, fixed) | {"model_output": make(shape, dtype), "grad_model_output": make(shape, dtype)}
    density |= {"x_prev": make(shape, dtype), "grad_distance": make((shape[0],), given["table"].dtype), "min_std": 0.1}
    yield given | density | {"grad": None, "grad_second": None, "grad_noise": None}
    yield given | {"grad": None, "t": torch.full((shape[0],), 20), "t_to_row": random_table(FORM).row_map("cpu")}


def step_distance_samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
    structure = Structure(clip=True, eps="rederived", ae=True, ax=True, variance="fixed")
    given = _operands(shape, dtype, make) | _rows(dtype, structure) | {"min_std": 0.1}
    compute = given["guidance_scale"].dtype
    given |= {"model_output": make(shape, dtype), "squares": make(shape, compute)}
    yield given | {"out": make(shape, dtype)}
    yield given | {"out": make(shape, dtype), "squares": None, "distance": torch.empty(shape[0], dtype=compute)}
    recorded = {"x_prev": make(shape, dtype), "seeds": None, "distance": torch.empty(shape[0], dtype=compute)}
    yield given | recorded
    yield given | recorded | {"t": torch.full((shape[0],), 20), "t_to_row": random_table(structure).row_map("cpu")}


def normals_samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
    if make is not strided:
        yield {"out": make(shape, dtype), "seeds": contract.seeds(1, shape[0]), "t": 3, "repeat": 1, "domain": 1}


def dynamic_threshold_samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
    yield {"out": make(shape, dtype), "x0": make(shape, dtype), "ratio": 0.9, "max_value": 2.0}


def torch_normal_samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
    if make is not strided and dtype is torch.float32 and math.prod(shape) >= 16:
        yield {"out": make(shape, dtype), "state": torch.Generator().manual_seed(3).get_state()}


def settings_samples(name: str, value: int) -> Callable[..., Iterator[dict[str, Any]]]:
    def samples(shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> Iterator[dict[str, Any]]:
        if make is not strided:
            yield {name: value}

    return samples


SAMPLES = {
    "step": step_samples,
    "step_row": step_row_samples,
    "step_torch": step_torch_samples,
    "step_backward": step_backward_samples,
    "step_distance": step_distance_samples,
    "normals": normals_samples,
    "dynamic_threshold": dynamic_threshold_samples,
    "torch_normal": torch_normal_samples,
    "cpu_isa": settings_samples("select", -1),
    "cuda_supports": settings_samples("device", 0),
}
# These have CUDA kernels alone, which the tests compile for the CPU too, as operators of another name.
ON_CUDA_ALONE = ("step_torch", "cuda_supports")
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@needs_native
@pytest.mark.parametrize("name", _operators())
def test_opcheck(name):
    if name.startswith("triton_"):
        # Without a GPU they have no kernel to run (the interpreter needs a process of its own). What opcheck looks at
        # stands beside the kernel: the same schema, fake and aliases as of the operator without the prefix.
        plain = name.removeprefix("triton_")
        operator, twin = (getattr(torch.ops.fastdiff, n).default for n in (name, plain))
        assert plain in SAMPLES and str(operator._schema).replace("triton_", "") == str(twin._schema)
        return
    assert name in SAMPLES, f"no samples for the operator {name}"
    space = torch.ops.fastdiff
    if name in ON_CUDA_ALONE:
        reason = host_kernels.load()
        if reason is not None:
            pytest.skip(reason)
        space = host_kernels.operators()
        if name == "step_torch":
            torch.library.register_fake("fastdiff_host::step_torch", lambda *args: None, allow_override=True)
    operator = getattr(space, name).default
    count = 0
    for shape, dtype, make in operand_sets():
        for given in SAMPLES[name](shape, dtype, make):
            arguments = [given.get(u.name, u.default_value) for u in operator._schema.arguments]
            found = torch.library.opcheck(operator, arguments)
            assert tuple(found) == CHECKS and set(found.values()) == {"SUCCESS"}
            count += 1
    assert count > 0


# torch.func


def direction(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(randn(u.shape, u.dtype, 20 + k) for k, u in enumerate(tensors.values()))


def along(function: Callable[..., tuple[Tensor, ...]], point: Any, move: Any, h: float = 1e-6) -> list[Tensor]:
    """The derivative of a function along a direction, by finite differences."""
    sides = [function(*(p + k * h * d for p, d in zip(point, move, strict=True))) for k in (1, -1)]
    return [(a - b) / (2 * h) for a, b in zip(*sides, strict=True)]


@every_case
def test_reverse_mode_of_torch_func(name):
    case = CASES[name]
    tensors = inputs(case)
    function, values = function_of(case, tensors), tuple(tensors.values())
    expected = gradients(case, tensors, backend="reference")
    every = tuple(range(len(values)))
    close(torch.func.grad(lambda *u: loss_of(function(*u)), argnums=every)(*values), expected)
    outputs, pull = torch.func.vjp(function, *values)
    cotangents = [u.detach().requires_grad_() for u in outputs]
    close(pull(torch.autograd.grad(loss_of(tuple(cotangents)), cotangents)), expected)
    close(outputs, function_of(case, tensors, backend="reference")(*values))


@every_case
def test_forward_mode_of_torch_func(name):
    case = CASES[name]
    tensors = inputs(case)
    function, values = function_of(case, tensors), tuple(tensors.values())
    outputs, tangents = torch.func.jvp(function, values, direction(tensors))
    close(outputs, function(*values))
    close(tangents, along(function, values, direction(tensors)), 1e-6)
    for k, one in enumerate(tensors):
        move = direction(tensors)[k]

        def of_one(value: Tensor, one: str = one) -> tuple[Tensor, ...]:
            return run(case, tensors | {one: value})

        _, tangents = torch.func.jvp(of_one, (tensors[one],), (move,))
        close(tangents, along(of_one, (tensors[one],), (move,)), 1e-6)
        assert any(u.abs().sum() > 0 for u in tangents)


@every_case
def test_jacobians_and_hessians(name):
    case = CASES[name]
    tensors = inputs(case)
    function, values = function_of(case, tensors), tuple(tensors.values())
    every = tuple(range(len(values)))
    plain = torch.autograd.functional.jacobian(function_of(case, tensors, backend="reference"), values)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        for mine, theirs in zip(jacobian(function, argnums=every)(*values), plain, strict=True):
            close(mine, theirs)

    def loss(*u: Tensor, backend: str = "auto") -> Tensor:
        return loss_of(function_of(case, tensors, backend=backend)(*u))

    move = direction(tensors)
    given = leaves(tensors)
    first = torch.autograd.grad(loss(*given, backend="reference"), given, create_graph=True)
    product = sum((a * b).sum() for a, b in zip(first, move, strict=True))
    second = torch.autograd.grad(product, given, allow_unused=True)
    second = [torch.zeros_like(leaf) if u is None else u for u, leaf in zip(second, given, strict=True)]
    _, forward_over_reverse = torch.func.jvp(torch.func.grad(loss, argnums=every), values, move)
    close(forward_over_reverse, second)
    _, pull = torch.func.vjp(torch.func.grad(loss, argnums=every), *values)
    close(pull(move), second)


# vmap

TENSORS = ("x", "model_output", "t", "seeds")
WAYS = [dims for dims in itertools.product((0, None), repeat=4) if any(d is not None for d in dims)]
WAYS += [(1, 0, None, 1), (-1, 2, 0, None), (3, -1, 1, -1), (None, 1, -1, 0)]


def stacked(tensors: dict[str, Tensor], dims: tuple[int | None, ...], size: int = 4) -> list[Tensor]:
    """Another dimension of different values, where dims says so."""
    found = []
    for dim, (name, tensor) in zip(dims, tensors.items(), strict=True):
        if dim is None:
            found.append(tensor)
        elif name == "t":
            found.append(torch.stack([tensor.roll(k) for k in range(size)], dim))
        elif tensor.is_floating_point():
            parts = [tensor + 0.25 * k for k in range(size)]
            found.append(torch.stack(parts, dim if dim >= 0 else dim + tensor.dim() + 1))
        else:
            found.append(torch.stack([tensor + 11 * k for k in range(size)], dim))
    return found


def in_turn(function: Callable[..., Any], dims: tuple[int | None, ...], values: list[Tensor]) -> list[Tensor]:
    """What vmap stands for: one call after another."""
    size = next(u.shape[d] for u, d in zip(values, dims, strict=True) if d is not None)
    calls = [
        function(*(u if d is None else u.select(d, k) for u, d in zip(values, dims, strict=True))) for k in range(size)
    ]
    return [torch.stack(parts) for parts in zip(*calls, strict=True)]


@pytest.mark.parametrize("name", ["ddpm clipped", "learned_range"])
@pytest.mark.parametrize("dims", WAYS, ids=str)
def test_vmap(name, dims):
    """Over the states, model outputs, timesteps and seeds, or some of them: in every bit, and its gradient."""
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    fixed = {n: tensors[n] for n in ("uncond_output", "guidance_scale") if n in tensors}
    base = {"x": tensors["x"], "model_output": tensors["model_output"], "t": torch.tensor(T), "seeds": SEEDS}
    values = stacked(base, dims)

    def function(x: Tensor, m: Tensor, t: Tensor, seeds: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return run(case, fixed | {"x": x, "model_output": m}, t, seeds=seeds, **options)

    def plain(*values: Tensor) -> tuple[Tensor, ...]:
        return function(*values, backend="reference")

    mapped = torch.vmap(function, dims)
    for mine, theirs in zip(mapped(*values), in_turn(plain, dims, values), strict=True):
        assert_equal(mine, theirs)
    # vmap inside of the gradient, the gradient inside of vmap
    given = [u.requires_grad_() for u in values[:2]]
    mine = torch.autograd.grad(loss_of(mapped(*given, *values[2:])), given)
    close(mine, torch.autograd.grad(loss_of(tuple(in_turn(plain, dims, values))), given), 1e-4)
    values = [u.detach() for u in values]
    per_call = torch.func.grad(lambda *u: loss_of(function(*u)), argnums=(0, 1))
    per_call_plain = torch.func.grad(lambda *u: loss_of(plain(*u)), argnums=(0, 1))
    close(torch.vmap(per_call, dims)(*values), in_turn(per_call_plain, dims, values), 1e-4)


@every_case
def test_vmap_of_every_case(name):
    """Over every tensor at once, the scale of guidance and the noise included, and nested over all of them twice."""
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    function = function_of(case, tensors)
    plain = function_of(case, tensors, backend="reference")
    dims = (0,) * len(tensors)
    values = stacked(tensors, dims)
    for mine, theirs in zip(torch.vmap(function)(*values), in_turn(plain, dims, values), strict=True):
        assert_equal(mine, theirs)
    twice = [torch.stack([u, u * 0.5]) for u in values]
    expected = in_turn(lambda *u: in_turn(plain, dims, u), dims, twice)
    for mine, theirs in zip(torch.vmap(torch.vmap(function))(*twice), expected, strict=True):
        assert_equal(mine, theirs)
    outer_alone = torch.vmap(torch.vmap(function), in_dims=(0, *(None,) * (len(values) - 1)))
    expected = [in_turn(plain, dims, [x, *values[1:]]) for x in twice[0]]
    for mine, *theirs in zip(outer_alone(twice[0], *values[1:]), *expected, strict=True):
        assert_equal(mine, torch.stack(theirs))


def test_vmap_of_the_scale_of_guidance_alone():
    case = CASES["ddim rederived"]
    tensors = inputs(case, torch.float32)

    def function(scale: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return run(case, tensors | {"guidance_scale": scale}, **options)

    for scales in (torch.linspace(0, 5, 4), torch.rand(4, SHAPE[0])):  # one for all samples of a call, or each its own
        expected = in_turn(lambda scale: function(scale, backend="reference"), (0,), [scales])
        for mine, theirs in zip(torch.vmap(function)(scales), expected, strict=True):
            assert_equal(mine, theirs)


def test_out_dims_and_chunks_of_vmap():
    case = CASES["ddpm clipped"]
    tensors = inputs(case, torch.float32)
    function = function_of(case, tensors)
    values = stacked(tensors, (0,) * len(tensors))
    plain = torch.vmap(function)(*values)
    for mine, theirs, dim in zip(torch.vmap(function, out_dims=(1, -1))(*values), plain, (1, -1), strict=True):
        assert_equal(mine.movedim(dim, 0), theirs)
    for mine, theirs in zip(torch.vmap(function, chunk_size=3)(*values), plain, strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize("t", [200, torch.tensor(200), None], ids=["int", "tensor", "row"])
@pytest.mark.parametrize("table", [ddim(clip=1.0), ddpm(clip=1.0)], ids=["ddim", "ddpm"])
def test_vmap_of_one_timestep_for_all(table, t):
    """The shortest call, which finds its way without the checks where no transform is under way."""
    x, m = randn((4, *SHAPE)), randn((4, *SHAPE), seed=1)
    options: dict[str, Any] = {"row": 2} if t is None else {}
    if table.structure.variance != "none":
        options["seeds"] = 7  # an int stands for the same seeds in every call
    expected = torch.stack(
        [ops.step(table, b, t, a, backend="reference", **options) for a, b in zip(x, m, strict=True)]
    )
    assert_equal(torch.vmap(lambda x, m: ops.step(table, m, t, x, **options))(x, m), expected)
    one = torch.stack([ops.step(table, m[0], t, a, backend="reference", **options) for a in x])
    assert_equal(torch.vmap(lambda x: ops.step(table, m[0], t, x, **options))(x), one)
    assert_equal(torch.vmap(lambda m: ops.step(table, m, t, x[0], **options))(m)[0], one[0])


def test_vmap_draws_no_noise_in_silence():
    """Without seeds, one random number for all calls, or for each its own? torch's vmap asks; so does a step."""
    sampler = DDPMSampler(SCHEDULE, steps=10)
    x, m = randn((4, *SHAPE)), randn((4, *SHAPE), seed=1)
    t = sampler.timesteps[5]
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(lambda x, m: sampler.step(m, t, x))(x, m)
    torch.manual_seed(0)
    same = torch.vmap(lambda x, m: sampler.step(m, t, x), randomness="same")(x, m)
    torch.manual_seed(0)
    seeds = contract.seeds(None, SHAPE[0])
    assert_equal(same, torch.stack([sampler.step(b, t, a, seeds=seeds) for a, b in zip(x, m, strict=True)]))


def test_vmap_into_a_tensor_of_the_caller():
    table = ddim(clip=1.0)
    x, m, out = randn((4, *SHAPE)), randn((4, *SHAPE), seed=1), torch.zeros(4, *SHAPE)
    expected = torch.stack([ops.step(table, b, 200, a) for a, b in zip(x, m, strict=True)])
    shared = torch.zeros(SHAPE)
    with pytest.raises((RuntimeError, ValueError)):  # four results have no place in one
        torch.vmap(lambda x, m: ops.step(table, m, 200, x, out=shared))(x, m)
    assert shared.eq(0).all()
    try:
        torch.vmap(lambda x, m, out: ops.step(table, m, 200, x, out=out))(x, m, out)
    except (RuntimeError, ValueError):
        assert out.eq(0).all()
    else:
        assert_equal(out, expected)


@pytest.mark.parametrize("target", [None, "noise", "v"])
def test_vmap_of_add_noise(target):
    """As training uses it: a timestep and a seed of each sample, the schedule shared."""
    x, t = randn((4, *SHAPE)), torch.randint(0, 1000, (4, 3), generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(12).reshape(4, 3)

    def function(x: Tensor, t: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
        found = ops.add_noise(x, t, SCHEDULE, seeds=seeds, target=target)
        return found if target else (found,)

    for dims in ((0, 0, 0), (0, None, 0), (None, 0, None), (None, None, 0)):
        values = [u if d == 0 else u[0] for u, d in zip((x, t, seeds), dims, strict=True)]
        for mine, theirs in zip(torch.vmap(function, dims)(*values), in_turn(function, dims, values), strict=True):
            assert_equal(mine, theirs)


def test_a_sample_alone_is_a_batch_of_one():
    """vmap over the batch itself, with a timestep, a seed and a scale of each sample: the batched call."""
    case = CASES["ddim rederived"]
    tensors = inputs(case, torch.float32)
    tensors.pop("noise")
    t = torch.tensor(T)

    def single(t: Tensor, seed: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = {n: u if n == "guidance_scale" else u[None] for n, u in zip(tensors, values, strict=True)}
        return tuple(u[0] for u in run(case, given, t, seeds=seed[None]))

    for mine, theirs in zip(torch.vmap(single)(t, SEEDS, *tensors.values()), run(case, tensors, t), strict=True):
        assert_equal(mine, theirs)


# Forward mode outside of torch.func


def duals(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: forward_ad.make_dual(u, d) for (n, u), d in zip(tensors.items(), direction(tensors), strict=True)}


@every_case
@pytest.mark.parametrize("without_graph", [False, True], ids=["grad", "no_grad"])
def test_duals(name, without_graph):
    case = CASES[name]
    tensors = inputs(case)
    function, values = function_of(case, tensors), tuple(tensors.values())
    mode = torch.no_grad() if without_graph else contextlib.nullcontext()
    with forward_ad.dual_level(), mode:
        pairs = [forward_ad.unpack_dual(u) for u in function(*duals(tensors).values())]
    close([u.primal for u in pairs], function(*values))
    close([u.tangent for u in pairs], along(function, values, direction(tensors)), 1e-6)


@pytest.mark.parametrize("which", ["x", "model_output"])
@pytest.mark.parametrize("table", [ddim(), ddpm(clip=1.0)], ids=["ddim", "ddpm"])
def test_a_dual_is_not_lost_on_the_shortest_way(table, which):
    """An int t, no guidance, no graph: the call that skips the checks."""
    tensors = inputs(Case(table))
    noise = tensors.pop("noise", None)
    options = {} if noise is None else {"noise": noise}
    with forward_ad.dual_level(), torch.no_grad():
        given = tensors | {which: duals(tensors)[which]}
        for place in ({"t": 200}, {"t": None, "row": 2}):
            found = ops.step(table, given["model_output"], x=given["x"], **place, **options)
            assert forward_ad.unpack_dual(found).tangent.abs().sum() > 0
        plain = ops.step(table, tensors["model_output"], 200, tensors["x"], **options)
        assert forward_ad.unpack_dual(plain).tangent is None


def test_a_dual_into_memory_that_is_given():
    """A tangent that `out` could not carry is refused, not dropped; a dual as `out` too."""
    table, tensors = ddim(), inputs(Case(ddim()))
    x, m = tensors["x"], tensors["model_output"]
    with forward_ad.dual_level():
        dual = duals(tensors)["x"]
        for mode in (contextlib.nullcontext(), torch.no_grad()):
            for out in (torch.zeros_like(x), dual):
                with mode, pytest.raises(ValueError, match="out: expected None where a gradient is needed"):
                    ops.step(table, m, 200, dual, out=out)
        with torch.no_grad(), contextlib.suppress(ValueError):
            # of x overwritten by what does not depend on its tangent, nothing may remain
            ops.step(table, m, 200, x, out=dual)
            assert not forward_ad.unpack_dual(dual).tangent.any()


def test_a_dual_in_inference_mode():
    """torch.sin gives no tangent there, as inference mode says; a step gives none or refuses, but no other tangent."""
    table, tensors = ddim(), inputs(Case(ddim()))
    with forward_ad.dual_level():
        given = duals(tensors)
        with torch.inference_mode():
            expected = forward_ad.unpack_dual(given["x"].sin()).tangent
            found = ops.step(table, given["model_output"], 200, given["x"])
            assert (forward_ad.unpack_dual(found).tangent is None) == (expected is None)


def test_tangents_of_half_states():
    """In the dtype of their tensor, computed as wide as the step."""
    case = CASES["ddim rederived"]
    for dtype in (torch.bfloat16, torch.float16):
        tensors = inputs(case, dtype)
        tensors["guidance_scale"] = tensors["guidance_scale"].float()
        values, move = tuple(tensors.values()), direction(tensors)
        outputs, tangents = torch.func.jvp(function_of(case, tensors), values, move)
        wide = [tuple(u.double() for u in us) for us in (values, move)]
        _, gold = torch.func.jvp(function_of(case, tensors, backend="reference"), *wide)
        assert all(u.dtype is dtype for u in (*outputs, *tangents))
        for mine, theirs in zip(tangents, gold, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tangents_at_the_clip(backend):
    """As torch.clamp has them, one at a bound itself; and NaN, which the clip did not cut, passes them."""
    table = random_table(Structure(x0="output", clip=True))
    m = torch.tensor([[-math.inf, -1.0, -0.75, 0.25, 0.5, 0.75, math.inf, math.nan]])
    x, ones = torch.zeros_like(m), torch.ones_like(m)
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]])

    def x0(m: Tensor) -> Tensor:
        return ops.step_with_x0(table, m, 20, x, backend=backend)[1]

    assert torch.equal(torch.func.jvp(x0, (m,), (ones,))[1], expected)
    assert torch.equal(torch.func.grad(lambda m: x0(m).sum())(m), expected)
    assert torch.equal(torch.vmap(torch.func.grad(lambda m: x0(m).sum()))(m[None])[0], expected)
    by_clamp = torch.func.jvp(lambda m: m.clamp(-0.75, 0.5), (m,), (ones,))[1]
    assert torch.equal(by_clamp[:, :-1], expected[:, :-1])


# torch.compile and torch.export


@pytest.fixture
def no_recompilation() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def times(batch: int, first: int = 0) -> Tensor:
    return torch.tensor([CHAIN[(first + k) % len(CHAIN)] for k in range(batch)])


def check_compiled(name: str, backend: str, source: str = "seeds", batches: tuple[int, ...] = (3, 5, 3)) -> None:
    """Forward in every bit, backward to rounding; one compilation for all batches and timesteps."""
    case = CASES[name]
    names = [n for n in inputs(case) if n != "noise" or source == "noise"]
    seeded = source == "seeds" and case.noisy

    def function(t: Tensor, seeds: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        return run(case, given, t, **({"seeds": seeds} if seeded else {}))

    fast = compiled(function, backend)
    for first, batch in enumerate(batches):
        # sizes of their own: the compiler takes those that are equal at first for one
        tensors = inputs(case, torch.float32, (batch, 2, 7))
        given = leaves({n: tensors[n] for n in names})
        context = times(batch, first), contract.seeds(first, batch)
        mine, theirs = fast(*context, *given), function(*context, *given)
        for a, b in zip(mine, theirs, strict=True):
            assert_equal(a.detach(), b.detach())
        found, expected = (torch.autograd.grad(loss_of(u), given) for u in (mine, theirs))
        close(found, expected, 1e-4)


@pytest.mark.usefixtures("no_recompilation")
class TestCompiled:
    @pytest.mark.parametrize(
        "name", ["v", "ddim", "ddim rederived", "learned_range", "learned_plain", "add_noise v", "log_prob"]
    )
    def test_a_step(self, name):
        check_compiled(name, "aot_eager")

    def test_a_step_with_noise(self):
        check_compiled("ddpm clipped", "aot_eager", "noise")

    def test_a_step_without_a_graph(self):
        """No gradient is asked for: by the mode, or because nothing requires one."""
        case = CASES["ddpm clipped"]
        tensors = inputs(case, torch.float32)
        tensors.pop("noise")

        def function(t: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return run(case, dict(zip(("x", "model_output"), tensors, strict=True)), t)

        fast = compiled(function)
        for given, mode in (
            (leaves(tensors), torch.no_grad()),
            (tensors.values(), contextlib.nullcontext()),
            (leaves(tensors), torch.inference_mode()),
        ):
            torch._dynamo.reset()  # of each its own
            with mode:
                for a, b in zip(fast(times(3), *given), function(times(3), *given), strict=True):
                    assert_equal(a, b)
                    assert not a.requires_grad

    def test_from_step_to_step(self):
        """A loop around one compiled step, as a sampler of one's own has it: compiled once."""
        sampler = DDPMSampler(SCHEDULE, steps=10, clip=1.0)

        def step(m: Tensor, t: Tensor, x: Tensor, seeds: Tensor) -> Tensor:
            return sampler.step(m, t, x, seeds=seeds)

        fast = compiled(step)
        for shape in ((3, 2, 7), (5, 2, 4)):
            seeds = contract.seeds(1, shape[0])
            found = x = randn(shape)
            for t in sampler.timesteps:
                told = torch.full((shape[0],), t)
                found, x = fast(found.sin(), told, found, seeds), step(x.sin(), told, x, seeds)
                assert_equal(found, x)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_a_chain(self, eta, backend):
        """Ten steps and a network, forward and backward."""
        sampler = DDIMSampler(SCHEDULE, steps=10, eta=eta, clip=1.0)
        timesteps = torch.tensor(sampler.timesteps)
        network = torch.nn.Linear(6, 6)

        def chain(x: Tensor, seeds: Tensor) -> Tensor:
            for k in range(10):
                x = sampler.step(network(x), timesteps[k].expand(x.shape[0]), x, seeds=seeds)
            return x

        fast = compiled(chain, backend)
        for batch in (4, 8) if backend == "aot_eager" else (4,):
            x, seeds = randn((batch, 6)).requires_grad_(), contract.seeds(1, batch)
            tensors = (x, *network.parameters())
            mine, theirs = fast(x, seeds), chain(x, seeds)
            if backend == "aot_eager":  # a compiler may multiply matrices in another order
                assert_equal(mine.detach(), theirs.detach())
            torch.testing.assert_close(mine, theirs)
            found, expected = (torch.autograd.grad(u.square().sum(), tensors) for u in (mine, theirs))
            assert all(u.abs().sum() > 0 for u in found)
            close(found, expected, 1e-4)

    @pytest.mark.parametrize("name", ["learned_range", "add_noise v"])
    def test_by_inductor(self, name):
        check_compiled(name, "inductor", batches=(3,))

    def test_int_seeds_and_a_number_as_scale(self):
        """Constants of the compiled code, but for which the timesteps and tensors are free."""
        case = CASES["ddim rederived"]

        def function(t: Tensor, x: Tensor, m: Tensor, uncond: Tensor) -> Tensor:
            return ops.step(case.table, m, t, x, uncond_output=uncond, guidance_scale=2.5, seeds=3)

        fast = compiled(function)
        for batch in (3, 4):
            values = [randn((batch, 5), seed=k) for k in range(3)]
            assert_equal(fast(times(batch), *values), function(times(batch), *values))

    def test_in_place_and_out(self):
        table = ddpm(clip=1.0)

        def in_place(x: Tensor, m: Tensor, t: Tensor) -> Tensor:
            ops.step(table, m, t, x, seeds=SEEDS, out=x)
            return x * 2

        x, m, t = randn(SHAPE), randn(SHAPE, seed=1), torch.tensor(T)
        ours, theirs = x.clone(), x.clone()
        with torch.no_grad():
            assert_equal(compiled(in_place)(ours, m, t), in_place(theirs, m, t))
        assert_equal(ours, theirs)

    def test_an_output_that_a_gradient_needs_is_refused(self):
        table, t = ddim(), torch.tensor(T)
        x, m = randn(SHAPE).requires_grad_(), randn(SHAPE)
        with pytest.raises(Exception, match="out: expected None where a gradient is needed"):
            compiled(lambda x: ops.step(table, m, t, x, out=torch.empty_like(x)))(x)

    @pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "vmap", "vmap of grad"])
    @pytest.mark.parametrize("name", ["ddim rederived", "learned"])
    def test_torch_func_inside(self, name, transform):
        case = CASES[name]
        tensors = inputs(case, torch.float32)
        t = torch.tensor(T)

        def step(x: Tensor, m: Tensor) -> Tensor:
            return run(case, tensors | {"x": x, "model_output": m}, t)[0]

        def loss(x: Tensor, m: Tensor) -> Tensor:
            return step(x, m).square().sum()

        def transformed(x: Tensor, m: Tensor) -> Any:
            if transform == "grad":
                return torch.func.grad(loss, argnums=(0, 1))(x, m)
            if transform == "vjp":
                _, pull = torch.func.vjp(step, x, m)
                return pull(torch.ones_like(x))
            if transform == "jvp":
                return torch.func.jvp(step, (x, m), (torch.ones_like(x), torch.ones_like(m)))
            if transform == "jacrev":
                return torch.func.jacrev(step, argnums=(0, 1))(x, m)
            if transform == "jacfwd":
                return torch.func.jacfwd(step, argnums=(0, 1))(x, m)
            twice = torch.stack([x, x * 0.5]), torch.stack([m, m * 0.5])
            if transform == "vmap":
                return (torch.vmap(step)(*twice),)
            return torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(*twice)

        x, m = tensors["x"], tensors["model_output"]
        expected = transformed(x, m)
        assert all(u.abs().sum() > 0 for u in expected)
        close(compiled(transformed)(x, m), expected, 1e-5)

    @pytest.mark.parametrize("before", [False, True], ids=["first", "after plain tensors"])
    def test_duals(self, before):
        """Right or refused, also by code that was compiled for tensors without a tangent."""
        table, t = ddim(clip=1.0), torch.tensor(T)
        tensors = inputs(Case(table))

        def step(x: Tensor, m: Tensor) -> Tensor:
            return ops.step(table, m, t, x)

        fast = compiled(step)
        with torch._dynamo.config.patch(error_on_recompile=False):
            if before:
                fast(*tensors.values())
            with forward_ad.dual_level():
                try:
                    found = fast(*duals(tensors).values())
                except RuntimeError:
                    return
                tangent = forward_ad.unpack_dual(found).tangent
        assert tangent is not None
        expected = along(lambda *u: (step(*u),), tuple(tensors.values()), direction(tensors))
        close([tangent], expected, 1e-6)

    def test_a_table_in_training(self):
        """Its rows are an input of the compiled code, not a constant of it."""
        structure, timesteps, t = ddpm().structure, CHAIN, torch.tensor(T)
        x, m = randn(SHAPE), randn(SHAPE, seed=1)
        rows = ddpm().rows.requires_grad_()
        table = Table(rows, structure, timesteps)

        def step(x: Tensor) -> Tensor:
            return ops.step(table, m, t, x, seeds=SEEDS)

        fast = compiled(step)
        for _ in range(2):
            (found,) = torch.autograd.grad(fast(x).square().sum(), rows)
            (expected,) = torch.autograd.grad(step(x).square().sum(), rows)
            torch.testing.assert_close(found, expected)
            assert found.abs().sum() > 0
            with torch.no_grad():
                rows[:, COLUMN["ax"]] *= 1.5

    def test_export(self):
        """A module around a step, saved as a program for any batch and run with other inputs."""
        table = ddpm(variance="learned_range", clip=1.0)

        class Step(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = torch.nn.Conv1d(2, 4, 3, padding=1)

            def forward(self, x: Tensor, t: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
                return ops.step_with_x0(table, self.network(x), t, x, seeds=seeds)

        module = Step().requires_grad_(False)
        batch = torch.export.Dim("batch", min=2, max=64)
        example = randn((3, 2, 8)), times(3), contract.seeds(0, 3)
        program = torch.export.export(module, example, dynamic_shapes=({0: batch},) * 3)
        for n, seed in ((3, 1), (6, 2)):
            given = randn((n, 2, 8), seed=seed), times(n, seed), contract.seeds(seed, n)
            for mine, theirs in zip(program.module()(*given), module(*given), strict=True):
                assert_equal(mine, theirs)
        lowered = program.run_decompositions()
        for mine, theirs in zip(lowered.module()(*given), module(*given), strict=True):
            assert_equal(mine, theirs)


# What else stands around a step


def network_of(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Linear(6, 6).to(dtype)


def chain_of(sampler: DDPMSampler | DDIMSampler, network: torch.nn.Module, x: Tensor, seeds: Tensor) -> Tensor:
    for t in sampler.timesteps:
        x = sampler.step(network(x), t, x, seeds=seeds)
    return x


class TestAutocast:
    """The operators have no autocast rule: a step computes in the dtypes that it is given."""

    @pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
    def test_a_half_network_beside_a_float32_state(self, compile_it):
        """What autocast makes of the network's output is widened; the state stays float32, and so do its gradients."""
        table, network, t = ddpm(clip=1.0), network_of(), torch.tensor([300, 200, 100, 400])
        x = randn((4, 6)).requires_grad_()
        seeds = contract.seeds(1, 4)

        def step(m: Tensor, x: Tensor) -> Tensor:
            return ops.step(table, m, t, x, seeds=seeds)

        torch._dynamo.reset()
        call = compiled(step) if compile_it else step
        with torch.autocast("cpu", dtype=torch.bfloat16):
            m = network(x)
            inside = call(m, x)
        assert m.dtype is torch.bfloat16 and inside.dtype is torch.float32
        outside = step(m, x)
        assert_equal(inside.detach(), outside.detach())
        assert_equal(outside.detach(), step(m.float(), x).detach())
        leaves_ = (x, network.weight)
        for mine, theirs in zip(
            torch.autograd.grad(inside.square().sum(), leaves_, retain_graph=True),
            torch.autograd.grad(outside.square().sum(), leaves_),
            strict=True,
        ):
            assert_equal(mine, theirs)
            assert mine.dtype is torch.float32 and mine.abs().sum() > 0

    @every_case
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_on_and_off(self, name, dtype):
        """Also for the definition itself, and for gradients of which a part is computed outside."""
        case = CASES[name]
        tensors = inputs(case, dtype)
        for backend in ("auto", "reference"):
            plain = function_of(case, tensors, backend=backend)(*tensors.values())
            expected = gradients(case, tensors, backend=backend)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = function_of(case, tensors, backend=backend)(*tensors.values())
                given = leaves(tensors)
                cast = torch.autograd.grad(loss_of(function_of(case, tensors, backend=backend)(*given)), given)
            for mine, theirs in zip((*found, *cast), (*plain, *expected), strict=True):
                assert_equal(mine, theirs)

    def test_a_half_state_and_a_float32_output_are_refused_as_without(self):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="model_output: expected"):
            ops.step(ddim(), randn(SHAPE), 200, randn(SHAPE, torch.bfloat16))


class TestCheckpoints:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("seeded", [True, False], ids=["seeds", "torch's generator"])
    def test_a_chain(self, seeded, reentrant):
        """Each step is run twice, with the same noise: of its seeds, or of the generator that torch winds back."""
        sampler, network = DDPMSampler(SCHEDULE, steps=10, clip=1.0), network_of()
        seeds = contract.seeds(1, 4) if seeded else None
        found = []
        for wrapped in (False, True):
            x = start = randn((4, 6)).requires_grad_()
            torch.manual_seed(3)
            for t in sampler.timesteps:

                def step(x: Tensor, t: int = t) -> Tensor:
                    return sampler.step(network(x), t, x, seeds=seeds)

                x = checkpoint(step, x, use_reentrant=reentrant) if wrapped else step(x)
            network.zero_grad()
            x.square().sum().backward()
            found.append((x.detach(), start.grad, network.weight.grad.clone()))
        for mine, theirs in zip(*found, strict=True):
            assert_equal(mine, theirs)

    def test_what_is_kept_of_a_chain(self):
        """A checkpoint around each step keeps the states and nothing of the steps."""
        sampler, network, kept = DDIMSampler(SCHEDULE, steps=10, clip=1.0), network_of(), []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        x = randn((4, 6)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for t in sampler.timesteps:
                x = checkpoint(
                    lambda x, t: sampler.step(network(x), t, x), x, t, use_reentrant=False, preserve_rng_state=False
                )
        assert sum(u.numel() for u in kept) <= 10 * x.numel()
        x.sum().backward()


@every_case
def test_saved_tensors_may_be_moved_away(name):
    """save_on_cpu, and hooks that pack a tensor as something else."""
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    expected = gradients(case, tensors)
    with torch.autograd.graph.save_on_cpu():
        for mine, theirs in zip(gradients(case, tensors), expected, strict=True):
            assert_equal(mine, theirs)
    with torch.autograd.graph.saved_tensors_hooks(lambda u: u.numpy(force=True).copy(), torch.from_numpy):
        for mine, theirs in zip(gradients(case, tensors), expected, strict=True):
            assert_equal(mine, theirs)


@every_case
def test_deterministic_algorithms(name):
    """Which also fill new memory with NaN: everything that is handed out was written, by the backward too."""
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    expected = *function_of(case, tensors)(*tensors.values()), *gradients(case, tensors)
    torch.use_deterministic_algorithms(True)
    try:
        found = *function_of(case, tensors)(*tensors.values()), *gradients(case, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(found, expected, strict=True):
        assert_equal(mine, theirs)


@every_case
def test_modes_without_a_graph(name):
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    expected = function_of(case, tensors)(*tensors.values())
    for mode in (torch.no_grad, torch.inference_mode):
        given = leaves(tensors)
        with mode():
            found = function_of(case, tensors)(*given)
        assert all(not u.requires_grad and u.is_inference() == (mode is torch.inference_mode) for u in found)
        for mine, theirs in zip(found, expected, strict=True):
            assert_equal(mine, theirs)
        # and enabled again within
        with mode(), torch.inference_mode(False), torch.enable_grad():
            close(gradients(case, tensors), gradients(case, tensors, backend="reference"), 1e-4)


def test_a_graph_is_not_lost_to_inference_mode_in_silence():
    """A result of inference mode cannot enter a graph: torch says so where it is used."""
    x, m = randn(SHAPE).requires_grad_(), randn(SHAPE, seed=1)
    with torch.inference_mode():
        result = ops.step(ddim(), m, 200, x)
    with pytest.raises(RuntimeError, match="Inference tensors cannot|does not require grad"):
        (result * x).sum().backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(result.sum(), x)


@every_case
def test_a_graph_walked_twice_and_gradients_that_accumulate(name):
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    given = leaves(tensors)
    loss = loss_of(function_of(case, tensors)(*given))
    once = torch.autograd.grad(loss, given, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(given, once, strict=True):
        assert_equal(leaf.grad, gradient + gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_hooks():
    """Of tensors, of the function, and after a gradient was accumulated."""
    x, m = (leaf.requires_grad_() for leaf in (randn(SHAPE), randn(SHAPE, seed=1)))
    seen: dict[str, Tensor] = {}
    x.register_hook(lambda g: seen.setdefault("x", g) * 2)
    x.register_post_accumulate_grad_hook(lambda leaf: seen.update({"accumulated": leaf.grad.clone()}))
    result = ops.step(ddim(clip=1.0), m, 200, x)
    result.retain_grad()
    result.register_hook(lambda g: g * 3)
    assert result.grad_fn is not None
    result.grad_fn.register_prehook(lambda grads: seen.update({"into": grads[0]}))
    result.square().sum().backward()
    assert_equal(result.grad, 6 * result.detach())
    assert_equal(seen["into"], result.grad)
    expected = torch.autograd.grad(ops.step(ddim(clip=1.0), m, 200, x.detach().requires_grad_()), m, result.grad)
    assert_equal(m.grad, expected[0])
    assert_equal(x.grad, 2 * seen["x"])
    assert_equal(seen["accumulated"], x.grad)


def test_anomaly_mode():
    case = CASES["ddpm clipped"]
    tensors = inputs(case, torch.float32)
    expected = gradients(case, tensors)
    with torch.autograd.detect_anomaly():
        for mine, theirs in zip(gradients(case, tensors), expected, strict=True):
            assert_equal(mine, theirs)
        x = tensors["x"].clone().requires_grad_()
        result = ops.step(case.table, tensors["model_output"], 200, x, seeds=1)
        with pytest.raises(RuntimeError, match="returned nan values"):
            (result * torch.full_like(result, math.nan)).sum().backward()


@pytest.mark.parametrize("form", ["expanded", "transposed", "spread", "channels_last"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.density in (None, "none")])
def test_gradients_of_any_layout(name, form):
    case = CASES[name]
    tensors = inputs(case, torch.float32, (3, 2, 3, 5))
    outputs = function_of(case, tensors)(*(given := leaves(tensors)))
    plain = randn(outputs[0].shape, seed=9)
    if form == "expanded":
        plain = plain[:, :1, :, :1].clone()
    turned = {
        "expanded": lambda u: u.expand_as(outputs[0]),
        "transposed": lambda u: u.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "spread": lambda u: torch.stack([u, u + math.nan], -1)[..., 0],
        "channels_last": lambda u: u.contiguous(memory_format=torch.channels_last),
    }[form](plain)
    assert form == "expanded" or not turned.is_contiguous()
    both = [turned] * len(outputs), [turned.contiguous()] * len(outputs)
    found, expected = (torch.autograd.grad(outputs, given, u, retain_graph=True) for u in both)
    for one, mine, theirs in zip(tensors, found, expected, strict=True):
        if one == "guidance_scale":  # a sum, whose order torch's own takes from the layout
            torch.testing.assert_close(mine, theirs)
        else:
            assert_equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_case
def test_gradients_of_half_types(name, dtype):
    """Computed in float32 and rounded once, however many elements a sum has."""
    case = CASES[name]
    tensors = inputs(case, dtype, (3, 2, 1024))
    wide = {n: u.double() for n, u in tensors.items()}
    if "guidance_scale" in tensors:
        tensors["guidance_scale"] = wide["guidance_scale"] = wide["guidance_scale"].float().requires_grad_(False)
        wide["guidance_scale"] = tensors["guidance_scale"].double()
    found = []
    for values, backend in ((tensors, "auto"), (wide, "reference")):
        given = leaves(values)
        outputs = function_of(case, values, backend=backend)(*given)
        ones = [torch.ones_like(u) for u in outputs]
        found.append(torch.autograd.grad(outputs, given, ones))
    for mine, theirs, tensor in zip(*found, tensors.values(), strict=True):
        assert mine.dtype is tensor.dtype
        scale = theirs.abs().amax()
        torch.testing.assert_close(mine.double(), theirs, rtol=torch.finfo(dtype).eps, atol=float(scale) * 1e-5)


def test_gradients_of_the_rows_beside_a_half_state():
    """4096 terms of one sign, which would stop growing in bfloat16."""
    rows = ddpm().rows.requires_grad_()
    table = Table(rows, ddpm().structure, CHAIN)
    x = randn((2, 4096)).abs().bfloat16()
    m = randn((2, 4096), seed=1).bfloat16()
    result = ops.step(table, m, torch.tensor([200, 300]), x, seeds=1)
    (found,) = torch.autograd.grad(result.float().sum(), rows)
    assert found.dtype is torch.float64
    expected = x.double().sum(1)
    for b, row in enumerate((2, 1)):
        torch.testing.assert_close(found[row, COLUMN["ax"]], expected[b], rtol=1e-5, atol=0)
    assert found[[0, 3]].eq(0).all()


# The log-density of a step taken, which is that of the transition recorded


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_density_of_a_step_is_that_of_its_record(reduction):
    """Under every transform: x' counts as a constant there, so what finite differences give is another gradient."""
    table, seeds, t = ddpm(clip=1.0, variance="fixed_large"), SEEDS, torch.tensor([300, 200, 400])
    x, m = randn(SHAPE), randn(SHAPE, seed=1)
    x_prev = ops.step(table, m, t, x, seeds=seeds)

    def taken(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return ops.step(table, m, t, x, seeds=seeds, log_prob=True, reduction=reduction)

    def recorded(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        given = ops.step(table, m, t, x, seeds=seeds)
        return given, ops.log_prob(table, x_prev, m, t, x, reduction=reduction)

    assert_equal(taken(x, m)[0], x_prev)
    assert_equal(taken(x, m)[1], recorded(x, m)[1])
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):

        def loss(function: Any, x: Tensor, m: Tensor, weights: Any = weights) -> Tensor:
            return sum(w * u.square().sum() for w, u in zip(weights, function(x, m), strict=True) if w)

        given = leaves({"x": x, "m": m})
        expected = torch.autograd.grad(loss(recorded, *given), given)
        assert all(u.abs().sum() > 0 for u in expected)
        close(torch.autograd.grad(loss(taken, *given), given), expected, 1e-5)
        close(torch.func.grad(loss, argnums=(1, 2))(taken, x, m), expected, 1e-5)
    move = direction({"x": x, "m": m})
    close(torch.func.jvp(taken, (x, m), move)[1], torch.func.jvp(recorded, (x, m), move)[1], 1e-5)
    many = torch.stack([x, x * 0.5]), torch.stack([m, m * 2])
    for mine, theirs in zip(torch.vmap(taken)(*many), in_turn(taken, (0, 0), list(many)), strict=True):
        assert_equal(mine, theirs)
    torch._dynamo.reset()
    given = leaves({"x": x, "m": m})
    found, plain = compiled(taken)(*given), taken(*given)
    for mine, theirs in zip(found, plain, strict=True):
        assert_equal(mine.detach(), theirs.detach())
    close(*(torch.autograd.grad(loss_of(u), given) for u in (found, plain)), 1e-4)


# The same by the kernels


class Operators(TorchDispatchMode):
    """The operators that are run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def ours(self) -> list[str]:
        return [name.split(".")[1] for name in self.names if name.startswith("fastdiff.")]

    def arithmetic(self) -> list[str]:
        return [name for name in self.names if name.split(".")[1] in ("mul", "div", "where", "exp", "bitwise_xor")]


FORWARD = {"step", "step_row", "step_distance"}


def forward_of(case: Case) -> str:
    return "step" if case.density is None else "step_distance"


KERNEL_CASES = pytest.mark.parametrize("name", [name for name in CASES if name != "log_prob learned"])


@needs_native
class TestFused:
    """One launch forward and one backward, whatever stands around the step."""

    @KERNEL_CASES
    def test_gradients_of_every_tensor(self, name):
        case = CASES[name]
        given = leaves(inputs(case, torch.float32))
        with Operators() as forward:
            outputs = function_of(case, inputs(case))(*given)
        grads = [torch.ones_like(u) for u in outputs]
        with Operators() as backward:
            torch.autograd.grad(outputs, given, grads)
        assert len(forward.ours()) == 1 and forward.ours()[0] in FORWARD
        # what is left to do for a density are numbers of its samples, or one pass for its elements
        assert case.density is not None or not forward.arithmetic()
        assert backward.ours() == ["step_backward"]
        assert case.density is not None or not backward.arithmetic()

    @pytest.mark.parametrize("name", ["ddpm clipped", "v", "learned_range"])
    def test_gradients_of_the_rows(self, name):
        case = CASES[name]
        tensors = inputs(case, torch.float32)
        table = Table(case.table.rows.requires_grad_(), case.table.structure, CHAIN)
        with Operators() as forward:
            outputs = run(case, tensors, table=table)
        with Operators() as backward:
            loss = sum(u.sum() for u in outputs)
            torch.autograd.grad(loss, table.trained)
        assert [n for n in forward.ours() if n in FORWARD] == ["step"]
        assert backward.ours() == ["step_backward"]

    @pytest.mark.parametrize("target", [None, "v"])
    def test_add_noise(self, target):
        x = randn(SHAPE).requires_grad_()
        with Operators() as seen:
            found = ops.add_noise(x, torch.tensor(T), SCHEDULE, seeds=SEEDS, target=target)
            torch.autograd.grad(sum(u.sum() for u in found) if target else found.sum(), x)
        assert seen.ours() == ["step", "step_backward"]

    @KERNEL_CASES
    def test_torch_func(self, name):
        case = CASES[name]
        tensors = inputs(case, torch.float32)
        function, values = function_of(case, tensors), tuple(tensors.values())
        every = tuple(range(len(values)))
        with Operators() as seen:
            torch.func.grad(lambda *u: sum(v.sum() for v in function(*u)), argnums=every)(*values)
        assert seen.ours() == [forward_of(case), "step_backward"]
        with Operators() as seen:
            torch.vmap(function)(*stacked(tensors, (0,) * len(tensors)))
        assert seen.ours() == [forward_of(case)]
        with Operators() as seen:
            torch.func.jacrev(lambda *u: function(*u)[0].view(SHAPE[0], -1).mean(1), argnums=every)(*values)
        assert seen.ours() == [forward_of(case), "step_backward"]

    @pytest.mark.parametrize("dims", WAYS, ids=str)
    def test_vmap(self, dims):
        """Folded into the batch: one launch for all, and one for all gradients."""
        case = CASES["ddpm clipped"]
        tensors = inputs(case, torch.float32)
        base = {"x": tensors["x"], "model_output": tensors["model_output"], "t": torch.tensor(T), "seeds": SEEDS}
        values = stacked(base, dims)

        def loss(x: Tensor, m: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
            return sum(u.sum() for u in run(case, {"x": x, "model_output": m}, t, seeds=seeds))

        with Operators() as seen:
            torch.vmap(torch.func.grad(loss, argnums=(0, 1)), dims)(*values)
        assert seen.ours() == ["step", "step_backward"]

    @pytest.mark.parametrize("name", ["ddpm clipped", "ddim rederived", "learned_range", "add_noise v", "log_prob"])
    def test_compiled(self, name):
        """The graph holds the operators, and nothing that would compute what they do."""
        case = CASES[name]
        tensors = inputs(case, torch.float32)
        graphs: dict[str, list[str]] = {"forward": [], "backward": []}

        def recorded(kind: str) -> Callable[..., Any]:
            def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
                for node in module.graph.nodes:
                    graphs[kind] += [str(u) for u in (node.target, *node.args) if isinstance(u, torch._ops.OpOverload)]
                return make_boxed_func(module.forward)

            return compiler

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=recorded("forward"), bw_compiler=recorded("backward"))
        given = leaves(tensors)
        outputs = compiled(function_of(case, tensors), backend)(*given)
        torch.autograd.grad(sum(u.sum() for u in outputs), given)
        torch._dynamo.reset()
        for kind, operator in (("forward", forward_of(case)), ("backward", "step_backward")):
            ours = [n.split(".")[1] for n in graphs[kind] if n.startswith("fastdiff.")]
            assert ours == [operator]
            arithmetic = [n for n in graphs[kind] if n.startswith(("aten.where", "aten.div", "aten.exp"))]
            assert case.density is not None or not arithmetic

    def test_what_is_kept_for_gradients_of_the_scale_and_the_rows(self):
        """At most one tensor of each input."""
        for name in ("ddim", "ddim rederived", "learned_range"):
            case = CASES[name]
            kept: list[Tensor] = []

            def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
                kept.append(tensor)
                return tensor

            tensors = inputs(case, torch.float32)
            given = leaves(tensors)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = function_of(case, tensors)(*given)
            large = [u.data_ptr() for u in kept if u.numel() >= given[0].numel()]
            assert len(large) == len(set(large)) <= len(given)
            torch.autograd.grad(outputs, given, [torch.ones_like(u) for u in outputs])

    def test_the_primal_of_forward_mode_and_its_second_derivative(self):
        """A tangent may be the definition's; what it is the tangent of is the kernel's, in every bit."""
        case = CASES["ddpm clipped"]
        tensors = inputs(case, torch.float32)
        values = tuple(tensors.values())
        expected = function_of(case, tensors)(*values)
        found, _ = torch.func.jvp(function_of(case, tensors), values, direction(tensors))
        for mine, theirs in zip(found, expected, strict=True):
            assert_equal(mine, theirs)
