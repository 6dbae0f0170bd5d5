#include <algorithm>

#include "base/parallel.h"
#include "gemm/params.h"

namespace specrt {
namespace {

template <typename T> SPECRT_CLONES float quantize(const T* x, e4m3* q, int count) {
  uint32_t greatest = 0;
  for (int i = 0; i < count; ++i) greatest = std::max(greatest, float_to_bits(to_float(x[i])) & 0x7fffffffu);
  const float scale = scale_of(greatest);
  for (int i = 0; i < count; ++i) q[i] = to_e4m3(to_float(x[i]) / scale);
  return scale;
}

template <typename T> void quantize_rows(const QuantizeFp8Params& p) {
  const int64_t n = std::min(*p.num_rows, p.rows), columns = p.columns, blocks = (columns + kScaleBlock - 1) / kScaleBlock;
  parallel_for(n, n * columns * 8, [&](int64_t r) {
    const T* x = static_cast<const T*>(p.x) + r * columns;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * kScaleBlock;
      p.scale[b * scale_pitch(p.rows) + r] = quantize(x + at, p.q + r * columns + at, static_cast<int>(std::min<int64_t>(kScaleBlock, columns - at)));
    }
  });
}

}  // namespace

void launch_quantize_fp8_cpu(const QuantizeFp8Params& p) { p.dtype == DType::kBF16 ? quantize_rows<bf16>(p) : quantize_rows<float>(p); }

}  // namespace specrt
