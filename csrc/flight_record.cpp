#include "flight_record.h"

#include <algorithm>

namespace adaptlr {
namespace {

int64_t acquire(const int64_t& count) { return __atomic_load_n(&count, __ATOMIC_ACQUIRE); }

/// `slots` is one more than the records that can be asked for: the writer may be at work in the slot after its last
/// published one, so the record that was there is never handed out.
std::vector<Record> read(const Record* memory, int64_t slots, const int64_t& count, int64_t since) {
  const int64_t last = acquire(count);
  const int64_t first = std::max({since, last + 1 - slots, int64_t{0}});
  std::vector<Record> copies;
  copies.reserve(static_cast<std::size_t>(std::max(last - first, int64_t{0})));
  for (int64_t i = first; i < last; ++i) copies.push_back(memory[i % slots]);
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  const int64_t overwritten = acquire(count) + 1 - slots - first;
  copies.erase(copies.begin(), copies.begin() + std::clamp(overwritten, int64_t{0}, last - first));
  return copies;
}

} // namespace

FlightRecord::FlightRecord(void* memory, int64_t capacity) {
  auto* lines = static_cast<Record*>(memory); // the first line holds the header
  ring_ = Ring{reinterpret_cast<RingHeader*>(lines), lines + 1, lines + 1 + capacity + 1, capacity + 1};
}

std::size_t FlightRecord::bytes(int64_t capacity) {
  return sizeof(Record) * static_cast<std::size_t>(1 + capacity + 1 + kEventSlots);
}

int64_t FlightRecord::notices() const { return acquire(ring_.header->notices); }
int64_t FlightRecord::written() const { return acquire(ring_.header->records); }
int64_t FlightRecord::dropped_events() const {
  return std::max(int64_t{0}, acquire(ring_.header->events) - (kEventSlots - 1));
}

std::vector<Record> FlightRecord::records(int64_t since) const {
  return read(ring_.records, ring_.slots, ring_.header->records, since);
}

std::vector<Record> FlightRecord::events(int64_t since) const {
  return read(ring_.events, kEventSlots, ring_.header->events, since);
}

} // namespace adaptlr
