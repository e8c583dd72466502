"""The build, the library file that it makes, and the package without that file."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import native

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastdiff.__file__).parent
LINUX = sys.platform.startswith("linux")
STABLE_ABI = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
needs_stable_abi = pytest.mark.skipif(not STABLE_ABI, reason="torch is older than 2.10")


def python(*args, cwd=PACKAGE.parent, **variables):
    """Run this interpreter in `cwd`, whose modules come before installed ones."""
    environment = os.environ | {"PYTHONPATH": str(cwd)} | variables
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def bare(tmp_path):
    """A folder with a copy of the package that has no native library."""
    shutil.copytree(PACKAGE, tmp_path / "fastdiff", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@pytest.fixture
def source(bare):
    """The same with the sources of the library and what builds them."""
    pytest.importorskip("setuptools", "77")
    pytest.importorskip("ninja")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, bare)
    shutil.copytree(ROOT / "csrc", bare / "csrc")
    return bare


def build(source, **variables):
    return python("setup.py", "build_ext", "--build-lib=out", cwd=source, **variables)


def compiler(folder, script):
    """An executable file, a shell script, to stand for the compiler."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library is not built")
@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")
def test_library_needs_only_the_stable_abi_and_the_system():
    """Torch's C functions, versioned symbols of the C and C++ libraries, and the weak hooks of any shared
    library: every at::, c10::, torch:: and Py symbol is something else."""
    command = ["nm", "--dynamic", "--undefined-only", str(native.LIBRARY)]
    symbols = [line.split()[-1] for line in subprocess.check_output(command, text=True).splitlines()]
    assert "torch_library_impl" in symbols
    allowed = r"(aoti_)?torch_\w+|\w+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|__gmon_start__|_ITM_\w+"
    assert [symbol for symbol in symbols if not re.fullmatch(allowed, symbol)] == []


@needs_stable_abi
@pytest.mark.skipif(not LINUX or not shutil.which("g++"), reason="needs g++ on Linux")
def test_library_is_here_where_it_can_be_built():
    assert native.why_not() is None


def test_import_touches_no_cuda_and_no_optional_package():
    code = (
        "import sys, torch; before = set(sys.modules); import fastdiff, fastdiff.ops, fastdiff.native;"
        "assert not torch.cuda.is_initialized();"
        "print({'PIL', 'diffusers', 'scipy', 'sklearn', 'tqdm', 'triton'} & (set(sys.modules) - before))"
    )
    run = python("-c", code)
    assert (run.returncode, run.stdout.strip()) == (0, "set()"), run.stderr


def test_report_names_versions_and_backends(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastdiff"])
    runpy.run_module("fastdiff", run_name="__main__")
    report = capsys.readouterr().out
    assert f"fastdiff {fastdiff.__version__}" in report
    for word in ("python", "torch", "numpy", "triton"):
        assert re.search(rf"^  {word} +\S", report, re.MULTILINE)
    reports = dict(
        re.findall(r"^  (native cpu|native cuda|triton|reference) +(live|no: .+?)(?: \(.+\))?$", report, re.MULTILINE)
    )
    assert len(reports) == 4
    assert reports["reference"] == "live"
    assert (reports["native cpu"] == "live") == native.available()


@needs_stable_abi
def test_without_the_library_everything_runs_and_says_so_once(bare):
    report = python("-m", "fastdiff", cwd=bare)
    assert report.returncode == 0, report.stderr
    assert re.search(r"native cpu +no: it was not built .*pip install", report.stdout)

    code = """
import warnings
import torch
from fastdiff import native, ops
from fastdiff.schedules import NoiseSchedule

assert not native.available()
schedule, x0, noise = NoiseSchedule.cosine(10), torch.rand(2, 3), torch.rand(2, 3)
t = torch.tensor([3, 4])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [ops.add_noise(x0, t, schedule, noise=noise, backend=b) for b in ("auto", "auto", "reference")]
assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
assert len(caught) == 1 and native.why_not() in str(caught[0].message), caught
try:
    ops.add_noise(x0, t, schedule, noise=noise, backend="native")
except RuntimeError as error:
    assert native.why_not() in str(error)
else:
    raise AssertionError("backend='native' ran without the library")
"""
    run = python("-c", code, cwd=bare)
    assert run.returncode == 0, run.stderr


@needs_stable_abi
def test_a_library_that_cannot_be_loaded_is_reported(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "broken.so")
    assert "could not be loaded" in native.load.__wrapped__()


def test_an_old_torch_is_reported(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    assert not native.available()
    with pytest.warns(RuntimeWarning, match="needs torch >= 2.10, this is torch 2.9.1"):
        native.warn_once.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(native, "load", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.warn_once.__wrapped__(torch.device("cpu"))


@needs_stable_abi
@pytest.mark.skipif(not LINUX, reason="the native library is for Linux")
class TestSetup:
    def test_without_a_compiler_it_says_so_in_one_line(self, source):
        run = build(source, PATH="", CXX="", FASTDIFF_CUDA="auto")
        assert run.returncode == 0, run.stderr
        lines = [line for line in run.stderr.splitlines() if "fastdiff" in line]
        assert len(lines) == 1 and "without the native library: there is no C++ compiler" in lines[0]
        assert not list(source.rglob("*.so"))

    def test_a_compiler_that_fails_is_an_error(self, source):
        run = build(source, CXX=compiler(source, "echo internal error >&2; exit 1"), FASTDIFF_CUDA="0")
        assert run.returncode != 0
        assert "internal error" in run.stdout + run.stderr
        assert not list(source.rglob("*.so"))

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="has one instruction set only")
    @pytest.mark.parametrize(
        "unknown, built", [("-v4", {"v3", "base"}), ("-v[34]", {"base"}), ("none", {"v4", "v3", "base"})]
    )
    def test_instruction_sets_that_the_compiler_does_not_know_are_left_out(self, source, unknown, built):
        knows = f'case "$*" in *x86-64{unknown}*) exit 1;; */dev/null*) exit 0;; *) exit 1;; esac'
        build(source, CXX=compiler(source, knows), FASTDIFF_CUDA="0")
        text = (source / "build/native/build.ninja").read_text()
        assert set(re.findall(r"-DFASTDIFF_ISA=(\w+)", text)) == built
        assert {have.lower() for have in re.findall(r"-DFASTDIFF_HAVE_(\w+)", text)} == built - {"base"}

    @pytest.mark.parametrize(
        "variables, message",
        [
            ({"FASTDIFF_CUDA": "yes"}, "FASTDIFF_CUDA must be auto, 0 or 1, got 'yes'"),
            ({"FASTDIFF_CUDA": "1", "CUDA_HOME": "/nowhere"}, "there is no nvcc in /nowhere/bin"),
        ],
    )
    def test_bad_variables_are_errors(self, source, variables, message):
        run = build(source, **variables)
        assert run.returncode != 0
        assert message in run.stderr
