#include "driver.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace adaptlr::driver {
namespace {

// The few names of cuda.h that are used, with its values: a stable binary interface.
using Result = int;
constexpr Result kSuccess = 0;
constexpr int kMultiprocessors = 16; // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kCapabilityMajor = 75; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kCapabilityMinor = 76;
constexpr unsigned kPortable = 1; // CU_MEMHOSTALLOC_PORTABLE
constexpr unsigned kMapped = 2;   // CU_MEMHOSTALLOC_DEVICEMAP
constexpr unsigned kDisableTiming = 2;
constexpr int kRelaxedCapture = 2;
constexpr int kCubin = 0; // CU_JIT_INPUT_CUBIN

struct Driver {
  Result (*init)(unsigned);
  Result (*driver_version)(int*);
  Result (*error_name)(Result, const char**);
  Result (*error_string)(Result, const char**);
  Result (*device_count)(int*);
  Result (*device_attribute)(int*, int, int);
  Result (*retain_primary)(Context*, int);
  Result (*current)(Context*);
  Result (*push)(Context);
  Result (*pop)(Context*);
  Result (*synchronize)();
  Result (*create_link)(unsigned, void*, void*, CUlinkState_st**);
  Result (*add_to_link)(CUlinkState_st*, int, const void*, std::size_t, const char*, unsigned,
                        void*, void*);
  Result (*complete_link)(CUlinkState_st*, void**, std::size_t*);
  Result (*destroy_link)(CUlinkState_st*);
  Result (*load_module)(CUmod_st**, const void*);
  Result (*function)(Function*, CUmod_st*, const char*);
  Result (*load_function)(Function); // may be null: since CUDA 12.4
  Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   Stream, void**, void**);
  Result (*allocate_host)(void**, std::size_t, unsigned);
  Result (*free_host)(void*);
  Result (*device_pointer)(unsigned long long*, void*, unsigned);
  Result (*create_event)(CUevent_st**, unsigned);
  Result (*destroy_event)(CUevent_st*);
  Result (*record_event)(CUevent_st*, Stream);
  Result (*synchronize_event)(CUevent_st*);
  Result (*is_capturing)(Stream, int*);
  Result (*exchange_capture_mode)(int*);
};

template <typename Pointer> void look_up(void* library, const char* name, Pointer& pointer) {
  pointer = reinterpret_cast<Pointer>(dlsym(library, name));
}

template <typename Pointer> void require(void* library, const char* name, Pointer& pointer) {
  look_up(library, name, pointer);
  if (pointer == nullptr)
    throw std::runtime_error(std::string("the NVIDIA driver is too old for adaptlr: it has no ") +
                             name + "; install a driver for CUDA 11.4 or newer");
}

Driver find_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    throw std::runtime_error("libcuda.so.1 could not be loaded (" + std::string(dlerror()) +
                             "); install the NVIDIA driver, or train on the CPU");
  Driver d{};
  require(library, "cuInit", d.init);
  require(library, "cuDriverGetVersion", d.driver_version);
  require(library, "cuGetErrorName", d.error_name);
  require(library, "cuGetErrorString", d.error_string);
  require(library, "cuDeviceGetCount", d.device_count);
  require(library, "cuDeviceGetAttribute", d.device_attribute);
  require(library, "cuDevicePrimaryCtxRetain", d.retain_primary);
  require(library, "cuCtxGetCurrent", d.current);
  require(library, "cuCtxPushCurrent_v2", d.push);
  require(library, "cuCtxPopCurrent_v2", d.pop);
  require(library, "cuCtxSynchronize", d.synchronize);
  require(library, "cuLinkCreate_v2", d.create_link);
  require(library, "cuLinkAddData_v2", d.add_to_link);
  require(library, "cuLinkComplete", d.complete_link);
  require(library, "cuLinkDestroy", d.destroy_link);
  require(library, "cuModuleLoadData", d.load_module);
  require(library, "cuModuleGetFunction", d.function);
  look_up(library, "cuFuncLoad", d.load_function);
  require(library, "cuLaunchKernel", d.launch);
  require(library, "cuMemHostAlloc", d.allocate_host);
  require(library, "cuMemFreeHost", d.free_host);
  require(library, "cuMemHostGetDevicePointer_v2", d.device_pointer);
  require(library, "cuEventCreate", d.create_event);
  require(library, "cuEventDestroy_v2", d.destroy_event);
  require(library, "cuEventRecord", d.record_event);
  require(library, "cuEventSynchronize", d.synchronize_event);
  require(library, "cuStreamIsCapturing", d.is_capturing);
  require(library, "cuThreadExchangeStreamCaptureMode", d.exchange_capture_mode);
  return d;
}

/// What the user can do about an error. The numbers are those of CUresult.
const char* advice(Result result) {
  switch (result) {
  case 2:
    return "; free some memory, or make history_size smaller";
  case 3:
    return "; if this process was forked, use the spawn start method of multiprocessing";
  case 4:
    return "; the interpreter is shutting down";
  case 100:
  case 101:
    return "; compare with nvidia-smi and CUDA_VISIBLE_DEVICES";
  case 200:
  case 209:
  case 218:
  case 222:
  case 300:
    return "; the kernels do not fit this GPU or its driver: set ADAPTLR_KERNELS=nvrtc, or update "
           "the driver";
  case 700:
  case 710:
  case 715:
  case 716:
  case 717:
  case 718:
  case 719:
    return "; a kernel launched earlier has failed: run with CUDA_LAUNCH_BLOCKING=1 to find it";
  case 900:
  case 901:
  case 906:
    return "; do this before the capture of a CUDA graph";
  default:
    return "";
  }
}

[[noreturn]] void fail(const Driver& driver, Result result, const char* action) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver.error_name(result, &name);
  driver.error_string(result, &text);
  throw std::runtime_error(std::string("CUDA could not ") + action + ": " +
                           (text ? text : "unknown error") + " (" +
                           (name ? name : std::to_string(result)) + ")" + advice(result));
}

/// The driver, initialised. A failure is thrown anew at each call.
const Driver& driver() {
  static const Driver driver = [] {
    const Driver found = find_driver();
    if (const Result result = found.init(0); result != kSuccess)
      fail(found, result, "be initialised");
    return found;
  }();
  return driver;
}

inline void check(Result result, const char* action) {
  if (result != kSuccess)
    fail(driver(), result, action);
}

} // namespace

bool available() noexcept {
  try {
    int count = 0;
    return driver().device_count(&count) == kSuccess && count > 0;
  } catch (...) {
    return false;
  }
}

int version() {
  int version = 0;
  check(driver().driver_version(&version), "tell its version");
  return version;
}

std::pair<int, int> compute_capability(int device) {
  int major = 0, minor = 0;
  const char* action = "tell the compute capability of the device";
  check(driver().device_attribute(&major, kCapabilityMajor, device), action);
  check(driver().device_attribute(&minor, kCapabilityMinor, device), action);
  return {major, minor};
}

int multiprocessors(int device) {
  int count = 0;
  check(driver().device_attribute(&count, kMultiprocessors, device),
        "tell the multiprocessors of the device");
  return count;
}

Context primary_context(int device) {
  static std::mutex mutex;
  static std::map<int, Context> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  Context& context = contexts[device];
  if (context == nullptr)
    check(driver().retain_primary(&context, device), "use the context of the device");
  return context;
}

Current::Current(Context context) {
  Context current = nullptr;
  check(driver().current(&current), "tell the current context");
  if (current == context)
    return;
  check(driver().push(context), "make the context of the device current");
  pushed_ = true;
}

Current::~Current() {
  Context context;
  if (pushed_)
    driver().pop(&context);
}

RelaxedCapture::RelaxedCapture() noexcept {
  previous_ = kRelaxedCapture;
  exchanged_ = driver().exchange_capture_mode(&previous_) == kSuccess;
}

RelaxedCapture::~RelaxedCapture() {
  if (exchanged_)
    driver().exchange_capture_mode(&previous_);
}

std::string link(Context context, const std::string& relocatable) {
  const Current current(context);
  const char* action = "link the kernels";
  CUlinkState_st* created = nullptr;
  check(driver().create_link(0, nullptr, nullptr, &created), action);
  const std::unique_ptr<CUlinkState_st, Result (*)(CUlinkState_st*)> state(created,
                                                                           driver().destroy_link);
  check(driver().add_to_link(created, kCubin, relocatable.data(), relocatable.size(), "adaptlr", 0,
                             nullptr, nullptr),
        action);
  void* cubin = nullptr; // goes with the state
  std::size_t bytes = 0;
  check(driver().complete_link(created, &cubin, &bytes), action);
  return {static_cast<const char*>(cubin), bytes};
}

Module::Module(Context context, const std::string& image) : context_(context) {
  if (image.empty())
    throw std::runtime_error("the image of the kernels is empty");
  const Current current(context);
  check(driver().load_module(&module_, image.c_str()), "load the kernels");
}

Function Module::function(const char* name) const {
  const Current current(context_);
  Function function = nullptr;
  check(driver().function(&function, module_, name), "find a kernel in its image");
  if (driver().load_function)
    check(driver().load_function(function), "load a kernel");
  return function;
}

PinnedMemory::PinnedMemory(Context context, std::size_t bytes) : context_(context) {
  const Current current(context);
  check(driver().allocate_host(&host_, bytes, kPortable | kMapped), "allocate pinned memory");
  std::memset(host_, 0, bytes);
  unsigned long long address = 0;
  const Result result = driver().device_pointer(&address, host_, 0);
  if (result != kSuccess) {
    driver().free_host(host_);
    fail(driver(), result, "map pinned memory");
  }
  device_ = reinterpret_cast<void*>(address);
}

void PinnedMemory::free() noexcept {
  try {
    const Current current(context_);
    driver().free_host(std::exchange(host_, nullptr));
  } catch (...) { // the driver is shutting down, and frees it itself
  }
}

Event::Event(Context context) : context_(context) {
  const Current current(context);
  check(driver().create_event(&event_, kDisableTiming), "create an event");
}

Event::Event(Event&& other) noexcept
    : context_(other.context_), event_(std::exchange(other.event_, nullptr)) {}

Event::~Event() {
  if (event_ == nullptr)
    return;
  try {
    const Current current(context_);
    driver().destroy_event(event_);
  } catch (...) { // as in PinnedMemory::free
  }
}

void Event::record(Stream stream) const {
  const Current current(context_);
  check(driver().record_event(event_, stream), "record an event");
}

void Event::synchronize() const {
  const Current current(context_);
  check(driver().synchronize_event(event_), "wait for an event");
}

void launch(Function function, Grid grid, unsigned threads, Stream stream, void* parameters) {
  void* all[] = {parameters};
  check(driver().launch(function, grid.x, grid.y, 1, threads, 1, 1, 0, stream, all, nullptr),
        "launch a kernel");
}

bool is_capturing(Stream stream) {
  const bool legacy = reinterpret_cast<std::uintptr_t>(stream) <= 1; // null or CU_STREAM_LEGACY
  if (legacy)
    return false;
  int status = 0;
  check(driver().is_capturing(stream, &status), "tell whether a stream is capturing");
  return status != 0;
}

bool synchronize(Context context) noexcept {
  try {
    const Current current(context);
    return driver().synchronize() == kSuccess;
  } catch (...) {
    return false;
  }
}

} // namespace adaptlr::driver
