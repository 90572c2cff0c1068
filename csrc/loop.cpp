#include "loop.h"

#include <cstring>

namespace adaptlr {

void add_loop_type(pybind11::module_& module, const LoopType& type) {
  PyType_Slot slots[] = {
      {Py_tp_doc, const_cast<char*>("The part of a path that runs in every step.")},
      {Py_tp_init, reinterpret_cast<void*>(type.initialise)},
      {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
      {Py_tp_traverse, reinterpret_cast<void*>(type.traverse)},
      {Py_tp_clear, reinterpret_cast<void*>(type.clear)},
      {Py_tp_dealloc, reinterpret_cast<void*>(type.deallocate)},
      {Py_tp_methods, type.methods},
      {Py_tp_members, type.members},
      {0, nullptr}};
  PyType_Spec spec{type.name, static_cast<int>(type.size), 0,
                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
  const Owned made = owned(PyType_FromSpec(&spec));
  if (!made)
    throw pybind11::error_already_set();
  module.attr(std::strrchr(type.name, '.') + 1) = made;
}

} // namespace adaptlr
