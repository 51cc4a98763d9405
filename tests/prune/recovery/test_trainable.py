"""What is trained, and that the folded network computes exactly what the trained one did."""

import pytest
import torch
from torch import nn

from dacc.core.config import build_config
from dacc.core.errors import UnsupportedError
from dacc.prune.recovery.config import RecoveryConfig
from dacc.prune.recovery.trainable import LowRank, branch_ends, training_
from dacc.prune.stacks import TRANSFORMERS
from dacc.runtime.passthrough import skipping

from .. import toys


def prepared(student, **fields):
    return training_(student, build_config(RecoveryConfig, **fields), torch.Generator().manual_seed(0))


def shaken(parameters):
    """As if they had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in, self.conv2, self.block = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Module()
        self.block.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        return self.norm(self.block.conv2(self.conv2(self.conv_in(x))))


@pytest.mark.parametrize("trainable", ["full", "lora", "difffit"])
@pytest.mark.parametrize("kind", ["linears", "convolutions"])
def test_folded_is_bit_for_bit_what_was_trained(toy, kind, trainable):
    student = toy()[0] if kind == "linears" else Convolutions()
    args = (torch.randn(2, 3, 4), torch.ones(2)) if kind == "linears" else (torch.randn(2, 3, 5, 5),)
    keys, classes = list(student.state_dict()), [type(module) for module in student.modules()]
    first = student(*args)
    with prepared(student, trainable=trainable, rank=2) as parameters:
        assert torch.equal(torch.as_tensor(student(*args)[0]), first[0])  # nothing changes before training
        shaken(parameters)
        wanted = student(*args)
    assert torch.equal(student(*args)[0], wanted[0])
    assert not torch.equal(student(*args)[0], first[0])
    assert list(student.state_dict()) == keys
    assert [type(module) for module in student.modules()] == classes
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_low_rank_equals_the_formula():
    weight = torch.randn(6, 2, 3, 3)
    low_rank = LowRank(weight, 4, 8.0, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(low_rank.up)
    change = torch.zeros(6, 18)
    for row in range(6):
        for column in range(18):
            change[row, column] = sum(low_rank.up[row, r] * low_rank.down[r, column] for r in range(4)) * 8.0 / 4
    assert torch.allclose(low_rank(weight), weight + change.view(6, 2, 3, 3), atol=1e-5)


def test_layers_too_small_for_the_rank_move_as_fast_as_others():
    scales = [LowRank(torch.ones(rows, 18), 8, 8.0, torch.Generator()).scale for rows in (32, 4, 1)]
    assert scales == [1.0, 1.0, 1.0]


def test_difffit_trains_biases_norms_and_one_factor_for_every_branch(toy):
    student, _ = toy()
    with prepared(student, trainable="difffit") as parameters:
        kinds = [name.rpartition(".")[2] for name in parameters]
        assert kinds.count("factor") == len(student.blocks)  # weight and bias share it
        biases = [name for name in parameters if "bias" in name]
        norms = [name for name in parameters if "norm" in name]
        assert len(biases) == 3 + 3 * len(student.blocks)
        assert len(norms) == 2 * len(student.blocks)
        factors = {name: one for name, one in parameters.items() if name.endswith("factor")}
        with torch.no_grad():
            next(iter(factors.values())).fill_(0.0)
        x = torch.randn(1, 3, 8)
        assert torch.equal(student.blocks[0](x), x)  # the whole branch is multiplied
    assert torch.equal(student.blocks[0](x), x)


def test_branch_ends_are_found_in_denoisers_and_never_the_output_layer(dit_pipeline, sd_pipeline, flux_pipeline):
    dit, sd, flux = dit_pipeline().transformer, sd_pipeline().unet, flux_pipeline().transformer
    for number in range(2):
        assert f"transformer_blocks.{number}.attn1.to_out.0" in branch_ends(dit)
        assert f"transformer_blocks.{number}.ff.net.2" in branch_ends(dit)
    assert len(branch_ends(dit)) == 4
    found = branch_ends(sd)
    assert "down_blocks.0.resnets.0.conv2" in found
    assert "mid_block.attentions.0.proj_out" in found
    assert "conv_out" not in found
    assert {"single_transformer_blocks.0.proj_out", "transformer_blocks.0.attn.to_add_out"} <= set(branch_ends(flux))
    assert {"transformer_blocks.0.ff.net.2", "transformer_blocks.0.ff_context.net.2"} <= set(branch_ends(flux))
    assert "proj_out" not in branch_ends(flux)


@pytest.mark.parametrize(
    "make",
    [
        toys.dit, toys.pixart, toys.sd3, toys.flux, toys.flux2, toys.hunyuan_video, toys.wan, toys.ltx, toys.cogvideox,
        toys.qwen_image, toys.sana,
    ],
)  # fmt: skip
def test_with_all_factors_at_zero_no_block_of_a_transformer_does_anything(make):
    toy = make()
    student, teacher = toy.build(), toy.build()
    stacks = [stack.path for stack in TRANSFORMERS[type(student).__name__]]
    blocks = [f"{stack}.{number}" for stack in stacks for number in range(len(teacher.get_submodule(stack)))]
    with prepared(student, trainable="difffit") as parameters, torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("factor") and name.startswith(tuple(f"{block}." for block in blocks)):
                parameter.fill_(0.0)
        found = toy.run(student)
    with skipping(teacher, blocks):
        assert torch.allclose(found, toy.run(teacher), atol=1e-5)


def test_only_low_rank_updates_are_trained_with_lora(toy):
    student, _ = toy()
    with prepared(student, trainable="lora", rank=2) as parameters:
        linears = sum(isinstance(module, nn.Linear) for module in student.modules())
        assert len(parameters) == 2 * linears
        assert sum(parameter.numel() for parameter in parameters.values()) < 2 * 2 * linears * 24


def test_16_bit_weights_are_trained_in_32_and_come_back(toy):
    student = toy()[0].to(torch.bfloat16)
    student.proj_in.weight.requires_grad_(False)
    with prepared(student, trainable="full") as parameters:
        assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
        shaken(parameters)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert not student.proj_in.weight.requires_grad


def test_a_network_with_nothing_to_train_is_refused():
    with (
        pytest.raises(UnsupportedError, match="trainable=lora.*trainable=full"),
        prepared(nn.LayerNorm(4), trainable="lora"),
    ):
        pass
