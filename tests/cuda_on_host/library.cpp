// The launchers and kernels of csrc/cuda, as a C++ compiler sees them with the headers of include/. The
// bindings there are compiled beside this file. Together they register kernels for CUDA tensors that take CPU
// tensors as well.
#include "../../csrc/cuda/cross_entropy_launch.cu"
#include "../../csrc/cuda/rank_batches_launch.cu"
#include "../../csrc/cuda/trimmed_mean_launch.cu"

// CUB is a library of its own, with tests of its own: here it is a stable sort by the high halves.
namespace batchkern {

size_t sort_scratch(int64_t) { return 1; }

cudaError_t launch_sort(uint64_t* packed, uint64_t* buffer, int64_t n, void*, size_t, uint64_t** sorted,
                        cudaStream_t) {
    std::copy(packed, packed + n, buffer);
    std::fill(packed, packed + n, ~uint64_t{0});  // what CUB leaves there is not defined
    std::stable_sort(buffer, buffer + n, [](uint64_t a, uint64_t b) { return a >> 32 < b >> 32; });
    *sorted = buffer;
    return cudaSuccess;
}

}  // namespace batchkern

extern "C" __attribute__((visibility("default"))) cuda_on_host::Device* cuda_on_host_device() {
    return &cuda_on_host::device;
}
