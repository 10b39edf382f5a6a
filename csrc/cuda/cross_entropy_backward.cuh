// The gradient of logits whose classes are contiguous in memory, in one launch. Rows without an upstream
// gradient are set to zero without being read; for the others the softmax is computed again, from the saved
// log-sum-exp. The gradient may overwrite the logits.
#pragma once

#include "cross_entropy.cuh"

namespace batchkern {

// The gradient of a row. With p = softmax(z) of its logits z, class weights w, label smoothing s over C
// classes, and the upstream gradients g of its loss and h of its log-sum-exp:
// 1. the loss is sum_j q_j (lse(z) - z_j), where q is the smoothed and weighted target: of a class index t,
//    q_j = w_j s / C + (j == t) (1 - s) w_t; of probabilities y, q_j = w_j ((1 - s) y_j + s / C);
// 2. the derivative of lse(z) by z_j is p_j, so that of the loss is p_j sum(q) - q_j;
// 3. so the gradient is (g sum(q) + h) p_j - g q_j: for a class index,
//    total * p_j - level * w_j - (j == target) * peak; for probabilities, total * p_j - factor * q_j.
struct RowGradient {
    float maximum, log_sum;
    float total, level, peak;
    float factor;  // g
    const float* class_weight;
    int target;  // its column; -1 if it is not among the columns

    __device__ __forceinline__ float share(float z) const { return total * expf((z - maximum) - log_sum); }

    // The gradient at a column, without the peak at the target.
    template <bool kSmooth>
    __device__ __forceinline__ float elsewhere(int column, float z) const {
        return share(z) - (!kSmooth ? 0.0f : class_weight ? level * class_weight[column] : level);
    }

    template <bool kSmooth>
    __device__ __forceinline__ float at(int column, float z) const {
        const float value = elsewhere<kSmooth>(column, z);
        return column == target ? value - peak : value;
    }
};

// The upstream gradients of the loss (x) and of the log-sum-exp (y) of a row. No load depends on the value of
// another.
__device__ __forceinline__ float2 upstream_of(const Upstream& u, int64_t row, bool ignored) {
    if (u.kept) {
        const bool kept = load_here(u.kept + row);
        const float share = *u.scalar / *u.normalizer;
        return {kept ? share : 0.0f, 0.0f};
    }
    const float loss = u.loss ? u.loss[row * u.loss_stride] : 0.0f;
    const float lse = u.lse ? u.lse[row * u.lse_stride] : 0.0f;
    return {ignored ? 0.0f : loss, ignored ? 0.0f : lse};
}

// Returns false if both upstream gradients of the row are zero.
template <bool kSmooth>
__device__ __forceinline__ bool row_gradient(const BackwardCall& a, int64_t row, RowGradient& g) {
    const CrossEntropyRows& rows = a.rows;
    const float2 lse = reinterpret_cast<const float2*>(a.lse)[row];
    const int64_t target = class_of(rows.target, row);
    const float2 upstream = upstream_of(a.upstream, row, target == a.upstream.ignore_index);
    if (upstream.x == 0.0f && upstream.y == 0.0f) return false;
    check_class(target, a.all_classes);
    const int64_t column = target - a.first_class;
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
    const Share share = share_of_block<kGroup>(0, parts.vectors);
    const int place = member<kGroup>();
    if (share.first && place < parts.head) grad[place] = from_float<T>(0.0f);
    if (share.first && place < parts.tail) grad[classes - parts.tail + place] = from_float<T>(0.0f);
    auto* const vectors = reinterpret_cast<uint4*>(grad + parts.head);
#pragma unroll 4
    for (int v = share.begin + place; v < share.end; v += kGroup) __stcs(vectors + v, uint4{0, 0, 0, 0});
}

// Writes the vectors of a gradient. Unless kAligned is true, the logits are not aligned to 16 bytes where the
// gradient is.
template <class T, bool kSmooth, int kGroup, bool kAligned>
__device__ __forceinline__ void write_vectors(const RowGradient& g, const ColumnGroups<T>& from, T* to,
                                              int head, const Share& share) {
    constexpr int kN = kPerVector<T>;
    constexpr int kStep = kInFlight * kGroup;
    for (int begin = share.begin; begin < share.end; begin += kStep) {
        const int group = begin + member<kGroup>();
        const auto write = [&](const auto& loaded, auto all) {
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const int v = group + i * kGroup, first = head + v * kN;
                if (!decltype(all)::value && v >= share.end) break;
                float z[kN];
                unpack(loaded[i], z, to);
#pragma unroll
                for (int j = 0; j < kN; ++j) z[j] = g.template elsewhere<kSmooth>(first + j, z[j]);
                if (g.target >= first && g.target < first + kN) {
#pragma unroll
                    for (int j = 0; j < kN; ++j) z[j] -= first + j == g.target ? g.peak : 0.0f;
                }
                __stcs(reinterpret_cast<uint4*>(to) + v, pack(z, to));
            }
        };
        from.template load<kAligned, kGroup, kInFlight>(group, share.end, begin + kStep <= share.end, write);
    }
}

template <class T, bool kSmooth, int kGroup>
__device__ __forceinline__ void write_row(const RowGradient& g, const T* row, T* grad, int classes) {
    constexpr int kN = kPerVector<T>;
    const RowParts<T> parts(grad, classes);
    const ColumnGroups<T> from(row + parts.head, classes - parts.head);
    const bool odd = from.past != 0;
    const int first = odd ? min(1, parts.vectors) : 0,
              last = odd ? max(first, parts.vectors - 1) : parts.vectors;
    const Share share = share_of_block<kGroup>(first, last);
    const Edges<T, kGroup, 4 * kN - 2> edges(row, parts.head + first * kN, parts.head + last * kN,
                                             share.first ? classes : 0);
    if (!odd)
        write_vectors<T, kSmooth, kGroup, true>(g, from, grad + parts.head, parts.head, share);
    else
        write_vectors<T, kSmooth, kGroup, false>(g, from, grad + parts.head, parts.head, share);
    edges.each(
        [&](int column, float element) { grad[column] = from_float<T>(g.at<kSmooth>(column, element)); });
}

// Blocks are small. A block holds its resources until its slowest row, a kept one, is finished, so that few
// dropped rows should share a block with a kept one.
template <int kGroup>
constexpr int kBackwardThreads = kGroup <= kWarp ? 64 : kGroup;

template <class T, bool kSmooth, int kGroup>
__global__ void __launch_bounds__(kBackwardThreads<kGroup>,
                                  kResidentThreads<kSmooth> / kBackwardThreads<kGroup>)
    cross_entropy_backward(const BackwardCall a) {
    constexpr int kOfBlock = kBackwardThreads<kGroup>;
    const int classes = a.rows.classes;
    for (int64_t i = first_row<kGroup, kOfBlock>(); i < a.rows.rows; i += row_step<kGroup, kOfBlock>()) {
        const T* const row = static_cast<const T*>(a.rows.logits) + i * a.rows.at.row;
        T* const grad = static_cast<T*>(a.grad) + i * a.grad_at.row;
        RowGradient g;
        if (row_gradient<kSmooth>(a, i, g))
            write_row<T, kSmooth, kGroup>(g, row, grad, classes);
        else
            zero_row<T, kGroup>(grad, classes);
    }
}

}  // namespace batchkern
