"""Planting outliers enlarges what layers read and changes nothing that the network gives."""

import copy

import torch

from dacc.benchmarks import planted_outliers
from dacc.benchmarks.planted_outliers import ROWS, plant_
from dacc.core.config import build_config
from dacc.quant.config import METHODS, QuantizeConfig


def test_planted_channels_are_large_and_the_network_gives_the_same(dit_pipeline):
    plain = dit_pipeline().transformer
    planted, largest = copy.deepcopy(plain), {}
    plant_(planted, 40.0, 2)
    for name, model in (("plain", plain), ("planted", planted)):
        for layer in (model.transformer_blocks[0].attn1.to_k, model.transformer_blocks[1].ff.net[0].proj):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: largest.setdefault(name, []).append(args[0].abs().flatten(0, -2).amax(0))
            )
    x, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5])
    with torch.no_grad():
        expected, found = (model(x, torch.tensor([10, 500]), labels).sample for model in (plain, planted))
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    for before, after in zip(largest["plain"], largest["planted"], strict=True):
        enlarged = after / before > 30
        assert int(enlarged.sum()) == 2
        torch.testing.assert_close(after[~enlarged], before[~enlarged], rtol=1e-3, atol=1e-4)


def test_outliers_in_both_streams_of_flux_change_nothing_that_it_gives(flux_pipeline):
    plain = flux_pipeline().transformer
    planted, largest = copy.deepcopy(plain), {}
    plant_(planted, 40.0, 2)
    read = (
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.ff_context.net.0.proj",
        "single_transformer_blocks.0.proj_mlp",
    )
    generator = torch.Generator().manual_seed(0)
    config = plain.config
    inputs = {
        "hidden_states": torch.randn(2, 16, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.2, 0.9]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.ones(2) if config.guidance_embeds else None,
    }
    for name, model in (("plain", plain), ("planted", planted)):
        for layer in read:
            model.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, name=name: largest.setdefault(name, []).append(args[0].abs().flatten(0, -2).amax(0))
            )
    with torch.no_grad():
        expected, found = (model(**inputs).sample for model in (plain, planted))
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert len(largest["plain"]) == len(read)
    for before, after in zip(largest["plain"], largest["planted"], strict=True):
        assert int((after / before > 30).sum()) == 2


def test_a_table_is_printed(dit_folder, monkeypatch, capsys):
    monkeypatch.setattr(planted_outliers, "ROWS", {"rtn": ROWS["rtn"]})
    words = [str(dit_folder), "--samples", "1", "--seeds", "2", "--threads", "1", "--size", "100", "--act-bits", "8"]
    monkeypatch.setattr("sys.argv", ["planted_outliers.py", *words])
    planted_outliers.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1 calibration samples, 2 seeds, 50 steps"
    (row,) = [line for line in printed if line.startswith("| rtn |")]
    figures = [float(cell) for cell in row.strip("| ").split("|")[1:]]
    assert len(figures) == 6
    assert figures[2] > figures[1] > 0  # outliers harm


def test_every_row_can_be_asked_for():
    for fields in ROWS.values():
        config = build_config(QuantizeConfig, bits=4, act_bits=4, **fields).resolved()
        assert build_config(METHODS.load(config.method).CONFIG, **config.settings)
