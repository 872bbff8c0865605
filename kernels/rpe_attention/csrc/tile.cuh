// Matrices of bf16 in shared memory and products of 16 rows by one warp, as mma.sync wants them.
#pragma once

#include "device.cuh"

constexpr int kRows = 64;       // tokens of a window, padded
constexpr int kColumns = 56;    // columns of the table, padded to whole tiles of 8
constexpr int kWarps = 4;       // warp w owns rows 16 w .. 16 w + 15
constexpr int kThreads = 32 * kWarps;

__device__ __forceinline__ int lane_index() { return thread_index() % 32; }
__device__ __forceinline__ int warp_index() { return thread_index() / 32; }

// Rows of COLUMNS bf16, of which `at` gives 16-byte chunks; GAP bytes lie between groups of 16 rows. Chunks are swapped
// within a row so that eight rows of one chunk lie in different banks; 56 columns, an odd number of chunks, need no
// swap.
template <int COLUMNS, int GAP = 0>
struct Tile {
  uint32_t base;  // in shared memory, a multiple of 128

  static constexpr int bytes = kRows * COLUMNS * 2;

  static __device__ __forceinline__ int swapped(int row, int chunk) {
    if constexpr (COLUMNS == 64) return chunk ^ (row & 7);
    if constexpr (COLUMNS == 32) return chunk ^ (row >> 1 & 3);
    return chunk;
  }
  __device__ __forceinline__ uint32_t at(int row, int chunk) const {
    return base + row * (COLUMNS * 2) + (row >> 4) * GAP + swapped(row, chunk) * 16;
  }
  // From `at` of chunk 0 or 1 (0 when `chunks` is odd) to `chunks` further right, 8 `eights` rows further down; with a
  // GAP, from a row below 16, below 8 when `eights` is odd. For constants it is at most one instruction.
  static __device__ __forceinline__ uint32_t move(uint32_t at, int eights, int chunks) {
    if constexpr (COLUMNS == 64 || COLUMNS == 32) at ^= chunks * 16;
    else at += chunks * 16;
    return at + eights * (8 * COLUMNS * 2) + (eights >> 1) * GAP;
  }
  // Two neighbours, the first in an even column.
  __device__ __forceinline__ void store(int row, int column, uint32_t pair) const {
    shared<uint32_t>(at(row, column >> 3) + (column & 7) * 2) = pair;
  }
};

// A operands. k counts chunks of 8; `full` gives 16 x 16 of k and k + 1, `half` 16 x 8 of k.

// Rows row .. row + 15 of a tile [m, k].
template <class T>
struct Rows {
  T tile;
  int row;

  __device__ __forceinline__ void full(uint32_t (&a)[4], int k, int lane) const {
    load_matrices<4, false>(a, T::move(tile.at(row + (lane & 15), lane >> 4), 0, k));
  }
  __device__ __forceinline__ void half(uint32_t (&a)[2], int k, int lane) const {
    load_matrices<2, false>(a, T::move(tile.at(row + (lane & 15), 0), 0, k));
  }
};

// The transpose of a tile [k, m], columns 8 chunk .. 8 chunk + 15.
template <class T>
struct Transposed {
  T tile;
  int chunk;

  __device__ __forceinline__ void full(uint32_t (&a)[4], int k, int lane) const {
    load_matrices<4, true>(a, T::move(tile.at((lane & 7) + (lane >> 4 << 3), chunk + (lane >> 3 & 1)), k, 0));
  }
  __device__ __forceinline__ void half(uint32_t (&a)[2], int k, int lane) const {
    load_matrices<2, true>(a, T::move(tile.at(lane & 7, chunk + (lane >> 3 & 1)), k, 0));
  }
};

// What an earlier product left in registers, rounded: pairs[n] holds tile n of rows 0-7 and of rows 8-15.
template <int TILES>
struct Registers {
  const uint32_t (&pairs)[TILES][2];

  __device__ __forceinline__ void full(uint32_t (&a)[4], int k, int) const {
    a[0] = pairs[k][0], a[1] = pairs[k][1], a[2] = pairs[k + 1][0], a[3] = pairs[k + 1][1];
  }
  __device__ __forceinline__ void half(uint32_t (&a)[2], int k, int) const { a[0] = pairs[k][0], a[1] = pairs[k][1]; }
};

// B operands: a tile as it lies, [k, n], or the transpose of one lying [n, k]; DEEP chunks from k, WIDE tiles from n.
template <int DEEP, int WIDE, bool LIES_NK, class T>
__device__ __forceinline__ void load_columns(uint32_t (&b)[DEEP * WIDE], const T& tile, int k, int n, int lane) {
  const int low = lane & 7, middle = lane >> 3 & 1, high = lane >> 4;
  const int dk = DEEP == 2 ? middle : 0, dn = DEEP == 2 ? (WIDE == 2 ? high : 0) : (WIDE == 2 ? middle : 0);
  if constexpr (LIES_NK) load_matrices<DEEP * WIDE, false>(b, T::move(tile.at(8 * dn + low, dk), n, k));
  else load_matrices<DEEP * WIDE, true>(b, T::move(tile.at(8 * dk + low, dn), k, n));
}

// sums += A B, of depth 8 DEPTH and for the tiles first .. first + N - 1 of columns of B.
template <int DEPTH, bool LIES_NK, int N, class A, class B>
__device__ __forceinline__ void multiply(float (&sums)[N][4], const A& left, const B& right, int first = 0) {
  const int lane = opaque(lane_index());
#pragma unroll
  for (int k = 0; k + 1 < DEPTH; k += 2) {
    uint32_t a[4];
    left.full(a, k, lane);
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
      uint32_t b[4];
      load_columns<2, 2, LIES_NK>(b, right, k, first + n, lane);
      multiply_k16(sums[n], a, b[0], b[1]);
      multiply_k16(sums[n + 1], a, b[2], b[3]);
    }
    if constexpr (N % 2 == 1) {
      uint32_t b[2];
      load_columns<2, 1, LIES_NK>(b, right, k, first + N - 1, lane);
      multiply_k16(sums[N - 1], a, b[0], b[1]);
    }
  }
  if constexpr (DEPTH % 2 == 1) {
    uint32_t a[2];
    left.half(a, DEPTH - 1, lane);
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
      uint32_t b[2];
      load_columns<1, 2, LIES_NK>(b, right, DEPTH - 1, first + n, lane);
      multiply_k8(sums[n], a, b[0]);
      multiply_k8(sums[n + 1], a, b[1]);
    }
    if constexpr (N % 2 == 1) {
      uint32_t b[1];
      load_columns<1, 1, LIES_NK>(b, right, DEPTH - 1, first + N - 1, lane);
      multiply_k8(sums[N - 1], a, b[0]);
    }
  }
}

// Starts the copy of `length` rows of D bf16, `stride` elements apart, each warp its own rows; the other rows become 0.
template <int D>
__device__ __forceinline__ void copy_rows(const Tile<D>& tile, const uint16_t* source, int stride, int length) {
  constexpr int chunks = D / 8;
  const int lane = opaque(lane_index());
#pragma unroll
  for (int i = 0; i < chunks / 2; ++i) {
    const int at = 32 * i + lane, row = 16 * warp_index() + at / chunks, chunk = at % chunks;
    const bool present = row < length;
    copy_async(tile.at(row, chunk), source + (present ? row * stride + chunk * 8 : 0), present);
  }
}

// Four registers of each lane of a quad, transposed among its lanes: lane l gets register l of all four.
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4]) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const bool upper = lane_index() & mask;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = mask == 1 ? 2 * i : i, high = low + mask;
      const uint32_t received = shuffle_xor(upper ? r[low] : r[high], mask);
      r[low] = upper ? received : r[low];
      r[high] = upper ? r[high] : received;
    }
  }
}

struct alignas(16) Chunk {
  uint32_t words[4];
};

// Writes a warp's 16 rows of sums times factors, in bf16 and pieces of 16 bytes, to those of rows row .. that exist.
template <int TILES>
__device__ __forceinline__ void store_rows(
    const float (&sums)[TILES][4], float upper, float lower, uint16_t* target, int stride, int row, int length) {
  const int lane = opaque(lane_index());
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + lane / 4 + 8 * half;
    const float factor = half == 0 ? upper : lower;
#pragma unroll
    for (int n = 0; n < TILES; n += 4) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        r[i] = pack_bf16(sums[n + i][2 * half] * factor, sums[n + i][2 * half + 1] * factor);
      transpose_quad(r);
      if (at < length)
        *reinterpret_cast<Chunk*>(target + at * stride + 8 * (n + lane % 4)) = {{r[0], r[1], r[2], r[3]}};
    }
  }
}
