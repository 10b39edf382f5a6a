// Rows of a cross entropy, by groups of threads: 8 lanes, a warp or a block for each row; or several blocks
// for each where rows are few and long. What both passes share.
#pragma once

#undef NDEBUG  // the check of a target stays in every build
#include <assert.h>

#include "elements.cuh"
#include "launch.h"

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

// The vectors of a row that this block works on. The first block also has the elements before them, the last
// one those behind.
struct Share {
    int begin;
    int end;
    bool first;
    bool last;
};

template <int kGroup>
__device__ __forceinline__ Share share_of_block(int vectors) {
    const int64_t parts = gridDim.y, part = blockIdx.y;
    if (kGroup <= kWarp || parts == 1) return {0, vectors, true, true};
    return {static_cast<int>(vectors * part / parts), static_cast<int>(vectors * (part + 1) / parts),
            part == 0, part == parts - 1};
}

// What sums are relative to.
__device__ __forceinline__ float base_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// As PyTorch's own cross entropy does: nothing is read out of bounds, and the next synchronisation raises.
__device__ __forceinline__ void check_class(int64_t target, int64_t classes) {
    assert(target >= 0 && target < classes && "target must be in [0, C) or ignore_index");
}

}  // namespace batchkern
