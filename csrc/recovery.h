// Rollbacks and experiments: what is done where a smaller lr alone brings nothing back. Section 6
// of docs/algorithm.md.
#pragma once

#include "progress.h"
#include "schedule.h"

namespace adaptlr {

// Ramps begin this far below the first lr that failed. At 1000 times the best lr and a warm-up of
// 30 steps that is where learning begins.
constexpr double kRampReach = 50.0;
constexpr double kDecadeSteps = 12.0; // the fastest at which a momentum of 10 steps still learns
constexpr double kLnTen = 2.3025850929940456840;
// From the lr at the lowest level to one that holds: a warm-up overshoots more than a slow ramp.
constexpr double kWarmupDivisor = 4.0;
constexpr double kRampDivisor = 3.0;
constexpr double kLeastCut = 2.0;      // of every restart
constexpr double kLeastSchedule = 0.2; // a restart makes up for this much of the decay
constexpr double kLeastFactor = 1e-8;
constexpr double kFarAbove = 10.0;       // the one-gradient estimate
constexpr double kVouched = 3.0;         // times that: no cause to doubt an lr that has learned
constexpr double kSeenErrors = 2.0;      // progress that is there
constexpr double kSureErrors = 4.0;      // even for the lowest of many levels
constexpr double kSettledSamples = 12.0; // that a level and its noise need to be sure of
constexpr double kSeenSamples = 6.0;
constexpr double kEarlyRamp = 12.0; // samples: an alarm before them began the ramp too high
constexpr double kRampErrors = 2.5; // above the lowest level: the best of a ramp lies behind

constexpr double kTrialCut = 4.0;
constexpr double kTrialSamples = 20.0;
constexpr double kTrialErrors = 2.5;
constexpr double kMaxTrials = 3.0;
// Of levels that were picked, under noise whose tails its scale does not see. After a test a run is
// doubted for the second time.
constexpr double kTestErrors = 4.0;
constexpr double kWorseErrors = 3.0;
constexpr double kSoftPause = 24.0; // samples after a trial or a test
constexpr double kNever = 1e18;     // above every level

constexpr double kProbeSteps = 8.0;
constexpr double kProbeNoises = 3.0; // that the levels a probe decides between are apart at least
constexpr double kProbeSure = 1.5;   // votes ahead: three losses that all say the same will do
constexpr double kProbeVote = 0.5;   // of one loss
// After a change of the data the older snapshot is asked again for the first time.
constexpr int64_t kShiftSteps = 16;

/// The states beside the snapshots.
struct Archive {
  State* saved; // of kFirst and kSecond

  ADAPTLR_HOST_DEVICE State& of(double slot) const {
    return saved[static_cast<int>(slot) - kFirst];
  }
};

ADAPTLR_HOST_DEVICE inline bool is_in(Phase phase, const State& state) {
  return state.phase == static_cast<double>(phase);
}

ADAPTLR_HOST_DEVICE inline bool is_ramp(const State& state) {
  return is_in(Phase::kRescue, state) || is_in(Phase::kTest, state) || is_in(Phase::kSearch, state);
}

ADAPTLR_HOST_DEVICE inline void enter(Phase phase, double first_step, State& state) {
  state.phase = static_cast<double>(phase);
  state.phase_step = first_step;
}

ADAPTLR_HOST_DEVICE inline bool has_snapshots(const Config& config) {
  return config.snapshot_slots > 0.0;
}

/// The slot of the two that holds no good snapshot.
ADAPTLR_HOST_DEVICE inline double spare_slot(const State& state) {
  return state.good_slot == kFirst ? kSecond : kFirst;
}

/// The schedule of this run: a restart takes the place of its warm-up, which begins after a search.
ADAPTLR_HOST_DEVICE inline double own_schedule(const Config& config, const State& state) {
  if (state.warmup_start > 0.0 && state.restarted == 0.0 && state.step < config.warmup_steps)
    return divide(state.step - state.warmup_start + 1.0, config.warmup_steps - state.warmup_start);
  const double step = state.restarted != 0.0 ? larger(state.step, config.warmup_steps) : state.step;
  return schedule(config, step);
}

ADAPTLR_HOST_DEVICE inline double relative_lr(const Config& config, double log_lr) {
  return divide(exp(log_lr), config.peak);
}

/// Where the user has changed the peak: rates that were seen stay what they are, and a lower peak
/// needs no cut for what it lowers by itself. A higher one is the user's word against the guard's.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void follow_peak(const Config& config, State& state) {
  const double ratio = state.peak > 0.0 ? divide(state.peak, config.peak) : 1.0;
  const bool searched = config.search_steps >= 0.0 && ratio != 1.0; // what it found is overruled
  const double relief = searched && !is_in(Phase::kSearch, state) ? kNever : larger(1.0, ratio);
  state.peak = config.peak;
  state.cut_factor = smaller(1.0, state.cut_factor * relief);
  state.ceiling = smaller(1.0, state.ceiling * relief);
  state.trial_factor = smaller(1.0, state.trial_factor * relief);
  state.onset_lr *= ratio;
  state.first_lr *= ratio;
  state.ramp_lr *= ratio;
  state.ramp_start *= ratio;
  state.ramp_limit *= ratio;
  if (state.step > 0.0)
    state.estimate *= ratio;
}

/// Progress that stands out of the noise.
ADAPTLR_HOST_DEVICE inline bool has_learned(const Progress& p) {
  return p.count >= kSeenSamples && p.lowest_evidence > kSeenErrors;
}

/// The standard error of a fast level, of whose 15 samples the half are new.
ADAPTLR_HOST_DEVICE inline double level_error(double noise) {
  return noise * 0.36514837167011074; // sqrt(2 / 15)
}

ADAPTLR_HOST_DEVICE inline void forget_statistics(State& state) {
  static_cast<Statistics&>(state) = Statistics{};
  state.spike_threshold = state.norm_spike_threshold = kOutlierScore;
}

ADAPTLR_HOST_DEVICE inline void order(int32_t save, int32_t restore, Decision& decision) {
  decision.save = save;
  decision.restore = restore;
  decision.action = Action::kSkip;
}

/// The next step begins from kStart.
ADAPTLR_HOST_DEVICE inline void return_to_start(Phase phase, State& state, Decision& decision) {
  forget_statistics(state);
  state.origin_step = state.step + 1.0;
  state.restarted = 1.0;
  state.first_lr = 0.0;
  state.pending_slot = state.good_slot = state.aside_slot = kNoSlot;
  enter(phase, state.step + 1.0, state);
  order(decision.save, kStart, decision);
}

/// The least that the guard makes of a factor. What a search has found may be any share of the
/// typed lr.
ADAPTLR_HOST_DEVICE inline double least_factor(const Config& config, double least) {
  return config.search_steps >= 0.0 ? kTiny : least;
}

/// Whether the first gradient says, too, that the lr is much too high.
ADAPTLR_HOST_DEVICE inline bool is_far_above(const State& state) {
  return state.estimate > 0.0 && state.cut_factor > kFarAbove * state.estimate;
}

/// The lr to restart at, where the way to a collapse or a ramp tells `lr`: the geometric mean of it
/// and of what the first gradient told, whose errors have nothing in common. One gradient may be an
/// odd one: it counts as at most a decade off.
ADAPTLR_HOST_DEVICE inline double agreed_lr(double lr, const State& state) {
  const double told = smaller(larger(state.estimate, divide(lr, kFarAbove)), lr * kFarAbove);
  return state.estimate > 0.0 ? square_root(lr * told) : lr;
}

/// Whether the first gradient speaks for the lr. Then a loss that has fallen, and stands still, is
/// as low as this run gets for now; a collapse would show as a rise.
ADAPTLR_HOST_DEVICE inline bool is_vouched(const State& state) {
  return state.cut_factor <= kVouched * state.estimate;
}

/// From kStart with another peak: `lr` is the one that is meant once re-warmed, so what the
/// schedule has lost by then is made up for.
ADAPTLR_HOST_DEVICE inline void restart(const Config& config, double lr, State& state,
                                        Decision& decision) {
  const double resumes = larger(state.step + config.rewarm_steps, config.warmup_steps);
  const double left = larger(kLeastSchedule, schedule(config, resumes));
  state.cut_factor = larger(least_factor(config, kLeastFactor),
                            smaller(divide(lr, left), divide(state.cut_factor, kLeastCut)));
  state.ceiling = state.cut_factor;
  state.cuts += 1.0;
  state.tested = 0.0;
  state.soft_step = 0.0;
  return_to_start(Phase::kRewarm, state, decision);
}

/// From kStart with an lr that grows by a decade in `decade_steps`.
ADAPTLR_HOST_DEVICE inline void begin_ramp(Phase phase, double lr, double decade_steps,
                                           State& state, Decision& decision) {
  state.ramp_start = state.ramp_lr = larger(lr, 1e-15);
  state.ramp_growth = exp(divide(kLnTen, decade_steps));
  return_to_start(phase, state, decision);
}

/// Up to an lr that is known to be too high, to find the one that is not.
ADAPTLR_HOST_DEVICE inline void rescue(const Config& config, double failed_lr, State& state,
                                       Decision& decision) {
  state.ramp_limit = relative_lr(config, state.fine.log_lr);
  begin_ramp(Phase::kRescue, divide(failed_lr, kRampReach), kDecadeSteps * config.block_steps,
             state, decision);
}

/// The lr that a run has failed with since its start.
ADAPTLR_HOST_DEVICE inline double failed_lr(const State& state) {
  return state.restarted == 0.0 ? state.first_lr : larger(state.first_lr, 0.1 * state.cut_factor);
}

/// Whether the way to a collapse has told which lr is good: it has at least doubled since the
/// lowest level, or nothing was learned.
ADAPTLR_HOST_DEVICE inline bool was_range_test(const Progress& p) {
  return !has_learned(p) || p.log_lr - p.lowest_log_lr > logarithm(kLeastCut);
}

/// Answers a hard alarm early in a run: back to the start, where the way there has told which lr
/// was good; or else with a ramp to find it.
ADAPTLR_HOST_DEVICE inline void start_over(const Config& config, State& state, Decision& decision) {
  if (!has_learned(state.fine) && is_far_above(state))
    return restart(config, state.estimate, state, decision);
  if (!has_learned(state.fine) && state.tested == 0.0)
    return rescue(config, failed_lr(state), state, decision);
  const double divisor = state.tested != 0.0 ? kRampDivisor : kWarmupDivisor;
  const double lr = divide(relative_lr(config, state.fine.lowest_log_lr), divisor);
  restart(config, agreed_lr(lr, state), state, decision);
}

/// At an lr that holds, where a ramp had its lowest level at this one.
ADAPTLR_HOST_DEVICE inline void restart_below(const Config& config, double log_lr, State& state,
                                              Decision& decision) {
  const double lr = divide(relative_lr(config, log_lr), kRampDivisor);
  restart(config, agreed_lr(lr, state), state, decision);
}

/// The end of a ramp: at the lr that brought the lowest level, or well below the one that did not.
ADAPTLR_HOST_DEVICE inline void settle(const Config& config, const Progress& p, State& state,
                                       Decision& decision) {
  if (has_learned(p))
    return restart_below(config, p.lowest_log_lr, state, decision);
  const double lr = divide(relative_lr(config, p.log_lr), kWarmupDivisor);
  restart(config, state.estimate > 0.0 ? smaller(lr, state.estimate) : lr, state, decision);
}

/// Asks the causal question from the start, with the present state set aside: does a lower lr get
/// lower? A late test is slower, so that it can reach what the run has reached.
ADAPTLR_HOST_DEVICE inline void begin_test(const Config& config, const Archive& archive,
                                           State& state, Decision& decision) {
  const Progress p = coarse_progress(config, state);
  const double lr = has_learned(p) ? relative_lr(config, p.lowest_log_lr) : failed_lr(state);
  const double start = divide(lr, kRampReach);
  const double end = state.cut_factor * own_schedule(config, state);
  const double reach = larger(divide(end, start), 1.0);
  const double decades = larger(0.5, divide(logarithm(reach), kLnTen));
  const double taken = p.count * config.block_steps;
  const double steps = smaller(0.6 * taken, 1.5 * config.chart_steps);
  const double slot = spare_slot(state);
  enter(Phase::kRun, state.step, state);
  archive.of(slot) = state;
  decision.save = static_cast<int32_t>(slot);
  const double good_slot = state.good_slot;
  begin_ramp(Phase::kTest, start, larger(kDecadeSteps * config.block_steps, divide(steps, decades)),
             state, decision);
  state.good_slot = good_slot;
  state.aside_slot = slot;
  state.restarts += 1.0;
}

/// Goes on as before an experiment: growing again if that was not over.
ADAPTLR_HOST_DEVICE inline void go_on_as_before(double first_step, State& state) {
  enter(state.cut_factor < state.ceiling ? Phase::kRegrow : Phase::kRun, first_step, state);
}

/// Takes weights and statistics back that were set aside; the clock and the counts go on.
ADAPTLR_HOST_DEVICE inline void return_to_aside(const Archive& archive, State& state,
                                                Decision& decision) {
  const State now = state;
  state = archive.of(now.aside_slot);
  state.step = now.step;
  state.skips = now.skips;
  state.cuts = now.cuts;
  state.restarts = now.restarts;
  state.last_alarm = now.last_alarm;
  state.consecutive_skips = state.consecutive_overflows = 0.0;
  state.aside_slot = state.pending_slot = kNoSlot;
  go_on_as_before(state.step + 1.0, state);
  order(kNoSlot, static_cast<int32_t>(now.aside_slot), decision);
}

/// So many standard errors above the lowest level.
ADAPTLR_HOST_DEVICE inline double highest_likely(const Progress& p, double errors) {
  return p.lowest_level + errors * p.lowest_noise * square_root(p.lowest_variance);
}

/// So many standard errors below the present level. `variance_factor`: of the noise's correlation.
ADAPTLR_HOST_DEVICE inline double lowest_likely(const Progress& p, double variance_factor,
                                                double errors) {
  const double variance = level_variance(level_gain(kFastGain, p.count));
  return p.fast_level - errors * p.noise * square_root(variance_factor * variance);
}

/// The end of a test, at the lr in use or at an alarm. It has won if it got lower than the run ever
/// did, or clearly lower than where the run stands. Noise is as correlated on one side as on the
/// other; where it seems more so, that is the loss wandering.
ADAPTLR_HOST_DEVICE inline void end_test(const Config& config, const Archive& archive, State& state,
                                         Decision& decision) {
  const Progress p = coarse_progress(config, state);
  const Progress before = coarse_progress(config, archive.of(state.aside_slot));
  const bool lower =
      has_learned(p) &&
      p.lowest_level < before.lowest_level - kTestErrors * level_error(p.lowest_noise);
  const double factor = smaller(p.variance_factor, before.variance_factor);
  const bool better = p.count - p.lowest_age >= kSettledSamples &&
                      highest_likely(p, kTestErrors) < lowest_likely(before, factor, kTestErrors);
  if (lower || better)
    return restart_below(config, p.lowest_log_lr, state, decision);
  const double level = p.lowest_evidence > kSureErrors ? highest_likely(p, kWorseErrors) : kNever;
  const double log_lr = p.lowest_log_lr;
  return_to_aside(archive, state, decision);
  state.tested = 1.0;
  state.ramp_level = level;
  state.ramp_log_lr = log_lr;
  state.soft_step = state.step + kSoftPause * config.block_steps;
}

/// A hard alarm on a ramp. A test whose ramp has learned has an answer, and a run to go back to.
ADAPTLR_HOST_DEVICE inline void answer_on_ramp(const Config& config, const Archive& archive,
                                               State& state, Decision& decision) {
  if (state.fine.count < kEarlyRamp && !has_learned(state.fine))
    rescue(config, state.ramp_start, state, decision);
  else if (is_in(Phase::kTest, state) && has_learned(coarse_progress(config, state)))
    end_test(config, archive, state, decision);
  else
    settle(config, Progress{state.fine}, state, decision);
}

/// One step of a ramp without an alarm.
ADAPTLR_HOST_DEVICE inline void advance_ramp(const Config& config, const Archive& archive,
                                             const Reading& reading, State& state,
                                             Decision& decision) {
  constexpr double kReached = 0.999;
  const Progress& p = state.fine;
  const double decade_steps = divide(kLnTen, logarithm(state.ramp_growth));
  if (is_in(Phase::kTest, state)) {
    if (state.ramp_lr >= kReached * state.cut_factor * own_schedule(config, state))
      return end_test(config, archive, state, decision);
  } else if (state.ramp_lr >= kReached * state.ramp_limit ||
             (has_learned(p) && p.lowest_age + 0.5 >= decade_steps &&
              reading.fast_rise > kRampErrors)) {
    return settle(config, Progress{p}, state, decision);
  }
}

/// A soft alarm while the weights are not better than at the start, or after a trial in vain: only
/// a test can tell why, unless the first gradient has called the lr much too high all along. After
/// a test that told nothing, what its ramp has learned is still a better offer than a run that has
/// got worse since. The lowest level of a ramp and a present one that a chart has picked are both
/// extremes: their intervals must not overlap, each as wide as its own level is uncertain.
ADAPTLR_HOST_DEVICE inline void doubt(const Config& config, const Archive& archive, State& state,
                                      Decision& decision) {
  const Progress p = coarse_progress(config, state);
  if (is_far_above(state)) {
    state.restarts += 1.0; // a level that stands still has its lowest anywhere: no landmark
    restart(config, state.estimate, state, decision);
  } else if (state.tested == 0.0) {
    if (config.snapshot_slots >= kSlots)
      begin_test(config, archive, state, decision);
  } else if (lowest_likely(p, p.variance_factor, kWorseErrors) > state.ramp_level) {
    state.restarts += 1.0;
    restart_below(config, state.ramp_log_lr, state, decision);
  }
}

ADAPTLR_HOST_DEVICE inline void begin_trial(const Config& config, State& state) {
  state.trial_factor = state.cut_factor;
  state.trial_level = coarse_progress(config, state).lowest_level;
  state.cut_factor = divide(state.cut_factor, kTrialCut);
  enter(Phase::kTrial, state.step, state);
}

/// Keeps a trial's lr if it brought a new lowest level; if not, the weights may be beyond what a
/// lower lr can mend, which a test can tell.
ADAPTLR_HOST_DEVICE inline void advance_trial(const Config& config, const Archive& archive,
                                              State& state, Decision& decision) {
  const Progress p = coarse_progress(config, state);
  const double error = level_error(p.noise * square_root(p.variance_factor));
  const double taken = state.step - state.phase_step;
  const bool helped = p.fast_level < state.trial_level - kTrialErrors * error;
  if (!helped && taken < kTrialSamples * config.block_steps)
    return;
  state.soft_step = state.step + kSoftPause * config.block_steps;
  if (helped) {
    state.ceiling = state.cut_factor;
    state.cuts += 1.0;
    return go_on_as_before(state.step, state);
  }
  state.cut_factor = state.trial_factor;
  state.trials += 1.0;
  go_on_as_before(state.step, state);
  if (state.tested == 0.0)
    doubt(config, archive, state, decision);
}

/// Answers a soft alarm, which asks only for an experiment.
ADAPTLR_HOST_DEVICE inline void experiment(const Config& config, const Archive& archive,
                                           int32_t flags, const Reading& reading, State& state,
                                           Decision& decision) {
  if (flags & kNoProgress || reading.gain < kNoProgressErrors || is_far_above(state))
    doubt(config, archive, state, decision);
  else if (state.trials < kMaxTrials && state.tested == 0.0 && !is_vouched(state))
    begin_trial(config, state);
}

/// Puts the good snapshot back and looks: if the loss is as high with weights that are known to be
/// good, the data has changed, and neither weights nor lr are to blame.
ADAPTLR_HOST_DEVICE inline void begin_probe(bool collapsed, const Archive& archive, State& state,
                                            Decision& decision) {
  const double slot = spare_slot(state), good = state.good_slot;
  archive.of(slot) = state;
  static_cast<Statistics&>(state) = archive.of(good);
  state.aside_slot = slot;
  state.pending_slot = kNoSlot;
  state.probe_sum = 0.0;
  state.collapsed = collapsed ? 1.0 : 0.0;
  enter(Phase::kProbe, state.step + 1.0, state);
  order(static_cast<int32_t>(slot), static_cast<int32_t>(good), decision);
}

} // namespace adaptlr
