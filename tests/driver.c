/* driver.c - a CUDA driver to test with where there is none: one device, memory on the heap, everything done at once. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t address;

static char context;
static _Thread_local void *current;

static int give(void **to) {
    *to = malloc(1);
    return *to ? 0 : 2;
}

static int copy(void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
    return 0;
}

static int take(address *to, size_t bytes) {
    *to = (address)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *to ? 0 : 2;
}

static int drop(void *at) {
    free(at);
    return 0;
}

int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0, ordinal ? 101 : 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { return (void)what, (void)device, *value = 0, 0; }

int cuDevicePrimaryCtxRetain(void **to, int device) { return (void)device, *to = &context, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
int cuCtxSetCurrent(void *ctx) { return current = ctx, ctx && ctx != &context; }
int cuCtxGetCurrent(void **to) { return *to = current, 0; }
int cuCtxSynchronize(void) { return 0; }

int cuMemAlloc_v2(address *to, size_t bytes) { return current ? take(to, bytes) : 201; }
int cuMemFree_v2(address at) { return drop((void *)at); }
int cuMemcpyHtoD_v2(address to, const void *from, size_t bytes) { return copy((void *)to, from, bytes); }
int cuMemcpyDtoH_v2(void *to, address from, size_t bytes) { return copy(to, (void *)from, bytes); }
int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t bytes, void *stream) {
    return (void)stream, copy((void *)to, from, bytes);
}
int cuMemcpyDtoHAsync_v2(void *to, address from, size_t bytes, void *stream) {
    return (void)stream, copy(to, (void *)from, bytes);
}
int cuMemsetD8_v2(address to, unsigned char value, size_t bytes) { return memset((void *)to, value, bytes), 0; }
int cuMemsetD8Async(address to, unsigned char value, size_t bytes, void *stream) {
    return (void)stream, memset((void *)to, value, bytes), 0;
}

int cuStreamCreate(void **to, unsigned flags) { return (void)flags, give(to); }
int cuStreamCreateWithPriority(void **to, unsigned flags, int priority) { return (void)flags, (void)priority, give(to); }
int cuStreamDestroy_v2(void *stream) { return drop(stream); }
int cuStreamSynchronize(void *stream) { return (void)stream, 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return (void)stream, (void)flags, !event; }
int cuEventCreate(void **to, unsigned flags) { return (void)flags, give(to); }
int cuEventDestroy_v2(void *event) { return drop(event); }
int cuEventRecord(void *event, void *stream) { return (void)stream, !event; }
int cuEventSynchronize(void *event) { return !event; }
