// What llama.cpp passes and is passed: the structs of patches/0001 and 0005, member for member. llama_set_expert_hook() refuses
// a hook whose version or sizes differ from those that it was compiled with.
#pragma once

#include <cstdint>

namespace cacheroute {

constexpr uint32_t HOOK_VERSION = 4; // LLAMA_EXPERT_HOOK_VERSION

// llama_expert_gating_func_type; patches/0001 asserts the first and the third
constexpr int32_t GATING_SOFTMAX        = 1;
constexpr int32_t GATING_SIGMOID        = 2;
constexpr int32_t GATING_SOFTMAX_WEIGHT = 3; // softmax over the logits of the chosen
constexpr int32_t GATING_SQRT_SOFTPLUS  = 4;

// llama_expert_event
struct ExpertEvent {
    int32_t       il;
    int32_t       gating;
    int32_t       n_expert;
    int32_t       n_used;
    int32_t       n_tokens;
    int32_t       n_embd;
    const float * scores; // [n_tokens][n_expert] what the model ranks; null: it prescribes the ids
    const float * probs;  // [n_tokens][n_expert]
    const float * hidden; // [n_tokens][n_embd]
    int32_t     * ids;    // [n_tokens][n_used] the model's own choice, best first; replaced by what runs
    float       * weights; // reweight only: [n_tokens][n_used]
};

// ggml_expert_source
struct ExpertSource {
    const void * (*find)(void * user_data, const void * expert, bool late);
    void * user_data;
};

// llama_expert_hook
struct ExpertHook {
    uint32_t version, hook_bytes, event_bytes;
    void (*select)(void * user_data, const ExpertEvent * event);
    void (*reweight)(void * user_data, const ExpertEvent * event);
    void * user_data;
    ExpertSource source;
};

} // namespace cacheroute
