// The interface between the bindings and the kernels: raw pointers, sizes and a stream go in, and the error
// of the launch comes out. It includes neither torch headers nor kernel code. Every pointer is a device
// pointer of the current device.
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
    Probabilities probabilities;  // used instead of the class indices if not null
    const float* class_weight;    // (classes,), or null: all 1
    int64_t rows;
    int classes;
    float smoothing;
};

// How many rows are kept, and the results of the selection.
struct Reduction {
    const double* keep_tensor;  // if not null, the kernel reads it instead of keep
    double keep;
    bool* kept;         // (n,)
    float* mean;        // of the kept rows; NaN if there are none
    float* normalizer;  // the divisor of their sum
};

struct ForwardCall {
    CrossEntropyRows rows;
    int64_t ignore_index;
    float* losses;  // (rows,), 0 where ignored
    // (rows, 2): the maximum m and the log of the sum of exp(z - m); 0 where ignored. With probabilities
    // (rows, 3): the third number is the sum of the smoothed and weighted probabilities.
    float* lse;
    float* entropy;  // (rows,), or null
    bool* correct;   // (rows,), or null: whether the highest class (of a tie, the first) is the target
    std::optional<Reduction> reduction;  // none: no selection
};

// The upstream gradients of rows.
struct Upstream {
    const bool* kept;  // (rows,): the gradient of a loss is *scalar / *normalizer if true, else 0; or null
    const float* scalar;
    const float* normalizer;
    const float* loss;  // (rows,) with stride `loss_stride`: those of the losses; null if all are 0
    int64_t loss_stride;
    const float* lse;  // the same for the log-sum-exps
    int64_t lse_stride;
    int64_t ignore_index;  // with loss and lse: rows with this target have no gradient
};

struct BackwardCall {
    CrossEntropyRows rows;
    int64_t first_class;  // the columns are the classes from this one on
    int64_t all_classes;
    const float* lse;  // as the forward pass wrote it
    Upstream upstream;
    const float* weight_sum;  // one number: the sum of class_weight; null if it is not needed
    void* grad;               // (rows, classes); may be the logits themselves
    RowLayout grad_at;
};

struct LossVector {
    const void* losses;  // (n,)
    int64_t stride;
    const uint8_t* mask;  // (n,), any byte but 0 is true; null if all are true
    int64_t mask_stride;
    int64_t n;
};

// How losses are ranked, and which part of the order is kept.
struct Ranking {
    const float* score;  // (n,), ranked in place of the losses, or null
    int64_t score_stride;
    const float* weight;  // (n,), or null
    int64_t weight_stride;
    bool lowest;                    // whether the lowest losses rank first
    double skip;                    // the fraction of rows, at the top, that is skipped
    std::optional<uint32_t> above;  // rows with higher keys are kept too
    int64_t samples;                // the number of equal parts, each ranked separately
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

// The memory that a launch takes besides its arguments.
struct Needs {
    size_t scratch;  // in bytes, uninitialised, aligned to 16
    bool workspace;
};
struct Memory {
    void* scratch;
    Workspace* workspace;  // null if it is not needed
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

// The scratch memory in bytes for sorting n packed rows; and the sort, whose result is in one of the two
// buffers.
size_t sort_scratch(int64_t n);
cudaError_t launch_sort(uint64_t* packed, uint64_t* buffer, int64_t n, void* scratch, size_t scratch_bytes,
                        uint64_t** sorted, cudaStream_t stream);

}  // namespace batchkern
