// Selection of the highest losses. Keys are those of order.h; of a tie, the lower index ranks higher. It is
// the work of one block, or of all blocks of a cooperative launch, each of which has a range of the rows.
//
// 1. Find the number, the lowest and the highest of the keys. Digits are then taken of key - lowest, from its
//    first bit that is not 0 in all rows. (The first bits of the keys themselves are nearly all alike, so
//    that one bin would count them all.)
// 2. Passes over 11 bits each count the keys that share the digits found so far, and find the next digit of
//    the k-th highest key. There are at most three, and no further ones once all keys of a bin are selected.
// 3. If only some of several equal keys are selected, more passes find the last index that is.
// 4. Compare each row with this threshold. Sums are in double, in a fixed order.
//
// If the first rows of the order are skipped, steps 2 and 3 find a second threshold, for these rows.
//
// With few rows, a block holds their keys in registers and reads them once. With very few, it counts for each
// row the rows that rank higher, instead of steps 1 to 3.
//
// Several blocks add their counts to global ones (integers, so that the order does not matter). After a
// barrier of the grid all of them read the same totals and take the same branches. The last block to finish
// sets the global counts to zero. A key of 0 marks a row that does not take part.
#pragma once

#include <cooperative_groups.h>

#include "../order.h"
#include "elements.cuh"
#include "workspace.h"

namespace batchkern {

// The types of rows load and compute in two steps, so that the loads of several rows are in flight before the
// first is used. load(i) loads the operands of a key, and key_of() computes it. taken(i, key) loads the
// operands of a selected row, and value_of() and weight_of() compute its terms of the sums.

// Losses as keys that the forward pass wrote, perhaps in the same launch: so the loads bypass the L1 cache.
struct KeyedLosses {
    const uint32_t* keys;  // (n,)
    const float* weights;  // (n,), written with the keys; null if all are 1
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

// Losses that the caller computed, with an optional mask.
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

// PlainLosses with the options of a Ranking.
template <class T>
struct BandedLosses {
    PlainLosses<T> plain;
    const float* score;  // or null: the losses are ranked
    int64_t score_stride;
    const float* weights;  // or null
    int64_t weight_stride;
    bool lowest;
    double skip;  // the fraction of rows, at the top, that is skipped
    bool has_above;
    uint32_t above;  // rows with higher keys are kept too
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
        return loaded.counts == 0 ? 0 : lowest ? max(~key, 1u) : key;  // so NaN ranks last
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
    // With has_above, the number of kept rows is not k but the sum of their weights, which are 1 by default.
    __device__ __forceinline__ bool weighted() const { return weights != nullptr || has_above; }
    __device__ __forceinline__ uint32_t skipped(uint32_t count, uint32_t k) const {
        return min(static_cast<uint32_t>(rint(skip * count)), count - k);
    }
};

// How many of `count` rows are kept.
struct KeepFraction {
    const double* tensor;  // if not null, read instead of value
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

// The number of rows that take part, and their lowest and highest keys.
struct Survey {
    uint32_t count, lowest, highest;
};

// Decides which rows are among the k highest.
struct Threshold {
    uint32_t k;
    uint32_t passes;
    uint32_t lowest;
    uint32_t key;         // relative to the lowest
    uint32_t last_index;  // of the selected rows with exactly this key

    __device__ __forceinline__ bool keeps(uint32_t row_key, uint32_t i) const {
        if (row_key == 0 || k == 0) return false;
        const uint32_t relative = row_key - lowest;
        return relative > key || (relative == key && i <= last_index);
    }
};

// Where the keys of rows are: in memory; in memory, with a part for each block of the grid; or, for one
// block, in registers, with this many per thread.
constexpr int kInMemory = 0, kOfGrid = -1;
constexpr int kHeld = 16;     // in kernels with 80 registers per thread
constexpr int kHeldOf64 = 8;  // in kernels with 64

template <int kThreads, int kWhere>
struct Selector {
    static constexpr bool kGrid = kWhere == kOfGrid, kRegisters = kWhere > 0;

    int64_t n;
    Merge* merge;  // used if kGrid is true
    SelectStorage& shared;
    uint32_t held[kRegisters ? kWhere : 1];

    template <class Rows>
    static constexpr int kBatch = kRegisters ? 4 : Rows::kLoads;

    // Loads the keys that are held in registers. Must be called before all other functions.
    template <class Rows>
    __device__ __forceinline__ void hold(const Rows& rows) {
        if constexpr (kRegisters) {
            load_keys(rows, static_cast<int>(threadIdx.x), static_cast<int>(n), held);
        }
    }

    // Calls use(first, end, keys) for the rows of this thread, kBatch<Rows> at a time: first, first +
    // kThreads, ..., as far as they are before `end`.
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

    // Finds the `remaining`-th highest value, digit by digit. candidate(i, key, value) returns whether a row
    // takes part, and sets its value, which is at most `largest`. Returns true if the values >= result are
    // exactly the highest ones; otherwise only `remaining` of the values that equal the result are among
    // them.
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

    // The threshold of the k highest rows. `pass` is the number of passes before.
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
        // Of tied rows the first are selected: those with the largest distance from the end.
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

    // Sets the global counts to zero, which they were before the launch. Only the last block calls this.
    __device__ __forceinline__ void clear(uint32_t passes) {
        uint32_t* const bins = merge->bins[0];
        for (uint32_t b = threadIdx.x; b < passes * kBins; b += kThreads) bins[b] = 0;
        if (threadIdx.x == 0) merge->count = merge->inverse_lowest = merge->highest = merge->gathered = 0;
    }

private:
    // The keys of rows that are kThreads apart, and 0 past the last row. There the last row is loaded again,
    // because a branch would keep the loads from being issued together.
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

    // Finds the bin of the `remaining`-th highest value, the number of values in it, and how many of these
    // are among the highest.
    __device__ __forceinline__ void find_digit(uint32_t remaining) {
        constexpr int kOwn = kBins / kThreads;  // the first thread has the highest bins
        const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kOwn;
        uint32_t own = 0;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) own += shared.bins[highest - j];
        uint32_t before = own;  // the sum over the threads of this warp up to this one
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
    float* mean;        // of the kept rows; NaN if there are none
    float* normalizer;  // the divisor of their sum
};

// The number of selected rows and of passes, and the sums over the selected rows of this thread.
struct Chosen {
    uint32_t k;
    uint32_t passes;
    double sum;
    double weight;
};

// Up to this many rows are ranked by counting: each of 256 threads compares 256 keys, in about 1,000
// instructions.
constexpr int64_t kCounted = 256;

// Writes whether rows are kept, by keeps(i, key), and adds the kept ones to the sums. It takes kBatch rows,
// kThreads apart, and makes all loads before the first store: the compiler might not move them before it.
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

// Selects the rows whose place in the order is in [first, first + k), and later ones whose keys are above
// `above`.
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

// Adds up the sums of all threads of a block or, if kGrid is true, of all blocks. Returns true if the sums
// are complete, which they are in the last block.
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

// Selects rows and computes their mean.
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

// A selection by one block, or by all blocks of a cooperative launch.
template <bool kGrid, class Rows>
__global__ void __launch_bounds__(kSelectThreads, 1) select_rows(const Selection<Rows> a) {
    BATCHKERN_SHARED(SelectStorage, shared);
    select_and_reduce<kSelectThreads, kGrid ? kOfGrid : kHeldOf64>(
        a.rows, a.n, a.keep, a.out, kGrid ? &a.workspace->merge : nullptr, a.block_sums, shared);
}

// A selection in each of `samples` samples of n rows, by one block per sample.
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

// A selection by the last block of a launch that wrote the losses, of at most kWhere per thread.
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
