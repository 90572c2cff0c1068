// A cut of the factor, and the way back up to the schedule: section 5 of docs/algorithm.md.
#pragma once

#include "search.h"

namespace adaptlr {

constexpr double kMinFactor = 1e-4;
constexpr double kRewarmStart = 0.1;  // share of cut_factor at which re-warming begins
constexpr double kRegrowLimit = 0.7;  // of the factor that failed
constexpr double kDriftBackoff = 0.7; // a drift is slow: a small cut will do

/// The factor that makes `lr`, a share of the peak, of the schedule once re-warmed.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double factor_of(const Config& config, double lr,
                                                         const State& state) {
  const double resumes = larger(state.step + config.rewarm_steps, config.warmup_steps);
  const double multiplier = rare_schedule(config, resumes);
  return multiplier > 0.0 ? divide(lr, multiplier) : state.cut_factor;
}

/// The factor to blame: the one at the change point, where the cusum was last 0, not the one at the
/// alarm (equation 10).
ADAPTLR_HOST_DEVICE inline double failed_factor(const Config& config, const State& state) {
  return smaller(state.cut_factor, factor_of(config, state.onset_lr, state));
}

/// `held_lr`: a share of the peak that need not be gone below, for it is known to hold; 0: none.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void cut(const Config& config, bool drift_only,
                                                 double held_lr, State& state) {
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
  const double held = smaller(factor_of(config, held_lr, state), state.cut_factor);
  const double least = larger(least_factor(config, kMinFactor), held);
  state.cut_factor = larger(least, backoff * failed);
  state.ceiling = larger(kRegrowLimit * failed, state.cut_factor);
  state.cuts += 1.0;
  enter(Phase::kRewarm, state.step + 1.0, state);
}

/// Forgets how sure the statistics were: the losses that follow are new ones.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void expect_change(double loss, bool accept, State& state) {
  rebase(loss, accept, state);
  state.fine = state.coarse = Progress{};
  state.block_sum = state.block_count = 0.0;
  state.soft_step = kNever; // a run that goes on flat is not one that has just begun
}

/// cut_factor, less the re-warming. Also right in the step that ends the phase, whose re-warming is
/// complete.
ADAPTLR_HOST_DEVICE inline double rewarmed_factor(const Config& config, const State& state) {
  if (!is_in(Phase::kRewarm, state))
    return state.cut_factor;
  const double ramp = divide(larger(state.step - state.phase_step + 1.0, 0.0), config.rewarm_steps);
  return state.cut_factor * (kRewarmStart + (1.0 - kRewarmStart) * ramp);
}

} // namespace adaptlr
