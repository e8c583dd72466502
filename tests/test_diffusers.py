"""The schedulers of diffusers with fused steps, against diffusers itself: every element, every draw."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

diffusers = pytest.importorskip("diffusers")

import fastdiff  # noqa: E402
from fastdiff import noise, ops  # noqa: E402
from fastdiff.integrations import diffusers as ours  # noqa: E402

# a step that falls back fails a test that does not expect it
pytestmark = pytest.mark.filterwarnings("error:fastdiff:RuntimeWarning")

NAMES = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
)
DDPM, DDIM = [name for name in NAMES if "DDPM" in name], ["DDIMScheduler", "DDIMParallelScheduler"]
PREDICTIONS = ("epsilon", "sample", "v_prediction")
LEARNED = ("learned", "learned_range")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(name: str, steps: int | None = 7, **config: Any) -> tuple[Any, Any]:
    """A scheduler of diffusers and ours of the same config."""
    theirs, fused = getattr(diffusers, name)(**config), getattr(ours, name)(**config)
    if steps is not None:
        theirs.set_timesteps(steps)
        fused.set_timesteps(steps)
    return theirs, fused


def tensors(shape: tuple[int, ...] = (2, 2, 3, 3), channels: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """(model output, sample)"""
    torch.manual_seed(sum(shape))
    x = torch.randn(shape, dtype=dtype) * 1.5
    return torch.randn(shape[0], channels * shape[1], *shape[2:], dtype=dtype), x


def equal(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and torch.equal(torch.isnan(a), torch.isnan(b))
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def check(
    theirs: Any, fused: Any, timesteps: Any = None, model: Any = None, sample: Any = None, **options: Any
) -> None:
    """Steps of both give the same tensors, from generators that they leave in the same state."""
    if model is None:
        model, sample = tensors()
    before = fused._fastdiff.fused
    for count, t in enumerate(fused.timesteps if timesteps is None else timesteps, 1):
        found, states = [], []
        for scheduler in (theirs, fused):
            given = dict(options)
            if "DDIMInverse" not in type(theirs).__name__ and "generator" not in given:
                given["generator"] = torch.Generator().manual_seed(int(t))
            found.append(scheduler.step(model, t, sample, **given))
            states.append(given["generator"].get_state() if "generator" in given and given["generator"] else None)
        a, b = found
        assert type(a) is type(b)
        assert equal(a.prev_sample, b.prev_sample), f"x at {int(t)}"
        assert equal(a.pred_original_sample, b.pred_original_sample), f"x0 at {int(t)}"
        assert states[0] is None or torch.equal(*states)
        assert fused._fastdiff.fused == before + count, fused._fastdiff.kept


@pytest.mark.parametrize("name", DDPM)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", *LEARNED, "of_my_own"])
def test_ddpm_gives_the_bits_of_diffusers(name: str, variance: str) -> None:
    for prediction, clip, (spacing, zero_snr), dtype in itertools.product(
        PREDICTIONS, (True, False), [("leading", False), ("trailing", True), ("linspace", False)], DTYPES
    ):
        theirs, fused = pair(
            name,
            prediction_type=prediction,
            clip_sample=clip,
            clip_sample_range=0.8,
            variance_type=variance,
            timestep_spacing=spacing,
            rescale_betas_zero_snr=zero_snr,
            beta_schedule="squaredcos_cap_v2" if zero_snr else "linear",
        )
        model, x = tensors(channels=2 if variance in LEARNED else 1, dtype=dtype)
        if variance == "learned":
            model = model.abs()  # it is the variance itself
        check(theirs, fused, theirs.timesteps[::3], model, x)


@pytest.mark.parametrize("name", DDIM)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_gives_the_bits_of_diffusers(name: str, eta: float) -> None:
    for prediction, clip, clipped, (spacing, offset, to_one), dtype in itertools.product(
        PREDICTIONS,
        (True, False),
        (True, False, None),
        [("leading", 1, False), ("trailing", 0, True), ("linspace", 0, True)],
        DTYPES,
    ):
        theirs, fused = pair(
            name,
            prediction_type=prediction,
            clip_sample=clip,
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=to_one,
            beta_schedule="scaled_linear",
        )
        model, x = tensors(dtype=dtype)
        check(theirs, fused, theirs.timesteps[::3], model, x, eta=eta, use_clipped_model_output=clipped)


def test_inversion_gives_the_bits_of_diffusers() -> None:
    for prediction, clip, (spacing, offset, to_one), dtype in itertools.product(
        PREDICTIONS, (True, False), [("leading", 1, False), ("trailing", 0, True)], DTYPES
    ):
        theirs, fused = pair(
            "DDIMInverseScheduler",
            prediction_type=prediction,
            clip_sample=clip,
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=to_one,
        )
        check(theirs, fused, None, *tensors(dtype=dtype))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"])
def test_every_row_of_a_schedule_has_the_bits_of_diffusers(name: str) -> None:
    schedules = ["linear", "scaled_linear", "squaredcos_cap_v2"] + (["laplace", "sigmoid"] if "DDPM" in name else [])
    for schedule, zero_snr in itertools.product(schedules, (False, True)):
        theirs, fused = pair(name, 250, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, clip_sample=False)
        options = {"eta": 0.5} if name == "DDIMScheduler" else {}
        check(theirs, fused, theirs.timesteps[::7], *tensors((1, 1, 8)), **options)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"])
def test_thresholding_is_that_of_diffusers(name: str) -> None:
    for prediction, maximum, dtype in itertools.product(PREDICTIONS, (1.0, 2.5, 0.5), DTYPES[:3]):
        theirs, fused = pair(
            name,
            4,
            prediction_type=prediction,
            thresholding=True,
            sample_max_value=maximum,
            dynamic_thresholding_ratio=0.9,
        )
        model, x = tensors((3, 2, 4, 4), dtype=dtype)
        for options in [{}] if "DDPM" in name else [{"eta": 0.7}, {"use_clipped_model_output": True}]:
            check(theirs, fused, None, model * 3, x, **options)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (1, 2, 3, 3, 3), (0, 2, 3), (3,)])
def test_shapes_and_layouts(name: str, shape: tuple[int, ...]) -> None:
    theirs, fused = pair(name)
    model, x = (torch.randn(shape) for _ in range(2))
    options = {} if name == "DDPMScheduler" else {"eta": 1.0}
    if len(shape) == 1 and name == "DDPMScheduler":
        with pytest.raises(IndexError):
            theirs.step(model, 142, x)
        return
    check(theirs, fused, None, model, x, **options)
    if len(shape) > 2:
        check(theirs, fused, None, model.transpose(1, 2), x.transpose(1, 2), **options)
        wide = torch.randn(*shape[:-1], 2 * shape[-1])
        check(theirs, fused, None, model, wide[..., ::2], **options)
        check(theirs, fused, None, model[:1].expand(shape) if shape[0] else model, x, **options)
    if len(shape) == 5:
        check(theirs, fused, None, model, x.to(memory_format=torch.channels_last_3d), **options)


def test_generators_draw_as_in_diffusers() -> None:
    for name, options in (("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 0.8})):
        theirs, fused = pair(name)
        model, x = tensors((3, 2, 8, 8))
        for count in (1, 3, 4):
            lists = [[torch.Generator().manual_seed(k) for k in range(count)] for _ in range(2)]
            a = theirs.step(model, 142, x, generator=lists[0], **options).prev_sample
            b = fused.step(model, 142, x, generator=lists[1], **options).prev_sample
            assert torch.equal(a, b)
            for one, other in zip(*lists, strict=True):
                assert torch.equal(one.get_state(), other.get_state())
        results = []
        for scheduler in (theirs, fused):
            torch.manual_seed(5)
            results.append([scheduler.step(model, t, x, **options).prev_sample for t in (142, 0)] + [torch.rand(1)])
        assert all(map(torch.equal, *results)), "the global generator is left elsewhere"
        with pytest.raises(IndexError):  # a list that is too short
            fused.step(model, 142, x, generator=[torch.Generator(), torch.Generator()], **options)


def test_variance_noise() -> None:
    theirs, fused = pair("DDIMScheduler")
    noise = torch.randn(2, 2, 3, 3).transpose(2, 3)
    check(theirs, fused, variance_noise=noise, eta=0.6, generator=None)
    check(theirs, fused, variance_noise=noise, eta=0.0)
    model, x = tensors()
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        fused.step(model, 142, x, eta=0.5, variance_noise=noise, generator=torch.Generator())


@pytest.mark.parametrize("name", NAMES)
def test_timesteps_of_any_kind(name: str) -> None:
    theirs, fused = pair(name)
    t = fused.timesteps[2]
    for timestep in (t, int(t), t.clone(), t.to(torch.int32), t.numpy()[()]):
        check(theirs, fused, [timestep])
    if name in DDIM:  # any timestep of training
        check(theirs, fused, [0, 1, 500, 998, 999], eta=0.4)
    model, x = tensors()
    outside = [5000] + ([141] if "DDPM" in name else [])
    for timestep in outside:
        with pytest.raises(IndexError):
            fused.step(model, timestep, x)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
def test_custom_timesteps_and_none(name: str) -> None:
    theirs, fused = pair(name, None)
    check(theirs, fused, [999, 998, 1, 0])  # before set_timesteps the chain is that of training
    for timesteps in ([900, 500, 499, 20], [7], [3, 0]):
        for scheduler in (theirs, fused):
            scheduler.set_timesteps(timesteps=timesteps)
        assert fused.custom_timesteps
        check(theirs, fused)
        for scheduler in (theirs, fused):
            scheduler.set_timesteps(5)
        assert not fused.custom_timesteps
        check(theirs, fused)
    for arguments in ({"num_inference_steps": 3, "timesteps": [2, 1]}, {"timesteps": [1, 2]}, {"timesteps": [1000]}):
        with pytest.raises(ValueError):
            fused.set_timesteps(**arguments)


def test_trained_betas_of_another_length() -> None:
    betas = torch.linspace(1e-3, 0.2, 40).tolist()
    for name in NAMES[:3]:
        theirs, fused = pair(name, 8, trained_betas=betas, num_train_timesteps=40)
        check(theirs, fused)


def test_errors_stay_those_of_diffusers() -> None:
    model, x = tensors()
    for name in ("DDIMScheduler", "DDIMParallelScheduler"):
        with pytest.raises(ValueError, match="you need to run 'set_timesteps'"):
            getattr(ours, name)().step(model, 1, x)
    for name in NAMES:
        with pytest.raises(ValueError, match="cannot be larger than"):
            getattr(ours, name)().set_timesteps(1001)
        with pytest.raises(ValueError, match="is not supported"):
            getattr(ours, name)(timestep_spacing="other").set_timesteps(10)
        with pytest.raises(ValueError, match="prediction_type given as other"):
            pair(name, prediction_type="other")[1].step(model, 142, x)
        with pytest.raises(NotImplementedError):
            getattr(ours, name)(beta_schedule="other")


# The config and the attributes are read at every step.

EDITS: dict[str, Any] = {
    "clip_sample": lambda s: setattr(s.config, "clip_sample", False),
    "clip_sample_range": lambda s: setattr(s.config, "clip_sample_range", 0.3),
    "prediction_type": lambda s: setattr(s.config, "prediction_type", "v_prediction"),
    "thresholding": lambda s: setattr(s.config, "thresholding", True),
    "thresholding of more": lambda s: [
        setattr(s.config, *edit)
        for edit in (("thresholding", True), ("sample_max_value", 2.0), ("dynamic_thresholding_ratio", 0.7))
    ],
    "registered": lambda s: s.register_to_config(clip_sample_range=0.5),
    "alphas_cumprod": lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**1.1),
    "alphas_cumprod in place": lambda s: s.alphas_cumprod.mul_(0.99),
    "timesteps": lambda s: setattr(s, "timesteps", s.timesteps[2:]),
    "every second timestep": lambda s: setattr(s, "timesteps", s.timesteps[::2]),
    "timesteps in place": lambda s: s.timesteps.sub_(s.timesteps.clamp(max=3)),
    "num_inference_steps": lambda s: setattr(s, "num_inference_steps", 20),
    "set_timesteps": lambda s: s.set_timesteps(11),
}


@pytest.mark.parametrize(
    ("name", "edit", "inference"),
    [(name, edit, False) for name in NAMES for edit in EDITS]
    # where tensors do not count their versions
    + [(name, edit, True) for name in NAMES[:3] for edit in EDITS if "in place" in edit],
)
def test_edits_take_effect(name: str, edit: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        theirs, fused = pair(name)
        options = {"eta": 0.5} if name in DDIM else {}
        check(theirs, fused, **options)
        for scheduler in (theirs, fused):
            EDITS[edit](scheduler)
        check(theirs, fused, **options)


@pytest.mark.parametrize(
    ("name", "attribute"), [("DDIMScheduler", "final_alpha_cumprod"), ("DDIMInverseScheduler", "initial_alpha_cumprod")]
)
def test_edits_of_the_clean_end_take_effect(name: str, attribute: str) -> None:
    theirs, fused = pair(name)
    check(theirs, fused)
    for scheduler in (theirs, fused):
        setattr(scheduler, attribute, torch.tensor(0.9999))
    check(theirs, fused)
    for scheduler in (theirs, fused):
        getattr(scheduler, attribute).fill_(0.99995)
    check(theirs, fused)


def test_edits_of_the_variance_type() -> None:
    for own, config in (("fixed_large", "fixed_large"), ("fixed_large", "fixed_small"), ("other", "fixed_large")):
        theirs, fused = pair("DDPMScheduler")
        check(theirs, fused)
        for scheduler in (theirs, fused):
            scheduler.variance_type, scheduler.config.variance_type = own, config
        check(theirs, fused)


def test_what_is_not_supported_keeps_the_original_step_with_one_warning() -> None:
    model, x = tensors()
    half = model.half()

    def double(scheduler: Any) -> None:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()

    def up(scheduler: Any) -> None:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.flip(0)

    def variance(scheduler: Any) -> None:
        scheduler.variance_type = "learned_range"

    def final(scheduler: Any) -> None:
        scheduler.final_alpha_cumprod = 1.0

    def one(scheduler: Any) -> None:
        scheduler.one = 1.0

    def listed(scheduler: Any) -> None:
        scheduler.timesteps = scheduler.timesteps.tolist()

    def thresholding(**options: Any) -> Any:
        return lambda scheduler: [
            setattr(scheduler.config, *edit) for edit in {"thresholding": True, **options}.items()
        ]

    cases: list[tuple[str, Any, Any, dict[str, Any], str]] = [
        ("DDIMScheduler", None, (model, x), {"eta": torch.tensor(0.5)}, "an eta that is not a number"),
        ("DDIMScheduler", None, (model, x), {"eta": 1.1}, "an eta that is not a number from 0 to 1"),
        ("DDIMScheduler", final, (model, x), {}, "final_alpha_cumprod is not a tensor"),
        ("DDIMScheduler", listed, (model, x), {"eta": 1.0}, "timesteps is not a tensor"),
        ("DDPMScheduler", one, (model, x), {}, "one is not a tensor"),
        ("DDPMScheduler", thresholding(sample_max_value=-1.0), (model, x), {}, "value of sample_max_value"),
        ("DDIMScheduler", thresholding(sample_max_value=0), (model, x), {"eta": 0.5}, "value of sample_max_value"),
        (
            "DDIMScheduler",
            None,
            (model, x),
            {"eta": 1.0, "variance_noise": torch.randn(3, 3)},
            "a variance_noise unlike",
        ),
        ("DDIMScheduler", None, (half, x), {}, "a half model output beside a float32 sample"),
        ("DDPMScheduler", None, (model, x.half()), {}, "another dtype"),
        ("DDPMScheduler", None, (model, x[:1]), {}, "another shape"),
        ("DDIMScheduler", double, (model, x), {}, "not a float32 vector"),
        ("DDPMScheduler", up, (model, x), {}, "alphas_cumprod"),
        ("DDPMScheduler", variance, (model, x), {}, "a variance_type of the scheduler unlike"),
    ]
    for name, change, (m, sample), options, reason in cases:
        theirs, fused = pair(name)
        if change is not None:
            change(theirs)
            change(fused)
        with pytest.warns(RuntimeWarning, match=reason) as warned:
            for _ in range(2):
                found = []
                for scheduler in (theirs, fused):
                    torch.manual_seed(3)
                    found.append(scheduler.step(m, 142, sample, **options).prev_sample)
                assert equal(*found) and fused._fastdiff.fused == 0
        assert sum(issubclass(w.category, RuntimeWarning) for w in warned) == 1
        assert list(fused._fastdiff.kept.values()) == [2]


def one_warning(reason: str) -> Any:
    """Of these steps the first warns, with this reason."""
    return pytest.warns(RuntimeWarning, match=reason)


def test_a_bad_ratio_of_thresholding_is_the_error_of_diffusers() -> None:
    _, fused = pair("DDPMScheduler", thresholding=True, dynamic_thresholding_ratio=1.5)
    model, x = tensors()
    state = torch.get_rng_state()
    with one_warning("value of dynamic_thresholding_ratio"), pytest.raises(RuntimeError, match="quantile"):
        fused.step(model, 142, x)
    assert torch.equal(torch.get_rng_state(), state)
    # an option that is edited after a step
    theirs, fused = pair("DDIMScheduler", thresholding=True)
    check(theirs, fused)
    for scheduler in (theirs, fused):
        scheduler.config.sample_max_value = -1.0
    with one_warning("value of sample_max_value"):
        assert torch.equal(*(s.step(*around(142)).prev_sample for s in (theirs, fused)))


def around(t: Any) -> Any:
    model, x = tensors()
    return model, t, x


def test_values_that_change_at_every_step_warn_once() -> None:
    theirs, fused = pair("DDIMScheduler")
    with pytest.warns(RuntimeWarning, match="an unsupported value of final_alpha") as warned:
        for k in range(10):
            for scheduler in (theirs, fused):
                scheduler.final_alpha_cumprod = torch.tensor(1.1 + k / 10)
            assert equal(*(s.step(*around(142)).prev_sample for s in (theirs, fused)))
    assert sum(issubclass(w.category, RuntimeWarning) for w in warned) == 1 and list(fused._fastdiff.kept.values()) == [
        10
    ]


def test_a_timestep_of_one_element() -> None:
    for name in NAMES:
        for dtype in (torch.float32, torch.float64):
            theirs, fused = pair(name)
            model, x = tensors(dtype=dtype)
            options = {"eta": 0.5} if name in DDIM else {}
            check(theirs, fused, [t.reshape(1) for t in theirs.timesteps], model, x, **options)
    theirs, fused = pair("DDPMScheduler", variance_type="learned_range")
    model, x = tensors(channels=2)
    check(theirs, fused, [t.reshape(1) for t in theirs.timesteps], model, x)
    theirs, fused = pair("DDIMScheduler")
    for timestep, dtype, reason in (
        (torch.tensor([142]), torch.float16, r"a timestep of shape \(1,\)"),
        (torch.tensor([[142]]), torch.float32, "neither an integer nor a tensor of one"),
        (-5, torch.float32, "a negative timestep"),
    ):
        model, x = tensors(dtype=dtype)
        with one_warning(reason):
            assert equal(*(s.step(model, timestep, x).prev_sample for s in (theirs, fused)))


def test_timesteps_of_a_batch_that_are_left_to_diffusers() -> None:
    theirs, fused = pair("DDPMParallelScheduler", 10)
    z, x = tensors((3, 2, 4, 4))
    column = torch.tensor([[5], [500], [999]])
    assert torch.equal(*(s.add_noise(x, z, column) for s in (theirs, fused)))
    with one_warning("a negative timestep"):
        assert torch.equal(*(s.add_noise(x, z, column[:, 0] - 6) for s in (theirs, fused)))
    with one_warning("not an integer for each sample"):
        assert torch.equal(*(s.add_noise(x[:1], z[:1], column[:, 0]) for s in (theirs, fused)))
    with one_warning("a negative timestep"):
        fused = fastdiff.enable(copy.deepcopy(theirs))
        assert torch.equal(*(s.batch_step_no_noise(z, column[:, 0] - 6, x) for s in (theirs, fused)))
    with one_warning("another dtype"):
        fused.batch_step_no_noise(z.double(), column[:, 0], x)


def test_thresholding_of_half_x0_in_a_batch_is_that_of_diffusers() -> None:
    config: dict[str, Any] = {"prediction_type": "sample", "thresholding": True, "sample_max_value": 100.0}
    for name in ("DDPMParallelScheduler", "DDIMParallelScheduler"):
        theirs, fused = pair(name, 10, **config)
        model, x = tensors((3, 16, 2), dtype=torch.bfloat16)
        with one_warning("a thresholding of half model outputs"):
            assert equal(*(s.batch_step_no_noise(model * 3, torch.tensor([999, 5, 0]), x) for s in (theirs, fused)))


# Methods that were replaced.

OVERRIDES: dict[str, Any] = {
    "_get_variance": lambda *_, **__: torch.tensor(1e-5),
    "_threshold_sample": lambda *args: args[-1] * 0.5,
    "previous_timestep": lambda *_: torch.tensor(3),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [("DDIMScheduler", method) for method in [*OVERRIDES][:2]] + [("DDPMScheduler", method) for method in OVERRIDES],
)
@pytest.mark.parametrize("where", ["instance", "class"])
def test_methods_that_are_replaced_after_a_step(
    name: str, method: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, fused = pair(name, thresholding=method == "_threshold_sample")
    options = {"eta": 0.5} if name in DDIM else {}
    check(theirs, fused, **options)
    before = fused.step(*around(142), **options, generator=torch.Generator().manual_seed(1)).prev_sample
    for target in (theirs, fused) if where == "instance" else (getattr(diffusers, name),):
        monkeypatch.setattr(target, method, OVERRIDES[method], raising=True)
    with one_warning(f"{name} has a {method} of its own"):
        found = [
            s.step(*around(142), **options, generator=torch.Generator().manual_seed(1)).prev_sample
            for s in (theirs, fused)
        ]
    assert torch.equal(*found) and not torch.equal(found[0], before)
    monkeypatch.undo()
    check(theirs, fused, **options)


def test_a_class_of_diffusers_that_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, fused = pair("DDIMParallelScheduler")
    host, model, x = diffusers.DDIMParallelScheduler, *tensors()
    step = host.step
    monkeypatch.setattr(host, "step", lambda self, *args, **options: step(self, *args, **options)[:1], raising=True)
    with one_warning("has a step of its own"):
        assert len(fused.step(model, 142, x, return_dict=False)) == 1
    with one_warning("has a step of its own"):
        assert len(fastdiff.enable(copy.deepcopy(theirs)).step(model, 142, x, return_dict=False)) == 1
    monkeypatch.setattr(host, "add_noise", lambda self, *args: args[0], raising=True)
    with one_warning("has a add_noise of its own"):
        assert fused.add_noise(x, model, torch.tensor([1, 2])) is x
    monkeypatch.setattr(host, "set_timesteps", lambda self, *args: setattr(self, "timesteps", None), raising=True)
    fused.set_timesteps(5)
    assert fused.timesteps is None


def test_a_step_that_the_instance_had_before_is_told() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(7)
    scheduler.step = functools.partial(scheduler.step, eta=1.0)
    with one_warning("this DDIMScheduler has a step of its own"):
        fastdiff.enable(scheduler)
    assert "0 steps fused; 0 kept: this DDIMScheduler has a step of its own" in str(fastdiff.summary(scheduler))
    # one that is put there afterwards calls the fused step
    _, fused = pair("DDIMScheduler")
    fused.step = functools.partial(fused.step, eta=1.0)
    fused.step(*around(142))
    assert fused._fastdiff.fused == 1 and not fused._fastdiff.kept


class MyScheduler(diffusers.DDIMScheduler):  # type: ignore[misc, name-defined]
    def _get_variance(self, timestep: Any, prev_timestep: Any) -> Any:
        return super()._get_variance(timestep, prev_timestep) * 0.5


def test_a_subclass_that_overrides_a_part_of_the_step_keeps_its_own() -> None:
    theirs, fused = MyScheduler(), fastdiff.enable(MyScheduler())
    theirs.set_timesteps(5)
    fused.set_timesteps(5)
    model, x = tensors()
    with pytest.warns(RuntimeWarning, match="MyScheduler has a _get_variance of its own"):
        for t in theirs.timesteps:
            a, b = (s.step(model, t, x, eta=1.0, generator=torch.Generator().manual_seed(1)) for s in (theirs, fused))
            assert torch.equal(a.prev_sample, b.prev_sample)
    assert "5 kept: MyScheduler has a _get_variance" in str(fastdiff.summary(fused))


# Steps that are broken in diffusers.


def test_fixed_large_log_is_fixed_large() -> None:
    model, x = tensors()
    broken, fused = pair("DDPMScheduler", variance_type="fixed_large_log")
    right, _ = pair("DDPMScheduler", variance_type="fixed_large")
    for t in fused.timesteps:
        g = [torch.Generator().manual_seed(1) for _ in range(3)]
        found = [s.step(model, t, x, generator=g[k]).prev_sample for k, s in enumerate((broken, right, fused))]
        assert found[0].isnan().all() or t == 0
        torch.testing.assert_close(found[2], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_trailing_has_as_many_timesteps_as_asked_for(name: str) -> None:
    for steps in (61, 103, 50):
        theirs, fused = pair(name, steps, timestep_spacing="trailing")
        kept = theirs.timesteps[theirs.timesteps >= 0]
        assert len(fused.timesteps) == steps and torch.equal(fused.timesteps, kept)
        assert (len(theirs.timesteps) != steps) == (steps != 50), "diffusers is no longer broken there"
        calls: list[tuple[Any, ...]] = [(np.int64(61),), (np.int32(61), "cpu")]
        for call in calls + ([(61, None, None)] if "DDPM" in name else []):
            fused.set_timesteps(*call)
            assert len(fused.timesteps) == 61
        if "DDPM" in name:
            fused.set_timesteps(61, timesteps=None)
            assert len(fused.timesteps) == 61 and not fused.custom_timesteps
        else:
            with pytest.raises(TypeError):
                fused.set_timesteps(61, timesteps=None)
    # the last step leads to the data, where that of diffusers' list leads on to timestep -1, a wrapped index
    fused = pair(name, 61, timestep_spacing="trailing", clip_sample=False)[1]
    model, x = tensors()
    t = int(fused.timesteps.min())
    assert fused.step(model * 0, t, x).prev_sample.abs().max() < 3 * x.abs().max()


def test_zero_terminal_snr_with_eta_1_is_finite() -> None:
    model, x = tensors()
    broken = 0
    for steps in (7, 25, 30, 50):
        theirs, fused = pair(
            "DDIMScheduler",
            steps,
            beta_schedule="scaled_linear",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            prediction_type="v_prediction",
        )
        t = fused.timesteps[0]
        g = [torch.Generator().manual_seed(1) for _ in range(3)]
        a, b = (s.step(model, t, x, eta=1.0, generator=g[k]).prev_sample for k, s in enumerate((theirs, fused)))
        broken += bool(a.isnan().all())
        # all of x is noise there, and all of the noise is new
        abp = theirs.alphas_cumprod[999 - 1000 // steps].double()
        exact = abp.sqrt() * (-model.double()).clamp(-1, 1) + (1 - abp).sqrt() * torch.randn(x.shape, generator=g[2])
        assert theirs.alphas_cumprod[t] == 0 and (b - exact).abs().max() < 2e-3
    assert broken, "diffusers is no longer broken there"


# Parallel schedulers, the forward process.


@pytest.mark.parametrize("name", ["DDPMParallelScheduler", "DDIMParallelScheduler"])
def test_batches_of_timesteps(name: str) -> None:
    for prediction, dtype, extra in itertools.product(PREDICTIONS, DTYPES, ({}, {"thresholding": True})):
        theirs, fused = pair(name, 10, prediction_type=prediction, timestep_spacing="trailing", **extra)
        model, x = tensors((4, 2, 3, 3), dtype=dtype)
        if extra and prediction == "sample" and dtype in (torch.bfloat16, torch.float16):
            continue  # left to diffusers
        for timesteps in (torch.tensor([999, 400, 99, 0]), torch.tensor([500]), torch.tensor([5, 5, 5, 5])):
            options = [{}] if "DDPM" in name else [{}, {"use_clipped_model_output": True}]
            for given in options:
                a, b = (s.batch_step_no_noise(model, timesteps, x, **given) for s in (theirs, fused))
                assert equal(a, b) and fused._fastdiff.fused
        with pytest.raises(IndexError):
            fused.batch_step_no_noise(model, torch.tensor([1, 2, 3, 1000]), x)
    theirs, fused = pair(name, 10)
    model, x = tensors((4, 2, 3, 3))
    timesteps = torch.tensor([999, 400, 99, 0])
    for edit in ("clip_sample", "prediction_type", "alphas_cumprod", "alphas_cumprod in place", "num_inference_steps"):
        for scheduler in (theirs, fused):
            EDITS[edit](scheduler)
        assert torch.equal(*(s.batch_step_no_noise(model, timesteps, x) for s in (theirs, fused))), edit
    if "DDPM" in name:
        theirs, fused = pair(name, 10, variance_type="learned_range")
        model, x = tensors((4, 2, 3, 3), channels=2)
        assert torch.equal(*(s.batch_step_no_noise(model, timesteps, x) for s in (theirs, fused)))
    else:
        with pytest.raises(AssertionError):
            fused.batch_step_no_noise(model, torch.tensor([1, 2, 3, 4]), x, eta=0.5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "DDIMInverseScheduler"])
def test_the_forward_process(name: str) -> None:
    theirs, fused = pair(name, None, beta_schedule="scaled_linear")
    for dtype, timesteps in itertools.product(DTYPES, ([0, 1, 999, 500], [7])):
        z, x = tensors((4, 2, 3, 3), dtype=dtype)
        t = torch.tensor(timesteps)
        assert equal(theirs.add_noise(x, z, t), fused.add_noise(x, z, t))
        assert equal(theirs.get_velocity(x, z, t), fused.get_velocity(x, z, t))
    z, x = tensors((4, 2, 3, 3))
    with pytest.raises(IndexError):
        fused.add_noise(x, z, torch.tensor([1000, 0, 0, 0]))
    for scheduler in (theirs, fused):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.2
    assert torch.equal(theirs.add_noise(x, z, t), fused.add_noise(x, z, t))
    x.requires_grad_()
    gradients = [torch.autograd.grad(s.add_noise(x, z, t).square().sum(), x)[0] for s in (theirs, fused)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_results_lie_in_memory_as_those_of_diffusers(name: str, prediction: str) -> None:
    last = torch.channels_last
    for config in ({}, {"clip_sample": False}, {"thresholding": True}, {"variance_type": "learned_range"}):
        if name == "DDIMInverseScheduler" and "thresholding" in config or "DDIM" in name and "variance_type" in config:
            continue
        theirs, fused = pair(name, prediction_type=prediction, **config)
        model, x = tensors((2, 2, 3, 3), channels=2 if "variance_type" in config else 1)
        for m, sample in ((model, x.to(memory_format=last)), (model.to(memory_format=last), x)):
            for options in [{}, {"eta": 0.5}] if name in DDIM else [{}]:
                found = [s.step(m, 142, sample, return_dict=False, **options) for s in (theirs, fused)]
                for one, other in zip(*found, strict=True):
                    assert one.stride() == other.stride(), (config, options)
            if "Parallel" in name:
                found = [s.batch_step_no_noise(m, torch.tensor([142, 0]), sample) for s in (theirs, fused)]
                assert torch.equal(*found) and found[0].stride() == found[1].stride(), config


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_first_step_in_sight_of_a_transform(name: str) -> None:
    model, x = tensors()
    options = {"eta": 0.5} if name == "DDIMScheduler" else {}
    z = torch.Generator().get_state()

    def loss(scheduler: Any) -> Any:
        def function(m: Tensor) -> Tensor:
            generator = torch.Generator()
            generator.set_state(z)
            given = {"generator": generator} | options
            return scheduler.step(m, 142, x, return_dict=False, **given)[0].square().sum()

        return function

    expected = torch.func.grad(loss(pair(name)[0]))(model)
    _, fused = pair(name)
    torch.testing.assert_close(torch.func.grad(loss(fused))(model), expected, rtol=2e-5, atol=2e-5)
    theirs, other = pair(name)
    tangent = torch.func.jvp(loss(other), (model,), (x,))[1]
    torch.testing.assert_close(tangent, (expected * x).sum(), rtol=1e-4, atol=1e-4)
    noisy = torch.func.grad(lambda m: fused.add_noise(m, x, torch.tensor([3, 5])).sum())(model)
    assert torch.equal(noisy, theirs.alphas_cumprod[[3, 5]].sqrt().reshape(2, 1, 1, 1).expand_as(noisy))
    for scheduler in (fused, other):
        for plan in scheduler._memory.plans.values():
            assert not torch._C._functorch.is_functorch_wrapped_tensor(plan.table.rows)
        check(theirs, scheduler, **options)


def test_a_step_of_fake_tensors_leaves_nothing_behind() -> None:
    theirs, fused = pair("DDIMScheduler")
    model, x = tensors()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, one_warning("a FakeTensor in place of a tensor"):
        found = fused.step(mode.from_tensor(model), 142, mode.from_tensor(x))
        assert found.prev_sample.shape == x.shape
        fused.add_noise(mode.from_tensor(model), mode.from_tensor(x), mode.from_tensor(torch.tensor([1, 2])))
    check(theirs, fused)
    assert torch.equal(*(s.add_noise(model, x, torch.tensor([1, 2])) for s in (theirs, fused)))


def test_the_default_device_is_not_that_of_a_table() -> None:
    theirs, fused = pair("DDIMScheduler", thresholding=True)
    z, x = tensors()
    t = torch.tensor([1, 2])
    with torch.device("meta"):
        noisy = fused.add_noise(x, z, t)
        stepped = fused.step(z, 142, x).prev_sample
    assert torch.equal(noisy, theirs.add_noise(x, z, t)) and torch.equal(stepped, theirs.step(z, 142, x).prev_sample)


def test_a_device_is_known_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours._resolved("cpu") == torch.device("cpu") and ours._resolved("cuda:1") == torch.device("cuda", 1)
    current = torch.device("cuda", 2)

    class Placed:
        device = current

    monkeypatch.setattr(torch, "empty", lambda *_, device: Placed)
    assert ours._resolved("cuda") == ours._resolved(torch.device("cuda")) == current


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(
    "config", [{}, {"thresholding": True, "sample_max_value": 3.0}, {"prediction_type": "v_prediction"}]
)
def test_gradients_flow_as_in_diffusers(name: str, config: dict[str, Any]) -> None:
    theirs, fused = pair(name, **config)
    options = {} if name == "DDPMScheduler" else {"eta": 0.5, "use_clipped_model_output": True}
    found = []
    for scheduler in (theirs, fused):
        model, x = (u.requires_grad_() for u in tensors())
        out = scheduler.step(model, 284, x, generator=torch.Generator().manual_seed(0), **options)
        loss = out.prev_sample.square().sum() + out.pred_original_sample.sum()
        found.append(torch.autograd.grad(loss, (model, x)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert fused._fastdiff.fused == 1


def test_results_are_fresh_and_inputs_untouched() -> None:
    for name in ("DDPMScheduler", "DDIMScheduler"):
        fused = pair(name, prediction_type="sample", clip_sample=False)[1]
        model, x = tensors()
        kept = model.clone(), x.clone()
        x_prev, x0 = fused.step(model, 0, x, return_dict=False)
        x_prev.zero_()
        x0.zero_()
        assert torch.equal(model, kept[0]) and torch.equal(x, kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_step_returns_is_what_diffusers_returns(name: str) -> None:
    theirs, fused = pair(name)
    model, x = tensors()
    a, b = (s.step(model, 142, x) if "DDPM" not in name else s.step(model, 0, x) for s in (theirs, fused))
    assert type(a) is type(b) and list(a) == list(b) == list(vars(b)) == list(vars(a))
    for one, other in zip(a.to_tuple(), b.to_tuple(), strict=True):
        assert torch.equal(one, other)
    assert b[0] is b["prev_sample"] is b.prev_sample and b[1] is b.pred_original_sample
    b.prev_sample = x
    assert b["prev_sample"] is x
    copied = pickle.loads(pickle.dumps(b))
    assert type(copied) is type(a) and torch.equal(copied.prev_sample, x)
    leaves, shape = torch.utils._pytree.tree_flatten(b)
    assert len(leaves) == 2 and type(torch.utils._pytree.tree_unflatten(leaves, shape)) is type(a)


# Noise of the contract.


def test_philox_noise_does_not_depend_on_the_batch() -> None:
    seeds = torch.tensor([11, 12, 13])
    for name, options in (("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})):
        fused = fastdiff.enable(getattr(diffusers, name)(), noise="philox", seeds=seeds)
        alone = fastdiff.enable(getattr(diffusers, name)(), noise="philox", seeds=seeds[1:2])
        theirs = getattr(diffusers, name)()
        for scheduler in (fused, alone, theirs):
            scheduler.set_timesteps(10)
        model, x = tensors((3, 2, 4, 4))
        state = torch.get_rng_state()
        for t in fused.timesteps:
            every = fused.step(model, t, x, **options).prev_sample
            assert torch.equal(every[1:2], alone.step(model[1:2], t, x[1:2], **options).prev_sample)
            z = noise.normal((3, 2, 4, 4), seeds, t=int(t), domain="step")
            if options:
                expected = theirs.step(model, t, x, variance_noise=z, **options).prev_sample
                assert torch.equal(every, expected)
        assert torch.equal(state, torch.get_rng_state())


def test_philox_noise_without_seeds_follows_the_generator() -> None:
    fused = fastdiff.enable(diffusers.DDPMScheduler(), noise="philox")
    fused.set_timesteps(10)
    model, x = tensors()
    draws = [fused.step(model, 500, x, generator=torch.Generator().manual_seed(k)).prev_sample for k in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append([fused.step(model, 500, x).prev_sample for _ in range(2)])
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][0], results[0][1])
    learned = fastdiff.enable(diffusers.DDPMScheduler(variance_type="learned_range"), noise="philox", seeds=3)
    learned.set_timesteps(10)
    model, x = tensors(channels=2)
    first = learned.step(model, 500, x).prev_sample
    assert first.isfinite().all() and torch.equal(first, learned.step(model, 500, x).prev_sample)


def test_rounding_once_is_closer_to_the_exact_step() -> None:
    theirs, fused = pair("DDIMScheduler")
    once = fastdiff.enable(copy.deepcopy(theirs), rounding="once")
    model, x = tensors((4, 4, 8, 8), dtype=torch.bfloat16)
    exact = theirs.step(model.double(), 142, x.double()).prev_sample
    errors = [(s.step(model, 142, x).prev_sample.double() - exact).abs().mean() for s in (fused, once)]
    assert errors[1] < errors[0]
    assert once.step(model, 142, x.float()).prev_sample.dtype is torch.float32
    assert once._fastdiff.fused == 2 and not once._fastdiff.kept


# Switching.


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_documentation_are_those_of_diffusers(name: str) -> None:
    theirs, fused = getattr(diffusers, name), getattr(ours, name)
    assert issubclass(fused, theirs)
    assert (fused.__name__, fused.__qualname__, fused.__module__) == (theirs.__name__,) * 2 + (theirs.__module__,)
    for method in ("__init__", "step", "set_timesteps", "add_noise", "get_velocity", "batch_step_no_noise"):
        assert hasattr(theirs, method) == hasattr(fused, method)
        if hasattr(theirs, method):
            assert inspect.signature(getattr(fused, method)) == inspect.signature(getattr(theirs, method))
            assert getattr(fused, method).__doc__ == getattr(theirs, method).__doc__
    assert len(fused()) == len(theirs())


@pytest.mark.parametrize("name", NAMES)
def test_enable_and_disable(name: str) -> None:
    scheduler, other = getattr(diffusers, name)(), getattr(diffusers, name)()
    before = dict(vars(getattr(diffusers, name)))
    attributes = scheduler.__dict__.keys() - {"_fastdiff_state"}
    assert fastdiff.enable(scheduler) is scheduler and type(scheduler) is getattr(ours, name)
    assert type(other) is getattr(diffusers, name) and dict(vars(type(other))) == before
    fastdiff.enable(scheduler)
    scheduler.set_timesteps(7)
    other.set_timesteps(7)
    check(other, scheduler)
    assert "7 steps fused" in str(fastdiff.summary(scheduler))
    assert fastdiff.disable(scheduler) is scheduler and type(scheduler) is getattr(diffusers, name)
    assert vars(scheduler).keys() == attributes
    fastdiff.disable(scheduler)


@pytest.mark.parametrize("name", NAMES)
def test_saved_schedulers_are_those_of_diffusers(name: str, tmp_path: Any) -> None:
    fused = getattr(ours, name)(num_train_timesteps=100)
    fused.set_timesteps(7)
    fused.step(tensors()[0], fused.timesteps[1], tensors()[1])
    fused.save_pretrained(tmp_path)
    assert "fastdiff" not in (tmp_path / "scheduler_config.json").read_text()
    loaded = getattr(diffusers, name).from_pretrained(tmp_path)
    assert loaded.config.num_train_timesteps == 100
    assert type(getattr(ours, name).from_config(loaded.config)) is getattr(ours, name)
    blob = pickle.dumps(fused)
    assert b"fastdiff" not in blob and type(pickle.loads(blob)) is getattr(diffusers, name)
    twin = copy.deepcopy(fused)
    assert type(twin) is type(fused) and torch.equal(twin.timesteps, fused.timesteps)
    twin.set_timesteps(4)
    assert len(fused.timesteps) == 7
    theirs = getattr(diffusers, name)(num_train_timesteps=100)
    theirs.set_timesteps(4)
    check(theirs, twin)


def test_configs_go_from_one_family_to_another() -> None:
    config = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading").config
    theirs, fused = (module.DDIMScheduler.from_config(config) for module in (diffusers, ours))
    for scheduler in (theirs, fused):
        scheduler.set_timesteps(7)
    check(theirs, fused)
    # an option that the inversion does not have
    config = diffusers.DDIMScheduler(thresholding=True).config
    theirs, fused = (module.DDIMInverseScheduler.from_config(config) for module in (diffusers, ours))
    for scheduler in (theirs, fused):
        scheduler.set_timesteps(7)
    check(theirs, fused)


def test_another_family_is_an_error_that_says_what_to_write() -> None:
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"):
        scheduler = getattr(diffusers, name)()
        with pytest.raises(ValueError, match=f"got {name}") as raised:
            fastdiff.enable(scheduler)
        line = "pipe.scheduler = fastdiff.integrations.diffusers.DDIMScheduler.from_config(pipe.scheduler.config)"
        assert line in str(raised.value) and all(known in str(raised.value) for known in NAMES)
        assert type(scheduler) is getattr(diffusers, name)
        fastdiff.disable(scheduler)
    with pytest.raises(TypeError, match="expected a scheduler or a pipeline"):
        fastdiff.enable(diffusers.UNet1DModel(8, block_out_channels=(8, 8, 8), norm_num_groups=4))


# set_timesteps, and what it costs to keep its results.


@pytest.mark.parametrize("name", NAMES)
def test_repeated_set_timesteps(name: str) -> None:
    theirs, fused = pair(name, None)
    for steps in (10, 7, 10, 10):
        theirs.set_timesteps(steps)
        fused.set_timesteps(steps, device="cpu")
        assert (
            torch.equal(theirs.timesteps, fused.timesteps) and theirs.num_inference_steps == fused.num_inference_steps
        )
        check(theirs, fused)
    fused.timesteps += 1
    fused.set_timesteps(10)
    assert torch.equal(theirs.timesteps, fused.timesteps)
    held, view, array = fused.timesteps, fused.timesteps[2:], fused.timesteps.numpy()
    fused.set_timesteps(10)
    fused.timesteps.add_(1)
    assert torch.equal(held, theirs.timesteps) and torch.equal(view, theirs.timesteps[2:])
    array += 1
    fused.set_timesteps(10)
    assert torch.equal(fused.timesteps, theirs.timesteps)
    fused.timesteps.numpy()[:] = 0
    fused.set_timesteps(np.int64(10))
    assert torch.equal(fused.timesteps, theirs.timesteps) and type(fused.num_inference_steps) is np.int64
    for scheduler in (theirs, fused):
        scheduler.config.timestep_spacing = "trailing"
        scheduler.config.steps_offset = 3
        scheduler.set_timesteps(10)
    assert torch.equal(theirs.timesteps, fused.timesteps)
    check(theirs, fused)


def test_plans_do_not_pile_up() -> None:
    fused = pair("DDIMScheduler")[1]
    model, x = tensors()
    for k in range(200):
        fused.step(model, 142, x, eta=k / 200)
    for k in range(1, 100):
        fused.set_timesteps(k)
    memory = fused._memory
    assert len(memory.plans) <= ours._MAX_PLANS and len(memory.chains) <= ours._MAX_CHAINS


def test_an_element_of_timesteps_is_told_by_its_address() -> None:
    timesteps = torch.arange(20)
    for part in (timesteps, timesteps[3:], timesteps[1::3]):
        for index, t in enumerate(part):
            assert ours._index_in(part, t) == index
    assert ours._index_in(timesteps[2:], timesteps[1]) is None
    assert ours._index_in(timesteps[:5], timesteps[5]) is None
    assert ours._index_in(timesteps[::2], timesteps[1]) is None
    assert ours._index_in(timesteps, timesteps[3].clone()) is None
    assert ours._index_in(timesteps, timesteps[3].to(torch.int32)) is None


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"])
def test_a_timestep_that_the_host_does_not_read(name: str) -> None:
    """As on CUDA, where a tensor that is no element of timesteps goes to the kernel."""
    for config in ({}, {"thresholding": True}, {"variance_type": "learned_range"}):
        if name == "DDIMInverseScheduler" and config or name == "DDIMScheduler" and "variance_type" in config:
            continue
        fused = pair(name, **config)[1]
        model, x = tensors(channels=2 if "variance_type" in config else 1)
        options: dict[str, Any] = {"eta": 0.5} if name == "DDIMScheduler" else {}
        for t in fused.timesteps:
            torch.manual_seed(1)
            known = fused.step(model, t, x, **options)
            torch.manual_seed(1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(fused), "_timestep", lambda self, plan, timestep: timestep)
                unknown = fused.step(model, t, x, **options)
            torch.testing.assert_close(known.prev_sample, unknown.prev_sample, rtol=1e-6, atol=1e-6)
            assert torch.equal(known.pred_original_sample, unknown.pred_original_sample)


# Compiled code.

COMPILED = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_eta": ("DDIMScheduler", {"eta": 1.0}),
    "ddpm": ("DDPMScheduler", {}),
    "inverse": ("DDIMInverseScheduler", {}),
}


@pytest.mark.parametrize("case", COMPILED)
def test_a_step_compiles_without_a_break(case: str) -> None:
    from torch._dynamo.testing import CompileCounter

    name, options = COMPILED[case]
    fused = pair(name)[1]
    model, x = tensors()
    counter = CompileCounter()

    def step(timestep: Any) -> Any:
        return fused.step(model, timestep, x, return_dict=False, **options)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter)

    def agree(frames: int, timesteps: Any = None) -> None:
        for t in fused.timesteps if timesteps is None else timesteps:
            results = []
            for function in (step, compiled):
                torch.manual_seed(2)
                results.append(function(t))
            assert all(map(torch.equal, *results)), int(t)
        assert counter.frame_count == frames

    agree(1)
    fused.set_timesteps(7)
    agree(1)
    fused.set_timesteps(5)
    agree(2)
    fused.set_timesteps(7)
    agree(2)
    fused.config.clip_sample = False
    agree(3)
    fused.alphas_cumprod = fused.alphas_cumprod**1.1
    agree(4)
    agree(6 if case == "ddpm" else 5, fused.timesteps.tolist())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"thresholding": True, "prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"thresholding": True, "variance_type": "learned_range"}),
    ],
)
def test_compiled_steps_of_other_options(name: str, config: dict[str, Any]) -> None:
    theirs, fused = pair(name, 3, **config)
    model, x = tensors(channels=2 if "variance_type" in config else 1)
    torch._dynamo.reset()
    compiled = torch.compile(fused.step, fullgraph=True, backend="eager")
    for options in [{}, {"eta": 0.5}, {"eta": 0.25}] if name in DDIM else [{}]:
        found = []
        for step in (compiled, theirs.step):
            torch.manual_seed(2)
            found.append(step(model, fused.timesteps[1], x, return_dict=False, **options))
        assert all(map(torch.equal, *found)), options
    torch._dynamo.reset()


def test_tables_of_compiled_code_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_MAX_PLANS", 1)
    fused = pair("DDIMScheduler")[1]
    model, x = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(fused.step, fullgraph=True, backend="eager")
    for limit in (0.5, 0.1, 0.5, 0.1):
        fused.config.clip_sample_range = limit
        found = [step(model, fused.timesteps[3], x, return_dict=False)[1] for step in (compiled, fused.step)]
        assert torch.equal(*found) and found[0].abs().max() == limit
        assert len(vars(fused._fastdiff.tables["traced"])) == 1
    torch._dynamo.reset()


def test_what_compiled_code_leaves_to_diffusers_is_told() -> None:
    model, x = tensors()
    _, fused = pair("DDIMScheduler")
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: fused.step(model, t, x, eta=1.5, return_dict=False)[0], backend="eager")
    with one_warning("an eta that is not a number from 0 to 1"):
        compiled(fused.timesteps[3])
    compiled = torch.compile(lambda t: fused.add_noise(x, model, t), backend="eager")
    with one_warning("add_noise in compiled code"):
        assert torch.equal(compiled(torch.tensor([1, 2])), fused.add_noise(x, model, torch.tensor([1, 2])))
    torch._dynamo.reset()


def test_a_compiled_step_differentiates() -> None:
    fused = pair("DDIMScheduler")[1]
    model, x = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(fused.step, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (fused.step, compiled):
        m = model.clone().requires_grad_()
        function(m, fused.timesteps[3], x, return_dict=False)[0].square().sum().backward()
        gradients.append(m.grad)
    assert torch.equal(*gradients)
    torch._dynamo.reset()


def test_without_the_native_library_the_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pair("DDPMScheduler")[0]
    fused = fastdiff.enable(copy.deepcopy(theirs), backend="reference")
    check(theirs, fused)
    monkeypatch.setattr(ops, "_UNAVAILABLE", "it is not there")
    check(*pair("DDIMScheduler"), eta=0.5)


def test_an_old_diffusers_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(diffusers, "__version__", "0.27.2")
    spec = importlib.util.find_spec("fastdiff.integrations.diffusers")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"expected diffusers 0\.38 or newer, got 0\.27\.2"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
