// Runs a CUDA kernel on a host: every thread of a block is a fiber, and one fiber runs at a time, until it
// comes to a barrier or a warp operation. Which one is next is random (in half of the blocks, within a warp
// that runs until it must wait), and so is the order of blocks: a kernel that needs an order without asking
// for it fails in some runs (the seed is in the message; CUDA_ON_HOST_SEED repeats it).
//
// What a device would leave undefined is refused with a sentence: barriers that not all threads of a block
// reach, warp operations whose mask names a lane that has ended, waits elsewhere, or was not meant; launches
// over a device's limits. Shared memory is fresh for each block, holds no zeros, and ends at what
// AddressSanitizer watches.
//
// Not modelled: weak memory order (a missing __threadfence does not show), blocks of one launch at the same
// time unless it is cooperative, more than one launch at a time, and what a kernel of this project has not
// used yet.
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

// Of the thread that runs.
inline Dim thread_index, block_index, block_size, grid_size;

constexpr int kMultiprocessors = 4;  // few, so that small problems take every path
constexpr size_t kSharedLimit = 48 * 1024;

struct Launch {
    Dim blocks;
    Dim threads;
    size_t dynamic_shared;
    bool cooperative;
};

// Throws std::runtime_error where a kernel is refused.
void run(const Launch& launch, const std::function<void()>& thread);

// Where in the kernel a thread waits.
struct Site {
    const char* file = __builtin_FILE();
    int line = __builtin_LINE();
};

void wait_for_block(Site site);
void wait_for_grid(Site site);

enum class WarpOp { kSync, kShuffle, kUp, kDown, kXor, kBallot, kAdd, kMin, kMax };

// The result of a warp operation for this lane, once all lanes of the mask have come.
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

// This block's memory for a __shared__ variable, which `variable` stands for.
void* shared_memory(const void* variable, size_t bytes);
void* dynamic_shared_memory();

}  // namespace cuda_on_host
