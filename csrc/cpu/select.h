// Which losses are the highest: keys as in order.h, ties by lower index. No torch headers.
#pragma once

#include <cstdint>
#include <optional>

namespace batchkern {

// k = clamp(round_half_even(keep * n), 1, n); 0 where n is 0.
int64_t kept_count(int64_t n, double keep);

// The k-th highest of n keys (1 <= k <= n), how many keys equal it, and how many of these are among the k
// highest.
struct Threshold {
    uint32_t key;
    int64_t equal;
    int64_t ties;
};
Threshold select_threshold(const uint32_t* keys, int64_t n, int64_t k);

// Of n rows in descending order the first `first` are left out, and the k that follow are kept; and of the
// others, in order or not, those above a key.
struct Band {
    double keep;                    // k = kept_count(n, keep)
    double skip = 0;                // first = min(round_half_even(skip * n), n - k)
    std::optional<uint32_t> above;  // none: no other
};

// kept[i] = row i is kept of those with valid[i]; a null valid is all true. Returns how many are. kept may be
// valid.
int64_t select_rows(const uint32_t* keys, const bool* valid, int64_t n, const Band& band, bool* kept);

// Indices (k,) of the k highest of n keys, in descending order.
void rank_rows(const uint32_t* keys, int64_t n, int64_t k, int64_t* indices);

}  // namespace batchkern
