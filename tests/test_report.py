"""The report says what the records say, refuses what it must, and a fall of speed is found."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    names = "summary", "report", "compare", "losses", "chapters", "charts", "readme"
    summary, report, compare, losses, chapters, charts, readme = map(importlib.import_module, names)

MACHINE = {
    "python_version": "3.11.7",
    "cpu": {"brand_raw": "Made-up", "arch": "X86_64", "count": 2, "caches": {"L1 Data": "32K", "L3": "32768K"}},
    "torch": "2.13.0",
    "fastdiff": "0.1.0",
    "compiler": "GCC: 12",
    "cpu_capability": "AVX512",
    "openmp": {},
    "load_average": 0.5,
}


def record(part: str, case: str, provider: str, median: float, **more: Any) -> dict[str, Any]:
    stats = {"median": median, "q1": median * 0.98, "q3": median * 1.03, "iqr": median * 0.05, "rounds": 9}
    return {
        "name": f"test[{case}-{provider}]",
        "stats": stats,
        "extra_info": {"part": part, "case": case, "provider": provider, "threads": 1} | more,
    }


def step(sampler: str, shape: tuple[int, ...], provider: str, median: float, **more: Any) -> dict[str, Any]:
    elements = 1
    for size in shape:
        elements *= size
    counted = {"launches": 10, "small_operations": 44, "reads": 11, "allocations": 9, "moved_bytes": 88 * elements}
    if provider.startswith("fastdiff"):
        counted = dict.fromkeys(counted, 0) | {"launches": 1, "moved_bytes": 12 * elements, "equal": True}
    known = {"elements": elements, "bytes": 12 * elements, "sampler": sampler, "dtype": "float32"}
    known |= {} if provider == "copy" else counted | {"error": 3.5e-7 if provider == "host" else 2.25e-7}
    return record("step", f"{sampler}-{'x'.join(map(str, shape))}", provider, median, **known | more)


def made_up() -> dict[str, Any]:
    """A file with records of every kind."""
    records = []
    for shape, medians in (
        ((1, 16, 2), (123.4e-6, 88e-6, 19e-6, 5.61e-6, 1.1e-6)),
        ((1, 3, 32, 32), (142e-6, 90e-6, 23e-6, 6.72e-6, 1.2e-6)),
        ((8, 3, 256, 256), (10.4e-3, 60e-3, 7.9e-3, 1.31e-3, 0.29e-3)),
    ):
        for provider, median in zip(("host", "compiled", "plain", "fastdiff", "copy"), medians, strict=True):
            records.append(step("ddpm", shape, provider, median))
    records += [
        step("ddim", (4, 4, 64, 64), "fastdiff", 13.1e-6),
        step("ddim", (4, 4, 64, 64), "copy", 9e-6),
        step("ddim", (4, 4, 64, 64), "compiled", 11.2e-6),
        step("ddim", (1, 3, 32, 32), "fastdiff_inplace", 4.1e-6),
    ]
    for provider, median in (("fastdiff", 1.0e-3), ("torch", 5.3e-3), ("numpy_sfc64", 11.8e-3)):
        records.append(record("noise", "normal-1572864", provider, median, elements=1572864))
    for piece, median in (("whole", 4.1e-6), ("kernel", 0.3e-6), ("dispatch", 1.9e-6), ("validation", 1.6e-6)):
        records.append(record("overhead", "small-ddim_inplace", piece, median))
    for axis, values in (("elements", (2**8, 2**12, 2**16, 2**20)), ("steps", (1, 10, 100)), ("threads", (1, 2))):
        for provider, start, slope in (("fastdiff", 4e-6, 2e-10), ("plain", 1e-5, 5e-10), ("copy", 1e-6, 1.7e-10)):
            for value in values:
                more = {"axis": axis, "value": value, "sampler": "ddim", "bytes_touched": 12 * value, "faults": 0}
                more |= {"elements": value, "bytes": 12 * value} if axis == "elements" else {}
                median = {"elements": start + slope * value, "steps": start * value, "threads": start / value}[axis]
                records.append(record("growth", f"growth-{axis}-{value}", provider, median, **more))
    for network, alone, sampler in (("policy", 3.1e-3, 0.6e-3), ("unet2d", 190e-3, 1e-3)):
        for provider, factor in (("fastdiff", 1), ("plain", 3), ("diffusers", 15)):
            more = {"network": network, "mode": "eager", "sampler": "ddpm", "steps": 100, "network_seconds": alone}
            median = alone + factor * sampler
            case = f"chain-{network}-eager"
            records.append(
                record(
                    "chain", case, provider, median, **more, sampler_share=factor * sampler / median, shape=[1, 16, 2]
                )
            )
    for provider, median in (("fastdiff", 128e-6), ("plain_autograd", 103e-6)):
        records.append(record("train", "ddim-1x3x32x32-gradients", provider, median, elements=3072, saved_tensors=2,
                              saved_bytes=0))  # fmt: skip
    records.append(record("memory", "chain-50", "checkpoint", 0.42, peak_bytes=18249068, bound_bytes=17996236))
    for provider, median in (("host", 123e-6), ("fastdiff", 20.2e-6), ("philox", 26e-6)):
        records.append(record("integration", "diffusers-ddpm-action", provider, median))
    pieces = {"bare_seconds": 2.95, "probe_seconds": 0.021, "files_seconds": 0.024, "disk_seconds": 0.0198}
    records.append(record("bulk", "bulk-64", "fastdiff", 3.0, batch=64, steps=20, samples=896,
                          overheads=[0.0164, 0.008, 0.0215, 0.0301, 0.012], processor_overheads=[0.0117, 0.009, 0.015],
                          **pieces))  # fmt: skip
    more = {"sampling_seconds": 7.2, "chunk_seconds": 0.221, "speedups": [1.85, 1.79, 1.9]}
    more |= {"one_seconds": 17.2, "one_sampling_seconds": 13.3, "one_chunk_seconds": 0.206}
    records.append(record("processes", "bulk-processes", "2_processes", 11.6, batch=64, steps=20, samples=4096,
                          processes=2, **more))  # fmt: skip
    for provider, median in (("fastdiff", 5.6e-3), ("diffusers", 17.6e-3)):
        records.append(
            record("forecast", "forecast-1", provider, median, batch=1, steps=100, network_seconds=4.8e-3,
                   crps=0.371, crps_climatology=0.512, crps_persistence=0.498)
        )  # fmt: skip
    return {
        "machine_info": copy.deepcopy(MACHINE),
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-20T12:00:37",
        "benchmarks": records,
        "outcome": {"passed": len(records), "failed": [], "skipped": {"test[jax]": "JAX is not installed"}}
        | {"exitstatus": 0, "deselected": 0},
    }


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to_file(content: Any, name: str = "benchmarks.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return to_file


def the_record(content: dict[str, Any], case: str, provider: str) -> dict[str, Any]:
    (found,) = (
        one
        for one in content["benchmarks"]
        if (one["extra_info"]["case"], one["extra_info"]["provider"]) == (case, provider)
    )
    return found


def change(content: dict[str, Any], case: str, provider: str, factor: float) -> None:
    found = the_record(content, case, provider)
    for name in ("median", "q1", "q3"):
        found["stats"][name] *= factor


def test_the_figures_of_a_record_are_on_both_pages(write: Any) -> None:
    for page in report.build([write(made_up())]):
        for figure in (
            "22.0 times faster",  # 123.4 / 5.61
            "5.61 µs",
            "68.7% of copy",  # 9 / 13.1
            "7.33",  # 88 bytes moved of 12
            "74.4%",  # of the policy's chain is diffusers' sampler
            "0.371",
            "1.6%",  # over the bare chains, of which 48 ms the probe and the files take 45
            "3.38 ms",
            "quartiles 1.2% to 2.1%",
            "1.79 to 1.90 times faster",
            "1.48",  # 17.2 / 11.6
            "3.90 s",  # 17.2 - 13.3
            "1.24",  # times slower than autograd, which is told
            "JAX is not installed",
            "not yet measured",
            "2.2e-07",
        ):
            assert figure in page, figure
    _, text = report.build([write(made_up())])
    lost = text.split("## Where we lose, and why")[1].split("## ")[0]
    assert "ddim-1x3x32x32-gradients" in lost and "`ddim-4x4x64x64`" in lost and "3.80 µs are our call" in lost
    assert "ddpm-8x3x256x256" not in lost
    lines = text.replace(str(write(made_up())), "benchmarks/results/cpu-epyc.json").splitlines()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


def test_losses_and_goals_follow_the_record(write: Any) -> None:
    content = made_up()
    run = summary.merge([summary.read(write(content))])[0]
    met = {verdict.goal.case: verdict.met for verdict in summary.verdicts(run.results) if verdict.met is not None}
    assert met["ddpm-1x3x32x32"] and not met["ddim-4x4x64x64"] and met["forecast-1"]
    change(content, "ddpm-1x3x32x32", "fastdiff", 1.05)
    change(content, "ddpm-8x3x256x256", "fastdiff", 10)
    run = summary.merge([summary.read(write(content))])[0]
    assert not next(v for v in summary.verdicts(run.results) if v.goal.case == "ddpm-1x3x32x32").met
    slower = {(pair.case, pair.theirs["extra_info"]["provider"]) for pair in losses.comparisons(run) if pair.ratio > 1}
    assert {("ddpm-8x3x256x256", "plain"), ("ddpm-8x3x256x256", "host")} <= slower
    assert ("ddpm-8x3x256x256", "compiled") not in slower


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content.pop("outcome"), "does not tell how its run went"),
        (lambda content: content["outcome"].update(failed=["test_step[x]"]), r"failed: test_step\[x\]"),
        (lambda content: content["outcome"].pop("exitstatus"), "does not tell how its run went"),
        (lambda content: content["outcome"].update(exitstatus=2), "was cut off: pytest ended with 2"),
        (lambda content: content["outcome"].update(passed=5), "benchmarks, of which 5 passed"),
        (lambda content: content.pop("machine_info"), "unknown format"),
        (lambda content: content["machine_info"].pop("openmp"), "has no openmp"),
        (lambda content: content["machine_info"].update(cpu=None), "has no cpu with its count"),
        (lambda content: content["machine_info"]["cpu"]["caches"].update(L3="big"), "readable sizes of caches"),
        (lambda content: content.update(commit_info=None), "no commit"),
        (lambda content: content.update(benchmarks=None), "has no benchmarks"),
        (lambda content: content["benchmarks"].append(None), "None has no content"),
        *(
            (lambda content, bad=bad: content["benchmarks"][3]["stats"].update(median=bad), "has no median")
            for bad in (math.nan, math.inf, 0.0, -1.0, True, "1")
        ),
        (lambda content: content["benchmarks"][3]["extra_info"].update(elements=0), "has no usable elements"),
        (lambda content: content["benchmarks"][3]["extra_info"].update(error=math.nan), "has no finite error"),
        (lambda content: content["benchmarks"][3]["extra_info"].pop("part"), "has no known part"),
        (lambda content: content["benchmarks"][3].update(stats=None), "has no median"),
        (lambda content: content["benchmarks"][-1]["extra_info"].pop("crps"), "forecast-1-diffusers. has no crps"),
        *(
            (lambda content, name=name, case=case, by=by: the_record(content, case, by)["extra_info"].pop(name), name)
            for case, by, name in (
                ("bulk-64", "fastdiff", "overheads"),
                ("bulk-processes", "2_processes", "sampling_seconds"),
            )
        ),
        *(
            (lambda content, more=more, case=case, by=by: the_record(content, case, by)["extra_info"].update(more), why)
            for case, by, more, why in (
                ("bulk-64", "fastdiff", {"overheads": [0.01, -1.0, 0.02]}, "no usable overheads"),
                ("bulk-64", "fastdiff", {"overheads": [0.01, "0.02", 0.02]}, "no usable overheads"),
                ("bulk-64", "fastdiff", {"overheads": 0.01}, "no usable overheads"),
                ("bulk-64", "fastdiff", {"processor_overheads": [0.01]}, "no usable processor_overheads"),
                ("bulk-64", "fastdiff", {"files_seconds": 3.1}, "no files_seconds within its median"),
                ("bulk-processes", "2_processes", {"speedups": [1.9, 0.0, 1.8]}, "no usable speedups"),
                ("bulk-processes", "2_processes", {"sampling_seconds": 11.7}, "no sampling_seconds within its median"),
                (
                    "bulk-processes",
                    "2_processes",
                    {"one_sampling_seconds": 17.3},
                    "no one_sampling_seconds within its one_seconds",
                ),
            )
        ),
        (lambda content: content["benchmarks"].append(content["benchmarks"][0]), "two records of ddpm-1x16x2 by host"),
    ],
)
def test_a_file_is_refused(write: Any, spoil: Any, reason: str, tmp_path: Path, capsys: Any) -> None:
    content = made_up()
    spoil(content)
    good, bad = write(made_up()), write(content, "bad.json")
    pages = [f"--html={tmp_path / 'page.html'}", f"--markdown={tmp_path / 'page.md'}"]
    with pytest.raises(SystemExit, match=reason) as refusal:
        report.main([str(good), str(bad), *pages])
    assert "bad.json" in str(refusal.value)
    assert not list(tmp_path.glob("page.*"))
    report.main([str(good), *pages])
    assert len(list(tmp_path.glob("page.*"))) == 2


def test_damaged_and_missing_files_are_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"cut\.json: is damaged"):
        report.main([str(write(json.dumps(made_up())[:-9], "cut.json"))])
    with pytest.raises(SystemExit, match="nowhere: cannot be read"):
        report.main([str(tmp_path / "nowhere")])


def test_later_files_win_and_machines_stand_apart(write: Any) -> None:
    later, other = made_up(), made_up()
    change(later, "ddpm-1x16x2", "fastdiff", 0.1)
    other["machine_info"]["cpu"]["brand_raw"] = "Another"
    files = [write(made_up(), "a.json"), write(later, "b.json"), write(other, "c.json")]
    page, text = report.build(files)
    first, second = text.split("## Another run: 2 x Another (AVX512)")
    assert "561 ns" in first and "5.61 µs" not in first
    assert "5.61 µs" in second and "### Whole chains" in second
    assert "](#" in first and "](#" not in second
    check_places(page)


@pytest.mark.parametrize(
    ("change_it", "name"),
    [
        (lambda content: content["machine_info"].update(torch="2.7.0"), "torch 2.7.0"),
        (lambda content: content["machine_info"]["cpu"]["caches"].update(L3="16M"), "caches L1 Data 32K, L3 16M"),
        (lambda content: content["machine_info"].update(openmp={"OMP_PLACES": "cores"}), "OMP_PLACES=cores"),
        (lambda content: content["commit_info"].update(id="fedcba9876543210"), "fastdiff 0.1.0 at fedcba9876"),
    ],
)
def test_environments_stand_apart(write: Any, change_it: Any, name: str) -> None:
    other = made_up()
    change_it(other)
    one, two = summary.merge(map(summary.read, [write(made_up(), "a.json"), write(other, "b.json")]))
    assert summary.difference(one, two) == name


def test_a_gpu_is_another_machine(write: Any) -> None:
    on_gpu = made_up()
    on_gpu["machine_info"]["gpu"] = "Made-up GPU"
    on_gpu["benchmarks"] = [one for one in on_gpu["benchmarks"] if one["extra_info"]["part"] == "step"]
    for one in on_gpu["benchmarks"]:
        one["extra_info"]["device"] = "cuda"
    change(on_gpu, "ddpm-1x16x2", "fastdiff", 0.1)
    cpu, gpu = write(made_up(), "a.json"), write(on_gpu, "b.json")
    first, second = report.build([cpu, gpu])[1].split("## Another run: Made-up GPU")
    assert "On this CPU" in first and "5.61 µs" in first and "561 ns" not in first
    assert "On this GPU" in second and "561 ns" in second and "GPU: not yet" not in second
    assert "### Goals" not in second and "one thread;" not in second
    on_gpu["machine_info"]["gpu"] = None
    assert summary.merge([summary.read(write(on_gpu, "c.json"))])[0].name == "a GPU"
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(cpu), str(gpu)])


def test_a_selection_is_told(write: Any) -> None:
    content = made_up()
    assert "A selection" not in report.build([write(content)])[1]
    content["outcome"]["deselected"] = 7
    content["benchmarks"] = [
        one for one in content["benchmarks"] if one["extra_info"]["part"] not in ("chain", "noise")
    ]
    page, text = report.build([write(content)])
    assert "`benchmarks.json` without 7 benchmarks. Not measured here: noise and chain." in text.replace("\n", " ")
    check_places(page)


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ([2.4, 4.2, 3.0], "2.4 to 4.2 times faster"),
        ([2.42, 2.44], "2.4 times faster"),
        ([0.5, 0.8], "1.2 to 2.0 times slower"),
        ([0.8, 3.0], "from 1.2 times slower to 3.0 times faster"),
    ],
)
def test_the_lead_tells_slower_from_faster(ratios: list[float], text: str) -> None:
    assert chapters.faster_or_slower(ratios) == text


def test_what_the_page_says_of_noise_is_so(write: Any) -> None:
    content, case = made_up(), "normal-1572864"
    assert "no step that draws from it was faster" in " ".join(report.build([write(content)])[1].split())
    change(content, case, "torch", 2)
    change(content, case, "fastdiff", 2)
    text = " ".join(report.build([write(content)])[1].split())
    assert "was faster than that" not in text and "yet a step that draws from it (plain PyTorch) 5.02" in text
    assert "are what the normals alone take" not in text


def test_a_missed_goal_is_explained_by_what_was_measured(write: Any) -> None:
    def why(content: dict[str, Any], case: str, provider: str = "fastdiff") -> str:
        run = summary.merge([summary.read(write(content))])[0]
        found = next(v for v in summary.verdicts(run.results) if (v.goal.case, v.goal.provider) == (case, provider))
        return losses.why_missed(run, found)

    content, case = made_up(), "ddim-4x4x64x64"
    # the smallest copy took 1 + 256 * 1.7e-4 us: (9 - 1.0435) / (13.1 - 3.8)
    assert "about 1.04 µs are its own: without either the share is 85.55%, which misses it too" in why(content, case)
    change(content, case, "copy", 1.1)
    assert "95.23%, and the goal would be met" in why(content, case)
    change(content, case, "fastdiff", 100)
    assert why(content, case) == ""
    assert "Its largest parts: dispatch 1.90 µs" in why(content, "ddim-1x3x32x32", "fastdiff_inplace")
    change(content, "ddim-1x3x32x32", "fastdiff_inplace", 1.2)
    assert "one of the two was disturbed" in why(content, "ddim-1x3x32x32", "fastdiff_inplace")


def test_goals_of_sampling_in_bulk(write: Any) -> None:
    def of(content: dict[str, Any], case: str) -> tuple[bool | None, str]:
        run = summary.merge([summary.read(write(content))])[0]
        found = next(verdict for verdict in summary.verdicts(run.results) if verdict.goal.case == case)
        return found.met, losses.why_missed(run, found) if found.met is False else ""

    content = made_up()
    assert of(content, "bulk-64") == of(content, "bulk-processes") == (True, "")
    the_record(content, "bulk-64", "fastdiff")["extra_info"].update(overheads=[0.04, 0.05, 0.03])
    the_record(content, "bulk-processes", "2_processes")["extra_info"].update(speedups=[1.68, 1.9, 1.6])
    met, why = of(content, "bulk-64")
    assert met is False and why.startswith("Of 118 ms above the bare chains the probe takes 21.0 ms and the files take")
    met, why = of(content, "bulk-processes")
    assert met is False and why == "A chunk takes a process 206 ms alone and 221 ms beside another process."
    text = " ".join(report.build([write(content)])[1].split())
    assert "4.0% over the bare chains | **no** | 3.00 s; bare 2.95 s; quartiles of the rounds 3.0% to 5.0%" in text
    assert "1.68 times faster | **no** | 7.20 s; one process 13.3 s; rounds 1.60 to 1.90" in text


def test_without_sampling_in_bulk_its_chapter_is_left_out(write: Any) -> None:
    content = made_up()
    for part, absent in (("processes", "processes"), ("bulk", "bulk and processes")):
        content["benchmarks"] = [one for one in content["benchmarks"] if one["extra_info"]["part"] != part]
        text = " ".join(report.build([write(content)])[1].split())
        assert ("## Sampling in bulk" in text) == (part == "processes") and "digits by torchrun" not in text
        assert f"Not measured here: {absent}." in text


def test_disturbances_of_sampling_in_bulk_are_told(write: Any) -> None:
    def page() -> str:
        return " ".join(report.build([write(content)])[1].split())

    content = made_up()
    fast, wide = "2 processes were more than 2 times as fast as one", "wider apart than the goal's 3%"
    assert "disturbed" not in page() and fast not in page() and wide not in page()
    the_record(content, "bulk-processes", "2_processes")["extra_info"].update(speedups=[2.2, 1.6, 2.04])
    text = page()
    assert fast in text and "2.04 times faster | disturbed |" in text and ", 1 disturbed," in text and wide not in text
    the_record(content, "bulk-64", "fastdiff")["extra_info"].update(overheads=[-0.002, -0.04, 0.03, 0.01, -0.03])
    text = page()
    assert wide in text and "| not in these | -50.9 ms | -1.73% |" in text


def test_errors_are_compared_in_the_same_cases(write: Any) -> None:
    content = made_up()
    the_record(content, "ddpm-8x3x256x256", "host")["extra_info"].update(error=9e-7)
    the_record(content, "ddpm-8x3x256x256", "fastdiff")["extra_info"].update(error=8e-7)
    accuracy = report.build([write(content)])[1].split("## Accuracy")[1].split("\n## ")[0]
    assert "8.0e-07" in accuracy and "9.0e-07" in accuracy
    content["benchmarks"].remove(the_record(content, "ddpm-8x3x256x256", "compiled"))
    text = report.build([write(content)])[1]
    accuracy = text.split("## Accuracy")[1].split("\n## ")[0]
    assert "8.0e-07" not in accuracy and "9.0e-07" not in accuracy
    assert "in 1 of 3 float32 DDPM cases" in text and "3.56 times it" in text


def test_labels_of_an_axis_keep_their_distance() -> None:
    assert charts.apart([(0, "a"), (30, "b"), (50, "c"), (90, "d")], 38) == [(0, "a"), (50, "c"), (90, "d")]
    assert charts.apart([(0, "a")], 38) == [(0, "a")]


def test_results_of_a_gpu_have_a_chapter(write: Any) -> None:
    case = {"kind": "ddim", "dtype": "float32", "elements": 2**26, "provider": "native", "device_us": 201.5}
    results = {
        "environment": {"gpu": "Made-up GPU", "torch": "2.13.0", "python": "3.11"},
        "conditions": "Events.",
        "goals": [{"goal": "DDIM >= 0.92", "found": 0.93, "met": True}],
        "chains": [{"network": "mlp", "how": "fastdiff, one graph", "ms": 0.41}],
        "cases": [case | {"copy_us": 190.0, "share_of_copy": 0.943, "gb_per_s": 3990.0}],
        "left_out": [],
        "failures": [],
        "commit": "0123456789abcdef",
        "rehearsal": False,
    }
    cpu = write(made_up())
    text = report.build([cpu, write(results, "gpu.json")])[1]
    assert "Made-up GPU" in text and "94.3%" in text and "not yet measured" not in text
    with pytest.raises(summary.Refused, match="rehearsal"):
        report.build([cpu, write(results | {"rehearsal": True}, "gpu.json")])
    with pytest.raises(summary.Refused, match="interrupted"):
        report.build([cpu, write(results | {"failures": ["interrupted"]}, "gpu.json")])


class Page(HTMLParser):
    """Checks that tags are closed in order; collects ids, links and what a browser would fetch."""

    EMPTY = {"meta", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[list[tuple[float, float, float]]] = []  # of each svg: left, right, baseline

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.fetched += [values[name] for name in ("src", "srcset", "xlink:href") if name in values]
        self.fetched += [tag] if tag in ("link", "script", "iframe", "img") else []
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "svg":
            self.texts.append([])
        if tag == "text":
            self.at = float(values["x"]), float(values["y"]), values["text-anchor"]

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "text":
            x, y, place = self.at
            width = 6.6 * len(data)  # of 12 pixels a letter, about
            left = x - {"start": 0, "middle": width / 2, "end": width}[place]
            self.texts[-1].append((left, left + width, y))


def check_places(page: str) -> None:
    """No place twice, no link to none."""
    parser = Page()
    parser.feed(page)
    assert len(set(parser.ids)) == len(parser.ids)
    assert all(link[1:] in parser.ids for link in parser.links if link.startswith("#"))


def test_the_page_is_well_formed_and_self_contained(write: Any) -> None:
    page = report.build([write(made_up())])[0]
    parser = Page()
    parser.feed(page)
    assert not parser.open
    assert not parser.fetched and not re.search(r"https?:|@import|url\(", page)
    check_places(page)
    assert all((ROOT / "benchmarks" / "report" / link).resolve().is_relative_to(ROOT) for link in parser.links)
    assert len(parser.texts) > 8
    elsewhere = report.build([write(made_up())], ROOT / "page.html", ROOT / "docs" / "more" / "page.md")
    assert 'href="./examples/forecast"' in elsewhere[0] and "(../../examples/forecast)" in elsewhere[1]
    for texts in parser.texts:
        for number, (left, right, y) in enumerate(texts):
            assert left >= -4 and right <= 330
            for left_of_other, right_of_other, other in texts[:number]:
                assert abs(y - other) >= 11 or right < left_of_other or left > right_of_other


def test_compare_names_what_fell(write: Any, capsys: Any) -> None:
    old, new = made_up(), made_up()
    compare.main([str(write(old, "old.json")), str(write(new, "new.json"))])
    assert "0 of 13 shares" in capsys.readouterr().out
    change(new, "ddim-4x4x64x64", "fastdiff", 1.25)  # a fifth less of a copy
    change(new, "ddpm-1x16x2", "fastdiff", 1.1)
    new["benchmarks"] = [one for one in new["benchmarks"] if one["extra_info"]["case"] != "ddpm-1x3x32x32"]
    files = [str(write(old, "old.json")), str(write(new, "new.json"))]
    with pytest.raises(SystemExit) as end:
        compare.main(files)
    out = capsys.readouterr().out
    assert end.value.code == 1
    assert "fell by 20%: ddim-4x4x64x64, fastdiff: 68.7% of a copy, now 55.0%" in out
    assert "only in the old file: ddpm-1x3x32x32, fastdiff" in out and "1x16x2" not in out
    compare.main([*files, "--threshold=0.21"])
    with pytest.raises(SystemExit) as end:
        compare.main([files[0], "nowhere.json"])
    assert end.value.code == 2 and "nowhere.json: cannot be read" in capsys.readouterr().err
    new["benchmarks"] = [one for one in new["benchmarks"] if one["extra_info"]["provider"] != "copy"]
    with pytest.raises(SystemExit) as end:
        compare.main([files[0], str(write(new, "new.json"))])
    assert end.value.code == 2 and "nothing to compare" in capsys.readouterr().err


COMMITTED = report.RESULTS / "cpu-epyc.json"


def test_the_committed_page_is_of_the_committed_results() -> None:
    page = report.ROOT / "docs" / "performance.md"
    command = re.match("<!-- Made by `python\\s+benchmarks/report.py (.*?)`", page.read_text(encoding="utf-8"), re.S)
    assert command
    files = [ROOT / name for name in shlex.split(command[1])]
    if not all(file.is_relative_to(report.RESULTS) for file in files):
        pytest.skip("the page was made anew, of results of your own")
    html, text = report.build(files)
    assert page.read_text(encoding="utf-8") == text
    assert (ROOT / "benchmarks" / "report" / "index.html").read_text(encoding="utf-8") == html


def test_quotes_of_sampling_in_bulk(write: Any) -> None:
    assert list(readme.bulk(summary.read(write(made_up()))[1])) == [
        "1.6 % more time than the bare chains of a small network",
        "two processes sample 1.85 times as fast as one",
    ]


def test_the_readme_quotes_the_committed_results() -> None:
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    code = json.loads((report.RESULTS / "kernels.json").read_text(encoding="utf-8"))
    missing = [text for text in readme.quotes(summary.read(COMMITTED)[1], code) if text not in page]
    assert not missing
