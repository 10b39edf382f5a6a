"""``python -m batchkern`` is the command ``batchkern``."""

from batchkern.cli import main

if __name__ == "__main__":
    main()
