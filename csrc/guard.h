// What the flags of the charts lead to: section 5 of docs/algorithm.md. Knows nothing of how they
// came about.
#pragma once

#include "raise.h"

namespace adaptlr {

constexpr double kMaxConsecutiveOverflows = 32.0; // GradScaler's scale: from 2^16 to 2^-16
constexpr double kEarlySteps = 4.0; // W' after a start, within which it is gone back to
constexpr double kRuined = 0.5;     // of the progress made: what is left of it is not worth keeping
constexpr double kWorthwhile = 0.5; // of the steps taken must be left to take them again in ruins
constexpr double kForgiven = 0.25;  // of a restart, by every snapshot that has aged well
constexpr double kQuietCusum = 4.0;
constexpr double kQuietRise = 3.0; // standard errors
constexpr int32_t kLongAlarms = kDiverge | kDrift | kWorse;
constexpr int32_t kCollapse = kLost | kAbove;
constexpr int32_t kFastAlarms = kCollapse | kDiverge;

/// The hard alarms in `flags`, without those of the slow charts while an earlier alarm still echoes
/// in them. A ramp is judged by the collapse charts alone: the others know no rising lr. A loss
/// that is not finite ends a rescue at once; a test has a healthy run to lose. A probe judges by
/// itself.
ADAPTLR_HOST_DEVICE inline int32_t audible(const Config& config, int32_t flags,
                                           const State& state) {
  const bool muted = state.step - state.last_alarm < config.rewarm_steps + config.hold_steps;
  const int32_t slow = muted ? static_cast<int32_t>(kDiverge) : kLongAlarms;
  const bool rescue = is_in(Phase::kRescue, state);
  const int32_t broken = rescue && state.fine.count > 0.0 ? static_cast<int32_t>(kNonfinite) : 0;
  const int32_t heard = is_ramp(state) ? broken : slow;
  return is_in(Phase::kProbe, state) ? 0 : flags & (heard | kCollapse);
}

/// Counts steps in a row that would write non-finite numbers into the weights, and are not taken.
ADAPTLR_HOST_DEVICE inline void count_skips(const Config& config, int32_t flags, State& state) {
  const bool acts = config.guard_mode == GuardMode::kAct;
  const bool broken = acts && (flags & (kNonfinite | kOverflow)) != 0;
  const double skip = flags & kNonfinite ? 1.0 : 0.0, overflow = flags & kOverflow ? 1.0 : 0.0;
  state.consecutive_skips = broken ? state.consecutive_skips + skip : 0.0;
  state.consecutive_overflows = broken ? state.consecutive_overflows + overflow : 0.0;
}

/// Without a snapshot to go back to.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void answer_in_place(const Config& config,
                                                             const Signals& signals, int32_t alarms,
                                                             State& state, Decision& decision) {
  const bool to_blame = state.onset_lr > 0.0 && config.guard_mode == GuardMode::kAct;
  if (to_blame) {
    cut(config, alarms == kDrift, 0.0, state);
    order(decision.save, kZeroMoment, decision); // what led here lives on in it
  }
  expect_change(signals.loss, !(alarms & kDiverge) || !to_blame, state);
}

/// The start is gone back to while it is near, and more is left of the run than would be lost.
ADAPTLR_HOST_DEVICE inline bool is_early(const Config& config, const State& state) {
  const double taken = state.step - state.origin_step;
  const double left = config.total_steps - state.step;
  return taken <= kEarlySteps * config.chart_steps && (config.total_steps == 0.0 || taken <= left);
}

/// Whether a collapse has left little to go on with, in a run that has not been quiet for long
/// enough to have a good snapshot: weights in ruins do not come back with a smaller lr. The slow
/// level is late to show it.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool is_ruined(const Config& config, int32_t alarms,
                                                       const State& state) {
  const Progress& p = state.fine;
  const double taken = state.step - state.origin_step;
  const double left = config.total_steps - state.step;
  return (alarms & kCollapse) != 0 && config.snapshot_slots >= kSlots &&
         p.fast_level - p.lowest_level > kRuined * (p.first_loss - p.lowest_level) &&
         (config.total_steps == 0.0 || kWorthwhile * taken <= left);
}

/// Whether a collapse is answered from the start, though there is a good snapshot: the way there
/// was a range test. A snapshot from a decade of lr below has nothing to do with it, and after a
/// change of the data the charts do not know that way.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool
calls_for_start(const Config& config, const Archive& archive, const State& state) {
  return is_early(config, state) && was_range_test(shown_progress(config, state)) &&
         !is_in(Phase::kShift, state) && state.lr <= kFarAbove * archive.of(state.good_slot).lr;
}

/// A snapshot that has been put back and fails again was not good. In place of a good one that
/// still ages will do, where a fast chart speaks: what it has seen has begun since, and a probe
/// will tell.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void choose_snapshot(int32_t alarms, const Archive& archive,
                                                             State& state) {
  const bool settling = is_in(Phase::kRewarm, state) || is_in(Phase::kHold, state);
  const bool newer = state.pending_slot != kNoSlot && (alarms & kFastAlarms) != 0 &&
                     state.step - state.pending_step >= kSettledSamples;
  if (state.good_slot != kNoSlot && newer)
    state.good_slot = state.pending_slot;
  else if (settling && state.good_slot != kNoSlot &&
           archive.of(state.good_slot).step < state.phase_step)
    state.good_slot = kNoSlot;
  state.pending_slot = kNoSlot;
}

/// No further step is taken. `undo`: the weights are to blame, and the best that are kept come
/// back.
ADAPTLR_HOST_DEVICE inline void fail(bool undo, State& state, Decision& decision) {
  enter(Phase::kFailed, state.step, state);
  decision.action = Action::kSkip;
  if (!undo)
    return;
  const double kept = state.aside_slot != kNoSlot ? state.aside_slot : state.good_slot;
  decision.restore = static_cast<int32_t>(kept != kNoSlot ? kept : double{kStart});
}

/// Answers hard alarms.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void answer_alarm(const Config& config,
                                                          const Signals& signals,
                                                          const Archive& archive, int32_t alarms,
                                                          State& state, Decision& decision) {
  state.last_alarm = state.step;
  if (config.guard_mode != GuardMode::kAct || !has_snapshots(config) || state.first_lr == 0.0)
    return answer_in_place(config, signals, alarms, state, decision);
  choose_snapshot(alarms, archive, state);
  state.restarts += 1.0;
  if (state.restarts > config.max_restarts)
    return fail(true, state, decision);
  if (is_in(Phase::kTrial, state))
    state.cut_factor = state.trial_factor;
  if (is_in(Phase::kRaise, state))
    end_raise(config, archive, false, state, decision);
  else if (is_ramp(state))
    answer_on_ramp(config, archive, state, decision);
  else if (state.good_slot != kNoSlot)
    begin_probe(alarms & kFastAlarms && calls_for_start(config, archive, state), archive, state,
                decision);
  else if (is_early(config, state) || is_ruined(config, alarms, state))
    start_over(config, state, decision);
  else if (state.level < state.start_level) // what is at hand is still better than the start
    answer_in_place(config, signals, alarms, state, decision);
  else
    start_over(config, state, decision);
}

/// REWARM, HOLD, REGROW, RUN: each phase ends when its steps are over.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void advance_phase(const Config& config, State& state) {
  const double taken = state.step - state.phase_step + 1.0;
  if (is_in(Phase::kRewarm, state)) {
    if (taken >= config.rewarm_steps)
      enter(Phase::kHold, state.step + 1.0, state);
  } else if (is_in(Phase::kHold, state)) {
    if (taken >= config.hold_steps) {
      enter(Phase::kRegrow, state.step + 1.0, state);
      state.streak = 0.0;
    }
  } else if (is_in(Phase::kRegrow, state)) {
    state.cut_factor = smaller(state.cut_factor * config.regrow_growth, state.ceiling);
    if (state.cut_factor >= state.ceiling)
      enter(Phase::kRun, state.step + 1.0, state);
  }
}

/// Whether to take a snapshot: now and then, while the charts are quiet.
ADAPTLR_HOST_DEVICE inline bool is_snapshot_due(const Config& config, const Reading& reading,
                                                const State& state) {
  const double since = state.pending_slot == kNoSlot ? -1e300 : state.pending_step;
  return config.snapshot_slots >= kSlots && config.guard_mode == GuardMode::kAct &&
         state.fine.count >= config.snapshot_steps && state.step - since >= config.snapshot_steps &&
         state.cusum < kQuietCusum && reading.fast_rise < kQuietRise &&
         !is_in(Phase::kRewarm, state);
}

/// Takes a snapshot. The last one, which has aged without an alarm, becomes the good one; the new
/// one is taken over the older of the two.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void take_snapshot(const Archive& archive, State& state,
                                                           Decision& decision) {
  if (state.pending_slot != kNoSlot) {
    state.aside_slot = kNoSlot; // a raised lr has proved itself
    state.good_slot = state.pending_slot;
    state.restarts = larger(0.0, state.restarts - kForgiven);
  }
  state.pending_slot = spare_slot(state);
  state.pending_step = state.step;
  copy(state, archive.of(state.pending_slot));
  decision.save = static_cast<int32_t>(state.pending_slot);
}

/// A snapshot is due: what a raise sets aside is one, and one that has aged decides about a raise.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
keep_state(const Config& config, const Archive& archive, State& state, Decision& decision) {
  if (calls_for_raise(config, archive, state))
    begin_raise(config, archive, state, decision);
  else if (is_disproved(config, archive, state))
    undo_raise(config, archive, state, decision);
  else
    take_snapshot(archive, state, decision);
}

ADAPTLR_HOST_DEVICE inline bool may_experiment(const Config& config, int32_t flags,
                                               const State& state) {
  return flags & (kNoProgress | kStall) && config.guard_mode == GuardMode::kAct &&
         has_snapshots(config) && state.step >= state.soft_step &&
         state.restarts < config.max_restarts;
}

/// A step without a hard alarm.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void go_on(const Config& config, const Signals& signals,
                                                   const Archive& archive, int32_t flags,
                                                   const Reading& reading, State& state,
                                                   Decision& decision) {
  const bool measured = is_finite(signals.loss) && !(flags & kNonfinite);
  if (is_in(Phase::kProbe, state)) {
    if (flags & kNonfinite) // of good weights: the data is broken, and the LR is not to blame
      return return_to_aside(archive, state, decision);
    return measured ? advance_probe(config, signals, archive, state, decision) : void();
  }
  if (is_in(Phase::kRaise, state))
    return measured ? advance_raise(config, archive, reading, state, decision) : void();
  if (is_ramp(state))
    return measured ? advance_ramp(config, archive, state, decision) : void();
  if (is_in(Phase::kTrial, state))
    return measured ? advance_trial(config, archive, state, decision) : void();
  if (is_in(Phase::kShift, state))
    return measured ? advance_shift(archive, state, decision) : void();
  advance_phase(config, state);
  if (!measured)
    return;
  if (may_experiment(config, flags, state))
    answer_doubt(config, archive, flags, reading, state, decision);
  else if (is_snapshot_due(config, reading, state))
    keep_state(config, archive, state, decision);
}

/// Whether there is nothing to do about this step.
ADAPTLR_HOST_DEVICE inline bool is_calm(const Config& config, int32_t flags, int32_t alarms,
                                        const Reading& reading, const State& state) {
  return alarms == 0 && is_in(Phase::kRun, state) && !may_experiment(config, flags, state) &&
         !is_snapshot_due(config, reading, state);
}

/// Answers a step that is not calm.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void respond(const Config& config, const Signals& signals,
                                                     const Archive& archive, int32_t alarms,
                                                     const Reading& reading, State& state,
                                                     Decision& decision) {
  if (is_in(Phase::kSearch, state))
    advance_search(config, signals.loss, reading, state, decision);
  else if (alarms != 0)
    answer_alarm(config, signals, archive, alarms, state, decision);
  else
    go_on(config, signals, archive, decision.flags, reading, state, decision);
  if (is_on_probation(state) && (state.cut_factor <= 1.0 || is_in(Phase::kFailed, state)))
    undo_raise(config, archive, state, decision); // nothing is left of it
}

/// Whether lr is anything else than the re-warmed factor x the schedule.
ADAPTLR_HOST_DEVICE inline bool leaves_schedule(const Config& config, const State& state) {
  return is_in(Phase::kProbe, state) || is_ramp(state) ||
         ((state.restarted != 0.0 || state.warmup_start != 0.0) &&
          state.step < config.warmup_steps);
}

/// Multiplier of the peak lr in this step.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double multiplier(const Config& config,
                                                          const State& state) {
  if (is_in(Phase::kProbe, state))
    return 0.0;
  if (is_in(Phase::kSearch, state))
    return state.ramp_lr;
  if (is_in(Phase::kRescue, state))
    return smaller(state.ramp_lr, state.ramp_limit);
  const double scheduled = rewarmed_factor(config, state) * own_schedule(config, state);
  if (is_in(Phase::kRaise, state))
    return smaller(state.ramp_lr, config.max_factor);
  return is_in(Phase::kTest, state) ? smaller(state.ramp_lr, scheduled) : scheduled;
}

/// Answers the flags of this step: moves the phase and the factor, says what to do with the step.
ADAPTLR_HOST_DEVICE inline void guard(const Config& config, const Signals& signals,
                                      const Reading& reading, const Archive& archive, State& state,
                                      Decision& decision) {
  const int32_t flags = decision.flags;
  int32_t alarms = audible(config, flags, state);
  const bool quiet = state.cusum == 0.0 && state.outlier_run == 0.0 && is_finite(signals.loss) &&
                     alarms == 0 && !is_in(Phase::kProbe, state);
  state.onset_lr = quiet ? divide(state.lr, config.peak) : state.onset_lr;

  const bool acts = config.guard_mode == GuardMode::kAct;
  const bool broken = (flags & kOverflow) || (acts && flags & kNonfinite);
  decision.action = broken ? Action::kSkip : Action::kNone;
  count_skips(config, flags, state);
  if (state.consecutive_overflows > kMaxConsecutiveOverflows)
    return fail(false, state, decision);
  if (state.consecutive_skips > config.max_consecutive_skips) {
    if (!has_snapshots(config) || state.first_lr == 0.0) // nothing to undo
      return fail(false, state, decision);
    alarms |= kNonfinite;
    state.consecutive_skips = state.consecutive_overflows = 0.0;
  }
  if (config.guard_mode == GuardMode::kOff)
    return;
  if (is_calm(config, flags, alarms, reading, state))
    return;
  Decision answer = decision;
  respond(config, Signals{signals}, archive, alarms, Reading{reading}, state, answer);
  decision = answer;
}

} // namespace adaptlr
