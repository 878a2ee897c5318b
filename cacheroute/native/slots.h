// Where the bytes of resident experts are and how they get there: slots of anonymous memory, read past the page cache or through it.
// A slot is faulted in once and then passed from the evicted expert to the admitted one, so that a miss costs the read and
// nothing else. Called by the store alone, from one thread at a time, except where said.
#pragma once

#include "expert_files.h"

#include <atomic>
#include <mutex>
#include <vector>

namespace cacheroute {

// How soon an expert is needed: now, by the next layer of a prompt, or perhaps by the next layer of a decoded token. The last two may
// be cancelled before their reads begin.
enum class Urgency { needed, ahead, prefetch };

// Past the page cache (O_DIRECT), or through it: what was read is dropped from it at once, so that the next miss reads, too.
enum class Reading : int32_t { buffered = 0, direct = 1 };

class Slots {
  public:
    static constexpr int      N_READERS = 4;         // 2 to 4 saturate a flash; io_uring would save processor time only
    static constexpr uint64_t PIECE     = 256 << 10; // of one read: small enough to share an expert among the readers

    // Throws std::runtime_error where the filesystem does not read as asked.
    Slots(const ExpertFiles & files, Reading reading);
    ~Slots() { release_all(); }
    Slots(const Slots &)             = delete;
    Slots & operator=(const Slots &) = delete;

    // Gives the expert a slot and returns what must be read into it.
    PageRun admit(size_t tensor, int32_t e, Urgency urgency);

    // The expert is gone. Its slot is kept until trim(), for what is admitted meanwhile, unless it has not been read to its end.
    void evict(size_t tensor, int32_t e, bool complete);

    // Frees the memory of evicted experts that has not been reused.
    void trim();

    // Room for so many experts of these tensors is kept when they are evicted: prefetches come and go. Until the next of them
    // none is kept after keep_no_room().
    void keep_room(const std::vector<size_t> & tensors, size_t n_experts);
    void keep_no_room();

    // Reads pages into memory. 0 or an errno. Called by several reader threads.
    int read(const PageRun & piece) const;

    // Where the bytes of an expert are. Any thread that computes.
    const void * address(size_t tensor, int32_t e) const;

    void clear(); // evicts everything

    uint64_t resident_bytes() const { return resident_bytes_; } // as counted, whole pages. Any thread.
    uint64_t measure() const;                                   // as the kernel says; UNKNOWN_BYTES where it does not

  private:
    // Slots of one size, for all tensors whose experts have it: room for every expert, memory for those that are there.
    struct Pool {
        uint64_t               slot_bytes = 0; // whole pages, enough for any expert wherever it begins in its first page
        uint64_t               n_slots    = 0;
        uint8_t *              base       = nullptr;
        std::vector<uint8_t *> free;      // in memory, and unassigned
        std::vector<uint8_t *> empty;     // not in memory, the first one last
        size_t                 spare = 0; // so many free slots stay in memory

        uint64_t bytes() const { return n_slots * slot_bytes; }
    };

    void      open_direct(const std::string & name);
    void      probe(size_t file, const std::string & name) const;
    void      probe(const PageRun & run, const std::string & name) const;
    size_t    find_pool(size_t tensor);
    void      reserve(Pool & pool);
    void      all_empty(Pool & pool) const;
    void      give_back(uint64_t bytes);
    uint8_t * take(Pool & pool, Urgency urgency);
    void      release(Pool & pool, uint8_t * slot);
    void      release_all();

    const ExpertFiles &    files_;
    const Reading          reading_;
    std::vector<int>       direct_; // descriptors, one for each file where reads are direct
    std::vector<Pool>      pools_;
    std::vector<size_t>    pool_of_; // [tensor]
    std::vector<uint8_t *> slot_;    // [tensor][E] where the expert is, or null
    std::atomic<uint64_t>  resident_bytes_{0};
    // Experts share pages, and readers that drop the same page at the same time would each find it in use by the other and leave it.
    mutable std::mutex     drop_;
};

} // namespace cacheroute
