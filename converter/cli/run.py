"""`hybridize run`: complete or chat with a checkpoint, or with a GGUF in llama.cpp."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
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
    from converter.cli.console import Console
    from converter.engines.gguf.run import GgufRunner
    from converter.inference.generate import Completion, Runner, Turn


@command("run")
@click.argument("checkpoint", type=PATH)
@option(
    Section.ASKED,
    "-p",
    "--prompt",
    metavar="TEXT",
    help="The text to continue. [default: standard input]",
)
@option(
    Section.ASKED,
    "--chat",
    is_flag=True,
    help="Answer instead of continuing; without --prompt, each line of standard input is a turn.",
)
@option(
    Section.SAMPLING,
    "-n",
    "--max-new-tokens",
    "--max-new",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="New tokens, at most.",
)
@option(
    Section.SAMPLING,
    "--temperature",
    "--temp",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the most likely token.",
)
@option(
    Section.SAMPLING,
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of the sampling.",
)
@option(
    Section.KEEP,
    "--full-layers",
    type=click.IntRange(min=0),
    metavar="N",
    help="Keep the N most useful layers full instead of the checkpoint's plan.",
)
@option(
    Section.KEEP,
    "--profile",
    metavar="NAME",
    help="Run one of the checkpoint's named plans.",
)
@option(
    Section.MACHINE,
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Of a GGUF: room for prompt and answer. [default: the model's, or what memory allows]",
)
@trust_option
@settings_options(*PLACEMENT)
@common_options(recipe=False)
def run(
    common: Common,
    checkpoint: Path,
    prompt: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    full_layers: int | None,
    profile: str | None,
    context: int | None,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Continue a text with CHECKPOINT, or chat.

    Speed and memory are told on stderr. CHECKPOINT is a folder, run in transformers, or a GGUF that
    `hybridize export` wrote, run in llama.cpp.
    """
    from converter.engines.gguf.container import is_gguf

    if not math.isfinite(temperature):
        raise UsageError("the temperature is no number", where="--temperature", got=temperature)
    runner: Runner | GgufRunner
    if is_gguf(checkpoint):
        given = {
            "--full-layers": full_layers,
            "--profile": profile,
            "--trust-remote-code": trust_remote_code or None,
            "--device": options["device"],
            "--dtype": options["dtype"],
        }
        if also := [name for name, value in given.items() if value is not None]:
            raise UsageError("a GGUF has one plan and runs on the CPU", got=", ".join(also))
        runner = _gguf_runner(common, checkpoint, max_new_tokens, temperature, seed, context)
    else:
        from converter.inference.generate import Runner, RunSettings
        from converter.inference.load import resolve_placement

        settings = common.settings(options)
        if full_layers is not None and profile is not None:
            raise UsageError("--full-layers and --profile: give one of the two")
        if context is not None:
            raise UsageError("--context goes with a GGUF", where=checkpoint)
        runner = Runner(
            checkpoint,
            resolve_placement(settings.device, settings.dtype),
            RunSettings(max_new_tokens, temperature, seed, full_layers, profile, trust_remote_code),
        )
    if chat and prompt is None:
        _converse(common.console, runner)
        return
    text = _utf8(_read_prompt() if prompt is None else prompt)
    request = runner.prompt_of([{"role": "user", "content": text}]) if chat else text
    _answer(common.console, runner, request, is_chat=chat)


def _gguf_runner(
    common: Common,
    file: Path,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    context: int | None,
) -> GgufRunner:
    from converter.engines.gguf.run import GgufRunner

    runner = GgufRunner(
        file,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        context_tokens=context,
        warn=common.console.say,
    )
    click.get_current_context().call_on_close(runner.close)
    common.console.say(f"room for {runner.context_tokens:,} tokens")
    return runner


def _utf8(text: str) -> str:
    """The text, refused when it came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not UTF-8 text", where="prompt") from error
    return text


def _read_prompt() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError("the prompt is not UTF-8 text", where="standard input") from error


def _converse(console: Console, runner: Runner | GgufRunner) -> None:
    """One answer to each line of standard input, all in one conversation."""
    turns: list[Turn] = []
    for line in sys.stdin:
        if line.strip():
            turns.append({"role": "user", "content": _utf8(line.strip())})
            done = _answer(console, runner, runner.prompt_of(turns), is_chat=True)
            turns.append({"role": "assistant", "content": done.text})


def _answer(
    console: Console, runner: Runner | GgufRunner, request: str, *, is_chat: bool
) -> Completion:
    from converter.common.units import human_bytes

    def show(piece: str) -> None:
        if not console.json_output:
            console.stream(piece)

    done = runner.complete(request, is_chat=is_chat, show=show)
    speed = done.decode_tokens_per_second
    console.result(asdict(done) | {"decode_tokens_per_second": speed}, lambda: console.stream("\n"))
    console.say(
        f"{done.prompt_tokens} prompt tokens in {done.prefill_seconds:.2f} s "
        f"({done.prompt_tokens / max(done.prefill_seconds, 1e-9):.0f} tokens/s), "
        f"{done.new_tokens} new"
        + (f" at {speed:.1f} tokens/s" if speed is not None else "")
        + f"; KV cache {human_bytes(done.cache_bytes)} "
        f"instead of {human_bytes(done.full_cache_bytes)}"
    )
    return done
