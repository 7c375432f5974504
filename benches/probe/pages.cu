// The page loop of paged_attn alone: slabs that lie in shared memory already, attended to over and over. Clocks a
// slab of one sub-partition (a quarter of an SM), to be held against the clocks in which DRAM brings a slab.
#include "probe.cuh"
#include "common/attend.cuh"

namespace probe {
namespace {
using namespace kvw;
constexpr int D = 128, WARPS = 4, TURNS = 256; // a CTA's warps, and turns of the loop

// Slabs a warp holds: two in turn, so that no load leaves the loop; an f16 slab is four steps anyway.
template <int FORMAT> constexpr int HELD = FORMAT == KVW_SLAB_F16 ? 1 : 2;

// Eight columns of small numbers.
struct Columns {
    PRIM float2 operator()(int, int j) const {
        int lane = threadIdx.x % 32;
        return make_float2(0.03125f * float((lane * 7 + j * 5) % 33 - 16), 0.0625f * float((lane + j) % 17 - 8));
    }
};

// Word i of a slab: any codes; scales and minima of 0.1 and the like, steps of 0.01; no NaN of e4m3.
template <int FORMAT, int GROUP> PRIM uint32_t word(int i, uint32_t x) {
    using S = Slab<FORMAT, D, GROUP>;
    if (S::TWO_LEVEL && 4 * i >= S::STEPS && 4 * i < S::STEPS + STEPS_BYTES) return __float_as_uint(0.01f);
    if (FORMAT == KVW_SLAB_FP8) return x & 0x77777777u;
    bool meta = S::QUANTISED && ((4 * i >= S::K_META && 4 * i < S::V_CODES) || 4 * i >= S::V_META);
    bool halves = FORMAT == KVW_SLAB_F16 || (meta && !S::TWO_LEVEL);
    return halves ? (x >> 7 & 0x80FF80FFu) | 0x2C002C00u : x;
}

template <int FORMAT, int GROUP> PRIM void make_slab(unsigned char* slab, uint32_t seed) {
    for (int i = threadIdx.x % 32; i < Slab<FORMAT, D, GROUP>::BYTES / 4; i += 32) {
        uint32_t x = (seed + uint32_t(i)) * 0x9E3779B9u;
        reinterpret_cast<uint32_t*>(slab)[i] = word<FORMAT, GROUP>(i, x ^ x >> 15);
    }
}

template <int FORMAT, int GROUP, int CTAS>
__global__ void __launch_bounds__(WARPS * 32, CTAS) page_loop(long long* clocks, float* out) {
    constexpr int BYTES = Slab<FORMAT, D, GROUP>::BYTES, V = Slab<FORMAT, D, GROUP>::V_CODES;
    constexpr int TILES = FORMAT == KVW_SLAB_F16 ? 1 : 4, STEPS = 4 / TILES; // as paged_attn takes them
    extern __shared__ __align__(128) unsigned char raw[];
    int warp = threadIdx.x / 32;
    unsigned char* mine = raw + size_t(warp) * HELD<FORMAT> * BYTES;
    for (int i = 0; i < HELD<FORMAT>; i++) make_slab<FORMAT, GROUP>(mine + i * BYTES, blockIdx.x * 977 + warp * 131 + i);
    Attend<D, GROUP, 1> a;
    a.begin(Columns{}, 0.09f, nullptr, true);
    a.use_format(FORMAT);
    __syncthreads();
    long long start = clock64();
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn++) {
        const unsigned char* slab = mine + turn % HELD<FORMAT> * BYTES;
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
            const unsigned char* at = slab + step * (TILES * 32 * D) * (STEPS > 1);
            a.template step<FORMAT, TILES>(at, at + V, false, [](auto&, float) {});
        }
    }
    __syncthreads();
    long long end = clock64();
    a.use_format(KVW_SLAB_F16);
    a.store(out + (size_t(blockIdx.x) * WARPS + warp) * 8 * (D + ROW_EXTRA));
    if (threadIdx.x == 0) clocks[blockIdx.x] = end - start;
}

template <int FORMAT, int GROUP, int CTAS>
bool page(const Card& card, Report& report, const char* name) {
    auto kernel = page_loop<FORMAT, GROUP, CTAS>;
    size_t shared = size_t(WARPS) * HELD<FORMAT> * Slab<FORMAT, D, GROUP>::BYTES;
    if (shared > card.properties.sharedMemPerBlockOptin) return true; // not on this card
    int blocks = card.sms * CTAS, resident = 0;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, WARPS * 32, shared));
    if (resident < CTAS) return true;
    Memory<long long> clocks{size_t(blocks)};
    Memory<float> out{size_t(blocks) * WARPS * 8 * (D + ROW_EXTRA)};
    CHECK(cudaMemset(out.p, 0, out.n * sizeof(float))); // rows have padding
    std::vector<double> all;
    for (int repeat = 0; repeat < 12; repeat++) {
        kernel<<<blocks, WARPS * 32, shared>>>(clocks.p, out.p);
        CHECK(cudaGetLastError());
        CHECK(cudaDeviceSynchronize());
        auto spent = clocks.host();
        std::nth_element(spent.begin(), spent.begin() + blocks / 2, spent.end());
        if (repeat > 1) all.push_back(double(spent[size_t(blocks) / 2]) / (double(TURNS) * CTAS));
    }
    report.row("page", std::string(name) + "; " + std::to_string(WARPS * CTAS) + " warps an SM", all, "clk/slab");
    bool finite = true;
    for (float x : out.host()) finite &= x == x && x - x == 0.f;
    return finite;
}

template <int FORMAT, int GROUP> bool format(const Card& card, Report& report, const char* name) {
    bool finite = page<FORMAT, GROUP, 1>(card, report, name);
    finite &= page<FORMAT, GROUP, 2>(card, report, name);
    finite &= page<FORMAT, GROUP, 3>(card, report, name);
    return finite & page<FORMAT, GROUP, 4>(card, report, name);
}
} // namespace

void pages(const Card& card, Report& report) {
    bool finite = format<KVW_SLAB_Q2, 32>(card, report, "q2 group 32");
    finite &= format<KVW_SLAB_Q2, 64>(card, report, "q2 group 64");
    finite &= format<KVW_SLAB_Q2, 128>(card, report, "q2 group 128");
    finite &= format<KVW_SLAB_Q2, 32 + U8_META>(card, report, "q2 group 32, 8-bit metadata");
    finite &= format<KVW_SLAB_FP8, 32>(card, report, "fp8");
    finite &= format<KVW_SLAB_Q4, 32>(card, report, "q4 group 32");
    finite &= format<KVW_SLAB_Q8, 32>(card, report, "q8 group 32");
    finite &= format<KVW_SLAB_F16, 32>(card, report, "f16");
    report.expect("page", "every output is finite", finite);
}
} // namespace probe
