#include "slots.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#include <sys/mman.h>
#include <unistd.h>

namespace cacheroute {
namespace {

// Reads `wanted` bytes, asking for `bytes`, which may reach past the end of the file. 0, or an errno.
int read_all(int fd, uint8_t * to, uint64_t bytes, uint64_t wanted, uint64_t offset) {
    for (uint64_t at = 0; at < wanted;) {
        const ssize_t n = pread(fd, to + at, bytes - at, off_t(offset + at));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno;
        if (n == 0) return ENODATA; // another process has made the file shorter
        at += uint64_t(n);
    }
    return 0;
}

// Why a file is not read directly.
std::string refusal(const std::string & name, int error) {
    if (error == EINVAL || error == EOPNOTSUPP) return "the filesystem of " + name + " has no direct reads";
    return "direct reads of " + name + " failed: " + std::strerror(error);
}

} // namespace

Slots::Slots(const ExpertFiles & files, Reading reading)
    : files_(files), reading_(reading), slot_(files.tensors().size() * size_t(files.n_expert())) {
    try {
        for (int fd : files_.descriptors()) os::no_read_ahead(fd); // which would bring in what is probed next
        for (const auto & name : files_.names()) {
            if (reading_ == Reading::direct) open_direct(name);
        }
        for (size_t t = 0; t < files_.tensors().size(); t++) pool_of_.push_back(find_pool(t));
        for (Pool & pool : pools_) reserve(pool);
    } catch (...) {
        release_all();
        throw;
    }
}

PageRun Slots::admit(size_t tensor, int32_t e, Urgency urgency) {
    uint8_t *& slot = slot_[files_.index(tensor, e)];
    slot            = take(pools_[pool_of_[tensor]], urgency);
    PageRun run     = files_.pages(tensor, e, 1);
    run.address     = slot;
    return run;
}

void Slots::evict(size_t tensor, int32_t e, bool complete) {
    uint8_t * const slot = std::exchange(slot_[files_.index(tensor, e)], nullptr);
    Pool &          pool = pools_[pool_of_[tensor]];
    if (!slot) return;
    if (complete) {
        pool.free.push_back(slot);
    } else { // a part of it may never have been in memory
        release(pool, slot);
    }
}

void Slots::trim() {
    for (Pool & pool : pools_) {
        for (; pool.free.size() > pool.spare; pool.free.pop_back()) release(pool, pool.free.back());
    }
}

void Slots::keep_room(const std::vector<size_t> & tensors, size_t n_experts) {
    for (size_t p = 0; p < pools_.size(); p++) {
        size_t n = 0;
        for (size_t t : tensors) n += pool_of_[t] == p ? n_experts : 0;
        pools_[p].spare = std::max(pools_[p].spare, n);
    }
}

void Slots::keep_no_room() {
    for (Pool & pool : pools_) pool.spare = 0;
}

int Slots::read(const PageRun & piece) const {
    const auto     file   = size_t(piece.file);
    const uint64_t wanted = files_.in_file(piece);
    const bool     direct = reading_ == Reading::direct;
    const int      error  = direct ? read_all(direct_[file], piece.address, piece.bytes, wanted, piece.offset)
                                   : read_all(files_.descriptors()[file], piece.address, wanted, wanted, piece.offset);
    if (direct && files_.mincore_reliable()) return error; // else probe() could not see whether they pass the page cache
    const std::lock_guard<std::mutex> alone(drop_);
    os::drop_cached(files_.descriptors()[file], piece.offset, piece.bytes);
    return error;
}

const void * Slots::address(size_t tensor, int32_t e) const {
    const ExpertTensor & t      = files_.tensors()[tensor];
    const uint8_t *      mapped = t.address + uint64_t(e) * t.expert_bytes;
    const uint8_t *      own    = slot_[files_.index(tensor, e)];
    if (!own) return mapped; // not resident: the mapping has it too
    return own + reinterpret_cast<uintptr_t>(mapped) % files_.page_bytes();
}

void Slots::clear() {
    for (const PageRun & r : files_.all_pages()) files_.drop(r); // what others have left in the page cache
    std::fill(slot_.begin(), slot_.end(), nullptr);
    for (Pool & pool : pools_) {
        os::release(pool.base, pool.bytes());
        all_empty(pool);
    }
    resident_bytes_ = 0;
}

uint64_t Slots::measure() const { // for anonymous memory mincore is always reliable
    uint64_t bytes = files_.mapped_in_memory();
    if (bytes == UNKNOWN_BYTES) bytes = 0;
    for (const Pool & pool : pools_) {
        const uint64_t n = os::in_memory(pool.base, pool.bytes());
        if (n == UNKNOWN_BYTES) return n;
        bytes += n;
    }
    return bytes;
}

void Slots::open_direct(const std::string & name) {
    const int fd = os::open_direct(name.c_str());
    if (fd < 0) throw std::runtime_error(refusal(name, errno));
    direct_.push_back(fd);
    probe(direct_.size() - 1, name);
}

// Reads the first pages of the experts, some in the middle and the last ones.
void Slots::probe(size_t file, const std::string & name) const {
    constexpr uint64_t   MOST = 16, PLACES = 3; // pages of one read
    const uint64_t       page = files_.page_bytes();
    std::vector<PageRun> own;
    std::copy_if(files_.all_pages().begin(), files_.all_pages().end(), std::back_inserter(own),
                 [&](const PageRun & r) { return size_t(r.file) == file; });
    if (own.empty()) return probe(PageRun{int(file), 0, nullptr, page}, name);
    for (uint64_t i = 0; i < PLACES; i++) {
        const PageRun & whole = own[(own.size() - 1) * i / (PLACES - 1)];
        const uint64_t  bytes = std::min(whole.bytes, MOST * page);
        const uint64_t  at    = (whole.bytes - bytes) / page * i / (PLACES - 1) * page;
        probe(PageRun{whole.file, whole.offset + at, whole.address + at, bytes}, name);
    }
}

// Reads pages both ways: some filesystems take O_DIRECT and read through the page cache, others give wrong bytes.
void Slots::probe(const PageRun & run, const std::string & name) const {
    constexpr int  TIMES  = 4; // another process may read the same pages through the page cache meanwhile, as its own probe does
    const auto     file   = size_t(run.file);
    const uint64_t page   = files_.page_bytes();
    const uint64_t wanted = files_.in_file(run);
    void *         memory = nullptr;
    if (posix_memalign(&memory, page, 2 * run.bytes) != 0) throw std::bad_alloc();
    const std::unique_ptr<void, void (*)(void *)> owner(memory, std::free);
    auto * const direct = static_cast<uint8_t *>(memory);
    auto * const plain  = direct + run.bytes;
    std::memset(direct, 0xa5, run.bytes);
    std::memset(plain, 0x5a, run.bytes);
    bool cached = true;
    for (int i = 0; i < TIMES && cached; i++) {
        if (run.address) {
            files_.drop(run);
            files_.drop_unmapped(); // a part of a large folio cannot be dropped
        }
        const bool watched = run.address && files_.mincore_reliable() && os::in_memory(run.address, run.bytes) == 0;
        const int  failed  = wanted ? read_all(direct_[file], direct, run.bytes, wanted, run.offset) : EINVAL;
        if (failed) throw std::runtime_error(refusal(name, failed));
        if (watched || i == 0) cached = watched && os::in_memory(run.address, run.bytes) != 0;
    }
    if (cached) throw std::runtime_error("the filesystem of " + name + " puts direct reads into the page cache");
    const bool same = read_all(files_.descriptors()[file], plain, wanted, wanted, run.offset) == 0 &&
                      std::memcmp(direct, plain, wanted) == 0;
    if (run.address) files_.drop(run);
    if (!same) throw std::runtime_error("the filesystem of " + name + " gives other bytes by direct reads");
}

size_t Slots::find_pool(size_t tensor) {
    uint64_t bytes = 0;
    for (int e = 0; e < files_.n_expert(); e++) bytes = std::max(bytes, files_.pages(tensor, e, 1).bytes);
    size_t i = 0;
    while (i < pools_.size() && pools_[i].slot_bytes != bytes) i++;
    if (i == pools_.size()) pools_.emplace_back();
    pools_[i].slot_bytes = bytes;
    pools_[i].n_slots += uint64_t(files_.n_expert());
    return i;
}

void Slots::reserve(Pool & pool) {
    pool.base = os::reserve(pool.bytes());
    if (!pool.base) throw std::runtime_error(std::string("no address space for experts: ") + std::strerror(errno));
    all_empty(pool);
}

void Slots::all_empty(Pool & pool) const {
    pool.free.clear();
    pool.empty.clear();
    for (uint64_t i = pool.n_slots; i-- > 0;) pool.empty.push_back(pool.base + i * pool.slot_bytes);
}

// Free slots of any size, as many bytes, or all that there are. Layers that follow each other may have experts of other sizes: what
// one has left does not fit the next one, and must not be in memory beside it until trim().
void Slots::give_back(uint64_t bytes) {
    for (Pool & pool : pools_) {
        while (bytes && pool.free.size() > pool.spare) {
            release(pool, pool.free.back());
            pool.free.pop_back();
            bytes -= std::min(bytes, pool.slot_bytes);
        }
    }
}

uint8_t * Slots::take(Pool & pool, Urgency urgency) {
    if (pool.free.empty()) give_back(pool.slot_bytes);
    auto &    from = pool.free.empty() ? pool.empty : pool.free;
    uint8_t * slot = from.back();
    if (pool.free.empty()) {
        resident_bytes_ += pool.slot_bytes;
        // this expert may end a page earlier than the slot does, the next one not: a slot is in memory as a whole, and one
        // that is prefetched even if it is not read to its end
        const uint64_t page = files_.page_bytes(), last = pool.slot_bytes - page;
        for (uint64_t at = urgency == Urgency::prefetch ? 0 : last; at <= last; at += page) *static_cast<volatile uint8_t *>(slot + at) = 0;
    }
    from.pop_back();
    return slot;
}

void Slots::release(Pool & pool, uint8_t * slot) {
    os::release(slot, pool.slot_bytes);
    pool.empty.push_back(slot);
    resident_bytes_ -= pool.slot_bytes;
}

void Slots::release_all() {
    for (const Pool & pool : pools_) {
        if (pool.base) munmap(pool.base, pool.bytes());
    }
    for (int fd : direct_) close(fd);
}

} // namespace cacheroute
