// The four parts of the neuron on the CPU, each in as few sweeps over memory as it can be done in.
//
// A tensor is seen as (T, N, J) with J = C·P elements (channel and position), whatever its layout and strides: element
// (t, n, j) lies at t·st + n·sn + offset[j]. A task takes a block of B elements j and a chunk of the batch, loads the
// slab (T, B) of one n into a buffer that stays in cache (lifted to the type of the sums, affine and mask applied), and
// does everything that needs it there. All inner loops run over j with unit stride, so the compiler vectorises them
// whatever C and P are; taps are expanded to (k, B) once a block. H is never written to memory.
//
// Sums: per element j over n and t within a task, in a fixed order; the caller adds elements and chunks. So results do
// not depend on the number of threads.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct View {
  int64_t st, sn;         // strides of t and n
  const int64_t* offset;  // (J), or null where offset[j] = j·sj
  int64_t sj;
};

struct Problem {
  int64_t steps, batch, elements, positions, order, dilation, block, chunks;
  const void* scale;           // (C) of the sums' type, or null
  const void* shift;           // (C) of the sums' type, or null
  const uint8_t* mask;         // (T, N), or null
  int64_t surrogate;           // 0 arctan, 1 rational, 2 sigmoid
  double alpha;
};

inline int64_t lag_of(const Problem& p, int64_t i) { return (p.order - 1 - i) * p.dilation; }

template <typename scalar, typename acc>
void load(const Problem& p, const View& v, const scalar* x, int64_t n, int64_t j0, int64_t width, acc* out) {
  for (int64_t t = 0; t < p.steps; ++t) {
    const scalar* row = x + t * v.st + n * v.sn;
    acc* to = out + t * p.block;
    if (v.offset != nullptr) {
      for (int64_t b = 0; b < width; ++b) to[b] = static_cast<acc>(row[v.offset[j0 + b]]);
    } else if (v.sj == 1) {
      const scalar* from = row + j0;
      for (int64_t b = 0; b < width; ++b) to[b] = static_cast<acc>(from[b]);
    }
  }
  if (v.offset == nullptr && v.sj != 1) {  // time-last: rows of T, read row by row
    for (int64_t b = 0; b < width; ++b) {
      const scalar* from = x + n * v.sn + (j0 + b) * v.sj;
      for (int64_t t = 0; t < p.steps; ++t) out[t * p.block + b] = static_cast<acc>(from[t * v.st]);
    }
  }
}

template <typename scalar, typename acc>
void store(const Problem& p, const View& v, scalar* x, int64_t n, int64_t j0, int64_t width, const acc* in) {
  if (v.offset == nullptr && v.sj != 1) {
    for (int64_t b = 0; b < width; ++b) {
      scalar* to = x + n * v.sn + (j0 + b) * v.sj;
      for (int64_t t = 0; t < p.steps; ++t) to[t * v.st] = static_cast<scalar>(in[t * p.block + b]);
    }
    return;
  }
  for (int64_t t = 0; t < p.steps; ++t) {
    scalar* row = x + t * v.st + n * v.sn;
    const acc* from = in + t * p.block;
    if (v.offset != nullptr) {
      for (int64_t b = 0; b < width; ++b) row[v.offset[j0 + b]] = static_cast<scalar>(from[b]);
    } else {
      for (int64_t b = 0; b < width; ++b) row[j0 + b] = static_cast<scalar>(from[b]);
    }
  }
}

inline bool valid(const Problem& p, int64_t t, int64_t n) { return p.mask == nullptr || p.mask[t * p.batch + n]; }

// X' = mask · (scale · X + shift)
template <typename acc>
void lift(const Problem& p, int64_t n, int64_t width, const acc* scale, const acc* shift, acc* x) {
  for (int64_t t = 0; t < p.steps; ++t) {
    acc* row = x + t * p.block;
    if (!valid(p, t, n)) {
      std::fill(row, row + width, acc(0));
      continue;
    }
    if (p.scale != nullptr)
      for (int64_t b = 0; b < width; ++b) row[b] *= scale[b];
    if (p.shift != nullptr)
      for (int64_t b = 0; b < width; ++b) row[b] += shift[b];
  }
}

// (C, k) → (k, B): what element j needs, next to what its neighbours need
template <typename acc>
void expand_taps(const Problem& p, const acc* w, int64_t j0, int64_t width, acc* out) {
  for (int64_t b = 0; b < width; ++b) {
    const int64_t c = (j0 + b) / p.positions;
    for (int64_t i = 0; i < p.order; ++i) out[i * p.block + b] = w[c * p.order + i];
  }
}

template <typename acc>
void expand(const Problem& p, const void* v, int64_t j0, int64_t width, acc* out) {
  if (v == nullptr) return;
  for (int64_t b = 0; b < width; ++b) out[b] = static_cast<const acc*>(v)[(j0 + b) / p.positions];
}

// out[b] (+)= Σ_m left_m[b] · right_m[b], the products added in their order. What filters, transposed filters and
// correlations have in common; up to four products a sweep, so that out is loaded and stored once for them.
template <typename acc>
struct Products {
  std::vector<const acc*> left, right;
  void clear() { left.clear(), right.clear(); }
  void add(const acc* l, const acc* r) { left.push_back(l), right.push_back(r); }

  void sum(acc* __restrict__ out, int64_t width, bool accumulate) const {
    const size_t count = left.size();
    if (count == 0 && !accumulate) std::fill(out, out + width, acc(0));
    for (size_t m = 0; m < count;) {
      const bool add = accumulate || m > 0;
      const acc *__restrict__ l0 = left[m], *__restrict__ r0 = right[m];
      if (count - m >= 4) {
        const acc *__restrict__ l1 = left[m + 1], *__restrict__ r1 = right[m + 1];
        const acc *__restrict__ l2 = left[m + 2], *__restrict__ r2 = right[m + 2];
        const acc *__restrict__ l3 = left[m + 3], *__restrict__ r3 = right[m + 3];
        if (add)
          for (int64_t b = 0; b < width; ++b)
            out[b] = (((out[b] + l0[b] * r0[b]) + l1[b] * r1[b]) + l2[b] * r2[b]) + l3[b] * r3[b];
        else
          for (int64_t b = 0; b < width; ++b)
            out[b] = ((l0[b] * r0[b] + l1[b] * r1[b]) + l2[b] * r2[b]) + l3[b] * r3[b];
        m += 4;
      } else if (count - m >= 2) {
        const acc *__restrict__ l1 = left[m + 1], *__restrict__ r1 = right[m + 1];
        if (add)
          for (int64_t b = 0; b < width; ++b) out[b] = (out[b] + l0[b] * r0[b]) + l1[b] * r1[b];
        else
          for (int64_t b = 0; b < width; ++b) out[b] = l0[b] * r0[b] + l1[b] * r1[b];
        m += 2;
      } else {
        if (add)
          for (int64_t b = 0; b < width; ++b) out[b] += l0[b] * r0[b];
        else
          for (int64_t b = 0; b < width; ++b) out[b] = l0[b] * r0[b];
        m += 1;
      }
    }
  }
};

// One step of H (10); taps in the order i = 0 … k−1
template <typename acc>
inline void filter_step(const Problem& p, const acc* x, const acc* w, int64_t t, int64_t width, acc* h,
                        Products<acc>& products) {
  products.clear();
  for (int64_t i = 0; i < p.order; ++i) {
    const int64_t source = t - lag_of(p, i);
    if (source >= 0) products.add(w + i * p.block, x + source * p.block);
  }
  products.sum(h, width, false);
}

// du = grad · Θ'(u), in place of u
template <typename acc>
inline void surrogate_step(const Problem& p, const acc* grad, int64_t width, acc* u) {
  const acc alpha = static_cast<acc>(p.alpha);
  if (p.surrogate == 0) {
    const acc inner = static_cast<acc>(M_PI * p.alpha / 2), outer = alpha / 2;
    for (int64_t b = 0; b < width; ++b) {
      const acc z = u[b] * inner;
      u[b] = outer / (z * z + acc(1)) * grad[b];
    }
  } else if (p.surrogate == 1) {
    for (int64_t b = 0; b < width; ++b) u[b] = acc(1) / (u[b] * u[b] * alpha + acc(1)) * grad[b];
  } else {
    for (int64_t b = 0; b < width; ++b) {
      const acc s = acc(1) / (acc(1) + std::exp(-u[b] * alpha));
      u[b] = s * alpha * (acc(1) - s) * grad[b];
    }
  }
}

// Runs body(j0, width, n0, n1, chunk) for each block of elements and chunk of the batch
template <typename Body>
void for_tasks(const Problem& p, const Body& body) {
  const int64_t blocks = (p.elements + p.block - 1) / p.block;
  at::parallel_for(0, blocks * p.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, j0 = task % blocks * p.block;
      const int64_t n0 = p.batch * chunk / p.chunks, n1 = p.batch * (chunk + 1) / p.chunks;
      body(j0, std::min(p.block, p.elements - j0), n0, n1, chunk);
    }
  });
}

// out (chunks, 3, J): count, mean, sum of squared deviations of H, by Chan's pairwise update over n
template <typename scalar, typename acc>
void statistics(const Problem& p, const View& v, const scalar* x, const acc* weight, acc* out) {
  for_tasks(p, [&](int64_t j0, int64_t width, int64_t n0, int64_t n1, int64_t chunk) {
    const int64_t B = p.block;
    Products<acc> products;
    std::vector<acc> slab(p.steps * B), h(p.steps * B), w(p.order * B), scale(B), shift(B), mean(B, 0), square(B, 0), m(B);
    expand_taps(p, weight, j0, width, w.data());
    expand(p, p.scale, j0, width, scale.data());
    expand(p, p.shift, j0, width, shift.data());
    acc count = 0;
    for (int64_t n = n0; n < n1; ++n) {
      load(p, v, x, n, j0, width, slab.data());
      lift(p, n, width, scale.data(), shift.data(), slab.data());
      std::fill(m.begin(), m.end(), acc(0));
      int64_t steps = 0;
      for (int64_t t = 0; t < p.steps; ++t) {
        if (!valid(p, t, n)) continue;
        acc* row = h.data() + steps++ * B;
        filter_step(p, slab.data(), w.data(), t, width, row, products);
        for (int64_t b = 0; b < width; ++b) m[b] += row[b];
      }
      if (steps == 0) continue;
      const acc inverse = acc(1) / steps, total = count + steps, share = steps / total, both = count * share;
      for (int64_t b = 0; b < width; ++b) m[b] *= inverse;
      for (int64_t t = 0; t < steps; ++t) {
        const acc* row = h.data() + t * B;
        for (int64_t b = 0; b < width; ++b) square[b] += (row[b] - m[b]) * (row[b] - m[b]);
      }
      for (int64_t b = 0; b < width; ++b) {
        const acc delta = m[b] - mean[b];
        mean[b] += delta * share;
        square[b] += delta * delta * both;
      }
      count = total;
    }
    acc* to = out + chunk * 3 * p.elements + j0;
    std::fill(to, to + width, count);
    std::copy(mean.begin(), mean.begin() + width, to + p.elements);
    std::copy(square.begin(), square.begin() + width, to + 2 * p.elements);
  });
}

template <typename scalar, typename acc>
void fire(const Problem& p, const View& v, const scalar* x, const acc* taps, const acc* bias, const View& vs, scalar* spikes) {
  for_tasks(p, [&](int64_t j0, int64_t width, int64_t n0, int64_t n1, int64_t) {
    const int64_t B = p.block;
    Products<acc> products;
    std::vector<acc> slab(p.steps * B), out(p.steps * B), w(p.order * B), scale(B), shift(B), threshold(B);
    expand_taps(p, taps, j0, width, w.data());
    expand(p, p.scale, j0, width, scale.data());
    expand(p, p.shift, j0, width, shift.data());
    expand(p, bias, j0, width, threshold.data());
    for (int64_t b = 0; b < width; ++b) threshold[b] = -threshold[b];
    for (int64_t n = n0; n < n1; ++n) {
      load(p, v, x, n, j0, width, slab.data());
      lift(p, n, width, scale.data(), shift.data(), slab.data());
      for (int64_t t = 0; t < p.steps; ++t) {
        acc* row = out.data() + t * B;
        if (!valid(p, t, n)) {
          std::fill(row, row + width, acc(0));
          continue;
        }
        filter_step(p, slab.data(), w.data(), t, width, row, products);
        for (int64_t b = 0; b < width; ++b) row[b] = row[b] >= threshold[b] ? acc(1) : acc(0);
      }
      store(p, vs, spikes, n, j0, width, out.data());
    }
  });
}

// Recomputes dU of one n into du; grad is loaded into g
template <typename scalar, typename acc>
void membrane_grad(const Problem& p, const View& vg, const scalar* grad, const acc* slab, const acc* w, const acc* bias,
                   int64_t n, int64_t j0, int64_t width, acc* g, acc* du, Products<acc>& products) {
  load(p, vg, grad, n, j0, width, g);
  for (int64_t t = 0; t < p.steps; ++t) {
    acc* row = du + t * p.block;
    if (!valid(p, t, n)) {
      std::fill(row, row + width, acc(0));
      continue;
    }
    filter_step(p, slab, w, t, width, row, products);
    for (int64_t b = 0; b < width; ++b) row[b] += bias[b];
    surrogate_step(p, g + t * p.block, width, row);
  }
}

// sums[i] += Σ_t d[t] · x[t − lag_i]
template <typename acc>
void correlate(const Problem& p, const acc* d, const acc* x, int64_t width, acc* sums, Products<acc>& products) {
  for (int64_t i = 0; i < p.order; ++i) {
    products.clear();
    for (int64_t t = lag_of(p, i); t < p.steps; ++t)
      products.add(d + t * p.block, x + (t - lag_of(p, i)) * p.block);
    products.sum(sums + i * p.block, width, true);
  }
}

// dx[s] (+)= Σ_i w_i · d[s + lag_i]
template <typename acc>
void transposed(const Problem& p, const acc* d, const acc* w, int64_t width, acc* dx, bool accumulate,
                Products<acc>& products) {
  for (int64_t s = 0; s < p.steps; ++s) {
    products.clear();
    for (int64_t i = 0; i < p.order; ++i)
      if (s + lag_of(p, i) < p.steps) products.add(w + i * p.block, d + (s + lag_of(p, i)) * p.block);
    products.sum(dx + s * p.block, width, accumulate);
  }
}

// out (chunks, k + 1, J): dL/dtaps, dL/dbias
template <typename scalar, typename acc>
void backward_reductions(const Problem& p, const View& v, const scalar* x, const View& vg, const scalar* grad,
                         const acc* taps, const acc* bias, acc* out) {
  for_tasks(p, [&](int64_t j0, int64_t width, int64_t n0, int64_t n1, int64_t chunk) {
    const int64_t B = p.block;
    Products<acc> products;
    std::vector<acc> slab(p.steps * B), g(p.steps * B), du(p.steps * B), w(p.order * B), add(B), scale(B), shift(B),
        sums((p.order + 1) * B, 0);
    expand_taps(p, taps, j0, width, w.data());
    expand(p, bias, j0, width, add.data());
    expand(p, p.scale, j0, width, scale.data());
    expand(p, p.shift, j0, width, shift.data());
    for (int64_t n = n0; n < n1; ++n) {
      load(p, v, x, n, j0, width, slab.data());
      lift(p, n, width, scale.data(), shift.data(), slab.data());
      membrane_grad(p, vg, grad, slab.data(), w.data(), add.data(), n, j0, width, g.data(), du.data(), products);
      correlate(p, du.data(), slab.data(), width, sums.data(), products);
      acc* total = sums.data() + p.order * B;
      for (int64_t t = 0; t < p.steps; ++t)
        for (int64_t b = 0; b < width; ++b) total[b] += du[t * B + b];
    }
    for (int64_t i = 0; i <= p.order; ++i)
      std::copy_n(sums.data() + i * B, width, out + (chunk * (p.order + 1) + i) * p.elements + j0);
  });
}

// dx unless null; out (chunks, k + 2, J): dL/dweight through the statistics, dL/dscale, dL/dshift
template <typename scalar, typename acc>
void backward_input(const Problem& p, const View& v, const scalar* x, const View& vg, const scalar* grad, const acc* taps,
                    const acc* bias, const acc* weight, const acc* offset, const acc* slope, const View& vd, scalar* dx,
                    acc* out) {
  const bool affine = p.scale != nullptr || p.shift != nullptr, wanted = dx != nullptr || affine;
  for_tasks(p, [&](int64_t j0, int64_t width, int64_t n0, int64_t n1, int64_t chunk) {
    const int64_t B = p.block;
    Products<acc> products;
    std::vector<acc> slab(p.steps * B), raw(affine ? p.steps * B : 0), g(p.steps * B), du(p.steps * B), d(p.steps * B),
        wq(p.order * B), w(p.order * B), add(B), scale(B), shift(B), a(B), s(B), sums((p.order + 2) * B, 0);
    expand_taps(p, taps, j0, width, wq.data());
    expand(p, bias, j0, width, add.data());
    expand(p, p.scale, j0, width, scale.data());
    expand(p, p.shift, j0, width, shift.data());
    if (offset != nullptr) {
      expand_taps(p, weight, j0, width, w.data());
      expand(p, offset, j0, width, a.data());
      expand(p, slope, j0, width, s.data());
    }
    for (int64_t n = n0; n < n1; ++n) {
      load(p, v, x, n, j0, width, slab.data());
      if (affine) std::copy(slab.begin(), slab.end(), raw.begin());
      lift(p, n, width, scale.data(), shift.data(), slab.data());
      if (wanted) {
        membrane_grad(p, vg, grad, slab.data(), wq.data(), add.data(), n, j0, width, g.data(), du.data(), products);
        transposed(p, du.data(), wq.data(), width, d.data(), false, products);
      }
      if (offset != nullptr) {
        acc* dh = du.data();
        for (int64_t t = 0; t < p.steps; ++t) {
          acc* row = dh + t * B;
          if (!valid(p, t, n)) {
            std::fill(row, row + width, acc(0));
            continue;
          }
          filter_step(p, slab.data(), w.data(), t, width, row, products);
          for (int64_t b = 0; b < width; ++b) row[b] = a[b] + s[b] * row[b];
        }
        correlate(p, dh, slab.data(), width, sums.data(), products);
        if (wanted) transposed(p, dh, w.data(), width, d.data(), true, products);
      }
      if (!wanted) continue;
      for (int64_t t = 0; t < p.steps; ++t) {
        acc* row = d.data() + t * B;
        if (!valid(p, t, n)) {
          std::fill(row, row + width, acc(0));
          continue;
        }
        if (p.scale != nullptr)
          for (int64_t b = 0; b < width; ++b) sums[p.order * B + b] += row[b] * raw[t * B + b];
        if (p.shift != nullptr)
          for (int64_t b = 0; b < width; ++b) sums[(p.order + 1) * B + b] += row[b];
        if (p.scale != nullptr)
          for (int64_t b = 0; b < width; ++b) row[b] *= scale[b];
      }
      if (dx != nullptr) store(p, vd, dx, n, j0, width, d.data());
    }
    for (int64_t i = 0; i < p.order + 2; ++i)
      std::copy_n(sums.data() + i * B, width, out + (chunk * (p.order + 2) + i) * p.elements + j0);
  });
}

}  // namespace

#define MFPSN_EXPORT(name, scalar, acc)                                                                                  \
  extern "C" void mfpsn_statistics_##name(const Problem* p, const View* v, const void* x, const void* weight, void* out) { \
    statistics(*p, *v, static_cast<const scalar*>(x), static_cast<const acc*>(weight), static_cast<acc*>(out));          \
  }                                                                                                                      \
  extern "C" void mfpsn_fire_##name(const Problem* p, const View* v, const void* x, const void* taps, const void* bias,  \
                                    const View* vs, void* spikes) {                                                      \
    fire(*p, *v, static_cast<const scalar*>(x), static_cast<const acc*>(taps), static_cast<const acc*>(bias), *vs,       \
         static_cast<scalar*>(spikes));                                                                                  \
  }                                                                                                                      \
  extern "C" void mfpsn_backward_reductions_##name(const Problem* p, const View* v, const void* x, const View* vg,       \
                                                   const void* grad, const void* taps, const void* bias, void* out) {    \
    backward_reductions(*p, *v, static_cast<const scalar*>(x), *vg, static_cast<const scalar*>(grad),                    \
                        static_cast<const acc*>(taps), static_cast<const acc*>(bias), static_cast<acc*>(out));           \
  }                                                                                                                      \
  extern "C" void mfpsn_backward_input_##name(const Problem* p, const View* v, const void* x, const View* vg,            \
                                              const void* grad, const void* taps, const void* bias, const void* weight,  \
                                              const void* offset, const void* slope, const View* vd, void* dx,           \
                                              void* out) {                                                               \
    backward_input(*p, *v, static_cast<const scalar*>(x), *vg, static_cast<const scalar*>(grad),                         \
                   static_cast<const acc*>(taps), static_cast<const acc*>(bias), static_cast<const acc*>(weight),        \
                   static_cast<const acc*>(offset), static_cast<const acc*>(slope), *vd, static_cast<scalar*>(dx),       \
                   static_cast<acc*>(out));                                                                              \
  }

MFPSN_EXPORT(float32, float, float)
MFPSN_EXPORT(float64, double, double)
MFPSN_EXPORT(bfloat16, c10::BFloat16, float)
MFPSN_EXPORT(float16, c10::Half, float)
