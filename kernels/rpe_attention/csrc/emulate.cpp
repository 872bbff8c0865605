// The kernels and their entry points for the host, on host pointers, and what tests of the emulation need.
#include "window.cu"

namespace {

// c [16, 8] = a [16, 8 halves] b [8 halves, 8], fp32 in and out, through shared memory as kernels do it: a and b are
// stored as written here (lies_nk: b as its transpose) and come to registers by ldmatrix.
void product_through_shared(const float* a, const float* b, float* c, int halves, int lies_nk) {
  const Tile<32> left{0}, right{Tile<32>::bytes};
  const int lane = lane_index(), depth = 8 * halves;
  for (int at = 2 * lane; at < 16 * depth; at += 64) left.store(at / depth, at % depth, pack_bf16(a[at], a[at + 1]));
  const int across = lies_nk ? depth : 8;
  for (int at = 2 * lane; at < depth * 8; at += 64) {
    const int row = at / across, column = at % across;
    const float low = lies_nk ? b[column * 8 + row] : b[at], high = lies_nk ? b[(column + 1) * 8 + row] : b[at + 1];
    right.store(row, column, pack_bf16(low, high));
  }
  sync_warp();
  float sums[1][4] = {};
  const Rows<Tile<32>> rows{left, 0};
  if (halves == 1 && lies_nk) multiply<1, true>(sums, rows, right);
  else if (halves == 1) multiply<1, false>(sums, rows, right);
  else if (lies_nk) multiply<2, true>(sums, rows, right);
  else multiply<2, false>(sums, rows, right);
  for (int e = 0; e < 4; ++e) c[(lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2] = sums[0][e];
}

// Two warps. Each fault is a mistake that a kernel could contain; without one (0) the result is 32 + 31.
void exchange(int fault, float* result) {
  float* const memory = reinterpret_cast<float*>(shared_memory());
  alignas(16) static const float source[4] = {31.f, 0.f, 0.f, 0.f};
  const int thread = thread_index();
  copy_async(4 * (64 + 4 * thread), source, true);
  copy_commit();
  memory[thread] = static_cast<float>(thread);
  if (fault != 1) sync_block();
  const float other = memory[(thread + 32) % 64];
  if (fault != 2 || thread != 0) copy_wait<0>();
  if (fault == 3 && thread < 5) sync_warp();
  if (fault == 4 && thread == 0) shuffle_xor(1u, 1);
  if (fault == 4 && thread != 0) sync_warp();
  if (fault == 5) memory[64 + 64 * 4 + thread] = 0.f;
  if (thread == 0) *result = other + memory[64];
  copy_wait<0>();
  if (fault == 6 && thread < 40) sync_block();
  if (fault == 7) copy_async(0, source, true);
}

}  // namespace

extern "C" {

// The last thread of the last warp runs first when reversed.
void rpe_emulate_order(int reversed) { emulation::reversed = reversed != 0; }

int rpe_emulate_product(const float* a, const float* b, float* c, int halves, int lies_nk) {
  return launch(product_through_shared, 1, 32, 2 * Tile<32>::bytes, 0, nullptr, a, b, c, halves, lies_nk);
}

int rpe_emulate_fault(int fault, float* result) {
  return launch(exchange, 1, 64, 64 * 4 + 64 * 16, 0, nullptr, fault, result);
}

}  // extern "C"
