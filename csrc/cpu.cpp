#include "cpu.h"

namespace adaptlr {
namespace {

double middle(const double* sorted, int n) { return 0.5 * (sorted[(n - 1) / 2] + sorted[n / 2]); }

/// Sorts the `count` newest values of a window, by insertion. Without branches, which random values
/// would have mispredicted.
void sort_newest(const double* window, int newest, int count, double* sorted) {
  for (int taken = 0; taken < count; ++taken) {
    double value = window[newest >= taken ? newest - taken : newest - taken + kDifferences];
    for (int at = 0; at < taken; ++at) {
      const double next = sorted[at];
      sorted[at] = smaller(next, value);
      value = larger(next, value);
    }
    sorted[taken] = value;
  }
}

/// The median of a full window where `near`, between its middle two a step ago, is at most one rank
/// off: a single pass, again without branches. Negative where it is not.
double median_near(const double* window, double near) {
  constexpr int kHalf = kDifferences / 2;
  constexpr double kNone = 1e300;
  const int64_t none = bits_of(kNone);
  double below = 0.0, second_below = 0.0, above = kNone, second_above = kNone;
  int64_t count = 0; // of values below
  for (int i = 0; i < kDifferences; ++i) {
    const int64_t value = bits_of(window[i]);
    const int64_t is_below = -static_cast<int64_t>(window[i] < near); // all bits, or none
    count -= is_below;
    const double low = from_bits(value & is_below);
    const double high = from_bits((value & ~is_below) | (none & is_below));
    second_below = larger(second_below, smaller(below, low));
    below = larger(below, low);
    second_above = smaller(second_above, larger(above, high));
    above = smaller(above, high);
  }
  if (count == kHalf)
    return 0.5 * (below + above);
  if (count == kHalf + 1)
    return 0.5 * (second_below + below);
  return count == kHalf - 1 ? 0.5 * (above + second_above) : -1.0;
}

/// Puts the difference to the last sample into the window and returns the medians that follow.
Medians take_difference(double loss, const Progress& p, double* window) {
  if (p.count == 0.0)
    return Medians{0.0, 0.0};
  const int newest = static_cast<int>(p.next_difference);
  window[newest] = fabs(loss - p.previous_loss);
  const int count = static_cast<int>(smaller(p.count, kDifferences));
  double sorted[kDifferences];
  const int recent = count < kRecentDifferences ? count : kRecentDifferences;
  sort_newest(window, newest, recent, sorted);
  Medians medians{-1.0, middle(sorted, recent)};
  if (count == kDifferences)
    medians.window = median_near(window, p.noise / kMedianScale);
  if (medians.window < 0.0) {
    sort_newest(window, newest, count, sorted);
    medians.window = count < kFewDifferences ? sorted[count - 1] / 1.5 : middle(sorted, count);
  }
  return medians;
}

/// Both kinds of differences of a step. On the device a warp does this together.
Differences take_differences(const Config& config, double loss, State& state) {
  Differences differences{};
  if (!watches_progress(config, loss, state))
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
  const Differences differences = take_differences(config, signals.loss, state);
  const Decision decision =
      control_step(config, signals, differences, Archive{saved.data()}, state, record);
  append(flight_record_.ring(), record, decision.event, counts_);
  return decision;
}

State resumed(const Config& config, State state) {
  Decision ignored{};
  if (is_in(Phase::kSearch, state)) {
    end_search(config, false, state, ignored);
    state.warmup_start = state.phase_step = state.step;
  } else if (is_in(Phase::kRaise, state))
    settle_raise(config, state, ignored);
  else if (is_ramp(state))
    settle(config, Progress{state.fine}, state, ignored);
  else if (is_in(Phase::kProbe, state))
    cut(config, false, 0.0, state);
  else if (is_in(Phase::kTrial, state))
    state.cut_factor = state.trial_factor;
  if (is_in(Phase::kTrial, state))
    enter(Phase::kRun, state.step, state);
  if (is_in(Phase::kShift, state)) // the snapshot from before is not at hand
    go_on_as_before(state.step, state);
  if (state.step > 0.0)
    state.origin_step = state.step;
  state.good_slot = state.pending_slot = state.aside_slot = kNoSlot;
  return state;
}

} // namespace adaptlr
