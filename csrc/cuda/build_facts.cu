// Facts of the build from nvcc itself, so that a report of it cannot differ from what was compiled, and
// whether the driver can load the kernels.
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
    // No macro of nvcc holds the architectures that it keeps PTX for: they are read from the requested list.
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
    // Reading the attributes of a kernel loads it, and compiles its PTX if there is no machine code for the
    // device. Every file is compiled for the same architectures, so one small kernel is enough.
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, &trimmed_mean_backward<float>);
    cudaGetLastError();  // otherwise the check of the next launch would report the error
    switch (error) {
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:  // the same cause
        case cudaErrorUnsupportedPtxVersion:
        case cudaErrorInvalidPtx:
        case cudaErrorJitCompilerNotFound:
        case cudaErrorJitCompilationDisabled:
            return cudaGetErrorString(error);
        default:  // no error, or one that no other build would fix: a launch will report it
            return "";
    }
}

}  // namespace batchkern
