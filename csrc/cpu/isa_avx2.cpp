// The kernels for processors with AVX2 and FMA.
#if defined(__x86_64__)

#include "isa.h"

// The pragma stays in force until the end of the file, where templates are instantiated.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define BATCHKERN_ISA "avx2"

namespace batchkern {
namespace avx2 {
#include "kernels.inl"
}
}  // namespace batchkern

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
