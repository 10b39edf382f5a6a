"""The tables of the five papers as comparisons to rerun: a recipe for each row that sets a strategy beside the
baseline."""

from __future__ import annotations

import difflib

from batchkern.errors import UserError
from batchkern.recipes import augmentation, hard_batches, passive, stepwise, trimming
from batchkern.recipes.base import (
    LEAST_BATCHES,
    OVER_BATCHES,
    LeftOut,
    Published,
    Recipe,
    Training,
    beside,
    comparison_arguments,
    measured,
    scaled,
)

__all__ = [
    "LEAST_BATCHES",
    "LEFT_OUT",
    "OVER_BATCHES",
    "RECIPES",
    "LeftOut",
    "Published",
    "Recipe",
    "Training",
    "beside",
    "comparison_arguments",
    "find",
    "measured",
    "scaled",
]

_PAPERS = (trimming, hard_batches, stepwise, augmentation, passive)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for paper in _PAPERS for recipe in paper.RECIPES}
LEFT_OUT: tuple[LeftOut, ...] = tuple(rows for paper in _PAPERS for rows in paper.LEFT_OUT)


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none; the sentence lists near ones.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=4, cutoff=0.5)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise UserError(f"there is no recipe {name!r}{hint}; batchkern reproduce --list shows all")
    return RECIPES[name]
