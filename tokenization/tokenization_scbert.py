"""ScBertTokenizer: cells in, expression ids out."""

import os
from pathlib import Path

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

from .cells_scbert import (
    encode_every_gene,
    encode_expressed,
    matrix_and_names,
    other_sources,
    raw_hint,
    resolve_input,
    stack_chunks,
    subsample,
    take_rows,
)
from .errors_scbert import InputError
from .expression_scbert import (
    as_csr,
    bin_dtype,
    bin_floor,
    bin_quantile,
    change_log_base,
    check_options,
    check_values,
    expm1,
    is_integer_valued,
    normalize_expression,
)
from .genes_scbert import (
    LEVEL_FORMAT,
    MINIMUM_OVERLAP,
    align_genes,
    check_gene_levels,
    check_gene_panel,
    fill_absent,
    measured_share,
    read_gene_levels,
    read_panel_rows,
    write_gene_panel,
)

# cells read together
CHUNK_SIZE = 2048
# cells binned together: their float64 work space stays in the processor's cache
BLOCK_SIZE = 512


class ScBertTokenizer(PreTrainedTokenizer):
    """Turn cells into sequences of expression bins over an ordered gene panel.

    Ids are 0 (no expression; also the pad, told apart by the attention mask), the bins 1..n_bins, and the
    mask, n_bins + 1. A trailing token of id 0 closes every cell.

    Parameters
    ----------
    gene_panel : sequence of str, or path of a panel file
        The genes of the model, in order. Saved as ``gene_panel.txt``.
    target_sum : float
        Sum the counts of a cell are brought to, after alignment to the panel.
    log_base : float
        Base of the logarithm of 1 + x.
    binning : {"floor", "quantile"}
        Fixed bins of the log values (scBERT), or quantiles of each cell's non-zero values (scGPT, scMBERT).
    n_bins : int
        Number of bins above 0.
    bin_width : float
        Width of a floor bin on the log scale.
    keep_zeros : bool
        True: every gene of the panel, fixed length. False: expressed genes (id > 0) only, padded.
    max_length : int, optional
        Longest sequence, trailing token included, when `keep_zeros` is False; a longer cell keeps a random
        subset of its genes, the same one each time.
    feature_modalities : sequence of int [genes], optional
        Modality of each feature. The size factor is taken within a modality.
    gene_levels : sequence of float [genes], optional
        Mean bin of each gene in the cells a model learnt from; saved as ``gene_levels.txt``. Cells of a file that
        lacks a gene are given it, rounded, in the place of 0, and `target_sum` is cut by the share of the counts
        that such genes had; less so where most genes are lacking (`genes_scbert`).
    seed : int
        Seed of the random subsets.

    Examples
    --------
    >>> import numpy as np
    >>> tokenizer = ScBertTokenizer(gene_panel=["CD3E", "MS4A1", "NKG7"], target_sum=8)
    >>> tokenizer(np.array([[7, 0, 1]]), return_tensors="np")["input_ids"]
    array([[3, 0, 1, 0]])
    """

    vocab_files_names = {"gene_panel_file": "gene_panel.txt", "gene_levels_file": "gene_levels.txt"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        gene_panel=None,
        gene_panel_file=None,
        target_sum=1e4,
        log_base=2.0,
        binning="floor",
        n_bins=5,
        bin_width=1.0,
        keep_zeros=True,
        max_length=None,
        feature_modalities=None,
        gene_levels=None,
        gene_levels_file=None,
        seed=0,
        **kwargs,
    ):
        if gene_panel is None and gene_panel_file is None:
            raise InputError("ScBertTokenizer needs a gene panel: gene_panel=[...] or gene_panel_file=PATH.")
        if gene_panel is None or isinstance(gene_panel, (str, os.PathLike)):
            rows = read_panel_rows(gene_panel_file if gene_panel is None else gene_panel)
            gene_panel = [row[0] for row in rows]
            if feature_modalities is None and all(len(row) > 1 and row[1].isdigit() for row in rows):
                feature_modalities = [int(row[1]) for row in rows]
        options = {
            "target_sum": target_sum, "log_base": log_base, "binning": binning, "n_bins": n_bins,
            "bin_width": bin_width, "keep_zeros": keep_zeros, "max_length": max_length, "seed": seed,
        }  # fmt: skip
        check_gene_panel(gene_panel)
        check_options(options, gene_panel, feature_modalities)
        for name, value in options.items():
            setattr(self, name, value)
        self.gene_panel = list(gene_panel)
        self.feature_modalities = (
            None if feature_modalities is None else np.asarray(feature_modalities, dtype=np.int64)
        )
        self.gene_levels = read_gene_levels(gene_levels_file) if gene_levels is None else gene_levels
        self._bin_tokens = {f"[BIN_{i}]": i for i in range(n_bins + 1)} | {"[MASK]": n_bins + 1}
        kwargs.setdefault("pad_token", "[BIN_0]")
        kwargs.setdefault("mask_token", "[MASK]")
        kwargs.setdefault("model_max_length", max_length or len(self.gene_panel) + 1)
        names = ["input_ids"] if keep_zeros else ["input_ids", "attention_mask", "gene_ids"]
        names += [] if feature_modalities is None else ["modality_ids"]
        # not those of a saved tokenizer, whose options may have been others
        kwargs["model_input_names"] = names
        kwargs.pop("added_tokens_decoder", None)
        super().__init__(**options, **kwargs)

    @property
    def gene_levels(self):
        """Mean bin of each gene in the cells a model learnt from, float64 [genes], or None."""
        return self._gene_levels

    @gene_levels.setter
    def gene_levels(self, levels):
        self._gene_levels = None if levels is None else check_gene_levels(levels, self)

    # the vocabulary of a text tokenizer: a token per expression id

    @property
    def vocab_size(self):
        """Number of expression ids: the bins, 0 and the mask."""
        return self.n_bins + 2

    def get_vocab(self):
        """Expression ids by token name."""
        return dict(self._bin_tokens)

    def _tokenize(self, text, **kwargs):
        return text.split()

    def _convert_token_to_id(self, token):
        return self._bin_tokens.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self._bin_tokens)[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Token ids as they are: a cell has no special tokens around it."""
        return token_ids_0 if token_ids_1 is None else token_ids_0 + token_ids_1

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Write the gene panel, and the levels if there are any, beside the tokenizer's configuration."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        paths = [os.path.join(save_directory, prefix + name) for name in self.vocab_files_names.values()]
        write_gene_panel(paths[0], self.gene_panel, self.feature_modalities)
        if self.gene_levels is None:
            # a tokenizer with levels may have been saved here before
            Path(paths[1]).unlink(missing_ok=True)
            return (paths[0],)
        np.savetxt(paths[1], self.gene_levels, fmt=LEVEL_FORMAT)
        return tuple(paths)

    # cells to batches

    def __call__(
        self, cells, gene_names=None, return_tensors=None, input="auto", layer=None,
        padding=True, truncation=None, max_length=None,
    ):  # fmt: skip
        """Encode cells.

        Parameters
        ----------
        cells
            AnnData, pandas DataFrame (genes as columns), ``{"X": matrix, "gene_names": [...]}``, scipy sparse
            matrix or array [cells, genes].
        gene_names : sequence of str [genes], optional
            Names of the columns; those of the AnnData or DataFrame, or the panel, if left out.
        return_tensors : {"np", "pt"}, optional
            numpy arrays if left out.
        input : {"auto", "counts", "log1p"}
            What the values are; see `detect_input_kind`.
        layer : str, optional
            Layer of the AnnData to take, or ``"raw"``.
        padding : bool or {"longest", "max_length", "do_not_pad"}
            Where only expressed genes are kept, cells differ in length: pad them to the longest (True) or to
            `max_length`, or return lists of different lengths (False).
        truncation : bool, optional
            Cut cells longer than `max_length` to a random subset of their genes; done wherever there is a
            `max_length`, unless this is False.
        max_length : int, optional
            Replaces the tokenizer's own `max_length` for this call.

        Returns
        -------
        transformers.BatchEncoding
            `input_ids` [cells, panel + 1]; or, without zeros, `input_ids`, `gene_ids` and
            `attention_mask` [cells, longest]; with modalities also `modality_ids`.

        Raises
        ------
        InputError
            As `bin_cells`; and if cells with every gene would be cut or padded.
        TypeError
            If `cells` is a path.

        Examples
        --------
        >>> tokenizer = ScBertTokenizer(gene_panel=["CD3E", "MS4A1", "NKG7"], keep_zeros=False)
        >>> tokenizer(np.array([[2, 0, 1], [0, 0, 9]]), padding="max_length", max_length=4)["gene_ids"]
        array([[0, 2, 3, 3],
               [2, 3, 3, 3]])
        """
        limit = self.max_length if max_length is None else max_length
        width = (limit or self.model_max_length) if padding == "max_length" else None
        if truncation in (False, "do_not_truncate"):
            limit = None
        self._check_lengths(limit, width)
        bins = self.bin_cells(cells, gene_names=gene_names, input=input, layer=layer)
        encoded = self._encode(subsample(bins, limit, self.seed), width)
        if padding in (False, "do_not_pad") and not self.keep_zeros:
            lengths = encoded["attention_mask"].sum(axis=1)
            encoded = {
                name: [row[:length].tolist() for row, length in zip(rows, lengths)]
                for name, rows in encoded.items()
            }
        return BatchEncoding(encoded, tensor_type=return_tensors)

    def _check_lengths(self, limit, width):
        n_tokens = len(self.gene_panel) + 1
        if self.keep_zeros and ((limit or n_tokens) < n_tokens or (width or n_tokens) != n_tokens):
            raise InputError(
                f"This tokenizer keeps every gene, so that all cells have {n_tokens} tokens, and max_length="
                f"{width or limit} cannot be met. Leave it out, or make the tokenizer with keep_zeros=False."
            )
        if limit is not None and limit < 2:
            raise InputError(
                f"max_length must be at least 2, one gene and the trailing token; found {limit}."
            )

    # cells to bins

    def bin_cells(self, cells, gene_names=None, input="auto", layer=None):
        """Expression bins of cells over the panel, sparse.

        Parameters are those of calling the tokenizer.

        Returns
        -------
        scipy.sparse.csr_matrix [cells, panel]
            int8 (int16 above 126 bins); zeros are not stored.

        Raises
        ------
        InputError
            If there are no cells, no genes of the panel, or values that cannot be expression.
        """
        chunks = self.iter_bins(cells, gene_names=gene_names, input=input, layer=layer)
        return stack_chunks(chunks, len(self.gene_panel), bin_dtype(self.n_bins))

    def iter_bins(
        self, cells, gene_names=None, input="auto", layer=None, chunk_size=CHUNK_SIZE, alignment=None
    ):
        """Like `bin_cells`, in chunks of rows: memory does not grow with the cells of a backed file.

        An `alignment` of the columns with the panel may be given in the place of `gene_names`.
        """
        gene_names = gene_names if alignment is None else alignment.names
        matrix, names = matrix_and_names(cells, self.gene_panel, gene_names, layer)
        alignment = self._align(names, cells, layer) if alignment is None else alignment
        alignment.check(minimum=0.0)
        kind, scale = self.resolve_input(matrix, input, hint=other_sources(cells, layer))
        for start in range(0, matrix.shape[0], chunk_size):
            chunk = as_csr(take_rows(matrix, start, start + chunk_size))
            check_values(chunk)
            if input == "auto" and kind == "counts" and not is_integer_valued(chunk):
                raise InputError(
                    f"Cells from row {start} on have fractions, while earlier ones are whole-number counts. "
                    f"Say what the values are: input='counts' or 'log1p' (--values counts, --values log1p)."
                )
            yield self.bin_rows(chunk, alignment, kind, scale is not None)

    def align(self, cells, gene_names=None, layer=None):
        """How the genes of `cells` match the panel, as a `GeneAlignment`."""
        return self._align(matrix_and_names(cells, self.gene_panel, gene_names, layer)[1], cells, layer)

    def _align(self, names, cells, layer):
        alignment = align_genes(names, self.gene_panel)
        if alignment.overlap < MINIMUM_OVERLAP:
            alignment.hint = raw_hint(cells, self.gene_panel, layer)
        return alignment

    def resolve_input(self, matrix, input="auto", hint=""):
        """What kind of values a matrix holds, and their scale; see `cells_scbert.resolve_input`."""
        return resolve_input(matrix, input, self.target_sum, hint)

    def bin_rows(self, chunk, alignment, kind="counts", covers_all_genes=True):
        """Bins of rows [cells, genes of `alignment`] whose kind is known, and for log1p whether all genes are there."""
        if chunk.shape[0] > BLOCK_SIZE:
            bins = (
                self.bin_rows(take_rows(chunk, start, start + BLOCK_SIZE), alignment, kind, covers_all_genes)
                for start in range(0, chunk.shape[0], BLOCK_SIZE)
            )
            return stack_chunks(bins, len(self.gene_panel), bin_dtype(self.n_bins))
        values = self._log_values(chunk, alignment, kind, covers_all_genes)
        if self.binning == "quantile":
            return bin_quantile(values, self.n_bins)
        bins = bin_floor(values, self.n_bins, self.bin_width)
        return bins if self.gene_levels is None else fill_absent(bins, alignment.absent, self.gene_levels)

    def _log_values(self, chunk, alignment, kind, covers_all_genes):
        """Rows on the model's log scale, aligned to the panel."""
        if kind == "log1p" and not covers_all_genes:
            # a part of the genes: what the others held is not known, so the size factor stays
            return change_log_base(alignment.apply_to_logs(chunk), self.log_base)
        # the size factor is taken after alignment, so log1p of all genes goes back to the counts' scale;
        # float64 keeps bins from counts exact at their edges, float32 admits the rounding of log1p
        counts, dtype = (chunk, np.float64) if kind == "counts" else (expm1(chunk), np.float32)
        aligned = alignment.apply(counts)
        target_sum = self.target_sum
        if self.gene_levels is not None:
            target_sum *= measured_share(self.gene_levels, alignment.absent, self.log_base, self.bin_width)
        return normalize_expression(aligned, target_sum, self.log_base, self.feature_modalities, dtype)

    # bins to batches

    def encode_bins(self, bins):
        """Dense arrays of a batch of binned cells.

        Parameters
        ----------
        bins : scipy.sparse.csr_matrix [cells, panel]
            Rows of what `bin_cells` returns. Of a cell longer than `max_length`, the random subset depends on the cell
            and `seed` alone.

        Returns
        -------
        dict of numpy.ndarray, int64
            ``input_ids`` [cells, panel + 1]; or padded ``input_ids``, ``gene_ids``, ``attention_mask``
            [cells, longest]; with modalities also ``modality_ids``. Pads and the trailing token have gene id
            ``len(gene_panel)``.
        """
        return self._encode(bins if self.keep_zeros else subsample(bins, self.max_length, self.seed))

    def _encode(self, bins, width=None):
        encoded = encode_every_gene(bins) if self.keep_zeros else encode_expressed(bins, width)
        if self.feature_modalities is not None:
            modalities = np.append(self.feature_modalities, 0)
            if self.keep_zeros:
                encoded["modality_ids"] = np.tile(modalities, (bins.shape[0], 1))
            else:
                encoded["modality_ids"] = modalities[encoded["gene_ids"]]
        return encoded

    def _pad(self, encoded_inputs, *args, **kwargs):
        """Pad gene and modality ids along with the expression ids."""
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        missing = len(padded["input_ids"]) - len(padded.get("gene_ids", padded["input_ids"]))
        side = kwargs.get("padding_side") or self.padding_side
        for name, value in (("gene_ids", len(self.gene_panel)), ("modality_ids", 0)):
            if missing and name in padded:
                pads, ids = [value] * missing, list(padded[name])
                padded[name] = ids + pads if side == "right" else pads + ids
        return padded


# a saved tokenizer carries this code, so that it loads where the package is not installed
ScBertTokenizer.register_for_auto_class("AutoTokenizer")
