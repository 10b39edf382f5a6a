"""Train a small GPT on a selection of the tokens of each batch, and find out which selections help, if any.

    python examples/selective_lm.py [--text FILE] [--noise 0.5 0] [--clean 0.005 0.01 0.02 0.05] [--json FILE]

Every arm is the same model from the same initial weights, on the same batches. ``--noise`` is the share of their
sequences of which half of the tokens, at random places, are overwritten with random ones. The arms: ``all`` tokens;
``random`` ones; those of ``hardest`` or ``lowest`` loss, of highest ``entropy``; and for each share of ``--clean``, a
part of the training text that is known to be free of noise, ``excess``: those whose loss most exceeds that of a
reference model trained on the clean part alone (Rho-1, arXiv:2404.07965), and ``clean``: no noisy text at all, the
model is trained on the clean part alone. The loss on held-out text, free of noise, is compared at equal updates, at
equal cost (floating-point operations) and at equal seconds; the reference's training and its forward passes count.

The default text is the source of Python's standard library, cut into tokens by a byte-level BPE trained on it.
``--json`` writes a file that ``batchkern bench report`` shows. Needs ``pip install 'batchkern[lm,train]'``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from batchkern import linear_cross_entropy, trimmed_mean
from batchkern.bench_report.results import LANGUAGE, LANGUAGE_KIND, Results
from batchkern.bench_report.tables import language
from batchkern.compare.statistics import correct, interval, paired_difference
from batchkern.errors import UserError, require
from batchkern.files import write_file

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PIECE = 8
"""Sequences of a piece of training text: the clean part is made of whole pieces."""
CURVE = 10
"""Points at which a training is tested on its way."""


# --- text ------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    train: Tensor  # tokens (T,)
    held_out: Tensor  # sequences (N, length + 1)
    length: int
    batch: int
    vocabulary: int

    def clean(self, share: float, seed: int) -> Tensor:
        """Tokens of a share of the training text: pieces at random, of which a smaller share has the first ones."""
        size = PIECE * self.length
        pieces = self.train[: len(self.train) // size * size].view(-1, size)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
        return pieces[order[: round(share * len(pieces))]].flatten()

    def batches(self, tokens: Tensor, seed: int, noise: float) -> Iterator[Tensor]:
        """Endless batches ``(batch, length + 1)`` from random places: the same ones for the same seed. In a share
        ``noise`` of their sequences half of the tokens are random ones, and so are half of their targets."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.length + 1)
        while True:
            starts = torch.randint(len(tokens) - self.length, (self.batch, 1), generator=generator)
            batch = tokens[starts + torch.arange(self.length + 1)]
            noisy = torch.rand(self.batch, 1, generator=generator) < noise
            places = torch.rand(shape, generator=generator).argsort(dim=1) < shape[1] // 2
            words = torch.randint(self.vocabulary, shape, generator=generator)
            yield torch.where(noisy & places, words, batch).to(DEVICE)


def read_documents(text: Path | None) -> list[str]:
    """Files of the standard library, or the pieces of one text file; a tenth of them is held out."""
    if text is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        files = [f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts)]
        return [f.read_text(encoding="utf-8", errors="replace") for f in files]
    try:
        whole = text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--text must be a file that can be read, got {text}: {error.strerror}") from error
    size = max(1, len(whole) // 200)
    return [whole[begin : begin + size] for begin in range(0, len(whole), size)]


def tokenize(documents: list[str], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(T,)`` to train on and to test with."""
    tokenizers = require("tokenizers", "lm")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents[::4], trainer)

    def encode(part: list[str]) -> Tensor:
        return torch.tensor([token for piece in tokenizer.encode_batch(part) for token in piece.ids])

    return encode([d for i, d in enumerate(documents) if i % 10]), encode(documents[::10])


def prepare(options: argparse.Namespace) -> Text:
    """
    Raises:
        UserError: the text cannot be read, or is too short.
    """
    train, test = tokenize(read_documents(options.text), options.vocabulary)
    length = options.length
    for part, tokens in (("train on", train), ("test with", test)):
        if len(tokens) <= length:
            raise UserError(f"--text must have more than --length {length} tokens to {part}, it has {len(tokens)}")
    count = options.batch * options.test_batches  # sequences, evenly over the held-out text
    starts = torch.linspace(0, len(test) - length - 1, count).long()[:, None]
    text = Text(train, test[starts + torch.arange(length + 1)], length, options.batch, options.vocabulary)
    for share in options.clean:
        if len(clean := text.clean(share, 0)) <= length:
            raise UserError(
                f"--clean {share:g} of the training text must be more than --length {length} tokens, in pieces of "
                f"{PIECE * length}: it is {len(clean)}"
            )
    return text


# --- model -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norms[0](x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Returns the last hidden state. The embedding is also the last layer's weight: there is no layer of logits."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 32)) for _ in range(layers)), nn.LayerNorm(width))
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.embedding(tokens) + self.position.weight[: tokens.shape[1]])

    def last_layer(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden state ``(N, H)``, weight ``(V, H)`` and target ``(N,)`` of the N tokens of ``batch``."""
        return self(batch[:, :-1]).flatten(0, 1), self.embedding.weight, batch[:, 1:].flatten()


# --- arms ------------------------------------------------------------------------------------------------------

SELECTIONS = ("random", "hardest", "lowest", "entropy")


def objective(
    arm: str, keep: float, layer: tuple[Tensor, Tensor, Tensor], reference: Tensor | None, generator: torch.Generator
) -> Tensor:
    """The loss that an arm trains on. ``reference``: the reference model's losses ``(N,)``, for ``excess``."""
    hidden, weight, target = layer
    if arm in ("all", "clean"):
        return linear_cross_entropy(hidden, weight, target)
    if arm == "random":  # it looks at nothing else, so it pays for nothing else
        count = max(1, round(keep * len(target)))
        index = torch.randperm(len(target), generator=generator)[:count].to(target.device)
        return linear_cross_entropy(hidden[index], weight, target[index])
    if arm == "entropy":
        losses, _, score, _ = linear_cross_entropy(hidden, weight, target, reduction="none", stats=True)
    else:
        losses = score = linear_cross_entropy(hidden, weight, target, reduction="none")
    if reference is not None:
        score = losses - reference
    return trimmed_mean(losses, keep, score=score.detach(), order="lowest" if arm == "lowest" else "highest")


class Training:
    def __init__(
        self,
        arm: str,
        seed: int,
        options: argparse.Namespace,
        text: Text,
        tokens: Tensor,
        noise: float,
        reference: GPT | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.arm, self.options, self.text, self.reference = arm, options, text, reference
        self.model = GPT(options.vocabulary, options.length, options.width, options.layers).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.rate, weight_decay=0.01)
        self.batches = text.batches(tokens, seed, noise)
        self.generator = torch.Generator().manual_seed(seed)
        self.done = 0
        self.tested: dict[int, float] = {}

    def autocast(self) -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16, enabled=DEVICE.type == "cuda")

    def update(self) -> None:
        for group in self.optimizer.param_groups:  # constant after the warm-up: any point is like the end of a training
            group["lr"] = self.options.rate * min(1.0, (self.done + 1) / max(1, self.options.updates // 10))
        batch, losses = next(self.batches), None
        with self.autocast():
            if self.reference is not None:
                with torch.no_grad():
                    losses = linear_cross_entropy(*self.reference.last_layer(batch), reduction="none")
            layer = self.model.last_layer(batch)
            loss = objective(self.arm, self.options.keep, layer, losses, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1

    @torch.no_grad()
    def test(self) -> float:
        """The loss of all tokens of the held-out text, in nats."""
        total, parts = 0.0, self.text.held_out.split(self.text.batch)
        with self.autocast():
            for part in parts:
                total += float(linear_cross_entropy(*self.model.last_layer(part.to(DEVICE))))
        return round(total / len(parts), 5)

    def advance(self, points: Iterable[int], until: int | None = None) -> dict[int, float]:
        """Trains up to the last point, or ``until`` an update, with a test at each point on the way."""
        points = set(points)
        while True:
            if self.done in points:
                self.tested[self.done] = self.test()
            if self.done >= (max(points) if until is None else until):
                return self.tested
            self.update()


# --- what an update costs, and how many of them a budget pays for ------------------------------------------------

Costs = dict[str, dict[str, float]]
"""By arm, without its share: ``flops`` and ``seconds`` of one update."""


def kind(arm: str) -> str:
    """What makes its updates cost what they cost: an arm without its share; ``clean`` does what ``all`` does."""
    return arm.partition(" ")[0].replace("clean", "all")


def measure(options: argparse.Namespace, text: Text) -> Costs:
    """Floating-point operations of one update, and its seconds: the median of rounds in which all arms take turns."""
    reference = GPT(options.vocabulary, options.length, options.width, options.layers).to(DEVICE).requires_grad_(False)
    trainings = {
        arm: Training(arm, 0, options, text, text.train, options.noise[0], reference if arm == "excess" else None)
        for arm in ("all", *SELECTIONS, "excess")
    }
    costs: Costs = {}
    for arm, training in trainings.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no other on a CPU
            training.update()
        costs[arm] = {"flops": counter.get_total_flops()}
    seconds: dict[str, list[float]] = {arm: [] for arm in trainings}
    for _ in range(options.rounds):
        for arm, training in trainings.items():
            start = time.perf_counter()
            training.update()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[arm].append(time.perf_counter() - start)
    for arm, measured in seconds.items():
        costs[arm]["seconds"] = float(f"{statistics.median(measured):.4g}")
    return costs


def plan(arm: str, costs: Costs, options: argparse.Namespace) -> dict[str, int]:
    """Updates of an arm for each budget: those of ``all``, and what their operations and their seconds pay for. The
    reference's training is paid for first, at the price of ``all``."""
    own, plain = costs[kind(arm)], costs["all"]
    left = options.updates - (options.reference_updates if kind(arm) == "excess" else 0)
    paid = {budget: math.floor(left * plain[unit] / own[unit] + 1e-9) for budget, unit in UNITS.items()}
    return {"updates": options.updates, **paid}


UNITS = {"cost": "flops", "seconds": "seconds"}


# --- trainings -------------------------------------------------------------------------------------------------

Found = dict[tuple[float | None, str], dict[int, dict[int, float]]]
"""By noise and arm, by seed, by number of updates: the loss on held-out text. ``clean`` has seen no noise."""
Job = tuple[int, float | None, str]
"""Seed, noise and arm. Where the noise is None, the arms that need the clean part: trainings share its reference."""


class Bench:
    """All trainings of a benchmark, by seed."""

    def __init__(self, options: argparse.Namespace, text: Text, costs: Costs) -> None:
        self.options, self.text, self.costs = options, text, costs

    def jobs(self) -> list[Job]:
        """The longest first, so that no worker waits long for the last."""
        seeds = range(self.options.seeds)
        jobs: list[Job] = [(seed, None, str(share)) for share in self.options.clean for seed in seeds]
        arms = ("all", *SELECTIONS)
        return jobs + [(seed, noise, arm) for noise in self.options.noise for arm in arms for seed in seeds]

    def points(self, arm: str) -> set[int]:
        on_the_way = {round(self.options.updates * (i + 1) / CURVE) for i in range(CURVE)}
        return on_the_way | set(plan(arm, self.costs, self.options).values())

    def run(self, job: Job) -> list[tuple[float | None, str, int, dict[int, float]]]:
        seed, noise, arm = job
        if noise is not None:
            training = Training(arm, seed, self.options, self.text, self.text.train, noise)
            return [(noise, arm, seed, training.advance(self.points(arm)))]
        clean = Training("clean", seed, self.options, self.text, self.text.clean(float(arm), seed), 0.0)
        points = self.points(f"clean {arm}") | {self.options.reference_updates}
        clean.advance(points, until=self.options.reference_updates)
        reference = copy.deepcopy(clean.model).requires_grad_(False)
        found = [(None, f"clean {arm}", seed, clean.advance(points))]
        for noise in self.options.noise:
            training = Training("excess", seed, self.options, self.text, self.text.train, noise, reference)
            found.append((noise, f"excess {arm}", seed, training.advance(self.points(f"excess {arm}"))))
        return found

    def run_all(self) -> Found:
        found: Found = {}
        start, jobs = time.perf_counter(), self.jobs()
        for number, outcomes in enumerate(self.outcomes(jobs), 1):
            for noise, arm, seed, losses in outcomes:
                found.setdefault((noise, arm), {})[seed] = losses
                said = "" if noise is None else f"noise {noise:g}, "
                print(
                    f"{number:4}/{len(jobs)}  {time.perf_counter() - start:6.0f} s  {said}{arm}, seed {seed}: "
                    f"loss {losses[self.options.updates]:.3f} after {self.options.updates} updates",
                    flush=True,
                )
        return found

    def outcomes(self, jobs: list[Job]) -> Iterator[list[tuple[float | None, str, int, dict[int, float]]]]:
        if self.options.workers == 1:
            yield from map(self.run, jobs)
            return
        start = (self, torch.get_num_threads())
        with ProcessPoolExecutor(self.options.workers, get_context("spawn"), begin_worker, start) as pool:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                yield done.result()


def begin_worker(bench: Bench, threads: int) -> None:
    global BENCH
    BENCH = bench
    torch.set_num_threads(threads)


def work(job: Job) -> list[tuple[float | None, str, int, dict[int, float]]]:
    return BENCH.run(job)


# --- what was found --------------------------------------------------------------------------------------------

At = dict[str, dict[str, dict[int, float]]]
"""By arm and budget, by seed: the loss on held-out text."""


def loss_at(by_seed: dict[int, dict[int, float]], updates: int) -> dict[int, float]:
    return {seed: losses[updates] for seed, losses in sorted(by_seed.items())}


def mean(by_seed: dict[int, float]) -> dict[str, Any]:
    middle, half = interval(list(by_seed.values()))
    return {"mean": middle, "half_width": half, "values": list(by_seed.values())}


def summarise(found: Found, costs: Costs, options: argparse.Namespace, text: Text) -> dict[str, list[dict[str, Any]]]:
    """An entry for each noise and arm, and one for each noise and share of ``--clean``.

    Differences are paired by seed: an arm less ``all``, and ``excess`` less ``clean``. Their p-values are corrected for
    all tests of one text at one budget.
    """
    arms: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    for noise in options.noise:
        own = {arm: losses for (seen, arm), losses in found.items() if seen in (noise, None)}
        shares = [str(share) for share in options.clean]
        order = ["all", *SELECTIONS, *(f"{name} {share}" for name in ("excess", "clean") for share in shares)]
        updates = {arm: plan(arm, costs, options) for arm in order}
        at: At = {arm: {budget: loss_at(own[arm], n) for budget, n in updates[arm].items()} for arm in order}
        arms_of_text = [arm_entry(noise, arm, own[arm], updates[arm], at, costs) for arm in order]
        references_of_text = [
            reference_entry(noise, share, own[f"clean {share}"], at, options)
            | {"tokens": len(text.clean(float(share), 0))}
            for share in shares
        ]
        for budget in (*updates["all"], "best"):
            entries = (*arms_of_text, *references_of_text)
            correct([entry["difference"][budget] for entry in entries if budget in entry["difference"]])
        arms += arms_of_text
        references += references_of_text
    return {"arms": arms, "references": references}


def arm_entry(
    noise: float, arm: str, losses: dict[int, dict[int, float]], updates: dict[str, int], at: At, costs: Costs
) -> dict[str, Any]:
    points = sorted(next(iter(losses.values())))
    return {
        "noise": noise,
        "arm": arm,
        **costs[kind(arm)],
        "updates": updates,
        "loss": {budget: mean(values) for budget, values in at[arm].items()},
        "difference": {
            budget: paired_difference(values, at["all"][budget]) for budget, values in at[arm].items() if arm != "all"
        },
        "curve": {"updates": points, "loss": [[of_seed[n] for n in points] for _, of_seed in sorted(losses.items())]},
    }


def reference_entry(
    noise: float, share: str, clean: dict[int, dict[int, float]], at: At, options: argparse.Namespace
) -> dict[str, Any]:
    """``best``: the point of lowest mean loss that ``clean`` had on its way. Who picks it has looked at the held-out
    text, so it flatters; ``excess`` is held against it after all its updates."""
    excess, alone = at[f"excess {share}"], at[f"clean {share}"]
    points = [n for n in next(iter(clean.values())) if n <= options.updates]
    best = min(points, key=lambda n: statistics.fmean(loss_at(clean, n).values()))
    against = {**alone, "best": loss_at(clean, best)}
    return {
        "noise": noise,
        "share": float(share),
        "updates": options.reference_updates,
        "loss": mean(loss_at(clean, options.reference_updates)),
        "best": {"updates": best, "loss": mean(against["best"])},
        "difference": {
            budget: paired_difference(excess["updates" if budget == "best" else budget], values)
            for budget, values in against.items()
        },
    }


def machine() -> dict[str, Any]:
    return {
        "device": DEVICE.type,
        "cpu": processor(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Its name; the architecture where Linux does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- command line ----------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def whole(low: int, high: int = 1_000_000) -> Callable[[str], int]:
        def number(text: str) -> int:
            if not text.isdecimal() or not low <= int(text) <= high:
                raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
            return int(text)

        return number

    def fraction(zero: bool = False) -> Callable[[str], float]:
        def number(text: str) -> float:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not (0 < value <= 1 or (zero and value == 0)):
                raise argparse.ArgumentTypeError(f"must be in {'[' if zero else '('}0, 1], got {text!r}")
            return value

        return number

    parser.add_argument("--text", type=Path, help="a text file; default: the source of Python's standard library")
    parser.add_argument(
        "--noise", type=fraction(zero=True), nargs="+", default=[0.5, 0.0], help="a benchmark for each share"
    )
    parser.add_argument(
        "--clean", type=fraction(), nargs="+", default=[0.005, 0.01, 0.02, 0.05], help="two arms for each share"
    )
    parser.add_argument("--keep", type=fraction(), default=0.6, help="share of the tokens that count")
    parser.add_argument("--seeds", type=whole(1, 1000), default=5, help="how many")
    parser.add_argument("--updates", type=whole(2), default=600)
    parser.add_argument("--reference-updates", type=whole(1), help="of the reference model; default: half of them")
    parser.add_argument("--vocabulary", type=whole(300), default=2048)
    parser.add_argument("--width", type=whole(32, 8192), default=96)
    parser.add_argument("--layers", type=whole(1), default=2)
    parser.add_argument("--length", type=whole(2, 65536), default=64, help="tokens of a sequence")
    parser.add_argument("--batch", type=whole(1), default=8, help="sequences")
    parser.add_argument("--test-batches", type=whole(1), default=16)
    parser.add_argument("--rate", type=fraction(), default=2e-3, help="of AdamW")
    parser.add_argument("--rounds", type=whole(1), default=50, help="of measuring the seconds of an update")
    parser.add_argument("--workers", type=whole(1, 256), default=1, help="processes, which share the CPU's threads out")
    parser.add_argument("--json", type=Path, help="write what was found to this file, which must not exist yet")
    options = parser.parse_args()
    options.noise, options.clean = list(dict.fromkeys(options.noise)), list(dict.fromkeys(options.clean))
    if options.reference_updates is None:
        options.reference_updates = options.updates // 2
    if options.reference_updates >= options.updates:
        parser.error(
            f"--reference-updates must be fewer than --updates {options.updates}, got {options.reference_updates}"
        )
    if options.width % 32:
        parser.error(f"--width must be a multiple of 32, got {options.width}")
    if options.workers > 1 and DEVICE.type == "cuda":
        parser.error(f"--workers must be 1 on a GPU, got {options.workers}")
    if options.json and (options.json.exists() or not options.json.parent.is_dir()):
        parser.error(f"--json must be a file that does not exist yet in a folder that does, got {options.json}")
    return options


def main() -> int:
    options = parse()
    # Seconds are measured alone, before, with the threads that a worker has.
    torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))
    try:
        text = prepare(options)
        for module in ("scipy.stats", "statsmodels.stats.multitest"):  # better now than after the trainings
            require(module, "train")
        print(f"{len(text.train):,} tokens to train on; {DEVICE}, torch {torch.__version__}")
        costs = measure(options, text)
        found = Bench(options, text, costs).run_all()
        content = {
            "kind": LANGUAGE_KIND,
            "machine": machine(),
            "settings": {**vars(options), "text": options.text and options.text.name, "json": None},
            "tokens": len(text.train),
            **summarise(found, costs, options, text),
        }
        print("\n" + language(Results(options.json or Path(), LANGUAGE, content)))
        if options.json:
            write_file(options.json, (json.dumps(content, indent=1) + "\n").encode())
    except UserError as error:
        print(f"selective_lm.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
