// The ceilings: a device-to-device copy (bytes read plus bytes written), and a plain linear read.
#include "probe.cuh"
#include "common/prim.cuh"

namespace probe {
namespace {
__global__ void __launch_bounds__(512) linear_read(const uint4* from, size_t units, uint32_t* out) {
    constexpr int DEEP = 8; // loads in flight a thread
    uint32_t sum = 0;
    size_t stride = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < units; i += DEEP * stride) {
        uint4 v[DEEP];
#pragma unroll
        for (int j = 0; j < DEEP; j++)
            v[j] = i + j * stride < units ? prim::ldg128_stream(from + i + j * stride) : uint4{};
#pragma unroll
        for (int j = 0; j < DEEP; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x12345678u) out[0] = sum; // never, but the compiler cannot know
}
} // namespace

void bandwidth(const Card& card, Report& report) {
    Timer timer;
    for (size_t mb : {64, 256, 2048}) {
        size_t bytes = mb << 20;
        Memory<unsigned char> from(bytes), to(bytes);
        Memory<uint32_t> out(1);
        CHECK(cudaMemset(from.p, 0x5A, bytes));
        auto copy = timer.many(20, nullptr, [&] {
            CHECK(cudaMemcpyAsync(to.p, from.p, bytes, cudaMemcpyDeviceToDevice, nullptr));
        });
        report.row("bandwidth", "copy of " + std::to_string(mb) + " MiB", rate(copy, 2.0 * double(bytes)), "GB/s");
        for (int ctas : {1, 2, 4}) {
            auto read = timer.many(20, nullptr, [&] {
                linear_read<<<card.sms * ctas, 512>>>(reinterpret_cast<const uint4*>(from.p), bytes / 16, out.p);
            });
            std::string name = "linear read of " + std::to_string(mb) + " MiB; " + std::to_string(ctas) + " CTAs an SM";
            report.row("bandwidth", name, rate(read, double(bytes)), "GB/s");
        }
    }
}
} // namespace probe
