// The part of DLPack's C interface that tells where a tensor lies and which stream is current, as
// dlpack.h 1.3 lays it out:
// https://dmlc.github.io/dlpack/latest/c_api.html. torch offers it since 2.10. One call of it takes
// the place of three or four through Python.
#pragma once

#include "loop.h"

namespace adaptlr::dlpack {

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_index;
  int32_t dimensions;
  uint8_t type_code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides; // of elements; null: contiguous
  uint64_t byte_offset;
};

constexpr uint32_t kMajorVersion = 1;
// Values of device_type and of type_code.
constexpr int32_t kCpu = 1;
constexpr int32_t kCuda = 2;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBfloat = 4;

struct ExchangeApi {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  void* previous;
  void* allocate;
  void* export_owned;
  void* import_owned;
  int (*describe)(void* tensor, Tensor* out); // owns nothing; 0: success
  int (*current_stream)(int32_t device_type, int32_t device_index, void** out); // 0: success
};

/// That of a tensor type, or null where it has none that is known here.
inline const ExchangeApi* exchange_api_of(PyObject* tensor_type) {
  const Owned capsule =
      owned(PyObject_GetAttr(tensor_type, ADAPTLR_NAME("__dlpack_c_exchange_api__")));
  void* const pointer =
      capsule ? PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api") : nullptr;
  PyErr_Clear();
  const auto* api = static_cast<const ExchangeApi*>(pointer);
  const bool known = api != nullptr && api->version.major == kMajorVersion;
  return known && api->describe != nullptr ? api : nullptr;
}

inline bool is_contiguous(const Tensor& tensor) {
  int64_t expected = 1;
  for (int32_t d = tensor.dimensions - 1; d >= 0 && tensor.strides != nullptr; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected)
      return false;
    expected *= tensor.shape[d];
  }
  return true;
}

inline int64_t elements_of(const Tensor& tensor) {
  int64_t elements = 1;
  for (int32_t d = 0; d < tensor.dimensions; ++d)
    elements *= tensor.shape[d];
  return elements;
}

inline int64_t bytes_of(const Tensor& tensor) {
  return elements_of(tensor) * tensor.lanes * (tensor.bits / 8);
}

} // namespace adaptlr::dlpack
