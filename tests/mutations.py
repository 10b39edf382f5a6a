"""The faults of ``mutants.py``: each a small change that somebody could make, and the tests that are to find it.

A fault is what is wrong, the text before, which its file has once, and the text after. The tests are the narrowest that
mirror the file; ``-k`` picks some where all of a file would take minutes. One that the tests are known not to find has
a fourth entry, which says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    area: str
    file: str
    fault: str
    before: str
    after: str
    tests: tuple[str, ...]
    """Arguments of pytest."""
    survives: str = ""
    """Why the tests do not find it, where that is known."""

    @property
    def built_by(self) -> str:
        """``cpu``: the module has to be built; ``host``: the tests build a library; nothing: neither."""
        if "host" in self.tests:
            return "host"
        return "cpu" if self.file.startswith("csrc/") else ""

    def misplaced(self, root: Path) -> str:
        """Why the fault cannot be put into the file; empty where it can."""
        file = root / self.file
        times = file.read_text().count(self.before) if file.exists() else 0
        return "" if times == 1 and self.before != self.after else f"its text is there {times} times, not once"

    def applied(self, text: str) -> str:
        return text.replace(self.before, self.after)


def within(area: str, file: str, tests: tuple[str, ...], *faults: tuple[str, ...]) -> Iterator[Mutation]:
    for fault, before, after, *survives in faults:
        yield Mutation(area, file, fault, before, after, tests, *survives)


UNCOMPILED = ("-k", "not compile")
CROSS_ENTROPY = ("tests/ops/test_trimmed_cross_entropy_kernel.py", *UNCOMPILED)
ROWS = ("tests/ops/test_cross_entropy_kernel.py",)
MEAN = ("tests/ops/test_trimmed_mean_kernel.py", *UNCOMPILED)
RANK = ("tests/ops/test_rank_batches_kernel.py",)
AUGMENT = ("tests/ops/test_augment_latent_kernel.py", *UNCOMPILED)
KL = ("tests/ops/test_soft_label_kl_kernel.py", *UNCOMPILED)

# --- kernels of the CPU -----------------------------------------------------------------------------------------------

CPU = [
    *within(
        "cpu",
        "csrc/cpu/loss_vectors.inl",
        MEAN,
        ("weights do not count", "return loss(j) * value_if(kept[j], weight[j]);", "return loss(j);"),
        (
            "what the lanes do not divide is left out",
            "for (int lane = 0; j < n; ++j, ++lane)",
            "for (int lane = 0; j < 0; ++j, ++lane)",
        ),
        (
            "a weight of a dropped row counts, so that its infinity makes the sum NaN",
            "value_if(kept[j], weight[j])",
            "weight[j]",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/select.cpp",
        MEAN,
        (
            "of equal losses the first are dropped",
            "for (int64_t i = n - 1; excess > 0; --i) {",
            "for (int64_t i = 0; excess > 0; ++i) {",
        ),
        ("k rounds halves away from zero", "std::nearbyint(keep", "std::round(keep"),
        ("k may be 0", "static_cast<double>(n))), int64_t{1}),", "static_cast<double>(n))), int64_t{0}),"),
    ),
    *within(
        "cpu",
        "csrc/cpu/select.cpp",
        RANK,
        (
            "a digit whose keys are all kept is passed over",
            "c.k > counts[digit]; --digit",
            "c.k >= counts[digit]; --digit",
        ),
        ("the upper end of a bracket counts twice", "above += c.keys[i] > high;", "above += c.keys[i] >= high;"),
        (
            "keys are sorted without their highest digit",
            "constexpr int kPasses = (32 + kBits - 1) / kBits;",
            "constexpr int kPasses = 32 / kBits;",
        ),
    ),
    *within(
        "cpu",
        "csrc/order.h",
        RANK,
        (
            "a NaN with a sign ranks lowest",
            "magnitude <= 0x7f800000u",
            "magnitude <= 0x7f800000u || bits >> 31",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/trimmed_mean.cpp",
        MEAN,
        ("the sum is divided by all rows", "scalar(sum / normalizer)", "scalar(sum / n)"),
        ("each sample has the first one's mask", "is_valid + s * rows", "is_valid"),
        ("NaN is kept among the lowest", "keys[i] = ~keys[i];", "keys[i] = keys[i] == ~0u ? ~0u : ~keys[i];"),
    ),
    *within(
        "cpu",
        "csrc/cpu/select.cpp",
        MEAN,
        (
            "rows that are left out come back above",
            "(chosen[i] || above) && !skipped[i]",
            "(chosen[i] && !skipped[i]) || above",
        ),
        (
            "what is above counts though it is masked",
            "keys[i] > *band.above && (!valid || valid[i])",
            "keys[i] > *band.above",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/cross_entropy.inl",
        CROSS_ENTROPY,
        (
            "smoothing without the sum of the class weights",
            "(log_sum + maximum) * o.weight_sum - dot",
            "(log_sum + maximum) * o.classes - dot",
        ),
        ("a dropped row is zeroed in part", "memset(grad, 0, a.columns * sizeof(T))", "memset(grad, 0, a.columns)"),
        (
            "the target's softmax without the smoothed total",
            "(g.total * exp_nonpositive(",
            "(g.factor * exp_nonpositive(",
        ),
        (
            "rows of a vector of rows are taken to lie side by side",
            "row_of<T>(a.logits, a.at, first + (r < rows ? r : 0))",
            "row_of<T>(a.logits, a.at, first) + (r < rows ? r : 0) * o.classes",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/cross_entropy.inl",
        ROWS,
        (
            "an ignored row's gradient is not zero",
            "} else if (!is_ignored(a.probabilities, a.target, i, o)) {",
            "} else {",
        ),
        (
            "a row with a gradient of its loss alone is left out",
            "if (factor == 0 && lse_factor == 0)",
            "if (lse_factor == 0)",
        ),
        (
            "the log-sum-exp has no gradient",
            "(peak + smooth * o.weight_sum) + lse_factor)",
            "(peak + smooth * o.weight_sum))",
        ),
        ("probabilities are not smoothed", "return weight * (keep * q + level);", "return weight * q;"),
        ("the last of equal logits is the prediction", "j < target; ++j) before |=", "j < 0; ++j) before |="),
    ),
    *within(
        "cpu",
        "csrc/cpu/cross_entropy_columns.inl",
        ROWS,
        (
            "the sum of earlier classes is not scaled",
            "sum[r] = t.sum[first + r] * exp_sum<1>(t.maximum + first + r, 1, base[r], 1.0f);",
            "sum[r] = t.sum[first + r];",
        ),
        (
            "a run goes on in the next sample",
            "const int64_t run = left < rows - r ? left : rows - r;",
            "const int64_t run = rows - r;",
        ),
        (
            "a target of a later block is not found",
            "if (target[r] >= c0 && target[r] < c0 + classes)",
            "if (c0 == 0 && target[r] < classes)",
        ),
        (
            "rows without a gradient keep what was there",
            "if (!all && !a.grad_is_zero)",
            "if (g.rows == 0 && !a.grad_is_zero)",
        ),
        ("the target takes off the log-sum-exp's gradient", "g.peak[n] = factor[r];", "g.peak[n] = g.total[n];"),
        (
            "each row that is gathered is the first",
            "to[n] = row_offset(a.grad_at, first + g.place[n]);",
            "to[n] = row_offset(a.grad_at, first + n);",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/reduce.inl",
        CROSS_ENTROPY,
        (
            "a sum is not rescaled when the maximum rises",
            "if (sum != 0 && highest > m) sum *= exp_nonpositive((m - highest) * scale);",
            "",
        ),
        (
            "the remainder of a row does not raise its maximum",
            "float m = highest_above(rest, kLanes, -INFINITY);",
            "float m = -INFINITY;",
        ),
        ("a row's remainder behind its groups is left out", "rest += exp_sum<1>(z + j, 1, base, scale);", ";"),
        (
            "the last class of an odd row is left out",
            "for (int64_t j = whole; j < n; ++j) rest[j - whole]",
            "for (int64_t j = whole; j < n - 1; ++j) rest[j - whole]",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/cross_entropy.cpp",
        CROSS_ENTROPY,
        (
            "weighted losses are divided by the number of rows",
            "normalizer += p.options.class_weight[class_of(p.indices, i)];",
            "normalizer += 1;",
        ),
        (
            "an ignored row is kept",
            "valid[i] = static_cast<int64_t>(target[i]) != p.options.ignore_index;",
            "valid[i] = true;",
        ),
        ("dropped rows are written, though few are kept", "&& are_few(upstream, p.rows)", "&& false"),
    ),
    *within(
        "cpu",
        "csrc/cpu/memory.cpp",
        CROSS_ENTROPY,
        ("a freed block is used where it does not fit", "if (block && whole <= block->bytes)", "if (block)"),
        ("freed blocks are given back", "give_back(spare(block->bytes).exchange(block));", "give_back(block);"),
    ),
    *within(
        "cpu",
        "csrc/cpu/soft_label_kl.inl",
        KL,
        (
            "zero times an infinite logarithm",
            "const float far = p[j] == 0 ? q : p[j] * (t - 1.0f) + q;",
            "const float far = p[j] * (t - 1.0f) + q;",
        ),
        (
            "a class absent from both rows has a divergence",
            "const float t = p[j] == 0 ? 0.0f : (load",
            "const float t = (load",
        ),
        (
            "t is not that of normalised rows",
            "const float shift = static_cast<float>(log1p(sum)),",
            "const float shift = 0,",
        ),
        (
            "the sign of the gradient of the soft labels",
            "p[j] * (t_sum[j] - mean) * a.grad_scale",
            "p[j] * (mean - t_sum[j]) * a.grad_scale",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/soft_label_kl.cpp",
        KL,
        (
            "the gradient without the temperature",
            "static_cast<float>(scale / temperature / static_cast<double>",
            "static_cast<float>(scale / static_cast<double>",
        ),
        (
            "a known factor is in the mean alone",
            "static_cast<float>(scale / temperature / static_cast<double>",
            "static_cast<float>(1 / temperature / static_cast<double>",
        ),
        ("an upstream gradient other than 1 is left out", "if (factor.item<double>() != 1)", "if (false)"),
        (
            "virtual rows are taken row by row, not copy by copy",
            "a.virtual_stride = batch * virtuals.stride(0);",
            "a.virtual_stride = virtuals.stride(0);",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/augment_latent.inl",
        AUGMENT,
        (
            "uniform numbers half a step too high",
            "static_cast<int32_t>(word >> 9)) + 0.5f)",
            "static_cast<int32_t>(word >> 9)) + 1.0f)",
        ),
        (
            "one of two normals is clipped on one side",
            "y > tau ? tau : y < -tau ? -tau : y",
            "y > tau ? tau : y",
        ),
        ("a seed loses its high half", "key_high = static_cast<uint32_t>(seed >> 32)", "key_high = 0"),
        ("the rounds of AVX-512 forget a word", "_mm512_srli_epi64(p0, 32), c3)", "_mm512_srli_epi64(p0, 32), p0)"),
        (
            "a Hadamard basis of the padded width's norm",
            "sqrt(static_cast<double>(columns))",
            "sqrt(static_cast<double>(width))",
        ),
    ),
    *within(
        "cpu",
        "csrc/cpu/augment_latent.cpp",
        AUGMENT,
        ("the last Gaussian copy's gradient is masked", "if (copy <= gaussian)", "if (copy < gaussian)"),
    ),
    *within(
        "cpu",
        "csrc/cpu/elements.h",
        AUGMENT,
        ("bfloat16 rounds halves up, not to even", "bits + 0x7fffu + (bits >> 16 & 1u)", "bits + 0x8000u"),
    ),
    *within(
        "cpu",
        "csrc/cpu/elements.h",
        CROSS_ENTROPY,
        ("half of the tails are left out", "*tail = first_tail + second_tail;", "*tail = first_tail;"),
    ),
]

# --- CUDA kernels, on the host ----------------------------------------------------------------------------------------

HOST = ("--kernels", "host")

CUDA = [
    *within(
        "cuda",
        "csrc/order.h",
        (*HOST, *RANK),
        (
            "a negative zero ranks below zero",
            "bits = magnitude == 0 ? 0 : bits;",
            "",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/device.cuh",
        (*HOST, *MEAN),
        (
            "no barrier before scratch memory is used again",
            "        __syncthreads();  // the last call's values have been read\n",
            "",
        ),
        ("a ticket is not put back", "            *ticket = 0;\n", ""),
    ),
    *within(
        "cuda",
        "csrc/cuda/select.cuh",
        (*HOST, *MEAN),
        ("the last of the kept equal losses is dropped", "i <= last_index", "i < last_index"),
        ("k rounds halves away from zero", "rint((tensor", "round((tensor"),
        ("k may be 0", ": min(count, 1u);", ": 0u;"),
        ("of equal rows that are counted all or none are kept", "(other == key && j + w < own)", "false"),
        (
            "a thread holds its first row again and again",
            "rows.load(min(first + j * kThreads, end - 1))",
            "rows.load(min(first, end - 1))",
        ),
        ("counts of later passes are left behind", "b < passes * kBins", "b < kBins"),
        ("32 bits are shifted by 32", "uint64_t{value} >> upper == result", "value >> upper == result"),
        (
            "the rows that blocks do not divide are left out",
            "n * (blockIdx.x + int64_t{1}) / gridDim.x",
            "n / gridDim.x * (blockIdx.x + int64_t{1})",
        ),
        (
            "no barrier between the counts of warps and their sum",
            "        if (lane() == kWarp - 1) shared.scratch[warp()] = before;\n        __syncthreads();\n",
            "        if (lane() == kWarp - 1) shared.scratch[warp()] = before;\n",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/trimmed_mean.cuh",
        (*HOST, *MEAN),
        (
            "the upstream gradient is rounded before it is divided",
            "const float share = *a.upstream / *a.normalizer;",
            "const float share = to_float(from_float<T>(*a.upstream)) / *a.normalizer;",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/rank_batches.cuh",
        (*HOST, *RANK),
        ("what fills up a sort comes first", "chosen[j] = ~uint64_t{0};", "chosen[j] = 0;"),
        (
            "no barrier between the steps of a sort",
            "stride > 0; stride /= 2) {\n            __syncthreads();\n",
            "stride > 0; stride /= 2) {\n",
        ),
        (
            "all blocks write the rows they chose to one place",
            "a.gathered[shared.place + j] = chosen[j];",
            "a.gathered[j] = chosen[j];",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/select.cuh",
        (*HOST, *CROSS_ENTROPY),
        (
            "weighted losses are divided by the number of rows",
            "write_mean(out, chosen.sum, rows.weighted() ? chosen.weight : chosen.k);",
            "write_mean(out, chosen.sum, chosen.k);",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/select.cuh",
        (*HOST, *MEAN),
        (
            "rows that are left out come back above",
            "result = result && !skipped.keeps(key, i);",
            "result = result && (key > rows.above || !skipped.keeps(key, i));",
        ),
        ("NaN among the lowest does not take part", "max(~key, 1u)", "~key"),
        (
            "the second threshold starts at the first's counts",
            "selector.find(rows, survey, first, threshold.passes)",
            "selector.find(rows, survey, first, 0)",
        ),
        ("each sample has the first one's weights", "result.weights += first * weight_stride;", "result.weights += 0;"),
    ),
    *within(
        "cuda",
        "csrc/cuda/cross_entropy_forward.cuh",
        (*HOST, *CROSS_ENTROPY),
        (
            "the last class behind the vectors is left out",
            "share.first ? a.classes : 0);",
            "share.first ? a.classes - 1 : 0);",
        ),
        (
            "the first vector of rows at odd addresses is left to nobody",
            "edges(row, first * kN, last * kN,",
            "edges(row, 0, last * kN,",
        ),
        (
            "smoothed distances move the wrong way when the maximum rises",
            "(base_of(a.maximum) - base) * a.weight",
            "(base - base_of(a.maximum)) * a.weight",
        ),
        (
            "rows share one ticket",
            "is_last(a.row_tickets + row, gridDim.y, shared.last)",
            "is_last(a.row_tickets, gridDim.y, shared.last)",
        ),
        ("an ignored row takes part in the ranking", "a.keys[i] = 0;", "a.keys[i] = order_key(0.0f);"),
        (
            "one of four sums is left out",
            "state.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);",
            "state.sum += (sums[0] + sums[1]) + sums[2];",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/cross_entropy_backward.cuh",
        (*HOST, *CROSS_ENTROPY),
        (
            "of a target beside the vectors nothing is taken off",
            "return column == target ? value - peak : value;",
            "return value;",
        ),
        (
            "of a target in a vector nothing is taken off",
            "z[j] -= first + j == g.target ? g.peak : 0.0f;",
            "z[j] -= 0.0f;",
        ),
        (
            "the elements behind a dropped row's vectors are not zeroed",
            "    if (share.first && place < parts.tail) grad[classes - parts.tail + place] = from_float<T>(0.0f);\n",
            "",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/cross_entropy_narrow.cuh",
        (*HOST, *CROSS_ENTROPY),
        ("a vector is read where its first row is kept alone", "r <= tile.row_of(end)", "r <= tile.row_of(begin)"),
        ("rows of whole vectors lie where there is no room for them", "(padded ? row_of(v * kPerVector<T>) : 0)", "0"),
        ("the elements behind the last vector are left out", "if (e < count * classes) use(e);", ""),
        ("an ignored row takes part in the ranking", "a.keys[i] = ignored ? 0 : ", "a.keys[i] = "),
    ),
    *within(
        "cuda",
        "csrc/cuda/cross_entropy_general.cuh",
        (*HOST, *ROWS),
        ("the moment does not follow the maximum", "factor * (a.moment + down * a.sum)", "factor * a.moment"),
        ("the later of equal columns is the highest", "b.place < a.place)) a.place", "b.place > a.place)) a.place"),
        (
            "a row's parts are those of its neighbour",
            "shared.states[threadIdx.x + i * stride]",
            "shared.states[threadIdx.x + i]",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/elements.cuh",
        (*HOST, *CROSS_ENTROPY),
        (
            "a short row may have more elements before its vectors than in all",
            "min(kPerVector<T> - past, n)",
            "kPerVector<T> - past",
        ),
        (
            "bytes of two vectors are joined as if all began at words",
            "const int bits = past % 4 * 8;",
            "const int bits = 0;",
        ),
        (
            "an unaligned group is the vector that it begins in, twice",
            "vectors[min(group + i * kStep, end - 1) + 1]",
            "vectors[min(group + i * kStep, end - 1)]",
        ),
    ),
    *within(
        "cuda",
        "csrc/cuda/cross_entropy.cpp",
        (*HOST, *CROSS_ENTROPY),
        ("rows are taken to be dense", "p.layout(),", "{p.rows, 0, p.columns, 1},"),
    ),
]

# --- Triton kernels, in the interpreter -------------------------------------------------------------------------------

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

# --- wrappers ---------------------------------------------------------------------------------------------------------

LINEAR = ("tests/ops/test_linear_trimmed_cross_entropy_kernel.py", *UNCOMPILED)

WRAPPERS = [
    *within(
        "wrappers",
        "batchkern/ops/_public.py",
        ("tests/ops/test_public.py", "tests/ops/test_checks.py"),
        ("arguments by name are not looked at", "args + tuple(kwargs.values())", "args"),
        ("the compiler meets the overrides", "if is_dynamo_compiling():", "if False:"),
        ("freed memory is read", "if any(map(_is_freed, arguments)):", "if False:"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_autograd.py",
        ("tests/ops/test_autograd.py",),
        ("a batch of gradients is taken for one", "if not is_batched(*grads):", "if True:"),
        (
            "a batch of gradients is overwritten",
            "    if is_batched(grad):\n        raise",
            "    if False:\n        raise",
        ),
        ("a batch can be differentiated twice", "if is_batched(*grads):  # what", "if False:  # what"),
    ),
    *within(
        "wrappers",
        "batchkern/reference.py",
        ("tests/ops/test_autograd.py", "-k", "traced"),
        ("torch.jit.trace meets a kernel", "torch._C._is_tracing() or", "False or"),
    ),
    *within(
        "wrappers",
        "batchkern/reference.py",
        ("tests/ops/test_autograd.py", "-k", "forward_mode"),
        ("forward mode meets a kernel", "or forward_ad._current_level >= 0)", "or False)"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/rank_batches.py",
        ("tests/ops/test_rank_batches.py", *UNCOMPILED),
        ("the count is rounded, not cut", "math.floor(fraction * size)", "round(fraction * size)"),
        (
            "a batch never seen ranks below all others",
            "torch.full((size,), math.inf,",
            "torch.full((size,), -math.inf,",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/reference.py",
        ("tests/ops/test_trimmed_mean.py", *UNCOMPILED),
        (
            "a rank's loss is not scaled for the average over ranks",
            "torch.where(kept, self.weight, 0).sum() / len(self.rows)",
            "torch.where(kept, self.weight, 0).sum()",
        ),
        (
            "ranks have equally many rows",
            "start = sum(self.rows[: self.rank])",
            "start = self.rank * self.rows[self.rank]",
        ),
        ("a sum over samples is that of one rank", "dist.all_reduce(total, group=group)", "pass"),
    ),
    *within(
        "wrappers",
        "batchkern/reference.py",
        ("tests/test_reference.py",),
        ("k may be 0", "torch.round(n.double() * keep).clamp(min=1)", "torch.round(n.double() * keep)"),
        (
            "NaN ranks lowest",
            "torch.where(x == 0, 0.0, torch.where(x.isnan(), math.nan, x))",
            "torch.where(x == 0, 0.0, torch.where(x.isnan(), -math.inf, x))",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/ops/trimmed_cross_entropy.py",
        ("tests/ops/test_trimmed_cross_entropy.py", *UNCOMPILED),
        (
            "logits that were overwritten count as unchanged",
            "        torch.autograd.graph.increment_version(logits)\n",
            "",
        ),
        ("a module forgets an option", "            ignore_index=self.ignore_index,\n", ""),
        (
            "a leaf may be overwritten",
            "        check_inplace_backward(logits)\n",
            "",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/ops/augment_latent.py",
        ("tests/ops/test_augment_latent.py", *UNCOMPILED),
        (
            "the backward pass does not rescale dropout",
            "drop_prob=drop_prob, rescale_dropout=rescale_dropout\n        )\n        return result",
            "drop_prob=drop_prob, rescale_dropout=False\n        )\n        return result",
        ),
        (
            "without a seed every call has the same numbers",
            "torch.randint(-(2**63), 2**63 - 1, (), device=device)",
            "torch.full((), torch.initial_seed(), device=device)",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_checks.py",
        ("tests/ops/test_augment_latent.py", *UNCOMPILED),
        (
            "an open end is taken for a closed one",
            "if not low <= x <= high or (open_low and x == low) or (open_high and x == high):",
            "if not low <= x <= high or (open_high and x == high):",
        ),
    ),
    *within(
        "wrappers",
        "batchkern/ops/soft_label_kl.py",
        KL,
        ("a gradient is scaled again by a second backward pass", "ctx.used = True", "ctx.used = False"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_chunked_linear.py",
        LINEAR,
        (
            "taking off dropped rows costs nothing",
            "taken_off = (1 - keep) * (1 + needs[1]) if",
            "taken_off = (1 - keep) * needs[1] if",
        ),
        ("dropped rows are added, not taken off", "~kept, -1 / normalizer, 0.0)", "~kept, 1 / normalizer, 0.0)"),
        ("sums of many chunks in bfloat16", "dtype=x.dtype if terms == 1 else torch.float32", "dtype=x.dtype"),
        ("room for one row too few", "math.floor(share * len(mask)) + 1)", "math.floor(share * len(mask)))"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_chunked_linear.py",
        ("tests/ops/test_linear_trimmed_cross_entropy.py", *UNCOMPILED),
        ("NaN of an ignored row spreads", "narrow.masked_fill(ignored, 0)", "narrow"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_chunked_linear.py",
        ("tests/ops/test_linear_cross_entropy.py", *UNCOMPILED),
        ("a cap has no derivative", "gradient.mul_(u.cosh_().reciprocal_().square_())", "u.cosh_()"),
        ("a scale has no derivative", "(x[self.index] * layer.scale)", "x[self.index]"),
        ("nor in the mean of all", "(logit_scale / normalizer)", "(1 / normalizer)"),
        ("words that are masked come back", "capped.masked_fill_(masked, -math.inf)", "capped"),
        ("rows need both gradients", "if x is not None]).any(0)", "if x is not None]).all(0)"),
        ("a promise is not looked at", "if promised is not None and count > promised:", "if False:"),
        ("an ignored row has the gradient of its cap", "logits.masked_fill_(ignored, 0)", "pass"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_sharded.py",
        ("tests/ops/test_sharded.py",),
        ("a gradient is the sum over processes", "/ ctx.mesh.size()", "/ 1"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_chunked_linear.py",
        ("tests/ops/test_sharded.py",),
        ("hidden has the gradient of one part", "dist.all_reduce(to_rows, group=shard.group)", "pass"),
    ),
    *within(
        "wrappers",
        "batchkern/ops/_sharded.py",
        ("tests/ops/test_sharded.py",),
        ("the last of equal words predicts", "dist.ReduceOp.MIN", "dist.ReduceOp.MAX"),
        ("a part is counted from the first word", "sum(sizes[: dist.get_rank(group)])", "0"),
        (
            "smoothing over one part",
            "label_smoothing * (lse - total / shard.words)",
            "label_smoothing * (lse - total / 5)",
        ),
        ("a masked part has a sum", "part = torch.where(empty, 0, torch.exp", "part = torch.where(False, 0, torch.exp"),
    ),
    *within(
        "wrappers",
        "batchkern/basis.py",
        ("tests/test_basis.py",),
        ("rows of unit norm, not columns", "columns.norm(dim=0, keepdim=True)", "columns.norm(dim=1, keepdim=True)"),
        ("an orthogonal basis that is not Haar", "return q * torch.where(r.diagonal() < 0, -1.0, 1.0)", "return q"),
        ("a Hadamard basis of the padded width's norm", "[:, :width] / width**0.5", "[:, :width] / x.shape[1] ** 0.5"),
    ),
    *within(
        "wrappers",
        "batchkern/_backend.py",
        ("tests/test_backend.py",),
        ("machine code does not serve later minor versions", "minor <= capability[1]", "minor == capability[1]"),
    ),
    *within(
        "wrappers",
        "batchkern/_past_the_loss.py",
        ("tests/test_causal_lm.py", *UNCOMPILED),
        ("layers called around the model are let pass", "if not self.inside and learns(layers, output):", "if False:"),
        ("training in evaluation mode is let pass", "loss.register_hook(refuse)", "pass"),
        ("a copy of a layer refuses too", 'state["inside"] = True', "pass"),
        ("an unpickled layer refuses too", '{**state, "inside": True}', "state"),
        ("a copy of a model refuses nothing", "self._base, self.inside = id(base), False", "pass"),
    ),
    *within(
        "wrappers",
        "batchkern/causal_lm.py",
        ("tests/test_causal_lm.py", *UNCOMPILED),
        ("a token predicts itself", "F.pad(labels, (0, 1), value=ignore_index)[..., 1:]", "labels"),
        ("the untrimmed loss counts ignored tokens", "losses.detach().sum() / counted.sum()", "losses.detach().mean()"),
        ("training without labels is let pass", "if not call.labelled and learns(model, output):", "if False:"),
        (
            "a loss made elsewhere is let pass",
            "unused and (hidden is not None or learns(model, output))",
            "unused and hidden",
        ),
        ("the excess is the loss", "score=losses.detach() - reference", "score=losses.detach()"),
        (
            "evaluation is of the hardest tokens",
            "if self._model.training:\n            loss =",
            "if True:\n            loss =",
        ),
        ("skip_logits is not heeded", " or bool(skip_logits)", ""),
        ("shift_labels alone are no labels", 'given["labels"] = kwargs["labels"] = given["shift_labels"]', "pass"),
        (
            "a scale that divides multiplies",
            "scale /= base.config.logits_scaling",
            "scale *= base.config.logits_scaling",
        ),
        ("any change of the logits is taken for a scale", "return self._checked\n\n\n", "return True\n\n\n"),
    ),
]

# --- strategies -------------------------------------------------------------------------------------------------------

STRATEGIES = [
    *within(
        "strategies",
        "batchkern/strategies/__init__.py",
        ("tests/strategies/test_parse.py",),
        ("a number that cannot be shown is taken", "    repr(value)\n", ""),
        ("text nested deeply ends in an error of Python", ", RecursionError, MemoryError)", ")"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/trimming.py",
        ("tests/strategies/test_trimming.py",),
        ("k is cut, not rounded", "max(round(keep * rows), 1)", "max(int(keep * rows), 1)"),
        (
            "other rows get a full pass",
            "argsort(descending=True, stable=True)",
            "argsort(stable=True)",
        ),
        ("the lowest are not asked for", '{"order": self.order, ', '{"order": "highest", '),
        ("nothing is skipped", '"skip": self.skip, ', '"skip": 0.0, '),
        ("rows above are not counted", "step.kept = int(chosen.sum())", "pass"),
        (
            "kept rows are trimmed once more",
            "if step.narrowed:\n            return super()",
            "if not step:\n            return super()",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/trimming.py",
        ("tests/test_resume.py", "-k", "auto_trimming"),
        (
            "what was timed is forgotten by a resume",
            'return {"compact_below": self.compact_below}',
            'return {"compact_below": 0.0}',
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/hard_batches.py",
        ("tests/strategies/test_hard_batches.py",),
        ("a smaller batch is ranked by its sum", "losses.mean()", "losses.sum()"),
        (
            "a batch's loss is recorded under the number of the update",
            "self.rounds.record(step.batch.number, ",
            "self.rounds.record(step.update % len(self.rounds.ledger), ",
        ),
    ),
    *within(
        "strategies",
        "batchkern/parts/rounds.py",
        ("tests/strategies/test_hard_batches.py",),
        (
            "both orders are that of the losses",
            'return chosen if self.order == "loss" else sorted(chosen)',
            "return chosen",
        ),
    ),
    *within(
        "parts",
        "batchkern/parts/samplers.py",
        ("tests/parts/test_samplers.py",),
        ("a round is planned before its losses", "replay.place == len(replay.order)", "False"),
        ("a pass ends with a round", "if sampler.epoch_over:\n", "if True:\n"),
        ("what was read ahead counts as done", "self._state(self._finished if self._unfinished else", "self._state("),
        (
            "a pass left early loses what was read ahead",
            "            self._go_to(self._finished)\n",
            "            pass\n",
        ),
        ("losses nobody recorded go unnoticed", "if self._drained and not self.in_flight and", "if False and"),
        ("a state without its losses is taken", 'if state["unfinished"]:', "if False:"),
        ("a saved ledger goes on changing", "self.rounds.ledger.losses.clone()", "self.rounds.ledger.losses"),
        ("a pass goes on beside a later one", "if own != self._passes:", "if False:"),
        ("a loader goes on beside a later pass", "if sampler.reader is not own:", "if False:"),
        ("a pass that ends takes the reader of a later one", "if sampler.reader is own:", "if True:"),
        (
            "a batch on its way is given a loss",
            "if len(self._unfinished) <= self.in_flight:",
            "if not self._unfinished:",
        ),
        ("states of any sampler are taken", 'or state["of"] != own["of"]:', "or False:"),
        ("ranks do not weigh their rows", "mean = mean * (rows / len(batch.indices))", "mean = mean / self.world"),
        (
            "all ranks have the same rows",
            "tensor_split(self.world)[self.rank].tolist()",
            "tensor_split(self.world)[0].tolist()",
        ),
    ),
    *within(
        "strategies",
        "batchkern/parts/subsets.py",
        ("tests/strategies/test_stepwise.py",),
        ("the rate of the steps in between", "1 / (10 * self.steps)", "1 / 10 * self.steps"),
        (
            "a step begins an epoch late",
            "bisect.bisect_right(self.bounds, epoch)",
            "bisect.bisect_left(self.bounds, epoch)",
        ),
        ("a decay is late by rounding", "self.decay_every * step_epochs) + 1e-9)", "self.decay_every * step_epochs))"),
        (
            "each epoch of the training is in the same order",
            'generator(seed, "epoch", epoch)',
            'generator(seed, "epoch")',
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/cutout.py",
        ("tests/strategies/test_cutout.py",),
        ("a square begins at its centre", "(centre[:, None] - size // 2)", "centre[:, None]"),
        ("the squares of all updates are the same", '"cutout", step.update)', '"cutout", step.batch.epoch)'),
        ("a square may be larger than the image", "self.size > shorter:", "self.size > 2 * shorter:"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/mixup.py",
        ("tests/strategies/test_mixup.py",),
        ("both images weigh the same", "weight * own + (1 - weight) * others", "(own + others) / 2"),
        (
            "labels are those of the partners",
            "mix(images, others, weight), mix(own,",
            "mix(images, others, weight), mix(theirs,",
        ),
        ("lambda is uniform", "betavariate(self.alpha, self.alpha)", "betavariate(1, 1)"),
        ("partners are the same in all updates", '"mixup partners", update)', '"mixup partners", 0)'),
    ),
    *within(
        "strategies",
        "batchkern/strategies/mixup.py",
        ("tests/strategies/test_mixup.py", "-k", "at_hand"),
        (
            "a rank's rows are mixed with the first ones",
            "fetch(partners[positions])",
            "fetch(partners[: len(positions)])",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/cutmix.py",
        ("tests/strategies/test_cutmix.py",),
        (
            "lambda is that before rounding and the border",
            "return images, mix(own, theirs, weight)",
            "return images, mix(own, theirs, 0.5)",
        ),
        ("the box has 1 - lambda of each side", "math.sqrt(1 - weight)", "1 - weight"),
        (
            "batches are mixed with the other probability",
            "numbers.random() >= self.probability",
            "numbers.random() < self.probability",
        ),
        (
            "height and width are exchanged",
            "half_y, half_x = height * ratio / 2, width * ratio / 2",
            "half_x, half_y = height * ratio / 2, width * ratio / 2",
        ),
    ),
    *within(
        "trainer",
        "batchkern/updater.py",
        ("tests/test_updater.py",),
        (
            "a batch weighs as much as any, however many rows it has",
            "loss * (rows / self.run.batch_size)",
            "loss * 1.0",
        ),
        ("accumulated gradients are summed, not averaged", "self.run.batch_size / self.window.rows)", "1.0)"),
        (
            "gradients that wait are lost before a passive batch",
            "        if self.window.cut_by(batch):\n            self._step()\n",
            "",
        ),
        ("chosen rows are compiled", "self.compiled if rows is None else self.model", "self.compiled"),
        ("the average is not updated", "            self.average.update()\n", "            pass\n"),
        (
            "gradients are clipped as if accumulated ones were one batch's",
            "if self.window.size > 1 and self.window.rows:",
            "if False:",
        ),
    ),
    *within(
        "trainer",
        "batchkern/averaging.py",
        ("tests/test_updater.py",),
        ("the average moves too fast", "1 - decay)", "decay)"),
        (
            "the rule of the beginning is left out",
            "min(self.decay, (1 + self.updates) / (10 + self.updates))",
            "self.decay",
        ),
        ("the weights are not put back", "                    value.copy_(before)\n", "                    pass\n"),
        ("a resume begins the rule anew", '        self.updates = saved_number(state, "updates")', "        pass"),
    ),
    *within(
        "trainer",
        "batchkern/rundir.py",
        ("tests/test_resume.py", "-k", "more_epochs or divide"),
        ("fewer epochs are taken for more", 'before < now["epochs"]', 'before != now["epochs"]'),
        (
            "a run that got more epochs does not say so",
            "self._write_config(self._config | {",
            "self._write_config(self._config | {} and {",
        ),
    ),
    *within(
        "data",
        "batchkern/data/datasets.py",
        ("tests/data/test_datasets.py",),
        (
            "rows draw the same in each update",
            'derived_seed(self.seed, "row", step, place)',
            'derived_seed(self.seed, "row", place)',
        ),
        ("a row's generator of NumPy is not set", "            np.random.seed(seed % 2**32)", "            pass"),
        ("a row's generator of Python is not set", "            random.seed(seed)\n", ""),
        ("the training's generators are drawn from", "            random.setstate(states[0])\n", ""),
        ("a worker outlives its parent", "        os._exit(1)\n", "        pass\n"),
        ("what was read ahead is not used", "if waiting == request:", "if False:"),
    ),
    *within(
        "data",
        "batchkern/files.py",
        ("tests/data/test_datasets.py", "-k", "killed"),
        ("a fork keeps the lock", "        fcntl.flock(descriptor, fcntl.LOCK_UN)\n", "        pass\n"),
    ),
    *within(
        "data",
        "batchkern/data/tensors.py",
        ("tests/data/test_tensors.py",),
        (
            "a constant feature is divided by nothing",
            "rows.mean(1), deviation.masked_fill(constant, 1.0)",
            "rows.mean(1), deviation",
        ),
        (
            "statistics are of rows, not of features",
            "self.inputs.transpose(0, 1).flatten(1).double()",
            "self.inputs.flatten(1).double()",
        ),
    ),
    *within(
        "data",
        "batchkern/data/tables.py",
        ("tests/data/test_tables.py",),
        (
            "classes of numbers are sorted as texts",
            "found = sorted(set(column.to_pylist()))",
            "found = sorted(set(_texts(column)))",
        ),
        ("places without a value are zeros", "    if count:\n", "    if False:\n"),
        ("clean labels become a feature", "if key not in left_out)", "if key != label)"),
        ("columns that training has not are left out silently", "    if unknown:\n", "    if False:\n"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/base.py",
        ("tests/data/test_tensors.py", "-k", "mask"),
        (
            "rows of masks count alike, however many of their places do",
            "return trimmed_mean(losses, keep, mask=mask, weight=places,",
            "return trimmed_mean(losses, keep, mask=mask,",
        ),
        (
            "places that do not count are averaged in",
            "losses.flatten(1).sum(1) / places.clamp(min=1), places",
            "losses.flatten(1).mean(1), places",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/batch_augmentation.py",
        ("tests/strategies/test_batch_augmentation.py",),
        ("passive batches are copied", "if batch.inject is None else batch", ""),
        ("the next batch is named without its copies", "rows.repeat(self.copies) for rows in", "rows for rows in"),
        (
            "copies of a sample are neighbours",
            "batch.indices.repeat(self.copies)",
            "batch.indices.repeat_interleave(self.copies)",
        ),
        ("copies that are the same are not warned of", "if not run.images_vary:", "if run.images_vary:"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/srip.py",
        ("tests/strategies/test_srip.py",),
        ("sigma is that of W^T W", "transposed @ (transposed.T @ v) - v", "transposed @ (transposed.T @ v)"),
        (
            "one power iteration",
            "return times(once / once.norm().clamp(min=torch.finfo(once.dtype).tiny)).norm()",
            "return once.norm()",
        ),
        ("the schedule is late", "if progress >= begin)", "if progress > begin or begin == 0)"),
        ("vectors are those of the first update", '"srip", step.update)', '"srip", 0)'),
        ("the penalty is computed in bfloat16", "enabled=False):", "enabled=True, dtype=torch.bfloat16):"),
        ("lambda is in the diagnostic", "self.sigma_sum + total.detach()", "self.sigma_sum + factor * total.detach()"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/infobatch.py",
        ("tests/strategies/test_infobatch.py",),
        ("the highest are pruned", "low = losses < ", "low = losses > "),
        ("the others count no more", "weights[low] = 1 / (1 - self.prune)", "pass"),
        ("the last epochs are pruned too", "epoch >= self.whole_from", "False"),
        (
            "the control has weights",
            "        else:\n            weights[low]",
            "        if True:\n            weights[low]",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/infobatch.py",
        ("tests/test_resume.py", "-k", "infobatch and every_single"),
        ("a resume prunes anew", '"weights": self.weights}', '"weights": torch.ones_like(self.weights)}'),
    ),
    *within(
        "strategies",
        "batchkern/strategies/base.py",
        ("tests/strategies/test_infobatch.py",),
        ("weights are forgotten", " * step.share.take(weights).to(losses)", ""),
    ),
    *within(
        "strategies",
        "batchkern/strategies/selective_backprop.py",
        ("tests/strategies/test_selective_backprop.py",),
        ("equal losses count as higher", "losses, right=True)", "losses)"),
        (
            "all losses are kept",
            "torch.cat([self.losses, losses])[-self.history :]",
            "torch.cat([self.losses, losses])",
        ),
        ("the control is none", "        if self.at_random:\n", "        if False:\n"),
        ("updates have losses for the distribution", 'if step.batch.only != "score":', "if False:"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/selective_backprop.py",
        ("tests/test_resume.py", "-k", "selective and every_single"),
        ("a resume forgets what waits", '"waiting": self.waiting}', '"waiting": self.waiting[:0]}'),
    ),
    *within(
        "strategies",
        "batchkern/updater.py",
        ("tests/strategies/test_selective_backprop.py",),
        ("losses count twice", 'first = 3 if step.batch.only == "update" else 0', "first = 0"),
        (
            "scored rows were seen twice",
            'samples_seen += 0 if step.batch.only == "update" else full',
            "samples_seen += full",
        ),
        ("a scoring pass costs nothing", "        self.counts.samples_forward += len(losses)\n", ""),
        ("scored rows count as kept", "losses, torch.arange(0, device=self.device))", "losses, None)"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/passive_injection.py",
        ("tests/strategies/test_combination.py",),
        ("scored batches are active ones", 'scored = active.only == "score"', "scored = False"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/importance_sampling.py",
        ("tests/strategies/test_importance_sampling.py",),
        (
            "smoothed labels are taken as hard ones",
            "(1 - label_smoothing) * wanted + label_smoothing / classes",
            "wanted",
        ),
        ("weights are of the batch that is drawn", "1 / (len(shares) * ", "1 / (step.kept * "),
        ("drawn without replacement", "replacement=True", "replacement=False"),
        ("the control samples by importance", "self.at_random or not", "not"),
        ("tau is that of one batch", "SMOOTHING * self.tau + (1 - SMOOTHING) * tau", "tau"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/importance_sampling.py",
        ("tests/test_resume.py", "-k", "importance and every_single"),
        ("a resume begins with plain batches", 'self.tau = float(state["tau"])', "pass"),
    ),
    *within(
        "strategies",
        "batchkern/updater.py",
        ("tests/strategies/test_importance_sampling.py",),
        ("rows are scored by their losses", "lambda: batch.figures[2]", "lambda: batch.figures[0]"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/rho.py",
        ("tests/strategies/test_rho.py",),
        (
            "a model scores what it has seen",
            "zip(halves, reversed(halves), strict=True)",
            "zip(halves, halves, strict=True)",
        ),
        ("the worst epoch's scores are kept", "min(epochs, key=", "max(epochs, key="),
        ("references cost nothing", "        return self.reference_epochs * (trained", "        return 0 * (trained"),
        ("the irreducible loss is added", "reducible = losses - ", "reducible = losses + "),
        (
            "dropout of references draws the training's numbers",
            'with torch.random.fork_rng([device] if device.type == "cuda" else []):',
            "if True:",
        ),
    ),
    *within(
        "strategies",
        "batchkern/trainer.py",
        ("tests/strategies/test_rho.py",),
        (
            "a resumed training prepares again",
            "        if self.counts.samples_forward:\n            return\n        started",
            "        started",
        ),
        (
            "what was prepared is not saved",
            "- started\n            self._save()\n",
            "- started\n",
        ),
    ),
    *within(
        "strategies",
        "batchkern/updater.py",
        ("tests/strategies/test_rho.py",),
        (
            "another model is scored in training mode",
            "        self.model.eval()\n        losses = []",
            "        losses = []",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/arms.py",
        ("tests/compare/test_arms.py", "-k", "made_up or forecast"),
        ("losses are not foreseen", "                strategy.observe(step, losses)\n", "                pass\n"),
        ("wrong labels are learned", "if mislabelled is not None:", "if False:"),
        ("reference models are not foreseen", "        counts.samples_forward += forward\n", ""),
    ),
    *within(
        "strategies",
        "batchkern/strategies/small_loss.py",
        ("tests/strategies/test_small_loss.py",),
        ("the highest count", 'epoch), order="lowest")\n\n', "epoch))\n\n"),
        ("epochs are counted from 1", "min(epoch / ", "min((epoch + 1) / "),
        (
            "the control is none",
            "        if self.at_random:\n            chosen = torch",
            "        if False:\n            chosen = torch",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/base.py",
        ("tests/strategies/test_random_selection.py", "tests/strategies/test_mixup.py"),
        ("all rows count", "mask if among is None else mask & among.to(mask.device)", "mask"),
    ),
    *within(
        "strategies",
        "batchkern/strategies/random_selection.py",
        ("tests/strategies/test_random_selection.py",),
        (
            "the rows of an epoch's batches are the same",
            'generator(step.run.seed, "random rows", step.update)',
            'generator(step.run.seed, "random rows", step.batch.epoch)',
        ),
        (
            "one row too many is kept",
            "step.kept = kept_rows(",
            "step.kept = 1 + kept_rows(",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/stochastic_augmentation.py",
        ("tests/strategies/test_stochastic_augmentation.py",),
        (
            "every update has the same noise",
            'derived_seed(seed, "augment numbers", moment)',
            'derived_seed(seed, "augment numbers")',
        ),
        ("soft labels always have a gradient", 'reference_grad=self.labels == "trained"', "reference_grad=True"),
        (
            "hard labels are those of another copy's rows",
            "torch.cat([target] * self.noise.copies)",
            "target.repeat_interleave(self.noise.copies)",
        ),
        (
            "the basis of an epoch is that of an iteration",
            '*decision) if self.per == "epoch" else place',
            "*decision) if False else place",
        ),
        ("omega stays where it is to move", "self.omega if self.omega_end is None else self.omega_end", "self.omega"),
        (
            "the vote is at the first layer always",
            "modules[chosen[-1][1]] if self.vote_layer is not None else self.modules[0]",
            "self.modules[0]",
        ),
    ),
    *within(
        "parts",
        "batchkern/parts/batch_loss.py",
        ("tests/parts/test_batch_loss.py",),
        (
            "rows that do not count are in the recorded mean",
            "else counts.sum().clamp(min=1)",
            "else target.numel()",
        ),
        ("evaluation is training", "if not self.training or not torch.is_grad_enabled():", "if False:"),
        (
            "the penalty is over ignored positions, too",
            "self.virtual.penalty(self._positions(counts))",
            "self.virtual.penalty()",
        ),
        ("the trimmed loss is recorded", "self.sampler.record(losses.sum() / rows)", "self.sampler.record(loss)"),
    ),
    *within(
        "parts",
        "batchkern/integrations/transformers.py",
        ("tests/integrations/test_transformers_strategies.py",),
        ("micro-batches count alike", "loss * ((labels != -100).sum() / num_items_in_batch)", "loss / 2"),
        ("a resumed training forgets its place", "part.load_state_dict(states[name])", "pass"),
        (
            "a batch of the passive set goes into the strategies' loss",
            "trainer.compute_loss_func, OutputLoss(F.cross_entropy)",
            "trainer.compute_loss_func, trainer.compute_loss_func",
        ),
    ),
    *within(
        "parts",
        "batchkern/integrations/lightning.py",
        ("tests/integrations/test_lightning_strategies.py",),
        ("all epochs are as long as the first", "trainer.reload_dataloaders_every_n_epochs = 1", "pass"),
        ("a batch that was read ahead is left out", "loader.sized = True", "pass"),
    ),
    *within(
        "parts",
        "batchkern/integrations/__init__.py",
        ("tests/integrations/test_lightning_strategies.py",),
        ("trimmed losses keep their keep", "if isinstance(module, LOSSES)", "if False"),
    ),
    *within(
        "parts",
        "batchkern/parts/virtual_samples.py",
        ("tests/parts/test_virtual_samples.py",),
        ("another layer's outputs are taken for logits", "output.shape[-1:] != logits[0].shape[-1:]", "False"),
        ("positions that are rows are cut off", "own = len(logits) // self.parts", "own = self.rows"),
        ("every pass has the same noise", '"augment numbers", moment, *', '"augment numbers", *'),
        ("a checkpointed layer draws anew", "if not again:", "if True:"),
        ("samples of a pass go into two penalties", "        self._stack.forget()\n        copies", "        copies"),
        ("positions that do not count are counted", "if mask is not None:", "if False:"),
        ("a sequence is one latent space", "if hidden.dim() == 3 else whole", "if False else whole"),
        ("evaluation has virtual samples", "if not layer.training or not (", "if not ("),
        ("passes of a resumed training count from 0", "self.passes = int(state)", "pass"),
        ("a stack that was left splits the next pass", "        self.rows = None\n        stacked", "        stacked"),
    ),
    *within(
        "parts",
        "batchkern/parts/passive.py",
        ("tests/parts/test_passive.py",),
        ("marks that are lost go unnoticed", "if self._unasked > UNASKED:", "if False:"),
        ("a state from within a pass is taken", 'if "loader" not in state and (', "if False and ("),
        (
            "each pass counts from 0",
            "        if self.pending:\n            yield",
            "        self.active = 0\n        if self.pending:\n            yield",
        ),
        (
            "a resume forgets the passive batch that is due",
            'self.pending, self.begun = bool(state["pending"]),',
            "self.pending, self.begun = False,",
        ),
        ("all batches use the second head", "if is_passive(batch) else nullcontext()", ""),
        ("the head stays", "delattr(self._classifier, NAME)", "pass"),
        (
            "the passive set begins anew",
            'for name in ("loader", "passive"):\n            if name in state:',
            'for name in ("loader",):\n            if name in state:',
        ),
    ),
    *within(
        "parts",
        "batchkern/parts/samplers.py",
        ("tests/parts/test_subsets.py",),
        ("an end is an empty pass", "if not count:", "if False:"),
    ),
    *within(
        "parts",
        "batchkern/parts/subsets.py",
        ("tests/parts/test_subsets.py",),
        ("calls are counted as epochs", "min(sampler.epoch, sampler", "min(calls, sampler"),
        ("an epoch that is over is not", "epoch + (epoch < self.batches.epochs and", "epoch + (False and"),
    ),
    *within(
        "strategies",
        "batchkern/parts/virtual_samples.py",
        ("tests/strategies/test_stochastic_augmentation.py",),
        (
            "a tied vote does not go to the raw prediction",
            "return counts + 0.5 * nn.functional.one_hot(votes[0], raw.shape[1])",
            "return counts",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/stochastic_augmentation.py",
        ("tests/test_diagnostics.py",),
        (
            "the penalty's figure starts from the last epoch's",
            "kl, self.kl_sum = float(self.kl_sum) / max(self.fired_in_epoch, 1), 0.0",
            "kl = float(self.kl_sum) / max(self.fired_in_epoch, 1)",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/passive_injection.py",
        ("tests/strategies/test_passive_injection.py",),
        ("a passive batch comes one late", "self._due(self.active):", "self._due(self.active - 1):"),
        (
            "an epoch ends before its passive batch",
            "active = replace(active, ends_epoch=False)",
            "active = replace(active)",
        ),
        (
            "passive images are normalised by 0 and 1",
            "self.feed = feed_of(data, data.statistics(),",
            "self.feed = feed_of(data, tuple(0 * x + i for i, x in enumerate(data.statistics())),",
        ),
    ),
    *within(
        "compare",
        "batchkern/analysis.py",
        ("tests/test_analysis.py",),
        ("more is always better", "sign, shares = -1 if lower else 1, []", "sign, shares = 1, []"),
        ("metrics share their tests", "key = (data, own[0].group, arm, metric)", "key = (data, own[0].group, arm, 0)"),
        ("files are replaced unasked", "if there and not overwrite:", "if False:"),
        ("old plots stay", "(out / file).unlink()", "pass"),
        (
            "arms with the runs of another budget are lost",
            "or arm not in again or baseline not in again",
            "or arm not in again",
        ),
        (
            "costs are of all seeds",
            "ended[seed], plain[seed]) for seed in ended if seed in plain",
            "a, b) for a in ended.values() for b in plain.values()",
        ),
    ),
    *within(
        "compare",
        "batchkern/training_results.py",
        ("tests/test_analysis.py",),
        (
            "lines of a course stand as in the file",
            "course = sorted(course, key",
            "course = list(course) or sorted(course, key",
        ),
        ("a failed run counts", "if (final or curve) and not failed:", "if final or curve:"),
        ("numbers that are none pass", "if math.isfinite(value) and", "if"),
        ("a seed 1.0 is not 1", "if whole and len(whole[1]) < 1000 else", "if False else"),
    ),
    *within(
        "compare",
        "batchkern/training_results.py",
        ("tests/compare/test_report.py",),
        ("each budget is in the order of its name", "budgets = tuple(dict.fromkeys(", "budgets = tuple(sorted("),
    ),
    *within(
        "compare",
        "batchkern/compare/tables.py",
        ("tests/test_analysis.py",),
        ("less is never better", 'test["mean"] < 0 if self.lower else', 'test["mean"] > 0 if self.lower else'),
    ),
    *within(
        "compare",
        "batchkern/compare/statistics.py",
        ("tests/test_analysis.py", "tests/compare/test_statistics.py"),
        ("tests are not corrected", "    correct([difference for difference in found.values() if difference])\n", ""),
    ),
    *within(
        "compare",
        "batchkern/compare/statistics.py",
        ("tests/compare/test_statistics.py", "-k", "convergence"),
        ("convergence is within a tenth of the fall", "CONVERGED = 0.01", "CONVERGED = 0.1"),
        ("the last loss is taken for the least", "least = min(losses)", "least = losses[-1]"),
    ),
    *within(
        "strategies",
        "batchkern/second_head.py",
        ("tests/test_second_head.py",),
        (
            "linear layers behind the last convolution are shared",
            "    return min((moment for moment in linear if moment > max(convolutions)), default=max(convolutions))",
            "    return max(linear)",
        ),
        (
            "batch norm behind the last convolution is copied",
            "    return min((moment for moment in linear if moment > max(convolutions)), default=max(convolutions))",
            "    return max(convolutions)",
        ),
        ("the copies are the model's own layers", "copy.deepcopy(module).train()", "module.train()"),
        (
            "the model keeps the layers of the second head",
            "            parent._modules[name] = child\n",
            "            pass\n",
        ),
        ("copies stay frozen", ".train().requires_grad_(True)", ".train()"),
        ("looking at a model leaves its hooks", "            handle.remove()\n", "            pass\n"),
        ("what timm's forward_head runs is not asked", "if head_begins is not None:", "if head_begins == -1:"),
        (
            "checking the head moves its batch norm",
            "            model.eval()\n            output",
            "            output",
        ),
    ),
    *within(
        "strategies",
        "batchkern/strategies/passive_injection.py",
        ("tests/test_resume.py", "-k", "every_single_update"),
        (
            "a resume forgets the passive batch that is due",
            'names = ("active", "injected", "pending", "seen")',
            'names = ("active", "injected", "seen")',
        ),
    ),
]

# --- trainings --------------------------------------------------------------------------------------------------------

RESUME = ("tests/test_resume.py", "-k", "every_single_update")

TRAINING = [
    *within(
        "training",
        "batchkern/_start.py",
        ("tests/test_cli.py", "-k", "torch_is_loaded or swallows"),
        ("a script is not known as the command", "    return script or (", "    return ("),
        ("Ctrl-C in an import is an exception", "        caller = caller.f_back\n", "        caller = None\n"),
        ("python -m is not known as the command", "return script or (", "return script and ("),
    ),
    *within(
        "training",
        "batchkern/data/sources.py",
        ("tests/test_cli.py", "-k", "without_a_network"),
        ("datasets asks for long where there is no network", "if silence else", "if not silence else"),
    ),
    *within(
        "training",
        "batchkern/trainer.py",
        RESUME,
        (
            "a resume forgets torch's generators",
            "        torch.Generator().set_state(self._rng[0])  # says now if it cannot be\n",
            "        self._rng = None\n",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        RESUME,
        ("a resume forgets the momentum", '        load_optimizer(self.optimizer, state["optimizer"])\n', ""),
        ("a resume forgets the sums of the epoch", '        self.sums.copy_(state["sums"])\n', ""),
    ),
    *within(
        "training",
        "batchkern/diagnostics.py",
        RESUME,
        (
            "a resume forgets what was kept before this epoch",
            '"times_before": self._times_before,',
            '"times_before": self.times_kept,',
        ),
    ),
    *within(
        "training",
        "batchkern/trainer.py",
        ("tests/test_trainer.py",),
        ("the sums of an epoch go on in the next", "        self.updater.sums.zero_()\n", ""),
        ("the bar shows an epoch that has no update yet", "bar.due() and not batch.ends_epoch", "bar.due()"),
        (
            "the test loss is a sum of means",
            'F.cross_entropy(logits.float(), target, reduction="sum")',
            "F.cross_entropy(logits.float(), target)",
        ),
        (
            "an evaluation leaves the model training",
            "ending.callback(self.model.train, training)",
            "ending.callback(self.model.train)",
        ),
        (
            "a checkpoint is saved one update late",
            "self.counts.updates % self.checkpoint_every == 0",
            "self.counts.updates % self.checkpoint_every == 1",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/test_trainer.py",),
        (
            "a pass for the losses alone is not counted",
            "passes * trained + (full if scored else 0)",
            "passes * trained",
        ),
        ("batches of all sizes weigh the same in the objective", "value * len(losses)", "value"),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/strategies/test_mixup.py",),
        ("transforms apply from the last to the first", "*before, last = strategies", "last, *before = strategies"),
        (
            "partners are as the data set has them",
            "return self._transformed(step, others, before)",
            "return self._transformed(step, others, [])",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/strategies/test_mixup.py",),
        (
            "a mixed image is right as its own class",
            "target.argmax(1) if target.is_floating_point() else target",
            "target.argmin(1) if target.is_floating_point() else target",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/strategies/test_trimming.py",),
        (
            "batch norm counts a batch twice",
            "self.autocast(), models.frozen_statistics(self.model):",
            "self.autocast():",
        ),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/strategies/test_passive_injection.py",),
        ("an idle head has gradients of zero", "zero_grad(set_to_none=True)", "zero_grad(set_to_none=False)"),
    ),
    *within(
        "training",
        "batchkern/diagnostics.py",
        ("tests/test_diagnostics.py",),
        (
            "the epoch before is the epoch itself",
            "self._times_before, self._kept_before = self.times_kept.clone(), kept",
            "self._times_before, self._kept_before = self.times_kept, kept",
        ),
        ("quantiles are of the lower rank", "round(q * (len(values) - 1))", "int(q * (len(values) - 1))"),
    ),
    *within(
        "training",
        "batchkern/rundir.py",
        ("tests/test_rundir.py",),
        (
            "metrics are not cut back to the checkpoint",
            "return state, self.metrics(done)",
            "return state, self.metrics()",
        ),
        (
            "an earlier run's checkpoint stays",
            "for name in RUN_FILES[2:]:",
            "for name in RUN_FILES[4:]:",
        ),
        (
            "a checkpoint of another run is taken",
            'if state.pop("run", None) != self._run:',
            "if not state.pop('run', None):",
        ),
        ("what cannot be read again is saved", "        check_readable(state)\n", ""),
        ("a damaged checkpoint is believed", "if digest != _digest(checkpoint[:-32]):", "if not digest:"),
        ("the checkpoint before is not kept", "previous=self.path / PREVIOUS)", "previous=None)"),
        (
            "who was written over trains on",
            "if self._left is not None and self._left != self._files():",
            "if self._left is None:",
        ),
        (
            "a run in use is resumed",
            "        self._lock = lock(self.path)",
            "        self._lock = os.open(self.path, 0)",
        ),
        (
            "a setting that is new is not compared",
            "for key in sorted(was.keys() | now.keys())\n            if was.get(key)",
            "for key in sorted(was.keys())\n            if was.get(key)",
        ),
    ),
    *within(
        "training",
        "batchkern/files.py",
        ("tests/test_files.py",),
        ("a directory that was moved is written to", "    if not same:", "    if False:"),
        ("a part is opened whatever lies there", "os.O_CREAT | os.O_EXCL", "os.O_CREAT"),
        ("a pipe is waited for", "if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "if False:"),
        ("a link is followed to add a line", " | os.O_NOFOLLOW", ""),
        ("the lock keeps nobody out", "except BlockingIOError:", "except ZeroDivisionError:"),
    ),
    *within(
        "training",
        "batchkern/records.py",
        ("tests/test_records.py",),
        ("rows of metrics are not checked", "        check(row, Row)\n", ""),
        ("rows of another epoch are taken", 'if row["epoch"] != number:', "if False:"),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/test_trainer.py", "-k", "batch_norm"),
        (
            "a single chosen row is passed through batch norm",
            "rows is not None and len(rows) < self.run.least_rows",
            "rows is not None and len(rows) < 0",
        ),
    ),
    *within(
        "training",
        "batchkern/trainer.py",
        ("tests/test_trainer.py", "-k", "picture or two_trainings"),
        (
            "a picture that fails ends the training",
            'with only_warned(f"{directory.path / CURVES} is not drawn"):',
            "with contextlib.nullcontext():",
        ),
        ("the directory is free while it trains", "        self.ranks.first(directory.lock)\n", ""),
    ),
    *within(
        "training",
        "batchkern/updater.py",
        ("tests/test_trainer.py", "-k", "decoded_ahead"),
        (
            "another batch than the next one is decoded ahead",
            "self.feed.prepare(rows, later,",
            "self.feed.prepare(rows[:-1], later,",
        ),
    ),
    *within(
        "training",
        "batchkern/parts/subsets.py",
        ("tests/test_trainer.py", "-k", "decoded_ahead"),
        (
            "an epoch names its own first batch",
            "ahead = of_epoch(self.epoch + 1)[:1]",
            "ahead = of_epoch(self.epoch)[:1]",
        ),
    ),
    *within(
        "training",
        "batchkern/plan.py",
        ("tests/test_plan.py",),
        (
            "the smaller last batch is left out",
            "else max(1, -(-rows // size) - (0 < rows % size < least))",
            "else rows // size",
        ),
        ("a last batch that is too small stays", "len(batches[-1]) < least:", "len(batches[-1]) < 0:"),
        ("a batch names itself as the next", "[place + 1 : place + 1 + AHEAD]", "[place : place + AHEAD]"),
        (
            "a replay names a batch of a round that is not chosen yet",
            "else self.order[self.place :]",
            "else self.order[self.place - 1 :]",
        ),
        ("each epoch is in the same order", 'generator(self.seed, "epoch", epoch)', 'generator(self.seed, "epoch")'),
        ("a saved order goes on changing", "dict(vars(self), order=list(self.order))", "dict(vars(self))"),
    ),
    *within(
        "training",
        "batchkern/seeding.py",
        ("tests/test_plan.py",),
        (
            "places run into each other",
            "repr((checked_seed(seed), *plain)).encode()",
            '"".join(map(str, (seed, *place))).encode()',
        ),
    ),
    *within(
        "training",
        "batchkern/seeding.py",
        ("tests/test_seeding.py",),
        ("numpy's numbers are other seeds", "repr((checked_seed(seed), *plain))", "repr((seed, *plain))"),
    ),
    *within(
        "training",
        "batchkern/schedules.py",
        ("tests/test_schedules.py",),
        ("the last epoch does not reach the end", "t = epoch / (epochs - 1)", "t = epoch / epochs"),
        ("a milestone is passed one update late", "sum(progress >= m for", "sum(progress > m for"),
        ("every counts from 0", "lambda n: n % count == 0", "lambda n: n % count == 1 % count"),
    ),
]

# --- several processes ------------------------------------------------------------------------------------------------

SHARES = ("tests/test_distributed.py", "-k", "shares_make_up")
RANKS = ("tests/test_distributed.py", "-k", "three_ranks")

DISTRIBUTED = [
    *within(
        "distributed",
        "batchkern/strategies/base.py",
        RANKS,
        (
            "mixed filling is in the plain loss",
            "target.is_floating_point() and step.share.world == 1):",
            "target.is_floating_point()):",
        ),
    ),
    *within(
        "distributed",
        "batchkern/strategies/trimming.py",
        RANKS,
        ("mixed filling is ranked", "step.share.world == 1)", "step.share.world > 0)"),
    ),
    *within(
        "distributed",
        "batchkern/distributed.py",
        SHARES,
        (
            "rows that ranks do not divide are nobody's",
            "return -(-self.rows // self.world)",
            "return self.rows // self.world",
        ),
        (
            "the filling of a share counts as a class",
            "torch.full_like(target[self.real :], IGNORED)",
            "torch.zeros_like(target[self.real :])",
        ),
        (
            "a rank's rows are spread to the places of the first",
            "(0, 0, self.start, self.rows - self.start - self.real)",
            "(0, 0, 0, self.rows - self.real)",
        ),
    ),
    *within(
        "distributed",
        "batchkern/distributed.py",
        RANKS,
        ("the loss of ranks is their sum", "parts[:, -1].mean()", "parts[:, -1].sum()"),
        ("figures include the filling", "return whole[:, : share.rows], parts", "return whole, parts"),
        ("mixed filling counts", "torch.arange(self.each, device=target.device) < self.real", "target.sum(1) > 0"),
    ),
    *within(
        "trainer",
        "batchkern/initial_weights.py",
        ("tests/test_initial_weights.py",),
        (
            "a classifier of other classes is refused",
            "if any(found[part].shape != own[part].shape for part in names)",
            "if False",
        ),
        ("a file's missing names are ignored", "if missing or unknown:", "if unknown:"),
        ("a file's unknown names are ignored", "if missing or unknown:", "if missing:"),
        ("weights that are not finite are taken", "if not torch.isfinite(tensor).all():", "if False:"),
        ("weights may lie where they are written over", ".is_relative_to(Path(out).resolve())", " == Path(out)"),
        ("a run's directory is read as a file", "if not path.is_dir():", "if True:"),
        ("weights in another file are other weights", '"crc32": zlib.crc32(_read(path))', '"crc32": hash(path)'),
    ),
    *within(
        "trainer",
        "batchkern/rundir.py",
        ("tests/test_initial_weights.py",),
        ("weights are known by their path", '"inputs_crc32", "crc32")', '"inputs_crc32")'),
    ),
    *within(
        "trained",
        "batchkern/preprocessing.py",
        ("tests/test_preprocessing.py",),
        (
            "how images were cut out is not written",
            "crop = data.center_crop and data.shape[1] == data.shape[2]",
            "crop = False",
        ),
        (
            "a deviation of 0 is taken",
            "if not (_float32(self.std) > 0).all():",
            "if not (_float32(self.std) >= 0).all():",
        ),
        ("a format that comes later is read", 'if content["format"] != FORMAT or ', "if "),
        ("two classes may have one name", " or len(set(classes)) < len(classes):", ":"),
    ),
    *within(
        "trained",
        "batchkern/data/unlabelled.py",
        ("tests/test_preprocessing.py",),
        (
            "a photograph is not turned",
            'return require("PIL.ImageOps", "train").exif_transpose(cell["image"])',
            'return cell["image"]',
        ),
        ("what is ready is cut out again", "if center_crop and data.shape[1:] != shape[1:]:", "if center_crop:"),
        ("images of a list are squeezed", "resize=True, crop=center_crop", "resize=True, crop=False"),
    ),
    *within(
        "trained",
        "batchkern/data/images.py",
        ("tests/test_preprocessing.py",),
        ("a part does not know how it was cut out", "        part.center_crop = self.center_crop\n", ""),
    ),
    *within(
        "trained",
        "batchkern/trained.py",
        ("tests/test_trained.py",),
        ("mixed precision is forgotten", "dtype=amp, enabled=amp is not None", "dtype=amp, enabled=False"),
        ("the model is left in training", "    model = model.cpu().eval()\n", "    model = model.cpu().train()\n"),
        ("config.json is not held against it", "if (shape, classes) != (", "if () > ("),
        ("classes of the data are not looked at", "if data.classes not in (None, self.classes):", "if False:"),
        (
            "accuracy of a class is over what was predicted",
            "labels[correct].cpu().bincount(",
            "logits.argmax(1).cpu().bincount(",
        ),
    ),
    *within(
        "trained",
        "batchkern/trainer.py",
        ("tests/test_trained.py",),
        ("a name is written for a module", "model=named, classifier", 'model="cnn", classifier'),
        (
            "weights are written without what they need",
            "directory.save_preprocessing(encoded(self.preprocessing))  #",
            "directory.save_tensors(WEIGHTS, {}), directory.save_preprocessing(encoded(self.preprocessing))  #",
        ),
    ),
    *within(
        "trained",
        "batchkern/data/loading.py",
        ("tests/cli/test_evaluate.py",),
        ("the training data are tested on", "os.path.realpath(source) == os.path.realpath(trained.name)", "False"),
        (
            "what was trained on is held out",
            "table.select(held_out(table.labels)[1])",
            "table.select(held_out(table.labels)[0])",
        ),
        (
            "images of another size are squeezed",
            "trained.classes, shape[1:], center_crop, memory",
            "trained.classes, shape[1:], False, memory",
        ),
    ),
    *within(
        "trained",
        "batchkern/cli/_options.py",
        ("tests/cli/test_evaluate.py", "tests/cli/test_predict.py"),
        ("a file is replaced unasked", "    if not overwrite:\n", "    if False:\n"),
        ("a file of the user's is replaced", "    if not ours:\n", "    if False:\n"),
    ),
    *within(
        "trained",
        "batchkern/cli/_predict.py",
        ("tests/cli/test_predict.py",),
        ("each class has the probability of the first", "shown[best], *shown]", "shown[0], *shown]"),
        ("probabilities are of each class by itself", "logits.softmax(1).tolist()", "logits.sigmoid().tolist()"),
    ),
    *within(
        "trainer",
        "batchkern/plan.py",
        ("tests/test_plan.py",),
        ("the only batch is dropped where it is small", "if drop_last and len(batches) > 1 and", "if drop_last and"),
        (
            "a whole last batch is dropped",
            "len(batches[-1]) < size:\n        return batches[:-1]",
            "True:\n        return batches[:-1]",
        ),
    ),
    *within(
        "data",
        "batchkern/data/derived.py",
        ("tests/test_data.py",),
        ("the validation set is trained on too", "for chosen in (~held, held)", "for chosen in (held | ~held, held)"),
    ),
    *within(
        "comparisons",
        "batchkern/recipes/base.py",
        ("tests/test_recipes.py",),
        (
            "rows of two passive sets share a comparison",
            "(a.passive == b.passive or None in (a.passive, b.passive))",
            "True",
        ),
        ("a share of the training set is not taken", "rows = round(group[0].share * rows)", "rows = rows"),
    ),
    *within(
        "comparisons",
        "batchkern/recipes/reproduction.py",
        ("tests/test_recipes.py", "tests/test_reproduce.py"),
        (
            "gaps are not paired by seed",
            'setdefault(run["arm"], {})[run["seed"]] = gap',
            'setdefault(run["arm"], {})[len(by_arm.get(run["arm"], {}))] = gap',
        ),
        (
            "steps are looked at one epoch late",
            '["test_accuracy"][ends - 1]',
            '["test_accuracy"][min(ends, len(run["curve"]["test_accuracy"]) - 1)]',
        ),
        ("a user's file is replaced", "        earlier = None\n", "        return\n"),
        ("another reproduction is replaced", "(resume and earlier == name)", "resume"),
    ),
    *within(
        "distributed",
        "batchkern/strategies/stochastic_augmentation.py",
        RANKS,
        (
            "ranks with fewer rows weigh as much",
            "weight = share.real * share.world / share.rows",
            "weight = 1.0",
        ),
    ),
]

# --- comparisons ------------------------------------------------------------------------------------------------------

STATISTICS = ("tests/compare/test_statistics.py",)

COMPARE = [
    *within(
        "compare",
        "batchkern/compare/statistics.py",
        STATISTICS,
        ("an interval from a normal, not a t", ".t.ppf(1 - LEVEL / 2, len(values) - 1)", ".norm.ppf(1 - LEVEL / 2)"),
        ("a deviation with n, not n - 1", "statistics.stdev(values)", "statistics.pstdev(values)"),
        ("an interval of 90 %", "ppf(1 - LEVEL / 2,", "ppf(1 - LEVEL,"),
        ("a degree of freedom too many", "1 - LEVEL / 2, len(values) - 1)", "1 - LEVEL / 2, len(values))"),
        (
            "p-values are corrected by a method that finds more",
            'alpha=LEVEL, method="holm")',
            'alpha=LEVEL, method="fdr_bh")',
        ),
        ("the sign test has one side", "2.0 ** (1 - len(seeds))", "2.0 ** -len(seeds)"),
        ("an accuracy that is met exactly is not reached", "if accuracy >= target", "if accuracy > target"),
    ),
    *within(
        "compare",
        "batchkern/compare/statistics.py",
        STATISTICS,
        (
            "a median of those that got there",
            "math.inf if x is None else x for x in reached)",
            "x for x in reached if x)",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/workers.py",
        ("tests/compare/test_workers.py",),
        ("who does not end is waited for", "            process.kill()\n", ""),
        ("a task that was not read ends the comparison", "except (EOFError, OSError):", "except EOFError:"),
        (
            "what cannot be given back ends the worker",
            "        except Exception as error:  # whatever the classes of an outcome do, before",
            "        except EOFError as error:  # before",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/arms.py",
        ("tests/compare/test_arms.py",),
        (
            "a backward pass costs as much as a forward pass",
            "samples_forward + 2 * samples_backward",
            "samples_forward + samples_backward",
        ),
        (
            "the first number of epochs that is tried is taken",
            "for count in (guess - 1, guess, guess + 1):",
            "for count in (guess,):",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/running.py",
        ("tests/compare/test_running.py", "-k", "writes_to"),
        (
            "files of a training that is at work are removed",
            "        with locked(directory):\n            pass\n",
            "        pass\n",
        ),
    ),
    *within(
        "compare",
        "batchkern/compare/running.py",
        ("tests/compare/test_running.py", "-k", "damaged_results"),
        ("a curve that is cut short is summarised", 'len(values) != outcome["epochs"] or', "False or"),
    ),
    *within(
        "compare",
        "batchkern/compare/running.py",
        ("tests/compare/test_running.py", "-k", "that_is_gone or damaged or links"),
        (
            "a run whose directory is gone counts as finished",
            'if not o["error"] and _is_shown(out, o)]',
            'if not o["error"]]',
        ),
        (
            "the directory of a run may be anywhere",
            'if outcome["directory"] != str(RunOf.recorded(outcome).directory):',
            "if False:",
        ),
        ("links are followed", "if (out / place).is_symlink():", "if False:"),
    ),
    *within(
        "compare",
        "batchkern/records.py",
        ("tests/compare/test_running.py", "-k", "damaged"),
        ("a seed may be a path", "    seeds: list[Whole]\n", "    seeds: list[Any]\n"),
    ),
    *within(
        "compare",
        "batchkern/plots.py",
        ("tests/test_plots.py", "-k", "dollar"),
        ("dollar signs are mathematics", 'text.replace("$", r"\\$")', "text"),
    ),
    *within(
        "compare",
        "batchkern/compare/tables.py",
        ("tests/compare/test_report.py",),
        (
            "verdicts by p-values that are not corrected",
            'found = test["p_corrected"] < LEVEL',
            'found = test["p"] < LEVEL',
        ),
    ),
]

# --- data -------------------------------------------------------------------------------------------------------------

DATA_TESTS = ("tests/test_data.py", "-k", "not home and not hub")

DATA = [
    *within(
        "data",
        "batchkern/data/images.py",
        DATA_TESTS,
        (
            "a variance with n - 1, not n",
            "variance = (squares.double() / count - mean.square())",
            "variance = (squares.double() / count - mean.square()).mul_(count / (count - 1))",
        ),
        ("a constant channel has no deviation", ".clamp_(min=1 / 255).float()", ".float()"),
    ),
    *within(
        "data",
        "batchkern/data/feed.py",
        DATA_TESTS,
        ("the sign of the shift", "(-mean.double() / std.double())", "(mean.double() / std.double())"),
        (
            "windows never begin at the last place",
            "top = own(torch.randint(2 * pad_y + 1,",
            "top = own(torch.randint(2 * pad_y,",
        ),
        ("every update is augmented alike", 'f"{seed}/{step}"', 'f"{seed}"'),
        (
            "flips are drawn from torch's own generator",
            "torch.rand(whole, 1, generator=generator, dtype=torch.float32) < 0.5",
            "torch.rand(whole, 1) < 0.5",
        ),
    ),
    *within(
        "data",
        "batchkern/data/feed.py",
        ("tests/data/test_images.py", "-k", "default_type"),
        (
            "flips are others in another default type",
            "generator=generator, dtype=torch.float32)",
            "generator=generator)",
        ),
    ),
    *within(
        "data",
        "batchkern/data/sources.py",
        DATA_TESTS,
        ("a fifth of a class is cut, not rounded", "(sizes[labels[order]] + 2) // 5", "sizes[labels[order]] // 5"),
    ),
    *within(
        "data",
        "batchkern/data/derived.py",
        DATA_TESTS,
        (
            "a noisy label may be the right one",
            "torch.randint(1, classes, (len(chosen),)",
            "torch.randint(0, classes, (len(chosen),)",
        ),
    ),
    *within(
        "data",
        "batchkern/data/decode.py",
        DATA_TESTS,
        ("16-bit greys keep their low byte", ".clip(0, 65535) >> 8)", ".clip(0, 65535))"),
    ),
    *within(
        "data",
        "batchkern/data/decode.py",
        ("tests/data/test_decode.py", "-k", "forked"),
        (
            "a forked child hands images to threads that it does not have",
            "    os.register_at_fork(after_in_child=_pool.cache_clear)\n",
            "    pass\n",
        ),
    ),
    *within(
        "data",
        "batchkern/data/decode.py",
        ("tests/data/test_feed.py",),
        (
            "what was prepared is taken for another batch",
            "return self._process == os.getpid() and same",
            "return self._process == os.getpid()",
        ),
        (
            "a fork waits for threads that it does not have",
            "return self._process == os.getpid() and same",
            "return same",
        ),
        ("what nobody wants is decoded all the same", "            if self._dropped:\n", "            if False:\n"),
        (
            "threads go by the size in the file alone",
            "filter(None, (self.source, self.size))",
            "filter(None, (self.source,))",
        ),
    ),
    *within(
        "data",
        "batchkern/data/feed.py",
        ("tests/data/test_feed.py",),
        (
            "memory is used again while somebody holds a part of it",
            "if borrower() is None and memory.shape == shape]",
            "if memory.shape == shape]",
        ),
        ("memory is never used again", "memory = free[0] if free else torch.empty(", "memory = torch.empty("),
        ("a batch that was prepared is decoded again", "return ahead.result()", "pass"),
        (
            "a batch that is named twice is decoded twice",
            "                return\n            for old",
            "                pass\n            for old",
        ),
        (
            "what was named before the last two is decoded all the same",
            "                old.drop()\n",
            "                pass\n",
        ),
    ),
    *within(
        "data",
        "batchkern/data/crops.py",
        ("tests/data/test_crops.py",),
        (
            "the longer side is rounded, not cut",
            "int(shorter * max(height, width)",
            "round(shorter * max(height, width)",
        ),
        ("an odd margin is cut, not rounded", "(round((side - size) / 2) for", "((side - size) // 2 for"),
        ("aspects are even, not their logarithms", "** aspect\n", "* aspect\n"),
        ("windows never end at the lower edge", "int(top * (height - h + 1))", "int(top * (height - h))"),
        ("the central window is at the top", "Window((height - h) // 2,", "Window(0,"),
        ("what is outside of the window has a part in it", "clamp(min=0) * inside", "clamp(min=0)"),
        ("new pixels lie at the corners", "places[:, None] * length / size", "(places[:, None] - 0.5) * length / size"),
        ("every update has the same windows", 'generator(seed, "window", step)', 'generator(seed, "window")'),
    ),
    *within(
        "data",
        "batchkern/data/decode.py",
        ("tests/data/test_crops.py",),
        (
            "what was prepared is taken for another update",
            "and self.numbers == _listed(numbers, len(positions))",
            "",
        ),
        (
            "random windows are cut from the centre",
            "if numbers is not None:",
            "if numbers is not None and not self.crop:",
        ),
    ),
    *within(
        "data",
        "batchkern/data/loading.py",
        ("tests/data/test_crops.py",),
        ("a training set that fits is held cut", "0 if center_crop else memory_limit", "memory_limit"),
    ),
    *within(
        "data",
        "batchkern/data/labels.py",
        ("tests/data/test_labels.py",),
        (
            "clean classes are matched by their places, not by their names",
            "return torch.tensor([names.index(key) for key in own])[clean]",
            "return clean",
        ),
        ("a missing label is the first class", ".fill_null(-1)", ".fill_null(0)"),
        ("the number of a row is taken for its class", "if len(usable) == 1 and not named", "if len(usable) == 1"),
    ),
    *within(
        "data",
        "batchkern/data/sources.py",
        ("tests/data/test_sources.py",),
        ("the digest has no head", "file.read(piece), digest_size", "b'', digest_size"),
        ("the digest has no tail", "        digest.update(file.read())\n", ""),
    ),
    *within(
        "data",
        "batchkern/data/folders.py",
        ("tests/data/test_sources.py",),
        ("a pipe is read as an image", "if not _is(entry.is_file):", "if False:"),
        (
            "a link that leads nowhere is left out",
            "if not folder and entry.is_symlink()",
            "if False and entry.is_symlink()",
        ),
    ),
]

# --- benchmarks -------------------------------------------------------------------------------------------------------

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
        ("what is no text is a traceback", "except ValueError:  # it is no UTF-8", "except ZeroDivisionError:  #"),
    ),
    *within(
        "cli",
        "batchkern/strategies/__init__.py",
        ("tests/strategies/test_parse.py",),
        ("a deep text is a traceback", "TypeError, RecursionError, MemoryError):", "TypeError):"),
        ("a word passes for a number", "if not _fits(options[option], str(known[option].type)):", "if False:"),
    ),
]

MUTATIONS = [*CPU, *CUDA, *TRITON, *WRAPPERS, *STRATEGIES, *TRAINING, *DISTRIBUTED, *COMPARE, *DATA, *BENCH, *CLI]
