// Reads experts of the next layer that it will probably miss, while this layer computes on a decoded token. Changes no choice.
#pragma once

#include "cached_router.h"
#include "prediction.h"
#include "residency.h"
#include "score_source.h"

namespace cacheroute {

class Prefetch {
  public:
    // At most `n` experts of a layer at a time.
    Prefetch(int n, Prediction prediction) : n_(size_t(n)), prediction_(std::move(prediction)) {}

    // `token` of a sequence has chosen in a layer: begins to read what the next layer would miss of it.
    void after(int layer, uint32_t token, const ExpertEvent & event, const ScoreSource & source, std::vector<CachedRouter> & routers,
               Residency & residency);

  private:
    const size_t         n_;
    Prediction           prediction_;
    Scores               predicted_;
    std::vector<int32_t> experts_;
};

} // namespace cacheroute
