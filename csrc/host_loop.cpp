// HostLoop: one CPU loss a step, and lr as a Python float in every group.
#include "cpu.h"
#include "dlpack.h"

namespace adaptlr {
namespace {

struct HostLoop {
  PyObject_HEAD PyObject* core; // a HostController; owns controller
  PyObject* written;            // list: the lr objects of the last step, one a group
  PyObject* tensor_type;        // torch.Tensor
  HostController* controller;
  const dlpack::ExchangeApi* exchange; // of tensor_type, or null
  double total;                        // sum of the waiting losses
  double grad_norm;                    // of the coming step; negative: not given
  long long order; // for snapshots, after the update: save | restore << 4; -1: carried out
  Waiting waiting;
};

HostLoop& loop_of(PyObject* self) { return *reinterpret_cast<HostLoop*>(self); }

/// Reads the one element of a plain CPU tensor where it lies, at a third of what item() takes;
/// false for anything else.
bool read_in_place(const HostLoop& loop, PyObject* loss, double& value) {
  dlpack::Tensor tensor{};
  if (loop.exchange == nullptr || reinterpret_cast<PyObject*>(Py_TYPE(loss)) != loop.tensor_type)
    return false;
  if (loop.exchange->describe(loss, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.data == nullptr || tensor.device_type != dlpack::kCpu ||
      tensor.type_code != dlpack::kFloat || dlpack::elements_of(tensor) != 1)
    return false;
  const auto* element = static_cast<const unsigned char*>(tensor.data) + tensor.byte_offset;
  if (tensor.bits == 32)
    value = static_cast<double>(*reinterpret_cast<const float*>(element));
  else if (tensor.bits == 64)
    value = *reinterpret_cast<const double*>(element);
  return tensor.bits == 32 || tensor.bits == 64;
}

/// Reads a CPU tensor with one element, as torch reads it; false for anything else.
bool read_item(PyObject* loss, double& value) {
  const Owned on_cpu = owned(PyObject_GetAttr(loss, ADAPTLR_NAME("is_cpu")));
  Owned item;
  if (on_cpu.ptr() == Py_True)
    item = owned(PyObject_CallMethodNoArgs(loss, ADAPTLR_NAME("item")));
  if (!item || !PyFloat_CheckExact(item.ptr()))
    return false;
  value = PyFloat_AS_DOUBLE(item.ptr());
  return true;
}

/// Whether this is the only loss so far of a step that is not the first: Python looks closely at
/// the kind of loss that a loop begins with.
bool is_usual(const Waiting& waiting) { return waiting.count == 0 && waiting.last_count > 0; }

PyObject* observe(PyObject* self, PyObject* loss) {
  HostLoop& loop = loop_of(self);
  if (loop.waiting.suspended)
    Py_RETURN_NONE;
  if (!is_usual(loop.waiting) ||
      !(read_in_place(loop, loss, loop.total) || read_item(loss, loop.total))) {
    PyErr_Clear();
    return PyObject_CallMethodOneArg(self, ADAPTLR_NAME("observe_slowly"), loss);
  }
  loop.waiting.count = 1;
  Py_RETURN_NONE;
}

/// Whether something else has put another object in place of the lr that was written last.
bool was_overwritten(const HostLoop& loop, PyObject* groups) {
  const Py_ssize_t count = PyList_GET_SIZE(groups);
  for (Py_ssize_t g = 0; g < count; ++g) {
    PyObject* lr = PyDict_GetItem(PyList_GET_ITEM(groups, g), ADAPTLR_NAME("lr"));
    if (lr != PyList_GET_ITEM(loop.written, g))
      return true;
  }
  return false;
}

bool write_lrs(const HostLoop& loop, PyObject* groups, double multiplier) {
  const Py_ssize_t count = PyList_GET_SIZE(groups);
  for (Py_ssize_t g = 0; g < count; ++g) {
    Owned lr = owned(PyFloat_FromDouble(loop.controller->config.peaks[g] * multiplier));
    PyObject* group = PyList_GET_ITEM(groups, g);
    if (!lr || PyDict_SetItem(group, ADAPTLR_NAME("lr"), lr.ptr()) != 0)
      return false;
    PyList_SetItem(loop.written, g, lr.release().ptr());
  }
  return true;
}

/// The control step for `groups`.
Decision decide(HostLoop& loop, PyObject* groups) {
  Waiting& waiting = loop.waiting;
  const bool divide = waiting.mean && waiting.count != 1;
  const double loss = divide ? loop.total / static_cast<double>(waiting.count) : loop.total;
  const Signals signals{loss, loop.grad_norm, -1.0, false, was_overwritten(loop, groups)};
  loop.grad_norm = -1.0;
  waiting.taken();
  return loop.controller->step(signals);
}

/// Whether the rates of these groups can be written: `written` has a place for each.
bool are_known(const HostLoop& loop, PyObject* groups) {
  return PyList_Check(groups) && PyList_GET_SIZE(groups) <= PyList_GET_SIZE(loop.written) &&
         PyList_GET_SIZE(groups) <= loop.controller->config.group_count;
}

PyObject* before_step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_hook_arguments(arguments, count))
    return nullptr;
  HostLoop& loop = loop_of(self);
  const Waiting& waiting = loop.waiting;
  if (waiting.count == 0 || loop.order != 0 || !waiting.plain || waiting.prepares ||
      !is_plain_call(arguments) || has_new_state(waiting, arguments[0]))
    return step_slowly(self, arguments);
  const Owned groups = owned(param_groups_of(arguments[0]));
  if (!groups)
    return nullptr;
  if (!are_known(loop, groups.ptr()))
    return step_slowly(self, arguments);
  const Decision decision = decide(loop, groups.ptr());
  if (!write_lrs(loop, groups.ptr(), decision.multiplier))
    return nullptr;
  loop.order = order_of(decision);
  const int64_t skip = decision.action == Action::kSkip ? kSkipStep : 0;
  const int64_t ordered = loop.order != 0 ? kOrdered : 0;
  const int64_t code = loop.controller->flight_record().notices() | skip | ordered;
  return answer(self, code, loop.waiting.unheeded | kSkipStep | kOrdered);
}

int initialise(PyObject* self, PyObject* args, PyObject*) {
  HostLoop& loop = loop_of(self);
  PyObject *core, *tensor_type;
  if (!PyArg_ParseTuple(args, "OO!", &core, &PyType_Type, &tensor_type))
    return -1;
  try {
    loop.controller = pybind11::cast<HostController*>(pybind11::handle(core));
  } catch (const pybind11::cast_error&) {
    PyErr_SetString(PyExc_TypeError, "core must be a HostController");
    return -1;
  }
  loop.exchange = dlpack::exchange_api_of(tensor_type);
  Py_XSETREF(loop.core, Py_NewRef(core));
  Py_XSETREF(loop.tensor_type, Py_NewRef(tensor_type));
  Py_XSETREF(loop.written, PyList_New(0));
  loop.grad_norm = -1.0;
  loop.waiting.mean = 1;
  loop.waiting.entries = -1;
  return loop.written == nullptr ? -1 : 0;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(loop_of(self).core);
  Py_VISIT(loop_of(self).written);
  Py_VISIT(loop_of(self).tensor_type);
  Py_VISIT(Py_TYPE(self));
  return 0;
}

int clear(PyObject* self) {
  Py_CLEAR(loop_of(self).core);
  Py_CLEAR(loop_of(self).written);
  Py_CLEAR(loop_of(self).tensor_type);
  return 0;
}

PyMethodDef methods[] = {
    {"observe", observe, METH_O, "Take one loss in; anything unusual goes to observe_slowly."},
    {"before_step", as_method(before_step), METH_FASTCALL,
     "Pre-hook: run the control step; anything unusual goes to step_slowly."},
    {nullptr, nullptr, 0, nullptr}};

PyMemberDef members[] = {{"core", T_OBJECT_EX, offsetof(HostLoop, core), READONLY, nullptr},
                         {"written", T_OBJECT_EX, offsetof(HostLoop, written), READONLY, nullptr},
                         {"total", T_DOUBLE, offsetof(HostLoop, total), 0, nullptr},
                         {"grad_norm", T_DOUBLE, offsetof(HostLoop, grad_norm), 0, nullptr},
                         {"order", T_LONGLONG, offsetof(HostLoop, order), 0, nullptr},
                         ADAPTLR_WAITING_MEMBERS(offsetof(HostLoop, waiting)),
                         {nullptr, 0, 0, 0, nullptr}};

} // namespace

void define_host_loop(pybind11::module_& module) {
  add_loop_type(module, {"adaptlr._extension.HostLoop", sizeof(HostLoop), initialise, traverse,
                         clear, deallocate<clear>, methods, members});
  module.attr("SKIP_STEP") = kSkipStep;
  module.attr("ORDERED") = kOrdered;
  module.attr("NEW_GROUPS") = kNewGroups;
}

} // namespace adaptlr
