"""Faults of data sources and batches."""

from __future__ import annotations

from mutations.mutation import within

DATA_TESTS = ("tests/test_data.py", "-k", "not home and not hub")

DATA = [
    *within(
        "data",
        "batchkern/data/images.py",
        DATA_TESTS,
        (
            "a variance with n - 1, not n",
            "variance = (squares.double() / count - mean.square())",
            "variance = (squares.double() / count - mean.square()).mul_(count / (count - 1))",
        ),
        ("a constant channel has no deviation", ".clamp_(min=1 / 255).float()", ".float()"),
    ),
    *within(
        "data",
        "batchkern/data/feed.py",
        DATA_TESTS,
        ("the sign of the shift", "(-mean.double() / std.double())", "(mean.double() / std.double())"),
        (
            "windows never begin at the last place",
            "top = own(torch.randint(2 * pad_y + 1,",
            "top = own(torch.randint(2 * pad_y,",
        ),
        ("every update is augmented alike", 'f"{seed}/{step}"', 'f"{seed}"'),
        (
            "flips are drawn from torch's own generator",
            "torch.rand(whole, 1, generator=generator, dtype=torch.float32) < 0.5",
            "torch.rand(whole, 1) < 0.5",
        ),
    ),
    *within(
        "data",
        "batchkern/data/feed.py",
        ("tests/data/test_images.py", "-k", "default_type"),
        (
            "flips are others in another default type",
            "generator=generator, dtype=torch.float32)",
            "generator=generator)",
        ),
    ),
    *within(
        "data",
        "batchkern/data/sources.py",
        DATA_TESTS,
        ("a fifth of a class is cut, not rounded", "(sizes[labels[order]] + 2) // 5", "sizes[labels[order]] // 5"),
    ),
    *within(
        "data",
        "batchkern/data/derived.py",
        DATA_TESTS,
        (
            "a noisy label may be the right one",
            "torch.randint(1, classes, (len(chosen),)",
            "torch.randint(0, classes, (len(chosen),)",
        ),
    ),
    *within(
        "data",
        "batchkern/data/decode.py",
        DATA_TESTS,
        ("16-bit greys keep their low byte", ".clip(0, 65535) >> 8)", ".clip(0, 65535))"),
    ),
    *within(
        "data",
        "batchkern/data/decode.py",
        ("tests/data/test_decode.py", "-k", "forked"),
        (
            "a forked child hands images to threads that it does not have",
            "    os.register_at_fork(after_in_child=_pool.cache_clear)\n",
            "    pass\n",
        ),
    ),
    *within(
        "data",
        "batchkern/data/decode.py",
        ("tests/data/test_feed.py",),
        (
            "what was prepared is taken for another batch",
            "return self._process == os.getpid() and same",
            "return self._process == os.getpid()",
        ),
        (
            "a fork waits for threads that it does not have",
            "return self._process == os.getpid() and same",
            "return same",
        ),
        ("what nobody wants is decoded all the same", "            if self._dropped:\n", "            if False:\n"),
        (
            "threads go by the size in the file alone",
            "filter(None, (self.source, self.size))",
            "filter(None, (self.source,))",
        ),
    ),
    *within(
        "data",
        "batchkern/data/feed.py",
        ("tests/data/test_feed.py",),
        (
            "memory is used again while somebody holds a part of it",
            "if borrower() is None and memory.shape == shape]",
            "if memory.shape == shape]",
        ),
        ("memory is never used again", "memory = free[0] if free else torch.empty(", "memory = torch.empty("),
        ("a batch that was prepared is decoded again", "return ahead.result()", "pass"),
        (
            "a batch that is named twice is decoded twice",
            "                return\n            for old",
            "                pass\n            for old",
        ),
        (
            "what was named before the last two is decoded all the same",
            "                old.drop()\n",
            "                pass\n",
        ),
    ),
    *within(
        "data",
        "batchkern/data/crops.py",
        ("tests/data/test_crops.py",),
        (
            "the longer side is rounded, not cut",
            "int(shorter * max(height, width)",
            "round(shorter * max(height, width)",
        ),
        ("an odd margin is cut, not rounded", "(round((side - size) / 2) for", "((side - size) // 2 for"),
        ("aspects are even, not their logarithms", "** aspect\n", "* aspect\n"),
        ("windows never end at the lower edge", "int(top * (height - h + 1))", "int(top * (height - h))"),
        ("the central window is at the top", "Window((height - h) // 2,", "Window(0,"),
        ("what is outside of the window has a part in it", "clamp(min=0) * inside", "clamp(min=0)"),
        ("new pixels lie at the corners", "places[:, None] * length / size", "(places[:, None] - 0.5) * length / size"),
        ("every update has the same windows", 'generator(seed, "window", step)', 'generator(seed, "window")'),
    ),
    *within(
        "data",
        "batchkern/data/decode.py",
        ("tests/data/test_crops.py",),
        (
            "what was prepared is taken for another update",
            "and self.numbers == _listed(numbers, len(positions))",
            "",
        ),
        (
            "random windows are cut from the centre",
            "if numbers is not None:",
            "if numbers is not None and not self.crop:",
        ),
    ),
    *within(
        "data",
        "batchkern/data/loading.py",
        ("tests/data/test_crops.py",),
        ("a training set that fits is held cut", "0 if center_crop else memory_limit", "memory_limit"),
    ),
    *within(
        "data",
        "batchkern/data/labels.py",
        ("tests/data/test_labels.py",),
        (
            "clean classes are matched by their places, not by their names",
            "return torch.tensor([names.index(key) for key in own])[clean]",
            "return clean",
        ),
        ("a missing label is the first class", ".fill_null(-1)", ".fill_null(0)"),
        ("the number of a row is taken for its class", "if len(usable) == 1 and not named", "if len(usable) == 1"),
    ),
    *within(
        "data",
        "batchkern/data/sources.py",
        ("tests/data/test_sources.py",),
        ("the digest has no head", "file.read(piece), digest_size", "b'', digest_size"),
        ("the digest has no tail", "        digest.update(file.read())\n", ""),
    ),
    *within(
        "data",
        "batchkern/data/folders.py",
        ("tests/data/test_sources.py",),
        ("a pipe is read as an image", "if not _is(entry.is_file):", "if False:"),
        (
            "a link that leads nowhere is left out",
            "if not folder and entry.is_symlink()",
            "if False and entry.is_symlink()",
        ),
    ),
]
