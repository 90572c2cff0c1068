// The CUDA driver, found at run time: no CUDA header or library is needed to build adaptlr, and an
// extension built on one machine loads on one without a GPU.
//
// Everything here throws std::runtime_error, with the driver's own words and what the user can do,
// unless it says otherwise. Objects make their context current for as long as they need it.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

struct CUctx_st;
struct CUevent_st;
struct CUfunc_st;
struct CUlinkState_st;
struct CUmod_st;
struct CUstream_st;

namespace adaptlr::driver {

using Context = CUctx_st*;
using Stream = CUstream_st*;
using Function = CUfunc_st*;

/// Whether there is a driver and a GPU. Never throws. Like all else here it initialises the driver,
/// which a process must not do before it forks.
bool available() noexcept;

/// The CUDA version that the driver supports, e.g. 13000.
int version();

/// Compute capability, e.g. {9, 0}.
std::pair<int, int> compute_capability(int device);

/// Multiprocessors of a device.
int multiprocessors(int device);

/// The context that torch works in. Retained once per device and never released: a release at exit
/// could take it away from others.
Context primary_context(int device);

/// Makes a context current in this scope, if another one is.
class Current {
public:
  explicit Current(Context context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

private:
  bool pushed_ = false;
};

/// Keeps this thread's calls from invalidating a graph capture that another stream is in.
class RelaxedCapture {
public:
  RelaxedCapture() noexcept;
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

private:
  int previous_ = 0;
  bool exchanged_ = false;
};

/// Links a relocatable cubin, which cannot be loaded, to one that can.
std::string link(Context context, const std::string& relocatable);

/// Kernels loaded from a cubin, a fatbin or PTX. They stay loaded.
class Module {
public:
  Module(Context context, const std::string& image);

  /// Loads the kernel too: a lazy load at the first launch is not allowed in a capture.
  Function function(const char* name) const;

private:
  Context context_;
  CUmod_st* module_ = nullptr;
};

/// Zeroed host memory that every device can reach. Stays allocated unless free() is called.
class PinnedMemory {
public:
  PinnedMemory(Context context, std::size_t bytes);

  void* host() const { return host_; }
  void* device() const { return device_; }
  void free() noexcept;

private:
  Context context_;
  void* host_ = nullptr;
  void* device_ = nullptr;
};

/// A mark in a stream that the host can wait for.
class Event {
public:
  explicit Event(Context context);
  ~Event();
  Event(Event&& other) noexcept;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(Stream stream) const;
  void synchronize() const;

private:
  Context context_;
  CUevent_st* event_ = nullptr;
};

struct Grid {
  unsigned x = 1;
  unsigned y = 1;
};

/// Launches a kernel whose only parameter lies at `parameters`. Its context must be current.
void launch(Function function, Grid grid, unsigned threads, Stream stream, void* parameters);

/// Whether the stream is recording a graph. The default stream cannot, and is not asked.
bool is_capturing(Stream stream);

/// Waits for all work on the device; false if it cannot.
bool synchronize(Context context) noexcept;

} // namespace adaptlr::driver
