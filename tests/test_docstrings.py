"""The examples in the docstrings of the API pages run and print what they say; every object there has one."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SITE = Path(__file__).resolve().parents[1] / "tools" / "site.py"
WITHOUT = {
    "batchkern.analysis.Analysis": "a result, which the example of analyse reads",
    "batchkern.analysis.Table": "a result, which the example of analyse reads",
    "batchkern.data.ImageData": "an abstract class: its subclasses have examples",
    "batchkern.data.Labelled": "an abstract class: its subclasses have examples",
    "batchkern.strategies.Perturbation": "made by a strategy's perturb alone",
    "batchkern.strategies.Run": "made by the trainer alone",
    "batchkern.strategies.Step": "made by the trainer: the example of Strategy reads one",
    "batchkern.trainer.Counts": "a result: the example of Trainer prints two of its figures",
    "batchkern.trainer.Interrupted": "an exception",
}
"""Objects that need no example, each with the reason."""


def _site() -> Any:
    spec = importlib.util.spec_from_file_location("site_pages", SITE)  # its name is one of the standard library's
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LIBRARIES = {"from transformers": "transformers", "TensorBoard": "tensorboard", "WeightsAndBiases": "wandb"}
"""Words of examples outside of the integrations, and the library that an example with one needs."""

NAMES = [(module, name) for module in _site().MODULES for name in _site().public(module)]


@pytest.fixture(autouse=True)
def _no_accelerator() -> Iterator[None]:
    """That of ``accelerate``, of which a process has one, is not left to other tests."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)


def public_object(module: str, name: str) -> Any:
    """A function or a class of the API pages. Skips what is a constant, or of a library that is not installed."""
    if module.startswith("batchkern.integrations."):
        pytest.importorskip(module.rpartition(".")[2])
    found = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        pytest.skip("a constant")
    return found


def docstring(found: Any) -> str:
    """Its own: a class without one must not show that of its base."""
    own = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
    return inspect.cleandoc(own or "")


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_the_example_prints_what_it_says(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = docstring(public_object(module, name))
    for library in [library for word, library in LIBRARIES.items() if word in text]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, module, 0)
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=told.append)
    assert not told, "".join(told)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_the_docstring_ends_with_examples(module: str, name: str) -> None:
    text = docstring(public_object(module, name))
    if reason := WITHOUT.get(f"{module}.{name}"):
        pytest.skip(reason)
    _, section, examples = text.partition("\n\nExamples:\n")
    assert section, f"{module}.{name} has no section Examples"
    assert doctest.DocTestParser().get_examples(examples), f"the examples of {module}.{name} begin with >>>"
    assert all(line.startswith("    ") or not line for line in examples.splitlines()), "Examples comes last"


def test_objects_without_an_example_are_on_the_pages() -> None:
    assert WITHOUT.keys() <= {f"{module}.{name}" for module, name in NAMES}
