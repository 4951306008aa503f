// Runs CUDA kernels on the host, for tests: enough of the language to compile our sources as C++17 (Linux, g++ or
// clang++).
//
// Blocks run one after the other; the threads of a block are fibers that run in turn, each up to its next barrier, in
// an order that the caller chooses. Every block finds shared memory full of values that are not numbers. Reported as
// errors: global accesses outside of the buffers named for the launch, writes to those that are inputs, accesses not
// aligned to their size, and barriers that only some threads of a block reach.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // so that all of it lies in one block of memory, which host_shared_memory finds

struct dim3 {
    unsigned int x, y, z;
};
struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

template <typename To, typename From>
To host_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float __int_as_float(int bits) { return host_cast<float>(bits); }

// Each rounded once, as CUDA's: no compiler flag of ours lets the host contract them.
inline double __dadd_rn(double left, double right) { return left + right; }
inline double __dsub_rn(double left, double right) { return left - right; }
inline double __dmul_rn(double left, double right) { return left * right; }
inline double __ddiv_rn(double left, double right) { return left / right; }

inline unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int shift) {
    return static_cast<unsigned int>((static_cast<std::uint64_t>(high) << 32 | low) >> (shift & 31u));
}

// ---- What a launch may access -------------------------------------------------------------------------------------

struct HostBuffer {
    std::uintptr_t begin, end;
    bool writable;
};

static std::vector<HostBuffer> host_buffers;
static std::string host_error;

inline void host_fail(const char* fact, const void* address, std::size_t bytes) {
    if (host_error.empty()) {
        char text[200];
        std::snprintf(text, sizeof(text), "%s: %zu bytes at %p, block (%u, %u, %u), thread (%u, %u, %u)", fact, bytes,
                      address, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
        host_error = text;
    }
}

inline bool host_may_access(const void* address, std::size_t bytes, bool write) {
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(address);
    if (begin % bytes != 0) {
        host_fail(write ? "misaligned write" : "misaligned read", address, bytes);
        return false;
    }
    for (const HostBuffer& buffer : host_buffers) {
        if (buffer.begin <= begin && begin + bytes <= buffer.end && (buffer.writable || !write)) {
            return true;
        }
    }
    host_fail(write ? "write out of bounds" : "read out of bounds", address, bytes);
    return false;
}

template <typename T>
T __ldg(const T* address) {
    T value;
    std::memset(&value, 0xff, sizeof(T));
    if (host_may_access(address, sizeof(T), false)) {
        std::memcpy(&value, address, sizeof(T));
    }
    return value;
}

template <typename T>
void __stwb(T* address, T value) {
    if (host_may_access(address, sizeof(T), true)) {
        std::memcpy(address, &value, sizeof(T));
    }
}

// ---- Threads and barriers -----------------------------------------------------------------------------------------

constexpr std::size_t HOST_STACK_BYTES = 64 * 1024;
constexpr std::size_t HOST_COPY_BYTES = 16;

struct HostCopy {
    void* target;
    const void* source;  // null for zeros
    unsigned int group;
};

struct HostThread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[HOST_STACK_BYTES]};
    dim3 index;
    bool finished;
    std::vector<HostCopy> copies;  // asked for, not yet waited for
    unsigned int copy_groups;      // closed so far
};

static std::vector<HostThread> host_threads;
static HostThread* host_thread;
static ucontext_t host_scheduler;
static const std::function<void()>* host_body;

inline void __syncthreads() { swapcontext(&host_thread->context, &host_scheduler); }

// Whether a copy is made when it is waited for, so that a read before that finds what was there before; else at once,
// so that a read after that finds what is there too early. A GPU may do either.
static bool host_copies_are_late;

inline void host_copy(const HostCopy& copy) {
    if (copy.source == nullptr) {
        std::memset(copy.target, 0, HOST_COPY_BYTES);
    } else {
        std::memcpy(copy.target, copy.source, HOST_COPY_BYTES);
    }
}

// Copies so many bytes, all or none, and zeros for the rest.
inline void host_copy_async(void* shared, const void* global, int bytes) {
    if (reinterpret_cast<std::uintptr_t>(shared) % HOST_COPY_BYTES != 0 ||
        reinterpret_cast<std::uintptr_t>(global) % HOST_COPY_BYTES != 0) {
        host_fail("misaligned copy", global, HOST_COPY_BYTES);
    } else if (bytes == 0 || host_may_access(global, HOST_COPY_BYTES, false)) {
        const HostCopy copy{shared, bytes == 0 ? nullptr : global, host_thread->copy_groups};
        if (host_copies_are_late) {
            host_thread->copies.push_back(copy);
        } else {
            host_copy(copy);
        }
    }
}

inline void host_close_copies() { ++host_thread->copy_groups; }

inline void host_wait_for_copies(unsigned int pending) {
    std::vector<HostCopy> later;
    for (const HostCopy& copy : host_thread->copies) {
        if (copy.group + pending >= host_thread->copy_groups) {
            later.push_back(copy);
        } else {
            host_copy(copy);
        }
    }
    host_thread->copies.swap(later);
}

struct HostSpan {
    char* begin;
    std::size_t bytes;
};

static thread_local char host_shared_mark;

inline HostSpan host_shared_memory() {
    HostSpan span{&host_shared_mark, 0};
    const auto visit = [](dl_phdr_info* library, std::size_t, void* data) {
        HostSpan& found = *static_cast<HostSpan*>(data);
        char* begin = static_cast<char*>(library->dlpi_tls_data);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
            const std::size_t bytes = library->dlpi_phdr[i].p_memsz;
            if (library->dlpi_phdr[i].p_type == PT_TLS && begin <= found.begin && found.begin < begin + bytes) {
                found = {begin, bytes};
                return 1;
            }
        }
        return 0;
    };
    dl_iterate_phdr(visit, &span);
    return span;
}

inline void host_fiber() {
    (*host_body)();
    host_thread->finished = true;
}

// Lets each thread go on to its next barrier; returns how many are not finished.
inline std::size_t host_resume(const std::vector<std::size_t>& order) {
    std::size_t waiting = 0;
    for (const std::size_t i : order) {
        host_thread = &host_threads[i];
        threadIdx = host_thread->index;
        if (!host_thread->finished) {
            swapcontext(&host_scheduler, &host_thread->context);
            waiting += host_thread->finished ? 0 : 1;
        }
    }
    return waiting;
}

inline void host_run_block(const std::vector<std::size_t>& order, HostSpan shared) {
    std::memset(shared.begin, 0xff, shared.bytes);
    for (std::size_t i = 0; i < order.size(); ++i) {
        HostThread& thread = host_threads[i];
        const unsigned int row = static_cast<unsigned int>(i) / blockDim.x;
        thread.index = {static_cast<unsigned int>(i) % blockDim.x, row % blockDim.y, row / blockDim.y};
        thread.finished = false;
        thread.copies.clear();
        thread.copy_groups = 0;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = HOST_STACK_BYTES;
        thread.context.uc_link = &host_scheduler;
        makecontext(&thread.context, host_fiber, 0);
    }
    for (std::size_t waiting = host_resume(order); waiting > 0 && host_error.empty(); waiting = host_resume(order)) {
        if (waiting < order.size()) {
            host_fail("a barrier reached by some threads only", nullptr, 0);
        }
    }
}

// Schedules: 0 has the threads as they are numbered, 1 the other way round, any other number seeds a shuffle. Copies
// are late in the even ones.
inline std::vector<std::size_t> host_order(std::size_t threads, unsigned int schedule) {
    std::vector<std::size_t> order(threads);
    for (std::size_t i = 0; i < threads; ++i) {
        order[i] = schedule == 1 ? threads - 1 - i : i;
    }
    for (std::size_t i = threads; i > 1 && schedule > 1; --i) {
        schedule = schedule * 1664525u + 1013904223u;
        std::swap(order[i - 1], order[schedule % i]);
    }
    return order;
}

inline void host_run_grid(const std::function<void()>& body, dim3 grid, dim3 block, unsigned int schedule) {
    gridDim = grid;
    blockDim = block;
    host_body = &body;
    host_copies_are_late = schedule % 2 == 0;
    host_error.clear();
    const std::vector<std::size_t> order = host_order(std::size_t{1} * block.x * block.y * block.z, schedule);
    const HostSpan shared = host_shared_memory();
    if (host_threads.size() < order.size()) {
        host_threads.resize(order.size());
    }
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                host_run_block(order, shared);
            }
        }
    }
}

// ---- Launches by name ---------------------------------------------------------------------------------------------

using HostKernel = std::function<void(void**)>;

template <typename... Parameters, std::size_t... I>
HostKernel host_kernel(void (*kernel)(Parameters...), std::index_sequence<I...>) {
    return [kernel](void** arguments) { kernel(*static_cast<Parameters*>(arguments[I])...); };
}

template <typename... Parameters>
HostKernel host_kernel(void (*kernel)(Parameters...)) {
    return host_kernel(kernel, std::index_sequence_for<Parameters...>{});
}

extern const std::map<std::string, HostKernel> host_kernels;

// Returns null, or what went wrong. arguments: one pointer to each, as for CUDA's own launches.
// buffers: count triples of begin, end and whether it may be written.
extern "C" inline __attribute__((used)) const char* host_launch(const char* name, const unsigned int* grid,
                                                                const unsigned int* block, void** arguments,
                                                                const std::uint64_t* buffers, int count,
                                                                unsigned int schedule) {
    host_buffers.clear();
    for (int i = 0; i < count; ++i) {
        host_buffers.push_back({buffers[3 * i], buffers[3 * i + 1], buffers[3 * i + 2] != 0});
    }
    const auto kernel = host_kernels.find(name);
    if (kernel == host_kernels.end()) {
        return "no such kernel in this library";
    }
    host_run_grid([&] { kernel->second(arguments); }, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                  schedule);
    return host_error.empty() ? nullptr : host_error.c_str();
}
