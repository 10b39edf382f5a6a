// The losses of all rows whose classes are contiguous in memory, in one pass over the logits. If `select` is
// true, the last block to finish also selects rows, in the same launch.
//
// A thread keeps the running maximum m of its elements and the sums of exp(z - m) and, with label smoothing,
// of w (z - m) and of w. The terms of each sum have the same sign, so that no digits cancel. Only a few
// numbers per row are written to global memory.
#pragma once

#include "../order.h"
#include "cross_entropy.cuh"
#include "select.cuh"

namespace batchkern {

// The state of a row, or of a part of it: its maximum m, and sums relative to m (to 0 if m is -inf).
struct alignas(16) RowState {
    float maximum;
    float sum;       // of exp(z - m)
    float distance;  // of w (z - m), with label smoothing
    float weight;    // of w, with label smoothing
};

struct CrossEntropyForward {
    CrossEntropyRows rows;
    int64_t ignore_index;
    float* losses;          // (rows,), 0 where ignored
    float2* lse;            // (rows,): the maximum m, and log of the sum of exp(z - m); 0 where ignored
    uint32_t* keys;         // (rows,), 0 where ignored: no loss has this key
    float* row_weights;     // (rows,): the class weight of each target; null without class weights
    RowState* parts;        // (rows, gridDim.y), used if several blocks share a row
    uint32_t* row_tickets;  // (rows,), zeros, used if several blocks share a row
    bool select;            // whether the last block selects
    Selection<KeyedLosses> selection;
};

struct ForwardStorage {
    float scratch[kMaxWarps];
    bool last;
};

// e^d for d <= 0. 16-bit logits have twice as many elements per byte, so that with expf the instructions
// would take longer than the loads: they use the hardware's approximation of 2^x, whose error is up to 2 ulp.
__device__ __forceinline__ float exp_to_sum(float d, const float*) { return expf(d); }
__device__ __forceinline__ float exp_to_sum(float d, const void*) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(d * 1.44269504f));
    return result;
#else
    return exp2f(d * 1.44269504f);
#endif
}

// Raises the maximum of a state and rescales its sums. If nothing was added yet, the factor is 0, and so is
// the weight.
template <bool kSmooth, class T>
__device__ __forceinline__ void raise(RowState& a, float maximum) {
    const float base = base_of(maximum);
    a.sum *= exp_to_sum(a.maximum - base, static_cast<const T*>(nullptr));
    if (kSmooth) a.distance += (base_of(a.maximum) - base) * a.weight;
    a.maximum = maximum;
}

// Adds elements that are not above a.maximum. `weight` points to the class weight of the first, or is null.
// With four partial sums, an addition does not depend on the one before.
template <bool kSmooth, int kN, class T>
__device__ __forceinline__ void accumulate(RowState& a, float (&sums)[4], const float (&z)[kN],
                                           const float* weight) {
    const float base = base_of(a.maximum);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
        const float d = z[i] - base;
        sums[i % 4] += exp_to_sum(d, static_cast<const T*>(nullptr));
        if (kSmooth) {
            const float w = weight ? weight[i] : 1.0f;
            a.distance += w * d;
            a.weight += w;
        }
    }
}

template <bool kSmooth, class T>
__device__ __forceinline__ void add_element(RowState& a, float element, const float* weight) {
    const float z[1] = {element};
    raise<kSmooth, T>(a, fmaxf(a.maximum, z[0]));
    float sums[4] = {};
    accumulate<kSmooth, 1, T>(a, sums, z, weight);
    a.sum += sums[0];
}

// Merges the states of the threads of a group.
template <bool kSmooth, int kGroup>
__device__ __forceinline__ RowState merge_group(RowState a, ForwardStorage& shared) {
    raise<kSmooth, float>(a, reduce_group<kGroup>(a.maximum, Max(), shared.scratch));
    a.sum = reduce_group<kGroup>(a.sum, Sum(), shared.scratch);
    if (kSmooth) {
        a.distance = reduce_group<kGroup>(a.distance, Sum(), shared.scratch);
        a.weight = reduce_group<kGroup>(a.weight, Sum(), shared.scratch);
    }
    return a;
}

// Adds vectors that are kGroup apart: all of them if kAll is true, otherwise those before `end`.
template <bool kSmooth, int kGroup, bool kAll, class T, int kCount>
__device__ __forceinline__ void add_groups(RowState& state, const uint4 (&loaded)[kCount], int group, int end,
                                           const float* weight) {
    constexpr const T* kOf = nullptr;
    constexpr int kN = kPerVector<T>;
    float maximum = state.maximum, z[kN], sums[4] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (!kAll && group + i * kGroup >= end) break;
        unpack(loaded[i], z, kOf);
#pragma unroll
        for (int j = 0; j < kN; ++j) maximum = fmaxf(maximum, z[j]);
    }
    raise<kSmooth, T>(state, maximum);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (!kAll && group + i * kGroup >= end) break;
        unpack(loaded[i], z, kOf);
        accumulate<kSmooth, kN, T>(state, sums, z, weight ? weight + (group + i * kGroup) * kN : nullptr);
    }
    state.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A thread adds the same columns of every row of a launch, so that equal rows have the same loss to the last
// bit, wherever they begin in memory.
template <class T, bool kSmooth, int kGroup, bool kAligned>
__device__ __forceinline__ void read_groups(RowState& state, const ColumnGroups<T>& groups,
                                            const Share& share, const float* weight) {
    constexpr int kStep = kInFlight * kGroup;
    for (int begin = share.begin; begin < share.end; begin += kStep) {
        const int group = begin + member<kGroup>();
        groups.template load<kAligned, kGroup, kInFlight>(
            group, share.end, begin + kStep <= share.end, [&](const auto& loaded, auto all) {
                add_groups<kSmooth, kGroup, decltype(all)::value, T>(state, loaded, group, share.end, weight);
            });
    }
}

// The state of this block's part of a row.
template <class T, bool kSmooth, int kGroup>
__device__ __forceinline__ RowState read_row(const CrossEntropyRows& a, const T* row,
                                             ForwardStorage& shared) {
    constexpr int kN = kPerVector<T>;
    const ColumnGroups<T> groups(row, a.classes);
    // If some rows may not begin at a multiple of 16 bytes, the elements of the first and the last group of
    // every row are loaded one by one.
    const bool odd =
        a.classes % kN != 0 || a.at.row % kN != 0 || reinterpret_cast<uintptr_t>(a.logits) % 16 != 0;
    const int first = odd ? min(1, groups.count) : 0,
              last = odd ? max(first, groups.count - 1) : groups.count;
    const Share share = share_of_block<kGroup>(first, last);
    const Edges<T, kGroup, 3 * kN - 1> edges(row, first * kN, last * kN, share.first ? a.classes : 0);
    const float* const weight = kSmooth ? a.class_weight : nullptr;
    RowState state{-INFINITY, 0.0f, 0.0f, 0.0f};
    // If the lanes of a warp have several rows, they all take the same branch.
    if (kGroup < kWarp ? !odd : groups.past == 0)
        read_groups<T, kSmooth, kGroup, true>(state, groups, share, weight);
    else
        read_groups<T, kSmooth, kGroup, false>(state, groups, share, weight);
    edges.each([&](int column, float element) {
        add_element<kSmooth, T>(state, element, weight ? weight + column : nullptr);
    });
    return merge_group<kSmooth, kGroup>(state, shared);
}

// Merges the parts of a row that several blocks share. Returns true in the last block to finish, which gets
// the state of the whole row. The order of the parts is fixed.
template <bool kSmooth, int kGroup>
__device__ __forceinline__ bool merge_parts(const CrossEntropyForward& a, int64_t row, RowState& state,
                                            ForwardStorage& shared) {
    RowState* const parts = a.parts + row * gridDim.y;
    if (threadIdx.x == 0) parts[blockIdx.y] = state;
    if (!is_last(a.row_tickets + row, gridDim.y, shared.last)) return false;
    state = {-INFINITY, 0.0f, 0.0f, 0.0f};
    if (threadIdx.x < gridDim.y) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(parts + threadIdx.x));
        state = {part.x, part.y, part.z, part.w};
    }
    state = merge_group<kSmooth, kGroup>(state, shared);
    return true;
}

template <bool kSmooth>
__device__ __forceinline__ float row_loss(const CrossEntropyRows& a, const RowState& row, int target,
                                          float at_target, float log_sum) {
    const float weight = a.class_weight ? a.class_weight[target] : 1.0f;
    const float loss = weight * (log_sum + (row.maximum - at_target));
    if (!kSmooth) return loss;
    const float spread = row.weight * log_sum - row.distance;  // sum of w (lse - z)
    return (1.0f - a.smoothing) * loss + a.smoothing / static_cast<float>(a.classes) * spread;
}

// Prefetches the target of a row into the L1 cache: no register is left to hold it.
__device__ __forceinline__ void prefetch_class(const ClassIndices& target, int64_t i) {
#ifdef __CUDA_ARCH__
    const int size = target.type == kInt64                             ? 8
                     : target.type == kInt32 || target.type == kUInt32 ? 4
                     : target.type == kInt16 || target.type == kUInt16 ? 2
                                                                       : 1;
    asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const char*>(target.data) + i * size));
#endif
}

template <class T, bool kSmooth, int kGroup>
__global__ void __launch_bounds__(kThreads, kResidentThreads<kSmooth> / kThreads)
    cross_entropy_forward(const CrossEntropyForward a) {
    BATCHKERN_SHARED(ForwardStorage, shared);
    // Rows are counted in 32 bits, which save registers: there are fewer than 2^32. If a group is a whole
    // block, each block has only one row.
    const auto rows = static_cast<uint32_t>(a.rows.rows),
               step = static_cast<uint32_t>(row_step<kGroup, kThreads>());
    for (auto i = static_cast<uint32_t>(first_row<kGroup, kThreads>()), next = rows; i < rows; i = next) {
        if (kGroup <= kWarp && rows - i > step) {
            prefetch_class(a.rows.target, i + step);
            next = i + step;
        } else {
            next = rows;
        }
        const T* const row = static_cast<const T*>(a.rows.logits) + i * a.rows.at.row;
        const int64_t label = class_of(a.rows.target, i);
        const bool ignored = label == a.ignore_index;
        const bool writes = member<kGroup>() == 0;
        if (ignored) {
            if (writes && blockIdx.y == 0) {
                a.losses[i] = 0.0f;
                a.lse[i] = {0.0f, 0.0f};
                a.keys[i] = 0;
            }
            continue;
        }
        check_class(label, a.rows.classes);
        const auto target = static_cast<int>(label);
        const float at_target = to_float(row[target]);
        RowState state = read_row<T, kSmooth, kGroup>(a.rows, row, shared);
        if constexpr (kGroup > kWarp)
            if (gridDim.y > 1 && !merge_parts<kSmooth, kGroup>(a, i, state, shared)) continue;
        if (!writes) continue;
        const float log_sum = logf(state.sum);
        const float loss = row_loss<kSmooth>(a.rows, state, target, at_target, log_sum);
        a.losses[i] = loss;
        a.lse[i] = {state.maximum, log_sum};
        a.keys[i] = order_key(loss);
        if (a.row_weights) a.row_weights[i] = a.rows.class_weight[target];
    }
    if (!a.select) return;
    BATCHKERN_SHARED(SelectStorage, select);
    select_in_last_block<kThreads, kHeld>(a.selection, select);
}

}  // namespace batchkern
