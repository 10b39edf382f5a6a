// The checks that the bindings make on every device before a kernel receives raw pointers. They reject
// arguments that would make a kernel crash or access memory out of bounds. The Python functions check more
// before, with messages in the user's terms.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "class_rows.h"
#include "element_type.h"

namespace batchkern {

// A row index must fit into the low half of a 64-bit sort key.
constexpr int64_t kMaxRows = int64_t{1} << 32;

// Whether the storage is large enough for all elements of the tensor. FSDP, for example, frees the memory of
// a parameter by resizing its storage to zero. Tensors without values of their own, such as tensor subclasses
// and those of transforms, are not checked.
inline bool in_memory(const at::Tensor& x) {
    if (x.key_set().has(c10::DispatchKey::Python) || x.is_nested() || !x.has_storage() || x.is_meta())
        return true;
    const size_t needed = at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.element_size(),
                                                           static_cast<size_t>(x.storage_offset()));
    return x.storage().nbytes() >= needed;
}

inline void check_memory(const at::Tensor& x, const char* name) {
    TORCH_CHECK_VALUE(in_memory(x), name, " must have its values in memory, got ", x.sizes(),
                      " with a storage of ", x.storage().nbytes(), " bytes");
}

inline ElementType element_type(const at::Tensor& x, const char* name) {
    check_memory(x, name);
    switch (x.scalar_type()) {
        case at::kFloat:
            return kFloat32;
        case at::kBFloat16:
            return kBFloat16;
        case at::kHalf:
            return kFloat16;
        default:
            TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ", x.scalar_type());
    }
}

// x itself if the elements of each row are contiguous, whatever its row stride; otherwise a contiguous copy.
inline at::Tensor dense_rows(const at::Tensor& x) {
    return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

inline void check_device(const at::Tensor& x, const char* name, const at::Tensor& like) {
    TORCH_CHECK_VALUE(x.device() == like.device(), name, " must be on ", like.device(), ", got ", x.device());
}

// One number on the device, such as an upstream gradient.
inline void check_scalar(const at::Tensor& x, const char* name, const at::Tensor& like) {
    TORCH_CHECK(x.numel() == 1, name, " must hold one number, got ", x.numel(), " elements");
    check_device(x, name, like);
}

inline void check_keep(double keep, const std::optional<at::Tensor>& tensor, const at::Tensor& like) {
    if (!tensor) {
        TORCH_CHECK_VALUE(keep > 0 && keep <= 1, "keep must be in (0, 1], got ", keep);
        return;
    }
    TORCH_CHECK_VALUE(tensor->dim() == 0 && tensor->scalar_type() == at::kDouble,
                      "keep_tensor must be 0-dim float64");
    check_device(*tensor, "keep_tensor", like);
    check_memory(*tensor, "keep_tensor");
}

// A vector of losses, (B,) or (N,).
inline ElementType check_losses(const at::Tensor& losses, const char* shape) {
    const ElementType type = element_type(losses, "losses");
    TORCH_CHECK_VALUE(losses.dim() == 1 && losses.size(0) < kMaxRows, "losses must be ", shape, ", got ",
                      losses.sizes());
    return type;
}

inline void check_mask(const std::optional<at::Tensor>& mask, const at::Tensor& losses) {
    if (!mask) return;
    TORCH_CHECK_VALUE(mask->sizes() == losses.sizes() && mask->scalar_type() == at::kBool,
                      "mask must be bool (", losses.size(0), ",)");
    check_device(*mask, "mask", losses);
    check_memory(*mask, "mask");
}

// A score that is ranked in place of the losses, or a weight that multiplies them.
inline void check_companion(const std::optional<at::Tensor>& x, const char* name, const at::Tensor& losses) {
    if (!x) return;
    TORCH_CHECK_VALUE(x->sizes() == losses.sizes() && x->scalar_type() == at::kFloat, name,
                      " must be float32 (", losses.size(0), ",)");
    check_device(*x, name, losses);
    check_memory(*x, name);
}

inline void check_band(double skip, bool lowest, const std::optional<double>& above, int64_t samples,
                       const at::Tensor& losses) {
    TORCH_CHECK_VALUE(!(lowest && above), "above is for the highest losses");
    TORCH_CHECK_VALUE(skip >= 0 && skip < 1, "skip must be in [0, 1), got ", skip);
    TORCH_CHECK_VALUE(samples > 0 && losses.size(0) % samples == 0, "samples must divide ", losses.size(0),
                      " losses, got ", samples);
}

inline void check_kept(const at::Tensor& kept) {
    TORCH_CHECK_VALUE(kept.dim() == 1 && kept.scalar_type() == at::kBool && kept.is_contiguous(),
                      "kept must be contiguous bool (B,)");
}

inline void check_count(int64_t k, int64_t n) {
    TORCH_CHECK_VALUE(k >= 0 && k <= n, "k must be in [0, ", n, "], got ", k);
}

// The type of class indices. uint64 is read as int64: values of 2^63 or more become negative numbers, which
// are no classes either.
inline IndexType index_type(const at::Tensor& target) {
    check_memory(target, "target");
    switch (target.scalar_type()) {
        case at::kLong:
        case at::kUInt64:
            return kInt64;
        case at::kInt:
            return kInt32;
        case at::kShort:
            return kInt16;
        case at::kChar:
            return kInt8;
        case at::kByte:
            return kUInt8;
        case at::kUInt16:
            return kUInt16;
        case at::kUInt32:
            return kUInt32;
        default:
            TORCH_CHECK_TYPE(false, "target must hold integers or probabilities, got ", target.scalar_type());
    }
}

// The shape of logits (C,), (samples, C) or (samples, C, d1, ...). Each sample has `inner` rows, the product
// of d1, d2, ...
struct ClassGrid {
    explicit ClassGrid(const at::Tensor& x) : samples(x.dim() > 1 ? x.size(0) : 1) {
        for (int64_t d = 2; d < x.dim(); ++d) inner *= x.size(d);
    }

    int64_t rows() const { return samples * inner; }

    // The layout of the rows of x; none if the strides of d1, d2, ... do not merge into one dimension.
    std::optional<RowLayout> layout(const at::Tensor& x) const {
        if (rows() == 0) return RowLayout{1, 0, 0, 1};
        const int64_t sample = x.dim() > 1 ? x.stride(0) : 0, step = x.stride(x.dim() > 1 ? 1 : 0);
        int64_t row = 0, extent = 1;
        for (int64_t d = x.dim() - 1; d >= 2; --d) {
            if (x.size(d) == 1) continue;
            if (extent > 1 && x.stride(d) != extent * row) return std::nullopt;
            if (extent == 1) row = x.stride(d);
            extent *= x.size(d);
        }
        if (inner == 1) return RowLayout{rows(), 0, sample, step};
        if (samples == 1 || sample == inner * row) return RowLayout{rows(), 0, row, step};
        return RowLayout{inner, sample, row, step};
    }

    int64_t samples, inner = 1;
};

// The checked arguments that the forward and the backward pass of a cross entropy share. They keep alive the
// tensors whose data pointers the kernels receive. The columns of the logits may be only a part of the
// classes, beginning with first_class. A target of probabilities has the logits' shape.
struct CrossEntropyArguments {
    CrossEntropyArguments(const at::Tensor& logits_, const at::Tensor& target_,
                          const std::optional<at::Tensor>& class_weight, int64_t first_class_ = 0,
                          std::optional<int64_t> classes_ = std::nullopt)
        : type(element_type(logits_, "logits")), grid(logits_) {
        TORCH_CHECK_VALUE(logits_.dim() > 0, "logits must be (C,) or (B, C, ...), got ", logits_.sizes());
        TORCH_CHECK_VALUE(grid.rows() < kMaxRows, "logits must have fewer than 2^32 rows, got ",
                          logits_.sizes());
        rows = grid.rows();
        columns = logits_.size(logits_.dim() > 1 ? 1 : 0);
        first_class = first_class_;
        classes = classes_.value_or(columns);
        TORCH_CHECK_VALUE(first_class >= 0 && first_class <= classes - columns, "logits have ", columns,
                          " columns, which are not classes from ", first_class, " on of ", classes);
        soft = target_.is_floating_point();
        shape = logits_.sizes().vec();
        shape.erase(shape.begin() + (logits_.dim() > 1 ? 1 : 0));
        TORCH_CHECK_VALUE(target_.sizes() == (soft ? logits_.sizes() : at::IntArrayRef(shape)),
                          "target must be integers ", at::IntArrayRef(shape), " or probabilities ",
                          logits_.sizes(), ", got ", target_.scalar_type(), " ", target_.sizes());
        check_device(target_, "target", logits_);
        logits = logits_;
        if (!grid.layout(logits)) logits = logits.contiguous();
        if (soft) {
            TORCH_CHECK_VALUE(columns == classes, "a target of probabilities needs logits of all classes");
            probabilities_type = element_type(target_, "target");
            TORCH_CHECK_TYPE(probabilities_type == kFloat32 || probabilities_type == type,
                             "a target of probabilities must be float32 or of the logits' type, got ",
                             target_.scalar_type());
            target = target_;
            const int64_t class_dim = target.dim() > 1 ? 1 : 0;
            const auto layout = grid.layout(target);
            if (is_rows() && !(layout && are_side_by_side(*layout, columns)))
                target = target.movedim(class_dim, -1).contiguous().movedim(-1, class_dim);
            else if (!layout)
                target = target.contiguous();
        } else {
            indices.type = index_type(target_);
            target = target_.contiguous();
            indices.data = target.const_data_ptr();
        }
        if (!class_weight) return;
        TORCH_CHECK_VALUE(columns == classes, "class_weight needs logits of all classes");
        TORCH_CHECK_VALUE(class_weight->dim() == 1 && class_weight->size(0) == classes,
                          "class_weight must be (", classes, ",), got ", class_weight->sizes());
        check_device(*class_weight, "class_weight", logits_);
        weight = class_weight->to(at::kFloat).contiguous();
    }

    const float* weights() const { return weight.defined() ? weight.const_data_ptr<float>() : nullptr; }

    RowLayout layout() const { return *grid.layout(logits); }
    bool is_rows() const { return are_side_by_side(layout(), columns); }

    Probabilities probabilities() const {
        if (!soft) return {};
        return {target.const_data_ptr(), *grid.layout(target), probabilities_type == kFloat32};
    }

    // The forward pass saves for each row its maximum m, the log of its sum of exp(z - m) and, for a target
    // of probabilities, the sum of its smoothed and weighted probabilities.
    int64_t state_size() const { return soft ? 3 : 2; }
    std::vector<int64_t> state_shape() const {
        std::vector<int64_t> result = shape;
        result.push_back(state_size());
        return result;
    }

    void check_lse(const at::Tensor& lse) const {
        TORCH_CHECK_VALUE(lse.dim() > 0 && lse.numel() == rows * state_size() &&
                              lse.size(-1) == state_size() && lse.is_contiguous() &&
                              lse.scalar_type() == at::kFloat,
                          "lse must be contiguous float32 (", rows, ", ", state_size(), ")");
        check_device(lse, "lse", logits);
    }

    // Checks the tensors that a forward pass writes to.
    void check_losses(const at::Tensor& losses, const at::Tensor& lse,
                      const std::optional<at::Tensor>& entropy,
                      const std::optional<at::Tensor>& correct) const {
        check_output(losses, "losses", at::kFloat);
        check_lse(lse);
        TORCH_CHECK_VALUE(entropy.has_value() == correct.has_value(), "entropy and correct go together");
        if (!entropy) return;
        check_output(*entropy, "entropy", at::kFloat);
        check_output(*correct, "correct", at::kBool);
    }

    void check_output(const at::Tensor& x, const char* name, at::ScalarType dtype) const {
        TORCH_CHECK_VALUE(x.numel() == rows && x.is_contiguous() && x.scalar_type() == dtype, name,
                          " must be contiguous ", dtype, " (", rows, ",)");
        check_device(x, name, logits);
    }

    // Checks the arguments that only the backward pass has.
    void check_saved(const at::Tensor& upstream, const at::Tensor& lse, const at::Tensor& kept,
                     const at::Tensor& normalizer) const {
        check_scalar(upstream, "grad", logits);
        check_scalar(normalizer, "normalizer", logits);
        check_lse(lse);
        TORCH_CHECK_VALUE(kept.numel() == rows && kept.is_contiguous() && kept.scalar_type() == at::kBool,
                          "kept must be contiguous bool (", rows, ",)");
        check_device(kept, "kept", logits);
    }

    // The upstream gradient of each row: (rows,), or (1,) if one number was expanded to all rows.
    at::Tensor check_upstream(const std::optional<at::Tensor>& upstream, const char* name) const {
        if (!upstream) return {};
        TORCH_CHECK_VALUE(upstream->numel() == rows, name, " must have ", rows, " elements, got ",
                          upstream->sizes());
        check_device(*upstream, name, logits);
        at::Tensor values = *upstream;
        const bool expanded = std::all_of(values.strides().begin(), values.strides().end(),
                                          [](int64_t stride) { return stride == 0; });
        if (expanded && rows > 0) values = values.as_strided({1}, {1});
        return values.to(at::kFloat).contiguous();
    }

    ElementType type;
    ClassGrid grid;
    int64_t rows, columns, first_class, classes;
    std::vector<int64_t> shape;  // of the losses
    at::Tensor logits;           // a copy if no RowLayout describes the strides of the argument
    bool soft;
    at::Tensor target;
    ClassIndices indices{};
    ElementType probabilities_type{};
    at::Tensor weight;  // undefined if all weights are 1
};

// The upstream gradients of the losses and the log-sum-exps of the rows. They keep alive the tensors whose
// data pointers the kernels receive.
template <class Upstream>
struct RowsUpstream {
    RowsUpstream(const CrossEntropyArguments& p, const std::optional<at::Tensor>& grad_losses,
                 const std::optional<at::Tensor>& grad_lse, const at::Tensor& lse)
        : of_losses(p.check_upstream(grad_losses, "grad_losses")),
          of_lse(p.check_upstream(grad_lse, "grad_lse")) {
        p.check_lse(lse);
        if (of_losses.defined()) {
            pointers.loss = of_losses.template const_data_ptr<float>();
            pointers.loss_stride = of_losses.numel() == p.rows;
        }
        if (of_lse.defined()) {
            pointers.lse = of_lse.template const_data_ptr<float>();
            pointers.lse_stride = of_lse.numel() == p.rows;
        }
    }

    at::Tensor of_losses, of_lse;
    Upstream pointers{};
};

}  // namespace batchkern
