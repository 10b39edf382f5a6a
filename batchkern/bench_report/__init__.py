"""Reports of the benchmarks: tables, plots and the figures in README.md, made from JSON files alone.

The measurements, which write these files, are in ``bench/`` of the repository. Nothing here needs a kernel, a GPU or
the machine on which the benchmarks ran.
"""

from batchkern.bench_report.markers import check, rewrite
from batchkern.bench_report.report import page, write_report
from batchkern.bench_report.results import Results, load, load_all

__all__ = ["Results", "check", "load", "load_all", "page", "rewrite", "write_report"]
