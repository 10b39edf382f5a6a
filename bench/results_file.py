"""How a file of results is written."""

from __future__ import annotations

import json
from typing import Any


def as_text(report: dict[str, Any]) -> str:
    """JSON with one line per entry and four significant digits."""
    parts = []
    for key, value in report.items():
        if isinstance(value, list) and value:
            lines = ",\n".join("  " + json.dumps(rounded(entry)) for entry in value)
            parts.append(f' "{key}": [\n{lines}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(rounded(value))}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
