// The router: scores and a resident mask in, ids of the chosen experts out.
// Knows no files, no llama.cpp, and of the cache only the mask.
#pragma once

#include "bytes.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace cacheroute {

enum class Strategy : int32_t {
    original    = 0, // top-K of z
    pruning     = 1, // top-k of z, k < K
    max_rank    = 2, // cached experts among the M best, the J best always
    cumsum      = 3, // max-rank with M from the cumulative probability p
    cache_prior = 4, // top-K of z + lambda * D * cached (arXiv 2412.00099)
    drop_cold   = 5, // top-K of z without the missing experts of little weight
    custom      = 6, // what a Policy returns
    dynamic_k   = 7, // top-k of z where it carries enough of the top-K's mass, else top-K (big and little, arXiv 2510.12357)
    speculate   = 8, // top-K among the cached and those of a prediction made one layer earlier (after arXiv 2603.19289)
};

// Parameters of a strategy; those that a strategy does not name are ignored by it.
struct Routing {
    Strategy strategy = Strategy::original;
    int32_t  k        = 0;    // pruning, dynamic-k: experts that run
    int32_t  m        = 0;    // max-rank: ranks that a cached expert may come from
    int32_t  j        = 1;    // experts that run always, cached or not
    double   p        = 1.0;  // cumsum: probability that the candidates must cover; dynamic-k: share of the mass that k must carry
    double   lambda   = 0.0;  // cache-prior: bonus in units of the mean range of z; speculate: of the range of the prediction
    double   f        = 0.0;  // drop-cold: skip a missing expert below f/K of the gate weight
    double   max_loss = -1.0; // guard: share of the top-K's router mass a token may lose; < 0: no guard
    double   prompt_cover = 1.0; // share of a prompt batch's mass that its allowed experts carry (prompt_router.h); 1: all may run
    int32_t  prompt_last  = 0;   // tokens at a prompt batch's end that are spared
};

// One token in one layer, as the router sees it.
struct Scores {
    // [E] what the model ranks, -inf where an expert may not be chosen. For softmax gating the logarithm of the
    // probabilities, equal to the router logits up to a constant.
    std::vector<double> z;
    // [E] router mass, >= 0: what the gate weights are proportional to.
    std::vector<double> mass;

    // What a trace keeps of z and mass, in half precision; empty unless round_for_trace() has filled them. The eviction's running
    // means are formed from these, so that a replay comes to the same evictions. The mean range of cache-prior is of full precision:
    // a lossy routing replays on rounded scores.
    std::vector<double> traced, traced_mass;

    // Fills z and mass from what the graph of llama.cpp ranks (`scores`) and weighs by (`probs`), float[E] each.
    // `log_space`: the scores are probabilities, masked or not, so z is their logarithm.
    // `mass_from_logits`: probs are logits of which the chosen ones go through a softmax (gpt-oss).
    void fill(const float * scores, const float * probs, int n_expert, bool log_space, bool mass_from_logits);

    // Fills z and mass from what a trace kept, half precision, [E] each. `recorded_mass` null: softmax(z), which is exp(z) up to
    // a factor that nothing depends on.
    void read_back(const uint16_t * recorded_z, const uint16_t * recorded_mass, int n_expert);

    // traced = z - max(z), traced_mass = mass, rounded to half precision. Rounding makes ties, which go to the lower index:
    // where that would change the K best of z, their order, or the order of their masses, values are lowered by the
    // few units in the last place that keep it. `model_ids`: the ids [K] that are the K best, or null: ties to the lower index;
    // `prescribed`: they need not be the best.
    void round_for_trace(int n_used, const int32_t * model_ids, bool prescribed);
};

struct Selection {
    std::vector<int32_t> ids;     // [K] distinct, best z first; the first n_run of them run
    int                  n_run = 0;
    int                  swapped = 0; // ids that run and are not in the top-K of z
    double               lost_mass = 0.0; // 1 - mass(run) / mass(top-K), at least 0
};

// A choice made outside: fills ids [K], distinct and in range; false: it could not.
using Policy = std::function<bool(const Scores & scores, const std::vector<uint8_t> & resident, std::vector<int32_t> & ids)>;

// One layer's router. Ties go to the model's own choice, then to the lower index. Not thread-safe.
class Router {
  public:
    Router(int n_expert, int n_used, const Routing & routing);

    // Every token passes here once, prompt tokens too, before its choice: updates the running mean of
    // max(z) - min(z) over the finite entries (method: D_t = D_{t-1} + (range_t - D_{t-1}) / t).
    void observe(const std::vector<double> & z);

    // `resident`: [E] 0/1, the cache before this token. `plain` chooses by `original` under any routing (prompt). `model_ids`:
    // [K] the model's own top-K of z, best first, which `original` returns as it is; null: ranked here. `allowed`: [E] 0/1, what
    // `plain` chooses among; others run only where the allowed that are not masked are fewer than K. Null: all. `speculated`: what
    // speculate() has returned for this token; null: it was not asked, and `speculate` chooses by `original`.
    void select(const Scores & scores, const std::vector<uint8_t> & resident, bool plain, const int32_t * model_ids, Selection & out,
                const std::vector<uint8_t> * allowed = nullptr, const std::vector<int32_t> * speculated = nullptr);

    // The K best of a prediction of z, best first. `speculate` runs the J best of z itself, whose reads take the place of the last
    // of them, and the best of the cached and of the others. Its bonus is in units of the prediction's own range, as a model's z may
    // be of another scale.
    void speculate(const std::vector<double> & predicted, const std::vector<uint8_t> & resident, std::vector<int32_t> & ids);

    // What `custom` asks; without one, and where it fails, the choice is `original`.
    void set_policy(Policy policy) { policy_ = std::move(policy); }

    void reset();

    // Whether choosing is a Policy's, which may remember what it was asked.
    bool custom() const { return routing_.strategy == Strategy::custom; }
    bool speculates() const { return routing_.strategy == Strategy::speculate; }
    int  n_always() const { return std::min(routing_.j, n_used_); } // J: the best of z that run in any case

    // Continues with the running mean of another router.
    void resume(const Router & other) {
        mean_range_ = other.mean_range_;
        n_seen_     = other.n_seen_;
    }

    // The running mean as bytes, and back; read() throws std::runtime_error for one that cannot be.
    void write(ByteWriter & out) const;
    void read(ByteReader & in);

    double mean_range() const { return mean_range_; }
    const Routing & routing() const { return routing_; }

  private:
    void rank(const std::vector<double> & key, int n, std::vector<int32_t> & order) const;
    void max_rank(int m, const std::vector<double> & z, const std::vector<uint8_t> & resident);
    int  cumsum_candidates(const std::vector<double> & z);
    void keep_to(const std::vector<uint8_t> & allowed, const std::vector<double> & z);
    void keep_speculated(const std::vector<int32_t> & speculated, const std::vector<uint8_t> & resident,
                         const std::vector<double> & z);
    int  enough(const std::vector<double> & mass) const;
    void guard(const std::vector<double> & mass);

    const int     n_expert_;
    const int     n_used_;
    const Routing routing_;
    Policy        policy_;
    double        mean_range_ = 0.0;
    uint64_t      n_seen_     = 0;

    // scratch, kept to spare allocations in the hot path
    mutable std::vector<int32_t> index_;
    std::vector<int32_t> place_;  // [E] orders experts of equal key
    std::vector<int32_t> order_;  // experts by z
    std::vector<int32_t> chosen_; // this token's set
    std::vector<int32_t> custom_ids_;
    std::vector<double>  biased_;
    std::vector<uint8_t> in_top_, in_chosen_, there_;
};

} // namespace cacheroute
