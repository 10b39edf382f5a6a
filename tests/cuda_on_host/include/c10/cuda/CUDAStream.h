// Replaces torch's header: a machine with one device, whose streams differ only in their numbers.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <cuda_runtime_api.h>

namespace c10::cuda {

struct CUDAStream {
    StreamId number = 0;

    cudaStream_t stream() const { return nullptr; }
    DeviceIndex device_index() const { return 0; }
    StreamId id() const { return number; }
};
inline CUDAStream getCurrentCUDAStream(DeviceIndex) { return {cuda_on_host::device.stream}; }

}  // namespace c10::cuda
