"""Ways to damage a file: its values where it is JSON or TOML, its bytes where it is anything."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], bytes]

# What Python's JSON writer cannot be asked for; each stands as it is in the damaged text.
_RAW = (
    *("1e400", "-1e400", "NaN", "Infinity", "1e-320", '"\\ud800"', "9" * 4000),
    "[" * 900 + "]" * 900,
)
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**11),
    *(10**30, 0.5, -0.5, 1e-8, 1e30, 3.0, "", "x", "0", "3", "None", "true", "\x00", "é" * 40),
    *("../x", "/", ".", "a" * 100_000, "float32", "torch.float64", "silu", "eager"),
    *("full_attention", "sliding_attention", "nll-restore", "{{ 1 }}", "<|end|>"),
    *([], {}, [[]], [None], [{}], {"": None}, {"x": {"y": []}}, [0] * 64, ["x", 1], {"0": 1}),
    *({"content": "<|end|>", "lstrip": "x"}, list(range(3000))),
)
# Keys that libraries look for although the files of the tests have none of them.
_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "rope_theta", "rope_scaling"),
    *("rope_parameters", "torch_dtype", "dtype", "tie_word_embeddings", "layer_types", "use_cache"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "architectures", "auto_map"),
    *("quantization_config", "id2label", "label2id", "num_labels", "problem_type", "head_dim"),
    *("_attn_implementation", "attn_implementation", "is_encoder_decoder", "transformers_version"),
    *("tokenizer_class", "text_config", "attention_bias", "mlp_bias", "attention_dropout"),
    *("initializer_range", "rms_norm_eps", "output_attentions", "return_dict", "model_max_length"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template"),
    *("clean_up_tokenization_spaces", "padding_side", "cache_implementation", "max_new_tokens"),
    *("temperature", "stop_strings", "no_rope_layers", "partial_rotary_factor", "pretraining_tp"),
    *("logits_scaling", "embedding_multiplier", "decoder_sparse_step", "mlp_only_layers"),
    *("format_version", "mask", "ranking", "profiles", "race", "contest", "heads", "controls"),
    *("methods", "source", "revision", "files", "budget", "version", "truncation", "padding"),
)


def bytes_of(random: Random, content: bytes) -> bytes:
    """Bytes cut off, changed, inserted, moved or repeated; seldom something else altogether."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        at, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
        match random.randrange(8):
            case 0:
                del data[at:]
            case 1 if data:
                data[at % len(data)] ^= 1 << random.randrange(8)
            case 2 if data:
                data[at % len(data)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B))
            case 3:
                data[at:at] = random.randbytes(random.choice((1, 4, 8, 64)))
            case 4:
                del data[at : min(end, at + 64)]
            case 5:
                data[at:at] = data[at : min(end, at + 200)]
            case 6:
                number = random.choice((0, 1, 2**31, 2**62, 2**64 - 1))
                data[at : at + 8] = struct.pack("<Q", number)
            case _:
                marked = (b"\xff\xfe" + data, b"\xef\xbb\xbf" + data)
                data = bytearray(random.choice((b"", b"[]", b"null", *marked)))
    return bytes(data)


def json_of(random: Random, content: bytes) -> bytes:
    """One to three values of a JSON file made another, removed, doubled or buried; or its bytes."""
    if random.random() < 0.08:
        return bytes_of(random, content)
    value, raw = json.loads(content), random.choice(_RAW)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _changed(random, value)
    text = json.dumps(value)
    if random.random() < 0.05 and text.startswith("{") and len(text) > 2:
        # A key given twice: parsers disagree on which one holds.
        key, again = random.choice(sorted(value)), random.choice(("null", "1", "[]"))
        text = f"{text[:-1]}, {json.dumps(key)}: {again}}}"
    return text.replace('"@RAW@"', raw).encode()


def _changed(random: Random, value: Any, depth: int = 0) -> Any:
    inside = isinstance(value, (dict, list)) and value
    if inside and (depth == 0 or random.random() < 0.75):
        return _changed_inside(random, value, depth)
    match random.randrange(12):
        case 0:
            return [value]
        case 1:
            return {"x": value}
        case 2:
            return str(value)
        case 3:
            return "@RAW@"
        case 4:
            return [value] * 3
        case 5 if isinstance(value, (int, float)) and not isinstance(value, bool):
            return random.choice((-value, value + 1, value * 1000, value / 2, float(value)))
        case _:
            return random.choice(_ODD)


def _changed_inside(random: Random, value: Any, depth: int) -> Any:
    if isinstance(value, dict):
        copy, act = dict(value), random.random()
        key = random.choice(list(value))
        if act < 0.12:
            del copy[key]
        elif act < 0.24:
            copy[random.choice((*_KEYS, key + "x", key.upper()))] = random.choice((*_ODD, "@RAW@"))
        elif act < 0.28:
            copy[key], copy[other] = value[other := random.choice(list(value))], value[key]
        else:
            copy[key] = _changed(random, value[key], depth + 1)
        return copy
    items, at, act = list(value), random.randrange(len(value)), random.random()
    if act < 0.1:
        del items[at]
    elif act < 0.2:
        items.insert(at, random.choice((items[at], *_ODD)))
    else:
        items[at] = _changed(random, items[at], depth + 1)
    return items


def lines_of(random: Random, content: bytes) -> bytes:
    """Rows of JSON, of which some are damaged."""
    rows = content.splitlines()
    for at in random.sample(range(len(rows)), random.choice((1, 1, 3))):
        rows[at] = json_of(random, rows[at])
    return b"\n".join(rows) if random.random() < 0.9 else bytes_of(random, content)


def header_of(random: Random, content: bytes) -> bytes:
    """A safetensors file whose header, or the number of its bytes, is damaged."""
    told = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + told], content[8 + told :]
    if random.random() < 0.15:
        return bytes_of(random, content[:8] + header) + data
    if random.random() < 0.1:
        return content[: random.randrange(len(content))]
    header = json_of(random, header)
    return struct.pack("<Q", len(header)) + header + data


def toml_of(random: Random, content: bytes) -> bytes:
    """A recipe with lines made others."""
    lines = content.decode().splitlines()
    names = [line.split("=")[0].strip() for line in lines if "=" in line]
    for _ in range(random.choice((1, 2, 3))):
        odd = random.choice(_ODD)
        text = random.choice(
            (json.dumps(odd), "1e400", "nan", "2020-01-01", "'''", "[1,", "-0", "0xff")
        )
        key = random.choice((*names, *_KEYS, "layers", "window", "a.b", '"\\ud800"', "os"))
        lines.insert(random.randrange(len(lines) + 1), f"{key} = {text}")
        if random.random() < 0.5:
            del lines[random.randrange(len(lines))]
    text = "\n".join(lines).encode()
    return text if random.random() < 0.85 else bytes_of(random, text)


_TEMPLATES = (
    "{{ 'x' * 10**N }}",
    "{% for i in range(10**N) %}x{% endfor %}",
    "{% for i in range(10**5) %}{% for j in range(10**N) %}{% endfor %}{% endfor %}",
    "{{ [[0] * 10**N] * 10**N }}",
    "{% set n = namespace(x='a') %}{% for i in range(5N) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '{:>N000000000}'.format(1) }}",
    "{{ 10**10**N }}",
    "{{ range(10**N) | list | length }}",
    "{{ 'x' | center(10**N) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ raise_exception('no') }}",
    "{{ messages[9] }}{{ messages['x'].y.z }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% extends 'x' %}",
    "{{ lipsum(n=10**N) }}",
    "{{ strftime_now('%' * 10) }}",
    "{{ 1 // 0 }}",
    "{{ '\\ud800' }}",
    "{% generation %}{{ messages }}{% endgeneration %}",
    "{{ messages | tojson(indent=10**N) }}",
    "{{ (messages * 10**N) | length }}",
    "{{ 'a' | wordwrap(0) }}",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}",
)


def template_of(random: Random, content: bytes) -> bytes:
    """A chat template that asks for too much, for what is not there, or is not one."""
    if random.random() < 0.7:
        return random.choice(_TEMPLATES).replace("N", str(random.choice((2, 5, 8, 9, 12)))).encode()
    return bytes_of(random, content)
