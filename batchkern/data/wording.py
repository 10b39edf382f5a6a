"""Names of files, classes and columns in a form that is safe to print in messages."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text`, with the escapes of `repr` if it has a character that is not printable or could control a terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def shortened(names: tuple[str, ...]) -> str:
    return ", ".join(map(printable, names[:10])) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
