import math
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scbert.tokenization import (
    InputError,
    bin_floor,
    bin_quantile,
    detect_input_kind,
    normalize_expression,
)
from scbert.tokenization.expression_scbert import as_csr, check_values, is_integer_valued

# rows that sum to 10,000 put values on the edges of bins: 1, 3, 7, 15, 31 counts are log2 1, 2, 3, 4, 5
EDGES = np.array([[1, 3, 7, 15, 31, 9943], [0, 2, 6, 14, 30, 9948]])

counts_strategy = hnp.arrays(
    np.int64,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.one_of(st.integers(0, 40), st.sampled_from([0, 1, 3, 7, 10_000, 30_000])),
)


def reference_floor_bins(counts, target_sum, n_bins):
    """Bin k if (1 + count * target / total) >= 2^k, in whole numbers: no rounding at all."""
    bins = np.zeros(counts.shape, dtype=int)
    for i, row in enumerate(counts.tolist()):
        total = sum(row)
        for j, count in enumerate(row):
            for k in range(1, n_bins + 1):
                if count and total + count * target_sum >= 2**k * total:
                    bins[i, j] = k
    return bins


@settings(max_examples=200, deadline=None)
@given(counts=counts_strategy, n_bins=st.integers(1, 18))
def test_floor_bins_of_counts_equal_whole_number_reference(counts, n_bins):
    values = normalize_expression(sp.csr_matrix(counts), dtype=np.float64)
    np.testing.assert_array_equal(
        bin_floor(values, n_bins).toarray(), reference_floor_bins(counts, 10_000, n_bins)
    )


@settings(max_examples=200, deadline=None)
@given(counts=counts_strategy)
def test_floor_bins_survive_single_precision(counts):
    exact = bin_floor(normalize_expression(sp.csr_matrix(counts), dtype=np.float64), 5)
    single = bin_floor(normalize_expression(sp.csr_matrix(counts), dtype=np.float32), 5)
    assert (exact != single).nnz == 0


def test_values_on_an_edge_belong_to_the_upper_bin():
    bins = bin_floor(normalize_expression(sp.csr_matrix(EDGES), dtype=np.float64), 5)
    np.testing.assert_array_equal(bins.toarray(), [[1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize("edge", [1, 2, 3, 4, 5])
def test_natural_log_rounded_in_single_precision_stays_on_its_edge(edge):
    # log1p, the division and the store each round; the cast alone can land below the edge
    value = np.float32(np.log1p(np.float32(2**edge - 1))) / np.float32(math.log(2))
    bins = bin_floor(sp.csr_matrix(np.array([[value, np.nextafter(np.float32(edge), np.float32(0))]])), 9)
    np.testing.assert_array_equal(bins.toarray(), [[edge, edge]])


def test_double_precision_tells_values_just_below_an_edge():
    bins = bin_floor(sp.csr_matrix(np.array([[2.0, 2.0 - 1e-9, 1.0 - 1e-12]])), 5)
    np.testing.assert_array_equal(bins.toarray(), [[2, 1, 0]])


def test_finer_bins():
    values = sp.csr_matrix(np.array([[0.2, 0.5, 0.99, 1.0, 4.49, 20.0]]))
    np.testing.assert_array_equal(bin_floor(values, 18, bin_width=0.5).toarray(), [[0, 1, 1, 2, 8, 18]])


@settings(max_examples=100, deadline=None)
@given(
    values=hnp.arrays(
        np.float64, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.integers(0, 9).map(float)
    ),
    n_bins=st.integers(1, 60),
)
def test_quantile_bins_equal_dense_reference(values, n_bins):
    expected = np.zeros(values.shape, dtype=int)
    for i, row in enumerate(values):
        nonzero = np.sort(row[row > 0])
        if len(nonzero) == 0:
            continue
        # 1e-9 keeps numpy's own rounding of an edge from passing the value it stands on
        edges = np.quantile(nonzero, np.linspace(0, 1, n_bins)) if n_bins > 1 else nonzero[:1]
        expected[i] = np.where(row > 0, (edges[None, :] <= row[:, None] + 1e-9).sum(1), 0)
    np.testing.assert_array_equal(bin_quantile(sp.csr_matrix(values), n_bins).toarray(), expected)


def test_quantile_bins_reach_from_one_to_the_last():
    bins = bin_quantile(sp.csr_matrix(np.arange(0.0, 101.0)[None]), 50).toarray()[0]
    assert bins[0] == 0 and bins[1] == 1 and bins[-1] == 50
    assert (np.diff(bins) >= 0).all() and set(bins[1:]) == set(range(1, 51))


def test_normalisation_leaves_its_input_alone_and_empty_rows_empty():
    counts = sp.csr_matrix(np.array([[2, 0, 2], [0, 0, 0]]))
    before = counts.copy()
    values = normalize_expression(counts, target_sum=6)
    np.testing.assert_allclose(values.toarray(), [[2, 0, 2], [0, 0, 0]])
    assert (counts != before).nnz == 0


def test_size_factor_within_a_modality():
    counts = sp.csr_matrix(np.array([[1, 3, 10, 30]]))
    values = normalize_expression(counts, target_sum=4, modalities=np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(values.toarray(), [[1, 2, 1, 2]])


def test_other_log_bases():
    counts = sp.csr_matrix(np.array([[1.0, 9.0]]))
    np.testing.assert_allclose(
        normalize_expression(counts, target_sum=1e3, log_base=10).toarray(),
        np.log10([[101, 901]]),
        rtol=1e-6,
    )


# what the values are


def log1p_matrix(counts, target=1e4):
    sums = counts.sum(1, keepdims=True)
    return np.log1p(counts / sums * target).astype(np.float32)


@pytest.fixture
def counts():
    rng = np.random.default_rng(1)
    return rng.poisson(rng.lognormal(0, 1, size=(40, 200)) * rng.uniform(0.5, 3, size=(40, 1))).astype(float)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32, np.float64, bool])
def test_whole_numbers_are_counts(counts, dtype):
    assert detect_input_kind(as_csr(counts.astype(dtype))) == "counts"


@pytest.mark.parametrize("target", [1e4, 1234.5, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_natural_log1p_is_recognised(counts, target, dtype):
    assert detect_input_kind(sp.csr_matrix(log1p_matrix(counts, target).astype(dtype))) == "log1p"


def test_a_single_log1p_cell_is_recognised_by_its_sum(counts):
    assert detect_input_kind(sp.csr_matrix(log1p_matrix(counts[:1]))) == "log1p"
    with pytest.raises(InputError, match="--values"):
        detect_input_kind(sp.csr_matrix(log1p_matrix(counts[:1], 700)))


@pytest.mark.parametrize("kind", ["log2", "log10", "cp10k", "proportions", "fractional", "sqrt", "part"])
def test_everything_else_is_refused_naming_the_option(counts, kind):
    linear = counts / counts.sum(1, keepdims=True) * 1e4
    values = {
        "log2": np.log2(1 + linear),
        "log10": np.log10(1 + linear),
        "cp10k": linear,
        "proportions": linear / 1e4,
        "fractional": counts * 0.37,
        "sqrt": np.sqrt(counts),
        "part": log1p_matrix(counts)[:, :40],
    }[kind]
    with pytest.raises(InputError, match="--values"):
        detect_input_kind(sp.csr_matrix(values))


@pytest.mark.parametrize(
    ("bad", "words"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1.5, "negative"), (-np.inf, "infinite")]
)
@pytest.mark.parametrize("sparse", [True, False])
def test_impossible_values_are_refused(counts, bad, words, sparse):
    counts[3, 5] = bad
    with pytest.raises(InputError, match=words), warnings.catch_warnings():
        warnings.simplefilter("error")
        check_values(sp.csr_matrix(counts) if sparse else counts)


def test_an_empty_matrix_is_counts():
    assert detect_input_kind(sp.csr_matrix((3, 4))) == "counts"


def test_as_csr_tidies_without_touching_its_input():
    messy = sp.csr_matrix((np.array([1.0, 2.0, 0.0, 4.0]), np.array([2, 2, 1, 0]), np.array([0, 3, 4])))
    before = messy.data.copy(), messy.indices.copy()
    tidy = as_csr(messy)
    np.testing.assert_array_equal(tidy.toarray(), [[0, 0, 3], [4, 0, 0]])
    assert tidy.nnz == 2
    np.testing.assert_array_equal(messy.data, before[0])
    np.testing.assert_array_equal(messy.indices, before[1])


@pytest.mark.parametrize("make", [sp.csc_matrix, sp.coo_matrix, sp.csr_array, np.float16, np.asarray])
def test_as_csr_takes_every_layout(make):
    dense = np.array([[0, 1], [2, 0]], dtype=np.float32)
    assert as_csr(make(dense)).format == "csr"
    np.testing.assert_array_equal(as_csr(make(dense)).toarray(), dense)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_dense_matrices_become_what_scipy_makes_of_them(dtype, order):
    rng = np.random.default_rng(0)
    dense = np.asarray(rng.poisson(0.3, size=(40, 70)), dtype=dtype, order=order)
    dense[7] = 0
    found, expected = as_csr(dense), sp.csr_matrix(dense)
    assert found.dtype == expected.dtype and found.has_canonical_format
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    if dtype is np.float64:
        dense[0, 0], dense[1, 1] = np.nan, -0.0
        assert np.isnan(as_csr(dense)[0, 0]) and (as_csr(dense).data != 0).all()


def test_as_csr_refuses_text():
    with pytest.raises(InputError, match="numeric"):
        as_csr(np.array([["a", "b"]]))


def test_is_integer_valued():
    assert is_integer_valued(sp.csr_matrix(np.array([[1.0, 2.0]])))
    assert not is_integer_valued(sp.csr_matrix(np.array([[1.0, 2.5]])))
