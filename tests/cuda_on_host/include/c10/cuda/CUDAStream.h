// In place of torch's own header: a machine with one device and one stream.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <cuda_runtime_api.h>

namespace c10::cuda {

struct CUDAStream {
    cudaStream_t stream() const { return nullptr; }
    DeviceIndex device_index() const { return 0; }
    StreamId id() const { return 0; }
};
inline CUDAStream getCurrentCUDAStream(DeviceIndex) { return {}; }

}  // namespace c10::cuda
