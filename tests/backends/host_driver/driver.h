// A stand-in for the CUDA driver, for tests on machines without a GPU: this folder's sources, built as libcuda.so.1.
//
// It plays a driver with one device, whose memory is host memory. Work enqueued on a stream is done as late as the
// driver's documentation allows: when the stream, an event behind it or the device is waited for. So a missing wait
// shows, as does memory that was never written: it is full of NaN. Kernels are found by name and their launches
// recorded, but nothing of them is executed. Whatever is not here answers CUDA_ERROR_NOT_SUPPORTED, and the record
// names it.
//
// It is made from the public cuda.h alone, and only for what uses the driver API, as cuda.core does. The CUDA runtime
// (cudart) first checks that the driver is genuine; this one is not and says so. So TensorRT, and the few calls that
// cuda.core makes to the runtime (Device.sync: wait for the stream instead), end in an error. It says nothing of a
// GPU's speed or results.
//
// Environment:
//   HOST_DRIVER_RECORD      file to which each call is appended: its name and some arguments, separated by tabs
//   HOST_DRIVER_CAPABILITY  compute capability of the device, "8.9" by default
//   HOST_DRIVER_MEMORY      bytes of device memory, 24 GiB by default; allocations beyond it fail
//   HOST_DRIVER_PARAMETERS  bytes of each parameter of the kernels that are launched, a digit each; none by default, and
//                           then the record has no arguments of launches
#pragma once

#include <cuda.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#define DRIVER_CALL extern "C" __attribute__((visibility("default"))) CUresult

using Work = std::function<void()>;

// What was enqueued on a stream and not done yet. `done` counts from the stream's first piece of work on.
struct Queue {
    std::deque<Work> waiting;
    std::uint64_t done = 0;

    std::uint64_t end() const { return done + waiting.size(); }
    void do_until(std::uint64_t position);
};

// The types that cuda.h leaves open.
struct CUctx_st {};
struct CUstream_st {
    unsigned int flags = 0;
    int priority = 0;
    CUcontext context = nullptr;
    CUgraph_st* capture = nullptr;  // takes the work while the stream captures
    std::shared_ptr<Queue> queue = std::make_shared<Queue>();
};
struct CUevent_st {
    std::shared_ptr<Queue> queue;  // of the stream where it was last recorded; null: never
    std::uint64_t position = 0;    // in that queue
    CUgraph_st* capture = nullptr;
    std::chrono::steady_clock::time_point time;
};
struct CUuserObject_st {};
struct CUgraph_st {
    std::vector<Work> work;
    std::vector<std::shared_ptr<CUuserObject_st>> owned;
    std::vector<CUevent> marks;  // that each launch records, as CU_EVENT_RECORD_EXTERNAL has it
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;  // of the capture that makes it
    std::thread::id thread;                                      // that has begun it
};
struct CUgraphExec_st : CUgraph_st {};
struct CUkern_st {  // also what a CUfunction points to
    std::string name;
};
struct CUlib_st {
    std::string image;
    std::map<std::string, CUkern_st> kernels;
};
struct CUmemPoolHandle_st {
    std::map<int, std::uint64_t> attributes;
};

// The objects of one type that callers hold.
template <typename T>
class Handles {
   public:
    T* make() {
        auto object = std::make_unique<T>();
        T* handle = object.get();
        objects_[handle] = std::move(object);
        return handle;
    }
    bool has(T* handle) const { return objects_.count(handle) != 0; }
    CUresult drop(T* handle) { return objects_.erase(handle) != 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
    auto begin() { return objects_.begin(); }
    auto end() { return objects_.end(); }

   private:
    std::map<T*, std::unique_ptr<T>> objects_;
};

inline CUctx_st primary_context;
inline Handles<CUstream_st> streams;

// Writes a line of the record.
template <typename... Arguments>
void record(const Arguments&... arguments) {
    static const char* const path = std::getenv("HOST_DRIVER_RECORD");
    static std::ofstream file(path != nullptr ? path : "/dev/null", std::ios::app);
    std::ostringstream line;
    const char* separator = "";
    ((line << separator << arguments, separator = "\t"), ...);
    file << line.str() << std::endl;
}

// The first line of every function: records the call, if it is named, and keeps other threads out until it ends.
class Call {
   public:
    Call() : lock_(guard_) {}
    template <typename... Arguments>
    explicit Call(const char* name, const Arguments&... arguments) : lock_(guard_) {
        record(name, arguments...);
    }

   private:
    inline static std::recursive_mutex guard_;  // recursive: a call may run a host function that makes another
    std::lock_guard<std::recursive_mutex> lock_;
};

// Answers a question. Callers pass null for what they do not ask.
template <typename T, typename Value>
CUresult give(T* answer, Value value) {
    if (answer != nullptr) *answer = static_cast<T>(value);
    return CUDA_SUCCESS;
}

// Puts work on a stream, or into the graph that the stream captures. Work of the default stream is done at once.
CUresult enqueue(CUstream stream, Work work);

// Does all work that waits; without `everything`, only that of the streams which the default stream waits for.
void do_waiting_work(bool everything);

// The calling thread's context, or null.
CUcontext thread_context();

// Whether the calling thread has a context. Of the functions that need one, some check it here: those of allocations,
// events and graphs that the package itself calls.
bool has_context();

// Whether calls that wait, ask, load, allocate or free are prohibited in the calling thread: by captures in the mode
// "global" of any thread, or in "thread local" of its own, as far as its own mode (cuThreadExchangeStreamCaptureMode)
// minds them.
bool prohibits_unsafe_calls();

// A function that answers "not supported" and records `name`.
void* unsupported_entry(const std::string& name);
