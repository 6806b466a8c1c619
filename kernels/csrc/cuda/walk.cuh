// How threads are placed, and how they iterate over time.
//
// A column is the time series of one (n, c, position). A thread computes V neighboring columns along the dim that is dense
// in memory (positions or channels), `width` neighboring threads are a group, and a group iterates over T with
// the last K values of X' in registers, so each value is read once. A dilation d needs no wider window: the steps
// t ≡ r (mod d) interact only with each other, so one residue (phase) is processed after the other, each as if d were 1.
#pragma once

#include "types.cuh"

namespace mfpsn {

// The part of the work that a group does
struct Unit {
  int64_t first_lane;  // this thread's first position or channel
  int64_t row;         // the channel, where lanes are positions
  int64_t chunk;
  int phase, begin, end;  // steps [begin, end) are this group's
  int64_t partial;
  bool active;
};

__device__ inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

struct Extent {
  int64_t lanes, rows, tiles;
  int64_t used, share;  // units of a segment; and rounded up to full warps, since lanes of a tile process the same steps
  int64_t units;
  __host__ __device__ explicit Extent(const Arguments& a) {
    lanes = a.lanes ? a.channels : a.positions;
    rows = a.lanes ? 1 : a.channels;
    const int64_t step = a.width * a.vector;
    tiles = (lanes + step - 1) / step;
    used = tiles * rows * a.chunks * a.phases;
    const int64_t groups = kWarp / a.width;
    share = (used + groups - 1) / groups * groups;
    units = share * a.segments;
  }
};

// Calls body(unit) in all threads of a block equally often, so that bodies may shuffle
template <typename Body>
__device__ inline void for_units(const Arguments& a, Body body) {
  const Extent e(a);
  const int width = static_cast<int>(a.width), groups = kBlock / width;
  const int group = threadIdx.x / width, tx = threadIdx.x % width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * groups;
  for (int64_t u0 = static_cast<int64_t>(blockIdx.x) * groups; u0 < e.units; u0 += stride) {
    const int64_t mine = minimum(u0 + group, e.units - 1), segment = mine / e.share;
    int64_t u = minimum(mine % e.share, e.used - 1);
    Unit unit;
    unit.active = u0 + group < e.units && mine % e.share < e.used;
    const int64_t tile = u % e.tiles;
    u /= e.tiles;
    unit.row = u % e.rows;
    u /= e.rows;
    unit.partial = segment * a.chunks * a.phases + u;
    if (!a.lanes) unit.partial = unit.partial * e.tiles + tile;
    unit.chunk = u % a.chunks;
    unit.phase = static_cast<int>(u / a.chunks);
    unit.begin = static_cast<int>(segment * a.span);
    unit.end = static_cast<int>(minimum(unit.begin + a.span, a.steps));
    unit.first_lane = (tile * width + tx) * a.vector;
    unit.active = unit.active && unit.first_lane < e.lanes;
    body(unit);
  }
}

// Location of a thread's column, or V neighboring ones
struct Column {
  int64_t n, channel, position;
  bool active;
  __device__ int64_t at(const View& v) const { return n * v.batch + channel * v.channel + position * v.position; }
};

// Calls body(column) equally often in all threads; neighboring groups process neighboring columns at the same time
template <typename Body>
__device__ inline void for_columns(const Arguments& a, const Unit& unit, Body body) {
  const int64_t columns = a.lanes ? a.batch * a.positions : a.batch;
  for (int64_t start = 0; start < columns; start += a.chunks) {
    Column column;
    const int64_t q = start + unit.chunk;
    column.active = unit.active && q < columns;
    column.n = a.lanes ? q / a.positions : q;
    column.channel = a.lanes ? unit.first_lane : unit.row;
    column.position = a.lanes ? q % a.positions : unit.first_lane;
    body(column);
  }
}

// A column's values, in global memory or in a tile
template <typename scalar>
struct Line {
  scalar* at;      // of step `origin`
  int origin;
  int64_t step;
  __device__ scalar* operator()(int t) const { return at + (t - origin) * step; }
};

__device__ inline bool valid(const Arguments& a, int t, int64_t n) {
  return a.mask == nullptr || a.mask[t * a.batch + n] != 0;
}

// The channel's constants; L = 1 where a thread's V columns share their channel, else V
template <typename sum, int L>
struct Vectors {
  __device__ static void load(const void* from, const Unit& unit, const Arguments& a, sum otherwise, sum (&to)[L]) {
    const int64_t channel = a.lanes ? unit.first_lane : unit.row;
#pragma unroll
    for (int l = 0; l < L; ++l)
      to[l] = from == nullptr || !unit.active ? otherwise : static_cast<const sum*>(from)[channel + l];
  }
};

// (C, k) → K taps, the first `pad` of which stay 0
template <typename sum, int K, int L>
__device__ inline void load_taps(const void* from, const Unit& unit, const Arguments& a, sum (&to)[K][L]) {
  const int64_t channel = a.lanes ? unit.first_lane : unit.row;
  const int pad = K - static_cast<int>(a.order);
#pragma unroll
  for (int i = 0; i < K; ++i)
#pragma unroll
    for (int l = 0; l < L; ++l)
      to[i][l] = i < pad || from == nullptr || !unit.active
                     ? sum(0)
                     : static_cast<const sum*>(from)[(channel + l) * a.order + i - pad];
}

// The last K values of X' = mask · (scale · X + shift) of V columns, the newest last
template <typename sum, int K, int V, int L>
struct Window {
  sum v[K][V];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int l = 0; l < V; ++l) v[i][l] = 0;
  }

  template <typename scalar>
  __device__ void push(const Pack<scalar, V>& x, bool ok, const sum (&scale)[L], const sum (&shift)[L]) {
#pragma unroll
    for (int l = 0; l < V; ++l) {
#pragma unroll
      for (int i = 0; i + 1 < K; ++i) v[i][l] = v[i + 1][l];
      v[K - 1][l] = ok ? plus(times(lift(x.v[l]), scale[l % L]), shift[l % L]) : sum(0);
    }
  }

  // Σ_i w_i · x_i in the order of i. The taps before `pad` are left out, not multiplied by 0: X may be infinite.
  __device__ void filter(const sum (&w)[K][L], int pad, sum (&h)[V]) const {
#pragma unroll
    for (int l = 0; l < V; ++l) h[l] = 0;
#pragma unroll
    for (int i = 0; i < K; ++i)
      if (i >= pad)
#pragma unroll
        for (int l = 0; l < V; ++l) h[l] = w[i][l % L] * v[i][l] + h[l];
  }
};

// The first step of the walk that ends at `first`: up to order − 1 steps of the phase before it fill the window
__device__ inline int walk_start(int order, int dilation, int first) {
  const int back = first / dilation;
  return first - (back < order - 1 ? back : order - 1) * dilation;
}

// Copies steps [lo, hi) of a warp's 32 columns between global memory and its tile, neighboring lanes on neighboring
// steps. R elements at a time; 4 loads in flight.
template <typename scalar, int R, bool STORE>
__device__ inline void copy_tile(scalar* tile, int pitch, scalar* column, int64_t step, int lo, int hi,
                                 int origin) {
  const int lane = threadIdx.x % kWarp, length = (hi - lo) / R;
  const int columns_per_round = kWarp / length, steps_per_round = kWarp % length;
  int which = lane / length, t = lane % length;
  constexpr int ahead = 4;
  for (int round = 0; round < length; round += ahead) {
    Pack<scalar, R> values[ahead];
    scalar* from[ahead];
    int to[ahead];
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      // a round past the end has no column
      const unsigned long long base =
          __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(column), which % kWarp);
      from[u] = nullptr;
      if (which < kWarp && base != 0) from[u] = reinterpret_cast<scalar*>(base) + (lo + t * R) * step;
      to[u] = which * pitch + lo - origin + t * R;
      if (!STORE && from[u] != nullptr) values[u] = *reinterpret_cast<const Pack<scalar, R>*>(from[u]);
      which += columns_per_round;
      t += steps_per_round;
      if (t >= length) t -= length, ++which;
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      if (from[u] == nullptr) continue;
      if (STORE) {
#pragma unroll
        for (int e = 0; e < R; ++e) values[u].v[e] = tile[to[u] + e];
        *reinterpret_cast<Pack<scalar, R>*>(from[u]) = values[u];
      } else {
#pragma unroll
        for (int e = 0; e < R; ++e) tile[to[u] + e] = values[u].v[e];
      }
    }
  }
}

// X and the gradient are never written: results stored in a tile replace copies of them
template <typename scalar>
__device__ inline scalar* readable(const void* v) {
  return static_cast<scalar*>(const_cast<void*>(v));
}

// A warp's tiles in shared memory, for tensors that are dense along time. Without tiles, lines lead to global memory.
template <typename scalar, bool MAY>
struct Tiles {
  static constexpr int wide = 16 / sizeof(scalar);
  bool used;
  bool whole;  // 16 bytes a load
  int pitch;   // between columns: an odd number of 4-byte words, so that a warp's columns fall into different banks
  int lo, hi;
  scalar* base;

  __device__ Tiles(const Arguments& a, const Unit& unit, unsigned char* shared, int count, int ahead) {
    used = MAY && a.tile != 0;
    whole = a.wide_tile > 1;
    pitch = static_cast<int>(a.tile);
    lo = static_cast<int>(maximum(0, unit.begin - (a.order - 1) * a.dilation));
    hi = static_cast<int>(minimum(a.steps, unit.end + ahead));
    if (whole) lo = lo / wide * wide, hi = (hi + wide - 1) / wide * wide;
    base = reinterpret_cast<scalar*>(shared) + static_cast<int64_t>(threadIdx.x / kWarp) * count * kWarp * pitch;
  }

  __device__ scalar* tile(int which) const { return base + static_cast<int64_t>(which) * kWarp * pitch; }

  // To be called by all lanes of a warp
  __device__ Line<scalar> open(int which, scalar* tensor, const View& v, const Column& c) const {
    scalar* column = c.active ? tensor + c.at(v) : nullptr;
    if (!used) return {column, 0, v.time};
    if (whole)
      copy_tile<scalar, wide, false>(tile(which), pitch, column, 1, lo, hi, lo);
    else
      copy_tile<scalar, 1, false>(tile(which), pitch, column, v.time, lo, hi, lo);
    return {tile(which) + threadIdx.x % kWarp * pitch, lo, 1};
  }

  // Where results go: to global memory, or into the tile, in the place of what was read there
  __device__ Line<scalar> result(int which, scalar* tensor, const View& v, const Column& c) const {
    if (!used) return {c.active ? tensor + c.at(v) : nullptr, 0, v.time};
    return {tile(which) + threadIdx.x % kWarp * pitch, lo, 1};
  }

  __device__ void ready() const {
    if (used) __syncwarp();
  }

  __device__ void close(int which, scalar* tensor, const View& v, const Column& c, const Unit& unit) const {
    if (!used) return;
    __syncwarp();
    scalar* column = c.active ? tensor + c.at(v) : nullptr;
    if (whole)
      copy_tile<scalar, wide, true>(tile(which), pitch, column, 1, unit.begin, unit.end, lo);
    else
      copy_tile<scalar, 1, true>(tile(which), pitch, column, v.time, unit.begin, unit.end, lo);
  }
};

// The sum over a group, in all its threads; the order depends only on the width
template <typename sum>
__device__ inline sum group_sum(sum v, int width) {
  for (int step = width / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// Writes quantity `which` of this unit: one value for the group where lanes are positions, else one per lane
template <typename sum, int L>
__device__ inline void write_partial(const Arguments& a, const Unit& unit, int64_t which, const sum (&value)[L]) {
  sum* to = static_cast<sum*>(a.partial) + which * a.channels * a.partials + unit.partial;
  if (a.lanes) {
    if (!unit.active) return;
#pragma unroll
    for (int l = 0; l < L; ++l) to[(unit.first_lane + l) * a.partials] = value[l];
  } else {
    const sum total = group_sum(unit.active ? value[0] : sum(0), static_cast<int>(a.width));
    if (unit.active && threadIdx.x % a.width == 0) to[unit.row * a.partials] = total;
  }
}

}  // namespace mfpsn
