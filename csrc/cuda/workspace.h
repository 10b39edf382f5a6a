// Memory on the device that outlives a launch. All zeros between launches: whoever uses a part leaves zeros.
#pragma once

#include <cstdint>

namespace batchkern {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaxPasses =
    12;  // of two thresholds, each three for the bits of a key and three for those of an index

// What the blocks of a selection tell each other.
struct Merge {
    uint32_t count;
    uint32_t inverse_lowest;
    uint32_t highest;
    uint32_t gathered;
    uint32_t ticket;
    uint32_t bins[kMaxPasses][kBins];
};

constexpr int64_t kMaxSplitRows = 4096;

struct Workspace {
    Merge merge;
    uint32_t ticket;
    uint32_t row_tickets[kMaxSplitRows];
};

}  // namespace batchkern
