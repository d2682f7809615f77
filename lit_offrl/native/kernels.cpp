// What a gradient step costs beside its matrix products, and those: fused for the CPU. See __init__.py.
//
//   aten::mm, addmm         by oneDNN where `use_onednn` says so, else PyTorch's own
//   mlp                     a multi-layer perceptron with its first derivative
//   bottleneck_gradient     df/da of a bottleneck network (EDA, Eq. 9) for few rows, without a graph
//
// Tensors are float32, matrices are stored by rows; the Python side sees to both.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

using at::Scalar;
using at::Tensor;
using at::TensorList;
using Optional = std::optional<Tensor>;

// ---------------------------------------------------------------- matrix products

std::atomic<bool> onednn{false};
int64_t fewest_columns = 0, fewest_multiplications = 0;  // below, packing a matrix costs more than it saves

void use_onednn(bool use, int64_t columns, int64_t multiplications) {
  onednn = use, fewest_columns = columns, fewest_multiplications = multiplications;
}

bool pays(const Tensor& a, const Tensor& b) {
  if (!onednn || a.dim() != 2 || b.dim() != 2 || a.size(1) != b.size(0)) return false;
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  return m * k * n >= fewest_multiplications && std::min({m, k, n}) >= fewest_columns &&
         a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat;
}

// Without gaps, by rows or by columns: others oneDNN multiplies 1,000 times more slowly.
Tensor dense(const Tensor& matrix) {
  return matrix.is_contiguous() || matrix.t().is_contiguous() ? matrix : matrix.contiguous();
}

// a weight^T + bias
Tensor onednn_linear(const Tensor& a, const Tensor& weight, const Optional& bias = std::nullopt) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Optional&, std::string_view,
                           c10::List<std::optional<Scalar>>, std::optional<std::string_view>);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                             .typed<Signature>();
  return op.call(dense(a), dense(weight), bias, "none", c10::List<std::optional<Scalar>>(), "");
}

// a b. oneDNN wants its first matrix by rows, and one thread brings it there: where `a` is by columns and large, as in
// gradients of weights, the transposed product leaves it less to move.
Tensor onednn_product(const Tensor& a, const Tensor& b) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  if (!a.is_contiguous() && n * (k + m) < m * k) return onednn_linear(b.t(), a).t();
  return onednn_linear(a, b.t());
}

Tensor product(const Tensor& a, const Tensor& b) { return pays(a, b) ? onednn_product(a, b) : at::cpu::mm(a, b); }

Tensor product_plus(const Tensor& c, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  const bool plain = beta.toDouble() == 1 && alpha.toDouble() == 1;
  if (!plain || !pays(a, b) || c.dim() != 1 || c.size(0) != b.size(1)) return at::cpu::addmm(c, a, b, beta, alpha);
  return onednn_linear(a, b.t(), c);
}

Tensor& product_out(const Tensor& a, const Tensor& b, Tensor& out) {
  return pays(a, b) ? out.resize_({a.size(0), b.size(1)}).copy_(onednn_product(a, b)) : at::cpu::mm_out(out, a, b);
}

Tensor& product_plus_out(const Tensor& c, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha,
                  Tensor& out) {
  if (!pays(a, b)) return at::cpu::addmm_out(out, c, a, b, beta, alpha);
  return out.resize_({a.size(0), b.size(1)}).copy_(product_plus(c, a, b, beta, alpha));
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return product_plus(bias, x, weight.t(), 1, 1);
}

// ---------------------------------------------------------------- activations

inline float exponential(float x) {  // Cephes' expf: within 2 units in the last place
  x = x > 88 ? 88 : x;
  x = x < -87 ? -87 : x;
  const float n = std::rint(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r) + 1;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;  // 2^n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

struct Point {
  float value, slope;
};

struct Mish {  // u tanh(softplus(u)); with e = exp(u) and w = e (e + 2) that is u w / (w + 2)
  static inline Point at(float u) {
    const float e = exponential(u > 20 ? 20 : u), w = e * (e + 2), d = 1 / (w + 2), gate = w * d;
    return {u * gate, gate + u * (4 * e * (e + 1) * d * d)};
  }
};

struct SiLU {
  static inline Point at(float u) {
    const float s = 1 / (1 + exponential(-u)), value = u * s;
    return {value, s + value * (1 - s)};
  }
};

struct ReLU {
  static inline Point at(float u) { return {u < 0 ? 0 : u, u > 0 ? 1.0f : 0.0f}; }
};

// What a layer remembers for its derivative, all [rows, width] but the last: the normalised input, the activation's
// slope, and the reciprocal standard deviations, [rows].
struct Memory {
  Tensor normalised, slope, rstd;
};

constexpr int64_t ENOUGH = 1 << 15;  // elements for a thread

int64_t chunks(int64_t rows, int64_t width) {
  const int64_t large = rows * width / ENOUGH;
  return std::clamp<int64_t>(large, 1, std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(rows, 1)));
}

// Split rows evenly, in a way that depends on nothing but the number of threads.
template <class F>
void each_chunk(int64_t parts, int64_t rows, const F& f) {
  const auto work = [&](int64_t part) { f(part, part * rows / parts, (part + 1) * rows / parts); };
  if (parts == 1) return work(0);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) work(part);
  });
}

// value = act(u) or act(LayerNorm(u)), [rows, width]. `u` is overwritten if it is `ours`.
template <class Act>
Tensor activate(const Tensor& u, bool ours, const Tensor* scale, const Tensor* shift, double eps, Memory* memory) {
  const int64_t rows = u.size(0), width = u.size(1);
  const bool norm = scale != nullptr;
  const Tensor own = ours ? u : at::empty_like(u);
  const Tensor value = memory ? at::empty_like(u) : own;
  if (memory && norm) memory->normalised = own, memory->slope = at::empty_like(u), memory->rstd = at::empty({rows}, u.options());
  if (memory && !norm) memory->slope = own;
  const float *in = u.const_data_ptr<float>(), *w = norm ? scale->const_data_ptr<float>() : nullptr,
              *b = norm ? shift->const_data_ptr<float>() : nullptr;
  float *out = value.mutable_data_ptr<float>(), *slope = memory ? memory->slope.mutable_data_ptr<float>() : nullptr;
  float *normalised = own.mutable_data_ptr<float>(), *rstd = memory && norm ? memory->rstd.mutable_data_ptr<float>() : nullptr;

  each_chunk(chunks(rows, width), rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = in + row * width;
      float* y = out + row * width;
      if (norm) {
        float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < width; ++i) mean += x[i];
        mean /= width;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
        const float reciprocal = 1 / std::sqrt(square / width + static_cast<float>(eps));
        if (memory) {
          rstd[row] = reciprocal;
          float *z = normalised + row * width, *d = slope + row * width;
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const float h = (x[i] - mean) * reciprocal;
            const Point point = Act::at(std::fma(h, w[i], b[i]));
            z[i] = h, y[i] = point.value, d[i] = point.slope;
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) y[i] = Act::at(std::fma((x[i] - mean) * reciprocal, w[i], b[i])).value;
        }
      } else if (memory) {
        float* d = slope + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          const Point point = Act::at(x[i]);
          y[i] = point.value, d[i] = point.slope;
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = Act::at(x[i]).value;
      }
    }
  });
  return value;
}

// From the gradient at the value to that at u, in place; and the sums over rows that are gradients of parameters:
// of the bias before u, and of scale and shift. Each sum is [width].
struct Sums {
  Tensor bias, scale, shift;
};

Sums activate_backward(Tensor& gradient, const Memory& memory, const Tensor* scale) {
  const int64_t rows = gradient.size(0), width = gradient.size(1);
  const bool norm = scale != nullptr;
  const int64_t parts = chunks(rows, width);
  const Tensor sums = at::zeros({parts, norm ? 3 : 1, width}, gradient.options());
  float *g = gradient.mutable_data_ptr<float>(), *sum = sums.mutable_data_ptr<float>();
  const float *slope = memory.slope.const_data_ptr<float>(), *w = norm ? scale->const_data_ptr<float>() : nullptr,
              *normalised = norm ? memory.normalised.const_data_ptr<float>() : nullptr,
              *rstd = norm ? memory.rstd.const_data_ptr<float>() : nullptr;

  each_chunk(parts, rows, [&](int64_t part, int64_t begin, int64_t end) {
    float* bias = sum + part * (norm ? 3 : 1) * width;
    for (int64_t row = begin; row < end; ++row) {
      float* x = g + row * width;
      const float* d = slope + row * width;
      if (!norm) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) bias[i] += (x[i] *= d[i]);
        continue;
      }
      float *scales = bias + width, *shifts = scales + width, mean = 0, along = 0;
      const float* h = normalised + row * width;
#pragma omp simd reduction(+ : mean, along)
      for (int64_t i = 0; i < width; ++i) {
        const float y = x[i] * d[i], z = y * w[i];
        scales[i] += y * h[i], shifts[i] += y, x[i] = z;
        mean += z, along += z * h[i];
      }
      mean /= width, along /= width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) bias[i] += (x[i] = rstd[row] * (x[i] - mean - h[i] * along));
    }
  });
  const Tensor total = parts == 1 ? sums[0] : sums.sum(0);
  return norm ? Sums{total[0], total[1], total[2]} : Sums{total[0], {}, {}};
}

using Activate = Tensor (*)(const Tensor&, bool, const Tensor*, const Tensor*, double, Memory*);

Activate activation_of(std::string_view name) {
  if (name == "Mish") return activate<Mish>;
  if (name == "SiLU") return activate<SiLU>;
  TORCH_CHECK(name == "ReLU", "no activation ", name);
  return activate<ReLU>;
}

// ---------------------------------------------------------------- multi-layer perceptrons

// Where the parameters of each layer are in their list: per layer a norm's scale and shift where there is one, before
// the activation, then the linear map's weight and bias. The first layer has no activation unless the input is
// `activated`.
struct Layout {
  bool norm, activated;
  int64_t layers(int64_t parameters) const {
    return norm ? (parameters + (activated ? 0 : 2)) / 4 : parameters / 2;
  }
  bool active(int64_t layer) const { return layer > 0 || activated; }
  int64_t scale(int64_t layer) const { return 4 * layer - (activated ? 0 : 2); }
  int64_t weight(int64_t layer) const { return norm ? scale(layer) + 2 : 2 * layer; }
};

Tensor run(const Tensor& x, TensorList parameters, Layout layout, Activate activate, double eps,
           std::vector<Tensor>* inputs, std::vector<Memory>* memories) {
  Tensor hidden = x;
  const int64_t layers = layout.layers(parameters.size());
  for (int64_t layer = 0; layer < layers; ++layer) {
    if (layout.active(layer)) {
      Memory memory;
      const bool norm = layout.norm;
      const int64_t scale = layout.scale(layer);
      hidden = activate(hidden, layer > 0, norm ? &parameters[scale] : nullptr, norm ? &parameters[scale + 1] : nullptr,
                        eps, memories ? &memory : nullptr);
      if (memories) memories->push_back(memory);
    }
    if (inputs) inputs->push_back(hidden);
    const int64_t weight = layout.weight(layer);
    hidden = linear(hidden, parameters[weight], parameters[weight + 1]);
  }
  return hidden;
}

Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

Tensor like_rows(const Tensor& y, const Tensor& x) {
  auto shape = x.sizes().vec();
  shape.back() = y.size(1);
  return y.view(shape);
}

Tensor mlp_forward(const Tensor& x, TensorList parameters, std::string_view activation, bool norm, bool activated,
                   double eps) {
  return like_rows(run(rows_of(x), parameters, {norm, activated}, activation_of(activation), eps, nullptr, nullptr), x);
}

struct MlpFunction : torch::autograd::Function<MlpFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, TensorList parameters,
                        std::string_view activation, bool norm, bool activated, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    std::vector<Tensor> saved;
    std::vector<Memory> memories;
    const Tensor y = run(rows_of(x), parameters, {norm, activated}, activation_of(activation), eps, &saved, &memories);
    for (const auto& memory : memories) saved.insert(saved.end(), {memory.normalised, memory.slope, memory.rstd});
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["norm"] = norm, ctx->saved_data["activated"] = activated;
    ctx->saved_data["parameters"] = static_cast<int64_t>(parameters.size()), ctx->saved_data["shape"] = x.sizes();
    return like_rows(y, x);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& outputs) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const Layout layout{ctx->saved_data["norm"].toBool(), ctx->saved_data["activated"].toBool()};
    const int64_t count = ctx->saved_data["parameters"].toInt(), layers = layout.layers(count);
    const auto parameter = saved.end() - count;
    const auto needed = [&](int64_t i) { return ctx->needs_input_grad(1 + i); };
    torch::autograd::variable_list gradients(1 + count + 4);

    Tensor gradient = rows_of(outputs[0]);
    Tensor bias_gradient;  // of the layer at hand, where the layer above has made it
    for (int64_t layer = layers - 1; layer >= 0; --layer) {
      const int64_t weight = layout.weight(layer);
      if (needed(weight)) gradients[1 + weight] = product(gradient.t(), saved[layer]);
      if (needed(weight + 1)) gradients[2 + weight] = bias_gradient.defined() ? bias_gradient : gradient.sum(0);
      if (!layout.active(layer)) {
        if (ctx->needs_input_grad(0)) gradients[0] = product(gradient, parameter[weight]);
        break;
      }
      gradient = product(gradient, parameter[weight]).contiguous();
      const int64_t memory = layers + 3 * (layer - (layout.activated ? 0 : 1)), scale = layout.scale(layer);
      const Sums sums = activate_backward(gradient, {saved[memory], saved[memory + 1], saved[memory + 2]},
                                          layout.norm ? &parameter[scale] : nullptr);
      bias_gradient = sums.bias;
      if (layout.norm && needed(scale)) gradients[1 + scale] = sums.scale, gradients[2 + scale] = sums.shift;
      if (layer == 0) gradients[0] = gradient;
    }
    if (gradients[0].defined()) gradients[0] = gradients[0].view(ctx->saved_data["shape"].toIntVector());
    return gradients;
  }
};

Tensor mlp_autograd(const Tensor& x, TensorList parameters, std::string_view activation, bool norm, bool activated,
                    double eps) {
  return MlpFunction::apply(x, parameters, activation, norm, activated, eps);
}

}  // namespace

TORCH_LIBRARY(lit_offrl_native, m) {
  m.def("use_onednn(bool use, int fewest_columns, int fewest_multiplications) -> ()", use_onednn);
  m.def("mlp(Tensor x, Tensor[] parameters, str activation, bool norm, bool activated, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(lit_offrl_native, CPU, m) { m.impl("mlp", mlp_forward); }

TORCH_LIBRARY_IMPL(lit_offrl_native, AutogradCPU, m) { m.impl("mlp", mlp_autograd); }

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("mm", product);
  m.impl("mm.out", product_out);
  m.impl("addmm", product_plus);
  m.impl("addmm.out", product_plus_out);
}
