// augment_latent on a CPU. The kernels draw noise and masks and apply Hadamard transforms; torch's matmul
// applies a dense basis.
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "memory.h"
#include "tensors.h"

namespace batchkern {
namespace {

// With a dense basis, the noise is drawn in chunks into one buffer of at most this many floats (16 MiB), or
// of one row.
constexpr int64_t kNoiseFloats = int64_t{4} << 20;

Mask mask_of(int64_t row, const at::Tensor& seed, double drop_prob, bool rescale) {
    // An element is dropped if its random word is below the threshold. A probability of 1 would need a
    // threshold of 2^32, which does not fit into 32 bits: then a scale of 0 drops all elements.
    const double threshold = std::nearbyint(drop_prob * 0x1p32);
    const bool all = threshold > 4294967295.0;
    return {static_cast<uint64_t>(row), static_cast<uint64_t>(seed.item<int64_t>()),
            all ? 0xffffffffu : static_cast<uint32_t>(threshold),
            all ? 0.0f : static_cast<float>(rescale ? 1 / (1 - drop_prob) : 1.0)};
}

// Checks that the numbers of rows and of bytes of the result fit into 64 bits: if they overflowed, the
// kernels would write out of bounds.
void check_size(int64_t batch, int64_t width, int64_t gaussian, int64_t dropout) {
    int64_t copies, rows, elements;
    const bool fits = gaussian >= 0 && dropout >= 0 && !__builtin_add_overflow(gaussian, dropout, &copies) &&
                      !__builtin_add_overflow(copies, int64_t{1}, &copies) &&
                      !__builtin_mul_overflow(copies, batch, &rows) &&
                      !__builtin_mul_overflow(rows, width * 4, &elements);
    TORCH_CHECK_VALUE(fits, "gaussian and dropout must be copies that fit in memory, got ", gaussian, " and ",
                      dropout);
}

void check_seed(const at::Tensor& seed) {
    TORCH_CHECK_VALUE(seed.dim() == 0 && seed.scalar_type() == at::kLong, "seed must be 0-dim int64");
}

at::Tensor augment_latent(const at::Tensor& x_, const at::Tensor& seed, int64_t gaussian, int64_t dropout,
                          double sigma, double tau, double drop_prob, bool rescale_dropout,
                          const std::optional<at::Tensor>& basis) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(
        c10::autocast_dispatch_keyset);  // for the matmul below
    const ElementType type = element_type(x_, "x");
    TORCH_CHECK_VALUE(x_.dim() == 2, "x must be (B, Q), got ", x_.sizes());
    check_size(x_.size(0), x_.size(1), gaussian, dropout);
    check_seed(seed);
    const at::Tensor x = dense_rows(x_);
    const int64_t batch = x.size(0), width = x.size(1), copies = 1 + gaussian + dropout;
    const int64_t bytes = width * x.element_size();
    const bool hadamard = basis && basis->dim() == 1, dense = basis && basis->dim() == 2;
    TORCH_CHECK_VALUE(!basis || (hadamard && basis->size(0) == width) ||
                          (dense && basis->size(0) == width && basis->size(1) == width),
                      "basis must be (", width, ", ", width, ") or signs (", width, ",), got ",
                      basis->sizes());
    at::Tensor matrix;
    if (basis) matrix = basis->to(at::kFloat).contiguous();
    const uint64_t key = static_cast<uint64_t>(seed.item<int64_t>());
    const auto deviation = static_cast<float>(sigma), limit = static_cast<float>(tau);
    Mask mask = mask_of(0, seed, drop_prob, rescale_dropout);
    at::Tensor out = large_empty({copies * batch, width}, x.options());
    if (out.numel() == 0) return out;

    // The copies of a row have consecutive indices in this loop, so that every thread gets the same mix of
    // originals, gaussian and dropout copies.
    int64_t padded = 1;
    while (padded < width) padded *= 2;
    at::parallel_for(0, copies * batch, grain(8 * width), [&](int64_t begin, int64_t end) {
        const Kernels& k = kernels();
        std::vector<float> noise(width), buffer(padded);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / copies, copy = i % copies, row = copy * batch + b;
            const void* from = row_pointer(x, b);
            void* to = mutable_row_pointer(out, row);
            if (copy > gaussian) {
                Mask of_row = mask;
                of_row.row = static_cast<uint64_t>(row);
                k.dropout_row[type](of_row, from, to, width);
            } else if (copy == 0 || (dense && type == kFloat32)) {
                memcpy(to, from, bytes);  // for float32, addmm_ adds the noise in place below
            } else if (!dense) {
                k.noise_row({noise.data(), width, static_cast<uint64_t>(row), key, deviation, limit});
                if (hadamard)
                    k.hadamard_row(noise.data(), buffer.data(), matrix.const_data_ptr<float>(), width);
                k.add_noise_row[type](from, noise.data(), to, width);
            }
        }
    });
    if (!dense || gaussian == 0) return out;

    const int64_t last = (1 + gaussian) * batch, chunk = std::max<int64_t>(1, kNoiseFloats / width);
    at::Tensor buffer = at::empty({std::min(chunk, last - batch), width}, matrix.options());
    for (int64_t first = batch; first < last; first += chunk) {
        const int64_t rows = std::min(chunk, last - first);
        at::Tensor noise = buffer.narrow(0, 0, rows);
        at::parallel_for(0, rows, grain(8 * width), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                kernels().noise_row({static_cast<float*>(mutable_row_pointer(noise, i)), width,
                                     static_cast<uint64_t>(first + i), key, deviation, limit});
        });
        at::Tensor part = out.narrow(0, first, rows);
        if (type == kFloat32) {
            part.addmm_(noise, matrix.t());
            continue;
        }
        const at::Tensor projected = at::mm(noise, matrix.t());
        at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                kernels().add_noise_row[type](row_pointer(x, (first + i) % batch),
                                              static_cast<const float*>(row_pointer(projected, i)),
                                              mutable_row_pointer(part, i), width);
        });
    }
    return out;
}

// The gradient of x, with the upstream gradient g of each copy:
// 1. the original and the gaussian copies are x plus noise that does not depend on x: their derivative is 1;
// 2. a dropout copy is x times its mask, which is drawn again from the seed: its derivative is the mask;
// 3. so the gradient of a row is the sum of g over the original and the gaussian copies, plus the sum of
//    mask * g over the dropout copies.
at::Tensor augment_latent_backward(const at::Tensor& grad_, const at::Tensor& seed, int64_t gaussian,
                                   int64_t dropout, double drop_prob, bool rescale_dropout) {
    const ElementType type = element_type(grad_, "grad");
    check_size(1, 1, gaussian, dropout);
    const int64_t copies = 1 + gaussian + dropout;
    TORCH_CHECK_VALUE(grad_.dim() == 2 && grad_.size(0) % copies == 0, "grad must be (", copies,
                      " * B, Q), got ", grad_.sizes());
    check_seed(seed);
    const at::Tensor grad = dense_rows(grad_);
    const int64_t batch = grad.size(0) / copies, width = grad.size(1);
    const Mask mask = mask_of(0, seed, drop_prob, rescale_dropout);
    at::Tensor out = large_empty({batch, width}, grad.options());
    at::parallel_for(0, batch, grain(copies * width), [&](int64_t begin, int64_t end) {
        const Kernels& k = kernels();
        std::vector<float> sum(width);
        for (int64_t b = begin; b < end; ++b) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t copy = 0; copy < copies; ++copy) {
                const int64_t row = copy * batch + b;
                Mask of_row = mask;
                of_row.row = static_cast<uint64_t>(row);
                if (copy <= gaussian)
                    k.accumulate_row[type](row_pointer(grad, row), sum.data(), width);
                else
                    k.dropout_grad_row[type](of_row, row_pointer(grad, row), sum.data(), width);
            }
            k.store_row[type](sum.data(), mutable_row_pointer(out, b), width);
        }
    });
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(batchkern, CPU, m) {
    m.impl("augment_latent", &augment_latent);
    m.impl("augment_latent_backward", &augment_latent_backward);
}

}  // namespace batchkern
