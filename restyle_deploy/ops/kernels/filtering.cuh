// What both memory layouts of upfirdn2d share: sizes, the taps of a separable filter, and the direct sum of any filter.
//
// With u the input after insertion of zeros and padding, and g the flipped filter, y[o] = sum over t of u[o * down + t]
// * g[t].
#pragma once

#include "common.cuh"

// The configurations.
constexpr int GENERAL = 0;        // any up, down, pads and filter
constexpr int BLUR = 1;           // up = down = 1; any pads; a separable filter of 4 x 4
constexpr int SKIP_UPSAMPLE = 2;  // up = 2, down = 1; pad_top = pad_left = 2; a separable filter of 4 x 4

constexpr int TAPS = 4;

struct Filtering {
    const float* filter;  // [filter_height, filter_width]
    int batch;
    int channels;
    int in_height;
    int in_width;
    int out_height;
    int out_width;
    int up;
    int down;
    int pad_top;
    int pad_left;
    int filter_height;
    int filter_width;
};

// A filter of rank 1, flipped in both axes: g[i][j] = vertical[i] * horizontal[j].
struct SeparableTaps {
    float vertical[TAPS];
    float horizontal[TAPS];
};

// Recovers the taps from the row and the column of the filter's largest entry, which is not 0: each of a block's first
// eight threads one of them.
__device__ __forceinline__ void find_taps(const float* filter, SeparableTaps& taps, int thread) {
    if (thread >= 2 * TAPS) {
        return;
    }
    int largest = 0;
    float magnitude = 0.0f;
#pragma unroll
    for (int i = 0; i < TAPS * TAPS; ++i) {
        const float entry = fabsf(__ldg(filter + i));
        largest = entry > magnitude ? i : largest;
        magnitude = fmaxf(entry, magnitude);
    }
    const int flipped = TAPS - 1 - thread % TAPS;
    if (thread < TAPS) {
        taps.horizontal[thread] = __ldg(filter + (largest / TAPS * TAPS + flipped));
    } else {
        taps.vertical[thread - TAPS] = __ldg(filter + (flipped * TAPS + largest % TAPS)) / __ldg(filter + largest);
    }
}

// Where along one axis an output finds its first sample: input[index], met by tap `tap`. The next is index + 1, tap +
// up.
struct Reach {
    int index;
    int tap;

    __device__ __forceinline__ Reach(int output, int up, int down, int pad) {
        const int position = output * down - pad;
        index = position >= 0 ? divide_up(position, up) : -(-position / up);
        tap = index * up - position;
    }
};

// Sums directly, for COUNT adjacent elements per pixel; pixels lie `pixel_stride` elements apart.
template <int COUNT, typename T>
__device__ __forceinline__ void gather(const T* image, long long pixel_stride, const Filtering& f, int row, int column,
                                       float (&sums)[COUNT]) {
    const Reach down_rows(row, f.up, f.down, f.pad_top);
    const Reach along_row(column, f.up, f.down, f.pad_left);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        sums[k] = 0.0f;
    }
    int in_row = down_rows.index;
    for (int i = down_rows.tap; i < f.filter_height; i += f.up, ++in_row) {
        if (in_row < 0 || in_row >= f.in_height) {
            continue;
        }
        const float* filter_row = f.filter + (f.filter_height - 1 - i) * f.filter_width;
        int in_column = along_row.index;
        for (int j = along_row.tap; j < f.filter_width; j += f.up, ++in_column) {
            if (in_column < 0 || in_column >= f.in_width) {
                continue;
            }
            const float tap = __ldg(filter_row + f.filter_width - 1 - j);
            float values[COUNT];
            unpack(load_pack<COUNT>(image + (in_row * f.in_width + in_column) * pixel_stride), values);
#pragma unroll
            for (int k = 0; k < COUNT; ++k) {
                sums[k] = fmaf(values[k], tap, sums[k]);
            }
        }
    }
}
