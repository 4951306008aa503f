// Start, device, context, and how callers find the functions.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "driver.h"

namespace {

int primary_context_users = 0;
thread_local CUcontext current_context = nullptr;
thread_local std::vector<CUcontext> contexts_below;
Handles<CUctx_st> made_contexts;  // by libraries that do not share the primary one

CUresult check_device(CUdevice device) { return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }

int compute_capability(int part) {
    const char* text = std::getenv("HOST_DRIVER_CAPABILITY");
    int parts[2] = {8, 9};
    if (text != nullptr && std::sscanf(text, "%d.%d", &parts[0], &parts[1]) != 2) std::abort();
    return parts[part];
}

// Limits that a library may ask for before it uses a device. They are plausible, and not those of any real GPU.
const std::map<int, int> ATTRIBUTES = {
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 48 << 10},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 64},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
    {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1},
};

#define NAMED(ERROR) {ERROR, #ERROR}
const std::map<int, const char*> ERROR_NAMES = {
    NAMED(CUDA_SUCCESS),
    NAMED(CUDA_ERROR_INVALID_VALUE),
    NAMED(CUDA_ERROR_OUT_OF_MEMORY),
    NAMED(CUDA_ERROR_INVALID_DEVICE),
    NAMED(CUDA_ERROR_INVALID_CONTEXT),
    NAMED(CUDA_ERROR_INVALID_HANDLE),
    NAMED(CUDA_ERROR_NOT_FOUND),
    NAMED(CUDA_ERROR_NOT_READY),
    NAMED(CUDA_ERROR_NOT_SUPPORTED),
    NAMED(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
};

// Functions that are not here: one entry per name, so that the record can tell them apart.
constexpr int MAX_UNSUPPORTED = 700;  // cuda.h declares fewer
std::vector<std::string> unsupported_names;

template <int INDEX>
CUresult unsupported() {
    Call call("unsupported", unsupported_names[INDEX]);
    return CUDA_ERROR_NOT_SUPPORTED;
}

template <int... INDICES>
void* entry_at(std::size_t index, std::integer_sequence<int, INDICES...>) {
    static CUresult (*const entries[])() = {unsupported<INDICES>...};
    return reinterpret_cast<void*>(entries[index]);
}

}  // namespace

bool has_context() { return current_context != nullptr; }

CUcontext thread_context() { return current_context; }

void* unsupported_entry(const std::string& name) {
    std::size_t index = 0;
    while (index < unsupported_names.size() && unsupported_names[index] != name) ++index;
    if (index == MAX_UNSUPPORTED) std::abort();
    if (index == unsupported_names.size()) unsupported_names.push_back(name);
    return entry_at(index, std::make_integer_sequence<int, MAX_UNSUPPORTED>());
}

DRIVER_CALL cuInit(unsigned int flags) {
    Call call(__func__);
    return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_CALL cuDriverGetVersion(int* version) {
    Call call(__func__);
    return give(version, CUDA_VERSION);
}

DRIVER_CALL cuGetErrorName(CUresult error, const char** text) {
    auto found = ERROR_NAMES.find(error);
    return give(text, found == ERROR_NAMES.end() ? "an error which the host stand-in does not make" : found->second);
}

DRIVER_CALL cuGetExportTable(const void** table, const CUuuid*) {
    Call call(__func__);
    give(table, nullptr);
    return CUDA_ERROR_NOT_FOUND;
}

#undef cuGetProcAddress
DRIVER_CALL cuGetProcAddress_v2(const char* symbol, void** entry, int, cuuint64_t,
                                CUdriverProcAddressQueryResult* status) {
    Call call;
    static Dl_info self;
    static const int is_known = dladdr(reinterpret_cast<void*>(cuInit), &self);
    static void* const library = is_known ? dlopen(self.dli_fname, RTLD_LAZY) : nullptr;
    void* found = nullptr;
    for (const char* version : {"_v4", "_v3", "_v2", ""}) {  // each function is here in its newest version
        if (found == nullptr) found = dlsym(library, (std::string(symbol) + version).c_str());
    }
    give(status, CU_GET_PROC_ADDRESS_SUCCESS);
    return give(entry, found != nullptr ? found : unsupported_entry(symbol));
}

DRIVER_CALL cuDeviceGetCount(int* count) {
    Call call(__func__);
    return give(count, 1);
}

DRIVER_CALL cuDeviceGetName(char* name, int length, CUdevice device) {
    Call call(__func__);
    std::snprintf(name, length, "Host stand-in");
    return check_device(device);
}

DRIVER_CALL cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    Call call(__func__, attribute);
    auto found = ATTRIBUTES.find(attribute);
    *value = found == ATTRIBUTES.end() ? 0 : found->second;
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = compute_capability(0);
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *value = compute_capability(1);
    return check_device(device);
}

DRIVER_CALL cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    Call call(__func__);
    ++primary_context_users;
    give(context, &primary_context);
    return check_device(device);
}

DRIVER_CALL cuDevicePrimaryCtxRelease(CUdevice device) {
    Call call(__func__);
    if (primary_context_users == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --primary_context_users;
    return check_device(device);
}

DRIVER_CALL cuCtxCreate_v4(CUcontext* context, CUctxCreateParams*, unsigned int, CUdevice device) {
    Call call(__func__);
    contexts_below.push_back(current_context);  // documented: the new one is current
    current_context = made_contexts.make();
    give(context, current_context);
    return check_device(device);
}

DRIVER_CALL cuCtxSetCurrent(CUcontext context) {
    Call call(__func__);
    current_context = context;
    return CUDA_SUCCESS;
}

DRIVER_CALL cuCtxPushCurrent_v2(CUcontext context) {
    Call call(__func__);
    if (context != &primary_context && !made_contexts.has(context)) return CUDA_ERROR_INVALID_CONTEXT;
    contexts_below.push_back(current_context);
    current_context = context;
    return CUDA_SUCCESS;
}

DRIVER_CALL cuCtxPopCurrent_v2(CUcontext* context) {
    Call call(__func__);
    if (contexts_below.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    give(context, current_context);
    current_context = contexts_below.back();
    contexts_below.pop_back();
    return CUDA_SUCCESS;
}

DRIVER_CALL cuCtxGetCurrent(CUcontext* context) {
    Call call(__func__);
    return give(context, current_context);
}

DRIVER_CALL cuCtxGetDevice(CUdevice* device) {
    Call call(__func__);
    give(device, 0);
    return current_context == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

DRIVER_CALL cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    Call call(__func__);
    give(least, 0);
    return give(greatest, -5);
}

DRIVER_CALL cuCtxSynchronize() {
    Call call(__func__);
    do_waiting_work(true);
    return CUDA_SUCCESS;
}
