"""``batchkern reproduce``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from batchkern.cli._compare import check_runs, print_run
from batchkern.cli._options import AmpOption, DeviceOption, OverwriteOption, argument, option
from batchkern.cli._streams import visible
from batchkern.cli._tables import make_table, print_tables
from batchkern.compare import Comparison, run
from batchkern.configure import check_range
from batchkern.data import load_pair
from batchkern.errors import UserError
from batchkern.recipes import (
    LEAST_BATCHES,
    LEFT_OUT,
    OVER_BATCHES,
    RECIPES,
    Recipe,
    beside,
    comparison_arguments,
    find,
    measured,
    scaled,
)
from batchkern.schedules import step

if TYPE_CHECKING:
    from rich.table import Table


def reproduce(
    name: Annotated[str | None, argument(help="a recipe, such as trimming/cifar10-resnet34")] = None,
    listed: Annotated[bool, option("--list", help="show all recipes, and which published rows cannot be run")] = False,
    data: Annotated[str | None, option(help="training data in place of the published set, as for train")] = None,
    test: Annotated[str | None, option(help="test data; default: those of the training data")] = None,
    passive: Annotated[str | None, option(help="data to inject in place of the published set")] = None,
    scale: Annotated[
        float,
        option(
            help="in (0, 1]: epochs and training rows are each multiplied by it, but no fewer than the strategy needs "
            f"(rows: {LEAST_BATCHES} batches and one a class); not comparable with the paper below 1"
        ),
    ] = 1.0,
    seeds: Annotated[int | None, option(help="runs of each arm; default: the recipe's")] = None,
    jobs: Annotated[int | None, option(help="runs side by side; default: CPU cores, or 1 on a GPU")] = None,
    device: DeviceOption = None,
    amp: AmpOption = "none",
    out: Annotated[Path | None, option(help="default: runs/reproduce-<recipe>")] = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[bool, option("--resume", help="go on with the runs in --out that have not ended")] = False,
) -> None:
    """Rerun a row of one of the five papers' tables: the baseline, the strategy, and its random control.

    Published and measured figures are shown side by side. Published data sets come from the Hugging Face hub; a
    network of timm needs timm.
    """
    if listed:
        print_tables(recipes_table(), left_out_table())
        return
    if name is None:
        raise UserError("name a recipe, such as trimming/cifar10-resnet34; batchkern reproduce --list shows all")
    published = find(name)
    check_range("scale", scale, 0, 1, open_low=True)
    recipe = replace(
        published,
        data=data or published.data,
        passive=passive or published.passive,
        seeds=published.seeds if seeds is None else seeds,
    )
    print(description(recipe), flush=True)
    rows, warning = None, _other_data(published, recipe)
    if scale != 1:
        train, _ = load_pair(recipe.data, test, image_size=recipe.image_size)
        recipe, rows = scaled(recipe, scale, len(train), len(train.classes))
        size = f"{recipe.training.epochs} epochs of {rows:,} training rows"
        warning.append(f"NOT COMPARABLE WITH THE PAPER: at scale {scale:g} these are {size}.")
    print("", *warning, sep="\n", flush=True)
    arguments = comparison_arguments(
        recipe,
        out=out or Path("runs", "reproduce-" + name.replace("/", "-")),
        test=test,
        train_rows=rows,
        amp=amp,
        device=device,
        overwrite=overwrite,
        resume=resume,
    )
    results = run(Comparison(**arguments), jobs=jobs, report=print_run)
    print_tables(side_by_side(recipe, results))
    if any(published.published.intervals):
        print("", OVER_BATCHES, sep="\n")
    print("", verdict(recipe, results), *warning, sep="\n")
    print(f"in {visible(arguments['out'])}: the results in full, and a directory for each run")
    check_runs(results)


def _other_data(published: Recipe, recipe: Recipe) -> list[str]:
    pairs = ((recipe.data, published.data), (recipe.passive, published.passive))
    return [f"Comparable with the paper only if {own} is {its}." for own, its in pairs if own != its]


# --- what is shown ---------------------------------------------------------------------------------------------------


def recipes_table() -> Table:
    table = make_table("recipe", "of", "network", "data", "epochs", "seeds", "published: baseline -> strategy")
    for recipe in RECIPES.values():
        data = recipe.data if recipe.passive is None else f"{recipe.data}, injected: {recipe.passive}"
        source = f"{recipe.paper.split(',')[0]}, {recipe.table}"
        training = recipe.training
        table.add_row(
            recipe.name, source, recipe.model, data, str(training.epochs), str(recipe.seeds), published_figures(recipe)
        )
    return table


def left_out_table() -> Table:
    table = make_table("not to be run", "rows", "why")
    for rows in LEFT_OUT:
        table.add_row(rows.paper.split(",")[0], rows.rows, rows.reason)
    return table


def published_figures(recipe: Recipe) -> str:
    """Both cells of the table as the paper has them."""
    figures = recipe.published
    pairs = zip((figures.baseline, figures.method), figures.intervals)
    baseline, method = (f"{value:g}{_half(half)}" for value, half in pairs)
    return f"{figures.metric} {baseline} -> {method} %"


def description(recipe: Recipe) -> str:
    """All settings of a recipe, and what was chosen where its paper is silent."""
    training = recipe.training
    lines = [
        f"{recipe.name}: {recipe.paper}, {recipe.table}",
        f"published  test {published_figures(recipe)}",
        f"strategy   {recipe.strategy}",
        f"data       {recipe.data}, {recipe.image_size} x {recipe.image_size} pixels, augmentation: {training.augment}",
        *([f"injected   {recipe.passive}"] if recipe.passive else []),
        f"network    {recipe.model}",
        f"optimizer  {training.optimizer}, lr {training.lr:g}, momentum {training.momentum:g}, "
        f"weight decay {training.weight_decay:g}, {schedule_text(recipe)}",
        f"training   {training.epochs} epochs, batches of {training.batch_size}, {recipe.seeds} seeds",
        "chosen, where the paper leaves it open:",
        *(f"  - {sentence}" for sentence in recipe.chosen),
    ]
    return "\n".join(lines)


def schedule_text(recipe: Recipe) -> str:
    """The schedule by its epochs."""
    schedule = recipe.training.schedule
    if not isinstance(schedule, step):
        return f"{schedule} rate"
    epochs = ", ".join(f"{recipe.training.epochs * milestone:g}" for milestone in schedule.milestones)
    return f"rate times {schedule.gamma:g} at epochs {epochs}"


def side_by_side(recipe: Recipe, results: dict[str, Any]) -> Table:
    """Published beside measured: baseline, strategy, difference; then what the paper does not have."""
    published, found = recipe.published, measured(recipe, results)
    table = make_table(f"test {published.metric} (%)", "published", "measured", numbers=True)
    figures = ("baseline", published.baseline), (recipe.strategy, published.method)
    for (arm, value), half in zip(figures, published.intervals):
        table.add_row(arm, _figure(value, half), _figure(*found.get(arm, (None, None))))
    mean, half = found.get("difference", (None, None))
    table.add_row("difference", f"{published.difference:+.2f}", _figure(mean, half, "+"))
    for arm, figure in found.items():
        if arm not in ("baseline", recipe.strategy, "difference"):
            table.add_row(arm, "-", _figure(*figure))
    for row in beside(recipe, results):
        table.add_row(*row)
    return table


def _figure(value: float | None, half: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}{_half(half, '.2f')}"


def _half(half: float | None, digits: str = "g") -> str:
    return "" if half is None else f" ± {half:{digits}}"


def verdict(recipe: Recipe, results: dict[str, Any]) -> str:
    """Whether the published difference lies within the measured interval, and whether zero does."""
    mean, half = measured(recipe, results).get("difference", (None, None))
    if mean is None or half is None:
        return "There is no interval of the measured difference: it takes two seeds whose runs all end."
    low, high = mean - half, mean + half
    lies = "lies" if low <= recipe.published.difference <= high else "does not lie"
    zero = " Zero lies within it: these runs do not tell an effect from chance." if low <= 0 <= high else ""
    return (
        f"The published difference, {recipe.published.difference:+.2f} points, {lies} within the 95 % interval of the "
        f"measured one, [{low:+.2f}, {high:+.2f}] (Student's t, paired by seed).{zero}"
    )
