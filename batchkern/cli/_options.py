"""The options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from batchkern.errors import UserError
from batchkern.files import make_directory, read_file
from batchkern.initial_weights import PRETRAINED
from batchkern.strategies import STRATEGIES

try:
    import typer
except ImportError:  # batchkern.cli.main reports it
    typer = None  # type: ignore[assignment]


def option(*names: str, help: str) -> Any:
    """An option of typer; None if typer is missing, since this module must load to report it."""
    return typer.Option(*names, help=help) if typer else None


def argument(*, help: str) -> Any:
    """A positional argument of typer."""
    return typer.Argument(help=help) if typer else None


DataOption = Annotated[
    str, option(help="digits, a parquet file, a folder of images, a name on the hub, or with --label a table")
]
LabelOption = Annotated[
    str | None, option(help="column of labels of a table (.csv, .tsv, .parquet); the other columns are features")
]
TestOption = Annotated[str | None, option(help="test data; default: those of --data, else a fifth of it")]
StrategyOption = Annotated[
    str, option(help=f'{", ".join(STRATEGIES)}; joined, with options: "trimming(end=0.3)+passive(every=20)"')
]
PassiveOption = Annotated[str | None, option(help="data that the strategy passive injects, e.g. photo-patches")]
ImageSizeOption = Annotated[int | None, option(help="resize all images to a square of this many pixels")]
CenterCropOption = Annotated[
    bool,
    option(
        "--center-crop",
        help="cut the square of --image-size out of each image's centre, as for ImageNet, instead of squeezing",
    ),
]
ModelOption = Annotated[
    str | None,
    option(
        help="mlp, cnn, resnet8, 20, 44 or 56, wrn22-10, wrn18-2, vgg16-cifar, alexnet, or any of timm; default: cnn, "
        "or mlp for a table"
    ),
]
WeightsOption = Annotated[
    Path | None, option(help="initial weights: a safetensors file, or the directory of a finished run")
]
PretrainedOption = Annotated[bool, option("--pretrained", help="start from the pretrained weights of timm for --model")]
ClassifierOption = Annotated[str | None, option(help="the model's last linear layer, if it cannot be found")]
EpochsOption = Annotated[int, option(help="epochs of the baseline; strategies may visit fewer samples in an epoch")]
BatchSizeOption = Annotated[int, option(help="batch size of the baseline; strategies may change it")]
DropLastOption = Annotated[bool, option("--drop-last", help="leave out the last batch of an epoch if it is smaller")]
OptimizerOption = Annotated[str, option(help="sgd, adam or adamw")]
LrOption = Annotated[float, option(help="learning rate, at the start of the schedule")]
MomentumOption = Annotated[float, option(help="momentum of sgd; the first beta of adam and adamw")]
WeightDecayOption = Annotated[float, option(help="weight decay of the optimizer")]
ScheduleOption = Annotated[
    str, option(help='learning-rate schedule: constant, cosine, step, or "step(milestones=(0.3, 0.6), gamma=0.1)"')
]
WarmupOption = Annotated[
    float, option(help="epochs over which the learning rate rises linearly to that of the schedule")
]
MaxGradNormOption = Annotated[float | None, option(help="clip the gradient of an update to this norm")]
AccumulationOption = Annotated[int, option(help="number of batches whose gradients make one update")]
EmaOption = Annotated[
    float | None, option(help="evaluate and save a moving average of the weights with this decay, e.g. 0.999")
]
CompileOption = Annotated[str | None, option(help="backend of torch.compile, e.g. inductor")]
NoChannelsLastOption = Annotated[
    bool, option("--no-channels-last", help="keep the weights of convolutions in torch's default memory layout")
]
AmpOption = Annotated[str, option(help="mixed precision: none, bf16 or fp16")]
AugmentOption = Annotated[str, option(help="none, flip, crop, crop+flip, resized-crop or resized-crop+flip")]
SmoothingOption = Annotated[float, option(help="label smoothing of the training loss, in [0, 1]")]
NoiseOption = Annotated[float, option(help="give this fraction of the training images a wrong label, in [0, 1)")]
CleanLabelsOption = Annotated[
    str | None, option(help="column of --data with the correct labels, if the training labels are noisy")
]
ValidationOption = Annotated[
    float | None,
    option(help="hold out this fraction of the training images, in (0, 1), and test on it instead of the test data"),
]
BestOption = Annotated[
    bool, option("--best", help="use the weights of the best epoch, if the run was trained with --keep-best")
]
DeviceOption = Annotated[str | None, option(help="cpu, cuda or cuda:N; default: cuda if available")]
OverwriteOption = Annotated[bool, option("--overwrite", help="replace the files that batchkern wrote in --out")]


def default_model(label: str | None) -> str:
    return "cnn" if label is None else "mlp"


def initial_weights(weights: Path | None, pretrained: bool) -> Path | str | None:
    """The argument ``weights`` of the trainer."""
    if weights is not None and pretrained:
        raise UserError("--weights and --pretrained exclude each other; give one of them")
    return PRETRAINED if pretrained else weights


def check_out(out: Path | None, overwrite: bool, what: str, is_ours: Callable[[bytes], bool]) -> None:
    """Checks, before anything is computed, that a file may be written; creates its folder.

    Args:
        what: the name of such a file with its article, for messages.
        is_ours: whether contents are those of such a file; other files are never replaced.

    Raises:
        UserError: a file exists that may not be replaced.
    """
    if out is None:
        return
    make_directory(out.parent)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UserError(f"{out} already exists; give overwrite (--overwrite) to replace it, or another file")
    try:
        ours = is_ours(read_file(out))
    except OSError:
        ours = False
    if not ours:
        raise UserError(f"{out} is not {what} written by batchkern, and is not replaced; give another file")
