"""What the machine code of the CUDA kernels needs: registers, blocks per multiprocessor, instructions per element.

    python benchmarks/kernels.py [--library fastdiff/libfastdiff.so] [--json FILE]

It takes no GPU: the code is read from the library with NVIDIA's cuobjdump (from the PATH, CUDA_HOME, or Triton's
package). Instructions are counted by walking the code as the first thread of a call does: integer instructions and
predicates are computed from the parameters of the call, so the walk takes the branches of its terms, its operands and
aligned addresses. What depends on data stays unknown (where square roots and divisions take their slow path): of such
branches the walk follows those that lead to the next 16-byte store in the fewest instructions, and never a call. An
element costs what lies between the stores of one round of the loop and the next, predicated-off and uniform
instructions included, as every one of them takes a slot.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import heapq
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any

from fastdiff import native
from fastdiff.schedules import NoiseSchedule
from fastdiff.tables import ddim_table, ddpm_table

# Copy speed of an H200 in instructions: 132 multiprocessors x 128 lanes x 1.98 GHz over 4.3 TB/s.
SLOTS_PER_BYTE = 132 * 128 * 1.98e9 / 4.3e12
THREADS = 128  # of a block
REGISTERS = 65536  # of a multiprocessor, in compute capability 8.0 and 9.0
MOST_THREADS = 2048

SIZE = {"Float32": 4, "Float64": 8, "Float16": 2, "BFloat16": 2}
SCOPES = {"0": "plain", "1": "common", "2": "any"}


# Reading


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "", "P0", "!P0", "UP0", ...
    name: str  # with its modifiers: "LDG.E.128"
    operands: tuple[str, ...]

    @functools.cached_property
    def base(self) -> str:
        return self.name.split(".")[0]

    @functools.cached_property
    def modifiers(self) -> list[str]:
        return self.name.split(".")[1:]

    @functools.cached_property
    def bits(self) -> int:
        """What one thread moves, for an access to memory."""
        for size in (128, 64, 16, 8):
            if str(size) in self.modifiers or f"U{size}" in self.modifiers or f"S{size}" in self.modifiers:
                return size
        return 32


@dataclass(frozen=True)
class Kernel:
    name: str  # without namespaces: "step_flat<Float32, BFloat16, plain, noise>"
    arch: str
    registers: int
    stack: int
    local: int
    code: tuple[Instruction, ...]

    @functools.cached_property
    def kind(self) -> str:
        return self.name.split("<")[0]

    @functools.cached_property
    def arguments(self) -> list[str]:
        return self.name[:-1].split("<", 1)[1].split(", ")

    @property
    def double(self) -> bool:
        """Whether it computes in double precision."""
        return self.arguments[0] in ("Float64", "double")

    @property
    def blocks(self) -> int:
        """How many blocks of 128 threads a multiprocessor has registers for: they are given to warps by 256."""
        of_warp = -(-self.registers * 32 // 256) * 256
        return min(REGISTERS // (of_warp * THREADS // 32), MOST_THREADS // THREADS)


def find_tool(name: str = "cuobjdump") -> str | None:
    """NVIDIA's disassembler, or None."""
    home, triton = os.environ.get("CUDA_HOME"), util.find_spec("triton")
    places = [f"{home}/bin" if home else "", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if triton is not None and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return next(filter(None, (shutil.which(name, path=place) for place in places if place)), None)


def architectures(library: Path) -> list[str]:
    """Those that the library has machine code for, as "sm_90"; none where it was built without CUDA."""
    listed = _run("-lelf", str(library), check=False)  # a file without device code is an error to it
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", listed)))


def read(library: Path, arch: str) -> list[Kernel]:
    """The kernels of one architecture. FileNotFoundError without a disassembler."""
    usage: dict[str, dict[str, int]] = {}
    for name, line in re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", _run("-res-usage", "-arch", arch, str(library))):
        usage[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    found = []
    for function in re.split(r"Function : ", _run("-sass", "-arch", arch, str(library)))[1:]:
        mangled = function.split()[0]
        code = tuple(_instructions(function))
        numbers = usage[mangled]
        found.append(Kernel(_short(mangled), arch, numbers["REG"], numbers["STACK"], numbers["LOCAL"], code))
    return sorted(found, key=lambda kernel: kernel.name)


def _run(*arguments: str, check: bool = True) -> str:
    tool = find_tool()
    if tool is None:
        raise FileNotFoundError("cuobjdump: not on the PATH, in CUDA_HOME or in Triton's package")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=check).stdout


def _short(mangled: str) -> str:
    """ "step_flat<Float32, Float32, plain, noise>" of the mangled name of a kernel (Itanium C++ ABI)."""
    match = re.match(r"_ZN8fastdiff4cuda\d+(\w+?)I(.*?)EEv", mangled)
    if match is None:
        return mangled
    kind, rest = match[1], match[2]
    parts: list[str] = []
    for part in re.findall(r"NS_\d+(\w+?)E|(S2_)|ScopeE(\d)|Lb(\d)|([dfjm])", rest + "E"):
        name, again, scope, flag, letter = part
        if name:
            parts.append(name)
        elif again:
            parts.append(parts[0])
        elif scope:
            parts.append(SCOPES[scope])
        elif flag:
            parts += ["noise"] * int(flag)
        else:
            parts.append({"d": "double", "f": "float", "j": "32-bit", "m": "64-bit"}[letter])
    return f"{kind}<{', '.join(parts)}>"


def _instructions(text: str) -> Iterator[Instruction]:
    for address, body in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.M):
        match = re.fullmatch(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", body)
        assert match is not None, body
        operands = tuple(part.strip() for part in match[3].split(",")) if match[3] else ()
        yield Instruction(int(address, 16), match[1] or "", match[2], operands)


# The parameters of a call, as csrc/call.h and csrc/step_cuda.h lay them out


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("table", "table_rows", "row", "t", "t_stride", "t_to_row", "t_count")),
        *((name, ctypes.c_uint64) for name in ("seeds", "seeds_stride", "scale", "scale_stride", "batch", "sample")),
        ("flags", ctypes.c_int32),
    ]


class _Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("batch_stride", ctypes.c_uint64), ("dtype", ctypes.c_int32)]


class _Step(ctypes.Structure):
    OPERANDS = ("out", "second", "x", "model_output", "learned", "uncond", "noise")
    _fields_ = [("call", _Call), *((name, _Operand) for name in OPERANDS)]


class _TorchStep(ctypes.Structure):
    _fields_ = [
        ("step", _Step),
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("state", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("rounds", ctypes.c_uint64),
    ]


class _Backward(ctypes.Structure):
    OPERANDS = (
        *("grad_x", "grad_model", "grad_learned", "grad_uncond", "grad_noise"),
        *("grad", "grad_second", "x", "model_output", "learned", "uncond", "noise"),
    )
    _fields_ = [("call", _Call), *((name, _Operand) for name in OPERANDS)]


class _Normals(ctypes.Structure):
    _fields_ = [
        ("out", _Operand),
        ("strides", ctypes.c_uint64 * 32),
        *((name, ctypes.c_uint64) for name in ("seeds", "seeds_stride", "batch", "sample")),
        *((name, ctypes.c_uint32) for name in ("t", "repeat", "domain")),
    ]


_DTYPE = {"Float32": 0, "Float64": 1, "Float16": 2, "BFloat16": 3}
_ELEMENTS = 2**24
_MODEL = {"model_output", "learned", "uncond", "grad_model", "grad_learned", "grad_uncond"}
_OUTPUTS = {"out", "second", *_Backward.OPERANDS[:5]}


@dataclass(frozen=True)
class Walk:
    """A call whose instructions are counted.

    elements: of a round of the loop of a thread. loaded, stored: bytes of a round, at the least.
    """

    label: str
    kernel: str
    parameters: bytes
    elements: int
    loaded: int
    stored: int

    @property
    def bytes(self) -> int:
        """Moved per element at the least."""
        return (self.loaded + self.stored) // self.elements


def walks() -> list[Walk]:
    """The calls that the goals on speed name, each with the kernel that it is launched with."""
    schedule = NoiseSchedule.linear(1000)
    ddpm = ddpm_table(schedule, clip=1.0).structure.flags
    learned = ddpm_table(schedule, clip=1.0, variance="learned_range").structure.flags
    ddim = ddim_table(schedule, clip=1.0).structure.flags
    free = ddpm_table(schedule).structure.flags  # not clipped
    found = []
    for state, model in (
        ("Float32", "Float32"),
        ("Float32", "BFloat16"),
        ("BFloat16", "BFloat16"),
        ("Float16", "Float16"),
    ):
        pair = f"<{state}, {model}"
        step = functools.partial(_step_walk, state, model)
        plain = ("out", "x", "model_output")
        found += [
            step("DDPM, seeds", f"step_flat{pair}, plain, noise>", ddpm, plain, seeds=True),
            step("DDIM", f"step_flat{pair}, plain>", ddim, plain),
            step("DDPM, noise tensor", f"step_flat{pair}, common>", ddpm, (*plain, "noise")),
            step("DDIM, guidance", f"step_flat{pair}, common>", ddim, (*plain, "uncond")),
            step("DDIM, x0 too", f"step_flat{pair}, common>", ddim, (*plain, "second")),
            step("learned range, seeds", f"step_flat{pair}, any>", learned, (*plain, "learned"), seeds=True),
            step("DDPM, torch's stream", f"step_torch{pair}, plain>", ddpm, plain, torch=True),
            step("learned range, torch's", f"step_torch{pair}, any>", learned, (*plain, "learned"), torch=True),
            step("backward of DDPM", f"backward_flat{pair}>", free, ("grad", "grad_x", "grad_model")),
            step("backward, clipped", f"backward_flat{pair}>", ddpm,
                 ("grad", "x", "model_output", "grad_x", "grad_model")),
        ]  # fmt: skip
        if state == model:
            n, size = _vector(state, state), SIZE[state]
            normals = _Normals()
            normals.out = _Operand(0x100000, _ELEMENTS, _DTYPE[state])
            normals.seeds, normals.batch, normals.sample, normals.domain = 0x10000, 1, _ELEMENTS, 1
            found.append(Walk("normals", f"normals_flat<{state}>", bytes(normals), n, 0, n * size))
    return found


def _vector(state: str, model: str) -> int:
    return 8 if 2 in (SIZE[state], SIZE[model]) else 4


def _step_walk(
    state: str,
    model: str,
    label: str,
    kernel: str,
    flags: int,
    operands: Iterable[str],
    seeds: bool = False,
    torch: bool = False,
) -> Walk:
    parameters: Any = _TorchStep(threads=132 * 2048, rounds=-(-_ELEMENTS // (4 * 132 * 2048))) if torch else None
    step: Any = parameters.step if torch else _Backward() if "grad" in operands else _Step()
    step.call = _Call(table=0x10000, table_rows=1000, row=500, batch=1, sample=_ELEMENTS, flags=flags)
    step.call.seeds = 0x20000 if seeds else 0
    if "uncond" in operands:
        step.call.scale = 0x30000
    n = 16 if torch else _vector(state, model)  # four vectors of four share a draw
    loaded = stored = 0
    for number, name in enumerate(operands):
        dtype = model if name in _MODEL else state
        setattr(step, name, _Operand(0x1000000 * (number + 1), _ELEMENTS, _DTYPE[dtype]))
        if name in _OUTPUTS:
            stored += n * SIZE[dtype]
        else:
            loaded += n * SIZE[dtype]
    return Walk(label, kernel, bytes(parameters or step), n, loaded, stored)


# Walking


class _Thread:
    """Registers and predicates of one thread: ints, or None where unknown."""

    def __init__(self, constants: dict[int, int]) -> None:
        self.constants = constants  # bank 0, by bytes
        self.values: dict[str, int | None] = {}

    def copy(self) -> _Thread:
        other = _Thread(self.constants)
        other.values = dict(self.values)
        return other

    def predicate(self, name: str) -> int | None:
        if name.startswith("!"):
            value = self.predicate(name[1:])
            return None if value is None else 1 - value
        return 1 if name in ("PT", "UPT") else self.values.get(name)

    def get(self, operand: str) -> int | None:
        """32 bits of an operand."""
        operand = operand.removesuffix(".reuse")
        if operand.startswith(("-", "~")) and not re.match(r"-(0x)?\d", operand):
            value = self.get(operand[1:])
            return None if value is None else (-value if operand[0] == "-" else ~value) & 0xFFFFFFFF
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", operand):
            return int(operand, 0) & 0xFFFFFFFF
        if operand in ("RZ", "URZ", "SRZ"):
            return 0
        constant = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+|RZ)\]", operand)
        if constant is not None:
            return self.constant(0 if constant[1] == "RZ" else int(constant[1], 16))
        return self.values.get(operand)

    def constant(self, offset: int, size: int = 4) -> int | None:
        found = [self.constants.get(offset + i) for i in range(size)]
        if None in found:
            return None
        return int.from_bytes(bytes(byte for byte in found if byte is not None), "little")

    def pair(self, operand: str) -> int | None:
        """64 bits, of two registers or words."""
        operand = operand.removesuffix(".reuse")
        if operand in ("RZ", "URZ", "SRZ"):
            return 0
        constant = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand)
        if constant is not None:
            return self.constant(int(constant[1], 16), 8)
        low, high = self.get(operand), self.get(_next(operand, 1))
        return None if low is None or high is None else high << 32 | low

    def set(self, register: str, value: int | None, words: int = 1) -> None:
        if register in ("RZ", "URZ", "PT", "UPT"):
            return
        for word in range(words):
            self.values[_next(register, word)] = None if value is None else value >> 32 * word & 0xFFFFFFFF


def _next(register: str, words: int) -> str:
    if not words:
        return register
    match = re.fullmatch(r"(U?R)(\d+)", register)
    return f"{match[1]}{int(match[2]) + words}" if match is not None else register


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "GE": lambda a, b: a >= b,
    "GT": lambda a, b: a > b,
    "LE": lambda a, b: a <= b,
    "LT": lambda a, b: a < b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _execute(thread: _Thread, i: Instruction) -> bool:
    """Carry out an integer instruction; False for one that is not known here."""
    base = i.base.removeprefix("U") if i.base not in ("UNDEF",) else i.base
    ops, get, put = i.operands, thread.get, thread.set
    if base in ("MOV", "S2R", "CS2R", "R2UR", "S2UR"):
        if base in ("S2R", "S2UR") or (base == "CS2R" and ops[1] != "SRZ"):
            # the first thread of the first block
            put(ops[0], 0 if ops[1].startswith(("SR_CTAID", "SR_TID")) else None)
        else:
            put(ops[0], get(ops[1]), 2 if base == "CS2R" and "32" not in i.modifiers else 1)
        return True
    if base in ("LDC", "LDC64"):
        words = 2 if "64" in i.modifiers else 1
        if "U8" in i.modifiers:
            constant = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", ops[1])
            put(ops[0], thread.constant(int(constant[1], 16), 1) if constant else None)
        else:
            put(ops[0], thread.pair(ops[1]) if words == 2 else get(ops[1]), words)
        return True
    if base == "HFMA2" and ops[1:3] == ("-RZ", "RZ"):
        # a constant, put together from two halves
        high, low = (int.from_bytes(struct.pack("<e", float(word)), "little") for word in ops[3:5])
        put(ops[0], high << 16 | low)
        return True
    if base == "IMAD":
        return _multiply_add(thread, i)
    if base == "VIADD":
        put(ops[0], _sum(get(ops[1]), get(ops[2])))
        return True
    if base == "IADD3":
        return _add(thread, i)
    if base == "LEA":
        return _shift_add(thread, i)
    if base == "SHF":
        return _funnel(thread, i)
    if base == "SEL":
        chosen = thread.predicate(ops[3])
        put(ops[0], None if chosen is None else get(ops[1] if chosen else ops[2]))
        return True
    if base == "LOP3":
        return _logic(thread, i)
    if base == "ISETP":
        return _compare(thread, i)
    if base == "PLOP3":
        return _predicate_logic(thread, i)
    if base == "PRMT":
        return _permute(thread, i)
    if base == "P2R" and not i.modifiers:
        mask = int(ops[3], 16)
        bits = [thread.predicate(f"P{n}") for n in range(7) if mask >> n & 1]
        packed = sum((bit or 0) << n for bit, n in zip(bits, (n for n in range(7) if mask >> n & 1), strict=True))
        put(ops[0], None if None in bits else packed)
        return True
    return _reciprocal(thread, i)


def _reciprocal(thread: _Thread, i: Instruction) -> bool:
    """The floating-point part of a division of 32-bit integers; what it is off by, the code itself puts right."""
    value = thread.get(i.operands[1]) if len(i.operands) > 1 else None
    if value is None:
        return False
    result: int | None = None
    if i.name == "I2F.U32.RP":
        result = _bits(float(value))
        result += _float(result) < value
    elif i.name == "MUFU.RCP" and _float(value) > 0:
        result = _bits(1 / _float(value))
    elif i.name == "F2I.FTZ.U32.TRUNC.NTZ":
        result = int(_float(value))
    if result is None:
        return False
    thread.set(i.operands[0], result)
    return True


def _float(bits: int) -> float:
    return float(struct.unpack("<f", bits.to_bytes(4, "little"))[0])


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def _sum(*values: int | None) -> int | None:
    return None if None in values else sum(value for value in values if value is not None) & 0xFFFFFFFF


def _multiply_add(thread: _Thread, i: Instruction) -> bool:
    ops, get, kinds = list(i.operands), thread.get, i.modifiers
    if "HI" in kinds:
        a, b, wide = get(ops[1]), get(ops[2]), thread.pair(ops[3])
        known = a is not None and b is not None and wide is not None and "U32" in kinds
        thread.set(ops[0], (a * b + wide) >> 32 & 0xFFFFFFFF if known else None)
        return True
    out, ops = ops[0], ops[1:]
    carry_out = ops.pop(0) if re.fullmatch(r"U?P(\d|T)", ops[0]) else "PT"
    a, b = get(ops[0]), get(ops[1])
    product = 0 if 0 in (a, b) else None if a is None or b is None else a * b
    if "WIDE" in kinds:
        if a is not None and b is not None and "U32" not in kinds:
            product = _signed(a) * _signed(b)
        addend = thread.pair(ops[2])
        thread.set(out, None if product is None or addend is None else (product + addend) % 2**64, 2)
    else:
        carry = thread.predicate(ops[3]) if "X" in kinds and len(ops) > 3 else 0
        c = get(ops[2])
        total = None if product is None or c is None or carry is None else product + c + carry
        thread.set(out, None if total is None else total & 0xFFFFFFFF)
    thread.set(carry_out, None)
    return True


def _add(thread: _Thread, i: Instruction) -> bool:
    ops, out, carries = list(i.operands[1:]), i.operands[0], []
    while re.fullmatch(r"U?P(\d|T)", ops[0]):
        carries.append(ops.pop(0))
    values: list[int | None] = []
    extended, borrow = "X" in i.modifiers, 0
    for operand in ops[:3]:
        negated = operand.startswith("-") and not re.match(r"-(0x)?\d", operand)
        value = thread.get(operand)
        if negated and not extended and value == 0:
            borrow += 1  # minus zero is 2^32: it carries
        values.append(value)
    given: list[int | None] = [thread.predicate(p) for p in ops[3:]] if extended else [0]
    known = None not in values and None not in given
    total = sum(v for v in values if v is not None) + sum(v for v in given if v is not None) + (borrow << 32)
    thread.set(out, total & 0xFFFFFFFF if known else None)
    for number, carry in enumerate(carries):
        # the second carry is of a sum of three
        thread.set(carry, int(total >> 32 > number) if known else None)
    return True


def _shift_add(thread: _Thread, i: Instruction) -> bool:
    ops, out = list(i.operands[1:]), i.operands[0]
    carry_out = ops.pop(0) if re.fullmatch(r"U?P(\d|T)", ops[0]) else "PT"
    a, b = thread.get(ops[0]), thread.get(ops[1])
    if "HI" in i.modifiers:
        high, shift = thread.get(ops[2]), thread.get(ops[3])
        carry = thread.predicate(ops[4]) if "X" in i.modifiers and len(ops) > 4 else 0
        if a is None or b is None or high is None or shift is None or carry is None:
            total = None
        else:
            total = ((high << 32 | a) >> (32 - shift) & 0xFFFFFFFF) + b + carry
    else:
        shift = thread.get(ops[2])
        total = None if a is None or b is None or shift is None else (a << shift & 0xFFFFFFFF) + b
    thread.set(out, None if total is None else total & 0xFFFFFFFF)
    thread.set(carry_out, None if total is None else total >> 32)
    return True


def _funnel(thread: _Thread, i: Instruction) -> bool:
    low, shift, high = (thread.get(operand) for operand in i.operands[1:4])
    left, wide, upper = "L" in i.modifiers, "U64" in i.modifiers or "S64" in i.modifiers, "HI" in i.modifiers
    if low is None and not (upper and not wide) or shift is None or high is None:
        thread.set(i.operands[0], None)
        return True
    low = low or 0
    if wide:
        value = high << 32 | low
        value = value << shift & 2**64 - 1 if left else value >> shift
        result = value >> 32 if upper else value
    elif upper:
        result = high << shift if left else (_signed(high) if "S32" in i.modifiers else high) >> shift
    else:
        result = low << shift if left else (_signed(low) if "S32" in i.modifiers else low) >> shift
    thread.set(i.operands[0], result & 0xFFFFFFFF)
    return True


def _logic(thread: _Thread, i: Instruction) -> bool:
    ops = list(i.operands)
    test = ops.pop(0) if re.fullmatch(r"U?P(\d|T)", ops[0]) else "PT"
    out, table = ops[0], int(ops[4], 16)
    values = [thread.get(operand) for operand in ops[1:4]]
    result: int | None = 0
    for bit in range(32):
        bits = [None if value is None else value >> bit & 1 for value in values]
        outcomes = {
            table >> (a << 2 | b << 1 | c) & 1
            for a in ((0, 1) if bits[0] is None else (bits[0],))
            for b in ((0, 1) if bits[1] is None else (bits[1],))
            for c in ((0, 1) if bits[2] is None else (bits[2],))
        }
        if len(outcomes) > 1:
            result = None
            break
        assert result is not None
        result |= outcomes.pop() << bit
    thread.set(out, result)
    thread.set(test, None if result is None else int(result != 0))
    return True


def _compare(thread: _Thread, i: Instruction) -> bool:
    kinds, ops = i.modifiers, i.operands
    a, b = thread.get(ops[2]), thread.get(ops[3])
    rest = thread.predicate(ops[4])
    holds: int | None = None
    if a is not None and b is not None:
        if "EX" in kinds:
            # the upper words, after the lower ones
            below = thread.predicate(ops[5])
            if a != b:
                pair = (a, b) if "U32" in kinds else (_signed(a), _signed(b))
                holds = int(_COMPARE[kinds[0]](*pair))
            elif below is not None:
                holds = below
        else:
            pair = (a, b) if "U32" in kinds else (_signed(a), _signed(b))
            holds = int(_COMPARE[kinds[0]](*pair))
    if "EX" in kinds and kinds[0] in ("EQ", "NE") and thread.predicate(ops[5]) == (kinds[0] == "NE"):
        holds = int(kinds[0] == "NE")
    either = "OR" in kinds
    result = None if holds is None or rest is None else (holds | rest if either else holds & rest)
    if (1 if either else 0) in (holds, rest):
        result = 1 if either else 0
    thread.set(ops[0], result)
    if ops[1] not in ("PT", "UPT"):
        thread.set(ops[1], None if result is None else 1 - result)
    return True


def _predicate_logic(thread: _Thread, i: Instruction) -> bool:
    inputs = [thread.predicate(operand) for operand in i.operands[2:5]]
    for out, table in zip(i.operands[:2], i.operands[5:7], strict=False):
        results = {
            int(table, 16) >> (a << 2 | b << 1 | c) & 1
            for a in ((0, 1) if inputs[0] is None else (inputs[0],))
            for b in ((0, 1) if inputs[1] is None else (inputs[1],))
            for c in ((0, 1) if inputs[2] is None else (inputs[2],))
        }
        thread.set(out, results.pop() if len(results) == 1 else None)
    return True


def _permute(thread: _Thread, i: Instruction) -> bool:
    a, selector, b = (thread.get(operand) for operand in i.operands[1:4])
    if a is None or selector is None or b is None or len(i.modifiers) > 0:
        thread.set(i.operands[0], None)
        return True
    both, result = b << 32 | a, 0
    for byte in range(4):
        select = selector >> 4 * byte & 15
        value = both >> 8 * (select & 7) & 255
        if select & 8:  # the sign of that byte, eight times
            value = 255 * (value >> 7)
        result |= value << 8 * byte
    thread.set(i.operands[0], result)
    return True


def _forget(thread: _Thread, i: Instruction) -> None:
    """Registers that an instruction of unknown result writes."""
    if i.base in ("ST", "STG", "STL", "STS", "BRA", "BSSY", "BSYNC", "NOP", "EXIT", "WARPSYNC", "BREAK", "BMOV"):
        return
    words = 4 if "128" in i.modifiers else 2 if {"64", "WIDE", "F64", "S64", "U64"} & set(i.modifiers) else 1
    for position, operand in enumerate(i.operands[:3]):
        if re.fullmatch(r"U?P(\d|T)", operand):
            thread.set(operand, None)
        elif position == 0 or all(re.fullmatch(r"U?P(\d|T)", before) for before in i.operands[:position]):
            thread.set(operand, None, words if i.base not in ("P2R", "R2P") else 1)
    if i.base == "R2P":
        for number in range(7):
            thread.values[f"P{number}"] = None


@dataclass(frozen=True)
class Round:
    """What a thread does in one round of its loop: its instructions, and the bits of each access to global memory."""

    instructions: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]


@dataclass
class _Way:
    """How far a walk has come: bytes moved, instructions, and accesses since the last round ended."""

    thread: _Thread
    index: int = 0
    steps: int = 0
    begun: int = 0
    rounds: int = 0
    loads: tuple[int, ...] = ()
    stores: tuple[int, ...] = ()

    def fork(self, index: int) -> _Way:
        return replace(self, thread=self.thread.copy(), index=index)


def walk_round(kernel: Kernel, walk: Walk, most_ways: int = 4000) -> Round | None:
    """The third round of the loop of a call; None where no way through was found."""
    start = 0x210 if kernel.arch >= "sm_90" else 0x160  # of the parameters in constant bank 0
    constants = {start + i: byte for i, byte in enumerate(walk.parameters)}
    for word, value in enumerate((THREADS, 1, 1, 1, 1, 1)):  # the sizes of a block and of the grid
        constants |= {4 * word + i: byte for i, byte in enumerate(value.to_bytes(4, "little"))}
    place = {instruction.address: index for index, instruction in enumerate(kernel.code)}
    ways: list[tuple[int, int, _Way]] = [(0, 0, _Way(_Thread(constants)))]  # the shortest first
    seen: set[tuple[Any, ...]] = set()
    for number in range(1, most_ways):
        if not ways:
            return None
        way = heapq.heappop(ways)[2]
        thread = way.thread
        while way.index < len(kernel.code):
            i = kernel.code[way.index]
            way.steps += 1
            way.index += 1
            runs = 1 if not i.guard else thread.predicate(i.guard)
            if i.base == "BRA":
                if len(i.operands) > 1:  # a second condition
                    second = thread.predicate(i.operands[0])
                    runs = 0 if 0 in (runs, second) else None if None in (runs, second) else 1
                target = place[int(i.operands[-1], 16)]
                if runs is None:
                    known = tuple(sorted((k, v) for k, v in thread.values.items() if "P" in k and v is not None))
                    key = (way.index, way.rounds, len(way.loads), len(way.stores), known)
                    if key not in seen:
                        seen.add(key)
                        heapq.heappush(ways, (way.steps, 2 * number, way.fork(target)))
                        heapq.heappush(ways, (way.steps, 2 * number + 1, way))
                    break
                if runs:
                    way.index = target
            elif i.base in ("EXIT", "CALL", "BRX", "RET") and runs != 0:
                if runs is not None or i.base != "EXIT":
                    break
            elif i.base in ("STG", "ST") and runs != 0:
                way.stores = (*way.stores, i.bits)
                if sum(way.stores) >= 8 * walk.stored:
                    if sum(way.loads) < 8 * walk.loaded:
                        break  # a sample without a row, which becomes NaN
                    if way.rounds == 2:
                        return Round(way.steps - way.begun, way.loads, way.stores)
                    way = replace(way, rounds=way.rounds + 1, begun=way.steps, loads=(), stores=())
            elif runs is None or (runs and not _execute(thread, i)):
                _forget(thread, i)
                if i.base in ("LDG", "LD"):
                    way.loads = (*way.loads, i.bits)
    return None


# Telling


def report(library: Path = native.LIBRARY) -> dict[str, Any]:
    """{"architectures": {"sm_90": {"kernels": [...], "calls": [...]}}} of a library."""
    found = {}
    for arch in architectures(library):
        kernels = {kernel.name: kernel for kernel in read(library, arch)}
        calls = []
        for walk in walks():
            kernel = kernels[walk.kernel]
            found_round = walk_round(kernel, walk)
            instructions = None if found_round is None else round(found_round.instructions / walk.elements, 1)
            calls.append(
                {
                    "call": walk.label,
                    "kernel": walk.kernel,
                    "registers": kernel.registers,
                    "blocks_per_multiprocessor": kernel.blocks,
                    "instructions_per_element": instructions,
                    "bytes_per_element": walk.bytes,
                    "slots_at_copy_speed": round(walk.bytes * SLOTS_PER_BYTE, 1),
                }
            )
        found[arch] = {
            "kernels": [
                {"kernel": k.name, "registers": k.registers, "stack": k.stack, "blocks_per_multiprocessor": k.blocks}
                for k in kernels.values()
            ],
            "calls": calls,
        }
    return {"architectures": found}


def markdown(found: dict[str, Any]) -> str:
    lines = []
    for arch, told in found["architectures"].items():
        lines += [f"### Machine code for {arch}: {len(told['kernels'])} kernels", ""]
        lines += ["| call | kernel | registers | blocks per SM | instructions per element | slots at copy speed |"]
        lines += ["|---|---|---:|---:|---:|---:|"]
        for call in told["calls"]:
            number = call["instructions_per_element"]
            lines.append(
                f"| {call['call']} | {call['kernel']} | {call['registers']} | {call['blocks_per_multiprocessor']} "
                f"| {'not found' if number is None else number} | {call['slots_at_copy_speed']} |"
            )
        others = sorted({call["kernel"] for call in told["calls"]} ^ {kernel["kernel"] for kernel in told["kernels"]})
        by_name = {kernel["kernel"]: kernel["registers"] for kernel in told["kernels"]}
        lines += ["", "Registers of the others: " + ", ".join(f"{name} {by_name[name]}" for name in others) + ".", ""]
    lines.append(
        f"Slots at copy speed: computed for an H200, {SLOTS_PER_BYTE:.2f} per byte (132 multiprocessors, 128 lanes, "
        "1.98 GHz, 4.3 TB/s). Counted in the code, not measured on a GPU."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=native.LIBRARY)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.library.exists():
        print(f"no machine code to read: {options.library} is not there")
        return
    if find_tool() is None:
        print("no machine code was read: there is no cuobjdump on the PATH, in CUDA_HOME or in Triton's package")
        return
    found = report(options.library)
    if not found["architectures"]:
        print("no machine code to read: the library was built without CUDA")
        return
    print(markdown(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
