// cross_entropy and trimmed_cross_entropy on a CPU. The forward pass computes the losses and log-sum-exps of
// all rows and, for the latter, selects rows. The backward pass reads only the rows that have an upstream
// gradient.
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "memory.h"
#include "select.h"
#include "tensors.h"

namespace batchkern {
namespace {

struct Problem : CrossEntropyArguments {
    Problem(const at::Tensor& logits_, const at::Tensor& target_,
            const std::optional<at::Tensor>& class_weight, int64_t ignore_index, double smoothing,
            int64_t first_class_ = 0, std::optional<int64_t> classes_ = std::nullopt)
        : CrossEntropyArguments(logits_, target_, class_weight, first_class_, classes_),
          options{classes,
                  weights(),
                  static_cast<double>(classes),
                  smoothing,
                  smoothing / static_cast<double>(classes),
                  ignore_index} {
        if (!options.class_weight || smoothing == 0) return;  // 0 times an infinite sum would be NaN
        options.weight_sum = 0;
        for (int64_t c = 0; c < classes; ++c) options.weight_sum += options.class_weight[c];
    }

    CrossEntropyOptions options;
};

// "1, 2" for the row at [1, 2] of a target.
std::string place_of(int64_t row, const std::vector<int64_t>& shape) {
    std::string text;
    for (auto size = shape.rbegin(); size != shape.rend(); row /= *size++)
        text = std::to_string(row % *size) + (text.empty() ? "" : ", ") + text;
    return text;
}

// Raises an error if the target of a row is not a class. Only the rows that `kept` marks are checked; if it
// is null, all rows that are not ignored.
void check_target(const Problem& p, const bool* kept) {
    if (p.soft) return;
    const auto first_wrong = [&](int64_t begin, int64_t end, int64_t found) {
        with_indices(p.indices, [&](auto* target) {
            const auto is_wrong = [&](int64_t i) {
                const auto c = static_cast<int64_t>(target[i]);
                const bool counts = kept ? kept[i] : c != p.options.ignore_index;
                return counts & ((c < 0) | (c >= p.classes));
            };
            bool any = false;  // no branch in this loop: an error is located only if there is one
            for (int64_t i = begin; i < end; ++i) any |= is_wrong(i);
            if (!any) return;
            int64_t i = begin;
            while (!is_wrong(i)) ++i;
            found = std::min(found, i);
        });
        return found;
    };
    const int64_t wrong = at::parallel_reduce(0, p.rows, kGrain, p.rows, first_wrong,
                                              [](int64_t a, int64_t b) { return std::min(a, b); });
    TORCH_CHECK_VALUE(wrong == p.rows, "target[", place_of(wrong, p.shape), "] is ",
                      class_of(p.indices, wrong), "; it must be in [0, ", p.classes, ") or ignore_index (",
                      p.options.ignore_index, ")");
}

// Sets valid[i] to whether row i is not ignored. Returns whether all rows are valid.
bool mark_valid(const Problem& p, bool* valid) {
    if (p.soft) {
        std::fill(valid, valid + p.rows, true);
        return true;
    }
    const auto mark = [&](int64_t begin, int64_t end, bool all) {
        with_indices(p.indices, [&](auto* target) {
            for (int64_t i = begin; i < end; ++i) {
                valid[i] = static_cast<int64_t>(target[i]) != p.options.ignore_index;
                all &= valid[i];
            }
        });
        return all;
    };
    return at::parallel_reduce(0, p.rows, kGrain, true, mark, std::logical_and<>());
}

// Calls use(begin, end) for ranges of rows, in parallel. Unless by_rows is true, a range consists of whole
// tiles.
template <class Use>
void each_part(const Problem& p, bool by_rows, Use use) {
    const int64_t unit = by_rows ? 1 : kTile, units = (p.rows + unit - 1) / unit;
    at::parallel_for(0, units, grain(p.columns * unit),
                     [&](int64_t begin, int64_t end) { use(begin * unit, std::min(end * unit, p.rows)); });
}

// losses (rows,) and lse (rows, 2 or 3) float32, contiguous; entropy and correct (rows,), or undefined.
void write_losses(const Problem& p, const at::Tensor& losses, const at::Tensor& lse,
                  const at::Tensor& entropy = {}, const at::Tensor& correct = {}) {
    check_target(p, nullptr);
    const bool by_rows = p.is_rows();
    LossRows rows{p.logits.const_data_ptr(),
                  p.layout(),
                  p.indices,
                  p.probabilities(),
                  losses.mutable_data_ptr<float>(),
                  lse.mutable_data_ptr<float>(),
                  entropy.defined() ? entropy.mutable_data_ptr<float>() : nullptr,
                  correct.defined() ? correct.mutable_data_ptr<bool>() : nullptr,
                  0,
                  0};
    const auto kernel = by_rows ? kernels().loss_rows[p.type] : kernels().loss_columns[p.type];
    each_part(p, by_rows, [&](int64_t begin, int64_t end) {
        LossRows part = rows;
        part.begin = begin;
        part.end = end;
        kernel(part, p.options);
    });
}

void cross_entropy_losses(const at::Tensor& logits, const at::Tensor& target, at::Tensor& losses,
                          at::Tensor& lse, std::optional<at::Tensor> entropy,
                          std::optional<at::Tensor> correct, int64_t ignore_index, double label_smoothing) {
    const Problem p(logits, target, std::nullopt, ignore_index, label_smoothing);
    p.check_losses(losses, lse, entropy, correct);
    write_losses(p, losses, lse, entropy.value_or(at::Tensor()), correct.value_or(at::Tensor()));
}

using Rows = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Rows cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                   const std::optional<at::Tensor>& class_weight, int64_t ignore_index,
                   double label_smoothing, bool stats) {
    const Problem p(logits, target, class_weight, ignore_index, label_smoothing);
    const auto floats = logits.options().dtype(at::kFloat), bools = logits.options().dtype(at::kBool);
    at::Tensor losses = at::empty(p.shape, floats), lse = at::empty(p.state_shape(), floats);
    at::Tensor entropy = stats ? at::empty(p.shape, floats) : at::empty({0}, floats);
    at::Tensor correct = stats ? at::empty(p.shape, bools) : at::empty({0}, bools);
    write_losses(p, losses, lse, stats ? entropy : at::Tensor(), stats ? correct : at::Tensor());
    return {losses, lse, entropy, correct};
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward trimmed_cross_entropy(const at::Tensor& logits, const at::Tensor& target, double keep,
                              const std::optional<at::Tensor>& keep_tensor,
                              const std::optional<at::Tensor>& class_weight, int64_t ignore_index,
                              double label_smoothing) {
    const double fraction = keep_value(keep, keep_tensor, logits);
    const Problem p(logits, target, class_weight, ignore_index, label_smoothing);
    const auto floats = logits.options().dtype(at::kFloat);
    at::Tensor losses = at::empty(p.shape, floats), lse = at::empty(p.state_shape(), floats);
    at::Tensor kept = at::empty(p.shape, floats.dtype(at::kBool));
    write_losses(p, losses, lse);

    bool* const is_kept = kept.mutable_data_ptr<bool>();
    const bool all = mark_valid(p, is_kept);
    int64_t k;
    if (fraction == 1) {
        k = all ? p.rows : std::count(is_kept, is_kept + p.rows, true);
    } else {
        const auto keys = order_keys(losses, kFloat32);
        k = select_rows(keys.get(), all ? nullptr : is_kept, p.rows, {fraction}, is_kept);
    }
    const double sum = kernels().sum_kept[kFloat32](losses.const_data_ptr(), is_kept, nullptr, p.rows);
    double normalizer = static_cast<double>(k);
    if (p.options.class_weight && !p.soft) {
        normalizer = 0;
        for (int64_t i = 0; i < p.rows; ++i)
            if (is_kept[i]) normalizer += p.options.class_weight[class_of(p.indices, i)];
    }
    return {scalar(sum / normalizer), losses, lse, kept, scalar(normalizer)};
}

// `grad` has the logits' shape, and may be p.logits.
void write_gradient(const Problem& p, const at::Tensor& lse, const Upstream& upstream, const at::Tensor& grad,
                    bool grad_is_zero) {
    check_target(p, upstream.kept);
    const RowLayout grad_at = *p.grid.layout(grad);
    const bool by_rows = p.is_rows() && are_side_by_side(grad_at, p.columns);
    const GradRows rows{p.logits.const_data_ptr(),
                        p.layout(),
                        p.indices,
                        p.probabilities(),
                        lse.const_data_ptr<float>(),
                        upstream,
                        grad.mutable_data_ptr(),
                        grad_at,
                        grad_is_zero,
                        p.first_class,
                        p.columns,
                        0,
                        0};
    const auto kernel = by_rows ? kernels().grad_rows[p.type] : kernels().grad_columns[p.type];
    each_part(p, by_rows, [&](int64_t begin, int64_t end) {
        GradRows part = rows;
        part.begin = begin;
        part.end = end;
        kernel(part, p.options);
    });
}

Upstream of_kept(const Problem& p, const at::Tensor& grad, const at::Tensor& lse, const at::Tensor& kept,
                 const at::Tensor& normalizer) {
    p.check_saved(grad, lse, kept, normalizer);
    const float scale = static_cast<float>(grad.item<double>() / normalizer.item<double>());
    return {kept.const_data_ptr<bool>(), scale, nullptr, 0, nullptr, 0};
}

// If fewer than one of kFew rows has a gradient, leaving the pages of the other rows untouched takes less
// time than writing zeros to them.
constexpr int64_t kFew = 12;

bool are_few(const Upstream& u, int64_t rows) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows && kFew * count < rows; ++i) {
        const bool by_loss = u.loss && u.loss[i * u.loss_stride] != 0;
        count += u.kept ? u.kept[i] : by_loss || (u.lse && u.lse[i * u.lse_stride] != 0);
    }
    return kFew * count < rows;
}

at::Tensor gradient(const Problem& p, const at::Tensor& logits, const at::Tensor& lse,
                    const Upstream& upstream) {
    const size_t bytes = logits.numel() * logits.element_size();
    const bool untouched = bytes > kAlwaysMapped && p.is_rows() && are_few(upstream, p.rows);
    at::Tensor result = untouched ? untouched_zeros_like(logits) : large_empty_like(logits);
    if (p.grid.layout(result)) {
        write_gradient(p, lse, upstream, result, untouched);
    } else {
        const at::Tensor other = at::empty(logits.sizes(), logits.options());
        write_gradient(p, lse, upstream, other, false);
        result.copy_(other);
    }
    return result;
}

at::Tensor cross_entropy_backward(const std::optional<at::Tensor>& grad_losses,
                                  const std::optional<at::Tensor>& grad_lse, const at::Tensor& logits,
                                  const at::Tensor& target, const at::Tensor& lse,
                                  const std::optional<at::Tensor>& class_weight, int64_t ignore_index,
                                  double label_smoothing) {
    const Problem p(logits, target, class_weight, ignore_index, label_smoothing);
    const RowsUpstream<Upstream> upstream(p, grad_losses, grad_lse, lse);
    return gradient(p, logits, lse, upstream.pointers);
}

void cross_entropy_backward_(const std::optional<at::Tensor>& grad_losses,
                             const std::optional<at::Tensor>& grad_lse, at::Tensor& logits,
                             const at::Tensor& target, const at::Tensor& lse, int64_t ignore_index,
                             double label_smoothing, int64_t first_class, std::optional<int64_t> classes) {
    const Problem p(logits, target, std::nullopt, ignore_index, label_smoothing, first_class, classes);
    const RowsUpstream<Upstream> upstream(p, grad_losses, grad_lse, lse);
    write_gradient(p, lse, upstream.pointers, p.logits, false);
    if (!p.logits.is_same(logits)) logits.copy_(p.logits);
}

at::Tensor trimmed_cross_entropy_backward(const at::Tensor& grad, const at::Tensor& logits,
                                          const at::Tensor& target, const at::Tensor& lse,
                                          const at::Tensor& kept, const at::Tensor& normalizer,
                                          const std::optional<at::Tensor>& class_weight,
                                          double label_smoothing) {
    const Problem p(logits, target, class_weight, -1, label_smoothing);
    return gradient(p, logits, lse, of_kept(p, grad, lse, kept, normalizer));
}

void trimmed_cross_entropy_backward_(const at::Tensor& grad, at::Tensor& logits, const at::Tensor& target,
                                     const at::Tensor& lse, const at::Tensor& kept,
                                     const at::Tensor& normalizer,
                                     const std::optional<at::Tensor>& class_weight, double label_smoothing) {
    const Problem p(logits, target, class_weight, -1, label_smoothing);
    write_gradient(p, lse, of_kept(p, grad, lse, kept, normalizer), p.logits, false);
    if (!p.logits.is_same(logits)) logits.copy_(p.logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CPU, m) {
    m.impl("cross_entropy", &cross_entropy);
    m.impl("cross_entropy_backward", &cross_entropy_backward);
    m.impl("cross_entropy_backward_", &cross_entropy_backward_);
    m.impl("cross_entropy_losses", &cross_entropy_losses);
    m.impl("trimmed_cross_entropy", &trimmed_cross_entropy);
    m.impl("trimmed_cross_entropy_backward", &trimmed_cross_entropy_backward);
    m.impl("trimmed_cross_entropy_backward_", &trimmed_cross_entropy_backward_);
}

}  // namespace batchkern
