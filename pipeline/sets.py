"""What was asked for, and the model that it names → the set that its vectors belong to, and the names of classes."""

import torch

from pipeline import backbone, weights
from pipeline.config import OUTPUTS, RunConfig, VectorSet
from pipeline.cuda_images import why_not_there
from pipeline.errors import UsageError
from pipeline.resizing import KERNELS, why_not_fast
from pipeline.storage import digest, redact


def check_device(config: RunConfig, device: str) -> None:
    """Raises `UsageError` for what this device does not do. `device`: cpu or cuda."""
    if device == "cpu" and config.gpus_per_actor:
        raise UsageError(f"--gpus-per-actor {config.gpus_per_actor}: the device is the CPU")
    if config.decode == "cuda" and device == "cpu":
        raise UsageError("--decode cuda: the device is the CPU; --decode fast decodes there")
    if config.decode == "cuda" and config.feeders:
        raise UsageError(f"--decode cuda: --feeders {config.feeders} send decoded images; use --decode fast with them")


def decoding_note(vectors: VectorSet, is_here: bool) -> str:
    """A sentence where this model, or this processor if it `is_here` that images are decoded, gets a slower way than
    `--decode` names; "" where it does not.

    The vectors are within the bound of what was asked for all the same.
    """
    told, how = list[str](), vectors.decode
    if how == "cuda" and (why := why_not_there(vectors.preprocessing)):
        told.append(f"{why}, which the processor decodes and not the device")
    if how != "exact" and (why := why_not_fast(vectors.preprocessing, None if is_here else KERNELS[0])):
        told.append(f"{why}: they are resized as by exact, which takes longer")
    return f"--decode {how}: {'; '.join(told)}" if told else ""


def vector_set(config: RunConfig, module: torch.nn.Module, precision: str) -> tuple[VectorSet, tuple[str, ...]]:
    """The set and the names of its classes, one a class or none. `module`: with its weights loaded;
    `precision`: resolved.

    Raises `UsageError` for outputs that this model does not have, and labels that do not fit it.
    """
    facts = backbone.facts_of(module, config.model, config.outputs or (), config.feature_indices, config.feature_names)
    outputs, top_k = _outputs(config, facts)
    labels, source = _labels(config, facts) if top_k else ((), "none")
    vectors = VectorSet(
        model=config.model,
        architecture=weights.architecture_of(config.model),
        weights_sha256=weights.sha256(module.state_dict()),
        preprocessing=facts.preprocessing,
        exif_orientation=config.exif_orientation,
        precision=precision,
        engine=config.engine,
        decode=config.decode,
        outputs=outputs,
        tensors=facts.tensors,
        pooling=facts.pooling,
        dim=facts.dim,
        classes=facts.classes,
        top_k=top_k,
        labels_sha256=digest(*labels) if labels else "",
        labels_source=source,
        normalized=config.normalize,
        vector_type=config.vector_type,
    )
    return vectors, labels


def _outputs(config: RunConfig, facts: backbone.Facts) -> tuple[tuple[str, ...], int]:
    """The outputs asked for, in the contract's order, and k: 0 without classes, never more than there are classes."""
    if config.only_metrics:
        wanted = {"classes"}
    elif config.outputs is None:
        wanted = {"embedding", "classes"} if facts.classes else {"embedding"}
    else:
        wanted = {"embedding", *config.outputs}
        if "heads" in wanted:
            wanted.add("classes")  # the mean of both heads, beside the heads
    if "classes" in wanted and not facts.classes:
        flag = "--only-metrics" if config.only_metrics else "--outputs classes"
        raise UsageError(f"{flag}: {config.model} has no classifier, with these weights")
    if config.labels is not None and "classes" not in wanted:
        raise UsageError(f"--labels {redact(config.labels)}: no classes are kept; add `classes` to --outputs")
    outputs = tuple(o for o in OUTPUTS if o in wanted)
    return outputs, min(config.top_k, facts.classes) if "classes" in outputs else 0


def _labels(config: RunConfig, facts: backbone.Facts) -> tuple[tuple[str, ...], str]:
    if config.labels is not None:
        return backbone.read_labels(config.labels, facts.classes), "file"
    return facts.label_names, facts.labels_source
