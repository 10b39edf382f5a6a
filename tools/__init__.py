"""Scripts for developers of batchkern: ``make gpu``, ``make resources``, ``make triton-resources``."""
