// trimmed_cross_entropy on a CPU: losses and log-sum-exps of all rows, a selection, gradients of the kept
// rows.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdlib>

#include "select.h"
#include "tensors.h"

namespace batchkern {
namespace {

struct Problem : CrossEntropyArguments {
    Problem(const at::Tensor& logits_, const at::Tensor& target_,
            const std::optional<at::Tensor>& class_weight, int64_t ignore_index, double smoothing,
            int64_t first_class_ = 0, std::optional<int64_t> classes_ = std::nullopt)
        : CrossEntropyArguments(logits_, target_, class_weight, first_class_, classes_),
          options{classes, weights(), static_cast<double>(classes), smoothing, ignore_index} {
        if (!options.class_weight) return;
        options.weight_sum = 0;
        for (int64_t c = 0; c < classes; ++c) options.weight_sum += options.class_weight[c];
    }

    CrossEntropyOptions options;
};

// Raises where a row that is looked at has no such class; kept is null, or says which rows are.
void check_target(const Problem& p, const bool* kept) {
    const int64_t* target = p.target.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < p.rows; ++i) {
        if (kept ? !kept[i] : target[i] == p.options.ignore_index) continue;
        TORCH_CHECK_VALUE(target[i] >= 0 && target[i] < p.classes, "target[", i, "] is ", target[i],
                          "; it must be in [0, ", p.classes, ") or ignore_index (", p.options.ignore_index,
                          ")");
    }
}

// losses (rows,) and lse (rows, 2) float32, contiguous.
void write_losses(const Problem& p, const at::Tensor& losses, const at::Tensor& lse) {
    check_target(p, nullptr);
    const int64_t* const target = p.target.const_data_ptr<int64_t>();
    float* const loss = losses.mutable_data_ptr<float>();
    float* const log_sums = lse.mutable_data_ptr<float>();
    at::parallel_for(0, p.rows, grain(p.classes), [&](int64_t begin, int64_t end) {
        kernels().loss_rows[p.type]({row_pointer(p.logits, begin), p.logits.stride(0), target + begin,
                                     loss + begin, log_sums + 2 * begin, end - begin},
                                    p.options);
    });
}

void cross_entropy_losses(const at::Tensor& logits, const at::Tensor& target, at::Tensor& losses,
                          at::Tensor& lse, int64_t ignore_index, double label_smoothing) {
    const Problem p(logits, target, std::nullopt, ignore_index, label_smoothing);
    p.check_losses(losses, lse);
    write_losses(p, losses, lse);
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward trimmed_cross_entropy(const at::Tensor& logits, const at::Tensor& target_, double keep,
                              const std::optional<at::Tensor>& keep_tensor,
                              const std::optional<at::Tensor>& class_weight, int64_t ignore_index,
                              double label_smoothing) {
    const double fraction = keep_value(keep, keep_tensor, logits);
    const Problem p(logits, target_, class_weight, ignore_index, label_smoothing);
    const auto floats = logits.options().dtype(at::kFloat);
    at::Tensor losses = at::empty({p.rows}, floats), lse = at::empty({p.rows, 2}, floats);
    at::Tensor kept = at::empty({p.rows}, floats.dtype(at::kBool));
    write_losses(p, losses, lse);

    const int64_t* const target = p.target.const_data_ptr<int64_t>();
    bool* const is_kept = kept.mutable_data_ptr<bool>();
    const auto keys = order_keys(losses, kFloat32);
    for (int64_t i = 0; i < p.rows; ++i) is_kept[i] = target[i] != ignore_index;
    const int64_t k = select_rows(keys.get(), is_kept, p.rows, {fraction}, is_kept);
    const double sum = kernels().sum_kept[kFloat32](losses.const_data_ptr<float>(), is_kept, nullptr, p.rows);
    double normalizer = static_cast<double>(k);
    if (p.options.class_weight) {
        normalizer = 0;
        for (int64_t i = 0; i < p.rows; ++i)
            if (is_kept[i]) normalizer += p.options.class_weight[target[i]];
    }
    return {scalar(sum / normalizer), losses, lse, kept, scalar(normalizer)};
}

void write_gradient(const Problem& p, const at::Tensor& upstream, const at::Tensor& lse,
                    const at::Tensor& kept, const at::Tensor& normalizer, const at::Tensor& grad,
                    bool grad_is_zero) {
    p.check_saved(upstream, lse, kept, normalizer);
    if (grad.numel() == 0) return;
    const float scale = static_cast<float>(upstream.item<double>() / normalizer.item<double>());
    const bool* const is_kept = kept.const_data_ptr<bool>();
    check_target(p, is_kept);
    const float* const log_sums = lse.const_data_ptr<float>();
    const int64_t* const target = p.target.const_data_ptr<int64_t>();
    at::parallel_for(0, p.rows, grain(p.columns), [&](int64_t begin, int64_t end) {
        kernels().grad_rows[p.type](
            {row_pointer(p.logits, begin), p.logits.stride(0), target + begin, log_sums + 2 * begin,
             is_kept + begin, mutable_row_pointer(grad, begin), grad.stride(0), grad_is_zero, scale,
             p.first_class, p.columns, end - begin},
            p.options);
    });
}

// Above this size malloc maps fresh pages, which hold zeros: calloc knows, so rows that were dropped need not
// be touched, neither here nor by a page fault. Smaller blocks are used again, and calloc would clear them by
// itself.
constexpr int64_t kAlwaysMapped = int64_t{32} << 20;

constexpr uintptr_t kAlignment = 64;

void* aligned(void* base) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(base) / kAlignment + 1) * kAlignment);
}

void release(void* base) {
    c10::profiledCPUMemoryReporter().Delete(aligned(base));
    std::free(base);
}

at::Tensor fresh_zeros(const at::Tensor& like) {
    const size_t bytes = like.numel() * like.element_size();
    void* const base = std::calloc(bytes + kAlignment, 1);
    TORCH_CHECK_WITH(OutOfMemoryError, base, "could not allocate ", bytes,
                     " bytes for the gradient of logits");
    c10::profiledCPUMemoryReporter().New(aligned(base), bytes);
    const c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                               at::DataPtr(aligned(base), base, &release, at::kCPU), c10::GetCPUAllocator(),
                               /*resizable=*/true);
    return at::empty({0}, like.options()).set_(storage, 0, like.sizes());
}

at::Tensor trimmed_cross_entropy_backward(const at::Tensor& grad, const at::Tensor& logits,
                                          const at::Tensor& target, const at::Tensor& lse,
                                          const at::Tensor& kept, const at::Tensor& normalizer,
                                          const std::optional<at::Tensor>& class_weight,
                                          double label_smoothing) {
    const Problem p(logits, target, class_weight, -1, label_smoothing);
    const bool fresh = logits.numel() * logits.element_size() > kAlwaysMapped;
    const at::Tensor result = fresh ? fresh_zeros(logits) : at::empty(logits.sizes(), logits.options());
    write_gradient(p, grad, lse, kept, normalizer, result, fresh);
    return result;
}

void trimmed_cross_entropy_backward_(const at::Tensor& grad, at::Tensor& logits, const at::Tensor& target,
                                     const at::Tensor& lse, const at::Tensor& kept,
                                     const at::Tensor& normalizer,
                                     const std::optional<at::Tensor>& class_weight, double label_smoothing,
                                     int64_t first_class, std::optional<int64_t> classes) {
    const Problem p(logits, target, class_weight, -1, label_smoothing, first_class, classes);
    write_gradient(p, grad, lse, kept, normalizer, p.logits, false);
    if (!p.logits.is_same(logits)) logits.copy_(p.logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CPU, m) {
    m.impl("cross_entropy_losses", &cross_entropy_losses);
    m.impl("trimmed_cross_entropy", &trimmed_cross_entropy);
    m.impl("trimmed_cross_entropy_backward", &trimmed_cross_entropy_backward);
    m.impl("trimmed_cross_entropy_backward_", &trimmed_cross_entropy_backward_);
}

}  // namespace batchkern
