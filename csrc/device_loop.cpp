// DeviceLoop: one CUDA loss a step, and lr read by the optimizer's kernels.
#include "cuda.h"
#include "gradients.h"

#include <stdexcept>

namespace adaptlr {
namespace {

struct DeviceLoop {
  PyObject_HEAD PyObject* core; // a DeviceController; owns controller
  PyObject* optimizer;          // whose rates are views into the block
  PyObject* stream_of;          // device index -> raw stream
  PyObject* dtypes;             // tuple of torch dtypes, in the order of Dtype
  PyObject* tensor_type;        // torch.Tensor
  PyObject* lrs;                // list of tensors: what every group's lr is to be; or null
  PyObject* skip;               // tensor: what the optimizer's found_inf is to be; or null
  PyObject* first; // the loss that waits, alive until the kernel that reads it is launched; or null
  PyObject* grad_norm; // of the coming step, for Python to hand over; or null
  PyObject* index;     // of the device
  DeviceController* controller;
  const dlpack::ExchangeApi* exchange; // of tensor_type, or null
  long device;
  long long launched;         // control steps
  long long copied;           // of those, the ones after which snapshots were seen to
  long long events;           // that Python knows of
  unsigned long long table;   // address of the SnapshotTable; 0: no snapshots
  unsigned long long address; // of what `first` holds
  int dtype;                  // of `first`
  char flagged;               // the optimizer reads the skip flag
  char zeroes;                // it does not: gradients are zeroed instead
  char watches;               // Python wants to see every record
  Waiting waiting;
};

DeviceLoop& loop_of(PyObject* self) { return *reinterpret_cast<DeviceLoop*>(self); }

/// Python puts None where it empties a member.
bool is_empty(const PyObject* member) { return member == nullptr || member == Py_None; }

/// The code of a dtype as DLPack tells it; -1 for one that kernels do not read.
int dtype_of(const dlpack::Tensor& tensor) {
  if (tensor.type_code == dlpack::kBfloat)
    return static_cast<int>(Dtype::kBfloat16);
  if (tensor.type_code != dlpack::kFloat)
    return -1;
  switch (tensor.bits) {
  case 32:
    return static_cast<int>(Dtype::kFloat32);
  case 64:
    return static_cast<int>(Dtype::kFloat64);
  case 16:
    return static_cast<int>(Dtype::kFloat16);
  default:
    return -1;
  }
}

/// The code of a dtype, asked for through Python; -1 also for what is no tensor.
int dtype_of(const DeviceLoop& loop, PyObject* loss) {
  const Owned dtype = owned(PyObject_GetAttr(loss, ADAPTLR_NAME("dtype")));
  PyErr_Clear();
  for (Py_ssize_t code = 0; dtype && code < PyTuple_GET_SIZE(loop.dtypes); ++code)
    if (PyTuple_GET_ITEM(loop.dtypes, code) == dtype.ptr())
      return static_cast<int>(code);
  return -1;
}

/// Notes where a loss lies if the kernels can read it there: one element, on the loop's device.
bool locate(DeviceLoop& loop, PyObject* loss) {
  dlpack::Tensor tensor{};
  if (loop.exchange != nullptr && reinterpret_cast<PyObject*>(Py_TYPE(loss)) == loop.tensor_type) {
    if (loop.exchange->describe(loss, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    loop.dtype = dtype_of(tensor);
    loop.address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
    return tensor.data != nullptr && loop.dtype >= 0 && dlpack::elements_of(tensor) == 1 &&
           tensor.device_type == dlpack::kCuda && tensor.device_index == loop.device;
  }
  loop.dtype = dtype_of(loop, loss);
  if (loop.dtype < 0 || call_for_integer(loss, ADAPTLR_NAME("numel")) != 1 ||
      call_for_integer(loss, ADAPTLR_NAME("get_device")) != loop.device)
    return false;
  loop.address = static_cast<unsigned long long>(call_for_integer(loss, ADAPTLR_NAME("data_ptr")));
  return true;
}

/// Whether every group still has the lr that it was given. Asked in observe only, never in a step:
/// others set lr aside there.
bool is_bound(const DeviceLoop& loop) {
  const Owned groups = owned(param_groups_of(loop.optimizer));
  PyErr_Clear();
  if (is_empty(loop.lrs) || !groups || !PyList_Check(groups.ptr()) ||
      PyList_GET_SIZE(groups.ptr()) != PyList_GET_SIZE(loop.lrs))
    return false;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
    PyObject* group = PyList_GET_ITEM(groups.ptr(), g);
    if (PyDict_GetItem(group, ADAPTLR_NAME("lr")) != PyList_GET_ITEM(loop.lrs, g))
      return false;
  }
  return true;
}

/// Whether every step so far had one loss, so that the next one can wait at its address.
bool defers(const Waiting& waiting) { return waiting.last_count > 0 && !waiting.accumulates; }

bool is_usual(const DeviceLoop& loop) {
  const Waiting& waiting = loop.waiting;
  return waiting.count == 0 && waiting.plain && defers(waiting) &&
         !(loop.controller->flight_record().notices() & waiting.unheeded);
}

PyObject* observe(PyObject* self, PyObject* loss) {
  DeviceLoop& loop = loop_of(self);
  if (loop.waiting.suspended)
    Py_RETURN_NONE;
  if (!is_usual(loop) || !locate(loop, loss) || !is_bound(loop))
    return PyObject_CallMethodOneArg(self, ADAPTLR_NAME("observe_slowly"), loss);
  Py_INCREF(loss);
  Py_XSETREF(loop.first, loss);
  loop.waiting.count = 1;
  Py_RETURN_NONE;
}

/// Whether the optimizer's found_inf is ours already; GradScaler's own needs Python.
bool reads_our_flag(const DeviceLoop& loop) {
  const Owned flag = owned(PyObject_GetAttr(loop.optimizer, ADAPTLR_NAME("found_inf")));
  PyErr_Clear();
  return flag && flag.ptr() == loop.skip;
}

/// Whether no group was added: the kernels know those in `lrs`.
bool has_known_groups(const DeviceLoop& loop) {
  const Owned groups = owned(param_groups_of(loop.optimizer));
  PyErr_Clear();
  return groups && PyList_Check(groups.ptr()) &&
         PyList_GET_SIZE(groups.ptr()) <= PyList_GET_SIZE(loop.lrs);
}

driver::Stream current_stream(const DeviceLoop& loop) {
  void* described = nullptr;
  if (loop.exchange != nullptr && loop.exchange->current_stream != nullptr) {
    if (loop.exchange->current_stream(dlpack::kCuda, static_cast<int32_t>(loop.device),
                                      &described) != 0)
      throw pybind11::error_already_set();
    return static_cast<driver::Stream>(described);
  }
  const Owned stream = owned(PyObject_CallOneArg(loop.stream_of, loop.index));
  if (!stream)
    throw pybind11::error_already_set();
  return static_cast<driver::Stream>(PyLong_AsVoidPtr(stream.ptr()));
}

/// Launches the control step on torch's current stream; returns the notices so far.
int64_t launch(DeviceLoop& loop) {
  StepParams params{};
  Scalar& loss = params.inputs[kLoss];
  loss.address = reinterpret_cast<const void*>(loop.address);
  loss.dtype = static_cast<Dtype>(loop.dtype);
  params.grad_norm = params.applied_lr = -1.0;
  params.mean = loop.waiting.mean;
  params.zero_lr = loop.zeroes;
  const int64_t notices = loop.controller->step(current_stream(loop), params);
  Py_CLEAR(loop.first);
  ++loop.launched;
  loop.waiting.taken();
  return notices;
}

/// Zeroes all gradients if the last control step said skip. False: a Python error is set.
bool zero_gradients(PyObject* self, DeviceLoop& loop) {
  static thread_local std::vector<Range> ranges; // keeps its memory
  ranges.clear();
  Owned rest;
  const Owned groups = owned(param_groups_of(loop.optimizer));
  if (!groups || !PyList_Check(groups.ptr()) ||
      !find_gradients(groups.ptr(), loop.tensor_type, loop.exchange, ranges, rest))
    return false;
  loop.controller->zero_if_skipped(current_stream(loop), ranges);
  return !rest || owned(PyObject_CallMethodOneArg(self, ADAPTLR_NAME("zero_slowly"), rest.ptr()));
}

/// Runs what may throw, for a caller that knows Python errors only.
template <typename Function> PyObject* guarded(Function function) {
  try {
    return function();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* before_step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_hook_arguments(arguments, count))
    return nullptr;
  DeviceLoop& loop = loop_of(self);
  const bool usual = loop.waiting.plain && !loop.waiting.prepares && !is_empty(loop.first) &&
                     is_empty(loop.grad_norm) && arguments[0] == loop.optimizer &&
                     is_plain_call(arguments);
  if (!usual || (loop.flagged && !reads_our_flag(loop)) || !has_known_groups(loop))
    return step_slowly(self, arguments);
  return guarded([&]() -> PyObject* {
    const int64_t notices = launch(loop);
    if (loop.zeroes && !zero_gradients(self, loop))
      return nullptr;
    return answer(self, notices, loop.waiting.unheeded);
  });
}

PyObject* after_step(PyObject* self, PyObject* const*, Py_ssize_t) {
  DeviceLoop& loop = loop_of(self);
  // A step that is not ours must not repeat the orders of the last one that was.
  if (loop.table == 0 || loop.copied == loop.launched)
    Py_RETURN_NONE;
  loop.copied = loop.launched;
  return guarded([&]() -> PyObject* {
    const auto* table = reinterpret_cast<const SnapshotTable*>(loop.table);
    loop.controller->snapshot(current_stream(loop), table, kNoSlot);
    const bool told = loop.controller->flight_record().written_events() == loop.events;
    if (told && !loop.watches && !has_new_state(loop.waiting, loop.optimizer))
      Py_RETURN_NONE;
    return PyObject_CallMethodNoArgs(self, ADAPTLR_NAME("catch_up"));
  });
}

PyObject* zero_gradients(PyObject* self, PyObject*) {
  return guarded(
      [&] { return zero_gradients(self, loop_of(self)) ? Py_NewRef(Py_None) : nullptr; });
}

int initialise(PyObject* self, PyObject* args, PyObject*) {
  DeviceLoop& loop = loop_of(self);
  PyObject *core, *optimizer, *stream_of, *index, *dtypes, *tensor_type;
  if (!PyArg_ParseTuple(args, "OOOO!O!O!", &core, &optimizer, &stream_of, &PyLong_Type, &index,
                        &PyTuple_Type, &dtypes, &PyType_Type, &tensor_type))
    return -1;
  try {
    loop.controller = pybind11::cast<DeviceController*>(pybind11::handle(core));
  } catch (const pybind11::cast_error&) {
    PyErr_SetString(PyExc_TypeError, "core must be a DeviceController");
    return -1;
  }
  loop.exchange = dlpack::exchange_api_of(tensor_type);
  loop.device = PyLong_AsLong(index);
  Py_XSETREF(loop.core, Py_NewRef(core));
  Py_XSETREF(loop.optimizer, Py_NewRef(optimizer));
  Py_XSETREF(loop.stream_of, Py_NewRef(stream_of));
  Py_XSETREF(loop.index, Py_NewRef(index));
  Py_XSETREF(loop.dtypes, Py_NewRef(dtypes));
  Py_XSETREF(loop.tensor_type, Py_NewRef(tensor_type));
  loop.waiting.mean = 1;
  loop.waiting.entries = -1;
  return 0;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  const DeviceLoop& loop = loop_of(self);
  Py_VISIT(loop.core);
  Py_VISIT(loop.optimizer);
  Py_VISIT(loop.stream_of);
  Py_VISIT(loop.index);
  Py_VISIT(loop.dtypes);
  Py_VISIT(loop.tensor_type);
  Py_VISIT(loop.lrs);
  Py_VISIT(loop.skip);
  Py_VISIT(loop.first);
  Py_VISIT(loop.grad_norm);
  Py_VISIT(Py_TYPE(self));
  return 0;
}

int clear(PyObject* self) {
  DeviceLoop& loop = loop_of(self);
  Py_CLEAR(loop.core);
  Py_CLEAR(loop.optimizer);
  Py_CLEAR(loop.stream_of);
  Py_CLEAR(loop.index);
  Py_CLEAR(loop.dtypes);
  Py_CLEAR(loop.tensor_type);
  Py_CLEAR(loop.lrs);
  Py_CLEAR(loop.skip);
  Py_CLEAR(loop.first);
  Py_CLEAR(loop.grad_norm);
  return 0;
}

PyMethodDef methods[] = {
    {"observe", observe, METH_O, "Take one loss in; anything unusual goes to observe_slowly."},
    {"before_step", as_method(before_step), METH_FASTCALL,
     "Pre-hook: launch the control step; anything unusual goes to step_slowly."},
    {"after_step", as_method(after_step), METH_FASTCALL,
     "Post-hook: launch the snapshot kernel; news for the host goes to catch_up."},
    {"zero_gradients", zero_gradients, METH_NOARGS,
     "Zero all gradients if the step is skipped; those in several pieces go to zero_slowly."},
    {nullptr, nullptr, 0, nullptr}};

PyMemberDef members[] = {{"core", T_OBJECT_EX, offsetof(DeviceLoop, core), READONLY, nullptr},
                         {"lrs", T_OBJECT, offsetof(DeviceLoop, lrs), 0, nullptr},
                         {"skip_flag", T_OBJECT, offsetof(DeviceLoop, skip), 0, nullptr},
                         {"first", T_OBJECT, offsetof(DeviceLoop, first), 0, nullptr},
                         {"grad_norm", T_OBJECT, offsetof(DeviceLoop, grad_norm), 0, nullptr},
                         {"launched", T_LONGLONG, offsetof(DeviceLoop, launched), 0, nullptr},
                         {"copied", T_LONGLONG, offsetof(DeviceLoop, copied), 0, nullptr},
                         {"events", T_LONGLONG, offsetof(DeviceLoop, events), 0, nullptr},
                         {"address", T_ULONGLONG, offsetof(DeviceLoop, address), 0, nullptr},
                         {"table", T_ULONGLONG, offsetof(DeviceLoop, table), 0, nullptr},
                         {"watches", T_BOOL, offsetof(DeviceLoop, watches), 0, nullptr},
                         {"dtype", T_INT, offsetof(DeviceLoop, dtype), 0, nullptr},
                         {"flagged", T_BOOL, offsetof(DeviceLoop, flagged), 0, nullptr},
                         {"zeroes", T_BOOL, offsetof(DeviceLoop, zeroes), 0, nullptr},
                         ADAPTLR_WAITING_MEMBERS(offsetof(DeviceLoop, waiting)),
                         {nullptr, 0, 0, 0, nullptr}};

} // namespace

void define_device_loop(pybind11::module_& module) {
  add_loop_type(module, {"adaptlr._extension.DeviceLoop", sizeof(DeviceLoop), initialise, traverse,
                         clear, deallocate<clear>, methods, members});
}

} // namespace adaptlr
