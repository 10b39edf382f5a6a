// rank_batches on a CPU.
#include <torch/library.h>

#include "select.h"
#include "tensors.h"

namespace batchkern {
namespace {

at::Tensor rank_batches(const at::Tensor& losses, int64_t k) {
    const ElementType type = check_losses(losses, "(N,)");
    const int64_t n = losses.size(0);
    check_count(k, n);
    const at::Tensor dense = dense_rows(losses);
    const auto keys = order_keys(dense, type);
    at::Tensor indices = at::empty({k}, losses.options().dtype(at::kLong));
    rank_rows(keys.get(), n, k, indices.mutable_data_ptr<int64_t>());
    return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CPU, m) { m.impl("rank_batches", &rank_batches); }

}  // namespace batchkern
