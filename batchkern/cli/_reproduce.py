"""``batchkern reproduce``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from batchkern.cli._compare import check_runs, print_run
from batchkern.cli._options import AmpOption, DeviceOption, OverwriteOption, WeightsOption, argument, option
from batchkern.cli._streams import visible
from batchkern.cli._tables import make_table, print_tables
from batchkern.compare import RESULTS, Comparison, run
from batchkern.data import load_pair
from batchkern.errors import UserError
from batchkern.files import slug, write_file
from batchkern.initial_weights import PRETRAINED
from batchkern.recipes import (
    LEAST_BATCHES,
    LEFT_OUT,
    OVER_BATCHES,
    RECIPES,
    TABLES,
    Recipe,
    beside,
    comparison_arguments,
    grouped,
    measured,
    passive_of,
    scaled,
    select,
)
from batchkern.recipes.reproduction import (
    FILE,
    HEADINGS,
    cells,
    check_replaceable,
    record,
    reproduction,
    tally,
    with_half,
)
from batchkern.schedules import step
from batchkern.validation import check_range

if TYPE_CHECKING:
    from rich.table import Table


def reproduce(
    name: Annotated[
        str | None,
        argument(help="a recipe, such as trimming/cifar10-resnet34, a table, such as trimming/table-1, or 'passive/*'"),
    ] = None,
    listed: Annotated[
        bool, option("--list", help="show all tables and recipes, and which published rows cannot be run")
    ] = False,
    data: Annotated[str | None, option(help="training data instead of the published set, as for train")] = None,
    test: Annotated[str | None, option(help="test data; default: the test split of the training data")] = None,
    passive: Annotated[str | None, option(help="data to inject instead of the published set")] = None,
    scale: Annotated[
        float,
        option(
            help="in (0, 1]: epochs and training rows are each multiplied by it, but no fewer than the strategy needs "
            f"(rows: {LEAST_BATCHES} batches and one a class); not comparable with the paper below 1"
        ),
    ] = 1.0,
    seeds: Annotated[int | None, option(help="runs of each arm; default: the recipe's")] = None,
    jobs: Annotated[int | None, option(help="number of parallel runs; default: CPU cores, or one per GPU")] = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    amp: AmpOption = "none",
    out: Annotated[Path | None, option(help="default: runs/reproduce-<name>")] = None,
    overwrite: OverwriteOption = False,
    resume: Annotated[bool, option("--resume", help="continue the runs in --out that are not finished")] = False,
) -> None:
    """Rerun rows of the five papers' tables, or a whole table: the baseline, the strategies, their random controls.

    Rows that differ only in the strategy share their baseline. Published and measured figures are shown side by
    side. Published data sets come from the Hugging Face hub; a network of timm needs timm.
    """
    if listed:
        print_tables(tables_table(), recipes_table(), left_out_table())
        return
    if name is None:
        raise UserError(
            "name a recipe or a table, such as trimming/cifar10-resnet34 or trimming/table-1; batchkern reproduce "
            "--list shows all"
        )
    chosen = select(name)
    check_range("scale", scale, 0, 1, open_low=True)
    _check_one("data", data, [recipe.data for recipe in chosen], name)
    _check_one("test", test, [recipe.data for recipe in chosen], name)
    _check_one("passive", passive, [recipe.passive for recipe in chosen], name)
    groups = grouped(
        replace(
            recipe,
            data=data or recipe.data,
            passive=recipe.passive and (passive or recipe.passive),
            seeds=recipe.seeds if seeds is None else seeds,
            training=recipe.training if weights is None else replace(recipe.training, weights=weights),
        )
        for recipe in chosen
    )
    out = out or Path("runs", "reproduce-" + slug(name))
    places = [out] if len(groups) == 1 else [out / slug(group[0].name) for group in groups]
    print("\n\n".join(map(description, groups)), flush=True)
    warning = _other_data(chosen, groups)
    kept: list[int | None] = [None] * len(groups)
    for place, group in enumerate(groups):
        if scale * group[0].share < 1:
            first = group[0]
            train, _ = load_pair(first.data, test, image_size=first.image_size, center_crop=first.center_crop)
            groups[place], kept[place] = scaled(group, scale, len(train), len(train.classes))
    if scale < 1:
        warning.append(_not_comparable(scale, groups, kept))
    print("", *warning, sep="\n", flush=True)
    comparisons = [
        Comparison(
            **comparison_arguments(
                group,
                out=place,
                test=test,
                train_rows=rows,
                amp=amp,
                device=device,
                overwrite=overwrite,
                resume=resume,
            )
        )
        for group, place, rows in zip(groups, places, kept, strict=True)
    ]
    check_replaceable(out / FILE, name, overwrite=overwrite, resume=resume)
    if len(groups) > 1:
        _check_places(places, overwrite=overwrite, resume=resume)
    found = [run(comparison, jobs=jobs, report=print_run) for comparison in comparisons]
    rows = [reproduction(group, results) for group, results in zip(groups, found, strict=True)]
    write_file(out / FILE, record(name, scale, amp, rows, found[0]["environment"]))
    if len(chosen) == 1:
        print_tables(side_by_side(groups[0][0], found[0]))
    else:
        print_tables(*several(groups, found, rows))
    if any(any(recipe.published.intervals) for recipe in chosen):
        print("", OVER_BATCHES, sep="\n")
    conclusion = verdict(groups[0][0], found[0]) if len(chosen) == 1 else tally(rows)
    print("", conclusion, *warning, sep="\n")
    print(f"in {visible(out)}: these figures in {FILE}, the results in full, and a directory for each run")
    for results in found:
        check_runs(results)


def _check_one(option: str, given: str | None, published: list[str | None], name: str) -> None:
    """Rejects a data set given in place of several published sets, or of none."""
    sets = list(dict.fromkeys(filter(None, published)))
    if given is not None and not sets:
        raise UserError(f"--{option} is {given}, but no row of {name} injects a data set: leave it out")
    if given is not None and len(sets) > 1:
        raise UserError(
            f"--{option} is {given}, but {name} has the data sets {', '.join(sets)}; name rows of one of them, as in "
            "'trimming/cifar10-*'"
        )


def _check_places(places: list[Path], *, overwrite: bool, resume: bool) -> None:
    """Checks that no directory is in use, before the first of several comparisons starts."""
    taken = [place for place in places if (place / RESULTS).exists()]
    if taken and not (overwrite or resume):
        raise UserError(f"{taken[0]} already holds a comparison; resume it, overwrite it, or give another directory")


def _other_data(published: Sequence[Recipe], groups: Sequence[Sequence[Recipe]]) -> list[str]:
    own = [recipe for group in groups for recipe in group]
    by_name = {recipe.name: recipe for recipe in own}
    pairs = [(by_name[recipe.name], recipe) for recipe in published]
    sets = [(a.data, b.data) for a, b in pairs] + [(a.passive, b.passive) for a, b in pairs]
    warning = [f"Comparable with the paper only if {own} is {its}." for own, its in dict.fromkeys(sets) if own != its]
    begun = dict.fromkeys((_beginning(a), _beginning(b)) for a, b in pairs if _beginning(a) != _beginning(b))
    warning += [f"Comparable with the paper only with {its}: these begin with {given}." for given, its in begun]
    return warning


def _beginning(recipe: Recipe) -> str:
    """The initial weights of its networks, in words."""
    weights = recipe.training.weights
    names: dict[object, str] = {None: "random weights", PRETRAINED: "the weights that timm has"}
    return names.get(weights, f"those of {weights}")


def _epochs(group: Sequence[Recipe]) -> str:
    epochs = group[0].training.epochs
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def _not_comparable(scale: float, groups: Sequence[Sequence[Recipe]], kept: Sequence[int | None]) -> str:
    sizes = dict.fromkeys(
        f"{_epochs(group)} of {rows:,} training rows" for group, rows in zip(groups, kept, strict=True)
    )
    return f"NOT COMPARABLE WITH THE PAPER: at scale {scale:g} these are {', '.join(sizes)}."


# --- what is shown ---------------------------------------------------------------------------------------------------


def tables_table() -> Table:
    table = make_table("table", "of", "rows", "comparisons", "data")
    for name, recipes in TABLES.items():
        data = dict.fromkeys(recipe.data for recipe in recipes)
        paper = recipes[0].paper.split(",")[0]
        table.add_row(name, paper, str(len(recipes)), str(len(grouped(recipes))), ", ".join(data))
    return table


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
    """Both figures of the row, as in the paper."""
    figures = recipe.published
    pairs = zip((figures.baseline, figures.method), figures.intervals)
    baseline, method = (with_half(pair, digits="g") for pair in pairs)
    return f"{figures.metric} {baseline} -> {method} %"


def description(group: Sequence[Recipe]) -> str:
    """All settings of the recipes of a group, and the choices for settings that the paper does not give."""
    recipe = group[0]
    training = recipe.training
    lines = []
    for row in group:
        lines += [
            f"{row.name}: {row.paper}, {' and '.join((row.table, *row.also))}",
            f"published  test {published_figures(row)}",
            f"strategy   {row.strategy}",
        ]
    share = f"{recipe.share:.1%} of the training images of " if recipe.share < 1 else ""
    cut = " of the centre" if recipe.center_crop else ""
    lines += [
        f"data       {share}{recipe.data}, {recipe.image_size} x {recipe.image_size} pixels{cut}, augmentation: "
        f"{training.augment}",
        *([f"injected   {passive_of(group)}"] if passive_of(group) else []),
        f"network    {recipe.model}, begins with {_beginning(recipe)}",
        f"optimizer  {training.optimizer}, lr {training.lr:g}, momentum {training.momentum:g}, "
        f"weight decay {training.weight_decay:g}, {schedule_text(recipe)}",
        f"training   {training.epochs} epochs, batches of {training.batch_size}, {recipe.seeds} seeds",
        "chosen, where the paper leaves it open:",
        *(f"  - {sentence}" for sentence in dict.fromkeys(line for row in group for line in row.chosen)),
    ]
    return "\n".join(lines)


def schedule_text(recipe: Recipe) -> str:
    """The schedule in words, with its epochs."""
    schedule = recipe.training.schedule
    if not isinstance(schedule, step):
        return f"{schedule} rate"
    epochs = ", ".join(f"{recipe.training.epochs * milestone:g}" for milestone in schedule.milestones)
    return f"rate times {schedule.gamma:g} at epochs {epochs}"


def several(
    groups: Sequence[Sequence[Recipe]], found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[Table]:
    """All rows; then further figures of the papers."""
    metrics = dict.fromkeys(group["metric"] for group in rows)
    main = make_table(f"recipe (test {', '.join(metrics)}, %)", *HEADINGS[1:], numbers=True)
    for cells_of_row in cells(rows):
        main.add_row(*cells_of_row)
    more = make_table("beside", "published", "measured", numbers=True)
    for group, results in zip(groups, found, strict=True):
        for recipe in group:
            for name, published, own in beside(recipe, results):
                more.add_row(f"{recipe.name}: {name}", published, own)
    return [main, more] if more.row_count else [main]


def side_by_side(recipe: Recipe, results: dict[str, Any]) -> Table:
    """Published and measured figures: baseline, strategy, difference; then figures that the paper does not have."""
    published, found = recipe.published, measured(recipe, results)
    table = make_table(f"test {published.metric} (%)", "published", "measured", numbers=True)
    figures = ("baseline", published.baseline), (recipe.strategy, published.method)
    for (arm, value), half in zip(figures, published.intervals):
        table.add_row(arm, with_half((value, half)), with_half(found.get(arm)))
    table.add_row("difference", f"{published.difference:+.2f}", with_half(found.get("difference"), sign="+"))
    for arm, figure in found.items():
        if arm not in ("baseline", recipe.strategy, "difference"):
            table.add_row(arm, "-", with_half(figure))
    for row in beside(recipe, results):
        table.add_row(*row)
    return table


def verdict(recipe: Recipe, results: dict[str, Any]) -> str:
    """Whether the published difference lies within the measured interval, and whether zero does."""
    mean, half = measured(recipe, results).get("difference", (None, None))
    if mean is None or half is None:
        return "There is no interval for the measured difference: it needs two seeds whose runs all end."
    low, high = mean - half, mean + half
    lies = "lies" if low <= recipe.published.difference <= high else "does not lie"
    zero = " Zero lies within it: these runs do not tell an effect from chance." if low <= 0 <= high else ""
    return (
        f"The published difference, {recipe.published.difference:+.2f} points, {lies} within the 95 % interval of the "
        f"measured one, [{low:+.2f}, {high:+.2f}] (Student's t, paired by seed).{zero}"
    )
