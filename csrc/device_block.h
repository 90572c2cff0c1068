// What lives on the GPU, and what the kernels are launched with. Host and device share these
// layouts.
#pragma once

#include "ring.h"

namespace adaptlr {

/// A number on the device that a kernel reads.
enum class Dtype : int32_t { kFloat32, kFloat64, kFloat16, kBfloat16 };
constexpr int32_t kDtypes = 4;
struct Scalar {
  const void* address; // 0: none
  Dtype dtype;
  int32_t reserved;
};

/// Losses folded in since the last control step, less the one that the step reads by itself.
struct PendingLosses {
  double sum;
  int64_t count;
};

/// The writer's side of the ring: what it has published, and the slots that come next. Keeping the
/// slots saves two 64-bit divisions, which a GPU has no instruction for.
struct RingCursor {
  int64_t records;
  int64_t events;
  int64_t notices;
  int32_t next_record;
  int32_t next_event;
};
static_assert(sizeof(RingCursor) == sizeof(RingHeader), "the cursor is published as a header");

/// A stretch of memory. Its address needs no alignment.
struct Range {
  unsigned char* address;
  int64_t bytes;
};

/// All that a controller keeps on its device. The order serves the control step: what it changes
/// comes first, then what it only reads, so that its threads move either in one or two wide
/// accesses.
struct alignas(16) DeviceBlock {
  State state;
  PendingLosses pending;
  RingCursor cursor;
  Ring ring;
  Config config;
  float lr[kMaxGroups];      // what the optimizer's kernels read
  float written[kMaxGroups]; // what the last control step wrote there; differs: another writer
  float skip;            // 1: the coming update is skipped (found_inf of fused optimizers); or 0
  int32_t save, restore; // as in the last Decision
  State saved[kSavedStates]; // beside the snapshots; read and written with those only
  Range* moments;            // the optimizer's first moments, which some cuts zero
  int64_t moment_count;
};

constexpr unsigned kVectorBytes = 16; // of the widest access of a lane
constexpr unsigned kLanes = 32;
/// Of the control step, a warp each.
enum Part : unsigned { kCurvePart, kProgressPart, kSchedulePart, kParts };
constexpr unsigned kThreads = kParts * kLanes;
// Spelt out because NVRTC has no offsetof; bindings.cpp checks them.
constexpr unsigned kChangedBytes = sizeof(State) + sizeof(PendingLosses) + sizeof(RingCursor);
constexpr unsigned kStagedBytes = kChangedBytes + sizeof(Ring) + sizeof(Config);
constexpr unsigned kAccessBytes = kThreads * kVectorBytes; // of all threads
constexpr unsigned kLoads = (kStagedBytes + kAccessBytes - 1) / kAccessBytes;
static_assert(kChangedBytes % kVectorBytes == 0, "what a step changes is stored in whole vectors");
static_assert(kLoads * kAccessBytes <= sizeof(DeviceBlock), "the last load stays in the block");
static_assert(kMaxGroups == 2 * kLanes, "a lane looks after two groups");

/// The scalars that a control step reads, one lane each.
enum Input {
  kLoss,     // the last loss; earlier ones are in block->pending
  kGradNorm, // before clipping
  kFoundInf, // GradScaler's; > 0: it found an infinite gradient
  kInputs
};

/// Of adaptlr_control_step and adaptlr_empty.
struct StepParams {
  DeviceBlock* block;
  Scalar inputs[kInputs];
  double grad_norm;  // where there is no such input; negative: not given
  double applied_lr; // of the largest group, where the host sets the lr; negative: the kernel does
  int32_t mean;      // 1: the loss is the mean of the pending ones; 0: their sum
  int32_t zero_lr;   // 1: lr is 0 in a step that is skipped, for optimizers that read no flag
};

/// Of adaptlr_fold.
struct FoldParams {
  DeviceBlock* block;
  Scalar loss;
  int64_t restart; // 1: forgets the losses that were pending
};

/// Which members of ConfigureParams are to be taken over.
enum Field : int32_t { kSetConfig = 1, kSetState = 2, kSetRing = 4 };

/// Of adaptlr_configure. Kernel parameters are copied at the launch, so the host need not keep
/// them.
struct ConfigureParams {
  DeviceBlock* block;
  Config config;
  State state;
  Ring ring; // a new ring begins empty, with no loss pending
  int64_t fields;
};

/// Of adaptlr_zero_if; range i belongs to the thread blocks with blockIdx.y == i.
constexpr int kMaxRanges = 240;
struct ZeroParams {
  const DeviceBlock* block;
  Range ranges[kMaxRanges];
};
static_assert(sizeof(ZeroParams) <= 4096, "the parameters of a kernel are limited to 4 KiB");

/// A stretch of memory that snapshots cover, at most kPieceBytes long, and its place in every slot.
/// All addresses are equal modulo 16, so that one vector access fits all of them.
struct Piece {
  unsigned char* address;
  int64_t bytes;
  unsigned char* copies[kSlots]; // of slot s: copies[s - 1]; 0: there is no such slot
};
constexpr int64_t kPieceBytes = 64 * 1024;

/// Lies in device memory and not in the kernel's parameters, so that pieces can be added after a
/// graph was captured.
struct SnapshotTable {
  const Piece* pieces;
  int64_t count;
};

/// Of adaptlr_snapshot.
struct SnapshotParams {
  const DeviceBlock* block;
  const SnapshotTable* table;
  int64_t fill; // the Slot that is filled whatever the block says; kNoSlot: the block decides
};

} // namespace adaptlr
