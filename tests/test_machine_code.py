"""The machine code of the CUDA kernels, read from the library without a GPU (benchmarks/kernels.py).

No local memory, no double precision where the state has none, and whole vectors on the way that an aligned call takes.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from fastdiff import native

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import kernels  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90")  # what setup.py compiles for where nothing else is asked for
DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA"}
LOCAL = {"LDL", "STL"}
MOST_KERNELS = 62  # each is compiled for every architecture, and loaded


def why_not() -> str | None:
    if not native.available():
        return f"no native library: {native.why_not()}"
    if kernels.find_tool() is None:
        return "no cuobjdump on the PATH, in CUDA_HOME or in Triton's package"
    if not kernels.architectures(native.LIBRARY):
        return "the library was built without CUDA"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    if request.param not in kernels.architectures(native.LIBRARY):
        pytest.skip(f"the library was built without {request.param}")
    return request.param


@functools.cache
def code(arch: str) -> dict[str, kernels.Kernel]:
    return {kernel.name: kernel for kernel in kernels.read(native.LIBRARY, arch)}


def with_instructions(arch: str, names: set[str], kind=lambda kernel: True) -> dict[str, set[str]]:
    found = {k.name: {i.name for i in k.code if i.base in names} for k in code(arch).values() if kind(k)}
    return {name: instructions for name, instructions in found.items() if instructions}


def test_the_number_of_kernels(arch):
    assert 0 < len(code(arch)) <= MOST_KERNELS
    assert {kernel.kind for kernel in code(arch).values()} == {
        *("step_flat", "step_torch", "step_strided", "backward_flat", "backward_strided", "normals_flat"),
        *("step_distance", "backward_sums", "fold_sums"),
        *("threshold_samples", "threshold_level", "threshold_apply"),
    }


def test_nothing_spills(arch):
    """What does not fit in registers goes to local memory, by LDL and STL."""
    assert {k.name: k.local for k in code(arch).values() if k.local} == {}
    assert with_instructions(arch, LOCAL) == {}


def test_float_kernels_compute_in_single_precision(arch):
    def single(kernel):
        return not kernel.double

    assert with_instructions(arch, DOUBLE, single) == {}
    converted = {
        kernel.name
        for kernel in code(arch).values()
        if single(kernel) and any(i.base in ("F2F", "I2F", "F2I") and "F64" in i.modifiers for i in kernel.code)
    }
    assert converted == set()
    # and that the ones in double precision are found
    assert with_instructions(arch, DOUBLE, lambda kernel: kernel.double)


def test_multiplications_and_additions_are_not_contracted(arch):
    """A DDIM step has no multiply-add: those of a kernel without noise or division would be contracted ones."""
    plain = [k for k in code(arch).values() if k.kind == "step_flat" and k.name.endswith("plain>")]
    assert len(plain) == 5
    for kernel in plain:
        assert not {i.name for i in kernel.code if i.base == "FFMA"}, kernel.name


@pytest.mark.parametrize("walk", kernels.walks(), ids=lambda walk: f"{walk.label} {walk.kernel}".replace(" ", "_"))
def test_aligned_calls_move_whole_vectors(arch, walk):
    """Every access of a round is of 16 bytes, but in two cases of 8.

    With torch's stream a vector is four elements of either type; of a float32 state beside a model output in half
    precision the state takes two vectors.
    """
    kernel = code(arch)[walk.kernel]
    found = kernels.walk_round(kernel, walk)
    assert found is not None, "no way through the kernel was found"
    halves = kernel.kind == "step_torch" and any("16" in argument for argument in kernel.arguments)
    assert min(found.loads + found.stores) >= (64 if halves else 128), found
    assert sum(found.stores) == 8 * walk.stored
    assert sum(found.loads) == 8 * walk.loaded


def test_registers_leave_room_for_other_warps(arch):
    """A memory-bound kernel needs several blocks of 128 threads per multiprocessor to keep loads in flight."""
    for kernel in code(arch).values():
        if "plain" in kernel.name or kernel.kind == "normals_flat":
            assert kernel.blocks >= 5, (kernel.name, kernel.registers)
        assert kernel.blocks >= 2, (kernel.name, kernel.registers)


def test_the_counting_of_instructions():
    """The walk against a kernel small enough to count by hand."""
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0030*/                   ULDC UR4, c[0x0][0x218] ;
        /*0040*/                   IMAD.WIDE.U32 R2, R0, 0x10, R2 ;
        /*0050*/                   LOP3.LUT P0, RZ, R2, 0xf, RZ, 0xc0, !PT ;
        /*0060*/              @P0  BRA 0xc0 ;
        /*0070*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0080*/                   FSETP.GEU.AND P1, PT, R4, R5, PT ;
        /*0090*/              @P1  BRA 0xd0 ;
        /*00a0*/                   FMUL R4, R4, R5 ;
        /*00b0*/                   BRA 0xd0 ;
        /*00c0*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*00d0*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*00e0*/                   VIADD R0, R0, 0x1 ;
        /*00f0*/                   ISETP.GE.AND P2, PT, R0, UR4, PT ;
        /*0100*/             @!P2  BRA 0x70 ;
        /*0110*/                   EXIT ;
    """
    made = kernels.Kernel("step_flat<Float32>", "sm_90", 16, 0, 0, tuple(kernels._instructions(text)))
    parameters = (0x1000).to_bytes(8, "little") + (9).to_bytes(4, "little")
    walk = kernels.Walk("", made.name, parameters, elements=4, loaded=16, stored=16)
    # from the store to the next: three that go on, the load, the comparison, the branch over the product, the store
    assert kernels.walk_round(made, walk) == kernels.Round(7, (128,), (128,))
    unaligned = kernels.Walk("", made.name, (0x1004).to_bytes(8, "little") + parameters[8:], 4, 16, 16)
    assert kernels.walk_round(made, unaligned) is None
    short = kernels.Walk("", made.name, parameters[:8] + (2).to_bytes(4, "little"), 4, 16, 16)
    assert kernels.walk_round(made, short) is None
