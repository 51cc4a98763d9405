"""NF4: diffusers' loader refuses a processor, so bitsandbytes' own functions read the file."""

from __future__ import annotations

import json

import pytest
import torch

from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig
from dacc.export.targets.bitsandbytes_nf4 import BLOCK, LEVELS, quantize_nf4

NAME = "transformer_blocks.0.attn1.to_q.weight"
NEEDS = "bitsandbytes is not installed"


def decoded(codes, largest, shape):
    values = torch.stack([codes[:, 0] >> 4, codes[:, 0] & 15], 1).flatten()[: shape.numel()].long()
    return (LEVELS[values] * largest.repeat_interleave(BLOCK)[: shape.numel()]).view(shape)


@pytest.mark.parametrize("shape", [(4, 64), (3, 50), (5, 7)])
def test_each_value_is_the_nearest_level_of_its_block(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    codes, largest = quantize_nf4(weight)
    assert codes.shape == (-(-weight.numel() // 2), 1)
    found, flat = decoded(codes, largest, weight.shape).flatten(), weight.flatten()
    for place in range(weight.numel()):
        first = place // BLOCK * BLOCK
        most = flat[first : first + BLOCK].abs().max()
        distances = (LEVELS * most - flat[place]).abs()
        assert abs(float(found[place] - flat[place])) <= float(distances.min()) + 1e-6


def test_it_is_what_bitsandbytes_itself_makes():
    functional = pytest.importorskip("bitsandbytes", reason=NEEDS).functional
    torch.manual_seed(0)
    weight = torch.randn(24, 100)
    weight[0, :64] = 0
    codes, largest = quantize_nf4(weight)
    theirs, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(state.code, LEVELS)
    assert torch.equal(largest, state.absmax)
    assert torch.equal(codes, theirs)


def test_its_own_reader_gives_the_float_weights_rounded_once(bundle, dit_folder, weights_of):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=NEEDS)
    small = bundle(dit_folder, bits=4)
    folder = export_pipeline(small, ExportConfig(format="bitsandbytes-nf4"), output="out")
    assert json.loads((folder / "dacc_export.json").read_text())["weights"] == "rounded anew from the float reference"
    tensors, before = weights_of(folder), weights_of(dit_folder)
    stats = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{NAME}.")}
    parameter = bitsandbytes.nn.Params4bit.from_prequantized(tensors[NAME], stats, device="cpu")
    found = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state).float()
    expected = decoded(*quantize_nf4(before[NAME]), before[NAME].shape)
    assert torch.equal(found, expected.bfloat16().float())  # their reader gives the type that the file names
    assert (found - before[NAME]).norm() < 0.1 * before[NAME].norm()


def test_every_layer_that_diffusers_will_replace_has_its_state(dit_folder, weights_of):
    from dacc.core.pipeline import walk_layers
    from dacc.export.rows import skips_by_path
    from dacc.runtime.skeleton import build_skeleton

    folder = export_pipeline(dit_folder, ExportConfig(format="bitsandbytes-nf4"), output="out")
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    tensors = weights_of(folder)
    for name, layer in walk_layers(build_skeleton(dit_folder / "transformer")):
        if isinstance(layer, torch.nn.Linear):
            packed = f"{name}.weight.quant_state.bitsandbytes__nf4" in tensors
            assert packed != skips_by_path(config["llm_int8_skip_modules"], name), name
