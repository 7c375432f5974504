/* A C program that links the kernels: asks for devices, sizes a cache, and has bad arguments refused.
 * cc -std=c11 -Icsrc tests/link.c libkvwarp.a -lcudart_static -lstdc++ -ldl -lrt -lpthread -lm */
#include "kvwarp.h"
#include <stdio.h>
#include <string.h>

int main(void) {
    kvw_paged_attn_params p;
    int32_t devices = 0;
    kvw_status found = kvw_device_count(&devices);

    memset(&p, 0, sizeof p);
    kvw_status refused = kvw_paged_attn(&p, NULL); /* struct_size is 0: nothing is launched */

    printf("abi %d\n", (int)kvw_abi_version());
    printf("slab %zu\n", kvw_slab_bytes(KVW_SLAB_Q2, 128, 32, KVW_META_F16));
    printf("refused %d %s\n", (int)KVW_ERR_OF(refused), kvw_status_str(refused));
    printf("devices %d %s\n", (int)devices, kvw_status_str(found));
    return KVW_ERR_OF(refused) == KVW_ERR_STRUCT ? 0 : 1;
}
