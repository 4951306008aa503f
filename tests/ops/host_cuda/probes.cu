// Small kernels that test the emulator: what it converts, and that it reports what is wrong.
#include "common.cuh"

template <typename T>
__global__ void widen(const T* x, int count, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        float value[1];
        unpack(load_pack<1>(x + i), value);
        __stwb(y + i, value[0]);
    }
}

template <typename T>
__global__ void narrow(const float* x, int count, T* y) {
    const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) {
        const float values[2] = {__ldg(x + i), __ldg(x + i + 1)};
        store_pack<2>(y + i, round_pack<T>(values));
    }
}

// What a thread of `rotate` does wrong.
constexpr int NOTHING = 0;
constexpr int NO_BARRIER = 1;
constexpr int LONELY_BARRIER = 2;
constexpr int OVERRUN = 3;
constexpr int WRITES_INPUT = 4;
constexpr int MISALIGNED = 5;
constexpr int OUTSIDE_SHARED = 6;

// Each of 32 threads gets its neighbour's value by way of shared memory: y[i] = x[(i + 1) % 32].
template <int MISTAKE>
__global__ void rotate(const float* x, float* y) {
    __shared__ float values[32];
    const int i = threadIdx.x;
    values[MISTAKE == OUTSIDE_SHARED ? i + 1 : i] = __ldg(x + i);
    if (MISTAKE == LONELY_BARRIER ? i != 5 : MISTAKE != NO_BARRIER) {
        __syncthreads();
    }
    __stwb(y + (MISTAKE == OVERRUN ? i + 1 : i), values[(i + 1) % 32]);
    if (MISTAKE == WRITES_INPUT) {
        __stwb(const_cast<float*>(x) + i, 0.0f);
    }
    if (MISTAKE == MISALIGNED && i == 0) {
        store_pack<4>(y + 1, load_pack<4>(x));
    }
}

// The same by asynchronous copies of four values; AWAITED: whether a thread waits for its own.
template <bool AWAITED>
__global__ void rotate_by_copies(const float* x, float* y) {
    __shared__ uint4 vectors[8];
    const int i = threadIdx.x;
    if (i < 8) {
        copy_async(vectors + i, x + 4 * i, true);
    }
    close_copies();
    if (AWAITED) {
        wait_for_copies<0>();
    }
    __syncthreads();
    __stwb(y + i, reinterpret_cast<const float*>(vectors)[(i + 1) % 32]);
}
