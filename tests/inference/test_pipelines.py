import numpy as np
import pytest
from transformers import pipeline

import scbert
from scbert.inference import annotate, embed

assert scbert.__version__


@pytest.fixture
def annotator(model_dir):
    return pipeline("cell-type-annotation", model=str(model_dir))


@pytest.fixture
def embedder(model_dir):
    return pipeline("cell-embedding", model=str(model_dir))


def test_labels_and_scores_equal_annotate(adata, annotator, model_dir):
    annotated = annotate(adata, model_dir, threshold=0, progress=False)
    results = annotator(adata, batch_size=7, threshold=0)
    assert [cell[0]["label"] for cell in results] == list(annotated.obs["scbert_cell_type"])
    np.testing.assert_allclose(
        [cell[0]["score"] for cell in results], annotated.obs["scbert_confidence"], atol=1e-5
    )
    scores = np.array([[answer["score"] for answer in cell] for cell in results])
    assert (np.diff(scores) <= 0).all()
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-6)


def test_cells_below_the_threshold_are_unassigned_first(adata, annotator):
    plain = annotator(adata[:9], threshold=0)
    confidence = np.array([cell[0]["score"] for cell in plain])
    cut = float(np.median(confidence))
    for cell, whole in zip(annotator(adata[:9], threshold=cut), plain):
        unsure = whole[0]["score"] < cut
        assert cell == ([{"label": "unassigned", "score": whole[0]["score"]}, *whole] if unsure else whole)


@pytest.mark.parametrize("tokenizer", [{}, {"keep_zeros": False}], ids=["every gene", "expressed genes"])
def test_embeddings_equal_embed_in_cell_order(adata, make_model, tokenizer):
    folder = make_model(tokenizer=tokenizer)
    expected = embed(adata, folder, progress=False).obsm["X_scbert"]
    results = pipeline("cell-embedding", model=str(folder))(adata, batch_size=9)
    assert all(vector.dtype == np.float32 and vector.shape == (16,) for vector in results)
    np.testing.assert_allclose(np.stack(results), expected, atol=1e-4, rtol=1e-4)


def test_every_kind_of_input_gives_the_same(adata, query, annotator):
    expected = annotator(adata)
    matrix, names = adata.X, list(adata.var_names)
    assert annotator(str(query)) == expected
    assert annotator(query) == expected
    assert annotator({"X": matrix, "gene_names": names}) == expected
    assert annotator(matrix) == annotator(matrix.toarray()) == expected
    order = np.random.default_rng(0).permutation(adata.n_vars)
    assert annotator(matrix[:, order], gene_names=[names[i] for i in order]) == expected
    assert annotator(list(matrix.toarray()[:3])) == expected[:3]
    assert annotator(matrix[0].toarray().ravel()) == expected[0]


def test_a_generator_is_streamed(adata, annotator):
    taken = []

    def cells():
        for row in adata.X[:9]:
            taken.append(1)
            yield row

    results = annotator(cells(), batch_size=2)
    first = next(iter(results))
    assert first[0]["label"]
    assert len(taken) < 9
    streamed = list(annotator((row for row in adata.X[:9]), batch_size=4))
    expected = annotator(adata[:9])
    assert [cell[0]["label"] for cell in streamed] == [cell[0]["label"] for cell in expected]
    with pytest.raises(ValueError, match="one cell at a time"):
        list(annotator(part for part in [adata.X[:2]]))


def test_top_k(adata, annotator):
    assert all(len(cell) == 1 for cell in annotator(adata[:4], top_k=1, threshold=0))
    assert all(len(cell) == 2 for cell in annotator(adata[:4], top_k=2, threshold=0))
    assert all(len(cell) == 3 for cell in annotator(adata[:4], top_k=None, threshold=0))


def test_a_cell_without_expression_is_unassigned(adata, annotator):
    cells = adata.X[:3].toarray()
    cells[1] = 0
    results = annotator(cells, batch_size=3)
    assert results[1] == [{"label": "unassigned", "score": 0.0}]
    assert results[0][0]["score"] > 0


def test_values_of_another_kind_can_be_named(adata, annotator):
    fractions = adata.X[:5].toarray() + 0.25 * (adata.X[:5].toarray() > 0)
    with pytest.raises(ValueError, match="--values"):
        annotator(fractions)
    assert len(annotator(fractions, input="counts")) == 5


def test_a_model_without_cell_types_is_refused(pretrained_dir):
    with pytest.raises(ValueError, match="no cell types yet"):
        pipeline("cell-type-annotation", model=str(pretrained_dir))


def test_saved_pipeline_loads_and_names_both_tasks(adata, annotator, tmp_path):
    annotator.save_pretrained(tmp_path / "saved")
    expected = annotator(adata[:5])
    assert pipeline("cell-type-annotation", model=str(tmp_path / "saved"))(adata[:5]) == expected
    assert len(pipeline("cell-embedding", model=str(tmp_path / "saved"))(adata[:5])) == 5


def test_a_model_makes_its_own_pipeline(adata, annotator, embedder):
    assert annotator.model.as_pipeline(annotator.tokenizer)(adata[:3]) == annotator(adata[:3])
    encoder = embedder.model.as_pipeline(embedder.tokenizer)
    np.testing.assert_array_equal(np.stack(encoder(adata[:3])), np.stack(embedder(adata[:3])))


def test_a_model_that_was_trained_last_does_not_drop_out(adata, annotator, embedder):
    for pipe in (annotator, embedder):
        wanted = pipe(adata)
        pipe.model.train()
        found = pipe(adata)
        assert not pipe.model.training
        np.testing.assert_array_equal(found[0], wanted[0])


def test_rows_of_small_integers_are_counts(adata, annotator):
    """Expression bins are of that type, too, and are not mistaken for them."""
    rows = adata.X[:3].astype(np.int16)
    assert annotator([rows[i] for i in range(3)]) == annotator(adata[:3])


def test_too_few_genes_are_refused_as_by_annotate(adata, annotator):
    with pytest.raises(scbert.InputError, match="genes; at least"):
        annotator(adata[:2, : adata.n_vars // 5].copy())
