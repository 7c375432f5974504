// Are subnormal f16 operands of mma.m16n8k16 exact, and as fast as normal ones? And what the pipes issue.
//
// Rates are clocks per warp instruction of one sub-partition (a quarter of an SM): CTAs of 4 * W warps, one an
// SM, put W warps on each; clocks * 1 / (instructions * W).
#include "probe.cuh"
#include "common/prim.cuh"
#include <cmath>

namespace probe {
namespace {

// One warp: A holds mantissas base + 0 .. 255 as halves 0x0000 | m, B column n is 2^n in row n, so that
// c[row][n] = A[row][n] 2^n; eight launches of different rows of B would give the rest: here B's rows move on.
__global__ void products(uint32_t base, int shift, float* out) {
    int lane = threadIdx.x, r = lane / 4, t = lane % 4;
    auto mantissa = [&](int row, int k) { return (base + uint32_t(row * 16 + k)) & 0x3FFu; };
    auto pair = [&](int row, int k) { return mantissa(row, k) | mantissa(row, k + 1) << 16; };
    uint32_t a[4] = {pair(r, 2 * t), pair(r + 8, 2 * t), pair(r, 2 * t + 8), pair(r + 8, 2 * t + 8)};
    auto b = [&](int k) { return uint32_t(__half_as_ushort(__float2half(k % 8 == r && k / 8 == shift ? ldexpf(1.f, k % 8) : 0.f))); };
    uint32_t b0 = b(2 * t) | b(2 * t + 1) << 16, b1 = b(2 * t + 8) | b(2 * t + 9) << 16;
    float c[4] = {};
    prim::mma_16816<__half>(c, a, b0, b1);
    float* tile = out + shift * 128;
    tile[r * 8 + 2 * t] = c[0], tile[r * 8 + 2 * t + 1] = c[1];
    tile[(r + 8) * 8 + 2 * t] = c[2], tile[(r + 8) * 8 + 2 * t + 1] = c[3];
}

// Sums of 16 products of subnormals and large multipliers, against integers.
__global__ void sums(uint32_t base, float* out) {
    int lane = threadIdx.x, r = lane / 4, t = lane % 4;
    auto mantissa = [&](int row, int k) { return (base + uint32_t(row * 37 + k * 61)) & 0x3FFu; };
    auto pair = [&](int row, int k) { return mantissa(row, k) | mantissa(row, k + 1) << 16; };
    uint32_t a[4] = {pair(r, 2 * t), pair(r + 8, 2 * t), pair(r, 2 * t + 8), pair(r + 8, 2 * t + 8)};
    auto b = [&](int k) { return uint32_t(__half_as_ushort(__int2half_rn((k * 5 + r * 3) % 31 - 15))); };
    float c[4] = {};
    prim::mma_16816<__half>(c, a, b(2 * t) | b(2 * t + 1) << 16, b(2 * t + 8) | b(2 * t + 9) << 16);
    out[r * 8 + 2 * t] = c[0], out[r * 8 + 2 * t + 1] = c[1];
    out[(r + 8) * 8 + 2 * t] = c[2], out[(r + 8) * 8 + 2 * t + 1] = c[3];
}

enum Op { MMA, LOP3, HMUL2, EX2, MOVMATRIX, SHFL };
constexpr int CHAINS = 4, TURNS = 256;

template <Op OP> __global__ void __launch_bounds__(1024) issue(uint32_t seed, long long* clocks, uint32_t* out) {
    uint32_t x[CHAINS], a[4] = {seed, seed ^ 0x10001u, seed, seed};
    float c[CHAINS][4] = {}, f[CHAINS];
    const __half2 factor = __float2half2_rn(__uint_as_float(seed | 0x3F800000u));
    __half2 h[CHAINS];
    for (int i = 0; i < CHAINS; i++) {
        x[i] = seed + threadIdx.x * (i + 1), f[i] = 0.25f * float(i);
        h[i] = __floats2half2_rn(f[i], 1.f);
    }
    __syncthreads();
    long long start = clock64();
#pragma unroll 4
    for (int turn = 0; turn < TURNS; turn++) {
#pragma unroll
        for (int i = 0; i < CHAINS; i++) {
            if (OP == MMA) prim::mma_16816<__half>(c[i], a, 0x3C003C00u, 0x3C003C00u);
            if (OP == LOP3) x[i] = prim::lop3<0x6A>(x[i], a[0], a[1]);
            if (OP == HMUL2) h[i] = __hmul2(h[i], factor);
            if (OP == EX2) f[i] = prim::exp2_approx(f[i]);
            if (OP == MOVMATRIX) x[i] = prim::movmatrix_trans(x[i]);
            if (OP == SHFL) x[i] = __shfl_xor_sync(~0u, x[i], 1);
        }
    }
    __syncthreads();
    long long end = clock64();
    uint32_t sum = 0;
    for (int i = 0; i < CHAINS; i++) sum ^= x[i] ^ __float_as_uint(f[i] + __low2float(h[i]) + __high2float(h[i]) + c[i][0] + c[i][3]);
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
}

// Clocks per instruction and sub-partition, one value a repeat: the median CTA.
template <Op OP> std::vector<double> clocks(const Card& card, int warps, uint32_t seed) {
    Memory<long long> spent(size_t(card.sms));
    Memory<uint32_t> out(size_t(card.sms) * 1024);
    std::vector<double> all;
    for (int repeat = 0; repeat < 12; repeat++) {
        issue<OP><<<card.sms, warps * 4 * 32>>>(seed, spent.p, out.p);
        CHECK(cudaGetLastError());
        CHECK(cudaDeviceSynchronize());
        auto host = spent.host();
        std::nth_element(host.begin(), host.begin() + host.size() / 2, host.end());
        if (repeat > 1) all.push_back(double(host[host.size() / 2]) / (double(CHAINS) * TURNS * warps));
    }
    return all;
}

std::string on(const char* name, int warps) {
    return std::string(name) + "; " + std::to_string(warps) + " warps a sub-partition";
}
} // namespace

void subnormals(const Card& card, Report& report) {
    Memory<float> out(256);
    bool exact = true, exact_sums = true;
    for (uint32_t base = 0; base < 1024; base += 64) {
        for (int shift = 0; shift < 2; shift++) products<<<1, 32>>>(base, shift, out.p);
        CHECK(cudaGetLastError());
        auto got = out.host();
        for (int shift = 0; shift < 2; shift++) {
            for (int row = 0; row < 16; row++) {
                for (int n = 0; n < 8; n++) {
                    double code = double((base + uint32_t(row * 16 + shift * 8 + n)) & 0x3FFu);
                    exact &= double(got[size_t(shift * 128 + row * 8 + n)]) == ldexp(code, n - 24);
                }
            }
        }
        sums<<<1, 32>>>(base, out.p);
        CHECK(cudaGetLastError());
        got = out.host();
        for (int row = 0; row < 16; row++) {
            for (int n = 0; n < 8; n++) {
                long sum = 0;
                for (int k = 0; k < 16; k++)
                    sum += long((base + uint32_t(row * 37 + k * 61)) & 0x3FFu) * ((k * 5 + n * 3) % 31 - 15);
                exact_sums &= double(got[size_t(row * 8 + n)]) == ldexp(double(sum), -24);
            }
        }
    }
    report.expect("mma", "1024 subnormal f16 operands are exact", exact);
    report.expect("mma", "sums of 16 subnormal products are exact", exact_sums);
    for (int warps : {1, 2, 4}) {
        report.row("mma", on("m16n8k16 f16 zeros", warps), clocks<MMA>(card, warps, 0), "clk");
        report.row("mma", on("m16n8k16 f16 subnormals", warps), clocks<MMA>(card, warps, 0x02FF0155u), "clk");
        report.row("mma", on("m16n8k16 f16 normals", warps), clocks<MMA>(card, warps, 0x3A552EFFu), "clk");
    }
}

void rates(const Card& card, Report& report) {
    for (int warps : {1, 4}) {
        report.row("rate", on("lop3", warps), clocks<LOP3>(card, warps, 0x02FF0155u), "clk");
        report.row("rate", on("mul.f16x2", warps), clocks<HMUL2>(card, warps, 0x3C003C00u), "clk");
        report.row("rate", on("ex2.approx", warps), clocks<EX2>(card, warps, 1), "clk");
        report.row("rate", on("movmatrix", warps), clocks<MOVMATRIX>(card, warps, 1), "clk");
        report.row("rate", on("shfl", warps), clocks<SHFL>(card, warps, 1), "clk");
    }
}
} // namespace probe
