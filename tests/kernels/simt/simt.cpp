// The scheduler of the emulated device. Blocks of a launch run one after the other, those of a
// cluster together; every CUDA thread is a fiber that runs until it waits for others.
//
// This file alone is compiled without sanitizers, so that they see what kernels do and nothing else.
// It tells them about the fibers and, for ThreadSanitizer, what orders what: a launch, barriers of
// blocks and clusters. Shuffles order nothing, as on the device, and neither does the order in which
// blocks happen to run: that is how races inside a block and between blocks are found.
#include "simt.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void**, const void*, size_t);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned);
[[gnu::weak]] void __tsan_switch_to_fiber(void*, unsigned);
[[gnu::weak]] void __tsan_acquire(void*);
[[gnu::weak]] void __tsan_release(void*);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char*, int);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char*, int);
[[gnu::weak]] void AnnotateIgnoreWritesBegin(const char*, int);
[[gnu::weak]] void AnnotateIgnoreWritesEnd(const char*, int);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

int arch = 90;

// 0, 1: warps in rising or falling order, each as far as it gets. From 2 on, a seed: even, any thread
// at every step; odd, warps by random priorities that change now and then, so that one runs far
// ahead of the others. Asynchronous copies arrive when they are waited for, which shows a missing
// wait, or (odd) at once, which shows a copy into what is still being read.
int schedule = 0;

namespace {

constexpr size_t kStack = 256 << 10;  // AddressSanitizer's frames are large
constexpr int kMaxThreads = 8 * 1024;

int max_shared() {  // of a block, as NVIDIA documents it
  if (arch == 90 || arch == 100) return 227 << 10;
  return arch == 80 || arch == 87 ? 163 << 10 : arch >= 80 ? 99 << 10 : 64 << 10;
}

enum class State { ready, at_barrier, at_cluster, at_shuffle, done };
constexpr const char* kNames[] = {"ready", "at __syncthreads", "at the cluster's barrier", "at a shuffle",
                                  "done"};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void *fake_stack = nullptr, *tsan = nullptr;
  State state = State::done;
  unsigned thread = 0, block = 0, warp = 0;  // in the block, in the cluster, in the cluster
  int line = 0, source = 0;
  unsigned mask = 0;
  bool arrived = false;        // at the cluster's barrier, and has not waited yet
  uint64_t arrived_phase = 0;  // and which turn of it
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  alignas(16) unsigned char value[16], result[16];
};

struct Block {
  unsigned char* shared = nullptr;
  unsigned live = 0, waiting = 0;
  int line = 0;
  uint64_t turn = 0;
  char order[2] = {};  // addresses that stand for the barrier's turns
};

struct Scheduler {
  Config config{};
  void (*call)(void*) = nullptr;
  void* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<std::vector<unsigned>> ready;  // fibers, by warp
  std::vector<unsigned> order;               // of warps
  std::vector<unsigned> arrived;             // lanes at a shuffle, by warp
  unsigned threads = 0, live = 0, at_cluster = 0;
  uint64_t phase = 0;
  char launched = 0, finished = 0, cluster_order[2] = {};
  int64_t first_block = 0;
  Fiber* current = nullptr;
  void *stack_pointer = nullptr, *fake_stack = nullptr, *tsan = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  uint64_t random = 1;
} s;

void release(char* place) {
  if (__tsan_release) __tsan_release(place);
}
void acquire(char* place) {
  if (__tsan_acquire) __tsan_acquire(place);
}

// Memory that the scheduler gets, fills and frees is nobody's access.
struct Unseen {
  Unseen() {
    if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unseen() {
    if (AnnotateIgnoreReadsEnd) AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0);
  }
};

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "SIMT error: %s; blocks from %lld, cluster of %d\n", what,
               static_cast<long long>(s.first_block), s.config.cluster);
  const Fiber* before = nullptr;
  int printed = 0;
  for (unsigned i = 0; i < s.threads && printed < 16; ++i) {
    const Fiber& f = s.fibers[i];
    if (before && before->state == f.state && before->line == f.line) continue;
    std::fprintf(stderr, "  from block %u, thread %u: %s, line %d, mask %08x\n", f.block, f.thread,
                 kNames[static_cast<int>(f.state)], f.line, f.mask);
    before = &f, ++printed;
  }
  std::abort();
}

uint64_t below(uint64_t n) {
  s.random ^= s.random << 13, s.random ^= s.random >> 7, s.random ^= s.random << 17;
  return s.random % n;
}

#if !defined(__x86_64__)
#error "the emulator switches stacks with x86-64 instructions"
#endif
[[gnu::naked, gnu::noinline]] void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

void to_scheduler() {
  Fiber& me = *s.current;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(s.tsan, 1);
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&me.fake_stack, s.stack, s.stack_size);
  switch_stack(&me.stack_pointer, s.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
}

void to_fiber(Fiber& f) {
  s.current = &f;
  threadIdx = {f.thread, 0, 0};
  blockIdx = {static_cast<unsigned>(s.first_block + f.block), 0, 0};
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(f.tsan, 1);
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&s.fake_stack, f.stack, kStack);
  switch_stack(&s.stack_pointer, f.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(s.fake_stack, nullptr, nullptr);
}

void wake(Fiber& f) {
  f.state = State::ready;
  s.ready[f.warp].push_back(static_cast<unsigned>(&f - s.fibers.data()));
}

void finish(Fiber& f) {
  if (!f.open.empty() || !f.groups.empty()) die("a thread ended with asynchronous copies under way");
  if (f.arrived) die("a thread ended between arriving at the cluster's barrier and waiting for it");
  f.state = State::done;
  --s.live;
  Block& b = s.blocks[f.block];
  if (b.waiting) die("a thread ended while others of its block wait at __syncthreads");
  if (--b.live == 0) {  // whoever still reaches into this block reads NaN, or freed memory
    Unseen unseen;
    std::memset(b.shared, 0xff, s.config.shared_bytes);
    std::free(b.shared);
    b.shared = nullptr;
  }
}

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &s.stack, &s.stack_size);
  for (;;) {
    acquire(&s.launched);
    s.call(s.body);
    release(&s.finished);
    finish(*s.current);
    to_scheduler();
  }
}

void start(Fiber& f) {
  if (f.stack) return;
  void* const pages = mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, 4096, PROT_NONE) != 0) die("no memory for a stack");
  f.stack = static_cast<char*>(pages) + 4096;  // below it a page that nothing may touch
  void** const top = reinterpret_cast<void**>(f.stack + kStack) - 2;
  *top = reinterpret_cast<void*>(&fiber_main);
  f.stack_pointer = top - 6;  // what switch_stack pops
  if (__tsan_create_fiber) f.tsan = __tsan_create_fiber(0);
}

Fiber& next() {
  const unsigned warps = static_cast<unsigned>(s.order.size());
  if (schedule >= 2 && schedule % 2 && below(256) == 0) {
    for (unsigned i = warps; i > 1; --i) std::swap(s.order[i - 1], s.order[below(i)]);
  }
  const unsigned from = schedule >= 2 && schedule % 2 == 0 ? below(warps) : 0;
  for (unsigned i = 0; i < warps; ++i) {
    std::vector<unsigned>& warp = s.ready[s.order[(from + i) % warps]];
    if (warp.empty()) continue;
    std::swap(schedule >= 2 ? warp[below(warp.size())] : schedule ? warp.back() : warp.front(), warp.back());
    Fiber& f = s.fibers[warp.back()];
    warp.pop_back();
    return f;
  }
  die("deadlock: threads are left and none can run");
}

void run_cluster() {
  const unsigned threads = s.config.threads, cluster = s.config.cluster;
  const unsigned warps = (threads + 31) / 32;
  s.at_cluster = 0, s.phase = 0, s.live = s.threads;
  for (unsigned b = 0; b < cluster; ++b) {
    Unseen unseen;
    Block& block = s.blocks[b];
    block.live = threads, block.waiting = 0, block.turn = 0;
    block.shared = static_cast<unsigned char*>(std::malloc(s.config.shared_bytes));
    std::memset(block.shared, 0xff, s.config.shared_bytes);
  }
  for (unsigned i = 0; i < s.threads; ++i) {
    // Other fibers than in the last block, which ThreadSanitizer would take for the same thread.
    Fiber& f = s.fibers[(i + 33 * (s.first_block / cluster)) % s.threads];
    f.thread = i % threads, f.block = i / threads, f.warp = f.block * warps + f.thread / 32;
    f.line = 0, f.mask = 0, f.arrived = false;
    start(f);
    wake(f);
  }
  while (s.live) to_fiber(next());
}

Fiber& lane_of(unsigned warp_start, unsigned lane) {  // by thread, since fibers are shuffled
  return s.fibers[(warp_start + lane + 33 * (s.first_block / s.config.cluster)) % s.threads];
}

}  // namespace

void run(const Config& config, void (*call)(void*), void* body) {
  const int64_t threads = int64_t{config.threads} * config.cluster;
  if (config.threads < 1 || config.threads > 1024 || config.cluster < 1 || threads > kMaxThreads ||
      config.blocks < 1 || config.blocks > INT32_MAX || config.blocks % config.cluster ||
      config.shared_bytes < 0 || config.shared_bytes > max_shared() || (config.cluster > 1 && arch < 90)) {
    die("a launch that no device accepts");
  }
  s.config = config, s.call = call, s.body = body;
  s.threads = static_cast<unsigned>(threads);
  s.random = schedule * 0x9e3779b97f4a7c15u + 1;
  const unsigned warps = (config.threads + 31) / 32 * config.cluster;
  if (s.fibers.empty()) s.fibers.resize(kMaxThreads), s.blocks.resize(8), s.ready.resize(kMaxThreads / 32);
  if (!s.tsan && __tsan_get_current_fiber) s.tsan = __tsan_get_current_fiber();
  s.order.resize(warps);
  for (unsigned i = 0; i < warps; ++i) s.order[i] = schedule == 1 ? warps - 1 - i : i, s.ready[i].reserve(32);
  s.arrived.assign(warps, 0);
  gridDim = dim3(static_cast<unsigned>(config.blocks)), blockDim = dim3(config.threads);
  release(&s.launched);
  for (s.first_block = 0; s.first_block < config.blocks; s.first_block += config.cluster) run_cluster();
  acquire(&s.finished);
}

unsigned char* shared_memory() { return s.blocks[s.current->block].shared; }
int lane() { return s.current->thread % 32; }
unsigned cluster_rank() { return s.current->block; }

void sync_block(int line) {
  Fiber& me = *s.current;
  Block& b = s.blocks[me.block];
  if (b.waiting && b.line != line) die("threads of one block wait at different __syncthreads");
  if (b.live != blockDim.x) die("__syncthreads after threads of the block have ended");
  char* const order = &b.order[b.turn & 1];
  release(order);
  me.state = State::at_barrier, me.line = b.line = line;
  if (++b.waiting == b.live) {
    b.waiting = 0, ++b.turn;
    for (unsigned i = 0; i < s.threads; ++i) {
      Fiber& f = s.fibers[i];
      if (f.block == me.block && f.state == State::at_barrier) wake(f);
    }
  }
  to_scheduler();
  acquire(order);
}

void shuffle(unsigned mask, const void* value, size_t bytes, int source, void* result, int line) {
  Fiber& me = *s.current;
  const unsigned lane = me.thread % 32;
  if (!(mask >> lane & 1)) die("a lane calls a shuffle whose mask lacks it");
  // Plain loops: an intercepted memcpy would be seen.
  for (size_t i = 0; i < bytes; ++i) me.value[i] = static_cast<const volatile unsigned char*>(value)[i];
  me.state = State::at_shuffle, me.line = line, me.mask = mask, me.source = source;
  if (((s.arrived[me.warp] |= 1u << lane) & mask) == mask) {
    const unsigned start = me.block * s.config.threads + me.thread / 32 * 32;
    for (unsigned l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      Fiber& f = lane_of(start, l);
      if (f.mask != mask || f.line != line) die("lanes of one mask are at different shuffles");
      const bool there = mask >> f.source & 1;
      for (size_t i = 0; i < 16; ++i) f.result[i] = there ? lane_of(start, f.source).value[i] : 0xff;
      wake(f);
    }
    s.arrived[me.warp] &= ~mask;
  }
  to_scheduler();
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(result)[i] = me.result[i];
}

void cluster_arrive(int line) {
  Fiber& me = *s.current;
  if (me.arrived) die("a thread arrives twice at the cluster's barrier");
  if (s.live != s.threads) die("the cluster's barrier after threads of it have ended");
  release(&s.cluster_order[s.phase & 1]);
  me.arrived = true, me.arrived_phase = s.phase, me.line = line;
  if (++s.at_cluster == s.threads) {
    s.at_cluster = 0, ++s.phase;
    for (unsigned i = 0; i < s.threads; ++i) {
      if (s.fibers[i].state == State::at_cluster) wake(s.fibers[i]);
    }
  }
}

void cluster_wait(int line) {
  Fiber& me = *s.current;
  if (!me.arrived) die("a thread waits at the cluster's barrier without having arrived");
  if (me.arrived_phase == s.phase) {
    me.state = State::at_cluster, me.line = line;
    to_scheduler();
  }
  me.arrived = false;
  acquire(&s.cluster_order[me.arrived_phase & 1]);
}

void* map_shared(void* own, unsigned rank) {
  const Fiber& me = *s.current;
  if (rank >= static_cast<unsigned>(s.config.cluster)) die("a rank beyond the cluster");
  // A block of a cluster may start late and end early: only a barrier tells that it is there.
  if (s.phase == 0) die("shared memory of another block before any barrier of the cluster");
  if (!s.blocks[rank].shared) die("shared memory of a block that has ended");
  return s.blocks[rank].shared + (static_cast<unsigned char*>(own) - s.blocks[me.block].shared);
}

namespace {
void arrive(const Copy& c) {
  if ((reinterpret_cast<uintptr_t>(c.to) | reinterpret_cast<uintptr_t>(c.from)) % c.bytes) {
    die("a misaligned asynchronous copy");
  }
  std::memcpy(c.to, c.from, c.bytes);  // intercepted, so that sanitizers see it
}
}  // namespace

void copy_async(void* to, const void* from, size_t bytes) {
  const Copy c{to, from, bytes};
  if (schedule % 2) {
    arrive(c);
  } else {
    s.current->open.push_back(c);
  }
}
void commit() {
  Fiber& me = *s.current;
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
void wait_prior(size_t groups) {
  Fiber& me = *s.current;
  while (me.groups.size() > groups) {
    for (const Copy& c : me.groups.front()) arrive(c);
    me.groups.erase(me.groups.begin());
  }
}

}  // namespace simt
