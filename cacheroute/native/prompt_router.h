// Prompts that keep to few experts: which experts of a layer the tokens of a micro-batch may run. Knows scores and masks only.
//
// A batch needs every expert that one of its tokens chooses, which is nearly all of them. But a token can be served by an expert
// that is in memory, or that is read for others anyway (the thought is of arXiv 2511.02237, for batched decoding on GPUs).
#pragma once

#include "router.h"

#include <cstdint>
#include <vector>

namespace cacheroute {

// Of one batch in one layer: begin(), add() each token, allowed(). Not thread-safe.
class PromptRouter {
  public:
    PromptRouter(int n_expert, int n_used);

    void begin();

    // One token: each of its K best experts gains that expert's share of the mass of all K. `model_ids`: [K] the model's own K
    // best; null: ranked here, ties to the lower index. `spared`: its K best are allowed whatever their mass.
    void add(const Scores & scores, const int32_t * model_ids, bool spared);

    // [E] 0/1: the resident ones and those of spared tokens, then those with most mass (ties: the lower index) until the allowed
    // ones carry a share `cover` of all of it, and are K or more. Valid until the next begin().
    const std::vector<uint8_t> & allowed(const std::vector<uint8_t> & resident, double cover);

  private:
    const int            n_used_;
    std::vector<double>  mass_; // [E] sum over the tokens
    std::vector<uint8_t> spared_, allowed_;
    std::vector<int32_t> order_;
};

} // namespace cacheroute
