// The first step, and the search for a learning rate: section 8 of docs/algorithm.md. A search
// looks at a few losses at a rate that changes nothing, lets the rate grow until the loss has been
// at its lowest, undoes all of it, and leaves a peak to the run.
#pragma once

#include "recovery.h"

namespace adaptlr {

// From the estimate: a typed lr that is worth a word. On six tasks the estimate was up to 6 times
// off the best rate, so a typed one is then at least 10 times off it.
constexpr double kFarShare = 60.0;
// Losses that the ramp is compared with: nine have eight differences, enough for their median.
constexpr double kBaselineSteps = 9.0;
constexpr double kSearchReach = 20.0; // below the estimate, where a ramp begins
// Decades that the steps of a search are spread over: 1.3 below the estimate and 2 above it.
constexpr double kSearchDecades = 3.3;
constexpr double kLeastDecadeSteps = 8.0; // faster ramps pass the good rates before they show
constexpr double kMostDecadeSteps = 24.0;
// Without an estimate a coarse ramp finds the decades worth looking at.
constexpr double kCoarseDecadeSteps = 4.0;
constexpr double kCoarseReach = 1e4; // below the typed lr
constexpr double kCoarseErrors = 6.0;
constexpr double kCoarseShare = 0.6;               // of the steps of a search
constexpr double kCoarseBack = 17.782794100389228; // 1.25 decades: what it is late by, and more
constexpr double kCoarseGrowth = 1.5;              // a step; between those of both ramps
constexpr double kRampTrust = 5.0;                 // above the estimate, in times of it
constexpr double kNearZero = 3.0;                  // noises: a loss below may have no zero
constexpr double kNoisePerLoss = 30.0;             // what stands for it

ADAPTLR_HOST_DEVICE inline bool is_searched(const Config& config) {
  return config.search_steps >= 0.0;
}

/// The rate is held still, so that the losses are those of the start.
ADAPTLR_HOST_DEVICE inline bool is_baseline(const State& state) { return state.ramp_growth == 1.0; }

ADAPTLR_HOST_DEVICE inline bool is_coarse(const State& state) {
  return state.ramp_growth > kCoarseGrowth;
}

/// `start`: where the ramp that follows begins.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void begin_baseline(double start, State& state) {
  state.ramp_start = larger(start, kTiny);
  state.ramp_lr = divide(state.ramp_start, kRampReach);
  state.ramp_growth = 1.0;
  state.ramp_level = kNever;
}

ADAPTLR_HOST_DEVICE inline void choose(double lr, State& state) {
  state.cut_factor = state.ceiling = lr;
}

/// Turns what the first gradient told into a rate, then judges the typed lr by it or searches one.
/// Returns the flags of that.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline int32_t begin_run(const Config& config, double loss,
                                                          State& state) {
  const bool scaled = is_finite(loss) && (loss > 0.0 || is_searched(config));
  const bool told = is_finite(state.estimate) && state.estimate > 0.0 && scaled;
  const double estimate = told ? divide(state.estimate * fabs(loss), config.peak) : 0.0;
  const bool known = estimate > 0.0;
  state.estimate = estimate;
  if (!is_searched(config)) {
    const bool far = estimate > kFarShare || estimate * kFarShare < 1.0;
    return known && far ? kFarLr : 0;
  }
  const bool suffices = config.estimate_suffices != 0 && known && loss > 0.0;
  if (config.search_steps > 0.0 && has_snapshots(config) && !suffices) {
    begin_baseline(known ? divide(estimate, kSearchReach) : 1.0 / kCoarseReach, state);
    enter(Phase::kSearch, state.step, state);
    return 0;
  }
  choose(known ? estimate : 1.0, state);
  state.warmup_start = -config.search_steps;
  return kFound;
}

/// From the start again, with a ramp that begins elsewhere. An estimate that led here is refuted.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void search_from(double start, State& state,
                                                         Decision& decision) {
  if (state.estimate > 0.0 || is_coarse(state))
    state.ramp_limit = state.ramp_lr; // known to be too high, or to change the loss
  state.estimate = 0.0;
  state.last_alarm = state.step; // makes it an event
  return_to_start(Phase::kSearch, state, decision);
  begin_baseline(start, state);
}

/// The estimate by what the baseline tells of the loss: by the geometric mean of its level and the
/// first loss, for the gradient goes as the root of a squared error of few examples; by the noise,
/// where losses at or below zero show that zero is nothing to measure this loss from.
/// `lowest`: of its losses.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double refined_estimate(const Progress& p, double lowest,
                                                                double estimate) {
  const bool no_scale = lowest <= 0.0 && p.fast_level < kNearZero * p.noise;
  const double first = fabs(p.first_loss);
  const double scale = no_scale ? kNoisePerLoss * p.noise : square_root(p.fast_level * first);
  return estimate * divide(scale, first);
}

/// Ends the baseline, whose mean takes the place of the first loss.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void begin_rise(const Config& config, State& state) {
  Progress& p = state.fine;
  if (state.estimate > 0.0 && state.origin_step == 0.0) {
    state.estimate = refined_estimate(p, state.ramp_level, state.estimate);
    state.ramp_start = divide(state.estimate, kSearchReach);
  }
  const bool coarse = state.estimate == 0.0 && state.ramp_limit == 0.0;
  const double left = config.search_steps - state.step - 1.0;
  const double steps = clamp(divide(left, kSearchDecades), kLeastDecadeSteps, kMostDecadeSteps);
  state.ramp_lr = state.ramp_start;
  state.ramp_growth = exp(divide(kLnTen, coarse ? kCoarseDecadeSteps : steps));
  p.first_loss = p.lowest_level = p.fast_level;
  p.lowest_variance = level_variance(level_gain(kFastGain, p.count));
  p.lowest_noise = p.noise * square_root(p.variance_factor);
  p.lowest_evidence = p.lowest_age = 0.0;
  p.log_lr = p.lowest_log_lr = logarithm(config.peak * state.ramp_lr);
}

/// The peak that a search has found: the geometric mean of what the ramp and the gradient say,
/// whose errors have nothing in common; or that of the two which there is; or the typed one. A few
/// steps may be lowest at a rate that many steps would not bear, so a ramp is not believed far
/// above the estimate. Nor does one that is not sure take the run below the estimate: a loss that
/// has yet to begin to fall is lowest anywhere. `lost`: the last rate was too high.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double found_lr(const Config& config, const Progress& p,
                                                        bool lost, const State& state) {
  const double estimate = state.estimate;
  const bool rose = !is_baseline(state) && !is_coarse(state);
  const double told = estimate > 0.0 ? estimate : 1.0;
  const double alone =
      rose && lost ? smaller(told, divide(relative_lr(config, p.log_lr), kWarmupDivisor)) : told;
  if (!rose || !has_learned(p))
    return alone;
  const double ramp = divide(relative_lr(config, p.lowest_log_lr), kRampDivisor);
  if (estimate == 0.0)
    return ramp;
  const double agreed = agreed_lr(smaller(ramp, kRampTrust * estimate), state);
  return p.lowest_evidence > kSureErrors ? agreed : larger(agreed, alone);
}

/// What the record of a step tells that has judged or chosen the peak.
struct Verdict {
  double level;     // lowest of the ramp, if that told anything
  double peak;      // lr
  double estimate;  // of the first gradient, lr; 0: none
  double lowest_lr; // at that level; 0: the ramp told nothing
};

ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline Verdict verdict_on_peak(const Config& config,
                                                                const State& state, double level) {
  const bool learned = state.ramp_log_lr != 0.0;
  return Verdict{learned ? state.ramp_level : level, config.peak * state.cut_factor,
                 config.peak * state.estimate, learned ? exp(state.ramp_log_lr) : 0.0};
}

/// The run proper begins with the next step: from the start, with a warm-up up to `warmup_steps`.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void end_search(const Config& config, bool lost,
                                                        State& state, Decision& decision) {
  const Progress& p = state.fine;
  const bool learned = !is_baseline(state) && !is_coarse(state) && has_learned(p);
  choose(found_lr(config, p, lost, state), state);
  decision.flags |= kFound;
  state.ramp_level = p.lowest_level;
  state.ramp_log_lr = learned ? p.lowest_log_lr : 0.0;
  return_to_start(Phase::kRun, state, decision);
  state.restarted = 0.0;
  state.warmup_start = state.origin_step;
}

ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
advance_coarse(const Config& config, double loss, bool lost, State& state, Decision& decision) {
  const Progress& p = state.fine;
  const bool changed = lost || fabs(loss - p.first_loss) > kCoarseErrors * p.noise ||
                       p.lowest_evidence > kSureErrors;
  if (changed)
    search_from(divide(state.ramp_lr, kCoarseBack), state, decision);
  else if (state.step >= kCoarseShare * config.search_steps)
    end_search(config, false, state, decision);
}

/// A ramp ends half a decade past its lowest level, or where the progress is lost; one that was too
/// high from the beginning is done again.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void advance_rise(const Config& config, bool lost,
                                                          const Reading& reading, State& state,
                                                          Decision& decision) {
  const Progress& p = state.fine;
  const double decade_steps = divide(kLnTen, logarithm(state.ramp_growth));
  const bool passed =
      has_learned(p) && p.lowest_age + 0.5 >= 0.5 * decade_steps && reading.fast_rise > kRampErrors;
  const bool early = !has_learned(p) && p.count < kBaselineSteps + kEarlyRamp &&
                     config.search_steps - state.step > 3.0 * kBaselineSteps;
  if (lost && early)
    search_from(divide(state.ramp_start, kRampReach), state, decision);
  else if (lost || passed)
    end_search(config, lost, state, decision);
}

/// One step of a search. One loss that is not finite is skipped; two in a row, on a ramp, mean that
/// the rate was too high.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void advance_search(const Config& config, double loss,
                                                            const Reading& reading, State& state,
                                                            Decision& decision) {
  const bool broken = (decision.flags & kNonfinite) != 0;
  const bool lost = broken || (decision.flags & (kLost | kAbove)) != 0;
  if (state.step + 1.0 >= config.search_steps || !has_snapshots(config))
    return end_search(config, lost, state, decision);
  if (broken && (is_baseline(state) || state.consecutive_skips < 2.0))
    return;
  if (!is_baseline(state))
    return is_coarse(state) ? advance_coarse(config, loss, lost, state, decision)
                            : advance_rise(config, lost, reading, state, decision);
  state.ramp_level = smaller(state.ramp_level, loss);
  if (lost) // not even that rate is harmless
    search_from(divide(state.ramp_start, kSearchReach * kRampReach), state, decision);
  else if (state.fine.count >= kBaselineSteps)
    begin_rise(config, state);
}

} // namespace adaptlr
