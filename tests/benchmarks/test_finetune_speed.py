"""The comparison of fine-tuning with scikit-learn runs, and both learn."""

import finetune_speed


def test_both_ways_learn(adata, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "reference.h5ad")
    job = (tmp_path / "reference.h5ad", "cell_type", "auto")
    assert finetune_speed.ours(*job)["macro_f1"] > 0.9
    assert finetune_speed.scikit_learn(*job)["macro_f1"] > 0.9
    finetune_speed.take_turns(job, 1)
    assert "| scbert finetune |" in capsys.readouterr().out
