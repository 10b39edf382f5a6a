// In place of CUDA's own header: what the bindings and launchers name.
#pragma once

#include <cstddef>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorCooperativeLaunchTooLarge = 720
};
using cudaStream_t = struct CUstream_st*;
