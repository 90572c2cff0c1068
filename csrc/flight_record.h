// The host's side of the rings: lays them out, and reads them while a GPU writes.
#pragma once

#include "ring.h"

#include <cstddef>
#include <vector>

namespace adaptlr {

/// Appends a record on the host. `counts` is the writer's private copy of the header.
void append(const Ring& ring, const Record& record, bool event, RingHeader& counts);

class FlightRecord {
public:
  /// Lays the rings out in `memory`, which holds bytes(capacity), all zero, and outlives this
  /// object.
  FlightRecord(void* memory, int64_t capacity);

  static std::size_t bytes(int64_t capacity);

  const Ring& ring() const { return ring_; }
  int64_t notices() const;
  int64_t written() const; // records so far
  int64_t written_events() const;
  int64_t dropped_events() const; // events that newer ones have overwritten

  /// Copies of the records numbered above `since` that are still there, oldest first.
  std::vector<Record> records(int64_t since) const;
  std::vector<Record> events(int64_t since) const;

  /// The newest record that has arrived, or none.
  std::vector<Record> newest() const;

private:
  Ring ring_;
};

} // namespace adaptlr
