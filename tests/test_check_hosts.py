"""The check on real objects of other codebases."""

import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.check import CheckError, check
from fastdiff.check.report import advice
from fastdiff.check.subjects import subject_of
from fastdiff.integrations import openai

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def without_repeats(monkeypatch):
    monkeypatch.setattr("fastdiff.check._ROUND", 0.0)


@pytest.fixture
def diffusers():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    return importlib.import_module("diffusers")


@pytest.fixture
def pipeline(diffusers):
    """Makes a pipeline with a random network of 8 channels."""

    def make(name, **options):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        )
        scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
        made = getattr(diffusers, f"{name}Pipeline")(unet, scheduler)
        made.set_progress_bar_config(disable=True)
        return made

    return make


def is_fused(report, steps, shape, dtype="float32"):
    """The results are equal, all steps are fused, and the time in them is known."""
    assert report.status == 0 and report.comparison.bits and report.starts is None, str(report)
    assert (report.fused, report.kept, report.steps) == (steps, {}, steps)
    assert report.state == (shape, dtype, "cpu")
    for side in (report.without, report.enabled):
        assert side.timed > side.steps > 0
    return report


def test_a_pipeline_is_run_by_itself(pipeline, diffusers):
    class Short(diffusers.DDIMPipeline):
        def __call__(self, batch_size=1, generator=None, num_inference_steps=5, output_type="pil"):
            return super().__call__(batch_size, generator, 0.0, num_inference_steps, output_type=output_type)

    made = pipeline("DDIM")
    pipe = Short(made.unet, made.scheduler)
    pipe.set_progress_bar_config(disable=True)
    before = dict(vars(pipe.scheduler)), dict(vars(pipe.unet))
    report = is_fused(check(pipe, runs=1), 5, [1, 3, 8, 8])
    assert report.name == "Short (DDIMScheduler)" and report.host == "diffusers"
    assert report.without.timed > report.without.network > report.without.steps
    assert vars(pipe.unet) == before[1] and vars(pipe.scheduler).keys() <= before[0].keys() | {"_step_index"}
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pipeline_with_a_run(pipeline, dtype):
    pipe = pipeline("DDPM").to(dtype=getattr(torch, dtype))

    def run(pipe):
        return pipe(batch_size=2, num_inference_steps=4, output_type="pt")

    report = check((pipe, run), runs=1)
    is_fused(report, 4, [2, 3, 8, 8], dtype)
    assert check((pipe, run), runs=1, noise="philox").status == 0


def test_a_pipeline_with_a_prompt_needs_a_run(pipeline, diffusers):
    class Prompted(diffusers.DDPMPipeline):
        def __call__(self, prompt=None, generator=None):
            return self.unet

    pipe = pipeline("DDPM")
    with pytest.raises(CheckError, match=r"\(Prompted, run\), as a Prompted takes prompt") as caught:
        subject_of(Prompted(pipe.unet, pipe.scheduler))
    assert "def factory():" in str(caught.value)
    with pytest.raises(CheckError, match="as a DDPMScheduler is not called itself"):
        subject_of(pipe.scheduler)


def test_the_scheduler_of_a_policy(diffusers):
    scheduler = diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    network = torch.nn.Linear(2, 2)

    def run(scheduler):
        x = torch.randn(1, 16, 2)
        scheduler.set_timesteps(5)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(network(x), t, x).prev_sample
        return x

    report = is_fused(check((scheduler, run), runs=1), 5, [1, 16, 2])
    assert report.without.network is None
    report = is_fused(check((scheduler, run, network), runs=1), 5, [1, 16, 2])
    assert report.without.network > 0 and "forward" not in vars(network)
    ours = sys.modules["fastdiff.integrations.diffusers"].DDPMScheduler.from_config(scheduler.config)
    kind = type(ours)
    is_fused(check((ours, run), runs=1), 5, [1, 16, 2])
    assert type(ours) is kind


def test_a_scheduler_with_a_step_of_its_own_is_kept(pipeline, diffusers):
    class Mine(diffusers.DDIMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    pipe = pipeline("DDIM")
    pipe.scheduler = Mine.from_config(pipe.scheduler.config)
    report = check((pipe, lambda pipe: pipe(num_inference_steps=3, output_type="np")), runs=1)
    assert report.status == 0 and report.fused == 0 and sum(report.kept.values()) == 3
    assert "Mine has a step of its own" in str(report) and advice(report).startswith("Nothing to gain here")
    assert type(pipe.scheduler) is Mine


@pytest.mark.parametrize("kind", ["class", "type"])
def test_a_scheduler_that_the_run_replaces(pipeline, diffusers, kind):
    pipe = pipeline("DDIM")
    before = pipe.scheduler

    def run(pipe):
        cls = diffusers.DDIMScheduler if kind == "class" else type(pipe.scheduler)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        return pipe(num_inference_steps=3, output_type="np")

    report = check((pipe, run), runs=1)
    assert report.status == 0 and report.steps == 3 and report.replaced == ["scheduler"]
    assert report.fused == (0 if kind == "class" else 3) and (report.without.steps is None) == (kind == "class")
    assert ("the run replaces scheduler of the object" in advice(report)) == (kind == "class")
    assert pipe.scheduler is before and type(before) is diffusers.DDIMScheduler
    assert "step" in vars(diffusers.DDIMScheduler) and not hasattr(diffusers.DDIMScheduler.step, "__wrapped__")


def test_a_step_that_is_an_attribute_of_the_object(diffusers):
    scheduler = diffusers.DDIMScheduler(20)
    own = scheduler.step
    scheduler.step = lambda *args, **options: own(*args, **options)

    def run(scheduler):
        x = torch.ones(1, 4)
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            x = scheduler.step(x / 2, t, x).prev_sample
        return x

    with pytest.warns(RuntimeWarning, match="this DDIMScheduler has a step of its own"):
        report = check((scheduler, run), runs=1)
    assert report.steps == 3 and report.fused == 0 and "every step was left to the original code" in advice(report)


def test_steps_that_are_compiled(diffusers):
    scheduler = diffusers.DDIMScheduler(20)

    def run(scheduler):
        x = torch.ones(1, 4)
        scheduler.set_timesteps(2)
        step = torch.compile(lambda eps, t, x: scheduler.step(eps, t, x, return_dict=False)[0], backend="eager")
        for t in scheduler.timesteps:
            x = step(x / 2, t, x)
        return x

    report = check((scheduler, run), runs=1)
    assert report.steps == 0 and report.fused == 0 and "They are compiled" in advice(report)
    assert "note      no step was seen" in str(report)


def test_copies_of_a_scheduler_and_of_a_diffusion(diffusers, lucidrains):
    scheduler = diffusers.DDPMScheduler(20)

    def run(scheduler):
        x = torch.randn(1, 16, 2)
        pickle.dumps(scheduler)
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            x = scheduler.step(x / 2, t, x).prev_sample
        return x

    is_fused(check((scheduler, run), runs=1), 5, [1, 16, 2])
    network = lucidrains.Unet(dim=8, dim_mults=(1, 2), flash_attn=False)
    diffusion = lucidrains.GaussianDiffusion(network, image_size=8, timesteps=4)
    report = check((diffusion, lambda diffusion: copy.deepcopy(diffusion).sample(batch_size=1)), runs=1)
    assert is_fused(report, 4, [1, 3, 8, 8]).without.network > 0


def test_a_result_that_only_fastdiff_has_finite(diffusers):
    scheduler = diffusers.DDPMScheduler(20, variance_type="fixed_large_log")

    def run(scheduler):
        scheduler.set_timesteps(2)
        x = torch.ones(1, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(x / 2, t, x).prev_sample
        return x

    report = check((scheduler, run), runs=1)
    assert report.status == 1 and advice(report).startswith("Without fastdiff the result has NaN or Inf, in 4 values")


def test_a_scheduler_of_another_family(pipeline, diffusers):
    pipe = pipeline("DDPM")
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(CheckError, match="EulerDiscreteScheduler"):
        check(pipe)


@pytest.mark.parametrize("variance", ["FIXED_LARGE", "LEARNED_RANGE"])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_a_diffusion_of_openai(variance, loop):
    diffusion = openai.SpacedDiffusion(
        use_timesteps=openai.space_timesteps(20, "5"),
        betas=np.linspace(1e-4, 0.02, 20),
        model_mean_type=openai.ModelMeanType.EPSILON,
        model_var_type=openai.ModelVarType[variance],
        loss_type=openai.LossType.MSE,
    )
    network = torch.nn.Conv2d(3, 3 if variance == "FIXED_LARGE" else 6, 3, padding=1)

    class Model(torch.nn.Module):
        def forward(self, x, t):
            return network(x) * t.float().view(-1, 1, 1, 1) / 20

    model, kind = Model(), type(diffusion)
    report = check((diffusion, lambda d: getattr(d, loop)(model, (2, 3, 4, 4), device="cpu")), runs=1)
    is_fused(report, 5, [2, 3, 4, 4])
    assert report.host == "openai" and report.without.network > 0
    assert type(diffusion) is kind and "forward" not in vars(model)
    with pytest.raises(CheckError, match="run with a model and a shape"):
        subject_of(diffusion)


@pytest.fixture
def lucidrains():
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        pytest.skip("denoising-diffusion-pytorch is not installed")
    return importlib.import_module("lucidrains_host")


@pytest.mark.parametrize("sampling_timesteps", [4, 2])
def test_a_diffusion_of_lucidrains(lucidrains, sampling_timesteps):
    torch.manual_seed(0)
    network = lucidrains.Unet(dim=8, dim_mults=(1, 2), flash_attn=False)
    diffusion = lucidrains.GaussianDiffusion(
        network, image_size=8, timesteps=4, sampling_timesteps=sampling_timesteps, ddim_sampling_eta=1.0
    )
    kind, attributes = type(diffusion), dict(vars(diffusion))
    report = check((diffusion, lambda diffusion: diffusion.sample(batch_size=2)), runs=1)
    is_fused(report, sampling_timesteps, [2, 3, 8, 8])
    assert report.host == "lucidrains" and report.without.network > 0
    assert type(diffusion) is kind and vars(diffusion) == attributes and "forward" not in vars(network)
    assert subject_of(copy.deepcopy(diffusion)).run is not None


def test_enabled_objects_stay_enabled(pipeline):
    pipe = fastdiff.enable(pipeline("DDIM"))
    kind, state = type(pipe.scheduler), pipe.scheduler._fastdiff
    check((pipe, lambda pipe: pipe(num_inference_steps=2, output_type="np")), runs=1)
    assert type(pipe.scheduler) is kind and pipe.scheduler._fastdiff is state and state.fused == 0
