"""``batchkern reproduce``: what it shows, what it trains, and what it refuses."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import commands
import pytest
from training import single_thread

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("datasets")

from batchkern import cli
from batchkern.cli import _reproduce
from batchkern.data import load_pair, sources
from batchkern.recipes import LEFT_OUT, RECIPES, TABLES, beside

one_thread = single_thread()
SETTINGS = {"train": {"rows": 9}, "test": {"name": "digits"}}


@pytest.fixture
def batchkern(tmp_path, monkeypatch):
    """Runs ``batchkern reproduce`` in a directory of the test's own: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return partial(commands.run, "reproduce")


@pytest.fixture
def tiny(monkeypatch):
    """A recipe for digits: a published one with a cheap network, few epochs and other data."""
    published = RECIPES["passive/cifar10-resnet56"]
    training = replace(published.training, epochs=4, batch_size=128)
    recipe = replace(published, model="cnn", image_size=8, training=training, strategy="passive(every=5)")
    monkeypatch.setitem(RECIPES, published.name, recipe)
    return recipe


@pytest.fixture
def planned(monkeypatch):
    """What would be compared and how, in place of comparing it."""
    asked = []

    def run(comparison, **options):
        comparison["out"].mkdir(parents=True)
        asked.append(comparison | options)
        return {"summary": [], "runs": [], "settings": SETTINGS, "environment": {}}

    monkeypatch.setattr(_reproduce, "Comparison", dict)
    monkeypatch.setattr(_reproduce, "run", run)
    return asked


def refused(batchkern, words, *patterns):
    status, out, err = batchkern(*words)
    assert status == 2, (status, out, err)
    assert re.fullmatch(r"batchkern: error: [^\n]+\n", err), err
    for pattern in patterns:
        assert re.search(pattern, err), err
    return out


def summary(recipe, difference, half_width):
    figures = [{"mean": 0.80, "half_width": 0.005}, {"mean": 0.80 + difference, "half_width": half_width}]
    paired = {"baseline": {"mean": difference, "half_width": half_width}}
    return {
        "summary": [
            {"arm": "baseline", "test_accuracy": figures[0], "difference": {}},
            {"arm": recipe.strategy, "test_accuracy": figures[1], "difference": paired},
            {"arm": "random(select=rows)", "test_accuracy": figures[0], "difference": {}},
        ]
    }


# --- lists and descriptions ------------------------------------------------------------------------------------------


def test_list_shows_every_recipe_and_every_row_left_out(batchkern):
    status, out, err = batchkern("--list")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if "/" in line.split(" ")[0]}
    assert set(lines) == {*RECIPES, *TABLES}
    assert re.search(
        r"passive/table-2 +Singh et al. 2020 +18 +6 +uoft-cs/cifar10, uoft-cs/cifar100 *$", out, re.MULTILINE
    )
    line = lines["hard-batches/stl10-resnet18-0.5"]
    for part in ("Table 5", "resnet18", "tanganke/stl10", " 100 ", " 5 ", "accuracy 50 ± 1.5 -> 49.5 ± 1.6 %"):
        assert part in line
    assert "error 17.43 -> 17.01 %" in lines["trimming/cifar10-resnet34"]
    assert "injected: tanganke/gtsrb" in lines["passive/cifar10-resnet56-gtsrb"]
    for rows in LEFT_OUT:
        assert any(rows.rows in line and rows.reason in line for line in out.splitlines())


@pytest.mark.parametrize("name", ["trimming/svhn-resnet34", "passive/imagenet-resnet50"])
def test_a_recipe_is_printed_in_full(name):
    recipe = RECIPES[name]
    text = _reproduce.description([recipe])
    for part in (name, recipe.table, recipe.data, recipe.model, recipe.strategy, recipe.passive or "", *recipe.chosen):
        assert part in text


def test_settings_are_told_as_a_paper_does():
    text = _reproduce.description([RECIPES["passive/cifar10-resnet56"]])
    assert "sgd, lr 0.1, momentum 0.9, weight decay 0.0005, rate times 0.2 at epochs 50, 100, 150, 200\n" in text
    assert "250 epochs, batches of 128, 5 seeds\n" in text
    assert "uoft-cs/cifar10, 32 x 32 pixels, augmentation: crop+flip\n" in text
    assert "constant rate\n" in _reproduce.description([RECIPES["hard-batches/stl10-resnet18-0.5"]])


def test_help_has_every_option(batchkern):
    status, out, _ = batchkern("--help")
    assert status == 0
    names = set(inspect.signature(cli.reproduce).parameters) - {"name", "listed"} | {"list"}
    assert all(f"--{name} " in out for name in names)
    assert "epochs and training rows" in " ".join(out.split())


# --- what it trains --------------------------------------------------------------------------------------------------


def test_reproduces_a_recipe_on_other_data(batchkern, tiny, tmp_path):
    words = f"{tiny.name} --data digits --passive photo-patches --scale 0.5 --seeds 2 --jobs 1 --out there".split()
    status, out, err = batchkern(*words)
    assert status == 0, err
    # First the recipe, then the warnings, then the figures, then the warnings again.
    order = ("chosen, where", "NOT COMPARABLE", "(%)", "The published difference")
    places = [*(out.index(part) for part in order), out.rindex("NOT COMPARABLE")]
    assert places == sorted(set(places)), out
    assert "at scale 0.5 these are 2 epochs of 1,280 training rows" in out  # ten batches
    assert out.count("Comparable with the paper only if digits is uoft-cs/cifar10.") == 2
    assert out.count("only if photo-patches is ufldl-stanford/svhn:cropped_digits.") == 2
    number = r"\d+\.\d\d ± \d+\.\d\d"
    assert re.search(rf"^baseline +93\.40 +{number} *$", out, re.MULTILINE)
    assert re.search(rf"^passive\(every=5\) +94\.40 +{number} *$", out, re.MULTILINE)
    assert re.search(r"^difference +\+1\.00 +[+-]\d+\.\d\d ± \d+\.\d\d *$", out, re.MULTILINE)
    assert re.search(r"\+1\.00 points, (lies|does not lie) within .* \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]", out)
    assert len(re.findall(r"(baseline|passive\(every=5\)), 2 epochs, seed [01]: test accuracy", err, re.MULTILINE)) == 4
    assert (tmp_path / "there" / "baseline" / "2-epochs" / "seed-1").is_dir()
    # What is there is not replaced unless asked for.
    refused(batchkern, words, "there/reproduction.json holds the reproduction of passive/cifar10-resnet56 already")
    (tmp_path / "there" / "reproduction.json").unlink()
    refused(batchkern, words, "there already holds a comparison")


@pytest.fixture
def table(tiny, monkeypatch):
    """A table of three rows: two that share their baseline, and one that trains more slowly."""
    rows = tiny, replace(tiny, name="passive/twice", strategy="passive(every=2)")
    rows = *rows, replace(tiny, name="passive/slow", training=replace(tiny.training, lr=0.001))
    for recipe in rows:
        monkeypatch.setitem(RECIPES, recipe.name, recipe)
    monkeypatch.setitem(TABLES, "passive/table-9", rows)
    return rows


def test_reproduces_a_table(batchkern, table, tmp_path):
    options = "--data digits --passive photo-patches --scale 0.1 --seeds 2 --jobs 1 --out there"
    words = ["passive/table-9", *options.split()]
    status, out, err = batchkern(*words)
    assert status == 0, err
    number, line = r"-?\d+\.\d\d ± \d+\.\d\d", r"\(cnn, digits\) +baseline +93.4 +{0} +- +- *\n"
    for recipe, every in (("cifar10-resnet56", 5), ("twice", 2)):
        line += rf"passive/{recipe} +passive\(every={every}\) +94.4 +{{0}} +\+1.00 +[+]?{{0}} *\n"
    line += r"\(cnn, digits\) +baseline +93.4 +{0} +- +- *\npassive/slow +passive\(every=5\) +94.4 +{0} +\+1.00"
    assert re.search(line.replace("{0}", number).replace("{{0}}", number), out), out
    assert re.search(r"The published difference lies within .* in [0-3] of [23] rows, and zero in [0-3]: ", out), out
    assert len(re.findall(r"baseline, 1 epochs, seed [01]", err)) == 4  # of two comparisons
    kept = json.loads((tmp_path / "there" / "reproduction.json").read_bytes())
    assert (kept["name"], kept["scale"], [group["train_rows"] for group in kept["groups"]]) == (
        "passive/table-9",
        0.1,
        [1280, 1280],
    )
    results = json.loads((tmp_path / "there" / "passive-cifar10-resnet56" / "results.json").read_bytes())
    entry = next(entry for entry in results["summary"] if entry["arm"] == "passive(every=2)")
    row = next(row for row in kept["groups"][0]["rows"] if row["recipe"] == "passive/twice")
    assert row["measured"][0] == pytest.approx(100 * entry["test_accuracy"]["mean"])
    assert row["difference"] == pytest.approx(
        [100 * entry["difference"]["baseline"][name] for name in ("mean", "half_width")]
    )
    # Nothing is trained before all directories are known to be free.
    refused(batchkern, words, "there/reproduction.json holds the reproduction of passive/table-9 already; resume it")
    refused(batchkern, [table[0].name, *words[1:], "--resume"], "holds the reproduction of passive/table-9 already")
    (tmp_path / "there" / "reproduction.json").unlink()
    shutil.rmtree(tmp_path / "there" / "passive-cifar10-resnet56")
    refused(batchkern, words, "there/passive-slow already holds a comparison")
    assert not (tmp_path / "there" / "passive-cifar10-resnet56").exists()


def test_one_set_cannot_stand_for_several(batchkern):
    words = ("trimming/table-1", "--data", "digits")
    out = refused(
        batchkern, words, "--data is digits, but trimming/table-1 has the data sets .*svhn.*, .*cifar100; name"
    )
    assert out == ""
    words = ("trimming/table-1", "--test", "digits")
    assert refused(batchkern, words, "--test is digits, but trimming/table-1 has the data sets") == ""
    words = ("trimming/cifar10-*", "--passive", "digits")
    assert refused(batchkern, words, "--passive is digits, but no row of trimming/cifar10-. injects a data set") == ""
    words = ("passive/cifar10-resnet56*", "--passive", "digits")
    assert refused(batchkern, words, "--passive is digits, but .* has the data sets .*svhn.*, tanganke/gtsrb;") == ""


def test_other_weights_are_told(batchkern, tiny, planned, tmp_path):
    for file in ("mine", "pretrained"):  # a file of that name, not what timm has
        status, out, err = batchkern(tiny.name, "--weights", file, "--out", f"{file}-out")
        assert status == 0, err
        assert planned[-1]["training"]["weights"] == Path(file)
        assert f"network    cnn, begins with those of {file}\n" in out
        said = f"Comparable with the paper only with random weights: these begin with those of {file}."
        assert out.count(said) == 2


def test_rows_of_two_papers_have_a_directory_each(batchkern, planned):
    words = ("*/cifar10-vgg16-cifar", "--data", "digits", "--passive", "digits", "--out", "o")
    status, _, err = batchkern(*words)
    assert status == 0, err
    places = [str(asked["out"]) for asked in planned]
    assert places == ["o/augmentation-cifar10-vgg16-cifar", "o/passive-cifar10-vgg16-cifar"]


def test_an_output_that_is_a_file(batchkern, tiny, tmp_path):
    (tmp_path / "afile").write_text("mine")
    words = (tiny.name, "--data", "digits", "--passive", "digits", "--out", "afile")
    refused(batchkern, words, "afile (exists and is not|is not|cannot)")
    assert (tmp_path / "afile").read_text() == "mine"


def test_a_file_of_the_users_is_not_replaced(batchkern, tiny, tmp_path):
    (tmp_path / "there").mkdir()
    for text in ("{}", "[]", "mine"):
        (tmp_path / "there" / "reproduction.json").write_text(text)
        refused(batchkern, (tiny.name, "--out", "there"), "there/reproduction.json is there, and is not of a reprod")
        assert (tmp_path / "there" / "reproduction.json").read_text() == text


def test_options_reach_the_comparison(batchkern, tiny, planned):
    status, out, err = batchkern(
        tiny.name,
        "--seeds",
        3,
        "--jobs",
        2,
        "--device",
        "cpu",
        "--amp",
        "bf16",
        "--out",
        "o",
        "--resume",
        "--test",
        "t",
    )
    assert status == 0, err
    (asked,) = planned
    assert (asked["seeds"], asked["jobs"], asked["resume"], asked["overwrite"]) == (3, 2, True, False)
    assert (asked["training"]["device"], asked["training"]["amp"]) == ("cpu", "bf16")
    assert (str(asked["out"]), asked["test"], asked["train_rows"]) == ("o", "t", None)
    assert (asked["data"], asked["passive"]) == (tiny.data, tiny.passive)
    assert "comparable" not in out.lower()


def test_scale_reaches_the_comparison(batchkern, tiny, planned):
    status, _, err = batchkern(tiny.name, "--data", "digits", "--passive", "digits", "--scale", "0.95", "--overwrite")
    assert status == 0, err
    (asked,) = planned
    assert (asked["train_rows"], asked["training"]["epochs"]) == (round(0.95 * len(load_pair("digits")[0])), 4)
    assert (str(asked["out"]), asked["overwrite"]) == ("runs/reproduce-passive-cifar10-resnet56", True)
    assert (asked["data"], asked["passive"]) == ("digits", "digits")


# --- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "difference", "half_width", "sentence"),
    [
        # published: error 17.43 -> 17.01
        ("trimming/cifar10-resnet34", 0.004, 0.003, r"-0\.42 points, lies within .* \[-0\.70, -0\.10\]"),
        ("trimming/cifar10-resnet34", -0.004, 0.003, r"-0\.42 points, does not lie within .* \[\+0\.10, \+0\.70\]"),
        ("trimming/cifar10-resnet34", 0.001, 0.002, r"-0\.42 points, does not lie within .* \[-0\.30, \+0\.10\]"),
        ("trimming/cifar10-resnet34", 0.004, None, r"^There is no interval"),
        # published: accuracy 93.4 -> 94.4
        ("passive/cifar10-resnet56", 0.004, 0.003, r"\+1\.00 points, does not lie within .* \[\+0\.10, \+0\.70\]"),
        ("passive/cifar10-resnet56", 0.009, 0.003, r"\+1\.00 points, lies within .* \[\+0\.60, \+1\.20\]"),
    ],
)
def test_verdict(name, difference, half_width, sentence):
    recipe = RECIPES[name]
    verdict = _reproduce.verdict(recipe, summary(recipe, difference, half_width))
    assert re.search(sentence, verdict)
    assert ("Zero lies within" in verdict) == (half_width is not None and abs(difference) <= half_width)


def test_published_beside_measured(capsys):
    recipe = RECIPES["trimming/cifar10-resnet34"]
    _reproduce.print_tables(_reproduce.side_by_side(recipe, summary(recipe, 0.004, 0.003)))
    lines = [line.split() for line in capsys.readouterr().out.replace("start=1.0, end", "start=1.0,end").splitlines()]
    assert lines[0] == ["test", "error", "(%)", "published", "measured"]
    assert lines[2:] == [
        ["baseline", "17.43", "20.00", "±", "0.50"],
        [recipe.strategy.replace(" ", ""), "17.01", "19.60", "±", "0.30"],
        ["difference", "-0.42", "-0.40", "±", "0.30"],
        ["random(select=rows)", "-", "20.00", "±", "0.50"],
    ]


def test_published_intervals_are_shown(capsys):
    recipe = RECIPES["hard-batches/stl10-resnet18-0.5"]
    _reproduce.print_tables(_reproduce.side_by_side(recipe, {"summary": []}))
    out = capsys.readouterr().out
    assert re.search(r"baseline +50\.00 ± 1\.50 +- *$", out, re.MULTILINE)
    assert re.search(r"difference +-0\.50 +- *$", out, re.MULTILINE)


def runs(arm, accuracies, losses, **final):
    """Of two seeds; the second has the figures of the first and a tenth more."""
    outcomes = []
    for factor in (1.0, 1.1):
        last = {name: factor * value for name, value in final.items()}
        curve = {"test_accuracy": [factor * x for x in accuracies], "train_loss": losses}
        outcomes.append({"arm": arm, "error": None, "curve": curve, "final": last})
    return [*outcomes, {"arm": arm, "error": "it broke", "curve": None, "final": None}]


def test_what_the_papers_give_beside_accuracies():
    recipe = RECIPES["hard-batches/cifar10-resnet18-0.2"]
    plain = runs("baseline", [0.5], [3, 2, 1, 1], train_set_accuracy=0.6, seconds=10, updates=100)
    own = runs(recipe.strategy, [0.5], [3, 1, 1, 1], train_set_accuracy=0.7, seconds=6, updates=50)
    rows = beside(recipe, {"runs": plain + own})
    names = ["accuracy on the training set (%)", "epochs until the training loss converged", "milliseconds an update"]
    endings = ["baseline", recipe.strategy, "difference"]
    assert [row[0] for row in rows] == [f"{name}, {ending}" for name in names for ending in endings]
    assert [row[1:] for row in rows] == [
        ("99.7", "63"),
        ("99.7", "73.5"),
        ("+0.00", "+10.50"),
        ("80", "3"),
        ("74", "2"),
        ("-7.5 %", "-33.3 %"),
        ("31", "100"),
        ("99.6", "120"),
        ("+221.3 %", "+20.0 %"),
    ]
    headline = beside(RECIPES["hard-batches/stl10-efficientnet_b4-0.5"], {"runs": []})
    assert [row[1:] for row in headline[3:]] == [("43", "-"), ("34", "-"), ("-20.9 %", "-")]


def test_accuracies_at_the_end_of_each_step():
    """Of a strategy of five steps in ten epochs: after the second, the fourth, ..., the mean over seeds."""
    recipe = RECIPES["stepwise/cifar100-resnet50-sets"]
    recipe = replace(recipe, training=replace(recipe.training, epochs=10))
    curve = [0.01 * epoch for epoch in range(10)]
    rows = beside(recipe, {"runs": runs(recipe.strategy, curve, [1])})[3:]
    assert [row[0] for row in rows] == [f"accuracy (%) after step {n}, {recipe.strategy}" for n in range(1, 6)]
    assert [row[1] for row in rows] == ["35.79", "46.73", "52.52", "55.29", "57.28"]
    assert [float(row[2]) for row in rows] == pytest.approx([1.05, 3.15, 5.25, 7.35, 9.45])


def test_top5_and_medians():
    recipe = RECIPES["stepwise/cifar100-resnet50"]
    found = runs("baseline", [0.5], [1], test_top5_accuracy=0.8) + runs("stepwise", [0.5], [1])
    assert [row[1:] for row in beside(recipe, {"runs": found})] == [("88.62", "84"), ("90.72", "-"), ("+2.10", "-")]
    recipe = RECIPES["augmentation/cifar10-resnet44"]
    found = runs("baseline", [0.9, 0.1, 0.2, 0.4, 0.5, 0.3], [1])
    found += runs(recipe.strategy, [0.1, 0.5, 0.9, 0.4, 0.6], [1])
    rows = beside(recipe, {"runs": found})
    assert [row[1:] for row in rows] == [("6.92", "68.5"), ("3.23", "47.5"), ("-3.69", "-21.00")]
    short = runs("baseline", [0.1, 0.2, 0.4, 0.5], [1])  # of four epochs
    assert [row[2] for row in beside(recipe, {"runs": short})] == ["-", "-", "-"]


def test_they_are_shown(capsys):
    recipe = RECIPES["passive/imagenet-resnet50"]
    _reproduce.print_tables(_reproduce.side_by_side(recipe, summary(recipe, 0.004, 0.003)))
    assert re.search(r"top-5 accuracy \(%\), baseline +92\.9 +-", capsys.readouterr().out)


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_refuses_a_wrong_name(batchkern):
    words = ("passive/cifar-resnet56",)
    assert (
        refused(batchkern, words, "'passive/cifar-resnet56'", "near matches: .*passive/cifar10-resnet56", "--list")
        == ""
    )
    assert refused(batchkern, (), "name a recipe or a table, such as .* --list") == ""


@pytest.mark.parametrize("scale", ["0", "-1", "1.5", "nan"])
def test_refuses_a_scale(batchkern, scale):
    assert refused(batchkern, ("trimming/cifar10-resnet34", "--scale", scale), "scale must be") == ""


def test_refuses_no_seeds(batchkern, tiny):
    refused(batchkern, (tiny.name, "--data", "digits", "--seeds", "0"), "seeds must be .* at least 1, got 0")


@pytest.mark.parametrize("scale", [(), ("--scale", "0.1")])
def test_data_that_cannot_be_had(batchkern, monkeypatch, scale):
    """After the recipe, which tells what would be needed."""

    def offline(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(sources, "_load_dataset", offline)
    words = ("trimming/cifar10-resnet34", *scale)
    out = refused(batchkern, words, "'uoft-cs/cifar10' is no local file or folder, and cannot be loaded from the hub")
    assert out.startswith("trimming/cifar10-resnet34: Fassold 2021")


def test_failed_runs_are_told(batchkern, tiny, monkeypatch):
    failed = {"arm": tiny.strategy, "seed": 1, "rows": [], "error": "the loss is nan"}
    monkeypatch.setattr(_reproduce, "Comparison", dict)
    found = {"summary": [], "runs": [failed], "settings": SETTINGS, "environment": {}}
    monkeypatch.setattr(_reproduce, "run", lambda comparison, **options: comparison["out"].mkdir(parents=True) or found)
    out = refused(
        batchkern, (tiny.name,), r"1 of 1 runs failed, the first is arm passive\(every=5\), seed 1: the loss is"
    )
    assert "There is no interval" in out
