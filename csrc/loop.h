// What the two hot loops share. HostLoop and DeviceLoop are observe() and the optimizer's pre-hook
// for the usual case; the Python classes built on them take every other case.
//
// They are written against the C API: a call through pybind11, and each Python frame between two
// steps, costs as much as the control step itself (docs/design.md). Being real types they take part
// in garbage collection; an optimizer owns its hooks, and they must not keep it alive.
#pragma once

#include <pybind11/pybind11.h>

#include <structmember.h>

#include <cstddef>

namespace adaptlr {

// Bits of what a step answers, above the notices.
constexpr int64_t kSkipStep = int64_t{1} << 32; // the host is to take the gradients away
constexpr int64_t kNewGroups = int64_t{1} << 33;
constexpr int64_t kOrdered = int64_t{1} << 34; // snapshots have something to do after the update

/// The first members of either loop. Python's Pending describes them.
struct Waiting {
  long long count;      // losses that wait
  long long last_count; // losses that the last step used
  long long unobserved; // optimizer steps in a row without a loss
  long long unheeded;   // notices that Python must hear of
  long long entries;    // of optimizer.state, as Python knows them; negative: it need not know
  char mean;            // the loss of a step is the mean of the waiting ones; else their sum
  char cleared;         // zero_grad was called while a loss waited
  char observes_first;  // this training loop calls zero_grad between observe and backward
  char accumulates;     // some step used several losses
  char plain;           // nothing about this optimizer needs Python in every step
  char suspended;       // losses are not observed, and every step is skipped
  char prepares;        // Python has something to do before the coming step, whatever it is

  void taken() {
    last_count = count;
    accumulates |= count > 1;
    count = unobserved = 0;
    observes_first |= cleared;
    cleared = 0;
  }
};

#define ADAPTLR_WAITING_MEMBERS(offset)                                                            \
  {"count", T_LONGLONG, (offset) + offsetof(Waiting, count), 0, nullptr},                          \
      {"last_count", T_LONGLONG, (offset) + offsetof(Waiting, last_count), 0, nullptr},            \
      {"unobserved", T_LONGLONG, (offset) + offsetof(Waiting, unobserved), 0, nullptr},            \
      {"unheeded", T_LONGLONG, (offset) + offsetof(Waiting, unheeded), 0, nullptr},                \
      {"mean", T_BOOL, (offset) + offsetof(Waiting, mean), 0, nullptr},                            \
      {"cleared", T_BOOL, (offset) + offsetof(Waiting, cleared), 0, nullptr},                      \
      {"observes_first", T_BOOL, (offset) + offsetof(Waiting, observes_first), 0, nullptr},        \
      {"accumulates", T_BOOL, (offset) + offsetof(Waiting, accumulates), 0, nullptr},              \
      {"entries", T_LONGLONG, (offset) + offsetof(Waiting, entries), 0, nullptr},                  \
      {"prepares", T_BOOL, (offset) + offsetof(Waiting, prepares), 0, nullptr},                    \
      {"plain", T_BOOL, (offset) + offsetof(Waiting, plain), 0, nullptr}, {                        \
    "suspended", T_BOOL, (offset) + offsetof(Waiting, suspended), 0, nullptr                       \
  }

/// A reference that is given up at the end of its scope; may be empty.
using Owned = pybind11::object;

inline Owned owned(PyObject* reference) {
  return pybind11::reinterpret_steal<pybind11::object>(reference);
}

/// A name for attribute look-ups, made once.
#define ADAPTLR_NAME(name)                                                                         \
  ([]() -> PyObject* {                                                                             \
    static PyObject* const interned = PyUnicode_InternFromString(name);                            \
    return interned;                                                                               \
  }())

/// The integer that a call or an attribute gave; -1 for anything else, and for a Python error.
inline long long integer_of(const Owned& value) {
  const long long integer = value ? PyLong_AsLongLong(value.ptr()) : -1;
  PyErr_Clear();
  return integer;
}

/// Calls a method without arguments that returns an integer.
inline long long call_for_integer(PyObject* object, PyObject* name) {
  return integer_of(owned(PyObject_CallMethodNoArgs(object, name)));
}

/// Whether `before_step` was called as optimizer.step() calls it, and without a closure.
inline bool is_plain_call(PyObject* const* arguments) {
  return PyTuple_GET_SIZE(arguments[1]) == 1 && PyDict_GET_SIZE(arguments[2]) == 0;
}

/// Checks the arguments that torch hands to a pre-hook: (optimizer, args, kwargs).
inline bool check_hook_arguments(PyObject* const* arguments, Py_ssize_t count) {
  if (count == 3 && PyTuple_Check(arguments[1]) && PyDict_Check(arguments[2]))
    return true;
  PyErr_SetString(PyExc_TypeError, "before_step takes (optimizer, args, kwargs)");
  return false;
}

/// Leaves the step to Python.
inline PyObject* step_slowly(PyObject* self, PyObject* const* arguments) {
  return PyObject_CallMethodObjArgs(self, ADAPTLR_NAME("step_slowly"), arguments[0], arguments[1],
                                    arguments[2], nullptr);
}

/// Tells Python what a step asks of it, if it asks anything.
inline PyObject* answer(PyObject* self, int64_t code, int64_t heeded) {
  if (!(code & heeded))
    Py_RETURN_NONE;
  const Owned number = owned(PyLong_FromLongLong(code));
  return number ? PyObject_CallMethodOneArg(self, ADAPTLR_NAME("answer"), number.ptr()) : nullptr;
}

inline PyObject* param_groups_of(PyObject* optimizer) {
  return PyObject_GetAttr(optimizer, ADAPTLR_NAME("param_groups"));
}

/// Whether the optimizer has state that Python has not seen: new tensors for snapshots.
inline bool has_new_state(const Waiting& waiting, PyObject* optimizer) {
  if (waiting.entries < 0)
    return false;
  const Owned state = owned(PyObject_GetAttr(optimizer, ADAPTLR_NAME("state")));
  const Py_ssize_t entries = state ? PyObject_Size(state.ptr()) : -1;
  PyErr_Clear();
  return entries != waiting.entries;
}

template <typename Function> PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

/// Ends an object of a loop type, once `Clear` has given up its references.
template <inquiry Clear> void deallocate(PyObject* self) {
  PyObject_GC_UnTrack(self);
  Clear(self);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

/// What the two types differ in.
struct LoopType {
  const char* name; // with its module
  std::size_t size;
  initproc initialise;
  traverseproc traverse;
  inquiry clear;
  destructor deallocate;
  PyMethodDef* methods;
  PyMemberDef* members;
};

/// Makes a type that Python classes can build on, and adds it to the module.
void add_loop_type(pybind11::module_& module, const LoopType& type);

void define_host_loop(pybind11::module_& module);
void define_device_loop(pybind11::module_& module);

} // namespace adaptlr
