from __future__ import annotations

from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from dacc import SearchCacheConfig, search_cache
from dacc.cache.shifting import tell_of_shifting
from dacc.core.reporter import silent


def told(pipe: Any, **sizes: int) -> list[str]:
    reporter = silent()
    tell_of_shifting(pipe, SearchCacheConfig(**sizes), reporter)
    return reporter.notices


def test_a_size_that_moves_the_grid_is_told(flux_pipeline):
    pipe = flux_pipeline()
    assert told(pipe, height=32) == []  # its sigmas are the same at every size
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    (notice,) = told(pipe, height=32, width=48)
    assert "depend on the size (dynamic shifting): the plan is for height 32, width 48;" in notice
    assert "without corrections and fitted forecasts" in notice
    own = pipe.default_sample_size * pipe.vae_scale_factor
    assert told(pipe) == told(pipe, height=own, width=own) == []
    assert "for height 32;" in told(pipe, height=32, width=own)[0]


def test_frames_count_and_the_defaults_of_a_call_are_known():
    class Clips:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

        def __call__(self, height: int = 512, num_frames: int = 9) -> None: ...

    assert told(Clips(), height=512, num_frames=9) == []
    assert "for num_frames 5;" in told(Clips(), height=512, num_frames=5)[0]


@pytest.mark.parametrize(("method", "settings"), [("deepcache", {}), ("evolve", {"generations": 1, "population": 4})])
def test_a_search_tells_it_once(flux_pipeline, tmp_path, method, settings):
    pipe, reporter = flux_pipeline(), silent()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path / "flux")
    fields = {"steps": 4, "samples": 1, "measure": "never", "macs_ratio": 0.9, "method": method, "settings": settings}
    config = SearchCacheConfig(**fields, height=32, width=32)
    search_cache(tmp_path / "flux", config, output=tmp_path / "out", device="cpu", reporter=reporter)
    assert sum("dynamic shifting" in notice for notice in reporter.notices) == 1
