// Allocations, memory pools, copies and fills.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "driver.h"

namespace {

struct Allocation {
    std::size_t bytes;
    bool on_device;
    CUcontext context;
};
std::map<CUdeviceptr, Allocation> allocations;
std::size_t device_bytes_used = 0;

Handles<CUmemPoolHandle_st> pools;
CUmemPoolHandle_st default_pool;

CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

std::size_t device_bytes() {
    const char* text = std::getenv("HOST_DRIVER_MEMORY");
    return text == nullptr ? std::size_t{24} << 30 : std::strtoull(text, nullptr, 10);
}

CUresult allocate(CUdeviceptr* allocated, std::size_t bytes, bool on_device) {
    const std::size_t alignment = 512;
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (on_device && bytes > device_bytes() - device_bytes_used) return CUDA_ERROR_OUT_OF_MEMORY;
    void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (memory == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(memory, 0xFF, bytes);  // a NaN in each floating type
    *allocated = address(memory);
    allocations[*allocated] = {bytes, on_device, thread_context()};
    if (on_device) device_bytes_used += bytes;
    return CUDA_SUCCESS;
}

// Forgets an allocation; its memory goes back when the work before `stream`'s end is done.
CUresult release(CUdeviceptr start, bool on_device, CUstream stream) {
    auto found = allocations.find(start);
    if (found == allocations.end() || found->second.on_device != on_device) return CUDA_ERROR_INVALID_VALUE;
    if (on_device) device_bytes_used -= found->second.bytes;
    allocations.erase(found);
    return enqueue(stream, [start] { std::free(pointer(start)); });
}

auto allocation_around(CUdeviceptr start) {
    auto next = allocations.upper_bound(start);
    if (next == allocations.begin()) return allocations.end();
    auto found = std::prev(next);
    return start < found->first + found->second.bytes ? found : allocations.end();
}

bool is_pageable(CUdeviceptr start) { return allocation_around(start) == allocations.end(); }

// Whether the bytes from `start` on are within one allocation, or all outside of what this driver allocated.
bool fits(CUdeviceptr start, std::size_t bytes) {
    auto found = allocation_around(start);
    return found == allocations.end() ? start != 0 : start + bytes <= found->first + found->second.bytes;
}

CUresult copy(CUdeviceptr target, CUdeviceptr source, std::size_t bytes, CUstream stream) {
    if (!fits(target, bytes) || !fits(source, bytes)) return CUDA_ERROR_INVALID_VALUE;
    CUresult result = enqueue(stream, [=] { std::memmove(pointer(target), pointer(source), bytes); });
    // Documented: a copy from or to pageable host memory may return only when that memory is no longer needed.
    if (result == CUDA_SUCCESS && (is_pageable(target) || is_pageable(source))) result = cuStreamSynchronize(stream);
    return result;
}

template <typename T>
CUresult fill(CUdeviceptr target, T value, std::size_t count, CUstream stream) {
    if (is_pageable(target) || !fits(target, count * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
    return enqueue(stream, [=] { std::fill_n(static_cast<T*>(pointer(target)), count, value); });
}

bool is_flag(CUmemPool_attribute attribute) { return attribute <= CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES; }

}  // namespace

DRIVER_CALL cuMemAllocFromPoolAsync(CUdeviceptr* allocated, std::size_t bytes, CUmemoryPool, CUstream) {
    Call call(__func__, bytes);
    return allocate(allocated, bytes, true);
}

DRIVER_CALL cuMemAlloc_v2(CUdeviceptr* allocated, std::size_t bytes) {
    Call call(__func__, bytes);
    if (!has_context()) return CUDA_ERROR_INVALID_CONTEXT;
    if (prohibits_unsafe_calls()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return allocate(allocated, bytes, true);
}

DRIVER_CALL cuMemFree_v2(CUdeviceptr start) {
    Call call(__func__);
    if (!has_context()) return CUDA_ERROR_INVALID_CONTEXT;
    if (prohibits_unsafe_calls()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    do_waiting_work(true);
    return release(start, true, nullptr);
}

DRIVER_CALL cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
    Call call(__func__);
    if (!has_context()) return CUDA_ERROR_INVALID_CONTEXT;
    give(total, device_bytes());
    return give(free, device_bytes() - device_bytes_used);
}

DRIVER_CALL cuMemAllocHost(void** allocated, std::size_t bytes) {
    Call call(__func__, bytes);
    if (prohibits_unsafe_calls()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return allocate(reinterpret_cast<CUdeviceptr*>(allocated), bytes, false);
}

DRIVER_CALL cuMemFreeAsync(CUdeviceptr start, CUstream stream) {
    Call call(__func__);
    return release(start, true, stream);
}

DRIVER_CALL cuMemFreeHost(void* start) {
    Call call(__func__);
    if (prohibits_unsafe_calls()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    do_waiting_work(true);
    return release(address(start), false, nullptr);
}

DRIVER_CALL cuPointerGetAttribute(void* answer, CUpointer_attribute attribute, CUdeviceptr start) {
    Call call(__func__, attribute);
    auto found = allocation_around(start);
    if (found == allocations.end()) return CUDA_ERROR_INVALID_VALUE;
    const bool on_device = found->second.on_device;
    if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
        return give(static_cast<CUmemorytype*>(answer), on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST);
    }
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) return give(static_cast<int*>(answer), 0);
    if (attribute == CU_POINTER_ATTRIBUTE_CONTEXT) {
        return give(static_cast<CUcontext*>(answer), found->second.context);
    }
    if (attribute == CU_POINTER_ATTRIBUTE_IS_MANAGED) return give(static_cast<int*>(answer), 0);
    return CUDA_ERROR_NOT_SUPPORTED;
}

DRIVER_CALL cuPointerGetAttributes(unsigned int count, CUpointer_attribute* attributes, void** answers,
                                   CUdeviceptr start) {
    Call call(__func__);
    for (unsigned int index = 0; index < count; ++index) {  // documented: 0 where the pointer is unknown, and success
        CUresult result = cuPointerGetAttribute(answers[index], attributes[index], start);
        if (result != CUDA_SUCCESS) give(static_cast<int*>(answers[index]), 0);
    }
    return CUDA_SUCCESS;
}

DRIVER_CALL cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice) {
    Call call(__func__);
    return give(pool, &default_pool);
}

DRIVER_CALL cuMemPoolCreate(CUmemoryPool* pool, const CUmemPoolProps*) {
    Call call(__func__);
    return give(pool, pools.make());
}

DRIVER_CALL cuMemPoolDestroy(CUmemoryPool pool) {
    Call call(__func__);
    return pools.drop(pool);
}

DRIVER_CALL cuMemPoolSetAccess(CUmemoryPool, const CUmemAccessDesc*, std::size_t) {
    Call call(__func__);
    return CUDA_SUCCESS;
}

DRIVER_CALL cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void* value) {
    Call call(__func__, attribute);
    pool->attributes[attribute] = is_flag(attribute) ? *static_cast<int*>(value) : *static_cast<std::uint64_t*>(value);
    return CUDA_SUCCESS;
}

DRIVER_CALL cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void* answer) {
    Call call(__func__, attribute);
    if (is_flag(attribute)) return give(static_cast<int*>(answer), pool->attributes[attribute]);
    return give(static_cast<std::uint64_t*>(answer), pool->attributes[attribute]);
}

DRIVER_CALL cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, std::size_t bytes, CUstream stream) {
    Call call(__func__, bytes);
    return copy(target, source, bytes, stream);
}

DRIVER_CALL cuMemsetD8Async(CUdeviceptr target, unsigned char value, std::size_t count, CUstream stream) {
    Call call(__func__, count);
    return fill(target, value, count, stream);
}

DRIVER_CALL cuMemsetD16Async(CUdeviceptr target, unsigned short value, std::size_t count, CUstream stream) {
    Call call(__func__, count);
    return fill(target, value, count, stream);
}

DRIVER_CALL cuMemsetD32Async(CUdeviceptr target, unsigned int value, std::size_t count, CUstream stream) {
    Call call(__func__, count);
    return fill(target, value, count, stream);
}
