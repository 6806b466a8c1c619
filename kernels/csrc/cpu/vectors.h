// Vectors of one register, by the vector extensions of GCC and Clang: the sweeps are vectorized explicitly and do not
// depend on the optimizer's auto-vectorization.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mfpsn {

// Bytes of a vector, as many as the widest register that the compiler may use has: it lowers wider ones through memory, and
// a training step at AVX2 then took 1.8 times as long
#if defined(__AVX512F__)
constexpr int64_t kRegister = 64;
constexpr const char* kInstructions = "AVX-512";
#elif defined(__AVX__)
constexpr int64_t kRegister = 32;
#if defined(__AVX2__)
constexpr const char* kInstructions = "AVX2";
#else
constexpr const char* kInstructions = "AVX";
#endif
#else
constexpr int64_t kRegister = 16;
#if defined(__SSE4_2__)
constexpr const char* kInstructions = "SSE4.2";
#elif defined(__SSE2__)
constexpr const char* kInstructions = "SSE2";
#elif defined(__ARM_NEON)
constexpr const char* kInstructions = "NEON";
#else
constexpr const char* kInstructions = "16-byte vectors";
#endif
#endif

// Bytes of a line of the caches
constexpr int64_t kLine = 64, kRegistersOfLine = kLine / kRegister;

template <typename acc>
struct Vector {
  typedef acc type __attribute__((vector_size(kRegister)));
};

template <typename acc>
using vec = typename Vector<acc>::type;

template <typename acc>
constexpr int64_t lanes = kRegister / sizeof(acc);

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

// Writes past the caches, to an address that is a multiple of a register: the line is not fetched first. The other registers
// of the line are to follow at once. `flush_past_caches` before another thread reads.
template <typename acc>
inline void put_past_caches(acc* to, vec<acc> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(v));
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

// exp(x) for x ≤ 0, accurate to 1 or 2 ulp: 2^n · e^f with |f| ≤ ln 2 / 2, the series of e^f cut where its remainder is
// below the rounding (5e-9 in float32, 4e-18 in float64). libm's exp, lane by lane, took most of a sweep's time.
template <typename acc>
inline vec<acc> exp_of_negative(vec<acc> x) {
  using integer = std::conditional_t<sizeof(acc) == 4, int32_t, int64_t>;
  typedef integer ints __attribute__((vector_size(kRegister)));
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
