"""What all ops do with arguments alike: gradients are refused, the caller's settings of torch change nothing, and data
that point outside of a tensor are refused by every CPU backend."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyspec import BlockMask, ops
from pyspec.ops import GearFormat, Round, _library
from pyspec.ops.lay_out import lay_out, stored_floats
from pyspec.ops.linear import LinearWeight
from pyspec.ops.quantised_ragged import gear_ragged, residual_vq_ragged
from pyspec.ops.selective_state import to_panels
from pyspec.ops.take_columns import take_columns
from pyspec.ops.weight_formats import FORMATS, quantise
from tests.helpers.every_backend import EACH_BACKEND, KERNELS, on_backend
from tests.helpers.rounds import random_tree
from tests.helpers.torch_settings import SETTINGS
from tests.helpers.weight_formats import lay_out_parts
from tests.ops import test_ragged_attention

FUZZ = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TREE = random_tree(5, 1)
BITS = torch.from_numpy(TREE.ancestor_bits)[None]
FORMAT = GearFormat(4, 64, rank=1, outliers=2)


def floats(*shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * 0.3


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def tree_case() -> dict:
    return {"q": floats(1, 4, 5, 64), "k": floats(1, 2, 20, 64), "v": floats(1, 2, 20, 64, seed=1)}


def quantised_case() -> dict:
    tree = {"q": floats(1, 4, 5, 64), "k": floats(1, 2, 90, 64), "v": floats(1, 2, 90, 64, seed=1)}
    return tree | {"ancestor_bits": BITS, "prefix_lens": ints([200]), "window": 64}


def codes(*formats: str) -> LinearWeight:
    return lay_out_parts([quantise(floats(7, 64), FORMATS[name]) for name in formats])


def codebooks():
    return floats(2, 3, 256, 32).half()


def round_of_tree() -> Round:
    return Round.of([TREE], [1], [[]], [0])


def selective_case() -> dict:
    return {
        "state": to_panels(floats(2, 32, 16)),
        "record": floats(2, 2, 9, 32 + 2 + 16),
        "x": floats(5, 32),
        "dt": floats(5, 2),
        "A": -floats(2).abs(),
        "B": floats(5, 16),
        "C": floats(5, 16, seed=1),
        "round": round_of_tree(),
        "D": floats(32),
        "dt_bias": floats(2),
        "z": floats(5, 32, seed=1),
    }


def delta_case() -> dict:
    given = {"state": to_panels(floats(2, 64, 16)), "record": floats(2, 2, 9, 16 + 64 + 2), "q": floats(5, 16)}
    given |= {"k": floats(5, 16, seed=1), "v": floats(5, 64), "decay": floats(5, 2), "beta": floats(5, 2, seed=1)}
    return given | {"A": -floats(2).abs(), "round": round_of_tree(), "dt_bias": floats(2)}


def quantised_rows(format=None) -> dict:
    """Two nodes of one tree behind a block."""
    blocks = floats(1, 2, 128, 64), floats(1, 2, 128, 64, seed=1)
    given = {"q": floats(2, 4, 64), "k": floats(1, 2, 9, 64), "v": floats(1, 2, 9, 64, seed=1)}
    given["quantised"] = (
        ops.residual_vq_encode(*blocks, codebooks()) if format is None else ops.gear_encode(*blocks, format)
    )
    numbers = {"ancestor_bits": [[1], [3]], "seen": [1, 1], "starts": [0, 2], "prefix_lens": [5]}
    given |= {name: torch.tensor(values, dtype=torch.int32) for name, values in numbers.items()}
    given |= {"codebooks": codebooks()} if format is None else {"format": format}
    return given | {"span": 128, "records": 1, "scale": 0.125}


#: Every public op, with arguments that are made anew, because some are changed in place.
CALLS = {
    "tree_attention": lambda: (ops.tree_attention, tree_case() | {"ancestor_bits": BITS, "prefix_lens": ints([9])}),
    "block_masked_attention": lambda: (
        ops.block_masked_attention,
        tree_case() | {"mask": BlockMask.from_window(5, 20, window=9)},
    ),
    "merge_attention": lambda: (
        ops.merge_attention,
        {"out_a": floats(3, 8), "lse_a": floats(3), "out_b": floats(3, 8, seed=1), "lse_b": floats(3, seed=1)},
    ),
    "linear": lambda: (ops.linear, {"x": floats(3, 40), "weight": floats(7, 40), "bias": floats(7)}),
    "linear_codes": lambda: (ops.linear, {"x": floats(3, 64), "weight": codes("int4_32"), "bias": floats(7)}),
    "linear_joined": lambda: (ops.linear, {"x": floats(3, 64), "weight": codes("int4_32", "int4_64")}),
    "expert_linear": lambda: (
        ops.expert_linear,
        {"x": floats(3, 40), "ids": ints([[0, 1], [2, 1], [0, 2]]), "weight": ops.lay_out_experts(floats(3, 7, 40))}
        | {"bias": floats(3, 7)},
    ),
    "route_experts": lambda: (ops.route_experts, {"logits": floats(3, 8), "choices": 2, "bias": floats(8)}),
    "mix_experts": lambda: (
        ops.mix_experts,
        {"values": floats(6, 8), "gates": floats(3, 2), "shared": floats(3, 8), "shared_gates": floats(3, 1)},
    ),
    "rms_norm": lambda: (
        ops.rms_norm,
        {"hidden": floats(3, 8), "weight": floats(8), "epsilon": 1e-5, "delta": floats(3, 8)},
    ),
    "swiglu": lambda: (ops.swiglu, {"gate_up": floats(3, 8)}),
    "take_columns": lambda: (take_columns, {"x": floats(3, 4), "order": ints([3, 0, 2, 1])}),
    "topk": lambda: (ops.topk, {"x": floats(3, 50), "k": 4}),
    "row_statistics": lambda: (ops.row_statistics, {"logits": floats(3, 50)}),
    "sparse_attention": lambda: (
        ops.sparse_attention,
        {"q": floats(1, 4, 64), "k": floats(1, 2, 90, 64), "v": floats(1, 2, 90, 64, seed=1), "positions": 8}
        | {"value_mean": floats(1, 2, 64)},
    ),
    "rotary_write": lambda: (
        ops.rotary_write,
        {"qkv": floats(3, 8 * 64), "cos_sin": floats(9, 2, 32), "positions": ints([1, 2, 8]), "heads": 4}
        | {"sequences": ints([0, 1, 1]), "slots": ints([3, 4, 0]), "keys": floats(2, 2, 5, 64)}
        | {"values": floats(2, 2, 5, 64)},
    ),
    "selective_state": lambda: (ops.selective_state, selective_case()),
    "gated_delta": lambda: (ops.gated_delta, delta_case()),
    "causal_conv": lambda: (
        ops.causal_conv,
        {"window": floats(2, 3, 32), "record": floats(2, 2, 9, 32), "x": floats(5, 32), "weight": floats(4, 32)}
        | {"bias": floats(32), "round": round_of_tree()},
    ),
    "gear_encode": lambda: (
        ops.gear_encode,
        {"k": floats(1, 2, 128, 64), "v": floats(1, 2, 128, 64, seed=1), "format": FORMAT},
    ),
    "gear_attention": lambda: (
        ops.gear_attention,
        quantised_case()
        | {"quantised": ops.gear_encode(floats(1, 2, 128, 64), floats(1, 2, 128, 64), FORMAT)}
        | {"format": FORMAT},
    ),
    "residual_vq_encode": lambda: (
        ops.residual_vq_encode,
        {"k": floats(1, 2, 128, 64), "v": floats(1, 2, 128, 64, seed=1), "codebooks": codebooks()},
    ),
    "residual_vq_attention": lambda: (
        ops.residual_vq_attention,
        quantised_case()
        | {"quantised": ops.residual_vq_encode(floats(1, 2, 128, 64), floats(1, 2, 128, 64), codebooks())}
        | {"codebooks": codebooks(), "rotary": ops.rotary_of_blocks(floats(32).abs(), 1)},
    ),
    "gear_ragged": lambda: (gear_ragged, quantised_rows(FORMAT)),
    "residual_vq_ragged": lambda: (residual_vq_ragged, quantised_rows()),
    "ragged_attention": lambda: (ops.ragged_attention, test_ragged_attention.case((3, 2))),
}


def tensors_of(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [part for part in result if part is not None]


# ---- other things than tensors


@pytest.mark.parametrize("name", CALLS)
def test_other_things_than_tensors_are_refused_by_name(name):
    function, given = CALLS[name]()
    for argument, value in given.items():
        if isinstance(value, (torch.Tensor, Round)):
            for other in (
                (value.float().tolist(), value.float().numpy()) if isinstance(value, torch.Tensor) else (None, 5)
            ):
                with pytest.raises(TypeError, match=f"^{argument} must be a (tensor|Round).*, got "):
                    function(**CALLS[name]()[1] | {argument: other})


# ---- gradients


def wants_gradient(value):
    """The value with a gradient wanted, None where it can have none."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    if isinstance(value, (list, tuple)) and value and isinstance(value[-1], torch.Tensor):
        last = wants_gradient(value[-1])
        return None if last is None else [*value[:-1], last]
    return None


#: Ops that have gradients.
DIFFERENTIABLE = {"block_masked_attention", "block_masked_attention_backward"}


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", [name for name in CALLS if name not in DIFFERENTIABLE])
def test_gradients_are_refused_by_name(name, backend, monkeypatch):
    monkeypatch.setattr(_library, "_forced", backend)
    function, given = CALLS[name]()
    expected = tensors_of(function(**CALLS[name]()[1]))
    found = [argument for argument in given if wants_gradient(given[argument]) is not None]
    assert found
    for argument in found:
        changed = CALLS[name]()[1]
        changed[argument] = wants_gradient(changed[argument])
        before = [t.clone() for t in changed.values() if isinstance(t, torch.Tensor)]
        with pytest.raises(RuntimeError, match=r"must not require a gradient.*torch\.no_grad\(\)"):
            function(**changed)
        after = [t for t in changed.values() if isinstance(t, torch.Tensor)]
        torch.testing.assert_close(after, before, equal_nan=True, rtol=0, atol=0)
        for mode in (torch.no_grad, torch.inference_mode):  # what merely is a parameter is fine
            changed = CALLS[name]()[1]
            changed[argument] = wants_gradient(changed[argument])
            with mode():
                torch.testing.assert_close(tensors_of(function(**changed)), expected, equal_nan=True, rtol=0, atol=0)


def test_every_overload_refuses_gradients(monkeypatch):
    seen = {}
    plain = _library.Op.__call__

    def record(op, *args):
        seen[op.name] = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        return plain(op, *args)

    monkeypatch.setattr(_library.Op, "__call__", record)
    for call in CALLS.values():
        function, given = call()
        function(**given)
    for weight in (ops.lay_out_weight(floats(7, 40)), codes("int4_32")):
        weight.rows(torch.tensor([3]))
    lay_out(ops.lay_out_weight(floats(7, 40)), 0, stored_floats(floats(7, 40)))
    assert seen.keys() | DIFFERENTIABLE == _library._OPS.keys()
    for name, args in seen.items():
        if name in DIFFERENTIABLE:
            continue
        overload = getattr(torch.ops.pyspec, name).default
        for place, argument in enumerate(overload._schema.arguments):
            changed = wants_gradient(args[place])
            if changed is not None:
                with pytest.raises(RuntimeError, match=f"^{argument.name} must not require a gradient, .*ops.{name} "):
                    overload(*args[:place], changed, *args[place + 1 :])


def test_compiled_code_refuses_gradients():
    torch._dynamo.reset()
    swiglu = torch.compile(ops.swiglu, fullgraph=True, backend="eager")
    x = floats(3, 8)
    assert torch.equal(swiglu(x), ops.swiglu(x))
    with pytest.raises(RuntimeError, match="must not require a gradient"):
        swiglu(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(swiglu(x.clone().requires_grad_()), ops.swiglu(x))


def test_int8_weights_are_no_function_of_a_parameter():
    with pytest.raises(RuntimeError, match="weight must not require a gradient"):
        ops.lay_out_weight(floats(7, 40).requires_grad_(), torch.int8)


# ---- what the caller has set


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", CALLS)
def test_settings_of_torch_change_nothing(name, backend, monkeypatch):
    monkeypatch.setattr(_library, "_forced", backend)
    function, given = CALLS[name]()
    expected = tensors_of(function(**given))
    changed = [value for value in given.values() if isinstance(value, torch.Tensor)]
    for setting, enter in SETTINGS.items():
        given = CALLS[name]()[1]
        with enter():
            found = tensors_of(function(**given))
        after = [value for value in given.values() if isinstance(value, torch.Tensor)]
        # torch's own sums, which the reference is made of, have another order on another number of threads
        tolerance = {} if (backend or not KERNELS) and setting == "threads" else {"rtol": 0, "atol": 0}
        for results in ((found, expected), (after, changed)):
            torch.testing.assert_close(*results, equal_nan=True, **tolerance, msg=f"{name} under {setting}")


# ---- data that point outside


def agree(function, arguments: dict, changed: tuple[str, ...] = ()) -> None:
    """Both backends refuse the same, before anything is written, or say the same."""
    outcomes = []
    for backend in ("reference", KERNELS[-1]):
        given = arguments | {name: arguments[name].clone() for name in changed}
        try:
            with on_backend(backend):
                outcomes.append([*tensors_of(function(**given)), *(given[name] for name in changed)])
        except ValueError as error:
            outcomes.append(str(error))
            assert "\n" not in str(error)
            for name in changed:
                torch.testing.assert_close(given[name], arguments[name], equal_nan=True, rtol=0, atol=0)
    by_reference, by_kernel = outcomes
    assert isinstance(by_reference, str) == isinstance(by_kernel, str), outcomes
    if not isinstance(by_reference, str):
        torch.testing.assert_close(by_kernel, by_reference, equal_nan=True, rtol=1e-4, atol=1e-4)


needs_kernels = pytest.mark.skipif(not KERNELS, reason="no compiled kernel")
place = st.sampled_from([-(2**31), -2, -1, 0, 1, 2, 3, 4, 5, 8, 11, 15, 16, 17, 100, 2**31 - 1])


@needs_kernels
@FUZZ
@given(lens=st.tuples(place, place), bit=st.integers(0, 31), table=st.none() | st.lists(place, min_size=4, max_size=4))
def test_tree_attention(lens, bit, table):
    bits = BITS.expand(2, -1, -1).clone()
    bits[1, 4] |= -(2**31) if bit == 31 else 1 << bit if bit < 5 or bit > 28 else 0
    given = {"q": floats(2, 4, 5, 64), "k": floats(2, 2, 20, 64), "v": floats(2, 2, 20, 64, seed=1)}
    given |= {"ancestor_bits": bits, "prefix_lens": ints(list(lens))}
    if table is not None:
        pages = {name: given[name][:, :, :16].reshape(4, 2, 8, 64) for name in ("k", "v")}
        given |= pages | {"block_table": ints(table).view(2, 2)}
    agree(ops.tree_attention, given)


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_prefixes_that_are_too_long_are_refused_by_name(backend):
    function, given = CALLS["tree_attention"]()
    with on_backend(backend):
        function(**given | {"prefix_lens": ints([15])})
        for lens, message in ((16, "16 and ancestor_bits name node 4, but k has only 20"), (-1, "negative, got -1")):
            with pytest.raises(ValueError, match=rf"prefix_lens\[0\] .*{message}"):
                function(**given | {"prefix_lens": ints([lens])})
        with pytest.raises(TypeError, match="prefix_lens must be int32, got torch.int64"):
            function(**given | {"prefix_lens": torch.tensor([9])})
        with pytest.raises(ValueError, match="prefix_lens must be on cpu like q, got meta"):
            function(**given | {"prefix_lens": ints([9]).to("meta")})


@needs_kernels
@FUZZ
@given(places=st.lists(place, min_size=9, max_size=9))
def test_rotary_write(places):
    given = CALLS["rotary_write"]()[1]
    rows = ints(places).view(3, 3)
    if len({(row[1], row[2]) for row in rows.T.tolist()}) < 3:
        return  # two rows in one slot: which stays there is not said
    given |= dict(zip(("positions", "sequences", "slots"), rows, strict=True))
    agree(ops.rotary_write, given, changed=("keys", "values"))


@needs_kernels
@FUZZ
@given(
    sequence=place,
    start=st.sampled_from([0, 0, 0, 1, -1]),
    parent=st.sampled_from([-1, 0, 1, 2, 5, -9]),
    path=st.lists(place, max_size=3),
    half=st.sampled_from([0, 1, 2, -1]),
    advance=st.sampled_from([0, 0, 1, 2]),
)
def test_rounds(sequence, start, parent, path, half, advance):
    parents = torch.from_numpy(TREE.parents.copy())
    parents[2] = parent
    round = Round(ints([sequence]), ints([start, 5]), parents, ints(path).view(1, -1), ints([half]), ints([advance]))
    agree(ops.selective_state, selective_case() | {"round": round}, changed=("state", "record"))
    agree(ops.gated_delta, delta_case() | {"round": round}, changed=("state", "record"))
    agree(ops.causal_conv, CALLS["causal_conv"]()[1] | {"round": round}, changed=("window", "record"))


@needs_kernels
@FUZZ
@given(length=place | st.integers(120, 330))
@pytest.mark.parametrize("name", ["gear_attention", "residual_vq_attention"])
def test_attention_to_quantised_blocks(name, length):
    function, given = CALLS[name]()
    agree(function, given | {"prefix_lens": ints([length])})


@needs_kernels
@FUZZ
@given(rows=st.lists(st.integers(-3, 9) | st.sampled_from([2**40, -(2**40)]), max_size=4))
def test_rows_of_weights(rows):
    quantised = ops.lay_out_weight(floats(7, 40))
    agree(quantised.rows, {"index": torch.tensor(rows, dtype=torch.int64)})
