// Threads that share a machine: work is offered to several threads, and none of them is waited for.
//
// The caller takes part and could do all of it. Who comes in time takes items from it; who comes late, or
// never, is not missed, because an item is nobody's before it is begun. Only an item that was begun is waited
// for, and a thread that loses its processor in the middle of one holds all others for some milliseconds. So
// that this is rare, a helper that has computed for a while steps aside between two items, where it holds
// nothing: another process that is owed the processor gets it then.
//
// No torch here: tests/ops/threads_driver.cpp runs it under a sanitizer.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "params/common.h"

namespace pyspec {

// What several threads do at once: called with 0 by the caller, and with a number of their own by helpers.
using Work = void (*)(void* context, int64_t thread);

// The helpers of this process. They begin when they are first wanted, sleep when there is nothing to do, and
// end with the process. A child of a fork, which has none of its parent's threads, has a pool of its own.
class Pool {
 public:
  static Pool& instance();

  // Runs work on this thread and on at most threads - 1 helpers; when it returns, no helper is in it. One
  // caller at a time has helpers, others work alone meanwhile. Work throws nothing but Left.
  void run(int64_t threads, Work work, void* context);

  // What a helper's rest throws when it comes back and the work is over; it ends in the pool.
  struct Left {};

  // Between two items, by a thread that took part: where a helper that has computed for long steps aside, and
  // where one that shares a processor with another of us finds one of its own.
  static void rest();

 private:
  void grow(int64_t helpers);
  void help(int64_t thread);
  uint64_t next_round(uint64_t last);
  bool enter(uint64_t round);
  void leave() { state_.fetch_sub(1, std::memory_order_release); }
  void part();

  std::atomic<uint64_t> state_{0};  // the round, whether it is open, and how many helpers are inside
  std::atomic<bool> taken_{false};
  int64_t helpers_ = 0;
  Work work_;  // of the round, and its threads
  void* context_;
  int64_t threads_;

  std::atomic<int64_t> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;

  static constexpr int64_t kSeen = 64;  // threads that look where the others are
  std::atomic<int32_t> processors_[kSeen];
};

// Runs body for every item, on the threads that come.
void share_items(int64_t threads, int64_t items, ParallelBody body, void* context);

// Runs a program of loops on the threads that come. Each runs all of it; what they share is the items of its
// loops, in share_items_of_program, where everyone waits until those of the loop are done. most_loops bounds
// the loops.
void share_program(int64_t threads, int64_t most_loops, void (*program)(void* context), void* context);
void share_items_of_program(int64_t items, ParallelBody body, void* context);

// Another way to run work on several threads, all of which it may wait for: torch's own, which are awake
// where torch has just used them, and would keep a pool's helpers from the processors. Items are shared among
// them unless one came late lately, a program has just been run, or this is a child of a fork, where they
// hang.
using Region = void (*)(int64_t threads, Work work, void* context);
void set_region(Region region);

}  // namespace pyspec
