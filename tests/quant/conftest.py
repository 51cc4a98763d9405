"""Toy units, small calibration sets, and bundles of tiny pipelines beside the float network that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dacc.runtime.clock import RunState


def state_of(call: int, calls: int = 3) -> RunState:
    return RunState(1, call, calls, call, calls, timestep=900.0 - call, sigma=None)


@pytest.fixture
def state() -> Callable[..., RunState]:
    """Where a run of `calls` calls is: `state(call, calls=3)`."""
    return state_of


@pytest.fixture
def make_block() -> Callable[..., Any]:
    """Makes a unit of a toy network: `make_block(module, inputs, schemes)`.

    Each input is a tensor or a tuple of arguments. With `entering` the network before the unit is quantized already,
    and gives these in place of `inputs`. The calls of the grid take turns.
    """
    from dacc.quant.block import Block, Sighting, outputs_of
    from dacc.quant.plan import LayerPlan
    from dacc.quant.simulate import RoundedInputs
    from dacc.quant.walk import UnitInput

    def unit_input(x: Any) -> UnitInput:
        return UnitInput(x if isinstance(x, tuple) else (x,), {})

    def make(
        module: nn.Module, inputs: list, schemes: dict, *, entering: list | None = None, calls: int = 3, seed: int = 0
    ) -> Block:
        module = module.eval().requires_grad_(False)
        reference = copy.deepcopy(module)
        plans = tuple(
            LayerPlan(name, tuple(module.get_submodule(name).weight.shape), scheme) for name, scheme in schemes.items()
        )
        sightings = [
            Sighting(
                state_of(number % calls, calls),
                unit_input(given),
                outputs_of(reference(*unit_input(x).args)),
                unit_input(x),
            )
            for number, (x, given) in enumerate(zip(inputs, entering or inputs, strict=True))
        ]
        return Block("", module, plans, sightings, RoundedInputs(module, schemes), seed, reference)

    return make


@pytest.fixture
def residual_block() -> Callable[[], tuple[nn.Module, list]]:
    """A residual block of a UNet, and correlated inputs whose first 12 of 20 channels are much larger."""

    def make() -> tuple[nn.Module, list]:
        from diffusers.models.resnet import ResnetBlock2D

        torch.manual_seed(0)
        block = ResnetBlock2D(in_channels=20, out_channels=8, temb_channels=16, groups=4).eval()
        sizes = torch.cat([torch.full((12,), 8.0), torch.full((8,), 0.5)]).view(-1, 1, 1)
        mixing = torch.randn(20, 5)
        maps = [torch.einsum("ck,bkhw->bchw", mixing, torch.randn(2, 5, 6, 6)) * sizes for _ in range(9)]
        inputs = [(x * (1 + number / 4), torch.randn(2, 16)) for number, x in enumerate(maps)]
        return block.requires_grad_(False), inputs

    return make


@pytest.fixture(scope="session")
def calibration_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes small calibration sets, each once: `calibration_of(folder, "uniform")`."""
    root, made = tmp_path_factory.mktemp("sets"), {}

    def make(folder: Path, strategy: str = "uniform", *, steps: int = 3, samples: int = 4, batch_size: int = 2) -> Path:
        from dacc import CalibrateConfig, calibrate_pipeline

        key = (folder, strategy, steps, samples, batch_size)
        if key not in made:
            size = {"height": 32, "width": 32} if "sd" in folder.name else {}
            config = CalibrateConfig(strategy=strategy, samples=samples, steps=steps, batch_size=batch_size, **size)
            made[key] = calibrate_pipeline(folder, config, output=root / f"{folder.name}-{len(made)}")
        return made[key]

    return make


@dataclass
class Pass:
    """A bundle, and the network that computed as quantized while it was made."""

    bundle: Path
    calibration: Path
    model: nn.Module | None = None
    acts: dict[str, Any] = field(default_factory=dict)  # layer -> its fixed activation scales, or None
    blocks: list[Any] = field(default_factory=list)  # the units that were treated, in turn


@pytest.fixture(scope="session")
def quantize_watched(
    tmp_path_factory: pytest.TempPathFactory, calibration_of: Callable[..., Path]
) -> Callable[..., Pass]:
    """Runs a pass on a small set, `quantize_watched(folder, "tfmq", bits=4)`; each once, not to be changed."""
    root, made = tmp_path_factory.mktemp("watched"), {}

    def make(folder: Path, method: str, *, strategy: str | None = None, **fields: Any) -> Pass:
        from dacc import QuantizeConfig, quantize_pipeline
        from dacc.quant import calibrated, driver, treatment
        from dacc.quant.config import METHODS

        config = QuantizeConfig(method=method, measure="never", **fields)
        strategy = strategy or METHODS.fact(method, "CALIBRATION", "uniform")
        key = (folder, strategy, config.model_dump_json())
        if key in made:
            return made[key]
        done = Pass(root / str(len(made)), calibration_of(folder, strategy))
        layers: dict[int, Any] = {}
        quantize_units, rounding_of, treat = calibrated.quantize_units, treatment.rounding_of, calibrated._treat

        def watch_model(asked: Any, model: nn.Module, *arguments: Any) -> Any:
            done.model = model
            return quantize_units(asked, model, *arguments)

        def watch_acts(scheme: Any, layer: nn.Module, acts: Any) -> Any:
            layers[id(layer)] = acts
            return rounding_of(scheme, layer, acts)

        def watch_blocks(asked: Any, block: Any, chosen: Any) -> Any:
            done.blocks.append(block)
            return treat(asked, block, chosen)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "quantize_units", watch_model)
            patch.setattr(treatment, "rounding_of", watch_acts)
            patch.setattr(calibrated, "_treat", watch_blocks)
            quantize_pipeline(folder, config, calib=done.calibration, output=done.bundle, device="cpu")
        if done.model is not None:
            names = {id(module): name for name, module in done.model.named_modules()}
            done.acts = {names[number]: acts for number, acts in layers.items() if number in names}
        made[key] = done
        return done

    return make


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """The files that the manifest of a bundle names, as bytes."""
    from dacc.core.manifest import read_manifest

    def read(bundle: Path) -> dict[str, bytes]:
        manifest = read_manifest(bundle)
        assert manifest is not None
        return {name: (bundle / name).read_bytes() for name in manifest.files}

    return read


@pytest.fixture
def simulation_gap() -> Callable[..., float]:
    """How far a loaded network is from the one that simulated it, layer by layer on equal inputs; the largest share.

    What stays float is stored in 16 bits: it is taken from the simulated network here, so that nothing but the layers
    counts.
    """
    from dacc.calibrate.store import open_calibration
    from dacc.runtime.clock import fixed_run

    def watch(done: Pass, call: Any) -> dict[str, list]:
        """What enters every treated layer, unrounded, and what it gives."""
        seen: dict[str, list] = {}
        hooks = []
        for name in done.acts:
            layer = done.model.get_submodule(name)
            hooks.append(
                layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: [args[0]]}), prepend=True)
            )
            hooks.append(layer.register_forward_hook(lambda _, args, output, name=name: seen[name].append(output)))
        call.replay(done.model)
        for hook in hooks:
            hook.remove()
        return seen

    @torch.no_grad()
    def largest(done: Pass, model: nn.Module) -> float:
        kept = done.model.state_dict()
        for name, parameter in model.named_parameters():
            if name in kept and parameter.is_floating_point():
                parameter.copy_(kept[name])
        gaps = []
        for call in list(open_calibration(done.calibration))[::2]:
            with fixed_run(call.state):
                for name, (x, output) in watch(done, call).items():
                    gaps.append(float((model.get_submodule(name)(x) - output).norm() / output.norm()))
        assert len(gaps) > 20
        return max(gaps)

    return largest
