// Runs csrc/cpu/threads.cpp without torch: every item is done once and loops follow each other, whoever
// comes, comes late, fails, or never comes. Compiled by test_threads.py, also with ThreadSanitizer, and by
// hand:
//
//   g++ -std=c++17 -g -pthread -fsanitize=thread -Ikernels -Icsrc/cpu csrc/cpu/threads.cpp
//       tests/ops/threads_driver.cpp -o driver && ./driver region items loops failures together
#include <dirent.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

using pyspec::Work;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

template <class Body>
void items_of(int64_t threads, int64_t items, Body body) {
  pyspec::share_items(
      threads, items, [](void* body, int64_t item) { (*static_cast<Body*>(body))(item); }, &body);
}

template <class Body>
void loop_of(int64_t items, Body body) {
  pyspec::share_items_of_program(
      items, [](void* body, int64_t item) { (*static_cast<Body*>(body))(item); }, &body);
}

template <class Program>
void program_of(int64_t threads, int64_t loops, Program program) {
  pyspec::share_program(threads, loops, [](void* program) { (*static_cast<Program*>(program))(); }, &program);
}

void compute(int64_t microseconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
  while (std::chrono::steady_clock::now() < end) {
  }
}

void items() {
  for (int64_t threads = 1; threads < 6; ++threads) {
    for (int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
      std::vector<int> done(count);  // each by one thread, which the caller has waited for
      for (int turn = 0; turn < 50; ++turn) items_of(threads, count, [&](int64_t item) { ++done[item]; });
      for (int times : done) require(times == 50, "each item is done once");
    }
  }
}

// Every loop reads what the one before it wrote, on other threads. Items that take long make helpers rest.
void loops_on(int64_t threads, int64_t loops, int64_t width, int64_t microseconds) {
  std::vector<int64_t> values((loops + 1) * width);
  program_of(threads, loops, [&] {
    for (int64_t loop = 0; loop < loops; ++loop) {
      loop_of(width, [&](int64_t item) {
        if (microseconds) compute(microseconds);
        values[(loop + 1) * width + item] = values[loop * width + (item + 1) % width] + 1;
      });
    }
  });
  for (int64_t i = 0; i < width; ++i) require(values[loops * width + i] == loops, "loops follow each other");
}

void loops() {
  for (int64_t threads = 1; threads < 9; ++threads) {
    for (int turn = 0; turn < 20; ++turn) loops_on(threads, 60, 1 + 3 * turn, 0);
    loops_on(threads, 60, 5, 200);
  }
}

void failures() {
  for (int64_t threads = 1; threads < 5; ++threads) {
    for (int64_t bad = 0; bad < 40; ++bad) {
      auto fail = [&](int64_t item) {
        if (item == bad) throw std::runtime_error("item " + std::to_string(bad));
      };
      std::string found, expected = "item " + std::to_string(bad);
      try {
        items_of(threads, 40, fail);
      } catch (const std::runtime_error& error) {
        found = error.what();
      }
      require(found == expected, "the caller gets what an item throws");
      found.clear();
      try {
        program_of(threads, 3, [&] {
          loop_of(40, [](int64_t) {});
          loop_of(40, fail);
          loop_of(40, [](int64_t) {});
        });
      } catch (const std::runtime_error& error) {
        found = error.what();
      }
      require(found == expected, "the caller gets what an item of a program throws");
      loops_on(threads, 5, 7, 0);
    }
    bool is_refused = false;
    try {
      program_of(threads, 1, [] {
        loop_of(3, [](int64_t) {});
        loop_of(3, [](int64_t) {});
      });
    } catch (const std::logic_error&) {
      is_refused = true;
    }
    require(is_refused, "a program announces its loops");
  }
}

void together() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([caller] {
      for (int turn = 0; turn < 30; ++turn) {
        loops_on(1 + (caller + turn) % 4, 30, 9, 0);
        std::vector<int> done(50);
        items_of(1 + (caller + turn) % 5, 50, [&](int64_t item) { ++done[item]; });
        for (int times : done) require(times == 1, "each item is done once");
      }
    });
  }
  for (auto& caller : callers) caller.join();
}

void forked() {
  for (int turn = 0; turn < 5; ++turn) {
    loops_on(3, 20, 9, 0);
    const pid_t child = fork();
    if (child == 0) {
      items();
      loops_on(4, 20, 9, 100);
      _exit(0);
    }
    int status = 1;
    require(waitpid(child, &status, 0) == child && status == 0, "a child has threads of its own");
  }
}

std::atomic<bool> are_held{false};
std::atomic<int> held{0};

void hold(int) {
  held.fetch_add(1);
  while (are_held.load()) usleep(1000);
}

// Helpers that have no processor from now on. They sleep when they are stopped, where they hold nothing.
void without_helpers() {
  loops_on(4, 20, 9, 0);
  usleep(20000);
  signal(SIGUSR1, hold);
  are_held.store(true);
  int helpers = 0;
  DIR* tasks = opendir("/proc/self/task");
  while (dirent* entry = readdir(tasks)) {
    const int task = std::atoi(entry->d_name);
    if (!task || task == getpid()) continue;
    ++helpers;
    syscall(SYS_tgkill, getpid(), task, SIGUSR1);
  }
  closedir(tasks);
  require(helpers == 3, "there are helpers");
  while (held.load() < helpers) usleep(1000);
  for (int turn = 0; turn < 50; ++turn) loops_on(4, 20, 9, 0), items_of(4, 9, [](int64_t) {});
  are_held.store(false);  // they come late
  for (int turn = 0; turn < 200; ++turn) loops_on(4, 20, 9, 0);
}

std::atomic<int> regions{0};

void late_region(int64_t threads, Work work, void* context) {
  regions.fetch_add(1);
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) {
    others.emplace_back([=] {
      usleep(5000);
      work(context, thread);
    });
  }
  work(context, 0);
  for (auto& other : others) other.join();
}

void region() {
  pyspec::set_region(late_region);
  int calls = 0;
  for (; calls < 1000 && calls == regions.load(); ++calls) {
    std::vector<int> done(9);
    items_of(3, 9, [&](int64_t item) { ++done[item]; });
    for (int times : done) require(times == 1, "each item is done once");
  }
  require(regions.load() > 0, "torch's threads are used");
  require(calls < 1000, "and left alone while they come late");
}

}  // namespace

int main(int count, char** names) {
  const std::pair<const char*, void (*)()> checks[] = {{"items", items},
                                                       {"loops", loops},
                                                       {"failures", failures},
                                                       {"together", together},
                                                       {"forked", forked},
                                                       {"region", region},
                                                       {"without_helpers", without_helpers}};
  for (int i = 1; i < count; ++i) {
    bool is_known = false;
    for (auto [name, check] : checks) {
      if (std::strcmp(name, names[i])) continue;
      is_known = true;
      check();
      std::printf("%s\n", name);
    }
    require(is_known, names[i]);
  }
}
