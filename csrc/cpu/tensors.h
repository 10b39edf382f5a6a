// Helpers that the bindings of the CPU kernels share.
#pragma once

#include <ATen/Parallel.h>

#include <memory>
#include <optional>

#include "../arguments.h"
#include "kernels.h"

namespace batchkern {

inline const void* row_pointer(const at::Tensor& x, int64_t row) {
    return static_cast<const char*>(x.const_data_ptr()) + row * x.stride(0) * x.element_size();
}

inline void* mutable_row_pointer(const at::Tensor& x, int64_t row) {
    return static_cast<char*>(x.mutable_data_ptr()) + row * x.stride(0) * x.element_size();
}

// The fewest elements that are worth a thread of their own: about 10 us of work.
constexpr int64_t kGrain = 32768;
inline int64_t grain(int64_t elements_per_row) {
    return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_row));
}

// The ranking keys of n contiguous losses, as in order.h.
inline std::unique_ptr<uint32_t[]> order_keys(const at::Tensor& losses, ElementType type) {
    const int64_t n = losses.numel(), size = losses.element_size();
    std::unique_ptr<uint32_t[]> keys(new uint32_t[n]);
    const char* const data = static_cast<const char*>(losses.const_data_ptr());
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
        kernels().order_keys[type](data + begin * size, keys.get() + begin, end - begin);
    });
    return keys;
}

// keep, or the current value of the tensor if there is one.
inline double keep_value(double keep, const std::optional<at::Tensor>& tensor, const at::Tensor& like) {
    check_keep(keep, tensor, like);
    if (tensor) check_keep(keep = tensor->item<double>(), std::nullopt, like);
    return keep;
}

inline at::Tensor scalar(double value) {
    at::Tensor result = at::empty({}, at::kFloat);  // at::full would dispatch once more
    *result.mutable_data_ptr<float>() = static_cast<float>(value);
    return result;
}

}  // namespace batchkern
