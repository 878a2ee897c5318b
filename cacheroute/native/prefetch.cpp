#include "prefetch.h"

namespace cacheroute {

void Prefetch::after(int layer, uint32_t token, const ExpertEvent & ev, const ScoreSource & source,
                     std::vector<CachedRouter> & routers, Residency & residency) {
    const int next  = layer + 1;
    speculated_for_ = -1;
    if (next >= int(routers.size())) return;
    CachedRouter & router = routers[size_t(next)];
    if ((!n_ && !router.speculates()) || !predict(layer, token, ev, source)) return;
    if (router.speculates()) {
        experts_        = router.speculate(predicted_, speculated_);
        speculated_for_ = next;
    } else {
        experts_ = router.predict(predicted_);
        if (experts_.size() > n_) experts_.resize(n_);
    }
    if (!experts_.empty()) residency.prefetch(next, experts_, Urgency::prefetch);
}

// predicted_ of the layer after this one; false: it cannot be predicted.
bool Prefetch::predict(int layer, uint32_t token, const ExpertEvent & ev, const ScoreSource & source) {
    if (ev.n_embd != prediction_.n_embd()) return false;
    const ForcedScores & forced = source.forced(layer + 1);
    if (!forced.z.empty()) return forced.predicted_rows().read(token, predicted_); // the model's router cannot predict forced scores
    const auto * scores = prediction_.scores(layer, ev.hidden, ev.gating);
    if (scores) predicted_.fill(scores->data(), scores->data(), int(scores->size()), false, true);
    return scores != nullptr;
}

} // namespace cacheroute
