#include "gradients.h"

namespace adaptlr {
namespace {

/// The memory of a tensor, asked for through Python; empty where it is not in one piece.
Range asked_range(PyObject* tensor) {
  const Owned whole = owned(PyObject_CallMethodNoArgs(tensor, ADAPTLR_NAME("is_contiguous")));
  PyErr_Clear(); // a sparse one has no such thing
  if (whole.ptr() != Py_True)
    return Range{};
  const long long address = call_for_integer(tensor, ADAPTLR_NAME("data_ptr"));
  const long long bytes = integer_of(owned(PyObject_GetAttr(tensor, ADAPTLR_NAME("nbytes"))));
  return Range{reinterpret_cast<unsigned char*>(address), bytes};
}

Range described_range(PyObject* tensor, const dlpack::ExchangeApi& api) {
  dlpack::Tensor description{};
  if (api.describe(tensor, &description) != 0) {
    PyErr_Clear();
    return Range{};
  }
  if (!dlpack::is_contiguous(description))
    return Range{};
  auto* data = static_cast<unsigned char*>(description.data) + description.byte_offset;
  return Range{data, dlpack::bytes_of(description)};
}

bool add(PyObject* gradient, Owned& rest) {
  if (!rest)
    rest = owned(PyList_New(0));
  return rest && PyList_Append(rest.ptr(), gradient) == 0;
}

} // namespace

bool find_gradients(PyObject* groups, PyObject* tensor_type, const dlpack::ExchangeApi* api,
                    std::vector<Range>& ranges, Owned& rest) {
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
      if (gradient.is_none())
        continue;
      Range range{};
      if (reinterpret_cast<PyObject*>(Py_TYPE(gradient.ptr())) == tensor_type)
        range =
            api != nullptr ? described_range(gradient.ptr(), *api) : asked_range(gradient.ptr());
      if (range.address != nullptr && range.bytes > 0)
        ranges.push_back(range);
      else if (!add(gradient.ptr(), rest))
        return false;
    }
  }
  return true;
}

} // namespace adaptlr
