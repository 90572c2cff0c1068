// What a probe of older weights decides: has the data changed, or was the LR to blame? Items 3 and
// 4 in section 6 of docs/algorithm.md.
#pragma once

#include "backoff.h"
#include "experiment.h"

namespace adaptlr {

constexpr double kProbeSteps = 8.0;
constexpr double kProbeNoises = 3.0; // that the levels a probe decides between are apart at least
constexpr double kProbeSure = 1.5;   // votes ahead: three losses that all say the same will do
constexpr double kProbeVote = 0.5;   // of one loss
// After a change of the data the older snapshot is asked again for the first time.
constexpr int64_t kShiftSteps = 16;

/// The data has changed: the weights that were set aside go on, with all statistics begun anew. The
/// snapshot from before is kept for a while, for the change may pass.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
accept_shift(const Config& config, const Archive& archive, State& state, Decision& decision) {
  const State& aside = archive.of(state.aside_slot);
  const double since = is_in(Phase::kShift, aside) ? aside.phase_step : state.step + 1.0;
  return_to_aside(archive, state, decision);
  forget_statistics(state);
  state.soft_step = kNever;
  state.restarts -= 1.0; // nothing had failed
  if (state.step - since < config.rewarm_steps + config.hold_steps)
    enter(Phase::kShift, since, state);
}

/// The loss is back with the snapshot's weights. An lr that has held until then is given the
/// benefit of the doubt, once; if it fails again, it is to blame.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void go_on_from_snapshot(const Config& config, double loss,
                                                                 const Archive& archive,
                                                                 State& state, Decision& decision) {
  const State& aside = archive.of(state.aside_slot);
  const double held_lr = archive.of(state.good_slot).lr;
  const bool held = aside.lr <= held_lr;
  const bool passed = is_in(Phase::kShift, aside);
  const double slot = state.aside_slot;
  state.aside_slot = kNoSlot;
  if (state.collapsed != 0.0) {
    copy<Statistics>(archive.of(slot), state); // what the way there has told
    return start_over(config, state, decision);
  }
  if (passed || (held && state.restarts <= 1.0))
    return go_on_as_before(state.step + 1.0, state);
  cut(config, false, held ? 0.0 : divide(held_lr, config.peak), state);
  expect_change(loss, false, state);
}

/// That the two levels between which a probe decides are apart at least.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double least_gap(const Progress& usual) {
  return kProbeNoises * usual.noise * square_root(usual.variance_factor);
}

/// One step of a probe. Every loss votes, from -1/2 for the snapshot's own level to 1/2 for the one
/// that gave the alarm, and none for more than that: a wild loss is one vote. Where the data has
/// changed before and is asked about again, one vote that it is still so will do: there will be
/// another time.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void advance_probe(const Config& config,
                                                           const Signals& signals,
                                                           const Archive& archive, State& state,
                                                           Decision& decision) {
  decision.action = Action::kSkip;
  const Progress& usual = archive.of(state.good_slot).fine;
  const double gap =
      larger(archive.of(state.aside_slot).fine.fast_level - usual.fast_level, least_gap(usual));
  state.probe_sum += clamp(divide(signals.loss - usual.fast_level, gap), 0.0, 1.0) - 0.5;
  const bool again = is_in(Phase::kShift, archive.of(state.aside_slot));
  const double lead = again && state.probe_sum > 0.0 ? kProbeVote : kProbeSure;
  const bool sure = fabs(state.probe_sum) >= lead;
  if (!sure && state.step - state.phase_step + 1.0 < kProbeSteps)
    return;
  if (state.probe_sum > 0.0)
    accept_shift(config, archive, state, decision);
  else
    go_on_from_snapshot(config, signals.loss, archive, state, decision);
}

/// After 16, 24, 32, 48, 64 ... steps: powers of two, and three halves of them.
ADAPTLR_HOST_DEVICE inline bool is_asked_again(int64_t taken) {
  const int64_t power = taken & -taken;
  return taken >= kShiftSteps && (taken == power || taken == 3 * power);
}

/// One step after a change of the data. Is the snapshot from before the better one again? Not where
/// the loss is down by itself.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void advance_shift(const Archive& archive, State& state,
                                                           Decision& decision) {
  if (!is_asked_again(static_cast<int64_t>(state.step - state.phase_step) + 1))
    return;
  const Progress& usual = archive.of(state.good_slot).fine;
  if (state.fine.fast_level - usual.fast_level < least_gap(usual))
    return go_on_as_before(state.step + 1.0, state);
  state.restarts += 1.0;
  begin_probe(false, archive, state, decision);
}

} // namespace adaptlr
