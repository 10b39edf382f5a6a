// Indices of the highest losses in descending order. A few are selected and sorted within one block; for
// many, all losses are sorted (rank_batches_sort.cu), between a kernel that packs them and one that unpacks
// the highest.
#pragma once

#include "select.cuh"

namespace batchkern {

// At most this many rows are sorted within a block, in 32 KiB of shared memory.
constexpr int kMaxSortedInBlock = 4096;

// Ascending order of packed rows is descending order of losses, ties by lower index.
__device__ __forceinline__ uint64_t pack_row(uint32_t key, int64_t i) {
    return uint64_t{~key} << 32 | static_cast<uint32_t>(i);
}
__device__ __forceinline__ int64_t packed_index(uint64_t packed) {
    return static_cast<int64_t>(packed & 0xffffffffu);
}

template <class T>
struct RankFew {
    PlainLosses<T> rows;
    int64_t n;
    uint32_t k;          // 1 to kMaxSortedInBlock
    int64_t* indices;    // (k,)
    uint64_t* gathered;  // (k,), with several blocks
    Workspace* workspace;
};

struct RankStorage {
    SelectStorage select;
    uint32_t gathered;
    uint32_t place;
};

// A bitonic sort; `size` is a power of two.
template <int kThreads>
__device__ __forceinline__ void sort_ascending(uint64_t* values, int size) {
    for (int length = 2; length <= size; length *= 2) {
        for (int stride = length / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
                const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
                const uint64_t a = values[low], b = values[high];
                const bool rising = (low & length) == 0;
                if ((a > b) == rising) values[low] = b, values[high] = a;
            }
        }
    }
    __syncthreads();
}

// Needs dynamic shared memory: 8 bytes times k, rounded up to a power of two.
template <bool kGrid, class T>
__global__ void __launch_bounds__(kSelectThreads, 1) rank_few(const RankFew<T> a) {
    BATCHKERN_SHARED(RankStorage, shared);
    BATCHKERN_DYNAMIC_SHARED(uint64_t, chosen);
    Merge* const merge = kGrid ? &a.workspace->merge : nullptr;
    Selector<kSelectThreads, kGrid ? kOfGrid : kHeldOf64> selector{a.n, merge, shared.select, {}};
    selector.hold(a.rows);
    if (threadIdx.x == 0) shared.gathered = 0;  // find() has barriers
    const Threshold threshold = selector.find(a.rows, selector.survey(a.rows), a.k, 0);
    selector.each(a.rows, [&](int64_t i, uint32_t key) {
        if (threshold.keeps(key, i)) chosen[atomicAdd(&shared.gathered, 1u)] = pack_row(key, i);
    });
    __syncthreads();
    if (kGrid) {  // the order of the blocks does not matter: the rows are sorted, and no two are equal
        if (threadIdx.x == 0) shared.place = atomicAdd(&merge->gathered, shared.gathered);
        __syncthreads();
        for (uint32_t j = threadIdx.x; j < shared.gathered; j += kSelectThreads)
            a.gathered[shared.place + j] = chosen[j];
        if (!is_last(&merge->ticket, gridDim.x, shared.select.last)) return;
        selector.clear(threshold.passes);
        for (uint32_t j = threadIdx.x; j < a.k; j += kSelectThreads) chosen[j] = __ldcg(a.gathered + j);
    }
    uint32_t size = 1;
    while (size < a.k) size *= 2;
    for (uint32_t j = a.k + threadIdx.x; j < size; j += kSelectThreads) chosen[j] = ~uint64_t{0};
    sort_ascending<kSelectThreads>(chosen, static_cast<int>(size));
    for (uint32_t j = threadIdx.x; j < a.k; j += kSelectThreads) a.indices[j] = packed_index(chosen[j]);
}

constexpr int kPackThreads = 256;

template <class T>
__global__ void __launch_bounds__(kPackThreads)
    pack_rows(const PlainLosses<T> rows, uint64_t* packed, int64_t n) {
    const int64_t step = int64_t{gridDim.x} * kPackThreads;
    for (int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x; i < n; i += step)
        packed[i] = pack_row(rows.key_of(rows.load(i)), i);
}

__global__ void __launch_bounds__(kPackThreads)
    unpack_rows(const uint64_t* packed, int64_t* indices, int64_t k) {
    const int64_t step = int64_t{gridDim.x} * kPackThreads;
    for (int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x; i < k; i += step)
        indices[i] = packed_index(packed[i]);
}

}  // namespace batchkern
