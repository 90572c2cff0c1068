// A raise: the lr of a run that learns too slowly may grow beyond the typed one, where the user has
// allowed that. Section 9 of docs/algorithm.md. A ramp from the start asks whether a higher lr gets
// lower, with the present state set aside; and that state is kept until a raised run has got below
// it, so that all of it can be undone.
#pragma once

#include "probe.h"

namespace adaptlr {

constexpr double kRaiseFrom = 1.5; // W': by then a run at a good lr has won more than kSlowShare
constexpr double kRaiseUntil = 4.0;
constexpr double kSlowShare = 0.15;  // of the first loss
constexpr double kRaiseErrors = 3.0; // below the run: a raise is on probation yet
constexpr double kLeastRaise = 2.0;  // less is not worth a restart
constexpr double kPastDecades = 0.5; // of a ramp, beyond its lowest level

/// Whether this run may still ask. It is on its first way, at the typed lr; after one question, or
/// an alarm, no more.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool may_raise(const Config& config, const State& state) {
  return config.max_factor > 1.0 && config.snapshot_slots >= kSlots && is_in(Phase::kRun, state) &&
         state.restarted == 0.0 && state.tested == 0.0 && state.cuts == 0.0 &&
         state.restarts < config.max_restarts;
}

/// Whether the first gradient calls the lr much too low.
ADAPTLR_HOST_DEVICE inline bool is_far_below(const State& state) {
  return state.estimate > kFarAbove * state.cut_factor;
}

ADAPTLR_HOST_DEVICE inline bool is_slow(const Progress& p) {
  return p.first_loss - p.fast_level < kSlowShare * fabs(p.first_loss);
}

/// Whether the loss has clearly fallen since an earlier state, and no slower than up to there: the
/// lr is far below where the fall per step depends on anything else.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool falls_steadily(const Progress& p,
                                                            const Progress& earlier) {
  const double fall = earlier.fast_level - p.fast_level;
  const double fall_before = p.first_loss - earlier.fast_level;
  const double error = level_error(p.noise * square_root(p.variance_factor));
  return fall > kSureErrors * error &&
         fall * earlier.count >= fall_before * (p.count - earlier.count);
}

/// Asked when a snapshot is due. Without an estimate the losses alone must tell.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool
calls_for_raise(const Config& config, const Archive& archive, const State& state) {
  if (!may_raise(config, state) || !is_slow(state.fine) ||
      state.step < kRaiseFrom * config.chart_steps || state.step > kRaiseUntil * config.chart_steps)
    return false;
  if (state.estimate > 0.0)
    return is_far_below(state);
  return state.pending_slot != kNoSlot &&
         falls_steadily(state.fine, archive.of(state.pending_slot).fine);
}

/// Sets the present state aside, and lets the lr grow from the start.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
begin_raise(const Config& config, const Archive& archive, State& state, Decision& decision) {
  const double lr = state.cut_factor * own_schedule(config, state);
  const double steps =
      test_decade_steps(config, lr, config.max_factor, coarse_progress(config, state));
  state.restarts += 1.0;
  state.good_slot = state.pending_slot = kNoSlot; // one of their places is needed, soon both
  copy(state, archive.of(kFirst));
  decision.save = kFirst;
  begin_ramp(Phase::kRaise, lr, steps, state, decision);
  state.aside_slot = kFirst;
}

/// The state from before comes back for good, and with it its budget. As it was quiet, it is also
/// the good snapshot from now on.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
undo_raise(const Config& config, const Archive& archive, State& state, Decision& decision) {
  const double slot = state.aside_slot;
  state.restarts = archive.of(slot).restarts;
  state.last_alarm = state.step; // makes it an event
  return_to_aside(archive, state, decision);
  state.good_slot = slot;
  state.tested = 1.0;
  state.ramp_level = kNever;
  state.soft_step = state.step + kSoftPause * config.block_steps;
}

/// From the start at a higher lr, re-warmed.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void raise_to(const Config& config, double lr, State& state,
                                                      Decision& decision) {
  state.cut_factor = state.ceiling =
      smaller(config.max_factor, divide(lr, schedule_left(config, state)));
  state.soft_step = 0.0;
  return_to_start(Phase::kRewarm, state, decision);
}

/// The lr that a ramp has shown; 0: none.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double shown_lr(const Config& config, const State& state) {
  const Progress& p = state.fine;
  const double lr = divide(relative_lr(config, p.lowest_log_lr), kRampDivisor);
  return has_learned(p) ? agreed_lr(lr, state) : 0.0;
}

/// Ends a ramp whose state set aside is not at hand.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void settle_raise(const Config& config, State& state,
                                                          Decision& decision) {
  const double lr = shown_lr(config, state);
  if (lr >= kLeastRaise)
    raise_to(config, lr, state, decision);
  else
    return_to_start(Phase::kRewarm, state, decision);
}

/// The end of the ramp. A higher lr has won if it got lower than the run ever did. Where the ramp
/// has `arrived` unharmed, and the first gradient suggests far more, it is the highest allowed.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void end_raise(const Config& config, const Archive& archive,
                                                       bool arrived, State& state,
                                                       Decision& decision) {
  const Progress& p = coarse_progress(config, state);
  const Progress& before = coarse_progress(config, archive.of(state.aside_slot));
  const bool unharmed = arrived && state.estimate > kVouched * config.max_factor;
  const double shown = gets_lower(p, before, kRaiseErrors) ? shown_lr(config, state) : 0.0;
  const double lr = unharmed ? config.max_factor : shown;
  if (lr < kLeastRaise)
    return undo_raise(config, archive, state, decision);
  state.ramp_level = state.fine.lowest_level; // for the record
  state.ramp_log_lr = has_learned(state.fine) ? state.fine.lowest_log_lr : 0.0;
  raise_to(config, lr, state, decision);
}

/// One step of the ramp without an alarm.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void advance_raise(const Config& config,
                                                           const Archive& archive,
                                                           const Reading& reading, State& state,
                                                           Decision& decision) {
  const Progress& p = state.fine;
  const double decade_steps = divide(kLnTen, logarithm(state.ramp_growth));
  const bool passed = has_learned(p) && reading.fast_rise > kRampErrors &&
                      p.lowest_age + 0.5 >= kPastDecades * decade_steps;
  const bool arrived = state.ramp_lr >= kReached * config.max_factor;
  if (arrived || passed)
    end_raise(config, archive, !passed, state, decision);
}

/// Whether a raised run has had its time, and is no lower than the run from before.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool
is_disproved(const Config& config, const Archive& archive, const State& state) {
  return is_on_probation(state) && state.pending_slot != kNoSlot &&
         !gets_lower(coarse_progress(config, state),
                     coarse_progress(config, archive.of(state.aside_slot)), kRaiseErrors);
}

/// A soft alarm. Below what the first gradient suggests it asks for a higher lr; at a raised one
/// that has learned nothing, for the one from before.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void answer_doubt(const Config& config,
                                                          const Archive& archive, int32_t flags,
                                                          const Reading& reading, State& state,
                                                          Decision& decision) {
  if (may_raise(config, state) && is_far_below(state) && is_slow(state.fine))
    begin_raise(config, archive, state, decision);
  else if (!is_on_probation(state))
    experiment(config, archive, flags, reading, state, decision);
  else if (reading.gain < kNoProgressErrors)
    undo_raise(config, archive, state, decision);
}

} // namespace adaptlr
