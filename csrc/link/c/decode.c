/* Quantise and decode through plain pointers: 200 tokens are appended to a cache of 2-bit slabs with a window of 64,
 * then one query attends to them. On a CUDA device where there is one, on the processor otherwise: the same params.
 *
 * cc -std=c11 decode.c $(pkg-config --cflags --libs kvwarp) -ldl -lm */
#include "device.h"
#include "expected.h"
#include <kvwarp.h>
#include <math.h>
#include <stdio.h>

enum { D = 64, H = 2, G = 2, TOKENS = 200, WINDOW = 64, GROUP = 32, SLABS = 4 };

static double value(int seed, int h, int t, int c) {
    return ((seed * 7919 + h * 131 + t * 37 + c * 11 + (t * c) % 29) % 64 - 32) / 32.0;
}

/* A multiple of 1/32 from -1 to 1 in f16. */
static uint16_t to_half(double x) {
    int exponent = 0;
    double mantissa = frexp(fabs(x), &exponent); /* in [0.5, 1) */
    if (x == 0) return 0;
    return (uint16_t)((x < 0) << 15 | (exponent + 14) << 10 | ((int)(mantissa * 2048) & 1023));
}

static double from_half(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double x = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return h >> 15 ? -x : x;
}

static void check(kvw_status s) {
    if (s == KVW_OK) return;
    fprintf(stderr, "kvwarp: %s\n", kvw_status_str(s));
    exit(1);
}

/* A row of `heads` heads of a token to `to`. */
static void put_row(void *to, int seed, int heads, int t) {
    uint16_t row[H * G * D];
    for (int i = 0; i < heads * D; i++) row[i] = to_half(value(seed, i / D, t, i % D));
    put(to, row, (size_t)heads * D * 2);
}

int main(void) {
    int32_t devices = 0;
    if (kvw_abi_version() != KVW_ABI_VERSION) return fprintf(stderr, "header and library differ\n"), 1;
    int gpu = kvw_device_count(&devices) == KVW_OK && devices > 0 && device_open();

    /* Entry i of head h names slab h * SLABS + i of the pool of 2-bit slabs. */
    uint32_t table[H][SLABS];
    for (int i = 0; i < H * SLABS; i++) table[i / SLABS][i % SLABS] = (uint32_t)KVW_SLAB_Q2 << KVW_ENTRY_SHIFT | (uint32_t)i;
    void *device_table = room(sizeof table);
    int32_t *lens = room(sizeof *lens);
    put(device_table, table, sizeof table);
    kvw_cache cache = {
        .ring = room((size_t)(H * kvw_ring_slabs(WINDOW)) * kvw_slab_bytes(KVW_SLAB_F16, D, GROUP, KVW_META_F16)),
        .table = device_table, .lens = lens, .seqs = 1, .kv_heads = H, .head_dim = D, .group = GROUP,
        .window = WINDOW, .ring_slabs = kvw_ring_slabs(WINDOW), .table_stride = SLABS, .table_heads = H,
        .lens_heads = 1, .meta = KVW_META_F16,
    };
    cache.pools[KVW_SLAB_Q2] = room(H * SLABS * kvw_slab_bytes(KVW_SLAB_Q2, D, GROUP, KVW_META_F16));

    void *k = room(H * D * 2), *v = room(H * D * 2);
    kvw_kv_pack_params pack = {
        .struct_size = sizeof pack, .op = KVW_PACK_APPEND, .cache = cache, .k = k, .v = v,
        .k_stride = H * D, .v_stride = H * D, .tokens = 1, .dtype = KVW_F16,
    };
    for (int32_t t = 0, len = 1; t < TOKENS; t++, len++) {
        put_row(k, 1, H, t);
        put_row(v, 2, H, t);
        put(lens, &len, sizeof len);
        check(gpu ? kvw_kv_pack(&pack, NULL) : kvw_kv_pack_cpu(&pack));
    }

    void *q = room(H * G * D * 2), *out = room(H * G * D * 2);
    put_row(q, 3, H * G, TOKENS - 1);
    kvw_paged_attn_params attn = {
        .struct_size = sizeof attn, .q_heads = H * G, .cache = cache, .q = q, .out = out,
        .q_len = 1, .max_slabs = SLABS, .dtype = KVW_F16,
    };
    attn.workspace_bytes = kvw_paged_attn_workspace(&attn);
    attn.workspace = room(attn.workspace_bytes);
    check(gpu ? kvw_paged_attn(&attn, NULL) : kvw_paged_attn_cpu(&attn));

    uint16_t got[H * G][D];
    double error = 0, size = 0;
    get(got, out, sizeof got);
    for (int i = 0; i < H * G * D; i++) {
        double want = expected[i / D][i % D], off = from_half(got[i / D][i % D]) - want;
        error += off * off;
        size += want * want;
    }
    error = sqrt(error / size);
    printf("%s: %d tokens in 2 bits, relative error %.1e\n", gpu ? "cuda" : "cpu", TOKENS, error);

    attn.q_heads = 3; /* refused, and said which */
    kvw_status refused = kvw_paged_attn_cpu(&attn);
    printf("refused: %s\n", kvw_status_str(refused));
    return error < 1e-3 && KVW_ERR_OF(refused) == KVW_ERR_SHAPE ? 0 : 1;
}
