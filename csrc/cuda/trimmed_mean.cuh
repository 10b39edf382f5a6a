// The gradient of a trimmed mean, with the upstream gradient g:
// 1. the mean is sum_i kept_i w_i loss_i / normalizer, and the weights w and the normalizer are constant;
// 2. the set of kept rows is constant except at ties, so that it has no derivative;
// 3. so the gradient of loss_i is g w_i / normalizer if row i is kept, and 0 otherwise.
#pragma once

#include "elements.cuh"
#include "kernels.h"

namespace batchkern {

constexpr int kFillThreads = 256;

template <class T>
__global__ void __launch_bounds__(kFillThreads) trimmed_mean_backward(const MeanBackwardCall a) {
    const float share = *a.upstream / *a.normalizer;
    T* const grad = static_cast<T*>(a.grad);
    const int64_t step = int64_t{gridDim.x} * kFillThreads;
    for (int64_t i = int64_t{blockIdx.x} * kFillThreads + threadIdx.x; i < a.n; i += step)
        grad[i] = from_float<T>(!a.kept[i] ? 0.0f : a.weight ? share * a.weight[i * a.weight_stride] : share);
}

}  // namespace batchkern
