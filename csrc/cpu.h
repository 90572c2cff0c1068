// The control step on the host.
#pragma once

#include "flight_record.h"

#include <array>

namespace adaptlr {

/// What snapshots are to do after the update, as HostLoop and Python hand it on; 0: nothing.
inline int64_t order_of(const Decision& decision) {
  return decision.save | int64_t{decision.restore} << 4;
}

class HostController {
public:
  HostController(const Config& config, int64_t history_size);

  Decision step(const Signals& signals);

  Config config;
  State state;
  std::array<State, kSavedStates> saved{};
  const FlightRecord& flight_record() const { return flight_record_; }

private:
  std::vector<Record> memory_;
  FlightRecord flight_record_;
  RingHeader counts_{};
};

/// The state to go on with where a run is resumed: without its snapshots, an experiment ends with
/// the best estimate so far, and the weights at hand are the ones to go back to.
State resumed(const Config& config, State state);

} // namespace adaptlr
