"""A stopped training goes on exactly, and the Frechet distance is the one of the formula."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

TRAIN = Path(__file__).resolve().parents[2] / "zoo" / "train"


def load_script(name: str) -> ModuleType:
    """The training scripts are reached by path: they are no part of the package."""
    spec = importlib.util.spec_from_file_location(f"zoo_train_{name}", TRAIN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


trainer, frechet = load_script("trainer"), load_script("frechet")


class Stopped(Exception):
    """Stands for the process being killed."""


def fit_line(model: nn.Module, generator: torch.Generator) -> Tensor:
    inputs = torch.randn(8, 3, generator=generator)
    return (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()


def make_line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_a_stopped_run_ends_with_the_same_weights_as_one_that_was_not(tmp_path: Path) -> None:
    config = trainer.TrainConfig(
        name="line", steps=12, batch_size=8, learning_rate=0.1, checkpoint_every=4, work=tmp_path / "whole"
    )
    whole = trainer.train(make_line(), fit_line, config, lambda model: None)

    def stop(model: nn.Module) -> None:
        raise Stopped

    broken = replace(config, work=tmp_path / "broken")
    with pytest.raises(Stopped):
        trainer.train(make_line(), fit_line, broken, stop)
    resumed = trainer.train(make_line(), fit_line, broken, lambda model: None)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)


def test_the_rate_rises_stays_and_falls_to_nearly_nothing() -> None:
    config = trainer.TrainConfig(
        name="line", steps=100, batch_size=8, learning_rate=1.0, warmup_steps=10, decay_fraction=0.5
    )
    assert config.rate_at(0) == pytest.approx(0.1)
    assert config.rate_at(30) == 1.0
    assert config.rate_at(99) == pytest.approx(0.02)


def test_replacing_a_folder_leaves_only_the_new_files(tmp_path: Path) -> None:
    for name in ("first", "second"):

        def write(fresh: Path, name: str = name) -> None:
            fresh.mkdir()
            (fresh / name).touch()

        trainer.replace_folder(tmp_path / "export", write)
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "second"]


def test_frechet_distance_equals_the_sum_over_axes_for_diagonal_covariances() -> None:
    first = frechet.Gaussian(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double())
    second = frechet.Gaussian(torch.tensor([2.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double())
    assert frechet.frechet_distance(first, second) == pytest.approx(2**2 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_frechet_distance_equals_the_matrix_square_root_for_any_covariances() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator) for _ in range(2)]
    first, second = (frechet.fit_gaussian(each) for each in features)
    root = torch.from_numpy(linalg.sqrtm((first.covariance @ second.covariance).numpy()).real)
    expected = (first.mean - second.mean).square().sum() + (first.covariance + second.covariance - 2 * root).trace()
    assert frechet.frechet_distance(first, second) == pytest.approx(float(expected))


def test_a_run_is_not_taken_up_with_other_settings(tmp_path: Path) -> None:
    config = trainer.TrainConfig(name="line", steps=4, batch_size=8, learning_rate=0.1, work=tmp_path)
    trainer.train(make_line(), fit_line, config, lambda model: None)
    with pytest.raises(SystemExit, match="delete its folder"):
        trainer.train(make_line(), fit_line, replace(config, seed=1), lambda model: None)
