// The vectorised CPU kernels: plain loops over raw pointers, compiled once for each instruction
// set. No torch headers. A kernel handles the rows that it is given and starts no threads.
#pragma once

#include <cstdint>

#include "../class_rows.h"
#include "../element_type.h"

namespace batchkern {

// Options that are the same for every row of a cross entropy over `classes` classes.
struct CrossEntropyOptions {
    int64_t classes;
    const float* class_weight;  // (classes,), or null: all 1
    double weight_sum;          // of class_weight
    double smoothing;
    double smooth;  // smoothing / classes
    int64_t ignore_index;
};

// Rows `begin` to `end` of a cross entropy; every pointer points to row 0.
struct LossRows {
    const void* logits;
    RowLayout at;
    ClassIndices target;          // (rows,), in range or ignore_index
    Probabilities probabilities;  // used instead of the class indices if not null
    float* losses;                // (rows,), 0 where ignored
    // (rows, 2): the maximum m and the log of the sum of exp(z - m). With probabilities (rows, 3): the third
    // number is the sum of the smoothed and weighted probabilities.
    float* lse;
    float* entropy;  // (rows,), or null
    bool* correct;   // (rows,), or null: whether the highest class (of a tie, the first) is the target
    int64_t begin;
    int64_t end;
};

// The upstream gradients of rows.
struct Upstream {
    const bool* kept;   // (rows,): the gradient of a loss is `scale` if true, else 0; or null
    float scale;        // the upstream gradient divided by the normalizer
    const float* loss;  // (rows,) with stride `loss_stride`: those of the losses; null if all are 0
    int64_t loss_stride;
    const float* lse;  // the same for the log-sum-exps
    int64_t lse_stride;
};

struct GradRows {
    const void* logits;  // (rows, columns)
    RowLayout at;
    ClassIndices target;  // (rows,)
    Probabilities probabilities;
    const float* lse;  // (rows, 2), or with probabilities (rows, 3)
    Upstream upstream;
    void* grad;  // (rows, columns); may be the logits themselves
    RowLayout grad_at;
    bool grad_is_zero;    // rows without a gradient hold zeros already
    int64_t first_class;  // the columns are the classes from this one on
    int64_t columns;
    int64_t begin;
    int64_t end;
};

// The number of rows that are computed together if their classes are not contiguous.
constexpr int64_t kTile = 64;

// Divergences of the virtual rows of one reference row, and their gradients.
struct DivergenceRows {
    const void* reference;  // (classes,)
    const void* virtuals;   // copy c at virtuals + c * virtual_stride, in elements
    int64_t virtual_stride;
    float* grad_virtual;  // null, or copy c at grad_virtual + c * grad_stride
    int64_t grad_stride;
    float* grad_reference;  // null, or (classes,): summed over copies
    float* divergences;     // copy c at divergences + c * divergence_stride
    int64_t divergence_stride;
    float* scratch;  // (2, classes)
    int64_t copies;
    int64_t classes;
    float inverse_temperature;
    float grad_scale;  // multiplies the gradients of the divergences with respect to logits / temperature
};

struct NoiseRow {
    float* noise;  // (columns,)
    int64_t columns;
    uint64_t row;
    uint64_t seed;
    float sigma;
    float tau;
};

// The dropout mask of a row, times a scale.
struct Mask {
    uint64_t row;
    uint64_t seed;
    uint32_t threshold;  // a random word below it drops its element
    float scale;
};

struct Kernels {
    const char* instruction_set;
    // *_rows: the classes of a row are contiguous; *_columns: they are not
    void (*loss_rows[kElementTypes])(const LossRows&, const CrossEntropyOptions&);
    void (*loss_columns[kElementTypes])(const LossRows&, const CrossEntropyOptions&);
    void (*grad_rows[kElementTypes])(const GradRows&, const CrossEntropyOptions&);
    void (*grad_columns[kElementTypes])(const GradRows&, const CrossEntropyOptions&);
    void (*divergence_rows[kElementTypes])(const DivergenceRows&);
    void (*noise_row)(const NoiseRow&);
    // noise = H D noise / sqrt(columns), in place, with D = diag(signs); the size of buffer is columns,
    // rounded up to a power of two
    void (*hadamard_row)(float* noise, float* buffer, const float* signs, int64_t columns);
    // out[i] = x[i] + noise[i]
    void (*add_noise_row[kElementTypes])(const void* x, const float* noise, void* out, int64_t n);
    void (*dropout_row[kElementTypes])(const Mask&, const void* x, void* out, int64_t n);
    // sum[i] += mask[i] * grad[i]
    void (*dropout_grad_row[kElementTypes])(const Mask&, const void* grad, float* sum, int64_t n);
    // sum[i] += x[i]
    void (*accumulate_row[kElementTypes])(const void* x, float* sum, int64_t n);
    // out[i] = x[i], rounded
    void (*store_row[kElementTypes])(const float* x, void* out, int64_t n);
    void (*order_keys[kElementTypes])(const void* losses, uint32_t* keys, int64_t n);
    double (*sum_kept[kElementTypes])(const void* losses, const bool* kept, const float* weight, int64_t n);
    // out[i] = kept[i] ? value : 0
    void (*fill_kept[kElementTypes])(float value, const bool* kept, const float* weight, void* out,
                                     int64_t n);
};

// The kernels of the best instruction set that this processor supports, unless use_instruction_set chose
// another.
const Kernels& kernels();
// Chooses the instruction set of this name for all later calls. Returns false if there is none here.
bool use_instruction_set(const char* name);
// Null-terminated, best first.
const Kernels* const* instruction_sets();

}  // namespace batchkern
