"""Everything that needs a GPU, in under nine minutes: build, tests, memory checks, benchmarks. `make gpu` runs it.

    python3 .ci/gpu.py [--out FOLDER] [--commit ID] [--rehearse]

Made for a bare machine without network: the interpreter's own packages (torch, triton, pytest, ...) are used, and what
`make gpu-carry` put into .gpu: wheels, and the recorded steps of other codebases. Every part has a time limit, and its
failure does not stop the later ones. The folder gets eight files, whose names begin with gpu-; the exit status is 0
where all went well, 1 where a part failed, 2 without a GPU. --rehearse goes through all parts on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".gpu"
BEGUN = time.monotonic()
SECONDS = 525.0  # of all parts together
LOG_BYTES = 4 * 2**20
CONFIGURATION = """
import json, torch
found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"gpu": p.name, "gpus": torch.cuda.device_count(), "multiprocessors": p.multi_processor_count}
    found |= {"memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
print(json.dumps(found))
"""


class Parts:
    """Runs commands under time limits, and keeps what became of them."""

    def __init__(self, out: Path, environment: dict[str, str]) -> None:
        self.out, self.environment = out, environment
        self.found: dict[str, dict[str, Any]] = {}

    def left(self) -> float:
        return SECONDS - (time.monotonic() - BEGUN)

    def run(
        self,
        name: str,
        command: list[str],
        limit: float,
        log: Path,
        judge: Callable[[str], tuple[str, dict[str, int]]] | None = None,
        **variables: str,
    ) -> str:
        """The output of a command; its status is "passed", "failed" or "timed out", or what `judge` makes of it."""
        limit = min(limit, self.left())
        begin = time.monotonic()
        status, output, more = "timed out", "", {}
        if limit > 5:
            print(f"{name} ...", flush=True)
            with log.open("ab") as file:
                start = file.tell()
                # a session of its own, so that a limit ends its children too
                process = subprocess.Popen(
                    command, cwd=ROOT, env=self.environment | variables, stdout=file, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
                code = self.wait(process, limit)
            with log.open("rb") as file:
                file.seek(start)
                output = file.read().decode(errors="replace")
            if code is not None:
                status = "passed" if code == 0 else "failed"
                if judge is not None:
                    status, more = judge(output)
        seconds = round(time.monotonic() - begin, 1)
        self.found[name] = {"status": status, "seconds": seconds} | more
        print(f"{name}: {status}, {seconds} s", flush=True)
        return output

    def wait(self, process: subprocess.Popen[bytes], limit: float) -> int | None:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            # pytest writes its report when it is interrupted
            for number, patience in ((signal.SIGINT, 8), (signal.SIGKILL, None)):
                try:
                    os.killpg(process.pid, number)
                    process.wait(patience)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
        return None


def has(module: str, environment: dict[str, str]) -> bool:
    """Whether an interpreter with this environment finds a module."""
    return (
        subprocess.run([sys.executable, "-c", f"import {module}"], env=environment, capture_output=True).returncode == 0
    )


def version(command: list[str], pattern: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    run = subprocess.run(command, capture_output=True, text=True)
    match = re.search(pattern, run.stdout + run.stderr)
    return match[1].strip() if match else None


def describe(commit: str) -> dict[str, Any]:
    """The machine and the versions."""
    run = subprocess.run([sys.executable, "-c", CONFIGURATION], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"gpu: {sys.executable} cannot import torch: {run.stderr.strip().splitlines()[-1]}")
    if not commit and shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = commit or "unknown"
    found = {"commit": commit, "python": platform.python_version(), "cpus": os.cpu_count()}
    found |= json.loads(run.stdout.splitlines()[-1])
    driver = version(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"(.+)")
    nvcc = version(["nvcc", "--version"], r"release ([\d.]+)")
    return found | {"driver": driver, "nvcc": nvcc}


def carried(folder: Path) -> dict[str, str]:
    """PYTHONPATH and the like for what was carried; the wheels are unpacked into `folder`."""
    paths, wheels = [str(ROOT)], sorted(map(str, (CARRIED / "wheels").glob("*.whl")))
    if wheels:
        site = folder / "site"
        for wheel in wheels:  # pure Python: to unpack them is to install them
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        paths.append(str(site))
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    variables = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    recorded = CARRIED / "reference"
    if recorded.is_dir() and not os.environ.get("FASTDIFF_REPLAY_DIR"):
        variables["FASTDIFF_REPLAY_DIR"] = str(recorded)
    return variables


def tests_of(report: Path) -> dict[str, Any]:
    """Counts, failures and reasons for skipping, from pytest's XML."""
    if not report.exists():
        return {"counts": None}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failed, reasons, slowest = [], {}, []
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        slowest.append((float(case.get("time", 0)), name))
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            counts["failed"] += 1
            text = problem.text or ""
            failed.append({"test": name, "message": (problem.get("message") or "")[:1000], "traceback": text[-6000:]})
        elif skipped is not None:
            counts["skipped"] += 1
            reason = (skipped.get("message") or "")[:200]
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    longest = [{"test": name, "seconds": round(seconds, 1)} for seconds, name in sorted(slowest)[:-16:-1]]
    return {"counts": counts, "failed": failed, "skipped": reasons, "slowest": longest}


REFUSED = r"[Dd]evice not supported|not supported on this (device|system)|Failed to initialize|Unable to find injection"


def judge_sanitizer(tool: str, output: str) -> tuple[str, dict[str, int]]:
    """The status of a run, and its errors: all of them, and those in our kernels.

    torch's own kernels may read memory that nothing wrote (padding of a vector): only ours count for initcheck.
    """
    summary = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", output)
    ours = len(
        re.findall(
            r"=========\s+(?:Invalid|Uninitialized|Misaligned|Address)[^\n]*\n=========\s+at [^\n]*fastdiff", output
        )
    )
    errors = {"errors": sum(map(int, summary)), "in_our_kernels": ours}
    finished = re.search(r"\d+ results on cuda as they should be", output) is not None
    if not finished and re.search(REFUSED, output):
        return "refused", errors
    bad = ours if tool == "initcheck" else errors["errors"]
    return ("passed" if finished and summary and not bad else "failed"), errors


def shorten(log: Path) -> None:
    """The beginning and the end of a log that is too long."""
    data = log.read_bytes() if log.exists() else b""
    if len(data) > LOG_BYTES:
        half = LOG_BYTES // 2
        log.write_bytes(data[:half] + b"\n... left out ...\n" + data[-half:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", default="", help="where there is no git to ask")
    parser.add_argument("--rehearse", action="store_true", help="go through all parts on a CPU")
    options = parser.parse_args()
    if shutil.which("nvcc") is None and Path("/usr/local/cuda/bin/nvcc").exists():
        os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    machine = describe(options.commit)
    if machine["gpu"] is None and not options.rehearse:
        print("gpu: there is no CUDA device here (make gpu DRY=1 goes through all parts on a CPU)")
        return 2
    rehearsal = machine["gpu"] is None
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("gpu-*"):
        old.unlink()

    with tempfile.TemporaryDirectory(prefix="fastdiff-gpu-") as temporary:
        folder = Path(temporary)
        parts = Parts(out, dict(os.environ) | carried(folder))
        run_parts(parts, folder, machine, rehearsal)
        summary = {"rehearsal": rehearsal} | machine | {"carried": sorted(p.name for p in CARRIED.glob("*/*.whl"))}
        summary |= {"parts": parts.found, "seconds": round(time.monotonic() - BEGUN, 1)}
        (out / "gpu-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for log in out.glob("gpu-*.log"):
        shorten(log)
    bad = [name for name, part in parts.found.items() if part["status"] in ("failed", "timed out")]
    print(f"gpu: {machine['gpu'] or 'rehearsal on a CPU'}, {summary['seconds']} s, {out}: "
          + (f"failed: {', '.join(bad)}" if bad else "all parts passed"))  # fmt: skip
    return 1 if bad else 0


def run_parts(parts: Parts, folder: Path, machine: dict[str, Any], rehearsal: bool) -> None:
    out, python = parts.out, sys.executable
    if not rehearsal:
        parts.environment |= {"TORCH_CUDA_ARCH_LIST": machine["capability"], "FASTDIFF_CUDA": "1"}
    else:
        parts.environment["FASTDIFF_GPU_TESTS_ON_CPU"] = "1"
    jobs = str(min(16, os.cpu_count() or 1))
    parts.run("build", [python, "setup.py", "build_ext", "--inplace"], 110, out / "gpu-build.log", MAX_JOBS=jobs)

    report, record = folder / "tests.xml", folder / "record.jsonl"
    command = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--junitxml", str(report), "--tb=long"]
    command += ["tests/gpu"]
    if has("xdist", parts.environment):  # compiling for Triton takes processors, not the GPU
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "worksteal"]
    if has("pytest_timeout", parts.environment):
        command += ["--timeout", "60"]
    parts.run("tests", command, 170, out / "gpu-tests.log", FASTDIFF_GPU_RECORD=str(record))
    found = tests_of(report)
    (out / "gpu-tests.json").write_text(json.dumps(found, indent=1) + "\n")
    parts.found["tests"]["counts"] = found["counts"]
    for failure in found.get("failed", [])[:25]:
        print(f"  FAILED {failure['test']}: {' '.join(failure['message'].split())[:160]}")
    lines = record.read_text().splitlines() if record.exists() else []
    cases = [json.loads(line) for line in lines]
    told = {
        name: sum(case.get("equal") is value for case in cases) for name, value in (("equal", True), ("unequal", False))
    }
    parts.found["tests"]["steps_of_other_codebases"] = told
    (out / "gpu-equal.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")

    script, log = [python, "tests/gpu/odd_cases.py"], out / "gpu-sanitizer.log"
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    parts.run("odd cases", script, 40, log)
    # racecheck and synccheck for the kernels that sum in blocks; what comes last is cut where time is short
    for tool, limit in (("memcheck", 60), ("initcheck", 50), ("racecheck", 30), ("synccheck", 25)):
        if rehearsal or sanitizer is None:
            parts.found[tool] = {"status": "missing" if sanitizer is None else "skipped", "seconds": 0.0}
            continue
        # without torch's cache every tensor is an allocation of its own, whose bounds the tool knows
        arguments = [sanitizer, "--tool", tool, "--report-api-errors", "no"]
        judge = functools.partial(judge_sanitizer, tool)
        parts.run(tool, [*arguments, *script], limit, log, judge, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    results, table = out / "gpu-benchmarks.json", out / "gpu-benchmarks.md"
    seconds = max(20.0, min(195.0, parts.left() - 25))
    command = [python, "benchmarks/gpu.py", "--json", str(results), "--commit", machine["commit"]]
    command += ["--seconds", str(round(seconds))] + (["--quick", "--device", "cpu"] if rehearsal else [])
    text = parts.run("benchmarks", command, seconds + 20, table)
    # the goals and the chains; the cases stand in the file
    print("\n".join(line for line in text.splitlines() if not re.match(r"\| \w+, \w+, 2\^", line)))
    parts.run("machine code", [python, "benchmarks/kernels.py"], 30, table)


if __name__ == "__main__":
    sys.exit(main())
