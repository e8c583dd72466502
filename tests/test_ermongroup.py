"""The loops of ermongroup/ddim: every bit that its own operations give, and the right result where those fail."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.integrations.ermongroup import ddpm_steps, generalized_steps
from fastdiff.schedules import NoiseSchedule, host_tables, timesteps

BETAS = host_tables("ermongroup", num_timesteps=200)[0].float()
UNIFORM, QUAD = list(range(0, 200, 23)), [int(v) for v in np.linspace(0, math.sqrt(160), 30) ** 2]
assert len(set(QUAD)) < len(QUAD)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Deterministic, and different at every time."""
    return 0.7 * x.roll(1, -1) + torch.sin(t + 1).reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)


def host(x: Tensor, seq: Any, model: Any, b: Tensor, eta: float | None, exact: bool = False) -> Any:
    """ermongroup's operations, one after the other; exact: coefficients and state in float64, the float32 noise."""
    wide = torch.float64 if exact else torch.float32
    b = b.to(x.device, wide)
    cumulative = torch.cat([torch.ones_like(b[:1]), 1 - b]).cumprod(0)
    x_T, states, predictions = x, [x], []
    chain = list(seq)[::-1]
    for t, t_next in zip(chain, [*chain[1:], -1], strict=True):
        shape = (len(x), *(1,) * (x.dim() - 1))
        now, then = cumulative[t + 1].expand(shape), cumulative[t_next + 1].expand(shape)
        e = model(x, torch.full((len(x),), float(t), device=x.device))
        z = torch.randn_like(x_T if eta is not None else x, dtype=torch.float32 if exact else None)
        if exact:
            x, e, z = x.double(), e.double(), z.double()
        if eta is None:
            beta = 1 - now / then
            x0 = ((1.0 / now).sqrt() * x - (1.0 / now - 1).sqrt() * e).clamp(-1, 1)
            mean = ((then.sqrt() * beta) * x0 + ((1 - beta).sqrt() * (1 - then)) * x) / (1.0 - now)
            x = mean + float(t != 0) * torch.exp(0.5 * beta.log()) * z
        else:
            x0 = (x - e * (1 - now).sqrt()) / now.sqrt()
            sigma = eta * ((1 - now / then) * (1 - then) / (1 - now)).sqrt()
            x = then.sqrt() * x0 + sigma * z + ((1 - then) - sigma**2).sqrt() * e
        states.append(x)
        predictions.append(x0)
    return states, predictions


def run(x: Tensor, seq: Any, model: Any, b: Tensor, eta: float | None, **options: Any) -> Any:
    if eta is None:
        return ddpm_steps(x, seq, model, b, **options)
    return generalized_steps(x, seq, model, b, eta=eta, **options)


def state(shape: tuple[int, ...] = (2, 3, 4, 6), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def both(x: Tensor, seq: Any, model: Any, eta: float | None, b: Tensor = BETAS) -> Any:
    """What the host gives and what we give, from one seed; the generator must end in one state."""
    found = []
    for function in (host, run):
        torch.manual_seed(5)
        found.append((function(x, seq, model, b, eta), torch.get_rng_state()))
    (theirs, after), (ours, ours_after) = found
    assert torch.equal(after, ours_after)
    return theirs, ours


def assert_equal(theirs: Any, ours: Any) -> None:
    for left, right in zip(theirs, ours, strict=True):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert a.dtype is b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("eta", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("seq", [UNIFORM, QUAD, range(0, 200, 40), range(150, 156), [0], [199], [7, 7], [0, 0, 0, 3]])
def test_same_bits_and_draws(eta: float | None, seq: Any) -> None:
    assert_equal(*both(state(), seq, network, eta))


@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_same_bits_in_every_dtype_and_layout(eta: float | None, dtype: torch.dtype, layout: str) -> None:
    x = state(dtype=dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    elif layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    theirs, ours = both(x, UNIFORM[:4], network, eta)
    assert_equal(theirs, ours)
    assert ours[0][0] is x and ours[0][1].dtype is torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
@pytest.mark.parametrize("output", [torch.float16, torch.bfloat16])
def test_a_network_of_another_dtype(eta: float | None, output: torch.dtype) -> None:
    assert_equal(*both(state(), UNIFORM[:4], lambda x, t: network(x, t).to(output), eta))


@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
def test_a_network_of_another_layout(eta: float | None) -> None:
    assert_equal(*both(state(), UNIFORM[:4], lambda x, t: network(x, t).to(memory_format=torch.channels_last), eta))


@pytest.mark.parametrize("eta", [None, 0.6])
def test_a_float64_network_widens_the_state(eta: float | None) -> None:
    theirs, ours = both(state(), UNIFORM[:4], lambda x, t: network(x.double(), t), eta)
    for left, right in zip(theirs, ours, strict=True):
        for a, b in zip(left[1:], right[1:], strict=True):
            assert a.dtype is b.dtype is torch.float64
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize("shape", [(3, 5), (1, 4, 7), (2, 1, 2, 3, 4), (0, 3, 4, 4), (1, 3, 1, 1)])
def test_any_shape(eta: float | None, shape: tuple[int, ...]) -> None:
    assert_equal(*both(state(shape), UNIFORM[:3], network, eta))


@pytest.mark.parametrize("eta", [None, 0.0, 0.4, 1.0])
def test_near_the_exact_chain(eta: float | None) -> None:
    found = []
    for function, options in ((host, {"exact": True}), (run, {}), (host, {})):
        torch.manual_seed(9)
        found.append(function(state(), QUAD, network, BETAS, eta, **options))
    exact, ours, theirs = found
    for part in (0, 1):
        for a, b, c in zip(exact[part], ours[part], theirs[part], strict=True):
            off, allowed = (b.double() - a).abs().max(), (c.double() - a).abs().max()
            assert off <= 2 * allowed + 1e-6


def test_a_radicand_below_0_is_0() -> None:
    """At eta = 1 float32 can take what is rooted below 0; the codebase gives NaN from there on."""
    betas = host_tables("ermongroup", num_timesteps=1000)[0].float()
    (theirs, _), (ours, _) = both(state(), [1, 878], network, 1.0, betas)
    assert theirs[1].isnan().all() and torch.equal(theirs[0], ours[0])
    torch.manual_seed(5)
    exact, _ = host(state(), [1, 878], network, betas, 1.0, exact=True)
    assert (ours[1].double() - exact[1]).abs().max() < 1e-3
    assert (ours[2].double() - exact[2]).abs().max() < 1e-3


def test_philox_noise_belongs_to_the_sample() -> None:
    x, seeds = state((4, 2, 3, 3)), torch.tensor([5, -3, 2**40, 0])
    before = torch.get_rng_state()
    for eta in (None, 0.7):
        whole, whole_x0 = run(x, UNIFORM, network, BETAS, eta, noise="philox", seeds=seeds)
        for k in range(4):
            part = slice(k, k + 1)
            alone, alone_x0 = run(x[part], UNIFORM, network, BETAS, eta, noise="philox", seeds=seeds[part])
            assert torch.equal(whole[-1][part], alone[-1]) and torch.equal(whole_x0[-1][part], alone_x0[-1])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    drawn = run(x, UNIFORM, network, BETAS, 0.7, noise="philox")[0][-1]
    torch.manual_seed(1)
    assert torch.equal(run(x, UNIFORM, network, BETAS, 0.7, noise="philox")[0][-1], drawn)
    assert not torch.equal(run(x, UNIFORM, network, BETAS, 0.7, noise="philox")[0][-1], drawn)
    fixed = run(x, UNIFORM, network, BETAS, 0.7, noise="philox", seeds=3)[0][-1]
    assert torch.equal(run(x[:2], UNIFORM, network, BETAS, 0.7, noise="philox", seeds=3)[0][-1], fixed[:2])


@pytest.mark.parametrize("eta", [None, 0.0, 0.4])
def test_keep_false_keeps_the_last_states(eta: float | None) -> None:
    torch.manual_seed(3)
    xs, x0_preds = run(state(), QUAD, network, BETAS, eta)
    torch.manual_seed(3)
    (last,), (last_x0,) = run(state(), QUAD, network, BETAS, eta, keep=False)
    assert torch.equal(last, xs[-1]) and torch.equal(last_x0, x0_preds[-1])


def test_what_the_model_is_told() -> None:
    told = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and t.dtype is torch.float32 and t.shape == (2,)
        told.append(t.tolist())
        return x

    x = state().requires_grad_()
    for eta in (None, 0.0):
        told.clear()
        xs, x0_preds = run(x, np.array([3, 8, 150]), model, BETAS, eta, another="ignored")
        assert told == [[150.0] * 2, [8.0] * 2, [3.0] * 2]
        assert len(xs) == 4 and len(x0_preds) == 3 and xs[0] is x and not xs[-1].requires_grad
    assert generalized_steps(x, [], model, BETAS) == ([x], [])


def test_tables_follow_the_betas() -> None:
    betas = BETAS.clone()
    for scale in (1.0, 1.5):
        betas.mul_(scale)
        assert_equal(*both(state(), UNIFORM, network, 0.5, betas))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, dtype=torch.int64)}, TypeError, "x: expected float32.*got torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected a batch dimension"),
        ({"model": 3}, TypeError, "model: expected a function of"),
        ({"model": lambda x, t: None}, TypeError, "model: expected it to return a tensor, got NoneType"),
        ({"model": lambda x, t: x[:1]}, ValueError, "model_output: expected"),
        ({"b": [0.1]}, TypeError, "b: expected a tensor, got list"),
        ({"b": BETAS.double()}, TypeError, "b: expected float32, got torch.float64"),
        ({"b": BETAS[None]}, ValueError, r"b: expected shape \[timesteps\], got \[1, 200\]"),
        ({"b": BETAS - 1}, ValueError, "betas: expected"),
        ({"seq": 5}, TypeError, "seq: expected a sequence of ints, got int"),
        ({"seq": [0.5]}, TypeError, "seq: expected an int"),
        ({"seq": [0, 200]}, ValueError, "seq: expected .*199.*got 200"),
        ({"seq": [5, 0]}, ValueError, "seq: expected timesteps in ascending order, got 0 after 5"),
        ({"eta": 1.5}, ValueError, r"eta: expected a value in \[0, 1\], got 1.5"),
        ({"eta": "1"}, TypeError, "eta: expected"),
        ({"noise": "randn"}, ValueError, "noise: expected one of"),
        ({"seeds": 3}, ValueError, "seeds: expected None with noise='torch'"),
        ({"noise": "philox", "seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds: expected shape \[2\]"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
        ({"keep": 1}, TypeError, "keep: expected a bool, got int"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": state(), "seq": UNIFORM, "model": network, "b": BETAS} | change
    with pytest.raises(error, match=message):
        generalized_steps(**arguments)


def test_uniform_spacing_is_the_schedules() -> None:
    chain = timesteps(NoiseSchedule.linear(200), 8, "uniform")
    assert_equal(*both(state(), chain[::-1], network, 0.0))
