// What nvcc itself says about the build, so that a report of it cannot drift from what was compiled; and what
// the driver says about it.
#include <cuda_runtime.h>

#include "../ops.h"
#include "trimmed_mean.cuh"

namespace batchkern {

namespace {

// One entry per architecture, as nvcc counts them: 800 is 8.0, 1030 is 10.3.
constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};

std::string dotted(const int major, const int minor) {
    return std::to_string(major) + "." + std::to_string(minor);
}

}  // namespace

CudaFacts cuda_facts() {
    // nvcc does not tell the source which architectures it keeps PTX for: that comes from the request.
    const std::string requested = BATCHKERN_CUDA_ARCH_LIST;
    CudaFacts facts{dotted(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10), {}};
    for (const int architecture : kArchitectures) {
        const std::string name = dotted(architecture / 100, architecture % 100 / 10);
        const bool ptx = requested.find(name + "+PTX") != std::string::npos;
        facts.architectures.push_back(ptx ? name + "+PTX" : name);
    }
    return facts;
}

std::string cuda_problem() {
    // Asking for a kernel's attributes loads it, and compiles its PTX where there is no machine code. Every
    // file is compiled for the same architectures, so one small kernel speaks for all.
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, &trimmed_mean_backward<float>);
    cudaGetLastError();  // or the next check of a launch would find it
    switch (error) {
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:  // another name for it
        case cudaErrorUnsupportedPtxVersion:
        case cudaErrorInvalidPtx:
        case cudaErrorJitCompilerNotFound:
        case cudaErrorJitCompilationDisabled:
            return cudaGetErrorString(error);
        default:  // fine, or nothing that another build would mend: a launch will say it
            return "";
    }
}

}  // namespace batchkern
