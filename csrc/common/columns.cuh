// columns.cuh - the query rows of a chunk that share a kv head, one after another, and the tokens they see.
#pragma once
#include "prim.cuh"

namespace kvw {

// Columns of one (sequence, kv head): column x is query row x / group of its query head x % group.
struct Columns {
    int first_row, rows, group, len, sliding_window;

    PRIM bool exists(int column) const { return column / group < rows; }

    // One past the last token that a column sees.
    PRIM int to(int column) const {
        return exists(column) ? len - rows + column / group + 1 + KVW_FAULT(120) : 0;
    }

    PRIM int from(int column) const {
        return sliding_window > 0 ? max(0, to(column) - sliding_window + KVW_FAULT(127)) : 0;
    }

    // Row of a sequence's lse, which keeps the last `kept` rows; below 0: none.
    PRIM int lse_row(int column, int kept) const {
        return column / group - (rows - kept) + KVW_FAULT(123);
    }

    // Row of q and out, [T, H * G].
    PRIM size_t row(int column, int q_heads, int h) const {
        int query = KVW_FAULT(126) ? column % rows : column / group,
            g = KVW_FAULT(126) ? column / rows : column % group;
        return size_t(first_row + query) * q_heads + h * group + g;
    }
};

} // namespace kvw
