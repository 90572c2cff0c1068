// Experiments: a test with the present state set aside, a trial with the weights as they are, the
// beginning of a probe. Items 2 to 6 in section 6 of docs/algorithm.md.
#pragma once

#include "recovery.h"

namespace adaptlr {

constexpr double kTrialCut = 4.0;
constexpr double kTrialSamples = 20.0;
constexpr double kTrialErrors = 2.5;
constexpr double kMaxTrials = 3.0;
// Of levels that were picked, under noise whose tails its scale does not see. After a test a run is
// doubted for the second time.
constexpr double kTestErrors = 4.0;
constexpr double kWorseErrors = 3.0;
constexpr double kSoftPause = 24.0; // samples after a trial or a test

/// Steps of a decade of lr on a ramp that is to reach what the run has reached: the later, the
/// more.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double test_decade_steps(const Config& config, double start,
                                                                 double end, const Progress& p) {
  const double reach = larger(divide(end, start), 1.0);
  const double decades = larger(0.5, divide(logarithm(reach), kLnTen));
  const double taken = p.count * config.block_steps;
  const double steps = smaller(0.6 * taken, 1.5 * config.chart_steps);
  return larger(kDecadeSteps * config.block_steps, divide(steps, decades));
}

/// Asks the causal question from the start, with the present state set aside: does a lower lr get
/// lower?
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
begin_test(const Config& config, const Archive& archive, State& state, Decision& decision) {
  const Progress& p = coarse_progress(config, state);
  const double lr = has_learned(p) ? relative_lr(config, p.lowest_log_lr) : failed_lr(state);
  const double start = divide(lr, kRampReach);
  const double end = state.cut_factor * own_schedule(config, state);
  const double slot = spare_slot(state);
  enter(Phase::kRun, state.step, state);
  copy(state, archive.of(slot));
  decision.save = static_cast<int32_t>(slot);
  const double good_slot = state.good_slot;
  begin_ramp(Phase::kTest, start, test_decade_steps(config, start, end, p), state, decision);
  state.good_slot = good_slot;
  state.aside_slot = slot;
  state.restarts += 1.0;
}

/// Goes on as before an experiment: growing again if that was not over.
ADAPTLR_HOST_DEVICE inline void go_on_as_before(double first_step, State& state) {
  enter(state.cut_factor < state.ceiling ? Phase::kRegrow : Phase::kRun, first_step, state);
}

/// Takes weights and statistics back that were set aside; the clock and the counts go on.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void return_to_aside(const Archive& archive, State& state,
                                                             Decision& decision) {
  const double slot = state.aside_slot, step = state.step, last_alarm = state.last_alarm;
  const double skips = state.skips, cuts = state.cuts, restarts = state.restarts;
  copy(archive.of(slot), state);
  state.step = step;
  state.skips = skips;
  state.cuts = cuts;
  state.restarts = restarts;
  state.last_alarm = last_alarm;
  state.consecutive_skips = state.consecutive_overflows = 0.0;
  state.aside_slot = state.pending_slot = kNoSlot;
  go_on_as_before(state.step + 1.0, state);
  order(kNoSlot, static_cast<int32_t>(slot), decision);
}

/// So many standard errors above the lowest level.
ADAPTLR_HOST_DEVICE inline double highest_likely(const Progress& p, double noise, double errors) {
  return p.lowest_level + errors * noise * square_root(p.lowest_variance);
}

/// The noise behind the lowest level of a ramp. Where noise has a tail upwards, luck that makes a
/// level low makes its noise look small as well: the noise of the run has a say.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double pooled_noise(const Progress& p, double other) {
  return larger(p.lowest_noise, square_root(p.lowest_noise * other));
}

/// So many standard errors below the present level. `variance_factor`: of the noise's correlation.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double
lowest_likely(const Progress& p, double variance_factor, double errors) {
  const double variance = level_variance(level_gain(kFastGain, p.count));
  return p.fast_level - errors * p.noise * square_root(variance_factor * variance);
}

/// Whether one has got lower than the other ever did, by so many standard errors.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool gets_lower(const Progress& p, const Progress& other,
                                                        double errors) {
  const double noise = pooled_noise(p, other.lowest_noise);
  return has_learned(p) && p.lowest_level < other.lowest_level - errors * level_error(noise);
}

/// The end of a test, at the lr in use or at an alarm. It has won if it got lower than the run ever
/// did, or clearly lower than where the run stands. Noise is as correlated on one side as on the
/// other; where it seems more so, that is the loss wandering. Without a winner the first gradient
/// has the casting vote: it is the second to speak against the lr, after the soft alarm. A run that
/// has got clearly lower than the ramp is heard too, unless its lr is unheard of.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void end_test(const Config& config, const Archive& archive,
                                                      State& state, Decision& decision) {
  const Progress& p = coarse_progress(config, state);
  const Progress& before = coarse_progress(config, archive.of(state.aside_slot));
  const double factor = smaller(p.variance_factor, before.variance_factor);
  const double noise = pooled_noise(p, before.noise * square_root(factor));
  const bool better =
      p.count - p.lowest_age >= kSettledSamples &&
      highest_likely(p, noise, kTestErrors) < lowest_likely(before, factor, kTestErrors);
  if (gets_lower(p, before, kTestErrors) || better)
    return restart_below(config, p.lowest_log_lr, state, decision);
  const bool unheard_of = state.cut_factor > kUnheardOf * state.estimate;
  const bool proven = is_vouched(state) || gets_lower(before, p, kWorseErrors);
  if (state.estimate > 0.0 && (unheard_of || !proven))
    return restart_as_told(config, agreed_lr(state.cut_factor, state), state, decision);
  const double level =
      p.lowest_evidence > kSureErrors ? highest_likely(p, noise, kWorseErrors) : kNever;
  const double log_lr = p.lowest_log_lr;
  return_to_aside(archive, state, decision);
  state.restarts -= 1.0; // nothing had failed
  state.tested = 1.0;
  state.ramp_level = level;
  state.ramp_log_lr = log_lr;
  state.soft_step = state.step + kSoftPause * config.block_steps;
}

/// The same question from further below; the state set aside stays there.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void test_again(const Config& config, State& state,
                                                        Decision& decision) {
  const double slot = state.aside_slot, good_slot = state.good_slot;
  begin_ramp(Phase::kTest, divide(state.ramp_start, kRampReach),
             divide(kLnTen, logarithm(state.ramp_growth)), state, decision);
  state.good_slot = good_slot;
  state.aside_slot = slot;
}

/// A hard alarm on a ramp. A test whose ramp has learned has an answer, and a run to go back to.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
answer_on_ramp(const Config& config, const Archive& archive, State& state, Decision& decision) {
  const bool at_once = state.fine.count < kEarlyRamp && !has_learned(state.fine);
  if (is_in(Phase::kTest, state) && at_once)
    test_again(config, state, decision);
  else if (is_in(Phase::kTest, state))
    end_test(config, archive, state, decision);
  else if (at_once)
    rescue(config, state.ramp_start, state, decision);
  else
    settle(config, shown_progress(config, state), state, decision);
}

/// The fast level above its lowest, in standard errors of both.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double rise_of(const Progress& p) {
  const double variance = level_variance(level_gain(kFastGain, p.count)) + p.lowest_variance;
  return (p.fast_level - p.lowest_level) *
         inverse_square_root(p.noise * p.cleanest_noise * p.variance_factor * variance);
}

/// One step of a ramp without an alarm.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
advance_ramp(const Config& config, const Archive& archive, State& state, Decision& decision) {
  const Progress& p = shown_progress(config, state);
  const double decade = divide(kLnTen, logarithm(state.ramp_growth) * config.block_steps);
  const double in_use = state.cut_factor * own_schedule(config, state);
  const bool arrived = state.ramp_lr >= kReached * in_use;
  const bool risen = rise_of(p) > kRampErrors;
  if (is_in(Phase::kTest, state)) {
    if (arrived)
      end_test(config, archive, state, decision);
  } else if (risen && has_learned(p) && p.lowest_age + 0.5 >= decade) {
    settle(config, p, state, decision);
  } else if (state.ramp_lr >= kReached * state.ramp_limit) {
    if (risen || p.lowest_evidence > kSureErrors || state.restarts > 1.0)
      return settle(config, p, state, decision);
    state.ramp_limit = in_use; // what led here has not come again
    if (arrived)
      go_on_as_before(state.step + 1.0, state);
  }
}

/// A soft alarm while the weights are not better than at the start, or after a trial in vain: only
/// a test can tell why, unless the first gradient has called the lr much too high all along. After
/// a test that told nothing, what its ramp has learned is still a better offer than a run that has
/// got worse since. The lowest level of a ramp and a present one that a chart has picked are both
/// extremes: their intervals must not overlap, each as wide as its own level is uncertain.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void doubt(const Config& config, const Archive& archive,
                                                   State& state, Decision& decision) {
  const Progress& p = coarse_progress(config, state);
  if (is_far_above(state)) {
    state.restarts += 1.0; // a level that stands still has its lowest anywhere: no landmark
    restart_as_told(config, state.estimate, state, decision);
  } else if (state.tested == 0.0) {
    if (config.snapshot_slots >= kSlots)
      begin_test(config, archive, state, decision);
  } else if (lowest_likely(p, p.variance_factor, kWorseErrors) > state.ramp_level) {
    state.restarts += 1.0;
    restart_below(config, state.ramp_log_lr, state, decision);
  }
}

ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void begin_trial(const Config& config, State& state) {
  state.trial_factor = state.cut_factor;
  state.trial_level = coarse_progress(config, state).lowest_level;
  state.cut_factor = divide(state.cut_factor, kTrialCut);
  enter(Phase::kTrial, state.step, state);
}

/// The second half of a trial that brought a new lowest level.
ADAPTLR_HOST_DEVICE inline void try_back(double level, State& state) {
  state.cut_factor = state.trial_factor;
  state.trial_level = level;
  state.phase_step = state.step;
}

/// Keeps a trial's lr if it brought a new lowest level; if not, the weights may be beyond what a
/// lower lr can mend, which a test can tell.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void
advance_trial(const Config& config, const Archive& archive, State& state, Decision& decision) {
  const Progress& p = coarse_progress(config, state);
  const double error = kTrialErrors * level_error(p.noise * square_root(p.variance_factor));
  const bool over = state.step - state.phase_step >= kTrialSamples * config.block_steps;
  const bool back = state.cut_factor >= state.trial_factor;
  const bool risen = p.fast_level > state.trial_level + error;
  if (!(over || (back && risen)))
    return;
  if (!back && p.fast_level < state.trial_level - error)
    return try_back(p.fast_level, state);
  state.soft_step = state.step + kSoftPause * config.block_steps;
  if (back && risen) {
    state.cut_factor = state.ceiling = divide(state.trial_factor, kTrialCut);
    state.cuts += 1.0;
    return go_on_as_before(state.step, state);
  }
  state.cut_factor = state.trial_factor;
  state.trials += 1.0;
  go_on_as_before(state.step, state);
  if (!back && state.tested == 0.0)
    doubt(config, archive, state, decision);
}

/// Answers a soft alarm, which asks only for an experiment.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void experiment(const Config& config,
                                                        const Archive& archive, int32_t flags,
                                                        const Reading& reading, State& state,
                                                        Decision& decision) {
  if (flags & kNoProgress || reading.gain < kNoProgressErrors || is_far_above(state))
    doubt(config, archive, state, decision);
  else if (is_vouched(state))
    return;
  else if (state.tested != 0.0)
    doubt(config, archive, state, decision);
  else if (state.trials < kMaxTrials)
    begin_trial(config, state);
}

/// Puts the good snapshot back and looks: if the loss is as high with weights that are known to be
/// good, the data has changed, and neither weights nor lr are to blame.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void begin_probe(bool collapsed, const Archive& archive,
                                                         State& state, Decision& decision) {
  const double slot = spare_slot(state), good = state.good_slot;
  copy(state, archive.of(slot));
  copy<Statistics>(archive.of(good), state);
  state.aside_slot = slot;
  state.pending_slot = kNoSlot;
  state.probe_sum = 0.0;
  state.collapsed = collapsed ? 1.0 : 0.0;
  enter(Phase::kProbe, state.step + 1.0, state);
  order(static_cast<int32_t>(slot), static_cast<int32_t>(good), decision);
}

} // namespace adaptlr
