"""Other people's caches on the same pipelines, in memory: what our rows of `cache_study.py` stand beside.

    pip install -c constraints.txt --no-deps --target .work/cache-peers DeepCache cache-dit

They live in a folder of their own, since they need more than they declare or declare more than they need. A peer is
switched on by one function with one signature, at one of the strengths that it offers; of these the weakest is measured
whose runs cost no more than the target. Peers are imported inside the functions: none is needed for our own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.pipeline import denoisers
from dacc.runtime.macs import count_macs, counting_calls
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

Switch = Callable[[Any, Any], None]  # pipeline, strength

INTERVALS = tuple(range(2, 26))
THRESHOLDS = tuple(round(0.01 * 1.15**number, 5) for number in range(40))  # to 2.3
WARMUP = 3  # computed calls at the start, where a peer asks for them; the default of diffusers' TaylorSeer


@dataclass(frozen=True)
class CachePeer:
    """One row: what switches it on, and its strengths from the weakest on."""

    package: str
    switch_on_: Switch
    strengths: tuple[Any, ...]


@dataclass(frozen=True)
class Fitted:
    """The strength that meets a target."""

    strength: Any
    macs_ratio: float


def fit_strength(make: Callable[[], Any], peer: CachePeer, request: RunRequest, target: float) -> Fitted:
    """The weakest strength whose runs cost no more than the target; the stronger, the cheaper they are taken to be.

    Args:
        make: a pipeline without any cache.
        request: the runs that are counted.
        target: of multiply-accumulates, 1 for runs without cache.

    Raises:
        ConfigError: the package is not installed.
        UnsupportedError: even the strongest costs more.
    """
    if find_spec(peer.package) is None:
        raise ConfigError(f"{peer.package} is not installed.", mend="See benchmarks/cache_peers.py.")
    plain = make()
    everything = count_macs(lambda: sample(plain, request))
    (denoiser,) = denoisers(plain).values()
    with counting_calls(denoiser) as total:
        sample(plain, request)
    full, beside = total.macs, everything - total.macs  # what else a run computes costs the same with a cache

    def cost(strength: Any) -> float:
        pipe = make()
        peer.switch_on_(pipe, strength)
        return (count_macs(lambda: sample(pipe, request)) - beside) / full

    low, high, found = 0, len(peer.strengths), None
    while low < high:
        middle = (low + high) // 2
        ratio = cost(peer.strengths[middle])
        if ratio <= target:
            high, found = middle, Fitted(peer.strengths[middle], ratio)
        else:
            low = middle + 1
    if found is None:
        raise UnsupportedError(f"even {peer.strengths[-1]} costs more than {target:.3f} of the MACs.")
    return found


def _deepcache_(pipe: Any, strength: Any) -> None:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=strength, cache_branch_id=0)
    helper.enable()


def _first_block_(pipe: Any, strength: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=strength))


def _taylorseer_(pipe: Any, strength: Any, *, lite: bool = False) -> None:
    """Factors in float32: its default of bfloat16 is for models of that type."""
    from diffusers.hooks import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=strength,
        disable_cache_before_step=WARMUP,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=lite,
    )
    pipe.transformer.enable_cache(config)


def _taylorseer_lite_(pipe: Any, strength: Any) -> None:
    _taylorseer_(pipe, strength, lite=True)


def _cache_dit_(pipe: Any, strength: Any, *, calibrator: Any | None = None) -> None:
    """One block decides, as its documentation advises for small models; its default of 8 is more than ours have."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=WARMUP, residual_diff_threshold=strength
    )
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)


def _cache_dit_taylorseer_(pipe: Any, strength: Any) -> None:
    import cache_dit

    _cache_dit_(pipe, strength, calibrator=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1))


PEERS: dict[str, CachePeer] = {
    "DeepCache (package)": CachePeer("DeepCache", _deepcache_, INTERVALS),
    "first-block cache (diffusers)": CachePeer("diffusers", _first_block_, THRESHOLDS),
    "TaylorSeer (diffusers)": CachePeer("diffusers", _taylorseer_, INTERVALS),
    "TaylorSeer, lite (diffusers)": CachePeer("diffusers", _taylorseer_lite_, INTERVALS),
    "DBCache (cache-dit)": CachePeer("cache_dit", _cache_dit_, THRESHOLDS),
    "DBCache, TaylorSeer (cache-dit)": CachePeer("cache_dit", _cache_dit_taylorseer_, THRESHOLDS),
}
