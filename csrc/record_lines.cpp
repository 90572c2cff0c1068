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

constexpr double kPowers[] = {1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12};

/// What printf's "%.9g" writes where no locale is set.
void append_exactly(std::string& text, double value) {
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

/// The same text at a third of the time of std::to_chars, for values of a usual size; false where
/// this cannot be told. The powers are exact, so nine digits before the point are wrong by 6e-8 at
/// most, and what is further from a half than that is rounded as the value itself would be.
bool append_quickly(std::string& text, double value) {
  const double size = std::fabs(value);
  if (!(size >= 1e-4 && size < 1e9))
    return false;
  int decimals = 0;
  while (size * kPowers[decimals] < 1e8)
    ++decimals;
  const double scaled = size * kPowers[decimals];
  auto digits = static_cast<uint32_t>(scaled);
  const double rest = scaled - digits;
  digits += rest > 0.5;
  if (std::fabs(rest - 0.5) < 1e-6 || digits == 1000000000)
    return false;
  for (; decimals > 0 && digits % 10 == 0; --decimals)
    digits /= 10;
  char written[24]; // from its end
  char* place = written + sizeof(written);
  while (digits > 0 || decimals >= 0) {
    *--place = static_cast<char>('0' + digits % 10);
    digits /= 10;
    if (--decimals == 0)
      *--place = '.';
  }
  if (value < 0)
    *--place = '-';
  text.append(place, written + sizeof(written));
  return true;
}

void append_finite(std::string& text, double value) {
  if (!append_quickly(text, value))
    append_exactly(text, value);
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
