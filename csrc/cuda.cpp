#include "cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

namespace adaptlr {
namespace {

constexpr unsigned kZeroThreads = 256;
constexpr int64_t kZeroBytesPerBlock = 16 * kZeroThreads * kVectorBytes;
constexpr int64_t kMaxZeroBlocks = 64; // for one range; more would only queue
constexpr unsigned kSnapshotThreads = 256;
// On each multiprocessor: enough loads in flight to fill the memory's pipes, and few enough blocks
// that a launch which finds nothing to do stays short.
constexpr unsigned kSnapshotBlocks = 4;

DeviceBlock* checked(DeviceBlock* block) {
  const auto address = reinterpret_cast<std::uintptr_t>(block);
  if (block == nullptr || address % alignof(DeviceBlock) != 0)
    throw std::invalid_argument("block must be a device address aligned to 16 bytes, got " +
                                std::to_string(address));
  return block;
}

int64_t checked(int64_t history_size) {
  constexpr int64_t kLimit = int64_t{1} << 30; // slots are 32-bit in RingCursor
  if (history_size < 1 || history_size > kLimit)
    throw std::invalid_argument("history_size must be in [1, 2^30], got " +
                                std::to_string(history_size));
  return history_size;
}

unsigned blocks_for(const Range* first, const Range* last) {
  int64_t bytes = 0;
  for (; first != last; ++first)
    bytes = std::max(bytes, first->bytes);
  const int64_t blocks = (bytes + kZeroBytesPerBlock - 1) / kZeroBytesPerBlock;
  return static_cast<unsigned>(std::clamp(blocks, int64_t{1}, kMaxZeroBlocks));
}

} // namespace

DeviceController::Kernels::Kernels(driver::Context context, const std::string& image) {
  const driver::Module module(context, image);
  control_step = module.function("adaptlr_control_step");
  fold = module.function("adaptlr_fold");
  configure = module.function("adaptlr_configure");
  zero_if = module.function("adaptlr_zero_if");
  snapshot = module.function("adaptlr_snapshot");
  empty = module.function("adaptlr_empty");
}

void DeviceController::load(int device, const std::string& image) {
  loaded(driver::primary_context(device), image);
}

/// Kernels are never unloaded: that would have to wait for the device, and a graph may hold them.
const DeviceController::Kernels& DeviceController::loaded(driver::Context context,
                                                          const std::string& image) {
  static std::mutex mutex;
  static std::map<std::pair<driver::Context, std::string>, Kernels> kernels;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(context, image);
  auto found = kernels.find(key);
  if (found == kernels.end())
    found = kernels.emplace(key, Kernels(context, image)).first;
  return found->second;
}

DeviceController::DeviceController(int device, const std::string& image, DeviceBlock* block,
                                   const Config& config, const State& state, int64_t history_size,
                                   driver::Stream stream)
    : context_(driver::primary_context(device)), block_(checked(block)),
      kernels_(loaded(context_, image)),
      snapshot_blocks_(kSnapshotBlocks * static_cast<unsigned>(driver::multiprocessors(device))),
      history_size_(checked(history_size)), memory_(context_, FlightRecord::bytes(history_size)),
      flight_record_(memory_.host(), history_size), factor_(state.factor) {
  ConfigureParams params{block_, config, state, device_ring(), kSetConfig | kSetState | kSetRing};
  launch(kernels_.configure, {}, 1, stream, &params);
}

DeviceController::~DeviceController() {
  // A graph may be replayed long after this object is gone.
  if (captured_)
    return;
  const driver::RelaxedCapture relaxed;
  // A kernel's record is the last that it writes to the host. Where that of the last step is there,
  // no wait is needed; a context that cannot be synchronised may still run a kernel.
  const std::vector<Record> newest = flight_record_.newest();
  const int64_t arrived = newest.empty() ? 0 : newest.back().sequence;
  if (arrived < launched_ && !driver::synchronize(context_))
    return;
  memory_.free();
}

/// The ring as the device sees it.
Ring DeviceController::device_ring() const {
  return FlightRecord(memory_.device(), history_size_).ring();
}

void DeviceController::launch(driver::Function kernel, driver::Grid grid, unsigned threads,
                              driver::Stream stream, void* params) const {
  const driver::Current current(context_);
  driver::launch(kernel, grid, threads, stream, params);
}

int64_t DeviceController::step(driver::Stream stream, StepParams& params) {
  params.block = block_;
  launch(kernels_.control_step, {}, kThreads, stream, &params);
  if (driver::is_capturing(stream)) {
    captured_ = true;
  } else {
    ++launched_;
  }
  return flight_record_.notices();
}

void DeviceController::fold(driver::Stream stream, const Scalar& loss, bool restart) {
  FoldParams params{block_, loss, restart};
  launch(kernels_.fold, {}, 1, stream, &params);
}

void DeviceController::configure(driver::Stream stream, const Config* config, const State* state) {
  ConfigureParams params{};
  params.block = block_;
  if (config != nullptr) {
    params.config = *config;
    params.fields |= kSetConfig;
  }
  if (state != nullptr) {
    params.state = *state;
    params.fields |= kSetState;
    factor_ = state->factor;
    configured_ = launched_;
  }
  launch(kernels_.configure, {}, 1, stream, &params);
}

void DeviceController::zero_if_skipped(driver::Stream stream, const std::vector<Range>& ranges) {
  ZeroParams params;
  params.block = block_;
  for (std::size_t first = 0; first < ranges.size(); first += kMaxRanges) {
    const std::size_t count = std::min<std::size_t>(kMaxRanges, ranges.size() - first);
    const Range* begin = ranges.data() + first;
    std::copy(begin, begin + count, params.ranges);
    const driver::Grid grid{blocks_for(begin, begin + count), static_cast<unsigned>(count)};
    launch(kernels_.zero_if, grid, kZeroThreads, stream, &params);
  }
}

void DeviceController::snapshot(driver::Stream stream, const SnapshotTable* table, int64_t fill) {
  if (fill < kNoSlot || fill > kSlots)
    throw std::invalid_argument("fill must be in [0, " + std::to_string(kSlots) + "], got " +
                                std::to_string(fill));
  SnapshotParams params{block_, table, fill};
  launch(kernels_.snapshot, {snapshot_blocks_}, kSnapshotThreads, stream, &params);
}

void DeviceController::launch_empty(driver::Stream stream, StepParams& params) {
  params.block = block_;
  launch(kernels_.empty, {}, kThreads, stream, &params);
}

void DeviceController::record_event(driver::Stream stream) {
  if (driver::is_capturing(stream))
    throw std::runtime_error("a step in a CUDA graph cannot be waited for; do not record_event()");
  auto& event = events_[marks_ % events_.size()];
  if (!event)
    event.emplace(context_);
  event->record(stream);
  ++marks_;
}

void DeviceController::wait(int64_t lag) {
  if (lag < 1 || lag > kMaxLag)
    throw std::invalid_argument("lag must be in [1, " + std::to_string(kMaxLag) + "], got " +
                                std::to_string(lag));
  if (marks_ >= lag)
    events_[(marks_ - lag) % events_.size()]->synchronize();
}

SlotMemory::SlotMemory(int device, std::size_t bytes)
    : context_(driver::primary_context(device)), bytes_(bytes), memory_(context_, bytes) {}

void SlotMemory::free() noexcept {
  if (memory_.host() == nullptr)
    return;
  const driver::RelaxedCapture relaxed;
  if (driver::synchronize(context_))
    memory_.free();
}

double DeviceController::factor() const {
  const std::vector<Record> newest = flight_record_.newest();
  if (newest.empty() || newest.back().sequence <= configured_)
    return factor_;
  return newest.back().factor;
}

} // namespace adaptlr
