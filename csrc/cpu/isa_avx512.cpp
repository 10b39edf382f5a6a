// The kernels for processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)

#include "isa.h"

// The pragma stays in force until the end of the file, where templates are instantiated.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define BATCHKERN_ISA "avx512"
#define BATCHKERN_AVX512  // for the code that is written with intrinsics

namespace batchkern {
namespace avx512 {
#include "kernels.inl"
}
}  // namespace batchkern

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
