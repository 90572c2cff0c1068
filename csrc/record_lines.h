// Records as lines of a recording.
#pragma once

#include "state.h"

#include <cstddef>
#include <map>
#include <string>

namespace adaptlr {

/// Phase, flags and action of a record as one number; 0: it has nothing to say but numbers.
uint64_t code_of(const Record& record);

/// What records of these codes say in words: JSON that goes behind their numbers.
using Words = std::map<uint64_t, std::string>;

/// The first record of every code but 0.
std::map<uint64_t, std::size_t> codes_in(const Record* records, std::size_t count);

/// Writes a line of JSON for each record; adaptlr/lines.py says what is in a line. `first` goes
/// behind the numbers of the first one, and `words` has all codes but 0.
std::string record_lines(const Record* records, std::size_t count, const std::string& first,
                         const Words& words);

} // namespace adaptlr
