// upfirdn2d for NCHW. One block of 16 x 4 threads makes one tile of 64 x 64 pixels of one plane.
//
// The rows of a plane begin anywhere (the input of the blur is 2 * size + 1 pixels wide), so a tile is copied by
// aligned chunks of 16 bytes, and each of its rows in shared memory keeps the misalignment it has in global memory:
// `shift` elements lie in front of the tile's first column. Chunks are copied whole, whatever they hold of the rows next
// to theirs; columns outside of the plane become zeros afterwards, in the tiles at its edges only. Half a warp works on
// one row: lane l makes columns 4l to 4l + 3 of 16 rows, and reads its samples by words of two elements. It filters a
// row horizontally as it comes, keeps the last four results in registers, and filters these vertically, so that nothing
// goes back to shared memory. Few instructions per result are the aim: a result moves four bytes in float16, and a
// multiprocessor that fetches as fast as it copies has time for some forty (docs/gpu.md).
#pragma once

#include "filtering.cuh"

constexpr int TILE_WIDTH = 64;
constexpr int TILE_HEIGHT = 64;
constexpr int TILE_LANES = 16;
constexpr int TILE_STRIPS = 4;
constexpr int TILE_THREADS = TILE_LANES * TILE_STRIPS;
constexpr int STRIP_ROWS = TILE_HEIGHT / TILE_STRIPS;
constexpr int COLUMNS_PER_LANE = TILE_WIDTH / TILE_LANES;
// How many rows of noise are on their way from memory.
constexpr int NOISE_AHEAD = 8;

// How many input rows and columns a tile needs at most, and a part of it: 3 and 2 around its own.
template <int CONFIG>
__device__ constexpr int input_of(int outputs) {
    return CONFIG == BLUR ? outputs + TAPS - 1 : (outputs + 1) / 2 + 2;
}

template <int CONFIG>
constexpr int TILE_INPUT = input_of<CONFIG>(TILE_WIDTH);

// How many chunks of 16 bytes hold so many adjacent elements, shifted by at most VECTOR - 1.
template <typename T>
__device__ constexpr int chunks_of(int elements) {
    return (elements + 2 * (VECTOR<T> - 1)) / VECTOR<T>;
}

// The part of a plane that lies in shared memory.
template <typename T, int CONFIG>
struct Tile {
    static constexpr int ROWS = TILE_INPUT<CONFIG>;
    static constexpr int CHUNKS = chunks_of<T>(TILE_INPUT<CONFIG>);
    using Chunks = uint4[ROWS][CHUNKS];

    Chunks& chunks;
    const T* plane;
    int height;
    int width;
    int first_row;  // of the plane; may lie outside of it, like first_column
    int first_column;
    int rows;  // that are needed, like columns
    int columns;

    // Of the tile's first sample in a row: its distance, in elements, from some multiple of 16 bytes.
    __device__ __forceinline__ unsigned int phase(int row) const {
        return misalignment() + static_cast<unsigned int>(first_row + row) * static_cast<unsigned int>(width) +
               static_cast<unsigned int>(first_column);
    }

    // Starts to copy the rows, with zeros for those outside of the plane. `before` and `after` are numbers of elements
    // that may be read on both sides of the plane. A thread copies one chunk of every row that is its turn.
    __device__ __forceinline__ void fill(int before, int after) const {
        constexpr int STEP = TILE_THREADS / CHUNKS;
        const int thread = threadIdx.y * TILE_LANES + threadIdx.x;
        const int chunk = thread % CHUNKS;
        if (thread >= STEP * CHUNKS || chunk >= chunks_of<T>(min(columns, max(width - first_column, 0)))) {
            return;
        }
        const T* readable = plane - before;
        const int end = before + height * width + after;
        const unsigned int whole = max(end - VECTOR<T> + 1, 0);  // where a whole chunk may begin
        const unsigned int from = before + chunk * VECTOR<T> - misalignment();
        uint4* target = &chunks[thread / CHUNKS][chunk];
#pragma unroll 1
        for (int row = thread / CHUNKS; row < rows; row += STEP, target += STEP * CHUNKS) {
            const unsigned int offset = (phase(row) & -VECTOR<T>) + from;
            const bool inside = static_cast<unsigned int>(first_row + row) < static_cast<unsigned int>(height);
            if (!inside || offset < whole) {
                copy_async(target, readable + static_cast<int>(offset), inside);
            } else {
                copy_what_is_there(*target, readable, static_cast<int>(offset), end);
            }
        }
    }

    // Puts zeros in the place of columns outside of the plane, once they have been copied. Returns whether there are
    // any; the same for all threads of the block.
    __device__ __forceinline__ bool clear_edges() const {
        const int left = min(max(-first_column, 0), columns);
        const int right = min(max(width - first_column, 0), columns);
        if (left == 0 && right == columns) {
            return false;
        }
#pragma unroll 1
        for (int row = threadIdx.y * TILE_LANES + threadIdx.x; row < rows; row += TILE_THREADS) {
            T* samples = reinterpret_cast<T*>(chunks[row]) + (phase(row) & (VECTOR<T> - 1));
#pragma unroll 1
            for (int column = 0; column < left; ++column) {
                round_to(0.0f, samples[column]);
            }
#pragma unroll 1
            for (int column = right; column < columns; ++column) {
                round_to(0.0f, samples[column]);
            }
        }
        return true;
    }

private:
    __device__ __forceinline__ unsigned int misalignment() const {
        return static_cast<unsigned int>(reinterpret_cast<size_t>(plane) / sizeof(T)) & (VECTOR<T> - 1);
    }

    // A chunk that the tensor does not hold all of: of `readable`, elements 0 to `end` are there.
    __device__ __forceinline__ void copy_what_is_there(uint4& chunk, const T* readable, int offset, int end) const {
        typename Pack<T, 1>::Word items[VECTOR<T>];
#pragma unroll
        for (int k = 0; k < VECTOR<T>; ++k) {
            items[k] = 0;
            if (offset + k >= 0 && offset + k < end) {
                items[k] = load_pack<1>(readable + (offset + k)).word;
            }
        }
        memcpy(&chunk, items, sizeof(chunk));
    }
};

// Reads COUNT adjacent elements of shared memory. `row` is at a multiple of 4 bytes; the first of them is that many
// elements behind it.
template <int COUNT>
__device__ __forceinline__ void read_samples(const float* row, unsigned int first, float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = row[first + i];
    }
}

// By words of two.
template <int COUNT, typename T>
__device__ __forceinline__ void read_samples(const T* row, unsigned int first, float (&values)[COUNT]) {
    constexpr int WORDS = COUNT / 2 + 1;
    const unsigned int* words = reinterpret_cast<const unsigned int*>(row + (first & ~1u));
    const unsigned int bits = (first & 1) * 16;
    unsigned int read[WORDS + 1];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        read[i] = words[i];
    }
    read[WORDS] = 0;
    T items[2 * WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        read[i] = __funnelshift_r(read[i], read[i + 1], bits);
    }
    memcpy(items, read, sizeof(items));
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = to_float(items[i]);
    }
}

// Applies the epilogue to a lane's four columns of a strip, row by row, and stores them. WHOLE: all of them are in the
// plane, and four may be moved by one access.
template <typename T, int FACTORS, bool WHOLE>
class StripWriter {
public:
    // y and noise: of the strip's first row and the lane's first column. rows, columns: from there to the plane's end.
    __device__ __forceinline__ StripWriter(const Epilogue<FACTORS>& epilogue, const T* noise, T* y, int width, int rows,
                                           int columns, bool in_fours)
        : epilogue_(epilogue),
          noise_(noise),
          y_(y),
          width_(width),
          rows_(rows),
          columns_(columns),
          in_fours_(in_fours && columns >= COLUMNS_PER_LANE) {
#pragma unroll
        for (int row = 0; row < NOISE_AHEAD; ++row) {
            ahead_[row] = load_noise(row);
        }
    }

    // What to add a row of filtered samples to, once they are multiplied by `factor`.
    __device__ __forceinline__ void begin(int row, float (&sums)[COLUMNS_PER_LANE]) {
        unpack(ahead_[row % NOISE_AHEAD], sums);
        if (row + NOISE_AHEAD < STRIP_ROWS) {
            ahead_[row % NOISE_AHEAD] = load_noise(row + NOISE_AHEAD);
        }
#pragma unroll
        for (int c = 0; c < COLUMNS_PER_LANE; ++c) {
            sums[c] = epilogue_.offset(sums[c]);
        }
    }

    __device__ __forceinline__ float factor() const { return epilogue_.factor(); }

    __device__ __forceinline__ void store(int row, float (&sums)[COLUMNS_PER_LANE]) const {
        if (!WHOLE && (row >= rows_ || columns_ <= 0)) {
            return;
        }
#pragma unroll
        for (int c = 0; c < COLUMNS_PER_LANE; ++c) {
            sums[c] = epilogue_.activate(sums[c]);
        }
        T* address = y_ + row * width_;
        if (WHOLE || in_fours_) {
            store_pack<COLUMNS_PER_LANE>(address, round_pack<T>(sums));
            return;
        }
#pragma unroll
        for (int c = 0; c < COLUMNS_PER_LANE; ++c) {
            const float single[1] = {sums[c]};
            if (c < columns_) {
                store_pack<1>(address + c, round_pack<T>(single));
            }
        }
    }

private:
    using Noise = Pack<T, COLUMNS_PER_LANE>;

    __device__ __forceinline__ Noise load_noise(int row) const {
        Noise noise{};
        if constexpr ((FACTORS & NOISE) != 0) {
            const T* address = noise_ + row * width_;
            if (WHOLE || (row < rows_ && in_fours_)) {
                return load_pack<COLUMNS_PER_LANE>(address);
            }
            typename Pack<T, 1>::Word items[COLUMNS_PER_LANE] = {};
#pragma unroll
            for (int c = 0; c < COLUMNS_PER_LANE; ++c) {
                if (row < rows_ && c < columns_) {
                    items[c] = load_pack<1>(address + c).word;
                }
            }
            memcpy(&noise.word, items, sizeof(items));
        }
        return noise;
    }

    Epilogue<FACTORS> epilogue_;
    const T* noise_;
    T* y_;
    int width_;
    int rows_;
    int columns_;
    bool in_fours_;
    Noise ahead_[NOISE_AHEAD];
};

// Filters the rows of a strip; `tile_row` is the first that it needs of the tile.
template <typename T, typename Writer>
__device__ __forceinline__ void filter_strip(const Tile<T, BLUR>& tile, const SeparableTaps& taps, Writer writer,
                                             int tile_row) {
    float vertical[TAPS];
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
        vertical[t] = taps.vertical[t] * writer.factor();
    }
    const uint4* chunks = tile.chunks[tile_row];
    unsigned int phase = tile.phase(tile_row);
    float rows[TAPS][COLUMNS_PER_LANE];
#pragma unroll
    for (int i = 0; i < STRIP_ROWS + TAPS - 1; ++i) {
        float samples[COLUMNS_PER_LANE + TAPS - 1];
        read_samples(reinterpret_cast<const T*>(chunks + i * tile.CHUNKS) + COLUMNS_PER_LANE * threadIdx.x,
                     phase & (VECTOR<T> - 1), samples);
        phase += tile.width;
#pragma unroll
        for (int c = 0; c < COLUMNS_PER_LANE; ++c) {
            rows[i % TAPS][c] = samples[c] * taps.horizontal[0];
#pragma unroll
            for (int t = 1; t < TAPS; ++t) {
                rows[i % TAPS][c] = fmaf(samples[c + t], taps.horizontal[t], rows[i % TAPS][c]);
            }
        }
        if (i >= TAPS - 1) {
            float sums[COLUMNS_PER_LANE];
            writer.begin(i - (TAPS - 1), sums);
#pragma unroll
            for (int c = 0; c < COLUMNS_PER_LANE; ++c) {
#pragma unroll
                for (int t = 0; t < TAPS; ++t) {
                    sums[c] = fmaf(rows[(i + 1 + t) % TAPS][c], vertical[t], sums[c]);
                }
            }
            writer.store(i - (TAPS - 1), sums);
        }
    }
}

// Each input row and column gives two: the even ones are taps 0 and 2 of samples j - 1 and j, the odd ones taps 1 and 3
// of j and j + 1.
template <typename T, typename Writer>
__device__ __forceinline__ void filter_strip(const Tile<T, SKIP_UPSAMPLE>& tile, const SeparableTaps& taps,
                                             Writer writer, int tile_row) {
    float vertical[TAPS];
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
        vertical[t] = taps.vertical[t] * writer.factor();
    }
    const uint4* chunks = tile.chunks[tile_row];
    unsigned int phase = tile.phase(tile_row);
    float rows[3][COLUMNS_PER_LANE];
#pragma unroll
    for (int i = 0; i < STRIP_ROWS / 2 + 2; ++i) {
        float samples[COLUMNS_PER_LANE / 2 + 2];
        read_samples(reinterpret_cast<const T*>(chunks + i * tile.CHUNKS) + COLUMNS_PER_LANE / 2 * threadIdx.x,
                     phase & (VECTOR<T> - 1), samples);
        phase += tile.width;
#pragma unroll
        for (int c = 0; c < COLUMNS_PER_LANE; ++c) {
            const int j = (c + 1) / 2;
            rows[i % 3][c] = samples[j] * taps.horizontal[c % 2] + samples[j + 1] * taps.horizontal[c % 2 + 2];
        }
#pragma unroll
        for (int odd = 0; odd < 2 && i >= 2; ++odd) {
            const int row = 2 * (i - 2) + odd;
            float sums[COLUMNS_PER_LANE];
            writer.begin(row, sums);
#pragma unroll
            for (int c = 0; c < COLUMNS_PER_LANE; ++c) {
                sums[c] = fmaf(rows[(i + 1 + odd) % 3][c], vertical[odd], sums[c]);
                sums[c] = fmaf(rows[(i + 2 + odd) % 3][c], vertical[odd + 2], sums[c]);
            }
            writer.store(row, sums);
        }
    }
}

template <typename T, int FACTORS>
__device__ __forceinline__ void gather_plane(const T* x_plane, const EpilogueInputs<T>& inputs, const Filtering& f,
                                             T* y_plane, int first_row, int first_column) {
    const Epilogue<FACTORS> epilogue(inputs, blockIdx.z, static_cast<int>(blockIdx.z) % f.channels);
    for (int row = first_row; row < min(first_row + STRIP_ROWS, f.out_height); ++row) {
        for (int column = first_column; column < min(first_column + COLUMNS_PER_LANE, f.out_width); ++column) {
            float sums[1], noise[1] = {};
            gather(x_plane, 1, f, row, column, sums);
            if constexpr ((FACTORS & NOISE) != 0) {
                unpack(load_pack<1>(inputs.noise + (row * f.out_width + column)), noise);
            }
            const float values[1] = {epilogue(sums[0], noise[0])};
            store_pack<1>(y_plane + (row * f.out_width + column), round_pack<T>(values));
        }
    }
}

template <typename T, int CONFIG, int FACTORS>
__device__ __forceinline__ void filter_plane(const T* x, const EpilogueInputs<T>& inputs, const Filtering& f, T* y) {
    const int plane = blockIdx.z;
    const int tile_top = blockIdx.y * TILE_HEIGHT;
    const int tile_left = blockIdx.x * TILE_WIDTH;
    const int first_row = tile_top + threadIdx.y * STRIP_ROWS;
    const int column = tile_left + COLUMNS_PER_LANE * threadIdx.x;
    const int pixels = f.in_height * f.in_width;
    const T* x_plane = x + static_cast<long long>(plane) * pixels;
    T* y_plane = y + static_cast<long long>(plane) * f.out_height * f.out_width;
    if constexpr (CONFIG == GENERAL) {
        gather_plane<T, FACTORS>(x_plane, inputs, f, y_plane, first_row, column);
    } else {
        __shared__ typename Tile<T, CONFIG>::Chunks chunks;
        __shared__ SeparableTaps shared_taps;
        const int out_rows = min(TILE_HEIGHT, f.out_height - tile_top);
        const int out_columns = min(TILE_WIDTH, f.out_width - tile_left);
        const Tile<T, CONFIG> tile{chunks,
                                   x_plane,
                                   f.in_height,
                                   f.in_width,
                                   CONFIG == BLUR ? tile_top - f.pad_top : tile_top / 2 - 1,
                                   CONFIG == BLUR ? tile_left - f.pad_left : tile_left / 2 - 1,
                                   input_of<CONFIG>(out_rows),
                                   input_of<CONFIG>(out_columns)};
        // The first and the last plane have nothing beside them.
        const long long after = static_cast<long long>(f.batch * f.channels - 1 - plane) * pixels;
        tile.fill(static_cast<int>(min(static_cast<long long>(plane) * pixels, static_cast<long long>(VECTOR<T> - 1))),
                  static_cast<int>(min(after, static_cast<long long>(VECTOR<T> - 1))));
        close_copies();
        find_taps(f.filter, shared_taps, threadIdx.y * TILE_LANES + threadIdx.x);
        const Epilogue<FACTORS> epilogue(inputs, plane, plane % f.channels);
        const bool in_fours = f.out_width % COLUMNS_PER_LANE == 0 && is_aligned(y, COLUMNS_PER_LANE * sizeof(T)) &&
                              (!(FACTORS & NOISE) || is_aligned(inputs.noise, COLUMNS_PER_LANE * sizeof(T)));
        const auto work = [&](auto whole) {
            const int offset = first_row * f.out_width + column;
            StripWriter<T, FACTORS, decltype(whole)::VALUE> writer(epilogue, inputs.noise + offset, y_plane + offset,
                                                                   f.out_width, f.out_height - first_row,
                                                                   f.out_width - column, in_fours);
            wait_for_copies<0>();
            __syncthreads();
            if (tile.clear_edges()) {
                __syncthreads();
            }
            if (first_row < f.out_height) {
                filter_strip(tile, shared_taps, writer, threadIdx.y * (CONFIG == BLUR ? STRIP_ROWS : STRIP_ROWS / 2));
            }
        };
        if (in_fours && out_rows == TILE_HEIGHT && out_columns == TILE_WIDTH) {
            work(Is<true>{});
        } else {
            work(Is<false>{});
        }
    }
}
