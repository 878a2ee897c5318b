// The store: makes experts resident and gone. Knows bytes and pages; knows no probabilities and no llama.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace cacheroute {

// The experts of one tensor of one layer: `n_expert` byte ranges of equal size, one after the other.
struct ExpertTensor {
    int       layer;
    int       file;         // index into the files of the store
    uint64_t  offset;       // of expert 0 in the file, bytes
    uint64_t  expert_bytes;
    uint8_t * address;      // of expert 0 in memory: the mapping that llama.cpp made
};

struct StoreCounters {
    uint64_t read_bytes = 0; // asked of the device, whole pages
    uint64_t reads      = 0; // experts made resident
    uint64_t read_ns    = 0; // time that callers waited: for an exchange to begin, for an expert, for the last read
    uint64_t evict_ns   = 0; // of that, spent on evicting
    uint64_t ahead      = 0; // experts that prefetch() was asked for
    uint64_t ahead_used = 0; // of those, kept by the exchange that followed
};

constexpr uint64_t UNKNOWN_BYTES = UINT64_MAX;

class Store {
  public:
    virtual ~Store() = default;

    // Begins to make `load` resident, tensor by tensor as the layer computes on them, and drops `evict` (experts of one layer).
    // Returns when the reads are on their way; those of the exchange before it have ended. Called, like finish() and clear(),
    // from one thread at a time, and not while others are in find().
    virtual void exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) = 0;

    // Begins to read experts of a layer before its next exchange(), behind whatever is being read. They take memory until that
    // exchange, which neither loads those that are wanted nor waits for those that it evicts. Called as exchange() is.
    virtual void prefetch(int layer, const std::vector<int32_t> & experts) = 0;

    // Blocks until all reads have ended. Throws std::runtime_error when one has failed.
    virtual void finish() = 0;

    // Where the bytes of an expert are; `expert`: its place in the mapping. Any thread that computes, after exchange() and
    // before the next one, asks twice: with late = false for the experts that were resident at the exchange, with
    // late = true for those that are on their way. Null: the answer comes in the other round. Blocks, in the second, until the
    // bytes are there; after a read that failed they are not, and finish() says so.
    virtual const void * find(const void * expert, bool late) = 0;

    // Drops everything, from the page cache too.
    virtual void clear() = 0;

    // Bytes held by resident experts as the store has counted them, whole pages. Any thread.
    virtual uint64_t resident_bytes() const = 0;

    // Bytes of all experts that are in memory as the kernel says (mincore), after the reads under way; UNKNOWN_BYTES where it
    // does not tell. Slow: any thread, not in a token.
    virtual uint64_t measure_resident() const = 0;

    // Paces reads to a slower flash: a read of n bytes takes at least n / bytes_per_second. 0: as fast as it goes.
    virtual void set_pace(double bytes_per_second) = 0;

    virtual StoreCounters counters() const = 0;
};

// Experts stay in the files' mappings; loading is read-ahead into the page cache, evicting drops the pages from the
// process and from the page cache.
std::unique_ptr<Store> make_mmap_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                       const std::vector<ExpertTensor> & tensors);

// Experts live in slots of anonymous memory, that of an evicted expert taken by the next one; loading is O_DIRECT reads by
// a few threads. The mappings stay untouched. Throws where the filesystem has no direct reads.
std::unique_ptr<Store> make_direct_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                         const std::vector<ExpertTensor> & tensors);

} // namespace cacheroute
