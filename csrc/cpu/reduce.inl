// What several kernels share (included by kernels.inl).

// 16 KiB of floats: the second look at a block finds it in the first-level cache.
constexpr int64_t kBlock = 4096;
// A row's remainder is padded to this many elements, the widest vector: scalar exponentials are slow.
constexpr int64_t kLanes = 16;

// Elements between two rounds of prefetching.
constexpr int64_t kStride = 256;

// Adds exp(scale * (z - m)) of a block to the sum, and raises m to the block's maximum first.
template <bool kPrefetch, class T>
BATCHKERN_INLINE void add_block(const T* z, int64_t size, float scale, float& m, double& sum) {
    int32_t highest_bits = ordered_bits(m);
    BATCHKERN_SIMD(reduction(max : highest_bits))
    for (int64_t j = 0; j < size; ++j) {
        const int32_t x = ordered_bits(load(z + j));
        highest_bits = x > highest_bits ? x : highest_bits;
    }
    const float highest = of_ordered_bits(highest_bits);  // NaN is not > m: it shows in the sum
    if (highest > m) {
        if (sum != 0) sum *= exp_nonpositive((m - highest) * scale);
        m = highest;
    }
    const float base = m == -INFINITY ? 0.0f : m;  // -inf - -inf would be NaN in a block before a finite one
    double part = 0;
    for (int64_t start = 0; start < size; start += kStride) {
        // While this part is computed on, memory brings the block after the next: most often it follows.
        for (int64_t line = 0; kPrefetch && line < kStride; line += 64 / sizeof(T))
            __builtin_prefetch(z + 2 * size + start + line, 0, 2);
        const int64_t end = size - start < kStride ? size : start + kStride;
        BATCHKERN_SIMD(reduction(+ : part))
        for (int64_t j = start; j < end; ++j) part += exp_to_sum((load(z + j) - base) * scale);
    }
    sum += part;
}

// log of the sum of exp(scale * (z - m)) over a row, and its maximum m: one pass over memory in cached
// blocks. Sums are double, so that the result is as exact as its exponentials. NaN where the row holds NaN or
// +inf, or only -inf.
template <class T>
double log_sum_exp(const T* row, int64_t n, float scale, float* maximum) {
    float m = -INFINITY;
    double sum = 0;
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t start = 0; start < whole; start += kBlock)
        add_block<true>(row + start, whole - start < kBlock ? whole - start : kBlock, scale, m, sum);
    if (whole < n) {
        float rest[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) rest[j] = -INFINITY;
        for (int64_t j = whole; j < n; ++j) rest[j - whole] = load(row + j);
        add_block<false>(rest, kLanes, scale, m, sum);
    }
    *maximum = m;
    return log_nonnegative(sum);
}
