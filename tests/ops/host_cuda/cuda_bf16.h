// Stands in for CUDA's header of this name: bfloat16, rounded to nearest even, by integer arithmetic.
#pragma once

#include "host_cuda.h"

struct __nv_bfloat16 {
    unsigned short bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    return host_cast<float>(static_cast<unsigned int>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const unsigned int bits = host_cast<unsigned int>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return {0x7fff};  // not a number
    }
    return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
