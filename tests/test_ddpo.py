"""The DDIM step of ddpo-pytorch with its log-probability: against the formula of the paper in the operations of that
codebase, against diffusers' own step, and what it refuses."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ops import assert_equal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.integrations import ddpo
from fastdiff.integrations.ddpo import ddim_step_with_logprob
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import Table, ddim_table

SHAPE = (3, 4, 5, 2)
TIMESTEPS = (981, 501, 1)


class Scheduler:
    """What a DDIMScheduler of diffusers has; its default spacing is "leading"."""

    def __init__(self, steps: int | None = 50, **options: Any) -> None:
        schedule = NoiseSchedule.from_host("diffusers", "linear", rescale_zero_snr=options.pop("zero_snr", False))
        self.config = SimpleNamespace(
            num_train_timesteps=1000,
            prediction_type="epsilon",
            clip_sample=True,
            clip_sample_range=1.0,
            thresholding=False,
            set_alpha_to_one=True,
        )
        vars(self.config).update(options)
        self.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy()).float()
        self.final_alpha_cumprod = torch.tensor(1.0) if self.config.set_alpha_to_one else self.alphas_cumprod[0]
        self.num_inference_steps = steps


FORMS = {
    "epsilon": {},
    "no clip": {"clip_sample": False},
    "sample": {"prediction_type": "sample"},
    "v_prediction": {"prediction_type": "v_prediction", "clip_sample_range": 0.5},
    "stable diffusion": {"clip_sample": False, "set_alpha_to_one": False},
}
every_form = pytest.mark.parametrize("form", FORMS)
clipped_or_not = pytest.mark.parametrize("clipped", [False, True], ids=["raw", "clipped"])


def randn(dtype: torch.dtype = torch.float32, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moments(
    scheduler: Any, m: Tensor, t: Tensor, x: Tensor, eta: float, clipped: bool, alphas_cumprod: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a step (Song et al. 2021, eq. 12 and 16), to t - T//N or else to timestep 0, with
    coefficients in the dtype of alphas_cumprod."""
    config = scheduler.config
    before = (t - config.num_train_timesteps // scheduler.num_inference_steps).clamp(min=0)
    ab, abp = (alphas_cumprod[at].reshape(-1, *(1,) * (x.dim() - 1)).expand(x.shape) for at in (t, before))
    if config.prediction_type == "epsilon":
        x0, e = (x - (1 - ab).sqrt() * m) / ab.sqrt(), m
    elif config.prediction_type == "sample":
        x0, e = m, (x - ab.sqrt() * m) / (1 - ab).sqrt()
    else:
        x0, e = ab.sqrt() * x - (1 - ab).sqrt() * m, ab.sqrt() * m + (1 - ab).sqrt() * x
    if config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    if clipped:
        e = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
    std = eta * ((1 - abp) / (1 - ab) * (1 - ab / abp)).sqrt()
    return abp.sqrt() * x0 + (1 - abp - std**2).sqrt() * e, std


def close(mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def density(x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    each = -((x_prev - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return each.flatten(1).mean(1)


@every_form
@clipped_or_not
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_it_is_the_formula(form, clipped, eta):
    """With the float32 coefficients of the codebase to rounding, and with exact ones to theirs: of the last step, from
    1 to 0, 1 - ab / abp has lost some 4 digits."""
    scheduler, t = Scheduler(**FORMS[form]), torch.tensor(TIMESTEPS)
    for dtype, of_coefficients, tolerances in (
        (torch.float32, torch.float32, (1e-6, 1e-4)),
        (torch.float64, torch.float32, (1e-6, 1e-6)),
        (torch.float64, torch.float64, (1e-4, 2e-3)),
    ):
        x, m, noise = (randn(dtype, seed) for seed in range(3))
        mean, std = moments(scheduler, m, t, x, eta, clipped, scheduler.alphas_cumprod.to(of_coefficients))
        recorded = mean + std * noise
        given, score = ddim_step_with_logprob(scheduler, m, t, x, eta, clipped, None, recorded)
        assert given is recorded
        assert score.dtype == dtype and score.shape == SHAPE[:1]
        close(score, density(recorded, mean, std), tolerances[1])
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=dtype)
        fresh, score = ddim_step_with_logprob(scheduler, m, t, x, eta, clipped, torch.Generator().manual_seed(7))
        close(fresh, mean + std * drawn, tolerances[0])
        close(score, density(fresh, mean, std), tolerances[1])


@every_form
@clipped_or_not
def test_a_step_is_that_of_diffusers(form, clipped):
    """With its generator. Their last steps differ where the chain of diffusers ends at alpha_bar = 1."""
    diffusers = pytest.importorskip("diffusers")
    options = {"beta_start": 1e-4, "beta_end": 0.02} | FORMS[form]
    scheduler = diffusers.DDIMScheduler(**options, steps_offset=1)
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps[::7].tolist() + [21, 1]:
        x, m = randn(seed=t), randn(seed=t + 1)
        theirs, ours = (torch.Generator().manual_seed(t) for _ in range(2))
        expected = scheduler.step(
            m, t, x, eta=0.7, use_clipped_model_output=clipped, generator=theirs, return_dict=False
        )[0]
        for form_of_t in (t, torch.tensor(t), torch.tensor([t]), torch.full((SHAPE[0],), t)):
            generator = torch.Generator().set_state(ours.get_state())
            found, score = ddim_step_with_logprob(scheduler, m, form_of_t, x, 0.7, clipped, generator)
            assert torch.isfinite(score).all()
            assert torch.equal(generator.get_state(), theirs.get_state())
            if t == 1 and scheduler.config.set_alpha_to_one:
                assert not torch.allclose(found, expected, atol=1e-3)
            else:
                close(found, expected, 1e-6)
    # as there, what comes from torch's default generator without one
    torch.manual_seed(3)
    expected = scheduler.step(m, 981, x, eta=1.0, return_dict=False)[0]
    torch.manual_seed(3)
    close(ddim_step_with_logprob(scheduler, m, 981, x, 1.0)[0], expected, 1e-6)


@pytest.mark.parametrize("dtypes", ["float32", "float64", "float16", "bfloat16", "float32 float16"])
def test_the_ratio_of_an_unchanged_model_is_1(dtypes):
    """For half samples too, in float32; each sample alone has the bits that it has in a batch."""
    dtype, *other = (getattr(torch, name) for name in dtypes.split())
    scheduler, t = Scheduler(), torch.tensor(TIMESTEPS)
    x, m = randn(dtype), randn(other[0] if other else dtype, 1)
    generator = torch.Generator().manual_seed(0)
    x_prev, before = ddim_step_with_logprob(scheduler, m, t, x, 1.0, generator=generator)
    assert x_prev.dtype == dtype and x_prev.shape == SHAPE
    assert before.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    after = ddim_step_with_logprob(scheduler, m, t, x, 1.0, prev_sample=x_prev)[1]
    assert_equal(after, before)
    assert bool(((after - before).exp() == 1).all())
    for k, at in enumerate(TIMESTEPS):
        alone = (u[k : k + 1] for u in (m, x, x_prev))
        m_k, x_k, prev_k = alone
        assert_equal(
            ddim_step_with_logprob(scheduler, m_k, at, x_k, 1.0, prev_sample=prev_k)[1], before[k : k + 1]
        )  # fmt: skip
    # in the operations of float32, the noise in the dtype of the model output
    mean, std = moments(
        scheduler, m.double(), t, x.double(), 1.0, False, scheduler.alphas_cumprod.double()
    )  # fmt: skip
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=m.dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x_prev.double(), mean + std * noise, rtol=max(eps, 1e-5), atol=1e-4)
    close(before.double(), density(x_prev.double(), mean, std), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_a_generator(dtype):
    """The noise is torch's default generator's, in the dtype of the model output."""
    scheduler, x, m = Scheduler(), randn(), randn(dtype, 1)
    torch.manual_seed(3)
    found = ddim_step_with_logprob(scheduler, m, 501, x, 1.0)[0]
    expected = ddim_step_with_logprob(scheduler, m, 501, x, 1.0, generator=torch.Generator().manual_seed(3))[0]
    assert_equal(found, expected)


def test_generators_of_each_sample():
    scheduler, x, m = Scheduler(), randn(), randn(seed=1)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(k) for k in range(SHAPE[0])]

    noise = torch.cat([torch.randn((1, *SHAPE[1:]), generator=one) for one in generators()])
    found = ddim_step_with_logprob(scheduler, m, 501, x, 1.0, generator=generators())[0]
    mean, std = moments(scheduler, m, torch.tensor([501]), x, 1.0, False, scheduler.alphas_cumprod)
    close(found, mean + std * noise, 1e-5)
    # one in a list is one for all, as diffusers takes it
    one = ddim_step_with_logprob(scheduler, m, 501, x, 1.0, generator=generators()[:1])[0]
    torch.testing.assert_close(one, ddim_step_with_logprob(scheduler, m, 501, x, 1.0, generator=generators()[0])[0])


@every_form
def test_gradients(form):
    """Of the score, to whose mean the recorded sample is a constant, and of the sample."""
    scheduler, t = Scheduler(**FORMS[form]), torch.tensor(TIMESTEPS)
    x, m = (randn(torch.float64, seed).requires_grad_() for seed in range(2))
    mean, std = moments(scheduler, m, t, x, 1.0, False, scheduler.alphas_cumprod)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x_prev = mean + std * noise
    theirs = density(x_prev.detach(), mean, std).sum() + x_prev.square().sum()
    generator = torch.Generator().manual_seed(7)
    x_prev, score = ddim_step_with_logprob(scheduler, m, t, x, 1.0, generator=generator)
    mine = score.sum() + x_prev.square().sum()
    for a, b in zip(
        torch.autograd.grad(mine, (x, m), retain_graph=True), torch.autograd.grad(theirs, (x, m)), strict=True
    ):
        assert b.abs().sum() > 0
        close(a, b, 1e-5)
    again = ddim_step_with_logprob(scheduler, m, t, x, 1.0, prev_sample=x_prev)[1]
    fresh, recorded = (torch.autograd.grad(u.sum(), m, retain_graph=True)[0] for u in (score, again))
    assert_equal(fresh, recorded)
    assert fresh.abs().sum() > 0


def test_where_no_noise_leads():
    scheduler, x, m = Scheduler(), randn(), randn(seed=1)
    with pytest.raises(ValueError, match="timestep: expected one that noise leads from"):
        ddim_step_with_logprob(scheduler, m, 0, x, 1.0)
    t = torch.tensor([501, 0, 1000])
    x_prev, score = ddim_step_with_logprob(scheduler, m, t, x, 1.0)
    assert torch.isfinite(score).tolist() == [True, False, False]
    assert torch.isnan(score[1:]).all()
    assert torch.isfinite(x_prev[:2]).all() and torch.isnan(x_prev[2]).all()


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*arguments, **(keywords or {}))


def test_the_host_does_not_look_at_the_timesteps():
    scheduler, t, x, m = Scheduler(), torch.tensor(TIMESTEPS), randn(), randn(seed=1)
    recorded = ddim_step_with_logprob(scheduler, m, t, x, 1.0)[0]  # the tables are made
    with Looks() as looks:
        ddim_step_with_logprob(scheduler, m, t, x, 1.0)
        ddim_step_with_logprob(scheduler, m, t, x, 1.0, prev_sample=recorded)
        assert looks.count == 0
        t[0].item()
    assert looks.count == 1


def test_tables_are_kept_as_long_as_they_are_good(monkeypatch):
    made = []

    def counted(*args: Any, **given: Any) -> Table:
        made.append(1)
        return ddim_table(*args, **given)

    monkeypatch.setattr(ddpo, "ddim_table", counted)
    scheduler, x, m = Scheduler(), randn(), randn(seed=1)

    def score() -> Tensor:
        return ddim_step_with_logprob(scheduler, m, 501, x, 1.0, prev_sample=x)[1]

    first = score()
    assert_equal(score(), first)
    assert len(made) == 1
    for change in (
        lambda: setattr(scheduler, "num_inference_steps", 20),
        lambda: setattr(scheduler.config, "prediction_type", "v_prediction"),
        lambda: setattr(scheduler.config, "clip_sample_range", 0.25),
        lambda: setattr(scheduler, "alphas_cumprod", scheduler.alphas_cumprod**2),
        lambda: scheduler.alphas_cumprod.mul_(0.99),
    ):
        change()
        assert not torch.equal(score(), first)
        first = score()
    assert len(made) == 6
    for k in range(2 * ddpo._MAX_TABLES):
        ddim_step_with_logprob(scheduler, m, 501, x, (k + 1) / 100, prev_sample=x)
    assert len(ddpo._kept[scheduler].tables) == ddpo._MAX_TABLES


def test_tables_go_with_their_scheduler():
    scheduler = Scheduler()
    ddim_step_with_logprob(scheduler, M, 501, X, 1.0)
    table = weakref.ref(next(iter(ddpo._kept[scheduler].tables.values())))
    assert table() is not None
    del scheduler
    gc.collect()
    assert table() is None


def made_in_inference_mode() -> Scheduler:
    with torch.inference_mode():
        return Scheduler()


class Unhashable(Scheduler):
    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "make",
    [lambda: SimpleNamespace(**vars(Scheduler())), Unhashable, made_in_inference_mode],
    ids=["no weak reference", "no hash", "inference mode"],
)
def test_where_no_table_can_be_kept(make):
    """The step is the same, and a change is seen."""
    scheduler, usual = make(), Scheduler()
    for _ in range(2):
        found = ddim_step_with_logprob(scheduler, M, 501, X, 1.0, prev_sample=X)[1]
        assert_equal(found, ddim_step_with_logprob(usual, M, 501, X, 1.0, prev_sample=X)[1])
        with torch.inference_mode():
            scheduler.alphas_cumprod.mul_(0.99)
        usual.alphas_cumprod.mul_(0.99)
    kept = [one.alphas_cumprod for one in ddpo._kept.values()]
    assert any(one is usual.alphas_cumprod for one in kept)
    assert not any(one is scheduler.alphas_cumprod for one in kept)


X, M = randn(shape=(2, 3)), randn(seed=1, shape=(2, 3))
REFUSED = {
    "self": (TypeError, {"self": object()}),
    "self: expected a scheduler whose set_timesteps": (ValueError, {"self": Scheduler(None)}),
    "self.num_inference_steps: expected an int in .1, 1000., got 1001": (ValueError, {"self": Scheduler(1001)}),
    "self.num_inference_steps: expected an int in .1, 1000., got 0": (ValueError, {"self": Scheduler(0)}),
    "self.alphas_cumprod: expected a tensor": (
        TypeError,
        {"self": SimpleNamespace(**vars(Scheduler()) | {"alphas_cumprod": [0.5]})},
    ),
    "self: expected a scheduler without thresholding": (ValueError, {"self": Scheduler(thresholding=True)}),
    "self: expected prediction_type": (ValueError, {"self": Scheduler(prediction_type="flow")}),
    "model_output": (TypeError, {"model_output": None}),
    "model_output: expected the sample's shape": (ValueError, {"model_output": M[:1]}),
    "model_output: expected torch.float32": (TypeError, {"model_output": M.double()}),
    "model_output: expected a tensor on cpu": (ValueError, {"model_output": M.to("meta")}),
    "timestep: expected an int in": (ValueError, {"timestep": 1000}),
    "timestep: expected an int,": (TypeError, {"timestep": 5.0}),
    "timestep: expected an int or an integer tensor": (TypeError, {"timestep": torch.tensor([5.0])}),
    "timestep: expected shape": (ValueError, {"timestep": torch.tensor([5, 6, 7])}),
    "sample": (TypeError, {"sample": None}),
    "sample: expected float32": (TypeError, {"sample": X.int()}),
    "sample: expected a batch dimension": (ValueError, {"sample": X[0, 0], "model_output": M[0, 0]}),
    "eta": (ValueError, {"eta": 0.0}),
    "eta: expected a value in": (ValueError, {"eta": 1.5}),
    "eta: expected a number": (TypeError, {"eta": "1"}),
    "use_clipped_model_output: expected a bool, got str": (TypeError, {"use_clipped_model_output": "no"}),
    "generator": (TypeError, {"generator": 3}),
    "generator: expected 2, one per sample": (ValueError, {"generator": [torch.Generator()] * 3}),
    "prev_sample": (TypeError, {"prev_sample": 1}),
    "prev_sample: expected torch.float32": (TypeError, {"prev_sample": X.half()}),
    "prev_sample: expected the sample's shape": (ValueError, {"prev_sample": X[0]}),
    "generator and prev_sample": (ValueError, {"generator": torch.Generator(), "prev_sample": X}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_named(message):
    error, changed = REFUSED[message]
    given = {"self": Scheduler(), "model_output": M, "timestep": 501, "sample": X, "eta": 1.0} | changed
    generator = given.get("generator")
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    default = torch.get_rng_state()
    with pytest.raises(error, match=message):
        ddim_step_with_logprob(**given)
    assert torch.equal(torch.get_rng_state(), default)
    assert state is None or torch.equal(generator.get_state(), state)


def test_by_default_there_is_no_noise_and_no_density():
    with pytest.raises(ValueError, match=r"eta: expected a value in \(0, 1\], as a step without noise has no density"):
        ddim_step_with_logprob(Scheduler(), M, 501, X)


def test_it_is_imported_when_it_is_asked_for():
    code = (
        "import sys, fastdiff; found = {name for name in sys.modules if name.startswith('fastdiff.integrations.')};"
        "assert found == {'fastdiff.integrations._host'}, found;"
        "import fastdiff.integrations.ddpo; print('diffusers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
