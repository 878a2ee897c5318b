// Experts in the page cache, through the mapping that llama.cpp made: the default and the reference.
#include "reading_store.h"

#include <algorithm>
#include <unordered_map>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// Older libc headers (Android's among them) lack the names; a kernel without the call answers EINVAL.
#ifdef __linux__
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#endif

namespace cacheroute {
namespace {

constexpr int      N_READERS = 2;         // they wait for pages that the device already reads
constexpr uint64_t PIECE     = 128 << 10; // the kernel cuts a larger request down to its read-ahead window, 128 KiB on phones

class MmapStore final : public ReadingStore {
  public:
    MmapStore(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors)
        : ReadingStore(files, n_layers, n_expert, tensors) {
        // no read-around: a fault next to an expert must not read its neighbours
        for (const PageRun & r : all_pages()) madvise(r.address, r.bytes, MADV_RANDOM);
        for (int fd : file_descriptors()) {
            struct stat s {};
            // to others, who could not write it either, the kernel says of every page that it is in memory
            tells_ = tells_ && fstat(fd, &s) == 0 && (geteuid() == 0 || geteuid() == s.st_uid);
        }
        start_readers(N_READERS, PIECE, [this](const PageRun & r) { return populate(r); });
    }

    ~MmapStore() override { stop_readers(); }

  protected:
    // Counted in before anything is counted out: a page that a new expert shares with one that goes stays.
    void begin(const std::vector<size_t> & tensors, const std::vector<int32_t> & load, const std::vector<int32_t> &) override {
        for (size_t t : tensors) {
            for (int32_t e : load) hold(t, e);
        }
    }

    void drop(const std::vector<size_t> & tensors, const std::vector<int32_t> & evict) override {
        for (size_t t : tensors) {
            for (int32_t e : evict) release(t, e);
        }
    }

    bool drops_in_quiet() const override { return true; }

    void drop_all() override {
        shared_.clear();
        for (const PageRun & r : all_pages()) drop(r);
    }

    const void * address(size_t tensor, int32_t e) const override {
        return tensors()[tensor].address + uint64_t(e) * tensors()[tensor].expert_bytes;
    }

    uint64_t measure() const override {
        if (!tells_) return UNKNOWN_BYTES;
        uint64_t bytes = 0;
        for (const PageRun & r : all_pages()) {
            const uint64_t n = in_memory(r.address, r.bytes, page_bytes());
            if (n == UNKNOWN_BYTES) return n;
            bytes += n;
        }
        return bytes;
    }

  private:
    // Notes the pages that nobody held before and has them read: the device starts on all of them at once.
    void hold(size_t tensor, int32_t e) {
        const PageRun r      = pages(tensor, e, 1);
        PageRun       unread = r;
        shared_pages(tensor, e, r, [&](uintptr_t page) {
            if (shared_[page]++ > 0) cut_page(unread, page);
        });
        if (!unread.bytes) return;
        resident_bytes_ += unread.bytes;
        // but not of what may be cancelled: nothing stops a device that has been told
        for (uint64_t at = 0; !ahead() && at < unread.bytes; at += PIECE) {
            madvise(unread.address + at, std::min(PIECE, unread.bytes - at), MADV_WILLNEED);
        }
        read(tensor, e, unread);
    }

    // Counts the expert out of its pages and drops those that nobody holds any more.
    void release(size_t tensor, int32_t e) {
        const PageRun r    = pages(tensor, e, 1);
        PageRun       free = r;
        shared_pages(tensor, e, r, [&](uintptr_t page) {
            auto it = shared_.find(page);
            if (it != shared_.end() && --it->second == 0) {
                shared_.erase(it);
            } else {
                cut_page(free, page);
            }
        });
        if (!free.bytes) return;
        resident_bytes_ -= free.bytes;
        drop(free);
    }

    // Calls f for the first and the last page of an expert where it has them only in part: those are shared.
    template <typename F> void shared_pages(size_t tensor, int32_t e, const PageRun & r, F f) const {
        const ExpertTensor & t    = tensors()[tensor];
        const auto           from = reinterpret_cast<uintptr_t>(t.address) + uint64_t(e) * t.expert_bytes;
        const auto           lo   = reinterpret_cast<uintptr_t>(r.address);
        const auto           last = lo + r.bytes - page_bytes();
        const bool head = from != lo, tail = from + t.expert_bytes != lo + r.bytes;
        if (head) f(lo);
        if (tail && !(head && last == lo)) f(last);
    }

    void cut_page(PageRun & r, uintptr_t page) const {
        r.bytes -= page_bytes();
        if (page == reinterpret_cast<uintptr_t>(r.address)) {
            r.address += page_bytes();
            r.offset += page_bytes();
        }
    }

    int populate(const PageRun & r) const {
#ifdef __linux__
        madvise(r.address, r.bytes, MADV_WILLNEED); // in one piece what nobody has told the device yet
        if (madvise(r.address, r.bytes, MADV_POPULATE_READ) == 0) return 0;
#endif
        for (uint64_t at = 0; at < r.bytes; at += page_bytes()) {
            (void) *static_cast<volatile uint8_t *>(r.address + at);
        }
        return 0;
    }

    void drop(const PageRun & r) {
#ifdef __linux__
        // PAGEOUT alone leaves pages inside large folios, the other two alone fail inside them too.
        madvise(r.address, r.bytes, MADV_PAGEOUT);
        madvise(r.address, r.bytes, MADV_DONTNEED);
        posix_fadvise(file(r), off_t(r.offset), off_t(r.bytes), POSIX_FADV_DONTNEED);
#else
        madvise(r.address, r.bytes, MADV_DONTNEED);
        msync(r.address, r.bytes, MS_INVALIDATE);
#endif
    }

    bool                                    tells_ = true;
    std::unordered_map<uintptr_t, uint32_t> shared_; // experts that hold a page which is not one's alone
};

} // namespace

std::unique_ptr<Store> make_mmap_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                       const std::vector<ExpertTensor> & tensors) {
    return std::make_unique<MmapStore>(files, n_layers, n_expert, tensors);
}

} // namespace cacheroute
