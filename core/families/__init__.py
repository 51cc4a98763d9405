"""Which module plays which role in which denoiser. Data only: one file per family, found by the denoiser's class name.

Roles decide what a pass may do to a layer:

- `edge`: the first and last layers, which read and write latents; they stay 16-bit float.
- `temporal`: embedders of time and class and their projections; weight-only, at least 8 bits.
- `modulation`: adaLN linears, which turn the time embedding into shifts, scales, gates; weight-only, at least 4 bits.
- `text`: what reads the states of a text encoder for cross-attention: its keys and values, and projections before them.
  The first token of these states can be hundreds of times as large as the others, so no two tokens share a scale.
- `body`: everything else; takes the scheme that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Role = Literal["edge", "temporal", "modulation", "text", "body"]


@dataclass(frozen=True)
class Family:
    """Roles as glob patterns over module names; the first match in the order edge, temporal, modulation, text wins.

    Args:
        name: for messages.
        denoisers: class names of the models that belong to it.
        embedders: names, as globs, of the modules that give the embedding of time and class; those at one place in the
            network are summed.
        blocks: class names, as globs, of the modules that calibrated methods treat as one unit each.
        sensitive: names, as globs, of the few layers of the body that suffer most from low bits.
        stacks: names of the lists of transformer blocks, in the order in which they run; none for UNets.
    """

    name: str
    denoisers: tuple[str, ...]
    edge: tuple[str, ...]
    temporal: tuple[str, ...]
    modulation: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    embedders: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    sensitive: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()

    def role(self, module_name: str) -> Role:
        """The role of the layer called `module_name` (dotted path inside the denoiser)."""
        if _matches(module_name, self.edge):
            return "edge"
        if _matches(module_name, self.temporal):
            return "temporal"
        if _matches(module_name, self.modulation):
            return "modulation"
        if _matches(module_name, self.text):
            return "text"
        return "body"

    def is_sensitive(self, module_name: str) -> bool:
        """Whether a layer belongs to the few that methods for very low bits spare."""
        return _matches(module_name, self.sensitive)

    def is_embedder(self, module_name: str) -> bool:
        """Whether a layer is part of a module that embeds the time step, a class or a size; where the family names
        none, any temporal layer."""
        if not self.embedders:
            return self.role(module_name) == "temporal"
        parts = module_name.split(".")
        return any(_matches(".".join(parts[:length]), self.embedders) for length in range(1, len(parts) + 1))


def find_family(class_name: str) -> tuple[Family, bool]:
    """The family of a denoiser class, and whether it is really known (otherwise roles are guessed from names)."""
    from . import dit, flux, generic, pixart, sd3, unet

    for module in (unet, dit, pixart, sd3, flux):
        if class_name in module.FAMILY.denoisers:
            return module.FAMILY, True
    return generic.FAMILY, False


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
