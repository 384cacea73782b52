// The functions of kernels/cuda/primitives_sm90.cuh for a CPU. What runs beside the threads on a GPU runs at the last
// moment here, or at a random one: copies when somebody waits for them (some at once), products when their group is
// waited for. Stores that are not published stay with their thread. So a wait, an arrival or a fence that is missing,
// a wrong parity, swizzle or descriptor give wrong numbers or a deadlock.
//
// Of the fences only publish_stores can be missed here; begin_products, pin and publish_barriers do nothing.
#pragma once

#include "tensor_map.h"

extern "C" int gd_encode_tensor_map(void* map, int type, uint32_t rank, void* base, const uint64_t* sizes,
                                    const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                    int interleave, int swizzle, int l2_promotion, int fill) {
  return encode_tensor_map(map, type, rank, base, sizes, strides, box, element_strides, interleave, swizzle,
                           l2_promotion, fill);
}

inline int same_in_warp(int x) { return x; }
inline void synchronize_warp() { emulator::wait_for_warp(); }

template <int kRegisters>
inline void give_registers_back() {}
template <int kRegisters>
inline void take_registers() {}

inline emulator::PhaseBarrier& phase_barrier(u32 address) {
  at_shared_address(address + 7);
  return emulator::block.phase_barriers[address];
}

inline void make_barrier(u32 barrier, int arrivals) {
  phase_barrier(barrier) = emulator::PhaseBarrier{arrivals, arrivals, 0, 0, {}};
}

inline void publish_barriers() {}

inline void complete_phase_if_done(emulator::PhaseBarrier& b) {
  if (b.missing != 0 || b.missing_bytes != 0) return;
  b.parity ^= 1;
  b.missing = b.arrivals;
}

inline void arrive_and_expect(u32 barrier, u32 bytes) {
  emulator::PhaseBarrier& b = phase_barrier(barrier);
  b.missing--;
  b.missing_bytes += bytes;
  complete_phase_if_done(b);
  emulator::block.progress++;
}

inline void arrive(u32 barrier) { arrive_and_expect(barrier, 0); }

// Whoever waits lets one of the barrier's copies arrive now and then.
inline void wait_for_phase(u32 barrier, u32 parity) {
  emulator::PhaseBarrier& b = phase_barrier(barrier);
  while (b.parity == parity) {
    if (!b.copies.empty() && emulator::block.random.below(3) == 0) {
      b.copies.front()();
      b.copies.erase(b.copies.begin());
      complete_phase_if_done(b);
      emulator::block.progress++;
    } else {
      emulator::give_way();
    }
  }
  emulator::block.progress++;
}

inline void prefetch_map(const TensorMap*) {}

// Boxes and operands begin where the swizzle's pattern does (descriptors have a field for where they do not).
constexpr u32 kSwizzlePattern = 1024;

// The 128-byte swizzle, of addresses: the chunk of 16 bytes (bits 4 to 6) xor the row of 128 bytes (bits 7 to 9).
inline u32 swizzled_address(u32 address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(u32 to, const EmulatedTensorMap& map, int col, int row) {
  for (u32 r = 0; r < map.box_rows; r++)
    for (u32 c = 0; c < map.box_cols; c++) {
      const u64 from_row = static_cast<u64>(row) + r, from_col = static_cast<u64>(col) + c;
      u16 value = 0;
      if (from_row < map.rows && from_col < map.cols)
        memcpy(&value, map.base + from_row * map.row_bytes + from_col * 2, 2);
      memcpy(at_shared_address(swizzled_address(to + r * 128 + c * 2)), &value, 2);
    }
}

inline void copy_box_async(u32 to, const TensorMap* map, u32 barrier, int col, int row) {
  if (to % kSwizzlePattern) emulator::block.fault = emulator::kMisaligned;
  EmulatedTensorMap what;
  memcpy(&what, map, sizeof what);
  emulator::PhaseBarrier& b = phase_barrier(barrier);
  auto arrival = [=, &b] {
    copy_box(to, what, col, row);
    b.missing_bytes -= what.box_rows * what.box_cols * 2;
  };
  if (emulator::block.random.below(3) == 0) {
    arrival();
    complete_phase_if_done(b);
  } else {
    b.copies.push_back(arrival);
  }
}

inline void store_zeros_16(u32 to) {
  emulator::current_fiber().stores.push_back([to] { memset(at_shared_address(to), 0, 16); });
}

// A lane may come late, as nothing but a barrier holds a warp together.
inline void publish_stores() {
  for (int turns = emulator::block.random.below(4) ? 0 : 64; turns > 0; turns--) emulator::fall_behind();
  auto& stores = emulator::current_fiber().stores;
  for (const auto& store : stores) store();
  stores.clear();
}

inline void begin_products() {}

inline void commit_products() {
  auto& fiber = emulator::current_fiber();
  fiber.pending_products.push_back(fiber.open_products);
  fiber.open_products.clear();
}

template <int kPending>
inline void wait_for_products() {
  auto& pending = emulator::current_fiber().pending_products;
  while (pending.size() > kPending) {
    for (const auto& product : pending.front()) product();
    pending.erase(pending.begin());
  }
}

template <int kCount>
inline void pin(float (&)[kCount]) {}

// A shared-memory operand of wgmma that lies token by token: swizzled by 128 bytes, 64 columns to a row of 128 bytes;
// `leading` bytes to the next 64 columns, `stride` to the next 8 tokens.
struct Operand {
  u32 start, leading, stride;

  explicit Operand(u64 descriptor)
      : start((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    const u64 rest = descriptor & ~0x00003fff3fff3fffull;
    if (rest != 1ull << 62 || start % kSwizzlePattern) emulator::block.fault = emulator::kBadOperand;
  }

  template <class Input>
  float at(int token, int col) const {
    const u32 address = start + col / 64 * leading + token / 8 * stride + token % 8 * 128 + col % 64 * 2;
    Input x;
    memcpy(&x, at_shared_address(swizzled_address(address)), 2);
    return widen(x);
  }
};

// wgmma.m64nNk16: lane l of warp w of the group holds rows 16 w + l/4 and + 8 of the result, at columns l%4*2 + {0, 1},
// + 8, + 16, ...
template <class Input, int kCols>
struct Product {
  static void start(float (&c)[kCols / 2], u64 left_side, u64 right_side, bool add) {
    float* acc = c;
    emulator::current_fiber().open_products.push_back(
        [=] { multiply(acc, Operand(left_side), Operand(right_side), add); });
  }

  static void multiply(float* c, const Operand& left, const Operand& right, bool add) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int i = 0; i < kCols / 2; i++) {
      const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = add ? c[i] : 0.0;
      for (int k = 0; k < 16; k++)
        sum += static_cast<double>(left.template at<Input>(k, row)) * right.template at<Input>(k, col);
      c[i] = static_cast<float>(sum);
    }
  }
};
