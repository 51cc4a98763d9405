"""Names to method files. A method is one file in a `methods/` folder; its file name is its name on the command line.
Listing a folder imports nothing; asking for one method imports that file alone. Its import errors are never hidden."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import nearest
from .errors import ConfigError


class Registry:
    """The methods of one folder.

    Args:
        kind: what the folder holds, for messages ("quantization method").
        package: the folder's package, for example `dacc.quant.methods`.
        folder: the folder on disk.
        dashed: names are written with a dash where the files have an underscore (`every-step`, every_step.py).
    """

    def __init__(self, kind: str, package: str, folder: Path, *, dashed: bool = False) -> None:
        self.kind, self.package, self.folder = kind, package, folder
        self.dashed = dashed

    def names(self) -> list[str]:
        """Known names, sorted, without importing anything."""
        stems = (file.stem for file in self.folder.glob("*.py") if not file.stem.startswith("_"))
        return sorted(stem.replace("_", "-") if self.dashed else stem for stem in stems)

    def check(self, name: str) -> None:
        """Refuse an unknown name without importing anything.

        Raises:
            ConfigError: no such file; the nearest names are given.
        """
        if name not in self.names():
            raise ConfigError(f"there is no {self.kind} {name!r}.", mend=nearest(name, self.names()))

    def fact(self, name: str, constant: str, default: Any = None) -> Any:
        """What the file of a method says of it in a constant at its top level, read without importing the file.

        Raises:
            ConfigError: as `check`.
        """
        self.check(name)
        for node in ast.parse(self._file(name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == constant for target in targets):
                    return ast.literal_eval(node.value)
        return default

    def load(self, name: str) -> ModuleType:
        """Import the file of one method; raises like `check`."""
        self.check(name)
        return importlib.import_module(f"{self.package}.{self._file(name).stem}")

    def _file(self, name: str) -> Path:
        return self.folder / f"{name.replace('-', '_') if self.dashed else name}.py"
