// probe.cuh - what every part of the probe uses: checked CUDA calls, timing by events, and rows of the CSV.
//
// The probe answers what only a card can: rates, latencies and bandwidths that the kernels were designed for.
// A row is `part,case,value,unit,low,high`: the median of many repeats, the 10th and the 90th percentile.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#define CHECK(call)                                                                                          \
    do {                                                                                                     \
        cudaError_t e_ = (call);                                                                             \
        if (e_ != cudaSuccess) {                                                                             \
            fprintf(stderr, "probe: %s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e_));    \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

namespace probe {

struct Card {
    cudaDeviceProp properties;
    int sms, clock_khz;
    size_t l2;
};

// Where rows go, as they are made: a probe that is stopped leaves what it had.
struct Report {
    FILE* csv;
    int failures = 0;

    void row(const std::string& part, const std::string& name, std::vector<double> values, const char* unit) {
        std::sort(values.begin(), values.end());
        auto at = [&](double q) { return values[size_t(q * double(values.size() - 1) + 0.5)]; };
        fprintf(csv, "%s,%s,%.6g,%s,%.6g,%.6g\n", part.c_str(), name.c_str(), at(0.5), unit, at(0.1), at(0.9));
        fflush(csv);
        printf("%-8s %-44s %10.4g %s\n", part.c_str(), name.c_str(), at(0.5), unit);
    }
    void expect(const char* part, const char* name, bool ok) {
        row(part, name, {ok ? 1.0 : 0.0}, "true");
        failures += !ok;
    }
};

// Events round what a stream does.
class Timer {
    cudaEvent_t from, to;

public:
    Timer() {
        CHECK(cudaEventCreate(&from));
        CHECK(cudaEventCreate(&to));
    }
    Timer(const Timer&) = delete;
    ~Timer() { cudaEventDestroy(from), cudaEventDestroy(to); }

    // Microseconds.
    double once(cudaStream_t stream, const std::function<void()>& work) {
        CHECK(cudaEventRecord(from, stream));
        work();
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(to, stream));
        CHECK(cudaEventSynchronize(to));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, from, to));
        return ms * 1e3;
    }
    std::vector<double> many(int n, cudaStream_t stream, const std::function<void()>& work) {
        once(stream, work);
        std::vector<double> all;
        for (int i = 0; i < n; i++) all.push_back(once(stream, work));
        return all;
    }
};

template <class T> struct Memory {
    T* p = nullptr;
    size_t n = 0;
    explicit Memory(size_t count) : n(count) { CHECK(cudaMalloc(&p, count * sizeof(T))); }
    Memory(const Memory&) = delete;
    ~Memory() { cudaFree(p); }
    std::vector<T> host() const {
        std::vector<T> out(n);
        CHECK(cudaMemcpy(out.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return out;
    }
    void put(const std::vector<T>& from) {
        CHECK(cudaMemcpy(p, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
};

// Bytes over times, in GB/s.
inline std::vector<double> rate(std::vector<double> us, double bytes) {
    for (double& t : us) t = bytes / t * 1e-3;
    return us;
}

// splitmix64.
inline uint64_t random_bits(uint64_t& state) {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// The parts, each in its own file.
void bandwidth(const Card&, Report&); // copy and linear read
void subnormals(const Card&, Report&);
void rates(const Card&, Report&);
void slabs(const Card&, Report&);
void launches(const Card&, Report&);
void pages(const Card&, Report&);

} // namespace probe
