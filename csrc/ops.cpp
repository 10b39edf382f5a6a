// Every operator's schema, and the module batchkern._C with the facts of its build. Kernels register
// themselves with TORCH_LIBRARY_IMPL beside their code, one file per operator and device.
#include "ops.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

#ifdef BATCHKERN_WITH_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#endif

// If keep_tensor is given, it is read when the operation runs and replaces keep. lse (B, 2) holds the maximum
// m of a row and the log of its sum of exp(z - m): together they keep the digits that one float32 would lose.
TORCH_LIBRARY(batchkern, m) {
    // The losses of all rows, without a selection. Logits are (C,), (B, C) or (B, C, d1, ...); the target
    // holds integers, or probabilities of the logits' shape. With probabilities lse is (..., 3): the third
    // number is the sum of the smoothed and weighted probabilities of a row. entropy and correct are empty
    // unless `stats` is true.
    m.def(
        "cross_entropy(Tensor logits, Tensor target, Tensor? class_weight=None, int ignore_index=-100, "
        "float label_smoothing=0.0, bool stats=False) "
        "-> (Tensor losses, Tensor lse, Tensor entropy, Tensor correct)");
    m.def(
        "cross_entropy_backward(Tensor? grad_losses, Tensor? grad_lse, Tensor logits, Tensor target, Tensor "
        "lse, "
        "Tensor? class_weight=None, int ignore_index=-100, float label_smoothing=0.0) -> Tensor");
    // The options are positional: to pass one by name costs a microsecond, and a small call takes about 20.
    m.def(
        "trimmed_cross_entropy(Tensor logits, Tensor target, float keep, Tensor? keep_tensor=None, "
        "Tensor? class_weight=None, int ignore_index=-100, float label_smoothing=0.0) "
        "-> (Tensor loss, Tensor losses, Tensor lse, Tensor kept, Tensor normalizer)");
    m.def(
        "trimmed_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor lse, Tensor kept, "
        "Tensor normalizer, Tensor? class_weight=None, float label_smoothing=0.0) -> Tensor");
    m.def(
        "trimmed_cross_entropy_backward_(Tensor grad, Tensor(a!) logits, Tensor target, Tensor lse, "
        "Tensor kept, Tensor normalizer, Tensor? class_weight=None, float label_smoothing=0.0) -> ()");
    // For linear_cross_entropy, which computes a part of the (B, C) logits at a time. The losses of all rows,
    // written to the given tensors:
    m.def(
        "cross_entropy_losses(Tensor logits, Tensor target, Tensor(a!) losses, Tensor(b!) lse, "
        "Tensor(c!)? entropy=None, Tensor(d!)? correct=None, int ignore_index=-100, "
        "float label_smoothing=0.0) -> ()");
    // Overwrites the logits with their gradient. Their columns may be only a part of the classes, beginning
    // with first_class.
    m.def(
        "cross_entropy_backward_(Tensor? grad_losses, Tensor? grad_lse, Tensor(a!) logits, Tensor target, "
        "Tensor lse, int ignore_index=-100, float label_smoothing=0.0, int first_class=0, "
        "int? classes=None) -> ()");
    // score: ranked in place of the losses. Each of `samples` equal parts of the losses is ranked separately.
    m.def(
        "trimmed_mean(Tensor losses, float keep, Tensor? keep_tensor=None, Tensor? mask=None, Tensor? "
        "score=None, "
        "Tensor? weight=None, bool lowest=False, float skip=0.0, float? above=None, SymInt samples=1) "
        "-> (Tensor mean, Tensor kept, Tensor normalizer)");
    m.def(
        "trimmed_mean_backward(Tensor grad, Tensor kept, Tensor normalizer, ScalarType dtype, Tensor? "
        "weight=None) "
        "-> Tensor");
    // basis: (Q, Q), or the signs (Q,) of a Hadamard transform.
    m.def(
        "augment_latent(Tensor x, Tensor seed, *, int gaussian, int dropout, float sigma, float tau, "
        "float drop_prob, bool rescale_dropout=False, Tensor? basis=None) -> Tensor");
    m.def(
        "augment_latent_backward(Tensor grad, Tensor seed, *, int gaussian, int dropout, float drop_prob, "
        "bool rescale_dropout=False) -> Tensor");
    // The gradients are those of the scaled mean, and empty unless requested. They are float32, except that
    // grad_virtual is bfloat16 for bfloat16 logits on CUDA.
    m.def(
        "soft_label_kl(Tensor reference_logits, Tensor virtual_logits, *, float temperature=1.0, "
        "float scale=1.0, bool reference_grad=False, bool virtual_grad=True) "
        "-> (Tensor mean, Tensor kl, Tensor grad_virtual, Tensor grad_reference)");
    // out = gradient * factor, in the type of `out`, for the backward pass of soft_label_kl. `out` may be
    // `gradient`; if it is not, the values of `gradient` are undefined afterwards.
    m.def("scale_gradient_(Tensor(a!) out, Tensor(b!) gradient, Tensor factor) -> ()");
    m.def("rank_batches(Tensor losses, SymInt k) -> Tensor");
}

namespace {

// clang also defines __GNUC__, so it is tested first.
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

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (auto set = batchkern::instruction_sets(); *set; ++set) names.emplace_back((*set)->instruction_set);
    return names;
}

void use_instruction_set(const std::string& name) {
    TORCH_CHECK_VALUE(batchkern::use_instruction_set(name.c_str()), "the instruction set must be one of ",
                      instruction_sets(), ", got ", name);
}

// Defines a function of the module that calls an operator through the dispatcher, as torch.ops does, but
// takes 1 to 3 us less host time. It is for operators whose small calls take about 10 us. A signature that
// does not match the schema is an error when the module is imported.
template <class Signature>
struct BoundOperator;

template <class Result, class... Args>
struct BoundOperator<Result(Args...)> {
    static void define(pybind11::module_& m, const char* name) {
        const auto op = c10::Dispatcher::singleton()
                            .findSchemaOrThrow((std::string("batchkern::") + name).c_str(), "")
                            .template typed<Result(Args...)>();
        m.def(name, torch::wrap_pybind_function_no_gil(
                        [op](Args... args) -> Result { return op.call(std::forward<Args>(args)...); }));
    }
};

// Whether this argument is a plain value, or a tensor in memory whose type overrides no function. Written
// with the C API, because every call of an operation makes this check and pybind11 would add 0.2 us.
bool is_plain(PyObject* x) {
    PyTypeObject* const type = Py_TYPE(x);
    if (THPVariable_CheckTypeExact(type)) return batchkern::in_memory(THPVariable_Unpack(x));
    return x == Py_None || type == &PyFloat_Type || type == &PyLong_Type || type == &PyBool_Type ||
           type == &PyUnicode_Type;
}

// are_plain(args, kwargs)
PyObject* are_plain(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    TORCH_CHECK_TYPE(count == 2 && PyTuple_Check(arguments[0]) && PyDict_Check(arguments[1]),
                     "are_plain takes a tuple and a dict");
    bool all = !at::impl::torch_function_mode_enabled();
    for (Py_ssize_t i = 0; all && i < PyTuple_GET_SIZE(arguments[0]); ++i)
        all = is_plain(PyTuple_GET_ITEM(arguments[0], i));
    PyObject *name, *x;
    for (Py_ssize_t at = 0; all && PyDict_Next(arguments[1], &at, &name, &x);) all = is_plain(x);
    return PyBool_FromLong(all);
    END_HANDLE_TH_ERRORS
}

PyMethodDef kArePlain{
    "are_plain", reinterpret_cast<PyCFunction>(are_plain), METH_FASTCALL,
    "Whether the arguments of a call are tensors in memory, numbers, strings and None, and no "
    "mode overrides it."};

using at::Tensor;
using MaybeTensor = const std::optional<Tensor>&;

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("instruction_sets", &instruction_sets,
          "Instruction sets that the CPU kernels have on this processor, best first.");
    m.def("instruction_set", [] { return batchkern::kernels().instruction_set; }, "The one that is used.");
    m.def("use_instruction_set", &use_instruction_set, "Use another one, to test or to measure.");
    BoundOperator<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, MaybeTensor, int64_t, double, bool)>::define(m, "cross_entropy");
    BoundOperator<Tensor(MaybeTensor, MaybeTensor, const Tensor&, const Tensor&, const Tensor&, MaybeTensor,
                         int64_t, double)>::define(m, "cross_entropy_backward");
    BoundOperator<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, double, MaybeTensor, MaybeTensor, int64_t,
        double)>::define(m, "trimmed_cross_entropy");
    BoundOperator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&, MaybeTensor, double)>::define(m, "trimmed_cross_entropy_backward");
    BoundOperator<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, double, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, bool, double,
        std::optional<double>, c10::SymInt)>::define(m, "trimmed_mean");
    BoundOperator<Tensor(const Tensor&, const Tensor&, const Tensor&, at::ScalarType, MaybeTensor)>::define(
        m, "trimmed_mean_backward");
    BoundOperator<Tensor(const Tensor&, c10::SymInt)>::define(m, "rank_batches");
    m.def("in_memory", &batchkern::in_memory, "Whether a tensor's storage holds all of its elements.");
    m.def(
        "large_empty",
        [](int64_t rows, int64_t columns, at::ScalarType dtype) {
            TORCH_CHECK_VALUE(rows >= 0 && columns >= 0, "rows and columns must be 0 or more, got ", rows,
                              " and ", columns);
            return batchkern::large_empty({rows, columns}, at::TensorOptions(at::kCPU).dtype(dtype));
        },
        "On the CPU, (rows, columns), uninitialised: see cpu/memory.h.");
    m.add_object("are_plain", PyCFunction_New(&kArePlain, nullptr));
    m.def("build_facts", &build_facts, "What this module was compiled with, as a dict.");
#ifdef BATCHKERN_WITH_CUDA
    m.def("cuda_problem", torch::wrap_pybind_function_no_gil([](c10::DeviceIndex device) {
              const c10::cuda::CUDAGuard guard(device);
              // The first call may be made during the capture of a graph, in which loading would be refused
              // otherwise.
              c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
              return batchkern::cuda_problem();
          }),
          "Why this device cannot load the CUDA kernels, in the driver's words; empty if it can.");
#endif
}
