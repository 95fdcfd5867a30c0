"""The comparison of the stand-in with the library: both are timed on the same jobs; a missing library is said."""

import sys
from types import SimpleNamespace

import pytest
import torch

import performer_library


class TinyLM(torch.nn.Module):
    def __init__(self, num_tokens, max_seq_len, dim, depth, heads, dim_head, rotary_position_emb):
        super().__init__()
        assert (depth, heads, dim_head, rotary_position_emb) == (1, 10, 64, False)
        self.embedding, self.decoder = torch.nn.Embedding(num_tokens, dim), torch.nn.Linear(dim, num_tokens)

    def forward(self, input_ids):
        return self.decoder(self.embedding(input_ids))


def test_both_are_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "performer_pytorch", SimpleNamespace(PerformerLM=TinyLM))
    found = performer_library.compare(n_layers=1, length=30, rounds=1)
    assert list(found) == ["inference", "pretraining step"]
    assert all(set(times) == {"library", "stand-in"} and min(times.values()) >= 0 for times in found.values())


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "performer_pytorch", None)
    with pytest.raises(SystemExit, match="Install it"):
        performer_library.compare(1, 30, 1)
