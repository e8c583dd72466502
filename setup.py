"""Builds the native library of fastdiff; pyproject.toml declares everything else.

The library is C++ (and CUDA) against LibTorch's stable ABI, without Python.h: one file serves every Python and every
torch >= 2.10. It takes a C++ compiler and the headers of the torch that is installed. Where one of them is missing,
the package is installed without the library and runs through PyTorch; a compiler that fails is an error.

Environment: CXX, MAX_JOBS, FASTDIFF_CUDA (auto, 0 or 1), CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "libfastdiff.so"
BUILD = Path("build/native")  # kept between builds, so that ninja compiles only what changed
PER_ISA = {"v4": "-march=x86-64-v4 -mprefer-vector-width=512", "v3": "-march=x86-64-v3", "base": ""}
COMMON = "-std=c++17 -O3 -DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # the stable ABI as of torch 2.10
HOST = "-fPIC -fvisibility=hidden -Wall -ffp-contract=off -fno-math-errno -fno-trapping-math"


def env(name, default=None):
    return os.environ.get(name, "").strip() or default


def find_torch():
    """Folder and version of the installed torch, or None. Not imported: only its headers are wanted."""
    code = (
        "from importlib import metadata, util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    )
    for flags in (
        [],
        ["-E"],
    ):  # pip hides the environment from an isolated build by PYTHONPATH; -E ignores that
        command = [sys.executable, *flags, "-c", f"{code}; print(metadata.version('torch'))"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0:
            return run.stdout.splitlines()
    return None


def find_compiler():
    if env("CXX"):
        return shlex.split(env("CXX"))
    return next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def find_nvcc():
    mode, home = env("FASTDIFF_CUDA", "auto"), env("CUDA_HOME")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"FASTDIFF_CUDA must be auto, 0 or 1, got {mode!r}")
    nvcc = None if mode == "0" else shutil.which("nvcc", path=home and f"{home}/bin")
    if mode == "1" and not nvcc:
        sys.exit(f"FASTDIFF_CUDA=1, but there is no nvcc {f'in {home}/bin' if home else 'on the PATH'}")
    return nvcc


def gencode():
    flags = []
    for arch in re.split(r"[\s;]+", env("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").strip(";")):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST must be numbers such as '8.0;9.0+PTX', got {arch!r}")
        for kind in ("sm", "compute")[: 2 if match[3] else 1]:
            flags.append(f"-gencode=arch=compute_{match[1]}{match[2]},code={kind}_{match[1]}{match[2]}")
    return " ".join(flags)


def ninja_file(cxx, nvcc, torch):
    """The text of build.ninja: no path in it needs ninja's quoting, being relative or in a flag."""

    def knows(flags):
        probe = [*cxx, *flags.split(), "-x", "c++", "-c", os.devnull, "-o", os.devnull]
        return subprocess.run(probe, capture_output=True).returncode == 0

    x86_64 = platform.machine() == "x86_64"
    isas = [isa for isa, flags in PER_ISA.items() if isa == "base" or (x86_64 and knows(flags))]
    have = " ".join(f"-DFASTDIFF_HAVE_{isa.upper()}" for isa in isas if isa != "base")
    headers, libraries = (shlex.quote(f"{torch}/{part}").replace("$", "$$") for part in ("include", "lib"))
    kernels = sorted(Path("csrc").glob("*.cu")) if nvcc else []
    objects = [(f"{file.stem}.cu.o", "nvcc", file, f"-isystem {headers} {gencode()}") for file in kernels]
    for file in sorted(Path("csrc").glob("*.cpp")):
        if file.stem == "step_cpu":  # plain loops without torch, once per instruction set
            flags = {f"step_cpu.{isa}.o": f"{PER_ISA[isa]} -DFASTDIFF_ISA={isa}" for isa in isas}
        else:
            flags = {f"{file.stem}.o": f"-isystem {headers} {have}"}
        objects += [(out, "cxx", file, flag) for out, flag in flags.items()]

    # nvcc links its own static runtime; --exclude-libs keeps another CUDA in the process from standing in for it.
    linker, to_linker = ("$nvcc -nodlink", "-Xlinker=") if kernels else ("$cxx", "-Wl,")
    lines = [
        f"cxx = {shlex.join(cxx)}",
        f"nvcc = {nvcc}" + (f" -ccbin {cxx[0]}" if len(cxx) == 1 else ""),
        "rule cxx",
        f"  command = $cxx {COMMON} {HOST} -Wextra $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule nvcc",
        f"  command = $nvcc {COMMON} -DUSE_CUDA --fmad=false -Xcompiler={HOST.replace(' ', ',')} $flags"
        " -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {linker} -shared $in -o $out {to_linker}--no-as-needed,-z,defs,--exclude-libs,ALL"
        f" -L{libraries} -ltorch -ltorch_cpu",
        *(f"build {out}: {rule} ../../{file}\n  flags = {flags}" for out, rule, file, flags in objects),
        f"build {LIBRARY}: link {' '.join(out for out, *_ in objects)}",
    ]
    return "\n".join(lines) + "\n"


class Build(build_ext):
    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name))
        out.unlink(missing_ok=True)
        nvcc, cxx, (torch, version) = find_nvcc(), find_compiler(), find_torch() or (None, "")
        if not sys.platform.startswith("linux"):
            missing = f"it is built on Linux only, this is {sys.platform}"
        elif not cxx:
            missing = "there is no C++ compiler (set CXX, or put g++ on the PATH)"
        elif not torch or [int(part) for part in version.split(".")[:2]] < [2, 10]:
            missing = f"torch >= 2.10 is not installed {version and f'({version} is)'} when fastdiff is built"
        else:
            missing = None
        if missing and env("FASTDIFF_CUDA") == "1":
            sys.exit(f"FASTDIFF_CUDA=1, but the native library cannot be built: {missing}")
        if missing:
            print(f"fastdiff: installing without the native library: {missing}", file=sys.stderr)
            return
        if any(Path("csrc").glob("*.cu")) and not nvcc and env("FASTDIFF_CUDA") != "0":
            print("fastdiff: there is no nvcc, so CUDA kernels are left out", file=sys.stderr)
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / "build.ninja").write_text(ninja_file(cxx, nvcc, torch))
        jobs = ["-j", env("MAX_JOBS")] if env("MAX_JOBS") else []
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(BUILD), *jobs])
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(BUILD / LIBRARY, out)


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


sources = [str(file) for file in sorted(Path("csrc").glob("*.cpp"))]
others = [str(file) for pattern in ("*.h", "*.cu", "*.cuh") for file in sorted(Path("csrc").glob(pattern))]
setup(
    ext_modules=[Extension("fastdiff.libfastdiff", sources, depends=others, optional=True)],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
