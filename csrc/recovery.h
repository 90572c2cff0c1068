// Rollbacks: what is done where a smaller lr alone brings nothing back. Section 6 of
// docs/algorithm.md.
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
constexpr double kUnheardOf = 5.0;       // times that: no best rate was so far above
constexpr double kSeenErrors = 2.0;      // progress that is there
constexpr double kSureErrors = 4.0;      // even for the lowest of many levels
constexpr double kSettledSamples = 12.0; // that a level and its noise need to be sure of
constexpr double kSeenSamples = 6.0;
constexpr double kEarlyRamp = 12.0; // samples: an alarm before them began the ramp too high
constexpr double kRampErrors = 2.5; // above the lowest level: the best of a ramp lies behind
constexpr double kReached = 0.999;  // of the end of a ramp

constexpr double kNever = 1e18; // above every level

/// A loop, where an assignment would be hundreds of instructions at each of its places.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void copy_words(const double* from, double* to, int count) {
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int i = 0; i < count; ++i)
    to[i] = from[i];
}

template <typename T> ADAPTLR_HOST_DEVICE inline void copy(const T& from, T& to) {
  static_assert(sizeof(T) % sizeof(double) == 0, "nothing is left over");
  copy_words(reinterpret_cast<const double*>(&from), reinterpret_cast<double*>(&to),
             static_cast<int>(sizeof(T) / sizeof(double)));
}

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

/// From kRescue on these are all phases but two: one comparison in the usual phase, kRun.
ADAPTLR_HOST_DEVICE inline bool is_ramp(const State& state) {
  return state.phase >= static_cast<double>(Phase::kRescue) && !is_in(Phase::kProbe, state) &&
         !is_in(Phase::kShift, state);
}

ADAPTLR_HOST_DEVICE inline void enter(Phase phase, double first_step, State& state) {
  state.phase = static_cast<double>(phase);
  state.phase_step = first_step;
}

ADAPTLR_HOST_DEVICE inline bool has_snapshots(const Config& config) {
  return config.snapshot_slots > 0.0;
}

/// The slot of the two that holds no good snapshot, nor a state that a raised lr has yet to beat.
ADAPTLR_HOST_DEVICE inline double spare_slot(const State& state) {
  return state.good_slot == kFirst || state.aside_slot == kFirst ? kSecond : kFirst;
}

/// Whether the run is at a raised lr that has yet to prove itself: the state from before is kept.
ADAPTLR_HOST_DEVICE inline bool is_on_probation(const State& state) {
  return state.aside_slot != kNoSlot && !is_in(Phase::kRaise, state) &&
         !is_in(Phase::kTest, state) && !is_in(Phase::kProbe, state);
}

/// The schedule of this run: a restart takes the place of its warm-up, which begins after a search.
/// Where that took no step, the peak is held for as long.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double own_schedule(const Config& config,
                                                            const State& state) {
  if (state.warmup_start != 0.0 && state.restarted == 0.0 && state.step < config.warmup_steps) {
    const double steps = larger(config.warmup_steps - fabs(state.warmup_start), 1.0);
    return smaller(divide(state.step - larger(state.warmup_start, 0.0) + 1.0, steps), 1.0);
  }
  const double step = state.restarted != 0.0 ? larger(state.step, config.warmup_steps) : state.step;
  return rare_schedule(config, step);
}

ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double relative_lr(const Config& config, double log_lr) {
  return divide(exp(log_lr), config.peak);
}

/// Where the user has changed the peak: rates that were seen stay what they are, and a lower peak
/// needs no cut for what it lowers by itself. A higher one is the user's word against the guard's.
/// Either takes the place of an lr that was searched for, or raised.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void follow_peak(const Config& config, State& state) {
  const double ratio = state.peak > 0.0 ? divide(state.peak, config.peak) : 1.0;
  const bool searched = config.search_steps >= 0.0 && ratio != 1.0; // what it found is overruled
  const double relief = searched && !is_in(Phase::kSearch, state) ? kNever : larger(1.0, ratio);
  state.peak = config.peak;
  state.cut_factor = smaller(1.0, state.cut_factor * relief);
  state.ceiling = smaller(1.0, state.ceiling * relief);
  state.trial_factor = smaller(1.0, state.trial_factor * relief);
  if (ratio != 1.0 && is_on_probation(state))
    state.aside_slot = kNoSlot;
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

/// What the way here has shown: by the means of blocks once there are enough, for the lowest of
/// thousands of levels is always far below the first loss.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline const Progress& shown_progress(const Config& config,
                                                                       const State& state) {
  const Progress& coarse = coarse_progress(config, state);
  return coarse.count >= kSeenSamples ? coarse : state.fine;
}

/// The standard error of a fast level, of whose 15 samples the half are new.
ADAPTLR_HOST_DEVICE inline double level_error(double noise) {
  return noise * 0.36514837167011074; // sqrt(2 / 15)
}

ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void forget_statistics(State& state) {
  static_cast<Statistics&>(state) = Statistics{};
  state.spike_threshold = state.norm_spike_threshold = kOutlierScore;
}

ADAPTLR_HOST_DEVICE inline void order(int32_t save, int32_t restore, Decision& decision) {
  decision.save = save;
  decision.restore = restore;
  decision.action = Action::kSkip;
}

/// The next step begins from kStart.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void return_to_start(Phase phase, State& state,
                                                             Decision& decision) {
  forget_statistics(state);
  state.origin_step = state.step + 1.0;
  state.restarted = 1.0;
  state.first_lr = 0.0;
  state.pending_slot = state.good_slot = kNoSlot;
  if (is_in(Phase::kTest, state)) // has won; what a raise has set aside is still to be beaten
    state.aside_slot = kNoSlot;
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
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double agreed_lr(double lr, const State& state) {
  const double told = smaller(larger(state.estimate, divide(lr, kFarAbove)), lr * kFarAbove);
  return state.estimate > 0.0 ? square_root(lr * told) : lr;
}

/// Whether the first gradient speaks for the lr. Then a loss that has fallen, and stands still, is
/// as low as this run gets for now; a collapse would show as a rise.
ADAPTLR_HOST_DEVICE inline bool is_vouched(const State& state) {
  return state.cut_factor <= kVouched * state.estimate;
}

/// What a restart makes up for: the share of the peak that the schedule leaves once re-warmed.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double schedule_left(const Config& config,
                                                             const State& state) {
  const double resumes = larger(state.step + config.rewarm_steps, config.warmup_steps);
  return larger(kLeastSchedule, rare_schedule(config, resumes));
}

/// From kStart with another peak: `lr` is the one that is meant once re-warmed, so what the
/// schedule has lost by then is made up for.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void restart(const Config& config, double lr, State& state,
                                                     Decision& decision) {
  state.cut_factor =
      larger(least_factor(config, kLeastFactor), smaller(divide(lr, schedule_left(config, state)),
                                                         divide(state.cut_factor, kLeastCut)));
  state.ceiling = state.cut_factor;
  state.cuts += 1.0;
  state.tested = 0.0;
  state.soft_step = 0.0;
  return_to_start(Phase::kRewarm, state, decision);
}

/// On account of the first gradient. What an earlier ramp had reached is no part of that record.
ADAPTLR_HOST_DEVICE inline void restart_as_told(const Config& config, double lr, State& state,
                                                Decision& decision) {
  decision.flags |= kFarLr;
  state.ramp_log_lr = 0.0;
  restart(config, lr, state, decision);
}

/// From kStart with an lr that grows by a decade in `decade_steps`.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void begin_ramp(Phase phase, double lr, double decade_steps,
                                                        State& state, Decision& decision) {
  state.ramp_start = state.ramp_lr = larger(lr, 1e-15);
  state.ramp_growth = exp(divide(kLnTen, decade_steps));
  return_to_start(phase, state, decision);
}

/// Up to an lr that is known to be too high, to find the one that is not.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void rescue(const Config& config, double failed_lr,
                                                    State& state, Decision& decision) {
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
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool was_range_test(const Progress& p) {
  return !has_learned(p) || p.log_lr - p.lowest_log_lr > logarithm(kLeastCut);
}

/// Answers a hard alarm early in a run: back to the start, where the way there has told which lr
/// was good; or else with a ramp to find it.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void start_over(const Config& config, State& state,
                                                        Decision& decision) {
  const Progress& p = shown_progress(config, state);
  if (!has_learned(p) && is_far_above(state))
    return restart_as_told(config, state.estimate, state, decision);
  if (!has_learned(p))
    return rescue(config, failed_lr(state), state, decision);
  const double divisor = state.tested != 0.0 ? kRampDivisor : kWarmupDivisor;
  const double lr = divide(relative_lr(config, p.lowest_log_lr), divisor);
  restart(config, agreed_lr(lr, state), state, decision);
}

/// At an lr that holds, where a ramp had its lowest level at this one.
ADAPTLR_HOST_DEVICE inline void restart_below(const Config& config, double log_lr, State& state,
                                              Decision& decision) {
  const double lr = divide(relative_lr(config, log_lr), kRampDivisor);
  restart(config, agreed_lr(lr, state), state, decision);
}

/// The end of a ramp: at the lr that brought the lowest level, or well below the one that did not.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline void settle(const Config& config, const Progress& p,
                                                    State& state, Decision& decision) {
  if (has_learned(p))
    return restart_below(config, p.lowest_log_lr, state, decision);
  const double lr = divide(relative_lr(config, p.log_lr), kWarmupDivisor);
  restart(config, state.estimate > 0.0 ? smaller(lr, state.estimate) : lr, state, decision);
}

} // namespace adaptlr
