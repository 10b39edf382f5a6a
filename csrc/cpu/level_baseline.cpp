// The kernels for the instructions that every processor of the architecture has.
#include "level.h"

#define BATCHKERN_LEVEL "baseline"

namespace batchkern {
namespace baseline {
#include "kernels.inl"
}
}  // namespace batchkern
