"""Scripts for those who work on batchkern: ``make gpu``, ``make resources``, ``make triton-resources``."""
