// Rows of a cross entropy, by groups of threads: 8 lanes, a warp or a block for each row; or several blocks
// for each where rows are few and long. What both passes share.
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

// Of a multiprocessor: room for 80 registers each, and 48 KB of loads in flight, twice what an H200's memory
// asks for. 1,024 would have 64, of which some kernels spill. Label smoothing takes more.
template <bool kSmooth>
constexpr int kResidentThreads = kSmooth ? 512 : 768;

// The first row of this thread's group, how many rows on the next one is, and the thread's place in the
// group. With several blocks to a row, blockIdx.y says which of them this is.
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

// The vectors of a row that this block works on, of those from `begin` on and before `end`. The first block
// also has the elements before and behind them.
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

// The columns of a row that do not come in vectors, kMost at most: those before `head`, and those from
// `behind` on. They are loaded before the vectors and used after these, since a warp that waits for them
// issues no more loads. More than three for a thread do not fit in its registers, and are loaded late.
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

    // Calls use(column, element) for those of this thread.
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

// What sums are relative to.
__device__ __forceinline__ float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// As PyTorch's own cross entropy does: nothing is read out of bounds, and the next synchronisation raises.
__device__ __forceinline__ void check_class(int64_t target, int64_t classes) {
    assert(target >= 0 && target < classes && "target must be in [0, C) or ignore_index");
}

}  // namespace batchkern
