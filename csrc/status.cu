// status: what the library says about itself: version, statuses in words, devices, sizes of slabs and rings.
//
// A negative status names the field at fault; a positive one is a cudaError_t and keeps CUDA's text.
#include "kvwarp.h"
#include "common/fields.cuh"
#include "common/slab.cuh"

int32_t kvw_abi_version(void) { return KVW_ABI_VERSION; }

namespace {

constexpr int ERRORS = 9;

// Row of a field: what each KVW_ERR_* means for it.
#define KVW_ROW(prefix)                                                                                      \
    {"ok",                                                                                                   \
     prefix "not sizeof the params: header and library differ in version",                                   \
     prefix "a required pointer is null",                                                                    \
     prefix "out of range, or contradicts another field; the family's header gives the limits",              \
     prefix "the pointer is not 16-byte aligned",                                                            \
     prefix "a format, group or dtype that this op does not support",                                        \
     prefix "less than the op's _workspace() asks for",                                                      \
     prefix "the CPU executor stopped the kernel; simt_last_error() says why",                               \
     prefix "not supported by the CPU path of this op"},

// Every field that a _check may refuse; tests/layout.rs compares.
// clang-format off
#define KVW_FIELDS(X)                                                                                     \
    X(params) X(struct_size) X(accumulate) X(anchor) X(bias) X(bits) X(candidate_counts) X(candidates)    \
    X(chosen) X(cols) X(columns) X(count) X(counts) X(ctas) X(cu_tokens) X(dtype) X(edits) X(elite)       \
    X(entries) X(eps) X(feedback) X(first) X(format) X(from) X(from_slabs) X(gate) X(group) X(hadamard)   \
    X(head_dim) X(head_stride) X(heads) X(history) X(history_lens) X(history_stride) X(ids)               \
    X(in_stride) X(index_stride) X(indices) X(indptr) X(inv_freq) X(k) X(k_norm) X(k_norm_stride)         \
    X(k_stride) X(kept) X(kept_counts) X(kept_stride) X(kivi_exact) X(kth) X(kv_heads) X(lag) X(least)    \
    X(lens) X(lens_heads) X(lists) X(logits) X(lse) X(lse_rows) X(max_edits) X(max_slabs) X(max_tokens)   \
    X(meta) X(min_p) X(moves) X(n) X(op) X(out) X(out_dtype) X(out_positions) X(out_stride) X(packed)     \
    X(pairing) X(pairs) X(partitions) X(penalty) X(plain) X(pool) X(pools) X(positions) X(q) X(q_elite)   \
    X(q_elite_stride) X(q_heads) X(q_len) X(q_out) X(q_stride) X(range) X(ranges) X(rank) X(reference)    \
    X(reserved) X(rest) X(rest_heads) X(rest_stride) X(ring) X(ring_slabs) X(rotation) X(row_bytes)       \
    X(rows) X(scale) X(scores) X(seeds) X(seen) X(segment) X(seqs) X(sinks) X(sliding_window) X(slots)    \
    X(slots_stride) X(softcap) X(steps) X(table) X(table_heads) X(table_stride) X(temperature)            \
    X(tokens) X(top_k) X(top_p) X(up) X(v) X(v_stride) X(vocab) X(wanted) X(weight) X(width) X(window)    \
    X(workspace) X(workspace_bytes) X(x) X(x_head_stride) X(x_stride) X(y) X(y_dtype) X(z) X(z_stride)
// clang-format on

struct Field {
    int number;
    const char* meanings[ERRORS];
};
#define KVW_FIELD_ROW(name) {kvw::field_number(#name), KVW_ROW(#name ": ")},
constexpr Field FIELDS[] = {{0, KVW_ROW("")}, KVW_FIELDS(KVW_FIELD_ROW)};

constexpr bool distinct() {
    for (const Field& a : FIELDS)
        for (const Field* b = FIELDS; b != &a; b++)
            if (a.number == b->number) return false;
    return true;
}
static_assert(distinct(), "two fields have one number: rename one");

} // namespace

const char* kvw_status_str(kvw_status s) {
    if (s > 0) return cudaGetErrorString(static_cast<cudaError_t>(s));
    int number = -(s / 16), error = -(s % 16);
    for (const Field& field : FIELDS)
        if (field.number == number && error < ERRORS && (error > 0 || number == 0)) return field.meanings[error];
    return "unknown status";
}

kvw_status kvw_device_count(int32_t* count) {
    KVW_REQUIRE(count, NULL, params);
    int found = 0;
    cudaError_t e = cudaGetDeviceCount(&found);
    *count = e == cudaSuccess ? found : 0;
    return static_cast<kvw_status>(e);
}

size_t kvw_slab_bytes(int32_t format, int32_t head_dim, int32_t group, int32_t meta) {
    return kvw::slab_bytes(format, head_dim, group, meta);
}

int32_t kvw_ring_slabs(int32_t window) { return kvw::ring_slabs(window); }
