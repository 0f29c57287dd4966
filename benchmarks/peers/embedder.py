"""timm's model and transform, the same for every peer: seeded weights, body in the job's precision, head in float32."""

from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch

from benchmarks.peers.job import TOP, Job, mark


def data_config(model: str) -> dict[str, Any]:
    """What timm resolves for the model: input size, crop, interpolation, mean, std."""
    return dict(timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(model).to_dict()))


def transform_of(model: str) -> Callable[[Any], torch.Tensor]:
    """timm's own evaluation transform, from a Pillow image to float32 (3, H, W)."""
    return timm.data.create_transform(**data_config(model))


def network(model: str) -> torch.nn.Module:
    """As `shard2vec embed --weights random:0` has it."""
    torch.manual_seed(0)
    return timm.create_model(model).eval()


class Embedder:
    """Called with float32 (B, 3, H, W); gives the three columns beside the id."""

    def __init__(self, job: Job, threads: int):
        torch.set_num_threads(threads)
        self.net = network(job.model)
        self.job, self.called = job, False
        mark(job, "ready")

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.job.precision == "bf16"):
            body = self.net.forward_features(images)
        body = body.float()
        embedding = self.net.forward_head(body, pre_logits=True).flatten(1)
        score, index = self.net.forward_head(body).softmax(1).topk(TOP)
        if not self.called:
            self.called = True
            mark(self.job, "first")
        return {"embedding": embedding.numpy(), "topk_index": index.int().numpy(), "topk_score": score.numpy()}
