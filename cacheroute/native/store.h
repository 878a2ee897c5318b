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
    uint8_t * address;      // of expert 0 in memory: the mapping that llama.cpp computes on
};

struct StoreCounters {
    uint64_t read_bytes = 0; // asked of the device, whole pages
    uint64_t reads      = 0; // experts made resident
    uint64_t read_ns    = 0; // time the caller waited for them
    uint64_t evict_ns   = 0; // of that, spent on evicting
};

constexpr uint64_t UNKNOWN_BYTES = UINT64_MAX;

class Store {
  public:
    virtual ~Store() = default;

    // Makes `load` resident and drops `evict` (experts of one layer). Blocks until the loaded bytes are in memory. Called from
    // one thread at a time, the one that computes. Throws std::runtime_error when the device fails.
    virtual void exchange(int layer, const std::vector<int32_t> & load, const std::vector<int32_t> & evict) = 0;

    // Drops everything, from the page cache too.
    virtual void clear() = 0;

    // Bytes held by resident experts as the store has counted them, whole pages. Any thread.
    virtual uint64_t resident_bytes() const = 0;

    // Bytes of all expert tensors that are in memory as the kernel says (mincore); UNKNOWN_BYTES where it does not tell.
    // Slow: any thread, not in a token.
    virtual uint64_t measure_resident() const = 0;

    // Paces reads to a slower flash: a read of n bytes takes at least n / bytes_per_second. 0: as fast as it goes.
    virtual void set_pace(double bytes_per_second) = 0;

    virtual StoreCounters counters() const = 0;
};

// Experts stay in the files' mappings; loading is read-ahead into the page cache, evicting drops the pages from the
// process and from the page cache.
std::unique_ptr<Store> make_mmap_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                       const std::vector<ExpertTensor> & tensors);

// Experts live in anonymous memory laid over the mappings, at the same addresses; loading is O_DIRECT reads by a few
// threads, evicting gives the pages back. The mappings return with the store's end. Throws where the filesystem
// has no direct reads.
std::unique_ptr<Store> make_direct_store(const std::vector<std::string> & files, int n_layers, int n_expert,
                                         const std::vector<ExpertTensor> & tensors);

} // namespace cacheroute
