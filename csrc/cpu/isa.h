// Every isa_*.cpp includes this file before its target pragma: it includes all headers that kernels.inl
// needs.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../order.h"
#include "../philox.h"
#include "elements.h"
#include "kernels.h"

#define BATCHKERN_PRAGMA(text) _Pragma(#text)
#define BATCHKERN_SIMD(clauses) BATCHKERN_PRAGMA(omp simd clauses)
