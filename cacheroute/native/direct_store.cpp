// Experts in anonymous memory at the very addresses of the mapping, read past the page cache.
#include "paged_store.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>

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

class DirectStore final : public PagedStore {
  public:
    DirectStore(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors)
        : PagedStore(files, n_layers, n_expert, tensors) {
        for (const auto & name : files) {
            const int fd = O_DIRECT ? open(name.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT) : -1;
            struct stat s {};
            if (fd < 0 || !reads(fd) || fstat(fd, &s) != 0) {
                if (fd >= 0) close(fd);
                close_files();
                throw std::runtime_error("the filesystem of " + name + " has no direct reads");
            }
            direct_.push_back(fd);
            sizes_.push_back(uint64_t(s.st_size));
        }
        for (const PageRun & r : all_pages()) {
            // NORESERVE: most of it is never touched. No huge pages: they would reach into neighbours and past the budget.
            if (mmap(r.address, r.bytes, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) ==
                MAP_FAILED) {
                const std::string why = std::strerror(errno);
                restore();
                close_files();
                throw std::runtime_error("no address space for direct reads: " + why);
            }
#ifdef MADV_NOHUGEPAGE
            madvise(r.address, r.bytes, MADV_NOHUGEPAGE);
#endif
        }
        for (int i = 0; i < N_READERS; i++) readers_.emplace_back([this] { read_loop(); });
    }

    ~DirectStore() override {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto & reader : readers_) reader.join();
        restore();
        close_files();
    }

  protected:
    void start_reading(const std::vector<PageRun> & runs) override {
        if (runs.empty()) return;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (const PageRun & r : runs) {
                for (uint64_t at = 0; at < r.bytes; at += PIECE) {
                    queue_.push_back({r.file, r.offset + at, r.address + at, std::min(PIECE, r.bytes - at)});
                    pending_++;
                }
            }
        }
        wake_.notify_all();
    }

    void finish_reading(const std::vector<PageRun> &) override {
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
        if (error_) {
            const int error = error_;
            error_          = 0;
            throw std::runtime_error(std::string("reading experts failed: ") + std::strerror(error));
        }
    }

    void drop(const PageRun & r) override { madvise(r.address, r.bytes, MADV_DONTNEED); }

    bool mincore_tells() const override { return true; } // anonymous memory is ours

  private:
    bool reads(int fd) const {
        void * page = nullptr;
        if (posix_memalign(&page, page_bytes(), page_bytes()) != 0) return false;
        const bool ok = pread(fd, page, page_bytes(), 0) > 0;
        std::free(page);
        return ok;
    }

    void read_loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
            if (stop_) return;
            const PageRun piece = queue_.front();
            queue_.pop_front();
            lock.unlock();
            const int error = read_piece(piece);
            lock.lock();
            if (error) error_ = error;
            if (--pending_ == 0) done_.notify_all();
        }
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

    // The file's mapping again, as llama.cpp had made it.
    void restore() {
        for (const PageRun & r : all_pages()) {
            if (mmap(r.address, r.bytes, PROT_READ, MAP_FIXED | MAP_SHARED, file(r), off_t(r.offset)) == MAP_FAILED) std::abort();
        }
    }

    void close_files() {
        for (int fd : direct_) close(fd);
        direct_.clear();
    }

    std::vector<int>         direct_;
    std::vector<uint64_t>    sizes_; // of the files, bytes
    std::vector<std::thread> readers_;
    std::mutex               mutex_;
    std::condition_variable  wake_, done_;
    std::deque<PageRun>      queue_;
    uint64_t                 pending_ = 0;
    int                      error_   = 0;
    bool                     stop_    = false;
};

} // namespace

std::unique_ptr<Store> make_direct_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                         const std::vector<ExpertTensor> & tensors) {
    return std::make_unique<DirectStore>(files, n_layers, n_expert, tensors);
}

} // namespace cacheroute
