"""Every error is a Python exception of the right type that names the argument, what was given and
what is accepted; through the functions, the modules and the operators."""

import re

import pytest
import torch

import fused_rmsnorm
from fused_rmsnorm import functional as F

ops = torch.ops.fused_rmsnorm
x, w, b = torch.ones(4, 8), torch.ones(8), torch.ones(8)
NAN, INF = float("nan"), float("inf")


def through_function(**kwargs):
    args = {"input": x, "weight": w, **kwargs}
    return F.rms_norm(args.pop("input"), 8, args.pop("weight"), args.pop("eps", None), **args)


def through_composite(**kwargs):
    args = {"input": x, "weight": w, **kwargs}
    return F.composite_rms_norm(
        args.pop("input"), 8, args.pop("weight"), args.pop("eps", None), **args
    )


def through_operator(**kwargs):
    args = {"input": x, "weight": w, **kwargs}
    return ops.rms_norm(args.pop("input"), args.pop("weight"), **args)


def through_add(**kwargs):
    args = {"input": x, "weight": w, **kwargs}
    input = args.pop("input")
    residual = input if isinstance(input, torch.Tensor) else x
    return F.add_rms_norm(input, residual, 8, args.pop("weight"), args.pop("eps", None), **args)


def through_add_in_place(**kwargs):
    args = {"input": x, "weight": w, **kwargs}
    input = args.pop("input")
    input = input.clone() if isinstance(input, torch.Tensor) else input
    F.add_rms_norm_(input, x.clone(), 8, args.pop("weight"), args.pop("eps", None), **args)


ROUTES = [
    through_function,
    through_composite,
    through_operator,
    through_add,
    through_add_in_place,
]

VALUES = [
    ("p", 0.0, "p must be None or a number in (0, 1], but got 0"),
    ("p", -0.5, "p must be None or a number in (0, 1], but got -0.5"),
    ("p", 1.5, "p must be None or a number in (0, 1], but got 1.5"),
    ("p", 6.25, "p must be None or a number in (0, 1], but got 6.25 (a fraction, not a percentage"),
    ("p", NAN, "p must be None or a number in (0, 1], but got nan"),
    ("p", INF, "p must be None or a number in (0, 1], but got inf"),
    ("weight_offset", NAN, "weight_offset must be finite, but got nan"),
    ("weight_offset", INF, "weight_offset must be finite, but got inf"),
    ("casting_mode", "gemma", 'casting_mode must be "torch" or "llama", but got "gemma"'),
    ("casting_mode", "", 'casting_mode must be "torch" or "llama", but got ""'),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "value", "message"), VALUES)
def test_values(route, name, value, message):
    with pytest.raises(ValueError, match=r"^" + re.escape(message)):
        route(**{name: value})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bias", [None, b])
def test_an_offset_of_no_weight(route, bias):
    """It would be ignored: refused, rather than a norm that is not the one asked for."""
    message = "weight_offset must be 0 without a weight, but got 1"
    with pytest.raises(ValueError, match=r"^" + re.escape(message)):
        route(weight=None, bias=bias, weight_offset=1.0)
    route(weight=None, weight_offset=0.0)


REAL = "must have dtype float16, bfloat16, float32 or float64"
INPUT = "input must have dtype float16, bfloat16, float32, float64, complex64 or complex128"


TENSORS = [
    ("input", TypeError, x.long(), f"{INPUT}, but got Long"),
    ("input", TypeError, x.bool(), f"{INPUT}, but got Bool"),
    ("input", TypeError, x.to(torch.float8_e4m3fn), f"{INPUT}, but got Float8_e4m3fn"),
    (
        "weight",
        RuntimeError,
        torch.ones(7),
        "weight must have shape [8], the size of input's last ",
    ),
    ("weight", RuntimeError, torch.ones(3, 8), "weight must have shape [8]"),
    ("weight", RuntimeError, torch.tensor(1.0), "weight must have shape [8]"),
    ("weight", RuntimeError, w.to("meta"), "weight must be on input's device cpu, but is on meta"),
    ("weight", TypeError, w.long(), f"weight {REAL}, but got Long"),
    ("weight", TypeError, w.cfloat(), f"weight {REAL}, but got ComplexFloat"),
    ("weight", TypeError, w.to(torch.float8_e5m2), f"weight {REAL}, but got Float8_e5m2"),
    ("bias", RuntimeError, torch.ones(9), "bias must have shape [8], the size of input's last "),
    ("bias", RuntimeError, b.to("meta"), "bias must be on input's device cpu, but is on meta"),
    ("bias", TypeError, b.long(), f"bias {REAL}, but got Long"),
    ("bias", TypeError, b.cfloat(), f"bias {REAL}, but got ComplexFloat"),
    ("bias", TypeError, b.to(torch.float8_e5m2), f"bias {REAL}, but got Float8_e5m2"),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "kind", "value", "message"), TENSORS)
def test_tensors(route, name, kind, value, message):
    with pytest.raises(kind, match=r"^" + re.escape(message)):
        route(**{name: value})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [torch.ones(7), b.long(), b.to("meta")], ids=str)
def test_bias_alone_is_called_bias(route, value):
    with pytest.raises((RuntimeError, TypeError), match=r"^bias must"):
        route(weight=None, bias=value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"input": None}, "input must be a Tensor, but got NoneType"),
        ({"input": [1.0] * 8}, "input must be a Tensor, but got list"),
        ({"weight": [1.0] * 8}, "weight must be a Tensor, but got list"),
        ({"bias": 1.0}, "bias must be a Tensor, but got float"),
        ({"eps": "1e-6"}, "eps must be a number, but got str"),
        ({"p": "0.5"}, "p must be a number, but got str"),
        ({"weight_offset": None}, "weight_offset must be a number, but got NoneType"),
        ({"casting_mode": None}, "casting_mode must be a string, but got NoneType"),
        ({"casting_mode": b"llama"}, "casting_mode must be a string, but got bytes"),
    ],
    ids=str,
)
@pytest.mark.parametrize("route", [r for r in ROUTES if r is not through_operator])
def test_python_types(route, args, message):
    with pytest.raises(TypeError, match=r"^" + re.escape(message)):
        route(**args)


@pytest.mark.parametrize("function", [F.rms_norm, F.composite_rms_norm])
@pytest.mark.parametrize(
    ("input", "shape", "message"),
    [
        (x, 7, "input must end in normalized_shape [7], but has shape [4, 8]"),
        (x, (8, 4), "input must end in normalized_shape [8, 4], but has shape [4, 8]"),
        (x, (2, 4, 8), "input must end in normalized_shape [2, 4, 8], but has shape [4, 8]"),
        (x, (), "normalized_shape must have at least one dimension, but got []"),
        (torch.tensor(1.0), 1, "input must end in normalized_shape [1], but has shape []"),
    ],
)
def test_normalized_shape(function, input, shape, message):
    with pytest.raises(RuntimeError, match=r"^" + re.escape(message)):
        function(input, shape)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_several_dimensions(name):
    with pytest.raises(
        RuntimeError, match=re.escape(f"{name} must have shape [4, 8], or dimensions before it")
    ):
        F.rms_norm(x, (4, 8), **{name: torch.ones(32)})


def test_scalar_input_of_an_operator():
    with pytest.raises(
        RuntimeError, match=r"^input must have at least one dimension, but got a sc"
    ):
        ops.rms_norm(torch.tensor(1.0))


@pytest.mark.parametrize("function", [F.add_rms_norm, F.add_rms_norm_])
@pytest.mark.parametrize(
    ("residual", "kind", "message"),
    [
        (
            x.half(),
            TypeError,
            "residual must have input's dtype Float or a wider one, but got Half",
        ),
        (x[:1], RuntimeError, "residual must have input's shape [4, 8], but got [1, 8]"),
        (x.to("meta"), RuntimeError, "residual must be on input's device cpu, but is on meta"),
        (
            torch.ones(4, 7),
            RuntimeError,
            "residual must end in normalized_shape [8], but has shape",
        ),
    ],
)
def test_residual(function, residual, kind, message):
    with pytest.raises(kind, match=r"^" + re.escape(message)):
        function(x.clone(), residual, 8, w)


@pytest.mark.parametrize("name", ["input", "residual", "weight", "bias"])
def test_in_place_says_what_would_want_a_gradient(name):
    args = {"input": x.clone(), "residual": x.clone(), "weight": w, "bias": b}
    leaf = args[name].clone().requires_grad_()
    given = {**args, name: leaf * 1 if name in ("input", "residual") else leaf}
    with pytest.raises(RuntimeError, match=rf"^{name} requires grad, but add_rms_norm_ works in"):
        F.add_rms_norm_(normalized_shape=8, **given)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args[name], torch.ones_like(args[name]))
        with pytest.raises(RuntimeError, match=rf"^{name} has a tangent, but add_rms_norm_ works"):
            F.add_rms_norm_(normalized_shape=8, **{**args, name: dual})
    with pytest.raises(TypeError, match=r"^input must be a tensor, but got None"):
        ops.add_rms_norm_(None, x.clone(), w)


def test_in_place():
    with pytest.raises(RuntimeError, match=r"has no derivative: call add_rms_norm"):
        F.add_rms_norm_(x.clone(), x.clone(), 8, w.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"refer to a single memory location"):
        F.add_rms_norm_(t := x.clone(), t, 8)
    with pytest.raises(RuntimeError, match=r"refers to a single memory location"):
        F.add_rms_norm_(torch.ones(1, 8).expand(4, 8), x.clone(), 8)
    with pytest.raises(RuntimeError, match=r"refer to a single memory location"):
        F.add_rms_norm_((t := torch.ones(5, 8))[:4], t[1:], 8)
    message = "input cannot be viewed as rows of [4, 8] to be written in place: make it contiguous"
    with pytest.raises(RuntimeError, match=r"^" + re.escape(message)):
        F.add_rms_norm_(torch.ones(8, 4).t(), x.clone(), (4, 8))
    message = "input must have dtype Float to take the result in place (the weight is wider and cas"
    with pytest.raises(TypeError, match=r"^" + re.escape(message)):
        F.add_rms_norm_(x.half(), x.half(), 8, w, casting_mode="llama")


BWD = {
    "grad_output": x,
    "input": x,
    "weight": w,
    "rstd": torch.ones(4, 1),
    "grad_sum": None,
    "output_mask": [True] * 3,
}


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("grad_output", x[:3], RuntimeError, "grad_output must have input's shape [4, 8], but got"),
        ("grad_output", x.long(), TypeError, f"grad_output {REAL}, but got Long"),
        ("grad_output", x.to_sparse(), TypeError, "grad_output must be a strided tensor, but got"),
        ("input", x.cfloat(), TypeError, "input must be real here, but got ComplexFloat"),
        ("weight", torch.ones(7), RuntimeError, "weight must have shape [8]"),
        ("rstd", torch.ones(4), RuntimeError, "rstd must have input's shape with 1 for the last"),
        (
            "rstd",
            torch.ones(3, 1),
            RuntimeError,
            "rstd must have input's shape with 1 for the last",
        ),
        (
            "rstd",
            torch.ones(4, 3),
            RuntimeError,
            "rstd must have input's shape with 1 for the last",
        ),
        (
            "rstd",
            torch.ones(4, 0),
            RuntimeError,
            "rstd must have input's shape with 1 for the last",
        ),
        (
            "rstd",
            torch.ones(4, 1).double(),
            TypeError,
            "rstd must have dtype Float, but got Double",
        ),
        ("grad_sum", x[:, :7], RuntimeError, "grad_sum must have input's shape [4, 8], but got"),
        ("grad_sum", x.long(), TypeError, "grad_sum must have"),
        ("grad_sum", x.cfloat(), TypeError, "grad_sum must have"),
    ],
)
def test_backward_operator(where, name, value, kind, message):
    """On Meta, too: what compiles has the errors of what runs."""
    args = {**BWD, name: value}
    args = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with pytest.raises(kind, match=r"^" + re.escape(message)):
        ops.rms_norm_bwd(**args)


NEEDED = {
    "add_rms_norm": ["residual"],
    "add_rms_norm_fwd": ["residual"],
    "add_rms_norm_": ["residual"],
    "rms_norm_bwd": ["grad_output", "rstd"],
    "rms_norm_gated": ["gate"],
    "rms_norm_gated_composite": ["gate"],
    "rms_norm_gated_fwd": ["gate"],
    "rms_norm_gated_bwd": ["grad_output", "gate", "rstd"],
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("shape", [(4, 8), (0,)], ids=str)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in NEEDED for name in NEEDED[op]])
def test_none_for_a_tensor(op, name, shape, graph):
    """torch hands it to an operator as an undefined tensor, which has the shape (0,)."""
    input = torch.ones(shape, requires_grad=graph and op != "add_rms_norm_")
    args = {n: torch.ones(shape) for n in NEEDED[op]} | {"input": input, "weight": None}
    if "rstd" in args:
        args |= {"rstd": torch.ones(*shape[:-1], 1), "output_mask": [True] * 3, "grad_sum": None}
    if "gate" in args:
        args |= {"bias": None, "activation": "silu"}
    if "gate" in args and "rstd" in args:
        args |= {"output_mask": [True] * 4}
        del args["grad_sum"]
    getattr(ops, op)(**args)
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor, but got None"):
        getattr(ops, op)(**{**args, name: None})


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_an_offset_of_no_weight_in_operators(where):
    input, rstd = x.to(where), torch.ones(4, 1, device=where)
    for call in (
        lambda **offset: ops.rms_norm_fwd(input, **offset),
        lambda **offset: ops.add_rms_norm_fwd(input, input, **offset),
        lambda **offset: ops.add_rms_norm_(input.clone(), input.clone(), **offset),
        lambda **offset: ops.rms_norm_bwd(input, input, None, rstd, None, [True] * 3, **offset),
    ):
        with pytest.raises(ValueError, match=r"^weight_offset must be 0 without a weight"):
            call(weight_offset=-0.5)
        call()


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_forward_operator(where):
    def t(value):
        return value.to(where)

    with pytest.raises(RuntimeError, match=r"^bias needs a weight here: call rms_norm"):
        ops.rms_norm_fwd(t(x), None, t(b))
    with pytest.raises(
        TypeError, match=r"^bias must have weight's dtype Float here, but got Double"
    ):
        ops.rms_norm_fwd(t(x), t(w), t(b).double())
    with pytest.raises(
        TypeError, match=r"^input must be real here, but got ComplexFloat: call rms_n"
    ):
        ops.rms_norm_fwd(t(x).cfloat())


@pytest.mark.parametrize(
    "module", [fused_rmsnorm.RMSNorm, fused_rmsnorm.PRMSNorm, fused_rmsnorm.AddRMSNorm]
)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"p": 6.25}, "p must be None or a number in (0, 1], but got 6.25"),
        ({"p": 0}, "p must be None or a number in (0, 1], but got 0"),
        ({"p": NAN}, "p must be None or a number in (0, 1], but got nan"),
        ({"casting_mode": "gemma"}, 'casting_mode must be "torch" or "llama", but got \'gemma\''),
        ({"compile_mode": "slow"}, 'compile_mode must be "opaque" or "fuse", but got \'slow\''),
        ({"bias": True, "elementwise_affine": False}, "bias=True needs elementwise_affine=True"),
        (
            {"weight_offset": 1.0, "elementwise_affine": False},
            "weight_offset=1.0 needs elementwise_affine=True",
        ),
        ({"weight_offset": NAN}, "weight_offset must be finite, and 1 - weight_offset"),
        ({"weight_offset": 1e300}, "weight_offset must be finite, and 1 - weight_offset"),
        (
            {"weight_offset": 1e6, "dtype": torch.float16},
            "weight_offset must be finite, and 1 - weight_offset, at which the weight starts, w",
        ),
    ],
    ids=str,
)
def test_module_arguments(module, args, message):
    with pytest.raises(ValueError, match=r"^" + re.escape(message)):
        module(8, **args)


@pytest.mark.parametrize("size", [-1, (8, -1), 1 << 63, (1 << 70, 2)], ids=str)
def test_module_sizes(size):
    with pytest.raises(ValueError, match=r"^normalized_shape must hold sizes of a tensor, but got"):
        fused_rmsnorm.RMSNorm(size)


def test_a_string_that_is_none():
    message = "must be a string of whole characters, but got one with a lone surrogate"
    with pytest.raises(ValueError, match=f"^casting_mode {message}"):
        F.rms_norm(x, 8, casting_mode="\ud800")
    with pytest.raises(ValueError, match=f"^activation {message}"):
        F.rms_norm_gated(x, x, 8, activation="\ud800")


def test_module_input():
    module = fused_rmsnorm.RMSNorm(8)
    with pytest.raises(RuntimeError, match=r"^input must end in normalized_shape \[8\], but has"):
        module(torch.ones(4, 7))
    with pytest.raises(TypeError, match=f"^{INPUT}, but got Long"):
        module(x.long())
    with pytest.raises(RuntimeError, match=r"^residual must have input's shape"):
        fused_rmsnorm.AddRMSNorm(8)(x, x[:2])
