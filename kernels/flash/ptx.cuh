// Instructions that C++ has no words for, each behind a function; `reader.cu` is written in these alone, so
// that a host can stand in for them (tests/support/reader_on_host.cpp) and the rest be tested without a GPU.

#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };

#define DEVICE __device__ __forceinline__

// c += a b of 16 x 16 and 16 x 8 float16 numbers, with sums in float32. Of lane (g, t) = (lane / 4, lane % 4):
// a0, a2 row g and a1, a3 row g + 8, columns 2t, 2t + 1 (a2, a3: + 8); b0, b1 column g, rows 2t, 2t + 1 (b1:
// + 8); c0, c1 row g and c2, c3 row g + 8, columns 2t, 2t + 1.
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four of the eight bytes of b, a (those of a are 0 to 3), by the hexadecimal digits of `which`, last first.
DEVICE u32 bytes(u32 a, u32 b, u32 which) {
  u32 x;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(which));
  return x;
}

// Two float16 numbers a word.
DEVICE u32 sub2(u32 a, u32 b) {
  u32 x;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}

DEVICE u32 mul2(u32 a, u32 b) {
  u32 x;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}

DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 x;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}

DEVICE u32 pack2(float low, float high) {
  u32 x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

// (x & mask) ^ flips, in one instruction.
DEVICE u32 masked(u32 x, u32 mask, u32 flips) {
  u32 y;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(y) : "r"(x), "r"(mask), "r"(flips));
  return y;
}

// The two e4m3 numbers in the low (half = 0) or the high half of a word.
DEVICE u32 from_e4m3(u32 a, int half) {
  u32 x;
  if (half == 0)
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l; }" : "=r"(x) : "r"(a));
  else
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h; }" : "=r"(x) : "r"(a));
  return x;
}

DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log_of_two(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Copies to shared memory that run on by themselves; of `some` bytes, what is left of the place becomes 0.
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void copy16(u8* to, const u8* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

DEVICE void copy16(u8* to, const u8* from, int some) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(some)
               : "memory");
}

DEVICE void copy8(u8* to, const u8* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

DEVICE void copy8(u8* to, const u8* from, int some) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(some)
               : "memory");
}

DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `N` of this thread's groups of copies are under way.
template <int N>
DEVICE void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE bool any_lane(bool x) { return __any_sync(0xFFFFFFFF, x); }
DEVICE float of_lane_across(float x, int mask) { return __shfl_xor_sync(0xFFFFFFFF, x, mask); }
DEVICE void wait_for_warp() { __syncwarp(); }
DEVICE void wait_for_block() { __syncthreads(); }

// A launch that began before the one in front of it has ended.
DEVICE void wait_for_launch_in_front() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
