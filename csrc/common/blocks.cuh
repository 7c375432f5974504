// blocks.cuh - weight matrices in blocks of codes: how the four lanes of a quad read a row of their planes
// (linear.h), and what codes and scales mean. A value is code * scale + offset.
//
// A step is what a quad takes of a row at a time: 128 columns, or the 256 of a block. Lane q holds eight
// columns of every 32 as four half pairs, exact: in pairs (0, 1) and (2, 3) they are the A fragments of two
// mma.m16n8k16, with no exchange between lanes, which is what the order of the planes is for. The columns
// are 8 q .. 8 q + 7; in Q6_K, whose scales cover 16, 4 q .. 4 q + 3 of either half.
#pragma once
#include "codec.cuh"

namespace kvw {

constexpr bool in_blocks(int dtype) { return dtype >= KVW_Q8_0 && dtype <= KVW_Q6_K; }

// Columns and bytes of a block; a dense type's block is an element.
constexpr int block_cols(int dtype) {
    return !in_blocks(dtype) ? 1 : dtype == KVW_Q4_K || dtype == KVW_Q6_K ? 256 : 32;
}

constexpr int block_bytes(int dtype) {
    return dtype == KVW_F32    ? 4
           : !in_blocks(dtype) ? 2
           : dtype == KVW_Q8_0 ? 34
           : dtype == KVW_Q4_0 ? 18
           : dtype == KVW_Q4_1 ? 20
           : dtype == KVW_Q4_K ? 144
                               : 210;
}

constexpr size_t row_bytes(int dtype, int cols) {
    return size_t(cols / block_cols(dtype)) * size_t(block_bytes(dtype));
}

struct Matrix {
    const unsigned char* planes;
    size_t rows;
    int cols;
};

struct Affine {
    float scale, offset;
};

// Both halves the same.
template <uint32_t HALF> constexpr uint32_t TWICE = HALF * 0x00010001u;

constexpr uint32_t MAGIC = TWICE<0x6400>, ONE_F16 = TWICE<0x3C00>, SIXTEENTH = TWICE<0x2C00>; // 1024, 1, 1/16

// (a & MASK) | b in one instruction, which the compiler makes two of where both are constants.
template <uint32_t MASK> PRIM uint32_t masked(uint32_t a, uint32_t b) {
    return prim::lop3<(0xF0 & 0xCC) | 0xAA>(a, MASK, b);
}

// Eight nibbles less BIAS. Below the exponent of 1024 a nibble counts 1 or, four bits up, 16.
template <int BIAS> PRIM void nibbles(uint32_t word, uint32_t (&pairs)[4]) {
    // -1024 - BIAS and -64 - BIAS
    constexpr uint32_t LOW = TWICE<0xE400 + BIAS>, HIGH = TWICE<0xD400 + 16 * BIAS>;
#pragma unroll
    for (int p = 0; p < 4; p += 2) {
        uint32_t w = word >> 4 * p;
        pairs[p] = fma2(masked<0x000F000F>(w, MAGIC), ONE_F16, LOW);
        pairs[p + 1] = fma2(masked<0x00F000F0>(w, MAGIC), SIXTEENTH, HIGH);
    }
}

// What lane q holds of a run of n 32s, WORDS each: 16 bytes where the run is whole.
template <int WORDS> PRIM uint4 run_of(const unsigned char* run, int q, int n) {
    if (n * WORDS == 4 || KVW_FAULT(336)) return prim::ldg128_stream(run + 16 * q);
    const uint32_t* own = reinterpret_cast<const uint32_t*>(run) + q * n * WORDS;
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = i < n * WORDS ? own[i] : 0;
    return make_uint4(w[0], w[1], w[2], w[3]);
}

PRIM float half_float(uint32_t bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }

// Byte i of a word less BIAS, exact: below the exponent of 2^23 an integer counts 1. Conversions have a
// quarter of the rate.
template <int BIAS> PRIM float byte_float(uint32_t word, int i) {
    return __fsub_rn(__uint_as_float(prim::prmt(word, 0x4B000000u, 0x7440u | uint32_t(i))), 8388608.f + BIAS);
}

// Q8_0, Q4_0, Q4_1: blocks of 32, four a step; lane q holds the scale of block q.
template <int DTYPE> struct Step {
    static constexpr int COLS = 128, GROUP = 32, RUNS = DTYPE == KVW_Q8_0 ? 2 : 1;
    static constexpr bool OFFSET = DTYPE == KVW_Q4_1;
    uint4 codes[RUNS];
    uint32_t scale; // d, above it m

    // Zeros past the end of the row, and in a row that is not there.
    PRIM void load(const Matrix& m, size_t row, int step, int q) {
        int n = row < m.rows ? min((m.cols - step * COLS) / 32, 4) : 0;
        size_t a_row = size_t(m.cols) * (DTYPE == KVW_Q8_0 ? 2 : 1) / 2;
        const unsigned char* run = m.planes + row * a_row + size_t(step) * RUNS * 64;
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            constexpr int MOST = 4 / RUNS;
            codes[r] = run_of<RUNS>(run + 64 * r, q, max(min(n - MOST * r, MOST), 0));
        }
        const unsigned char* scales = m.planes + m.rows * a_row;
        size_t at = row * size_t(m.cols / 32) + size_t(step) * 4 + size_t(q);
        if (q >= n) scale = 0;
        else if (OFFSET) scale = reinterpret_cast<const uint32_t*>(scales)[at];
        else scale = reinterpret_cast<const uint16_t*>(scales)[at];
    }

    // The lane's eight codes of 32 number j, less their bias.
    PRIM void pairs(int j, uint32_t (&a)[4]) const {
        if constexpr (DTYPE == KVW_Q8_0) {
#pragma unroll
            for (int p = 0; p < 4; p++) {
                uint32_t word = component(codes[j / 2], j % 2 * 2 + p / 2) ^ 0x80808080u;
                a[p] = fma2(spread<0x64>(word, p % 2), ONE_F16, TWICE<0xE480>); // less 1024 + 128
            }
        } else {
            nibbles<DTYPE == KVW_Q4_0 ? 8 : 0>(component(codes[0], j), a);
        }
    }

    // Of every eight codes' half; all lanes of the warp.
    PRIM Affine affine(int j, int) const {
        uint32_t s = __shfl_sync(~0u, scale, (int(threadIdx.x) & 28) | j);
        return {half_float(s & 0xFFFFu), OFFSET && !KVW_FAULT(337) ? half_float(s >> 16) : 0.f};
    }
};

template <> struct Step<KVW_Q4_K> {
    static constexpr int COLS = 256, GROUP = 32;
    static constexpr bool OFFSET = true;
    uint4 codes[2], head; // d and dmin, then scales and minima of six bits

    PRIM void load(const Matrix& m, size_t row, int step, int q) {
        size_t block = row * size_t(m.cols / COLS) + size_t(step);
        int n = row < m.rows ? 4 : 0;
#pragma unroll
        for (int r = 0; r < 2; r++) codes[r] = run_of<1>(m.planes + block * 128 + 64 * r, q, n);
        const unsigned char* heads = m.planes + m.rows * size_t(m.cols / 2);
        head = n ? prim::ldg128_stream(heads + block * 16) : make_uint4(0, 0, 0, 0);
    }

    PRIM void pairs(int j, uint32_t (&a)[4]) const {
        // Words are chosen, not their addresses: those would put the step into local memory.
        nibbles<0>(j < 4 ? component(codes[0], j % 4) : component(codes[1], j % 4), a);
    }

    // Groups 0 to 3 have a byte each in head.y and head.z, 4 to 7 a nibble each in head.w and the top two
    // bits of those bytes.
    PRIM Affine affine(int j, int) const {
        uint32_t scales = head.y & 0x3F3F3F3Fu, minima = head.z & 0x3F3F3F3Fu;
        if (j >= 4 && !KVW_FAULT(338)) {
            scales = (head.w & 0x0F0F0F0Fu) | (head.y >> 2 & 0x30303030u);
            minima = (head.w >> 4 & 0x0F0F0F0Fu) | (head.z >> 2 & 0x30303030u);
        }
        float s = byte_float<0>(scales, j % 4), min = byte_float<0>(minima, j % 4);
        return {__fmul_rn(half_float(head.x & 0xFFFFu), s), -__fmul_rn(half_float(head.x >> 16), min)};
    }
};

template <> struct Step<KVW_Q6_K> {
    static constexpr int COLS = 256, GROUP = 16;
    static constexpr bool OFFSET = false;
    uint4 low[2], high, scales; // sixteen signed bytes
    uint32_t d;

    PRIM void load(const Matrix& m, size_t row, int step, int q) {
        size_t block = row * size_t(m.cols / COLS) + size_t(step), blocks = m.rows * size_t(m.cols / COLS);
        int n = row < m.rows ? 4 : 0;
#pragma unroll
        for (int r = 0; r < 2; r++) low[r] = run_of<1>(m.planes + block * 128 + 64 * r, q, n);
        high = run_of<1>(m.planes + blocks * 128 + block * 64, q, n);
        scales = n ? prim::ldg128_stream(m.planes + blocks * 192 + block * 16) : make_uint4(0, 0, 0, 0);
        d = n ? reinterpret_cast<const uint16_t*>(m.planes + blocks * 208)[block] : 0;
    }

    PRIM void pairs(int j, uint32_t (&a)[4]) const {
        uint32_t word = component(j < 4 ? low[0] : low[1], j % 4), top = component(high, j / 2);
#pragma unroll
        for (int p = 0; p < 4; p++) {
            int up = 4 - 2 * p - (KVW_FAULT(339) ? 0 : j % 2 * 8); // to bits 4 and 20
            uint32_t code = masked<0x00300030>(up > 0 ? top << up : top >> -up, MAGIC);
            a[p] = fma2(masked<0x000F000F>(word >> 4 * p, code), ONE_F16, TWICE<0xE420>); // less 1024 + 32
        }
    }

    PRIM Affine affine(int j, int half) const {
        uint32_t word = component(scales, j / 2) ^ 0x80808080u;
        return {__fmul_rn(half_float(d), byte_float<128>(word, j % 2 * 2 + half)), 0.f};
    }
};

// First of the four columns, of every 32, that lane q holds in pairs 0 and 1 (half 0) or 2 and 3 (half 1).
template <class Step> PRIM int first_column(int q, int half) {
    return Step::GROUP == 32 ? 8 * q + 4 * half : 16 * half + 4 * q;
}

} // namespace kvw
