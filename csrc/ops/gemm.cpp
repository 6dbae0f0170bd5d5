#include <torch/csrc/stable/ops.h>

#include "gemm/params.h"
#include "sample/params.h"
#include "ops/checks.h"

namespace specrt::ops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t pair_of(const Tensor& t) { return t.scalar_type() == kF32 ? 1 : 2; }

// The tensor-core kernels read 16 bytes at a time.
void check_chunks(Checker& check, const char* name, const Tensor& t, int64_t K) {
  const int64_t chunk = t.scalar_type() == kBF16 ? 8 : 16;
  check.require(K % chunk == 0, name, "K divisible by " + std::to_string(chunk) + " (CUDA reads 16 bytes at a time); K = " + std::to_string(K));
}

void pack_linear(Tensor weight, Tensor packed) {
  Checker check("pack_linear", weight);
  Sym N("N"), K("K");
  if (check.cuda()) {
    check("weight", weight, {N, K}, {kBF16, kE4M3});
    check_chunks(check, "weight", weight, K);
    const int64_t step = weight.scalar_type() == kBF16 ? 64 : 128;
    check("packed", packed, {ceil_div(N, kPanel), ceil_div(K, step), kPanel, step}, {weight.scalar_type()});
    check.aligned("weight", weight);
    check.aligned("packed", packed);
  } else {
    check("weight", weight, {N, K}, {kF32, kBF16, kE4M3});
    const int64_t g = pair_of(weight);
    check("packed", packed, {ceil_div(N, kPanel), ceil_div(K, g), kPanel, g}, {weight.scalar_type()});
  }
  if (N == 0 || K == 0) return;
  PackLinearParams p{dtype_of(weight), in<void>(weight), inout<void>(packed), static_cast<int>(N), static_cast<int>(K)};
  SPECRT_LAUNCH(pack_linear, check, p);
}

LinearParams product(int64_t R, int64_t N, int64_t K, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& num_rows) {
  LinearParams p{};
  p.dtype = p.out_dtype = dtype_of(x);
  p.x = in<void>(x);
  p.weight = in<void>(weight);
  p.bias = in<void>(bias);
  p.num_rows = in<int32_t>(num_rows);
  p.rows = static_cast<int>(R);
  p.out_features = static_cast<int>(N);
  p.in_features = static_cast<int>(K);
  return p;
}

// The checks that the layers of one dtype share; the sizes are fixed here.
LinearParams linear_params(Checker& check, Sym& R, Sym& N, Sym& K, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& num_rows) {
  check("x", x, {R, K}, {kF32, kBF16});
  if (check.cuda()) {
    if (x.scalar_type() == kF32) {
      check("weight", weight, {N, K}, {kF32});
    } else {
      check_chunks(check, "x", x, K);
      check("weight", weight, {ceil_div(N, kPanel), ceil_div(K, 64), kPanel, 64}, {kBF16});
      check.aligned("x", x);
      check.aligned("weight", weight);
    }
  } else {
    const int64_t g = pair_of(x);
    check("weight", weight, {ceil_div(N, kPanel), ceil_div(K, g), kPanel, g}, {x.scalar_type()});
  }
  check("bias", bias, {N}, {x.scalar_type()});
  check("num_rows", num_rows, {1}, {kI32});
  return product(R, N, K, x, weight, bias, num_rows);
}

// Of a deferred norm of x.
void set_squares(Checker& check, LinearParams& p, const std::optional<Tensor>& squares, double eps) {
  check("squares", squares, {p.rows, square_pitch(p.in_features)}, {kF32});
  p.squares = in<float>(squares);
  p.eps = static_cast<float>(eps);
  if (check.cuda() && squares.has_value()) check.aligned("squares", *squares);
}

void linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor num_rows, Tensor out, std::optional<Tensor> squares, double eps) {
  Checker check("linear", x);
  Sym R("R"), K("K"), N("N");
  check("x", x, {R, K}, {kF32, kBF16});
  check("out", out, {R, N}, {x.scalar_type(), kF32});
  LinearParams p = linear_params(check, R, N, K, x, weight, bias, num_rows);
  set_squares(check, p, squares, eps);
  if (check.cuda()) check.aligned("out", out);
  if (R == 0 || N == 0) return;
  p.out_dtype = dtype_of(out);
  p.out = inout<void>(out);
  SPECRT_LAUNCH(linear, check, p);
}

// kSilu's output, which fixes N.
void check_silu(Checker& check, Sym& R, Sym& N, const Tensor& out, std::initializer_list<ScalarType> dtypes) {
  Sym I("I");
  check("out", out, {R, I}, dtypes);
  check.require(I % 8 == 0, "out", "I divisible by 8 (gate and up alternate in eights); I = " + std::to_string(I));
  check.aligned("out", out);
  N.value = 2 * I;
}

// Of kResidual, all of residual's dtype.
void set_residual(Checker& check, LinearParams& p, const Tensor& residual, const Tensor& residual_out, const std::optional<Tensor>& next_weight, const std::optional<Tensor>& scaled,
                  const std::optional<Tensor>& next_squares) {
  const int64_t R = p.rows, N = p.out_features;
  check("residual_out", residual_out, {R, N}, {residual.scalar_type()});
  check("next_weight", next_weight, {N}, {residual.scalar_type()});
  check("scaled", scaled, {R, N}, {residual.scalar_type()});
  check("next_squares", next_squares, {R, square_pitch(p.out_features)}, {kF32});
  check.require(next_weight.has_value() == scaled.has_value() && next_weight.has_value() == next_squares.has_value(), "next_weight", "next_weight, scaled and next_squares together, or none of them");
  if (check.cuda()) {
    check.require(N % 4 == 0, "residual", "N divisible by 4 (four columns a thread); N = " + std::to_string(N));
    check.aligned("residual", residual);
    check.aligned("residual_out", residual_out);
    if (next_weight.has_value()) {
      check.aligned("next_weight", *next_weight);
      check.aligned("scaled", *scaled);
    }
  }
  p.finish = Finish::kResidual;
  p.out_dtype = dtype_of(residual);
  p.residual = in<void>(residual);
  p.residual_out = inout<void>(residual_out);
  p.next_weight = in<void>(next_weight);
  p.scaled = inout<void>(scaled);
  p.next_squares = inout<float>(next_squares);
}

void linear_silu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor num_rows, Tensor out, std::optional<Tensor> squares, double eps) {
  Checker check("linear_silu", x);
  Sym R("R"), K("K"), N("N");
  check("x", x, {R, K}, {kF32, kBF16});
  check_silu(check, R, N, out, {x.scalar_type()});
  LinearParams p = linear_params(check, R, N, K, x, weight, bias, num_rows);
  set_squares(check, p, squares, eps);
  if (R == 0 || N == 0) return;
  p.finish = Finish::kSilu;
  p.out = inout<void>(out);
  SPECRT_LAUNCH(linear, check, p);
}

void linear_residual(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor num_rows, Tensor residual, Tensor residual_out, std::optional<Tensor> next_weight,
                     std::optional<Tensor> scaled, std::optional<Tensor> next_squares) {
  Checker check("linear_residual", x);
  Sym R("R"), K("K"), N("N");
  check("x", x, {R, K}, {kF32, kBF16});
  check("residual", residual, {R, N}, {x.scalar_type()});
  LinearParams p = linear_params(check, R, N, K, x, weight, bias, num_rows);
  set_residual(check, p, residual, residual_out, next_weight, scaled, next_squares);
  if (R == 0 || N == 0) return;
  SPECRT_LAUNCH(linear, check, p);
}

// Two kernels, and between them a few bytes for each 128 outputs in short-lived memory of torch's (in a captured graph: of the graph's own pool).
void linear_sample(Tensor x, Tensor weight, int64_t out_features, Tensor num_rows, Tensor row_request, Tensor row_position, Tensor seeds, Tensor sampling_f, Tensor token,
                   Tensor status, std::optional<Tensor> logprob) {
  Checker check("linear_sample", x);
  Sym R("R"), K("K"), N("N"), B("B");
  check.require(out_features >= 1 && out_features <= kMaxVocab, "out_features", kVocabText);
  N.value = out_features;
  LinearParams p = linear_params(check, R, N, K, x, weight, std::nullopt, num_rows);
  check("row_request", row_request, {R}, {kI32});
  check("row_position", row_position, {R}, {kI32});
  check("seeds", seeds, {B}, {kI64});
  check("sampling_f", sampling_f, {B, kSamplingF}, {kF32});
  check("token", token, {R}, {kI32});
  check("status", status, {R}, {kI32});
  check("logprob", logprob, {R}, {kF32});
  if (R == 0) return;
  const int64_t blocks = ceil_div(N, kLseBlock);
  const Tensor choice = torch::stable::new_empty(x, {R, blocks, static_cast<int64_t>(sizeof(BlockChoice))}, kU8);
  std::optional<Tensor> sums;
  if (logprob.has_value()) sums = torch::stable::new_empty(x, {R, blocks}, kF32);
  p.finish = Finish::kChoose;
  p.row_request = in<int32_t>(row_request);
  p.row_position = in<int32_t>(row_position);
  p.seeds = in<int64_t>(seeds);
  p.sampling_f = in<float>(sampling_f);
  p.choice = inout<BlockChoice>(choice);
  p.sums = inout<float>(sums);
  SPECRT_LAUNCH(linear, check, p);
  const SampleBlocksParams row{p.choice, p.sums, p.num_rows, inout<int32_t>(token), inout<int32_t>(status), inout<float>(logprob), p.rows, static_cast<int>(blocks)};
  SPECRT_LAUNCH(sample_blocks, check, row);
}

void quantize_fp8(Tensor x, Tensor num_rows, Tensor q, Tensor scale) {
  Checker check("quantize_fp8", x);
  Sym R("R"), K("K");
  check("x", x, {R, K}, {kF32, kBF16});
  check("num_rows", num_rows, {1}, {kI32});
  check("q", q, {R, K}, {kE4M3});
  check("scale", scale, {ceil_div(K, kScaleBlock), scale_pitch(static_cast<int>(R))}, {kF32});
  if (check.cuda()) {
    check.require(K % 4 == 0, "x", "K divisible by 4 (four columns a thread); K = " + std::to_string(K));
    check.aligned("x", x);
    check.aligned("q", q);
  }
  if (R == 0 || K == 0) return;
  QuantizeFp8Params p{dtype_of(x), in<void>(x), inout<e4m3>(q), inout<float>(scale), in<int32_t>(num_rows), static_cast<int>(R), static_cast<int>(K)};
  SPECRT_LAUNCH(quantize_fp8, check, p);
}

// As linear_params, for FP8.
LinearFp8Params fp8_params(Checker& check, Sym& R, Sym& N, Sym& K, const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const std::optional<Tensor>& bias,
                           const Tensor& num_rows) {
  Sym G("G");
  check("x", x, {R, K}, {kF32, kBF16});
  const int64_t blocks = ceil_div(K, kScaleBlock);
  check("weight_scale", weight_scale, {G, N}, {kF32});
  check.require(G == 1 || G == blocks, "weight_scale", "[1, N] or [ceil(K/128), N] = [" + std::to_string(blocks) + ", N]");
  if (check.cuda()) {
    check("weight", weight, {ceil_div(N, kPanel), blocks, kPanel, kScaleBlock}, {kE4M3});
    check.require(K % 16 == 0, "x", "K divisible by 16 (e4m3 on CUDA is read 16 bytes at a time); K = " + std::to_string(K));
    check.aligned("x", x);
    check.aligned("weight", weight);
  } else {
    check("weight", weight, {ceil_div(N, kPanel), ceil_div(K, 2), kPanel, 2}, {kE4M3});
  }
  check("bias", bias, {N}, {kF32});
  check("num_rows", num_rows, {1}, {kI32});
  return {product(R, N, K, x, weight, bias, num_rows), nullptr, in<float>(weight_scale), static_cast<int>(G)};
}

// x goes to the kernel as it is where that quantises it, otherwise through quantize_fp8 and short-lived memory of torch's (in a captured graph: of the graph's own pool).
void run_fp8(Checker& check, LinearFp8Params& p, const Tensor& x) {
  LinearParams& linear = p.linear;
  if (check.cuda() && linear.dtype == DType::kBF16 && linear.rows <= kSelfQuantizedRows) {
    SPECRT_LAUNCH(linear_fp8, check, p);
    return;
  }
  const int64_t R = linear.rows, K = linear.in_features;
  const Tensor q = torch::stable::new_empty(x, {R, K}, kE4M3), scale = torch::stable::new_empty(x, {ceil_div(K, kScaleBlock), scale_pitch(linear.rows)}, kF32);
  const QuantizeFp8Params quantize{linear.dtype, linear.x, inout<e4m3>(q), inout<float>(scale), linear.num_rows, linear.rows, linear.in_features};
  if (K > 0) SPECRT_LAUNCH(quantize_fp8, check, quantize);
  linear.dtype = DType::kE4M3;
  linear.x = in<void>(q);
  p.x_scale = in<float>(scale);
  SPECRT_LAUNCH(linear_fp8, check, p);
}

void linear_fp8(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, Tensor num_rows, Tensor out, std::optional<Tensor> squares, double eps) {
  Checker check("linear_fp8", x);
  Sym R("R"), K("K"), N("N");
  check("x", x, {R, K}, {kF32, kBF16});
  check("out", out, {R, N}, {x.scalar_type(), kF32});
  check.aligned("out", out);
  LinearFp8Params p = fp8_params(check, R, N, K, x, weight, weight_scale, bias, num_rows);
  set_squares(check, p.linear, squares, eps);
  if (R == 0 || N == 0) return;
  p.linear.out_dtype = dtype_of(out);
  p.linear.out = inout<void>(out);
  run_fp8(check, p, x);
}

void linear_fp8_silu(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, Tensor num_rows, Tensor out, std::optional<Tensor> squares, double eps) {
  Checker check("linear_fp8_silu", x);
  Sym R("R"), K("K"), N("N");
  check("x", x, {R, K}, {kF32, kBF16});
  check_silu(check, R, N, out, {x.scalar_type()});
  LinearFp8Params p = fp8_params(check, R, N, K, x, weight, weight_scale, bias, num_rows);
  set_squares(check, p.linear, squares, eps);
  if (R == 0 || N == 0) return;
  p.linear.finish = Finish::kSilu;
  p.linear.out = inout<void>(out);
  run_fp8(check, p, x);
}

void linear_fp8_residual(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, Tensor num_rows, Tensor residual, Tensor residual_out,
                         std::optional<Tensor> next_weight, std::optional<Tensor> scaled, std::optional<Tensor> next_squares) {
  Checker check("linear_fp8_residual", x);
  Sym R("R"), K("K"), N("N");
  check("x", x, {R, K}, {kF32, kBF16});
  check("residual", residual, {R, N}, {x.scalar_type()});
  LinearFp8Params p = fp8_params(check, R, N, K, x, weight, weight_scale, bias, num_rows);
  set_residual(check, p.linear, residual, residual_out, next_weight, scaled, next_squares);
  if (R == 0 || N == 0) return;
  run_fp8(check, p, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_silu", TORCH_BOX(&linear_silu));
  m.impl("linear_residual", TORCH_BOX(&linear_residual));
  m.impl("linear_sample", TORCH_BOX(&linear_sample));
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8));
  m.impl("linear_fp8_silu", TORCH_BOX(&linear_fp8_silu));
  m.impl("linear_fp8_residual", TORCH_BOX(&linear_fp8_residual));
}
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_silu", TORCH_BOX(&linear_silu));
  m.impl("linear_residual", TORCH_BOX(&linear_residual));
  m.impl("linear_sample", TORCH_BOX(&linear_sample));
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8));
  m.impl("linear_fp8_silu", TORCH_BOX(&linear_fp8_silu));
  m.impl("linear_fp8_residual", TORCH_BOX(&linear_fp8_residual));
}

}  // namespace specrt::ops
