// fields.cuh - refusals: a status that says what is wrong with which field of the params, and the one list of
// fields that have a number.
//
//   KVW_CHECK_PARAMS(p);                     // p is a pointer: not null, struct_size right
//   KVW_REQUIRED(*p, q);                     // not null, 16-byte aligned
//   KVW_OPTIONAL(*p, lse);                   // null or 16-byte aligned
//   KVW_REQUIRE(p->tokens > 0, SHAPE, tokens);
//
// each of which returns from the _check with KVW_ERR_<what> less 16 times the field's number.
#pragma once
#include "../types.h"

// clang-format off
#define KVW_FIELDS(X)                                                                                        \
    X(params) X(struct_size)                                                                                \
    X(accumulate) X(bias) X(cols) X(count) X(ctas) X(cu_tokens) X(dtype) X(edits) X(entries) X(eps)          \
    X(feedback) X(first) X(gate) X(group) X(hadamard) X(head_dim) X(heads) X(history) X(history_lens)        \
    X(history_stride) X(ids) X(in_stride) X(indptr) X(inv_freq) X(k) X(k_norm) X(k_norm_stride)              \
    X(k_stride) X(kivi_exact) X(kv_heads) X(least) X(lens) X(lens_heads) X(logits) X(lse) X(lse_rows)        \
    X(max_edits) X(max_slabs) X(max_tokens) X(meta) X(min_p) X(op) X(out) X(out_dtype) X(out_stride)         \
    X(packed) X(pairing) X(penalty) X(pools) X(positions) X(q) X(q_heads) X(q_len) X(range) X(reserved)      \
    X(ring) X(ring_slabs) X(rotation) X(rows) X(scale) X(seeds) X(seqs) X(sinks) X(sliding_window)           \
    X(softcap) X(steps) X(table) X(table_heads) X(table_stride) X(temperature) X(tokens) X(top_k) X(top_p)   \
    X(up) X(v) X(v_stride) X(vocab) X(weight) X(width) X(window) X(workspace) X(workspace_bytes) X(x)        \
    X(x_stride) X(y) X(y_dtype)
// clang-format on

#define KVW_REQUIRE(condition, error, field)                                                                 \
    do {                                                                                                     \
        if (!(condition)) return KVW_ERR_##error - 16 * int(::kvw::Field::field);                            \
    } while (0)
#define KVW_OPTIONAL(of, field) KVW_REQUIRE(reinterpret_cast<uintptr_t>((of).field) % 16 == 0, ALIGN, field)
#define KVW_REQUIRED(of, field)                                                                              \
    KVW_REQUIRE((of).field, NULL, field);                                                                    \
    KVW_OPTIONAL(of, field)
#define KVW_CHECK_PARAMS(p)                                                                                  \
    KVW_REQUIRE(p, NULL, params);                                                                            \
    KVW_REQUIRE((p)->struct_size == sizeof *(p), STRUCT, struct_size)

namespace kvw {

enum class Field {
    NONE,
#define KVW_FIELD(name) name,
    KVW_FIELDS(KVW_FIELD)
#undef KVW_FIELD
        COUNT
};

} // namespace kvw
