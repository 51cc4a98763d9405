"""The model card of a zoo pipeline: README.md with what was measured, metrics.json, and a grid of samples."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from PIL import Image
from sampling import Asked
from torch import Tensor

MACHINE = "one core of a 2-core CPU with AVX512"
GRIDS = {1: (20, 10), 3: (10, 8)}  # columns and rows, by channels
GRID_ZOOM = 3

HEADER = """\
---
library_name: diffusers
license: apache-2.0
tags:
- {pipeline}
- {task}
- tiny
- {subject}
---
"""
TASKS = {
    "none": "unconditional-image-generation",
    "class": "class-conditional-image-generation",
    "text": "text-to-image",
}

FID_NOTE = """\
FID here is on the judge's own features: it compares with other figures of this judge only. It falls with the number of
samples, and the halves are of {halves}: a figure below theirs says "as near as can be told", no more."""

DIGITS_DATA = """\
## Data

The 1797 digits of the *Optical Recognition of Handwritten Digits* data set (E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, CC BY 4.0) as scikit-learn ships them, brought from 8x8 to 16x16 by bicubic interpolation and
scaled to [-1, 1]. Changed by this project: the interpolation, and small rotations, scalings and shifts in training.
The weights are under Apache-2.0.
"""

SHAPES_DATA = """\
## Data

Drawings that `zoo/train/shapes.py` makes: two objects on white, each a small or large circle, square or triangle in one
of five colours, one above or beside the other, with random places, sizes and shades. Of the 1740 scenes 174 are held
out: no stage of the training saw them, and the evaluation prompts in `prompts.json` are their captions. The calibration
prompts there are captions of other scenes. The weights are under Apache-2.0.
"""

SHAPES_TEXT = """\
## Text

Before the denoiser, {encoders} learned to say what the drawing of a caption shows; the denoiser then saw fixed states.
Captions have the form "a small red circle to the left of a large blue square" (or above, below, to the right of); other
words are taken apart into letters and mean nothing here.
"""


def write_grid(images: Tensor, path: Path) -> None:
    """The first samples, enlarged without smoothing so that every pixel is seen."""
    columns, rows = GRIDS[images.shape[1]]
    shown = images[: columns * rows]  # (R * C, channels, S, S)
    rows, size = len(shown) // columns, shown.shape[-1]
    tiled = shown[: rows * columns].reshape(rows, columns, -1, size, size).permute(0, 3, 1, 4, 2)
    pixels = ((tiled.reshape(rows * size, columns * size, -1) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.resize((picture.width * GRID_ZOOM, picture.height * GRID_ZOOM), Image.Resampling.NEAREST).save(
        path, optimize=True
    )


def usage(name: str, entry: dict[str, Any], asked: Asked) -> str:
    """The lines that draw with plain diffusers."""
    call = ["batch_size=10"]
    if entry["conditioning"] == "class":
        call = ["class_labels=list(range(10))", f"guidance_scale={entry['guidance_scale']}"]
    if entry["conditioning"] == "text":
        assert asked is not None
        call = [f'"{asked[0]}"', f"guidance_scale={entry['guidance_scale']}"]
        if entry["pipeline"] == "FluxPipeline":
            call[1:] = [
                'negative_prompt=""',
                f"true_cfg_scale={entry['guidance_scale']}",
                f"height={entry['height']}",
                f"width={entry['width']}",
                "max_sequence_length=16",
            ]
    call.append(f"num_inference_steps={entry['num_inference_steps']}")
    one_line = f"images = pipeline({', '.join(call)}).images"
    lines = (
        [one_line] if len(one_line) <= 120 else ["images = pipeline(", *(f"    {part}," for part in call), ").images"]
    )
    return "\n".join(
        [
            "```python",
            f"from diffusers import {entry['pipeline']}",
            "",
            f'pipeline = {entry["pipeline"]}.from_pretrained("zoo/{name}")',
            *lines,
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
    if "caption" in measured:
        rows += [
            ("Judge finds the caption entirely right", f"{measured['caption']:.1%}"),
            ("Both shapes right", f"{measured['shape']:.1%}"),
            ("Both colours right", f"{measured['colour']:.1%}"),
            ("Both sizes right", f"{measured['size']:.1%}"),
            ("Relation right", f"{measured['relation']:.1%}"),
        ]
    if "accuracy" in measured:
        rows.append(("Judge reads the digit asked for", f"{measured['accuracy']:.1%}"))
    if "mean_confidence" in measured:
        rows += [
            ("Mean confidence of the judge", f"{measured['mean_confidence']:.3f}"),
            ("Samples read with confidence above 0.9", f"{measured['share_above_0.9']:.1%}"),
        ]
    minutes = f"{training['cpu_seconds'] / 60:.0f} min"
    if before := training.get("cpu_seconds_before"):
        minutes += f" + {before / 60:.0f} min for the stages before it,"
    real = "all 1797 real digits" if entry["judge"] == "digits-judge" else "one drawing of each of the 1740 scenes"
    rows.append((f"FID on judge features, against {real}", f"{measured['fid']:.2f}"))
    if floor := measured.get("fid_of_held_out_drawings"):
        rows.append(("The same of 1,740 real drawings of the held-out scenes", f"{floor:.2f}"))
    return [
        *rows,
        ("The same between random halves of that reference", f"{measured['fid_between_halves']:.2f}"),
        ("Training", f"{training['step']:,} steps of {training['batch_size']}, seed {training['seed']}"),
        ("Processor time of training", f"{minutes} on {MACHINE}"),
    ]


def write_card(
    folder: Path, name: str, entry: dict[str, Any], measured: dict[str, Any], images: Tensor, asked: Asked
) -> None:
    """README.md, metrics.json and samples.png of a pipeline."""
    write_grid(images, folder / "samples.png")
    today = datetime.date.today().isoformat()
    (folder / "metrics.json").write_text(json.dumps({"date": today, **measured}, indent=2) + "\n")
    steps, subject = entry["num_inference_steps"], name.partition("-")[0]
    solver = "Euler" if entry["pipeline"] == "FluxPipeline" else "DDIM"
    how = (
        f"{measured['samples']:,} samples of {steps} {solver} steps from the saved float16 weights, computed in float32"
    )
    if entry["conditioning"] == "class":
        how += f", guidance scale {entry['guidance_scale']}, every digit equally often"
    if entry["conditioning"] == "text":
        how += f", guidance scale {entry['guidance_scale']}, the evaluation prompts in turn"
    retrain = f"Retrain with `python zoo/train/{name.replace('-', '_')}.py`."
    halves = "898 and 899 digits" if subject == "digits" else "870 drawings"
    sections = [
        HEADER.format(pipeline=entry["pipeline"], task=TASKS[entry["conditioning"]], subject=subject) + f"\n# {name}",
        f"{entry['description']} It is a real trained diffusers pipeline, small enough to test compression on.",
        usage(name, entry, asked),
        "![samples](samples.png)",
        *([_prompts_shown(asked)] if entry["conditioning"] == "text" else []),
        "## Measured",
        f"On {today}: {how}, read by [{entry['judge']}](../{entry['judge']}/README.md).",
        "\n".join(["| | |", "|---|---|", *(f"| {what} | {much} |" for what, much in figures(entry, measured))]),
        FID_NOTE.format(halves=halves),
    ]
    if subject == "shapes":
        encoders = "the CLIP and the T5 encoder" if entry["pipeline"] == "FluxPipeline" else "the CLIP text encoder"
        sections.append(SHAPES_TEXT.format(encoders=encoders).strip())
    sections.append((DIGITS_DATA if subject == "digits" else SHAPES_DATA) + f"\n{retrain}")
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def _prompts_shown(asked: Asked) -> str:
    assert asked is not None
    columns, _ = GRIDS[3]
    prompts = "; ".join(str(prompt) for prompt in asked[:columns])
    return f"First row, from the left: {prompts}."
