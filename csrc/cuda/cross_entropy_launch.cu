// Chooses the kernel and the number of blocks for each shape of a cross entropy.
#include "cross_entropy_backward.cuh"
#include "cross_entropy_forward.cuh"
#include "cross_entropy_general.cuh"
#include "cross_entropy_narrow.cuh"
#include "launch.cuh"

namespace batchkern {
namespace {

// Calls use(threads per row): few enough that each has at least two loads of 16 bytes if a row has 256 bytes
// or more.
template <class Use>
auto with_group(int64_t row_bytes, Use use) {
    if (row_bytes <= 1024) return use(std::integral_constant<int, 8>());
    if (row_bytes <= 8192) return use(std::integral_constant<int, kWarp>());
    return use(std::integral_constant<int, kThreads>());
}

int64_t row_bytes(ElementType type, int classes) { return int64_t{classes} * (type == kFloat32 ? 4 : 2); }

// Calls use(lanes per row) for narrow rows.
template <class Use>
auto with_lanes(int64_t row_bytes, Use use) {
    if (row_bytes <= kLaneBytes) return use(std::integral_constant<int, 1>());
    if (row_bytes <= 2 * kLaneBytes) return use(std::integral_constant<int, 2>());
    return use(std::integral_constant<int, 4>());
}

bool is_narrow(ElementType type, const void* rows, const RowLayout& at, int classes) {
    return classes > 0 && at.row == classes && row_bytes(type, classes) <= kNarrowBytes &&
           reinterpret_cast<uintptr_t>(rows) % 16 == 0;
}

// The number of blocks that can be resident on the GPU at once.
int64_t resident_blocks(const CrossEntropyRows& rows) {
    const int threads = rows.smoothing > 0 ? kResidentThreads<true> : kResidentThreads<false>;
    return int64_t{threads} / kThreads * multiprocessors();
}

// The number of blocks that share a row. It is more than one if rows are long and too few to keep all
// multiprocessors busy: then as many as can be resident at once, each with at least 16 KiB of the row. (A
// cluster of thread blocks would do the same, but only from Hopper on.)
unsigned blocks_per_row(ElementType type, const CrossEntropyRows& of) {
    constexpr int64_t kPartBytes = 16384, kMaxParts = 256;  // 256: the number of threads that merge the parts
    if (of.rows == 0 || of.rows > kMaxSplitRows) return 1;
    const int64_t most = row_bytes(type, of.classes) / kPartBytes;
    return static_cast<unsigned>(
        std::max<int64_t>(1, std::min({resident_blocks(of) / of.rows, most, kMaxParts})));
}

// If a row has a warp or fewer threads, only resident blocks are launched. They loop over rows, and prefetch
// the target of the next row while they read this one: one row is so little work that starting a block for it
// would take about as long.
template <int kGroup>
dim3 blocks_of(const CrossEntropyRows& of, unsigned parts) {
    const unsigned blocks = blocks_for(std::max<int64_t>(of.rows, 1), kThreads / kGroup);
    return dim3(kGroup <= kWarp ? std::min<unsigned>(blocks, resident_blocks(of)) : blocks, parts);
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

// Whether row i begins at i * at.row and its classes are contiguous, which the kernels for rows require: the
// division in row_offset would take registers that they do not have.
bool is_rows(const RowLayout& at, const CrossEntropyRows& rows) {
    return are_side_by_side(at, rows.classes) && at.inner >= rows.rows;
}

bool is_general(const CrossEntropyRows& rows, bool stats) {
    return stats || rows.probabilities.data || !is_rows(rows.at, rows);
}

// How a forward pass is launched. Its last block selects rows if its threads can hold all losses in
// registers.
struct Plan {
    bool is_general, is_narrow;
    unsigned parts;
    dim3 blocks;
    int threads;

    bool needs_workspace() const { return blocks.x * blocks.y > 1; }
    bool selects(int64_t rows) const {
        return !is_general && rows <= int64_t{is_narrow ? kHeldOf64 : kHeld} * threads;
    }
};

Plan plan_forward(ElementType type, const CrossEntropyRows& rows, bool stats) {
    if (is_general(rows, stats)) return {true, false, 1, {}, kGeneralThreads};
    const int64_t bytes = row_bytes(type, rows.classes);
    if (is_narrow(type, rows.logits, rows.at, rows.classes))
        return with_lanes(bytes, [&](auto lanes) {
            const dim3 blocks(
                blocks_for(std::max<int64_t>(rows.rows, 1), kNarrowThreads / decltype(lanes)::value));
            return Plan{false, true, 1, blocks, kNarrowThreads};
        });
    const unsigned parts = blocks_per_row(type, rows);
    return with_group(bytes, [&](auto group) {
        return Plan{false, false, parts, blocks_of<decltype(group)::value>(rows, parts), kThreads};
    });
}

// Calls use(threads per row, whether the classes are not contiguous). Rows get more threads if they have many
// classes or, with classes that are not contiguous, if there are few of them.
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
    // Eight blocks per multiprocessor, with at least 64 columns per thread.
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
    const Plan plan = plan_forward(type, rows, stats);
    const bool grid_selects = selects && !plan.selects(rows.rows) && select_blocks(rows.rows) > 1;
    return {ForwardScratch(nullptr, rows, plan.parts).bytes,
            grid_selects || (!plan.is_general && plan.needs_workspace())};
}

cudaError_t launch_cross_entropy_forward(ElementType type, const ForwardCall& call, const Memory& memory,
                                         cudaStream_t stream) {
    const CrossEntropyRows& rows = call.rows;
    const Plan plan = plan_forward(type, rows, call.entropy != nullptr);
    const ForwardScratch scratch(memory.scratch, rows, plan.parts);
    const Reduction reduction = call.reduction.value_or(Reduction{});
    const Selection<KeyedLosses> selection{{scratch.keys, scratch.row_weights},
                                           rows.rows,
                                           {reduction.keep_tensor, reduction.keep},
                                           {reduction.kept, reduction.mean, reduction.normalizer},
                                           memory.workspace,
                                           scratch.block_sums};
    const bool at_once = call.reduction && plan.selects(rows.rows);
    const auto by_rows = [&] {
        const CrossEntropyForward a{rows,           call.ignore_index,
                                    call.losses,    reinterpret_cast<float2*>(call.lse),
                                    scratch.keys,   scratch.row_weights,
                                    scratch.states, plan.parts > 1 ? memory.workspace->row_tickets : nullptr,
                                    at_once,        selection};
        const bool smooth = rows.smoothing > 0;
        return with_type(type, [&](auto* element) {
            using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
            const auto start = [&](auto kernel) {
                return launch(stream, plan.blocks, plan.threads, 0, false, kernel, a);
            };
            if (plan.is_narrow)
                return with_lanes(row_bytes(type, rows.classes), [&](auto lanes) {
                    constexpr int kLanes = decltype(lanes)::value;
                    return start(smooth ? &cross_entropy_narrow_forward<T, true, kLanes>
                                        : &cross_entropy_narrow_forward<T, false, kLanes>);
                });
            return with_group(row_bytes(type, rows.classes), [&](auto group) {
                constexpr int kGroup = decltype(group)::value;
                return start(smooth ? &cross_entropy_forward<T, true, kGroup>
                                    : &cross_entropy_forward<T, false, kGroup>);
            });
        });
    };
    const cudaError_t error =
        plan.is_general ? launch_general_forward(type, call, scratch, stream) : by_rows();
    if (at_once || !call.reduction || error != cudaSuccess) return error;
    const int blocks = select_blocks(rows.rows);
    return launch(stream, dim3(blocks), kSelectThreads, 0, blocks > 1,
                  blocks > 1 ? &select_rows<true, KeyedLosses> : &select_rows<false, KeyedLosses>, selection);
}

cudaError_t launch_cross_entropy_backward(ElementType type, const BackwardCall& call, cudaStream_t stream) {
    const CrossEntropyRows& rows = call.rows;
    if (rows.rows == 0 || rows.classes == 0) return cudaSuccess;
    if (!are_side_by_side(rows.at, rows.classes)) return launch_general_backward<1, true>(type, call, stream);
    if (rows.probabilities.data || !is_rows(rows.at, rows) || !is_rows(call.grad_at, rows))
        return launch_general_backward<kWarp, false>(type, call, stream);
    const bool smooth = rows.smoothing > 0;
    const bool narrow = is_narrow(type, rows.logits, rows.at, rows.classes) &&
                        is_narrow(type, call.grad, call.grad_at, rows.classes);
    const unsigned parts = narrow ? 1 : blocks_per_row(type, rows);
    return with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        if (narrow)
            return with_lanes(row_bytes(type, rows.classes), [&](auto lanes) {
                constexpr int kLanes = decltype(lanes)::value;
                return launch(stream, dim3(blocks_for(rows.rows, kNarrowThreads / kLanes)), kNarrowThreads, 0,
                              false,
                              smooth ? &cross_entropy_narrow_backward<T, true, kLanes>
                                     : &cross_entropy_narrow_backward<T, false, kLanes>,
                              call);
            });
        return with_group(row_bytes(type, rows.classes), [&](auto group) {
            constexpr int kGroup = decltype(group)::value, kOfBlock = kBackwardThreads<kGroup>;
            return launch(
                stream, dim3(blocks_for(rows.rows, kOfBlock / kGroup), parts), kOfBlock, 0, false,
                smooth ? &cross_entropy_backward<T, true, kGroup> : &cross_entropy_backward<T, false, kGroup>,
                call);
        });
    });
}

}  // namespace batchkern
