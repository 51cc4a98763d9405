"""What was asked for in time is measured, and what could not be looked at is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dacc import SearchCacheConfig, search_cache
from dacc.cache import measuring
from dacc.cache.profile import CallCost, told
from dacc.core.errors import UnsupportedError
from dacc.core.reporter import silent
from dacc.runtime.request import RunRequest

QUICK = {"steps": 4, "samples": 1, "method": "deepcache"}


def search(source: Path, **fields: Any) -> list[str]:
    """The notices of a search."""
    options = {name: fields.pop(name) for name in ("reference",) if name in fields}
    reporter = silent()
    config = SearchCacheConfig(**{**QUICK, **fields})
    search_cache(source, config, output="out", overwrite=True, device="cpu", reporter=reporter, **options)
    return reporter.notices


@pytest.fixture(autouse=True)
def call_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls take does not depend on the machine."""
    monkeypatch.setattr(
        "dacc.cache.scene.time_calls",
        lambda denoiser, units, *_: CallCost(unit=told(units), full_seconds=1.0, partial_seconds=0.3),
    )


def times(monkeypatch: pytest.MonkeyPatch, *, full: float, cached: float) -> None:
    """Let loops take so many seconds."""
    loops = measuring.no_cache
    state = {"full": False}

    class Without:
        def __init__(self, pipe: Any) -> None:
            self._real = loops(pipe)

        def __enter__(self) -> None:
            self._real.__enter__()
            state["full"] = True

        def __exit__(self, *error: object) -> None:
            state["full"] = False
            self._real.__exit__(*error)

    monkeypatch.setattr(measuring, "no_cache", Without)
    monkeypatch.setattr(measuring, "loop_seconds", lambda *_: full if state["full"] else cached)


def test_a_speed_up_that_is_measured_short_of_the_promise_leaves_nothing(unet_folder, monkeypatch):
    times(monkeypatch, full=1.0, cached=0.72)
    with pytest.raises(UnsupportedError, match=r"speed-up of 1.5 was asked for and 1.39 measured.*--macs-ratio"):
        search(unet_folder, speedup=1.5)
    assert not Path("out").exists()
    times(monkeypatch, full=1.0, cached=0.70)  # 1.43 of 1.5
    search(unet_folder, speedup=1.5)
    assert Path("out").is_dir()


def test_a_promise_that_nobody_measured_is_told(unet_folder):
    unproven = "1.5 times as fast was not measured"
    assert any(unproven in notice for notice in search(unet_folder, speedup=1.5, measure="never"))
    assert not any("not measured" in notice for notice in search(unet_folder, macs_ratio=0.8, measure="never"))


def test_long_loops_are_timed_where_a_speed_up_was_promised_alone(unet_pipeline, monkeypatch):
    times(monkeypatch, full=8.0, cached=4.0)
    reporter, request = silent(), RunRequest(seeds=(1,), num_inference_steps=4)
    pipe = unet_pipeline()
    assert measuring.measure_speedup(pipe, request, reporter, needed=False) == (None, 8.0)
    assert [notice for notice in reporter.notices if "speed-up was not measured: it would take more" in notice]
    assert measuring.measure_speedup(pipe, request, reporter, needed=True) == (2.0, 8.0)
    times(monkeypatch, full=1.0, cached=0.5)
    assert measuring.measure_speedup(pipe, request, reporter, needed=False) == (2.0, 1.0)


def test_who_looks_at_no_float_pipeline_says_so(unet_folder, bundle_of, tmp_path):
    shutil.copytree(bundle_of(unet_folder, bits=8), tmp_path / "quantized")
    few = {"macs_ratio": 0.8, "measure": "never"}
    unused = "--reference is not used"
    notices = search(tmp_path / "quantized", **few, reference=unet_folder)
    assert any(f"method deepcache compares with no float pipeline here: {unused}" in one for one in notices)
    notices = search(tmp_path / "quantized", **few, reference=unet_folder, method="dp", settings={"trials": 0})
    assert not any(unused in one for one in notices)
    small = {"method": "evolve", "settings": {"generations": 1, "population": 4}, "unit": "cut:0.0,module:mid_block"}
    alone = "evolve compares unet with the quantized network itself"
    assert any(alone in one for one in search(tmp_path / "quantized", **{**few, **small}))
    assert not any(alone in one for one in search(unet_folder, **{**few, **small}))
