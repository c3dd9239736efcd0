"""The source with the attention of the checkpoint: what calibration measures is what ships."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from converter.checkpoint import write_model
from converter.data import Example
from converter.errors import UsageError
from converter.mask import SLIDING, Mask
from converter.plan import Plan
from converter.source import Source

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where a model runs.

    Attributes:
        device: a torch device such as `cpu` or `cuda:0`.
        dtype: the name of a torch dtype, out of `converter.settings.DTYPES` without `auto`.
    """

    device: str
    dtype: str


def resolve_placement(device: str, dtype: str) -> Placement:
    """Turn `auto` into what suits this machine: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        UsageError: the device does not exist here.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            "this device cannot be used",
            where="--device",
            got=f"{device}: {str(error).splitlines()[0]}",
            expected="cpu, cuda or cuda:0",
        ) from error
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
    return Placement(device, dtype)


def quiet_libraries() -> None:
    """Keep transformers' bars and notices out of our own talk; its errors still pass."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class AnswerMeter:
    """Measures answers under any choice of full-attention layers, on one loaded model.

    Attributes:
        forwards: forward passes run so far.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.forwards = 0

    def measure(self, example: Example, full_layers: Sequence[int]) -> tuple[float, bool]:
        """Mean answer NLL (nats per token, float32) and whether greedy decoding gets it right.

        The whole example is one teacher-forced forward pass; the output head runs on the rows that
        predict answer tokens only.
        """
        import torch

        self._model.set_full_attention_layers(list(full_layers))
        ids = [*example.prompt, *example.answer[:-1]]
        first = len(example.prompt) - 1
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor([ids], device=device),
                logits_to_keep=torch.arange(first, len(ids), device=device),
                prompt_length=len(example.prompt),
                use_cache=False,
            ).logits[0]
            answer = torch.tensor(example.answer, device=device)
            log_probabilities = logits.float().log_softmax(dim=-1)
            nll = -log_probabilities.gather(1, answer[:, None]).mean()
            correct = bool((logits.argmax(dim=-1) == answer).all())
        self.forwards += 1
        return float(nll), correct


def load_meter(source: Source, mask: Mask, placement: Placement) -> AnswerMeter:
    """Load the source through the very files a checkpoint would hold, all layers sliding.

    The folder is temporary and only points at the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    plan = Plan(
        (SLIDING,) * source.shape.layers, mask, "measurement", None, None, source.name, None
    )
    started = time.perf_counter()
    with TemporaryDirectory(prefix="hybridize-") as temporary:
        # transformers names its copy of the code after the folder; a fixed name keeps it to one.
        folder = Path(temporary) / "hybridize_measurement"
        folder.mkdir()
        write_model(source, plan, folder, symlink=True)
        dtype: torch.dtype = getattr(torch, placement.dtype)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            # The code is what `write_model` has just rendered, not the source's.
            trust_remote_code=True,
            local_files_only=True,
        )
    # Not `device_map`, which needs the accelerate package.
    model.to(placement.device).eval()
    _log.info("loaded the model in %.1f s", time.perf_counter() - started)
    return AnswerMeter(model)
