"""Published strategies for training with mini-batches, related methods, methods for comparison, and a random control;
one module each.

``parse("trimming(end=0.3)+passive(every=20)")`` parses the notation of the command line.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Any

from batchkern.errors import UserError
from batchkern.strategies.base import Perturbation, Run, Step, Strategy
from batchkern.strategies.batch_augmentation import BatchAugmentation
from batchkern.strategies.cutmix import CutMix
from batchkern.strategies.cutout import Cutout
from batchkern.strategies.hard_batches import HardBatches
from batchkern.strategies.importance_sampling import ImportanceSampling
from batchkern.strategies.infobatch import InfoBatch
from batchkern.strategies.mixup import Mixup
from batchkern.strategies.passive_injection import PassiveInjection
from batchkern.strategies.random_selection import RandomSelection
from batchkern.strategies.rho import RHO
from batchkern.strategies.selective_backprop import SelectiveBackprop
from batchkern.strategies.small_loss import SmallLoss
from batchkern.strategies.srip import SRIP
from batchkern.strategies.stepwise import Stepwise
from batchkern.strategies.stochastic_augmentation import StochasticAugmentation
from batchkern.strategies.trimming import Trimming

__all__ = [
    "RHO",
    "SRIP",
    "STRATEGIES",
    "BatchAugmentation",
    "CutMix",
    "Cutout",
    "HardBatches",
    "ImportanceSampling",
    "InfoBatch",
    "Mixup",
    "PassiveInjection",
    "Perturbation",
    "RandomSelection",
    "Run",
    "SelectiveBackprop",
    "SmallLoss",
    "Step",
    "Stepwise",
    "StochasticAugmentation",
    "Strategy",
    "Trimming",
    "parse",
]

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls
    for cls in (
        Trimming,
        HardBatches,
        Stepwise,
        StochasticAugmentation,
        PassiveInjection,
        RandomSelection,
        Cutout,
        Mixup,
        CutMix,
        BatchAugmentation,
        SRIP,
        SmallLoss,
        InfoBatch,
        SelectiveBackprop,
        ImportanceSampling,
        RHO,
    )
}

LONGEST = 10_000
"""The largest number of characters in the options of one strategy."""


def check_combination(strategies: Sequence[Strategy]) -> None:
    """Rejects strategies of one run that decide the same thing.

    Args:
        strategies: objects such as ``Trimming()``.

    Raises:
        UserError: two of them decide the same thing, or one is not a strategy.

    Examples:
        >>> from batchkern.strategies import CutMix, Cutout, Mixup, check_combination
        >>> check_combination([Cutout(), Mixup()])
        >>> check_combination([CutMix(), Mixup()])
        Traceback (most recent call last):
            ...
        batchkern.errors.UserError: strategies cutmix and mixup both decide whether images are mixed; use one of them
    """
    owners: dict[str, Strategy] = {}
    for strategy in strategies:
        if not isinstance(strategy, Strategy):
            raise UserError(f"strategies must be objects such as Trimming(), got {strategy!r:.60}")
        if not is_dataclass(strategy):
            name = type(strategy).__name__
            raise UserError(
                f"strategies must be dataclasses, whose fields are options: write @dataclass above class {name}"
            )
        for thing in sorted(strategy.owns):
            if thing in owners:
                pair = f"{owners[thing].name} and {strategy.name}"
                raise UserError(f"strategies {pair} both decide {thing}; use one of them")
            owners[thing] = strategy


def parse(text: str, *, passive: Any = None) -> list[Strategy]:
    """Strategies from text such as ``"trimming(end=0.3)+augmentation"``; ``"baseline"`` and ``""`` give an empty list.

    Args:
        text: names with optional keyword options, joined by ``+``; option words need no quotes.
        passive: the passive set of a PassiveInjection whose text does not name one.

    Raises:
        UserError: unknown name or option, bad value, impossible combination.

    Examples:
        >>> from batchkern.strategies import parse
        >>> parse("cutout+hard-batches(delta=0.5)")
        [Cutout(size=None), HardBatches(delta=0.5, order='loss')]
        >>> parse("baseline")
        []
    """
    if text.strip() in ("", "baseline"):
        return []
    strategies = [_build(term, passive) for term in split_terms(text, "+")]
    check_combination(strategies)
    return strategies


def wants_passive(strategy: str) -> bool:
    """Whether a strategy needs a passive set that its text does not name."""
    placed = parse(strategy, passive="")
    return any(isinstance(s, PassiveInjection) and s.passive == "" for s in placed)


def check_passive(strategies: Sequence[str], passive: str | None) -> None:
    """Rejects a passive set that is missing or not used, and strategies that cannot be parsed."""
    wanting = [strategy for strategy in strategies if wants_passive(strategy)]
    if wanting and passive is None:
        raise UserError(f"{wanting[0]} needs a data set to inject: --passive SOURCE, such as --passive photo-patches")
    if passive is not None and not wanting:
        raise UserError(f"--passive is {passive}, but no strategy here injects a data set: add the strategy passive")


def split_terms(text: str, separator: str) -> list[str]:
    """``text``, split at each ``separator`` outside of parentheses; the parts are stripped.

    Args:
        text: such as ``"stepwise(fractions=(0.5, 1))+cutout"``.
        separator: one character, such as ``"+"``.

    Examples:
        >>> from batchkern.strategies import split_terms
        >>> split_terms("stepwise(fractions=(0.5, 1)) + cutout", "+")
        ['stepwise(fractions=(0.5, 1))', 'cutout']
    """
    cuts, depth = [-1], 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == separator and depth == 0:
            cuts.append(place)
    return [text[before + 1 : cut].strip() for before, cut in pairwise([*cuts, len(text)])]


def _build(term: str, passive: Any) -> Strategy:
    match = re.fullmatch(r"([\w-]+)\s*(?:\((.*)\))?", term, re.DOTALL)
    if not match:
        raise UserError(f"strategy {_quoted(term)} is not of the form name or name(option=value, ...)")
    name, options = match[1], _options(term, match[2] or "")
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown strategy {_quoted(name)}; there are {', '.join(STRATEGIES)}{hint}")
    cls = STRATEGIES[name]
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise UserError(f"strategy {name} has no option {_quoted(option)}; it has {', '.join(known)}")
        if isinstance(options[option], bool) != (known[option].type == "bool"):
            allowed = "True or False" if known[option].type == "bool" else "something other than True or False"
            raise UserError(f"strategy {name}: {option} must be {allowed}, got {_quoted(options[option])}")
        if not _fits(options[option], str(known[option].type)):
            allowed = "a number" if str(known[option].type).startswith("float") else "a list, such as (a, b)"
            raise UserError(f"strategy {name}: {option} must be {allowed}, got {_quoted(options[option])}")
    if "passive" in known and passive is not None:
        options.setdefault("passive", passive)
    for option, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and option not in options:
            raise UserError(f"strategy {name} needs the option {option}, such as {name}({option}=...)")
    try:
        return cls(**{option: _of_64_bits(value) for option, value in options.items()})
    except OverflowError:
        raise UserError(f"strategy {_quoted(term)} has a number that is too large") from None
    except TypeError as error:  # for example from comparing a word with a number
        raise UserError(f"strategy {_quoted(term)} has an option of a wrong type ({error})") from None


def _of_64_bits(value: Any) -> Any:
    """Converts an integer that does not fit into 64 bits to the nearest float."""
    return float(value) if type(value) is int and abs(value) >= 2**63 else value


def _fits(value: Any, kind: str) -> bool:
    """Whether a value fits an option that is a number or a list; strategies check other options themselves."""
    if kind.startswith("float"):
        return isinstance(value, int | float) or (value is None and "None" in kind)
    if kind.startswith("tuple"):
        return isinstance(value, tuple | list) or (isinstance(value, str) and "str" in kind)
    return True


def _options(term: str, text: str) -> dict[str, Any]:
    try:
        if len(text) > LONGEST:
            raise SyntaxError("Python's parser might run out of its stack")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes, such as "\\q"
            call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError("options are name=value")
        names = [keyword.arg for keyword in call.keywords]
        if None in names or len(set(names)) < len(names):
            raise SyntaxError("options are name=value, each once")
        return {str(k.arg): _value(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise UserError(f"strategy {_quoted(term)} is not of the form name(option=value, ...)") from None


def _quoted(value: Any) -> str:
    """``repr(value)``; a long one is truncated."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _value(node: ast.expr) -> Any:
    """The value of a Python literal; a bare word is taken as a string.

    Raises:
        ValueError: it is not a literal, or has a number with too many digits to be shown in a message.
    """
    value = node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
    repr(value)
    return value
