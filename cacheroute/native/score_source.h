// Where the scores of a layer come from: the model itself, or rows that are forced on it. Knows no routing and no cache.
#pragma once

#include "expert_event.h"
#include "router.h"

#include <string>
#include <vector>

namespace cacheroute {

// Recorded scores, half precision: one row of E for each token of a sequence. Not owned.
struct ScoreRows {
    const uint16_t * z    = nullptr;
    const uint16_t * mass = nullptr; // null: softmax(z)
    size_t           n    = 0;
    size_t           n_expert = 0;

    // False: there is no such row, or it is not known (it starts with NaN).
    bool read(size_t row, Scores & out) const;
};

// Scores that a layer ranks in place of the model's own. Empty: the model's are used.
struct ForcedScores {
    std::vector<uint16_t> z, mass;   // mass empty: softmax(z)
    std::vector<uint16_t> predicted; // what stands for a prediction of z; empty: nothing is prefetched for the layer
    size_t                n_expert = 0;

    ScoreRows rows() const { return {z.data(), mass.empty() ? nullptr : mass.data(), n_expert ? z.size() / n_expert : 0, n_expert}; }
    ScoreRows predicted_rows() const { return {predicted.data(), nullptr, n_expert ? predicted.size() / n_expert : 0, n_expert}; }
};

class ScoreSource {
  public:
    explicit ScoreSource(size_t n_layers) : forced_(n_layers) {}

    void                 force(int layer, ForcedScores scores) { forced_[size_t(layer)] = std::move(scores); }
    const ForcedScores & forced(int layer) const { return forced_[size_t(layer)]; }

    struct Token {
        const Scores &  scores;
        const int32_t * model_ids;    // [K] the model's own choice, best first; null where it does not belong to these scores
        bool            prescribed;   // model_ids run, and the scores do not matter
        bool            softmax_mass; // the mass is softmax(z)
    };

    // Of the t-th token of an event, which is `token` of its sequence. Forced scores that lack it: the model's own, and error().
    Token get(int layer, uint32_t token, const ExpertEvent & event, int t);

    const std::string & error() const { return error_; }
    void                clear_error() { error_.clear(); }

    Scores & scores() { return scores_; } // of the last get()

  private:
    std::vector<ForcedScores> forced_; // [layer]
    Scores                    scores_;
    std::string               error_;
};

} // namespace cacheroute
