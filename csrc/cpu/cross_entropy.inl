// Cross entropy of rows whose classes are contiguous in memory (included by kernels.inl once for each
// instruction set).

template <class T>
BATCHKERN_INLINE const T* row_of(const void* data, const RowLayout& at, int64_t i) {
    return static_cast<const T*>(data) + row_offset(at, i);
}

// Sums over the classes of a row with logits z and target probabilities q, after smoothing, of weights w:
// `mass` is the sum of w q, `dot` that of w q z.
struct Asked {
    double mass;
    double dot;
};

// A probability after smoothing, times its class weight.
BATCHKERN_INLINE float smoothed(float q, float weight, float keep, float level) {
    return weight * (keep * q + level);
}

template <class T, class Q>
BATCHKERN_INLINE Asked asked_of(const T* row, const Q* q, const CrossEntropyOptions& o) {
    const auto keep = static_cast<float>(1 - o.smoothing), level = static_cast<float>(o.smooth);
    double mass = 0, dot = 0;
    if (o.class_weight) {
        BATCHKERN_SIMD(reduction(+ : mass, dot))
        for (int64_t j = 0; j < o.classes; ++j) {
            const double x = smoothed(load(q + j), o.class_weight[j], keep, level);
            mass += x;
            dot += x * load(row + j);
        }
    } else {
        BATCHKERN_SIMD(reduction(+ : mass, dot))
        for (int64_t j = 0; j < o.classes; ++j) {
            const double x = smoothed(load(q + j), 1.0f, keep, level);
            mass += x;
            dot += x * load(row + j);
        }
    }
    return {mass, dot};
}

BATCHKERN_INLINE void ignore_row(const LossRows& a, int64_t i) {
    a.losses[i] = a.lse[2 * i] = a.lse[2 * i + 1] = 0.0f;
    if (!a.entropy) return;
    a.entropy[i] = 0.0f;
    a.correct[i] = false;
}

// The loss of a row whose target is a class index. `dot` is the sum of w z over the row; it is used only with
// label smoothing.
BATCHKERN_INLINE double hard_loss(const CrossEntropyOptions& o, int64_t target, double maximum,
                                  double log_sum, double at_target, double dot) {
    const double loss = (o.class_weight ? o.class_weight[target] : 1.0) * (log_sum + (maximum - at_target));
    if (!(o.smoothing > 0)) return loss;
    const double spread = (log_sum + maximum) * o.weight_sum - dot;
    return (1 - o.smoothing) * loss + o.smooth * spread;
}

BATCHKERN_INLINE double soft_loss(const Asked& asked, double maximum, double log_sum) {
    return asked.mass * (log_sum + maximum) - asked.dot;
}

template <class T>
BATCHKERN_INLINE int64_t first_highest(const T* row, int64_t n) {
    int64_t best = 0;
    for (int64_t j = 1; j < n; ++j)
        if (load(row + j) > load(row + best)) best = j;
    return best;
}

template <class T>
BATCHKERN_INLINE int64_t target_class(const LossRows& a, const CrossEntropyOptions& o, int64_t i) {
    const Probabilities& q = a.probabilities;
    if (!q.data) return class_of(a.target, i);
    return q.are_float ? first_highest(row_of<float>(q.data, q.at, i), o.classes)
                       : first_highest(row_of<T>(q.data, q.at, i), o.classes);
}

// The entropy of a row and whether its prediction is correct, by a second pass over the row while it is still
// cached.
template <class T>
BATCHKERN_INLINE void describe_row(const LossRows& a, const CrossEntropyOptions& o, int64_t i, float maximum,
                                   float log_sum) {
    const T* row = row_of<T>(a.logits, a.at, i);
    double sum = 0;
    BATCHKERN_SIMD(reduction(+ : sum))
    for (int64_t j = 0; j < o.classes; ++j) {
        const float log_p = (load(row + j) - maximum) - log_sum, p = exp_nonpositive(log_p);
        sum += p == 0 ? 0.0f : p * log_p;
    }
    a.entropy[i] = static_cast<float>(-sum);
    const int64_t target = target_class<T>(a, o, i);
    bool before = false;
    if (load(row + target) == maximum)
        for (int64_t j = 0; j < target; ++j) before |= load(row + j) == maximum;
    a.correct[i] = load(row + target) == maximum && log_sum == log_sum && !before;
}

// Writes the loss of a row, and the numbers that the backward pass needs, from its maximum and the log of its
// sum.
template <class T>
BATCHKERN_INLINE void finish_row(const LossRows& a, const CrossEntropyOptions& o, int64_t i, float maximum,
                                 double log_sum) {
    const T* row = row_of<T>(a.logits, a.at, i);
    const Probabilities& q = a.probabilities;
    double loss;
    float* state = a.lse + 2 * i;
    if (q.data) {
        const Asked asked = q.are_float ? asked_of(row, row_of<float>(q.data, q.at, i), o)
                                        : asked_of(row, row_of<T>(q.data, q.at, i), o);
        loss = soft_loss(asked, maximum, log_sum);
        state = a.lse + 3 * i;
        state[2] = static_cast<float>(asked.mass);
    } else {
        const int64_t target = class_of(a.target, i);
        double dot = 0;
        if (o.smoothing > 0 && o.class_weight) {
            BATCHKERN_SIMD(reduction(+ : dot))
            for (int64_t j = 0; j < o.classes; ++j)
                dot += static_cast<double>(o.class_weight[j]) * load(row + j);
        } else if (o.smoothing > 0) {
            BATCHKERN_SIMD(reduction(+ : dot))
            for (int64_t j = 0; j < o.classes; ++j) dot += load(row + j);
        }
        loss = hard_loss(o, target, maximum, log_sum, load(row + target), dot);
    }
    a.losses[i] = static_cast<float>(loss);
    state[0] = maximum;
    state[1] = static_cast<float>(log_sum);
    if (a.entropy) describe_row<T>(a, o, i, maximum, state[1]);
}

BATCHKERN_INLINE bool is_ignored(const Probabilities& q, const ClassIndices& target, int64_t i,
                                 const CrossEntropyOptions& o) {
    return !q.data && class_of(target, i) == o.ignore_index;
}

// Rows of at most kNarrow classes are computed kLanes at a time, one in each lane of a vector, because a
// single row would not fill a vector.
constexpr int64_t kNarrow = 32;

template <class T>
void narrow_loss_rows(const LossRows& a, const CrossEntropyOptions& o) {
    float z[kNarrow][kLanes];
    for (int64_t first = a.begin; first < a.end; first += kLanes) {
        const int64_t rows = a.end - first < kLanes ? a.end - first : kLanes;
        for (int64_t r = 0; r < kLanes; ++r) {
            const T* row = row_of<T>(a.logits, a.at, first + (r < rows ? r : 0));
            for (int64_t j = 0; j < o.classes; ++j) z[j][r] = load(row + j);
        }
        float maximum[kLanes], base[kLanes];
        double sum[kLanes] = {}, log_sum[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) maximum[r] = -INFINITY;
        for (int64_t j = 0; j < o.classes; ++j) {
            BATCHKERN_SIMD()
            for (int64_t r = 0; r < kLanes; ++r) maximum[r] = z[j][r] > maximum[r] ? z[j][r] : maximum[r];
        }
        for (int64_t r = 0; r < kLanes; ++r) base[r] = maximum[r] == -INFINITY ? 0.0f : maximum[r];
        add_exponentials(z[0], kLanes, o.classes, base, sum);
        BATCHKERN_SIMD()
        for (int64_t r = 0; r < kLanes; ++r) log_sum[r] = log_nonnegative(sum[r]);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t i = first + r;
            if (is_ignored(a.probabilities, a.target, i, o))
                ignore_row(a, i);
            else
                finish_row<T>(a, o, i, maximum[r], log_sum[r]);
        }
    }
}

template <class T>
void loss_rows(const LossRows& a, const CrossEntropyOptions& o) {
    if (o.classes <= kNarrow) return narrow_loss_rows<T>(a, o);
    for (int64_t i = a.begin; i < a.end; ++i) {
        if (is_ignored(a.probabilities, a.target, i, o)) {
            ignore_row(a, i);
            continue;
        }
        float maximum;
        const double log_sum = log_sum_exp(row_of<T>(a.logits, a.at, i), o.classes, 1.0f, &maximum);
        finish_row<T>(a, o, i, maximum, log_sum);
    }
}

// The gradient of a row. With p = softmax(z) of its logits z, class weights w, label smoothing s over C
// classes, and the upstream gradients g of its loss and h of its log-sum-exp:
// 1. the loss is sum_j q_j (lse(z) - z_j), where q is the smoothed and weighted target: of a class index t,
//    q_j = w_j s / C + (j == t) (1 - s) w_t; of probabilities y, q_j = w_j ((1 - s) y_j + s / C);
// 2. the derivative of lse(z) by z_j is p_j, so that of the loss is p_j sum(q) - q_j;
// 3. so the gradient is (g sum(q) + h) p_j - g q_j: for a class index,
//    total * p_j - level * w_j - (j == target) * peak; for probabilities, total * p_j - factor * q_j.
struct RowGradient {
    float maximum, log_sum;
    float total, level, peak;
    float factor;    // g
    int64_t target;  // its column; -1 if it is not among the columns
};

// Returns false if both upstream gradients of the row are zero.
BATCHKERN_INLINE bool row_gradient(const GradRows& a, const CrossEntropyOptions& o, int64_t i,
                                   RowGradient* g) {
    const Upstream& u = a.upstream;
    float factor = 0, lse_factor = 0;
    if (u.kept) {
        factor = u.kept[i] ? u.scale : 0.0f;
    } else if (!is_ignored(a.probabilities, a.target, i, o)) {
        if (u.loss) factor = u.loss[i * u.loss_stride];
        if (u.lse) lse_factor = u.lse[i * u.lse_stride];
    }
    if (factor == 0 && lse_factor == 0) return false;
    g->factor = factor;
    g->target = -1;
    const float* state = a.lse + 2 * i;
    if (a.probabilities.data) {
        state = a.lse + 3 * i;
        g->total = static_cast<float>(static_cast<double>(factor) * state[2] + lse_factor);
        g->level = g->peak = 0.0f;
    } else {
        const int64_t target = class_of(a.target, i);
        const double smooth = o.smooth;
        const double peak = (1 - o.smoothing) * (o.class_weight ? o.class_weight[target] : 1.0);
        g->total = static_cast<float>(factor * (peak + smooth * o.weight_sum) + lse_factor);
        g->level = static_cast<float>(factor * smooth);
        g->peak = static_cast<float>(factor * peak);
        const int64_t column = target - a.first_class;
        if (column >= 0 && column < a.columns) g->target = column;
    }
    g->maximum = state[0];
    g->log_sum = state[1];
    return true;
}

template <class T, class Q>
BATCHKERN_INLINE void soft_grad_row(const RowGradient& g, const T* row, const Q* q, T* grad,
                                    const CrossEntropyOptions& o) {
    const auto keep = static_cast<float>(1 - o.smoothing), level = static_cast<float>(o.smooth);
    const float maximum = g.maximum, log_sum = g.log_sum, total = g.total, factor = g.factor;
    if (o.class_weight) {
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < o.classes; ++j) {
            const float p = exp_nonpositive((load(row + j) - maximum) - log_sum);
            store(grad + j, total * p - factor * smoothed(load(q + j), o.class_weight[j], keep, level));
        }
    } else {
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < o.classes; ++j) {
            const float p = exp_nonpositive((load(row + j) - maximum) - log_sum);
            store(grad + j, total * p - factor * smoothed(load(q + j), 1.0f, keep, level));
        }
    }
}

// The gradient at a row's target.
BATCHKERN_INLINE float grad_at_target(const RowGradient& g, const CrossEntropyOptions& o, int64_t target,
                                      float z) {
    const bool weighs = o.class_weight && o.smoothing > 0;
    const double level = static_cast<double>(g.level) * (weighs ? o.class_weight[target] : 1.0f);
    return static_cast<float>(g.total * exp_nonpositive((z - g.maximum) - g.log_sum) - level - g.peak);
}

template <class T>
void grad_rows(const GradRows& a, const CrossEntropyOptions& o) {
    const Probabilities& q = a.probabilities;
    for (int64_t i = a.begin; i < a.end; ++i) {
        T* grad = static_cast<T*>(a.grad) + row_offset(a.grad_at, i);
        RowGradient g;
        if (!row_gradient(a, o, i, &g)) {
            if (!a.grad_is_zero) memset(grad, 0, a.columns * sizeof(T));
            continue;
        }
        const T* row = row_of<T>(a.logits, a.at, i);
        if (q.data) {
            if (q.are_float)
                soft_grad_row(g, row, row_of<float>(q.data, q.at, i), grad, o);
            else
                soft_grad_row(g, row, row_of<T>(q.data, q.at, i), grad, o);
            continue;
        }
        const float maximum = g.maximum, log_sum = g.log_sum, total = g.total, level = g.level;
        const float at_target = g.target < 0 ? 0.0f : grad_at_target(g, o, g.target, load(row + g.target));
        if (o.class_weight && level != 0) {
            BATCHKERN_SIMD()
            for (int64_t j = 0; j < a.columns; ++j) {
                const float p = exp_nonpositive((load(row + j) - maximum) - log_sum);
                store(grad + j, total * p - level * o.class_weight[j]);
            }
        } else {
            BATCHKERN_SIMD()
            for (int64_t j = 0; j < a.columns; ++j) {
                const float p = exp_nonpositive((load(row + j) - maximum) - log_sum);
                store(grad + j, total * p - level);
            }
        }
        if (g.target >= 0) store(grad + g.target, at_target);
    }
}
