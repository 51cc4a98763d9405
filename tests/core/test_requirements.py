import pytest

from dacc.core.errors import ConfigError, QualityError
from dacc.core.manifest import Effect
from dacc.core.requirements import parse_requirements


class Writer:
    """Stands in for a BundleWriter and remembers what was asked of it."""

    kept = None

    def abandon(self, *, keep):
        self.kept = keep
        return "out.failed" if keep else None


@pytest.mark.parametrize(
    ("text", "floor"),
    [
        ("psnr>=25", ("psnr", ">=", 25.0)),
        (" SSIM >= 0.9 ", ("ssim", ">=", 0.9)),
        ("relative_l2<=1e-2", ("relative_l2", "<=", 0.01)),
    ],
)
def test_floors_are_read(text, floor):
    assert parse_requirements((text,), "quantize", measure="auto").floors == (floor,)


@pytest.mark.parametrize("text", ["", "psnr", "psnr>25", "fid<=3", "psnr>=much", "psnr>=25 dB", "psnr>=-3"])
def test_anything_else_is_refused_with_examples(text):
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        parse_requirements((text,), "quantize", measure="auto")
    assert "psnr>=25" in caught.value.mend


@pytest.mark.parametrize("text", ["psnr>=25", "ssim>=0.9", "relative_l2<=0.1"])
def test_a_floor_that_is_just_reached_passes(text):
    parse_requirements((text,), "quantize", measure="auto").check(
        Effect(psnr=25.0, ssim=0.9, relative_l2=0.1), Writer(), keep=False
    )


@pytest.mark.parametrize("text", ["psnr>=25.1", "ssim>=0.91", "relative_l2<=0.09"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_missed_floor_drops_or_keeps_the_result_and_says_which(text, keep):
    writer = Writer()
    with pytest.raises(QualityError, match="out.failed" if keep else "Nothing was written") as caught:
        parse_requirements((text,), "quantize", measure="auto").check(
            Effect(psnr=25.0, ssim=0.9, relative_l2=0.1), writer, keep=keep
        )
    assert writer.kept is keep
    assert "more bits" in caught.value.mend


@pytest.mark.parametrize(("command", "advice"), [("prune", "--ratio"), ("search-cache", "--speedup")])
def test_advice_is_about_options_that_the_command_has(command, advice):
    with pytest.raises(QualityError) as caught:
        parse_requirements(("psnr>=25",), command, measure="auto").check(Effect(psnr=20.0), Writer(), keep=False)
    assert advice in caught.value.mend
    assert "bits" not in caught.value.mend


def test_floors_without_a_measurement_are_refused_before_any_work():
    with pytest.raises(ConfigError, match="psnr>=25") as caught:
        parse_requirements(("psnr>=25",), "prune", measure="never")
    assert "Leave --measure never out" in caught.value.mend
    assert parse_requirements((), "prune", measure="never").floors == ()


def test_what_was_not_measured_misses_every_floor():
    with pytest.raises(QualityError, match=r"was not measured \(too large\).*leave --require out"):
        parse_requirements(("psnr>=1",), "prune", measure="auto").check(
            Effect(not_measured="too large"), Writer(), keep=False
        )
