// The numbers of exp(-z) / 2, from which both backends make the activations of gates (on CUDA of fp32 alone:
// gate.cuh), each with its own operations in the same order: fused multiply-adds give the same bits on every
// path.
//
// Half of exp(-z), so that no z is large enough for it to overflow while sigmoid(z) is a number:
//   sigmoid(z) = 0.5 / (0.5 + exp(-z) / 2)
// It is 2^n exp(-r) / 2 with n = round(-z / ln 2), r = z + n ln 2, of which n times the first part of ln 2 is
// exact, and 2^n made of exponent bits. exp(-r) is 1 - r + r^2 q(r):
//
//   z = z limited to kLeast ... kMost        NaN stays NaN
//   t = fma(z, kMinusLog2E, kMagic)          has n - 1 + 127 in its last bits
//   n = t - kMagic
//   r = fma(n, kLn2Low, fma(n, kLn2High, z))
//   q = (((kQ4 r + kQ3) r + kQ2) r + kQ1) r + kQ0, each step fused
//   (1 - fma(-(r * r), q, r)) * (the number with the bits of t << 23)
//
// Within 0.991 units in the last place of every z from -89 to 86.64 (all tried), with fused multiply-adds
// or without. Further down it is infinite, further up 0 or nearly so, beside the 1/2 it is added to.
//
// Where |z| is at most kUsual, exp(-z) itself, sigmoid(z) and its slope are normal numbers, and so
//   sigmoid(z) = 1 / (1 + exp(-z))      with kMagic + 1 in kMagic's place
// has the same bits: every number on its way is twice the other's, or the same.
#pragma once

namespace fused_rmsnorm::half_exp {

constexpr float kLeast = -89.4f;  // n = 129: infinity's exponent
constexpr float kMost = 87.5f;    // n = -126: zero's
constexpr float kMagic = 0x1.8p23f + 126, kMinusLog2E = -0x1.715476p+0f;
constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
constexpr float kQ4 = 0x1.6a2714p-10f, kQ3 = -0x1.123c8p-7f, kQ2 = 0x1.5557cep-5f, kQ1 = -0x1.55548ep-3f,
                kQ0 = 0.5f;

constexpr float kUsual = 86.0f;
constexpr float kMostFactor = 0x1p126f;  // of a slope: beyond it, sigmoid(z) is 0 or as good as 0

}  // namespace fused_rmsnorm::half_exp
