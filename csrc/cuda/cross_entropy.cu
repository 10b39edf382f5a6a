// Which kernel serves which shape of a cross entropy, and how many blocks.
#include "cross_entropy_backward.cuh"
#include "cross_entropy_forward.cuh"
#include "launch.cuh"

namespace batchkern {
namespace {

// The threads of a row: as many as have two loads of 16 bytes or more each, where the row is long enough.
template <class Use>
auto with_group(int64_t row_bytes, Use use) {
    if (row_bytes <= 256) return use(std::integral_constant<int, 8>());
    if (row_bytes <= 8192) return use(std::integral_constant<int, kWarp>());
    if (row_bytes <= 32768) return use(std::integral_constant<int, 256>());
    return use(std::integral_constant<int, 512>());
}

int64_t row_bytes(ElementType type, int classes) { return int64_t{classes} * (type == kFloat32 ? 4 : 2); }

// Blocks that share a row. More than one where rows are long and too few to keep all multiprocessors busy:
// eight blocks for each, of 16 KiB or more. (A cluster of blocks would do the same on Hopper alone.)
unsigned blocks_per_row(ElementType type, int64_t rows, int classes) {
    constexpr int64_t kPartBytes = 16384, kMaxParts = 256;  // 256: the threads that merge them
    if (rows == 0 || rows > kMaxSplitRows) return 1;
    const int64_t wanted = 8 * multiprocessors() / rows, most = row_bytes(type, classes) / kPartBytes;
    return static_cast<unsigned>(std::max<int64_t>(1, std::min({wanted, most, kMaxParts})));
}

template <int kGroup>
dim3 blocks_of(int64_t rows, unsigned parts) {
    constexpr int kRows = kThreads<kGroup> / kGroup;
    // Twice as many rows as groups are still one block's work, which selects without waiting for others.
    if (parts == 1 && rows <= 2 * kRows) return dim3(1);
    return dim3(blocks_for(rows, kRows), parts);
}

struct ForwardScratch {
    ForwardScratch(void* memory, int64_t rows, unsigned parts) {
        Carver carver(memory);
        keys = carver.take<uint32_t>(rows);
        states = carver.take<RowState>(parts > 1 ? rows * parts : 0);
        block_sums = carver.take<BlockSum>(select_blocks(rows));
        bytes = carver.taken(memory);
    }

    uint32_t* keys;
    RowState* states;
    BlockSum* block_sums;
    size_t bytes;
};

}  // namespace

Needs cross_entropy_needs(ElementType type, int64_t rows, int classes) {
    const unsigned parts = blocks_per_row(type, rows, classes);
    const bool one_block = with_group(row_bytes(type, classes), [&](auto group) {
        const dim3 blocks = blocks_of<decltype(group)::value>(rows, parts);
        return blocks.x == 1 && blocks.y == 1;
    });
    return {ForwardScratch(nullptr, rows, parts).bytes, !one_block};
}

cudaError_t launch_cross_entropy_forward(ElementType type, const ForwardCall& call, const Memory& memory,
                                         cudaStream_t stream) {
    const CrossEntropyRows& rows = call.rows;
    const unsigned parts = blocks_per_row(type, rows.rows, rows.classes);
    const ForwardScratch scratch(memory.scratch, rows.rows, parts);
    const float* const weights = rows.class_weight;
    const Reduction reduction = call.reduction.value_or(Reduction{});
    const Selection<KeyedLosses> selection{{scratch.keys, call.losses, rows.target, weights},
                                           rows.rows,
                                           {reduction.keep_tensor, reduction.keep},
                                           {reduction.kept, reduction.mean, reduction.normalizer},
                                           memory.workspace,
                                           scratch.block_sums};
    const bool at_once = call.reduction && rows.rows <= kOneBlock;
    const CrossEntropyForward a{rows,
                                call.ignore_index,
                                call.losses,
                                reinterpret_cast<float2*>(call.lse),
                                scratch.keys,
                                scratch.states,
                                parts > 1 ? memory.workspace->row_tickets : nullptr,
                                at_once,
                                selection};
    const cudaError_t error = with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        return with_group(row_bytes(type, rows.classes), [&](auto group) {
            constexpr int kGroup = decltype(group)::value;
            const auto kernel = rows.smoothing > 0 ? &cross_entropy_forward<T, true, kGroup>
                                                   : &cross_entropy_forward<T, false, kGroup>;
            return launch(stream, blocks_of<kGroup>(rows.rows, parts), kThreads<kGroup>, 0, false, kernel, a);
        });
    });
    if (at_once || !call.reduction || error != cudaSuccess) return error;
    return launch(stream, dim3(select_blocks(rows.rows)), kSelectThreads, 0, true,
                  &select_rows<true, KeyedLosses>, selection);
}

cudaError_t launch_cross_entropy_backward(ElementType type, const BackwardCall& call, cudaStream_t stream) {
    const CrossEntropyRows& rows = call.rows;
    if (rows.rows == 0 || rows.classes == 0) return cudaSuccess;
    const unsigned parts = blocks_per_row(type, rows.rows, rows.classes);
    return with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        return with_group(row_bytes(type, rows.classes), [&](auto group) {
            constexpr int kGroup = decltype(group)::value;
            const auto kernel = rows.smoothing > 0 ? &cross_entropy_backward<T, true, kGroup>
                                                   : &cross_entropy_backward<T, false, kGroup>;
            return launch(stream, blocks_of<kGroup>(rows.rows, parts), kThreads<kGroup>, 0, false, kernel,
                          call);
        });
    });
}

}  // namespace batchkern
