// Entry points of kernels that run in driver.cpp, under an emulator: `proxies.inc` has one for each kernel
// and instruction set of the other processor. So the library's bindings, and the tests above them, are the
// usual ones.
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "boundary.h"
#include "wire.h"

namespace {

// Copies this process's own memory, if it is there: no mapping has to be looked up, which takes longer.
bool copied(uint64_t address, char* to, int64_t bytes) {
  iovec here{to, static_cast<size_t>(bytes)}, there{reinterpret_cast<void*>(address), here.iov_len};
  return process_vm_readv(getpid(), &here, 1, &there, 1, 0) == bytes;
}

int start(const char* processor) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends)) throw std::runtime_error("no socket for the emulator");
  fcntl(ends[0], F_SETFD, FD_CLOEXEC);
  if (fork() == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    std::string end = std::to_string(ends[1]);
    execlp("qemu-aarch64", "qemu-aarch64", "-cpu", processor, PYSPEC_DRIVER, end.c_str(), nullptr);
    _exit(127);
  }
  close(ends[1]);
  return ends[0];
}

void emulate(const char* name, const void* params, int64_t bytes) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  const char* processor = std::getenv("PYSPEC_EMULATED");
  static int wire = start(processor ? processor : "max");

  std::vector<uint64_t> words((bytes + 7) / 8);
  std::memcpy(words.data(), params, bytes);
  Call call{static_cast<int32_t>(std::strlen(name)), static_cast<int32_t>(bytes), 0, -1};
  std::vector<int32_t> pointers;
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == reinterpret_cast<uint64_t>(&pyspec::parallel_for) ||
        words[i] == reinterpret_cast<uint64_t>(&pyspec::team_parallel_for)) {
      call.parallel_for = 8 * i;
      continue;
    }
    char byte;
    if (copied(words[i], &byte, 1)) pointers.push_back(8 * i);
  }
  call.pointers = pointers.size();
  send(wire, &call, sizeof(call));
  send(wire, name, call.name_bytes);
  send(wire, words.data(), bytes);
  send(wire, pointers.data(), 4 * pointers.size());
  for (Message message;;) {
    if (!receive(wire, &message, sizeof(message)))
      throw std::runtime_error(std::string("the emulator died in ") + name);
    char* address = reinterpret_cast<char*>(message.address);
    if (message.kind == Message::kDone) return;
    if (message.kind == Message::kWrites) {
      if (!receive(wire, address, message.bytes)) throw std::runtime_error("the emulator died");
      continue;
    }
    static char block[kMostBytes];
    int64_t size = kMostBytes;
    while (size && !copied(message.address / size * size, block, size)) size = size > kPage ? size / 4 : 0;
    send(wire, &size, sizeof(size));
    send(wire, block, size);
  }
}

}  // namespace

#define PYSPEC_PROXY(name, set, Params)                                                 \
  extern "C" __attribute__((visibility("hidden"))) void name##_##set(const Params& p) { \
    emulate(#name "_" #set, &p, sizeof(p));                                             \
  }
#include "proxies.inc"
