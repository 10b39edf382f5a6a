// Replaces CUDA's header with the names that the bindings and launchers use.
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

// The state of the device, which tests read and change (test_workspace.py has the same fields).
struct Device {
    int64_t stream = 0;   // the number of the current stream
    int capturing = 0;    // whether a graph is captured on that stream
    int refusals = 0;     // the number of allocations that will fail
    int allocations = 0;  // the number that succeeded
    int emptied = 0;      // how often PyTorch's cache was emptied
    int error = 0;        // that of the last call that failed, until it is read
    int mode = cudaStreamCaptureModeGlobal;
    void* newest = nullptr;  // the latest allocation
    size_t bytes = 0;        // its size
};
inline Device device;

inline cudaError_t failed(cudaError_t error) { return device.error = error, error; }

}  // namespace cuda_on_host

// Behaves as if another thread captured a graph all the time.
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
