"""The study goes on where it stopped, says what is missing, and makes its tables from the JSON alone."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from dacc.benchmarks import ptq_study
from dacc.benchmarks.peers import PEERS, peer_layers, summarize
from dacc.benchmarks.ptq_bench import Bench
from dacc.benchmarks.ptq_cells import Cell, Study
from dacc.benchmarks.ptq_child import exact_products
from dacc.benchmarks.ptq_measure import Seen, fid, fid_ratio, part
from dacc.benchmarks.ptq_rows import LINEAR_GLOBS, PIPELINES, ROWS, SETTINGS, TEMPORAL_GLOBS, Row, row_options
from dacc.benchmarks.ptq_summary import summary_block
from dacc.benchmarks.ptq_table import pipeline_block, write_tables
from dacc.benchmarks.study import is_finished, read_study, record_cell, write_study
from dacc.core.config import build_config
from dacc.core.families import find_family
from dacc.core.manifest import read_manifest
from dacc.core.pipeline import denoiser_names, walk_layers
from dacc.core.reporter import silent
from dacc.core.zoo import zoo_entry
from dacc.evaluate.judge import load_judge
from dacc.evaluate.result import Metric
from dacc.quant.api import quantize_pipeline
from dacc.quant.config import METHODS, QuantizeConfig
from dacc.quant.driver import traits_of
from dacc.quant.plan import plan_layers
from dacc.runtime.compare import Samples, relative_l2
from dacc.runtime.kernels_exact import exact_product
from dacc.runtime.request import RunRequest
from dacc.runtime.skeleton import build_skeleton
from dacc.runtime.trajectory import sample

RECORD = Path(ptq_study.__file__).with_suffix(".json")
PACKAGES = {"quanto": "optimum.quanto", "bitsandbytes": "bitsandbytes", "torchao": "torchao", "sdnq": "sdnq"}


def cell(row, setting="W4A16", error=0.1, size=0.15, **facts):
    metrics = {"relative_l2": Metric(value=error, low=error / 2, high=error * 2, count=4, better="lower")}
    given = {"pipeline": "digits-unet", "fingerprint": "a", "metrics": metrics, "seeds": 4, "steps": 3}
    given["bytes_per_float32"] = size
    return Cell(setting=setting, row=row, **(given | facts))


@pytest.fixture
def bench(tmp_path):
    options = argparse.Namespace(
        seeds=2, fid_samples=0, steps=2, batch_size=2, threads=1, again=False, only_missing=False,
        work=tmp_path / "work", json=tmp_path / "study.json", peers=tmp_path / "peers", results=tmp_path / "results.md",
    )  # fmt: skip
    made = Bench("digits-unet", options, silent())
    made.__dict__.update(reference=seen(0.5), judge=None)
    return made


def seen(value):
    return Seen(Samples(torch.full((2, 1, 16, 16), value), torch.full((2, 1, 16, 16), value)), None)


def test_the_committed_record_can_be_read():
    assert {one.pipeline for one in read_study(RECORD, Study).cells} <= set(PIPELINES)


def test_a_study_is_read_as_it_was_written(tmp_path):
    study = Study().with_cell(cell("rtn")).with_cell(cell("gptq", options={"layer_bits": [["a", 4]]}))
    write_study(tmp_path / "study.json", study)
    assert read_study(tmp_path / "study.json", Study) == study
    assert [file.name for file in tmp_path.iterdir()] == ["study.json"]


def test_a_cell_takes_the_place_of_the_one_before():
    study = Study().with_cell(cell("rtn")).with_cell(cell("rtn", error=0.2))
    assert [one.metrics["relative_l2"].value for one in study.cells] == [0.2]


def test_what_is_finished():
    done = cell("rtn", fid_samples=100)
    assert is_finished(done, "a", 100)
    assert is_finished(done, "a", 0)
    assert not is_finished(done, "a", 2000)
    assert not is_finished(done, "other options", 0)
    assert not is_finished(cell("rtn", status="failed: no"), "a", 0)
    assert is_finished(cell("rtn", status="failed: no"), "other options", 2000, only_missing=True)
    assert not is_finished(None, "a", 0, only_missing=True)


def test_a_measured_cell_is_not_measured_again(bench, monkeypatch):
    runs = []
    monkeypatch.setattr(ptq_study, "treat", lambda *_: (runs.append(1), ({"bytes_per_float32": 0.1}, seen(0.25)))[1])
    for _ in range(2):
        ptq_study._fill(bench, "W4A16", "rtn (defaults)")
    (found,) = read_study(bench.options.json, Study).cells
    assert len(runs) == 1
    assert found.metrics["relative_l2"].value == pytest.approx(0.5)
    assert found.options == {"bits": 4, "method": "rtn"}
    bench.options.again = True
    ptq_study._fill(bench, "W4A16", "rtn (defaults)")
    assert len(runs) == 2


def test_an_unknown_method_and_a_peer_that_is_not_installed_are_missing(bench, monkeypatch):
    monkeypatch.setitem(ROWS, "future", Row({"method": "not-written"}))
    monkeypatch.setattr(ptq_study, "distributions", lambda **_: iter(()))
    monkeypatch.setattr(ptq_study, "treat", lambda *_: pytest.fail("it was run"))
    ptq_study._fill(bench, "W4A16", "future")
    ptq_study._fill(bench, "W4A16", "quanto")
    assert read_study(bench.options.json, Study).cells == ()


def test_what_breaks_is_recorded_and_a_measured_cell_outlives_it(bench, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(ptq_study, "treat", broken)
    ptq_study._fill(bench, "W4A16", "rtn (defaults)")
    assert "no kernel" in read_study(bench.options.json, Study).cells[0].status
    monkeypatch.setattr(ptq_study, "treat", lambda *_: ({}, seen(0.25)))
    ptq_study._fill(bench, "W4A16", "rtn (defaults)")
    bench.options.fid_samples = 10  # what is to be added now fails
    monkeypatch.setattr(ptq_study, "treat", broken)
    ptq_study._fill(bench, "W4A16", "rtn (defaults)")
    assert read_study(bench.options.json, Study).cells[0].measured


def test_images_that_are_no_numbers_are_a_failure(bench, monkeypatch):
    monkeypatch.setattr(ptq_study, "treat", lambda *_: ({}, seen(float("nan"))))
    ptq_study._fill(bench, "W4A16", "rtn (defaults)")
    assert read_study(bench.options.json, Study).cells[0].status == "failed: it gives NaN or infinity"


def test_rows_at_one_granularity_hold_temporal_layers_at_the_asked_bits():
    options = row_options("digits-unet", "W4A8", "gptq")
    assert options["layer_bits"] == [["time_embedding.*", 4], ["*.time_emb_proj", 4]]
    assert options["act_mode"] == "static"
    assert "act_mode" not in row_options("digits-unet", "W4A16", "gptq")
    assert "layer_bits" not in row_options("digits-unet", "W4A8", "gptq", temporal_by_itself=True)
    assert set(TEMPORAL_GLOBS) == set(PIPELINES)
    assert all(set(row.settings) <= set(SETTINGS) for row in ROWS.values())


def test_a_later_part_of_a_request_keeps_its_labels():
    request = RunRequest(seeds=tuple(range(10)), class_labels=(0, 1, 2))
    assert part(request, 4, 6).seeds == (4, 5)
    assert part(request, 4, 6).class_labels == (1, 2, 0)


def test_the_interval_of_fid_lies_about_its_value():
    judge = load_judge(zoo_entry("digits-unet"))
    found = fid(torch.randn(60, len(judge.mean), generator=torch.Generator().manual_seed(0)), judge, resamples=8)
    assert found.low < found.value < found.high


def test_fid_notes_how_wide_the_features_lie():
    judge = load_judge(zoo_entry("digits-unet"))
    features = torch.randn(60, len(judge.mean), generator=torch.Generator().manual_seed(0))
    spread = features.var(0).sum() / judge.covariance.trace()
    assert fid(features, judge, resamples=2).note.endswith(f" {spread:.3f} times that of real ones")
    assert fid(2 * features, judge, resamples=2).note.endswith(f" {4 * spread:.3f} times that of real ones")


def test_the_ratio_of_two_fids_is_known_better_than_either():
    judge = load_judge(zoo_entry("digits-unet"))
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(60, len(judge.mean), generator=generator)
    features = reference + 0.01 * torch.randn(reference.shape, generator=generator)
    ratio, alone = fid_ratio(features, reference, judge, resamples=20), fid(features, judge, resamples=20)
    assert ratio.value == pytest.approx(alone.value / fid(reference, judge, resamples=2).value)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.high - ratio.low < 0.2 * (alone.high - alone.low) / alone.value
    assert fid_ratio(reference, reference, judge, resamples=3).high == 1


def test_two_studies_may_write_to_one_record(tmp_path):
    file = tmp_path / "study.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: record_cell(file, cell(f"row {number}"), Study), range(24)))
    assert len(read_study(file, Study).cells) == 24


def test_a_row_of_linears_is_there_where_convolutions_are_too():
    row = ROWS["gptq (linears)"]
    assert row.is_for("digits-unet", "W8A8")
    assert not row.is_for("digits-dit", "W8A8")
    assert not row.is_for("digits-unet", "W4A4")
    options = row_options("digits-unet", "W8A8", "gptq (linears)")
    assert "*.to_q" in options["include"]
    assert "include" not in row_options("digits-unet", "W8A8", "gptq (defaults)")


def test_rows_of_svdquant_are_every_combination_and_can_be_asked_for():
    swept = {name: row for name, row in ROWS.items() if row.swept and row.options["method"] == "svdquant"}
    seen = set()
    for name, row in swept.items():
        assert row.settings == ("W8A8", "W4A8", "W4A4")
        config = build_config(QuantizeConfig, **row_options("digits-dit", "W4A4", name)).resolved()
        fields = build_config(METHODS.load("svdquant").CONFIG, **config.settings)
        seen.add((fields.rank, fields.gptq, fields.joint, fields.data_free))
        assert config.needs_calibration != fields.data_free
    combined = {(rank, gptq, joint, False) for rank in (4, 8, 16, "auto") for gptq in (1, 0) for joint in (1, 0)}
    combined |= {(0, gptq, True, False) for gptq in (1, 0)}
    assert seen == combined | {("auto", True, True, True)}
    assert len(swept) == len(seen)


def test_sweeps_are_measured_when_they_are_named(bench):
    options = argparse.Namespace(row=None, setting=["W4A4"])
    assert not [row for _, row in ptq_study._wanted("digits-dit", options) if "svdquant" in row]
    options.row = ["svdquant (rank 8)"]
    assert list(ptq_study._wanted("digits-dit", options)) == [("W4A4", "svdquant (rank 8)")]


def test_bytes_of_a_row_hold_its_branches(dit_folder, tmp_path):
    sizes = {}
    for rank in (0, 8):
        config = QuantizeConfig(
            method="svdquant", act_bits=4, measure="never", settings={"rank": rank, "data_free": True, "refinements": 0}
        )
        record = read_manifest(quantize_pipeline(dit_folder, config, output=tmp_path / str(rank))).components
        sizes[rank] = record["transformer"]
    branches = sum(
        2 * 8 * sum(module.shape)
        for module in sizes[8].quantization.modules.values()
        if module.scheme and "-r8" in module.scheme
    )
    assert branches > 0
    assert sizes[8].bytes_after >= sizes[0].bytes_after + branches / 2


def test_a_row_spares_what_efficientdm_spares():
    (skeleton,) = [build_skeleton(zoo_entry("digits-unet").path / "unet")]
    family = find_family("UNet2DModel")[0]
    plans = []
    for name in ("rtn (spared)", "efficientdm"):
        config = build_config(QuantizeConfig, **row_options("digits-unet", "W4A4", name)).resolved()
        method = METHODS.load(config.method)
        traits = traits_of(method, build_config(method.CONFIG, **config.settings), config)
        found = plan_layers(skeleton, family, config, traits)
        plans.append({plan.name: (plan.scheme.bits, plan.scheme.act_bits) for plan in found if plan.scheme})
    assert plans[0] == plans[1]
    assert (8, 8) in plans[0].values()
    assert not ROWS["rtn (spared)"].is_for("digits-dit", "W4A4")


@pytest.mark.parametrize("name", LINEAR_GLOBS)
def test_the_linears_are_those_of_the_network(name):
    (skeleton,) = [build_skeleton(zoo_entry(name).path / part) for part in denoiser_names(zoo_entry(name).path)]
    family = find_family(type(skeleton).__name__)[0]
    linears = {layer for layer, module in walk_layers(skeleton) if isinstance(module, nn.Linear)}
    found = {layer for layer in linears if any(fnmatchcase(layer, glob) for glob in LINEAR_GLOBS[name])}
    others = {layer for layer, _ in walk_layers(skeleton)} - linears
    assert found == {layer for layer in linears if family.role(layer) != "edge"}
    assert not [layer for layer in others if any(fnmatchcase(layer, glob) for glob in LINEAR_GLOBS[name])]


def test_the_table_says_what_was_measured_and_what_was_not():
    study = Study()
    peer = {"peer": True, "weight_share": 0.5, "input_share": 0.25, "notice": "linear layers only"}
    cells = [
        cell("rtn", error=0.2, layers="x"),
        cell("gptq", error=0.05, size=0.2, layers="y"),
        cell("quanto", error=0.1, options={"format": "qint4", "package": "optimum-quanto 1"}, **peer),
        cell("sdnq", "W4A8", error=0.1, options={"format": "uint4", "package": "sdnq 1"}, **peer),
        cell("torchao", "W4A8", status="cannot run: no kernel", metrics={}, peer=True),
    ]
    for one in cells:
        study = study.with_cell(one)
    text = pipeline_block(study, "digits-unet", "guidance none")
    assert text.startswith("4 images against the float pipeline's from the same noise, 3 steps; guidance none.")
    assert "| W4A16 | gptq | 0.200 | 0.05 [0.025, 0.1] |" in text
    assert "| W4A16 | quanto qint4 (peer; weights 0.500) |" in text
    assert "| W4A8 | sdnq uint4 (peer; weights 0.500, inputs 0.250) |" in text
    assert "cannot run: no kernel" in text
    assert "tfmq, efficientdm, rtn (defaults)" in text
    assert "0.50 times the peer's, bytes larger; of those no larger: rtn at relative L2 0.2" in text
    assert "W4A16: gptq quantized other layers, or at other bits, than rtn." in text
    assert "- optimum-quanto 1 (W4A16): linear layers only." in text
    assert "W4A4: none of these peers" in text


def test_the_summary_shows_defaults_and_the_best_peers():
    peer = {"peer": True, "input_share": 0.0}
    study = Study()
    for one in (
        cell("gptq (defaults)", error=0.05, size=0.14),
        cell("torchao", error=0.01, size=0.4, weight_share=0.1, **peer),
        cell("quanto", error=0.3, size=0.13, weight_share=0.995, **peer),
        cell("quanto (temporal float)", error=0.1, size=0.16, weight_share=0.9, **peer),
        cell("sdnq", error=0.2, size=0.15, weight_share=0.99, **peer),
        cell("bitsandbytes", status="cannot run: no kernel", metrics={}, peer=True),
    ):
        study = study.with_cell(one)
    lines = summary_block(study, PIPELINES[:2]).splitlines()
    assert lines[0] == "| | digits-unet | digits-dit |"
    assert "| `--bits 4` | - | - |" in lines
    assert "| `--bits 4 --method gptq` | 0.05 (0.140) | - |" in lines
    assert "| W4A16, best peer | 0.01 torchao (0.400) | - |" in lines
    assert "| W4A16, best peer of that size | 0.2 sdnq (0.150) | - |" in lines
    assert len(lines) == 2 + 4 * 4


def test_only_pipelines_with_cells_are_written(tmp_path):
    file = tmp_path / "results.md"
    marks = {name: f"<!-- ptq:{name} -->\nold {name}\n<!-- /ptq:{name} -->" for name in PIPELINES}
    file.write_text("head\n" + "\n".join(marks.values()) + "\ntail\n")
    assert write_tables(file, Study().with_cell(cell("rtn")), PIPELINES, {}) == ["digits-unet"]
    text = file.read_text()
    assert "old digits-unet" not in text
    assert all(marks[name] in text for name in PIPELINES[1:])
    assert text.startswith("head\n")
    assert text.endswith("\ntail\n")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting"), [(name, one) for name in PACKAGES for one in ("W8A16", "W8A8", "W4A16")])
def test_a_peer_treats_the_layers_and_says_how_far(name, setting, unet_pipeline):
    pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed: see benchmarks/peers.py")
    if (name, setting) == ("quanto", "W4A16"):
        pytest.skip("quanto builds a C++ extension for its 4-bit weights at the first call, which takes a minute")
    pipe = unet_pipeline()
    shapes = {key: tuple(value.shape) for key, value in pipe.unet.named_parameters()}
    layers, request = peer_layers(pipe.unet), RunRequest(seeds=(1, 2), num_inference_steps=2)
    assert not {"conv_in", "conv_out"} & set(layers)
    reference = sample(pipe, request)
    treated = PEERS[name].quantize_(pipe.unet, layers, setting, lambda: sample(pipe, request))
    facts = summarize(pipe.unet, shapes, treated)
    error = relative_l2(reference.latents, sample(pipe, request).latents).mean()
    assert 0 < error < 0.5
    assert set(treated.weight_bytes) <= set(layers)
    assert (facts["input_share"] > 0) == (setting == "W8A8")
    assert facts["bytes_per_float32"] < 0.5


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_peer_gets_the_same_integers_on_a_cpu_without_int8_instructions(monkeypatch):
    monkeypatch.setattr("dacc.runtime.kernels_exact.has_int8_products", lambda: False)
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (33, 3000), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (3000, 24), generator=generator, dtype=torch.int8)
    its_own = torch._int_mm(a, b)
    taken = Mock(wraps=exact_product)
    monkeypatch.setattr("dacc.runtime.kernels_exact.exact_product", taken)
    library = exact_products()
    try:
        assert torch.equal(torch._int_mm(a, b), its_own)
        taken.assert_called_once()
    finally:
        library._destroy()
    assert torch.equal(torch._int_mm(a, b), its_own)
    taken.assert_called_once()


def test_temporal_layers_can_be_spared(unet_pipeline):
    family, _ = find_family("UNet2DModel")
    unet = unet_pipeline().unet
    spared = set(peer_layers(unet)) - set(peer_layers(unet, temporal=False))
    assert spared
    assert {family.role(name) for name in spared} == {"temporal"}
    assert not PEERS["sdnq (temporal float)"].temporal
    assert set(PEERS["sdnq (temporal float)"].formats) == {"W4A16", "W4A8"}
