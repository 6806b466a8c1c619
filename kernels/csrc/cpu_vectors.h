// A register's worth of lanes as a type of the compiler's (GCC and Clang vector extensions): the sweeps are vectorised
// by construction, whatever the optimiser thinks of their loops. Where registers are narrower than 64 bytes the
// compiler takes several.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mfpsn {

template <typename acc>
struct Vector {
  typedef acc type __attribute__((vector_size(64)));
};

template <typename acc>
using vec = typename Vector<acc>::type;

template <typename acc>
constexpr int64_t lanes = 64 / sizeof(acc);

template <typename acc>
inline vec<acc> get(const acc* from) {
  vec<acc> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename acc>
inline void put(acc* to, vec<acc> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Writes past the caches, to an address that is a multiple of 64: the line is not fetched first. `flush_past_caches` before
// another thread reads.
template <typename acc>
inline void put_past_caches(acc* to, vec<acc> v) {
#if defined(__AVX512F__)
  __m512i bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
#elif defined(__SSE2__)
  __m128i bits[4];
  __builtin_memcpy(bits, &v, sizeof bits);
  for (int i = 0; i < 4; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, bits[i]);
#else
  put(to, v);
#endif
}

inline void flush_past_caches() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename acc>
inline vec<acc> all(acc value) {
  return value - vec<acc>{};
}

// exp(x) for x ≤ 0, to the last bit or two: 2^n · e^f with |f| ≤ ln 2 / 2, the series of e^f cut where its remainder is
// below the rounding (5e-9 in float32, 4e-18 in float64). libm's exp, lane by lane, took most of a sweep's time.
template <typename acc>
inline vec<acc> exp_of_negative(vec<acc> x) {
  using integer = std::conditional_t<sizeof(acc) == 4, int32_t, int64_t>;
  typedef integer ints __attribute__((vector_size(64)));
  constexpr int terms = sizeof(acc) == 4 ? 7 : 13, mantissa = sizeof(acc) == 4 ? 23 : 52;
  constexpr acc least = sizeof(acc) == 4 ? acc(-87) : acc(-708);
  constexpr acc ln2_high = sizeof(acc) == 4 ? acc(0.693359375) : acc(0.693147180369123816490);
  constexpr acc ln2_low = sizeof(acc) == 4 ? acc(-2.12194440e-4) : acc(1.90821492927058770002e-10);
  x = x < least ? all(least) : x;  // NaN stays
  const vec<acc> scaled = x * acc(1.44269504088896340736) - acc(0.5);
  const ints n = __builtin_convertvector(scaled, ints);  // towards zero: round(x / ln 2), for x ≤ 0
  const vec<acc> whole = __builtin_convertvector(n, vec<acc>);
  const vec<acc> f = (x - whole * ln2_high) - whole * ln2_low;
  acc factor = 1;
  for (int i = 2; i <= terms; ++i) factor /= i;
  vec<acc> sum = all(factor);
  for (int i = terms; i >= 1; --i) {
    factor *= i;
    sum = sum * f + factor;
  }
  const ints power = (n + ((integer(1) << (sizeof(acc) * 8 - 2 - mantissa)) - 1)) << mantissa;
  vec<acc> two;
  __builtin_memcpy(&two, &power, sizeof two);
  return sum * two;
}

}  // namespace mfpsn
