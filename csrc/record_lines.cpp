#include "record_lines.h"

#include <algorithm>
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

/// Nine digits give a float32 back. Not std::to_chars, which came late to many standard libraries.
void append(std::string& text, double value) {
  char digits[32];
  const int length = std::snprintf(digits, sizeof(digits), "%.9g", value);
  std::replace(digits, digits + length, ',', '.'); // where the program has set a locale
  text.append(digits, static_cast<std::size_t>(length));
}

} // namespace

std::string record_lines(const Record* records, std::size_t count) {
  std::string text;
  text.reserve(count * 160);
  for (const Record* record = records; record != records + count; ++record) {
    text += "{\"step\":" + std::to_string(record->step);
    for (const Number& number : kNumbers) {
      text += number.start;
      append(text, record->*number.field);
    }
    text += "}\n";
  }
  return text;
}

} // namespace adaptlr
