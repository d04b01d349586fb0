"""TransformersRunner: any other Hugging Face causal model whose layers are all attention.

The arithmetic is transformers' own: the law of the output is exact, its bits are not promised.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.fingerprint import WeightSample, fingerprint_of
from pyspec.ops.linear import LinearWeight, lay_out_weight
from pyspec.runners._checks import check_paths, check_prompts, check_trees
from pyspec.runners._inference import inference
from pyspec.runners.exclusive import lock_of
from pyspec.runners.foreign_arithmetic import arithmetic_of
from pyspec.runners.foreign_masks import masks_of
from pyspec.runners.foreign_slots import Slots
from pyspec.runners.foreign_support import cache_argument, check_supported, context_of
from pyspec.runners.foreign_taps import Taps
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

PREFILL_CHUNK = 256
_OF_THE_LOAD = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


class TransformersRunner:
    """A causal model of transformers with a cache of its own; see pyspec.runners.Runner for the calls.

    Sequence b's committed keys are at slots 0 .. length - 1 of its row. Trees that are verified in one call are written
    behind the longest of their sequences, and what is accepted moves to its place. Layers with a window or
    chunks keep all keys too: what they see is for their mask to say, so that a rejection has nothing to bring back.

    Some models (longrope) rotate all tokens of a call by other frequencies as soon as one of them is behind a certain
    position, the switch. Plain decoding reads a prompt in one call and then each token alone, so here a call holds
    positions of one side of the switch, and chunks of a prompt that ends behind it are read as that prompt is. Where
    transformers reads the text again when it crosses the switch (Phi-3), so does this.

    Args:
        model: a transformers model with a language modelling head; it is put in eval mode.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, or None.
        eos_tokens: tokens that end a text, beside those that the model and the tokenizer name.

    Raises:
        ValueError: the model has state that cannot be cropped, or does not look where a mask tells it.
    """

    def __init__(self, model, tokenizer=None, eos_tokens: Sequence[int] = ()):
        self._sights = check_supported(type(model), model.config)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.eos_tokens = eos_tokens_of(model, tokenizer) | frozenset(eos_tokens)
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.context_length = context_of(model.config)
        self.device, self.dtype = model.device, model.dtype
        # what this model says that others of its type do not, but for where it came from and what it was loaded as
        stated = {name: value for name, value in model.config.to_diff_dict().items() if name not in _OF_THE_LOAD}
        description = repr(sorted(stated.items())) + (tokenizer.fingerprint if tokenizer else "")
        sample = WeightSample().add(sorted(model.state_dict().items())).hexdigest()
        self.fingerprint = fingerprint_of(model.config.model_type, description, sample)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(type(model))
        self._switch, self._reads_again, self._counts_slots = None, False, False  # as long as it is not known
        self._clear()
        try:
            self._switch, self._reads_again, self._counts_slots = arithmetic_of(self)
        finally:
            self._clear()

    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return list(self._lengths)

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[1]

    @property
    def head(self) -> LinearWeight:
        """A copy of the model's."""
        return lay_out_weight(self.model.get_output_embeddings().weight.detach(), self.dtype)

    @inference
    def embed(self, tokens: Tensor) -> Tensor:
        """[R, H] fp32: what the layers take in for tokens [R]."""
        return self.model.get_input_embeddings()(tokens.to(self.device, torch.int64)).float()

    def fork(self) -> TransformersRunner:
        """A runner on the same model with a batch, and drafters, of its own. Forwards through the model take turns."""
        fork = copy.copy(self)
        vars(fork).pop("_drafters", None)
        fork._clear()
        return fork

    @inference
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, Verified], None] | None = None,
        taps: Sequence[int] = (),
    ) -> list[Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        Args:
            tokens: B prompts, none empty nor longer than the context.
            capacity: cache slots of a sequence: prompt, new tokens and one tree; the context length by default.
            observe: called with (slot, chain, what is verified of it) for each chunk of a prompt.
            taps: see pyspec.runners.Runner.

        Raises:
            ValueError: a prompt, the capacity or taps do not fit, or the model's code does not say where its layers
                are; the batch before it is then untouched.
        """
        tokens = check_prompts(tokens, self.vocab_size, self.context_length, capacity)
        taps = Taps(self.model, taps) if taps else None
        capacity = self.context_length if capacity is None else capacity
        self._clear()  # the old batch makes room for the new one
        self._slots, self._taps = Slots(len(tokens), capacity), taps
        self._lengths, self._starts = [0] * len(tokens), [0] * len(tokens)
        self._texts = [list(prompt) for prompt in tokens]
        self._are_long = [self._switch is not None and len(prompt) > self._switch for prompt in tokens]
        return [self._read(sequence, observe) for sequence in range(len(tokens))]

    @inference
    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Verified]:
        """What the model says after every node of the trees, by slot.

        Raises:
            RuntimeError: before any prefill.
            ValueError: a tree has tokens outside of the vocabulary, or does not fit the capacity or the context.
        """
        check_trees(trees, None if self._slots is None else len(self._lengths), self.vocab_size)
        trees = dict(sorted(trees.items()))
        for slot, tree in trees.items():
            deepest = self._lengths[slot] + int(tree.depths.max())
            if deepest >= self.context_length:
                raise ValueError(
                    f"trees[{slot}] reaches position {deepest}, the model's context is {self.context_length}"
                )
        verified = self._verify(trees) if trees else {}
        self._verified = trees
        return {slot: verified[slot] for slot in trees}

    def _verify(self, trees: dict[int, DraftTree]) -> dict[int, Verified]:
        """What is verified of trees by slot, at least one."""
        rows = range(min(trees), max(trees) + 1)
        self._check_room(rows, trees)
        self._verified = None
        sides = {slot: self._behind_switch(slot, tree) for slot, tree in trees.items()}
        joined = torch.cat(list(sides.values()))
        if joined.any() and not joined.all():
            return {slot: self._verify_across(slot, tree, sides[slot]) for slot, tree in trees.items()}
        for slot in trees:
            self._read_as(slot, long=bool(joined[0]))
        if self._counts_slots:
            return {slot: self._forward([slot], [tree])[0] for slot, tree in trees.items()}
        return dict(zip(rows, self._forward(rows, [trees.get(row) for row in rows]), strict=True))

    @inference
    def commit(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Makes paths of the last verified trees state, by slot: node indices from the root, root included.

        Raises:
            RuntimeError: there are no verified trees.
            ValueError: a path does not follow its tree; nothing is committed then.
        """
        check_paths(paths, self._verified)
        trees, self._verified = self._verified, None
        for slot, path in paths.items():
            self._slots.move(slot, path, self._starts[slot], self._lengths[slot])
            self._lengths[slot] += len(path)
            self._texts[slot] += trees[slot].tokens[list(path)].tolist()

    def _clear(self) -> None:
        self._slots: Slots | None = None
        self._lengths: list[int] = []
        self._starts: list[int] = []  # where the last tree of each sequence was written
        self._texts: list[list[int]] = []  # what is committed
        self._are_long: list[bool | None] = []  # whether keys were rotated as those behind the switch; None for neither
        self._verified: dict[int, DraftTree] | None = None
        self._taps: Taps | None = None

    # ==== the switch ====

    def _behind_switch(self, sequence: int, tree: DraftTree) -> Tensor:
        """Whether each node of a tree lies behind the switch, [T] bool."""
        if self._switch is None:
            return torch.zeros(len(tree), dtype=torch.bool, device="cpu")
        return torch.from_numpy(tree.depths + self._lengths[sequence] >= self._switch)

    def _read(self, sequence: int, observe: Callable[[int, DraftTree, Verified], None] | None = None) -> Tensor:
        """Reads a sequence's text from its beginning, in chunks; returns the [V] logits after it."""
        self._lengths[sequence], text = 0, self._texts[sequence]
        for start in range(0, len(text), PREFILL_CHUNK):
            chunk = DraftTree.chain(text[start : start + PREFILL_CHUNK])
            (read,) = self._forward([sequence], [chunk], 0 if observe else 1, is_long=self._are_long[sequence])
            self._lengths[sequence] += len(chunk)
            if observe is not None:
                observe(sequence, chunk, read)
        return read.logits[-1]

    def _read_as(self, sequence: int, long: bool) -> None:
        """Reads a text again if its keys must be those of the other side of the switch now."""
        if not self._reads_again or self._are_long[sequence] == long:
            return
        self._are_long[sequence] = long
        try:
            self._read(sequence)
        except BaseException:
            self._are_long[sequence] = None  # some are read
            raise
        finally:
            self._lengths[sequence] = len(self._texts[sequence])

    def _verify_across(self, sequence: int, tree: DraftTree, behind: Tensor) -> Verified:
        """What is verified of a tree, each node in a call with nodes of its side of the switch only."""
        parts, order = [], []
        for long in (False, True):
            nodes = (behind == long).nonzero()[:, 0]
            if not len(nodes):
                continue
            self._read_as(sequence, long)
            if long and self._reads_again:  # all nodes before these are read as these are
                parts.append(_joined(self._forward([sequence], [tree]), nodes.to(self.device)))
            else:
                parts += self._forward([sequence], [tree], nodes=nodes)
            order.append(nodes)
        return _joined(parts, torch.cat(order).argsort().to(self.device))

    # ==== one call ====

    def _check_room(self, rows: Sequence[int], trees: Mapping[int, DraftTree]) -> None:
        start = max(self._lengths[row] for row in rows)
        nodes = max(map(len, trees.values()))
        if start + nodes > self._slots.capacity:
            raise ValueError(
                f"trees of {nodes} nodes need slots up to {start + nodes}, capacity is {self._slots.capacity}: "
                "prefill with a larger one"
            )

    def _forward(
        self,
        rows: Sequence[int],
        trees: Sequence[DraftTree | None],
        keep: int = 0,
        nodes: Tensor | None = None,
        is_long: bool = False,
        beyond: int = 0,
    ) -> list[Verified | None]:
        """What is verified of the trees of neighbouring rows, with logits in fp32.

        Args:
            keep: the last nodes whose logits are needed; 0 for all.
            nodes: those of the only tree that are read, where the others were read before.
            is_long: whether they are read as those behind the switch, wherever they are.
            beyond: is added to the positions of the last row.
        """
        lengths = [self._lengths[row] for row in rows]
        start, size = max(lengths), max(len(tree) for tree in trees if tree is not None)
        tokens = torch.zeros(len(rows), size, dtype=torch.int64, device="cpu")
        positions = torch.zeros(len(rows), size, dtype=torch.int64, device="cpu")
        visible = torch.zeros(len(rows), 1, size, start + size, dtype=torch.bool, device="cpu")
        index = torch.arange(size, device="cpu")
        for row, (tree, length) in enumerate(zip(trees, lengths, strict=True)):
            if tree is None:
                continue
            own = len(tree)
            tokens[row, :own] = torch.from_numpy(tree.tokens)
            positions[row, :own] = torch.from_numpy(tree.depths) + length
            visible[row, 0, :own, :length] = True
            bits = torch.from_numpy(tree.ancestor_bits)[:, index[:own] // 32] >> (index[:own] % 32)
            visible[row, 0, :own, start : start + own] = (bits & 1).bool()
        positions[-1] += beyond
        of_keys = torch.cat([torch.arange(start, device="cpu").expand(len(rows), start), positions], 1)
        if nodes is not None:
            tokens, positions, visible = tokens[:, nodes], positions[:, nodes], visible[:, :, nodes]
        lone = int(is_long and int(positions.max()) < self._switch)
        if lone:  # one more node, which no other sees, takes the call behind the switch
            tokens, positions = F.pad(tokens, (0, 1)), F.pad(positions, (0, 1), value=self._switch)
            visible = F.pad(visible, (0, 1, 0, 1))
            visible[..., -1, -1] = True
            of_keys = F.pad(of_keys, (0, 1), value=self._switch)
        for row in rows:
            self._starts[row] = start
        self._slots.place(rows, start, start + size + lone, nodes)
        if self._counts_slots:
            self._slots.before = (positions[0] - torch.arange(positions.shape[1], device="cpu")).to(self.device)
        keep = {"logits_to_keep": keep + lone} if keep and self._keeps_logits else {}
        logits, taps = self._run_model(
            input_ids=tokens.to(self.device),
            attention_mask=masks_of(self._sights, visible, positions, of_keys, self.dtype, self.device),
            position_ids=positions.to(self.device),
            use_cache=True,
            **{self._cache_argument: self._slots.cache},
            **keep,
        )
        logits = logits[:, : logits.shape[1] - lone]
        return [
            None
            if tree is None
            else Verified(logits[row, : len(tree)], taps=None if taps is None else taps[row, : len(tree)])
            for row, tree in enumerate(trees)
        ]

    def _run_model(self, **inputs) -> tuple[Tensor, Tensor | None]:
        """Logits [rows, T, V] fp32 and the taps of the model's forward.

        One at a time: forks share the model, and some models change in a call.
        """
        # tensors that a model makes without naming a device shall not lie on the caller's default one
        others = torch.get_default_device().type not in ("cpu", self.device.type)
        with lock_of(self.model), torch.device(self.device) if others else contextlib.nullcontext():
            if self._taps is None:
                return self.model(**inputs).logits.float(), None
            with self._taps.kept() as kept:
                return self.model(**inputs).logits.float(), torch.stack(kept(), 2)


def _joined(parts: Sequence[Verified], order: Tensor) -> Verified:
    """The rows of all parts, in this order."""
    logits, taps = (torch.cat([part.logits for part in parts])[order], [part.taps for part in parts])
    return Verified(logits, taps=None if None in taps else torch.cat(taps)[order])


def eos_tokens_of(model, tokenizer) -> frozenset[int]:
    """Tokens that end a text, by a live model's generation config and the tokenizer."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = named if isinstance(named, list) else [] if named is None else [named]
    return frozenset([*named, *(tokenizer.eos_tokens if tokenizer else ())])
