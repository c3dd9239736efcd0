"""The model card: valid metadata, whole tables, and no claim without its number."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import groupby

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from converter.calibration.results import Outcome, Quality
from converter.calibration.scores import ExampleScores, Scores
from converter.checkpoint.format import format_of
from converter.common.units import human_bytes
from converter.engines.support import verdicts
from converter.model.mask import Mask
from converter.model.source import Source, open_source
from converter.plan.plan import Plan, kv_bytes, layer_types_of
from converter.publish.card import render_card
from tests.tiny import tiny_model

QUALITY = Quality(
    original=Outcome("original", (0, 1, 2, 3), (1.0, 2.0, 3.0), (True, True, False)),
    hybrid=Outcome("hybrid", (1,), (1.5, 2.5, 3.5), (True, False, False)),
    others=(Outcome("all sliding", (), (4.0, 5.0, 6.0), (False, False, False)),),
)
SCORES = Scores(
    "nll-restore",
    Mask(16),
    (ExampleScores("pair", 100, 4, 1.0, 3.0, (0.5, 1.5, 1.0, 0.1)),) * 7,
    48,
    {},
    (1, 2, 0, 3),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(tiny_model(tmp_path_factory.mktemp("card") / "tiny")))


def plan_for(source: Source, mask: Mask, *layers: int) -> Plan:
    kinds = layer_types_of(layers, source.shape.layers)
    return Plan(kinds, mask, "nll-restore", "1/4", None, source.name, source.revision)


def unmeasured(source: Source, mask: Mask, *layers: int) -> str:
    return render_card(source, plan_for(source, mask, *layers), None, None)


def tables(card: str) -> list[list[str]]:
    """The table rows of a card, grouped by table."""
    groups = groupby(card.splitlines(), lambda line: line.startswith("|"))
    return [list(lines) for is_table, lines in groups if is_table]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


MASKS = [Mask(16), Mask(16, 4), Mask(16, 0, True), Mask(16, 4, True)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("measured", [False, True], ids=["", "measured"])
def test_a_card_is_well_formed(mask: Mask, measured: bool, source: Source) -> None:
    quality, scores = (QUALITY, SCORES) if measured else (None, None)
    card = render_card(source, plan_for(source, mask, 1), scores, quality)
    assert card.startswith("---\n")
    assert card.endswith("\n")
    assert not any(mark in card for mark in ("{{", "{%", "None", "Undefined", "\n\n\n\n"))
    assert len(tables(card)) == (3 if measured else 2)
    for table in tables(card):
        assert len({len(cells(row)) for row in table}) == 1
        assert len(table) > 2


@pytest.mark.parametrize("name", ["owner/name", "a.b-c/d_e", "0/1"])
def test_the_metadata_names_the_base_model(name: str, source: Source) -> None:
    card = unmeasured(replace(source, name=name), Mask(16), 1)
    metadata = ModelCard(card).data
    assert metadata["base_model"] == name
    assert metadata["base_model_relation"] in ("finetune", "adapter", "merge", "quantized")
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert f"(https://huggingface.co/{name})" in card


NO_HUB_IDS = ["tiny", 'a "quoted" name', "yes", "a: b # c", "é", "../name", "a/b/c", "a--b/c"]


@pytest.mark.parametrize("name", NO_HUB_IDS)
def test_a_folder_is_not_called_a_model_of_the_hub(name: str, source: Source) -> None:
    card = unmeasured(replace(source, name=name), Mask(16), 1)
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "https://huggingface.co" not in card


# What a folder may be called, and a plan's method and budget may say, to break out of its place.
HOSTILE = [
    "x](https://evil.example) [y",
    "<script>alert(1)</script>",
    "![](https://evil.example/x.png)",
    "# heading",
    "`; rm -rf ~; `",
    "```\n\nrm -rf ~\n```",
    "a\n---\nlicense: mit\n---\n",
    "{{ 7 * 7 }}{% raw %}",
    "| a | b |",
    "<!-- hidden -->",
    "&lt;b&gt;",
    "\u202e reversed \x1b[31m \x00",
    "https://evil.example",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_from_outside_stays_text(text: str, source: Source) -> None:
    """A card with a hostile name has the metadata, headings, links and tables of one without."""

    def skeleton(name: str) -> tuple[object, ...]:
        hostile = replace(source, name=name, revision=name)
        plan = replace(
            plan_for(hostile, Mask(16), 1), method=name, budget=name, profiles={name: (2,)}
        )
        card = render_card(hostile, plan, None, None)
        tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
        spans = [child for token in tokens for child in token.children or ()]
        # `"` and `'` need no escape; what the parser calls html or a link is one.
        kinds = [token.type for token in tokens], [s.type for s in spans if s.type != "text"]
        # The two lines that our part of the card stands between.
        assert kinds[0].count("html_block") == 2 and "html_inline" not in kinds[1]
        return ModelCard(card).data.to_dict(), *kinds, card.count("\n")

    assert skeleton(text) == skeleton("plain")


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_card_gives_the_command_for_every_engine_that_has_one(mask: Mask, source: Source) -> None:
    card = unmeasured(source, mask, 1)
    commands = [verdict.command for verdict in verdicts(source, mask)]
    blocks = [block.strip() for block in re.findall(r"```sh\n(.*?)```", card, re.DOTALL)]
    assert blocks == [command for command in commands if command]
    honoured = mask.is_plain_window
    assert ("hybridize export PATH FILE.gguf" in card) is honoured
    assert ("llama-server -m FILE.gguf -c 512" in card) is honoured


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_card_tells_the_plan_and_what_it_costs(mask: Mask, source: Source) -> None:
    plan = plan_for(source, mask, 1, 3)
    card = render_card(source, plan, None, None)
    rows = dict(cells(row) for row in tables(card)[0])
    cost = kv_bytes(plan, source.shape, 512)
    assert plan.strip in card
    assert rows["full-attention layers"] == "1, 3"
    assert rows["KV cache at 512 tokens"] == (
        f"{human_bytes(cost['hybrid'])} (original {human_bytes(cost['full'])})"
    )
    seen = rows["sliding layers see"]
    assert seen.startswith("16 tokens")
    assert ("first 4" in seen) is (mask.sink_tokens == 4)
    assert ("see everything" in seen) is mask.full_attention_decode
    assert rows["chosen by"] == "nll-restore, budget 1/4"
    assert "in 2 of its 4 layers" in " ".join(card.split())


@pytest.mark.parametrize("mask", MASKS[:2], ids=str)
def test_a_card_says_how_each_engine_runs_it(mask: Mask, source: Source) -> None:
    card = unmeasured(source, mask, 1)
    form = format_of(source, mask)
    found = {cells(row)[0]: cells(row)[1] for row in tables(card)[-1]}
    for verdict in verdicts(source, mask):
        assert found[verdict.engine] == verdict.word
    assert ('from_pretrained("PATH", trust_remote_code=True)' in card) is (not form.native)
    assert f'pip install -U "transformers>={form.since}"' in card


def test_quality_is_told_with_its_errors(source: Source) -> None:
    card = render_card(source, plan_for(source, Mask(16), 1), SCORES, QUALITY)
    assert "on 3 held-out examples" in card
    assert "measured on 7 examples" in card
    rows = {cells(row)[0]: cells(row)[1:] for row in tables(card)[1]}
    # Deviation 1 over the root of 3; the differences to the original are all 0.5. The intervals are
    # Wilson's for 2, 1 and 0 of 3.
    assert rows["original"] == ["2.000 ± 0.577", "", "0.667 [0.208, 0.939]"]
    assert rows["hybrid"] == ["2.500 ± 0.577", "0.500 ± 0.000", "0.333 [0.061, 0.792]"]
    assert rows["all sliding"] == ["5.000 ± 0.577", "3.000 ± 0.000", "0.000 [0.000, 0.561]"]


def test_a_card_claims_nothing_unmeasured_and_names_no_layers_and_the_revision(
    source: Source,
) -> None:
    card = unmeasured(replace(source, revision="abc123"), Mask(16))
    assert "Not measured for this plan." in card and "±" not in card
    assert "| full-attention layers | none |" in card
    assert "`abc123`" in card
