"""torch.export archives (.pt2) as black-box encoders, without running anything the file brings along.

`torch.export.load` unpickles sample inputs and some weights, resolves operator names with getattr and evaluates shape
expressions; and some ATen operators open files (`aten.from_file` maps one, and what is copied into it is written). So the archive
is checked first and handed over without its sample inputs and guards: only operators of a list that compute on the tensors they
are given, raw weights and plain shape arithmetic pass.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sanitize import storage
from sanitize.errors import CheckpointError, ConfigError

# ATen operators that read and write nothing but tensors in memory; "_" at the end (in place) is the same operator
_PURE = frozenset(
    """
    _adaptive_avg_pool2d _assert_scalar _assert_tensor_metadata _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _safe_softmax _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_index _unsafe_view
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d abs adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool2d add addbmm addcdiv addcmul addmm alias all amax amin any arange argmax argmin as_strided atan2 atleast_1d
    avg_pool1d avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm broadcast_to bucketize cat ceil celu chunk clamp
    clamp_max clamp_min clone constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose2d convolution copy cos cosh
    cosine_similarity cumsum detach diag diagonal diff div dot dropout einsum elu embedding empty empty_like eq erf erfinv exp expand
    expand_as expm1 eye feature_dropout fill flatten flip floor floor_divide fmod full full_like gather ge gelu glu group_norm gt
    hardsigmoid hardswish hardtanh index index_add index_copy index_put index_select instance_norm interpolate isfinite isinf isnan
    item layer_norm le leaky_relu lerp lift_fresh lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log log10 log1p log2
    log_softmax logical_and logical_not logical_or logical_xor logsumexp lt masked_fill masked_scatter masked_select matmul max
    max_pool1d max_pool2d max_pool2d_with_indices maximum mean meshgrid min minimum mish mm movedim mul mv narrow native_dropout
    native_batch_norm native_group_norm native_layer_norm ne neg new_empty new_full new_ones new_zeros nonzero norm normalize
    ones ones_like outer pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal reflection_pad1d reflection_pad2d relu
    relu6 remainder repeat repeat_interleave replication_pad2d reshape reshape_as rms_norm roll rot90 round rsqrt rsub
    scalar_tensor scaled_dot_product_attention scatter scatter_add select select_scatter selu sgn sigmoid sign silu sin sinh slice
    slice_scatter softmax softplus sort split split_with_sizes sqrt square squeeze stack std std_mean sub sum swapaxes swapdims
    sym_numel sym_size sym_storage_offset sym_stride t tan tanh tensor_split threshold to topk transpose tril triu true_divide trunc
    type_as unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d
    var var_mean vdot view view_as where zero zeros zeros_like
    """.split()  # noqa: SIM905 - a hundred quoted lines would say less
)
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+?)_?(\.\w+)?")
_SCALAR = re.compile(
    r"torch\.sym_(int|float|max|min|not|ite)|"
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge)"
)
_TEXT = re.compile(r"[\w ,.>-]{0,200}")  # modes such as "tanh", equations of einsum; no path
_EXPRESSION = re.compile(
    r"(Symbol\('[su]\d+'(, (positive|integer|nonnegative)=True)*\)|Integer\(-?\d+\)|Add|Mul|Pow|Max|Min|Mod|FloorDiv|"
    r"[su]\d+|[-+*/(), ]|\d+)+"
)
_ENTRY = re.compile(
    r"models/model\.json|data/weights/\w+(\.\w+)?|data/constants/\w+(\.\w+)?|data/sample_inputs/model\.pt|"
    r"archive_format|archive_version|\.data/\w+|byteorder|\.format_version|extra/.*|version"
)


def load_exported(path: str) -> nn.Module:
    """The exported program as a module: (B, 3, S, S) → (B, D). Raises CheckpointError when it is not plainly safe."""
    try:
        archive = _checked_copy(storage.read_bytes(path), path)
        module: nn.Module = torch.export.load(archive).module()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        raise CheckpointError(
            f"{path}: cannot be loaded as a torch.export archive ({str(error).splitlines()[0] if str(error) else error!r}). "
            "Write it with torch.export.save(torch.export.export(model, (images,), dynamic_shapes=...), path)."
        ) from None
    return module


def traced(module: nn.Module, images: Tensor) -> tuple[bytes, Tensor]:
    """(a .pt2 archive of the module in eval mode for any batch size, its embeddings of these images). Raises ConfigError."""
    training = module.training
    try:
        module.eval()
        with torch.no_grad():
            embeddings = module(images)
            program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        archive = io.BytesIO()
        torch.export.save(program.run_decompositions(), archive)
    except Exception as error:  # of the module or of the tracer: any kind
        raise ConfigError(
            f"{type(module).__name__}: cannot be exported ({(str(error).strip().splitlines() or [repr(error)])[0][:200]}). Its forward "
            "must take images (B, 3, S, S) on the CPU and use tensor operations alone."
        ) from None
    finally:
        module.train(training)
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
        raise ConfigError(
            f"{type(module).__name__}: gives {_kind(embeddings)}, embeddings (B, D) were expected. Wrap it in a module that returns "
            "the embedding."
        )
    return archive.getvalue(), embeddings


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _checked_copy(data: bytes, path: str) -> io.BytesIO:
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        for info in source.infolist():
            entry = info.filename
            name = entry.partition("/")[2]
            if info.compress_type != zipfile.ZIP_STORED:  # torch.export.save compresses nothing; a bomb would
                raise CheckpointError(f"{path}: refused, {entry!r} is compressed. Write it with torch.export.save.")
            if not _ENTRY.fullmatch(name):
                raise CheckpointError(f"{path}: refused, it holds {entry!r}, which is not needed for a plain encoder.")
            content = b"" if name == "data/sample_inputs/model.pt" else source.read(entry)
            if name.endswith(".json"):
                content = _checked_json(json.loads(content), path)
            target.writestr(entry, content)
    copy.seek(0)
    return copy


def _checked_json(value: dict[str, Any], path: str) -> bytes:
    how = "Export the encoder again in eval mode with torch.export.export(...).run_decompositions()."
    for key, item in _pairs(value):
        if key == "use_pickle" and item is not False:
            raise CheckpointError(f"{path}: refused, it holds pickled weights, which can run any code. {how}")
        if key == "target" and not _is_pure(item):
            raise CheckpointError(f"{path}: refused, it calls {item!r}, which is not a plain tensor operator. {how}")
        if key == "as_string" and not (isinstance(item, str) and _TEXT.fullmatch(item)):
            raise CheckpointError(f"{path}: refused, an operator is given the text {item!r:.100}. {how}")
        if key == "expr_str" and not (isinstance(item, str) and _EXPRESSION.fullmatch(item)):
            raise CheckpointError(f"{path}: refused, it holds the shape expression {item!r}. {how}")
    if "guards_code" in value:
        value["guards_code"] = []
    return json.dumps(value).encode()


def _is_pure(target: Any) -> bool:
    if not isinstance(target, str):
        return False
    aten = _ATEN.fullmatch(target)
    return aten[1] in _PURE if aten else bool(_SCALAR.fullmatch(target))


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value at any depth. Operator calls stand under "target" next to "inputs"."""
    if isinstance(value, dict):
        if "target" in value and "inputs" in value:
            yield "target", value["target"]
        yield from ((key, item) for key, item in value.items() if key in ("use_pickle", "expr_str", "as_string"))
        for item in value.values():
            yield from _pairs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _pairs(item)
