// Asks Linux for huge pages where a large result is about to be written for the first time: with pages of 4
// KB its page faults take longer than its values. Linux gives them to whoever asks, unless it is set to
// `never`.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchkern {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Returns its argument, which may be a tensor on a GPU, or a fake one.
inline const at::Tensor& in_huge_pages(const at::Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (!x.device().is_cpu() || x.key_set().has(c10::DispatchKey::Python)) return x;
    if (x.storage().nbytes() < 2 * kHugePage) return x;
    const auto data = reinterpret_cast<uintptr_t>(x.storage().data());
    const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (data + x.storage().nbytes()) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    return x;
}

}  // namespace batchkern
