// Inserts zeros, pads or crops, filters, keeps every down-th sample; then, in the same pass over memory, the epilogue
// y = gain * leaky_relu(v * demod[n, c] + noise_strength * noise[h, w] + bias[c], slope) * next_scale[n, c].
//
// Geometry (geometry.py has the same numbers):
//   NCHW           filtering_planes.cuh:         64 x 64 pixels of a plane per block of (16, 4);
//                  grid (ceil(out_width / 64), ceil(out_height / 64), N * C), z at most 65535
//   channels last  filtering_channels_last.cuh:  32 x 16 pixels of 64 bytes of channels per block of (4, 32);
//                  grid (ceil(C / channels of 64 bytes) * ceil(out_width / 32), ceil(out_height / 16), N)
// Filters are float32 and two-dimensional in every configuration; the separable ones find their taps by themselves.
#include "filtering_channels_last.cuh"
#include "filtering_planes.cuh"

// x: [N, C, H, W], or [N, H, W, C] if CHANNELS_LAST; y: the same with H', W'. noise: [H', W'].
// demod, next_scale: [N, C]; bias: [C]; filter: [filter_height, filter_width]. The three *_bits are float32 bit
// patterns. A plane has fewer than 2^31 pixels. What a CONFIG demands of up, down, pads and filter is not checked here.
template <typename T, int CONFIG, int FACTORS, bool CHANNELS_LAST>
__global__ void __launch_bounds__(CHANNELS_LAST ? CHANNELS_LAST_VECTORS * CHANNELS_LAST_TILE_WIDTH
                                                : TILE_THREADS,
                                  CHANNELS_LAST ? (sizeof(T) == 4 ? 4 : 5) : (sizeof(T) == 4 ? 8 : 12))
    upfirdn2d(const T* x, const float* filter, const float* demod, const T* noise, const float* bias,
              const float* next_scale, int batch, int channels, int in_height, int in_width, int out_height,
              int out_width, int up, int down, int pad_top, int pad_left, int filter_height, int filter_width,
              int noise_strength_bits, int slope_bits, int gain_bits, T* y) {
    const EpilogueInputs<T> inputs{demod,
                                   noise,
                                   bias,
                                   next_scale,
                                   float_from_bits(noise_strength_bits),
                                   float_from_bits(slope_bits),
                                   float_from_bits(gain_bits)};
    const Filtering filtering{filter, batch, channels, in_height, in_width,      out_height,  out_width,
                              up,     down,  pad_top,  pad_left,  filter_height, filter_width};
    if constexpr (CHANNELS_LAST) {
        filter_image<T, CONFIG, FACTORS>(x, inputs, filtering, y);
    } else {
        filter_plane<T, CONFIG, FACTORS>(x, inputs, filtering, y);
    }
}
