#include "tables.h"

#include <pybind11/stl.h>

#include "arrays.h"
#include "bigrams.h"
#include "guessed_tree.h"
#include "ngram_memory.h"
#include "suffix_automaton.h"
#include "trigrams.h"

namespace py = pybind11;

namespace pyspec {
namespace {

void update(NgramMemory& memory, const Array<int64_t>& tokens, const Array<int32_t>& parents,
            const std::vector<int32_t>& before, const Array<int32_t>& top_tokens,
            const Array<float>& top_logits) {
  const py::ssize_t nodes = tokens.size();
  if (parents.size() != nodes || top_tokens.size() != nodes * kTop || top_logits.size() != nodes * kTop) {
    throw std::invalid_argument(
        "tokens, parents and the rows of top_tokens and top_logits must be equally many");
  }
  memory.update(tokens.data(), parents.data(), before.data(), static_cast<int64_t>(before.size()),
                top_tokens.data(), top_logits.data(), nodes);
}

// keys [rows], counts [rows], tokens and shares [rows, kTop] with token -1 behind the last; the older half
// first.
py::tuple saved(const NgramMemory& memory) {
  const auto size = memory.rows.size();
  Array<uint64_t> keys(size);
  Array<int32_t> counts(size);
  Array<int32_t> tokens({size, static_cast<int64_t>(kTop)});
  Array<float> shares({size, static_cast<int64_t>(kTop)});
  std::fill_n(tokens.mutable_data(), tokens.size(), -1);
  std::fill_n(shares.mutable_data(), shares.size(), 0.0f);
  int64_t at = 0;
  for (const auto* rows : {&memory.rows.older, &memory.rows.newer}) {
    for (const auto& [key, row] : *rows) {
      keys.mutable_data()[at] = key;
      counts.mutable_data()[at] = row.count;
      std::copy_n(row.tokens, row.size, tokens.mutable_data() + at * kTop);
      std::copy_n(row.shares, row.size, shares.mutable_data() + at * kTop);
      ++at;
    }
  }
  return py::make_tuple(keys, counts, tokens, shares);
}

void load(NgramMemory& memory, const Array<uint64_t>& keys, const Array<int32_t>& counts,
          const Array<int32_t>& tokens, const Array<float>& shares) {
  const py::ssize_t size = keys.size();
  if (counts.size() != size || tokens.size() != size * kTop || shares.size() != size * kTop) {
    throw std::invalid_argument("keys, counts and the rows of tokens and shares must be equally many");
  }
  for (py::ssize_t at = 0; at < size; ++at) {
    NgramMemory::Row row;
    row.count = counts.data()[at];
    const int32_t* known = tokens.data() + at * kTop;
    while (row.size < kTop && known[row.size] >= 0) ++row.size;
    std::copy_n(known, row.size, row.tokens);
    std::copy_n(shares.data() + at * kTop, row.size, row.shares);
    memory.rows.row(keys.data()[at]) = row;
  }
}

// keys [rows], totals [rows], tokens, counts and bonuses [rows, kFollowers] with token -1 behind the last.
py::tuple saved_trigrams(const Trigrams& trigrams) {
  const auto size = trigrams.rows.size();
  constexpr int64_t kWidth = Trigrams::kFollowers;
  Array<uint64_t> keys(size);
  Array<int32_t> totals(size);
  Array<int32_t> tokens({size, kWidth}), counts({size, kWidth});
  Array<float> bonuses({size, kWidth});
  std::fill_n(tokens.mutable_data(), tokens.size(), -1);
  std::fill_n(counts.mutable_data(), counts.size(), 0);
  std::fill_n(bonuses.mutable_data(), bonuses.size(), 0.0f);
  int64_t at = 0;
  for (const auto* rows : {&trigrams.rows.older, &trigrams.rows.newer}) {
    for (const auto& [key, row] : *rows) {
      keys.mutable_data()[at] = key;
      totals.mutable_data()[at] = row.total;
      for (size_t place = 0; place < row.followers.size(); ++place) {
        tokens.mutable_data()[at * kWidth + place] = row.followers[place].token;
        counts.mutable_data()[at * kWidth + place] = row.followers[place].count;
        bonuses.mutable_data()[at * kWidth + place] = row.followers[place].bonus;
      }
      ++at;
    }
  }
  return py::make_tuple(keys, totals, tokens, counts, bonuses);
}

void load_trigrams(Trigrams& trigrams, const Array<uint64_t>& keys, const Array<int32_t>& totals,
                   const Array<int32_t>& tokens, const Array<int32_t>& counts, const Array<float>& bonuses) {
  const py::ssize_t size = keys.size(), width = Trigrams::kFollowers;
  if (totals.size() != size || tokens.size() != size * width || counts.size() != size * width ||
      bonuses.size() != size * width) {
    throw std::invalid_argument("keys, totals and the rows of the others must be equally many");
  }
  for (py::ssize_t at = 0; at < size; ++at) {
    Trigrams::Row row;
    row.total = totals.data()[at];
    for (py::ssize_t place = at * width; place < (at + 1) * width && tokens.data()[place] >= 0; ++place) {
      row.followers.push_back({tokens.data()[place], counts.data()[place], bonuses.data()[place]});
    }
    trigrams.rows.row(keys.data()[at]) = std::move(row);
  }
}

Bigrams bigrams(const Array<int32_t>& successors, const std::vector<int32_t>& common) {
  if (successors.ndim() != 2 || successors.shape(1) != kTop) {
    throw std::invalid_argument("successors must be [vocab_size, " + std::to_string(kTop) + "]");
  }
  return {std::vector<int32_t>(successors.data(), successors.data() + successors.size()), common};
}

void hold(GuessedTree& guesses, const Array<int64_t>& tokens, const Array<int32_t>& parents,
          const Array<float>& chances, int64_t length) {
  const py::ssize_t nodes = tokens.size();
  if (parents.size() != nodes || chances.size() != nodes) {
    throw std::invalid_argument("tokens, parents and chances must be equally many");
  }
  guesses.hold({tokens.data(), tokens.data() + nodes}, {parents.data(), parents.data() + nodes},
               {chances.data(), chances.data() + nodes}, length);
}

}  // namespace

void add_tables(py::module_& module) {
  py::class_<NgramMemory, Source>(module, "NgramMemory")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def("update", &update, py::arg("tokens"), py::arg("parents"), py::arg("before"), py::arg("top_tokens"),
           py::arg("top_logits"))
      .def("saved", &saved)
      .def("load", &load, py::arg("keys"), py::arg("counts"), py::arg("tokens"), py::arg("shares"))
      .def("__len__", [](const NgramMemory& memory) { return memory.rows.size(); });
  py::class_<Trigrams, Source>(module, "Trigrams")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def("extend", &Trigrams::extend, py::arg("tokens"), py::arg("first"))
      .def("reward", &Trigrams::reward, py::arg("tokens"))
      .def("saved", &saved_trigrams)
      .def("load", &load_trigrams, py::arg("keys"), py::arg("totals"), py::arg("tokens"), py::arg("counts"),
           py::arg("bonuses"))
      .def("__len__", [](const Trigrams& trigrams) { return trigrams.rows.size(); });
  py::class_<GuessedTree, Source>(module, "GuessedTree")
      .def(py::init<>())
      .def("hold", &hold, py::arg("tokens"), py::arg("parents"), py::arg("chances"), py::arg("length"));
  py::class_<Bigrams, Source>(module, "Bigrams")
      .def(py::init(&bigrams), py::arg("successors"), py::arg("common"));
  py::class_<SuffixLookup::Cursor>(module, "Cursor").def(py::init<>());
  py::class_<SuffixLookup, Source>(module, "SuffixLookup")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def("extend", &SuffixLookup::extend, py::arg("cursor"), py::arg("tokens"))
      .def("__len__", &SuffixLookup::size);
}

}  // namespace pyspec
