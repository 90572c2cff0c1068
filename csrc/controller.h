// One control step: loss in, learning rate out. The host, the kernel and the captured graph run
// these same lines.
#pragma once

#include "guard.h"

namespace adaptlr {

ADAPTLR_HOST_DEVICE inline State initial_state() {
  State state{};
  state.factor = state.cut_factor = state.ceiling = 1.0;
  state.spike_threshold = state.norm_spike_threshold = kOutlierScore;
  state.last_alarm = -1e9;
  return state;
}

ADAPTLR_HOST_DEVICE inline int32_t outer_flags(const Config& config, const Signals& signals,
                                               const State& state) {
  int32_t flags = 0;
  if (signals.overwritten)
    flags |= kOverwritten;
  if (config.total_steps > 0.0 && state.step >= config.total_steps)
    flags |= kEnded;
  return flags;
}

/// A negative gradient norm means that none was given. Where GradScaler has found the overflow, the
/// norm says no more.
ADAPTLR_HOST_DEVICE inline int32_t gradient_flags(const Signals& signals) {
  if (signals.overflow)
    return kOverflow;
  return is_finite(signals.grad_norm) ? 0 : kNonfinite;
}

/// A norm that was given, from a step with nothing broken in it: the norm beside a broken loss, or
/// behind an overflow, is no sample of the others.
ADAPTLR_HOST_DEVICE inline bool is_sample(const Signals& signals, int32_t flags) {
  return signals.grad_norm >= 0.0 && !(flags & (kNonfinite | kOverflow));
}

/// The step as it was measured, before the guard changes anything.
ADAPTLR_HOST_DEVICE inline void fill_record(const Signals& signals, bool measured, double scale,
                                            const State& state, Record& record) {
  record.step = static_cast<int64_t>(state.step);
  record.loss = signals.loss;
  record.level = state.level;
  record.scale = scale;
  record.slope = state.slope;
  record.t_statistic = state.t_statistic;
  record.score = measured ? state.score : 0.0;
  record.cusum = state.cusum;
  record.rise = state.rise;
  record.grad_norm = signals.grad_norm < 0.0 ? nan("") : signals.grad_norm;
  record.previous_phase = static_cast<int16_t>(state.phase);
}

/// Whether the record of an event tells of the peak: judged, chosen, or to be raised.
ADAPTLR_HOST_DEVICE inline bool tells_of_peak(int32_t flags, double previous_phase,
                                              const State& state) {
  const bool raise = is_in(Phase::kRaise, state);
  const bool was_raise = previous_phase == static_cast<double>(Phase::kRaise);
  return (flags & (kFarLr | kFound)) != 0 || raise != was_raise;
}

/// The step as the guard left it. An event of the collapse charts shows what they saw.
ADAPTLR_HOST_DEVICE inline void complete_record(const Config& config, const Decision& decision,
                                                const Reading& reading, double previous_phase,
                                                const State& state, Record& record) {
  if (decision.event && reading.flags) {
    record.level = reading.level;
    record.scale = reading.noise;
    record.rise = reading.rise;
  }
  if (decision.event && tells_of_peak(decision.flags, previous_phase, state)) {
    const Verdict verdict = verdict_on_peak(config, state, record.level);
    record.level = verdict.level;
    record.score = verdict.peak;
    record.rise = verdict.estimate;
    record.cusum = verdict.lowest_lr;
  }
  record.lr = state.lr;
  record.factor = state.factor;
  record.target_factor = state.cut_factor;
  record.phase = static_cast<int16_t>(state.phase);
  record.flags = static_cast<int16_t>(decision.flags);
  record.action =
      static_cast<int16_t>(static_cast<int32_t>(decision.action) | decision.save << kSaveShift |
                           decision.restore << kRestoreShift);
}

/// Whether this step belongs among the events.
ADAPTLR_HOST_DEVICE inline bool is_event(const Config& config, int32_t flags, double previous_phase,
                                         const State& state) {
  const bool ends = (flags & kEnded) != 0 && state.step == config.total_steps;
  const bool guarded =
      config.guard_mode != GuardMode::kOff && previous_phase != static_cast<double>(Phase::kFailed);
  const bool answered = (flags & (kNonfinite | kOverflow)) != 0 || state.last_alarm == state.step ||
                        state.phase != previous_phase;
  return ends || (flags & (kFarLr | kFound)) != 0 || (guarded && answered);
}

/// Whether the loss is one for the collapse charts.
ADAPTLR_HOST_DEVICE inline bool watches_progress(const Config& config, double loss,
                                                 const State& state) {
  return config.guard_mode != GuardMode::kOff && is_finite(loss) && !is_in(Phase::kFailed, state);
}

/// ln of the lr of the update that led to this loss; before the first, of the one to come. An lr of
/// 0 has led nowhere.
ADAPTLR_HOST_DEVICE inline double log_lr_behind(const Config& config, const State& state) {
  if (state.fine.count == 0.0)
    return logarithm(larger(config.peak * multiplier(config, state), kTiny));
  return state.lr > 0.0 ? logarithm(state.lr) : state.fine.log_lr;
}

/// What a step measures, before anything is decided. Its parts do not depend on each other: on the
/// device a warp of its own works on each.
struct Measurements {
  Curve curve;      // with the loss and the gradient norm taken in
  double scale;     // that the score was measured in
  int32_t flags;    // of the gradient, and of the charts of the curve
  Reading reading;  // of the collapse charts
  double scheduled; // share of the peak
};

/// Feeds the charts of the long run. Works on a copy, which lives in registers.
ADAPTLR_HOST_DEVICE inline void measure_curve(const Signals& signals, const State& state,
                                              Measurements& measured) {
  Curve curve = state;
  if (is_in(Phase::kFailed, state)) {
    measured.scale = scale_of(curve);
  } else {
    measured.flags = gradient_flags(signals) | detect(signals.loss, curve, measured.scale);
    if (is_sample(signals, measured.flags))
      measured.flags |= detect_norm(signals.grad_norm, curve);
  }
  measured.curve = curve;
}

/// Feeds the collapse charts: `log_lr` is that of log_lr_behind, `differences` are those that the
/// loss brings. Of the State it changes what Statistics has beside the Curve.
ADAPTLR_HOST_DEVICE inline Reading measure_progress(const Config& config, double loss,
                                                    double log_lr, const Differences& differences,
                                                    State& state) {
  if (!watches_progress(config, loss, state))
    return Reading{};
  return watch_progress(config, loss, log_lr, differences, state);
}

/// Takes over what was measured. A run of outliers shows in both kinds of charts together.
ADAPTLR_HOST_DEVICE inline int32_t take_over(const Measurements& measured, State& state) {
  const double outliers = state.outlier_run + 1.0;
  static_cast<Curve&>(state) = measured.curve;
  int32_t flags = measured.flags | measured.reading.flags;
  if (measured.reading.outlier && state.samples > kStartupSamples) {
    state.outlier_run = outliers;
    flags |= outliers >= kOutlierRun ? kDiverge : 0;
  }
  return flags;
}

/// The lr of this step, and what the charts and the next step need to know of it. `scheduled` is
/// what the schedule says.
ADAPTLR_HOST_DEVICE inline void set_lr(const Config& config, const Signals& signals,
                                       double scheduled, State& state, Decision& decision) {
  state.factor = rewarmed_factor(config, state);
  decision.multiplier = state.factor * scheduled;
  if (leaves_schedule(config, state)) {
    decision.multiplier = multiplier(config, state);
    state.factor = scheduled > 0.0 ? divide(decision.multiplier, scheduled) : state.factor;
  }
  const double lr =
      signals.applied_lr >= 0.0 ? signals.applied_lr : config.peak * decision.multiplier;
  state.lr = lr;
  if (decision.action == Action::kSkip)
    return;
  if (state.first_lr == 0.0)
    state.first_lr = divide(lr, config.peak);
  if (is_ramp(state))
    state.ramp_lr *= state.ramp_growth;
}

/// To be called before anything is measured. Whether this is the first step of the run.
ADAPTLR_HOST_DEVICE inline bool begin_step(const Config& config, State& state) {
  const bool first = state.peak == 0.0;
  if (state.peak != config.peak)
    follow_peak(config, state);
  return first;
}

/// What the step comes to. A failed run measures nothing and skips every step.
ADAPTLR_HOST_DEVICE inline Decision decide(const Config& config, const Signals& signals,
                                           const Measurements& measured, bool first,
                                           const Archive& archive, State& state, Record& record) {
  Decision decision{0.0,     Action::kSkip, outer_flags(config, signals, state),
                    kNoSlot, kNoSlot,       false};
  const bool failed = is_in(Phase::kFailed, state);
  const double previous_phase = state.phase;
  decision.flags |= take_over(measured, state);
  fill_record(signals, !failed && is_finite(signals.loss), measured.scale, state, record);
  if (first)
    decision.flags |= begin_run(config, signals.loss, state);
  if (!failed)
    guard(config, signals, measured.reading, archive, state, decision);
  if (decision.action == Action::kSkip && config.guard_mode == GuardMode::kAct)
    state.skips += 1.0;

  decision.event = is_event(config, decision.flags, previous_phase, state);
  set_lr(config, signals, measured.scheduled, state, decision);
  state.step += 1.0;
  complete_record(config, decision, measured.reading, previous_phase, state, record);
  return decision;
}

/// Advances the run by one optimizer step. No allocation, no I/O. The kernel has the same calls, of
/// which it makes those in the middle side by side.
ADAPTLR_HOST_DEVICE inline Decision control_step(const Config& config, const Signals& signals,
                                                 const Differences& differences,
                                                 const Archive& archive, State& state,
                                                 Record& record) {
  const bool first = begin_step(config, state);
  Measurements measured{};
  measure_curve(signals, state, measured);
  const bool watches = watches_progress(config, signals.loss, state);
  const double log_lr = watches ? log_lr_behind(config, state) : 0.0;
  measured.reading = measure_progress(config, signals.loss, log_lr, differences, state);
  measured.scheduled = schedule(config, state.step);
  return decide(config, signals, measured, first, archive, state, record);
}

} // namespace adaptlr
