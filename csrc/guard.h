// What the flags of the charts lead to: section 4 of docs/algorithm.md. Knows nothing of how they
// came about.
#pragma once

#include "detector.h"
#include "schedule.h"

namespace adaptlr {

constexpr double kMinFactor = 1e-4;
constexpr double kRewarmStart = 0.1;              // share of cut_factor at which re-warming begins
constexpr double kRegrowLimit = 0.7;              // of the factor that failed
constexpr double kDriftBackoff = 0.7;             // a drift is slow: a small cut will do
constexpr double kMaxConsecutiveOverflows = 32.0; // GradScaler's scale: from 2^16 to 2^-16
constexpr int32_t kAlarms = kDiverge | kDrift | kWorse;

ADAPTLR_HOST_DEVICE inline bool is_in(Phase phase, const State& state) {
  return state.phase == static_cast<double>(phase);
}

ADAPTLR_HOST_DEVICE inline void enter(Phase phase, double first_step, State& state) {
  state.phase = static_cast<double>(phase);
  state.phase_step = first_step;
}

/// The alarms in `flags`, without those of the slow charts while an earlier alarm still echoes in
/// them.
ADAPTLR_HOST_DEVICE inline int32_t audible(const Config& config, int32_t flags,
                                           const State& state) {
  const bool muted = state.step - state.last_alarm < config.rewarm_steps + config.hold_steps;
  return flags & (muted ? static_cast<int32_t>(kDiverge) : kAlarms);
}

/// A step that would write non-finite numbers into the weights is not taken.
ADAPTLR_HOST_DEVICE inline Action skip_nonfinite(const Config& config, int32_t flags,
                                                 State& state) {
  if (flags & kNonfinite)
    state.consecutive_skips += 1.0;
  if (flags & kOverflow)
    state.consecutive_overflows += 1.0;
  if (state.consecutive_skips > config.max_consecutive_skips ||
      state.consecutive_overflows > kMaxConsecutiveOverflows)
    enter(Phase::kFailed, state.step, state);
  return Action::kSkip;
}

/// The factor to blame: the one at the change point, where the cusum was last 0, not the one at the
/// alarm (equation 10).
ADAPTLR_HOST_DEVICE inline double failed_factor(const Config& config, const State& state) {
  const double resumes = larger(state.step + config.rewarm_steps, config.warmup_steps);
  const double multiplier = schedule(config, resumes);
  return multiplier > 0.0 ? smaller(state.factor, divide(state.onset_lr, multiplier))
                          : state.factor;
}

ADAPTLR_HOST_DEVICE inline void cut(const Config& config, bool drift_only, State& state) {
  const bool again = is_in(Phase::kRewarm, state) || is_in(Phase::kHold, state);
  state.streak = again ? state.streak + 1.0 : 0.0;
  double backoff = config.backoff_factor;
  if (state.streak >= 1.0)
    backoff *= config.backoff_factor;
  if (state.streak >= 2.0)
    backoff *= config.backoff_factor;
  if (drift_only)
    backoff = kDriftBackoff;
  const double failed = failed_factor(config, state);
  state.cut_factor = larger(kMinFactor, backoff * failed);
  state.ceiling = larger(kRegrowLimit * failed, state.cut_factor);
  state.cuts += 1.0;
  enter(Phase::kRewarm, state.step + 1.0, state);
}

ADAPTLR_HOST_DEVICE inline Action answer_alarm(const Config& config, const Signals& signals,
                                               int32_t alarms, State& state) {
  const bool to_blame = state.onset_lr > 0.0 && config.guard_mode == GuardMode::kAct;
  if (to_blame)
    cut(config, alarms == kDrift, state);
  rebase(signals.loss, !(alarms & kDiverge) || !to_blame, state);
  state.last_alarm = state.step;
  return to_blame ? Action::kSkip : Action::kNone;
}

/// REWARM, HOLD, REGROW, RUN: each phase ends when its steps are over.
ADAPTLR_HOST_DEVICE inline void advance_phase(const Config& config, State& state) {
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

/// cut_factor, less the re-warming. Also right in the step that ends the phase, whose re-warming is
/// complete.
ADAPTLR_HOST_DEVICE inline double applied_factor(const Config& config, const State& state) {
  if (!is_in(Phase::kRewarm, state))
    return state.cut_factor;
  const double ramp = divide(larger(state.step - state.phase_step + 1.0, 0.0), config.rewarm_steps);
  return state.cut_factor * (kRewarmStart + (1.0 - kRewarmStart) * ramp);
}

/// Answers the flags of this step: moves the phase and the factor, says what to do with the step.
ADAPTLR_HOST_DEVICE inline Action guard(const Config& config, const Signals& signals, int32_t flags,
                                        State& state) {
  const bool acts = config.guard_mode == GuardMode::kAct;
  const double lr_ratio = divide(state.lr, config.peak); // of the last step
  const int32_t alarms = audible(config, flags, state);
  const bool quiet =
      state.cusum == 0.0 && state.outlier_run == 0.0 && is_finite(signals.loss) && alarms == 0;
  state.onset_lr = quiet ? lr_ratio : state.onset_lr;

  Action action = flags & kOverflow ? Action::kSkip : Action::kNone;
  if (acts && flags & (kNonfinite | kOverflow)) {
    action = skip_nonfinite(config, flags, state);
  } else {
    state.consecutive_skips = state.consecutive_overflows = 0.0;
  }
  if (config.guard_mode == GuardMode::kOff || is_in(Phase::kFailed, state))
    return action;
  if (alarms != 0) {
    if (answer_alarm(config, signals, alarms, state) == Action::kSkip)
      action = Action::kSkip;
  } else {
    advance_phase(config, state);
  }
  state.factor = applied_factor(config, state);
  return action;
}

} // namespace adaptlr
