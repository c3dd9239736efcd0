"""The attention that ships, against a mask decided pair by pair and a softmax in float64."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.checkpoint.format import MODELING_FILE
from converter.common.resources import resource_dir
from tests.brute_force import FULL, SLIDING, Rule, attention

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def load_template() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "template_of_modeling_hybrid", resource_dir("templates") / MODELING_FILE
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HYBRID = load_template()
BLOCK = HYBRID.BLOCK_ROWS


@dataclass(frozen=True)
class Case:
    """One call of the attention function.

    Attributes:
        rows, cached: how many queries there are and how many tokens came before them.
        left, right: padding of each sequence, empty for none.
        packed: lengths of the sequences packed into each row of the batch, empty for none.
        forget: hand over only the keys that a sliding cache keeps.
    """

    rows: int
    cached: int = 0
    batch: int = 1
    kv_heads: int = 1
    groups: int = 1
    head_dim: int = 8
    kind: str = SLIDING
    window: int = 4
    sinks: int = 0
    full_attention_decode: bool = False
    prompt_length: int | None = None
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    packed: tuple[tuple[int, ...], ...] = ()
    forget: bool = False
    seed: int = 0

    @property
    def total(self) -> int:
        """All tokens, padding included."""
        return self.cached + self.rows

    @property
    def mask(self) -> dict[str, Any]:
        """The mask as a checkpoint's config.json has it."""
        return {
            "window_tokens": self.window,
            "sink_tokens": self.sinks,
            "full_attention_decode": self.full_attention_decode,
        }

    @property
    def first_key(self) -> int:
        """The first key handed over, where they are consecutive."""
        plain = self.kind == SLIDING and not self.sinks and not self.full_attention_decode
        if self.forget and plain and self.window > 1:
            return max(0, self.cached - self.window + 1)
        return 0

    @property
    def generated_from(self) -> int | None:
        """Where generated rows begin, by the documentation of the modeling file's `forward`."""
        if not self.full_attention_decode:
            return None
        if self.prompt_length is not None:
            return self.prompt_length
        return self.cached if self.cached and self.rows == 1 else None

    def starts(self, sequence: int) -> list[int]:
        """Where the sequence that each token belongs to begins."""
        if self.packed:
            lengths = self.packed[sequence]
            return [sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)]
        return [self.left[sequence] if self.left else 0] * self.total

    def padding(self, sequence: int) -> frozenset[int]:
        """Positions of padding."""
        if not self.left:
            return frozenset()
        behind = range(self.total - self.right[sequence], self.total)
        return frozenset({*range(self.left[sequence]), *behind})

    def attention_mask(self) -> torch.Tensor | None:
        """The 2-D mask that a caller would pass."""
        if not self.left:
            return None
        real = torch.ones(self.batch, self.total, dtype=torch.bool)
        for sequence in range(self.batch):
            real[sequence, list(self.padding(sequence))] = False
        return real

    def describe(self) -> Any:
        """The rows as transformers would have the modeling file describe them."""
        starts = torch.tensor([self.starts(i) for i in range(self.batch)])

        def mask_function(batch: Any, _head: Any, q: Any, p: Any) -> Any:
            linked = (p <= q) & (starts[batch, p] == starts[batch, q])
            return linked & (q - p < self.window) if self.kind == SLIDING else linked

        return HYBRID.describe_rows(
            config=SimpleNamespace(hybrid={"mask": self.mask}),
            q_length=self.rows,
            kv_length=self.total - self.first_key,
            q_offset=self.cached,
            kv_offset=self.first_key,
            mask_function=mask_function,
            attention_mask=self.attention_mask(),
            batch_size=self.batch,
        )

    def states(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Random queries, keys and values."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.groups
        sizes = [(heads, self.rows), (self.kv_heads, self.total), (self.kv_heads, self.total)]
        return tuple(
            torch.randn(self.batch, h, n, self.head_dim, dtype=torch.float64, generator=generator)
            .to(dtype)
            .requires_grad_()
            for h, n in sizes
        )

    def handed_over(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values as the model's cache gives them to the attention function."""
        needs_layer = self.sinks > 0 or self.window == 1
        evicts = self.kind == SLIDING and not self.full_attention_decode and needs_layer
        if not (self.cached and evicts):
            return key[:, :, self.first_key :], value[:, :, self.first_key :]
        layer = HYBRID.SinkWindowLayer(self.window, self.sinks)
        mask = self.attention_mask()
        if mask is not None:
            layer.set_starts(HYBRID.left_padding(mask))
        cut = self.seed % self.cached
        for begin, end in pairwise([0, cut, self.cached] if cut else [0, self.cached]):
            layer.update(key[:, :, begin:end], value[:, :, begin:end])
            held = layer.keys.shape[2] + (0 if layer.sink_keys is None else self.sinks)
            assert held == min(end, self.window - 1) + self.sinks
        new = slice(self.cached, self.total)
        return layer.update(key[:, :, new], value[:, :, new])  # type: ignore[no-any-return]

    @property
    def module(self) -> Any:
        """What the modeling file reads of a layer."""
        config = SimpleNamespace(hybrid={"mask": self.mask}, layer_types=[FULL, SLIDING, self.kind])
        return SimpleNamespace(config=config, layer_idx=2)

    def found(self, states: tuple[torch.Tensor, ...], scaling: float | None) -> torch.Tensor:
        """What the modeling file computes."""
        query, key, value = states
        key, value = self.handed_over(key, value)
        options = {"scaling": scaling, "prompt_length": self.prompt_length}
        output, weights = HYBRID.hybrid_attention(
            self.module, query, key, value, self.describe(), **options
        )
        assert weights is None
        return output

    def expected(self, states: tuple[torch.Tensor, ...], scaling: float | None) -> torch.Tensor:
        """What the definition gives."""
        window = self.window if self.kind == SLIDING else None
        rule = Rule(window, self.sinks, self.generated_from)
        rows, keys = range(self.cached, self.total), range(self.total)
        seen = torch.stack(
            [rule.matrix(rows, keys, self.starts(i), self.padding(i)) for i in range(self.batch)]
        )
        return attention(*states, seen, scaling or self.head_dim**-0.5)


def compare(
    case: Case, dtype: torch.dtype, *, scaling: float | None = None, gradients: bool = False
) -> None:
    """Hold one case against the brute force; with its gradients if asked."""
    states, twins = case.states(dtype), case.states(dtype)
    found = case.found(states, scaling)
    assert found.shape == (case.batch, case.rows, case.kv_heads * case.groups, case.head_dim)
    assert found.dtype == dtype
    assert bool(found.isfinite().all()), "padding rows must not be NaN either: NaN spreads"
    real = case.attention_mask()
    # Nobody reads the output on padding.
    read = torch.tensor(True) if real is None else real[:, case.cached :, None, None]
    expected = case.expected(twins, scaling)
    zero = torch.zeros((), dtype=torch.float64)
    worst = (torch.where(read, found.double() - expected, zero)).abs().max()
    assert worst <= TOLERANCE[dtype]
    if gradients:
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        weights = torch.where(read, weights.double(), zero)
        (found.double() * weights).sum().backward()
        torch.where(read, expected * weights, zero).sum().backward()
        for state, twin in zip(states, twins, strict=True):
            assert state.grad is not None and twin.grad is not None
            # A row of padding is NaN in the brute force; its gradient is not compared.
            difference = (state.grad - twin.grad)[~twin.grad.isnan()]
            assert difference.abs().max() <= TOLERANCE[dtype]


near_block_edges = st.sampled_from([k * BLOCK + off for k in (1, 2) for off in (-1, 0, 1)])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any call without packing, small or around the block edges."""
    rows = draw(st.one_of(st.integers(1, 12), near_block_edges, st.integers(1, 270)))
    cached = draw(st.one_of(st.just(0), st.integers(1, 12), near_block_edges))
    batch, total = draw(st.integers(1, 2)), rows + cached
    left: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    if draw(st.booleans()):
        left = tuple(draw(st.integers(0, total - 1)) for _ in range(batch))
        right = tuple(draw(st.integers(0, min(2, total - 1 - pad))) for pad in left)
    return Case(
        rows=rows,
        cached=cached,
        batch=batch,
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 8, 24])),
        kind=draw(st.sampled_from([SLIDING, SLIDING, SLIDING, FULL])),
        window=draw(st.one_of(st.integers(1, 12), near_block_edges, st.integers(1, 600))),
        sinks=draw(st.one_of(st.just(0), st.integers(1, 5), st.integers(1, total + 2))),
        full_attention_decode=draw(st.booleans()),
        prompt_length=draw(st.one_of(st.none(), st.integers(0, total + 2))),
        left=left,
        right=right,
        forget=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@st.composite
def packed_cases(draw: st.DrawFn) -> Case:
    """Several sequences in one row of the batch, as for training."""
    batch = draw(st.integers(1, 2))
    rows = draw(st.one_of(st.integers(2, 20), near_block_edges))
    packed = []
    for _ in range(batch):
        cuts = sorted(draw(st.sets(st.integers(1, rows - 1), min_size=1, max_size=4)))
        edges = [0, *cuts, rows]
        packed.append(tuple(b - a for a, b in pairwise(edges)))
    return Case(
        rows=rows,
        batch=batch,
        groups=draw(st.integers(1, 2)),
        kind=draw(st.sampled_from([SLIDING, FULL])),
        # A window of one token is refused before it gets here: see test_modeling_generate.py.
        window=draw(st.integers(2, 40)),
        sinks=draw(st.integers(0, 4)),
        packed=tuple(packed),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=800, deadline=None, derandomize=True)
@given(case=cases())
def test_float64_is_the_brute_force(case: Case) -> None:
    compare(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases())
def test_other_types_stay_within_their_rounding(dtype: torch.dtype, case: Case) -> None:
    compare(case, dtype)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), block_rows=st.integers(1, 300))
def test_the_block_size_does_not_change_the_result(case: Case, block_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HYBRID, "BLOCK_ROWS", block_rows)
        compare(case, torch.float64)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases().map(lambda case: replace(case, left=(), right=())))
def test_gradients_are_those_of_the_brute_force(case: Case) -> None:
    compare(case, torch.float64, gradients=True)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=packed_cases())
def test_packed_sequences_never_see_each_other(case: Case) -> None:
    compare(case, torch.float64, gradients=True)


@pytest.mark.parametrize("prompt_length", [*range(124, 134), 256, 299, 300])
def test_the_prompt_may_end_anywhere_in_a_block(prompt_length: int) -> None:
    mask = Case(rows=300, window=7, sinks=2, full_attention_decode=True)
    compare(replace(mask, prompt_length=prompt_length), torch.float64)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 0.01])
def test_the_scaling_that_the_model_asks_for_is_used(scaling: float) -> None:
    for case in (Case(rows=40), Case(rows=1, cached=30), Case(rows=3, window=50)):
        compare(case, torch.float64, scaling=scaling)


def test_left_padding_moves_each_sequences_sinks() -> None:
    case = Case(rows=60, batch=3, window=5, sinks=3, left=(0, 11, 40), right=(0, 0, 0))
    compare(case, torch.float64)


def test_an_all_true_padding_mask_is_no_padding() -> None:
    case = Case(rows=30, batch=2, left=(0, 0), right=(0, 0))
    assert case.describe() == HYBRID.Rows(0)
    compare(case, torch.float64)


def test_long_rows_read_only_the_keys_they_can_see(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    real = HYBRID.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        widths.append(key.shape[2])
        return real(query, key, *rest, **options)

    monkeypatch.setattr(HYBRID, "scaled_dot_product_attention", spy)
    case = Case(rows=1000, window=20, sinks=4)
    case.found(case.states(torch.float32), None)
    assert len(widths) == -(-1000 // BLOCK)
    assert max(widths) == BLOCK + 20 - 1 + 4


def test_packed_generated_rows_are_refused() -> None:
    case = Case(rows=10, packed=((4, 6),), full_attention_decode=True)
    with pytest.raises(ValueError, match="one sequence per row"):
        case.found(case.states(torch.float64), None)


def test_a_mask_tensor_is_refused_with_the_remedy() -> None:
    case = Case(rows=4)
    with pytest.raises(ValueError, match=r"pass a 2-D attention_mask .* not a Tensor"):
        HYBRID.hybrid_attention(case.module, *case.states(torch.float64), torch.zeros(1, 1, 4, 4))


def test_dropout_drops_weights_in_the_expected_share() -> None:
    case = Case(rows=400, window=64, head_dim=2)
    query, key, _ = (state.detach() for state in case.states(torch.float64))
    value = torch.ones_like(key)
    torch.manual_seed(0)
    output, _ = HYBRID.hybrid_attention(case.module, query, key, value, HYBRID.Rows(0), dropout=0.3)
    # Every output is the sum of the kept weights over 1 - p: 1 on average, and not always 1.
    assert abs(float(output.mean()) - 1.0) < 0.02
    assert float(output.std()) > 0.05
