// The gradient of the logits in one launch: rows that were dropped are zeroed without being read, kept rows
// compute their softmax anew from the log-sum-exp. The gradient may be written over the logits.
#pragma once

#include "cross_entropy.cuh"

namespace batchkern {

// d loss / d z_j = (total * softmax_j - smooth * w_j - (j == target) * peak) * scale
struct RowGradient {
    float maximum, log_sum;
    float total, smooth, peak, scale;
    const float* class_weight;
    int target;  // its column, or -1

    template <bool kSmooth>
    __device__ __forceinline__ float at(int column, float z) const {
        const float p = total * expf((z - maximum) - log_sum);
        const float level = !kSmooth ? 0.0f : class_weight ? smooth * class_weight[column] : smooth;
        return (column == target ? (p - level) - peak : p - level) * scale;
    }
};

template <bool kSmooth>
__device__ __forceinline__ RowGradient row_gradient(const BackwardCall& a, int64_t row) {
    const CrossEntropyRows& rows = a.rows;
    const int64_t target = rows.target[row];
    check_class(target, a.all_classes);
    const int64_t column = target - a.first_class;
    const float2 lse = reinterpret_cast<const float2*>(a.lse)[row];
    const float weight = rows.class_weight ? rows.class_weight[target] : 1.0f;
    const float smooth = kSmooth ? rows.smoothing / static_cast<float>(a.all_classes) : 0.0f;
    const float peak = kSmooth ? (1.0f - rows.smoothing) * weight : weight;
    const float spread = !kSmooth ? 0.0f : rows.class_weight ? smooth * *a.weight_sum : rows.smoothing;
    return {lse.x,
            lse.y,
            peak + spread,
            smooth,
            peak,
            *a.upstream / *a.normalizer,
            rows.class_weight,
            column >= 0 && column < rows.classes ? static_cast<int>(column) : -1};
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
        const T* const row = static_cast<const T*>(a.rows.logits) + i * a.rows.stride;
        T* const grad = static_cast<T*>(a.grad) + i * a.grad_stride;
        if (!a.kept[i]) {
            zero_row<T, kGroup>(grad, classes);
            continue;
        }
        const RowGradient g = row_gradient<kSmooth>(a, i);
        if ((reinterpret_cast<uintptr_t>(row) ^ reinterpret_cast<uintptr_t>(grad)) % 16 == 0)
            write_row<T, kSmooth, kGroup>(g, row, grad, classes);
        else
            write_elements<T, kSmooth, kGroup>(g, row, grad, classes);
    }
}

}  // namespace batchkern
