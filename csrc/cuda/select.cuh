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
// Where the first rows of the order are left out, 2 and 3 find a second threshold, theirs.
//
// A block of few rows has their keys in registers, and reads them once. One of very few counts, for each row,
// those that rank higher, in place of 1 to 3.
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

// Rows have load(i), which loads what the key of a row takes, and key_of(what was loaded); taken(i, key),
// which loads what a row adds where it is selected, and value_of and weight_of that. So the loads of several
// rows are in flight before the first is used.

// Losses as keys, which the forward pass wrote, perhaps in this very launch: so they are read past the L1
// cache.
struct KeyedLosses {
    const uint32_t* keys;  // (n,)
    const float* weights;  // (n,), likewise, or null: all 1
    static constexpr int kLoads = 4;
    static constexpr bool kBand = false;

    __device__ __forceinline__ uint32_t load(int64_t i) const { return __ldcg(keys + i); }
    __device__ __forceinline__ uint32_t key_of(uint32_t loaded) const { return loaded; }
    struct Taken {
        float loss, weight;
    };
    __device__ __forceinline__ Taken taken(int64_t i, uint32_t key) const {
        return {loss_of_key(key), weights ? __ldcg(weights + i) : 0.0f};
    }
    __device__ __forceinline__ double value_of(const Taken& taken) const { return taken.loss; }
    __device__ __forceinline__ double weight_of(const Taken& taken) const { return taken.weight; }
    __device__ __forceinline__ bool weighted() const { return weights != nullptr; }
};

// Losses that a user computed.
template <class T>
struct PlainLosses {
    const T* losses;
    int64_t stride;
    const uint8_t* mask;  // or null
    int64_t mask_stride;
    static constexpr int kLoads = 4;

    struct Loaded {
        T loss;
        uint8_t counts;
    };
    __device__ __forceinline__ uint8_t counts(int64_t i) const { return mask ? mask[i * mask_stride] : 1; }
    __device__ __forceinline__ Loaded load(int64_t i) const { return {losses[i * stride], counts(i)}; }
    __device__ __forceinline__ uint32_t key_of(const Loaded& loaded) const {
        return loaded.counts ? order_key(to_float(loaded.loss)) : 0;
    }
};

// And what else he says of them: what to rank by, what each is times, which part of the order counts.
template <class T>
struct BandedLosses {
    PlainLosses<T> plain;
    const float* score;  // or null: the losses are ranked
    int64_t score_stride;
    const float* weights;  // or null
    int64_t weight_stride;
    bool lowest;
    double skip;  // this share, at the top, is left out first
    bool has_above;
    uint32_t above;  // keys above it count too
    static constexpr int kLoads = 3;
    static constexpr bool kBand = true;

    __device__ __forceinline__ BandedLosses from(int64_t first) const {
        BandedLosses result = *this;
        result.plain.losses += first * plain.stride;
        if (plain.mask) result.plain.mask += first * plain.mask_stride;
        if (score) result.score += first * score_stride;
        if (weights) result.weights += first * weight_stride;
        return result;
    }
    struct Loaded {
        T loss;
        float score;
        uint8_t counts;
    };
    __device__ __forceinline__ Loaded load(int64_t i) const {
        Loaded result{};
        if (score)
            result.score = score[i * score_stride];
        else
            result.loss = plain.losses[i * plain.stride];
        result.counts = plain.counts(i);
        return result;
    }
    __device__ __forceinline__ uint32_t key_of(const Loaded& loaded) const {
        const uint32_t key = order_key(score ? loaded.score : to_float(loaded.loss));
        return loaded.counts == 0 ? 0 : lowest ? max(~key, 1u) : key;  // NaN last
    }
    struct Taken {
        T loss;
        float weight;
    };
    __device__ __forceinline__ Taken taken(int64_t i, uint32_t) const {
        return {plain.losses[i * plain.stride], weights ? weights[i * weight_stride] : 1.0f};
    }
    __device__ __forceinline__ double value_of(const Taken& taken) const {
        return to_float(taken.loss) * double{taken.weight};
    }
    __device__ __forceinline__ double weight_of(const Taken& taken) const { return taken.weight; }
    // How many there are is not known before they are counted.
    __device__ __forceinline__ bool weighted() const { return weights != nullptr || has_above; }
    __device__ __forceinline__ uint32_t skipped(uint32_t count, uint32_t k) const {
        return min(static_cast<uint32_t>(rint(skip * count)), count - k);
    }
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

struct BlockSum {
    double loss;
    double weight;
};

struct SelectStorage {
    alignas(16) uint32_t bins[kBins];
    uint32_t scratch[kMaxWarps];
    double sums[kMaxWarps];
    uint32_t digit, count, remaining;
    bool last;
};

// The keys of the rows that take part.
struct Survey {
    uint32_t count, lowest, highest;
};

// What is decided about each row.
struct Threshold {
    uint32_t k;
    uint32_t passes;
    uint32_t lowest;
    uint32_t key;         // relative to the lowest
    uint32_t last_index;  // of those with this very key

    __device__ __forceinline__ bool keeps(uint32_t row_key, uint32_t i) const {
        if (row_key == 0 || k == 0) return false;
        const uint32_t relative = row_key - lowest;
        return relative > key || (relative == key && i <= last_index);
    }
};

// Where the keys of rows are: in memory; in memory, with a part for each block of the grid; or, of one block,
// so many in the registers of each thread.
constexpr int kInMemory = 0, kOfGrid = -1;
constexpr int kHeld = 16;     // with 80 registers for each thread,
constexpr int kHeldOf64 = 8;  // and with 64

template <int kThreads, int kWhere>
struct Selector {
    static constexpr bool kGrid = kWhere == kOfGrid, kRegisters = kWhere > 0;

    int64_t n;
    Merge* merge;  // used where kGrid
    SelectStorage& shared;
    uint32_t held[kRegisters ? kWhere : 1];

    template <class Rows>
    static constexpr int kBatch = kRegisters ? 4 : Rows::kLoads;

    // Before all else.
    template <class Rows>
    __device__ __forceinline__ void hold(const Rows& rows) {
        if constexpr (kRegisters) {
            load_keys(rows, static_cast<int>(threadIdx.x), static_cast<int>(n), held);
        }
    }

    // Calls use(first, end, keys) for kBatch<Rows> rows of this thread at a time, kThreads apart, of which
    // those before `end` are rows.
    template <class Rows, class Use>
    __device__ __forceinline__ void batches(const Rows& rows, Use use) const {
        if constexpr (kRegisters) {
            const int end = static_cast<int>(n), first = threadIdx.x;
#pragma unroll
            for (int j = 0; j < kWhere; j += kBatch<Rows>)
                if (j * kThreads < end) use(first + j * kThreads, end, held + j);
        } else {
            const int64_t begin = kGrid ? n * blockIdx.x / gridDim.x : 0;
            const int64_t end = kGrid ? n * (blockIdx.x + int64_t{1}) / gridDim.x : n;
            for (int64_t first = begin + threadIdx.x; first < end; first += kBatch<Rows> * kThreads) {
                uint32_t key[kBatch<Rows>];
                load_keys(rows, first, end, key);
                use(first, end, key);
            }
        }
    }

    // Calls use(i, key) for each row of this thread.
    template <class Rows, class Use>
    __device__ __forceinline__ void each(const Rows& rows, Use use) const {
        batches(rows, [&](auto first, auto end, const uint32_t* key) {
#pragma unroll
            for (int j = 0; j < kBatch<Rows>; ++j)
                if (first + j * kThreads < end) use(first + j * kThreads, key[j]);
        });
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

    template <class Rows>
    __device__ __forceinline__ Survey survey(const Rows& rows) const {
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
        return {count, ~inverse_lowest, highest};
    }

    // Of the k highest. Passes count from `pass` on.
    template <class Rows>
    __device__ __forceinline__ Threshold find(const Rows& rows, const Survey& of, uint32_t k, uint32_t pass) {
        Threshold t{k, pass, of.lowest, 0, 0xffffffffu};
        if (k == of.count || k == 0) return t;
        uint32_t remaining = k;
        const uint32_t lowest = t.lowest;
        const bool whole = narrow(
            rows,
            [=](int64_t, uint32_t key, uint32_t& value) {
                value = key - lowest;
                return key != 0;
            },
            of.highest - lowest, t.key, remaining, t.passes);
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
    // Of rows that are kThreads apart: 0 behind the last row, which is loaded there, for a branch would part
    // the loads.
    template <class Rows, class Index, int kCount>
    __device__ __forceinline__ static void load_keys(const Rows& rows, Index first, Index end,
                                                     uint32_t (&keys)[kCount]) {
        decltype(rows.load(0)) loaded[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) loaded[j] = rows.load(min(first + j * kThreads, end - 1));
#pragma unroll
        for (int j = 0; j < kCount; ++j) keys[j] = first + j * kThreads < end ? rows.key_of(loaded[j]) : 0;
    }

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

// Of the rows of this thread: what was selected of them.
struct Chosen {
    uint32_t k;
    uint32_t passes;
    double sum;
    double weight;
};

// Up to so many rows are counted: each of 256 threads compares 256 keys, some 1,000 instructions.
constexpr int64_t kCounted = 256;

// keeps(i, key) decides about a row. Of kBatch rows, kThreads apart, all loads come before the first store,
// which they might follow otherwise.
template <int kThreads, int kBatch, class Rows, class Index, class Keeps>
__device__ __forceinline__ void take(const Rows& rows, Index first, Index end, const uint32_t* key,
                                     Keeps keeps, bool* kept, Chosen& chosen) {
    bool is_taken[kBatch];
    typename Rows::Taken taken[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
        const Index i = first + j * kThreads;
        is_taken[j] = i < end && keeps(i, key[j]);
        taken[j] = {};
        if (is_taken[j]) taken[j] = rows.taken(i, key[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
        if (first + j * kThreads < end) kept[first + j * kThreads] = is_taken[j];
        chosen.sum += rows.value_of(taken[j]);
        chosen.weight += rows.weight_of(taken[j]);
    }
}

// The rows whose place in the order is from `first` on and below first + k.
template <int kThreads, class Rows>
__device__ __forceinline__ Chosen choose_by_counting(const Rows& rows, int64_t n, const KeepFraction& keep,
                                                     bool* kept, SelectStorage& shared) {
    static_assert(kCounted <= kThreads);
    const auto own = static_cast<int>(threadIdx.x);
    const uint32_t key = own < n ? rows.key_of(rows.load(own)) : 0;
    if (own < (n + 3) / 4 * 4) shared.bins[own] = key;
    __syncthreads();
    Chosen chosen{};
    if (own >= n) return chosen;
    uint32_t count = 0, place = 0;
    for (int j = 0; j < n; j += 4) {
        const uint4 others = *reinterpret_cast<const uint4*>(shared.bins + j);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const uint32_t other = word(others, w);
            count += other != 0;
            place += other > key || (other == key && j + w < own);
        }
    }
    chosen.k = keep(count);
    uint32_t first = 0;
    if constexpr (Rows::kBand) first = rows.skipped(count, chosen.k);
    const auto keeps = [&](int, uint32_t) {
        bool result = place < first + chosen.k;
        if constexpr (Rows::kBand) result = result || (rows.has_above && key > rows.above);
        return key != 0 && place >= first && result;
    };
    take<kThreads, 1>(rows, own, own + 1, &key, keeps, kept, chosen);
    return chosen;
}

template <int kThreads, int kWhere, class Rows>
__device__ __forceinline__ Chosen choose(const Rows& rows, int64_t n, const KeepFraction& keep, bool* kept,
                                         Merge* merge, SelectStorage& shared) {
    if constexpr (kWhere != kOfGrid)
        if (n <= kCounted) return choose_by_counting<kThreads>(rows, n, keep, kept, shared);
    Selector<kThreads, kWhere> selector{n, merge, shared, {}};
    selector.hold(rows);
    const Survey survey = selector.survey(rows);
    const uint32_t k = keep(survey.count);
    uint32_t first = 0;
    if constexpr (Rows::kBand) first = rows.skipped(survey.count, k);
    const Threshold threshold = selector.find(rows, survey, first + k, 0);
    Chosen chosen{k, threshold.passes, 0, 0};
    Threshold skipped{};
    if constexpr (Rows::kBand) {
        if (first > 0) {
            skipped = selector.find(rows, survey, first, threshold.passes);
            chosen.passes = skipped.passes;
        }
    }
    const auto keeps = [&](uint32_t i, uint32_t key) {
        bool result = threshold.keeps(key, i);
        if constexpr (Rows::kBand) {
            result = result || (rows.has_above && key > rows.above);
            result = result && !skipped.keeps(key, i);
        }
        return result;
    };
    constexpr int kBatch = Selector<kThreads, kWhere>::template kBatch<Rows>;
    selector.batches(rows, [&](auto begin, auto end, const uint32_t* key) {
        take<kThreads, kBatch>(rows, begin, end, key, keeps, kept, chosen);
    });
    return chosen;
}

// Adds up what all the threads of a block, or of all blocks, have selected. True where the sums are those of
// all.
template <int kThreads, bool kGrid>
__device__ __forceinline__ bool add_up(double& sum, double& weight, bool weighted, Merge* merge,
                                       BlockSum* block_sums, SelectStorage& shared) {
    sum = reduce_group<kThreads>(sum, Sum(), shared.sums);
    if (weighted) weight = reduce_group<kThreads>(weight, Sum(), shared.sums);
    if (!kGrid) return true;
    if (threadIdx.x == 0) block_sums[blockIdx.x] = {sum, weight};
    if (!is_last(&merge->ticket, gridDim.x, shared.last)) return false;
    sum = weight = 0;
    for (uint32_t b = threadIdx.x; b < gridDim.x; b += kThreads) {
        sum += __ldcg(&block_sums[b].loss);
        weight += __ldcg(&block_sums[b].weight);
    }
    sum = reduce_group<kThreads>(sum, Sum(), shared.sums);
    weight = reduce_group<kThreads>(weight, Sum(), shared.sums);
    return true;
}

__device__ __forceinline__ void write_mean(const SelectionResult& out, double sum, double normalizer) {
    if (threadIdx.x != 0) return;
    *out.mean = static_cast<float>(sum / normalizer);
    *out.normalizer = static_cast<float>(normalizer);
}

// Selects, and reduces what was selected.
template <int kThreads, int kWhere, class Rows>
__device__ __forceinline__ void select_and_reduce(const Rows& rows, int64_t n, const KeepFraction& keep,
                                                  const SelectionResult& out, Merge* merge,
                                                  BlockSum* block_sums, SelectStorage& shared) {
    constexpr bool kGrid = kWhere == kOfGrid;
    Chosen chosen = choose<kThreads, kWhere>(rows, n, keep, out.kept, merge, shared);
    if (!add_up<kThreads, kGrid>(chosen.sum, chosen.weight, rows.weighted(), merge, block_sums, shared))
        return;
    if (kGrid) Selector<kThreads, kWhere>{n, merge, shared, {}}.clear(chosen.passes);
    write_mean(out, chosen.sum, rows.weighted() ? chosen.weight : chosen.k);
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

// By one block, or by all of a cooperative launch.
template <bool kGrid, class Rows>
__global__ void __launch_bounds__(kSelectThreads, 1) select_rows(const Selection<Rows> a) {
    BATCHKERN_SHARED(SelectStorage, shared);
    select_and_reduce<kSelectThreads, kGrid ? kOfGrid : kHeldOf64>(
        a.rows, a.n, a.keep, a.out, kGrid ? &a.workspace->merge : nullptr, a.block_sums, shared);
}

// Samples of n rows, each ranked apart by one block.
template <class Rows>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_samples(const Selection<Rows> a, int64_t samples) {
    BATCHKERN_SHARED(SelectStorage, shared);
    double sum = 0, weight = 0, count = 0;
    for (int64_t s = blockIdx.x; s < samples; s += gridDim.x) {
        const Chosen chosen = choose<kSelectThreads, kInMemory>(a.rows.from(s * a.n), a.n, a.keep,
                                                                a.out.kept + s * a.n, nullptr, shared);
        sum += chosen.sum;
        weight += chosen.weight;
        if (threadIdx.x == 0) count += chosen.k;
        __syncthreads();
    }
    if (!a.rows.weighted()) weight = count;
    if (add_up<kSelectThreads, true>(sum, weight, true, &a.workspace->merge, a.block_sums, shared))
        write_mean(a.out, sum, weight);
}

// By the last block of a launch that wrote the losses: of up to kWhere for each of its threads.
template <int kThreads, int kWhere, class Rows>
__device__ __forceinline__ void select_in_last_block(const Selection<Rows>& a, SelectStorage& shared) {
    const uint32_t blocks = gridDim.x * gridDim.y;
    if (blocks == 1)
        __syncthreads();
    else if (!is_last(&a.workspace->ticket, blocks, shared.last))
        return;
    select_and_reduce<kThreads, kWhere>(a.rows, a.n, a.keep, a.out, nullptr, nullptr, shared);
}

}  // namespace batchkern
