// What the bindings ask of the kernels: raw pointers, sizes and a stream in; the error of the launch out.
// Neither torch nor kernel code here. Every pointer is one of the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "../class_rows.h"
#include "../element_type.h"
#include "workspace.h"

namespace batchkern {

struct CrossEntropyRows {
    const void* logits;  // (rows, classes)
    RowLayout at;
    ClassIndices target;          // (rows,)
    Probabilities probabilities;  // in their place, where they are not null
    const float* class_weight;    // (classes,), or null: all 1
    int64_t rows;
    int classes;
    float smoothing;
};

// How many rows are kept, and what becomes of them.
struct Reduction {
    const double* keep_tensor;  // read by the kernel, instead of keep, where it is not null
    double keep;
    bool* kept;         // (n,)
    float* mean;        // of the kept rows; NaN where there are none
    float* normalizer;  // what their sum was divided by
};

struct ForwardCall {
    CrossEntropyRows rows;
    int64_t ignore_index;
    float* losses;   // (rows,), 0 where ignored
    float* lse;      // (rows, 2): the maximum m, and log of the sum of exp(z - m); 0 where ignored. Of
                     // probabilities (rows, 3): their sum, smoothed and weighted
    float* entropy;  // (rows,), or null
    bool* correct;   // likewise: whether the highest class, of equal ones the first, is the target's
    std::optional<Reduction> reduction;  // none: the rows alone
};

// The upstream gradients of rows.
struct Upstream {
    const bool* kept;  // (rows,): *scalar / *normalizer where it is true, else 0; or null
    const float* scalar;
    const float* normalizer;
    const float* loss;  // (rows,) at `loss_stride`, of the losses; null: 0
    int64_t loss_stride;
    const float* lse;  // and of the log-sum-exps
    int64_t lse_stride;
    int64_t ignore_index;  // with loss and lse: such rows have none
};

struct BackwardCall {
    CrossEntropyRows rows;
    int64_t first_class;  // the columns are the classes from this one on
    int64_t all_classes;
    const float* lse;  // as the forward pass wrote it
    Upstream upstream;
    const float* weight_sum;  // one number: of class_weight; null where that is
    void* grad;               // (rows, classes); may be the logits themselves
    RowLayout grad_at;
};

struct LossVector {
    const void* losses;  // (n,)
    int64_t stride;
    const uint8_t* mask;  // (n,), any byte but 0 is true; null: all are
    int64_t mask_stride;
    int64_t n;
};

// By what losses are ranked, and which part of the order counts.
struct Ranking {
    const float* score;  // (n,), in place of the losses, or null
    int64_t score_stride;
    const float* weight;  // (n,), or null
    int64_t weight_stride;
    bool lowest;                    // the lowest first
    double skip;                    // this share, at the top, is left out first
    std::optional<uint32_t> above;  // keys above it count too
    int64_t samples;                // equal parts, each ranked apart
};

struct MeanBackwardCall {
    const bool* kept;         // (n,)
    const float* upstream;    // one number
    const float* normalizer;  // one number
    const float* weight;      // (n,), or null
    int64_t weight_stride;
    void* grad;  // (n,)
    int64_t n;
};

// What a launch takes besides its arguments.
struct Needs {
    size_t scratch;  // bytes, whose contents do not matter, aligned to 16
    bool workspace;
};
struct Memory {
    void* scratch;
    Workspace* workspace;  // null where it is not needed
};

Needs cross_entropy_needs(ElementType type, const CrossEntropyRows& rows, bool stats, bool selects);
cudaError_t launch_cross_entropy_forward(ElementType type, const ForwardCall& call, const Memory& memory,
                                         cudaStream_t stream);
cudaError_t launch_cross_entropy_backward(ElementType type, const BackwardCall& call, cudaStream_t stream);

Needs trimmed_mean_needs(int64_t n, int64_t samples);
cudaError_t launch_trimmed_mean(ElementType type, const LossVector& losses, const Ranking& ranking,
                                const Reduction& reduction, const Memory& memory, cudaStream_t stream);
cudaError_t launch_trimmed_mean_backward(ElementType type, const MeanBackwardCall& call, cudaStream_t stream);

Needs rank_needs(int64_t n, int64_t k);
cudaError_t launch_rank(ElementType type, const LossVector& losses, int64_t k, int64_t* indices,
                        const Memory& memory, cudaStream_t stream);

// What the sorting of n packed rows takes; and the sorting, which leaves them in one of the two buffers.
size_t sort_scratch(int64_t n);
cudaError_t launch_sort(uint64_t* packed, uint64_t* buffer, int64_t n, void* scratch, size_t scratch_bytes,
                        uint64_t** sorted, cudaStream_t stream);

}  // namespace batchkern
