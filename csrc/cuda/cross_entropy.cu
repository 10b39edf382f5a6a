// Which kernel serves which shape of a cross entropy, and how many blocks.
#include "cross_entropy_backward.cuh"
#include "cross_entropy_forward.cuh"
#include "cross_entropy_general.cuh"
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
    ForwardScratch(void* memory, const CrossEntropyRows& of, unsigned parts) {
        Carver carver(memory);
        keys = carver.take<uint32_t>(of.rows);
        states = carver.take<RowState>(parts > 1 ? of.rows * parts : 0);
        block_sums = carver.take<BlockSum>(select_blocks(of.rows));
        const bool weighted = of.class_weight && !of.probabilities.data;
        row_weights = weighted ? carver.take<float>(of.rows) : nullptr;
        bytes = carver.taken(memory);
    }

    uint32_t* keys;
    RowState* states;
    BlockSum* block_sums;
    float* row_weights;
    size_t bytes;
};

// The kernels for rows find one by a multiplication: to divide as well would take registers that they lack.
bool is_rows(const RowLayout& at, const CrossEntropyRows& rows) {
    return are_side_by_side(at, rows.classes) && at.inner >= rows.rows;
}

bool is_general(const CrossEntropyRows& rows, bool stats) {
    return stats || rows.probabilities.data || !is_rows(rows.at, rows);
}

bool is_one_block(ElementType type, int64_t rows, int classes, unsigned parts) {
    return with_group(row_bytes(type, classes), [&](auto group) {
        const dim3 blocks = blocks_of<decltype(group)::value>(rows, parts);
        return blocks.x == 1 && blocks.y == 1;
    });
}

// Calls use(threads of a row, whether neighbours have rows side by side). Few rows of many classes get more
// threads each.
template <class Use>
auto with_places(const CrossEntropyRows& rows, Use use) {
    const bool columns = !are_side_by_side(rows.at, rows.classes);
    const bool many = rows.classes >= 2048 || rows.rows < 65536;
    if (columns && many) return use(std::integral_constant<int, 8>(), std::true_type());
    if (columns) return use(std::integral_constant<int, 1>(), std::true_type());
    if (rows.classes >= 2048) return use(std::integral_constant<int, 256>(), std::false_type());
    return use(std::integral_constant<int, kWarp>(), std::false_type());
}

cudaError_t launch_general_forward(ElementType type, const ForwardCall& call, const ForwardScratch& scratch,
                                   cudaStream_t stream) {
    const GeneralForward a{call.rows,    call.ignore_index, call.losses,  call.lse,
                           call.entropy, call.correct,      scratch.keys, scratch.row_weights};
    if (call.rows.rows == 0) return cudaSuccess;
    return with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        return with_places(call.rows, [&](auto across, auto columns) {
            constexpr int kAcross = decltype(across)::value;
            constexpr bool kColumns = decltype(columns)::value;
            const auto kernel = call.entropy ? &cross_entropy_general_forward<T, kAcross, kColumns, true>
                                             : &cross_entropy_general_forward<T, kAcross, kColumns, false>;
            return launch(stream, dim3(blocks_for(call.rows.rows, kGeneralThreads / kAcross)),
                          kGeneralThreads, 0, false, kernel, a);
        });
    });
}

template <int kAcross, bool kColumns>
cudaError_t launch_general_backward(ElementType type, const BackwardCall& call, cudaStream_t stream) {
    const unsigned blocks = blocks_for(call.rows.rows, kGeneralThreads / kAcross);
    // Eight blocks for each multiprocessor, of 64 columns or more to a thread.
    const int64_t wanted = 8 * multiprocessors() / blocks, most = call.rows.classes / (64 * kAcross);
    const auto parts = static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>({wanted, most, 65535})));
    return with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        return launch(stream, dim3(blocks, parts), kGeneralThreads, 0, false,
                      &cross_entropy_general_backward<T, kAcross, kColumns>, call);
    });
}

}  // namespace

Needs cross_entropy_needs(ElementType type, const CrossEntropyRows& rows, bool stats, bool selects) {
    if (is_general(rows, stats)) return {ForwardScratch(nullptr, rows, 1).bytes, selects};
    const unsigned parts = blocks_per_row(type, rows.rows, rows.classes);
    return {ForwardScratch(nullptr, rows, parts).bytes, !is_one_block(type, rows.rows, rows.classes, parts)};
}

cudaError_t launch_cross_entropy_forward(ElementType type, const ForwardCall& call, const Memory& memory,
                                         cudaStream_t stream) {
    const CrossEntropyRows& rows = call.rows;
    const bool general = is_general(rows, call.entropy != nullptr);
    const unsigned parts = general ? 1 : blocks_per_row(type, rows.rows, rows.classes);
    const ForwardScratch scratch(memory.scratch, rows, parts);
    const Reduction reduction = call.reduction.value_or(Reduction{});
    const Selection<KeyedLosses> selection{{scratch.keys, call.losses, scratch.row_weights},
                                           rows.rows,
                                           {reduction.keep_tensor, reduction.keep},
                                           {reduction.kept, reduction.mean, reduction.normalizer},
                                           memory.workspace,
                                           scratch.block_sums};
    const bool at_once = !general && call.reduction && rows.rows <= kOneBlock;
    const auto by_rows = [&] {
        const CrossEntropyForward a{rows,           call.ignore_index,
                                    call.losses,    reinterpret_cast<float2*>(call.lse),
                                    scratch.keys,   scratch.row_weights,
                                    scratch.states, parts > 1 ? memory.workspace->row_tickets : nullptr,
                                    at_once,        selection};
        return with_type(type, [&](auto* element) {
            using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
            return with_group(row_bytes(type, rows.classes), [&](auto group) {
                constexpr int kGroup = decltype(group)::value;
                const auto kernel = rows.smoothing > 0 ? &cross_entropy_forward<T, true, kGroup>
                                                       : &cross_entropy_forward<T, false, kGroup>;
                return launch(stream, blocks_of<kGroup>(rows.rows, parts), kThreads<kGroup>, 0, false, kernel,
                              a);
            });
        });
    };
    const cudaError_t error = general ? launch_general_forward(type, call, scratch, stream) : by_rows();
    if (at_once || !call.reduction || error != cudaSuccess) return error;
    return launch(stream, dim3(select_blocks(rows.rows)), kSelectThreads, 0, true,
                  &select_rows<true, KeyedLosses>, selection);
}

cudaError_t launch_cross_entropy_backward(ElementType type, const BackwardCall& call, cudaStream_t stream) {
    const CrossEntropyRows& rows = call.rows;
    if (rows.rows == 0 || rows.classes == 0) return cudaSuccess;
    if (!are_side_by_side(rows.at, rows.classes)) return launch_general_backward<1, true>(type, call, stream);
    if (rows.probabilities.data || !is_rows(rows.at, rows) || !is_rows(call.grad_at, rows))
        return launch_general_backward<kWarp, false>(type, call, stream);
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
