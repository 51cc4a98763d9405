"""The expected products are written out here a second time, by hand: what a row says is a fact about hardware."""

import pytest

from dacc.core.errors import ConfigError
from dacc.core.scheme import Scheme
from dacc.core.target import NAMES, TARGETS, execution_of, find_target, gpu_of_capability

W4A16, W8A8, W4A8, W4A4 = (Scheme.from_name(name) for name in ("w4-g64-asym", "w8a8", "w4a8", "w4a4-g64-two-level"))
ROWS = {  # name -> products, compute capabilities, a card
    "cpu-int8": ({"int8"}, [], "avx512_vnni"),
    "cpu-float": (set(), [], "AVX2"),
    "turing": ({"int8", "int4"}, ["7.5"], "NVIDIA GeForce RTX 2080 Ti"),
    "ampere": ({"int8", "int4"}, ["8.0", "8.6", "8.7"], "NVIDIA A100-SXM4-80GB"),
    "ada": ({"int8", "int4", "fp8"}, ["8.9"], "RTX 4090"),
    "hopper": ({"int8", "fp8"}, ["9.0"], "NVIDIA H100 80GB HBM3"),
    "blackwell": ({"int8", "fp8", "nvfp4"}, ["10.0"], "b200"),
    "blackwell-ultra": ({"fp8", "nvfp4"}, ["10.3"], "NVIDIA B300"),
    "blackwell-rtx": ({"int8", "fp8", "nvfp4"}, ["12.0", "12.1"], "NVIDIA GeForce RTX 5090"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_its_products_and_is_found_by_name_capability_and_card(name):
    products, capabilities, card = ROWS[name]
    target = find_target(name)
    assert set(target.products) == products
    for capability in capabilities:
        assert find_target(capability) is find_target(f"sm{capability.replace('.', '')}") is target
        assert gpu_of_capability(tuple(map(int, capability.split(".")))) is target
    assert len(target.capabilities) == len(capabilities)
    assert find_target(card) is target


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("A10G", "ampere"),
        ("RTX A6000", "ampere"),
        ("NVIDIA RTX 6000 Ada Generation", "ada"),
        ("NVIDIA RTX 5000 Ada Generation", "ada"),
        ("RTX 2000 Ada", "ada"),
        ("L40S", "ada"),
        ("T4", "turing"),
        ("H200", "hopper"),
        ("H20", "hopper"),
        ("sm90a", "hopper"),
        ("SM_120", "blackwell-rtx"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "blackwell-rtx"),
        ("GB300", "blackwell-ultra"),
    ],
)
def test_cards_are_known_by_the_names_that_people_and_drivers_give_them(card, name):
    assert find_target(card).name == name


def test_no_name_belongs_to_two_rows():
    found = [capability for target in TARGETS for capability in target.capabilities]
    assert len(found) == len(set(found))
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_float_activations_run_as_float_products_everywhere(target):
    execution = execution_of(W4A16, target)
    assert execution.how.startswith("float products")
    assert execution.lacks is None


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("scheme", [W8A8, W4A8, Scheme.from_name("w8a4"), Scheme.from_name("w4a6")])
def test_integer_products_are_a_gain_where_the_table_has_them(target, scheme):
    execution = execution_of(scheme, target)
    assert execution.how == ("exact float products of the integers" if target.name == "cpu-float" else "int8 products")
    assert (execution.lacks is None) == ("int8" in ROWS[target.name][0])
    if execution.lacks:
        assert "Leave --act-bits out" in execution.sentence


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_four_bit_activations_are_never_said_to_run_on_four_bit_products(target):
    products = ROWS[target.name][0]
    execution = execution_of(W4A4, target)
    assert execution.how.startswith("4-bit values in ")
    assert execution.lacks
    assert ("dacc has no kernels for the 4-bit integer products" in execution.lacks) == ("int4" in products)
    assert ("NVFP4" in execution.lacks) == ("nvfp4" in products)
    assert ("--bits 8 --act-bits 8" in execution.instead) == ("int8" in products)
    assert ("FP8" in execution.instead) == ({"int8", "fp8"} <= products)


def test_hopper_is_told_what_it_lacks_and_what_it_has():
    assert execution_of(W4A4, find_target("H100")).sentence == (
        "4-bit values in int8 products: Hopper has no 4-bit integer products. "
        "--bits 8 --act-bits 8 runs on the same products with less error, --bits 4 --act-bits 8 in as small a file; "
        "FP8, which it has too, needs other software."
    )


@pytest.mark.parametrize(("text", "advice"), [("hoper", "hopper"), ("", "cpu-int8"), ("RTX 9999", "RTX 4090")])
def test_an_unknown_machine_is_refused_with_near_names(text, advice):
    with pytest.raises(ConfigError, match="no machine that dacc knows") as caught:
        find_target(text)
    assert advice in caught.value.mend


@pytest.mark.parametrize("text", ["sm70", "6.1", "sm_99"])
def test_an_unknown_capability_is_refused_with_the_known_ones(text):
    with pytest.raises(ConfigError, match="compute capability") as caught:
        find_target(text)
    assert "9.0" in caught.value.mend
