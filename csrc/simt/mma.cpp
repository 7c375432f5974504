// mma.cpp - ldmatrix, movmatrix and mma.m16n8k16 with the operand layouts of the PTX ISA.
//
// With g = lane / 4 and t = 2 * (lane % 4), a register holding elements t and t + 1 of a row:
//   A 16x16  a0 (g, t)  a1 (g+8, t)  a2 (g, t+8)  a3 (g+8, t+8)
//   B 16x8   b0 (k = t, n = g)  b1 (k = t+8, n = g)
//   C 16x8   c0 c1 (g, t)  c2 c3 (g+8, t)
//   8x8 matrices of ldmatrix and movmatrix: (g, t), or (t, g) and (t+1, g) with .trans
// Products of f16 and bf16 are exact, subnormals included. How tensor cores round the sum is not documented;
// three ways are offered and no result may depend on which.
#include "internal.h"
#include "half.h"
#include <algorithm>

namespace simt {

static thread_local int mma_mode = MMA_EXACT;
void set_mma_mode(int mode) { mma_mode = mode; }

static void whole_warp(uint32_t mask, const char* name) {
    if (mask != ~0u) fail("%s needs the whole warp, mask %08x", name, mask);
}

// Rows whose 16 bytes share the four banks of another row of the same matrix.
static unsigned conflicts(const uint16_t* const (&row)[8]) {
    unsigned banks[8] = {}, extra = 0;
    for (const uint16_t* r : row) extra += banks[uintptr_t(r) >> 4 & 7]++ > 0;
    return extra;
}

// Lane i gives the address of row i % 8 of matrix i / 8.
void ldmatrix_op(uint32_t mask, const void* const* in, void* const* out, uint64_t attribute) {
    whole_warp(mask, "ldmatrix");
    unsigned matrices = attribute & 7;
    for (unsigned m = 0; m < matrices; m++) {
        const uint16_t* row[8];
        for (unsigned r = 0; r < 8; r++) {
            row[r] = *static_cast<const uint16_t* const*>(in[m * 8 + r]);
            if (uintptr_t(row[r]) & 15)
                fail("misaligned ldmatrix: row %u of matrix %u is not 16-byte aligned", r, m);
        }
        runner->report.ldmatrix_conflicts += conflicts(row);
        for (unsigned lane = 0; lane < 32; lane++) {
            unsigned g = lane / 4, t = lane % 4 * 2;
            bool trans = attribute & LDMATRIX_TRANS;
            uint32_t low = trans ? row[t][g] : row[g][t], high = trans ? row[t + 1][g] : row[g][t + 1];
            static_cast<uint32_t*>(out[lane])[m] = low | high << 16;
        }
    }
}

void movmatrix_op(uint32_t mask, const void* const* in, void* const* out, uint64_t) {
    whole_warp(mask, "movmatrix");
    uint16_t matrix[8][8];
    for (unsigned lane = 0; lane < 32; lane++) {
        uint32_t v = *static_cast<const uint32_t*>(in[lane]);
        matrix[lane / 4][lane % 4 * 2] = uint16_t(v);
        matrix[lane / 4][lane % 4 * 2 + 1] = uint16_t(v >> 16);
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned g = lane / 4, t = lane % 4 * 2;
        *static_cast<uint32_t*>(out[lane]) = matrix[t][g] | uint32_t(matrix[t + 1][g]) << 16;
    }
}

struct Tile {
    float a[16][16], b[16][8], c[16][8];
};

template <float (*WIDEN)(uint16_t)> static void gather(Tile& tile, const void* const* in) {
    for (unsigned lane = 0; lane < 32; lane++) {
        auto& x = *static_cast<const MmaIn*>(in[lane]);
        unsigned g = lane / 4, t = lane % 4 * 2;
        for (unsigned h = 0; h < 2; h++) {
            for (unsigned i = 0; i < 4; i++)
                tile.a[g + (i & 1) * 8][t + (i >> 1) * 8 + h] = WIDEN(uint16_t(x.a[i] >> 16 * h));
            for (unsigned i = 0; i < 2; i++) tile.b[t + i * 8 + h][g] = WIDEN(uint16_t(x.b[i] >> 16 * h));
        }
        for (unsigned i = 0; i < 4; i++) tile.c[g + (i >> 1) * 8][t + (i & 1)] = x.c[i];
    }
}

// SUM double: one rounding at the end. SUM float: a rounding after every product, in order of k.
template <class SUM> static void multiply(Tile& tile) {
    for (int m = 0; m < 16; m++) {
        SUM sum[8];
        for (int n = 0; n < 8; n++) sum[n] = tile.c[m][n];
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < 8; n++) sum[n] += SUM(tile.a[m][k]) * SUM(tile.b[k][n]);
        }
        for (int n = 0; n < 8; n++) tile.c[m][n] = float(sum[n]);
    }
}

// Aligned to the largest exponent with a few extra bits, truncated, summed, truncated: what tensor cores
// show.
static float truncated_sum(const double (&product)[16], float c) {
    constexpr int KEPT_BITS = 25;
    double largest = std::fabs(double(c)), plain = c;
    for (double p : product) {
        largest = std::max(largest, std::fabs(p));
        plain += p;
    }
    if (largest == 0 || !std::isfinite(plain)) return float(plain);
    int exponent;
    frexp(largest, &exponent);
    double unit = ldexp(1.0, exponent - KEPT_BITS), sum = std::trunc(c / unit);
    for (double p : product) sum += std::trunc(p / unit);
    double value = sum * unit;
    float f = float(value);
    return std::fabs(double(f)) > std::fabs(value) ? nextafterf(f, 0.f) : f;
}

static void multiply_truncated(Tile& tile) {
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 8; n++) {
            double product[16];
            for (int k = 0; k < 16; k++) product[k] = double(tile.a[m][k]) * tile.b[k][n];
            tile.c[m][n] = truncated_sum(product, tile.c[m][n]);
        }
    }
}

template <float (*WIDEN)(uint16_t)> static void mma(uint32_t mask, const void* const* in, void* const* out) {
    whole_warp(mask, "mma.sync");
    runner->report.mma++;
    Tile tile;
    gather<WIDEN>(tile, in);
    if (mma_mode == MMA_F32_IN_ORDER)
        multiply<float>(tile);
    else if (mma_mode == MMA_ALIGNED_TRUNCATED)
        multiply_truncated(tile);
    else
        multiply<double>(tile);
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned g = lane / 4, t = lane % 4 * 2;
        auto* c = static_cast<float*>(out[lane]);
        for (unsigned i = 0; i < 4; i++) c[i] = tile.c[g + (i >> 1) * 8][t + (i & 1)];
    }
}

void mma_f16_op(uint32_t mask, const void* const* in, void* const* out, uint64_t) {
    mma<f16_to_float>(mask, in, out);
}
void mma_bf16_op(uint32_t mask, const void* const* in, void* const* out, uint64_t) {
    mma<bf16_to_float>(mask, in, out);
}

} // namespace simt
