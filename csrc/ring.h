// The flight record: a ring of records and a ring of events, written by the control step and read by the host while
// the run goes on. One writer; readers never make it wait.
//
// A seqlock over the whole ring: the writer fills a slot, then publishes the new count; a reader copies what the count
// covers, reads the count again and drops the slots that may have been overwritten meanwhile. Events are records too,
// kept apart so that the stream of ordinary records cannot push them out.
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

/// Where the rings are. The counts are the writer's own: it never reads back what it published.
struct Ring {
  RingHeader* header;
  Record* records;
  Record* events;
  int64_t slots; // of records: one more than can be read
};

ADAPTLR_HOST_DEVICE inline void publish_fence() {
#ifdef __CUDA_ARCH__
  __threadfence_system();
#else
  __atomic_thread_fence(__ATOMIC_RELEASE);
#endif
}

ADAPTLR_HOST_DEVICE inline int64_t notices_of(const Record& record) {
  const bool failed = record.phase == static_cast<int32_t>(Phase::kFailed);
  return (record.flags & (kEnded | kOverwritten)) | (failed ? kFailedNotice : 0);
}

/// Appends a record, and publishes it. `counts` is the writer's private copy of the header.
ADAPTLR_HOST_DEVICE inline void append(const Ring& ring, const Record& record, bool event, RingHeader& counts) {
  Record line = record;
  line.sequence = counts.records + 1;
  ring.records[counts.records % ring.slots] = line;
  if (event) {
    line.sequence = counts.events + 1;
    ring.events[counts.events % kEventSlots] = line;
    counts.events += 1;
  }
  counts.records += 1;
  counts.notices |= notices_of(record);
  publish_fence();
  volatile RingHeader* header = ring.header;
  header->events = counts.events;
  header->notices = counts.notices;
  header->records = counts.records;
}

} // namespace adaptlr
