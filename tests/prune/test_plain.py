"""Components of every class, cut by config alone, as diffusers loads them where dacc cannot be imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dacc.core.safe_read import read_json
from dacc.prune.run import _written_config

from .test_remove import CASES, IDENTITIES, cut

PROGRAM = """
import sys
sys.modules["dacc"] = None
import json, pathlib, diffusers
found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    model, told = getattr(diffusers, name).from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    missing = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in told[kind]]
    found[folder.name] = [sum(value.numel() for value in model.parameters()), missing]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_class_loads_without_dacc_and_lacks_nothing(tmp_path: Path, run_python) -> None:
    wanted = {}
    for number, name in enumerate(case for case in CASES if case not in IDENTITIES):
        toy, removed, _ = CASES[name]
        network = toy.build()
        small, removal = cut(network, removed)
        network.save_config(tmp_path / "whole")
        config, changes = _written_config(read_json(tmp_path / "whole" / "config.json"), dict(network.config), removal)
        assert changes
        folder = tmp_path / "cut" / f"{number:02d}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        state = {key: value.contiguous() for key, value in small.state_dict().items()}
        save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        wanted[folder.name] = [sum(value.numel() for value in small.parameters()), []]
    assert json.loads(run_python(PROGRAM, tmp_path / "cut").stdout.splitlines()[-1]) == wanted
