// Loads, stores and elementary functions for the vectorised loops. Each is inlined into its loop and has no
// branch, no table lookup and no call, so that the compiler can vectorise the loop. No torch headers.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

#define BATCHKERN_INLINE static inline __attribute__((always_inline))

namespace batchkern {

BATCHKERN_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

BATCHKERN_INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// An integer for each float, in the order of the floats, with NaNs above +inf or below -inf. Maxima are
// reduced over these integers: not every compiler vectorises a maximum of floats, because with a NaN its
// result depends on the order of the operands.
BATCHKERN_INLINE int32_t ordered_bits(float x) {
    const int32_t bits = static_cast<int32_t>(bits_of(x));
    return bits ^ (bits >> 31 & 0x7fffffff);
}

BATCHKERN_INLINE float of_ordered_bits(int32_t bits) {
    return float_of(static_cast<uint32_t>(bits ^ (bits >> 31 & 0x7fffffff)));
}

// Elements.

BATCHKERN_INLINE float load(const float* p) { return *p; }

BATCHKERN_INLINE float load(const BFloat16* p) { return float_of(uint32_t{p->bits} << 16); }

BATCHKERN_INLINE float load(const Float16* p) {
    const uint32_t h = p->bits, magnitude = h & 0x7fffu;
    // Subnormal numbers are put into the low bits of 1/2: a multiplication would read them as zeros if the
    // CPU flushes subnormal numbers.
    const uint32_t subnormal = bits_of(float_of(magnitude | 0x3f000000u) - 0.5f);
    const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 0x38000000u : 0x70000000u);
    return float_of((magnitude < 0x0400u ? subnormal : normal) | (h & 0x8000u) << 16);
}

BATCHKERN_INLINE void store(float* p, float x) { *p = x; }

// Rounds to nearest, ties to even, as torch does.
BATCHKERN_INLINE void store(BFloat16* p, float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

BATCHKERN_INLINE void store(Float16* p, float x) {
    const uint32_t sign = bits_of(x) & 0x80000000u;
    const uint32_t magnitude = bits_of(x) ^ sign;
    // Below 2^-14: adding 1/2 leaves the rounded subnormal in the low bits.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // 65520 and above round to infinity
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    p->bits = static_cast<uint16_t>(h | sign >> 16);
}

// Functions. The coefficients are near-minimax (Chebyshev) fits made for the ranges given.

// e^x for x <= 0 or NaN, as the sum power + tail. Rounded to a float, it is within 1 ulp of e^x, exactly 1 at
// 0, and 0 if e^x is below the normal numbers.
BATCHKERN_INLINE float exp_parts(float x, float* tail) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
    const float n = shifted - 12582912.0f;
    const float r =
        (x - n * 0.693145752f) - n * 1.42860677e-6f;  // log 2 in two parts, the first with 16 bits
    float p = 1.3926213466332444e-03f;
    p = p * r + 8.363202971575855e-03f;
    p = p * r + 4.166655443768594e-02f;
    p = p * r + 1.6666576845993977e-01f;
    p = p * r + 0.5f;
    p = (p * r) * r + r;
    // A mask of bits, because GCC compiles selections into branches if a loop has several exponentials.
    const uint32_t normal = -static_cast<uint32_t>(!(x < -87.3f));
    const float power = float_of((bits_of(shifted) + 127u) << 23 & normal);
    *tail = float_of(bits_of(p * power) & normal);
    return power;
}

BATCHKERN_INLINE float exp_nonpositive(float x) {
    float tail;
    const float power = exp_parts(x, &tail);
    return power + tail;
}

// The sum of e^x over x = scale * (z[k * step] - base), added pairwise. The powers of two, which single
// precision adds almost without an error, and the tails, which are smaller, are summed separately and
// converted to double at the end, which keeps about 26 bits of each exponential. If each were rounded to a
// float first, similar errors of many terms would not cancel, and half an ulp of each would be half an ulp of
// the sum.
template <int kTerms>
BATCHKERN_INLINE float exp_sum_parts(const float* z, int64_t step, float base, float scale, float* tail) {
    if constexpr (kTerms == 1) {
        return exp_parts((*z - base) * scale, tail);
    } else {
        constexpr int kHalf = kTerms / 2;
        float first_tail, second_tail;
        const float first = exp_sum_parts<kHalf>(z, step, base, scale, &first_tail);
        const float second = exp_sum_parts<kHalf>(z + kHalf * step, step, base, scale, &second_tail);
        *tail = first_tail + second_tail;
        return first + second;
    }
}

template <int kTerms>
BATCHKERN_INLINE double exp_sum(const float* z, int64_t step, float base, float scale) {
    float tail;
    const float powers = exp_sum_parts<kTerms>(z, step, base, scale, &tail);
    return static_cast<double>(powers) + static_cast<double>(tail);
}

// (e^t - 1 - t) / t^2 for |t| <= 1
BATCHKERN_INLINE float expm1_tail(float t) {
    float p = 2.8063823009416225e-06f;
    p = p * t + 2.5359638313066675e-05f;
    p = p * t + 1.9838089204670485e-04f;
    p = p * t + 1.3885382827195348e-03f;
    p = p * t + 8.333339714229025e-03f;
    p = p * t + 4.166673701795895e-02f;
    p = p * t + 1.6666666646682468e-01f;
    return p * t + 0.5f;
}

BATCHKERN_INLINE float expm1_small(float t) { return t + t * t * expm1_tail(t); }

// log x with a relative error of 1e-11, for NaN and for x >= 0 that is not subnormal.
BATCHKERN_INLINE double log_nonnegative(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint64_t shifted =
        bits - 0x3fe6a09e667f3bcdu + (uint64_t{1024} << 52);  // bits of sqrt(1/2): m in [sqrt(1/2), sqrt(2))
    const uint64_t mantissa_bits = bits - (shifted & 0xfff0000000000000u) + (uint64_t{1024} << 52);
    const uint64_t exponent_bits = shifted >> 52 | 0x4330000000000000u;  // bits of 2^52 + exponent + 1024
    double m, exponent;
    memcpy(&m, &mantissa_bits, sizeof m);
    memcpy(&exponent, &exponent_bits, sizeof exponent);
    exponent -= 4503599627370496.0 + 1024.0;
    const double s = (m - 1.0) / (m + 1.0);
    const double z = s * s;
    double p = 1.1808905679487959e-01;
    p = p * z + 1.4267488127293454e-01;
    p = p * z + 2.000019292543696e-01;
    p = p * z + 3.3333332620856193e-01;
    p = p * z + 1.0000000000042009e+00;
    const double result = exponent * 0.69314718055994531 + 2.0 * s * p;
    return x > 0 ? result : x == 0 ? -INFINITY : x;
}

// log u for u in (0, 1] that is not subnormal, within about 2 ulp.
BATCHKERN_INLINE float log_unit(float u) {
    const uint32_t shifted = bits_of(u) - 0x3f3504f3u;  // bits of sqrt(1/2): m in [sqrt(1/2), sqrt(2))
    const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
    const float m = float_of((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    float p = 0.299243897f;
    p = p * z + 0.399748504f;
    p = p * z + 0.666668177f;
    p = p * z + 2.0f;
    return static_cast<float>(exponent) * 0.693147181f + p * s;
}

// cos and sin of 2 pi u for u in [0, 1], within about 2 ulp.
BATCHKERN_INLINE void cos_sin_turn(float u, float* cosine, float* sine) {
    const int32_t quadrant = static_cast<int32_t>(4.0f * u + 0.5f);
    const float r = 4.0f * u - static_cast<float>(quadrant);
    const float z = r * r;
    float s = -0.00460214913f;
    s = s * z + 0.0796802193f;
    s = s * z - 0.64596349f;
    s = (s * z + 1.57079637f) * r;
    float c = 0.000906739908f;
    c = c * z - 0.0208615288f;
    c = c * z + 0.253669411f;
    c = c * z - 1.23370051f;
    c = c * z + 1.0f;
    const float a = quadrant & 1 ? s : c;
    const float b = quadrant & 1 ? c : s;
    *cosine = (quadrant + 1) & 2 ? -a : a;
    *sine = quadrant & 2 ? -b : b;
}

}  // namespace batchkern
