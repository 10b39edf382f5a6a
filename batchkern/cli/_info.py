"""``batchkern info``."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Annotated, Any

import torch

from batchkern import _backend
from batchkern._version import __version__
from batchkern.cli._options import option
from batchkern.cli._tables import make_table, print_tables


def info(as_json: Annotated[bool, option("--json", help="print JSON")] = False) -> None:
    """Print versions, and the backend of each operation."""
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    plain = make_table("installed", "")
    build = facts["extension"]
    shown = {key: facts[key] for key in ("batchkern", "torch", "python", "cuda")}
    shown["GPU"] = ", ".join(facts["gpus"]) or "none"
    shown["batchkern._C"] = build["why"] or "built"
    for key, value in (build["facts"] or {}).items():
        shown[f"  {key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    for key, value in shown.items():
        plain.add_row(key, str(value))
    backends = make_table("operation", "device", "backend", "why")
    for entry in facts["operations"]:
        backends.add_row(entry["op"], entry["device"], entry["backend"], entry["why"])
    print_tables(plain, backends)


def environment() -> dict[str, Any]:
    """The output of ``info``, for JSON."""
    extension = _backend.extension
    return {
        "batchkern": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none: this torch is for the CPU",
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "extension": {
            "facts": None if extension is None else extension.build_facts(),
            "why": _backend.extension_error,
        },
        "operations": [asdict(entry) for entry in _backend.status()],
    }
