#include "gemm/params.h"
#include "ops/checks.h"

namespace specrt::ops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t pair_of(const Tensor& t) { return t.scalar_type() == kBF16 ? 2 : 1; }

// CUDA bfloat16 reads 16 bytes at a time.
void check_chunks(Checker& check, const char* name, int64_t K) {
  check.require(K % 8 == 0, name, "K divisible by 8 (bfloat16 on CUDA reads 16 bytes at a time); K = " + std::to_string(K));
}

void pack_linear(Tensor weight, Tensor packed) {
  Checker check("pack_linear", weight);
  Sym N("N"), K("K");
  if (check.cuda()) {
    check("weight", weight, {N, K}, {kBF16});
    check_chunks(check, "weight", K);
    check.aligned("weight", weight);
    check("packed", packed, {ceil_div(N, kPanel), ceil_div(K, 64), kPanel, 64}, {kBF16});
    check.aligned("packed", packed);
  } else {
    check("weight", weight, {N, K}, {kF32, kBF16});
    const int64_t g = pair_of(weight);
    check("packed", packed, {ceil_div(N, kPanel), ceil_div(K, g), kPanel, g}, {weight.scalar_type()});
  }
  if (N == 0 || K == 0) return;
  PackLinearParams p{dtype_of(weight), in<void>(weight), inout<void>(packed), static_cast<int>(N), static_cast<int>(K)};
  SPECRT_LAUNCH(pack_linear, check, p);
}

void linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor num_rows, Tensor out) {
  Checker check("linear", x);
  Sym R("R"), K("K"), N("N");
  check("x", x, {R, K}, {kF32, kBF16});
  check("out", out, {R, N}, {x.scalar_type(), kF32});
  if (check.cuda()) {
    if (x.scalar_type() == kF32) {
      check("weight", weight, {N, K}, {kF32});
    } else {
      check("weight", weight, {ceil_div(N, kPanel), ceil_div(K, 64), kPanel, 64}, {kBF16});
      check_chunks(check, "x", K);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(specrt, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("linear", TORCH_BOX(&linear));
}
STABLE_TORCH_LIBRARY_IMPL(specrt, CUDA, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace specrt::ops
