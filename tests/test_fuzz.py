"""Whatever bytes our readers are given, the answer is a value or one of our errors."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.calibration.scores import load_scores
from converter.checkpoint.format import format_of, render_code, render_config
from converter.checkpoint.reader import open_checkpoint
from converter.checkpoint.verify.static import static_checks
from converter.common.errors import HybridizeError
from converter.common.resources import recipe_notes
from converter.model.families import FAMILIES
from converter.model.mask import Mask
from converter.model.source import open_source
from converter.model.weights import INDEX_NAME, find_weights
from converter.plan.plan import load_plan, plan_from_json
from converter.publish.metadata import licence_of
from converter.publish.push import prepare
from converter.settings import build_settings, read_recipe
from tests.hostile_cases import PLAN
from tests.tiny import config_of, tiny_model

# A folder is written once for each test, and files in it anew for each example.
FUZZED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


# Bytes of every kind: noise, text, and JSON cut short.
BYTES = st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | JSON.map(encoded)


ours_or_nothing = contextlib.suppress(HybridizeError)


def changed(value: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The object with up to three keys replaced by anything, or removed."""
    keys = st.sampled_from(sorted(value))
    changes = st.dictionaries(keys, JSON | st.just(...), min_size=1, max_size=3)
    return changes.map(lambda found: {k: v for k, v in {**value, **found}.items() if v is not ...})


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
CONFIG = config_of(
    **EXPERTS,
    mlp_only_layers=[],
    decoder_sparse_step=1,
    layer_types=["full_attention"] * 4,
    sliding_window=128,
    use_sliding_window=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    rope_scaling={"type": "linear", "factor": 2.0},
    rope_theta=1e4,
    transformers_version="4.43.0",
    auto_map={},
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    hidden_act="silu",
    quantization_config={"bits": 4},
    hybrid={},
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@FUZZED
@given(st.sampled_from(sorted(FAMILIES)), changed(CONFIG))
def test_any_configuration(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    model = tmp_path / family
    if not model.exists():
        tiny_model(model, **EXPERTS, model_type=family)
    for key in ("quantization_config", "hybrid"):
        if config.get(key) == CONFIG[key]:
            del config[key]
    if config.get("model_type") == CONFIG["model_type"]:
        config["model_type"] = family
    (model / "config.json").write_text(json.dumps(config))
    with ours_or_nothing:
        source = open_source(str(model))
        for mask in (Mask(16), Mask(16, 4)):
            kinds = ["full_attention", *["sliding_attention"] * (source.shape.layers - 1)]
            plan = plan_from_json(PLAN | {"layer_types": kinds}, "test")
            render_config(source, plan)
            render_code(format_of(source, mask))


@FUZZED
@given(BYTES, BYTES | JSON.map(lambda value: encoded({"weight_map": value})))
def test_any_configuration_bytes_and_any_index(model: Path, config: bytes, index: bytes) -> None:
    (model / INDEX_NAME).write_bytes(index)
    with ours_or_nothing:
        find_weights(model)
    (model / INDEX_NAME).unlink()
    (model / "config.json").write_bytes(config)
    with ours_or_nothing:
        open_source(str(model))


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
ENTRIES = st.dictionaries(st.text(max_size=5), changed(ENTRY) | JSON, max_size=3)


@FUZZED
@given(BYTES | ENTRIES.map(encoded), st.integers(0, 2**64 - 1) | st.none(), st.binary(max_size=40))
def test_any_safetensors_header(
    tmp_path: Path, header: bytes, told: int | None, data: bytes
) -> None:
    size = len(header) if told is None else told
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", size) + header + data)
    with ours_or_nothing:
        find_weights(tmp_path)


GOOD_PLAN = PLAN | {"ranking": [0, 1, 2, 3], "profiles": {"chat": [1]}}
EXAMPLE = {
    "kind": "pair",
    "prompt_tokens": 100,
    "answer_tokens": 4,
    "full": 1.0,
    "sliding": 2.0,
    "scores": [1.0, None],
}
ENTRY = {
    "name": "periodic, offset 0",
    "full_attention_layers": [0],
    "nll": [2.0],
    "correct": [True],
    "value": 2.0,
    "layer_forwards": 0,
}
ORIGINAL = {"name": "original", "full_attention_layers": [0, 1], "nll": [1.0], "correct": [True]}
CONTEST: dict[str, Any] = {
    "keep": 1,
    "entries": [{**ENTRY, "name": "nll-restore"}, ENTRY],
    "original": ORIGINAL,
}
SCORES = {
    "format_version": 3,
    "method": "nll-restore",
    "unit": "nats",
    "mask": PLAN["mask"],
    "layer_forwards": 8,
    "fingerprint": {"source": "x"},
    "race": {"keep": 1, "accepted": [0], "rejected": [], "screened": [], "rounds": [[2, 2]]},
    "order": [0, 1],
    "contest": CONTEST,
    "profiles": {"pair": [1, 0]},
    "controls": None,
    "per_example": [EXAMPLE, {**EXAMPLE, "scores": [1.0, 0.5]}],
}


def read_contest(path: Path) -> object:
    """What a reader of a scores file says of its contest, which must not fail either."""
    comparison = load_scores(path).comparison
    return comparison.to_json() if comparison else None


READERS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "plan": (load_plan, GOOD_PLAN),
    "scores": (load_scores, SCORES),
    "contest": (read_contest, SCORES),
}


@pytest.mark.parametrize("kind", READERS)
@FUZZED
@given(st.data())
def test_any_plan_and_any_scores(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    reader, good = READERS[kind]
    path = tmp_path / f"{kind}.json"
    values = changed(good) | changed(good).map(lambda v: {**v, "mask": {"window_tokens": 1}})
    if kind == "contest":
        entries = changed(ENTRY).map(lambda v: {**CONTEST, "entries": [*CONTEST["entries"], v]})
        values = (changed(CONTEST) | entries).map(lambda v: {**SCORES, "contest": v})
    path.write_bytes(data.draw(BYTES | values.map(encoded)))
    with ours_or_nothing:
        reader(path)


def test_what_is_changed_was_good(tmp_path: Path) -> None:
    for kind, (reader, good) in READERS.items():
        path = tmp_path / kind
        path.write_text(json.dumps(good))
        reader(path)


@FUZZED
@given(BYTES | changed({"source": {"name": "a/b"}, "files": {}}).map(encoded))
def test_any_manifest(model: Path, content: bytes) -> None:
    inside = model / "hybrid"
    if not inside.exists():
        inside.mkdir()
        shutil.copy(model / "config.json", inside / "source_config.json")
        (inside / "plan.json").write_text(json.dumps(GOOD_PLAN))
        (model / "README.md").write_text("# x\n")
    (inside / "manifest.json").write_bytes(content)
    with ours_or_nothing:
        source, plan = open_checkpoint(model)
        list(static_checks(model, source, plan, None))
    with ours_or_nothing:
        prepare(model, "a/b", base_model="a/b", licence="mit")


@FUZZED
@given(BYTES | st.text(max_size=100).map(lambda t: f"window = {t}\n# expected: {t}".encode()))
def test_any_recipe(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuzzed.toml"
    path.write_bytes(content)
    with ours_or_nothing:
        build_settings(read_recipe(path), (), {}, "fuzzed")
        recipe_notes(path)


@FUZZED
@given(BYTES | JSON.map(lambda value: f"---\n{json.dumps({'license': value})}\n---\n".encode()))
def test_any_card(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    licence_of(tmp_path, "a/b")
