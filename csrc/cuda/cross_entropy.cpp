// cross_entropy and trimmed_cross_entropy on a GPU.
#include <torch/library.h>

#include <limits>

#include "device_context.h"

namespace batchkern {
namespace {

CrossEntropyRows rows_of(const CrossEntropyArguments& p, double smoothing) {
    // A thread counts columns in int, and its last step may go past the last column.
    constexpr int64_t most = std::numeric_limits<int>::max() - 65536;
    TORCH_CHECK_VALUE(p.columns <= most, "logits must have at most ", most, " columns, got ", p.columns);
    return {p.logits.const_data_ptr(),
            p.layout(),
            p.indices,
            p.probabilities(),
            p.weights(),
            p.rows,
            static_cast<int>(p.columns),
            static_cast<float>(smoothing)};
}

// entropy and correct are undefined tensors if they are not requested.
void launch_forward(const CrossEntropyArguments& p, int64_t ignore_index, double smoothing,
                    const at::Tensor& losses, const at::Tensor& lse, const at::Tensor& entropy,
                    const at::Tensor& correct, const std::optional<Reduction>& reduction) {
    const CrossEntropyRows rows = rows_of(p, smoothing);
    const Place place(losses);
    const Place::Held memory =
        place.memory(cross_entropy_needs(p.type, rows, entropy.defined(), reduction.has_value()));
    C10_CUDA_CHECK(launch_cross_entropy_forward(
        p.type,
        {rows, ignore_index, losses.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(),
         entropy.defined() ? entropy.mutable_data_ptr<float>() : nullptr,
         correct.defined() ? correct.mutable_data_ptr<bool>() : nullptr, reduction},
        memory.get(), place.stream()));
}

void cross_entropy_losses(const at::Tensor& logits, const at::Tensor& target, at::Tensor& losses,
                          at::Tensor& lse, std::optional<at::Tensor> entropy,
                          std::optional<at::Tensor> correct, int64_t ignore_index, double label_smoothing) {
    const CrossEntropyArguments p(logits, target, std::nullopt);
    p.check_losses(losses, lse, entropy, correct);
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(lse.const_data_ptr()) % 8 == 0,
                      "lse must begin at a multiple of 8 bytes");
    launch_forward(p, ignore_index, label_smoothing, losses, lse, entropy.value_or(at::Tensor()),
                   correct.value_or(at::Tensor()), std::nullopt);
}

using Rows = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Rows cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                   const std::optional<at::Tensor>& class_weight, int64_t ignore_index,
                   double label_smoothing, bool stats) {
    const CrossEntropyArguments p(logits, target, class_weight);
    const c10::cuda::CUDAGuard guard(logits.device());
    const auto floats = logits.options().dtype(at::kFloat), bools = logits.options().dtype(at::kBool);
    const at::Tensor losses = at::empty(p.shape, floats), lse = at::empty(p.state_shape(), floats);
    const at::Tensor entropy = stats ? at::empty(p.shape, floats) : at::empty({0}, floats);
    const at::Tensor correct = stats ? at::empty(p.shape, bools) : at::empty({0}, bools);
    launch_forward(p, ignore_index, label_smoothing, losses, lse, stats ? entropy : at::Tensor(),
                   stats ? correct : at::Tensor(), std::nullopt);
    return {losses, lse, entropy, correct};
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward trimmed_cross_entropy(const at::Tensor& logits, const at::Tensor& target, double keep,
                              const std::optional<at::Tensor>& keep_tensor,
                              const std::optional<at::Tensor>& class_weight, int64_t ignore_index,
                              double label_smoothing) {
    check_keep(keep, keep_tensor, logits);
    const CrossEntropyArguments p(logits, target, class_weight);
    const c10::cuda::CUDAGuard guard(logits.device());
    const auto floats = logits.options().dtype(at::kFloat);
    const at::Tensor losses = at::empty(p.shape, floats), lse = at::empty(p.state_shape(), floats);
    const at::Tensor kept = at::empty(p.shape, floats.dtype(at::kBool));
    const at::Tensor loss = at::empty({}, floats), normalizer = at::empty({}, floats);
    launch_forward(p, ignore_index, label_smoothing, losses, lse, {}, {},
                   reduction(keep, keep_tensor, kept, loss, normalizer));
    return {loss, losses, lse, kept, normalizer};
}

// `grad` may be p.logits.
void write_gradient(const CrossEntropyArguments& p, const at::Tensor& lse, double smoothing,
                    const Upstream& upstream, const at::Tensor& grad) {
    const CrossEntropyRows rows = rows_of(p, smoothing);
    const Place place(grad);
    // The kernel loads pairs of floats, which must be aligned to 8 bytes.
    const at::Tensor aligned = reinterpret_cast<uintptr_t>(lse.const_data_ptr()) % 8 == 0 ? lse : lse.clone();
    const at::Tensor weight_sum = p.weight.defined() && smoothing > 0 ? p.weight.sum() : at::Tensor();
    C10_CUDA_CHECK(launch_cross_entropy_backward(
        p.type,
        {rows, p.first_class, p.classes, aligned.const_data_ptr<float>(), upstream,
         weight_sum.defined() ? weight_sum.const_data_ptr<float>() : nullptr, grad.mutable_data_ptr(),
         *p.grid.layout(grad)},
        place.stream()));
}

at::Tensor gradient(const CrossEntropyArguments& p, const at::Tensor& logits, const at::Tensor& lse,
                    double smoothing, const Upstream& upstream) {
    const at::Tensor result = at::empty_like(logits);
    if (p.grid.layout(result)) {
        write_gradient(p, lse, smoothing, upstream, result);
        return result;
    }
    const at::Tensor other = at::empty(logits.sizes(), logits.options());
    write_gradient(p, lse, smoothing, upstream, other);
    return result.copy_(other);
}

at::Tensor cross_entropy_backward(const std::optional<at::Tensor>& grad_losses,
                                  const std::optional<at::Tensor>& grad_lse, const at::Tensor& logits,
                                  const at::Tensor& target, const at::Tensor& lse,
                                  const std::optional<at::Tensor>& class_weight, int64_t ignore_index,
                                  double label_smoothing) {
    const CrossEntropyArguments p(logits, target, class_weight);
    RowsUpstream<Upstream> upstream(p, grad_losses, grad_lse, lse);
    upstream.pointers.ignore_index = ignore_index;
    return gradient(p, logits, lse, label_smoothing, upstream.pointers);
}

void cross_entropy_backward_(const std::optional<at::Tensor>& grad_losses,
                             const std::optional<at::Tensor>& grad_lse, at::Tensor& logits,
                             const at::Tensor& target, const at::Tensor& lse, int64_t ignore_index,
                             double label_smoothing, int64_t first_class, std::optional<int64_t> classes) {
    const CrossEntropyArguments p(logits, target, std::nullopt, first_class, classes);
    RowsUpstream<Upstream> upstream(p, grad_losses, grad_lse, lse);
    upstream.pointers.ignore_index = ignore_index;
    write_gradient(p, lse, label_smoothing, upstream.pointers, p.logits);
    if (!p.logits.is_same(logits)) logits.copy_(p.logits);
}

// Keeps alive the tensors whose data pointers the kernels receive.
struct KeptUpstream {
    KeptUpstream(const CrossEntropyArguments& p, const at::Tensor& grad, const at::Tensor& lse,
                 const at::Tensor& kept, const at::Tensor& normalizer) {
        p.check_saved(grad, lse, kept, normalizer);
        scalar = grad.to(at::kFloat);
        pointers.kept = kept.const_data_ptr<bool>();
        pointers.scalar = scalar.const_data_ptr<float>();
        pointers.normalizer = normalizer.const_data_ptr<float>();
    }

    at::Tensor scalar;
    Upstream pointers{};
};

at::Tensor trimmed_cross_entropy_backward(const at::Tensor& grad, const at::Tensor& logits,
                                          const at::Tensor& target, const at::Tensor& lse,
                                          const at::Tensor& kept, const at::Tensor& normalizer,
                                          const std::optional<at::Tensor>& class_weight,
                                          double label_smoothing) {
    const CrossEntropyArguments p(logits, target, class_weight);
    const KeptUpstream upstream(p, grad, lse, kept, normalizer);
    return gradient(p, logits, lse, label_smoothing, upstream.pointers);
}

void trimmed_cross_entropy_backward_(const at::Tensor& grad, at::Tensor& logits, const at::Tensor& target,
                                     const at::Tensor& lse, const at::Tensor& kept,
                                     const at::Tensor& normalizer,
                                     const std::optional<at::Tensor>& class_weight, double label_smoothing) {
    const CrossEntropyArguments p(logits, target, class_weight);
    const KeptUpstream upstream(p, grad, lse, kept, normalizer);
    write_gradient(p, lse, label_smoothing, upstream.pointers, p.logits);
    if (!p.logits.is_same(logits)) logits.copy_(p.logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CUDA, m) {
    m.impl("cross_entropy", &cross_entropy);
    m.impl("cross_entropy_backward", &cross_entropy_backward);
    m.impl("cross_entropy_backward_", &cross_entropy_backward_);
    m.impl("cross_entropy_losses", &cross_entropy_losses);
    m.impl("trimmed_cross_entropy", &trimmed_cross_entropy);
    m.impl("trimmed_cross_entropy_backward", &trimmed_cross_entropy_backward);
    m.impl("trimmed_cross_entropy_backward_", &trimmed_cross_entropy_backward_);
}

}  // namespace batchkern
