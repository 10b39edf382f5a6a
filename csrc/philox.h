// Philox4x32-10 (Salmon et al., SC 2011), for the host and for nvcc. No torch headers.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace batchkern {

// Ten rounds, in place. The four counter words are (row mod 2^32, row / 2^32, column / 4, 0) and the key
// words the low and high half of the seed, so that every backend draws the same integers.
BATCHKERN_HOST_DEVICE void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                                  uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
        const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

}  // namespace batchkern
