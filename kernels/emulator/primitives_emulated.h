// The functions of kernels/cuda/primitives.cuh for a CPU, to the letter of the PTX manual where it fixes which lane
// holds which element. Asynchronous copies are carried out as late as the waits allow, so that a missing wait shows.
// This checks indices, masks and synchronisation. It says nothing of speed, and a tensor core rounds otherwise.
#pragma once

#include <math.h>

struct EmulatedIndex {
  unsigned x, y;
};
static EmulatedIndex threadIdx, blockIdx, gridDim;

#include "scheduler.h"

#define GD_DEVICE inline
#define GD_SHARED(Type, name, count) static Type name[count]
#define GD_DYNAMIC_SHARED(Type, name) Type* name = reinterpret_cast<Type*>(emulator::block.dynamic_shared)
#define GD_KERNEL(name, Params, threads, blocks_per_sm, ...) \
  extern "C" void name(const void* params) { __VA_ARGS__(*static_cast<const Params*>(params)); }

inline int min(int a, int b) { return a < b ? a : b; }

inline void __syncthreads() { emulator::wait_at(emulator::block.everyone, emulator::block.num_threads); }

inline void must_be_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::block.fault = emulator::kMisaligned;
}

// Shared memory begins here: on no better boundary than kernels are promised.
constexpr u32 kSharedBegin = 128;

inline u32 shared_address(const void* p) {
  return static_cast<u32>(static_cast<const char*>(p) - emulator::block.dynamic_shared) + kSharedBegin;
}

inline void keep_in_register(u32&) {}

inline char* at_shared_address(u32 address) {
  const u32 place = address - kSharedBegin;
  if (place >= emulator::block.shared_bytes) {
    emulator::block.fault = emulator::kOutside;
    return emulator::block.dynamic_shared;
  }
  return emulator::block.dynamic_shared + place;
}

inline void copy_async_16(u32 to, const void* from, bool inside) {
  must_be_aligned(at_shared_address(to));
  must_be_aligned(from);
  emulator::current_fiber().open.push_back({at_shared_address(to), inside ? from : nullptr});
}

inline void commit_copies() {
  auto& fiber = emulator::current_fiber();
  fiber.pending.push_back(fiber.open);
  fiber.open.clear();
}

template <int kPending>
inline void wait_for_copies() {
  auto& pending = emulator::current_fiber().pending;
  while (pending.size() > kPending) {
    for (const emulator::Copy& copy : pending.front()) {
      if (copy.from)
        memcpy(copy.to, copy.from, 16);
      else
        memset(copy.to, 0, 16);
    }
    pending.erase(pending.begin());
  }
}

// Rows of one 8 x 8 matrix are read in one go: they must lie in eight different groups of four banks.
inline void count_bank_conflicts(const void* const (&rows)[32]) {
  for (int matrix = 0; matrix < 4; matrix++) {
    int seen = 0;
    for (int row = 0; row < 8; row++) seen |= 1 << reinterpret_cast<uintptr_t>(rows[matrix * 8 + row]) / 16 % 8;
    emulator::block.bank_conflicts += 8 - __builtin_popcount(seen);
  }
}

inline void load_matrices_transposed(u32 (&r)[4], u32 address) {
  const void *row = at_shared_address(address), *rows[32];
  must_be_aligned(row);
  emulator::exchange(row, rows);
  const int lane = threadIdx.x % 32;
  if (lane == 0) count_bank_conflicts(rows);
  for (int matrix = 0; matrix < 4; matrix++) {
    const u16* first = static_cast<const u16*>(rows[matrix * 8 + lane % 4 * 2]);
    const u16* second = static_cast<const u16*>(rows[matrix * 8 + lane % 4 * 2 + 1]);
    r[matrix] = first[lane / 4] | static_cast<u32>(second[lane / 4]) << 16;
  }
  emulator::wait_for_warp();
}

inline float from_bits(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(Fp16 x) {
  _Float16 half;
  memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}

inline void store(Fp16* to, float x) {
  const _Float16 half = static_cast<_Float16>(x);
  memcpy(&to->bits, &half, 2);
}

inline void store(Bf16* to, float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  // To nearest, ties to even; the addition would carry a NaN's mantissa into the sign.
  to->bits = x != x ? 0x7fff : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widen(Bf16 x) { return from_bits(static_cast<u32>(x.bits) << 16); }
inline float widen(Fp16 x) { return to_float(x); }

// mma.m16n8k16: lane l holds of the left matrix rows l/4 and l/4 + 8 at columns l%4*2 + {0, 1} and + 8, of the right
// one rows l%4*2 + {0, 1} and + 8 at column l/4, of the result rows l/4 and l/4 + 8 at columns l%4*2 + {0, 1}.
template <class Input>
inline void multiply_add(float (&c)[4], const u32 (&left)[4], u32 right0, u32 right1) {
  struct Fragments {
    u32 left[4], right[2];
  } mine, all[32];
  memcpy(mine.left, left, sizeof mine.left);
  mine.right[0] = right0;
  mine.right[1] = right1;
  emulator::exchange(mine, all);
  const int lane = threadIdx.x % 32;
  auto half = [](u32 pair, int which) { return widen(Input{static_cast<u16>(which ? pair >> 16 : pair)}); };
  for (int e = 0; e < 4; e++) {
    const int row = lane / 4, col = lane % 4 * 2 + e % 2;
    double sum = c[e];
    for (int k = 0; k < 16; k++) {
      const float l = half(all[row * 4 + k % 8 / 2].left[e / 2 + k / 8 * 2], k % 2);
      const float r = half(all[col * 4 + k % 8 / 2].right[k / 8], k % 2);
      sum += static_cast<double>(l) * r;
    }
    c[e] = static_cast<float>(sum);
  }
}

inline float larger(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
inline float smaller(float a, float b) { return a != a || b != b ? NAN : fminf(a, b); }

template <class T>
inline T shuffle_xor(T value, int mask) {
  T all[32];
  emulator::exchange(value, all);
  return all[threadIdx.x % 32 ^ mask];
}
