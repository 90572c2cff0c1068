// The control step on the host.
#pragma once

#include "flight_record.h"

#include <array>

namespace adaptlr {

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

} // namespace adaptlr
