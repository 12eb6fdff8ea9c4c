"""A norm in torch.nn's transformer layers is always called, never read and run as LayerNorm."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as TF

from fused_rmsnorm import PRMSNorm, RMSNorm, replace_layer_norm_, replace_rms_norm_

D, HEADS, EPS = 32, 4, 1e-3
LENGTHS = [7, 4, 1]


def layer(**options) -> nn.TransformerEncoderLayer:
    options = {"batch_first": True, "dropout": 0.1, "layer_norm_eps": EPS, **options}
    made = nn.TransformerEncoderLayer(D, HEADS, 64, **options)
    for norm in (made.norm1, made.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        if norm.bias is not None:
            nn.init.normal_(norm.bias)
    return made.eval()


def by_hand(made: nn.TransformerEncoderLayer, kind=RMSNorm, **options) -> None:
    """Puts norms of ours where torch's were, with the same parameters."""
    for name in ("norm1", "norm2"):
        old = getattr(made, name)
        new = kind(D, eps=EPS, bias=old.bias is not None, **options)
        new.load_state_dict(old.state_dict())
        setattr(made, name, new)


def rms(x: Tensor, norm: nn.Module, k: int = D) -> Tensor:
    y = x * torch.rsqrt(x[..., :k].square().mean(-1, keepdim=True) + EPS) * norm.weight
    return y if norm.bias is None else y + norm.bias


def composed(made, x: Tensor, mask=None, padding=None, k: int = D) -> Tensor:
    """The layer's definition, written out."""
    a = made.self_attn

    def attention(h: Tensor) -> Tensor:
        q, key, v = (
            TF.linear(h, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for w, b in zip(
                a.in_proj_weight.chunk(3),
                (None,) * 3 if a.in_proj_bias is None else a.in_proj_bias.chunk(3),
                strict=True,
            )
        )
        scores = q @ key.transpose(-1, -2) / (D // HEADS) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        return a.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

    def feed_forward(h: Tensor) -> Tensor:
        return made.linear2(made.activation(made.linear1(h)))

    if made.norm_first:
        x = x + attention(rms(x, made.norm1, k))
        return x + feed_forward(rms(x, made.norm2, k))
    x = rms(x + attention(x), made.norm1, k)
    return rms(x + feed_forward(x), made.norm2, k)


X = torch.randn(len(LENGTHS), max(LENGTHS), D, generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(max(LENGTHS), max(LENGTHS)).triu(1).bool()
PADDING = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
SWAPS = {"swapped": replace_layer_norm_, "by hand": by_hand}


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "both"])
@torch.no_grad()
def test_layer(swap, mode, norm_first: bool, masks: str) -> None:
    made = layer(norm_first=norm_first)
    swap(made)
    mask = CAUSAL if masks in ("causal", "both") else None
    padding = PADDING if masks in ("padding", "both") else None
    want = composed(made, X, mask, padding)
    with mode():
        same(made(X, mask, padding), want)
    for dropout in (made.dropout, made.dropout1, made.dropout2):
        dropout.p = 0.0
    made.self_attn.dropout = 0.0
    same(made.train()(X, mask, padding), want)


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
@pytest.mark.parametrize("change", ["none", "frozen", "gelu", "no bias", "layout", "bfloat16"])
@torch.no_grad()
def test_layers_of_all_kinds(swap, change: str) -> None:
    options = {"gelu": {"activation": "gelu"}, "no bias": {"bias": False}}
    made = layer(**options.get(change, {"batch_first": change != "layout"}))
    swap(made)
    if change == "frozen":
        with torch.enable_grad():
            same(made.requires_grad_(False)(X), composed(made, X))
    elif change == "bfloat16":
        got, want = made.bfloat16()(X.bfloat16()), composed(made.float(), X)
        assert (got.float() - want).abs().mean() < 0.02
    else:
        got = made(X.transpose(0, 1)).transpose(0, 1) if change == "layout" else made(X)
        same(got, composed(made, X))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [EPS, None])
@torch.no_grad()
def test_norms_without_bias_or_eps_put_by_hand(bias: bool, eps: float | None) -> None:
    """The layer's fast path ends in an AttributeError or TypeError with these."""
    made = layer()
    for name in ("norm1", "norm2"):
        setattr(made, name, RMSNorm(D, eps, bias=bias).eval())
    by_call = made.eval()(X)
    assert torch.isfinite(by_call).all()
    if eps is not None:
        same(by_call, composed(made, X))


@torch.no_grad()
def test_only_one_of_two_norms() -> None:
    made = layer()
    report = replace_layer_norm_(made, filter_fn=lambda name, _: name == "norm2")
    assert list(report) == ["norm2"]
    h = made.norm1(X + made.self_attn(X, X, X, need_weights=False)[0])
    h = h + made.linear2(made.linear1(h).relu())
    same(made(X), rms(h, made.norm2))


@torch.no_grad()
def test_partial_norm_and_wrapped_norm() -> None:
    made = layer()
    by_hand(made, PRMSNorm, p=0.25)
    same(made(X), composed(made, X, k=D // 4))
    wrapped = layer()
    by_hand(wrapped)
    compiled = nn.TransformerEncoderLayer(D, HEADS, 64, batch_first=True).eval()
    compiled.load_state_dict(wrapped.state_dict())
    for name in ("norm1", "norm2"):
        setattr(compiled, name, torch.compile(getattr(wrapped, name), backend="eager"))
    same(compiled(X), composed(wrapped, X))


@torch.no_grad()
def test_copies_pickles_and_norms_put_by_other_ways() -> None:
    made = layer()
    by_hand(made)
    want = composed(made, X)
    same(copy.deepcopy(made)(X), want)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    same(torch.load(file, weights_only=False)(X), want)
    other = layer()
    other.load_state_dict(made.state_dict())
    for name in ("norm1", "norm2"):
        norm = RMSNorm(D, EPS, bias=True)
        norm.load_state_dict(getattr(made, name).state_dict())
        if name == "norm1":
            other.set_submodule(name, norm)
        else:
            other.add_module(name, norm)
    same(other(X), want)


class OwnLayer(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(D, HEADS, 64, batch_first=True)
        self.norm1 = RMSNorm(D, EPS, bias=True)
        self.norm2 = RMSNorm(D, EPS, bias=True)


@torch.no_grad()
def test_a_subclass_and_a_layer_built_with_another_class(monkeypatch) -> None:
    made = OwnLayer().eval()
    same(made(X), composed(made, X))

    def with_bias(size, eps, bias, **factory) -> RMSNorm:
        return RMSNorm(size, eps, bias=bias, **factory)

    monkeypatch.setattr(nn.modules.transformer, "LayerNorm", with_bias)
    made = layer()
    assert type(made.norm1) is RMSNorm
    same(made(X), composed(made, X))


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
@pytest.mark.parametrize("when", ["layer first", "encoder first"])
@torch.no_grad()
def test_encoder_with_padding(swap, when: str) -> None:
    """It makes a nested tensor of its input if it was built with torch's norms."""
    first = layer()
    if when == "layer first":
        swap(first)
        encoder = nn.TransformerEncoder(first, 2).eval()
    else:
        encoder = nn.TransformerEncoder(first, 2).eval()
        for one in encoder.layers:
            swap(one)
    want = X
    for one in encoder.layers:
        want = composed(one, want, padding=PADDING)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = encoder(X, src_key_padding_mask=PADDING)
        same(got[~PADDING], want[~PADDING])
        nested = torch.nested.nested_tensor(
            [x[:n] for x, n in zip(X, LENGTHS, strict=True)], layout=torch.strided
        )
        same(encoder(nested).to_padded_tensor(0.0)[~PADDING], want[~PADDING])
    with torch.enable_grad():
        got = encoder(X, src_key_padding_mask=PADDING)
    same(got[~PADDING], want[~PADDING])


def test_gradients_and_training_of_a_swapped_encoder() -> None:
    encoder = nn.TransformerEncoder(layer(dropout=0.0), 2).train()
    replace_layer_norm_(encoder)
    x = X.clone().requires_grad_()
    got = encoder(x, src_key_padding_mask=PADDING)
    want = x
    for one in encoder.layers:
        want = composed(one, want, padding=PADDING)
    inputs = [x, *encoder.parameters()]
    dy = torch.randn_like(want) * ~PADDING[..., None]
    for a, b in zip(
        torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_compiled(mode, swap) -> None:
    torch._dynamo.reset()
    encoder = nn.TransformerEncoder(layer(), 1, enable_nested_tensor=False).eval()
    swap(encoder.layers[0])
    with mode():
        got = torch.compile(encoder, backend="aot_eager")(X, src_key_padding_mask=PADDING)
    with torch.no_grad():
        same(got[~PADDING], composed(encoder.layers[0], X, padding=PADDING)[~PADDING])


@torch.no_grad()
def test_decoder_and_whole_transformer() -> None:
    """Neither reads its norms, but the transformer's encoder layers do."""
    model = nn.Transformer(D, HEADS, 1, 1, 64, batch_first=True, layer_norm_eps=EPS).eval()
    report = replace_layer_norm_(model)
    assert len(report) == 2 + 1 + 3 + 1
    assert report.left == {}
    memory = rms(composed(model.encoder.layers[0], X), model.encoder.norm)
    one = model.decoder.layers[0]
    h = rms(X + one.self_attn(X, X, X)[0], one.norm1)
    h = rms(h + one.multihead_attn(h, memory, memory)[0], one.norm2)
    h = rms(h + one.linear2(one.linear1(h).relu()), one.norm3)
    same(model(X, X), rms(h, model.decoder.norm))


@torch.no_grad()
def test_rms_norm_of_torch_in_a_layer_is_swapped() -> None:
    """torch's own, which has no bias, makes the layer's fast path raise AttributeError."""
    made = layer()
    for name in ("norm1", "norm2"):
        setattr(made, name, nn.RMSNorm(D, EPS))
    assert list(replace_rms_norm_(made)) == ["norm1", "norm2"]
    same(made.eval()(X), composed(made, X))


def test_other_parents_see_no_hook() -> None:
    model = nn.Sequential(nn.LayerNorm(D), RMSNorm(D))
    replace_layer_norm_(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("kind", [RMSNorm, lambda n: RMSNorm(n, bias=True, weight_offset=1.0)])
def test_nested_tensors(layout, kind) -> None:
    norm = kind(D)
    nn.init.uniform_(norm.weight)
    parts = [torch.randn(n, D) for n in LENGTHS]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y = norm(nested)
    assert y.layout == layout
    for got, part in zip(y.unbind(), parts, strict=True):
        assert torch.equal(got, norm(part))
    (y + nested).unbind()[0].sum().backward()  # the same lengths
    dense = parts[0].clone().requires_grad_()
    (norm(dense) + dense).sum().backward()
    torch.testing.assert_close(nested.grad.unbind()[0], dense.grad)


def test_the_bounds_of_the_lengths_stay_known() -> None:
    """As of torch's norm. Compiled padding has no other measure, and padded to the sum of them."""
    nested = torch.nested.nested_tensor(
        [torch.randn(n, D) for n in LENGTHS], layout=torch.jagged, requires_grad=True
    )
    given = torch.nested.nested_tensor_from_jagged(
        torch.randn(5, D), torch.tensor([0, 2, 5]), min_seqlen=1, max_seqlen=4
    )
    unknown = torch.nested.nested_tensor_from_jagged(torch.randn(5, D), torch.tensor([0, 2, 5]))
    for tensor in (nested, given, unknown):
        for name in ("_maybe_min_seqlen", "_maybe_max_seqlen"):
            expected = getattr(nn.RMSNorm(D)(tensor), name)
            assert getattr(RMSNorm(D)(tensor), name) == getattr(tensor, name) == expected

    @torch.compile(fullgraph=True, backend="aot_eager")
    def padded(norm: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
        return torch.nested.to_padded_tensor(norm(tensor), 0.0)

    assert padded(RMSNorm(D), nested).shape == (len(LENGTHS), max(LENGTHS), D)


def test_nested_tensors_as_torch_takes_them() -> None:
    parts = [torch.randn(n, 3, D) for n in LENGTHS]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    ours, theirs = RMSNorm(D), nn.RMSNorm(D)
    torch.testing.assert_close(ours(nested).values(), theirs(nested).values())
    turned = nested.transpose(1, 2)
    torch.testing.assert_close(ours(turned).values(), theirs(turned).values())
    with pytest.raises(RuntimeError, match="must not vary in length in its last dimension"):
        ours(nested.transpose(1, 3))
    # All sequences together would have that shape.
    with pytest.raises(RuntimeError, match="must not vary in length in its last 3 dimensions"):
        RMSNorm(nested.values().shape)(nested)
    part = RMSNorm((3, D))(nested).unbind()[1]
    torch.testing.assert_close(part, RMSNorm((3, D))(parts[1]))
