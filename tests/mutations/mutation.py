"""What a fault is, and the tests that several files of kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    area: str
    file: str
    fault: str
    before: str
    after: str
    tests: tuple[str, ...]
    """Arguments of pytest."""
    survives: str = ""
    """Why the tests do not find it, where that is known."""

    @property
    def built_by(self) -> str:
        """``cpu``: the module has to be built; ``host``: the tests build a library; nothing: neither."""
        if "host" in self.tests:
            return "host"
        return "cpu" if self.file.startswith("csrc/") else ""

    def misplaced(self, root: Path) -> str:
        """Why the fault cannot be put into the file; empty where it can."""
        file = root / self.file
        times = file.read_text().count(self.before) if file.exists() else 0
        return "" if times == 1 and self.before != self.after else f"its text is there {times} times, not once"

    def applied(self, text: str) -> str:
        return text.replace(self.before, self.after)


def within(area: str, file: str, tests: tuple[str, ...], *faults: tuple[str, ...]) -> Iterator[Mutation]:
    for fault, before, after, *survives in faults:
        yield Mutation(area, file, fault, before, after, tests, *survives)


UNCOMPILED = ("-k", "not compile")
CROSS_ENTROPY = ("tests/ops/test_trimmed_cross_entropy_kernel.py", *UNCOMPILED)
ROWS = ("tests/ops/test_cross_entropy_kernel.py",)
MEAN = ("tests/ops/test_trimmed_mean_kernel.py", *UNCOMPILED)
RANK = ("tests/ops/test_rank_batches_kernel.py",)
AUGMENT = ("tests/ops/test_augment_latent_kernel.py", *UNCOMPILED)
KL = ("tests/ops/test_soft_label_kl_kernel.py", *UNCOMPILED)
