"""RMSNorm of other runtimes on a CPU: forward only, fp32, the norm as ``f(x, weight)``.

Neither is a PyTorch operator, so each call hands the tensors over by pointer, without a copy, and
that is in its time. What is not: building and compiling the graph, once per weight. Threads are
the runtime's own, as many as torch has.

IPEX and sgl-kernel are not here: IPEX's last wheel (2.8.0) is for torch 2.8 alone, sgl-kernel's
(0.3.21) are for CUDA (2026-11).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .peers import EPS, Norm, Peer

__all__ = ["CPU_PEERS", "absent_cpu", "present_cpu"]


def _once_per_weight(build: Callable[[Tensor, int], Norm]) -> Norm:
    """A norm that builds its graph at the first call with a weight and a number of threads."""
    built: dict[tuple[int, int, int], Norm] = {}

    def norm(x: Tensor, w: Tensor) -> Tensor:
        if x.dtype != torch.float32 or w.dtype != torch.float32 or not x.is_contiguous():
            raise TypeError("contiguous fp32 only")
        key = (w.data_ptr(), w.numel(), torch.get_num_threads())
        if key not in built:
            built[key] = build(w.detach(), torch.get_num_threads())
        y: Tensor = built[key](x.detach(), w.detach())
        return y

    return norm


def _onnxruntime(module: Any) -> Norm:
    """RMSNormalization of opset 23 (SimplifiedLayerNormalization before it: the same kernel)."""
    from onnx import TensorProto, helper

    def build(weight: Tensor, threads: int) -> Norm:
        n = weight.numel()
        info = helper.make_tensor_value_info
        fp32 = TensorProto.FLOAT
        node = helper.make_node("RMSNormalization", ["x", "w"], ["y"], axis=-1, epsilon=EPS)
        inputs = [info("x", fp32, ["rows", n]), info("w", fp32, [n])]
        graph = helper.make_graph([node], "norm", inputs, [info("y", fp32, ["rows", n])])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        options = module.SessionOptions()
        options.intra_op_num_threads = threads
        # Its threads would otherwise spin through the turns of the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        session = module.InferenceSession(model.SerializeToString(), options, providers)

        def norm(x: Tensor, w: Tensor) -> Tensor:
            y = torch.empty_like(x)
            binding = session.io_binding()
            for name, t in (("x", x), ("w", w)):
                binding.bind_input(name, "cpu", 0, np.float32, tuple(t.shape), t.data_ptr())
            binding.bind_output("y", "cpu", 0, np.float32, tuple(y.shape), y.data_ptr())
            session.run_with_iobinding(binding)
            return y

        return norm

    return _once_per_weight(build)


def _openvino(module: Any) -> Norm:
    """The arithmetic with a constant weight, which its CPU plugin fuses into one RMS node."""
    from openvino import opset13 as ops

    def build(weight: Tensor, threads: int) -> Norm:
        n = weight.numel()
        x = ops.parameter([-1, n], np.float32, name="x")
        mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        root = ops.sqrt(ops.add(mean, np.float32(EPS)))
        normed = ops.multiply(x, ops.divide(np.float32(1), root))
        y = ops.multiply(normed, ops.constant(weight.numpy().copy()))
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = module.Core().compile_model(module.Model([y], [x], "norm"), "CPU", settings)
        request = compiled.create_infer_request()

        def norm(x: Tensor, _: Tensor) -> Tensor:
            y = torch.empty_like(x)
            request.set_input_tensor(module.Tensor(x.numpy(), shared_memory=True))
            request.set_output_tensor(module.Tensor(y.numpy(), shared_memory=True))
            request.infer()
            return y

        return norm

    return _once_per_weight(build)


_CALL = "forward only, fp32; tensors handed over by pointer, which is timed; own threads"
CPU_PEERS = {
    "onnxruntime": Peer("onnxruntime", _onnxruntime, False, f"{_CALL}, which do not spin"),
    "openvino": Peer("openvino", _openvino, False, f"{_CALL}; the weight is a constant"),
}


def present_cpu() -> dict[str, tuple[Peer, Norm]]:
    """name -> the peer and its norm, of those that can be imported."""
    found = {}
    for name, peer in CPU_PEERS.items():
        try:
            found[name] = (peer, peer.make(importlib.import_module(peer.module)))
        except Exception:
            continue
    return found


def absent_cpu() -> dict[str, str]:
    """module -> the error that importing it gives."""
    errors = {}
    for peer in CPU_PEERS.values():
        try:
            peer.make(importlib.import_module(peer.module))
        except Exception as error:
            errors[peer.module] = f"{type(error).__name__}: {error}".splitlines()[0]
    return errors
