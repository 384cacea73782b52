// The instructions of sm_90a beyond primitives.cuh, one function each: the copy engine (TMA), barriers in shared
// memory (mbarrier), products by a warpgroup of 128 threads (wgmma). kernels/emulator has them for a CPU.
#pragma once

#include "primitives.cuh"

using u64 = unsigned long long;

// A CUtensorMap: where a matrix lies, and what box of it one copy takes. Made by the host, read by the copy engine.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

#ifdef GD_EMULATOR
#include "primitives_sm90_emulated.h"
#else

// The same value in all lanes of a warp, and known to the compiler to be.
GD_DEVICE int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

GD_DEVICE void synchronize_warp() { __syncwarp(); }

// The registers of each thread of a warpgroup, from here on; a multiple of 8.
template <int kRegisters>
GD_DEVICE void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
GD_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Barriers are 8 bytes of shared memory. A phase is complete after `arrivals` arrivals and as many bytes as were
// announced; then the next one begins.
GD_DEVICE void make_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers made before are seen by the copy engine after it.
GD_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

GD_DEVICE void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

GD_DEVICE void arrive_and_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is complete: 0 for the first, third, ... 1 for the second, ... Of a new barrier
// "the phase before the first", parity 1, counts as complete.
GD_DEVICE void wait_for_phase(u32 barrier, u32 parity) {
  u32 complete;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!complete);
}

GD_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Starts the copy of the map's box from column `col`, row `row` on to `to`; its bytes count towards `barrier`. What is
// outside the matrix becomes zeros.
GD_DEVICE void copy_box_async(u32 to, const TensorMap* map, u32 barrier, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(col), "r"(row)
      : "memory");
}

GD_DEVICE void store_zeros_16(u32 to) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};\n" ::"r"(to), "r"(0) : "memory");
}

// What this thread stored to shared memory before is seen by the copy engine and the products after it.
GD_DEVICE void publish_stores() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Accumulators may be written by products after it, and read by them what this thread wrote.
GD_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

GD_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most kPending of this warpgroup's committed groups are under way.
template <int kPending>
GD_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Products write accumulators behind the compiler's back: it must not move what reads or writes them across this.
template <int kCount>
GD_DEVICE void pin(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(acc[i])::"memory");
}

// Starts c [64 x kCols] = left^T right + (accumulate ? c : 0), left [16 x 64] and right [16 x kCols] in shared memory,
// each token by token (hence the two last ones: transpose both).
template <class Input, int kCols>
struct Product;

// Operands are numbered as in the text: the accumulators, then both descriptors and whether to accumulate.
#define GD_NAMES_0_31                                                                                              \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define GD_NAMES_32_63                                                                                             \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,"   \
  "%59,%60,%61,%62,%63"
#define GD_NAMES_64_95                                                                                             \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,"   \
  "%91,%92,%93,%94,%95"
#define GD_NAMES_96_127                                                                                            \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,"     \
  "%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define GD_FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define GD_THIRTY_TWO(i)                                                                                          \
  GD_FOUR(i), GD_FOUR(i + 4), GD_FOUR(i + 8), GD_FOUR(i + 12), GD_FOUR(i + 16), GD_FOUR(i + 20), GD_FOUR(i + 24), \
      GD_FOUR(i + 28)
#define GD_NAMES_192 GD_NAMES_0_31 "," GD_NAMES_32_63 "," GD_NAMES_64_95
#define GD_NAMES_256 GD_NAMES_192 "," GD_NAMES_96_127
#define GD_OPERANDS_192 GD_THIRTY_TWO(0), GD_THIRTY_TWO(32), GD_THIRTY_TWO(64)
#define GD_OPERANDS_256 GD_OPERANDS_192, GD_THIRTY_TWO(96)
#define GD_PRODUCT(Input, type, cols, left, right, accumulate)                                                \
  template <>                                                                                                 \
  struct Product<Input, cols> {                                                                               \
    static GD_DEVICE void start(float (&c)[cols / 2], u64 left_side, u64 right_side, bool add) {              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate                                             \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." type "." type " {" GD_NAMES_##cols \
                   "}, " left ", " right ", p, 1, 1, 1, 1;\n}\n"                                              \
                   : GD_OPERANDS_##cols                                                                       \
                   : "l"(left_side), "l"(right_side), "r"(static_cast<int>(add)));                            \
    }                                                                                                         \
  };

GD_PRODUCT(Bf16, "bf16", 192, "%96", "%97", "%98")
GD_PRODUCT(Fp16, "f16", 192, "%96", "%97", "%98")
GD_PRODUCT(Bf16, "bf16", 256, "%128", "%129", "%130")
GD_PRODUCT(Fp16, "f16", 256, "%128", "%129", "%130")

#endif  // GD_EMULATOR
