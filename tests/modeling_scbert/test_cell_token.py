"""The cell token: what it reads, what it leaves out, and the whole cell told from it, beside explicit references."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression, ScBertModel
from scbert.modeling_scbert.cell_scbert import whole_cell_loss
from scbert.modeling_scbert.packing_scbert import pack

GENES, LENGTHS, MASK = 50, (40, 7, 25), 19
KINDS = {
    "favor": {"attention_type": "favor"},
    "softmax": {"attention_type": "softmax"},
    "lsh": {"attention_type": "lsh", "lsh_chunk_length": 8, "lsh_num_buckets": 4},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(model_class=ScBertModel, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"intermediate_size": 16, "num_random_features": 8, "classifier_hidden_sizes": []}
    sizes |= {"vocab_size": MASK + 1, "mask_token_id": MASK, "ordinal_expression": True, "pooling": "cell"}
    sizes |= {"freeze_gene_embeddings": False, "initializer_range": 0.3, "max_position_embeddings": GENES + 1}
    # evaluation: in training LSH draws its hash anew for every call
    return model_class(ScBertConfig(**{**sizes, **options})).eval()


def moved(model):
    """The model with all of its weights somewhere else than where they start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture
def batch():
    """Cells of several lengths, the trailing token among the genes, some masked."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    genes = torch.stack([torch.randperm(GENES, generator=generator)[: max(LENGTHS)] for _ in LENGTHS])
    genes[torch.arange(3), torch.tensor(LENGTHS) - 1] = GENES
    cells = torch.randint(0, MASK + 1, mask.shape, generator=generator) * mask * (genes < GENES)
    # pads with ids of their own must not count
    return {"input_ids": cells, "gene_ids": genes, "attention_mask": mask}


def expected(model, batch, states):
    """The equation, cell by cell and token by token."""
    cell, table, found = model.cell, model.embeddings.gene_embeddings.weight, []
    for row, length in enumerate(LENGTHS):
        total, n_expressed, n_seen = torch.zeros_like(cell.offset), 0, 0
        for place in range(length):
            gene, bin_ = batch["gene_ids"][row, place], batch["input_ids"][row, place]
            if gene == GENES:
                token = cell.correction.weight @ states[row, place]
                continue
            n_expressed += int(bin_ > 0)
            if bin_ == MASK:
                continue
            n_seen += int(bin_ > 0)
            x, y = cell.reader.weight @ states[row, place]
            total = total + (MASK - 1) * x / (x**2 + y**2).sqrt() * table[gene]
        found.append(cell.scale * total * n_expressed / n_seen - cell.offset + token)
    return torch.stack(found)


def test_without_layers_it_is_the_sum_of_genes_times_bins(batch):
    model = make(num_hidden_layers=0)
    seen = torch.where(batch["input_ids"] == MASK, 0, batch["input_ids"]).float()
    ratio = (batch["input_ids"] > 0).sum(1) / (seen > 0).sum(1)
    table = model.embeddings.gene_embeddings.weight
    # genes with vectors of any length
    with torch.no_grad():
        table *= torch.rand(GENES + 1, 1) * 3
        found = model(**batch).pooler_output
    assert (ratio > 1).any()
    wanted = torch.einsum("bl,blh->bh", seen * ratio[:, None], table[batch["gene_ids"]])
    torch.testing.assert_close(found, wanted.detach(), atol=1e-4, rtol=1e-4)


@every_kind
def test_layers_start_as_no_correction(kind, batch):
    plain, deep = make(num_hidden_layers=0, **KINDS[kind]), make(**KINDS[kind])
    table = plain.embeddings.gene_embeddings.weight.detach()
    deep.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(deep.embeddings.gene_embeddings.weight, table)
    torch.testing.assert_close(
        deep(**batch).pooler_output, plain(**batch).pooler_output, atol=1e-4, rtol=1e-4
    )


@every_kind
def test_it_is_the_equation_in_value_and_gradient(kind, batch):
    model = moved(make(**KINDS[kind])).double()
    with torch.no_grad():
        model.cell.offset.normal_()
        model.cell.scale.fill_(1.7)
    outputs = model(**batch)
    # by padding masked genes and by duplicates nothing changes: a pad's gene is 0 or anything
    wanted = expected(model, batch, outputs.last_hidden_state)
    torch.testing.assert_close(outputs.pooler_output, wanted, atol=1e-9, rtol=1e-9)
    # features that softmax weights by are float32 and frozen in LSH: those weights have no gradient
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    given = torch.randn(wanted.shape, dtype=torch.float64)
    found, right = (
        torch.autograd.grad((out * given).sum(), weights.values(), retain_graph=True, allow_unused=True)
        for out in (outputs.pooler_output, wanted)
    )
    for name, mine, theirs in zip(weights, found, right, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-8, msg=name)


@every_kind
def test_padding_order_and_packing_change_nothing(kind, batch):
    model = moved(make(**KINDS[kind]))
    with torch.no_grad():
        whole, packed = model(**batch).pooler_output, model(**pack(batch)).pooler_output
        torch.testing.assert_close(packed, whole, atol=1e-4, rtol=1e-4)
        order = torch.randperm(LENGTHS[1])
        alone = {name: x[1:2, : LENGTHS[1]][:, order] for name, x in batch.items()}
        torch.testing.assert_close(model(**alone).pooler_output, whole[1:2], atol=1e-4, rtol=1e-4)
        del alone["attention_mask"]
        torch.testing.assert_close(model(**alone).pooler_output, whole[1:2], atol=1e-4, rtol=1e-4)


def test_every_gene_in_the_order_of_the_panel():
    model, ids = moved(make()), torch.randint(0, MASK, (2, GENES + 1))
    ids[:, -1] = 0
    genes = torch.arange(GENES + 1)
    with torch.no_grad():
        found = model(ids).pooler_output
        torch.testing.assert_close(model(ids, gene_ids=genes.expand(2, -1)).pooler_output, found)
        embeds = model.embeddings.expression_embeddings(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).pooler_output, found)


def test_cells_of_which_nothing_is_seen(batch):
    model = make()
    batch["input_ids"][0] = 0
    batch["input_ids"][1] = torch.where(batch["input_ids"][1] > 0, MASK, 0)
    found = model(**batch).pooler_output
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:2], torch.zeros(2, 24), atol=1e-3, rtol=0)
    found.sum().backward()
    assert all(torch.isfinite(w.grad).all() for w in model.parameters() if w.grad is not None)


def test_the_classifier_reads_it(batch):
    model = moved(make(ScBertForCellClassification, num_labels=3))
    outputs = model(**batch, labels=torch.tensor([0, 2, 1]))
    cells = model.scbert(**batch).pooler_output
    torch.testing.assert_close(outputs.logits, model.classifier.out_proj(cells))
    outputs.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_nothing_is_made_where_tokens_are_left_out_or_nobody_asked(batch):
    assert make()(**batch, positions=torch.zeros(3, 1, dtype=torch.long)).pooler_output is None
    for pooling in ("conv", "mean"):
        model = make(pooling=pooling)
        assert "pooler_output" not in model(**batch)
        assert not [name for name in model.state_dict() if name.startswith("cell")]


def test_saved_loaded_and_exported(batch, tmp_path):
    model = moved(make(ScBertForMaskedExpression, cell_loss_weight=0.5))
    with torch.no_grad():
        model.scbert.cell.offset.normal_()
        model.scbert.cell.scale.fill_(3.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    encoder, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    wanted = model.scbert(**batch).pooler_output
    torch.testing.assert_close(encoder.eval()(**batch).pooler_output, wanted)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.cell.offset.dtype == half.cell.scale.dtype == torch.float32
    assert half.cell.reader.weight.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half(**batch).pooler_output.float(), wanted).min() > 0.98
    with torch.no_grad():
        program = torch.export.export(encoder, (), batch)
        torch.testing.assert_close(program.module()(**batch).pooler_output, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"ordinal_expression": False}, "ordinal_expression"),
        ({"cell_loss_weight": -1.0}, "negative"),
        ({"cell_loss_weight": 1.0, "pooling": "mean"}, "needs pooling"),
        ({"mask_token_id": 3}, "bin 3 for the mask"),
    ],
)
def test_what_cannot_be_is_refused(options, problem):
    with pytest.raises(Exception, match=problem):
        make(**options)


def test_panels_grow(batch):
    model = moved(make(ScBertForMaskedExpression, cell_loss_weight=1.0))
    bias = model.cell_decoder.bias.clone()
    model.resize_gene_embeddings(GENES + 4)
    assert model.cell_decoder.bias.shape == (GENES + 4,) and torch.equal(
        model.cell_decoder.bias[:GENES], bias
    )
    assert not model.scbert.embeddings.gene_embeddings.weight[GENES:-1].any(), "they move no cell's vector"
    labels = torch.where(batch["input_ids"] == MASK, 1, -100)
    batch["gene_ids"][batch["gene_ids"] == GENES] = GENES + 4
    model(**batch, labels=labels, cell_targets=torch.ones(3, GENES + 4)).cell_loss.backward()
    assert model.cell_decoder.bias.grad.shape == (GENES + 4,)


def reference_loss(model, cells, targets):
    """Cross-entropy of every cell with the softmax over its measured genes, one by one."""
    encoder, decoder, losses = model.scbert, model.cell_decoder, []
    for cell, target in zip(cells, targets, strict=True):
        genes = (target >= 0).nonzero().flatten()
        if target[genes].sum() == 0:
            continue
        rows = encoder.embeddings.gene_embeddings.weight[genes]
        scores = decoder.bias[genes] + encoder.cell.scale * (rows @ (decoder.project.weight @ cell))
        shares = target[genes] / target[genes].sum()
        losses.append(-(shares * (scores - scores.exp().sum().log())).sum())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_whole_cell_loss_is_the_reference_in_value_and_gradient(sparse, batch):
    model = moved(make(ScBertForMaskedExpression, cell_loss_weight=0.5, sparse_prediction=sparse)).double()
    targets = 100 * torch.rand(3, GENES, dtype=torch.float64).square()
    targets[0, ::3] = -100.0
    targets[2] = 0.0
    labels = torch.where(batch["input_ids"] == MASK, 3, -100)
    outputs = model(**batch, labels=labels, cell_targets=targets)
    wanted = reference_loss(model, model.scbert(**batch).pooler_output, targets)
    torch.testing.assert_close(outputs.cell_loss, wanted)
    masked = model(**batch, labels=labels)
    assert masked.cell_loss is None
    torch.testing.assert_close(outputs.masked_expression_loss, masked.loss)
    torch.testing.assert_close(outputs.loss, masked.loss + 0.5 * wanted)
    names, weights = zip(*model.named_parameters(), strict=True)
    found, right = (
        torch.autograd.grad(loss, weights, retain_graph=True)
        for loss in (outputs.loss, masked.loss + 0.5 * wanted)
    )
    for name, mine, theirs in zip(names, found, right, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-6, msg=name)
    # of accumulated batches, a share of both
    items = 4 * (labels != -100).sum()
    share = model(**batch, labels=labels, cell_targets=targets, num_items_in_batch=items)
    torch.testing.assert_close(share.loss, outputs.loss / 4)


def test_cells_of_nothing_have_no_loss():
    logits = torch.randn(2, 4, requires_grad=True)
    for nothing in (0.0, -100.0):
        loss = whole_cell_loss(logits, torch.full((2, 4), nothing))
        assert loss == 0
        assert not torch.autograd.grad(loss, logits)[0].any()
    one = torch.tensor([[1.0, 3.0, 0.0, 0.0], [-100.0] * 4])
    torch.testing.assert_close(whole_cell_loss(logits, one), whole_cell_loss(logits[:1], one[:1]))
