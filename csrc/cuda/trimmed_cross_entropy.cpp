// trimmed_cross_entropy on a GPU.
#include <torch/library.h>

#include <limits>

#include "place.h"

namespace batchkern {
namespace {

CrossEntropyRows rows_of(const CrossEntropyArguments& p, double smoothing) {
    // A thread counts columns in int, and steps past the last one.
    constexpr int64_t most = std::numeric_limits<int>::max() - 65536;
    TORCH_CHECK_VALUE(p.columns <= most, "logits must have at most ", most, " columns, got ", p.columns);
    return {p.logits.const_data_ptr(),
            p.logits.stride(0),
            p.target.const_data_ptr<int64_t>(),
            p.weights(),
            p.rows,
            static_cast<int>(p.columns),
            static_cast<float>(smoothing)};
}

void cross_entropy_losses(const at::Tensor& logits, const at::Tensor& target, at::Tensor& losses,
                          at::Tensor& lse, int64_t ignore_index, double label_smoothing) {
    const CrossEntropyArguments p(logits, target, std::nullopt);
    p.check_losses(losses, lse);
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(lse.const_data_ptr()) % 8 == 0,
                      "lse must begin at a multiple of 8 bytes");
    const CrossEntropyRows rows = rows_of(p, label_smoothing);
    const Place place(logits);
    const Place::Held memory = place.memory(cross_entropy_needs(p.type, rows.rows, rows.classes));
    C10_CUDA_CHECK(launch_cross_entropy_forward(
        p.type,
        {rows, ignore_index, losses.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(), std::nullopt},
        memory.get(), place.stream()));
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward trimmed_cross_entropy(const at::Tensor& logits, const at::Tensor& target, double keep,
                              const std::optional<at::Tensor>& keep_tensor,
                              const std::optional<at::Tensor>& class_weight, int64_t ignore_index,
                              double label_smoothing) {
    check_keep(keep, keep_tensor, logits);
    const CrossEntropyArguments p(logits, target, class_weight);
    const CrossEntropyRows rows = rows_of(p, label_smoothing);
    const Place place(logits);
    const auto floats = logits.options().dtype(at::kFloat);
    const at::Tensor losses = at::empty({p.rows}, floats), lse = at::empty({p.rows, 2}, floats);
    const at::Tensor kept = at::empty({p.rows}, floats.dtype(at::kBool));
    const at::Tensor loss = at::empty({}, floats), normalizer = at::empty({}, floats);
    const Place::Held memory = place.memory(cross_entropy_needs(p.type, rows.rows, rows.classes));
    C10_CUDA_CHECK(launch_cross_entropy_forward(
        p.type,
        {rows, ignore_index, losses.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(),
         reduction(keep, keep_tensor, kept, loss, normalizer)},
        memory.get(), place.stream()));
    return {loss, losses, lse, kept, normalizer};
}

// `grad` may be the logits.
void write_gradient(const CrossEntropyArguments& p, const at::Tensor& upstream_, const at::Tensor& lse,
                    const at::Tensor& kept, const at::Tensor& normalizer, double smoothing,
                    const at::Tensor& grad) {
    p.check_saved(upstream_, lse, kept, normalizer);
    const CrossEntropyRows rows = rows_of(p, smoothing);
    const Place place(grad);
    const at::Tensor upstream = upstream_.to(at::kFloat);
    // The kernel reads pairs.
    const at::Tensor pairs = reinterpret_cast<uintptr_t>(lse.const_data_ptr()) % 8 == 0 ? lse : lse.clone();
    const at::Tensor weight_sum = p.weight.defined() && smoothing > 0 ? p.weight.sum() : at::Tensor();
    C10_CUDA_CHECK(launch_cross_entropy_backward(
        p.type,
        {rows, p.first_class, p.classes, pairs.const_data_ptr<float>(), kept.const_data_ptr<bool>(),
         upstream.const_data_ptr<float>(), normalizer.const_data_ptr<float>(),
         weight_sum.defined() ? weight_sum.const_data_ptr<float>() : nullptr, grad.mutable_data_ptr(),
         grad.stride(0)},
        place.stream()));
}

at::Tensor trimmed_cross_entropy_backward(const at::Tensor& grad, const at::Tensor& logits,
                                          const at::Tensor& target, const at::Tensor& lse,
                                          const at::Tensor& kept, const at::Tensor& normalizer,
                                          const std::optional<at::Tensor>& class_weight,
                                          double label_smoothing) {
    const CrossEntropyArguments p(logits, target, class_weight);
    const at::Tensor result = at::empty(logits.sizes(), logits.options());
    write_gradient(p, grad, lse, kept, normalizer, label_smoothing, result);
    return result;
}

void trimmed_cross_entropy_backward_(const at::Tensor& grad, at::Tensor& logits, const at::Tensor& target,
                                     const at::Tensor& lse, const at::Tensor& kept,
                                     const at::Tensor& normalizer,
                                     const std::optional<at::Tensor>& class_weight, double label_smoothing,
                                     int64_t first_class, std::optional<int64_t> classes) {
    const CrossEntropyArguments p(logits, target, class_weight, first_class, classes);
    write_gradient(p, grad, lse, kept, normalizer, label_smoothing, p.logits);
    if (!p.logits.is_same(logits)) logits.copy_(p.logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CUDA, m) {
    m.impl("cross_entropy_losses", &cross_entropy_losses);
    m.impl("trimmed_cross_entropy", &trimmed_cross_entropy);
    m.impl("trimmed_cross_entropy_backward", &trimmed_cross_entropy_backward);
    m.impl("trimmed_cross_entropy_backward_", &trimmed_cross_entropy_backward_);
}

}  // namespace batchkern
