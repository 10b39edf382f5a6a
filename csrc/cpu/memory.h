// Memory of large results, whose first writing takes longer than their values: malloc maps pages that are
// fresh, each time for whatever is above 32 MiB, and in pages of 4 KB.
#pragma once

#include <ATen/core/Tensor.h>

namespace batchkern {

// What is above it malloc always maps anew.
constexpr size_t kAlwaysMapped = size_t{32} << 20;

// Uninitialised and contiguous. From 4 MiB up in the memory of such a tensor that was freed, or in huge
// pages, where Linux gives them to whoever asks. Of freed memory one block is kept for each power of two in
// bytes, and marked as what the kernel may take away when memory is short.
at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options);
// In the memory format of `like`.
at::Tensor large_empty_like(const at::Tensor& like);

// Zeros in the memory format of `like`, which is above kAlwaysMapped: no page holds them until it is written.
at::Tensor untouched_zeros_like(const at::Tensor& like);

}  // namespace batchkern
