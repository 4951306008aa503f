// upfirdn2d for channels last. One block of 4 x 32 threads makes a tile of 32 x 16 pixels of 64 bytes of channels.
//
// A thread owns one vector of channels and one column. The block walks down the tile by four input rows at a time:
// those of the next step are on their way into one half of shared memory while those in the other half are filtered. A
// thread filters each row horizontally and keeps the last rows' results in registers for the vertical filter, so no row
// is read twice. Eight adjacent columns of 64 bytes are one contiguous access of a warp, in global and in shared
// memory. A vector is 16 bytes if addresses and channel count allow it, else one element; then the block goes through
// its channels by fours.
#pragma once

#include "filtering.cuh"

constexpr int CHANNELS_LAST_TILE_WIDTH = 32;
constexpr int CHANNELS_LAST_TILE_HEIGHT = 16;
constexpr int CHANNELS_LAST_VECTORS = 4;

// What the walk reads: columns of a tile's rows, rows ahead of the first step, rows of every step.
template <int CONFIG>
constexpr int WALK_COLUMNS = CONFIG == BLUR ? CHANNELS_LAST_TILE_WIDTH + 3 : CHANNELS_LAST_TILE_WIDTH / 2 + 2;
template <int CONFIG>
constexpr int WALK_FIRST_ROWS = CONFIG == BLUR ? 3 : 2;
constexpr int WALK_STEP_ROWS = TAPS;
// How many rows of the result a step makes.
template <int CONFIG>
constexpr int WALK_STEP_RESULTS = CONFIG == BLUR ? WALK_STEP_ROWS : 2 * WALK_STEP_ROWS;

// Applies the epilogue to COUNT channels of one column, row by row, and stores them.
template <typename T, int FACTORS, int COUNT>
struct PixelWriter {
    Epilogue<FACTORS, COUNT> epilogue;
    const T* noise;
    T* column_start;  // row 0 of the column
    int height;
    int width;
    int channels;
    int column;

    __device__ __forceinline__ PixelWriter(const EpilogueInputs<T>& inputs, T* y, const Filtering& f, int n,
                                           int channel, int column)
        : epilogue(inputs, static_cast<long long>(n) * f.channels + channel, channel),
          noise(inputs.noise),
          column_start(y + (static_cast<long long>(n) * f.out_height * f.out_width + column) * f.channels + channel),
          height(f.out_height),
          width(f.out_width),
          channels(f.channels),
          column(column) {}

    __device__ __forceinline__ Pack<T, 1> load_noise(int row) const {
        Pack<T, 1> pack{};
        if constexpr ((FACTORS & NOISE) != 0) {
            if (row < height && column < width) {
                pack = load_pack<1>(noise + (row * width + column));
            }
        }
        return pack;
    }

    __device__ __forceinline__ void store(int row, const float (&sums)[COUNT], const Pack<T, 1>& noise_pack) const {
        if (row >= height || column >= width) {
            return;
        }
        float pixel_noise[1];
        unpack(noise_pack, pixel_noise);
        float values[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            values[i] = epilogue(sums[i], pixel_noise[0], i);
        }
        store_pack<COUNT>(column_start + static_cast<long long>(row) * width * channels, round_pack<T>(values));
    }
};

// What a block keeps in shared memory.
template <typename T, int CONFIG>
struct WalkMemory {
    uint4 vectors[2][WALK_STEP_ROWS * WALK_COLUMNS<CONFIG> * CHANNELS_LAST_VECTORS];
    SeparableTaps taps;

    __device__ __forceinline__ T* buffer(int which) { return reinterpret_cast<T*>(vectors[which]); }
};

// The rows of one tile, for the vector of channels that begins at `channel`.
template <typename T, int CONFIG, int COUNT>
struct Walk {
    static constexpr int COLUMNS = WALK_COLUMNS<CONFIG>;

    const T* image;  // of this n
    int height;
    int width;
    int channels;
    int channel;
    int first_column;  // may lie outside of the image, like rows

    // Where a vector lies in a buffer.
    __device__ __forceinline__ static int offset(int row, int column) {
        return ((row * COLUMNS + column) * CHANNELS_LAST_VECTORS + static_cast<int>(threadIdx.x)) * COUNT;
    }

    // Starts to copy rows [first_row, first_row + rows), with zeros where there is no image.
    __device__ __forceinline__ void fetch(T* buffer, int first_row, int rows) const {
        int row = static_cast<int>(threadIdx.y) / COLUMNS;
        int column = static_cast<int>(threadIdx.y) % COLUMNS;
#pragma unroll 1
        while (row < rows) {
            const unsigned int in_row = first_row + row;
            const unsigned int in_column = first_column + column;
            const bool inside = in_row < static_cast<unsigned int>(height) &&
                                in_column < static_cast<unsigned int>(width) && channel < channels;
            const int pixel = static_cast<int>(in_row * static_cast<unsigned int>(width) + in_column);
            const T* source = image + (static_cast<long long>(pixel) * channels + channel);
            T* target = buffer + offset(row, column);
            if constexpr (COUNT == VECTOR<T>) {
                copy_async(target, source, inside);
            } else {
                Pack<T, COUNT> pack{};
                if (inside) {
                    pack = load_pack<COUNT>(source);
                }
                memcpy(target, &pack.word, sizeof(pack.word));
            }
            row += CHANNELS_LAST_TILE_WIDTH / COLUMNS;
            column += CHANNELS_LAST_TILE_WIDTH % COLUMNS;
            if (column >= COLUMNS) {
                column -= COLUMNS;
                ++row;
            }
        }
    }

    // Filters one row of a buffer for this thread's column of the result.
    __device__ __forceinline__ void filter_row(const T* buffer, int row, const SeparableTaps& taps,
                                               float (&sums)[COUNT]) const {
        if constexpr (CONFIG == BLUR) {
            clear(sums);
#pragma unroll
            for (int t = 0; t < TAPS; ++t) {
                add(buffer, row, threadIdx.y + t, taps.horizontal[t], sums);
            }
        } else {
            const bool odd =
                threadIdx.y % 2 != 0;  // even: taps 0 and 2 of samples j - 1 and j; odd: 1 and 3 of j and j + 1
            const int sample = threadIdx.y / 2 + (odd ? 1 : 0);
            clear(sums);
            add(buffer, row, sample, odd ? taps.horizontal[1] : taps.horizontal[0], sums);
            add(buffer, row, sample + 1, odd ? taps.horizontal[3] : taps.horizontal[2], sums);
        }
    }

    __device__ __forceinline__ static void clear(float (&sums)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            sums[i] = 0.0f;
        }
    }

private:
    __device__ __forceinline__ static void add(const T* buffer, int row, int column, float tap, float (&sums)[COUNT]) {
        Pack<T, COUNT> pack;
        pack.word = *reinterpret_cast<const typename Pack<T, COUNT>::Word*>(buffer + offset(row, column));
        float values[COUNT];
        unpack(pack, values);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            sums[i] = fmaf(values[i], tap, sums[i]);
        }
    }
};

// The latest rows of the walk, filtered horizontally: row i is rows[i % 4]. Sums those that end with `newest`, weighted
// by the taps FIRST, FIRST + STEP, ...
template <int FIRST, int STEP, int TERMS, int COUNT>
__device__ __forceinline__ void combine_rows(const float (&rows)[TAPS][COUNT], int newest, const SeparableTaps& taps,
                                             float (&sums)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        sums[k] = 0.0f;
#pragma unroll
        for (int t = 0; t < TERMS; ++t) {
            sums[k] = fmaf(rows[(newest + TAPS + 1 - TERMS + t) % TAPS][k], taps.vertical[FIRST + STEP * t], sums[k]);
        }
    }
}

// Walks down the tile for one vector of channels per thread.
template <typename T, int CONFIG, int FACTORS, int COUNT>
__device__ __forceinline__ void walk_down(const Walk<T, CONFIG, COUNT>& walk, const float* filter,
                                          WalkMemory<T, CONFIG>& shared, const PixelWriter<T, FACTORS, COUNT>& writer,
                                          int first_row, int in_row) {
    constexpr int FIRST_ROWS = WALK_FIRST_ROWS<CONFIG>;
    constexpr int STEP_RESULTS = WALK_STEP_RESULTS<CONFIG>;
    const int steps = divide_up(min(CHANNELS_LAST_TILE_HEIGHT, writer.height - first_row), STEP_RESULTS);
    walk.fetch(shared.buffer(0), in_row, FIRST_ROWS);
    close_copies();
    walk.fetch(shared.buffer(1), in_row + FIRST_ROWS, WALK_STEP_ROWS);
    close_copies();
    find_taps(filter, shared.taps, threadIdx.y * CHANNELS_LAST_VECTORS + threadIdx.x);
    wait_for_copies<1>();
    __syncthreads();
    const SeparableTaps taps = shared.taps;
    float rows[TAPS][COUNT];
#pragma unroll
    for (int i = 0; i < FIRST_ROWS; ++i) {
        walk.filter_row(shared.buffer(0), i, taps, rows[i]);
    }
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            walk.fetch(shared.buffer(step % 2), in_row + FIRST_ROWS + (step + 1) * WALK_STEP_ROWS, WALK_STEP_ROWS);
        }
        close_copies();
        const int row = first_row + step * STEP_RESULTS;
        Pack<T, 1> noise[STEP_RESULTS];
#pragma unroll
        for (int i = 0; i < STEP_RESULTS; ++i) {
            noise[i] = writer.load_noise(row + i);
        }
        wait_for_copies<1>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WALK_STEP_ROWS; ++i) {
            const int newest = FIRST_ROWS + i;
            float sums[COUNT];
            walk.filter_row(shared.buffer((step + 1) % 2), i, taps, rows[newest % TAPS]);
            if constexpr (CONFIG == BLUR) {
                combine_rows<0, 1, TAPS>(rows, newest, taps, sums);
                writer.store(row + i, sums, noise[i]);
            } else {
                combine_rows<0, 2, 2>(rows, newest - 1, taps, sums);
                writer.store(row + 2 * i, sums, noise[2 * i]);
                combine_rows<1, 2, 2>(rows, newest, taps, sums);
                writer.store(row + 2 * i + 1, sums, noise[2 * i + 1]);
            }
        }
        __syncthreads();
    }
}

// Makes one tile for four vectors of COUNT channels, beginning at `first`.
template <typename T, int CONFIG, int FACTORS, int COUNT>
__device__ __forceinline__ void filter_channels(const T* x, const EpilogueInputs<T>& inputs, const Filtering& f, T* y,
                                                WalkMemory<T, CONFIG>& shared, int tile_left, int first) {
    const int n = blockIdx.z;
    const int first_row = blockIdx.y * CHANNELS_LAST_TILE_HEIGHT;
    const int column = tile_left + static_cast<int>(threadIdx.y);
    const int channel = first + static_cast<int>(threadIdx.x) * COUNT;
    const bool idle = channel >= f.channels;  // such a thread takes part in the copies and barriers, and stores nothing
    const T* image = x + static_cast<long long>(n) * f.in_height * f.in_width * f.channels;
    const PixelWriter<T, FACTORS, COUNT> writer(inputs, y, f, n, idle ? 0 : channel, idle ? f.out_width : column);
    if constexpr (CONFIG == GENERAL) {
        const int end_row = min(first_row + CHANNELS_LAST_TILE_HEIGHT, f.out_height);
        for (int row = first_row; row < end_row && !idle && column < f.out_width; ++row) {
            float sums[COUNT];
            gather(image + channel, f.channels, f, row, column, sums);
            writer.store(row, sums, writer.load_noise(row));
        }
    } else {
        const int in_column = CONFIG == BLUR ? tile_left - f.pad_left : tile_left / 2 - 1;
        const int in_row = CONFIG == BLUR ? first_row - f.pad_top : first_row / 2 - 1;
        const Walk<T, CONFIG, COUNT> walk{image, f.in_height, f.in_width, f.channels, channel, in_column};
        walk_down(walk, f.filter, shared, writer, first_row, in_row);
    }
}

template <typename T, int CONFIG, int FACTORS>
__device__ __forceinline__ void filter_image(const T* x, const EpilogueInputs<T>& inputs, const Filtering& f, T* y) {
    constexpr int BLOCK_CHANNELS = CHANNELS_LAST_VECTORS * VECTOR<T>;
    const int channel_blocks = divide_up(f.channels, BLOCK_CHANNELS);
    const int tile = static_cast<int>(blockIdx.x) / channel_blocks;
    const int begin = (static_cast<int>(blockIdx.x) - tile * channel_blocks) * BLOCK_CHANNELS;
    const int tile_left = tile * CHANNELS_LAST_TILE_WIDTH;
    const bool aligned = f.channels % VECTOR<T> == 0 && is_aligned(x, VECTOR_BYTES) && is_aligned(y, VECTOR_BYTES);
    __shared__ WalkMemory<T, CONFIG> shared;
    if (aligned && inputs.template factors_are_aligned<FACTORS>()) {
        filter_channels<T, CONFIG, FACTORS, VECTOR<T>>(x, inputs, f, y, shared, tile_left, begin);
        return;
    }
    for (int first = begin; first < min(begin + BLOCK_CHANNELS, f.channels); first += CHANNELS_LAST_VECTORS) {
        filter_channels<T, CONFIG, FACTORS, 1>(x, inputs, f, y, shared, tile_left, first);
    }
}
