// Warm-up and decay in closed form: equation 2 of docs/algorithm.md.
#pragma once

#include "arithmetic.h"

namespace adaptlr {

/// (1 + cos(pi x)) / 2, written so that it is exactly 0 at x = 1 and does not cancel on the way.
ADAPTLR_HOST_DEVICE inline double half_cosine(double x) {
  const double sine = sin_quarter_turns(1.0 - x);
  return sine * sine;
}

/// Share of the peak that is left after the share `x` of the steps after warm-up; `step` is the
/// clock.
ADAPTLR_HOST_DEVICE inline double decay(const Config& config, double step, double x) {
  switch (config.decay) {
  case Decay::kCosine:
    return half_cosine(x);
  case Decay::kLinear:
    return 1.0 - x;
  case Decay::kConstant:
    return 1.0;
  case Decay::kWsd:
    return smaller(1.0, divide(1.0 - x, config.decay_share));
  case Decay::kInverseSqrt:
    return square_root(
        divide(config.timescale, step + 1.0 - config.warmup_steps + config.timescale));
  case Decay::kCosineRestarts: {
    const double cycle = config.cycles * x;
    return half_cosine(cycle - ceil(cycle) + 1.0);
  }
  case Decay::kTable:
    return reinterpret_cast<const double*>(config.table)[static_cast<int64_t>(step)];
  }
  return 1.0;
}

/// Multiplier of the peak lr at `step`. A pure function of the clock: a resumed run needs nothing
/// else.
ADAPTLR_HOST_DEVICE inline double schedule(const Config& config, double step) {
  if (step < config.warmup_steps)
    return divide(step + 1.0, config.warmup_steps);
  const bool open_ended = config.total_steps == 0.0;
  if (!open_ended && step >= config.total_steps)
    return config.final_multiplier;
  const double x = open_ended ? 0.0
                              : divide(step - config.warmup_steps + 1.0,
                                       config.total_steps - config.warmup_steps);
  return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * decay(config, step, x);
}

/// For all but the hot path, where a call takes longer than the schedule.
ADAPTLR_HOST_DEVICE ADAPTLR_RARE inline double rare_schedule(const Config& config, double step) {
  return schedule(config, step);
}

/// The last multiplier before the end that is not zero; what a run keeps that goes on past its end.
ADAPTLR_HOST_DEVICE inline double final_multiplier(const Config& config) {
  for (double step = config.total_steps - 1.0; step >= 0.0; step -= 1.0) {
    const double multiplier = schedule(config, step);
    if (multiplier > 0.0)
      return multiplier;
  }
  return 0.0;
}

} // namespace adaptlr
