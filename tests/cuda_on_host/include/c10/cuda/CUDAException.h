// Replaces torch's header.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                             \
    do {                                                                                 \
        const cudaError_t checked_ = call; /* the expression may use any other name */   \
        TORCH_CHECK(checked_ == cudaSuccess, "CUDA error ", static_cast<int>(checked_)); \
    } while (false)
