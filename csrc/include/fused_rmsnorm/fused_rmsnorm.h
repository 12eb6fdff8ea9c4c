// fused_rmsnorm for C++, over LibTorch. Link the CMake target fused_rmsnorm::fused_rmsnorm.
//
//   r = 1 / sqrt(mean(x[j]^2 for j < k) + eps)      k = N; with p the smallest k with k / N >= p
//   y = x * r * (weight_offset + weight) + bias
//
// over the last dimension of N elements. The functions are differentiable (to any order, forward
// and backward mode), run on CPU and CUDA, and raise c10::Error subclasses for bad arguments.
//
// weight and bias: [N], or more dimensions that broadcast to input's, such as [heads, N]; or absent.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fused_rmsnorm {

struct Options {
  std::optional<double> eps;  // nullopt: epsilon of the arithmetic type, as torch.nn.RMSNorm
  std::optional<double> p;    // pRMSNorm: fraction in (0, 1]; nullopt: the statistic reads the whole row
  double weight_offset = 0;   // 1 for the Gemma family; needs a weight
  bool llama = false;         // round x * r to x's dtype before the weight is multiplied
};

// y = norm(input) * act(gate), or norm(input * act(gate)); act(z) = z * sigmoid(z), or sigmoid(z).
struct GatedOptions : Options {
  bool sigmoid = false;  // the activation is sigmoid, not silu
  bool norm_before_gate = true;
};

// input [*, N]. Returns [*, N] in input's dtype.
C10_EXPORT at::Tensor rms_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight = {},
                               const std::optional<at::Tensor>& bias = {}, const Options& options = {});

// sum = input + residual, both [*, N], in the dtype of residual, which is input's or a wider one;
// returns (rms_norm(sum) in the dtype that rms_norm(input) has, sum).
C10_EXPORT std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& input,
                                                           const at::Tensor& residual,
                                                           const std::optional<at::Tensor>& weight = {},
                                                           const std::optional<at::Tensor>& bias = {},
                                                           const Options& options = {});

// input and gate [*, N]. Returns [*, N] in input's dtype (gate first and llama: that of rms_norm).
C10_EXPORT at::Tensor rms_norm_gated(const at::Tensor& input, const at::Tensor& gate,
                                     const std::optional<at::Tensor>& weight = {},
                                     const std::optional<at::Tensor>& bias = {},
                                     const GatedOptions& options = {});

}  // namespace fused_rmsnorm
