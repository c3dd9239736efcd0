"""A GGUF that hybridize wrote: what it says of its plan, read back and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from converter import __version__
from converter.common.errors import GgufError, PlanError
from converter.common.files import parse_json
from converter.engines.gguf.architecture import PATTERN, WINDOW, WINDOWED_ARCHS, WINDOWED_NAMES
from converter.engines.gguf.container import Container, read_container
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from converter.engines.gguf.sizes import Sizes, sizes_of
from converter.model.families.stock_gguf import Keys, Value, flag, number_of, text
from converter.model.mask import SLIDING
from converter.plan.plan import Plan, plan_from_json

PLAN, HONOURED = "hybridize.plan", "hybridize.honoured"
# What llama.cpp keeps beside each cell of a cache: its position and its sequences (measured: 45).
_CELL_BYTES = 64


def own_keys(plan: Plan, source_arch: str, *, honoured: bool) -> dict[str, Value]:
    """The plan and where the file comes from, for us to read back."""
    keys = {
        "hybridize.version": text(__version__),
        PLAN: text(json.dumps(plan.to_json(), ensure_ascii=False)),
        "hybridize.mask": text(str(plan.mask)),
        "hybridize.source": text(plan.source),
        "hybridize.source_arch": text(source_arch),
        HONOURED: flag(honoured),
    }
    if plan.revision is not None:
        keys["hybridize.source_revision"] = text(plan.revision)
    return keys


@dataclass(frozen=True)
class HybridFile:
    """A file of ours.

    Attributes:
        plan: what it should compute.
        sizes: of the model, which its tensors bear out.
        honoured: whether its architecture honours the plan.
    """

    container: Container
    plan: Plan
    sizes: Sizes
    honoured: bool

    @property
    def path(self) -> Path:
        """The file."""
        return self.container.path

    @property
    def context_tokens(self) -> int:
        """The longest context that the model was made for."""
        return self.sizes.context_tokens

    @property
    def sliding_layers(self) -> int:
        """How many layers slide."""
        return self.plan.layer_types.count(SLIDING)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.container.tensors)

    def expected_caches(self, settings: LlamaCppSettings) -> list[tuple[int, int]]:
        """Cells and layers of the caches that the plan promises in llama.cpp."""
        sliding = self.sliding_layers if self.honoured else 0
        cells = settings.sliding_cells(self.plan.mask.window_tokens)
        caches = [(settings.full_cells, self.sizes.layers - sliding), (cells, sliding)]
        return [(cells, layers) for cells, layers in caches if layers]

    def cache_bytes(
        self, settings: LlamaCppSettings, caches: Iterable[tuple[int, int]] | None = None
    ) -> int:
        """Keys and values in caches of so many cells and layers, or in those of the plan."""
        each = self.sizes.kv_values_per_token * (4 if settings.exact else 2)
        held = self.expected_caches(settings) if caches is None else caches
        return sum(cells * layers * each for cells, layers in held)

    def context_bytes(self, settings: LlamaCppSettings) -> int:
        """What a context takes: the caches, the mask of a batch in float16, and each cell's own."""
        return self.cache_bytes(settings) + settings.full_cells * (
            2 * settings.batch_tokens + _CELL_BYTES
        )


def open_hybrid(path: Path) -> HybridFile:
    """Read a file of ours, without llama.cpp.

    What would make llama.cpp abort, rather than refuse, is refused here.

    Raises:
        GgufError: it is damaged, is not ours, or contradicts itself.
        PlanError: its plan is for a model of another depth.
    """
    container = read_container(path)
    arch, keys = container.arch, container.own_keys()
    known = sorted({*WINDOWED_ARCHS, *WINDOWED_NAMES})
    if arch not in known:
        raise GgufError(
            "this is not a GGUF of an architecture that hybridize knows",
            where=path,
            expected=", ".join(known),
            got=repr(arch),
            next_step="run it with llama.cpp itself",
        )
    plan = _plan_of(container)
    sizes = sizes_of(container)
    slides = SLIDING in plan.layer_types
    is_windowed = arch in WINDOWED_NAMES and slides
    if is_windowed or PATTERN in keys:
        _check_window(container, keys, plan)
    plan.check_depth(sizes.layers, path)
    honoured = is_windowed or not slides
    return HybridFile(container, plan, sizes, honoured=honoured)


def _check_window(container: Container, keys: Keys, plan: Plan) -> None:
    """Refuse a file whose architecture is told otherwise than its plan says."""
    slides = [kind == SLIDING for kind in plan.layer_types]
    pattern = keys[PATTERN].value if PATTERN in keys else None
    window = number_of(keys, WINDOW)
    if pattern != slides or window != plan.mask.window_tokens:
        arch = container.arch
        raise GgufError(
            "the GGUF contradicts its plan",
            where=container.path,
            expected=f"window {plan.mask.window_tokens} in {sum(slides)} of {len(slides)} "
            "layers (hybridize.plan)",
            got=f"{arch}.{WINDOW} {window}, {arch}.{PATTERN} {pattern}",
            next_step="export it again",
        )


def _plan_of(container: Container) -> Plan:
    value = container.metadata.get(PLAN)
    if value is None or value.kind != "string":
        raise GgufError(
            "this GGUF was not written by hybridize",
            where=container.path,
            expected=f"the key {PLAN}",
            next_step="make one with: hybridize export OUT FILE.gguf",
        )
    try:
        plan = parse_json(value.value)
        if not isinstance(plan, dict):
            raise TypeError("it is not an object")
        return plan_from_json(plan, PLAN)
    except (ValueError, TypeError, RecursionError, PlanError) as error:
        raise GgufError("the GGUF's plan is damaged", where=container.path, got=error) from error
