import pytest
from pydantic import Field, ValidationError

from dacc.core.config import Config, build_config, nearest, parse_settings
from dacc.core.errors import ConfigError


class Example(Config):
    bits: int = Field(4, ge=2, le=8)
    search: str = "mse"
    minutes: float = 1.0


def test_an_unknown_field_names_the_nearest_and_lists_all():
    with pytest.raises(ConfigError, match=r"there is no field 'serch'. Did you mean search\?") as caught:
        build_config(Example, serch="minmax")
    assert "Fields: bits, search, minutes." in caught.value.mend


class Fieldless(Config):
    pass


class WithFile(Config):
    file: str


def test_a_config_without_fields_says_so():
    with pytest.raises(ConfigError, match=r"^there is no field 'type'\. It has no fields: leave --set out\.$"):
        build_config(Fieldless, type="q9")


def test_a_missing_field_is_told_with_the_option_that_gives_it():
    with pytest.raises(ConfigError, match=r"^file has to be given\. Add --set file=VALUE\.$"):
        build_config(WithFile)


def test_a_bad_value_is_told_with_its_field():
    with pytest.raises(ConfigError, match="bits=9: Input should be less than or equal to 8"):
        build_config(Example, bits=9)


@pytest.mark.parametrize("minutes", ["inf", "nan", -float("inf")])
def test_a_number_without_end_is_refused(minutes):
    with pytest.raises(ConfigError, match="minutes=.*: Input should be a finite number"):
        build_config(Example, minutes=minutes)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError, match=r"bits=.*; there is no field 'rank'"):
        build_config(Example, bits="four", rank=3)


def test_text_from_the_command_line_becomes_numbers():
    assert build_config(Example, bits="3").bits == 3


def test_configs_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Example().bits = 3  # type: ignore[misc]


def test_settings_are_read_with_dashes_and_further_equal_signs():
    assert parse_settings(["range-search=mse", "form=a=b"]) == {"range_search": "mse", "form": "a=b"}


@pytest.mark.parametrize(
    ("pairs", "advice"),
    [
        (["search"], "--set search=mse"),
        (["=mse"], "--set search=mse"),
        (["search=mse", "search=minmax"], "each field once"),
        (["range-search=mse", "range_search=minmax"], "each field once"),
    ],
)
def test_settings_that_say_nothing_or_say_it_twice_are_refused(pairs, advice):
    with pytest.raises(ConfigError) as caught:
        parse_settings(pairs)
    assert advice in caught.value.mend


def test_nearest_names_close_words_or_else_all():
    assert nearest("gtpq", ["rtn", "gptq"]) == "Did you mean gptq?"
    assert nearest("xyz", ["rtn", "gptq"]) == "Known: gptq, rtn."
