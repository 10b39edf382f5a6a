// Runs a CUDA kernel on the host. Every thread of a block is a fiber, and one fiber runs at a time, until it
// reaches a barrier or a warp operation. The next fiber is chosen at random (in half of the blocks, from the
// same warp until the whole warp waits), and so is the order of the blocks. So a kernel that relies on an
// order without a barrier fails in some runs (the message has the seed, with which CUDA_ON_HOST_SEED repeats
// the run).
//
// Behaviour that is undefined on a device is refused with a sentence: barriers that not all threads of a
// block reach; warp operations whose mask names a lane that has ended or waits elsewhere, or that read from a
// lane outside the mask; and launches over a device's limits. Shared memory is allocated for each block, is
// not initialised to zeros, and is followed by memory that AddressSanitizer watches.
//
// Not modelled: weak memory order (a missing __threadfence is not found), blocks that run at the same time in
// a launch that is not cooperative, more than one launch at a time, and features that no kernel of this
// project uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

namespace cuda_on_host {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

// The indices of the thread that runs.
inline Dim thread_index, block_index, block_size, grid_size;

constexpr int kMultiprocessors = 4;  // few, so that small problems reach every path
constexpr size_t kSharedLimit = 48 * 1024;

struct Launch {
    Dim blocks;
    Dim threads;
    size_t dynamic_shared;
    bool cooperative;
};

// Throws std::runtime_error if a kernel is refused.
void run(const Launch& launch, const std::function<void()>& thread);

// The place in the kernel at which a thread waits.
struct Site {
    const char* file = __builtin_FILE();
    int line = __builtin_LINE();
};

void wait_for_block(Site site);
void wait_for_grid(Site site);

enum class WarpOp { kSync, kShuffle, kUp, kDown, kXor, kBallot, kAdd, kMin, kMax };

// The result of a warp operation for this lane, when all lanes of the mask have reached it.
uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, int argument, Site site);

template <class T>
T shuffle(WarpOp op, uint32_t mask, T value, int argument, Site site) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = warp(op, mask, bits, argument, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}

// This block's memory for a __shared__ variable, which the address `variable` identifies.
void* shared_memory(const void* variable, size_t bytes);
void* dynamic_shared_memory();

}  // namespace cuda_on_host
