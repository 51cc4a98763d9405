import pytest

from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.scheme import Scheme

PER_GROUP = {"bits": 4, "act_bits": 4, "act_mode": "per-group", "act_group_size": 16}

NVFP4 = {"format": "nvfp4", "bits": 4, "group_size": 16}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"bits": 8}, "w8"),
        ({"bits": 4, "group_size": 64, "symmetric": False}, "w4-g64-asym"),
        ({"bits": 3, "symmetric": False}, "w3-asym"),
        ({"bits": 8, "act_bits": 8, "act_mode": "dynamic"}, "w8a8"),
        ({"bits": 4, "group_size": 64, "two_level": True, "act_bits": 8, "act_mode": "dynamic"}, "w4a8-g64-two-level"),
        ({"bits": 8, "act_bits": 6, "act_mode": "static"}, "w8a6-static"),
        ({"bits": 4, "act_bits": 8, "act_mode": "per-step", "act_steps": 50}, "w4a8-per-step50"),
        ({"bits": 4, "symmetric": False, "split": 128}, "w4-asym-split128"),
        (
            {"bits": 4, "group_size": 64, "two_level": True, "act_bits": 8, "act_mode": "static", "split": 128},
            "w4a8-g64-two-level-static-split128",
        ),
        ({"bits": 8, "act_bits": 8, "act_mode": "dynamic", "smooth": True}, "w8a8-smooth"),
        ({"bits": 4, "group_size": 64, "symmetric": False, "rank": 32, "smooth": True}, "w4-g64-asym-r32-smooth"),
        (
            {"bits": 4, "group_size": 64, "act_bits": 4, "act_mode": "per-group", "act_group_size": 64, "rank": 8},
            "w4a4-g64-per-group64-r8",
        ),
        ({"bits": 4, "act_bits": 4, "act_mode": "dynamic", "shifted": True}, "w4a4-shifted"),
        ({"bits": 8, "act_bits": 8, "act_mode": "dynamic", "act_offset": True, "split": 8}, "w8a8-offset-split8"),
        ({**PER_GROUP, "act_offset": True, "smooth": True}, "w4a4-per-group16-offset-smooth"),
        ({**PER_GROUP, "rank": 8, "smooth": True, "shifted": True}, "w4a4-per-group16-r8-smooth-shifted"),
        (NVFP4, "w4-g16-nvfp4"),
        ({**NVFP4, "rank": 32, "smooth": True}, "w4-g16-nvfp4-r32-smooth"),
        (
            {"bits": 8, "act_bits": 8, "act_mode": "per-group", "act_group_size": 32, "split": 64},
            "w8a8-per-group32-split64",
        ),
        (
            {"bits": 4, "act_bits": 4, "act_mode": "per-step", "act_steps": 9, "split": 8, "rank": 1},
            "w4a4-per-step9-split8-r1",
        ),
    ],
)
def test_names_are_short_and_tell_everything(fields, name):
    assert Scheme(**fields).name == name
    assert Scheme.from_name(name) == Scheme(**fields)


@pytest.mark.parametrize("name", ["", "w4-", "w4-r32-g64", "w4-smooth-r32", "w44", "w4-asym-two-level", "w9"])
def test_what_is_no_name_of_a_scheme_is_refused(name):
    with pytest.raises(ValueError, match="not the name of a scheme|8"):
        Scheme.from_name(name)


@pytest.mark.parametrize(("bits", "signed", "unsigned"), [(2, (-2, 1), (0, 3)), (8, (-128, 127), (0, 255))])
def test_codes_are_twos_complement_or_start_at_zero(bits, signed, unsigned):
    assert Scheme(bits=bits).code_range == signed
    assert Scheme(bits=bits, symmetric=False).code_range == unsigned


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"bits": 4, "group_size": 0}, "greater than or equal to 1"),
        ({"bits": 4, "act_bits": 8}, "act_mode is 'none' exactly when act_bits is 16"),
        ({"bits": 4, "act_mode": "dynamic"}, "act_mode is 'none' exactly when act_bits is 16"),
        *(({"bits": 8, "act_bits": bits, "act_mode": "static"}, "4 to 8 bits, or 16") for bits in (3, 9, 15, 17)),
        ({"bits": 8, "act_bits": 8, "act_mode": "per-step"}, "act_steps is given exactly when"),
        ({"bits": 8, "act_bits": 8, "act_mode": "static", "act_steps": 4}, "act_steps is given exactly when"),
        ({"bits": 8, "act_bits": 8, "act_mode": "per-step", "act_steps": 0}, "greater than or equal to 1"),
        ({"bits": 8, "split": 0}, "greater than or equal to 1"),
        ({"bits": 8, "rank": 0}, "greater than or equal to 1"),
        ({"bits": 4, "group_size": 16, "split": 40}, "does not divide the first 40 channels"),
        ({"bits": 4, "symmetric": False, "act_bits": 8, "act_mode": "dynamic"}, "need symmetric weights"),
        ({"bits": 4, "symmetric": False, "act_bits": 8, "act_mode": "static"}, "need symmetric weights"),
        ({"bits": 5, "group_size": 16, "two_level": True}, "at most 4 bits"),
        ({"bits": 4, "two_level": True}, "symmetric groups"),
        ({"bits": 4, "group_size": 16, "two_level": True, "symmetric": False}, "symmetric groups"),
        ({"bits": 4, "group_size": 16, "act_bits": 8, "act_mode": "dynamic"}, "use two_level or per channel"),
        ({"bits": 8, "act_bits": 8, "act_mode": "per-group"}, "act_group_size is given exactly when"),
        (
            {"bits": 8, "act_bits": 8, "act_mode": "dynamic", "act_group_size": 8},
            "act_group_size is given exactly when",
        ),
        ({**PER_GROUP, "group_size": 8}, "for each of these very groups, or for each channel"),
        ({**PER_GROUP, "group_size": 16, "two_level": True}, "for each of these very groups, or for each channel"),
        ({**PER_GROUP, "split": 40}, "act_group_size 16 does not divide the first 40 channels"),
        ({**PER_GROUP, "symmetric": False}, "need symmetric weights"),
        *(
            ({**NVFP4, **fields}, "nvfp4 has 4 bits, groups of 16")
            for fields in ({"bits": 5}, {"group_size": 32}, {"symmetric": False}, {"two_level": True}, {"split": 16})
        ),
        *(
            ({"bits": 4, "shifted": True, **fields}, "inputs are shifted where")
            for fields in (
                {},
                {"act_bits": 8, "act_mode": "dynamic"},
                {"act_bits": 4, "act_mode": "static"},
                {"act_bits": 4, "act_mode": "dynamic", "split": 8},
            )
        ),
        ({**NVFP4, "group_size": None, "act_bits": 8, "act_mode": "dynamic"}, "floating-point activations"),
        ({"bits": 8, "act_bits": 8, "act_mode": "static", "act_offset": True}, "zero points are found"),
        ({"bits": 8, "act_offset": True}, "zero points are found"),
        ({"bits": 8, "act_bits": 4, "act_mode": "dynamic", "act_offset": True, "shifted": True}, "not shifted"),
    ],
)
def test_what_cannot_be_stored_or_multiplied_is_refused(fields, advice):
    with pytest.raises(ConfigError, match=advice):
        build_config(Scheme, **fields)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"bits": 8}, False),
        ({"bits": 8, "act_bits": 8, "act_mode": "dynamic"}, True),
        (PER_GROUP, True),
        ({"bits": 8, "act_bits": 8, "act_mode": "static"}, False),
        ({"bits": 8, "act_bits": 8, "act_mode": "per-step", "act_steps": 2}, False),
    ],
)
def test_scales_of_activations_are_stored_or_found_at_each_call(fields, found):
    scheme = Scheme(**fields)
    assert scheme.finds_acts is found
    assert scheme.has_fixed_acts is (not found and scheme.act_bits < 16)


def test_a_split_makes_two_parts():
    assert Scheme(bits=8).parts == 1
    assert Scheme(bits=8, split=3).parts == 2


@pytest.mark.parametrize("mode", [{"act_mode": "dynamic"}, {"act_mode": "per-step", "act_steps": 20, "split": 64}])
def test_a_scheme_survives_json(mode):
    scheme = Scheme(bits=4, group_size=32, two_level=True, act_bits=5, **mode)
    assert Scheme.model_validate_json(scheme.model_dump_json()) == scheme


@pytest.mark.parametrize("bits", [4, 6])
def test_shifted_activations_use_all_codes_on_one_side(bits):
    scheme = Scheme(bits=8, act_bits=bits, act_mode="dynamic")
    assert scheme.act_max == 2 ** (bits - 1) - 1
    shifted = scheme.model_copy(update={"shifted": True})
    assert shifted.act_max == 2**bits - 1
    assert shifted.plain == scheme


def test_smoothing_and_a_branch_absorb_outliers():
    assert Scheme(bits=8, smooth=True).absorbs_outliers
    assert Scheme(bits=8, rank=1).absorbs_outliers
    assert not Scheme(bits=8).absorbs_outliers
    assert Scheme(bits=4, group_size=8, rank=2, smooth=True).plain == Scheme(bits=4, group_size=8)
