// The order in which losses are ranked, as integers, for the host and for nvcc. No torch headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace batchkern {

// A larger key ranks higher: NaN above +inf whatever its sign, -0.0 equal to 0.0.
BATCHKERN_HOST_DEVICE uint32_t order_key(float loss) {
    uint32_t bits;
    memcpy(&bits, &loss, sizeof bits);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0xffffffffu;
    if (magnitude == 0) return 0x80000000u;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The loss of a key: the very same but for -0.0, which becomes 0.0, and for the bits of a NaN.
BATCHKERN_HOST_DEVICE float loss_of_key(uint32_t key) {
    const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float loss;
    memcpy(&loss, &bits, sizeof loss);
    return loss;
}

}  // namespace batchkern
