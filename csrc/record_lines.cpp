#include "record_lines.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace adaptlr {
namespace {

struct Number {
  const char* start; // of the JSON before it
  double Record::* field;
};

constexpr Number kNumbers[] = {
    {",\"loss\":", &Record::loss},
    {",\"level\":", &Record::level},
    {",\"scale\":", &Record::scale},
    {",\"slope\":", &Record::slope},
    {",\"t_statistic\":", &Record::t_statistic},
    {",\"lr\":", &Record::lr},
    {",\"factor\":", &Record::factor},
};
constexpr std::size_t kUsualLine = 176; // bytes, more than most lines have
constexpr int kDigits = 9;              // significant ones; they give a float32 back

/// What printf's "%.9g" writes where no locale is set.
void append_finite(std::string& text, double value) {
  char digits[32];
#ifdef __cpp_lib_to_chars // which came late to many standard libraries
  const auto written =
      std::to_chars(digits, digits + sizeof(digits), value, std::chars_format::general, kDigits);
  text.append(digits, written.ptr);
#else
  const int length = std::snprintf(digits, sizeof(digits), "%.*g", kDigits, value);
  std::replace(digits, digits + length, ',', '.'); // where the program has set a locale
  text.append(digits, static_cast<std::size_t>(length));
#endif
}

/// JSON has no numbers that are not finite.
void append(std::string& text, double value) {
  if (std::isfinite(value))
    append_finite(text, value);
  else
    text += std::isnan(value) ? "\"NaN\"" : value > 0 ? "\"Infinity\"" : "\"-Infinity\"";
}

void append_numbers(std::string& text, const Record& record) {
  char step[24];
  text += "{\"step\":";
  text.append(step, std::to_chars(step, step + sizeof(step), record.step).ptr);
  for (const Number& number : kNumbers) {
    text += number.start;
    append(text, record.*number.field);
  }
}

} // namespace

uint64_t code_of(const Record& record) {
  const auto bits = [](int16_t value) {
    return static_cast<uint64_t>(static_cast<uint16_t>(value));
  };
  return bits(record.phase) << 32 | bits(record.flags) << 16 | bits(record.action);
}

std::map<uint64_t, std::size_t> codes_in(const Record* records, std::size_t count) {
  std::map<uint64_t, std::size_t> found;
  for (std::size_t i = 0; i < count; ++i)
    if (const uint64_t code = code_of(records[i]))
      found.emplace(code, i);
  return found;
}

std::string record_lines(const Record* records, std::size_t count, const std::string& first,
                         const Words& words) {
  std::string text;
  text.reserve(count * kUsualLine);
  for (const Record* record = records; record != records + count; ++record) {
    append_numbers(text, *record);
    if (record == records)
      text += first;
    if (!std::isnan(record->grad_norm)) {
      text += ",\"grad_norm\":";
      append(text, record->grad_norm);
    }
    if (const uint64_t code = code_of(*record))
      text += words.at(code);
    text += "}\n";
  }
  return text;
}

} // namespace adaptlr
