// Launches of a ranking: one kernel for few indices; for many, a radix sort of all rows between pack_rows and
// unpack_rows.
#include "launch.cuh"
#include "rank_batches.cuh"

namespace batchkern {
namespace {

struct RankScratch {
    RankScratch(void* memory, int64_t n, int64_t k) {
        Carver carver(memory);
        const bool few = k <= kMaxSortedInBlock;
        packed = carver.take<uint64_t>(few ? k : n);
        buffer = carver.take<uint64_t>(few ? 0 : n);
        sort_bytes = few ? 0 : sort_scratch(n);
        sort = carver.take<char>(sort_bytes);
        bytes = carver.taken(memory);
    }

    uint64_t *packed, *buffer;
    char* sort;
    size_t sort_bytes, bytes;
};

}  // namespace

Needs rank_needs(int64_t n, int64_t k) {
    return {RankScratch(nullptr, n, k).bytes, k <= kMaxSortedInBlock && select_blocks(n) > 1};
}

cudaError_t launch_rank(ElementType type, const LossVector& losses, int64_t k, int64_t* indices,
                        const Memory& memory, cudaStream_t stream) {
    if (k == 0) return cudaSuccess;
    const int64_t n = losses.n;
    const RankScratch scratch(memory.scratch, n, k);
    return with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        const PlainLosses<T> rows{static_cast<const T*>(losses.losses), losses.stride, losses.mask,
                                  losses.mask_stride};
        if (k <= kMaxSortedInBlock) {
            const int blocks = select_blocks(n);
            size_t bytes = sizeof(uint64_t);
            while (bytes < k * sizeof(uint64_t)) bytes *= 2;
            const RankFew<T> a{rows, n, static_cast<uint32_t>(k), indices, scratch.packed, memory.workspace};
            return launch(stream, dim3(blocks), kSelectThreads, bytes, blocks > 1,
                          blocks > 1 ? &rank_few<true, T> : &rank_few<false, T>, a);
        }
        uint64_t* sorted = nullptr;
        cudaError_t error = launch(stream, dim3(blocks_for(n, kPackThreads)), kPackThreads, 0, false,
                                   &pack_rows<T>, rows, scratch.packed, n);
        if (error == cudaSuccess)
            error = launch_sort(scratch.packed, scratch.buffer, n, scratch.sort, scratch.sort_bytes, &sorted,
                                stream);
        if (error != cudaSuccess) return error;
        return launch(stream, dim3(blocks_for(k, kPackThreads)), kPackThreads, 0, false, &unpack_rows, sorted,
                      indices, k);
    });
}

}  // namespace batchkern
