// The files of a model and where each expert is in them and in llama.cpp's mapping. Knows pages; reads nothing.
#pragma once

#include "bus_guard.h"
#include "readers.h"
#include "system.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace cacheroute {

// The experts of one tensor of one layer: `n_expert` byte ranges of equal size, one after the other.
struct ExpertTensor {
    int       layer;
    int       file;         // index into the files
    uint64_t  offset;       // of expert 0 in the file, bytes
    uint64_t  expert_bytes;
    uint8_t * address;      // of expert 0 in memory: the mapping that llama.cpp made
};

class ExpertFiles {
  public:
    // Throws std::runtime_error when a file cannot be opened.
    ExpertFiles(const std::vector<std::string> & names, int n_layers, int n_expert, const std::vector<ExpertTensor> & tensors);
    ~ExpertFiles();
    ExpertFiles(const ExpertFiles &)             = delete;
    ExpertFiles & operator=(const ExpertFiles &) = delete;

    int                               n_expert() const { return n_expert_; }
    uint64_t                          page_bytes() const { return page_; }
    const std::vector<std::string> &  names() const { return names_; }
    const std::vector<int> &          descriptors() const { return fds_; } // of the files, buffered
    const std::vector<ExpertTensor> & tensors() const { return tensors_; }
    const std::vector<size_t> &       tensors_of(int layer) const { return layers_[size_t(layer)]; }
    size_t                            index(size_t tensor, int32_t e) const { return tensor * size_t(n_expert_) + size_t(e); }

    // Which expert of which tensor lies at that address of the mapping. False: none of these files.
    bool locate(const void * address, size_t & tensor, int32_t & e) const;

    PageRun                      pages(size_t tensor, int first, int n) const; // that these experts touch in the mapping
    const std::vector<PageRun> & all_pages() const { return all_; }            // of all expert tensors, each once

    // Drops whole pages of the mapping, from this process and from the page cache.
    void drop(const PageRun & run) const;
    void drop_unmapped() const; // all pages of the files in the page cache that no process has mapped

    bool bus_error() const; // whether a page that cannot be read was touched
    bool shorter() const;   // whether a file is shorter than it was

    // Of pages of a file, the bytes that it has: its last page reaches past its end.
    uint64_t in_file(const PageRun & run) const;

    // Bytes of all_pages() that are in memory as the kernel says (mincore); UNKNOWN_BYTES where it does not.
    uint64_t mapped_in_memory() const;
    bool     mincore_reliable() const { return mincore_reliable_; }

  private:
    const int                        n_expert_;
    const uint64_t                   page_;
    const std::vector<std::string>   names_;
    const std::vector<ExpertTensor>  tensors_;
    std::vector<int>                 fds_;
    std::vector<uint64_t>            sizes_; // when they were opened, bytes
    std::vector<std::vector<size_t>> layers_;     // tensors of each layer
    std::vector<size_t>              by_address_; // tensors, ascending
    std::vector<PageRun>             all_;
    bool                             mincore_reliable_ = true;
    std::vector<std::unique_ptr<BusGuard>> guards_; // of all_
};

} // namespace cacheroute
