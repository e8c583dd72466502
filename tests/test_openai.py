"""GaussianDiffusion: the classes of the package, and objects of other codebases that are enabled."""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import itertools
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import openai_transcription as host
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.integrations import openai
from fastdiff.integrations._host import Options
from fastdiff.integrations.openai import guided, improved
from fastdiff.integrations.openai._diffusion import Diffusion
from fastdiff.schedules import NoiseSchedule

STEPS = ("p_sample", "ddim_sample", "ddim_reverse_sample")
TYPES = list(itertools.product(host.Mean, host.Var))
KEPT = range(0, 200, 13)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a step that is kept
        yield
    torch.set_num_threads(threads)


def options(mean: Any = host.Mean.EPSILON, var: Any = host.Var.FIXED_LARGE, **others: Any) -> dict[str, Any]:
    found = {"betas": host.linear_betas(200), "model_mean_type": mean, "model_var_type": var}
    return found | {"loss_type": host.Loss.MSE} | others


def theirs(cls: Any = host.SpacedGuided, *types: Any, **others: Any) -> Any:
    spaced = {"use_timesteps": KEPT} if issubclass(cls, host.Spaced) else {}
    return cls(**options(*types, **spaced, **others))


def enabled(*args: Any, with_options: dict[str, Any] | None = None, **others: Any) -> Any:
    return fastdiff.enable(theirs(*args, **others), **(with_options or {}))


def own(*types: Any, module: Any = openai, **others: Any) -> Any:
    return module.SpacedDiffusion(use_timesteps=KEPT, **options(*types, **others))


class Net:
    """A model or a classifier's gradient that depends on all that it is given, and remembers it."""

    def __init__(self, learned: bool = False, tuples: bool = False) -> None:
        self.learned, self.tuples = learned, tuples
        self.calls: list[Any] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Any:
        self.calls.append((t.dtype, t.tolist(), y))
        time = torch.sin(0.02 * t.float() + 0.4).to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
        found = 0.8 * torch.tanh(1.3 * x) + 0.2 * time
        if y is not None:
            found = found + 0.1 * y.to(x.dtype).reshape(time.shape)
        if self.learned:
            found = torch.cat([found, torch.tanh(0.7 * x + time)], dim=1)
        return (found, None) if self.tuples else found


def net_for(diffusion: Any) -> Net:
    return Net(diffusion.model_var_type.name.startswith("LEARNED"))


def batch(diffusion: Any, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    last = diffusion.num_timesteps - 1
    x = torch.randn(4, *(shape or (2, 3, 2)), generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([0, 1, last // 2, last])


def run(diffusion: Any, method: str, *args: Any, seed: int = 3, **given: Any) -> tuple[dict[str, Tensor], float]:
    """What a method gives, and the number that torch's generator gives next."""
    torch.manual_seed(seed)
    found = getattr(diffusion, method)(*args, **given)
    return found, torch.randn(1).item()


def lanes_agree() -> bool:
    """Whether torch's exp and sqrt of a number are the same alone and among many, as on most machines."""
    values = torch.linspace(-12, 0, 501)
    return all(
        torch.equal(function(part), torch.stack([function(one) for one in part]))
        for function, part in ((torch.exp, values), (torch.sqrt, -values))
    )


TOLERANCE = 0.0 if lanes_agree() else 1e-5


def assert_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def cases(method: str, diffusion: Any) -> Iterator[tuple[tuple[int, ...], Callable[[Tensor], Tensor], dict[str, Any]]]:
    """Shapes, what is done to x, and options: everything that a step looks at."""

    def same(x: Tensor) -> Tensor:
        return x

    def denoised_fn(x0: Tensor) -> Tensor:
        return 0.9 * x0 + 0.01

    etas = {"eta": 0.4} if method == "ddim_sample" else {}
    y = torch.arange(4)
    yield (2, 3, 2), same, {}
    yield (2, 3, 2), same, {"clip_denoised": False} | etas
    yield (2, 3, 2), lambda x: x.to(memory_format=torch.channels_last), {"model_kwargs": {"y": y}}
    yield (2, 5), lambda x: x.double(), etas
    yield (2, 3, 2), lambda x: x.double().to(memory_format=torch.channels_last), etas
    yield (2, 3), lambda x: x.double().transpose(1, 2), {"clip_denoised": False}
    yield (1, 2, 2, 2, 2), lambda x: x.transpose(2, 4), {"clip_denoised": False}
    yield (2, 3, 2), lambda x: x.bfloat16(), etas
    yield (2, 3, 2), lambda x: x.half(), {"clip_denoised": False}
    yield (2, 3, 2), same, {"denoised_fn": denoised_fn} | etas
    if "cond_fn" in inspect.signature(getattr(diffusion, method)).parameters:
        yield (2, 3, 2), same, {"cond_fn": Net(), "model_kwargs": {"y": y}} | etas
        yield (2, 3, 2), same, {"cond_fn": Net(), "model_kwargs": {}, "denoised_fn": denoised_fn}
        yield (2, 3), lambda x: x.double(), {"cond_fn": Net(), "model_kwargs": {}} | etas
        yield (2, 3), lambda x: x.double().transpose(1, 2), {"cond_fn": Net(), "model_kwargs": {}}
        yield (2, 3, 2), lambda x: x.half(), {"cond_fn": Net(), "model_kwargs": {}, "clip_denoised": False} | etas


@pytest.mark.parametrize("types", TYPES, ids=lambda types: f"{types[0].name}-{types[1].name}")
@pytest.mark.parametrize("codebase", ["improved", "guided"])
def test_steps_have_the_bits_of_the_codebase(codebase: str, types: Any) -> None:
    base, module = {"improved": (host.SpacedImproved, improved), "guided": (host.SpacedGuided, guided)}[codebase]
    original = theirs(base, *types, rescale_timesteps=codebase == "guided")
    for diffusion in (fastdiff.enable(copy.copy(original)), own(*types, module=module, rescale_timesteps=True)):
        diffusion.rescale_timesteps = original.rescale_timesteps
        for method in STEPS:
            for shape, change, given in cases(method, original):
                x, t = batch(original, *shape)
                expected_net, net = net_for(original), net_for(original)
                expected = run(original, method, expected_net, change(x), t, **given)
                found = run(diffusion, method, net, change(x), t, **given)
                assert_equal(found[0], expected[0])
                assert found[1] == expected[1], "the generator has moved as far"
                assert found[0]["sample"].stride() == expected[0]["sample"].stride()
                assert [call[:2] for call in net.calls] == [call[:2] for call in expected_net.calls]
        assert diffusion._fastdiff.kept == {} and diffusion._fastdiff.fused > 20


@pytest.mark.parametrize(
    ("sampler", "guide"), [("ddpm", False), ("ddpm", True), ("ddim", False), ("ddim", True), ("reverse", False)]
)
def test_steps_are_right(sampler: str, guide: bool) -> None:
    method = {"ddpm": "p_sample", "ddim": "ddim_sample", "reverse": "ddim_reverse_sample"}[sampler]
    for (mean, var), clip in itertools.product(TYPES, [False, True]):
        diffusion, original = own(mean, var), theirs(host.SpacedGuided, mean, var)
        x, t = batch(diffusion)
        noise, gradient = torch.randn_like(x), 0.3 * torch.randn_like(x)
        output = net_for(diffusion)(x, t)
        given: dict[str, Any] = {"clip_denoised": clip}
        given |= {"eta": 0.7} if sampler == "ddim" else {}
        given |= {"cond_fn": lambda x, t, gradient=gradient: gradient, "model_kwargs": {}} if guide else {}
        with mock.patch("torch.randn_like", lambda x, noise=noise: noise):
            found = getattr(diffusion, method)(lambda x, t, output=output: output, x, t, **given)
            peer = getattr(original, method)(lambda x, t, output=output: output, x, t, **given)
        exact = host.exact(
            diffusion.betas, mean.name, var.name, x, t.tolist(), output, noise, sampler=sampler, clip=clip,
            eta=given.get("eta", 0.0), gradient=gradient if guide else None,
        )  # fmt: skip
        for name, right in zip(("sample", "pred_xstart"), exact, strict=True):
            error = np.abs(found[name].double().numpy() - right).max()
            their_error = np.abs(peer[name].double().numpy() - right).max()
            assert error <= 2 * their_error + 4 * 2**-23 * max(1, np.abs(right).max()), (mean, var, name)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_chains_give_the_same_images(loop: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    net = torch.nn.Conv2d(3, 3, 3, padding=1).to(dtype)
    layout = torch.channels_last if dtype == torch.float16 else torch.contiguous_format
    net = net.to(memory_format=layout)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return net(x.to(dtype)) * torch.cos(t / 100).reshape(-1, 1, 1, 1).to(dtype)

    for mean in host.Mean:
        torch.manual_seed(2)
        expected = getattr(theirs(host.SpacedGuided, mean), loop)(model, (2, 3, 6, 4), device="cpu")
        for diffusion in (enabled(host.SpacedGuided, mean), own(mean)):
            torch.manual_seed(2)
            found = getattr(diffusion, loop)(model, (2, 3, 6, 4), device="cpu")
            assert torch.equal(found, expected) and found.dtype == torch.float32
            assert diffusion._fastdiff.fused == len(KEPT)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_whole_chains_of_doubles_in_any_layout(loop: str) -> None:
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    for mean, given in itertools.product(host.Mean, ({}, {"eta": 0.5})[: 1 + loop.startswith("ddim")]):
        torch.manual_seed(2)
        expected = getattr(theirs(host.SpacedGuided, mean), loop)(
            Net(), noise.shape, noise=noise, device="cpu", **given
        )
        for diffusion in (enabled(host.SpacedGuided, mean), own(mean)):
            torch.manual_seed(2)
            found = getattr(diffusion, loop)(Net(), noise.shape, noise=noise, device="cpu", **given)
            assert torch.equal(found, expected) and found.stride() == expected.stride()
            assert diffusion._fastdiff.fused == len(KEPT)


def test_progressive_loops_yield_the_steps() -> None:
    diffusion, x = own(), torch.randn(2, 3, 4)
    for name in ("p_sample_loop", "ddim_sample_loop"):
        torch.manual_seed(4)
        steps = list(getattr(diffusion, name + "_progressive")(Net(), x.shape, noise=x))
        torch.manual_seed(4)
        assert len(steps) == len(KEPT) and all(step.keys() == {"sample", "pred_xstart"} for step in steps)
        assert torch.equal(getattr(diffusion, name)(Net(), x.shape, noise=x), steps[-1]["sample"])
        assert torch.equal(steps[-1]["sample"], steps[-1]["pred_xstart"]), "the clean end is the predicted x0"
    with mock.patch("fastdiff.integrations.openai._diffusion._progress_bar", side_effect=lambda rows: rows) as bar:
        diffusion.p_sample_loop(Net(), [2, 3, 4], progress=True)
    assert bar.call_count == 1


def test_chains_are_on_the_device_of_the_model() -> None:
    elsewhere = torch.nn.Linear(1, 1, device="meta")
    for model, noise, given, expected in (
        (elsewhere, None, None, "meta"),
        (elsewhere, None, "cpu", "cpu"),
        (Net(), None, None, "cpu"),
        (torch.nn.Identity(), torch.zeros(1, 2, device="meta"), None, "meta"),
    ):
        with mock.patch("torch.full", side_effect=InterruptedError) as full, pytest.raises(InterruptedError):
            own().p_sample_loop(model, (1, 2), noise=noise, device=given)
        assert torch.device(full.call_args.kwargs["device"]).type == expected


@pytest.mark.parametrize("loss", host.Loss)
def test_losses_and_bounds_are_those_of_the_codebase(loss: Any) -> None:
    for mean, var in TYPES:
        original = theirs(host.SpacedGuided, mean, var, loss_type=loss)
        x, t = batch(original)
        x, z = x.clamp(-1, 1), torch.randn(x.shape)
        expected = original.training_losses(net_for(original), x, t, {"y": t}, noise=z)
        for diffusion in (enabled(host.SpacedGuided, mean, var, loss_type=loss), own(mean, var, loss_type=loss)):
            assert_equal(diffusion.training_losses(net_for(original), x, t, {"y": t}, noise=z), expected)
            torch.manual_seed(5)
            drawn = diffusion.training_losses(net_for(original), x, t)
            torch.manual_seed(5)
            assert_equal(drawn, original.training_losses(net_for(original), x, t))
    torch.manual_seed(6)
    expected = original.calc_bpd_loop(net_for(original), x)
    torch.manual_seed(6)
    found = own(mean, var).calc_bpd_loop(net_for(original), x)
    assert_equal(found, expected)
    assert found["vb"].shape == (4, len(KEPT)) and bool((found["total_bpd"] > 0).all())


def test_distributions_are_those_of_the_codebase() -> None:
    for mean, var in TYPES:
        original, diffusion = theirs(host.SpacedGuided, mean, var), own(mean, var)
        x, t = batch(original)
        z = torch.randn(x.shape)
        expected, found = (d.p_mean_variance(net_for(d), x, t) for d in (original, diffusion))
        assert_equal(found, expected)
        for name in ("condition_mean", "condition_score"):
            results = [getattr(d, name)(Net(), expected, x, t, model_kwargs={"y": t}) for d in (original, diffusion)]
            if name == "condition_mean":
                results = [{"mean": mean} for mean in results]
            assert_equal(results[1], results[0])
        for name, args in (("q_mean_variance", (x, t)), ("q_posterior_mean_variance", (x, z, t))):
            for one, other in zip(getattr(diffusion, name)(*args), getattr(original, name)(*args), strict=True):
                assert torch.equal(one, other) and one.shape == x.shape
        last, first = x.double().to(memory_format=torch.channels_last), z.double()
        for args in ((last, first, t), (first, last, t)):
            one, other = (d.q_posterior_mean_variance(*args)[0] for d in (diffusion, original))
            assert torch.equal(one, other) and one.stride() == other.stride()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for d in (diffusion, enabled()):
            found, expected = (u.q_sample(x.to(dtype), t, z.to(dtype)) for u in (d, original))
            assert torch.equal(found, expected) and found.dtype == expected.dtype
            last = x.to(dtype, memory_format=torch.channels_last)
            assert d.q_sample(last, t, z.to(dtype)).stride() == original.q_sample(last, t, z.to(dtype)).stride()
            torch.manual_seed(0)
            found = d.q_sample(x.to(dtype), t)
            torch.manual_seed(0)
            assert torch.equal(found, original.q_sample(x.to(dtype), t))


def test_gradients_flow_as_in_the_codebase() -> None:
    for mean, var in TYPES:
        original = theirs(host.SpacedGuided, mean, var)
        for diffusion, method in itertools.product((enabled(host.SpacedGuided, mean, var), own(mean, var)), STEPS):
            gradients = []
            for d in (original, diffusion):
                x, t = batch(d)
                x.requires_grad_()
                weight = torch.tensor(0.9, requires_grad=True)
                net = net_for(d)
                out, _ = run(d, method, lambda x, t, net=net, w=weight: w * net(x, t), x, t)
                loss = (out["sample"] * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum()
                gradients.append(torch.autograd.grad(loss + out["pred_xstart"].sum(), [x, weight]))
            for found, expected in zip(gradients[1], gradients[0], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


SIGNATURES = {
    "p_sample": "model, x, t, clip_denoised=True, denoised_fn=None, {cond}model_kwargs=None",
    "ddim_sample": "model, x, t, clip_denoised=True, denoised_fn=None, {cond}model_kwargs=None, eta=0.0",
    "ddim_reverse_sample": "model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0",
    "p_sample_loop": "model, shape, noise=None, clip_denoised=True, denoised_fn=None, {cond}model_kwargs=None, "
    "device=None, progress=False",
    "ddim_sample_loop": "model, shape, noise=None, clip_denoised=True, denoised_fn=None, {cond}model_kwargs=None, "
    "device=None, progress=False, eta=0.0",
    "p_mean_variance": "model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None",
    "q_mean_variance": "x_start, t",
    "q_sample": "x_start, t, noise=None",
    "q_posterior_mean_variance": "x_start, x_t, t",
    "training_losses": "model, x_start, t, model_kwargs=None, noise=None",
    "calc_bpd_loop": "model, x_start, clip_denoised=True, model_kwargs=None",
    "condition_mean": "cond_fn, p_mean_var, x, t, model_kwargs=None",
    "condition_score": "cond_fn, p_mean_var, x, t, model_kwargs=None",
    "__init__": "*, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False",
}


def form(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("module", [improved, guided, openai])
def test_signatures_are_those_of_the_codebase(module: Any) -> None:
    cond = "" if module is improved else "cond_fn=None, "
    for name, expected in SIGNATURES.items():
        expected = f"(self, {expected.format(cond=cond)})"
        assert form(getattr(module.GaussianDiffusion, name)) == expected
        if name.endswith("_loop") and name != "calc_bpd_loop":
            assert form(getattr(module.GaussianDiffusion, name + "_progressive")) == expected
    assert form(module.SpacedDiffusion.__init__) == "(self, use_timesteps, **kwargs)"
    assert form(module.space_timesteps) == "(num_timesteps, section_counts)"
    assert form(module.get_named_beta_schedule) == "(schedule_name, num_diffusion_timesteps)"
    assert form(module.betas_for_alpha_bar) == "(num_diffusion_timesteps, alpha_bar, max_beta=0.999)"


def test_the_signatures_of_an_object_stay() -> None:
    for cls in (host.Improved, host.SpacedGuided, host.Dense):
        before, after = theirs(cls), enabled(cls)
        for name in ("p_sample", "ddim_sample", "ddim_reverse_sample", "q_sample", "p_sample_loop"):
            assert inspect.signature(getattr(before, name)) == inspect.signature(getattr(after, name))
        x, t = batch(after)
        third = (None, {}) if cls is host.Improved else (None, None, {})
        assert_equal(run(after, "p_sample", Net(), x, t, True, *third)[0], run(before, "p_sample", Net(), x, t)[0])


def test_names_of_the_codebases() -> None:
    assert openai.space_timesteps(300, [10, 15, 20]) == openai.space_timesteps(300, "10,15,20")
    assert openai.space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert sorted(openai.space_timesteps(1000, "50"))[:5] == [0, 20, 41, 61, 82] and openai.space_timesteps(9, "1") == {
        0
    }
    assert np.array_equal(openai.get_named_beta_schedule("linear", 100), np.linspace(1e-3, 0.2, 100))
    cosine = openai.get_named_beta_schedule("cosine", 10)
    assert cosine.dtype == np.float64 and cosine[-1] == 0.999
    assert np.array_equal(
        cosine, openai.betas_for_alpha_bar(10, lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2)
    )
    assert [member.name for member in openai.ModelMeanType] == ["PREVIOUS_X", "START_X", "EPSILON"]
    names = ["LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"]
    assert [member.name for member in openai.ModelVarType] == names
    assert [member.name for member in openai.LossType if member.is_vb()] == ["KL", "RESCALED_KL"]
    original, diffusion = theirs(), own()
    for name, value in vars(original).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(getattr(diffusion, name), value), name
    assert diffusion.timestep_map == list(KEPT) and diffusion.original_num_steps == 200
    assert diffusion.use_timesteps == set(KEPT) and diffusion.num_timesteps == len(KEPT)


def test_enabling_is_undone_by_disabling() -> None:
    original, diffusion = theirs(), theirs()
    attributes = set(vars(diffusion))
    state = torch.get_rng_state()
    assert fastdiff.enable(diffusion) is diffusion and isinstance(diffusion, host.SpacedGuided)
    assert torch.equal(torch.get_rng_state(), state), "trying the object moves no generator"
    assert set(vars(diffusion)) - attributes == {"_fastdiff_state"}
    assert type(theirs()).p_sample is host.Guided.p_sample, "no class is changed"
    fastdiff.enable(diffusion, noise="philox", seeds=1)
    fastdiff.enable(diffusion)
    x, t = batch(diffusion)
    assert_equal(run(diffusion, "p_sample", Net(), x, t)[0], run(original, "p_sample", Net(), x, t)[0])
    assert "1 steps fused" in str(fastdiff.summary(diffusion))
    assert fastdiff.disable(diffusion) is diffusion
    assert type(diffusion) is host.SpacedGuided and set(vars(diffusion)) == attributes


def test_copies_and_pickles() -> None:
    diffusion = enabled()
    x, t = batch(diffusion)
    expected = run(diffusion, "p_sample", Net(), x, t)[0]
    twin = copy.deepcopy(diffusion)
    assert_equal(run(twin, "p_sample", Net(), x, t)[0], expected)
    assert twin._fastdiff.fused == 1 and twin._fastdiff is not diffusion._fastdiff
    loaded = pickle.loads(pickle.dumps(diffusion))
    assert type(loaded) is host.SpacedGuided and b"fastdiff" not in pickle.dumps(diffusion)
    mine = own()
    for twin in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine), copy.copy(mine)):
        assert type(twin) is openai.SpacedDiffusion and twin.timestep_map == mine.timestep_map
        assert_equal(run(twin, "p_sample", Net(), x, t)[0], expected)


def test_options_of_our_own_classes() -> None:
    diffusion = fastdiff.enable(own(), noise="philox", seeds=3)
    x, t = batch(diffusion)
    first, second = (diffusion.p_sample(Net(), x, t)["sample"] for _ in range(2))
    assert torch.equal(first, second) and type(diffusion) is openai.SpacedDiffusion
    fastdiff.disable(diffusion)
    assert type(diffusion) is openai.SpacedDiffusion
    assert_equal(run(diffusion, "p_sample", Net(), x, t)[0], run(theirs(), "p_sample", Net(), x, t)[0])


# Forks


class Scaled(host.SpacedGuided):
    """Its x0 is another one."""

    def _predict_xstart_from_eps(self, x_t: Any, t: Any, eps: Any) -> Any:
        return 1.001 * super()._predict_xstart_from_eps(x_t, t, eps)


class LateInChain(host.SpacedGuided):
    """Differs at one end of the chain alone."""

    def p_mean_variance(self, model: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, t, *args, **kwargs)
        return out | {"mean": out["mean"] + 0.1 * (t == len(self.betas) - 1).reshape(-1, 1, 1, 1)}


class Flagged(host.SpacedGuided):
    """Computes the same, as long as an attribute of its own says so."""

    sharpen = False

    def p_mean_variance(self, model: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, t, *args, **kwargs)
        return out | {"mean": 2 * out["mean"]} if self.sharpen else out


class FlaggedAndDecorated(host.SpacedGuided):
    """Does so in a function that is wrapped."""

    sharp = False

    @torch.no_grad()
    def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(*args, **kwargs)
        return out | {"mean": 2 * out["mean"]} if self.sharp else out


class FlaggedInParts(host.SpacedGuided):
    """Does so in a function outside."""

    sharp = False

    def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
        return sharpened(self, super().p_mean_variance(*args, **kwargs))


def sharpened(diffusion: Any, out: Any) -> Any:
    return out | {"mean": 2 * out["mean"]} if diffusion.sharp else out


class FlaggedByName(host.SpacedGuided):
    """Asks for an attribute that may be missing."""

    def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(*args, **kwargs)
        return out | {"mean": 2 * out["mean"]} if getattr(self, "sharp", False) else out


class OfLoss(host.SpacedGuided):
    """Reads an attribute that every diffusion has, and no fused step looks at."""

    def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(*args, **kwargs)
        return out | {"mean": 2 * out["mean"]} if self.loss_type is host.Loss.KL else out


FACTOR = [1.0]


class OfModule(host.SpacedGuided):
    """Reads a variable of its module."""

    def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(*args, **kwargs)
        return out | {"mean": FACTOR[0] * out["mean"]}


class OfChannels(host.SpacedGuided):
    """Has another step for the last of an odd number of channels."""

    def p_mean_variance(self, model: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, *args, **kwargs)
        even = x.shape[1] // 2 * 2
        return out | {"mean": torch.cat([out["mean"][:, :even], 2 * out["mean"][:, even:]], dim=1)}


class OfSize(host.SpacedGuided):
    """Has another step for large images."""

    def p_mean_variance(self, model: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, *args, **kwargs)
        return out | {"mean": 2 * out["mean"]} if x.shape[-1] >= 64 else out


class OfModules(host.SpacedGuided):
    """Has another step for a module."""

    def p_mean_variance(self, model: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, *args, **kwargs)
        return out | {"mean": 2 * out["mean"]} if isinstance(model, torch.nn.Module) else out


class OfFirstTimestep(host.SpacedGuided):
    """Decides for the batch by its first sample."""

    def p_mean_variance(self, model: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, t, *args, **kwargs)
        return out | {"mean": 2 * out["mean"]} if t[0] > t[-1] else out


class OfRank(host.SpacedGuided):
    """Has another step for sequences."""

    def p_mean_variance(self, model: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, t, *args, **kwargs)
        return out | {"mean": out["mean"] + 0.1 * (x.shape[2:] == x.shape[-1:])}


class Unseen(host.SpacedGuided):
    """Code that cannot be seen."""

    p_mean_variance = functools.partialmethod(host.SpacedGuided.p_mean_variance)


class Keyed(host.SpacedGuided):
    """Computes the same, without one key among those for the model."""

    def p_mean_variance(self, model: Any, x: Any, t: Any, *args: Any, model_kwargs: Any = None, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, t, *args, **kwargs)
        if model_kwargs and "inpainting_mask" in model_kwargs:
            out["mean"] = out["mean"] * model_kwargs["inpainting_mask"]
        return out


class OtherTimes(host.SpacedGuided):
    """Tells the model other times."""

    def _wrap_model(self, model: Any) -> Any:
        return Later(*vars(super()._wrap_model(model)).values())


class Later(host.Wrapped):
    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        return super().__call__(x, (ts + 1).clamp(max=len(self.timestep_map) - 1), **kwargs)


class OtherDraws(host.SpacedGuided):
    """Draws its noise at once for all samples."""

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):  # type: ignore[no-untyped-def]
        torch.randn_like(x)
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)


class Raising(host.SpacedGuided):
    """Cannot do without arguments for the model."""

    def p_mean_variance(self, model: Any, x: Any, t: Any, clip: Any, denoised_fn: Any, model_kwargs: Any) -> Any:
        return super().p_mean_variance(model, x, t, clip, denoised_fn, dict(model_kwargs))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Scaled, "computes something else: sample differs"),
        (LateInChain, "computes something else: sample differs"),
        (Flagged, "depends on 'sharpen'"),
        (FlaggedAndDecorated, "depends on 'sharp'"),
        (FlaggedInParts, "depends on 'sharp'"),
        (FlaggedByName, "depends on 'sharp'"),
        (OfLoss, "depends on 'loss_type'"),
        (OfModule, "depends on the variable 'FACTOR'"),
        (OfChannels, "computes something else: sample"),
        (OfSize, "depends on the number 64"),
        (OfModules, "computes something else: sample differs"),
        (OfFirstTimestep, "computes something else: sample differs"),
        (OfRank, "computes something else: sample differs"),
        (Unseen, "depends on a partialmethod, whose code cannot be seen"),
        (Keyed, "depends on 'inpainting_mask'"),
        (OtherTimes, "another call of the model"),
        (OtherDraws, "other draws"),
        (Raising, "could not be tried"),
    ],
)
def test_a_fork_that_computes_something_else_keeps_its_steps(cls: Any, reason: str) -> None:
    original, diffusion = theirs(cls), enabled(cls)
    x, t = batch(diffusion)
    given = {"model_kwargs": {"y": t}} if cls is Raising else {}
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        for _ in range(2):
            found = run(diffusion, "p_sample", Net(), x, t, **given)
    assert len(caught) == 1
    expected = run(original, "p_sample", Net(), x, t, **given)
    assert_equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert diffusion._fastdiff.fused == 0 and list(diffusion._fastdiff.kept.values()) == [2]
    if cls is OtherDraws:
        run(diffusion, "ddim_sample", Net(), x, t)
        assert diffusion._fastdiff.fused == 1, "what is the same is fused"


class OfImages(host.SpacedGuided):
    """Works with images alone."""

    def p_mean_variance(self, model: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, x, t, *args, **kwargs)
        return out | {"mean": out["mean"] + 0 * t.reshape(-1, 1, 1, 1)}


def test_a_fork_for_images_is_fused() -> None:
    diffusion = enabled(OfImages)
    x, t = batch(diffusion)
    assert_equal(run(diffusion, "p_sample", Net(), x, t)[0], run(theirs(OfImages), "p_sample", Net(), x, t)[0])
    assert diffusion._fastdiff.fused == 1


class Patched(host.SpacedGuided):
    def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
        return super().p_mean_variance(*args, **kwargs)


class OwnPatched(openai.SpacedDiffusion):
    pass


@pytest.mark.parametrize("make", [lambda: enabled(Patched), lambda: OwnPatched(use_timesteps=KEPT, **options())])
def test_a_class_may_be_patched_later(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = make()
    x, t = batch(diffusion)
    before = run(diffusion, "p_sample", Net(), x, t)[0]
    assert diffusion._fastdiff.fused == 1
    cls = OwnPatched if isinstance(diffusion, OwnPatched) else Patched
    original = cls.p_mean_variance
    monkeypatch.setattr(cls, "p_mean_variance", lambda *args: {k: v + 1 for k, v in original(*args).items()})
    with pytest.warns(RuntimeWarning, match="p_mean_variance of|p_sample of"):
        found = run(diffusion, "p_sample", Net(), x, t)[0]
    assert torch.equal(found["pred_xstart"], before["pred_xstart"] + 1) and diffusion._fastdiff.fused == 1
    monkeypatch.undo()
    assert_equal(run(diffusion, "p_sample", Net(), x, t)[0], before)
    assert diffusion._fastdiff.fused == 2


def test_a_class_derived_from_that_of_an_enabled_object_has_its_say() -> None:
    base: Any = type(enabled())

    class Derived(base):
        def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
            out = super().p_mean_variance(*args, **kwargs)
            return out | {"mean": 2 * out["mean"]}

    diffusion = theirs(Derived)
    x, t = batch(diffusion)
    with pytest.warns(RuntimeWarning, match="p_mean_variance of Derived is not that of SpacedGuided"):
        found = run(diffusion, "p_sample", Net(), x, t)[0]
    mean = theirs().p_mean_variance(Net(), x, t)["mean"]
    torch.testing.assert_close(found["sample"], run(theirs(), "p_sample", Net(), x, t)[0]["sample"] + mean)


def test_a_copy_is_not_tried_again() -> None:
    for diffusion in (enabled(), enabled(Flagged)):
        warnings.simplefilter("ignore")
        x, t = batch(diffusion)
        for other in (copy.copy(diffusion), copy.deepcopy(diffusion)):
            with mock.patch("fastdiff.integrations.openai._steps.probe", side_effect=AssertionError):
                run(other, "p_sample", Net(), x, t)
            assert other._fastdiff.fused == (0 if isinstance(diffusion, Flagged) else 1)


class Longer(host.SpacedGuided):
    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, const=False):  # type: ignore[no-untyped-def]
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)


def test_a_method_of_another_signature_stays() -> None:
    with pytest.warns(RuntimeWarning, match="p_sample of a signature that is not OpenAI's"):
        diffusion = enabled(Longer)
    assert type(diffusion).p_sample is Longer.p_sample
    x, t = batch(diffusion)
    run(diffusion, "p_sample", Net(), x, t, const=True)
    run(diffusion, "ddim_sample", Net(), x, t)
    assert diffusion._fastdiff.fused == 1


@pytest.mark.parametrize("mean", [host.Mean.START_X, host.Mean.EPSILON])
def test_forks_with_full_coefficients_and_tuples(mean: Any) -> None:
    original, diffusion = theirs(host.Dense, mean), enabled(host.Dense, mean)
    for method, layout in itertools.product(STEPS, [torch.contiguous_format, torch.channels_last]):
        x, t = batch(diffusion)
        x = x.to(memory_format=layout)
        expected = run(original, method, Net(tuples=True), x, t)[0]
        found = run(diffusion, method, Net(tuples=True), x, t)[0]
        assert_equal(found, expected)
        assert found["sample"].stride() == expected["sample"].stride()
    assert diffusion._fastdiff.kept == {}


def later(diffusion: Any) -> None:
    vars(diffusion).update(vars(theirs(betas=host.linear_betas(300))))


def in_place(diffusion: Any) -> None:
    diffusion.posterior_log_variance_clipped[:] += 1
    diffusion.betas[1:] *= 0.5


def replaced(diffusion: Any) -> None:
    diffusion.posterior_mean_coef1 = diffusion.posterior_mean_coef1 * 2


def on_the_object(diffusion: Any) -> None:
    mean_variance = diffusion.p_mean_variance

    def p_mean_variance(*args: Any, **kwargs: Any) -> Any:
        out = mean_variance(*args, **kwargs)
        return out | {"mean": 0.5 * out["mean"], "pred_xstart": 0.5 * out["pred_xstart"]}

    diffusion.p_mean_variance = p_mean_variance


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (later, None),
        (lambda d: setattr(d, "model_mean_type", host.Mean.START_X), None),
        (lambda d: setattr(d, "model_var_type", host.Var.LEARNED_RANGE), None),
        (lambda d: setattr(d, "rescale_timesteps", True), None),
        (lambda d: d.timestep_map.__setitem__(7, 95), None),
        (in_place, "is not that of its betas"),
        (replaced, "posterior_mean_coef1 is not that of its betas"),
        (on_the_object, "p_mean_variance of the object was replaced"),
        (lambda d: setattr(d, "betas", d.betas * 3), "betas: expected values in"),
        (lambda d: setattr(d, "model_mean_type", Unknown.V), "model_mean_type 'V'"),
        (lambda d: setattr(d, "model_var_type", Unknown.V), "model_var_type 'V'"),
    ],
)
def test_what_is_changed_later_counts(change: Callable[[Any], None], kept: str | None) -> None:
    original, diffusion = theirs(), enabled()
    x, t = batch(original)
    run(diffusion, "p_sample", Net(), x, t)
    for d in (original, diffusion):
        change(d)
    for method in STEPS:
        net = net_for(original)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            found = run(diffusion, method, net, x, t)[0]
        assert_equal(found, run(original, method, net, x, t)[0])
        fused = [str(w.message) for w in caught if "original step is kept" in str(w.message)]
        if method == "p_sample":
            assert len(fused) == (kept is not None)
            assert kept is None or re.search(kept, fused[0])


class Unknown(enum.Enum):
    V = 1


# Noise of the contract


def test_philox_noise_is_that_of_a_sample_and_its_timestep() -> None:
    seeds = torch.tensor([11, 12, 13, 14])
    for mean, var in TYPES:
        diffusion = enabled(host.SpacedGuided, mean, var, with_options={"noise": "philox", "seeds": seeds})
        x, t = batch(diffusion)
        state = torch.get_rng_state()
        for method, given in (("p_sample", {}), ("ddim_sample", {"eta": 0.6}), ("p_sample", {"cond_fn": Net()})):
            out = getattr(diffusion, method)(net_for(diffusion), x, t, **given)["sample"]
            each = [
                fastdiff.normal(x[:1].shape, seeds[b : b + 1], t=KEPT[int(t[b])], domain="step")[0] for b in range(4)
            ]
            noise = torch.stack(each)
            with mock.patch("torch.randn_like", lambda x, noise=noise: noise):
                expected = getattr(theirs(host.SpacedGuided, mean, var), method)(
                    net_for(diffusion), x, t, **given, model_kwargs={}
                )
            torch.testing.assert_close(out, expected["sample"], rtol=1e-5, atol=1e-5)
            diffusion._fastdiff.options = Options("philox", seeds[2:3])
            alone = getattr(diffusion, method)(net_for(diffusion), x[2:3], t[2:3], **given)["sample"]
            assert torch.equal(alone, out[2:3])
            diffusion._fastdiff.options = Options("philox", seeds)
        assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"


def test_philox_noise_without_seeds_is_new_at_every_step() -> None:
    diffusion = enabled(with_options={"noise": "philox"})
    x, t = batch(diffusion)
    first, again, same = (run(diffusion, "p_sample", Net(), x, t, seed=seed)[0]["sample"] for seed in (1, 2, 1))
    assert torch.equal(first, same) and not torch.equal(first[1:], again[1:]) and torch.equal(first[0], again[0])
    z = (first - again)[1:]
    assert bool(z.isfinite().all())
    torch.manual_seed(0)
    images = diffusion.p_sample_loop(Net(), (2, 3, 4), device="cpu")
    assert bool(images.isfinite().all()) and not torch.equal(images[0], images[1])


def test_training_keeps_torchs_noise() -> None:
    diffusion, original = enabled(with_options={"noise": "philox", "seeds": 1}), theirs()
    x, t = batch(diffusion)
    assert_equal(*({"x_t": run(d, "q_sample", x, t)[0]} for d in (diffusion, original)))


# Where the codebases break


def test_a_chain_of_one_step() -> None:
    for (mean, var), module in itertools.product(TYPES, (improved, guided)):
        for kept in ([0], [199], [70]):
            diffusion = module.SpacedDiffusion(use_timesteps=kept, **options(mean, var))
            x, t = torch.randn(3, 2, 4), torch.zeros(3, dtype=torch.int64)
            net = net_for(diffusion)
            for loop in ("p_sample_loop", "ddim_sample_loop"):
                torch.manual_seed(0)
                found = getattr(diffusion, loop)(net, x.shape, noise=x)
                assert net.calls[-1][1] == kept * 3
                after = torch.randn(1)
                torch.manual_seed(0)
                torch.randn_like(x)
                assert torch.equal(after, torch.randn(1)), "the noise is drawn all the same"
                output = net(x, torch.tensor(kept * 3))[:, :2]
                ab = diffusion.alphas_cumprod[0]
                x0 = output if mean.name == "START_X" else (x - (1 - ab) ** 0.5 * output) / ab**0.5
                expected = output if mean.name == "PREVIOUS_X" else x0
                torch.testing.assert_close(found, expected.clamp(-1, 1) if expected is x0 else expected)
            for gives in (diffusion.p_mean_variance(net, x, t), diffusion.training_losses(net, x.clamp(-1, 1), t)):
                assert all(bool(value.isfinite().all()) for value in gives.values())
            expected = diffusion.p_sample(net, x, t)["sample"]
            fastdiff.enable(diffusion, noise="philox", seeds=1)
            assert torch.equal(diffusion.p_sample(net, x, t)["sample"], expected), "its only step adds no noise"


class OneStep(host.SpacedGuided):
    """As DiT's, can be made of one step, which no step survives."""

    def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
        super().__init__(range(0, 200, 100), **kwargs)
        one = openai.SpacedDiffusion(use_timesteps=use_timesteps, **kwargs)
        names = {name for name, value in vars(one).items() if isinstance(value, np.ndarray)} | {"num_timesteps"}
        vars(self).update({name: getattr(one, name) for name in names})
        self.timestep_map, self.posterior_log_variance_clipped = list(use_timesteps), np.array([])


def test_an_object_of_one_step_works() -> None:
    make = options(host.Mean.EPSILON, host.Var.LEARNED_RANGE, use_timesteps=[50])
    x, t = torch.randn(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(IndexError):
        OneStep(**make).p_sample(Net(True), x, t)
    diffusion = fastdiff.enable(OneStep(**make))
    expected = openai.SpacedDiffusion(**make).p_sample(Net(True), x, t)
    assert_equal(diffusion.p_sample(Net(True), x, t), expected)


def test_arguments_for_the_model_may_be_missing_with_cond_fn() -> None:
    for diffusion in (own(), enabled()):
        x, t = batch(diffusion)
        for method in ("p_sample", "ddim_sample"):
            expected = run(theirs(), method, Net(), x, t, cond_fn=Net(), model_kwargs={})[0]
            assert_equal(run(diffusion, method, Net(), x, t, cond_fn=Net())[0], expected)


def test_rounding_does_not_make_a_chain_nan() -> None:
    schedule = NoiseSchedule.cosine(1000)
    found = {}
    for steps in range(2, 40):
        kept = set(fastdiff.schedules.timesteps(schedule, steps, "linspace"))
        make = {**options(host.Mean.EPSILON, host.Var.FIXED_SMALL, betas=schedule.betas), "use_timesteps": kept}
        original = host.SpacedGuided(**make)
        for i in range(original.num_timesteps):
            x, t = torch.full((1, 1, 1, 1), 0.3), torch.tensor([i])
            theirs_sample = run(original, "ddim_sample", Net(), x, t, eta=1.0)[0]["sample"]
            if theirs_sample.isnan().any():
                found[steps, i] = make
    assert found, "a chain whose direction has a radicand below 0 in float32"
    for (_, i), make in found.items():
        for diffusion in (openai.SpacedDiffusion(**make), fastdiff.enable(host.SpacedGuided(**make))):
            x, t = torch.full((1, 1, 1, 1), 0.3), torch.tensor([i])
            noise = torch.ones_like(x)
            with mock.patch("torch.randn_like", lambda x, noise=noise: noise):
                sample = diffusion.ddim_sample(Net(), x, t, eta=1.0)["sample"]
            exact, _ = host.exact(
                diffusion.betas, "EPSILON", "FIXED_SMALL", x, [i], Net()(x, torch.tensor([diffusion.timestep_map[i]])),
                noise, sampler="ddim", clip=True, eta=1.0,
            )  # fmt: skip
            assert abs(sample.item() - exact.item()) < 5e-3


# Subclasses, odd operands


class Halved(openai.SpacedDiffusion):
    def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().p_mean_variance(model, *args, **kwargs)
        return out | {"mean": 0.5 * out["mean"]}


def test_a_subclass_of_ours_has_its_say() -> None:
    diffusion, plain = Halved(use_timesteps=KEPT, **options()), own()
    x, t = batch(diffusion)
    with pytest.warns(RuntimeWarning, match="p_mean_variance of Halved is not that of SpacedDiffusion"):
        found = run(diffusion, "p_sample", Net(), x, t)[0]
    expected = run(plain, "p_sample", Net(), x, t)[0]
    mean = plain.p_mean_variance(Net(), x, t)["mean"]
    torch.testing.assert_close(found["sample"], expected["sample"] - 0.5 * mean)
    assert pickle.loads(pickle.dumps(diffusion)).timestep_map == list(KEPT)


def test_a_wrapped_method_of_a_subclass_of_ours_has_its_say() -> None:
    class Wrapping(openai.SpacedDiffusion):
        @functools.wraps(openai.SpacedDiffusion.p_mean_variance)
        def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
            return {name: 2 * value for name, value in super().p_mean_variance(*args, **kwargs).items()}

    diffusion, plain = Wrapping(use_timesteps=KEPT, **options()), own()
    x, t = batch(diffusion)
    with pytest.warns(RuntimeWarning, match="p_mean_variance of Wrapping is not that of SpacedDiffusion"):
        found = run(diffusion, "p_sample", Net(), x, t)[0]
    assert torch.equal(found["pred_xstart"], 2 * run(plain, "p_sample", Net(), x, t)[0]["pred_xstart"])


def test_steps_that_are_written_out_are_the_fused_ones() -> None:
    for (mean, var), clip in itertools.product(TYPES, [True, False]):
        diffusion = own(mean, var)
        x, t = batch(diffusion)
        for method, given in (("p_sample", {}), ("ddim_sample", {"eta": 0.3}), ("ddim_reverse_sample", {})):
            torch.manual_seed(0)
            expected = getattr(Diffusion, method)(
                diffusion, diffusion._wrap_model(net_for(diffusion)), x, t, clip, **given
            )
            found = run(diffusion, method, net_for(diffusion), x, t, clip, seed=0, **given)[0]
            assert_equal(found, expected)


def test_a_double_model_beside_a_float_state_is_left_to_the_codebase() -> None:
    x, t = batch(theirs())
    for diffusion in (enabled(), own()):
        net = Net()
        with pytest.warns(RuntimeWarning, match=r"a model output of torch.float64 beside x of torch.float32"):
            found = run(diffusion, "p_sample", lambda x, t, net=net: net(x, t).double(), x, t)[0]
        assert len(net.calls) == 1, "the model is called once"
        assert_equal(found, run(theirs(), "p_sample", lambda x, t: Net()(x, t).double(), x, t)[0])


def test_a_double_x0_beside_a_float_state_is_left_to_the_codebase() -> None:
    x, t = batch(theirs())
    for make, method in itertools.product((enabled, own), STEPS):
        diffusion, given = make(), []

        def denoised_fn(x0: Tensor, given: list[Tensor] = given) -> Tensor:
            given.append(x0)
            return x0.double() * 0.7

        net = Net()
        with pytest.warns(RuntimeWarning, match=r"a denoised_fn that gives torch.float64 beside x of torch.float32"):
            found = run(diffusion, method, net, x, t, denoised_fn=denoised_fn)[0]
        assert len(net.calls) == len(given) == 1, "each is called once"
        assert_equal(found, run(theirs(), method, Net(), x, t, denoised_fn=denoised_fn)[0])


def test_an_eta_above_1_is_left_to_the_codebase() -> None:
    x, t = batch(theirs())
    for diffusion in (enabled(), own()):
        with pytest.warns(RuntimeWarning, match="eta=1.01"):
            found = run(diffusion, "ddim_sample", Net(), x, t, eta=1.01)[0]
        expected = run(theirs(), "ddim_sample", Net(), x, t, eta=1.01)[0]
        kept = expected["sample"].isfinite()
        assert torch.equal(found["sample"][kept], expected["sample"][kept])


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(count: int) -> None:
    x, t = torch.randn(count, 2, 3), torch.zeros(count, dtype=torch.int64)
    for diffusion, method in itertools.product((own(), enabled()), STEPS):
        assert_equal(run(diffusion, method, Net(), x, t)[0], run(theirs(), method, Net(), x, t)[0])


class NoReads(TorchDispatchMode):
    """Fails where a number of a tensor is read by the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("noise", [{"noise": "torch"}, {"noise": "philox", "seeds": 5}])
def test_the_host_reads_no_tensor(noise: Any) -> None:
    for mean, var in TYPES[::5]:
        diffusion = enabled(host.SpacedGuided, mean, var, with_options=noise)
        x, t = batch(diffusion)
        nets = [lambda x, t, n=diffusion.model_var_type.name: torch.cat([x, x], 1) if n[0] == "L" else x]
        for method, given in (("p_sample", {}), ("ddim_sample", {"eta": 0.5}), ("ddim_reverse_sample", {})):
            for cond in ({}, {"cond_fn": lambda x, t: x} if "reverse" not in method else {}):
                getattr(diffusion, method)(nets[0], x, t, **given, **cond)  # which makes its tables
                with NoReads():
                    getattr(diffusion, method)(nets[0], x, t, **given, **cond)


def test_steps_can_be_compiled_whole() -> None:
    x, t = batch(theirs())
    for diffusion in (enabled(), own()):
        compiled = torch.compile(
            lambda x, t, d=diffusion: d.p_sample(model_of_x, x, t), backend="eager", fullgraph=True
        )
        torch.manual_seed(3)
        found = compiled(x, t)
        expected = run(theirs(), "p_sample", model_of_x, x, t)[0]
        assert_equal(found, expected)


def model_of_x(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * torch.cos(t / 100).reshape(-1, 1, 1, 1)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"betas": [0.1, 1.2]}, ValueError, r"betas: expected values in \(0, 1\], got 1.2 at index 1"),
        ({"betas": [[0.1]]}, ValueError, "betas: expected a non-empty 1-D sequence"),
        ({"betas": ["a"]}, TypeError, "betas: expected real numbers"),
        ({"model_mean_type": Unknown.V}, ValueError, "model_mean_type: expected one of EPSILON, START_X.*got 'V'"),
        ({"model_var_type": "large"}, ValueError, "model_var_type: expected one of FIXED_SMALL.*got 'large'"),
        ({"loss_type": None}, ValueError, "loss_type: expected one of MSE.*got 'None'"),
        ({"betas": None}, TypeError, "betas: expected"),
        ({"use_timesteps": []}, ValueError, r"use_timesteps: expected some in \[0, 200\)"),
    ],
)
def test_constructors_name_what_they_refuse(change: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        openai.SpacedDiffusion(**{"use_timesteps": KEPT, **options(), **change})


def test_betas_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match="betas: expected a 1-D sequence of those of the longer diffusion, got none"):
        openai.SpacedDiffusion(KEPT)


def test_steps_name_what_they_refuse() -> None:
    x, t = batch(theirs())
    for diffusion in (own(), enabled()):
        for args, error, message in (
            ((Net(), [1.0], t), TypeError, "x: expected a tensor, got list"),
            ((Net(), x.int(), t), TypeError, "x: expected a floating dtype, got torch.int32"),
            ((Net(), x[0, 0, 0], t), ValueError, r"x: expected \[batch, channels, ...\], got shape \[2\]"),
            ((Net(), x, 3), TypeError, r"t: expected an integer tensor \[4\], got int"),
            ((Net(), x, t[:2]), ValueError, r"t: expected shape \[4\], a timestep for each sample, got \[2\]"),
            ((Net(True), x, t), ValueError, r"model: expected shape \[4, 2, 3, 2\] from it, got \[4, 4, 3, 2\]"),
            ((lambda x, t: None, x, t), TypeError, "model: expected a tensor from it, got NoneType"),
        ):
            state = torch.get_rng_state()
            with pytest.raises(error, match=message):
                diffusion.p_sample(*args)
            assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(TypeError, match=r"denoised_fn: expected torch.float32 \[4, 2, 3, 2\] from it.*got int"):
            diffusion.p_sample(Net(), x, t, denoised_fn=lambda x0: 1)
        with pytest.raises(TypeError, match="cond_fn: expected a tensor from it, got NoneType"):
            diffusion.p_sample(Net(), x, t, cond_fn=lambda x, t: None)
    learned = own(host.Mean.EPSILON, host.Var.LEARNED)
    with pytest.raises(ValueError, match=r"\[4, 4, 3, 2\] from it, half of the channels for the variance"):
        learned.p_sample(Net(), x, t)
    with pytest.raises(ValueError, match="eta: expected 0"):
        own().ddim_reverse_sample(Net(), x, t, eta=0.5)
    with pytest.raises(TypeError, match="shape: expected a tuple or a list, got int"):
        own().p_sample_loop(Net(), 3)
    with pytest.raises(ValueError, match="noise: expected x_start's shape"):
        own().training_losses(Net(), x, t, noise=x[:2])
    with pytest.raises(ValueError, match="schedule_name: expected 'linear' or 'cosine', got 'quad'"):
        openai.get_named_beta_schedule("quad", 10)


def test_enable_names_what_it_refuses() -> None:
    broken = theirs()
    broken.betas = torch.from_numpy(broken.betas)
    with pytest.raises(TypeError, match="obj.betas: expected a 1-D array of NumPy, got Tensor"):
        fastdiff.enable(broken)
    with pytest.raises(ValueError, match="obj.model_mean_type: expected one of EPSILON.*got 'V'"):
        fastdiff.enable(theirs(host.SpacedGuided, Unknown.V))
    class_of = theirs()
    class_of.ddim_reverse_sample = None
    with pytest.raises(TypeError, match="got SpacedGuided without ddim_reverse_sample"):
        fastdiff.enable(class_of)
    assert type(broken) is host.SpacedGuided
