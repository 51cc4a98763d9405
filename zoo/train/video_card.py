"""What the judge says of generated clips, and the card of the pipeline that made them.

Letters: N clips, F frames, S pixels a side.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch
from card import DIGITS_DATA, HEADER
from clips import DIGIT_NAMES, DIRECTIONS, FORMS
from digits_video_judge import look
from frechet import Gaussian, fit_gaussian, frechet_distance
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

MACHINE = "one core of a 2-core CPU with AVX2 that other programs used too"
SHOWN, ZOOM = 10, 3  # clips in the picture, and how much they are enlarged

TEXT = """\
## Text

Captions have the form "{first}", the ten digits by their names and four directions; the calibration prompts say it as
"{second}". Before the denoiser, the CLIP text encoder learned to say which digit and direction a caption names; the
denoiser then saw fixed states. All 40 captions were seen in training: there is nothing to hold out in so few."""

DISTANCE = """\
The Frechet video distance is FID's formula on the judge's features of clips (mean and deviation over time of what it
sees in pairs of frames), against 2,000 clips of real digits: it compares with other figures of this judge only, and
falls with the number of samples. The halves are of 1,000 clips."""


def measure_clips(
    model: ResNetForImageClassification, real: Gaussian, facts: dict[str, Any], clips: Tensor, asked: list[str]
) -> dict[str, Any]:
    """Shares of frames and of clips (N, F, 1, S, S) that show what was asked for, and their distance to real ones."""
    seen = look(model, clips)
    words = [caption.split() for caption in asked]  # the first form: digit, "moving", direction
    digits = torch.tensor([DIGIT_NAMES.index(digit) for digit, _, _ in words])
    directions = torch.tensor([DIRECTIONS.index(direction) for _, _, direction in words])
    frames, moves = seen.digits == digits[:, None], seen.directions == directions
    return {
        "samples": len(clips),
        "digit_accuracy": _share(frames),
        "motion_accuracy": _share(moves),
        "caption_accuracy": _share(frames.all(dim=1) & moves),
        "digit_accuracy_per_class": [_share(frames[digits == digit]) for digit in range(len(DIGIT_NAMES))],
        "motion_accuracy_per_direction": [_share(moves[directions == place]) for place in range(len(DIRECTIONS))],
        "frechet_video": round(frechet_distance(fit_gaussian(seen.features), real), 3),
        "frechet_between_halves": round(facts["fid_between_halves"], 3),
    }


def _share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


def write_strips(clips: Tensor, path: Path) -> None:
    """The first clips, one below the other, their frames from left to right, enlarged without smoothing."""
    shown = clips[:SHOWN, :, 0]  # (R, F, S, S)
    rows, frames, size, _ = shown.shape
    tiled = shown.permute(0, 2, 1, 3).reshape(rows * size, frames * size)
    picture = Image.fromarray(((tiled + 1) * 127.5).round().byte().numpy())
    picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST).save(path, optimize=True)


def write_video_card(
    folder: Path, name: str, entry: dict[str, Any], measured: dict[str, Any], clips: Tensor, asked: list[str]
) -> None:
    """README.md, metrics.json and samples.png of a pipeline of clips."""
    write_strips(clips, folder / "samples.png")
    today = datetime.date.today().isoformat()
    (folder / "metrics.json").write_text(json.dumps({"date": today, **measured}, indent=2) + "\n")
    how = (
        f"{measured['samples']:,} samples of {entry['num_inference_steps']} DDIM steps from the saved float16 weights, "
        f"computed in float32, guidance scale {entry['guidance_scale']}, the evaluation prompts in turn"
    )
    sections = [
        HEADER.format(pipeline=entry["pipeline"], task="text-to-video", subject="digits") + f"\n# {name}",
        f"{entry['description']} It is a real trained diffusers pipeline, small enough to test compression on.",
        _usage(name, entry, asked),
        "![samples](samples.png)",
        f"Time runs from left to right. From the top: {'; '.join(asked[:SHOWN])}.",
        "## Measured",
        f"On {today}: {how}, read by [{entry['judge']}](../{entry['judge']}/README.md).",
        "\n".join(["| | |", "|---|---|", *(f"| {what} | {much} |" for what, much in _figures(measured))]),
        DISTANCE,
        TEXT.format(
            first=FORMS[0].format(digit="seven", direction="left"),
            second=FORMS[1].format(digit="seven", direction="left"),
        ),
        DIGITS_DATA + f"\nRetrain with `python zoo/train/{name.replace('-', '_')}.py`.",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def _figures(measured: dict[str, Any]) -> list[tuple[str, str]]:
    training = measured["training"]
    minutes = (
        f"{training['cpu_seconds'] / 60:.0f} min + {training['cpu_seconds_before'] / 60:.0f} min for the four before"
    )
    return [
        ("Parameters of the denoiser", f"{measured['parameters']:,}"),
        ("Multiply-accumulates per denoiser call", f"{measured['macs_per_call']:,}"),
        ("Frames that show the digit asked for", f"{measured['digit_accuracy']:.1%}"),
        ("Clips that move as asked for", f"{measured['motion_accuracy']:.1%}"),
        ("Clips that are right in every frame", f"{measured['caption_accuracy']:.1%}"),
        ("Frechet video distance to real clips", f"{measured['frechet_video']:.2f}"),
        ("The same between random halves of the real clips", f"{measured['frechet_between_halves']:.2f}"),
        ("Last stage of training", f"{training['step']:,} steps of {training['batch_size']}, seed {training['seed']}"),
        ("Processor time of training", f"{minutes} it, on {MACHINE}"),
    ]


def _usage(name: str, entry: dict[str, Any], asked: list[str]) -> str:
    """The lines that make a clip with plain diffusers."""
    settings = ", ".join(f"{key}={entry[key]}" for key in ("num_frames", "guidance_scale", "num_inference_steps"))
    return "\n".join(
        [
            "```python",
            f"from diffusers import {entry['pipeline']}",
            "",
            f'pipeline = {entry["pipeline"]}.from_pretrained("zoo/{name}")',
            f'frames = pipeline("{asked[0]}", {settings}).frames[0]',
            "```",
        ]
    )
