#include "gradients.h"

namespace adaptlr {
namespace {

/// Calls a method without arguments, or reads an attribute, that is an integer; -1 for anything
/// else.
long long integer_of(Owned value) {
  const long long integer = value ? PyLong_AsLongLong(value.ptr()) : -1;
  PyErr_Clear();
  return integer;
}

/// The memory of a gradient, if it is a plain tensor in one piece.
bool find_range(PyObject* gradient, PyObject* tensor_type, Range& range) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(gradient)) != tensor_type)
    return false;
  const Owned whole = owned(PyObject_CallMethodNoArgs(gradient, ADAPTLR_NAME("is_contiguous")));
  PyErr_Clear(); // a sparse one has no such thing
  if (whole.ptr() != Py_True)
    return false;
  const long long address =
      integer_of(owned(PyObject_CallMethodNoArgs(gradient, ADAPTLR_NAME("data_ptr"))));
  range.address = reinterpret_cast<unsigned char*>(address);
  range.bytes = integer_of(owned(PyObject_GetAttr(gradient, ADAPTLR_NAME("nbytes"))));
  return address > 0 && range.bytes > 0;
}

bool add(PyObject* gradient, Owned& rest) {
  if (!rest)
    rest = owned(PyList_New(0));
  return rest && PyList_Append(rest.ptr(), gradient) == 0;
}

} // namespace

bool find_gradients(PyObject* groups, PyObject* tensor_type, std::vector<Range>& ranges,
                    Owned& rest) {
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* parameters =
        PyDict_GetItem(PyList_GET_ITEM(groups, g), ADAPTLR_NAME("params")); // borrowed
    if (parameters == nullptr || !PyList_Check(parameters)) {
      PyErr_SetString(PyExc_TypeError, "every parameter group must have a list of params");
      return false;
    }
    for (Py_ssize_t p = 0; p < PyList_GET_SIZE(parameters); ++p) {
      const Owned gradient =
          owned(PyObject_GetAttr(PyList_GET_ITEM(parameters, p), ADAPTLR_NAME("grad")));
      if (!gradient)
        return false;
      Range range{};
      if (gradient.is_none())
        continue;
      if (find_range(gradient.ptr(), tensor_type, range))
        ranges.push_back(range);
      else if (!add(gradient.ptr(), rest))
        return false;
    }
  }
  return true;
}

} // namespace adaptlr
