// trimmed_mean on a GPU.
#include <torch/library.h>

#include "place.h"

namespace batchkern {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> trimmed_mean(const at::Tensor& losses, double keep,
                                                            const std::optional<at::Tensor>& keep_tensor,
                                                            const std::optional<at::Tensor>& mask) {
    const ElementType type = check_losses(losses, "(B,)");
    check_keep(keep, keep_tensor, losses);
    check_mask(mask, losses);
    const Place place(losses);
    const auto floats = losses.options().dtype(at::kFloat);
    const at::Tensor kept = at::empty({losses.size(0)}, floats.dtype(at::kBool));
    const at::Tensor mean = at::empty({}, floats), normalizer = at::empty({}, floats);
    const Place::Held memory = place.memory(trimmed_mean_needs(losses.size(0)));
    C10_CUDA_CHECK(launch_trimmed_mean(type, loss_vector(losses, mask),
                                       reduction(keep, keep_tensor, kept, mean, normalizer), memory.get(),
                                       place.stream()));
    return {mean, kept, normalizer};
}

at::Tensor trimmed_mean_backward(const at::Tensor& grad, const at::Tensor& kept, const at::Tensor& normalizer,
                                 at::ScalarType dtype) {
    check_scalar(grad, "grad", kept);
    check_scalar(normalizer, "normalizer", kept);
    check_kept(kept);
    const Place place(kept);
    const at::Tensor upstream = grad.to(at::kFloat);
    const at::Tensor result = at::empty(kept.sizes(), kept.options().dtype(dtype));
    C10_CUDA_CHECK(launch_trimmed_mean_backward(
        element_type(result, "losses"),
        {kept.const_data_ptr<bool>(), upstream.const_data_ptr<float>(), normalizer.const_data_ptr<float>(),
         result.mutable_data_ptr(), kept.size(0)},
        place.stream()));
    return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CUDA, m) {
    m.impl("trimmed_mean", &trimmed_mean);
    m.impl("trimmed_mean_backward", &trimmed_mean_backward);
}

}  // namespace batchkern
