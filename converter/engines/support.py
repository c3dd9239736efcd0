"""Which engine honours which checkpoint: the one table behind `inspect`, `--target` and the card.

Measured facts, by engine and version, are in docs/engines.md. An engine's word is one of

    honoured     it computes the plan as it loads the checkpoint, or the GGUF that `note` names
    needs a flag it computes the plan when started as `note` says
    wrong window it slides, but not by the plan's window
    silent full  it ignores the plan and runs full attention: quality and memory of the original
    refused      it does not load the checkpoint, or cannot compute the plan in any form
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checkpoint.format import format_of
from converter.common.errors import PlanError
from converter.model.mask import Mask

if TYPE_CHECKING:
    from converter.model.source import Source

TARGETS = ("any", "transformers", "llama.cpp", "vllm", "mlx")


@dataclass(frozen=True)
class Verdict:
    """What an engine does with a checkpoint.

    Attributes:
        word: one of the words at the top of this file.
        note: what to do, or why.
        target: the `--target` that asks for this engine, or None.
        command: what to type, with PATH for the checkpoint; None where nothing is to be typed, or
            nothing computes the plan.
    """

    engine: str
    word: str
    note: str
    target: str | None
    command: str | None = None


# By engine, in the order of the tables: its target, forms and commands; the file says more.
_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
# Every engine that has a verdict.
ENGINES = (*_TABLE, "llama.cpp")


def verdicts(source: Source, mask: Mask, *, by_heads: bool = False) -> tuple[Verdict, ...]:
    """What every engine does with a hybrid of a source under a mask.

    With `by_heads` for plans in which KV heads of one layer attend differently.
    """
    from converter.engines.gguf.architecture import windowed_arch

    form = format_of(source, mask, by_heads=by_heads)
    key = form.model_type if form.native else "custom"
    special = [f"{key} with mlx"] if form.mlx_module is not None else []
    if not form.native and not form.vllm:
        special.append(f"{key} without vllm_hybrid.py")
    special += [f"{key} with a bare window"] if mask.is_bare else []
    special = [f"{key} by KV heads"] if by_heads else special
    found = []
    for engine, known in _TABLE.items():
        forms = known["forms"]
        word, note = next(forms[name] for name in (*special, key) if name in forms)
        command = known.get("commands", {}).get(word)
        note = note.replace("SINCE", form.since).replace("WHY", source.family.not_in_vllm)
        found.append(Verdict(engine, word, note, known.get("target"), command))
    # What llama.cpp does says the table that the export itself goes by.
    try:
        arch = windowed_arch(source, mask, None, by_heads=by_heads)
    except PlanError as error:
        return (*found, Verdict("llama.cpp", "refused", error.details["got"], "llama.cpp"))
    note = (
        f"from the GGUF of hybridize export OUT FILE.gguf (architecture {arch}); "
        "what other tools convert runs full attention, or is refused"
    )
    return (*found, Verdict("llama.cpp", "honoured", note, "llama.cpp"))


def check_target(target: str, source: Source, mask: Mask, *, by_heads: bool = False) -> None:
    """Refuse a plan that the engine it is meant for cannot honour.

    With `by_heads` for plans in which KV heads of one layer attend differently.

    Raises:
        PlanError: the engine would refuse the checkpoint or silently compute something else.
    """
    from converter.engines.gguf.architecture import WHOLE_LAYERS, windowed_arch

    if target == "any":
        return
    if target == "llama.cpp":
        windowed_arch(source, mask, "--target", by_heads=by_heads)
    verdict = next(v for v in verdicts(source, mask, by_heads=by_heads) if v.target == target)
    if verdict.word not in ("honoured", "needs a flag"):
        form = format_of(source, mask, by_heads=by_heads)
        raise PlanError(
            f"{verdict.engine} would not honour this plan: {verdict.word}",
            where="--target",
            got=verdict.note if form.native else f"{verdict.note} ({form.why_not_native})",
            next_step=WHOLE_LAYERS
            if by_heads
            else "choose another --target, or a model of another family"
            if mask.is_bare
            else "leave out --sinks and --full-decode",
        )
