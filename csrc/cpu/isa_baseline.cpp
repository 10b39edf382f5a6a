// The kernels for the instructions that every processor of the architecture has.
#include "isa.h"

#define BATCHKERN_ISA "baseline"

namespace batchkern {
namespace baseline {
#include "kernels.inl"
}
}  // namespace batchkern
