"""The command line: what it prints, and that whatever a user gets wrong is one sentence and exit status 2.

Nearly all of it runs in this process, through ``main`` with ``sys.argv``; in one of its own runs what needs signals,
another environment or a library that is missing.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch
import warm
from training import single_thread

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
datasets = pytest.importorskip("datasets")
PIL_Image = pytest.importorskip("PIL.Image")

from batchkern import _backend, cli  # noqa: E402
from batchkern._version import __version__  # noqa: E402
from batchkern.cli import _train  # noqa: E402
from batchkern.rundir import BEST, CHECKPOINT, CONFIG, CURVES, METRICS, RUN_FILES, WEIGHTS  # noqa: E402
from batchkern.trainer import Trainer  # noqa: E402

one_thread = single_thread()
QUICK = ("--data", "digits", "--epochs", "1", "--batch-size", "128", "--no-progress")
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
NO_GPU = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, tmp_path_factory, monkeypatch):
    """A working directory and a cache of this test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))  # for processes, where it is not installed


@pytest.fixture
def batchkern():
    """Runs the command: (exit status, stdout, stderr)."""
    return commands.run


@pytest.fixture
def trained(batchkern):
    """A finished run in the directory ``run``."""
    status, _, err = batchkern("train", *QUICK, "--out", "run")
    assert status == 0, err
    return Path("run")


def refused(batchkern, words, *patterns):
    """Asserts that it is refused, in one line that matches all patterns."""
    status, out, err = batchkern(*words)
    assert status == 2, (status, out, err)
    assert re.fullmatch(r"batchkern: error: [^\n]+\n", err), err
    assert out == ""
    for pattern in patterns:
        assert re.search(pattern, err), err


# --- what it does ----------------------------------------------------------------------------------------------------


def test_version(batchkern):
    assert batchkern("--version") == (0, f"batchkern {__version__}\n", "")


def test_help_names_the_commands_and_every_option(batchkern):
    status, out, _ = batchkern("--help")
    assert status == 0
    assert all(f"  {command} " in out for command in ("train", "compare", "info"))
    for command in (cli.train, cli.compare):
        status, out, _ = batchkern(command.__name__, "--help")
        assert status == 0
        for name in inspect.signature(command).parameters:
            assert f"--{name.replace('_', '-')} " in out


def test_no_command_shows_the_help(batchkern):
    status, out, err = batchkern()
    assert status == 2  # of click since 8.2, and of typer
    assert "Commands:" in out + err


def test_defaults_of_train_are_the_trainers():
    ours, theirs = (inspect.signature(x).parameters for x in (cli.train, Trainer.__init__))
    shared = set(ours) & set(theirs) - {"model", "train", "test", "progress"}
    assert len(shared) > 12
    assert {key: ours[key].default for key in shared} == {key: theirs[key].default for key in shared}


def test_train_prints_a_line_each_epoch_and_where_the_files_are(batchkern):
    status, out, err = batchkern(
        "train", "--data", "digits", "--epochs", 2, "--batch-size", 128, "--strategy", "trimming(end=0.3)"
    )
    assert (status, err) == (0, "")
    first, second, last, files = out.splitlines()
    rows = [json.loads(line) for line in Path("runs/digits-trimming-cnn-s0", METRICS).read_text().splitlines()]
    for epoch, line, kept in ((0, first, "100%"), (1, second, " 30%")):
        row = rows[epoch]
        assert line.startswith(f"epoch {epoch + 1}/2  train loss {row['train_loss']:.4f}  kept {kept}  test accuracy ")
        assert f"{row['test_accuracy']:6.2%}  " in line
    speed = (rows[1]["samples_seen"] - rows[0]["samples_seen"]) / (rows[1]["seconds"] - rows[0]["seconds"])
    assert second.endswith(f"  {speed:,.0f} samples/s")
    assert last == f"test accuracy {rows[1]['test_accuracy']:.2%} after 24 updates; in runs/digits-trimming-cnn-s0:"
    assert files.split() == [name for name in RUN_FILES if name != BEST]
    assert sorted(os.listdir("runs/digits-trimming-cnn-s0")) == sorted(files.split())


def test_options_reach_the_trainer(batchkern):
    write([0, 1] * 20)
    status, _, err = batchkern(
        "train",
        *("--data", "set.parquet", "--test", "set.parquet", "--strategy", "trimming(end=0.5)+passive(every=2)"),
        *("--passive", "photo-patches", "--model", "resnet8", "--epochs", 1, "--batch-size", 20, "--lr", 0.01),
        *("--optimizer", "adamw", "--momentum", 0.8, "--weight-decay", 0.1, "--schedule", "step", "--amp", "bf16"),
        *("--augment", "crop", "--label-smoothing", 0.1, "--image-size", 12, "--classifier", "fc", "--seed", 7),
        *("--device", "cpu", "--checkpoint-every", 1, "--out", "x/y", "--drop-last"),
        *("--warmup-epochs", 0.5, "--max-grad-norm", 2, "--gradient-accumulation-steps", 2, "--ema-decay", 0.9),
        *("--compile", "eager", "--no-channels-last", "--keep-best", "--log", "tensorboard"),
    )
    assert (status, err) == (0, "")
    settings = json.loads(Path("x/y", CONFIG).read_text())["settings"]
    strategies = settings.pop("strategies")
    assert [s["name"] for s in strategies] == ["trimming", "passive"]
    assert strategies[0]["end"] == 0.5
    assert (strategies[1]["passive"], strategies[1]["every"]) == ("photo-patches", 2)
    assert settings.pop("train")["shape"] == settings.pop("test")["shape"] == [1, 12, 12]
    assert settings == {
        "model": "resnet8",
        "epochs": 1,
        "batch_size": 20,
        "drop_last": True,
        "weights": None,
        "optimizer": "adamw",
        "lr": 0.01,
        "momentum": 0.8,
        "weight_decay": 0.1,
        "schedule": "step",
        "warmup_epochs": 0.5,
        "max_grad_norm": 2.0,
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
        "compile": "eager",
        "channels_last": None,
        "amp": "bf16",
        "augment": "crop",
        "label_smoothing": 0.1,
        "classifier": "fc",
        "seed": 7,
        "ranks": 1,
    }
    assert Path("x/y", BEST).exists()
    assert list(Path("x/y/tensorboard").iterdir())


def test_images_that_are_cut_out_are_another_training(batchkern):
    write([0, 1] * 10)
    words = ["train", *QUICK, "--data", "set.parquet", "--image-size", 8, "--batch-size", 8]
    status, _, err = batchkern(*words, "--center-crop", "--augment", "resized-crop+flip")
    assert (status, err) == (0, "")
    (config,) = Path("runs").glob(f"*/{CONFIG}")
    settings = json.loads(config.read_text())["settings"]
    assert (settings["augment"], settings["train"]["center_crop"]) == ("resized-crop+flip", True)
    assert settings["train"]["images_crc32"] is None
    status, _, err = batchkern(*words, "--augment", "resized-crop+flip", "--resume", "--out", config.parent)
    assert status == 2
    assert "was trained with other settings and cannot be resumed: " in err
    assert "'center_crop': True" in err
    status, _, err = batchkern("train", *QUICK, "--data", "set.parquet", "--center-crop")
    assert (status, "image_size (--image-size) must say how large" in err) == (2, True)


def test_a_warning_is_one_line(batchkern):
    status, _, err = batchkern(
        "train", *QUICK, "--batch-size", 700, "--model", "resnet8", "--strategy", "trimming(backward=compact)"
    )
    assert status == 0
    assert re.fullmatch(r"batchkern: warning: Trimming[^\n]* batch norm[^\n]*\n", err)


def test_one_thread_for_small_images_alone():
    torch.set_num_threads(2)
    _train.spare_threads((3, 32, 32))
    assert torch.get_num_threads() == 2
    _train.spare_threads((1, 8, 8))
    assert torch.get_num_threads() == 1


def test_info_as_json(batchkern, monkeypatch):
    status, out, err = batchkern("info", "--json")
    facts = json.loads(out)
    assert (status, err) == (0, "")
    assert facts["batchkern"] == __version__
    assert facts["torch"] == torch.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert (facts["extension"]["facts"] is None) == bool(facts["extension"]["why"])
    assert [(x["op"], x["device"]) for x in facts["operations"]] == [
        (op, device) for op in _backend.OPS for device in _backend.DEVICES
    ]
    assert {x["backend"] for x in facts["operations"]} <= {"kernel", "reference"}
    assert all(x["why"] for x in facts["operations"] if x["backend"] == "reference")


def test_info_says_what_was_built_and_what_serves(batchkern, monkeypatch):
    class Extension:
        @staticmethod
        def build_facts():
            return {"cuda": True, "torch": "9.9", "cuda_architectures": ["8.0", "9.0"]}

        @staticmethod
        def instruction_set():
            return "avx3"

    monkeypatch.setattr(_backend, "extension", Extension)
    monkeypatch.setattr(_backend, "extension_error", "")
    monkeypatch.setattr(_backend, "_kernels", {("rank_batches", "cpu")})
    assert json.loads(batchkern("info", "--json")[1])["extension"] == {"facts": Extension.build_facts(), "why": ""}
    status, out, _ = batchkern("info")
    assert status == 0
    assert re.search(
        r"batchkern\._C +built *\n  cuda +\w+ *\n  torch +9\.9 *\n  cuda_architectures +8\.0, 9\.0 *\n", out
    )
    assert re.search(r"rank_batches +cpu +kernel +C\+\+, avx3", out)
    assert re.search(r"rank_batches +cuda +reference +\w+", out)
    monkeypatch.setattr(_backend, "extension", None)
    monkeypatch.setattr(_backend, "extension_error", "it is not there")
    assert re.search(r"batchkern\._C +it is not there", batchkern("info")[1])


def test_without_typer_or_rich_there_is_a_sentence():
    for library in ("typer", "rich"):
        code = f"import sys; sys.modules['{library}'] = None; from batchkern.cli import main; main()"
        done = warm.run("-c", code)
        assert done.returncode == 2
        assert re.fullmatch(rf"batchkern: error: [^\n]*'{library}'[^\n]*batchkern\[train\][^\n]*\n", done.stderr)


def test_python_m(tmp_path):
    done = warm.run("-m", "batchkern", "train", "--data", "digits", "--strategy", "triming", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"batchkern: error: [^\n]*triming[^\n]*\n", done.stderr)


# --- arguments that are wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "patterns"),
    [
        ("--strategy triming", ["'triming'", "did you mean trimming"]),
        ("--strategy trimming(stop=0.3)", ["trimming has no option 'stop'", "start, end"]),
        ("--strategy trimming(end=high)", ["end", "high"]),
        ("--strategy trimming(end=", ["'trimming\\(end='"]),
        ("--strategy trimming(end=1.5)", ["end must be in \\(0, 1\\], got 1.5"]),
        ("--strategy hard-batches+stepwise", ["hard-batches and stepwise both decide the batch plan"]),
        ("--strategy trimming+random", ["trimming and random both decide the loss"]),
        ("--strategy hard-batches(delta=0.001)", ["delta=0.001 selects none of 12 batches"]),
        ("--strategy stepwise", ["epochs must be at least 5"]),
        ("--strategy augmentation(layers=conv9)", ["'conv9'", "conv1"]),
        ("--strategy passive", ["--passive SOURCE"]),
        ("--passive photo-patches", ["--passive is photo-patches, but no strategy"]),
        ("--strategy passive --passive no/such.parquet", ["'no/such.parquet' is no file"]),
        ("--model resnet21", ["'resnet21'", "resnet20"]),
        ("--classifier head --strategy passive --passive photo-patches", ["classifier 'head'", "fc"]),
        ("--epochs 0", ["epochs must be .* at least 1, got 0"]),
        ("--batch-size -3", ["batch_size must be .* at least 1, got -3"]),
        ("--batch-size 5000", ["batch_size is 5000, but digits has 1438 samples"]),
        ("--checkpoint-every 0", ["checkpoint_every must be .* at least 1, got 0"]),
        ("--image-size 2", ["image_size must be 4 to 16384 pixels, not 2"]),
        ("--lr 0", ["lr must be above 0"]),
        ("--lr nan", ["lr must be in .* got nan"]),
        ("--lr 1e300", ["lr must be in .* got 1e\\+300"]),
        ("--momentum 2", ["momentum must be in \\[0, 1\\], got 2"]),
        ("--momentum 1 --optimizer adam", ["momentum must be below 1 for adam"]),
        ("--weight-decay -1", ["weight_decay must be in"]),
        ("--label-smoothing 1.1", ["label_smoothing must be in \\[0, 1\\], got 1.1"]),
        ("--optimizer lion", ["optimizer must be one of sgd, adam, adamw", "'lion'"]),
        ("--schedule linear", ["schedule must be one of constant, cosine, step", "'linear'"]),
        ("--amp int8", ["amp must be one of none, bf16, fp16", "'int8'"]),
        ("--augment mixup", ["augment must be one of none, flip, crop", "'mixup'"]),
        ("--device gpu", ["device must be cpu, cuda or cuda:N, got 'gpu'"]),
        ("--device meta", ["device must be cpu, cuda or cuda:N, got 'meta'"]),
        ("--device cuda:99", ["device is cuda:99, but "]),
        ("--resume", ["runs/digits-baseline-cnn-s0 holds no run to resume"]),
        ("--resume --overwrite", ["overwrite and resume exclude each other"]),
    ],
)
def test_wrong_arguments(batchkern, words, patterns):
    refused(batchkern, ["train", *QUICK, *words.split()], *patterns)
    assert not Path("runs").exists()


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_cuda_without_a_gpu(batchkern):
    refused(batchkern, ["train", *QUICK, "--device", "cuda"], "device is cuda, but this torch .* sees no CUDA device")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train", "batchkern train: missing option '--data'"),
        ("train --data digits --epohcs 3", "batchkern train: no such option --epohcs (did you mean --epochs?)"),
        ("train --data digits --zz", "batchkern train: no such option --zz"),
        ("train --epochs 3 --epochs=many --lr 1", "batchkern train: --epochs must be a whole number, got 'many'"),
        ("train --data digits --lr fast", "batchkern train: --lr must be a number, got 'fast'"),
        ("train --data", "batchkern: option '--data' requires an argument"),
        ("tran --data digits", "batchkern: no such command 'tran' (did you mean 'train'?)"),
        ("compare --seeds 1.5", "batchkern compare: --seeds must be a whole number, got '1.5'"),
        ("bench report --redme x", "batchkern bench report: no such option --redme (did you mean --readme?)"),
    ],
)
def test_wrong_usage(batchkern, words, said):
    assert batchkern(*words.split()) == (2, "", f"{said}\n")


# --- data that are wrong ---------------------------------------------------------------------------------------------


def picture(height=8, width=8):
    buffer = io.BytesIO()
    PIL_Image.new("L", (width, height), 100).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(labels, images=None, names=None):
    """A parquet file in the image layout of datasets."""
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    content = {"image": images or [picture() for _ in labels], "label": labels}
    datasets.Dataset.from_dict(content, features=features).to_parquet("set.parquet")


def write_label_out_of_range():
    """datasets would not write a label without a name: one name is taken out of its metadata."""
    import pyarrow.parquet as parquet

    write([0, 1, 2, 3] * 5, names=list("abcd"))
    table = parquet.read_table("set.parquet")
    metadata = {key: value.replace(b', "d"', b"") for key, value in table.schema.metadata.items()}
    parquet.write_table(table.replace_schema_metadata(metadata), "set.parquet")


BAD_DATA = {
    "empty": (lambda: write([]), ["no rows"]),
    "one class": (lambda: write([1] * 20), ["one class"]),
    "unlabelled": (lambda: write([None] * 20), ["20 of 20 rows have no label"]),
    "one unlabelled": (lambda: write([0, 1] * 10 + [None]), ["1 of 21 rows", "row 20"]),
    "negative label": (lambda: write([0, 1] * 10 + [-7]), ["row 20 has the label -7"]),
    "label out of range": (write_label_out_of_range, ["row 3 has the label 3", r"0\.\.2"]),
    "corrupt image": (
        lambda: write([0, 1] * 10, [picture() for _ in range(19)] + [{"bytes": b"no image", "path": None}]),
        ["row 19"],
    ),
    "mixed sizes": (
        lambda: write([0, 1] * 10, [picture() for _ in range(19)] + [picture(9, 7)]),
        ["9x7", "8x8", "--image-size"],
    ),
    "corrupt parquet": (lambda: Path("set.parquet").write_bytes(b"PAR1" + bytes(50)), ["not a readable parquet"]),
    "fewer samples than a batch": (lambda: write([0, 1] * 10), ["batch_size is 128", "16 samples"]),
    "missing": (lambda: None, ["is no file"]),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(batchkern, kind):
    make, patterns = BAD_DATA[kind]
    make()
    refused(batchkern, ["train", *QUICK, "--data", "set.parquet"], "set.parquet", *patterns)
    assert not Path("runs").exists()


def test_mixed_sizes_train_with_image_size(batchkern):
    write([0, 1] * 10, [picture() for _ in range(19)] + [picture(9, 7)])
    words = ["train", *QUICK, "--data", "set.parquet", "--image-size", 8, "--batch-size", 8]
    status, _, err = batchkern(*words)
    assert (status, err) == (0, "")
    assert Path("runs/set-baseline-cnn-s0", WEIGHTS).exists()  # named after the file, not after its path


def test_a_name_that_is_not_on_the_hub_offline():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = warm.run("-m", "batchkern", "train", "--data", "nobody/nothing", env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"batchkern: error: 'nobody/nothing'[^\n]*hub[^\n]*\n", done.stderr)


def test_a_name_on_the_hub_without_a_network():
    """It is not asked again and again, which ``datasets`` would tell in ten more lines."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = warm.run("-m", "batchkern", "train", "--data", "nobody/nothing", env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"batchkern: error: 'nobody/nothing'[^\n]*hub: [^\n]*refused[^\n]*\n", done.stderr)


# --- output directories ----------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_unless_asked(batchkern, trained):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    words = ["train", *QUICK, "--seed", 1, "--out", "run"]
    refused(batchkern, words, "run already holds a run; resume it, overwrite it")
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    (trained / "notes.txt").write_text("mine")
    status, _, err = batchkern(*words, "--overwrite")
    assert (status, err) == (0, "")
    assert (trained / "notes.txt").read_text() == "mine"
    assert json.loads((trained / CONFIG).read_text())["settings"]["seed"] == 1
    assert all((trained / name).read_bytes() != before[name] for name in (METRICS, CHECKPOINT, WEIGHTS, CURVES))


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "contents",
    [
        {"precious.txt": "data"},
        {"model.safetensors": "weights", "config.json": '{"architectures": ["BertModel"]}'},  # as on the hub
        {"config.json": "no JSON"},
    ],
)
def test_what_is_not_a_run_is_never_touched(batchkern, overwrite, contents):
    mine = Path("mine")
    mine.mkdir()
    for name, text in contents.items():
        (mine / name).write_text(text)
    words = ["train", *QUICK, "--out", "mine", *overwrite]
    refused(batchkern, words, "mine exists and is not a batchkern run")
    assert {path.name: path.read_text() for path in mine.iterdir()} == contents


@pytest.mark.parametrize("out", ["file/run", "file", "/proc/batchkern-run", "/proc"])
def test_an_output_directory_that_cannot_be_written(batchkern, out):
    Path("file").write_text("mine")
    refused(batchkern, ["train", *QUICK, "--out", out, "--overwrite"], out)
    assert Path("file").read_text() == "mine"


# --- stopping and going on -------------------------------------------------------------------------------------------


def loaded(directory):
    """The checkpoint's model, by the one loader that runs no code."""
    return torch.load(Path(directory, CHECKPOINT), weights_only=True)["model"]


def finite(weights):
    return all(torch.isfinite(value).all() for value in weights.values())


def test_a_loss_that_is_not_finite(batchkern):
    words = ["train", *QUICK, "--lr", 1e30, "--checkpoint-every", 1, "--out", "run"]
    refused(batchkern, words, r"not finite at update 2; the last finite checkpoint is kept in run/checkpoint\.pt")
    assert finite(loaded("run"))


def test_weights_that_overflow_after_a_finite_loss_are_not_saved(batchkern):
    """The first loss is finite; the step after it is not."""
    words = ["train", *QUICK, "--lr", 1e38, "--weight-decay", 1e30, "--checkpoint-every", 1, "--out", "run"]
    refused(batchkern, words, "the weights are not finite after update 1")
    assert not Path("run", CHECKPOINT).exists()


def test_ctrl_c_saves_and_names_the_command_that_goes_on(batchkern):
    words = "train --data digits --epochs 8 --batch-size 64 --strategy trimming(end=0.5) --out the/run --overwrite"
    with warm.Process("-m", "batchkern", *words.split()) as process:
        assert process.stdout.readline().startswith("epoch 1/8")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    match = re.fullmatch(r"batchkern: interrupted after update (\d+); [^\n]*the/run[^\n]*: batchkern (.*)\n", err)
    assert match, err
    assert 23 <= int(match[1]) < 8 * 23
    assert finite(loaded("the/run"))
    command = shlex.split(match[2])
    assert command == [*words.split()[:-1], "--resume"]
    status, out, err = batchkern(*command)
    assert (status, err) == (0, "")
    assert out.splitlines()[-3].startswith("epoch 8/8")
    epochs = [json.loads(line)["epoch"] for line in Path("the/run", METRICS).read_text().splitlines()]
    assert epochs == list(range(8))


def test_ctrl_c_at_once_names_the_command_too(batchkern, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", stop)
    status, _, err = batchkern("train", *QUICK, "--out", "my run")
    assert status == 130
    assert re.fullmatch(r"batchkern: interrupted; [^\n]*my run: batchkern train [^\n]*--out 'my run' --resume\n", err)


def test_ctrl_c_before_the_training(batchkern, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_train, "open_pair", stop)
    assert batchkern("train", *QUICK) == (130, "", "batchkern: interrupted\n")


@pytest.mark.parametrize("start", ["-m", "script"])
def test_ctrl_c_while_torch_is_loaded(tmp_path, start):
    """A torch in its place says when it is being imported, and takes its time."""
    (tmp_path / "torch.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    (tmp_path / "batchkern").symlink_to(Path(cli.__file__).parents[1])  # the package
    script = tmp_path / "bin" / "batchkern"
    script.parent.mkdir()
    script.write_text("from batchkern.cli import main; main()")
    words = ["-m", "batchkern"] if start == "-m" else [str(script)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, *words, "info"], env=environment, **PIPES) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "batchkern: interrupted\n")
    assert process.returncode == 130


SWALLOWS = (
    "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException as error: print(repr(error))"
)


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("import swallows", (130, "", "batchkern: interrupted\n")),
        (SWALLOWS, (0, "KeyboardInterrupt()\n", "")),
    ],
)
def test_ctrl_c_that_a_library_swallows(tmp_path, code, ended):
    """While it is imported, it cannot."""
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    begin = (
        "import signal; from batchkern import _start; signal.signal(signal.SIGINT, _start._leave); _start.loaded()\n"
    )
    done = warm.run("-c", begin + code)
    assert (done.returncode, done.stdout, done.stderr) == ended


def test_resuming_a_finished_run_changes_nothing(batchkern, trained):
    weights = (trained / WEIGHTS).read_bytes()
    metrics = (trained / METRICS).read_bytes()
    status, out, err = batchkern("train", *QUICK, "--out", "run", "--resume")
    assert (status, err) == (0, "")
    assert out.startswith("test accuracy")
    assert (trained / WEIGHTS).read_bytes() == weights
    assert (trained / METRICS).read_bytes() == metrics


def test_resuming_with_other_settings_shows_the_difference(batchkern, trained):
    words = ["train", *QUICK, "--out", "run", "--resume", "--lr", 0.5, "--strategy", "trimming"]
    refused(batchkern, words, "lr was 0.05, now 0.5", r"strategies was \[\], now \[.*trimming")


@pytest.mark.parametrize("there", [None, "empty", "other"])
def test_resuming_nothing(batchkern, there):
    if there:
        Path("run").mkdir()
    if there == "other":
        Path("run", CONFIG).write_text("[1, 2]")
    refused(batchkern, ["train", *QUICK, "--out", "run", "--resume"], "run holds no run to resume")


def test_a_bug_is_a_traceback(batchkern, monkeypatch):
    """What is not the user's doing must not look as if it were."""

    def broken(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "fit", broken)
    monkeypatch.setattr(sys, "argv", ["batchkern", "train", *QUICK])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    monkeypatch.setattr(Trainer, "fit", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("2 GiB")))
    refused(batchkern, ["train", *QUICK, "--out", "new"], "out of memory; a smaller --batch-size .*2 GiB")
