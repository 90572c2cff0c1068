#include "cpu.h"

namespace adaptlr {

HostController::HostController(const Config& config, int64_t history_size)
    : config(config), state(initial_state()),
      memory_(FlightRecord::bytes(history_size) / sizeof(Record)),
      flight_record_(memory_.data(), history_size) {}

Decision HostController::step(const Signals& signals) {
  Record record;
  Differences differences{};
  if (config.guard_mode != GuardMode::kOff && !is_in(Phase::kFailed, state))
    differences = take_differences(config, signals.loss, state);
  const Decision decision =
      control_step(config, signals, differences, Archive{saved.data()}, state, record);
  append(flight_record_.ring(), record, decision.event, counts_);
  return decision;
}

} // namespace adaptlr
