// A tape: launches of kernels, recorded once and then run by all threads in one call.
//
// While a thread records, its ops compute nothing: their bindings fill params as always and append them, and
// the tensors that come back are addresses without memory. When the recording ends, the tape knows from the
// params alone which launch is the last to use each of them, and lays them out in one arena, in which they
// share memory. What a replay reads anew, it reads through pointers: numbers in buffers of fixed addresses,
// which `prepare` of a launch may look at before the threads start.
#pragma once

#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "boundary.h"

namespace pyspec {

// A kernel and its params.
class Launch {
 public:
  virtual ~Launch() = default;
  // Reads the numbers that decide how much is to be done; returns the floats of workspace that it takes.
  virtual int64_t prepare() { return 0; }
  virtual void place(float* workspace) {}
  // By all threads at once.
  virtual void run() const = 0;
  // Parallel loops of a run, at most.
  virtual int64_t loops() const { return 4; }
  // The params, whose aligned words may be pointers.
  virtual std::pair<char*, size_t> params() = 0;
};

class Tape {
 public:
  // The tape that this thread records to, or null.
  static Tape* recording();
  static void stop();

  void begin();
  // The results are tensors of this recording; a replay writes them to `to` instead, which lies outside of
  // the arena.
  void end(int64_t count, char* const* results, char* const* to);
  void run(char* arena);
  int64_t bytes() const { return bytes_; }

  void append(std::unique_ptr<Launch> launch);
  char* allocate(int64_t bytes);

 private:
  struct Piece {
    int64_t begin, bytes;      // of the address space of a recording
    int64_t first = -1, last;  // launches that use it
    char* fixed = nullptr;     // where a result goes
    int64_t offset = 0;        // into the arena
  };
  struct Pointer {
    char** word;
    int64_t offset;
  };
  void lay_out();

  std::vector<std::unique_ptr<Launch>> launches_;
  std::vector<Piece> pieces_;
  std::vector<Pointer> pointers_;  // into the arena
  int64_t next_ = 0, bytes_ = 0, loops_ = 0;
  char* arena_ = nullptr;
};

// What most bindings launch. prepare, where there is one, sets what the params say of data, and p.workspace
// is set to as many floats as it returned.
template <class Params>
class KernelLaunch : public Launch {
 public:
  using Prepare = int64_t (*)(Params&);
  KernelLaunch(void (*kernel)(const Params&), const Params& p, Prepare prepare)
      : kernel_(kernel), p_(p), prepare_(prepare) {}
  int64_t prepare() override { return prepare_ ? prepare_(p_) : 0; }
  void place(float* workspace) override {
    if constexpr (HasWorkspace<Params>::value) {
      if (prepare_) p_.workspace = workspace;
    }
  }
  void run() const override { kernel_(p_); }
  std::pair<char*, size_t> params() override { return {reinterpret_cast<char*>(&p_), sizeof(Params)}; }

 private:
  template <class T, class = void>
  struct HasWorkspace : std::false_type {};
  template <class T>
  struct HasWorkspace<T, std::void_t<decltype(T::workspace)>> : std::true_type {};

  void (*kernel_)(const Params&);
  Params p_;
  Prepare prepare_;
};

// Runs a launch, or appends it to the tape that is recorded.
void launch(std::unique_ptr<Launch> made);

// Runs a kernel, or appends it to the tape that is recorded.
template <class Params>
void launch(const KernelTable<Params>& table, Params& p, int64_t (*prepare)(Params&) = nullptr) {
  auto kernel = table[instruction_set()];
  Tape* tape = Tape::recording();
  p.parallel_for = tape ? team_parallel_for : parallel_for;
  KernelLaunch<Params> made(kernel, p, prepare);
  if (tape) return tape->append(std::make_unique<KernelLaunch<Params>>(made));
  if (prepare) made.place(workspace(made.prepare()));
  made.run();
}

// Memory for the next launch alone.
inline float* scratch(int64_t floats) {
  Tape* tape = Tape::recording();
  return tape ? reinterpret_cast<float*>(tape->allocate(4 * floats)) : workspace(floats);
}

// An uninitialised tensor on the CPU, contiguous unless strides are given.
torch::stable::Tensor new_tensor(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType type,
                                 const int64_t* strides = nullptr);

// tensor, or a copy that is contiguous.
torch::stable::Tensor contiguous(const torch::stable::Tensor& tensor, const char* name);

// Some rows of a laid out weight: one item each, by a kernel that knows no threads.
template <class Params>
class RowsLaunch : public Launch {
 public:
  RowsLaunch(void (*kernel)(const Params&), const Params& p, const int32_t* index, int64_t outputs)
      : kernel_(kernel), p_(p), index_(index), outputs_(outputs), wide_(p.rows) {}
  int64_t prepare() override {
    for (int64_t i = 0; i < p_.rows; ++i) {
      STD_TORCH_CHECK(index_[i] >= 0 && index_[i] < outputs_, "index must be in [0, ", outputs_, "), got ",
                      index_[i], " at ", i);
      wide_[i] = index_[i];
    }
    return 0;
  }
  void run() const override {
    team_parallel_for(
        p_.rows,
        [](void* context, int64_t row) {
          const RowsLaunch& self = *static_cast<const RowsLaunch*>(context);
          Params p = self.p_;
          p.rows = 1, p.index = &self.wide_[row], p.out += row * p.inputs;
          self.kernel_(p);
        },
        const_cast<RowsLaunch*>(this));
  }
  std::pair<char*, size_t> params() override { return {reinterpret_cast<char*>(&p_), sizeof(Params)}; }

 private:
  void (*kernel_)(const Params&);
  Params p_;
  const int32_t* index_;
  int64_t outputs_;
  std::vector<int64_t> wide_;
};

// Some rows of a laid out weight as a new tensor, float32 [index.size(0), p.inputs]. A recording takes an
// index of int32, which its replays read anew.
template <class Params>
torch::stable::Tensor launch_rows(const KernelTable<Params>& table, Params& p,
                                  const torch::stable::Tensor& index, int64_t outputs) {
  using torch::headeronly::ScalarType;
  const bool is_wide = index.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(index.dim() == 1 && (is_wide || index.scalar_type() == ScalarType::Int),
                  "index must be int32 or int64 [rows]");
  p.rows = index.size(0);
  torch::stable::Tensor out = new_tensor({p.rows, p.inputs}, ScalarType::Float);
  p.out = static_cast<float*>(out.data_ptr());
  if (Tape* tape = Tape::recording()) {
    STD_TORCH_CHECK(!is_wide && index.is_contiguous(), "index must be int32 and contiguous in a recording");
    auto rows = static_cast<const int32_t*>(index.data_ptr());
    tape->append(std::make_unique<RowsLaunch<Params>>(table[instruction_set()], p, rows, outputs));
    return out;
  }
  std::vector<int64_t> wide(p.rows);
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t at = i * index.stride(0);
    wide[i] = is_wide ? static_cast<const int64_t*>(index.data_ptr())[at]
                      : static_cast<const int32_t*>(index.data_ptr())[at];
    STD_TORCH_CHECK(wide[i] >= 0 && wide[i] < outputs, "index must be in [0, ", outputs, "), got ", wide[i],
                    " at ", i);
  }
  p.index = wide.data();
  table[instruction_set()](p);
  return out;
}

}  // namespace pyspec
