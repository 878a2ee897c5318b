// Which experts of one layer are resident, and which one goes when there are too many. Knows no bytes.
#pragma once

#include "bytes.h"

#include <cstdint>
#include <vector>

namespace cacheroute {

enum class Eviction : int32_t {
    lru   = 0, // least recently used (the paper's)
    lfu   = 1, // least often used since the sequence began, prompt included, also before an earlier eviction; older use first among equals
    score = 2, // least running mean of the normalised router score
    belady = 3, // needed last: offline only, set_next_use() must be called
    soft_lfu = 4, // least often used of late, a near miss counting almost as a use
};

// One layer's cache of at most `capacity` experts. Not thread-safe.
class ExpertCache {
  public:
    // `n_used`: K of the router whose scores are observed.
    ExpertCache(int n_expert, int n_used, int capacity, Eviction eviction);

    // Every token passes here once: s_e += a * (v_e - s_e) over all experts, with
    // score: v_e = (z_e - min z) / (max z - min z); soft_lfu: v_e = sigmoid((z_e - z_(K)) / (w * (max z - min z))).
    void observe(const std::vector<double> & z);

    // belady: when the expert is needed next, in any unit; the latest goes first.
    void set_next_use(int32_t expert, int32_t next_use) { next_use_[expert] = next_use; }

    // Makes the expert resident and the most recent.
    void touch(int32_t expert);

    // Evicts down to the capacity, never one of `keep`; appends the evicted to `out`. `by_recency` overrides the eviction
    // policy (prompt: the last C distinct experts stay), but not belady.
    void trim(const std::vector<int32_t> & keep, bool by_recency, std::vector<int32_t> & out);

    void reset();

    // From now on trim() keeps so many; at least K of them.
    void set_capacity(int capacity) { capacity_ = capacity; }

    // The residents and what is known of all experts, as another cache of as many experts has it; this one's capacity stays, and
    // the residents above it leave.
    void resume(const ExpertCache & other);

    // All that a later token depends on, as bytes, and back into a cache of the same sizes; read() throws std::runtime_error for a
    // state that no cache comes to.
    void write(ByteWriter & out) const;
    void read(ByteReader & in);

    const std::vector<uint8_t> & resident() const { return resident_; }
    int size() const { return size_; }
    int capacity() const { return capacity_; }
    Eviction eviction() const { return eviction_; }
    bool goes_by_score() const { // a cache with room for all evicts none: no scores are kept for that
        return capacity_ < int(resident_.size()) && (eviction_ == Eviction::score || eviction_ == Eviction::soft_lfu);
    }

  private:
    bool goes_before(int32_t a, int32_t b, bool by_recency) const;

    int      n_used_, capacity_;
    Eviction eviction_;
    std::vector<uint8_t>  resident_;
    std::vector<uint64_t> last_use_;
    std::vector<uint64_t> n_uses_;
    std::vector<double>   score_, sorted_;
    std::vector<int32_t>  next_use_;
    uint64_t clock_ = 0;
    int      size_  = 0;
};

} // namespace cacheroute
