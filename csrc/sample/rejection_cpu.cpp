// accept_rejection: one slot a thread.
#include "sample/rejection.h"
#include "sample/row_cpu.h"

namespace specrt {
namespace {

struct RowTeam {
  int vocab;

  SPECRT_ROW float lse(const float* x) {
    float out;
    rows_lse(x, 1, vocab, &out);
    return out;
  }
  template <typename F> SPECRT_ROW int64_t sum(F f) {
    int64_t total = 0;
    for (int v = 0; v < vocab; ++v) total += f(v);
    return total;
  }
  template <typename F> SPECRT_ROW void each(F f) {
    for (int v = 0; v < vocab; ++v) f(v);
  }
  SPECRT_ROW void set(float* address, float x) { *address = x; }
  SPECRT_ROW int32_t greedy(const float* x) { return std::max(argmax_of(x, vocab, 0).token, 0); }
  SPECRT_ROW int32_t sample(const float* x, int64_t seed, int32_t position) {
    return std::max(exact_of(x, vocab, seed, position, kNoiseResidual, 0).token, 0);
  }
  SPECRT_ROW bool writer() { return true; }
};

SPECRT_CLONES void walk_slot(const AcceptRejectionParams& p, int b) {
  RowTeam team{p.vocab};
  walk_rejection(team, p, b);
}

}  // namespace

void launch_accept_rejection_cpu(const AcceptRejectionParams& p) {
  parallel_for(p.slots, static_cast<int64_t>(p.slots) * p.vocab * 64, [&](int64_t b) { walk_slot(p, static_cast<int>(b)); });
}

}  // namespace specrt
