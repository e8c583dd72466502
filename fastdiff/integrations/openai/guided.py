"""The names of guided-diffusion (Dhariwal and Nichol 2021) with its order of arguments, cond_fn before model_kwargs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._diffusion import (
    Diffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    Spaced,
    betas_for_alpha_bar,
    get_named_beta_schedule,
    space_timesteps,
)
from ._steps import Forward, Function, GuidedAncestral, GuidedDDIM, Result, Reverse

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "SpacedDiffusion",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
    "space_timesteps",
]


class GaussianDiffusion(GuidedAncestral, GuidedDDIM, Reverse, Forward, Diffusion):  # type: ignore[misc]  # the order of the codebase
    __doc__ = Diffusion.__doc__

    def p_sample_loop(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples [B, C, ...] of a whole chain, without gradients.

        Args:
            shape: of the samples, a tuple or a list.
            noise: x_T; None draws it.
            device: None is that of the model's parameters; of a plain function, that of noise, or torch's default.
            progress: show a bar (tqdm).
            The others as for `p_sample`.
        """
        for found in self.p_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
        ):
            final = found
        return final["sample"]

    def p_sample_loop_progressive(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Result]:
        """The steps of `p_sample_loop`, as p_sample gives them."""
        yield from self._chain(
            self.p_sample,
            model,
            shape,
            noise,
            device,
            progress,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
        )

    def ddim_sample_loop(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Samples of a chain by DDIM; see `p_sample_loop`. eta: 0 for a deterministic path, 1 for the noise of DDPM."""
        for found in self.ddim_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            eta=eta,
        ):
            final = found
        return final["sample"]

    def ddim_sample_loop_progressive(
        self,
        model: Function,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Function | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Result]:
        """The steps of `ddim_sample_loop`, as ddim_sample gives them."""
        yield from self._chain(
            self.ddim_sample,
            model,
            shape,
            noise,
            device,
            progress,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )


class SpacedDiffusion(Spaced, GaussianDiffusion):  # type: ignore[misc]  # the order of the codebase
    __doc__ = Spaced.__doc__
