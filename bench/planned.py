"""Writes the cases for GPUs without measurements, with their targets and their floors by the datasheets, for README.md.

python -m bench.planned
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import machine, measure, registry
from bench.devices import floor_seconds

BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12}
"""Bytes per second, by the GPU's name in the driver."""
MATMUL = {"bfloat16": {"median": 989e12}, "float32": {"median": 67e12}}
"""Flops per second, for both GPUs."""


def file(gpu: str) -> Path:
    return Path(__file__).parent / "results" / machine.folder({"gpu": gpu}) / "planned.json"


def planned(gpu: str) -> dict[str, Any]:
    rates = {"copy": {"median": BANDWIDTH[gpu]}, "matmul": MATMUL}
    rows = []
    for op in registry.operations().values():
        for case in op.cases["cuda"]:
            mode = case.modes[-1]
            row = {**measure.shared(op, case), "shape": case.sizes, "mode": mode, "variant": "ours", "less": ""}
            floor = op.floor(case, mode)._asdict()
            seconds = floor_seconds(floor, row["dtype"], rates)
            targets = {"target_s": case.target_s, "target_fraction": case.target_fraction}
            rows.append({**row, "time": None, "floor": {**floor, "seconds": seconds}, **targets})
    return {
        "machine": {"device": "cuda", "gpu": gpu, "planned": True},
        "rates": rates,
        "operations": rows,
    }


if __name__ == "__main__":
    from bench.results_file import as_text

    for gpu in BANDWIDTH:
        file(gpu).parent.mkdir(parents=True, exist_ok=True)
        file(gpu).write_text(as_text(planned(gpu)))
        print(f"written: {file(gpu)}")
