from __future__ import annotations

import torch

from dacc.cache.capture import capture_batches
from dacc.core.reporter import silent
from dacc.runtime.request import RunRequest


def test_every_batch_has_the_noise_and_the_classes_of_its_own_samples(dit_pipeline):
    pipe = dit_pipeline()
    request = RunRequest(seeds=(5, 6, 7, 8), num_inference_steps=2, guidance_scale=1.0, class_labels=(2, 1, 0))

    def entering(batch_size: int) -> tuple[list[int], torch.Tensor]:
        asked = request.model_copy(update={"batch_size": batch_size})
        batches = capture_batches(pipe, "transformer", asked, silent(), "profiling")
        first = [calls[0][0] for _, calls in batches]
        labels = [label for call in first for label in call.kwargs["class_labels"].tolist()]
        return labels, torch.cat([call.args[0] for call in first])

    labels, noise = entering(4)
    assert labels == [2, 1, 0, 2]
    for size in (1, 3):
        assert entering(size)[0] == labels
        assert torch.equal(entering(size)[1], noise)
