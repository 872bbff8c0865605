// What a call computes, how its (window, head) problems are dealt to thread blocks, and which bucket a pair has.
#pragma once

#include "tile.cuh"

// The Python side declares the same fields in the same order.
struct Problem {
  int batch, heads, length, dim;
  int height, width, cls_tokens;
  int buckets, tables;        // columns of the table; 1 table for all heads, or one for each
  int steps[3];               // distances at which the indices 1, 2, 3 begin
  int blocks, device;
  float qk_scale, rpe_scale;
};

// Blocks of so many bytes of shared memory, 1 KB more being the system's, that a multiprocessor holds; at most `most`.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMultiprocessorBytes = 164 << 10;
#else
constexpr int kMultiprocessorBytes = 228 << 10;
#endif
constexpr int resident(int bytes, int most) {
  const int fitting = kMultiprocessorBytes / (bytes + 1024);
  return fitting < most ? fitting : most;
}

constexpr int kSide = 7;                   // buckets along an axis
constexpr int kClass = kSide * kSide;      // the bucket of pairs with a class token
constexpr int kMasked = kColumns - 1;      // stands for "no such key"; its bias is -inf
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The problems of a block: every step-th, and of one head only when heads have their own tables, as each block keeps
// one table and one sum of its gradient.
struct Work {
  int table, at, step, count;
  int window, head;

  __device__ __forceinline__ Work(const Problem& p, int block)
      : table(block % p.tables), at(block / p.tables), step(p.blocks / p.tables),
        count(p.tables == 1 ? p.batch * p.heads : p.batch) {
    place(p);
  }

  __device__ __forceinline__ void place(const Problem& p) {
    window = p.tables == 1 ? at / p.heads : at;
    head = p.tables == 1 ? at - window * p.heads : table;
  }
  __device__ __forceinline__ bool present() const { return at < count; }
  __device__ __forceinline__ Work next(const Problem& p) const {
    Work w = *this;
    w.at += step;
    w.place(p);
    return w;
  }
  // Of a problem in [B, L, parts, H, d]: its first element, and the elements between rows are parts * H * d.
  __device__ __forceinline__ size_t offset(const Problem& p, int parts, int part) const {
    return (static_cast<size_t>(window) * p.length * parts + part) * p.heads * p.dim + head * p.dim;
  }
};

__device__ __forceinline__ int axis_index(const Problem& p, int offset) {
  const int distance = offset < 0 ? -offset : offset;
  const int index = (distance >= p.steps[0]) + (distance >= p.steps[1]) + (distance >= p.steps[2]);
  return offset < 0 ? -index : index;
}

__device__ __forceinline__ int bucket(const Problem& p, int query, int key) {
  if (key >= p.length) return kMasked;
  if (query >= p.length) return 0;
  if (query < p.cls_tokens || key < p.cls_tokens) return kClass;
  const int a = query - p.cls_tokens, b = key - p.cls_tokens;
  return (axis_index(p, a / p.width - b / p.width) + 3) * kSide + axis_index(p, a % p.width - b % p.width) + 3;
}

// Keys on one axis whose index, seen from `query`, is `index`: first .. end - 1.
struct Range {
  int first, end;
};
__device__ __forceinline__ Range axis_range(const Problem& p, int index, int query, int size) {
  const int level = index < 0 ? -index : index;
  const int from = level == 0 ? 0 : level == 1 ? p.steps[0] : level == 2 ? p.steps[1] : p.steps[2];
  const int to = level == 0 ? p.steps[0] : level == 1 ? p.steps[1] : level == 2 ? p.steps[2] : kRows;  // exclusive
  int first = index < 0 ? query + from : query - to + 1, end = index < 0 ? query + to : query - from + 1;
  if (level == 0) first = query - to + 1, end = query + to;
  first = first < 0 ? 0 : first;
  end = end > size ? size : end;
  return {first, end};
}

// The table in bf16 as [d, 56], zeros behind its last column.
template <int D>
__device__ __forceinline__ void load_table(const Tile<kColumns>& tile, const float* table, int buckets) {
  for (int at = thread_index(); at < D * (kColumns / 2); at += kThreads) {
    const int row = at / (kColumns / 2), column = at % (kColumns / 2) * 2;
    const float* source = table + row * buckets + column;
    tile.store(row, column, pack_bf16(column < buckets ? source[0] : 0.f, column + 1 < buckets ? source[1] : 0.f));
  }
}

// Products q·table of a warp's 16 rows in fp32, from which every (query, key) pair takes its bias. With this stride a
// read of the pattern below costs about 2.2 shared-memory cycles; with 64 it costs 6.
constexpr int kBiasStride = 58;
constexpr int kBiasBytes = 16 * kBiasStride * 4;

__device__ __forceinline__ void store_bias(uint32_t bias, const float (&sums)[kColumns / 8][4], float scale) {
  const int lane = opaque(lane_index()), row = lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* target = &shared<float>(bias) + (row + 8 * half) * kBiasStride + 8 * n + column;
      const bool masked = n == kColumns / 8 - 1 && column == 6;
      target[0] = sums[n][2 * half] * scale;
      target[1] = masked ? -INFINITY : sums[n][2 * half + 1] * scale;
    }
}

// The buckets of a thread's elements of the score matrix, one byte each, which are the same in every window. They pass
// through the warp's 1 KB at `scratch`, so that the code for one element serves all.
template <int TILES>
__device__ __forceinline__ void bucket_bytes(uint32_t (&bytes)[TILES], const Problem& p, uint32_t scratch) {
  const int row = 16 * warp_index() + lane_index() / 4, column = lane_index() % 4 * 2;
  const uint32_t mine = scratch + 4 * lane_index();
#pragma unroll 1
  for (int at = 0; at < 4 * TILES; ++at) {
    const int n = at / 4, e = at % 4;
    shared<uint8_t>(mine + 128 * n + e) = static_cast<uint8_t>(bucket(p, row + 8 * (e / 2), 8 * n + column + e % 2));
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) bytes[n] = shared<uint32_t>(mine + 128 * n);
}

// scores becomes the logits in base 2: scores * scale + bias, -inf where there is no key.
template <int TILES>
__device__ __forceinline__ void add_bias(
    float (&scores)[TILES][4], uint32_t bias, const uint32_t (&bytes)[TILES], float scale) {
  const float* row = &shared<float>(bias) + opaque(lane_index()) / 4 * kBiasStride;
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const uint32_t four = opaque(bytes[n]);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      scores[n][e] = scores[n][e] * scale + row[(e / 2) * 8 * kBiasStride + (four >> 8 * e & 0xff)];
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  const float once = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(once, shuffle_xor(once, 2));
}
