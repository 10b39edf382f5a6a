// KL(P || Q) of virtual rows Q to their reference row P, and its gradients (included by kernels.inl).
//
// With t = log P - log Q, KL = sum Q (t e^t - e^t + 1): every term is >= 0. t is taken as d + shift, where d
// is the difference of two logits and shift = lse_Q - lse_P. Next to the reference d is exact and shift = log
// sum P e^-d holds all its digits; elsewhere shift is the difference of the two.

template <class T, bool kGrad>
void divergence_rows_with(const DivergenceRows& a) {
    const T* reference = static_cast<const T*>(a.reference);
    const float scale = a.inverse_temperature;
    float max_p;
    const double log_sum_p = log_sum_exp(reference, a.classes, scale, &max_p);
    const float lo_p = static_cast<float>(log_sum_p);
    float* const p = a.scratch;
    BATCHKERN_SIMD()
    for (int64_t j = 0; j < a.classes; ++j)
        p[j] = exp_nonpositive((load(reference + j) - max_p) * scale - lo_p);
    if (a.grad_reference) memset(a.grad_reference, 0, a.classes * sizeof(float));
    double total = 0;

    for (int64_t copy = 0; copy < a.copies; ++copy) {
        const T* row = static_cast<const T*>(a.virtuals) + copy * a.virtual_stride;
        float* grad = kGrad ? a.grad_virtual + copy * a.grad_stride : nullptr;
        float max_q;
        const double log_sum_q = log_sum_exp(row, a.classes, scale, &max_q);
        const float lo_q = static_cast<float>(log_sum_q);

        // The bits of a size are in its order, NaN above all. A class that is absent, at -inf in both rows,
        // has none.
        int32_t largest_bits = 0;
        BATCHKERN_SIMD(reduction(max : largest_bits))
        for (int64_t j = 0; j < a.classes; ++j) {
            const float zp = load(reference + j), zq = load(row + j);
            const bool absent = (zp == -INFINITY) & (zq == -INFINITY);
            const int32_t size = absent ? 0 : static_cast<int32_t>(bits_of(zp - zq) & 0x7fffffffu);
            largest_bits = size > largest_bits ? size : largest_bits;
        }
        const float largest = float_of(static_cast<uint32_t>(largest_bits));
        float base_p = max_p, base_q = max_q;
        double shift = log_sum_q - log_sum_p;
        if (largest * scale < 0.5f) {
            double sum = 0;
            BATCHKERN_SIMD(reduction(+ : sum))
            for (int64_t j = 0; j < a.classes; ++j) {
                const float d = (load(reference + j) - load(row + j)) * scale;
                sum += p[j] == 0 ? 0.0f : p[j] * expm1_small(-d);
            }
            base_p = base_q = 0;
            shift = log1p(sum);
        }

        const float shift_f = static_cast<float>(shift);
        double kl = 0;
        BATCHKERN_SIMD(reduction(+ : kl))
        for (int64_t j = 0; j < a.classes; ++j) {
            const float zp = load(reference + j), zq = load(row + j);
            const bool absent = (zp == -INFINITY) & (zq == -INFINITY);
            const float q = exp_nonpositive((zq - max_q) * scale - lo_q);
            const float t = absent ? 0.0f : ((zp - base_p) - (zq - base_q)) * scale + shift_f;
            const bool small = (t <= 1.0f) & (t >= -1.0f);
            const float u = small ? t : 0.0f;
            const float far = p[j] == 0 ? q : p[j] * (t - 1.0f) + q;
            const float term = small ? q * divergence_small(u) : far;
            kl += t == INFINITY ? INFINITY : term;
            if (kGrad) grad[j] = (small ? -q * expm1_small(u) : q - p[j]) * scale;
        }
        a.divergences[copy * a.divergence_stride] = static_cast<float>(kl);

        if (a.grad_reference) {
            total += kl;
            BATCHKERN_SIMD()
            for (int64_t j = 0; j < a.classes; ++j) {
                const float zp = load(reference + j), zq = load(row + j);
                const bool absent = (zp == -INFINITY) & (zq == -INFINITY);
                a.grad_reference[j] += absent ? 0.0f : ((zp - base_p) - (zq - base_q)) * scale + shift_f;
            }
        }
    }
    if (a.grad_reference) {
        const float mean = static_cast<float>(total);
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < a.classes; ++j)
            a.grad_reference[j] = p[j] == 0 ? 0.0f : p[j] * (a.grad_reference[j] - mean) * scale;
    }
}

template <class T>
void divergence_rows(const DivergenceRows& a) {
    return a.grad_virtual ? divergence_rows_with<T, true>(a) : divergence_rows_with<T, false>(a);
}
