// The flight record: a ring of records and a ring of events, written by the control step and read
// by the host while the run goes on. One writer; readers never make it wait, and it waits for none.
//
// Every line carries its number and a checksum. A reader copies a line and takes it only if both
// are right; so lines and counts may arrive in any order. A seqlock would need a fence between
// them, and waiting for the host bus costs a GPU as much as the whole arithmetic of a step.
// Events are records too, kept apart so that the stream of ordinary records cannot push them out.
#pragma once

#include "controller.h"

namespace adaptlr {

constexpr int64_t kEventSlots = 1024 + 1; // one is always being written

/// What the host polls. Lies in memory that both sides see, at the head of the ring.
struct RingHeader {
  int64_t records; // written so far
  int64_t events;  // written so far
  int64_t notices; // union of the flags that the host must hear of, kFailedNotice among them
  int64_t reserved;
};
constexpr int64_t kFailedNotice = 1 << 16;
constexpr int64_t kEventNotice = 1 << 17; // there is an event in its ring

/// Where the rings are. The writer counts by itself: it never reads back what it published.
struct Ring {
  RingHeader* header;
  Record* records;
  Record* events;
  int64_t slots; // of records: one more than can be read
};

constexpr unsigned kLineWords = sizeof(Record) / sizeof(uint64_t);

/// A word as it enters the checksum: turned by its place, so that words which change by the same
/// amount from line to line do not cancel.
ADAPTLR_HOST_DEVICE inline uint64_t turned(uint64_t word, unsigned place) {
  const unsigned bits = 4 * place + 1;
  return word << bits | word >> (64 - bits);
}

ADAPTLR_HOST_DEVICE inline int64_t notices_of(const Record& record, bool event) {
  const bool failed = record.phase == static_cast<int16_t>(Phase::kFailed);
  return (record.flags & (kEnded | kOverwritten | kFarLr)) | (failed ? kFailedNotice : 0) |
         (event ? kEventNotice : 0);
}

} // namespace adaptlr
