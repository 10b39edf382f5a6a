// Memory for large results. The page faults at the first write to fresh memory take longer than computing the
// values: malloc maps fresh pages of 4 KiB, and does so in every call for more than 32 MiB.
#pragma once

#include <ATen/core/Tensor.h>

namespace batchkern {

// malloc maps fresh pages in every call for more bytes than this.
constexpr size_t kAlwaysMapped = size_t{32} << 20;

// An uninitialised, contiguous tensor. From 4 MiB on it reuses the memory of such a tensor that was freed, or
// gets new memory, in huge pages if Linux grants them to madvise. One freed block is kept for each power of
// two in bytes, and marked so that Linux may reclaim it when memory is short.
at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options);
// In the memory format of `like`.
at::Tensor large_empty_like(const at::Tensor& like);

// Zeros in the memory format of `like`, which must be larger than kAlwaysMapped: no physical page is
// allocated until it is written.
at::Tensor untouched_zeros_like(const at::Tensor& like);

}  // namespace batchkern
