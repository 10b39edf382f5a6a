"""The threads of a benchmark run, its session, and what it prints and writes at the end.

``BATCHKERN_BENCH_OUT=folder`` writes ``folder/<machine>/<date>-<commit>.json``; without it the table is only printed.
``BATCHKERN_BENCH_QUICK=1`` makes shapes small and rounds few: a check of the benchmarks, not a measurement.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import harness
import pytest

_session: dict[str, Any] = {}


@pytest.fixture(scope="session")
def bench() -> harness.Bench:
    _session["machine"] = harness.machine_facts()
    _session["bench"] = harness.Bench()
    return _session["bench"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "bench" not in _session or not _session["bench"].rows:
        return
    machine = {**_session["machine"], "load_average_at_end": os.getloadavg()}
    failed = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    report = {"machine": machine, "failed": failed, **_session["bench"].report()}
    terminalreporter.write("\n" + _table(report))
    if folder := os.environ.get("BATCHKERN_BENCH_OUT"):
        name = f"{machine['date'][:10]}-{machine['commit']}.json"
        path = Path(folder, harness.machine_slug(machine), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        terminalreporter.write_line(f"written: {path}")


def _table(report: dict[str, Any]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Medians; the last two ratios are medians over rounds.
    table = Table(title=_title(report["machine"], report["copy_bytes_per_s"]), box=box.SIMPLE_HEAD)
    for heading in ("case", "phase"):
        table.add_column(heading, no_wrap=True)
    times = ("ours (p20, p80)", "floor", "/ floor", "eager", "compile", "eager/ours", "compile/ours")
    for heading in (*times, "peak MB of the three"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {(r["op"], r["case"], r["phase"], r["variant"]): r for r in report["rows"]}
    shown: list[str] = []  # the operation and the case of the row above
    for (op, case, phase, variant), row in rows.items():
        if variant in harness.PEERS:  # in columns
            continue
        if shown[:1] != [op]:
            table.add_section()
            table.add_row(op, row["backend"])
        peers = [rows[op, case, phase, peer] for peer in harness.PEERS]
        memory = ", ".join(f"{r['peak_bytes'] / 1e6:.3g}" for r in (row, *peers)) if "peak_bytes" in row else ""
        table.add_row(
            "" if shown == [op, case] else f"  {case}",
            f"{phase} {variant.removeprefix('ours').strip()}",
            _time(row["median_s"], row["p20_s"], row["p80_s"]),
            _time(row["floor_s"]),
            f"{row['over_floor']:.3g}",
            *(_time(peer["median_s"]) for peer in peers),
            *(f"{1 / row['ratio'][peer]:.2f}" for peer in harness.PEERS),
            memory,
        )
        shown = [op, case]
    stream = io.StringIO()
    Console(file=stream, width=170).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _title(machine: dict[str, Any], bandwidth: dict[str, float]) -> str:
    rates = [f"{bandwidth[name] / 1e9:.1f}" for name in ("median", "p20", "p80")]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}"
        + (" with changes" if machine["dirty"] else ""),
        f"load {machine['load_average'][0]:.2f} to {machine['load_average_at_end'][0]:.2f}, "
        f"copy {rates[0]} GB/s ({rates[1]}, {rates[2]})",
    ]
    if machine["quick"]:
        lines.append("QUICK: small shapes and few rounds, not a measurement")
    return "\n".join(lines)


def _time(seconds: float, *spread: float) -> str:
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    between = f" ({', '.join(f'{scale * s:.3g}' for s in spread)})" if spread else ""
    return f"{scale * seconds:.3g} {unit}{between}"
