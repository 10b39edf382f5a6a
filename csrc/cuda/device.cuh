// Helpers for all kernels: shared memory, reductions over a group of threads, and the ticket that finds the
// last block.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

// Declare shared memory. The tests define these macros differently, to run the kernels on the host.
#ifndef BATCHKERN_SHARED
#define BATCHKERN_SHARED(type, name) __shared__ type name
#define BATCHKERN_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace batchkern {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;  // of a block

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }

struct Sum {
    template <class T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};

// fmaxf ignores a NaN, but the sum of the exponentials is NaN then.
struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
    __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return max(a, b); }
};

// Reduces a value over each group of kWidth (a power of two) consecutive lanes of a warp. All lanes of a
// group get the same bits, because a + b == b + a.
template <int kWidth, class T, class Op>
__device__ __forceinline__ T reduce_lanes(T value, Op op) {
    const uint32_t mask = kWidth == kWarp ? 0xffffffffu : ((1u << kWidth) - 1u) << (lane() / kWidth * kWidth);
#pragma unroll
    for (int offset = kWidth / 2; offset > 0; offset /= 2)
        value = op(value, __shfl_xor_sync(mask, value, offset));
    return value;
}

// Reduces over a group of kGroup threads: some lanes of a warp, or the whole block. All of them get the
// result. The order of the operations is fixed. `scratch` holds one value per warp, and the next call may use
// it again.
template <int kGroup, class T, class Op>
__device__ __forceinline__ T reduce_group(T value, Op op, T (&scratch)[kMaxWarps]) {
    if constexpr (kGroup <= kWarp) {
        return reduce_lanes<kGroup>(value, op);
    } else {
        constexpr int kWarps = kGroup / kWarp;
        value = reduce_lanes<kWarp>(value, op);
        __syncthreads();  // the last call's values have been read
        if (lane() == 0) scratch[warp()] = value;
        __syncthreads();
        return reduce_lanes<kWarps>(scratch[lane() % kWarps], op);
    }
}

// An atomicAdd with release semantics for the writes of this thread, and for those of its block before a
// barrier; and the matching acquire fence. Both are cheaper than __threadfence(), which orders more than is
// needed.
__device__ __forceinline__ uint32_t add_release(uint32_t* p, uint32_t value) {
#ifdef __CUDA_ARCH__
    uint32_t before;
    asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
    return before;
#else
    return atomicAdd(p, value);
#endif
}
__device__ __forceinline__ void fence_acquire() {
#ifdef __CUDA_ARCH__
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// Whether this block is the last of `blocks` to call this. All writes of the other blocks before their calls
// are then visible to it, if its loads bypass the L1 cache (__ldcg). The ticket is 0 before the first call
// and after the last. One thread takes the ticket: the barriers extend the order to the writes and loads of
// its whole block.
__device__ __forceinline__ bool is_last(uint32_t* ticket, uint32_t blocks, bool& scratch) {
    __syncthreads();
    if (threadIdx.x == 0) {
        scratch = add_release(ticket, 1u) == blocks - 1;
        if (scratch) {
            *ticket = 0;
            fence_acquire();
        }
    }
    __syncthreads();
    return scratch;
}

}  // namespace batchkern
