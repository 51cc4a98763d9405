"""Layers that read text, beside others whose activation scales are fixed or of groups."""

from fnmatch import fnmatchcase

import pytest
from diffusers import UNet2DConditionModel

from dacc.runtime.layers import QuantizedLayer

READ_TEXT = "*.attn2.to_[kv]"
METHODS = {  # settings, ways of layers that read text and of all others that round
    "tfmq": ({"iterations": 2}, "dynamic", {"per-step"}),
    "svdquant": ({"rank": 2}, "none", {"dynamic", "per-group"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_computes_as_the_network_that_simulated_it(method, sd_folder, quantize_watched, simulation_gap):
    settings, way, others = METHODS[method]
    done = quantize_watched(sd_folder, method, bits=4, act_bits=4, group_size="channel", settings=settings)
    model = UNet2DConditionModel.from_pretrained(done.bundle, subfolder="unet")
    modes = {name: part.scheme.act_mode for name, part in model.named_modules() if isinstance(part, QuantizedLayer)}
    reading = {name for name in modes if fnmatchcase(name, READ_TEXT)}
    assert reading
    assert {modes[name] for name in reading} == {way}
    assert {mode for name, mode in modes.items() if name not in reading} - {"none"} <= others
    assert simulation_gap(done, model) < 1e-4
