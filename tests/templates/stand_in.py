"""A stand-in for torch's flash attention, which has CUDA alone."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from converter.checkpoint.format import ATTENTION_FILE, MASKS_FILE


class StandIn:
    """`varlen_attn` by its documentation and by what it does on CUDA.

    Rows are aligned to the end of their sequence's keys. A row without keys gives zeros, and
    infinity as its log-sum-exp. Log-sum-exps are (heads, rows) and have no gradient.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Any:
        """`varlen_attn`."""
        self.calls += 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert enable_gqa or query.shape[1] == key.shape[1]
        edges = [cu_seq_q.tolist(), cu_seq_k.tolist()]
        assert [e[0] for e in edges] == [0, 0]
        assert [e[-1] for e in edges] == [len(query), len(key)]
        outputs, lses = [], []
        for (q0, q1), (k0, k1) in zip(*map(pairwise, edges), strict=True):
            rows, keys = q1 - q0, k1 - k0
            assert 0 <= rows <= max_q
            assert 0 <= keys <= max_k or not rows
            groups = query.shape[1] // key.shape[1]
            k, v = (s[k0:k1].repeat_interleave(groups, dim=1) for s in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query[q0:q1], k)
            scores = scores * (query.shape[2] ** -0.5 if scale is None else scale)
            apart = torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows)
            left, right = window_size
            hidden = ((apart < -left) & (left >= 0)) | ((apart > right) & (right >= 0))
            scores = scores.masked_fill(hidden, -torch.inf)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).nan_to_num(), v))
            lse = scores.detach().logsumexp(dim=-1)
            lses.append(lse if keys else torch.full_like(lse, torch.inf))
        output = torch.cat(outputs)
        return (output, torch.cat(lses, dim=1)) if return_aux.lse else output


def taken_by(*codes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in, in shipped files of which the first is that of the kernels."""
    stand_in = StandIn()
    monkeypatch.setattr(codes[0], "varlen_attn", stand_in)
    for code in codes:
        monkeypatch.setattr(code, "takes_flash", lambda _query, options: not options.dropout_p)
    return stand_in


def shipped_with(code: object) -> list[ModuleType]:
    """The files, beside one of a checkpoint that is loaded, that choose kernels."""
    package = code.__module__.rpartition(".")[0]
    files = (file.removesuffix(".py") for file in (ATTENTION_FILE, MASKS_FILE))
    found = [sys.modules.get(f"{package}.{file}") for file in files]
    return [module for module in found if module is not None]
