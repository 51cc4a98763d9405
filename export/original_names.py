"""Tensors of a denoiser under the names of the checkpoint that it was published as, which ComfyUI and
stable-diffusion.cpp read: several layers of diffusers are one there, and some have their halves the other way round.

Families are data; each is tested by diffusers' own conversion of such checkpoints, which must undo it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ..core.errors import UnsupportedError

QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class Source:
    """What a tensor of the published checkpoint is made of."""

    parts: tuple[str, ...]  # tensors of diffusers, one below the other
    swapped: bool = False  # scale and shift, the two halves of its rows, the other way round


@dataclass(frozen=True)
class Family:
    """Names of one architecture; `#` is the number of a block."""

    architecture: str  # what the readers call it
    layers: Mapping[str, tuple[str, ...]]  # published name -> layers of diffusers, with weight and bias
    tensors: Mapping[str, str]  # the same for single tensors
    swapped: frozenset[str]  # published names of layers with swapped halves
    swapped_last: frozenset[str] = frozenset()  # in the last block only
    stacks: tuple[str, ...] = ("transformer_blocks",)


def _mlp(name: str, parts: tuple[str, str], source: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.{parts[0]}": (f"{source}.net.0.proj",), f"{name}.{parts[1]}": (f"{source}.net.2",)}


def _attention(block: str, source: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{source}.{name}" for name in names)


DOUBLE, SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
FLUX = Family(
    architecture="flux",
    layers={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        **{
            f"{name}.{side}": (f"time_text_embed.{source}.{part}",)
            for name, source in (
                ("time_in", "timestep_embedder"),
                ("vector_in", "text_embedder"),
                ("guidance_in", "guidance_embedder"),
            )
            for side, part in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
        },
        "double_blocks.#.img_mod.lin": (f"{DOUBLE}.norm1.linear",),
        "double_blocks.#.txt_mod.lin": (f"{DOUBLE}.norm1_context.linear",),
        "double_blocks.#.img_attn.qkv": _attention(DOUBLE, "attn", QKV),
        "double_blocks.#.txt_attn.qkv": _attention(DOUBLE, "attn", ADDED),
        "double_blocks.#.img_attn.proj": (f"{DOUBLE}.attn.to_out.0",),
        "double_blocks.#.txt_attn.proj": (f"{DOUBLE}.attn.to_add_out",),
        **_mlp("double_blocks.#.img_mlp", ("0", "2"), f"{DOUBLE}.ff"),
        **_mlp("double_blocks.#.txt_mlp", ("0", "2"), f"{DOUBLE}.ff_context"),
        "single_blocks.#.modulation.lin": (f"{SINGLE}.norm.linear",),
        "single_blocks.#.linear1": (*_attention(SINGLE, "attn", QKV), f"{SINGLE}.proj_mlp"),
        "single_blocks.#.linear2": (f"{SINGLE}.proj_out",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    tensors={
        "double_blocks.#.img_attn.norm.query_norm.scale": f"{DOUBLE}.attn.norm_q.weight",
        "double_blocks.#.img_attn.norm.key_norm.scale": f"{DOUBLE}.attn.norm_k.weight",
        "double_blocks.#.txt_attn.norm.query_norm.scale": f"{DOUBLE}.attn.norm_added_q.weight",
        "double_blocks.#.txt_attn.norm.key_norm.scale": f"{DOUBLE}.attn.norm_added_k.weight",
        "single_blocks.#.norm.query_norm.scale": f"{SINGLE}.attn.norm_q.weight",
        "single_blocks.#.norm.key_norm.scale": f"{SINGLE}.attn.norm_k.weight",
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    stacks=("transformer_blocks", "single_transformer_blocks"),
)
X, CONTEXT = "joint_blocks.#.x_block", "joint_blocks.#.context_block"
SD3 = Family(
    architecture="sd3",
    layers={
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        **{
            f"{name}.mlp.{side}": (f"time_text_embed.{source}.{part}",)
            for name, source in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for side, part in (("0", "linear_1"), ("2", "linear_2"))
        },
        f"{X}.attn.qkv": _attention(DOUBLE, "attn", QKV),
        f"{CONTEXT}.attn.qkv": _attention(DOUBLE, "attn", ADDED),
        f"{X}.attn2.qkv": _attention(DOUBLE, "attn2", QKV),
        f"{X}.attn.proj": (f"{DOUBLE}.attn.to_out.0",),
        f"{CONTEXT}.attn.proj": (f"{DOUBLE}.attn.to_add_out",),
        f"{X}.attn2.proj": (f"{DOUBLE}.attn2.to_out.0",),
        f"{X}.adaLN_modulation.1": (f"{DOUBLE}.norm1.linear",),
        f"{CONTEXT}.adaLN_modulation.1": (f"{DOUBLE}.norm1_context.linear",),
        **_mlp(f"{X}.mlp", ("fc1", "fc2"), f"{DOUBLE}.ff"),
        **_mlp(f"{CONTEXT}.mlp", ("fc1", "fc2"), f"{DOUBLE}.ff_context"),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    tensors={
        "pos_embed": "pos_embed.pos_embed",
        **{
            f"{X}.{attn}.ln_{letter}.weight": f"{DOUBLE}.{attn}.norm_{letter}.weight"
            for attn in ("attn", "attn2")
            for letter in "qk"
        },
        **{f"{CONTEXT}.attn.ln_{letter}.weight": f"{DOUBLE}.attn.norm_added_{letter}.weight" for letter in "qk"},
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    swapped_last=frozenset({f"{CONTEXT}.adaLN_modulation.1"}),
)
FAMILIES = {"FluxTransformer2DModel": FLUX, "SD3Transformer2DModel": SD3}


def original_sources(class_name: str, names: Collection[str]) -> dict[str, Source]:
    """Published name -> the tensors of diffusers that it is made of.

    Raises:
        UnsupportedError: no names are known for this class, or for one of its tensors.
    """
    family = FAMILIES.get(class_name)
    if family is None:
        raise UnsupportedError(
            f"the published names of {class_name} are not known.",
            mend=f"They are for {', '.join(FAMILIES)}; leave names=original out.",
        )
    found = {name: source for name, source in _all(family, names) if set(source.parts) <= set(names)}
    if left := set(names) - {part for source in found.values() for part in source.parts}:
        raise UnsupportedError(
            f"{min(left)} of {class_name} has no place in a published checkpoint.", mend="Leave names=original out."
        )
    return found


def _all(family: Family, names: Collection[str]) -> Iterator[tuple[str, Source]]:
    numbers = [int(name.split(".")[1]) for name in names if name.split(".")[0] in family.stacks]
    last = max(numbers, default=0)
    for number in map(str, range(last + 1)):
        for name, layers in family.layers.items():
            swapped = name in family.swapped or (name in family.swapped_last and int(number) == last)
            for leaf in ("weight", "bias"):
                parts = tuple(f"{layer}.{leaf}".replace("#", number) for layer in layers)
                yield f"{name}.{leaf}".replace("#", number), Source(parts, swapped)
        for name, tensor in family.tensors.items():
            yield name.replace("#", number), Source((tensor.replace("#", number),))
