import torch
from torch import nn

import dacc
from dacc.evaluate.size import bytes_in_memory, component_sizes


def test_tied_weights_count_once_and_layers_may_count_for_themselves() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    norm = 4 * (4 + 4 + 4 + 4) + 8  # two parameters, two buffers and a 64-bit counter
    assert bytes_in_memory(model) == 4 * 16 + norm
    model[0].memory_bytes = lambda: 1000
    model[1].memory_bytes = lambda: 1
    assert bytes_in_memory(model) == 1001 + norm
    assert bytes_in_memory(nn.Linear(4, 4, dtype=torch.float16)) == 2 * 20


def test_sizes_are_of_denoisers_of_what_was_treated_and_of_what_else_is_named(dit_folder, bundle_of):
    bundle = bundle_of(dit_folder, bits=8, component=("vae",))
    assert list(component_sizes(dacc.load(bundle, device="cpu"), bundle)) == ["transformer", "vae"]
    plain = dacc.load(dit_folder, device="cpu")
    assert list(component_sizes(plain, dit_folder)) == ["transformer"]
    assert list(component_sizes(plain, dit_folder, ["vae", "scheduler", "unet"])) == ["transformer", "vae"]
