// Trains a small pre-norm network in C++ on a function that it can learn, with fused_rmsnorm::rms_norm
// in place of a module. Succeeds if the loss falls to a tenth and the gradients are those of the
// composed definition.
#include <fused_rmsnorm/fused_rmsnorm.h>
#include <torch/torch.h>

#include <cstdio>

namespace {

struct RMSNormImpl : torch::nn::Module {
  torch::Tensor weight;
  fused_rmsnorm::Options options;

  explicit RMSNormImpl(int64_t n, fused_rmsnorm::Options o = {}) : options(o) {
    weight = register_parameter("weight", torch::ones(n));
  }
  torch::Tensor forward(const torch::Tensor& x) { return fused_rmsnorm::rms_norm(x, weight, {}, options); }
};
TORCH_MODULE(RMSNorm);

struct NetImpl : torch::nn::Module {
  torch::nn::Linear in{8, 64}, hidden{64, 64}, out{64, 1};
  RMSNorm first{64}, last{64, fused_rmsnorm::Options{.p = 0.25}};

  NetImpl() {
    register_module("in", in);
    register_module("hidden", hidden);
    register_module("out", out);
    register_module("first", first);
    register_module("last", last);
  }
  torch::Tensor forward(const torch::Tensor& x) {
    torch::Tensor h = in(x);
    h = h + torch::silu(hidden(first(h)));
    return out(last(h));
  }
};
TORCH_MODULE(Net);

bool gradients_agree() {
  const auto x = torch::randn({5, 33}, torch::dtype(torch::kFloat64).requires_grad(true));
  const auto w = torch::randn({33}, torch::dtype(torch::kFloat64).requires_grad(true));
  const auto residual = torch::randn({5, 33}, torch::kFloat64);
  const auto [y, sum] = fused_rmsnorm::add_rms_norm(x, residual, w, {}, {.eps = 1e-6});
  const auto s = x + residual;
  const auto want = s * torch::rsqrt(s.square().mean(-1, true) + 1e-6) * w;
  const auto g = torch::randn_like(y);
  const auto got_grads = torch::autograd::grad({y, sum}, {x, w}, {g, g});
  const auto want_grads = torch::autograd::grad({want, s}, {x, w}, {g, g});
  return torch::allclose(y, want) && torch::allclose(got_grads[0], want_grads[0]) &&
         torch::allclose(got_grads[1], want_grads[1]);
}

}  // namespace

int main() {
  torch::manual_seed(0);
  Net net;
  torch::optim::AdamW optimizer(net->parameters(), torch::optim::AdamWOptions(3e-3));
  const auto x = torch::randn({512, 8});
  const auto target = (x.slice(1, 0, 4) * x.slice(1, 4, 8)).sum(1, true);
  double first = 0, last = 0;
  for (int step = 0; step < 300; ++step) {
    optimizer.zero_grad();
    auto loss = torch::mse_loss(net(x), target);
    loss.backward();
    optimizer.step();
    (step ? last : first) = loss.item<double>();
  }
  const bool agree = gradients_agree();
  std::printf("loss %.4f -> %.4f; gradients %s\n", first, last, agree ? "agree" : "DIFFER");
  return last < 0.1 * first && agree ? 0 : 1;
}
