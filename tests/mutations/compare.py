"""Faults of comparisons and their statistics."""

from __future__ import annotations

from mutations.mutation import within

STATISTICS = ("tests/compare/test_statistics.py",)

COMPARE = [
    *within(
        "compare",
        "batchkern/compare/statistics.py",
        STATISTICS,
        ("an interval from a normal, not a t", ".t.ppf(1 - LEVEL / 2, len(values) - 1)", ".norm.ppf(1 - LEVEL / 2)"),
        ("a deviation with n, not n - 1", "statistics.stdev(values)", "statistics.pstdev(values)"),
        ("an interval of 90 %", "ppf(1 - LEVEL / 2,", "ppf(1 - LEVEL,"),
        ("a degree of freedom too many", "1 - LEVEL / 2, len(values) - 1)", "1 - LEVEL / 2, len(values))"),
        (
            "p-values are corrected by a method that finds more",
            'alpha=LEVEL, method="holm")',
            'alpha=LEVEL, method="fdr_bh")',
        ),
        ("the sign test has one side", "2.0 ** (1 - len(seeds))", "2.0 ** -len(seeds)"),
        ("an accuracy that is met exactly is not reached", "if accuracy >= target", "if accuracy > target"),
    ),
    *within(
        "compare",
        "batchkern/compare/statistics.py",
        STATISTICS,
        (
            "a median of those that got there",
            "math.inf if x is None else x for x in reached)",
            "x for x in reached if x)",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/workers.py",
        ("tests/compare/test_workers.py",),
        ("who does not end is waited for", "            process.kill()\n", ""),
        ("a task that was not read ends the comparison", "except (EOFError, OSError):", "except EOFError:"),
        (
            "what cannot be given back ends the worker",
            "        except Exception as error:  # raised by the classes of an outcome, before",
            "        except EOFError as error:  # before",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/arms.py",
        ("tests/compare/test_arms.py",),
        (
            "a backward pass costs as much as a forward pass",
            "samples_forward + 2 * samples_backward",
            "samples_forward + samples_backward",
        ),
        (
            "the first number of epochs that is tried is taken",
            "for count in (guess - 1, guess, guess + 1):",
            "for count in (guess,):",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/running.py",
        ("tests/compare/test_running.py", "-k", "writes_to"),
        (
            "files of a training that is at work are removed",
            "        with locked(directory):\n            pass\n",
            "        pass\n",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/running.py",
        ("tests/compare/test_running.py", "-k", "damaged_results"),
        ("a curve that is cut short is summarised", 'len(values) != outcome["epochs"] or', "False or"),
    ),
    *within(
        "compare",
        "batchkern/compare/running.py",
        ("tests/compare/test_running.py", "-k", "that_is_gone or damaged or links"),
        (
            "a run whose directory is gone counts as finished",
            'if not o["error"] and _is_shown(out, o)]',
            'if not o["error"]]',
        ),
        (
            "the directory of a run may be anywhere",
            'if outcome["directory"] != str(RunOf.recorded(outcome).directory):',
            "if False:",
        ),
        ("links are followed", "if (out / place).is_symlink():", "if False:"),
    ),
    *within(
        "compare",
        "batchkern/records.py",
        ("tests/compare/test_running.py", "-k", "damaged"),
        ("a seed may be a path", "    seeds: list[Whole]\n", "    seeds: list[Any]\n"),
    ),
    *within(
        "compare",
        "batchkern/plots.py",
        ("tests/test_plots.py", "-k", "dollar"),
        ("dollar signs are mathematics", 'text.replace("$", r"\\$")', "text"),
    ),
    *within(
        "compare",
        "batchkern/compare/tables.py",
        ("tests/compare/test_report.py",),
        (
            "verdicts by p-values that are not corrected",
            'found = test["p_corrected"] < LEVEL',
            'found = test["p"] < LEVEL',
        ),
    ),
]
