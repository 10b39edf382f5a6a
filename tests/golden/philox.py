"""The random numbers of ``augment_latent`` in plain Python integers, and ``philox.json``, which is made from them.

Every backend is tested against this file or against the JSON: run it as a script to write the JSON again.
Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and its Random123 library.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_suffix(".json")

# kat_vectors of Random123: counter, key, words.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 10) -> tuple[int, ...]:
    a, b, c, d = counter
    left, right = key
    for _ in range(rounds):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # Python integers hold all 64 bits
        a, b, c, d = (second >> 32) ^ b ^ left, second % 2**32, (first >> 32) ^ d ^ right, first % 2**32
        left, right = (left + 0x9E3779B9) % 2**32, (right + 0xBB67AE85) % 2**32
    return a, b, c, d


def quad(seed: int, row: int, column: int) -> tuple[int, ...]:
    """The four words of the counter that serves ``column``; ``seed`` is a signed 64-bit integer."""
    unsigned = seed % 2**64
    return philox4x32((row % 2**32, row >> 32, column // 4, 0), (unsigned % 2**32, unsigned >> 32))


def word(seed: int, row: int, column: int) -> int:
    return quad(seed, row, column)[column % 4]


def kept(seed: int, row: int, column: int, drop_prob: float) -> bool:
    """Whether a dropout copy keeps the element."""
    return word(seed, row, column) >= round(drop_prob * 2**32)


def normal(seed: int, row: int, column: int) -> float:
    words = quad(seed, row, column)
    pair = column % 4 // 2 * 2
    radius, angle = ((words[pair + i] // 512 + 0.5) / 2**23 for i in (0, 1))
    wave = math.sin if column % 2 else math.cos
    return math.sqrt(-2 * math.log(radius)) * wave(2 * math.pi * angle)


def vectors() -> dict[str, Any]:
    """The content of ``philox.json``."""
    seeds = (0, 1, -1, 42, 0x123456789ABCDEF, 2**63 - 1, -(2**63))
    places = ((0, 0), (1, 0), (127, 3), (2**31, 0), (2**32 - 1, 5), (2**32, 0), (2**40 + 3, 1), (7, 65533))
    draws = []
    for seed in seeds:
        for row, start in places:
            columns = range(start, start + 6)
            draws.append(
                {
                    "seed": seed,
                    "row": row,
                    "first_column": start,
                    "words": [word(seed, row, column) for column in columns],
                    "kept_at_drop_prob_0.3": [int(kept(seed, row, column, 0.3)) for column in columns],
                    "normals": [normal(seed, row, column) for column in columns],
                }
            )
    answers = [{"counter": c, "key": k, "words": w} for c, k, w in KNOWN_ANSWERS]
    return {"known_answers": answers, "draws": draws}


if __name__ == "__main__":
    content = vectors()
    # One draw a line: readable, and a difference shows where it is.
    blocks = [
        f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for name, entries in content.items()
    ]
    PATH.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
