"""The reading side of the benchmarks: tables, plots and the figures of README.md, from JSON files alone.

What measures, and writes these files, is ``bench/`` of a checkout. Nothing here needs a kernel, a GPU or the machine
that was measured.
"""

from batchkern.bench_report.markers import check, rewrite
from batchkern.bench_report.report import page, write_report
from batchkern.bench_report.results import Results, load, load_all

__all__ = ["Results", "check", "load", "load_all", "page", "rewrite", "write_report"]
