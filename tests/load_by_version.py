"""Runs checkpoints in whichever transformers is on the path, for `tests.transformers_versions`.

Nothing but torch and transformers is imported: the release may be older than what we need.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def answer(folder: str, prompt: list[int], new_tokens: int, *, trust: bool) -> dict[str, Any]:
    """What a checkpoint computes, as far as this release comes with it.

    Returns:
        `logits` (prompt, vocabulary) of one pass; `tokens` (new) and `decoded` (new, vocabulary) of
        greedy decoding with a cache; and `error`, what was raised, where it did not come so far.
    """
    found: dict[str, Any] = {}
    ids = torch.tensor([prompt])
    options = {"trust_remote_code": True} if trust else {}
    greedy = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    wanted = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
        with torch.inference_mode():
            found["logits"] = model.eval()(ids, use_cache=False).logits[0].double()
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy, **wanted)
        found["tokens"] = output.sequences[0, len(prompt) :].tolist()
        found["decoded"] = torch.stack(output.logits)[:, 0].double()
    except Exception as error:  # noqa: BLE001 - whatever an old release raises is the result
        found["error"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.save([answer(**job) for job in jobs], sys.argv[2])
