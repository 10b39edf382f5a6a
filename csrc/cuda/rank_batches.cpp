// rank_batches on a GPU.
#include <torch/library.h>

#include "device_context.h"

namespace batchkern {
namespace {

at::Tensor rank_batches(const at::Tensor& losses, int64_t k) {
    const ElementType type = check_losses(losses, "(N,)");
    const int64_t n = losses.size(0);
    check_count(k, n);
    const Place place(losses);
    const at::Tensor indices = at::empty({k}, losses.options().dtype(at::kLong));
    const Place::Held memory = place.memory(rank_needs(n, k));
    C10_CUDA_CHECK(launch_rank(type, loss_vector(losses, std::nullopt), k,
                               indices.mutable_data_ptr<int64_t>(), memory.get(), place.stream()));
    return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CUDA, m) { m.impl("rank_batches", &rank_batches); }

}  // namespace batchkern
