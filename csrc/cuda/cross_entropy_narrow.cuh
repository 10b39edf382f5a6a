// Rows of at most 256 bytes that are adjacent in memory, such as those of a small classifier or of
// channels-last pixels. A block copies a tile of rows to shared memory with vectorised loads, all in flight
// at once, whatever the width of a row. In shared memory each row is computed by one, two or four lanes, so
// that the alignment of a row does not matter.
#pragma once

#include "cross_entropy_backward.cuh"
#include "cross_entropy_forward.cuh"

namespace batchkern {

constexpr int kNarrowThreads = 256;
constexpr int kNarrowResident = 4;
constexpr int kNarrowBytes = 256;                // of a row, at most
constexpr int kLaneBytes = kNarrowBytes / 4;     // of the part of a row that a lane computes
constexpr int kNarrowVectors = kLaneBytes / 16;  // that a thread copies

struct NarrowStorage {
    // Rows of whole vectors are padded with another vector, so that the rows of neighbouring lanes start in
    // different banks.
    uint4 tile[kNarrowThreads * (kNarrowVectors + 1)];
    bool live[kNarrowThreads];
};

// The rows of a block. Its members are the same in all threads.
template <class T, int kLanes>
struct Tile {
    static constexpr int kRows = kNarrowThreads / kLanes;

    __device__ __forceinline__ Tile(int64_t rows, int classes_, uint4* memory_)
        : first(int64_t{blockIdx.x} * kRows),
          count(static_cast<int>(min(rows - first, int64_t{kRows}))),
          classes(classes_),
          memory(memory_) {
        padded = classes % kPerVector<T> == 0;
        vectors = count * classes / kPerVector<T>;
        share = ((1 << 20) + classes - 1) / classes;
        stride = classes + (padded ? kPerVector<T> : 0);
    }

    // The row of an element of the tile: element / classes. Exact, because element * classes is less than
    // 2^20.
    __device__ __forceinline__ int row_of(int element) const { return element * share >> 20; }

    // Calls use(i, v, place) for this thread's vectors: its i-th vector is the v-th of the tile, and `place`
    // is where it is kept in shared memory.
    template <class Use>
    __device__ __forceinline__ void each_vector(Use use) const {
#pragma unroll
        for (int i = 0; i < kNarrowVectors; ++i) {
            const int v = i * kNarrowThreads + threadIdx.x;
            if (v < vectors) use(i, v, memory + v + (padded ? row_of(v * kPerVector<T>) : 0));
        }
    }

    // Calls use(e) for the elements after the last vector.
    template <class Use>
    __device__ __forceinline__ void each_behind(Use use) const {
        const int e = vectors * kPerVector<T> + threadIdx.x;
        if (e < count * classes) use(e);
    }

    // Copies to shared memory the vectors for which wanted(first element, last element) is true, and the
    // elements after the last vector.
    template <class Wanted>
    __device__ __forceinline__ void load(const T* rows, Wanted wanted) const {
        const T* const from = rows + first * classes;
        uint4 loaded[kNarrowVectors];
        bool has[kNarrowVectors];
        each_vector([&](int i, int v, uint4*) {
            has[i] = wanted(v * kPerVector<T>, (v + 1) * kPerVector<T> - 1);
            if (has[i]) loaded[i] = reinterpret_cast<const uint4*>(from)[v];
        });
        each_behind([&](int e) { elements()[e] = from[e]; });
        each_vector([&](int i, int, uint4* place) {
            if (has[i]) *place = loaded[i];
        });
    }

    __device__ __forceinline__ void store(T* rows) const {
        T* const to = rows + first * classes;
        each_vector(
            [&](int, int v, const uint4* place) { __stcs(reinterpret_cast<uint4*>(to) + v, *place); });
        each_behind([&](int e) { to[e] = elements()[e]; });
    }

    __device__ __forceinline__ T* elements() const { return reinterpret_cast<T*>(memory); }

    // The index of this thread's row in the tile, which may be past the last row; the elements of this row;
    // and the index of this thread among the lanes of the row.
    __device__ __forceinline__ static int own() { return threadIdx.x / kLanes; }
    __device__ __forceinline__ T* row() const { return elements() + own() * stride; }
    __device__ __forceinline__ static int lane_of_row() { return threadIdx.x % kLanes; }

    int64_t first;
    int count;
    int classes;
    uint4* memory;
    int vectors;
    int share;  // 2^20 / classes, rounded up
    bool padded;
    int stride;  // from row to row in shared memory
};

template <class T, bool kSmooth, int kLanes>
__global__ void __launch_bounds__(kNarrowThreads, kNarrowResident)
    cross_entropy_narrow_forward(const CrossEntropyForward a) {
    BATCHKERN_SHARED(NarrowStorage, shared);
    const Tile<T, kLanes> tile(a.rows.rows, a.rows.classes, shared.tile);
    const int64_t i = tile.first + tile.own();
    const bool inside = tile.own() < tile.count;
    const int64_t target = inside ? class_of(a.rows.target, i) : a.ignore_index;
    tile.load(static_cast<const T*>(a.rows.logits), [](int, int) { return true; });
    const bool ignored = target == a.ignore_index;
    if (!ignored) check_class(target, a.rows.classes);
    __syncthreads();
    const T* const row = tile.row();
    const float* const weight = kSmooth ? a.rows.class_weight : nullptr;
    RowState state{-INFINITY, 0.0f, 0.0f, 0.0f};
    if (inside) {
#pragma unroll 4
        for (int c = tile.lane_of_row(); c < tile.classes; c += kLanes)
            state.maximum = fmaxf(state.maximum, to_float(row[c]));
    }
    state.maximum = reduce_lanes<kLanes>(state.maximum, Max());
    if (inside) {
        float sums[4] = {};
#pragma unroll 4
        for (int c = tile.lane_of_row(); c < tile.classes; c += kLanes) {
            const float z[1] = {to_float(row[c])};
            accumulate<kSmooth, 1, T>(state, sums, z, weight ? weight + c : nullptr);
        }
        state.sum = sums[0];
    }
    state.sum = reduce_lanes<kLanes>(state.sum, Sum());
    if (kSmooth) {
        state.distance = reduce_lanes<kLanes>(state.distance, Sum());
        state.weight = reduce_lanes<kLanes>(state.weight, Sum());
    }
    if (inside && tile.lane_of_row() == 0) {
        const float log_sum = ignored ? 0.0f : logf(state.sum);
        const float loss = ignored ? 0.0f
                                   : row_loss<kSmooth>(a.rows, state, static_cast<int>(target),
                                                       to_float(row[target]), log_sum);
        a.losses[i] = loss;
        a.lse[i] = {ignored ? 0.0f : state.maximum, log_sum};
        a.keys[i] = ignored ? 0 : order_key(loss);
        if (a.row_weights && !ignored) a.row_weights[i] = a.rows.class_weight[target];
    }
    if (!a.select) return;
    BATCHKERN_SHARED(SelectStorage, select);
    select_in_last_block<kNarrowThreads, kHeldOf64>(a.selection, select);
}

// The gradient of RowGradient. A row without one is set to zero, and its vectors are not loaded unless they
// also hold a part of a row that has one.
template <class T, bool kSmooth, int kLanes>
__global__ void __launch_bounds__(kNarrowThreads, kNarrowResident)
    cross_entropy_narrow_backward(const BackwardCall a) {
    BATCHKERN_SHARED(NarrowStorage, shared);
    const Tile<T, kLanes> tile(a.rows.rows, a.rows.classes, shared.tile);
    RowGradient g{};
    const bool inside = tile.own() < tile.count;
    const bool live = inside && row_gradient<kSmooth>(a, tile.first + tile.own(), g);
    if (tile.lane_of_row() == 0) shared.live[tile.own()] = live;
    __syncthreads();
    // A vector may hold the end of one row and the beginning of another, and narrow rows between the two.
    tile.load(static_cast<const T*>(a.rows.logits), [&](int begin, int end) {
        bool wanted = false;
        for (int r = tile.row_of(begin); r <= tile.row_of(end); ++r) wanted = wanted || shared.live[r];
        return wanted;
    });
    __syncthreads();
    if (inside) {
        T* const row = tile.row();
#pragma unroll 4
        for (int c = tile.lane_of_row(); c < tile.classes; c += kLanes)
            row[c] = from_float<T>(live ? g.at<kSmooth>(c, to_float(row[c])) : 0.0f);
    }
    __syncthreads();
    tile.store(static_cast<T*>(a.grad));
}

}  // namespace batchkern
