// Small kernels for test_runner.py. `kernels CASE...` launches each case and prints a line with its
// cudaError_t and its output. The reason for a refusal is printed to stderr; then the next case still runs,
// and the exit code is 3.
#include <cstdio>
#include <exception>
#include <vector>

#include "cooperative_groups.h"
#include "cuda_runtime.h"

namespace {

constexpr uint32_t kAll = 0xffffffffu;

struct Words {
    uint32_t v[256];
};

// --- kernels that must be right, and wrong if a barrier is missing ---------------------------------------

enum Missing { kNothing, kFirst, kSecond };

__global__ void sums(uint32_t* out) {
    BATCHKERN_SHARED(Words, shared);
    const uint32_t block = blockIdx.y * gridDim.x + blockIdx.x, t = threadIdx.x;
    shared.v[t] = block * 1000 + t;
    for (uint32_t half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) shared.v[t] += shared.v[t + half];
    }
    if (t == 0) out[block] = shared.v[0];
}

__device__ void of_warp() { __syncwarp(); }
__device__ void of_block() { __syncthreads(); }
__device__ void of_block_elsewhere() { __syncthreads(); }
__device__ void of_grid() { cooperative_groups::this_grid().sync(); }
__device__ void of_grid_elsewhere() { cooperative_groups::this_grid().sync(); }

// Each thread adds its neighbour's value to its own, with one barrier before the read and one before the next
// write.
template <void (*barrier)(), Missing missing>
__global__ void rounds(uint32_t* out) {
    BATCHKERN_SHARED(Words, shared);
    const uint32_t t = threadIdx.x;
    uint32_t value = t;
    for (int round = 0; round < 4; ++round) {
        shared.v[t] = value;
        if (missing != kFirst) barrier();
        value += shared.v[t ^ 1];
        if (missing != kSecond) barrier();
    }
    out[t] = value;
}

template <Missing missing>
__global__ void grid_rounds(uint32_t* out) {
    const uint32_t size = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t value = i;
    for (int round = 0; round < 4; ++round) {
        out[i] = value;
        if (missing != kFirst) of_grid();
        value += __ldcg(&out[(i + blockDim.x) % size]);
        if (missing != kSecond) of_grid();
    }
    out[i] = value;
}

template <Missing missing>
__global__ void dynamic_reverse(uint32_t* out) {
    BATCHKERN_DYNAMIC_SHARED(uint32_t, shared);
    const uint32_t t = threadIdx.x;
    shared[t] = t;
    if (missing != kFirst) __syncthreads();
    out[t] = shared[blockDim.x - 1 - t];
}

// The block that takes the last ticket adds the parts of all blocks. With kFirst missing, the block with the
// highest index does so instead.
template <Missing missing>
__global__ void last_block(uint32_t* out) {
    BATCHKERN_SHARED(bool, last);
    uint32_t *const tickets = out, *const parts = out + 1, *const sum = out + 1 + gridDim.x;
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = blockIdx.x * blockIdx.x;
        __threadfence();
        const uint32_t ticket = atomicAdd(tickets, 1u);
        last = (missing == kFirst ? blockIdx.x : ticket) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x < gridDim.x) atomicAdd(sum, __ldcg(&parts[threadIdx.x]));
}

__global__ void warp_operations(uint32_t* out) {
    const uint32_t t = threadIdx.x, n = blockDim.x, value = 100 + t;
    uint32_t* at = out + t - n;
    *(at += n) = __shfl_xor_sync(kAll, value, 5);
    *(at += n) = __shfl_up_sync(kAll, value, 3);
    *(at += n) = __shfl_down_sync(kAll, value, 3);
    *(at += n) = __shfl_sync(kAll, value, static_cast<int>(3 * t));
    *(at += n) = static_cast<uint32_t>(__shfl_xor_sync(kAll, uint64_t{value} << 32, 1) >> 32);
    *(at += n) = __ballot_sync(kAll, value % 3 == 0);
    *(at += n) = __any_sync(kAll, value > 140);
    *(at += n) = __all_sync(kAll, value > 120);
    *(at += n) = __reduce_add_sync(kAll, value << 26);
    *(at += n) = __reduce_min_sync(kAll, value ^ 7);
    *(at += n) = __reduce_max_sync(kAll, value ^ 7);
}

// Groups of 8 lanes, each with its own mask and number of iterations.
__global__ void groups(uint32_t* out) {
    const uint32_t t = threadIdx.x, group = t % 32 / 8, mask = 0xffu << (8 * group);
    uint32_t value = t;
    for (uint32_t i = 0; i <= group; ++i) value += __shfl_xor_sync(mask, value, 1 << i % 3);
    out[t] = value + 1000 * __all_sync(mask, t % 16 < 8);
}

// Each lane takes the sum so far from the lane before it and passes its own to the lane after it. So a lane
// waits for one that takes part in another operation first.
__global__ void chain(uint32_t* out) {
    const uint32_t t = threadIdx.x;
    uint32_t value = t;
    for (uint32_t taker = max(t, 1u); taker <= min(t + 1, 31u); ++taker) {
        const uint32_t handed = __shfl_sync(3u << (taker - 1), value, static_cast<int>(taker - 1));
        if (taker == t) value += handed;
    }
    out[t] = value;
}

// Only the even threads of the first two warps reach the barrier.
__global__ void some_return(uint32_t* out) {
    BATCHKERN_SHARED(Words, shared);
    const uint32_t t = threadIdx.x;
    if (t % 2 == 1 || t >= 64) return;
    shared.v[t] = t;
    __syncthreads();
    out[t] = shared.v[(t + 2) % 64];
}

// With 8 KiB of dynamic memory, this is all the shared memory that a block can have.
struct Large {
    uint32_t v[10 * 1024];
};
__global__ void large(uint32_t* out) {
    BATCHKERN_SHARED(Large, shared);
    BATCHKERN_DYNAMIC_SHARED(uint32_t, more);
    shared.v[10 * 1024 - 1 - threadIdx.x] = threadIdx.x;
    more[2 * 1024 - 1 - threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared.v[10 * 1024 - 1 - threadIdx.x] + more[2 * 1024 - 1 - threadIdx.x];
}

// Each thread has an array of its own; 32 words are enough.
template <int size>
__global__ void locals(uint32_t* out) {
    uint32_t values[size];
    uint32_t* volatile hidden = values;
    uint32_t* const p = hidden;
    for (uint32_t i = 0; i <= threadIdx.x; ++i) p[i] = i;
    __syncwarp();
    out[threadIdx.x] = p[threadIdx.x];
}

// --- kernels that must be refused ------------------------------------------------------------------------

__global__ void not_in_own_mask(uint32_t* out) {
    if (threadIdx.x == 3) out[0] = __shfl_sync(0xfff7u, 1u, 0);
}

// The barrier makes sure that the lane has ended. The array leaves data on the lane's stack.
__global__ void ended_lane(uint32_t* out) {
    uint32_t value[3] = {};
    uint32_t* volatile hidden = value;
    if (threadIdx.x == 31) return;
    __syncthreads();
    out[threadIdx.x] = __shfl_sync(kAll, *hidden, 0);
}

__global__ void another_operation(uint32_t* out) {
    out[threadIdx.x] = threadIdx.x < 16 ? __reduce_add_sync(kAll, 1u) : __reduce_max_sync(kAll, 1u);
}

__global__ void another_mask(uint32_t* out) {
    out[threadIdx.x] = __reduce_add_sync(kAll ^ 1u << (31 - threadIdx.x), 1u);  // all but its mirror image
}

__global__ void another_place(uint32_t* out) {
    if (threadIdx.x < 16)
        out[threadIdx.x] = __reduce_add_sync(kAll, 1u);
    else
        out[threadIdx.x] = __reduce_add_sync(kAll, 1u);
}

__global__ void outside_mask(uint32_t* out) {
    if (threadIdx.x < 8) out[threadIdx.x] = __shfl_down_sync(0xffu, threadIdx.x, 1);
}

void at_once() {}

template <void (*one)(), void (*other)()>
__global__ void wait_apart(uint32_t* out) {
    threadIdx.x < 16 ? one() : other();
    if (one == at_once && threadIdx.x < 16) return;
    out[0] = 1;
}

__global__ void blocks_apart(uint32_t* out) {
    blockIdx.x != 1 ? of_grid() : of_grid_elsewhere();
    out[0] = 1;
}

__global__ void some_blocks_end(uint32_t* out) {
    if (blockIdx.x != 1) of_grid();
    out[0] = 1;
}

// --- faults that must become visible ---------------------------------------------------------------------

__global__ void blocks_in_order(uint32_t* out) {
    if (threadIdx.x == 0) out[blockIdx.x] = 1 + (blockIdx.x > 0 ? out[blockIdx.x - 1] : 0);
}

__global__ void same_order_again(uint32_t* out) {
    uint32_t ticket = 0;
    if (threadIdx.x == 0) ticket = atomicAdd(&out[0], 1u);
    of_grid();
    if (threadIdx.x == 0) atomicAdd(&out[1], atomicAdd(&out[2], 1u) == ticket);
}

// Reads its shared memory, and then writes values that the next block must not find.
__global__ void unwritten(uint32_t* out) {
    BATCHKERN_SHARED(Words, shared);
    BATCHKERN_DYNAMIC_SHARED(uint32_t, dynamic);
    const uint32_t i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    out[i] = shared.v[threadIdx.x];
    out[i + 1] = dynamic[threadIdx.x];
    shared.v[threadIdx.x] = dynamic[threadIdx.x] = 7;
}

// Reads the byte past the end. The pointer hides the bounds of the array, so that only AddressSanitizer can
// find it.
template <int bytes>
__global__ void past_shared(uint32_t* out) {
    struct Bytes {
        unsigned char v[bytes];
    };
    BATCHKERN_SHARED(Bytes, shared);
    const unsigned char* p = shared.v;
    for (int i = 0; i < bytes; ++i) shared.v[i] = 1;
    out[0] = p[bytes - 1 + threadIdx.x / 31];
}

template <int bytes>
__global__ void past_dynamic(uint32_t* out) {
    BATCHKERN_DYNAMIC_SHARED(unsigned char, shared);
    out[0] = shared[bytes - 1 + threadIdx.x / 31];
}

__global__ void past_global(uint32_t* out) { out[threadIdx.x] = threadIdx.x; }

__global__ void misaligned(uint32_t* out) { out[0] = __ldcg(reinterpret_cast<const uint4*>(out + 1)).x; }

// --- cases -----------------------------------------------------------------------------------------------

__global__ void mark(uint32_t* out) { out[0] = 1; }

struct Case {
    const char* name;
    void (*kernel)(uint32_t*);
    dim3 blocks, threads;
    size_t size;  // of `out`
    size_t dynamic_bytes = 0;
    bool cooperative = false;
};

const Case kCases[] = {
    {"sums", sums, {3, 2}, 256, 6},
    {"rounds", rounds<of_block, kNothing>, 1, 256, 256},
    {"rounds without first", rounds<of_block, kFirst>, 1, 256, 256},
    {"rounds without second", rounds<of_block, kSecond>, 1, 256, 256},
    {"warp rounds", rounds<of_warp, kNothing>, 1, 64, 64},
    {"warp rounds without first", rounds<of_warp, kFirst>, 1, 64, 64},
    {"warp rounds without second", rounds<of_warp, kSecond>, 1, 64, 64},
    {"grid rounds", grid_rounds<kNothing>, 4, 32, 128, 0, true},
    {"grid rounds without first", grid_rounds<kFirst>, 4, 32, 128, 0, true},
    {"grid rounds without second", grid_rounds<kSecond>, 4, 32, 128, 0, true},
    {"dynamic reverse", dynamic_reverse<kNothing>, 1, 128, 128, 512},
    {"dynamic reverse without first", dynamic_reverse<kFirst>, 1, 128, 128, 512},
    {"last block", last_block<kNothing>, 16, 32, 18},
    {"last block without first", last_block<kFirst>, 16, 32, 18},
    {"warp operations", warp_operations, 1, 64, 11 * 64},
    {"groups", groups, 1, 64, 64},
    {"chain", chain, 1, 32, 32},
    {"locals", locals<32>, 1, 32, 32},
    {"some return", some_return, 1, 96, 96},
    {"large", large, 2, 32, 32, 8 * 1024},

    {"not in own mask", not_in_own_mask, 1, 32, 1},
    {"ended lane", ended_lane, 1, 32, 32},
    {"another operation", another_operation, 1, 32, 32},
    {"another mask", another_mask, 1, 32, 32},
    {"another place", another_place, 1, 32, 32},
    {"outside mask", outside_mask, 1, 32, 8},
    {"two barriers", wait_apart<of_block, of_block_elsewhere>, 1, 32, 1},
    {"warp and block", wait_apart<of_warp, of_block>, 1, 32, 1},
    {"block and grid", wait_apart<of_block, of_grid>, 1, 32, 1, 0, true},
    {"ended and grid", wait_apart<at_once, of_grid>, 1, 32, 1, 0, true},
    {"two grid barriers", blocks_apart, 4, 32, 1, 0, true},
    {"not cooperative", grid_rounds<kNothing>, 4, 32, 128},
    {"some blocks end", some_blocks_end, 4, 32, 1, 0, true},
    {"too large", large, 1, 32, 32, 8 * 1024 + 1},

    {"no blocks", mark, 0, 32, 1},
    {"1056 threads", mark, 1, 1056, 1},
    {"33 threads", mark, 1, 33, 1},
    {"5 cooperative blocks", mark, 5, 32, 1, 0, true},
    {"dynamic 49153", mark, 1, 32, 1, 48 * 1024 + 1},
    {"largest", mark, {2, 2}, 1024, 1, 48 * 1024, true},

    {"blocks in order", blocks_in_order, 16, 32, 16},
    {"same order again", same_order_again, 4, 32, 3, 0, true},
    {"unwritten", unwritten, 4, 32, 256, 128},
    {"past shared 13", past_shared<13>, 1, 32, 1},
    {"past shared 16", past_shared<16>, 1, 32, 1},
    {"past dynamic 13", past_dynamic<13>, 1, 32, 1, 13},
    {"past dynamic 16", past_dynamic<16>, 1, 32, 1, 16},
    {"past global", past_global, 1, 32, 31},
    {"past local", locals<31>, 1, 32, 32},
    {"misaligned", misaligned, 1, 32, 8},
};

void launch(const Case& c) {
    std::vector<uint32_t> out(c.size);
    cudaLaunchAttribute attribute{cudaLaunchAttributeCooperative, {c.cooperative}};
    const cudaLaunchConfig_t config{c.blocks, c.threads, c.dynamic_bytes, nullptr, &attribute, 1};
    printf("%d", cudaLaunchKernelEx(&config, c.kernel, out.data()));
    for (const uint32_t word : out) printf(" %u", word);
    printf("\n");
}

}  // namespace

int main(int count, char** names) {
    int code = 0;
    for (int i = 1; i < count; ++i) {
        const auto is_named = [&](const Case& c) { return strcmp(c.name, names[i]) == 0; };
        const Case* const found = std::find_if(std::begin(kCases), std::end(kCases), is_named);
        if (found == std::end(kCases)) return fprintf(stderr, "no case is called %s\n", names[i]), 2;
        try {
            launch(*found);
        } catch (const std::exception& error) {
            fprintf(stderr, "%s\n", error.what());
            code = 3;
        }
    }
    return code;
}
