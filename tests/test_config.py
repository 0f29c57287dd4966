"""What a run may be asked, and what makes two sets two."""

from dataclasses import fields, replace

import made
import pytest

from pipeline.config import Adapt, RunConfig, TensorColumn
from pipeline.errors import UsageError

ASKED = {"inputs": ("in/*.tar",), "output": "out", "model": "test_vit"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "--input is missing"),
        ({"output": ""}, "--output is empty"),
        ({"format": "zip"}, "--format zip: choose one of webdataset, parquet, folder"),
        ({"precision": "int8"}, "--precision int8"),
        ({"vector_type": "int8"}, "--vector-type int8"),
        ({"device": "tpu"}, "--device tpu"),
        ({"outputs": ("logits",)}, "--outputs logits: choose one of embedding, classes, tokens, features, heads"),
        ({"feature_indices": (0, 2)}, "--feature-indices 0,2: add `features` to --outputs"),
        ({"feature_names": ("logits",), "outputs": ("tokens",)}, "--feature-names logits: add `features`"),
        ({"feature_names": ("",), "outputs": ("features",)}, "a name is empty"),
        ({"feature_names": ("a",), "feature_indices": (0,), "outputs": ("features",)}, "choose one of them"),
        ({"only_metrics": True, "normalize": True}, "leave out --normalize and --vector-type"),
        ({"only_metrics": True, "outputs": ("tokens",)}, "--only-metrics keeps no vectors: leave out --outputs tokens"),
        ({"weights": "random"}, "name the seed"),
        ({"weights": "random:x"}, "--weights random:x: the seed must be a whole number"),
        ({"weights": "random:99999999999999999999"}, "--weights random:9999"),
        ({"batch_size": 10_000}, "--batch-size 10000: must be 4096 or less"),
        ({"top_k": 0}, "--top-k 0: must be 1 or more"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_reject_rate": 1.5}, "--max-reject-rate 1.5: must lie between 0 and 1"),
        ({"max_reject_rate": float("nan")}, "--max-reject-rate nan"),
        ({"stall_timeout_s": 0}, "--stall-timeout 0"),
        ({"actors": (3, 2)}, "--actors 3:2"),
        ({"gpus_per_actor": -1.0}, "--gpus-per-actor -1.0"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict, message: str) -> None:
    """The flag and the value stand in the message."""
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        RunConfig(**(ASKED | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (0, 224)}, "--image-size 0x224: must have 1 to 4194304 pixels"),
        ({"image_size": (224, 99_999)}, "--image-size 224x99999"),
        ({"in_chans": 0}, "--in-chans 0: must be 1 or more"),
        ({"num_classes": -1}, "--num-classes -1: must be 0 or more"),
    ],
)
def test_an_impossible_architecture_is_refused_by_name(change: dict, message: str) -> None:
    """Before a model is built."""
    with pytest.raises(UsageError, match=message):
        Adapt(**change)


def test_everything_that_changes_a_vector_changes_the_fingerprint() -> None:
    """Each field of a set alone makes another set."""
    base = made.vector_set()
    other = {
        "preprocessing": replace(base.preprocessing, crop_pct=0.5),
        "outputs": ("embedding",),
        "tensors": (TensorColumn(kind="tokens", column="tokens", source="x", shapes=((1, 2),), layouts=("NLC",)),),
        "exif_orientation": False,
        "normalized": True,
    }
    names = {base.name}
    for field in fields(base):
        value = getattr(base, field.name)
        changed = other.get(field.name, value + 1 if isinstance(value, int) else f"{value}x")
        names.add(replace(base, **{field.name: changed}).name)
    assert len(names) == len(fields(base)) + 1


def test_a_sets_name_is_stable_and_fit_for_a_path() -> None:
    """The same configuration has the same name tomorrow, and a hub's slashes do not make folders."""
    assert made.vector_set().name == made.vector_set().name
    assert replace(made.vector_set(), model="hf-hub:timm/vit").name.startswith("hf-hub_timm_vit@")
