"""`hybridize run`: complete or chat with a checkpoint, or with a GGUF in llama.cpp."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.grouping import Section, command, option
from converter.cli.options import (
    PATH,
    PLACEMENT,
    Common,
    common_options,
    settings_options,
    trust_option,
)
from converter.common.errors import UsageError

if TYPE_CHECKING:
    from converter.engines.gguf.run import GgufRunner
    from converter.inference.completion import Completion, GenerationSettings
    from converter.inference.generate import Runner, RunSettings

# The largest seed that both engines take; llama.cpp's next one means a random one.
_LARGEST_SEED = (1 << 32) - 2
_ANY_SHARE = click.FloatRange(0, 1)
_BY_MODEL = "[default: as the model says]"


@command("run")
@click.argument("checkpoint", type=PATH)
@option(
    Section.ASKED,
    "-p --prompt TEXT",
    "The text to continue. [default: standard input; on a terminal, a chat]",
)
@option(Section.ASKED, "-f --file prompt_file FILE", "Take the prompt from this file.", type=PATH)
@option(
    Section.ASKED,
    "--chat",
    "Answer instead of continuing; without a prompt, each line of standard input is a turn.",
)
@option(
    Section.ASKED, "-sys --system --system-prompt TEXT", "Begin the chat with this instruction."
)
@option(Section.ASKED, "--original", "Let the original answer, too, for comparison.")
@option(
    Section.SAMPLING,
    "-n --max-new-tokens --max-new N",
    "New tokens, at most. [default: 256]",
    type=click.IntRange(min=1),
    default=256,
)
@option(
    Section.SAMPLING,
    "--temperature --temp T",
    f"0 takes the most likely token. {_BY_MODEL}",
    type=click.FloatRange(min=0),
)
@option(
    Section.SAMPLING,
    "--top-k N",
    f"Draw from the N most likely tokens; 0 from all. {_BY_MODEL}",
    type=click.IntRange(0, (1 << 31) - 1),
)
@option(
    Section.SAMPLING,
    "--top-p P",
    f"Draw from the most likely tokens that have this probability together. {_BY_MODEL}",
    type=_ANY_SHARE,
)
@option(
    Section.SAMPLING,
    "--min-p P",
    f"Leave out tokens less likely than this share of the likeliest. {_BY_MODEL}",
    type=_ANY_SHARE,
)
@option(
    Section.SAMPLING,
    "-s --seed N",
    "Of the drawing, for each answer anew. [default: 0]",
    type=click.IntRange(0, _LARGEST_SEED),
    default=0,
)
@option(
    Section.SAMPLING,
    "--stop TEXT",
    "End an answer before this text; may be given several times.",
    multiple=True,
)
@option(
    Section.KEEP,
    "--full-layers N",
    "Keep the N most useful layers full instead of the checkpoint's plan.",
    type=click.IntRange(min=0),
)
@option(Section.KEEP, "--profile NAME", "Run one of the checkpoint's named plans.")
@option(
    Section.MACHINE,
    "--context TOKENS",
    "Of a GGUF: room for prompt and answer. [default: the model's, or what memory allows]",
    type=click.IntRange(min=1),
)
@trust_option
@settings_options(*PLACEMENT)
@common_options(recipe=False)
def run(
    common: Common,
    checkpoint: Path,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    system: str | None,
    original: bool,
    full_layers: int | None,
    profile: str | None,
    context: int | None,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Continue a text with CHECKPOINT, or chat.

    Speed and memory are told on stderr. CHECKPOINT is a folder, run in transformers, or a GGUF that
    `hybridize export` wrote, run in llama.cpp. On a terminal, Ctrl-C stops an answer.
    """
    from converter.cli.chat import Conversation, converse
    from converter.engines.gguf.container import is_gguf

    generation = _generation(options)
    asked = _prompt(prompt, prompt_file)
    talk = chat or (asked is None and sys.stdin.isatty())
    if system is not None and not talk:
        raise UsageError("only a chat has a system prompt", where="--system", expected="--chat")
    completers: dict[str, Callable[..., Completion]] = {}
    runner: Runner | GgufRunner
    if is_gguf(checkpoint):
        _refuse_beside_gguf(click.get_current_context())
        runner = _gguf_runner(common, checkpoint, generation, context)
        completers["hybrid"] = runner.complete
    else:
        from converter.inference.generate import RunSettings

        if full_layers is not None and profile is not None:
            raise UsageError("--full-layers and --profile: give one of the two")
        if context is not None:
            raise UsageError("--context goes with a GGUF", where=checkpoint)
        how = RunSettings(generation, full_layers, profile, original, trust_remote_code)
        runner = _runner(common, checkpoint, how, options)
        completers["hybrid"] = runner.complete
        if original:
            completers["original"] = partial(runner.complete, original=True)
    conversation = Conversation(common.console, runner.prompt_of, completers, system)
    if not talk:
        conversation.complete(_read_prompt() if asked is None else asked)
    elif asked is None:
        converse(conversation)
    elif conversation.ask(asked):
        raise KeyboardInterrupt


def _refuse_beside_gguf(context: click.Context) -> None:
    names = ("original", "full_layers", "profile", "trust_remote_code", "device", "dtype")
    if given := [name for name in names if context.params[name] not in (None, False)]:
        raise UsageError(
            "a GGUF has one plan and runs on the CPU",
            got=", ".join("--" + name.replace("_", "-") for name in given),
            next_step="run the checkpoint folder that it was exported from",
        )


def _runner(common: Common, checkpoint: Path, how: RunSettings, options: dict[str, Any]) -> Runner:
    from converter.inference.generate import Runner
    from converter.inference.load import resolve_placement

    settings = common.settings(options)
    return Runner(checkpoint, resolve_placement(settings.device, settings.dtype), how)


def _generation(options: dict[str, Any]) -> GenerationSettings:
    """How to continue a text; what is left in the options are settings."""
    from converter.inference.completion import GenerationSettings

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    given = {name: options.pop(name) for name in names}
    for name in ("temperature", "top_p", "min_p"):
        if given[name] is not None and not math.isfinite(given[name]):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is no number", where=flag, got=given[name])
    if "" in given["stop"]:
        raise UsageError("a stop text is empty", where="--stop")
    return GenerationSettings(**given)


def _gguf_runner(
    common: Common, file: Path, generation: GenerationSettings, context: int | None
) -> GgufRunner:
    from converter.engines.gguf.run import GgufRunner

    runner = GgufRunner(file, generation, context_tokens=context, warn=common.console.say)
    click.get_current_context().call_on_close(runner.close)
    common.console.say(f"room for {runner.context_tokens:,} tokens")
    return runner


def _prompt(text: str | None, file: Path | None) -> str | None:
    """The prompt that was given, as text or as a file."""
    from converter.cli.chat import as_utf8
    from converter.common.files import read_file

    if file is None:
        return None if text is None else as_utf8(text)
    if text is not None:
        raise UsageError("--prompt and --file: give one of the two")
    return read_file(file, UsageError)


def _read_prompt() -> str:
    from converter.cli.chat import as_utf8

    try:
        return as_utf8(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise UsageError("the prompt is not UTF-8 text", where="standard input") from error
