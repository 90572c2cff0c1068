// The control step on the device, as the host drives it.
#pragma once

#include "device_block.h"
#include "driver.h"
#include "flight_record.h"

#include <array>
#include <optional>

namespace adaptlr {

/// Launches the kernels over a block of device memory that the caller owns and keeps alive. Nothing
/// waits for the device but wait(). Not for two threads at once.
class DeviceController {
public:
  /// Loads the kernels of an image, once per device and for good; throws if the driver refuses it.
  static void load(int device, const std::string& image);

  /// `block` is the address of sizeof(DeviceBlock) bytes on the device, aligned to 16.
  DeviceController(int device, const std::string& image, DeviceBlock* block, const Config& config,
                   const State& state, int64_t history_size, driver::Stream stream);

  /// Frees the ring once no kernel can write to it any more; leaks it if that cannot be known.
  ~DeviceController();
  DeviceController(const DeviceController&) = delete;
  DeviceController& operator=(const DeviceController&) = delete;

  /// Launches one control step; fills in the block's address. Returns the notices so far.
  int64_t step(driver::Stream stream, StepParams& params);

  /// Adds a loss to the pending ones; `restart` forgets those first, `loss` may then be none.
  void fold(driver::Stream stream, const Scalar& loss, bool restart);

  /// Replaces what is given and sets the lr for the coming step. Clears the notices, too: seen by
  /// the host with the next step's record.
  void configure(driver::Stream stream, const Config* config, const State* state);

  /// Zeroes the ranges if the last control step said skip.
  void zero_if_skipped(driver::Stream stream, const std::vector<Range>& ranges);

  /// Fills and puts back what the last control step has ordered; `fill` fills a slot whatever it
  /// said. `table` is an address on the device.
  void snapshot(driver::Stream stream, const SnapshotTable* table, int64_t fill);

  void launch_empty(driver::Stream stream, StepParams& params);

  /// Marks the control step that was launched last, so that wait() can find it.
  void record_event(driver::Stream stream);

  /// Waits for the marked step `lag` steps before the one to be launched next: 1 is the last.
  void wait(int64_t lag);

  static constexpr int64_t kMaxLag = 8;

  /// The newest factor that the host can know; waits for nothing.
  double factor() const;

  const FlightRecord& flight_record() const { return flight_record_; }

private:
  struct Kernels {
    Kernels(driver::Context context, const std::string& image);
    driver::Function control_step, fold, configure, zero_if, snapshot, empty;
  };

  static const Kernels& loaded(driver::Context context, const std::string& image);
  Ring device_ring() const;
  void launch(driver::Function kernel, driver::Grid grid, unsigned threads, driver::Stream stream,
              void* params) const;

  driver::Context context_;
  DeviceBlock* block_;
  const Kernels& kernels_;
  unsigned snapshot_blocks_;
  int64_t history_size_;
  driver::PinnedMemory memory_;
  FlightRecord flight_record_;
  std::array<std::optional<driver::Event>, kMaxLag> events_;
  int64_t marks_ = 0;
  int64_t launched_ = 0;   // control steps, outside of captures
  double factor_;          // as configured last
  int64_t configured_ = 0; // steps launched by then; their records know nothing of factor_
  bool captured_ = false;  // a graph holds the kernels and the addresses
};

/// Host memory that kernels read and write through the bus, for slots. Freed once no kernel can use
/// it any more; leaked if that cannot be known.
class SlotMemory {
public:
  SlotMemory(int device, std::size_t bytes);
  ~SlotMemory() { free(); }
  SlotMemory(const SlotMemory&) = delete;
  SlotMemory& operator=(const SlotMemory&) = delete;

  /// As the device sees it.
  void* address() const { return memory_.device(); }

  /// As the host sees it; null once freed.
  void* host() const { return memory_.host(); }
  std::size_t bytes() const { return bytes_; }

  /// Waits for the device. May be called more than once.
  void free() noexcept;

private:
  driver::Context context_;
  std::size_t bytes_;
  driver::PinnedMemory memory_;
};

} // namespace adaptlr
