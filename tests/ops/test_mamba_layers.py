"""mamba_layers against Mamba and Mamba-2 written in float64, and the program against its ops, bit for bit."""

from dataclasses import replace

import pytest
import torch

from pyspec import DraftTree
from pyspec.ops import Round, pack_weight
from pyspec.ops.mamba_layers import WEIGHTS, mamba_layers, mamba_layers_reference
from pyspec.ops.selective_state import to_panels
from tests.helpers.every_backend import EACH_BACKEND, EACH_KERNEL, on_backend
from tests.helpers.rounds import root_path

LAYERS, HIDDEN, CHANNELS, STATES, TAPS, HEADS, GROUPS, RANK = 2, 48, 96, 16, 4, 6, 2, 5
SEQUENCES, NODES, EPSILON = 4, 12, 1e-5
KINDS = ("mamba", "mamba2")
TREES = [DraftTree([1] * 7, [-1, 0, 0, 1, 1, 3, 2]), DraftTree([1] * 3, [-1, 0, 0])]
PLACES = [2, 0]
SHAPES = {
    "mamba": {
        "in_proj": (2 * CHANNELS, HIDDEN),
        "in_bias": (2 * CHANNELS,),
        "conv_weight": (TAPS, CHANNELS),
        "conv_bias": (CHANNELS,),
        "x_proj": (RANK + 2 * STATES, CHANNELS),
        "dt_proj": (CHANNELS, RANK),
        "A": (CHANNELS, STATES),
        "D": (CHANNELS,),
        "dt_bias": (CHANNELS,),
    },
    "mamba2": {
        "in_proj": (2 * CHANNELS + 2 * GROUPS * STATES + HEADS, HIDDEN),
        "in_bias": (2 * CHANNELS + 2 * GROUPS * STATES + HEADS,),
        "conv_weight": (TAPS, CHANNELS + 2 * GROUPS * STATES),
        "conv_bias": (CHANNELS + 2 * GROUPS * STATES,),
        "A": (HEADS,),
        "D": (CHANNELS,),
        "dt_bias": (HEADS,),
        "gate_norm": (GROUPS, CHANNELS // GROUPS),
    },
}
SHARED = {"norm": (HIDDEN,), "out_proj": (HIDDEN, CHANNELS), "out_bias": (HIDDEN,)}


def dense_layer(kind, generator, biases=True) -> dict[str, torch.Tensor]:
    layer = {}
    for name, shape in (SHAPES[kind] | SHARED).items():
        if name in ("in_bias", "conv_bias", "out_bias") and not biases:
            continue
        mean, deviation = (1.0, 0.1) if "norm" in name else (0.0, 0.3)
        layer[name] = torch.normal(mean, deviation, shape, generator=generator)
    layer["A"] = -layer["A"].mul(3).exp()
    return layer


def packed_layer(layer: dict, weight_dtype) -> list[torch.Tensor]:
    def of(name):
        if name not in layer:
            return torch.empty(0)
        if name.endswith("proj"):
            return pack_weight(layer[name], weight_dtype).data
        return to_panels(layer[name]) if name == "A" and layer[name].dim() == 2 else layer[name]

    return [of(name) for name in WEIGHTS]


def arguments(kind, weight_dtype=torch.float32, dtype=torch.float32, *, biases=True, seed=0):
    """The op's arguments by name, and the weights before they were packed. What nobody may look at is NaN."""
    generator = torch.Generator().manual_seed(seed)
    dense = [dense_layer(kind, generator, biases) for _ in range(LAYERS)]
    conv_channels = SHAPES[kind]["conv_weight"][1]
    width = CHANNELS + (HEADS + GROUPS * STATES if kind == "mamba2" else CHANNELS + STATES)
    given = {
        "hidden": torch.randn(sum(map(len, TREES)), HIDDEN, generator=generator),
        "weights": [tensor for layer in dense for tensor in packed_layer(layer, weight_dtype)],
        "last_norm": 1 + 0.1 * torch.randn(HIDDEN, generator=generator),
        "states": torch.full((LAYERS, SEQUENCES, CHANNELS // 16, STATES, 16), torch.nan),
        "windows": torch.full((LAYERS, SEQUENCES, TAPS - 1, conv_channels), torch.nan),
        "records": torch.full((LAYERS, 2, SEQUENCES, NODES, width), torch.nan),
        "conv_records": torch.full((LAYERS, 2, SEQUENCES, NODES, conv_channels), torch.nan),
        "round": Round.of(TREES, PLACES, [[], []], [0, 1]),
        "dt_rank": RANK if kind == "mamba" else 0,
        "epsilon": EPSILON,
        "dtype": dtype,
    }
    for name in ("states", "windows"):
        for place in PLACES:
            given[name][:, place].normal_(generator=generator)
    return given, dense


CHANGED = ("hidden", "states", "windows", "records", "conv_records")


def call(given):
    """A call on copies of what it changes; the output, and the states after it."""
    given = given | {name: given[name].clone() for name in CHANGED}
    options = {name: given.pop(name) for name in ("dt_rank", "epsilon", "dtype")}
    return mamba_layers(*given.values(), **options), [given[name] for name in CHANGED[1:]]


def call_by_ops(given):
    given = given | {name: given[name].clone() for name in CHANGED}
    rest = [given.pop(name) for name in ("dt_rank", "epsilon", "dtype")]
    round = given.pop("round")
    return mamba_layers_reference(*given.values(), *round.tensors(), *rest), [given[name] for name in CHANGED[1:]]


def plain_mamba(kind, given, dense, index, path):
    """[H] in float64: a textbook model along one path of a tree, one token after the other."""
    first = sum(map(len, TREES[:index]))
    rows = given["hidden"].double()[first:][path]
    windows = given["windows"].double()[:, PLACES[index]]
    states = given["states"].double()[:, PLACES[index]].transpose(-1, -2).flatten(1, 2)  # [layers, channels, N]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight

    def silu(x):
        return x * x.sigmoid()

    for layer, weights in enumerate(dense):
        w = {name: tensor.double() for name, tensor in weights.items()}
        window, state, out = windows[layer], states[layer], []
        for x in rows:
            projected = w["in_proj"] @ norm(x, w["norm"]) + w.get("in_bias", 0)
            conv_channels = w["conv_weight"].shape[1]
            if kind == "mamba":
                inner, z = projected.split(CHANNELS)
            else:
                z, inner, dt = projected.split([CHANNELS, conv_channels, HEADS])
            window = torch.cat((window, inner[None]))
            inner = silu((window * w["conv_weight"]).sum(0) + w.get("conv_bias", 0))
            window = window[1:]
            if kind == "mamba":
                low, B, C = (w["x_proj"] @ inner).split([RANK, STATES, STATES])
                dt, A = w["dt_proj"] @ low + w["dt_bias"], w["A"]
                B, C = B[None], C[None]
            else:
                inner, B, C = inner.split([CHANNELS, *[GROUPS * STATES] * 2])
                of_channels = CHANNELS // HEADS
                dt = (dt + w["dt_bias"]).repeat_interleave(of_channels)
                A = w["A"].repeat_interleave(of_channels)[:, None]
                B, C = (part.view(GROUPS, STATES).repeat_interleave(CHANNELS // GROUPS, 0) for part in (B, C))
            dt = torch.log1p(dt.exp())[:, None]
            state = (dt * A).exp() * state + dt * inner[:, None] * B
            y = ((state * C).sum(1) + w["D"] * inner) * silu(z)
            if kind == "mamba2":
                y = norm(y.view(GROUPS, -1), w["gate_norm"]).flatten()
            out.append(x + w["out_proj"] @ y + w.get("out_bias", 0))
        rows = torch.stack(out)
    return norm(rows[-1], given["last_norm"].double())


@pytest.mark.parametrize("backend", EACH_BACKEND)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_textbook_mamba(kind, biases, backend):
    given, dense = arguments(kind, biases=biases)
    with on_backend(backend):
        out, _ = call(given)
    expected = [
        plain_mamba(kind, given, dense, index, root_path(tree, node))
        for index, tree in enumerate(TREES)
        for node in range(len(tree))
    ]
    torch.testing.assert_close(out.double(), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EACH_KERNEL)
@pytest.mark.parametrize(
    "weight_dtype, dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int8, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_program_has_the_bits_of_its_ops(kind, weight_dtype, dtype, name, monkeypatch):
    """In rounds with nothing to replay, with paths to replay, and with a chain that advances."""
    monkeypatch.setenv("PYSPEC_ISA", name)
    given, _ = arguments(kind, weight_dtype, dtype)
    chains = [TREES[0], DraftTree.chain([1] * 3)]
    for round in (
        given["round"],
        Round.of(TREES, PLACES, [[0, 1, 3], [0]], [1, 0]),
        Round.of(chains, PLACES, [[0, 2], []], [0, 1], advances=[False, True]),
    ):
        given["round"] = round
        out, after = call(given)
        expected, by_ops = call_by_ops(given)
        assert out.isfinite().all() and torch.equal(out, expected)
        for found, other in zip(after, by_ops, strict=True):
            assert torch.equal(found.nan_to_num(7e7), other.nan_to_num(7e7))
        given |= dict(zip(CHANGED[1:], after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_a_round_names_is_written(kind):
    given, _ = arguments(kind)
    out, (states, windows, records, conv_records) = call(given)
    assert out.isfinite().all()
    for after, before in ((states, given["states"]), (windows, given["windows"])):
        assert torch.equal(after.nan_to_num(7e7), before.nan_to_num(7e7))  # nothing was accepted
    for record in (records, conv_records):
        written = [record[:, 1, 2, :7].clone(), record[:, 0, 0, :3].clone()]
        assert all(part.isfinite().all() for part in written)
        record[:, 1, 2, :7] = record[:, 0, 0, :3] = torch.nan
        assert record.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    given, _ = arguments(kind)
    for name in CHANGED[1:]:
        given[name] = torch.zeros_like(given[name])
    round, rest = given.pop("round"), [given.pop(name) for name in ("dt_rank", "epsilon", "dtype")]
    torch.library.opcheck(torch.ops.pyspec.mamba_layers.default, (*given.values(), *round.tensors(), *rest))


def changed(**changes):
    return lambda given: given | {name: change(given[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (changed(hidden=lambda x: x.double()), "hidden must be float32"),
        (changed(hidden=lambda x: x[1:]), "parents must have one entry for each of the 9 rows"),
        (changed(weights=lambda x: x[1:]), "weights must be 13 for each layer"),
        (changed(weights=lambda x: [torch.zeros(HIDDEN + 1), *x[1:]]), "a norm's weight must"),
        (changed(last_norm=lambda x: x[1:]), "a norm's weight must"),
        (changed(states=lambda x: x[0]), "states, windows, records and conv_records must have"),
        (changed(states=lambda x: x.double()), "states must be float32"),
        (changed(records=lambda x: x[..., 1:]), "records must be float32"),
        (changed(conv_records=lambda x: x[:, :, :3]), "conv_records must be float32"),
        (changed(dt_rank=lambda x: 3 - x), "weights must be those of Mamba, or of Mamba-2"),
        (changed(round=lambda x: replace(x, sequences=x.sequences + 2)), r"sequences\[0\] is 4"),
        (
            changed(**dict.fromkeys(("records", "conv_records"), lambda x: x[:, :, :, :6].contiguous())),
            "tree 0 has 7 nodes, the record has room for 6",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given, _ = arguments("mamba2")
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(change(given))
