// Argument checks and the definition of the module; no arithmetic.
#include "cpu.h"
#include "cuda.h"
#include "embedded.h"
#include "loop.h"
#include "record_lines.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

namespace py = pybind11;
using namespace adaptlr;

namespace {

// A struct as a row of a structured NumPy array. pybind11's own PYBIND11_NUMPY_DTYPE formats names
// with iostreams, which crash where a toolchain links libstdc++ statically beside torch's.

template <typename T> std::string format_of() {
  if constexpr (std::is_array_v<T>)
    return "(" + std::to_string(std::extent_v<T>) + ",)" + format_of<std::remove_extent_t<T>>();
  else if constexpr (std::is_enum_v<T>)
    return format_of<std::underlying_type_t<T>>();
  else
    return (std::is_floating_point_v<T> ? "f"
            : std::is_signed_v<T>       ? "i"
                                        : "u") +
           std::to_string(sizeof(T));
}

/// The dtype of T, made once by define_layout and alive as long as the process.
template <typename T> py::dtype& layout() {
  static auto* dtype = new py::dtype();
  return *dtype;
}

struct Field {
  std::string name;
  std::string format;
  std::size_t offset;
};

template <typename T, typename Member, typename Base> std::size_t offset_of(Member Base::* member) {
  static const T probe{};
  return static_cast<std::size_t>(reinterpret_cast<const char*>(&(probe.*member)) -
                                  reinterpret_cast<const char*>(&probe));
}

template <typename T>
void define_layout(py::module_& module, const char* name, const std::vector<Field>& fields) {
  py::list names, formats, offsets;
  for (const Field& field : fields) {
    names.append(field.name);
    formats.append(field.format);
    offsets.append(field.offset);
  }
  const auto arguments = py::dict(py::arg("names") = names, py::arg("formats") = formats,
                                  py::arg("offsets") = offsets, py::arg("itemsize") = sizeof(T));
  layout<T>() = py::dtype::from_args(arguments);
  module.attr(name) = layout<T>();
}

template <typename T> py::array to_row(const T& value) {
  return py::array(layout<T>(), std::vector<py::ssize_t>{}, &value);
}

template <typename Values> py::array to_rows(const Values& values) {
  return py::array(layout<typename Values::value_type>(),
                   std::vector<py::ssize_t>{static_cast<py::ssize_t>(values.size())},
                   values.data());
}

/// The same without a copy: the array owns the values.
template <typename T> py::array adopt(std::vector<T> values) {
  auto kept = std::make_unique<std::vector<T>>(std::move(values));
  const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(kept->size())};
  const T* data = kept->data();
  const py::capsule owner(kept.get(), [](void* all) { delete static_cast<std::vector<T>*>(all); });
  kept.release();
  return py::array(layout<T>(), shape, data, owner);
}

/// Leaves other threads the interpreter while `work` is done, which must not touch it.
template <typename Work> auto without_lock(Work work) {
  const py::gil_scoped_release others_run;
  return work();
}

template <typename T> T from_row(const py::array& row) {
  if (!row.dtype().equal(layout<T>()) || row.size() != 1)
    throw py::value_error("expected one row of " + std::string(py::str(layout<T>())) + ", got " +
                          std::to_string(row.size()) + " of " + std::string(py::str(row.dtype())));
  T value;
  std::memcpy(&value, row.data(), sizeof(T));
  return value;
}

/// The states beside the snapshots.
std::array<State, kSavedStates> saved_from_rows(const py::array& rows) {
  if (!rows.dtype().equal(layout<State>()) || rows.size() != kSavedStates)
    throw py::value_error("expected " + std::to_string(kSavedStates) + " rows of State, got " +
                          std::to_string(rows.size()) + " of " +
                          std::string(py::str(rows.dtype())));
  std::array<State, kSavedStates> saved;
  std::memcpy(saved.data(), rows.data(), sizeof(saved));
  return saved;
}

py::tuple lrs_of(const Config& config, double multiplier) {
  py::tuple lrs(static_cast<std::size_t>(config.group_count));
  for (int32_t g = 0; g < config.group_count; ++g)
    PyTuple_SET_ITEM(lrs.ptr(), g, PyFloat_FromDouble(config.peaks[g] * multiplier));
  return lrs;
}

/// (skip, notices, lr of every group, order for snapshots)
py::tuple host_step(HostController& controller, double loss, double grad_norm, double applied_lr,
                    bool overflow, bool overwritten) {
  const Decision decision =
      controller.step(Signals{loss, grad_norm, applied_lr, overflow, overwritten});
  return py::make_tuple(decision.action == Action::kSkip, controller.flight_record().notices(),
                        lrs_of(controller.config, decision.multiplier), order_of(decision));
}

/// Writes records as lines; `words_of` turns one of them into what it says in words. A training
/// loop must not wait for its recorder, so all that is done for every record leaves it the
/// interpreter.
py::bytes record_lines_of(const py::array& rows, const std::string& first,
                          const py::function& words_of) {
  if (!rows.dtype().equal(layout<Record>()) || !(rows.flags() & py::array::c_style))
    throw py::value_error("expected rows of Record in one piece, got " +
                          std::string(py::str(rows.dtype())));
  const auto* records = static_cast<const Record*>(rows.data());
  const auto count = static_cast<std::size_t>(rows.size());
  const auto codes = without_lock([&] { return codes_in(records, count); });
  Words words;
  for (const auto& [code, place] : codes)
    words[code] = py::cast<std::string>(words_of(rows[py::int_(place)]));
  return without_lock([&] { return record_lines(records, count, first, words); });
}

/// What both controllers offer: their flight record.
template <typename Controller> void define_flight_record(py::class_<Controller>& controller) {
  controller
      .def(
          "records",
          [](const Controller& c, int64_t since) {
            return adopt(without_lock([&] { return c.flight_record().records(since); }));
          },
          py::arg("since") = 0)
      .def(
          "events",
          [](const Controller& c, int64_t since) { return adopt(c.flight_record().events(since)); },
          py::arg("since") = 0)
      .def("newest", [](const Controller& c) { return to_rows(c.flight_record().newest()); })
      .def_property_readonly("written",
                             [](const Controller& c) { return c.flight_record().written(); })
      .def_property_readonly("notices",
                             [](const Controller& c) { return c.flight_record().notices(); })
      .def_property_readonly("written_events",
                             [](const Controller& c) { return c.flight_record().written_events(); })
      .def_property_readonly(
          "dropped_events", [](const Controller& c) { return c.flight_record().dropped_events(); });
}

// Not offsetof, which is for types without a base.
#define ADAPTLR_FIELD(T, name)                                                                     \
  Field { #name, format_of<decltype(T::name)>(), offset_of<T>(&T::name) }
#define ADAPTLR_FIELDS(T, ...) {PYBIND11_MAP_LIST(ADAPTLR_FIELD, T, __VA_ARGS__)}

void define_state(py::module_& module) {
  const std::vector<Field> progress = ADAPTLR_FIELDS(
      Progress, count, first_loss, previous_loss, next_difference, difference_trend,
      difference_residual, difference_agreement, variance_factor, noise, cleanest_noise, fast_level,
      slow_level, log_lr, highest_level, lowest_level, lowest_slow_level, lowest_variance,
      lowest_slow_variance, lowest_noise, lowest_log_lr, lowest_evidence, lowest_age);
  std::vector<Field> fields = ADAPTLR_FIELDS(
      State, samples, observed, level, variance, mean_age, age_variance, age_covariance,
      sign_agreement, previous_score, mean_score, cusum, outlier_run, spike_threshold, best_level,
      best_samples, start_level, max_loss, min_loss, slope, t_statistic, score, rise, norm_samples,
      norm_level, norm_variance, norm_spike_threshold, block_sum, block_count);
  const auto add_progress = [&](const std::string& name, std::size_t offset) {
    for (const Field& field : progress)
      fields.push_back({name + "." + field.name, field.format, offset + field.offset});
  };
  add_progress("fine", offset_of<State>(&State::fine));
  add_progress("coarse", offset_of<State>(&State::coarse));
  const std::vector<Field> rest = ADAPTLR_FIELDS(
      State, fine_differences, coarse_differences, step, lr, phase, phase_step, factor, cut_factor,
      ceiling, onset_lr, streak, last_alarm, consecutive_skips, consecutive_overflows, skips, cuts,
      restarts, origin_step, restarted, first_lr, ramp_lr, ramp_growth, ramp_start, ramp_limit,
      trial_factor, trial_level, trials, tested, soft_step, ramp_level, ramp_log_lr, probe_sum,
      collapsed, aside_slot, good_slot, pending_slot, pending_step, peak, estimate, warmup_start);
  fields.insert(fields.end(), rest.begin(), rest.end());
  define_layout<State>(module, "state_dtype", fields);
}

void define_layouts(py::module_& module) {
  define_layout<Config>(
      module, "config_dtype",
      ADAPTLR_FIELDS(Config, total_steps, warmup_steps, min_lr_ratio, decay_share, cycles,
                     timescale, final_multiplier, backoff_factor, rewarm_steps, hold_steps,
                     regrow_growth, max_consecutive_skips, snapshot_slots, snapshot_steps,
                     chart_steps, block_steps, sensitivity, max_restarts, max_factor, search_steps,
                     peak, peaks, group_count, estimate_suffices, decay, guard_mode, table));
  define_state(module);
  define_layout<Record>(module, "record_dtype",
                        ADAPTLR_FIELDS(Record, sequence, step, loss, level, scale, slope,
                                       t_statistic, score, cusum, rise, grad_norm, lr, factor,
                                       target_factor, phase, previous_phase, flags, action,
                                       checksum));
  module.attr("MAX_GROUPS") = kMaxGroups;
  module.attr("DIFFERENCES") = kDifferences;
  module.attr("SLOTS") = kSlots;
  module.attr("SAVED_STATES") = kSavedStates;
  module.attr("START_SLOT") = static_cast<int>(kStart);
  module.attr("ZERO_MOMENT") = static_cast<int>(kZeroMoment);
  module.attr("SAVE_SHIFT") = kSaveShift;
  module.attr("RESTORE_SHIFT") = kRestoreShift;
  module.attr("FAILED_NOTICE") = kFailedNotice;
  module.attr("EVENT_NOTICE") = kEventNotice;
}

Dtype dtype_of(int code) {
  if (code < 0 || code >= kDtypes)
    throw py::value_error("dtype must be FLOAT32, FLOAT64, FLOAT16 or BFLOAT16, got " +
                          std::to_string(code));
  return static_cast<Dtype>(code);
}

// Addresses and streams come as integers: the extension knows nothing of torch.
Scalar scalar_of(std::uintptr_t address, int dtype) {
  return Scalar{reinterpret_cast<const void*>(address), dtype_of(dtype), 0};
}
driver::Stream stream_of(std::uintptr_t stream) { return reinterpret_cast<driver::Stream>(stream); }

StepParams step_params(std::uintptr_t loss, int loss_dtype, bool mean, std::uintptr_t grad_norm,
                       int grad_norm_dtype, double grad_norm_value, std::uintptr_t overflow,
                       double applied_lr, bool zero_lr) {
  StepParams params{};
  params.inputs[kLoss] = scalar_of(loss, loss_dtype);
  params.inputs[kGradNorm] = scalar_of(grad_norm, grad_norm_dtype);
  params.inputs[kFoundInf] = scalar_of(overflow, static_cast<int>(Dtype::kFloat32));
  params.grad_norm = grad_norm_value;
  params.applied_lr = applied_lr;
  params.mean = mean;
  params.zero_lr = zero_lr;
  return params;
}

void zero_if_skipped(DeviceController& controller, std::uintptr_t stream,
                     const std::vector<std::uintptr_t>& addresses,
                     const std::vector<int64_t>& sizes) {
  if (addresses.size() != sizes.size())
    throw py::value_error("addresses and sizes must have the same length, got " +
                          std::to_string(addresses.size()) + " and " +
                          std::to_string(sizes.size()));
  std::vector<Range> ranges(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 0)
      throw py::value_error("sizes must not be negative, got " + std::to_string(sizes[i]));
    ranges[i] = Range{reinterpret_cast<unsigned char*>(addresses[i]), sizes[i]};
  }
  controller.zero_if_skipped(stream_of(stream), ranges);
}

void configure(DeviceController& controller, std::uintptr_t stream,
               const std::optional<py::array>& config_row,
               const std::optional<py::array>& state_row) {
  std::optional<Config> config;
  std::optional<State> state;
  if (config_row)
    config = from_row<Config>(*config_row);
  if (state_row)
    state = from_row<State>(*state_row);
  controller.configure(stream_of(stream), config ? &*config : nullptr, state ? &*state : nullptr);
}

py::dict kernel_sources() {
  py::dict sources;
  for (const KernelSource& source : kKernelSources)
    if (!source.name.empty())
      sources[py::str(source.name)] = py::str(source.text);
  return sources;
}

void define_device_controller(py::module_& module) {
  py::class_<DeviceController> device(module, "DeviceController");
  device
      .def(py::init([](int device, const std::string& image, std::uintptr_t block,
                       const py::array& config, const py::array& state, int64_t history_size,
                       std::uintptr_t stream) {
             return std::make_unique<DeviceController>(
                 device, image, reinterpret_cast<DeviceBlock*>(block), from_row<Config>(config),
                 from_row<State>(state), history_size, stream_of(stream));
           }),
           py::arg("device"), py::arg("image"), py::arg("block"), py::arg("config"),
           py::arg("state"), py::arg("history_size"), py::arg("stream"))
      .def(
          "step",
          [](DeviceController& c, std::uintptr_t stream, std::uintptr_t loss, int loss_dtype,
             bool mean, std::uintptr_t grad_norm, int grad_norm_dtype, double grad_norm_value,
             std::uintptr_t overflow, double applied_lr, bool zero_lr) {
            StepParams params = step_params(loss, loss_dtype, mean, grad_norm, grad_norm_dtype,
                                            grad_norm_value, overflow, applied_lr, zero_lr);
            return c.step(stream_of(stream), params);
          },
          py::arg("stream"), py::arg("loss"), py::arg("loss_dtype"), py::arg("mean"),
          py::arg("grad_norm") = 0, py::arg("grad_norm_dtype") = 0,
          py::arg("grad_norm_value") = -1.0, py::arg("overflow") = 0, py::arg("applied_lr") = -1.0,
          py::arg("zero_lr") = false)
      .def("launch_empty",
           [](DeviceController& c, std::uintptr_t stream) {
             StepParams params{};
             c.launch_empty(stream_of(stream), params);
           })
      .def(
          "fold",
          [](DeviceController& c, std::uintptr_t stream, std::uintptr_t loss, int dtype) {
            c.fold(stream_of(stream), scalar_of(loss, dtype), false);
          },
          py::arg("stream"), py::arg("loss"), py::arg("dtype"))
      .def(
          "drop_losses",
          [](DeviceController& c, std::uintptr_t stream) {
            c.fold(stream_of(stream), Scalar{}, true);
          },
          py::arg("stream"))
      .def("configure", &configure, py::arg("stream"), py::arg("config") = py::none(),
           py::arg("state") = py::none())
      .def(
          "snapshot",
          [](DeviceController& c, std::uintptr_t stream, std::uintptr_t table, int64_t fill) {
            c.snapshot(stream_of(stream), reinterpret_cast<const SnapshotTable*>(table), fill);
          },
          py::arg("stream"), py::arg("table"), py::arg("fill") = static_cast<int64_t>(kNoSlot))
      .def("zero_if_skipped", &zero_if_skipped, py::arg("stream"), py::arg("addresses"),
           py::arg("sizes"))
      .def(
          "record_event",
          [](DeviceController& c, std::uintptr_t stream) { c.record_event(stream_of(stream)); },
          py::arg("stream"))
      .def("wait", &DeviceController::wait, py::arg("lag"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("factor", &DeviceController::factor);
  define_flight_record(device);
}

/// The order that the control step's wide accesses rely on.
void check_block() {
  if (offset_of<DeviceBlock>(&DeviceBlock::ring) != kChangedBytes ||
      offset_of<DeviceBlock>(&DeviceBlock::lr) != kStagedBytes)
    throw std::logic_error("DeviceBlock must hold what a step changes, then what it only reads");
}

/// The memory itself, not a copy.
py::array_t<std::uint8_t> bytes_of(const py::object& self) {
  const auto& memory = self.cast<const SlotMemory&>();
  const auto size = static_cast<py::ssize_t>(memory.bytes());
  return py::array_t<std::uint8_t>({size}, static_cast<std::uint8_t*>(memory.host()), self);
}

void define_slot_memory(py::module_& module) {
  py::class_<SlotMemory>(module, "SlotMemory")
      .def(py::init<int, std::size_t>(), py::arg("device"), py::arg("bytes"))
      .def_property_readonly(
          "address",
          [](const SlotMemory& m) { return reinterpret_cast<std::uintptr_t>(m.address()); })
      .def_property_readonly("bytes", &bytes_of)
      .def("free", &SlotMemory::free);
}

static_assert(sizeof(Piece) == 5 * sizeof(int64_t), "adaptlr/device_slots.py writes rows of five");

void define_kernels(py::module_& module) {
  check_block();
  module.attr("SAVE_OFFSET") = offset_of<DeviceBlock>(&DeviceBlock::save);
  module.attr("RESTORE_OFFSET") = offset_of<DeviceBlock>(&DeviceBlock::restore);
  module.attr("PIECE_BYTES") = kPieceBytes;
  module.attr("BLOCK_BYTES") = sizeof(DeviceBlock);
  module.attr("STATE_OFFSET") = offset_of<DeviceBlock>(&DeviceBlock::state);
  module.attr("SAVED_OFFSET") = offset_of<DeviceBlock>(&DeviceBlock::saved);
  module.attr("MOMENTS_OFFSET") = offset_of<DeviceBlock>(&DeviceBlock::moments);
  module.attr("LR_OFFSET") = offset_of<DeviceBlock>(&DeviceBlock::lr);
  module.attr("SKIP_OFFSET") = offset_of<DeviceBlock>(&DeviceBlock::skip);
  module.attr("OVERWRITTEN") = static_cast<int>(kOverwritten);
  module.attr("MAX_LAG") = DeviceController::kMaxLag;
  module.attr("FLOAT32") = static_cast<int>(Dtype::kFloat32);
  module.attr("FLOAT64") = static_cast<int>(Dtype::kFloat64);
  module.attr("FLOAT16") = static_cast<int>(Dtype::kFloat16);
  module.attr("BFLOAT16") = static_cast<int>(Dtype::kBfloat16);
  module.attr("fatbin") = py::bytes(kFatbin.data(), kFatbin.size());
  module.attr("kernel_sources") = kernel_sources();
  module.def("cuda_available", &driver::available);
  module.def("compute_capability", &driver::compute_capability, py::arg("device"));
  module.def("driver_version", &driver::version);
  module.def(
      "link_kernels",
      [](int device, const std::string& relocatable) {
        return py::bytes(driver::link(driver::primary_context(device), relocatable));
      },
      py::arg("device"), py::arg("relocatable"));
  module.def("load_kernels", &DeviceController::load, py::arg("device"), py::arg("image"));
}

} // namespace

PYBIND11_MODULE(_extension, module) {
  module.doc() = "The control step on the host and on the GPU. See docs/algorithm.md.";
  define_layouts(module);
  module.def("initial_state", [] { return to_row(initial_state()); });
  module.def("resumed", [](const py::array& config, const py::array& state) {
    return to_row(resumed(from_row<Config>(config), from_row<State>(state)));
  });
  module.def("schedule", [](const py::array& config, double step) {
    return schedule(from_row<Config>(config), step);
  });
  module.def("final_multiplier",
             [](const py::array& config) { return final_multiplier(from_row<Config>(config)); });

  module.def("record_lines", &record_lines_of);

  py::class_<HostController> host(module, "HostController");
  host.def(py::init([](const py::array& config, int64_t history_size) {
             return std::make_unique<HostController>(from_row<Config>(config), history_size);
           }),
           py::arg("config"), py::arg("history_size"))
      .def("step", &host_step, py::arg("loss"), py::arg("grad_norm") = -1.0,
           py::arg("applied_lr") = -1.0, py::arg("overflow") = false,
           py::arg("overwritten") = false)
      .def_property(
          "config", [](const HostController& c) { return to_row(c.config); },
          [](HostController& c, const py::array& row) { c.config = from_row<Config>(row); })
      .def_property(
          "state", [](const HostController& c) { return to_row(c.state); },
          [](HostController& c, const py::array& row) { c.state = from_row<State>(row); })
      .def_property(
          "saved", [](const HostController& c) { return to_rows(c.saved); },
          [](HostController& c, const py::array& rows) { c.saved = saved_from_rows(rows); });
  define_flight_record(host);
  define_host_loop(module);
  define_device_loop(module);
  define_device_controller(module);
  define_slot_memory(module);
  define_kernels(module);
}
