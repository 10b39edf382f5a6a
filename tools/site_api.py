"""What the documentation site makes of docstrings: an extension of griffe and a hook of MkDocs (mkdocs.yml).

Arguments that share a description, ``lr, momentum: ...``, become entries of their own, and the roles of Sphinx, such as
``:func:`` before a name, are left out.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED = re.compile(r"^(\s*)(\w+(?:,\s+\w+)+):(.*)$")
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


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub(r"\1\2", html)
