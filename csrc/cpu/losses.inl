// Vectors of losses (included by kernels.inl).

template <class T>
void order_keys(const void* losses, uint32_t* keys, int64_t n) {
    const T* in = static_cast<const T*>(losses);
    BATCHKERN_SIMD()
    for (int64_t j = 0; j < n; ++j) keys[j] = order_key(load(in + j));
}

// Losses times weights, where these are not null.
template <class T>
double sum_kept(const void* losses, const bool* kept, const float* weight, int64_t n) {
    const T* in = static_cast<const T*>(losses);
    double sum = 0;
    if (weight) {
        BATCHKERN_SIMD(reduction(+ : sum))
        for (int64_t j = 0; j < n; ++j) sum += kept[j] ? static_cast<double>(load(in + j)) * weight[j] : 0.0;
    } else {
        BATCHKERN_SIMD(reduction(+ : sum))
        for (int64_t j = 0; j < n; ++j) sum += kept[j] ? load(in + j) : 0.0f;
    }
    return sum;
}

template <class T>
void fill_kept(float value, const bool* kept, const float* weight, void* out, int64_t n) {
    T* to = static_cast<T*>(out);
    if (weight) {
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < n; ++j) store(to + j, kept[j] ? value * weight[j] : 0.0f);
    } else {
        BATCHKERN_SIMD()
        for (int64_t j = 0; j < n; ++j) store(to + j, kept[j] ? value : 0.0f);
    }
}
