// y = gain * leaky_relu(x * demod[n, c] + noise_strength * noise[h, w] + bias[c], slope) * next_scale[n, c], each
// factor optional.
//
// Geometry (geometry.py has the same numbers): a one-dimensional grid of BIAS_ACT_THREADS threads per block; any number
// of blocks is right, because a thread that finds more work goes on. One item of work is
//   NCHW           one vector of adjacent pixels in BIAS_ACT_PLANES planes: its noise is read once;
//   channels last  one vector of adjacent channels in BIAS_ACT_PIXELS pixels: its factors are read once.
// All loads of an item come before its first store and do not depend on each other, but where fewer planes are left:
// those are done one by one. With vectors of 16 bytes, 64 bytes of x are in flight per thread, and each warp's access
// covers 512 consecutive bytes.
//
// How wide a vector of x and y is, chosen once per launch from 16 bytes, two elements, and one:
//   NCHW           the widest for which x and y lie equally far behind a multiple of it. H * W is any number: what of a
//                  plane lies before its first whole vector and behind its last one is items of one element. The planes
//                  of an item are so far apart that their vectors begin at the same pixel. Where the noise of a vector
//                  is not aligned as x is, it is read by single elements.
//   channels last  the widest of which x, y and C are multiples; 16 bytes only if demod, bias and next_scale, where
//                  present, are aligned to 16 bytes, too. So an odd C is moved by single elements.
#include "common.cuh"

constexpr int BIAS_ACT_THREADS = 256;
constexpr int BIAS_ACT_PLANES = 4;
constexpr int BIAS_ACT_PIXELS = 4;

// `count` planes, `stride` apart; at least 1, at most BIAS_ACT_PLANES.
struct PlaneGroup {
    int first;
    int stride;
    int count;
    int channels;
    int channel_stride;  // stride % channels
};

template <int COUNT, typename T>
__device__ __forceinline__ void load_noise(const T* address, float (&noise)[COUNT]) {
    if (is_aligned(address, COUNT * static_cast<int>(sizeof(T)))) {
        unpack(load_pack<COUNT>(address), noise);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        noise[i] = to_float(__ldg(address + i));
    }
}

// NCHW: pixels [position, position + COUNT) of PLANES planes, the first ones of a group.
template <typename T, int FACTORS, int COUNT, int PLANES>
__device__ __forceinline__ void activate_planes(const T* x, const EpilogueInputs<T>& inputs, T* y,
                                                const PlaneGroup& group, int pixels, int position) {
    Pack<T, COUNT> packs[PLANES];
    float noise[COUNT] = {};
    if constexpr ((FACTORS & NOISE) != 0) {
        load_noise(inputs.noise + position, noise);
    }
    const long long begin = static_cast<long long>(group.first) * pixels + position;
    const long long stride = static_cast<long long>(group.stride) * pixels;
#pragma unroll
    for (int k = 0; k < PLANES; ++k) {
        packs[k] = load_pack<COUNT>(x + begin + k * stride);
    }
    int channel = group.first % group.channels;
#pragma unroll
    for (int k = 0; k < PLANES; ++k) {
        const Epilogue<FACTORS> epilogue(inputs, static_cast<long long>(group.first) + k * group.stride, channel);
        float values[COUNT];
        unpack(packs[k], values);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            values[i] = epilogue(values[i], noise[i]);
        }
        packs[k] = round_pack<T>(values);
        channel += group.channel_stride - (channel >= group.channels - group.channel_stride ? group.channels : 0);
    }
    // Not in the loop above: no load passes a store. Nor is any store conditional: the compiler moves what only such a
    // one needs, loads too, behind the condition and the stores before it.
#pragma unroll
    for (int k = 0; k < PLANES; ++k) {
        store_pack<COUNT>(y + begin + k * stride, packs[k]);
    }
}

// NCHW: pixels [position, position + COUNT) of a group of planes.
template <typename T, int FACTORS, int COUNT>
__device__ __forceinline__ void activate_group(const T* x, const EpilogueInputs<T>& inputs, T* y,
                                               const PlaneGroup& group, int pixels, int position) {
    if (group.count == BIAS_ACT_PLANES) {
        activate_planes<T, FACTORS, COUNT, BIAS_ACT_PLANES>(x, inputs, y, group, pixels, position);
        return;
    }
    PlaneGroup rest = group;
#pragma unroll 1
    for (int k = 0; k < group.count; ++k) {
        rest.first = group.first + k * group.stride;
        activate_planes<T, FACTORS, COUNT, 1>(x, inputs, y, rest, pixels, position);
    }
}

// Item `item` of a group of planes: first there are the whole vectors, then the elements before and behind them. The
// planes begin equally far behind a multiple of a vector.
template <typename T, int FACTORS, int COUNT>
__device__ __forceinline__ void activate_item(const T* x, const EpilogueInputs<T>& inputs, T* y,
                                              const PlaneGroup& group, int pixels, int item) {
    const unsigned int begin = static_cast<unsigned int>(reinterpret_cast<size_t>(x) / sizeof(T)) +
                               static_cast<unsigned int>(group.first) * static_cast<unsigned int>(pixels);
    const int head = min(static_cast<int>(-begin % COUNT), pixels);
    const int vectors = (pixels - head) / COUNT;
    if (item < vectors) {
        activate_group<T, FACTORS, COUNT>(x, inputs, y, group, pixels, head + item * COUNT);
    } else if (item - vectors < pixels - vectors * COUNT) {
        const int edge = item - vectors;
        activate_group<T, FACTORS, 1>(x, inputs, y, group, pixels, edge < head ? edge : edge + vectors * COUNT);
    }
}

// COUNT: how many elements a vector has; x and y lie equally far behind a multiple of its size.
template <typename T, int FACTORS, int COUNT>
__device__ __forceinline__ void activate_nchw(const T* x, const EpilogueInputs<T>& inputs, T* y, int batch,
                                              int channels, int pixels) {
    const int planes = batch * channels;
    // Planes that are 2^shift apart begin equally far behind a multiple of a vector.
    int shift = 0;
    while ((static_cast<unsigned int>(pixels) << shift) % COUNT != 0) {
        ++shift;
    }
    const int whole = (planes / BIAS_ACT_PLANES) >> shift;  // blocks of 2^shift groups without gaps
    const int groups = (whole << shift) + min(planes - ((whole * BIAS_ACT_PLANES) << shift), 1 << shift);
    const bool has_edges = shift != 0 || !is_aligned(x, COUNT * static_cast<int>(sizeof(T)));
    const int per_group = pixels / COUNT + (has_edges ? 2 * (COUNT - 1) : 0);
    const int channel_stride = (1 << shift) % channels;
    const long long items = static_cast<long long>(groups) * per_group;
    const long long stride = static_cast<long long>(gridDim.x) * BIAS_ACT_THREADS;
    for (long long item = static_cast<long long>(blockIdx.x) * BIAS_ACT_THREADS + threadIdx.x; item < items;
         item += stride) {
        const int index = static_cast<int>(divide(item, per_group));
        const int first = (((index >> shift) * BIAS_ACT_PLANES) << shift) + (index & ((1 << shift) - 1));
        const int count = min(((planes - first - 1) >> shift) + 1, BIAS_ACT_PLANES);
        activate_item<T, FACTORS, COUNT>(x, inputs, y, {first, 1 << shift, count, channels, channel_stride}, pixels,
                                         static_cast<int>(item - static_cast<long long>(index) * per_group));
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
    if constexpr (CHANNELS_LAST) {
        const auto fits = [&](int count) {
            const int bytes = count * static_cast<int>(sizeof(T));
            return channels % count == 0 && is_aligned(x, bytes) && is_aligned(y, bytes);
        };
        if (fits(VECTOR<T>) && inputs.template factors_are_aligned<FACTORS>()) {
            activate_channels_last<T, FACTORS, VECTOR<T>>(x, inputs, y, batch, channels, pixels);
        } else if (fits(2)) {
            activate_channels_last<T, FACTORS, 2>(x, inputs, y, batch, channels, pixels);
        } else {
            activate_channels_last<T, FACTORS, 1>(x, inputs, y, batch, channels, pixels);
        }
    } else {
        const size_t between = reinterpret_cast<size_t>(x) ^ reinterpret_cast<size_t>(y);
        if (between % VECTOR_BYTES == 0) {
            activate_nchw<T, FACTORS, VECTOR<T>>(x, inputs, y, batch, channels, pixels);
        } else if (between % (2 * sizeof(T)) == 0) {
            activate_nchw<T, FACTORS, 2>(x, inputs, y, batch, channels, pixels);
        } else {
            activate_nchw<T, FACTORS, 1>(x, inputs, y, batch, channels, pixels);
        }
    }
}
