"""What the quantization study compares: pipelines, settings, and rows of `dacc quantize` options. Edit here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dacc.core.families.unet import FAMILY

PIPELINES = ("digits-unet", "digits-dit", "shapes-sd", "shapes-mmdit")
WITH_FID = ("digits-unet", "digits-dit")  # FID of the shapes says nothing: real drawings of its captions score 10 too
SETTINGS: dict[str, dict[str, int]] = {
    "W8A16": {"bits": 8},
    "W4A16": {"bits": 4},
    "W8A8": {"bits": 8, "act_bits": 8},
    "W4A8": {"bits": 4, "act_bits": 8},
    "W4A4": {"bits": 4, "act_bits": 4},
    "W6A16": {"bits": 6},
    "W3A16": {"bits": 3},
    "W2A16": {"bits": 2},
}
MAIN = ("W8A16", "W4A16", "W8A8", "W4A8", "W4A4")
LOW = ("W6A16", "W3A16", "W2A16")
# layers that methods without care for time lift to 8 bits: these globs hold them at the asked bits instead; tables of
# classes stay at 8 bits in every row
TEMPORAL_GLOBS = {
    "digits-unet": ("time_embedding.*", "*.time_emb_proj"),
    "digits-dit": ("*.norm1.emb.timestep_embedder.*", "*.norm1.linear"),
    "shapes-sd": ("time_embedding.*", "*.time_emb_proj"),
    "shapes-mmdit": (
        "time_text_embed.*",
        "*.norm1.linear",
        "*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
    ),
}
# where the network also has convolutions: its linears, for a row that treats what peers without convolutions treat
LINEAR_GLOBS = {
    "digits-unet": ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.time_emb_proj", "time_embedding.*"),
    "shapes-sd": ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.ff.net.*", "*.time_emb_proj", "time_embedding.*"),
}
CONVOLUTION_GLOBS = {  # all but the first and the last
    "digits-unet": ("*.conv*",),
    "shapes-sd": ("*.conv*", "*.proj_in", "*.proj_out"),
}
# layers that efficientdm spares, for a row that spares them too
SENSITIVE_GLOBS = {"digits-unet": FAMILY.sensitive, "shapes-sd": FAMILY.sensitive}
SPARED_BITS = 8
CALIBRATION: dict[str, dict[str, Any]] = {  # strategy -> options of `dacc calibrate`; one set per pipeline and strategy
    "uniform": {},
    "ndtc": {"samples": 256},
    "every-step": {},
}


@dataclass(frozen=True)
class Row:
    """One row of ours: options of `dacc quantize` beside those of the setting."""

    options: dict[str, Any] = field(default_factory=dict)
    with_activations: dict[str, Any] = field(default_factory=dict)  # more of them, where activations are quantized
    one_granularity: bool = (
        False  # one scale per channel, and temporal layers at the asked bits, in all these rows alike
    )
    settings: tuple[str, ...] = MAIN
    linears: bool = False  # only those, in networks that have convolutions too
    convolutions: dict[str, int] = field(
        default_factory=dict
    )  # option by layer -> bits of all; only where there are some
    spared: bool = False  # the layers that efficientdm spares have 8 bits, in networks that have such layers
    calibration: dict[str, Any] = field(default_factory=dict)  # options of `dacc calibrate` beside the strategy's
    pipelines: tuple[str, ...] = PIPELINES
    swept: bool = False  # one of many that differ in a field: measured when it is named

    def is_for(self, pipeline: str, setting: str) -> bool:
        """Whether a pipeline has this row at a setting."""
        special = (not (self.linears or self.convolutions) or pipeline in LINEAR_GLOBS) and (
            not self.spared or pipeline in SENSITIVE_GLOBS
        )
        return setting in self.settings and pipeline in self.pipelines and special


STATIC = {"act_mode": "static"}
CHANNEL = {"group_size": "channel"}
STUDIED = ("W4A16", "W8A8", "W4A8", "W4A4")
ROUNDED = ("W8A8", "W4A8", "W4A4")
UPDATES = {"iterations": 200}  # equal for the methods with reconstruction; their default follows the machine
FEW = {"samples": 128, "batch_size": 8}  # an update on 8 samples costs a quarter of one on 32
ROWS: dict[str, Row] = {
    "rtn": Row(CHANNEL | {"method": "rtn", "settings": {"search": "minmax"}}, STATIC, True, STUDIED),
    "rtn-mse": Row(CHANNEL | {"method": "rtn", "settings": {"search": "mse"}}, STATIC, True, STUDIED),
    "gptq": Row(CHANNEL | {"method": "gptq"}, STATIC, True, STUDIED),
    # the papers' own way with activations is theirs to choose
    "ptq4dm": Row(CHANNEL | {"method": "ptq4dm"}, {}, True, STUDIED),
    "qdiffusion": Row(CHANNEL | {"method": "qdiffusion", "settings": UPDATES}, {}, True, STUDIED),
    "tfmq": Row(CHANNEL | {"method": "tfmq", "settings": UPDATES}, {}, True, STUDIED),
    "efficientdm": Row(
        CHANNEL | {"method": "efficientdm", "settings": {"updates": 1000}}, {}, True, ROUNDED, calibration=FEW
    ),
    "efficientdm (12000 updates, weighed)": Row(
        CHANNEL | {"method": "efficientdm", "settings": {"updates": 12000, "weigh": "sensitivity"}},
        {},
        True,
        ("W4A4",),
        calibration=FEW | {"samples": 256},
        swept=True,
    ),
    "efficientdm (6000 updates, weighed)": Row(
        CHANNEL | {"method": "efficientdm", "settings": {"updates": 6000, "weigh": "sensitivity"}},
        {},
        True,
        ("W4A4",),
        calibration=FEW,
        swept=True,
    ),
    "efficientdm (weighed)": Row(
        CHANNEL | {"method": "efficientdm", "settings": {"updates": 1000, "weigh": "sensitivity"}},
        {},
        True,
        ROUNDED,
        calibration=FEW,
        swept=True,
    ),
    "efficientdm (6000 updates)": Row(
        CHANNEL | {"method": "efficientdm", "settings": {"updates": 6000}},
        {},
        True,
        ("W4A4",),
        calibration=FEW,
        swept=True,
    ),
    "rtn (spared)": Row(
        CHANNEL | {"method": "rtn", "settings": {"search": "minmax"}}, STATIC, True, ("W4A4",), spared=True
    ),
    "rtn (defaults)": Row({"method": "rtn"}, settings=MAIN + LOW),
    "gptq (defaults)": Row({"method": "gptq"}, settings=MAIN + LOW),
    "tfmq (defaults)": Row({"method": "tfmq"}, settings=("W4A8",)),
    "gptq (linears)": Row({"method": "gptq"}, settings=MAIN[:4], linears=True),
    # activation scales for each group of features too: less error, slower
    "gptq (linears, per group)": Row(
        {"method": "gptq", "act_mode": "per-group", "group_size": "channel"},
        settings=("W8A8",),
        linears=True,
        pipelines=("shapes-sd",),
    ),
    # as a peer does that rounds the inputs of linears alone
    "gptq (convolutions' inputs float)": Row(
        {"method": "gptq"},
        settings=("W8A8", "W4A8"),
        convolutions={"layer_act_bits": 16},
        pipelines=("shapes-sd",),
    ),
    # linears as peers treat them that leave convolutions float, and the convolutions at 8 bits
    "gptq (convolutions W8)": Row(
        {"method": "gptq"},
        settings=("W4A16", "W4A8"),
        convolutions={"layer_bits": 8, "layer_act_bits": 16},
        pipelines=("shapes-sd",),
    ),
}
RANKS = (0, 4, 8, 16, "auto")


def _svdquant_rows() -> dict[str, Row]:
    """Every rank, with and without second-order rounding, and with factors that were judged without the branch."""
    rows = {}
    for rank in RANKS:
        for gptq in (True, False):
            for joint in (True, False) if rank else (True,):
                settings = {"rank": rank, "gptq": gptq, "joint": joint}
                words = [f"rank {rank}", *([] if gptq else ["nearest"]), *([] if joint else ["factors alone"])]
                rows[f"svdquant ({', '.join(words)})"] = Row(
                    {"method": "svdquant", "settings": settings}, settings=ROUNDED, swept=True
                )
    return rows


ROWS |= _svdquant_rows()
ROWS["svdquant (data-free)"] = Row(
    {"method": "svdquant", "settings": {"data_free": True}}, settings=ROUNDED, swept=True
)
DRAWN = (("W4A16", "rtn (defaults)"), ("W4A16", "gptq (defaults)"), ("W2A16", "rtn (defaults)"),
         ("W2A16", "gptq (defaults)"))  # fmt: skip


def row_options(pipeline: str, setting: str, name: str, *, temporal_by_itself: bool = False) -> dict[str, Any]:
    """Options of `dacc quantize` for one cell.

    Args:
        temporal_by_itself: the method quantizes temporal layers at the asked bits without being told.
    """
    row, bits = ROWS[name], SETTINGS[setting]
    options: dict[str, Any] = {**bits, **row.options}
    if "act_bits" in bits:
        options |= row.with_activations
    if row.linears:
        options["include"] = list(LINEAR_GLOBS[pipeline])
    if row.one_granularity and not temporal_by_itself:
        options["layer_bits"] = [[glob, bits["bits"]] for glob in TEMPORAL_GLOBS[pipeline]]
    for option, of_all in row.convolutions.items():
        if option != "layer_act_bits" or "act_bits" in bits:  # refused where no activations are rounded
            options[option] = [[glob, of_all] for glob in CONVOLUTION_GLOBS[pipeline]]
    if row.spared:
        lifted = [[glob, SPARED_BITS] for glob in SENSITIVE_GLOBS[pipeline]]
        options |= {"layer_bits": [*options["layer_bits"], *lifted], "layer_act_bits": lifted}
    return options
