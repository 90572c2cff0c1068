// Robust statistics of the loss curve and of the gradient norm, and the charts that watch them:
// sections 2, 3 and 7 of docs/algorithm.md.
#pragma once

#include "arithmetic.h"

namespace adaptlr {

// What is larger counts as not finite: float32 has almost given up there.
constexpr double kLossLimit = 1e30;

// Of the moving statistics.
constexpr double kGain = 1.0 / 128.0;
constexpr double kMaxSamples = 1e6; // 1 / n is below every gain long before
constexpr double kStartupSamples = 16.0;
constexpr double kRebaseSamples = 32.0;

// Scores are clipped here: an outlier moves the level by 0.02 scales at most.
constexpr double kClip = 2.5;
// E[min(Z^2, c^2)] of a normal Z: (2 Phi - 1) - 2 c phi + 2 c^2 (1 - Phi).
constexpr double kClipVariance = 0.9775599834528069;

// The smallest scale that counts, as a share of the progress made, and of the level: a float32 loss
// resolves no less.
constexpr double kMinScaleShare = 1e-3;
constexpr double kRoundoff = 5e-7;
constexpr double kTiny = 1e-30;

// Autocorrelation. Slow, so that a divergence cannot raise its own threshold.
constexpr double kSignGain = 1.0 / 512.0;
constexpr double kSignPrior = 32.0; // samples of independent noise assumed at the start
constexpr double kMaxCorrelation = 0.9;

// DIVERGE. Siegmund's formula: over 1e7 steps between false alarms.
constexpr double kCusumSlack = 0.5; // half the shift to be found, in scales
constexpr double kCusumLimit = 16.0;
constexpr double kOutlierScore = 6.0;
// Start-up: so many orders, of which one leaves the largest losses for the end.
constexpr double kOrders = 1000.0;

// SPIKE.
constexpr double kSpikeRate = 1e-3; // at most, in the long run
constexpr double kSpikeGain = 0.5;
constexpr double kSpikeGrowth = 1.6478971161205929; // exp(kSpikeGain (1 - kSpikeRate))
constexpr double kSpikeDecay = 1.0 - kSpikeGain * kSpikeRate;

// DRIFT and WORSE.
constexpr double kDriftSamples = 32.0;
constexpr double kDriftErrors = 6.5; // standard errors
constexpr double kDriftShare = 0.1;  // of the progress made
constexpr double kDriftTrend = 2.0;  // t-statistic of the slope: the level still rises
constexpr double kBestLeak = 1.0 / 2048.0;

// The gradient norm. A norm of 0 has no logarithm.
constexpr double kTinyNorm = 1e-30;
// The smallest scale of its log that counts: bfloat16 resolves 0.8 %, so that no spike is a
// rounding.
constexpr double kMinNormScale = 0.01;

ADAPTLR_HOST_DEVICE inline bool is_finite(double x) { return fabs(x) <= kLossLimit; }

ADAPTLR_HOST_DEVICE inline double clamp(double x, double low, double high) {
  return smaller(larger(x, low), high);
}

/// Variance of the least-squares slope of unit noise, over n samples or the window of the gain
/// (equation 9).
ADAPTLR_HOST_DEVICE inline double slope_variance(double n) {
  constexpr double kOdds = kGain / (2.0 - kGain);
  constexpr double kWindow = 2.0 * kOdds * kOdds * kOdds;
  return larger(divide(12.0, n * n * n - n), kWindow);
}

/// Discounted regression over a relative clock (equations 7 and 8): no sum grows with time.
ADAPTLR_HOST_DEVICE inline void regress(double gain, double residual, Curve& state) {
  const double age = state.mean_age + 1.0;
  state.age_covariance = (1.0 - gain) * (state.age_covariance + gain * age * residual);
  state.age_variance = (1.0 - gain) * (state.age_variance + gain * age * age);
  state.mean_age = (1.0 - gain) * age;
  state.slope = divide(state.age_covariance, state.age_variance);
}

/// Over three times the largest loss so far.
ADAPTLR_HOST_DEVICE inline bool refuse(double loss, Curve& state) {
  const double range = 2.0 * larger(fabs(state.max_loss), fabs(state.min_loss));
  if (state.samples <= 4.0 || !(loss - state.max_loss > range))
    return false;
  state.samples -= 1.0;
  state.observed -= 1.0;
  state.outlier_run += 1.0;
  return true;
}

/// Whether it is no luck that the last losses are the largest: losses alike come in any order, and
/// of (samples + run over run) orders one has these at its end.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline bool is_beyond_luck(double samples, double run) {
  double orders = 1.0;
  for (double i = 1.0; i <= run; i += 1.0)
    orders *= divide(samples + i, i);
  return orders >= kOrders;
}

/// Plain running moments (equation 3).
ADAPTLR_HOST_DEVICE inline void average(double gain, double residual, double& level,
                                        double& variance) {
  level += gain * residual;
  variance = (1.0 - gain) * (variance + gain * residual * residual);
}

/// Huber's proposal 2 (equation 5): one bounded score moves location and scale.
ADAPTLR_HOST_DEVICE inline void track(double gain, double bounded, double residual,
                                      double least_variance, double& level, double& variance) {
  level += gain * residual;
  variance = larger(variance, least_variance) *
             (1.0 + gain * (bounded * bounded * (1.0 / kClipVariance) - 1.0));
}

/// Whether a score is far out, against a threshold that calibrates itself to kSpikeRate.
ADAPTLR_HOST_DEVICE inline bool is_spike(double score, double& threshold) {
  const bool spike = score > threshold;
  const double calmed = larger(kOutlierScore, threshold * kSpikeDecay);
  threshold = spike ? threshold * kSpikeGrowth : calmed;
  return spike;
}

/// The first losses.
ADAPTLR_HOST_DEVICE inline int32_t start_up(double loss, Curve& state) {
  state.score = state.rise = state.t_statistic = 0.0;
  if (refuse(loss, state))
    return is_beyond_luck(state.samples, state.outlier_run) ? kDiverge | kWorse : 0;
  const double n = state.samples;
  const double gain = divide(1.0, n);
  const bool first = n == 1.0;
  state.max_loss = first ? loss : larger(state.max_loss, loss);
  state.min_loss = first ? loss : smaller(state.min_loss, loss);
  state.outlier_run = 0.0;
  state.level = first ? loss : state.level;
  const double residual = loss - state.level;
  average(gain, residual, state.level, state.variance);
  if (!first)
    regress(gain, residual, state);
  state.spike_threshold = kOutlierScore;
  if (state.observed <= kStartupSamples) {
    state.start_level = state.best_level = state.level;
    state.best_samples = n;
  }
  return 0;
}

/// The smallest scale that counts (equation 4).
ADAPTLR_HOST_DEVICE inline double scale_floor(const Curve& state) {
  const double progress = kMinScaleShare * larger(state.start_level - state.best_level, 0.0);
  return larger(larger(progress, kRoundoff * fabs(state.level)), kTiny);
}

ADAPTLR_HOST_DEVICE inline double scale_of(const Curve& state) {
  const double deviation = square_root(state.variance);
  return state.samples <= kStartupSamples ? deviation : larger(deviation, scale_floor(state));
}

/// Long-run variance factor of the noise, from the agreement of successive signs (equation 6).
/// Products of scores would let an excursion raise its own threshold.
ADAPTLR_HOST_DEVICE inline double variance_factor(double gain, double bounded, Curve& state) {
  const double centred = bounded - state.mean_score;
  const double sign_gain = larger(kSignGain, divide(1.0, state.samples + kSignPrior));
  const double agreement = (centred > 0.0) == (state.previous_score > 0.0) ? 1.0 : -1.0;
  state.sign_agreement += sign_gain * (agreement - state.sign_agreement);
  state.previous_score = centred;
  state.mean_score += gain * (bounded - state.mean_score);
  const double correlation = clamp(sin_quarter_turns(state.sign_agreement), 0.0, kMaxCorrelation);
  return divide(1.0 + correlation, 1.0 - correlation);
}

/// The loss runs away: a cumulative sum of bounded scores.
ADAPTLR_HOST_DEVICE inline int32_t diverge_chart(double bounded, double tau, Curve& state) {
  state.cusum =
      larger(0.0, state.cusum + bounded * inverse_square_root(kClipVariance * tau) - kCusumSlack);
  return state.cusum > kCusumLimit ? kDiverge : 0;
}

ADAPTLR_HOST_DEVICE inline double slope_t_statistic(double tau, const Curve& state) {
  const double explained = state.age_covariance * state.slope; // C^2 / V
  const double residual_variance = larger(state.variance - explained, 0.05 * state.variance);
  const double variance = slope_variance(state.samples) * residual_variance * tau;
  return state.slope * inverse_square_root(larger(variance, 1e-38));
}

/// The level has risen above its best and still rises, or is above its start. Both sides of the
/// comparison are estimates. A best that lies far back says nothing of a level that falls.
ADAPTLR_HOST_DEVICE inline int32_t level_charts(double scale, double tau, Curve& state) {
  const double effective = smaller(state.samples, 2.0 / kGain - 1.0); // Kish
  const bool best = state.level < state.best_level;
  const double leaked = state.best_level + kBestLeak * (state.level - state.best_level);
  state.best_level = best ? state.level : leaked;
  state.best_samples = best ? effective : state.best_samples;
  const double risen = state.level - state.best_level;
  const double per_sample = divide(1.0, effective);
  state.rise = divide(risen, scale) *
               inverse_square_root(tau * (per_sample + divide(1.0, state.best_samples)));
  const bool drift = state.rise > kDriftErrors && state.t_statistic > kDriftTrend &&
                     risen > kDriftShare * larger(state.start_level - state.best_level, 0.0);
  const double start_error = scale * square_root(tau * (per_sample + 1.0 / kStartupSamples));
  const bool worse =
      state.level - larger(state.start_level, state.best_level) > kDriftErrors * start_error;
  return state.samples > kDriftSamples ? (drift ? kDrift : 0) | (worse ? kWorse : 0) : 0;
}

/// Takes one loss in and returns the flags of the charts. A loss that is not finite changes
/// nothing. `scale` receives the scale that the score was measured in.
ADAPTLR_HOST_DEVICE inline int32_t detect(double loss, Curve& state, double& scale) {
  scale = scale_of(state);
  if (!is_finite(loss))
    return kNonfinite;
  state.samples = smaller(state.samples + 1.0, kMaxSamples);
  state.observed += 1.0;
  if (state.samples <= kStartupSamples) {
    const int32_t flags = start_up(loss, state);
    scale = scale_of(state);
    return flags;
  }
  const double gain = larger(kGain, divide(1.0, state.samples));
  const double floor = scale_floor(state);
  scale = larger(scale, floor);
  state.score = divide(loss - state.level, scale);
  const double bounded = clamp(state.score, -kClip, kClip);
  const double residual = scale * bounded;
  state.outlier_run = 0.0; // of refused losses; measure counts outliers from here on
  int32_t flags = is_spike(state.score, state.spike_threshold) ? kSpike : 0;
  const double tau = variance_factor(gain, bounded, state);
  flags |= diverge_chart(bounded, tau, state);
  regress(gain, residual, state);
  track(gain, bounded, residual, floor * floor, state.level, state.variance);
  state.t_statistic = slope_t_statistic(tau, state);
  return flags | level_charts(scale, tau, state);
}

/// Takes one gradient norm in, which is finite, and says whether it is a spike (equations 12 and
/// 13). Nothing here touches the statistics of the loss.
ADAPTLR_HOST_DEVICE inline int32_t detect_norm(double norm, Curve& state) {
  constexpr double kLeastVariance = kMinNormScale * kMinNormScale;
  state.norm_samples = smaller(state.norm_samples + 1.0, kMaxSamples);
  const bool starting = state.norm_samples <= kStartupSamples;
  const double gain = larger(kGain, divide(1.0, state.norm_samples));
  const double residual = logarithm(larger(norm, kTinyNorm)) - state.norm_level;
  const double variance = larger(state.norm_variance, kLeastVariance);
  const double precision = inverse_square_root(variance); // serves both score and scale
  const double score = residual * precision;
  const double bounded = clamp(score, -kClip, kClip);
  double plain_level = state.norm_level, plain_variance = state.norm_variance;
  average(gain, residual, plain_level, plain_variance);
  track(gain, bounded, variance * precision * bounded, kLeastVariance, state.norm_level,
        state.norm_variance);
  // Chosen afterwards: a branch would keep the root from overlapping with the logarithm.
  state.norm_level = starting ? plain_level : state.norm_level;
  state.norm_variance = starting ? plain_variance : state.norm_variance;
  return is_spike(starting ? 0.0 : score, state.norm_spike_threshold) ? kNormSpike : 0;
}

/// Forgets how sure the statistics were; `accept` also takes the present level for the new
/// reference.
ADAPTLR_HOST_DEVICE inline void rebase(double loss, bool accept, Curve& state) {
  state.samples = smaller(state.samples, kRebaseSamples);
  state.mean_age = smaller(state.mean_age, 0.5 * kRebaseSamples);
  state.age_variance = smaller(state.age_variance, kRebaseSamples * kRebaseSamples / 12.0);
  state.age_covariance = state.cusum = state.outlier_run = 0.0;
  state.max_loss = larger(state.max_loss, loss);
  if (!accept)
    return;
  state.best_level = state.level;
  state.best_samples = state.samples;
  state.start_level = larger(state.start_level, state.level);
}

} // namespace adaptlr
