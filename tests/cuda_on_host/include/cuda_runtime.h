// Replaces CUDA's header with only those parts that the kernels and launchers of this project use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../runner.h"
#include "cuda_runtime_api.h"

// --- the language ----------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define BATCHKERN_SHARED(type, name)   \
    static const char name##_site = 0; \
    type& name = *static_cast<type*>(::cuda_on_host::shared_memory(&name##_site, sizeof(type)))
#define BATCHKERN_DYNAMIC_SHARED(type, name) \
    type* const name = static_cast<type*>(::cuda_on_host::dynamic_shared_memory())

inline const auto& threadIdx = ::cuda_on_host::thread_index;
inline const auto& blockIdx = ::cuda_on_host::block_index;
inline const auto& blockDim = ::cuda_on_host::block_size;
inline const auto& gridDim = ::cuda_on_host::grid_size;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

// --- arithmetic ------------------------------------------------------------------------------------------

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// --- memory ----------------------------------------------------------------------------------------------

template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T value) {
    *p = value;
}
inline uint32_t atomicAdd(uint32_t* p, uint32_t value) {
    const uint32_t before = *p;
    *p += value;
    return before;
}
inline uint32_t atomicMax(uint32_t* p, uint32_t value) {
    const uint32_t before = *p;
    *p = std::max(before, value);
    return before;
}
inline void __threadfence() {}

// --- threads together ------------------------------------------------------------------------------------

using CudaSite = ::cuda_on_host::Site;
using CudaWarpOp = ::cuda_on_host::WarpOp;

inline void __syncthreads(CudaSite site = {}) { ::cuda_on_host::wait_for_block(site); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, CudaSite site = {}) {
    ::cuda_on_host::warp(CudaWarpOp::kSync, mask, 0, 0, site);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, CudaSite site = {}) {
    return ::cuda_on_host::shuffle(CudaWarpOp::kShuffle, mask, value, lane, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int offset, CudaSite site = {}) {
    return ::cuda_on_host::shuffle(CudaWarpOp::kUp, mask, value, offset, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int offset, CudaSite site = {}) {
    return ::cuda_on_host::shuffle(CudaWarpOp::kDown, mask, value, offset, site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int offset, CudaSite site = {}) {
    return ::cuda_on_host::shuffle(CudaWarpOp::kXor, mask, value, offset, site);
}
inline uint32_t __ballot_sync(uint32_t mask, bool value, CudaSite site = {}) {
    return static_cast<uint32_t>(::cuda_on_host::warp(CudaWarpOp::kBallot, mask, value, 0, site));
}
inline bool __any_sync(uint32_t mask, bool value, CudaSite site = {}) {
    return __ballot_sync(mask, value, site) != 0;
}
inline bool __all_sync(uint32_t mask, bool value, CudaSite site = {}) {
    return __ballot_sync(mask, value, site) == mask;
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value, CudaSite site = {}) {
    return static_cast<uint32_t>(::cuda_on_host::warp(CudaWarpOp::kAdd, mask, value, 0, site));
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value, CudaSite site = {}) {
    return static_cast<uint32_t>(::cuda_on_host::warp(CudaWarpOp::kMin, mask, value, 0, site));
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value, CudaSite site = {}) {
    return static_cast<uint32_t>(::cuda_on_host::warp(CudaWarpOp::kMax, mask, value, 0, site));
}

// Not modelled: these would be signed.
int __reduce_add_sync(uint32_t, int, CudaSite = {}) = delete;
int __reduce_min_sync(uint32_t, int, CudaSite = {}) = delete;
int __reduce_max_sync(uint32_t, int, CudaSite = {}) = delete;

// --- the runtime -----------------------------------------------------------------------------------------

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = ::cuda_on_host::kMultiprocessors, cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const dim3 blocks = config->gridDim, threads = config->blockDim;
    const bool cooperative = config->numAttrs > 0 && config->attrs[0].val.cooperative;
    // The limits that all devices share; and whole warps, one dimension of threads, and two of blocks.
    if (blocks.x - 1 >= 0x7fffffffu || blocks.y - 1 >= 65535u || blocks.z != 1 || threads.x - 1 >= 1024u ||
        threads.x % 32 != 0 || threads.y != 1 || threads.z != 1 ||
        config->dynamicSmemBytes > ::cuda_on_host::kSharedLimit)
        return cudaErrorInvalidConfiguration;
    if (cooperative && uint64_t{blocks.x} * blocks.y > ::cuda_on_host::kMultiprocessors)
        return cudaErrorCooperativeLaunchTooLarge;
    ::cuda_on_host::run({{blocks.x, blocks.y, 1}, {threads.x, 1, 1}, config->dynamicSmemBytes, cooperative},
                        [&] { kernel(arguments...); });
    return cudaSuccess;
}
