"""Faults in csrc/binding: what operators check, record and hand on. A test is what pytest takes."""

from . import Layer
from . import Mutant as M

_AUTOGRAD = "tests/autograd/test_autograd.py"
_FUNC = "tests/autograd/test_func.py"
_ERRORS = "tests/contracts/test_errors.py tests/contracts/test_arguments.py"
_FORWARD = "tests/contracts/test_forward.py"
_BACKWARD = "tests/contracts/test_backward.py"
_OVERLAP = "tests/contracts/test_in_place_overlap.py"
_PAPER = "tests/paper/test_paper.py"
_MEMORY = "tests/contracts/test_memory.py"
_WEIGHT_ROWS = "tests/contracts/test_weight_rows.py"
_GATED = "tests/contracts/test_gated.py"

_DERIVATIVES = (
    M(
        "autograd.cpp",
        "wanted[0] || (kAdd && wanted[1])",
        "wanted[0]",
        "a residual alone gets no gradient",
        (_AUTOGRAD,),
    ),
    M(
        "autograd.cpp",
        "node->saved[Node::kInput].set(sum, /*output=*/true)",
        "node->saved[Node::kInput].set(sum, /*output=*/false)",
        "a node holds its own output, and neither is ever freed",
        (_MEMORY,),
    ),
    M(
        "autograd.cpp",
        "t.unsafeGetTensorImpl()->bump_version()",
        "(void)0",
        "a write in place is not counted",
        (_AUTOGRAD, _OVERLAP),
    ),
    M(
        "autograd.cpp",
        "dy.defined()",
        "true",
        "a gradient that does not exist is used",
        (_AUTOGRAD,),
    ),
    M(
        "autograd.cpp",
        "result[1] = dx",
        "result[1] = Tensor()",
        "no gradient of the residual",
        (_AUTOGRAD,),
    ),
    M(
        "autograd.cpp",
        "isFwGradDefined(x) || isFwGradDefined(weight) || isFwGradDefined(bias)",
        "false",
        "tangents are dropped in silence",
        (_AUTOGRAD, _FUNC),
    ),
    M(
        "autograd.cpp",
        "!autograd::compute_requires_grad(t)",
        "true",
        "add_rms_norm_ takes what needs a gradient",
        (_AUTOGRAD, _ERRORS),
    ),
    M(
        "composite.cpp",
        "3 * c * Q - P",
        "2 * c * Q - P",
        "a term of the second derivative",
        (_AUTOGRAD,),
    ),
    M(
        "composite.cpp",
        "dx = dx + grad_sum->to(row.acc)",
        "dx = Tensor(dx)",
        "reference: the sum's gradient is left out",
        (_AUTOGRAD, _FUNC),
    ),
    M(
        "composite.cpp",
        "head.mean_of_all(u * v)",
        "head.mean(head.of(u * v))",
        "reference: a sum over the row is over its head",
        (_AUTOGRAD, _FUNC),
    ),
    M(
        "vmap.cpp",
        "value.movedim(*batch_dim, 0)",
        "value.movedim(0, 0)",
        "the batch is not moved to the front",
        (_FUNC,),
    ),
    M(
        "vmap.cpp",
        "!vmap.batches(x) || vmap.batches(weight) || vmap.batches(bias)",
        "!vmap.batches(x) || vmap.batches(weight)",
        "vmap over the bias alone is overlooked",
        (_FUNC,),
    ),
)
_OPTIONS = (
    M(
        "options.cpp",
        "static_cast<int64_t>(*p * length)",
        "static_cast<int64_t>(*p * length) + 1",
        "p = k / N reads k + 1 columns",
        (_FORWARD, _PAPER),
    ),
    M("options.cpp", "k < n && !reaches(k)", "false", "p = k / N reads k - 1 columns", (_FORWARD,)),
    M("options.cpp", "!p || (*p > 0 && *p <= 1)", "!p || *p <= 1", "p = 0 is taken", (_ERRORS,)),
    M(
        "options.cpp",
        "std::isfinite(weight_offset)",
        "true",
        "an infinite offset is taken",
        (_ERRORS,),
    ),
    M(
        "options.cpp",
        "c10::toRealValueType(acc_type(x)) == at::kDouble",
        "false",
        "fp64 gets fp32's epsilon",
        (_FORWARD,),
    ),
    M(
        "options.cpp",
        "options.llama && present(weight)",
        "false",
        "Llama's output has input's dtype",
        (_FORWARD,),
    ),
)
_CHECKS = (
    M("checks.cpp", "is_real(t.scalar_type())", "true", "any dtype is taken", (_ERRORS,)),
    M(
        "checks.cpp",
        "end < written_begin || written_end < begin",
        "true",
        "a weight may lie where it is written",
        (_OVERLAP, _ERRORS),
    ),
    M(
        "checks.cpp",
        "rstd.scalar_type() == acc_type(x.scalar_type())",
        "true",
        "rstd of any dtype is taken",
        (_ERRORS,),
    ),
    M("negative.cpp", "x.is_neg()", "false", "a negative view is not written", (_ERRORS,)),
    M(
        "meta.cpp",
        "sizes.back() = 1",
        "sizes.back() = sizes.back()",
        "rstd has a wrong shape on meta",
        ("tests/contracts/test_registration.py", _GATED),
    ),
    M(
        "ops.cpp",
        "c10::promoteTypes(w->scalar_type(), b->scalar_type())",
        "w->scalar_type()",
        "a bias wider than the weight is rounded to it",
        (_FORWARD, _WEIGHT_ROWS),
    ),
)
_ARGUMENTS = (
    M(
        "kernel_args.cpp",
        "result.rows *= size",
        "result.rows = size",
        "a weight with rows in two dimensions",
        (_WEIGHT_ROWS,),
    ),
    M(
        "kernel_args.cpp",
        "result.share *= size",
        "result.share = size",
        "a weight shared over two dimensions",
        (_WEIGHT_ROWS,),
    ),
    M(
        "kernel_args.cpp",
        "options.norm_before_gate ? Gate::last : Gate::first",
        "Gate::last",
        "the gate always comes last",
        (_GATED,),
    ),
    M("kernel_args.cpp", "mask[0] || mask[1]", "mask[0]", "dgate alone is not computed", (_GATED,)),
    M(
        "kernel_args.cpp",
        "present(grad_sum_) && mask[0]",
        "false",
        "the sum's gradient is left out",
        (_BACKWARD, _AUTOGRAD),
    ),
    M(
        "kernel_args.cpp",
        "t->to(type).contiguous()",
        "t->to(type)",
        "a weight with strides is read without",
        (_FORWARD, _BACKWARD),
    ),
)

BINDING = Layer(
    "binding",
    "csrc/binding",
    (_AUTOGRAD, _FORWARD),
    (*_DERIVATIVES, *_OPTIONS, *_CHECKS, *_ARGUMENTS),
)
