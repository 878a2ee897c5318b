// Which experts of each layer are in memory: those in its cache and, while a batch computes, those that the batch needs beyond
// the budget. Works out what must be read and what may leave; the store moves the bytes. Knows no scores.
#pragma once

#include "store.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace cacheroute {

using Mask = std::vector<uint8_t>; // [E] 0/1

class Residency {
  public:
    // `store` null: nothing is moved, experts are only counted.
    Residency(std::unique_ptr<Store> store, int n_layers, int n_expert);

    // The layer computes on `needed` next, and its cache is `cached`: begins to read what of both is missing, and drops the rest.
    // What the batch needs beyond the cache stays until another layer's turn, or finish().
    // `more`: prefetch() follows, and then settle().
    void require(int layer, const Mask & needed, const Mask & cached, bool more = false);

    // Begins to read experts of a layer that are not in memory, before it is known whether they are needed.
    void prefetch(int layer, const std::vector<int32_t> & experts, Urgency urgency);

    // After require(): what its layer and the layers before it have left is freed, unless prefetch() has taken it.
    void settle();

    bool     in_memory(int layer, int32_t e) const { return in_memory_[size_t(layer)][size_t(e)] != 0; }
    uint64_t expert_bytes(int layer) const { return store_ ? store_->bytes_of(layer, {1}) : 0; } // of one, in whole pages

    // The cache of a layer has become smaller: what has left it is dropped, where its turn has not begun. settle() frees the memory.
    void shrink(int layer, const Mask & cached);

    // Waits for all reads and drops what the last batch needed beyond the budget, and what was read for layers that had no turn.
    // Throws std::runtime_error when a read failed.
    void finish();

    // Memory holds the cache of that layer and nothing else. Returns when it does; throws as finish().
    void follow(int layer, const Mask & cached);

    // Drops everything, from the page cache too.
    void clear();

    Store *  store() { return store_.get(); } // null: none
    const Store * store() const { return store_.get(); }
    Counters counters() const { return store_ ? store_->counters() : Counters{}; }

  private:
    void exchange(int layer, const Mask & wanted, bool more = false);
    void release(int layer, const Mask & cached);

    std::unique_ptr<Store> store_;
    std::vector<Mask>      in_memory_; // [layer]
    int                    over_ = -1; // layer whose batch needs more than its cache holds
    Mask                   over_cached_, wanted_;
    int                    ahead_ = -1; // layer for which experts have been prefetched since its last turn
    Mask                   ahead_cached_; // what it had in memory before
    std::vector<int32_t>   load_, evict_;
};

} // namespace cacheroute
