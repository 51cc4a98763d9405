import pytest

from dacc import QuantizeConfig, quantize_pipeline
from dacc.core.errors import ConfigError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter
from dacc.quant import outcome
from dacc.quant.outcome import target_of, tell_of_target
from dacc.quant.preview import preview_quantization


class Heard(Reporter):
    """Keeps every line."""

    def __init__(self, **options):
        super().__init__(quiet=True, **options)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def config(**fields):
    return QuantizeConfig(measure="never", **fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"act_bits": 4, "target": "H100"}, "on hopper this runs as 4-bit values in int8 products: Hopper has no"),
        ({"act_bits": 8, "target": "cpu-float"}, "on cpu-float this runs as exact float products"),
        ({"act_bits": 8, "target": "H100"}, None),
        ({"target": "cpu-float"}, None),
        ({"act_bits": 4}, None),
    ],
)
def test_a_named_target_that_lacks_the_products_is_a_notice(fields, told):
    reporter = Heard()
    tell_of_target(config(**fields).resolved(), reporter)
    assert len(reporter.notices) == (told is not None)
    assert all(notice.startswith(told) for notice in reporter.notices)


def test_under_strict_it_is_refused_before_any_weight_is_read(dit_folder, tmp_path):
    asked = config(act_bits=4, target="sm90")
    with pytest.raises(ConfigError, match="Hopper has no 4-bit integer products"):
        quantize_pipeline(dit_folder, asked, output=tmp_path / "out", reporter=Heard(strict=True))
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_of_a_named_target_has_the_notice_and_one_name(dit_folder, tmp_path):
    reporter = Heard()
    asked = config(act_bits=4, target="RTX 5090")
    last = read_manifest(quantize_pipeline(dit_folder, asked, output=tmp_path / "out", reporter=reporter)).passes[-1]
    assert last.config["target"] == "blackwell-rtx"
    assert len([notice for notice in last.notices if "NVFP4" in notice]) == 1
    assert any("layers run on blackwell-rtx as 4-bit values in int8 products" in line for line in reporter.lines)


@pytest.mark.parametrize("name", ["cpu-int8", "cpu-float"])
def test_what_this_machine_does_is_said_and_not_written(dit_folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(outcome, "target_of", lambda *_: target_of(config(target=name), "cpu"))
    reporter = Heard()
    bundle = quantize_pipeline(dit_folder, config(bits=8, act_bits=8), output=tmp_path / "out", reporter=reporter)
    assert not any("products" in notice for notice in read_manifest(bundle).passes[-1].notices)
    assert any("layers run here as " in line for line in reporter.lines)
    assert any("Leave --act-bits out" in line for line in reporter.lines) == (name == "cpu-float")


@pytest.mark.parametrize(("name", "told"), [("cpu-int8", True), ("cpu-float", False)])
def test_integer_products_are_recommended_only_where_they_are_faster(dit_folder, tmp_path, name, told):
    reporter = Heard()
    quantize_pipeline(dit_folder, config(bits=8, target=name), output=tmp_path / "out", reporter=reporter)
    assert any("same size, faster" in line for line in reporter.lines) == told


def test_a_preview_names_the_products_of_every_scheme(dit_folder):
    preview = preview_quantization(dit_folder, config(bits=8, act_bits=8, target="ada"), reporter=Heard())
    schemes = {name for component in preview.components.values() for name in component.schemes}
    assert preview.runs_as.keys() == schemes
    assert preview.runs_as["w8a8-offset"] == "int8 products"
