"""The directory of a run: what may be written where, and that a kill at any moment leaves something to go on from."""

import json
import os

import numpy as np
import pytest
import torch
import warm
from torch import nn

from batchkern.errors import UserError
from batchkern.rundir import CHECKPOINT, CONFIG, CURVES, METRICS, PREVIOUS, WEIGHTS, RunDirectory, check_saved, unsealed

SETTINGS = {"epochs": 3, "strategies": [{"name": "trimming", "end": 0.2}], "model": "cnn"}
ENVIRONMENT = {"batchkern": "1.0", "torch": torch.__version__}


def opened(path, settings=None, *, overwrite=False, resume=False):
    return RunDirectory(path, settings or SETTINGS, ENVIRONMENT, overwrite=overwrite, resume=resume)


def state(epochs_done):
    return {"epochs_done": epochs_done, "model": {"weight": torch.arange(3.0)}}


def row(epoch, loss=0.5):
    counts = ("updates", "samples_seen", "samples_forward", "samples_backward", "samples_kept")
    figures = ("lr", "train_objective", "train_accuracy", "test_accuracy", "test_accuracy_plain", "test_loss")
    of_epoch = {"epoch": epoch, "seconds": 1.5, "train_loss": loss}
    return of_epoch | dict.fromkeys(counts, 7 * epoch) | dict.fromkeys(figures, loss / 3)


def names(path):
    return {entry.name for entry in path.iterdir()}


def test_a_new_run(tmp_path):
    path = tmp_path / "runs" / "first"
    directory = opened(path)
    assert names(path) == {CONFIG, METRICS}
    assert json.loads((path / CONFIG).read_text()) == {
        "settings": SETTINGS,
        "environment": ENVIRONMENT | {"run": directory.identifier},
    }
    assert directory.metrics() == []
    directory.append_metrics(row(0, 0.1))
    directory.append_metrics(row(1, 1 / 3))
    assert directory.metrics() == [row(0, 0.1), row(1, 1 / 3)]
    assert len((path / METRICS).read_text().splitlines()) == 2


def test_an_empty_directory_will_do(tmp_path):
    opened(tmp_path)
    assert names(tmp_path) == {CONFIG, METRICS}


def test_a_run_is_not_written_over_unasked(tmp_path):
    opened(tmp_path).append_metrics(row(0))
    with pytest.raises(UserError, match="already holds a run; resume it, overwrite it, or give another directory"):
        opened(tmp_path)
    assert opened(tmp_path, resume=True).metrics() == [row(0)]


def test_what_is_not_a_run_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists and is not a batchkern run"):
            opened(tmp_path, overwrite=overwrite)
    assert names(tmp_path) == {"thesis.tex"}


def test_a_config_of_something_else_is_not_a_run(tmp_path):
    (tmp_path / CONFIG).write_text('{"model_type": "bert"}')
    (tmp_path / WEIGHTS).write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists and is not a batchkern run"):
            opened(tmp_path, overwrite=overwrite)
    assert (tmp_path / WEIGHTS).read_bytes() == b"precious"


def test_overwrite_replaces_the_run_and_nothing_else(tmp_path):
    directory = opened(tmp_path)
    directory.append_metrics(row(0))
    directory.save_checkpoint(state(1))
    directory.save_tensors(WEIGHTS, {"weight": torch.zeros(2)})
    (tmp_path / CURVES).write_bytes(b"png")
    (tmp_path / "notes.txt").write_text("mine")
    opened(tmp_path, {"epochs": 5}, overwrite=True)
    assert names(tmp_path) == {CONFIG, METRICS, "notes.txt"}
    assert json.loads((tmp_path / CONFIG).read_text())["settings"] == {"epochs": 5}
    assert (tmp_path / METRICS).read_text() == ""


def test_overwrite_and_resume_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="overwrite and resume exclude each other"):
        opened(tmp_path, overwrite=True, resume=True)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"below cannot be written: Not a directory"):
        opened(tmp_path / "file" / "below")


# --- going on -------------------------------------------------------------------------------------------------------


def test_the_checkpoint_and_the_metrics_up_to_it(tmp_path):
    directory = opened(tmp_path)
    for epoch in range(3):
        directory.append_metrics(row(epoch, epoch / 7))
        if epoch == 1:
            directory.save_checkpoint(state(2))
    resumed = opened(tmp_path, resume=True)
    assert len(resumed.metrics()) == 3  # nothing is lost before the checkpoint is known to be readable
    loaded = resumed.load_checkpoint()
    assert loaded["epochs_done"] == 2
    assert torch.equal(loaded["model"]["weight"], torch.arange(3.0))
    assert resumed.metrics() == [row(0, 0.0), row(1, 1 / 7)]


def test_killed_before_the_first_checkpoint(tmp_path):
    directory = opened(tmp_path)
    directory.append_metrics(row(0))
    resumed = opened(tmp_path, resume=True)
    assert resumed.load_checkpoint() is None
    assert resumed.metrics() == []
    (tmp_path / METRICS).unlink()  # between the two files of a new run
    assert opened(tmp_path, resume=True).load_checkpoint() is None
    assert (tmp_path / METRICS).read_text() == ""


@pytest.mark.parametrize("rest", ["{", '{"epoch": 2, "lo', "\n", "\0\0\0\0"])
def test_killed_in_the_middle_of_a_line_of_metrics(tmp_path, rest):
    directory = opened(tmp_path)
    directory.append_metrics(row(0))
    directory.append_metrics(row(1))
    directory.save_checkpoint(state(2))
    with open(tmp_path / METRICS, "a") as file:
        file.write(rest)
    resumed = opened(tmp_path, resume=True)
    assert resumed.load_checkpoint()["epochs_done"] == 2
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == [row(0), row(1)]


def test_metrics_that_lost_rows_of_the_checkpoint(tmp_path):
    directory = opened(tmp_path)
    directory.append_metrics(row(0))
    directory.save_checkpoint(state(2))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged: it has 1 rows, not 2"):
        opened(tmp_path, resume=True).load_checkpoint()
    directory.save_checkpoint(state(2))
    (tmp_path / PREVIOUS).unlink()
    directory.append_metrics(row(1))
    directory.save_checkpoint(state(3))
    with pytest.raises(
        UserError, match=r"it has 2 rows, not 3; checkpoint.previous.pt beside it, of epoch 2, is intact"
    ):
        opened(tmp_path, resume=True).load_checkpoint()


@pytest.mark.parametrize("written", [0, 100])
def test_killed_while_writing_a_checkpoint(tmp_path, written, monkeypatch):
    directory = opened(tmp_path)
    directory.append_metrics(row(0))
    directory.save_checkpoint(state(1))
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / (CHECKPOINT + ".0123abcd.part")).write_bytes(whole[:written])
    resumed = opened(tmp_path, resume=True)
    assert resumed.load_checkpoint()["epochs_done"] == 1
    resumed.save_checkpoint(state(1))
    assert names(tmp_path) == {CONFIG, METRICS, CHECKPOINT, PREVIOUS}


def test_killed_while_writing_the_very_first_file(tmp_path):
    (tmp_path / (CONFIG + ".0123abcd.part")).write_bytes(b'{"sett')
    with pytest.raises(UserError, match="holds no run to resume"):
        opened(tmp_path, resume=True)
    opened(tmp_path)  # which is as good as an empty directory
    assert names(tmp_path) == {CONFIG, METRICS}


def full(descriptor):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    directory = opened(tmp_path)
    directory.append_metrics(row(0))
    directory.save_checkpoint(state(1))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"checkpoint.pt cannot be written: No space left on device"):
        directory.save_checkpoint(state(9))
    with pytest.raises(UserError, match=r"model.safetensors cannot be written: No space left on device"):
        directory.save_tensors(WEIGHTS, {"weight": torch.zeros(2)})
    assert not (tmp_path / WEIGHTS).exists()
    assert opened(tmp_path, resume=True).load_checkpoint.__func__ is RunDirectory.load_checkpoint
    monkeypatch.undo()
    assert opened(tmp_path, resume=True).load_checkpoint()["epochs_done"] == 1


def test_metrics_on_a_full_disk(tmp_path, monkeypatch):
    directory = opened(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
        directory.append_metrics(row(0))


def test_other_settings_are_named(tmp_path):
    opened(tmp_path)
    changed = SETTINGS | {"epochs": 2, "lr": 0.1}
    with pytest.raises(UserError, match=r"cannot be resumed: epochs was 3, now 2; lr was None, now 0.1$"):
        opened(tmp_path, changed, resume=True)
    without = {key: SETTINGS[key] for key in ("epochs", "model")}
    with pytest.raises(UserError, match="strategies was .*trimming.*, now None"):
        opened(tmp_path, without, resume=True)


def test_settings_are_compared_as_json(tmp_path):
    opened(tmp_path, {"shape": (1, 2)})
    opened(tmp_path, {"shape": [1, 2]}, resume=True)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "nonsense"])
def test_no_run_to_resume(tmp_path, content):
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    with pytest.raises(UserError, match="holds no run to resume"):
        opened(tmp_path, resume=True)


def with_a_checkpoint(path, epochs=1):
    """A run of so many epochs, each with its checkpoint."""
    directory = opened(path)
    with directory.held():
        for epoch in range(epochs):
            directory.append_metrics(row(epoch))
            directory.save_checkpoint(state(epoch + 1))
    return directory


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: b"", "it ends without its checksum"),
        (lambda c: b"not a checkpoint", "it ends without its checksum"),
        (lambda c: c[:-1], "it ends without its checksum"),
        (lambda c: c + b"x", "it ends without its checksum"),
        (lambda c: c[: len(c) // 2], "it ends without its checksum"),
        (lambda c: c[1:], "its checksum is wrong"),
        (lambda c: c.replace(b"checkpoint 3 ", b"checkpoint 2 "), "wrote it in format 2, and .* reads format 3"),
        *((lambda c, at=at: flipped(c, at), "its checksum is wrong") for at in (0, 0.2, 0.4, 0.6, 0.8)),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_metrics_stay(tmp_path, damage, reason):
    with_a_checkpoint(tmp_path)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(damage(whole))
    with pytest.raises(UserError, match=f"checkpoint.pt cannot be read: .*{reason}[^;]*$"):
        opened(tmp_path, resume=True).load_checkpoint()
    assert opened(tmp_path, resume=True).metrics() == [row(0)]


def flipped(content, at):
    """With one bit changed, at so large a part of it."""
    place = int(at * len(content))
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def test_every_flipped_byte_is_seen(tmp_path):
    with_a_checkpoint(tmp_path)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    assert unsealed(whole) == whole
    for place in range(len(whole)):
        with pytest.raises(ValueError):
            unsealed(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])


@pytest.mark.parametrize("done", [-1, 1.0, "1", None, True, 10**30])
def test_a_whole_checkpoint_of_impossible_epochs(tmp_path, done):
    opened(tmp_path).save_checkpoint({"epochs_done": done})
    with pytest.raises(UserError, match=r"(checkpoint.pt cannot be read: epochs_done is|metrics.jsonl is damaged)"):
        opened(tmp_path, resume=True).load_checkpoint()


def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(tmp_path):
    opened(tmp_path)
    os.mkfifo(tmp_path / CHECKPOINT)
    with pytest.raises(UserError, match=r"checkpoint.pt cannot be read: it is not a regular file"):
        opened(tmp_path, resume=True).load_checkpoint()


def test_the_checkpoint_before_is_kept_and_named_where_it_helps(tmp_path):
    with_a_checkpoint(tmp_path, epochs=3)
    file, previous = tmp_path / CHECKPOINT, tmp_path / PREVIOUS
    file.write_bytes(flipped(file.read_bytes(), 0.5))
    with pytest.raises(
        UserError, match=r"checksum is wrong; checkpoint.previous.pt beside it, of epoch 2, is intact: rename it"
    ):
        opened(tmp_path, resume=True).load_checkpoint()
    file.unlink()
    with pytest.raises(UserError, match=r"checkpoint.pt is missing; checkpoint.previous.pt beside it, of epoch 2"):
        opened(tmp_path, resume=True).load_checkpoint()
    file.symlink_to(tmp_path / "a disk that is not there")
    with pytest.raises(UserError, match=r"checkpoint.pt cannot be read: No such file"):
        opened(tmp_path, resume=True).load_checkpoint()
    previous.rename(file)
    assert opened(tmp_path, resume=True).load_checkpoint()["epochs_done"] == 2
    file.write_bytes(b"")
    previous.write_bytes(b"damaged too")
    with pytest.raises(UserError, match=r"checkpoint.pt cannot be read: [^;]*$"):
        opened(tmp_path, resume=True).load_checkpoint()


# --- several at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}])
def test_a_directory_in_use_is_left_alone(tmp_path, options):
    directory = with_a_checkpoint(tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with directory.held(), pytest.raises(UserError, match="is in use by another training or comparison"):
        opened(tmp_path, **options)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    opened(tmp_path, **options)


def test_who_was_written_over_before_it_began_does_not_train(tmp_path):
    first = opened(tmp_path)
    second = opened(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="was written by another training since this one was created"):
        first.lock()
    with second.held():
        second.append_metrics(row(0))
        second.save_checkpoint(state(1))
    with second.held():  # what it wrote itself does not disturb it
        pass
    resumed, other = (opened(tmp_path, resume=True) for _ in range(2))
    assert resumed.load_checkpoint() is not None
    with pytest.raises(UserError, match="was written by another training"):
        other.load_checkpoint()


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_saved_whole_whatever_their_memory(tmp_path):
    """Tied and strided ones too: that must not fail at the end of a long training."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.register_buffer("view", torch.arange(6.0).view(2, 3).T)
    opened(tmp_path).save_tensors(WEIGHTS, model.state_dict())
    saved = safetensors.load_file(tmp_path / WEIGHTS)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


def test_a_checkpoint_that_does_not_fit_says_so_and_leaves_the_last(tmp_path):
    """In a process of its own, which may write no file above 4 kB: what a full disk does, without filling one."""
    script = f"""
import resource, torch
from pathlib import Path
from batchkern.rundir import RunDirectory
directory = RunDirectory(Path({str(tmp_path / "run")!r}), {{}}, {{"batchkern": "1"}}, overwrite=False, resume=False)
directory.save_checkpoint({{"epochs_done": 0}})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
directory.save_checkpoint({{"epochs_done": 0, "model": torch.zeros(10_000)}})
"""
    done = warm.run("-c", script)
    assert "UserError" in done.stderr
    assert f"{CHECKPOINT} cannot be written: File too large" in done.stderr
    assert names(tmp_path / "run") == {CONFIG, METRICS, CHECKPOINT}
    assert torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True).keys() == {"epochs_done", "run"}


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"lr": np.float64(0.5)}, r"an object of numpy\.\S*scalar"),
        ({"weight": torch.ones(3).as_subclass(Subclass)}, r"an object of \S*Subclass"),
        ({"hook": lambda: None}, "Can't pickle|Can't get local"),
    ],
)
def test_a_checkpoint_that_could_not_be_read_again_is_not_written(found, named, tmp_path):
    directory = opened(tmp_path / "run")
    directory.save_checkpoint(state := {"epochs_done": 0, "optimizer": [{"lr": 0.5}]})
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match=rf"could not be read again \(.*(?:{named}).*plain tensors and Python's values"):
        directory.save_checkpoint(state | {"optimizer": [found]})
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_a_state_whose_elements_share_memory_is_refused():
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(1).expand(2))
    with pytest.raises(UserError, match="the model's state holds 'scale', whose elements share memory"):
        check_saved(model)
    model.scale = torch.ones(1).expand(1)
    check_saved(model)


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "weights"])
@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_directory_that_was_moved_is_no_longer_written_to(what, begun_anew, tmp_path):
    directory = opened(tmp_path / "run")
    writes = {
        "checkpoint": lambda: directory.save_checkpoint({"epochs_done": 0}),
        "metrics": lambda: directory.append_metrics({"epoch": 0}),
        "weights": lambda: directory.save_tensors(WEIGHTS, {}),
    }
    with directory.held():
        os.rename(tmp_path / "run", tmp_path / "moved")
        if begun_anew:
            opened(tmp_path / "run", settings={"epochs": 7})
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        said = "run is not the directory that this began in" if begun_anew else "run cannot be written: No such file"
        with pytest.raises(UserError, match=said):
            writes[what]()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    for seed in (0, 1):
        opened(tmp_path / str(seed), settings={"seed": seed}).save_checkpoint({"epochs_done": 0, "seed": seed})
    assert opened(tmp_path / "0", settings={"seed": 0}, resume=True).load_checkpoint()["seed"] == 0
    os.replace(tmp_path / "1" / CHECKPOINT, tmp_path / "0" / CHECKPOINT)
    with pytest.raises(UserError, match=r"checkpoint.pt cannot be read: it belongs to a run with other settings"):
        opened(tmp_path / "0", settings={"seed": 0}, resume=True).load_checkpoint()


@pytest.mark.parametrize("crc", [1234, None])
def test_data_are_known_by_their_contents_where_these_are_known(crc, tmp_path):
    def settings(name):
        return {"train": {"name": name, "rows": 3, "images_crc32": crc}, "seed": 0}

    opened(tmp_path / "run", settings=settings("images")).save_checkpoint({"epochs_done": 0})
    if crc is None:  # streamed images are not all looked at
        with pytest.raises(UserError, match="trained with other settings"):
            opened(tmp_path / "run", settings=settings("./images/"), resume=True)
    else:
        assert opened(tmp_path / "run", settings=settings("./images/"), resume=True).load_checkpoint()
