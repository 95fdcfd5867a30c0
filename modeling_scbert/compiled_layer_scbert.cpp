// A FAVOR+ block in chunks of positions on a CPU: the operators `layer_forward` and `layer_backward` that
// compiled_layer_scbert.py builds and calls. For the backward, the forward keeps the block's input, the table of the
// keys and the residual stream between the branches; everything else is computed again, chunk by chunk, as
// chunked_layer_scbert.py does.

#include "compiled_layer_scbert.h"

#include <torch/library.h>

namespace {

using namespace scbert_cpu;

// gradients of a block's weights, in float32; those that products give transposed are held so
struct Gradients {
  Tensor norm_w, norm_b, q, kv, o, o_b, ffn_norm_w, ffn_norm_b, up, up_b, down, down_b;

  explicit Gradients(const Layer& layer) {
    const int64_t hidden = layer.hidden, inner = layer.inner, intermediate = layer.up.size(0);
    for (Tensor* vector : {&norm_w, &norm_b, &o_b, &ffn_norm_w, &ffn_norm_b, &down_b})
      *vector = at::zeros({hidden}, at::kFloat);
    q = at::zeros({hidden, inner}, at::kFloat);
    kv = at::zeros({hidden, 2 * inner}, at::kFloat);
    o = at::zeros({hidden, inner}, at::kFloat);
    up = at::zeros({hidden, intermediate}, at::kFloat);
    up_b = at::zeros({intermediate}, at::kFloat);
    down = at::zeros({hidden, intermediate}, at::kFloat);
  }

  std::vector<Tensor*> all() {
    return {&norm_w, &norm_b, &q, &kv, &o, &o_b, &ffn_norm_w, &ffn_norm_b, &up, &up_b, &down, &down_b};
  }

  // in the order and shapes of the weights
  std::vector<Tensor> as_weights() {
    const auto key_value = kv.t().chunk(2);
    return {norm_w,     norm_b,     q.t(),  key_value[0], key_value[1], o,     o_b,
            ffn_norm_w, ffn_norm_b, up.t(), up_b,         down,         down_b};
  }
};

// what one thread adds up over its chunks; gradients of weights only where they are wanted
struct Worker {
  Buffers buffers;
  std::unique_ptr<Gradients> weights;
  Tensor table, plain;  // gradient of the table, and of its epsilon term: [heads, dim + 1, features], [heads, dim + 1]

  float* grad(Tensor Gradients::* name) { return weights ? data<float>(weights.get()->*name) : nullptr; }

  template <typename T>
  void add_product(Tensor Gradients::* name, const Tensor& left, const Tensor& right) {
    if (weights) add(weights.get()->*name, left, right, dtype_of<T>);
  }

  // total += left right, in float32 whatever the product is rounded to
  void add(Tensor& total, const Tensor& left, const Tensor& right, at::ScalarType dtype) {
    const bool batched = left.dim() == 3;
    if (dtype == at::kFloat) {
      batched ? total.baddbmm_(left, right) : total.addmm_(left, right);
    } else {
      Tensor share = buffers.get(SHARE, total.sizes(), dtype);
      total.add_(batched ? at::bmm_out(share, left, right) : at::mm_out(share, left, right));
    }
  }
};

template <typename T>
Tensor as_operand(Buffers& buffers, Slot slot, const Tensor& x) {
  return std::is_same_v<T, float> ? x : buffers.get(slot, x.sizes(), dtype_of<T>).copy_(x);
}

// what the backward reads of a table [heads, dim + 1, features] or of its gradient
struct Operand {
  Tensor whole, values;  // [heads, dim + 1, features] and [heads, features, dim], as T
  Tensor sums;           // epsilon * sum over features, [heads, dim]

  Operand(const Layer& layer, const Tensor& table, at::ScalarType dtype)
      : whole(table.to(dtype).contiguous()),
        values(table.narrow(1, 0, layer.dim).mT().to(dtype).contiguous()),
        sums(table.narrow(1, 0, layer.dim).sum(-1).mul_(layer.epsilon)) {}
};

// from `weighted` [heads, rows, dim + 1] times `table`, the gradient of the features, to that of the queries or keys
// they are features of: the first columns of `out`
template <typename T>
void input_gradient(const Layer& layer, Buffers& buffers, const Tensor& weighted, const Tensor& table,
                    const Tensor& features, Tensor& out) {
  const int64_t rows = weighted.size(1), head_rows = layer.heads * rows;
  Tensor grad = buffers.get(FEATURE_GRAD, {layer.heads, rows, layer.features}, dtype_of<T>);
  at::bmm_out(grad, weighted, table);
  float* sums = data<float>(buffers.get(DOTS, {head_rows}, at::kFloat));
  multiply_features(data<T>(grad), data<T>(features), head_rows, layer.features, sums);
  Tensor heads_grad = buffers.get(HEADS_GRAD, {head_rows, layer.dim}, dtype_of<T>);
  at::mm_out(heads_grad, grad.view({head_rows, layer.features}), layer.gradient_matrix);
  const float* heads = data<float>(buffers.get(HEADS, {head_rows, layer.dim}, at::kFloat));
  merge_input_gradient(data<T>(heads_grad), heads, sums, rows, layer.heads, layer.dim, out.size(1), data<T>(out));
}

// adds what a chunk owes through the first norm to the gradient of its input
template <typename T>
void norm_backward(const Layer& layer, Worker& worker, const Tensor& normed_grad, const Tensor& x, Tensor& grad) {
  layer_norm_backward(data<T>(normed_grad), data<float>(x), x.size(0), layer.hidden, data<float>(layer.norm_w),
                      layer.norm_eps, worker.grad(&Gradients::norm_w), worker.grad(&Gradients::norm_b),
                      data<float>(grad));
}

// backward of the feed-forward branch: `grad` of the block's output becomes that of the residual stream before it
template <typename T>
void feed_forward_backward(const Layer& layer, Worker& worker, const Tensor& residual, Tensor& grad) {
  Buffers& buffers = worker.buffers;
  const int64_t rows = residual.size(0), hidden = layer.hidden;
  Tensor active = feed_forward_inner<T>(layer, buffers, residual);
  Tensor up = buffers.get(UP, active.sizes(), dtype_of<T>),
         normed = buffers.get(FFN_NORMED, residual.sizes(), dtype_of<T>);
  Tensor output_grad = as_operand<T>(buffers, OUTPUT_GRAD, grad);
  worker.add_product<T>(&Gradients::down, output_grad.t(), active);
  if (worker.weights) add_column_sums(data<float>(grad), rows, hidden, worker.grad(&Gradients::down_b));
  Tensor active_grad = at::mm_out(active, output_grad, layer.down);
  Tensor up_grad = at::gelu_backward_out(active_grad, active_grad, up);
  worker.add_product<T>(&Gradients::up, normed.t(), up_grad);
  if (worker.weights) add_column_sums(data<T>(up_grad), rows, up.size(1), worker.grad(&Gradients::up_b));
  Tensor normed_grad = buffers.get(BRANCH, residual.sizes(), dtype_of<T>);
  at::mm_out(normed_grad, up_grad, layer.up);
  layer_norm_backward(data<T>(normed_grad), data<float>(residual), rows, hidden, data<float>(layer.ffn_norm_w),
                      layer.norm_eps, worker.grad(&Gradients::ffn_norm_w), worker.grad(&Gradients::ffn_norm_b),
                      data<float>(grad));
}

// all that depends on a chunk's queries: `grad` of the output becomes that of the queries; the table's gradient grows
template <typename T>
void query_backward(const Layer& layer, Worker& worker, const Tensor& x, const Tensor& residual, const Context& context,
                    const Operand& table, Tensor grad) {
  Buffers& buffers = worker.buffers;
  const int64_t rows = x.size(0), head_rows = layer.heads * rows;
  Tensor normed = normed_chunk<T>(layer, buffers, x);
  Tensor attended = attend<T>(layer, buffers, normed, context);
  feed_forward_backward<T>(layer, worker, residual, grad);

  Tensor branch_grad = as_operand<T>(buffers, OUTPUT_GRAD, grad);
  worker.add_product<T>(&Gradients::o, branch_grad.t(), attended);
  if (worker.weights) {
    const Tensor sums = grad.sum(0);
    worker.weights->o_b.add_(sums);
    worker.weights->o.addr_(sums, context.mean);
  }
  Tensor attended_grad = buffers.get(WIDE, {rows, layer.inner}, dtype_of<T>);
  at::mm_out(attended_grad, branch_grad, layer.o);

  Tensor joined = buffers.get(JOINED, {layer.heads, rows, layer.dim + 1}, dtype_of<T>);
  const float* half = data<float>(buffers.get(HALF, {head_rows}, at::kFloat));
  const float* normalisers = data<float>(buffers.get(DOTS, {head_rows}, at::kFloat));
  divide_backward(data<T>(attended_grad), data<T>(attended), rows, layer.heads, layer.dim, half, normalisers,
                  data<T>(joined), data<float>(worker.plain));
  Tensor features =
      features_buffer<T>(layer, buffers, buffers.get(LOGS, {layer.heads, rows, layer.features}, at::kFloat));
  worker.add(worker.table, joined.mT(), features, dtype_of<T>);

  Tensor query_grad = buffers.get(PROJECTED_GRAD, {rows, layer.inner}, dtype_of<T>);
  input_gradient<T>(layer, buffers, joined, table.whole, features, query_grad);
  worker.add_product<T>(&Gradients::q, normed.t(), query_grad);
  Tensor normed_grad = buffers.get(BRANCH, x.sizes(), dtype_of<T>);
  at::mm_out(normed_grad, query_grad, layer.q);
  norm_backward<T>(layer, worker, normed_grad, x, grad);
}

// all that depends on a chunk's keys and values, added to the gradient of the block's input
template <typename T>
void key_backward(const Layer& layer, Worker& worker, const Tensor& x, const bool* keep, float shift, const float* mean,
                  const Operand& table, Tensor grad) {
  Buffers& buffers = worker.buffers;
  const int64_t rows = x.size(0), head_rows = layer.heads * rows;
  Tensor normed = normed_chunk<T>(layer, buffers, x);
  Tensor projected = project_keys<T>(layer, buffers, normed, keep);
  Tensor features = key_features<T>(layer, buffers, projected, keep, shift);
  const float* factor = data<float>(buffers.get(FACTOR, {head_rows}, at::kFloat));

  Tensor projected_grad = buffers.get(PROJECTED_GRAD, {rows, 2 * layer.inner}, dtype_of<T>);
  Tensor heads_grad = buffers.get(HEADS_GRAD, {layer.heads, rows, layer.dim}, dtype_of<T>);
  at::bmm_out(heads_grad, features, table.values);
  merge_value_gradient(data<T>(heads_grad), factor, data<float>(table.sums), keep, rows, layer.heads, layer.dim,
                       2 * layer.inner, data<T>(projected_grad) + layer.inner);
  Tensor weighted = buffers.get(JOINED, {layer.heads, rows, layer.dim + 1}, dtype_of<T>);
  weigh_values(data<T>(projected) + layer.inner, 2 * layer.inner, rows, layer.heads, layer.dim, factor, mean,
               data<T>(weighted));
  input_gradient<T>(layer, buffers, weighted, table.whole, features, projected_grad);

  worker.add_product<T>(&Gradients::kv, normed.t(), projected_grad);
  Tensor normed_grad = buffers.get(BRANCH, x.sizes(), dtype_of<T>);
  at::mm_out(normed_grad, projected_grad, layer.kv);
  norm_backward<T>(layer, worker, normed_grad, x, grad);
}

// what the forward keeps, of all cells
struct Saved {
  Tensor tables, maxima, means, residuals;
};

// `query_grad` of a cell's output becomes that of its queries; what keys and values owe is added to `grad`
template <typename T>
void cell_backward(const Layer& layer, std::vector<Worker>& workers, int outer, const Tensor& queries,
                   const Tensor& keys, const bool* keep, const Saved& saved, int64_t cell, int64_t chunk_size,
                   Tensor query_grad, Tensor grad) {
  const Tensor table = saved.tables[cell], mean = saved.means[cell], residuals = saved.residuals[cell];
  const float shift = data<float>(saved.maxima)[cell];
  const int last = outer + free_threads();
  for (int i = outer; i < last; ++i)
    workers[i].table = at::zeros_like(table), workers[i].plain = at::zeros({layer.heads, layer.dim + 1}, at::kFloat);
  const Context context(layer, table, mean, dtype_of<T>);
  const Operand operand(layer, table, dtype_of<T>);
  for_each_chunk(queries.size(0), chunk_size, outer, [&](int64_t start, int64_t stop, int thread) {
    query_backward<T>(layer, workers[thread], queries.slice(0, start, stop), residuals.slice(0, start, stop), context,
                      operand, query_grad.slice(0, start, stop));
  });
  Tensor table_grad = workers[outer].table, plain = workers[outer].plain;
  for (int i = outer + 1; i < last; ++i) table_grad.add_(workers[i].table), plain.add_(workers[i].plain);
  const Operand gradient(layer, finish_table(layer, table_grad, plain), dtype_of<T>);
  const int64_t length = keep ? used_length(keep, keys.size(0)) : keys.size(0);
  for_each_chunk(length, chunk_size, outer, [&](int64_t start, int64_t stop, int thread) {
    key_backward<T>(layer, workers[thread], keys.slice(0, start, stop), keep ? keep + start : nullptr, shift,
                    data<float>(mean), gradient, grad.slice(0, start, stop));
  });
}

// gradients of queries and of the block's input (one tensor where they are the same), then of the weights if wanted
template <typename T>
std::vector<Tensor> backward(const Layer& layer, const Tensor& output_grad, const Tensor& queries, const Tensor& hidden,
                             const Tensor& keep, const Saved& saved, int64_t chunk_size, bool weight_grads) {
  const int64_t cells = hidden.size(0), length = hidden.size(1);
  std::vector<Worker> workers(at::get_num_threads());
  if (weight_grads)
    for (auto& worker : workers) worker.weights = std::make_unique<Gradients>(layer);
  Tensor query_grad = output_grad.clone(at::MemoryFormat::Contiguous);
  Tensor grad = queries.is_same(hidden) ? query_grad : at::zeros_like(hidden);
  for_each_cell(cells, length / chunk_size, [&](int64_t cell, int outer) {
    const bool* kept = keep.defined() ? data<bool>(keep) + cell * length : nullptr;
    cell_backward<T>(layer, workers, outer, queries[cell], hidden[cell], kept, saved, cell, chunk_size,
                     query_grad[cell], grad[cell]);
  });
  std::vector<Tensor> found{query_grad, grad};
  if (!weight_grads) return found;
  const auto totals = workers[0].weights->all();
  for (size_t i = 1; i < workers.size(); ++i) {
    const auto shares = workers[i].weights->all();
    for (size_t j = 0; j < totals.size(); ++j) totals[j]->add_(*shares[j]);
  }
  for (auto& total : workers[0].weights->as_weights()) found.push_back(total);
  return found;
}

// ---- operators --------------------------------------------------------------------------------------------------

void check(const Layer& layer, const Tensor& x, const Tensor& queries, const Tensor& keep) {
  for (const Tensor& rows : {x, queries}) {
    TORCH_CHECK(rows.device().is_cpu() && rows.scalar_type() == at::kFloat, "float32 on the CPU is needed");
    TORCH_CHECK(rows.dim() == 3 && rows.size(0) == x.size(0) && rows.size(2) == layer.hidden, "needed [", x.size(0),
                ", length, ", layer.hidden, "], got ", rows.sizes());
  }
  if (!keep.defined()) return;
  TORCH_CHECK(keep.scalar_type() == at::kBool && keep.sizes() == x.sizes().slice(0, 2), "needed a mask ",
              x.sizes().slice(0, 2), " of bool, got ", keep.sizes());
}

Tensor contiguous_or_none(const std::optional<Tensor>& x) { return x ? x->contiguous() : Tensor(); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_forward(
    const std::optional<Tensor>& queries, const Tensor& hidden, const std::optional<Tensor>& keep,
    at::TensorList weights, bool for_backward, const Tensor& projection, int64_t heads, double epsilon, double norm_eps,
    int64_t chunk_size, bool in_bfloat16) {
  const BelowAutograd guard;
  const Layer layer =
      make_layer(weights, projection, heads, epsilon, norm_eps, in_bfloat16 ? at::kBFloat16 : at::kFloat);
  const Tensor x = hidden.contiguous(), rows = queries ? queries->contiguous() : x, used = contiguous_or_none(keep);
  check(layer, x, rows, used);
  return in_bfloat16 ? forward<bfloat16>(layer, rows, x, used, chunk_size, for_backward)
                     : forward<float>(layer, rows, x, used, chunk_size, for_backward);
}

std::vector<Tensor> layer_backward(const Tensor& grad, const std::optional<Tensor>& queries, const Tensor& hidden,
                                   const std::optional<Tensor>& keep, at::TensorList weights, at::TensorList saved,
                                   bool weight_grads, const Tensor& projection, int64_t heads, double epsilon,
                                   double norm_eps, int64_t chunk_size, bool in_bfloat16) {
  const BelowAutograd guard;
  const Layer layer =
      make_layer(weights, projection, heads, epsilon, norm_eps, in_bfloat16 ? at::kBFloat16 : at::kFloat);
  const Tensor x = hidden.contiguous(), rows = queries ? queries->contiguous() : x, used = contiguous_or_none(keep);
  check(layer, x, rows, used);
  const Saved state{saved[0], saved[1], saved[2], saved[3]};
  return in_bfloat16 ? backward<bfloat16>(layer, grad, rows, x, used, state, chunk_size, weight_grads)
                     : backward<float>(layer, grad, rows, x, used, state, chunk_size, weight_grads);
}

}  // namespace

// TORCH_LIBRARY of older torch takes its argument as it is written
#define LIBRARY_NAMED(name, m) TORCH_LIBRARY(name, m)

LIBRARY_NAMED(TORCH_EXTENSION_NAME, m) {
  m.def(
      "layer_forward(Tensor? queries, Tensor hidden, Tensor? keep, Tensor[] weights, bool for_backward, "
      "Tensor projection, int heads, float epsilon, float norm_eps, int chunk_size, bool in_bfloat16) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      &layer_forward);
  m.def(
      "layer_backward(Tensor grad, Tensor? queries, Tensor hidden, Tensor? keep, Tensor[] weights, Tensor[] saved, "
      "bool weight_grads, Tensor projection, int heads, float epsilon, float norm_eps, int chunk_size, bool "
      "in_bfloat16) "
      "-> Tensor[]",
      &layer_backward);
}
