"""The machine of a measurement: the facts that a reader needs to compare two measurements."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from batchkern import _backend
from bench import peers

QUICK = os.environ.get("BATCHKERN_BENCH_QUICK") == "1"
"""Whether to use small shapes and few rounds: a check of the benchmarks, not a measurement."""
ROOT = Path(__file__).resolve().parents[1]


def facts(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "KMP_", "MKL_"))},
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "peers": peers.versions(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "compiler": _backend.extension.build_facts()["compiler"] if _backend.extension else None,
        "extension_error": _backend.extension_error,
        "commit": os.environ.get("BATCHKERN_BENCH_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "dirty": _git("status", "--porcelain", "--", ".", ":!bench/results") not in ("", "unknown"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "huge_pages": huge_pages(),
        "load_average": os.getloadavg(),
        "quick": QUICK,
    }


def folder(facts: dict[str, Any]) -> str:
    """The name of the machine's folder of results."""
    name = facts["gpu"] or facts["cpu"]
    words = re.findall(r"[a-z0-9.]+", re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@", " ", name.lower()))
    return "-".join(words if facts["gpu"] else [*words, f"{facts['cores']}cores"])


def huge_pages() -> str | None:
    """Linux's setting of transparent huge pages for this process: always, madvise or never."""
    get_thp_disable = 42  # of prctl
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        disabled = ctypes.CDLL(None).prctl(get_thp_disable, 0, 0, 0, 0) == 1
    except (OSError, AttributeError):
        return None
    return "never" if disabled else re.search(r"\[(\w+)\]", setting).group(1)


def _cpu_model() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
