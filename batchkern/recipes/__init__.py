"""The tables of the five papers as comparisons to rerun: a recipe for each row that sets a strategy beside the
baseline."""

from __future__ import annotations

import difflib
import fnmatch

from batchkern.errors import UserError
from batchkern.recipes import augmentation, hard_batches, passive, stepwise, trimming
from batchkern.recipes.base import (
    LEAST_BATCHES,
    OVER_BATCHES,
    LeftOut,
    Published,
    Recipe,
    Training,
    comparison_arguments,
    grouped,
    passive_of,
    scaled,
    table_name,
)
from batchkern.recipes.reproduction import beside, measured

__all__ = [
    "LEAST_BATCHES",
    "LEFT_OUT",
    "OVER_BATCHES",
    "RECIPES",
    "TABLES",
    "LeftOut",
    "Published",
    "Recipe",
    "Training",
    "beside",
    "comparison_arguments",
    "grouped",
    "measured",
    "passive_of",
    "scaled",
    "select",
    "table_name",
]

_PAPERS = (trimming, hard_batches, stepwise, augmentation, passive)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for paper in _PAPERS for recipe in paper.RECIPES}
TABLES: dict[str, tuple[Recipe, ...]] = {
    name: tuple(recipe for recipe in RECIPES.values() if name in recipe.tables)
    for paper in _PAPERS
    for name in sorted({name for recipe in paper.RECIPES for name in recipe.tables})
}
"""The rows of each table, by names such as passive/table-2."""
LEFT_OUT: tuple[LeftOut, ...] = tuple(rows for paper in _PAPERS for rows in paper.LEFT_OUT)


def select(name: str) -> tuple[Recipe, ...]:
    """The recipes that a name stands for: one of them, a table of :data:`TABLES`, or a pattern of
    the shell such as passive/svhn-*.

    Raises:
        UserError: there is none; the sentence lists near ones.
    """
    if name in TABLES:
        return tuple(RECIPES[recipe.name] for recipe in TABLES[name])
    found = tuple(RECIPES[key] for key in fnmatch.filter(RECIPES, name)) if set(name) & set("*?[") else ()
    if name in RECIPES or found:
        return found or (RECIPES[name],)
    near = difflib.get_close_matches(name, [*RECIPES, *TABLES], n=4, cutoff=0.5)
    hint = f"; near matches: {', '.join(near)}" if near else ""
    raise UserError(f"there is no recipe and no table {name!r}{hint}; batchkern reproduce --list shows all")
