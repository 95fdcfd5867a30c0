"""The comparison of fine-tuning with scikit-learn runs, and both learn."""

import finetune_speed


def test_both_ways_learn(adata, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "reference.h5ad")
    job = (tmp_path / "reference.h5ad", "cell_type", "auto")
    assert finetune_speed.ours(*job)["macro_f1"] > 0.9
    assert finetune_speed.scikit_learn(*job)["macro_f1"] > 0.9
    finetune_speed.take_turns(job, 1, alone=False)
    assert "| scbert finetune |" in capsys.readouterr().out


def test_an_atlas_is_drawn_from_few_cells(adata, tmp_path):
    adata.write_h5ad(tmp_path / "reference.h5ad")
    drawn = finetune_speed.drawn_cells(tmp_path / "reference.h5ad", 3 * adata.n_obs)
    assert drawn.n_obs == 3 * adata.n_obs and drawn.obs_names.is_unique
    assert 0.6 < drawn.X.sum() / adata.X.sum() / 3 < 0.95
