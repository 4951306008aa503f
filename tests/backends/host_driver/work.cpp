// Streams, events, graphs and kernels.
#include <algorithm>
#include <cstring>

#include "driver.h"

namespace {

Handles<CUevent_st> events;
Handles<CUgraph_st> graphs;
Handles<CUgraphExec_st> executables;
std::map<CUuserObject, std::shared_ptr<CUuserObject_st>> user_objects;
Handles<CUlib_st> libraries;
CUstream_st default_stream;
thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

bool is_default(CUstream handle) {
    return handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD;
}

// The stream of a handle, or null.
CUstream_st* stream_of(CUstream handle) {
    if (is_default(handle)) return &default_stream;
    return streams.has(handle) ? handle : nullptr;
}

CUresult check_stream(CUstream handle) {
    return stream_of(handle) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

// A cubin's bytes, whose number its ELF header tells; of other images, nothing.
std::string image_of(const void* code) {
    const char* bytes = static_cast<const char*>(code);
    if (std::memcmp(bytes, "\177ELF", 4) != 0) return "";
    std::uint64_t sections;
    std::uint16_t entry_bytes, entries;
    std::memcpy(&sections, bytes + 40, 8);  // e_shoff, e_shentsize, e_shnum
    std::memcpy(&entry_bytes, bytes + 58, 2);
    std::memcpy(&entries, bytes + 60, 2);
    return std::string(bytes, sections + std::size_t{entry_bytes} * entries);
}

// The arguments of a launch as unsigned numbers, of as many bytes as HOST_DRIVER_PARAMETERS says.
std::string values_of(void** arguments) {
    const char* sizes = std::getenv("HOST_DRIVER_PARAMETERS");
    std::ostringstream values;
    for (std::size_t index = 0; sizes != nullptr && sizes[index] != '\0'; ++index) {
        std::uint64_t value = 0;
        std::memcpy(&value, arguments[index], sizes[index] - '0');
        values << (index == 0 ? "" : " ") << value;
    }
    return values.str();
}

void take_time(CUevent event) {
    if (events.has(event)) event->time = std::chrono::steady_clock::now();
}

CUkern_st* kernel_of(CUfunction function) { return reinterpret_cast<CUkern_st*>(function); }

}  // namespace

void Queue::do_until(std::uint64_t position) {
    while (done < position && !waiting.empty()) {
        Work work = std::move(waiting.front());
        waiting.pop_front();
        ++done;
        work();
    }
}

void do_waiting_work(bool everything) {
    for (auto& [handle, stream] : streams) {
        if (everything || !(stream->flags & CU_STREAM_NON_BLOCKING)) stream->queue->do_until(stream->queue->end());
    }
}

bool prohibits_unsafe_calls() {
    if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
    for (auto& [handle, stream] : streams) {
        const CUgraph_st* capture = stream->capture;
        if (capture == nullptr || capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
        if (capture->thread == std::this_thread::get_id()) return true;
        if (thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL && capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL) return true;
    }
    return false;
}

CUresult enqueue(CUstream handle, Work work) {
    if (is_default(handle)) {
        do_waiting_work(false);
        work();
        return CUDA_SUCCESS;
    }
    if (!streams.has(handle)) return CUDA_ERROR_INVALID_HANDLE;
    if (handle->capture != nullptr) {
        handle->capture->work.push_back(std::move(work));
    } else {
        handle->queue->waiting.push_back(std::move(work));
    }
    return CUDA_SUCCESS;
}

DRIVER_CALL cuStreamCreateWithPriority(CUstream* stream, unsigned int flags, int priority) {
    Call call(__func__);
    *stream = streams.make();
    (*stream)->flags = flags;
    (*stream)->priority = priority;
    (*stream)->context = thread_context();
    return CUDA_SUCCESS;
}

DRIVER_CALL cuStreamDestroy(CUstream stream) {
    Call call(__func__);
    if (streams.has(stream)) stream->queue->do_until(stream->queue->end());
    return streams.drop(stream);
}

DRIVER_CALL cuStreamSynchronize(CUstream handle) {
    Call call(__func__);
    CUstream_st* stream = stream_of(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture != nullptr || prohibits_unsafe_calls()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    stream->queue->do_until(stream->queue->end());
    return CUDA_SUCCESS;
}

DRIVER_CALL cuStreamGetCtx(CUstream stream, CUcontext* context) {
    Call call(__func__);
    if (check_stream(stream) == CUDA_SUCCESS) give(context, stream_of(stream)->context);
    return check_stream(stream);
}

DRIVER_CALL cuStreamGetFlags(CUstream stream, unsigned int* flags) {
    Call call(__func__);
    if (check_stream(stream) == CUDA_SUCCESS) give(flags, stream_of(stream)->flags);
    return check_stream(stream);
}

DRIVER_CALL cuStreamGetPriority(CUstream stream, int* priority) {
    Call call(__func__);
    if (check_stream(stream) == CUDA_SUCCESS) give(priority, stream_of(stream)->priority);
    return check_stream(stream);
}

DRIVER_CALL cuStreamWaitEvent(CUstream handle, CUevent event, unsigned int) {
    Call call(__func__);
    CUstream_st* stream = stream_of(handle);
    if (stream == nullptr || !events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture != nullptr) {  // documented: the waiting stream captures into the same graph
        stream->capture = event->capture;
        return CUDA_SUCCESS;
    }
    if (event->queue == nullptr) return CUDA_SUCCESS;
    return enqueue(handle, [queue = event->queue, position = event->position] { queue->do_until(position); });
}

DRIVER_CALL cuEventCreate(CUevent* event, unsigned int) {
    Call call(__func__);
    return give(event, events.make());
}

DRIVER_CALL cuEventDestroy(CUevent event) {
    Call call(__func__);
    return events.drop(event);
}

DRIVER_CALL cuEventRecord(CUevent event, CUstream handle) {
    Call call(__func__);
    CUstream_st* stream = stream_of(handle);
    if (stream == nullptr || !events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
    event->capture = stream->capture;
    if (event->capture != nullptr) return CUDA_SUCCESS;
    CUresult result = enqueue(handle, [event] { take_time(event); });
    event->queue = stream->queue;
    event->position = stream->queue->end();
    return result;
}

DRIVER_CALL cuEventRecordWithFlags(CUevent event, CUstream handle, unsigned int flags) {
    Call call(__func__, flags);
    CUstream_st* stream = stream_of(handle);
    if (flags != CU_EVENT_RECORD_EXTERNAL) return cuEventRecord(event, handle);
    if (stream == nullptr || !events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture == nullptr) return CUDA_ERROR_INVALID_VALUE;  // documented: invalid outside of a capture
    stream->capture->marks.push_back(event);
    return enqueue(handle, [event] { take_time(event); });
}

DRIVER_CALL cuEventQuery(CUevent event) {
    Call call(__func__);
    if (!events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (prohibits_unsafe_calls()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (event->queue == nullptr || event->queue->done >= event->position) return CUDA_SUCCESS;
    event->queue->do_until(event->queue->done + 1);  // a loop that asks until it is done has to end
    return CUDA_ERROR_NOT_READY;
}

DRIVER_CALL cuEventSynchronize(CUevent event) {
    Call call(__func__);
    if (!events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
    if (prohibits_unsafe_calls()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (event->queue != nullptr) event->queue->do_until(event->position);
    return CUDA_SUCCESS;
}

DRIVER_CALL cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    Call call(__func__);
    for (CUevent event : {start, end}) {
        if (!events.has(event) || event->queue == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        if (event->queue->done < event->position) return CUDA_ERROR_NOT_READY;
    }
    return give(milliseconds, std::chrono::duration<float, std::milli>(end->time - start->time).count());
}

DRIVER_CALL cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    Call call(__func__);
    if (!streams.has(stream) || stream->capture != nullptr) return CUDA_ERROR_INVALID_VALUE;
    stream->capture = graphs.make();
    stream->capture->mode = mode;
    stream->capture->thread = std::this_thread::get_id();
    return CUDA_SUCCESS;
}

DRIVER_CALL cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    Call call(__func__);
    std::swap(*mode, thread_mode);
    return CUDA_SUCCESS;
}

DRIVER_CALL cuStreamEndCapture(CUstream stream, CUgraph* graph) {
    Call call(__func__);
    if (!streams.has(stream) || stream->capture == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *graph = stream->capture;
    for (auto& [handle, other] : streams) {
        if (other->capture == *graph) other->capture = nullptr;
    }
    return CUDA_SUCCESS;
}

DRIVER_CALL cuStreamGetCaptureInfo(CUstream stream, CUstreamCaptureStatus* status, cuuint64_t* id, CUgraph* graph,
                                   const CUgraphNode**, const CUgraphEdgeData**, std::size_t*) {
    Call call(__func__);
    if (check_stream(stream) != CUDA_SUCCESS) return CUDA_ERROR_INVALID_HANDLE;
    CUgraph_st* capture = stream_of(stream)->capture;
    give(id, reinterpret_cast<cuuint64_t>(capture));
    give(graph, capture);
    return give(status, capture == nullptr ? CU_STREAM_CAPTURE_STATUS_NONE : CU_STREAM_CAPTURE_STATUS_ACTIVE);
}

DRIVER_CALL cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    Call call(__func__);
    return cuStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

DRIVER_CALL cuUserObjectCreate(CUuserObject* object, void* owned, CUhostFn destroy, unsigned int, unsigned int) {
    Call call(__func__);
    std::shared_ptr<CUuserObject_st> made(new CUuserObject_st, [=](CUuserObject_st* object) {
        delete object;
        destroy(owned);
    });
    user_objects[made.get()] = made;
    return give(object, made.get());
}

DRIVER_CALL cuGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned int, unsigned int flags) {
    Call call(__func__);
    auto found = user_objects.find(object);
    if (!graphs.has(graph) || found == user_objects.end()) return CUDA_ERROR_INVALID_VALUE;
    graph->owned.push_back(found->second);
    if (flags == CU_GRAPH_USER_OBJECT_MOVE) user_objects.erase(found);
    return CUDA_SUCCESS;
}

DRIVER_CALL cuGraphReleaseUserObject(CUgraph graph, CUuserObject object, unsigned int) {
    Call call(__func__);
    if (!graphs.has(graph)) return CUDA_ERROR_INVALID_VALUE;
    auto is_object = [=](const auto& owned) { return owned.get() == object; };
    auto found = std::find_if(graph->owned.begin(), graph->owned.end(), is_object);
    if (found == graph->owned.end()) return CUDA_ERROR_INVALID_VALUE;
    graph->owned.erase(found);
    return CUDA_SUCCESS;
}

DRIVER_CALL cuGraphInstantiateWithParams(CUgraphExec* executable, CUgraph graph,
                                         CUDA_GRAPH_INSTANTIATE_PARAMS* parameters) {
    Call call(__func__);
    parameters->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
    if (!graphs.has(graph)) return CUDA_ERROR_INVALID_VALUE;
    *executable = executables.make();
    static_cast<CUgraph_st&>(**executable) = *graph;
    return CUDA_SUCCESS;
}

DRIVER_CALL cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    Call call(__func__);
    CUDA_GRAPH_INSTANTIATE_PARAMS parameters{};
    return has_context() ? cuGraphInstantiateWithParams(executable, graph, &parameters) : CUDA_ERROR_INVALID_CONTEXT;
}

DRIVER_CALL cuGraphUpload(CUgraphExec executable, CUstream stream) {
    Call call(__func__);
    return executables.has(executable) ? check_stream(stream) : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_CALL cuGraphLaunch(CUgraphExec executable, CUstream handle) {
    Call call(__func__);
    if (!executables.has(executable)) return CUDA_ERROR_INVALID_VALUE;
    CUresult result = enqueue(handle, [work = executable->work] {
        for (const Work& step : work) step();
    });
    for (CUevent event : executable->marks) {
        if (!events.has(event)) continue;
        event->queue = stream_of(handle)->queue;
        event->position = event->queue->end();
    }
    return result;
}

DRIVER_CALL cuGraphDestroy(CUgraph graph) {
    Call call(__func__);
    return graphs.drop(graph);
}

DRIVER_CALL cuGraphExecDestroy(CUgraphExec executable) {
    Call call(__func__);
    return executables.drop(executable);
}

DRIVER_CALL cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned int,
                              CUlibraryOption*, void**, unsigned int) {
    Call call(__func__);
    if (prohibits_unsafe_calls()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    *library = libraries.make();
    (*library)->image = image_of(code);
    return CUDA_SUCCESS;
}

DRIVER_CALL cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    Call call(__func__, name);
    if (!libraries.has(library)) return CUDA_ERROR_INVALID_HANDLE;
    const std::string section = std::string(".text.") + name + '\0';  // a cubin has one per kernel
    if (!library->image.empty() && library->image.find(section) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
    return give(kernel, &library->kernels.try_emplace(name, CUkern_st{name}).first->second);
}

DRIVER_CALL cuLaunchKernelEx(const CUlaunchConfig* at, CUfunction function, void** arguments, void**) {
    Call call(__func__, kernel_of(function)->name, at->gridDimX, at->gridDimY, at->gridDimZ, at->blockDimX,
              at->blockDimY, at->blockDimZ, at->sharedMemBytes, reinterpret_cast<std::uintptr_t>(at->hStream), values_of(arguments));
    // Documented: the context is the stream's or, of a default stream, the calling thread's.
    if (is_default(at->hStream) && !has_context()) return CUDA_ERROR_INVALID_CONTEXT;
    return enqueue(at->hStream, [] {});
}
