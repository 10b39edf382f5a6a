// The gradient of logits whose classes lie side by side, in one launch: rows without an upstream gradient are
// zeroed without being read, the others compute their softmax anew from the log-sum-exp. The gradient may be
// written over the logits.
#pragma once

#include "cross_entropy.cuh"

namespace batchkern {

// d / d z_j = total * softmax_j - level * w_j - (j == target) * peak
struct RowGradient {
    float maximum, log_sum;
    float total, level, peak;
    float factor;  // of the loss
    const float* class_weight;
    int target;  // its column, or -1

    __device__ __forceinline__ float share(float z) const { return total * expf((z - maximum) - log_sum); }

    template <bool kSmooth>
    __device__ __forceinline__ float at(int column, float z) const {
        const float p = share(z);
        const float below = !kSmooth ? 0.0f : class_weight ? level * class_weight[column] : level;
        return column == target ? (p - below) - peak : p - below;
    }
};

// What is upstream of a row: of its loss, and of its log-sum-exp.
__device__ __forceinline__ float2 upstream_of(const Upstream& u, const CrossEntropyRows& rows, int64_t row) {
    if (u.kept) return {u.kept[row] ? *u.scalar / *u.normalizer : 0.0f, 0.0f};
    if (!rows.probabilities.data && class_of(rows.target, row) == u.ignore_index) return {0.0f, 0.0f};
    return {u.loss ? u.loss[row * u.loss_stride] : 0.0f, u.lse ? u.lse[row * u.lse_stride] : 0.0f};
}

// False where the row has no gradient.
template <bool kSmooth>
__device__ __forceinline__ bool row_gradient(const BackwardCall& a, int64_t row, RowGradient& g) {
    const CrossEntropyRows& rows = a.rows;
    const float2 upstream = upstream_of(a.upstream, rows, row);
    if (upstream.x == 0.0f && upstream.y == 0.0f) return false;
    const int64_t target = class_of(rows.target, row);
    check_class(target, a.all_classes);
    const int64_t column = target - a.first_class;
    const float2 lse = reinterpret_cast<const float2*>(a.lse)[row];
    const float weight = rows.class_weight ? rows.class_weight[target] : 1.0f;
    const float smooth = kSmooth ? rows.smoothing / static_cast<float>(a.all_classes) : 0.0f;
    const float peak = kSmooth ? (1.0f - rows.smoothing) * weight : weight;
    const float spread = !kSmooth ? 0.0f : a.weight_sum ? smooth * *a.weight_sum : rows.smoothing;
    g = {lse.x,
         lse.y,
         upstream.x * (peak + spread) + upstream.y,
         upstream.x * smooth,
         upstream.x * peak,
         upstream.x,
         smooth > 0.0f ? rows.class_weight : nullptr,
         column >= 0 && column < rows.classes ? static_cast<int>(column) : -1};
    return true;
}

template <class T, int kGroup>
__device__ __forceinline__ void zero_row(T* grad, int classes) {
    const RowParts<T> parts(grad, classes);
    const Share share = share_of_block(parts.vectors);
    const int place = member<kGroup>();
    if (share.first && place < parts.head) grad[place] = from_float<T>(0.0f);
    if (share.last && place < parts.tail) grad[classes - parts.tail + place] = from_float<T>(0.0f);
    auto* const vectors = reinterpret_cast<uint4*>(grad + parts.head);
#pragma unroll 4
    for (int v = share.begin + place; v < share.end; v += kGroup) __stcs(vectors + v, uint4{0, 0, 0, 0});
}

// Both rows begin alike within 16 bytes.
template <class T, bool kSmooth, int kGroup>
__device__ __forceinline__ void write_row(const RowGradient& g, const T* row, T* grad, int classes) {
    constexpr int kN = kPerVector<T>, kInFlight = 2;
    const RowParts<T> parts(grad, classes);
    const Share share = share_of_block(parts.vectors);
    const int place = member<kGroup>(), behind = classes - parts.tail + place;
    if (share.first && place < parts.head)
        grad[place] = from_float<T>(g.at<kSmooth>(place, to_float(row[place])));
    if (share.last && place < parts.tail)
        grad[behind] = from_float<T>(g.at<kSmooth>(behind, to_float(row[behind])));
    const auto* const from = reinterpret_cast<const uint4*>(row + parts.head);
    auto* const to = reinterpret_cast<uint4*>(grad + parts.head);
    for (int begin = share.begin + place; begin < share.end; begin += kInFlight * kGroup) {
        uint4 loaded[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
            if (begin + i * kGroup < share.end) loaded[i] = from[begin + i * kGroup];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int v = begin + i * kGroup;
            if (v >= share.end) break;
            float z[kN];
            unpack(loaded[i], z, row);
#pragma unroll
            for (int j = 0; j < kN; ++j) z[j] = g.at<kSmooth>(parts.head + v * kN + j, z[j]);
            __stcs(to + v, pack(z, grad));
        }
    }
}

// Rows that no 16 bytes of both can be read and written at once.
template <class T, bool kSmooth, int kGroup>
__device__ __forceinline__ void write_elements(const RowGradient& g, const T* row, T* grad, int classes) {
    const Share share = share_of_block(classes);
#pragma unroll 4
    for (int j = share.begin + member<kGroup>(); j < share.end; j += kGroup)
        grad[j] = from_float<T>(g.at<kSmooth>(j, to_float(row[j])));
}

template <class T, bool kSmooth, int kGroup>
__global__ void __launch_bounds__(kThreads<kGroup>, kResident<kGroup, kSmooth>)
    cross_entropy_backward(const BackwardCall a) {
    const int classes = a.rows.classes;
    for (int64_t i = first_row<kGroup>(); i < a.rows.rows; i += row_step<kGroup>()) {
        const T* const row = static_cast<const T*>(a.rows.logits) + i * a.rows.at.row;
        T* const grad = static_cast<T*>(a.grad) + i * a.grad_at.row;
        RowGradient g;
        if (!row_gradient<kSmooth>(a, i, g)) {
            zero_row<T, kGroup>(grad, classes);
            continue;
        }
        if ((reinterpret_cast<uintptr_t>(row) ^ reinterpret_cast<uintptr_t>(grad)) % 16 == 0)
            write_row<T, kSmooth, kGroup>(g, row, grad, classes);
        else
            write_elements<T, kSmooth, kGroup>(g, row, grad, classes);
    }
}

}  // namespace batchkern
