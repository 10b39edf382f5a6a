// KL(P || Q) of virtual rows Q to their reference row P, and its gradients (included by kernels.inl).
//
// With t = log P - log Q, KL = sum Q (t e^t - e^t + 1): every term is >= 0, so that none cancel. If a row is
// close to its reference, t = d + log sum P e^-d, where d, the difference of two logits, is exact. Otherwise
// the logits are taken relative to the maximum of their row, so that a constant offset between the rows does
// not enter t, and t is their difference plus that of the two log-sums.
//
// The gradients, with u and v the reference and the virtual logits divided by the temperature T:
// 1. KL = sum_i P_i t_i, with P = softmax(u) and Q = softmax(v);
// 2. the derivative of log Q_i by v_j is (i == j) - Q_j, so that of KL is Q_j - P_j = -Q_j (e^t_j - 1);
// 3. the derivative of P_i by u_j is P_i ((i == j) - P_j), and sum_i P_i (d log P_i / d u_j) = 0, so that
//    of KL is P_j (t_j - sum_i P_i t_i) = P_j (t_j - KL), summed over the copies of a reference;
// 4. the gradients of the scaled mean by the logits are these times grad_scale = scale / (T rows).

struct Reference {
    float maximum;
    double log_sum;
};

template <class T>
BATCHKERN_INLINE Reference prepare_reference(const T* reference, int64_t n, float scale, float* p) {
    Reference r;
    r.log_sum = log_sum_exp(reference, n, scale, &r.maximum);
    const float maximum = r.maximum, log_sum = static_cast<float>(r.log_sum);
    BATCHKERN_SIMD()
    for (int64_t j = 0; j < n; ++j) p[j] = exp_nonpositive((load(reference + j) - maximum) * scale - log_sum);
    return r;
}

// The number of terms after which the sums in single precision are added to those in double.
constexpr int64_t kStride = 128;

// The sum of term(j) over a row. Each lane adds its terms of a stride in single precision, and the sums of
// the strides in double.
template <class Term>
BATCHKERN_INLINE double sum_of(int64_t n, Term term) {
    const int64_t whole = n / kLanes * kLanes;
    double lanes[kLanes] = {}, sum = 0;
    for (int64_t first = 0; first < whole; first += kStride) {
        const int64_t end = whole - first < kStride ? whole : first + kStride;
        float part[kLanes] = {};
        for (int64_t j = first; j < end; j += kLanes) {
            BATCHKERN_SIMD()
            for (int64_t r = 0; r < kLanes; ++r) part[r] += term(j + r);
        }
        BATCHKERN_SIMD()
        for (int64_t r = 0; r < kLanes; ++r) lanes[r] += part[r];
    }
    BATCHKERN_SIMD(reduction(+ : sum))
    for (int64_t r = 0; r < kLanes; ++r) sum += lanes[r];
    for (int64_t j = whole; j < n; ++j) sum += term(j);
    return sum;
}

// The divergence of a row whose logits, divided by the temperature, all differ from the reference's by less
// than 1/2. Also writes the shift of t, log sum P e^-d.
template <bool kGrad, class T>
double near_divergence(const T* reference, const float* p, const T* row, int64_t n, float scale,
                       float grad_scale, float* weights, float* grad, float* shift_of_t) {
    const double sum = sum_of(n, [=](int64_t j) __attribute__((always_inline)) {  // of P e^-d - P
        const float d = (load(reference + j) - load(row + j)) * scale;
        const float change = p[j] == 0 ? 0.0f : p[j] * expm1_small(-d);
        weights[j] = p[j] + change;
        return change;
    });
    const float shift = static_cast<float>(log1p(sum)), inverse = static_cast<float>(1 / (1 + sum));
    *shift_of_t = shift;
    return sum_of(n, [=](int64_t j) __attribute__((always_inline)) {
        const float q = weights[j] * inverse;
        // |t| <= 1. If P is 0, Q is 0 too, and t may be the difference of two infinities.
        const float t = p[j] == 0 ? 0.0f : (load(reference + j) - load(row + j)) * scale + shift;
        const float tail = expm1_tail(t), square = t * t;
        if (kGrad) grad[j] = -q * (t + square * tail) * grad_scale;
        return q * (square * (1.0f + (t - 1.0f) * tail));
    });
}

// The divergence of any other row, and its shift of t.
template <bool kGrad, class T>
double far_divergence(const T* reference, const Reference& r, const float* p, const T* row, float base_q,
                      int64_t n, float scale, float grad_scale, float* weights, float* grad,
                      float* shift_of_t) {
    const float base_p = r.maximum, base = base_q == -INFINITY ? 0.0f : base_q;
    const double sum = sum_of(n, [=](int64_t j) __attribute__((always_inline)) {
        return weights[j] = exp_nonpositive((load(row + j) - base) * scale);
    });
    const float shift = static_cast<float>(log_nonnegative(sum) - r.log_sum);
    const float inverse = static_cast<float>(1 / sum);
    *shift_of_t = shift;
    return sum_of(n, [=](int64_t j) __attribute__((always_inline)) {
        const float zp = load(reference + j), zq = load(row + j);
        const bool absent = (zp == -INFINITY) & (zq == -INFINITY);
        const float q = weights[j] * inverse;
        const float t = absent ? 0.0f : ((zp - base_p) - (zq - base_q)) * scale + shift;
        const bool small = bits_of(t) << 1 <= bits_of(1.0f) << 1;  // |t| <= 1 without a branch
        const float u = small ? t : 0.0f;
        const float tail = expm1_tail(u), square = u * u;
        const float far = p[j] == 0 ? q : p[j] * (t - 1.0f) + q;
        const float term = small ? q * (square * (1.0f + (u - 1.0f) * tail)) : far;
        if (kGrad) grad[j] = (small ? -q * (u + square * tail) : q - p[j]) * grad_scale;
        return t == INFINITY ? INFINITY : term;
    });
}

// The divergence of one virtual row. Its gradient times grad_scale is written to grad, and t is added to
// t_sum unless that is null. With E = e^t - 1 = t + t^2 tail(t), a term t e^t - e^t + 1 is t E - (E - t) =
// t^2 (1 + (t - 1) tail(t)).
template <bool kGrad, class T>
BATCHKERN_INLINE double divergence(const T* reference, const Reference& r, const float* p, const T* row,
                                   int64_t n, float scale, float grad_scale, float* weights, float* grad,
                                   float* t_sum) {
    // The largest difference is found on the bits of its absolute value, which have the same order, with NaN
    // above all. The difference is 0 for an absent class, at -inf in both rows.
    int32_t largest_bits = 0, max_bits = ordered_bits(-INFINITY);
    BATCHKERN_SIMD(reduction(max : largest_bits, max_bits))
    for (int64_t j = 0; j < n; ++j) {
        const float zp = load(reference + j), zq = load(row + j);
        const bool absent = (zp == -INFINITY) & (zq == -INFINITY);
        const int32_t size = absent ? 0 : static_cast<int32_t>(bits_of(zp - zq) & 0x7fffffffu);
        largest_bits = size > largest_bits ? size : largest_bits;
        const int32_t bits = ordered_bits(zq);
        max_bits = bits > max_bits ? bits : max_bits;
    }
    const bool near = float_of(static_cast<uint32_t>(largest_bits)) * scale < 0.5f;
    const float base_p = near ? 0.0f : r.maximum, base_q = near ? 0.0f : of_ordered_bits(max_bits);
    float shift;
    const double kl =
        near ? near_divergence<kGrad>(reference, p, row, n, scale, grad_scale, weights, grad, &shift)
             : far_divergence<kGrad>(reference, r, p, row, base_q, n, scale, grad_scale, weights, grad,
                                     &shift);
    if (t_sum) {
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < n; ++j) {
            const float zp = load(reference + j), zq = load(row + j);
            const bool absent = (zp == -INFINITY) & (zq == -INFINITY);
            t_sum[j] += absent ? 0.0f : ((zp - base_p) - (zq - base_q)) * scale + shift;
        }
    }
    return kl;
}

// Rows of fewer classes that do not fill whole vectors are padded with absent classes, because the remainder
// of a vectorised loop is scalar.
constexpr int64_t kPadded = 256;

// The virtual rows of a reference are far apart in memory: while one is computed, the next is prefetched.
template <int kWrite, class T>
BATCHKERN_INLINE void fetch_ahead(const T* row, int64_t n) {
    const int64_t size = n < kBlock ? n : kBlock;
    for (int64_t j = 0; j < size; j += 64 / sizeof(T)) __builtin_prefetch(row + j, kWrite, 2);
}

template <bool kGrad, class T>
void divergences(const DivergenceRows& a) {
    const T* reference = static_cast<const T*>(a.reference);
    const int64_t n = a.classes;
    const float scale = a.inverse_temperature;
    const bool padded = n < kPadded && n % kLanes;
    const int64_t width = (n + kLanes - 1) / kLanes * kLanes;
    float reference_row[kPadded], row[kPadded], grad_row[kPadded], t_row[kPadded], p_row[kPadded],
        weight_row[kPadded];
    if (padded) {
        for (int64_t j = 0; j < width; ++j) {
            reference_row[j] = row[j] = -INFINITY;
            t_row[j] = 0.0f;
        }
        for (int64_t j = 0; j < n; ++j) reference_row[j] = load(reference + j);
    } else if (a.grad_reference) {
        memset(a.grad_reference, 0, n * sizeof(float));
    }
    float* const p = padded ? p_row : a.scratch;
    float* const t_sum = !a.grad_reference ? nullptr : padded ? t_row : a.grad_reference;
    const Reference r = padded ? prepare_reference(reference_row, width, scale, p)
                               : prepare_reference(reference, n, scale, p);
    double total = 0;
    for (int64_t copy = 0; copy < a.copies; ++copy) {
        const T* virtual_row = static_cast<const T*>(a.virtuals) + copy * a.virtual_stride;
        float* grad = kGrad ? a.grad_virtual + copy * a.grad_stride : nullptr;
        if (copy + 1 < a.copies) {
            fetch_ahead<0>(virtual_row + a.virtual_stride, n);
            if (kGrad) fetch_ahead<1>(grad + a.grad_stride, n);
        }
        double kl;
        if (padded) {
            for (int64_t j = 0; j < n; ++j) row[j] = load(virtual_row + j);
            kl = divergence<kGrad>(reference_row, r, p, row, width, scale, a.grad_scale, weight_row, grad_row,
                                   t_sum);
            if (kGrad) memcpy(grad, grad_row, n * sizeof(float));
        } else {
            kl = divergence<kGrad>(reference, r, p, virtual_row, n, scale, a.grad_scale, a.scratch + n, grad,
                                   t_sum);
        }
        a.divergences[copy * a.divergence_stride] = static_cast<float>(kl);
        total += kl;
    }
    if (a.grad_reference) {
        const float mean = static_cast<float>(total);
        for (int64_t j = 0; j < n; ++j)
            a.grad_reference[j] = p[j] == 0 ? 0.0f : p[j] * (t_sum[j] - mean) * a.grad_scale;
    }
}

template <class T>
void divergence_rows(const DivergenceRows& a) {
    return a.grad_virtual ? divergences<true, T>(a) : divergences<false, T>(a);
}
