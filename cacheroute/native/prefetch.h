// Reads experts of the next layer that it will probably miss, while this layer computes on a decoded token. Changes no choice, but
// for layers that `speculate`: of those it reads all that is predicted, as they choose among that and what is cached.
#pragma once

#include "cached_router.h"
#include "prediction.h"
#include "residency.h"
#include "score_source.h"

namespace cacheroute {

class Prefetch {
  public:
    // At most `n` experts of a layer at a time; of a layer that speculates, all that is predicted.
    Prefetch(int n, Prediction prediction) : n_(size_t(n)), prediction_(std::move(prediction)) {}

    // `token` of a sequence has chosen in a layer: begins to read what the next layer would miss of it.
    void after(int layer, uint32_t token, const ExpertEvent & event, const ScoreSource & source, std::vector<CachedRouter> & routers,
               Residency & residency);

    // What after() the layer before has predicted for this one (Router::speculate()); null: nothing.
    const std::vector<int32_t> * speculated(int layer) const { return layer == speculated_for_ ? &speculated_ : nullptr; }

  private:
    bool predict(int layer, uint32_t token, const ExpertEvent & event, const ScoreSource & source);

    const size_t         n_;
    Prediction           prediction_;
    Scores               predicted_;
    std::vector<int32_t> experts_, speculated_;
    int                  speculated_for_ = -1; // a layer; -1: none
};

} // namespace cacheroute
