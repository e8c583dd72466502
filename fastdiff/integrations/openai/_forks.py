"""Whether an object computes what a GaussianDiffusion of OpenAI's does, found out by trying it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._hooks import Found, Hooks
from .._host import State
from ._kept import HOOKS, PREDICTIONS, READ, STEPS, VARIANCES, Result, name_of

# those that a step reads; _scale_timesteps and _wrap_model are the object's own, and read what they like
_NAMES = {"model_mean_type", "model_var_type", *HOOKS, *(name for names in READ.values() for name in names)}
_METHODS = (*sorted({*HOOKS} - {"_scale_timesteps", "_wrap_model"}), *STEPS, "q_sample")
_KEYS = {"mean", "variance", "log_variance", "pred_xstart", "sample", "extra", *PREDICTIONS, *VARIANCES}
_KEYS |= {"clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "eta"}
_NUMBERS = (-1, 0, 1, 2)  # others may be sizes that the object looks out for
_MAX_TRIED = 1000  # timesteps of an object that is compared
_FEW = 8  # of them, in most of the cases


class Probed(NamedTuple):
    """What was seen of an object: why methods are not to be fused, and whether its coefficients are full tensors.

    Such coefficients, the first operands, make its results contiguous (DiT); others leave them the layout of a sample.
    """

    reasons: dict[str, str]
    hooks: Found  # the methods that this was seen of
    dense: bool = False


def probe(diffusion: Any, original_class: type, methods: list[str]) -> Probed:
    """Run the methods of a switched object as they are and fused, on a few numbers, and compare.

    methods: those that would be fused. Nothing of the object or of torch's generator is changed. Besides, the code of
    its steps must not look at attributes or keys that a fused step would not know of, whatever they did in this run.
    """
    hooks = Hooks(diffusion, original_class, _METHODS, names=_NAMES, keys=_KEYS, numbers=_NUMBERS)
    if hooks.reason is not None:
        return Probed(dict.fromkeys(methods, hooks.reason), hooks)
    reasons: dict[str, str] = {}
    dense = False
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        for method in methods:
            try:
                for case in _cases(diffusion, method):
                    expected = _expected(diffusion, original_class, method, case)
                    if expected is None:
                        continue
                    if method == "q_sample" and case.x.dtype == torch.float32 and not case.x.is_contiguous():
                        dense = expected[0]["sample"].is_contiguous()
                    found = _run(_twin(diffusion, type(diffusion), Probed({}, hooks, dense)), method, case)
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
    return Probed(reasons, hooks, dense)


class _Case(NamedTuple):
    """Arguments of one trial.

    needed: whether an object has to manage it.  module: whether the model is one of torch.
    """

    x: Tensor
    t: Tensor
    options: dict[str, Any]
    needed: bool = True
    module: bool = False


def _cases(diffusion: Any, method: str) -> Iterator[_Case]:
    total = len(diffusion.betas)
    every = torch.arange(0, total, -(-total // _MAX_TRIED), device="cpu")
    few = every[:: -(-len(every) // _FEW)]
    back = few.flip(0)
    x, wide = _state(few, 2, 3, 2), _state(every, 2, 3, 2).to(memory_format=torch.channels_last)
    double = x.double().to(memory_format=torch.channels_last)
    large, sequences = _state(back, 5, 9, 8), _state(back, 5, 3)
    if method == "q_sample":
        yield _Case(wide, every, {})
        yield _Case(large, back, {"noise": large.flip(0)})
        yield _Case(sequences, back, {}, needed=False)
        yield _Case(x.bfloat16(), few, {})
        yield _Case(double, few, {}, needed=False)
        return
    yield _Case(wide, every, {"clip_denoised": False})
    yield _Case(large, back, {"denoised_fn": lambda x0: 0.9 * x0, "model_kwargs": {"y": back}}, module=True)
    yield _Case(sequences, back, {}, needed=False)
    yield _Case(x.bfloat16(), few, {"clip_denoised": False})
    yield _Case(double, few, {}, needed=False)
    parameters = inspect.signature(getattr(type(diffusion), method)).parameters
    if method == "ddim_sample":
        yield _Case(x, few, {"eta": 0.5})
    if "cond_fn" in parameters:
        yield _Case(x, few, {"cond_fn": _Recorder(False), "model_kwargs": {"y": few}})


def _state(t: Tensor, *shape: int) -> Tensor:
    numbers = torch.linspace(-40, 40, len(t) * math.prod(shape), device="cpu", dtype=torch.float32)
    return numbers.sin().reshape(-1, *shape)


def _expected(diffusion: Any, original_class: type, method: str, case: _Case) -> tuple[Result, list[Any]] | None:
    """What the object gives by its own code; None where it need not manage the case, and does not."""
    twin = _twin(diffusion, original_class, None)
    if case.needed:
        return _run(twin, method, case)
    try:
        found = _run(twin, method, case)
    except Exception:  # of whatever a fork does
        return None
    return found if found[0]["sample"].shape == case.x.shape else None


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


class _Module(torch.nn.Module):
    """One that is a module."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.recorder(x, t, **kwargs)


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
    found = getattr(twin, method)(_Module(model) if case.module else model, case.x, case.t, **options)
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
