// upfirdn2d for NCHW. One block of 32 x 8 threads makes one tile of 64 x 64 pixels of one plane.
//
// The rows of a plane begin anywhere (the input of the blur is 2 * size + 1 pixels wide), so a tile is copied by
// aligned chunks of 16 bytes, and each of its rows in shared memory keeps the misalignment it has in global memory:
// `shift` elements lie in front of the tile's first column. A warp works on one row: lane l makes columns 2l and 2l + 1
// of eight rows, and reads its samples by words of two elements, without bank conflicts. It filters a row horizontally
// as it comes, keeps the last four results in registers, and filters these vertically, so that nothing goes back to
// shared memory.
#pragma once

#include "filtering.cuh"

constexpr int TILE_WIDTH = 64;
constexpr int TILE_HEIGHT = 64;
constexpr int TILE_LANES = 32;
constexpr int TILE_STRIPS = 8;
constexpr int STRIP_ROWS = TILE_HEIGHT / TILE_STRIPS;
constexpr int COLUMNS_PER_LANE = TILE_WIDTH / TILE_LANES;

// How many input rows and columns a tile needs at most: 3 and 2 around its own.
template <int CONFIG>
constexpr int TILE_INPUT = CONFIG == BLUR ? TILE_WIDTH + 3 : TILE_WIDTH / 2 + 2;

// How many chunks of 16 bytes hold a row of it, shifted by at most VECTOR - 1 elements.
template <typename T, int CONFIG>
constexpr int TILE_CHUNKS = (TILE_INPUT<CONFIG> + VECTOR<T> - 1 + VECTOR<T> - 1) / VECTOR<T>;

// The part of a plane that lies in shared memory.
template <typename T, int CONFIG>
struct Tile {
    static constexpr int ROWS = TILE_INPUT<CONFIG>;
    static constexpr int CHUNKS = TILE_CHUNKS<T, CONFIG>;
    using Chunks = uint4[ROWS][CHUNKS];

    Chunks& chunks;
    const T* plane;
    int height;
    int width;
    int first_row;  // of the plane; may lie outside of it, like first_column
    int first_column;

    __device__ __forceinline__ int shift(int row) const {
        const unsigned int elements = static_cast<unsigned int>(reinterpret_cast<size_t>(plane) / sizeof(T));
        const unsigned int offset = static_cast<unsigned int>(first_row + row) * static_cast<unsigned int>(width);
        return static_cast<int>((elements + offset + static_cast<unsigned int>(first_column)) & (VECTOR<T> - 1));
    }

    // The samples of a row; [0] is the sample of first_column.
    __device__ __forceinline__ const T* row(int row) const {
        return reinterpret_cast<const T*>(chunks[row]) + shift(row);
    }

    // Starts to copy the first `rows` rows, with zeros where there is no plane.
    __device__ __forceinline__ void fill(int rows) const {
        for (int i = threadIdx.y * TILE_LANES + threadIdx.x; i < rows * CHUNKS; i += TILE_LANES * TILE_STRIPS) {
            const int row = i / CHUNKS;
            const int chunk = i - row * CHUNKS;
            fill_chunk(chunks[row][chunk], first_row + row, first_column - shift(row) + chunk * VECTOR<T>);
        }
    }

private:
    __device__ __forceinline__ void fill_chunk(uint4& chunk, int plane_row, int column) const {
        const T* source = plane + (plane_row * width + column);
        const int end = min(width, first_column + TILE_INPUT<CONFIG>);
        const bool outside = plane_row < 0 || plane_row >= height || column <= -VECTOR<T> || column >= end;
        const bool whole = column >= 0 && column + VECTOR<T> <= width;
        if (outside || whole) {
            copy_async(&chunk, source, !outside);
            return;
        }
        // The row's first or last chunk also holds elements of the rows next to it, or of nothing at all.
        typename Pack<T, 1>::Word items[VECTOR<T>];
#pragma unroll
        for (int k = 0; k < VECTOR<T>; ++k) {
            items[k] = 0;
            if (column + k >= 0 && column + k < width) {
                items[k] = load_pack<1>(source + k).word;
            }
        }
        memcpy(&chunk, items, sizeof(chunk));
    }
};

// Reads five adjacent elements of shared memory by words of two. `address` is a multiple of the element size only.
__device__ __forceinline__ void read_five(const float* address, float (&values)[5]) {
    const bool odd = !is_aligned(address, 8);
    const float2* pairs = reinterpret_cast<const float2*>(address - (odd ? 1 : 0));
    const float2 a = pairs[0], b = pairs[1], c = pairs[2];
    values[0] = odd ? a.y : a.x;
    values[1] = odd ? b.x : a.y;
    values[2] = odd ? b.y : b.x;
    values[3] = odd ? c.x : b.y;
    values[4] = odd ? c.y : c.x;
}

template <typename T>
__device__ __forceinline__ void read_five(const T* address, float (&values)[5]) {
    const bool odd = !is_aligned(address, 4);
    const unsigned int* words = reinterpret_cast<const unsigned int*>(address - (odd ? 1 : 0));
    const unsigned int bits = odd ? 16 : 0;
    const unsigned int aligned[3] = {__funnelshift_r(words[0], words[1], bits),
                                     __funnelshift_r(words[1], words[2], bits), words[2] >> bits};
    T items[6];
    memcpy(items, aligned, sizeof(items));
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        values[i] = to_float(items[i]);
    }
}

// Applies the epilogue to a lane's two columns of one plane, row by row, and stores them.
template <typename T, int FACTORS>
struct PlaneWriter {
    Epilogue<FACTORS> epilogue;
    const T* noise;
    T* plane;
    int height;
    int width;
    int column;
    bool in_pairs;  // whether two columns may be moved by one access

    __device__ __forceinline__ PlaneWriter(const EpilogueInputs<T>& inputs, T* y, const Filtering& f, int n_and_channel,
                                           int column)
        : epilogue(inputs, n_and_channel, n_and_channel % f.channels),
          noise(inputs.noise),
          plane(y + static_cast<long long>(n_and_channel) * f.out_height * f.out_width),
          height(f.out_height),
          width(f.out_width),
          column(column),
          in_pairs(f.out_width % 2 == 0 && is_aligned(y, 2 * sizeof(T)) &&
                   (!(FACTORS & NOISE) || is_aligned(inputs.noise, 2 * sizeof(T)))) {}

    __device__ __forceinline__ Pack<T, 2> load_noise(int row) const {
        Pack<T, 2> pair{};
        if constexpr ((FACTORS & NOISE) != 0) {
            if (row < height && column < width) {
                const T* address = noise + (row * width + column);
                if (in_pairs) {
                    return load_pack<2>(address);
                }
                const typename Pack<T, 1>::Word items[2] = {load_pack<1>(address).word,
                                                            load_pack<1>(address + (column + 1 < width ? 1 : 0)).word};
                memcpy(&pair.word, items, sizeof(items));
            }
        }
        return pair;
    }

    __device__ __forceinline__ void store(int row, const float (&sums)[2], const Pack<T, 2>& noise_pair) const {
        if (row >= height || column >= width) {
            return;
        }
        float noise_values[2];
        unpack(noise_pair, noise_values);
        const float values[2] = {epilogue(sums[0], noise_values[0]), epilogue(sums[1], noise_values[1])};
        T* address = plane + (row * width + column);
        if (in_pairs) {
            store_pack<2>(address, round_pack<T>(values));
            return;
        }
        const float first[1] = {values[0]};
        const float second[1] = {values[1]};
        store_pack<1>(address, round_pack<T>(first));
        if (column + 1 < width) {
            store_pack<1>(address + 1, round_pack<T>(second));
        }
    }
};

// Filters the rows of a strip; `first_row` is the strip's first in the result, `tile_row` the first that it needs of
// the tile.
template <typename T, int FACTORS>
__device__ __forceinline__ void blur_strip(const Tile<T, BLUR>& tile, const SeparableTaps& taps,
                                           const PlaneWriter<T, FACTORS>& writer, const Pack<T, 2> (&noise)[STRIP_ROWS],
                                           int first_row, int tile_row) {
    float rows[TAPS][2];
#pragma unroll
    for (int i = 0; i < STRIP_ROWS + TAPS - 1; ++i) {
        float samples[TAPS + 1];
        read_five(tile.row(tile_row + i) + COLUMNS_PER_LANE * threadIdx.x, samples);
        float sums[2] = {};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            rows[i % TAPS][c] = samples[c] * taps.horizontal[0];
#pragma unroll
            for (int t = 1; t < TAPS; ++t) {
                rows[i % TAPS][c] = fmaf(samples[c + t], taps.horizontal[t], rows[i % TAPS][c]);
            }
#pragma unroll
            for (int t = 0; t < TAPS && i >= TAPS - 1; ++t) {
                sums[c] = fmaf(rows[(i + 1 + t) % TAPS][c], taps.vertical[t], sums[c]);
            }
        }
        if (i >= TAPS - 1) {
            writer.store(first_row + i - (TAPS - 1), sums, noise[i - (TAPS - 1)]);
        }
    }
}

// Each input row and column gives two: the even ones are taps 0 and 2 of samples j - 1 and j, the odd ones taps 1 and 3
// of j and j + 1.
template <typename T, int FACTORS>
__device__ __forceinline__ void upsample_strip(const Tile<T, SKIP_UPSAMPLE>& tile, const SeparableTaps& taps,
                                               const PlaneWriter<T, FACTORS>& writer,
                                               const Pack<T, 2> (&noise)[STRIP_ROWS], int first_row, int tile_row) {
    float rows[3][2];
#pragma unroll
    for (int i = 0; i < STRIP_ROWS / 2 + 2; ++i) {
        const T* items = tile.row(tile_row + i) + threadIdx.x;
        const float samples[3] = {to_float(items[0]), to_float(items[1]), to_float(items[2])};
        rows[i % 3][0] = samples[0] * taps.horizontal[0] + samples[1] * taps.horizontal[2];
        rows[i % 3][1] = samples[1] * taps.horizontal[1] + samples[2] * taps.horizontal[3];
        if (i >= 2) {
            float even[2], odd[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                even[c] = rows[(i + 1) % 3][c] * taps.vertical[0] + rows[(i + 2) % 3][c] * taps.vertical[2];
                odd[c] = rows[(i + 2) % 3][c] * taps.vertical[1] + rows[i % 3][c] * taps.vertical[3];
            }
            writer.store(first_row + 2 * (i - 2), even, noise[2 * (i - 2)]);
            writer.store(first_row + 2 * (i - 2) + 1, odd, noise[2 * (i - 2) + 1]);
        }
    }
}

template <typename T, int CONFIG, int FACTORS>
__device__ __forceinline__ void filter_plane(const T* x, const EpilogueInputs<T>& inputs, const Filtering& f, T* y) {
    const int plane = blockIdx.z;
    const int tile_top = blockIdx.y * TILE_HEIGHT;
    const int tile_left = blockIdx.x * TILE_WIDTH;
    const int first_row = tile_top + threadIdx.y * STRIP_ROWS;
    const T* x_plane = x + static_cast<long long>(plane) * f.in_height * f.in_width;
    const PlaneWriter<T, FACTORS> writer(inputs, y, f, plane,
                                         tile_left + COLUMNS_PER_LANE * static_cast<int>(threadIdx.x));
    if constexpr (CONFIG == GENERAL) {
        for (int row = first_row; row < min(first_row + STRIP_ROWS, f.out_height); ++row) {
            float first[1] = {}, second[1] = {};
            gather(x_plane, 1, f, row, writer.column, first);
            gather(x_plane, 1, f, row, writer.column + 1, second);
            const float sums[2] = {first[0], second[0]};
            writer.store(row, sums, writer.load_noise(row));
        }
    } else {
        __shared__ typename Tile<T, CONFIG>::Chunks chunks;
        __shared__ SeparableTaps shared_taps;
        const int out_rows = min(TILE_HEIGHT, f.out_height - tile_top);
        const Tile<T, CONFIG> tile{chunks,
                                   x_plane,
                                   f.in_height,
                                   f.in_width,
                                   CONFIG == BLUR ? tile_top - f.pad_top : tile_top / 2 - 1,
                                   CONFIG == BLUR ? tile_left - f.pad_left : tile_left / 2 - 1};
        tile.fill(CONFIG == BLUR ? out_rows + 3 : divide_up(out_rows, 2) + 2);
        close_copies();
        if (threadIdx.x == 0 && threadIdx.y == 0) {
            find_taps(f.filter, shared_taps);
        }
        Pack<T, 2> noise[STRIP_ROWS];
#pragma unroll
        for (int i = 0; i < STRIP_ROWS; ++i) {
            noise[i] = writer.load_noise(first_row + i);
        }
        wait_for_copies<0>();
        __syncthreads();
        const SeparableTaps taps = shared_taps;
        if (first_row >= f.out_height) {
            return;
        }
        if constexpr (CONFIG == BLUR) {
            blur_strip(tile, taps, writer, noise, first_row, threadIdx.y * STRIP_ROWS);
        } else {
            upsample_strip(tile, taps, writer, noise, first_row, threadIdx.y * STRIP_ROWS / 2);
        }
    }
}
