"""Builds the native library of fastdiff; pyproject.toml declares everything else.

The library is C++ (and CUDA) against LibTorch's stable ABI, without Python.h: one file serves every Python
and every torch >= 2.10. It takes a C++ compiler and the headers of the torch that is installed. Where one of
them is missing, the package is installed without the library and runs through PyTorch; a compiler that fails
is an error.

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

BUILD = Path("build/native")  # kept between builds, so that ninja compiles only what changed
TARGET = "-std=c++17 -O3 -DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # the stable ABI as of torch 2.10
HOST = "-fPIC -fvisibility=hidden -Wall -ffp-contract=off -fno-math-errno -fno-trapping-math"
DEVICE = "-DUSE_CUDA --fmad=false -Xcompiler=-Wno-unknown-pragmas"
LINK = "--no-as-needed,-z,defs,--exclude-libs,ALL"
PER_ISA = {"v4": "-march=x86-64-v4 -mprefer-vector-width=512", "v3": "-march=x86-64-v3", "base": ""}


def env(name, default=None):
    return os.environ.get(name, "").strip() or default


def find_torch():
    """Folder and version of the installed torch, or (None, ""). Not imported: its headers are enough."""
    code = (
        "from importlib import metadata, util; print(util.find_spec('torch').submodule_search_locations[0]);"
        "print(metadata.version('torch'))"
    )
    for flags in [], ["-E"]:  # by PYTHONPATH, pip hides the environment from an isolated build; -E ignores it
        run = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
        if run.returncode == 0:
            return run.stdout.splitlines()
    return None, ""


def find_nvcc():
    mode, home = env("FASTDIFF_CUDA", "auto"), env("CUDA_HOME")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"FASTDIFF_CUDA must be auto, 0 or 1, got {mode!r}")
    nvcc = None if mode == "0" else shutil.which("nvcc", path=home and f"{home}/bin")
    if mode == "1" and not nvcc:
        sys.exit(f"FASTDIFF_CUDA=1, but there is no nvcc {f'in {home}/bin' if home else 'on the PATH'}")
    return nvcc


def gencode():
    flags = ""
    for arch in re.split(r"[\s;]+", env("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").strip(";")):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST must be numbers such as '8.0;9.0+PTX', got {arch!r}")
        number = match[1] + match[2]
        for code in [f"sm_{number}", f"compute_{number}"][: 2 if match[3] else 1]:
            flags += f" -gencode=arch=compute_{number},code={code}"
    return flags


def ninja_file(cxx, nvcc, torch):
    """The text of build.ninja. Sources are named from its folder, so no path needs ninja's own quoting."""

    def knows(flags):
        probe = [*shlex.split(cxx), *flags.split(), "-xc++", "-c", os.devnull, "-o", os.devnull]
        return subprocess.run(probe, capture_output=True).returncode == 0

    isas = PER_ISA if platform.machine() == "x86_64" else ["base"]
    isas = [isa for isa in isas if isa == "base" or knows(PER_ISA[isa])]
    have = " ".join(f"-DFASTDIFF_HAVE_{isa.upper()}" for isa in isas[:-1])
    headers, libraries = (shlex.quote(f"{torch}/{part}").replace("$", "$$") for part in ("include", "lib"))
    objects = {}
    for file in sorted(Path("csrc").glob("*.cpp")):
        builds = {file.stem: f"-isystem {headers} {have}"}
        if file.stem == "step_cpu":  # plain loops without torch, once per instruction set
            builds = {f"step_cpu.{isa}": f"{PER_ISA[isa]} -DFASTDIFF_ISA={isa}" for isa in isas}
        objects |= {f"{name}.o": f"cxx ../../{file}\n  flags = {flags}" for name, flags in builds.items()}
    linker, to_linker = cxx, "-Wl,"
    for file in sorted(Path("csrc").glob("*.cu")) if nvcc else []:
        objects[f"{file.stem}.cu.o"] = f"nvcc ../../{file}\n  flags = -isystem {headers}{gencode()}"
        linker, to_linker = f"{nvcc} -nodlink", "-Xlinker="  # it brings its static runtime
    statements = "\n".join(f"build {name}: {how}" for name, how in objects.items())
    # --exclude-libs hides that runtime's symbols, or torch's own CUDA runtime would stand in for them. libstdc++
    # goes first, because some builds of torch export copies of its functions, without their versions.
    return f"""\
rule cxx
  command = {cxx} {TARGET} {HOST} -Wextra $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule nvcc
  command = {nvcc} {TARGET} {DEVICE} -Xcompiler={HOST.replace(" ", ",")} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = {linker} -shared $in -o $out {to_linker}{LINK} -lstdc++ -L{libraries} -ltorch -ltorch_cpu
{statements}
build libfastdiff.so: link {" ".join(objects)}
"""


class Build(build_ext):
    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name))
        out.unlink(missing_ok=True)  # one from an earlier build must not be taken for this one's
        nvcc, (torch, version) = find_nvcc(), find_torch()
        cxx = env("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
        missing = None
        if not sys.platform.startswith("linux"):
            missing = f"it is for Linux only, this is {sys.platform}"
        elif not cxx:
            missing = "there is no C++ compiler (put g++ on the PATH, or set CXX)"
        elif not torch or [int(part) for part in version.split(".")[:2]] < [2, 10]:
            missing = f"torch >= 2.10 must be installed before fastdiff is (found: {version or 'none'})"
        if missing and env("FASTDIFF_CUDA") == "1":
            sys.exit(f"FASTDIFF_CUDA=1, but there can be no native library: {missing}")
        if missing:
            print(f"fastdiff: installing without the native library: {missing}", file=sys.stderr)
            return
        host = [word for word in shlex.split(cxx) if not word.startswith("-")][-1]
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / "build.ninja").write_text(ninja_file(cxx, nvcc and f"{nvcc} -ccbin {host}", torch))
        jobs = ["-j", env("MAX_JOBS")] if env("MAX_JOBS") else []
        if subprocess.call([sys.executable, "-m", "ninja", "-C", str(BUILD), *jobs]):
            sys.exit("fastdiff: the native library could not be built; the reason stands above")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(BUILD / "libfastdiff.so", out)


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


sources, headers, kernels = ([str(f) for f in sorted(Path("csrc").glob(p))] for p in ("*.cpp", "*.h", "*.cu"))
library = Extension("fastdiff.libfastdiff", sources, depends=headers + kernels, optional=True)
setup(ext_modules=[library], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
