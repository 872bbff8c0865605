// Backward: scores and probabilities are computed again; only the logarithms of the forward's sums come from memory.
//
// As a whole row of probabilities is at hand, rowsum(P dP) stands for rowsum(dO O), and O is not read. One copy of each
// operand is kept, so that three blocks share a multiprocessor; k and v of the next window are loaded as soon as the
// last product that needs them is done, q and dO after the gradients of k, v and the table.
#pragma once

#include "buckets.cuh"

template <int D>
struct BackwardMemory {
  static constexpr int q = 0, k = Tile<D>::bytes, v = 2 * k, grad = 3 * k;
  static constexpr int table = 4 * k;
  static constexpr int bias = table + D * kColumns * 2;  // per warp 4 KB: the bias, then P and dS
  static constexpr int sums = bias + kWarps * 4096;      // gradient of the bias per bucket
  static constexpr int walk = sums + Tile<kColumns>::bytes;
  static constexpr int bytes = walk + kWalkBytes;
  static_assert(kBiasBytes <= 4096);
};

template <int D>
__device__ __forceinline__ void copy_part(
    uint32_t target, const Problem& p, const Work& work, const uint16_t* source, int parts, int part) {
  if (!work.present()) return;
  copy_rows<D>(Tile<D>{target}, source + work.offset(p, parts, part), parts * p.heads * D, p.length);
}

template <int TILES>
__device__ __forceinline__ void round_pairs(
    uint32_t (&pairs)[TILES][2], const float (&values)[TILES][4], const Gradients& tile) {
  const int lane = opaque(lane_index()), row = 16 * warp_index() + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pairs[n][half] = pack_bf16(values[n][2 * half], values[n][2 * half + 1]);
      tile.store(row + 8 * half, 8 * n + column, pairs[n][half]);
    }
}

// A thread's share of the next window's q and dO rows on its way to L2, as shared memory has no room for them yet.
template <int D>
__device__ __forceinline__ void announce(
    const Problem& p, const Work& work, const uint16_t* qkv, const uint16_t* dout) {
  const int row = thread_index() % kRows;
  if (!work.present() || row >= p.length) return;
  const size_t at = static_cast<size_t>(row) * p.heads * D;
  if (thread_index() < kRows) prefetch(qkv + work.offset(p, 3, 0) + 3 * at);
  else prefetch(dout + work.offset(p, 1, 0) + at);
}

// partial: fp32 [blocks, d, 56], each block's sum of q^T dT.
template <int D, int KEYS>
__global__ void __launch_bounds__(kThreads, resident(BackwardMemory<D>::bytes, KEYS == 7 ? 4 : 3))
    window_backward(const Problem p, const uint16_t* dout, const uint16_t* qkv, const float* table, const float* lse,
                    uint16_t* dqkv, float* partial) {
  using Memory = BackwardMemory<D>;
  // Of q^T dT each warp keeps 16 rows; with d = 32 two warps share these, four tiles of columns each (one in common).
  constexpr int kBands = D / 16, kTiles = kColumns / 8, kMine = kBands == kWarps ? kTiles : kTiles / 2 + 1;
  const int warp = warp_index(), first_row = 16 * warp, lane = lane_index();
  const int band = warp % kBands, first_tile = warp / kBands * (kTiles - kMine);
  Work work(p, block_index());

  copy_part<D>(Memory::k, p, work, qkv, 3, 1);
  copy_part<D>(Memory::v, p, work, qkv, 3, 2);
  copy_part<D>(Memory::q, p, work, qkv, 3, 0);
  copy_commit();
  copy_part<D>(Memory::grad, p, work, dout, 1, 0);
  copy_commit();
  load_table<D>(Tile<kColumns>{Memory::table}, table + static_cast<size_t>(work.table) * D * p.buckets, p.buckets);
  for (int at = thread_index(); at < Tile<kColumns>::bytes / 4; at += kThreads)
    shared<uint32_t>(Memory::sums + 4 * at) = 0;
  uint32_t buckets[KEYS];
  bucket_bytes(buckets, p, Memory::bias + warp * 4096);
  const Walk walk(p, Memory::walk);
  float dtable[kMine][4] = {};

  while (work.present()) {
    const Work next = work.next(p);
    const uint32_t base = opaque(0);
    const Tile<D> q{base + Memory::q}, k{base + Memory::k}, v{base + Memory::v}, grad{base + Memory::grad};
    const Tile<kColumns> r{base + Memory::table}, sums{base + Memory::sums};
    const Gradients weights{base + Memory::bias}, ds{base + Memory::bias + 2048};
    const uint32_t bias = base + Memory::bias + warp * 4096;
    float row_lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + opaque(lane) / 4 + 8 * half;
      const size_t at = (static_cast<size_t>(work.window) * p.heads + work.head) * p.length + row;
      row_lse[half] = row < p.length ? lse[at] * kLog2e : 0.f;
    }
    announce<D>(p, next, qkv, dout);
    copy_wait<1>();
    sync_block();  // q, k, v have come

    const Rows<Tile<D>> queries{q, first_row};
    {
      float products[kTiles][4] = {};
      multiply<D / 8, false>(products, queries, r);
      store_bias(bias, products, p.rpe_scale * kLog2e);
    }
    float weight[KEYS][4] = {};
    multiply<D / 8, true>(weight, queries, k);
    sync_warp();
    add_bias(weight, bias, buckets, p.qk_scale * kLog2e);
#pragma unroll
    for (int n = 0; n < KEYS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) weight[n][e] = exp2_fast(weight[n][e] - row_lse[e / 2]);
    sync_warp();  // the warp is done with the bias, whose place the probabilities take
    uint32_t pairs[KEYS][2];
    round_pairs(pairs, weight, weights);

    copy_wait<0>();
    sync_warp();  // the warp's own rows of dO have come
    float change[KEYS][4] = {};
    multiply<D / 8, true>(change, Rows<Tile<D>>{grad, first_row}, v);
    float mean[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < KEYS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) mean[e / 2] += weight[n][e] * change[n][e];
    mean[0] = quad_sum(mean[0]), mean[1] = quad_sum(mean[1]);
#pragma unroll
    for (int n = 0; n < KEYS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) change[n][e] = weight[n][e] * (change[n][e] - mean[e / 2]);
    round_pairs(pairs, change, ds);
    sync_warp();
    walk.run(ds, sums, p.rpe_scale);
    sync_warp();

    const int stride = 3 * p.heads * D;
    float dq[D / 8][4] = {};
    multiply<KEYS, false>(dq, Registers<KEYS>{pairs}, k);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[n][e] *= p.qk_scale;
    multiply<kTiles, true>(dq, Rows<Tile<kColumns>>{sums, first_row}, r);
    store_rows(dq, 1.f, 1.f, dqkv + work.offset(p, 3, 0), stride, first_row, p.length);
    sync_block();  // P, dS and the sums of all rows are there; nobody needs k and v any more
    copy_part<D>(Memory::k, p, next, qkv, 3, 1);
    copy_part<D>(Memory::v, p, next, qkv, 3, 2);

    {
      float dv[D / 8][4] = {};
      multiply<KEYS, false>(dv, Transposed<Gradients>{weights, 2 * warp}, grad);
      store_rows(dv, 1.f, 1.f, dqkv + work.offset(p, 3, 2), stride, first_row, p.length);
    }
    float dk[D / 8][4] = {};
    multiply<KEYS, false>(dk, Transposed<Gradients>{ds, 2 * warp}, q);
    multiply<KEYS, false>(dtable, Transposed<Tile<D>>{q, 2 * band}, sums, first_tile);
    sync_block();  // nobody needs this window's operands any more
    copy_part<D>(Memory::q, p, next, qkv, 3, 0);
    copy_commit();
    copy_part<D>(Memory::grad, p, next, dout, 1, 0);
    copy_commit();
    store_rows(dk, p.qk_scale, p.qk_scale, dqkv + work.offset(p, 3, 1), stride, first_row, p.length);
    work = next;
  }

  float* const target = partial + static_cast<size_t>(block_index()) * D * kColumns;
#pragma unroll
  for (int n = 0; n < kMine; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = 16 * band + lane / 4 + 8 * (e / 2), column = 8 * (first_tile + n) + lane % 4 * 2 + e % 2;
      if (n > 0 || first_tile == 0) target[row * kColumns + column] = dtable[n][e];
    }
}

// dtable [tables, d, buckets]: the sum over the blocks of each table. A block makes 32 numbers, each with eight threads
// that add up an eighth of its partial sums in order.
constexpr int kSlices = 8;

__global__ void sum_partials(const Problem p, const float* partial, float* dtable) {
  float* const slices = reinterpret_cast<float*>(shared_memory());
  const int lane = thread_index() % 32, slice = thread_index() / 32;
  const int at = block_index() * 32 + lane, count = p.tables * p.dim * p.buckets;
  float sum = 0.f;
  if (at < count) {
    const int table = at / (p.dim * p.buckets), row = at / p.buckets % p.dim, column = at % p.buckets;
    for (int block = table + slice * p.tables; block < p.blocks; block += kSlices * p.tables)
      sum += partial[(static_cast<size_t>(block) * p.dim + row) * kColumns + column];
  }
  slices[thread_index()] = sum;
  sync_block();
  if (slice != 0 || at >= count) return;
  for (int other = 1; other < kSlices; ++other) sum += slices[other * 32 + lane];
  dtable[at] = sum;
}
