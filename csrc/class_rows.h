// The memory layout of the rows of a cross entropy and of their targets, for the host and for nvcc. No torch
// headers.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace batchkern {

// Each sample has `inner` rows; the classes of a row are `step` elements apart.
struct RowLayout {
    int64_t inner;
    int64_t sample;  // elements from one sample to the next
    int64_t row;     // elements from one row of a sample to the next
    int64_t step;
};

// The offset of row i, in elements. There are fewer than 2^32 rows, so that the division can be one of 32-bit
// integers, which is much faster on a GPU than one of 64-bit integers.
BATCHKERN_HOST_DEVICE int64_t row_offset(const RowLayout& at, int64_t i) {
    const auto row = static_cast<uint32_t>(i), inner = static_cast<uint32_t>(at.inner);
    if (row < inner) return i * at.row;
    const uint32_t sample = row / inner;
    return sample * at.sample + (row - sample * inner) * at.row;
}

// Whether the classes of each row are contiguous in memory.
inline bool are_side_by_side(const RowLayout& at, int64_t classes) { return classes <= 1 || at.step == 1; }

// A target of probabilities: (rows, classes), in the logits' type or in float32.
struct Probabilities {
    const void* data;  // null: the target holds class indices
    RowLayout at;
    bool are_float;
};

enum IndexType { kInt64, kInt32, kInt16, kInt8, kUInt8, kUInt16, kUInt32 };

// Class indices (rows,) of any integer type.
struct ClassIndices {
    const void* data;
    IndexType type;
};

BATCHKERN_HOST_DEVICE int64_t class_of(const ClassIndices& target, int64_t i) {
    switch (target.type) {
        case kInt32:
            return static_cast<const int32_t*>(target.data)[i];
        case kInt16:
            return static_cast<const int16_t*>(target.data)[i];
        case kInt8:
            return static_cast<const int8_t*>(target.data)[i];
        case kUInt8:
            return static_cast<const uint8_t*>(target.data)[i];
        case kUInt16:
            return static_cast<const uint16_t*>(target.data)[i];
        case kUInt32:
            return static_cast<const uint32_t*>(target.data)[i];
        default:
            return static_cast<const int64_t*>(target.data)[i];
    }
}

// Calls use(pointer to the indices, with their own type), so that a loop over many indices tests the type
// only once.
template <class Use>
void with_indices(const ClassIndices& target, Use use) {
    switch (target.type) {
        case kInt32:
            return use(static_cast<const int32_t*>(target.data));
        case kInt16:
            return use(static_cast<const int16_t*>(target.data));
        case kInt8:
            return use(static_cast<const int8_t*>(target.data));
        case kUInt8:
            return use(static_cast<const uint8_t*>(target.data));
        case kUInt16:
            return use(static_cast<const uint16_t*>(target.data));
        case kUInt32:
            return use(static_cast<const uint32_t*>(target.data));
        default:
            return use(static_cast<const int64_t*>(target.data));
    }
}

}  // namespace batchkern
