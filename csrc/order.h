// The order in which losses are ranked, as integers, for the host and for nvcc. No torch headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace batchkern {

// A larger key ranks higher: NaN above +inf whatever its sign, -0.0 equal to 0.0. Without branches, which
// would keep the compiler from issuing the loads of several losses together.
BATCHKERN_HOST_DEVICE uint32_t order_key(float loss) {
    uint32_t bits;
#ifdef __CUDA_ARCH__
    const float unsigned_zero = loss + 0.0f;
    memcpy(&bits, &unsigned_zero, sizeof bits);
    const bool ordered = loss == loss;
#else  // on the bits: some CPU threads may flush subnormal numbers to zero and others not
    memcpy(&bits, &loss, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffffu;
    bits = magnitude == 0 ? 0 : bits;
    const bool ordered = magnitude <= 0x7f800000u;
#endif
    const uint32_t flipped = bits >> 31 ? 0xffffffffu : 0x80000000u;
    return ordered ? bits ^ flipped : 0xffffffffu;
}

// The loss that has this key: exactly the original one, except that -0.0 becomes 0.0 and that the bits of a
// NaN may differ.
BATCHKERN_HOST_DEVICE float loss_of_key(uint32_t key) {
    const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float loss;
    memcpy(&loss, &bits, sizeof loss);
    return loss;
}

}  // namespace batchkern
