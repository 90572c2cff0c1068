// progress.h's take_differences, done by a warp together. Only for kernels.cu.
#pragma once

#include "controller.h"

namespace adaptlr {

constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kDifferences <= 32, "a lane looks after one difference");

/// Which lanes' values are smaller than this lane's: a bit for each.
__device__ inline unsigned lanes_below(double own, const double* values) {
  unsigned smaller = 0;
#pragma unroll
  for (unsigned j = 0; j < kDifferences; ++j)
    smaller |= (values[j] < own ? 1u : 0u) << j;
  return smaller;
}

/// Which lower lanes' values are equal to this lane's. They come first, so that no two lanes have
/// the same rank.
__device__ inline unsigned lanes_tied(double own, const double* values, unsigned lane) {
  unsigned equal = 0;
#pragma unroll 1
  for (unsigned j = 0; j < lane && j < kDifferences; ++j)
    equal |= (values[j] == own ? 1u : 0u) << j;
  return equal;
}

/// The lanes in the middle of those in `members`; 0 where equal values hide them.
struct Middle {
  unsigned low, high;
};
__device__ inline Middle middle_of(unsigned members, unsigned below, unsigned lane) {
  const int rank = __popc(below & members), count = __popc(members);
  const bool member = members >> lane & 1u;
  return Middle{__ballot_sync(kAllLanes, member && rank == (count - 1) / 2),
                __ballot_sync(kAllLanes, member && rank == count / 2)};
}

__device__ inline double mean_of(const Middle& middle, const double* values) {
  return 0.5 * (values[__ffs(middle.low) - 1] + values[__ffs(middle.high) - 1]);
}

/// Every lane ranks one value among all.
__device__ inline Medians warp_difference(double loss, const Progress& p, double* window,
                                          unsigned lane) {
  const int newest = static_cast<int>(p.next_difference);
  const int count = static_cast<int>(smaller(p.count, kDifferences));
  if (count == 0)
    return Medians{0.0, 0.0};
  if (lane == 0)
    window[newest] = fabs(loss - p.previous_loss);
  __syncwarp();
  const unsigned members = (1u << count) - 1u;
  const int wrapped =
      newest - static_cast<int>(lane) + (static_cast<int>(lane) > newest ? kDifferences : 0);
  const unsigned recent =
      members & __ballot_sync(kAllLanes, lane < kDifferences && wrapped < kRecentDifferences);

  const double own = window[lane < kDifferences ? lane : 0];
  unsigned below = lanes_below(own, window);
  Middle all = middle_of(members, below, lane), last = middle_of(recent, below, lane);
  if (count < kFewDifferences || all.low == 0 || all.high == 0 || last.low == 0 || last.high == 0) {
    below |= lanes_tied(own, window, lane);
    all = middle_of(members, below, lane);
    last = middle_of(recent, below, lane);
  }
  Medians medians{mean_of(all, window), mean_of(last, window)};
  if (count < kFewDifferences) {
    const bool largest = (members >> lane & 1u) && __popc(below & members) == count - 1;
    medians.window = divide(window[__ffs(__ballot_sync(kAllLanes, largest)) - 1], 1.5);
  }
  return medians;
}

__device__ ADAPTLR_RARE Medians warp_coarse_difference(double mean, State& state, unsigned lane) {
  return warp_difference(mean, state.coarse, state.coarse_differences, lane);
}

__device__ inline Differences warp_differences(const Config& config, double loss, State& state,
                                               unsigned lane) {
  Differences differences{};
  if (!watches_progress(config, loss, state))
    return differences;
  differences.fine = warp_difference(loss, state.fine, state.fine_differences, lane);
  if (completes_block(config, state))
    differences.coarse = warp_coarse_difference(block_mean(config, loss, state), state, lane);
  return differences;
}

} // namespace adaptlr
