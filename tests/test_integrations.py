"""Switching an object over and back, and a step in parts."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import integrations, ops, reference, tables
from fastdiff.integrations import _host
from fastdiff.schedules import NoiseSchedule


class Other:
    """Stands for a class of another codebase."""

    def __init__(self) -> None:
        self.weights = torch.arange(3.0)

    def step(self, x: float) -> float:
        return x


class Fused(_host.Switched):
    def step(self, x: float) -> float:
        if self._fastdiff.disabled is not None or x < 0:
            self._fastdiff.fall_back(self._fastdiff.disabled or "negative x")
            return super().step(x)  # type: ignore[misc]
        self._fastdiff.fused += 1
        return 2 * x


def switched(**options: Any) -> Any:
    obj = Other()
    _host.switch(obj, Fused, _host.Options(**options))
    return obj


def test_switch_changes_the_object_alone_and_restore_undoes_it() -> None:
    obj, before = switched(), dict(vars(Other))
    assert isinstance(obj, Other) and obj.step(3.0) == 6.0
    assert type(obj).__name__ == "Other" and type(obj).__module__ == Other.__module__
    assert dict(vars(Other)) == before and Other().step(3.0) == 3.0
    _host.restore(obj)
    assert type(obj) is Other and obj.step(3.0) == 3.0 and vars(obj).keys() == {"weights"}
    _host.restore(obj)
    assert type(obj) is Other


def test_switching_twice_is_once_and_changes_the_options() -> None:
    obj = switched()
    cls = type(obj)
    _host.switch(obj, Fused, _host.Options(noise="philox", seeds=3))
    assert type(obj) is cls and obj._fastdiff.options.seeds == 3
    assert type(switched()) is cls, "objects of a class share one"
    _host.restore(obj)
    assert type(obj) is Other


def test_a_copy_stays_switched_and_a_pickle_holds_the_original() -> None:
    obj = switched(noise="philox", seeds=5)
    obj._fastdiff.tables["known"] = 1
    for twin in (copy.copy(obj), copy.deepcopy(obj)):
        assert type(twin) is type(obj) and twin.step(2.0) == 4.0
        assert twin._fastdiff is not obj._fastdiff
        assert twin._fastdiff.options == obj._fastdiff.options and not twin._fastdiff.tables
    twin = copy.deepcopy(obj)
    assert twin.weights is not obj.weights and torch.equal(twin.weights, obj.weights)
    loaded = pickle.loads(pickle.dumps(obj))
    assert type(loaded) is Other and torch.equal(loaded.weights, obj.weights) and vars(loaded).keys() == {"weights"}
    assert b"fastdiff" not in pickle.dumps(obj)


class Guarded(Other):
    """Has a protocol of its own: a lock that is not copied, a slot, and one who refers back to it."""

    __slots__ = ("slot",)

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.slot, self.owner = threading.Lock(), [1], {"of": self}

    def __getstate__(self) -> Any:
        return {key: value for key, value in vars(self).items() if key != "lock"} | {"slot": self.slot}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.slot = state.pop("slot")
        vars(self).update(state, lock=threading.Lock())


class Copied(Other):
    """Has methods of its own for copies, the one of its class, the other of whatever it is."""

    def __copy__(self) -> Copied:
        twin = Copied()
        twin.weights = self.weights
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo), deep=True)
        return twin


class Slotted(Other):
    __slots__ = ("slot",)


def test_a_copy_is_made_by_the_class() -> None:
    for cls in (Guarded, Copied, Slotted):
        obj: Any = cls()
        obj.self, obj.slot = obj, [1]
        _host.switch(obj, Fused, _host.Options(noise="philox", seeds=5))
        obj._fastdiff.tables["known"] = threading.Lock()
        shallow, deep = copy.copy(obj), copy.deepcopy([obj, obj])
        assert deep[0] is deep[1] and deep[0].self is deep[0]
        for twin in (shallow, deep[0]):
            assert type(twin) is type(obj) and twin.step(2.0) == 4.0
            assert twin._fastdiff is not obj._fastdiff
            assert twin._fastdiff.options.seeds == 5 and not twin._fastdiff.tables
        assert shallow.weights is obj.weights and deep[0].weights is not obj.weights
        if cls is Copied:
            assert not hasattr(shallow, "self") and deep[0].deep
        else:
            assert shallow.slot is obj.slot and deep[0].slot == [1] and deep[0].slot is not obj.slot
        if cls is Guarded:
            assert deep[0].owner["of"] is deep[0] and deep[0].lock is not obj.lock
        assert obj.self is obj and obj._fastdiff.tables
        if cls is not Copied:
            for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
                data = pickle.dumps(obj, protocol)
                loaded = pickle.loads(data)
                assert type(loaded) is cls and loaded.slot == [1] and b"fastdiff" not in data


def test_a_step_that_is_kept_warns_once_for_a_reason() -> None:
    obj = switched()
    with pytest.warns(RuntimeWarning, match="original step is kept: negative x"):
        assert obj.step(-1.0) == -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert obj.step(-2.0) == -2.0 and obj.step(1.0) == 2.0
    assert obj._fastdiff.kept == {"negative x": 2} and obj._fastdiff.fused == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "gauss"}, "noise: expected one of"),
        ({"rounding": "up"}, "rounding: expected one of"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"seeds": 3}, "seeds: expected None with noise='torch'"),
        ({"noise": "philox", "seeds": 2**64}, "seeds: expected an int in"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _host.Options(**options)
    with pytest.raises(TypeError, match="int64"):
        _host.Options(noise="philox", seeds=torch.zeros(2))


def test_an_object_of_no_known_codebase_is_named() -> None:
    for call in (fastdiff.enable, fastdiff.disable, fastdiff.summary):
        with pytest.raises(TypeError, match=r"obj: expected a diffusers pipeline.*, got Other"):
            call(Other())


def test_a_summary_reads_as_text() -> None:
    part = integrations.Part("DDIMScheduler", _host.Options(), 12, {"thresholding": 2})
    text = str(integrations.Summary("diffusers", "Pipeline", {"scheduler": part, "other": None}))
    assert "12 steps fused; 2 kept: thresholding" in text and "other: not enabled" in text


def test_step_seeds_are_drawn_from_what_the_step_is_given() -> None:
    options, cpu = _host.Options(noise="philox"), torch.device("cpu")
    fixed = _host.Options(noise="philox", seeds=7)
    assert _host.step_seeds(fixed, None, 3, cpu) == 7

    def drawn(generator: Any, batch: int) -> Tensor:
        found = _host.step_seeds(options, generator, batch, cpu)
        assert isinstance(found, Tensor) and found.shape == (batch,) and found.dtype == torch.int64
        return found

    g = torch.Generator().manual_seed(1)
    first, second = drawn(g, 4), drawn(g, 4)
    assert not torch.equal(first, second), "each step has noise of its own"
    assert torch.equal(drawn(g.manual_seed(1), 2), first[:2]), "a sample does not depend on the batch"
    several = [torch.Generator().manual_seed(i) for i in (3, 1)]
    assert drawn(several, 2)[1] == drawn(torch.Generator().manual_seed(1), 1)[0]
    torch.manual_seed(0)
    one = drawn(None, 2)
    torch.manual_seed(0)
    assert torch.equal(drawn(None, 2), one)
    assert drawn(None, 0).numel() == 0 and drawn([], 0).numel() == 0
    with pytest.raises(ValueError, match="generator: expected 2"):
        drawn(several[:1], 2)


SCHEDULE = NoiseSchedule.cosine(50)


def cases() -> list[tables.Table]:
    made = []
    for clip in (None, 0.5):
        for prediction in ("eps", "x0", "v", "x_prev"):
            made.append(tables.ddpm_table(SCHEDULE, prediction=prediction, clip=clip))
        made.append(tables.ddpm_table(SCHEDULE, prediction="eps", clip=clip, variance="learned_range"))
        for prediction in ("eps", "x0", "v"):
            for eps in ("raw", "rederived"):
                made.append(tables.ddim_table(SCHEDULE, eta=0.5, prediction=prediction, eps=eps, clip=clip))
        for host in ("openai", "diffusers", "lucidrains"):
            made.append(tables.ddim_table(SCHEDULE, eta=0.5, clip=clip, host=host))
            made.append(tables.ddpm_table(SCHEDULE, clip=clip, host=host))
        made.append(tables.ddim_table(SCHEDULE, eta=0.5, clip=clip, host="diffusers", prediction="v"))
        made.append(tables.ddim_table(SCHEDULE, eta=0.5, clip=clip, host="diffusers", prediction="x0"))
    return made


@pytest.mark.parametrize("number", range(len(cases())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_parts_is_the_step(number: int, dtype: torch.dtype) -> None:
    table = cases()[number]
    torch.manual_seed(number)
    channels = 6 if table.structure.learned else 3
    x, z = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype)
    model_output = torch.randn(2, channels, 5, dtype=dtype)
    for t in (49, 20, 0, torch.tensor([31, 7])):
        whole = ops.step_with_x0(table, model_output, t, x, noise=z, rounding="host")
        parts = _host.step_of_x0(table, model_output, t, x, lambda x0: x0, noise=z)
        for left, right in zip(whole, parts, strict=True):
            assert torch.equal(left, right), (table, t)


def test_what_a_process_changes_is_used_and_then_clipped() -> None:
    table = tables.ddim_table(SCHEDULE, clip=0.5)
    x, m = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    given = torch.full_like(x, 0.25)
    x_prev, x0 = _host.step_of_x0(table, m, 20, x, lambda _: given)
    a0, ae = (table.rows[table.row_of(20), tables.COLUMN[name]].float() for name in ("a0", "ae"))
    assert torch.equal(x0, given) and torch.equal(x_prev, a0 * given + ae * m)
    x_prev, x0 = _host.step_of_x0(table, m, 20, x, lambda _: 4 * given)
    assert (x0 == 0.5).all() and torch.equal(x_prev, a0 * x0 + ae * m)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("t", [30, 0, torch.tensor([30, 0])])
def test_a_learned_step_has_the_exponential_of_torch(variance: str, t: int | Tensor) -> None:
    table = tables.ddpm_table(SCHEDULE, variance=variance, clip=1.0, host="openai")
    torch.manual_seed(3)
    x, z, model_output = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    model_output.requires_grad_()
    row = table.row_of(t) if isinstance(t, int) else None
    found, x0 = _host.learned_step(table, model_output, t, x, row=row, noise=z)
    rows = table.to("cpu", torch.float32)[row if row is not None else table.row_map("cpu")[t]]
    expected, expected_x0 = reference.step(rows, table.structure, x, model_output, z=z, torch_math=True)
    assert expected_x0 is not None
    assert torch.equal(found, expected) and torch.equal(x0, expected_x0)
    (ours,) = torch.autograd.grad(found.sum(), model_output)
    (theirs,) = torch.autograd.grad(expected.sum(), model_output)
    torch.testing.assert_close(ours, theirs)


def test_parts_that_a_table_does_not_have() -> None:
    forward = tables.add_noise_table(SCHEDULE)
    with pytest.raises(ValueError, match="predicts x0"):
        tables.x0_table(forward)
    with pytest.raises(ValueError, match="linear in x"):
        tables.eps_table(forward)
    with pytest.raises(ValueError, match="term in x0"):
        tables.given_x0_table(tables.ddpm_table(SCHEDULE, prediction="x_prev"))
    with pytest.raises(ValueError, match="learns the variance"):
        tables.fixed_table(forward)
    trained = tables.ddpm_table(torch.from_numpy(SCHEDULE.alphas_cumprod.copy()).requires_grad_())
    with pytest.raises(ValueError, match="do not require grad"):
        tables.x0_table(trained)


def test_a_process_leaves_the_layout_of_the_state() -> None:
    table = tables.ddim_table(SCHEDULE, clip=0.5)
    x, m = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for state, output in ((x, m), (m, x)):
        found = _host.step_of_x0(table, output, 20, state, lambda x0: x0, noise=None)
        whole = ops.step_with_x0(table, output, 20, state)
        for left, right in zip(found, whole, strict=True):
            assert torch.equal(left, right) and left.stride() == right.stride() == state.stride()


def test_a_warning_names_the_line_of_the_caller() -> None:
    obj = switched()
    with pytest.warns(RuntimeWarning) as caught:
        obj.step(-1.0)
    assert caught[0].filename == __file__


class Derived(_host._class_of(Fused, Other)):  # type: ignore[misc]
    """A class that somebody has derived from one of fastdiff's."""

    def step(self, x: float) -> float:
        return float(super().step(x) + 1)


def test_a_class_derived_from_ours_stays_itself() -> None:
    obj = Derived()
    assert obj.step(2.0) == 5.0 and obj._fastdiff.fused == 1
    for twin in (pickle.loads(pickle.dumps(obj)), copy.copy(obj), copy.deepcopy(obj)):
        assert type(twin) is Derived and twin.step(2.0) == 5.0 and twin._fastdiff.fused == 1
    assert _host._STATE not in vars(pickle.loads(pickle.dumps(obj)))
    with pytest.raises(TypeError, match="expected an object that was enabled, got a Derived"):
        _host.restore(obj)
    assert type(obj) is Derived


def test_switching_again_counts_on() -> None:
    obj = switched()
    with pytest.warns(RuntimeWarning):
        obj.step(-1.0)
    _host.switch(obj, Fused, _host.Options(noise="philox"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obj.step(-1.0)
    assert obj._fastdiff.kept == {"negative x": 2}


def test_the_modules_are_attributes_of_the_package() -> None:
    code = "import fastdiff; print(fastdiff.integrations.sprites.__name__, hasattr(fastdiff.integrations, 'other'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["fastdiff.integrations.sprites", "False"]


def test_what_is_not_installed_is_named() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import fastdiff.integrations.diffusers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "expected diffusers to be installed (pip install diffusers)" in run.stderr
