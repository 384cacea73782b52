// The instructions that the kernels are made of, one function each, and nothing of any host header: NVRTC compiles
// this where no CUDA toolkit is installed. kernels/emulator has the same functions for a CPU.
#pragma once

using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;

// Storage of 16-bit floating-point numbers; arithmetic is float32.
struct Bf16 {
  u16 bits;
};
struct Fp16 {
  u16 bits;
};

#ifdef GD_EMULATOR
#include "primitives_emulated.h"
#else

#define GD_DEVICE __device__ __forceinline__
#define GD_SHARED(Type, name, count) __shared__ Type name[count]
#define GD_DYNAMIC_SHARED(Type, name) extern __shared__ __align__(128) Type name[]
// Kernels have C names and one argument, so that the host finds and calls each of them alike.
#define GD_KERNEL(name, Params, threads, blocks_per_sm, ...)                                                        \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name(const __grid_constant__ Params q) { \
    __VA_ARGS__(q);                                                                                                 \
  }

GD_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// What `x` was made of is forgotten, so that it is kept rather than made again.
GD_DEVICE void keep_in_register(u32& x) { asm volatile("" : "+r"(x)); }

// 16 bytes from global to shared memory; zeros where `inside` is false, and then nothing is read.
GD_DEVICE void copy_async_16(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

GD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
GD_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, transposed; lane l gives the address of row l % 8 of matrix l / 8.
GD_DEVICE void load_matrices_transposed(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// c [16 x 8] += left [16 x 16] right [16 x 8], float32 accumulation.
template <class Input>
GD_DEVICE void multiply_add(float (&c)[4], const u32 (&left)[4], u32 right0, u32 right1);

template <>
GD_DEVICE void multiply_add<Bf16>(float (&c)[4], const u32 (&left)[4], u32 right0, u32 right1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

template <>
GD_DEVICE void multiply_add<Fp16>(float (&c)[4], const u32 (&left)[4], u32 right0, u32 right1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// fmaxf and fminf would drop a NaN.
GD_DEVICE float larger(float a, float b) {
  float r;
  asm("max.NaN.f32 %0,%1,%2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

GD_DEVICE float smaller(float a, float b) {
  float r;
  asm("min.NaN.f32 %0,%1,%2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

template <class T>
GD_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

GD_DEVICE float from_bits(u32 bits) { return __uint_as_float(bits); }

GD_DEVICE float to_float(Fp16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}

GD_DEVICE void store(Fp16* to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
GD_DEVICE void store(Bf16* to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }

#endif  // GD_EMULATOR

GD_DEVICE float to_float(float x) { return x; }
GD_DEVICE float to_float(Bf16 x) { return from_bits(static_cast<u32>(x.bits) << 16); }
GD_DEVICE void store(float* to, float x) { *to = x; }

// x as it would be after a trip through T.
template <class T>
GD_DEVICE float rounded(float x) {
  T y;
  store(&y, x);
  return to_float(y);
}

GD_DEVICE float infinity() { return from_bits(0x7f800000u); }
GD_DEVICE float not_a_number() { return from_bits(0x7fc00000u); }
GD_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.4028234e38f; }

// Four neighbouring elements of a row, moved at once where the host found rows aligned for it.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Those from `count` on are outside the row: zeros.
template <class T>
GD_DEVICE void load_four(float (&x)[4], const T* from, int count, bool aligned) {
  if (aligned && count >= 4) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = to_float(four.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
GD_DEVICE void store_four(T* to, const float (&x)[4], int count, bool aligned) {
  if (aligned && count >= 4) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; i++) store(&four.at[i], x[i]);
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (i < count) store(to + i, x[i]);
  }
}
