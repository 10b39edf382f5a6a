#include "select.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <utility>

namespace batchkern {
namespace {

constexpr int kDigits = 256;

template <class T>
std::unique_ptr<T[]> uninitialized(int64_t n) {
    return std::unique_ptr<T[]>(new T[n]);
}

// A histogram of the 8 bits at kShift. It is counted in four partial histograms: most losses share their
// first digits, and each increment of a counter depends on the one before.
template <int kShift>
void count_digits(const uint32_t* keys, int64_t n, int64_t* counts) {
    uint32_t part[4][kDigits] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; ++j) ++part[j][keys[i + j] >> kShift & 255];
    for (; i < n; ++i) ++part[0][keys[i] >> kShift & 255];
    for (int d = 0; d < kDigits; ++d)
        counts[d] = int64_t{part[0][d]} + int64_t{part[1][d]} + int64_t{part[2][d]} + int64_t{part[3][d]};
}

// Copies the keys in [low, low + span], in order, and returns their number. It has no branch on a key, which
// could not be predicted.
int64_t copy_range(const uint32_t* keys, int64_t n, uint32_t low, uint32_t span, uint32_t* out) {
    int64_t m = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t key = keys[i];
        out[m] = key;
        m += key - low <= span;
    }
    return m;
}

// At most this many candidates are sorted without further passes.
constexpr int64_t kFew = 32;

// The candidates for the k-th highest key, which all have the higher bits of `low`. `narrow` keeps those that
// have the same 8 bits at kShift as the k-th highest.
struct Candidates {
    const uint32_t* keys;
    int64_t n;
    int64_t k;
    uint32_t low;
};

template <int kShift>
void narrow(Candidates& c, uint32_t* buffer) {
    if (c.n <= kFew) return;
    int64_t counts[kDigits];
    count_digits<kShift>(c.keys, c.n, counts);
    uint32_t digit = kDigits - 1;
    for (; c.k > counts[digit]; --digit) c.k -= counts[digit];
    c.low |= digit << kShift;
    if (counts[digit] == c.n) return;
    c.n = copy_range(c.keys, c.n, c.low, (uint32_t{1} << kShift) - 1, buffer);
    c.keys = buffer;
}

// For many keys, a sample gives a narrow range that most likely holds the k-th highest key. If the range does
// not hold it, all keys remain candidates.
void bracket(Candidates& c, uint32_t* buffer) {
    constexpr int64_t kSample = 1024, kMargin = 64;  // the margin is at least four standard deviations
    if (c.n < 32 * kSample) return;
    uint32_t sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = c.keys[i * (c.n / kSample)];
    std::sort(sample, sample + kSample);
    const auto place =
        static_cast<int64_t>(static_cast<double>(c.n - c.k) / static_cast<double>(c.n) * kSample);
    const uint32_t low = place < kMargin ? 0 : sample[place - kMargin];
    const uint32_t high = place + kMargin >= kSample ? 0xffffffffu : sample[place + kMargin];
    int64_t above = 0;
    for (int64_t i = 0; i < c.n; ++i) above += c.keys[i] > high;
    if (c.k <= above) return;
    const int64_t m = copy_range(c.keys, c.n, low, high - low, buffer);
    if (c.k <= above + m) c = {buffer, m, c.k - above, 0};
}

// A stable radix sort of the pairs by their high halves, kBits per pass. Returns the array that holds the
// result: pairs or buffer.
template <int kBits>
const uint64_t* sort_high_halves(uint64_t* pairs, uint64_t* buffer, int64_t n) {
    constexpr int kPasses = (32 + kBits - 1) / kBits;
    constexpr uint64_t kMask = (1 << kBits) - 1;
    // The lowest key is subtracted, so that leading digits that all pairs share take no pass.
    const uint64_t lowest = *std::min_element(pairs, pairs + n) & ~uint64_t{0xffffffffu};
    uint32_t starts[kPasses][kMask + 1] = {};
    for (int64_t i = 0; i < n; ++i) {
        pairs[i] -= lowest;
        for (int pass = 0; pass < kPasses; ++pass) ++starts[pass][pairs[i] >> (32 + kBits * pass) & kMask];
    }
    uint64_t *from = pairs, *to = buffer;
    for (int pass = 0; pass < kPasses; ++pass) {
        const int shift = 32 + kBits * pass;
        if (starts[pass][from[0] >> shift & kMask] == n) continue;  // all pairs have the same digit
        uint32_t start = 0;
        for (uint32_t& count : starts[pass]) start += std::exchange(count, start);
        for (int64_t i = 0; i < n; ++i) to[starts[pass][from[i] >> shift & kMask]++] = from[i];
        std::swap(from, to);
    }
    return from;
}

}  // namespace

int64_t kept_count(int64_t n, double keep) {
    if (n == 0) return 0;
    return std::min(std::max(static_cast<int64_t>(std::nearbyint(keep * static_cast<double>(n))), int64_t{1}),
                    n);
}

Threshold select_threshold(const uint32_t* keys, int64_t n, int64_t k) {
    const auto buffer = uninitialized<uint32_t>(n + 1);  // a key is written first, then counted
    Candidates c{keys, n, k, 0};
    bracket(c, buffer.get());
    narrow<24>(c, buffer.get());
    narrow<16>(c, buffer.get());
    narrow<8>(c, buffer.get());
    narrow<0>(c, buffer.get());
    if (c.n > kFew) return {c.low, c.n, c.k};  // all equal
    uint32_t few[kFew];
    std::copy(c.keys, c.keys + c.n, few);
    std::sort(few, few + c.n, std::greater<uint32_t>());
    const uint32_t key = few[c.k - 1];
    const auto range = std::equal_range(few, few + c.n, key, std::greater<uint32_t>());
    return {key, range.second - range.first, c.k - (range.first - few)};
}

namespace {

// Sets kept[i] to whether row i is among the m highest of the valid rows. `among` holds the keys of the valid
// rows, `count` in number.
void mark_highest(const uint32_t* keys, const bool* valid, int64_t n, const uint32_t* among, int64_t count,
                  int64_t m, bool* kept) {
    if (m == count || m == 0) {
        for (int64_t i = 0; i < n; ++i) kept[i] = m > 0 && (!valid || valid[i]);
        return;
    }
    const Threshold threshold = select_threshold(among, count, m);
    // No branch on a key: which rows are kept cannot be predicted.
    if (valid)
        for (int64_t i = 0; i < n; ++i) kept[i] = valid[i] & (keys[i] >= threshold.key);
    else
        for (int64_t i = 0; i < n; ++i) kept[i] = keys[i] >= threshold.key;
    int64_t excess = threshold.equal - threshold.ties;  // of tied rows the last are dropped
    for (int64_t i = n - 1; excess > 0; --i) {
        const bool drop = kept[i] & (keys[i] == threshold.key);
        kept[i] &= !drop;
        excess -= drop;
    }
}

}  // namespace

int64_t select_rows(const uint32_t* keys, const bool* valid, int64_t n, const Band& band, bool* kept) {
    std::unique_ptr<uint32_t[]> compact;
    const uint32_t* among = keys;
    int64_t count = n;
    if (valid) {
        compact = uninitialized<uint32_t>(n + 1);  // a key is written first, then counted
        count = 0;
        for (int64_t i = 0; i < n; ++i) {
            compact[count] = keys[i];
            count += valid[i];
        }
        among = compact.get();
    }
    const int64_t k = kept_count(count, band.keep);
    const int64_t first =
        std::min(static_cast<int64_t>(std::nearbyint(band.skip * static_cast<double>(count))), count - k);
    if (first == 0 && !band.above) {
        mark_highest(keys, valid, n, among, count, k, kept);
        return k;
    }
    const auto chosen = uninitialized<bool>(n), skipped = uninitialized<bool>(n);
    mark_highest(keys, valid, n, among, count, first + k, chosen.get());
    mark_highest(keys, valid, n, among, count, first, skipped.get());
    int64_t total = 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool above = band.above && keys[i] > *band.above && (!valid || valid[i]);
        kept[i] = (chosen[i] || above) && !skipped[i];
        total += kept[i];
    }
    return total;
}

void rank_rows(const uint32_t* keys, int64_t n, int64_t k, int64_t* indices) {
    if (k == 0) return;
    const Threshold threshold = select_threshold(keys, n, k);
    const int64_t above = k - threshold.ties;
    const auto pairs = uninitialized<uint64_t>(above + 1);  // one more: a row is written before it is counted
    int64_t m = 0;
    for (int64_t i = 0; i < n; ++i) {
        pairs[m] = uint64_t{~keys[i]} << 32 | static_cast<uint64_t>(i);
        m += keys[i] > threshold.key;
    }
    // The result serves as the second buffer: the page faults of fresh memory would take longer than the
    // sort.
    auto* const buffer = reinterpret_cast<uint64_t*>(indices);
    const uint64_t* sorted = pairs.get();
    if (above > 4096)  // fewer passes, but more bins to clear
        sorted = sort_high_halves<11>(pairs.get(), buffer, above);
    else if (above > 0)
        sorted = sort_high_halves<8>(pairs.get(), buffer, above);
    for (int64_t i = 0; i < above; ++i) indices[i] = static_cast<int64_t>(sorted[i] & 0xffffffffu);
    for (int64_t i = 0, tie = above; tie < k; ++i)
        if (keys[i] == threshold.key) indices[tie++] = i;
}

}  // namespace batchkern
