"""Whether an object computes what a GaussianDiffusion of OpenAI's does, found out by trying it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._hooks import Hooks
from .._host import State
from ._kept import HOOKS, PREDICTIONS, READ, STEPS, VARIANCES, Result, name_of

# those that a step reads; _scale_timesteps and _wrap_model are the object's own, and read what they like
_NAMES = {"model_mean_type", "model_var_type", *HOOKS, *(name for names in READ.values() for name in names)}
_METHODS = (*sorted({*HOOKS} - {"_scale_timesteps", "_wrap_model"}), *STEPS, "q_sample")
_KEYS = {"mean", "variance", "log_variance", "pred_xstart", "sample", "extra", *PREDICTIONS, *VARIANCES}
_KEYS |= {"clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "eta"}
_MAX_TRIED = 1000  # timesteps of an object that is compared


class Probed(NamedTuple):
    """What was seen of an object: why methods are not to be fused, and whether its coefficients are full tensors.

    Such coefficients, the first operands, make its results contiguous (DiT); others leave them the layout of a sample.
    """

    reasons: dict[str, str]
    dense: bool = False
    hooks: Hooks | None = None


def probe(diffusion: Any, original_class: type, methods: list[str]) -> Probed:
    """Run the methods of a switched object as they are and fused, on a few numbers, and compare.

    methods: those that would be fused. Nothing of the object or of torch's generator is changed. Besides, the code of
    its steps must not look at attributes or keys that a fused step would not know of, whatever they did in this run.
    """
    hooks = Hooks(diffusion, original_class, _METHODS, names=_NAMES, keys=_KEYS)
    if hooks.reason is not None:
        return Probed(dict.fromkeys(methods, hooks.reason))
    reasons: dict[str, str] = {}
    dense = False
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        for method in methods:
            try:
                for case in _cases(diffusion, method):
                    expected = _run(_twin(diffusion, original_class, None), method, case)
                    if method == "q_sample" and not case.x.is_contiguous():
                        dense = expected[0]["sample"].is_contiguous()
                    found = _run(_twin(diffusion, type(diffusion), Probed({}, dense)), method, case)
                    difference = _difference(expected, found, exact="cond_fn" not in case.options)
                    if difference is not None:
                        reasons[method] = f"{method} of {original_class.__name__} computes something else: {difference}"
                        break
            except Exception as error:  # of whatever a fork does
                if isinstance(error, IndexError) and len(diffusion.betas) == 1:
                    continue  # which breaks the tables of the codebases, and needs none of them
                reasons[method] = (
                    f"{method} of {original_class.__name__} could not be tried ({type(error).__name__}: {error})"
                )
    return Probed(reasons, dense, hooks)


class _Case(NamedTuple):
    """Arguments of one trial."""

    x: Tensor
    t: Tensor
    options: dict[str, Any]


def _cases(diffusion: Any, method: str) -> Iterator[_Case]:
    total = len(diffusion.betas)
    t = torch.arange(0, total, -(-total // _MAX_TRIED), device="cpu")
    x = torch.linspace(-40, 40, 12 * len(t), device="cpu", dtype=torch.float32).sin().reshape(-1, 2, 3, 2)
    wide = x.to(memory_format=torch.channels_last)
    if method == "q_sample":
        yield _Case(wide, t, {})
        yield _Case(x, t, {"noise": x.flip(0)})
        yield _Case(x.bfloat16(), t, {})
        return
    yield _Case(wide, t, {"clip_denoised": False})
    yield _Case(x, t, {})
    yield _Case(x, t, {"denoised_fn": lambda x0: 0.9 * x0, "model_kwargs": {"y": t}})
    yield _Case(x.bfloat16(), t, {"clip_denoised": False})
    parameters = inspect.signature(getattr(type(diffusion), method)).parameters
    if method == "ddim_sample":
        yield _Case(x, t, {"eta": 0.5})
    if "cond_fn" in parameters:
        yield _Case(x, t, {"cond_fn": _Recorder(False), "model_kwargs": {"y": t}})


class _Recorder:
    """A model, or the gradient of a classifier, that knows what it was called with."""

    def __init__(self, learned: bool) -> None:
        self.learned = learned
        self.calls: list[Any] = []

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append((t.dtype, t.tolist(), sorted(kwargs)))
        time = torch.sin(0.01 * t.float() + 0.3).to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
        output = 0.8 * torch.tanh(1.3 * x) + 0.1 * time
        return torch.cat([output, 1.2 * torch.tanh(0.7 * x + time)], dim=1) if self.learned else output


def _twin(diffusion: Any, cls: type, probed: Probed | None) -> Any:
    """The object with a class, its attributes its own."""
    twin: Any = object.__new__(cls)
    attributes = {name: value for name, value in vars(diffusion).items() if not isinstance(value, State)}
    twin.__dict__.update(attributes)
    if probed is not None:
        twin._fastdiff.tables["probed"] = probed
    return twin


def _run(twin: Any, method: str, case: _Case) -> tuple[Result, list[Any]]:
    torch.default_generator.manual_seed(0)  # that of the CPU alone
    if method == "q_sample":
        return {"sample": twin.q_sample(case.x, case.t, **case.options)}, []
    model = _Recorder(name_of(twin.model_var_type).startswith("LEARNED"))
    options = dict(case.options)
    if "cond_fn" in options:
        options["cond_fn"] = _Recorder(False)
    found = getattr(twin, method)(model, case.x, case.t, **options)
    calls = model.calls + (options["cond_fn"].calls if "cond_fn" in options else [])
    return found, [*calls, torch.randn(1, device="cpu").item()]


def _difference(expected: tuple[Result, list[Any]], found: tuple[Result, list[Any]], exact: bool) -> str | None:
    if expected[1] != found[1]:
        return "another call of the model, or other draws"
    if expected[0].keys() != found[0].keys():
        return f"it gives {sorted(expected[0])}"
    for name, theirs in expected[0].items():
        ours = found[0][name]
        if theirs.dtype != ours.dtype or theirs.shape != ours.shape:
            return f"{name} of another dtype or shape"
        # the layout of the next step's noise; a predicted x0 may be a part of the model output there
        if name == "sample" and theirs.stride() != ours.stride():
            return "sample of another layout"
        there = torch.isfinite(theirs)  # a step that breaks down in float32 is made right
        apart = (theirs.double() - ours.double())[there].abs()
        # torch's roots and exponentials may differ by an ulp between one number and many
        allowed = 0.0 if exact and name == "pred_xstart" else 1e-6 * float(theirs[there].double().abs().max())
        if apart.numel() and not float(apart.max()) <= allowed:
            return f"{name} differs by {float(apart.max()):.2g}"
    return None
