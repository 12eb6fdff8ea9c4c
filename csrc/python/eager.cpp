// fused_rmsnorm._eager: the operators called straight through the dispatcher, as torch's own
// functions are. torch.ops resolves and boxes its arguments on every call, which for a row of 128
// numbers took a third of the time (3.0 us against 2.0 us); and its errors name the argument. Only
// for eager mode: what traces Python (torch.compile, fx) has to see torch.ops.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "../binding/ops.h"

namespace fused_rmsnorm {
namespace {

Tensor tensor(PyObject* object, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), name, " must be a Tensor, but got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

OptTensor optional_tensor(PyObject* object, const char* name) {
  return object == Py_None ? std::nullopt : OptTensor(tensor(object, name));
}

// What Python's float() takes, and of tensors what torch's own functions take for a number. A bool is
// refused: as p it would be 1, the whole row, which nobody means by it.
double number(PyObject* object, const char* name) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  TORCH_CHECK_TYPE(!PyBool_Check(object), name, " must be a number, but got bool");
  if (THPVariable_Check(object)) {
    const Tensor& t = THPVariable_Unpack(object);
    TORCH_CHECK_TYPE(t.dim() == 0 && !t.requires_grad(), name, " must be a number, but got a Tensor that ",
                     t.dim() ? "has dimensions" : "requires grad: it would get none");
  }
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) {
    const bool overflow = PyErr_ExceptionMatches(PyExc_OverflowError);
    PyErr_Clear();
    TORCH_CHECK_VALUE(!overflow, name, " must be a number that a float can hold");
    TORCH_CHECK_TYPE(false, name, " must be a number, but got ", Py_TYPE(object)->tp_name);
  }
  return value;
}

std::optional<double> optional_number(PyObject* object, const char* name) {
  return object == Py_None ? std::nullopt : std::optional(number(object, name));
}

c10::string_view string(PyObject* object, const char* name) {
  TORCH_CHECK_TYPE(PyUnicode_Check(object), name, " must be a string, but got ", Py_TYPE(object)->tp_name);
  Py_ssize_t length = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &length);
  if (!text) PyErr_Clear();
  TORCH_CHECK_VALUE(text, name, " must be a string of whole characters, but got one with a lone surrogate");
  return {text, static_cast<size_t>(length)};
}

// The arguments that close every schema, and so many.
constexpr Py_ssize_t kOptions = 4;
Options options_from(PyObject* const* args) {
  const auto mode = string(args[3], "casting_mode");
  return parse_options(optional_number(args[0], "eps"), optional_number(args[1], "p"),
                       number(args[2], "weight_offset"), mode);
}

// And those of gated norms.
constexpr Py_ssize_t kGatedOptions = 2 + kOptions;
GatedOptions gated_options_from(PyObject* const* args) {
  const auto activation = string(args[0], "activation");
  TORCH_CHECK_TYPE(PyBool_Check(args[1]), "norm_before_gate must be a bool, but got ",
                   Py_TYPE(args[1])->tp_name);
  return parse_gated_options(activation, args[1] == Py_True, options_from(args + 2));
}

void expect(Py_ssize_t count, Py_ssize_t expected) {
  TORCH_CHECK_TYPE(count == expected, "expected ", expected, " arguments, but got ", count);
}

// (input, weight, bias, eps, p, weight_offset, casting_mode) -> y
template <auto norm>
PyObject* py_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 3 + kOptions);
  const Tensor x = tensor(args[0], "input");
  const OptTensor weight = optional_tensor(args[1], "weight"), bias = optional_tensor(args[2], "bias");
  const Options options = options_from(args + 3);
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = norm(x, weight, bias, options);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// (input, gate, weight, bias, activation, norm_before_gate, eps, p, weight_offset, casting_mode) -> y
template <auto norm>
PyObject* py_norm_gated(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 4 + kGatedOptions);
  const Tensor x = tensor(args[0], "input"), gate = tensor(args[1], "gate");
  const OptTensor weight = optional_tensor(args[2], "weight"), bias = optional_tensor(args[3], "bias");
  const GatedOptions options = gated_options_from(args + 4);
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = norm(x, gate, weight, bias, options);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// (input, residual, weight, bias, eps, p, weight_offset, casting_mode) -> (y, sum)
PyObject* py_add_rms_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 4 + kOptions);
  const Tensor x = tensor(args[0], "input"), residual = tensor(args[1], "residual");
  const OptTensor weight = optional_tensor(args[2], "weight"), bias = optional_tensor(args[3], "bias");
  const Options options = options_from(args + 4);
  Two result;
  {
    const pybind11::gil_scoped_release no_gil;
    result = add_rms_norm(x, residual, weight, bias, options);
  }
  return pybind11::make_tuple(std::get<0>(result), std::get<1>(result)).release().ptr();
  END_HANDLE_TH_ERRORS
}

// (input, residual, weight, bias, eps, p, weight_offset, casting_mode) -> None
PyObject* py_add_rms_norm_(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 4 + kOptions);
  Tensor x = tensor(args[0], "input"), residual = tensor(args[1], "residual");
  const OptTensor weight = optional_tensor(args[2], "weight"), bias = optional_tensor(args[3], "bias");
  const Options options = options_from(args + 4);
  {
    const pybind11::gil_scoped_release no_gil;
    add_rms_norm_(x, residual, weight, bias, options);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// (value, name) -> float, or what the operators raise for such a value of argument `name`
PyObject* py_number(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  expect(count, 2);
  return PyFloat_FromDouble(number(args[0], PyUnicode_AsUTF8(args[1])));
  END_HANDLE_TH_ERRORS
}

template <class Function>
PyCFunction as_method(Function f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"rms_norm", as_method(py_norm<rms_norm>), METH_FASTCALL, nullptr},
    {"composite_rms_norm", as_method(py_norm<rms_norm_composite>), METH_FASTCALL, nullptr},
    {"rms_norm_gated", as_method(py_norm_gated<rms_norm_gated>), METH_FASTCALL, nullptr},
    {"composite_rms_norm_gated", as_method(py_norm_gated<rms_norm_gated_composite>), METH_FASTCALL, nullptr},
    {"add_rms_norm", as_method(py_add_rms_norm), METH_FASTCALL, nullptr},
    {"add_rms_norm_", as_method(py_add_rms_norm_), METH_FASTCALL, nullptr},
    {"number", as_method(py_number), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_eager", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fused_rmsnorm

PyMODINIT_FUNC PyInit__eager() {
  PyObject* module = PyModule_Create(&fused_rmsnorm::module);
  if (module) PyModule_AddStringConstant(module, "torch_version", FUSED_RMSNORM_TORCH_VERSION);
  return module;
}
