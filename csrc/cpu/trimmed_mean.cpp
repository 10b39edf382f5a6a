// trimmed_mean on a CPU.
#include <torch/library.h>

#include <numeric>
#include <vector>

#include "../order.h"
#include "select.h"
#include "tensors.h"

namespace batchkern {
namespace {

const float* floats_of(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

std::tuple<at::Tensor, at::Tensor, at::Tensor> trimmed_mean(const at::Tensor& losses, double keep,
                                                            const std::optional<at::Tensor>& keep_tensor,
                                                            const std::optional<at::Tensor>& mask,
                                                            const std::optional<at::Tensor>& score,
                                                            const std::optional<at::Tensor>& weight,
                                                            bool lowest, double skip,
                                                            std::optional<double> above, int64_t samples) {
    const ElementType type = check_losses(losses, "(B,)");
    check_mask(mask, losses);
    check_companion(score, "score", losses);
    check_companion(weight, "weight", losses);
    check_band(skip, lowest, above, samples, losses);
    const at::Tensor dense = dense_rows(losses), weights = weight ? weight->contiguous() : at::Tensor();
    const at::Tensor valid = mask ? mask->view(at::kByte).ne(0) : at::Tensor();  // any byte but 0 is true
    const int64_t n = losses.size(0), rows = n / samples;
    const auto keys = score ? order_keys(score->contiguous(), kFloat32) : order_keys(dense, type);
    if (lowest)
        for (int64_t i = 0; i < n; ++i) keys[i] = ~keys[i];  // so NaN ranks last
    Band band{keep_value(keep, keep_tensor, losses), skip, std::nullopt};
    if (above) band.above = order_key(static_cast<float>(*above));
    at::Tensor kept = at::empty({n}, losses.options().dtype(at::kBool));
    bool* const is_kept = kept.mutable_data_ptr<bool>();
    const bool* const is_valid = mask ? valid.const_data_ptr<bool>() : nullptr;
    std::vector<int64_t> counts(samples);
    at::parallel_for(0, samples, grain(rows), [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s)
            counts[s] = select_rows(keys.get() + s * rows, is_valid ? is_valid + s * rows : nullptr, rows,
                                    band, is_kept + s * rows);
    });
    const double sum = kernels().sum_kept[type](dense.const_data_ptr(), is_kept, floats_of(weights), n);
    const double normalizer =
        weight ? kernels().sum_kept[kFloat32](floats_of(weights), is_kept, nullptr, n)
               : static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
    return {scalar(sum / normalizer), kept, scalar(normalizer)};
}

// The gradient of the losses, with the upstream gradient g:
// 1. the mean is sum_i kept_i w_i loss_i / normalizer, and the weights w and the normalizer are constant;
// 2. the set of kept rows is constant except at ties, so that it has no derivative;
// 3. so the gradient of loss_i is g w_i / normalizer if row i is kept, and 0 otherwise.
at::Tensor trimmed_mean_backward(const at::Tensor& grad, const at::Tensor& kept, const at::Tensor& normalizer,
                                 at::ScalarType dtype, const std::optional<at::Tensor>& weight) {
    check_scalar(grad, "grad", kept);
    check_scalar(normalizer, "normalizer", kept);
    check_kept(kept);
    check_companion(weight, "weight", kept);
    at::Tensor result = at::empty(kept.sizes(), kept.options().dtype(dtype));
    const at::Tensor weights = weight ? weight->contiguous() : at::Tensor();
    const ElementType type = element_type(result, "losses");
    const auto value = static_cast<float>(grad.item<double>() / normalizer.item<double>());
    const bool* const is_kept = kept.const_data_ptr<bool>();
    const float* const factors = floats_of(weights);
    char* const data = static_cast<char*>(result.mutable_data_ptr());
    at::parallel_for(0, kept.size(0), kGrain, [&](int64_t begin, int64_t end) {
        kernels().fill_kept[type](value, is_kept + begin, factors ? factors + begin : nullptr,
                                  data + begin * result.element_size(), end - begin);
    });
    return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CPU, m) {
    m.impl("trimmed_mean", &trimmed_mean);
    m.impl("trimmed_mean_backward", &trimmed_mean_backward);
}

}  // namespace batchkern
