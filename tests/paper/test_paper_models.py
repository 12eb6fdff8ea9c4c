"""benchmarks/paper/models: what the paper normalises, in its sizes, and with every norm the loss
and the gradients of the definition."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from reference import Options, rms_norm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("benchmarks.paper", reason="needs the repository's root on the path")

from tiny_models import tiny

from benchmarks.paper.gru_lstm import GRU, LSTM
from benchmarks.paper.models import MODELS, speech
from benchmarks.paper.norms import EPS, LABELS, NORMS, make_norm


def definition(p: float | None) -> Callable[..., nn.Module]:
    """RMSNorm by the definition that all tests compare with."""

    class Definition(nn.Module):
        def __init__(self, n: int, affine: bool = True) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(n)) if affine else None

        def forward(self, x: Tensor) -> Tensor:
            return rms_norm(x, self.weight, None, Options(eps=EPS, p=p))

    return Definition


PS = {"prms_norm": 0.0625, "prms_norm_12.5": 0.125, "prms_norm_25": 0.25, "prms_norm_50": 0.5}
# What each norm must agree with, loss and gradients.
SAME_AS = {
    "layer_norm": make_norm("layer_norm_composed"),
    "rms_norm": definition(None),
    "torch_rms_norm": definition(None),
    **{name: definition(p) for name, p in PS.items()},
}


def gradients(model: str, norm: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """Parameter -> gradient after one step in fp64, and the loss."""
    sizes = tiny(model)
    batch = MODELS[model].batch(sizes, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    built = MODELS[model].model(norm, sizes).double()
    torch.manual_seed(2)  # of the dropout
    loss = built(*(t.double() if t.is_floating_point() else t for t in batch))
    loss.backward()
    found = {name: p.grad for name, p in built.named_parameters()}
    return {**found, "loss": loss.detach()}


def test_every_norm_has_its_definition():
    assert SAME_AS.keys() | {"none", "layer_norm_composed"} == NORMS.keys() == LABELS.keys()


@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_of_the_definition(model):
    for norm in NORMS:
        got = gradients(model, make_norm(norm))
        for name, grad in got.items():
            assert grad is not None, (norm, name)
            assert grad.isfinite().all(), (norm, name)
            # A shift of all keys changes no softmax.
            assert grad.abs().max() > 0 or name.endswith(".k.bias"), (norm, name)
        if norm in SAME_AS:
            expected = gradients(model, SAME_AS[norm])
            assert got.keys() == expected.keys()
            for name, grad in got.items():
                torch.testing.assert_close(
                    grad,
                    expected[name],
                    rtol=1e-7,
                    atol=1e-12,
                    msg=lambda m, at=(norm, name): f"{at}: {m}",
                )


def widths_normalised(make: Callable[[Callable[..., nn.Module]], nn.Module], *batch) -> list[int]:
    """The width of every tensor that passes a norm, in a forward pass."""
    seen = []

    class Counted(nn.Module):
        def __init__(self, n: int, affine: bool = True) -> None:
            super().__init__()
            self.n = n

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == self.n
            seen.append(self.n)
            return x

    make(Counted)(*batch)
    return seen


def test_what_the_paper_normalises():
    x = torch.randn(2, 5, 8)
    gru = widths_normalised(lambda norm: GRU(norm, 8, 16), x)
    assert gru == 5 * [32, 32, 16, 16]  # four tensors per step
    lstm = widths_normalised(lambda norm: LSTM(norm, 8, 16), x)
    assert lstm == 5 * [64, 64, 16]  # three: input, recurrent, cell

    def whole(model: str) -> list[int]:
        spec, sizes = MODELS[model], tiny(model)
        batch = spec.batch(sizes, torch.Generator().manual_seed(0))
        return widths_normalised(lambda norm: spec.model(norm, sizes), *batch)

    assert whole("convpool_cnn") == 3 * [16] + 6 * [32]  # each convolution, over its channels
    assert whole("transformer") == 2 * 2 * [32] + 2 * 3 * [32]
    assert len(whole("order_embeddings")) == 3 * 4
    # Two encoders and two decoders of four; query at each step; first state, keys, read-out.
    assert len(whole("rnnsearch")) == 4 * (4 * 4 + 1) + 3
    # Two directions of document and question.
    assert len(whole("attentive_reader")) == 2 * 3 * (4 + 3)
    # Each convolution and what comes out of the last; two of a block, and the last.
    assert whole("speech") == 7 * [16] + [16] + 2 * 2 * [32] + [32]


@pytest.mark.parametrize("model", MODELS)
def test_leaving_the_norms_out_leaves_nothing_else_out(model):
    """Not the gradient of the first layer's input, say, that only a norm's weight asked for."""

    def multiplications(norm: str) -> int:
        sizes = tiny(model)
        batch = MODELS[model].batch(sizes, torch.Generator().manual_seed(0))
        built = MODELS[model].model(make_norm(norm), sizes)
        with FlopCounterMode(display=False) as counter:
            built(*batch).backward()
        return counter.get_total_flops()

    assert multiplications("none") == multiplications("layer_norm") > 0


def test_sizes_are_the_published_ones():
    expected = {
        "rnnsearch": {"embedding": 512, "state": 1000, "batch": 80},
        "transformer": {"width": 512, "hidden": 2048, "layers": 6, "heads": 8},
        "attentive_reader": {"state": 240, "batch": 64},
        "order_embeddings": {"state": 1024, "words": 300, "batch": 128, "margin": 0.05},
        "convpool_cnn": {"narrow": 96, "wide": 192, "batch": 100},
        "speech": {"channels": 512, "width": 768, "heads": 12, "positions": 128, "span": 10},
    }
    for model, sizes in expected.items():
        found = dataclasses.asdict(MODELS[model].sizes())
        assert {k: found[k] for k in sizes} == sizes


@pytest.mark.parametrize("model", MODELS)
def test_scale_leaves_every_width(model):
    spec = MODELS[model]
    assert spec.scaled(1.0) == spec.sizes()
    full, small = (dataclasses.asdict(spec.scaled(s)) for s in (1.0, 0.01))
    shrunk = {k for k in full if small[k] != full[k]}
    assert shrunk
    assert shrunk <= {"vocabulary", "batch", "length", "document", "question"}
    assert all(small[k] < full[k] for k in shrunk)


def test_frames_of_speech_are_masked_in_spans():
    sizes = dataclasses.replace(speech.Sizes(), batch=64)
    mask = speech.masked_spans(sizes, torch.Generator().manual_seed(0))
    assert mask.shape == (64, 250)
    assert mask.any(1).all()
    # Spans overlap: of a half that could be masked, 1 - exp(-1 / 2) are.
    assert 0.36 < mask.double().mean() < 0.43
    for row in mask[:, : -sizes.span].int().tolist():  # at the end, spans are cut off
        runs = "".join(map(str, row)).split("0")
        assert all(len(run) >= sizes.span for run in runs[:-1] if run)


def test_speech_sees_a_masked_frame_by_its_surroundings_alone():
    """What a masked frame sounds like changes nothing, as far as its convolutions reach."""
    sizes = tiny("speech")
    sound, _, classes = speech.batch(sizes, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = speech.SpeechEncoder(make_norm("rms_norm"), sizes)
    everything, nothing = (torch.full(classes.shape, value) for value in (True, False))
    other = sound.flip(0)
    assert torch.equal(model.logits(sound, everything), model.logits(other, everything))
    assert not torch.equal(model.logits(sound, nothing), model.logits(other, nothing))
    assert model.logits(sound, nothing).shape == (*classes.shape, sizes.classes)
