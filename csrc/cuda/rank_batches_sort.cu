// CUB's radix sort.
#include <cub/device/device_radix_sort.cuh>

#include "kernels.h"

namespace batchkern {
namespace {

// Sorts by the high halves, which hold the keys. The rows are in the order of their indices and a radix sort
// is stable, so that of a tie the lower index comes first.
cudaError_t sort(void* scratch, size_t& bytes, cub::DoubleBuffer<uint64_t>& rows, int64_t n,
                 cudaStream_t stream) {
    return cub::DeviceRadixSort::SortKeys(scratch, bytes, rows, n, 32, 64, stream);
}

}  // namespace

size_t sort_scratch(int64_t n) {
    cub::DoubleBuffer<uint64_t> rows;
    size_t bytes = 0;
    sort(nullptr, bytes, rows, n, nullptr);
    return bytes;
}

cudaError_t launch_sort(uint64_t* packed, uint64_t* buffer, int64_t n, void* scratch, size_t scratch_bytes,
                        uint64_t** sorted, cudaStream_t stream) {
    cub::DoubleBuffer<uint64_t> rows(packed, buffer);
    const cudaError_t error = sort(scratch, scratch_bytes, rows, n, stream);
    *sorted = rows.Current();
    return error;
}

}  // namespace batchkern
