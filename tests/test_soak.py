"""That soak.py kills and resumes, and that it sees what was lost; make soak does so for half an hour."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import warm
from training import single_thread, trainer, without_plots

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from lost import LostError, check, listing, state
from soak import Soak
from soaked import Case

from batchkern.rundir import CHECKPOINT, METRICS, SAMPLES, WEIGHTS

HERE = Path(__file__).parent
SOME = """
import sys, soak
from pathlib import Path
soak.quick_plots()
played = soak.Soak(Path(sys.argv[1]), seed=0, kills=4)
while played.kills() < 2:
    played.play("train", "train", "trimming", "killed")
played.play("full disk", "train", "trimming", "full_disk")
played.play("train + train --resume", "train", "trimming", "meet", "train", "train --resume")
print(played.table())
"""
one_thread = single_thread()


@pytest.mark.slow
def test_some_kills_lose_nothing(tmp_path):
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = warm.ENVIRONMENT | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = warm.run("-c", SOME, str(tmp_path), cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "lost: bits 0, outside 0, parts 0, refused 0", done.stdout
    figures = {line[:44].strip(): line[44:].split() for line in done.stdout.splitlines()}
    assert int(figures["all"][0]) >= 2
    assert "full disk" in figures


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """The directories of two trainings, by their seeds."""
    without_plots(monkeypatch)
    for seed in (0, 1):
        trainer(epochs=1, out=tmp_path / str(seed), seed=seed).fit()
    return tmp_path / "0", tmp_path / "1"


@pytest.mark.parametrize("name", [CHECKPOINT, METRICS, WEIGHTS, SAMPLES])
def test_a_file_of_another_training_is_seen(ended, name):
    out, other = ended
    whole = state(out, "train")
    check(out, "train", whole)
    shutil.copyfile(other / name, out / name)
    with pytest.raises(LostError, match="is not as what never was stopped") as lost:
        check(out, "train", whole)
    assert lost.value.args[0] == "bits"


def test_a_file_half_written_is_seen(ended):
    out, _ = ended
    whole = state(out, "train")
    (out / "metrics.jsonl.01234567.part").write_text("{")
    with pytest.raises(LostError, match="01234567.part"):
        check(out, "train", whole)


@pytest.mark.parametrize("changed", ["tree/below/notes", "tree/more", "beside", "out/mine/mine.part"])
def test_a_change_of_what_is_a_users_is_seen(tmp_path, changed):
    case = Case(Soak(tmp_path, 0, 0), tmp_path, "train", "baseline")
    (case.out / "mine").mkdir(parents=True)
    (case.out / "mine" / "mine.part").write_text("a part")
    case.mine = listing(case.out / "mine")
    case.check_outside()
    (tmp_path / changed).write_text("changed")
    with pytest.raises(LostError):
        case.check_outside()
