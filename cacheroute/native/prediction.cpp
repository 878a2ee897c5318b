#include "prediction.h"

#include "expert_event.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

namespace cacheroute {

Prediction::Prediction(int n_expert, int n_embd, std::vector<RouterWeights> layers)
    : n_embd_(n_embd), layers_(std::move(layers)), hidden_(size_t(n_embd)), scores_(size_t(n_expert)) {}

// As many partial sums as let a compiler use vector instructions without reordering floating-point sums.
static float dot(const float * a, const float * b, int n) {
    constexpr int LANES = 16;
    float         sums[LANES] = {};
    int           i           = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) sums[j] += a[i + j] * b[i + j];
    }
    float sum = 0.0f;
    for (float s : sums) sum += s;
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static float sqrt_softplus(float z) { return std::sqrt(z > 20.0f ? z : std::log1p(std::exp(z))); }

// Logits -> what the model's gating makes of them, plus the bias that is for the choice alone.
static void add_selection_bias(std::vector<float> & scores, const float * bias, int gating) {
    const float top = *std::max_element(scores.begin(), scores.end());
    const bool  own = gating == GATING_SIGMOID || gating == GATING_SQRT_SOFTPLUS; // of each expert by itself
    float       sum = 0.0f;
    for (float & s : scores) {
        s = gating == GATING_SIGMOID ? 1.0f / (1.0f + std::exp(-s)) : own ? sqrt_softplus(s) : std::exp(s - top);
        sum += s;
    }
    for (size_t e = 0; e < scores.size(); e++) scores[e] = (own ? scores[e] : scores[e] / sum) + bias[e];
}

const std::vector<float> * Prediction::scores(int layer, const float * hidden, int gating) {
    const size_t next = size_t(layer) + 1;
    if (next >= layers_.size() || !layers_[next].weight) return nullptr;
    const RouterWeights & own = layers_[next - 1];
    const RouterWeights & its = layers_[next];
    if (own.norm && its.norm) { // normed for the next layer
        for (int i = 0; i < n_embd_; i++) hidden_[size_t(i)] = own.norm[i] == 0.0f ? 0.0f : hidden[i] / own.norm[i] * its.norm[i];
        hidden = hidden_.data();
    }
    for (size_t e = 0; e < scores_.size(); e++) {
        scores_[e] = dot(its.weight + e * size_t(n_embd_), hidden, n_embd_) + (its.bias ? its.bias[e] : 0.0f);
    }
    if (its.selection_bias) add_selection_bias(scores_, its.selection_bias, gating);
    return &scores_;
}

} // namespace cacheroute
