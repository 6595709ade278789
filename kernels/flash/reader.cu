// Decode over quantised caches in CUDA C++: `reader=cuda` of `flash`. It follows the plan that the Triton
// readers follow (`wide` has the planes, `device.part_bounds` the parts), fills the same slots, and is held
// against them. Compiled at run time (`compiled.py`) with
//
//   K_BITS, V_BITS  8 or 4, of a code         K_FP8, V_FP8  codes are e4m3
//   BLOCK           keys a tile of the plan   STAGES        tiles that a warp has under way, and the one it computes
//   WARPS           of a block                OVERLAP       1: launched before the launch in front has ended
//
// A block has one KV part of one head group of at most 16 heads, of size 128. Its warps take turns at tiles of
// 16 keys, and each reads by itself: its own copies to shared memory, maximum m, denominator l and numerator
// O; at the end the warps are merged. So nothing waits for another warp while memory is read.
//
// Memory is read in order: the 32 copies of 16 bytes of an instruction are 512 bytes in a row. (Lanes that
// copied what they need themselves, every fourth key's piece of a line, made L2 serve V twice: 4 sectors a key
// more, and L2 at 80 % of what it can.) In shared memory the pieces of a line change places by key (`placed`),
// so that eight lanes never read the same banks.
//
// Lane (g, t) = (lane / 4, lane % 4) of S = Q K^T has column g of K^T, which is key pi(g), and of each product
// of 16 dimensions four: which ones is free as long as Q has them in the same places. They are chosen so that
// a lane's numbers are 16 bytes in a row: dimensions 16 t + 4 w + 0 .. 3 of word w, and 64 more for the second
// half of the products (at 4 bits, of the high halves of the same bytes). Of O += P V a lane has dimensions
// 16 g .. 16 g + 15 (4 bits: 8 g .. 8 g + 7, and 64 more) of the four keys whose P it holds, again whole words.
//
// Numbers of a block are c d rounded to float16, as `expand=f16` has them. A byte under the exponent of 1024
// is 1024 + c. m follows the largest logit only when that is 2^8 times above it: P up to 256 is as exact in
// float16 as P up to 1, and O is rarely rescaled.

constexpr int D = 128;
constexpr int KW = D * K_BITS / 8, VW = D * V_BITS / 8;  // bytes of a key, of a value
constexpr int KEYS = 16;                   // of a warp's tile
constexpr int V_AT = KEYS * KW, K_SCALES_AT = V_AT + KEYS * VW;
constexpr int V_SCALES_AT = K_SCALES_AT + (K_FP8 ? 0 : KEYS * 8);
constexpr int TILE_BYTES = V_SCALES_AT + (V_FP8 ? 0 : KEYS * 8);
constexpr int GROUPS = D / 32 * 36;        // floats a row of O in shared memory: 4 more for every 32
constexpr float NO_LOGIT = -1.7e38f;       // below every logit, and finite
constexpr float ROOM = 8.0f;               // binary orders by which P may exceed 1
constexpr float LN_2 = 0.6931471805599453f;

// The two numbers 2 i and 2 i + 1 of four codes in a word: at 8 bits i = 0 is bytes 0, 2 and i = 1 bytes 1, 3;
// of e4m3 bytes 0, 1 and 2, 3.
template <bool FP8>
DEVICE u32 code_pair(u32 x, int i) {
  if constexpr (FP8) return from_e4m3(x, i);
  return sub2(masked(i ? x >> 8 : x, 0x00FF00FF, 0x64806480), 0x64806480);
}

// At 4 bits the same of the low (h = 0) or high halves of the bytes: 1024 + c, or 1024 + 16 c.
DEVICE u32 half_pair(u32 x, int i, int h) {
  x = i ? x >> 8 : x;
  if (h == 0) return sub2(masked(x, 0x000F000F, 0x64006400), 0x64086408);
  return fma2(masked(x, 0x00F000F0, 0x64006400), 0x2C002C00, 0xD480D480);  // / 16 - 72
}

struct Asked {
  const u16* q;
  const u8 *k_codes, *k_scales, *v_codes, *v_scales;
  const int *kv_len, *groups;
  float *out, *lse;
  i64 q_b, q_t, q_h;
  int tokens, keys, q_heads, kv_heads, ratio, q_ratio, q_shift, first_group, n_groups, group_size;
  int same_length, parts, tiles_a_part, slots;
  float logit_scale;
};

// Before anything that the launch in front may have written is read; again, it costs nothing.
DEVICE void begin_reading() {
#if OVERLAP
  wait_for_launch_in_front();
#endif
}

// Where in a tile of codes piece `piece` (of 16 bytes) of key `key` lies. 8 bits: key 0 .. 3 of every four
// change pieces by 0, 2, 4, 6, and every other four by 4 more. Of K lanes read keys j and j + 4 at once, pieces
// 0 .. 3 or 4 .. 7; of V keys 0 .. 3 of four, two pieces. 4 bits: two keys are a line of eight pieces.
DEVICE int placed_8(int key, int piece) { return key * 128 + (piece ^ (key & 3) << 1 ^ (key & 4)) * 16; }
DEVICE int placed_k4(int key, int piece) { return key / 2 * 128 + ((key & 1) * 4 + piece ^ (key & 4)) * 16; }
DEVICE int placed_v4(int key, int piece) { return key * 64 + (piece ^ (key & 2)) * 16; }

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) attend(const Asked a) {
  extern __shared__ __align__(16) u8 shared[];
  const int row_id = blockIdx.x;
  int sequence = 0;
  if (row_id >= a.tokens) sequence = row_id / a.tokens;
  const int token = a.tokens - 1 - (row_id - sequence * a.tokens);
  int kv_head = blockIdx.y, group = a.first_group;
  if (a.n_groups > 1) {
    group += kv_head % a.n_groups;
    kv_head /= a.n_groups;
  }
  const int part = blockIdx.z;
  int first_head = group * a.group_size;
  int size = min(a.group_size, a.ratio - first_head);
  if (a.group_size == 0) {
    begin_reading();
    first_head = a.groups[2 * group];
    size = a.groups[2 * group + 1];
  }
  const i64 row = (i64)sequence * a.tokens + token;
  int n_kv = a.same_length;
  if (n_kv < 0) {
    begin_reading();
    n_kv = a.kv_len[row];
  }
  if (n_kv < 0) return;

  // `device.part_bounds`
  const int tiles = (n_kv + BLOCK - 1) / BLOCK;
  int count, begin, end;
  if (a.tiles_a_part > 0) {
    count = max((tiles + a.tiles_a_part - 1) / a.tiles_a_part, 1);
    begin = part * a.tiles_a_part;
    end = begin + a.tiles_a_part;
  } else {
    count = min(a.parts, tiles);
    if (a.tiles_a_part < 0) {
      const int full = tiles / -a.tiles_a_part;
      const int most = max(max(min(a.parts / 2, 32), min(full, 64)), full / 2);
      const int shortest = a.tiles_a_part < -4 ? tiles / 2 : max(tiles / 2, min(tiles, a.parts / 2));
      count = min(min(a.parts, shortest), most);
      if (count > 32) count = count / 16 * 16;
    }
    count = max(count, 1);
    if ((i64)(part + 1) * tiles >> 32 == 0) {  // a division of 64 bits takes a tenth of a microsecond
      begin = (int)((u32)part * (u32)tiles / (u32)count);
      end = (int)((u32)(part + 1) * (u32)tiles / (u32)count);
    } else {
      begin = (int)((i64)part * tiles / count);
      end = (int)((i64)(part + 1) * tiles / count);
    }
  }
  begin = (int)min((i64)begin * BLOCK, (i64)n_kv);
  end = (int)min((i64)end * BLOCK, (i64)n_kv);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int pi_g = (g & 1) * 4 + (g >> 1);
  u8* const mine = shared + warp * STAGES * TILE_BYTES;
  const i64 head = ((i64)sequence * a.kv_heads + kv_head) * a.keys;
  const int first_key = begin + warp * KEYS;
  const int tiles_of_warp = first_key < end ? (end - first_key + WARPS * KEYS - 1) / (WARPS * KEYS) : 0;

  // Where this lane copies from, of its warp's first tile, and the first of its places in shared memory.
  const u8* k_from = a.k_codes + (head + first_key) * KW + 16 * lane;
  const u8* v_from = a.v_codes + (head + first_key) * VW + 16 * lane;
  const u8* scale_from = (lane < 16 ? a.k_scales : a.v_scales) + (head + first_key + lane % 16) * 8;
  int copied = 0, key_copied = first_key;
  // Of K and of V: copies a lane makes, keys of a copy, and which key and piece of it are this lane's.
  constexpr int K_COPIES = K_BITS / 2, V_COPIES = V_BITS / 2;
  constexpr int K_PIECES = KW / 16, V_PIECES = VW / 16;
  const int k_key = lane / K_PIECES, v_key = lane / V_PIECES;
  const int k_place = K_BITS == 8 ? placed_8(k_key, lane % K_PIECES) : placed_k4(k_key, lane % K_PIECES);
  const int v_place = V_BITS == 8 ? placed_8(v_key, lane % V_PIECES) : placed_v4(v_key, lane % V_PIECES);
  // Of copy j at 8 bits: four keys on, pieces change by 4 more.
  auto k_step = [](int j) { return K_BITS == 8 ? 64 * (j & 1) : 0; };
  auto v_step = [](int j) { return V_BITS == 8 ? 64 * (j & 1) : 0; };
  const bool has_scale = lane < 16 ? !K_FP8 : !V_FP8;
  const int scale_place = lane < 16 ? K_SCALES_AT + 8 * lane : V_SCALES_AT + 8 * (lane - 16);

  begin_reading();
#if OVERLAP
  let_next_launch_begin();
#endif
  auto copy_next = [&]() {
    if (copied < tiles_of_warp) {
      u8* const to = mine + copied % STAGES * TILE_BYTES;
      if (key_copied + KEYS <= end) {
#pragma unroll
        for (int j = 0; j < K_COPIES; ++j) copy16(to + j * 512 + (k_place ^ k_step(j)), k_from + j * 512);
#pragma unroll
        for (int j = 0; j < V_COPIES; ++j)
          copy16(to + V_AT + j * 512 + (v_place ^ v_step(j)), v_from + j * 512);
        if (has_scale) copy8(to + scale_place, scale_from);
      } else {
        // What lies behind the last key becomes 0: it may be NaN, and 0 * NaN is NaN.
        const int left = end - key_copied;
#pragma unroll
        for (int j = 0; j < K_COPIES; ++j) {
          const bool in = KEYS / K_COPIES * j + k_key < left;
          copy16(to + j * 512 + (k_place ^ k_step(j)), in ? k_from + j * 512 : a.k_codes, in ? 16 : 0);
        }
#pragma unroll
        for (int j = 0; j < V_COPIES; ++j) {
          const bool in = KEYS / V_COPIES * j + v_key < left;
          copy16(to + V_AT + j * 512 + (v_place ^ v_step(j)), in ? v_from + j * 512 : a.v_codes, in ? 16 : 0);
        }
        if (has_scale) {
          const bool in = lane % 16 < left;
          copy8(to + scale_place, in ? scale_from : lane < 16 ? a.k_scales : a.v_scales, in ? 8 : 0);
        }
      }
      k_from += WARPS * KEYS * KW;
      v_from += WARPS * KEYS * VW;
      scale_from += WARPS * KEYS * 8;
      key_copied += WARPS * KEYS;
      ++copied;
    }
    end_group();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) copy_next();

  // Q as operand A of the eight products of 16 dimensions.
  u32 q[8][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const u16* at = a.q + sequence * a.q_b + token * a.q_t;
    at += (i64)(kv_head * a.q_ratio + first_head - a.q_shift + g + 8 * r) * a.q_h + 16 * t;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      u32 x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      if (g + 8 * r < size) {
        const Words4 y = *(const Words4*)(at + 64 * h), z = *(const Words4*)(at + 64 * h + 8);
        x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w, x[4] = z.x, x[5] = z.y, x[6] = z.z, x[7] = z.w;
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        q[4 * h + w][r] = K_FP8 ? x[2 * w] : bytes(x[2 * w], x[2 * w + 1], 0x5410);
        q[4 * h + w][2 + r] = K_FP8 ? x[2 * w + 1] : bytes(x[2 * w], x[2 * w + 1], 0x7632);
      }
    }
  }
  float scale = a.logit_scale, v_scale = 1.0f;
  if (K_FP8) scale *= ((const float*)a.k_scales)[sequence * a.kv_heads + kv_head];
  if (V_FP8) v_scale = ((const float*)a.v_scales)[sequence * a.kv_heads + kv_head];

  float m[2] = {NO_LOGIT, NO_LOGIT}, l[2] = {0, 0};  // of rows g and g + 8
  float o[16][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
  // Of two scales in a word the one of this lane's block: twice, or one of each of two words.
  const u32 k_half = t >> 1 ? 0x3232 : 0x1010;
  const u32 v_half = (V_BITS == 8 ? g >> 1 & 1 : g >> 2) ? 0x7632 : 0x5410;
  // Of K piece t of key pi(g) (8 bits: and 4 more), of V the bytes of dimensions 16 g (4 bits: 8 g) of key t.
  const int k_at = K_BITS == 8 ? placed_8(pi_g, t) : placed_k4(pi_g, t);
  const int v_at = V_BITS == 8 ? placed_8(t, g) : placed_v4(t, g / 2) + g % 2 * 8;

#pragma unroll 1
  for (int i = 0; i < tiles_of_warp; ++i) {
    wait_for_groups<STAGES - 2>();
    // Every lane's copies have come, and every lane has read the tile whose place is filled next.
    wait_for_warp();
    copy_next();
    const u8* const tile = mine + i % STAGES * TILE_BYTES;

    // S: of column 2t key t of eight, of column 2t + 1 key 4 + t.
    float y[2][4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      y[s][0] = y[s][1] = y[s][2] = y[s][3] = 0;
      u32 x[4 * (K_BITS / 4)];
#pragma unroll
      for (int h = 0; h < K_BITS / 4; ++h) {
        const Words4 z = *(const Words4*)(tile + s * 8 * KW + (k_at ^ 64 * h));
        x[4 * h] = z.x, x[4 * h + 1] = z.y, x[4 * h + 2] = z.z, x[4 * h + 3] = z.w;
      }
      u32 d[2] = {0, 0};
      if (!K_FP8) {
        const Words2 z = *(const Words2*)(tile + K_SCALES_AT + (8 * s + pi_g) * 8);
        d[0] = bytes(z.x, z.x, k_half);
        d[1] = bytes(z.y, z.y, k_half);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          u32 b[2];
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            if (K_BITS == 8) b[u] = code_pair<K_FP8>(x[(4 * h + w) % (K_BITS / 4 * 4)], u);
            else b[u] = half_pair(x[w], u, h);
            if (!K_FP8) b[u] = mul2(b[u], d[h]);
          }
          mma(y[s], q[4 * h + w], b[0], b[1]);
        }
    }

    const int left = end - first_key - i * WARPS * KEYS;
    bool over = false;
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int c = 0; c < 4; ++c) y[s][c] *= scale;
    if (left < KEYS) {
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (8 * s + 4 * (c & 1) + t >= left) y[s][c] = -__int_as_float(0x7F800000);
    }
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(fmaxf(y[0][2 * r], y[0][2 * r + 1]), fmaxf(y[1][2 * r], y[1][2 * r + 1]));
      over = over || top[r] > m[r] + ROOM;
    }
    if (any_lane(over)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(top[r], of_lane_across(top[r], 1));
        top[r] = fmaxf(top[r], of_lane_across(top[r], 2));
        // Row by row: what other heads are in the tile must not change a bit.
        const float higher = top[r] > m[r] + ROOM ? top[r] : m[r];
        const float rescale = power_of_two(m[r] - higher);
        m[r] = higher;
        l[r] *= rescale;
#pragma unroll
        for (int j = 0; j < 16; ++j) o[j][2 * r] *= rescale, o[j][2 * r + 1] *= rescale;
      }
    }
    u32 p[4];
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float first = power_of_two(y[s][2 * r] - m[r]), second = power_of_two(y[s][2 * r + 1] - m[r]);
        l[r] += first + second;
        p[2 * s + r] = pack2(first, second);
      }

    // O: keys a = 8 s + t and b = a + 4.
    u32 x[2][2][V_BITS / 2], d[2][2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (V_BITS == 8) {
          const Words4 z = *(const Words4*)(tile + V_AT + (2 * s + e) * 512 + (v_at ^ 64 * e));
          x[s][e][0] = z.x, x[s][e][1] = z.y, x[s][e][V_BITS / 2 - 2] = z.z, x[s][e][V_BITS / 2 - 1] = z.w;
        } else {
          const Words2 z =
              *(const Words2*)(tile + V_AT + (2 * s + e) * 256 + v_at);
          x[s][e][0] = z.x, x[s][e][1] = z.y;
        }
      }
      if (!V_FP8) {
        const u8* const at = tile + V_SCALES_AT + (8 * s + t) * 8;
        if (V_BITS == 8) {
          const u32 first = *(const u32*)(at + 4 * (g >> 2)), second = *(const u32*)(at + 32 + 4 * (g >> 2));
          d[s][0] = bytes(first, second, v_half);
        } else {
          const Words2 first = *(const Words2*)at, second = *(const Words2*)(at + 32);
          d[s][0] = bytes(first.x, second.x, v_half);
          d[s][1] = bytes(first.y, second.y, v_half);
        }
      }
    }
#pragma unroll
    for (int w = 0; w < V_BITS / 2; ++w)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        // Numbers 4 w + 2 pair and the next one, of both keys: of e4m3 in turn, else two of each key.
        u32 z[2];
#pragma unroll
        for (int s = 0; s < 2; ++s)
          z[s] = bytes(x[s][0][w], x[s][1][w], V_FP8 ? (pair ? 0x7362 : 0x5140) : (pair ? 0x7632 : 0x5410));
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int h = 0; h < 8 / V_BITS; ++h) {
            u32 b[2];
#pragma unroll
            for (int s = 0; s < 2; ++s) {
              b[s] = V_BITS == 8 ? code_pair<V_FP8>(z[s], u) : half_pair(z[s], u, h);
              if (!V_FP8) b[s] = mul2(b[s], d[s][h]);
            }
            mma(o[8 * h + 4 * w + 2 * pair + u], p, b[0], b[1]);
          }
      }
  }

  // The warps are merged; their places in shared memory hold O, m and l now.
  wait_for_groups<0>();
  wait_for_block();
  float* const sums = (float*)shared;
  float* const tops = sums + WARPS * 16 * GROUPS;  // [2][16][WARPS]: m, l; then factors
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    l[r] += of_lane_across(l[r], 1);
    l[r] += of_lane_across(l[r], 2);
    if (g + 8 * r < size) {
      if (t == 0) {
        tops[(g + 8 * r) * WARPS + warp] = m[r];
        tops[(16 + g + 8 * r) * WARPS + warp] = l[r];
      }
      float* const at = sums + (warp * 16 + g + 8 * r) * GROUPS;
      // Of number j of O dimension n (2 t + c) + j, n = 16; at 4 bits n = 8, and 64 more from j = 8 on.
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int j = 0; j < 16; j += 4) {
          const int dim = V_BITS == 8 ? 16 * (2 * t + c) + j : 64 * (j / 8) + 8 * (2 * t + c) + j % 8;
          *(float4*)(at + dim + dim / 32 * 4) =
              make_float4(o[j][2 * r + c], o[j + 1][2 * r + c], o[j + 2][2 * r + c], o[j + 3][2 * r + c]);
        }
    }
  }
  wait_for_block();
  const i64 slot = (row * a.slots + part) * a.q_heads + kv_head * a.ratio + first_head;
  if (threadIdx.x < size) {
    float* const of = tops + threadIdx.x * WARPS;
    float top = NO_LOGIT, total = 0, factor[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, of[w]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      factor[w] = power_of_two(of[w] - top);
      total += of[16 * WARPS + w] * factor[w];
    }
    const bool empty = total == 0;
    const float inverse = v_scale / (empty ? 1.0f : total);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) of[w] = factor[w] * inverse;
    a.lse[slot + threadIdx.x] = empty ? -__int_as_float(0x7F800000) : (top + log_of_two(total)) * LN_2;
  }
  wait_for_block();
  if (part >= count) return;
  const int dim = threadIdx.x % D;
  for (int i = threadIdx.x / D; i < size; i += 32 * WARPS / D) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w)
      sum += tops[i * WARPS + w] * sums[(w * 16 + i) * GROUPS + dim + dim / 32 * 4];
    a.out[(slot + i) * D + dim] = sum;
  }
}
