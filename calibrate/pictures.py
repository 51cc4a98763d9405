"""A user's pictures in place of what a run would draw: after every step the sample becomes their latents with the noise
of the coming call, by the scheduler's own law. So a denoiser is called as the pipeline calls it, on the user's data.

The first call has the pipeline's own noise, which is what pictures come to at the first noise level.
Letters: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..core.errors import ModelError, UnsupportedError
from ..core.pipeline import denoisers
from ..core.seeds import named_seed
from ..runtime.clock import current_run, running_scheduler
from ..runtime.request import RunRequest

FEATURE_MAP = 4  # dimensions
GRAY = 1


@dataclass
class Pictures:
    """Pictures for the runs of one pipeline; samples take them in turn.

    Args:
        files: in their order.
        request: the runs.
    """

    pipe: Any
    files: Sequence[Path]
    request: RunRequest
    _known: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def noised_(self, sample: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Put the pictures of some samples, with the noise of the coming call, where a step has put what it drew.

        Returns:
            Clean samples (N, ...) and the noise in them, on the CPU; None after the last call.

        Raises:
            ModelError: a file is no picture.
            UnsupportedError: their latents have another shape than the sample, or the scheduler cannot add noise.
        """
        scheduler, state = running_scheduler(self.pipe), current_run()
        assert scheduler is not None
        assert state is not None
        if state.call + 1 >= len(scheduler.timesteps):
            return None
        clean = torch.cat([self._clean(position % len(self.files)) for position in positions])
        noise = torch.cat([self._noise(position, clean[:1].shape) for position in positions])
        truth = clean, noise
        if len(sample) == 2 * len(positions):  # DiT steps from both guidance branches at once
            clean, noise = torch.cat([clean, clean]), torch.cat([noise, noise])
        if clean.shape != sample.shape:
            raise UnsupportedError(
                f"pictures have latents {tuple(clean.shape)}, {type(self.pipe).__name__} steps from "
                f"{tuple(sample.shape)}.",
                mend="Calibrate without --images.",
            )
        clean, noise = clean.to(sample), noise.to(sample)
        timestep = scheduler.timesteps[state.call + 1].expand(len(sample))
        if hasattr(scheduler, "scale_noise"):  # flows
            sample.copy_(scheduler.scale_noise(clean, timestep, noise))
        elif hasattr(scheduler, "add_noise"):
            sample.copy_(scheduler.add_noise(clean, noise, timestep))
        else:
            raise UnsupportedError(
                f"{type(scheduler).__name__} does not tell how noise is added to pictures.",
                mend="Calibrate without --images.",
            )
        return truth

    def _noise(self, position: int, shape: torch.Size) -> Tensor:
        generator = torch.Generator().manual_seed(named_seed(self.request.seeds[position], "pictures"))
        return torch.randn(shape, generator=generator)

    def _clean(self, number: int) -> Tensor:
        if number not in self._known:
            self._known[number] = self._latents(self.files[number])
        return self._known[number]

    def _latents(self, file: Path) -> Tensor:
        """(1, ...) what the pipeline would step to for one picture, on the CPU."""
        pixels = read_picture(file, *self._size, gray=self._channels == GRAY)[None]
        vae = self._vae
        if vae is None:
            return pixels
        encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        shift, scale = (vae.config.get(name) for name in ("shift_factor", "scaling_factor"))
        latents = ((latents - (shift or 0.0)) * (1.0 if scale is None else scale)).float().cpu()
        return self.pipe._pack_latents(latents, *latents.shape) if _packs(self.pipe) else latents

    @property
    def _vae(self) -> Any | None:
        return getattr(self.pipe, "vae", None)

    @property
    def _denoiser(self) -> Any:
        return next(iter(denoisers(self.pipe).values()))

    @cached_property
    def _channels(self) -> int:
        """Of the pixels."""
        return int((self._vae or self._denoiser).config.in_channels)

    @cached_property
    def _size(self) -> tuple[int, int]:
        """Pixels, (H, W)."""
        if self.request.height and self.request.width:
            return self.request.height, self.request.width
        scale = 1 if self._vae is None else 2 ** (len(self._vae.config.block_out_channels) - 1)
        size = self._denoiser.config.get("sample_size") or getattr(self.pipe, "default_sample_size", None)
        if size is None:
            raise UnsupportedError(
                f"{type(self.pipe).__name__} has no size of its own for pictures.", mend="Give --height and --width."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return height * scale, width * scale


def check_pictures(pipe: Any, *, captions: bool = False) -> None:
    """Refuse pipelines that pictures cannot be brought into.

    Args:
        captions: whether texts lie beside the pictures.

    Raises:
        UnsupportedError: it makes clips, its VAE is not one of pictures, or it takes no texts.
    """
    vae, arguments = getattr(pipe, "vae", None), inspect.signature(type(pipe).__call__).parameters
    clips = "num_frames" in arguments
    if clips or (vae is not None and "block_out_channels" not in vae.config):
        raise UnsupportedError(
            f"pictures cannot be brought into the latents of {type(pipe).__name__}"
            + (", which makes clips." if clips else f": its VAE is {type(vae).__name__}."),
            mend="Calibrate without --images.",
        )
    if captions and "prompt" not in arguments:
        raise UnsupportedError(
            f"the pictures have captions, and {type(pipe).__name__} takes no prompt.",
            mend="Take the .txt files out; of a pipeline with classes name them by --class, or in turn by --inputs.",
        )


def _packs(pipe: Any) -> bool:
    """Whether it lays latents out as tokens, as Flux does."""
    pack = getattr(pipe, "_pack_latents", None)
    return pack is not None and "num_channels_latents" in inspect.signature(pack).parameters


def read_picture(file: Path, height: int, width: int, *, gray: bool) -> Tensor:
    """(C, H, W) in -1 ... 1: the largest part in the middle that has this shape, scaled.

    Raises:
        ModelError: it is no picture, or damaged.
    """
    try:
        with Image.open(file) as opened:
            turned = ImageOps.exif_transpose(opened).convert("L" if gray else "RGB")
            fitted = ImageOps.fit(turned, (width, height), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise ModelError(f"{file} cannot be read as a picture: {error}.", mend="Take it out, or mend it.") from None
    values = torch.from_numpy(numpy.array(fitted)).float() / 127.5 - 1
    return values[None] if gray else values.permute(2, 0, 1)
