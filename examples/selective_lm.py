"""Train a small GPT on the hardest tokens of each batch, and find out whether that helps.

    python examples/selective_lm.py [--text FILE] [--keep 1 0.5 0.2] [--updates 400] [--json FILE]

Each arm is the same model from the same initial weights, on the same batches. ``keep`` falls linearly from 1 to the
arm's value in the last update (Fassold, 2021). ``random`` is the control: as many tokens as in the last arm, but drawn
at random. An arm trains until it has made as many updates as the first arm, and for as many seconds as that took. The
table has the loss on held-out text, all tokens of it, at both points. It is one seed, and no proof. ``--json`` writes
it to a file that ``batchkern bench report`` shows.

The default text is the source of Python's standard library. It is cut into tokens by a byte-level BPE trained on it.
Needs ``pip install 'batchkern[lm]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler says at length that there is no GPU
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from batchkern import linear_trimmed_cross_entropy
from batchkern.errors import UserError, require
from batchkern.rundir import write_file

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- text ------------------------------------------------------------------------------------------------------


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


def sequences(tokens: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches ``(batch, length + 1)`` from random places: the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
        yield tokens[starts + torch.arange(length + 1)].to(DEVICE)


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


# --- arms ------------------------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""``(hidden, weight, target, keep)`` -> the loss to train on, and the losses of the tokens that it looked at."""


def hardest(hidden: Tensor, weight: Tensor, target: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    return linear_trimmed_cross_entropy(hidden, weight, target, keep, per_sample=True)


def random_tokens(hidden: Tensor, weight: Tensor, target: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The control looks at nothing else, so it pays for nothing else."""
    index = torch.randperm(len(target), device=target.device)[: max(1, round(keep * len(target)))]
    return linear_trimmed_cross_entropy(hidden[index], weight, target[index], 1.0, per_sample=True)


@dataclass
class Result:
    name: str
    seconds: float  # for the updates
    tokens_per_second: float
    peak_bytes: int  # of one update
    at_updates: float  # held-out loss
    at_seconds: float
    updates: int  # in all


class Arm:
    def __init__(self, name: str, keep: float, loss: Loss, options: argparse.Namespace, data: tuple[Tensor, Tensor]):
        torch.manual_seed(options.seed)
        self.name, self.keep, self.loss, self.options = name, keep, loss, options
        self.model = GPT(options.vocabulary, options.length, options.width, options.layers).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.rate, weight_decay=0.01)
        self.batches = sequences(data[0], options.batch, options.length, options.seed)
        held_out = sequences(data[1], options.batch, options.length, options.seed)
        self.held_out = [next(held_out) for _ in range(options.test_batches)]
        self.done = 0

    def keep_now(self) -> float:
        return 1 + (self.keep - 1) * min(1.0, self.done / max(1, self.options.updates - 1))

    def losses(self, batch: Tensor, loss: Loss, keep: float) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=DEVICE.type == "cuda"):
            hidden = self.model(batch[:, :-1]).flatten(0, 1)
            return loss(hidden, self.model.embedding.weight, batch[:, 1:].flatten(), keep)

    def update(self) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * min(1.0, (self.done + 1) / max(1, self.options.updates // 10))
        loss, losses = self.losses(next(self.batches), self.loss, self.keep_now())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        return loss.detach(), losses.mean()

    @torch.no_grad()
    def test(self) -> float:
        return sum(float(self.losses(batch, hardest, 1.0)[0]) for batch in self.held_out) / len(self.held_out)

    def peak_bytes(self) -> int:
        """Of one more update, beyond model, optimizer and batch."""
        if DEVICE.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.update()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            self.update()
        held = peak = 0
        for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    def run(self, budget: float | None) -> Result:
        """As many updates as were asked for, and on to ``budget`` seconds, without the time of tests and prints."""
        seconds, at_updates, at_seconds, first = 0.0, None, None, 0.0
        tokens = self.options.batch * self.options.length
        while at_updates is None or at_seconds is None:
            keep, start = self.keep_now(), time.perf_counter()
            loss, over_all = self.update()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            if self.done % max(1, self.options.updates // 8) == 0 and self.done <= self.options.updates:
                looked_at = "all" if self.loss is hardest else "its "
                print(
                    f"  {self.name:12} update {self.done:5}  {seconds:6.1f} s  keep {keep:.2f}  "
                    f"loss of {looked_at} tokens {over_all:.3f}, of the kept {loss:.3f}  "
                    f"{tokens * self.done / seconds:,.0f} tokens/s"
                )
            if self.done == self.options.updates:
                first, at_updates = seconds, self.test()
                budget = seconds if budget is None else budget
            if budget is not None and at_seconds is None and seconds >= budget:
                at_seconds, updates = self.test(), self.done
        speed = tokens * self.options.updates / first
        return Result(self.name, first, speed, self.peak_bytes(), at_updates, at_seconds, updates)


def print_table(results: list[Result]) -> None:
    budget, updates = results[0].seconds, results[0].updates
    print(
        f"\n{'arm':12} {'seconds':>8} {'tokens/s':>9} {'peak MB':>8}   held-out loss, all tokens, after"
        f"\n{'':40} {f'{updates} updates':>14} {f'{budget:.0f} s':>9}  (updates made by then)"
    )
    for r in results:
        print(
            f"{r.name:12} {r.seconds:8.1f} {r.tokens_per_second:9,.0f} {r.peak_bytes / 1e6:8.1f} "
            f"{r.at_updates:14.3f} {r.at_seconds:9.3f}  ({r.updates})"
        )


def write_json(path: Path, options: argparse.Namespace, results: list[Result]) -> None:
    """The table, to four digits, with its settings and its machine."""

    def rounded(value: float) -> float:
        return float(f"{value:.4g}")

    machine = {
        "device": DEVICE.type,
        "cpu": processor(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    arms = [
        {
            "arm": r.name,
            "seconds": rounded(r.seconds),
            "tokens_per_s": rounded(r.tokens_per_second),
            "peak_bytes": r.peak_bytes,
            "loss": rounded(r.at_updates),
            "updates": options.updates,
            "loss_at_equal_seconds": rounded(r.at_seconds),
            "updates_at_equal_seconds": r.updates,
        }
        for r in results
    ]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    content = {"machine": machine, "settings": settings, "arms": arms, "equal_seconds": arms[0]["seconds"]}
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def processor() -> str:
    """Its name; the architecture where Linux does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def whole(low: int, high: int = 1_000_000) -> Callable[[str], int]:
        def number(text: str) -> int:
            if not text.isdecimal() or not low <= int(text) <= high:
                raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
            return int(text)

        return number

    def fraction(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
        return value

    parser.add_argument("--text", type=Path, help="a text file; default: the source of Python's standard library")
    parser.add_argument("--keep", type=fraction, nargs="+", default=[1.0, 0.5, 0.2], help="one arm for each")
    parser.add_argument("--updates", type=whole(1), default=400)
    parser.add_argument("--vocabulary", type=whole(300), default=16384)
    parser.add_argument("--width", type=whole(32, 8192), default=128)
    parser.add_argument("--layers", type=whole(1), default=2)
    parser.add_argument("--length", type=whole(2, 65536), default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=whole(1), default=8, help="sequences")
    parser.add_argument("--test-batches", type=whole(1), default=32)
    parser.add_argument("--rate", type=fraction, default=2e-3, help="of AdamW")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--json", type=Path, help="write the table to this file, which must not exist yet")
    options = parser.parse_args()
    if options.width % 32:
        parser.error(f"--width must be a multiple of 32, got {options.width}")
    if options.json and (options.json.exists() or not options.json.parent.is_dir()):
        parser.error(f"--json must be a file that does not exist yet in a folder that does, got {options.json}")
    return options


def main() -> int:
    options = parse()
    try:
        train, test = tokenize(read_documents(options.text), options.vocabulary)
        for part, tokens in (("train on", train), ("test with", test)):
            if len(tokens) <= options.length:
                raise UserError(
                    f"--text must have more than --length {options.length} tokens to {part}, it has {len(tokens)}"
                )
    except UserError as error:
        print(f"selective_lm.py: {error}", file=sys.stderr)
        return 2
    print(f"{len(train):,} tokens to train on, {len(test):,} held out; {DEVICE}, torch {torch.__version__}")
    arms = [(f"keep {keep:g}", keep, hardest) for keep in options.keep]
    arms.append((f"random {options.keep[-1]:g}", options.keep[-1], random_tokens))
    results: list[Result] = []
    for name, keep, loss in arms:
        arm = Arm(name, keep, loss, options, (train, test))
        results.append(arm.run(results[0].seconds if results else None))
    print_table(results)
    if options.json:
        write_json(options.json, options, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
