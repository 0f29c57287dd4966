"""Tokens, feature maps, named features and heads: timm's own numbers, from one pass, whatever the layout."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import oracle
import pytest
import timm
import torch

from pipeline.backbone import Backbone, Vectors, facts_of
from pipeline.errors import UsageError
from pipeline.features import feature_names

PIT_NAMES = {"pit_ti_224": 18, "pit_xs_224": 18, "pit_s_distilled_224": 18, "pit_b_224": 19, "pit_b_distilled_224": 19}


def images(model: str, n: int = 2) -> torch.Tensor:
    size = timm.data.resolve_data_config({}, model=oracle.shared(model))["input_size"]
    return torch.randint(0, 256, (n, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def passed(
    model: str, outputs: tuple[str, ...], batch: torch.Tensor | None = None, **asked: Any
) -> tuple[Any, Vectors]:
    """The columns' facts, and what one pass gives for them."""
    facts = facts_of(oracle.shared(model), model, outputs, **asked)
    backbone = Backbone(oracle.module(model), batch_size=4, tensors=facts.tensors)
    return facts.tensors, backbone(images(model) if batch is None else batch)


def plain(model: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """timm's module and the normalised batch, for its own calls."""
    net = oracle.shared(model)
    return net, Backbone(net, batch_size=4).normalize(images(model))


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1).half()


@pytest.mark.by_model
@pytest.mark.parametrize("model", oracle.SEEDS)
def test_one_pass_gives_what_timms_separate_calls_give(model: str) -> None:
    """Embedding, scores, tokens and maps of the seeds have the bits of timm's own calls."""
    distilled = ("heads",) if "distilled" in model else ()
    columns, got = passed(model, ("tokens", "features", *distilled))
    net, x = plain(model)
    with torch.inference_mode():
        body = net.forward_features(x)
        assert torch.equal(got.embedding, net.forward_head(body, pre_logits=True))
        assert torch.equal(got.topk_score, net(x).softmax(1).topk(5).values)
        by_column = dict(zip((f.column for f in columns), got.tensors, strict=True))
        assert torch.equal(by_column["tokens"], flat(body))
        maps = net.forward_intermediates(x, indices=[int(f.source) for f in columns if f.kind == "features"])[1]
        assert all(torch.equal(by_column[f"feature_{i}"], flat(m)) for i, m in enumerate(maps))
        if distilled:
            heads = torch.stack([net.head(body[:, 0]), net.head_dist(body[:, 1])], 1)
            assert torch.equal(by_column["heads"], heads.flatten(1))  # float32, no rounding
            assert torch.equal(heads.mean(1).softmax(1).topk(5).values, got.topk_score)


def test_the_body_runs_once_a_batch_whatever_is_asked() -> None:
    """Tokens and maps cost no second pass."""
    columns = facts_of(oracle.module("test_vit"), "test_vit", ("tokens", "features")).tensors
    net = oracle.module("test_vit")
    calls = []
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    Backbone(net, batch_size=2, tensors=columns)(images("test_vit"))
    assert calls == [1]


@pytest.mark.parametrize(
    ("model", "shapes", "layouts"),
    [
        ("pit_ti_distilled_224", ((2, 256),), ("NLC",)),
        ("swin_tiny_patch4_window7_224", ((7, 7, 768),), ("NHWC",)),
        ("resnet10t", ((512, 6, 6),), ("NCHW",)),
        ("crossvit_tiny_240", ((401, 96), (197, 192)), ("NLC", "NLC")),
        ("coat_lite_tiny", ((50, 320),), ("NLC",)),
        ("coat_tiny", ((785, 152), (197, 152), (50, 152)), ("NLC",) * 3),
    ],
)
def test_tokens_record_their_layout(model: str, shapes: tuple, layouts: tuple[str, ...]) -> None:
    """Sequences, maps with channels second or last, and lists: each kept flat, told apart by its metadata."""
    (column,), got = passed(model, ("tokens",))
    assert (column.shapes, column.layouts, column.source) == (shapes, layouts, "forward_features")
    net, x = plain(model)
    with torch.inference_mode():
        body = net.forward_features(x)
    parts = list(body) if isinstance(body, list | tuple) else [body]
    assert torch.equal(got.tensors[0], torch.cat([flat(p) for p in parts], 1))
    assert got.tensors[0].shape == (2, column.size)


@pytest.mark.parametrize(("asked", "sources"), [((2, 0), "20"), ((0, 2), "02"), ((-1, 0, -1), "202"), (None, "012")])
def test_maps_come_in_the_order_asked_for(asked: tuple[int, ...] | None, sources: str) -> None:
    """timm gives them in order of depth, each once; a user who asks 2,0 or one twice gets just that."""
    columns, got = passed("pit_ti_224", ("features",), feature_indices=asked)
    assert [f.column for f in columns] == [f"feature_{i}" for i in range(len(sources))]
    assert "".join(f.source for f in columns) == sources
    wrapped = oracle.module("pit_ti_224")
    with torch.inference_mode():
        maps = wrapped.forward_intermediates(plain("pit_ti_224")[1])[1]
    assert all(torch.equal(v, flat(maps[int(s)])) for v, s in zip(got.tensors, sources, strict=True))


@pytest.mark.parametrize("asked", [(3,), (-4,)])
def test_a_map_that_is_not_there_is_refused(asked: tuple[int, ...]) -> None:
    """With the indices that there are."""
    with pytest.raises(UsageError, match="pit_ti_224 has feature maps 0 to 2"):
        passed("pit_ti_224", ("features",), feature_indices=asked)


# names


def tfimm_pit(net: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """PiT layer by layer, everything kept under tfimm's names; sequences begin with the class tokens."""
    seen: dict[str, torch.Tensor] = {}
    grid = net.patch_embed(x) + net.pos_embed
    tokens = net.cls_token.expand(len(x), -1, -1)
    count = tokens.shape[1]

    def sequence() -> torch.Tensor:
        return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], 1)

    seen["patch_embedding"] = sequence()
    for j, stage in enumerate(net.transformers):
        if stage.pool is not None:
            grid, tokens = stage.pool.conv(grid), stage.pool.fc(tokens)
            seen[f"stage_{j - 1}/pool"] = sequence()
        both = sequence()
        for k, block in enumerate(stage.blocks):
            both = seen[f"stage_{j}/block_{k}"] = block(both)
        tokens, grid = both[:, :count], both[:, count:].transpose(1, 2).reshape(grid.shape)
    seen["features_all"] = both
    last = net.norm(tokens)
    if net.head_dist is None:
        return seen | {"features": last[:, 0], "logits": net.head(last[:, 0])}
    return seen | {"features": last, "logits": torch.stack([net.head(last[:, 0]), net.head_dist(last[:, 1])], 1)}


@pytest.mark.parametrize("model", PIT_NAMES)
def test_pit_has_all_of_tfimms_names(model: str) -> None:
    """18 names (19 for b), each with the numbers that a layer-by-layer PiT has there; both heads where distilled."""
    names = feature_names(oracle.module(model))
    assert len(names) == len(set(names)) == PIT_NAMES[model]
    assert names[0] == "patch_embedding" and names[-3:] == ("features_all", "features", "logits")
    columns, got = passed(model, ("features",), feature_names=names)
    net, x = plain(model)
    with torch.inference_mode():
        expected = tfimm_pit(net, x)
    assert set(expected) == set(names)
    for f, values in zip(columns, got.tensors, strict=True):
        assert f.shapes == (tuple(expected[f.source].shape[1:]),), f.source
        assert oracle.relative(values.float().numpy(), flat(expected[f.source]).float().numpy()) < 1e-3, f.source


@pytest.mark.parametrize("model", ["convit_tiny", "beit_base_patch16_224", "vit_pwee_patch16_reg1_gap_256.sbb_in1k"])
def test_transformers_have_tfimms_names_too(model: str) -> None:
    """Every block's output, the normed sequence, the embedding and the logits of ConViT, BEiT and pwee."""
    names = feature_names(oracle.module(model))
    columns, got = passed(model, ("features",), feature_names=names)
    by_name = {f.source: (f, v) for f, v in zip(columns, got.tensors, strict=True)}
    net, x = plain(model)
    with torch.inference_mode():
        body, maps = net.forward_intermediates(x, output_fmt="NLC")
        ends = {"features_all": body, "features": net.forward_head(body, pre_logits=True), "logits": net(x)}
    assert [n for n in names if n.startswith("block_")] == [f"block_{k}" for k in range(len(maps))]
    for name, tensor in ends.items():
        assert torch.equal(by_name[name][1], flat(tensor)), name
    for k, patches in enumerate(maps):
        f, values = by_name[f"block_{k}"]
        assert torch.equal(values.view(2, *f.shapes[0])[:, -patches.shape[1] :], patches.half())
    assert by_name["patch_embedding"][0].layouts == ("NLC",)


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        ("pit_ti_224", "stage_1/block_9", r"no such name; nearest of its 18: stage_1/block_"),
        ("pit_ti_224", "layer3", "nearest of its 18: "),
        ("resnet10t", "stage_0/block_0", "use --feature-indices"),
        ("crossvit_tiny_240", "block_0", "use --feature-indices"),
    ],
)
def test_an_unknown_name_is_answered_with_those_there_are(model: str, name: str, why: str) -> None:
    """Found before any work."""
    with pytest.raises(UsageError, match=why):
        passed(model, ("features",), feature_names=(name,))


def test_repvits_heads_lie_in_a_head_of_their_own() -> None:
    """Their mean is timm's logits, which an fp32 softmax then makes the scores."""
    (column,), got = passed("repvit_m1", ("heads",))
    net, x = plain("repvit_m1")
    with torch.inference_mode():
        assert torch.allclose(got.tensors[0].view(2, *column.shapes[0]).mean(1), net(x), atol=1e-6)


@pytest.mark.parametrize("model", ["pit_ti_224", "test_vit", "resnet10t"])
def test_heads_are_refused_where_there_is_one(model: str) -> None:
    """Its logits are in the scores already."""
    with pytest.raises(UsageError, match="no second classifier head"):
        passed(model, ("heads",))


# threads, batches, precisions


@pytest.mark.parametrize("asked", [{"feature_names": ("stage_0/block_1", "features", "logits")}, {}])
def test_threads_lose_and_mix_nothing(asked: dict[str, Any]) -> None:
    """Sixty calls from four threads on one backbone: each gets its own images' features, with the bits of one thread.

    timm's own hooks on PiT lost the outputs of 40 of 60 such calls.
    """
    model = "pit_ti_distilled_224"
    columns = facts_of(oracle.module(model), model, ("tokens", "features", "heads"), **asked).tensors
    backbone = Backbone(oracle.module(model), batch_size=1, tensors=columns)
    batches = images(model, 6).split(1)
    alone = [backbone(b) for b in batches]
    together = threading.Barrier(4)

    def call(i: int) -> bool:
        if i < 4:
            together.wait()
        got, expected = backbone(batches[i % 6]), alone[i % 6]
        return torch.equal(got.embedding, expected.embedding) and all(map(torch.equal, got.tensors, expected.tensors))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(60)))


def test_short_and_split_batches_give_the_same_rows() -> None:
    """Tokens and maps of an image do not depend on how many images came with it, padded or in parts."""
    columns = facts_of(oracle.module("test_vit"), "test_vit", ("tokens", "features")).tensors
    batch = images("test_vit", 5)
    whole = Backbone(oracle.module("test_vit"), batch_size=5, tensors=columns)(batch)
    for size, pad in ((2, False), (4, True), (8, True)):
        parts = Backbone(oracle.module("test_vit"), batch_size=size, pad=pad, tensors=columns)(batch)
        for ours, theirs in zip(parts.tensors, whole.tensors, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == torch.float16
            assert oracle.relative(ours.float().numpy(), theirs.float().numpy()) < 1e-3


def test_bf16_keeps_tokens_and_a_float32_head() -> None:
    """In bf16 the tokens' cosine with fp32 is at least 0.9998; both heads' logits are computed in float32."""
    model = "pit_ti_distilled_224"
    columns = facts_of(oracle.module(model), model, ("tokens", "heads")).tensors
    runs = {p: Backbone(oracle.module(model), precision=p, batch_size=2, tensors=columns) for p in ("fp32", "bf16")}
    tokens, heads = zip(*(run(images(model)).tensors for run in runs.values()), strict=True)
    assert torch.nn.functional.cosine_similarity(*(t.float() for t in tokens)).min() >= 0.9998
    assert heads[1].dtype == torch.float32 and not torch.equal(heads[1], heads[1].bfloat16().float())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_gives_the_tokens_and_maps_of_the_cpu(precision: str) -> None:
    """On a GPU the columns beside the embedding have a cosine of 0.9995 with fp32 on the CPU."""
    columns, want = passed("pit_ti_distilled_224", ("tokens", "features", "heads"))
    net = oracle.module("pit_ti_distilled_224")
    got = Backbone(net, device="cuda", precision=precision, batch_size=4, tensors=columns)(
        images("pit_ti_distilled_224")
    )
    for ours, theirs in zip(got.tensors, want.tensors, strict=True):
        assert torch.nn.functional.cosine_similarity(ours.cpu().float(), theirs.float()).min() >= 0.9995


# families


SWEPT = [(m, "cpu") for m in families.SMALLEST[:15]] + [
    (m, "meta")
    for m in families.SMALLEST[15:] + families.LARGE
    if m not in (*families.SLOW_ON_META, *oracle.SEEDS, *oracle.OTHERS)  # by_model tests have their values
]
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_every_family_of_timm_gives_what_timm_gives(part: int) -> None:
    """Embedding size, tokens and maps of each of timm's modules; of the small ones the values too."""
    for model, device in SWEPT[part::PARTS]:
        assert families.sweep([model], device) == {model: None}


def test_an_encoder_without_a_head_is_refused_with_a_reason() -> None:
    """Seven encoders of timm have no pooled embedding: exit 2 before any work, never something made up."""
    problem = families.wrong("mobilenetv5_300m_enc", "meta")
    assert problem is not None and problem.startswith("refused: model mobilenetv5_300m_enc takes no plain batch")
