// Where a binding launches: the device of its tensors, PyTorch's current stream there, and memory for the
// kernels.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>

#include "../arguments.h"
#include "launch.h"

namespace batchkern {

class Place {
public:
    explicit Place(const at::Tensor& x)
        : guard_(x.device()),
          stream_(c10::cuda::getCurrentCUDAStream(x.device().index())),
          bytes_(x.options().dtype(at::kByte)) {}

    cudaStream_t stream() const { return stream_.stream(); }

    // Holds what a launch needs until the launch has been made: later work of the stream may use the memory
    // again.
    struct Held {
        at::Tensor scratch, workspace;

        Memory get() const {
            return {scratch.mutable_data_ptr(),
                    workspace.defined() ? static_cast<Workspace*>(workspace.mutable_data_ptr()) : nullptr};
        }
    };

    Held memory(const Needs& needs) const {
        return {at::empty({static_cast<int64_t>(needs.scratch)}, bytes_),
                needs.workspace ? workspace() : at::Tensor()};
    }

private:
    // A Workspace for each stream, whose launches follow each other. A graph that is being captured may be
    // replayed beside them: each of its launches gets its own, and zeroes it in each replay.
    at::Tensor workspace() const {
        if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
            return zeros();
        static std::mutex mutex;
        // Never destroyed: at exit the driver may be gone before.
        static auto& workspaces = *new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, at::Tensor>();
        const std::lock_guard<std::mutex> lock(mutex);
        at::Tensor& workspace = workspaces[{stream_.device_index(), stream_.id()}];
        if (!workspace.defined()) workspace = zeros();
        return workspace;
    }

    at::Tensor zeros() const { return at::zeros({static_cast<int64_t>(sizeof(Workspace))}, bytes_); }

    const c10::cuda::CUDAGuard guard_;
    const c10::cuda::CUDAStream stream_;
    const at::TensorOptions bytes_;
};

inline Reduction reduction(double keep, const std::optional<at::Tensor>& keep_tensor, const at::Tensor& kept,
                           const at::Tensor& mean, const at::Tensor& normalizer) {
    return {keep_tensor ? keep_tensor->const_data_ptr<double>() : nullptr, keep,
            kept.mutable_data_ptr<bool>(), mean.mutable_data_ptr<float>(),
            normalizer.mutable_data_ptr<float>()};
}

inline LossVector loss_vector(const at::Tensor& losses, const std::optional<at::Tensor>& mask) {
    return {losses.const_data_ptr(), losses.stride(0),
            mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr, mask ? mask->stride(0) : 0,
            losses.size(0)};
}

}  // namespace batchkern
