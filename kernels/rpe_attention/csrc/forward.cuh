// Forward: a block of four warps computes one (window, head) after another, with q, k, v of the next one under way.
#pragma once

#include "problem.cuh"

template <int D>
struct ForwardMemory {
  static constexpr int tile = Tile<D>::bytes;
  static constexpr int table = 2 * 3 * tile;
  static constexpr int bias = table + D * kColumns * 2;
  static constexpr int bytes = bias + kWarps * kBiasBytes;
};

template <int D>
__device__ __forceinline__ void copy_window(
    uint32_t stage, const Problem& p, const Work& work, const uint16_t* qkv) {
  if (work.present())
    for (int part = 0; part < 3; ++part)
      copy_rows<D>(Tile<D>{stage + part * Tile<D>::bytes}, qkv + work.offset(p, 3, part), 3 * p.heads * D, p.length);
  copy_commit();
}

// KEYS: tiles of 8 keys, 7 for windows of up to 56 tokens or 8.
template <int D, int KEYS>
__global__ void __launch_bounds__(kThreads, resident(ForwardMemory<D>::bytes, 4))
    window_forward(const Problem p, const uint16_t* qkv, const float* table, uint16_t* out, float* lse) {
  using Memory = ForwardMemory<D>;
  const Tile<kColumns> r{Memory::table};
  const uint32_t bias = Memory::bias + warp_index() * kBiasBytes;
  const int first_row = 16 * warp_index(), lane = lane_index();
  Work work(p, block_index());

  copy_window<D>(0, p, work, qkv);
  load_table<D>(r, table + static_cast<size_t>(work.table) * D * p.buckets, p.buckets);
  uint32_t buckets[KEYS];
  bucket_bytes(buckets, p, bias);

  for (int stage = 0; work.present(); stage ^= 1) {
    copy_wait<0>();
    sync_block();  // this window has come, and nobody reads the one before it any more
    const Work next = work.next(p);
    copy_window<D>((stage ^ 1) * 3 * Memory::tile, p, next, qkv);
    const uint32_t here = stage * 3 * Memory::tile;
    const Tile<D> q{here}, k{here + Memory::tile}, v{here + 2 * Memory::tile};
    const Rows<Tile<D>> queries{q, first_row};

    {
      float products[kColumns / 8][4] = {};
      multiply<D / 8, false>(products, queries, r);
      store_bias(bias, products, p.rpe_scale * kLog2e);
    }
    float scores[KEYS][4] = {};
    multiply<D / 8, true>(scores, queries, k);
    sync_warp();
    add_bias(scores, bias, buckets, p.qk_scale * kLog2e);

    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < KEYS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) largest[e / 2] = fmaxf(largest[e / 2], scores[n][e]);
    largest[0] = quad_max(largest[0]), largest[1] = quad_max(largest[1]);
    uint32_t weights[KEYS][2];
#pragma unroll
    for (int n = 0; n < KEYS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[n][e] = exp2_fast(scores[n][e] - largest[e / 2]);
        total[e / 2] += scores[n][e];
      }
      weights[n][0] = pack_bf16(scores[n][0], scores[n][1]);
      weights[n][1] = pack_bf16(scores[n][2], scores[n][3]);
    }
    total[0] = quad_sum(total[0]), total[1] = quad_sum(total[1]);

    float values[D / 8][4] = {};
    multiply<KEYS, false>(values, Registers<KEYS>{weights}, v);
    store_rows(values, 1.f / total[0], 1.f / total[1], out + work.offset(p, 1, 0), p.heads * D, first_row, p.length);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane / 4 + 8 * half;
      const size_t at = (static_cast<size_t>(work.window) * p.heads + work.head) * p.length + row;
      if (lane % 4 == 0 && row < p.length) lse[at] = (largest[half] + log2_fast(total[half])) * kLn2;
    }
    work = next;
  }
}
