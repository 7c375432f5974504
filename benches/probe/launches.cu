// The floor under a layer: graphs of 32 layers of one, two or three tiny kernels that depend on one another,
// launched as usual and with programmatic dependent launch; and the same from a stream.
#include "probe.cuh"

namespace probe {
namespace {
constexpr int LAYERS = 32;

// Adds one to a cell a block, which the kernel before wrote.
__global__ void __launch_bounds__(128) touch(uint32_t* cells, bool dependent) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (dependent) {
        cudaTriggerProgrammaticLaunchCompletion();
        cudaGridDependencySynchronize();
    }
#endif
    if (threadIdx.x == 0) cells[blockIdx.x] += 1;
}

void launch(cudaStream_t stream, uint32_t* cells, int blocks, bool dependent) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(128);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    CHECK(cudaLaunchKernelEx(&config, touch, cells, dependent));
}
} // namespace

void launches(const Card& card, Report& report) {
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    Timer timer;
    const int grids[] = {card.sms * 2, 8, 32}; // decode, append, combine
    const char* const names[] = {"one kernel a layer", "two kernels a layer", "three kernels a layer"};
    bool counted = true;
    for (int kernels = 1; kernels <= 3; kernels++) {
        for (bool dependent : {false, true}) {
            if (dependent && card.properties.major < 9) continue;
            Memory<uint32_t> cells(size_t(card.sms) * 2);
            CHECK(cudaMemset(cells.p, 0, cells.n * 4));
            auto layers = [&] {
                for (int i = 0; i < LAYERS * kernels; i++)
                    launch(stream, cells.p, grids[i % kernels], dependent);
            };
            cudaGraph_t graph;
            cudaGraphExec_t exec;
            CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            layers();
            CHECK(cudaStreamEndCapture(stream, &graph));
            CHECK(cudaGraphInstantiate(&exec, graph, 0));
            std::string name = std::string(names[kernels - 1]) + (dependent ? ", dependent launch" : "");
            auto a_layer = [](std::vector<double> us) {
                for (double& t : us) t /= LAYERS;
                return us;
            };
            auto replay = [&] { CHECK(cudaGraphLaunch(exec, stream)); };
            report.row("launch", "graph of 32 layers, " + name, a_layer(timer.many(100, stream, replay)), "us");
            report.row("launch", "stream, " + name, a_layer(timer.many(20, stream, layers)), "us");
            CHECK(cudaStreamSynchronize(stream));
            uint32_t launches = uint32_t(101 + 21) * LAYERS; // warm-ups too; the first grid is the only full one
            auto got = cells.host();
            for (size_t i = 32; i < got.size(); i++) counted &= got[i] == launches;
            counted &= got[0] == launches * uint32_t(kernels);
            CHECK(cudaGraphExecDestroy(exec));
            CHECK(cudaGraphDestroy(graph));
        }
    }
    report.expect("launch", "every kernel ran, in order", counted);
    CHECK(cudaStreamDestroy(stream));
}
} // namespace probe
