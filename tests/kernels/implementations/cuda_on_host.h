// Enough of CUDA for g++ to compile kernels/csrc/cuda/fused_cuda.cu and run it on the host, so that the very source is tested
// where there is no GPU. One OS thread: the threads of a block are fibers, which take turns at barriers and shuffles, in
// a fixed order. Blocks run one after the other. Shared memory is filled with NaN before each block. Threads that wait
// for each other for ever (a barrier or shuffle that not all of them reach) end the process with a message.
//
// What it cannot show: races between threads of a warp (they do not run at the same time), and time.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)

struct Index3 {
  unsigned int x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cuda_on_host_error = cudaSuccess;
// A test makes the next launch fail
extern "C" inline void cuda_on_host_fail(int code) { cuda_on_host_error = static_cast<cudaError_t>(code); }
__attribute__((used)) static void (*const cuda_on_host_keep)(int) = cuda_on_host_fail;
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_host_error;
  cuda_on_host_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) {
  if (e == cudaErrorInvalidValue) return "invalid argument";
  return e == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "some error";
}

namespace cuda_on_host {

constexpr int kWarpSize = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024;

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::vector<char> stack;
  bool begun = false, done = true;
};

struct Warp {
  int arrived = 0, size = 0;
  long generation = 0;
  unsigned char values[kWarpSize][16];
};

inline std::vector<Fiber> fibers(kMostThreads);
inline std::vector<Warp> warps(kMostThreads / kWarpSize);
inline Warp everyone;
inline jmp_buf scheduler;
inline int current = 0;
inline bool progressed = false;
inline std::function<void()> job;
inline std::vector<unsigned char> shared_memory;

inline void yield() {
  Fiber& f = fibers[current];
  if (_setjmp(f.at) == 0) _longjmp(scheduler, 1);
}

inline void barrier(Warp& w) {
  const long generation = w.generation;
  progressed = true;
  if (++w.arrived == w.size) {
    w.arrived = 0;
    ++w.generation;
    return;
  }
  while (w.generation == generation) yield();
  progressed = true;
}

inline void fiber_main() {
  for (;;) {
    job();
    fibers[current].done = progressed = true;
    yield();
  }
}

// Runs thread t until it yields. A function of its own, so that no variable of the loop lives across the jump.
[[gnu::noinline]] inline void resume(int t) {
  current = t;
  threadIdx.x = t;
  Fiber& f = fibers[t];
  if (_setjmp(scheduler) != 0) return;
  if (f.begun) _longjmp(f.at, 1);
  f.begun = true;
  f.stack.resize(kStack);
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.data();
  f.start.uc_stack.ss_size = kStack;
  f.start.uc_link = nullptr;
  makecontext(&f.start, fiber_main, 0);
  setcontext(&f.start);
}

inline void run_block(int threads) {
  for (int t = 0; t < threads; ++t) fibers[t].done = false;
  for (int w = 0; w * kWarpSize < threads; ++w)
    warps[w].arrived = 0, warps[w].size = std::min(kWarpSize, threads - w * kWarpSize);
  everyone.arrived = 0, everyone.size = threads;
  for (int left = threads; left > 0;) {
    progressed = false;
    left = 0;
    for (int t = 0; t < threads; ++t) {
      if (fibers[t].done) continue;
      resume(t);
      if (!fibers[t].done) ++left;
    }
    if (left > 0 && !progressed) {
      std::fprintf(stderr, "cuda_on_host: %d threads of block %u wait for ever\n", left, blockIdx.x);
      std::abort();
    }
  }
}

template <typename Kernel, typename... A>
void launch(Kernel kernel, unsigned int grid, unsigned int block, size_t shared, void*, const A&... arguments) {
  if (cuda_on_host_error != cudaSuccess) return;
  if (grid == 0 || block == 0 || block > kMostThreads || shared > 48 * 1024) {
    cuda_on_host_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim.x = grid, blockDim.x = block;
  shared_memory.resize(shared + 16);
  job = [&] { kernel(arguments...); };
  for (unsigned int b = 0; b < grid; ++b) {
    blockIdx.x = b;
    std::memset(shared_memory.data(), 0xff, shared_memory.size());
    run_block(block);
  }
}

inline unsigned char* shared() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 15) / 16 * 16);
}

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= 16);
  Warp& w = warps[threadIdx.x / kWarpSize];
  std::memcpy(w.values[threadIdx.x % kWarpSize], &value, sizeof(T));
  barrier(w);
  T got;
  std::memcpy(&got, w.values[source], sizeof(T));
  barrier(w);
  return got;
}

}  // namespace cuda_on_host

#define MFPSN_LAUNCH(kernel, grid, block, shared, stream, ...) \
  cuda_on_host::launch(kernel, grid, block, shared, stream, __VA_ARGS__)
#define MFPSN_DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_host::shared()

// After a switch of fibers threadIdx is another thread's: the scheduler sets it before it resumes one
inline void __syncthreads() { cuda_on_host::barrier(cuda_on_host::everyone); }
inline void __syncwarp() { cuda_on_host::barrier(cuda_on_host::warps[threadIdx.x / cuda_on_host::kWarpSize]); }
template <typename T>
T __shfl_sync(unsigned, T v, int lane) {
  return cuda_on_host::exchange(v, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return cuda_on_host::exchange(v, static_cast<int>(threadIdx.x % cuda_on_host::kWarpSize) ^ mask);
}

struct __half {
  _Float16 v;
};
inline float __half2float(__half h) { return static_cast<float>(h.v); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t wide = static_cast<uint32_t>(h.bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t wide;
  std::memcpy(&wide, &f, 4);
  if (std::isnan(f)) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}

// g++ is told not to contract, so plain operations round once each
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }

using std::copysign;
using std::fabs;
using std::fmax;
using std::frexp;
using std::ldexp;
