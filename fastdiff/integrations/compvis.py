"""CompVis' DDIMSampler (latent-diffusion, stable-diffusion; DDIM: Song et al. 2021, arXiv:2010.02502), fused steps.

    from fastdiff.integrations.compvis import DDIMSampler

takes the place of `from ldm.models.diffusion.ddim import DDIMSampler`. The same seed gives the same latents, bit for
bit on a CPU: the coefficients are the sampler's own buffers, read at every step, and torch.randn is called as there.
The model is any object with the attributes that are read: num_timesteps, betas, alphas_cumprod, alphas_cumprod_prev,
device, apply_model(x, t, c), and where they are used q_sample, first_stage_model.quantize, parameterization,
sqrt_one_minus_alphas_cumprod, predict_start_from_z_and_v and predict_eps_from_z_and_v.

What differs: buffers and tensors stay on the model's device, which need not be CUDA; nothing is printed; the state may
have any number of dimensions above 0; a number of steps that leads to timestep T is refused by name (there an
IndexError); use_original_steps works (there the model is asked for sigmas that only the sampler has); and where float32
takes the radicand of the direction below 0, which gives NaN there, it is 0.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import mersenne, ops
from .. import noise as contract
from ..hosts import compvis_ddim, compvis_encode
from ..schedules import integer, real
from ..tables import COLUMN, Table, fill_columns, given_x0_table, table_of, x0_table
from ._host import Options, _callers_level, step_seeds

_HALF = (torch.float16, torch.bfloat16)


class _Kept:
    """The tables of a schedule's coefficients, good until one of these is replaced or changed.

    sources: alphas, those of the steps' ends, sigmas, sqrt(1 - alphas), tensors or arrays [S] in ascending order, and
    the timesteps unless they are the numbers of the rows.  device: where the coefficients are computed.
    """

    def __init__(self, sources: tuple[Any, ...], device: torch.device) -> None:
        # of a tensor its version (none in inference mode) and place, of an array, which has none, its values
        self.sources = [(u, _version(u), None if isinstance(u, Tensor) else list(u)) for u in sources]
        with torch.inference_mode(False):
            numbers = [torch.as_tensor(u).to(device, torch.float32).flip(0) for u in sources[:4]]
        times = list(range(len(numbers[0]))) if len(sources) == 4 else [int(t) for t in sources[4]]
        columns = fill_columns(compvis_ddim, *numbers)
        self.table = table_of("ddim", columns, times[::-1], clip=None, host="compvis")
        self.sigmas: list[float] = numbers[2].tolist()
        self.variants: dict[float | None, Table] = {1.0: self.table}

    def holds(self, sources: tuple[Any, ...], index: int) -> bool:
        """Whether the row of an index is still that of the sources."""
        for source, (known, version, values) in zip(sources, self.sources, strict=True):
            if source is not known:
                return False
            if values is None:
                if version is None or (source._version, source.data_ptr()) != version:
                    return False
            elif source[index] != values[index]:
                return False
        return True

    def scaled(self, temperature: float | None) -> Table:
        """The table with the noise times a temperature; None for noise that has been scaled already."""
        found = self.variants.get(temperature)
        if found is None:
            rows, s = self.table.rows, COLUMN["s"]
            rows[:, s] = 1.0 if temperature is None else (rows[:, s].float() * temperature).double()
            found = Table(rows, self.table.structure, self.table.timesteps, name="ddim", host="compvis")
            if len(self.variants) < 16:  # a temperature that is annealed must not fill the memory
                self.variants[temperature] = found
        return found


def _version(source: Any) -> tuple[int, int] | None:
    if not isinstance(source, Tensor) or source.is_inference():
        return None
    return source._version, source.data_ptr()  # the version stays when .data is given another tensor


class DDIMSampler:
    """latent-diffusion's sampler of ldm.models.diffusion.ddim, with stable-diffusion's stochastic_encode and decode.

    Args:
        model: see the module.
        schedule: kept as an attribute, and not used, as there.
        **kwargs: noise, seeds and backend as for `fastdiff.enable`. With "philox" the noise is made inside the step,
            and the initial one by `fastdiff.normal`, independent of batch and device. Others are ignored, as there.

    Raises:
        ValueError: an unknown option.
    """

    ddim_timesteps: np.ndarray
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    ddim_sigmas: Tensor
    ddim_alphas: Tensor
    ddim_alphas_prev: np.ndarray
    ddim_sqrt_one_minus_alphas: Tensor
    ddim_sigmas_for_original_num_steps: Tensor

    def __init__(self, model: Any, schedule: str = "linear", **kwargs: Any) -> None:
        super().__init__()
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule
        self._options = Options(**{name: kwargs[name] for name in ("noise", "seeds", "backend") if name in kwargs})
        self._kept: dict[tuple[str, torch.device], _Kept] = {}

    def register_buffer(self, name: str, attr: Any) -> None:
        """Set an attribute, a tensor on the model's device."""
        if type(attr) is Tensor:
            attr = attr.to(self.model.device)
        setattr(self, name, attr)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Make the timesteps and coefficients of a chain, attributes with the names and values that they have there.

        Timesteps are one above those of "uniform" (every T // ddim_num_steps, which may be more than asked for) or
        "quad" (squares up to 0.8*T), and the chain ends at alphas_cumprod[0], not at 1.

        Raises:
            TypeError, ValueError: a bad argument, by name; ddim_num_steps for which the timesteps reach
                model.num_timesteps.
            NotImplementedError: another ddim_discretize, as there.
        """
        eta = real("ddim_eta", ddim_eta)
        if not 0 <= eta <= 1:
            raise ValueError(f"ddim_eta: expected a value in [0, 1], got {ddim_eta}")
        self.ddim_timesteps = _timesteps(ddim_discretize, ddim_num_steps, self.ddpm_num_timesteps)
        model, device = self.model, self.model.device
        if model.alphas_cumprod.shape[0] != self.ddpm_num_timesteps:
            raise ValueError(
                f"model.alphas_cumprod: expected one for each of {self.ddpm_num_timesteps} timesteps, got "
                f"{model.alphas_cumprod.shape[0]}"
            )

        def buffer(values: Any) -> Tensor:
            return torch.as_tensor(values).detach().to(torch.float32, copy=True).to(device)

        # what is made in inference mode has no version, by which a change of it could be seen
        with torch.inference_mode(False):
            alphas_cumprod = model.alphas_cumprod.detach().cpu()
            on_host = alphas_cumprod.numpy()
            self.register_buffer("betas", buffer(model.betas))
            self.register_buffer("alphas_cumprod", buffer(alphas_cumprod))
            self.register_buffer("alphas_cumprod_prev", buffer(model.alphas_cumprod_prev))
            # NumPy's roots, which are not torch's
            self.register_buffer("sqrt_alphas_cumprod", buffer(np.sqrt(on_host)))
            self.register_buffer("sqrt_one_minus_alphas_cumprod", buffer(np.sqrt(1.0 - on_host)))
            self.register_buffer("log_one_minus_alphas_cumprod", buffer(np.log(1.0 - on_host)))
            self.register_buffer("sqrt_recip_alphas_cumprod", buffer(np.sqrt(1.0 / on_host)))
            self.register_buffer("sqrt_recipm1_alphas_cumprod", buffer(np.sqrt(1.0 / on_host - 1)))
            alphas = alphas_cumprod[self.ddim_timesteps]
            previous = np.append(on_host[:1], on_host[self.ddim_timesteps[:-1]])
            if len(alphas) > 1:  # there a list of numbers, which NumPy takes as float64
                previous = previous.astype(np.float64)
            ahead = torch.from_numpy(previous)
            variance = (1 - alphas).reciprocal() * (1 - ahead) * (1 - alphas.to(ahead.dtype) / ahead)
            self.register_buffer("ddim_sigmas", eta * torch.from_numpy(np.sqrt(variance.numpy())))
            self.register_buffer("ddim_alphas", alphas)
            self.register_buffer("ddim_alphas_prev", previous)
            self.register_buffer("ddim_sqrt_one_minus_alphas", torch.from_numpy(np.sqrt(1.0 - alphas.numpy())))
            now, then = self.alphas_cumprod, self.alphas_cumprod_prev
            sigmas = eta * torch.sqrt((1 - then) / (1 - now) * (1 - now / then))
            self.register_buffer("ddim_sigmas_for_original_num_steps", sigmas)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], object] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Make the schedule of S steps and sample batch_size latents of a shape: see `ddim_sampling`.

        normals_sequence, verbose and kwargs are not used, and quantize_x0 is its quantize_denoised.
        """
        first = conditioning
        while isinstance(first, (dict, list)) and first:
            first = first[0] if isinstance(first, list) else next(iter(first.values()))
        if first is not None and first.shape[0] != batch_size:
            warnings.warn(
                f"conditioning: expected one for each of {batch_size} samples, got {first.shape[0]}",
                stacklevel=_callers_level(),
            )
        self.make_schedule(ddim_num_steps=S, ddim_eta=eta, verbose=verbose)
        return self.ddim_sampling(
            conditioning,
            (batch_size, *shape),
            callback=callback,
            img_callback=img_callback,
            quantize_denoised=quantize_x0,
            mask=mask,
            x0=x0,
            ddim_use_original_steps=False,
            noise_dropout=noise_dropout,
            temperature=temperature,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            x_T=x_T,
            log_every_t=log_every_t,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
        )

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], object] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """The chain of the schedule: the latents, and some on the way.

        Args:
            cond: the condition, handed to model.apply_model.
            shape: (B, ...) of the latents.
            x_T: where to start; drawn unless given.
            ddim_use_original_steps: all timesteps of the training schedule, or the first `timesteps` of them.
            timesteps: a part of the chain, as there: of its S steps the first min(timesteps, S) - 1.
            callback, img_callback: called as callback(i) and img_callback(pred_x0, i) after step i.
            mask, x0: where mask is 1, x0 as noised by model.q_sample takes the place of the latents before every step.
            log_every_t: how often states are kept in "x_inter" and "pred_x0".
            quantize_denoised, temperature, noise_dropout, score_corrector, corrector_kwargs,
                unconditional_guidance_scale, unconditional_conditioning: see `p_sample_ddim`.

        Raises:
            TypeError, ValueError: a bad argument, by name.
        """
        if not ddim_use_original_steps:
            self._expect_schedule()
        device = self.model.betas.device
        if mask is not None and x0 is None:
            raise ValueError("x0: expected a tensor with mask, got None")
        if x_T is not None:
            img = x_T
        elif self._options.noise == "philox":
            img = contract.normal(tuple(shape), self._options.seeds, device=device)
        else:
            img = torch.randn(tuple(shape), device=device)
        chain: Sequence[int] | np.ndarray
        if ddim_use_original_steps:
            chain = range(self.ddpm_num_timesteps if timesteps is None else timesteps)
        elif timesteps is None:
            chain = self.ddim_timesteps
        else:
            count = self.ddim_timesteps.shape[0]
            chain = self.ddim_timesteps[: int(min(timesteps / count, 1) * count) - 1]

        intermediates = {"x_inter": [img], "pred_x0": [img]}
        for i, index in enumerate(_bar(range(len(chain) - 1, -1, -1), "DDIM Sampler")):
            t = torch.full((shape[0],), int(chain[index]), device=device, dtype=torch.long)
            if mask is not None:
                img = self.model.q_sample(x0, t) * mask + (1.0 - mask) * img
            img, pred_x0 = self.p_sample_ddim(
                img,
                cond,
                t,
                index=index,
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(img)
                intermediates["pred_x0"].append(pred_x0)
        return img, intermediates

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """One step: x_{t-1} and the predicted x0, float32, or float64 for a float64 x.

        Equivalent to, with the coefficients of the schedule at index:

            e = uncond + unconditional_guidance_scale * (cond - uncond)
            pred_x0 = (x - sqrt_one_minus_alpha * e) / alpha.sqrt()
            x_prev = alpha_prev.sqrt() * pred_x0 + (1 - alpha_prev - sigma**2).sqrt() * e + sigma * z * temperature

        Args:
            x: x_t, [B, ...].
            c: the condition; t: int64 [B], what the model is told.
            index: of the step in the schedule: 0 for the last one, which ends the chain.
            repeat_noise: one noise for all samples.
            use_original_steps: the coefficients of the training schedule.
            quantize_denoised: predicted x0 goes through model.first_stage_model.quantize.
            temperature: factor of the noise.
            noise_dropout: the probability with which an element of the noise is dropped; with noise "philox" 0.
            score_corrector, corrector_kwargs: changes e by its modify_score(model, e, x, t, c, **corrector_kwargs).
            unconditional_guidance_scale, unconditional_conditioning: guidance by one call of the model on both
                conditions (tensors, or dicts and lists of them), unless the scale is 1 or the second is None.

        A model whose parameterization is "v" (stable-diffusion 2) gives x0 and e by its own methods.

        Raises:
            TypeError, ValueError: a bad argument, by name.
        """
        _expect_tensor("x", x)
        kept = self._table(use_original_steps, x.device, index)
        row = len(kept.table) - 1 - index
        output, uncond = self._outputs(x, c, t, unconditional_guidance_scale, unconditional_conditioning)
        is_v = getattr(self.model, "parameterization", "eps") == "v"
        # coefficients are float32 tensors with dimensions there, which widen halves
        width = torch.promote_types(torch.promote_types(x.dtype, output.dtype), torch.float32)
        guidance: dict[str, Any] = {}
        if uncond is not None:
            scale = unconditional_guidance_scale
            plain = is_v or quantize_denoised or score_corrector is not None or output.dtype is not width
            if plain or not isinstance(scale, (int, float)):
                output = uncond + scale * (output - uncond)
            else:
                guidance = {"uncond_output": uncond, "guidance_scale": scale}
        if score_corrector is not None:
            if is_v:
                raise ValueError("score_corrector: expected None with a model of parameterization 'v'")
            output = score_corrector.modify_score(self.model, output, x, t, c, **(corrector_kwargs or {}))
        state = x if x.dtype is width else x.to(width)
        if output.dtype is not width and (output.dtype not in _HALF or width is torch.float64):
            output = output.to(width)
        where: dict[str, Any] = {"row": row, "backend": self._options.backend}
        if not is_v and not quantize_denoised:
            table, noise = self._noise(kept, row, x, width, repeat_noise, temperature, noise_dropout)
            return ops.step_with_x0(table, output, None, state, **where, **guidance, **noise)
        if is_v:
            e = self.model.predict_eps_from_z_and_v(x, t, output)
            pred_x0 = self.model.predict_start_from_z_and_v(x, t, output)
        else:
            e, pred_x0 = output, ops.step(x0_table(kept.table), output, None, state, **where)
        if quantize_denoised:
            pred_x0, *_ = self.model.first_stage_model.quantize(pred_x0)
        table, noise = self._noise(kept, row, x, width, repeat_noise, temperature, noise_dropout)
        pred_x0, e = pred_x0.to(width), e.to(width)
        if e.stride() != pred_x0.stride():  # in the place of the state, whose layout the step keeps
            e = torch.empty_like(pred_x0).copy_(e)
        return ops.step_with_x0(given_x0_table(table), pred_x0, None, e, **where, **noise)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x_t of the forward process at the indices t, int64 [B], of the schedule, or of the training schedule.

        Noise is drawn like x0 unless given. NaN for a sample whose index is none of the schedule.

        Raises:
            TypeError, ValueError: a bad argument, by name.
        """
        _expect_tensor("x0", x0)
        table = self._encoder(use_original_steps, x0.device)
        width = torch.promote_types(x0.dtype, torch.float32)
        source: dict[str, Any]
        if noise is not None:
            source = {"noise": noise.to(width)}
        elif self._options.noise == "philox":
            source = {"seeds": step_seeds(self._options, None, x0.shape[0], x0.device)}
        else:
            source = {"noise": torch.randn_like(x0).to(width)}
        return ops.step(table, None, t, x0.to(width), backend=self._options.backend, **source)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
    ) -> Tensor:
        """The last t_start steps of the chain, from x_latent.  TypeError, ValueError: as `p_sample_ddim`."""
        _expect_tensor("x_latent", x_latent)
        if not use_original_steps:
            self._expect_schedule()
        timesteps = np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps
        timesteps = timesteps[:t_start]
        x_dec = x_latent
        for index in _bar(range(len(timesteps) - 1, -1, -1), "Decoding image"):
            t = torch.full((x_latent.shape[0],), int(timesteps[index]), device=x_latent.device, dtype=torch.long)
            x_dec, _ = self.p_sample_ddim(
                x_dec,
                cond,
                t,
                index=index,
                use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
        return x_dec

    def _outputs(self, x: Tensor, c: Any, t: Tensor, scale: Any, unconditional: Any) -> tuple[Tensor, Tensor | None]:
        """What the model gives with the condition and, where there is guidance, without."""
        if unconditional is None or scale == 1.0:
            found, uncond = self.model.apply_model(x, t, c), None
        else:
            both = self.model.apply_model(torch.cat([x] * 2), torch.cat([t] * 2), _join(unconditional, c))
            uncond, found = both.chunk(2)
        if not isinstance(found, Tensor):
            raise TypeError(f"model.apply_model: expected it to return a tensor, got {type(found).__name__}")
        return found, uncond

    def _noise(
        self,
        kept: _Kept,
        row: int,
        x: Tensor,
        width: torch.dtype,
        repeat: bool,
        temperature: float,
        dropout: float,
    ) -> tuple[Table, dict[str, Any]]:
        """The table that a step takes, and the noise for it."""
        noisy = kept.table.structure.variance != "none"
        if self._options.noise == "philox":
            if dropout > 0.0:
                raise ValueError(f"noise_dropout: expected 0 with noise='philox', got {dropout}")
            if not noisy:
                return kept.table, {}
            seeds = step_seeds(self._options, None, x.shape[0], x.device)
            if repeat:
                seeds = contract.seeds(seeds, x.shape[0], x.device)[:1].repeat(x.shape[0])
            return kept.scaled(temperature), {"seeds": seeds}
        z = mersenne.default_randn((1, *x.shape[1:]) if repeat else x.shape, x.device)  # drawn where it is not used too
        if repeat:
            z = z.repeat(x.shape[0], *(1,) * (x.dim() - 1))
        if not dropout > 0.0:
            if not noisy:
                return kept.table, {}
            if temperature == 1.0 and z.dtype is width:
                return kept.table, {"noise": z}
        z = z * kept.sigmas[row] * temperature
        if dropout > 0.0:
            z = torch.nn.functional.dropout(z, p=dropout)
        return (kept.scaled(None), {"noise": z.to(width)}) if noisy else (kept.table, {})

    def _table(self, use_original_steps: bool, device: torch.device, index: int) -> _Kept:
        """The rows of the sampler's coefficients as they are now, the first index last."""
        model = self.model
        if use_original_steps:
            sigmas = getattr(model, "ddim_sigmas_for_original_num_steps", None)
            if sigmas is None:
                self._expect_schedule()
                sigmas = self.ddim_sigmas_for_original_num_steps
            roots = model.sqrt_one_minus_alphas_cumprod
            sources: tuple[Any, ...] = model.alphas_cumprod, model.alphas_cumprod_prev, sigmas, roots
        else:
            self._expect_schedule()
            roots = self.ddim_sqrt_one_minus_alphas
            sources = self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas, roots, self.ddim_timesteps
        if type(index) is not int or not 0 <= index < roots.shape[0]:
            index = integer("index", index, 0, roots.shape[0] - 1)
        key = ("original" if use_original_steps else "ddim", device)
        kept = self._kept.get(key)
        if kept is None or not kept.holds(sources, index):
            kept = self._kept[key] = _Kept(sources, device)
        return kept

    def _expect_schedule(self) -> None:
        if not hasattr(self, "ddim_timesteps"):
            raise ValueError("ddim_timesteps: expected those of make_schedule, which was not called")

    def _encoder(self, use_original_steps: bool, device: torch.device) -> Table:
        self._expect_schedule()
        with torch.inference_mode(False):
            if use_original_steps:
                signal, noise = self.sqrt_alphas_cumprod.to(device), self.sqrt_one_minus_alphas_cumprod
            else:
                signal, noise = self.ddim_alphas.to(device).sqrt(), self.ddim_sqrt_one_minus_alphas
            columns = compvis_encode(signal, noise.to(device))
            return table_of("encode", columns, list(range(len(signal))), clip=None, host="compvis")


def _expect_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _timesteps(discretize: str, steps: int, total: int) -> np.ndarray:
    steps = integer("ddim_num_steps", steps, 1, total)
    if discretize == "uniform":
        found = np.arange(0, total, total // steps)
    elif discretize == "quad":
        found = (np.linspace(0, np.sqrt(total * 0.8), steps) ** 2).astype(int)
    else:
        raise NotImplementedError(f"ddim_discretize: expected 'uniform' or 'quad', got {discretize!r}")
    if found[-1] + 1 >= total:
        raise ValueError(
            f"ddim_num_steps: expected a number of steps whose timesteps, shifted up by one, stay below {total}, got "
            f"{steps}, whose last is {found[-1] + 1}"
        )
    return found + 1


def _join(unconditional: Any, conditional: Any) -> Any:
    """Two conditions as one of twice the batch."""
    if isinstance(conditional, dict):
        return {name: _join(unconditional[name], value) for name, value in conditional.items()}
    if isinstance(conditional, list):
        return [_join(left, right) for left, right in zip(unconditional, conditional, strict=True)]
    return torch.cat([unconditional, conditional])


def _bar(indices: range, name: str) -> Iterable[int]:
    """With a bar where tqdm is installed."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return indices
    found: Iterable[int] = tqdm(indices, desc=name)
    return found
