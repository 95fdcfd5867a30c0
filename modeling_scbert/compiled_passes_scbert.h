// Element-wise passes of a FAVOR+ block on a CPU, each fused from several of torch's operators. T is what matrix
// products read and write, float or bfloat16; everything is computed in float. Logarithms are to base 2.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace scbert_cpu {

// bfloat16 as its bits: what compiles to vector instructions; rounded to nearest even, without a case for NaN
using bfloat16 = uint16_t;

inline float wide(float x) { return x; }
inline float wide(bfloat16 bits) {
  const uint32_t shifted = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &shifted, 4);
  return x;
}
inline void put(float& to, float x) { to = x; }
inline void put(bfloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <typename T>
constexpr at::ScalarType dtype_of = std::is_same_v<T, float> ? at::kFloat : at::kBFloat16;
template <typename T>
T* data(const at::Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// 2^x for x <= 0; below 2^-120 it stays there, which no sum of features notices
inline float exp2_below_one(float x) {
  x = x < -120.f ? -120.f : x;
  const float shifted = x + 12582912.f;  // 1.5 * 2^23: the integer nearest to x is now in the low bits
  const float f = x - (shifted - 12582912.f);
  // minimax polynomial of 2^f, |f| <= 1/2: relative error 7.5e-8
  float p = 1.327647196e-3f;
  p = p * f + 9.675541503e-3f;
  p = p * f + 5.550713275e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  p = p * f + 1.000000072f;
  int32_t exponent, bits;
  std::memcpy(&exponent, &shifted, 4);
  std::memcpy(&bits, &p, 4);
  bits += exponent << 23;
  std::memcpy(&p, &bits, 4);
  return p;
}

template <typename T>
void layer_norm(const float* x, int64_t rows, int64_t width, const float* weight, const float* bias, float eps,
                T* out) {
  for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += x[i];
    const float mean = sum / width;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float rstd = 1.f / std::sqrt(square / width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) put(out[i], (x[i] - mean) * rstd * weight[i] + bias[i]);
  }
}

// [rows, heads * dim], rows `stride` apart, to [heads, rows, dim], and |x'|^2 / 2 of every (head, row)
template <typename T>
void split_heads(const T* x, int64_t stride, int64_t rows, int64_t heads, int64_t dim, float* out, float* half) {
  const float scale = 0.5f * static_cast<float>(M_LOG2E) / std::sqrt(static_cast<float>(dim));
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t row = 0; row < rows; ++row, out += dim) {
      const T* in = x + row * stride + head * dim;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < dim; ++i) {
        out[i] = wide(in[i]);
        sum += out[i] * out[i];
      }
      *half++ = sum * scale;
    }
}

template <typename T>
void clear_rows(T* x, int64_t rows, int64_t width, const bool* keep) {
  for (int64_t row = 0; row < rows; ++row, x += width)
    if (!keep[row]) std::memset(x, 0, width * sizeof(T));
}

// exp2(logs - maximum of the row), the maxima, and each row's product with `other` if there is one; in place for float
template <typename T>
void exponentials(const float* logs, int64_t rows, int64_t width, T* out, float* maxima, const float* other,
                  float* dots) {
  for (int64_t row = 0; row < rows; ++row, logs += width, out += width) {
    float largest = -std::numeric_limits<float>::infinity(), dot = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < width; ++i) largest = logs[i] > largest ? logs[i] : largest;
    maxima[row] = largest;
    if (other) {
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < width; ++i) {
        const float e = exp2_below_one(logs[i] - largest);
        put(out[i], e);
        dot += e * other[i];
      }
      dots[row] = dot;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) put(out[i], exp2_below_one(logs[i] - largest));
    }
  }
}

// per (head, row) of keys: what their exponentials must be multiplied by, zero where masked
inline void key_factors(const float* maxima, const float* half, const bool* keep, int64_t heads, int64_t rows,
                        float shift, float* out) {
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = head * rows + row;
      out[at] = keep && !keep[row] ? 0.f : exp2_below_one(maxima[at] - half[at] - shift);
    }
}

inline float kept_maximum(const float* maxima, const bool* keep, int64_t heads, int64_t rows) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t row = 0; row < rows; ++row)
      if (!keep || keep[row]) largest = std::max(largest, maxima[head * rows + row]);
  return largest;
}

// factor * [v - centre, 1] of a chunk: [rows, heads * dim], rows `stride` apart, to [heads, rows, dim + 1]
template <typename T>
void weigh_values(const T* value, int64_t stride, int64_t rows, int64_t heads, int64_t dim, const float* factor,
                  const float* centre, T* out) {
  for (int64_t head = 0; head < heads; ++head, centre += dim)
    for (int64_t row = 0; row < rows; ++row, out += dim + 1) {
      const T* in = value + row * stride + head * dim;
      const float scale = *factor++;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) put(out[i], (wide(in[i]) - centre[i]) * scale);
      put(out[dim], scale);
    }
}

// adds the sum of [v, 1] over the kept rows of [rows, heads * dim], `stride` apart, to [heads, dim + 1]
template <typename T>
void sum_values(const T* value, int64_t stride, int64_t rows, int64_t heads, int64_t dim, const bool* keep,
                float* out) {
  for (int64_t row = 0; row < rows; ++row, value += stride) {
    if (keep && !keep[row]) continue;
    for (int64_t head = 0; head < heads; ++head) {
      float* to = out + head * (dim + 1);
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) to[i] += wide(value[head * dim + i]);
      to[dim] += 1;
    }
  }
}

// numerators over normalisers, heads side by side: [rows, inner]; `dots` become the normalisers
template <typename T>
void divide(const T* numerators, int64_t rows, int64_t heads, int64_t dim, const float* half, const float* sums,
            float* dots, T* out) {
  for (int64_t head = 0; head < heads; ++head, sums += dim + 1)
    for (int64_t row = 0; row < rows; ++row, numerators += dim) {
      const int64_t at = head * rows + row;
      const float scale = exp2_below_one(-half[at]);
      float normaliser = dots[at] * scale + sums[dim];
      if (normaliser == 0) normaliser = 1;  // a cell without keys: its output is zero
      dots[at] = normaliser;
      const float inverse = 1.f / normaliser;
      T* to = out + (row * heads + head) * dim;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) put(to[i], (wide(numerators[i]) * scale + sums[i]) * inverse);
    }
}

// x + branch + bias
template <typename T>
void add_branch(const float* x, const T* branch, const float* bias, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += width, branch += width, out += width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] + (wide(branch[i]) + bias[i]);
  }
}

// ---- backward ---------------------------------------------------------------------------------------------------

// adds the gradient through a norm to `out`, and what it owes weight and bias to theirs where they are given
template <typename T>
void layer_norm_backward(const T* grad, const float* x, int64_t rows, int64_t width, const float* weight, float eps,
                         float* weight_grad, float* bias_grad, float* out) {
  for (int64_t row = 0; row < rows; ++row, grad += width, x += width, out += width) {
    float sum = 0, square = 0, grad_sum = 0, grad_dot = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += x[i];
    const float mean = sum / width;
#pragma omp simd reduction(+ : square, grad_sum, grad_dot)
    for (int64_t i = 0; i < width; ++i) {
      const float centred = x[i] - mean, scaled = wide(grad[i]) * weight[i];
      square += centred * centred;
      grad_sum += scaled;
      grad_dot += scaled * centred;
    }
    const float rstd = 1.f / std::sqrt(square / width + eps);
    const float shift = grad_sum / width, slope = grad_dot * rstd * rstd / width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] += (wide(grad[i]) * weight[i] - shift - (x[i] - mean) * slope) * rstd;
    if (!weight_grad) continue;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      weight_grad[i] += wide(grad[i]) * (x[i] - mean) * rstd;
      bias_grad[i] += wide(grad[i]);
    }
  }
}

template <typename T>
void add_column_sums(const T* x, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] += wide(x[i]);
  }
}

// gradient of [numerators, normaliser] from that of their quotient, both [rows, heads * dim]: times 2^-half to `out`,
// [heads, rows, dim + 1]; its sums over rows are added to `sums`, [heads, dim + 1]
template <typename T>
void divide_backward(const T* grad, const T* quotient, int64_t rows, int64_t heads, int64_t dim, const float* half,
                     const float* normalisers, T* out, float* sums) {
  for (int64_t head = 0; head < heads; ++head, sums += dim + 1)
    for (int64_t row = 0; row < rows; ++row, out += dim + 1) {
      const int64_t at = (row * heads + head) * dim;
      const float inverse = 1.f / normalisers[head * rows + row], scale = exp2_below_one(-half[head * rows + row]);
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < dim; ++i) {
        const float g = wide(grad[at + i]) * inverse;
        put(out[i], g * scale);
        sums[i] += g;
        dot -= g * wide(quotient[at + i]);
      }
      put(out[dim], dot * scale);
      sums[dim] += dot;
    }
}

// gradient of the features times the features, in place, and its sum over every row of [rows, width]
template <typename T>
void multiply_features(T* grad, const T* features, int64_t rows, int64_t width, float* sums) {
  for (int64_t row = 0; row < rows; ++row, grad += width, features += width) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
      const float product = wide(grad[i]) * wide(features[i]);
      put(grad[i], product);
      sum += product;
    }
    sums[row] = sum;
  }
}

// gradient of queries or keys, [heads, rows, dim] to [rows, heads * dim], `stride` apart: `grad` less row_sum * x /
// sqrt(dim)
template <typename T>
void merge_input_gradient(const T* grad, const float* x, const float* row_sums, int64_t rows, int64_t heads,
                          int64_t dim, int64_t stride, T* out) {
  const float scale = 1.f / std::sqrt(static_cast<float>(dim));
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t row = 0; row < rows; ++row, grad += dim, x += dim) {
      const float factor = *row_sums++ * scale;
      T* to = out + row * stride + head * dim;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) put(to[i], wide(grad[i]) - factor * x[i]);
    }
}

// gradient of values, [heads, rows, dim] to [rows, heads * dim], `stride` apart: factor * grad + sums, zero where
// masked
template <typename T>
void merge_value_gradient(const T* grad, const float* factor, const float* sums, const bool* keep, int64_t rows,
                          int64_t heads, int64_t dim, int64_t stride, T* out) {
  for (int64_t head = 0; head < heads; ++head, sums += dim)
    for (int64_t row = 0; row < rows; ++row, grad += dim) {
      const float scale = factor[head * rows + row], kept = !keep || keep[row];
      T* to = out + row * stride + head * dim;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) put(to[i], wide(grad[i]) * scale + sums[i] * kept);
    }
}

}  // namespace scbert_cpu
