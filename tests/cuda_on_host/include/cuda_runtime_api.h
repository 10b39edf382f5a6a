// In place of CUDA's own header: what the bindings and launchers name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorCooperativeLaunchTooLarge = 720,
    cudaErrorStreamCaptureUnsupported = 900
};
using cudaStream_t = struct CUstream_st*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };

namespace cuda_on_host {

// What a test sees of the device, and changes (test_workspace.py has the same fields).
struct Device {
    int64_t stream = 0;   // the number of the current one
    int capturing = 0;    // a graph, on that stream
    int refusals = 0;     // so many allocations fail from now on
    int allocations = 0;  // that succeeded
    int emptied = 0;      // how often PyTorch's cache was
    int error = 0;        // of the last call that failed, until somebody asks for it
    int mode = cudaStreamCaptureModeGlobal;
    void* newest = nullptr;  // what was allocated last
    size_t bytes = 0;        // of it
};
inline Device device;

inline cudaError_t failed(cudaError_t error) { return device.error = error, error; }

}  // namespace cuda_on_host

// As if another thread captured a graph all the time.
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
    auto& device = cuda_on_host::device;
    if (device.mode != cudaStreamCaptureModeRelaxed)
        return cuda_on_host::failed(cudaErrorStreamCaptureUnsupported);
    if (device.refusals > 0) return --device.refusals, cuda_on_host::failed(cudaErrorMemoryAllocation);
    *memory = std::malloc(bytes);
    std::memset(*memory, 0xdb, bytes);
    ++device.allocations, device.newest = *memory, device.bytes = bytes;
    return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaGetLastError() {
    return static_cast<cudaError_t>(std::exchange(cuda_on_host::device.error, cudaSuccess));
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    return std::memset(memory, value, bytes), cudaSuccess;
}
