// Runs the CPU kernel of topk and compares with a sort of every bucket. Its memory ends where its arguments
// end, for AddressSanitizer to watch, or without that has guard bytes around it. Compiled with the kernel,
// for one instruction set, by test_topk.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/simd.h"
#include "params/topk.h"

extern "C" void PYSPEC_ENTRY(pyspec_topk)(const pyspec::TopkParams&);

namespace {

using pyspec::TopkParams;

void one_thread(int64_t items, pyspec::ParallelBody body, void* context) {
  for (int64_t i = 0; i < items; ++i) body(context, i);
}

// Memory for count values, with no room for one more, not even to align.
template <class T>
struct Memory {
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kGuard = 0;
#else
  static constexpr int64_t kGuard = 256;
#endif
  int64_t bytes;
  std::unique_ptr<char[]> data;

  explicit Memory(int64_t count)
      : bytes(count * static_cast<int64_t>(sizeof(T))), data(new char[bytes + 2 * kGuard]) {
    std::memset(data.get(), 0x5a, bytes + 2 * kGuard);
  }
  ~Memory() {
    for (int64_t i = 0; i < kGuard; ++i) {
      if (data[i] == 0x5a && data[kGuard + bytes + i] == 0x5a) continue;
      std::printf("written outside of an argument\n");
      std::_Exit(1);
    }
  }
  T* get() { return reinterpret_cast<T*>(data.get() + kGuard); }
  T& operator[](int64_t i) { return get()[i]; }
};

std::vector<float> row_of(int kind, int64_t n, std::mt19937& random) {
  std::vector<float> row(n);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; ++i) {
    row[i] = normal(random);
    if (kind == 1) row[i] = static_cast<float>(i % 5);
    if (kind == 2) row[i] = -INFINITY;
    if (kind == 3 && i % 7 == 0) row[i] = i % 2 ? NAN : -NAN;
    if (kind == 4) row[i] = static_cast<float>(i);
    if (kind == 5) row[i] = i % 2 ? 0.0f : -0.0f;
  }
  return row;
}

std::vector<int64_t> expected(const TopkParams& p, const std::vector<float>& row) {
  auto is_better = [&](int64_t a, int64_t b) {
    bool nan_a = std::isnan(row[a]), nan_b = std::isnan(row[b]);
    if (nan_a != nan_b) return nan_a == p.largest;
    if (!nan_a && row[a] != row[b]) return (row[a] > row[b]) == p.largest;
    return a < b;
  };
  int64_t buckets = p.buckets ? p.buckets : 1, kept_each = p.buckets ? p.per_bucket : p.n;
  std::vector<std::vector<int64_t>> members(buckets);
  int64_t size = p.n / buckets, larger = p.n % buckets;
  for (int64_t i = 0; i < p.n; ++i) {
    int64_t split = larger * (size + 1);
    int64_t owner = p.interleaved ? i % buckets : i < split ? i / (size + 1) : larger + (i - split) / size;
    members[owner].push_back(i);
  }
  std::vector<int64_t> best;
  for (auto& bucket : members) {
    std::sort(bucket.begin(), bucket.end(), is_better);
    if (static_cast<int64_t>(bucket.size()) > kept_each) bucket.resize(kept_each);
    best.insert(best.end(), bucket.begin(), bucket.end());
  }
  std::sort(best.begin(), best.end(), is_better);
  best.resize(p.k);
  return best;
}

template <class Storage>
void check(TopkParams p, pyspec::Element element, int kind, int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(p.n * 31 + p.k));
  Memory<Storage> x(p.rows * p.n), values(p.rows * p.k);
  Memory<int64_t> indices(p.rows * p.k);
  std::vector<std::vector<int64_t>> best;
  for (int64_t row = 0; row < p.rows; ++row) {
    std::vector<float> numbers = row_of(kind, p.n, random);
    for (int64_t i = 0; i < p.n; ++i) {
      from_float(numbers[i], &x[row * p.n + i]);
      numbers[i] = to_float(x[row * p.n + i]);
    }
    best.push_back(expected(p, numbers));
  }
  p.element = element, p.stride = p.n;
  p.x = x.get(), p.values = values.get(), p.indices = indices.get();
  p.segments = pyspec::topk_segments(p, threads);
  Memory<int64_t> workspace(pyspec::topk_workspace_bytes(p) / 8);
  p.workspace = workspace.get();
  p.parallel_for = one_thread;
  PYSPEC_ENTRY(pyspec_topk)(p);
  for (int64_t row = 0; row < p.rows; ++row) {
    std::vector<int64_t> found(indices.get() + row * p.k, indices.get() + (row + 1) * p.k);
    bool is_right = true;
    for (int64_t i = 0; i < p.k; ++i)
      is_right &= !std::memcmp(&values[row * p.k + i], &x[row * p.n + found[i]], sizeof(Storage));
    if (!p.sorted) std::sort(found.begin(), found.end()), std::sort(best[row].begin(), best[row].end());
    if (!is_right || found != best[row]) {
      std::printf("wrong: n %ld k %ld buckets %ld per_bucket %ld %s %s %s kind %d element %d segments %ld\n",
                  static_cast<long>(p.n), static_cast<long>(p.k), static_cast<long>(p.buckets),
                  static_cast<long>(p.per_bucket), p.interleaved ? "interleaved" : "contiguous",
                  p.largest ? "largest" : "smallest", p.sorted ? "sorted" : "", kind,
                  static_cast<int>(element), static_cast<long>(p.segments));
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  const int64_t sizes[] = {1, 15, 17, 64, 100, 1000, 2053, 70001, 100003};
  int64_t checks = 0;
  for (int64_t n : sizes) {
    for (int64_t k : {int64_t{1}, int64_t{5}, int64_t{70}, n / 3, n}) {
      if (k < 1 || k > n || (n > 5000 && k > 5000)) continue;
      for (int64_t per_bucket = 0; per_bucket <= pyspec::kMostPerBucket; ++per_bucket) {
        for (int64_t spread : {1, 3, 8}) {
          for (int kind = 0; kind < 6; ++kind) {
            if (per_bucket == 0 && spread > 1) continue;
            if (n > 5000 && (kind % 3 != 0 || spread == 8)) continue;
            TopkParams p{};
            p.rows = n < 5000 ? 2 : 1, p.n = n, p.k = k, p.per_bucket = per_bucket ? per_bucket : 1;
            p.buckets = per_bucket ? (k * spread + per_bucket - 1) / per_bucket : 0;
            p.interleaved = (kind + per_bucket) % 3 != 0, p.largest = (n + k + kind) % 2,
            p.sorted = spread == 3;
            int64_t threads = 1 + checks % 3;
            check<float>(p, pyspec::Element::kFloat32, kind, threads);
            if (kind % 2)
              check<BFloat16>(p, pyspec::Element::kBFloat16, kind, threads);
            else
              check<Float16>(p, pyspec::Element::kFloat16, kind, threads);
            checks += 2;
          }
        }
      }
    }
  }
  std::printf("%ld checks passed\n", static_cast<long>(checks));
}
