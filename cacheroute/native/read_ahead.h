// Reads the experts that a prompt will need in the next layer while this one computes. Changes no choice.
//
// A prompt needs nearly all experts of a layer, and which ones is known before the layer chooses: its router, given this layer's hidden
// state of some of the tokens, names most of them. How far that can be trusted is counted as the layers go by: experts are read
// ahead in groups (by how often they were named) of which at least SURE were needed so far.
#pragma once

#include "cached_router.h"
#include "prediction.h"
#include "residency.h"
#include "score_source.h"

#include <array>
#include <cstdint>
#include <vector>

namespace cacheroute {

class ReadAhead {
  public:
    ReadAhead(Prediction prediction, int n_used) : prediction_(std::move(prediction)), n_used_(size_t(n_used)) {}

    // At most so many bytes of the next layer's experts are in memory before its turn.
    void set_limit(uint64_t bytes) { limit_ = bytes; }

    // A prompt's tokens have chosen `needed` [E] in a layer: begins to read for the next one.
    void after(int layer, const ExpertEvent & event, const Mask & needed, const ScoreSource & source, Residency & residency,
               int n_layers);

  private:
    static constexpr int GROUPS = 32; // named: by the power of two of the uses expected; not named: by that of the tokens not asked
    struct Group {
        double n = 0, needed = 0; // experts counted, and those of them that were needed
    };

    void   learn(int layer, const Mask & needed);
    void   predict(int layer, const ExpertEvent & event, bool forced);
    int    group(uint32_t named, int n_tokens, int n_asked) const;
    double trust(int group) const;

    Prediction                     prediction_;
    const size_t                   n_used_;
    uint64_t                       limit_ = UINT64_MAX;
    std::array<Group, 2 * GROUPS>  groups_{};
    int                            predicted_ = -1; // layer that group_of_ is for
    std::vector<int>               group_of_;       // [E]
    std::vector<uint32_t>          named_;          // [E] tokens asked that would choose it
    std::vector<int32_t>           order_, experts_;
};

} // namespace cacheroute
