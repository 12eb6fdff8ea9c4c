"""Faults in python/fused_rmsnorm: modules, swaps, export. A test is what pytest takes."""

from . import Layer
from . import Mutant as M

_MODULES = "tests/modules/test_modules.py"
_RULE = "tests/replace/test_replace_rule.py"
_REPLACE = "tests/replace/test_replace.py"
_DISGUISED = "tests/replace/test_replace_disguised.py"
_WRAPPERS = "tests/replace/test_replace_wrappers.py"
_ONNX = "tests/export/test_onnx.py"

PYTHON = Layer(
    "python",
    "python/fused_rmsnorm",
    (),
    (
        M(
            "modules.py",
            "nn.init.constant_(self.weight, 1 - self.weight_offset)",
            "nn.init.constant_(self.weight, 1)",
            "a weight under an offset starts at 1",
            (_MODULES,),
        ),
        M(
            "modules.py",
            'if casting_mode not in ("torch", "llama"):',
            "if False:",
            "any casting_mode is taken",
            (_MODULES, "tests/contracts/test_errors.py"),
        ),
        M(
            "modules.py",
            "if bias and not elementwise_affine:",
            "if False:",
            "a bias without a weight is taken",
            (_MODULES, "tests/contracts/test_errors.py"),
        ),
        M(
            "_columns.py",
            "1 + bisect_left",
            "bisect_left",
            "one column too few in Python",
            ("tests/contracts/test_forward.py", _ONNX),
        ),
        M(
            "replace/belongings.py",
            'if "_hf_hook" in norm.__dict__:',
            "if False:",
            "a norm that accelerate moves is swapped",
            (_WRAPPERS,),
        ),
        M(
            "replace/belongings.py",
            "    if others:",
            "    if False:",
            "a norm with another parameter is swapped",
            (_RULE, _REPLACE),
        ),
        M(
            "replace/belongings.py",
            "if parameter.numel() == 0:",
            "if False:",
            "a parameter that is kept elsewhere is taken for one",
            (_RULE, _WRAPPERS),
        ),
        M(
            "replace/belongings.py",
            "elif callable(held) and hasattr(type(norm), name):",
            "elif False:",
            "a norm with a forward of its own is swapped",
            (_RULE,),
        ),
        M(
            "replace/belongings.py",
            "if known and name not in _OWN:",
            "if False:",
            "a class that overrides state_dict and the like is swapped",
            (_RULE,),
        ),
        M(
            "replace/operations.py",
            "if run.ran.arithmetic != self.arithmetic or run.ran.with_moves != moves:",
            "if False:",
            "a branch on the shape or the mode is overlooked",
            (_RULE,),
        ),
        M(
            "replace/operations.py",
            'f"{name} of {read} with {_constants(func, args, kwargs)}"',
            'f"{name} of {read}"',
            "a branch between two constants is overlooked",
            (_DISGUISED,),
        ),
        M(
            "replace/modes.py",
            '_autocast(mode == "autocast")',
            "_autocast(False)",
            "a norm is not asked what it does under autocast",
            (_DISGUISED,),
        ),
        M(
            "replace/probes.py",
            "return x, w * signs",
            "return x, w",
            "no norm is tried with negative weights",
            (_DISGUISED,),
        ),
        M(
            "replace/probes.py",
            "turned = off <= atol + 4 * step * size",
            "turned = off >= 0",
            "a few numbers may be far off",
            (_DISGUISED,),
        ),
        M(
            "replace/probes.py",
            "if not all(map(torch.equal, inputs, given)):",
            "if False:",
            "a norm that writes into its input is swapped",
            (_RULE,),
        ),
        M(
            "replace/evidence.py",
            "if isinstance(norm, nn.LayerNorm):",
            "if False:",
            "a LayerNorm is looked at like any norm",
            (_RULE, _REPLACE),
        ),
        M(
            "replace/probes.py",
            "rtol, atol = 1e-4, 2.5e-7",
            "rtol, atol = 1e-1, 2.5e-7",
            "numbers may differ by a tenth",
            (_REPLACE, _RULE),
        ),
        M(
            "replace/operations.py",
            "if settings(probe) != before:",
            "if False:",
            "a norm that counts its calls is swapped",
            (_RULE,),
        ),
        M(
            "replace/walk.py",
            "        if owner:",
            "        if False:",
            "norms that a wrapper holds on to are swapped",
            (_WRAPPERS, _RULE),
        ),
        M(
            "replace/walk.py",
            "if id(child) not in made:",
            "if True:",
            "a norm that is used twice becomes two",
            (_REPLACE, _RULE),
        ),
        M(
            "onnx.py",
            "standard and p is None and self.acc == torch.float32",
            "standard and self.acc == torch.float32",
            "ONNX: p is ignored from opset 23 on",
            (_ONNX,),
        ),
        M(
            "onnx.py",
            "self.llama &= sum_type == self.dtype",
            "self.llama &= True",
            "ONNX: a wider sum is rounded",
            (_ONNX,),
        ),
        M("onnx.py", "if offset:", "if False:", "ONNX: no offset", (_ONNX,)),
    ),
)
