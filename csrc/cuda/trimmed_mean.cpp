// trimmed_mean on a GPU.
#include <torch/library.h>

#include "../order.h"
#include "device_context.h"

namespace batchkern {
namespace {

const float* floats_of(const std::optional<at::Tensor>& x) {
    return x ? x->const_data_ptr<float>() : nullptr;
}

int64_t stride_of(const std::optional<at::Tensor>& x) { return x ? x->stride(0) : 0; }

std::tuple<at::Tensor, at::Tensor, at::Tensor> trimmed_mean(const at::Tensor& losses, double keep,
                                                            const std::optional<at::Tensor>& keep_tensor,
                                                            const std::optional<at::Tensor>& mask,
                                                            const std::optional<at::Tensor>& score,
                                                            const std::optional<at::Tensor>& weight,
                                                            bool lowest, double skip,
                                                            std::optional<double> above, int64_t samples) {
    const ElementType type = check_losses(losses, "(B,)");
    check_keep(keep, keep_tensor, losses);
    check_mask(mask, losses);
    check_companion(score, "score", losses);
    check_companion(weight, "weight", losses);
    check_band(skip, lowest, above, samples, losses);
    const Place place(losses);
    const auto floats = losses.options().dtype(at::kFloat);
    const at::Tensor kept = at::empty({losses.size(0)}, floats.dtype(at::kBool));
    const at::Tensor mean = at::empty({}, floats), normalizer = at::empty({}, floats);
    const Place::Held memory = place.memory(trimmed_mean_needs(losses.size(0), samples));
    Ranking ranking{floats_of(score), stride_of(score), floats_of(weight), stride_of(weight), lowest, skip,
                    std::nullopt,     samples};
    if (above) ranking.above = order_key(static_cast<float>(*above));
    C10_CUDA_CHECK(launch_trimmed_mean(type, loss_vector(losses, mask), ranking,
                                       reduction(keep, keep_tensor, kept, mean, normalizer), memory.get(),
                                       place.stream()));
    return {mean, kept, normalizer};
}

at::Tensor trimmed_mean_backward(const at::Tensor& grad, const at::Tensor& kept, const at::Tensor& normalizer,
                                 at::ScalarType dtype, const std::optional<at::Tensor>& weight) {
    check_scalar(grad, "grad", kept);
    check_scalar(normalizer, "normalizer", kept);
    check_kept(kept);
    check_companion(weight, "weight", kept);
    const Place place(kept);
    const at::Tensor upstream = grad.to(at::kFloat);
    const at::Tensor result = at::empty(kept.sizes(), kept.options().dtype(dtype));
    C10_CUDA_CHECK(launch_trimmed_mean_backward(
        element_type(result, "losses"),
        {kept.const_data_ptr<bool>(), upstream.const_data_ptr<float>(), normalizer.const_data_ptr<float>(),
         floats_of(weight), stride_of(weight), result.mutable_data_ptr(), kept.size(0)},
        place.stream()));
    return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CUDA, m) {
    m.impl("trimmed_mean", &trimmed_mean);
    m.impl("trimmed_mean_backward", &trimmed_mean_backward);
}

}  // namespace batchkern
