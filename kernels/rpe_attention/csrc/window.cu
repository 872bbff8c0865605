// C entry points of the attention of short windows with relative positions. Pointers are device pointers, tensors are
// contiguous; each function gives 0, a CUDA error, or kRefused for a problem that the kernels do not take.
#include "backward.cuh"
#include "forward.cuh"
#include "launch.h"

namespace {

constexpr int kRefused = -1;

bool taken(const Problem& p) {
  const bool positive = p.batch > 0 && p.heads > 0 && p.height > 0 && p.width > 0 && p.cls_tokens >= 0;
  const bool window = p.length == p.cls_tokens + p.height * p.width && p.length <= kRows;
  const bool head = p.dim == 32 || p.dim == 64;
  const bool table = p.buckets == kClass + (p.cls_tokens > 0) && (p.tables == 1 || p.tables == p.heads);
  const bool steps = 0 < p.steps[0] && p.steps[0] < p.steps[1] && p.steps[1] < p.steps[2];
  return positive && window && head && table && steps && p.blocks > 0 && p.blocks % p.tables == 0;
}

// Calls `use` with the head size and the tiles of keys as constants.
template <class Use>
int choose(int dim, int length, Use&& use) {
  const bool short_window = length <= 56;
  if (dim == 64) return short_window ? use(Size<64, 7>{}) : use(Size<64, 8>{});
  return short_window ? use(Size<32, 7>{}) : use(Size<32, 8>{});
}

}  // namespace

#ifndef RPE_SOURCES
#define RPE_SOURCES "unknown"
#endif

extern "C" {

// Bytes of dynamic shared memory of the forward (backward = 0) or backward kernel.
int rpe_window_shared_bytes(int backward, int dim) {
  if (dim == 64) return backward ? BackwardMemory<64>::bytes : ForwardMemory<64>::bytes;
  return backward ? BackwardMemory<32>::bytes : ForwardMemory<32>::bytes;
}

// Thread blocks that the device holds at once, into *blocks.
int rpe_window_resident(int backward, int dim, int length, int device, int* blocks) {
  const int shared = rpe_window_shared_bytes(backward, dim);
  return choose(dim, length, [&]<int D, int KEYS>(Size<D, KEYS>) {
    return backward ? resident_blocks(window_backward<D, KEYS>, kThreads, shared, device, blocks)
                    : resident_blocks(window_forward<D, KEYS>, kThreads, shared, device, blocks);
  });
}

// Bytes of the workspace of the backward pass: fp32 [blocks, d, 56].
long long rpe_window_workspace_bytes(const Problem* p) {
  return static_cast<long long>(p->blocks) * p->dim * kColumns * static_cast<int>(sizeof(float));
}

// qkv bf16 [B, L, 3, H, d], table fp32 [tables, d, buckets] -> out bf16 [B, L, H, d], lse fp32 [B, H, L].
int rpe_window_forward(const Problem* p, const void* qkv, const float* table, void* out, float* lse, void* stream) {
  if (!taken(*p)) return kRefused;
  return choose(p->dim, p->length, [&]<int D, int KEYS>(Size<D, KEYS>) {
    return launch(window_forward<D, KEYS>, p->blocks, kThreads, ForwardMemory<D>::bytes, p->device, stream, *p,
                  static_cast<const uint16_t*>(qkv), table, static_cast<uint16_t*>(out), lse);
  });
}

// dout bf16 [B, L, H, d] and what the forward had and gave -> dqkv bf16 [B, L, 3, H, d], dtable fp32 as the table.
int rpe_window_backward(const Problem* p, const void* dout, const void* qkv, const float* table, const float* lse,
                        void* dqkv, float* dtable, float* workspace, void* stream) {
  if (!taken(*p)) return kRefused;
  const int status = choose(p->dim, p->length, [&]<int D, int KEYS>(Size<D, KEYS>) {
    return launch(window_backward<D, KEYS>, p->blocks, kThreads, BackwardMemory<D>::bytes, p->device, stream, *p,
                  static_cast<const uint16_t*>(dout), static_cast<const uint16_t*>(qkv), table, lse,
                  static_cast<uint16_t*>(dqkv), workspace);
  });
  if (status != 0) return status;
  const int numbers = p->tables * p->dim * p->buckets, threads = 32 * kSlices;
  return launch(sum_partials, (numbers + 31) / 32, threads, threads * static_cast<int>(sizeof(float)), p->device,
                stream, *p, static_cast<const float*>(workspace), dtable);
}

// The source this library was made of, as the build names it.
const char* rpe_window_sources() { return RPE_SOURCES; }

const char* rpe_window_error(int status) {
  return status == kRefused ? "the kernels do not take this problem" : error_text(status);
}

}  // extern "C"
