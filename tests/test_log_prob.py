"""The log-density of a step: its values against torch.distributions, the bits of the two calls that give it, its
gradients against autograd through the formula, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from test_backward import randn
from test_ops import SCHEDULE, arguments, assert_equal, layouts, random_table
from torch import Tensor
from torch.distributions import Normal

import fastdiff.noise as contract
from fastdiff import ops
from fastdiff.samplers import DDIMSampler, DDPMSampler
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import COLUMN, Structure, Table, ddim_table, ddpm_table, forward_table, sprite_table

pytestmark = pytest.mark.usefixtures("kernels")

CHAIN = [400, 300, 200, 100]
T = (300, 200, 400)  # of the samples; no step but that from 100 is without noise
SHAPE = (3, 4, 5, 3)
SEEDS = contract.seeds(5, SHAPE[0])
REDUCTIONS = ("sum", "mean", "none")


class Case(NamedTuple):
    table: Table
    guided: bool = False
    precise: bool = True  # our own exp of a learned variance is that of float32


def divided(structure: Structure) -> Table:
    return Table(random_table(structure, seed=2).rows, structure, CHAIN)


def ddpm(**options: Any) -> Table:
    return ddpm_table(SCHEDULE, CHAIN, **options)


CASES = {
    "fixed_small": Case(ddpm(clip=1.0)),
    "fixed_large": Case(ddpm(variance="fixed_large"), guided=True),
    "x0": Case(ddpm(prediction="x0", clip=0.8)),
    "v": Case(ddpm(prediction="v", clip=0.5), guided=True),
    "x_prev": Case(ddpm(prediction="x_prev")),
    "ddim": Case(ddim_table(SCHEDULE, CHAIN, eta=0.5)),
    "ddim v": Case(ddim_table(SCHEDULE, CHAIN, eta=1.0, prediction="v", clip=1.0), guided=True),
    "ddim rederived": Case(ddim_table(SCHEDULE, CHAIN, eta=0.7, clip=1.0, eps="rederived"), guided=True),
    "divided": Case(
        divided(Structure(clip=True, x0_divide=True, eps="rederived", eps_divide=True, ae=True, variance="fixed"))
    ),
    "diffusers": Case(ddim_table(SCHEDULE, list(pairwise([*CHAIN, -1])), eta=1.0, clip=1.0, host="diffusers")),
    "sprite": Case(sprite_table(SCHEDULE)),
    "forward": Case(forward_table(SCHEDULE, CHAIN)),
    "min_std": Case(ddpm(clip=1.0, min_std=0.3)),
    "learned": Case(ddpm(variance="learned", clip=1.0), guided=True, precise=False),
    "learned_range": Case(ddpm(variance="learned_range", clip=1.0), precise=False),
    "learned_plain": Case(ddpm(variance="learned_plain")),
}
every_case = pytest.mark.parametrize("name", CASES)
every_backend = pytest.mark.parametrize("backend", ["auto", "reference"])


def inputs(
    case: Case, dtype: torch.dtype = torch.float64, m_dtype: torch.dtype | None = None, shape: tuple[int, ...] = SHAPE
) -> dict[str, Tensor]:
    """Every floating tensor that the density depends on but x'; the forward process looks at no model output."""
    structure, kind = case.table.structure, m_dtype or dtype
    found = {"x": randn(shape, dtype)}
    if structure.a0 or structure.ae:
        found["model_output"] = randn((shape[0], (1 + structure.learned) * shape[1], *shape[2:]), kind, 1)
        if structure.variance == "learned_plain":
            found["model_output"][:, shape[1] :].abs_().add_(0.1)
    if case.guided:
        found["uncond_output"] = randn(shape, kind, 2)
        found["guidance_scale"] = torch.linspace(0.5, 3.0, shape[0], dtype=contract.compute_dtype(dtype))
    return found


def step(case: Case, tensors: dict[str, Tensor], t: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """x' and the log-density, by the step."""
    return call(case, tensors, t, options, lambda *args, **given: ops.step(*args, log_prob=True, **given))


def log_prob(case: Case, x_prev: Tensor, tensors: dict[str, Tensor], t: Any = None, **options: Any) -> Tensor:
    """The log-density of a given x'."""
    return call(case, tensors, t, options, lambda table, *args, **given: ops.log_prob(table, x_prev, *args, **given))


def call(case: Case, tensors: dict[str, Tensor], t: Any, options: dict[str, Any], function: Any) -> Any:
    given = tensors | options
    x, m, table = given.pop("x"), given.pop("model_output", None), given.pop("table", case.table)
    if t is None and "row" not in given:
        t = torch.tensor(T)
    return function(table, m, t, x, **given)


def moments(case: Case, tensors: dict[str, Tensor], rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the step of each sample of T, by the formula of `fastdiff.tables`."""
    table, structure = case.table, case.table.structure
    rows = table.rows if rows is None else rows
    x, m, mu = (tensors.get(name) for name in ("x", "model_output", "uncond_output"))
    chosen = rows[[table.rows_of_t[t] for t in T]]
    c = {name: chosen[:, k].reshape(-1, 1, 1, 1) for name, k in COLUMN.items()}
    std = c["s"].expand(x.shape)
    if structure.learned:
        m, v = m.split(x.shape[1], dim=1)
        if structure.variance == "learned_range":
            v = (v + 1) / 2 * c["max_log"] + (1 - (v + 1) / 2) * c["min_log"]
        std = std * (v.sqrt() if structure.variance == "learned_plain" else (v / 2).exp())
    if mu is not None:
        m = mu + tensors["guidance_scale"].reshape(-1, 1, 1, 1) * (m - mu)
    mean = c["ax"] * x if structure.ax else torch.zeros_like(x)
    x0 = m
    if structure.x0 == "linear":
        x0 = (c["px"] * x + c["pm"] * m) / (c["pd"] if structure.x0_divide else 1)
    if structure.clip:
        x0 = x0.clamp(c["lo"], c["hi"])
    if structure.a0:
        mean = mean + c["a0"] * x0
    if structure.ae:
        e = {
            "output": lambda: m,
            "rederived": lambda: c["gx"] * x - c["g0"] * x0,
            "linear": lambda: c["ex"] * x + c["em"] * m,
        }[structure.eps]()
        mean = mean + c["ae"] * (e / c["gd"] if structure.eps_divide else e)
    return mean, std


def density(x_prev: Tensor, mean: Tensor, std: Tensor, reduction: str) -> Tensor:
    each = Normal(mean, std, validate_args=False).log_prob(x_prev)
    return each if reduction == "none" else getattr(each.flatten(1), reduction)(1)


def close(mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


# Values


@every_case
@every_backend
def test_it_is_the_density_of_a_normal_distribution(name, backend):
    case = CASES[name]
    tensors = inputs(case)
    mean, std = moments(case, tensors)
    x_prev = mean + 1.5 * std * randn(SHAPE, torch.float64, 9)
    for reduction in REDUCTIONS:
        found = log_prob(case, x_prev, tensors, reduction=reduction, backend=backend)
        assert found.dtype == torch.float64
        assert found.shape == (SHAPE if reduction == "none" else SHAPE[:1])
        close(found, density(x_prev, mean, std, reduction), 1e-10 if case.precise else 1e-5)
    at = tensors | {"x": tensors["x"].float()}
    still = step(case, {n: u.float() for n, u in at.items()}, noise=torch.zeros(SHAPE), backend=backend)[0]
    close(still.double(), mean, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fixed_small", "ddim rederived", "learned"])
def test_it_is_that_of_the_rounded_sample(name, dtype):
    """Of a half type too, in float32: the mean is not rounded, x' is."""
    case = CASES[name]
    tensors = inputs(case, dtype)
    x_prev, found = step(case, tensors, seeds=SEEDS, reduction="none")
    assert x_prev.dtype == dtype and found.dtype == torch.float32
    mean, std = moments(case, {n: u.double() for n, u in tensors.items()})
    close(found.double(), density(x_prev.double(), mean, std, "none"), 1e-4)
    if dtype != torch.float32:
        unrounded = mean + std * randn_of(case)
        assert (density(unrounded, mean, std, "none") - found).abs().max() > 1e-3


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fixed_large", "ddim rederived", "diffusers"])
def test_it_is_that_of_the_rounded_step(name, dtype, backend):
    """With the host's rounding the mean is what the step gives without noise, and the deviation is rounded as there."""
    case = CASES[name]
    tensors = inputs(case, dtype)
    mean = step(case, tensors, noise=torch.zeros(SHAPE, dtype=dtype), rounding="host", backend=backend)[0]
    std = moments(case, inputs(case))[1].to(dtype)
    x_prev = (mean + 1.5 * std * randn(SHAPE, dtype, 9)).to(dtype)
    found = log_prob(case, x_prev, tensors, rounding="host", reduction="none", backend=backend)
    close(found.double(), density(x_prev.double(), mean.double(), std.double(), "none"), 1e-5)


def randn_of(case: Case) -> Tensor:
    """The noise of SEEDS at T."""
    noise = [contract.normal((1, *SHAPE[1:]), SEEDS[k : k + 1], t=t, domain="step") for k, t in enumerate(T)]
    return torch.cat(noise).double()


@every_backend
def test_samplers_hand_it_out(backend):
    for sampler, wide in (
        (DDPMSampler(SCHEDULE, CHAIN, variance="learned_range", backend=backend), 2),
        (DDIMSampler(SCHEDULE, CHAIN, eta=1.0, rounding="host", backend=backend), 1),
    ):
        x, m = randn((2, 3, 4), torch.float16), randn((2, 3 * wide, 4), torch.float16, 1)
        x_prev, before = sampler.step(m, 300, x, seeds=1, log_prob=True, reduction="mean", min_logprob_std=0.5)
        assert_equal(x_prev, sampler.step(m, 300, x, seeds=1))
        again = sampler.log_prob(x_prev, m, 300, x, reduction="mean", min_logprob_std=0.5)
        assert_equal(before, again)
        assert_equal(
            before,
            ops.log_prob(sampler.table, x_prev, m, 300, x, reduction="mean", min_logprob_std=0.5,
                         rounding=sampler.rounding, backend=backend),
        )  # fmt: skip
        assert not torch.equal(before, sampler.log_prob(x_prev, m, 300, x, reduction="mean"))


# Bits

PRECISIONS = {
    "float32": (torch.float32, None, "once"),
    "float64": (torch.float64, None, "once"),
    "float16": (torch.float16, None, "once"),
    "bfloat16": (torch.bfloat16, None, "once"),
    "mixed": (torch.float32, torch.bfloat16, "once"),
    "host float16": (torch.float16, None, "host"),
    "host bfloat16": (torch.bfloat16, None, "host"),
}


@every_case
@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_calls_give_the_same_bits(name, precision):
    """On every backend, for each sample alone and in a batch, whatever form t has; the ratio is 1."""
    case = CASES[name]
    dtype, m_dtype, rounding = PRECISIONS[precision]
    tensors = inputs(case, dtype, m_dtype)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"rounding": rounding, "reduction": reduction}
        x_prev, expected = step(case, tensors, seeds=SEEDS, backend="reference", **options)
        assert torch.isfinite(expected).all()
        for backend in ("auto", "reference"):
            options["backend"] = backend
            both = step(case, tensors, seeds=SEEDS, **options)
            assert_equal(both[0], x_prev)
            assert_equal(both[1], expected)
            again = log_prob(case, x_prev, tensors, **options)
            assert_equal(again, expected)
            assert bool(((again - both[1]).exp() == 1).all())
            for k, t in enumerate(T):
                alone = {n: u[k : k + 1] for n, u in tensors.items()}
                for form in (t, torch.tensor([t]), torch.tensor(t, dtype=torch.int32), None):
                    at = {"t": form} if form is not None else {"t": None, "row": case.table.rows_of_t[t]}
                    one = step(case, alone, seeds=SEEDS[k : k + 1], **at, **options)
                    assert_equal(one[0], x_prev[k : k + 1])
                    assert_equal(one[1], expected[k : k + 1])
                    assert_equal(log_prob(case, x_prev[k : k + 1], alone, **at, **options), expected[k : k + 1])


@every_case
@every_backend
def test_the_layout_changes_no_bit(name, backend):
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    x_prev, expected = step(case, tensors, seeds=SEEDS, backend=backend)
    scale = {n: u for n, u in tensors.items() if n == "guidance_scale"}
    of_images = {n: layouts(u) for n, u in tensors.items() if n not in scale}
    for layout, shaped in layouts(x_prev).items():
        laid = {n: forms[layout] for n, forms in of_images.items()} | scale
        assert_equal(log_prob(case, shaped, laid, backend=backend), expected)
        assert_equal(log_prob(case, shaped, tensors, backend=backend), expected)
        assert_equal(step(case, laid, seeds=SEEDS, backend=backend)[1], expected)


@pytest.mark.parametrize("name", ["ddim rederived", "learned_range"])
def test_a_step_with_a_density_is_the_step_without(name):
    """Of the same bits, in place and in memory of the caller's too."""
    case = CASES[name]
    tensors = inputs(case, torch.float32)
    arguments = {n: u for n, u in tensors.items() if n not in ("x", "model_output")}
    plain = ops.step(case.table, tensors["model_output"], torch.tensor(T), tensors["x"], seeds=SEEDS, **arguments)
    for backend in ("auto", "reference"):
        out, x = torch.empty_like(plain), tensors["x"].clone()
        versions = out._version, x._version
        into, first = step(case, tensors, seeds=SEEDS, out=out, backend=backend)
        over, second = step(case, tensors | {"x": x}, seeds=SEEDS, out=x, backend=backend)
        assert into is out and over is x
        assert out._version > versions[0] and x._version > versions[1]
        assert_equal(out, plain)
        assert_equal(x, plain)
        assert_equal(first, second)
        assert_equal(first, log_prob(case, plain, tensors, backend=backend))


@every_backend
@pytest.mark.parametrize("t", [None, 300])
def test_every_source_of_noise(t, backend):
    case = CASES["fixed_small"]
    tensors = inputs(case, torch.float32)
    generator, after = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = step(case, tensors, t, noise=torch.randn(SHAPE, generator=after), backend=backend)
    found = step(case, tensors, t, generator=generator, backend=backend)
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)
    assert torch.equal(generator.get_state(), after.get_state())
    assert_equal(found[1], log_prob(case, found[0], tensors, t, backend=backend))


# Gradients


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: u.detach().clone().requires_grad_() for n, u in tensors.items()}


def trained(case: Case) -> tuple[Table, Tensor]:
    """The table as one in training, and its rows."""
    rows = case.table.rows.requires_grad_()
    return Table(rows, case.table.structure, case.table.timesteps), rows


def gradients(loss: Tensor, tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    every = tensors | {"rows": rows}
    found = torch.autograd.grad(loss, every.values(), allow_unused=True, materialize_grads=True)
    named = dict(zip(every, found, strict=True))
    named["rows"] = named["rows"][:, : COLUMN["t"]]
    return named


@every_case
@every_backend
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_a_given_sample(name, backend, reduction):
    case = CASES[name]
    tensors = leaves(inputs(case))
    mean, std = moments(case, tensors, rows := case.table.rows.requires_grad_())
    x_prev = (mean + 1.5 * std * randn(SHAPE, torch.float64, 9)).detach()
    theirs = density(x_prev, mean, std, reduction)
    weights = randn(theirs.shape, torch.float64, 10)
    expected = gradients((theirs * weights).sum(), tensors, rows)
    table, rows = trained(case)
    mine = log_prob(case, x_prev, tensors, table=table, reduction=reduction, backend=backend)
    found = gradients((mine * weights).sum(), tensors, rows)
    for name in expected:
        close(found[name], expected[name], 1e-9 if case.precise else 1e-4)
    assert found["model_output"].abs().sum() > 0 if "model_output" in found else found["x"].abs().sum() > 0
    assert found["rows"].abs().sum() > 0


@every_case
@every_backend
def test_gradients_of_both_outputs(name, backend):
    """That of x' beside that of its density, which takes x' as it is."""
    case = CASES[name]
    tensors, noise = leaves(inputs(case)), randn(SHAPE, torch.float64, 8)
    mean, std = moments(case, tensors, rows := case.table.rows.requires_grad_())
    x_prev = mean + std * noise
    weights, of_x = randn(SHAPE[:1], torch.float64, 10), randn(SHAPE, torch.float64, 11)
    theirs = (density(x_prev.detach(), mean, std, "sum") * weights).sum()
    expected = gradients((x_prev * of_x).sum() + theirs, tensors, rows)
    table, rows = trained(case)
    x_prev, mine = step(case, tensors, table=table, noise=noise, backend=backend)
    found = gradients((x_prev * of_x).sum() + (mine * weights).sum(), tensors, rows)
    for name in expected:
        close(found[name], expected[name], 1e-9 if case.precise else 1e-4)


@every_backend
@pytest.mark.parametrize("name", ["fixed_small", "ddim rederived", "learned_range"])
def test_the_sample_is_a_constant(name, backend):
    """Of the fixed variance's density an x' that is followed leaves no gradient at all."""
    case = CASES[name]
    tensors = leaves(inputs(case))

    def gradient(score: Tensor) -> Tensor:
        return torch.autograd.grad(score.sum(), tensors["model_output"], retain_graph=True)[0]

    x_prev, fresh = step(case, tensors, seeds=SEEDS, backend=backend)
    assert x_prev.requires_grad
    expected = gradient(log_prob(case, x_prev.detach(), tensors, backend=backend))
    assert expected.abs().mean() > 1e-3
    assert_equal(gradient(fresh), expected)
    assert_equal(gradient(log_prob(case, x_prev, tensors, backend=backend)), expected)
    if not case.table.structure.learned:
        mean, std = moments(case, tensors)
        x_prev = mean + std * randn(SHAPE, torch.float64, 8)
        close(gradient(density(x_prev, mean, std, "sum")), torch.zeros(SHAPE, dtype=torch.float64), 1e-9)


@every_backend
@pytest.mark.parametrize("name", ["v", "ddim rederived", "divided", "forward", "min_std", "learned_plain"])
def test_derivatives_of_the_density(name, backend):
    case = CASES[name]
    tensors = inputs(case, shape=(3, 2, 2, 1))
    x_prev = step(case, tensors, seeds=SEEDS, backend="reference")[0]
    coefficients, words = case.table.rows.split([COLUMN["t"], 2], dim=1)

    def function(*given: Tensor) -> Tensor:
        rows = torch.cat([given[-1], words], 1)
        table = Table(rows, case.table.structure, case.table.timesteps)
        at = dict(zip(tensors, given, strict=False))
        return log_prob(case, x_prev, at, table=table, reduction="none", backend=backend, min_logprob_std=0.05)

    if not case.table.structure.clip:
        coefficients[:, [COLUMN["lo"], COLUMN["hi"]]] = 0.0  # not looked at, and finite differences need a number
    given = [u.requires_grad_() for u in (*tensors.values(), coefficients.clone())]
    torch.autograd.gradcheck(function, given)
    torch.autograd.gradgradcheck(function, given)


@every_backend
def test_a_straight_through_clip(backend):
    case = CASES["fixed_small"]
    tensors = leaves(inputs(case))
    mean, std = moments(case, tensors)
    x_prev = (mean + std).detach()
    rows = case.table.rows[[case.table.rows_of_t[t] for t in T]]
    slope = (rows[:, COLUMN["a0"]] * rows[:, COLUMN["pm"]]).reshape(-1, 1, 1, 1)
    expected = slope * ((x_prev - mean) / std**2).detach()
    for clip_grad in ops.CLIP_GRADS:
        score = log_prob(case, x_prev, tensors, clip_grad=clip_grad, backend=backend)
        found = torch.autograd.grad(score.sum(), tensors["model_output"])[0]
        if clip_grad == "exact":
            assert 0.1 < (found == 0).double().mean() < 0.9
            close(found, expected * (found != 0), 1e-9)
        else:
            close(found, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ddim rederived", "learned"])
def test_gradients_in_other_dtypes(name, dtype):
    """Computed in float32 and returned in the dtype of the tensor; on every backend the same but for rounding."""
    case = CASES[name]
    tensors = leaves(inputs(case, dtype))
    x_prev = step(case, tensors, seeds=SEEDS)[0].detach()
    wide = leaves({n: u.double() for n, u in tensors.items()})
    theirs = density(x_prev.double(), *moments(case, wide), "mean")
    expected = torch.autograd.grad(theirs.sum(), wide.values())
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for backend in ("auto", "reference"):
        mine = log_prob(case, x_prev, tensors, reduction="mean", backend=backend)
        for tensor, a, b in zip(
            tensors.values(), torch.autograd.grad(mine.sum(), tensors.values()), expected, strict=True
        ):
            assert a.dtype == tensor.dtype
            close(a.double() / b.abs().max(), b / b.abs().max(), tolerance)


# No noise, and least deviations


def test_where_no_noise_is_added():
    """An error where the host knows, NaN for the samples where it does not."""
    table, without = ddpm(clip=1.0), ddpm(noise=False)
    x, m, x_prev = randn((3, 4)), randn((3, 4), seed=1), randn((3, 4), seed=2)
    for backend in ("auto", "reference"):
        for at in ({"t": 100}, {"t": None, "row": 3}, {"t": 100, "row": 3}):
            known = pytest.raises(ValueError, match="min_logprob_std: expected a standard deviation above 0 at timeste")
            with known:
                ops.log_prob(table, x_prev, m, x=x, backend=backend, **at)
            with known:
                ops.step(table, m, x=x, seeds=1, log_prob=True, backend=backend, **at)
        for other in (without, ddim_table(SCHEDULE, CHAIN), sprite_table(SCHEDULE, noise=False)):
            with pytest.raises(ValueError, match=f"table: expected one that adds noise, '{other.name}' has no density"):
                ops.log_prob(other, x_prev, m, 300, x, min_logprob_std=0.1, backend=backend)
            with pytest.raises(ValueError, match="table: expected one that adds noise"):
                ops.step(other, m, 300, x, log_prob=True, backend=backend)
        t = torch.tensor([300, 100, 7])  # the last is not in the chain
        given = m.clone().requires_grad_()
        for reduction in REDUCTIONS:
            x_next, fresh = ops.step(table, given, t, x, seeds=1, log_prob=True, reduction=reduction, backend=backend)
            found = ops.log_prob(table, x_next, given, t, x, reduction=reduction, backend=backend)
            assert_equal(found, fresh)
            assert torch.isfinite(found[0]).all() and torch.isnan(found[1:]).all()
            gradient = torch.autograd.grad(found[0].sum(), given)[0]
            alone = ops.log_prob(table, x_next[:1], given[:1], 300, x[:1], reduction=reduction, backend=backend)
            assert_equal(gradient[:1], torch.autograd.grad(alone.sum(), given)[0][:1])
            assert gradient[0].abs().sum() > 0


@every_backend
def test_a_least_deviation_of_the_density(backend):
    case = CASES["fixed_small"]
    tensors = inputs(case)
    mean, std = moments(case, tensors)
    least = float(std[:, 0, 0, 0].median())  # above one, below another
    x_prev, found = step(case, tensors, seeds=SEEDS, min_logprob_std=least, reduction="none", backend=backend)
    assert_equal(x_prev, step(case, tensors, seeds=SEEDS, backend=backend)[0])
    close(found, density(x_prev, mean, std.clamp(min=least), "none"), 1e-10)
    assert_equal(found, log_prob(case, x_prev, tensors, min_logprob_std=least, reduction="none", backend=backend))
    # it is what the step without noise has
    at = {n: u[:1] for n, u in tensors.items()}
    x_prev, found = step(case, at, 100, seeds=1, min_logprob_std=0.25, backend=backend)
    still = step(case, at, 300, seeds=1, backend=backend)[0]
    close(found, density(x_prev, x_prev, torch.full_like(x_prev, 0.25), "sum"), 1e-10)
    assert log_prob(case, still, at, 100, min_logprob_std=0.25, backend=backend) < found


class Policy(NamedTuple):
    """Samples of a chain, from x_T on, the noise of each step, and the log-densities of the steps."""

    chain: list[Tensor]
    log_probs: list[Tensor]


def network(x: Tensor, t: int) -> Tensor:
    return torch.tanh(1.5 * x + t / 20)


def dppo(steps: int, ddim: bool, sampling: float, logprob: float, randn_clip: float, noise: list[Tensor]) -> Policy:
    """The sampler of DPPO (Ren et al. 2024, appendix) in its formulas: cosine betas over 20 timesteps, eps, x0 clipped
    to [-1, 1]; a deviation of at least `sampling` to sample with, and of at least `logprob` in the density, of the
    schedule's own; noise clamped before it is scaled."""
    alpha_bars = torch.from_numpy(NoiseSchedule.cosine(20).alphas_cumprod.copy())
    visited = [k * (20 // steps) for k in range(steps)]
    x, *rest = noise
    chain, scores = [x], []
    for k, z in zip(reversed(range(steps)), rest, strict=True):
        t = visited[k]
        ab, abp = alpha_bars[t], alpha_bars[visited[k - 1]] if k else torch.tensor(1.0, dtype=torch.float64)
        e = network(x, t)
        x0 = ((x - (1 - ab).sqrt() * e) / ab.sqrt()).clamp(-1, 1)
        if ddim:
            e = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
            std = ((1 - abp) / (1 - ab) * (1 - ab / abp)).sqrt().clamp(min=1e-10)
            mean = abp.sqrt() * x0 + (1 - abp - std**2).clamp(min=0).sqrt() * e
        else:
            beta = 1 - ab / abp
            mean = beta * abp.sqrt() / (1 - ab) * x0 + (1 - abp) * (1 - beta).sqrt() / (1 - ab) * x
            std = (beta * (1 - abp) / (1 - ab)).clamp(min=1e-20).sqrt()
        x = mean + std.clamp(min=sampling) * z.clamp(-randn_clip, randn_clip)
        chain.append(x)
        scores.append(Normal(mean, std.clamp(min=logprob)).log_prob(x))
    return Policy(chain, scores)


@every_backend
@pytest.mark.parametrize("ddim", [False, True], ids=["ddpm", "ddim"])
@pytest.mark.parametrize(("sampling", "logprob"), [(0.1, 0.1), (0.05, 0.2), (0.2, 0.05)])
def test_the_sampler_of_dppo(ddim, sampling, logprob, backend):
    """The whole chain, the last step too. Where the density's deviation may be less than the sampler's, it is that of a
    table without the latter."""
    schedule, steps = NoiseSchedule.cosine(20), 5 if ddim else 20
    noise = [2.0 * randn((4, 3, 2), torch.float64, k) for k in range(steps + 1)]
    expected = dppo(steps, ddim, sampling, logprob, 1.5, noise)
    options: dict[str, Any] = {"clip": 1.0, "backend": backend}
    if ddim:
        options |= {"eta": 1.0, "eps": "rederived"}
    sampler_of = DDIMSampler if ddim else DDPMSampler
    visited = [k * (20 // steps) for k in reversed(range(steps))]
    sampler = sampler_of(schedule, visited, min_std=sampling, noise_clip=1.5, **options)
    judge = sampler if logprob >= sampling else sampler_of(schedule, visited, **options)
    x = noise[0]
    for t, z, after, score in zip(visited, noise[1:], expected.chain[1:], expected.log_probs, strict=True):
        m = network(x, t)
        x_prev, fresh = sampler.step(m, t, x, noise=z, log_prob=True, reduction="none", min_logprob_std=logprob)
        again = judge.log_prob(x_prev, m, t, x, reduction="none", min_logprob_std=logprob)
        close(x_prev, after, 1e-9)
        close(again, score, 1e-8)
        if judge is sampler:
            assert_equal(again, fresh)
        x = x_prev


@every_backend
@pytest.mark.parametrize("name", ["fixed_small", "learned_range"])
def test_clamped_noise(name, backend):
    """From every source: what the step adds is the noise of that source, clamped."""
    case = CASES[name]
    table = ddpm(clip=1.0, noise_clip=0.5, variance=name)
    tensors = inputs(case, torch.float32)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    noise = randn(SHAPE, seed=4)
    for source, z in (
        ({"seeds": SEEDS}, randn_of(case).float()),
        ({"generator": generator}, drawn),
        ({"noise": noise}, noise),
    ):
        x_prev, score = step(case, tensors, table=table, backend=backend, **source)
        expected = step(case, tensors, noise=z.clamp(-0.5, 0.5), backend=backend)
        assert_equal(x_prev, expected[0])
        assert_equal(score, expected[1])
        assert_equal(log_prob(case, x_prev, tensors, table=table, backend=backend), score)
    assert (noise.abs() > 0.5).any()


# Sizes


@every_backend
@pytest.mark.parametrize("name", ["fixed_small", "learned"])
def test_empty_batches_and_samples(name, backend):
    table = CASES[name].table
    wide = 2 if table.structure.learned else 1
    for shape in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        x = torch.empty(shape)
        m = torch.empty(shape[0], wide * shape[1], shape[2])
        score = ops.log_prob(table, x, m.requires_grad_(), 300, x, backend=backend)
        assert torch.autograd.grad(score.sum(), m)[0].shape == m.shape
        m.requires_grad_(False)
        for reduction in REDUCTIONS:
            x_prev, score = ops.step(
                table, m, 300, x, seeds=1, log_prob=True, reduction=reduction, backend=backend
            )  # fmt: skip
            assert x_prev.shape == shape
            assert_equal(score, ops.log_prob(table, x_prev, m, 300, x, reduction=reduction, backend=backend))
            assert score.shape == (shape if reduction == "none" else shape[:1])
            if reduction == "sum":
                assert bool((score == 0).all())  # of nothing


def test_samples_of_one_number():
    table = CASES["fixed_small"].table
    x, m = randn((4,)), randn((4,), seed=1)
    for backend in ("auto", "reference"):
        x_prev, score = ops.step(table, m, 300, x, seeds=1, log_prob=True, backend=backend)
        assert score.shape == (4,)
        for reduction in REDUCTIONS:
            assert_equal(score, ops.log_prob(table, x_prev, m, 300, x, reduction=reduction, backend=backend))


@pytest.mark.parametrize("elements", [1, 2, 7, 1000, 70_001])
def test_the_sum_is_a_tree_over_the_elements(elements):
    """float32 sums of many terms keep their digits, and are those of the reference in every bit."""
    table = CASES["fixed_small"].table
    x, m = randn((2, elements)), randn((2, elements), seed=1)
    x_prev, score = ops.step(table, m, 300, x, seeds=1, log_prob=True)
    each = ops.log_prob(table, x_prev, m, 300, x, reduction="none")
    assert_equal(score, ops.log_prob(table, x_prev, m, 300, x, backend="reference"))
    close(score.double(), each.double().sum(1), 3e-7 * elements**0.5 + 1e-5)
    mean = ops.log_prob(table, x_prev, m, 300, x, reduction="mean")
    close(mean.double(), each.double().mean(1), 1e-5)


# What torch puts around it


@every_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(mode, backend):
    case = CASES["ddim rederived"]
    tensors = inputs(case)
    expected = step(case, tensors, seeds=SEEDS, backend=backend)
    with mode():
        found = step(case, leaves(tensors), seeds=SEEDS, backend=backend)
        again = log_prob(case, found[0], leaves(tensors), backend=backend)
    for a, b in zip((*found, again), (*expected, expected[1]), strict=True):
        assert_equal(a, b)
        assert not a.requires_grad


@every_backend
@pytest.mark.parametrize("name", ["fixed_small", "ddim rederived", "learned_range", "forward"])
def test_under_torch_func(name, backend):
    """vmap over slices, each a batch; gradients of each sample; forward mode."""
    case = CASES[name]
    tensors = inputs(case)
    tensors.pop("guidance_scale", None)
    fixed = {"guidance_scale": 1.5} if case.guided else {}
    x_prev = step(case, tensors | fixed, seeds=SEEDS, backend=backend)[0]

    def score(x_prev: Tensor, *given: Tensor) -> Tensor:
        return log_prob(case, x_prev, dict(zip(tensors, given, strict=True)) | fixed, backend=backend)

    slices = [torch.stack([u, 0.5 * u]) for u in (x_prev, *tensors.values())]
    mapped = torch.func.vmap(score)(*slices)
    for k in range(2):
        assert_equal(mapped[k], score(*(u[k] for u in slices)))

    arguments = tuple(range(1, 1 + len(tensors)))
    given = leaves(tensors)
    expected = torch.autograd.grad(score(x_prev, *given.values()).sum(), given.values())
    found = torch.func.grad(lambda *u: score(*u).sum(), arguments)(x_prev, *tensors.values())
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-12)
    rows = torch.func.jacrev(score, arguments)(x_prev, *tensors.values())
    for jacobian, b in zip(rows, expected, strict=True):
        for k in range(SHAPE[0]):
            close(jacobian[k, k], b[k], 1e-12)
            assert jacobian[k, (k + 1) % SHAPE[0]].abs().max() == 0

    tangents = [randn(u.shape, torch.float64, 20 + k) for k, u in enumerate((x_prev, *tensors.values()))]
    if backend == "auto":  # there are no kernels for it
        slope = torch.func.jvp(score, (x_prev, *tensors.values()), tuple(tangents))[1]
        close(slope.sum(), sum((a * b).sum() for a, b in zip(expected, tangents[1:], strict=True)), 1e-10)


@pytest.fixture
def no_recompilation():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_recompilation")
@pytest.mark.parametrize("name", ["fixed_small", "diffusers", "ddim rederived", "learned_range"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(name, reduction):
    """Both calls, forward and backward, without a graph break; compiled once for all timesteps and batches. The bits
    are those of eager code, but of a learned variance, for which compiled code with gradients has torch's exp."""
    case = CASES[name]
    names = list(inputs(case))

    def function(t: Tensor, seeds: Tensor, recorded: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(names, given, strict=True))
        options = {"reduction": reduction, "min_logprob_std": 0.02}
        fresh = step(case, tensors, t, seeds=seeds, **options)
        return *fresh, *(log_prob(case, x_prev, tensors, t, **options) for x_prev in (fresh[0], recorded))

    fast = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, order in ((3, [300, 200, 400]), (6, [100, 100, 200, 300, 400, 200])):
        shape = (batch, 4, 5, 2)
        given = leaves(inputs(case, torch.float32, shape=shape)).values()
        context = torch.tensor(order), contract.seeds(batch, batch), randn(shape, seed=7)
        both = fast(*context, *given), function(*context, *given)
        for mine, theirs in zip(*both, strict=True):
            if case.table.structure.learned:
                close(mine, theirs, 1e-5)
            else:
                assert_equal(mine.detach(), theirs.detach())
        assert_equal(both[0][1].detach(), both[0][2].detach())
        found, expected = (torch.autograd.grad(sum(u.square().mean() for u in outputs), given) for outputs in both)
        for a, b in zip(found, expected, strict=True):
            assert b.abs().sum() > 0
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# What is refused

X, M = randn((2, 3)), randn((2, 3), seed=1)
REFUSED = {
    "reduction": (ValueError, {"reduction": "product"}),
    "min_logprob_std": (ValueError, {"min_logprob_std": -0.1}),
    "min_logprob_std infinite": (ValueError, {"min_logprob_std": math.inf}),
    "min_logprob_std nan": (ValueError, {"min_logprob_std": math.nan}),
    "min_logprob_std text": (TypeError, {"min_logprob_std": "0.1"}),
    "min_logprob_std tensor": (TypeError, {"min_logprob_std": torch.ones(2)}),
    "table": (TypeError, {"table": None}),
    "model_output": (TypeError, {"model_output": None}),
    "model_output shape": (ValueError, {"model_output": randn((3, 3))}),
    "t": (ValueError, {"t": 7}),
    "t float": (TypeError, {"t": torch.tensor([300.0])}),
    "row": (ValueError, {"t": None, "row": 4}),
    "x": (TypeError, {"x": X.int()}),
    "uncond_output": (ValueError, {"uncond_output": M}),
    "clip_grad": (ValueError, {"clip_grad": "none"}),
    "rounding": (ValueError, {"rounding": "twice"}),
    "backend": (ValueError, {"backend": "numpy"}),
}
OF_X_PREV = {
    "x_prev": (TypeError, {"x_prev": None}),
    "x_prev text": (TypeError, {"x_prev": "x"}),
    "x_prev sparse": (TypeError, {"x_prev": X.to_sparse()}),
    "x_prev dtype": (TypeError, {"x_prev": X.half()}),
    "x_prev shape": (ValueError, {"x_prev": X[:1]}),
    "x_prev device": (ValueError, {"x_prev": X.to("meta")}),
}
GOOD: dict[str, Any] = {"table": CASES["fixed_small"].table, "model_output": M, "t": 300, "x": X}


@pytest.mark.parametrize("case", [*REFUSED, *OF_X_PREV])
def test_bad_arguments_are_named(case):
    error, changed = (REFUSED | OF_X_PREV)[case]
    given = GOOD | {"x_prev": X.clone()} | changed
    with pytest.raises(error, match=case.split()[0]):
        ops.log_prob(**given)


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_step_writes_and_draws_nothing(case):
    error, changed = REFUSED[case]
    out, generator = torch.full((2, 3), 7.0), torch.Generator().manual_seed(0)
    state = generator.get_state()
    given = GOOD | {"log_prob": True, "out": out, "generator": generator} | changed
    with pytest.raises(error, match=case.split()[0]):
        ops.step(**given)
    assert bool((out == 7).all()) and out._version == 0
    assert torch.equal(generator.get_state(), state)


def test_what_only_some_calls_take():
    table, x, m = GOOD["table"], X.clone().requires_grad_(), M
    with pytest.raises(ValueError, match="out: expected None where a gradient is needed"):
        ops.step(table, m, 300, x, seeds=1, log_prob=True, out=torch.empty(2, 3))
    with pytest.raises(ValueError, match="seeds: expected seeds, noise or a generator"):
        ops.step(table, m, 300, X, log_prob=True)
    for options in ({"min_std": -1.0}, {"min_std": math.nan}, {"min_std": 0.1, "variance": "learned"}):
        with pytest.raises(ValueError, match="min_std"):
            ddpm(**options)
    for options in ({"noise_clip": 0.0}, {"noise_clip": -1.0}, {"noise_clip": 1.0, "noise": False}):
        with pytest.raises(ValueError, match="noise_clip"):
            ddpm(**options)


@pytest.mark.parametrize("t", [40, torch.tensor([40, 7, 20])], ids=["one t", "t by sample, one out of the chain"])
def test_second_derivatives(t):
    """x' is a constant of a density in these too, and a sample out of the chain spoils nothing that others share."""
    table = random_table(Structure(clip=True, ax=True, variance="fixed"), rows=6)
    found = []
    for backend in ("auto", "reference"):
        given = arguments(table.structure, dtype=torch.float64)
        x, m = (given[name].requires_grad_() for name in ("x", "model_output"))
        scale = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
        guided = {"uncond_output": m.detach().flip(0), "guidance_scale": scale, "backend": backend}
        x_prev, taken = ops.step(table, m, t, x, seeds=1, log_prob=True, **guided)
        recorded = ops.log_prob(table, x_prev.detach().nan_to_num().requires_grad_(), m, t, x, **guided)
        inside = torch.tensor([True, isinstance(t, int), True])
        loss = torch.where(inside, taken.sin() + 0.5 * recorded.cos(), 0.0).sum()
        first = torch.autograd.grad(loss, (x, m, scale), create_graph=True)
        found.append(torch.autograd.grad(sum(u.nan_to_num().square().sum() for u in first), (x, m, scale)))
    for mine, theirs in zip(*found, strict=True):
        among = slice(None) if mine.shape[0] == 1 else inside.expand(3)
        assert theirs[among].isfinite().all() and theirs.any()
        torch.testing.assert_close(mine[among], theirs[among], rtol=1e-9, atol=1e-9)


def test_a_row_in_training_may_begin_and_cease_to_add_noise():
    rows = random_table(Structure(ax=True, variance="fixed")).rows
    rows[2, COLUMN["s"]] = 0.0
    table = Table(rows.requires_grad_(), Structure(ax=True, variance="fixed"), [0, 10, 20, 30])
    x, m = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def drawn() -> Tensor:
        return ops.step(table, m, 20, x, generator=torch.Generator().manual_seed(3))

    with pytest.raises(ValueError, match="min_logprob_std: expected a standard deviation above 0 at timestep 20"):
        ops.log_prob(table, x, m, 20, x)
    slopes = [torch.autograd.grad(y.sum(), rows)[0] for y in (drawn(), ops.step(table, m, 20, x, noise=noise))]
    assert slopes[0][2, COLUMN["s"]] != 0
    torch.testing.assert_close(*slopes)
    with torch.no_grad():
        rows[2, COLUMN["s"]] = 0.5
        assert_equal(drawn(), ops.step(table, m, 20, x, noise=noise))
        assert ops.log_prob(table, drawn(), m, 20, x).isfinite().all()


@pytest.mark.parametrize("noise_clip", [None, 0.5])
@pytest.mark.parametrize("at", [{"t": 20}, {"t": None, "row": 2}, {"t": torch.tensor([20, 0, 30])}], ids=str)
def test_compiled_at_any_kind_of_timestep(at, noise_clip):
    plain = random_table(Structure(clip=True, ax=True, variance="fixed"))
    table = Table(plain.rows, plain.structure, plain.timesteps, noise_clip=noise_clip)
    given = arguments(table.structure)
    x, m = given["x"], given["model_output"].requires_grad_()
    at = dict(at)
    t = at.pop("t")

    def densities(m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x_prev, log_prob = ops.step(table, m, t, x, seeds=SEEDS, log_prob=True, **at)
        return log_prob, ops.log_prob(table, x_prev, m, t, x, **at)

    torch._dynamo.reset()
    compiled = torch.compile(densities, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(m, x), densities(m, x)
    for mine, other in zip(ours, theirs, strict=True):
        assert_equal(mine.detach(), other.detach())
    torch.testing.assert_close(torch.autograd.grad(ours[0].sum(), m)[0], torch.autograd.grad(theirs[0].sum(), m)[0])


def test_two_tables_in_one_compiled_function():
    first, second = (random_table(Structure(clip=True, ax=True), seed=seed) for seed in (1, 2))
    given = arguments(first.structure)
    x, m, t = given["x"], given["model_output"], torch.tensor([0, 20, 10])

    def twice(m: Tensor, x: Tensor) -> Tensor:
        return ops.step(second, m, t, ops.step(first, m, t, x))

    assert_equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(m, x), twice(m, x))


@pytest.mark.parametrize("value", ["mean", None, 1])
def test_log_prob_is_a_bool(value):
    table = random_table(Structure(ax=True, variance="fixed"))
    with pytest.raises(TypeError, match=r"log_prob: expected a bool \(its form is `reduction`\), got"):
        ops.step(table, torch.zeros(1, 2), 20, torch.zeros(1, 2), seeds=1, log_prob=value)
