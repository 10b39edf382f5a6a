"""How the documentation site shows docstrings and formulas: an extension of griffe and a hook of MkDocs (mkdocs.yml).

Arguments that share a description, ``lr, momentum: ...``, become separate entries; the roles of Sphinx, such as
``:func:`` before a name, are removed; formulas become MathML, which browsers show without a script.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import griffe
import latex2mathml.converter

SHARED = re.compile(r"^(\s*)(\w+(?:,\s+\w+)+):(.*)$")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):(<code>)~?(?:[\w.]*\.)?(\w+)")


def apart(docstring: str) -> str:
    """``docstring`` with a description for each argument."""
    lines, made = re.sub(r",\n\s+(?=\w+(?:,|:\s))", ", ", docstring).split("\n"), []
    while lines:
        line = lines.pop(0)
        found = SHARED.match(line)
        if not found:
            made.append(line)
            continue
        indent, names, text = found.groups()
        more = []
        while lines and lines[0].startswith(indent + " ") and lines[0].strip():
            more.append(lines.pop(0))
        for name in re.split(r",\s+", names):
            made += [f"{indent}{name}:{text}", *more]
    return "\n".join(made)


class SharedDescriptions(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and re.search(r"^\s*Args:", obj.docstring.value, re.MULTILINE):
            before, args, after = re.split(r"^(\s*Args:\n)", obj.docstring.value, maxsplit=1, flags=re.MULTILINE)
            obj.docstring.value = before + args + apart(after)


def formula(found: re.Match[str]) -> str:
    text, block = unescape(found[2]).strip(), found[1] == "div"
    shown = latex2mathml.converter.convert(text, display="block" if block else "inline")
    return f'<div style="overflow-x: auto">{shown}</div>' if block else shown


def on_page_content(html: str, **_: Any) -> str:
    return FORMULA.sub(formula, ROLE.sub(r"\1\2", html))
