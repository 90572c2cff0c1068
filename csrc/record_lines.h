// Records as lines of a recording.
#pragma once

#include "state.h"

#include <cstddef>
#include <string>

namespace adaptlr {

/// Writes records that are finite numbers and nothing else, a line of JSON each. adaptlr/lines.py
/// says what is in a line, and writes all others.
std::string record_lines(const Record* records, std::size_t count);

} // namespace adaptlr
