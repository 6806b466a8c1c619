// Arguments that the host passes to the kernels, value types, and the few CUDA names that the host emulation replaces.
//
// No PyTorch header is included anywhere in these sources: they compile in seconds instead of minutes, the same with
// every release of PyTorch, and against any toolkit; Python passes pointers, strides and a stream.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MFPSN_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define MFPSN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_on_host.h"
#endif

namespace mfpsn {

constexpr int kBlock = 128, kWarp = 32;

struct View {  // strides in elements; 0 where a dim has one entry
  int64_t time, batch, channel, position;
};

// Mirrored by kernels/implementations/fused_cuda.py; 8-byte fields only, so that no padding differs.
struct Arguments {
  int64_t dtype;  // of x: 0 float32, 1 float16, 2 bfloat16, 3 float64
  int64_t device;
  int64_t steps, batch, channels, positions, order, dilation;
  // How the work is partitioned (see plan in kernels/implementations/fused_cuda_plan.py)
  int64_t lanes;      // neighboring threads are neighbors along positions (0) or channels (1)
  int64_t width;      // threads of a group, a power of two up to 32
  int64_t vector;     // elements per thread
  int64_t tile;       // pitch of the tiles in shared memory through which rows of time are copied; 0: no tiles
  int64_t wide_tile;  // elements of one load into it
  int64_t chunks;     // groups among which the columns of a row are divided
  int64_t phases;     // groups among which the residues of t mod dilation are divided
  int64_t segments;   // groups among which time is divided, `span` steps each
  int64_t span;
  int64_t partials;   // entries per channel and quantity in `partial`
  int64_t grid_limit;
  // Constants
  int64_t surrogate;  // 0 arctan, 1 rational, 2 sigmoid
  int64_t quantizer;  // 0 none, 1 straight-through, 2 round-only
  int64_t min_exponent, max_exponent;
  int64_t chain;      // backward of the whole op: the reductions are followed by the chain rule through the fold
  int64_t training;   // the statistics are those of this batch
  int64_t input_grad;
  double alpha, eps;
  // Tensors the size of X
  View x_view, grad_view, out_view;
  const void *x, *grad;
  void* out;  // spikes, or dX
  // Vectors in the type of the sums; null where there is none
  const uint8_t* mask;  // (T, N)
  const void *scale, *shift, *weight, *gamma, *beta;
  void *mean, *var, *taps, *bias, *offset, *slope;
  void *dtaps, *dbias, *dweight, *dgamma, *dbeta, *dscale, *dshift;
  void* partial;  // (quantities, C, partials)
};

template <typename scalar>
struct SumType {
  using type = float;
};
template <>
struct SumType<double> {
  using type = double;
};

__device__ inline float lift(float v) { return v; }
__device__ inline double lift(double v) { return v; }
__device__ inline float lift(__half v) { return __half2float(v); }
__device__ inline float lift(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename scalar, typename sum>
__device__ inline scalar lower(sum v) {
  return v;
}
template <>
__device__ inline __half lower<__half, float>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 lower<__nv_bfloat16, float>(float v) {
  return __float2bfloat16_rn(v);
}

// Each rounds once: contraction to fused multiply-adds is prevented, so that results equal PyTorch's bit for bit.
__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float minus(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float over(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float root(float a) { return __fsqrt_rn(a); }
__device__ inline double times(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double plus(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double minus(double a, double b) { return __dsub_rn(a, b); }
__device__ inline double over(double a, double b) { return __ddiv_rn(a, b); }
__device__ inline double root(double a) { return __dsqrt_rn(a); }

__device__ inline float quotient(float a, float b) { return __fdividef(a, b); }  // 2 ulp; for gradients only
__device__ inline double quotient(double a, double b) { return a / b; }
__device__ inline float exponential(float a) { return expf(a); }
__device__ inline double exponential(double a) { return exp(a); }

// V neighbors in one load or store
template <typename scalar, int V>
struct alignas(sizeof(scalar) * V) Pack {
  scalar v[V];
};

}  // namespace mfpsn
