// Finds races in shared memory: two threads at one byte, one of them writing, with no barrier between.
//
// Compiled with -fsanitize=thread, g++ and clang++ call a function in front of every access to memory. Here
// are those functions, in place of the sanitizer's own runtime, which knows CPU threads and not fibers. Of
// each byte of shared memory the last write and two reads are remembered, with the number of __syncthreads
// before them and the clock of their lane, which counts its __syncwarp. Shuffles and votes order nothing, as
// CUDA has it.
#pragma once

#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "fibers.h"

#ifndef __has_feature
#define __has_feature(name) 0
#endif

#if !defined(__SANITIZE_THREAD__) && !__has_feature(thread_sanitizer)

namespace cuda_on_host {

struct Races {  // nobody looks
  void start(const void*, size_t) {}
  void enter_warp(int) {}
  void leave_warp(int, uint32_t) {}
  std::string finish() { return ""; }
  static Races of_this_thread() { return {}; }
};

}  // namespace cuda_on_host

#else

#pragma GCC visibility push(hidden)

namespace cuda_on_host {

class Races {
 public:
  // Before a block of this thread of the CPU. What is thread_local in this library is its shared memory,
  // beside a few variables of these headers that kernels only read.
  CUDA_ON_HOST_UNSEEN void start(const void* dynamic_shared, size_t dynamic_size) {
    active_ = nullptr;
    dl_iterate_phdr(&Races::find_shared, this);
    if (bytes_.size() < size_) bytes_.resize(size_);
    of_bytes_ = bytes_.data();
    dynamic_ = reinterpret_cast<uintptr_t>(dynamic_shared), dynamic_size_ = dynamic_size;
    for (auto& clocks : clocks_) {
      for (uint32_t& clock : clocks) clock = 0;
    }
    for (int i = 0; i < kMost; ++i) clocks_[i][i % kWarp] = 1;
    is_pending_ = false;
    active_ = this;
  }

  // Around a __syncwarp: what a lane did before it comes before what the others of the mask do after it.
  CUDA_ON_HOST_UNSEEN void enter_warp(int thread) { left_[thread] = clocks_[thread][thread % kWarp]++; }
  CUDA_ON_HOST_UNSEEN void leave_warp(int thread, uint32_t mask) {
    int first = thread - thread % kWarp;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1) || first + lane == thread) continue;
      uint32_t& seen = clocks_[thread][lane];
      if (left_[first + lane] > seen) seen = left_[first + lane];
    }
  }

  static CUDA_ON_HOST_UNSEEN void note(const volatile void* address, size_t size, bool writes,
                                       bool is_atomic) {
    Races* races = active_;
    if (!races) return;
    active_ = nullptr;  // what is called from here is not of interest
    races->look(address, size, writes, is_atomic);
    active_ = races;
  }

  // What is wrong with the last write over another's, now that it is done; "" if it changed nothing.
  std::string finish() {
    return std::exchange(is_pending_, false) && value_at(place_) != value_ ? pending_ : "";
  }

  static Races& of_this_thread();

 private:
  static constexpr int kMost = 1024;

  struct Access {
    int thread = -1;
    uint64_t barriers = 0;  // of the block's life before it
    uint32_t clock = 0;
    bool is_atomic = false;
    Site site{};  // where the thread waited last
  };
  struct Byte {
    Access write, reads[2];  // the first reader since the barrier, and the last of the others
  };

  CUDA_ON_HOST_UNSEEN void look(const volatile void* address, size_t size, bool writes, bool is_atomic) {
    auto place = reinterpret_cast<uintptr_t>(address);
    bool is_shared = place >= begin_ && place < begin_ + size_;
    if (!(is_shared || is_pending_) || !Block::running()) return;
    Block& block = Block::current();
    int thread = block.thread();
    if (thread < 0) return;
    if (is_pending_) {
      if (auto text = finish(); !text.empty()) block.fail(text);
    }
    if (!is_shared) return;
    Access now{thread, block.barriers(), clocks_[thread][thread % kWarp], is_atomic, block.site()};
    for (; size > 0; --size, ++place) {
      Byte& byte = of_bytes_[place - begin_];
      if (is_race(byte.write, now)) {
        std::string text = describe(place, now, writes ? "writes" : "reads", byte.write, "wrote");
        if (!writes) block.fail(text);
        if (!is_pending_) is_pending_ = true, pending_ = text, place_ = place, value_ = value_at(place);
      }
      if (writes) {
        for (const Access& read : byte.reads) {
          if (is_race(read, now)) block.fail(describe(place, now, "writes", read, "read"));
        }
        byte.write = now;
      } else if (byte.reads[0].thread == thread || byte.reads[0].barriers != now.barriers) {
        byte.reads[0] = now;
      } else {
        byte.reads[1] = now;
      }
    }
  }

  CUDA_ON_HOST_UNSEEN bool is_race(const Access& before, const Access& now) const {
    if (before.thread < 0 || before.barriers != now.barriers || before.thread == now.thread) return false;
    if (before.is_atomic && now.is_atomic) return false;
    bool is_one_warp = before.thread / kWarp == now.thread / kWarp;
    return !is_one_warp || clocks_[now.thread][before.thread % kWarp] < before.clock;
  }

  static uint8_t value_at(uintptr_t place) { return *reinterpret_cast<const volatile uint8_t*>(place); }

  // "race: thread 3 after __syncthreads (topk.cu:80) writes byte 4 of dynamic_shared, which thread 9 read
  // ..."
  std::string describe(uintptr_t place, const Access& now, const char* does, const Access& before,
                       const char* did) const {
    auto who = [](const Access& access) {
      std::string text = "thread " + std::to_string(access.thread);
      return access.site.what ? text + " after " + access.site.what + Block::in(access.site) : text;
    };
    bool is_dynamic = place >= dynamic_ && place < dynamic_ + dynamic_size_;
    std::string where = is_dynamic ? "byte " + std::to_string(place - dynamic_) + " of dynamic_shared"
                                   : "static shared memory";
    return "race: " + who(now) + " " + does + " " + where + ", which " + who(before) + " " + did +
           ", and no barrier is between";
  }

  static int find_shared(dl_phdr_info* library, size_t, void* self) {
    bool is_mine = false;
    size_t size = 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const ElfW(Phdr) & part = library->dlpi_phdr[i];
      uintptr_t begin = library->dlpi_addr + part.p_vaddr;
      auto here = reinterpret_cast<uintptr_t>(&Races::find_shared);
      if (part.p_type == PT_LOAD) is_mine |= here >= begin && here < begin + part.p_memsz;
      if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (!is_mine) return 0;
    auto* races = static_cast<Races*>(self);
    races->begin_ = reinterpret_cast<uintptr_t>(library->dlpi_tls_data), races->size_ = size;
    return 1;
  }

  static thread_local Races* active_;  // null while nothing is to be noted

  uintptr_t begin_ = 0, size_ = 0, dynamic_ = 0, dynamic_size_ = 0;
  uint32_t clocks_[kMost][kWarp];  // of each thread, and what it knows of the other lanes
  uint32_t left_[kMost];           // a thread's own, at its last __syncwarp
  std::vector<Byte> bytes_;
  Byte* of_bytes_ = nullptr;
  bool is_pending_ =
      false;  // a write that is about to happen at place_, of which pending_ is to say if it changes value_
  std::string pending_;
  uintptr_t place_ = 0;
  uint8_t value_ = 0;
};

inline thread_local Races* Races::active_ = nullptr;

inline Races& Races::of_this_thread() {
  static thread_local Races* races = new Races;  // not in thread_local memory, which is what it watches
  return *races;
}

}  // namespace cuda_on_host

// ==== what the compiler calls ====

#define CUDA_ON_HOST_CALLED extern "C" inline CUDA_ON_HOST_UNSEEN __attribute__((used))

CUDA_ON_HOST_CALLED void __tsan_init() {}
CUDA_ON_HOST_CALLED void __tsan_func_entry(void*) {}
CUDA_ON_HOST_CALLED void __tsan_func_exit() {}

#define CUDA_ON_HOST_ACCESS(name, size, writes) \
  CUDA_ON_HOST_CALLED void __tsan_##name(void* p) { cuda_on_host::Races::note(p, size, writes, false); }
#define CUDA_ON_HOST_ACCESSES(size)                      \
  CUDA_ON_HOST_ACCESS(read##size, size, false)           \
  CUDA_ON_HOST_ACCESS(write##size, size, true)           \
  CUDA_ON_HOST_ACCESS(unaligned_read##size, size, false) \
  CUDA_ON_HOST_ACCESS(unaligned_write##size, size, true)
CUDA_ON_HOST_ACCESS(read1, 1, false)
CUDA_ON_HOST_ACCESS(write1, 1, true)
CUDA_ON_HOST_ACCESSES(2)
CUDA_ON_HOST_ACCESSES(4)
CUDA_ON_HOST_ACCESSES(8)
CUDA_ON_HOST_ACCESSES(16)
CUDA_ON_HOST_CALLED void __tsan_read_range(void* p, size_t size) {
  cuda_on_host::Races::note(p, size, false, false);
}
CUDA_ON_HOST_CALLED void __tsan_write_range(void* p, size_t size) {
  cuda_on_host::Races::note(p, size, true, false);
}
CUDA_ON_HOST_CALLED void __tsan_vptr_update(void*, void*) {}
CUDA_ON_HOST_CALLED void __tsan_vptr_read(void*) {}

#define CUDA_ON_HOST_FETCH(bits, name)                                                                       \
  CUDA_ON_HOST_CALLED uint##bits##_t __tsan_atomic##bits##_##name(volatile void* p, uint##bits##_t v, int) { \
    cuda_on_host::Races::note(p, bits / 8, true, true);                                                      \
    return __atomic_##name(static_cast<volatile uint##bits##_t*>(p), v, __ATOMIC_SEQ_CST);                   \
  }
#define CUDA_ON_HOST_EXCHANGE(bits, name, is_weak)                                                           \
  CUDA_ON_HOST_CALLED bool __tsan_atomic##bits##_compare_exchange_##name(volatile void* p, void* expected,   \
                                                                         uint##bits##_t v, int, int) {       \
    cuda_on_host::Races::note(p, bits / 8, true, true);                                                      \
    return __atomic_compare_exchange_n(static_cast<volatile uint##bits##_t*>(p),                             \
                                       static_cast<uint##bits##_t*>(expected), v, is_weak, __ATOMIC_SEQ_CST, \
                                       __ATOMIC_SEQ_CST);                                                    \
  }
#define CUDA_ON_HOST_ATOMICS(bits)                                                                      \
  CUDA_ON_HOST_CALLED uint##bits##_t __tsan_atomic##bits##_load(const volatile void* p, int) {          \
    cuda_on_host::Races::note(p, bits / 8, false, true);                                                \
    return __atomic_load_n(static_cast<const volatile uint##bits##_t*>(p), __ATOMIC_SEQ_CST);           \
  }                                                                                                     \
  CUDA_ON_HOST_CALLED void __tsan_atomic##bits##_store(volatile void* p, uint##bits##_t v, int) {       \
    cuda_on_host::Races::note(p, bits / 8, true, true);                                                 \
    __atomic_store_n(static_cast<volatile uint##bits##_t*>(p), v, __ATOMIC_SEQ_CST);                    \
  }                                                                                                     \
  CUDA_ON_HOST_CALLED uint##bits##_t __tsan_atomic##bits##_exchange(volatile void* p, uint##bits##_t v, \
                                                                    int) {                              \
    cuda_on_host::Races::note(p, bits / 8, true, true);                                                 \
    return __atomic_exchange_n(static_cast<volatile uint##bits##_t*>(p), v, __ATOMIC_SEQ_CST);          \
  }                                                                                                     \
  CUDA_ON_HOST_FETCH(bits, fetch_add)                                                                   \
  CUDA_ON_HOST_FETCH(bits, fetch_sub)                                                                   \
  CUDA_ON_HOST_FETCH(bits, fetch_and)                                                                   \
  CUDA_ON_HOST_FETCH(bits, fetch_or)                                                                    \
  CUDA_ON_HOST_FETCH(bits, fetch_xor)                                                                   \
  CUDA_ON_HOST_EXCHANGE(bits, strong, false)                                                            \
  CUDA_ON_HOST_EXCHANGE(bits, weak, true)
CUDA_ON_HOST_ATOMICS(8)
CUDA_ON_HOST_ATOMICS(16)
CUDA_ON_HOST_ATOMICS(32)
CUDA_ON_HOST_ATOMICS(64)
CUDA_ON_HOST_CALLED void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#pragma GCC visibility pop

#endif
