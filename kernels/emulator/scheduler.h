// Runs the threads of one block on one CPU thread, each as a fiber that gives way only where it waits for others.
//
// Warps run in random order and in bursts of random length, so that one may be far ahead of another: what a missing
// barrier leaves to chance on a GPU comes out wrong here, and, the order being drawn from a seed, again and again.
#pragma once

#ifndef __x86_64__
#error "the emulator switches fibers in x86-64 assembly"
#endif

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <map>
#include <vector>

namespace emulator {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kMostThreads = 1024, kWarpSize = 32;
constexpr int kIdleTurns = 2000;  // turns in which nothing moved, after which nothing ever will

enum Fault { kNone = 0, kDeadlock = 1, kMisaligned = 2, kOutside = 3, kBadOperand = 4 };

// Of 16 bytes; null: of zeros.
struct Copy {
  void* to;
  const void* from;
};

typedef std::vector<std::function<void()>> Deferred;

struct Fiber {
  void* stack_pointer;
  char* stack;
  bool finished;
  std::vector<Copy> open;                  // copies of the group that is being collected
  std::vector<std::vector<Copy>> pending;  // committed groups, oldest first
  Deferred open_products;                  // of the group that is being collected
  std::vector<Deferred> pending_products;  // committed groups, oldest first
  Deferred stores;                         // to shared memory, seen by nobody yet
};

// Counts arrivals; `generation` moves on when all are there.
struct Barrier {
  int arrived, generation;
};

// One in shared memory (mbarrier): what its current phase still waits for, and copies that are under way.
struct PhaseBarrier {
  int arrivals, missing;
  long missing_bytes;
  uint32_t parity;
  Deferred copies;
};

struct Random {
  uint32_t state;
  uint32_t below(uint32_t limit) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % limit;
  }
};

struct Block {
  Fiber fibers[kMostThreads];
  void* scheduler_stack_pointer;
  int num_threads, current;
  void (*kernel)(const void*);
  const void* params;
  long progress;
  Barrier everyone, warps[kMostThreads / kWarpSize];
  char mailboxes[kMostThreads / kWarpSize][kWarpSize][32];
  std::map<uint32_t, PhaseBarrier> phase_barriers;  // by their addresses
  char* dynamic_shared;
  uint32_t shared_bytes;
  Fault fault;
  Random random;
  long bank_conflicts;
};

static Block block;

extern "C" void emulator_switch(void** save_to, void* continue_at);
asm(R"(
.text
.local emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline Fiber& current_fiber() { return block.fibers[block.current]; }

inline void give_way() { emulator_switch(&current_fiber().stack_pointer, block.scheduler_stack_pointer); }

// Lets others go first, for a turn.
inline void fall_behind() {
  block.progress++;
  give_way();
}

inline void wait_at(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.generation++;
  } else {
    while (barrier.generation == generation) give_way();
  }
  block.progress++;
}

inline void wait_for_warp() { wait_at(block.warps[block.current / kWarpSize], kWarpSize); }

// Every lane gets every lane's value.
template <class T>
inline void exchange(const T& mine, T (&all)[kWarpSize]) {
  static_assert(sizeof(T) <= 32, "a mailbox holds 32 bytes");
  auto& boxes = block.mailboxes[block.current / kWarpSize];
  memcpy(boxes[block.current % kWarpSize], &mine, sizeof(T));
  wait_for_warp();
  for (int lane = 0; lane < kWarpSize; lane++) memcpy(&all[lane], boxes[lane], sizeof(T));
  wait_for_warp();
}

static void fiber_main() {
  block.kernel(block.params);
  current_fiber().finished = true;
  block.progress++;
  give_way();
  abort();  // a finished fiber is never continued
}

inline void prepare_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = static_cast<char*>(aligned_alloc(64, kStackBytes));
  fiber.finished = false;
  fiber.open.clear();
  fiber.pending.clear();
  fiber.open_products.clear();
  fiber.pending_products.clear();
  fiber.stores.clear();
  // What the switch pops: six registers, then the address to go to. The null above it keeps the stack aligned as
  // after a call.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
}

// Lets every lane of a warp run until it waits; returns how many finished.
inline int run_warp(int warp) {
  int finished = 0;
  for (int i = warp * kWarpSize; i < (warp + 1) * kWarpSize && i < block.num_threads; i++) {
    if (block.fibers[i].finished) continue;
    block.current = i;
    threadIdx.x = i;
    emulator_switch(&block.scheduler_stack_pointer, block.fibers[i].stack_pointer);
    finished += block.fibers[i].finished;
  }
  return finished;
}

inline void run_block() {
  memset(&block.everyone, 0, sizeof block.everyone);
  memset(block.warps, 0, sizeof block.warps);
  block.phase_barriers.clear();
  for (int i = 0; i < block.num_threads; i++) prepare_fiber(block.fibers[i]);
  const int num_warps = (block.num_threads + kWarpSize - 1) / kWarpSize;
  int left = block.num_threads;
  for (int idle = 0; left > 0 && block.fault == kNone;) {
    const int warp = block.random.below(num_warps);
    const int turns = block.random.below(4) == 0 ? 400 : 1 + block.random.below(8);
    for (int turn = 0; turn < turns; turn++) {
      const long before = block.progress;
      left -= run_warp(warp);
      idle = block.progress == before ? idle + 1 : 0;
      if (idle > 0) break;
    }
    if (idle > kIdleTurns) block.fault = kDeadlock;
  }
}

}  // namespace emulator

// Runs a kernel's whole grid, block after block; returns a Fault.
extern "C" int gd_emulate(void (*kernel)(const void*), const void* params, unsigned grid_x, unsigned grid_y,
                          int num_threads, int shared_bytes, uint32_t seed) {
  using namespace emulator;
  block.random.state = seed;
  block.kernel = kernel;
  block.params = params;
  block.num_threads = num_threads;
  block.fault = kNone;
  block.bank_conflicts = 0;
  block.shared_bytes = shared_bytes;
  gridDim = {grid_x, grid_y};
  block.dynamic_shared = static_cast<char*>(aligned_alloc(128, (shared_bytes + 255) / 128 * 128));
  for (blockIdx.y = 0; blockIdx.y < grid_y && block.fault == kNone; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < grid_x && block.fault == kNone; blockIdx.x++) {
      // What was never written must not look like a small number: 0x7f7f is 3.4e38 as bf16, and not a number as fp16.
      memset(block.dynamic_shared, 0x7f, shared_bytes);
      run_block();
    }
  free(block.dynamic_shared);
  return block.fault;
}

// How often lanes of the last launch's ldmatrix reads met in one bank.
extern "C" long gd_bank_conflicts() { return emulator::block.bank_conflicts; }
