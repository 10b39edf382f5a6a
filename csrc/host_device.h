// Marks the functions that both a C++ compiler and nvcc compile.
#pragma once

#ifdef __CUDACC__
#define BATCHKERN_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define BATCHKERN_HOST_DEVICE static inline __attribute__((always_inline))
#endif
