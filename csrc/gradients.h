// Where the gradients of an optimizer lie in memory.
#pragma once

#include "device_block.h"
#include "dlpack.h"

#include <vector>

namespace adaptlr {

/// Finds the gradients of all parameters in `groups`. Those that are plain tensors in one piece go
/// to `ranges`; the others to `rest`, a list that is made when it is needed. `api` may be null.
/// False: a Python error is set.
bool find_gradients(PyObject* groups, PyObject* tensor_type, const dlpack::ExchangeApi* api,
                    std::vector<Range>& ranges, Owned& rest);

} // namespace adaptlr
