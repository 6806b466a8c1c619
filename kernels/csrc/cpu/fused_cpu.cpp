// The neuron on the CPU: statistics, spikes and gradients, each in one sweep over memory.
//
// A task processes some blocks of elements and a chunk of the batch. For each n it has the block's slab of X (and of the
// gradient) in cache, does everything that needs it there, and sums lane by lane; at its end it adds up the lanes of each
// channel in float64. Results of tasks are added in their order, so they depend on sizes only, not on threads. H is never
// written to memory.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>

#include "fold.h"
#include "pages.h"
#include "slabs.h"
#include "sweeps.h"

namespace mfpsn {
namespace {

// Values of a slab, T · B: the second-level cache holds three. Long rows, which suit prefetchers and pages, matter more at
// large T (a training step on 256 MB at T = 32 took 0.87 of the time at four times a first-level cache of 8192 values)
constexpr int64_t kSlab = 16384, kRow = 256, kLongest = 1024, kMost = 65536;
// Least number of values of a task: with fewer, starting it takes as long as its work
constexpr int64_t kWork = 32768, kTasks = 256;
// Values that one lane sums in float32, so that rounding stays near 1e-6 of the sum
constexpr int64_t kSum = 4096;
// Tiles are read in place up to this number of rows of all tensors that a sweep touches. Beyond it, rows compete for a few
// sets of the cache, and lie in more pages than the TLB holds: the sweep for dX at 16 steps, 48 rows, took 1.2 to 1.8 times as
// long in place; the reductions at 8 steps, 16 rows, 0.7 to 0.9 times. Whole registers are always written in place (firing
// took 0.55 to 0.8 of the time that it took through a slab), up to where steps would outnumber the TLB's pages.
constexpr int64_t kReadInPlace = 16, kWriteInPlace = 64;
// Rows that a set of the first-level cache may hold: spikes of more steps are written by the line (at 12 to 48 steps firing
// took 0.75 of the time on 32-byte registers, 0.55 on 16; at order 8 up to 1.15). It did not pay for dX.
constexpr int64_t kWays = 8;

// Least size in bytes of results that are written past the caches, which could not hold them anyway: on 256 MB firing took
// 0.75 of the time, the sweep for dX 0.77. The system is not asked for the size of the cache, since a virtual machine with
// 32 MB reported 320.
constexpr int64_t kPastCaches = 64 << 20;
// Size in bytes from which glibc obtains the memory of each result from the system
constexpr int64_t kFromSystem = 32 << 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is divided: `groups` × `chunks` tasks, each of `group` blocks of `block` elements and a share of the batch
struct Cut {
  int64_t order;  // taps with lags below T; the older ones read only zeros
  int64_t skipped, block, blocks, group, groups, chunks, slots;

  Cut(const Problem& p, int64_t V) {
    const int64_t T = p.steps, J = p.elements, period = p.channels * p.inner;
    order = std::min(p.order, (T - 1) / p.dilation + 1);
    skipped = p.order - order;
    block = std::min(std::max(kSlab / T, kRow), std::min(kLongest, kMost / T));
    const int64_t line = V * kRegistersOfLine;
    block = std::min(std::max(block / line * line, line), ceil_div(J, V) * V);
    group = 1;
    if (p.inner < V && period < J && period * T <= kMost) {
      // channels follow each other (channels-last): blocks of whole periods have the same channels in the same lanes
      int64_t times = std::max<int64_t>(1, block / period);
      while (J / period % times != 0) --times;
      const int64_t whole = period * times;
      if (ceil_div(whole, V) * V <= whole + whole / 4) {  // else too many lanes would be idle
        block = whole;
        group = std::max<int64_t>(1, kSum / T);
      }
    }
    blocks = ceil_div(J, block);
    const int64_t wanted = std::min(std::max<int64_t>(J * p.batch * T / kWork, 1), kTasks);
    group = std::min(group, ceil_div(blocks, wanted));
    groups = ceil_div(blocks, group);
    chunks = std::max(ceil_div(wanted, groups), ceil_div(p.batch * T * group, kSum));
    chunks = std::min(std::max<int64_t>(chunks, 1), p.batch);
    slots = std::min(p.channels, (block + p.inner - 2) / p.inner + 1);
  }
  int64_t tasks() const { return groups * chunks; }
};

// Size of a result
template <typename scalar>
int64_t bytes(const Problem& p) {
  return p.steps * p.batch * p.elements * static_cast<int64_t>(sizeof(scalar));
}

template <typename acc>
acc* scratch(int64_t size) {
  // kept by the thread, since new memory would cost a page fault for every 4 KiB in every call
  thread_local std::vector<acc> kept;
  constexpr int64_t spare = kLine / sizeof(acc);
  if (static_cast<int64_t>(kept.size()) < size + spare) kept.resize(size + spare);
  const auto address = reinterpret_cast<uintptr_t>(kept.data());
  return reinterpret_cast<acc*>((address + kLine - 1) / kLine * kLine);
}

// Runs f with the order as a compile-time constant where there is a version for it
template <typename acc, typename F>
void with_order(const Problem& p, int64_t order, const F& f) {
  if (sizeof(acc) == 4 && p.mask == nullptr) {
    switch (order) {
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      case 3: return f(std::integral_constant<int, 3>{});
      case 4: return f(std::integral_constant<int, 4>{});
      case 5: return f(std::integral_constant<int, 5>{});
      case 6: return f(std::integral_constant<int, 6>{});
      case 7: return f(std::integral_constant<int, 7>{});
      case 8: return f(std::integral_constant<int, 8>{});
    }
  }
  f(std::integral_constant<int, 0>{});
}

// State of a task
template <typename scalar, typename acc>
struct Task {
  static constexpr int64_t V = lanes<acc>;
  const Problem& p;
  const Cut& cut;
  int64_t tensors;  // that its sweep touches
  int64_t index, group, j0, width, tiles, n0, n1;
  acc* free;  // scratch that is not taken yet

  Task(const Problem& p, const Cut& cut, int64_t tensors, int64_t index, acc* free)
      : p(p), cut(cut), tensors(tensors), index(index), free(free) {
    const int64_t chunk = index / cut.groups;
    group = index % cut.groups;
    n0 = p.batch * chunk / cut.chunks, n1 = p.batch * (chunk + 1) / cut.chunks;
    at(group * cut.group);
  }

  void at(int64_t block) {
    j0 = block * cut.block;
    width = std::min(cut.block, p.elements - j0);
    tiles = ceil_div(width, V);
  }

  acc* take(int64_t size) {
    acc* taken = free;
    free += size;
    return taken;
  }
  acc* take_slab() { return take(ceil_div(cut.block, V) * tile_size<acc>(p)); }
  acc* take_rows(int64_t rows) { return take(ceil_div(cut.block, V) * V * rows); }

  // Calls f(b0, b1, slot) for each run of lanes that belong to one channel
  template <typename F>
  void each_run(const F& f) const {
    int64_t slot = 0;
    for (int64_t b = 0, end = p.inner - j0 % p.inner; b < width; b = end, end += p.inner) {
      f(b, std::min(end, width), slot);
      if (++slot == p.channels) slot = 0;
    }
  }
  int64_t channel(int64_t slot) const { return (j0 / p.inner + slot) % p.channels; }

  // (C, columns) → [tiles][columns][V], or null for null
  const acc* spread(const void* from, int64_t columns, int64_t stride) {
    if (from == nullptr) return nullptr;
    acc* out = take_rows(columns);
    if (width % V != 0) std::fill_n(out + (tiles - 1) * columns * V, columns * V, acc(0));
    each_run([&](int64_t b0, int64_t b1, int64_t slot) {
      const acc* row = static_cast<const acc*>(from) + channel(slot) * stride;
      while (b0 < b1) {
        const int64_t end = std::min(b1, (b0 / V + 1) * V);
        acc* to = out + b0 / V * columns * V + b0 % V;
        for (int64_t i = 0; i < columns; ++i) std::fill_n(to + i * V, end - b0, row[i]);
        b0 = end;
      }
    });
    return out;
  }

  acc* sums(int64_t rows) {
    acc* out = take_rows(rows);
    std::fill_n(out, tiles * rows * V, acc(0));
    return out;
  }

  // Σ over the lanes of each channel of row r, [tiles][rows][V], added to out[slot · stride]
  void reduce(const acc* from, int64_t rows, int64_t r, double* out, int64_t stride) const {
    each_run([&](int64_t b0, int64_t b1, int64_t slot) {
      double total = 0;
      while (b0 < b1) {
        const int64_t end = std::min(b1, (b0 / V + 1) * V);
        const acc* lane = from + (b0 / V * rows + r) * V - b0 / V * V;
#pragma omp simd reduction(+ : total)
        for (int64_t b = b0; b < end; ++b) total += lane[b];
        b0 = end;
      }
      out[slot * stride] += total;
    });
  }

  Walk walk(int64_t n) const {
    return {p.steps, cut.order, p.dilation, p.mask == nullptr ? nullptr : p.mask + n, p.batch};
  }

  // Steps of n that are valid
  int64_t count(int64_t n) const {
    if (p.mask == nullptr) return p.steps;
    int64_t found = 0;
    for (int64_t t = 0; t < p.steps; ++t) found += valid(p, t, n);
    return found;
  }
};

// The tiles of one n: in place where that is possible and faster, else in the slab
template <typename acc>
struct Tiles {
  acc *place, *slab;
  int64_t tile_stride, step_stride, in_place, slab_stride;

  Tile<acc> operator()(int64_t tile) const {
    if (tile < in_place) return {place + tile * tile_stride, step_stride};
    return {slab + tile * slab_stride, tile_stride};
  }
};

template <typename scalar, typename acc>
Tiles<acc> tiles_of(const Task<scalar, acc>& task, const View& v, const scalar* x, int64_t n, bool in_place, acc* slab) {
  Tiles<acc> out{nullptr, slab, lanes<acc>, v.st, 0, tile_size<acc>(task.p)};
  if constexpr (std::is_same_v<scalar, acc>) {
    if (in_place && v.offset == nullptr && v.sj == 1) {
      out.in_place = task.width / lanes<acc>;
      out.place = const_cast<acc*>(x) + n * v.sn + task.j0;
    }
  }
  return out;
}

// The tiles of one n of a result. Where a line of the caches is several registers, some are put together to whole lines, in
// their slab, which tiles in place leave free, as [T][R][V]: memory takes half a line past the caches as slowly as it takes
// two (firing 256 MB took 2.5 times as long on 32-byte registers, 4.5 on 16), and a line that many rows' first halves have
// driven out of the cache is fetched again for its second half.
template <typename acc>
struct Targets {
  static constexpr int64_t V = lanes<acc>, R = kRegistersOfLine;
  Tiles<acc> tiles;
  int64_t by_line;  // so many tiles
  bool past_caches;

  Target<acc> operator()(int64_t tile) const {
    if (tile >= by_line) return {tiles(tile), false};
    if constexpr (R == 1) return {tiles(tile), past_caches};
    return {{tiles.slab + tile % R * V, R * V}, false};
  }

  // To be called after each tile
  void written(int64_t tile, int64_t steps) const {
    if (R == 1 || tile >= by_line || tile % R != R - 1) return;
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t r = 0; r < R; ++r)
        Target<acc>{tiles(tile - (R - 1) + r), past_caches}.write(t, get(tiles.slab + (t * R + r) * V));
  }
};

template <typename scalar, typename acc>
Targets<acc> target_of(const Task<scalar, acc>& task, const View& v, scalar* x, int64_t n, bool in_place, acc* slab, bool by_line) {
  constexpr int64_t R = kRegistersOfLine;
  const Problem& p = task.p;
  const Tiles<acc> tiles = tiles_of<scalar, acc>(task, v, x, n, in_place && p.steps <= kWriteInPlace, slab);
  const bool lines = reinterpret_cast<uintptr_t>(tiles.place) % kLine == 0 && v.st * sizeof(acc) % kLine == 0;
  const bool past_caches = lines && bytes<scalar>(p) >= kPastCaches;
  return {tiles, by_line || past_caches ? tiles.in_place / R * R : 0, past_caches};
}

template <typename scalar, typename acc>
Tiles<const acc> read(const Task<scalar, acc>& task, const View& v, const scalar* x, int64_t n, bool in_place, acc* slab) {
  const Tiles<acc> t = tiles_of(task, v, x, n, in_place && task.p.steps * task.tensors <= kReadInPlace, slab);
  const int64_t done = t.in_place * lanes<acc>;
  if (done < task.width) load(task.p, v, x, n, task.j0 + done, task.width - done, slab + t.in_place * t.slab_stride);
  return {t.place, t.slab, t.tile_stride, t.step_stride, t.in_place, t.slab_stride};
}

template <typename scalar, typename acc>
void write_back(const Task<scalar, acc>& task, const View& v, scalar* x, int64_t n, const Targets<acc>& target) {
  const Tiles<acc>& t = target.tiles;
  const int64_t done = t.in_place * lanes<acc>;
  if (done < task.width) store(task.p, v, x, n, task.j0 + done, task.width - done, t.slab + t.in_place * t.slab_stride);
}

// Runs body(task) for all tasks; a task touches so many tensors, and has one slab more and so many rows of scratch space
template <typename scalar, typename acc, typename Body>
void run(const Problem& p, const Cut& cut, int64_t tensors, int64_t rows, const Body& body) {
  const int64_t V = lanes<acc>, tiles = ceil_div(cut.block, V);
  at::parallel_for(0, cut.tasks(), 1, [&](int64_t begin, int64_t end) {
    acc* free = scratch<acc>(tiles * ((tensors + 1) * tile_size<acc>(p) + rows * V) + 2 * p.steps * V);
    for (int64_t index = begin; index < end; ++index) {
      Task<scalar, acc> task(p, cut, tensors, index, free);
      body(task);
    }
    flush_past_caches();
  });
}

// X' of one n, ready for the sweeps
template <typename scalar, typename acc>
Tiles<const acc> lifted(const Task<scalar, acc>& task, const View& v, const scalar* x, int64_t n, const acc* scale,
                        const acc* shift, acc* slab) {
  const Problem& p = task.p;
  const bool changed = p.scale != nullptr || p.shift != nullptr || p.mask != nullptr;
  const Tiles<const acc> tiles = read(task, v, x, n, !changed, slab);
  if (changed) lift(p, n, task.tiles, scale, shift, slab);
  return tiles;
}

// mean and variance (C) of H, by Chan's update over the results of the tasks
template <typename scalar, typename acc>
void statistics(const Problem& p, const Cut& cut, const View& v, const scalar* x, const acc* weight, acc* mean, acc* var) {
  constexpr int64_t V = lanes<acc>;
  struct Moments { double count, mean, square; };
  std::vector<Moments> found(cut.tasks() * cut.slots);
  run<scalar, acc>(p, cut, 1, cut.order + 5, [&](Task<scalar, acc>& task) {
    acc* slab = task.take_slab();
    const acc* w = task.spread(weight + cut.skipped, cut.order, p.order);
    const acc *scale = task.spread(p.scale, 1, 1), *shift = task.spread(p.shift, 1, 1);
    acc* rows = task.sums(3);
    int64_t count = 0;
    for (int64_t g = 0; g < cut.group && task.group * cut.group + g < cut.blocks; ++g) {
      task.at(task.group * cut.group + g);
      for (int64_t n = task.n0; n < task.n1; ++n) {
        const int64_t steps = task.count(n);
        if (steps == 0) continue;
        const Tiles<const acc> tiles = lifted(task, v, x, n, scale, shift, slab);
        const Walk walk = task.walk(n);
        with_order<acc>(p, cut.order, [&](auto K) {
          for (int64_t i = 0; i < task.tiles; ++i)
            statistics_tile<K>(walk, tiles(i), w + i * cut.order * V, rows + i * 3 * V, count == 0);
        });
        count += steps;
      }
    }
    Moments* out = found.data() + task.index * cut.slots;
    for (int64_t s = 0; s < cut.slots; ++s) out[s] = {0, 0, 0};
    if (count == 0) return;
    const auto lane = [&](int64_t b, int64_t r) -> double { return rows[(b / V * 3 + r) * V + b % V]; };
    task.each_run([&](int64_t b0, int64_t b1, int64_t slot) {
      // all lanes about one pivot, the first one's
      const double pivot = lane(b0, 0), n = count;
      double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
      for (int64_t b = b0; b < b1; ++b) {
        const double apart = lane(b, 0) - pivot, mine = lane(b, 1);
        sum += mine + n * apart;
        square += lane(b, 2) + apart * (2 * mine + n * apart);
      }
      const double total = n * (b1 - b0), centre = sum / total;
      const Moments other{total, pivot + centre, square - sum * centre};
      Moments& all = out[slot];
      const double delta = other.mean - all.mean, both = all.count + total;
      all.square += other.square + delta * delta * all.count * total / both;
      all.mean += delta * total / both;
      all.count = both;
    });
  });
  for (int64_t c = 0; c < p.channels; ++c) mean[c] = var[c] = 0;
  at::parallel_for(0, p.channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments all{0, 0, 0};
      for (int64_t index = 0; index < cut.tasks(); ++index) {
        const int64_t first = index % cut.groups * cut.group * cut.block / p.inner % p.channels;
        const int64_t slot = (c - first + p.channels) % p.channels;
        if (slot >= cut.slots) continue;
        const Moments& one = found[index * cut.slots + slot];
        if (one.count == 0) continue;
        const double delta = one.mean - all.mean, both = all.count + one.count;
        all.square += one.square + delta * delta * all.count * one.count / both;
        all.mean += delta * one.count / both;
        all.count = both;
      }
      mean[c] = static_cast<acc>(all.mean);
      var[c] = static_cast<acc>(all.count == 0 ? 0 : all.square / all.count);
    }
  });
}

// out(c, row) = Σ over tasks
template <typename F>
void add_up(const Problem& p, const Cut& cut, const std::vector<double>& found, int64_t rows, const F& out) {
  at::parallel_for(0, p.channels, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> total(rows);
    for (int64_t c = begin; c < end; ++c) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t index = 0; index < cut.tasks(); ++index) {
        const int64_t first = index % cut.groups * cut.group * cut.block / p.inner % p.channels;
        const int64_t slot = (c - first + p.channels) % p.channels;
        if (slot >= cut.slots) continue;
        const double* one = found.data() + (index * cut.slots + slot) * rows;
        for (int64_t r = 0; r < rows; ++r) total[r] += one[r];
      }
      for (int64_t r = 0; r < rows; ++r) out(c, r, total[r]);
    }
  });
}

template <typename scalar, typename acc>
void fire(const Problem& p, const Cut& cut, const View& v, const scalar* x, const acc* taps, const acc* bias, const View& vs,
          scalar* spikes) {
  constexpr int64_t V = lanes<acc>;
  if (bytes<scalar>(p) >= kFromSystem) ask_for_large_pages(spikes, bytes<scalar>(p));
  run<scalar, acc>(p, cut, 2, cut.order + 3, [&](Task<scalar, acc>& task) {
    acc *slab = task.take_slab(), *out = task.take_slab();
    const acc *w = task.spread(taps + cut.skipped, cut.order, p.order), *b = task.spread(bias, 1, 1);
    const acc *scale = task.spread(p.scale, 1, 1), *shift = task.spread(p.shift, 1, 1);
    for (int64_t g = 0; g < cut.group && task.group * cut.group + g < cut.blocks; ++g) {
      task.at(task.group * cut.group + g);
      for (int64_t n = task.n0; n < task.n1; ++n) {
        const Tiles<const acc> tiles = lifted(task, v, x, n, scale, shift, slab);
        const Targets<acc> target = target_of<scalar, acc>(task, vs, spikes, n, true, out, p.steps > kWays);
        const Walk walk = task.walk(n);
        with_order<acc>(p, cut.order, [&](auto K) {
          for (int64_t i = 0; i < task.tiles; ++i) {
            fire_tile<K>(walk, tiles(i), w + i * cut.order * V, b + i * V, target(i));
            target.written(i, p.steps);
          }
        });
        write_back(task, vs, spikes, n, target);
      }
    }
  });
}

// dtaps (C, k), dbias (C)
template <typename scalar, typename acc>
void backward_reductions(const Problem& p, const Cut& cut, const View& v, const scalar* x, const View& vg,
                         const scalar* grad, const acc* taps, const acc* bias, acc* dtaps, acc* dbias) {
  constexpr int64_t V = lanes<acc>;
  const int64_t rows = cut.order + 1;
  std::vector<double> found(cut.tasks() * cut.slots * rows, 0.0);
  run<scalar, acc>(p, cut, 2, cut.order + 3 + rows, [&](Task<scalar, acc>& task) {
    acc *slab = task.take_slab(), *gradients = task.take_slab();
    const acc *w = task.spread(taps + cut.skipped, cut.order, p.order), *b = task.spread(bias, 1, 1);
    const acc *scale = task.spread(p.scale, 1, 1), *shift = task.spread(p.shift, 1, 1);
    acc* sums = task.sums(rows);
    for (int64_t g = 0; g < cut.group && task.group * cut.group + g < cut.blocks; ++g) {
      task.at(task.group * cut.group + g);
      for (int64_t n = task.n0; n < task.n1; ++n) {
        const Tiles<const acc> tiles = lifted(task, v, x, n, scale, shift, slab);
        const Tiles<const acc> grads = read(task, vg, grad, n, true, gradients);
        const Walk walk = task.walk(n);
        with_order<acc>(p, cut.order, [&](auto K) {
          for (int64_t i = 0; i < task.tiles; ++i)
            reductions_tile<K>(walk, tiles(i), grads(i), w + i * cut.order * V, b + i * V, p.surrogate,
                               static_cast<acc>(p.alpha), sums + i * rows * V);
        });
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      task.reduce(sums, rows, r, found.data() + task.index * cut.slots * rows + r, rows);
  });
  std::fill_n(dtaps, p.channels * p.order, acc(0));
  add_up(p, cut, found, rows, [&](int64_t c, int64_t r, double total) {
    (r < cut.order ? dtaps[c * p.order + cut.skipped + r] : dbias[c]) = static_cast<acc>(total);
  });
}

// dx unless null; dweight (C, k) through the statistics where there is an offset; dscale, dshift (C) unless null
template <typename scalar, typename acc>
void backward_input(const Problem& p, const Cut& cut, const View& v, const scalar* x, const View& vg, const scalar* grad,
                    const acc* taps, const acc* bias, const acc* weight, const acc* offset, const acc* slope, const View& vd,
                    scalar* dx, acc* dweight, acc* dscale, acc* dshift) {
  constexpr int64_t V = lanes<acc>;
  const bool affine = p.scale != nullptr || p.shift != nullptr, wanted = dx != nullptr || affine;
  const int64_t rows = cut.order, T = p.steps, size = tile_size<acc>(p);
  if (dx != nullptr && bytes<scalar>(p) >= kFromSystem) ask_for_large_pages(dx, bytes<scalar>(p));
  std::vector<double> found(cut.tasks() * cut.slots * (rows + 2), 0.0);
  run<scalar, acc>(p, cut, 3, 3 * cut.order + 7, [&](Task<scalar, acc>& task) {
    acc *slab = task.take_slab(), *gradients = task.take_slab(), *out = task.take_slab();
    acc* raw = affine ? task.take_slab() : nullptr;
    acc *du = task.take(T * V), *dh = task.take(T * V);
    const acc *q = task.spread(taps + cut.skipped, cut.order, p.order), *b = task.spread(bias, 1, 1);
    const acc *scale = task.spread(p.scale, 1, 1), *shift = task.spread(p.shift, 1, 1);
    const acc *w = nullptr, *a = nullptr, *s = nullptr;
    if (offset != nullptr) {
      w = task.spread(weight + cut.skipped, cut.order, p.order);
      a = task.spread(offset, 1, 1), s = task.spread(slope, 1, 1);
    }
    acc *sums = task.sums(rows), *ends = task.sums(2);
    for (int64_t g = 0; g < cut.group && task.group * cut.group + g < cut.blocks; ++g) {
      task.at(task.group * cut.group + g);
      for (int64_t n = task.n0; n < task.n1; ++n) {
        if (affine) load(p, v, x, n, task.j0, task.width, raw);
        const Tiles<const acc> tiles = lifted(task, v, x, n, scale, shift, slab);
        Tiles<const acc> grads{};
        if (wanted) grads = read(task, vg, grad, n, true, gradients);
        const bool after = affine || p.mask != nullptr || dx == nullptr;
        const Targets<acc> target = target_of<scalar, acc>(task, vd, dx, n, !after, out, false);
        const Walk walk = task.walk(n);
        with_order<acc>(p, cut.order, [&](auto K) {
          for (int64_t i = 0; i < task.tiles; ++i) {
            const acc *qi = q + i * cut.order * V, *wi = w + i * cut.order * V;
            const auto gradients = [&](auto membrane, auto through) {
              gradients_tile<K, membrane.value, through.value>(walk, tiles(i), grads(i), qi, b + i * V, p.surrogate,
                                                               static_cast<acc>(p.alpha), wi, a + i * V, s + i * V, du, dh,
                                                               sums + i * rows * V);
            };
            // the taps of both filters and the sums fill the registers beyond order 4: then one sweep each (at order 8 backward
            // took 0.95 of the time)
            constexpr bool together = K > 0 && K <= 4;
            const bool both = together && wanted && offset != nullptr;
            if constexpr (together)
              if (both) gradients(std::true_type{}, std::true_type{});
            if (!both && wanted) gradients(std::true_type{}, std::false_type{});
            if (!both && offset != nullptr) gradients(std::false_type{}, std::true_type{});
            if (!wanted) continue;
            if (offset != nullptr)
              transposed_tile<K, true>(walk, du, qi, dh, wi, target(i));
            else
              transposed_tile<K, false>(walk, du, qi, dh, wi, target(i));
            target.written(i, T);
          }
        });
        if (!wanted) continue;
        if (after)
          for (int64_t i = 0; i < task.tiles; ++i)
            for (int64_t t = 0; t < T; ++t) {
              acc* row = out + i * size + t * V;
              if (!valid(p, t, n)) {
                put(row, vec<acc>{});
                continue;
              }
              const vec<acc> d = get(row);
              if (p.scale != nullptr) {
                put(ends + 2 * i * V, get(ends + 2 * i * V) + d * get(raw + i * size + t * V));
                put(row, d * get(scale + i * V));
              }
              if (p.shift != nullptr) put(ends + (2 * i + 1) * V, get(ends + (2 * i + 1) * V) + d);
            }
        if (dx != nullptr) write_back(task, vd, dx, n, target);
      }
    }
    double* to = found.data() + task.index * cut.slots * (rows + 2);
    for (int64_t r = 0; r < rows; ++r) task.reduce(sums, rows, r, to + r, rows + 2);
    for (int64_t r = 0; r < 2; ++r) task.reduce(ends, 2, r, to + rows + r, rows + 2);
  });
  if (offset != nullptr) std::fill_n(dweight, p.channels * p.order, acc(0));
  add_up(p, cut, found, rows + 2, [&](int64_t c, int64_t r, double total) {
    if (r < rows && offset != nullptr) dweight[c * p.order + cut.skipped + r] = static_cast<acc>(total);
    if (r == rows && dscale != nullptr) dscale[c] = static_cast<acc>(total);
    if (r == rows + 1 && dshift != nullptr) dshift[c] = static_cast<acc>(total);
  });
}

// The whole forward: statistics unless given, fold, spikes
template <typename scalar, typename acc>
void forward(const Problem& p, const Folding& f, const View& v, const scalar* x, const acc* weight,
             const acc* gamma, const acc* beta, acc* mean, acc* var, const View& vs, scalar* spikes) {
  const Cut cut(p, lanes<acc>);
  if (f.training) statistics<scalar, acc>(p, cut, v, x, weight, mean, var);
  const Folded<acc> folded(p.channels, p.order, f, weight, gamma, beta, mean, var);
  fire<scalar, acc>(p, cut, v, x, folded.taps.data(), folded.bias.data(), vs, spikes);
}

template <typename scalar, typename acc>
void backward(const Problem& p, const Folding& f, const View& v, const scalar* x, const View& vg,
              const scalar* grad, const acc* weight, const acc* gamma, const acc* beta, const acc* mean, const acc* var,
              const View& vd, scalar* dx, acc* dweight, acc* dgamma, acc* dbeta, acc* dscale, acc* dshift) {
  const Cut cut(p, lanes<acc>);
  const int64_t C = p.channels, k = p.order;
  const Folded<acc> folded(C, k, f, weight, gamma, beta, mean, var);
  std::vector<acc> dtaps(C * k), through(C * k), offset(C), slope(C);
  backward_reductions<scalar, acc>(p, cut, v, x, vg, grad, folded.taps.data(), folded.bias.data(), dtaps.data(), dbeta);
  int64_t steps = p.steps * p.batch;
  if (p.mask != nullptr) steps = std::max<int64_t>(std::count_if(p.mask, p.mask + steps, [](uint8_t m) { return m; }), 0);
  const acc count = static_cast<acc>(std::max<int64_t>(steps * (p.elements / C), 1));
  acc *a = f.training ? offset.data() : nullptr, *s = f.training ? slope.data() : nullptr;
  fold_backward<acc>(C, k, f, folded, dtaps.data(), dbeta, weight, gamma, mean, count, dweight, dgamma, a, s);
  if (!f.training && dx == nullptr && p.scale == nullptr && p.shift == nullptr) return;
  backward_input<scalar, acc>(p, cut, v, x, vg, grad, folded.taps.data(), folded.bias.data(), weight, a, s, vd, dx,
                              through.data(), dscale, dshift);
  if (f.training)
    for (int64_t i = 0; i < C * k; ++i) dweight[i] += through[i];
}

}  // namespace
}  // namespace mfpsn

#include "layer.h"  // stands on all of the above
