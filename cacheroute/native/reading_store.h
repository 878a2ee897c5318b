// What all stores share: the files, where each expert is in them, and reads that go on while others compute.
#pragma once

#include "readers.h"
#include "store.h"

namespace cacheroute {

class ReadingStore : public Store {
  public:
    ReadingStore(const std::vector<std::string> & files, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors);
    ~ReadingStore() override;

    void          exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) override;
    void          prefetch(int layer, const std::vector<int32_t> & experts) override;
    void          finish() override;
    const void *  find(const void * expert, bool late) override;
    void          clear() override;
    uint64_t      resident_bytes() const override { return resident_bytes_; }
    uint64_t      measure_resident() const override;
    void          set_pace(double bytes_per_second) override { readers_->set_pace(bytes_per_second); }
    StoreCounters counters() const override;

  protected:
    // Before the reads: brings the experts into the books and calls read() for what is missing of them.
    virtual void begin(const std::vector<size_t> & tensors, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) = 0;
    // Gives back what nobody holds any more. A device that was told in begin() is at work.
    virtual void drop(const std::vector<size_t> & tensors, const std::vector<int32_t> & evict) = 0;
    // Whether drop() wants no thread at work: a fault of theirs maps what the page cache has around it, and what is mapped in that
    // moment cannot be dropped.
    virtual bool         drops_in_quiet() const                   = 0;
    virtual void         drop_all()                               = 0;
    virtual const void * address(size_t tensor, int32_t e) const  = 0;
    virtual uint64_t     measure() const                          = 0; // after all reads

    // Derived classes start the threads in their constructor and join them in their destructor: they call into them.
    void start_readers(int n_threads, uint64_t piece_bytes, Readers::Read read);
    void stop_readers() { readers_.reset(); }
    void read(size_t tensor, int32_t e, const PageRun & run);
    bool ahead() const { return reading_ahead_; } // begin() is for a prefetch, which may be cancelled
    // Experts of earlier prefetches that are neither chosen nor gone.
    size_t n_ahead() const { return guesses_.size() + cancelled_.size(); }

    PageRun                            pages(size_t tensor, int first, int n) const; // that these experts touch in the mapping
    int                                n_expert() const { return n_expert_; }
    const std::vector<ExpertTensor> &  tensors() const { return tensors_; }
    const std::vector<PageRun> &       all_pages() const { return all_; } // of all expert tensors, each once
    int                                file(const PageRun & run) const { return fds_[size_t(run.file)]; }
    const std::vector<int> &           file_descriptors() const { return fds_; }
    uint64_t                           page_bytes() const { return page_; }
    std::atomic<uint64_t>              resident_bytes_{0};

    static uint64_t in_memory(const void * address, uint64_t bytes, uint64_t page); // mincore; UNKNOWN_BYTES

  private:
    struct Expert {
        Left left{0};
        bool late = false; // on its way at the last exchange
    };
    struct Guess {
        int     layer;
        int32_t expert;
    };
    Expert & state(size_t tensor, int32_t e) { return experts_[tensor * size_t(n_expert_) + size_t(e)]; }
    void     keep_guesses(int layer, std::vector<int32_t> & evict);
    void     bury(int layer, const std::vector<int32_t> & wanted);
    void     let_go(const std::vector<size_t> & tensors, const std::vector<int32_t> & evict);

    const int                        n_expert_;
    const uint64_t                   page_;
    std::vector<int>                 fds_;
    std::vector<std::vector<size_t>> layers_;     // tensors of each layer
    const std::vector<ExpertTensor>  tensors_;
    std::vector<size_t>              by_address_; // tensors, ascending
    std::vector<PageRun>             all_;
    std::vector<Expert>              experts_;    // [tensor][E]
    std::vector<Expert *>            late_;
    std::vector<Guess>               guesses_;    // prefetched, and no exchange of their layer since
    std::vector<Guess>               cancelled_;  // evicted while a part of them is being read
    bool                             reading_ahead_ = false;
    std::vector<int32_t>             leaving_;
    std::unique_ptr<Readers>         readers_;
    uint64_t                         piece_bytes_ = 0;
    StoreCounters                    counters_;
};

} // namespace cacheroute
