// Launches of a trimmed mean: a selection, and its gradient.
#include "launch.cuh"
#include "select.cuh"
#include "trimmed_mean.cuh"

namespace batchkern {

Needs trimmed_mean_needs(int64_t n) {
    const int blocks = select_blocks(n);
    return {blocks * sizeof(BlockSum), blocks > 1};
}

cudaError_t launch_trimmed_mean(ElementType type, const LossVector& losses, const Reduction& reduction,
                                const Memory& memory, cudaStream_t stream) {
    const int blocks = select_blocks(losses.n);
    return with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        const Selection<PlainLosses<T>> a{
            {static_cast<const T*>(losses.losses), losses.stride, losses.mask, losses.mask_stride},
            losses.n,
            {reduction.keep_tensor, reduction.keep},
            {reduction.kept, reduction.mean, reduction.normalizer},
            memory.workspace,
            static_cast<BlockSum*>(memory.scratch)};
        const auto kernel =
            blocks > 1 ? &select_rows<true, PlainLosses<T>> : &select_rows<false, PlainLosses<T>>;
        return launch(stream, dim3(blocks), kSelectThreads, 0, blocks > 1, kernel, a);
    });
}

cudaError_t launch_trimmed_mean_backward(ElementType type, const MeanBackwardCall& call,
                                         cudaStream_t stream) {
    if (call.n == 0) return cudaSuccess;
    return with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        return launch(stream, dim3(blocks_for(call.n, kFillThreads)), kFillThreads, 0, false,
                      &trimmed_mean_backward<T>, call);
    });
}

}  // namespace batchkern
