"""Write the trained demonstration model as a transformers folder, and the record of it."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model_quality as quality
import torch
import transformers
from tokenizers import Tokenizer
from training_data import END_OF_TEXT
from transformers import PreTrainedConfig, PreTrainedModel

from converter.calibration.data.facts import Counts
from converter.calibration.data.recall import RecallExample, recall_examples

PROMPT_TOKENS = 256
_TEST_SEED = 90_001  # training draws other seeds, and each example is new anyway
_README = """---
license: apache-2.0
library_name: transformers
---

# Recall demonstration model

A {architecture} of {layers} layers and {parameters:,} parameters, full attention in {full}, trained
from nothing by `benchmarks/train_models.py` of this repository on text that
`converter/calibration/data/` makes up. It answers questions about facts stated earlier in its
context of {context} tokens and can do nothing else. Figures:
`benchmarks/demo-model.md` there. Apache-2.0.
"""


_RECORD = """# The model `{model}`: record

`{folder}/` was made by `python benchmarks/train_models.py {model}`. Nothing was downloaded:
all text comes from `converter/calibration/data/`.

| | |
|---|---|
| architecture | {architecture}, {layers} layers, width {width}, {parameters:,} parameters |
| full attention | in {full} |
| tokenizer | byte-level BPE, {vocabulary} tokens, every word of the data one token |
| context | {context} tokens; examples of {prompt} and an answer |
| stored | bfloat16; the folder is {folder_bytes:,} bytes |
| seed | {seed} |
| training | {steps:,} steps, {minutes:.0f} minutes on {threads} threads of a shared processor |
| settings | {settings} |
| curriculum | {stages} |
| versions | {versions} |

## Recall

Greedy exact match of the whole answer, {count} fresh examples (seed {test_seed}), prompts of
{prompt} tokens, evidence {nearest} tokens or more before the answer, the stored weights in
float32; 95% Wilson intervals. Sliding: all of these layers, window {window}, no sinks, a reach
of {reach} tokens.

| kind | full attention | all sliding |
|---|---|---|
{recall_rows}

Answer NLL, nats per token: {full_nll:.3f} full, {none_nll:.3f} sliding.

## Each layer's part

Change of answer NLL (nats per token, mean ± standard error over the first {scored} examples),
measured exactly: the layer alone made sliding (remove-one), and alone given full attention while
all others slide (restore-one).

| layer | remove-one | restore-one |
|---|---|---|
{score_rows}
"""


@dataclass(frozen=True)
class Run:
    """What the record says about how the model came about."""

    model: str
    counts: Counts
    seed: int
    settings: dict[str, Any]
    steps: int
    minutes: float
    threads: int
    stages: tuple[str, ...]


def _described(config: PreTrainedConfig) -> dict[str, Any]:
    """What kind of model it is, and how many of its layers attend fully, in words."""
    layers = config.num_hidden_layers
    if config.model_type == "qwen3":
        return {"architecture": "Qwen3", "layers": layers, "full": "every layer"}
    full = config.layer_types.count("full_attention")
    return {"architecture": "Qwen3.5", "layers": layers, "full": f"{full}, the others recurrent"}


def write_folder(model: PreTrainedModel, tokenizer: Tokenizer, out: Path) -> PreTrainedModel:
    """Write the folder in bfloat16 and return the model read back from it, in float32."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    context = model.config.max_position_embeddings
    stored = type(model)(model.config)
    stored.load_state_dict(model.state_dict())
    stored.to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save(str(fresh / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (fresh / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # Readers older than transformers 5 look for the rotary base here.
    config = json.loads((fresh / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (fresh / "model.safetensors").chmod(0o644)
    generation = {"eos_token_id": 0, "pad_token_id": 0, "do_sample": False}
    (fresh / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (fresh / "README.md").write_text(
        _README.format(**_described(model.config), parameters=parameters, context=context)
    )
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    again = type(model).from_pretrained(out, dtype=torch.float32)
    again.set_attn_implementation("plain_training")
    return again.eval()


def _examples(
    model: PreTrainedModel, tokenizer: Tokenizer, counts: Counts
) -> tuple[RecallExample, ...]:
    return recall_examples(
        lambda text: len(tokenizer.encode(text).ids),
        samples=512,
        length_tokens=PROMPT_TOKENS,
        reach_tokens=len(quality.attending(model)) * quality.WINDOW_TOKENS,
        seed=_TEST_SEED,
        counts=counts,
    )


def answers_right(model: PreTrainedModel, tokenizer: Tokenizer, counts: Counts) -> str:
    """The share of whole answers that a model in training gets right, with its interval."""
    data = quality.asked(tokenizer, _examples(model, tokenizer, counts))
    _, exact = quality.answer_nll(model.eval(), data, [None] * len(quality.attending(model)))
    model.train()
    return str(quality.shares(exact, data.kinds)["overall"])


def measured(model: PreTrainedModel, tokenizer: Tokenizer, counts: Counts) -> dict[str, Any]:
    """Measure recall and layer scores; return what the record's measured fields say."""
    window, indices = quality.WINDOW_TOKENS, tuple(quality.attending(model))
    layers = len(indices)
    examples = _examples(model, tokenizer, counts)
    data = quality.asked(tokenizer, examples)
    full_nll, full_exact = quality.answer_nll(model, data, [None] * layers)
    none_nll, none_exact = quality.answer_nll(model, data, [window] * layers)
    full, none = quality.shares(full_exact, data.kinds), quality.shares(none_exact, data.kinds)
    scored = examples[:64]
    scores = quality.layer_scores(model, quality.asked(tokenizer, scored), window)
    return {
        "count": len(examples),
        "nearest": min(example.distance_tokens for example in examples),
        "window": window,
        "reach": layers * window,
        "full_nll": full_nll.mean(),
        "none_nll": none_nll.mean(),
        "recall_rows": "\n".join(f"| {name} | {full[name]} | {none[name]} |" for name in full),
        "scored": len(scored),
        "score_rows": "\n".join(
            f"| {i} | {remove[0]:.3f} ± {remove[1]:.3f} | {restore[0]:.3f} ± {restore[1]:.3f} |"
            for i, remove, restore in zip(
                indices, scores.remove_one, scores.restore_one, strict=True
            )
        ),
    }


def write_record(
    model: PreTrainedModel, tokenizer: Tokenizer, run: Run, folder: Path, record: Path
) -> str:
    """Measure the stored model and write the record; return its text."""
    config = model.config
    text = _RECORD.format(
        **_described(config),
        width=config.hidden_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        prompt=PROMPT_TOKENS,
        folder_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        model=run.model,
        folder=folder.name,
        seed=run.seed,
        steps=run.steps,
        minutes=run.minutes,
        threads=run.threads,
        settings=", ".join(f"{name} {value}" for name, value in run.settings.items()),
        stages="; ".join(run.stages),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        test_seed=_TEST_SEED,
        **measured(model, tokenizer, run.counts),
    )
    record.write_text(text)
    return text
