// Which losses are the highest: keys as in order.h, ties by lower index. One block, or all blocks of a
// cooperative launch, each of which has a range of the rows.
//
// 1. Every block finds the count, the lowest and the highest of the keys: a digit is then taken of key -
// lowest, from
//    its first bit that is not 0 everywhere. (The first bits of the losses themselves are nearly all alike:
//    one bin would get them all.)
// 2. Passes over 11 bits each count the keys that share the digits found so far, and find the next digit of
// the k-th
//    highest; three at most, and none further once all keys of a bin are among the highest.
// 3. Where only some of several equal keys are, more passes find the last index that is.
// 4. The threshold decides about each row. Sums are in double, in a fixed order.
//
// With several blocks, each adds its counts to global ones (integers: the order does not matter), all wait
// for the grid, and all then read the same totals and take the same way. The last block to finish leaves
// zeros behind. A key of 0 stands for a row that does not take part.
#pragma once

#include <cooperative_groups.h>

#include "../order.h"
#include "elements.cuh"
#include "workspace.h"

namespace batchkern {

// Losses whose keys the forward pass wrote, perhaps in this very launch: so they are read past the L1 cache.
struct KeyedLosses {
    const uint32_t* keys;       // (n,)
    const float* losses;        // (n,)
    const int64_t* target;      // (n,), read where class_weight is given
    const float* class_weight;  // (C,), or null
    static constexpr int kLoads = 8;

    __device__ __forceinline__ uint32_t key(int64_t i) const { return __ldcg(keys + i); }
    __device__ __forceinline__ double value(int64_t i) const { return __ldcg(losses + i); }
    __device__ __forceinline__ bool weighted() const { return class_weight != nullptr; }
    __device__ __forceinline__ double weight(int64_t i) const { return class_weight[target[i]]; }
};

// Losses that a user computed.
template <class T>
struct PlainLosses {
    const T* losses;
    int64_t stride;
    const uint8_t* mask;  // or null
    int64_t mask_stride;
    static constexpr int kLoads = 4;

    __device__ __forceinline__ uint32_t key(int64_t i) const {
        if (mask && !mask[i * mask_stride]) return 0;
        return order_key(to_float(losses[i * stride]));
    }
    __device__ __forceinline__ double value(int64_t i) const { return to_float(losses[i * stride]); }
    __device__ __forceinline__ bool weighted() const { return false; }
    __device__ __forceinline__ double weight(int64_t) const { return 1.0; }
};

// How many of `count` rows are kept.
struct KeepFraction {
    const double* tensor;  // read instead of value, where it is not null
    double value;

    __device__ __forceinline__ uint32_t operator()(uint32_t count) const {
        const double wanted = rint((tensor ? *tensor : value) * count);  // ties to even
        return wanted >= count ? count : wanted >= 1.0 ? static_cast<uint32_t>(wanted) : min(count, 1u);
    }
};
struct KeepCount {
    uint32_t k;
    __device__ __forceinline__ uint32_t operator()(uint32_t) const { return k; }
};

struct BlockSum {
    double loss;
    double weight;
};

struct SelectStorage {
    uint32_t bins[kBins];
    uint32_t scratch[kMaxWarps];
    double sums[kMaxWarps];
    uint32_t digit, count, remaining;
    bool last;
};

// What is decided about each row.
struct Threshold {
    uint32_t k;
    uint32_t passes;
    uint32_t lowest;
    uint32_t key;         // relative to the lowest
    uint32_t last_index;  // of those with this very key

    __device__ __forceinline__ bool keeps(uint32_t row_key, int64_t i) const {
        if (row_key == 0 || k == 0) return false;
        const uint32_t relative = row_key - lowest;
        return relative > key || (relative == key && i <= last_index);
    }
};

template <int kThreads, bool kGrid>
struct Selector {
    int64_t n;
    Merge* merge;  // used where kGrid
    SelectStorage& shared;

    // Calls use(i, key) for each row of this block. Rows::kLoads loads are in flight at a time.
    template <class Rows, class Use>
    __device__ __forceinline__ void each(const Rows& rows, Use use) const {
        constexpr int kLoads = Rows::kLoads;
        const int64_t begin = kGrid ? n * blockIdx.x / gridDim.x : 0;
        const int64_t end = kGrid ? n * (blockIdx.x + int64_t{1}) / gridDim.x : n;
        for (int64_t first = begin + threadIdx.x; first < end; first += kLoads * kThreads) {
            uint32_t key[kLoads];
#pragma unroll
            for (int j = 0; j < kLoads; ++j)
                key[j] = first + j * kThreads < end ? rows.key(first + j * kThreads) : 0;
#pragma unroll
            for (int j = 0; j < kLoads; ++j)
                if (first + j * kThreads < end) use(first + j * kThreads, key[j]);
        }
    }

    // Finds, for the highest values that are left, the digits of the lowest of them. candidate(i, key, value)
    // says whether a row takes part, and with which value, at most `largest`. Returns whether they are all
    // those >= the result; if not, some of those equal to it are, `remaining` in number.
    template <class Rows, class Candidate>
    __device__ __forceinline__ bool narrow(const Rows& rows, Candidate candidate, uint32_t largest,
                                           uint32_t& result, uint32_t& remaining, uint32_t& pass) {
        result = 0;
        for (int upper = 32 - __clz(static_cast<int>(largest)); upper > 0;) {
            const int bits = min(upper, kDigitBits), shift = upper - bits;
            for (int b = threadIdx.x; b < kBins; b += kThreads) shared.bins[b] = 0;
            __syncthreads();
            each(rows, [&](int64_t i, uint32_t key) {
                uint32_t value;
                if (candidate(i, key, value) && uint64_t{value} >> upper == result)
                    atomicAdd(&shared.bins[value >> shift & ((1u << bits) - 1u)], 1u);
            });
            __syncthreads();
            if (kGrid) merge_bins(merge->bins[pass]);
            ++pass;
            find_digit(remaining);
            result = result << bits | shared.digit;
            remaining = shared.remaining;
            upper = shift;
            if (shared.count == remaining) {
                result <<= shift;
                return true;
            }
        }
        return false;
    }

    template <class Rows, class Keep>
    __device__ __forceinline__ Threshold find(const Rows& rows, const Keep& keep) {
        uint32_t count = 0, inverse_lowest = 0, highest = 0;
        each(rows, [&](int64_t, uint32_t key) {
            count += key != 0;
            inverse_lowest = max(inverse_lowest, key != 0 ? ~key : 0u);
            highest = max(highest, key);
        });
        count = reduce_group<kThreads>(count, Sum(), shared.scratch);
        inverse_lowest = reduce_group<kThreads>(inverse_lowest, Max(), shared.scratch);
        highest = reduce_group<kThreads>(highest, Max(), shared.scratch);
        if (kGrid) {
            if (threadIdx.x == 0) {
                atomicAdd(&merge->count, count);
                atomicMax(&merge->inverse_lowest, inverse_lowest);
                atomicMax(&merge->highest, highest);
            }
            cooperative_groups::this_grid().sync();
            count = __ldcg(&merge->count);
            inverse_lowest = __ldcg(&merge->inverse_lowest);
            highest = __ldcg(&merge->highest);
        }
        Threshold t{keep(count), 0, ~inverse_lowest, 0, 0xffffffffu};
        if (t.k == count) return t;  // all of them, or none
        uint32_t remaining = t.k;
        const uint32_t lowest = t.lowest;
        const bool whole = narrow(
            rows,
            [=](int64_t, uint32_t key, uint32_t& value) {
                value = key - lowest;
                return key != 0;
            },
            highest - lowest, t.key, remaining, t.passes);
        if (whole) return t;
        // Of equal keys the first ones: the highest of their places from the end.
        const uint32_t equal = t.key, end = static_cast<uint32_t>(n - 1);
        uint32_t place;
        narrow(
            rows,
            [=](int64_t i, uint32_t key, uint32_t& value) {
                value = end - static_cast<uint32_t>(i);
                return key != 0 && key - lowest == equal;
            },
            end, place, remaining, t.passes);
        t.last_index = end - place;
        return t;
    }

    // The last block leaves the global counts as it found them.
    __device__ __forceinline__ void clear(uint32_t passes) {
        uint32_t* const bins = merge->bins[0];
        for (uint32_t b = threadIdx.x; b < passes * kBins; b += kThreads) bins[b] = 0;
        if (threadIdx.x == 0) merge->count = merge->inverse_lowest = merge->highest = merge->gathered = 0;
    }

private:
    __device__ __forceinline__ void merge_bins(uint32_t* total) {
        for (int b = threadIdx.x; b < kBins; b += kThreads)
            if (shared.bins[b] != 0) atomicAdd(total + b, shared.bins[b]);
        cooperative_groups::this_grid().sync();
        for (int b = threadIdx.x; b < kBins; b += kThreads) shared.bins[b] = __ldcg(total + b);
        __syncthreads();
    }

    // The bin in which the `remaining`-th highest is; how many are in it, and how many of these are among the
    // highest.
    __device__ __forceinline__ void find_digit(uint32_t remaining) {
        constexpr int kOwn = kBins / kThreads;  // the first thread has the highest bins
        const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn;
        uint32_t own = 0;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) own += shared.bins[highest - j];
        uint32_t before = own;  // of this warp's threads up to this one
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
            const uint32_t other = __shfl_up_sync(0xffffffffu, before, offset);
            if (lane() >= offset) before += other;
        }
        if (lane() == kWarp - 1) shared.scratch[warp()] = before;
        __syncthreads();
        before += reduce_lanes<kWarp>(lane() < warp() ? shared.scratch[lane()] : 0u, Sum()) - own;
        if (before < remaining && remaining <= before + own) {
            int digit = highest;
            for (; before + shared.bins[digit] < remaining; --digit) before += shared.bins[digit];
            shared.digit = digit;
            shared.count = shared.bins[digit];
            shared.remaining = remaining - before;
        }
        __syncthreads();
    }
};

struct SelectionResult {
    bool* kept;         // (n,)
    float* mean;        // of the kept rows; NaN where there are none
    float* normalizer;  // what their sum was divided by
};

// Selects, and reduces what was selected.
template <int kThreads, bool kGrid, class Rows>
__device__ __forceinline__ void select_and_reduce(const Rows& rows, int64_t n, const KeepFraction& keep,
                                                  const SelectionResult& out, Merge* merge,
                                                  BlockSum* block_sums, SelectStorage& shared) {
    Selector<kThreads, kGrid> selector{n, merge, shared};
    const Threshold threshold = selector.find(rows, keep);
    double sum = 0, weight = 0;
    selector.each(rows, [&](int64_t i, uint32_t key) {
        const bool kept = threshold.keeps(key, i);
        out.kept[i] = kept;
        if (!kept) return;
        sum += rows.value(i);
        if (rows.weighted()) weight += rows.weight(i);
    });
    sum = reduce_group<kThreads>(sum, Sum(), shared.sums);
    if (rows.weighted()) weight = reduce_group<kThreads>(weight, Sum(), shared.sums);
    if (kGrid) {
        if (threadIdx.x == 0) block_sums[blockIdx.x] = {sum, weight};
        if (!is_last(&merge->ticket, gridDim.x, shared.last)) return;
        selector.clear(threshold.passes);
        sum = weight = 0;
        for (uint32_t b = threadIdx.x; b < gridDim.x; b += kThreads) {
            sum += __ldcg(&block_sums[b].loss);
            weight += __ldcg(&block_sums[b].weight);
        }
        sum = reduce_group<kThreads>(sum, Sum(), shared.sums);
        weight = reduce_group<kThreads>(weight, Sum(), shared.sums);
    }
    if (threadIdx.x == 0) {
        const double normalizer = rows.weighted() ? weight : threshold.k;
        *out.mean = static_cast<float>(sum / normalizer);
        *out.normalizer = static_cast<float>(normalizer);
    }
}

template <class Rows>
struct Selection {
    Rows rows;
    int64_t n;
    KeepFraction keep;
    SelectionResult out;
    Workspace* workspace;
    BlockSum* block_sums;  // (gridDim.x,), with several blocks
};

constexpr int kSelectThreads = 1024;

template <bool kGrid, class Rows>
__global__ void __launch_bounds__(kSelectThreads, 1) select_rows(const Selection<Rows> a) {
    BATCHKERN_SHARED(SelectStorage, shared);
    select_and_reduce<kSelectThreads, kGrid>(a.rows, a.n, a.keep, a.out,
                                             kGrid ? &a.workspace->merge : nullptr, a.block_sums, shared);
}

// By the last block of a launch that wrote the losses.
template <int kThreads, class Rows>
__device__ __forceinline__ void select_in_last_block(const Selection<Rows>& a) {
    BATCHKERN_SHARED(SelectStorage, shared);
    const uint32_t blocks = gridDim.x * gridDim.y;
    if (blocks == 1)
        __syncthreads();
    else if (!is_last(&a.workspace->ticket, blocks, shared.last))
        return;
    select_and_reduce<kThreads, false>(a.rows, a.n, a.keep, a.out, nullptr, nullptr, shared);
}

}  // namespace batchkern
