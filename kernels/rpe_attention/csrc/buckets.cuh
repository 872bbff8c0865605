// The gradient of the bias, summed over the keys of each bucket. Each sum has one owner and its terms a fixed order, so
// runs agree to the bit.
#pragma once

#include "problem.cuh"

// Seen from one query, the keys of a bucket form a rectangle. Two lanes share a query's keys, ordered by bucket: the
// even lane takes the first half from the front, the odd one the rest from the back. A bucket that both have a part of
// is the last of either, and their parts are added at the end. An entry holds
//   bits 0-6   the key's place in the row of gradients, in bytes
//   bits 7-12  its bucket
//   bit 13     set when the lane has now seen all keys of the bucket
constexpr int kPlace = 0x7f, kBucketShift = 7, kBucketMask = 0x3f, kLast = 1 << 13;
constexpr int kWalk = kRows / 2;
constexpr int kWalkBytes = kWalk * kThreads * 2;

using Gradients = Tile<64, 2048>;  // P and dS rows of a warp follow each other, 2 KB and 2 KB

struct Walk {
  uint32_t entries;   // uint16 [32 / 2, 32 lanes, 2] of this warp
  int steps;          // even
  int split = -1;     // the bucket that both lanes have a part of, on the even lane

  __device__ __forceinline__ void put(int step, int key, int bucket, bool last) const {
    const int place = Gradients::swapped(lane_index() / 2, key / 8) * 16 + key % 8 * 2;
    shared<uint16_t>(entries + (step / 2 * 32 + lane_index()) * 4 + step % 2 * 2) =
        static_cast<uint16_t>(place | bucket << kBucketShift | (last ? kLast : 0));
  }

  // Keys from .. to - 1 of the order, whose bucket has the keys of rows x columns (image) or, of class tokens, one row.
  __device__ __forceinline__ void add(const Problem& p, int& at, int bucket, Range rows, Range columns) {
    const int width = columns.end - columns.first, size = (rows.end - rows.first) * width;
    if (width <= 0 || size <= 0) return;
    const int half = (p.length + 1) / 2, from = at, to = at + size;
    const bool odd = lane_index() % 2;
    for (int y = rows.first; y < rows.end; ++y)
      for (int x = columns.first; x < columns.end; ++x, ++at) {
        const int key = bucket == kClass ? x : p.cls_tokens + y * p.width + x;
        if (!odd && at < half) put(at, key, bucket, at == to - 1);
        if (odd && at >= half) put(p.length - 1 - at, key, bucket, at == from);
      }
    if (!odd && from < half && to > half) split = bucket;
  }

  __device__ __forceinline__ Walk(const Problem& p, uint32_t memory)
      : entries(memory + warp_index() * (kWalkBytes / kWarps)),
        steps(((p.length + 1) / 2 + 1) / 2 * 2) {
    // Where a lane has no key, it reads one behind the last, whose gradient is 0, or adds up what it never stores.
    for (int step = 0; step < steps; ++step) put(step, p.length < kRows ? p.length : 0, 0, false);
    const int query = 16 * warp_index() + lane_index() / 2;
    int at = 0;
    // All keys of a class token share one bucket, and gradients of a row add up to 0: exactly so when nothing is added.
    if (query < p.cls_tokens || query >= p.length) return;
    const int y = (query - p.cls_tokens) / p.width, x = (query - p.cls_tokens) % p.width;
    for (int cy = -3; cy <= 3; ++cy)
      for (int cx = -3; cx <= 3; ++cx)
        add(p, at, (cy + 3) * kSide + cx + 3, axis_range(p, cy, y, p.height), axis_range(p, cx, x, p.width));
    add(p, at, kClass, {0, 1}, {0, p.cls_tokens});
  }

  // Row by row: sums[query, bucket] = scale * the sum of ds[query, key] over the bucket's keys. Buckets without keys
  // keep what they had, which is 0.
  __device__ __forceinline__ void run(const Gradients& ds, const Tile<kColumns>& sums, float scale) const {
    const int lane = opaque(lane_index()), query = 16 * warp_index() + lane / 2;
    const uint32_t row = ds.base + query * 128 + (query >> 4) * 2048;
    uint16_t* const target = &shared<uint16_t>(sums.base + query * kColumns * 2);
    const uint32_t* const mine = &shared<uint32_t>(entries) + lane;
    float sum = 0.f;
#pragma unroll 2
    for (int step = 0; step < steps; step += 2) {
      const uint32_t both = mine[step / 2 * 32];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t entry = both >> 16 * e;
        sum += unpack_bf16(shared<uint16_t>(row + (entry & kPlace)));
        if (entry & kLast) {
          target[entry >> kBucketShift & kBucketMask] = static_cast<uint16_t>(pack_bf16(sum * scale, 0.f));
          sum = 0.f;
        }
      }
    }
    const float other = shuffle_xor(sum, 1);
    if (split >= 0) target[split] = static_cast<uint16_t>(pack_bf16((sum + other) * scale, 0.f));
  }
};
