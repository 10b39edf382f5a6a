"""Every snippet and command of docs/ runs, every link leads somewhere, and the cards agree with the code.

Snippets run in this process, each in a namespace of its own; those that start processes or join a group run in one of
theirs, as the only process of a ``torchrun``; one that captures a CUDA graph is run by test_gpu_graphs.py.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm

import batchkern
from batchkern import cli, ops
from batchkern.compare import split_arms
from batchkern.strategies import STRATEGIES, parse
from tools import site

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
STRATEGY_CARDS = {name: f"strategies/{name}.md" for name in STRATEGIES}
# select_rows is on the card of trimmed_mean.
OPERATIONS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)) and name != "select_rows"]
OP_CARDS = {name: f"ops/{name}.md" for name in OPERATIONS}
CARDS = [*STRATEGY_CARDS.values(), *OP_CARDS.values()]
SECTIONS = [
    "What it does",
    "In your own training loop",
    "Hyperparameters and how to choose them",
    "Cost",
    "When it helps and when it did not",
    "Details and pitfalls",
    "Source",
]
OWN_PROCESS = re.compile(r"\bdistributed\b|\bmultiprocessing\b|__main__")


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Fenced blocks of a language, each with the line it starts at."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    return [(PAGES[page].count("\n", 0, block.start()) + 2, block[1]) for block in found]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def each(found: dict[str, Any]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("item", found.values(), ids=list(found))


PYTHON = {f"{page}:{line}": (page, line, code) for page in PAGES for line, code in blocks(page, "python")}
OF_A_GPU = {key: PYTHON.pop(key) for key, (_, _, code) in tuple(PYTHON.items()) if "torch.cuda.graph(" in code}
"""Run by test_gpu_graphs.py."""
SHELL = {
    f"{page}:{line}:{number}": command.split("  #")[0].strip()
    for page in PAGES
    for line, block in blocks(page, "(?:bash|sh|console)")
    for number, command in enumerate(re.sub(r"\\\n\s*", "", block).splitlines())
    if command.strip() and not command.startswith("#")
}
COMMANDS = {key: command for key, command in SHELL.items() if command.startswith("batchkern ")}


# --- what runs -------------------------------------------------------------------------------------------------


@each(PYTHON)
def test_python_snippets_run(item, tmp_path, monkeypatch, capsys):
    page, line, code = item
    monkeypatch.chdir(tmp_path)
    if OWN_PROCESS.search(code):
        run_as_torchrun(code, tmp_path)
        return
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: other threads would only be waited for
    try:
        # The blank lines make a traceback show the line of the page.
        exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(threads)
    if page in CARDS:
        assert capsys.readouterr().out.strip(), "a snippet prints what came of it"


@each(OF_A_GPU)
def test_snippets_for_a_gpu_are_whole(item):
    """Python, which imports what exists, and runs where there is a GPU."""
    page, line, code = item
    assert page == "cuda-graphs.md", "no test runs it"
    tree = ast.parse("\n" * (line - 1) + code, str(DOCS / page))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), str(DOCS / page), "exec"), {})


def run_as_torchrun(code: str, directory: Path) -> None:
    (directory / "snippet.py").write_text(code)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment = {**os.environ, **group, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = warm.run("snippet.py", cwd=directory, env=environment)
    assert done.returncode == 0, done.stderr


@each(COMMANDS)
def test_batchkern_commands_run(item, tmp_path, monkeypatch, capsys):
    """Trainings on digits run, for a few epochs; of everything else the options are parsed, and the strategies."""
    words = shlex.split(item)
    options = parsed(words)
    if words[1] == "train" and options["data"] == "digits":
        epochs = 5 if "stepwise" in options["strategy"] else 1  # one for each of its steps
        words += ["--epochs", str(epochs), "--no-progress"]
    elif words[1] != "info":
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a command, which the command line has accepted."""
    pytest.importorskip("rich")
    pytest.importorskip("sklearn")
    commands = pytest.importorskip("typer.main").get_command(cli._app()).commands
    assert words[1] in commands, f"there is no command {words[1]}"
    options: dict[str, Any] = commands[words[1]].make_context(words[1], words[2:]).params
    for arm in (options.get("strategy", ""), *split_arms(options.get("arms", "")), *(options.get("arm") or ())):
        parse(arm, passive="photo-patches")
    return options


def test_other_commands_name_what_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in (SHELL[key] for key in SHELL if key not in COMMANDS):
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        assert words[0] in ("make", "pip", "python", "torchrun"), f"no test runs {command!r}"
        assert words[0] != "make" or set(words[1:]) <= set(targets), command
        assert all((ROOT / word).exists() for word in words if re.fullmatch(r"\w+/.*\.py", word)), command
        if "-m batchkern " in command:
            parsed(["batchkern", *words[words.index("batchkern") + 1 :]])


# --- where links lead ------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The ids that GitHub gives to headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(slug + (f"-{found.count(slug)}" if slug in found else ""))
    return set(found)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (DOCS / page).parent / path if path else DOCS / page
        assert there.resolve().is_relative_to(ROOT), f"{target} is outside of the repository"
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text()), target


def test_index_names_every_page():
    linked = re.findall(r"\]\(([^)#]+\.md)", PAGES["README.md"])
    assert {page for page in PAGES if page != "README.md"} <= set(linked)


def test_the_site_has_every_page_and_every_part_of_the_api():
    named = set(re.findall(r"\S+\.md", (ROOT / "mkdocs.yml").read_text()))
    pages = {f"docs/{page}" for page in PAGES} | {f"docs/api/{module}.md" for module in site.MODULES}
    assert pages <= named
    assert {page for page in named if not page.startswith("docs/api/")} <= {
        path.relative_to(ROOT).as_posix() for pattern in site.PAGES for path in ROOT.glob(pattern)
    }
    for module in site.MODULES:
        assert site.public(module), module


# --- cards and code --------------------------------------------------------------------------------------------


def test_there_is_a_card_for_everything():
    assert set(CARDS) <= set(PAGES)
    everything = "\n".join(PAGES.values())
    assert [name for name in batchkern.__all__ if not re.search(rf"\b{name}\b", everything)] == ["__version__"]


def test_what_was_tried_in_trainers_is_a_test():
    named = re.findall(r"\| *`(test_\w+)::(test_\w+)` *\|$", PAGES["integrations.md"], re.MULTILINE)
    assert len(named) > 10
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / "integrations" / f"{file}.py").read_text(), test


@pytest.mark.parametrize("page", CARDS)
def test_cards_have_the_same_sections(page):
    assert re.findall(r"^## (.*)$", prose(page), re.MULTILINE) == SECTIONS
    assert "$$" in section(page, "What it does"), "the equation"
    assert len(blocks(page, "python")) >= 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_cards_of_strategies_have_a_place_for_results_and_a_command(name):
    page = STRATEGY_CARDS[name]
    place = section(page, "When it helps and when it did not").splitlines()
    assert f"<!-- measured: {name} -->" in place
    assert any(f"batchkern train --data digits --strategy {quote}{name}" in PAGES[page] for quote in ('"', ""))


def section(page: str, title: str) -> str:
    assert page in PAGES, f"docs/{page} is missing"
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGES[page], re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def tables(page: str) -> dict[str, dict[str, str]]:
    """Tables of hyperparameters: {subject: {name: default}}; the card's own subject is ``""``."""
    pieces = re.split(r"^### `(.*)`$", section(page, "Hyperparameters and how to choose them"), flags=re.MULTILINE)
    rows = r"^\| *`(\w+)` *\| *([^|]*?) *\|"
    return {
        subject: dict(re.findall(rows, text, re.MULTILINE))
        for subject, text in zip(["", *pieces[1::2]], pieces[0::2], strict=True)
    }


def check_table(page: str, shown: dict[str, str], defaults: dict[str, Any]) -> None:
    """Rows in the order of the arguments, each with its default."""
    missing, unknown = [*(defaults.keys() - shown)], [*(shown.keys() - defaults)]
    assert (missing, unknown) == ([], []), f"docs/{page}: no row for {missing}, and rows for {unknown}"
    assert list(shown) == list(defaults), f"docs/{page}: rows in another order than the arguments"
    for name, default in defaults.items():
        text = shown[name]
        if default is inspect.Parameter.empty:
            assert text == "required", name
        else:
            value = eval(text.strip("`"), {"pi": math.pi})
            assert (value, type(value)) == (default, type(default)), name


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Defaults by name, without the tensors that are the data."""
    signature = inspect.signature(function).parameters
    return {name: p.default for name, p in signature.items() if p.annotation != "Tensor"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_tables_of_strategies_have_every_option_and_its_default(name):
    options = [field for field in dataclasses.fields(STRATEGIES[name]) if field.init]  # type: ignore[arg-type]
    defaults = {
        field.name: inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        for field in options
    }
    assert all(field.default_factory is dataclasses.MISSING for field in options)
    check_table(STRATEGY_CARDS[name], tables(STRATEGY_CARDS[name])[""], defaults)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_tables_of_commands_have_every_option_and_its_default(command):
    found = re.search(rf"^### `{command}`\n(.*?)(?=^##|\Z)", PAGES["trained-models.md"], re.DOTALL | re.MULTILINE)
    assert found
    shown = dict(re.findall(r"^\| *`([\w-]+)` *\| *([^|]*?) *\|", found[1], re.MULTILINE))
    options = inspect.signature(getattr(cli, command)).parameters.values()
    words = ("run", "images")
    names = [option.name.upper() if option.name in words else f"--{option.name}" for option in options]
    check_table("trained-models.md", shown, dict(zip(names, (option.default for option in options), strict=True)))


@pytest.mark.parametrize("command", ["train", "compare", "analyse", "reproduce"])
def test_the_guide_names_every_option(command):
    text = "\n".join(PAGES.values())
    positional = {"analyse": ["file"], "reproduce": ["name"]}.get(command, [])
    names = [name for name in inspect.signature(getattr(cli, command)).parameters if name not in positional]
    other = {"listed": "list"}
    missing = [
        name
        for name in (other.get(name, name).replace("_", "-") for name in names)
        if not re.search(rf"--(no-)?{name}(?![\w-])|`{name.replace('-', '_')}`", text)
    ]
    assert missing == []


@pytest.mark.parametrize("name", OPERATIONS)
def test_tables_of_operations_have_every_keyword_and_its_default(name):
    for subject, shown in tables(OP_CARDS[name]).items():
        check_table(OP_CARDS[name], shown, parameters(getattr(batchkern, subject or name)))
