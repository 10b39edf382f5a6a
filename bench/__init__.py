"""The benchmarks: run by ``pytest bench`` (``make bench``, ``make gpu``), shown by ``batchkern bench report``."""
