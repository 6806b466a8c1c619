// The neuron on CUDA devices: H is never written, and each kernel reads its tensors once.
//
// In training, forward is three launches (statistics, their totals with the fold, fire), backward five (fold,
// reductions, their totals with the chain rule, input, its totals). Sums have two stages, a partial for each group of
// threads and then a warp for each channel, so results are deterministic. See walk.cuh for how threads iterate over time.
#ifndef MFPSN_DTYPES  // bits of the dtypes to compile: a look at the registers of one need not compile all
#define MFPSN_DTYPES 15
#endif

#include "fold.cuh"
#include "types.cuh"
#include "walk.cuh"

namespace mfpsn {

// Partials: count, mean and sum of squared deviations of H = W ∗ X', accumulated about the first H of each thread. That
// pivot is one of the values, so the variance bounds its distance from the mean: the correction subtracted at the end is
// at most `count` times the result.
template <typename scalar, int K, int V, bool SHARED>
__global__ void __launch_bounds__(kBlock, 2) statistics_kernel(const Arguments a) {
  using sum = typename SumType<scalar>::type;
  constexpr int L = SHARED ? 1 : V, ahead = K > 8 ? 1 : 4;
  MFPSN_DYNAMIC_SHARED(shared);
  const int pad = K - static_cast<int>(a.order), dilation = static_cast<int>(a.dilation);
  for_units(a, [&](const Unit& unit) {
    sum w[K][L], scale[L], shift[L], pivot[L], first_sum[L], square_sum[L];
    load_taps<sum, K, L>(a.weight, unit, a, w);
    Vectors<sum, L>::load(a.scale, unit, a, 1, scale);
    Vectors<sum, L>::load(a.shift, unit, a, 0, shift);
    int count = 0;
#pragma unroll
    for (int l = 0; l < L; ++l) pivot[l] = first_sum[l] = square_sum[l] = 0;
    const Tiles<scalar, V == 1> tiles(a, unit, shared, 1, 0);
    for_columns(a, unit, [&](const Column& column) {
      const Line<scalar> x = tiles.open(0, readable<scalar>(a.x), a.x_view, column);
      tiles.ready();
      if (column.active)
        for (int phase = unit.phase; phase < dilation; phase += static_cast<int>(a.phases)) {
          const int first = unit.begin + phase;
          if (first >= unit.end) break;
          Window<sum, K, V, L> window;
          window.clear();
          for (int t0 = walk_start(K - pad, dilation, first); t0 < unit.end; t0 += ahead * dilation) {
            Pack<scalar, V> xs[ahead];
            bool ok[ahead];
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              const int t = t0 + u * dilation;
              if (t >= unit.end) continue;
              xs[u] = *reinterpret_cast<const Pack<scalar, V>*>(x(t));
              ok[u] = valid(a, t, column.n);
            }
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              const int t = t0 + u * dilation;
              if (t >= unit.end) continue;
              window.push(xs[u], ok[u], scale, shift);
              if (t < first || !ok[u]) continue;
              sum h[V];
              window.filter(w, pad, h);
              if (count == 0)
#pragma unroll
                for (int l = 0; l < L; ++l) pivot[l] = h[l];
              count += V / L;
#pragma unroll
              for (int l = 0; l < V; ++l) {
                const sum delta = h[l] - pivot[l % L];
                first_sum[l % L] += delta;
                square_sum[l % L] += delta * delta;
              }
            }
          }
        }
      tiles.ready();
    });
    sum n[L], mean[L], square[L];
#pragma unroll
    for (int l = 0; l < L; ++l) {
      n[l] = static_cast<sum>(count);
      const sum safe = count == 0 ? sum(1) : n[l], shifted = first_sum[l] / safe;
      mean[l] = pivot[l] + shifted;
      square[l] = square_sum[l] - first_sum[l] * shifted;
      square[l] = square[l] < 0 ? sum(0) : square[l];  // a NaN stays
    }
    if (!a.lanes) {  // Chan's update over the group's threads
      for (int step = static_cast<int>(a.width) / 2; step > 0; step /= 2) {
        const sum other_n = __shfl_xor_sync(0xffffffffu, n[0], step);
        const sum other_mean = __shfl_xor_sync(0xffffffffu, mean[0], step);
        const sum other_square = __shfl_xor_sync(0xffffffffu, square[0], step);
        const sum both = n[0] + other_n, safe = both == 0 ? sum(1) : both, delta = other_mean - mean[0];
        mean[0] = (n[0] * mean[0] + other_n * other_mean) / safe;
        square[0] += other_square + delta * delta * (n[0] * other_n / safe);
        n[0] = both;
      }
      // one lane holds the sum, since write_partial adds up the lanes
      if (threadIdx.x % a.width != 0) n[0] = mean[0] = square[0] = 0;
    }
    write_partial<sum, L>(a, unit, 0, n);
    write_partial<sum, L>(a, unit, 1, mean);
    write_partial<sum, L>(a, unit, 2, square);
  });
}

// S = Θ(W_q ∗ X' + b), as H ≥ −b, which is the same in IEEE arithmetic; 0 at masked steps
template <typename scalar, int K, int V, bool SHARED>
__global__ void __launch_bounds__(kBlock, 2) fire_kernel(const Arguments a) {
  using sum = typename SumType<scalar>::type;
  constexpr int L = SHARED ? 1 : V, ahead = K > 8 ? 1 : 4;
  MFPSN_DYNAMIC_SHARED(shared);
  const int pad = K - static_cast<int>(a.order), dilation = static_cast<int>(a.dilation);
  for_units(a, [&](const Unit& unit) {
    sum w[K][L], bias[L], scale[L], shift[L];
    load_taps<sum, K, L>(a.taps, unit, a, w);
    Vectors<sum, L>::load(a.bias, unit, a, 0, bias);
    Vectors<sum, L>::load(a.scale, unit, a, 1, scale);
    Vectors<sum, L>::load(a.shift, unit, a, 0, shift);
    const Tiles<scalar, V == 1> tiles(a, unit, shared, 1, 0);
    for_columns(a, unit, [&](const Column& column) {
      const Line<scalar> x = tiles.open(0, readable<scalar>(a.x), a.x_view, column);
      const Line<scalar> out = tiles.result(0, static_cast<scalar*>(a.out), a.out_view, column);
      tiles.ready();
      if (column.active)
        for (int phase = unit.phase; phase < dilation; phase += static_cast<int>(a.phases)) {
          const int first = unit.begin + phase;
          if (first >= unit.end) break;
          Window<sum, K, V, L> window;
          window.clear();
          for (int t0 = walk_start(K - pad, dilation, first); t0 < unit.end; t0 += ahead * dilation) {
            Pack<scalar, V> xs[ahead];
            bool ok[ahead];
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              const int t = t0 + u * dilation;
              if (t >= unit.end) continue;
              xs[u] = *reinterpret_cast<const Pack<scalar, V>*>(x(t));
              ok[u] = valid(a, t, column.n);
            }
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              const int t = t0 + u * dilation;
              if (t >= unit.end) continue;
              window.push(xs[u], ok[u], scale, shift);
              if (t < first) continue;
              sum h[V];
              window.filter(w, pad, h);
              Pack<scalar, V> spikes;
#pragma unroll
              for (int l = 0; l < V; ++l)
                spikes.v[l] = lower<scalar, sum>(ok[u] && h[l] >= -bias[l % L] ? sum(1) : sum(0));
              *reinterpret_cast<Pack<scalar, V>*>(out(t)) = spikes;
            }
          }
        }
      tiles.close(0, static_cast<scalar*>(a.out), a.out_view, column, unit);
      tiles.ready();
    });
  });
}

// The surrogate derivative, used for dΘ/dU in backward
template <typename sum>
struct Surrogate {
  int64_t kind;
  sum alpha, inner, outer;
  __device__ explicit Surrogate(const Arguments& a)
      : kind(a.surrogate),
        alpha(static_cast<sum>(a.alpha)),
        inner(static_cast<sum>(1.57079632679489661923 * a.alpha)),
        outer(alpha / 2) {}
  __device__ sum operator()(sum u) const {
    if (kind == 0) {
      const sum z = u * inner;
      return quotient(outer, z * z + sum(1));
    }
    if (kind == 1) return quotient(sum(1), u * u * alpha + sum(1));
    const sum s = sum(1) / (sum(1) + exponential(-u * alpha));
    return s * alpha * (sum(1) - s);
  }
};

// Partials: k sums of dU·X'[t − lag], the sum of dU = grad·Θ'(U), the count of valid steps
template <typename scalar, int K, int V, bool SHARED>
__global__ void __launch_bounds__(kBlock, 2) reductions_kernel(const Arguments a) {
  using sum = typename SumType<scalar>::type;
  constexpr int L = SHARED ? 1 : V, ahead = K > 8 ? 1 : K > 4 || V > 4 ? 2 : 4;
  MFPSN_DYNAMIC_SHARED(shared);
  const int pad = K - static_cast<int>(a.order), dilation = static_cast<int>(a.dilation);
  const Surrogate<sum> surrogate(a);
  for_units(a, [&](const Unit& unit) {
    sum w[K][L], bias[L], scale[L], shift[L], dtaps[K][L], dbias[L];
    load_taps<sum, K, L>(a.taps, unit, a, w);
    Vectors<sum, L>::load(a.bias, unit, a, 0, bias);
    Vectors<sum, L>::load(a.scale, unit, a, 1, scale);
    Vectors<sum, L>::load(a.shift, unit, a, 0, shift);
    int count = 0;
#pragma unroll
    for (int l = 0; l < L; ++l) {
      dbias[l] = 0;
#pragma unroll
      for (int i = 0; i < K; ++i) dtaps[i][l] = 0;
    }
    const Tiles<scalar, V == 1> tiles(a, unit, shared, 2, 0);
    for_columns(a, unit, [&](const Column& column) {
      const Line<scalar> x = tiles.open(0, readable<scalar>(a.x), a.x_view, column);
      const Line<scalar> grad = tiles.open(1, readable<scalar>(a.grad), a.grad_view, column);
      tiles.ready();
      if (column.active)
        for (int phase = unit.phase; phase < dilation; phase += static_cast<int>(a.phases)) {
          const int first = unit.begin + phase;
          if (first >= unit.end) break;
          Window<sum, K, V, L> window;
          window.clear();
          for (int t0 = walk_start(K - pad, dilation, first); t0 < unit.end; t0 += ahead * dilation) {
            Pack<scalar, V> xs[ahead], gs[ahead];
            bool ok[ahead];
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              const int t = t0 + u * dilation;
              if (t >= unit.end) continue;
              xs[u] = *reinterpret_cast<const Pack<scalar, V>*>(x(t));
              if (t >= first) gs[u] = *reinterpret_cast<const Pack<scalar, V>*>(grad(t));
              ok[u] = valid(a, t, column.n);
            }
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              const int t = t0 + u * dilation;
              if (t >= unit.end) continue;
              window.push(xs[u], ok[u], scale, shift);
              if (t < first || !ok[u]) continue;
              sum h[V];
              window.filter(w, pad, h);
              count += V / L;
#pragma unroll
              for (int l = 0; l < V; ++l) {
                h[l] = lift(gs[u].v[l]) * surrogate(h[l] + bias[l % L]);
                dbias[l % L] += h[l];
              }
#pragma unroll
              for (int i = 0; i < K; ++i)
#pragma unroll
                for (int l = 0; l < V; ++l) dtaps[i][l % L] += h[l] * window.v[i][l];
            }
          }
        }
      tiles.ready();
    });
#pragma unroll
    for (int i = 0; i < K; ++i)
      if (i >= pad) write_partial<sum, L>(a, unit, i - pad, dtaps[i]);
    write_partial<sum, L>(a, unit, a.order, dbias);
    sum counts[L];
#pragma unroll
    for (int l = 0; l < L; ++l) counts[l] = static_cast<sum>(count);
    write_partial<sum, L>(a, unit, a.order + 1, counts);
  });
}

// dX, if requested, and partials: k sums of dH·X'[t − lag] if the statistics are those of the batch, dscale, dshift. The
// dU and dH = offset + slope·H of a step are added to the K values of dX that they reach, which are kept in registers
// (`waiting`); the oldest of them is complete then.
template <typename scalar, int K, int V, bool SHARED>
__global__ void __launch_bounds__(kBlock, 2) input_kernel(const Arguments a) {
  using sum = typename SumType<scalar>::type;
  constexpr int L = SHARED ? 1 : V, ahead = K > 8 || K * V > 16 ? 1 : K > 4 || V > 4 || K * L > 8 ? 2 : 4;
  MFPSN_DYNAMIC_SHARED(shared);
  const int pad = K - static_cast<int>(a.order), dilation = static_cast<int>(a.dilation);
  const bool affine = a.scale != nullptr || a.shift != nullptr, wanted = a.input_grad || affine;
  const int reach = (K - pad - 1) * dilation, delay = (K - 1) * dilation;
  const Surrogate<sum> surrogate(a);
  for_units(a, [&](const Unit& unit) {
    sum wq[K][L], w[K][L], bias[L], scale[L], shift[L], offset[L], slope[L];
    sum dweight[K][L], dscale[L], dshift[L];
    load_taps<sum, K, L>(a.taps, unit, a, wq);
    load_taps<sum, K, L>(a.training ? a.weight : nullptr, unit, a, w);
    Vectors<sum, L>::load(a.bias, unit, a, 0, bias);
    Vectors<sum, L>::load(a.scale, unit, a, 1, scale);
    Vectors<sum, L>::load(a.shift, unit, a, 0, shift);
    Vectors<sum, L>::load(a.training ? a.offset : nullptr, unit, a, 0, offset);
    Vectors<sum, L>::load(a.training ? a.slope : nullptr, unit, a, 0, slope);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      dscale[l] = dshift[l] = 0;
#pragma unroll
      for (int i = 0; i < K; ++i) dweight[i][l] = 0;
    }
    const Tiles<scalar, V == 1> tiles(a, unit, shared, 2, reach);
    const int last = static_cast<int>(minimum(a.steps, unit.end + reach));
    for_columns(a, unit, [&](const Column& column) {
      const Line<scalar> x = tiles.open(0, readable<scalar>(a.x), a.x_view, column);
      const Line<scalar> grad = tiles.open(1, readable<scalar>(a.grad), a.grad_view, column);
      const Line<scalar> out = tiles.result(1, static_cast<scalar*>(a.out), a.out_view, column);
      tiles.ready();
      if (column.active)
        for (int phase = unit.phase; phase < dilation; phase += static_cast<int>(a.phases)) {
          const int first = unit.begin + phase;
          if (first >= unit.end) break;
          Window<sum, K, V, L> window;
          window.clear();
          sum waiting[K][V];  // dX' of the steps t − (K−1)·d … t
#pragma unroll
          for (int i = 0; i < K; ++i)
#pragma unroll
            for (int l = 0; l < V; ++l) waiting[i][l] = 0;
          // past `last` nothing is read, but the waiting values are still written
          for (int t0 = walk_start(K - pad, dilation, first); t0 < unit.end + delay; t0 += ahead * dilation) {
            Pack<scalar, V> xs[ahead], gs[ahead];
            bool ok[ahead];
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              const int t = t0 + u * dilation;
              if (t >= last) continue;
              xs[u] = *reinterpret_cast<const Pack<scalar, V>*>(x(t));
              if (t >= first) gs[u] = *reinterpret_cast<const Pack<scalar, V>*>(grad(t));
              ok[u] = valid(a, t, column.n);
            }
#pragma unroll
            for (int u = 0; u < ahead; ++u) {
              const int t = t0 + u * dilation;
              if (t < last) window.push(xs[u], ok[u], scale, shift);
              if (t < first) continue;
#pragma unroll
              for (int l = 0; l < V; ++l) {
#pragma unroll
                for (int i = 0; i + 1 < K; ++i) waiting[i][l] = waiting[i + 1][l];
                waiting[K - 1][l] = 0;
              }
              if (t < last && ok[u]) {
                if (wanted) {
                  sum du[V];
                  window.filter(wq, pad, du);
#pragma unroll
                  for (int l = 0; l < V; ++l) du[l] = lift(gs[u].v[l]) * surrogate(du[l] + bias[l % L]);
#pragma unroll
                  for (int i = 0; i < K; ++i)
                    if (i >= pad)
#pragma unroll
                      for (int l = 0; l < V; ++l) waiting[i][l] += wq[i][l % L] * du[l];
                }
                if (a.training) {
                  sum dh[V];
                  window.filter(w, pad, dh);
#pragma unroll
                  for (int l = 0; l < V; ++l) dh[l] = slope[l % L] * dh[l] + offset[l % L];
#pragma unroll
                  for (int i = 0; i < K; ++i)
                    if (i >= pad)
#pragma unroll
                      for (int l = 0; l < V; ++l) waiting[i][l] += w[i][l % L] * dh[l];
                  if (t < unit.end)
#pragma unroll
                    for (int i = 0; i < K; ++i)
#pragma unroll
                      for (int l = 0; l < V; ++l) dweight[i][l % L] += dh[l] * window.v[i][l];
                }
              }
              const int s = t - delay;
              if (!wanted || s < first || s >= unit.end) continue;
              const bool counts = valid(a, s, column.n);
              Pack<scalar, V> raw{}, dx;
              if (a.scale != nullptr) raw = *reinterpret_cast<const Pack<scalar, V>*>(x(s));
#pragma unroll
              for (int l = 0; l < V; ++l) {
                const sum v = counts ? waiting[0][l] : sum(0);
                if (a.scale != nullptr && counts) dscale[l % L] += v * lift(raw.v[l]);
                dshift[l % L] += v;
                dx.v[l] = lower<scalar, sum>(v * scale[l % L]);
              }
              if (a.input_grad) *reinterpret_cast<Pack<scalar, V>*>(out(s)) = dx;
            }
          }
        }
      if (a.input_grad) tiles.close(1, static_cast<scalar*>(a.out), a.out_view, column, unit);
      tiles.ready();
    });
    if (a.training)
#pragma unroll
      for (int i = 0; i < K; ++i)
        if (i >= pad) write_partial<sum, L>(a, unit, i - pad, dweight[i]);
    if (a.scale != nullptr) write_partial<sum, L>(a, unit, a.order, dscale);
    if (a.shift != nullptr) write_partial<sum, L>(a, unit, a.order + 1, dshift);
  });
}

enum Stage {
  kStatistics = 1,
  kFinishStatistics = 2,
  kFold = 4,
  kFire = 8,
  kReductions = 16,
  kFinishReductions = 32,
  kInput = 64,
  kFinishInput = 128
};

inline unsigned int grid_of(const Arguments& a, int64_t blocks) {
  return static_cast<unsigned int>(blocks < a.grid_limit ? blocks : a.grid_limit);
}

template <typename scalar, int K, int V, bool SHARED>
cudaError_t walk(const Arguments& a, Stage stage, cudaStream_t stream) {
  const int64_t groups = kBlock / a.width;
  const unsigned int grid = grid_of(a, (Extent(a).units + groups - 1) / groups);
  const size_t tile = static_cast<size_t>(a.tile) * kBlock * sizeof(scalar);
  const auto kernel = stage == kStatistics   ? statistics_kernel<scalar, K, V, SHARED>
                      : stage == kFire       ? fire_kernel<scalar, K, V, SHARED>
                      : stage == kReductions ? reductions_kernel<scalar, K, V, SHARED>
                                             : input_kernel<scalar, K, V, SHARED>;
  const size_t shared = stage == kReductions || stage == kInput ? 2 * tile : tile;
  MFPSN_LAUNCH(kernel, grid, kBlock, shared, stream, a);
  return cudaGetLastError();
}

// Elements per thread by the window's length; kernels/implementations/fused_cuda_plan.py has the same table (_VECTORS)
template <typename scalar>
cudaError_t walk(const Arguments& a, Stage stage, cudaStream_t stream) {
  constexpr int half = sizeof(scalar) == 2 ? 2 : 1;
  if (a.order < 1 || a.order > 32) return cudaErrorInvalidValue;
  if constexpr (sizeof(scalar) == 8) {
    if (a.vector != 1 || a.order > 8) return cudaErrorInvalidValue;  // see MAX_ORDER_FLOAT64
    return walk<scalar, 8, 1, true>(a, stage, stream);
  } else {
    if (a.vector == 1) {
      if (a.order <= 2) return walk<scalar, 2, 1, true>(a, stage, stream);
      if (a.order <= 4) return walk<scalar, 4, 1, true>(a, stage, stream);
      if (a.order <= 8) return walk<scalar, 8, 1, true>(a, stage, stream);
      if (a.order <= 16) return walk<scalar, 16, 1, true>(a, stage, stream);
      return walk<scalar, 32, 1, true>(a, stage, stream);
    }
    if (!a.lanes) {
      if (a.order <= 2 && a.vector == 4 * half) return walk<scalar, 2, 4 * half, true>(a, stage, stream);
      if (a.order <= 4 && a.vector == 4 * half) return walk<scalar, 4, 4 * half, true>(a, stage, stream);
      if (a.order <= 8 && a.vector == 4) return walk<scalar, 8, 4, true>(a, stage, stream);
    } else {
      if (a.order <= 2 && a.vector == 4 * half) return walk<scalar, 2, 4 * half, false>(a, stage, stream);
      if (a.order <= 4 && a.vector == 4) return walk<scalar, 4, 4, false>(a, stage, stream);
      if (a.order <= 8 && a.vector == 2) return walk<scalar, 8, 2, false>(a, stage, stream);
    }
    return cudaErrorInvalidValue;
  }
}

template <typename sum>
cudaError_t per_channel(const Arguments& a, Stage stage, cudaStream_t stream) {
  constexpr int64_t warps = kBlock / kWarp;
  const unsigned int grid = grid_of(a, (a.channels + warps - 1) / warps);
  const auto kernel = stage == kFold               ? fold_kernel<sum>
                      : stage == kFinishStatistics ? finish_statistics_kernel<sum>
                      : stage == kFinishReductions ? finish_reductions_kernel<sum>
                                                   : finish_input_kernel<sum>;
  MFPSN_LAUNCH(kernel, grid, kBlock, 0, stream, a);
  return cudaGetLastError();
}

template <typename scalar>
cudaError_t run(const Arguments& a, int64_t stages, cudaStream_t stream) {
  using sum = typename SumType<scalar>::type;
  for (int64_t stage = kStatistics; stage <= kFinishInput; stage *= 2) {
    if (!(stages & stage)) continue;
    const Stage one = static_cast<Stage>(stage);
    const bool walks = one == kStatistics || one == kFire || one == kReductions || one == kInput;
    const cudaError_t error = walks ? walk<scalar>(a, one, stream) : per_channel<sum>(a, one, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace mfpsn

// Launches the stages given by the bits of `stages`, in order, on the stream; returns a cudaError code, 0 on success.
extern "C" int mfpsn_cuda_run(const mfpsn::Arguments* a, int64_t stages, void* stream) {
  // this library's runtime is linked statically and has a current device of its own
  if (const cudaError_t error = cudaSetDevice(static_cast<int>(a->device)); error != cudaSuccess) return error;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a->dtype) {
#if MFPSN_DTYPES & 1
    case 0: return mfpsn::run<float>(*a, stages, s);
#endif
#if MFPSN_DTYPES & 2
    case 1: return mfpsn::run<__half>(*a, stages, s);
#endif
#if MFPSN_DTYPES & 4
    case 2: return mfpsn::run<__nv_bfloat16>(*a, stages, s);
#endif
#if MFPSN_DTYPES & 8
    case 3: return mfpsn::run<double>(*a, stages, s);
#endif
    default: return cudaErrorInvalidValue;
  }
}

extern "C" const char* mfpsn_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

extern "C" int64_t mfpsn_cuda_arguments_size() { return sizeof(mfpsn::Arguments); }
