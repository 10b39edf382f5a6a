"""Gives damaged files and odd text to what reads them, for as long as it is told: make fuzz.

A target has a strategy of Hypothesis for its inputs, and a check that raises where an input does harm: an exception
other than a sentence for the user, a hang, a file touched that is none of ours, data that are not what was written.
Inputs are plain Python, so that what is found is printed as a row of FOUND in test_fuzz.py.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import training
from hypothesis import HealthCheck, Verbosity, given, settings
from hypothesis import strategies as st

from batchkern import data, records
from batchkern.compare import RESULTS, Comparison, run, running, split_arms
from batchkern.errors import UserError, require
from batchkern.files import slug
from batchkern.plots import plot_run
from batchkern.rundir import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    PREPROCESSING,
    PREVIOUS,
    RUN_FILES,
    RunDirectory,
    sealed,
    unsealed,
)
from batchkern.strategies import STRATEGIES, parse
from batchkern.trained import load_model

LIMIT, SHRINKING = 20.0, 60.0
"""Seconds that an input may take, and in which one that fails is made smaller."""
Target = tuple[st.SearchStrategy[Any], Callable[[Any], None]]

PLACES = st.integers(-(2**17), 2**17)
COUNTS = st.sampled_from([0, 1, 1, 4, 64, 4096, 10**9])
DAMAGE = st.lists(st.tuples(PLACES, COUNTS, st.binary(max_size=8) | PLACES), max_size=4)
NONE: st.SearchStrategy[Any] = st.just([])
VALUES = ["drop", "None", "True", "0", "-1", "2", "2**63", "10**400", "1.5", "-0.5", "float('nan')", "float('inf')"]
VALUES += ["''", "'x'", "'x' * 300", "'../elsewhere'", "'\\ud800'", "[]", "{}", "[old]", "{'x': old}", "[old] * 2"]
VALUES += ["str(old)", "-old", "old + 1", "old * 10", "old / 0.7", "old[:-1]", "old[::-1]", "old + old"]
TENSORS = ["torch.zeros(())", "torch.zeros(0)", "torch.zeros(2, 3)", "torch.zeros(1).expand(2**40)", "old[None]"]
TENSORS += ["torch.full_like(old, -1)", "torch.full_like(old, float('nan'))", "old.flatten()", "old.double()"]
TENSORS += ["old.int()", "old.bool()", "old.to(torch.complex64)", "old.to_sparse()", "old.to('meta')"]


def edited(content: bytes, edits: list[tuple[int, int, bytes | int]]) -> bytes:
    """Each edit puts bytes, or those at another place, in place of so many."""
    for place, count, new in edits:
        at = place % (len(content) + 1)
        part = new if isinstance(new, bytes) else content[new % (len(content) + 1) :][:count]
        content = content[:at] + part + content[at + count :]
    return content


def paths(tree: Any) -> list[tuple[Any, ...]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list | tuple) else ()
    return [(key, *below) for key in keys for below in [(), *paths(tree[key])]]


def tree_edits(tree: Any, values: list[str]) -> st.SearchStrategy[Any]:
    there = st.sampled_from(paths(tree))
    added = st.builds(lambda path, key: (*path[:-1], key), there, st.text(max_size=3))
    value = st.sampled_from(values) | st.integers().map(str) | st.text(max_size=5).map(repr)
    return st.lists(st.tuples(there | added, value), max_size=4)


def changed(tree: Any, edits: list[tuple[tuple[Any, ...], str]]) -> Any:
    """With other values, each an expression of the ``old`` one; what cannot be computed is left out."""
    tree = copy.deepcopy(tree)
    for path, expression in edits:
        with suppress(Exception):
            holder, key = tree, path[-1]
            for step in path[:-1]:
                holder = holder[step]
            old = holder.pop(key, None) if isinstance(holder, dict) else holder[key]
            if expression != "drop":
                holder[key] = eval(expression, {"torch": torch, "old": old})
    return tree


def listing(path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() if p.is_file() else b"" for p in path.rglob("*")}


ARMS = ("", "trimming+passive(every=2)+augmentation", "hard-batches(delta=0.5)", "random(select=batches,delta=0.5)")
ARMS += ("stepwise(fractions=(.5,1),batch_multiples=(1,1))",)


def trainer(arm: str, out: Path, *, resume: bool = False) -> Any:
    strategies = parse(arm, passive=training.images(12, seed=2))
    options: dict[str, Any] = {"out": out, "resume": resume, "batch_size": 16, "checkpoint_every": 1}
    return training.trainer(strategies, model=training.net(norm=True), **options)


def renewed(kept: Path, at: Path) -> Path:
    shutil.rmtree(at, ignore_errors=True)
    return shutil.copytree(kept, at)


def opened(kept: Path, out: Path) -> RunDirectory:
    of_run = json.loads((renewed(kept, out) / CONFIG).read_text())["settings"]
    return RunDirectory(out, of_run, {}, overwrite=False, resume=True)


def checkpoint(folder: Path) -> Target:
    """What it holds is of another kind; its bytes are damaged, under the old checksum or under a new one."""
    runs = {arm: folder / str(place) for place, arm in enumerate(ARMS)}
    for arm, kept in runs.items():
        trainer(arm, kept).fit()
    states = {arm: torch.load(kept / PREVIOUS, weights_only=True) for arm, kept in runs.items()}

    def check(value: Any) -> None:
        arm, edits, damage, anew = value
        directory = opened(runs[arm], folder / "run")
        file = directory.path / CHECKPOINT
        directory.save_checkpoint(changed(states[arm], edits))
        whole, damaged = file.read_bytes(), edited(file.read_bytes(), damage)
        if damaged != whole:
            with suppress(ValueError):
                unsealed(damaged)
                raise AssertionError("a change of a checkpoint is not seen")
            damaged = sealed(damaged.rpartition(b"batchkern ")[0] or damaged) if anew else damaged
        file.write_bytes(damaged)
        before, seen = listing(directory.path), damaged != whole and not anew
        try:
            trainer(arm, directory.path, resume=True)
        except UserError:
            assert not seen or listing(directory.path) == before, "files of a run that cannot go on are changed"
        else:
            assert not seen, "a damaged checkpoint is loaded"

    def inputs(arm: str) -> st.SearchStrategy[Any]:
        return st.tuples(st.just(arm), NONE | tree_edits(states[arm], VALUES + TENSORS), NONE | DAMAGE, st.booleans())

    return st.sampled_from(ARMS).flatmap(inputs), check


def metrics(folder: Path) -> Target:
    """Of a run, and the figures of what is read."""
    trainer(ARMS[1], folder / "kept").fit()
    rows = [json.loads(line) for line in (folder / "kept" / METRICS).read_text().splitlines()]

    def check(value: Any) -> None:
        edits, damage, count = value
        directory = opened(folder / "kept", folder / "run")
        lines = "".join(json.dumps(row) + "\n" for row in changed(rows, edits))
        (directory.path / METRICS).write_bytes(edited(lines.encode(), damage))
        with suppress(UserError):
            directory.metrics(count)
        read = None
        with suppress(OSError, ValueError):
            read = records.read_metrics(directory.path / METRICS)
        if read is not None and count is None:  # drawing takes long
            with suppress(UserError):
                plot_run(directory.path)

    return st.tuples(tree_edits(rows, VALUES), NONE | DAMAGE, st.sampled_from([None, 0, 1, 2, 3, 9])), check


def preprocessing(folder: Path) -> Target:
    """Of a run whose model is loaded, and used on its images."""
    kept, pixels = folder / "kept", training.images(4).images
    training.trainer(model="cnn", out=kept, epochs=1).fit()
    written = json.loads((kept / PREPROCESSING).read_text())

    def check(value: Any) -> None:
        edits, damage = value
        file = renewed(kept, folder / "run") / PREPROCESSING
        file.write_bytes(edited(json.dumps(changed(written, edits)).encode(), damage))
        with suppress(UserError):
            loaded = load_model(file.parent)
            assert loaded.model(loaded.preprocessing(pixels)).shape == (4, len(loaded.classes)) == (4, 4)
            loaded.evaluate(loaded.preprocessing.data(pixels), "cpu")

    return st.tuples(tree_edits(written, VALUES), NONE | DAMAGE), check


def results(folder: Path) -> Target:
    """results.json of a comparison that is to go on, or to be replaced. Nothing is trained anew or drawn."""
    kept, at = folder / "kept", folder / "at"
    options = {"arms": ("baseline", "trimming"), "seeds": 2, "train_rows": 80, "test_rows": 20}
    options["training"] = {"epochs": 1, "batch_size": 40, "device": "cpu"}

    def comparison(**option: bool) -> Comparison:
        return Comparison("digits", "cnn", at / "out", **options | option)

    of_all = running._check(comparison())
    run(comparison(), jobs=1)
    written = json.loads((at / "out" / RESULTS).read_text())
    theirs = [at / place / name for place in ("", "elsewhere/1-epochs/seed-0") for name in (*RUN_FILES, "report.html")]
    for file in (*theirs, *(at / "out" / p / "mine" for p in ("", "trimming", "trimming/1-epochs/seed-0", "x"))):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    at.rename(kept)
    untouched = {"_run": lambda _, task, device: running._died(task, "died"), "_check": lambda _: copy.deepcopy(of_all)}

    def check(value: Any) -> None:
        option, arm, edits, damage = value
        renewed(kept, at)
        other = json.dumps(changed(written, edits)).replace("trimming", json.dumps(arm)[1:-1])
        (at / "out" / RESULTS).write_bytes(edited(other.encode(), damage))
        before = listing(at)
        undrawn = mock.patch("batchkern.compare.report._write_plots", return_value=[])
        with suppress(UserError), undrawn, mock.patch.multiple(running, **untouched):
            run(comparison(**{option: True}), jobs=1)
        after = listing(at)
        for file in before.keys() | after.keys():
            inside = at / "out" in (file, *file.parents) and file.name != "mine"
            assert inside or before.get(file) == after.get(file), f"{file.relative_to(at)} is changed"

    trees = tree_edits({key: part for key, part in written.items() if key != "summary"}, VALUES)  # it is made anew
    arm = (
        st.just("trimming") | st.sampled_from(["../elsewhere", "trimming/../../elsewhere", ".."]) | st.text(max_size=5)
    )
    return st.tuples(st.sampled_from(["overwrite", "resume"]), arm, trees, NONE | DAMAGE), check


def parquet(folder: Path) -> Target:
    """A cell is a picture or none, edits of its bytes, and a path, in which @ is a folder that is there."""
    datasets, pillow = require("datasets", "train"), require("PIL.Image", "train")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    datasets.disable_progress_bars()
    kinds = [("png", "L"), ("png", "RGB"), ("png", "1"), ("png", "P"), ("tiff", "F"), ("gif", "L"), ("jpeg", "CMYK")]
    pictures: dict[Any, bytes] = {}
    for kind, mode in kinds:
        buffer = io.BytesIO()
        pillow.effect_noise((8, 8), 50).convert(mode).save(buffer, kind)
        pictures[kind, mode] = buffer.getvalue()
    (folder / "there.png").write_bytes(pictures[kinds[0]])

    def check(value: Any) -> None:
        kind, rows, size, damage = value
        file, cells, labels = folder / "images.parquet", [], [label for _, label in rows]
        for (picture, edits, path), _ in rows:
            content = picture and edited(pictures[picture], edits)
            cells.append({"bytes": content, "path": path and path.replace("@", str(folder))})
        label = datasets.ClassLabel(names=["a", "b", "c"]) if kind == "class" else datasets.Value(kind)
        features = datasets.Features({"image": datasets.Image(), "label": label})
        try:
            datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(str(file))
        except Exception:
            return  # such labels cannot be written
        file.write_bytes(edited(file.read_bytes(), damage))
        with suppress(UserError):
            loaded = data.load(str(file), image_size=size)
            assert damage or loaded.labels.tolist() == labels, f"labels are {loaded.labels.tolist()}"
            assert damage or all(cell["bytes"] is not None for cell in cells), "an image is not of the file"

    path = st.none() | st.sampled_from(["@/there.png", "/dev/zero", "https://x.invalid/x.png"]) | st.text(max_size=3)
    cell = st.tuples(st.none() | st.sampled_from(kinds), NONE | DAMAGE, path)
    plain = st.tuples(st.sampled_from(kinds[:2]), NONE, st.none())
    label = st.integers(0, 2) | st.integers(0, 2) | st.none() | st.sampled_from([-1, -2, 3, 127, 2**63, 2**64 - 1])
    rows = st.lists(st.tuples(plain | cell, label), min_size=1, max_size=5)
    types = st.sampled_from(["class", "int64", "int8", "uint8", "uint64", "float32", "string", "bool"])
    return st.tuples(types, rows, st.sampled_from([None, 4, 9]), NONE | DAMAGE), check


def text(folder: Path) -> Target:
    """Strategies and arms, in pieces that are repeated so many times."""

    def check(value: Any) -> None:
        written = "".join(piece * times for piece, times in value)[:9999]
        with suppress(UserError):
            for strategy in parse(written, passive="digits"):
                json.dumps(strategy.describe())
        arms = split_arms(written)
        assert all(len(Path("out", slug(arm)).parts) <= 2 and "\0" not in slug(arm) for arm in arms)
        with suppress(UserError):
            Comparison("digits", "cnn", folder, passive="digits", arms=tuple(arms))

    options = [(name, option) for name in STRATEGIES for option in parse(name, passive="")[0].describe()]
    words = "all baseline digits compact lowest index batches hadamard epoch mean fc None True nan 1e999 1j b'x' '\\0'"
    words += " (.5,1) [1,2] {1} {} lambda 0x * ** ' 0xf 1e"
    word = st.sampled_from([*STRATEGIES, *words.split()]) | st.integers().map(str) | st.floats().map(repr)
    term = st.builds(lambda begun, value: f"{begun[0]}({begun[1]}={value})", st.sampled_from(options), word)
    piece = term | word | st.sampled_from([f"{option}=," for _, option in options]) | st.sampled_from([*"+,()[-~f1.='"])
    times = st.just(1) | st.just(1) | st.integers(1, 9) | st.sampled_from([99, 400, 9000])
    number = st.sampled_from(["", "1", "0x"]), st.sampled_from([*"-0f([", ".f", "1+"]), st.sampled_from([400, 9000])
    long = st.builds(
        lambda b, x, y, n: [(f"{b[0]}({b[1]}={x}", 1), (y, n), ("1)", 1)], st.sampled_from(options), *number
    )
    return st.lists(st.tuples(piece | st.text(max_size=9), times), max_size=6) | long, check


TARGETS = {target.__name__: target for target in (checkpoint, metrics, preprocessing, results, parquet, text)}


class Late(BaseException):
    """An input takes too long. Not an Exception, which what is tested may handle."""


def late(*_: Any) -> None:
    raise Late(f"it takes longer than {LIMIT:g} s")


def fuzz(target: str, *, seconds: float = 1e9, inputs: float = math.inf, last: Any = None) -> tuple[int, list[str]]:
    """How many inputs were tried, and what was found: for each line of code the smallest input that fails there.

    So many ``inputs`` are the same ones in each run. Each is written to the path ``last`` before it is tried.
    """
    found: dict[str, tuple[str, str]] = {}
    new, tried, stop, handler = dict(found), 0, math.inf, signal.signal(signal.SIGALRM, late)

    def one(value: Any) -> None:
        nonlocal tried, stop
        if time.monotonic() > stop:
            raise KeyboardInterrupt  # which Hypothesis lets through
        tried, row = tried + 1, f"{(target, value)!r},"
        if last:
            last.write_text(row)
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            check(value)
        except (Exception, Late) as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = str(error) if isinstance(error, Late) else f"{type(error).__name__} at {at.filename}:{at.lineno}"
            if place not in found:
                stop = stop if new else time.monotonic() + SHRINKING
                said = str(error)[:200]
                new[place] = min(new.get(place, (row, said)), (row, said), key=lambda pair: len(pair[0]))
                raise AssertionError(place) from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    options = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    options |= {"derandomize": inputs < math.inf, "verbosity": Verbosity.quiet, "max_examples": int(min(200, inputs))}
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as folder,
        mock.patch.multiple("batchkern.plots", plot_run=mock.DEFAULT, DPI=20),
    ):
        drawn, check = TARGETS[target](Path(folder))
        end = time.monotonic() + seconds
        while tried < inputs and time.monotonic() < end:
            stop = end
            try:
                settings(**options)(given(drawn)(one))()
            except (Exception, KeyboardInterrupt):
                if not new and time.monotonic() < end:
                    raise
            found |= new
            new.clear()
    signal.signal(signal.SIGALRM, handler)
    return tried, [f"{place}: {said}\n  {row}" for place, (row, said) in found.items()]


def main() -> int:
    minutes, *targets = sys.argv[1:] or ["10"]
    targets = targets or list(TARGETS)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    warnings.simplefilter("ignore")
    logging.disable()
    last, bad = Path(tempfile.gettempdir(), "batchkern-fuzz-last"), 0
    print(f"should the process itself crash, its last input is in {last}", flush=True)
    for target in targets:
        tried, found = fuzz(target, seconds=60 * float(minutes) / len(targets), last=last)
        print(f"{target}: {tried} inputs, {len(found)} found", *found, sep="\n ", flush=True)
        bad += len(found)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
