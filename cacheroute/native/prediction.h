// A prediction of the next MoE layer's scores: its own router, applied to the hidden state that this layer's router was given.
// Made while this layer computes. Knows no cache and no files.
#pragma once

#include <cstdint>
#include <vector>

namespace cacheroute {

// Of one MoE layer; the memory is the model's.
struct RouterWeights {
    const float * weight = nullptr; // [E][n_embd]; null: the layer cannot be predicted
    const float * bias   = nullptr; // [E] or null
    const float * norm   = nullptr; // [n_embd] of the norm before the router, or null
    const float * selection_bias = nullptr; // [E] added to the probabilities for the choice alone (DeepSeek V3), or null
};

class Prediction {
  public:
    Prediction(int n_expert, int n_embd, std::vector<RouterWeights> layers);

    // Scores [E] of layer + 1, or null where its router is not known: logits, and with a selection bias what the layer ranks in
    // their place. No group is masked. `hidden`: [n_embd], normed for `layer`; `gating` of that layer (expert_event.h).
    const std::vector<float> * scores(int layer, const float * hidden, int gating);

    int n_embd() const { return n_embd_; }

  private:
    const int                        n_embd_;
    const std::vector<RouterWeights> layers_;
    std::vector<float>               hidden_, scores_;
};

} // namespace cacheroute
