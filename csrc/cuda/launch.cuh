// Helpers that the launchers share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels.h"

namespace batchkern {

// Up to this many losses, one block of 1,024 threads selects and holds them in registers. With more losses,
// all blocks of a cooperative launch select.
constexpr int64_t kOneBlock = 8192;
constexpr int64_t kRowsOfBlock = 8192;

inline int multiprocessors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// At most one block per multiprocessor, so that all blocks of a cooperative launch are resident.
inline int select_blocks(int64_t n) {
    if (n <= kOneBlock) return 1;
    return static_cast<int>(std::min<int64_t>(multiprocessors(), (n + kRowsOfBlock - 1) / kRowsOfBlock));
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>(std::min<int64_t>((items + per_block - 1) / per_block, 0x7fffffff));
}

template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, dim3 blocks, int threads, size_t shared_bytes, bool cooperative,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls use with a null pointer of the element type.
template <class Use>
auto with_type(ElementType type, Use use) {
    switch (type) {
        case kFloat32:
            return use(static_cast<const float*>(nullptr));
        case kBFloat16:
            return use(static_cast<const BFloat16*>(nullptr));
        default:
            return use(static_cast<const Float16*>(nullptr));
    }
}

// Parts of scratch memory, each aligned to 16 bytes.
class Carver {
public:
    explicit Carver(void* memory) : at_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* const result = reinterpret_cast<T*>(at_);
        at_ += (count * sizeof(T) + 15) / 16 * 16;
        return result;
    }

    size_t taken(const void* memory) const { return at_ - static_cast<const char*>(memory); }

private:
    char* at_;
};

}  // namespace batchkern
