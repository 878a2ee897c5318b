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
    void require(int layer, const Mask & needed, const Mask & cached);

    // Begins to read experts of a layer that are not in memory, before it is known whether they are needed.
    void prefetch(int layer, const std::vector<int32_t> & experts);

    // Waits for all reads and drops what the last batch needed beyond the budget. Throws std::runtime_error when a read failed.
    void finish();

    // Memory holds the cache of that layer and nothing else. Returns when it does; throws as finish().
    void follow(int layer, const Mask & cached);

    // Drops everything, from the page cache too.
    void clear();

    Store *  store() { return store_.get(); } // null: none
    const Store * store() const { return store_.get(); }
    Counters counters() const { return store_ ? store_->counters() : Counters{}; }

  private:
    void exchange(int layer, const Mask & wanted, const Mask * needed);

    std::unique_ptr<Store> store_;
    std::vector<Mask>      in_memory_; // [layer]
    int                    over_ = -1; // layer whose batch needs more than its cache holds
    Mask                   over_cached_, wanted_;
    std::vector<int32_t>   load_, evict_, hits_;
};

} // namespace cacheroute
