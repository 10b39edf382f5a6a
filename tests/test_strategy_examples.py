"""The scripts of the strategies in other trainers run, make the updates they should, and learn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import warm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("library", "options", "updates", "better_than"),
    [
        ("lightning", "--strategy passive --epochs 2", 2 * 45 + 4, 0.5),
        ("transformers", "--strategy hard-batches --epochs 3", 3 * 50, 0.3),
        ("accelerate", "--strategy stepwise --epochs 5", 81, 0.3),
        ("timm", "--strategy augmentation --epochs 2", 2 * 44, 0.6),
    ],
)
def test_scripts_run(library: str, options: str, updates: int, better_than: float, tmp_path: Path) -> None:
    pytest.importorskip(library)
    pytest.importorskip("sklearn")
    done = warm.run(str(EXAMPLES / f"{library}_strategies.py"), *options.split(), cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
    name, made, accuracy = re.findall(r"([\w-]+): (\d+) updates, test accuracy ([\d.]+)%", done.stdout)[0]
    assert (name, int(made)) == (options.split()[1], updates)
    assert float(accuracy) / 100 > better_than


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*_strategies.py")), ids=lambda path: path.stem)
def test_every_script_has_every_strategy(file: Path) -> None:
    text = file.read_text()
    for name in ("trimming", "hard-batches", "stepwise", "augmentation", "passive"):
        assert text.count(f'"{name}"') >= 2, name
