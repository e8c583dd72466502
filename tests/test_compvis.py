"""CompVis' DDIMSampler: every bit that its own operations give, and the right result where those fail."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.integrations.compvis import DDIMSampler

T = 200
SHAPE = (2, 3, 4, 5)
COND, UNCOND = torch.tensor([0.3, -0.2]), torch.zeros(2)
GUIDED = {"unconditional_conditioning": UNCOND, "unconditional_guidance_scale": 3.0}


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (x.dim() - 1))


class Model:
    """What the sampler reads of a latent diffusion model; its network is deterministic and different at every time."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype = torch.float32, parameterization: str = "eps", betas: Any = None) -> None:
        betas = np.linspace(0.0015**0.5, 0.0195**0.5, T) ** 2 if betas is None else betas
        kept = np.cumprod(1 - betas)
        self.num_timesteps = len(betas)
        self.betas, self.alphas_cumprod = self._float(betas), self._float(kept)
        self.alphas_cumprod_prev = self._float(np.append(1.0, kept[:-1]))
        self.sqrt_alphas_cumprod = self._float(np.sqrt(kept))
        self.sqrt_one_minus_alphas_cumprod = self._float(np.sqrt(1 - kept))
        self.dtype, self.parameterization = dtype, parameterization
        self.first_stage_model = self
        self.told: list[Any] = []

    @staticmethod
    def _float(values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    def apply_model(self, x: Tensor, t: Tensor, c: Any) -> Tensor:
        assert not torch.is_grad_enabled() and t.dtype is torch.int64
        self.told.append((tuple(x.shape), t.tolist()))
        while isinstance(c, (dict, list)):
            c = c[0] if isinstance(c, list) else c["key"]
        shift = 0 if c is None else per_sample(c, x)
        x = x.double() if self.dtype is torch.float64 else x.float()
        return (0.9 * x.roll(1, -1) + per_sample(torch.sin(t.float()), x) + shift).to(self.dtype)

    def q_sample(self, x: Tensor, t: Tensor) -> Tensor:
        signal, noise = self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]
        return per_sample(signal, x) * x + per_sample(noise, x) * torch.randn_like(x)

    def quantize(self, x: Tensor) -> tuple[Tensor, None, int]:
        return (x * 8).round() / 8, None, 1

    def modify_score(self, model: Any, e: Tensor, x: Tensor, t: Tensor, c: Any, factor: float) -> Tensor:
        assert model is self
        return e * factor + x

    def predict_start_from_z_and_v(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        signal, noise = self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]
        return per_sample(signal, x) * x - per_sample(noise, x) * v

    def predict_eps_from_z_and_v(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        signal, noise = self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]
        return per_sample(signal, x) * v + per_sample(noise, x) * x


class Host:
    """CompVis' operations in their order; exact: coefficients, state and network in float64."""

    def __init__(self, model: Any, steps: int, eta: float = 0.0, quad: bool = False, exact: bool = False) -> None:
        self.model, self.wide = model, torch.float64 if exact else torch.float32
        spaced = np.linspace(0, np.sqrt(T * 0.8), steps) ** 2 if quad else np.arange(0, T, T // steps)
        self.times = spaced.astype(int) + 1
        kept = model.alphas_cumprod.numpy()
        self.alphas = torch.from_numpy(kept[self.times])
        self.ends = np.concatenate([kept[:1], kept[self.times[:-1]]]).astype(np.float64 if steps > 1 else np.float32)
        inverse = (1 - self.alphas).reciprocal().numpy()  # float32
        moved = 1 - self.alphas.numpy().astype(self.ends.dtype) / self.ends
        self.sigmas = eta * torch.from_numpy(np.sqrt(inverse * (1 - self.ends) * moved))
        self.roots = torch.from_numpy(np.sqrt(1 - self.alphas.numpy()))
        if exact:
            self.alphas, ends = self.alphas.double(), torch.from_numpy(self.ends)
            self.sigmas = eta * ((1 - ends) / (1 - self.alphas) * (1 - self.alphas / ends)).sqrt()
            self.roots = (1 - self.alphas).sqrt()

    def step(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
        quantize_denoised: bool = False,
        repeat_noise: bool = False,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, Tensor]:
        model, ones = self.model, (len(x), *(1,) * (x.dim() - 1))
        if unconditional_conditioning is None or unconditional_guidance_scale == 1:
            out = model.apply_model(x, t, c)
        else:
            both = torch.cat([unconditional_conditioning, c])
            without, out = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            out = without + unconditional_guidance_scale * (out - without)
        if score_corrector is not None:
            out = score_corrector.modify_score(model, out, x, t, c, **corrector_kwargs)
        a, end, sigma, root = (
            torch.full(ones, float(values[index]), dtype=self.wide)
            for values in (self.alphas, self.ends, self.sigmas, self.roots)
        )
        e, x0 = out, (x - root * out) / a.sqrt()
        if model.parameterization == "v":
            e, x0 = model.predict_eps_from_z_and_v(x, t, out), model.predict_start_from_z_and_v(x, t, out)
        if quantize_denoised:
            x0 = model.quantize(x0)[0]
        direction = (1.0 - end - sigma**2).sqrt() * e
        z = torch.randn(1, *x.shape[1:]).expand(x.shape) if repeat_noise else torch.randn(x.shape)
        noise = sigma * z * temperature
        if noise_dropout > 0:
            noise = torch.nn.functional.dropout(noise, noise_dropout)
        return end.sqrt() * x0 + direction + noise, x0

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...], x_T: Tensor | None = None, **options: Any) -> tuple[Tensor, Any]:
        every, cond = options.pop("every", 100), options.pop("c", None)
        mask, x0 = options.pop("mask", None), options.pop("x0", None)
        x = torch.randn(shape) if x_T is None else x_T
        states, predictions = [x], [x]
        for index in range(len(self.times) - 1, -1, -1):
            t = torch.full((len(x),), int(self.times[index]))
            if mask is not None:
                x = self.model.q_sample(x0, t) * mask + (1.0 - mask) * x
            x, predicted = self.step(x, cond, t, index, **options)
            if index % every == 0 or index == len(self.times) - 1:
                states.append(x)
                predictions.append(predicted)
        return x, {"x_inter": states, "pred_x0": predictions}


def both(steps: int, eta: float, model: Any = None, x_T: Tensor | None = None, **options: Any) -> Any:
    """The host's result and ours, from one seed; the model and the generator must have seen the same."""
    made = []
    for ours in (False, True):
        m = Model() if model is None else model()
        if options.get("score_corrector"):
            options["score_corrector"] = m
        torch.manual_seed(3)
        if ours:
            sampler = DDIMSampler(m)
            names = {"c": "conditioning", "every": "log_every_t", "quantize_denoised": "quantize_x0"}
            renamed = {names.get(name, name): value for name, value in options.items()}
            found = sampler.sample(steps, SHAPE[0], SHAPE[1:], eta=eta, x_T=x_T, verbose=False, **renamed)
        else:
            found = Host(m, steps, eta).sample(SHAPE, x_T, **options)
        made.append((found, torch.get_rng_state(), m.told))
    (theirs, after, told), (ours, ours_after, ours_told) = made
    assert torch.equal(after, ours_after) and told == ours_told
    return theirs, ours


def assert_equal(theirs: Any, ours: Any) -> None:
    states = [(theirs[0], ours[0])]
    for name in ("x_inter", "pred_x0"):
        states += zip(theirs[1][name], ours[1][name], strict=True)
    for a, b in states:
        assert a.dtype is b.dtype and a.stride() == b.stride() and torch.equal(a, b)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "condition": {"c": COND, "every": 2},
    "temperature": {"temperature": 0.7},
    "dropout": {"noise_dropout": 0.3},
    "guidance": {"c": COND, **GUIDED},
    "guidance of 1": {"c": COND, **GUIDED, "unconditional_guidance_scale": 1.0},
    "guidance by a tensor": {"c": COND, **GUIDED, "unconditional_guidance_scale": torch.tensor(2.5)},
    "corrector": {"c": COND, **GUIDED, "score_corrector": True, "corrector_kwargs": {"factor": 0.8}},
    "quantized": {"c": COND, **GUIDED, "quantize_denoised": True},
    "mask": {
        "mask": torch.arange(20.0).reshape(1, 1, 4, 5).remainder(3).clamp(max=1),
        "x0": torch.linspace(-1, 1, 120).reshape(SHAPE),
    },
}


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_same_bits_and_draws(name: str, eta: float) -> None:
    assert_equal(*both(7, eta, **OPTIONS[name]))


@pytest.mark.parametrize("steps", [1, 2, 11, 50])
def test_same_bits_for_any_number_of_steps(steps: int) -> None:
    assert_equal(*both(steps, 0.5, c=COND))


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["plain", "guidance", "quantized", "temperature"])
def test_same_bits_in_other_dtypes(dtype: torch.dtype, eta: float, name: str) -> None:
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    options = {k: v.to(dtype) if k == "c" else v for k, v in OPTIONS[name].items()}
    for start in (x_T.to(dtype), x_T) if dtype is not torch.float64 else (x_T.to(dtype),):
        theirs, ours = both(5, eta, lambda: Model(dtype), start, **options)
        assert_equal(theirs, ours)
        assert ours[0].dtype is torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", ["plain", "guidance", "quantized"])
def test_a_model_that_gives_v(name: str) -> None:
    for eta in (0.0, 0.7):
        assert_equal(*both(7, eta, lambda: Model(parameterization="v"), **OPTIONS[name]))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_layouts(layout: str) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    else:
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    for eta in (0.0, 0.7):
        assert_equal(*both(5, eta, x_T=x))


@pytest.mark.parametrize("name", ["plain", "guidance", "quantized"])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_state_keeps_its_layout_beside_another_of_the_model(name: str, parameterization: str) -> None:
    class Other(Model):
        def apply_model(self, x: Tensor, t: Tensor, c: Any) -> Tensor:
            return super().apply_model(x, t, c).to(memory_format=torch.channels_last)

    for eta in (0.0, 0.7):
        assert_equal(*both(5, eta, lambda: Other(parameterization=parameterization), **OPTIONS[name]))


@pytest.mark.parametrize("shape", [(3, 4), (1, 4, 6), (2, 1, 2, 3, 4), (0, 3, 2, 2)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    for eta in (0.0, 0.7):
        torch.manual_seed(2)
        theirs = Host(Model(), 5, eta).sample(shape)
        torch.manual_seed(2)
        assert_equal(theirs, DDIMSampler(Model()).sample(5, shape[0], shape[1:], eta=eta))


def test_near_the_exact_chain() -> None:
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for eta in (0.0, 0.5, 1.0):
        found = []
        for exact in (True, False):
            torch.manual_seed(6)
            model = Model(torch.float64 if exact else torch.float32)
            found.append(Host(model, 8, eta, exact=exact).sample(SHAPE, x_T.double() if exact else x_T, every=1)[1])
        torch.manual_seed(6)
        ours = DDIMSampler(Model()).sample(8, 2, SHAPE[1:], eta=eta, x_T=x_T, log_every_t=1)[1]
        for name in ("x_inter", "pred_x0"):
            for gold, theirs, mine in zip(found[0][name], found[1][name], ours[name], strict=True):
                assert (mine - gold).abs().max() <= 2 * (theirs - gold).abs().max() + 1e-6


def test_make_schedule_has_the_hosts_buffers() -> None:
    for steps, quad, eta in ((8, False, 0.6), (30, True, 1.0), (1, False, 1.0)):
        sampler = DDIMSampler(Model())
        sampler.make_schedule(steps, "quad" if quad else "uniform", eta, verbose=False)
        host = Host(Model(), steps, eta, quad)
        assert np.array_equal(sampler.ddim_timesteps, host.times)
        for ours, theirs in (
            (sampler.ddim_alphas, host.alphas),
            (sampler.ddim_sigmas, host.sigmas),
            (sampler.ddim_sqrt_one_minus_alphas, host.roots),
            (torch.from_numpy(sampler.ddim_alphas_prev), torch.from_numpy(host.ends)),
        ):
            assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)
        assert torch.equal(sampler.alphas_cumprod, Model().alphas_cumprod)
        assert sampler.alphas_cumprod.dtype is torch.float32
    assert len(set(sampler_of(30, "quad").ddim_timesteps)) < 30  # repeated timesteps are steps of their own


def sampler_of(steps: int, discretize: str = "uniform", eta: float = 0.5, **options: Any) -> Any:
    sampler = DDIMSampler(Model(), **options)
    sampler.make_schedule(steps, discretize, eta, verbose=False)
    return sampler


def test_quad_spacing_and_parts_of_a_chain() -> None:
    sampler, host = sampler_of(30, "quad"), Host(Model(), 30, 0.5, True)
    torch.manual_seed(1)
    theirs = host.sample(SHAPE)
    torch.manual_seed(1)
    assert_equal(theirs, sampler.ddim_sampling(None, SHAPE))
    torch.manual_seed(1)
    host.times, host.alphas = host.times[:11], host.alphas[:11]
    theirs = host.sample(SHAPE)
    torch.manual_seed(1)
    assert_equal(theirs, sampler.ddim_sampling(None, SHAPE, timesteps=12))


def test_repeated_noise_and_single_steps() -> None:
    sampler, host = sampler_of(9), Host(Model(), 9, 0.5)
    x, t = torch.randn(SHAPE), torch.full((2,), 23)
    with torch.no_grad():
        for index in (0, 4, 8):
            torch.manual_seed(1)
            theirs = host.step(x, None, t, index, repeat_noise=True)
            torch.manual_seed(1)
            ours = sampler.p_sample_ddim(x, None, t, index, True)
            assert torch.equal(theirs[0], ours[0]) and torch.equal(theirs[1], ours[1])
            assert ours[0].data_ptr() != x.data_ptr()


def test_original_steps() -> None:
    """There the sigmas are asked of the model, which has none; eta 1 is DDPM's smaller variance."""
    sampler, model = sampler_of(9, eta=1.0), Model()
    model.alphas_cumprod_prev[0] = model.alphas_cumprod[0] + 1e-3
    sampler.model = model
    x, t, index = torch.randn(SHAPE), torch.full((2,), 150), 150
    now, end = model.alphas_cumprod[index], model.alphas_cumprod_prev[index]
    sigma = ((1 - end) / (1 - now) * (1 - now / end)).sqrt()
    torch.manual_seed(1)
    ours, x0 = sampler.p_sample_ddim(x, None, t, index, use_original_steps=True)
    torch.manual_seed(1)
    with torch.no_grad():
        e = model.apply_model(x, t, None)
    expected = (x - model.sqrt_one_minus_alphas_cumprod[index] * e) / now.sqrt()
    assert torch.equal(x0, expected)
    assert torch.equal(ours, end.sqrt() * expected + (1.0 - end - sigma**2).sqrt() * e + sigma * torch.randn(SHAPE))
    sampler.model = Model()
    x, inter = sampler.ddim_sampling(None, SHAPE, ddim_use_original_steps=True, timesteps=20, log_every_t=5)
    assert x.isfinite().all() and len(inter["x_inter"]) == 6
    assert [t[0] for _, t in sampler.model.told] == list(range(19, -1, -1))


def test_encode_and_decode() -> None:
    sampler, model = sampler_of(9), Model()
    x0 = torch.randn(SHAPE)
    for original, signal, noise in (
        (False, sampler.ddim_alphas.sqrt(), sampler.ddim_sqrt_one_minus_alphas),
        (True, sampler.sqrt_alphas_cumprod, sampler.sqrt_one_minus_alphas_cumprod),
    ):
        for dtype in (torch.float32, torch.float16, torch.float64):
            t, x = torch.tensor([7, 2]), x0.to(dtype)
            torch.manual_seed(1)
            ours = sampler.stochastic_encode(x, t, use_original_steps=original)
            torch.manual_seed(1)
            z = torch.randn_like(x)
            expected = per_sample(signal[t], x) * x + per_sample(noise[t], x) * z
            assert ours.dtype is expected.dtype and torch.equal(ours, expected)
            assert torch.equal(sampler.stochastic_encode(x, t, original, noise=z), expected)
    assert sampler.stochastic_encode(x0, torch.tensor([7, 10]))[1].isnan().all()  # no such index
    host = Host(model, 9, 0.5)
    host.times = host.times[:4]
    torch.manual_seed(1)
    theirs, _ = host.sample(SHAPE, x0, c=COND, **GUIDED)
    torch.manual_seed(1)
    assert torch.equal(sampler.decode(x0, COND, 4, 3.0, UNCOND), theirs)


def test_conditions_that_are_dicts_or_lists() -> None:
    torch.manual_seed(1)
    expected, _ = DDIMSampler(Model()).sample(4, 2, SHAPE[1:], COND, **GUIDED)
    for wrap in (lambda c: {"key": c}, lambda c: [c], lambda c: {"key": [c]}):
        torch.manual_seed(1)
        options = GUIDED | {"unconditional_conditioning": wrap(UNCOND)}
        assert torch.equal(DDIMSampler(Model()).sample(4, 2, SHAPE[1:], wrap(COND), **options)[0], expected)
    with pytest.warns(UserWarning, match="conditioning: expected one for each of 3 samples, got 1"):
        DDIMSampler(Model()).sample(1, 3, SHAPE[1:], {"key": [COND[:1]]})


def test_callbacks_see_every_step() -> None:
    seen: list[Any] = []
    sampler = DDIMSampler(Model())
    _, inter = sampler.sample(
        5,
        2,
        SHAPE[1:],
        callback=lambda i: seen.append(i),
        img_callback=lambda x0, i: seen.append((x0, i)),
        log_every_t=1,
    )
    assert seen[::2] == [0, 1, 2, 3, 4] and [i for _, i in seen[1::2]] == [0, 1, 2, 3, 4]
    assert all(torch.equal(a, b) for (a, _), b in zip(seen[1::2], inter["pred_x0"][1:], strict=True))


def test_coefficients_are_read_at_every_step() -> None:
    sampler, host = sampler_of(9), Host(Model(), 9, 0.5)
    x, t, index = torch.randn(SHAPE), torch.full((2,), 23), 5

    def agree() -> bool:
        with torch.no_grad():
            torch.manual_seed(1)
            theirs = host.step(x, None, t, index)[0]
            torch.manual_seed(1)
            return torch.equal(sampler.p_sample_ddim(x, None, t, index)[0], theirs)

    assert agree()
    for name, other in (("ddim_alphas", "alphas"), ("ddim_sigmas", "sigmas"), ("ddim_sqrt_one_minus_alphas", "roots")):
        getattr(sampler, name).mul_(0.9)  # in place
        assert not agree()
        setattr(host, other, getattr(sampler, name).clone())
        assert agree()
        setattr(sampler, name, getattr(sampler, name) * 0.9)
        setattr(host, other, getattr(sampler, name).clone())
        assert agree()
    for buffer, other in (("ddim_alphas", "alphas"), ("ddim_sigmas", "sigmas")):
        tensor = getattr(sampler, buffer)
        tensor.data = tensor * 0.9  # which leaves its version
        assert not agree()
        setattr(host, other, tensor.clone())
        assert agree()
    sampler.ddim_alphas_prev[index] *= 0.9
    assert not agree()
    host.ends = sampler.ddim_alphas_prev.copy()
    assert agree()
    with torch.inference_mode():
        sampler.ddim_sigmas = sampler.ddim_sigmas.clone()
        for _ in range(2):
            sampler.ddim_sigmas.mul_(0.5)
            host.sigmas = sampler.ddim_sigmas.clone()
            assert agree()


def test_a_schedule_made_in_inference_mode() -> None:
    with torch.inference_mode():
        sampler = sampler_of(9)
        assert not sampler.ddim_alphas.is_inference()
        torch.manual_seed(3)
        ours = sampler.ddim_sampling(None, SHAPE)
    torch.manual_seed(3)
    assert_equal(Host(Model(), 9, 0.5).sample(SHAPE), ours)


def test_a_radicand_below_0_is_0() -> None:
    sampler = sampler_of(9, eta=1.0)
    sampler.ddim_sigmas[5] = float(np.sqrt(1 - sampler.ddim_alphas_prev[5])) * (1 + 1e-6)
    x, t = torch.randn(SHAPE), torch.full((2,), 23)
    host = Host(Model(), 9, 1.0)
    host.sigmas = sampler.ddim_sigmas.clone()
    with torch.no_grad():
        torch.manual_seed(1)
        assert host.step(x, None, t, 5)[0].isnan().all()
        torch.manual_seed(1)
        ours, x0 = sampler.p_sample_ddim(x, None, t, 5)
        torch.manual_seed(1)
        end = torch.tensor(host.ends[5], dtype=torch.float32)
        assert torch.equal(ours, end.sqrt() * x0 + host.sigmas[5].float() * torch.randn(SHAPE))


def test_philox_noise_belongs_to_the_sample() -> None:
    seeds = torch.tensor([7, -2, 2**35])
    shape = (3, 2, 4)
    before = torch.get_rng_state()
    for options in ({}, {"temperature": 0.6}, {"quantize_x0": True}):
        whole, _ = DDIMSampler(Model(), noise="philox", seeds=seeds).sample(6, 3, shape, eta=0.8, **options)
        for k in range(3):
            sampler = DDIMSampler(Model(), noise="philox", seeds=seeds[k : k + 1])
            assert torch.equal(sampler.sample(6, 1, shape, eta=0.8, **options)[0][0], whole[k])
    assert torch.equal(torch.get_rng_state(), before)
    sampler, host = sampler_of(9, noise="philox", seeds=11), Host(Model(), 9, 0.5)
    x, t, index = torch.randn(SHAPE), torch.full((2,), int(host.times[4])), 4
    z = fastdiff.normal(SHAPE, 11, t=int(host.times[4]), domain="step")
    for repeat, temperature in ((False, 1.0), (False, 0.5), (True, 1.0)):
        ours, x0 = sampler.p_sample_ddim(x, None, t, index, repeat, temperature=temperature)
        with torch.no_grad():
            e = sampler.model.apply_model(x, t, None)
        end, sigma = (torch.tensor(float(u[index])) for u in (host.ends, host.sigmas))
        noise = (sigma * temperature) * (z[:1] if repeat else z)
        assert torch.equal(ours, end.sqrt() * x0 + (1.0 - end - sigma**2).sqrt() * e + noise)
    sampler = DDIMSampler(Model(), noise="philox")
    torch.manual_seed(1)
    drawn = sampler.sample(6, 2, shape, eta=0.8)[0]
    torch.manual_seed(1)
    assert torch.equal(sampler.sample(6, 2, shape, eta=0.8)[0], drawn)
    assert not torch.equal(sampler.sample(6, 2, shape, eta=0.8)[0], drawn)
    encoded = sampler_of(9, noise="philox", seeds=3).stochastic_encode(x, torch.tensor([7, 2]))
    assert torch.equal(encoded, sampler_of(9, noise="philox", seeds=3).stochastic_encode(x, torch.tensor([7, 2])))


def test_copies_and_pickles() -> None:
    sampler = sampler_of(5)
    torch.manual_seed(1)
    expected = sampler.ddim_sampling(None, SHAPE)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        torch.manual_seed(1)
        assert_equal(expected, twin.ddim_sampling(None, SHAPE))


def test_signatures_are_the_hosts() -> None:
    step = "t index repeat_noise=False use_original_steps=False quantize_denoised=False temperature=1.0"
    guidance = "unconditional_guidance_scale=1.0 unconditional_conditioning=None"
    correct = "score_corrector=None corrector_kwargs=None"
    expected = {
        "__init__": "model schedule=linear **kwargs",
        "register_buffer": "name attr",
        "make_schedule": "ddim_num_steps ddim_discretize=uniform ddim_eta=0.0 verbose=True",
        "sample": "S batch_size shape conditioning=None callback=None normals_sequence=None img_callback=None "
        f"quantize_x0=False eta=0.0 mask=None x0=None temperature=1.0 noise_dropout=0.0 {correct} verbose=True "
        f"x_T=None log_every_t=100 {guidance} **kwargs",
        "ddim_sampling": "cond shape x_T=None ddim_use_original_steps=False callback=None timesteps=None "
        "quantize_denoised=False mask=None x0=None img_callback=None log_every_t=100 temperature=1.0 "
        f"noise_dropout=0.0 {correct} {guidance}",
        "p_sample_ddim": f"x c {step} noise_dropout=0.0 {correct} {guidance}",
        "stochastic_encode": "x0 t use_original_steps=False noise=None",
        "decode": f"x_latent cond t_start {guidance} use_original_steps=False",
    }
    for name, text in expected.items():
        found = []
        for p in list(inspect.signature(getattr(DDIMSampler, name)).parameters.values())[1:]:
            assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_KEYWORD)
            default = "" if p.default is p.empty else f"={p.default}"
            found.append(("**" if p.kind is p.VAR_KEYWORD else "") + p.name + default)
        assert " ".join(found) == text


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"noise": "randn"}, {}, ValueError, "noise: expected one of"),
        ({"seeds": 3}, {}, ValueError, "seeds: expected None with noise='torch'"),
        ({"backend": "gpu"}, {}, ValueError, "backend: expected one of"),
        ({}, {"S": 0}, ValueError, "ddim_num_steps: expected .*, got 0"),
        ({}, {"S": T}, ValueError, "ddim_num_steps: expected .* stay below 200, got 200, whose last is 200"),
        ({}, {"S": 2.5}, TypeError, "ddim_num_steps: expected an int"),
        ({}, {"eta": 1.5}, ValueError, r"ddim_eta: expected a value in \[0, 1\], got 1.5"),
        ({}, {"mask": torch.ones(1)}, ValueError, "x0: expected a tensor with mask, got None"),
        ({"noise": "philox"}, {"noise_dropout": 0.5}, ValueError, "noise_dropout: expected 0 with noise='philox'"),
    ],
)
def test_bad_input(options: dict[str, Any], call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DDIMSampler(Model(), **options).sample(**{"S": 4, "batch_size": 2, "shape": SHAPE[1:]} | call)


def test_before_make_schedule() -> None:
    sampler = DDIMSampler(Model())
    x, t = torch.randn(SHAPE), torch.full((2,), 3)
    for call in (
        lambda original: sampler.p_sample_ddim(x, None, t, 2, use_original_steps=original),
        lambda original: sampler.stochastic_encode(x, t, use_original_steps=original),
        lambda original: sampler.decode(x, None, 3, use_original_steps=original),
        lambda original: sampler.ddim_sampling(None, SHAPE, ddim_use_original_steps=original),
    ):
        for original in (False, True):
            with pytest.raises(ValueError, match="ddim_timesteps: expected those of make_schedule, which was"):
                call(original)
    assert sampler.model.told == []
    assert not hasattr(sampler, "ddim_timesteps")


def test_a_warning_names_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="conditioning: expected one for each of 2 samples, got 1") as caught:
        DDIMSampler(Model()).sample(2, 2, SHAPE[1:], COND[:1])
    assert [warning.filename for warning in caught] == [__file__]


def test_bad_input_of_a_step() -> None:
    sampler = sampler_of(5)
    x, t = torch.randn(SHAPE), torch.full((2,), 3)
    for index, error in ((5, ValueError), (-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="index: expected"):
            sampler.p_sample_ddim(x, None, t, index)
    for call in (
        lambda x: sampler.p_sample_ddim(x, None, t, 2),
        lambda x: sampler.stochastic_encode(x, t),
        lambda x: sampler.decode(x, None, 3),
    ):
        with pytest.raises(TypeError, match=r"x\w*: expected a tensor, got list"):
            call([1.0])
    sampler.model.apply_model = lambda x, t, c: None
    with pytest.raises(TypeError, match="model.apply_model: expected it to return a tensor, got NoneType"):
        sampler.p_sample_ddim(x, None, t, 2)
    sampler.model.apply_model = lambda x, t, c: x[:1]
    with pytest.raises(ValueError, match="model_output: expected"):
        sampler.p_sample_ddim(x, None, t, 2)
    sampler.model.parameterization = "v"
    with pytest.raises(ValueError, match="score_corrector: expected None with a model of parameterization 'v'"):
        sampler.p_sample_ddim(x, None, t, 2, score_corrector=sampler.model)
    with pytest.raises(NotImplementedError, match="ddim_discretize: expected 'uniform' or 'quad', got 'linear'"):
        sampler.make_schedule(5, "linear")
    sampler.model.alphas_cumprod = sampler.model.alphas_cumprod[1:]
    with pytest.raises(ValueError, match="model.alphas_cumprod: expected one for each of 200 timesteps, got 199"):
        sampler.make_schedule(5)
