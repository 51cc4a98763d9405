import pytest

from dacc import CalibrateConfig
from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.quant.config import METHODS, QuantizeConfig, on_the_fly


def test_the_defaults_are_four_bits_weight_only():
    config = QuantizeConfig()
    assert (config.bits, config.act_bits, config.group_size, config.symmetric) == (4, 16, "auto", "auto")


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 16}, "bits=16"),
        ({"act_bits": 3}, "activations of 3 bits: 4 to 8, or 16"),
        ({"act_bits": 9}, "activations of 9 bits: 4 to 8, or 16"),
        ({"act_bits": 8, "act_mode": "fixed"}, "act_mode='fixed'"),
        ({"group_size": 0}, "a group holds at least one value"),
        ({"group_size": "row"}, "group_size"),
        ({"layer_bits": [("*.ff.*", 9)]}, r"\*\.ff\.\*=9: bits are 2 to 8, or 16"),
        ({"act_bits": 8, "layer_act_bits": [("*.ff.*", 3)]}, r"\*\.ff\.\*=3: activation bits are 4 to 8, or 16"),
        ({"layer_act_bits": [("*", 8)]}, "need --act-bits for the others"),
        ({"act_bits": 8, "symmetric": False}, "drop --asymmetric or --act-bits"),
        ({"act_bits": 8, "bits": 8, "group_size": 64}, "drop --group-size"),
        ({"format": "nvfp4", "bits": 8}, "nvfp4 has 4 bits, not 8; drop --bits or --format"),
        ({"format": "nvfp4", "act_bits": 8}, "activations stay float; drop --act-bits or --format"),
        ({"format": "nvfp4", "group_size": 64}, "drop --group-size and --asymmetric, or --format"),
        ({"format": "nvfp4", "symmetric": False}, "drop --group-size and --asymmetric, or --format"),
        ({"format": "mxfp4"}, "format='mxfp4'"),
        ({"measure": "always"}, "measure='always'"),
        ({"groupsize": 64}, "Did you mean group_size"),
    ],
)
def test_what_cannot_be_done_is_refused_with_advice(fields, advice):
    with pytest.raises(ConfigError, match=advice):
        build_config(QuantizeConfig, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"act_bits": 8, "bits": 4, "group_size": 64},
        {"act_bits": 8, "bits": 8, "group_size": "channel"},
        {"layer_bits": [["*", 16]]},
        {"format": "nvfp4", "group_size": 16, "symmetric": True, "layer_bits": [["*.ff.*", 8]]},
        {"act_bits": 4, "layer_act_bits": [["*.ff.*", 16], ["*.attn*", 8]]},
        {"bits": "4", "symmetric": "auto"},
        *({"act_bits": bits} for bits in range(4, 9)),
        *({"act_bits": 8, "act_mode": mode} for mode in ("auto", "dynamic", "per-group", "static", "per-step")),
    ],
)
def test_what_can_be_done_is_taken(fields):
    build_config(QuantizeConfig, **fields)


def test_it_survives_json():
    config = QuantizeConfig(bits=3, layer_bits=(("a*", 8),), include=("a*",), group_size="channel", symmetric=False)
    assert QuantizeConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("auto", "dynamic"),
        ("rtn", "dynamic"),
        ("gptq", "dynamic"),
        ("ptq4dm", "static"),
        ("qdiffusion", "static"),
        ("tfmq", "per-step"),
    ],
)
def test_a_resolved_config_says_what_the_method_is_made_for(method, mode):
    config = QuantizeConfig(method=method, act_bits=8).resolved()
    assert config.act_mode == mode
    assert config.method == ("rtn" if method == "auto" else method)
    assert config.resolved() == config
    asked = QuantizeConfig(method=method, act_bits=8, act_mode="static")
    assert asked.resolved().act_mode == "static"


@pytest.mark.parametrize("method", METHODS.names())
def test_methods_of_integers_refuse_floats_and_name_those_that_take_them(method):
    config = QuantizeConfig(method=method, format="nvfp4")
    if method in ("rtn", "gptq", "svdquant"):
        assert config.resolved().format == "nvfp4"
        return
    with pytest.raises(ConfigError, match=f"{method} has no nvfp4 weights.*Use --method gptq or rtn or svdquant"):
        config.resolved()


@pytest.mark.parametrize("act_bits", range(4, 9))
def test_few_bits_of_activations_have_a_mode_of_their_own_where_the_method_says_so(act_bits):
    config = QuantizeConfig(method="svdquant", act_bits=act_bits)
    assert config.resolved().act_mode == ("dynamic" if act_bits == 8 else "per-group")
    asked = config.model_copy(update={"act_mode": "dynamic"}).resolved()
    assert asked.act_mode == "dynamic"
    assert QuantizeConfig(method="gptq", act_bits=act_bits).resolved().act_mode == "dynamic"
    assert not QuantizeConfig(act_bits=act_bits, act_mode="per-group").resolved().needs_calibration


def test_modes_of_activations_that_stay_float_are_none():
    assert QuantizeConfig(method="tfmq").resolved().act_mode == "auto"
    with pytest.raises(ConfigError, match="--act-mode static is about quantized activations") as caught:
        QuantizeConfig(act_mode="static").resolved()
    assert "--act-bits 8" in caught.value.mend


def test_an_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean qdiffusion"):
        QuantizeConfig(method="q-diffusion").resolved()


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"method": "rtn"}, False),
        ({"method": "rtn", "act_bits": 8}, False),
        ({"method": "rtn", "act_bits": 8, "act_mode": "static"}, True),
        ({"method": "rtn", "act_bits": 8, "act_mode": "per-step"}, True),
        ({"method": "ptq4dm"}, False),
        ({"method": "ptq4dm", "act_bits": 8}, True),
        ({"method": "ptq4dm", "act_bits": 8, "act_mode": "dynamic"}, False),
        ({"method": "gptq"}, True),
        ({"method": "qdiffusion"}, True),
        ({"method": "tfmq"}, True),
    ],
    ids=str,
)
def test_a_calibration_set_is_needed_by_methods_that_look_at_inputs_and_by_fixed_scales(fields, needed):
    assert QuantizeConfig(**fields).resolved().needs_calibration is needed


@pytest.mark.parametrize("name", METHODS.names())
def test_what_is_read_of_a_method_without_importing_it_is_what_it_holds(name):
    module = METHODS.load(name)
    for constant in ("UNIT", "ACT_MODE", "FEW_BITS_ACT_MODE", "FORMATS", "CALIBRATION", "SPLIT", "TEMPORAL"):
        assert METHODS.fact(name, constant) == getattr(module, constant, None)
    assert METHODS.fact(name, "NEEDS", ()) == module.NEEDS
    assert module.ACT_MODE in ("dynamic", "static", "per-step")


@pytest.mark.parametrize(
    ("fields", "strategy"),
    [
        ({"method": "gptq"}, "uniform"),
        ({"method": "ptq4dm", "act_bits": 8}, "ndtc"),
        ({"method": "ptq4dm", "act_bits": 8, "act_mode": "per-step"}, "every-step"),
        ({"method": "qdiffusion"}, "uniform"),
        ({"method": "rtn", "act_bits": 8, "act_mode": "per-step"}, "every-step"),
        ({"method": "tfmq"}, "every-step"),
    ],
    ids=str,
)
def test_a_set_made_on_the_fly_follows_the_method(fields, strategy):
    made = on_the_fly(QuantizeConfig(seed=3, **fields).resolved(), ["unet"])
    assert (made.strategy, made.component, made.seed) == (strategy, ("unet",), 3)
    assert made.samples == METHODS.fact(fields["method"], "SAMPLES", CalibrateConfig().samples)
