"""Device time of the CUDA kernels beside eager PyTorch and ``torch.compile``, with floors and targets.

    python bench/gpu_kernels.py [--out FILE.json] [--seconds 120]

A variant is a captured CUDA graph of some calls, replayed and timed with events: so launches wait for nothing. Variants
take turns within a round; medians of many rounds. The floor is bytes over the copy bandwidth measured in the same run.
The file is written anew after each case, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch
from gpu_cases import Call, Case, cases

ROUNDS = 25


def event_seconds(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(call: Call) -> int:
    """Beyond what there was, of a call that has been made before."""
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
    return peak


def captured(call: Call) -> tuple[Call, int]:
    """A graph of so many calls that it runs for about 2 ms, and their number."""
    torch.cuda.synchronize()  # the other stream would not wait for the inputs
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    calls = max(1, min(100, int(2e-3 / max(event_seconds(call), 1e-6))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, calls


def copy_bandwidth() -> float:
    """Bytes read and written a second."""
    source = torch.randn(1 << 29, device="cuda")
    to = torch.empty_like(source)
    to.copy_(source)
    return 2 * source.nbytes / statistics.median(event_seconds(lambda: to.copy_(source)) for _ in range(15))


def matmul_rate() -> float:
    """bfloat16 flops a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * 8192**3 / statistics.median(event_seconds(lambda: a @ b) for _ in range(15))


def host_seconds(call: Call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        call()
    seconds = (time.perf_counter() - start) / 200
    torch.cuda.synchronize()
    return seconds


def measure(case: Case, bandwidth: float, rate: float) -> list[dict[str, Any]]:
    torch.compiler.reset()
    torch.manual_seed(0)
    problem = case.build()
    timed: dict[str, tuple[Call, int]] = {}
    peaks: dict[str, int] = {}
    for name, call in problem.variants.items():
        try:
            peaks[name] = peak_bytes(call)
            timed[name] = captured(call) if problem.captured else (call, 1)
        except Exception as error:
            if name == "ours":
                raise
            print(f"{case.op} {case.label}: {name} cannot be measured: {str(error).splitlines()[0]}")
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    order = list(timed)
    for _ in range(ROUNDS):
        random.shuffle(order)
        for name in order:
            call, calls = timed[name]
            seconds[name].append(event_seconds(call) / calls)
    floor = problem.floor_bytes / bandwidth + problem.floor_flops / rate
    rows = []
    for name, durations in seconds.items():
        p20, median, p80 = harness.quantiles(durations)
        rows.append(
            {
                "op": case.op,
                "case": case.label,
                "phase": case.phase,
                "variant": name,
                "median_s": median,
                "p20_s": p20,
                "p80_s": p80,
                "ratio_to_ours": harness.quantiles([a / b for a, b in zip(durations, seconds["ours"])])[1],
                "peak_bytes": peaks[name],
                "floor_bytes": problem.floor_bytes,
                "floor_flops": problem.floor_flops,
                "floor_s": floor,
                "over_floor": median / floor,
                "target_s": case.target_s if name == "ours" else None,
                "host_s": host_seconds(problem.variants[name]) if problem.host else None,
            }
        )
    return rows


def facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        **harness.machine_facts(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def line(row: dict[str, Any]) -> str:
    target = f"  target {row['target_s'] * 1e6:.0f}" if row["target_s"] else ""
    host = f"  host {row['host_s'] * 1e6:.0f}" if row["host_s"] else ""
    return (
        f"{row['op']:28} {row['case']:26} {row['variant']:8} {row['median_s'] * 1e6:10.1f} us"
        f"  x{row['over_floor']:.2f} of the floor  x{row['ratio_to_ours']:.2f} of ours{target}{host}"
        f"  {row['peak_bytes'] / 1e6:,.0f} MB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="start no case after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels.py needs a CUDA GPU that torch can see", file=sys.stderr)
        return 2
    start = time.monotonic()
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    report: dict[str, Any] = {"machine": facts(), "copy_bytes_per_s": bandwidth, "matmul_flops_per_s": rate}
    report |= {"rows": [], "left_out": []}
    print(f"{report['machine']['gpu']}: copy {bandwidth / 1e12:.2f} TB/s, bf16 matmul {rate / 1e12:.0f} Tflop/s")
    for case in cases():
        if time.monotonic() - start > arguments.seconds:
            report["left_out"].append(f"{case.op} {case.label}")
        else:
            rows = measure(case, bandwidth, rate)
            report["rows"] += rows
            print("\n".join(line(row) for row in rows), flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
