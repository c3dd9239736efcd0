"""Calls of the attention that ships, and what the definition gives for them.

The code is that of the templates: of modeling_hybrid.py under a plain window, else of
modeling_masks.py beside it. Both compute with attention_hybrid.py.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from converter.checkpoint.format import ATTENTION_FILE, MASKS_FILE, MODELING_FILE
from converter.common.resources import resource_dir
from tests.brute_force import FULL, SLIDING, Rule, attention

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _load(name: str) -> ModuleType:
    """A template as it stands, as if in a checkpoint's package."""
    package = "templates_of_modeling"
    folder = resource_dir("templates")
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"{package}.{name.removesuffix('.py')}")


PLAIN = _load(MODELING_FILE)
HYBRID = _load(MASKS_FILE)
KERNELS = _load(ATTENTION_FILE)
BLOCK = KERNELS.BLOCK_ROWS


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
    def code(self) -> ModuleType:
        """The modeling file that ships with the mask."""
        bare = not self.sinks and not self.full_attention_decode
        return PLAIN if bare and self.window > 1 else HYBRID

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

        return (PLAIN.describe_rows if self.code is PLAIN else HYBRID.describe)(
            config=SimpleNamespace(hybrid={"mask": self.mask}),
            q_length=self.rows,
            kv_length=self.total - self.first_key,
            q_offset=self.cached,
            kv_offset=self.first_key,
            mask_function=mask_function,
            attention_mask=self.attention_mask(),
            device=torch.get_default_device(),
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
            starts = PLAIN.left_padding(mask)
            layer.set_starts(starts, int(starts.max()))
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
        output, weights = self.code.hybrid_attention(
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
    case: Case,
    dtype: torch.dtype,
    *,
    scaling: float | None = None,
    gradients: bool = False,
    device: str = "cpu",
) -> None:
    """Hold one case, run on a device, against the brute force; with its gradients if asked."""
    states, twins = case.states(dtype), case.states(dtype)
    with torch.device(device):
        found = case.found(tuple(state.to(device) for state in states), scaling).cpu()
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
