/* The native core of cacheroute: which experts run (router, cache) and which are in memory (store), and the hook that
 * joins both to llama.cpp. Everything that Python may call is here.
 *
 * Who owns what: every cr_*_new() is paired with a cr_*_free(). A hook owns its routers and its store; the files and
 * the memory of the expert tensors belong to llama.cpp and must outlive the hook.
 *
 * Threads: a handle is used by one thread at a time. The hook's select() is called by llama.cpp from a compute thread while
 * llama_decode() runs; it returns when the reads have begun, and the compute threads wait for each expert. No cr_hook_* call
 * may run at the same time, but for cr_hook_progress(), cr_hook_set_capacity(), cr_hook_measure_resident() and cr_hook_resident_bytes(), which any
 * thread may call at any time.
 *
 * Errors: constructors return NULL and write one sentence into `error`; what fails later in a hook is in cr_hook_error(). Nothing
 * throws through this header.
 *
 * cr_abi_matches() must be asked first: a library and a caller of different versions do not work together. */
#ifndef CACHEROUTE_H
#define CACHEROUTE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CR_API __attribute__((visibility("default")))

/* Counts changes of anything in this header. */
#define CR_ABI_VERSION 9

/* strategy: 0 original, 1 pruning, 2 max-rank, 3 cumsum, 4 cache-prior, 5 drop-cold, 6 custom, 7 dynamic-k, 8 speculate (explained
 * in router.h). */
struct cr_routing {
    int32_t strategy;
    int32_t k;
    int32_t m;
    int32_t j;
    double  p;
    double  lambda;
    double  f;
    double  max_loss; /* < 0: no guard */
    int32_t experts;  /* of this layer in memory, n_used..n_expert; 0: the capacity of the shape */
    int32_t prompt_last;  /* tokens at the end of a prompt's batch that run their own experts all the same */
    double  prompt_cover; /* prompts keep to experts that carry this share of a batch's mass (prompt_router.h); 0, 1: `original` */
};

struct cr_shape {
    int32_t n_layers;
    int32_t n_expert;
    int32_t n_used;
    int32_t capacity; /* experts per layer, n_used..n_expert, where a layer has no number of its own */
    int32_t eviction; /* 0 lru, 1 lfu, 2 score, 3 belady (replay of prescribed ids only), 4 soft-lfu (explained in cache.h) */
};

/* The router of a MoE layer, in the model's memory: weight [E][n_embd] (NULL: the layer cannot be predicted), bias [E] or
 * NULL, norm [n_embd] of what it is given, or NULL, selection_bias [E] that is added to the probabilities for the choice alone, or
 * NULL. */
struct cr_router_weights {
    const float * weight;
    const float * bias;
    const float * norm;
    const float * selection_bias;
};

/* Sums over tokens and layers of one phase, prompt or decode. Mirrored once, in native/counters.py. */
struct cr_counters {
    uint64_t tokens;        /* passed through the (first) layer: llama.cpp takes only wanted outputs of a prompt through the last */
    uint64_t examined;      /* slots filled: K per token and layer */
    uint64_t hits;          /* slots whose expert was in the cache before the token */
    uint64_t misses;        /* slots whose expert was not */
    uint64_t swapped;       /* slots given to an expert outside the top-K */
    uint64_t dropped;       /* slots that did not run */
    uint64_t evictions;
    uint64_t held;          /* sum over tokens and layers of the experts in the cache after them */
    double   lost_mass;     /* sum over tokens and layers of 1 - mass(run) / mass(top-K) */
    /* of the store; 0 for a bare router and for a single layer */
    uint64_t reads;         /* experts made resident */
    uint64_t read_bytes;    /* asked of the device, whole pages */
    uint64_t distinct_bytes; /* of the experts that prompts ran, whole pages, each expert of a layer once for each prompt */
    double   read_seconds;  /* waited: for an exchange to begin, for an expert, for the last read */
    double   evict_seconds; /* of that, spent on evicting */
    uint64_t prefetched;    /* experts whose reads began before their layer chose */
    uint64_t prefetch_used; /* of those, chosen: misses all the same */
    double   hook_seconds;  /* in the hook, without read_seconds: what routing costs */
};

/* How far a prompt has come. Each number is right by itself; they may be of slightly different moments. */
struct cr_progress {
    uint64_t begun;        /* sum over its tokens of the layers that have chosen experts */
    uint64_t done;         /* of those layers, the ones that have been computed */
    uint64_t needed_bytes; /* of the device, by the layers that have chosen: their missing experts, whole pages */
    uint64_t read_bytes;   /* of those, what has been read */
    uint64_t layer_bytes;  /* of those, what the layer needed that chose last */
};

/* strategy custom: fills ids[K], distinct, 0..E-1, and returns 0; anything else: no choice, `original` runs. z, mass: double[E],
 * resident: uint8[E], the cache before the token. Called from the thread that steps the router. */
typedef int32_t (*cr_policy)(void * user, int32_t layer, const double * z, const double * mass, const uint8_t * resident,
                             int32_t * ids);

/* One expert tensor of one layer; see ExpertTensor in expert_files.h. */
struct cr_tensor {
    int32_t      layer;
    int32_t      file;
    uint64_t     offset;
    uint64_t     expert_bytes;
    const void * address;
};

/* 1 if the caller was compiled for this version and for structs of these sizes. */
CR_API int32_t cr_abi_matches(uint32_t version, uint32_t routing_bytes, uint32_t shape_bytes, uint32_t router_weights_bytes,
                              uint32_t counters_bytes, uint32_t tensor_bytes, uint32_t progress_bytes);

/* What this system can do: reads past the page cache; dropping what was read from it, without which a later miss may be answered
 * from memory; telling what is in memory. Of the system, not of a filesystem: cr_store_new() tries that. */
enum { CR_DIRECT_READS = 1, CR_DROPS_CACHED = 2, CR_MINCORE = 4 };
CR_API uint32_t cr_system(void); /* those bits */

/* ---- a bare router with its cache, all layers: simulator and tests ---- */

typedef struct cr_router cr_router;

/* routing: one per layer. */
CR_API cr_router * cr_router_new(const struct cr_shape * shape, const struct cr_routing * routing, char * error, int32_t error_size);
CR_API void cr_router_free(cr_router * router);
/* One token in one layer. z, mass: double[E]; prefill: 0/1; model_ids: int32[K] that the model itself would run, best first, or
 * NULL; prescribed: 0/1, they run under any routing; predicted: double[E], a prediction of z that strategy speculate goes by, or
 * NULL. Fills ids[K] (best z first) and, if not NULL, missed[K], evicted[E] with their counts. Returns how many of the ids run; -1:
 * no memory. */
CR_API int32_t cr_router_step(cr_router * router, int32_t layer, const double * z, const double * mass, int32_t prefill,
                              const int32_t * model_ids, int32_t prescribed, const double * predicted, int32_t * ids,
                              int32_t * missed, int32_t * n_missed, int32_t * evicted, int32_t * n_evicted);
/* n_events of one layer, recorded: z [n][E] in half precision; mass [n][E] likewise, NULL: exp(z); flags [n]: 1 decoded, 8 the
 * first of a micro-batch (of a prompt; a decoded token is one of its own); prescribed [n][K], NULL or a row that starts with -1:
 * chosen by the routing; next_use [n][K], belady only: when the prescribed expert is needed next. Returns 0; -1: no memory. Fills,
 * if not NULL, ids [n][K] and resident [n][ceil(E/8)]: the cache before the event, bit e % 8 of byte e / 8. */
CR_API int32_t cr_router_replay(cr_router * router, int32_t layer, int64_t n_events, const uint16_t * z, const uint16_t * mass,
                                const uint8_t * flags, const int32_t * prescribed, const int32_t * next_use, int32_t * ids,
                                uint8_t * resident);
CR_API void cr_router_set_policy(cr_router * router, cr_policy policy, void * user);
CR_API void cr_router_resident(const cr_router * router, int32_t layer, uint8_t * mask /* [E] */);
CR_API double cr_router_mean_range(const cr_router * router, int32_t layer);
CR_API void cr_router_counters(cr_router * router, int32_t layer /* -1: all */, int32_t prefill, struct cr_counters * out);
CR_API void cr_router_reset(cr_router * router);

/* ---- a store alone: tests ---- */

typedef struct cr_store cr_store;

CR_API cr_store * cr_store_new(const char * const * files, int32_t n_files, const struct cr_tensor * tensors, int32_t n_tensors,
                               int32_t n_layers, int32_t n_expert, int32_t direct /* NULL where the filesystem has no direct reads */,
                               char * error, int32_t error_size);
CR_API void cr_store_free(cr_store * store);
/* Returns when everything has been read: 0, or -1 with one sentence in `error`. */
CR_API int32_t cr_store_exchange(cr_store * store, int32_t layer, const int32_t * load, int32_t n_load, const int32_t * evict,
                                 int32_t n_evict, char * error, int32_t error_size);
/* Where the bytes of an expert are, given its place in the mapping; waits for them. */
CR_API const void * cr_store_find(cr_store * store, const void * expert);
CR_API void cr_store_clear(cr_store * store);
CR_API void cr_store_set_pace(cr_store * store, double bytes_per_second);
CR_API uint64_t cr_store_resident_bytes(const cr_store * store);
CR_API uint64_t cr_store_measure_resident(const cr_store * store); /* UINT64_MAX: there is no mincore */
CR_API uint64_t cr_store_read_bytes(const cr_store * store);

/* ---- a mapping of a file that may become shorter, or whose device may fail ---- */

typedef struct cr_guard cr_guard;

/* From now on, until it is freed, a page of the range that cannot be read is read as zeros, and cr_guard_hit() is 1. */
CR_API cr_guard * cr_guard_new(const void * address, uint64_t bytes);
CR_API int32_t cr_guard_hit(const cr_guard * guard);
CR_API void cr_guard_free(cr_guard * guard);

/* ---- Ctrl-C while llama.cpp computes ---- */

typedef struct cr_interrupt cr_interrupt;

/* The four are PyGILState_Ensure, PyGILState_Release, PyErr_CheckSignals and PyErr_Clear; main_thread is
 * threading.main_thread().ident, the only thread in which signal handlers run. */
CR_API cr_interrupt * cr_interrupt_new(const void * ensure, const void * release, const void * check, const void * clear,
                                       uint64_t main_thread);
CR_API void cr_interrupt_free(cr_interrupt * interrupt);
/* A ggml_abort_callback, data: a cr_interrupt. True from the moment on that a signal handler has raised. Any thread. */
CR_API int32_t cr_interrupt_poll(void * interrupt);
/* As if a signal handler had raised. Any thread. */
CR_API void cr_interrupt_raise(cr_interrupt * interrupt);
/* Whether it has; take: and is as if it had not. */
CR_API int32_t cr_interrupt_seen(const cr_interrupt * interrupt);
CR_API int32_t cr_interrupt_take(cr_interrupt * interrupt);

/* ---- the hook ---- */

typedef struct cr_hook cr_hook;
typedef struct cr_checkpoint cr_checkpoint;

/* layer_of[n_il]: llama.cpp's layer -> 0..n_layers-1, or -1. Takes the store over, also when it fails; store NULL: the hook
 * routes and moves no bytes. */
CR_API cr_hook * cr_hook_new(const struct cr_shape * shape, const struct cr_routing * routing, const int32_t * layer_of,
                             int32_t n_il, cr_store * store, char * error, int32_t error_size);
CR_API void cr_hook_free(cr_hook * hook);
CR_API const void * cr_hook_address(cr_hook * hook); /* const struct llama_expert_hook *, of expert_event.h */
CR_API void cr_hook_set_phase(cr_hook * hook, int32_t decode);
CR_API void cr_hook_set_pace(cr_hook * hook, double bytes_per_second);
/* From now on the hook waits for no read once that is raised (NULL: none); it must outlive the hook. */
CR_API void cr_hook_set_interrupt(cr_hook * hook, cr_interrupt * interrupt);
/* After each llama_decode(). complete: it ran to its end, so every layer must have asked. If the interrupt is raised, it was
 * broken off: the same as cr_hook_reset(), and what was being read is not read. */
CR_API void cr_hook_finish(cr_hook * hook, int32_t complete);
CR_API void cr_hook_reset(cr_hook * hook);  /* forget the sequence, drop every expert; counters stay */
CR_API void cr_hook_set_policy(cr_hook * hook, cr_policy policy, void * user);
/* From now on every sequence starts with all experts in the caches, which must have room for all: they were loaded with the model.
 * For a hook without a store. Returns 0, or -1 for one that has a store or a smaller cache. */
CR_API int32_t cr_hook_hold_all(cr_hook * hook);
/* From now on `capacity` experts of each layer stay, at least K, or as much more or less in each as at the beginning: what no longer
 * fits leaves before the next layer chooses, or with cr_hook_settle_capacity(), for when nothing computes. set: any thread. */
CR_API void cr_hook_set_capacity(cr_hook * hook, int32_t capacity);
CR_API void cr_hook_settle_capacity(cr_hook * hook);
/* Brings experts of a layer (n <= capacity) into memory before a sequence; the last is the most recent. */
CR_API void cr_hook_warm(cr_hook * hook, int32_t layer, const int32_t * experts, int32_t n);
/* Caches and running means as they are now, the caller's to free. NULL: the reason is in cr_hook_error(). */
CR_API cr_checkpoint * cr_hook_save(cr_hook * hook);
/* Brings them back, also into another hook, under its own routing and capacity; counters stay. 0: the caches are of another E, K or
 * eviction. */
CR_API int32_t cr_hook_resume(cr_hook * hook, const cr_checkpoint * checkpoint);
CR_API void cr_checkpoint_free(cr_checkpoint * checkpoint);
/* A checkpoint as bytes, for a machine of the same byte order: how many; written to `out` where it has room for all of them. 0: no
 * memory. */
CR_API uint64_t cr_checkpoint_bytes(const cr_checkpoint * checkpoint, uint8_t * out, uint64_t size);
/* And back. NULL: the bytes are none of a checkpoint of this version, or of a state that cannot be. */
CR_API cr_checkpoint * cr_checkpoint_from(const uint8_t * bytes, uint64_t size, char * error, int32_t error_size);
/* Before each llama_decode(): which token of the sequence it begins with. */
CR_API void cr_hook_begin(cr_hook * hook, int64_t token);
/* Before the first batch of a prompt, which begins with that token: cr_hook_progress() and each prompt's distinct_bytes count
 * from here, or from a batch that begins with token 0. */
CR_API void cr_hook_begin_prompt(cr_hook * hook, int64_t token);
CR_API void cr_hook_progress(const cr_hook * hook, struct cr_progress * out);
/* From now on the layer chooses by these scores and not by the model's own: z [n_tokens][E], mass likewise or NULL, as in
 * cr_router_replay, one row for each token of a sequence; a row that starts with NaN is not known, and asking for it is an error.
 * Copied. n_tokens 0: the model's own again. Gate weights are always the model's. */
CR_API void cr_hook_force(cr_hook * hook, int32_t layer, int64_t n_tokens, const uint16_t * z, const uint16_t * mass,
                          const uint16_t * predicted /* stands for a prediction of z, for cr_hook_prefetch(); NULL: none */);
/* From now on, while a layer computes on a decoded token, up to n experts are read that the next layer would miss if its router
 * were given this layer's hidden state. What is chosen stays the same. Of a layer of strategy speculate all K that are
 * predicted are read, also where n is 0, and it chooses among them and what is cached; without this call it chooses as `original`.
 * layers: [n_layers]. */
CR_API void cr_hook_prefetch(cr_hook * hook, int32_t n, int32_t n_embd, const struct cr_router_weights * layers);
/* From now on, while a layer computes on a prompt, the experts that the next layer will surely need are read, up to `limit` bytes of
 * them (0: none). What is chosen stays the same. layers: [n_layers], as for cr_hook_prefetch(); read by the first call. */
CR_API void cr_hook_read_ahead(cr_hook * hook, uint64_t limit, int32_t n_embd, const struct cr_router_weights * layers);
CR_API void cr_hook_trace(cr_hook * hook, int32_t on); /* both ways it forgets the sequence, as cr_hook_reset() */
/* Bytes of the records that wait (trace.h); moved to `out` where it has room for all of them. */
CR_API uint64_t cr_hook_trace_take(cr_hook * hook, uint8_t * out, uint64_t size);
CR_API void cr_hook_counters(cr_hook * hook, int32_t layer /* -1: all */, int32_t prefill, struct cr_counters * out);
CR_API void cr_hook_resident(cr_hook * hook, int32_t layer, uint8_t * mask /* [E] */);
CR_API uint64_t cr_hook_resident_bytes(const cr_hook * hook);
CR_API uint64_t cr_hook_peak_bytes(const cr_hook * hook); /* the most that was resident since the last cr_hook_reset(), as counted */
CR_API uint64_t cr_hook_measure_resident(const cr_hook * hook);
CR_API const char * cr_hook_error(const cr_hook * hook); /* "" if all is well */

#ifdef __cplusplus
}
#endif

#endif
