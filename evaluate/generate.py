"""Sample images or clips from a source into a folder of PNG files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field
from torch import Tensor

from ..core.config import Config
from ..core.errors import ConfigError
from ..core.folder import refuse_current_folder, swap_in
from ..core.output import chosen_output, only_writer
from ..core.reporter import Reporter, silent
from ..core.seeds import seed_stream
from ..core.source import Source, resolve_source, zoo_entry_of
from ..runtime.load import load_source
from ..runtime.request import RunRequest
from ..runtime.trajectory import sample

DEFAULT_STEPS = 50
FRAME_MS = 125  # how long a frame of a clip is shown


class GenerateConfig(Config):
    """What to paint; labels and prompts are dealt to the images in turn."""

    num: int = Field(4, ge=1)  # images
    steps: int | None = Field(None, ge=1)  # solver steps; fewer: faster, coarser; None: the zoo's own, else 50
    seed: int = 0
    guidance_scale: float | None = None  # None: the zoo's own, else the pipeline's
    class_labels: tuple[int, ...] | None = None
    prompts: tuple[str, ...] | None = None  # None: the zoo's own, else a few neutral ones
    negative_prompt: str | None = None  # what guidance leads away from
    height: int | None = Field(None, ge=1)  # pixels; None: the zoo's own, else the pipeline's default
    width: int | None = Field(None, ge=1)
    num_frames: int | None = Field(None, ge=1)  # of a clip; None: the zoo's own, else the pipeline's default
    batch_size: int = Field(16, ge=1)  # images per pipeline call; larger: faster, more memory


def generate_images(
    source: str | Path | Source | None,
    config: GenerateConfig | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    prefer: Literal["memory", "speed"] = "memory",
    reporter: Reporter | None = None,
) -> Path:
    """Sample and write `0000.png`, `0001.png`, ... into a folder, which appears only when all are there.

    Clips are animated PNG files: lossless, and what shows no animation shows the first frame.

    Args:
        output: the folder; default `./<source>-images`.

    Raises:
        ConfigError: the folder exists, or the pipeline does not take what was asked.
        BusyError: another run writes the folder.
    """
    config, reporter = config or GenerateConfig(), reporter or silent()
    resolved = (
        source
        if isinstance(source, Source)
        else resolve_source(None if source is None else str(source), reporter=reporter)
    )
    target = chosen_output(output, f"{resolved.name}-images")
    absolute = Path(os.path.abspath(target))  # the current folder may be left meanwhile
    _check_target(absolute, overwrite=overwrite)
    with only_writer(absolute):
        images = _sample(resolved, config, device=device, dtype=dtype, prefer=prefer, reporter=reporter)
        _check_target(absolute, overwrite=overwrite)  # again: sampling takes time
        _write(images, absolute)
    return target


def _sample(
    source: Source,
    config: GenerateConfig,
    *,
    device: str,
    dtype: str,
    prefer: Literal["memory", "speed"],
    reporter: Reporter,
) -> Tensor:
    """(N, C, H, W) images or (N, F, C, H, W) clips in [0, 1]."""
    pipe = load_source(source, device=device, dtype=dtype, prefer=prefer, reporter=reporter)
    entry = zoo_entry_of(source)
    request = RunRequest(
        seeds=seed_stream("generate", config.seed, config.num),
        num_inference_steps=config.steps or (entry.num_inference_steps if entry else DEFAULT_STEPS),
        guidance_scale=config.guidance_scale,
        class_labels=config.class_labels,
        prompts=config.prompts,
        negative_prompt=config.negative_prompt,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        batch_size=config.batch_size,
    ).with_zoo_defaults(entry)
    return sample(pipe, request, reporter=reporter).images


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) float in [0, 1] with one or three channels -> PIL image."""
    array = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _check_target(target: Path, *, overwrite: bool) -> None:
    refuse_current_folder(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"the output {target} is a file or a link.", mend="Give a folder with --output.")
    if not target.exists():
        return
    if not overwrite:
        raise ConfigError(f"the output {target} exists.", mend="Choose another --output, or give --overwrite.")
    strangers = [file.name for file in target.iterdir() if file.suffix != ".png"]
    if strangers:
        raise ConfigError(
            f"the output {target} holds {strangers[0]}, which is not an image of ours.",
            "--overwrite deletes the old folder.",
            "Choose another --output.",
        )


def _write(images: Tensor, target: Path) -> None:
    """Write aside, then rename."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for number, image in enumerate(images):
            first, *others = [to_pil(frame) for frame in image.reshape(-1, *image.shape[-3:])]
            animated: dict[str, Any] = (
                {"save_all": True, "append_images": others, "duration": FRAME_MS} if others else {}
            )
            first.save(aside / f"{number:04d}.png", **animated)
        aside.chmod(0o755)
        swap_in(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
