#include "threads.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <chrono>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace pyspec {
namespace {

// In nanoseconds.
constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond;
constexpr int64_t kSpin = 50 * kMicrosecond;          // that a thread waits for another without sleeping
constexpr int64_t kNap = 50 * kMicrosecond;           // that it sleeps then, again and again
constexpr int64_t kAwake = 200 * kMicrosecond;        // that a helper waits for work before it sleeps
constexpr int64_t kSlice = kMillisecond;              // that a helper computes before it steps aside
constexpr int64_t kStall = kMillisecond;              // that torch's threads may come late
constexpr int64_t kAfterProgram = 10 * kMillisecond;  // that the pool stays in use behind a program
constexpr int64_t kShortest = 100 * kMillisecond;     // that torch's threads are left after a stall
constexpr int64_t kLongest = 16 * kShortest;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void relax() {
#if __x86_64__
  __builtin_ia32_pause();
#elif __aarch64__
  asm volatile("yield");
#endif
}

// Whether done() came true within so many nanoseconds.
template <class Done>
bool spin(int64_t nanoseconds, Done done) {
  for (int64_t start = 0;;) {
    for (int turn = 0; turn < 64; ++turn) {
      if (done()) return true;
      relax();
    }
    const int64_t time = now();
    if (!start) start = time;
    if (time - start > nanoseconds) return false;
  }
}

// Returns when done() is true. Who is waited for may be without a processor, and can have this one.
template <class Done>
void wait_until(Done done) {
  while (!spin(kSpin, done)) std::this_thread::sleep_for(std::chrono::nanoseconds(kNap));
}

// ==== the pool ====

constexpr uint64_t kInside = 0xffff, kOpen = 0x10000, kRound = 0x20000;  // in its state

std::atomic<Pool*> the_pool{nullptr};

// Where this thread takes part: the pool, its number there, and of a helper the round and since when it
// computes.
struct Part {
  Pool* pool = nullptr;
  int64_t thread = 0;
  uint64_t round = 0;
  int64_t since = 0;
};
thread_local Part part_of_this;

}  // namespace

Pool& Pool::instance() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
  (void)registered;
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found) return *found;
  Pool* made = new Pool;  // for good: its helpers end with the process
  for (auto& processor : made->processors_) processor.store(-1, std::memory_order_relaxed);
  if (the_pool.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

void Pool::run(int64_t threads, Work work, void* context) {
  if (threads <= 1 || taken_.exchange(true, std::memory_order_acquire)) {
    const Part outer = std::exchange(part_of_this, Part{});  // who works alone need not rest
    work(context, 0);
    part_of_this = outer;
    return;
  }
  grow(std::min<int64_t>(threads - 1, kInside));
  work_ = work, context_ = context, threads_ = threads;
  state_.store((state_.load(std::memory_order_relaxed) / kRound + 1) * kRound + kOpen);
  if (asleep_.load()) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  Part outer = std::exchange(part_of_this, Part{this});
  work(context, 0);
  part_of_this = outer;
  state_.fetch_and(~kOpen, std::memory_order_relaxed);
  wait_until([&] { return !(state_.load(std::memory_order_acquire) & kInside); });
  taken_.store(false, std::memory_order_release);
}

void Pool::grow(int64_t helpers) {
  try {
    for (; helpers_ < helpers; ++helpers_)
      std::thread([this, thread = helpers_ + 1] { help(thread); }).detach();
  } catch (const std::system_error&) {  // the system has no more threads to give: there is work for fewer
  }
}

bool Pool::enter(uint64_t round) {
  uint64_t state = state_.load(std::memory_order_relaxed);
  while (state / kRound == round && (state & kOpen)) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) return true;
  }
  return false;
}

void Pool::help(int64_t thread) {
  Part& part = part_of_this = Part{this, thread, 0, now()};
  for (;;) {
    part.round = next_round(part.round);
    if (!enter(part.round)) continue;
    try {
      if (thread < threads_) work_(context_, thread);
      leave();
    } catch (const Left&) {
    }
  }
}

uint64_t Pool::next_round(uint64_t last) {
  uint64_t state;
  auto found = [&] {
    state = state_.load();
    return state / kRound != last && (state & kOpen);
  };

  if (spin(kAwake, found)) return state / kRound;
  std::unique_lock<std::mutex> lock(mutex_);
  asleep_.fetch_add(1);
  wake_.wait(lock, found);
  asleep_.fetch_sub(1);
  part_of_this.since = now();
  return state / kRound;
}

void Pool::rest() {
  Part& part = part_of_this;
  if (!part.pool) return;
  part.pool->part();
  if (part.thread == 0 || now() - part.since < kSlice) return;
  part.pool->leave();
  std::this_thread::yield();
  part.since = now();
  if (!part.pool->enter(part.round)) throw Left{};
}

// Linux wakes a helper where its caller computes, and may leave both there beside a processor that is busy
// with something else: each processor has something to do, and it is fair to threads, not to processors.
void Pool::part() {
#ifdef __linux__
  const int64_t thread = part_of_this.thread;
  if (thread >= kSeen) return;
  const int32_t here = sched_getcpu();
  if (processors_[thread].load(std::memory_order_relaxed) != here)
    processors_[thread].store(here, std::memory_order_relaxed);
  bool is_shared = false;
  for (int64_t i = 0; i < thread; ++i) is_shared |= processors_[i].load(std::memory_order_relaxed) == here;
  if (!is_shared) return;
  cpu_set_t allowed, others;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  others = allowed;
  for (int64_t i = 0; i < thread; ++i) {
    const int32_t processor = processors_[i].load(std::memory_order_relaxed);
    if (processor >= 0 && processor < CPU_SETSIZE) CPU_CLR(processor, &others);
  }
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others)) return;
  sched_setaffinity(0, sizeof allowed, &allowed);  // it may be moved again
  processors_[thread].store(sched_getcpu(), std::memory_order_relaxed);
#endif
}

// ==== torch's threads, or the pool ====

namespace {

std::atomic<Region> region{nullptr};
std::atomic<int64_t> pool_until{0};  // a time before which torch's threads are left alone
std::atomic<int64_t> stalled_for{kShortest};

void use_pool_until(int64_t time) {
  int64_t until = pool_until.load(std::memory_order_relaxed);
  while (until < time && !pool_until.compare_exchange_weak(until, time, std::memory_order_relaxed)) {
  }
}

// Threads that come late again as soon as they are tried again are tried less often.
void note_stall(int64_t time) {
  const bool is_again = time - pool_until.load(std::memory_order_relaxed) < kShortest;
  const int64_t last = stalled_for.load(std::memory_order_relaxed);
  const int64_t next = is_again ? std::min(2 * last, kLongest) : kShortest;
  stalled_for.store(next, std::memory_order_relaxed);
  use_pool_until(time + next);
}

void run(int64_t threads, Work work, void* context) {
  const Region torch = region.load(std::memory_order_relaxed);
  if (!torch || now() < pool_until.load(std::memory_order_relaxed))
    return Pool::instance().run(threads, work, context);
  struct Timed {
    Work work;
    void* context;
    int64_t end;  // of the caller's part
  } timed{work, context, 0};
  torch(
      threads,
      [](void* context, int64_t thread) {
        Timed& timed = *static_cast<Timed*>(context);
        timed.work(timed.context, thread);
        if (thread == 0) timed.end = now();
      },
      &timed);
  if (const int64_t time = now(); time - timed.end > kStall) note_stall(time);
}

}  // namespace

void set_region(Region given) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { region.store(nullptr); });
  (void)registered;
  region.store(given);
}

// ==== loops and programs of loops ====

namespace {

// The items of a loop, shared out: every thread has a run of neighbours of its own, so that it reads memory
// in order, and helps with the others' when that is done.
struct alignas(64) Run {
  std::atomic<int64_t> taken{0};
};

struct Loop {
  Run* runs;  // [threads]
  int64_t threads, items;
  ParallelBody body;
  void* context;
};

int64_t take(const Loop& loop, int64_t thread) {
  int64_t finished = 0;
  for (int64_t turn = 0; turn < loop.threads; ++turn) {
    const int64_t owner = (thread + turn) % loop.threads;
    const int64_t first = loop.items * owner / loop.threads;
    const int64_t count = loop.items * (owner + 1) / loop.threads - first;
    std::atomic<int64_t>& taken = loop.runs[owner].taken;
    for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < count; ++finished)
      loop.body(loop.context, first + i);
  }
  return finished;
}

// What was thrown first, by whichever thread, for the caller to throw.
struct Failure {
  std::atomic<bool> is_there{false};
  std::exception_ptr error;

  template <class Call>
  void catch_of(Call call) {
    try {
      call();
    } catch (const Pool::Left&) {
      throw;
    } catch (...) {
      if (!is_there.exchange(true)) error = std::current_exception();
    }
  }
  void rethrow() {
    if (error) std::rethrow_exception(error);
  }
};

struct SharedItems {
  Loop loop;
  Failure failure;
};

}  // namespace

void share_items(int64_t threads, int64_t items, ParallelBody body, void* context) {
  threads = std::min(threads, items);
  if (threads <= 1) {
    for (int64_t i = 0; i < items; ++i) body(context, i);
    return;
  }
  std::vector<Run> runs(threads);
  SharedItems shared{{runs.data(), threads, items, body, context}, {}};
  run(
      threads,
      [](void* context, int64_t thread) {
        SharedItems& shared = *static_cast<SharedItems*>(context);
        shared.failure.catch_of([&] {
          Pool::rest();
          take(shared.loop, thread);
        });
      },
      &shared);
  shared.failure.rethrow();
}

namespace {

struct Program {
  Run* runs;                   // [loops, threads]
  std::atomic<int64_t>* done;  // [loops]
  int64_t loops, threads;
  void (*program)(void*);
  void* context;
  Failure failure;
};

// Where this thread is in a program.
struct Place {
  Program* program = nullptr;
  int64_t thread = 0, loop = 0;
};
thread_local Place place;

}  // namespace

void share_program(int64_t threads, int64_t most_loops, void (*program)(void*), void* context) {
  std::vector<Run> runs(most_loops * threads);
  std::vector<std::atomic<int64_t>> done(most_loops);
  Program shared{runs.data(), done.data(), most_loops, threads, program, context, {}};
  const Place outer = place;
  Pool::instance().run(
      threads,
      [](void* context, int64_t thread) {
        Program& program = *static_cast<Program*>(context);
        place = {&program, thread, 0};
        program.failure.catch_of([&] { program.program(program.context); });
      },
      &shared);
  place = outer;
  use_pool_until(now() + kAfterProgram);
  shared.failure.rethrow();
}

void share_items_of_program(int64_t items, ParallelBody body, void* context) {
  struct Failed {};
  Program& program = *place.program;
  if (place.loop >= program.loops)
    throw std::logic_error("a program of kernels runs more loops than it announced");
  Pool::rest();
  std::atomic<int64_t>& done = program.done[place.loop];
  const Loop loop{program.runs + place.loop++ * program.threads, program.threads, items, body, context};
  if (const int64_t finished = take(loop, place.thread)) done.fetch_add(finished, std::memory_order_release);
  wait_until([&] {
    return done.load(std::memory_order_acquire) >= items ||
           program.failure.is_there.load(std::memory_order_relaxed);
  });
  if (program.failure.is_there.load(std::memory_order_relaxed)) throw Failed{};
}

}  // namespace pyspec
