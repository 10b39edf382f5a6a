// The context of a binding's launches: the device of its tensors, PyTorch's current stream on it, and memory
// for the kernels.
#pragma once

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

#include "../arguments.h"
#include "kernels.h"

namespace batchkern {

// One Workspace per stream, which is enough because the launches of a stream run one after the other. The
// first of them allocates it, but not with PyTorch's allocator: under torch.compile(mode="reduce-overhead")
// the first call would allocate it in a pool whose memory the CUDA graphs reuse, although it is still held.
class Workspaces {
public:
    Workspace* of(const c10::cuda::CUDAStream& stream) {
        const std::lock_guard<std::mutex> lock(mutex_);
        Workspace*& workspace = workspaces_[{stream.device_index(), stream.id()}];
        if (!workspace) workspace = make(stream.stream());
        return workspace;
    }

    // At exit the driver may be shut down already: then nothing is left to free, and the error is ignored.
    ~Workspaces() {
        for (const auto& [stream, workspace] : workspaces_) (void)cudaFree(workspace);
    }

private:
    static Workspace* make(cudaStream_t stream) {
        // So that the allocation does not invalidate a graph that another thread captures at this time.
        const c10::cuda::CUDAStreamCaptureModeGuard guard(cudaStreamCaptureModeRelaxed);
        void* memory = nullptr;
        cudaError_t error = cudaMalloc(&memory, sizeof(Workspace));
        if (error == cudaErrorMemoryAllocation) {
            (void)cudaGetLastError();  // otherwise PyTorch's next launch would report the error
            c10::cuda::CUDACachingAllocator::emptyCache();
            error = cudaMalloc(&memory, sizeof(Workspace));
        }
        C10_CUDA_CHECK(error);
        C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, sizeof(Workspace), stream));
        return static_cast<Workspace*>(memory);
    }

    std::mutex mutex_;
    std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Workspace*> workspaces_;
};

class Place {
public:
    explicit Place(const at::Tensor& x)
        : guard_(x.device()),
          stream_(c10::cuda::getCurrentCUDAStream(x.device().index())),
          bytes_(x.options().dtype(at::kByte)) {}

    cudaStream_t stream() const { return stream_.stream(); }

    // Holds the memory of a launch until the launch is queued. From then on later work of the same stream may
    // reuse the memory.
    struct Held {
        at::Tensor scratch, of_graph;
        Workspace* workspace = nullptr;

        Memory get() const { return {scratch.mutable_data_ptr(), workspace}; }
    };

    Held memory(const Needs& needs) const {
        Held held{at::empty({static_cast<int64_t>(needs.scratch)}, bytes_), {}};
        if (!needs.workspace) return held;
        if (c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None) {
            held.workspace = workspaces().of(stream_);
            return held;
        }
        // A graph may be replayed at the same time as launches of this stream. So each launch of a graph gets
        // its own workspace in the graph's memory, which each replay sets to zero first.
        held.of_graph = at::zeros({static_cast<int64_t>(sizeof(Workspace))}, bytes_);
        held.workspace = static_cast<Workspace*>(held.of_graph.mutable_data_ptr());
        return held;
    }

private:
    static Workspaces& workspaces() {
        static Workspaces all;
        return all;
    }

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
