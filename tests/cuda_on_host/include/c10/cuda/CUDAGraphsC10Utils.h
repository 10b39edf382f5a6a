// Replaces torch's header.
#pragma once

#include <cuda_runtime_api.h>

namespace c10::cuda {

struct CUDAStreamCaptureModeGuard {
    explicit CUDAStreamCaptureModeGuard(cudaStreamCaptureMode mode)
        : before_(std::exchange(cuda_on_host::device.mode, mode)) {}
    ~CUDAStreamCaptureModeGuard() { cuda_on_host::device.mode = before_; }
    CUDAStreamCaptureModeGuard(const CUDAStreamCaptureModeGuard&) = delete;

private:
    const int before_;
};

enum class CaptureStatus { None, Active };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() {
    return cuda_on_host::device.capturing ? CaptureStatus::Active : CaptureStatus::None;
}

}  // namespace c10::cuda
