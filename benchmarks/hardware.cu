// What a gather and a scatter-add can reach on this GPU, as CSV; hardware.py compiles and runs it.
//   load: loads of 16 or 8 bytes a lane that hit L1, or L2; a warp reads 32 / lanes rows
//   red:  red.global.add to such rows: v4, v2 and single floats, and pairs of bf16
// cycles: of one SM for one warp-wide instruction; of a load by clock64, of a red by its time at the nominal clock.
// step: of a load, bytes by which a row's place in its line moves on; of a red, bytes from a lane's piece to the next.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <cuda_runtime.h>

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s, line %d\n", cudaGetErrorString(error), line);
  exit(1);
}
#define CHECK(x) check(x, __LINE__)

__device__ __forceinline__ uint4 load(const char *p, bool l1) {
  uint4 v;
  if (l1) asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  else asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load8(const char *p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ unsigned hash(unsigned x) { x *= 0x9E3779B1u; return x ^ (x >> 15); }

// rows: a power of two; pitch: bytes between rows; lanes: of a row; offset: of the first byte in a row;
// turn: what row r adds to the offset, times (r % 4) (0: every row in the same sectors of its line)
template <int UNROLL, bool L1, bool WIDE>
__global__ void load_kernel(const char *base, int rows, int pitch, int lanes, int offset, int turn, int iters,
                            long long *cycles, unsigned *sink) {
  int lane = threadIdx.x & 31, warp = (blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int part = lane % lanes, group = lane / lanes;
  unsigned acc = 0, seed = hash(warp * 977u + group * 131u + 7u);
  const char *mine = base + offset + part * (WIDE ? 16 : 8) + turn * (group & 3);
  if (L1)  // all rows into the cache
    for (int i = threadIdx.x; i < rows * 4; i += blockDim.x)
      acc += load(base + (size_t)(i / 4) * pitch + (i % 4) * 32, true).x;
  __syncthreads();
  long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iters; i++) {
    uint4 v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      seed = seed * 1664525u + 1013904223u;
      const char *p = mine + (size_t)((seed >> 9) & (rows - 1)) * pitch;
      if (WIDE) v[u] = load(p, L1);
      else { uint2 w = load8(p); v[u] = make_uint4(w.x, w.y, 0, 0); }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) acc ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
  if (acc == 0x12345) *sink = acc;
}

#define RED(TYPE, NUMBERS, X) \
  asm volatile("red.global.relaxed.gpu.add." TYPE " [%0], " NUMBERS ";" ::"l"(p), X : "memory")

// kind 0: v4.f32, 1: v2.f32, 2: f32, 3: v4.bf16x2, 4: bf16x2; gap: bytes from a lane's piece to the next
template <int KIND>
__global__ void red_kernel(char *base, int rows, int pitch, int lanes, int gap, int iters) {
  int lane = threadIdx.x & 31, warp = (blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int part = lane % lanes, group = lane / lanes;
  unsigned seed = hash(warp * 977u + group * 131u + 7u);
  char *mine = base + part * gap;
#pragma unroll 1
  for (int i = 0; i < iters; i++) {
    seed = seed * 1664525u + 1013904223u;
    char *p = mine + (size_t)((seed >> 9) & (rows - 1)) * pitch;
    float x = 1.0f;
    if (KIND == 2) RED("f32", "%1", "f"(x));
#if __CUDA_ARCH__ >= 900
    if (KIND == 0) RED("v4.f32", "{%1,%1,%1,%1}", "f"(x));
    if (KIND == 1) RED("v2.f32", "{%1,%1}", "f"(x));
    if (KIND == 3) RED("noftz.v4.bf16x2", "{%1,%1,%1,%1}", "r"(0x3f803f80));
    if (KIND == 4) RED("noftz.bf16x2", "%1", "r"(0x3f803f80));
#endif
  }
}

int main() {
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  int sms = prop.multiProcessorCount, khz = 0;
  CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0));
  setvbuf(stdout, nullptr, _IOLBF, 0);  // each line when it is known
  printf("experiment,name,rows,pitch,lanes,step,cycles,gb_per_s,card,sms,mhz\n");
  char *buffer;
  size_t size = 256u << 20;
  CHECK(cudaMalloc(&buffer, size + 4096));
  CHECK(cudaMemset(buffer, 0, size + 4096));
  long long *cycles;
  unsigned *sink;
  CHECK(cudaMalloc(&cycles, 8 * 4096));
  CHECK(cudaMalloc(&sink, 4));
  cudaEvent_t a, b;
  CHECK(cudaEventCreate(&a));
  CHECK(cudaEventCreate(&b));
  std::vector<long long> host(4096);
  auto row = [&](const char *experiment, const char *name, int rows, int pitch, int lanes, int step, double cycles,
                 double gb_per_s) {
    printf("%s,%s,%d,%d,%d,%d,%.2f,%.0f,", experiment, name, rows, pitch, lanes, step, cycles, gb_per_s);
    printf("%s,%d,%d\n", prop.name, sms, khz / 1000);
  };
  auto loads = [&](const char *name, bool l1, bool wide, int rows, int pitch, int lanes, int offset, int turn) {
    const int UNROLL = 4, iters = 256, threads = 1024, per_sm = 2;
    auto kernel = l1 ? (wide ? load_kernel<UNROLL, true, true> : load_kernel<UNROLL, true, false>)
                     : load_kernel<UNROLL, false, true>;
    float ms = 0;
    int blocks = sms * per_sm;
    for (int r = 0; r < 3; r++) {
      CHECK(cudaEventRecord(a));
      kernel<<<blocks, threads>>>(buffer, rows, pitch, lanes, offset, turn, iters, cycles, sink);
      CHECK(cudaGetLastError());
      CHECK(cudaEventRecord(b));
      CHECK(cudaDeviceSynchronize());
      CHECK(cudaEventElapsedTime(&ms, a, b));
    }
    CHECK(cudaMemcpy(host.data(), cycles, 8 * blocks, cudaMemcpyDeviceToHost));
    double mean = 0;
    for (int i = 0; i < blocks; i++) mean += (double)host[i] / blocks;
    double instructions = (double)UNROLL * iters * (threads / 32) * per_sm;  // of one SM
    double bytes = instructions * 32 * (wide ? 16 : 8);
    row("load", name, rows, pitch, lanes, turn, mean / instructions, bytes * sms / ms / 1e6);
  };
  // 128 lines of 128 bytes, 16 KiB: everything hits L1
  loads("L1 coalesced 512B", true, true, 32, 512, 32, 0, 0);
  loads("L1 4 rows x 128B", true, true, 128, 128, 8, 0, 0);
  loads("L1 8 rows x 64B same half", true, true, 128, 128, 4, 0, 0);
  loads("L1 8 rows x 64B halves mixed", true, true, 256, 64, 4, 0, 0);
  loads("L1 8 rows x 64B pitch 512", true, true, 128, 512, 4, 64, 0);
  loads("L1 16 rows x 32B same sector", true, true, 128, 128, 2, 0, 0);
  loads("L1 16 rows x 32B sectors mixed", true, true, 128, 128, 2, 0, 32);
  loads("L1 16 rows x 32B pitch 512", true, true, 128, 512, 2, 64, 0);
  loads("L1 32 rows x 16B same place", true, true, 128, 128, 1, 0, 0);
  loads("L1 8B: 8 rows x 32B same sector", true, false, 128, 128, 4, 0, 0);
  loads("L1 8B: 4 rows x 64B same half", true, false, 128, 128, 8, 0, 0);
  loads("L1 8B: 16 rows x 16B", true, false, 128, 128, 2, 0, 0);
  // 16 MiB of rows, past L1
  loads("L2 4 rows x 128B", false, true, 1 << 17, 128, 8, 0, 0);
  loads("L2 8 rows x 64B pitch 512", false, true, 1 << 15, 512, 4, 64, 0);
  loads("L2 16 rows x 32B pitch 512", false, true, 1 << 15, 512, 2, 64, 0);
  auto reds = [&](const char *name, int kind, int rows, int pitch, int lanes, int gap, int piece) {
    const int iters = 128, threads = 256, blocks = sms * 8;
    if (kind != 2 && prop.major < 9) return;  // only single floats before sm_90
    void (*kernels[])(char *, int, int, int, int, int) = {red_kernel<0>, red_kernel<1>, red_kernel<2>, red_kernel<3>,
                                                          red_kernel<4>};
    float ms = 0;
    for (int r = 0; r < 2; r++) {
      CHECK(cudaEventRecord(a));
      kernels[kind]<<<blocks, threads>>>(buffer, rows, pitch, lanes, gap, iters);
      CHECK(cudaGetLastError());
      CHECK(cudaEventRecord(b));
      CHECK(cudaDeviceSynchronize());
      CHECK(cudaEventElapsedTime(&ms, a, b));
    }
    double n = (double)iters * threads * blocks;
    row("red", name, rows, pitch, lanes, gap, ms * khz * sms / (n / 32), n * piece / ms / 1e6);
  };
  for (int rows : {1 << 18, 1 << 14, 1 << 10, 1 << 8}) {  // rows of 128 bytes, 32 MiB down to 32 KiB
    reds("v4 8 lanes 128B", 0, rows, 128, 8, 16, 16);
    reds("v4 4 lanes 64B", 0, rows, 128, 4, 16, 16);
    reds("v4 2 lanes 32B", 0, rows, 128, 2, 16, 16);
    reds("v4 2 lanes half sectors", 0, rows, 128, 2, 32, 16);
    reds("v4 4 lanes half sectors", 0, rows, 128, 4, 32, 16);
    reds("v2 16 lanes 128B", 1, rows, 128, 16, 8, 8);
    reds("f32 32 lanes 128B", 2, rows, 128, 32, 4, 4);
    reds("v4.bf16x2 4 lanes 64B", 3, rows, 64, 4, 16, 16);
    reds("v4.bf16x2 2 lanes 32B", 3, rows, 64, 2, 16, 16);
    reds("bf16x2 16 lanes 64B", 4, rows, 64, 16, 4, 4);
  }
  CHECK(cudaDeviceSynchronize());
  return 0;
}
