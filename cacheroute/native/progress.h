// How far a prompt has come and what it has used: written by the hook, read by any thread.
#pragma once

#include "cacheroute.h"
#include "store.h"

#include <atomic>
#include <cstdint>
#include <vector>

namespace cacheroute {

class Progress {
  public:
    Progress(size_t n_layers, size_t n_expert) : used_(n_layers, std::vector<uint8_t>(n_expert, 0)) {}

    // A prompt begins with that token of its sequence.
    void begin(uint32_t token, const Store * store);

    // Those tokens, a micro-batch, have chosen their experts in a layer, and the reads for them have been asked for.
    void chose(int layer, uint32_t first_token, uint32_t n_tokens, const Store * store);

    // The last layer of that micro-batch has been computed.
    void computed(uint32_t first_token, uint32_t n_tokens);

    // Experts [E] 0/1 that a layer runs. Returns the bytes of those among them that it has not run since begin().
    uint64_t use(int layer, const std::vector<uint8_t> & experts, const Store * store);

    cr_progress get(const Store * store) const; // any thread

  private:
    std::vector<std::vector<uint8_t>> used_;           // [layer][E] 0/1 since begin()
    uint32_t                          first_token_ = 0; // of the prompt
    std::atomic<uint64_t>             begun_{0}, done_{0};
    std::atomic<uint64_t>             asked_before_{0}, read_before_{0}; // the store's counts at begin()
    std::atomic<uint64_t>             asked_{0}, layer_asked_{0};        // since then, and by the layer that chose last
};

} // namespace cacheroute
