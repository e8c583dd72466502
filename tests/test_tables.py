"""Tables against the papers' formulas, written out here per timestep in plain Python floats."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import native, ops, reference, tables
from fastdiff.schedules import NoiseSchedule, timesteps
from fastdiff.tables import COLUMN, COLUMNS, Structure, Table

SCHEDULES = {
    "linear": NoiseSchedule.linear(1000),
    "cosine": NoiseSchedule.cosine(1000),
    "short": NoiseSchedule.linear(24, 0.01, 0.3),
}
CHAINS = {
    "all": None,
    "respaced": "10",
    "trailing": 7,
    "skips the first part": [700, 350, 12, 3],
    "one": [600],
}
PREDICTIONS = ("eps", "x0", "v", "x_prev")


def chain_of(schedule, chain):
    if isinstance(chain, list):
        chain = [min(t, schedule.num_timesteps - 1 - i) for i, t in enumerate(chain)]
    kept = timesteps(schedule, chain)
    return chain, kept, [*kept[1:], -1]


def alpha_bar(schedule, t, final=1.0):
    return float(schedule.alphas_cumprod[t]) if t >= 0 else final


def model_outputs(x, x0, ab, abp):
    """What each kind of model would say of the pair (x_t, x_0)."""
    eps = (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
    beta = 1 - ab / abp
    c1 = math.sqrt(abp) * beta / (1 - ab)
    c2 = math.sqrt(1 - beta) * (1 - abp) / (1 - ab)
    return {
        "eps": eps,
        "x0": x0,
        "v": math.sqrt(ab) * eps - math.sqrt(1 - ab) * x0,
        "x_prev": c1 * x0 + c2 * x,
    }


def state(seed=0, shape=(3, 2, 4)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def run(table, row, x, model_output, z):
    noise = z if table.structure.variance != "none" else None
    return reference.step(table.rows[row], table.structure, x, model_output, z=noise)


def close(actual, expected, tolerance=1e-9):
    scale = max(1.0, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_is_equation_11(name, chain, variance):
    """Ho et al. 2020, eq. 11: the mean from eps alone, with sigma^2 = beta or beta tilde (eq. 7)."""
    schedule = SCHEDULES[name]
    given_chain, kept, previous = chain_of(schedule, CHAINS[chain])
    table = tables.ddpm_table(schedule, given_chain, variance=variance)
    assert table.timesteps == kept
    x, eps, z = state()
    for row, (t, prev) in enumerate(zip(kept, previous, strict=True)):
        ab, abp = alpha_bar(schedule, t), alpha_bar(schedule, prev)
        beta = 1 - ab / abp
        sigma = math.sqrt(beta * (1 - abp) / (1 - ab) if variance == "fixed_small" else beta) if prev >= 0 else 0
        expected = (x - beta / math.sqrt(1 - ab) * eps) / math.sqrt(1 - beta) + sigma * z
        close(run(table, row, x, eps, z)[0], expected, 1e-9 + 1e-12 / ab)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_posterior_mean_is_equation_7(prediction, chain):
    schedule = SCHEDULES["linear"]
    given_chain, kept, previous = chain_of(schedule, CHAINS[chain])
    table = tables.ddpm_table(schedule, given_chain, prediction=prediction, noise=False)
    x, x0, _ = state(1)
    for row, (t, prev) in enumerate(zip(kept, previous, strict=True)):
        ab, abp = alpha_bar(schedule, t), alpha_bar(schedule, prev)
        outputs = model_outputs(x, x0, ab, abp)
        actual, predicted = run(table, row, x, outputs[prediction], None)
        close(actual, outputs["x_prev"])
        close(predicted, x0, 1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eps", ["raw", "rederived"])
def test_ddim_is_equation_12(prediction, eta, eps):
    """Song et al. 2021, eq. 12 and 16; outputs that mean the same give the same step."""
    schedule = SCHEDULES["linear"]
    chain, kept, previous = chain_of(schedule, [990, 700, 350, 12, 3])
    table = tables.ddim_table(schedule, chain, eta=eta, prediction=prediction, eps=eps)
    assert (table.structure.variance == "none") == (eta == 0)
    x, x0, z = state(2)
    for row, (t, prev) in enumerate(zip(kept, previous, strict=True)):
        ab, abp = alpha_bar(schedule, t), alpha_bar(schedule, prev)
        outputs = model_outputs(x, x0, ab, abp)
        sigma = eta * math.sqrt((1 - abp) / (1 - ab)) * math.sqrt(1 - ab / abp)
        direction = math.sqrt(max(1 - abp - sigma**2, 0.0)) * outputs["eps"]
        close(run(table, row, x, outputs[prediction], z)[0], math.sqrt(abp) * x0 + direction + sigma * z, 1e-8)


@pytest.mark.parametrize("variance", ["learned", "learned_range", "learned_plain"])
def test_learned_variance(variance):
    """Nichol and Dhariwal 2021, eq. 15: log sigma^2 = f log beta + (1-f) log beta_tilde, f = (v+1)/2."""
    schedule = SCHEDULES["linear"]
    chain, kept, previous = chain_of(schedule, [990, 350, 12, 3])
    table = tables.ddpm_table(schedule, chain, variance=variance)
    plain = tables.ddpm_table(schedule, chain, noise=False)
    x, eps, z = state(3)
    v = torch.rand(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for row, (t, prev) in enumerate(zip(kept, previous, strict=True)):
        ab, abp = alpha_bar(schedule, t), alpha_bar(schedule, prev)
        beta = 1 - ab / abp
        if variance == "learned_range" and prev >= 0:
            f, tilde = (v + 1) / 2, beta * (1 - abp) / (1 - ab)
            std = torch.exp(0.5 * (f * math.log(beta) + (1 - f) * math.log(tilde)))
        else:
            std = torch.exp(0.5 * v) if variance == "learned" else torch.sqrt(v)
        expected = run(plain, row, x, eps, None)[0] + (std * z if prev >= 0 else 0)
        close(run(table, row, x, torch.cat([eps, v], 1), z)[0], expected)


@pytest.mark.parametrize("clip", [None, 0.6, (-0.2, 0.9)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_eta_1_and_rederived_eps_is_ddpm(name, clip):
    schedule = SCHEDULES[name]
    ddpm = tables.ddpm_table(schedule, 12, clip=clip)
    ddim = tables.ddim_table(schedule, 12, eta=1.0, clip=clip, eps="rederived")
    raw = tables.ddim_table(schedule, 12, eta=1.0, clip=clip)
    x, eps, z = state(5)
    for row in range(12):
        expected = run(ddpm, row, x, eps, z)[0]
        close(run(ddim, row, x, eps, z)[0], expected, 1e-7)
        if clip is not None and row == 3:
            assert float((run(raw, row, x, eps, z)[0] - expected).abs().max()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_last_step_returns_x0_bit_for_bit(name, chain, dtype):
    schedule = SCHEDULES[name]
    chain, *_ = chain_of(schedule, CHAINS[chain])
    x, m, z = (tensor.to(dtype) for tensor in state(6))
    made = [tables.ddpm_table(schedule, chain, variance=v, clip=1.0) for v in ("fixed_small", "fixed_large")]
    made += [tables.ddim_table(schedule, chain, eta=eta, clip=1.0) for eta in (0.0, 0.5, 1.0)]
    for table in made:
        noise = z if table.structure.variance != "none" else None
        sample, x0 = reference.step(table.to("cpu", dtype)[-1], table.structure, x, m, z=noise)
        assert torch.equal(sample, x0)


def test_the_marginals_are_kept():
    """c1 + c2 sqrt(ab) = sqrt(abp) and c2^2 (1-ab) + sigma^2 = 1-abp; for DDIM ae^2 + s^2 = 1-abp."""
    for schedule in SCHEDULES.values():
        ab = schedule.alphas_cumprod[::-1]
        abp = np.append(ab[1:], 1.0)
        rows = tables.ddpm_table(schedule).rows.numpy()
        a0, ax, s = (rows[:, COLUMN[c]] for c in ("a0", "ax", "s"))
        np.testing.assert_allclose(a0 + ax * np.sqrt(ab), np.sqrt(abp), rtol=1e-9)
        np.testing.assert_allclose(ax**2 * (1 - ab) + s**2, 1 - abp, rtol=1e-9, atol=1e-15)
        for eta in (0.0, 0.3, 1.0):
            rows = tables.ddim_table(schedule, eta=eta).rows.numpy()
            a0, ae, s = (rows[:, COLUMN[c]] for c in ("a0", "ae", "s"))
            np.testing.assert_allclose(a0, np.sqrt(abp))
            np.testing.assert_allclose(ae**2 + s**2, 1 - abp, rtol=1e-9, atol=1e-15)


@given(
    betas=st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=12),
    eta=st.floats(0, 1),
    prediction=st.sampled_from(("eps", "x0", "v")),
    data=st.data(),
)
def test_any_schedule_and_chain_give_finite_rows(betas, eta, prediction, data):
    schedule = NoiseSchedule.from_betas(betas)
    chain = data.draw(st.lists(st.integers(0, len(betas) - 1), min_size=1, max_size=15))
    chain.sort(reverse=True)
    for table in (
        tables.ddpm_table(schedule, chain, prediction=prediction, variance="learned_range"),
        tables.ddim_table(schedule, chain, prediction=prediction, eta=eta, eps="rederived"),
        tables.ddim_table(schedule, chain, prediction=prediction, eta=eta),
        tables.ddim_inversion_table(schedule, chain, prediction=prediction, final_alpha="first"),
        tables.forward_table(schedule, chain),
    ):
        finite = torch.isfinite(table.rows)
        finite[:, [COLUMN["lo"], COLUMN["hi"]]] = True
        assert bool(finite.all())
        counted = [table.timesteps[:k].count(t) for k, t in enumerate(table.timesteps)]
        assert table.rows[:, COLUMN["repeat"]].tolist() == counted
        assert table.rows[:, COLUMN["t"]].tolist() == list(table.timesteps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr(prediction, eta):
    schedule = NoiseSchedule.scaled_linear(1000).rescale_zero_snr()
    x, x0, z = state(7)
    for table in (
        tables.ddim_table(schedule, 25, prediction=prediction, eta=eta),
        tables.ddpm_table(schedule, 25, prediction=prediction),
    ):
        assert bool(torch.isfinite(table.rows[:, : COLUMN["lo"]]).all())
        # at alpha_bar = 0 the state is noise alone: eps is x and v is -x0
        sample, predicted = run(table, 0, x, x0 if prediction == "x0" else -x0, z)
        close(predicted, x0)
        abp = alpha_bar(schedule, table.timesteps[1])
        share = 1.0 if table.name == "ddpm" else eta
        spread = math.sqrt(1 - share**2) * x + share * z
        close(sample, math.sqrt(abp) * x0 + math.sqrt(1 - abp) * spread)
    for make in (tables.ddpm_table, tables.ddim_table):
        with pytest.raises(ValueError, match="prediction: .*timestep 999.*'eps'"):
            make(schedule, 25)


def test_x_prev_has_a_mean_at_zero_terminal_snr():
    table = tables.ddpm_table(NoiseSchedule.jsd(10), prediction="x_prev", noise=False)
    x, m, _ = state(8)
    assert torch.equal(run(table, 0, x, m, None)[0], m)


def test_one_step_goes_to_x0():
    x, x0, z = state(9)
    schedule = SCHEDULES["linear"]
    eps = model_outputs(x, x0, alpha_bar(schedule, 999), 1.0)["eps"]
    for host in ("fastdiff", "openai"):
        for table in (
            tables.ddpm_table(schedule, [999], host=host),
            tables.ddim_table(schedule, [999], host=host),
        ):
            assert len(table) == 1
            close(run(table, 0, x, eps, z)[0], x0, 1e-4 if host == "openai" else 1e-9)


def test_repeated_timesteps_are_numbered_and_do_not_move():
    table = tables.ddpm_table(SCHEDULES["linear"], [9, 5, 5, 5, 0])
    assert table.rows[:, COLUMN["repeat"]].tolist() == [0, 0, 1, 2, 0]
    x, m, z = state(10)
    assert torch.equal(run(table, 1, x, m, z)[0], x)
    pairs = tables.ddim_table(SCHEDULES["linear"], [(9, 5), (9, 5), (5, -1)], eta=0.5)
    assert pairs.timesteps == (9, 9, 5)
    assert pairs.rows[:, COLUMN["repeat"]].tolist() == [0, 1, 0]
    assert torch.equal(pairs.rows[0, :-1], pairs.rows[1, :-1])


def test_final_alpha():
    schedule = SCHEDULES["linear"]
    first = tables.ddim_table(schedule, [500, 1], final_alpha="first").rows[-1]
    assert first[COLUMN["a0"]].item() == math.sqrt(schedule.alphas_cumprod[0])
    number = tables.ddim_table(schedule, [500, 1], final_alpha=float(schedule.alphas_cumprod[0])).rows[-1]
    assert torch.equal(first, number)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_inversion_undoes_sampling(prediction):
    """With the same eps in both directions, sampling after inversion gives the start."""
    schedule, chain = SCHEDULES["linear"], [999, 500, 20, 0]
    final = "first" if prediction == "x0" else 1.0
    forth = tables.ddim_inversion_table(schedule, chain, prediction="eps", final_alpha=final)
    back = tables.ddim_table(schedule, chain, prediction=prediction, final_alpha=final)
    assert forth.timesteps == back.timesteps[::-1] == (0, 20, 500, 999)
    x, eps, _ = state(11)
    for row in range(len(chain)):
        moved = run(forth, row, x, eps, None)[0]
        ab = alpha_bar(schedule, forth.timesteps[row])
        x0 = (moved - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
        m = {"eps": eps, "x0": x0, "v": math.sqrt(ab) * eps - math.sqrt(1 - ab) * x0}[prediction]
        close(run(back, len(chain) - 1 - row, moved, m, None)[0], x, 1e-8)


def test_inversion_pairings():
    schedule, chain = SCHEDULES["linear"], [900, 600, 300, 0]
    target = tables.ddim_inversion_table(schedule, chain)
    source = tables.ddim_inversion_table(schedule, chain, pairing="source")
    following = tables.ddim_inversion_table(schedule, chain, pairing="next")
    assert target.timesteps == following.timesteps == (0, 300, 600, 900)
    assert source.timesteps == (-250, 0, 300, 600)  # the clean end is told t - T//S
    assert torch.equal(source.rows[:, : COLUMN["t"]], target.rows[:, : COLUMN["t"]])
    assert source.row_of(-250) == 0 and source.row_map("cpu").tolist()[:1] == [1]
    x, eps, _ = state(12)
    ab, abn = alpha_bar(schedule, 300), alpha_bar(schedule, 600)
    x0 = (x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
    expected = math.sqrt(abn) * x0 + math.sqrt(1 - abn) * eps
    close(run(following, 1, x, eps, None)[0], expected)
    close(run(target, 2, x, eps, None)[0], expected)
    assert torch.equal(run(following, 3, x, eps, None)[0], eps)  # to alpha_bar = 0
    single = tables.ddim_inversion_table(schedule, [(600, 300)], pairing="source")
    assert single.timesteps == (300,)


def test_forward_chain_reaches_the_marginal():
    for schedule in (SCHEDULES["cosine"], NoiseSchedule.sprite()):
        for chain in (None, [900, 420, 7] if schedule.num_timesteps == 1000 else [500, 30, 2]):
            table = tables.forward_table(schedule, chain)
            kept, variance = 1.0, 0.0
            for row, t in enumerate(table.timesteps):
                ax, s = (table.rows[row, COLUMN[c]].item() for c in ("ax", "s"))
                kept, variance = kept * ax, variance * ax * ax + s * s
                assert variance == pytest.approx(1 - kept * kept, rel=1e-9)
                if schedule.name != "sprite" or chain is not None:
                    assert kept**2 == pytest.approx(alpha_bar(schedule, t), rel=1e-9)
            assert list(table.timesteps) == sorted(table.timesteps)
    table = tables.forward_table(SCHEDULES["linear"])
    assert table.rows[:, COLUMN["s"]].tolist() == np.sqrt(SCHEDULES["linear"].betas).tolist()


def test_add_noise_rows_are_by_timestep():
    schedule = SCHEDULES["cosine"]
    table = tables.add_noise_table(schedule)
    assert table.timesteps == tuple(range(1000))
    assert table.rows[:, COLUMN["ax"]].tolist() == np.sqrt(schedule.alphas_cumprod).tolist()
    assert table.rows[:, COLUMN["s"]].tolist() == np.sqrt(1 - schedule.alphas_cumprod).tolist()
    assert table.structure == Structure(x0="none", a0=False, ax=True, variance="fixed")


@pytest.mark.parametrize("noise", [True, False])
def test_sprite_course(noise):
    """The course's own words: (x - eps*((1-a)/sqrt(1-ab)))/sqrt(a) + sqrt(b)*z, z = 0 at i = 1."""
    schedule = NoiseSchedule.sprite()
    table = tables.sprite_table(schedule, noise=noise)
    assert table.timesteps == tuple(range(500, 0, -1))
    x, eps, z = state(13)
    for row, i in enumerate(table.timesteps):
        b, ab = float(schedule.betas[i]), float(schedule.alphas_cumprod[i])
        a = 1 - b
        expected = (x - eps * ((1 - a) / math.sqrt(1 - ab))) / math.sqrt(a)
        if noise and i > 1:
            expected = expected + math.sqrt(b) * z
        close(run(table, row, x, eps, z)[0], expected)
    fast = tables.ddim_table(schedule, timesteps(schedule, 25, "sprite"))
    ab, abp = alpha_bar(schedule, 40), alpha_bar(schedule, 20)
    x0 = math.sqrt(abp) / math.sqrt(ab) * (x - math.sqrt(1 - ab) * eps)
    close(run(fast, fast.row_of(40), x, eps, None)[0], x0 + math.sqrt(1 - abp) * eps)
    assert tables.sprite_table(SCHEDULES["short"]).timesteps == tuple(range(23, -1, -1))


CHAIN_TO_0 = timesteps(1000, 10, "leading")


def host_tables():
    for prediction in ("eps", "x0", "x_prev"):
        for variance in ("fixed_small", "fixed_large", "learned_range"):
            yield "openai", tables.ddpm_table, {"prediction": prediction, "variance": variance}
        yield "openai", tables.ddim_table, {"prediction": prediction, "eta": 0.5, "eps": "rederived"}
    for prediction in ("eps", "x0", "v"):
        yield "lucidrains", tables.ddpm_table, {"prediction": prediction}
        yield "lucidrains", tables.ddim_table, {"prediction": prediction, "eta": 0.5, "eps": "rederived"}
        for variance in ("fixed_small", "fixed_large", "learned_range", "learned_plain"):
            yield "diffusers", tables.ddpm_table, {"prediction": prediction, "variance": variance}
        for eps in ("raw", "rederived"):
            yield "diffusers", tables.ddim_table, {"prediction": prediction, "eta": 0.5, "eps": eps}
        yield "diffusers", tables.ddim_inversion_table, {"prediction": prediction, "final_alpha": "first"}
    for variance in ("fixed_small_log", "fixed_large_log"):
        yield "diffusers", tables.ddpm_table, {"variance": variance}
    yield "openai", tables.ddpm_table, {"variance": "learned"}
    yield "openai", tables.ddim_inversion_table, {"pairing": "next"}
    yield "lucidrains", tables.ddpm_table, {"variance": "learned_range"}
    yield "lucidrains", tables.ddim_table, {"eps": "raw"}
    yield "ermongroup", tables.ddpm_table, {"variance": "fixed_large"}
    yield "ermongroup", tables.ddim_table, {"eta": 0.5}
    for host in ("openai", "lucidrains", "diffusers", "ermongroup"):
        yield host, tables.add_noise_table, {}


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize(("host", "make", "options"), list(host_tables()), ids=lambda v: getattr(v, "__name__", str(v)))
def test_hosts_differ_from_our_own_rows_by_rounding_only(host, make, options, clip):
    schedule = SCHEDULES["linear"]
    if make is not tables.add_noise_table:
        options = options | {"clip": clip, "timesteps": None if host == "lucidrains" else CHAIN_TO_0}
    if options.get("pairing") == "next":
        options["clip"] = None  # the host re-derives eps from the clipped x0, ours is raw
    theirs = make(schedule, host=host, **options)
    if "variance" in options:
        options["variance"] = options["variance"].removesuffix("_log")
    ours = make(schedule, **options)
    assert theirs.host == host and theirs.timesteps == ours.timesteps
    numbers = theirs.rows[:, : COLUMN["lo"]]
    assert torch.equal(numbers, numbers.float().double())  # float32 values
    assert theirs.structure.variance == ours.structure.variance
    x, m, z = state(14)
    if ours.structure.learned:
        m = torch.cat([m, m.abs()], 1)
    for row in range(0, len(ours), max(1, len(ours) // 10)):
        close(run(theirs, row, x, m, z)[0], run(ours, row, x, m, z)[0], 3e-3)


def test_the_openai_last_variance_is_the_second():
    """improved-diffusion clips the log-variance of index 0 to that of index 1; it is masked, but there."""
    rows = tables.ddpm_table(SCHEDULES["linear"], variance="learned_range", host="openai").rows
    assert rows[-1, COLUMN["min_log"]] == rows[-2, COLUMN["min_log"]]
    assert rows[-1, COLUMN["s"]] == 0 and rows[-2, COLUMN["s"]] == 1


def test_diffusers_steps_by_stride_and_adds_noise_above_t_0():
    schedule = SCHEDULES["linear"]
    chain = timesteps(schedule, 7, "trailing", host="diffusers")
    by_list, by_stride = [*chain[1:], -1], [t - 1000 // 7 for t in chain]
    assert by_list != by_stride
    listed = tables.ddim_table(schedule, chain, host="diffusers")
    paired = tables.ddim_table(
        schedule, [(t, max(p, -1)) for t, p in zip(chain, by_stride, strict=True)], host="diffusers"
    )
    assert torch.equal(listed.rows, paired.rows)
    assert tables.ddpm_table(schedule, chain, variance="fixed_large", host="diffusers").rows[-1, COLUMN["s"]] > 0
    assert tables.ddpm_table(schedule, chain, variance="fixed_large").rows[-1, COLUMN["s"]] == 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [True, False])
def test_diffusers_ddim_bit_for_bit(prediction, spacing, eta, clip):
    """The rows come from torch's own operations, so the installed scheduler is met on every machine."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, timestep_spacing=spacing, clip_sample=clip
    )
    scheduler.set_timesteps(9)
    ours = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[prediction]
    rederived = prediction == "sample"  # from an x0 before its clip there is no division at the end
    table = tables.ddim_table(
        NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod),
        scheduler.timesteps,
        eta=eta,
        prediction=ours,
        clip=1.0 if clip else None,
        eps="rederived" if rederived else "raw",
        host="diffusers",
    )
    x, m, z = (tensor.float() for tensor in state(15))
    for t in scheduler.timesteps:
        theirs = scheduler.step(
            m, int(t), x, eta=eta, use_clipped_model_output=rederived, variance_noise=z if eta else None
        )
        row = table.to("cpu", x.dtype)[table.row_of(int(t))]
        sample, x0 = reference.step(row, table.structure, x, m, z=z if eta else None)
        assert torch.equal(sample, theirs.prev_sample)
        assert torch.equal(x0, theirs.pred_original_sample)


@pytest.mark.parametrize(
    "make",
    [
        lambda a: tables.ddpm_table(a, "5", variance="learned_range"),
        lambda a: tables.ddpm_table(a, prediction="x_prev", variance="fixed_large"),
        lambda a: tables.ddpm_table(a, prediction="v"),
        lambda a: tables.ddim_table(a, 5, eta=0.5, eps="rederived"),
        lambda a: tables.ddim_table(a, 5, eta=1.0, prediction="x0", final_alpha="first"),
        lambda a: tables.ddim_inversion_table(a, 5),
        lambda a: tables.ddim_inversion_table(a, 5, pairing="next"),
        lambda a: tables.forward_table(a, 5),
        tables.add_noise_table,
        tables.sprite_table,
    ],
)
def test_a_schedule_in_training(make):
    """Rows in torch are those in NumPy, and carry gradients that finite differences confirm."""
    schedule = NoiseSchedule.from_alphas_cumprod(np.linspace(0.97, 0.2, 8))
    alphas = torch.tensor(schedule.alphas_cumprod, requires_grad=True)
    torch.testing.assert_close(make(alphas).rows.detach(), make(schedule).rows, rtol=1e-12, atol=1e-15)
    columns = [c for c in COLUMNS if c not in ("lo", "hi")]
    assert torch.autograd.gradcheck(lambda a: make(a).rows[:, [COLUMN[c] for c in columns]], (alphas,), atol=1e-4)
    table = make(alphas)
    assert table.to("cpu", torch.float32).requires_grad and table.to("cpu", torch.float32) is not table.to(
        "cpu", torch.float32
    )


def test_tables_made_in_inference_mode_enter_autograd():
    with torch.inference_mode():
        made = [
            make(SCHEDULES["linear"], 5, host=host)
            for make in (tables.ddpm_table, tables.ddim_table)
            for host in ("fastdiff", "openai", "diffusers")
        ]
        for table in made:
            table.to("cpu", torch.float32), table.row_map("cpu")
    x = torch.randn(2, 3, requires_grad=True)
    for table in made:
        z = torch.randn(2, 3) if table.structure.variance != "none" else None
        reference.step(table.to("cpu", x.dtype)[0], table.structure, x, x, z=z)[0].sum().backward()


def test_table():
    table = tables.ddpm_table(SCHEDULES["linear"], [9, 5, 5, 0], clip=(-2, 3))
    assert len(table) == 4 and table.rows.shape == (4, 18) and table.rows.dtype == torch.float64
    assert table.rows[0, COLUMN["lo"]] == -2 and table.rows[0, COLUMN["hi"]] == 3
    single, double = table.to("cpu", torch.bfloat16), table.to(torch.device("cpu"), torch.float64)
    assert single.dtype == torch.float32 and single.is_contiguous() and double.dtype == torch.float64
    assert table.to("cpu", torch.float32) is single
    assert table.row_of(9) == 0 and table.row_of(0) == 3
    assert table.row_map("cpu").tolist() == [3, -1, -1, -1, -1, -1, -1, -1, -1, 0]
    assert table.row_map("cpu") is table.row_map("cpu")
    with pytest.raises(ValueError, match=r"t: expected a timestep of the chain \(9, 5, 5, 0\), got 7"):
        table.row_of(7)
    with pytest.raises(ValueError, match=r"t: .*visited once, got 5, visited 2 times \(use row=\)"):
        table.row_of(5)
    assert "ddpm" in repr(table) and "steps=4" in repr(table)


def test_flags():
    bits = [
        (Structure(), 1 | 64),
        (Structure(x0="output"), 64),
        (Structure(x0_divide=True, clip=True), 1 | 2 | 4 | 64),
        (Structure(eps="rederived", eps_divide=True, ae=True), 1 | 8 | 32 | 64 | 256),
        (Structure(eps="linear", ae=True), 1 | 16 | 64 | 256),
        (Structure(ax=True, variance="fixed"), 1 | 64 | 128 | 1 << 9),
        (Structure(x0="none", a0=False, ax=True, variance="learned_log"), 128 | 2 << 9),
        (Structure(variance="learned_range"), 1 | 64 | 3 << 9),
        (Structure(variance="learned_plain"), 1 | 64 | 4 << 9),
    ]
    for structure, expected in bits:
        domain = 2 if structure.x0 == "none" else 1  # forward noise, noise of a step
        assert structure.flags == expected | domain << 15
        assert structure.learned == (expected >> 9 > 1)
    assert len({structure.flags for structure, _ in bits}) == len({structure for structure, _ in bits}) == len(bits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x0": "other"}, "x0: expected one of"),
        ({"eps": "other"}, "eps: expected one of"),
        ({"variance": "other"}, "variance: expected one of"),
        ({"x0": "none"}, "x0: 'none'"),
        ({"x0": "output", "x0_divide": True}, "x0_divide"),
        ({"eps": "output", "ae": True, "eps_divide": True}, "eps_divide"),
        ({"ae": True}, "ae: expected ae=False"),
        ({"eps": "output"}, "ae: expected ae=True"),
        ({"a0": False}, "at least one"),
    ],
)
def test_structures_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        Structure(**fields)


@pytest.mark.parametrize(
    ("error", "message", "rows", "steps"),
    [
        (TypeError, "rows: expected a float64 tensor, got list", [[0.0] * 18], [0]),
        (TypeError, "rows: expected float64 on the CPU, got torch.float32", torch.zeros(1, 18), [0]),
        (ValueError, r"rows: expected shape \[steps, 18\], got \[1, 17\]", torch.zeros(1, 17).double(), [0]),
        (ValueError, r"timesteps: expected one per row \(1\), got 2", torch.zeros(1, 18).double(), [0, 1]),
        (ValueError, "rows: expected ints in .* as t and repeat", torch.full((1, 18), 0.5).double(), [0]),
        (ValueError, "rows: expected ints in .* as t and repeat", torch.full((1, 18), 2.0**24).double(), [0]),
        (
            ValueError,
            "rows: expected ints in .* as t and repeat",
            torch.full((1, 18), torch.nan).double(),
            [0],
        ),
    ],
)
def test_bad_rows(error, message, rows, steps):
    with pytest.raises(error, match=message):
        Table(rows, Structure(), steps)
    with pytest.raises(TypeError, match="structure: expected a Structure, got dict"):
        Table(torch.zeros(1, 18).double(), {}, [0])


DDPM, DDIM, BACK = tables.ddpm_table, tables.ddim_table, tables.ddim_inversion_table
HALF = torch.full((3,), 0.5, dtype=torch.float64)
BAD_INPUT = [
    (TypeError, "schedule: expected a NoiseSchedule or a tensor, got list", DDPM, {"schedule": [0.1]}),
    (TypeError, "schedule: .*float64, got torch.float32", DDPM, {"schedule": HALF.float()}),
    (ValueError, "alphas_cumprod: ", DDPM, {"schedule": HALF * 3}),
    (ValueError, "schedule: .*'openai', got a tensor", DDPM, {"schedule": HALF, "host": "openai"}),
    (ValueError, "host: expected one of .*got 'other'", DDPM, {"host": "other"}),
    (ValueError, "host: .*inversion, got 'lucidrains'", BACK, {"host": "lucidrains"}),
    (ValueError, "prediction: .*got 'noise'", DDPM, {"prediction": "noise"}),
    (ValueError, "prediction: .*got 'v'", DDPM, {"prediction": "v", "host": "openai"}),
    (ValueError, "prediction: .*got 'x_prev'", BACK, {"prediction": "x_prev"}),
    (ValueError, "prediction: .*timestep 3, .*'x_prev'", DDPM, {"timesteps": [3, 3], "prediction": "x_prev"}),
    (ValueError, "prediction: .*timestep 23, .*'x0'", BACK, {"timesteps": [23], "prediction": "x0"}),
    (ValueError, "variance: .*got 'large'", DDPM, {"variance": "large"}),
    (ValueError, "variance: .*learned_plain", DDPM, {"variance": "learned", "host": "diffusers"}),
    (TypeError, "clip: expected a number, got 'on'", DDPM, {"clip": "on"}),
    (TypeError, "clip: expected a number, got True", DDPM, {"clip": True}),
    (ValueError, "clip: expected a finite number, got nan", DDPM, {"clip": math.nan}),
    (ValueError, "clip: expected a range that is not empty", DDPM, {"clip": (1, -1)}),
    (ValueError, "clip: expected a range that is not empty", DDPM, {"clip": -1}),
    (ValueError, r"clip: .*\(lo, hi\)", DDPM, {"clip": (1, 2, 3)}),
    (ValueError, r"eta: expected a value in \[0, 1\], got 1.5", DDIM, {"eta": 1.5}),
    (ValueError, r"eta: expected a value in \[0, 1\], got -0.1", DDIM, {"eta": -0.1}),
    (ValueError, "eta: expected a finite number, got nan", DDIM, {"eta": math.nan}),
    (TypeError, "eta: expected a number, got NoneType", DDIM, {"eta": None}),
    (ValueError, "eps: .*got 'clipped'", DDIM, {"eps": "clipped"}),
    (ValueError, "eps: .*'rederived'.*got 'raw'", DDIM, {"eps": "raw", "host": "openai"}),
    (ValueError, "final_alpha: expected a number or 'first'", DDIM, {"final_alpha": "last"}),
    (ValueError, "final_alpha: expected a value in", DDIM, {"final_alpha": 1.1}),
    (ValueError, "final_alpha: expected a value in", DDIM, {"final_alpha": 0.5}),
    (ValueError, "final_alpha: expected 1.0", DDIM, {"final_alpha": "first", "host": "openai"}),
    (ValueError, "steps: .*descending order, got 5 after 3", DDPM, {"timesteps": [3, 5]}),
    (ValueError, "steps: ", DDPM, {"timesteps": [24]}),
    (TypeError, "steps: expected an int, got float", DDPM, {"timesteps": [3.0]}),
    (ValueError, "timesteps: .*without repeats", DDPM, {"timesteps": [3, 3], "host": "openai"}),
    (ValueError, "timesteps: .*without repeats", DDIM, {"timesteps": [(3, 1)], "host": "openai"}),
    (ValueError, "timesteps: .*not respaced", DDPM, {"timesteps": [9, 3], "host": "lucidrains"}),
    (ValueError, "timesteps: expected a list", BACK, {"timesteps": [(3, 1)], "pairing": "next"}),
    (ValueError, "pairing: .*got 'both'", BACK, {"pairing": "both"}),
    (ValueError, "pairing: .*got 'source'", BACK, {"pairing": "source", "host": "openai"}),
]


def name_of(value):
    """For the name of a test, which must be the same in every process."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("error", "message", "make", "options"), BAD_INPUT, ids=name_of)
def test_bad_input(error, message, make, options):
    with pytest.raises(error, match=message):
        make(**{"schedule": SCHEDULES["short"], **options})


# What a table keeps on a device


def fresh() -> Table:
    return tables.ddpm_table(NoiseSchedule.linear(1000), 10)


def test_a_tracer_leaves_nothing_behind():
    class Step(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, m, x, t):
            return ops.step(self.table, m, t, x, seeds=7)

    x, m, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([899, 99])
    expected = ops.step(fresh(), m, t, x, seeds=7)
    for strict in (False, True):
        table = fresh()
        exported = torch.export.export(Step(table), (m, x, t), strict=strict)
        kept = [*table._cast.values(), *table._maps.values(), *ops._seeds.values()]
        assert all(type(tensor) is torch.Tensor for tensor in kept)
        assert not table.shortcuts
        assert torch.equal(ops.step(table, m, t, x, seeds=7), expected)
        assert torch.equal(exported.module()(m, x, t), expected)


def test_compiled_code_finds_a_fresh_table_made():
    x, m, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([899, 99])
    seeds = torch.tensor([1, 2])
    table = fresh()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda m, t, x: ops.step(table, m, t, x, seeds=seeds), backend=backend, fullgraph=True)
    result = compiled(m, t, x)
    assert torch.equal(result, ops.step(fresh(), m, t, x, seeds=seeds))
    # the rows and their map are constants of the graph: not made nor returned by it, and kept as eager code keeps them
    assert sum(node.op == "get_attr" for node in graphs[0].graph.nodes) == 2
    output = next(node for node in graphs[0].graph.nodes if node.op == "output")
    assert len(output.args[0]) == 1
    assert all(type(tensor) is torch.Tensor for tensor in table._cast.values())
    assert len(table._cast) == len(table._maps) == 1


def test_a_pickled_table_leaves_its_copies_behind():
    table = fresh()
    x = torch.randn(2, 3)
    expected = ops.step(table, x, 899, x, seeds=1)
    again = pickle.loads(pickle.dumps(table))
    assert not (again._cast or again._maps or again.shortcuts)
    assert torch.equal(again.rows, table.rows) and again.timesteps == table.timesteps
    assert torch.equal(ops.step(again, x, 899, x, seeds=1), expected)
    copied = copy.deepcopy(table)
    assert torch.equal(ops.step(copied, x, torch.tensor(899), x, seeds=1), expected)


def test_streams_do_not_share_copies(monkeypatch):
    table = fresh()
    stream, capturing = [1], [False]
    monkeypatch.setattr(native, "stream_of", lambda device: stream[0])
    monkeypatch.setattr(native, "capturing", lambda device: capturing[0])
    first = table.to("cpu", torch.float32)
    stream[0] = 2
    second = table.to("cpu", torch.float32)
    assert first is not second and torch.equal(first, second)
    assert table.to("cpu", torch.bfloat16) is second
    # a capture, which waits for all streams before it begins, takes the first
    stream[0], capturing[0] = 3, True
    assert table.to("cpu", torch.float32) is first
    with pytest.raises(RuntimeError, match="table: expected it to be on cpu before the capture"):
        table.row_map("cpu")


def test_rows_that_a_transform_asked_for_first_are_ordinary_tensors():
    table = tables.ddim_table(NoiseSchedule.linear(100))
    x = torch.randn(2, 3)
    torch.func.grad(lambda m: ops.step(table, m, 5, x).sum())(torch.randn(2, 3))
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, table._cast.values()))
