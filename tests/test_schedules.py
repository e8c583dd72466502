"""Schedules and chains: known answers, closed forms, the counted facts about each codebase, bad input."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import schedules
from fastdiff.schedules import NoiseSchedule, host_tables, pairs, space_timesteps, timesteps, visits

NAMED = [
    "linear",
    "scaled_linear",
    "quad",
    "cosine",
    "sigmoid",
    "sigmoid_alpha_bar",
    "laplace",
    "const",
    "jsd",
    "warmup10",
    "warmup50",
]


# Betas


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("total", [20, 100, 1000])
def test_named_schedules_are_float64_and_consistent(name: str, total: int) -> None:
    schedule = getattr(NoiseSchedule, name)(total)
    assert schedule.num_timesteps == len(schedule) == total
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == np.float64
    assert schedule.betas.shape == schedule.alphas_cumprod.shape == (total,)
    np.testing.assert_array_equal(schedule.alphas_cumprod, np.cumprod(1 - schedule.betas))
    assert name.startswith(schedule.name)
    assert repr(schedule) == f"NoiseSchedule({schedule.name!r}, num_timesteps={total})"


def test_linear_is_scaled_by_1000_over_t_unless_its_ends_are_given() -> None:
    for total in (20, 50, 500, 1000, 4000):
        betas = schedules.linear_betas(total)
        scale = 1000 / total
        np.testing.assert_array_equal(betas, np.linspace(scale * 1e-4, scale * 0.02, total))
    assert schedules.linear_betas(500)[-1] == 0.04
    assert schedules.linear_betas(500, scale=1)[-1] == 0.02
    assert schedules.linear_betas(500, 1e-4, 0.02)[-1] == 0.02
    assert schedules.linear_betas(500, beta_end=0.03)[0] == 1e-4
    assert schedules.linear_betas(500, 1e-4, 0.02, scale=2)[-1] == 0.04
    assert schedules.linear_betas(1, 0.5, 0.7).tolist() == [0.5]


def test_scaled_form_of_linear_is_refused_below_20_timesteps() -> None:
    assert schedules.linear_betas(20)[-1] == 1.0
    assert NoiseSchedule.linear(20).alphas_cumprod[-1] == 0.0
    with pytest.raises(ValueError, match=r"beta_end: expected a value in \(0, 1\] after scaling, got 1.05"):
        schedules.linear_betas(19)


def test_quad_is_scaled_linear() -> None:
    betas = schedules.scaled_linear_betas(1000, 0.00085, 0.012)
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (0.012**0.5 - 0.00085**0.5) / 999, rtol=1e-10)
    assert betas[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-14)
    last = NoiseSchedule.scaled_linear(1000, 0.00085, 0.012).alphas_cumprod[-1]
    assert math.sqrt(1 / last - 1) == pytest.approx(14.6146, abs=1e-4)  # Stable Diffusion's largest sigma
    assert NoiseSchedule.quad(300) == NoiseSchedule.scaled_linear(300)


def test_cosine_known_answers() -> None:
    betas = schedules.cosine_betas(1000)
    assert betas[0] == pytest.approx(4.128422482196914e-05, rel=1e-11)  # recorded from OpenAI's code
    assert betas[-1] == 0.999
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    schedule = NoiseSchedule.cosine(1000)
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], np.array(f[1:-1]) / f[0], rtol=1e-11)
    assert schedule.alphas_cumprod[-1] == pytest.approx(2.43e-9, rel=2e-3)  # what the cap leaves
    np.testing.assert_allclose(schedules.cosine_betas(1000, normalised=True), betas, rtol=0, atol=4.5e-16)
    assert schedules.cosine_betas(10, max_beta=0.5).max() == 0.5
    assert schedules.cosine_betas(10, s=0.1)[0] != schedules.cosine_betas(10)[0]


def test_sigmoid_of_betas() -> None:
    betas = schedules.sigmoid_betas(101, 0.1, 0.3)
    assert betas[50] == pytest.approx(0.2, rel=1e-14)
    assert betas[0] == pytest.approx(0.1 + 0.2 / (1 + math.exp(6)), rel=1e-14)
    np.testing.assert_allclose(betas + betas[::-1], 0.4, rtol=1e-14)


def test_sigmoid_of_alpha_bar() -> None:
    def v(a: float) -> float:
        return 1 / (1 + math.exp(-a))

    exact = NoiseSchedule.sigmoid_alpha_bar(1000, float32_ends=False)
    u = np.arange(1, 1000) / 1000
    want = np.array([(v(3) - v(-3 + 6 * x)) / (v(3) - v(-3)) for x in u])
    np.testing.assert_allclose(exact.alphas_cumprod[:-1], want, rtol=1e-12)
    assert exact.betas[-1] == 0.999

    # lucidrains' code: the two ends are 0-dim float32 tensors
    literal = schedules.sigmoid_alpha_bar_betas(1000)
    ends = torch.tensor([-3.0, 3.0]).sigmoid()
    t = torch.linspace(0, 1000, 1001, dtype=torch.float64) / 1000
    bars = (ends[1].double() - (t * 6 - 3).sigmoid()) / (ends[1] - ends[0]).double()
    bars = bars / bars[0]
    np.testing.assert_allclose(literal, (1 - bars[1:] / bars[:-1]).clamp(0, 0.999).numpy(), rtol=1e-11)
    relative = np.abs(literal - exact.betas) / exact.betas
    assert 1.2e-5 < relative.max() < 1.4e-5
    assert schedules.sigmoid_alpha_bar_betas(1000, 0, 3, 0.3)[0] != literal[0]


def test_laplace() -> None:
    betas = schedules.laplace_betas(1000)

    def root_bar(u: float) -> float:
        scale = 1 - 2 * abs(0.5 - u) + 1e-6
        snr = scale**-0.5 if u <= 0.5 else scale**0.5
        return math.sqrt(snr / (1 + snr))

    want = [1 - root_bar((i + 1) / 1000) / root_bar(i / 1000) for i in range(1000)]
    np.testing.assert_allclose(betas, want, rtol=1e-9)
    assert ((betas > 0) & (betas < 0.999)).all()


def test_const_jsd_and_warmups() -> None:
    assert schedules.const_betas(4, 0.3).tolist() == [0.3] * 4
    np.testing.assert_allclose(schedules.jsd_betas(4), [1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-15)
    np.testing.assert_allclose(NoiseSchedule.jsd(4).alphas_cumprod, [3 / 4, 2 / 4, 1 / 4, 0], rtol=1e-15)
    for name, warm in (("warmup10", 100), ("warmup50", 500)):
        betas = getattr(NoiseSchedule, name)(1000).betas
        np.testing.assert_array_equal(betas[:warm], np.linspace(1e-4, 0.02, warm))
        assert (betas[warm:] == 0.02).all() and len(betas) == 1000
    assert schedules.warmup_betas(7, 0.1).tolist() == [0.02] * 7
    np.testing.assert_array_equal(schedules.warmup_betas(9, 1.0, 0.1, 0.2), np.linspace(0.1, 0.2, 9))


def test_sprite_table() -> None:
    schedule = NoiseSchedule.sprite(500)
    betas, bars = schedule.betas, schedule.alphas_cumprod
    assert schedule.num_timesteps == 501 and bars[0] == 1.0
    np.testing.assert_allclose(betas, 1e-4 + (0.02 - 1e-4) * np.arange(501) / 500, rtol=1e-14)
    np.testing.assert_allclose(bars[1:], np.cumprod(1 - betas)[1:], rtol=1e-13)
    assert bars[1] == pytest.approx((1 - betas[0]) * (1 - betas[1]), rel=1e-14)
    # The course's own float32 table agrees to float32 rounding.
    table = NoiseSchedule.from_host("sprite", num_timesteps=500)
    np.testing.assert_allclose(table.alphas_cumprod, bars, atol=5e-7)
    assert table.alphas_cumprod[0] == 1.0 and table.num_timesteps == 501
    assert schedules.sprite_tables(3, 0.5, 1.0)[1][-1] == 0.0


def test_zero_terminal_snr() -> None:
    for schedule in (NoiseSchedule.linear(1000), NoiseSchedule.scaled_linear(1000, 0.00085, 0.012)):
        new = schedule.rescale_zero_snr()
        old_root, root = np.sqrt(schedule.alphas_cumprod), np.sqrt(new.alphas_cumprod)
        assert new.alphas_cumprod[0] == schedule.alphas_cumprod[0]
        assert new.alphas_cumprod[-1] == 0 and new.betas[-1] == 1 and new.snr[-1] == 0
        # An affine map of sqrt(alpha_bar): equal ratios of differences.
        np.testing.assert_allclose(
            np.diff(root) / np.diff(old_root), old_root[0] / (old_root[0] - old_root[-1]), rtol=1e-9
        )
        np.testing.assert_allclose(new.rescale_zero_snr().alphas_cumprod, new.alphas_cumprod, rtol=1e-14)
        assert "zero terminal SNR" in new.name
    with pytest.raises(ValueError, match="alphas_cumprod: expected a last value below the first"):
        NoiseSchedule.const(1).rescale_zero_snr()


# Float32 hosts


@pytest.mark.parametrize(
    ("host", "name", "schedule"),
    [
        ("diffusers", "linear", NoiseSchedule.linear(1000)),
        ("diffusers", "scaled_linear", NoiseSchedule.scaled_linear(1000)),
        ("diffusers", "squaredcos_cap_v2", NoiseSchedule.cosine(1000)),
        ("diffusers", "laplace", NoiseSchedule.laplace(1000)),
        ("diffusers", "sigmoid", NoiseSchedule.sigmoid(1000)),
        ("ermongroup", "linear", NoiseSchedule.linear(1000)),
        ("ermongroup", "quad", NoiseSchedule.quad(1000)),
        ("ermongroup", "const", NoiseSchedule.const(1000)),
        ("ermongroup", "jsd", NoiseSchedule.jsd(1000)),
        ("ermongroup", "sigmoid", NoiseSchedule.sigmoid(1000)),
    ],
)
def test_float32_tables_are_near_the_float64_ones(host: str, name: str, schedule: NoiseSchedule) -> None:
    betas, bars = host_tables(host, name, 1000)
    assert betas.dtype == bars.dtype == torch.float32
    assert torch.equal(bars, torch.cumprod(1 - betas, 0))
    np.testing.assert_allclose(betas.double().numpy(), schedule.betas, rtol=2e-7, atol=2e-8)
    np.testing.assert_allclose(bars.double().numpy(), schedule.alphas_cumprod, atol=1e-6)
    kept = NoiseSchedule.from_host(host, name, 1000)
    assert torch.equal(torch.from_numpy(kept.alphas_cumprod.copy()).float(), bars)
    np.testing.assert_array_equal(kept.betas, betas.double().numpy())
    assert kept.name == f"{host} {name}"


def test_float32_tables_with_zero_snr_and_trained_betas() -> None:
    betas, bars = host_tables("diffusers", "scaled_linear", 1000, rescale_zero_snr=True)
    assert bars[-1] == 0 and betas[-1] == 1
    np.testing.assert_allclose(
        bars.double().numpy(), NoiseSchedule.scaled_linear(1000).rescale_zero_snr().alphas_cumprod, atol=1e-6
    )
    for host in ("diffusers", "ermongroup"):
        assert host_tables(host, [0.1, 0.2])[0].tolist() == torch.tensor([0.1, 0.2]).tolist()
    assert NoiseSchedule.from_host("diffusers", np.array([0.1, 0.2])).name == "diffusers betas"


@pytest.mark.parametrize(
    ("host", "name"),
    [("diffusers", name) for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")]
    + [("ermongroup", "quad"), ("sprite", "linear")],
)
def test_float32_tables_are_made_on_the_cpu(host: str, name: str) -> None:
    expected = NoiseSchedule.from_host(host, name, 30, rescale_zero_snr=host == "diffusers")
    with torch.device("meta"):
        assert NoiseSchedule.from_host(host, name, 30, rescale_zero_snr=host == "diffusers") == expected


def test_float32_effects() -> None:
    """How far float32 tables are from float64 ones where it shows most: 1 - alpha_bar at t = 0."""
    exact = NoiseSchedule.linear(1000).alphas_cumprod
    table = NoiseSchedule.from_host("diffusers", "linear").alphas_cumprod
    assert 1e-5 < abs((1 - table[0]) / (1 - exact[0]) - 1) < 5e-4
    assert np.abs(table - exact).max() < 5e-7


def test_from_alphas_cumprod_keeps_float32_exactly() -> None:
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for given_ in (bars, bars.numpy(), bars.numpy().tolist(), bars.double(), bars.clone().requires_grad_()):
        schedule = NoiseSchedule.from_alphas_cumprod(given_)
        assert torch.equal(torch.from_numpy(schedule.alphas_cumprod.copy()).float(), bars)
        np.testing.assert_array_equal(schedule.alphas_cumprod, bars.double().numpy())
    np.testing.assert_allclose(schedule.betas, np.linspace(1e-4, 0.02, 1000), rtol=2e-3, atol=3e-7)
    half = NoiseSchedule.from_alphas_cumprod(torch.tensor([0.5, 0.25], dtype=torch.bfloat16))
    assert half.alphas_cumprod.tolist() == [0.5, 0.25] and half.betas.tolist() == [0.5, 0.5]


# The class


def test_schedule_is_immutable() -> None:
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule.from_betas(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.5
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5
    with pytest.raises(AttributeError):
        schedule.name = "other"  # type: ignore[misc]  # that this fails is the point


def test_equality_and_hash_are_by_content() -> None:
    one, two = NoiseSchedule.linear(50), NoiseSchedule.from_betas(schedules.linear_betas(50), name="mine")
    assert one == two and hash(one) == hash(two) and len({one, two}) == 1
    assert one != NoiseSchedule.linear(51) and one != NoiseSchedule.cosine(50)
    assert one != "linear"
    zero = NoiseSchedule(np.array([-0.0, 0.5]), np.array([1.0, 0.5]))
    other = NoiseSchedule(np.array([0.0, 0.5]), np.array([1.0, 0.5]))
    assert zero == other and hash(zero) == hash(other)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_equal_and_read_only(again) -> None:
    schedule = NoiseSchedule.cosine(30)
    same = again(schedule)
    assert same == schedule and hash(same) == hash(schedule) and same.name == "cosine"
    assert not same.betas.flags.writeable and not same.alphas_cumprod.flags.writeable


def test_derived_tables() -> None:
    schedule = NoiseSchedule.from_betas([0.5, 0.5, 1.0])
    assert schedule.alphas_cumprod.tolist() == [0.5, 0.25, 0.0]
    assert schedule.alphas_cumprod_prev.tolist() == [1.0, 0.5, 0.25]
    assert schedule.alphas_cumprod_next.tolist() == [0.25, 0.0, 0.0]
    assert schedule.snr.tolist() == [1.0, 1 / 3, 0.0]
    assert NoiseSchedule.sprite(3).snr[0] == math.inf
    assert schedule.alpha_bar(1) == 0.25 and schedule.alpha_bar(-1) == 1.0
    assert schedule.alpha_bar([2, -1, 0], final=0.5).tolist() == [0.0, 0.5, 0.5]
    assert schedule.alpha_bar(np.array([[0], [1]])).shape == (2, 1)


@pytest.mark.parametrize(
    ("betas", "error", "message"),
    [
        ([0.1, float("nan")], ValueError, r"betas: expected values in \(0, 1\], got nan at index 1"),
        ([0.1, float("inf")], ValueError, r"betas: expected values in \(0, 1\], got inf at index 1"),
        ([0.1, 1.5, 0.2], ValueError, r"betas: expected values in \(0, 1\], got 1.5 at index 1"),
        ([0.0, 0.5], ValueError, r"betas: expected values in \(0, 1\], got 0.0 at index 0"),
        ([-0.1], ValueError, r"betas: expected values in \(0, 1\], got -0.1 at index 0"),
        ([], ValueError, r"betas: expected a non-empty 1-D sequence, got shape \(0,\)"),
        (0.5, ValueError, r"betas: expected a non-empty 1-D sequence, got shape \(\)"),
        ([[0.1, 0.2]], ValueError, r"betas: expected a non-empty 1-D sequence, got shape \(1, 2\)"),
        ([[0.1], [0.2, 0.3]], ValueError, "betas: expected a 1-D sequence of numbers, got a ragged one"),
        (["0.1"], TypeError, "betas: expected real numbers, got dtype <U3"),
        ([0.1j], TypeError, "betas: expected real numbers, got dtype complex128"),
        ([True], TypeError, "betas: expected real numbers, got dtype bool"),
        ([None], TypeError, "betas: expected real numbers, got dtype object"),
        (None, TypeError, "betas: expected real numbers, got dtype object"),
        ([1.0, 0.5], ValueError, "alphas_cumprod: expected values > 0 before the last one"),
        ([0.999] * 200, ValueError, "alphas_cumprod: expected values > 0 before the last one"),
    ],
)
def test_bad_betas(betas: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NoiseSchedule.from_betas(betas)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        ([0.5, float("nan")], r"alphas_cumprod: expected values in \[0, 1\], got nan at index 1"),
        ([1.5], r"alphas_cumprod: expected values in \[0, 1\], got 1.5 at index 0"),
        ([0.5, -1e-9], r"alphas_cumprod: expected values in \[0, 1\], got -1e-09 at index 1"),
        ([0.5, 0.6], "alphas_cumprod: expected values that never rise with the timestep, got 0.6 at index 1"),
        ([0.5, 0.0, 0.0], "alphas_cumprod: expected values > 0 before the last one .*, got 0.0 at index 1"),
        ([], r"alphas_cumprod: expected a non-empty 1-D sequence, got shape \(0,\)"),
    ],
)
def test_bad_alphas_cumprod(bars: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_alphas_cumprod(bars)
    with pytest.raises(ValueError, match=message):
        schedules.rescale_zero_terminal_snr(bars)


def test_bad_direct_construction() -> None:
    with pytest.raises(ValueError, match="alphas_cumprod: expected 2 values, as many as betas, got 1"):
        NoiseSchedule(np.array([0.1, 0.2]), np.array([0.9]))
    with pytest.raises(ValueError, match=r"betas: expected values in \[0, 1\], got 1.1 at index 0"):
        NoiseSchedule(np.array([1.1]), np.array([0.9]))
    with pytest.raises(TypeError, match="name: expected a str, got int"):
        NoiseSchedule(np.array([0.1]), np.array([0.9]), 3)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NoiseSchedule.linear(0), ValueError, "num_timesteps: expected an int >= 1, got 0"),
        (lambda: NoiseSchedule.cosine(-3), ValueError, "num_timesteps: expected an int >= 1, got -3"),
        (lambda: NoiseSchedule.jsd(10.0), TypeError, "num_timesteps: expected an int, got float 10.0"),
        (lambda: NoiseSchedule.jsd(True), TypeError, "num_timesteps: expected an int, got True"),
        (lambda: NoiseSchedule.jsd("10"), TypeError, "num_timesteps: expected an int, got str '10'"),
        (
            lambda: NoiseSchedule.quad(9, 0.0),
            ValueError,
            r"beta_start: expected a value in \(0, 1\], got 0.0",
        ),
        (lambda: NoiseSchedule.quad(9, 0.1, 2), ValueError, r"beta_end: expected a value in \(0, 1\], got 2"),
        (lambda: NoiseSchedule.quad(9, float("nan")), ValueError, "beta_start: expected a finite number"),
        (lambda: NoiseSchedule.quad(9, "a"), TypeError, "beta_start: expected a number, got 'a'"),
        (lambda: NoiseSchedule.quad(9, None), TypeError, "beta_start: expected a number, got NoneType"),
        (lambda: NoiseSchedule.linear(9, scale=float("inf")), ValueError, "scale: expected a finite number"),
        (lambda: NoiseSchedule.cosine(9, -0.1), ValueError, "s: expected a value >= 0, got -0.1"),
        (lambda: NoiseSchedule.cosine(9, 0.008, 1.1), ValueError, r"max_beta: expected a value in \(0, 1\]"),
        (
            lambda: NoiseSchedule.warmup(9, 1.5),
            ValueError,
            r"fraction: expected a value in \[0, 1\], got 1.5",
        ),
        (
            lambda: NoiseSchedule.sigmoid_alpha_bar(9, 3, -3),
            ValueError,
            "end: expected a value > start = 3.0",
        ),
        (lambda: NoiseSchedule.sigmoid_alpha_bar(9, tau=0), ValueError, "tau: expected a value > 0, got 0.0"),
        (lambda: host_tables("openai"), ValueError, "host: expected 'diffusers', 'ermongroup' or 'sprite'"),
        (
            lambda: host_tables("diffusers", "quad"),
            ValueError,
            r"betas: expected one of \['laplace', .*'quad'",
        ),
        (lambda: host_tables("sprite", "quad"), ValueError, "betas: expected 'linear' with host 'sprite'"),
        (lambda: host_tables("sprite", [0.1]), ValueError, "betas: expected 'linear' with host 'sprite'"),
        (lambda: host_tables("diffusers", [0.0]), ValueError, r"betas: expected values in \(0, 1\], got 0.0"),
        (
            lambda: host_tables("ermongroup", rescale_zero_snr=True),
            ValueError,
            "rescale_zero_snr: expected False with host 'ermongroup', got True",
        ),
        (lambda: NoiseSchedule.jsd(9).alpha_bar(9), ValueError, r"t: expected timesteps in \[-1, 9\), got 9"),
        (lambda: NoiseSchedule.jsd(9).alpha_bar([0, -2]), ValueError, "t: expected timesteps in .* got -2"),
        (lambda: NoiseSchedule.jsd(9).alpha_bar(1.0), TypeError, "t: expected ints, got dtype float64"),
        (
            lambda: NoiseSchedule.jsd(9).alpha_bar(0, final=2),
            ValueError,
            r"final: expected a value in \[0, 1\]",
        ),
        (lambda: NoiseSchedule.jsd(9).respace([]), ValueError, "timesteps: expected at least one timestep"),
        (
            lambda: NoiseSchedule.jsd(9).respace([9]),
            ValueError,
            r"timesteps: expected an int in \[0, 8\], got 9",
        ),
        (lambda: NoiseSchedule.jsd(9).respace([1.0]), TypeError, "timesteps: expected an int, got float 1.0"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Respacing


def test_respace_keeps_alpha_bar_and_makes_its_betas() -> None:
    schedule = NoiseSchedule.cosine(1000)
    chain = timesteps(schedule, "100")
    spaced, timestep_map = schedule.respace(chain)
    assert timestep_map == chain[::-1] and spaced.num_timesteps == 100 and spaced.name == "cosine[100]"
    np.testing.assert_array_equal(spaced.alphas_cumprod, schedule.alphas_cumprod[list(timestep_map)])
    last = 1.0
    for beta, t in zip(spaced.betas, timestep_map, strict=True):  # improved-diffusion's loop
        assert beta == 1 - schedule.alphas_cumprod[t] / last
        last = schedule.alphas_cumprod[t]
    np.testing.assert_allclose(NoiseSchedule.from_betas(spaced.betas).alphas_cumprod, spaced.alphas_cumprod, rtol=1e-8)


def test_respace_edge_cases() -> None:
    schedule = NoiseSchedule.linear(100)
    whole, timestep_map = schedule.respace(timesteps(schedule))
    np.testing.assert_array_equal(whole.alphas_cumprod, schedule.alphas_cumprod)
    assert timestep_map == tuple(range(100))
    one, timestep_map = schedule.respace([99])
    assert timestep_map == (99,) and one.betas[0] == 1 - schedule.alphas_cumprod[99]
    assert schedule.respace({5, 2})[1] == schedule.respace([5, 2, 5])[1] == (2, 5)
    assert schedule.respace(np.array([7, 3]))[1] == (3, 7)


# OpenAI's space_timesteps


def test_space_timesteps_known_answers() -> None:
    assert space_timesteps(1000, "5") == space_timesteps(1000, [5]) == (999, 749, 500, 250, 0)
    assert space_timesteps(1000, "50")[:3] == (999, 979, 958)
    assert space_timesteps(1000, "50")[::-1][:4] == (0, 20, 41, 61)
    assert space_timesteps(1000, "ddim50") == tuple(range(980, -1, -20))
    assert space_timesteps(300, [10, 15, 20])[:3] == (299, 294, 289)
    assert space_timesteps(1000, "2,1,3") == (999, 833, 667, 334, 333, 0)  # sections of 334, 333 and 333
    assert space_timesteps(1000, [1]) == (0,)
    assert space_timesteps(10, "0,2") == (9, 5)
    assert space_timesteps(7, [7]) == (6, 5, 4, 3, 2, 1, 0)
    assert space_timesteps(1, "1") == (0,)


def test_space_timesteps_counts() -> None:
    works = []
    for count in range(1, 1001):
        try:
            chain = space_timesteps(1000, f"ddim{count}")
        except ValueError:
            continue
        assert len(chain) == count and chain[-1] == 0
        works.append(count)
    assert len(works) == 62
    assert {1, 60, 300}.isdisjoint(works) and {36, 38, 39, 40, 50, 334, 500, 1000} <= set(works)
    rounded = [
        count
        for count in range(2, 1001)
        if space_timesteps(1000, [count]) != tuple(np.linspace(0, 999, count).round().astype(int)[::-1])
    ]
    assert len(rounded) == 278 and rounded[:4] == [21, 23, 31, 35]
    exact = [
        count
        for count in range(2, 1001)
        if space_timesteps(1000, [count]) != tuple(round(Fraction(999 * i, count - 1)) for i in range(count))[::-1]
    ]
    assert len(exact) == 283


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ("ddim300", ValueError, "got 'ddim300': no stride over 1000 timesteps visits exactly 300"),
        ("ddim1", ValueError, "no stride over 1000 timesteps visits exactly 1"),
        ("ddim", ValueError, "expected 'a,b,c' with ints, or 'ddimN', got 'ddim'"),
        ("ddim0", ValueError, "visits exactly 0"),
        ("", ValueError, "expected 'a,b,c' with ints, or 'ddimN', got ''"),
        ("10,x", ValueError, "expected 'a,b,c' with ints, or 'ddimN', got '10,x'"),
        ("10,-5", ValueError, r"expected counts >= 0 and at least one timestep, got \[10, -5\]"),
        ("0,0", ValueError, r"expected counts >= 0 and at least one timestep, got \[0, 0\]"),
        ([], ValueError, r"expected counts >= 0 and at least one timestep, got \[\]"),
        ([10.0], TypeError, "expected an int, got float 10.0"),
        ("1001", ValueError, r"at most 1000 timesteps in section 0 of 1 \(of 1000 timesteps\), got 1001"),
        ("334,334,1", ValueError, "at most 333 timesteps in section 1 of 3"),
    ],
)
def test_bad_section_counts(counts: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"section_counts: .*" + message):
        space_timesteps(1000, counts)  # type: ignore[arg-type]  # wrong on purpose


# Spacings


def test_spacing_known_answers() -> None:
    assert timesteps(5) == (4, 3, 2, 1, 0)
    assert timesteps(1000, 4) == timesteps(1000, 4, "trailing") == (999, 749, 499, 249)
    assert timesteps(1000, 4, "leading") == (750, 500, 250, 0)
    assert timesteps(1000, 4, "leading", steps_offset=1) == (751, 501, 251, 1)
    assert timesteps(1000, 4, "linspace") == (999, 666, 333, 0)
    assert timesteps(1000, 5, "openai") == timesteps(1000, "5") == timesteps(1000, "5", "openai")
    assert timesteps(1000, "ddim4") == (750, 500, 250, 0)
    assert timesteps(1000, 4, "lucidrains") == (999, 749, 499, 249)
    assert timesteps(1000, 5, "lucidrains") == (999, 799, 599, 399, 199)
    assert timesteps(1000, 10, "uniform") == tuple(range(900, -1, -100))
    assert timesteps(1000, 10, "uniform", steps_offset=1)[0] == 901  # CompVis
    assert timesteps(1000, 7, "quad") == (800, 555, 355, 200, 88, 22, 0)  # recorded from ermongroup's code
    assert timesteps(501, 20, "sprite") == tuple(range(500, 0, -25))
    assert timesteps(NoiseSchedule.cosine(1000), 4) == timesteps(1000, 4)
    assert all(type(t) is int for spacing in schedules._SPACINGS for t in timesteps(1000, 10, spacing))


def test_one_step() -> None:
    assert timesteps(1000, 1) == timesteps(1000, 1, "lucidrains") == (999,)
    for spacing in ("leading", "linspace", "openai", "uniform", "quad"):
        assert timesteps(1000, 1, spacing) == (0,)
    assert pairs(1000, 1) == ((999, -1),)
    assert pairs(1, 1) == ((0, -1),) and timesteps(1) == (0,)


@pytest.mark.parametrize("total", [1, 2, 3, 77, 250, 1000])
def test_corrected_chains_for_every_count(total: int) -> None:
    for count in range(1, total + 1):
        for spacing in ("leading", "linspace", "trailing", "openai", "lucidrains"):
            for offset in (0, 1) if spacing == "leading" else (0,):
                chain = timesteps(total, count, spacing, steps_offset=offset)
                assert len(chain) == len(set(chain)) == count and 0 <= chain[-1] and chain[0] < total
                if count > 1:
                    assert np.diff(chain).max() < 0
                if spacing in ("trailing", "lucidrains"):
                    assert chain[0] == total - 1


def test_diffusers_trailing_to_the_letter() -> None:
    broken = []
    for count in range(1, 1001):
        literal = timesteps(1000, count, "trailing", host="diffusers")
        want = np.round(np.arange(1000, 0, -1000 / count)).astype(np.int64) - 1
        assert literal == tuple(want)
        ours = timesteps(1000, count, "trailing")
        if len(literal) != count:
            broken.append(count)
            assert literal == (*ours, -1)
        else:
            assert literal == ours
    assert len(broken) == 62 and broken[:6] == [61, 103, 121, 122, 201, 206]


def test_diffusers_leading_and_linspace_to_the_letter() -> None:
    for count in range(1, 1001):
        for offset in (0, 1):
            want = (np.arange(0, count) * (1000 // count)).round()[::-1].astype(np.int64) + offset
            literal = timesteps(1000, count, "leading", steps_offset=offset, host="diffusers")
            assert literal == tuple(want)
            if want[0] < 1000:
                assert literal == timesteps(1000, count, "leading", steps_offset=offset)
        want = np.linspace(0, 999, count).round()[::-1].astype(np.int64)
        assert timesteps(1000, count, "linspace", steps_offset=1, host="diffusers") == tuple(want)
        assert timesteps(1000, count, "linspace") == tuple(want)
    assert timesteps(1000, 1000, "leading", steps_offset=1, host="diffusers")[0] == 1000  # not a timestep
    assert timesteps(1000, 1000, "leading", steps_offset=1) == timesteps(1000)


def test_lucidrains_to_the_letter() -> None:
    off_grid = []
    for count in range(1, 1000):
        chain = timesteps(1000, count, "lucidrains")
        assert chain == tuple(torch.linspace(-1, 999, count + 1).int().tolist()[:0:-1])
        if chain != tuple(1000 * i // count - 1 for i in range(count, 0, -1)):
            off_grid.append(count)
    assert len(off_grid) == 84 and off_grid[:4] == [26, 52, 60, 104]


def test_ermongroup_counts() -> None:
    assert [len(timesteps(1000, count, "uniform")) for count in (30, 300, 600)] == [31, 334, 1000]
    for count, distinct in ((100, 96), (1000, 688)):
        chain = timesteps(1000, count, "quad")
        assert len(chain) == count and len(set(chain)) == distinct and chain[0] == 800
        assert np.diff(chain).max() <= 0
    chain = timesteps(1000, 100, "quad")
    assert chain[-8:] == (3, 2, 2, 1, 0, 0, 0, 0) and visits(chain)[-8:] == (0, 0, 1, 0, 0, 1, 2, 3)
    assert pairs(1000, 100, "quad")[-1] == (0, -1)


def test_diffusers_ddim_stride() -> None:
    """diffusers' DDIM moves to t - T//S whatever the spacing; counted over S = 1..200 of T = 1000."""

    def compare(spacing: str) -> tuple[int, int]:
        off_list = unfinished = 0
        for count in range(1, 201):
            by_list = pairs(1000, count, spacing, host="diffusers")
            by_stride = pairs(1000, count, spacing, host="diffusers", previous="stride")
            assert [t for t, _ in by_list] == [t for t, _ in by_stride]
            off_list += by_list != by_stride
            unfinished += by_stride[-1][1] >= 0
        return off_list, unfinished

    assert compare("linspace") == (199, 0)
    assert compare("trailing") == (187, 87)
    assert compare("leading") == (0, 0)
    assert pairs(1000, 3, "leading", steps_offset=1, previous="stride") == ((667, 334), (334, 1), (1, -1))
    assert pairs(1000, 3, previous="stride") == ((999, 666), (666, 333), (332, -1))


# Given chains, pairs, visits, start


def test_given_chains() -> None:
    for given_ in (
        [9, 5, 0],
        (9, 5, 0),
        np.array([9, 5, 0]),
        np.array([9, 5, 0], dtype=np.int16),
        torch.tensor([9, 5, 0]),
        {0, 9, 5},
        frozenset({0, 9, 5}),
        iter([9, 5, 0]),
    ):
        chain = timesteps(10, given_)
        assert chain == (9, 5, 0) and all(type(t) is int for t in chain)
    assert timesteps(10, range(9, -1, -3)) == (9, 6, 3, 0)
    assert timesteps(10, np.int64(5)) == timesteps(10, torch.tensor(5)) == timesteps(10, np.array(5))
    assert timesteps(10, [9, 5, 5, 5, 0]) == (9, 5, 5, 5, 0)
    assert pairs(10, [9, 5, 5, 0]) == ((9, 5), (5, 5), (5, 0), (0, -1))


def test_given_pairs() -> None:
    want = ((9, 4), (4, 4), (7, -1))
    for given_ in (want, [list(p) for p in want], np.array(want), torch.tensor(want)):
        assert pairs(10, given_) == want
        assert timesteps(10, given_) == (9, 4, 7)


def test_visits() -> None:
    assert visits((9, 5, 5, 0)) == (0, 0, 1, 0)
    assert visits([3, 2, 3, 2, 3]) == (0, 0, 1, 1, 2)
    assert visits([]) == ()
    assert visits(np.array([1, 1])) == (0, 1)
    with pytest.raises(TypeError):
        visits([1.0])  # type: ignore[list-item]  # wrong on purpose


def test_start() -> None:
    assert timesteps(10, start=4) == (4, 3, 2, 1, 0)
    assert timesteps(10, start=9) == timesteps(10, start=0.0) == timesteps(10)
    assert timesteps(1000, 50, start=0.2) == timesteps(1000, 50)[10:]
    assert timesteps(1000, 100, start=0.29) == timesteps(1000, 100)[29:]  # 0.29 * 100 < 29 in floating point
    assert timesteps(1000, 4, start=700) == (499, 249)
    assert timesteps(1000, 4, start=0.99) == (249,)
    assert timesteps(1000, 4, start=np.float32(0.5)) == (499, 249)
    assert timesteps(10, [9, 5, 5, 0], start=5) == (5, 5, 0)
    assert pairs(1000, 4, start=0.5) == ((499, 249), (249, -1))
    assert pairs(1000, 3, previous="stride", start=0.5) == pairs(1000, 3, previous="stride")[2:]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((0,), {}, ValueError, "schedule .*: expected an int >= 1, got 0"),
        (("linear",), {}, TypeError, "schedule .*: expected an int, got str 'linear'"),
        ((10, 0), {}, ValueError, r"steps: expected an int in \[1, 10\], got 0"),
        ((10, 11), {}, ValueError, r"steps: expected an int in \[1, 10\], got 11"),
        ((10, 5.0), {}, TypeError, "steps: expected an int, got float 5.0"),
        ((10, True), {}, TypeError, "steps: expected an int, got True"),
        ((10, []), {}, ValueError, "steps: expected at least one timestep, got none"),
        ((10, [0, 5]), {}, ValueError, "steps: expected timesteps in descending order, got 5 after 0"),
        ((10, [10, 5]), {}, ValueError, r"steps: expected an int in \[0, 9\], got 10"),
        ((10, [5, -1]), {}, ValueError, r"steps: expected an int in \[0, 9\], got -1"),
        ((10, [5.0, 1.0]), {}, TypeError, "steps: expected an int, got float 5.0"),
        ((10, torch.tensor([5.0, 1.0])), {}, TypeError, "steps: expected an int, got Tensor"),
        ((10, [(5, 6)]), {}, ValueError, r"steps: expected pairs .* with t_prev <= t, got \(5, 6\)"),
        ((10, [(5, 4, 3)]), {}, ValueError, r"steps: expected pairs \(t, t_prev\), got \(5, 4, 3\)"),
        ((10, [(5, 4), 3]), {}, ValueError, r"steps: expected pairs \(t, t_prev\), got 3"),
        ((10, [(10, 4)]), {}, ValueError, r"steps \(t of a pair\): expected an int in \[0, 9\], got 10"),
        (
            (10, [(5, -2)]),
            {},
            ValueError,
            r"steps \(t_prev of a pair\): expected an int in \[-1, 9\], got -2",
        ),
        ((10, 5, "middle"), {}, ValueError, "spacing: expected one of .*, got 'middle'"),
        (
            (10, 5, "uniform"),
            {"host": "diffusers"},
            ValueError,
            "spacing: expected 'leading', .*, got 'uniform'",
        ),
        ((10, "5", "leading"), {}, ValueError, "spacing: expected None or 'openai' with steps '5'"),
        ((10, [5], "leading"), {}, ValueError, "spacing: expected None unless steps is a number of steps"),
        ((10, None, "leading"), {}, ValueError, "spacing: expected None unless steps is a number of steps"),
        ((10, "11"), {}, ValueError, "section_counts: expected at most 10 timesteps in section 0"),
        ((10, 5), {"host": "openai"}, ValueError, "host: expected None or 'diffusers', got 'openai'"),
        ((10, 5), {"steps_offset": 1}, ValueError, "steps_offset: expected 0 with spacing 'trailing', got 1"),
        ((10, [5]), {"steps_offset": 1}, ValueError, "steps_offset: expected 0 unless steps is a number"),
        ((10, 5, "leading"), {"steps_offset": -1}, ValueError, "steps_offset: expected an int >= 0, got -1"),
        (
            (10, 10, "uniform"),
            {"steps_offset": 1},
            ValueError,
            "steps_offset: expected one that keeps .* got 1",
        ),
        (
            (10, 5),
            {"start": 1.0},
            ValueError,
            r"start: expected a fraction in \[0, 1\) or a timestep, got 1.0",
        ),
        ((10, 5), {"start": -0.1}, ValueError, r"start: expected a fraction in \[0, 1\) or a timestep"),
        ((10, 5), {"start": float("nan")}, ValueError, "start: expected a finite number, got nan"),
        ((10, 5), {"start": 10}, ValueError, r"start: expected an int in \[0, 9\], got 10"),
        ((10, 5), {"start": True}, TypeError, "start: expected an int, got True"),
        ((10, 5), {"start": "5"}, TypeError, "start: expected an int, got str '5'"),
        ((10, [9, 5]), {"start": 4}, ValueError, "start: expected a timestep of at least 5, .* got 4"),
        (
            (1, 1, "sprite"),
            {},
            ValueError,
            "schedule: expected at least 2 timesteps with spacing 'sprite', got 1",
        ),
    ],
)
def test_bad_chains(args: tuple, kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timesteps(*args, **kwargs)


def test_bad_previous() -> None:
    with pytest.raises(ValueError, match="previous: expected 'list' or 'stride', got 'next'"):
        pairs(10, 5, previous="next")
    with pytest.raises(ValueError, match="previous: expected 'list' unless steps is a number of steps"):
        pairs(10, [5, 0], previous="stride")


# Properties


@settings(max_examples=100, deadline=None)
@given(data=st.data(), total=st.integers(1, 5000))
def test_chain_properties(data: st.DataObject, total: int) -> None:
    count = data.draw(st.integers(1, total))
    spacing = data.draw(st.sampled_from(["leading", "linspace", "openai", "trailing"]))
    chain = timesteps(total, count, spacing)
    assert len(chain) == count and sorted(set(chain), reverse=True) == list(chain)
    steps = pairs(total, count, spacing)
    assert tuple(t for t, _ in steps) == chain
    assert tuple(p for _, p in steps) == (*chain[1:], -1)
    assert timesteps(total, chain) == chain == timesteps(total, steps)
    assert pairs(total, steps) == steps and visits(chain) == (0,) * count
    first = data.draw(st.integers(chain[-1], total - 1))
    assert timesteps(total, count, spacing, start=first) == tuple(t for t in chain if t <= first)
    fraction = data.draw(st.floats(0, 1, exclude_max=True))
    rest = timesteps(total, count, spacing, start=fraction)
    assert rest and rest == chain[count - len(rest) :]


@settings(max_examples=50, deadline=None)
@given(
    total=st.integers(4, 400),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda c: sum(c)),
)
def test_space_timesteps_properties(total: int, counts: list[int]) -> None:
    sizes = [total // len(counts) + (i < total % len(counts)) for i in range(len(counts))]
    if any(count > size for count, size in zip(counts, sizes, strict=True)):
        with pytest.raises(ValueError, match="section_counts"):
            space_timesteps(total, counts)
        return
    chain = space_timesteps(total, counts)
    assert len(chain) == sum(counts)
    begin = 0
    for count, size in zip(counts, sizes, strict=True):
        inside = [t for t in chain if begin <= t < begin + size]
        assert len(inside) == count
        if count:
            assert inside[-1] == begin
        if count > 1:
            assert inside[0] == begin + size - 1
        begin += size
    assert space_timesteps(total, ",".join(map(str, counts))) == chain


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=50))
def test_betas_round_trip(betas: list[float]) -> None:
    schedule = NoiseSchedule.from_betas(betas)
    again = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod)
    np.testing.assert_allclose(again.betas, betas, rtol=1e-9)
    np.testing.assert_array_equal(again.alphas_cumprod, schedule.alphas_cumprod)


def test_module_needs_numpy_only() -> None:
    """The schedules load and work where torch is not imported yet."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('schedules', {schedules.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['schedules'] = module\n"
        "spec.loader.exec_module(module)\n"
        "module.NoiseSchedule.cosine(10), module.timesteps(1000, 10, 'lucidrains')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
