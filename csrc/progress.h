// The collapse charts: has the loss made progress since the run was started, and has it kept it?
// Section 4 of docs/algorithm.md. Alive from the third loss, where the charts of detector.h still
// learn what is normal.
#pragma once

#include "detector.h"

namespace adaptlr {

// Levels over 8 and over 32 samples.
constexpr double kFastGain = 1.0 / 8.0;
constexpr double kSlowGain = 1.0 / 32.0;

// Noise, from the median of |differences|: of a normal one 1.4826 x the median is the standard
// deviation, and a difference holds the noise twice.
constexpr double kMedianScale = 1.0484;
constexpr int kFewDifferences = 8;    // below them the largest / 1.5: a median can be tiny by luck
constexpr int kRecentDifferences = 6; // show a change of the noise at once
constexpr double kCleanestGain = 1.0 / 64.0;
// A loss moves a level by 3 noises at most. The noise that counts here grows at once with the last
// differences: 1.5-fold upwards, 8-fold downwards, or the level would lag behind the lr of a ramp.
constexpr double kLevelClip = 3.0;
constexpr double kUpwardNoise = 1.5;
constexpr double kDownwardNoise = 8.0;

// Autocorrelation: that of the differences of independent noise is -1/2, whatever the trend.
constexpr double kAgreementGain = 1.0 / 256.0;
constexpr double kAgreementPrior = 48.0;
constexpr double kIndependentAgreement = -1.0 / 3.0; // of the signs; sin(pi/2 x) = -1/2
constexpr double kTrendGain = 1.0 / 8.0;
constexpr double kTrendClip = 3.5;
constexpr double kMaxLevelCorrelation = 0.8;

// Thresholds, in standard errors. docs/algorithm.md has their rates of false alarms.
constexpr double kFastLost = 10.0;
constexpr double kSlowLost = 8.0;
constexpr double kLostShare = 0.3; // of the progress made
constexpr double kAboveErrors = 8.0;
constexpr double kNoProgressErrors = 1.0;
constexpr double kStallErrors = 2.0;
constexpr double kPower = 0.6; // of the first loss: progress that must show if there was any
// A run of outliers is a jump, which no single bad batch is.
constexpr double kOutlierNoises = 6.0;
constexpr double kOutlierRun = 5.0;
// Long runs take more chances: thresholds rise by a fifth with every doubling.
constexpr double kLateSamples = 128.0;
constexpr double kLateRise = 0.2 / 0.69314718055994530942;
constexpr double kLnLateSamples = 4.8520302639196171659;

/// Medians of the differences, the newest included.
struct Medians {
  double window; // of all 24; of fewer than 8, the largest / 1.5
  double recent; // of the last 6
};

/// When the soft charts may speak, in samples since the start.
struct Window {
  double from;      // a lack of progress that must show
  double from_weak; // a lack of progress that need not
  double until;
  double stall; // samples without a new lowest level
};

/// What the charts found; in standard errors, where not told otherwise.
struct Reading {
  int32_t flags;
  double fast_rise; // of the fast level above its lowest
  double gain;      // of the fast level below the first loss
  double rise;      // the largest behind `flags`
  double level;     // loss
  double noise;     // loss
  bool outlier;     // the loss lies far above the fast level
};

ADAPTLR_HOST_DEVICE inline double level_gain(double gain, double n) {
  return larger(gain, divide(1.0, n));
}

/// Variance of an exponentially weighted mean, in units of that of a sample.
ADAPTLR_HOST_DEVICE inline double level_variance(double gain) { return divide(gain, 2.0 - gain); }

/// The first loss: the only clean sample of the start.
ADAPTLR_HOST_DEVICE inline void begin(double loss, double log_lr, Progress& p) {
  p.first_loss = p.previous_loss = p.fast_level = p.slow_level = loss;
  p.lowest_level = p.lowest_slow_level = p.highest_level = loss;
  p.log_lr = p.lowest_log_lr = log_lr;
  p.lowest_variance = p.lowest_slow_variance = 1.0;
  p.variance_factor = 1.0;
  p.difference_agreement = kIndependentAgreement;
}

/// tau, from how often successive differences agree in sign once the trend is taken off.
ADAPTLR_HOST_DEVICE inline void track_correlation(double difference, Progress& p) {
  const double residual = difference - p.difference_trend;
  const double gain = larger(kAgreementGain, divide(1.0, p.count + kAgreementPrior));
  const double agreement = (residual > 0.0) == (p.difference_residual > 0.0) ? 1.0 : -1.0;
  if (p.count > 2.0)
    p.difference_agreement += gain * (agreement - p.difference_agreement);
  p.difference_residual = residual;
  p.difference_trend += kTrendGain * clamp(residual, -kTrendClip * p.noise, kTrendClip * p.noise);
  const double correlation =
      clamp(1.0 + 2.0 * sin_quarter_turns(p.difference_agreement), 0.0, kMaxLevelCorrelation);
  const double rest = 1.0 - correlation;
  p.variance_factor = divide(1.0 + correlation, rest * rest);
}

ADAPTLR_HOST_DEVICE inline void track_noise(const Medians& medians, Progress& p) {
  const double range = kMinScaleShare * (p.highest_level - p.lowest_level);
  const double floor = larger(larger(range, kRoundoff * fabs(p.slow_level)), kTiny);
  p.noise = larger(kMedianScale * medians.window, floor);
  const bool cleaner = p.count <= 3.0 || p.noise < p.cleanest_noise;
  p.cleanest_noise =
      cleaner ? p.noise : p.cleanest_noise + kCleanestGain * (p.noise - p.cleanest_noise);
}

ADAPTLR_HOST_DEVICE inline void track_levels(double loss, double log_lr, double recent,
                                             Progress& p) {
  const double noise = larger(p.noise, kMedianScale * recent);
  const double up = kLevelClip * smaller(noise, kUpwardNoise * p.noise);
  const double down = kLevelClip * smaller(noise, kDownwardNoise * p.noise);
  const double fast_gain = level_gain(kFastGain, p.count);
  p.fast_level += fast_gain * clamp(loss - p.fast_level, -down, up);
  p.slow_level += level_gain(kSlowGain, p.count) * clamp(loss - p.slow_level, -down, up);
  p.log_lr += fast_gain * (log_lr - p.log_lr);
  p.highest_level = p.count <= 8.0 ? larger(p.highest_level, p.fast_level) : p.highest_level;
}

ADAPTLR_HOST_DEVICE inline void track_lowest(double fast_variance, double slow_variance,
                                             Progress& p) {
  p.lowest_age += 1.0;
  if (p.count >= 3.0 && p.fast_level < p.lowest_level) {
    p.lowest_level = p.fast_level;
    p.lowest_log_lr = p.log_lr;
    p.lowest_variance = fast_variance;
    p.lowest_noise = p.noise * square_root(p.variance_factor);
    p.lowest_age = 0.0;
    p.lowest_evidence = divide(p.first_loss - p.fast_level, p.noise) *
                        inverse_square_root(1.0 + p.variance_factor * fast_variance);
  }
  if (p.count == 12.0 || (p.count > 12.0 && p.slow_level < p.lowest_slow_level)) {
    p.lowest_slow_level = p.slow_level;
    p.lowest_slow_variance = slow_variance;
  }
}

/// LOST and ABOVE. A collapse inflates the noise, so that scores in units of the present noise stay
/// small: these are in units of the geometric mean of it and the cleanest.
ADAPTLR_HOST_DEVICE inline int32_t hard_charts(double loss, double fast_variance,
                                               double slow_variance, double sensitivity,
                                               const Progress& p, Reading& reading) {
  const double precision = inverse_square_root(p.noise * p.cleanest_noise);
  const double tau = p.variance_factor;
  const double late = larger(0.0, kLateRise * (logarithm(p.count) - kLnLateSamples));
  const double stretch = divide(1.0 + late, sensitivity);
  const double fast = p.fast_level - p.lowest_level, slow = p.slow_level - p.lowest_slow_level;
  reading.fast_rise =
      fast * precision * inverse_square_root(tau * (fast_variance + p.lowest_variance));
  const double slow_rise =
      slow * precision * inverse_square_root(tau * (slow_variance + p.lowest_slow_variance));
  const bool fast_lost = p.count >= 6.0 && reading.fast_rise > kFastLost * stretch &&
                         fast > kLostShare * larger(p.first_loss - p.lowest_level, 0.0);
  const bool slow_lost = p.count >= 24.0 && slow_rise > kSlowLost * stretch &&
                         slow > kLostShare * larger(p.first_loss - p.lowest_slow_level, 0.0);
  const double above = (p.fast_level - p.first_loss) * precision *
                       inverse_square_root(1.0 + tau * fast_variance) * sensitivity;
  reading.rise = larger(reading.fast_rise, larger(slow_rise, above));
  const double height = (loss - p.fast_level) * precision;
  reading.outlier = p.count >= kDifferences && height > 0.0 &&
                    height * height > kOutlierNoises * kOutlierNoises * tau;
  reading.level = p.fast_level;
  reading.noise = p.noise;
  return (fast_lost || slow_lost ? kLost : 0) |
         (p.count >= 3.0 && above > kAboveErrors * (1.0 + late) ? kAbove : 0);
}

/// NOPROG and STALL. Too high an lr, too low a one and a run that is done look the same here, so
/// these only ask for an experiment.
ADAPTLR_HOST_DEVICE inline int32_t soft_charts(double fast_variance, const Window& window,
                                               const Progress& p, Reading& reading) {
  const double root = inverse_square_root(1.0 + p.variance_factor * fast_variance);
  reading.gain = divide(p.first_loss - p.fast_level, p.noise) * root;
  const double error = divide(p.noise, root);
  const bool powered = 3.0 * error < kPower * fabs(p.first_loss);
  const double from = powered ? window.from : larger(window.from, window.from_weak);
  const bool none = p.count >= 32.0 && p.count >= from && reading.gain < kNoProgressErrors &&
                    p.lowest_age >= 16.0;
  const bool stall = p.count >= 24.0 && p.count >= window.from && p.lowest_age >= window.stall &&
                     reading.fast_rise > kStallErrors;
  return p.count > window.until ? 0 : (none ? kNoProgress : 0) | (stall ? kStall : 0);
}

/// Takes a finite sample in. `log_lr` is ln of the lr of the update that led to it.
ADAPTLR_HOST_DEVICE inline Reading track_progress(double loss, double log_lr,
                                                  const Medians& medians, const Window& window,
                                                  double sensitivity, Progress& p) {
  Reading reading{};
  p.count = smaller(p.count + 1.0, kMaxSamples);
  if (p.count == 1.0) {
    begin(loss, log_lr, p);
    return reading;
  }
  const double difference = loss - p.previous_loss;
  p.previous_loss = loss;
  p.next_difference = p.next_difference + 1.0 < kDifferences ? p.next_difference + 1.0 : 0.0;
  track_noise(medians, p);
  track_correlation(difference, p);
  track_levels(loss, log_lr, medians.recent, p);
  const double fast_variance = level_variance(level_gain(kFastGain, p.count));
  const double slow_variance = level_variance(level_gain(kSlowGain, p.count));
  track_lowest(fast_variance, slow_variance, p);
  reading.flags = hard_charts(loss, fast_variance, slow_variance, sensitivity, p, reading);
  reading.flags |= soft_charts(fast_variance, window, p, reading);
  return reading;
}

/// The differences that this step brings to both kinds of samples.
struct Differences {
  Medians fine;
  Medians coarse;
};

/// The next sample of the coarse charts, once it is complete.
ADAPTLR_HOST_DEVICE inline bool completes_block(const Config& config, const State& state) {
  return config.block_steps > 1.0 && state.block_count + 1.0 >= config.block_steps;
}

ADAPTLR_HOST_DEVICE inline double block_mean(const Config& config, double loss,
                                             const State& state) {
  return divide(state.block_sum + loss, config.block_steps);
}

/// What the soft charts and the experiments go by. A part of the state.
ADAPTLR_HOST_DEVICE inline const Progress& coarse_progress(const Config& config,
                                                           const State& state) {
  return config.block_steps > 1.0 ? state.coarse : state.fine;
}

/// The soft charts live inside [W' + 2, 4 W'], where warm-up is over and time is left; after a
/// restart, whose warm-up is shorter, from W' / 2 + 2.
ADAPTLR_HOST_DEVICE inline Window soft_window(const Config& config, const State& state) {
  const double warmup = divide(config.chart_steps, config.block_steps);
  const double restart = larger(10.0, 0.5 * warmup);
  const double from = state.restarted != 0.0 ? restart : warmup;
  return Window{from + 2.0, 1.5 * warmup, 4.0 * warmup, larger(20.0, warmup * (1.0 / 3.0))};
}

/// One block of many steps.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline Reading
track_coarse(double mean, double log_lr, const Medians medians, const Window window,
             double sensitivity, Progress& progress) {
  return track_progress(mean, log_lr, medians, window, sensitivity, progress);
}

/// Feeds both kinds of samples. Hard charts read every loss, soft ones the means.
ADAPTLR_HOST_DEVICE inline Reading watch_progress(const Config& config, double loss, double log_lr,
                                                  const Differences& differences, State& state) {
  constexpr int32_t kHard = kLost | kAbove;
  const Window window = soft_window(config, state);
  const double sensitivity = config.sensitivity;
  const bool completes = completes_block(config, state);
  const double mean = block_mean(config, loss, state);
  Progress progress = state.fine;
  Reading fine = track_progress(loss, log_lr, differences.fine, window, sensitivity, progress);
  state.fine = progress;
  if (config.block_steps <= 1.0)
    return fine;
  fine.flags &= kHard;
  state.block_sum = completes ? 0.0 : state.block_sum + loss;
  state.block_count = completes ? 0.0 : state.block_count + 1.0;
  if (!completes)
    return fine;
  const Reading coarse =
      track_coarse(mean, log_lr, differences.coarse, window, sensitivity, state.coarse);
  Reading both = fine;
  both.gain = coarse.gain;
  if (fine.flags == 0) {
    both.flags = coarse.flags & ~kHard;
    both.rise = coarse.rise;
    both.level = coarse.level;
    both.noise = coarse.noise;
  }
  return both;
}

} // namespace adaptlr
