// What both kernels share: element types, 16-byte accesses, and the epilogue
//
//     y = gain * leaky_relu(v * demod[n, c] + noise_strength * noise[h, w] + bias[c], slope) * next_scale[n, c].
//
// All arithmetic is in float32; a result is rounded once, to nearest even, when it is stored. Global memory is read
// with
// __ldg and written with __stwb only, so y must not overlap an input. Tests compile the same text as C++ for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Which factors of the epilogue are present: a bit set. The pointer of an absent one is never read.
constexpr int DEMOD = 1;
constexpr int NOISE = 2;
constexpr int BIAS = 4;
constexpr int NEXT_SCALE = 8;
constexpr int ACTIVATION = 16;

constexpr int VECTOR_BYTES = 16;

// How many elements one 16-byte access moves.
template <typename T>
constexpr int VECTOR = VECTOR_BYTES / static_cast<int>(sizeof(T));

// The built-in type of so many bytes, for which loads and stores exist.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<2> {
    using Type = unsigned short;
};
template <>
struct WordOf<4> {
    using Type = unsigned int;
};
template <>
struct WordOf<8> {
    using Type = uint2;
};
template <>
struct WordOf<16> {
    using Type = uint4;
};

// Adjacent elements as they lie in memory, moved by one access. One word takes half the registers of its 16-bit halves.
template <typename T, int COUNT>
struct Pack {
    using Word = typename WordOf<static_cast<int>(sizeof(T)) * COUNT>::Type;
    Word word;
};

// A truth value as a type, to choose a template's instantiation by what an argument is.
template <bool TRUTH>
struct Is {
    static constexpr bool VALUE = TRUTH;
};

__device__ __forceinline__ int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

// A division of 64 bits takes about five times as long as one of 32, and is hardly ever needed. Both are at least 0.
__device__ __forceinline__ long long divide(long long value, long long divisor) {
    if (((value | divisor) >> 32) == 0) {
        return static_cast<unsigned int>(value) / static_cast<unsigned int>(divisor);
    }
    return value / divisor;
}

__device__ __forceinline__ float float_from_bits(int bits) { return __int_as_float(bits); }

// Whether a pointer is a multiple of so many bytes.
__device__ __forceinline__ bool is_aligned(const void* address, int bytes) {
    return (reinterpret_cast<size_t>(address) & static_cast<size_t>(bytes - 1)) == 0;
}

template <int COUNT, typename T>
__device__ __forceinline__ Pack<T, COUNT> load_pack(const T* address) {
    return {__ldg(reinterpret_cast<const typename Pack<T, COUNT>::Word*>(address))};
}

template <int COUNT, typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, COUNT>& pack) {
    __stwb(reinterpret_cast<typename Pack<T, COUNT>::Word*>(address), pack.word);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void round_to(float value, float& result) { result = value; }
__device__ __forceinline__ void round_to(float value, __half& result) { result = __float2half_rn(value); }
__device__ __forceinline__ void round_to(float value, __nv_bfloat16& result) { result = __float2bfloat16_rn(value); }

// Two at once: one instruction rounds a pair of 16-bit values.
__device__ __forceinline__ void round_pair(float first, float second, float* results) {
    results[0] = first;
    results[1] = second;
}
__device__ __forceinline__ void round_pair(float first, float second, __half* results) {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(results, &pair, sizeof(pair));
}
__device__ __forceinline__ void round_pair(float first, float second, __nv_bfloat16* results) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(results, &pair, sizeof(pair));
}

template <typename T, int COUNT>
__device__ __forceinline__ void unpack(const Pack<T, COUNT>& pack, float (&values)[COUNT]) {
    T items[COUNT];
    memcpy(items, &pack.word, sizeof(items));
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = to_float(items[i]);
    }
}

template <typename T, int COUNT>
__device__ __forceinline__ Pack<T, COUNT> round_pack(const float (&values)[COUNT]) {
    T items[COUNT];
    if constexpr (COUNT == 1) {
        round_to(values[0], items[0]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            round_pair(values[i], values[i + 1], items + i);
        }
    }
    Pack<T, COUNT> pack;
    memcpy(&pack.word, items, sizeof(items));
    return pack;
}

// Reads consecutive floats; by fours where there are as many. `address` must be aligned to the accesses.
template <int COUNT>
__device__ __forceinline__ void load_floats(const float* address, float (&values)[COUNT]) {
    constexpr int STEP = COUNT % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < COUNT; i += STEP) {
        float step[STEP];
        unpack(load_pack<STEP>(address + i), step);
#pragma unroll
        for (int k = 0; k < STEP; ++k) {
            values[i + k] = step[k];
        }
    }
}

// Copies 16 bytes, both addresses aligned, from global to shared memory; zeros instead if not `valid`. Complete, for
// the thread that asked, after wait_for_copies. From sm_80 on the bytes pass no register and the thread goes on
// meanwhile.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
#if !defined(__CUDA_ARCH__)
    host_copy_async(shared, global, valid ? VECTOR_BYTES : 0);
#elif __CUDA_ARCH__ >= 800
    const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid ? VECTOR_BYTES : 0)
                 : "memory");
#else
    *static_cast<uint4*>(shared) = valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

// Closes a group of copies; every thread closes equally many.
__device__ __forceinline__ void close_copies() {
#if !defined(__CUDA_ARCH__)
    host_close_copies();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of the latest groups are not complete.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#if !defined(__CUDA_ARCH__)
    host_wait_for_copies(PENDING);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// The inputs of the epilogue, as the host gives them.
template <typename T>
struct EpilogueInputs {
    const float* demod;
    const T* noise;
    const float* bias;
    const float* next_scale;
    float noise_strength;
    float slope;
    float gain;

    // Whether the factors that are present may be read by 16-byte accesses at multiples of 16 bytes.
    template <int FACTORS>
    __device__ __forceinline__ bool factors_are_aligned() const {
        return (!(FACTORS & DEMOD) || is_aligned(demod, VECTOR_BYTES)) &&
               (!(FACTORS & BIAS) || is_aligned(bias, VECTOR_BYTES)) &&
               (!(FACTORS & NEXT_SCALE) || is_aligned(next_scale, VECTOR_BYTES));
    }
};

// The epilogue of COUNT adjacent channels of one image; of one channel, by default.
template <int FACTORS, int COUNT = 1>
struct Epilogue {
    float demod[COUNT];
    float bias[COUNT];
    float scale[COUNT];  // gain * next_scale
    float noise_strength;
    float slope;

    // plane: n * C + c of the first channel; channel: its c.
    template <typename T>
    __device__ __forceinline__ Epilogue(const EpilogueInputs<T>& inputs, long long plane, int channel)
        : noise_strength(inputs.noise_strength), slope(inputs.slope) {
        if constexpr ((FACTORS & DEMOD) != 0) {
            load_floats(inputs.demod + plane, demod);
        }
        if constexpr ((FACTORS & BIAS) != 0) {
            load_floats(inputs.bias + channel, bias);
        }
        if constexpr ((FACTORS & NEXT_SCALE) != 0) {
            load_floats(inputs.next_scale + plane, scale);
        }
        if constexpr ((FACTORS & ACTIVATION) != 0) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                scale[i] = (FACTORS & NEXT_SCALE) != 0 ? scale[i] * inputs.gain : inputs.gain;
            }
        }
    }

    // noise: noise[h, w], not yet scaled; any value where NOISE is absent.
    __device__ __forceinline__ float operator()(float value, float noise, int i = 0) const {
        return activate(fmaf(value, factor(i), offset(noise, i)), i);
    }

    // Its parts, for those who multiply and add something else as well: activate(value * factor() + offset(noise)).
    __device__ __forceinline__ float factor(int i = 0) const {
        if constexpr ((FACTORS & DEMOD) != 0) {
            return demod[i];
        } else {
            return 1.0f;
        }
    }

    __device__ __forceinline__ float offset(float noise, int i = 0) const {
        float sum = 0.0f;
        if constexpr ((FACTORS & BIAS) != 0) {
            sum = bias[i];
        }
        if constexpr ((FACTORS & NOISE) != 0) {
            sum = fmaf(noise, noise_strength, sum);
        }
        return sum;
    }

    __device__ __forceinline__ float activate(float value, int i = 0) const {
        if constexpr ((FACTORS & ACTIVATION) != 0) {
            value = value < 0.0f ? value * slope : value;
        }
        if constexpr ((FACTORS & (ACTIVATION | NEXT_SCALE)) != 0) {
            value *= scale[i];
        }
        return value;
    }
};
