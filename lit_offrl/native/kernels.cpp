// Kernels for the CPU: matrix products, and the short operations between them, fused. See __init__.py.
//
//   aten::mm, addmm         by oneDNN where `use_onednn` says so, else PyTorch's own
//   mlp                     multi-layer perceptrons with their first derivative
//   feature_block           a block of a noise network, without a graph
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

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

using at::Scalar;
using at::Tensor;
using at::TensorList;
using Optional = std::optional<Tensor>;

// The operator of this name, called through the dispatcher.
template <class Signature>
c10::TypedOperatorHandle<Signature> registered(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

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
  static const auto op = registered<Signature>("mkldnn::_linear_pointwise");
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

constexpr int LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Half __attribute__((vector_size(2 * LANES)));
typedef float Quarter __attribute__((vector_size(LANES)));

template <class To, class From>
inline To read_as(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline float total(const Vector& vector) {
  const auto* part = reinterpret_cast<const char*>(&vector);
  const Half half = read_as<Half>(part) + read_as<Half>(part + sizeof(Half));
  part = reinterpret_cast<const char*>(&half);
  const Quarter quarter = read_as<Quarter>(part) + read_as<Quarter>(part + sizeof(Quarter));
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// out += x w^T for M rows of x and N of w, `width` numbers each.
template <int M, int N>
void add_tile(const float* x, const float* w, int64_t width, float* out, int64_t stride) {
  Vector sums[M][N] = {};
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES) {
    Vector rows[M];
    for (int m = 0; m < M; ++m) rows[m] = read_as<Vector>(x + m * width + k);
    for (int n = 0; n < N; ++n) {
      const Vector weights = read_as<Vector>(w + n * width + k);
      for (int m = 0; m < M; ++m) sums[m][n] += rows[m] * weights;
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float sum = total(sums[m][n]);
      for (int64_t rest = k; rest < width; ++rest) sum += x[m * width + rest] * w[n * width + rest];
      out[m * stride + n] += sum;
    }
  }
}

template <int N>
void add_tiles(const float* x, int64_t rows, const float* w, int64_t width, float* out, int64_t stride) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) add_tile<4, N>(x + m * width, w, width, out + m * stride, stride);
  if (rows - m == 3) add_tile<3, N>(x + m * width, w, width, out + m * stride, stride);
  if (rows - m == 2) add_tile<2, N>(x + m * width, w, width, out + m * stride, stride);
  if (rows - m == 1) add_tile<1, N>(x + m * width, w, width, out + m * stride, stride);
}

// out[rows, n] += x[rows, k] w[n, k]^T. With few rows most of the time is that of reading w, once.
void add_product(const float* x, int64_t rows, const Tensor& weight, float* out) {
  const float* w = weight.const_data_ptr<float>();
  const int64_t columns = weight.size(0), width = weight.size(1);
  int64_t n = 0;
  for (; n + 4 <= columns; n += 4) add_tiles<4>(x, rows, w + n * width, width, out + n, columns);
  for (; n < columns; ++n) add_tiles<1>(x, rows, w + n * width, width, out + n, columns);
}

constexpr int64_t FEW_ROWS = 4;  // up to which a product of ours costs less than the call of another

// x weight^T + bias
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t rows = x.size(0), columns = weight.size(0);
  if (rows > FEW_ROWS || !x.is_contiguous() || !weight.is_contiguous() || !bias.is_contiguous())
    return product_plus(bias, x, weight.t(), 1, 1);
  const Tensor out = at::empty({rows, columns}, x.options());
  for (int64_t row = 0; row < rows; ++row)
    std::copy_n(bias.const_data_ptr<float>(), columns, out.mutable_data_ptr<float>() + row * columns);
  add_product(x.const_data_ptr<float>(), rows, weight, out.mutable_data_ptr<float>());
  return out;
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

inline float mean_of(const float* x, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += x[i];
  return sum / width;
}

// The mean, and the reciprocal standard deviation as LayerNorm has it.
struct Moments {
  float mean, reciprocal;
};

inline Moments moments(const float* x, int64_t width, double eps) {
  const float mean = mean_of(x, width);
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
  return {mean, 1 / std::sqrt(square / width + static_cast<float>(eps))};
}

// value = act(u) or act(LayerNorm(u)), [rows, width]. `u` is overwritten if it is `ours`.
template <class Act>
Tensor activate(const Tensor& u, bool ours, const Tensor* scale, const Tensor* shift, double eps, Memory* memory) {
  const int64_t rows = u.size(0), width = u.size(1);
  const bool norm = scale != nullptr;
  const Tensor own = ours ? u : at::empty_like(u);
  const Tensor value = memory ? at::empty_like(u) : own;
  if (memory && norm)
    memory->normalised = own, memory->slope = at::empty_like(u), memory->rstd = at::empty({rows}, u.options());
  if (memory && !norm) memory->slope = own;
  const float *in = u.const_data_ptr<float>(), *w = norm ? scale->const_data_ptr<float>() : nullptr,
              *b = norm ? shift->const_data_ptr<float>() : nullptr;
  float *out = value.mutable_data_ptr<float>(), *slope = memory ? memory->slope.mutable_data_ptr<float>() : nullptr;
  float *normalised = own.mutable_data_ptr<float>(),
        *rstd = memory && norm ? memory->rstd.mutable_data_ptr<float>() : nullptr;

  each_chunk(chunks(rows, width), rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = in + row * width;
      float* y = out + row * width;
      if (norm) {
        const Moments of = moments(x, width, eps);
        const float mean = of.mean, reciprocal = of.reciprocal;
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

// Sums over rows that are gradients of parameters, [width] each: of the bias before u, of a norm's scale and shift.
struct Sums {
  Tensor bias, scale, shift;
};

// From the gradient at the value to that at u, in place, and the sums if they are `wanted`.
Sums activate_backward(Tensor& gradient, const Memory& memory, const Tensor* scale, bool wanted) {
  const int64_t rows = gradient.size(0), width = gradient.size(1), parts = chunks(rows, width);
  const bool norm = scale != nullptr;
  Sums sums;
  const auto begin_sum = [&](Tensor& sum) {
    return (sum = at::zeros({parts, width}, gradient.options())).data_ptr<float>();
  };
  float *biases = wanted ? begin_sum(sums.bias) : nullptr, *scales = wanted && norm ? begin_sum(sums.scale) : nullptr,
        *shifts = wanted && norm ? begin_sum(sums.shift) : nullptr;
  float* gradients = gradient.mutable_data_ptr<float>();
  const float *slopes = memory.slope.const_data_ptr<float>(), *w = norm ? scale->const_data_ptr<float>() : nullptr,
              *normalised = norm ? memory.normalised.const_data_ptr<float>() : nullptr,
              *rstd = norm ? memory.rstd.const_data_ptr<float>() : nullptr;

  each_chunk(parts, rows, [&](int64_t part, int64_t begin, int64_t end) {
    float *bias = biases + part * width, *by_scale = scales + part * width, *by_shift = shifts + part * width;
    for (int64_t row = begin; row < end; ++row) {
      float* g = gradients + row * width;
      const float* slope = slopes + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) g[i] *= slope[i];
      if (norm) {
        const float* h = normalised + row * width;
        if (wanted) {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) by_scale[i] += g[i] * h[i], by_shift[i] += g[i];
        }
        float mean = 0, along = 0;
#pragma omp simd reduction(+ : mean, along)
        for (int64_t i = 0; i < width; ++i) mean += g[i] * w[i], along += g[i] * w[i] * h[i];
        mean /= width, along /= width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) g[i] = rstd[row] * (g[i] * w[i] - mean - h[i] * along);
      }
      if (wanted) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) bias[i] += g[i];
      }
    }
  });
  for (Tensor* sum : {&sums.bias, &sums.scale, &sums.shift})
    if (sum->defined()) *sum = parts == 1 ? sum->view({width}) : sum->sum(0);
  return sums;
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
  int64_t layers(int64_t parameters) const { return norm ? (parameters + (activated ? 0 : 2)) / 4 : parameters / 2; }
  bool active(int64_t layer) const { return layer > 0 || activated; }
  int64_t scale(int64_t layer) const { return 4 * layer - (activated ? 0 : 2); }
  int64_t weight(int64_t layer) const { return norm ? scale(layer) + 2 : 2 * layer; }
};

Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

Tensor like_rows(const Tensor& y, const Tensor& x) {
  auto shape = x.sizes().vec();
  shape.back() = y.size(1);
  return y.view(shape);
}

// The output at rows `x`. For the way back `kept` is given, of each activation, its slope and value and, where it
// follows a norm, the normalised input and the reciprocal standard deviations.
Tensor run(const Tensor& x, TensorList parameters, Activate activate, Layout layout, double eps,
           std::vector<Tensor>* kept) {
  Tensor hidden = x;
  for (int64_t layer = 0; layer < layout.layers(parameters.size()); ++layer) {
    if (layout.active(layer)) {
      const Tensor* scale = layout.norm ? &parameters[layout.scale(layer)] : nullptr;
      Memory memory;
      hidden = activate(hidden, layer > 0, scale, scale ? scale + 1 : nullptr, eps, kept ? &memory : nullptr);
      if (kept) kept->insert(kept->end(), {memory.slope, hidden});
      if (kept && layout.norm) kept->insert(kept->end(), {memory.normalised, memory.rstd});
    }
    const int64_t weight = layout.weight(layer);
    hidden = linear(hidden, parameters[weight], parameters[weight + 1]);
  }
  return hidden;
}

// Do something for each of several networks, as many at a time as there are threads: threads that share the operations
// of one network wait for one another in each of them, these do at the end alone.
template <class F>
void each_network(int64_t networks, const F& f) {
  if (networks == 1 || networks < at::get_num_threads()) {
    for (int64_t network = 0; network < networks; ++network) f(network);
    return;
  }
  at::parallel_for(0, networks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // each thread has a state of its own
    for (int64_t network = begin; network < end; ++network) f(network);
  });
}

TensorList part(TensorList all, int64_t networks, int64_t network) {
  const int64_t count = all.size() / networks;
  return all.slice(network * count, count);
}

// The outputs of all networks; `kept` is given what `run` keeps of each.
std::vector<Tensor> run_all(TensorList x, TensorList parameters, std::string_view activation, Layout layout, double eps,
                            std::vector<std::vector<Tensor>>* kept) {
  const Activate activate = activation_of(activation);
  const int64_t networks = x.size();
  std::vector<Tensor> outputs(networks);
  each_network(networks, [&](int64_t i) {
    const TensorList own = part(parameters, networks, i);
    outputs[i] = like_rows(run(rows_of(x[i]), own, activate, layout, eps, kept ? &(*kept)[i] : nullptr), x[i]);
  });
  return outputs;
}

std::vector<Tensor> mlp(TensorList x, TensorList parameters, std::string_view activation, bool norm, bool activated,
                        double eps) {
  return run_all(x, parameters, activation, {norm, activated}, eps, nullptr);
}

// The outputs, and what was kept of all networks, one after another.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> mlp_forward(TensorList x, TensorList parameters,
                                                                 std::string_view activation, bool norm, bool activated,
                                                                 double eps) {
  std::vector<std::vector<Tensor>> kept(x.size());
  const auto outputs = run_all(x, parameters, activation, {norm, activated}, eps, &kept);
  std::vector<Tensor> memories;
  for (const auto& each : kept) memories.insert(memories.end(), each.begin(), each.end());
  return {outputs, memories};
}

// Gradients of one network: of its input, number 0, and of its parameters, from number 1 on, where they are `wanted`.
std::vector<Tensor> gradients_of(const Tensor& output_gradient, const Tensor* x, TensorList parameters,
                                 TensorList memories, const std::vector<bool>& wanted, bool norm) {
  const Layout layout{norm, x == nullptr};
  const bool any = std::find(wanted.begin() + 1, wanted.end(), true) != wanted.end();
  std::vector<Tensor> gradients(wanted.size());
  Tensor gradient = rows_of(output_gradient), bias_gradient;
  int64_t memory = memories.size();
  for (int64_t layer = layout.layers(parameters.size()) - 1; layer >= 0; --layer) {
    const bool active = layout.active(layer);
    if (active) memory -= norm ? 4 : 2;
    const int64_t weight = layout.weight(layer);
    if (wanted[1 + weight]) gradients[1 + weight] = product(gradient.t(), active ? memories[memory + 1] : rows_of(*x));
    if (wanted[2 + weight]) gradients[2 + weight] = bias_gradient.defined() ? bias_gradient : gradient.sum(0);
    if (active || wanted[0]) gradient = product(gradient, parameters[weight]).contiguous();
    if (!active) break;
    const int64_t scale = layout.scale(layer);
    const Memory kept{norm ? memories[memory + 2] : Tensor(), memories[memory], norm ? memories[memory + 3] : Tensor()};
    const Sums sums = activate_backward(gradient, kept, norm ? &parameters[scale] : nullptr, any);
    bias_gradient = sums.bias;
    if (norm) gradients[1 + scale] = sums.scale, gradients[2 + scale] = sums.shift;
  }
  if (wanted[0]) gradients[0] = like_rows(gradient, output_gradient);
  return gradients;
}

// The gradients that are `needed`, by their numbers: first come the inputs, then the parameters. `x` is empty where the
// inputs are activated.
std::vector<Tensor> mlp_backward(TensorList output_gradients, TensorList x, TensorList parameters, TensorList memories,
                                 at::IntArrayRef needed, bool norm) {
  const int64_t networks = output_gradients.size(), count = parameters.size() / networks;
  std::vector<std::vector<bool>> wanted(networks, std::vector<bool>(1 + count));
  const auto place = [&](int64_t i) {  // the network, and the number in it
    return i < networks ? std::pair{i, int64_t{0}} : std::pair{(i - networks) / count, 1 + (i - networks) % count};
  };
  for (const int64_t i : needed) wanted[place(i).first][place(i).second] = true;
  std::vector<std::vector<Tensor>> gradients(networks);
  each_network(networks, [&](int64_t i) {
    gradients[i] = gradients_of(output_gradients[i], x.empty() ? nullptr : &x[i], part(parameters, networks, i),
                                part(memories, networks, i), wanted[i], norm);
  });
  std::vector<Tensor> result;
  for (const int64_t i : needed) result.push_back(gradients[place(i).first][place(i).second].contiguous());
  return result;
}

// Both through the dispatcher, so that they can be traced, counted and profiled.
struct MlpFunction : torch::autograd::Function<MlpFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, TensorList x,
                                                TensorList parameters, std::string_view activation, bool norm,
                                                bool activated, double eps) {
    static const auto op = registered<decltype(mlp_forward)>("lit_offrl_native::mlp_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [outputs, saved] = op.call(x, parameters, activation, norm, activated, eps);
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    if (!activated) saved.insert(saved.end(), x.begin(), x.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["norm"] = norm, ctx->saved_data["activated"] = activated;
    ctx->saved_data["parameters"] = static_cast<int64_t>(parameters.size());
    return outputs;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& outputs) {
    static const auto op = registered<decltype(mlp_backward)>("lit_offrl_native::mlp_backward");
    TORCH_CHECK(!at::GradMode::is_enabled(), "the kernel of a multi-layer perceptron has a first derivative only");
    const auto saved = ctx->get_saved_variables();
    const int64_t networks = outputs.size(), parameters = ctx->saved_data["parameters"].toInt();
    const int64_t inputs = ctx->saved_data["activated"].toBool() ? 0 : networks;
    const int64_t memories = saved.size() - parameters - inputs;
    const TensorList all(saved);
    std::vector<int64_t> needed;
    for (int64_t i = 0; i < networks + parameters; ++i)
      if (ctx->needs_input_grad(i)) needed.push_back(i);
    const auto found = op.call(outputs, all.slice(memories + parameters, inputs), all.slice(memories, parameters),
                               all.slice(0, memories), needed, ctx->saved_data["norm"].toBool());
    torch::autograd::variable_list gradients(networks + parameters + 4);  // and for each argument that is not a tensor
    for (size_t i = 0; i < needed.size(); ++i) gradients[needed[i]] = found[i];
    return gradients;
  }
};

std::vector<Tensor> mlp_autograd(TensorList x, TensorList parameters, std::string_view activation, bool norm,
                                 bool activated, double eps) {
  static const auto plain = registered<decltype(mlp)>("lit_offrl_native::mlp");
  if (!at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return plain.call(x, parameters, activation, norm, activated, eps);
  }
  return MlpFunction::apply(x, parameters, activation, norm, activated, eps);
}

// ---------------------------------------------------------------- blocks of a noise network

// SiLU(second(SiLU(first(x)) + shift)) + skip(x), without a graph; `parameters` has weight and bias of first, second
// and, unless it is the identity, skip. `shift` broadcasts.
Tensor feature_block(const Tensor& x, const Tensor& shift, TensorList parameters) {
  const auto silu = [](const Tensor& u) { return activate<SiLU>(u, true, nullptr, nullptr, 0, nullptr); };
  const Tensor rows = rows_of(x);
  Tensor hidden = silu(linear(rows, parameters[0], parameters[1]));
  like_rows(hidden, x).add_(shift);
  hidden = silu(linear(hidden, parameters[2], parameters[3]));
  return like_rows(hidden.add_(parameters.size() > 4 ? linear(rows, parameters[4], parameters[5]) : rows), x);
}

// ---------------------------------------------------------------- the gradient of a bottleneck network

inline float dot(const float* x, const float* y, int64_t width) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += x[i] * y[i];
  return sum;
}

// df/da, [..., action_dim], at actions of that shape, where the first hidden layer is shift + action_map a, [...,
// width]. Derivatives in all dimensions of the action go forward beside the values: the weights, most of what is to be
// read, serve all of them at once and are not read again on a way back. `blocks` has the weight and the bias of norm,
// expand and contract, block by block.
Tensor bottleneck_gradient(const Tensor& actions, const Tensor& shift, const Tensor& action_map, const Tensor& head,
                           TensorList blocks, double eps) {
  const int64_t width = action_map.size(0), dimensions = action_map.size(1), group = 1 + dimensions;
  const int64_t rows = actions.numel() / dimensions, inside = blocks[2].size(0);
  auto shape = actions.sizes().vec();
  shape.back() = width;
  const Tensor shifts = shift.expand(shape).contiguous(), inputs = actions.contiguous();
  // Groups of a value and its derivatives, one for each row.
  std::vector<float> states(rows * group * width), normalised(rows * group * width), inner(rows * group * inside);
  for (int64_t row = 0; row < rows; ++row) {
    float* state = states.data() + row * group * width;
    const float *a = inputs.const_data_ptr<float>() + row * dimensions, *map = action_map.const_data_ptr<float>();
    std::copy_n(shifts.const_data_ptr<float>() + row * width, width, state);
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t j = 0; j < dimensions; ++j, ++map) state[i] += a[j] * *map, state[(1 + j) * width + i] = *map;
    }
  }

  for (size_t block = 0; block < blocks.size(); block += 6) {
    const Tensor &expand = blocks[block + 2], &contract = blocks[block + 4];
    const float *scale = blocks[block].const_data_ptr<float>(), *shift = blocks[block + 1].const_data_ptr<float>(),
                *expand_bias = blocks[block + 3].const_data_ptr<float>(),
                *contract_bias = blocks[block + 5].const_data_ptr<float>();
    for (int64_t row = 0; row < rows; ++row) {
      const float* x = states.data() + row * group * width;
      float* y = normalised.data() + row * group * width;
      const Moments of = moments(x, width, eps);
      const float mean = of.mean, reciprocal = of.reciprocal;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * reciprocal;
      for (int64_t j = 1; j < group; ++j) {
        const float* t = x + j * width;
        float* d = y + j * width;
        const float average = mean_of(t, width), along = dot(t, y, width) / width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) d[i] = reciprocal * (t[i] - average - y[i] * along) * scale[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) y[i] = y[i] * scale[i] + shift[i];
    }
    std::fill(inner.begin(), inner.end(), 0.0f);
    add_product(normalised.data(), rows * group, expand, inner.data());
    for (int64_t row = 0; row < rows; ++row) {
      float* u = inner.data() + row * group * inside;
#pragma omp simd
      for (int64_t i = 0; i < inside; ++i) {
        const Point point = SiLU::at(u[i] + expand_bias[i]);
        u[i] = point.value;
        for (int64_t j = 1; j < group; ++j) u[j * inside + i] *= point.slope;
      }
      float* x = states.data() + row * group * width;
      for (int64_t i = 0; i < width; ++i) x[i] += contract_bias[i];
    }
    add_product(inner.data(), rows * group, contract, states.data());
  }

  const Tensor gradients = at::empty_like(inputs);
  std::vector<float> slopes(width);
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = states.data() + row * group * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) slopes[i] = head.const_data_ptr<float>()[i] * SiLU::at(x[i]).slope;
    for (int64_t j = 0; j < dimensions; ++j)
      gradients.mutable_data_ptr<float>()[row * dimensions + j] = dot(slopes.data(), x + (1 + j) * width, width);
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY(lit_offrl_native, m) {
  m.def("use_onednn(bool use, int fewest_columns, int fewest_multiplications) -> ()", use_onednn);
  m.def("mlp(Tensor[] x, Tensor[] parameters, str activation, bool norm, bool activated, float eps) -> Tensor[]");
  m.def(
      "mlp_forward(Tensor[] x, Tensor[] parameters, str activation, bool norm, bool activated, float eps) "
      "-> (Tensor[], Tensor[])");
  m.def(
      "mlp_backward(Tensor[] gradients, Tensor[] x, Tensor[] parameters, Tensor[] memories, int[] needed, bool norm) "
      "-> Tensor[]");
  m.def("feature_block(Tensor x, Tensor shift, Tensor[] parameters) -> Tensor");
  m.def(
      "bottleneck_gradient(Tensor actions, Tensor shift, Tensor action_map, Tensor head, Tensor[] blocks, float eps) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(lit_offrl_native, CPU, m) {
  m.impl("mlp", mlp);
  m.impl("mlp_forward", mlp_forward);
  m.impl("mlp_backward", mlp_backward);
  m.impl("feature_block", feature_block);
  m.impl("bottleneck_gradient", bottleneck_gradient);
}

TORCH_LIBRARY_IMPL(lit_offrl_native, AutogradCPU, m) { m.impl("mlp", mlp_autograd); }

struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  Silence silence;  // that these take the places of PyTorch's own is intended
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  m.impl("mm", product);
  m.impl("mm.out", product_out);
  m.impl("addmm", product_plus);
  m.impl("addmm.out", product_plus_out);
}
