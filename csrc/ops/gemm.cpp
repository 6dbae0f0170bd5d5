#include "gemm/params.h"
#include "ops/checks.h"

namespace specrt::ops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t pair_of(const Tensor& t) { return t.scalar_type() == kF32 ? 1 : 2; }

void pack_linear(Tensor weight, Tensor packed) {
  Checker check("pack_linear", weight);
  Sym N("N"), K("K");
  check("weight", weight, {N, K}, {kF32, kBF16, kE4M3});
  if (check.cuda()) {
    check.require(weight.scalar_type() == kE4M3, "weight", "e4m3 (on CUDA other weights are their own packed form)");
    check.require(K % 16 == 0, "weight", "K divisible by 16 (e4m3 on CUDA is read 16 bytes at a time); K = " + std::to_string(K));
    check("packed", packed, {ceil_div(N, kPanel), ceil_div(K, kScaleBlock), kPanel, kScaleBlock}, {kE4M3});
    check.aligned("weight", weight);
    check.aligned("packed", packed);
  } else {
    const int64_t g = pair_of(weight);
    check("packed", packed, {ceil_div(N, kPanel), ceil_div(K, g), kPanel, g}, {weight.scalar_type()});
  }
  if (N == 0 || K == 0) return;
#ifdef SPECRT_TORCH_CUDA
  if (check.cuda()) return launch_pack_fp8_cuda({DType::kE4M3, in<void>(weight), inout<void>(packed), static_cast<int>(N), static_cast<int>(K)}, check.device().stream);
#endif
  launch_pack_linear_cpu({dtype_of(weight), in<void>(weight), inout<void>(packed), static_cast<int>(N), static_cast<int>(K)});
}

void linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor num_rows, Tensor out) {
  Checker check("linear", x);
  Sym R("R"), K("K"), N("N");
  check("x", x, {R, K}, {kF32, kBF16});
  check("out", out, {R, N}, {x.scalar_type(), kF32});
  if (check.cuda()) {
    check("weight", weight, {N, K}, {x.scalar_type()});
    if (x.scalar_type() == kBF16) {
      check.require(K % 8 == 0, "x", "K divisible by 8 (bfloat16 on CUDA reads 16 bytes at a time); K = " + std::to_string(K));
      check.aligned("x", x);
      check.aligned("weight", weight);
      check.aligned("out", out);
    }
  } else {
    const int64_t g = pair_of(x);
    check("weight", weight, {ceil_div(N, kPanel), ceil_div(K, g), kPanel, g}, {x.scalar_type()});
  }
  check("bias", bias, {N}, {x.scalar_type()});
  check("num_rows", num_rows, {1}, {kI32});
  if (R == 0 || N == 0) return;
  LinearParams p{dtype_of(x), dtype_of(out), in<void>(x), in<void>(weight), in<void>(bias), inout<void>(out), in<int32_t>(num_rows),
                 static_cast<int>(R), static_cast<int>(N), static_cast<int>(K)};
  SPECRT_LAUNCH(linear, check, p);
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

void linear_fp8(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, Tensor num_rows, Tensor out) {
  Checker check("linear_fp8", x);
  Sym R("R"), K("K"), N("N"), G("G");
  check("x", x, {R, K}, {kE4M3});
  check("out", out, {R, N}, {kF32, kBF16});
  const int64_t blocks = ceil_div(K, kScaleBlock);
  check("x_scale", x_scale, {blocks, scale_pitch(static_cast<int>(R))}, {kF32});
  check("weight_scale", weight_scale, {G, N}, {kF32});
  check.require(G == 1 || G == blocks, "weight_scale", "[1, N] or [ceil(K/128), N] = [" + std::to_string(blocks) + ", N]");
  if (check.cuda()) {
    check("weight", weight, {ceil_div(N, kPanel), blocks, kPanel, kScaleBlock}, {kE4M3});
    check.require(K % 16 == 0, "x", "K divisible by 16 (e4m3 on CUDA is read 16 bytes at a time); K = " + std::to_string(K));
    check.aligned("x", x);
    check.aligned("x_scale", x_scale);
    check.aligned("weight", weight);
    check.aligned("out", out);
  } else {
    check("weight", weight, {ceil_div(N, kPanel), ceil_div(K, 2), kPanel, 2}, {kE4M3});
  }
  check("bias", bias, {N}, {kF32});
  check("num_rows", num_rows, {1}, {kI32});
  if (R == 0 || N == 0) return;
  LinearFp8Params p{dtype_of(out), in<e4m3>(x), in<float>(x_scale), in<void>(weight), in<float>(weight_scale), static_cast<int>(G), in<float>(bias), inout<void>(out),
                    in<int32_t>(num_rows), static_cast<int>(R), static_cast<int>(N), static_cast<int>(K)};
  SPECRT_LAUNCH(linear_fp8, check, p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8));
}
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8));
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8));
}

}  // namespace specrt::ops
