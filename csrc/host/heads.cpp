// The binding of head_round.h: arrays are kept as long as the calls that read them.
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "head_round.h"
#include "tables.h"

namespace py = pybind11;

namespace pyspec {
namespace {

struct KeptCalls : HeadCalls {
  std::vector<py::object> kept;
};

template <typename T>
T* data_of(const py::dict& arrays, const char* name, py::ssize_t least) {
  auto array = py::cast<py::array>(arrays[name]);
  if (!py::isinstance<Array<T>>(array) || array.size() < least)
    throw std::invalid_argument(std::string(name) + " must be contiguous, of its dtype, with at least " +
                                std::to_string(least) + " entries");
  return static_cast<T*>(const_cast<void*>(array.data()));
}

KeptCalls make_calls(int64_t sequences, int64_t hidden, uintptr_t run, std::vector<int64_t> target_tokens) {
  KeptCalls calls;
  calls.sequences = sequences, calls.hidden = hidden;
  calls.run = reinterpret_cast<HeadCalls::Run>(run);
  calls.target_tokens = std::move(target_tokens);
  return calls;
}

void add(KeptCalls& calls, int kind, int64_t rows, const py::dict& arrays, uintptr_t tape, py::object owner) {
  HeadCall call{};
  auto numbers = [&](const char* name, int64_t least) { return data_of<int32_t>(arrays, name, least); };
  call.tokens = numbers("tokens", rows), call.positions = numbers("positions", rows);
  call.slots = numbers("slots", rows), call.sequences = numbers("row_sequences", rows);
  call.words = py::cast<py::array>(arrays["ancestor_bits"]).size() / rows;
  call.bits = numbers("ancestor_bits", rows);
  call.starts = numbers("starts", calls.sequences + 1);
  call.prefixes = numbers("prefix_lens", calls.sequences);
  call.width = py::cast<py::array>(arrays["rows"]).size() / rows;
  call.rows = data_of<float>(arrays, "rows", rows * (kind == HeadCalls::kGuess ? calls.hidden : 1));
  call.given = data_of<float>(arrays, "given", rows * calls.hidden);
  call.top_tokens = data_of<int64_t>(arrays, "top_tokens", rows * kTopGuesses);
  call.top_logits = data_of<float>(arrays, "top_logits", rows * kTopGuesses);
  call.log_sum_exp = data_of<float>(arrays, "log_sum_exp", rows);
  call.tape = reinterpret_cast<void*>(tape);
  calls.calls[{kind, rows}] = call;
  calls.kept.push_back(arrays), calls.kept.push_back(std::move(owner));
}

void plant(HeadRound& round, int64_t sequence, int64_t length, int64_t budget, HeadSaid& root, int64_t token,
           std::vector<int32_t> text, const Array<float>& taps) {
  HeadTree tree;
  tree.sequence = sequence, tree.length = length, tree.budget = budget, tree.root = &root, tree.token = token;
  tree.taps = taps.data(), tree.text = std::move(text);
  round.trees.push_back(std::move(tree));
}

std::optional<std::pair<int, int64_t>> run(HeadRound& round, uintptr_t arena) {
  py::gil_scoped_release release;
  const auto missing = round.run(reinterpret_cast<void*>(arena));
  return missing.second ? std::make_optional(missing) : std::nullopt;
}

// By tree, the target's tokens [nodes], parents and chances, likeliest first.
py::list grown(const HeadRound& round) {
  py::list found;
  for (const HeadTree& tree : round.trees) {
    const auto nodes = static_cast<py::ssize_t>(tree.kept.size());
    Array<int64_t> tokens(nodes);
    Array<int32_t> parents(nodes);
    Array<float> chances(nodes);
    std::vector<int32_t> places(tree.tokens.size(), -1);
    for (py::ssize_t place = 0; place < nodes; ++place) {
      const int node = tree.kept[place];
      places[node] = static_cast<int32_t>(place);
      tokens.mutable_data()[place] = node ? round.calls().target_token(tree.tokens[node]) : tree.token;
      parents.mutable_data()[place] = node ? places[tree.parents[node]] : -1;
      chances.mutable_data()[place] = static_cast<float>(tree.chances[node]);
    }
    found.append(py::make_tuple(tokens, parents, chances));
  }
  return found;
}

}  // namespace

void add_heads(py::module_& module) {
  py::class_<HeadSaid>(module, "HeadSaid").def(py::init<>());
  py::class_<KeptCalls>(module, "HeadCalls")
      .def(py::init(&make_calls), py::arg("sequences"), py::arg("hidden"), py::arg("run"),
           py::arg("target_tokens"))
      .def("add", &add, py::arg("kind"), py::arg("rows"), py::arg("arrays"), py::arg("tape"),
           py::arg("owner"));
  py::class_<HeadRound>(module, "HeadRound")
      .def(py::init([](const KeptCalls& calls, int width, int depth, double least) {
             return HeadRound(calls, width, depth, least);
           }),
           py::arg("calls"), py::arg("width"), py::arg("depth"), py::arg("least"), py::keep_alive<1, 2>())
      .def("plant", &plant, py::arg("sequence"), py::arg("length"), py::arg("budget"), py::arg("root"),
           py::arg("token"), py::arg("text"), py::arg("taps").noconvert(), py::keep_alive<1, 5>(),
           py::keep_alive<1, 8>())
      .def("run", &run, py::arg("arena"))
      .def_property_readonly("levels", &HeadRound::levels)
      .def("grown", &grown);
}

}  // namespace pyspec
