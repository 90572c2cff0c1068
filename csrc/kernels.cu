// The control step on the device. One block of three warps: all threads move the data, every part
// of controller.h's Measurements has a warp, one thread decides. Compiled by nvcc into a fatbin or
// by NVRTC at run time, so without any header of CUDA or of the standard library, and with
// -fmad=false, so that it rounds as the host does.
#include "device_block.h"
#include "warp_median.h"

namespace adaptlr {
namespace {

constexpr unsigned kLineVectors = sizeof(Record) / kVectorBytes;

/// Loads the aligned 8 bytes around a number, whatever its type: the lanes stay together, and their
/// loads are in flight at the same time. No allocation ends within 8 aligned bytes.
__device__ uint64_t fetch(const Scalar& scalar) {
  const uint64_t word = reinterpret_cast<uint64_t>(scalar.address) & ~7ull;
  return word != 0 ? *reinterpret_cast<const uint64_t*>(word) : 0;
}

__device__ double decode(uint64_t bits, const Scalar& scalar) {
  bits >>= 8 * (reinterpret_cast<uint64_t>(scalar.address) & 7);
  const auto low = static_cast<unsigned>(bits);
  float value = __uint_as_float(scalar.dtype == Dtype::kBfloat16 ? low << 16 : low);
  float half;
  asm("cvt.f32.f16 %0, %1;" : "=f"(half) : "h"(static_cast<unsigned short>(low)));
  value = scalar.dtype == Dtype::kFloat16 ? half : value;
  return scalar.dtype == Dtype::kFloat64 ? __longlong_as_double(static_cast<int64_t>(bits))
                                         : static_cast<double>(value);
}

/// What lane 0 hands to the others. Read in vectors.
struct alignas(kVectorBytes) Outcome {
  Record record;
  Record* record_slot;
  Record* event_slot; // 0: not an event
  double multiplier;
  bool zeroes_moments;
};

/// The pending losses as one. With none there is nothing to learn: NaN, which is skipped.
__device__ double take_loss(const StepParams& params, double last, const PendingLosses& pending) {
  const double sum = pending.sum + last;
  const int64_t count = pending.count + (params.inputs[kLoss].address != nullptr ? 1 : 0);
  if (count == 1 || (count > 1 && !params.mean))
    return sum;
  return count == 0 ? nan("") : divide(sum, static_cast<double>(count));
}

/// Claims the slots of this step's lines.
__device__ void claim(const Ring& ring, bool event, RingCursor& cursor, Outcome& outcome) {
  outcome.record.sequence = ++cursor.records;
  outcome.record_slot = ring.records + cursor.next_record;
  if (++cursor.next_record == ring.slots)
    cursor.next_record = 0;
  outcome.event_slot = event ? ring.events + cursor.next_event : nullptr;
  cursor.events += event;
  cursor.next_event += event;
  if (cursor.next_event == kEventSlots)
    cursor.next_event = 0;
}

__device__ Signals signals_of(const StepParams& params, const double* inputs, double loss,
                              bool overwritten) {
  const bool has_norm = params.inputs[kGradNorm].address != nullptr;
  const double norm = has_norm ? inputs[kGradNorm] : params.grad_norm;
  return Signals{loss, norm, params.applied_lr, inputs[kFoundInf] > 0.0, overwritten};
}

/// The work of one thread. The state stays in shared memory: what a usual step needs of it lives in
/// registers, and all else is left alone.
__device__ Decision finish(const StepParams& params, const Signals& signals,
                           const Measurements& measured, bool first, DeviceBlock& staged,
                           Outcome& outcome) {
  const Archive archive{params.block->saved};
  Record record;
  const Decision decision =
      decide(staged.config, signals, measured, first, archive, staged.state, record);
  staged.cursor.notices |= notices_of(record, decision.event);
  staged.pending = PendingLosses{0.0, 0};
  outcome.record = record;
  outcome.zeroes_moments = decision.restore == kZeroMoment;
  const bool zero = params.zero_lr && decision.action == Action::kSkip;
  outcome.multiplier = zero ? 0.0 : decision.multiplier;
  claim(staged.ring, decision.event, staged.cursor, outcome);
  return decision;
}

__device__ uint64_t join(unsigned low, unsigned high) {
  return static_cast<uint64_t>(high) << 32 | low;
}

/// Eight lanes write the record, eight more the event: one transaction over the bus each. Together
/// the eight make the line's checksum, which lies in the last word of the last of them.
__device__ void write_lines(const Outcome& outcome, const RingCursor& cursor, unsigned lane) {
  const unsigned part = lane % kLineVectors;
  const bool last = part == kLineVectors - 1;
  uint4 vector = reinterpret_cast<const uint4*>(&outcome.record)[part];
  if (lane == kLineVectors) { // the event's own sequence number
    vector.x = static_cast<unsigned>(cursor.events);
    vector.y = static_cast<unsigned>(cursor.events >> 32);
  }
  uint64_t checksum = turned(join(vector.x, vector.y), 2 * part);
  if (!last)
    checksum ^= turned(join(vector.z, vector.w), 2 * part + 1);
  for (unsigned distance = 1; distance < kLineVectors; distance *= 2)
    checksum ^= __shfl_xor_sync(kAllLanes, checksum, distance);
  if (last) {
    vector.z = static_cast<unsigned>(checksum);
    vector.w = static_cast<unsigned>(checksum >> 32);
  }
  Record* slot = lane < kLineVectors ? outcome.record_slot : outcome.event_slot;
  if (lane < 2 * kLineVectors && slot != nullptr)
    reinterpret_cast<uint4*>(slot)[part] = vector;
}

// What one warp hands to another, while neither the giver nor the third one waits. Barrier 0 is
// that of all.
constexpr int kLogLrBarrier = 1;
__device__ void give(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(2 * kLanes) : "memory");
}
__device__ void take(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(2 * kLanes) : "memory");
}

__device__ double2 peaks_of(const Config& config, unsigned lane) {
  return double2{config.peaks[2 * lane], config.peaks[2 * lane + 1]};
}

/// Two groups a lane. Those that do not exist have a peak of 0.
__device__ void write_lrs(double2 peaks, double multiplier, DeviceBlock& block, unsigned lane) {
  const float2 lrs{static_cast<float>(peaks.x * multiplier),
                   static_cast<float>(peaks.y * multiplier)};
  reinterpret_cast<float2*>(block.lr)[lane] = lrs;
  reinterpret_cast<float2*>(block.written)[lane] = lrs;
}

/// A range of memory in whole aligned vectors, and the bytes on both sides of them.
struct Split {
  int64_t head;    // bytes before the vectors
  int64_t vectors; // of kVectorBytes
  int64_t tail;    // where the bytes behind them begin
};
__device__ Split split(const unsigned char* address, int64_t bytes) {
  const auto misaligned = reinterpret_cast<unsigned long long>(address) % kVectorBytes;
  int64_t head = misaligned == 0 ? 0 : kVectorBytes - static_cast<int64_t>(misaligned);
  if (head > bytes)
    head = bytes;
  const int64_t vectors = (bytes - head) / kVectorBytes;
  return Split{head, vectors, head + vectors * kVectorBytes};
}

/// Zeroes a range together with other threads, of which there are kVectorBytes at least.
__device__ void zero(const Range& range, int64_t thread, int64_t threads) {
  const Split parts = split(range.address, range.bytes);
  auto* body = reinterpret_cast<uint4*>(range.address + parts.head);
  for (int64_t i = thread; i < parts.vectors; i += threads)
    body[i] = make_uint4(0, 0, 0, 0);
  if (thread < parts.head)
    range.address[thread] = 0;
  if (parts.tail + thread < range.bytes && thread < kVectorBytes)
    range.address[parts.tail + thread] = 0;
}

/// One block takes a while for all first moments. But a cut is rare, and a kernel of their own
/// would be a launch in every step.
__device__ ADAPTLR_RARE void zero_moments(const DeviceBlock& block, unsigned thread) {
  for (int64_t i = 0; i < block.moment_count; ++i)
    zero(block.moments[i], thread, kThreads);
}

/// Tells the host how far the rings go. In no order with the lines: those prove themselves.
__device__ void publish(const RingCursor& cursor, RingHeader* header, unsigned lane) {
  if (lane < 3) // records, events, notices
    reinterpret_cast<volatile int64_t*>(header)[lane] =
        reinterpret_cast<const int64_t*>(&cursor)[lane];
}

} // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    adaptlr_control_step(const __grid_constant__ StepParams params) {
  __shared__ DeviceBlock staged; // what the loads bring
  __shared__ Outcome outcome;
  __shared__ double inputs[kLanes];
  __shared__ Reading reading;
  __shared__ double scheduled, log_lr;
  const unsigned thread = threadIdx.x, part = thread / kLanes, lane = thread % kLanes;
  DeviceBlock& block = *params.block;

  // All loads first: the step waits for memory once.
  const auto* block_vectors = reinterpret_cast<const uint4*>(&block);
  uint4 loaded[kLoads];
#pragma unroll
  for (unsigned i = 0; i < kLoads; ++i)
    loaded[i] = block_vectors[thread + i * kThreads];
  const uint2 lrs = reinterpret_cast<const uint2*>(block.lr)[lane];
  const uint2 written = reinterpret_cast<const uint2*>(block.written)[lane];
  const Scalar input = lane < kInputs ? params.inputs[lane] : Scalar{};
  const uint64_t bits = fetch(input);

#pragma unroll
  for (unsigned i = 0; i < kLoads; ++i)
    reinterpret_cast<uint4*>(&staged)[thread + i * kThreads] = loaded[i];
  if (part == kCurvePart)
    inputs[lane] = decode(bits, input);
  const bool host_sets_lr = params.applied_lr >= 0.0;
  const bool changed = lrs.x != written.x || lrs.y != written.y;
  const bool overwritten = __any_sync(kAllLanes, changed && !host_sets_lr);
  __syncthreads();

  bool first = false;
  const double peak = staged.state.peak;
  if (peak == 0.0 || peak != staged.config.peak) { // all read that before it changes
    __syncthreads();
    if (thread == 0)
      first = begin_step(staged.config, staged.state);
    __syncthreads();
  }
  const double loss = take_loss(params, inputs[kLoss], staged.pending);
  const Signals signals = signals_of(params, inputs, loss, overwritten);
  Measurements measured{};
  if (part == kSchedulePart) {
    if (lane == 0 && watches_progress(staged.config, loss, staged.state))
      log_lr = log_lr_behind(staged.config, staged.state);
    __syncwarp();
    give(kLogLrBarrier);
    if (lane == 0)
      scheduled = schedule(staged.config, staged.state.step);
  } else if (part == kProgressPart) {
    const Differences differences = warp_differences(staged.config, loss, staged.state, lane);
    take(kLogLrBarrier);
    if (lane == 0)
      reading = measure_progress(staged.config, loss, log_lr, differences, staged.state);
  } else if (lane == 0) {
    measure_curve(signals, staged.state, measured);
  }
  __syncthreads();
  if (thread == 0) {
    measured.reading = reading;
    measured.scheduled = scheduled;
    const Decision decision = finish(params, signals, measured, first, staged, outcome);
    block.skip = decision.action == Action::kSkip ? 1.0f : 0.0f;
    block.save = decision.save;
    block.restore = outcome.zeroes_moments ? int32_t{kNoSlot} : decision.restore;
  }
  __syncthreads();
  if (part == kCurvePart) { // what goes to the host, which takes longest
    write_lines(outcome, staged.cursor, lane);
    publish(staged.cursor, staged.ring.header, lane);
  } else if (part == kSchedulePart && !host_sets_lr) {
    write_lrs(peaks_of(staged.config, lane), outcome.multiplier, block, lane);
  }
  for (unsigned i = thread; i < kChangedBytes / kVectorBytes; i += kThreads)
    reinterpret_cast<uint4*>(&block)[i] = reinterpret_cast<const uint4*>(&staged)[i];
  if (outcome.zeroes_moments)
    zero_moments(block, thread);
}

/// Launched as the control step is, to measure what the launch alone costs.
extern "C" __global__ void __launch_bounds__(kThreads) adaptlr_empty(const StepParams) {}

/// Adds one loss to the pending ones. One thread.
extern "C" __global__ void __launch_bounds__(1) adaptlr_fold(const FoldParams params) {
  PendingLosses& pending = params.block->pending;
  PendingLosses sum = params.restart ? PendingLosses{0.0, 0} : pending;
  if (params.loss.address != nullptr) {
    sum.sum += decode(fetch(params.loss), params.loss);
    sum.count += 1;
  }
  pending = sum;
}

/// Sets config, state or ring in stream order, then the lr of the coming step. One thread.
extern "C" __global__ void __launch_bounds__(1)
    adaptlr_configure(const __grid_constant__ ConfigureParams params) {
  DeviceBlock& block = *params.block;
  if (params.fields & kSetConfig)
    copy(params.config, block.config);
  if (params.fields & kSetState)
    copy(params.state, block.state);
  if (params.fields & kSetRing) {
    block.ring = params.ring;
    block.cursor = RingCursor{};
    block.pending = PendingLosses{};
  }
  block.cursor.notices = 0; // they were about what has just been replaced
  const double multiplier = block.state.factor * rare_schedule(block.config, block.state.step);
#pragma unroll 1
  for (unsigned lane = 0; lane < kLanes; ++lane)
    write_lrs(peaks_of(block.config, lane), multiplier, block, lane);
  block.skip = 0.0f;
  block.save = block.restore = kNoSlot;
}

/// Zeroes ranges of memory if the coming update is to be skipped: for optimizers that do not read
/// the flag.
extern "C" __global__ void __launch_bounds__(256) adaptlr_zero_if(const ZeroParams params) {
  if (params.block->skip == 0.0f)
    return;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  zero(params.ranges[blockIdx.y], thread, threads);
}

namespace {

/// Copies live to saved and restored to live, where those are not null; the live value is read
/// before it is replaced. One thread block; `from` is the thread's own.
template <typename T>
__device__ void exchange_each(T* live, T* saved, const T* restored, int64_t from, int64_t to) {
#pragma unroll 1
  for (int64_t i = from; i < to; i += blockDim.x) {
    if (saved != nullptr)
      saved[i] = live[i];
    if (restored != nullptr)
      live[i] = restored[i];
  }
}

/// The same in batches: the compiler must not move a load over a store, and one load in flight per
/// thread does not fill the memory's pipes.
__device__ void exchange_vectors(uint4* live, uint4* saved, const uint4* restored, int64_t count) {
  constexpr int kBatch = 4;
  const int64_t threads = blockDim.x;
  int64_t i = threadIdx.x;
#pragma unroll 1
  for (; i + (kBatch - 1) * threads < count; i += kBatch * threads) {
    uint4 leaving[kBatch], coming[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (saved != nullptr)
        leaving[k] = live[i + k * threads];
      if (restored != nullptr)
        coming[k] = restored[i + k * threads];
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (saved != nullptr)
        saved[i + k * threads] = leaving[k];
      if (restored != nullptr)
        live[i + k * threads] = coming[k];
    }
  }
  exchange_each(live, saved, restored, i, count);
}

__device__ uint4* vectors_of(unsigned char* address, int64_t head) {
  return address == nullptr ? nullptr : reinterpret_cast<uint4*>(address + head);
}

__device__ void exchange(const Piece& piece, int64_t save, int64_t restore) {
  unsigned char* saved = save == kNoSlot ? nullptr : piece.copies[save - 1];
  unsigned char* restored = restore == kNoSlot ? nullptr : piece.copies[restore - 1];
  if (saved == nullptr && restored == nullptr)
    return;
  const Split parts = split(piece.address, piece.bytes);
  exchange_each(piece.address, saved, restored, threadIdx.x, parts.head);
  exchange_vectors(vectors_of(piece.address, parts.head), vectors_of(saved, parts.head),
                   vectors_of(restored, parts.head), parts.vectors);
  exchange_each(piece.address, saved, restored, parts.tail + threadIdx.x, piece.bytes);
}

} // namespace

/// Fills and puts back the slots that the last control step has ordered, usually none. Launched
/// after the update, with a grid that does not depend on the table.
extern "C" __global__ void __launch_bounds__(256)
    adaptlr_snapshot(const __grid_constant__ SnapshotParams params) {
  const bool filling = params.fill != kNoSlot;
  const int64_t save = filling ? params.fill : params.block->save;
  const int64_t restore = filling ? kNoSlot : params.block->restore;
  if (save == kNoSlot && restore == kNoSlot)
    return;
  const SnapshotTable table = *params.table;
  for (int64_t i = blockIdx.x; i < table.count; i += gridDim.x)
    exchange(table.pieces[i], save, restore);
}

} // namespace adaptlr
