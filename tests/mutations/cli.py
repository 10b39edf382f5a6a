"""Faults of the command line."""

from __future__ import annotations

from mutations.mutation import within

CLI = [
    *within(
        "cli",
        "batchkern/cli/_streams.py",
        ("tests/cli/test_streams.py",),
        ("a full disk ends a training", "        except OSError as error:\n", "        except EOFError as error:\n"),
        ("unwritten output is no failure", "if out.failure is None or ended.code:", "if True:"),
        ("arguments move the cursor", 'visible(text, keep="\\n\\t")', "text"),
        ("letters that a terminal lacks are an error", '"backslashreplace"', '"strict"'),
    ),
    *within(
        "cli",
        "batchkern/errors.py",
        ("tests/cli/test_environment.py",),
        ("a CPU's memory never runs out", "return isinstance(error, RuntimeError) and any(", "return False and any("),
    ),
    *within(
        "cli",
        "batchkern/bench_report/results.py",
        ("tests/bench_report/test_results.py",),
        (
            "what is no text is a traceback",
            "except ValueError:  # the content is not UTF-8",
            "except ZeroDivisionError:  #",
        ),
    ),
    *within(
        "cli",
        "batchkern/strategies/__init__.py",
        ("tests/strategies/test_parse.py",),
        ("a deep text is a traceback", "TypeError, RecursionError, MemoryError):", "TypeError):"),
        ("a word passes for a number", "if not _fits(options[option], str(known[option].type)):", "if False:"),
    ),
]
