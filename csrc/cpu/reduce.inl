// Reductions that several kernels share (included by kernels.inl).

// 16 KiB of floats, so that the second pass over a block finds it in the L1 cache.
constexpr int64_t kBlock = 4096;
// The number of floats in the widest vector. The remainder of a row is padded to it, because scalar
// exponentials are slow.
constexpr int64_t kLanes = 16;

// The number of exponentials that each lane adds in single precision.
constexpr int kTerms = 8;
constexpr int64_t kGroup = kTerms * kLanes;

// A block of whole vectors as floats: the block itself, or `buffer` with its converted elements.
BATCHKERN_INLINE const float* as_floats(const float* z, int64_t, float*) { return z; }

template <class T>
BATCHKERN_INLINE const float* as_floats(const T* z, int64_t size, float* buffer) {
    BATCHKERN_SIMD()
    for (int64_t j = 0; j < size; ++j) buffer[j] = load(z + j);
    return buffer;
}

#if defined(BATCHKERN_AVX512)
BATCHKERN_INLINE const float* as_floats(const Float16* z, int64_t size, float* buffer) {
    for (int64_t j = 0; j < size; j += kLanes) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(z + j));
        _mm512_storeu_ps(buffer + j, _mm512_cvtph_ps(halves));
    }
    return buffer;
}
#endif

// The maximum of m and z; not NaN, even if z holds one.
BATCHKERN_INLINE float highest_above(const float* z, int64_t size, float m) {
    int32_t bits = ordered_bits(m);
    BATCHKERN_SIMD(reduction(max : bits))
    for (int64_t j = 0; j < size; ++j) {
        const int32_t x = ordered_bits(z[j]);
        bits = x > bits ? x : bits;
    }
    const float highest = of_ordered_bits(bits);
    return highest > m ? highest : m;
}

// Raises m to the maximum of the block, rescales the sum, and adds exp(scale * (z - m)) of the block to it.
// Meanwhile it prefetches the elements from `later` on.
template <class T>
BATCHKERN_INLINE void add_block(const float* z, int64_t size, float scale, const T* later, float& m,
                                double& sum) {
    const float highest = highest_above(z, size, m);
    if (sum != 0 && highest > m) sum *= exp_nonpositive((m - highest) * scale);
    m = highest;
    const float base = m == -INFINITY ? 0.0f : m;  // if all elements so far are -inf: -inf - -inf is NaN
    double lanes[kLanes] = {}, rest = 0;
    int64_t start = 0;
    for (; start + kGroup <= size; start += kGroup) {
        for (int64_t line = 0; line < kGroup; line += 64 / sizeof(T))
            __builtin_prefetch(later + start + line, 0, 2);
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += exp_sum<kTerms>(z + start + j, kLanes, base, scale);
    }
    BATCHKERN_SIMD(reduction(+ : rest))
    for (int64_t j = start; j < size; ++j) rest += exp_sum<1>(z + j, 1, base, scale);
    BATCHKERN_SIMD(reduction(+ : rest))
    for (int64_t j = 0; j < kLanes; ++j) rest += lanes[j];
    sum += rest;
}

template <class T>
BATCHKERN_INLINE double log_sum_exp_of(const T* row, int64_t n, float scale, float* maximum) {
    float floats[kBlock], rest[kLanes];
    const int64_t whole = n / kLanes * kLanes;
    for (int64_t j = 0; j < kLanes; ++j) rest[j] = -INFINITY;
    for (int64_t j = whole; j < n; ++j) rest[j - whole] = load(row + j);
    // The maximum starts with that of the remainder, which is added last: so the remainder never rescales the
    // sum.
    float m = highest_above(rest, kLanes, -INFINITY);
    double sum = 0;
    for (int64_t start = 0; start < whole; start += kBlock) {
        const int64_t size = whole - start < kBlock ? whole - start : kBlock;
        const T* const block = row + start;
        // Prefetches the block after the next; the next one was prefetched during the block before this one.
        add_block(as_floats(block, size, floats), size, scale, block + 2 * size, m, sum);
    }
    const float base = m == -INFINITY ? 0.0f : m;
    BATCHKERN_SIMD(reduction(+ : sum))
    for (int64_t j = 0; j < kLanes; ++j) sum += exp_sum<1>(rest + j, 1, base, scale);
    *maximum = m;
    return log_nonnegative(sum);
}

// The log of the sum of exp(scale * (z - m)) over a row, and its maximum m, in one pass over memory by blocks
// that stay cached. Sums are double, so that the result is as exact as its exponentials. It is NaN if the row
// holds NaN or +inf, and -inf if it holds only -inf.
template <class T>
double log_sum_exp(const T* row, int64_t n, float scale, float* maximum) {
    if (scale == 1.0f) return log_sum_exp_of(row, n, 1.0f, maximum);
    return log_sum_exp_of(row, n, scale, maximum);
}

// sum[r] += exp(z[c * step + r] - base[r]) over some classes c, for kLanes rows r.
BATCHKERN_INLINE void add_exponentials(const float* z, int64_t step, int64_t classes, const float* base,
                                       double* sum) {
    int64_t c = 0;
    for (; c + 4 <= classes; c += 4) {
        BATCHKERN_SIMD()
        for (int64_t r = 0; r < kLanes; ++r) sum[r] += exp_sum<4>(z + c * step + r, step, base[r], 1.0f);
    }
    for (; c < classes; ++c) {
        BATCHKERN_SIMD()
        for (int64_t r = 0; r < kLanes; ++r) sum[r] += exp_sum<1>(z + c * step + r, step, base[r], 1.0f);
    }
}
