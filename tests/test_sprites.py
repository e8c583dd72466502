"""The sprite course's samplers: every bit that its own operations give, and the right end where its index wraps."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.integrations import sprites

T = 100
B_T = (0.02 - 1e-4) * torch.linspace(0, 1, T + 1) + 1e-4
A_T = 1 - B_T
AB_T = torch.cumsum(A_T.log(), dim=0).exp()
AB_T[0] = 1
SCHEDULE = {"b_t": B_T, "a_t": A_T, "ab_t": AB_T}


def network(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    """Deterministic, and different at every time."""
    assert t.shape == (1, 1, 1, 1) and t.dtype is torch.float32
    shift = 0 if c is None else c[:, None, None, None]
    return 0.7 * x.roll(1, -1) + torch.sin(5 * t + 1) + shift


def host_ddpm_step(x: Tensor, t: int, e: Tensor, z: Any, b: Tensor = B_T, a: Tensor = A_T, ab: Tensor = AB_T) -> Tensor:
    """The course's operations in their order."""
    mean = (x - e * ((1 - a[t]) / (1 - ab[t]).sqrt())) / a[t].sqrt()
    return mean + b.sqrt()[t] * z


def host_ddim_step(x: Tensor, t: int, t_prev: int, e: Tensor, ab: Tensor = AB_T) -> Tensor:
    now, then = ab[t], ab[t_prev]
    return then.sqrt() / now.sqrt() * (x - (1 - now).sqrt() * e) + (1 - then).sqrt() * e


def host_chain(n_sample: int, stride: int, ddim: bool, save: Any, extra_noise: bool = True, c: Any = None) -> Any:
    x, kept = torch.randn(n_sample, 3, 4, 4), []
    for i in range(T, 0, -stride):
        e = network(x, torch.tensor([i / T])[:, None, None, None], c)
        if ddim:
            x = host_ddim_step(x, i, max(i - stride, 0), e)
        else:
            x = host_ddpm_step(x, i, e, torch.randn_like(x) if i > 1 and extra_noise else 0)
        if save(i):
            kept.append(x.numpy())
    return x, np.stack(kept)


def state(shape: tuple[int, ...] = (2, 3, 4, 6), dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 2, 57, T])
def test_steps_have_the_same_bits(t: int, dtype: torch.dtype) -> None:
    x, e, z = (state(dtype=dtype, seed=seed) for seed in range(3))
    for layout in (lambda u: u, lambda u: u.to(memory_format=torch.channels_last), lambda u: torch.stack([u, u])[1]):
        x, e, z = layout(x), layout(e), layout(z)
        for noise in (z, 0, 0.5) if dtype.itemsize > 2 else (z, 0):
            ours = sprites.denoise_add_noise(x, t, e, noise, **SCHEDULE)
            theirs = host_ddpm_step(x, t, e, noise)
            assert ours.dtype is dtype and ours.stride() == theirs.stride() and torch.equal(ours, theirs)
        for t_prev in (0, t - 1, t // 2, T):
            ours = sprites.denoise_ddim(x, t, t_prev, e, ab_t=AB_T)
            assert ours.dtype is dtype and torch.equal(ours, host_ddim_step(x, t, t_prev, e))


@pytest.mark.parametrize("shape", [(3, 5), (1, 2, 3), (2, 1, 2, 3, 4), (0, 3, 4, 4)])
def test_noise_is_drawn_like_the_state(shape: tuple[int, ...]) -> None:
    x, e = state(shape).transpose(0, -1), state(shape, seed=1).transpose(0, -1)
    torch.manual_seed(4)
    theirs, after = host_ddpm_step(x, 40, e, torch.randn_like(x)), torch.get_rng_state()
    torch.manual_seed(4)
    assert torch.equal(sprites.denoise_add_noise(x, 40, e, **SCHEDULE), theirs)
    assert torch.equal(torch.get_rng_state(), after)


def test_steps_are_near_the_exact_ones() -> None:
    exact = [u.double() for u in (B_T, A_T, AB_T)]
    x, e, z = (state(seed=seed) for seed in range(3))
    for t in range(1, T + 1):
        gold = host_ddpm_step(x.double(), t, e.double(), z.double(), *exact)
        theirs = host_ddpm_step(x, t, e, z)
        ours = sprites.denoise_add_noise(x, t, e, z, **SCHEDULE)
        assert (ours - gold).abs().max() <= 2 * (theirs - gold).abs().max()
        gold = host_ddim_step(x.double(), t, t - 1, e.double(), exact[2])
        theirs = host_ddim_step(x, t, t - 1, e)
        assert (sprites.denoise_ddim(x, t, t - 1, e, ab_t=AB_T) - gold).abs().max() <= 2 * (theirs - gold).abs().max()


@pytest.mark.parametrize(("save_rate", "extra", "context"), [(20, True, False), (7, True, True), (20, False, False)])
def test_ddpm_chain(save_rate: int, extra: bool, context: bool) -> None:
    c = torch.tensor([0.5, -0.25]) if context else None
    torch.manual_seed(8)
    save = lambda i: i % save_rate == 0 or i == T or i < 8  # noqa: E731
    theirs, their_states = host_chain(2, 1, False, save, extra, c)
    after = torch.get_rng_state()
    torch.manual_seed(8)
    ours, states = sprites.sample_ddpm(
        2, save_rate, nn_model=network, **SCHEDULE, height=4, context=c, extra_noise=extra
    )
    assert torch.equal(ours, theirs) and np.array_equal(states, their_states)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("n", [1, 20, 25, 30, 64, T])
def test_ddim_chain_ends_at_the_clean_image(n: int) -> None:
    torch.manual_seed(8)
    theirs, their_states = host_chain(3, T // n, True, lambda i: True)
    torch.manual_seed(8)
    ours, states = sprites.sample_ddim(3, n, nn_model=network, ab_t=AB_T, height=4)
    assert torch.equal(ours, theirs) and np.array_equal(states, their_states)
    assert len(states) == -(-T // (T // n))


def test_a_step_below_0_does_not_wrap() -> None:
    """n = 30 of 100 steps by 3, from 1 to -2: there alpha_bar is that of timestep 99."""
    x, e = state(), state(seed=1)
    ours = sprites.denoise_ddim(x, 1, -2, e, ab_t=AB_T)
    assert torch.equal(ours, host_ddim_step(x, 1, 0, e))
    assert (ours - host_ddim_step(x, 1, -2, e)).abs().max() > 0.5


def test_the_courses_own_loops() -> None:
    """The functions with their globals bound take the arguments of the course's own."""
    step = functools.partial(sprites.denoise_add_noise, **SCHEDULE)
    fast = functools.partial(sprites.denoise_ddim, ab_t=AB_T)
    x, e, z = (state(seed=seed) for seed in range(3))
    assert torch.equal(step(x, 3, e, z), host_ddpm_step(x, 3, e, z))
    assert torch.equal(fast(x, 30, 20, e), host_ddim_step(x, 30, 20, e))

    def positional(function: Any) -> list[str]:
        found = inspect.signature(function).parameters.values()
        return [p.name for p in found if p.kind is not inspect.Parameter.KEYWORD_ONLY]

    assert positional(sprites.denoise_add_noise) == ["x", "t", "pred_noise", "z"]
    assert positional(sprites.denoise_ddim) == ["x", "t", "t_prev", "pred_noise"]
    assert positional(sprites.sample_ddpm) == ["n_sample", "save_rate"]
    assert positional(sprites.sample_ddim) == ["n_sample", "n"]


def test_gradients_flow() -> None:
    x, e, z = (state(dtype=torch.float64, seed=seed).requires_grad_() for seed in range(3))
    noisy = sprites.denoise_add_noise(x, 60, e, z, **SCHEDULE), host_ddpm_step(x, 60, e, z)
    fast = sprites.denoise_ddim(x, 60, 40, e, ab_t=AB_T), host_ddim_step(x, 60, 40, e)
    for (ours, theirs), inputs in ((noisy, (x, e, z)), (fast, (x, e))):
        left, right = (torch.autograd.grad(u.sin().sum(), inputs) for u in (ours, theirs))
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b)


def test_philox_noise_belongs_to_the_sample() -> None:
    options: dict[str, Any] = {"nn_model": network, "height": 4, **SCHEDULE, "noise": "philox"}
    seeds = torch.tensor([3, -7, 2**33])
    before = torch.get_rng_state()
    whole, _ = sprites.sample_ddpm(3, seeds=seeds, **options)
    for k in range(3):
        alone, _ = sprites.sample_ddpm(1, seeds=seeds[k : k + 1], **options)
        assert torch.equal(alone[0], whole[k])
    fast, _ = sprites.sample_ddim(3, nn_model=network, ab_t=AB_T, height=4, noise="philox", seeds=seeds)
    alone, _ = sprites.sample_ddim(1, nn_model=network, ab_t=AB_T, height=4, noise="philox", seeds=seeds[2:])
    assert torch.equal(alone[0], fast[2])
    assert torch.equal(torch.get_rng_state(), before)
    x, e = state(), state(seed=1)
    z = fastdiff.normal(x.shape, 5, t=40, domain="step")
    ours = sprites.denoise_add_noise(x, 40, e, **SCHEDULE, noise="philox", seeds=5)
    assert torch.equal(ours, host_ddpm_step(x, 40, e, z))
    drawn = [sprites.sample_ddpm(1, **options)[0] for _ in range(2)]
    assert not torch.equal(*drawn)


def test_tables_follow_the_schedule() -> None:
    x, e, z = (state(seed=seed) for seed in range(3))
    b, a, ab = (u.clone() for u in (B_T, A_T, AB_T))
    for _ in range(3):
        ours = sprites.denoise_add_noise(x, 50, e, z, b_t=b, a_t=a, ab_t=ab)
        assert torch.equal(ours, host_ddpm_step(x, 50, e, z, b, a, ab))
        assert torch.equal(sprites.denoise_ddim(x, 50, 30, e, ab_t=ab), host_ddim_step(x, 50, 30, e, ab))
        ab.mul_(0.9)
        b.mul_(1.1)
    for _ in range(2):
        ours = sprites.denoise_add_noise(x, 50, e, z, b_t=b, a_t=a, ab_t=ab)
        assert torch.equal(ours, host_ddpm_step(x, 50, e, z, b, a, ab))
        a.data = a * 0.9  # which leaves its version
    with torch.inference_mode():
        ab = ab.clone()
        for _ in range(2):
            assert torch.equal(sprites.denoise_ddim(x, 50, 30, e, ab_t=ab), host_ddim_step(x, 50, 30, e, ab))
            ab.mul_(0.9)
    for k in range(100):  # none are kept of schedules that are gone, or without end
        sprites.denoise_ddim(x, T, k, e, ab_t=AB_T)
    assert len(sprites._tables) <= sprites._MAX_TABLES


STEP: dict[str, Any] = {"x": state(), "t": 4, "pred_noise": state(), "z": 0} | SCHEDULE


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"t": 0}, ValueError, "t: expected .*, got 0"),
        ({"t": T + 1}, ValueError, "t: expected .*, got 101"),
        ({"t": torch.tensor([1, 2])}, TypeError, "t: expected an int"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": state().long()}, TypeError, "x: expected float32, float64, float16 or bfloat16, got torch.int64"),
        ({"pred_noise": 3}, TypeError, "pred_noise: expected a tensor, got int"),
        ({"pred_noise": state((1, 3, 4, 6))}, ValueError, r"pred_noise: expected shape \[2, 3, 4, 6\], that of x"),
        ({"z": "a"}, TypeError, "z: expected a tensor, a number or None, got str"),
        ({"z": state((1, 3, 4, 6))}, ValueError, r"z: expected shape \[2, 3, 4, 6\], that of x, got \[1, 3, 4, 6\]"),
        ({"b_t": 0.1}, TypeError, "b_t: expected a tensor, got float"),
        ({"a_t": A_T[1:]}, ValueError, r"a_t: expected shape \[timesteps \+ 1\].*got \[100\]"),
        ({"ab_t": torch.arange(T + 1)}, TypeError, "ab_t: expected a floating dtype, got torch.int64"),
        ({"noise": "randn"}, ValueError, "noise: expected one of"),
        ({"seeds": 3}, ValueError, "seeds: expected None with noise='torch'"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input_of_a_step(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sprites.denoise_add_noise(**STEP | change)
    if change.keys() <= {"x", "pred_noise"}:
        with pytest.raises(error, match=message):
            sprites.denoise_ddim(**{"x": STEP["x"], "t": 4, "t_prev": 2, "pred_noise": state(), "ab_t": AB_T} | change)


def test_a_number_as_noise() -> None:
    x, e = state(), state(seed=1)
    for z in (0, 0.0, 1, -0.5, np.float64(0.3), np.float32(0.25)):
        assert torch.equal(sprites.denoise_add_noise(x, 7, e, z, **SCHEDULE), host_ddpm_step(x, 7, e, z))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 0}, ValueError, "n: expected .*, got 0"),
        ({"n": T + 1}, ValueError, "n: expected .*, got 101"),
        ({"n_sample": 2.5}, TypeError, "n_sample: expected an int"),
        ({"height": 0}, ValueError, "height: expected"),
        ({"ab_t": AB_T[None]}, ValueError, "ab_t: expected shape"),
        ({"nn_model": lambda x, t: x[:1]}, ValueError, "pred_noise: expected"),
        ({"nn_model": lambda x, t: None}, TypeError, "pred_noise: expected a tensor, got NoneType"),
    ],
)
def test_bad_input_of_a_chain(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"n_sample": 2, "n": 10, "nn_model": network, "ab_t": AB_T, "height": 4}
    with pytest.raises(error, match=message):
        sprites.sample_ddim(**arguments | change)
