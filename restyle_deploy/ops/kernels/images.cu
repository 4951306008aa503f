// What surrounds the loop: images as people have them -> the encoder's target, and rendered images -> pixels.
//
// The resize is that of Pillow for 8-bit images with a bilinear filter: weights in double precision, brought to whole
// numbers of WEIGHT_BITS bits; first along rows, then along columns, or the other way round, each rounded to 8 bits. The
// results are the same to the bit, which is why the double arithmetic is spelled out: nothing may be contracted to fused
// multiply-adds. What the first pass gives is computed by each thread that needs it, so that no memory lies between: of
// a reduced image that is twice the work of the first pass.
//
// Geometry (image_launches.py has the same numbers):
//   prepare_images      one thread per pixel of the target; blocks of (32, 8);
//                       grid (ceil(out_width / 32), ceil(out_height / 8), N), z at most 65535
//   pixels_from_images  one thread per four adjacent pixels, any number of blocks of 256
#include "common.cuh"

constexpr int PREPARE_COLUMNS = 32;
constexpr int PREPARE_ROWS = 8;
constexpr int PIXELS_THREADS = 256;
constexpr int PIXELS_VECTOR = 4;
constexpr int STORED_TAPS = 128;  // weights kept in shared memory; those of greater reductions are computed when used
constexpr int WEIGHT_BITS = 22;
constexpr int CHANNELS = 3;

// The source pixels along one axis that make one target pixel, and their weights: a triangle around its centre, as wide
// as the image is reduced.
struct Taps {
    int first;
    int count;
    double center;
    double sharpness;
    double total;

    __device__ __forceinline__ Taps(int position, int in_size, int out_size) {
        const double scale = __ddiv_rn(static_cast<double>(in_size), static_cast<double>(out_size));
        const double reach = scale > 1.0 ? scale : 1.0;
        center = __dmul_rn(__dadd_rn(static_cast<double>(position), 0.5), scale);
        sharpness = __ddiv_rn(1.0, reach);
        first = max(static_cast<int>(__dadd_rn(__dsub_rn(center, reach), 0.5)), 0);
        count = max(min(static_cast<int>(__dadd_rn(__dadd_rn(center, reach), 0.5)), in_size) - first, 0);
        total = 0.0;
        for (int tap = 0; tap < count; ++tap) {
            total = __dadd_rn(total, height(tap));
        }
    }

    __device__ __forceinline__ double height(int tap) const {
        const double offset = __dadd_rn(__dsub_rn(static_cast<double>(first + tap), center), 0.5);
        const double distance = fabs(__dmul_rn(offset, sharpness));
        return distance < 1.0 ? __dsub_rn(1.0, distance) : 0.0;
    }

    __device__ __forceinline__ int weight(int tap) const {
        const double share = __ddiv_rn(height(tap), total);
        return static_cast<int>(__dadd_rn(0.5, __dmul_rn(share, static_cast<double>(1 << WEIGHT_BITS))));
    }
};

__device__ __forceinline__ int round_to_byte(int sum) {
    return min(max((sum + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS, 0), 255);
}

// source: uint8 [N, in_height, in_width, 3]; target: float32 [N, 3, out_height, out_width] in [-1, 1]. No size is 0.
// COLUMNS_FIRST: whether the first pass is along columns; see image_launches.py.
template <bool COLUMNS_FIRST>
__global__ void __launch_bounds__(PREPARE_COLUMNS* PREPARE_ROWS)
    prepare_images(const unsigned char* source, int in_height, int in_width, int out_height, int out_width,
                   float* target) {
    __shared__ int column_weights[STORED_TAPS][PREPARE_COLUMNS];
    __shared__ int row_weights[PREPARE_ROWS][STORED_TAPS];
    const int lane = threadIdx.x;
    const int line = threadIdx.y;
    const int column = static_cast<int>(blockIdx.x) * PREPARE_COLUMNS + lane;
    const int row = static_cast<int>(blockIdx.y) * PREPARE_ROWS + line;
    const Taps across(column, in_width, out_width);
    const Taps down(row, in_height, out_height);
    for (int tap = line; tap < min(across.count, STORED_TAPS); tap += PREPARE_ROWS) {
        column_weights[tap][lane] = across.weight(tap);
    }
    for (int tap = lane; tap < min(down.count, STORED_TAPS); tap += PREPARE_COLUMNS) {
        row_weights[line][tap] = down.weight(tap);
    }
    __syncthreads();
    if (column >= out_width || row >= out_height) {
        return;
    }
    const long long in_row = static_cast<long long>(in_width) * CHANNELS;
    const unsigned char* start = source + (static_cast<long long>(blockIdx.z) * in_height + down.first) * in_row +
                                 static_cast<long long>(across.first) * CHANNELS;
    const Taps& inner = COLUMNS_FIRST ? down : across;
    const Taps& outer = COLUMNS_FIRST ? across : down;
    const long long inner_step = COLUMNS_FIRST ? in_row : CHANNELS;
    const long long outer_step = COLUMNS_FIRST ? CHANNELS : in_row;
    const int* inner_weights = COLUMNS_FIRST ? row_weights[line] : &column_weights[0][lane];
    const int* outer_weights = COLUMNS_FIRST ? &column_weights[0][lane] : row_weights[line];
    constexpr int INNER_WEIGHTS_STEP = COLUMNS_FIRST ? 1 : PREPARE_COLUMNS;
    constexpr int OUTER_WEIGHTS_STEP = COLUMNS_FIRST ? PREPARE_COLUMNS : 1;
    int sums[CHANNELS] = {};
    for (int i = 0; i < outer.count; ++i, start += outer_step) {
        int inner_sums[CHANNELS] = {};
        const unsigned char* pixel = start;
        for (int j = 0; j < inner.count; ++j, pixel += inner_step) {
            const int weight = j < STORED_TAPS ? inner_weights[j * INNER_WEIGHTS_STEP] : inner.weight(j);
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                inner_sums[c] += __ldg(pixel + c) * weight;
            }
        }
        const int weight = i < STORED_TAPS ? outer_weights[i * OUTER_WEIGHTS_STEP] : outer.weight(i);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            sums[c] += round_to_byte(inner_sums[c]) * weight;
        }
    }
    const long long plane = static_cast<long long>(out_height) * out_width;
    float* pixel = target + static_cast<long long>(blockIdx.z) * CHANNELS * plane +
                   static_cast<long long>(row) * out_width + column;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        __stwb(pixel + c * plane, (static_cast<float>(round_to_byte(sums[c])) / 255.0f - 0.5f) / 0.5f);
    }
}

// Clipped, then truncated, as upstream's tensor2im; NaN becomes 0.
__device__ __forceinline__ unsigned char byte_of(float value) {
    return static_cast<unsigned char>(fminf(fmaxf((value + 1.0f) / 2.0f, 0.0f), 1.0f) * 255.0f);
}

// Pixels [position, position + COUNT) of one image.
template <int COUNT>
__device__ __forceinline__ void write_pixels(const float* image, int pixels, int position, unsigned char* y) {
    unsigned char bytes[COUNT * CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        float values[COUNT];
        unpack(load_pack<COUNT>(image + static_cast<long long>(c) * pixels + position), values);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            bytes[i * CHANNELS + c] = byte_of(values[i]);
        }
    }
    unsigned char* first = y + static_cast<long long>(position) * CHANNELS;
    if constexpr (COUNT == 1) {
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) {
            __stwb(first + i, bytes[i]);
        }
    } else {
        unsigned int words[COUNT * CHANNELS / 4];
        memcpy(words, bytes, sizeof(words));
#pragma unroll
        for (int i = 0; i < COUNT * CHANNELS / 4; ++i) {
            __stwb(reinterpret_cast<unsigned int*>(first) + i, words[i]);
        }
    }
}

template <int COUNT>
__device__ __forceinline__ void write_images(const float* images, int count, int pixels, unsigned char* y) {
    const int vectors = pixels / COUNT;
    const long long items = static_cast<long long>(count) * vectors;
    const long long stride = static_cast<long long>(gridDim.x) * PIXELS_THREADS;
    for (long long item = static_cast<long long>(blockIdx.x) * PIXELS_THREADS + threadIdx.x; item < items;
         item += stride) {
        const long long n = divide(item, vectors);
        const int position = static_cast<int>(item - n * vectors) * COUNT;
        write_pixels<COUNT>(images + n * CHANNELS * pixels, pixels, position, y + n * CHANNELS * pixels);
    }
}

// images: float32 [count, 3, pixels]; y: uint8 [count, pixels, 3]. No size is 0.
__global__ void __launch_bounds__(PIXELS_THREADS)
    pixels_from_images(const float* images, int count, int pixels, unsigned char* y) {
    if (pixels % PIXELS_VECTOR == 0 && is_aligned(images, VECTOR_BYTES) && is_aligned(y, 4)) {
        write_images<PIXELS_VECTOR>(images, count, pixels, y);
    } else {
        write_images<1>(images, count, pixels, y);
    }
}
