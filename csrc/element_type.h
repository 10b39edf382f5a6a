// The element types that kernels take, for the host and for nvcc. No torch headers.
#pragma once

#include <cstdint>

namespace batchkern {

// Storage of the two 16-bit types; arithmetic is in float.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

enum ElementType { kFloat32, kBFloat16, kFloat16, kElementTypes };

}  // namespace batchkern
