// Vectors of losses (included by kernels.inl).

template <class T>
void order_keys(const void* losses, uint32_t* keys, int64_t n) {
    const T* in = static_cast<const T*>(losses);
    BATCHKERN_SIMD()
    for (int64_t j = 0; j < n; ++j) keys[j] = order_key(load(in + j));
}

// `value` if `kept`, else 0. Computed on the bits, because a branch on `kept` cannot be predicted.
inline float value_if(bool kept, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= -static_cast<uint32_t>(kept);
    memcpy(&value, &bits, sizeof bits);
    return value;
}

// The sum of value(j), in double, with an array of partial sums: a plain reduction would add one value after
// the other.
template <class Value>
double sum_in_lanes(int64_t n, Value value) {
    constexpr int kLanes = 64;
    double sums[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        BATCHKERN_SIMD()
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += value(j + lane);
    }
    for (int lane = 0; j < n; ++j, ++lane) sums[lane] += value(j);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    return sums[0];
}

template <class T>
double sum_kept(const void* losses, const bool* kept, const float* weight, int64_t n) {
    const T* in = static_cast<const T*>(losses);
    const auto loss = [=](int64_t j) { return double{value_if(kept[j], load(in + j))}; };
    if (!weight) return sum_in_lanes(n, loss);
    return sum_in_lanes(n, [=](int64_t j) { return loss(j) * value_if(kept[j], weight[j]); });
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
