"""Names that others gave, of files, classes and columns, as a sentence can hold them."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text`, with the escapes of `repr` where it has a character that would not show, or would steer a terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def shortened(names: tuple[str, ...]) -> str:
    return ", ".join(map(printable, names[:10])) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
