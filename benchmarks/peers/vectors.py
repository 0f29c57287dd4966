"""Are a peer's vectors the right ones? Every image once, and a sample of rows against timm in float32.

A vector's error is relative to how far images lie apart, since the vectors of a random backbone have much in common.
timm's own bf16 loop comes to 0.02–0.05, an image turned left to right to 0.5 and more, another image to 2.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.peers.embedder import network, transform_of
from benchmarks.peers.job import Job

SAMPLE = 24  # rows that are compared
VECTOR_BOUND = {"fp32": 0.02, "bf16": 0.1}  # of the distance to the sample's mean; fp32 leaves room for a fast decode
SCORE_BOUND = {"fp32": 0.01, "bf16": 0.05}  # of the probability
COLUMNS = ["id", "embedding", "topk_index", "topk_score"]


class Oracle:
    """What is right for one model: all ids, and a sample's embeddings and probabilities in float32."""

    def __init__(self, job: Job):
        self.ids = sorted(f"{path.parent.name}/{path.stem}" for path in job.files.glob("*/*.jpg"))
        self.sample = self.ids[:: max(1, len(self.ids) // SAMPLE)][:SAMPLE]
        self.precision = job.precision
        net, transform = network(job.model), transform_of(job.model)
        images = torch.stack([transform(Image.open(job.files / f"{i}.jpg").convert("RGB")) for i in self.sample])
        with torch.inference_mode():
            body = net.forward_features(images)
            self.embedding = net.forward_head(body, pre_logits=True).flatten(1).numpy()
            self.probability = net.forward_head(body).softmax(1).numpy()

    def objection(self, files: Sequence[Path]) -> str | None:
        """Why these files are not the job's result; None where they are."""
        if not files:
            return "wrote no vectors"
        table = pa.concat_tables(pq.read_table(path, columns=COLUMNS) for path in files)
        ids = table["id"].to_pylist()
        if sorted(ids) != self.ids:
            return f"{len(ids)} rows with {len(set(ids) & set(self.ids))} of {len(self.ids)} ids"
        at = {sample_id: row for row, sample_id in enumerate(ids)}
        found = table.take([at[i] for i in self.sample])
        embedding, index, score = (np.array(found[name].to_pylist()) for name in COLUMNS[1:])
        return self._vectors(embedding) or self._scores(index, score)

    def _vectors(self, embedding: np.ndarray) -> str | None:
        apart = np.linalg.norm(self.embedding - self.embedding.mean(0), axis=1)
        error = float((np.linalg.norm(embedding - self.embedding, axis=1) / apart).max())
        bound = VECTOR_BOUND[self.precision]
        return None if error <= bound else f"wrong vectors: error {error:.3f}, at most {bound}"

    def _scores(self, index: np.ndarray, score: np.ndarray) -> str | None:
        """Each score is its class's probability, and the first is the largest of all."""
        right = np.take_along_axis(self.probability, index.astype(np.int64), 1)
        errors = np.abs(score - right) / right
        behind = 1 - score[:, 0] / self.probability.max(1)
        error, bound = float(np.concatenate([errors.ravel(), behind]).max()), SCORE_BOUND[self.precision]
        return None if error <= bound else f"wrong scores: error {error:.3f}, at most {bound}"
