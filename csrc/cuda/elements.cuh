// Loads, stores and conversions of the three element types, one element or 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../element_type.h"
#include "device.cuh"

namespace batchkern {

template <class T>
constexpr int kPerVector = 16 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Loads at this point of the program. The compiler would move an ordinary load down to the use of its value,
// after other loads for which the use then has to wait.
__device__ __forceinline__ bool load_here(const bool* p) {
#ifdef __CUDA_ARCH__
    uint32_t result;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(result) : "l"(p));
    return result != 0;
#else
    return *p;
#endif
}

__device__ __forceinline__ float load_here(const float* p) {
#ifdef __CUDA_ARCH__
    float result;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(result) : "l"(p));
    return result;
#else
    return *p;
#endif
}

template <class T>
__device__ __forceinline__ T load_here(const T* p) {
    static_assert(sizeof(T) == 2);
#ifdef __CUDA_ARCH__
    uint16_t result;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(result) : "l"(p));
    return {result};
#else
    return *p;
#endif
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}

// Conversions between the elements and the 16 bytes of a vectorised load or store.
__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ void unpack(const uint4& v, float (&x)[4], const float*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(word(v, i));
}

__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8], const BFloat16*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(word(v, i) << 16);
        x[2 * i + 1] = __uint_as_float(word(v, i) & 0xffff0000u);
    }
}

__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8], const Float16*) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(word(v, i) & 0xffffu)));
        x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(word(v, i) >> 16)));
    }
}

__device__ __forceinline__ uint4 pack(const float (&x)[4], float*) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[8], T*) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] = from_float<T>(x[2 * i]).bits | uint32_t{from_float<T>(x[2 * i + 1]).bits} << 16;
    return {words[0], words[1], words[2], words[3]};
}

// 16 of the 32 bytes of two vectors, beginning with byte `past`, which is a multiple of 2.
__device__ __forceinline__ uint4 shift_bytes(const uint4& first, const uint4& second, int past) {
    uint32_t w[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = past & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = past & 4 ? w[i + 1] : w[i];
    const int bits = past % 4 * 8;
    return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
            __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits)};
}

// The columns of a row in groups of 16 bytes, whatever the alignment of the row.
template <class T>
struct ColumnGroups {
    static constexpr int kColumns = kPerVector<T>;

    __device__ __forceinline__ ColumnGroups(const T* row, int columns)
        : vectors(reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row) -
                                                 reinterpret_cast<uintptr_t>(row) % 16)),
          past(static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16)),
          count(static_cast<unsigned>(columns) / kColumns) {}

    // Loads kN groups, kStep apart, and calls use(loaded, a compile-time constant: whether all of them are
    // known to lie before `end`). `all`, whether they do, must be the same for all threads of a warp, which
    // would otherwise execute both branches one after the other. An unaligned group is shifted out of two
    // aligned vectors, which must lie within the row: so it must be neither the first nor the last.
    template <bool kAligned, int kStep, int kN, class Use>
    __device__ __forceinline__ void load(int group, int end, bool all, Use use) const {
        uint4 loaded[kN];
        if (kAligned && all) {
#pragma unroll
            for (int i = 0; i < kN; ++i) loaded[i] = vectors[group + i * kStep];
            return use(loaded, std::true_type());
        }
#pragma unroll
        for (int i = 0; i < kN; ++i) loaded[i] = vectors[min(group + i * kStep, end - 1)];
        if (!kAligned) {
#pragma unroll
            for (int i = 0; i < kN; ++i)
                loaded[i] = shift_bytes(loaded[i], vectors[min(group + i * kStep, end - 1) + 1], past);
        }
        use(loaded, std::false_type());
    }

    const uint4* vectors;  // the first begins `past` bytes before the row
    int past;
    int count;
};

// The number of elements before the first aligned 16-byte vector of a row, of such vectors, and of elements
// after the last.
template <class T>
struct RowParts {
    int head;
    int vectors;
    int tail;

    __device__ __forceinline__ RowParts(const T* row, int n) {
        const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
        head = past == 0 ? 0 : min(kPerVector<T> - past, n);
        vectors = (n - head) / kPerVector<T>;
        tail = n - head - vectors * kPerVector<T>;
    }
};

}  // namespace batchkern
