// Declarations that the translation units of batchkern._C share. No torch headers here: nvcc reads this file
// too.
#pragma once

#include <string>
#include <vector>

namespace batchkern {

struct CudaFacts {
    std::string version;                     // "13.0"
    std::vector<std::string> architectures;  // "8.0", or "9.0+PTX" if PTX was kept too
};

// Both are defined in cuda/build_facts.cu, so only if BATCHKERN_WITH_CUDA is defined.
CudaFacts cuda_facts();
// Why the current device cannot load the kernels, in the driver's words; empty if it can.
std::string cuda_problem();

}  // namespace batchkern
