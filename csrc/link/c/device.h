/* device.h - memory on the first CUDA device through its driver, or plain memory where there is none. */
#ifndef DEVICE_H
#define DEVICE_H
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static struct {
    int on;
    int (*alloc)(uint64_t *, size_t);
    int (*to_device)(uint64_t, const void *, size_t);
    int (*to_host)(void *, uint64_t, size_t);
} cuda;

/* A function of the driver; C has no cast from an address to one. */
static int driver(void *library, const char *name, void *function) {
    void *address = dlsym(library, name);
    memcpy(function, &address, sizeof address);
    return address != NULL;
}

/* The primary context of device 0 becomes this thread's: it is the one that kvwarp's kernels use. */
static int device_open(void) {
    int (*init)(unsigned), (*retain)(void **, int), (*use)(void *);
    void *library = dlopen("libcuda.so.1", RTLD_NOW), *context = NULL;
    if (library == NULL) return 0;
    cuda.on = driver(library, "cuInit", &init) && driver(library, "cuDevicePrimaryCtxRetain", &retain) &&
              driver(library, "cuCtxSetCurrent", &use) && driver(library, "cuMemAlloc_v2", &cuda.alloc) &&
              driver(library, "cuMemcpyHtoD_v2", &cuda.to_device) &&
              driver(library, "cuMemcpyDtoH_v2", &cuda.to_host) && init(0) == 0 && retain(&context, 0) == 0 &&
              use(context) == 0;
    return cuda.on;
}

/* Both copies wait for what was launched on the default stream. */
static void put(void *to, const void *from, size_t bytes) {
    if (!cuda.on) memcpy(to, from, bytes);
    else if (cuda.to_device((uint64_t)(uintptr_t)to, from, bytes) != 0) abort();
}

static void get(void *to, const void *from, size_t bytes) {
    if (!cuda.on) memcpy(to, from, bytes);
    else if (cuda.to_host(to, (uint64_t)(uintptr_t)from, bytes) != 0) abort();
}

/* 256-byte aligned and zero. */
static void *room(size_t bytes) {
    uint64_t address = 0;
    size_t whole = (bytes + 255) / 256 * 256;
    void *zeros = calloc(whole, 1), *plain = aligned_alloc(256, whole);
    if (zeros == NULL || plain == NULL || (cuda.on && cuda.alloc(&address, whole) != 0)) abort();
    if (cuda.on) free(plain), plain = (void *)(uintptr_t)address;
    put(plain, zeros, whole);
    free(zeros);
    return plain;
}

#endif
