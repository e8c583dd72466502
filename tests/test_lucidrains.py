"""The integration of denoising-diffusion-pytorch against the package itself: the same samples, bit for bit."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.integrations import _host
from fastdiff.schedules import NoiseSchedule

if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
    pytest.skip("denoising-diffusion-pytorch is not installed", allow_module_level=True)
hosts = importlib.import_module("lucidrains_host")

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
CHAINS = {
    "ddpm": {},
    "ddim": {"sampling_timesteps": 4},
    "ddim_eta": {"sampling_timesteps": 4, "ddim_sampling_eta": 0.7},
}
MODULE = inspect.getmodule(hosts.GaussianDiffusion)


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No progress bars, by the means that a user of the package has; one thread."""
    modules = [inspect.getmodule(cls) for cls in (hosts.GaussianDiffusion, hosts.GaussianDiffusion1D)]
    for module in (*modules, hosts.classifier_free_guidance, hosts.guided_diffusion, hosts.repaint):
        monkeypatch.setattr(module, "tqdm", lambda items, **_: items)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A deterministic model of the package's face, which notes what it is called with."""

    random_or_learned_sinusoidal_cond = False

    def __init__(self, channels: int = 3, out: int | None = None, self_condition: bool = False) -> None:
        super().__init__()
        self.channels, self.out_dim, self.self_condition = channels, out or channels, self_condition
        self.conv = nn.Conv2d(channels * (2 if self_condition else 1), self.out_dim, 3, padding=1)
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        self.calls.append((x.detach().clone(), t.clone(), x_self_cond))
        if self.self_condition:
            x = torch.cat([x, torch.zeros_like(x) if x_self_cond is None else x_self_cond], 1)
        output: Tensor = 2 * self.conv(x) + (t * 0.01).sin().to(x.dtype).reshape(-1, 1, 1, 1)
        return output


class Given(nn.Module):
    """A model that returns one tensor whatever it is asked."""

    self_condition = False

    def __init__(self, output: Tensor, channels: int | None = None) -> None:
        super().__init__()
        self.output = output
        self.channels = channels or output.shape[1]
        self.out_dim = output.shape[1]

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.output


def diffusion_of(model: nn.Module, host: str = "GaussianDiffusion", **options: Any) -> Any:
    return getattr(hosts, host)(model, image_size=8, **{"timesteps": 12} | options)


def unet(**options: Any) -> Any:
    torch.manual_seed(7)
    return hosts.Unet(dim=8, dim_mults=(1, 2), attn_dim_head=4, attn_heads=2, **options)


def drawn(call: Callable[[], Any], seed: int = 0) -> list[Tensor]:
    """What a call gives from a seed, and where it leaves torch's generator."""
    torch.manual_seed(seed)
    found = call()
    return [*(found if isinstance(found, tuple) else (found,)), torch.rand(4)]


def assert_same(theirs: list[Tensor], ours: list[Tensor]) -> None:
    assert len(theirs) == len(ours)
    for left, right in zip(theirs, ours, strict=True):
        assert left.dtype == right.dtype
        # the layout that a draw like it has
        assert torch.empty_like(left).stride() == torch.empty_like(right).stride()
        assert torch.equal(left, right), (left - right).abs().max()
        assert bool(right.isfinite().all()) and not right.is_inference()


def compared(diffusion: Any, call: Callable[[Any], Any], fused: int | None = None) -> list[Tensor]:
    """A call before and after `enable`, which must give the same; what it gave."""
    theirs = drawn(lambda: call(diffusion))
    fastdiff.enable(diffusion)
    ours = drawn(lambda: call(diffusion))
    fastdiff.disable(diffusion)
    again = drawn(lambda: call(diffusion))
    assert all(map(torch.equal, theirs, again)), "disable gives the original back"
    assert_same(theirs, ours)
    return ours


def steps_of(diffusion: Any) -> tuple[int, dict[str, int]]:
    part = fastdiff.summary(diffusion).parts[""]
    assert part is not None
    return part.fused, part.kept


# Whole samples with the package's own networks


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("self_condition", [False, True])
def test_images_of_a_real_unet(objective: str, chain: str, self_condition: bool) -> None:
    model = unet(self_condition=self_condition)
    diffusion = diffusion_of(model, objective=objective, **CHAINS[chain])
    (images, _) = compared(diffusion, lambda d: d.sample(batch_size=2))
    assert images.shape == (2, 3, 8, 8)
    assert not torch.equal(*images), "samples differ"

    def half(d: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return d.sample(batch_size=2)

    compared(diffusion, half)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("self_condition", [False, True])
def test_sequences_of_a_real_unet(objective: str, chain: str, self_condition: bool) -> None:
    torch.manual_seed(7)
    model = hosts.Unet1D(dim=8, dim_mults=(1, 2), channels=3, self_condition=self_condition)
    options = {"seq_length": 16, "timesteps": 12, "objective": objective}
    diffusion = hosts.GaussianDiffusion1D(model, **options, **CHAINS[chain])
    found = compared(diffusion, lambda d: d.sample(2, return_noise=True))
    assert [u.shape for u in found[:2]] == [(2, 3, 16)] * 2

    def half(d: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return d.sample(batch_size=2)

    compared(diffusion, half)
    if chain != "ddpm":
        compared(diffusion, lambda d: d.ddim_sample((1, 3, 16), clip_denoised=False))
    compared(diffusion, lambda d: d.p_sample(torch.ones(2, 3, 16), 5, clip_denoised=False))


def test_a_learned_variance_of_a_real_unet() -> None:
    diffusion = diffusion_of(unet(learned_variance=True), "LearnedGaussianDiffusion")
    compared(diffusion, lambda d: d.sample(batch_size=2, return_all_timesteps=True))

    def half(d: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return d.sample(batch_size=2)

    compared(diffusion, half)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("auto_normalize", [True, False])
def test_all_timesteps(chain: str, schedule: str, auto_normalize: bool) -> None:
    torch.manual_seed(3)
    model = Net(self_condition=True)
    options: dict[str, Any] = {"beta_schedule": schedule, "auto_normalize": auto_normalize, "timesteps": 24}
    diffusion = diffusion_of(model, **options, **CHAINS[chain])
    (frames, _) = compared(diffusion, lambda d: d.sample(2, return_all_timesteps=True))
    steps = 24 if chain == "ddpm" else 4
    assert frames.shape == (2, steps + 1, 3, 8, 8)
    torch.manual_seed(0)
    first = torch.randn(2, 3, 8, 8)
    assert torch.equal(frames[:, 0], (first + 1) * 0.5 if auto_normalize else first)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chain", CHAINS)
def test_the_model_is_called_as_it_was(objective: str, chain: str) -> None:
    torch.manual_seed(3)
    model = Net(self_condition=True)
    diffusion = diffusion_of(model, objective=objective, **CHAINS[chain])
    compared(diffusion, lambda d: d.sample(2))
    count = len(model.calls) // 3
    theirs, ours = model.calls[:count], model.calls[count : 2 * count]
    for (x, t, cond), (x2, t2, cond2) in zip(theirs, ours, strict=True):
        assert torch.equal(x, x2) and torch.equal(t, t2) and t2.dtype == torch.int64
        assert (cond is None) == (cond2 is None)
        assert cond is None or (cond.dtype == cond2.dtype and torch.equal(cond, cond2))
    assert ours[0][2] is None and ours[1][2] is not None


def test_the_model_runs_in_inference_mode_as_it_did() -> None:
    class Watched(Net):
        def forward(self, *args: Any) -> Tensor:
            modes.append(torch.is_inference_mode_enabled())
            return super().forward(*args)

    modes: list[bool] = []
    for options in CHAINS.values():
        diffusion = fastdiff.enable(diffusion_of(Watched(), timesteps=6, **options))
        assert not diffusion.sample(2).is_inference()
    assert len(modes) == 6 + 4 + 4 and all(modes)


def test_the_model_output_is_left_as_it_is() -> None:
    output = 3 * torch.randn(2, 3, 8, 8)
    before = output.clone()
    diffusion = fastdiff.enable(diffusion_of(Given(output), objective="pred_x0", sampling_timesteps=3))
    diffusion.sample(2)
    _, x_start = diffusion.p_sample(torch.randn(2, 3, 8, 8), 5)
    assert torch.equal(output, before) and torch.equal(x_start, before.clamp(-1, 1))


def test_a_model_with_attributes_of_any_name() -> None:
    model = Net()
    model.weight = nn.Parameter(torch.ones(3))
    model.calls, model.learned = [], True  # type: ignore[assignment]
    fastdiff.enable(diffusion := diffusion_of(model)).sample(1)
    assert steps_of(diffusion) == (12, {})


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"backend": "native"}, {"rounding": "once"}])
def test_options(options: dict[str, Any]) -> None:
    if options.get("backend") == "native" and fastdiff.ops._UNAVAILABLE is not None:
        pytest.skip("no library")
    for chain in CHAINS.values():
        torch.manual_seed(3)
        diffusion = diffusion_of(Net(), **chain)
        theirs = drawn(lambda: diffusion.sample(2))  # noqa: B023
        fastdiff.enable(diffusion, **options)
        assert_same(theirs, drawn(lambda: diffusion.sample(2)))  # noqa: B023
        text = str(fastdiff.summary(diffusion))
        assert "GaussianDiffusion (lucidrains)" in text and f"{4 if chain else 12} steps fused" in text


def test_interpolation() -> None:
    torch.manual_seed(3)
    x1, x2 = torch.rand(2, 2, 3, 8, 8)
    diffusion = diffusion_of(Net(self_condition=True))
    for t in (None, 4):
        compared(diffusion, lambda d, t=t: d.interpolate(x1, x2, t=t, lam=0.3))


def test_a_model_that_writes_to_its_input() -> None:
    class Writes(Given):
        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
            return x.mul_(0.5).sin()

    torch.manual_seed(3)
    x1, x2 = torch.rand(2, 2, 3, 8, 8)
    for options in CHAINS.values():
        diffusion = diffusion_of(Writes(x1), **options)
        compared(diffusion, lambda d: d.interpolate(x1, x2, t=4))
        compared(diffusion, lambda d: d.sample(2))
    with torch.inference_mode():
        given = x1.clone()
    assert bool(fastdiff.enable(diffusion).ddim_step(given, 5, 3)[0].isfinite().all())


@pytest.mark.parametrize("chain", CHAINS)
def test_arguments_for_the_model_of_sequences(chain: str) -> None:
    class Conditioned(Given):
        def forward(  # type: ignore[override]
            self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, *, scale: float = 1.0
        ) -> Tensor:
            return scale * self.output + (0.0 if x_self_cond is None else 0.5 * x_self_cond)

    torch.manual_seed(3)
    options = {"seq_length": 8, "timesteps": 12, "channels": 3, "self_condition": True, "channel_first": False}
    diffusion = hosts.GaussianDiffusion1D(Conditioned(torch.randn(2, 8, 3)), **options, **CHAINS[chain])
    found = [compared(diffusion, lambda d, k=k: d.sample(2, model_forward_kwargs=k))[0] for k in ({}, {"scale": 0.1})]
    assert found[0].shape == (2, 8, 3) and not torch.equal(*found)
    x1, x2 = torch.rand(2, 2, 8, 3)
    compared(diffusion, lambda d: d.interpolate(x1, x2, t=5))


def test_samples_can_enter_autograd() -> None:
    weight = torch.ones(3, 1, 1, requires_grad=True)
    for options in CHAINS.values():
        diffusion = diffusion_of(Net(), **options)
        with pytest.raises(RuntimeError, match="[Ii]nference"):
            (diffusion.sample(1) * weight).sum().backward()
        fastdiff.enable(diffusion)
        with torch.inference_mode():
            images = diffusion.sample(1), diffusion.p_sample(torch.randn(1, 3, 8, 8), 3)[0]
        for image in (*images, diffusion.sample(1)):
            (image * weight).sum().backward()
            assert not image.requires_grad


# Single steps


def step_in_float64(diffusion: Any, m: Tensor, x: Tensor, t: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """DDPM by Ho et al. 2020, eq. 6 and 7, from the betas alone, in float64."""
    betas = diffusion.betas.double()
    ab = torch.cumprod(1 - betas, 0)
    abp = ab[t - 1] if t else torch.ones((), dtype=torch.float64)
    x, m, z = x.double(), m.double(), z.double()
    x0 = {
        "pred_noise": lambda: (x - (1 - ab[t]).sqrt() * m) / ab[t].sqrt(),
        "pred_x0": lambda: m,
        "pred_v": lambda: ab[t].sqrt() * x - (1 - ab[t]).sqrt() * m,
    }[diffusion.objective]().clamp(-1, 1)
    mean = abp.sqrt() * betas[t] / (1 - ab[t]) * x0 + (1 - betas[t]).sqrt() * (1 - abp) / (1 - ab[t]) * x
    std = (betas[t] * (1 - abp) / (1 - ab[t])).sqrt()
    return mean + (std * z if t else 0), x0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_a_step_is_that_of_the_paper_and_has_the_bits_of_the_host(objective: str, schedule: str) -> None:
    torch.manual_seed(5)
    x, m = torch.randn(2, 2, 3, 8, 8)
    diffusion = diffusion_of(Given(m), objective=objective, beta_schedule=schedule, timesteps=1000)
    for t in (0, 1, 2, 10, 500, 700, 998, 999):
        img, x_start, _ = compared(diffusion, lambda d, t=t: d.p_sample(x, t))
        torch.manual_seed(0)
        z = torch.randn_like(x)
        expected, expected_x0 = step_in_float64(diffusion, m, x, t, z)
        # the betas are float32 here and alpha_bar is their product, made in float64 by the package
        torch.testing.assert_close(img.double(), expected, rtol=1e-3, atol=1e-3)
        if t < 700:
            torch.testing.assert_close(x_start.double(), expected_x0, rtol=1e-3, atol=1e-3)


SHAPES = [(1, 2, 4), (2, 3, 5), (2, 3, 4, 4), (1, 2, 3, 4, 4), (0, 3, 4, 4), (3, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype, output: torch.dtype) -> None:
    torch.manual_seed(5)
    x, m = torch.randn(shape).to(dtype), torch.randn(shape).to(torch.float64 if dtype is torch.float64 else output)
    for objective in OBJECTIVES:
        diffusion = diffusion_of(Given(m), objective=objective)
        for t in (0, 7):
            compared(diffusion, lambda d, t=t: d.p_sample(x, t))


def test_a_diffusion_in_float64_and_in_half() -> None:
    torch.manual_seed(5)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x, m = torch.randn(2, 2, 3, 8, 8).to(dtype)
        for objective in OBJECTIVES:
            diffusion = diffusion_of(Given(m), objective=objective, beta_schedule="linear", timesteps=100).to(dtype)
            for t in (0, 7, 90):
                compared(diffusion, lambda d, t=t, x=x: d.p_sample(x, t))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", [None, torch.float32])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_default_dtype_that_is_half(default: torch.dtype, output: torch.dtype | None, objective: str) -> None:
    torch.manual_seed(5)
    m = torch.randn(2, 3, 8, 8, dtype=output or default)
    torch.set_default_dtype(default)
    try:
        for chain in CHAINS.values():
            diffusion = diffusion_of(Given(m), objective=objective, **chain)
            compared(diffusion, lambda d: d.sample(2))
            fastdiff.enable(diffusion).sample(2)
            assert steps_of(diffusion) == (4 if chain else 12, {})
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_half_diffusion_under_autocast(objective: str) -> None:
    torch.manual_seed(5)
    x, m = torch.randn(2, 2, 3, 8, 8).half()
    diffusion = diffusion_of(Given(m), objective=objective, ddim_sampling_eta=0.5).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compared(diffusion, lambda d: d.p_sample(x, 7))
        step = drawn(lambda: fastdiff.enable(diffusion).ddim_step(x, 7, 3))
    assert_same(drawn(lambda: diffusion.ddim_step(x, 7, 3)), step)
    assert [u.dtype for u in step[:2]] == [torch.float16] * 2


def test_a_model_output_of_float64_gives_float64_as_in_the_host() -> None:
    torch.manual_seed(5)
    x, m = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    diffusion = diffusion_of(Given(m))
    theirs = drawn(lambda: diffusion.p_sample(x, 5))
    ours = drawn(lambda: fastdiff.enable(diffusion).p_sample(x, 5))
    for left, right in zip(theirs, ours, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_diffusion_in_float64_whose_states_begin_in_float32(objective: str, chain: str) -> None:
    torch.manual_seed(3)
    model = Net()
    diffusion = diffusion_of(model, objective=objective, **CHAINS[chain]).double()
    model.forward = lambda x, t, c=None: (3 * x).sin()  # type: ignore[method-assign]
    theirs, ours = (drawn(lambda d=d: d.sample(2)) for d in (diffusion, fastdiff.enable(copy.deepcopy(diffusion))))
    for left, right in zip(theirs, ours, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=0, atol=1e-14)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda u: u,
    "channels_last": lambda u: u.contiguous(memory_format=torch.channels_last),
    "transposed": lambda u: u.mT.contiguous().mT,
    "sliced": lambda u: u.repeat(1, 1, 1, 2)[..., ::2],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_output", LAYOUTS)
def test_layouts(objective: str, of_x: str, of_output: str) -> None:
    torch.manual_seed(5)
    x, m = torch.randn(2, 2, 3, 4, 4)
    diffusion = diffusion_of(Given(LAYOUTS[of_output](m)), objective=objective, sampling_timesteps=5)
    compared(diffusion, lambda d: d.p_sample(LAYOUTS[of_x](x), 7))
    # the noise of the next step follows the layout of this one
    compared(diffusion, lambda d: d.ddim_sample((2, 3, 4, 4)))
    compared(diffusion, lambda d: d.p_sample_loop((2, 3, 4, 4)))


def test_a_half_network_whose_layout_is_its_own() -> None:
    torch.manual_seed(5)
    x, m = torch.randn(2, 2, 3, 4, 4)
    for of_output in LAYOUTS.values():
        diffusion = diffusion_of(Given(of_output(m.bfloat16())), objective="pred_x0")
        for t in (0, 7):
            compared(diffusion, lambda d, t=t: d.p_sample(x, t))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("length", [False, True])
def test_a_ddim_step_is_one_of_the_chain(objective: str, eta: float, length: bool) -> None:
    torch.manual_seed(3)
    options = {"objective": objective, "ddim_sampling_eta": eta, "sampling_timesteps": 5, "timesteps": 100}
    if length:
        m = torch.randn(2, 3, 8)
        diffusion = hosts.GaussianDiffusion1D(Given(m), seq_length=8, auto_normalize=False, **options)
    else:
        m = torch.randn(2, 3, 8, 8)
        diffusion = diffusion_of(Given(m), auto_normalize=False, **options)
    theirs = drawn(lambda: diffusion.sample(2))
    fastdiff.enable(diffusion)

    def by_steps() -> Tensor:
        x = torch.randn_like(m)
        for time, time_next in ((99, 79), (79, 59), (59, 39), (39, 19), (19, -1)):
            x, x_start = diffusion.ddim_step(x, time, time_next)
        assert torch.equal(x, x_start)
        return x

    assert_same(theirs, drawn(by_steps))
    with pytest.raises(ValueError, match="time: expected ints below 100"):
        diffusion.ddim_step(m, 100, 5)
    with pytest.raises(ValueError, match=r"t: expected a timestep in \[0, 100\), got -1"):
        diffusion.p_sample(m, -1)


@pytest.mark.parametrize("count", [1, 26, 52, 60, 104])
def test_timesteps_are_cut_in_float32(count: int) -> None:
    model = Net()
    diffusion = diffusion_of(model, timesteps=1000, sampling_timesteps=count)
    compared(diffusion, lambda d: d.sample(1))
    assert len(model.calls) == 3 * count


# Where the package breaks


def test_a_radicand_that_float32_takes_below_0_is_0() -> None:
    torch.manual_seed(3)
    m = torch.randn(2, 3, 8, 8)
    options = {"timesteps": 1000, "sampling_timesteps": 5, "ddim_sampling_eta": 1.0, "beta_schedule": "cosine"}
    diffusion = diffusion_of(Given(m), objective="pred_noise", auto_normalize=False, **options)
    assert bool(diffusion.sample(2).isnan().all())
    fastdiff.enable(diffusion)
    torch.manual_seed(0)
    found = diffusion.sample(2)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float32).double()
    ab = NoiseSchedule.cosine(1000).alphas_cumprod
    for time, time_next in ((999, 799), (799, 599), (599, 399), (399, 199), (199, -1)):
        x0 = ((x - (1 - ab[time]) ** 0.5 * m) / ab[time] ** 0.5).clamp(-1, 1)
        if time_next < 0:
            x = x0
            break
        abn = ab[time_next]
        e = (x - ab[time] ** 0.5 * x0) / (1 - ab[time]) ** 0.5
        variance = (1 - ab[time] / abn) * (1 - abn) / (1 - ab[time])
        x = abn**0.5 * x0 + max(1 - abn - variance, 0) ** 0.5 * e + variance**0.5 * torch.randn(2, 3, 8, 8).double()
    torch.testing.assert_close(found.double(), x, rtol=0, atol=2e-3)


def test_ddim_of_a_learned_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    model = Net(out=6)
    options: dict[str, Any] = {"sampling_timesteps": 4, "ddim_sampling_eta": 0.5}
    diffusion = diffusion_of(model, "LearnedGaussianDiffusion", objective="pred_noise", **options)
    with pytest.raises(NameError):
        diffusion.sample(2)
    ours = drawn(lambda: fastdiff.enable(diffusion).sample(2))
    # with the two names that its module uses and does not import
    module = inspect.getmodule(hosts.LearnedGaussianDiffusion)
    for name in ("partial", "identity"):
        monkeypatch.setattr(module, name, getattr(MODULE, name), raising=False)
    theirs = drawn(lambda: fastdiff.disable(diffusion).sample(2))
    assert_same(theirs, ours)
    for objective in ("pred_x0", "pred_v"):  # its loss trains noise, whatever the objective
        diffusion.objective = objective
        assert_same(theirs, drawn(lambda: fastdiff.enable(diffusion).sample(2)))


# What is read of the object


def test_edits_take_effect() -> None:
    torch.manual_seed(3)
    diffusion, other = diffusion_of(Net()), diffusion_of(Net(), beta_schedule="cosine")
    x = torch.randn(2, 3, 8, 8)
    fastdiff.enable(diffusion).sample(1)
    diffusion.p_sample(x, 5)

    def check() -> None:
        for call in (lambda d: d.p_sample(x, 5), lambda d: d.sample(1)):
            ours = drawn(lambda: call(diffusion))  # noqa: B023
            theirs = drawn(lambda: call(fastdiff.disable(copy.deepcopy(diffusion))))  # noqa: B023
            assert_same(theirs, ours)

    check()
    diffusion.posterior_log_variance_clipped.add_(1.0)
    check()
    diffusion.posterior_mean_coef1 = diffusion.posterior_mean_coef1 * 0.5
    check()
    diffusion.load_state_dict({k: v for k, v in other.state_dict().items()})
    check()
    diffusion.objective = "pred_x0"
    check()
    diffusion.num_timesteps = 8
    check()
    diffusion.sampling_timesteps, diffusion.is_ddim_sampling = 3, True
    check()
    diffusion.ddim_sampling_eta = 0.8
    check()
    diffusion.alphas_cumprod.mul_(0.9)
    check()
    diffusion.unnormalize = lambda img: 3 * img
    check()
    diffusion.double().float()
    check()
    # what is done through .data leaves no trace but the values, which every chain looks at
    diffusion.sqrt_recipm1_alphas_cumprod.data.mul_(0.9)
    diffusion.sample(1)
    check()


def test_buffers_of_inference_mode_are_watched_too() -> None:
    with torch.inference_mode():
        diffusion = diffusion_of(Net())
    x = torch.randn(1, 3, 8, 8)
    compared(diffusion, lambda d: d.p_sample(x, 5))
    before = fastdiff.enable(diffusion).p_sample(x, 0)[0]
    with torch.inference_mode():
        diffusion.posterior_mean_coef1.mul_(0.5)
    assert not torch.equal(diffusion.p_sample(x, 0)[0], before)


def test_tables_are_made_once() -> None:
    diffusion = fastdiff.enable(diffusion_of(Net(), sampling_timesteps=4))
    x = torch.randn(1, 3, 8, 8)
    diffusion.sample(1)
    diffusion.p_sample(x, 5)
    source = diffusion._fastdiff.tables["source"]
    known = set(map(id, source.ddpm.values())), set(map(id, source.ddim.values()))
    diffusion.sample(2)
    diffusion.p_sample(x, 7)
    diffusion.load_state_dict(diffusion.state_dict())  # the same values
    diffusion.sample(1)
    source = diffusion._fastdiff.tables["source"]
    assert known == (set(map(id, source.ddpm.values())), set(map(id, source.ddim.values())))
    for k in range(1200):
        diffusion.ddim_sampling_eta = k / 1200
        diffusion._ddim_steps([(5, 4), (4, 3), (3, 2), (2, 1)], True)
    assert len(source.ddim) <= 4096


def test_a_bar_that_the_host_shows_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = fastdiff.enable(diffusion_of(Net()))
    shown: list[Any] = []

    def tqdm(items: Any, **options: Any) -> Any:
        shown.append(options)
        return items

    monkeypatch.setattr(MODULE, "tqdm", tqdm)
    for _ in range(2):
        diffusion.p_sample_loop((1, 3, 8, 8))
        diffusion.ddim_sample((1, 3, 8, 8))
        fastdiff.disable(diffusion)
    assert (
        shown[:2]
        == shown[2:]
        == [
            {"desc": "sampling loop time step", "total": 12},
            {"desc": "sampling loop time step"},
        ]
    )


# Copies, saves, switching


def test_switching_leaves_no_trace() -> None:
    diffusion = diffusion_of(Net())
    before, keys, attributes = dict(vars(hosts.GaussianDiffusion)), list(diffusion.state_dict()), set(vars(diffusion))
    cls = type(diffusion)
    state = torch.get_rng_state()
    assert fastdiff.enable(fastdiff.enable(diffusion)) is diffusion
    assert torch.equal(torch.get_rng_state(), state), "no noise of the caller's is used up"
    assert list(diffusion.state_dict()) == keys and isinstance(diffusion, cls)
    assert (type(diffusion).__module__, type(diffusion).__qualname__) == (cls.__module__, cls.__qualname__)
    assert type(diffusion_of(Net())) is cls
    for name in ("q_sample", "p_losses", "forward", "sample", "p_mean_variance", "model_predictions"):
        assert getattr(type(diffusion), name) is getattr(cls, name)
    fastdiff.disable(fastdiff.disable(diffusion))
    assert type(diffusion) is cls and dict(vars(cls)) == before and set(vars(diffusion)) == attributes


def test_signatures_are_those_of_the_host() -> None:
    made = (
        diffusion_of(Net()),
        diffusion_of(Net(out=6), "LearnedGaussianDiffusion"),
        hosts.GaussianDiffusion1D(Net(), seq_length=8),
    )
    for diffusion in made:
        names = ("p_sample", "p_sample_loop", "ddim_sample", "sample", "interpolate")
        theirs = [inspect.signature(getattr(diffusion, name)) for name in names]
        fastdiff.enable(diffusion)
        assert [inspect.signature(getattr(diffusion, name)) for name in names] == theirs


def test_training_is_as_it_was() -> None:
    images = torch.rand(2, 3, 8, 8)
    diffusion = diffusion_of(Net(), offset_noise_strength=0.1, min_snr_loss_weight=True)
    theirs = drawn(lambda: diffusion(images))
    ours = drawn(lambda: fastdiff.enable(diffusion)(images))
    ours[0].backward()
    assert all(map(torch.equal, theirs, ours)) and diffusion.model.conv.weight.grad is not None


def test_pickle_and_save_hold_the_original() -> None:
    diffusion = diffusion_of(Net())
    theirs = drawn(lambda: diffusion.sample(1))
    fastdiff.enable(diffusion)
    diffusion.normalize = diffusion.unnormalize = MODULE.unnormalize_to_zero_to_one
    file = io.BytesIO()
    torch.save(diffusion, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(diffusion)), torch.load(file, weights_only=False)):
        assert type(loaded) is hosts.GaussianDiffusion and not hasattr(loaded, "_fastdiff")
        assert_same(theirs, drawn(lambda: fastdiff.enable(loaded).sample(1)))  # noqa: B023
    assert b"fastdiff" not in file.getvalue()
    twin = copy.deepcopy(diffusion)
    assert_same(theirs, drawn(lambda: twin.sample(1)))
    twin.model.conv.weight.data.zero_()
    assert_same(theirs, drawn(lambda: diffusion.sample(1)))
    assert not torch.equal(theirs[0], drawn(lambda: twin.sample(1))[0])


def test_an_average_of_weights_samples_with_its_own() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")

    def trained(enabled: bool) -> Any:
        torch.manual_seed(11)
        diffusion = diffusion_of(Net(), objective="pred_noise")
        if enabled:
            fastdiff.enable(diffusion).sample(1)
        ema = ema_pytorch.EMA(diffusion, beta=0.5, update_every=1, update_after_step=0)
        if enabled:
            ema.ema_model.sample(1)
        torch.manual_seed(12)
        optimizer = torch.optim.SGD(diffusion.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            diffusion(torch.rand(2, 3, 8, 8)).backward()
            optimizer.step()
            diffusion.posterior_mean_coef1.mul_(0.9)  # which it averages through .data
            ema.update()
        return ema

    host, ours = trained(False), trained(True)
    assert isinstance(ours.ema_model, _host.Switched) and isinstance(ours.online_model, _host.Switched)
    assert list(host.state_dict()) == list(ours.state_dict())
    samples = []
    for name in ("ema_model", "online_model"):
        theirs = drawn(lambda: getattr(host, name).sample(2))  # noqa: B023
        samples.append(drawn(lambda: getattr(ours, name).sample(2)))  # noqa: B023
        assert_same(theirs, samples[-1])
    assert not torch.equal(samples[0][0], samples[1][0])


def test_a_compiled_network() -> None:
    diffusion = diffusion_of(torch.compile(Net(), backend="eager"), sampling_timesteps=3)
    assert_same(drawn(lambda: diffusion.sample(2)), drawn(lambda: fastdiff.enable(diffusion).sample(2)))
    assert steps_of(diffusion) == (3, {})


# Noise of the contract


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("length", [False, True])
def test_noise_of_the_contract_does_not_depend_on_the_batch(chain: str, length: bool) -> None:
    torch.manual_seed(3)
    if length:
        model: nn.Module = Given(torch.ones(1, 3, 8))
        diffusion = hosts.GaussianDiffusion1D(model, seq_length=8, timesteps=12, **CHAINS[chain])
    else:
        model = Given(torch.ones(1, 3, 8, 8))
        diffusion = diffusion_of(model, **CHAINS[chain])
    given = model.output

    def sampled(batch: int, seeds: Any) -> Tensor:
        model.output = given.expand(batch, *given.shape[1:])
        found: Tensor = fastdiff.enable(diffusion, noise="philox", seeds=seeds).sample(batch)
        return found

    state = torch.get_rng_state()
    whole = sampled(3, torch.tensor([5, 6, 7]))
    assert torch.equal(sampled(2, torch.tensor([6, 5])), whole[[1, 0]])
    assert torch.equal(sampled(3, 9)[:2], sampled(2, 9)) and not torch.equal(sampled(3, 9), whole)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is not touched"
    fresh = sampled(2, None)
    assert not torch.equal(fresh, diffusion.sample(2)), "a new seed for every chain"
    torch.set_rng_state(state)
    assert torch.equal(sampled(2, None), fresh)


def test_noise_of_the_contract_is_that_of_our_own_sampler() -> None:
    torch.manual_seed(3)
    model = Net()
    options = {"beta_schedule": "cosine", "objective": "pred_v", "auto_normalize": False, "timesteps": 30}
    diffusion = fastdiff.enable(diffusion_of(model, **options), noise="philox", seeds=4)
    sampler = fastdiff.DDPMSampler(NoiseSchedule.cosine(30), prediction="v", clip=1.0)
    with torch.no_grad():
        expected = sampler.sample(model, (2, 3, 8, 8), seeds=4)
    torch.testing.assert_close(diffusion.sample(2), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(diffusion.p_sample(expected, 7)[0], diffusion.p_sample(expected, 7)[0], rtol=0, atol=0)


def test_a_learned_variance_with_noise_of_the_contract() -> None:
    torch.manual_seed(3)
    m, x = torch.randn(2, 6, 8, 8), torch.randn(2, 3, 8, 8)
    diffusion = diffusion_of(Given(m, 3), "LearnedGaussianDiffusion")
    fastdiff.enable(diffusion, noise="philox", seeds=4)
    found, _ = diffusion.p_sample(x, 7)
    fastdiff.disable(diffusion)
    z = fastdiff.normal((2, 3, 8, 8), 4, t=7, domain="step")
    mean, _, log_variance, _ = diffusion.p_mean_variance(x=x, t=torch.full((2,), 7), clip_denoised=True)
    torch.testing.assert_close(found, mean + (0.5 * log_variance).exp() * z, rtol=1e-6, atol=1e-6)


# What is not replaced


def source_of(cls: type, *changes: tuple[str, str]) -> type:
    """A class of the package as another codebase has it: its source, with some changes."""
    text = inspect.getsource(cls)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    names = dict(vars(inspect.getmodule(cls)))
    exec(compile(text, "another codebase", "exec"), names)
    found: type = names[cls.__name__]
    found.__module__ = "another.codebase"
    return found


def kept(diffusion: Any, reason: str, call: Callable[[Any], Any] | None = None, steps: int = 12) -> None:
    """A sample is the original's, with one warning."""
    call = call or (lambda d: d.sample(1))
    theirs = drawn(lambda: call(diffusion))
    fastdiff.enable(diffusion)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = drawn(lambda: call(diffusion))
        drawn(lambda: call(diffusion))
    assert [w.category for w in caught] == [RuntimeWarning] and reason in str(caught[0].message)
    assert all(map(torch.equal, theirs, ours))
    fused, count = steps_of(diffusion)
    assert fused == 0 and list(count.values()) == [2 * steps]


def test_a_copy_in_another_codebase_is_replaced() -> None:
    for cls in (hosts.GaussianDiffusion, hosts.GaussianDiffusion1D):
        twin = source_of(cls)
        for chain in CHAINS.values():
            if cls is hosts.GaussianDiffusion:
                diffusion = twin(Net(), image_size=8, timesteps=12, **chain)
            else:
                diffusion = twin(Given(torch.ones(2, 3, 8)), seq_length=8, timesteps=12, **chain)
            compared(diffusion, lambda d: d.sample(2))
            fastdiff.enable(diffusion).sample(2)
            assert steps_of(diffusion) == (4 if chain else 12, {})


CHANGES = {
    "noise": ("(0.5 * model_log_variance)", "(0.6 * model_log_variance)"),
    "range": ("x_start.clamp_(-1., 1.)", "x_start.clamp_(-1., 1.5)"),
    "eps": ("rederive_pred_noise = True)", "rederive_pred_noise = False)"),
    "sigma": ("sigma = eta *", "sigma = 1.01 * eta *"),
    "last": ("if time_next < 0:", "if time_next < -5:"),
    "draws": ("noise = torch.randn_like(img)", "noise = torch.randn(img.shape[::-1]).permute(3, 2, 1, 0)"),
    "frames": ("imgs = [img]", "imgs = []"),
    "times": ("total_timesteps - 1,", "total_timesteps - 2,"),
    "condition": ("self_cond = x_start if self.self_condition else None", "self_cond = img"),
    "call": ("self.model(x, t, x_self_cond)", "self.model(x, t, x_self_cond, **{})\n        t = t + 0.5"),
    "eta_0": ("c * pred_noise", "c * pred_noise * (1. if eta else .9)"),
    "eta_1": ("sigma = eta *", "sigma = min(eta, .5) *"),
    "draw": ("noise = torch.randn_like(img)", "noise = torch.randn_like(img) if eta else 0."),
}


SIGMA = "(0.5 * model_log_variance).exp() * noise"
# what changes nothing as the object is: the change, an attribute that is set later, and how the reason reads
LATER: dict[str, tuple[tuple[tuple[str, str], ...], dict[str, Any], str]] = {
    "attribute": (
        (("int(timesteps)\n", "int(timesteps)\n        self.warm = 1.0\n"), (SIGMA, SIGMA + " * self.warm")),
        {"warm": 0.5},
        "p_sample of GaussianDiffusion depends on 'warm'",
    ),
    "flag": (
        (("x_start.clamp_(-1., 1.)", "x_start.clamp_(-1., .5 if getattr(self, 'low', False) else 1.)"),),
        {"low": True},
        "p_mean_variance of GaussianDiffusion depends on 'low'",
    ),
    "weight": (
        (("self.model(x, t, x_self_cond)", "self.model(x, t, x_self_cond) * (self.w if hasattr(self, 'w') else 1)"),),
        {"w": 0.5},
        "model_predictions of GaussianDiffusion depends on 'w'",
    ),
    "buffer": (
        ((SIGMA, SIGMA + " * (self.alphas_cumprod_prev[0])"),),
        {"alphas_cumprod_prev": torch.full((12,), 0.5)},
        "p_sample of GaussianDiffusion depends on 'alphas_cumprod_prev'",
    ),
}


@pytest.mark.parametrize("change", LATER)
def test_a_copy_that_looks_at_more_keeps_its_steps(change: str) -> None:
    changes, later, reason = LATER[change]
    diffusion = source_of(hosts.GaussianDiffusion, *changes)(Net(), image_size=8, timesteps=12)
    before = drawn(lambda: diffusion.sample(1))
    kept(diffusion, reason)
    for name, value in later.items():
        setattr(diffusion, name, value)
    ours = drawn(lambda: diffusion.sample(1))
    assert all(map(torch.equal, ours, drawn(lambda: fastdiff.disable(diffusion).sample(1))))
    assert not torch.equal(ours[0], before[0])


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_with_other_steps_keeps_them(change: str) -> None:
    diffusion = source_of(hosts.GaussianDiffusion, CHANGES[change])(Net(), image_size=8, timesteps=12)
    diffusion.objective = "pred_noise"
    fastdiff.enable(diffusion)
    reason = diffusion._fastdiff.disabled
    assert reason is not None and "GaussianDiffusion" in reason
    if change not in ("call", "draws", "last"):  # which their own code does not survive
        fastdiff.disable(diffusion)
        kept(diffusion, reason)
        kept(fastdiff.disable(diffusion), reason, lambda d: d.ddim_sample((1, 3, 8, 8)))


def test_a_decorated_sampler_is_tried_as_it_is() -> None:
    def halved(function: Any) -> Any:
        @functools.wraps(function)
        def method(*args: Any, **kwargs: Any) -> Any:
            return 0.5 * function(*args, **kwargs)

        return method

    for name in ("p_sample_loop", "ddim_sample"):
        twin = source_of(hosts.GaussianDiffusion)
        setattr(twin, name, halved(vars(twin)[name]))
        diffusion = twin(Net(), image_size=8, timesteps=12)
        kept(diffusion, "the steps of GaussianDiffusion are not", lambda d, name=name: getattr(d, name)((1, 3, 8, 8)))


def test_a_class_that_is_changed_later_is_tried_again() -> None:
    diffusion = source_of(hosts.GaussianDiffusion)(Net(), image_size=8, timesteps=12)
    cls, call = type(diffusion), lambda d: d.sample(2)
    compared(diffusion, call)
    fastdiff.enable(diffusion)
    q_posterior = cls.q_posterior

    def changed(self: Any, **kwargs: Any) -> Any:
        mean, *rest = q_posterior(self, **kwargs)
        return 0.5 * mean, *rest

    cls.q_posterior = changed
    twin = copy.deepcopy(diffusion)
    for one in (diffusion, twin):
        with pytest.warns(RuntimeWarning, match="the original step is kept: the steps of GaussianDiffusion are not"):
            ours = drawn(lambda: call(one))  # noqa: B023
        assert all(map(torch.equal, ours, drawn(lambda: call(fastdiff.disable(copy.deepcopy(one))))))  # noqa: B023
    cls.q_posterior = q_posterior
    before = steps_of(diffusion)[0]
    call(diffusion)
    assert steps_of(diffusion)[0] == before + 12, "and again when it is as before"


def test_a_copy_knows_what_was_tried() -> None:
    diffusion = source_of(hosts.GaussianDiffusion, CHANGES["eps"])(Net(), image_size=8, timesteps=12)
    twin = copy.deepcopy(fastdiff.enable(diffusion))
    twin.objective = "pred_noise"
    with pytest.warns(RuntimeWarning, match="the original step is kept: the steps of GaussianDiffusion are not"):
        twin.sample(1)


def test_another_objective_is_tried_when_it_is_set() -> None:
    diffusion = source_of(hosts.GaussianDiffusion, CHANGES["eps"])(Net(), image_size=8, timesteps=12)
    call = lambda d: d.ddim_sample((1, 3, 8, 8))  # noqa: E731
    compared(diffusion, call)  # pred_v always re-derives eps
    fastdiff.enable(diffusion)
    diffusion.objective = "pred_noise"
    with pytest.warns(RuntimeWarning, match="the original step is kept: the steps of GaussianDiffusion are not"):
        ours = drawn(lambda: call(diffusion))
    assert steps_of(diffusion) == (
        0,
        {"the steps of GaussianDiffusion are not those of denoising-diffusion-pytorch": 12},
    )
    assert all(map(torch.equal, ours, drawn(lambda: call(fastdiff.disable(diffusion)))))


def test_a_subclass_with_methods_of_its_own_keeps_its_steps() -> None:
    class Own(hosts.GaussianDiffusion):  # type: ignore[misc,name-defined]
        def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> Any:
            img, x_start = super().p_sample(x, t, x_self_cond)
            return img * 0.9, x_start

    kept(Own(Net(), image_size=8, timesteps=12), "Own has a p_sample of its own")

    class Trained(hosts.GaussianDiffusion):  # type: ignore[misc,name-defined]
        def p_losses(self, *args: Any, **kwargs: Any) -> Any:
            return 0

        def sample(self, batch_size: int = 16, return_all_timesteps: bool = False) -> Any:
            return super().sample(batch_size, return_all_timesteps) * 2

    compared(Trained(Net(), image_size=8, timesteps=12), lambda d: d.sample(2))


def test_a_method_of_the_object_itself_is_heeded() -> None:
    diffusion = diffusion_of(Net())
    predictions = diffusion.model_predictions
    diffusion.model_predictions = lambda *args, **kwargs: predictions(*args, **kwargs)
    kept(diffusion, "a model_predictions of the object's own")
    assert diffusion._fastdiff.disabled is None, "it is heeded as long as it is there"
    kept(fastdiff.disable(diffusion), "a model_predictions", lambda d: d.ddim_sample((1, 3, 8, 8)))
    with pytest.raises(ValueError, match="self: expected an object whose steps are replaced.*model_predictions"):
        diffusion.ddim_step(torch.randn(1, 3, 8, 8), 5, 4)
    del diffusion.model_predictions
    compared(diffusion, lambda d: d.sample(1))


@pytest.mark.parametrize("eta", [1.5, -0.5])
def test_an_eta_that_is_no_fraction_is_the_hosts_affair(eta: float) -> None:
    diffusion = diffusion_of(Net(), sampling_timesteps=4, ddim_sampling_eta=eta)
    theirs = drawn(lambda: diffusion.sample(1))
    fastdiff.enable(diffusion)
    with pytest.warns(RuntimeWarning, match=rf"ddim_sampling_eta {eta}, which is not in \[0, 1\]"):
        ours = drawn(lambda: diffusion.sample(1))
    for left, right in zip(theirs, ours, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    assert steps_of(diffusion) == (0, {f"ddim_sampling_eta {eta}, which is not in [0, 1]": 4})
    diffusion.p_sample(torch.randn(1, 3, 8, 8), 5)
    assert steps_of(diffusion)[0] == 1, "which DDPM does not read"


def test_an_unknown_objective_is_the_hosts_affair() -> None:
    diffusion = fastdiff.enable(diffusion_of(Net()))
    diffusion.objective = "pred_score"
    with pytest.warns(RuntimeWarning, match="objective 'pred_score'"), pytest.raises(UnboundLocalError):
        diffusion.sample(1)


def test_variants_whose_steps_are_kept() -> None:
    guided = hosts.guided_diffusion.GaussianDiffusion(Net(), image_size=8, timesteps=12)
    kept(guided, "GaussianDiffusion.p_sample takes x, t, x_self_cond, cond_fn, guidance_kwargs")
    kept(
        hosts.repaint.GaussianDiffusion(Net(), image_size=8, timesteps=12), "p_sample takes x, t, x_self_cond, gt, mask"
    )
    network = hosts.classifier_free_guidance.Unet(dim=8, dim_mults=(1, 2), num_classes=3, attn_dim_head=4, attn_heads=2)
    free = hosts.classifier_free_guidance.GaussianDiffusion(network, image_size=8, timesteps=12)
    before = inspect.signature(free.p_sample)
    kept(free, "p_sample takes x, t, classes", lambda d: d.sample(classes=torch.tensor([1])))
    assert inspect.signature(free.p_sample) == before
    weighted = fastdiff.enable(diffusion_of(Net(out=8), "WeightedObjectiveGaussianDiffusion"))
    reason = "WeightedObjectiveGaussianDiffusion has a p_mean_variance of its own"
    with pytest.warns(RuntimeWarning, match=reason), pytest.raises(TypeError):
        weighted.sample(1)  # its own p_sample and p_mean_variance do not fit


def test_other_families_are_refused() -> None:
    continuous = unet(learned_sinusoidal_cond=True)
    objects: list[tuple[Any, str]] = [
        (hosts.ContinuousTimeGaussianDiffusion(continuous, image_size=8), "ContinuousTimeGaussianDiffusion"),
        (hosts.VParamContinuousTimeGaussianDiffusion(continuous, image_size=8), "VParamContinuousTime"),
        (hosts.ElucidatedDiffusion(continuous, image_size=8), "ElucidatedDiffusion"),
        (unet(), "Unet"),
    ]
    for obj, name in objects:
        before = type(obj)
        with pytest.raises(
            TypeError, match=rf"obj: expected GaussianDiffusion, GaussianDiffusion1D.*got {name}.*fastdiff.DDPMSampler"
        ):  # noqa: E501
            fastdiff.enable(obj)
        assert type(obj) is before
        assert fastdiff.summary(fastdiff.disable(obj)).parts == {"": None}
    with pytest.raises(TypeError, match=r"got XMWrapper; write fastdiff.enable\(wrapper.flow_model\)"):
        fastdiff.enable(hosts.XMWrapper(diffusion_of(Net())))


def test_stand_ins_are_there_for_the_import_alone() -> None:
    for name, module in hosts.stand_ins.items():
        assert sys.modules.get(name) is not module
        contents = [value for key, value in vars(module).items() if not key.startswith("__")]
        assert all(isinstance(value, hosts.StandIn) for value in contents)
