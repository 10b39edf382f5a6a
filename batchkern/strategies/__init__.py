"""Five published ways of training with mini-batches, and the control; one module a paper.

``parse("trimming(end=0.3)+passive(every=20)")`` reads the notation of the command line.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from batchkern.errors import UserError
from batchkern.strategies.base import Perturbation, Run, Step, Strategy
from batchkern.strategies.hard_batches import HardBatches
from batchkern.strategies.passive_injection import PassiveInjection
from batchkern.strategies.random_selection import RandomSelection
from batchkern.strategies.stepwise import Stepwise
from batchkern.strategies.stochastic_augmentation import StochasticAugmentation
from batchkern.strategies.trimming import Trimming

__all__ = [
    "STRATEGIES",
    "HardBatches",
    "PassiveInjection",
    "Perturbation",
    "RandomSelection",
    "Run",
    "Step",
    "Stepwise",
    "StochasticAugmentation",
    "Strategy",
    "Trimming",
    "check_combination",
    "parse",
    "split_terms",
]

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls
    for cls in (Trimming, HardBatches, Stepwise, StochasticAugmentation, PassiveInjection, RandomSelection)
}


def check_combination(strategies: Sequence[Strategy]) -> None:
    """Refuses strategies of one run that decide the same thing."""
    owners: dict[str, Strategy] = {}
    for strategy in strategies:
        if not isinstance(strategy, Strategy):
            raise UserError(f"strategies must be objects such as Trimming(), got {strategy!r:.60}")
        for thing in sorted(strategy.owns):
            if thing in owners:
                pair = f"{owners[thing].name} and {strategy.name}"
                raise UserError(f"strategies {pair} both decide {thing}; use one of them")
            owners[thing] = strategy


def parse(text: str, *, passive: Any = None) -> list[Strategy]:
    """Strategies from text such as ``"trimming(end=0.3)+augmentation"``; ``"baseline"`` and ``""`` are none.

    Args:
        text: names with optional keyword options, joined by ``+``; option words need no quotes.
        passive: the passive set of a PassiveInjection that names none.

    Raises:
        UserError: unknown name or option, bad value, impossible combination.
    """
    if text.strip() in ("", "baseline"):
        return []
    strategies = [_build(term, passive) for term in split_terms(text, "+")]
    check_combination(strategies)
    return strategies


def split_terms(text: str, separator: str) -> list[str]:
    """``text`` at each ``separator`` that no parentheses enclose, stripped."""
    pieces, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def _build(term: str, passive: Any) -> Strategy:
    match = re.fullmatch(r"([\w-]+)\s*(?:\((.*)\))?", term, re.DOTALL)
    if not match:
        raise UserError(f"strategy {term!r} is not of the form name or name(option=value, ...)")
    name, options = match[1], _options(term, match[2] or "")
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown strategy {name!r}; there are {', '.join(STRATEGIES)}{hint}")
    cls = STRATEGIES[name]
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise UserError(f"strategy {name} has no option {option!r}; it has {', '.join(known)}")
        if isinstance(options[option], bool) != (known[option].type == "bool"):
            allowed = "True or False" if known[option].type == "bool" else "another value than True or False"
            raise UserError(f"strategy {name}: {option} must be {allowed}, got {options[option]!r}")
    if "passive" in known and passive is not None:
        options.setdefault("passive", passive)
    for option, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and option not in options:
            raise UserError(f"strategy {name} needs the option {option}, such as {name}({option}=...)")
    try:
        return cls(**options)
    except TypeError as error:  # a comparison of a word with a number, say
        raise UserError(f"strategy {term!r} has an option of a wrong type ({error})") from None


def _options(term: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        names = [keyword.arg for keyword in call.keywords]
        if not isinstance(call.func, ast.Name) or call.args or None in names or len(set(names)) < len(names):
            raise SyntaxError("options are name=value, each once")
        return {str(k.arg): _value(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, AssertionError):
        raise UserError(f"strategy {term!r} is not of the form name(option=value, ...)") from None


def _value(node: ast.expr) -> Any:
    """A Python literal; a bare word stands for itself."""
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
