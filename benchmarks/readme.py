"""The figures that README.md quotes, computed from committed results.

    python benchmarks/readme.py

prints the pieces of text that stand there; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import summary
from summary import Record, Results, fastest, ns_per_element, seconds

RESULTS = Path(__file__).parent / "results"
SIZES = ("1x16x2", "1x3x32x32", "16x3x64x64", "8x3x256x256")
PLAIN = ("plain", "plain_folded")
COMPILED = ("compiled", "compiled_noise_outside")
HOSTS = ("diffusers", "openai", "lucidrains", "ermongroup", "compvis", "sprites")


def us(record: Record | None) -> str:
    if record is None:
        return ""
    value = seconds(record) * 1e6
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def ms(record: Record) -> str:
    return f"{seconds(record) * 1e3:.1f}"


def ratio(slow: Record, fast: Record) -> str:
    return f"{seconds(slow) / seconds(fast):.1f}"


def quotes(results: Results, machine_code: dict[str, Any]) -> list[str]:
    """Whatever of README.md has a measured or counted figure in it."""
    return [
        *steps(results),
        *hosts(results),
        *training(results),
        *examples(results),
        *bulk(results),
        *counted(machine_code),
    ]


def steps(results: Results) -> Iterator[str]:
    for sampler in ("ddpm", "ddim"):
        for size in SIZES:
            case = f"{sampler}-{size}"
            host, ours = results[case, "host"], results[case, "fastdiff"]
            plain, compiled = fastest(results, case, *PLAIN), fastest(results, case, *COMPILED)
            rival = min((each for each in (host, plain, compiled) if each), key=seconds)
            name = f"{sampler.upper()}, ({size.replace('x', ', ')})"
            cells = [name, us(host), us(compiled), us(plain), us(ours), f"{ratio(rival, ours)} times"]
            yield f"| {' | '.join(cells)} |".replace("|  |", "| |")

    def ns(case: str, provider: str = "fastdiff") -> str:
        return f"{ns_per_element(results[case, provider]):.2f}"

    def share(case: str) -> str:
        return f"{seconds(results[case, 'copy']) / seconds(results[case, 'fastdiff']):.0%}".replace("%", " %")

    small = "1x3x32x32"
    one, two = f"ddpm-{SIZES[-1]}", f"ddpm-{SIZES[-1]}-2_threads"
    yield f"in place a DDIM step of (1, 3, 32, 32) takes {us(results['ddim-' + small, 'fastdiff_inplace'])} us"
    yield f"an int as seeds makes it {us(results['ddpm-' + small, 'fastdiff_int_seed'])}"
    yield (
        f"A DDPM step takes {ns('ddpm-4x3x128x128-avx512')} ns per element with AVX-512 (the noise alone "
        f"{ns('normal-1572864')}) and {ns('ddpm-4x3x128x128-avx2')} with AVX2"
    )
    yield f"with two threads {ms(results[two, 'fastdiff'])} ms in place of {ms(results[one, 'fastdiff'])}"
    yield (
        f"at {share('ddim-16x3x64x64')} of the speed of copying as many bytes at 196,608 elements, at "
        f"{share('ddim-8x3x256x256')} at 1.5 million and at {share('ddim-64x1048576')} at 2^26"
    )
    yield f"Without AVX2 a DDPM step takes {ns('ddpm-4x3x128x128-base').split('.')[0]} ns per element"
    ours, theirs = (results["chain-unet2d-1x3x32x32-ddim20-eager", each] for each in ("fastdiff", "diffusers"))
    yield f"took {ms(ours)} ms with fastdiff and {ms(theirs)} with diffusers' scheduler"


def hosts(results: Results) -> Iterator[str]:
    for name in HOSTS:
        by_itself, ours = (results[f"run-{name}", provider] for provider in ("host", "fastdiff"))
        outside = [record["extra_info"]["outside_network"] for record in (by_itself, ours)]
        network = 1 - outside[0] / seconds(by_itself)
        whole = seconds(by_itself) / seconds(ours)
        yield f"| {outside[0] / outside[1]:.2f} times | {whole:.2f} ({network:.0%} network) |".replace("%", " %")

    def step(case: str) -> tuple[Record, ...]:
        return tuple(results[f"diffusers-{case}", provider] for provider in ("host", "fastdiff", "philox"))

    action, latent, image = step("ddpm-action"), step("ddpm-latent"), step("ddpm-image")
    yield f"DDPM of an action chunk (1, 16, 2) {us(action[0])} us before, {us(action[1])} with fastdiff"
    yield f'of a latent (1, 4, 64, 64) {us(latent[0])} and {us(latent[1])}, with `noise="philox"` {us(latent[2])}'
    yield (
        f"of (8, 3, 256, 256) {ms(image[0])} and {ms(image[1])} ms, with philox {ms(image[2])} "
        f"({ratio(image[0], image[2])} times faster)"
    )
    again = [results["diffusers-set_timesteps", provider] for provider in ("fastdiff", "host")]
    yield f"A repeated `set_timesteps` takes {us(again[0])} us, {us(again[1])} without fastdiff"


def training(results: Results) -> Iterator[str]:
    def both(case: str) -> tuple[Record, Record]:
        return results[case, "fastdiff"], results[case, "plain_autograd"]

    one, two = both("ddpm-8x3x256x256-gradients"), both("ddpm-8x3x256x256-gradients-2_threads")
    yield (
        f"takes {ms(one[0])} ms, by plain autograd {ms(one[1])} ms ({ratio(*one[::-1])} times; "
        f"{ratio(*two[::-1])} with 2 threads)"
    )
    ddim, density = both("ddim-8x3x256x256-gradients"), both("ddpm-16x3x64x64-log_prob")
    yield f"a DDIM step {ms(ddim[0])} and {ms(ddim[1])} ms"
    yield f"with its log-density {seconds(density[0]) * 1e3:.2f} and {ms(density[1])} ms"
    small = [both(f"{case}-1x3x32x32-{task}") for case, task in (
        ("ddpm", "gradients"), ("ddim", "gradients"), ("ddpm", "log_prob"))]  # fmt: skip
    ratios = [seconds(plain) / seconds(ours) for ours, plain in small]
    yield (
        f"{ratios[0]:.2f} times as fast with gradients for DDPM, {ratios[1]:.2f} for DDIM, {ratios[2]:.1f} for the "
        "log-density"
    )
    peaks = {mode: results["chain-50", mode]["extra_info"] for mode in ("full", "checkpoint", "inversion")}
    full, checkpoint, inversion = (info["peak_bytes"] / 1e6 for info in peaks.values())
    yield f"hold {full:.0f} MB in full, {checkpoint:.0f} MB with checkpoints, {inversion:.0f} MB by inversion"
    yield f"recovered to {peaks['inversion']['error']:.0e}".replace("e-0", "e-")


def examples(results: Results) -> Iterator[str]:
    ours, theirs = (results["forecast-1", provider] for provider in ("fastdiff", "diffusers"))
    yield (
        f"100 steps of a small network: {ms(ours)} ms, {ms(theirs)} with diffusers' scheduler, "
        f"{ratio(theirs, ours)} times as long"
    )


def bulk(results: Results) -> Iterator[str]:
    overhead = summary.overhead(results["bulk-64", "fastdiff"])
    speedup = summary.speedup(results["bulk-processes", "2_processes"])
    yield f"{100 * overhead:.1f} % more time than the bare chains of a small network"
    yield f"two processes sample {speedup:.2f} times as fast as one"


def counted(machine_code: dict[str, Any]) -> Iterator[str]:
    """A step with noise, by instructions; benchmarks/kernels.py."""
    calls = [call for call in machine_code["architectures"]["sm_90"]["calls"] if call["call"] == "DDPM, seeds"]
    found = [(round(call["instructions_per_element"]), round(call["slots_at_copy_speed"])) for call in calls]
    float32, _, bfloat16 = found[:3]
    yield (
        f"a float32 DDPM step with noise takes {float32[0]} instructions per element, where memory at full speed "
        f"leaves time for {float32[1]}; in bfloat16 {bfloat16[0]} of {bfloat16[1]}"
    )


def main() -> None:
    results = summary.read(RESULTS / "cpu-epyc.json")[1]
    print("\n".join(quotes(results, json.loads((RESULTS / "kernels.json").read_text()))))


if __name__ == "__main__":
    main()
