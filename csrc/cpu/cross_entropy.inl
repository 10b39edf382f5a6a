// Rows of a cross entropy (included by kernels.inl once for each level).

template <class T>
void loss_rows(const LossRows& a, const CrossEntropyOptions& o) {
    for (int64_t i = 0; i < a.rows; ++i) {
        const int64_t target = a.target[i];
        if (target == o.ignore_index) {
            a.losses[i] = a.lse[2 * i] = a.lse[2 * i + 1] = 0.0f;
            continue;
        }
        const T* row = static_cast<const T*>(a.logits) + i * a.stride;
        float maximum;
        const double log_sum = log_sum_exp(row, o.classes, 1.0f, &maximum);
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
}

template <class T>
void grad_rows(const GradRows& a, const CrossEntropyOptions& o) {
    for (int64_t i = 0; i < a.rows; ++i) {
        T* grad = static_cast<T*>(a.grad) + i * a.grad_stride;
        if (!a.kept[i]) {
            if (!a.grad_is_zero) memset(grad, 0, o.classes * sizeof(T));
            continue;
        }
        // d loss / d z_j = total * softmax_j - smooth * w_j - (j == target) * peak
        const T* row = static_cast<const T*>(a.logits) + i * a.stride;
        const int64_t target = a.target[i];
        const double weight = o.class_weight ? o.class_weight[target] : 1.0;
        const double smooth = o.smoothing / o.classes;
        const double peak = (1 - o.smoothing) * weight;
        const float total = static_cast<float>(peak + smooth * o.weight_sum);
        const float maximum = a.lse[2 * i], log_sum = a.lse[2 * i + 1], scale = a.scale;
        const float at_target = total * exp_nonpositive((load(row + target) - maximum) - log_sum);
        const double level = smooth * (o.class_weight ? o.class_weight[target] : 1.0);
        if (o.class_weight && smooth > 0) {
            const float factor = static_cast<float>(smooth);
            BATCHKERN_SIMD()
            for (int64_t j = 0; j < o.classes; ++j) {
                const float p = exp_nonpositive((load(row + j) - maximum) - log_sum);
                store(grad + j, (total * p - factor * o.class_weight[j]) * scale);
            }
        } else {
            const float constant = static_cast<float>(smooth);
            BATCHKERN_SIMD()
            for (int64_t j = 0; j < o.classes; ++j) {
                const float p = exp_nonpositive((load(row + j) - maximum) - log_sum);
                store(grad + j, (total * p - constant) * scale);
            }
        }
        store(grad + target, static_cast<float>((at_target - level - peak) * scale));
    }
}
