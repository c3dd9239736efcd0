"""The words for layers of which some KV heads attend fully."""

from __future__ import annotations

from itertools import chain, combinations

import pytest

from converter.model.mask import FULL, LINEAR, OWN_SLIDING, SLIDING, full_kv_heads, kind_of_heads


def test_every_set_of_heads_has_one_word_that_says_it() -> None:
    heads = range(4)
    sets = list(chain.from_iterable(combinations(heads, n) for n in range(5)))
    words = [kind_of_heads(reversed(kept), 4) for kept in sets]
    assert [full_kv_heads(word, 4) for word in words] == sets
    assert len(set(words)) == len(sets)
    assert kind_of_heads((2, 0), 4) == "mixed_attention:0,2"
    assert (words[0], words[-1]) == (SLIDING, FULL)


@pytest.mark.parametrize("kind", [LINEAR, OWN_SLIDING])
def test_layers_that_no_plan_changes_have_no_full_heads(kind: str) -> None:
    assert full_kv_heads(kind, 4) == ()


@pytest.mark.parametrize(
    "heads", ["", "4", "-1", "1,0", "0,0", "0,1,2,3", "0, 2", "x", "00", "+1", "٢"]
)
def test_other_spellings_are_refused(heads: str) -> None:
    with pytest.raises(ValueError, match=r"int|mixture"):
        full_kv_heads(f"mixed_attention:{heads}", 4)
