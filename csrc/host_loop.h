// The part of the host path that runs in every step.
#pragma once

#include <pybind11/pybind11.h>

namespace adaptlr {

// Bits of what a step answers, above the notices.
constexpr int64_t kSkipStep = int64_t{1} << 32;
constexpr int64_t kNewGroups = int64_t{1} << 33;

/// Adds the type HostLoop to the module. HostController must be there already.
void define_host_loop(pybind11::module_& module);

} // namespace adaptlr
