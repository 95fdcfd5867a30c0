"""Axes of cells without labels, those that ship, and a head that goes along them."""

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy.special import log_softmax

from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertTokenizer
from scbert.tokenization import InputError
from scbert.trained_model.model_folder import find_model, load_tokenizer, save_model
from scbert.training import run_finetune
from scbert.training.cell_axes import FEWEST_CELLS, cell_axes
from scbert.training.initial_model import pretrained_vectors, start_cell
from scbert.training.logistic_head import PRETRAINED, PretrainedAxes, cross_folds, n_fits, solve_head
from scbert.training.principal_axes import axes_along, signal_along
from scbert.training.run_finetune import finetune

N_GENES = 200


def study(seed, n_cells=240, n_types=4, depth=1.0, shift=0.0):
    """Counts of types with few markers each, among genes that vary by a gradient of quality that no type has."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(7).gamma(0.6, 1.5, N_GENES)
    types = np.arange(n_cells) % n_types
    rates = np.tile(base, (n_cells, 1))
    for name in range(n_types):
        rates[types == name, name * 6 : name * 6 + 6] += 6
    quality = rng.lognormal(0, 0.5, n_cells)
    rates[:, 150:] *= quality[:, None]
    counts = rng.poisson(depth * rates + shift)
    return sp.csr_matrix(np.log2(1 + counts).round().astype(np.float32)), types


def between_share(coordinates, types):
    """Share of the variance that lies between the types."""
    centered = coordinates - coordinates.mean(axis=0)
    means = np.stack([centered[types == name].mean(axis=0) for name in np.unique(types)])
    return (means[types] ** 2).sum() / (centered**2).sum()


def test_axes_of_other_cells_tell_types_that_they_were_never_shown():
    axes = cell_axes([study(1)[0], study(2, depth=2.0, shift=0.2)[0]], 8)
    cells, types = study(3)
    along = cells @ axes.vectors
    principal = np.linalg.svd(cells.toarray() - cells.toarray().mean(axis=0), full_matrices=False)
    own = principal[0][:, :8] * principal[1][:8]
    assert between_share(along, types) > between_share(own, types) + 0.1
    assert (np.diff(axes.spread) <= 0).all() and axes.spread[0] > 1


def test_axes_do_not_tell_files_apart():
    first, second = study(1)[0], study(2)[0]
    shifted = second.toarray()
    shifted[:, 100:130] += 3
    axes = cell_axes([first, sp.csr_matrix(shifted)], 8)
    unshifted = cell_axes([first, second], 8)
    # the genes that differ between the files alone vary in none of them
    np.testing.assert_allclose(axes.spread, unshifted.spread, rtol=0.2)


def test_axes_are_the_same_whether_files_are_listed_or_read_again():
    files = [study(1)[0], study(2)[0], study(3, n_cells=FEWEST_CELLS - 1)[0]]
    listed, again = cell_axes(files[:2], 4), cell_axes(lambda: iter(files), 4)
    np.testing.assert_array_equal(listed.vectors, again.vectors)
    with pytest.raises(ValueError, match="cells or more"):
        cell_axes(files[2:], 4)


def test_axes_along_are_coordinates_with_a_way_back():
    cells, _ = study(4)
    vectors = np.random.default_rng(0).normal(size=(N_GENES - 1, 5)).astype(np.float32)
    axes = axes_along(cells, vectors)
    coefficients = np.random.default_rng(1).normal(size=(3, 5))
    weights, bias = axes.gene_weights(coefficients, np.zeros(3))
    np.testing.assert_allclose(
        cells @ weights.T + bias, axes.coordinates @ coefficients.T, rtol=1e-3, atol=1e-3
    )
    assert not weights[:, -1].any()


def program_cells(seed, n_cells=200, depth=2000):
    """Counts of cells that differ in ten programs of genes, and the programs, [genes, programs]."""
    rng = np.random.default_rng(seed)
    programs = np.linalg.qr(np.random.default_rng(0).normal(size=(N_GENES, 20)))[0]
    logs = rng.normal(size=(n_cells, 10)) @ programs[:, :10].T * 4
    rates = np.exp(logs + np.random.default_rng(1).normal(size=N_GENES))
    return sp.csr_matrix(
        rng.poisson(depth * rates / rates.sum(axis=1, keepdims=True)).astype(float)
    ), programs


@pytest.mark.parametrize("depth", [300, 3000, 30000])
def test_the_share_of_the_signal_is_told_from_the_noise_of_counting(depth):
    """Of few counts most of what differs is noise, and the share along the true programs is as high as of many."""
    counts, programs = program_cells(3, depth=depth)
    values = np.arange(counts.max() + 1)
    known = signal_along(counts.astype(int), values, programs[:, :10])
    half = signal_along(counts.astype(int), values, programs[:, 5:15])
    foreign = signal_along(counts.astype(int), values, programs[:, 10:])
    assert known > 0.6 and foreign < 0.15 and foreign < half < known - 0.15


def test_the_share_of_the_signal_does_not_depend_on_the_length_or_angle_of_axes():
    counts, programs = program_cells(4)
    values, mixed = (
        np.arange(counts.max() + 1),
        programs[:, :10] @ np.random.default_rng(2).normal(size=(10, 10)),
    )
    shares = [signal_along(counts.astype(int), values, axes) for axes in (programs[:, :10], mixed)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)


@pytest.mark.parametrize("n_cells", [2, 5, 40, 300])
def test_a_share_is_one_and_noise_has_none(n_cells):
    counts = sp.csr_matrix(np.random.default_rng(8).poisson(0.5, size=(n_cells, N_GENES)))
    vectors = np.random.default_rng(9).normal(size=(N_GENES, 8))
    share = signal_along(counts, np.arange(counts.max() + 1), vectors)
    assert 0 <= share <= 1 and (n_cells < 40 or share < 0.2)
    assert signal_along(sp.csr_matrix((3, N_GENES), dtype=int), np.arange(2), vectors) == 0


def test_axes_that_are_zero_or_copies_add_nothing_to_the_share():
    counts, programs = program_cells(4)
    values, axes = np.arange(counts.max() + 1), programs[:, 10:12]
    padded = np.column_stack([axes, axes, np.zeros((N_GENES, 60))])
    shares = [signal_along(counts.astype(int), values, vectors) for vectors in (axes, padded)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


@pytest.mark.parametrize(("signal", "share"), [(0.5, 0.025), (0.1, 0.25)])
def test_own_axes_have_to_earn_their_share_beside_axes_that_know_the_cells(signal, share):
    features, types = study(5)
    few, fits = np.arange(4), []
    axes, folds = axes_along(features[few], np.eye(N_GENES, 12, dtype=np.float32)), cross_folds(types[few])
    pretrained = PretrainedAxes(axes, signal)
    given = {"on_fit": lambda: fits.append(1), "pretrained": pretrained}
    head = solve_head(features[few], types[few], 4, folds, **given)
    assert set(head.shares) == {"genes, power 0", "genes, power 0.5", "genes, power 1", PRETRAINED}
    # with one cell a type nothing speaks but what was thought before
    assert head.shares["genes, power 0"] == pytest.approx(share, abs=0.005)
    assert len(fits) == n_fits(folds, pretrained=pretrained)


def test_foreign_axes_change_little_where_no_cell_can_judge():
    """One cell a type, axes that see the quality of a cell only: they take away less where known to hold little."""
    features, types = study(6)
    quality = np.eye(N_GENES, dtype=np.float32)[:, 150:]
    few, asked = np.arange(4), np.arange(40, 240)
    logits = {}
    for signal in (0.0, 1.0):
        pretrained = PretrainedAxes(axes_along(features[few], quality), signal)
        head = solve_head(features[few], types[few], 4, cross_folds(types[few]), pretrained=pretrained)
        logits[signal] = features[asked] @ head.weights.T + head.bias
    likelihood = {
        key: log_softmax(found, axis=1)[np.arange(200), types[asked]] for key, found in logits.items()
    }
    assert likelihood[0.0].mean() > likelihood[1.0].mean() + 0.05


def test_vectors_of_a_panel_are_those_of_its_genes():
    panel = load_tokenizer(find_model("scbert-mini")).gene_panel
    vectors = pretrained_vectors("scbert-mini", panel)
    places = np.flatnonzero(vectors.any(axis=1))[::-1][:80]
    asked = ["no gene", *(panel[place] for place in places)]
    found = pretrained_vectors("scbert-mini", asked)
    assert not found[0].any()
    np.testing.assert_array_equal(found[1:], vectors[places])
    assert pretrained_vectors("scbert-mini", asked[:10]) is None


def test_a_model_without_axes_is_refused(tmp_path):
    tokenizer = ScBertTokenizer(gene_panel=["CD3E", "MS4A1"])
    config = ScBertConfig(hidden_size=16, num_hidden_layers=0, max_position_embeddings=3)
    save_model(ScBertForMaskedExpression(config), tokenizer, tmp_path / "model")
    with pytest.raises(InputError, match="no axes of cells"):
        pretrained_vectors(tmp_path / "model", ["CD3E"])


@pytest.fixture
def few_labelled(tmp_path):
    """A pretrained model of other cells; one labelled cell a type, and many to ask for."""
    names = [f"GENE{number}" for number in range(N_GENES)]
    tokenizer = ScBertTokenizer(gene_panel=names, n_bins=18, bin_width=0.5, keep_zeros=False)

    def counts(seed):
        matrix, types = study(seed, n_types=6, depth=0.25)
        cells = AnnData(sp.csr_matrix(np.expm1(matrix.toarray() * np.log(2)).round().astype(np.float32)))
        cells.var_names = names
        cells.obs["cell_type"] = [f"type {name}" for name in types]
        return cells

    axes = cell_axes([tokenizer.bin_cells(counts(seed)) for seed in (1, 2)], 10)
    config = ScBertConfig(
        vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id, hidden_size=16,
        num_hidden_layers=0, max_position_embeddings=N_GENES + 1, ordinal_expression=True, pooling="cell",
    )  # fmt: skip
    model = ScBertForMaskedExpression(config)
    start_cell(model, axes.vectors, axes.center)
    save_model(model, tokenizer, tmp_path / "pretrained")
    reference = counts(5)[np.arange(6)].copy()
    return tmp_path / "pretrained", reference, counts(6)


def test_axes_are_left_out_where_the_head_does_not_read_genes(few_labelled, tmp_path):
    """A base whose token of the cell is read: its states are no genes, which the axes are made of."""
    pretrained, reference, _ = few_labelled
    told = finetune(
        reference, "cell_type", tmp_path / "model", base=str(pretrained), recipe="default",
        cell_axes=str(pretrained), use_cpu=True,
    )  # fmt: skip
    assert told["solved_head"]["cell_axes"]["signal"] is None


def test_pretrained_axes_help_where_few_cells_are_labelled(few_labelled, tmp_path):
    pretrained, reference, asked = few_labelled
    scores = {}
    for name, axes in (("with", str(pretrained)), ("without", "")):
        asked.write_h5ad(tmp_path / "asked.h5ad")
        found = finetune(
            reference, "cell_type", tmp_path / name, cell_axes=axes, test=tmp_path / "asked.h5ad",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        scores[name] = found["test_accuracy"]
        assert (found["solved_head"]["cell_axes"]["genes"] > 0) == (name == "with")
    assert scores["with"] > scores["without"] + 0.05, scores


def test_many_labelled_cells_do_without_pretrained_axes(few_labelled, tmp_path, monkeypatch):
    pretrained, _, labelled = few_labelled
    for most, used in ((41, True), (40, False)):
        monkeypatch.setattr(run_finetune, "MANY_OF_A_TYPE", most)
        found = run_finetune.finetune(
            labelled, "cell_type", tmp_path / str(most), cell_axes=str(pretrained), use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        assert (found["solved_head"]["cell_axes"]["genes"] > 0) == used
        assert (PRETRAINED in found["solved_head"]["shares"]) == used
