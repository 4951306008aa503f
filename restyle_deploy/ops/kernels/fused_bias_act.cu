// y = gain * leaky_relu(x * demod[n, c] + noise_strength * noise[h, w] + bias[c], slope) * next_scale[n, c], each
// factor optional.
//
// Geometry (geometry.py has the same numbers): a one-dimensional grid of BIAS_ACT_THREADS threads per block; any number
// of blocks is right, because a thread that finds more work goes on. One item of work is
//   NCHW           one vector of adjacent pixels in BIAS_ACT_PLANES consecutive planes: its noise is read once;
//   channels last  one vector of adjacent channels in BIAS_ACT_PIXELS pixels: its factors are read once.
// A vector is 16 bytes if all addresses and the length of a row of them allow it, else one element. The loads of an
// item do not depend on each other: 64 bytes are in flight per thread, each warp's access covers 512 consecutive bytes.
#include "common.cuh"

constexpr int BIAS_ACT_THREADS = 256;
constexpr int BIAS_ACT_PLANES = 4;
constexpr int BIAS_ACT_PIXELS = 4;

// NCHW: pixels [position, position + COUNT) of planes [plane, plane + BIAS_ACT_PLANES).
template <typename T, int FACTORS, int COUNT>
__device__ __forceinline__ void activate_planes(const T* x, const EpilogueInputs<T>& inputs, T* y, int plane,
                                                int planes, int channels, int pixels, int position) {
    Pack<T, COUNT> packs[BIAS_ACT_PLANES];
    float noise[COUNT] = {};
    if constexpr ((FACTORS & NOISE) != 0) {
        unpack(load_pack<COUNT>(inputs.noise + position), noise);
    }
#pragma unroll
    for (int k = 0; k < BIAS_ACT_PLANES; ++k) {
        if (plane + k < planes) {
            packs[k] = load_pack<COUNT>(x + static_cast<long long>(plane + k) * pixels + position);
        }
    }
    int channel = plane % channels;
#pragma unroll
    for (int k = 0; k < BIAS_ACT_PLANES; ++k) {
        if (plane + k < planes) {
            const Epilogue<FACTORS> epilogue(inputs, plane + k, channel);
            float values[COUNT];
            unpack(packs[k], values);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                values[i] = epilogue(values[i], noise[i]);
            }
            store_pack<COUNT>(y + static_cast<long long>(plane + k) * pixels + position, round_pack<T>(values));
        }
        channel = channel + 1 == channels ? 0 : channel + 1;
    }
}

template <typename T, int FACTORS, int COUNT>
__device__ __forceinline__ void activate_nchw(const T* x, const EpilogueInputs<T>& inputs, T* y, int batch,
                                              int channels, int pixels) {
    const int vectors = divide_up(pixels, COUNT);
    const int planes = batch * channels;
    const long long items = static_cast<long long>(divide_up(planes, BIAS_ACT_PLANES)) * vectors;
    const long long stride = static_cast<long long>(gridDim.x) * BIAS_ACT_THREADS;
    for (long long item = static_cast<long long>(blockIdx.x) * BIAS_ACT_THREADS + threadIdx.x; item < items;
         item += stride) {
        const int group = static_cast<int>(divide(item, vectors));
        const int position = static_cast<int>(item - static_cast<long long>(group) * vectors) * COUNT;
        activate_planes<T, FACTORS, COUNT>(x, inputs, y, group * BIAS_ACT_PLANES, planes, channels, pixels, position);
    }
}

// Channels last: channels [channel, channel + COUNT) of pixels first_pixel + k * stride, k < BIAS_ACT_PIXELS, of image
// n.
template <typename T, int FACTORS, int COUNT>
__device__ __forceinline__ void activate_pixels(const T* x, const EpilogueInputs<T>& inputs, T* y, int n, int channels,
                                                int pixels, int channel, int first_pixel, int stride) {
    const long long image = static_cast<long long>(n) * pixels;
    Pack<T, COUNT> packs[BIAS_ACT_PIXELS];
    Pack<T, 1> noise[BIAS_ACT_PIXELS];
#pragma unroll
    for (int k = 0; k < BIAS_ACT_PIXELS; ++k) {
        const long long pixel = first_pixel + static_cast<long long>(k) * stride;
        if (pixel < pixels) {
            packs[k] = load_pack<COUNT>(x + (image + pixel) * channels + channel);
            if constexpr ((FACTORS & NOISE) != 0) {
                noise[k] = load_pack<1>(inputs.noise + pixel);
            }
        }
    }
    const Epilogue<FACTORS, COUNT> epilogue(inputs, static_cast<long long>(n) * channels + channel, channel);
#pragma unroll
    for (int k = 0; k < BIAS_ACT_PIXELS; ++k) {
        const long long pixel = first_pixel + static_cast<long long>(k) * stride;
        if (pixel < pixels) {
            float values[COUNT];
            float pixel_noise[1] = {};
            unpack(packs[k], values);
            if constexpr ((FACTORS & NOISE) != 0) {
                unpack(noise[k], pixel_noise);
            }
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                values[i] = epilogue(values[i], pixel_noise[0], i);
            }
            store_pack<COUNT>(y + (image + pixel) * channels + channel, round_pack<T>(values));
        }
    }
}

template <typename T, int FACTORS, int COUNT>
__device__ __forceinline__ void activate_channels_last(const T* x, const EpilogueInputs<T>& inputs, T* y, int batch,
                                                       int channels, int pixels) {
    const int vectors = channels / COUNT;
    const int pixel_stride =
        divide_up(pixels, BIAS_ACT_PIXELS);  // the k-th pixels of neighbouring threads are neighbours
    const long long per_image = static_cast<long long>(pixel_stride) * vectors;
    const long long items = per_image * batch;
    const long long stride = static_cast<long long>(gridDim.x) * BIAS_ACT_THREADS;
    for (long long item = static_cast<long long>(blockIdx.x) * BIAS_ACT_THREADS + threadIdx.x; item < items;
         item += stride) {
        const int n = static_cast<int>(divide(item, per_image));
        const long long rest = item - n * per_image;
        const int pixel = static_cast<int>(divide(rest, vectors));
        const int channel = static_cast<int>(rest - static_cast<long long>(pixel) * vectors) * COUNT;
        activate_pixels<T, FACTORS, COUNT>(x, inputs, y, n, channels, pixels, channel, pixel, pixel_stride);
    }
}

// x, y: [N, C, H, W], or [N, H, W, C] if CHANNELS_LAST. noise: [H, W]. demod, next_scale: [N, C]; bias: [C].
// pixels: H * W. N * C and H * W are below 2^31. The three *_bits are float32 bit patterns.
template <typename T, int FACTORS, bool CHANNELS_LAST>
__global__ void __launch_bounds__(BIAS_ACT_THREADS, CHANNELS_LAST ? 3 : 4)
    fused_bias_act(const T* x, const float* demod, const T* noise, const float* bias, const float* next_scale,
                   int batch, int channels, int pixels, int noise_strength_bits, int slope_bits, int gain_bits, T* y) {
    const EpilogueInputs<T> inputs{demod,
                                   noise,
                                   bias,
                                   next_scale,
                                   float_from_bits(noise_strength_bits),
                                   float_from_bits(slope_bits),
                                   float_from_bits(gain_bits)};
    const bool aligned = is_aligned(x, VECTOR_BYTES) && is_aligned(y, VECTOR_BYTES);
    if constexpr (CHANNELS_LAST) {
        if (aligned && channels % VECTOR<T> == 0 && inputs.template factors_are_aligned<FACTORS>()) {
            activate_channels_last<T, FACTORS, VECTOR<T>>(x, inputs, y, batch, channels, pixels);
        } else {
            activate_channels_last<T, FACTORS, 1>(x, inputs, y, batch, channels, pixels);
        }
    } else {
        if (aligned && pixels % VECTOR<T> == 0 && (!(FACTORS & NOISE) || is_aligned(noise, VECTOR_BYTES))) {
            activate_nchw<T, FACTORS, VECTOR<T>>(x, inputs, y, batch, channels, pixels);
        } else {
            activate_nchw<T, FACTORS, 1>(x, inputs, y, batch, channels, pixels);
        }
    }
}
