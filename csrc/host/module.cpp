// pyspec._host: structures that live on the host. pyspec/host/twins.py is the same in plain Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "adjacency.h"
#include "arrays.h"
#include "growth.h"
#include "ngram_index.h"
#include "tables.h"
#include "tiles.h"
#include "tree.h"

namespace py = pybind11;
using namespace pyspec;

namespace {

// An array that owns the vector: nothing is copied.
template <typename T, typename Element>
Array<T> owning_array(std::vector<py::ssize_t> shape, std::vector<Element> values) {
  auto* kept = new std::vector<Element>(std::move(values));
  const py::capsule owner(kept, [](void* vector) { delete static_cast<std::vector<Element>*>(vector); });
  return Array<T>(std::move(shape), reinterpret_cast<const T*>(kept->data()), owner);
}

// A writable view of memory that owner keeps alive.
template <typename T>
Array<T> view_of(std::vector<T>& values, std::vector<py::ssize_t> shape, py::handle owner) {
  return Array<T>(std::move(shape), values.data(), owner);
}

py::tuple layout(const Array<int32_t>& parents) {
  const auto nodes = static_cast<int>(parents.size());
  if (parents.ndim() != 1 || nodes == 0) throw std::invalid_argument("parents must be 1-D and not empty");
  Array<int32_t> depths(nodes);
  Array<int32_t> bits({nodes, bit_words(nodes)});
  std::fill_n(bits.mutable_data(), bits.size(), 0);
  tree_layout(parents.data(), nodes, depths.mutable_data(), reinterpret_cast<uint32_t*>(bits.mutable_data()));
  return py::make_tuple(depths, bits);
}

// Bools [batch, heads, rows, keys] to a tile map and bits.
py::tuple dense_tiles(const Array<bool>& visible, int words) {
  if (visible.ndim() != 4 || words < 1) throw std::invalid_argument("visible must have 4 dimensions");
  DenseTiles result{visible.shape(2), visible.shape(3), words, {}, {}};
  const auto* data = reinterpret_cast<const uint8_t*>(visible.data());
  const py::ssize_t matrices = visible.shape(0) * visible.shape(1);
  {
    py::gil_scoped_release release;
    for (py::ssize_t i = 0; i < matrices; ++i) result.add(data + i * result.rows * result.keys);
  }
  const auto partial = static_cast<py::ssize_t>(result.bits.size() / result.height());
  return py::make_tuple(
      owning_array<int32_t>({visible.shape(0), visible.shape(1), result.blocks(), result.columns()},
                            std::move(result.tile_map)),
      owning_array<int64_t>({partial, words, 64}, std::move(result.bits)));
}

py::tuple arrays_of(const BlockLists& lists, py::ssize_t batch, py::ssize_t blocks) {
  auto ranges = [&](const std::vector<int32_t>& values) {
    return Array<int32_t>(std::vector<py::ssize_t>{batch, 1, blocks, 2}, values.data());
  };
  const auto partial = static_cast<py::ssize_t>(lists.partial_tiles.size() / 2);
  const auto unique = static_cast<py::ssize_t>(lists.bits.size() / (64 * lists.words));
  const Array<int32_t> partial_tiles(std::vector<py::ssize_t>{partial, 2}, lists.partial_tiles.data());
  const Array<int64_t> bits(std::vector<py::ssize_t>{unique, lists.words, 64},
                            reinterpret_cast<const int64_t*>(lists.bits.data()));
  return py::make_tuple(ranges(lists.full_ranges), array_of(lists.full_tiles), ranges(lists.partial_ranges),
                        partial_tiles, bits);
}

// [batch] of (parents, prefix) to the tensors of a BlockMask.
py::tuple tree_tiles(const std::vector<std::pair<Array<int32_t>, int64_t>>& trees, int rows, int64_t keys,
                     int words) {
  TreeTiles result{words};
  for (const auto& [parents, prefix] : trees) {
    const auto nodes = static_cast<int>(parents.size());
    if (parents.ndim() != 1 || nodes == 0) throw std::invalid_argument("parents must be 1-D and not empty");
    if (nodes > rows || prefix < 0 || prefix + nodes > keys || words < 1) {
      throw std::invalid_argument("prefix must not be negative, and the tree must fit into rows and keys");
    }
    check_parents(parents.data(), nodes);
    result.add(parents.data(), nodes, prefix, rows);
  }
  return arrays_of(result, static_cast<py::ssize_t>(trees.size()), (rows + 64 * words - 1) / (64 * words));
}

// Spans (low, high, step) of every row, [rows] each, to the tensors of a BlockMask.
py::tuple span_tiles_of(const std::vector<std::tuple<Array<int64_t>, Array<int64_t>, int64_t>>& spans,
                        int64_t rows, int64_t keys, int words) {
  std::vector<Span> found;
  for (const auto& [low, high, step] : spans) {
    if (low.ndim() != 1 || high.ndim() != 1 || low.size() != rows || high.size() != rows || step < 1) {
      throw std::invalid_argument("spans must have a low and a high for each row, and a step of at least 1");
    }
    found.push_back({low.data(), high.data(), step});
  }
  if (keys < 0 || words < 1) throw std::invalid_argument("keys must not be negative, and words at least 1");
  return arrays_of(span_tiles(found, rows, keys, words), 1, (rows + 64 * words - 1) / (64 * words));
}

void update(Adjacency& adjacency, const Array<int64_t>& tokens, const Array<int32_t>& parents,
            int64_t previous, const Array<int32_t>& top_tokens, const Array<float>& top_logits) {
  const py::ssize_t nodes = tokens.size();
  if (parents.size() != nodes || top_tokens.size() != nodes * kTop || top_logits.size() != nodes * kTop) {
    throw std::invalid_argument(
        "tokens, parents and the rows of top_tokens and top_logits must be equally many");
  }
  for (py::ssize_t node = 0; node < nodes; ++node) {
    if (tokens.at(node) < 0 || tokens.at(node) >= adjacency.vocab) {
      throw std::invalid_argument("tokens[" + std::to_string(node) + "] is outside the vocabulary");
    }
  }
  adjacency.update(tokens.data(), parents.data(), previous, top_tokens.data(), top_logits.data(), nodes);
}

void learn(Estimates& estimates, const Array<int64_t>& tokens, const Array<int32_t>& parents,
           const Array<int64_t>& cells, const Array<int32_t>& top_tokens) {
  const py::ssize_t nodes = tokens.size();
  const py::ssize_t verified = top_tokens.size() / kTop;
  if (parents.size() != nodes || cells.size() != nodes || verified > nodes || top_tokens.size() % kTop) {
    throw std::invalid_argument(
        "tokens, parents and cells must be equally many, and top_tokens have no more rows");
  }
  for (py::ssize_t node = 1; node < nodes; ++node) {
    const int32_t parent = parents.data()[node];
    if (parent >= verified) continue;
    estimates.learn(cells.data()[node], top_tokens.data()[parent * kTop] == tokens.data()[node]);
  }
}

// Learns from what the text became: the tokens emitted after the root, as far as the tree goes along with
// them.
void learn_emitted(Estimates& estimates, const Array<int64_t>& tokens, const Array<int32_t>& parents,
                   const Array<int64_t>& cells, const std::vector<int64_t>& emitted) {
  const py::ssize_t nodes = tokens.size();
  if (parents.size() != nodes || cells.size() != nodes) {
    throw std::invalid_argument("tokens, parents and cells must be equally many");
  }
  py::ssize_t at = 0;
  for (size_t i = 0; i < emitted.size() && at >= 0; ++i) {
    py::ssize_t right = -1;
    for (py::ssize_t node = at + 1; node < nodes; ++node) {
      if (parents.data()[node] != at) continue;
      const bool hit = tokens.data()[node] == emitted[i];
      estimates.learn(cells.data()[node], hit);
      if (hit) right = node;
    }
    at = right;
  }
}

py::tuple grow_tree(const std::vector<const Source*>& sources, const Estimates& estimates,
                    const std::vector<int32_t>& recent, int budget, const SamplerNoise* noise,
                    int64_t position) {
  if (static_cast<int>(sources.size()) != estimates.sources() || recent.empty() || budget < 1) {
    throw std::invalid_argument("grow needs as many sources as the estimates know, a token and a budget");
  }
  const GrownTree tree = grow(sources, estimates, recent, budget, noise, position);
  return py::make_tuple(array_of(tree.tokens), array_of(tree.parents), array_of(tree.cells),
                        array_of(tree.chances));
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Structures that live on the host: draft trees, their sources and their growth.";
  module.def("tree_layout", &layout, py::arg("parents").noconvert());
  module.def("dense_tiles", &dense_tiles, py::arg("visible").noconvert(), py::arg("words"));
  module.def("span_tiles", &span_tiles_of, py::arg("spans"), py::arg("rows"), py::arg("keys"),
             py::arg("words"));
  module.def("tree_tiles", &tree_tiles, py::arg("trees"), py::arg("rows"), py::arg("keys"), py::arg("words"));
  module.def("grow", &grow_tree, py::arg("sources"), py::arg("estimates"), py::arg("recent"),
             py::arg("budget"), py::arg("noise") = py::none(), py::arg("position") = 0);

  py::class_<SamplerNoise>(module, "SamplerNoise")
      .def(py::init<uint64_t, double>(), py::arg("seed"), py::arg("temperature"))
      .def("gumbel", &SamplerNoise::gumbel, py::arg("position"), py::arg("token"));
  py::class_<Source>(module, "Source").def("priors", &Source::priors);
  add_tables(module);
  add_heads(module);
  py::class_<NgramIndex, Source>(module, "NgramIndex")
      .def(py::init<>())
      .def("extend", &NgramIndex::extend, py::arg("tokens"))
      .def("__len__", &NgramIndex::size);
  py::class_<Adjacency, Source>(module, "Adjacency")
      .def(py::init<int64_t, int>(), py::arg("vocab_size"), py::arg("context"))
      .def_property_readonly_static("level_count", [](py::object) { return kLevels; })
      .def("update", &update, py::arg("tokens"), py::arg("parents"), py::arg("previous"),
           py::arg("top_tokens"), py::arg("top_logits"))
      .def_property_readonly("keys",
                             [](py::object self) {
                               auto& adjacency = self.cast<Adjacency&>();
                               return view_of(adjacency.keys, {adjacency.rows}, self);
                             })
      .def_property_readonly("successors",
                             [](py::object self) {
                               auto& adjacency = self.cast<Adjacency&>();
                               return view_of(adjacency.successors, {adjacency.rows, kTop}, self);
                             })
      .def_property_readonly("levels", [](py::object self) {
        auto& adjacency = self.cast<Adjacency&>();
        return view_of(adjacency.levels, {adjacency.rows, kTop}, self);
      });
  py::class_<Estimates>(module, "Estimates")
      .def(py::init<std::vector<std::vector<double>>, double>(), py::arg("priors"), py::arg("smoothing"))
      .def("learn", &learn, py::arg("tokens"), py::arg("parents"), py::arg("cells"), py::arg("top_tokens"))
      .def("learn_emitted", &learn_emitted, py::arg("tokens"), py::arg("parents"), py::arg("cells"),
           py::arg("emitted"))
      .def_property_readonly("hits",
                             [](py::object self) {
                               auto& hits = self.cast<Estimates&>().hits;
                               return view_of(hits, {static_cast<py::ssize_t>(hits.size())}, self);
                             })
      .def_property_readonly("trials", [](py::object self) {
        auto& trials = self.cast<Estimates&>().trials;
        return view_of(trials, {static_cast<py::ssize_t>(trials.size())}, self);
      });
}
