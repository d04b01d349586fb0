"""expert_linear: every format on every instruction set is linear with each row's own expert, to the bit."""

import os

import pytest
import torch

from pyspec.ops.expert_linear import ExpertWeight, expert_linear, lay_out_experts
from pyspec.ops.linear import lay_out_weight, linear
from pyspec.ops.weight_formats import FORMATS, Codes
from tests.helpers.every_backend import each_backend, each_kernel, same_bits
from tests.helpers.linear_cases import FLOATS, PACKED, random
from tests.helpers.weight_formats import random_codes

READERS = "linear", "linear_codes"
run, kernel = each_backend(expert_linear, *READERS), each_kernel(expert_linear, *READERS)
EXPERTS, INPUTS = 5, 256
KINDS = [*PACKED, "int4", *FORMATS]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def experts_of(kind, outputs=45, experts=EXPERTS, seed=0) -> list[torch.Tensor | Codes]:
    """A weight for each expert."""
    if kind in FORMATS:
        return [random_codes(kind, outputs, INPUTS, seed + expert) for expert in range(experts)]
    return list(random(experts, outputs, INPUTS, dtype=kind if kind in FLOATS else torch.float32, seed=seed))


def laid_out(parts, kind) -> ExpertWeight:
    if isinstance(parts[0], Codes):
        return lay_out_experts(parts)
    return lay_out_experts(torch.stack(parts), kind)


def x_of(kind, rows, seed=1) -> torch.Tensor:
    return random(rows, INPUTS, dtype=kind if kind in FLOATS else torch.float32, seed=seed)


def random_ids(rows, choices, experts=EXPERTS, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(rows)]).int()


@each_kind
def test_is_linear_with_the_weight_of_each_row(run, kind):
    parts = experts_of(kind)
    weight, bias = laid_out(parts, kind), random(EXPERTS, 45, seed=3)
    alone = [lay_out_weight(part, None if isinstance(part, Codes) else kind) for part in parts]
    for rows, choices in ((1, 1), (1, 5), (3, 2), (70, 3)):
        x, ids = x_of(kind, rows), random_ids(rows, choices)
        found = run(x, ids, weight, bias)
        assert found.shape == (rows * choices, 45) and found.dtype == x.dtype
        expected = [linear(x[pair // choices], alone[e], bias[e]) for pair, e in enumerate(ids.flatten().tolist())]
        if os.environ.get("PYSPEC_ISA"):
            assert same_bits(found, torch.stack(expected))
        else:  # the reference, which promises values
            tolerance = 5e-2 if kind in FLOATS[1:] else 1e-3
            torch.testing.assert_close(found, torch.stack(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_matches_float64(run, kind):
    parts = experts_of(kind)
    x, ids = x_of(kind, 9), random_ids(9, 2)
    found = run(x, ids, laid_out(parts, kind), out_dtype=torch.float32)
    for pair, expert in enumerate(ids.flatten().tolist()):
        expected = x[pair // 2].double() @ parts[expert].double().T
        torch.testing.assert_close(found[pair].double(), expected, atol=1e-4, rtol=1e-4)


@each_kind
def test_row_rule(kernel, kind):
    """A row has the bits that it has alone, whatever the others chose, and on any number of threads."""
    weight, x, ids = laid_out(experts_of(kind), kind), x_of(kind, 70), random_ids(70, 2)
    expected = torch.cat([kernel(x[i : i + 1], ids[i : i + 1], weight) for i in range(70)])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (1, 2, 9, 70):
                assert same_bits(kernel(x[-rows:], ids[-rows:], weight), expected[-2 * rows :])
            everyone = torch.full_like(ids, 3)
            everyone[7] = ids[7]
            assert same_bits(kernel(x, everyone, weight)[14:16], expected[14:16])
    finally:
        torch.set_num_threads(threads)


def test_strides_dtypes_and_no_rows(kernel):
    weight, ids = laid_out(experts_of(torch.int8), torch.int8), random_ids(6, 2)
    wide = random(12, INPUTS + 10)
    x = wide[::2, 5:-5]
    for x_dtype in FLOATS:
        total = kernel(x.contiguous().to(x_dtype), ids, weight, out_dtype=torch.float32)
        assert same_bits(kernel(wide.to(x_dtype)[::2, 5:-5], ids, weight, out_dtype=torch.float32), total)
        for out_dtype in FLOATS:
            found = kernel(x.to(x_dtype), ids, weight, out_dtype=out_dtype)
            assert same_bits(found, total.to(out_dtype))
    assert kernel(x[:0], ids[:0], weight).shape == (0, 45)


def test_a_bad_row_stays_alone(kernel):
    weight, x, ids = laid_out(experts_of("q4_k"), "q4_k"), x_of("q4_k", 9), random_ids(9, 2)
    clean = kernel(x, ids, weight)
    x[4, 100] = torch.nan
    found = kernel(x, ids, weight)
    assert found[8:10].isnan().all()
    others = [row for row in range(18) if row not in (8, 9)]
    assert same_bits(found[others], clean[others])


@each_kind
def test_a_layout_keeps_every_value(kind):
    parts = experts_of(kind)
    weight = laid_out(parts, kind)
    assert (weight.experts, weight.outputs, weight.inputs) == (EXPERTS, 45, INPUTS)
    alone = [lay_out_weight(part, None if isinstance(part, Codes) else kind) for part in parts]
    assert weight.dtype == alone[0].dtype and weight.nbytes == EXPERTS * alone[0].nbytes
    assert torch.equal(weight.unpack(), torch.stack([part.unpack() for part in alone]))


def test_compiles_as_one_graph():
    def step(x, ids, weight):
        return expert_linear(x * 2, ids, weight)

    args = (x_of(torch.float32, 4), random_ids(4, 2), laid_out(experts_of(torch.float32), torch.float32))
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(found, step(*args))


# ==== bad input ====


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "x must be float32, float16 or bfloat16", lambda x, ids, w: (x.double(), ids, w)),
        (TypeError, "weight must come from lay_out_experts, got LinearWeight",
         lambda x, ids, w: (x, ids, lay_out_weight(random(45, INPUTS)))),
        (TypeError, "weight must be int8, .*, or torch.float32 like x, got torch.float16",
         lambda x, ids, w: (x, ids, laid_out(experts_of(torch.float16), torch.float16))),
        (ValueError, r"x must be \[rows, 256\] for this weight", lambda x, ids, w: (x[:, 1:], ids, w)),
        (ValueError, "x must have a contiguous last dimension", lambda x, ids, w: (x.T.contiguous().T, ids, w)),
        (TypeError, "ids must be int32, got torch.int64", lambda x, ids, w: (x, ids.long(), w)),
        (ValueError, r"ids must have shape \(4, 2\)", lambda x, ids, w: (x, ids[:3], w)),
        (ValueError, r"ids must be \[4, choices\]", lambda x, ids, w: (x, ids[:, 0], w)),
        (ValueError, "ids must be contiguous", lambda x, ids, w: (x, ids.T.contiguous().T, w)),
        (ValueError, r"bias must have shape \(5, 45\)", lambda x, ids, w: (x, ids, w, torch.zeros(4, 45))),
        (ValueError, "weight must be on meta like x", lambda x, ids, w: (x.to("meta"), ids.to("meta"), w)),
    ],
)  # fmt: skip
def test_bad_input(error, message, change):
    given = x_of(torch.float32, 4), random_ids(4, 2), laid_out(experts_of(torch.float32), torch.float32)
    with pytest.raises(error, match=message):
        expert_linear(*change(*given))


def test_experts_that_are_not_there_are_refused(run):
    weight = laid_out(experts_of("q4_0"), "q4_0")
    for wrong in (5, -1, 2**31 - 1):
        ids = random_ids(4, 2)
        ids[1, 1] = wrong
        with pytest.raises(ValueError, match=rf"ids\[1\]\[1\] is {wrong}, there are 5 experts"):
            run(x_of("q4_0", 4), ids, weight)


def test_weights_that_are_none_are_refused():
    for weight in (torch.zeros(4, 5), torch.zeros(2, 0, 5)):
        with pytest.raises(ValueError, match=r"weight must be \[experts, outputs, inputs\] and not empty"):
            lay_out_experts(weight)
