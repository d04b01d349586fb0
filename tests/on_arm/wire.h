// What the two ends of the wire say to each other. Both processors keep structs alike, so a call's params
// travel as they are; memory follows block by block, when a kernel touches it.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>

// A block is as large as its neighbourhood allows: a fault costs what tens of kilobytes do.
constexpr int64_t kPage = 4096, kMostBytes = 16 * kPage;

// Begins a call. After it come the kernel's name, the params, and the offsets of their pointers, int32 each.
struct Call {
  int32_t name_bytes, params_bytes, pointers;
  int32_t parallel_for;  // offset of this pointer, which is the other side's own
};

// From the kernel's side: wants the block around `address`, has bytes to write there, or is done. A block is
// sent as its size, by which it is aligned, and its bytes; a size of 0 says that nothing is there.
struct Message {
  enum Kind : int64_t { kWants, kWrites, kDone } kind;
  uint64_t address;
  int64_t bytes;
};

inline void send(int wire, const void* data, int64_t bytes) {
  for (const char* p = static_cast<const char*>(data); bytes > 0;) {
    ssize_t sent = write(wire, p, bytes);
    if (sent <= 0) abort();
    p += sent, bytes -= sent;
  }
}

// False where the other side has gone.
inline bool receive(int wire, void* data, int64_t bytes) {
  for (char* p = static_cast<char*>(data); bytes > 0;) {
    ssize_t got = read(wire, p, bytes);
    if (got <= 0) return false;
    p += got, bytes -= got;
  }
  return true;
}
