"""Tiny random models of every family, made here, and the real ones beside the checkout."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from hypothesis import settings

# transformers copies the code in a checkpoint to one place before it runs it. Workers of
# pytest-xdist each get their own, so that none reads what another has written half of.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["HF_MODULES_CACHE"] = f"{gettempdir()}/hybridize-modules-{os.getppid()}-{worker}"

# Started in the background of a shell, all this would ignore interrupts, and what tests start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The hashes that are found here are not the user's to keep.
os.environ["XDG_CACHE_HOME"] = f"{gettempdir()}/hybridize-test-cache-{os.getuid()}"


def pytest_configure(config: pytest.Config) -> None:
    """End the whole run when even its workers' time limits (pyproject.toml) do not.

    The limit is the main process's: its workers and a single process have theirs for each test.
    """
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        faulthandler.dump_traceback_later(_WHOLE_RUN_SECONDS, exit=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")


# A busy machine is no failure.
settings.register_profile("hybridize", deadline=None)
settings.load_profile("hybridize")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
DEMO = Path(__file__).parent.parent / "benchmarks" / "demo-model"

_WHOLE_RUN_SECONDS = 2 * 60 * 60

# What the fixtures below give, by the name of a family, and mostly of a mask.
Folders = Callable[..., Path]
Models = Callable[..., Any]
Greedy = Callable[..., list[int]]

LAYERS = 4
CONTEXT = 512
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 320,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True, "max_window_layers": LAYERS},
    "qwen2": {"tie_word_embeddings": False, "max_window_layers": LAYERS},
    "llama": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "mistral": {"head_dim": 24, "tie_word_embeddings": False, "sliding_window": None},
}
# Families whose layouts differ from those above; smaller tests run over them.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "olmo2": {"pad_token_id": 0, "eos_token_id": 1},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    "phi3": {"pad_token_id": 0, "eos_token_id": 1, "sliding_window": None},
    "gemma": {"head_dim": 24, "pad_token_id": 0},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "seed_oss": {"head_dim": 24, "pad_token_id": 0},
    "ministral3": {
        "head_dim": 24,
        "pad_token_id": 0,
        # Queries grow every 32 positions.
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "max_position_embeddings": CONTEXT,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "glm4_moe": {
        "head_dim": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "num_nextn_predict_layers": 0,
    },
    "minimax_m2": {
        "head_dim": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rotary_dim": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
# Every other layer slides by a window of the model's own.
OWN_WINDOW: dict[str, Any] = {
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Families with layers that no plan changes.
RECURRENT: dict[str, Any] = {
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
RECURRENT_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
    **RECURRENT,
}
MIXED_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": RECURRENT,
    "qwen3_5_moe_text": RECURRENT_EXPERTS,
    "qwen3_next": RECURRENT_EXPERTS,
    "olmo3": {"pad_token_id": 0, "eos_token_id": 1, **OWN_WINDOW},
    "exaone4": {"head_dim": 24, **OWN_WINDOW},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 24,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "pad_token_id": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        **OWN_WINDOW,
    },
    "gemma3_text": {"head_dim": 24, "pad_token_id": 0, "query_pre_attn_scalar": 24, **OWN_WINDOW},
}
# A part of multimodal models that sees.
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": SIZES["hidden_size"],
}
IMAGE_TOKENS = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
# Multimodal models, of which the language model is one of those above.
MULTIMODAL_FAMILIES: dict[str, dict[str, Any]] = {
    family: {
        "text_config": SIZES | MIXED_FAMILIES[f"{family}_text"],
        "vision_config": VISION,
        **IMAGE_TOKENS,
    }
    for family in ("qwen3_5", "qwen3_5_moe")
}
EVERY_FAMILY = {**FAMILIES, **MORE_FAMILIES, **MIXED_FAMILIES, **MULTIMODAL_FAMILIES}


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: every text round-trips, one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>"]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "eos_token": "<|end|>"})
    )


def make_model(folder: Path, family: str, *, shards: bool = False, **changes: Any) -> Path:
    """Write a random model of a family, with weights large enough for masks to matter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    multimodal = family in MULTIMODAL_FAMILIES
    sizes = {} if multimodal else SIZES
    config = AutoConfig.for_model(family, **(sizes | EVERY_FAMILY[family] | changes))
    torch.manual_seed(7)
    its_class = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model = its_class.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(0.0, 0.15 if parameter.dim() > 1 else 0.3)
            else:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(0.0, 0.5)
            elif name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="150KB" if shards else "5GB")
    make_tokenizer(folder)
    return folder


def three_to_one(folder: Path) -> Path:
    """A Qwen3.5 of its own ratio: layers 3 and 7 of 8 attend fully, which no list says."""
    make_model(folder, "qwen3_5_text", num_hidden_layers=8, layer_types=None)
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config | {"full_attention_interval": 4}))
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model folder for each family; Qwen2's has several shards."""
    root = tmp_path_factory.mktemp("sources")
    return {name: make_model(root / name, name, shards=name == "qwen2") for name in FAMILIES}


@pytest.fixture(scope="session")
def folder(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A model folder of any family."""
    root = tmp_path_factory.mktemp("more")

    return cache(lambda family: sources.get(family) or make_model(root / family, family))


@pytest.fixture
def copy_of(sources: dict[str, Path], tmp_path: Path) -> Folders:
    """A private copy of a family's model folder, to be damaged."""
    return lambda family: Path(shutil.copytree(sources[family], tmp_path / f"copy-{family}"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums come out the same in every process only when they are split the same way."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_cli(*arguments: object) -> int:
    """Run the command line in this process; its exit status."""
    from converter.cli import run

    return run([str(argument) for argument in arguments])


def shared(path: str) -> Path:
    """A real model or text beside the checkout, or a skip with the reason."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} is not beside this checkout")
    return found


# What the fixtures below share is in tests/hybrids.py, which needs torch at once: imported late.


@pytest.fixture(scope="session")
def checkpoint(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A checkpoint of a family under one of the masks; not to be written to."""
    from tests.hybrids import KEPT, convert

    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def written(family: str, mask: str, layers: tuple[int, ...] = KEPT) -> Path:
        name = "-".join([family, *mask.split(), *map(str, layers)])
        return convert(sources[family], root / name, mask, layers)

    return written


@pytest.fixture(scope="session")
def model(checkpoint: Folders) -> Models:
    """A checkpoint, loaded; not to be changed."""
    from tests.hybrids import load

    return cache(lambda family, mask: load(checkpoint(family, mask)))


@pytest.fixture(scope="session")
def eager(folder: Folders) -> Models:
    """A source under the brute force."""
    from tests.brute_force import EagerModel

    return cache(lambda family: EagerModel(folder(family)))


@pytest.fixture(scope="module")
def exactly() -> Iterator[None]:
    """Everything in float64, what transformers does in float32 included."""
    from tests.runners import Exactly

    with Exactly():
        yield


@pytest.fixture(scope="session")
def greedy(eager: Models) -> Greedy:
    """What greedy decoding must give, by the brute force."""
    from tests.hybrids import NEW, PLAN, PROMPT, REPEATING, rule

    @cache
    def tokens(family: str, mask: str, *, repeating: bool = False) -> list[int]:
        prompt = REPEATING if repeating else PROMPT
        return list(eager(family).greedy(prompt, NEW, PLAN, **rule(mask, len(prompt))))

    return tokens


@pytest.fixture(scope="session")
def demo_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model as a measured checkpoint, 2 of 8 layers full; not to be changed."""
    out = tmp_path_factory.mktemp("demo") / "demo-hybrid"
    options = ["--window", 16, "--samples", 8, "--holdout", 8, "--length", 256]
    options += ["--method", "nll-restore", "--no-verify"]
    assert run_cli("convert", DEMO, out, *options, "-q") == 0
    return out


@pytest.fixture(scope="session")
def evaluated(demo_hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report with everything in it; not to be changed."""
    folder = tmp_path_factory.mktemp("evaluation")
    text = folder / "mine.txt"
    text.write_text("The farmer walked home. Give Amber drums. " * 120)
    rows = folder / "mine-rows.jsonl"
    row = {"prompt": "Give Amber drums. Give Amber", "answer": "drums"}
    choice = {"question": "Give Amber", "choices": ["drums", "kettles"], "answer": 0}
    rows.write_text("\n".join(map(json.dumps, [row, choice])))
    out = folder / "report"
    options = ["--lengths", "128,256", "--depths", 3, "--samples", 12, "--batch", 6]
    options += ["--budgets", "1/8,1/2", "--periodic", "--text", text, "--text-chunks", 3]
    options += ["--rows", rows, "--speed-runs", 1, "--out", out]
    assert run_cli("evaluate", demo_hybrid, *options, "-q") == 0
    return out
