"""The model card of a zoo pipeline: README.md with what was measured, metrics.json, and a grid of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

DATE = "2026-11-20"
MACHINE = "one core of a 2-core CPU with AVX512"
GRID_COLUMNS, GRID_ROWS, GRID_ZOOM = 20, 10, 3

HEADER = """\
---
library_name: diffusers
license: apache-2.0
tags:
- {pipeline}
- {task}-image-generation
- tiny
- digits
---
"""

FID_NOTE = """\
FID here is on the judge's own features: it compares with other figures of this zoo only. It falls with the number of
samples, and the halves are of 898 and 899 digits: a figure below theirs says "as near as can be told", no more."""

DATA = """\
## Data

The 1797 digits of the *Optical Recognition of Handwritten Digits* data set (E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, CC BY 4.0) as scikit-learn ships them, brought from 8x8 to 16x16 by bicubic interpolation and
scaled to [-1, 1]. Changed by this project: the interpolation, and small rotations, scalings and shifts in training.
The weights are under Apache-2.0.
"""


def write_grid(images: Tensor, path: Path) -> None:
    """The first samples, enlarged without smoothing so that every pixel is seen."""
    shown = images[: GRID_COLUMNS * GRID_ROWS]  # (R * C, 1, S, S)
    rows, size = len(shown) // GRID_COLUMNS, shown.shape[-1]
    tiled = shown[: rows * GRID_COLUMNS].reshape(rows, GRID_COLUMNS, size, size).permute(0, 2, 1, 3)
    pixels = ((tiled.reshape(rows * size, GRID_COLUMNS * size) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * GRID_ZOOM, picture.height * GRID_ZOOM), Image.Resampling.NEAREST).save(
        path, optimize=True
    )


def usage(name: str, entry: dict[str, Any]) -> str:
    call = "batch_size=10"
    if entry["conditioning"] == "class":
        call = f"class_labels=list(range(10)), guidance_scale={entry['guidance_scale']}"
    return "\n".join(
        [
            "```python",
            f"from diffusers import {entry['pipeline']}",
            "",
            f'pipeline = {entry["pipeline"]}.from_pretrained("zoo/{name}")',
            f"images = pipeline({call}, num_inference_steps={entry['num_inference_steps']}).images",
            "```",
        ]
    )


def figures(entry: dict[str, Any], measured: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, how much) for the table of the card."""
    training = measured["training"]
    rows = [
        ("Parameters of the denoiser", f"{measured['parameters']:,}"),
        ("Multiply-accumulates per denoiser call", f"{measured['macs_per_call']:,}"),
    ]
    if "accuracy" in measured:
        rows.append(("Judge reads the digit asked for", f"{measured['accuracy']:.1%}"))
    rows += [
        ("Mean confidence of the judge", f"{measured['mean_confidence']:.3f}"),
        ("Samples read with confidence above 0.9", f"{measured['share_above_0.9']:.1%}"),
        ("FID on judge features, against all 1797 real digits", f"{measured['fid']:.2f}"),
        ("The same between random halves of the real digits", f"{measured['fid_between_halves']:.2f}"),
        ("Training", f"{training['step']:,} steps of {training['batch_size']}, seed {training['seed']}"),
        ("Processor time of training", f"{training['cpu_seconds'] / 60:.0f} min on {MACHINE}"),
    ]
    return rows


def write_card(folder: Path, name: str, entry: dict[str, Any], measured: dict[str, Any], images: Tensor) -> None:
    write_grid(images, folder / "samples.png")
    (folder / "metrics.json").write_text(json.dumps({"date": DATE, **measured}, indent=2) + "\n")
    conditioned = entry["conditioning"] == "class"
    steps = entry["num_inference_steps"]
    how = f"{measured['samples']:,} samples of {steps} DDIM steps from the saved float16 weights, computed in float32"
    if conditioned:
        how += f", guidance scale {entry['guidance_scale']}, every digit equally often"
    sections = [
        HEADER.format(pipeline=entry["pipeline"], task="class-conditional" if conditioned else "unconditional")
        + f"\n# {name}",
        f"{entry['description']} It is a real trained diffusers pipeline, small enough to test compression on.",
        usage(name, entry),
        "![samples](samples.png)",
        "## Measured",
        f"On {DATE}: {how}, read by [{entry['judge']}](../{entry['judge']}/README.md).",
        "\n".join(["| | |", "|---|---|", *(f"| {what} | {much} |" for what, much in figures(entry, measured))]),
        FID_NOTE,
        DATA + f"\nRetrain with `python zoo/train/{name.replace('-', '_')}.py`.",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")
