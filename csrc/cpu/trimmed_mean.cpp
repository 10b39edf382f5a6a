// trimmed_mean on a CPU.
#include <torch/library.h>

#include "select.h"
#include "tensors.h"

namespace batchkern {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> trimmed_mean(const at::Tensor& losses, double keep,
                                                            const std::optional<at::Tensor>& keep_tensor,
                                                            const std::optional<at::Tensor>& mask) {
    const ElementType type = check_losses(losses, "(B,)");
    check_mask(mask, losses);
    const at::Tensor dense = dense_rows(losses);
    const at::Tensor valid = mask ? mask->view(at::kByte).ne(0) : at::Tensor();  // any byte but 0 is true
    const int64_t n = losses.size(0);
    const auto keys = order_keys(dense, type);
    at::Tensor kept = at::empty({n}, losses.options().dtype(at::kBool));
    bool* const is_kept = kept.mutable_data_ptr<bool>();
    const int64_t k = select_rows(keys.get(), mask ? valid.const_data_ptr<bool>() : nullptr, n,
                                  keep_value(keep, keep_tensor, losses), is_kept);
    const double sum = kernels().sum_kept[type](dense.const_data_ptr(), is_kept, n);
    return {scalar(sum / static_cast<double>(k)), kept, scalar(static_cast<double>(k))};
}

at::Tensor trimmed_mean_backward(const at::Tensor& grad, const at::Tensor& kept, const at::Tensor& normalizer,
                                 at::ScalarType dtype) {
    check_scalar(grad, "grad", kept);
    check_scalar(normalizer, "normalizer", kept);
    check_kept(kept);
    at::Tensor result = at::empty(kept.sizes(), kept.options().dtype(dtype));
    const ElementType type = element_type(result, "losses");
    const auto value = static_cast<float>(grad.item<double>() / normalizer.item<double>());
    const bool* const is_kept = kept.const_data_ptr<bool>();
    char* const data = static_cast<char*>(result.mutable_data_ptr());
    at::parallel_for(0, kept.size(0), kGrain, [&](int64_t begin, int64_t end) {
        kernels().fill_kept[type](value, is_kept + begin, data + begin * result.element_size(), end - begin);
    });
    return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CPU, m) {
    m.impl("trimmed_mean", &trimmed_mean);
    m.impl("trimmed_mean_backward", &trimmed_mean_backward);
}

}  // namespace batchkern
