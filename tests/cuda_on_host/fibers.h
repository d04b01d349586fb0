// A block of CUDA threads on one thread of the CPU: every CUDA thread is a fiber with a stack of its own,
// which runs until it has to wait for others. cuda_on_host.h builds the barrier, the votes and the shuffles
// on this.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define CUDA_ON_HOST_UNSEEN __attribute__((no_sanitize("thread")))  // not looked at by races.h

#pragma GCC visibility push(hidden)  // every library has its own, whatever else is loaded

namespace cuda_on_host {

constexpr int kWarp = 32;

// Where in the kernel a thread waits, for reports and to tell one barrier from another. As a default
// argument, at("...") is the place of the call.
struct Site {
  const char* what;
  const char* file;
  int line;

  static Site at(const char* what, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {what, file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || !std::strcmp(file, other.file));
  }
};

enum class State { kReady, kAtBarrier, kInWarp, kFinished };

// One CUDA thread.
struct Fiber {
  State state = State::kReady;
  Site site{};
  uint32_t mask = 0;    // of the warp operation it waits in
  uint64_t offer = 0;   // what it brings to the operation it waits in
  int source = 0;       // the lane it wants the offer of
  uint64_t result = 0;  // what it takes from there
  bool started = false;
  ucontext_t entry;
  jmp_buf place;
};

// The threads of one block. The same stacks serve block after block.
class Block {
 public:
  Block() = default;
  Block(const Block&) = delete;
  ~Block() {
    if (stacks_) munmap(stacks_, kStack * kMost);
  }

  // Runs body once in each of `threads` fibers; enter(i) is called whenever fiber i goes on. One warp runs as
  // long as any of its threads can, then the next, so that warps are as far apart as barriers allow: in
  // ascending order, or for a seed other than 0 in one drawn anew now and then, also in the middle. Returns
  // what went wrong, or "".
  std::string run(int threads, uint64_t seed, std::function<void()> body, std::function<void(int)> enter) {
    body_ = std::move(body);
    random_.seed(seed);
    error_.clear();
    if (!stacks_) reserve_stacks();
    if (static_cast<int>(fibers_.size()) < threads) fibers_.resize(threads);
    threads_ = threads, at_barrier_ = 0, ++barriers_;
    for (int i = 0; i < threads; ++i) fibers_[i].state = State::kReady, fibers_[i].site = {};
    std::vector<int> warps((threads + kWarp - 1) / kWarp), lanes(kWarp);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    auto is_ready = [&](int i) { return i < threads && fibers_[i].state == State::kReady; };
    auto can_run = [&](int warp) {
      return std::any_of(lanes.begin(), lanes.end(), [&](int lane) { return is_ready(warp * kWarp + lane); });
    };
    Block* outer = current_;
    current_ = this;
    while (error_.empty()) {
      if (seed && random_() % 16 == 0) std::shuffle(warps.begin(), warps.end(), random_);
      if (seed) std::shuffle(lanes.begin(), lanes.end(), random_);
      auto warp = std::find_if(warps.begin(), warps.end(), can_run);
      if (warp == warps.end()) break;
      for (int lane : lanes) {
        int i = *warp * kWarp + lane;
        if (!is_ready(i)) continue;
        running_ = i;
        enter(i);
        go_on(fibers_[i], i);
        if (!error_.empty()) break;
      }
      if (std::exchange(yielded_, false)) std::rotate(warp, warp + 1, warps.end());
    }
    current_ = outer;
    bool finished = std::all_of(fibers_.begin(), fibers_.begin() + threads,
                                [](const Fiber& fiber) { return fiber.state == State::kFinished; });
    if (error_.empty() && !finished) error_ = "deadlock: " + whereabouts();
    if (!error_.empty()) {
      for (Fiber& fiber : fibers_) fiber.started = false;  // those left in the middle begin anew next time
    }
    return error_;
  }

  CUDA_ON_HOST_UNSEEN static Block& current() { return *current_; }
  CUDA_ON_HOST_UNSEEN static bool running() { return current_ != nullptr; }
  int lane() const { return running_ % kWarp; }
  CUDA_ON_HOST_UNSEEN int thread() const { return is_inside_ ? running_ : -1; }  // -1 outside of fibers
  CUDA_ON_HOST_UNSEEN uint64_t barriers() const {
    return barriers_;
  }  // that all threads have passed; a block begins with one

  CUDA_ON_HOST_UNSEEN Site site() const { return running_fiber_->site; }  // where the thread waited last

  // " (topk.cu:80)"
  static std::string in(Site site) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(" (") + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
  }

  // __syncthreads: waits for all threads of the block. Returns the sum of what they offer.
  uint64_t barrier(uint64_t offer, Site site) {
    Fiber& self = fibers_[running_];
    self.offer = offer, self.site = site;
    self.state = State::kAtBarrier;
    if (++at_barrier_ == threads_) {
      at_barrier_ = 0, ++barriers_;
      uint64_t sum = 0;
      for (int i = 0; i < threads_; ++i) {
        sum += fibers_[i].offer;
        if (!(fibers_[i].site == site)) fail("threads meet at different barriers: " + whereabouts());
      }
      for (int i = 0; i < threads_; ++i) fibers_[i].result = sum, fibers_[i].state = State::kReady;
    } else {
      leave();
    }
    return self.result;
  }

  // A warp operation: waits for the lanes in mask; then resolve(lanes, i) is what lane i gets, where lanes[i]
  // is lane i's fiber.
  template <class Resolve>
  uint64_t meet(uint32_t mask, uint64_t offer, int source, Site site, Resolve resolve) {
    Fiber& self = fibers_[running_];
    int lane = running_ % kWarp, first = running_ - lane;
    Fiber* lanes = &fibers_[first];
    if (!(mask >> lane & 1)) fail(self_at(site) + " is not in its own mask");
    if (first + kWarp > threads_ && mask >> (threads_ - first)) {
      fail(self_at(site) + " names lanes that the block does not have");
    }
    self.mask = mask, self.offer = offer, self.source = source, self.site = site;
    self.state = State::kInWarp;
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      Fiber& other = lanes[i];
      if (other.state != State::kInWarp || other.mask != mask || !(other.site == site)) {
        leave();
        return self.result;
      }
    }
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) lanes[i].result = resolve(lanes, i);
    }
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) lanes[i].state = State::kReady;
    }
    return self.result;
  }

  // Lets the others go first.
  void yield() {
    yielded_ = true;
    leave();
  }

  [[noreturn]] void fail_at_fault() {
    fail("thread " + std::to_string(running_) + " touches memory that is not there, or its stack is full");
  }

  // Ends the block: the launch fails with this text.
  [[noreturn]] void fail(std::string text) {
    error_ = std::move(text);
    _longjmp(scheduler_, 1);
  }

 private:
  static constexpr int kMost = 1024;          // threads of a block
  static constexpr size_t kStack = 64 << 10;  // bytes, of which the lowest page is out of bounds

  void reserve_stacks() {
    void* memory = mmap(nullptr, kStack * kMost, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks_ = static_cast<char*>(memory);
    for (int i = 0; i < kMost; ++i) mprotect(stacks_ + i * kStack, 4096, PROT_NONE);
  }

  // Switching is _setjmp and _longjmp, which unlike swapcontext make no system call; ucontext only starts a
  // fiber.
  __attribute__((noinline)) void go_on(Fiber& fiber, int i) {
    if (_setjmp(scheduler_)) {
      is_inside_ = false;
      return;
    }
    is_inside_ = true, running_fiber_ = &fiber;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stacks_ + i * kStack;
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, &Block::start, 0);
    setcontext(&fiber.entry);
  }

  __attribute__((noinline)) void leave() {
    if (!_setjmp(fibers_[running_].place)) _longjmp(scheduler_, 1);
  }

  static void start() {
    for (;;) {
      current_->body_();
      current_->fibers_[current_->running_].state = State::kFinished;
      current_->leave();
    }
  }

  static std::string describe(const Fiber& fiber) {
    if (fiber.state == State::kFinished) return "finished";
    if (fiber.state == State::kReady) return "running";
    char mask[32] = "";
    if (fiber.state == State::kInWarp) std::snprintf(mask, sizeof(mask), " with mask 0x%08x", fiber.mask);
    return std::string("at ") + fiber.site.what + mask + in(fiber.site);
  }

  std::string self_at(Site site) {
    Fiber& self = fibers_[running_];
    self.site = site, self.state = State::kAtBarrier;
    return "thread " + std::to_string(running_) + " " + describe(self);
  }

  // "threads 0-30 at __syncthreads (topk.cu:12), 31 finished"
  std::string whereabouts() const {
    std::string text = "threads ";
    for (int first = 0, last; first < threads_; first = last + 1) {
      std::string what = describe(fibers_[first]);
      for (last = first; last + 1 < threads_ && describe(fibers_[last + 1]) == what;) ++last;
      text += (first ? ", " : "") + std::to_string(first);
      if (last > first) text += "-" + std::to_string(last);
      text += " " + what;
    }
    return text;
  }

  static thread_local Block* current_;
  std::vector<Fiber> fibers_;
  const Fiber* running_fiber_ = nullptr;
  std::function<void()> body_;
  std::minstd_rand random_;
  std::string error_;
  jmp_buf scheduler_;
  char* stacks_ = nullptr;
  int threads_ = 0, running_ = 0, at_barrier_ = 0;
  uint64_t barriers_ = 0;
  bool yielded_ = false, is_inside_ = false;
};

inline thread_local Block* Block::current_ = nullptr;

// While one lives, an access to memory that is not there fails the block that made it, and not the process.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action{};
    action.sa_flags = SA_ONSTACK | SA_NODEFER;  // left by a jump
    action.sa_handler = [](int signal) {
      if (Block::running()) Block::current().fail_at_fault();
      ::signal(signal, SIG_DFL);  // not a kernel's
    };
    sigaction(SIGSEGV, &action, &outer_[0]);
    sigaction(SIGBUS, &action, &outer_[1]);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &outer_[0], nullptr);
    sigaction(SIGBUS, &outer_[1], nullptr);
  }

 private:
  struct sigaction outer_[2]{};
};

// A stack for the handler on this thread of the CPU, since what is full may be the fiber's.
class FaultStack {
 public:
  FaultStack() {
    stack_t mine{};
    mine.ss_sp = memory_.data(), mine.ss_size = memory_.size();
    sigaltstack(&mine, &outer_);
  }
  ~FaultStack() { sigaltstack(&outer_, nullptr); }

 private:
  std::vector<char> memory_ = std::vector<char>(64 << 10);
  stack_t outer_{};
};

}  // namespace cuda_on_host

#pragma GCC visibility pop
