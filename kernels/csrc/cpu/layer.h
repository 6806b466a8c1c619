// The operators of kernels/implementations/fused_cpu.py, which defines their schemas: the library's only interface.
//
// `layer` is one operator with its own autograd, for eager calls that bypass the op (see kernels/eager.py): at 2 to 8 time
// steps a training step through Python's autograd spends as long in Python as in the sweeps.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <exception>
#include <list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace mfpsn {
namespace {

// The dims other than T and N in the order in which they lie in memory, for any strides
struct Geometry {
  int64_t time, batch, channel;
  std::vector<int64_t> dims;

  Geometry(const at::Tensor& x, bool time_last)
      : time(time_last ? x.dim() - 1 : 0), batch(time_last ? 0 : 1), channel(time_last ? 1 : 2) {
    for (int64_t d = 0; d < x.dim(); ++d)
      if (d != time && d != batch) dims.push_back(d);
    std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  }

};

// Offsets of elements whose dims have these sizes and strides, two numbers a dim, the last dim the fastest. The thread keeps
// a few for its next calls, each as large as one step of one sample: computing them took as long as that step's sweep.
using Offsets = std::shared_ptr<const std::vector<int64_t>>;

inline Offsets offsets(const std::vector<int64_t>& dims) {
  constexpr size_t kKept = 64;
  thread_local std::list<std::pair<std::vector<int64_t>, Offsets>> kept;  // most recently used first
  const auto found = std::find_if(kept.begin(), kept.end(), [&](const auto& entry) { return entry.first == dims; });
  if (found != kept.end()) {
    kept.splice(kept.begin(), kept, found);
    return kept.front().second;
  }
  int64_t total = 1;
  for (size_t d = 0; d < dims.size(); d += 2) total *= dims[d];
  auto table = std::make_shared<std::vector<int64_t>>(total);
  int64_t block = 1;
  for (size_t d = dims.size(); d > 0; d -= 2) {
    const int64_t size = dims[d - 2], stride = dims[d - 1];
    for (int64_t i = 1; i < size; ++i)
      for (int64_t j = 0; j < block; ++j) (*table)[i * block + j] = (*table)[j] + i * stride;
    block *= size;
  }
  kept.emplace_front(dims, std::move(table));
  if (kept.size() > kKept) kept.pop_back();
  return kept.front().second;
}

// A tensor as the sweeps see it, and the table of offsets that it may need
struct Placed {
  View view{};
  Offsets table;

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
    std::vector<int64_t> dims;
    for (const int64_t d : g.dims) dims.insert(dims.end(), {x.size(d), x.stride(d)});
    table = offsets(dims);
    view.offset = table->data();
  }
};

using Vector = std::optional<at::Tensor>;

// Constants of a call, named as in kernels/constants.py; each operator takes some of them
struct Constants : torch::CustomClassHolder {
  Folding folding{};
  int64_t dilation = 1, surrogate = 0;
  double alpha = 0;
  bool time_last = false;
  std::string layer;

  Constants(int64_t dilation, const std::string& layout) : dilation(dilation), time_last(layout == "time_last") {}
  Constants(const std::string& surrogate, double alpha, int64_t dilation, const std::string& layout)
      : Constants(dilation, layout) {
    this->surrogate = place(surrogate, {"atan", "rational", "sigmoid"});
    this->alpha = alpha;
  }
  Constants(double eps, const std::string& surrogate, double alpha, const std::string& gradient, int64_t min_exponent,
            int64_t max_exponent, bool training, int64_t dilation, const std::string& layout, std::string layer = "")
      : Constants(surrogate, alpha, dilation, layout) {
    folding = {eps, place(gradient, {"straight-through", "round-only", "none"}), min_exponent, max_exponent, training};
    this->layer = std::move(layer);
  }

  static int64_t place(const std::string& name, std::initializer_list<const char*> names) {
    const auto found = std::find(names.begin(), names.end(), name);
    TORCH_CHECK_VALUE(found != names.end(), "fused-cpp: does not know ", name);
    return found - names.begin();
  }
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
  return x.defined() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

template <typename T>
T* pointer(const std::optional<at::Tensor>& x) {
  return x ? pointer<T>(*x) : nullptr;
}

inline Vector dense(const Vector& x) { return x ? Vector(x->contiguous()) : std::nullopt; }

inline at::Tensor like(const Vector& x) {
  return x ? at::empty_like(*x, at::MemoryFormat::Contiguous) : at::Tensor();
}

// Translated to Python's MemoryError
struct OutOfMemory : std::bad_alloc {
  std::string text;
  explicit OutOfMemory(std::string text) : text(std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
};

// One call into the sweeps: its input as they see it, and the tensors to be kept alive. For float64 sums of a narrower
// input, the input is cast first, and the results are cast back.
struct Run {
  const at::Tensor& given;
  const at::Tensor x;
  const Geometry geometry;
  const Placed from;
  const Vector scale, shift, mask;
  Problem p;

  Run(const at::Tensor& given, const at::Tensor& weight, const Vector& scale, const Vector& shift, const Vector& mask,
      const Constants& k)
      : given(given),
        x(weight.scalar_type() == at::kDouble ? given.to(at::kDouble) : given),
        geometry(x, k.time_last),
        from(x, geometry),
        scale(dense(scale)),
        shift(dense(shift)),
        mask(dense(mask)),
        p{x.size(geometry.time), x.size(geometry.batch), 1, x.size(geometry.channel), 1, weight.size(1), k.dilation,
          k.surrogate, k.alpha, pointer<void>(this->scale), pointer<void>(this->shift), pointer<uint8_t>(this->mask)} {
    bool inside = false;
    for (const int64_t d : geometry.dims) {
      p.elements *= x.size(d);
      if (inside) p.inner *= x.size(d);
      inside = inside || d == geometry.channel;
    }
  }

  at::Tensor of_inputs_type(const at::Tensor& grad) const { return grad.to(given.scalar_type()).to(x.scalar_type()); }

  at::Tensor result(const at::Tensor& found) const {
    return found.scalar_type() == given.scalar_type() ? found : at::empty_like(given).copy_(found);
  }

  // f called with a value of the elements' type and one of the sums' type
  template <typename F>
  void operator()(const char* part, const F& f) const {
    try {
      with_types(x.scalar_type(), f);
    } catch (const std::bad_alloc&) {
      throw OutOfMemory(c10::str("fused-cpp: no memory for the scratch space of ", part, ", order ", p.order));
    } catch (const c10::Error&) {
      throw;
    } catch (const std::exception& error) {
      TORCH_CHECK(false, "fused-cpp: ", part, " of order ", p.order, " failed: ", error.what());
    }
  }
};

std::tuple<at::Tensor, at::Tensor> run_statistics(const at::Tensor& x, const at::Tensor& weight, const Vector& scale,
                                                  const Vector& shift, const Vector& mask, int64_t dilation,
                                                  const std::string& layout) {
  const Run run(x, weight, scale, shift, mask, Constants(dilation, layout));
  const at::Tensor w = weight.contiguous(), mean = at::empty({w.size(0)}, w.options()), var = at::empty_like(mean);
  run("statistics", [&](auto scalar, auto acc) {
    using V = decltype(scalar);
    using A = decltype(acc);
    statistics<V, A>(run.p, Cut(run.p, lanes<A>), run.from.view, pointer<V>(run.x), pointer<A>(w), pointer<A>(mean),
                     pointer<A>(var));
  });
  return {mean, var};
}

at::Tensor run_fire(const at::Tensor& x, const at::Tensor& taps, const at::Tensor& bias, const Vector& scale,
                    const Vector& shift, const Vector& mask, int64_t dilation, const std::string& layout) {
  const Run run(x, taps, scale, shift, mask, Constants(dilation, layout));
  const at::Tensor w = taps.contiguous(), b = bias.contiguous(), spikes = at::empty_like(run.x);
  const Placed to(spikes, run.geometry);
  run("fire", [&](auto scalar, auto acc) {
    using V = decltype(scalar);
    using A = decltype(acc);
    fire<V, A>(run.p, Cut(run.p, lanes<A>), run.from.view, pointer<V>(run.x), pointer<A>(w), pointer<A>(b), to.view,
               pointer<V>(spikes));
  });
  return run.result(spikes);
}

std::tuple<at::Tensor, at::Tensor> run_backward_reductions(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& taps, const at::Tensor& bias,
                                                           const Vector& scale, const Vector& shift, const Vector& mask,
                                                           const std::string& surrogate, double alpha, int64_t dilation,
                                                           const std::string& layout) {
  const Run run(x, taps, scale, shift, mask, Constants(surrogate, alpha, dilation, layout));
  const at::Tensor g = run.of_inputs_type(grad), w = taps.contiguous(), b = bias.contiguous();
  const at::Tensor dtaps = at::empty_like(w), dbias = at::empty_like(b);
  const Placed through(g, run.geometry);
  run("backward_reductions", [&](auto scalar, auto acc) {
    using V = decltype(scalar);
    using A = decltype(acc);
    backward_reductions<V, A>(run.p, Cut(run.p, lanes<A>), run.from.view, pointer<V>(run.x), through.view, pointer<V>(g),
                              pointer<A>(w), pointer<A>(b), pointer<A>(dtaps), pointer<A>(dbias));
  });
  return {dtaps, dbias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> run_backward_input(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& taps, const at::Tensor& bias, const at::Tensor& weight,
    const Vector& offset, const Vector& slope, const Vector& scale, const Vector& shift, const Vector& mask,
    bool input_grad, const std::string& surrogate, double alpha, int64_t dilation, const std::string& layout) {
  const Run run(x, weight, scale, shift, mask, Constants(surrogate, alpha, dilation, layout));
  const at::Tensor g = run.of_inputs_type(grad), q = taps.contiguous(), b = bias.contiguous(), w = weight.contiguous();
  const Vector a = dense(offset), s = dense(slope);
  const at::Tensor dx = input_grad ? at::empty_like(run.x) : at::Tensor();
  const at::Tensor dweight = offset ? at::empty_like(w) : at::Tensor(), dscale = like(scale), dshift = like(shift);
  const Placed through(g, run.geometry), to(input_grad ? dx : run.x, run.geometry);
  run("backward_input", [&](auto scalar, auto acc) {
    using V = decltype(scalar);
    using A = decltype(acc);
    backward_input<V, A>(run.p, Cut(run.p, lanes<A>), run.from.view, pointer<V>(run.x), through.view, pointer<V>(g),
                         pointer<A>(q), pointer<A>(b), pointer<A>(w), pointer<A>(a), pointer<A>(s), to.view,
                         pointer<V>(dx), pointer<A>(dweight), pointer<A>(dscale), pointer<A>(dshift));
  });
  return {input_grad ? run.result(dx) : dx, dweight, dscale, dshift};
}

// Spikes, and the statistics that they were fired with: those of the batch where none are given
std::tuple<at::Tensor, at::Tensor, at::Tensor> run_forward(const at::Tensor& x, const at::Tensor& weight,
                                                           const at::Tensor& gamma, const at::Tensor& beta,
                                                           const Vector& given_mean, const Vector& given_var,
                                                           const Vector& scale, const Vector& shift, const Vector& mask,
                                                           const Constants& k) {
  const Run run(x, weight, scale, shift, mask, k);
  const at::Tensor w = weight.contiguous(), c = gamma.contiguous(), b = beta.contiguous();
  const at::Tensor mean = given_mean ? given_mean->contiguous() : at::empty_like(c);
  const at::Tensor var = given_var ? given_var->contiguous() : at::empty_like(c);
  const at::Tensor spikes = at::empty_like(run.x);
  const Placed to(spikes, run.geometry);
  run("forward", [&](auto scalar, auto acc) {
    using V = decltype(scalar);
    using A = decltype(acc);
    forward<V, A>(run.p, k.folding, run.from.view, pointer<V>(run.x), pointer<A>(w), pointer<A>(c), pointer<A>(b),
                  pointer<A>(mean), pointer<A>(var), to.view, pointer<V>(spikes));
  });
  return {run.result(spikes), mean, var};
}

// dX if requested, dW, dγ, dβ, and dscale and dshift where there are scale and shift
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> run_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gamma, const at::Tensor& beta,
    const at::Tensor& given_mean, const at::Tensor& given_var, const Vector& scale, const Vector& shift,
    const Vector& mask, bool input_grad, const Constants& k) {
  const Run run(x, weight, scale, shift, mask, k);
  const at::Tensor g = run.of_inputs_type(grad), w = weight.contiguous(), c = gamma.contiguous(), b = beta.contiguous();
  const at::Tensor mean = given_mean.contiguous(), var = given_var.contiguous();
  const at::Tensor dx = input_grad ? at::empty_like(run.x) : at::Tensor();
  const at::Tensor dweight = at::empty_like(w), dgamma = at::empty_like(c), dbeta = at::empty_like(b);
  const at::Tensor dscale = like(scale), dshift = like(shift);
  const Placed through(g, run.geometry), to(input_grad ? dx : run.x, run.geometry);
  run("backward", [&](auto scalar, auto acc) {
    using V = decltype(scalar);
    using A = decltype(acc);
    backward<V, A>(run.p, k.folding, run.from.view, pointer<V>(run.x), through.view, pointer<V>(g), pointer<A>(w),
                   pointer<A>(c), pointer<A>(b), pointer<A>(mean), pointer<A>(var), to.view, pointer<V>(dx),
                   pointer<A>(dweight), pointer<A>(dgamma), pointer<A>(dbeta), pointer<A>(dscale), pointer<A>(dshift));
  });
  return {input_grad ? run.result(dx) : dx, dweight, dgamma, dbeta, dscale, dshift};
}

struct Statistics {
  at::Tensor mean, var;
  double momentum;
  bool update;

  // as in torch.nn.BatchNorm, by the same operations as in MulFreePSN: equal bit for bit
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
                            const at::Tensor& beta, const Vector& scale, const Vector& shift, const Statistics& running,
                            const c10::intrusive_ptr<Constants>& k) {
    const bool training = k->folding.training;
    const auto given = [&](const at::Tensor& running) { return training ? Vector() : Vector(running); };
    const auto [spikes, mean, var] =
        run_forward(x, weight, gamma, beta, given(running.mean), given(running.var), scale, shift, {}, *k);
    if (training) running.take(mean, var, static_cast<double>(x.numel() / gamma.size(0)));
    // in training the batch's statistics: the running ones have been updated in place
    ctx->save_for_backward(
        {x, weight, gamma, beta, mean, var, scale.value_or(at::Tensor()), shift.value_or(at::Tensor())});
    ctx->saved_data["constants"] = c10::IValue::make_capsule(k);
    ctx->set_materialize_grads(false);
    return spikes;
  }

  static Variables backward(Context* ctx, const Variables& grads) {
    Variables results(8);
    if (!grads[0].defined()) return results;
    const auto k = c10::static_intrusive_pointer_cast<Constants>(ctx->saved_data["constants"].toCapsule());
    // create_graph=True would silently give a second derivative of zero
    TORCH_CHECK(!at::GradMode::is_enabled(), k->layer, k->layer.empty() ? "" : ": ",
                "a surrogate gradient has no derivative; take gradients without create_graph");
    const auto saved = ctx->get_saved_variables();
    const auto given = [&](int i) { return saved[i].defined() ? Vector(saved[i]) : Vector(); };
    std::tie(results[0], results[1], results[2], results[3], results[4], results[5]) =
        run_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], given(6), given(7), {},
                     ctx->needs_input_grad(0), *k);
    return results;
  }
};

// The constants of kernels/constants.py that matter here, in the order of its schema
#define MFPSN_CONSTANTS                                                                                                   \
  double eps, std::string surrogate, double alpha, std::string gradient, int64_t min_exponent, int64_t max_exponent,      \
      bool training, int64_t dilation, std::string layout
#define MFPSN_GIVEN eps, surrogate, alpha, gradient, min_exponent, max_exponent, training, dilation, layout

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_operator(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gamma, const at::Tensor& beta, const Vector& mean,
    const Vector& var, const Vector& scale, const Vector& shift, const Vector& mask, MFPSN_CONSTANTS) {
  auto found = run_forward(x, weight, gamma, beta, mean, var, scale, shift, mask, Constants(MFPSN_GIVEN));
  if (mean) std::get<1>(found) = std::get<2>(found) = at::Tensor();  // an operator must not return its inputs
  return found;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_operator(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gamma, const at::Tensor& beta,
    const at::Tensor& mean, const at::Tensor& var, const Vector& scale, const Vector& shift, const Vector& mask,
    bool input_grad, MFPSN_CONSTANTS) {
  return run_backward(grad, x, weight, gamma, beta, mean, var, scale, shift, mask, input_grad, Constants(MFPSN_GIVEN));
}

at::Tensor layer_operator(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& gamma, const at::Tensor& beta,
                          const at::Tensor& running_mean, const at::Tensor& running_var, const Vector& scale,
                          const Vector& shift, double momentum, bool update, MFPSN_CONSTANTS, std::string layer) {
  const Statistics running{running_mean, running_var, momentum, update};
  return Layer::apply(x, weight, gamma, beta, scale, shift, running,
                      c10::make_intrusive<Constants>(MFPSN_GIVEN, std::move(layer)));
}

// What the library was compiled for: its vector instructions, bytes of one register
std::tuple<std::string, int64_t> level() { return {kInstructions, kRegister}; }

}  // namespace
}  // namespace mfpsn

TORCH_LIBRARY_IMPL(mfpsn_cpu, CompositeExplicitAutograd, library) {
  library.impl("statistics", &mfpsn::run_statistics);
  library.impl("fire", &mfpsn::run_fire);
  library.impl("backward_reductions", &mfpsn::run_backward_reductions);
  library.impl("backward_input", &mfpsn::run_backward_input);
  library.impl("forward", &mfpsn::forward_operator);
  library.impl("backward", &mfpsn::backward_operator);
  library.impl("level", &mfpsn::level);
}

TORCH_LIBRARY_IMPL(mfpsn_cpu, CompositeImplicitAutograd, library) { library.impl("layer", &mfpsn::layer_operator); }
