// Stands in for CUDA's header of this name: 16-bit floats, rounded to nearest even, by integer arithmetic.
#pragma once

#include "host_cuda.h"

struct __half {
    unsigned short bits;
};
struct __half2 {
    __half x, y;
};

inline float __half2float(__half value) {
    const unsigned int sign = (value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u,
                       mantissa = value.bits & 1023u;
    if (exponent == 0) {
        const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -magnitude : magnitude;
    }
    return host_cast<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}

inline __half __float2half_rn(float value) {
    const unsigned int bits = host_cast<unsigned int>(value), sign = (bits >> 16) & 0x8000u,
                       magnitude = bits & 0x7fffffffu;
    unsigned int result;
    if (magnitude > 0x7f800000u) {
        result = 0x7fff;  // not a number
    } else if (magnitude >= 0x477ff000u) {
        result = 0x7c00;  // 65520 and above: infinity
    } else if (magnitude < 0x38800000u) {
        result = static_cast<unsigned int>(std::nearbyint(std::ldexp(std::fabs(value), 24)));  // subnormal, below 2^-14
    } else {
        result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return {static_cast<unsigned short>(sign | result)};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
