"""What a person is told of a quantization: what its products are on the target, sizes, and the damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..core.manifest import QuantizationRecord, read_manifest
from ..core.reporter import Reporter
from ..core.scheme import Scheme
from ..core.target import HERE, Target, execution_of, find_target
from .config import QuantizeConfig


def tell_of_target(config: QuantizeConfig, reporter: Reporter) -> None:
    """A notice, before any work, when a named target lacks the products that are asked for; of a resolved config."""
    if config.target == HERE:
        return
    target = find_target(config.target)
    execution = execution_of(_asked(config), target)
    if execution.lacks:
        reporter.notice(f"on {config.target} this runs as {execution.sentence}")


def target_of(config: QuantizeConfig, device: str) -> Target | None:
    """The named target, else the machine at hand; None when the table does not hold that."""
    if config.target != HERE:
        return find_target(config.target)
    from ..runtime.here import target_here
    from ..runtime.load import pick_device

    return target_here(pick_device(device))


def _asked(config: QuantizeConfig) -> Scheme:
    """Bits of the body of the network."""
    mode = "none" if config.act_bits == 16 else "dynamic"
    return Scheme(bits=config.bits, act_bits=config.act_bits, act_mode=mode)


def summarize(config: QuantizeConfig, folder: Path, components: Iterable[str], device: str, reporter: Reporter) -> None:
    """The closing lines on stderr: size, products, damage, and what another option would bring."""
    manifest = read_manifest(folder)
    assert manifest is not None
    target = target_of(config, device)
    for name in components:
        record = manifest.components[name]
        share = record.bytes_after / record.bytes_fp32
        reporter.say(
            f"{name}: {record.bytes_before / 1e6:.2f} MB -> {record.bytes_after / 1e6:.2f} MB "
            f"({share:.3f} of float32, {record.parameters / 1e6:.2f} M parameters)"
        )
        if target and record.quantization:
            _tell_of_products(name, record.quantization, config, target, reporter)
    reporter.say(f"difference to the float pipeline: {manifest.passes[-1].effect['pipeline'].told()}")
    if config.bits == 8 and config.act_bits == 16 and target and "int8" in target.products:
        reporter.say("--act-bits 8 would also run the products on 8-bit integers: same size, faster")


def _tell_of_products(
    component: str, record: QuantizationRecord, config: QuantizeConfig, target: Target, reporter: Reporter
) -> None:
    """How many layers run as what; and why, where no notice has told it before."""
    schemes = [record.schemes[module.scheme] for module in record.modules.values() if module.scheme]
    layers = Counter(execution_of(scheme, target).how for scheme in schemes)
    where = "here" if config.target == HERE else f"on {config.target}"
    for how, count in layers.items():
        reporter.say(f"{component}: {count} layers run {where} as {how}")
    execution = execution_of(_asked(config), target)
    if config.target == HERE and execution.lacks:
        reporter.say(f"{component}: {execution.lacks}. {execution.instead}")
