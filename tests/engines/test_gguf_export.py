"""`hybridize export`: llama.cpp computes the hybrid from the file, and the file says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from converter.engines.gguf.container import read_container
from converter.engines.gguf.llama_cpp import LlamaCppSettings
from tests.conftest import CONTEXT, FAMILIES, LAYERS, MORE_FAMILIES, make_model, run_cli
from tests.ggufs import (
    Files,
    Refused,
    Told,
    exported,
    hybrid_of,
    loaded_gguf,
    logits_of,
    make_bpe_tokenizer,
)
from tests.hybrids import KEPT, WINDOW, random_ids

# Several windows, and more than one batch and one cache of sliding layers (512 tokens).
IDS = random_ids(CONTEXT - 1, seed=5)
CLOSE = 1e-3
SLIDES = ("--window", WINDOW)
ARCHS = {
    "qwen3": "step35",
    "qwen2": "step35",
    "llama": "granite_swa",
    "mistral": "granite_swa",
    "qwen3_moe": "mellum",
    "olmo2": "olmo2",
    "smollm3": "granite_swa",
    "granite": "granite_swa",
}
REFUSED = sorted({*FAMILIES, *MORE_FAMILIES} - ARCHS.keys())


def expected(checkpoint: Path, ids: list[int] = IDS) -> Any:
    """The Hugging Face hybrid's logits (tokens, vocabulary) in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, trust_remote_code=True, dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def apart(left: Any, right: Any) -> float:
    return float(numpy.abs(left - right).max())


def stored(file: Path) -> dict[str, tuple[object, ...]]:
    """Shape, type and bytes of a file's tensors, by name."""
    data, tensors = file.read_bytes(), read_container(file).tensors
    return {t.name: (t.shape, t.type_number, data[t.start : t.start + t.bytes]) for t in tensors}


def fitted(stock: Path, plan: Path, file: Path) -> Path:
    """A stock GGUF with a plan, by the command line."""
    assert run_cli("export", "--from-gguf", stock, "--plan", plan, file, "-q", "--json") == 0
    return file


def widened(file: Path) -> Any:
    """Logits with a window over everything."""
    window = f"{read_container(file).arch}.attention.sliding_window"
    return logits_of(file, IDS, **{window: 1 << 20})


def same_plan(file: Path, checkpoint: Path) -> None:
    """llama.cpp's logits are the hybrid's, and neither is full attention's."""
    planned = logits_of(file, IDS)
    assert apart(planned, expected(checkpoint)) < CLOSE
    assert apart(planned, widened(file)) > 1000 * CLOSE


@pytest.mark.parametrize("family", ARCHS)
def test_llama_cpp_computes_the_hybrid(family: str, hybrid: Files, gguf: Files) -> None:
    assert read_container(gguf(family)).arch == ARCHS[family]
    same_plan(gguf(family), hybrid(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_past_the_recycled_cache_is_the_hybrids(
    family: str, hybrid: Files, gguf: Files
) -> None:
    """A batch of 32 makes the sliding cache 256 cells: it is overwritten again and again."""
    prompt, count = IDS[:300], 40
    settings = LlamaCppSettings(400, exact=True, batch_tokens=32)
    with loaded_gguf(gguf(family), settings) as engine:
        assert sorted(cells for cells, _ in engine.caches) == [256, 512]
        found = list(engine.generate(prompt, count))
    logits = expected(hybrid(family), prompt + found)[len(prompt) - 1 : -1]
    assert found == logits.argmax(axis=1).tolist()


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
VARIANTS: dict[str, tuple[str, str, tuple[object, ...], dict[str, Any]]] = {
    "yarn": ("llama", "granite_swa", (), {"rope_parameters": YARN}),
    "linear": ("mistral", "granite_swa", (), {"rope_parameters": LINEAR}),
    # step35 cannot scale; granite_swa can, and pairs the rows of queries and keys otherwise.
    "qwen2 with yarn": ("qwen2", "granite_swa", (), {"rope_parameters": YARN}),
    "biases": ("llama", "granite_swa", (), {"attention_bias": True, "mlp_bias": True}),
    "tied": ("qwen2", "step35", (), {"tie_word_embeddings": True}),
    "all sliding": ("qwen3", "step35", ("--budget", 0, "--method", "periodic", *SLIDES), {}),
    "window of one": ("qwen3", "step35", ("--layers", "1,2", "--window", "1"), {}),
    "shards": ("mistral", "granite_swa", (), {"shards": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_family(variant: str, tmp_path: Path) -> None:
    family, arch, options, changes = VARIANTS[variant]
    checkpoint = hybrid_of(tmp_path, family, *options, **changes)
    file = exported(checkpoint, tmp_path / "out.gguf", "--type", "f32")
    assert read_container(file).arch == arch
    same_plan(file, checkpoint)


def test_a_plan_without_sliding_layers_is_the_stock_model(tmp_path: Path, told: Told) -> None:
    layers = ",".join(map(str, range(LAYERS)))
    checkpoint = hybrid_of(tmp_path, "qwen3", "--layers", layers, *SLIDES)
    file = tmp_path / "out.gguf"
    value = told("export", checkpoint, file, "--outtype", "F32")
    assert (value["arch"], value["honoured"], value["type"]) == ("qwen3", True, "f32")
    assert apart(logits_of(file, IDS), expected(checkpoint)) < CLOSE
    assert run_cli("verify", file, "--against", checkpoint, "-q") == 0


def test_the_stock_architecture_ignores_the_plan_and_is_labelled_so(
    hybrid: Files, gguf: Files, tmp_path: Path, told: Told
) -> None:
    file = tmp_path / "stock.gguf"
    value = told("export", hybrid("qwen3"), file, "--type", "f32", "--stock-arch")
    assert (value["arch"], value["honoured"]) == ("qwen3", False)
    keys = read_container(file).metadata
    assert keys["qwen3.attention.sliding_window"].value == WINDOW
    assert keys["hybridize.honoured"].value is False
    found = logits_of(file, IDS)
    assert apart(found, widened(gguf("qwen3"))) < CLOSE
    assert apart(found, expected(hybrid("qwen3"))) > 1000 * CLOSE


# OLMo2's own architecture honours the plan, so its stock form has one already.
@pytest.mark.parametrize("family", sorted(ARCHS.keys() - {"olmo2"}))
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_retrofit_equals_export(family: str, kind: str, hybrid: Files, tmp_path: Path) -> None:
    checkpoint, plan = hybrid(family), hybrid(family) / "hybrid" / "plan.json"
    stock = exported(checkpoint, tmp_path / "stock.gguf", "--type", kind, "--stock-arch")
    direct = exported(checkpoint, tmp_path / "direct.gguf", "--type", kind)
    found = fitted(stock, plan, tmp_path / "fitted.gguf")
    assert read_container(direct).metadata == read_container(found).metadata
    assert stored(direct) == stored(found)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_retrofit_that_changes_the_order_of_rows_keeps_them_whole(
    kind: str, tmp_path: Path
) -> None:
    """Qwen2 with YaRN: rows of queries and keys move, quantised or not."""
    checkpoint = hybrid_of(tmp_path, "qwen2", rope_parameters=YARN)
    stock = exported(checkpoint, tmp_path / "stock.gguf", "--type", kind, "--stock-arch")
    file = fitted(stock, checkpoint / "hybrid" / "plan.json", tmp_path / "fitted.gguf")
    assert read_container(file).arch == "granite_swa"
    for name, heads in {"attn_q.weight": 4, "attn_k.weight": 2, "attn_k.bias": 2}.items():
        old, new = (stored(path)[f"blk.1.{name}"][2] for path in (stock, file))
        halves = numpy.frombuffer(old, numpy.uint8).reshape(heads, 2, 8, -1)
        assert new == halves.swapaxes(1, 2).tobytes() != old
    if kind == "f32":
        assert apart(widened(file), logits_of(stock, IDS)) < CLOSE
        assert apart(widened(file), logits_of(file, IDS)) > 1000 * CLOSE


# How far each type may be from float32, as a share of the logits' spread: rounding of weights of
# random models; a window wrong by one token is more than 0.1.
ROUNDING = {"f16": 0.02, "bf16": 0.15, "q8_0": 0.1, "q6_k": 0.35, "q4_k_m": 0.9, "q4_0": 0.9}


@pytest.mark.parametrize("kind", ROUNDING)
def test_other_types_are_near_float32(
    kind: str, gguf: Files, hybrid: Files, tmp_path: Path
) -> None:
    file = exported(hybrid("llama"), tmp_path / "out.gguf", "--type", kind)
    whole = logits_of(gguf("llama"), IDS)
    error = numpy.linalg.norm(logits_of(file, IDS) - whole) / numpy.linalg.norm(whole)
    assert 0 < error < ROUNDING[kind]
    assert file.stat().st_size < gguf("llama").stat().st_size
    kinds = {tensor.name: tensor.type_number for tensor in read_container(file).tensors}
    # Vectors stay whole.
    assert {kinds[name] for name in kinds if "norm" in name or "sinks" in name} == {0}
    assert kinds["blk.0.attn_q.weight"] != 0


def with_weight(folder: Path, value: float, dtype: torch.dtype) -> tuple[Path, Any]:
    """A checkpoint with one weight of this value, and the model that it was made from."""
    source, out = make_model(folder / "source", "mistral"), folder / "hybrid"
    make_bpe_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(source)
    assert run_cli("convert", source, out, "--layers", "1,2", *SLIDES, "-q") == 0
    return out, model


def test_the_default_type_keeps_every_bit(tmp_path: Path, told: Told) -> None:
    checkpoint, model = with_weight(tmp_path, 1.0, torch.bfloat16)
    assert told("export", checkpoint, tmp_path / "out.gguf")["type"] == "bf16"
    weight = model.model.layers[1].mlp.up_proj.weight.detach().view(torch.uint16).numpy()
    assert stored(tmp_path / "out.gguf")["blk.1.ffn_up.weight"][2] == weight.tobytes()


def test_the_file_says_what_it_is(hybrid: Files, tmp_path: Path, told: Told) -> None:
    checkpoint = Path(shutil.copytree(hybrid("llama"), tmp_path / "hybrid"))
    (checkpoint / "LICENSE").write_text("                     Apache License\n   Version 2.0, Jan")
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [262, 263]}')
    file = tmp_path / "out.gguf"
    value = told("export", checkpoint, file, "--type", "q8_0")
    container = read_container(file)
    assert value == {
        "file": str(file),
        "arch": "granite_swa",
        "honoured": True,
        "bytes": file.stat().st_size,
        "type": "q8_0",
        "tensors": len(container.tensors),
    }
    keys = {name: value.value for name, value in container.metadata.items()}
    plan = json.loads((checkpoint / "hybrid" / "plan.json").read_text())
    del plan["kv_bytes"]
    assert json.loads(keys["hybridize.plan"]) == plan
    wanted = {
        "hybridize.source_arch": "llama",
        "hybridize.source": "llama-source",
        "hybridize.honoured": True,
        "general.name": "llama-source hybrid",
        "general.license": "apache-2.0",
        "general.file_type": 7,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.ggml.eos_token_id": 262,
        "tokenizer.ggml.eot_token_id": 263,
        "granite_swa.attention.sliding_window": WINDOW,
        "granite_swa.attention.sliding_window_pattern": [i not in KEPT for i in range(LAYERS)],
    }
    assert {name: keys[name] for name in wanted} == wanted
    assert "partial" not in "".join(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("options", [("--sinks", "2"), ("--full-decode",)], ids=str)
def test_masks_that_llama_cpp_lacks_are_refused(
    options: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    layers = ("--layers", "1,2", *SLIDES)
    checkpoint = hybrid_of(tmp_path, "qwen3", *layers, *options)
    for more in ((), ("--stock-arch",)):
        message = refused("export", checkpoint, tmp_path / "out.gguf", *more)
        assert "llama.cpp" in message and "next step" in message
    assert not (tmp_path / "out.gguf").exists()
    source = tmp_path / "qwen3-source"
    options = (*layers, *options, "--target", "llama.cpp")
    assert "--sinks" in refused("convert", source, tmp_path / "other", *options)
    assert not (tmp_path / "other").exists()


UNABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen3 with YaRN": ("qwen3", {"rope_parameters": YARN}, "yarn"),
    "Qwen3 with linear scaling": ("qwen3", {"rope_parameters": LINEAR}, "linear"),
    "Qwen3 with biases": ("qwen3", {"attention_bias": True}, "attention_bias"),
    "dynamic scaling": ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "dynamic"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "gelu"),
    "experts' weights as they are": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    "OLMo2 with YaRN": ("olmo2", {"rope_parameters": YARN}, "yarn"),
    **{family: (family, {}, "no llama.cpp architecture") for family in REFUSED},
}


@pytest.mark.parametrize("case", UNABLE)
def test_models_that_llama_cpp_cannot_compute_are_refused(
    case: str, tmp_path: Path, refused: Refused, told: Told
) -> None:
    family, changes, word = UNABLE[case]
    checkpoint = hybrid_of(tmp_path, family, **changes)
    message = refused("export", checkpoint, tmp_path / "out.gguf")
    assert all(part in message for part in ("cannot honour this plan", word, "next step"))
    source = tmp_path / f"{family}-source"
    assert word in refused("plan", source, "--layers", "1", *SLIDES, "--target", "llama.cpp")
    engines = told("inspect", source)["engines"]
    verdict = next(engine for engine in engines if engine["engine"] == "llama.cpp")
    assert verdict["word"] == "refused" and word in verdict["note"]


def test_an_existing_file_is_kept_and_a_failure_leaves_it(
    hybrid: Files, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "out.gguf"
    file.write_text("mine")
    assert "--force" in refused("export", hybrid("qwen2"), file)
    broken = Path(shutil.copytree(hybrid("qwen2"), tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    assert "tokenizer" in refused("export", broken, file, "--force")
    assert file.read_text() == "mine"
    assert run_cli("export", hybrid("qwen2"), file, "--force", "-q") == 0
    assert read_container(file).arch == "step35"
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "broken"}


def test_a_full_disk_is_told_before_writing(
    hybrid: Files, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = hybrid("qwen2")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1 << 20))
    told = refused("export", checkpoint, tmp_path / "out.gguf")
    assert "too little free space" in told and "choose another disk" in told
    assert list(tmp_path.iterdir()) == []


def test_values_that_a_type_cannot_hold_are_refused(tmp_path: Path, refused: Refused) -> None:
    checkpoint, _ = with_weight(tmp_path, 1e6, torch.float32)
    message = refused("export", checkpoint, tmp_path / "out.gguf", "--type", "f16")
    assert "65504" in message and "bf16" in message
    exported(checkpoint, tmp_path / "out.gguf", "--type", "bf16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("HYBRID",), "what to export"),
        (("HYBRID", "out.gguf", "--plan", "p.json"), "--from-gguf"),
        (("--from-gguf", "a.gguf", "out.gguf"), "needs a plan"),
        (("--from-gguf", "a.gguf", "HYBRID", "out.gguf", "--plan", "p"), "takes the place"),
        (("--from-gguf", "a.gguf", "out.gguf", "--plan", "p", "--type", "f16"), "--type f16"),
        (("HYBRID", "out.gguf", "--type", "q9"), "q9"),
        (("HYBRID", "no/such/folder/out.gguf"), "does not exist"),
        ((".", "out.gguf"), "not a checkpoint"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(
    arguments: tuple[str, ...],
    words: str,
    hybrid: Files,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(hybrid("qwen2")) if a == "HYBRID" else a for a in arguments]
    assert words in refused("export", *given)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_retrofitted_is_refused(
    hybrid: Files, gguf: Files, tmp_path: Path, refused: Refused
) -> None:
    plan, out = hybrid("qwen3") / "hybrid" / "plan.json", tmp_path / "out.gguf"

    def fit(stock: Path, plan: Path = plan) -> str:
        return refused("export", "--from-gguf", stock, "--plan", plan, out)

    assert "'step35'" in fit(gguf("qwen3"))
    for file in (gguf("olmo2"), exported(hybrid("olmo2"), tmp_path / "olmo2.gguf", "--stock-arch")):
        assert "sliding layers already" in fit(file)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(gguf("qwen3").read_bytes()[:-40])
    assert "not a whole GGUF" in fit(truncated)
    truncated.unlink()
    stock = exported(hybrid("qwen3"), tmp_path / "stock.gguf", "--stock-arch")
    other, value = tmp_path / "plan.json", json.loads(plan.read_text())
    short = {"layer_types": value["layer_types"][:2], "full_attention_layers": [1], "ranking": None}
    sinks = {"mask": value["mask"] | {"sink_tokens": 3}}
    for changes, words in ((short, "another depth"), (sinks, "first tokens")):
        other.write_text(json.dumps(value | changes))
        assert words in fit(stock, other)
    assert not out.exists()
