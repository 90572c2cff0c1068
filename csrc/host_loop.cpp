// HostLoop: observe() and the optimizer's pre-hook for the usual case, one tensor loss a step and
// lr as a Python float. A base class of adaptlr's HostPath, whose Python methods take every other
// case.
//
// Written against the C API: a call through pybind11, and each Python frame between two steps,
// costs as much as the control step itself (docs/design.md). Being a real type it takes part in
// garbage collection; an optimizer owns its hooks, and they must not keep it alive.
#include "host_loop.h"

#include "cpu.h"

#include <structmember.h>

#include <cstddef>

namespace adaptlr {
namespace {

struct HostLoop {
  PyObject_HEAD PyObject* core; // a HostController; owns controller
  PyObject* written;            // list: the lr objects of the last step, one a group
  HostController* controller;
  double total;         // sum of the waiting losses
  double grad_norm;     // of the coming step; negative: not given
  long long count;      // losses that wait
  long long last_count; // losses that the last step used
  long long unobserved; // steps in a row without a loss
  long long unheeded;   // notices that Python must hear of
  char mean;            // the loss of a step is the mean of the waiting ones; else their sum
  char cleared;         // zero_grad was called while a loss waited
  char observes_first;  // this training loop calls zero_grad between observe and backward
  char plain;           // lr is a float in every group, and there is no GradScaler to ask
};

struct Names {
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* item = PyUnicode_InternFromString("item");
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* param_groups = PyUnicode_InternFromString("param_groups");
  PyObject* observe_slowly = PyUnicode_InternFromString("observe_slowly");
  PyObject* step_slowly = PyUnicode_InternFromString("step_slowly");
  PyObject* answer = PyUnicode_InternFromString("answer");
};

const Names& names() {
  static const Names names;
  return names;
}

/// Reads the one element of a CPU tensor; false, and no error set, for anything else.
bool read_loss(PyObject* loss, double& value) {
  PyObject* on_cpu = PyObject_GetAttr(loss, names().is_cpu);
  PyObject* item = on_cpu == Py_True ? PyObject_CallMethodNoArgs(loss, names().item) : nullptr;
  const bool read = item != nullptr && PyFloat_CheckExact(item);
  if (read)
    value = PyFloat_AS_DOUBLE(item);
  Py_XDECREF(item);
  Py_XDECREF(on_cpu);
  PyErr_Clear();
  return read;
}

PyObject* observe(PyObject* self, PyObject* loss) {
  auto& loop = *reinterpret_cast<HostLoop*>(self);
  if (loop.count != 0 || !read_loss(loss, loop.total))
    return PyObject_CallMethodOneArg(self, names().observe_slowly, loss);
  loop.count = 1;
  Py_RETURN_NONE;
}

/// Whether something else has put another object in place of the lr that was written last.
bool was_overwritten(const HostLoop& loop, PyObject* groups) {
  const Py_ssize_t count = PyList_GET_SIZE(groups);
  for (Py_ssize_t g = 0; g < count; ++g)
    if (PyDict_GetItem(PyList_GET_ITEM(groups, g), names().lr) != PyList_GET_ITEM(loop.written, g))
      return true;
  return false;
}

bool write_lrs(const HostLoop& loop, PyObject* groups, double multiplier) {
  const Py_ssize_t count = PyList_GET_SIZE(groups);
  for (Py_ssize_t g = 0; g < count; ++g) {
    PyObject* lr = PyFloat_FromDouble(loop.controller->config.peaks[g] * multiplier);
    if (lr == nullptr || PyDict_SetItem(PyList_GET_ITEM(groups, g), names().lr, lr) != 0) {
      Py_XDECREF(lr);
      return false;
    }
    PyList_SetItem(loop.written, g, lr); // takes the reference over
  }
  return true;
}

/// The control step for `groups`; -1 with an error set.
int64_t step(HostLoop& loop, PyObject* groups) {
  const bool divide = loop.mean && loop.count != 1;
  const double loss = divide ? loop.total / static_cast<double>(loop.count) : loop.total;
  const bool overwritten = was_overwritten(loop, groups);
  const Decision decision =
      loop.controller->step(Signals{loss, loop.grad_norm, -1.0, false, overwritten});
  loop.grad_norm = -1.0;
  loop.last_count = loop.count;
  loop.count = loop.unobserved = 0;
  loop.observes_first |= loop.cleared;
  loop.cleared = 0;
  if (!write_lrs(loop, groups, decision.multiplier))
    return -1;
  const int64_t skip = decision.action == Action::kSkip ? kSkipStep : 0;
  return loop.controller->flight_record().notices() | skip;
}

bool is_usual(const HostLoop& loop, PyObject* args, PyObject* kwargs) {
  return loop.count != 0 && loop.plain && PyTuple_GET_SIZE(args) == 1 &&
         PyDict_GET_SIZE(kwargs) == 0;
}

/// The pre-hook: (optimizer, args, kwargs) -> None, or what step_slowly returns.
PyObject* before_step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(arguments[1]) || !PyDict_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError, "before_step takes (optimizer, args, kwargs)");
    return nullptr;
  }
  auto& loop = *reinterpret_cast<HostLoop*>(self);
  PyObject* groups = nullptr;
  if (is_usual(loop, arguments[1], arguments[2])) {
    groups = PyObject_GetAttr(arguments[0], names().param_groups);
    if (groups == nullptr)
      return nullptr;
  }
  const bool known = groups != nullptr && PyList_Check(groups) &&
                     PyList_GET_SIZE(groups) <= loop.controller->config.group_count;
  if (!known) {
    Py_XDECREF(groups);
    return PyObject_CallMethodObjArgs(self, names().step_slowly, arguments[0], arguments[1],
                                      arguments[2], nullptr);
  }
  const int64_t code = step(loop, groups);
  Py_DECREF(groups);
  if (code == -1)
    return nullptr;
  if (!(code & (loop.unheeded | kSkipStep)))
    Py_RETURN_NONE;
  PyObject* number = PyLong_FromLongLong(code);
  PyObject* answered = number ? PyObject_CallMethodOneArg(self, names().answer, number) : nullptr;
  Py_XDECREF(number);
  return answered;
}

int initialise(PyObject* self, PyObject* args, PyObject*) {
  auto& loop = *reinterpret_cast<HostLoop*>(self);
  PyObject* core = nullptr;
  if (!PyArg_ParseTuple(args, "O", &core))
    return -1;
  try {
    loop.controller = pybind11::cast<HostController*>(pybind11::handle(core));
  } catch (const pybind11::cast_error&) {
    PyErr_SetString(PyExc_TypeError, "core must be a HostController");
    return -1;
  }
  Py_INCREF(core);
  Py_XSETREF(loop.core, core);
  Py_XSETREF(loop.written, PyList_New(0));
  loop.grad_norm = -1.0;
  loop.mean = 1;
  return loop.written == nullptr ? -1 : 0;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  auto& loop = *reinterpret_cast<HostLoop*>(self);
  Py_VISIT(loop.core);
  Py_VISIT(loop.written);
  Py_VISIT(Py_TYPE(self));
  return 0;
}

int clear(PyObject* self) {
  auto& loop = *reinterpret_cast<HostLoop*>(self);
  Py_CLEAR(loop.core);
  Py_CLEAR(loop.written);
  return 0;
}

void deallocate(PyObject* self) {
  PyObject_GC_UnTrack(self);
  clear(self);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

template <typename Function> PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"observe", observe, METH_O, "Take one loss in; anything unusual goes to observe_slowly."},
    {"before_step", as_method(before_step), METH_FASTCALL,
     "Pre-hook: run the control step; anything unusual goes to step_slowly, its answer to answer."},
    {nullptr, nullptr, 0, nullptr}};

constexpr const char* kNoDoc = nullptr;
PyMemberDef members[] = {{"core", T_OBJECT_EX, offsetof(HostLoop, core), READONLY, kNoDoc},
                         {"written", T_OBJECT_EX, offsetof(HostLoop, written), READONLY, kNoDoc},
                         {"total", T_DOUBLE, offsetof(HostLoop, total), 0, kNoDoc},
                         {"grad_norm", T_DOUBLE, offsetof(HostLoop, grad_norm), 0, kNoDoc},
                         {"count", T_LONGLONG, offsetof(HostLoop, count), 0, kNoDoc},
                         {"last_count", T_LONGLONG, offsetof(HostLoop, last_count), 0, kNoDoc},
                         {"unobserved", T_LONGLONG, offsetof(HostLoop, unobserved), 0, kNoDoc},
                         {"unheeded", T_LONGLONG, offsetof(HostLoop, unheeded), 0, kNoDoc},
                         {"mean", T_BOOL, offsetof(HostLoop, mean), 0, kNoDoc},
                         {"cleared", T_BOOL, offsetof(HostLoop, cleared), 0, kNoDoc},
                         {"observes_first", T_BOOL, offsetof(HostLoop, observes_first), 0, kNoDoc},
                         {"plain", T_BOOL, offsetof(HostLoop, plain), 0, kNoDoc},
                         {nullptr, 0, 0, 0, nullptr}};

PyType_Slot slots[] = {{Py_tp_doc, const_cast<char*>("The host path's hot loop; see HostPath.")},
                       {Py_tp_init, reinterpret_cast<void*>(initialise)},
                       {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
                       {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                       {Py_tp_clear, reinterpret_cast<void*>(clear)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
                       {Py_tp_methods, methods},
                       {Py_tp_members, members},
                       {0, nullptr}};

PyType_Spec spec{"adaptlr._extension.HostLoop", sizeof(HostLoop), 0,
                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};

} // namespace

void define_host_loop(pybind11::module_& module) {
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr)
    throw pybind11::error_already_set();
  module.attr("HostLoop") = pybind11::reinterpret_steal<pybind11::object>(type);
  module.attr("SKIP_STEP") = kSkipStep;
  module.attr("NEW_GROUPS") = kNewGroups;
}

} // namespace adaptlr
