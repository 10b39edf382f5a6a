// Virtual samples in latent space (included by kernels.inl). Random numbers are generated for runs of this
// many groups of four columns, so that the random words of a run stay in the L1 cache.
constexpr int64_t kQuads = 128;

struct Words {
    uint32_t word[4][kQuads];
};

#if defined(BATCHKERN_AVX512)
// The rounds of philox.h on the low halves of 64-bit lanes; the high halves are ignored. Written with
// intrinsics, because GCC 12 vectorises a 32-by-32-bit product in 512-bit vectors only as a slow 64-by-64-bit
// one.
BATCHKERN_INLINE void make_words(Words& w, uint64_t row, uint64_t seed, int64_t first) {
    const __m512i places = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i factor0 = _mm512_set1_epi64(0xD2511F53), factor1 = _mm512_set1_epi64(0xCD9E8D57);
    for (int64_t i = 0; i < kQuads; i += 8) {
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        __m512i c0 = _mm512_set1_epi64(static_cast<int64_t>(row));
        __m512i c1 = _mm512_set1_epi64(static_cast<int64_t>(row >> 32));
        __m512i c2 = _mm512_add_epi64(_mm512_set1_epi64(first + i), places), c3 = _mm512_setzero_si512();
        for (int round = 0; round < 10; ++round) {
            const __m512i p0 = _mm512_mul_epu32(c0, factor0), p1 = _mm512_mul_epu32(c2, factor1);
            const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
            c0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), c1), key0);
            c1 = p1;
            c2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), c3), key1);
            c3 = p0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const __m512i c[4] = {c0, c1, c2, c3};
        for (int j = 0; j < 4; ++j)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(w.word[j] + i), _mm512_cvtepi64_epi32(c[j]));
    }
}
#else
BATCHKERN_INLINE void make_words(Words& w, uint64_t row, uint64_t seed, int64_t first) {
    const uint32_t row_low = static_cast<uint32_t>(row), row_high = static_cast<uint32_t>(row >> 32);
    const uint32_t key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
    BATCHKERN_SIMD()
    for (int32_t i = 0; i < kQuads; ++i) {
        uint32_t c0 = row_low, c1 = row_high, c2 = static_cast<uint32_t>(first + i), c3 = 0;
        philox(c0, c1, c2, c3, key_low, key_high);
        w.word[0][i] = c0;
        w.word[1][i] = c1;
        w.word[2][i] = c2;
        w.word[3][i] = c3;
    }
}
#endif

// u = (upper 23 bits + 1/2) / 2^23: exact, and never 0 or 1.
BATCHKERN_INLINE float uniform(uint32_t word) {
    return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
}

// Writes the four numbers of each group next to each other: those of a run, or only the first n.
BATCHKERN_INLINE void interleave(const float (&quads)[4][kQuads], float* out, int64_t n) {
    const int64_t whole = n / 4 < kQuads ? n / 4 : kQuads;
    for (int64_t i = 0; i < whole; ++i)
        for (int j = 0; j < 4; ++j) out[4 * i + j] = quads[j][i];
    if (whole < kQuads)
        for (int j = 0; j < n % 4; ++j) out[4 * whole + j] = quads[j][whole];
}

void noise_row(const NoiseRow& a) {
    const float sigma = a.sigma, tau = a.tau;
    Words w;
    float normal[4][kQuads];
    for (int64_t first = 0; 4 * first < a.columns; first += kQuads) {
        make_words(w, a.row, a.seed, first);
        for (int pair = 0; pair < 4; pair += 2) {
            BATCHKERN_SIMD()
            for (int32_t i = 0; i < kQuads; ++i) {
                const float radius = sigma * sqrtf(-2.0f * log_unit(uniform(w.word[pair][i])));
                float cosine, sine;
                cos_sin_turn(uniform(w.word[pair + 1][i]), &cosine, &sine);
                const float x = radius * cosine, y = radius * sine;
                normal[pair][i] = x > tau ? tau : x < -tau ? -tau : x;
                normal[pair + 1][i] = y > tau ? tau : y < -tau ? -tau : y;
            }
        }
        interleave(normal, a.noise + 4 * first, a.columns - 4 * first);
    }
}

// The first four steps of the transform (1, 2, 4 and 8) at once, as a product with the 16 x 16 Hadamard
// matrix. Its rows are whole vectors, whereas the single steps would shuffle elements within a vector.
struct Signs16 {
    float sign[16][16];
    constexpr Signs16() : sign() {
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 16; ++j) sign[i][j] = __builtin_parity(i & j) ? -1.0f : 1.0f;
    }
};
constexpr Signs16 kHadamard16;

BATCHKERN_INLINE void hadamard16(float* x) {
    float out[16] = {};
    for (int i = 0; i < 16; ++i) {
        BATCHKERN_SIMD()
        for (int j = 0; j < 16; ++j) out[j] += kHadamard16.sign[i][j] * x[i];
    }
    for (int j = 0; j < 16; ++j) x[j] = out[j];
}

void hadamard_row(float* noise, float* buffer, const float* signs, int64_t columns) {
    int64_t width = 1;
    while (width < columns) width *= 2;
    for (int64_t j = 0; j < columns; ++j) buffer[j] = noise[j] * signs[j];
    for (int64_t j = columns; j < width; ++j) buffer[j] = 0.0f;
    int64_t step = 1;
    if (width >= 16) {
        for (int64_t start = 0; start < width; start += 16) hadamard16(buffer + start);
        step = 16;
    }
    for (; step < width; step *= 2) {
        for (int64_t start = 0; start < width; start += 2 * step) {
            BATCHKERN_SIMD()
            for (int64_t j = start; j < start + step; ++j) {
                const float a = buffer[j], b = buffer[j + step];
                buffer[j] = a + b;
                buffer[j + step] = a - b;
            }
        }
    }
    const float scale = static_cast<float>(sqrt(static_cast<double>(columns)));
    for (int64_t j = 0; j < columns; ++j) noise[j] = buffer[j] / scale;
}

template <class T>
void add_noise_row(const void* x, const float* noise, void* out, int64_t n) {
    const T* in = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    BATCHKERN_SIMD()
    for (int64_t j = 0; j < n; ++j) store(to + j, load(in + j) + noise[j]);
}

// Calls use(start, n, factor) for every run of columns: factor[j] is mask.scale if column start + j is kept
// and 0 if it is dropped.
template <class Use>
BATCHKERN_INLINE void for_each_run(const Mask& mask, int64_t columns, Use use) {
    const uint32_t threshold = mask.threshold;
    const float scale = mask.scale;
    Words w;
    float quads[4][kQuads], factor[4 * kQuads];
    for (int64_t first = 0; 4 * first < columns; first += kQuads) {
        make_words(w, mask.row, mask.seed, first);
        for (int j = 0; j < 4; ++j) {
            BATCHKERN_SIMD()
            for (int32_t i = 0; i < kQuads; ++i) quads[j][i] = w.word[j][i] >= threshold ? scale : 0.0f;
        }
        interleave(quads, factor, 4 * kQuads);
        use(4 * first, columns - 4 * first < 4 * kQuads ? columns - 4 * first : 4 * kQuads, factor);
    }
}

template <class T>
void dropout_row(const Mask& mask, const void* x, void* out, int64_t columns) {
    for_each_run(mask, columns, [&](int64_t start, int64_t n, const float* factor) {
        const T* in = static_cast<const T*>(x) + start;
        T* to = static_cast<T*>(out) + start;
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < n; ++j) store(to + j, load(in + j) * factor[j]);
    });
}

template <class T>
void dropout_grad_row(const Mask& mask, const void* grad, float* sum, int64_t columns) {
    for_each_run(mask, columns, [&](int64_t start, int64_t n, const float* factor) {
        const T* in = static_cast<const T*>(grad) + start;
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < n; ++j) sum[start + j] += load(in + j) * factor[j];
    });
}

template <class T>
void accumulate_row(const void* x, float* sum, int64_t n) {
    const T* in = static_cast<const T*>(x);
    BATCHKERN_SIMD()
    for (int64_t j = 0; j < n; ++j) sum[j] += load(in + j);
}

template <class T>
void store_row(const float* x, void* out, int64_t n) {
    T* to = static_cast<T*>(out);
    BATCHKERN_SIMD()
    for (int64_t j = 0; j < n; ++j) store(to + j, x[j]);
}
