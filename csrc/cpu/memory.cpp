#include "memory.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/strides.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchkern {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = 2 * kHugePage;

struct Block {
    void* data;
    size_t bytes;  // a multiple of kHugePage
};

std::atomic<Block*> spares[64] = {};

// The place that keeps a freed block of this size: one for each power of two.
std::atomic<Block*>& spare(size_t bytes) { return spares[63 - __builtin_clzll(bytes)]; }

void give_back(Block* block) {
    if (!block) return;
    std::free(block->data);
    delete block;
}

#if defined(__linux__)
void advise(const Block& block, int advice) { madvise(block.data, block.bytes, advice); }
#endif

Block* take(size_t bytes) {
    const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    Block* const block = spare(whole).exchange(nullptr);
    if (block && whole <= block->bytes) return block;
    give_back(block);
    void* data = std::aligned_alloc(kHugePage, whole);
    if (!data) {  // the kept blocks may take the memory that is missing
        for (auto& other : spares) give_back(other.exchange(nullptr));
        data = std::aligned_alloc(kHugePage, whole);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, data, "could not allocate ", bytes, " bytes");
    auto* const made = new Block{data, whole};
#if defined(__linux__)
    advise(*made, MADV_HUGEPAGE);
#endif
    return made;
}

void keep(void* context) {
    auto* const block = static_cast<Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(block->data);
#if defined(__linux__) && defined(MADV_FREE)
    advise(*block, MADV_FREE);
#endif
    give_back(spare(block->bytes).exchange(block));
}

constexpr uintptr_t kAlignment = 64;

void* aligned(void* base) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(base) / kAlignment + 1) * kAlignment);
}

void release(void* base) {
    c10::profiledCPUMemoryReporter().Delete(aligned(base));
    std::free(base);
}

at::Tensor tensor_in(at::DataPtr data, size_t bytes, at::IntArrayRef sizes, at::IntArrayRef strides,
                     const at::TensorOptions& options) {
    c10::profiledCPUMemoryReporter().New(data.get(), bytes);
    const c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data),
                               c10::GetCPUAllocator(), /*resizable=*/true);
    return at::empty({0}, options).set_(storage, 0, sizes, strides);
}

std::vector<int64_t> dense_strides(const at::Tensor& like) {
    return like.is_non_overlapping_and_dense() ? like.strides().vec()
                                               : at::infer_dense_strides(like.sizes(), like.strides());
}

at::Tensor large_tensor(size_t bytes, at::IntArrayRef sizes, at::IntArrayRef strides,
                        const at::TensorOptions& options) {
    Block* const block = take(bytes);
    return tensor_in({block->data, block, &keep, at::kCPU}, bytes, sizes, strides, options);
}

}  // namespace

at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
    if (bytes < kLarge) return at::empty(sizes, options);
    return large_tensor(bytes, sizes, c10::contiguous_strides(sizes), options);
}

at::Tensor large_empty_like(const at::Tensor& like) {
    const size_t bytes = like.numel() * like.element_size();
    if (bytes < kLarge) return at::empty_like(like);
    return large_tensor(bytes, like.sizes(), dense_strides(like), like.options());
}

at::Tensor untouched_zeros_like(const at::Tensor& like) {
    const size_t bytes = like.numel() * like.element_size();
    void* const base = std::calloc(bytes + kAlignment, 1);
    TORCH_CHECK_WITH(OutOfMemoryError, base, "could not allocate ", bytes, " bytes");
    return tensor_in({aligned(base), base, &release, at::kCPU}, bytes, like.sizes(), dense_strides(like),
                     like.options());
}

}  // namespace batchkern
