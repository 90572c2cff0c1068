#include "flight_record.h"

#include <algorithm>
#include <cstring>

namespace adaptlr {
namespace {

constexpr int64_t kArriving = 8; // lines that the count may be ahead of

int64_t acquire(const int64_t& count) { return __atomic_load_n(&count, __ATOMIC_ACQUIRE); }

/// Of all words but the last, where the checksum itself lies.
uint64_t checksum_of(const Record& record) {
  uint64_t words[kLineWords];
  std::memcpy(words, &record, sizeof(words));
  uint64_t checksum = 0;
  for (unsigned place = 0; place + 1 < kLineWords; ++place)
    checksum ^= turned(words[place], place);
  return checksum;
}

Record sealed(Record line, int64_t sequence) {
  line.sequence = sequence;
  line.checksum = checksum_of(line);
  return line;
}

/// A line may not have arrived yet, or be in the middle of being overwritten.
bool is_whole(const Record& line, int64_t sequence) {
  return line.sequence == sequence && line.checksum == checksum_of(line);
}

/// `slots` is one more than the records that can be asked for, as the writer may be at work in one.
std::vector<Record> read(const Record* memory, int64_t slots, const int64_t& count, int64_t since) {
  const int64_t last = acquire(count);
  const int64_t first = std::max({since, last + 1 - slots, int64_t{0}});
  std::vector<Record> copies;
  copies.reserve(static_cast<std::size_t>(std::max(last - first, int64_t{0})));
  for (int64_t i = first; i < last; ++i) {
    const Record line = memory[i % slots];
    // The copy must be what is checked and kept: without a fence a compiler may read memory again.
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (is_whole(line, i + 1))
      copies.push_back(line);
  }
  return copies;
}

/// A thread that sees a count sees the lines that it counts, where this one writes them.
void publish(const RingHeader& counts, RingHeader& header) {
  const auto release = [](int64_t value, int64_t& place) {
    __atomic_store_n(&place, value, __ATOMIC_RELEASE);
  };
  release(counts.records, header.records);
  release(counts.events, header.events);
  release(counts.notices, header.notices);
}

} // namespace

void append(const Ring& ring, const Record& record, bool event, RingHeader& counts) {
  ring.records[counts.records % ring.slots] = sealed(record, counts.records + 1);
  if (event) {
    ring.events[counts.events % kEventSlots] = sealed(record, counts.events + 1);
    counts.events += 1;
  }
  counts.records += 1;
  counts.notices |= notices_of(record, event);
  publish(counts, *ring.header);
}

FlightRecord::FlightRecord(void* memory, int64_t capacity) {
  auto* lines = static_cast<Record*>(memory); // the first line holds the header
  ring_ =
      Ring{reinterpret_cast<RingHeader*>(lines), lines + 1, lines + 1 + capacity + 1, capacity + 1};
}

std::size_t FlightRecord::bytes(int64_t capacity) {
  return sizeof(Record) * static_cast<std::size_t>(1 + capacity + 1 + kEventSlots);
}

int64_t FlightRecord::notices() const { return acquire(ring_.header->notices); }
int64_t FlightRecord::written() const { return acquire(ring_.header->records); }
int64_t FlightRecord::written_events() const { return acquire(ring_.header->events); }

int64_t FlightRecord::dropped_events() const {
  return std::max(int64_t{0}, written_events() - (kEventSlots - 1));
}

std::vector<Record> FlightRecord::records(int64_t since) const {
  return read(ring_.records, ring_.slots, ring_.header->records, since);
}

std::vector<Record> FlightRecord::newest() const {
  std::vector<Record> lines = records(written() - kArriving);
  if (!lines.empty())
    lines.erase(lines.begin(), lines.end() - 1);
  return lines;
}

std::vector<Record> FlightRecord::events(int64_t since) const {
  return read(ring_.events, kEventSlots, ring_.header->events, since);
}

} // namespace adaptlr
