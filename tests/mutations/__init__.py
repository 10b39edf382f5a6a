"""The faults of ``mutants.py``: each a small change that somebody could make, and the tests that are to find it.

A fault is what is wrong, the text before, which its file has once, and the text after. The tests are the narrowest that
mirror the file; ``-k`` picks some where all of a file would take minutes. One that the tests are known not to find has
a fourth entry, which says why.
"""

from __future__ import annotations

from mutations.bench import BENCH
from mutations.cli import CLI
from mutations.compare import COMPARE
from mutations.cpu_kernels import CPU
from mutations.cuda_kernels import CUDA
from mutations.data import DATA
from mutations.distributed import DISTRIBUTED
from mutations.mutation import Mutation as Mutation
from mutations.strategies import STRATEGIES
from mutations.training import TRAINING
from mutations.triton_kernels import TRITON
from mutations.wrappers import WRAPPERS

MUTATIONS = [*CPU, *CUDA, *TRITON, *WRAPPERS, *STRATEGIES, *TRAINING, *DISTRIBUTED, *COMPARE, *DATA, *BENCH, *CLI]
