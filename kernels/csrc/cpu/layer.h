// The whole layer as one operator with autograd of its own, for eager calls that nobody watches: at 2 to 8 time steps a
// training step through Python's autograd spends as long in Python as in the sweeps.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace mfpsn {
namespace {

// What kernels/implementations/fused_cpu.py's _Geometry finds: the dims but T and N in the order in which they lie in memory
struct Geometry {
  int64_t time, batch, channel;
  std::vector<int64_t> dims;

  Geometry(const at::Tensor& x, bool time_last)
      : time(time_last ? x.dim() - 1 : 0), batch(time_last ? 0 : 1), channel(time_last ? 1 : 2) {
    for (int64_t d = 0; d < x.dim(); ++d)
      if (d != time && d != batch) dims.push_back(d);
    std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  }

  Problem problem(const at::Tensor& x, int64_t order, int64_t dilation, int64_t surrogate, double alpha) const {
    Problem p{x.size(time), x.size(batch), 1, x.size(channel), 1, order, dilation, surrogate, alpha, nullptr, nullptr, nullptr};
    bool inside = false;
    for (const int64_t d : dims) {
      p.elements *= x.size(d);
      if (inside) p.inner *= x.size(d);
      inside = inside || d == channel;
    }
    return p;
  }
};

// A tensor as the sweeps see it, and the table of offsets that it may need
struct Placed {
  View view{};
  std::vector<int64_t> table;

  Placed(const at::Tensor& x, const Geometry& g) {
    view.st = x.stride(g.time), view.sn = x.stride(g.batch);
    int64_t step = -1, expected = 0;
    bool uniform = true;
    for (auto d = g.dims.rbegin(); d != g.dims.rend(); ++d) {
      if (x.size(*d) == 1) continue;
      if (step < 0)
        step = x.stride(*d);
      else
        uniform = uniform && x.stride(*d) == expected;
      expected = x.stride(*d) * x.size(*d);
    }
    if (uniform) {
      view.sj = std::max<int64_t>(step, 0);
      return;
    }
    table.assign(1, 0);
    for (const int64_t d : g.dims) {
      std::vector<int64_t> next;
      next.reserve(table.size() * x.size(d));
      for (const int64_t base : table)
        for (int64_t i = 0; i < x.size(d); ++i) next.push_back(base + i * x.stride(d));
      table = std::move(next);
    }
    view.offset = table.data();
  }
  Placed(const Placed&) = delete;
};

struct Constants {
  Folding folding;
  int64_t dilation, surrogate;
  double alpha;
  bool time_last;
  std::string name;  // of the layer, for messages
};

// f called with a value of the elements' type and one of the sums' type
template <typename F>
void with_types(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat: return f(float(), float());
    case at::kDouble: return f(double(), double());
    case at::kBFloat16: return f(c10::BFloat16(), float());
    case at::kHalf: return f(c10::Half(), float());
    default: TORCH_CHECK_TYPE(false, "fused-cpp: ", type, " is not supported");
  }
}

template <typename T>
T* pointer(const at::Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <typename T>
T* pointer(const std::optional<at::Tensor>& x) {
  return x ? pointer<T>(*x) : nullptr;
}

inline std::optional<at::Tensor> dense(const std::optional<at::Tensor>& x) {
  return x ? std::optional(x->contiguous()) : std::nullopt;
}

inline std::optional<at::Tensor> like(const std::optional<at::Tensor>& x) {
  return x ? std::optional(at::empty_like(*x, at::MemoryFormat::Contiguous)) : std::nullopt;
}

struct Statistics {
  at::Tensor mean, var;
  double momentum;
  bool update;

  // as torch.nn.BatchNorm, by the very operations that MulFreePSN uses elsewhere: equal to the bit
  void take(const at::Tensor& batch_mean, const at::Tensor& batch_var, double count) const {
    if (!update) return;
    mean.lerp_(batch_mean, momentum);
    var.lerp_(batch_var * (count / (count - 1)), momentum);
  }
};

struct Layer : torch::autograd::Function<Layer> {
  using Variables = torch::autograd::variable_list;
  using Context = torch::autograd::AutogradContext;

  static at::Tensor forward(Context* ctx, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gamma,
                            const at::Tensor& beta, const std::optional<at::Tensor>& scale,
                            const std::optional<at::Tensor>& shift, const Statistics& running, const Constants& k) {
    const Geometry g(x, k.time_last);
    const at::Tensor w = weight.contiguous(), c = gamma.contiguous(), b = beta.contiguous();
    const auto a = dense(scale), s = dense(shift);
    const bool training = k.folding.training;
    const at::Tensor mean = training ? at::empty_like(c) : running.mean.contiguous();
    const at::Tensor var = training ? at::empty_like(c) : running.var.contiguous();
    const at::Tensor spikes = at::empty_like(x);
    Problem p = g.problem(x, weight.size(1), k.dilation, k.surrogate, k.alpha);
    p.scale = pointer<void>(a), p.shift = pointer<void>(s);
    const Placed from(x, g), to(spikes, g);
    with_types(x.scalar_type(), [&](auto scalar, auto acc) {
      using V = decltype(scalar);
      using A = decltype(acc);
      mfpsn::forward<V, A>(p, k.folding, from.view, pointer<V>(x), pointer<A>(w), pointer<A>(c), pointer<A>(b),
                           pointer<A>(mean), pointer<A>(var), to.view, pointer<V>(spikes));
    });
    if (training) running.take(mean, var, static_cast<double>(x.numel() / p.channels));
    // in training the batch's statistics: the running ones have been updated in place
    Variables kept{x, weight, gamma, beta, mean, var};
    kept.push_back(scale.value_or(at::Tensor()));
    kept.push_back(shift.value_or(at::Tensor()));
    ctx->save_for_backward(kept);
    const Folding& f = k.folding;
    ctx->saved_data["integers"] = std::vector<int64_t>{f.gradient, f.min_exponent, f.max_exponent, f.training, k.dilation,
                                                       k.surrogate, k.time_last};
    ctx->saved_data["reals"] = std::vector<double>{f.eps, k.alpha};
    ctx->saved_data["name"] = k.name;
    ctx->set_materialize_grads(false);
    return spikes;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    Variables results(8);
    if (!grads[0].defined()) return results;
    // create_graph=True: what would come of it is a gradient of zero, without a word
    const std::string name = ctx->saved_data["name"].toStringRef();
    TORCH_CHECK(!at::GradMode::is_enabled(), name, name.empty() ? "" : ": ",
                "a surrogate gradient has no derivative; take gradients without create_graph");
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& x = saved[0];
    const auto given = [&](int i) { return saved[i].defined() ? std::optional(saved[i].contiguous()) : std::nullopt; };
    const auto integers = ctx->saved_data["integers"].toIntVector();
    const auto reals = ctx->saved_data["reals"].toDoubleVector();
    const Folding f{reals[0], integers[0], integers[1], integers[2], integers[3]};
    const Geometry g(x, integers[6]);
    const at::Tensor w = saved[1].contiguous(), c = saved[2].contiguous(), b = saved[3].contiguous();
    const at::Tensor mean = saved[4].contiguous(), var = saved[5].contiguous();
    const auto a = given(6), s = given(7);
    Problem p = g.problem(x, w.size(1), integers[4], integers[5], reals[1]);
    p.scale = pointer<void>(a), p.shift = pointer<void>(s);
    const at::Tensor grad = grads[0].to(x.scalar_type());
    const bool wanted = ctx->needs_input_grad(0);
    const at::Tensor dx = wanted ? at::empty_like(x) : at::Tensor();
    const at::Tensor dweight = at::empty_like(w), dgamma = at::empty_like(c), dbeta = at::empty_like(b);
    const auto dscale = like(a), dshift = like(s);
    const Placed from(x, g), through(grad, g), to(wanted ? dx : x, g);
    with_types(x.scalar_type(), [&](auto scalar, auto acc) {
      using V = decltype(scalar);
      using A = decltype(acc);
      mfpsn::backward<V, A>(p, f, from.view, pointer<V>(x), through.view, pointer<V>(grad), pointer<A>(w), pointer<A>(c),
                            pointer<A>(b), pointer<A>(mean), pointer<A>(var), to.view, wanted ? pointer<V>(dx) : nullptr,
                            pointer<A>(dweight), pointer<A>(dgamma), pointer<A>(dbeta), pointer<A>(dscale),
                            pointer<A>(dshift));
    });
    results[0] = dx, results[1] = dweight, results[2] = dgamma, results[3] = dbeta;
    if (dscale) results[4] = *dscale;
    if (dshift) results[5] = *dshift;
    return results;
  }
};

at::Tensor layer(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gamma, const at::Tensor& beta,
                 const at::Tensor& running_mean, const at::Tensor& running_var, const std::optional<at::Tensor>& scale,
                 const std::optional<at::Tensor>& shift, double momentum, bool update, double eps, int64_t surrogate,
                 double alpha, int64_t gradient, int64_t min_exponent, int64_t max_exponent, bool training, int64_t dilation,
                 bool time_last, std::string name) {
  const Statistics running{running_mean, running_var, momentum, update};
  const Constants k{{eps, gradient, min_exponent, max_exponent, training}, dilation, surrogate, alpha, time_last, std::move(name)};
  return Layer::apply(x, weight, gamma, beta, scale, shift, running, k);
}

}  // namespace
}  // namespace mfpsn

TORCH_LIBRARY_FRAGMENT(mfpsn_cpu, library) {
  library.def(
      "layer(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor? scale, Tensor? shift, float momentum, bool update, float eps, int surrogate, float alpha, int gradient, "
      "int min_exponent, int max_exponent, bool training, int dilation, bool time_last, str name) -> Tensor",
      &mfpsn::layer);
}
