"""Variants of a problem side by side: checked, then timed in turn.

A round runs every variant once, in shuffled order, and ratios are taken within a round, so that other load on the
machine affects all variants equally.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from batchkern import _backend
from bench.devices import Cpu, Cuda, Rates, Run, cloned, floor_seconds, quantiles
from bench.machine import QUICK
from bench.registry import Case, Forward, Operation, Oracle, Problem, Sweep, Variant, relative_error

ROUNDS = (3, 3) if QUICK else (7, 101)
SECONDS_A_POINT, POINT_ROUNDS = (0.02, (2, 2)) if QUICK else (0.5, (7, 31))
NOT_SWEPT = ("compile", "ours inplace", "ours composed", "sort")
"""Variants that are not measured in sweeps. (Compiling for each size would take longer than all the rest.)"""


def prepared(problem: Problem, step: Forward, mode: str, calls: int) -> Run:
    """Does everything that is not timed. The run returns, for each call, the result and its gradients.

    Each call has inputs and a graph of its own.
    """
    inputs = [cloned(problem.inputs, problem.differentiable) for _ in range(calls)]
    if mode == "forward":
        return lambda: [(step(*x), ()) for x in inputs]
    if mode == "full":
        return lambda: [full(problem, step, x) for x in inputs]
    graphs = [(step(*x), x) for x in inputs]
    return lambda: [(y, gradients(problem, y, x)) for y, x in graphs]


def full(problem: Problem, step: Forward, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    result = step(*inputs)
    return result, gradients(problem, result, inputs)


def gradients(problem: Problem, result: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not problem.differentiable:
        return ()
    upstream = _one(result.dtype, result.device) if problem.upstream is None else problem.upstream
    return torch.autograd.grad(result, inputs[: problem.differentiable], upstream)


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cached, because autograd would make one in each backward pass, which is another launch."""
    return torch.ones((), dtype=dtype, device=device)


# --- errors -----------------------------------------------------------------------------------------------------------


class Unequal(Exception):
    """A variant computes a wrong result."""


Exact = tuple[Tensor, tuple[Tensor, ...]]
"""A result and its gradients in float64."""


def errors(
    problem: Problem, variant: Variant, mode: str = "full", known: dict[Oracle, Exact] | None = None
) -> dict[str, float | None] | None:
    """The errors of the result and of its gradients relative to float64; None if the variant draws its own random
    numbers. ``known`` keeps the results of oracles for the next variant of the same problem and mode.

    Raises:
        Unequal: an error is above the problem's limit, or NaN.
    """
    ((result, found_gradients),) = prepared(problem, variant.step, mode, 1)()
    if variant.wrong is not None:
        if sentence := variant.wrong(result.detach(), found_gradients):
            raise Unequal(sentence)
        return None
    oracle = variant.oracle or problem.oracle
    known = {} if known is None else known
    if oracle not in known:
        known[oracle] = in_float64(problem, oracle, mode)
    exact, exact_gradients = known[oracle]
    found = {"result": problem.result_error(result, exact), "gradient": None}
    if found_gradients:
        pairs = zip(found_gradients, exact_gradients, strict=True)
        found["gradient"] = max(relative_error(gradient, exact) for gradient, exact in pairs)
    for what, error in found.items():
        if error is not None and not error <= problem.limit:
            raise Unequal(f"its {what} is off by {error:.2g} of itself")
    return found


def in_float64(problem: Problem, oracle: Oracle, mode: str) -> Exact:
    wide = tuple(x.detach().double() for x in problem.inputs)
    leaves = [x.requires_grad_() for x in wide[: problem.differentiable]]
    result = oracle(*wide)
    if not leaves or mode == "forward":
        return result.detach(), ()
    upstream = None if problem.upstream is None else problem.upstream.double()
    return result.detach(), torch.autograd.grad(result, leaves, upstream)


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """Seconds per call, by variant and round."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]
    host: dict[str, list[float]]


def interleaved(
    device: Cpu, runs: dict[str, Any], calls: dict[str, int], budget: float, rounds: tuple[int, int]
) -> Timed:
    """``runs[name](calls)`` prepares a run of this many calls."""
    timed = Timed({name: [] for name in runs}, calls, {name: [] for name in runs})
    order, shuffle = list(runs), random.Random(0).shuffle
    least, most = rounds
    gc.collect()
    gc.freeze()  # so that the collections between rounds are cheap
    gc.disable()
    try:
        deadline = time.monotonic() + budget
        done = 0
        while done < least or (done < most and time.monotonic() < deadline):
            gc.collect()
            shuffle(order)
            for name in order:
                run, host = runs[name](calls[name]), timed.host[name]
                device.host_s = calls[name] * host[-1] if host else 0.0  # each variant needs a sleep of its own length
                timed.seconds[name].append(device.seconds(run) / calls[name])
                host.append(device.host_s / calls[name])
            done += 1
    finally:
        gc.enable()
        gc.unfreeze()
    return timed


def timed_mode(
    device: Cpu, problem: Problem, steps: dict[str, Forward], mode: str, budget: float, rounds: Any
) -> Timed:
    runs = {name: (lambda calls, step=step: prepared(problem, step, mode, calls)) for name, step in steps.items()}
    calls = {}
    for name, run in runs.items():
        once = device.seconds(run(1))
        if once < 0.1:
            once = min(once, *(device.seconds(run(1)) for _ in range(4)))
        calls[name] = device.calls_a_round(once)
    return interleaved(device, runs, calls, budget, rounds)


def timed_graphs(device: Cuda, problem: Problem, steps: dict[str, Forward], mode: str, calls: int) -> Timed:
    """Times replays of captured calls. Inputs are restored before each replay, because a variant may overwrite them."""
    runs = {}
    for name, step in steps.items():
        inputs: list[tuple[Tensor, ...]] = []

        def make(step: Forward = step, inputs: list[tuple[Tensor, ...]] = inputs) -> Run:
            """Makes the clones on the stream of the capture, because the backward pass runs on the stream that made
            them."""
            inputs += [cloned(problem.inputs, problem.differentiable) for _ in range(calls)]
            if mode == "forward":
                return lambda: [step(*x) for x in inputs]
            return lambda: [full(problem, step, x) for x in inputs]

        try:
            replay = device.graph_of(make)
        except Exception as error:  # the plain calls were measured and are kept
            print(f"{name} was not captured: {error}")
            continue

        def restored(_: int, replay: Run = replay, inputs: list[tuple[Tensor, ...]] = inputs) -> Run:
            with torch.no_grad():
                for own in inputs:
                    for x, original in zip(own, problem.inputs, strict=True):
                        x.data.copy_(original)
            return replay

        runs[name] = restored
    return interleaved(device, runs, dict.fromkeys(runs, calls), device.seconds_a_group, ROUNDS)


# --- what is written --------------------------------------------------------------------------------------------------


def shared(op: Operation, case: Case) -> dict[str, Any]:
    return {"op": op.name, "dtype": str(case.dtype)[6:], "keep": case.keep, "kind": case.kind}


def _checked(problem: Problem, mode: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The errors of each variant, and why others are not timed. An error of one of our variants is raised."""
    found: dict[str, Any] = {}
    unequal: dict[str, str] = {}
    known: dict[Oracle, Exact] = {}
    for name, variant in problem.variants.items():
        try:
            found[name] = errors(problem, variant, mode, known)
        except Exception as error:  # such as that of a peer that does not support this shape, type or GPU
            if name.startswith("ours"):
                raise
            lines = str(error).strip().splitlines() or [""]
            failed = f"it fails: {type(error).__name__}: {lines[0][:200]}"
            unequal[name] = lines[0] if isinstance(error, Unequal) else failed
    return found, unequal


def rows_of(op: Operation, case: Case, device: Cpu, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """A row for each mode and each variant that is not in ``without``. ``finish`` adds the seconds of the floor when
    the rates are known."""
    torch.compiler.reset()  # each case is compiled for its shape
    torch.manual_seed(0)
    device.release()
    problem = op.build(case, device.device)
    problem.variants = {name: v for name, v in problem.variants.items() if name not in without}
    backend = next(s.backend for s in _backend.status() if (s.op, s.device) == (op.name, device.device.type))
    whole = case.modes[-1]
    found, unequal = _checked(problem, whole)
    right = {name: v for name, v in problem.variants.items() if name not in unequal}
    rows = []
    for mode in case.modes:
        variants = {name: v for name, v in right.items() if mode in v.modes}
        steps = {name: v.timed for name, v in variants.items()}
        timed = timed_mode(device, problem, steps, mode, device.seconds_a_group, ROUNDS)
        graphs = _graphs(device, problem, variants, mode, timed) if mode == whole else None
        for name, seconds in timed.seconds.items():
            run = prepared(problem, steps[name], mode, 1) if mode == whole else None
            rows.append(
                {
                    **shared(op, case),
                    "shape": case.sizes,
                    "mode": mode,
                    "variant": name,
                    "less": variants[name].less,
                    "backend": backend if name.startswith("ours") else "torch",
                    "time": quantiles(seconds),
                    "rounds": len(seconds),
                    "calls_a_round": timed.calls[name],
                    "ratio": quantiles([a / b for a, b in zip(seconds, timed.seconds["ours"])]),
                    "floor": op.floor(case, mode)._asdict(),
                    "graph": quantiles(graphs.seconds[name]) if graphs and name in graphs.seconds else None,
                    "host": quantiles(timed.host[name])["median"] or None,
                    "peak_bytes": device.peak_bytes(run) if run else None,
                    "launches": device.launches(prepared(problem, steps[name], mode, 1)) if run else None,
                    "error": found[name] if run else None,
                    "target_s": case.target_s if name == "ours" and run else None,
                    "target_fraction": case.target_fraction if name == "ours" and run else None,
                }
            )
    for name, sentence in unequal.items():
        floor = op.floor(case, whole)._asdict()
        row = {**shared(op, case), "shape": case.sizes, "mode": whole, "variant": name}
        rows.append({**row, "less": problem.variants[name].less, "time": None, "unequal": sentence, "floor": floor})
    return rows


def _graphs(device: Cpu, problem: Problem, variants: dict[str, Variant], mode: str, timed: Timed) -> Timed | None:
    if min(timed.seconds["ours"]) > device.launch_bound_s:
        return None
    steps = {name: variant.timed for name, variant in variants.items() if variant.captured}
    return timed_graphs(device, problem, steps, mode, min(timed.calls.values()))


def _runs(problem: Problem, name: str, mode: str) -> bool:
    """Whether a variant exists at this size and runs, with enough memory; an error of one of ours is raised."""
    try:
        return name in problem.variants and bool(prepared(problem, problem.variants[name].timed, mode, 1)())
    except Exception:
        if name.startswith("ours"):
            raise
        return False


def growth_of(op: Operation, sweep: Sweep, device: Cpu, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """An entry for each variant: time, memory and the floor, by size."""
    entries: dict[str, dict[str, Any]] = {}
    for size in sizes:
        torch.manual_seed(0)
        case = sweep.case.along(sweep.along, size)
        mode = case.modes[-1]
        problem = op.build(case, device.device)
        if size == sizes[0]:
            problem.variants = {name: v for name, v in problem.variants.items() if name not in NOT_SWEPT}
            right = _checked(problem, mode)[0]
        steps = {name: problem.variants[name].timed for name in right if _runs(problem, name, mode)}
        timed = timed_mode(device, problem, steps, mode, SECONDS_A_POINT, POINT_ROUNDS)
        fixed = {key: value for key, value in case.sizes.items() if key != sweep.along}
        for name, seconds in timed.seconds.items():
            new = {**shared(op, case), "along": sweep.along, "fixed": fixed, "mode": mode, "variant": name}
            new["less"] = problem.variants[name].less
            entry = entries.setdefault(name, new | {"sizes": [], "seconds": [], "peak_bytes": [], "floors": []})
            entry["sizes"].append(size)
            entry["seconds"].append(quantiles(seconds)["median"])
            entry["peak_bytes"].append(device.peak_bytes(prepared(problem, steps[name], mode, 1)))
            entry["floors"].append(op.floor(case, mode)._asdict())
    return list(entries.values())


def finish(rows: list[dict[str, Any]], growth: list[dict[str, Any]], rates: Rates) -> dict[str, Any]:
    """The rows and the growth, each with the fraction of the floor's speed that it reaches, by the median rates of the
    session."""
    known = rates.report()
    operations = []
    for row in rows:
        seconds = floor_seconds(row["floor"], row["dtype"], known)
        median = row["time"]["median"] if row["time"] else None
        floor = {**row["floor"], "seconds": seconds}
        operations.append({**row, "floor": floor, "fraction": seconds / median if median else None})
    sweeps = []
    for entry in growth:
        floors = [floor_seconds(floor, entry["dtype"], known) for floor in entry["floors"]]
        fractions = [floor / seconds for floor, seconds in zip(floors, entry["seconds"])]
        sweeps.append({key: value for key, value in entry.items() if key != "floors"} | {"fractions": fractions})
    return {"rates": known, "operations": operations, "growth": sweeps}
