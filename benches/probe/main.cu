// probe: asks the first GPU what the kernels were designed around.
//
//   probe --device                    prints card, driver and limits as `key=value`; fails without a usable GPU
//   probe FILE.csv [PART ...]         bandwidth, subnormals, rates, launches, pages, slabs; all, in that order
#include "probe.cuh"
#include <cstring>

namespace {
using namespace probe;

bool find(Card& card) {
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaSuccess && count > 0) e = cudaGetDeviceProperties(&card.properties, 0);
    if (e == cudaSuccess && count == 0) e = cudaErrorNoDevice;
    if (e != cudaSuccess) {
        fprintf(stderr, "probe: no usable GPU: %s\n", cudaGetErrorString(e));
        return false;
    }
    card.sms = card.properties.multiProcessorCount;
    card.l2 = size_t(card.properties.l2CacheSize);
    CHECK(cudaDeviceGetAttribute(&card.clock_khz, cudaDevAttrClockRate, 0));
    return true;
}

void describe(const Card& card) {
    int driver = 0, runtime = 0;
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    const cudaDeviceProp& p = card.properties;
    printf("gpu=%s\ncapability=%d.%d\nsms=%d\nl2_bytes=%zu\nmemory_bytes=%zu\n", p.name, p.major, p.minor,
           card.sms, card.l2, p.totalGlobalMem);
    printf("shared_sm=%zu\nshared_block=%zu\nclock_khz=%d\ncuda_driver=%d\ncuda_runtime=%d\n",
           p.sharedMemPerMultiprocessor, p.sharedMemPerBlockOptin, card.clock_khz, driver, runtime);
}
} // namespace

int main(int argc, char** argv) {
    Card card;
    if (argc < 2) {
        fprintf(stderr, "usage: probe --device | probe FILE.csv [PART ...]\n");
        return 2;
    }
    if (!find(card)) return 3;
    if (!strcmp(argv[1], "--device")) return describe(card), 0;

    struct Part {
        const char* name;
        void (*run)(const Card&, Report&);
    };
    const Part parts[] = {{"bandwidth", bandwidth}, {"subnormals", subnormals}, {"rates", rates},
                          {"launches", launches},   {"pages", pages},           {"slabs", slabs}};
    for (int i = 2; i < argc; i++) {
        bool known = false;
        for (const Part& part : parts) known |= !strcmp(argv[i], part.name);
        if (!known) return fprintf(stderr, "probe: no part is called %s\n", argv[i]), 2;
    }
    Report report{fopen(argv[1], "w")};
    if (!report.csv) return perror(argv[1]), 1;
    fprintf(report.csv, "part,case,value,unit,p10,p90\n");
    for (const Part& part : parts) {
        bool wanted = argc == 2;
        for (int i = 2; i < argc; i++) wanted |= !strcmp(argv[i], part.name);
        if (wanted) part.run(card, report);
        CHECK(cudaDeviceSynchronize());
    }
    fclose(report.csv);
    return report.failures ? 1 : 0;
}
