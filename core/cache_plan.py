"""A cache plan: which part of a denoiser is computed and which one reused at every call of a run. Nothing here imports
torch; `runtime/plan.py` checks a plan against a model and a grid, `runtime/cached.py` runs it.

Letters: C calls, the denoiser slots of a run (evaluations of several guidance branches share a slot).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .config import Config
from .schedule_id import ScheduleId, StepRule

PLAN_FORMAT = 1
CORRECTION_NAME: Final = "dacc_cache.safetensors"  # beside the weights of the component, and none of them
ECAD_FILE: Final = "dacc_ecad_{}.json"  # a plan as a schedule file of ECAD, by component
FRONT_FILES: Final = ("dacc_front_{}.json", "dacc_front_{}.png")  # of a search for many plans
COMPUTE, REUSE, FORECAST, GATE = "C", "R", "F", "G"  # the codes of a call
SKIPPING = frozenset({REUSE, FORECAST})  # those of a call that does not run the unit
# field -> values with which it is not written
MOST_NOISE = 0.1
_LATER: Final[dict[str, tuple[Any, ...]]] = {"decode_ahead": (1,), "prior_noise": (0,), "layers": ((), [])}
Abscissa = Literal["call", "sigma", "timestep"]


class UnetCut(Config):
    """All of a UNet that lies deeper than one skip connection; what enters the up layer that reads it is kept.

    Skips are numbered in groups, one for each down block: layer 0 of a group is what enters the block, layer n the
    output of its n-th residual layer.
    """

    kind: Literal["unet_cut"] = "unet_cut"
    id: str = Field(min_length=1)
    block: int = Field(ge=0)
    layer: int = Field(ge=0)


class UnetEncoder(Config):
    """First convolution, down blocks and middle of a UNet; all that they hand to the up blocks is kept."""

    kind: Literal["unet_encoder"] = "unet_encoder"
    id: str = Field(min_length=1)


class UnetBody(Config):
    """All of a UNet but its time embedding and what stands behind its last up block, whose output is kept."""

    kind: Literal["unet_body"] = "unet_body"
    id: str = Field(min_length=1)


class DenoiserOutput(Config):
    """All of a denoiser; what it returns is kept, so that a call which skips it computes nothing."""

    kind: Literal["output"] = "output"
    id: str = Field(min_length=1)


class ModuleUnit(Config):
    """One submodule; its output is kept."""

    kind: Literal["module"] = "module"
    id: str = Field(min_length=1)
    path: str = Field(min_length=1)  # dotted name inside the denoiser


class BlockRange(Config):
    """The blocks first ... end - 1 of a transformer, counted through its stacks one after the other."""

    kind: Literal["block_range"] = "block_range"
    id: str = Field(min_length=1)
    stacks: tuple[str, ...] = Field(min_length=1)  # names of the lists of blocks, in the order in which they run
    first: int = Field(ge=0)
    end: int = Field(ge=1)  # the first block behind the range
    store: Literal["residual", "output"] = "residual"  # what the range adds to what enters it, or what leaves it

    @model_validator(mode="after")
    def _check(self) -> BlockRange:
        if self.end <= self.first:
            raise ValueError(f"blocks {self.first} to {self.end} are none")
        return self


Unit = Annotated[
    UnetCut | UnetEncoder | UnetBody | DenoiserOutput | ModuleUnit | BlockRange, Field(discriminator="kind")
]


class Predictor(Config):
    """How a unit's value is forecast: by a polynomial in x through what the last `order` + 1 computed calls gave."""

    kind: Literal["taylor"] = "taylor"
    order: int = Field(1, ge=1)  # larger: follows bends, and carries noise further; while fewer are there: the most
    form: Literal["newton", "published"] = "newton"  # exact for polynomials; or the recurrence of TaylorSeer, which is
    # exact for straight lines only
    x: Abscissa = "call"  # what the polynomial runs over


class Gate(Config):
    """When a range of blocks that asks is skipped: while the block before it gives nearly what it gave at the last call
    that computed the range, or nearly its forecast from such calls."""

    # what is compared: what that block adds, as it was; or what it gives, with its forecast
    signal: Literal["residual", "forecast"] = "residual"
    order: int = Field(1, ge=1)  # of that forecast
    threshold: float = Field(ge=0)  # mean of the change over mean of the value, see runtime/gate.py; larger: skips more
    max_consecutive: int | None = Field(None, ge=1)  # skipped calls in a row; None: any number


class UnitMacs(Config):
    """Multiply-accumulates of one call for one sample, all its guidance branches together."""

    full: int = Field(ge=0)  # of a call that computes everything
    units: dict[str, int]  # unit -> what a call saves that skips it alone


def _said(written: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in written.items() if key not in _LATER or value not in _LATER[key]}


class CorrectionId(Config):
    """Tables in a file of the component's folder by which reused values are corrected, one affine map for each denoiser
    call and channel."""

    file: Literal["dacc_cache.safetensors"] = CORRECTION_NAME
    sha256: str  # of names, types, shapes and values of its tensors
    layers: tuple[str, ...] = ()  # dotted names of quantized layers behind the unit whose outputs are corrected too

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As `CachePlan` is written."""
        return _said(write(self))


class CachePlan(Config):
    """One plan for one denoiser on one grid. A unit inside a skipped one is not evaluated and keeps its own value."""

    format: int = PLAN_FORMAT
    class_name: str  # of the denoiser
    config_sha256: str  # of its config
    weights: str  # hash of the weight files that it was searched on
    schedule: ScheduleId
    rule: StepRule = "nearest"  # on another grid: refuse, or follow the noise levels
    min_calls: int = Field(8, ge=1)  # another grid of fewer calls runs without the plan
    units: tuple[Unit, ...] = Field(min_length=1)
    codes: dict[str, str]  # unit -> one code per call: C compute, R reuse, F forecast, G ask the gate
    # unit -> how, for units that are forecast; where the gate says so too
    predict: dict[str, Predictor] = Field(default_factory=dict)
    gates: dict[str, Gate] = Field(default_factory=dict)  # unit -> when it is skipped, for units that ask
    macs: UnitMacs
    correction: CorrectionId | None = None  # what is done to reused values on the plan's own grid
    # calls in a row that reuse the encoder of a UNet and run as one batch; larger: fewer batches, more memory
    decode_ahead: int = Field(1, ge=1)
    # of the first sample, added before every step in the later half; more: more detail, less like the run without
    prior_noise: float = Field(0, ge=0, le=MOST_NOISE)

    @model_validator(mode="after")
    def _check(self) -> CachePlan:
        names = [unit.id for unit in self.units]
        if len(set(names)) != len(names):
            raise ValueError("two units have the same id")
        for what, given in (("codes", self.codes), ("macs.units", self.macs.units)):
            if set(given) != set(names):
                raise ValueError(f"{what} are of {sorted(given)}, the units are {sorted(names)}")
        for name, codes in self.codes.items():
            if len(codes) != self.calls:
                raise ValueError(f"unit {name!r} has codes for {len(codes)} calls, the grid has {self.calls}")
            if unknown := set(codes) - SKIPPING - {COMPUTE, GATE}:
                raise ValueError(f"unit {name!r} has codes that are not known: {', '.join(sorted(unknown))}")
            if codes[0] != COMPUTE:
                raise ValueError(f"unit {name!r} reuses at the first call, when there is nothing to reuse")
            if FORECAST in codes and name not in self.predict:
                raise ValueError(f"unit {name!r} is forecast, and nothing says how")
            if GATE in codes and name not in self.gates:
                raise ValueError(f"unit {name!r} asks a gate, and there is none")
        for what, fields in (("predict", self.predict), ("gates", self.gates)):
            if strange := set(fields) - set(names):
                raise ValueError(f"{what} is of {sorted(strange)}, the units are {sorted(names)}")
        unit = self.units[0]
        if self.gates and (len(names) > 1 or not isinstance(unit, BlockRange) or unit.first < 1):
            raise ValueError("a gate is for a plan of one unit, a range of blocks with a block before it")
        if self.decode_ahead > 1 and (len(names) > 1 or not isinstance(unit, UnetEncoder)):
            raise ValueError("several calls are decoded at once by a plan of one unit, the encoder of a UNet")
        if self.correction and self.correction.layers and (len(names) > 1 or not isinstance(unit, UnetCut)):
            raise ValueError("layers behind a unit are corrected by a plan of one unit, a cut of a UNet")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the fields that came later, where they say nothing: so older plans keep their hash."""
        return _said(write(self))

    @property
    def calls(self) -> int:
        """C."""
        return len(self.schedule.timesteps)

    def sha256(self) -> str:
        """Hash of the whole plan."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


class CacheRecord(Config):
    """The plan of a component in the manifest, and what it was found to do."""

    method: str
    plan: CachePlan
    plan_sha256: str  # tells that the plan was not edited
    macs_ratio: float  # multiply-accumulates of a run with the plan over those without, all denoiser calls, counted
    chosen: dict[str, int | float | str] = Field(default_factory=dict)  # what the search decided, e.g. computed calls

    @classmethod
    def of(cls, method: str, plan: CachePlan, macs_ratio: float, chosen: dict[str, int | float | str]) -> CacheRecord:
        """The record of a plan as it is."""
        return cls(method=method, plan=plan, plan_sha256=plan.sha256(), macs_ratio=macs_ratio, chosen=chosen)


def beside_plan(component: str) -> list[str]:
    """Files of a bundle that belong to a plan, whether they are there or not."""
    patterns = (*FRONT_FILES, ECAD_FILE)
    return [f"{component}/{CORRECTION_NAME}", *(pattern.format(component) for pattern in patterns)]
