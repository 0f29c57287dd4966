"""What a run was asked for (`RunConfig`) and what decides a vector (`VectorSet`, with the set's fingerprint)."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from pipeline.errors import UsageError
from pipeline.images import Preprocessing
from pipeline.listing import FORMATS, Columns
from pipeline.storage import redact

SCHEMA_VERSION = 3  # raise it with any change of the output's columns or of how a vector is made
OUTPUTS = ("embedding", "classes", "tokens", "features", "heads")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
VECTOR_TYPES = ("float32", "float16")
ENGINES = ("eager", "compile", "openvino")
DECODES = ("exact", "fast", "scaled", "cuda")
DEVICES = ("auto", "cpu", "cuda")
MAX_BATCH = 4096  # half a row group, and more than any device gains from
MAX_INPUT_PIXELS = 2048 * 2048  # of a model's input: 16,384 patches of 16x16, each looking at each
MAX_SEED = 2**63 - 1  # what torch.manual_seed takes


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """How a model is built other than by its own configuration; None keeps the model's own."""

    image_size: tuple[int, int] | None = None  # height, width
    in_chans: int | None = None
    num_classes: int | None = None  # 0: without its classifier

    def __post_init__(self) -> None:
        if self.image_size is not None and not 0 < math.prod(self.image_size) <= MAX_INPUT_PIXELS:
            raise UsageError(
                f"--image-size {'x'.join(map(str, self.image_size))}: must have 1 to {MAX_INPUT_PIXELS} pixels"
            )
        _at_least("--in-chans", self.in_chans, 1)
        _at_least("--num-classes", self.num_classes, 0)

    def of_classes(self, classes: int) -> "Adapt":
        """For weights whose head has so many; 0: none, or as it was asked for."""
        return replace(self, num_classes=classes or self.num_classes)


@dataclass(frozen=True, kw_only=True)
class TensorColumn:
    """A column that holds one tensor of each row, or several one after the other, as a flat fixed-size list."""

    kind: str  # the file that it lies in: tokens, features or heads
    column: str
    source: str  # what of the model: forward_features, an index of the feature maps, a name, or the two heads
    shapes: tuple[tuple[int, ...], ...]  # of one row; several where the model gives a list
    layouts: tuple[str, ...]  # of a batch, one for each shape: NLC, NCHW, NHWC, NC …
    dtype: str = "float16"

    @property
    def size(self) -> int:
        """Values a row."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One `embed` run as its user asked for it. Raises `UsageError` naming the value that cannot be."""

    inputs: tuple[str, ...]  # URLs: files, folders, globs, @lists
    output: str  # URL of the dataset's root
    model: str  # a timm name, hf-hub:… or local-dir:…

    format: str | None = None  # None: from the names
    columns: Columns = field(default_factory=Columns)
    weights: str = "pretrained"  # or random:SEED, or a URL of a .safetensors or .pth file
    outputs: tuple[str, ...] | None = None  # beside the embedding; None: classes where the model has a classifier
    top_k: int = 5
    labels: str | None = None  # URL of a text file, a class name a line; None: the model's own, else ImageNet's
    feature_indices: tuple[int, ...] | None = None  # timm's `out_indices`; None: the model's own choice
    feature_names: tuple[str, ...] | None = None  # tfimm's names, as patch_embedding or stage_1/block_2
    only_metrics: bool = False  # rows without vectors: classes, labels, and the accuracy over them
    adapt: Adapt = field(default_factory=Adapt)  # another input size, channel or class count than the model's own
    precision: str = "auto"
    engine: str = "eager"
    decode: str = "fast"  # the vectors hardly change (tests say by how much), and it takes half the time
    exif_orientation: bool = True
    normalize: bool = False
    vector_type: str = "float32"
    batch_size: int | None = None  # None: found
    actors: tuple[int, int] | None = None  # least and most; None: chosen for this machine
    gpus_per_actor: float | None = None  # None: on cuda by the cores of each GPU, 0 on the CPU
    feeders: int | None = None  # processes that read and decode for the actors; 0: none; None: by the nodes' CPUs
    device: str = "auto"
    ray_address: str | None = None  # a running cluster: auto or host:port; None: a local Ray, or the one in use
    max_reject_rate: float = 0.01  # of all samples; one broken image in a hundred is a shard worth looking at
    stall_timeout_s: float = 600.0
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not self.inputs or not all(self.inputs):
            raise UsageError("--input is missing: name a tar, a Parquet file, a folder, a glob or @list.txt")
        for flag, value in (("--output", self.output), ("--model", self.model), ("--weights", self.weights)):
            if not value:
                raise UsageError(f"{flag} is empty")
        if self.output.lower().startswith(("http://", "https://")):
            raise UsageError(f"--output {redact(self.output)}: a web server takes no files: name a folder or a bucket")
        _one_of("--format", self.format, (*FORMATS, None))
        _one_of("--precision", self.precision, PRECISIONS)
        _one_of("--engine", self.engine, ENGINES)
        _one_of("--decode", self.decode, DECODES)
        _one_of("--vector-type", self.vector_type, VECTOR_TYPES)
        _one_of("--device", self.device, DEVICES)
        self._check_outputs()
        if self.weights.startswith("random:"):
            seed = self.weights.removeprefix("random:")
            if not (seed.isascii() and seed.isdecimal() and int(seed) <= MAX_SEED):
                raise UsageError(f"--weights {self.weights}: the seed must be a whole number, as in random:0")
        if self.weights == "random":
            raise UsageError("--weights random: name the seed, as in random:0")
        _at_least("--top-k", self.top_k, 1)
        _at_least("--batch-size", self.batch_size, 1)
        if self.batch_size is not None and self.batch_size > MAX_BATCH:
            raise UsageError(f"--batch-size {self.batch_size}: must be {MAX_BATCH} or less")
        _at_least("--feeders", self.feeders, 0)
        _at_least("--stall-timeout", self.stall_timeout_s, 1)
        if not 0 <= self.max_reject_rate <= 1:
            raise UsageError(f"--max-reject-rate {self.max_reject_rate}: must lie between 0 and 1")
        self._check_ray_address()
        if self.gpus_per_actor is not None and not 0 <= self.gpus_per_actor < math.inf:
            raise UsageError(f"--gpus-per-actor {self.gpus_per_actor}: must be 0 or more")
        if self.actors is not None and not 1 <= self.actors[0] <= self.actors[1]:
            raise UsageError(f"--actors {self.actors[0]}:{self.actors[1]}: must be N or MIN:MAX with 1 <= MIN <= MAX")

    def _check_ray_address(self) -> None:
        address = self.ray_address
        if address is None or address == "auto":
            return
        if "://" in address:
            raise UsageError(
                f"--ray-address {address}: must be host:port or auto, on a node of the cluster; "
                "from elsewhere, `shard2vec submit` sends the command there"
            )
        host, _, port = address.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise UsageError(f"--ray-address {address}: must be host:port or auto")

    def _check_outputs(self) -> None:
        for output in self.outputs or ():
            _one_of("--outputs", output, OUTPUTS)
        if self.only_metrics and self.outputs is not None:
            raise UsageError(f"--only-metrics keeps no vectors: leave out --outputs {','.join(self.outputs)}")
        if self.only_metrics and (self.normalize or self.vector_type != "float32"):
            raise UsageError("--only-metrics keeps no vectors: leave out --normalize and --vector-type")
        for flag, value in (("--feature-indices", self.feature_indices), ("--feature-names", self.feature_names)):
            if value is not None and "features" not in (self.outputs or ()):
                raise UsageError(f"{flag} {','.join(map(str, value))}: add `features` to --outputs")
            if value is not None and not all(v != "" for v in value):
                raise UsageError(f"{flag} {','.join(map(str, value))}: a name is empty")
        if self.feature_indices is not None and self.feature_names is not None:
            raise UsageError("--feature-indices and --feature-names: choose one of them")


def _one_of(flag: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise UsageError(f"{flag} {value}: choose one of {', '.join(k for k in known if k)}")


def _at_least(flag: str, value: float | None, least: float) -> None:
    if value is not None and not least <= value < math.inf:
        raise UsageError(f"{flag} {value}: must be {least} or more")


@dataclass(frozen=True, kw_only=True)
class VectorSet:
    """Everything that changes a vector or its row, resolved: equal sets may be mixed, others never are."""

    model: str
    architecture: str  # timm's name, and of local-dir: and hf-hub: what their configuration builds it with
    weights_sha256: str
    preprocessing: Preprocessing
    exif_orientation: bool
    precision: str  # fp32, bf16 or fp16; never auto
    engine: str
    decode: str
    outputs: tuple[str, ...]
    tensors: tuple[TensorColumn, ...]  # tokens, feature maps and heads, where they are kept
    pooling: str
    dim: int  # of the embedding
    classes: int  # 0: the model has no classifier
    top_k: int  # 0: no classes are stored
    labels_sha256: str  # "" where the classes have no names
    labels_source: str  # file, model, imagenet (inferred from the class count) or none
    normalized: bool
    vector_type: str
    schema_version: int = SCHEMA_VERSION

    def as_dict(self) -> dict[str, Any]:
        """JSON's own types only, so that what is read back from a file compares equal."""
        return dict(json.loads(json.dumps(asdict(self))))

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits of the SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """`<model>@<fingerprint>`, fit for a path: what a file name cannot hold becomes `_`."""
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in self.model)
        return f"{safe}@{self.fingerprint}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of files that each shard becomes, the embeddings last: they commit it."""
        return ("rejects", *dict.fromkeys(column.kind for column in self.tensors), "embeddings")

    def columns_of(self, kind: str) -> tuple[TensorColumn, ...]:
        return tuple(column for column in self.tensors if column.kind == kind)

    @property
    def folder(self) -> str:
        return f"sets/{self.name}"
