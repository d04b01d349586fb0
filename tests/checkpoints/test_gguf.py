"""GGUF files: parts, scaling of rotary frequencies, metadata that says one thing in several ways or the wrong one."""

import re
import struct

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec import load
from pyspec.architectures import Unsupported
from pyspec.checkpoints.gguf import GGUFFile, read_gguf_config
from pyspec.checkpoints.tokenizer import Tokenizer
from tests.helpers.runner_checks import check_last
from tests.helpers.tiny_models import tiny_model, write_gguf


def load_cpu(path):
    return load(str(path), dtype=torch.float32, device="cpu")


def stored_config(path):
    return read_gguf_config(GGUFFile(path))[1]


def config_of(path, **metadata):
    write_gguf(path, tiny_model("llama"), **metadata)
    return stored_config(path)


# ==== parts ====


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The paths of a split model's parts, and the model."""
    writer = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda path, arch: writer(path, arch, split_max_tensors=9))
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    return sorted(tmp_path.glob("*.gguf")), model


def test_all_parts_are_read_whichever_is_named(parts):
    paths, model = parts
    assert [path.name for path in paths] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in paths:
        check_last(load_cpu(path), model)


def test_a_missing_part_is_named(parts):
    paths, _ = parts
    paths[1].unlink()
    for path in (paths[0], paths[2]):
        with pytest.raises(ValueError, match="one of 3 parts, of which tiny-00002-of-00003.gguf is missing"):
            load_cpu(path)


def test_a_part_under_another_name_is_named(parts):
    paths, _ = parts
    for name in ("other.gguf", "tiny-00001-of-00004.gguf"):
        path = paths[0].rename(paths[0].with_name(name))
        with pytest.raises(
            ValueError, match="one of 3 parts by its split.count, so its name must end in -00001-of-00003"
        ):
            load_cpu(path)
        path.rename(paths[0])


def test_parts_of_different_models_are_named(parts, tmp_path, monkeypatch):
    paths, _ = parts
    data = [path.read_bytes() for path in paths]
    paths[2].write_bytes(data[1])
    with pytest.raises(ValueError, match=r"tiny-00003.* is not part 3 of the same model: its split.no is 1, not 2"):
        load_cpu(paths[0])
    paths[2].write_bytes(data[2])
    writer = gguf.GGUFWriter  # already splits by 9
    monkeypatch.setattr(gguf, "GGUFWriter", lambda path, arch: writer(path, arch))
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "tiny.gguf", tiny_model("llama"), leave_out=("output.weight",))
    paths[1].write_bytes((tmp_path / "other" / "tiny-00002-of-00003.gguf").read_bytes())
    with pytest.raises(
        ValueError, match="tiny-00002.* is not part 2 of the same model: its split.tensors.count is 20, not 21"
    ):
        load_cpu(paths[0])


def test_a_name_alone_makes_no_parts(tmp_path):
    path = tmp_path / "tiny-00001-of-00002.gguf"
    write_gguf(path, tiny_model("llama"))
    check_last(load_cpu(path), tiny_model("llama"))


# ==== what metadata says ====

KEYS = {
    "nothing": ({}, 1),
    "a factor without a type is linear": ({"rope.scaling.factor": 4.0}, 4),
    "the old key": ({"rope.scale_linear": 4.0}, 4),
    "the new key before the old": ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2),
    "the type none wins": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1),
    "the type none wins over the old key": ({"rope.scaling.type": "none", "rope.scale_linear": 4.0}, 1),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4),
    "linear by the old key": ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, 4),
    "linear without a factor": ({"rope.scaling.type": "linear"}, 1),
    "no factor": ({"rope.scaling.factor": 0.0}, 1),
    "a factor that is a whole number": ({"rope.scaling.factor": 3}, 3),
    "what yarn alone needs": ({"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}, 4),
}


@pytest.mark.parametrize("name", KEYS)
def test_scaling_is_that_of_llama_cpp(name, tmp_path):
    metadata, factor = KEYS[name]
    found = config_of(tmp_path / "tiny.gguf", **metadata).rope_frequencies()
    plain = config_of(tmp_path / "plain.gguf").rope_frequencies()
    torch.testing.assert_close(found, plain / factor)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
YARN_KEYS = {  # what a file states beside these, and what transformers has for the same
    "nothing": ({}, {}),
    "turns": (
        {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0},
        {"beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "a multiplier of the logarithm": (
        {"rope.scaling.yarn_log_multiplier": 0.5},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    "a multiplier that says nothing": ({"rope.scaling.yarn_log_multiplier": 0.0}, {}),
    "attention's factor": ({"rope.scaling.yarn_attn_factor": 1.25}, {"attention_factor": 1.25}),
    "attention's factor on top": (
        {"rope.scaling.yarn_attn_factor": 1.25, "rope.scaling.attn_factor": 2.0, "rope.scaling.yarn_ext_factor": 1.0},
        {"attention_factor": 2.5},
    ),
}


@pytest.mark.parametrize("name", YARN_KEYS)
def test_yarn_is_that_of_transformers(name, tmp_path):
    metadata, entries = YARN_KEYS[name]
    rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32} | entries
    model = tiny_model("llama", rope_parameters=rope)
    write_gguf(tmp_path / "tiny.gguf", model, **YARN, **metadata)
    check_last(load_cpu(tmp_path / "tiny.gguf"), model)


def test_the_context_of_the_first_training_is_the_context_where_nothing_else_is_stated(tmp_path):
    scaling = config_of(
        tmp_path / "tiny.gguf", **{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    ).rope_scaling
    assert scaling.original_context == 128


def test_factors_of_each_frequency_come_on_top(tmp_path):
    model = tiny_model("llama3_scaling")
    write_gguf(tmp_path / "plain.gguf", model)
    check_last(load_cpu(tmp_path / "plain.gguf"), model)
    expected = stored_config(tmp_path / "plain.gguf").rope_frequencies() / 2
    write_gguf(tmp_path / "scaled.gguf", model, **{"rope.scaling.factor": 2.0})
    torch.testing.assert_close(stored_config(tmp_path / "scaled.gguf").rope_frequencies(), expected)


@pytest.mark.parametrize(
    "metadata, message",
    [
        (
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0},
            "rope scaling 'longrope', supported are linear, llama3 and yarn",
        ),
        ({"rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor"),
        (YARN | {"rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor 0.5, which is not supported"),
        ({"rope.dimension_count": 32}, "rotates only part of each head"),
        ({"attention.value_length": 32}, "values of another width than keys"),
        ({"attention.head_count_kv": [2, 4]}, "layers that differ in attention.head_count_kv"),
    ],
)
def test_what_is_not_supported_is_named(metadata, message, tmp_path):
    with pytest.raises(Unsupported, match=message):
        config_of(tmp_path / "tiny.gguf", **metadata)


def test_numbers_for_each_layer_may_be_the_same(tmp_path):
    model = tiny_model("llama")
    metadata = {"attention.head_count_kv": [2, 2], "attention.head_count": [4, 4], "feed_forward_length": [160, 160]}
    write_gguf(tmp_path / "tiny.gguf", model, **metadata | {"rope.dimension_count": 64, "attention.value_length": 64})
    check_last(load_cpu(tmp_path / "tiny.gguf"), model)


@pytest.mark.parametrize(
    "metadata, message",
    [
        (
            {"attention.head_count_kv": [2, 2, 2]},
            "attention.head_count_kv must be one number, or one for each of 2 layers, got",
        ),
        ({"attention.head_count_kv": "2"}, "metadata llama.attention.head_count_kv must be a whole number, got '2'"),
        ({"block_count": 0}, "metadata llama.block_count must be at least 1, got 0"),
        ({"block_count": 2.0}, "metadata llama.block_count must be a whole number, got 2.0"),
        ({"embedding_length": -5}, "metadata llama.embedding_length must be at least 1, got -5"),
        ({"context_length": True}, "metadata llama.context_length must be a whole number, got True"),
        (
            {"attention.layer_norm_rms_epsilon": float("nan")},
            "metadata llama.attention.layer_norm_rms_epsilon must be a number above 0, got nan",
        ),
        ({"rope.freq_base": -1.0}, "metadata llama.rope.freq_base must be a number above 0, got -1.0"),
        ({"rope.scaling.factor": "2"}, "metadata llama.rope.scaling.factor must be a number above 0, got '2'"),
        ({"rope.scaling.type": 2}, "metadata llama.rope.scaling.type must be a string, got 2"),
        ({"attention.head_count": 3}, "heads must be a multiple of kv_heads|head_dim"),
    ],
)
def test_metadata_that_is_wrong_is_named(metadata, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path / "tiny.gguf", **metadata)


# ==== whatever metadata says ====

TOKENS = {
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.chat_template": "{{ messages }}",
}
OF_TOKENIZERS = [
    *TOKENS,
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.chat_template.x",
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10),
    st.just(2**32 - 1),
    st.just(2**63),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-2, 9), max_size=7),
    st.lists(st.text(max_size=3), max_size=7),
    st.lists(st.floats(), max_size=7),
    st.sampled_from(
        ["gpt2", "llama", "none", "default", "qwen2", ["a", "a"], [""], ["a", ""], ["ab b"], [[1]], ["a b c"]]
    ),
)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(["gpt2", "llama"]), st.dictionaries(st.sampled_from(OF_TOKENIZERS), ODD, min_size=1, max_size=3))
def test_any_metadata_of_a_tokenizer_is_read_or_named(kind, changed):
    metadata = TOKENS | {"tokenizer.ggml.model": kind} | changed
    try:
        tokenizer = Tokenizer.from_gguf(
            {key: value for key, value in metadata.items() if value is not None}, "tiny.gguf"
        )
    except ValueError as error:
        assert str(error).startswith("tiny.gguf") and "tokenizer" in str(error) or "splits words" in str(error), error
        return
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("ab <s>"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_model("llama"))
    return path


def test_any_metadata_of_a_model_is_read_or_named(good, tmp_path):
    data = good.read_bytes()
    keys = [key for key in GGUFFile(good).metadata if key.startswith("llama.")]
    assert len(keys) > 8
    values = [(4, struct.pack("<I", number)) for number in (0, 1, 2, 3, 7, 2**20, 2**32 - 1)]
    values += [(6, struct.pack("<f", number)) for number in (0.0, -1.0, float("nan"), float("inf"), 2.5)]
    values += [(8, struct.pack("<Q", 1) + b"x"), (9, struct.pack("<IQ", 4, 2) + bytes(8)), (7, b"\x01")]
    values += [(10, struct.pack("<Q", 2**63)), (11, struct.pack("<q", -1)), (12, struct.pack("<d", 1e300)), (99, b"")]
    path = tmp_path / "tiny.gguf"
    refused = 0
    for key in keys:
        at = data.index(key.encode()) + len(key)
        for kind, value in values:
            # the header changes its length, so data is aligned anew
            tensors = data[:at] + struct.pack("<I", kind) + value + data[at + 8 :]
            path.write_bytes(tensors)
            try:
                load_cpu(path)
            except ValueError as error:
                assert re.search("tiny.gguf|must|head_dim", str(error)), error
                refused += 1
    assert refused > 100
