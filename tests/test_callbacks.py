"""What a training tells others, tried with the real TensorBoard and wandb."""

from __future__ import annotations

import json
import math
import struct
import time

import pytest
import torch
from safetensors.torch import load_file
from training import images, net, single_thread, trainer, without_plots

from batchkern import load_model
from batchkern.callbacks import LOGGERS, Callback, TensorBoard, WeightsAndBiases, loggers
from batchkern.errors import UserError
from batchkern.rundir import BEST, CHECKPOINT, METRICS, WEIGHTS

one_thread = single_thread()


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    without_plots(monkeypatch)


class Recorder(Callback):
    """What it was told, and ``stop`` after so many epochs."""

    def __init__(self, stop=math.inf):
        self.told, self.stop = [], stop

    def on_train_begin(self, trainer):
        self.trainer, self.written = trainer, []
        self.told.append(("begin", len(trainer.history)))

    def on_epoch_end(self, row):
        self.told.append(("epoch", row["epoch"]))
        if self.trainer.directory is not None:
            directory = self.trainer.directory.path
            rows = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
            done = torch.load(directory / CHECKPOINT, weights_only=True)["epochs_done"]
            self.written.append(rows[-1] == row and done == row["epoch"] + 1)
        return row["epoch"] + 1 >= self.stop

    def on_train_end(self):
        self.told.append(("end",))


def test_callbacks_are_called_when_an_epoch_is_safe(tmp_path):
    recorder = Recorder()
    run = trainer(epochs=2, out=tmp_path / "run", callbacks=[recorder])
    run.fit()
    assert recorder.told == [("begin", 0), ("epoch", 0), ("epoch", 1), ("end",)]
    assert recorder.written == [True, True]


def test_any_object_with_the_method_will_do():
    rows = []

    class Plain:
        def on_epoch_end(self, row):
            rows.append(row)

    run = trainer(epochs=2, callbacks=[Plain()])
    run.fit()
    assert rows == run.history


def test_a_callback_ends_a_training_as_its_last_epoch_would(tmp_path):
    run = trainer(epochs=5, out=tmp_path / "run", callbacks=[Recorder(stop=2), Recorder()])
    last = run.fit()
    assert last["epoch"] == 1
    assert [told[0] for told in run.callbacks[1].told] == ["begin", "epoch", "epoch", "end"]
    saved = load_file(tmp_path / "run" / WEIGHTS)
    assert all(torch.equal(value, saved[name]) for name, value in run.model.state_dict().items())


def test_callbacks_hear_of_the_end_of_a_training_that_fails():
    recorder = Recorder()
    with pytest.raises(UserError, match="not finite"):
        trainer(lr=1e30, callbacks=[recorder]).fit()
    assert recorder.told[-1] == ("end",)


def test_the_best_weights_are_those_of_the_first_epoch_of_the_highest_accuracy(tmp_path):
    run = trainer(epochs=8, lr=0.15, test=images(40, seed=3), out=tmp_path / "run", keep_best=True)
    states = []
    run.callbacks = [Recorder()]
    run.callbacks[0].on_epoch_end = lambda row: states.append({k: v.clone() for k, v in run.model.state_dict().items()})
    run.fit()
    found = [row["test_accuracy"] for row in run.history]
    best = found.index(max(found))
    assert best < 7
    saved = load_file(tmp_path / "run" / BEST)
    assert all(torch.equal(value, saved[name]) for name, value in states[best].items())
    assert not all(torch.equal(value, saved[name]) for name, value in states[-1].items())
    trained = load_model(tmp_path / "run", model=net(seed=1), best=True)
    assert all(torch.equal(value, saved[name]) for name, value in trained.model.state_dict().items())
    trainer(out=tmp_path / "other").fit()
    with pytest.raises(UserError, match=r"other has no best.safetensors, as runs have that keep the best epoch"):
        load_model(tmp_path / "other", model=net(), best=True)


# --- loggers ---------------------------------------------------------------------------------------------------------


def shown(directory) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_shows_the_rows_of_a_run_that_was_killed_and_went_on(tmp_path):
    """Killed when an epoch was shown, and not yet in a checkpoint that is read: the one before is."""
    out = tmp_path / "run"
    trainer(epochs=2, out=out, callbacks=[TensorBoard()]).fit()
    with pytest.warns(UserWarning, match="was to end after 2 epochs"):
        run = trainer(epochs=4, out=out, resume=True, callbacks=[TensorBoard()])
    run.fit()
    found = shown(out / "tensorboard")
    for name in ("train_loss", "test_accuracy", "samples_backward"):
        expected = {row["epoch"] + 1: row[name] for row in run.history}
        assert found[name] == pytest.approx(expected)
    # What a run that goes on from an earlier epoch writes takes the place of what was there.
    again = trainer(epochs=4, out=out, overwrite=True, seed=3, callbacks=[TensorBoard()])
    again.fit()
    expected = {row["epoch"] + 1: row["train_loss"] for row in again.history}
    assert shown(out / "tensorboard")["train_loss"] == pytest.approx(expected)


def test_wandb_has_the_rows_offline(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_PROJECT": "tests"}.items():
        monkeypatch.setenv(name, value)
    run = trainer(epochs=2, out=tmp_path / "run", callbacks=[WeightsAndBiases()])
    run.fit()
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run.directory.identifier}/*.wandb")
    deadline = time.monotonic() + 20  # another process writes it
    while len(found := history_of(file)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [int(float(row["epoch"])) for row in found] == [0, 1]
    for row, written in zip(found, run.history, strict=True):
        assert float(row["train_loss"]) == pytest.approx(written["train_loss"])


def history_of(file) -> list[dict[str, str]]:
    """Records in the log format of LevelDB: checksum, length, kind (whole, first, middle, last), and the data; behind
    seven bytes that name the format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, rows = file.read_bytes(), 7, b"", []
    while place + 7 < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if place <= len(data) and kind in (1, 4):
            record = Record.FromString(parts)
            rows += [{".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}]
            parts = b""
    return [row for row in rows if "train_loss" in row]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_needs_a_directory(name):
    with pytest.raises(UserError, match="writes into the run's directory, but out is None"):
        trainer(callbacks=loggers(name)).fit()


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_told_when_a_logger_is_made(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(UserError, match=rf"needs the library '{library}'.*batchkern\[log\]"):
        loggers(library)


def test_names_of_loggers():
    assert [type(logger) for logger in loggers("wandb, tensorboard,wandb")] == [WeightsAndBiases, TensorBoard]
    assert loggers(None) == loggers("") == []
    with pytest.raises(UserError, match="log must be tensorboard or wandb, or both joined by a comma, got 'mlflow'"):
        loggers("tensorboard,mlflow")


@pytest.mark.parametrize("callbacks", [[print], print, [Recorder(), 3], [Recorder]])
def test_what_is_no_callback_is_refused(callbacks):
    with pytest.raises(UserError, match=r"callbacks must be objects with a method on_epoch_end\(row\), got "):
        trainer(callbacks=callbacks)


def test_a_logger_that_cannot_begin_is_a_warning(tmp_path, monkeypatch):
    out = tmp_path / "run"
    run = trainer(out=out, callbacks=TensorBoard())
    (out / "tensorboard").write_text("in its place")
    with pytest.warns(UserWarning, match="nothing is shown in TensorBoard: FileExistsError"):
        assert run.fit()["epoch"] == 1


def test_weights_of_epochs_that_were_not_kept_are_told(tmp_path):
    trainer(epochs=2, out=tmp_path / "run").fit()
    with pytest.warns(UserWarning, match="keep_best: the weights of earlier epochs are gone"):
        trainer(epochs=2, out=tmp_path / "run", resume=True, keep_best=True)


def test_a_logger_that_fails_is_a_warning(tmp_path, monkeypatch):
    logger = TensorBoard()
    run = trainer(epochs=2, out=tmp_path / "run", callbacks=[logger])
    begin = logger.on_train_begin

    def broken(of):
        begin(of)
        monkeypatch.setattr(logger._writer, "add_scalar", lambda *_: 1 / 0)

    logger.on_train_begin = broken
    with pytest.warns(UserWarning, match="epoch 2 is not shown in TensorBoard: ZeroDivisionError"):
        assert run.fit()["epoch"] == 1
