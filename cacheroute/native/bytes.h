// State as bytes, in the byte order of this machine, and back: what is read is checked against the end of the bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace cacheroute {

class ByteWriter {
  public:
    template <typename T> void put(T value) { put_all(&value, 1); }
    template <typename T> void put(const std::vector<T> & values) { put_all(values.data(), values.size()); }

    std::vector<uint8_t> bytes;

  private:
    template <typename T> void put_all(const T * values, size_t n) {
        const auto * from = reinterpret_cast<const uint8_t *>(values);
        bytes.insert(bytes.end(), from, from + n * sizeof(T));
    }
};

// Throws std::runtime_error where the bytes end too early.
class ByteReader {
  public:
    ByteReader(const uint8_t * bytes, size_t size) : at_(bytes), left_(size) {}

    template <typename T> T get() {
        T value;
        get_all(&value, 1);
        return value;
    }
    // As many as the vector has.
    template <typename T> void get(std::vector<T> & values) { get_all(values.data(), values.size()); }

    size_t left() const { return left_; }

  private:
    template <typename T> void get_all(T * to, size_t n) {
        if (n > left_ / sizeof(T)) throw std::runtime_error("a saved routing state ends too early");
        std::memcpy(to, at_, n * sizeof(T));
        at_   += n * sizeof(T);
        left_ -= n * sizeof(T);
    }

    const uint8_t * at_;
    size_t          left_;
};

} // namespace cacheroute
