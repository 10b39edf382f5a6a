"""Collects the sources of the documentation site in a folder, which ``make docs`` passes to MkDocs.

The Markdown files keep their places in the repository, so that their links work. The files that they link to are copied
too, and pages of the API are generated from ``__all__``.

    python tools/site.py FOLDER
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["*.md", "docs/**/*.md", "bench/NOTES.md", "tools/*.md"]
MODULES = {
    "batchkern": "Operations",
    "batchkern.trainer": "Trainer",
    "batchkern.strategies": "Strategies",
    "batchkern.parts": "Strategies in any loop",
    "batchkern.data": "Data",
    "batchkern.schedules": "Schedules",
    "batchkern.callbacks": "Callbacks",
    "batchkern.compare": "Comparisons",
    "batchkern.analysis": "Results of any trainings",
    "batchkern.trained": "Trained models",
    "batchkern.integrations.transformers": "transformers",
    "batchkern.integrations.lightning": "Lightning",
    "batchkern.integrations.accelerate": "accelerate",
    "batchkern.integrations.trl": "TRL",
    "batchkern.integrations.torchtitan": "torchtitan",
}
ELSEWHERE = {"load_model": "batchkern.trained"}
"""Names that ``batchkern`` imports on first use, and the module whose page has them."""
LINK = re.compile(r"\]\(([^)#\s]+)")


def public(module: str) -> list[str]:
    """The names of ``__all__``, or, without one, the classes and functions of a module whose names have no
    underscore."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_") and name not in ELSEWHERE]
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [name for name in defined if not name.startswith("_")]


def place(module: str, name: str) -> str:
    """The path of an object. An operation has the name of its module, which would be taken instead."""
    own = ROOT / "batchkern" / "ops" / f"{name}.py"
    return f"batchkern.ops.{name}.{name}" if module == "batchkern" and own.exists() else f"{module}.{name}"


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text())}
    for path in [*pages, *(path for path in linked if path.is_file() and path.suffix != ".md")]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    api = folder / "docs" / "api"
    api.mkdir()
    for module, title in MODULES.items():
        objects = "\n\n".join(f"::: {place(module, name)}" for name in public(module))
        (api / f"{module}.md").write_text(f"# {title} (`{module}`)\n\n{objects}\n")
    links = "".join(f"`{name}` is on the page [{MODULES[m]}]({m}.md).\n" for name, m in ELSEWHERE.items())
    with (api / "batchkern.md").open("a") as page:
        page.write(f"\n{links}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
