"""Faults of the CUDA kernels, which the tests run on the host."""

from __future__ import annotations

from mutations.mutation import CROSS_ENTROPY, MEAN, RANK, ROWS, within

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
