// The data that the algorithm works on. docs/algorithm.md defines every quantity; the names are the
// same there, in adaptlr/reference.py, in records and in checkpoints.
#pragma once

#ifdef __CUDACC__
#define ADAPTLR_HOST_DEVICE __host__ __device__
#else
#define ADAPTLR_HOST_DEVICE
#endif

// What few steps need stays out of the code, and so out of the registers, of all the others, and is
// compiled once, not at each of its places. Its arguments must be copies: an address taken would
// keep the usual step's State in memory.
#if defined(__CUDACC__)
#define ADAPTLR_RARE __noinline__
#else
#define ADAPTLR_RARE __attribute__((noinline, cold))
#endif

// NVRTC compiles these headers without the standard library.
#ifdef __CUDACC_RTC__
using int32_t = int;
using int64_t = long long;
using int16_t = short;
using uint64_t = unsigned long long;
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

namespace adaptlr {

constexpr int kMaxGroups = 64;

/// Places for snapshots of parameters and optimizer state. `kStart` is kept for the run; the two
/// others take turns. To restore `kZeroMoment`, which is no place, is to zero the optimizer's first
/// moments and to leave all else.
enum Slot : int32_t { kNoSlot, kStart, kFirst, kSecond, kZeroMoment };
constexpr int kSlots = 3;
/// Record::action is action | save << kSaveShift | restore << kRestoreShift.
constexpr int kSaveShift = 4;
constexpr int kRestoreShift = 8;

enum class Decay : int32_t {
  kCosine,
  kLinear,
  kConstant,
  kWsd,
  kInverseSqrt,
  kCosineRestarts,
  kTable
};
enum class GuardMode : int32_t { kOff, kObserve, kAct };
enum class Phase : int32_t {
  kRun,
  kRewarm, // after a cut or a restart
  kHold,
  kRegrow,
  kFailed, // every further step is skipped
  kTrial,  // a lower lr, with the weights as they are
  kRescue, // a ramp from the start up to an lr that is known to be too high
  kTest,   // a ramp from the start up to the lr in use, with the present state set aside
  kProbe,  // the losses of a good snapshot, without an update
  kSearch, // a ramp that looks for the lr, before the run proper
  kShift,  // the data has changed, and it may pass: the snapshot from before is kept
  kRaise   // a ramp from the start up from the lr in use, with the present state set aside
};
enum class Action : int32_t { kNone, kSkip };

enum Flag : int32_t {
  kNonfinite = 1,     // the loss or the gradient norm is not finite
  kSpike = 2,         // one loss far above the level; informative
  kDiverge = 4,       // the loss runs away
  kDrift = 8,         // the level has risen above its best
  kWorse = 16,        // the level is above where the run began
  kOverflow = 32,     // GradScaler found an infinite gradient
  kOverwritten = 64,  // something else wrote the lr since the last step
  kEnded = 128,       // the clock has passed total_steps
  kNormSpike = 256,   // the gradient norm is far above its level; informative
  kLost = 512,        // the progress made is lost again
  kAbove = 1024,      // the loss is above the first one
  kNoProgress = 2048, // the loss is where it began
  kStall = 4096,      // the loss has stopped falling above its lowest
  kFarLr = 8192,      // the lr is far from the one-gradient estimate; a restart acts on it
  kFound = 16384      // the peak was chosen in this step
};

/// What the user asked for, resolved to numbers. Changes only between steps, at the user's request.
struct Config {
  double total_steps;           // T, steps; 0: open-ended
  double warmup_steps;          // W, steps
  double min_lr_ratio;          // r in [0, 1]
  double decay_share;           // of the steps after warm-up, for wsd; in (0, 1]
  double cycles;                // of cosine_restarts; >= 1
  double timescale;             // of inverse_sqrt, steps; > 0
  double final_multiplier;      // schedule at t >= T
  double backoff_factor;        // in (0, 1)
  double rewarm_steps;          // steps; >= 1
  double hold_steps;            // steps; >= 1
  double regrow_growth;         // of the factor, a step; > 1
  double max_consecutive_skips; // non-finite steps in a row that are survived
  double snapshot_slots;        // 0: none, 1: kStart only, 3
  double snapshot_steps;        // between two of them, and their age when they count as good
  double chart_steps;           // W', of the collapse charts: W, or a tenth of the run if longer
  double block_steps;           // that a sample of the coarse charts is the mean of; >= 1
  double sensitivity;           // divides the thresholds of the collapse charts; > 0
  double max_restarts;          // rollbacks and experiments that a run may have
  double max_factor;        // that a run which learns too slowly may be raised to; >= 1; 1: none is
  double search_steps;      // that a search may take; 0: the estimate alone; -1: the lr is typed
  double peak;              // the largest of peaks; lr
  double peaks[kMaxGroups]; // peak lr of every group
  int32_t group_count;      // of peaks in use
  int32_t estimate_suffices; // 1: a search takes no ramp where the first gradient tells an lr
  Decay decay;
  GuardMode guard_mode;
  int64_t table; // address of total_steps doubles, for Decay::kTable
};

/// What one optimizer step brings in.
struct Signals {
  double loss;         // mean or sum of the micro-batch losses; NaN and inf are valid
  double grad_norm;    // before clipping; negative: not given; NaN and inf are valid
  double applied_lr;   // lr of the largest group in this step where the host sets it; negative: the
                       // controller sets it
  int32_t overflow;    // GradScaler found an infinite gradient
  int32_t overwritten; // something else wrote the lr since the last step
};

/// Where the loss has been since the run was (re)started: what the collapse charts know. All zero
/// at a start.
struct Progress {
  double count;                // finite samples; at most 1e6
  double first_loss;           // the first of them
  double previous_loss;        // the last
  double next_difference;      // where the next difference goes in its window; in [0, 24)
  double difference_trend;     // moving mean of the differences; loss / sample
  double difference_residual;  // the last difference less the trend; loss / sample
  double difference_agreement; // of the signs of successive residuals; in [-1, 1]
  double variance_factor;      // tau of the noise
  double noise;                // scale of the noise, from the differences; loss
  double cleanest_noise;       // the smallest of late; loss
  double fast_level;           // over 8 samples; loss
  double slow_level;           // over 32 samples; loss
  double log_lr;               // mean of ln lr behind the fast level
  double highest_level;        // of the first 8 samples; loss
  double lowest_level;         // of the fast level; loss
  double lowest_slow_level;    // of the slow level; loss
  double lowest_variance;      // of lowest_level; in units of the noise^2
  double lowest_slow_variance; // of lowest_slow_level; likewise
  double lowest_noise;         // noise x sqrt(tau) when lowest_level was set; loss
  double lowest_log_lr;        // log_lr when lowest_level was set
  double lowest_evidence;      // of any progress, when lowest_level was set; in standard errors
  double lowest_age;           // samples since lowest_level was set
};
constexpr int kProgressFields = 22;
constexpr int kDifferences = 24; // that the noise is taken from

/// The long run of the loss and of the gradient norm.
struct Curve {
  double samples;              // n; finite losses since the last rebase; in [0, 1e6]
  double observed;             // finite losses that were ever taken
  double level;                // robust moving mean; loss
  double variance;             // robust moving variance about it; loss^2
  double mean_age;             // of the regression's weights; steps
  double age_variance;         // steps^2
  double age_covariance;       // of time and loss; steps x loss
  double sign_agreement;       // of successive scores; in [-1, 1]
  double previous_score;       // the last clipped score less mean_score
  double mean_score;           // moving mean of clipped scores
  double cusum;                // S, one-sided sum of clipped scores
  double outlier_run;          // losses 6 noises up in a row; during start-up, refused in a row
  double spike_threshold;      // in units of the scale; >= 6
  double best_level;           // leaky minimum of the level; loss
  double best_samples;         // effective samples behind it
  double start_level;          // the level after start-up; loss
  double max_loss;             // largest loss of the start-up
  double min_loss;             // smallest loss of the start-up
  double slope;                // of the loss; loss / step
  double t_statistic;          // of the slope
  double score;                // z of the last finite loss
  double rise;                 // of the level above its best, in standard errors
  double norm_samples;         // gradient norms taken; in [0, 1e6]
  double norm_level;           // robust moving mean of the log of the gradient norm
  double norm_variance;        // robust moving variance of that log about it
  double norm_spike_threshold; // of the norm, in units of the scale; >= 6; starts at 6
};

/// All that is measured; set aside and put back with the weights.
struct Statistics : Curve {
  double block_sum;                        // of the losses for the next sample of `coarse`
  double block_count;                      // losses in block_sum
  Progress fine;                           // of every loss
  Progress coarse;                         // of means of block_steps losses; unused where that is 1
  double fine_differences[kDifferences];   // between successive samples, in size; the last ones
  double coarse_differences[kDifferences]; // of the means
};

/// Everything that lasts from step to step, all of it in checkpoints.
struct State : Statistics {
  double step;                  // t; steps taken, exact up to 2^53; starts at 0
  double lr;                    // of the largest group, in the last step; starts at 0
  double phase;                 // of the guard; a Phase
  double phase_step;            // the step at which it began
  double factor;                // lr = peak x factor x schedule; > 0; starts at 1
  double cut_factor;            // what factor re-warms to; starts at 1; at most max_factor
  double ceiling;               // what cut_factor regrows to; starts at 1
  double onset_lr;              // lr / peak at the last quiet step
  double streak;                // alarms that followed another without a quiet stretch between
  double last_alarm;            // its step; starts at -1e9
  double consecutive_skips;     // non-finite steps in a row
  double consecutive_overflows; // overflowed steps in a row
  double skips;                 // steps skipped so far
  double cuts;                  // of the factor so far
  double restarts;              // rollbacks and experiments so far
  double origin_step;           // the step that began from kStart
  double restarted;             // 1: origin_step is not the run's beginning
  double first_lr;              // lr / peak of the first step since
  double ramp_lr;               // lr / peak of the coming step of a ramp
  double ramp_growth;           // of ramp_lr, a step
  double ramp_start;            // lr / peak that the ramp began with
  double ramp_limit;            // lr / peak at which a rescue ends
  double trial_factor;          // cut_factor before the trial
  double trial_level;           // lowest level before the trial; loss
  double trials;                // that did not help
  double tested;                // 1: the last test told nothing
  double soft_step;             // the first at which a soft chart may speak again
  double ramp_level;            // three errors above the lowest of a test that only learned; in a
                                // search its lowest level, before its ramp the lowest loss; loss
  double ramp_log_lr;           // its ln lr
  double probe_sum;             // of the probe's votes: above 0 for other data
  double collapsed;             // 1: progress was lost early in a run, which the probe explains
  double aside_slot;   // where the state lies that was set aside, or is to be beaten; a Slot
  double good_slot;    // the newest snapshot that has aged well; a Slot
  double pending_slot; // the one that still ages; a Slot
  double pending_step; // when it was taken
  double peak;         // config.peak of the last step; 0 before the first
  double estimate;     // lr / peak that the first gradient suggests; 0: none. Before the
                       // first step: that lr for a loss of 1
  double warmup_start; // the step that followed the search; 0: there was none; -n: it took none of
                       // its n steps
};
constexpr int kStateFields = 28 + 2 * (kProgressFields + kDifferences) + 38;
static_assert(sizeof(State) == kStateFields * sizeof(double),
              "a State is a row of a float64 tensor");

/// The states beside the snapshots of kFirst and kSecond; kStart goes with a new one.
constexpr int kSavedStates = 2;

/// What a step is told to do.
struct Decision {
  double multiplier; // lr of group g = peaks[g] x multiplier
  Action action;
  int32_t flags;
  int32_t save;    // the Slot that is filled after the update of this step
  int32_t restore; // the Slot that is put back after the update of this step, which is skipped
  bool event;      // something was done, or would have been: the record belongs among the events
};

/// One line of the flight record. 128 bytes: a whole number of cache lines. With kFarLr and kFound,
/// and where kRaise begins or ends, `score` is the peak, `rise` the one that the first gradient
/// suggests, and `cusum` the lr at the lowest level of the ramp, which is `level` then; 0: there is
/// none.
struct Record {
  int64_t sequence; // counts records from 1; 0: never written
  int64_t step;     // t
  double loss;
  double level;
  double scale;
  double slope;
  double t_statistic;
  double score;
  double cusum;
  double rise;
  double grad_norm; // NaN: not given
  double lr;        // of the largest group
  double factor;
  double target_factor; // what factor re-warms to
  int16_t phase;
  int16_t previous_phase;
  int16_t flags;
  int16_t action;    // an Action, and kSaveShift and kRestoreShift bits up the slots
  uint64_t checksum; // of the words before it
};
static_assert(sizeof(Record) == 128, "records are copied in whole cache lines");

} // namespace adaptlr
