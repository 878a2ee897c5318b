// What systems do differently: Linux, Android, macOS. The only part that knows on which one it is; each function says what it does where
// the system lacks what it needs. -DCR_NO_DIRECT, CR_NO_FADVISE, CR_NO_MADVISE and CR_NO_MINCORE build without, for the tests.
#pragma once

#include <cstdint>

namespace cacheroute {

constexpr uint64_t UNKNOWN_BYTES = UINT64_MAX;

namespace os {

// What this system can do, as bits; cr_system() in cacheroute.h has the same.
enum : uint32_t {
    DIRECT_READS = 1, // past the page cache, if the filesystem has them
    DROPS_CACHED = 2, // takes what was read out of the page cache when it is told to
    MINCORE      = 4, // tells what is in memory
};
uint32_t abilities();

uint64_t page_bytes();

// A descriptor for reads past the page cache; -1 and errno where there are none, EINVAL where the system has none at all.
int open_direct(const char * name);

// No read-ahead into what lies beside what is read. Nothing where it cannot be said.
void no_read_ahead(int fd);

// Drops a part of a file, or all of it (bytes 0), from the page cache, unless a process has it mapped. Nothing without DROPS_CACHED.
void drop_cached(int fd, uint64_t offset, uint64_t bytes);

// Drops whole pages of a mapping of that file, from this process and from the page cache. A hint without DROPS_CACHED.
void drop_mapped(int fd, uint64_t offset, uint8_t * address, uint64_t bytes);

// Address space for anonymous memory, none of it in memory yet. Null and errno where there is not enough.
uint8_t * reserve(uint64_t bytes);

// Gives whole pages of reserve()d memory back to the system at once; they read as zeros afterwards.
void release(uint8_t * address, uint64_t bytes);

// Bytes of a range of whole pages that are in memory; UNKNOWN_BYTES without MINCORE, or where it fails.
uint64_t in_memory(const void * address, uint64_t bytes);

} // namespace os
} // namespace cacheroute
