// A file that is made shorter while it is mapped: a thread that reads a lost page would die by SIGBUS. Instead it reads zeros, and
// file_shrank() says so.
#pragma once

#include <cstdint>

namespace cacheroute {

class BusGuard {
  public:
    // Watches a range of memory that a file is mapped to, until it is destroyed.
    BusGuard(const void * address, uint64_t bytes);
    ~BusGuard();
    BusGuard(const BusGuard &)             = delete;
    BusGuard & operator=(const BusGuard &) = delete;

    bool file_shrank() const; // since the guard was made

  private:
    int slot_;
};

} // namespace cacheroute
