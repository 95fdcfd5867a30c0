"""Our model beside the Performer library and the stand-in: the same jobs are timed; a missing library is said."""

import json
import sys
from types import SimpleNamespace

import torch

import performer_library


class TinyLM(torch.nn.Module):
    def __init__(self, num_tokens, max_seq_len, dim, depth, heads, dim_head, rotary_position_emb):
        super().__init__()
        assert (depth, heads, dim_head, rotary_position_emb) == (1, 10, 64, False)
        self.embedding, self.decoder = torch.nn.Embedding(num_tokens, dim), torch.nn.Linear(dim, num_tokens)

    def forward(self, input_ids):
        return self.decoder(self.embedding(input_ids))


def test_all_are_timed(monkeypatch):
    monkeypatch.setitem(sys.modules, "performer_pytorch", SimpleNamespace(PerformerLM=TinyLM))
    found = performer_library.compare(n_layers=1, length=30, rounds=1)
    assert list(found) == ["inference", "pretraining step"]
    assert all(
        set(times) == {"library", "stand-in", "scbert"} and min(times.values()) >= 0
        for times in found.values()
    )


def test_a_missing_library_is_said(monkeypatch, capsys):
    monkeypatch.setattr(performer_library, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["performer_library.py"])
    performer_library.main()
    assert "not installed" in capsys.readouterr().err


def test_the_table_and_the_file_have_every_way(monkeypatch, capsys, tmp_path):
    found = {"inference": {"library": 4.0, "stand-in": 4.5, "scbert": 0.5}}
    monkeypatch.setattr(performer_library, "find_spec", lambda name: True)
    monkeypatch.setattr(performer_library, "compare", lambda *_: found)
    monkeypatch.setattr(sys, "argv", ["performer_library.py", "--output", str(tmp_path / "found.json")])
    performer_library.main()
    assert "4.50" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text()) == found
