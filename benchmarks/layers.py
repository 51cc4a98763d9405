"""How fast the quantized layers are: `python benchmarks/layers.py --what dit [--float32] [--compile]`.

    svdquant the same blocks as dit: int8 linears beside those with smoothing factors and a branch of rank 32
    dit      8 transformer blocks of DiT-XL/2 width, batch 2, 256 tokens: int8 linears, int8 weights for modulation
    resnet   a ResnetBlock2D, 640 channels, 32x32, batch 2: int8 convolutions, int8 weights for the time projection
    w4       one linear with 4-bit weights, 256 to 2048 rows, packed and unpacked once

Random weights, two threads, no grad. All variants take turns, so a slow moment of the machine meets all of them alike;
what counts is the ratio of medians. `error` is the relative L2 distance to the float32 result."""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dacc.core.machine import describe_machine
from dacc.core.schedule_id import ScheduleId
from dacc.core.scheme import Scheme
from dacc.quant.low_rank import low_rank_factors
from dacc.quant.ranges import grid_of
from dacc.quant.smoothing import weight_factors
from dacc.runtime.activation import ActivationScale
from dacc.runtime.layers import QuantizedLayer, set_prefer_, set_step_table_, swap_layers_
from dacc.runtime.step_table import StepTable
from dacc.runtime.weight import QuantizedWeight, to_rows

Variants = dict[str, Callable[[], Tensor]]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

W8A8 = Scheme(bits=8, act_bits=8, act_mode="dynamic")
FIXED = {  # name of a variant -> scheme with fixed activation scales
    "int8 static": Scheme(bits=8, act_bits=8, act_mode="static"),
    "int8 per-step": Scheme(bits=8, act_bits=8, act_mode="per-step", act_steps=50),
    "w4a8 static": Scheme(bits=4, act_bits=8, act_mode="static"),
}
W8A8_BRANCH = W8A8.model_copy(update={"rank": 32, "smooth": True})
W8 = Scheme(bits=8)
W4 = Scheme(bits=4, group_size=64)
PRODUCTS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")  # of a block


class Blocks(nn.Module):
    """The transformer blocks of a DiT, without its ends."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                dim=1152,
                num_attention_heads=16,
                attention_head_dim=72,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1000,
                attention_bias=True,
                norm_type="ada_norm_zero",
                norm_elementwise_affine=False,
            )
            for _ in range(count)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden_states), dtype=torch.long)
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep=labels, class_labels=labels)
        return hidden_states


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Symmetric round to nearest, of what a low-rank branch leaves where the scheme has one."""
    rows = to_rows(weight.detach().float())
    if scheme.rank is not None:
        return with_branch(rows, scheme)
    groups = rows.view(len(rows), -1, scheme.group_size or rows.shape[1])  # (O, G, group_size)
    low, high = scheme.code_range
    scale = groups.abs().amax(-1, keepdim=True) / high
    codes = (groups / scale).round().clamp(low, high).view(rows.shape)
    return QuantizedWeight.from_codes(codes, scheme, tuple(weight.shape), scale=scale.squeeze(-1))


def with_branch(rows: Tensor, scheme: Scheme) -> QuantizedWeight:
    """(O, K) with smoothing factors that only look at it and its own low-rank branch."""
    assert scheme.rank is not None
    smoothing = weight_factors([rows])
    whole = rows * smoothing.float()
    up, down = low_rank_factors(whole, scheme.rank, seed=0, iterations=1)
    residual = quantize(whole - up.float() @ down.float(), scheme.plain)
    return replace(residual, scheme=scheme, smoothing=smoothing, low_rank_up=up, low_rank_down=down)


def quantized(
    model: nn.Module, schemes: dict[str, Scheme], ranges: dict[str, tuple[Tensor, Tensor]] | None = None
) -> nn.Module:
    """A copy of `model` with the named layers quantized.

    Args:
        ranges: lowest and highest value that enters each layer, for schemes with fixed activation scales.
    """
    model = copy.deepcopy(model)
    weights = {name: quantize(model.get_submodule(name).weight, scheme) for name, scheme in schemes.items()}
    swap_layers_(model, schemes)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        layer.store_weight(weight)
        if layer.scheme.has_fixed_acts:
            assert ranges is not None
            scale, zero_point = grid_of(*ranges[name], layer.scheme.act_bits)
            rows = (layer.scheme.act_steps or 0) + 1
            layer.store_activation(ActivationScale(scale.expand(rows, 1), zero_point.expand(rows, 1)))
    set_step_table_(model, StepTable(ScheduleId(scheduler="", config_sha256="", timesteps=tuple(range(50, 0, -1)))))
    return model


def observed(model: nn.Module, names: list[str], *inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The range of what enters the named layers of a float model."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: ranges.update({name: args[0].aminmax()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return ranges


def dit_variants(compiled: bool, dtype: torch.dtype) -> Iterator[tuple[str, Variants]]:
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(2, 256, 1152)
    modulation = {f"blocks.{i}.norm1.linear": W8 for i in range(8)}
    names = [f"blocks.{i}.{name}" for i in range(8) for name in PRODUCTS]
    ranges = observed(model, names, x)
    models = floats(model, dtype)
    base = list(models.values())[-1]
    models["int8"] = quantized(base, dict.fromkeys(names, W8A8) | modulation)
    for variant, scheme in FIXED.items():
        models[variant] = quantized(base, dict.fromkeys(names, scheme) | modulation, ranges)
    yield "8 DiT blocks, 2 x 256 tokens", variants_of(models, x, compiled, dtype)


def svdquant_variants(compiled: bool, dtype: torch.dtype) -> Iterator[tuple[str, Variants]]:
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(2, 256, 1152)
    models = floats(model, dtype)
    base = list(models.values())[-1]
    modulation = {f"blocks.{i}.norm1.linear": W8 for i in range(8)}
    names = [f"blocks.{i}.{name}" for i in range(8) for name in PRODUCTS]
    for variant, scheme in {"int8": W8A8, "int8, factors, rank 32": W8A8_BRANCH}.items():
        models[variant] = quantized(base, dict.fromkeys(names, scheme) | modulation)
    yield "8 DiT blocks, 2 x 256 tokens", variants_of(models, x, compiled, dtype)


def resnet_variants(compiled: bool, dtype: torch.dtype) -> Iterator[tuple[str, Variants]]:
    torch.manual_seed(0)
    model = ResnetBlock2D(in_channels=640, out_channels=640, temb_channels=1280).eval()
    x, time_embedding = torch.randn(2, 640, 32, 32), torch.randn(2, 1280)
    models = floats(model, dtype)
    base = list(models.values())[-1]
    models["int8"] = int8 = quantized(base, {"conv1": W8A8, "conv2": W8A8, "time_emb_proj": W8})
    ranges = observed(model, ["conv1", "conv2"], x, time_embedding)
    for variant, scheme in FIXED.items():
        models[variant] = quantized(base, {"conv1": scheme, "conv2": scheme, "time_emb_proj": W8}, ranges)
    last = {f"{NAMES[dtype]} channels_last": copy.deepcopy(base).to(memory_format=torch.channels_last)}
    last["int8 channels_last"] = int8
    variants = variants_of(models, x, compiled, dtype, time_embedding)
    variants |= variants_of(last, x.to(memory_format=torch.channels_last), compiled, dtype, time_embedding)
    yield "ResnetBlock2D, 640 channels, 32x32, batch 2", variants


def w4_variants(compiled: bool, dtype: torch.dtype) -> Iterator[tuple[str, Variants]]:
    for out_features in (1152, 4608):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1152, out_features))
        models = floats(model, dtype)
        base = list(models.values())[-1]
        models["int4"], models["int4 prefer=speed"] = (quantized(base, {"0": W4}) for _ in range(2))
        set_prefer_(models["int4 prefer=speed"], "speed")
        for rows in (2, 256, 1024, 2048):
            x = torch.randn(rows, 1152)
            yield f"1152 -> {out_features}, {rows} rows", variants_of(models, x, compiled, dtype)


def floats(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The float32 model, and it in the dtype of the quantized ones, which comes last."""
    return {"fp32": model, NAMES[dtype]: copy.deepcopy(model).to(dtype)}


def variants_of(
    models: dict[str, nn.Module], x: Tensor, compiled: bool, dtype: torch.dtype, *others: Tensor
) -> Variants:
    """One call per model in its own dtype; `compiled` adds one per quantized model through torch.compile."""
    variants: Variants = {}
    for name, model in models.items():
        own = torch.float32 if name.startswith("fp32") else dtype
        inputs = [tensor.to(own) for tensor in (x, *others)]
        variants[name] = lambda model=model, inputs=inputs: model(*inputs)
        if compiled and not name.startswith("fp32"):
            fast = torch.compile(copy.deepcopy(model))
            variants[f"{name} compiled"] = lambda model=fast, inputs=inputs: model(*inputs)
    return variants


def measure(variants: Variants, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, ratios and error of each variant; they take turns."""
    results = {name: run() for name, run in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    exact = results["fp32"].float()
    return {
        name: {
            "latency_ms": median[name] * 1e3,
            "times_fp32": median["fp32"] / median[name],
            "times_bf16": median.get("bf16", math.nan) / median[name],
            "error": float((results[name].float() - exact).norm() / exact.norm()),
        }
        for name in variants
    }


def print_profile(repeats: int) -> None:
    """Milliseconds per call of the operations that take longest in the int8 transformer blocks, eager."""
    ((_, variants),) = dit_variants(compiled=False, dtype=torch.bfloat16)
    run = variants["int8"]
    with torch.no_grad():
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(repeats):
                run()
    averages = profiler.key_averages()
    print(f"{'all operations':45} {sum(one.self_cpu_time_total for one in averages) / repeats / 1e3:8.1f} ms")
    for one in sorted(averages, key=lambda one: -one.self_cpu_time_total)[:8]:
        print(f"{one.key:45} {one.self_cpu_time_total / repeats / 1e3:8.1f} ms")


CASES = {"dit": dit_variants, "svdquant": svdquant_variants, "resnet": resnet_variants, "w4": w4_variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=list(CASES), required=True)
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for processors without arithmetic for it")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (needs a C++ compiler)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="instead: where the time of the int8 blocks goes")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.profile:
        print_profile(options.repeats)
        return
    report: dict[str, dict] = {"machine": {"date": date.today().isoformat(), **describe_machine()}}
    print(*(f"{name} {fact}" for name, fact in report["machine"].items()), sep=" · ")
    cases = CASES[options.what]
    with torch.no_grad():
        for title, variants in cases(options.compile, torch.float32 if options.float32 else torch.bfloat16):
            report[title] = rows = measure(variants, options.repeats)
            print(f"\n{title}\n{'':24}{'ms':>9}{'x fp32':>9}{'x bf16':>9}{'error':>9}")
            for name, row in rows.items():
                print(f"{name:24}" + "{:9.2f}{:9.2f}{:9.2f}{:9.4f}".format(*row.values()), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
