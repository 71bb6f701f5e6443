"""Batch normalisation folded into the convolutions before it: the same embeddings, a pass over memory less after each of them.

Only for embedding images with frozen weights (fit, scan). Whatever trains an encoder, differentiates through it or names it by its
fingerprint takes the plain one. Measured beside the plain forward: `benchmarks.encoder_forward`, docs/results.md.
"""

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sanitize.stages.encoders import Encoder, device_of

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # relative, of the embeddings of two probes; what folding rounds otherwise is 1e-6 to 3e-6


class _Tracer(fx.Tracer):
    """Convolutions and normalisations stay whole whoever wrote them: timm's subclasses choose their padding by the image's size."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def folded(encoder: Encoder) -> Encoder:
    """An encoder that embeds as this one does (up to rounding) in less time; this one itself where there is nothing to fold, or
    where its backbone cannot be traced. What is given is not changed."""
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in encoder.backbone.modules()):
        return encoder
    try:
        fast = Encoder(_fold(encoder.backbone), encoder.spec)
    except Exception as error:  # a tracer fails in as many ways as models are written
        log.debug("%s: cannot be folded, used as it is: %s", encoder.spec.architecture, error)
        return encoder
    fast.train(encoder.training)
    if not _agree(fast, encoder):
        log.debug("%s: folded it embeds otherwise, used as it is", encoder.spec.architecture)
        return encoder
    return fast


def _fold(backbone: nn.Module) -> fx.GraphModule:
    """Layers that are not folded are shared with the backbone."""
    graph = _Tracer().trace(backbone)
    module = fx.GraphModule(backbone, graph)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        norm = _layer(module, node)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or calls[node.target] > 1:
            continue
        before = node.args[0]
        convolution = _layer(module, before)
        if isinstance(convolution, nn.Conv2d) and calls[before.target] == 1 and len(before.users) == 1:
            module.set_submodule(before.target, fuse_conv_bn_eval(convolution, norm))
            activation = getattr(norm, "act", nn.Identity())  # timm's norms end with one
            module.set_submodule(node.target, activation)
    return module.requires_grad_(False)


def _layer(module: nn.Module, node: Any) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


@torch.inference_mode()
def _agree(fast: Encoder, plain: Encoder) -> bool:
    """On noise; of a trace that froze a decision of Python code, or a layer that changes its weights, nothing else would tell."""
    size = plain.spec.image_size
    probes = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device_of(plain))
    expected: Tensor = plain(probes)
    found: Tensor = fast(probes)
    return bool(((found - expected).norm(dim=1) <= TOLERANCE * expected.norm(dim=1)).all())
