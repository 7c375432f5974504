// fields.cuh - refusals: a status that says what is wrong with which field of the params.
//
//   KVW_CHECK_PARAMS(p);                     // p is a pointer: not null, struct_size right
//   KVW_REQUIRED(*p, q);                     // not null, 16-byte aligned
//   KVW_OPTIONAL(*p, lse);                   // null or 16-byte aligned
//   KVW_REQUIRE(p->tokens > 0, SHAPE, tokens);
//
// each of which returns from the _check with KVW_ERR_<what> less 16 times the field's number. A number is a hash of
// the name, so that a new field leaves every other family's object as it is; status.cu lists the names.
#pragma once
#include "../types.h"

#define KVW_REQUIRE(condition, error, field)                                                                 \
    do {                                                                                                     \
        constexpr int number = ::kvw::field_number(#field);                                                  \
        if (!(condition)) return KVW_ERR_##error - 16 * number;                                              \
    } while (0)
#define KVW_OPTIONAL(of, field) KVW_REQUIRE(reinterpret_cast<uintptr_t>((of).field) % 16 == 0, ALIGN, field)
#define KVW_REQUIRED(of, field)                                                                              \
    KVW_REQUIRE((of).field, NULL, field);                                                                    \
    KVW_OPTIONAL(of, field)
#define KVW_CHECK_PARAMS(p)                                                                                  \
    KVW_REQUIRE(p, NULL, params);                                                                            \
    KVW_REQUIRE((p)->struct_size == sizeof *(p), STRUCT, struct_size)

namespace kvw {

// FNV-1a, folded to 1 .. 2^20.
constexpr int field_number(const char* name) {
    uint32_t hash = 2166136261u;
    for (; *name; name++) hash = (hash ^ uint32_t(static_cast<unsigned char>(*name))) * 16777619u;
    return 1 + int((hash ^ hash >> 20) & 0xFFFFFu);
}

} // namespace kvw
