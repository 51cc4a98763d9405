"""Which linears a format rounds, and that rows keep the codes of a bundle where they can."""

from __future__ import annotations

import torch

import dacc
from dacc.core.manifest import read_manifest
from dacc.core.reporter import silent
from dacc.export.contents import read_contents
from dacc.export.rows import (
    choose_linears,
    has_rows,
    round_rows,
    rows_of,
    skips_by_last_part,
    skips_by_path,
)


def contents_of(folder, component="transformer"):
    manifest = read_manifest(folder)
    record = manifest.components[component] if manifest else None
    return read_contents(folder / component, record, record)


def test_names_are_read_as_the_loaders_read_them():
    assert skips_by_path(["proj_out"], "proj_out")
    assert skips_by_path(["proj_out"], "blocks.0.proj_out")  # they compare the last part with whole names
    assert not skips_by_path(["blocks.0.proj_out"], "blocks.1.proj_out")
    assert skips_by_path(["blocks.0"], "blocks.0.proj_out")
    assert skips_by_last_part(["norm.linear"], "blocks.0.linear")
    assert not skips_by_last_part(["norm.linear"], "blocks.0.linear_1")


def test_what_a_loader_cannot_leave_out_alone_is_rounded_too(flux_folder):
    """The last layer of Flux has the name of one in each single block."""
    reporter = silent()
    contents = contents_of(flux_folder)
    choice = choose_linears(contents, skips_by_path, reporter)
    assert "single_transformer_blocks.0.proj_out" in choice.rounded
    assert "proj_out" in choice.rounded
    assert "x_embedder" in choice.left_out
    assert any("proj_out of transformer would stay floating point" in notice for notice in reporter.notices)
    assert not [name for name in choice.rounded if skips_by_path(choice.left_out, name)]


def test_rows_are_the_codes_of_the_bundle_where_it_has_rows(bundle, dit_folder):
    small = bundle(dit_folder, bits=4, act_bits=8, layer_bits=[["*.to_k", 8]])
    contents, model = contents_of(small), dacc.load(small).transformer
    exact = [name for name in contents.layers if has_rows(contents.layers[name])]
    schemes = {contents.layers[name].scheme.name for name in exact}
    assert any("two-level" in scheme for scheme in schemes)
    assert "w8a8-offset" in schemes
    for name in exact:
        if len(contents.layers[name].shape) == 2:
            codes, scale = rows_of(contents, name)
            assert torch.equal(codes.float() * scale, model.get_submodule(name).stored.dequantize())


def test_other_weights_are_rounded_to_nearest():
    torch.manual_seed(0)
    weight = torch.randn(5, 40)
    weight[3] = 0
    codes, scale = round_rows(weight)
    for row in range(5):
        step = max(float(weight[row].abs().max()) / 127, 0) or 1.0
        expected = [round(value / step) for value in weight[row].tolist()]
        assert codes[row].tolist() == expected
        torch.testing.assert_close(scale[row, 0], torch.tensor(step))
