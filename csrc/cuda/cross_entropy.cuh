// Helpers that the forward and the backward pass of a cross entropy share. Each row is computed by a group of
// threads: 8 lanes, a warp or a block; or by several blocks if rows are few and long.
#pragma once

#undef NDEBUG  // the check of a target stays in every build
#include <assert.h>

#include "elements.cuh"
#include "kernels.h"

namespace batchkern {

// Threads of a block of the forward pass.
constexpr int kThreads = 256;

// Vectors that a thread loads before it uses the first.
constexpr int kInFlight = 4;

// Resident threads of a multiprocessor. 768 threads have 80 registers each and keep 48 KB of loads in flight,
// twice what is needed to saturate the memory of an H200. 1,024 threads would have 64 registers each, with
// which some kernels spill. Label smoothing takes more registers.
template <bool kSmooth>
constexpr int kResidentThreads = kSmooth ? 512 : 768;

// The first row of this thread's group, the distance from it to the next row of the group, and the index of
// the thread in the group. If several blocks share a row, blockIdx.y is the index of this block among them.
template <int kGroup, int kOfBlock>
__device__ __forceinline__ int64_t first_row() {
    return int64_t{blockIdx.x} * (kOfBlock / kGroup) + threadIdx.x / kGroup;
}
template <int kGroup, int kOfBlock>
__device__ __forceinline__ int64_t row_step() {
    return int64_t{gridDim.x} * (kOfBlock / kGroup);
}
template <int kGroup>
__device__ __forceinline__ int member() {
    return threadIdx.x % kGroup;
}

// This block's share of the vectors [begin, end) of a row. The first block also has the elements before and
// after the vectors.
struct Share {
    int begin;
    int end;
    bool first;
};

template <int kGroup>
__device__ __forceinline__ Share share_of_block(int begin, int end) {
    const int64_t parts = gridDim.y, part = blockIdx.y, count = end - begin;
    if (kGroup <= kWarp || parts == 1) return {begin, end, true};
    return {begin + static_cast<int>(count * part / parts),
            begin + static_cast<int>(count * (part + 1) / parts), part == 0};
}

// The columns of a row that are not loaded as vectors, at most kMost: those before `head` and those from
// `behind` on. They are loaded before the vectors and used after them, because a warp that waits for them
// would issue no further loads. More than three per thread would not fit into its registers: then each is
// loaded at its use.
template <class T, int kGroup, int kMost>
struct Edges {
    static constexpr int kOwn = (kMost + kGroup - 1) / kGroup;
    static constexpr bool kEarly = kOwn <= 3;

    __device__ __forceinline__ Edges(const T* row_, int head_, int behind_, int end_)
        : row(row_), head(head_), behind(behind_), end(end_) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            if (kEarly && column(i) < end) loaded[i] = load_here(row + column(i));
    }

    // Calls use(column, element) for the columns of this thread.
    template <class Use>
    __device__ __forceinline__ void each(Use use) const {
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            if (column(i) < end) use(column(i), to_float(kEarly ? loaded[i] : row[column(i)]));
    }

    __device__ __forceinline__ int column(int i) const {
        const int place = member<kGroup>() + i * kGroup;
        return place < head ? place : place - head + behind;
    }

    const T* row;
    int head, behind, end;
    T loaded[kOwn];
};

// The number that is subtracted from logits: their maximum, or 0 if that is -inf.
__device__ __forceinline__ float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// An assertion, as in PyTorch's own cross entropy: nothing is read out of bounds, and the next
// synchronisation raises an error.
__device__ __forceinline__ void check_class(int64_t target, int64_t classes) {
    assert(target >= 0 && target < classes && "target must be in [0, C) or ignore_index");
}

}  // namespace batchkern
