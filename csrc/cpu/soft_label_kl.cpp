// soft_label_kl on a CPU.
#include <torch/library.h>

#include <vector>

#include "memory.h"
#include "tensors.h"

namespace batchkern {
namespace {

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward soft_label_kl(const at::Tensor& reference_logits, const at::Tensor& virtual_logits,
                      double temperature, double scale, bool reference_grad, bool virtual_grad) {
    const ElementType type = element_type(reference_logits, "reference_logits");
    TORCH_CHECK_VALUE(reference_logits.dim() == 2, "reference_logits must be (B, C), got ",
                      reference_logits.sizes());
    const int64_t batch = reference_logits.size(0), classes = reference_logits.size(1);
    TORCH_CHECK_VALUE(virtual_logits.dim() == 2 && virtual_logits.size(1) == classes &&
                          virtual_logits.scalar_type() == reference_logits.scalar_type() &&
                          (batch ? virtual_logits.size(0) % batch == 0 : virtual_logits.size(0) == 0),
                      "virtual_logits must be (M * ", batch, ", ", classes, "), got ",
                      virtual_logits.sizes());
    check_memory(virtual_logits, "virtual_logits");
    const int64_t rows = virtual_logits.size(0), copies = batch ? rows / batch : 0;
    const at::Tensor reference = dense_rows(reference_logits), virtuals = dense_rows(virtual_logits);
    const auto floats = reference.options().dtype(at::kFloat);
    at::Tensor kl = at::empty({rows}, floats);
    at::Tensor to_virtual = large_empty({virtual_grad ? rows : 0, classes}, floats);
    at::Tensor to_reference = large_empty({reference_grad ? batch : 0, classes}, floats);
    float* const divergences = kl.mutable_data_ptr<float>();

    at::parallel_for(0, batch, grain(classes * (copies + 1)), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(2 * classes);
        for (int64_t b = begin; b < end; ++b) {
            DivergenceRows a{};
            a.reference = row_pointer(reference, b);
            a.virtuals = row_pointer(virtuals, b);
            a.virtual_stride = batch * virtuals.stride(0);
            if (virtual_grad) a.grad_virtual = to_virtual.mutable_data_ptr<float>() + b * classes;
            a.grad_stride = batch * classes;
            if (reference_grad) a.grad_reference = to_reference.mutable_data_ptr<float>() + b * classes;
            a.divergences = divergences + b;
            a.divergence_stride = batch;
            a.scratch = scratch.data();
            a.copies = copies;
            a.classes = classes;
            a.inverse_temperature = static_cast<float>(1 / temperature);
            a.grad_scale =
                static_cast<float>(scale / temperature / static_cast<double>(std::max<int64_t>(rows, 1)));
            kernels().divergence_rows[type](a);
        }
    });
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += divergences[i];
    return {scalar(scale * sum / static_cast<double>(rows)), kl, to_virtual, to_reference};
}

void scale_gradient(const at::Tensor& out, const at::Tensor& gradient, const at::Tensor& factor) {
    if (factor.item<double>() != 1) gradient.mul_(factor);
    if (!out.is_same(gradient)) out.copy_(gradient);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CPU, m) {
    m.impl("soft_label_kl", &soft_label_kl);
    m.impl("scale_gradient_", &scale_gradient);
}

}  // namespace batchkern
