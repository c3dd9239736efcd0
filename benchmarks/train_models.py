"""Train a small model from nothing: the demonstration model, or one to compare selectors on.

    python benchmarks/train_models.py              writes benchmarks/demo-model/
    python benchmarks/train_models.py six          writes build/models/six/
    python benchmarks/train_models.py ten          writes build/models/ten/
    python benchmarks/train_models.py twelve       writes build/models/twelve/
    python benchmarks/train_models.py four-heads   writes build/models/four-heads/
    python benchmarks/train_models.py twenty-four  writes build/models/twenty-four/
    python benchmarks/train_models.py thirty-six   writes build/models/thirty-six/
    python benchmarks/train_models.py recurrent    writes build/models/recurrent/

A small Qwen3 with full attention in every layer (the last: a Qwen3.5, half of whose layers are
recurrent) learns the text and the questions of
`converter.calibration.data.recall`, so that turning layers to sliding windows visibly costs
answers. The curriculum
starts with facts asked again at once, without filler: looking up is learnt there first, and started
in the examples' own layout training would stay on guessing among the values it has seen. The deep
models and the recurrent one are grown from the demonstration model (`growing.py`) and go on in the
last stage.

State is kept under `--work` every few hundred steps; the same command continues after an
interruption.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import growing
import model_quality  # noqa: F401 (registers the attention trained with)
import model_record
import torch
import training_data
from torch import Tensor, nn
from training_data import ANSWER_KINDS, Stage, Vocabulary
from transformers import (
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from converter.calibration.data.facts import DEFAULT_COUNTS, Counts

CONTEXT_TOKENS = 288


@dataclass(frozen=True)
class Settings:
    """What determines a model, besides the code."""

    seed: int = 1
    layers: int = 8
    full_every: int = 1  # one layer in so many attends fully, the others are recurrent
    heads: int = 4
    kv_heads: int = 2
    counts: Counts = DEFAULT_COUNTS
    batch_tokens: int = 4608
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    final_steps: int = 600
    text_weight: float = 0.2
    grown_from: str | None = None
    left_out: float = 0.0
    twins: bool = False  # trained layers' attention is shared by two layers each


_GROWN = Settings(
    batch_tokens=2304,
    learning_rate=2e-3,
    warmup_steps=20,
    grown_from="demo",
    left_out=0.08,
)
# Depth, facts and seed differ, so that what holds for all is not one model's luck.
MODELS = {
    "demo": Settings(),
    "six": Settings(
        seed=2,
        layers=6,
        counts=Counts(
            pairs=8, links=4, chained_links=2, relation_keys=2, relations_per_key=3, spans=3
        ),
    ),
    # One key/value head for two query heads: a layer cannot hold every kind of lookup by itself.
    "ten": Settings(
        seed=4,
        layers=10,
        heads=2,
        kv_heads=1,
        counts=Counts(
            pairs=6, links=6, chained_links=3, relation_keys=3, relations_per_key=3, spans=2
        ),
    ),
    "twelve": Settings(
        seed=3,
        layers=12,
        counts=Counts(
            pairs=5, links=8, chained_links=4, relation_keys=3, relations_per_key=2, spans=1
        ),
    ),
    # As the demonstration model, but for each query head having a KV head of its own.
    "four-heads": replace(_GROWN, seed=7, kv_heads=4, left_out=0.0, final_steps=300),
    "twenty-four": replace(_GROWN, seed=5, layers=24, final_steps=220, twins=True),
    "thirty-six": replace(_GROWN, seed=6, layers=36, final_steps=150, twins=True),
    # The bundled model's layers 1, 2, 5 and 6 attend; for the others' attention, recurrent layers.
    "recurrent": replace(_GROWN, seed=7, layers=12, full_every=2, final_steps=450, left_out=0.0),
}


def curriculum(counts: Counts) -> tuple[Stage, ...]:
    """From words said again at once to the examples' own layout with all their facts."""
    few = replace(counts, links=3, chained_links=0)
    one = replace(counts, links=3, chained_links=1)
    return (
        Stage("4 chains", 100, 4, 0.0, 0.0, few, 0.2, 1500),
        Stage("8 chains", 200, 8, 0.0, 0.0, few, 0.1, 500),
        Stage("all kinds", 160, 0, 0.0, 0.0, few, 0.05, 1000),
        Stage("all kinds, filler", CONTEXT_TOKENS, 0, 0.3, 0.3, few, 0.05, 500),
        Stage("far questions", CONTEXT_TOKENS, 0, 0.8, 0.3, few, 0.03, 500),
        Stage("a link to a link", CONTEXT_TOKENS, 0, 0.6, 0.1, one, 0.0, 250),
        Stage("several links to links", CONTEXT_TOKENS, 0, 0.6, 0.1, counts, 0.0, 0),
    )


def untrained(vocabulary_size: int, settings: Settings) -> PreTrainedModel:
    """Make a model with transformers' own first weights: a Qwen3, or a Qwen3.5 where told."""
    recurrent = settings.full_every > 1
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    sizes = {
        "vocab_size": vocabulary_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rope_parameters": rope | ({"partial_rotary_factor": 1.0} if recurrent else {}),
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if not recurrent:
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    # A state this small does not hold the facts of an example.
    state = {
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
    }
    every = {"full_attention_interval": settings.full_every}
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **state, **every))


def build_model(vocabulary_size: int, settings: Settings) -> PreTrainedModel:
    """Make the untrained model.

    Projections start at 1/sqrt(inputs), those that write to the residual stream a further
    0.5/sqrt(2 x layers) smaller. With transformers' own 0.02 the lookup never forms.
    """
    model = untrained(vocabulary_size, settings)
    model.set_attn_implementation("plain_training")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
                scale = module.in_features**-0.5
                if name.endswith(("o_proj", "out_proj", "down_proj")):
                    scale *= 0.5 / math.sqrt(2 * settings.layers)
                module.weight.normal_(0.0, scale)
            elif isinstance(module, nn.Conv1d):
                module.weight.normal_(0.0, module.kernel_size[0] ** -0.5)
            elif name.endswith(("q_norm", "k_norm")):
                # At 1 no attention score can pass 5.7: too flat to look up. (Qwen3.5 adds 1.)
                module.weight.fill_(1.7 if settings.full_every == 1 else 0.7)
        model.model.embed_tokens.weight.normal_(0.0, 0.1)
    return model


def answer_and_text_loss(
    model: PreTrainedModel, tokens: Tensor, answers: Tensor, text_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss over answer tokens plus `text_weight` times the loss over a sixth of the other tokens.

    Args:
        model: the model.
        tokens: (sequences, length).
        answers: (sequences, length), kinds of answer tokens, 0 elsewhere.
        text_weight: what text counts for beside answers.

    Returns:
        The loss to train on, the mean answer loss, and for each answer token its kind and whether
        it is the most likely token.

    """
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    targets, kinds = tokens[:, 1:], answers[:, 1:]
    asked = kinds > 0
    other = ~asked & (torch.rand(targets.shape) < 1 / 6)
    logits = model.lm_head(torch.cat([hidden[asked], hidden[other]])).float()
    count = int(asked.sum())
    answer_loss = nn.functional.cross_entropy(logits[:count], targets[asked])
    text_loss = nn.functional.cross_entropy(logits[count:], targets[other])
    right = logits[:count].argmax(-1) == targets[asked]
    return answer_loss + text_weight * text_loss, answer_loss.detach(), kinds[asked], right


def folder_of(name: str) -> Path:
    """Where a trained model is."""
    here = Path(__file__).resolve().parent
    return here / "demo-model" if name == "demo" else here.parent / "build" / "models" / name


class Training:
    """Model, optimizers and position in the curriculum: all that a checkpoint holds."""

    def __init__(self, settings: Settings, vocabulary: Vocabulary, work: Path) -> None:
        self.settings, self.vocabulary, self.work = settings, vocabulary, work
        self.stages = curriculum(settings.counts)
        torch.manual_seed(settings.seed)
        self.rng = random.Random(settings.seed)  # noqa: S311
        self.model = build_model(vocabulary.size, settings)
        if settings.grown_from is not None:
            self.stages = self.stages[-1:]
            growing.grow(self.model, folder_of(settings.grown_from), settings.twins)
            growing.leave_out(self.model, settings.left_out)
        blocks = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not block for block in blocks)]
        # Orthogonalised steps for the matrices pass the plateaus in a fraction of AdamW's steps.
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                blocks, lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                others, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            ),
        ]
        self.step = self.stage = self.stage_step = 0
        self.running_loss = 9.0
        self.seconds = 0.0
        self.history: list[str] = []

    def save(self) -> None:
        """Replace the checkpoint in one move, so that a kill leaves the old one or the new one."""
        state: dict[str, Any] = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": self.rng.getstate(),
            "torch_random": torch.get_rng_state(),
            "history": self.history,
            "position": (self.step, self.stage, self.stage_step, self.running_loss, self.seconds),
        }
        self.work.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.work / "state.new")
        (self.work / "state.new").replace(self.work / "state.pt")

    def load(self) -> None:
        """Continue from the checkpoint when there is one."""
        path = self.work / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=False)
        if state["settings"] != asdict(self.settings):
            log(f"note: {path} was started with {state['settings']}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.setstate(state["random"])
        torch.set_rng_state(state["torch_random"])
        self.step, self.stage, self.stage_step, self.running_loss, self.seconds = state["position"]
        self.history = state["history"]
        log(f"continuing at step {self.step}")

    def learning_rate(self) -> float:
        """Warm-up, constant through the curriculum, half a cosine over the last stage."""
        settings = self.settings
        peak = settings.learning_rate * min(1.0, (self.step + 1) / settings.warmup_steps)
        if self.stage < len(self.stages) - 1:
            return peak
        done = min(1.0, self.stage_step / settings.final_steps)
        return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def advance(self) -> None:
        """Go to the next stage when this one is learnt or has had its steps."""
        stage = self.stages[self.stage]
        self.stage_step += 1
        if self.stage == len(self.stages) - 1:
            return
        if self.running_loss < stage.until_loss or self.stage_step >= stage.most_steps:
            self.history.append(f"{stage.name}: {self.stage_step} steps")
            log(f"step {self.step}: '{stage.name}' left at loss {self.running_loss:.3f}")
            self.stage, self.stage_step, self.running_loss = self.stage + 1, 0, 9.0
            self.save()

    def run(self) -> None:
        """Train to the end of the last stage."""
        right, count = torch.zeros(len(ANSWER_KINDS) + 1), torch.zeros(len(ANSWER_KINDS) + 1)
        while self.stage < len(self.stages) - 1 or self.stage_step < self.settings.final_steps:
            started = time.perf_counter()
            stage = self.stages[self.stage]
            drawn = training_data.batch(
                stage, self.vocabulary, self.rng, self.settings.batch_tokens
            )
            tokens, answers = (torch.from_numpy(array) for array in drawn)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, answer_loss, kinds, hits = answer_and_text_loss(
                    self.model, tokens, answers, self.settings.text_weight
                )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            share = max(0.1, 1 / (self.stage_step + 1))
            self.running_loss += share * (float(answer_loss) - self.running_loss)
            right.index_add_(0, kinds, hits.float())
            count.index_add_(0, kinds, torch.ones(len(kinds)))
            self.step += 1
            self.seconds += time.perf_counter() - started
            if self.step % 50 == 0:
                shares = " ".join(
                    f"{kind} {float(right[i] / count[i]):.3f}"
                    for i, kind in enumerate(ANSWER_KINDS, 1)
                    if count[i]
                )
                log(
                    f"step {self.step} [{stage.name} {self.stage_step}] "
                    f"{self.seconds / 60:.1f} min loss {self.running_loss:.3f} {shares}"
                )
                right.zero_()
                count.zero_()
            if self.step % 100 == 0:
                self.save()
            self.advance()
        self.history.append(f"{self.stages[-1].name}: {self.stage_step} steps")


def log(message: str) -> None:
    """Report progress."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Train, write the folder, measure it, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    build = Path(__file__).resolve().parent.parent / "build"
    parser.add_argument("model", nargs="?", choices=MODELS, default="demo")
    parser.add_argument("--out", type=Path, help="[default: as above]")
    parser.add_argument("--work", type=Path, default=build / "training")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    name = options.model
    out = options.out or folder_of(name)
    torch.set_num_threads(options.threads)
    settings = MODELS[name]
    tokenizer = training_data.build_tokenizer()
    vocabulary = training_data.vocabulary(tokenizer)
    training_data.prove(tokenizer, vocabulary, curriculum(settings.counts))
    training = Training(settings, vocabulary, options.work / name)
    training.load()
    if settings.grown_from is not None and training.step == 0:
        right = model_record.answers_right(training.model, tokenizer, settings.counts)
        training.history.append(f"grown from {settings.grown_from}, then {right} right")
    training.run()
    out.parent.mkdir(parents=True, exist_ok=True)
    stored = model_record.write_folder(training.model, tokenizer, out)
    run = model_record.Run(
        model=name,
        counts=settings.counts,
        seed=settings.seed,
        settings=asdict(settings),
        steps=training.step,
        minutes=training.seconds / 60,
        threads=options.threads,
        stages=tuple(training.history),
    )
    print(model_record.write_record(stored, tokenizer, run, out, out.with_name(f"{out.name}.md")))


if __name__ == "__main__":
    main()
