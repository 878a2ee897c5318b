// IEEE half precision, the number format of traces. Software, so that every machine writes and reads the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cacheroute {

// Rounds to nearest, ties to even; what is finite stays finite (at most 65504 in size). Not for NaN.
inline uint16_t to_half(double value) {
    const float f = float(value);
    uint32_t    x;
    std::memcpy(&x, &f, sizeof x);
    const uint16_t sign = uint16_t((x >> 16) & 0x8000);
    x &= 0x7fffffff;
    if (x == 0x7f800000) return std::isinf(value) ? sign | 0x7c00 : sign | 0x7bff;
    if (x >= 0x477ff000) return sign | 0x7bff;
    if (x < 0x38800000) { // subnormal: a multiple of 2^-24
        const uint16_t n = uint16_t(std::lrint(std::fabs(double(f)) * 16777216.0));
        return n ? sign | n : 0;
    }
    x += 0xfff + ((x >> 13) & 1);
    return uint16_t(sign | ((x - 0x38000000) >> 13));
}

inline double from_half(uint16_t h) {
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    uint32_t       x        = uint32_t(h & 0x8000) << 16;
    if (exponent == 0) return (h & 0x8000 ? -1.0 : 1.0) * double(mantissa) / 16777216.0;
    x |= exponent == 31 ? 0x7f800000 | (mantissa << 13) : ((exponent + 112) << 23) | (mantissa << 13);
    float f;
    std::memcpy(&f, &x, sizeof f);
    return double(f);
}

// The next smaller finite half; -65504 and -inf stay.
inline uint16_t half_below(uint16_t h) {
    if (h == 0xfbff || h == 0xfc00) return h;
    if ((h & 0x7fff) == 0) return 0x8001;
    return h & 0x8000 ? uint16_t(h + 1) : uint16_t(h - 1);
}

} // namespace cacheroute
