"""`embed`: the main job. The same command again resumes, and again later embeds only what changed."""

from typing import Annotated

import typer

from jobs import exits, flags
from pipeline import head
from pipeline.errors import UsageError


def embed(
    input: Annotated[
        list[str] | None, typer.Option(help="A tar, Parquet file, folder, glob or @list; repeatable")
    ] = None,
    output: Annotated[str | None, typer.Option(help="The dataset's root: a folder or any fsspec URL")] = None,
    model: Annotated[str | None, typer.Option(help="Any timm name, hf-hub:… or local-dir:…")] = None,
    format: Annotated[str | None, typer.Option(help="webdataset, parquet or folder [from the name]")] = None,
    image_column: Annotated[str | None, typer.Option(help="Parquet: bytes, or {bytes, path} [found]")] = None,
    key_column: Annotated[str | None, typer.Option(help="Parquet: the id of each row [found, else its number]")] = None,
    uri_column: Annotated[str | None, typer.Option(help="Parquet: image URLs to fetch [found]")] = None,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(
            help="Parquet: beginning of image URLs to fetch though local, private, of other buckets; repeatable"
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="pretrained, random:SEED, or a .safetensors/.pth URL")] = "pretrained",
    outputs: Annotated[
        str | None, typer.Option(help="Beside the embedding: classes,tokens,features,heads [embedding,classes]")
    ] = None,
    feature_indices: Annotated[str | None, typer.Option(help="Feature maps, as 0,2: out_indices of timm")] = None,
    feature_names: Annotated[str | None, typer.Option(help="Features by name, as stage_1/block_2,features_all")] = None,
    top_k: Annotated[int, typer.Option(help="Classes a row")] = 5,
    labels: Annotated[str | None, typer.Option(help="Class names, one a line [the model's, else ImageNet's]")] = None,
    only_metrics: Annotated[bool, typer.Option("--only-metrics", help="Classes and accuracy, no vectors")] = False,
    image_size: Annotated[str | None, typer.Option(help="H or HxW [the model's own]")] = None,
    in_chans: Annotated[int | None, typer.Option(help="Channels: 1 grey, 3 RGB, 4 RGBA [the model's own]")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the head; 0 drops it [the weights' own]")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto: bf16 where the hardware has it")] = "auto",
    engine: Annotated[str, typer.Option(help="eager, compile or openvino (CPU)")] = "eager",
    decode: Annotated[str, typer.Option(help="exact as timm; fast: 2 levels off; scaled, cuda: looser")] = "fast",
    no_exif_orientation: Annotated[bool, typer.Option("--no-exif-orientation", help="Leave images as stored")] = False,
    normalize: Annotated[bool, typer.Option("--normalize", help="L2-normalise the embeddings")] = False,
    vector_type: Annotated[str, typer.Option(help="float32 or float16")] = "float32",
    batch_size: Annotated[str, typer.Option(help="Images a forward pass, or auto")] = "auto",
    actors: Annotated[str | None, typer.Option(help="Pool size N or MIN:MAX [for this machine]")] = None,
    gpus_per_actor: Annotated[float | None, typer.Option(help="Fractions allowed [by the cores of each GPU]")] = None,
    feeders: Annotated[
        int | None, typer.Option(help="Processes that read and decode for the actors; 0: none [by the nodes' CPUs]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    ray_address: Annotated[
        str | None, typer.Option(help="A running cluster, auto or host:port [a local one is started]")
    ] = None,
    max_reject_rate: Annotated[float, typer.Option(help="Above it: exit 3, no version")] = 0.01,
    stall_timeout: Annotated[float, typer.Option(help="Seconds without progress before the run ends with 4")] = 600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, do nothing")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, last")] = False,
    config: Annotated[str | None, typer.Option(help="A YAML file of these flags; the command line wins")] = None,
) -> None:
    """Classify and embed every image of the input, once, into plain Parquet.

    The same command resumes after a crash, and embeds only what changed when the input did.

    Example: shard2vec embed --input 'shards/*.tar' --output out --model pit_s_224 --weights random:0
    """

    address = flags.ray_address(ray_address)

    def body() -> int:
        for flag, value in (("--input", input), ("--output", output), ("--model", model)):
            if not value:
                raise UsageError(f"{flag} is missing: see `shard2vec embed --help`")
        assert input and output and model
        from pipeline.config import Adapt, RunConfig
        from pipeline.listing import Columns
        from pipeline.run import embed as run

        result = run(
            RunConfig(
                inputs=tuple(input),
                output=output,
                model=model,
                format=format,
                columns=Columns(image=image_column, key=key_column, uri=uri_column, allow_urls=tuple(allow_url or ())),
                weights=weights,
                outputs=flags.words(outputs),
                feature_indices=flags.indices(feature_indices),
                feature_names=flags.words(feature_names),
                only_metrics=only_metrics,
                adapt=Adapt(image_size=flags.size(image_size), in_chans=in_chans, num_classes=num_classes),
                top_k=top_k,
                labels=labels,
                precision=precision,
                engine=engine,
                decode=decode,
                exif_orientation=not no_exif_orientation,
                normalize=normalize,
                vector_type=vector_type,
                batch_size=flags.batch_size(batch_size),
                actors=flags.pool(actors),
                gpus_per_actor=gpus_per_actor,
                feeders=feeders,
                device=device,
                ray_address=address,
                max_reject_rate=max_reject_rate,
                stall_timeout_s=stall_timeout,
                dry_run=dry_run,
            ),
            exits.say,
        )
        exits.say(f"shard2vec: {result.message}")
        if json:
            exits.print_json(result.json)
        return result.exit_code

    # While torch is imported Ray starts, or the cluster is asked.
    is_early = not dry_run and head.is_early(output)
    with head.reaching(address) if address else head.starting(is_early, max(0, feeders or 0)):
        exits.run(body, json)
