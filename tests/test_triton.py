"""The Triton kernels without a GPU: interpreted, compiled for two architectures, and how they are launched."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from fastdiff import noise, tables, triton_kernels  # noqa: E402
from fastdiff.tables import Structure  # noqa: E402

HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90)
THREADS = 32 * triton_kernels._OPTIONS["num_warps"]
PER_THREAD = triton_kernels._TILE // THREADS
# Instructions that an H200 issues while it copies a byte (33.45 T/s over 4.3 TB/s, computed): with more, a kernel would
# not be bound by memory.
SLOTS_PER_BYTE = 33.45 / 4.3
# fused multiply-adds as written: of a Box-Muller pair, and of exp in float32
PAIR_FMAS, EXP_FMAS = 1 + 7 + 1 + 4 + 4, 2 + 6


def test_interpreted():
    """The kernels in Triton's interpreter, in a process of its own: see triton_interpreter.py."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            str(HERE / "triton_interpreter.py"),
        ],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 800
    assert "skipped" not in result.stdout


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What is compiled here is compiled by this Triton from these sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Compiled:
    """A kernel compiled offline: its PTX, its machine code and what it takes of the machine."""

    def __init__(self, kernel, arch, types, constants, aligned, options=triton_kernels._OPTIONS):
        signature, constexprs, attributes = {}, {}, {}
        constants = {
            "SHARED_T": True,
            "SHARED_SCALE": True,
            "WIDE_UNCOND": False,
            "HALF": False,
            "DIVISOR": 8,
            "MASKED": False,
            "MANY": False,
            "TILE": triton_kernels._TILE,
        } | constants
        for index, parameter in enumerate(kernel.params):
            name = parameter.name
            if parameter.is_constexpr:
                signature[name], constexprs[(index,)] = "constexpr", constants[name]
            elif parameter.annotation_type:
                signature[name] = parameter.annotation_type
            elif name not in types:
                signature[name], constexprs[(index,)] = "constexpr", None
            else:
                signature[name] = types[name]
                if aligned and name not in triton_kernels._SMALL:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        self.ptx = compiled.asm["ptx"]
        self.shared = compiled.metadata.shared
        cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = self.dump("--dump-resource-usage", cubin)
        self.registers, self.stack, self.local = (
            int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
        )
        self.sass = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", self.dump("-sass", cubin), re.MULTILINE
        )

    @staticmethod
    def dump(option, cubin):
        result = subprocess.run([TOOLS / "cuobjdump", option, cubin], capture_output=True, text=True, check=True)
        return result.stdout

    def count(self, pattern):
        return len(re.findall(pattern, self.ptx))

    @property
    def per_element(self):
        """Instructions of a thread for each of its elements, slow paths included."""
        return len([name for name in self.sass if name not in ("NOP", "BRA")]) / PER_THREAD


CLIPPED_DDPM = Structure(ax=True, clip=True, variance="fixed")
DDIM = Structure(eps="output", ae=True)
EVERY_DIVISION = Structure(x0_divide=True, eps="rederived", eps_divide=True, ae=True, clip=True)
LEARNED = Structure(ax=True, clip=True, variance="learned_range")
PLAIN = Structure(ax=True, clip=True, variance="learned_plain")
FORWARD = Structure(x0="none", a0=False, ax=True, variance="fixed")

# name: structure, operands read, whether noise is drawn in the kernel, explicit fused multiply-adds per element
STEPS = {
    "ddim": (DDIM, ("x", "model_output"), False, 0),
    "ddpm_noise": (CLIPPED_DDPM, ("x", "model_output", "noise"), False, 0),
    "ddpm_seeds": (CLIPPED_DDPM, ("x", "model_output"), True, PAIR_FMAS / 2),
    "divisions": (EVERY_DIVISION, ("x", "model_output"), False, 0),
    "guidance": (DDIM, ("x", "model_output", "uncond_output"), False, 0),
    "learned": (LEARNED, ("x", "model_output", "model_output"), True, PAIR_FMAS / 2 + EXP_FMAS),
    "learned_plain": (PLAIN, ("x", "model_output", "model_output", "noise"), False, 0),
    "add_noise": (FORWARD, ("x",), True, PAIR_FMAS / 2),
}
BACKWARDS = {
    "ddim": (DDIM, ("grad",), ("grad_x", "grad_model_output"), False, 0),
    "divisions": (
        EVERY_DIVISION,
        ("grad", "grad_second", "x", "model_output"),
        ("grad_x", "grad_model_output"),
        False,
        0,
    ),
    "learned": (
        LEARNED,
        ("grad", "x", "model_output", "model_output"),
        ("grad_x", "grad_model_output", "grad_model_output"),
        True,
        PAIR_FMAS / 2 + EXP_FMAS,
    ),
}


@functools.cache
def compiled_step(name, arch, dtype, flags=0, aligned=True, **constants):
    structure, reads, seeds, _ = STEPS[name]
    types = dict.fromkeys(("out", *reads), POINTERS[dtype]) | table_types(dtype, seeds, "uncond_output" in reads)
    constants = {"FLAGS": structure.flags | flags, "HALF": seeds and dtype.itemsize == 2} | constants
    return Compiled(triton_kernels._step_kernel, arch, types, constants, aligned)


@functools.cache
def compiled_backward(name, arch, dtype):
    structure, reads, writes, seeds, _ = BACKWARDS[name]
    types = dict.fromkeys((*reads, *writes), POINTERS[dtype]) | table_types(dtype, seeds, False)
    constants = {
        "FLAGS": structure.flags,
        "HALF": seeds and dtype.itemsize == 2,
        "X0_REACHED": structure.a0,
        "X0_MASKED": structure.clip,
        "VARIED": structure.learned,
    }
    return Compiled(triton_kernels._backward_kernel, arch, types, constants, True)


def compiled_sums(structure, arch, dtype, seeds, distance=False, guidance=False):
    reads = ["grad", "x", "model_output", *["uncond_output"] * guidance, *["x_prev"] * distance]
    reads += [] if seeds else ["noise"]
    types = dict.fromkeys((*reads, "grad_x", "grad_model_output"), POINTERS[dtype])
    types |= table_types(dtype, seeds, guidance)
    types |= dict.fromkeys(["partials", *["grad_distance"] * distance], POINTERS[noise.compute_dtype(dtype)])
    constants = {
        "FLAGS": structure.flags,
        "HALF": seeds and dtype.itemsize == 2,
        "X0_REACHED": True,
        "X0_MASKED": structure.clip,
        "VARIED": structure.learned,
        "MASKED": True,
    }
    options = triton_kernels._SUM_OPTIONS
    return Compiled(triton_kernels._backward_kernel, arch, types, constants, True, options)


def table_types(dtype, seeds, guidance):
    wide = POINTERS[noise.compute_dtype(dtype)]
    types = {"table": wide}
    if seeds:
        types["seeds"] = "*i64"
    if guidance:
        types["guidance_scale"] = wide
    return types


def check_arithmetic(kernel, dtype, fmas):
    """Only correctly rounded operations, none of them contracted, in the precision of the state."""
    assert not kernel.count(r"(div|sqrt|rcp|rsqrt|sin|cos|lg2|ex2)\.(full|approx)")
    assert not kernel.count(r"\.ftz")
    if dtype != torch.float64:
        assert not kernel.count(r"\.f64")
        assert not [name for name in kernel.sass if re.match(r"D(FMA|ADD|MUL|SETP)|F2F\.F64|MUFU\.\w*64", name)]
        assert kernel.count(r"fma\.rn\.f32") == fmas * PER_THREAD
    assert not kernel.count(r"call\.")


def check_memory(kernel, dtype, reads, writes):
    """Every operand read and written in accesses of 16 bytes, and nothing kept anywhere but in registers."""
    accesses = PER_THREAD * dtype.itemsize // 16
    assert kernel.count(r"ld\.global\.v4\.b32") == reads * accesses
    assert kernel.count(r"st\.global\.v4\.b32") == kernel.count(r"st\.global") == writes * accesses
    assert kernel.stack == kernel.local == kernel.shared == 0
    assert not kernel.count(r"(ld|st)\.local|bar\.sync|shfl")
    assert not [name for name in kernel.sass if re.match("LDL|STL|LDS|STS", name)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_compiled_step(name, dtype, arch):
    structure, reads, seeds, fmas = STEPS[name]
    kernel = compiled_step(name, arch, dtype)
    check_arithmetic(kernel, dtype, fmas)
    check_memory(kernel, dtype, len(reads), 1)
    assert kernel.registers <= 64
    if name == "divisions":
        assert kernel.count(r"div\.rn\.f32") == 2 * PER_THREAD
    if dtype == torch.float32:
        assert kernel.per_element <= SLOTS_PER_BYTE * 4 * (len(reads) + 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKWARDS)
def test_compiled_backward(name, dtype, arch):
    _, reads, writes, _, fmas = BACKWARDS[name]
    kernel = compiled_backward(name, arch, dtype)
    check_arithmetic(kernel, dtype, fmas)
    check_memory(kernel, dtype, len(reads), len(writes))


def check_sums(kernel, dtype, reads, writes, sums):
    """As check_memory, but that threads tell each other what they have added up, and one writes it."""
    accesses = PER_THREAD * dtype.itemsize // 16
    if dtype != torch.float64:
        assert kernel.count(r"ld\.global\.v4\.b32") == reads * accesses
        assert kernel.count(r"st\.global\.v4\.b32") == writes * accesses
        assert kernel.count(r"st\.global") == writes * accesses + sums
    assert kernel.count("shfl")
    assert kernel.stack == kernel.local == 0
    assert not kernel.count(r"(ld|st)\.local|\batom\.|\bred\.")
    assert not [name for name in kernel.sass if re.match("LDL|STL|ATOM|RED", name)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("made", [True, False], ids=["made", "given"])
def test_compiled_distance(made, dtype, arch):
    reads = ("x", "model_output") if made else ("x", "model_output", "x_prev")
    writes = ("out", "squares") if made else ()
    wide = {"partials": POINTERS[torch.float32]} | ({"squares": POINTERS[torch.float32]} if made else {})
    types = dict.fromkeys((*reads, *writes), POINTERS[dtype]) | wide | table_types(dtype, made, False)
    constants = {"FLAGS": CLIPPED_DDPM.flags, "HALF": made and dtype.itemsize == 2}
    kernel = Compiled(triton_kernels._distance_kernel, arch, types, constants, True)
    check_arithmetic(kernel, dtype, PAIR_FMAS / 2 if made else 0)
    written = 1 + 4 // dtype.itemsize if made else 0  # the squares are float32
    check_sums(kernel, dtype, len(reads), written, 1)
    assert kernel.registers <= 64
    assert kernel.count(r"div\.rn\.f32") == PER_THREAD


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ddpm", "distance", "learned"])
def test_compiled_sums(name, dtype, arch):
    # of a0, ax, s, lo, hi, px, pm, then of the guidance scale, or of min_log and max_log
    if name == "learned":
        kernel = compiled_sums(LEARNED, arch, dtype, seeds=True)
        check_arithmetic(kernel, dtype, PAIR_FMAS / 2 + EXP_FMAS)
        check_sums(kernel, dtype, 4, 3, 9)
    else:
        kernel = compiled_sums(CLIPPED_DDPM, arch, dtype, True, name == "distance", guidance=True)
        check_arithmetic(kernel, dtype, PAIR_FMAS / 2)
        check_sums(kernel, dtype, 5 if name == "distance" else 4, 2, 8)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_sums_in_float64(arch):
    kernel = compiled_sums(CLIPPED_DDPM, arch, torch.float64, seeds=False, distance=True)
    check_arithmetic(kernel, torch.float64, 0)
    assert not kernel.count(r"fma\.rn\.f64")
    assert not kernel.count(r"\.f32")  # min_std has all its bits
    check_sums(kernel, torch.float64, 5, 2, 7)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_normals(dtype, arch):
    kernel = Compiled(
        triton_kernels._normals_kernel,
        arch,
        {"out": POINTERS[dtype], "seeds": "*i64"},
        {"DOMAIN": 0, "HALF": dtype.itemsize == 2},
        True,
    )
    check_arithmetic(kernel, dtype, PAIR_FMAS / 2)
    check_memory(kernel, dtype, 0, 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_float64(arch):
    for name in ("divisions", "learned", "learned_plain"):
        kernel = compiled_step(name, arch, torch.float64)
        check_arithmetic(kernel, torch.float64, 0)
        assert not kernel.count(r"fma\.rn\.f64")
    assert kernel.count(r"sqrt\.rn\.f64") == PER_THREAD
    assert compiled_step("divisions", arch, torch.float64).count(r"div\.rn\.f64") == 2 * PER_THREAD


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_last_tile_of_a_sample_is_read_in_16_bytes_too(arch):
    kernel = compiled_step("ddpm_seeds", arch, torch.float32, MASKED=True)
    check_arithmetic(kernel, torch.float32, PAIR_FMAS / 2)
    check_memory(kernel, torch.float32, 2, 1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [{"aligned": False}, {"DIVISOR": 1, "MASKED": True}], ids=["offset", "odd_size"])
def test_what_is_not_aligned_is_not_read_in_16_bytes(change, dtype, arch):
    kernel = compiled_step("ddim", arch, dtype, **change)
    assert not kernel.count(r"\.v[24]\.b")
    assert kernel.count(rf"st\.global\.b{8 * dtype.itemsize}") == PER_THREAD


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype, half", [(torch.float16, "f16"), (torch.bfloat16, "bf16")], ids=str)
def test_host_rounding_keeps_every_rounding(dtype, half, arch):
    # px*x, pm*m, their sum, a0*x0, ae*e, their sum (which is not rounded again when it is stored), and four factors.
    # The compiler may do an operation on halves in half precision: it rounds once, to the same.
    kernel = compiled_step("ddim", arch, dtype, tables.HOST_ROUNDING)
    converted = 2 * kernel.count(rf"cvt\.rn\.{half}x2\.f32") + kernel.count(rf"cvt\.rn\.{half}\.f32")
    computed = kernel.count(rf"(mul|add|fma)\.rn\.{half}\b") + 2 * kernel.count(rf"(mul|add|fma)\.rn\.{half}x2")
    assert converted + computed == 6 * PER_THREAD + 4
    check_memory(kernel, dtype, 2, 1)


class FakeKernel:
    """Stands for a kernel of Triton's: records launches, and hands out a handle that does."""

    def __init__(self, handle_error=None):
        self.handle_error = handle_error
        self.slow, self.fast = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.slow.append((grid, arguments, options))
            return FakeHandle(self)

        return launch


class FakeHandle:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments):
            if self.kernel.handle_error is not None:
                raise self.kernel.handle_error
            self.kernel.fast.append((grid, arguments))

        return launch


def operands(batch=2, sample=64, dtype=torch.float32, offset=0, seeds=True):
    def tensor():
        block = torch.zeros(batch * sample + 64, dtype=dtype)
        start = -block.data_ptr() % 64 // dtype.itemsize + offset
        return block[start : start + batch * sample].view(batch, sample)

    structure = CLIPPED_DDPM if seeds else DDIM
    return {
        "out": tensor(),
        "second": None,
        "x": tensor(),
        "model_output": tensor(),
        "uncond_output": None,
        "guidance_scale": None,
        "noise": None,
        "seeds": noise.seeds(1, batch) if seeds else None,
        "table": torch.zeros(40, 18, dtype=noise.compute_dtype(dtype)),
        "t": None,
        "t_to_row": None,
        "row": 0,
        "flags": structure.flags,
    }


@pytest.fixture
def fake(monkeypatch):
    kernel = FakeKernel()
    monkeypatch.setattr(triton_kernels, "_launch_step", triton_kernels._Launcher(kernel))
    return kernel


def test_a_handle_serves_every_row_and_every_size(fake):
    for row in (0, 1, 2, 7, 16, 17, 32):
        triton_kernels.step(**operands() | {"row": row})
    for batch, sample in ((1, 64), (3, 128), (64, 8), (16, 320)):
        triton_kernels.step(**operands(batch, sample))
    assert len(fake.slow) == 1  # each of these samples ends inside a tile
    assert len(fake.fast) == 10
    position = [p.name for p in triton_kernels._step_kernel.params].index("row")
    assert [arguments[position] for _, arguments in fake.fast[:6]] == [1, 2, 7, 16, 17, 32]
    (_, _, options), *_ = fake.slow
    assert options["enable_fp_fusion"] is False


def test_slices_of_a_tensor_of_timesteps_share_a_handle(fake):
    timesteps = torch.arange(8)
    for i in range(8):
        triton_kernels.step(**operands() | {"t": timesteps[i : i + 1], "t_to_row": timesteps})
    assert len({t.data_ptr() % 16 for t in timesteps.split(1)}) == 2
    assert (len(fake.slow), len(fake.fast)) == (1, 7)


@pytest.mark.parametrize("name", ["out", "x", "model_output"])
def test_another_alignment_is_another_handle(fake, name):
    aligned, offset = operands(), operands(offset=1)
    triton_kernels.step(**aligned)
    triton_kernels.step(**aligned | {name: offset[name]})
    assert len(fake.slow) == 2
    triton_kernels.step(**aligned)
    triton_kernels.step(**aligned | {name: offset[name]})
    assert len(fake.slow) == 2


@pytest.mark.parametrize("error", [TypeError("function takes 9 arguments"), AttributeError("no function")])
def test_a_triton_with_other_handles_goes_the_long_way(fake, error):
    fake.handle_error = error
    for _ in range(4):
        triton_kernels.step(**operands())
    assert len(fake.slow) == 4  # the first makes the handle, which the second finds to be none
    assert not fake.fast


def test_an_error_of_a_launch_is_raised(fake):
    """Nothing is launched twice: a handle that has worked before is what Triton expects."""
    triton_kernels.step(**operands())
    triton_kernels.step(**operands())
    for error in (RuntimeError("an illegal memory access was encountered"), TypeError("of a hook")):
        fake.handle_error = error
        with pytest.raises(type(error), match=str(error)):
            triton_kernels.step(**operands())
    assert len(fake.slow) == 1


def test_equal_keys_mean_equal_kernels():
    """What Triton itself would compile anew for has another key; what it would not has the same."""
    kernel = triton_kernels._step_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    seen = {}

    class Recorder(triton_kernels._Launcher):
        def __call__(self, grid, large, small, integers, constants, device):
            key = triton_kernels.launch_key(device, large, small, constants)
            _, specialization, _ = bind(*large, *small, *integers, *constants)
            seen.setdefault(key, set()).add(str(specialization))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "_launch_step", Recorder(kernel))
        for dtype in POINTERS:
            for offset in range(3):
                for batch, sample in ((1, 1), (2, 64), (1, 48), (16, 16), (5, 7), (70000, 1), (2, 1024)):
                    for seeds in (True, False):
                        for row in (0, 1, 16, 33):
                            given = operands(batch, sample, dtype, offset, seeds) | {"row": row}
                            triton_kernels.step(**given)
                            t = torch.zeros(batch + 1, dtype=torch.int64)[1:]
                            triton_kernels.step(**given | {"t": t, "t_to_row": torch.zeros(row + 1).long()})
    assert all(len(specializations) == 1 for specializations in seen.values())
    assert len(seen) == len({s for specializations in seen.values() for s in specializations})


def test_one_distance_kernel_serves_every_least_deviation():
    kernel = triton_kernels._distance_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    seen = {}

    class Recorder(triton_kernels._Launcher):
        def __call__(self, grid, large, small, integers, constants, device):
            key = triton_kernels.launch_key(device, large, small, constants)
            _, specialization, _ = bind(*large, *small, *integers, *constants)
            seen.setdefault(key, set()).add(str(specialization))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "_launch_distance", Recorder(kernel))
        for batch in (2, 3, 16):
            given = operands(batch) | {"squares": None, "distance": torch.zeros(batch + 1)[1:], "x_prev": None}
            del given["second"]
            for min_std in (0.0, 1e-45, 0.1, 1.0, 2.0**64):
                triton_kernels.step_distance(**given, min_std=min_std)
    assert [len(specializations) for specializations in seen.values()] == [1]


def test_importing_touches_no_device():
    code = (
        "import torch; torch.cuda.current_device = torch._C._cuda_init = lambda *a: 1 / 0; "
        "import fastdiff, sys; assert 'fastdiff.triton_kernels' not in sys.modules; import fastdiff.triton_kernels"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)
