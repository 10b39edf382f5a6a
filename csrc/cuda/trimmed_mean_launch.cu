// Launches of a trimmed mean: a selection, and its gradient.
#include "launch.cuh"
#include "select.cuh"
#include "trimmed_mean.cuh"

namespace batchkern {

namespace {

static_assert(kOneBlock == kHeldOf64 * kSelectThreads, "one block selects from what its threads hold");

int selecting_blocks(int64_t n, int64_t samples) {
    if (samples == 1) return select_blocks(n);
    return static_cast<int>(std::min<int64_t>(samples, 2 * multiprocessors()));
}

}  // namespace

Needs trimmed_mean_needs(int64_t n, int64_t samples) {
    const int blocks = selecting_blocks(n, samples);
    return {blocks * sizeof(BlockSum), blocks > 1};
}

cudaError_t launch_trimmed_mean(ElementType type, const LossVector& losses, const Ranking& ranking,
                                const Reduction& reduction, const Memory& memory, cudaStream_t stream) {
    const int64_t samples = ranking.samples;
    const int blocks = selecting_blocks(losses.n, samples);
    return with_type(type, [&](auto* element) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(element)>>;
        using Rows = BandedLosses<T>;
        const Selection<Rows> a{
            {{static_cast<const T*>(losses.losses), losses.stride, losses.mask, losses.mask_stride},
             ranking.score,
             ranking.score_stride,
             ranking.weight,
             ranking.weight_stride,
             ranking.lowest,
             ranking.skip,
             ranking.above.has_value(),
             ranking.above.value_or(0)},
            losses.n / samples,
            {reduction.keep_tensor, reduction.keep},
            {reduction.kept, reduction.mean, reduction.normalizer},
            memory.workspace,
            static_cast<BlockSum*>(memory.scratch)};
        if (samples > 1)
            return launch(stream, dim3(blocks), kSelectThreads, 0, false, &select_samples<Rows>, a, samples);
        return launch(stream, dim3(blocks), kSelectThreads, 0, blocks > 1,
                      blocks > 1 ? &select_rows<true, Rows> : &select_rows<false, Rows>, a);
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
