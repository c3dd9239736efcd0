"""Run a checkpoint as a stranger would: in a fresh process, offline, with nothing of ours imported.

This file is started by path with `python -I` and must import neither `converter` nor anything that
does. It reads a request (see `request.py`) from the file named on the command line, writes logits
to the file that the request names, and prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging

Tensors = dict[str, torch.Tensor]

# Tokens generated without a cache.
UNCACHED = 2


def load(request: dict[str, Any], trust: bool) -> tuple[Any, dict[str, Any]]:
    """The model where it is to run, and what loading it said about its keys."""
    model, info = getattr(transformers, request["auto_class"]).from_pretrained(
        request["folder"],
        dtype=getattr(torch, request["load_dtype"]),
        trust_remote_code=trust,
        local_files_only=True,
        output_loading_info=True,
        **request["options"],
    )
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {key: sorted(map(str, info.get(key, ()))) for key in keys}
    if request["in_turn"]:
        keep_layers_stored(model, request["device"], getattr(torch, request["dtype"]))
    else:
        model.to(device=request["device"], dtype=getattr(torch, request["dtype"]))
    return model.eval(), {"class": type(model).__name__, **found}


def keep_layers_stored(model: Any, device: str, dtype: torch.dtype) -> None:
    """Move all but the layers; each layer's weights come when its turn is, and go again."""
    decoder = model.get_decoder()
    layers, decoder.layers = decoder.layers, torch.nn.ModuleList()
    model.to(device=device, dtype=dtype)
    decoder.layers = layers
    for layer in layers:
        stored = layer.state_dict()

        def bring(layer: Any, *_: Any, stored: Tensors = stored) -> None:
            here = {name: tensor.to(device, dtype) for name, tensor in stored.items()}
            layer.load_state_dict(here, assign=True)

        def drop(layer: Any, *_: Any, stored: Tensors = stored) -> None:
            layer.load_state_dict(stored, assign=True)

        layer.register_forward_pre_hook(bring)
        layer.register_forward_hook(drop)


def shapes_of(model: Any) -> dict[str, list[int]]:
    """Names and shapes of the parameters that the checkpoint's class has."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    held = model.named_parameters(remove_duplicate=False)
    return {name: list(tensor.shape) for name, tensor in held if name not in tied}


def run_forward(model: Any, request: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    """Logits of the chosen rows from one pass over the whole text, without a cache."""
    logits: torch.Tensor = model(
        input_ids=torch.tensor([request["ids"]], device=model.device),
        logits_to_keep=torch.tensor(request["rows"], device=model.device),
        use_cache=False,
        **options,
    ).logits[0]
    return logits


def run_steps(model: Any, steps: list[Tensors], options: dict[str, Any]) -> torch.Tensor:
    """Logits (batch, steps, vocabulary) of the last row of each step, over one growing cache."""
    cache, logits = None, []
    for step in steps:
        given = {name: tensor.to(model.device) for name, tensor in step.items()}
        output = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
        cache = output.past_key_values
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


def run_cached(model: Any, request: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    """The last row of each chunk of a prefill in chunks, and every row decoded after it."""
    ids, prompt, chunk = request["ids"], request["prompt_tokens"], request["chunk_tokens"]
    pieces = [ids[start : min(start + chunk, prompt)] for start in range(0, prompt, chunk)]
    pieces += [[token] for token in ids[prompt:]]
    return run_steps(model, [{"input_ids": torch.tensor([piece])} for piece in pieces], options)[0]


def run_padded(model: Any, request: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    """Logits (2, rows) of a text cut at the front and padded on the left, and of the whole text."""
    ids, prompt, cut = request["ids"], request["prompt_tokens"], request["padding_tokens"]
    batch = torch.tensor([[0] * cut + ids[cut:], ids])
    real = torch.ones_like(batch)
    real[0, :cut] = 0
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    steps = [
        {
            "input_ids": batch[:, start:end],
            "attention_mask": real[:, :end],
            "position_ids": positions[:, start:end],
        }
        for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(ids)))]
    ]
    return run_steps(model, steps, options)


def run_generate(model: Any, request: dict[str, Any], tokens: int, use_cache: bool) -> torch.Tensor:
    """Greedy continuation of the prompt, whatever the checkpoint's own generation settings."""
    model.generation_config = GenerationConfig(pad_token_id=0)
    prompt = torch.tensor([request["ids"][: request["prompt_tokens"]]], device=model.device)
    output: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=use_cache,
    )
    return output[0, prompt.shape[1] :]


def run_all(model: Any, request: dict[str, Any], trusted: bool) -> Tensors:
    """Every run of one loaded model."""
    # Where the prompt ends, for the models that must be told.
    options = {"prompt_length": request["prompt_tokens"]} if trusted else {}
    decoded = len(request["ids"]) - request["prompt_tokens"]
    with torch.inference_mode():
        results = {
            "forward": run_forward(model, request, options),
            "cached": run_cached(model, request, options),
            "padded": run_padded(model, request, options),
            "generated": run_generate(model, request, decoded, True),
            # Each of them is a pass over the whole text.
            "generated uncached": run_generate(model, request, min(decoded, UNCACHED), False),
        }
    prefix = "trusted" if trusted else "untrusted"
    return {f"{prefix} {name}": tensor.cpu().contiguous() for name, tensor in results.items()}


def main() -> None:
    """Answer the request."""
    logging.set_verbosity_error()
    # Not in TF32, which rounds to ten bits.
    torch.set_float32_matmul_precision("highest")
    logging.disable_progress_bar()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tensors: Tensors = {}
    report: dict[str, Any] = {"tokens": None}
    try:
        model, report["untrusted"] = load(request, trust=False)
    except ValueError as error:
        # transformers' own refusal of an unknown model type or of code without trust.
        report["refusal"] = str(error)
    else:
        if request["native"]:
            tensors |= run_all(model, request, trusted=False)
            report["shapes"] = shapes_of(model)
        del model
    if request["trust"]:
        model, report["trusted"] = load(request, trust=True)
        tensors |= run_all(model, request, trusted=True)
        report["shapes"] = shapes_of(model)
    if request["text"]:
        tokenizer = AutoTokenizer.from_pretrained(
            request["folder"], trust_remote_code=False, local_files_only=True
        )
        report["tokens"] = tokenizer.encode(request["text"])
    report["imported"] = sorted(name for name in sys.modules if name.split(".")[0] == "converter")
    save_file(tensors, request["out"])
    print(json.dumps(report))  # noqa: T201 - read by the process that started this one


if __name__ == "__main__":
    main()
