"""``batchkern analyse``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

from batchkern.analysis import analyse as analysis_of
from batchkern.analysis import read_results, write_analysis
from batchkern.cli._compare import filled
from batchkern.cli._options import OverwriteOption, argument, option
from batchkern.cli._streams import visible
from batchkern.cli._tables import print_tables
from batchkern.errors import UserError


def analyse(
    file: Annotated[Path, argument(help="comma-separated values: a line for each run, with columns arm and seed")],
    metric: Annotated[
        list[str] | None, option(help="a column; may be given several times; default: test_accuracy, or all")
    ] = None,
    baseline: Annotated[str, option(help="the arm with which the others are compared")] = "baseline",
    control: Annotated[
        list[str] | None, option(help='"sam=random": a second arm to compare an arm with; may be given several times')
    ] = None,
    lower: Annotated[
        list[str] | None, option(help="a metric for which lower is better, as for losses, errors and seconds")
    ] = None,
    higher: Annotated[list[str] | None, option(help="a metric for which higher is better, despite its name")] = None,
    out: Annotated[Path | None, option(help="write a page of HTML, plots and JSON into this folder")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare results of any trainings: paired by seed, with intervals and corrected tests.

    Required columns are arm, seed and one for each metric; data, cost, steps, budget, control and error are optional.
    Several lines of a run are its curve over cost or steps, and so are columns such as accuracy[100].
    """
    results = read_results(file, metric or ())
    arms = {run.arm for run in results.runs}
    controls = dict(_pair(text, arms) for text in control or [])
    found = analysis_of(results, baseline=baseline, controls=controls, lower=lower or (), higher=higher or ())
    written = write_analysis(found, out, file.name, overwrite=overwrite) if out is not None else []
    for table in found.tables:
        print(f"{visible(table.title)}:\n")
        print_tables(filled(table.effects), filled(table.usage))
        print("\n" + "\n".join(visible(sentence) for sentence in table.verdict) + "\n")
    print("\n".join(textwrap.fill(visible(note), 118) for note in found.notes))
    if out is not None:
        print(f"in {visible(out)}: {'  '.join(written)}")


def _pair(text: str, arms: set[str]) -> tuple[str, str]:
    """An arm and its control, from a text arm=control; names may also contain equals signs."""
    words = text.split("=")
    cuts = [("=".join(words[:place]), "=".join(words[place:])) for place in range(1, len(words))]
    fits = [(arm, other) for arm, other in cuts if arm in arms and other in arms]
    if len(fits) != 1:
        raise UserError(f"control must be of the form arm=control, both of {', '.join(sorted(arms))}, got {text!r}")
    return fits[0]
