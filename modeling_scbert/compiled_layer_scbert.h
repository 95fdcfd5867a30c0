// A FAVOR+ block in chunks of positions on a CPU, forward: what chunked_layer_scbert.py computes, every thread
// working on chunks of its own. Matrix products are torch's; T is what they read and write, float or bfloat16. Residual
// stream, logarithms of features and sums over keys are float32 either way.
//
// Tables hold values less their mean, and attention puts out that: what values share would drown the gradients of
// queries and keys, which are differences, in bfloat16's rounding. The mean comes back behind the output projection.

#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "compiled_passes_scbert.h"

namespace scbert_cpu {

using at::Tensor;

// ---- a block, its sizes and the buffers of a thread -----------------------------------------------------------

struct Layer {
  // linear weights as T, the rest float32
  Tensor norm_w, norm_b, q, kv, o, o_b, ffn_norm_w, ffn_norm_b, up, up_b, down, down_b;
  Tensor matrix;           // [dim, features], with log2(e) and dim^-1/4
  Tensor gradient_matrix;  // [features, dim], T, without the change of base
  int64_t heads, dim, real_features, features, hidden, inner;
  float epsilon, norm_eps;
};

inline Layer make_layer(at::TensorList w, const Tensor& projection, int64_t heads, double epsilon, double norm_eps,
                        at::ScalarType dtype) {
  Layer layer;
  const auto linear = [&](int i) { return w[i].detach().to(dtype).contiguous(); };
  const auto plain = [&](int i) { return w[i].detach().to(at::kFloat).contiguous(); };
  layer.norm_w = plain(0), layer.norm_b = plain(1);
  layer.q = linear(2), layer.kv = at::cat({linear(3), linear(4)}), layer.o = linear(5), layer.o_b = plain(6);
  layer.ffn_norm_w = plain(7), layer.ffn_norm_b = plain(8);
  layer.up = linear(9), layer.up_b = linear(10), layer.down = linear(11), layer.down_b = plain(12);
  layer.dim = projection.size(1), layer.real_features = projection.size(0), layer.heads = heads;
  layer.features = (layer.real_features + 15) / 16 * 16;
  layer.hidden = layer.q.size(1), layer.inner = layer.q.size(0);
  // rows of whole vectors, or the loops over features spend a third of their time on the rest: the first features stand
  // there once more, which changes no maximum, and tables are zero there (see `finish_table`)
  const Tensor padded = at::arange(layer.features).remainder(layer.real_features);
  const Tensor scaled = projection.to(at::kFloat).index_select(0, padded) * std::pow(layer.dim, -0.25);
  layer.matrix = (scaled * M_LOG2E).t().contiguous(), layer.gradient_matrix = scaled.to(dtype).contiguous();
  layer.epsilon = epsilon, layer.norm_eps = norm_eps;
  return layer;
}

// what a thread needs below autograd and autocast, whose states do not follow into at::parallel_for
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// named buffers of one thread, grown once and reused from chunk to chunk
class Buffers {
 public:
  Tensor get(size_t slot, at::IntArrayRef shape, at::ScalarType dtype) {
    if (slots_.size() <= slot) slots_.resize(slot + 1);
    const int64_t size = c10::multiply_integers(shape);
    Tensor& held = slots_[slot];
    if (!held.defined() || held.numel() < size || held.scalar_type() != dtype) held = at::empty({size}, dtype);
    return held.narrow(0, 0, size).view(shape);
  }

 private:
  std::vector<Tensor> slots_;
};

// what the buffers hold between the steps of one chunk; T where nothing is said
enum Slot {
  NORMED,          // output of the first norm, [rows, hidden]
  WIDE,            // projected queries, or keys and values; gradient of the attention's output
  HEADS,           // queries or keys by head, [heads, rows, dim], float32
  HALF,            // |x'|^2 / 2 of theirs, [heads, rows], float32
  LOGS,            // logarithms of features, [heads, rows, features], float32; with T float, their exponentials
  EXPONENTIALS,    // with T bfloat16
  MAXIMA,          // of every row of logarithms, float32
  FACTOR,          // of every row of keys, float32
  DOTS,            // normalisers of queries, then sums of the gradient over features, float32
  JOINED,          // numerators; weighed values; gradient of numerators and normaliser, [heads, rows, dim (+ 1)]
  ATTENDED,        // the attention's output, [rows, inner]
  BRANCH,          // what a linear map to [rows, hidden] puts out
  RESIDUAL,        // the stream between the branches, [rows, hidden], float32
  FFN_NORMED,      // output of the second norm
  UP,              // inner values of the feed-forward network before GELU
  GELU,            // and after it; their gradient
  PROJECTED_GRAD,  // gradient of WIDE's projections
  SHARE,           // a product on its way to a float32 sum
  OUTPUT_GRAD,     // a gradient of the stream as T
  FEATURE_GRAD,    // gradient of features
  HEADS_GRAD       // gradient of queries, keys or values by head
};

// ---- chunks -----------------------------------------------------------------------------------------------------

// threads that a loop over chunks may use: one where cells are spread over them already
inline int free_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

struct Chunks {
  int64_t count, length;
  int64_t start(int64_t i) const { return i * length / count; }
};

// of equal size, as many as keep every thread busy to the end
inline Chunks chunks_of(int64_t length, int64_t chunk_size) {
  int64_t count = std::max<int64_t>(1, (length + chunk_size - 1) / chunk_size);
  if (length == 0) return {0, 0};
  if (count > 1) count = (count + free_threads() - 1) / free_threads() * free_threads();
  return {std::min(count, length), length};
}

// ---- forward ----------------------------------------------------------------------------------------------------

// queries, or keys with values behind them, of a chunk: [rows, inner], [rows, 2 * inner]
template <typename T>
Tensor project(Buffers& buffers, const Tensor& normed, const Tensor& weight) {
  Tensor projected = buffers.get(WIDE, {normed.size(0), weight.size(0)}, dtype_of<T>);
  return at::mm_out(projected, normed, weight.t());
}

// of projected queries or keys: `HEADS` [heads * rows, dim], `HALF`, and logarithms in `LOGS`
template <typename T>
Tensor head_logarithms(const Layer& layer, Buffers& buffers, const Tensor& projected) {
  const int64_t rows = projected.size(0), head_rows = layer.heads * rows;
  Tensor heads = buffers.get(HEADS, {head_rows, layer.dim}, at::kFloat);
  float* half = data<float>(buffers.get(HALF, {head_rows}, at::kFloat));
  split_heads(data<T>(projected), projected.size(1), rows, layer.heads, layer.dim, data<float>(heads), half);
  Tensor logs = buffers.get(LOGS, {head_rows, layer.features}, at::kFloat);
  return at::mm_out(logs, heads, layer.matrix);
}

template <typename T>
Tensor features_buffer(const Layer& layer, Buffers& buffers, const Tensor& logs) {
  return std::is_same_v<T, float> ? logs : buffers.get(EXPONENTIALS, logs.sizes(), dtype_of<T>);
}

// a chunk's keys and values, [rows, 2 * inner], from its norm: masked rows are zero, whatever stands in them
template <typename T>
Tensor project_keys(const Layer& layer, Buffers& buffers, Tensor& normed, const bool* keep) {
  if (keep) clear_rows(data<T>(normed), normed.size(0), layer.hidden, keep);
  return project<T>(buffers, normed, layer.kv);
}

template <typename T>
Tensor normed_chunk(const Layer& layer, Buffers& buffers, const Tensor& x) {
  Tensor normed = buffers.get(NORMED, x.sizes(), dtype_of<T>);
  layer_norm(data<float>(x), x.size(0), layer.hidden, data<float>(layer.norm_w), data<float>(layer.norm_b),
             layer.norm_eps, data<T>(normed));
  return normed;
}

// mean values of sums of [v, 1]: [heads, dim + 1] to [heads, dim]
inline Tensor mean_values(const Tensor& sums) {
  const int64_t dim = sums.size(1) - 1;
  return sums.narrow(1, 0, dim).div(sums.narrow(1, dim, 1).clamp_min(1));
}

// running sum of exp2(log phi_k) [v - centre, 1], transposed: [heads, dim + 1, features], under the largest logarithm
// so far
struct KeySums {
  Tensor table, plain;  // plain: sum of [v, 1], [heads, dim + 1]
  Tensor centre;        // mean values of the first chunk, [heads, dim]
  float shift = -std::numeric_limits<float>::infinity();

  explicit KeySums(const Layer& layer)
      : table(at::zeros({layer.heads, layer.dim + 1, layer.features}, at::kFloat)),
        plain(at::zeros({layer.heads, layer.dim + 1}, at::kFloat)) {}

  void recentre(const Tensor& to) {
    const int64_t dim = to.size(1);
    if (centre.defined()) table.narrow(1, 0, dim).addcmul_(table.narrow(1, dim, 1), (centre - to).unsqueeze(-1));
  }

  void raise(float to) {
    if (to <= shift) return;
    if (std::isfinite(shift)) table.mul_(std::exp2(shift - to));
    shift = to;
  }
};

// exponentials and factors of a chunk's keys; with no shift given, `sums` moves on to the largest logarithm so far
template <typename T>
Tensor key_features(const Layer& layer, Buffers& buffers, const Tensor& projected, const bool* keep,
                    std::optional<float> shift, KeySums* sums = nullptr) {
  const int64_t rows = projected.size(0), head_rows = layer.heads * rows;
  Tensor logs = head_logarithms<T>(layer, buffers, projected);
  Tensor features = features_buffer<T>(layer, buffers, logs);
  float* maxima = data<float>(buffers.get(MAXIMA, {head_rows}, at::kFloat));
  exponentials(data<float>(logs), head_rows, layer.features, data<T>(features), maxima, nullptr, nullptr);
  if (sums) sums->raise(kept_maximum(maxima, keep, layer.heads, rows));
  const float* half = data<float>(buffers.get(HALF, {head_rows}, at::kFloat));
  float* factor = data<float>(buffers.get(FACTOR, {head_rows}, at::kFloat));
  key_factors(maxima, half, keep, layer.heads, rows, sums ? sums->shift : *shift, factor);
  return features.view({layer.heads, rows, layer.features});
}

template <typename T>
void add_keys(const Layer& layer, Buffers& buffers, const Tensor& x, const bool* keep, KeySums& sums) {
  const int64_t rows = x.size(0);
  Tensor normed = normed_chunk<T>(layer, buffers, x), projected = project_keys<T>(layer, buffers, normed, keep);
  Tensor features = key_features<T>(layer, buffers, projected, keep, std::nullopt, &sums);
  const float* factor = data<float>(buffers.get(FACTOR, {layer.heads * rows}, at::kFloat));
  const T* value = data<T>(projected) + layer.inner;
  Tensor weighted = buffers.get(JOINED, {layer.heads, rows, layer.dim + 1}, dtype_of<T>);
  sum_values(value, 2 * layer.inner, rows, layer.heads, layer.dim, keep, data<float>(sums.plain));
  if (!sums.centre.defined()) sums.centre = mean_values(sums.plain).contiguous();
  weigh_values(value, 2 * layer.inner, rows, layer.heads, layer.dim, factor, data<float>(sums.centre),
               data<T>(weighted));
  if constexpr (std::is_same_v<T, float>) {
    sums.table.baddbmm_(weighted.mT(), features);
  } else {
    Tensor share = buffers.get(SHARE, sums.table.sizes(), dtype_of<T>);
    sums.table.add_(at::bmm_out(share, weighted.mT(), features));
  }
}

// adds epsilon times the plain sums [heads, dim + 1] to a table [heads, dim + 1, features]; zero beyond the real
// features
inline Tensor finish_table(const Layer& layer, Tensor table, const Tensor& plain) {
  table.add_(plain.unsqueeze(-1), layer.epsilon);
  table.narrow(-1, layer.real_features, layer.features - layer.real_features).zero_();
  return table;
}

struct Table {
  Tensor table, mean;  // of phi_k [v - mean, 1], [heads, dim + 1, features]; [heads, dim]
  float shift;         // the stabiliser it stands under
};

inline Table finish(const Layer& layer, std::vector<KeySums>& parts) {
  float shift = -std::numeric_limits<float>::infinity();
  for (const auto& part : parts) shift = std::max(shift, part.shift);
  if (!std::isfinite(shift)) shift = 0;
  Tensor table = at::zeros_like(parts[0].table), plain = at::zeros_like(parts[0].plain);
  for (auto& part : parts) plain.add_(part.plain);
  const Tensor mean = mean_values(plain).contiguous();
  for (auto& part : parts) {
    part.raise(shift);
    part.recentre(mean);
    table.add_(part.table);
  }
  // the sum of v less its mean is zero
  plain.narrow(1, 0, layer.dim).zero_();
  return {finish_table(layer, table, plain), mean, shift};
}

// what the query pass reads of a table: numerators [heads, features, dim] as T, the rest float32
struct Context {
  Tensor numerators, normalisers, sums;  // [heads, features], [heads, dim + 1]
  Tensor mean, o_b;                      // [inner]; bias of the output projection, with what it makes of the mean

  Context(const Layer& layer, const Tensor& table, const Tensor& mean, at::ScalarType dtype)
      : numerators(table.narrow(1, 0, layer.dim).mT().to(dtype).contiguous()),
        normalisers(table.select(1, layer.dim).contiguous()),
        sums(table.sum(-1).mul_(layer.epsilon)),
        mean(mean.flatten()),
        o_b(layer.o_b + at::mv(layer.o.to(at::kFloat), this->mean)) {}
};

// attention's output of a chunk less the mean value, [rows, inner]; its features, normalisers and |q'|^2 / 2 stay in
// the buffers
template <typename T>
Tensor attend(const Layer& layer, Buffers& buffers, const Tensor& normed, const Context& context) {
  const int64_t rows = normed.size(0), head_rows = layer.heads * rows;
  Tensor logs = head_logarithms<T>(layer, buffers, project<T>(buffers, normed, layer.q));
  Tensor features = features_buffer<T>(layer, buffers, logs);
  float* maxima = data<float>(buffers.get(MAXIMA, {head_rows}, at::kFloat));
  float* dots = data<float>(buffers.get(DOTS, {head_rows}, at::kFloat));
  for (int64_t head = 0; head < layer.heads; ++head) {
    const int64_t at = head * rows;
    exponentials(data<float>(logs) + at * layer.features, rows, layer.features, data<T>(features) + at * layer.features,
                 maxima + at, data<float>(context.normalisers) + head * layer.features, dots + at);
  }
  Tensor numerators = buffers.get(JOINED, {layer.heads, rows, layer.dim}, dtype_of<T>);
  at::bmm_out(numerators, features.view({layer.heads, rows, layer.features}), context.numerators);
  Tensor attended = buffers.get(ATTENDED, {rows, layer.inner}, dtype_of<T>);
  divide(data<T>(numerators), rows, layer.heads, layer.dim, data<float>(buffers.get(HALF, {head_rows}, at::kFloat)),
         data<float>(context.sums), dots, data<T>(attended));
  return attended;
}

// the chunk after the attention's branch, into `residual`
template <typename T>
void add_attention(const Layer& layer, Buffers& buffers, const Tensor& x, const Tensor& attended,
                   const Context& context, Tensor& residual) {
  Tensor branch = buffers.get(BRANCH, x.sizes(), dtype_of<T>);
  at::mm_out(branch, attended, layer.o.t());
  add_branch(data<float>(x), data<T>(branch), data<float>(context.o_b), x.size(0), layer.hidden, data<float>(residual));
}

// the feed-forward network up to its activation: its norm in `FFN_NORMED`, its inner values in `UP`, and what GELU
// makes of them
template <typename T>
Tensor feed_forward_inner(const Layer& layer, Buffers& buffers, const Tensor& residual) {
  const int64_t rows = residual.size(0);
  Tensor normed = buffers.get(FFN_NORMED, residual.sizes(), dtype_of<T>);
  layer_norm(data<float>(residual), rows, layer.hidden, data<float>(layer.ffn_norm_w), data<float>(layer.ffn_norm_b),
             layer.norm_eps, data<T>(normed));
  Tensor up = buffers.get(UP, {rows, layer.up.size(0)}, dtype_of<T>),
         active = buffers.get(GELU, up.sizes(), dtype_of<T>);
  at::addmm_out(up, layer.up_b, normed, layer.up.t());
  return at::gelu_out(active, up);
}

template <typename T>
void query_chunk(const Layer& layer, Buffers& buffers, const Tensor& x, const Context& context, Tensor residual,
                 float* output) {
  Tensor attended = attend<T>(layer, buffers, normed_chunk<T>(layer, buffers, x), context);
  add_attention<T>(layer, buffers, x, attended, context, residual);
  Tensor active = feed_forward_inner<T>(layer, buffers, residual), branch = buffers.get(BRANCH, x.sizes(), dtype_of<T>);
  at::mm_out(branch, active, layer.down.t());
  add_branch(data<float>(residual), data<T>(branch), data<float>(layer.down_b), x.size(0), layer.hidden, output);
}

// Cells are spread over the threads where there are enough of them, chunks of one cell where not. `function` gets the
// thread it runs on; it is zero where the loop over chunks inside is the one that is spread.
template <typename Function>
void for_each_cell(int64_t cells, int64_t chunks_per_cell, Function function) {
  if (cells < at::get_num_threads() || chunks_per_cell >= 8) {
    for (int64_t cell = 0; cell < cells; ++cell) function(cell, 0);
  } else {
    at::parallel_for(0, cells, 1, [&](int64_t begin, int64_t end) {
      const BelowAutograd guard;
      const int thread = at::get_thread_num();
      for (int64_t cell = begin; cell < end; ++cell) function(cell, thread);
    });
  }
}

template <typename Function>
void for_each_chunk(int64_t length, int64_t chunk_size, int outer_thread, Function function) {
  const Chunks chunks = chunks_of(length, chunk_size);
  at::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    const BelowAutograd guard;
    const int thread = outer_thread + at::get_thread_num();
    for (int64_t i = begin; i < end; ++i) function(chunks.start(i), chunks.start(i + 1), thread);
  });
}

// positions up to the last one kept
inline int64_t used_length(const bool* keep, int64_t length) {
  while (length > 0 && !keep[length - 1]) --length;
  return length;
}

// output at the queries, [cells, queries, hidden]; for the backward, tables, stabilisers and mean values of the keys,
// and the residual stream between the branches
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Layer& layer, const Tensor& queries,
                                                           const Tensor& hidden, const Tensor& keep, int64_t chunk_size,
                                                           bool for_backward) {
  const int64_t cells = hidden.size(0), length = hidden.size(1);
  Tensor output = at::empty_like(queries), maxima = at::empty({cells}, at::kFloat);
  Tensor tables = at::empty({cells, layer.heads, layer.dim + 1, layer.features}, at::kFloat);
  Tensor means = at::empty({cells, layer.heads, layer.dim}, at::kFloat);
  Tensor residuals = for_backward ? at::empty_like(queries) : at::empty({0}, at::kFloat);
  std::vector<Buffers> buffers(at::get_num_threads());
  for_each_cell(cells, length / chunk_size, [&](int64_t cell, int outer) {
    Tensor keys = hidden[cell], rows = queries[cell];
    const bool* kept = keep.defined() ? data<bool>(keep) + cell * length : nullptr;
    std::vector<KeySums> sums;
    for (int i = 0; i < free_threads(); ++i) sums.emplace_back(layer);
    for_each_chunk(kept ? used_length(kept, length) : length, chunk_size, outer,
                   [&](int64_t start, int64_t stop, int thread) {
                     add_keys<T>(layer, buffers[thread], keys.slice(0, start, stop), kept ? kept + start : nullptr,
                                 sums[thread - outer]);
                   });
    const Table table = finish(layer, sums);
    tables[cell].copy_(table.table);
    means[cell].copy_(table.mean);
    data<float>(maxima)[cell] = table.shift;
    const Context context(layer, table.table, table.mean, dtype_of<T>);
    float* out = data<float>(output[cell]);
    for_each_chunk(rows.size(0), chunk_size, outer, [&](int64_t start, int64_t stop, int thread) {
      Tensor x = rows.slice(0, start, stop);
      Tensor residual =
          for_backward ? residuals[cell].slice(0, start, stop) : buffers[thread].get(RESIDUAL, x.sizes(), at::kFloat);
      query_chunk<T>(layer, buffers[thread], x, context, residual, out + start * layer.hidden);
    });
  });
  return {output, tables, maxima, means, residuals};
}

}  // namespace scbert_cpu
