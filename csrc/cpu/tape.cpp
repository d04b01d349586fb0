#include "tape.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>

namespace pyspec {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kAddresses = int64_t{1} << 38;

thread_local Tape* recorded = nullptr;

// Where tensors of a recording lie until it ends: addresses that cost no memory. Who looks there, as a
// debugger may, finds zeros.
char* addresses() {
  static char* const base = [] {
    void* found = mmap(nullptr, kAddresses, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? nullptr : static_cast<char*>(found);
  }();
  STD_TORCH_CHECK(base, "no addresses are left for a recording");
  return base;
}

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Tape* Tape::recording() { return recorded; }

void Tape::stop() { recorded = nullptr; }

void Tape::begin() {
  addresses();
  recorded = this;
}

void Tape::append(std::unique_ptr<Launch> launch) {
  loops_ += launch->loops();
  launches_.push_back(std::move(launch));
}

char* Tape::allocate(int64_t bytes) {
  STD_TORCH_CHECK(next_ + aligned(bytes) <= kAddresses, "a recording needs more than ", kAddresses, " bytes");
  Piece piece{next_, aligned(bytes)};
  next_ += std::max(aligned(bytes), kAlignment);  // of no size too: pieces are told apart by where they begin
  pieces_.push_back(piece);
  return addresses() + piece.begin;
}

void Tape::end(int64_t count, char* const* results, char* const* to) {
  recorded = nullptr;
  auto piece_of = [&](int64_t place) {
    auto after = std::upper_bound(pieces_.begin(), pieces_.end(), place,
                                  [](int64_t value, const Piece& piece) { return value < piece.begin; });
    return after - pieces_.begin() - 1;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = results[i] - addresses();
    STD_TORCH_CHECK(place >= 0 && place < next_, "a result was not made by the ops that were recorded");
    Piece& piece = pieces_[piece_of(place)];
    STD_TORCH_CHECK(piece.begin == place, "a result must be a whole tensor");
    piece.fixed = to[i];
  }
  std::vector<std::pair<char**, int64_t>> found;  // words of params, and the pieces they point into
  for (size_t index = 0; index < launches_.size(); ++index) {
    auto [params, bytes] = launches_[index]->params();
    for (size_t word = 0; word + sizeof(char*) <= bytes; word += sizeof(char*)) {
      char** pointer = reinterpret_cast<char**>(params + word);
      const int64_t place = *pointer - addresses();
      if (place < 0 || place >= next_) continue;
      const int64_t piece = piece_of(place);
      if (pieces_[piece].first < 0) pieces_[piece].first = index;
      pieces_[piece].last = index;
      found.emplace_back(pointer, piece);
    }
  }
  lay_out();
  for (auto [pointer, index] : found) {
    const Piece& piece = pieces_[index];
    const int64_t within = *pointer - addresses() - piece.begin;
    if (piece.fixed) {
      *pointer = piece.fixed + within;
    } else {
      pointers_.push_back({pointer, piece.offset + within});
    }
  }
  pieces_.clear(), pieces_.shrink_to_fit();
}

// Each piece goes to the lowest place that is free from its first launch to its last.
void Tape::lay_out() {
  std::vector<Piece*> order, live;  // live by offset
  for (Piece& piece : pieces_)
    if (piece.first >= 0 && !piece.fixed) order.push_back(&piece);
  std::sort(order.begin(), order.end(), [](const Piece* a, const Piece* b) { return a->first < b->first; });
  for (Piece* piece : order) {
    live.erase(std::remove_if(live.begin(), live.end(), [&](Piece* old) { return old->last < piece->first; }),
               live.end());
    int64_t offset = 0;
    auto next = live.begin();
    for (; next != live.end() && offset + piece->bytes > (*next)->offset; ++next)
      offset = std::max(offset, (*next)->offset + (*next)->bytes);
    piece->offset = offset;
    live.insert(next, piece);
    bytes_ = std::max(bytes_, offset + piece->bytes);
  }
}

void Tape::run(char* arena) {
  if (arena != arena_) {
    for (const Pointer& pointer : pointers_) *pointer.word = arena + pointer.offset;
    arena_ = arena;
  }
  int64_t most = 0;
  for (auto& launch : launches_) most = std::max(most, launch->prepare());
  float* shared = workspace(most);
  for (auto& launch : launches_) launch->place(shared);
  run_team(
      loops_,
      [](void* tape) {
        for (auto& launch : static_cast<Tape*>(tape)->launches_) launch->run();
      },
      this);
}

void launch(std::unique_ptr<Launch> made) {
  if (recorded) return recorded->append(std::move(made));
  made->place(workspace(made->prepare()));
  made->run();
}

torch::stable::Tensor new_tensor(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType type,
                                 const int64_t* strides) {
  int64_t dense[8], numel = 1;
  const int64_t dims = sizes.size();
  for (int64_t i = dims - 1; i >= 0; --i) dense[i] = numel, numel *= sizes.begin()[i];
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const int64_t* layout = strides ? strides : dense;
  AtenTensorHandle handle;
  if (Tape* tape = Tape::recording()) {
    using torch::headeronly::ScalarType;
    const bool is_wide = type == ScalarType::Float || type == ScalarType::Int;
    const int64_t bytes = type == ScalarType::Long ? 8 : is_wide ? 4 : 2;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(tape->allocate(numel * bytes), dims,
                                                              sizes.begin(), layout, 0, dtype,
                                                              aoti_torch_device_type_cpu(), 0, &handle));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.begin(), layout, dtype,
                                                    aoti_torch_device_type_cpu(), 0, &handle));
  }
  return torch::stable::Tensor(handle);
}

torch::stable::Tensor contiguous(const torch::stable::Tensor& tensor, const char* name) {
  if (tensor.is_contiguous()) return tensor;
  STD_TORCH_CHECK(!Tape::recording(), name, " must be contiguous in a recording, which cannot copy it");
  return torch::stable::contiguous(tensor);
}

namespace {

// What went wrong in the last call, for a caller that is not C++.
template <class Call>
const char* error_of(Call call) {
  static thread_local std::string message;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
}  // namespace pyspec

#define PYSPEC_EXPORT extern "C" __attribute__((visibility("default")))

// Starts to record what this thread launches, until pyspec_tape_end; null if it records already.
PYSPEC_EXPORT pyspec::Tape* pyspec_tape_begin() {
  if (pyspec::Tape::recording()) return nullptr;
  auto tape = new pyspec::Tape;
  if (pyspec::error_of([&] { tape->begin(); })) {
    delete tape;
    return nullptr;
  }
  return tape;
}

// Ends what this thread records, if it does, whatever becomes of the tape.
PYSPEC_EXPORT void pyspec_tape_stop() { pyspec::Tape::stop(); }

PYSPEC_EXPORT int32_t pyspec_tape_is_recording() { return pyspec::Tape::recording() != nullptr; }

// The others return what went wrong, or null.
PYSPEC_EXPORT const char* pyspec_tape_end(pyspec::Tape* tape, int64_t count, char* const* results,
                                          char* const* to) {
  return pyspec::error_of([&] { tape->end(count, results, to); });
}

PYSPEC_EXPORT const char* pyspec_tape_run(pyspec::Tape* tape, char* arena) {
  return pyspec::error_of([&] { tape->run(arena); });
}

PYSPEC_EXPORT int64_t pyspec_tape_bytes(const pyspec::Tape* tape) { return tape->bytes(); }

PYSPEC_EXPORT void pyspec_tape_free(pyspec::Tape* tape) { delete tape; }
