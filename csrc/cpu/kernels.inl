// Every vectorised kernel and the table of one instruction set. Included once by each isa_*.cpp, after its
// target pragma, in a namespace of its own. Nothing here may instantiate a template of the standard library:
// the linker could choose this copy of it for the whole module, which would then fail on a processor that
// lacks the instructions.

namespace {

// clang-format off
#include "reduce.inl"
#include "cross_entropy.inl"
#include "cross_entropy_columns.inl"
#include "soft_label_kl.inl"
#include "augment_latent.inl"
#include "loss_vectors.inl"
// clang-format on

#define BATCHKERN_EACH_TYPE(kernel) {kernel<float>, kernel<BFloat16>, kernel<Float16>}

}  // namespace

extern const Kernels table = {
    BATCHKERN_ISA,
    BATCHKERN_EACH_TYPE(loss_rows),
    BATCHKERN_EACH_TYPE(loss_columns),
    BATCHKERN_EACH_TYPE(grad_rows),
    BATCHKERN_EACH_TYPE(grad_columns),
    BATCHKERN_EACH_TYPE(divergence_rows),
    noise_row,
    hadamard_row,
    BATCHKERN_EACH_TYPE(add_noise_row),
    BATCHKERN_EACH_TYPE(dropout_row),
    BATCHKERN_EACH_TYPE(dropout_grad_row),
    BATCHKERN_EACH_TYPE(accumulate_row),
    BATCHKERN_EACH_TYPE(store_row),
    BATCHKERN_EACH_TYPE(order_keys),
    BATCHKERN_EACH_TYPE(sum_kept),
    BATCHKERN_EACH_TYPE(fill_kept),
};
