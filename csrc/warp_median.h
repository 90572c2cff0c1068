// progress.h's take_differences, done by a warp together. Only for kernels.cu.
#pragma once

#include "controller.h"

namespace adaptlr {

constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kDifferences <= 32, "a lane looks after one difference");

/// The mean of the elements that stand in the middle of those in `members`, a bit for each lane;
/// `below` says which lanes' values come before this lane's.
__device__ inline double median_of(unsigned members, unsigned below, unsigned lane,
                                   const double* values) {
  const int rank = __popc(below & members), count = __popc(members);
  const bool member = members >> lane & 1u;
  const unsigned low = __ballot_sync(kAllLanes, member && rank == (count - 1) / 2);
  const unsigned high = __ballot_sync(kAllLanes, member && rank == count / 2);
  return 0.5 * (values[__ffs(low) - 1] + values[__ffs(high) - 1]);
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
  const int64_t own = bits_of(window[lane < kDifferences ? lane : 0]); // ordered as the values are
  unsigned below = 0;
#pragma unroll
  for (unsigned j = 0; j < kDifferences; ++j)
    below |= (bits_of(window[j]) < own + (j < lane ? 1 : 0) ? 1u : 0u) << j;

  const unsigned members = count == 32 ? kAllLanes : (1u << count) - 1u;
  const int wrapped =
      newest - static_cast<int>(lane) + (static_cast<int>(lane) > newest ? kDifferences : 0);
  const unsigned recent =
      members & __ballot_sync(kAllLanes, lane < kDifferences && wrapped < kRecentDifferences);
  Medians medians{median_of(members, below, lane, window), median_of(recent, below, lane, window)};
  if (count < kFewDifferences) {
    const bool last = (members >> lane & 1u) && __popc(below & members) == count - 1;
    medians.window = divide(window[__ffs(__ballot_sync(kAllLanes, last)) - 1], 1.5);
  }
  return medians;
}

__device__ inline Differences warp_differences(const Config& config, double loss, State& state,
                                               unsigned lane) {
  Differences differences{};
  if (!watches_progress(config, loss, state))
    return differences;
  differences.fine = warp_difference(loss, state.fine, state.fine_differences, lane);
  if (completes_block(config, state))
    differences.coarse = warp_difference(block_mean(config, loss, state), state.coarse,
                                         state.coarse_differences, lane);
  return differences;
}

} // namespace adaptlr
