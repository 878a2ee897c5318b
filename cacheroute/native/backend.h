// Where the bytes of resident experts are and how they get there: the part of the store that differs between --io mmap and direct.
// Called by the store alone, from one thread at a time, except where said.
#pragma once

#include "expert_files.h"

#include <memory>

namespace cacheroute {

// How soon an expert is needed: now, by the next layer of a prompt, or perhaps by the next layer of a decoded token. The last two may
// be cancelled before their reads begin.
enum class Urgency { needed, ahead, prefetch };

class Backend {
  public:
    virtual ~Backend() = default;

    // How the store should read.
    virtual int      n_readers() const   = 0;
    virtual uint64_t piece_bytes() const = 0;

    // Whether a page that two experts have is read once for both, and not for each.
    virtual bool shares_pages() const = 0;

    // Gives the expert a place and returns what must be read into it; 0 bytes: all of it is there already.
    virtual PageRun admit(size_t tensor, int32_t e, Urgency urgency) = 0;

    // The expert is gone. Its memory may be kept until trim(), for what is admitted meanwhile, unless it has not been read to its end.
    virtual void evict(size_t tensor, int32_t e, bool complete) = 0;

    // Frees the memory of evicted experts that has not been reused.
    virtual void trim() = 0;

    // Whether admit() takes the memory that evict() has left.
    virtual bool reuses() const = 0;

    // Whether trim() needs idle readers: a page fault of a reader maps what the page cache has around it, and pages mapped in
    // that moment cannot be dropped.
    virtual bool trim_needs_idle_readers() const = 0;

    // Whether the kernel may take pages of resident experts; then missing() says which pages of one are gone: a run that has all of
    // them, to be read again.
    virtual bool    reclaimable() const                       = 0;
    virtual PageRun missing(size_t tensor, int32_t e) const   = 0;

    // Room for so many experts of these tensors is kept when they are evicted: prefetches come and go.
    virtual void keep_room(const std::vector<size_t> & tensors, size_t n_experts) = 0;

    // Reads pages into memory. 0 or an errno. Called by several reader threads.
    virtual int read(const PageRun & run) = 0;

    // Where the bytes of an expert are. Any thread that computes.
    virtual const void * address(size_t tensor, int32_t e) const = 0;

    virtual void clear() = 0; // evicts everything

    virtual uint64_t resident_bytes() const = 0; // as counted, whole pages. Any thread.
    virtual uint64_t measure() const        = 0; // as the kernel says; UNKNOWN_BYTES where it does not
};

// Experts stay in the files' mappings; reading is read-ahead into the page cache, evicting drops the pages from the
// process and from the page cache.
std::unique_ptr<Backend> make_mapped_backend(const ExpertFiles & files);

// Experts live in slots of anonymous memory, that of an evicted expert taken by the next one; reading is O_DIRECT. The mappings
// stay untouched. Throws where the filesystem has no direct reads.
std::unique_ptr<Backend> make_slot_backend(const ExpertFiles & files);

} // namespace cacheroute
