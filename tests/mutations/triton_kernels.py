"""Faults of the Triton kernels, which the tests run in the interpreter."""

from __future__ import annotations

from mutations.mutation import UNCOMPILED, within

INTERPRETER = ("--kernels", "interpreter")
TRITON_NUMBERS = (*INTERPRETER, "tests/triton")
TRITON_AUGMENT = (*INTERPRETER, "tests/ops/test_augment_latent.py", *UNCOMPILED)
TRITON_KL = (*INTERPRETER, "tests/ops/test_soft_label_kl.py", *UNCOMPILED)
TRITON_LONG = (*INTERPRETER, "tests/ops/test_soft_label_kl_kernel.py", "-k", "many_classes or higher_as_a_whole")

TRITON = [
    *within(
        "triton",
        "batchkern/triton/random.py",
        TRITON_NUMBERS,
        (
            "rows beyond 32 bits have the numbers of others",
            "rows.to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None]",
            "rows.to(tl.uint32)[:, None], (rows * 0).to(tl.uint32)[:, None]",
        ),
        ("words are used twice", "x2, x3 = box_muller(c, d, sigma)", "x2, x3 = box_muller(a, b, sigma)"),
    ),
    *within(
        "triton",
        "batchkern/triton/random.py",
        TRITON_AUGMENT,
        (
            "noise is not clipped below",
            "return tl.clamp(interleave(x0, x1, x2, x3), -tau, tau)",
            "return tl.minimum(interleave(x0, x1, x2, x3), tau)",
        ),
        (
            "one column of four is never dropped",
            "tl.where(d >= least, scale, 0.0),",
            "tl.where(d >= 0, scale, 0.0),",
        ),
    ),
    *within(
        "triton",
        "batchkern/triton/augment_latent.py",
        TRITON_AUGMENT,
        (
            "no mask at the end of a row",
            "mask = real[:, None] & (columns < width)[None, :]",
            "mask = real[:, None] & (columns >= 0)[None, :]",
        ),
        (
            "rows are taken to be dense",
            "of_x[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)\n    if copy",
            "of_x[:, None] * width + columns[None, :], mask, 0.0).to(tl.float32)\n    if copy",
        ),
        (
            "the last Gaussian copy has no gradient",
            "for copy in range(0, 1 + gaussian):",
            "for copy in range(0, gaussian):",
        ),
        ("a Hadamard basis of the padded width's norm", "size / width**0.5", "size / (pieces * piece) ** 0.5"),
    ),
    *within(
        "triton",
        "batchkern/triton/augment_latent.py",
        TRITON_NUMBERS,
        ("pieces of a row have each other's signs", "_signs(piece & those)", "_signs(piece ^ those)"),
        (
            "the noise of a second part is that of the first",
            "deviation, clip, first, last, buffer)",
            "deviation, clip, batch, batch + last - first, buffer)",
        ),
        (
            "copies of a tile lie apart in the grid",
            "tile, copy = (place - before) // copies, (place - before) % copies\n",
            "each = tl.cdiv(batch, ROWS) * parts\n"
            "        tile, copy = (place - before) % each, (place - before) // each\n",
        ),
        (
            "a second part of pieces is the sum of the first",
            "of_x = ((first + row) // gaussian).to(tl.int64)",
            "of_x = (row // gaussian).to(tl.int64)",
        ),
    ),
    *within(
        "triton",
        "batchkern/triton/launch.py",
        TRITON_NUMBERS,
        ("loads of 16 bytes where a tensor begins at 8", "if any(x.data_ptr() % 16", "if any(x.data_ptr() % 8"),
        ("a stride is not looked at", "for n in (x.stride(0), x.shape[1])", "for n in (x.shape[1],)"),
    ),
    *within(
        "triton",
        "batchkern/triton/soft_label_kl.py",
        (*INTERPRETER, "tests/triton/test_triton_soft_label_kl.py"),
        ("an upstream gradient other than 1 is left out", "tl.where(scale == 1.0, 0, tiles)", "0 * tiles"),
        ("a gradient of another type is not written", "if IN_PLACE:", "if BLOCK:"),
        ("tiles beyond the first of a program are left out", "tiles, tl.num_programs(0)):", "tiles, tiles + 1):"),
        ("a known factor is not in the gradient", "*strides, k, scale * k / rows\n", "*strides, k, k / rows\n"),
    ),
    *within(
        "triton",
        "batchkern/triton/soft_label_kl.py",
        TRITON_KL,
        ("a class that is absent is NaN", "    u = tl.where(u < 128.0, u, 128.0)\n", ""),
        (
            "virtual rows are taken row by row, not copy by copy",
            "rows_q = copy.to(tl.int64) * batch + rows\n",
            "rows_q = rows * copies + copy.to(tl.int64)\n",
        ),
        (
            "the sign of the gradient of the soft labels",
            "total -= u + tl.load(kl + row_q)",
            "total += u + tl.load(kl + row_q)",
        ),
        ("the gradient without the temperature", "*strides, k, scale * k / rows\n", "*strides, k, scale / rows\n"),
    ),
    *within(
        "triton",
        "batchkern/triton/soft_label_kl.py",
        TRITON_LONG,
        (
            "a sum is not rescaled when the maximum rises",
            "sums = sums * tl.exp2((maxima - base) * scale) + ",
            "sums = sums + ",
        ),
        ("the last block of a long row is left out", "blocks = tl.cdiv(classes, BLOCK)", "blocks = classes // BLOCK"),
    ),
]
