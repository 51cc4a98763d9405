import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, UNet2DModel
from torch import nn

from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.families import Family, find_family
from dacc.core.scheme import Scheme
from dacc.quant.config import QuantizeConfig
from dacc.quant.plan import Traits, integers_instead, plan_layers, ungrouped, without_groups

PLAIN = Family(name="plain", denoisers=(), edge=("first", "last"), temporal=("time.*",), modulation=("mod",))
BLOCK = "transformer_blocks.0"


def toy(**layers):
    with torch.device("meta"):
        return nn.ModuleDict({"first": nn.Linear(64, 64), **layers})


def plans_of(model, family=PLAIN, **fields):
    return {plan.name: plan for plan in plan_layers(model, family, QuantizeConfig(**fields))}


def scheme_of(layer, **fields):
    return plans_of(toy(layer=layer), **fields)["layer"].scheme


@pytest.fixture(scope="module")
def dit():
    with torch.device("meta"):
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
        )


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"bits": 4},
            {"attn1.to_q": "w4", "ff.net.2": "w4-g64-asym", "norm1.linear": "w4", "time": "w8", "class": "w8"},
        ),
        (
            {"bits": 3},
            {"attn1.to_q": "w3", "ff.net.2": "w3-g64-asym", "norm1.linear": "w4", "time": "w8", "class": "w8"},
        ),
        ({"bits": 8}, {"attn1.to_q": "w8", "ff.net.2": "w8", "norm1.linear": "w8", "time": "w8", "class": "w8"}),
        (
            {"bits": 8, "act_bits": 8},
            {"attn1.to_q": "w8a8-offset", "ff.net.2": "w8a8-offset", "norm1.linear": "w8", "time": "w8", "class": "w8"},
        ),
        (
            {"bits": 4, "act_bits": 8},
            {
                "attn1.to_q": "w4a8-offset",
                "ff.net.2": "w4a8-g64-two-level-offset",
                "norm1.linear": "w4",
                "time": "w8",
                "class": "w8",
            },
        ),
        (
            {"bits": 4, "act_bits": 8, "group_size": "channel"},
            {"attn1.to_q": "w4a8-offset", "ff.net.2": "w4a8-offset", "norm1.linear": "w4", "time": "w8", "class": "w8"},
        ),
        (
            {"bits": 4, "group_size": 32, "symmetric": True},
            {"attn1.to_q": "w4-g32", "ff.net.2": "w4-g32", "norm1.linear": "w4-g32", "time": "w8", "class": "w8"},
        ),
    ],
)
def test_roles_decide_how_far_down_a_layer_goes(dit, fields, expected):
    plans = plans_of(dit, find_family("DiTTransformer2DModel")[0], **fields)
    full = {
        "time": "norm1.emb.timestep_embedder.linear_2",
        "class": "norm1.emb.class_embedder.embedding_table",
    }
    assert {name: plans[f"{BLOCK}.{full.get(name, name)}"].scheme.name for name in expected} == expected


@pytest.mark.parametrize("name", ["pos_embed.proj", "proj_out_1", "proj_out_2"])
def test_first_and_last_layers_stay_float(dit, name):
    plan = plans_of(dit, find_family("DiTTransformer2DModel")[0], bits=8, act_bits=8)[name]
    assert plan.scheme is None
    assert plan.reason == "first and last layers stay 16-bit float"


def test_every_layer_of_a_unet_is_planned_once(unet):
    plans = plan_layers(unet, find_family("UNet2DModel")[0], QuantizeConfig(bits=8, act_bits=8))
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert [plan.name for plan in plans] == names
    assert {plan.scheme.name for plan in plans if plan.name.endswith("time_emb_proj")} == {"w8"}
    assert {plan.scheme.name for plan in plans if ".conv" in plan.name} == {"w8a8-offset"}
    assert all((plan.scheme is None) != (plan.reason is None) for plan in plans)
    assert all(plan.shape == tuple(unet.get_submodule(plan.name).weight.shape) for plan in plans)


@pytest.mark.parametrize("layer", [nn.Conv1d(32, 8, 3), nn.Conv3d(32, 8, 3)], ids=["conv1d", "conv3d"])
def test_convolutions_of_other_ranks_are_weight_only(layer):
    assert scheme_of(layer, bits=8, act_bits=8) == Scheme(bits=8)


def test_an_embedding_has_int8_rows_unless_asked_otherwise():
    model = toy(layer=nn.Embedding(10, 64))
    assert plans_of(model, bits=3)["layer"].scheme == Scheme(bits=8)
    assert plans_of(model, bits=4, group_size=48)["layer"].scheme == Scheme(bits=8)
    assert plans_of(model, layer_bits=(("layer", 4),))["layer"].scheme == Scheme(bits=4)


@pytest.mark.parametrize(
    ("features", "bits", "group_size"),
    [
        (256, 4, 64),
        (96, 4, 32),
        (48, 4, 16),
        (72, 4, None),  # nothing from 16 up divides it
        (64, 4, None),  # one group is one scale per channel
        (256, 5, 64),
        (256, 6, None),
        (256, 2, 64),
    ],
)
def test_groups_halve_until_they_divide(features, bits, group_size):
    scheme = scheme_of(nn.Linear(features, 8), bits=bits)
    assert scheme.group_size == group_size
    assert scheme.symmetric is (group_size is None)


def test_a_group_as_wide_as_the_layer_is_one_scale_per_channel():
    assert scheme_of(nn.Linear(96, 8), group_size=96).group_size is None


def test_groups_of_a_convolution_run_over_its_flattened_kernel():
    assert scheme_of(nn.Conv2d(64, 8, 3, groups=2), group_size=32).group_size == 32


def test_a_group_that_does_not_divide_is_refused_with_the_layer_and_advice():
    with pytest.raises(ConfigError, match="group_size 50 does not divide the 64 input features of layer") as caught:
        scheme_of(nn.Linear(64, 8), group_size=50)
    assert "--group-size auto" in caught.value.mend
    assert "--exclude 'layer'" in caught.value.mend
    assert plans_of(toy(layer=nn.Linear(64, 8), ok=nn.Linear(100, 8)), group_size=50, exclude=("layer",))


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return nn.ModuleDict(
            {
                "first": nn.Linear(8, 8),
                "time": nn.Sequential(nn.Linear(8, 8)),
                "body": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
                "mod": nn.Linear(8, 8),
                "last": nn.Linear(8, 8),
            }
        )


@pytest.mark.parametrize(
    ("fields", "treated"),
    [
        ({}, {"time.0": 8, "body.0": 3, "body.1": 3, "mod": 4}),
        ({"include": ("body.*",)}, {"body.0": 3, "body.1": 3}),
        ({"exclude": ("body.*", "mod")}, {"time.0": 8}),
        ({"include": ("body.*",), "exclude": ("*.1",)}, {"body.0": 3}),
        ({"layer_bits": (("*", 5), ("*.0", 16), ("first", 8))}, {"first": 8, "body.1": 5, "mod": 5, "last": 5}),
        ({"layer_bits": (("time.*", 2),)}, {"time.0": 2, "body.0": 3, "body.1": 3, "mod": 4}),
    ],
)
def test_patterns_choose_layers_and_the_last_bits_win(model, fields, treated):
    plans = plans_of(model, bits=3, **fields)
    assert {name: plan.scheme.bits for name, plan in plans.items() if plan.scheme} == treated


@pytest.mark.parametrize(
    ("fields", "acts"),
    [
        ({}, {"time.0": 16, "body.0": 4, "body.1": 4, "mod": 16}),
        ({"layer_act_bits": (("*.0", 6), ("body.*", 8))}, {"time.0": 16, "body.0": 8, "body.1": 8, "mod": 16}),
        ({"layer_act_bits": (("body.*", 8), ("*.1", 16))}, {"time.0": 16, "body.0": 8, "body.1": 16, "mod": 16}),
    ],
)
def test_patterns_choose_activation_bits_where_activations_are_quantized(model, fields, acts):
    plans = plans_of(model, bits=4, act_bits=4, **fields)
    assert {name: plan.scheme.act_bits for name, plan in plans.items() if plan.scheme} == acts


def test_sensitive_layers_are_spared_by_methods_that_say_so(unet):
    family, config = find_family("UNet2DModel")[0], QuantizeConfig(bits=4, act_bits=4, group_size="channel")
    usual = {plan.name: plan.scheme for plan in plan_layers(unet, family, config) if plan.scheme}
    plans = plan_layers(unet, family, config, Traits(spares=True))
    spared = {plan.name: plan.scheme for plan in plans if plan.scheme}
    changed = {name for name in spared if spared[name] != usual[name]}
    assert changed == {name for name in spared if name.endswith("conv_shortcut") or ".downsamplers." in name}
    assert {spared[name].name for name in changed} == {"w8a8-offset"}
    asked = config.model_copy(update={"layer_bits": (("*.conv_shortcut", 5),), "layer_act_bits": (("*", 6),)})
    plans = plan_layers(unet, family, asked, Traits(spares=True))
    assert {plan.scheme.name for plan in plans if plan.name.endswith("conv_shortcut")} == {"w5a6-offset"}


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"exclude": ("mod",)}, {"mod": "excluded"}),
        ({"include": ("body.*",)}, {"mod": "not included", "first": "not included"}),
        ({"layer_bits": (("mod", 16),)}, {"mod": "kept at 16 bits as asked"}),
    ],
)
def test_what_is_left_alone_has_its_reason(model, fields, reasons):
    plans = plans_of(model, **fields)
    assert {name: plans[name].reason for name in reasons} == reasons


@pytest.mark.parametrize(
    "fields",
    [
        {"include": ("bodi.0",)},
        {"exclude": ("bodi.0",)},
        {"layer_bits": (("bodi.0", 8),)},
        {"act_bits": 8, "layer_act_bits": (("bodi.0", 8),)},
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest(model, fields):
    with pytest.raises(ConfigError, match=r"'bodi.0' matches no layer") as caught:
        plans_of(model, **fields)
    assert "body.0" in caught.value.mend


def test_nothing_left_to_quantize_is_an_error(model):
    with pytest.raises(UnsupportedError, match="has no layer left to quantize") as caught:
        plans_of(model, exclude=("*",))
    assert "--exclude" in caught.value.mend


def test_a_shared_weight_is_skipped_in_all_its_layers():
    model = toy(a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))
    model["a"].weight = model["b"].weight
    plans = plans_of(model)
    assert plans["a"].reason == plans["b"].reason == "shares its weight with another layer"
    assert plans["c"].scheme is not None


def test_a_subclass_of_a_layer_is_not_taken_for_it():
    class Special(nn.Linear):
        pass

    plans = plans_of(toy(special=Special(8, 8), plain=nn.Linear(8, 8)))
    assert plans["special"].reason == "Special is not a plain layer"


def test_what_the_model_keeps_in_float32_is_left_alone():
    model = toy(keep=nn.Sequential(nn.Linear(8, 8)), keeper=nn.Linear(8, 8))
    model._keep_in_fp32_modules = ["keep"]
    plans = plans_of(model)
    assert plans["keep.0"].reason == "the model keeps it in float32"
    assert plans["keeper"].scheme is not None


# what a method is made for


def traited(model, traits, family=None, **fields):
    family = family or find_family(type(model).__name__)[0]
    return {plan.name: plan for plan in plan_layers(model, family, QuantizeConfig(**fields), traits)}


def test_methods_of_temporal_layers_take_them_down_to_the_asked_bits(dit):
    found = traited(dit, Traits(temporal=True), bits=3, act_bits=8, act_mode="static")
    embedder = found[f"{BLOCK}.norm1.emb.timestep_embedder.linear_1"].scheme
    assert (embedder.bits, embedder.act_bits) == (3, 16)
    assert found[f"{BLOCK}.norm1.linear"].scheme.bits == 3
    assert found[f"{BLOCK}.norm1.emb.class_embedder.embedding_table"].scheme == Scheme(bits=8)


def test_where_temporal_activations_have_tables_the_body_has_fixed_scales(dit):
    found = traited(dit, Traits(temporal=True, temporal_acts=True, calls=7), bits=8, act_bits=8, act_mode="per-step")
    table = {"act_bits": 8, "act_mode": "per-step", "act_steps": 7}
    assert found[f"{BLOCK}.norm1.linear"].scheme == Scheme(bits=8, **table)
    assert found[f"{BLOCK}.attn1.to_q"].scheme == Scheme(bits=8, act_bits=8, act_mode="static")


@pytest.mark.parametrize("mode", ["auto", "dynamic", "per-group", "static", "per-step"])
@pytest.mark.parametrize("act_bits", [4, 6, 8])
def test_the_body_has_the_mode_that_was_asked_for(mode, act_bits):
    layers = toy(layer=nn.Linear(128, 64), mod=nn.Linear(64, 64))
    found = traited(layers, Traits(calls=5), PLAIN, bits=8, act_bits=act_bits, act_mode=mode)
    steps = 5 if mode == "per-step" else None
    mode = "dynamic" if mode == "auto" else mode
    groups = 64 if mode == "per-group" else None
    offset = mode == "dynamic" or (mode == "per-group" and act_bits == 8)
    fields = {"act_mode": mode, "act_steps": steps, "act_group_size": groups, "act_offset": offset}
    assert found["layer"].scheme == Scheme(bits=8, act_bits=act_bits, **fields)
    assert found["mod"].scheme.act_mode == "none"


@pytest.mark.parametrize(
    ("fields", "traits", "text", "others"),
    [
        ({"act_mode": "static"}, Traits(), "w8a8-offset", "w8a8-static"),
        ({"act_mode": "per-step"}, Traits(calls=5), "w8a8-offset", "w8a8-per-step5"),
        ({"act_mode": "per-step"}, Traits(temporal_acts=True, calls=5), "w8a8-offset", "w8a8-static"),
        ({"act_mode": "dynamic"}, Traits(), "w8a8-offset", "w8a8-offset"),
        ({"act_mode": "dynamic"}, Traits(rank=0), "w8-smooth", "w8a8-offset-smooth"),
        ({"bits": 4}, Traits(rank=8), "w4-r8-smooth", "w4a8-offset-r8-smooth"),
        ({"bits": 4, "act_bits": 16}, Traits(rank=8), "w4-r8-smooth", "w4-r8-smooth"),
        ({"layer_act_bits": (("*.to_k", 6),)}, Traits(rank=0), "w8a6-offset-smooth", "w8a8-offset-smooth"),
    ],
    ids=str,
)
def test_what_reads_text_has_scales_per_token_or_float_inputs(fields, traits, text, others):
    family = Family(name="cross", denoisers=(), edge=(), temporal=(), text=("attn2.to_[kv]",))
    with torch.device("meta"):
        model = nn.ModuleDict({"attn2": nn.ModuleDict({name: nn.Linear(32, 32) for name in ("to_q", "to_k")})})
    found = traited(model, traits, family, **{"bits": 8, "act_bits": 8, **fields})
    assert (found["attn2.to_k"].scheme.name, found["attn2.to_q"].scheme.name) == (text, others)


PER_GROUP = {"act_bits": 4, "act_mode": "per-group"}


@pytest.mark.parametrize(
    ("features", "fields", "name"),
    [
        (256, {}, "w4a4-g64-per-group64"),
        (96, {}, "w4a4-g32-per-group32"),
        (48, {}, "w4a4-g16-per-group16"),
        (64, {}, "w4a4-offset"),  # one group is one scale per token
        (64, {"act_symmetric": True}, "w4a4"),
        (72, {}, "w4a4-offset"),
        (256, {"group_size": 32}, "w4a4-g32-per-group32"),
        (256, {"group_size": 256}, "w4a4-offset"),
        (256, {"group_size": "channel"}, "w4a4-per-group64"),
        (256, {"bits": 8}, "w8a4-per-group64"),
        (256, {"bits": 8, "act_bits": 8}, "w8a8-per-group64-offset"),
        (256, {"act_symmetric": False}, "w4a4-g64-per-group64-offset"),
        (256, {"act_mode": "dynamic"}, "w4a4-g64-two-level-offset"),
        (256, {"act_mode": "dynamic", "act_symmetric": True}, "w4a4-g64-two-level"),
        (256, {"layer_bits": (("layer", 6),), "group_size": 32}, "w6a4-per-group32"),
        (256, {"layer_act_bits": (("layer", 16),)}, "w4-g64-asym"),
        (256, {"layer_act_bits": (("layer", 7),)}, "w4a7-g64-per-group64"),
    ],
)
def test_activations_have_the_groups_of_the_weight_or_groups_like_them(features, fields, name):
    assert scheme_of(nn.Linear(features, 8), **{**PER_GROUP, **fields}).name == name


def test_convolutions_and_layers_of_time_have_no_groups_of_activations(unet):
    found = plans_of(unet, find_family("UNet2DModel")[0], **PER_GROUP)
    convolutions = [plan.scheme for plan in found.values() if plan.scheme and len(plan.shape) == 4]
    assert {(scheme.act_mode, scheme.act_offset) for scheme in convolutions} == {("dynamic", True)}
    assert {plan.scheme.act_mode for name, plan in found.items() if plan.scheme and "time_emb" in name} == {"none"}


def test_linears_that_no_group_divides_are_named():
    layers = {"a": nn.Linear(72, 8), "b": nn.Linear(64, 8), "c": nn.Linear(100, 8), "d": nn.Conv2d(8, 8, 3)}
    model = toy(**layers, mod=nn.Linear(100, 8))
    for fields, names in (
        (PER_GROUP, ["a", "c"]),
        ({**PER_GROUP, "group_size": "channel"}, ["a", "c"]),
        ({**PER_GROUP, "bits": 8, "act_bits": 8}, ["a", "c"]),
        ({"act_bits": 4}, []),
        ({}, []),
    ):
        config = QuantizeConfig(**fields)
        assert without_groups(plan_layers(model, PLAIN, config), config) == names


def test_joined_inputs_have_groups_that_end_at_the_split(flux):
    name = "single_transformer_blocks.0.proj_out"  # 32 channels of attention, then 128
    for fields, expected in (
        ({"bits": 4}, "w4a4-g32-per-group32"),
        ({"bits": 8}, "w8a4-per-group32-split32"),
        ({"bits": 4, "group_size": 20, "include": (name,)}, "w4a4-offset-split32"),
    ):
        config = QuantizeConfig(**{**PER_GROUP, **fields})
        plans = plan_layers(flux, find_family("FluxTransformer2DModel")[0], config, Traits(split=True))
        assert {plan.name: plan.scheme for plan in plans}[name].name == expected
        assert without_groups(plans, config) == ([name] if "split" in expected and "group" not in expected else [])


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ["odd", "kernel"]),
        ({"bits": 5}, ["odd", "kernel"]),
        ({"bits": 8}, []),
        ({"act_bits": 8}, ["odd", "kernel"]),
        ({"bits": 5, "act_bits": 8}, []),
        ({"group_size": "channel"}, []),
        ({"group_size": 8}, []),
        ({"format": "nvfp4"}, ["odd", "kernel"]),
    ],
    ids=str,
)
def test_layers_that_no_group_divides_are_named(fields, names):
    table = nn.Embedding(10, 24)
    model = toy(
        odd=nn.Linear(72, 8), kernel=nn.Conv2d(8, 8, 3), even=nn.Linear(64, 8), few=nn.Linear(8, 8), table=table
    )
    config = QuantizeConfig(**fields)
    assert ungrouped(plan_layers(model, PLAIN, config), config) == names


@pytest.mark.parametrize(("group_size", "names"), [(32, []), (40, ["single_transformer_blocks.0.proj_out"])])
def test_joined_inputs_that_a_group_does_not_divide_are_named(group_size, names, flux):
    name = "single_transformer_blocks.0.proj_out"  # 32 channels of attention, then 128
    config = QuantizeConfig(group_size=group_size, include=(name,))
    plans = plan_layers(flux, find_family("FluxTransformer2DModel")[0], config, Traits(split=True))
    assert ungrouped(plans, config) == names


@pytest.mark.parametrize(
    ("layer", "fields", "name"),
    [
        (nn.Linear(64, 8), {}, "w4-g16-nvfp4"),
        (nn.Linear(16, 8), {"group_size": 16}, "w4-g16-nvfp4"),
        (nn.Linear(72, 8), {}, "w4"),
        (nn.Linear(64, 8), {"layer_bits": (("layer", 8),)}, "w8"),
        (nn.Linear(128, 8), {"layer_bits": (("layer", 3),)}, "w3-g64-asym"),
        (nn.Conv2d(128, 8, 1), {}, "w4-g64-asym"),
        (nn.Embedding(16, 64), {}, "w8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_linears_of_four_bits_are_floats_where_their_inputs_make_blocks(layer, fields, name):
    config = QuantizeConfig(format="nvfp4", **fields)
    plans = plan_layers(toy(layer=layer, mod=nn.Linear(32, 8), other=nn.Linear(32, 8)), PLAIN, config)
    found = {plan.name: plan.scheme.name for plan in plans if plan.scheme}
    assert found == {"layer": name, "mod": "w4-g16-nvfp4", "other": "w4-g16-nvfp4"}
    assert integers_instead(plans, config) == (["layer"] if name in ("w4", "w4-g64-asym") else [])
    assert integers_instead(plans, QuantizeConfig()) == []


def test_floats_may_have_smoothing_and_a_branch(dit):
    found = traited(dit, Traits(rank=8), format="nvfp4")
    assert found[f"{BLOCK}.attn1.to_q"].scheme.name == "w4-g16-nvfp4-r8-smooth"
    assert found[f"{BLOCK}.norm1.linear"].scheme.name == "w4-g16-nvfp4"


@pytest.fixture(scope="module")
def flux():
    with torch.device("meta"):
        return FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
        )


@pytest.fixture(scope="module")
def wide():
    with torch.device("meta"):
        return UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 48),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )


@pytest.mark.parametrize(
    "fields", [{}, {"act_bits": 8}, {"act_bits": 8, "act_mode": "static"}, {"group_size": "channel"}], ids=str
)
def test_joined_inputs_are_split_where_the_method_can_and_groups_end_at_the_split(wide, fields):
    plain, found = (traited(wide, Traits(split=split), bits=4, **fields) for split in (False, True))
    name = "up_blocks.0.resnets.1.conv_shortcut"  # 48 deep channels, then 32
    assert plain[name].scheme.split is None
    scheme = found[name].scheme
    assert scheme.group_size in (None, 16)
    if scheme.group_size is None or scheme.two_level:
        assert scheme.split == 48
    else:
        assert scheme.split is None  # groups have scales of their own anyway
    others = {key for key, plan in found.items() if plan.scheme != plain[key].scheme}
    assert others <= {f"up_blocks.{block}.resnets.{index}.conv_shortcut" for block in (0, 1) for index in (0, 1)}


@pytest.mark.parametrize(("rank", "expected"), [(0, "-smooth"), (8, "-r8-smooth"), (1000, "-r64-smooth")])
def test_linears_of_the_body_may_have_smoothing_and_a_branch(dit, rank, expected):
    plain, found = (traited(dit, traits, bits=4, act_bits=4) for traits in (Traits(), Traits(rank=rank)))
    assert found[f"{BLOCK}.attn1.to_q"].scheme.name == plain[f"{BLOCK}.attn1.to_q"].scheme.name + expected
    others = [name for name, plan in found.items() if plan.scheme and not plan.scheme.absorbs_outliers]
    assert others
    assert all("norm" in name for name in others)  # embedders and modulation
    assert all(found[name].scheme == plain[name].scheme for name in others)


@pytest.mark.parametrize("fields", [{}, {"act_bits": 8}, {"act_bits": 8, "act_mode": "static"}], ids=str)
def test_convolutions_may_have_smoothing_where_their_scales_are_found(unet, fields):
    plain, found = (traited(unet, traits, bits=4, **fields) for traits in (Traits(), Traits(smooth=True)))
    smooth = {name for name, plan in found.items() if plan.scheme and plan.scheme.smooth}
    dynamic = {name for name, plan in plain.items() if plan.scheme and plan.scheme.act_mode == "dynamic"}
    assert smooth == {name for name in dynamic if len(found[name].shape) == 4}
    assert bool(smooth) == (fields == {"act_bits": 8})
    assert all(found[name].scheme.rank is None for name in smooth)


def test_convolutions_have_no_branch(unet):
    found = traited(unet, Traits(rank=8), bits=4)
    assert any(plan.scheme and plan.scheme.absorbs_outliers for plan in found.values())
    for name, plan in found.items():
        assert not plan.scheme or not plan.scheme.absorbs_outliers or len(plan.shape) == 2, name


def test_an_asked_group_that_reaches_over_the_split_gives_way(wide):
    name = "up_blocks.0.resnets.1.conv_shortcut"
    found = traited(wide, Traits(split=True), bits=4, act_bits=8, group_size=40, include=(name,))
    assert found[name].scheme.group_size is None
    assert found[name].scheme.split == 48
