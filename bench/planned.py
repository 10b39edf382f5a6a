"""Writes the cases for a GPU that nothing was measured on yet, with their floors by its datasheet and their targets:
``python -m bench.planned``. README.md shows them until there are figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import measure, registry
from bench.devices import floor_seconds

FILE = Path(__file__).parent / "results" / "nvidia-h200" / "planned.json"
DATASHEET = {
    "copy": {"median": 4.8e12},
    "matmul": {"bfloat16": {"median": 989e12}, "float32": {"median": 67e12}},
}


def planned() -> dict[str, Any]:
    rows = []
    for op in registry.operations().values():
        for case in op.cases["cuda"]:
            mode = case.modes[-1]
            row = {**measure.shared(op, case), "shape": case.sizes, "mode": mode, "variant": "ours", "less": ""}
            floor = op.floor(case, mode)._asdict()
            seconds = floor_seconds(floor, row["dtype"], DATASHEET)
            rows.append({**row, "time": None, "floor": {**floor, "seconds": seconds}, "target_s": case.target_s})
    return {
        "machine": {"device": "cuda", "gpu": "NVIDIA H200", "planned": True},
        "rates": DATASHEET,
        "operations": rows,
    }


if __name__ == "__main__":
    from bench.results_file import as_text

    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(as_text(planned()))
    print(f"written: {FILE}")
