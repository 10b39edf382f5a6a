// Device memory that outlives a launch. It is all zeros between launches: a kernel that uses a part sets it
// to zero again.
#pragma once

#include <cstdint>

namespace batchkern {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaxPasses =
    12;  // for two thresholds: three each for the bits of a key and for those of an index

// Counts that the blocks of a selection share.
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
