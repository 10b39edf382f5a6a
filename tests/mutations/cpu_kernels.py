"""Faults of the CPU kernels."""

from __future__ import annotations

from mutations.mutation import AUGMENT, CROSS_ENTROPY, KL, MEAN, RANK, ROWS, within

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
