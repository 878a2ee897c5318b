#include "expert_files.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace cacheroute {

ExpertFiles::ExpertFiles(const std::vector<std::string> & names, int n_layers, int n_expert,
                         const std::vector<ExpertTensor> & tensors)
    : n_expert_(n_expert), page_(os::page_bytes()), names_(names), tensors_(tensors), layers_(size_t(n_layers)) {
    for (const auto & name : names) {
        const int fd = open(name.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd >= 0) fds_.push_back(fd);
        struct stat s {};
        if (fd < 0 || fstat(fd, &s) != 0) {
            const std::string why = std::strerror(errno);
            for (int opened : fds_) close(opened);
            throw std::runtime_error("cannot open " + name + ": " + why);
        }
        sizes_.push_back(uint64_t(s.st_size));
        // for a file of another user that may not be written, the kernel reports every page as in memory
        mincore_reliable_ = mincore_reliable_ && (geteuid() == 0 || geteuid() == s.st_uid);
        // pages that were just written are dirty, and dirty pages cannot be dropped
        fsync(fd);
    }
    std::vector<PageRun> whole;
    for (size_t t = 0; t < tensors_.size(); t++) {
        layers_.at(size_t(tensors_[t].layer)).push_back(t);
        by_address_.push_back(t);
        whole.push_back(pages(t, 0, n_expert_));
    }
    std::sort(by_address_.begin(), by_address_.end(), [&](size_t a, size_t b) { return tensors_[a].address < tensors_[b].address; });
    // tensors that follow each other in the file share a page
    std::sort(whole.begin(), whole.end(), [](const PageRun & a, const PageRun & b) { return a.address < b.address; });
    for (const PageRun & r : whole) {
        if (!all_.empty() && r.file == all_.back().file && r.address <= all_.back().address + all_.back().bytes) {
            PageRun & last = all_.back();
            last.bytes     = std::max(last.bytes, uint64_t(r.address + r.bytes - last.address));
        } else {
            all_.push_back(r);
        }
    }
    for (const PageRun & r : all_) guards_.push_back(std::make_unique<BusGuard>(r.address, r.bytes));
}

ExpertFiles::~ExpertFiles() {
    for (int fd : fds_) close(fd);
}

bool ExpertFiles::locate(const void * address, size_t & tensor, int32_t & e) const {
    const auto * at = static_cast<const uint8_t *>(address);
    const auto   after =
        std::upper_bound(by_address_.begin(), by_address_.end(), at, [&](const uint8_t * a, size_t t) { return a < tensors_[t].address; });
    if (after == by_address_.begin()) return false;
    tensor              = *(after - 1);
    const uint64_t i = uint64_t(at - tensors_[tensor].address) / tensors_[tensor].expert_bytes;
    e                   = int32_t(i);
    return i < uint64_t(n_expert_);
}

PageRun ExpertFiles::pages(size_t tensor, int first, int n) const {
    const ExpertTensor & t    = tensors_[tensor];
    const auto           base = reinterpret_cast<uintptr_t>(t.address);
    const auto           from = base + uint64_t(first) * t.expert_bytes;
    const uint64_t       lo   = from & ~(page_ - 1);
    const uint64_t       hi   = (from + uint64_t(n) * t.expert_bytes + page_ - 1) & ~(page_ - 1);
    return {t.file, t.offset + lo - base, reinterpret_cast<uint8_t *>(lo), hi - lo};
}

void ExpertFiles::drop(const PageRun & r) const { os::drop_mapped(fds_[size_t(r.file)], r.offset, r.address, r.bytes); }

void ExpertFiles::drop_unmapped() const {
    for (int fd : fds_) os::drop_cached(fd, 0, 0);
}

bool ExpertFiles::bus_error() const {
    return std::any_of(guards_.begin(), guards_.end(), [](const auto & guard) { return guard->hit(); });
}

bool ExpertFiles::shorter() const {
    for (size_t i = 0; i < fds_.size(); i++) {
        struct stat s {};
        if (fstat(fds_[i], &s) == 0 && uint64_t(s.st_size) < sizes_[i]) return true;
    }
    return false;
}

uint64_t ExpertFiles::in_file(const PageRun & run) const {
    const uint64_t size = sizes_[size_t(run.file)];
    return std::min(run.bytes, size - std::min(size, run.offset));
}

uint64_t ExpertFiles::mapped_in_memory() const {
    if (!mincore_reliable_) return UNKNOWN_BYTES;
    uint64_t bytes = 0;
    for (const PageRun & r : all_) {
        const uint64_t n = os::in_memory(r.address, r.bytes);
        if (n == UNKNOWN_BYTES) return n;
        bytes += n;
    }
    return bytes;
}

} // namespace cacheroute
