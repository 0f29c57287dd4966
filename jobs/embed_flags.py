"""The flags of `embed`, for each verb that makes a run."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import flags
from jobs.input_flags import InputFlags
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class EmbedFlags(InputFlags):
    """What a run is told."""

    output: Annotated[str | None, typer.Option(help="The dataset's root: a folder or any fsspec URL")] = None
    model: Annotated[str | None, typer.Option(help="Any timm name, hf-hub:… or local-dir:…")] = None
    weights: Annotated[str, typer.Option(help="pretrained, random:SEED, or a .safetensors/.pth URL")] = "pretrained"
    outputs: Annotated[
        str | None, typer.Option(help="Beside the embedding: classes,tokens,features,heads [embedding,classes]")
    ] = None
    feature_indices: Annotated[str | None, typer.Option(help="Feature maps, as 0,2: out_indices of timm")] = None
    feature_names: Annotated[str | None, typer.Option(help="Features by name, as stage_1/block_2,features_all")] = None
    top_k: Annotated[int, typer.Option(help="Classes a row")] = 5
    labels: Annotated[str | None, typer.Option(help="Class names, one a line [the model's, else ImageNet's]")] = None
    only_metrics: Annotated[bool, typer.Option("--only-metrics", help="Classes and accuracy, no vectors")] = False
    image_size: Annotated[str | None, typer.Option(help="H or HxW [the model's own]")] = None
    in_chans: Annotated[int | None, typer.Option(help="Channels: 1 grey, 3 RGB, 4 RGBA [the model's own]")] = None
    num_classes: Annotated[int | None, typer.Option(help="Classes of the head; 0 drops it [the weights' own]")] = None
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto: bf16 where the hardware has it")] = "auto"
    engine: Annotated[str, typer.Option(help="eager, compile or openvino (CPU)")] = "eager"
    decode: Annotated[str, typer.Option(help="exact as timm; fast: 2 levels off; scaled, cuda: looser")] = "fast"
    no_exif_orientation: Annotated[bool, typer.Option("--no-exif-orientation", help="Leave images as stored")] = False
    normalize: Annotated[bool, typer.Option("--normalize", help="L2-normalise the embeddings")] = False
    vector_type: Annotated[str, typer.Option(help="float32 or float16")] = "float32"
    batch_size: Annotated[str, typer.Option(help="Images a forward pass, or auto")] = "auto"
    actors: Annotated[str | None, typer.Option(help="Pool size N or MIN:MAX [for this machine]")] = None
    gpus_per_actor: Annotated[float | None, typer.Option(help="Fractions allowed [by the cores of each GPU]")] = None
    feeders: Annotated[
        int | None, typer.Option(help="Processes that read and decode for the actors; 0: none [by the nodes' CPUs]")
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto"
    ray_address: Annotated[
        str | None, typer.Option(help="A running cluster, auto or host:port [a local one is started]")
    ] = None
    max_reject_rate: Annotated[float, typer.Option(help="Above it: exit 3, no version")] = 0.01
    stall_timeout: Annotated[float, typer.Option(help="Seconds without progress before the run ends with 4")] = 600
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, do nothing")] = False
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, last")] = False
    config: Annotated[str | None, typer.Option(help="A YAML file of these flags; the command line wins")] = None

    @property
    def ray(self) -> str | None:
        """The cluster's address, by the flag or by Ray's own variable; None: a Ray of this machine alone."""
        return flags.ray_address(self.ray_address)

    def check(self, verb: str) -> None:
        # This machine's RAY_ADDRESS says where to submit; the job has one of its own.
        replace(self, ray_address=self.ray_address or "local").run_config(verb)

    def run_config(self, verb: str) -> "RunConfig":
        """Raises `UsageError` naming the flag that is missing or the value that cannot be."""
        for flag, value in (("--input", self.input), ("--output", self.output), ("--model", self.model)):
            if not value:
                raise UsageError(f"{flag} is missing: see `shard2vec {verb} --help`")
        assert self.input and self.output and self.model
        from pipeline.config import Adapt, RunConfig

        return RunConfig(
            inputs=tuple(self.input),
            output=self.output,
            model=self.model,
            format=self.format,
            columns=self.columns,
            weights=self.weights,
            outputs=flags.words(self.outputs),
            feature_indices=flags.indices(self.feature_indices),
            feature_names=flags.words(self.feature_names),
            only_metrics=self.only_metrics,
            adapt=Adapt(image_size=flags.size(self.image_size), in_chans=self.in_chans, num_classes=self.num_classes),
            top_k=self.top_k,
            labels=self.labels,
            precision=self.precision,
            engine=self.engine,
            decode=self.decode,
            exif_orientation=not self.no_exif_orientation,
            normalize=self.normalize,
            vector_type=self.vector_type,
            batch_size=flags.batch_size(self.batch_size),
            actors=flags.pool(self.actors),
            gpus_per_actor=self.gpus_per_actor,
            feeders=self.feeders,
            device=self.device,
            ray_address=self.ray,
            max_reject_rate=self.max_reject_rate,
            stall_timeout_s=self.stall_timeout,
            dry_run=self.dry_run,
        )
