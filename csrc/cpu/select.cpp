#include "select.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace batchkern {
namespace {

constexpr int kDigits = 256;

template <class T>
std::unique_ptr<T[]> uninitialized(int64_t n) {
    return std::unique_ptr<T[]>(new T[n]);
}

// Histogram of the 8 bits at shift. Four of them, because most losses share their first digits, and to count
// the same bin twice in a row has to wait for the first time.
void count_digits(const uint32_t* keys, int64_t n, int shift, int64_t* counts) {
    uint32_t part[4][kDigits] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; ++j) ++part[j][keys[i + j] >> shift & 255];
    for (; i < n; ++i) ++part[0][keys[i] >> shift & 255];
    for (int d = 0; d < kDigits; ++d)
        counts[d] = int64_t{part[0][d]} + int64_t{part[1][d]} + int64_t{part[2][d]} + int64_t{part[3][d]};
}

// Sorts the pairs by their high halves, stably.
void sort_high_halves(uint64_t* pairs, int64_t n) {
    int64_t starts[4][kDigits] = {};
    for (int64_t i = 0; i < n; ++i)
        for (int pass = 0; pass < 4; ++pass) ++starts[pass][pairs[i] >> (32 + 8 * pass) & 255];
    const auto buffer = uninitialized<uint64_t>(n);
    uint64_t *from = pairs, *to = buffer.get();
    for (int pass = 0; pass < 4; ++pass) {
        const int shift = 32 + 8 * pass;
        if (starts[pass][from[0] >> shift & 255] == n) continue;  // one digit in all
        int64_t start = 0;
        for (int d = 0; d < kDigits; ++d) {
            const int64_t count = starts[pass][d];
            starts[pass][d] = start;
            start += count;
        }
        for (int64_t i = 0; i < n; ++i) to[starts[pass][from[i] >> shift & 255]++] = from[i];
        std::swap(from, to);
    }
    if (from != pairs) std::copy(from, from + n, pairs);
}

}  // namespace

int64_t kept_count(int64_t n, double keep) {
    if (n == 0) return 0;
    return std::min(std::max(static_cast<int64_t>(std::nearbyint(keep * static_cast<double>(n))), int64_t{1}),
                    n);
}

Threshold select_threshold(const uint32_t* keys, int64_t n, int64_t k) {
    const auto candidates = uninitialized<uint32_t>(n);
    int64_t counts[kDigits];
    uint32_t key = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        count_digits(keys, n, shift, counts);
        uint32_t digit = kDigits - 1;
        for (; k > counts[digit]; --digit) k -= counts[digit];
        key |= digit << shift;
        int64_t m = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t candidate = keys[i];
            candidates[m] = candidate;
            m += (candidate >> shift & 255) == digit;
        }
        keys = candidates.get();
        n = m;
    }
    return {key, k};
}

int64_t select_rows(const uint32_t* keys, const bool* valid, int64_t n, double keep, bool* kept) {
    std::unique_ptr<uint32_t[]> compact;
    const uint32_t* among = keys;
    int64_t count = n;
    if (valid) {
        compact = uninitialized<uint32_t>(n);
        count = 0;
        for (int64_t i = 0; i < n; ++i)
            if (valid[i]) compact[count++] = keys[i];
        among = compact.get();
    }
    const int64_t k = kept_count(count, keep);
    if (k == count) {
        for (int64_t i = 0; i < n; ++i) kept[i] = !valid || valid[i];
        return k;
    }
    Threshold threshold = select_threshold(among, count, k);
    for (int64_t i = 0; i < n; ++i) {
        const bool candidate = !valid || valid[i];
        const bool tie = candidate & (keys[i] == threshold.key) & (threshold.ties > 0);
        threshold.ties -= tie;
        kept[i] = (candidate & (keys[i] > threshold.key)) | tie;
    }
    return k;
}

void rank_rows(const uint32_t* keys, int64_t n, int64_t k, int64_t* indices) {
    if (k == 0) return;
    Threshold threshold = k < n ? select_threshold(keys, n, k) : Threshold{0, n};
    const auto pairs =
        uninitialized<uint64_t>(k + 1);  // one more than are kept: a row is written, then counted
    int64_t m = 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool tie = (keys[i] == threshold.key) & (threshold.ties > 0);
        threshold.ties -= tie;
        pairs[m] = uint64_t{~keys[i]} << 32 | static_cast<uint64_t>(i);
        m += (keys[i] > threshold.key) | tie;
    }
    sort_high_halves(pairs.get(), k);
    for (int64_t i = 0; i < k; ++i) indices[i] = static_cast<int64_t>(pairs[i] & 0xffffffffu);
}

}  // namespace batchkern
