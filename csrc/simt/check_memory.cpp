// check_memory.cpp - the checked build's bounds and initialisation: every access of a kernel must lie in one
// carved piece or static array of its block's shared memory, or in one device buffer, and what it reads must
// have been written. Memory that is neither (the stack, parameters, __constant__ tables) is not looked at.
#include "check.h"
#include <algorithm>

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden"))); // where this library was loaded

namespace simt {

// Cells of `bytes` of this block's shared memory, or null where p is elsewhere.
Cell* shared_cells(const Access& a, const unsigned char* p, unsigned bytes) {
    Block& block = a.block;
    unsigned char* base = block.dynamic_store.data();
    if (p >= base && p < base + block.dynamic_store.size()) {
        bool inside =
            block.pieces.empty() && p >= block.dynamic && p + bytes <= block.dynamic + block.dynamic_bytes;
        for (const Piece& piece : block.pieces)
            inside |= p >= piece.at && p + bytes <= piece.at + piece.bytes;
        if (!inside)
            fail("%s of %u bytes out of bounds of a piece of shared memory at %s", a.what, bytes,
                 site_text(a.site).c_str());
        return &a.shadow.dynamic[size_t(p - base)];
    }
    for (auto& [key, store] : block.statics) {
        if (p < store.data() || p >= store.data() + store.size()) continue;
        unsigned char* begin = static_begin(store);
        if (p < begin || p + bytes > begin + store.size() - STATIC_PAD)
            fail("%s of %u bytes out of bounds of a static shared array at %s", a.what, bytes,
                 site_text(a.site).c_str());
        auto& cells = a.shadow.statics[key];
        if (cells.empty()) cells.resize(store.size());
        return &cells[size_t(p - store.data())];
    }
    return nullptr;
}

namespace {

constexpr size_t CHUNK = 1024; // cells of device memory that come to life together
constexpr uint32_t SOURCE_LINE = 1u << 31;
thread_local std::vector<Site> source_lines;
thread_local Allocation* last_allocation;

Allocation& allocation_of(const Access& a, const unsigned char* p, unsigned bytes) {
    if (!last_allocation || p < last_allocation->at || p >= last_allocation->at + last_allocation->bytes)
        last_allocation = find_allocation(p);
    if (!last_allocation)
        fail("%s of %u bytes where no device buffer is, at %s", a.what, bytes, site_text(a.site).c_str());
    return *last_allocation;
}

Cell& device_cell(Allocation& allocation, size_t i) {
    if (allocation.cells.empty()) allocation.cells.resize(allocation.bytes / CHUNK + 1);
    auto& chunk = allocation.cells[i / CHUNK];
    if (!chunk) chunk = std::make_unique<Cell[]>(CHUNK);
    return chunk[i % CHUNK];
}

void check_shared(const Access& a, Cell* cells, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        bool known = cells[i].epoch == a.shadow.epoch && (cells[i].written || cells[i].in_flight);
        if (!a.write && !known)
            fail("%s of shared memory never written in this block at %s", a.what, site_text(a.site).c_str());
        touch(a, cells[i], a.shadow.epoch, "shared");
    }
    if (a.write && !a.async() && hopper()) a.shadow.unfenced[a.fiber.thread.flat].push_back({cells, bytes});
}

void check_device(const Access& a, const unsigned char* p, unsigned bytes) {
    Allocation& buffer = allocation_of(a, p, bytes);
    size_t first = size_t(p - buffer.at);
    const char* name = buffer.name.c_str();
    if (p < buffer.at || first + bytes > buffer.bytes)
        fail("%s of %u bytes out of bounds at byte %td of %s, %zu bytes long, at %s", a.what, bytes,
             p - buffer.at, name, buffer.bytes, site_text(a.site).c_str());
    for (size_t i = first; i < first + bytes; i++) {
        if (a.write && !a.atomic)
            buffer.set_written(i);
        else if (!buffer.is_written(i))
            fail("%s of byte %zu of %s, never written, at %s", a.what, i, name, site_text(a.site).c_str());
        touch(a, device_cell(buffer, i), launch_epoch(), name);
    }
}

} // namespace

uint32_t site_id(const Site& site) {
    if (site.pc) return uint32_t(static_cast<const char*>(site.pc) - __ehdr_start - 1);
    for (size_t i = source_lines.size(); i-- > 0;) {
        if (source_lines[i].line == site.line && source_lines[i].file == site.file)
            return SOURCE_LINE | uint32_t(i);
    }
    source_lines.push_back(site);
    return SOURCE_LINE | uint32_t(source_lines.size() - 1);
}

std::string site_text(uint32_t id) {
    char s[256];
    if (id & SOURCE_LINE) {
        const Site& site = source_lines[id & ~SOURCE_LINE];
        snprintf(s, sizeof s, "%s:%d", site.file, site.line);
    } else {
        snprintf(s, sizeof s, "pc %#x", id);
    }
    return s;
}

void forget_lookups() { last_allocation = nullptr; }

void check_access(Fiber& fiber, const void* ptr, unsigned bytes, bool write, Site site, const char* what,
                  bool atomic) {
    Block& block = *fiber.thread.block;
    check_access(Access{fiber, block, shadow_of(block), site_id(site), what, write, atomic}, ptr, bytes);
}

void check_access(const Access& a, const void* ptr, unsigned bytes) {
    auto* p = static_cast<const unsigned char*>(ptr);
    runner->report.accesses++;
    if (uintptr_t(p) < 4096) fail("%s through a null pointer at %s", a.what, site_text(a.site).c_str());
    if (in_device_memory(p))
        check_device(a, p, bytes);
    else if (Cell* cells = shared_cells(a, p, bytes))
        check_shared(a, cells, bytes);
    else
        async_registers(a, p, bytes);
}

void check_copy_begin(Fiber& fiber, const Copy& copy) {
    Site site{nullptr, copy.file, copy.line};
    if (copy.src_bytes) check_access(fiber, copy.src, copy.src_bytes, false, site, "cp.async read", false);
    Block& block = *fiber.thread.block;
    Access a{fiber, block, shadow_of(block), site_id(site), "cp.async write", true, false};
    Cell* cells = shared_cells(a, copy.dst, copy.bytes);
    for (unsigned i = 0; i < copy.bytes; i++) {
        touch(a, cells[i], a.shadow.epoch, "shared");
        cells[i].in_flight = true;
    }
}

void check_copy_land(Fiber& fiber, const Copy& copy) {
    Block& block = *fiber.thread.block;
    Access a{fiber, block, shadow_of(block), site_id({nullptr, copy.file, copy.line}), "cp.async landing",
             true,  false};
    Cell* cells = shared_cells(a, copy.dst, copy.bytes);
    for (unsigned i = 0; i < copy.bytes; i++) {
        cells[i].in_flight = false;
        touch(a, cells[i], a.shadow.epoch, "shared");
    }
    if (hopper()) a.shadow.unfenced[fiber.thread.flat].push_back({cells, copy.bytes});
}

} // namespace simt
