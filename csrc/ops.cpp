// Every operator's schema, and the module batchkern._C with the facts of its build. Kernels register
// themselves with TORCH_LIBRARY_IMPL beside their code, one file per operator and device.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

TORCH_LIBRARY(batchkern, m) {
    m.def(
        "trimmed_cross_entropy(Tensor logits, Tensor target, Tensor keep, *, Tensor? class_weight=None, "
        "int ignore_index=-100, float label_smoothing=0.0) "
        "-> (Tensor loss, Tensor losses, Tensor lse, Tensor kept, Tensor normalizer)");
    m.def(
        "trimmed_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor lse, Tensor kept, "
        "Tensor normalizer, *, Tensor? class_weight=None, int ignore_index=-100, "
        "float label_smoothing=0.0) -> Tensor");
    m.def(
        "trimmed_cross_entropy_backward_(Tensor grad, Tensor(a!) logits, Tensor target, Tensor lse, "
        "Tensor kept, Tensor normalizer, *, Tensor? class_weight=None, int ignore_index=-100, "
        "float label_smoothing=0.0) -> Tensor(a!)");
    m.def(
        "trimmed_mean(Tensor losses, Tensor keep, *, Tensor? mask=None) "
        "-> (Tensor mean, Tensor kept, Tensor normalizer)");
    m.def(
        "linear_trimmed_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor keep, *, "
        "Tensor? bias=None, int ignore_index=-100, float label_smoothing=0.0, int? chunk_rows=None) "
        "-> (Tensor loss, Tensor losses, Tensor lse, Tensor kept, Tensor normalizer)");
    m.def(
        "augment_latent(Tensor x, Tensor seed, *, int gaussian, int dropout, float sigma, float tau, "
        "float drop_prob, bool rescale_dropout=False, Tensor? basis=None) -> Tensor");
    m.def(
        "augment_latent_backward(Tensor grad, Tensor seed, *, int gaussian, int dropout, float drop_prob, "
        "bool rescale_dropout=False) -> Tensor");
    m.def(
        "soft_label_kl(Tensor reference_logits, Tensor virtual_logits, *, float temperature=1.0, "
        "bool reference_grad=False) -> (Tensor kl, Tensor grad_virtual, Tensor grad_reference)");
    m.def("rank_batches(Tensor losses, SymInt k) -> Tensor");
}

namespace {

// clang also defines __GNUC__, so it is asked first.
#if defined(__clang__)
constexpr char kCompiler[] = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char kCompiler[] = "gcc " __VERSION__;
#else
constexpr char kCompiler[] = "unknown";
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

pybind11::dict build_facts() {
    pybind11::dict facts;
    facts["version"] = BATCHKERN_VERSION;
    facts["compiler"] = kCompiler;
    facts["cxx_standard"] = __cplusplus / 100 % 100;
    facts["torch"] = TORCH_VERSION;
    facts["openmp"] = kOpenMP;
#ifdef BATCHKERN_WITH_CUDA
    const auto cuda = batchkern::cuda_facts();
    facts["cuda"] = true;
    facts["cuda_version"] = cuda.version;
    facts["cuda_architectures"] = cuda.architectures;
#else
    facts["cuda"] = false;
    facts["cuda_version"] = pybind11::none();
    facts["cuda_architectures"] = pybind11::list();
#endif
    return facts;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("build_facts", &build_facts, "What this module was compiled with, as a dict.");
}
