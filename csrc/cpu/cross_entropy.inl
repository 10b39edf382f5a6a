// Rows of a cross entropy (included by kernels.inl once for each level).

// What follows from a row's maximum and the log of its sum: its loss, and what the backward pass needs.
template <class T>
BATCHKERN_INLINE void finish_row(const LossRows& a, const CrossEntropyOptions& o, int64_t i, float maximum,
                                 double log_sum) {
    const T* row = static_cast<const T*>(a.logits) + i * a.stride;
    const int64_t target = a.target[i];
    const double distance = log_sum + (static_cast<double>(maximum) - load(row + target));
    const double weight = o.class_weight ? o.class_weight[target] : 1.0;
    double loss = weight * distance;
    if (o.smoothing > 0) {
        double dot = 0;
        if (o.class_weight) {
            BATCHKERN_SIMD(reduction(+ : dot))
            for (int64_t j = 0; j < o.classes; ++j)
                dot += static_cast<double>(o.class_weight[j]) * load(row + j);
        } else {
            BATCHKERN_SIMD(reduction(+ : dot))
            for (int64_t j = 0; j < o.classes; ++j) dot += load(row + j);
        }
        const double spread = (log_sum + maximum) * o.weight_sum - dot;
        loss = (1 - o.smoothing) * loss + o.smoothing / o.classes * spread;
    }
    a.losses[i] = static_cast<float>(loss);
    a.lse[2 * i] = maximum;
    a.lse[2 * i + 1] = static_cast<float>(log_sum);
}

// Rows of at most kNarrow classes, a vector of rows at a time: a row alone would not fill one.
constexpr int64_t kNarrow = 32;

template <class T>
void narrow_loss_rows(const LossRows& a, const CrossEntropyOptions& o) {
    float z[kNarrow][kLanes];
    for (int64_t first = 0; first < a.rows; first += kLanes) {
        const int64_t rows = a.rows - first < kLanes ? a.rows - first : kLanes;
        for (int64_t r = 0; r < kLanes; ++r) {
            const T* row = static_cast<const T*>(a.logits) + (first + (r < rows ? r : 0)) * a.stride;
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
        for (int64_t j = 0; j < o.classes; ++j) {
            BATCHKERN_SIMD()
            for (int64_t r = 0; r < kLanes; ++r) sum[r] += exp_to_sum(z[j][r] - base[r]);
        }
        BATCHKERN_SIMD()
        for (int64_t r = 0; r < kLanes; ++r) log_sum[r] = log_nonnegative(sum[r]);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t i = first + r;
            if (a.target[i] == o.ignore_index)
                a.losses[i] = a.lse[2 * i] = a.lse[2 * i + 1] = 0.0f;
            else
                finish_row<T>(a, o, i, maximum[r], log_sum[r]);
        }
    }
}

template <class T>
void loss_rows(const LossRows& a, const CrossEntropyOptions& o) {
    if (o.classes <= kNarrow) return narrow_loss_rows<T>(a, o);
    for (int64_t i = 0; i < a.rows; ++i) {
        if (a.target[i] == o.ignore_index) {
            a.losses[i] = a.lse[2 * i] = a.lse[2 * i + 1] = 0.0f;
            continue;
        }
        float maximum;
        const double log_sum =
            log_sum_exp(static_cast<const T*>(a.logits) + i * a.stride, o.classes, 1.0f, &maximum);
        finish_row<T>(a, o, i, maximum, log_sum);
    }
}

template <class T>
void grad_rows(const GradRows& a, const CrossEntropyOptions& o) {
    for (int64_t i = 0; i < a.rows; ++i) {
        T* grad = static_cast<T*>(a.grad) + i * a.grad_stride;
        if (!a.kept[i]) {
            if (!a.grad_is_zero) memset(grad, 0, a.columns * sizeof(T));
            continue;
        }
        // d loss / d z_j = total * softmax_j - smooth * w_j - (j == target) * peak
        const T* row = static_cast<const T*>(a.logits) + i * a.stride;
        const int64_t target = a.target[i] - a.first_class;
        const bool has_target = target >= 0 && target < a.columns;
        const double weight = o.class_weight ? o.class_weight[target] : 1.0;
        const double smooth = o.smoothing / o.classes;
        const double peak = (1 - o.smoothing) * weight;
        const float total = static_cast<float>(peak + smooth * o.weight_sum);
        const float maximum = a.lse[2 * i], log_sum = a.lse[2 * i + 1], scale = a.scale;
        const float at_target =
            has_target ? total * exp_nonpositive((load(row + target) - maximum) - log_sum) : 0.0f;
        const double level = smooth * (o.class_weight ? o.class_weight[target] : 1.0);
        if (o.class_weight && smooth > 0) {
            const float factor = static_cast<float>(smooth);
            BATCHKERN_SIMD()
            for (int64_t j = 0; j < a.columns; ++j) {
                const float p = exp_nonpositive((load(row + j) - maximum) - log_sum);
                store(grad + j, (total * p - factor * o.class_weight[j]) * scale);
            }
        } else {
            const float constant = static_cast<float>(smooth);
            BATCHKERN_SIMD()
            for (int64_t j = 0; j < a.columns; ++j) {
                const float p = exp_nonpositive((load(row + j) - maximum) - log_sum);
                store(grad + j, (total * p - constant) * scale);
            }
        }
        if (has_target) store(grad + target, static_cast<float>((at_target - level - peak) * scale));
    }
}
