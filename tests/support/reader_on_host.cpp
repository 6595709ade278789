// Stands in for a GPU: runs `kernels/flash/reader.cu` on the CPU, a thread of the device as a fibre, with the
// functions of `ptx.cuh` in plain C++. Slow, and exact about what waits for what: copies to shared memory
// happen at once, or as late as the kernel's waits allow (`late`).
//
//   g++ -std=c++17 -O1 -shared -fPIC -DREADER='"..."' -DBITS=8 ... reader_on_host.cpp

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x, y, z; };

#define DEVICE static inline
#define __global__
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)
using std::max;
using std::min;
constexpr int THREADS = 32 * WARPS;

struct Copy { u8* to; const u8* from; int size, some; };
struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool done;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  long block_waits, warp_waits;
};
static Fibre fibres[THREADS];
static ucontext_t scheduler;
static int current;
static bool late;
static Index threadIdx, blockIdx;
u8 shared[1 << 18];

static void yield() { swapcontext(&fibres[current].context, &scheduler); }

static void wait_until_all(int first, int n, long Fibre::*waits) {
  const long mine = ++(fibres[current].*waits);
  for (;;) {
    bool all = true;
    for (int i = first; i < first + n; ++i) all = all && (fibres[i].done || fibres[i].*waits >= mine);
    if (all) return;
    yield();
  }
}
DEVICE void wait_for_warp() { wait_until_all(current / 32 * 32, 32, &Fibre::warp_waits); }
DEVICE void wait_for_block() { wait_until_all(0, THREADS, &Fibre::block_waits); }
DEVICE void wait_for_launch_in_front() {}
DEVICE void let_next_launch_begin() {}

static float floats[65536];
static float number(u16 bits) { return floats[bits]; }
static u16 rounded(float x) {
  const _Float16 y = (_Float16)x;
  u16 bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
template <class F>
static u32 both(F f) { return rounded(f(0)) | (u32)rounded(f(1)) << 16; }
static float half_of(u32 x, int i) { return number((u16)(x >> 16 * i)); }
DEVICE u32 sub2(u32 a, u32 b) { return both([&](int i) { return half_of(a, i) - half_of(b, i); }); }
DEVICE u32 mul2(u32 a, u32 b) { return both([&](int i) { return half_of(a, i) * half_of(b, i); }); }
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  return both([&](int i) { return half_of(a, i) * half_of(b, i) + half_of(c, i); });
}
DEVICE u32 pack2(float low, float high) { return rounded(low) | (u32)rounded(high) << 16; }
DEVICE u32 masked(u32 x, u32 mask, u32 flips) { return (x & mask) ^ flips; }
DEVICE u32 bytes(u32 a, u32 b, u32 which) {
  const unsigned long long ab = a | (unsigned long long)b << 32;
  u32 x = 0;
  for (int i = 0; i < 4; ++i) x |= (u32)(ab >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return x;
}
DEVICE u32 from_e4m3(u32 a, int half) {
  return both([&](int i) {
    const int code = a >> 16 * half >> 8 * i & 255, e = code >> 3 & 15, f = code & 7;
    const float size = (code & 127) == 127 ? NAN : e ? std::ldexp(8.0f + f, e - 10) : std::ldexp((float)f, -9);
    return code & 128 ? -size : size;
  });
}
DEVICE float power_of_two(float x) { return std::exp2(x); }
DEVICE float log_of_two(float x) { return std::log2(x); }
DEVICE float __int_as_float(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

static void do_copy(const Copy& c) {
  std::memset(c.to, 0, c.size);
  std::memcpy(c.to, c.from, c.some);
}
static void copy(u8* to, const u8* from, int size, int some) {
  if ((uintptr_t)to % size || (uintptr_t)from % size) std::abort();
  const Copy c = {to, from, size, some};
  if (late) fibres[current].open.push_back(c);
  else do_copy(c);
}
DEVICE void copy16(u8* to, const u8* from, int some = 16) { copy(to, from, 16, some); }
DEVICE void copy8(u8* to, const u8* from, int some = 8) { copy(to, from, 8, some); }
DEVICE void end_group() {
  fibres[current].groups.push_back(fibres[current].open);
  fibres[current].open.clear();
}
template <int N>
DEVICE void wait_for_groups() {
  auto& groups = fibres[current].groups;
  while (groups.size() > N) {
    for (const Copy& c : groups.front()) do_copy(c);
    groups.pop_front();
  }
}

// What lanes show each other; of two turns, since a lane may be one ahead.
static struct Shown { u32 a[4], b[2]; float x; bool flag; } shown[2][THREADS];
static long turn[THREADS];
template <class F>
static Shown* show(F fill) {
  Shown* all = shown[++turn[current] & 1];
  fill(all[current]);
  wait_for_warp();
  return all + current / 32 * 32;
}
DEVICE bool any_lane(bool x) {
  const Shown* all = show([&](Shown& s) { s.flag = x; });
  return std::any_of(all, all + 32, [](const Shown& s) { return s.flag; });
}
DEVICE float of_lane_across(float x, int mask) {
  return show([&](Shown& s) { s.x = x; })[(current % 32) ^ mask].x;
}
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const Shown* all = show([&](Shown& s) {
    std::copy(a, a + 4, s.a);
    s.b[0] = b0, s.b[1] = b1;
  });
  const int g = current % 32 / 4, t = current % 4;
  for (int r = 0; r < 2; ++r)
    for (int col = 0; col < 2; ++col) {
      float sum = c[2 * r + col];
      for (int k = 0; k < 16; ++k) {
        const Shown &left = all[4 * g + k % 8 / 2], &right = all[4 * (2 * t + col) + k % 8 / 2];
        sum += half_of(left.a[r + 2 * (k / 8)], k % 2) * half_of(right.b[k / 8], k % 2);
      }
      c[2 * r + col] = sum;
    }
}

#include READER

static Asked asked;
static void entry() {
  attend(asked);
  fibres[current].done = true;
  swapcontext(&fibres[current].context, &scheduler);
}

extern "C" void launch(const Asked* a, int x, int y, int z, int copies_are_late) {
  asked = *a;
  late = copies_are_late;
  for (int i = 0; i < 65536; ++i) {
    const u16 bits = (u16)i;
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    floats[i] = (float)h;
  }
  for (int block = 0; block < x * y * z; ++block) {
    blockIdx = {block % x, block / x % y, block / x / y};
    std::memset(shared, 0xFF, sizeof shared);
    for (int i = 0; i < THREADS; ++i) {
      Fibre& f = fibres[i];
      f.done = false, f.block_waits = f.warp_waits = 0;
      f.groups.clear(), f.open.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
    for (int left = THREADS; left > 0;) {
      left = 0;
      for (current = 0; current < THREADS; ++current) {
        if (fibres[current].done) continue;
        threadIdx = {current, 0, 0};
        swapcontext(&scheduler, &fibres[current].context);
        left += !fibres[current].done;
      }
    }
  }
}
