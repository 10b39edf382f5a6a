"""Faults of the benchmarks and their report."""

from __future__ import annotations

from mutations.mutation import within

MEASURE = ("tests/test_bench_measure.py",)

BENCH = [
    *within(
        "bench",
        "bench/measure.py",
        MEASURE,
        ("a NaN is within every limit", "not error <= problem.limit", "error > problem.limit"),
        ("variants go in the same order in all rounds", "            shuffle(order)\n", ""),
        ("a ratio is upside down", "[a / b for a, b in zip(seconds,", "[b / a for a, b in zip(seconds,"),
        ("time is not divided by the calls", "device.seconds(run) / calls[name]", "device.seconds(run)"),
        ("a fraction is upside down", "seconds / median if median else None", "median / seconds if median else None"),
    ),
    *within(
        "bench",
        "bench/devices.py",
        MEASURE,
        ("bytes that are written do not count", "2 * self.source.nbytes", "self.source.nbytes"),
    ),
    *within(
        "bench",
        "batchkern/bench_report/fit.py",
        ("tests/bench_report/test_fit.py",),
        ("overhead counts in an exponent", ">= TIMES_OVERHEAD * least", ">= least"),
        ("the three smallest sizes are fitted", "else points[-POINTS:]", "else points[:POINTS]"),
    ),
    *within(
        "bench",
        "batchkern/bench_report/results.py",
        ("tests/bench_report/test_results.py",),
        (
            "the oldest file comes first",
            "key=lambda results: results.date, reverse=True)",
            "key=lambda results: results.date)",
        ),
    ),
]
