// Selection of the highest losses. Keys are those of order.h; of a tie, the lower index ranks higher. No
// torch headers.
#pragma once

#include <cstdint>
#include <optional>

namespace batchkern {

// k = clamp(round_half_even(keep * n), 1, n); 0 if n is 0.
int64_t kept_count(int64_t n, double keep);

// The k-th highest of n keys (1 <= k <= n), how many keys equal it, and how many of these are among the k
// highest.
struct Threshold {
    uint32_t key;
    int64_t equal;
    int64_t ties;
};
Threshold select_threshold(const uint32_t* keys, int64_t n, int64_t k);

// Of n rows in descending order the first `first` are skipped and the next k are kept. Of the rows after
// these, those whose key is higher than `above` are kept too.
struct Band {
    double keep;                    // k = kept_count(n, keep)
    double skip = 0;                // first = min(round_half_even(skip * n), n - k)
    std::optional<uint32_t> above;  // none: no further rows
};

// Sets kept[i] to whether row i is valid and kept. If `valid` is null, all rows are valid. Returns the number
// of kept rows. `kept` and `valid` may be the same array.
int64_t select_rows(const uint32_t* keys, const bool* valid, int64_t n, const Band& band, bool* kept);

// Indices (k,) of the k highest of n keys, in descending order.
void rank_rows(const uint32_t* keys, int64_t n, int64_t k, int64_t* indices);

}  // namespace batchkern
