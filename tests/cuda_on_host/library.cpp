// The launchers and kernels of csrc/cuda, compiled by a C++ compiler with the headers of include/. The
// bindings of csrc/cuda are compiled with this file. Together they register kernels for CUDA tensors that
// also accept CPU tensors.
#include "../../csrc/cuda/cross_entropy_launch.cu"
#include "../../csrc/cuda/rank_batches_launch.cu"
#include "../../csrc/cuda/trimmed_mean_launch.cu"

// CUB has its own tests: a stable sort by the high halves replaces it here.
namespace batchkern {

size_t sort_scratch(int64_t) { return 1; }

cudaError_t launch_sort(uint64_t* packed, uint64_t* buffer, int64_t n, void*, size_t, uint64_t** sorted,
                        cudaStream_t) {
    std::copy(packed, packed + n, buffer);
    std::fill(packed, packed + n, ~uint64_t{0});  // CUB leaves undefined values there
    std::stable_sort(buffer, buffer + n, [](uint64_t a, uint64_t b) { return a >> 32 < b >> 32; });
    *sorted = buffer;
    return cudaSuccess;
}

}  // namespace batchkern

extern "C" __attribute__((visibility("default"))) cuda_on_host::Device* cuda_on_host_device() {
    return &cuda_on_host::device;
}
