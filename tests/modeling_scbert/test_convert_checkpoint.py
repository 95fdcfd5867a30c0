import pickle

import pytest
import torch

from scbert.modeling_scbert.convert_checkpoint import (
    CheckpointError,
    convert_checkpoint,
    new_name,
    original_name,
)


@pytest.fixture
def save(tmp_path):
    def save(checkpoint):
        path = tmp_path / "original.pth"
        torch.save(checkpoint, path)
        return path

    return save


def test_every_original_name_is_known(original_reference):
    for labels in (None, 3):
        names = original_reference.make_original(labels=labels).state_dict()
        ours = [new_name(name) for name in names if not name.endswith("calls_since_last_redraw")]
        assert None not in ours and len(set(ours)) == len(ours)


def test_sizes_are_read_from_the_tensors(original_reference, save):
    sizes = {"genes": 31, "vocab": 9, "width": 12, "depth": 3, "heads": 2, "head_dim": 6, "features": 11}
    original = original_reference.make_original(labels=5, hidden=17, **sizes)
    model = convert_checkpoint(save(original_reference.original_checkpoint(original)), num_genes=31)
    config = model.config
    assert (config.vocab_size, config.mask_token_id, config.max_position_embeddings) == (9, 8, 32)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (12, 3, 48)
    assert (config.num_attention_heads, config.head_dim, config.num_random_features) == (2, 6, 11)
    assert config.classifier_hidden_sizes == [512, 17] and config.id2label[4] == "LABEL_4"
    assert not model.training


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_cast_and_prefix_dropped(original_reference, save, prefix):
    original = original_reference.make_original()
    model = convert_checkpoint(save(original_reference.original_checkpoint(original, prefix)))
    assert type(model).__name__ == "ScBertForMaskedExpression"
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    table = model.scbert.embeddings.gene_embeddings.weight
    assert torch.equal(table, original.pos_emb.emb.weight.float()) and not table[-1].any()


def test_a_bare_state_dict_will_do(original_reference, save):
    checkpoint = original_reference.original_checkpoint(original_reference.make_original())
    bare, whole = (
        convert_checkpoint(save(x)).state_dict() for x in (checkpoint["model_state_dict"], checkpoint)
    )
    assert all(torch.equal(bare[name], whole[name]) for name in whole)


def test_labels_name_the_classes(original_reference, save):
    path = save(original_reference.original_checkpoint(original_reference.make_original(labels=2)))
    assert convert_checkpoint(path, labels=["B", "T"]).config.label2id == {"B": 0, "T": 1}
    with pytest.raises(CheckpointError, match=r"3 labels .* 2 classes"):
        convert_checkpoint(path, labels=["B", "T", "NK"])
    with pytest.raises(CheckpointError, match="twice"):
        convert_checkpoint(path, labels=["B", "B"])


def test_a_missing_gene_table_becomes_zeros(original_reference, save, caplog):
    checkpoint = original_reference.original_checkpoint(original_reference.make_original())
    del checkpoint["model_state_dict"]["pos_emb.emb.weight"]
    model = convert_checkpoint(save(checkpoint), num_genes=23)
    assert "no gene table" in caplog.text
    assert model.scbert.embeddings.gene_embeddings.weight.shape == (24, 20)
    assert not model.scbert.embeddings.gene_embeddings.weight.any()


def broken_states(state):
    layer = "performer.net.layers.1"
    yield "not the original", {**state, "extra.weight": torch.zeros(2)}
    yield r"lacks 1 weights \(norm.bias\) and has 0", {k: v for k, v in state.items() if k != "norm.bias"}
    yield (
        "w1.weight is missing",
        {k: v for k, v in state.items() if not k.startswith("performer.net.layers.0.1")},
    )
    yield rf"{layer}.1.norm.weight has the shape \[7\]", {**state, f"{layer}.1.norm.weight": torch.zeros(7)}
    yield "not finite", {**state, "norm.weight": torch.full((20,), torch.nan)}
    yield "heads", {**state, "performer.net.layers.0.0.fn.to_q.weight": torch.zeros(25, 20)}
    yield "no model_state_dict", {}
    yield "no model_state_dict", {"a": 1}


@pytest.mark.parametrize("case", range(8))
def test_other_states_are_refused(original_reference, save, case):
    checkpoint = original_reference.original_checkpoint(original_reference.make_original())
    problem, state = list(broken_states(checkpoint["model_state_dict"]))[case]
    with pytest.raises(CheckpointError, match=problem):
        convert_checkpoint(save({"model_state_dict": state}))


def test_wrong_number_of_genes_and_stray_labels(original_reference, save):
    path = save(original_reference.original_checkpoint(original_reference.make_original()))
    with pytest.raises(CheckpointError, match=r"22 genes .* 24 rows; 23 genes are needed"):
        convert_checkpoint(path, num_genes=22)
    with pytest.raises(CheckpointError, match="pretrained"):
        convert_checkpoint(path, labels=["A"])


class Payload:
    """Would run code on an ordinary unpickling."""

    def __reduce__(self):
        return (exec, ("raise SystemError('code was run')",))


@pytest.mark.parametrize("payload", [Payload(), torch.nn.Linear(2, 2)])
def test_pickled_objects_are_refused_and_not_run(save, payload):
    with pytest.raises(CheckpointError, match="pickled objects"):
        convert_checkpoint(save({"model_state_dict": payload}))


def test_pickles_without_a_zip_are_called_unsafe_and_not_read(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(pickle.dumps({"model_state_dict": Payload()}))
    with pytest.raises(CheckpointError, match="unsafe"):
        convert_checkpoint(path)
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="unsafe"):
        convert_checkpoint(path)


def test_every_name_is_found_back(original_reference):
    checkpoint = original_reference.original_checkpoint(original_reference.make_original(labels=2))
    names = [name for name in checkpoint["model_state_dict"] if new_name(name)]
    assert len(names) > 30 and [original_name(new_name(name)) for name in names] == names


def test_damaged_files_are_refused(original_reference, save, tmp_path):
    path = save(original_reference.original_checkpoint(original_reference.make_original()))
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="truncated"):
            convert_checkpoint(path)
    flipped = bytearray(whole)
    place = whole.index(b"norm.weight") + 5000
    flipped[place] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError):
        convert_checkpoint(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="truncated or something else"):
        convert_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        convert_checkpoint(tmp_path / "absent.pth")
