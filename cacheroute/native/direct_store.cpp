// Experts in slots of our own memory, read past the page cache. A slot is faulted in once and then handed from the evicted
// expert to the loaded one, so that a miss costs the read and nothing else.
#include "reading_store.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

namespace cacheroute {
namespace {

constexpr int      N_READERS = 4;         // 2 to 4 saturate a flash; io_uring would save processor time only
constexpr uint64_t PIECE     = 256 << 10; // of one read: small enough to share an expert among the readers
constexpr int32_t  NOWHERE   = -1;

// The slots of one tensor: room for all of its experts, memory for those that it has at a time.
struct Slots {
    uint8_t *            base;
    uint64_t             slot_bytes; // whole pages, enough for any expert wherever it begins in its first page
    std::vector<int32_t> of;         // [E] slot, or NOWHERE
    std::vector<int32_t> free;       // in memory, and nobody's
    std::vector<int32_t> empty;      // not in memory, the first one last
};

class DirectStore final : public ReadingStore {
  public:
    DirectStore(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors)
        : ReadingStore(files, n_layers, n_expert, tensors) {
        try {
            for (const auto & name : files) open_direct(name);
            for (size_t t = 0; t < tensors.size(); t++) reserve(t);
        } catch (...) {
            release();
            throw;
        }
        start_readers(N_READERS, PIECE, [this](const PageRun & r) { return read_piece(r); });
    }

    ~DirectStore() override {
        stop_readers();
        release();
    }

  protected:
    void begin(const std::vector<size_t> & tensors, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) override {
        for (size_t t : tensors) {
            Slots & slots = slots_[t];
            for (int32_t e : evict) {
                if (slots.of[size_t(e)] == NOWHERE) continue;
                slots.free.push_back(slots.of[size_t(e)]);
                slots.of[size_t(e)] = NOWHERE;
            }
            for (int32_t e : load) {
                slots.of[size_t(e)] = take(slots);
                PageRun run         = pages(t, e, 1);
                run.address         = slot(slots, slots.of[size_t(e)]);
                read(t, e, run);
            }
        }
    }

    void drop(const std::vector<size_t> & tensors, const std::vector<int32_t> &) override {
        for (size_t t : tensors) {
            Slots & slots = slots_[t];
            for (int32_t s : slots.free) {
                madvise(slot(slots, s), slots.slot_bytes, MADV_DONTNEED);
                slots.empty.push_back(s);
                resident_bytes_ -= slots.slot_bytes;
            }
            slots.free.clear();
        }
    }

    void drop_all() override {
        for (Slots & slots : slots_) {
            madvise(slots.base, reserved(slots), MADV_DONTNEED);
            all_empty(slots);
        }
    }

    const void * address(size_t tensor, int32_t e) const override {
        const ExpertTensor & t      = tensors()[tensor];
        const uint8_t *      mapped = t.address + uint64_t(e) * t.expert_bytes;
        const Slots &        slots  = slots_[tensor];
        const int32_t        s      = slots.of[size_t(e)];
        if (s == NOWHERE) return mapped; // nobody has asked for it: the mapping has it too
        return slot(slots, s) + reinterpret_cast<uintptr_t>(mapped) % page_bytes();
    }

    uint64_t measure() const override { // anonymous memory is ours: the kernel tells
        uint64_t bytes = 0;
        for (const Slots & slots : slots_) {
            const uint64_t n = in_memory(slots.base, reserved(slots), page_bytes());
            if (n == UNKNOWN_BYTES) return n;
            bytes += n;
        }
        return bytes;
    }

  private:
    void open_direct(const std::string & name) {
        const int fd = O_DIRECT ? open(name.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT) : -1;
        if (fd >= 0) direct_.push_back(fd);
        struct stat s {};
        if (fd < 0 || !reads(fd) || fstat(fd, &s) != 0) throw std::runtime_error("the filesystem of " + name + " has no direct reads");
        sizes_.push_back(uint64_t(s.st_size));
    }

    bool reads(int fd) const {
        void * page = nullptr;
        if (posix_memalign(&page, page_bytes(), page_bytes()) != 0) return false;
        const bool ok = pread(fd, page, page_bytes(), 0) > 0;
        std::free(page);
        return ok;
    }

    void reserve(size_t tensor) {
        Slots slots{};
        for (int e = 0; e < n_expert(); e++) slots.slot_bytes = std::max(slots.slot_bytes, pages(tensor, e, 1).bytes);
        slots.of.resize(size_t(n_expert()));
        // NORESERVE: most of it is never touched. No huge pages: they would reach past the budget.
        void * base = mmap(nullptr, reserved(slots), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) throw std::runtime_error(std::string("no address space for direct reads: ") + std::strerror(errno));
#ifdef MADV_NOHUGEPAGE
        madvise(base, reserved(slots), MADV_NOHUGEPAGE);
#endif
        slots.base = static_cast<uint8_t *>(base);
        all_empty(slots);
        slots_.push_back(std::move(slots));
    }

    void all_empty(Slots & slots) const {
        std::fill(slots.of.begin(), slots.of.end(), NOWHERE);
        slots.free.clear();
        slots.empty.clear();
        for (int s = n_expert(); s-- > 0;) slots.empty.push_back(s);
    }

    uint64_t  reserved(const Slots & slots) const { return uint64_t(n_expert()) * slots.slot_bytes; }
    uint8_t * slot(const Slots & slots, int32_t s) const { return slots.base + uint64_t(s) * slots.slot_bytes; }

    int32_t take(Slots & slots) {
        auto &        from = slots.free.empty() ? slots.empty : slots.free;
        const int32_t s    = from.back();
        if (slots.free.empty()) {
            resident_bytes_ += slots.slot_bytes;
            // this expert may end a page earlier than the slot does, the next one not: a slot is in memory as a whole
            *static_cast<volatile uint8_t *>(slot(slots, s) + slots.slot_bytes - 1) = 0;
        }
        from.pop_back();
        return s;
    }

    int read_piece(const PageRun & piece) const {
        const auto     file   = size_t(piece.file);
        const uint64_t wanted = std::min(piece.bytes, sizes_[file] - piece.offset); // the last page reaches past the end of the file
        for (uint64_t at = 0; at < wanted;) {
            const ssize_t n = pread(direct_[file], piece.address + at, piece.bytes - at, off_t(piece.offset + at));
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) return errno;
            if (n == 0) return ENODATA; // somebody has made the file shorter
            at += uint64_t(n);
        }
        return 0;
    }

    void release() {
        for (const Slots & slots : slots_) munmap(slots.base, reserved(slots));
        for (int fd : direct_) close(fd);
    }

    std::vector<int>      direct_;
    std::vector<uint64_t> sizes_; // of the files, bytes
    std::vector<Slots>    slots_; // [tensor]
};

} // namespace

std::unique_ptr<Store> make_direct_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                         const std::vector<ExpertTensor> & tensors) {
    return std::make_unique<DirectStore>(files, n_layers, n_expert, tensors);
}

} // namespace cacheroute
