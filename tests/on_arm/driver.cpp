// Runs kernels for a process on another processor, which sends a kernel's name and its params: blocks of that
// process's memory are fetched when the kernel first touches them, and what changed in them is sent back in
// the end. `kernels.inc` lists the entry points. Called without a wire it exits with the number of the best
// instruction set here.
#include <sys/mman.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "csrc/cpu/instruction_sets.h"
#include "params/common.h"
#include "wire.h"

#define PYSPEC_ENTRY_POINT(name) extern "C" void name(const void* params);
#include "kernels.inc"
#undef PYSPEC_ENTRY_POINT

// In place of the C library's, which clears whole cache lines by an instruction whose faults the emulator
// does not restart where they were.
extern "C" __attribute__((noinline, optimize("no-tree-loop-distribute-patterns"))) void* memset(
    void* to, int byte, size_t bytes) {
  char* p = static_cast<char*>(to);
  const uint64_t eight = 0x0101010101010101u * static_cast<unsigned char>(byte);
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) __builtin_memcpy(p + i, &eight, 8);
  for (; i < bytes; ++i) p[i] = static_cast<char>(byte);
  return to;
}

// Between these counter.c counts.
extern "C" __attribute__((noinline)) void count_from_here() { asm volatile(""); }
extern "C" __attribute__((noinline)) void count_to_here() { asm volatile(""); }

namespace {

using Kernel = void (*)(const void* params);
#define PYSPEC_ENTRY_POINT(name) {#name, name},
const std::map<std::string, Kernel> kKernels = {
#include "kernels.inc"
};

// The other process's addresses would meet this one's own, so its memory lies here, that much below.
constexpr uint64_t kBelow = uint64_t{1} << 46;

int wire;
struct Block {
  char *here, *as_it_came;
  int64_t bytes;
};
std::vector<Block> blocks;

void fetch(int, siginfo_t* info, void*) {
  uint64_t address = reinterpret_cast<uint64_t>(info->si_addr);
  Message wants{Message::kWants, address + kBelow, 1};
  send(wire, &wants, sizeof(wants));
  int64_t bytes;
  if (!receive(wire, &bytes, sizeof(bytes)) || !bytes) _exit(1);  // a pointer into nothing
  const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
  void* here = mmap(reinterpret_cast<void*>(address / bytes * bytes), bytes, protection, flags, -1, 0);
  char* copy = static_cast<char*>(std::malloc(bytes));
  if (here == MAP_FAILED || !copy || !receive(wire, copy, bytes)) _exit(2);
  std::memcpy(here, copy, bytes);
  blocks.push_back({static_cast<char*>(here), copy, bytes});
}

void send_back(const Block& block) {
  constexpr int64_t kLine = 64;
  for (int64_t line = 0; line < block.bytes; line += kLine) {
    if (!std::memcmp(block.here + line, block.as_it_came + line, kLine)) continue;
    for (int64_t i = line; i < line + kLine; ++i) {
      int64_t first = i;
      while (i < line + kLine && block.here[i] != block.as_it_came[i]) ++i;
      if (i == first) continue;
      Message writes{Message::kWrites, reinterpret_cast<uint64_t>(block.here) + kBelow + first, i - first};
      send(wire, &writes, sizeof(writes));
      send(wire, block.here + first, i - first);
    }
  }
  munmap(block.here, block.bytes);
  std::free(block.as_it_came);
}

void one_after_another(int64_t items, pyspec::ParallelBody body, void* context) {
  for (int64_t i = items; i-- > 0;) body(context, i);  // in any order, so in an unusual one
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return pyspec::processor_instruction_set();
  wire = std::atoi(arguments[1]);
  const bool counts = std::getenv("PYSPEC_COUNT");
  struct sigaction action{};
  action.sa_sigaction = fetch;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  for (Call call; receive(wire, &call, sizeof(call));) {
    std::string name(call.name_bytes, ' ');
    std::vector<int64_t> params((call.params_bytes + 7) / 8);
    std::vector<int32_t> pointers(call.pointers);
    receive(wire, name.data(), call.name_bytes);
    receive(wire, params.data(), call.params_bytes);
    receive(wire, pointers.data(), 4 * call.pointers);
    for (int32_t offset : pointers) params[offset / 8] -= kBelow;
    if (call.parallel_for >= 0) params[call.parallel_for / 8] = reinterpret_cast<int64_t>(&one_after_another);
    kKernels.at(name)(params.data());
    if (counts) {  // once more, with all memory there
      std::fprintf(stderr, "%s ", name.c_str());
      count_from_here();
      kKernels.at(name)(params.data());
      count_to_here();
    }
    for (const Block& block : blocks) send_back(block);
    blocks.clear();
    Message done{Message::kDone, 0, 0};
    send(wire, &done, sizeof(done));
  }
}
