#include "cpu.h"

namespace adaptlr {
namespace {

/// Puts the difference to the last sample into the window and returns the medians that follow.
Medians take_difference(double loss, const Progress& p, double* window) {
  if (p.count == 0.0)
    return Medians{0.0, 0.0};
  const int newest = static_cast<int>(p.next_difference);
  window[newest] = fabs(loss - p.previous_loss);
  const int count = static_cast<int>(smaller(p.count, kDifferences));
  double sorted[kDifferences] = {};
  const auto median = [&sorted](int n) { return 0.5 * (sorted[(n - 1) / 2] + sorted[n / 2]); };
  Medians medians{0.0, 0.0};
  for (int taken = 0; taken < count; ++taken) { // insertion, from the newest to the oldest
    const double value = window[(newest - taken + kDifferences) % kDifferences];
    int at = taken;
    for (; at > 0 && sorted[at - 1] > value; --at)
      sorted[at] = sorted[at - 1];
    sorted[at] = value;
    if (taken + 1 == kRecentDifferences)
      medians.recent = median(kRecentDifferences);
  }
  if (count < kRecentDifferences)
    medians.recent = median(count);
  medians.window = count < kFewDifferences ? sorted[count - 1] / 1.5 : median(count);
  return medians;
}

/// Both kinds of differences of a step. On the device a warp does this together.
Differences take_differences(const Config& config, double loss, State& state) {
  Differences differences{};
  if (!is_finite(loss))
    return differences;
  differences.fine = take_difference(loss, state.fine, state.fine_differences);
  if (completes_block(config, state))
    differences.coarse =
        take_difference(block_mean(config, loss, state), state.coarse, state.coarse_differences);
  return differences;
}

} // namespace

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

State resumed(const Config& config, State state) {
  Decision ignored{};
  if (is_ramp(state))
    settle(config, Progress{state.fine}, state, ignored);
  else if (is_in(Phase::kProbe, state))
    cut(config, false, state);
  else if (is_in(Phase::kTrial, state))
    state.cut_factor = state.trial_factor;
  if (is_in(Phase::kTrial, state))
    enter(Phase::kRun, state.step, state);
  if (state.step > 0.0)
    state.origin_step = state.step;
  state.good_slot = state.pending_slot = state.aside_slot = kNoSlot;
  return state;
}

} // namespace adaptlr
