import pytest

from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.quant.config import QuantizeConfig


def test_the_defaults_are_four_bits_weight_only():
    config = QuantizeConfig()
    assert (config.bits, config.act_bits, config.group_size, config.symmetric) == (4, 16, "auto", "auto")


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 16}, "bits=16"),
        ({"act_bits": 6}, "act_bits=6"),
        ({"group_size": 0}, "a group holds at least one value"),
        ({"group_size": "row"}, "group_size"),
        ({"layer_bits": [("*.ff.*", 9)]}, r"\*\.ff\.\*=9: bits are 2 to 8, or 16"),
        ({"act_bits": 8, "symmetric": False}, "drop --asymmetric or --act-bits"),
        ({"act_bits": 8, "bits": 8, "group_size": 64}, "drop --group-size"),
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
        {"bits": "4", "symmetric": "auto"},
    ],
)
def test_what_can_be_done_is_taken(fields):
    build_config(QuantizeConfig, **fields)


def test_it_survives_json():
    config = QuantizeConfig(bits=3, layer_bits=(("a*", 8),), include=("a*",), group_size="channel", symmetric=False)
    assert QuantizeConfig.model_validate_json(config.model_dump_json()) == config
