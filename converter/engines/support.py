"""Which engine honours which checkpoint: the one table behind `inspect`, `--target` and the card.

Measured facts, by engine and version, are in docs/engines.md. An engine's word is one of

    honoured     it computes the plan as it loads the checkpoint, or the GGUF that `note` names
    needs a flag it computes the plan when started as `note` says
    wrong window it slides, but not by the plan's window
    silent full  it ignores the plan and runs full attention: quality and memory of the original
    refused      it does not load the checkpoint, or cannot compute the plan in any form
"""

from __future__ import annotations

from dataclasses import dataclass

from converter.checkpoint.format import format_of
from converter.common.errors import PlanError
from converter.engines.gguf.architecture import windowed_arch
from converter.model.mask import Mask
from converter.model.source import Source

HONOURED, FLAG, WRONG, SILENT_FULL, REFUSED = (
    "honoured",
    "needs a flag",
    "wrong window",
    "silent full",
    "refused",
)

TARGETS = ("any", "transformers", "llama.cpp", "vllm", "mlx")


@dataclass(frozen=True)
class Verdict:
    """What an engine does with a checkpoint.

    Attributes:
        engine: its name.
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


_TRUST = "pass trust_remote_code=True; without it, loading is refused"
_MLX = "--trust-remote-code: mlx_hybrid.py in the checkpoint computes it; refused without"
_CODE_ONLY = "the mask needs this checkpoint's own code"

# (engine, target) -> form -> (word, note). Forms: a native model_type, or "custom"; or that "with
# mlx" when the checkpoint ships code for mlx-lm, where an engine has a row for it.
_TABLE: dict[tuple[str, str | None], dict[str, tuple[str, str]]] = {
    ("transformers", "transformers"): {
        "qwen2": (HONOURED, "native code"),
        "qwen3": (HONOURED, "native code"),
        "mistral": (HONOURED, "native code (Ministral)"),
        "smollm3": (HONOURED, "native code"),
        "custom": (FLAG, _TRUST),
    },
    ("vLLM", "vllm"): {
        "qwen2": (FLAG, "--model-impl transformers; its own Qwen2 refuses the config"),
        "qwen3": (FLAG, "--model-impl transformers; its own Qwen3 refuses the config"),
        "mistral": (HONOURED, "its Llama code reads layer_types"),
        "smollm3": (FLAG, "--model-impl transformers"),
        "custom": (REFUSED, _CODE_ONLY),
    },
    ("SGLang", None): {
        "qwen2": (SILENT_FULL, "its Qwen2 code does not read layer_types"),
        "qwen3": (SILENT_FULL, "its Qwen3 code does not read layer_types"),
        "mistral": (SILENT_FULL, "its Llama code does not read layer_types"),
        "smollm3": (WRONG, "its SmolLM3 code slides by one token more"),
        "custom": (REFUSED, _CODE_ONLY),
    },
    ("mlx-lm", "mlx"): {
        "qwen2": (FLAG, _MLX),
        "qwen3": (FLAG, _MLX),
        "mistral": (HONOURED, "its Llama code reads layer_types; one layer must be full"),
        "smollm3": (HONOURED, "with the original's full-size cache"),
        "custom": (REFUSED, _CODE_ONLY),
        "custom with mlx": (FLAG, _MLX),
    },
}


# Every engine that has a verdict, in the order of the tables.
ENGINES = (*(engine for engine, _ in _TABLE), "llama.cpp")

# What to type where an engine computes the plan; transformers' few lines are in the card.
_COMMANDS = {
    "vLLM": {
        "honoured": "vllm serve PATH",
        "needs a flag": "vllm serve PATH --model-impl transformers",
    },
    "mlx-lm": {
        "honoured": "mlx_lm.generate --model PATH --prompt 'Hello'",
        "needs a flag": "mlx_lm.generate --model PATH --trust-remote-code --prompt 'Hello'",
    },
}


def verdicts(source: Source, mask: Mask) -> tuple[Verdict, ...]:
    """What every engine does with a hybrid of a source under a mask."""
    form = format_of(source, mask)
    key = form.model_type if form.native else "custom"
    special = f"{key} with mlx" if form.mlx_module is not None else key
    found = []
    for (engine, target), by_form in _TABLE.items():
        word, note = by_form.get(special, by_form[key])
        found.append(Verdict(engine, word, note, target, _COMMANDS.get(engine, {}).get(word)))
    return (*found, _llama_cpp(source, mask))


def _llama_cpp(source: Source, mask: Mask) -> Verdict:
    """What llama.cpp does, by the table that the export itself goes by."""
    try:
        arch = windowed_arch(source, mask, None)
    except PlanError as error:
        return Verdict("llama.cpp", REFUSED, error.details["got"], "llama.cpp")
    note = (
        f"from the GGUF of hybridize export OUT FILE.gguf (architecture {arch}); "
        "a plain conversion runs full attention"
    )
    return Verdict("llama.cpp", HONOURED, note, "llama.cpp")


def check_target(target: str, source: Source, mask: Mask) -> None:
    """Refuse a plan that the engine it is meant for cannot honour.

    Raises:
        PlanError: the engine would refuse the checkpoint or silently compute something else.
    """
    if target == "any":
        return
    if target == "llama.cpp":
        windowed_arch(source, mask, "--target")
    verdict = next(v for v in verdicts(source, mask) if v.target == target)
    if verdict.word in (REFUSED, SILENT_FULL, WRONG):
        form = format_of(source, mask)
        raise PlanError(
            f"{verdict.engine} would not honour this plan: {verdict.word}",
            where="--target",
            got=verdict.note if form.native else f"{verdict.note} ({form.why_not_native})",
            next_step="leave out --sinks and --full-decode"
            if not form.native
            else "choose another --target, or a model of another family",
        )
