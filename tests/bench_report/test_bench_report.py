"""``batchkern bench report``: its page, its plots, its exit statuses, and what it will not overwrite."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import commands
import pytest
import small_results as small
from small_results import SHAPE, row, sweep

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from batchkern import cli, plots
from batchkern.bench_report.report import FIRST_LINE

ROOT = Path(__file__).resolve().parents[2]
OP = "trimmed_cross_entropy"
SIZES = [1000, 4000, 16000, 64000]
PLOT = "m-2026-11-22-abc1234-rows-trimmed_mean-classes-10-float32.png"
MARKED = "words\n<!-- figures: operations bench/results/m/2026-11-22-abc1234.json -->\n<!-- end of figures -->\n"


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """A working directory with the results of a machine."""
    monkeypatch.chdir(tmp_path)
    growth = [sweep(v, SIZES, [1e-5 * size for size in SIZES], [1e6] * 4) for v in ("ours", "F.other")]
    return small.write(
        Path("bench", "results", "m", "2026-11-22-abc1234.json"),
        operations=[row(OP, SHAPE, "ours", 2e-3), row("trimmed_mean", {"rows": 9}, "ours", 2e-6)],
        growth=[*growth, sweep("ours", SIZES, [1, 2, 3, 4], [1] * 4, along="classes", fractions=None)],
        training=[{"strategy": "baseline"}],
        accuracy=[{"op": "soft_label_kl", "perturbation": 0.1, "classes": 10, "variant": "ours", "error": 1e-8}],
        failed=["bench/bench_some.py::test[x]"],
        left_out=["another case"],
    )


@pytest.fixture
def report():
    """Runs the command: (exit status, stdout, stderr)."""
    return partial(commands.run, "bench", "report")


def refused(result, pattern):
    status, out, err = result
    assert (status, out) == (2, "")
    assert re.fullmatch(r"batchkern: error: [^\n]+\n", err), err
    assert re.search(pattern, err), err


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_every_table(report):
    status, out, err = report()
    assert (status, err) == (0, "")
    assert out.startswith(
        f"{FIRST_LINE}\n\n# Benchmarks\n\n## m/2026-11-22-abc1234.json\n\n{small.FACTS}, 1 case failed\n"
    )
    headings = re.findall("^### (.*)$", out, re.MULTILINE)
    assert headings == ["Not measured", f"`{OP}`", "`trimmed_mean`", "Growth", "Training", "Accuracy"]
    assert "- failed: bench/bench_some.py::test[x]\n- left out: another case\n" in out
    assert "| float32, keep 0.2 | full | ours | 2.00 ms |" in out
    assert "png" not in out
    assert report("bench/results/m/2026-11-22-abc1234.json")[1] == report("bench")[1] == out


def test_several_files_newest_first_and_what_was_left_out(report, file):
    Path("bench", "results", "other.json").write_text("{}")
    small.write(Path("later.json"), {"date": "2027-01-01"}, operations=[])
    status, out, err = report("bench/results", "later.json")
    assert status == 0
    assert re.findall("^## (.*)$", out, re.MULTILINE) == [f"{Path.cwd().name}/later.json", "m/2026-11-22-abc1234.json"]
    assert re.fullmatch(r"batchkern: left out: bench/results/other\.json is no file of results[^\n]*\n", err)


def test_comparisons_are_shown_too(report):
    pytest.importorskip("scipy")
    (path,) = ROOT.glob("bench/results/*/*-compare-digits.json")
    status, out, _ = report(path)
    assert status == 0
    assert "| `trimming` | 98.94 ± 0.38 | +0.28 ± 0.35 | 1.00 |" in out
    assert "### hard-batches\n\n- digits (1,438 images), `cnn`, equal updates: `hard-batches` 98.77 ± 0.52 %;" in out


def test_out_has_the_page_and_a_plot_for_each_sweep_with_a_floor(report, monkeypatch):
    saved = {}
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (saved.update({path.name: figure}), save(figure, path)))
    assert report("--out", "x/y") == (0, f"in x/y: report.md  {PLOT}\n", "")
    assert sorted(path.name for path in Path("x/y").iterdir()) == [PLOT, "report.md"]
    assert f"![trimmed_mean, classes 10, float32]({PLOT})" in Path("x/y/report.md").read_text()
    assert Path("x/y", PLOT).read_bytes().startswith(b"\x89PNG")
    (axes,) = saved[PLOT].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines() if line.get_label()[0] != "_"}
    assert list(lines) == ["ours", "F.other"]
    assert lines["ours"] == [pytest.approx((size, 10)) for size in SIZES]  # 1e-6 of 1e-5 seconds a row
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "rows")


# --- what is overwritten ---------------------------------------------------------------------------------------------


def test_an_earlier_report_is_replaced(report):
    report("--out", "x")
    Path("x", "notes.txt").write_text("mine")
    before = Path("x", "report.md").read_text()
    Path("x", "report.md").write_text(before + "more")
    assert report("--out", "x")[0] == 0
    assert Path("x", "report.md").read_text() == before
    assert Path("x", "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["report.md", PLOT])
def test_files_of_others_are_not(report, name):
    Path("x").mkdir()
    Path("x", name).write_text("mine")
    refused(report("--out", "x"), rf"x/{name} exists and is not of an earlier report; give another --out")
    assert [path.name for path in Path("x").iterdir()] == [name]
    assert Path("x", name).read_text() == "mine"


def test_a_figure_that_the_earlier_report_does_not_have_is_not(report):
    Path("x").mkdir()
    Path("x", PLOT).write_text("mine")
    Path("x", "report.md").write_text(FIRST_LINE)
    refused(report("--out", "x"), f"{PLOT} exists")


def test_a_folder_that_cannot_be(report):
    Path("x").write_text("a file")
    refused(report("--out", "x/y"), "x/y cannot be written: Not a directory")


# --- figures between markers -----------------------------------------------------------------------------------------


def test_check_tells_and_writes_nothing(report):
    page = Path("PAGE.md")
    page.write_text(MARKED)
    status, out, err = report("--readme", page, "--check")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"batchkern: PAGE\.md, line 2: the figures are not those of [^\n]+\n", err)
    assert page.read_text() == MARKED
    assert report("--readme", page) == (0, "", "")
    assert "| 2.00 ms |" in page.read_text()
    assert report("--readme", page, "--check") == (0, "", "")


def test_a_newer_file_is_told_once_figures_are_written(report, file):
    Path("PAGE.md").write_text(MARKED)
    rows = [row(OP, SHAPE, "ours", 1.0), row("trimmed_mean", {"rows": 9}, "ours", 1.0)]
    later = small.write(file.with_name("later.json"), {"date": "2027-01-01"}, operations=rows)
    status, _, err = report("--readme", "PAGE.md")
    assert status == 1
    assert f"is older than {later}" in err
    assert "| 2.00 ms |" in Path("PAGE.md").read_text()


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ("no.json", r"no\.json cannot be read: No such file"),
        ("PAGE.md", r"PAGE\.md is no JSON"),
        ("x", "there is no file of results in x"),
        ("--check", "--check needs --readme FILE"),
        ("--readme PAGE.md bench", "leave out FILES and --out"),
        ("--readme PAGE.md --out x", "leave out FILES and --out"),
        ("--readme no.md", r"no\.md cannot be read"),
        ("--readme PAGE.md --check", r"PAGE\.md, line 1: .* got 'sizes'"),
    ],
)
def test_wrong_arguments(report, words, pattern):
    Path("PAGE.md").write_text("<!-- figures: sizes x.json -->\n<!-- end of figures -->\n")
    Path("x").mkdir()
    refused(report(*words.split()), pattern)


@pytest.mark.parametrize("machine", ["x", -1, [1], None])
def test_a_machine_that_is_no_object(report, machine):
    content = {"kind": "batchkern token selection", "settings": {}, "machine": machine}
    Path("a.json").write_text(json.dumps(content))
    refused(report("a.json"), r"a\.json")


def test_without_bench_results(report, tmp_path, monkeypatch):
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    refused(report(), "there is no bench/results in this folder")


def test_help_says_how_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["batchkern", "bench", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert all(word in said for word in ("make bench", "make gpu", "report"))


def test_nothing_is_needed_but_the_files():
    """Neither a kernel nor matplotlib, and no GPU is asked for."""
    code = (
        "import sys; sys.modules['batchkern._C'] = sys.modules['matplotlib'] = sys.modules['triton'] = None\n"
        "import torch; torch.cuda.is_available = torch.cuda.device_count = None\n"
        "from batchkern import _backend; assert _backend.extension is None\n"
        "sys.argv = ['batchkern', 'bench', 'report']; from batchkern.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "### Growth" in done.stdout


@pytest.mark.parametrize(
    "lists",
    [
        {"operations": [row(OP, SHAPE, "ours", 2e-3) | {"time": {"median": "2 ms"}}]},
        {"operations": [row(OP, SHAPE, "ours", 2e-3) | {"shape": 4096}]},
        {"growth": [sweep("ours", SIZES, [1, 2, 3, 4], [1] * 4) | {"sizes": ["1", 2, 3, 4]}]},
        {"accuracy": [{"op": "f", "perturbation": 0.1, "classes": 10, "variant": "ours", "error": "small"}]},
        {"operations": [row(OP, SHAPE, "ours", 2e-3)], "rates": {"copy": 5}},
    ],
    ids=["time", "shape", "sizes", "error", "rates"],
)
def test_a_damaged_file_is_one_sentence(report, file, lists):
    small.write(file, **lists)
    for words in ((str(file),), (str(file), "--out", "shown")):
        status, _, error = report(*words)
        assert status == 2
        assert error.startswith(f"batchkern: error: {file} is damaged")
        assert error.count("\n") == 1
    assert not list(Path("shown").glob("*"))
