// What the bindings check before a kernel gets raw pointers, on every device: what would crash or read
// elsewhere. The Python functions have said more, in the user's terms.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "element_type.h"

namespace batchkern {

// An index must fit the low half of a 64-bit key.
constexpr int64_t kMaxRows = int64_t{1} << 32;

inline ElementType element_type(const at::Tensor& x, const char* name) {
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

// Rows whose elements lie side by side: x itself where they do, whatever its row stride.
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
}

// What is ranked in place of the losses, or what they are times.
inline void check_companion(const std::optional<at::Tensor>& x, const char* name, const at::Tensor& losses) {
    if (!x) return;
    TORCH_CHECK_VALUE(x->sizes() == losses.sizes() && x->scalar_type() == at::kFloat, name,
                      " must be float32 (", losses.size(0), ",)");
    check_device(*x, name, losses);
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

// What both passes of a cross entropy need. Holds the tensors that pointers are taken of. The columns of the
// logits may be a part of the classes, from first_class on.
struct CrossEntropyArguments {
    CrossEntropyArguments(const at::Tensor& logits_, const at::Tensor& target_,
                          const std::optional<at::Tensor>& class_weight, int64_t first_class_ = 0,
                          std::optional<int64_t> classes_ = std::nullopt)
        : type(element_type(logits_, "logits")) {
        TORCH_CHECK_VALUE(logits_.dim() == 2 && logits_.size(0) < kMaxRows, "logits must be (B, C), got ",
                          logits_.sizes());
        rows = logits_.size(0);
        columns = logits_.size(1);
        first_class = first_class_;
        classes = classes_.value_or(columns);
        TORCH_CHECK_VALUE(first_class >= 0 && first_class <= classes - columns, "logits have ", columns,
                          " columns, which are not classes from ", first_class, " on of ", classes);
        TORCH_CHECK_VALUE(target_.dim() == 1 && target_.size(0) == rows && target_.scalar_type() == at::kLong,
                          "target must be int64 (", rows, ",), got ", target_.scalar_type(), " ",
                          target_.sizes());
        check_device(target_, "target", logits_);
        logits = dense_rows(logits_);
        target = target_.contiguous();
        if (!class_weight) return;
        TORCH_CHECK_VALUE(columns == classes, "class_weight needs logits of all classes");
        TORCH_CHECK_VALUE(class_weight->dim() == 1 && class_weight->size(0) == classes,
                          "class_weight must be (", classes, ",), got ", class_weight->sizes());
        check_device(*class_weight, "class_weight", logits_);
        weight = class_weight->to(at::kFloat).contiguous();
    }

    const float* weights() const { return weight.defined() ? weight.const_data_ptr<float>() : nullptr; }

    void check_lse(const at::Tensor& lse) const {
        TORCH_CHECK_VALUE(lse.dim() == 2 && lse.size(0) == rows && lse.size(1) == 2 && lse.is_contiguous() &&
                              lse.scalar_type() == at::kFloat,
                          "lse must be contiguous float32 (", rows, ", 2)");
        check_device(lse, "lse", logits);
    }

    // What a forward pass writes into.
    void check_losses(const at::Tensor& losses, const at::Tensor& lse) const {
        TORCH_CHECK_VALUE(losses.dim() == 1 && losses.size(0) == rows && losses.is_contiguous() &&
                              losses.scalar_type() == at::kFloat,
                          "losses must be contiguous float32 (", rows, ",)");
        check_device(losses, "losses", logits);
        check_lse(lse);
    }

    // What only the backward pass is given.
    void check_saved(const at::Tensor& upstream, const at::Tensor& lse, const at::Tensor& kept,
                     const at::Tensor& normalizer) const {
        check_scalar(upstream, "grad", logits);
        check_scalar(normalizer, "normalizer", logits);
        check_lse(lse);
        TORCH_CHECK_VALUE(kept.dim() == 1 && kept.size(0) == rows && kept.is_contiguous() &&
                              kept.scalar_type() == at::kBool,
                          "kept must be contiguous bool (", rows, ",)");
        check_device(kept, "kept", logits);
    }

    ElementType type;
    int64_t rows, columns, first_class, classes;
    at::Tensor logits;  // rows whose elements lie side by side
    at::Tensor target;
    at::Tensor weight;  // undefined: all 1
};

}  // namespace batchkern
