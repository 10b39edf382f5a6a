// What the bindings of the CPU kernels share: tensors on one side, raw pointers on the other.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <memory>
#include <optional>

#include "kernels.h"

namespace batchkern {

// An index must fit the low half of a 64-bit key.
constexpr int64_t kMaxRows = int64_t{1} << 32;

inline ElementType element_type(const at::Tensor& x, const char* name) {
    switch (x.scalar_type()) {
        case at::kFloat:
            return kFloat32;
        case at::kBFloat16:
            return kBFloat16;
        case at::kHalf:
            return kFloat16;
        default:
            TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ", x.scalar_type());
    }
}

// Rows whose elements lie side by side: x itself where they do, whatever its row stride.
inline at::Tensor dense_rows(const at::Tensor& x) {
    return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

inline const void* row_pointer(const at::Tensor& x, int64_t row) {
    return static_cast<const char*>(x.const_data_ptr()) + row * x.stride(0) * x.element_size();
}

inline void* mutable_row_pointer(const at::Tensor& x, int64_t row) {
    return static_cast<char*>(x.mutable_data_ptr()) + row * x.stride(0) * x.element_size();
}

// Elements, or rows, that a thread must have to be worth starting: some 10 us of work.
constexpr int64_t kGrain = 32768;
inline int64_t grain(int64_t elements_per_row) {
    return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_row));
}

// The ranking keys of losses (n,), as in order.h.
inline std::unique_ptr<uint32_t[]> order_keys(const at::Tensor& losses, ElementType type) {
    const int64_t n = losses.size(0), size = losses.element_size();
    std::unique_ptr<uint32_t[]> keys(new uint32_t[n]);
    const char* const data = static_cast<const char*>(losses.const_data_ptr());
    at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
        kernels().order_keys[type](data + begin * size, keys.get() + begin, end - begin);
    });
    return keys;
}

// keep, or what the tensor holds now.
inline double keep_value(double keep, const std::optional<at::Tensor>& tensor) {
    TORCH_CHECK_VALUE(!tensor || (tensor->dim() == 0 && tensor->scalar_type() == at::kDouble),
                      "keep_tensor must be 0-dim float64");
    const double value = tensor ? tensor->item<double>() : keep;
    TORCH_CHECK_VALUE(value > 0 && value <= 1, "keep must be in (0, 1], got ", value);
    return value;
}

inline at::Tensor scalar(double value) {
    at::Tensor result = at::empty({}, at::kFloat);  // at::full would dispatch once more
    *result.mutable_data_ptr<float>() = static_cast<float>(value);
    return result;
}

}  // namespace batchkern
