"""Tables of the encoders' benchmark, and what padding costs: the parts that need no measuring."""

import pytest
import torch

import encoder_report
import packing_speed
from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertTokenizer

COMMON = {"device": "cpu", "seconds": 1.0, "peak_gib": 0.5}


@pytest.fixture
def result():
    rows = [
        {
            "part": "length",
            "encoder": name,
            "length": 1000,
            "layers": 2,
            "reversible": name == "lsh",
            **COMMON,
        }
        for name in ("favor", "lsh", "softmax", "matrix")
    ]
    rows[-1] |= {"seconds": None, "peak_gib": None, "needs_gib": 45.0}
    rows += [
        {"part": "depth", "encoder": "favor", "length": 400, "layers": depth, "reversible": on, **COMMON}
        for on in (False, True)
        for depth in (2, 12)
    ]
    return {"device": "CPU", "torch": "2", "dtype": "float32", "rows": rows}


def test_memory_and_time_by_length_and_depth(result):
    text = encoder_report.markdown(result)
    assert "| 1,000 | 0.50 | 0.50 | 0.50 | not run, needs 45 |" in text
    assert "| favor, reversible | 0.50 | 0.50 | 1.0 | 1.0 |" in text


def test_all_kinds_of_batches_have_the_same_loss(adata):
    torch.set_num_threads(1)
    tokenizer = ScBertTokenizer(gene_panel=adata.var_names.tolist(), keep_zeros=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    config = ScBertConfig(max_position_embeddings=301, sparse_prediction=True, num_random_features=8, **sizes)
    batches = packing_speed.batches_of((tokenizer, tokenizer.bin_cells(adata[:24])), batch_size=4)
    rows = packing_speed.measure(ScBertForMaskedExpression(config).eval(), batches, rounds=1)
    tokens = [row["tokens"] for row in rows]
    assert tokens[0] > tokens[1] > tokens[2]
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert "| packed, random order |" in packing_speed.markdown({"rows": rows})
