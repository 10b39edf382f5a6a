// A cross entropy in the cases that the other kernels do not cover: classes that are not contiguous in
// memory, such as those of pixels; targets of probabilities; and entropies and whether predictions are
// correct.
#pragma once

#include "../order.h"
#include "cross_entropy_backward.cuh"

namespace batchkern {

constexpr int kGeneralThreads = 256;
constexpr int kClassesInFlight = 8;
constexpr int kGradientsInFlight = 6;  // eight would spill on sm_80

// The place of a thread in a block in which each row has kAcross threads. If the classes of a row are
// contiguous, neighbouring threads have the same row; otherwise (kColumns) they have neighbouring rows. So
// the loads of a warp are coalesced in both cases.
template <int kAcross, bool kColumns>
struct Places {
    static constexpr int kRows = kGeneralThreads / kAcross;

    __device__ __forceinline__ static int row() {
        return kColumns ? threadIdx.x % kRows : threadIdx.x / kAcross;
    }
    __device__ __forceinline__ static int part() {
        return kColumns ? threadIdx.x / kRows : threadIdx.x % kAcross;
    }
};

// The state of a row, or of a part of it: its maximum m, and sums relative to m (to 0 if m is -inf).
struct GeneralState {
    float maximum;
    float sum;        // of exp(z - m)
    float distance;   // of w (z - m), where w is the weighted target (see read_part)
    float weight;     // of w
    float moment;     // of exp(z - m) (z - m)
    int place;        // the first column of the maximum
    float likeliest;  // the highest probability of a target
    int target;       // the first column of that probability
};

template <bool kDescribe>
__device__ __forceinline__ void raise(GeneralState& a, float maximum) {
    const float base = base_of(maximum), down = base_of(a.maximum) - base;
    const float factor = a.maximum == -INFINITY ? 0.0f : expf(a.maximum - base);
    if (kDescribe) a.moment = factor == 0.0f ? 0.0f : factor * (a.moment + down * a.sum);
    a.sum *= factor;
    a.distance += down * a.weight;
    a.maximum = maximum;
}

template <bool kDescribe>
__device__ __forceinline__ void combine(GeneralState& a, GeneralState b) {
    if (kDescribe) {
        if (b.maximum > a.maximum || (b.maximum == a.maximum && b.place < a.place)) a.place = b.place;
        if (b.likeliest > a.likeliest || (b.likeliest == a.likeliest && b.target < a.target))
            a.likeliest = b.likeliest, a.target = b.target;
    }
    const float maximum = fmaxf(a.maximum, b.maximum);
    raise<kDescribe>(a, maximum);
    raise<kDescribe>(b, maximum);
    a.sum += b.sum;
    a.distance += b.distance;
    a.weight += b.weight;
    a.moment += b.moment;
}

__device__ __forceinline__ GeneralState of_lane(const GeneralState& a, int other) {
    constexpr uint32_t kAll = 0xffffffffu;
    return {__shfl_xor_sync(kAll, a.maximum, other),   __shfl_xor_sync(kAll, a.sum, other),
            __shfl_xor_sync(kAll, a.distance, other),  __shfl_xor_sync(kAll, a.weight, other),
            __shfl_xor_sync(kAll, a.moment, other),    __shfl_xor_sync(kAll, a.place, other),
            __shfl_xor_sync(kAll, a.likeliest, other), __shfl_xor_sync(kAll, a.target, other)};
}

struct GeneralStorage {
    GeneralState states[kGeneralThreads];
};

// Combines the states of the threads of a row; the thread of part 0 gets the result. All threads of the block
// must call this.
template <int kAcross, bool kColumns, bool kDescribe>
__device__ __forceinline__ void combine_parts(GeneralState& a, GeneralStorage& shared) {
    if constexpr (kAcross == 1) return;
    int stride = 1, count = kAcross;  // of the states that are left to combine
    if constexpr (!kColumns) {
#pragma unroll
        for (int other = kWarp / 2; other > 0; other /= 2) combine<kDescribe>(a, of_lane(a, other));
        stride = kWarp, count = kAcross / kWarp;
    } else {
        stride = Places<kAcross, kColumns>::kRows;
    }
    if (count == 1) return;
    __syncthreads();  // the states of the previous row have been read
    shared.states[threadIdx.x] = a;
    __syncthreads();
    if (Places<kAcross, kColumns>::part() != 0) return;
    for (int i = 1; i < count; ++i) combine<kDescribe>(a, shared.states[threadIdx.x + i * stride]);
}

struct GeneralForward {
    CrossEntropyRows rows;
    int64_t ignore_index;
    float* losses;
    float* lse;
    float* entropy;
    bool* correct;
    uint32_t* keys;      // (rows,), 0 where ignored
    float* row_weights;  // (rows,): the class weight of each target; null without class weights
};

// The probabilities of a row's target.
template <class T>
struct TargetRow {
    __device__ __forceinline__ TargetRow(const Probabilities& q, int64_t row)
        : data(q.data), offset(q.data ? row_offset(q.at, row) : 0), step(q.at.step), are_float(q.are_float) {}

    __device__ __forceinline__ float operator[](int column) const {
        const int64_t i = offset + column * step;
        return are_float ? static_cast<const float*>(data)[i] : to_float(static_cast<const T*>(data)[i]);
    }

    const void* data;
    int64_t offset, step;
    bool are_float;
};

// Probabilities after smoothing.
struct Smoothing {
    __device__ __forceinline__ explicit Smoothing(const CrossEntropyRows& rows)
        : keep(1.0f - rows.smoothing), level(rows.smoothing / static_cast<float>(rows.classes)) {}

    __device__ __forceinline__ float operator()(float q) const { return keep * q + level; }

    float keep, level;
};

// The state of a thread's part of a row.
template <class T, int kAcross, bool kDescribe>
__device__ __forceinline__ GeneralState read_part(const CrossEntropyRows& a, int64_t row, int part) {
    const T* const z_row = static_cast<const T*>(a.logits) + row_offset(a.at, row);
    const TargetRow<T> q_row(a.probabilities, row);
    const bool soft = q_row.data != nullptr, weighted = soft || a.smoothing > 0;
    const Smoothing smoothed(a);
    // If no logit is above -inf, the first column counts as the highest.
    GeneralState s{-INFINITY, 0, 0, 0, 0, part, -INFINITY, part};
    float lost = 0;  // the rounding error of the sum (Kahan summation)
    for (int first = part; first < a.classes; first += kAcross * kClassesInFlight) {
        float z[kClassesInFlight], q[kClassesInFlight];
#pragma unroll
        for (int i = 0; i < kClassesInFlight; ++i) {
            const int column = first + i * kAcross;
            z[i] = column < a.classes ? to_float(z_row[column * a.at.step]) : -INFINITY;
            q[i] = 0.0f;
        }
        if (soft) {  // a separate loop: its branches would keep the loads of the logits from being issued
                     // together
#pragma unroll
            for (int i = 0; i < kClassesInFlight; ++i)
                if (first + i * kAcross < a.classes) q[i] = q_row[first + i * kAcross];
        }
        float maximum = s.maximum;
#pragma unroll
        for (int i = 0; i < kClassesInFlight; ++i) {
            const int column = first + i * kAcross;
            if (kDescribe && z[i] > maximum) s.place = column;
            maximum = fmaxf(maximum, z[i]);
            if (kDescribe && soft && column < a.classes && q[i] > s.likeliest)
                s.likeliest = q[i], s.target = column;
        }
        if (maximum > s.maximum) {
            const float before = s.sum;
            raise<kDescribe>(s, maximum);
            lost *= before == 0.0f ? 0.0f : s.sum / before;
        }
        const float base = base_of(s.maximum);
        float sums[4] = {};
#pragma unroll
        for (int i = 0; i < kClassesInFlight; ++i) {
            const int column = first + i * kAcross;
            if (column >= a.classes) break;
            const float d = z[i] - base, e = expf(d);
            sums[i % 4] += e;
            if (kDescribe) s.moment += e == 0.0f ? 0.0f : e * d;
            if (weighted) {
                const float w =
                    (a.class_weight ? a.class_weight[column] : 1.0f) * (soft ? smoothed(q[i]) : 1.0f);
                s.distance += w * d;
                s.weight += w;
            }
        }
        const float more = ((sums[0] + sums[1]) + (sums[2] + sums[3])) - lost, sum = s.sum + more;
        lost = (sum - s.sum) - more;
        s.sum = sum;
    }
    return s;
}

template <class T>
__device__ __forceinline__ float hard_loss(const CrossEntropyRows& a, int64_t row, const GeneralState& s,
                                           int64_t target, float log_sum) {
    check_class(target, a.classes);
    const float at_target =
        to_float(static_cast<const T*>(a.logits)[row_offset(a.at, row) + target * a.at.step]);
    const float loss = (a.class_weight ? a.class_weight[target] : 1.0f) * (log_sum + (s.maximum - at_target));
    if (!(a.smoothing > 0)) return loss;
    const float spread = s.weight * log_sum - s.distance;  // sum of w (lse - z)
    return (1.0f - a.smoothing) * loss + a.smoothing / static_cast<float>(a.classes) * spread;
}

template <class T, int kAcross, bool kColumns, bool kDescribe>
__global__ void __launch_bounds__(kGeneralThreads, 2) cross_entropy_general_forward(const GeneralForward a) {
    BATCHKERN_SHARED(GeneralStorage, shared);
    using P = Places<kAcross, kColumns>;
    const int64_t rows = a.rows.rows;
    const bool soft = a.rows.probabilities.data != nullptr;
    for (int64_t first = int64_t{blockIdx.x} * P::kRows; first < rows;
         first += int64_t{gridDim.x} * P::kRows) {
        const int64_t i = first + P::row();
        const int64_t target = i < rows && !soft ? class_of(a.rows.target, i) : 0;
        const bool ignored = i >= rows || (!soft && target == a.ignore_index);
        GeneralState s{-INFINITY, 0, 0, 0, 0, 0, -INFINITY, 0};
        if (!ignored) s = read_part<T, kAcross, kDescribe>(a.rows, i, P::part());
        combine_parts<kAcross, kColumns, kDescribe>(s, shared);
        if (i >= rows || P::part() != 0) continue;
        float* const state = a.lse + (soft ? 3 : 2) * i;
        const float log_sum = ignored ? 0.0f : logf(s.sum);
        float loss = 0.0f;
        if (!ignored)
            loss = soft ? s.weight * log_sum - s.distance : hard_loss<T>(a.rows, i, s, target, log_sum);
        a.losses[i] = loss;
        state[0] = ignored ? 0.0f : s.maximum;
        state[1] = log_sum;
        if (soft) state[2] = s.weight;
        a.keys[i] = ignored ? 0 : order_key(loss);
        if (a.row_weights && !ignored) a.row_weights[i] = a.rows.class_weight[target];
        if (!kDescribe) continue;
        a.entropy[i] = ignored ? 0.0f : log_sum - s.moment / s.sum;
        a.correct[i] = !ignored && log_sum == log_sum && s.place == (soft ? s.target : target);
    }
}

// The gradient of RowGradient. The columns of a row are divided among gridDim.y blocks.
template <class T, int kAcross, bool kColumns>
__global__ void __launch_bounds__(kGeneralThreads) cross_entropy_general_backward(const BackwardCall a) {
    using P = Places<kAcross, kColumns>;
    const int classes = a.rows.classes;
    const int begin = static_cast<int>(int64_t{classes} * blockIdx.y / gridDim.y);
    const int end = static_cast<int>(int64_t{classes} * (blockIdx.y + 1) / gridDim.y);
    const Smoothing smoothed(a.rows);
    for (int64_t i = int64_t{blockIdx.x} * P::kRows + P::row(); i < a.rows.rows;
         i += int64_t{gridDim.x} * P::kRows) {
        const T* const row = static_cast<const T*>(a.rows.logits) + row_offset(a.rows.at, i);
        T* const grad = static_cast<T*>(a.grad) + row_offset(a.grad_at, i);
        const TargetRow<T> q(a.rows.probabilities, i);
        RowGradient g{};
        bool live;
        if (q.data) {
            const float2 upstream = upstream_of(a.upstream, i, false);
            const float* const state = a.lse + 3 * i;
            live = upstream.x != 0.0f || upstream.y != 0.0f;
            if (live) {
                g.maximum = state[0], g.log_sum = state[1];
                g.total = upstream.x * state[2] + upstream.y;
                g.factor = upstream.x;
            }
        } else {
            live = row_gradient<true>(a, i, g);
        }
        if (!live) {
            for (int c = begin + P::part(); c < end; c += kAcross)
                grad[c * a.grad_at.step] = from_float<T>(0.0f);
            continue;
        }
        for (int first = begin + P::part(); first < end; first += kAcross * kGradientsInFlight) {
            float z[kGradientsInFlight], p[kGradientsInFlight];  // all loads before the first store
#pragma unroll
            for (int k = 0; k < kGradientsInFlight; ++k) {
                const int c = first + k * kAcross;
                z[k] = c < end ? to_float(row[c * a.rows.at.step]) : 0.0f;
                p[k] = 0.0f;
            }
            if (q.data) {
#pragma unroll
                for (int k = 0; k < kGradientsInFlight; ++k)
                    if (first + k * kAcross < end) p[k] = q[first + k * kAcross];
            }
#pragma unroll
            for (int k = 0; k < kGradientsInFlight; ++k) {
                const int c = first + k * kAcross;
                if (c >= end) break;
                const float w = q.data && a.rows.class_weight ? a.rows.class_weight[c] : 1.0f;
                const float value =
                    q.data ? g.share(z[k]) - g.factor * (w * smoothed(p[k])) : g.at<true>(c, z[k]);
                grad[c * a.grad_at.step] = from_float<T>(value);
            }
        }
    }
}

}  // namespace batchkern
