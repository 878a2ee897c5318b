// Experts in the page cache, through the mapping that llama.cpp made: the default and the reference.
#include "backend.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <unordered_map>
#include <utility>

#include <sys/mman.h>

// Older libc headers (Android's among them) lack the names; a kernel without the call answers EINVAL.
#ifdef __linux__
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#endif

namespace cacheroute {
namespace {

constexpr int      N_READERS = 2;         // they wait for pages that the device already reads
constexpr uint64_t PIECE     = 128 << 10; // the kernel cuts a larger request down to its read-ahead window, 128 KiB on phones

class MappedBackend final : public Backend {
  public:
    explicit MappedBackend(const ExpertFiles & files) : files_(files) {
        // no read-around: a fault next to an expert must not read its neighbours
        for (const PageRun & r : files_.all_pages()) madvise(r.address, r.bytes, MADV_RANDOM);
    }

    int      n_readers() const override { return N_READERS; }
    uint64_t piece_bytes() const override { return PIECE; }
    bool     shares_pages() const override { return true; }

    // Notes the pages that no resident expert has, and asks the device for all of them at once.
    PageRun admit(size_t tensor, int32_t e, Urgency urgency) override {
        PageRun unread = files_.pages(tensor, e, 1);
        shared_pages(tensor, e, unread, [&](uintptr_t page) {
            if (users_[page]++ > 0) cut_page(unread, page);
        });
        resident_bytes_ += unread.bytes;
        if (urgency != Urgency::needed) return unread; // may be cancelled, and a request to the device cannot be
        for (uint64_t at = 0; at < unread.bytes; at += PIECE) {
            madvise(unread.address + at, std::min(PIECE, unread.bytes - at), MADV_WILLNEED);
        }
        return unread;
    }

    // Counted out in trim(), when what is admitted meanwhile has been counted in: a page that both have stays.
    void evict(size_t tensor, int32_t e, bool) override { leaving_.push_back({tensor, e}); }

    void trim() override {
        for (const auto & [tensor, e] : leaving_) {
            PageRun unused = files_.pages(tensor, e, 1);
            shared_pages(tensor, e, unused, [&](uintptr_t page) {
                const auto it = users_.find(page);
                if (it != users_.end() && --it->second == 0) {
                    users_.erase(it);
                } else {
                    cut_page(unused, page);
                }
            });
            resident_bytes_ -= unused.bytes;
            if (unused.bytes) files_.drop(unused);
        }
        leaving_.clear();
    }

    bool reuses() const override { return false; }

    bool trim_needs_idle_readers() const override { return true; }

    bool reclaimable() const override { return files_.mincore_reliable(); }

    PageRun missing(size_t tensor, int32_t e) const override {
        const PageRun run   = files_.pages(tensor, e, 1);
        const auto    there = files_.present(run.address, run.bytes);
        const auto    first = std::find(there.begin(), there.end(), false);
        if (first == there.end()) return {};
        const auto     last = std::find(there.rbegin(), there.rend(), false);
        const uint64_t head = uint64_t(first - there.begin()) * files_.page_bytes();
        const uint64_t tail = uint64_t(last - there.rbegin()) * files_.page_bytes();
        return {run.file, run.offset + head, run.address + head, run.bytes - head - tail};
    }

    void keep_room(const std::vector<size_t> &, size_t) override {} // the page cache has no slots

    int read(const PageRun & r) override {
#ifdef __linux__
        madvise(r.address, r.bytes, MADV_WILLNEED); // in one request what has not been asked for yet
        int failed;
        do {
            failed = madvise(r.address, r.bytes, MADV_POPULATE_READ) == 0 ? 0 : errno;
        } while (failed == EINTR);
        // what the kernel does not have, or not now, is done by touching; EFAULT: a page cannot be read
        if (failed != EINVAL && failed != ENOSYS && failed != EPERM && failed != EAGAIN) return failed == EFAULT ? EIO : failed;
#endif
        for (uint64_t at = 0; at < r.bytes; at += files_.page_bytes()) {
            (void) *static_cast<volatile uint8_t *>(r.address + at);
        }
        return 0;
    }

    const void * address(size_t tensor, int32_t e) const override {
        return files_.tensors()[tensor].address + uint64_t(e) * files_.tensors()[tensor].expert_bytes;
    }

    void clear() override {
        users_.clear();
        leaving_.clear();
        for (const PageRun & r : files_.all_pages()) files_.drop(r);
        resident_bytes_ = 0;
    }

    uint64_t resident_bytes() const override { return resident_bytes_; }

    uint64_t measure() const override { return files_.mapped_in_memory(); }

  private:
    // Calls f for the first and the last page of an expert where it covers them only in part: neighbours share them. f may cut
    // pages off `run`.
    template <typename F> void shared_pages(size_t tensor, int32_t e, const PageRun & run, F f) const {
        const ExpertTensor & t    = files_.tensors()[tensor];
        const auto           from = reinterpret_cast<uintptr_t>(t.address) + uint64_t(e) * t.expert_bytes;
        const auto           lo   = reinterpret_cast<uintptr_t>(run.address);
        const auto           end  = lo + run.bytes;
        const auto           last = end - files_.page_bytes();
        const bool head = from != lo, tail = from + t.expert_bytes != end;
        if (head) f(lo);
        if (tail && !(head && last == lo)) f(last);
    }

    void cut_page(PageRun & r, uintptr_t page) const {
        r.bytes -= files_.page_bytes();
        if (page == reinterpret_cast<uintptr_t>(r.address)) {
            r.address += files_.page_bytes();
            r.offset += files_.page_bytes();
        }
    }

    const ExpertFiles &                     files_;
    std::unordered_map<uintptr_t, uint32_t> users_; // resident experts that have a page which is not one's alone
    std::vector<std::pair<size_t, int32_t>> leaving_;
    std::atomic<uint64_t>                   resident_bytes_{0};
};

} // namespace

std::unique_ptr<Backend> make_mapped_backend(const ExpertFiles & files) { return std::make_unique<MappedBackend>(files); }

} // namespace cacheroute
