"""The examples run, print what they promise, and say what is wrong with their arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import warm

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from batchkern.bench import markdown
from batchkern.bench.results import load
from batchkern.bench.tables import language

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--vocabulary",
    "400",
    "--width",
    "32",
    "--layers",
    "1",
    "--length",
    "16",
    "--batch",
    "4",
    "--test-batches",
    "2",
]


def selective_lm(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return warm.run(str(ROOT / "examples" / "selective_lm.py"), *arguments, cwd=cwd, env=environment, timeout=200)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"the {i % 7}th word of line {i} is {'abcdefgh'[i % 8] * (i % 5)}" for i in range(2000)))
    return path


def test_selective_lm(text: Path, tmp_path: Path) -> None:
    words = ["--text", str(text), "--updates", "60", "--keep", "1", "0.25", "--json", "arms.json"]
    run = selective_lm(*words, *SMALL, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    # The loss of the kept tokens is that of all where all are kept, and higher where the hardest are.
    lines = re.findall(
        r"(\S+ \S+) +update +(\d+) .* keep (\S+) +loss of (?:all|its ) tokens (\S+), of the kept (\S+)", run.stdout
    )
    last = {name: [float(x) for x in figures] for name, *figures in lines}
    assert set(last) == {"keep 1", "keep 0.25", "random 0.25"}
    assert {name: figures[:2] for name, figures in last.items()} == {
        "keep 1": [56, 1.0],
        "keep 0.25": [56, 0.3],
        "random 0.25": [56, 0.3],
    }
    assert last["keep 1"][2] == last["keep 1"][3]
    assert last["keep 0.25"][2] < last["keep 0.25"][3] - 0.1
    table = run.stdout[run.stdout.index("arm ") :].splitlines()
    rows = {
        line[:12].strip(): [float(x) for x in re.findall(r"[\d.]+", line[12:].replace(",", ""))] for line in table[2:]
    }
    assert set(rows) == set(last)
    for seconds, speed, megabytes, at_updates, at_seconds, updates in rows.values():
        assert min(seconds, speed, megabytes, updates) > 0
        assert at_updates < 6.0  # log 400 at first
        assert at_seconds < 6.2
    assert rows["keep 1"][3] == rows["keep 1"][4]
    assert rows["keep 1"][5] == 60
    check_json(tmp_path / "arms.json", rows)


def check_json(path: Path, rows: dict[str, list[float]]) -> None:
    """The file has the figures of the table, and is one that ``batchkern bench report`` shows."""
    written = json.loads(path.read_text())
    assert written["settings"]["keep"] == [1.0, 0.25]
    assert written["machine"]["device"] in ("cpu", "cuda")
    assert written["equal_seconds"] == written["arms"][0]["seconds"]
    keys = ("seconds", "tokens_per_s", "peak_bytes", "loss", "loss_at_equal_seconds", "updates_at_equal_seconds")
    assert [arm["arm"] for arm in written["arms"]] == list(rows)
    for arm in written["arms"]:
        shown = [arm[key] for key in keys]
        shown[2] /= 1e6
        assert shown == pytest.approx(rows[arm["arm"]], rel=1e-3, abs=0.06)
        assert arm["updates"] == 60
    table = language(load(path))
    assert f"| keep 1 | {markdown.seconds(written['arms'][0]['seconds'])} |" in table
    assert "held-out loss after 60 updates" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "1", "0"], "must be in (0, 1], got '0'"),
        (["--keep", "half"], "must be in (0, 1], got 'half'"),
        (["--updates", "0"], "must be a whole number from 1 to 1000000, got '0'"),
        (["--seed", "9" * 30], "must be a whole number from 0 to 1000000, got '999"),
        (["--width", "48"], "--width must be a multiple of 32, got 48"),
        (["--json", "short.txt"], "--json must be a file that does not exist yet in a folder that does, got short.txt"),
        (["--json", "no/x.json"], "--json must be a file that does not exist yet in a folder that does, got no/x.json"),
        (["--text", "nowhere.txt"], "--text must be a file that can be read, got nowhere.txt: No such file"),
        (["--text", "."], "--text must be a file that can be read, got .: Is a directory"),
        (["--text", "short.txt"], "--text must have more than --length 128 tokens to train on, it has"),
    ],
)
def test_selective_lm_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    run = selective_lm(*arguments, cwd=tmp_path)
    assert run.returncode == 2
    assert words in run.stderr
    assert "Traceback" not in run.stderr
