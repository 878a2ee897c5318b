// What all stores share: which pages experts hold, alone or with a neighbour, and the pace of reads.
#pragma once

#include "store.h"

#include <atomic>
#include <chrono>
#include <unordered_map>

namespace cacheroute {

// Whole pages of one file and where they are mapped.
struct PageRun {
    int       file;
    uint64_t  offset; // in the file, a multiple of the page size
    uint8_t * address;
    uint64_t  bytes;
};

class PagedStore : public Store {
  public:
    PagedStore(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors);
    ~PagedStore() override;

    void          exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) override;
    void          clear() override;
    uint64_t      resident_bytes() const override { return resident_bytes_; }
    uint64_t      measure_resident() const override;
    void          set_pace(double bytes_per_second) override { pace_ = bytes_per_second; }
    StoreCounters counters() const override { return counters_; }

  protected:
    virtual void start_reading(const std::vector<PageRun> & runs)  = 0;
    virtual void finish_reading(const std::vector<PageRun> & runs) = 0; // blocks until the bytes are there
    virtual void drop(const PageRun & run)                         = 0;
    virtual bool mincore_tells() const                             = 0;

    // The pages of all expert tensors, each once.
    const std::vector<PageRun> & all_pages() const { return all_; }
    int                          file(const PageRun & run) const { return fds_[run.file]; }
    const std::vector<int> &     file_descriptors() const { return fds_; }
    uint64_t                     page_bytes() const { return page_; }

  private:
    PageRun pages(const ExpertTensor & t, int first, int n) const;
    template <typename F> void shared_pages(const ExpertTensor & t, int32_t e, const PageRun & r, F f) const;
    void hold(const ExpertTensor & t, int32_t e);
    void release(const ExpertTensor & t, int32_t e);
    void pace(std::chrono::steady_clock::time_point start, uint64_t bytes);

    const int                                n_expert_;
    const uint64_t                           page_;
    std::vector<int>                         fds_;
    std::vector<std::vector<size_t>>         layers_; // tensors of each layer
    const std::vector<ExpertTensor>          tensors_;
    std::vector<PageRun>                     all_;
    std::unordered_map<uintptr_t, uint32_t>  shared_; // experts that hold a page which is not one's alone
    std::vector<PageRun>                     runs_;   // to read in this exchange
    std::atomic<uint64_t>                    resident_bytes_{0};
    double                                   pace_ = 0;
    std::chrono::steady_clock::time_point    deadline_{};
    StoreCounters                            counters_;
};

} // namespace cacheroute
