// A thread block on the host: the CUDA primitives that the kernels use, run by fibers instead of hardware threads.
//
// Meant to expose mistakes, not to be fast. Threads switch only where the hardware synchronises, so a barrier that is
// missing shows as a wrong result; shared memory starts as NaN; an asynchronous copy turns its target into NaN at once
// and delivers at its wait, so reading too early, or loading over what others still read, gives NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

enum class Kind { none, block, warp, shuffle, load, product };

// Where threads wait for each other; `kind` tells two different collectives apart that met by mistake.
struct Meeting {
  int members = 0, arrived = 0;
  unsigned generation = 0;
  Kind kind = Kind::none;
};

struct Copy {
  unsigned char* target;
  uint64_t words[2];
};

struct Warp {
  Meeting meeting;
  uint32_t values[32][4];         // shuffles, and A operands of products
  uint32_t columns[32][2];        // B operands
  unsigned char rows[32][16];     // what each lane's offset held when that lane arrived
  float* sums[32];
};

struct Thread {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  int index = 0;
  bool begun = false, done = false;
  const Meeting* waits = nullptr;
  unsigned generation = 0;
  std::vector<std::vector<Copy>> groups;  // the last one is still open
};

constexpr size_t kStack = 128 << 10, kGuard = 256;

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting meeting;
  std::vector<uint64_t> shared;
  std::function<void()> body;
  jmp_buf scheduler;
  Thread* current = nullptr;
  int index = 0;
  bool mixed = false;
};

inline Block* block;
inline bool reversed;  // the last thread of the last warp runs first
inline std::mutex one_grid;

[[gnu::noinline]] inline void pause() {
  if (_setjmp(block->current->resume) == 0) _longjmp(block->scheduler, 1);
}

template <class Last>
void meet(Meeting& meeting, Kind kind, Last&& last) {
  if (meeting.arrived == 0) meeting.kind = kind;
  block->mixed |= meeting.kind != kind;
  if (++meeting.arrived == meeting.members) {
    last();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  Thread& self = *block->current;
  self.waits = &meeting;
  self.generation = meeting.generation;
  pause();
  self.waits = nullptr;
}

inline void enter() {
  block->body();
  block->current->done = true;
  _longjmp(block->scheduler, 1);
}

// False when the thread has ended or waits for others. Not inlined: its frame is where threads jump back to.
[[gnu::noinline]] inline bool runs(Thread& thread) {
  if (thread.done || (thread.waits != nullptr && thread.waits->generation == thread.generation)) return false;
  block->current = &thread;
  if (_setjmp(block->scheduler) != 0) return true;
  if (thread.begun) _longjmp(thread.resume, 1);
  thread.begun = true;
  setcontext(&thread.start);
  return true;
}

// Every thread goes as far as it can, warp after warp, so warps are as far apart as the barriers allow.
inline void run_block(int index) {
  const int count = static_cast<int>(block->threads.size());
  block->index = index;
  std::memset(block->shared.data(), 0xff, block->shared.size() * sizeof(uint64_t));
  for (int i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread.index = i;
    thread.begun = thread.done = false;
    thread.groups.assign(1, {});
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStack;
    makecontext(&thread.start, enter, 0);
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (int warp = 0; warp < count / 32; ++warp) {
      for (bool moved = true; moved;) {
        moved = false;
        for (int lane = 0; lane < 32; ++lane) {
          const int at = 32 * warp + lane;
          if (runs(block->threads[reversed ? count - 1 - at : at])) progress = moved = true;
        }
      }
    }
  }
  if (block->mixed) throw std::runtime_error("lanes of a warp met in different operations");
  for (Thread& thread : block->threads) {
    if (!thread.done) throw std::runtime_error("threads wait for each other at different places");
    for (const auto& group : thread.groups)
      if (!group.empty()) throw std::runtime_error("a block ends with copies under way");
  }
  const auto* guard = reinterpret_cast<const unsigned char*>(block->shared.data() + block->shared.size()) - kGuard;
  for (size_t i = 0; i < kGuard; ++i)
    if (guard[i] != 0xff) throw std::runtime_error("a write beyond the end of shared memory");
}

inline void run_grid(int blocks, int threads, size_t shared_bytes, std::function<void()> body) {
  const std::lock_guard<std::mutex> lock(one_grid);
  Block made;
  made.threads.resize(threads);
  made.warps.resize(threads / 32);
  made.meeting.members = threads;
  for (Thread& thread : made.threads) thread.stack = std::make_unique_for_overwrite<char[]>(kStack);
  for (Warp& warp : made.warps) warp.meeting.members = 32;
  made.shared.resize((shared_bytes + kGuard + 7) / 8);
  made.body = std::move(body);
  block = &made;
  for (int i = 0; i < blocks; ++i) run_block(i);
  block = nullptr;
}

inline Warp& warp() { return block->warps[block->current->index / 32]; }
inline int lane() { return block->current->index % 32; }

inline float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

// Round to nearest even; NaN as the device writes it.
inline uint32_t to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// mma.m16n8k8 and k16 (halves 1, 2), PTX ISA "Matrix fragments for mma": lane = 4 row + pair; a register of A is
// an 8x8 block in the order (0, 0), (8, 0), (0, 8), (8, 8), one of B is (0, 0), (8, 0) of [k, n].
inline void product(Warp& warp, int halves) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int half = 0; half < halves; ++half)
      for (int e = 0; e < 2; ++e) {
        const int k = 8 * half + 2 * (lane % 4) + e;
        for (int low = 0; low < 2; ++low)
          a[lane / 4 + 8 * low][k] = from_bf16(warp.values[lane][2 * half + low] >> 16 * e & 0xffff);
        b[k][lane / 4] = from_bf16(warp.columns[lane][half] >> 16 * e & 0xffff);
      }
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      float sum = 0;
      for (int k = 0; k < 8 * halves; ++k) sum += a[lane / 4 + 8 * (e / 2)][k] * b[k][2 * (lane % 4) + e % 2];
      warp.sums[lane][e] += sum;
    }
}

}  // namespace emulation

inline int thread_index() { return emulation::block->current->index; }
inline int block_index() { return emulation::block->index; }
inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(emulation::block->shared.data()); }

template <class T>
T& shared(uint32_t offset) {
  return *reinterpret_cast<T*>(shared_memory() + offset);
}
inline uint32_t opaque(uint32_t x) { return x; }

inline void sync_block() { emulation::meet(emulation::block->meeting, emulation::Kind::block, [] {}); }
inline void sync_warp() { emulation::meet(emulation::warp().meeting, emulation::Kind::warp, [] {}); }

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  auto& warp = emulation::warp();
  const int lane = emulation::lane();
  warp.values[lane][0] = value;
  emulation::meet(warp.meeting, emulation::Kind::shuffle, [] {});
  const uint32_t received = warp.values[lane ^ mask][0];
  emulation::meet(warp.meeting, emulation::Kind::shuffle, [] {});
  return received;
}
inline float shuffle_xor(float value, int mask) {
  return std::bit_cast<float>(shuffle_xor(std::bit_cast<uint32_t>(value), mask));
}

// Lane l gives the offset of row l % 8 of matrix l / 8; a row is read when its lane arrives, as no other lane's stores
// are sure to be seen before a sync_warp.
template <int MATRICES, bool TRANSPOSED>
void load_matrices(uint32_t (&registers)[MATRICES], uint32_t row) {
  auto& warp = emulation::warp();
  const int lane = emulation::lane();
  if (lane < 8 * MATRICES) std::memcpy(warp.rows[lane], shared_memory() + row, 16);
  emulation::meet(warp.meeting, emulation::Kind::load, [] {});
  for (int m = 0; m < MATRICES; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = TRANSPOSED ? 2 * (lane % 4) + e : lane / 4, c = TRANSPOSED ? lane / 4 : 2 * (lane % 4) + e;
      std::memcpy(&pair[e], warp.rows[8 * m + r] + 2 * c, 2);
    }
    registers[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  emulation::meet(warp.meeting, emulation::Kind::load, [] {});
}

inline void emulated_product(float (&sums)[4], const uint32_t* a, const uint32_t* b, int halves) {
  auto& warp = emulation::warp();
  const int lane = emulation::lane();
  std::memcpy(warp.values[lane], a, 8 * halves);
  std::memcpy(warp.columns[lane], b, 4 * halves);
  warp.sums[lane] = sums;
  emulation::meet(warp.meeting, emulation::Kind::product, [&warp, halves] { emulation::product(warp, halves); });
}
inline void multiply_k16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulated_product(sums, a, b, 2);
}
inline void multiply_k8(float (&sums)[4], const uint32_t (&a)[2], uint32_t b) { emulated_product(sums, a, &b, 1); }

inline void copy_async(uint32_t target, const void* source, bool present) {
  emulation::Copy copy{shared_memory() + target, {0, 0}};
  if (present) std::memcpy(copy.words, source, 16);
  std::memset(copy.target, 0xff, 16);
  emulation::block->current->groups.back().push_back(copy);
}
inline void copy_commit() { emulation::block->current->groups.emplace_back(); }
template <int PENDING>
void copy_wait() {
  auto& groups = emulation::block->current->groups;
  while (static_cast<int>(groups.size()) > PENDING + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.target, copy.words, 16);
    groups.erase(groups.begin());
  }
}
inline void prefetch(const void*) {}

inline uint32_t pack_bf16(float low, float high) { return emulation::to_bf16(low) | emulation::to_bf16(high) << 16; }
inline float unpack_bf16(uint16_t bits) { return emulation::from_bf16(bits); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
