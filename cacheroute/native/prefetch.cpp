#include "prefetch.h"

namespace cacheroute {

void Prefetch::after(int layer, uint32_t token, const ExpertEvent & ev, const ScoreSource & source,
                     std::vector<CachedRouter> & routers, Residency & residency) {
    const int next = layer + 1;
    if (next >= int(routers.size()) || ev.n_embd != prediction_.n_embd()) return;
    const ForcedScores & forced = source.forced(next);
    if (!forced.z.empty()) { // the model's router cannot predict forced scores
        if (!forced.predicted_rows().read(token, predicted_)) return;
    } else if (const auto * scores = prediction_.scores(layer, ev.hidden)) {
        predicted_.fill(scores->data(), scores->data(), int(scores->size()), false, true);
    } else {
        return;
    }
    experts_ = routers[size_t(next)].predict(predicted_);
    if (experts_.size() > n_) experts_.resize(n_);
    if (!experts_.empty()) residency.prefetch(next, experts_, Urgency::prefetch);
}

} // namespace cacheroute
