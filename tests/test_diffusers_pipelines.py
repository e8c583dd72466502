"""Real pipelines of diffusers, from small random configs: the same images with and without fastdiff."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

import fastdiff  # noqa: E402
from fastdiff.integrations import diffusers as ours  # noqa: E402

# a step that falls back fails a test
pytestmark = pytest.mark.filterwarnings("error:fastdiff:RuntimeWarning")


def unet(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model.to(dtype).eval()


def unconditional(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(num_train_timesteps=40, **config)
    pipeline = {"DDPMScheduler": diffusers.DDPMPipeline, "DDIMScheduler": diffusers.DDIMPipeline}[name]
    found = pipeline(unet=unet(dtype), scheduler=scheduler)
    found.set_progress_bar_config(disable=True)
    return found


def stable_diffusion(cls: str = "StableDiffusionPipeline", scheduler: Any = None, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )
    if scheduler is None:
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False
        )
    found = getattr(diffusers, cls)(
        vae=vae.to(dtype).eval(),
        text_encoder=None,
        tokenizer=None,
        unet=network.to(dtype).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    found.set_progress_bar_config(disable=True)
    return found


def prompts(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(1)
    embeds = torch.randn(2, 5, 16, dtype=dtype)
    return {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": torch.zeros_like(embeds),
        "height": 16,
        "width": 16,
        "output_type": "pt",
        "num_inference_steps": 4,
    }


def same_images(pipe: Any, run: Callable[[Any], Any], steps: int | None = None) -> None:
    """The images of a pipeline are the same before it is enabled, while it is, and after it was disabled."""
    images = []
    for change in (lambda p: p, fastdiff.enable, fastdiff.disable):
        change(pipe)
        torch.manual_seed(3)
        found = run(pipe)
        images.append(torch.as_tensor(found[0] if isinstance(found, tuple) else found.images))
        part = fastdiff.summary(pipe).parts["scheduler"]
        if part is not None:
            assert part.fused and not part.kept and (steps is None or part.fused == steps)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "options"), [("DDPMScheduler", {}), ("DDIMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})]
)
def test_unconditional_pipelines(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    for config in ({}, {"prediction_type": "v_prediction", "thresholding": True}):
        pipe = unconditional(name, dtype, **config)
        same_images(pipe, lambda p: p(batch_size=2, num_inference_steps=5, output_type="pt", **options), 5)
    generators = lambda: [torch.Generator().manual_seed(k) for k in range(2)]  # noqa: E731
    same_images(pipe, lambda p: p(2, generators(), num_inference_steps=5, output_type="pt", **options), 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_text_to_image(dtype: torch.dtype, eta: float) -> None:
    pipe = stable_diffusion(dtype=dtype)
    same_images(pipe, lambda p: p(**prompts(dtype), eta=eta), 4)
    same_images(pipe, lambda p: p(**prompts(dtype), eta=eta, generator=torch.Generator().manual_seed(1)), 4)


def test_text_to_image_by_ddpm() -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    pipe = stable_diffusion(scheduler=scheduler)
    same_images(pipe, lambda p: p(**prompts()), 4)
    custom = {name: value for name, value in prompts().items() if name != "num_inference_steps"}
    same_images(pipe, lambda p: p(**custom, timesteps=[900, 300, 20]), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_to_image(dtype: torch.dtype) -> None:
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline", dtype=dtype)
    image = torch.linspace(0, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    given = {name: value for name, value in prompts(dtype).items() if name not in ("height", "width")}
    same_images(pipe, lambda p: p(image=image, strength=0.6, eta=0.5, **given), 2)


def test_inpainting() -> None:
    pipe = stable_diffusion("StableDiffusionInpaintPipeline")
    image = torch.linspace(0, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    same_images(pipe, lambda p: p(image=image, mask_image=mask, strength=1.0, **prompts()), 4)
    same_images(pipe, lambda p: p(image=image, mask_image=mask, strength=0.6, **prompts()), 2)


def test_callbacks_see_and_change_the_same_latents() -> None:
    pipe = stable_diffusion()
    seen: list[list[Tensor]] = []

    def run(p: Any) -> Any:
        seen.append([])

        def callback(pipeline: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen[-1].append(given["latents"].clone())
            if index == 1:
                given["latents"].mul_(0.5)  # results are theirs to write into
                pipeline.scheduler.config.clip_sample = True
            return given

        p.scheduler.config.clip_sample = False
        return p(**prompts(), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])

    same_images(pipe, run)
    assert all(all(map(torch.equal, seen[0], other)) for other in seen[1:])


def test_a_scheduler_by_import_or_from_config() -> None:
    pipe = stable_diffusion()
    torch.manual_seed(3)
    expected = pipe(**prompts(), eta=0.4).images
    pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
    torch.manual_seed(3)
    assert torch.equal(pipe(**prompts(), eta=0.4).images, expected)
    assert fastdiff.summary(pipe).parts["scheduler"].fused == 4
    # a pipeline made with it, or from it, has it too
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.scheduler is pipe.scheduler
    built = diffusers.DDPMPipeline(unet=unet(), scheduler=ours.DDPMScheduler(num_train_timesteps=40))
    assert type(built.scheduler) is ours.DDPMScheduler


def test_a_pipeline_that_makes_its_own_scheduler() -> None:
    """DDIMPipeline takes a DDIMScheduler of diffusers in place of whatever it is given."""
    pipe = diffusers.DDIMPipeline(unet=unet(), scheduler=diffusers.DDPMScheduler(num_train_timesteps=40))
    pipe.set_progress_bar_config(disable=True)
    same_images(pipe, lambda p: p(num_inference_steps=5, output_type="np", eta=0.3), 5)
    fastdiff.enable(pipe)
    again = fastdiff.enable(diffusers.DDIMPipeline(**pipe.components))
    assert type(again.scheduler) is type(pipe.scheduler) is ours.DDIMScheduler
    for built in (
        diffusers.DDIMPipeline(unet=unet(), scheduler=ours.DDIMScheduler()),
        diffusers.DDIMPipeline.from_pipe(pipe),
    ):
        assert "scheduler: not enabled" in str(fastdiff.summary(built))
        assert "scheduler: DDIMScheduler enabled" in str(fastdiff.summary(fastdiff.enable(built)))


def test_philox_images_do_not_depend_on_the_batch() -> None:
    pipe = fastdiff.enable(unconditional("DDPMScheduler"), noise="philox", seeds=torch.tensor([5, 6]))
    start = torch.randn(2, 3, 8, 8)
    pipe.scheduler.set_timesteps(5)

    def chain(x: Tensor) -> Tensor:
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(torch.tanh(x), t, x).prev_sample
        return x

    both = chain(start)
    fastdiff.enable(pipe, noise="philox", seeds=torch.tensor([6]))
    assert torch.equal(chain(start[1:]), both[1:])


# Saved, loaded, copied.


def images_of(pipe: Any) -> Tensor:
    # weights of a file lie in memory as they lie there, and kernels differ by that in the last bit
    for weight in pipe.unet.parameters():
        weight.data = weight.data.clone()
    torch.manual_seed(3)
    return torch.as_tensor(pipe(batch_size=1, num_inference_steps=3, output_type="np").images)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_pipelines_save_load_pickle_and_copy(name: str, tmp_path: Path) -> None:
    pipe = fastdiff.enable(unconditional(name))
    expected = images_of(pipe)
    twin = copy.deepcopy(pipe)
    assert type(twin.scheduler) is getattr(ours, name) and torch.equal(images_of(twin), expected)
    fastdiff.disable(twin)
    assert type(pipe.scheduler) is getattr(ours, name)

    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.json"):
        assert "fastdiff" not in file.read_text()
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is getattr(diffusers, name) and torch.equal(images_of(loaded), expected)
    assert torch.equal(images_of(fastdiff.enable(loaded)), expected)

    blob = pickle.dumps(pipe)
    assert b"fastdiff" not in blob
    unpickled = pickle.loads(blob)
    assert type(unpickled.scheduler) is getattr(diffusers, name) and torch.equal(images_of(unpickled), expected)
    buffer = io.BytesIO()
    torch.save(pipe.scheduler, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is getattr(diffusers, name)


def test_what_is_saved_is_read_where_fastdiff_is_not(tmp_path: Path) -> None:
    pipe = fastdiff.enable(unconditional("DDPMScheduler"))
    torch.save(images_of(pipe), tmp_path / "images.pt")
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "scheduler.pkl").write_bytes(pickle.dumps(pipe.scheduler))
    program = textwrap.dedent(
        """
        import pickle, sys
        sys.modules["fastdiff"] = None  # to import it is an error
        import torch
        from diffusers import DDPMPipeline

        torch.set_num_threads(1)
        pipe = DDPMPipeline.from_pretrained("pipeline")
        pipe.set_progress_bar_config(disable=True)
        for weight in pipe.unet.parameters():
            weight.data = weight.data.clone()
        torch.manual_seed(3)
        images = torch.as_tensor(pipe(batch_size=1, num_inference_steps=3, output_type="np").images)
        assert torch.equal(images, torch.load("images.pt"))
        scheduler = pickle.load(open("scheduler.pkl", "rb"))
        assert type(scheduler).__module__ == "diffusers.schedulers.scheduling_ddpm"
        assert len(scheduler.step(images, 13, images).prev_sample) == 1
        """
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# Networks that are compiled or channels_last.


def test_compiled_and_channels_last_networks() -> None:
    options = {"num_inference_steps": 4, "output_type": "np", "batch_size": 2}
    for name, extra in (("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 0.5})):
        pipe = unconditional(name)
        pipe.unet.to(memory_format=torch.channels_last)
        same_images(pipe, lambda p, given=options | extra: p(**given), 4)
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    same_images(pipe, lambda p: p(**options, eta=0.5), 4)
    torch._dynamo.reset()


# The loop of a policy: a chain at every observation, over (batch, horizon, action).


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_the_loop_of_a_policy(name: str) -> None:
    class Policy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.noise_scheduler = getattr(diffusers, name)(
                num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True, prediction_type="epsilon"
            )
            self.model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

        def forward(self, generator: torch.Generator) -> Tensor:
            trajectory = torch.randn(4, 16, 2, generator=generator)
            self.noise_scheduler.set_timesteps(10)
            for t in self.noise_scheduler.timesteps:
                trajectory[:, :2] = 0.1  # the part that is known
                time = t.expand(4, 16, 1).float() / 100
                output = self.model(torch.cat([trajectory, time], dim=-1))
                trajectory = self.noise_scheduler.step(output, t, trajectory, generator=generator).prev_sample
            return trajectory

    plain, fused = Policy(), Policy()
    fastdiff.enable(fused.noise_scheduler)
    with torch.no_grad():
        for seed in range(3):
            a, b = (policy(torch.Generator().manual_seed(seed)) for policy in (plain, fused))
            assert torch.equal(a, b)
    # training, and the weights of an average that are copied
    target = copy.deepcopy(fused)
    noise, clean, t = torch.randn(4, 16, 2), torch.randn(4, 16, 2), torch.tensor([0, 5, 50, 99])
    assert torch.equal(*(p.noise_scheduler.add_noise(clean, noise, t) for p in (plain, target)))
    assert fastdiff.summary(fused.noise_scheduler).parts[""].fused == 30


def test_a_pipeline_of_which_one_scheduler_cannot_be_enabled() -> None:
    pipe = stable_diffusion(scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1))
    pipe.low_res_scheduler = diffusers.DDPMScheduler()
    with pytest.warns(RuntimeWarning, match="scheduler is not enabled: .*got EulerDiscreteScheduler") as warned:
        fastdiff.enable(pipe)
    assert len(warned) == 1 and warned[0].filename == __file__
    text = str(fastdiff.summary(pipe))
    assert "  scheduler: not enabled" in text and "  low_res_scheduler: DDPMScheduler enabled" in text
    fastdiff.disable(pipe)
    assert type(pipe.low_res_scheduler) is diffusers.DDPMScheduler


def test_pipelines_that_cannot_be_enabled() -> None:
    pipe = stable_diffusion(scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1))
    with pytest.raises(ValueError, match="got EulerDiscreteScheduler"):
        fastdiff.enable(pipe)
    assert fastdiff.summary(pipe).parts == {"scheduler": None}
    fastdiff.disable(pipe)
    pipe.scheduler = None
    with pytest.raises(TypeError, match="expected a scheduler or a pipeline that has one"):
        fastdiff.enable(pipe)
