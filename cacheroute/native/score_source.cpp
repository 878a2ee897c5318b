#include "score_source.h"

#include "half.h"

#include <cmath>
#include <limits>

namespace cacheroute {

bool ScoreRows::read(size_t row, Scores & out) const {
    if (row >= n) return false;
    const uint16_t * own = z + row * n_expert;
    if (std::isnan(from_half(own[0]))) return false;
    out.read_back(own, mass ? mass + row * n_expert : nullptr, int(n_expert));
    return true;
}

// A softmax that nothing was added to: its logarithm is the router logits up to a constant. Masked experts are -inf.
static bool ranks_probabilities(const ExpertEvent & ev, const float * scores, const float * probs) {
    if (ev.gating != GATING_SOFTMAX) return false;
    if (scores == probs) return true;
    for (int e = 0; e < ev.n_expert; e++) {
        if (scores[e] != probs[e] && scores[e] != -std::numeric_limits<float>::infinity()) return false;
    }
    return true;
}

ScoreSource::Token ScoreSource::get(int layer, uint32_t token, const ExpertEvent & ev, int t) {
    const ScoreRows rows = forced_[size_t(layer)].rows();
    if (rows.n) {
        if (rows.read(token, scores_)) return {scores_, nullptr, false, !rows.mass};
        if (error_.empty()) {
            error_ = "the scores to replay have no token " + std::to_string(token + 1) + " in layer " + std::to_string(layer);
        }
    }
    const float * probs  = ev.probs + size_t(t) * size_t(ev.n_expert);
    const float * scores = ev.scores ? ev.scores + size_t(t) * size_t(ev.n_expert) : probs;
    scores_.fill(scores, probs, ev.n_expert, ranks_probabilities(ev, scores, probs), ev.gating == GATING_SOFTMAX_WEIGHT);
    const bool softmax = scores == probs && (ev.gating == GATING_SOFTMAX || ev.gating == GATING_SOFTMAX_WEIGHT);
    return {scores_, ev.ids + size_t(t) * size_t(ev.n_used), !ev.scores, softmax};
}

} // namespace cacheroute
