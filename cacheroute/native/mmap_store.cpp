// Experts in the page cache, through the mapping that llama.cpp made: the default and the reference.
#include "paged_store.h"

#include <algorithm>

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

class MmapStore final : public PagedStore {
  public:
    MmapStore(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors)
        : PagedStore(files, n_layers, n_expert, tensors) {
        // no read-around: a fault next to an expert must not read its neighbours
        for (const PageRun & r : all_pages()) madvise(r.address, r.bytes, MADV_RANDOM);
        for (int fd : file_descriptors()) {
            struct stat s {};
            // to others, who could not write it either, the kernel says of every page that it is in memory
            tells_ = tells_ && fstat(fd, &s) == 0 && (geteuid() == 0 || geteuid() == s.st_uid);
        }
    }

  protected:
    void start_reading(const std::vector<PageRun> & runs) override {
        // The kernel cuts a larger request down to its read-ahead window, 128 KiB on phones.
        constexpr uint64_t PIECE = 128 << 10;
        for (const PageRun & r : runs) {
            for (uint64_t at = 0; at < r.bytes; at += PIECE) {
                madvise(r.address + at, std::min(PIECE, r.bytes - at), MADV_WILLNEED);
            }
        }
    }

    void finish_reading(const std::vector<PageRun> & runs) override {
        for (const PageRun & r : runs) {
#ifdef __linux__
            if (madvise(r.address, r.bytes, MADV_POPULATE_READ) == 0) continue;
#endif
            for (uint64_t at = 0; at < r.bytes; at += page_bytes()) {
                (void) *static_cast<volatile uint8_t *>(r.address + at);
            }
        }
    }

    void drop(const PageRun & r) override {
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

    bool mincore_tells() const override { return tells_; }

  private:
    bool tells_ = true;
};

} // namespace

std::unique_ptr<Store> make_mmap_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                       const std::vector<ExpertTensor> & tensors) {
    return std::make_unique<MmapStore>(files, n_layers, n_expert, tensors);
}

} // namespace cacheroute
